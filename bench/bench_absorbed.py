"""The K/V side of a layer, from query and encoder states to the heads' outputs, and its backward.

"materialised" projects keys and values and runs our kernel on them, "absorbed" attends to the states themselves, "auto"
takes the one that the cost model (`choose_projection`) predicts to be faster; "SDPA" projects and goes on as one would
write it without a kernel. The states are E = 896 wide, as in the paper.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import peers
import pytest
import roofline
import timing
import torch
import torch.nn.functional as F
from cases import DEVICE, DTYPE, ON_GPU, TINY, Case, Pass, Shape, grid
from torch import Tensor

from retro_kernels.ops import absorbed_cross_attention, choose_projection, chunked_cross_attention

SMALL = (
    (Shape(1, 512, 4, 32, 2), 128),
    (Shape(1, 512, 8, 32, 2), 256),
)  # retro_tiny and retro_small: narrow states
SHAPES: list[tuple[Shape, int]] = [(s, roofline.ENCODER_DIM if not TINY else 32) for s in grid()]
if not (ON_GPU or TINY):
    SHAPES = [*SMALL, *((s, roofline.ENCODER_DIM) for s in grid() if s.neighbours < 40)]
CASES = ("absorbed", "materialised", "auto", "SDPA")
PASSES: tuple[Pass, ...] = ("forward", "forward+backward")
Inputs = dict[str, Tensor]


def _inputs(s: Shape, width: int) -> Inputs:
    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=DEVICE, dtype=DTYPE) * std).requires_grad_()

    weight = (s.heads * s.head_dim, width)
    return {
        "query": normal(s.batch, s.tokens, s.heads, s.head_dim),
        "states": normal(s.batch, s.chunks, s.neighbours, s.neighbour_len, width),
        "key_weight": normal(*weight, std=width**-0.5),
        "value_weight": normal(*weight, std=width**-0.5),
        "rel_bias": torch.randn(s.heads, s.columns, device=DEVICE).requires_grad_(),
    }


def _forward(case: str, s: Shape, width: int, x: Inputs, training: bool) -> Callable[[], Tensor]:
    if case == "auto":
        case = choose_projection(
            head_dim=s.head_dim,
            encoder_dim=width,
            num_heads=s.heads,
            chunk_size=s.chunk,
            neighbour_len=s.neighbour_len,
            num_neighbours=s.neighbours,
            training=training,
            device=DEVICE.type,
        )
    options: dict[str, Any] = {"chunk_size": s.chunk, "rel_bias": x["rel_bias"]}
    if case == "absorbed":
        return lambda: absorbed_cross_attention(
            x["query"], x["states"], x["key_weight"], x["value_weight"], **options
        )
    attend = chunked_cross_attention if case == "materialised" else peers.sdpa_chunked_cross_attention

    def projected() -> Tensor:
        key, value = (F.linear(x["states"], x[name]) for name in ("key_weight", "value_weight"))
        return attend(x["query"], *(y.unflatten(-1, (s.heads, s.head_dim)) for y in (key, value)), **options)

    return projected


@functools.lru_cache(1)
def _agree(s: Shape, width: int) -> None:
    """All cases compute the same."""
    x = _inputs(s, width)
    with torch.no_grad():
        expected = _forward("materialised", s, width, x, False)()
        for case in CASES:
            peers.same(_forward(case, s, width, x, False)(), expected, case)


def _call(which: Pass, forward: Callable[[], Tensor], x: Inputs) -> Callable[[], Any]:
    if which == "forward":
        return torch.no_grad()(forward)
    grad = torch.randn(x["query"].shape, device=DEVICE, dtype=DTYPE)
    return lambda: torch.autograd.grad(forward(), list(x.values()), grad)


@functools.lru_cache(1)
def _in_turn(shape: Shape, width: int, which: Pass) -> dict[str, list[float]]:
    x = _inputs(shape, width)
    calls = {case: _call(which, _forward(case, shape, width, x, which != "forward"), x) for case in CASES}
    return timing.in_turn(calls, most=15)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize(("shape", "width"), SHAPES, ids=[f"{s} E{width}" for s, width in SHAPES])
def test_absorbed(
    benchmark: Any, shape: Shape, width: int, which: Pass, case: str, ceilings: roofline.Ceilings
) -> None:
    benchmark.group = f"absorbed training, {which}: {shape} E{width}"
    _agree(shape, width)
    costs = {"absorbed": roofline.absorbed_training, "materialised": roofline.materialised_training}
    way = case if case in costs else "materialised"
    floor = ceilings.floor(*costs[way](shape, width, which, DTYPE.itemsize))
    benchmark.extra_info.update(
        case=case, what="absorbed training", **Case(shape).fields(), **{"pass": which}, E=width, floor_s=floor
    )
    sets = timing.sets_to_rotate(
        int(sum(cost.bytes for cost in costs[way](shape, width, "forward", DTYPE.itemsize)))
    )
    if ON_GPU and case == "auto" and not benchmark.disabled:
        # it runs the code of one of the others, so only times taken in turn with theirs tell them apart
        x = _inputs(shape, width)
        names = ("absorbed", "materialised", "auto")
        calls = [_call(which, _forward(name, shape, width, x, which != "forward"), x) for name in names]
        times = timing.samples(calls, rounds=20 * len(calls))
        medians = {name: statistics.median(times[i :: len(calls)]) for i, name in enumerate(names)}
        median = medians.pop("auto")
        timing.record(
            benchmark, times[names.index("auto") :: len(calls)], over_best=median / min(medians.values())
        )
    elif ON_GPU or benchmark.disabled:
        inputs = [_inputs(shape, width) for _ in range(sets)]
        calls = [_call(which, _forward(case, shape, width, x, which != "forward"), x) for x in inputs]
        median = timing.measure(benchmark, calls)
    else:
        samples = _in_turn(shape, width, which)[case]
        timing.record(benchmark, samples)
        median = statistics.median(samples)
    if case != "auto":
        benchmark.extra_info["share_of_floor"] = round(floor / median, 4)


@pytest.mark.skipif(not ON_GPU, reason="peak memory is a GPU's")
@pytest.mark.parametrize("case", ["absorbed", "materialised", "SDPA"])
@pytest.mark.parametrize("shape", [s for s in grid() if s.heads == 32 or TINY], ids=str)
def test_absorbed_memory(benchmark: Any, shape: Shape, case: str) -> None:
    """Peak bytes of forward and backward beyond inputs, output and gradients."""
    benchmark.group = f"absorbed memory: {shape}"
    x = _inputs(shape, roofline.ENCODER_DIM)
    call = _call("forward+backward", _forward(case, shape, roofline.ENCODER_DIM, x, True), x)
    benchmark.extra_info.update(
        case=case, what="absorbed memory", **Case(shape).fields(), peak_bytes=timing.peak_bytes(call)
    )
    timing.measure(benchmark, call, rounds=10)
