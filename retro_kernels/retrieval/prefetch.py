"""Retrieval one step ahead of training, on a thread of its own and, on a GPU, a stream of its own.

The thread takes batches from the loader, one after another, and retrieves for them; the training loop gets them in the
loader's order. Numbers do not change: it is the same call, made earlier. Without a GPU the thread keeps to one core.
"""

from __future__ import annotations

import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retro_kernels.config import as_count
from retro_kernels.ops._backend import limit_threads
from retro_kernels.ops.gather import NeighbourBatch

if TYPE_CHECKING:
    from retro_kernels.retrieval.retriever import Retriever

Inputs = Callable[[Any], "tuple[Tensor, Tensor | None]"]
_POLL_SECONDS = 0.05  # how soon the thread notices that no one listens any more
_LEAVE_SECONDS = 10.0
"""How long the loop, when it is left, waits for the thread: many times what a batch takes."""


def default_inputs(batch: Any) -> tuple[Tensor, Tensor | None]:
    """(tokens, exclude_documents) of a batch: a tensor of tokens, a pair, or a mapping with these names."""
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Mapping) and "tokens" in batch:
        return batch["tokens"], batch.get("exclude_documents")
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(x, Tensor) for x in batch):
        if batch[0].shape == batch[1].shape:
            raise TypeError(
                f"prefetch: a batch is a pair of two tensors {list(batch[0].shape)}, which may be tokens and their "
                "targets; the second of a pair is taken for the documents to exclude [B, E]. Give inputs=, a function "
                "that takes tokens and exclude_documents (or None) out of a batch."
            )
        return batch[0], batch[1]
    if hasattr(batch, "tokens"):
        return batch.tokens, getattr(batch, "exclude_documents", None)
    raise TypeError(
        "prefetch: a batch is a tensor of tokens, a pair (tokens, exclude_documents), or has these names; this is a "
        f"{type(batch).__name__}. Give inputs=, a function that takes both out of a batch."
    )


@dataclass
class _Lane:
    """What thread and training loop share. The thread knows this and not the iterator, so dropping the iterator ends
    it."""

    ready: queue.Queue[tuple[str, Any]]
    stop: threading.Event = field(default_factory=threading.Event)

    def put(self, item: tuple[str, Any]) -> bool:
        while not self.stop.is_set():
            try:
                self.ready.put(item, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False


class Prefetcher:
    """`for batch, neighbours in Prefetcher(retriever, loader)`: each batch as the loader gave it, and its
    NeighbourBatch.

    Starts anew with every `for`, as a loader does. The loader is read on the thread, at most depth + 1 batches ahead of
    the loop. An exception of the loader or the retriever is raised in the loop, with the thread's traceback, after
    the batches before it. Leaving the loop early ends the thread; `close()` does so too. It ends when the batch that it
    is at is there: for that the loop waits ten seconds at most. A loader that hangs is then left to its thread, which a
    warning says; the thread hands out nothing any more, ends with the loader's next batch, and keeps no program alive.
    What is raised on it after the loop was left belongs to batches that nobody asked for, and is dropped.
    Attributes: steps, stall_seconds (time the loop waited; of it first_seconds for the first batch, which
    nothing can hide).
    """

    def __init__(
        self,
        retriever: Retriever,
        loader: Iterable[Any],
        *,
        num_neighbours: int = 2,
        depth: int = 1,
        inputs: Inputs | None = None,
    ) -> None:
        """depth: batches kept ready, at least 1.  inputs: takes (tokens, exclude_documents) out of a batch; see
        `default_inputs`."""
        depth = as_count("prefetch", "depth", depth)
        self.retriever, self.loader, self.num_neighbours, self.depth = (
            retriever,
            loader,
            num_neighbours,
            depth,
        )
        self.inputs = inputs or default_inputs
        self.steps = 0
        self.stall_seconds = self.first_seconds = 0.0
        self._lane: _Lane | None = None

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[Any, NeighbourBatch]]:
        lane = self._lane = _Lane(queue.Queue(self.depth))
        device, made = self.retriever.device, None
        if device.type == "cuda":
            # what the thread will read and this stream has yet to make: the retriever's tables, batches of a list
            made = torch.cuda.current_stream(device).record_event()
        thread = threading.Thread(
            target=_work,
            name="retro-kernels-prefetch",
            daemon=True,
            args=(lane, self.retriever, self.loader, self.num_neighbours, self.inputs, made),
        )
        thread.start()
        first = True
        try:
            while not lane.stop.is_set():
                start = time.perf_counter()
                kind, item = lane.ready.get()
                waited = time.perf_counter() - start
                if kind == "end" or lane.stop.is_set():
                    return
                if kind == "error":
                    raise item
                self.stall_seconds += waited
                self.first_seconds += waited if first else 0.0
                self.steps, first = self.steps + 1, False
                batch, neighbours, done = item
                if done is not None:
                    _hand_over(neighbours, done)
                del item
                yield batch, neighbours
                del batch, neighbours  # or they would live until the next one is there
        finally:
            lane.stop.set()
            _wait_for(thread)

    def close(self) -> None:
        """Ends the thread of the loop that is running, if one is. Its batches end."""
        if self._lane is not None:
            self._lane.stop.set()
            try:  # a loop that waits for a batch must wake up
                self._lane.ready.put_nowait(("end", None))
            except queue.Full:
                pass


