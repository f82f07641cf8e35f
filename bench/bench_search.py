"""Search in a retrieval set: queries per second at a recall@10 of at least 0.95, and what the index costs.

    python bench/run.py bench/bench_search.py --out bench/results/retrieval.json             # 10,000 and 100,000 chunks
    python bench/run.py bench/bench_search.py --out bench/results/retrieval.json --merge --sizes 1000000

Every index is tuned to that recall in one way: parameters doubled until it is reached, then the last doubling halved
three times; so all are compared at nearly the same recall. hnswlib, usearch and ScaNN join in where they are
installed, on the same vectors and threads; ScaNN has two parameters, of which the fastest pair counts. The row's time
is that of one query out of a batch of a thousand. The index that is chosen by itself also serves a training run
(bench_training.py): the share of the run that its steps waited for it; RETRO_BENCH_STALL=0 leaves that out. Building
and searching are also given in processor seconds, of all threads together: what they cost where other work takes a
share of the cores. test_in_turn searches the chosen index and a graph in turn, since a machine's speed changes by more
than they differ between one case and the next.

On a CPU ten million vectors are kept in a file, and only the index that is chosen by itself is measured: the others
would compare every query with all of them, or keep them or a graph in memory. About 12 GB of memory and as much disk.
"""

from __future__ import annotations

import functools
import importlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timing
import torch
from bench_training import VOCABULARY, retriever_of, run_ahead
from cases import DEVICE, ON_GPU, TINY
from synthetic import Store, vectors

from retro_kernels.retrieval.index import EXACT, GroundTruth, Index, choose_factory, least

DIM = 384
SIZES = (1_000_000,) if ON_GPU else (2_000,) if TINY else (10_000, 100_000)
if "RETRO_BENCH_SIZES" in os.environ:
    SIZES = tuple(int(n) for n in os.environ["RETRO_BENCH_SIZES"].split(","))
QUERIES = 100 if TINY else 1000
TARGET = 0.95
IN_MEMORY = 1_000_000
WITH_STALL = os.environ.get("RETRO_BENCH_STALL", "1") == "1"
GRAPH = "HNSW32,SQ8"
CODES = ("IVF*,PQ192x4fs,RFlat", "PCAR256,IVF*,PQ128x4fs,RFlat")
FACTORIES = (EXACT, "IVF*,SQfp16", "CAGRA") if ON_GPU else (EXACT, *CODES, GRAPH, "HNSW32,Flat")


@functools.cache
def folder() -> tempfile.TemporaryDirectory[str]:
    """Deleted when the process ends."""
    return tempfile.TemporaryDirectory(prefix="retro-search-")


@functools.lru_cache(1)
def base(n: int) -> tuple[np.ndarray, GroundTruth]:
    if n > IN_MEMORY and not ON_GPU:
        path = Path(folder().name) / f"vectors-{n}.npy"
        data = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(n, DIM))
        vectors(n, DIM, DEVICE, out=torch.from_numpy(data))
    else:
        data = vectors(n, DIM, DEVICE).cpu().numpy()
    return data, GroundTruth(data, num_queries=queries_of(n))


def queries_of(n: int) -> int:
    return min(QUERIES, 200 if n > IN_MEMORY else QUERIES)


