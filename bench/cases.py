"""What is measured, as data: the shapes and variants that every kind of machine runs, and the tensors made from them.

One declaration serves both kinds of machine: a GPU takes `batch` and `tokens` of at least 4,096 programs, a CPU sizes
of which one call takes tenths of a second. RETRO_BENCH_TINY=1 shrinks everything: a rehearsal of the code, not of the
figures.

B batch · N tokens · L chunks · M chunk size · K neighbours · R tokens per neighbour · H heads · D head dimension ·
P = B·L attending chunks · G = M + R − 1 relative distances.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Positions = Literal["none", "bias", "relative"]
Pass = Literal["forward", "backward", "forward+backward"]

ON_GPU = torch.cuda.is_available()
TINY = os.environ.get("RETRO_BENCH_TINY", "0") == "1"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


@dataclass(frozen=True)
class Shape:
    """One chunked cross-attention problem."""

    batch: int
    tokens: int
    heads: int
    head_dim: int
    neighbours: int
    chunk: int = 64
    neighbour_len: int = 128

    @property
    def chunks(self) -> int:
        return self.tokens // self.chunk

    @property
    def blocks(self) -> int:
        return self.batch * self.chunks

    @property
    def columns(self) -> int:
        return self.chunk + self.neighbour_len - 1

    @property
    def keys(self) -> int:
        return self.neighbours * self.neighbour_len

    def __str__(self) -> str:
        return f"H{self.heads} D{self.head_dim} K{self.neighbours}"


@dataclass(frozen=True)
class Case:
    """A shape with the terms of its logits. `table_grad`: the position tables are learned, so their gradient is due."""

    shape: Shape
    positions: Positions = "bias"
    lengths: bool = False
    table_grad: bool = True

    def __str__(self) -> str:
        lengths = ", lengths" if self.lengths else ""
        grad = ", fixed table" if self.positions != "none" and not self.table_grad else ""
        return f"{self.positions}{lengths}{grad}, {self.shape}"

    def fields(self) -> dict[str, object]:
        """The case as a result row carries it, for the scripts that look rows up."""
        s = self.shape
        return {
            "positions": self.positions,
            "lengths": self.lengths,
            "table_grad": self.table_grad,
            "B": s.batch,
            "N": s.tokens,
            "H": s.heads,
            "D": s.head_dim,
            "K": s.neighbours,
        }


def _shape(heads: int, head_dim: int, neighbours: int, gpu: bool) -> Shape:
    if gpu:  # 4,096 programs of one attending chunk and one head
        return Shape(128 // heads, 2048, heads, head_dim, neighbours)
    tokens = {2: 512, 10: 128, 40: 64}[neighbours]
    return Shape(1, tokens, heads, head_dim, neighbours)


def _tiny(shape: Shape) -> Shape:
    return replace(shape, batch=1, tokens=128 + 5, heads=2, neighbours=min(shape.neighbours, 3))


def grid(gpu: bool = ON_GPU, tiny: bool = TINY) -> list[Shape]:
    """The heads of the paper's models (1.5B; 172M; 7.5B) with the K of training, evaluation and the largest."""
    shapes = [_shape(16, d, k, gpu) for k in (2, 10, 40) for d in (128, 64)]
    if gpu:
        shapes += [_shape(32, 128, k, gpu) for k in (2, 10, 40)]
    if tiny:  # one of each head size
        return [_tiny(s) for s in shapes if s.neighbours == 2 and s.heads == 16]
    return shapes


SMALL = Shape(4, 1024, 8, 32, 2)
"""The small shape on which other RETRO implementations were measured (width 256)."""


def kernel_cases(gpu: bool = ON_GPU, tiny: bool = TINY) -> list[Case]:
    """Every case of bench_kernels.py, those of one shape together so that its tensors are made once."""
    if not gpu and not tiny:
        mid = [s for s in grid(False, False) if s.neighbours < 40 or s.head_dim == 64]
        return [
            *(Case(SMALL, p) for p in ("none", "bias", "relative")),
            *(Case(s, p) for s in mid for p in ("bias", "relative")),
        ]
    cases = []
    for s in grid(gpu, tiny):
        cases.append(Case(s, "bias", table_grad=False))
        cases.append(Case(s, "bias"))
        if s.heads == 16 or tiny:
            cases.append(Case(s, "relative"))
        if s.neighbours == 2 and (s.heads == 16 or tiny):
            cases.append(Case(s, "none", table_grad=False))
            cases.append(Case(s, "bias", lengths=True))
    return cases


@dataclass
class Tensors:
    """Arguments of `chunked_cross_attention` for one case, with a gradient for its output."""

    query: Tensor  # [B, N, H, D]
    key: Tensor  # [B, L, K, R, H, D]
    value: Tensor  # [B, L, K, R, H, D]
    grad_out: Tensor  # [B, N, H, D]
    tables: dict[str, Tensor]
    lengths: Tensor | None  # int32 [B, L, K]
    chunk: int

    def arguments(self) -> dict[str, Tensor | int | None]:
        return {"chunk_size": self.chunk, "neighbour_lengths": self.lengths, **self.tables}

    def wanted(self) -> list[Tensor]:
        """The tensors whose gradient is asked for."""
        return [x for x in (self.query, self.key, self.value, *self.tables.values()) if x.requires_grad]


def tensors(
    case: Case, device: torch.device = DEVICE, dtype: torch.dtype = DTYPE, grad: bool = True
) -> Tensors:
    """Random arguments. With lengths, about a third of the neighbours are cut short and a tenth are missing, but
    every chunk keeps one (the peers differ in what they do for a row without any key)."""
    s = case.shape

    def normal(*shape: int, learned: bool = True) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_(grad and learned)

    lengths = None
    if case.lengths:
        draw = torch.rand(s.batch, s.chunks, s.neighbours, device=device)
        cut = torch.randint(1, s.neighbour_len + 1, draw.shape, device=device)
        lengths = torch.where(draw < 0.1, 0, torch.where(draw < 0.4, cut, s.neighbour_len)).int()
        lengths[..., 0].clamp_(min=1)
    tables: dict[str, Tensor] = {}
    if case.positions == "bias":
        table = torch.randn(
            s.heads, s.columns, device=device
        )  # the logits' own precision, as parameters have
        tables["rel_bias"] = table.requires_grad_(grad and case.table_grad)
    elif case.positions == "relative":
        tables["rel_key"] = normal(s.heads, s.columns, s.head_dim, learned=case.table_grad)
        tables["content_bias"] = normal(s.heads, s.head_dim, learned=case.table_grad)
        tables["position_bias"] = normal(s.heads, s.head_dim, learned=case.table_grad)
    keys = (s.batch, s.chunks, s.neighbours, s.neighbour_len, s.heads, s.head_dim)
    return Tensors(
        query=normal(s.batch, s.tokens, s.heads, s.head_dim),
        key=normal(*keys),
        value=normal(*keys),
        grad_out=torch.randn(s.batch, s.tokens, s.heads, s.head_dim, device=device, dtype=dtype),
        tables=tables,
        lengths=lengths,
        chunk=s.chunk,
    )
