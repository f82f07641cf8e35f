"""Prefetching changes when neighbours are found, and nothing else."""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from retrieval.sets import BagEmbedder, M, MemoryStore, dense, make_documents
from torch import Tensor

from retro_kernels.ops import NeighbourBatch
from retro_kernels.ops._backend import can_limit_threads
from retro_kernels.retrieval import prefetch
from retro_kernels.retrieval.retriever import Retriever


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "retro-kernels-prefetch"]


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true() and time.monotonic() < end:
        time.sleep(0.005)


@pytest.fixture
def retriever(seed: int) -> Iterator[Retriever]:
    yield dense(MemoryStore(make_documents(40, shared=False), BagEmbedder()))
    gc.collect()
    assert not threads()


def batches(num: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randint(1, 60, (2, 3 * M)), torch.randint(-1, 40, (2, 2))) for _ in range(num)]


@pytest.mark.parametrize("depth", [1, 3])
def test_order_and_results_are_those_of_plain_calls(retriever: Retriever, depth: int) -> None:
    loader = batches(7)
    prefetcher = retriever.prefetch(loader, num_neighbours=3, depth=depth)
    assert len(prefetcher) == 7
    for _ in range(2):  # like a loader, it starts anew
        got = list(prefetcher)
        assert [id(batch) for batch, _ in got] == [id(batch) for batch in loader]
        for (tokens, exclude), neighbours in got:
            want = retriever(tokens, num_neighbours=3, exclude_documents=exclude)
            assert all(torch.equal(a, b) for a, b in zip(neighbours, want, strict=True))
    assert prefetcher.steps == 14


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the cores are free")
def test_the_cores_are_left_to_the_step(retriever: Retriever, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    seen = []
    search = retriever.searcher.search
    monkeypatch.setattr(
        retriever.searcher, "search", lambda *args: seen.append(torch.get_num_threads()) or search(*args)
    )
    try:
        for _ in retriever.prefetch(batches(2)):
            assert torch.get_num_threads() == 2
        retriever(batches(1)[0][0])
    finally:
        torch.set_num_threads(before)
    assert seen == ([1, 1, 2] if can_limit_threads() else [2, 2, 2])


@pytest.mark.parametrize(
    "form",
    [
        *("tensor", "list", "mapping", "mapping without exclusion"),
        *("object", "object without exclusion", "inputs"),
    ],
)
def test_forms_of_a_batch(retriever: Retriever, form: str) -> None:
    (tokens, exclude) = batches(1)[0]

    class Batch:
        def __init__(self) -> None:
            self.tokens = tokens
            if form == "object":
                self.exclude_documents = exclude

    loader: list[Any] = [
        {
            "tensor": tokens,
            "list": [tokens, exclude],  # as torch's loader makes of pairs
            "mapping": {"tokens": tokens, "exclude_documents": exclude},
            "mapping without exclusion": {"tokens": tokens},
            "object": Batch(),
            "object without exclusion": Batch(),
            "inputs": ("x", exclude, tokens),
        }[form]
    ]
    inputs = (lambda batch: (batch[2], batch[1])) if form == "inputs" else None
    [(batch, neighbours)] = retriever.prefetch(loader, inputs=inputs)
    excluded = None if form == "tensor" or "without" in form else exclude
    assert batch is loader[0]
    assert torch.equal(neighbours.ids, retriever(tokens, exclude_documents=excluded).ids)


def test_a_batch_of_unknown_form_is_named(retriever: Retriever) -> None:
    tokens, exclude = batches(1)[0]
    pairs = [("text", "label"), (tokens, "label"), ("text", exclude)]
    for batch in ("text", {"text": tokens}, *pairs, (tokens, tokens.roll(-1, 1), exclude)):
        with pytest.raises(TypeError, match=f"this is a {type(batch).__name__}"):
            list(retriever.prefetch([batch]))
    with pytest.raises(TypeError, match=r"two tensors \[2, .*may be tokens and their targets.*Give inputs="):
        list(retriever.prefetch([(tokens, tokens.roll(-1, 1))]))


def failing_loader(good: int, error: type[BaseException]) -> Iterator[Tensor]:
    yield from (torch.ones(1, M, dtype=torch.int64) for _ in range(good))
    raise error("the disk is gone")


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_exception_of_the_loader_surfaces_in_the_loop(
    retriever: Retriever, error: type[BaseException]
) -> None:
    prefetcher = retriever.prefetch(failing_loader(2, error))
    late = threading.Timer(30, prefetcher.close)  # for a loop that would wait for ever
    late.start()
    with pytest.raises(error, match="the disk is gone") as caught:
        for _ in prefetcher:
            pass
    late.cancel()
    assert prefetcher.steps == 2
    assert "failing_loader" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]