def timed(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """The result, and what it took: seconds, and processor seconds of all threads."""
    wall, processor = time.perf_counter(), time.process_time()
    result = call()
    return result, {
        "build_s": time.perf_counter() - wall,
        "build_processor_s": time.process_time() - processor,
    }


def _group(n: int) -> str:
    return f"search, {n:,} x {DIM}, recall@10 of {TARGET}"


def _record(
    benchmark: Any,
    n: int,
    call: Callable[[], Any],
    recall: float,
    build: dict[str, float],
    setting: str,
    **extra: Any,
) -> None:
    """`bytes_per_chunk` in extra: of the index alone, the set's own files not counted."""
    if benchmark.disabled:
        return
    processor = time.process_time()
    samples = timing.samples([call], 5, wall=True)
    processor = (time.process_time() - processor) / (len(samples) + 1)  # a first call to warm up is in it
    queries = queries_of(n)
    extra["queries_per_processor_s"] = queries / processor
    shown = {
        "recall": recall,
        "queries/s": queries / sorted(samples)[2],
        "queries/processor-s": queries / processor,
        "build s": build["build_s"],
        "build processor-s": build["build_processor_s"],
        "setting": setting or "-",
    }
    benchmark.extra_info["shown"] = shown | {
        name: extra[key]
        for key, name in (("bytes_per_chunk", "bytes a chunk"), ("stall_share", "stall"))
        if key in extra
    }
    timing.record(benchmark, [s / queries for s in samples], recall=recall, setting=setting, **build, **extra)


def _indexes() -> list[tuple[int, str]]:
    """For each size the index that is chosen by itself, then others by factory string."""
    found = []
    for n in SIZES:
        chosen = choose_factory(n, DIM, DEVICE)
        named = [f.replace("IVF*", f"IVF{1 << round(np.log2(4 * n**0.5))}") for f in FACTORIES]
        if n > IN_MEMORY:
            named = [f for f in named if ON_GPU and f != "CAGRA"]
        found += [(n, f) for f in dict.fromkeys((chosen, *named))]
    return found


def _bytes_per_chunk(index: Index, n: int) -> float:
    """Of the file as it would be written; an exact index has none, and holds its vectors in fp32 (a GPU in fp16)."""
    if index.is_exact:
        return DIM * (2 if ON_GPU else 4)
    with tempfile.TemporaryDirectory() as folder:
        index.save(Path(folder) / "index")
        return round((Path(folder) / "index").stat().st_size / n, 1)


@pytest.mark.parametrize(("n", "factory"), _indexes())
def test_index(benchmark: Any, n: int, factory: str) -> None:
    data, truth = base(n)
    chosen = factory == choose_factory(n, DIM, DEVICE)
    benchmark.group = _group(n)
    benchmark.extra_info.update(
        case=f"retro_kernels: {factory}" + (" (the default)" if chosen else ""),
        what="search",
        n=n,
        factory=factory,
        default=chosen,
    )
    try:
        index, build = timed(lambda: Index.build(data, factory, device=DEVICE))
        index.search(truth.queries[:1], 1)
    except (ImportError, ValueError) as error:
        pytest.skip(str(error).splitlines()[0])
    result = index.tune(data, TARGET, num_queries=queries_of(n))
    queries = truth.queries.to(DEVICE)
    extra: dict[str, Any] = {"bytes_per_chunk": _bytes_per_chunk(index, n)}
    if chosen and WITH_STALL:
        store = Store(n, DIM, VOCABULARY, DEVICE, embeddings=data)
        _, extra["stall_share"] = run_ahead(retriever_of(store, index))
    _record(benchmark, n, lambda: index.search(queries, 10), result["recall"], build, index.setting, **extra)


@functools.lru_cache(1)
def _beside_the_graph(n: int) -> dict[str, tuple[list[float], float, str]]:
    """Of the index that is chosen by itself and of a graph, searched in turn: seconds a query, recall, setting."""
    data, truth = base(n)
    queries, indexes, found = truth.queries, {}, {}
    for factory in (choose_factory(n, DIM, DEVICE), GRAPH):
        index = indexes[factory] = Index.build(data, factory, device=DEVICE)
        found[factory] = index.tune(data, TARGET, num_queries=queries_of(n))["recall"], index.setting
    samples = timing.in_turn({f: functools.partial(x.search, queries, 10) for f, x in indexes.items()})
    return {f: ([s / queries_of(n) for s in samples[f]], *found[f]) for f in indexes}


@pytest.mark.skipif(ON_GPU, reason="the graph searches on the CPU")
@pytest.mark.parametrize("graph", [False, True], ids=["default", "graph"])
@pytest.mark.parametrize("n", [n for n in SIZES if n <= IN_MEMORY])
def test_in_turn(benchmark: Any, n: int, graph: bool) -> None:
    chosen = choose_factory(n, DIM, DEVICE)
    case = GRAPH if graph else chosen
    benchmark.group = f"search in turn, {n:,} x {DIM}, recall@10 of {TARGET}"
    samples, recall, setting = _beside_the_graph(n)[case]
    extra = {"what": "search in turn", "n": n, "default": not graph, "recall": recall, "setting": setting}
    shown = {"recall": recall, "queries/s": 1 / sorted(samples)[len(samples) // 2], "setting": setting or "-"}
    timing.record(benchmark, samples, case=f"retro_kernels: {case}", shown=shown, **extra)


def _recall(truth: GroundTruth, data: np.ndarray, ids: np.ndarray) -> float:
    """By distance, and without the query itself, as the library counts it."""
    found = ids[:, :11]
    own = found == truth.rows[:, None]
    order = np.argsort(own, axis=1, kind="stable")[:, :10]
    near = data[np.take_along_axis(found, order, 1)].astype(np.float32)
    distance = np.square(near - truth.queries.numpy()[:, None]).sum(-1)
    return float((distance <= truth.border.numpy() + 1e-5).mean())


Search = Callable[[np.ndarray, int, int], np.ndarray]
Built = tuple[Search, list[int], tuple[int, ...], Callable[[Path], Any]]
"""How to search with two parameters, values of the first, of the second (one where an index has none), and how to write
the index into a folder."""


EF = [8, 16, 32, 64, 128, 256, 512]


def _hnswlib(data: np.ndarray) -> Built:
    import hnswlib

    index = hnswlib.Index(space="l2", dim=DIM)
    index.init_index(max_elements=len(data), M=32, ef_construction=80)
    index.set_num_threads(torch.get_num_threads())
    index.add_items(data.astype(np.float32))

    def search(queries: np.ndarray, ef: int, _: int) -> np.ndarray:
        index.set_ef(ef)
        return index.knn_query(queries, k=11)[0].astype(np.int64)

    return search, EF, (0,), lambda folder: index.save_index(str(folder / "index"))


def _usearch(data: np.ndarray) -> Built:
    from usearch.index import Index as Usearch

    index = Usearch(ndim=DIM, metric="l2sq", dtype="f16", connectivity=32)
    index.add(np.arange(len(data)), data, threads=torch.get_num_threads())

    def search(queries: np.ndarray, ef: int, _: int) -> np.ndarray:
        index.expansion_search = ef
        return index.search(queries, 11, threads=torch.get_num_threads()).keys.astype(np.int64)

    return search, EF, (0,), lambda folder: index.save(str(folder / "index"))


def _scann(data: np.ndarray) -> Built:
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

    def search(queries: np.ndarray, probes: int, compared: int) -> np.ndarray:
        """compared: how many of what the codes find are compared by their vectors."""
        found = index.search_batched_parallel(queries, 11, compared, probes)
        return found[0].astype(np.int64)

    return (
        search,
        [8, 16, 32, 64, 128, 256],
        (25, 50, 100, 200, 400),
        lambda folder: index.serialize(str(folder)),
    )


OTHERS = {"hnswlib": _hnswlib, "scann": _scann, "usearch": _usearch}


@pytest.mark.skipif(ON_GPU, reason="these search on the CPU; the other rows here are a GPU's")
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("n", SIZES)
def test_others(benchmark: Any, n: int, name: str) -> None:
    benchmark.group = _group(n)
    benchmark.extra_info.update(case=name, what="search", n=n)
    try:
        importlib.import_module(name)
    except ImportError as error:
        pytest.skip(str(error))
    if n > IN_MEMORY:
        pytest.skip("keeps its vectors, or a graph, in memory beside them")
    data, truth = base(n)
    (search, firsts, seconds, save), build = timed(lambda: OTHERS[name](data))
    queries = truth.queries.numpy()

    def recall(first: int, second: int) -> float:
        return _recall(truth, data, search(queries, first, second))

    def least_first(second: int) -> int | None:
        return least(firsts, lambda first: recall(first, second) >= TARGET)

    settings = [(first, second) for second in seconds if (first := least_first(second)) is not None]
    settings = settings or [(firsts[-1], seconds[-1])]
    if len(settings) > 1:
        samples = timing.in_turn({s: functools.partial(search, queries, *s) for s in settings})
        settings.sort(key=lambda setting: float(np.median(samples[setting])))
    first, second = settings[0]
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    _record(
        benchmark,
        n,
        lambda: search(queries, first, second),
        round(recall(first, second), 4),
        build,
        f"{first}, {second}" if second else str(first),
        bytes_per_chunk=round(size / n, 1),
    )


for case in (test_index, test_in_turn, test_others):
    case.varies = True  # with the sizes that are asked for
