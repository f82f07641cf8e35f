"""Building a retrieval set from real text: chunks per second, by stage, and the memory that it takes.

    python bench/run.py bench/bench_build.py --out bench/results/build.json
    RETRO_BENCH_CHUNKS=100000 python bench/run.py bench/bench_build.py --out bench/results/build.json

A set of CHUNKS chunks by `build_retrieval_set` with everything by default, so a tokenizer is trained, MiniLM embeds and
the index is chosen by size; in a process of its own, since its peak memory is asked for. The text is that of RETRO_DATA
(../shared/data beside the checkout); where that is absent, the standard library's, over again with other names in it.
Processor seconds stand beside the wall's: on a machine that others use too they are what the build itself cost. The
rate of a large matrix product, measured right after it, says how many chunks a second MiniLM's products alone allow.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import resource
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import timing
import torch
from cases import ON_GPU, TINY
from roofline import matmul_rate
from torch.utils.flop_counter import FlopCounterMode

GOAL_CHUNKS = 100_000
CHUNKS = int(os.environ.get("RETRO_BENCH_CHUNKS", 100 if TINY else 10_000))
BYTES_OF_A_CHUNK = 64 * 4.1
"""Of text in these corpora, by a tokenizer trained on them: how much of it is taken."""
SAMPLE = 512
"""Chunks whose operations are counted."""
CORPORA = (
    "rfc/rfc-families-dev",
    "openstax/openstax-dev",
    "britannica/eb4-1810-vols1-20",
    "dclaw/dclaw-code",
    "factbook/factbook-2016-2020-2023",
    "books/books-dev",
    "peps/peps-0001-0699",
)


def corpora() -> Iterator[str]:
    """Documents of all corpora in turn, so that any number of them is of every kind."""
    from retrieval_quality import data_folder, json_lines

    folder = data_folder()
    paths = [folder / f"{name}.jsonl.xz" for name in CORPORA] if folder else []

    for row in itertools.zip_longest(*(json_lines(path) for path in paths if path.exists())):
        yield from (entry["text"] for entry in row if entry and entry["text"])


def standard_library() -> Iterator[str]:
    """Its modules, over and over; from the second time on with a number in every name, so that no text comes twice."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    for turn in itertools.count():
        for path in paths:
            text = path.read_text(encoding="utf-8", errors="replace")
            yield text if turn == 0 else text.replace("self", f"self{turn}").replace("    ", f"    {turn}", 1)


def text_of(chunks: int) -> tuple[str, list[str]]:
    """(where it is from, documents), cut off where there is enough for `chunks`."""
    wanted = int(chunks * BYTES_OF_A_CHUNK)
    largest = max(wanted // 50, 2_000)  # many documents, not one book
    source = "real text" if next(corpora(), None) else "standard library"
    found, size = [], 0
    for text in corpora() if source == "real text" else standard_library():
        found.append(text[:largest])
        size += len(found[-1].encode())
        if size >= wanted:
            break
    return source, found


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Watched:
    """An embedder that says what it cost."""

    def __init__(self, embedder: Any) -> None:
        self._embedder = embedder
        self.wall = self.processor = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._embedder, name)

    def embed(self, texts: Sequence[str], progress: Callable[[int], object] | None = None) -> Any:
        wall, processor = time.perf_counter(), time.process_time()
        result = self._embedder.embed(texts, progress)
        self.wall += time.perf_counter() - wall
        self.processor += time.process_time() - processor
        return result


def build(chunks: int) -> dict[str, Any]:
    """Builds and measures: to be called in a process that did nothing before."""
    from retro_kernels.data.corpus import Document
    from retro_kernels.retrieval.build import build_retrieval_set
    from retro_kernels.retrieval.embedder import load_embedder
    from retro_kernels.retrieval.store import ChunkStore

    source, texts = text_of(chunks)
    documents = [Document(f"{i}", text) for i, text in enumerate(texts)]
    embedder = Watched(load_embedder())
    embedder.embed(["a first call loads what it needs"] * 64)
    embedder.wall = embedder.processor = 0.0
    before = peak_bytes()
    wall, processor = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        manifest = build_retrieval_set(documents, Path(folder) / "set", embedder=embedder, progress=False)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        peak, embedding = peak_bytes(), (embedder.wall, embedder.processor)
        store = ChunkStore.open(Path(folder) / "set")
        sample = store.texts(range(0, store.num_chunks, max(1, store.num_chunks // SAMPLE)))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # what other threads do is not counted
        with FlopCounterMode(display=False) as counter:
            embedder.embed(sample)
        torch.set_num_threads(threads)
    seconds = manifest["seconds"]
    return {
        "source": source,
        "dtype": str(embedder.dtype).removeprefix("torch."),
        "chunks": manifest["num_chunks"],
        "text_bytes": manifest["text_bytes"],
        "peak_bytes": peak,
        "beyond_bytes": peak - before,
        "flops_of_a_chunk": counter.get_total_flops() / len(sample),
        "product_rate": matmul_rate(embedder.dtype),
        # (wall, processor) seconds; of the parts within the rest the wall alone is known
        "total": (wall, processor),
        "embedding": embedding,
        "everything else": (wall - embedding[0], processor - embedding[1]),
        "cutting": (seconds["cut"], None),
        "index": (seconds["index"], None),
    }


@pytest.mark.skipif(ON_GPU, reason="two cores build it; the other rows here are a GPU's")
def test_build(benchmark: Any) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        measured = pool.apply(build, (CHUNKS,))
    chunks = measured["chunks"]
    benchmark.group = f"build of a set of {chunks:,} chunks, {measured['source']}, {measured['dtype']}"
    wall, processor = measured["total"]
    shown = {"chunks/s": chunks / wall, "chunks/processor-s": chunks / processor}
    for stage in ("embedding", "everything else", "cutting", "index"):
        shown[f"{stage} s"], seconds = measured[stage]
        if seconds is not None:
            shown[f"{stage} processor-s"] = seconds
    shown["chunks/s of the embedder's products"] = measured["product_rate"] / measured["flops_of_a_chunk"]
    shown["peak MiB"] = measured["peak_bytes"] / 2**20
    shown["MiB beyond text and model"] = measured["beyond_bytes"] / 2**20
    minutes = GOAL_CHUNKS / chunks / 60
    if chunks < 0.9 * GOAL_CHUNKS:
        shown[f"{GOAL_CHUNKS:,} chunks by proportion, min"] = minutes * wall
        shown[f"{GOAL_CHUNKS:,} chunks by proportion, processor-min"] = minutes * processor
    timing.record(
        benchmark,
        [wall],
        case="retro_kernels",
        what="build",
        minutes_of_goal=minutes * wall,
        processor_minutes_of_goal=minutes * processor,
        measured=measured,
        shown=shown,
    )
