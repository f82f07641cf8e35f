"""Chunked cross-attention, the operation alone: forward, backward and both, beside what one would write instead.

On a GPU the backward is timed on graphs that are kept. Every time is set against the floor of its shape
(roofline.py). The first row of a group is ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import peers
import pytest
import roofline
import timing
import torch
import torch._functorch.config
from cases import DEVICE, DTYPE, ON_GPU, TINY, Case, Pass, Shape
from torch import Tensor

from retro_kernels.ops import chunked_cross_attention

OURS = "retro_kernels"
PASSES: tuple[Pass, ...] = ("forward", "backward", "forward+backward")
if not (ON_GPU or TINY):
    PASSES = ("forward", "forward+backward")
# a kept graph is run backward many times
torch._functorch.config.donated_buffer = False


Forward = tuple[Callable[[], Tensor], list[Tensor], Tensor]
"""A forward, the tensors whose gradients are wanted, the gradient of the output."""


class Kept:
    """The buffer sets of the case at hand: made once for all formulations of it, freed when the next case comes."""

    case: Case | None = None
    sets: list[cases.Tensors] = []
    key: tuple[Case, str] | None = None
    calls: list[Forward] = []

    @classmethod
    def tensors(cls, case: Case) -> list[cases.Tensors]:
        if cls.case != case:
            cls.case, cls.key = case, None
            cls.sets, cls.calls = [], []
            if ON_GPU:
                torch.cuda.empty_cache()
            # a peer that rotates fewer bytes than ours would see more of the cache: one count for all
            count = timing.sets_to_rotate(int(roofline.attention(case, "forward", DTYPE.itemsize).bytes))
            cls.sets = [cases.tensors(case) for _ in range(count)]
        return cls.sets

    @classmethod
    def forwards(cls, case: Case, peer: peers.Peer | None) -> list[Forward]:
        """One for each buffer set."""
        sets = cls.tensors(case)
        key = (case, peer.name if peer else OURS)
        if cls.key != key:
            cls.calls = []
            torch._dynamo.reset()  # earlier cases' graphs would be looked through at every call
            cls.calls = [_ours(t) if peer is None else _theirs(case, peer, t) for t in sets]
            cls.key = key
        return cls.calls


def _ours(t: cases.Tensors) -> Forward:
    arguments: dict[str, Any] = t.arguments()
    return lambda: chunked_cross_attention(t.query, t.key, t.value, **arguments), t.wanted(), t.grad_out


def _theirs(case: Case, peer: peers.Peer, t: cases.Tensors) -> Forward:
    blocks = peers.leaf_blocks(t, peer.positions)
    attend = peer.build(case, blocks)
    return lambda: attend(blocks), blocks.leaves, blocks.grad_out


def formulations(case: Case) -> list[peers.Peer | None]:
    """Ours first, then every peer that is of interest for this case here; 40 neighbours leave out what cannot win."""
    s = case.shape
    found: list[peers.Peer | None] = [None]
    for peer in peers.PEERS:
        if peer.why_not(case, DEVICE.type, False) is not None:
            continue
        slow = peer.name.startswith("einsum") or peer.name == "SDPA math"
        if slow and ON_GPU and (s.neighbours == 40 or s.heads != 16 or not case.table_grad):
            continue
        if TINY and "compiled" in peer.name and case != Case(s, "bias"):  # for each shape anew, too
            continue
        if peer.name.startswith("Flex") and not TINY and not _flex_is_worth_it(case, "autotune" in peer.name):
            continue
        found.append(peer)
    if not case.lengths and case.positions == "bias" and case.table_grad:
        found.append(peers.WITHOUT_POSITIONS)
    return found


def _passes(case: Case, peer: peers.Peer | None) -> tuple[Pass, ...]:
    """Forward and backward in one call: asked for where the table's gradient or relative keys make the difference."""
    if peer and peer.name == "SDPA math" and not ON_GPU and case.positions != "none":
        return PASSES[1:]  # forward alone, flash serves every mask on a CPU
    if (
        not ON_GPU
        or peer is None
        or case.positions == "relative"
        or (case.table_grad and peer.name.startswith("SDPA"))
    ):
        return PASSES
    return PASSES[:2]


def _flex_is_worth_it(case: Case, autotune: bool) -> bool:
    """Every shape and variant is compiled anew, for ten seconds and more, with autotuning for minutes. What is left out
    differs in a factor of the grid, not in the kernel: heads beyond 16, and 40 neighbours beside the learned table."""
    s = case.shape
    if case.positions == "none" or s.heads != 16 or (case.lengths and s.head_dim == 64):
        return False
    if s.neighbours == 40 and not (case.positions == "bias" and case.table_grad):
        return False
    return not autotune or (case.positions == "bias" and not case.lengths and s.neighbours < 40)


