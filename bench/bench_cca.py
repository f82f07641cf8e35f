"""`ChunkedCrossAttention` with its projections, beside the same module on SDPA and on einsum, also compiled.

Shapes are those on which other implementations were measured: small (width 256) and medium (width 1,024). "SDPA with
bias" materialises the additive bias and has its gradient; "SDPA without positions" computes less than any RETRO does.
All formulations of a shape take turns, so that a machine's mood meets them all alike; each time stands beside the
share that its products have of a large product's rate, measured in the same run with the same threads.

Other implementations stand beside them on the small shape where they are installed; they are no dependency:

    pip install --no-deps retro-pytorch==0.3.9 labml-nn==0.5.1 labml einops \\
        autofaiss embedding-reader pandas pyarrow fire termcolor

For orientation, milliseconds of one other CPU's thread for the small shape, none with these positions (forward, forward
and backward): lucidrains 176, 487; labml 189, 375; Norlund 204, 428; Megatron 168, 413; SDPA without positions 87, 267.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peers
import pytest
import roofline
import timing
import torch
from bench_model import formulation
from cases import DEVICE, DTYPE, ON_GPU, SMALL, TINY, Case, Pass, Positions, Shape
from torch import Tensor

from retro_kernels.nn import ChunkedCrossAttention

OURS = "retro_kernels"
SHAPES = {"small": SMALL, "medium": Shape(1, 2048, 16, 64, 2)}
if TINY:
    SHAPES = {"tiny": Shape(1, 133, 2, 16, 2)}
PASSES: tuple[Pass, ...] = ("forward", "forward+backward")
ALL = torch.get_num_threads()
THREADS = sorted({1, ALL}) if not ON_GPU else [ALL]
OTHERS = {"retro-pytorch": "retro_pytorch.retro_pytorch", "labml-nn": "labml_nn.transformers.retro.model"}
"""Packages, and the module that has their chunked cross-attention. The first turns queries and keys by their place, the
second has no positions at all."""
ROWS: dict[Positions, tuple[tuple[str, Positions], ...]] = {
    "bias": (
        (OURS, "bias"),
        ("SDPA with bias", "bias"),
        ("SDPA without positions", "none"),
        ("einsum", "bias"),
        ("einsum, compiled", "bias"),
    ),
    "relative": (
        (OURS, "relative"),
        ("SDPA with bias", "bias"),
        ("SDPA without positions", "none"),
        ("einsum, compiled", "relative"),
    ),
    "none": ((OURS, "none"), ("SDPA without positions", "none")),
}
"""Which formulations stand in the table of a module with these positions, and which positions they have themselves."""
FORMULATIONS = sorted({row for rows in ROWS.values() for row in rows})
OTHER_ROWS: tuple[tuple[str, Positions], ...] = tuple((name, "none") for name in OTHERS)


@functools.cache
def why_not(name: str) -> str | None:
    """Why another implementation cannot be measured."""
    try:
        importlib.import_module(OTHERS[name])
    except Exception as error:  # an unmaintained package fails in any way
        return (
            f"{name} cannot be imported ({type(error).__name__}: {error}); this file says how to install it"
        )
    return None


def other(name: str, shape: Shape) -> torch.nn.Module:
    """Its layer, to be called with x and the neighbours."""
    width, module = shape.heads * shape.head_dim, importlib.import_module(OTHERS[name])
    if name == "labml-nn":
        return module.ChunkedCrossAttention(width, shape.heads, shape.head_dim, shape.chunk)
    rotary = module.RotaryEmbedding(min(shape.head_dim, module.MIN_DIM_HEAD))
    places = (
        rotary(shape.chunk, device=DEVICE, offset=shape.chunk - 1),
        rotary(shape.neighbour_len, device=DEVICE),
    )
    layer = module.ChunkedCrossAttention(shape.chunk, dim=width, dim_head=shape.head_dim, heads=shape.heads)
    call = layer.forward
    layer.forward = lambda x, context: call(x, context=context, pos_emb=places)
    return layer


@dataclass
class Module:
    """One formulation of the layer on its inputs."""

    name: str
    positions: Positions
    shape: Shape

    def __post_init__(self) -> None:
        s, width = self.shape, self.shape.heads * self.shape.head_dim
        made: dict[str, Any] = {"device": DEVICE, "dtype": DTYPE}
        torch.manual_seed(0)
        if self.name in OTHERS:
            self.layer = other(self.name, s).to(**made)
        else:
            self.layer = ChunkedCrossAttention(width, s.heads, position=self.positions, **made)
        if self.positions == "bias":
            torch.nn.init.normal_(self.layer.rel_bias)
        tokens, states = (s.batch, s.tokens, width), (s.batch, s.chunks, s.neighbours, s.neighbour_len, width)
        count = timing.sets_to_rotate(DTYPE.itemsize * (2 * math.prod(tokens) + math.prod(states)))
        self.sets = [
            (
                torch.randn(tokens, **made).requires_grad_(),
                torch.randn(states, **made).requires_grad_(),
                torch.randn(tokens, **made),
            )
            for _ in range(count)
        ]
        self.run = (
            torch.compile(self.layer, dynamic=False, fullgraph=True)
            if "compiled" in self.name
            else self.layer
        )

    def forward(self, x: Tensor, neighbours: Tensor) -> Tensor:
        with formulation(self.name.split()[0].strip(",")):
            return self.run(x, neighbours)

    def first(self) -> Tensor:
        return self.forward(*self.sets[0][:2])

    def wanted(self, x: Tensor, neighbours: Tensor) -> list[Tensor]:
        return [x, neighbours, *self.layer.parameters()]

    def calls(self, which: Pass) -> list[Callable[[], Any]]:
        """One for each buffer set."""

        def both(x: Tensor, neighbours: Tensor, grad_out: Tensor) -> Any:
            return torch.autograd.grad(self.forward(x, neighbours), self.wanted(x, neighbours), grad_out)

        if which == "forward":
            forward = torch.no_grad()(self.forward)
            return [functools.partial(forward, x, neighbours) for x, neighbours, _ in self.sets]
        return [functools.partial(both, *one) for one in self.sets]

    def flops(self, which: Pass) -> float:
        """Of the four projections and the core; twice as much again for the projections' backward."""
        s, width = self.shape, self.shape.heads * self.shape.head_dim
        projections = 4 * (s.batch * s.tokens + s.blocks * s.keys) * width**2
        core = roofline.attention(Case(s, self.positions), which, DTYPE.itemsize).flops
        return projections * (1 if which == "forward" else 3) + core


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Any:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(ALL)