def test_an_exception_of_the_retriever_surfaces_in_the_loop(retriever: Retriever) -> None:
    with pytest.raises(ValueError, match="token id") as caught:
        list(retriever.prefetch([torch.ones(1, M).long(), torch.full((1, M), 10**6)]))
    assert "check_queries" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]


@pytest.mark.parametrize("depth", [1, 3])
def test_leaving_early_ends_the_thread(retriever: Retriever, depth: int) -> None:
    """Also one that has a batch which does not fit; and it reads no further."""
    read = []

    def endless() -> Iterator[Tensor]:
        while True:
            read.append(1)
            yield torch.ones(1, M, dtype=torch.int64)

    prefetcher = retriever.prefetch(endless(), depth=depth)
    for _ in prefetcher:
        assert threads()
        if prefetcher.steps == 3:
            until(lambda: len(read) == 3 + depth + 1)
            time.sleep(0.05)
            break
    assert not threads() and len(read) == 3 + depth + 1


def test_what_the_loop_has_used_is_freed_before_the_next_batch_is_there(
    retriever: Retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    left = []
    usual = Retriever.__call__

    def watched(*args: Any, **options: Any) -> Any:
        found = usual(*args, **options)
        alive.add(found.tokens)
        return found

    def inputs(batch: Tensor) -> tuple[Tensor, None]:
        tokens = batch.clone()
        alive.add(tokens)
        return tokens, None

    def loader() -> Iterator[Tensor]:
        for _ in range(3):
            until(lambda: not alive)
            left.append(len(alive))
            yield torch.ones(1, M, dtype=torch.int64)

    monkeypatch.setattr(Retriever, "__call__", watched)
    for batch, neighbours in retriever.prefetch(loader(), inputs=inputs):
        del batch, neighbours
    assert left == [0, 0, 0]


@pytest.mark.parametrize("way", ["break", "exception"])
def test_a_loader_that_hangs_does_not_hold_a_loop_that_is_left(
    retriever: Retriever, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(prefetch, "_LEAVE_SECONDS", 0.2)
    release, asked = threading.Event(), []

    def hanging() -> Iterator[Tensor]:
        yield torch.ones(1, M, dtype=torch.int64)
        release.wait(60)
        asked.append(1)
        yield torch.ones(1, M, dtype=torch.int64)
        asked.append(2)

    def leave() -> None:
        for _ in retriever.prefetch(hanging()):
            if way == "exception":
                raise OSError("of the loop")
            break

    calls, start = retriever.stats.calls, time.perf_counter()
    try:
        with pytest.warns(
            RuntimeWarning, match="the loop was left, but the loader or the retriever is still"
        ):
            if way == "break":
                leave()
            else:
                with pytest.raises(OSError, match="of the loop"):
                    leave()
        assert time.perf_counter() - start < 30
        [left] = [t for t in threading.enumerate() if t.name == "retro-kernels-prefetch"]
        assert left.daemon
        assert retriever(torch.ones(1, M, dtype=torch.int64)).ids.shape == (1, 1, 2)  # which it does not hold
    finally:
        release.set()
    left.join(30)
    assert not left.is_alive() and asked == [1] and retriever.stats.calls == calls + 2


def test_a_program_ends_though_its_loader_hangs() -> None:
    program = """
        import threading, torch
        from retrieval.sets import BagEmbedder, M, MemoryStore, dense, make_documents
        from retro_kernels.retrieval import prefetch
        prefetch._LEAVE_SECONDS = 0.2
        def hanging():
            yield torch.ones(1, M, dtype=torch.int64)
            threading.Event().wait()
        retriever = dense(MemoryStore(make_documents(40, shared=False), BagEmbedder()))
        for _ in retriever.prefetch(hanging()):
            raise SystemExit(7)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=environment, timeout=120)
    assert ended.returncode == 7


def test_close_ends_a_loop_that_waits(retriever: Retriever) -> None:
    release, given_up = threading.Event(), threading.Event()

    def endless() -> Iterator[Tensor]:
        yield torch.ones(1, M, dtype=torch.int64)
        release.wait(60)
        while not given_up.is_set():
            yield torch.ones(1, M, dtype=torch.int64)

    prefetcher = retriever.prefetch(endless())

    def loop() -> None:
        for _ in prefetcher:
            pass

    consumer = threading.Thread(target=loop)
    consumer.start()
    try:
        while prefetcher.steps < 1:  # then it waits for the second
            time.sleep(0.005)
        prefetcher.close()
        release.set()
        consumer.join(30)
        assert not consumer.is_alive() and prefetcher.steps == 1
    finally:
        given_up.set()
        release.set()
        consumer.join()


@pytest.mark.parametrize("ready", [True, False])
def test_close_ends_a_loop_at_its_step(retriever: Retriever, ready: bool) -> None:
    """Whether or not the next batch is there already."""
    release, read = threading.Event(), []

    def loader() -> Iterator[Tensor]:
        for i in range(5):
            read.append(i)
            if i and not ready:
                release.wait(60)
            yield torch.ones(1, M, dtype=torch.int64)

    prefetcher = retriever.prefetch(loader())
    prefetcher.close()  # of no loop
    for _ in prefetcher:
        until(lambda: len(read) == (3 if ready else 2))
        closing = threading.Thread(target=prefetcher.close, daemon=True)
        closing.start()
        closing.join(30)
        assert not closing.is_alive()
        release.set()
    assert prefetcher.steps == 1 and not threads()


def test_a_loop_may_end_on_its_own_thread(retriever: Retriever) -> None:
    """Which collects garbage, too."""
    loops: list[Any] = []
    dropped, ended = threading.Event(), threading.Event()

    def loader() -> Iterator[Tensor]:
        yield torch.ones(1, M, dtype=torch.int64)
        dropped.wait(60)
        loops.pop().close()
        ended.set()
        yield torch.ones(1, M, dtype=torch.int64)

    loops.append(iter(retriever.prefetch(loader())))
    next(loops[0])
    dropped.set()
    assert ended.wait(30)
    until(lambda: not threads())


def test_the_stall_is_what_the_loop_waited(retriever: Retriever, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on while the loop waits for a batch, as long as said here, and in its steps."""
    now, waits = 0.0, [4.0, 0.5, 0.0, 2.0, 64.0] * 2  # the last wait is for the end

    class Queue(queue.Queue[Any]):
        def get(self, block: bool = True, timeout: float | None = None) -> Any:
            nonlocal now
            now += waits.pop(0)
            return super().get(block, timeout)

    monkeypatch.setattr(prefetch, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(prefetch, "queue", SimpleNamespace(Queue=Queue, Full=queue.Full))
    prefetcher = retriever.prefetch(batches(4))
    for steps in (4, 8):
        for _ in prefetcher:
            now += 16.0  # the step
        # what nothing can hide is the wait for the first batch of each loop
        assert (prefetcher.steps, prefetcher.first_seconds) == (steps, steps)
        assert prefetcher.stall_seconds == steps / 4 * 6.5


def test_bad_depth(retriever: Retriever) -> None:
    usual = prefetch.Prefetcher(retriever, [])
    assert (usual.num_neighbours, usual.depth) == (2, 1)
    for depth in (0, 1.5, True):
        with pytest.raises(ValueError, match="depth"):
            retriever.prefetch([], depth=depth)


@pytest.mark.parametrize("where", ["cuda", "cpu"])
def test_on_a_gpu_each_stream_waits_for_the_other(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by stand-ins for streams and for tensors there: what waits for what, and whose memory is kept for whom. The
    loop is on a stream of its own, as is what was made before it, the loader on the default one, and so is a retriever
    on the host."""
    told: list[str] = []
    here = threading.local()

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            told.append(f"{self.name} waits for {other.name}")

        def record_event(self) -> str:
            told.append(f"event of {self.name}")
            return f"the event of {self.name}"

        def wait_event(self, event: str) -> None:
            told.append(f"{self.name} waits for {event}")

    class OnGpu(Tensor):
        is_cuda, device = True, torch.device("cuda", 0)

        def record_stream(self, stream: Stream) -> None:
            told.append(f"{self.shape[0]} kept for {stream.name}")

    @contextlib.contextmanager
    def on(stream: Stream | None) -> Iterator[None]:
        here.stream = stream
        yield
        here.stream = None

    def made(size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int64).as_subclass(OnGpu)

    class Finder:
        device = torch.device(where)

        def __call__(self, tokens: Tensor, **options: Any) -> NeighbourBatch:
            told.append("found")
            return NeighbourBatch(made(3), made(4), made(5), made(6))

    side, default, loop = (Stream(name) for name in ("side", "default", "loop"))
    main = threading.current_thread()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.Stream", lambda device: side)
    monkeypatch.setattr("torch.cuda.stream", on)
    monkeypatch.setattr("torch.cuda.default_stream", lambda device: default)
    monkeypatch.setattr(
        "torch.cuda.current_stream",
        lambda device: (
            loop if threading.current_thread() is main else getattr(here, "stream", None) or default
        ),
    )
    finder: Any = Finder()
    for _ in prefetch.Prefetcher(finder, [(made(1), made(2))]):
        break
    kept = [f"{size} kept for loop" for size in (3, 4, 5, 6)]
    if where == "cuda":
        wanted = ["event of loop", "side waits for the event of loop", "side waits for default", "found"]
        wanted += ["event of side", "1 kept for side", "2 kept for side"]
        assert told == [*wanted, "loop waits for the event of side", *kept]
    else:
        assert told == ["found", "event of default", "loop waits for the event of default", *kept]


@pytest.mark.gpu
def test_neighbours_made_on_another_stream_are_whole(seed: int) -> None:
    from retro_kernels.retrieval.index import Index
    from retro_kernels.retrieval.search import DenseSearcher, DeviceStore, DocumentTable

    store, device = MemoryStore(make_documents(200), BagEmbedder()), torch.device("cuda")
    on_device, documents = (
        DeviceStore(store, device),
        DocumentTable(store.document_ids, store.num_documents, device),
    )
    searcher = DenseSearcher(
        store,
        Index.build(store.embeddings, "Flat", device=device),
        BagEmbedder,
        documents=documents,
        device=device,
        device_store=on_device,
    )
    on_gpu = Retriever(store, searcher, documents=documents, device=device, device_store=on_device)
    picked = torch.randint(store.num_chunks, (30, 4, 6))
    loader = [torch.from_numpy(store.chunks[p.numpy()].astype("int64")).reshape(4, -1) for p in picked]
    for tokens, neighbours in on_gpu.prefetch(loader):
        torch.cuda._sleep(1_000_000)
        want = on_gpu(tokens)
        assert torch.equal(neighbours.tokens, want.tokens) and torch.equal(neighbours.ids, want.ids)
