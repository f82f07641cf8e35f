"""Training from end to end with retrieval in the step: tokens per second, and the part spent waiting for neighbours.

The set is made of random numbers (synthetic.py), its chunks are the training sequences, so keys are looked up and
nothing is embedded: the ordinary case of training on the text of the set. Each sequence's own documents are excluded.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import timing
import torch
from bench_model import BATCH, NAME, NEIGHBOURS, TOKENS, model, training_step
from cases import DEVICE, ON_GPU, TINY
from synthetic import Store
from torch import Tensor

from retro_kernels.retrieval.index import EXACT, Index
from retro_kernels.retrieval.retriever import Retriever
from retro_kernels.retrieval.search import DenseSearcher, DeviceStore, DocumentTable, Stats

CHUNKS = 10_000_000 if ON_GPU else 500 if TINY else 20_000
STEPS = 20 if ON_GPU else 2 if TINY else 4
WARM_UP = 3 if ON_GPU else 1
VOCABULARY = 8192
AHEAD = "retrieval one step ahead"
APPROXIMATE = f"{AHEAD}, approximate index"
"""An exact search of so many chunks takes its share of a GPU."""
WAYS = (AHEAD, "retrieval in the step", "neighbours at hand", "RETRO off")
if ON_GPU or TINY:
    WAYS = (AHEAD, APPROXIMATE, *WAYS[1:])
RECALL = 0.95


@functools.cache
def _store() -> Store:
    return Store(CHUNKS, vocab_size=VOCABULARY, device=DEVICE)


@functools.cache
def retriever(factory: str) -> tuple[Retriever, dict[str, Any]]:
    """And what is to be told of its index."""
    store = _store()
    index, told = Index.build(store.embeddings, factory, device=DEVICE), {"factory": factory}
    if not index.is_exact:
        told["recall"] = round(index.tune(store.embeddings, RECALL)["recall"], 4)
        told["setting"] = index.setting
    return retriever_of(store, index), told


def retriever_of(store: Any, index: Index) -> Retriever:
    """Dense retrieval from a synthetic store; its chunks are looked up, never embedded."""
    documents = DocumentTable(store.document_ids, store.num_documents, DEVICE)
    on_device = DeviceStore(store, DEVICE) if ON_GPU else None
    stats = Stats()
    searcher = DenseSearcher(
        store,
        index,
        lambda: pytest.fail("a chunk of the set was not found in it"),
        documents=documents,
        stats=stats,
        device=DEVICE,
        device_store=on_device,
        embed_unknown=not ON_GPU,
    )
    return Retriever(store, searcher, documents=documents, device=DEVICE, device_store=on_device, stats=stats)


def loader(store: Any, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Sequences of successive chunks of the set, with the documents in them."""
    length = TOKENS // store.chunk_size
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        first = torch.randint(0, store.num_chunks - length, (BATCH,), generator=generator)
        rows = (first[:, None] + torch.arange(length)).numpy()
        tokens = torch.from_numpy(store.chunks[rows].astype("int64")).flatten(1)
        documents = torch.from_numpy(store.document_ids[rows])
        distinct = torch.where(torch.diff(documents, prepend=documents[:, :1] - 1) > 0, documents, -1)
        # the few documents of a sequence, not its 32 chunks
        exclude = distinct.sort(1, descending=True).values[:, : length // 33 + 2]
        yield tokens.to(DEVICE, non_blocking=True), exclude.to(DEVICE, non_blocking=True)


def run_ahead(ours: Retriever, steps: int = WARM_UP + STEPS) -> tuple[list[float], float]:
    """Seconds of each step with retrieval one step ahead, and the share of the run that the steps waited for it."""
    net = model(vocab_size=VOCABULARY)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)  # as train does
    prefetched = ours.prefetch(loader(ours.store, steps), num_neighbours=NEIGHBOURS)
    marks = _marks(net, optimiser, prefetched)
    waited = prefetched.stall_seconds - prefetched.first_seconds
    return _steps(marks), waited / (marks[-1] - marks[0])


def _marks(net: Any, optimiser: torch.optim.Optimizer, batches: Iterable[tuple[Any, Any]]) -> list[float]:
    """When each step was done; the neighbours of a batch may be None."""
    marks = []
    for (text, _), neighbours in batches:
        # the step takes the last token as a target only
        training_step(net, optimiser, torch.nn.functional.pad(text, (0, 1)), neighbours)
        if ON_GPU:
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
    return marks


def _steps(marks: list[float]) -> list[float]:
    """Seconds of the steps after the warm-up."""
    return [b - a for a, b in zip(marks[WARM_UP - 1 :], marks[WARM_UP:], strict=False)]


@pytest.mark.benchmark(
    group=f"training, {NAME}, B {BATCH}, N {TOKENS}, K {NEIGHBOURS}, set of {CHUNKS:,} chunks"
)
@pytest.mark.parametrize("name", WAYS)
def test_training(benchmark: Any, name: str) -> None:
    """The row's time is that of a step: the whole of a run over its number of steps, the first few left out."""
    lists = 1 << round(math.log2(4 * math.sqrt(CHUNKS)))
    ours, told = retriever(f"IVF{lists},SQfp16" if name == APPROXIMATE else EXACT)
    extra: dict[str, Any] = {"shown": {}, **told}
    if name in (AHEAD, APPROXIMATE):
        times, extra["stall_share"] = run_ahead(ours)
        extra["shown"]["waiting for neighbours, %"] = round(100 * extra["stall_share"], 2)
    else:
        net = model(vocab_size=VOCABULARY)
        optimiser = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)  # as train does
        times = _steps(_marks(net, optimiser, _batches(ours, name)))
    extra["shown"] = {"tokens/s": BATCH * TOKENS * len(times) / sum(times), **extra["shown"]}
    timing.record(benchmark, times, case=name, what="training", **extra)


def _batches(ours: Retriever, name: str) -> Iterator[tuple[Any, Any]]:
    """Batches with what the step gets to see: neighbours found there and then, ones that were found before, or none."""
    ready = None
    if name == "neighbours at hand":
        text, exclude = next(loader(ours.store, 1))
        ready = ours(text, num_neighbours=NEIGHBOURS, exclude_documents=exclude)
        found = ours.documents(ready.ids).flatten()
        assert (ready.lengths > 0).all() and not torch.isin(found, exclude.flatten()).any()
    for batch in loader(ours.store, WARM_UP + STEPS):
        if name == "retrieval in the step":
            yield batch, ours(batch[0], num_neighbours=NEIGHBOURS, exclude_documents=batch[1])
        else:
            yield batch, ready