@functools.cache
def product_rate(threads: int) -> float:
    """With as many threads as are set."""
    return roofline.matmul_rate()


def _others(shape: Shape) -> tuple[tuple[str, Positions], ...]:
    return OTHER_ROWS if shape != SHAPES.get("medium") else ()


@functools.lru_cache(1)
def seconds(
    shape: Shape, which: Pass, threads: int
) -> dict[tuple[str, Positions], tuple[list[float], float]]:
    """Samples of every formulation, taken in turn, and its operations."""
    torch._dynamo.reset()  # of one layer only so many graphs are kept
    others = [row for row in _others(shape) if why_not(row[0]) is None]
    modules = {row: Module(*row, shape) for row in (*FORMULATIONS, *others)}
    for (name, positions), module in modules.items():
        if name not in OTHERS:
            peers.same(module.first(), modules[OURS, positions].first(), f"{name}, {positions}")
    calls = {row: module.calls(which) for row, module in modules.items()}
    if ON_GPU:
        samples = {row: timing.samples(of_row) for row, of_row in calls.items()}
    else:
        samples = timing.in_turn({row: of_row[0] for row, of_row in calls.items()})
    return {row: (samples[row], module.flops(which)) for row, module in modules.items()}


@functools.cache
def saved(row: tuple[str, Positions], shape: Shape) -> int:
    """Bytes kept for the backward beyond inputs, parameters and output."""
    module = Module(*row, shape)
    return timing.saved_bytes(module.first, module.wanted(*module.sets[0][:2]))


def _parameters() -> list[Any]:
    return [
        pytest.param(
            size, which, threads, positions, row, id=f"{size} {which} {threads}: {positions} | {row[0]}"
        )
        for size in SHAPES
        for threads in (THREADS if size != "medium" else THREADS[:1])
        for which in PASSES
        for positions, rows in ROWS.items()
        for row in (*rows, *_others(SHAPES[size]))
    ]


@pytest.mark.parametrize(
    ("size", "which", "threads", "positions", "row"), _parameters(), indirect=["threads"]
)
def test_module(
    benchmark: Any, size: str, which: Pass, threads: int, positions: Positions, row: tuple[str, Positions]
) -> None:
    shape = SHAPES[size]
    on = "" if ON_GPU else f", {threads} thread{'s' if threads > 1 else ''}"
    benchmark.group = f"cca module, {size}, {which}{on}: {positions}"
    benchmark.extra_info["case"] = row[0]
    if row[0] in OTHERS and (reason := why_not(row[0])):
        pytest.skip(reason)
    samples, flops = seconds(shape, which, threads)[row]
    share = flops / product_rate(threads) / sorted(samples)[len(samples) // 2]
    shown: dict[str, Any] = {"share of a large product's rate": round(share, 3)}
    extra: dict[str, Any] = {
        "case": row[0],
        "what": "module",
        "size": size,
        "threads": threads,
        "pass": which,
    }
    if which != "forward":
        kept = saved(row, shape)
        shown["MiB kept for backward"] = round(kept / 2**20, 1)
        extra["saved_bytes"] = kept
        extra["saved_ratio"] = kept / saved(("SDPA without positions", "none"), shape)
    fields = {**Case(shape, positions).fields(), "positions": positions}
    timing.record(benchmark, samples, **fields, **extra, shown=shown)


test_module.varies = True  # with the machine's threads
