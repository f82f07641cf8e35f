"""Search in a retrieval set: queries per second at a recall@10 of at least 0.95, and what the index costs.

Every index is tuned to that recall by the library's own tuner; hnswlib, usearch and ScaNN join in where they are
installed, on the same vectors and threads. The row's time is that of one query out of a batch of a thousand.
"""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timing
import torch
from cases import DEVICE, ON_GPU, TINY
from synthetic import vectors

from retro_kernels.retrieval.index import GroundTruth, Index, choose_factory

DIM = 384
SIZES = (1_000_000, 10_000_000) if ON_GPU else (2_000,) if TINY else (50_000,)
QUERIES = 100 if TINY else 1000
TARGET = 0.95
FACTORIES = (
    ("Flat", "IVF*,SQfp16", "CAGRA") if ON_GPU else ("Flat", "IVF*,PQ192x4fs,Refine(SQfp16)", "HNSW32,SQ8")
)


@functools.lru_cache(1)
def base(n: int) -> tuple[np.ndarray, GroundTruth]:
    data = vectors(n, DIM, DEVICE).cpu().numpy()
    return data, GroundTruth(data, num_queries=QUERIES)


def _group(n: int) -> str:
    return f"search, {n:,} x {DIM}, recall@10 of {TARGET}"


def _measure(
    benchmark: Any, n: int, name: str, call: Callable[[], Any], recall: float, build: float, setting: str
) -> None:
    if not benchmark.disabled:
        samples = timing.samples([call], 5, wall=True)
        timing.record(
            benchmark,
            [s / QUERIES for s in samples],
            case=name,
            what="search",
            n=n,
            recall=recall,
            build_s=build,
            shown={
                "recall": recall,
                "queries/s": QUERIES / sorted(samples)[2],
                "build s": build,
                "setting": setting or "-",
            },
        )


def _indexes() -> list[tuple[int, str]]:
    """For each size the index that is chosen by itself, then others by factory string."""
    found = []
    for n in SIZES:
        chosen = choose_factory(n, DIM, DEVICE)
        named = [f.replace("IVF*", f"IVF{1 << round(np.log2(4 * n**0.5))}") for f in FACTORIES]
        found += [(n, f) for f in dict.fromkeys((chosen, *named)) if f != "CAGRA" or n <= 1_000_000]
    return found


@pytest.mark.parametrize(("n", "factory"), _indexes())
def test_index(benchmark: Any, n: int, factory: str) -> None:
    data, truth = base(n)
    benchmark.group = _group(n)
    name = f"retro_kernels: {factory}" + (
        " (the default)" if factory == choose_factory(n, DIM, DEVICE) else ""
    )
    benchmark.extra_info["case"] = name
    begin = time.perf_counter()
    try:
        index = Index.build(data, factory, device=DEVICE)
        index.search(truth.queries[:1], 1)
    except (ImportError, ValueError) as error:
        pytest.skip(str(error).splitlines()[0])
    build = time.perf_counter() - begin
    result = index.tune(data, TARGET, num_queries=min(QUERIES, 200 if n > 1_000_000 else QUERIES))
    queries = truth.queries.to(DEVICE)
    _measure(benchmark, n, name, lambda: index.search(queries, 10), result["recall"], build, index.setting)


def _recall(truth: GroundTruth, data: np.ndarray, ids: np.ndarray) -> float:
    """By distance, and without the query itself, as the library counts it."""
    found = ids[:, :11]
    own = found == truth.rows[:, None]
    order = np.argsort(own, axis=1, kind="stable")[:, :10]
    near = data[np.take_along_axis(found, order, 1)].astype(np.float32)
    distance = np.square(near - truth.queries.numpy()[:, None]).sum(-1)
    return float((distance <= truth.border.numpy() + 1e-5).mean())


def _hnswlib(data: np.ndarray) -> tuple[Callable[[np.ndarray, int], np.ndarray], list[int]]:
    import hnswlib

    index = hnswlib.Index(space="l2", dim=DIM)
    index.init_index(max_elements=len(data), M=32, ef_construction=200)
    index.set_num_threads(torch.get_num_threads())
    index.add_items(data.astype(np.float32))

    def search(queries: np.ndarray, ef: int) -> np.ndarray:
        index.set_ef(ef)
        return index.knn_query(queries, k=11)[0].astype(np.int64)

    return search, [16, 32, 64, 128, 256, 512]


def _usearch(data: np.ndarray) -> tuple[Callable[[np.ndarray, int], np.ndarray], list[int]]:
    from usearch.index import Index as Usearch

    index = Usearch(ndim=DIM, metric="l2sq", dtype="f16", connectivity=32)
    index.add(np.arange(len(data)), data, threads=torch.get_num_threads())

    def search(queries: np.ndarray, ef: int) -> np.ndarray:
        index.expansion_search = ef
        return index.search(queries, 11, threads=torch.get_num_threads()).keys.astype(np.int64)

    return search, [16, 32, 64, 128, 256, 512]


def _scann(data: np.ndarray) -> tuple[Callable[[np.ndarray, int], np.ndarray], list[int]]:
    import scann

    leaves = 4 * int(len(data) ** 0.5)
    index = (
        scann.scann_ops_pybind.builder(data.astype(np.float32), 11, "squared_l2")
        .tree(
            num_leaves=leaves, num_leaves_to_search=leaves // 20, training_sample_size=min(len(data), 250_000)
        )
        .score_ah(2, anisotropic_quantization_threshold=0.2)
        .reorder(100)
        .build()
    )

    def search(queries: np.ndarray, probes: int) -> np.ndarray:
        return index.search_batched_parallel(queries, leaves_to_search=probes)[0].astype(np.int64)

    return search, [8, 16, 32, 64, 128, 256]


OTHERS = {"hnswlib": _hnswlib, "usearch": _usearch, "scann": _scann}


@pytest.mark.skipif(ON_GPU, reason="these search on the CPU; the other rows here are a GPU's")
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("n", SIZES)
def test_others(benchmark: Any, n: int, name: str) -> None:
    benchmark.group = _group(n)
    benchmark.extra_info["case"] = name
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    data, truth = base(n)
    begin = time.perf_counter()
    search, settings = OTHERS[name](data)
    build = time.perf_counter() - begin
    queries = truth.queries.numpy()
    for setting in settings:
        recall = _recall(truth, data, search(queries, setting))
        if recall >= TARGET:
            break
    _measure(benchmark, n, name, lambda: search(queries, setting), round(recall, 4), build, str(setting))
