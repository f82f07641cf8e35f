"""How a call is timed on either kind of machine, and what else is measured about it.

On a GPU: CUDA events, the median of 50 calls (of 10 or more where one takes 20 ms, or as many as a case says) after a
warm-up, over buffer sets that together exceed the L2 several times, with the queue filled ahead so that the launches'
CPU time (measured apart) leaves no gaps.
On a CPU: wall time.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]
SECONDS = 1.0
"""How long the rounds of one case may take together, beyond the least number of rounds."""


def l2_bytes() -> int:
    return torch.cuda.get_device_properties(0).L2_cache_size


def sets_to_rotate(bytes_of_one: int) -> int:
    """How many buffer sets make the L2 useless: together at least eight times its size; 1 on a CPU."""
    if not torch.cuda.is_available():
        return 1
    return min(64, max(1, -(-8 * l2_bytes() // max(bytes_of_one, 1))))


def samples(calls: Sequence[Call], rounds: int | None = None, wall: bool = False) -> list[float]:
    """Seconds of each round, the calls taken in turn. `wall`: what a user waits, on a GPU launches included."""
    if torch.cuda.is_available() and not wall:
        return _gpu_samples(calls, rounds)
    return _wall_samples(calls, rounds)


def _gpu_samples(calls: Sequence[Call], rounds: int | None) -> list[float]:
    for call in (*calls, *calls)[: max(3, len(calls))]:  # module load, allocator, autograd's threads
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    calls[0]()
    torch.cuda.synchronize()
    once = time.perf_counter() - begin
    rounds = rounds or (50 if once < 0.02 else max(10, int(SECONDS / once)))
    turn = itertools.cycle(calls)
    times: list[float] = []
    while len(times) < rounds:
        pairs = []
        torch.cuda._sleep(20_000_000)  # about 10 ms, in which the CPU gets ahead
        for _ in range(min(10, rounds - len(times))):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            call = next(turn)
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        times += [start.elapsed_time(end) * 1e-3 for start, end in pairs]
    return times


def _wall_samples(calls: Sequence[Call], rounds: int | None) -> list[float]:
    once = wall_seconds(calls[0])
    rounds = rounds or max(5, min(30, int(SECONDS / once)))
    return [wall_seconds(call) for _, call in zip(range(rounds), itertools.cycle(calls), strict=False)]


def in_turn(calls: Mapping[Any, Call], most: int = 9) -> dict[Any, list[float]]:
    """Wall seconds of every call's rounds, the calls taken in turn: a machine's mood meets them all alike."""
    longest = max(wall_seconds(call) for call in calls.values())
    rounds = max(3, min(most, int(2 * SECONDS / longest)))
    found: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(wall_seconds(call))
    return found


def wall_seconds(call: Call) -> float:
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(
    benchmark: Any, calls: Call | Sequence[Call], rounds: int | None = None, wall: bool = False, **extra: Any
) -> float:
    """Time `calls` (buffer sets taken in turn) as one pytest-benchmark case; returns the median in seconds.

    `extra` goes into the result row. The samples are handed to the fixture instead of being taken by it, because its
    timer is read right after a launch and would see the queue, not the GPU.
    """
    calls = [calls] if callable(calls) else list(calls)
    benchmark.extra_info.update(extra)
    if benchmark.disabled:
        calls[0]()
        return float("nan")
    times = samples(calls, rounds, wall)
    stats = benchmark._make_stats(iterations=1)
    for seconds in times:
        stats.update(seconds)
    half = len(times) // 2
    median = statistics.median(times)
    # the same version twice: how far two halves of one run lie apart is what a difference has to exceed
    spread = abs(statistics.median(times[:half]) - statistics.median(times[half:])) / median
    benchmark.extra_info["spread"] = round(spread, 4)
    return median


def record(benchmark: Any, seconds: Sequence[float], **extra: Any) -> None:
    """A case whose seconds were measured elsewhere (in another process, or as part of a run)."""
    benchmark.extra_info.update(extra)
    if not benchmark.disabled:
        stats = benchmark._make_stats(iterations=1)
        for value in seconds:
            stats.update(value)


def cpu_seconds_per_call(call: Call, repeats: int = 100) -> float:
    """The CPU's share of a call whose device work is negligible: launch queue not full, nothing waited for."""
    for _ in range(10):
        call()
    best = float("inf")
    for _ in range(5):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        best = min(best, (time.perf_counter() - begin) / repeats)
    return best


def size(tensors: Sequence[Tensor | None]) -> int:
    """Bytes of the distinct storages behind some tensors."""
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if x is not None
    }
    return sum(storages.values())


def saved_bytes(forward: Callable[[], Tensor], given: Sequence[Tensor | None]) -> int:
    """Bytes that a forward keeps for its backward, beyond the storages of `given` and of its output."""
    kept: dict[int, Tensor] = {}

    def note(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = forward()
    known = {x.untyped_storage().data_ptr() for x in (*given, out) if x is not None}
    return sum(x.untyped_storage().nbytes() for pointer, x in kept.items() if pointer not in known)


def peak_bytes(run: Callable[[], Sequence[Tensor]]) -> int:
    """GPU memory at its highest during `run`, beyond what was there before and what it returns."""
    run()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before - size(result))