def _wait_for(thread: threading.Thread) -> None:
    if thread is threading.current_thread():  # which collects garbage, an iterator of its own among it
        return
    thread.join(_LEAVE_SECONDS)
    if thread.is_alive():
        warnings.warn(
            f"prefetch: the loop was left, but the loader or the retriever is still busy after {_LEAVE_SECONDS:g} "
            "seconds. Its thread ends by itself when the batch is there.",
            RuntimeWarning,
            stacklevel=3,
        )


def _work(
    lane: _Lane,
    retriever: Retriever,
    loader: Iterable[Any],
    num_neighbours: int,
    inputs: Inputs,
    made: torch.cuda.Event | None,
) -> None:
    try:
        if not torch.cuda.is_available():
            # the step needs every core, and each of its loops waits where there is a second team of threads
            limit_threads(1)
        stream = None
        if made is not None:
            stream = torch.cuda.Stream(retriever.device)
            stream.wait_event(made)
        for batch in loader:
            if lane.stop.is_set():
                return
            tokens, exclude = inputs(batch)
            with torch.cuda.stream(stream):  # None: nothing
                if stream is not None and tokens.is_cuda:
                    stream.wait_stream(torch.cuda.default_stream(tokens.device))
                neighbours = retriever(tokens, num_neighbours=num_neighbours, exclude_documents=exclude)
                # of a retriever on the host they are on a GPU too where the tokens are
                place = neighbours.tokens.device
                done = torch.cuda.current_stream(place).record_event() if place.type == "cuda" else None
            for asked in (tokens, exclude):  # which the loop may let go of before this stream has read it
                if stream is not None and asked is not None and asked.is_cuda:
                    asked.record_stream(stream)
            if not lane.put(("batch", (batch, neighbours, done))):
                return
            del batch, asked, tokens, exclude, neighbours
        lane.put(("end", None))
    except BaseException as error:  # also KeyboardInterrupt in the loader: whatever it is belongs to the loop
        lane.put(("error", error))


def _hand_over(neighbours: NeighbourBatch, done: torch.cuda.Event) -> None:
    """The loop's stream waits for the retrieval; the host does not. The memory belongs to both streams from here on."""
    current = torch.cuda.current_stream(neighbours.tokens.device)
    current.wait_event(done)
    for tensor in neighbours:
        if tensor is not None:
            tensor.record_stream(current)