def _shard(case: Case) -> int:
    """Which process compiles a case ahead (RETRO_BENCH_SHARD): the largest together, so that two never meet."""
    if case.shape.neighbours == 40:
        return 0
    return 1 + [c for c in cases.kernel_cases() if c.shape.neighbours != 40].index(case)


def _parameters() -> list[Any]:
    out = []
    shard, shards = map(int, os.environ.get("RETRO_BENCH_SHARD", "0/1").split("/"))
    for case in cases.kernel_cases():
        if _shard(case) % shards != shard:
            continue
        for peer in formulations(case):
            for which in _passes(case, peer):
                name = peer.name if peer else OURS
                marks = [pytest.mark.benchmark(group=f"cca {which}: {case}")]
                out.append(pytest.param(case, which, peer, id=f"{which}: {case} | {name}", marks=marks))
    return out


def _refused(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


@pytest.mark.parametrize(("case", "which", "peer"), _parameters())
def test_cca(
    benchmark: Any, case: Case, which: Pass, peer: peers.Peer | None, ceilings: roofline.Ceilings
) -> None:
    cost = roofline.attention(case, which, DTYPE.itemsize)
    floor = ceilings.floor(cost)
    benchmark.extra_info.update(
        case=peer.name if peer else OURS,
        what="core",
        **case.fields(),
        **{"pass": which},
        floor_s=floor,
        as_written=bool(peer and peer.as_written),
    )
    if peer and (reason := peer.why_not(case, DEVICE.type, which != "forward")):
        pytest.skip(reason)
    try:
        calls = _calls(Kept.forwards(case, peer), which)
        for call in calls:
            call()
        if peer and peer.positions:
            _same(case, peer, which)
    except Exception as error:
        Kept.key, Kept.calls = None, []
        if peer is None:
            raise
        pytest.skip(_refused(error))
    median = timing.measure(benchmark, calls)
    benchmark.extra_info["share_of_floor"] = round(floor / median, 4)


def _same(case: Case, peer: peers.Peer, which: Pass) -> None:
    """What a peer computes is what ours does: on the first buffer set, with the keys' gradient where there is one."""
    t = Kept.tensors(case)[0]
    with torch.set_grad_enabled(which != "forward"):
        (ours, _, _), (theirs, leaves, grad) = _ours(t), Kept.forwards(case, peer)[0]
        out, expected = theirs(), ours()
        peers.same(peers.uncut(out, t), expected, peer.name)
        if which != "forward":
            wanted = torch.autograd.grad(expected, t.key, t.grad_out)[0]
            given = torch.autograd.grad(out, leaves[1], grad)[0]
            peers.same(given.reshape(wanted.shape), wanted, f"{peer.name}, gradient")


def _calls(forwards: list[Forward], which: Pass) -> list[Callable[[], Any]]:
    if which == "forward":

        def infer(forward: Callable[[], Tensor]) -> Callable[[], Any]:
            def call() -> Tensor:
                with torch.no_grad():
                    return forward()

            return call

        return [infer(forward) for forward, _, _ in forwards]
    if which == "backward":
        graphs = [(forward(), wanted, grad) for forward, wanted, grad in forwards]
        return [lambda g=g: torch.autograd.grad(g[0], g[1], g[2], retain_graph=True) for g in graphs]
    return [lambda f=f: torch.autograd.grad(f[0](), f[1], f[2]) for f in forwards]


MEMORY_CASES = [c for c in cases.kernel_cases() if c.positions != "none" and c.table_grad and not c.lengths]


@pytest.mark.parametrize("case", MEMORY_CASES, ids=str)
@pytest.mark.parametrize("name", [OURS, "einsum", "SDPA efficient", "SDPA math"])
def test_memory(benchmark: Any, case: Case, name: str) -> None:
    """Bytes beyond inputs, outputs and gradients: at the peak of forward and backward on a GPU, kept between the two
    on a CPU. The row's time is that of forward and backward; the bytes and their share stand beside it."""
    peer = next((p for p in peers.PEERS if p.name == name), None)
    benchmark.group = f"cca memory: {case}"
    benchmark.extra_info.update(case=name, what="memory", **case.fields())
    if peer and (reason := peer.why_not(case, DEVICE.type, True)):
        pytest.skip(reason)
    t = Kept.tensors(case)[0]
    forward, wanted, grad = _theirs(case, peer, t) if peer else _ours(t)
    try:
        if ON_GPU:

            def run() -> list[Tensor]:
                out = forward()
                return [out.detach(), *torch.autograd.grad(out, wanted, grad)]

            extra = timing.peak_bytes(run)
        else:
            # views of the inputs are no bytes of their own
            extra = timing.saved_bytes(forward, [t.query, t.key, t.value, grad, *wanted])
    except RuntimeError as error:
        if peer is None:
            raise
        torch.cuda.empty_cache()
        pytest.skip(_refused(error))
    given = timing.size(wanted)
    outputs = t.query.nbytes + given  # the output, and one gradient for each input
    timing.measure(
        benchmark,
        lambda: torch.autograd.grad(forward(), wanted, grad),
        rounds=3,
        extra_bytes=extra,
        extra_share=round(extra / (given + outputs), 4),
    )


OVERHEAD = Case(Shape(1, 128 if not TINY else 64, 4, 64, 2), "bias")


NOTHING = "an autograd.Function that only allocates"


class _Allocates(torch.autograd.Function):
    """An op in Python that makes what ours does, and computes nothing: what no op in Python is cheaper than."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return tensors[0].new_empty(tensors[0].shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return tuple(x.new_empty(x.shape) for x in ctx.saved_tensors)


def _only_allocates(case: Case) -> Forward:
    t = Kept.tensors(case)[0]
    return lambda: _Allocates.apply(*t.wanted()), t.wanted(), t.grad_out


@pytest.mark.skipif(not (ON_GPU or TINY), reason="on a CPU the work itself is all there is")
@pytest.mark.parametrize("which", ["forward", "forward+backward"])
@pytest.mark.parametrize("name", [OURS, NOTHING, "SDPA efficient", "FlexAttention, chunks as batch"])
@pytest.mark.parametrize("positions", ["bias", "relative"])
def test_overhead(benchmark: Any, which: Pass, name: str, positions: cases.Positions) -> None:
    """The CPU's time for one call, at a size where the GPU has next to nothing to do."""
    case = Case(OVERHEAD.shape, positions)
    peer = next((p for p in peers.PEERS if p.name == name), None)
    benchmark.group = f"cca CPU overhead {which}: {positions}"
    benchmark.extra_info.update(case=name, what="overhead", **case.fields(), **{"pass": which})
    if peer and (reason := peer.why_not(case, DEVICE.type, True)):
        pytest.skip(reason)
    forwards = [_only_allocates(case)] if name == NOTHING else Kept.forwards(case, peer)
    call = _calls(forwards, which)[0]
    timing.record(benchmark, [timing.cpu_seconds_per_call(call, 100 if ON_GPU else 2)])


FIRST_CALL = """
import sys, time
sys.path.insert(0, sys.argv[1])
import torch, cases
from retro_kernels.ops import chunked_cross_attention
case = cases.Case(cases.Shape(2, 512, 4, int(sys.argv[3]), 2), sys.argv[2])
t = cases.tensors(case)
# what PyTorch imports for a process's first backward pass is not of this library
x = t.query.detach().requires_grad_()
torch.autograd.grad(x * 2, x, t.query)
if torch.cuda.is_available():
    torch.cuda.synchronize()
begin = time.perf_counter()
out = chunked_cross_attention(t.query, t.key, t.value, **t.arguments())
torch.autograd.grad(out, t.wanted(), t.grad_out)
if torch.cuda.is_available():
    torch.cuda.synchronize()
print(time.perf_counter() - begin)
"""


@pytest.mark.skipif(not (ON_GPU or TINY), reason="nothing is compiled on a CPU")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("positions", ["bias", "relative"])
def test_first_call(benchmark: Any, positions: str, head_dim: int) -> None:
    """A new process's first forward and backward, with an empty compilation cache (cold) and a filled one (warm)."""
    benchmark.group = f"cca first call: {positions}, D{head_dim}"
    with tempfile.TemporaryDirectory() as cache:

        def first() -> float:
            done = subprocess.run(
                [sys.executable, "-c", FIRST_CALL, str(Path(__file__).parent), positions, str(head_dim)],
                env={**os.environ, "TRITON_CACHE_DIR": cache},
                capture_output=True,
                text=True,
                check=True,
            )
            return float(json.loads(done.stdout.strip().splitlines()[-1]))

        cold, warm = first(), first()
    timing.record(
        benchmark, [warm], case="warm cache", what="first call", cold_s=cold, positions=positions, D=head_dim
    )


test_first_call.form = 2  # the first counted what PyTorch imports for a process's first backward pass
