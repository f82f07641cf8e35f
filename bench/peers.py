"""What one would write instead of `chunked_cross_attention`: einsum, SDPA and FlexAttention.

Each formulation starts from blocks that are already cut (query [P, M, H, D], keys [P, K·R, H, D], row a of block u
being token (u + 1)M − 1 + a), so the shift by M − 1 costs the peers nothing and favours them. They compute

    logit[a, j, c] = ((q + u)·k[j, c] + (q + v)·rel_key[g])·scale + rel_bias[g],    g = a − c + R − 1

tests/test_peers.py checks every one against the library's definition. What each cannot do is in `why_not`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from cases import Case, Positions, Shape, Tensors
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


@dataclass
class Blocks:
    """A case's tensors as attending chunks. All views of leaves, except where the query had to be padded."""

    query: Tensor  # [P, M, H, D]
    key: Tensor  # [P, K * R, H, D]
    value: Tensor  # [P, K * R, H, D]
    grad_out: Tensor  # [P, M, H, D]
    tables: dict[str, Tensor]
    lengths: Tensor | None  # int [P, K]
    leaves: list[Tensor]


def cut(t: Tensors) -> Blocks:
    """The blocks of contract-shaped arguments; gradients flow back through this (for the tests)."""
    batch, chunks, neighbours, neighbour_len, heads, dim = t.key.shape
    blocks, m = batch * chunks, t.chunk

    def rows(x: Tensor) -> Tensor:
        x = x[:, m - 1 :]
        return F.pad(x, (0, 0, 0, 0, 0, chunks * m - x.shape[1])).reshape(blocks, m, heads, dim)

    keys = (blocks, neighbours * neighbour_len, heads, dim)
    lengths = None if t.lengths is None else t.lengths.reshape(blocks, neighbours)
    return Blocks(
        rows(t.query),
        t.key.reshape(keys),
        t.value.reshape(keys),
        rows(t.grad_out),
        t.tables,
        lengths,
        t.wanted(),
    )


def uncut(out: Tensor, t: Tensors) -> Tensor:
    """[P, M, H, D] back to [B, N, H, D]."""
    batch, tokens = t.query.shape[:2]
    m = t.chunk
    out = out.reshape(batch, -1, *out.shape[2:])
    return F.pad(out[:, : tokens - m + 1], (0, 0, 0, 0, m - 1, 0))


def leaf_blocks(t: Tensors, positions: bool = True) -> Blocks:
    """The blocks as leaves of their own, which is how the peers are timed: neither cut nor put together."""
    b = cut(t)
    if not positions:
        b.tables = {}
    for name in ("query", "key", "value"):
        x: Tensor = getattr(b, name)
        setattr(b, name, x.detach().requires_grad_(x.requires_grad))
    b.leaves = [x for x in (b.query, b.key, b.value, *b.tables.values()) if x.requires_grad]
    return b


def same(out: Tensor, expected: Tensor, name: str) -> None:
    """Before it is timed. Raises AssertionError: what computes something else is no opponent."""
    bound = 2e-2 if expected.dtype.itemsize < 4 else 1e-4
    size, error = expected.float().norm(), (out.float() - expected.float()).norm()
    assert size > 0 and error <= bound * size, (
        f"{name}: another result than ours, by {error / size:.2g} of it"
    )


Attend = Callable[[Blocks], Tensor]  # → [P, M, H, D]


@dataclass(frozen=True)
class Peer:
    """`build(case, blocks)` does once what a user does once (block masks, compilation) and returns the call."""

    name: str
    build: Callable[[Case, Blocks], Attend]
    why_not: Callable[[Case, str, bool], str | None]  # (case, device type, with gradients) → reason
    as_written: bool = False
    """What one writes first, before looking for options."""
    positions: bool = True
    """False: leaves them out, so it is not the same function; what the positions cost beside it is what it shows."""


def _column(case: Case, device: torch.device) -> Tensor:
    s = case.shape
    rows, keys = torch.arange(s.chunk, device=device), torch.arange(s.neighbour_len, device=device)
    return rows[:, None] - keys + s.neighbour_len - 1  # [M, R]


def _with_bias(query: Tensor, bias: Tensor | None) -> Tensor:
    return query if bias is None else query + bias


def _real(case: Case, lengths: Tensor) -> Tensor:
    """Which keys are real, bool [P, K * R]."""
    keys = torch.arange(case.shape.neighbour_len, device=lengths.device)
    return (keys < lengths[..., None]).flatten(1)


def _by_distance(b: Blocks) -> Tensor:
    """(q + v)·rel_key, [P, H, M, G]."""
    return torch.einsum(
        "pmhd,hgd->phmg", _with_bias(b.query, b.tables.get("position_bias")), b.tables["rel_key"]
    )


def _position_logits(case: Case, b: Blocks, dtype: torch.dtype) -> Tensor | None:
    """What positions and lengths add to the scaled logits, materialised: [P or 1, H, M, K * R] or None."""
    s = case.shape
    added: Tensor | None = None
    column = _column(case, b.query.device)
    if case.positions == "relative":
        table = _by_distance(b) * s.head_dim**-0.5
        added = table.gather(-1, column.expand(*table.shape[:3], -1)).to(dtype).repeat(1, 1, 1, s.neighbours)
    if case.positions != "none" and "rel_bias" in b.tables:  # beside relative keys it forbids the future
        bias = b.tables["rel_bias"].to(dtype)[:, column].repeat(1, 1, s.neighbours)[None]
        added = bias if added is None else added + bias
    if b.lengths is not None:
        real = _real(case, b.lengths)[:, None, None]
        if added is None:
            added = torch.zeros((), dtype=dtype, device=real.device)
        added = added.masked_fill(~real, float("-inf"))
    return added


def _einsum(case: Case, b: Blocks | None = None) -> Attend:
    scale = case.shape.head_dim**-0.5

    def attend(b: Blocks) -> Tensor:
        query = _with_bias(b.query, b.tables.get("content_bias"))
        wide = torch.promote_types(query.dtype, torch.float32)
        logits = torch.einsum("pmhd,pkhd->phmk", query, b.key).to(wide) * scale
        added = _position_logits(case, b, wide)
        logits = logits if added is None else logits + added
        weights = torch.softmax(logits, -1).to(b.value.dtype)
        return torch.einsum("phmk,pkhd->pmhd", weights, b.value)

    return attend


@functools.cache
def _einsum_in_one_graph(case: Case) -> Attend:
    return torch.compile(_einsum(case), dynamic=False, fullgraph=True)


def _sdpa(*backends: SDPBackend, positions: bool = True) -> Callable[[Case, Blocks], Attend]:
    def build(case: Case, b: Blocks) -> Attend:
        def attend(b: Blocks) -> Tensor:
            query = _with_bias(b.query, b.tables.get("content_bias"))
            mask = _position_logits(case, b, b.query.dtype) if positions else None
            if mask is not None:
                mask = mask.expand(b.query.shape[0], case.shape.heads, -1, -1)
            learned = mask is not None and mask.requires_grad and torch.is_grad_enabled()
            usable = [backend for backend in backends if not (learned and backend in _NO_MASK_GRADIENT)]
            with sdpa_kernel(usable):
                out = F.scaled_dot_product_attention(
                    query.transpose(1, 2), b.key.transpose(1, 2), b.value.transpose(1, 2), attn_mask=mask
                )
            return out.transpose(1, 2)

        return attend

    return build


_NO_MASK_GRADIENT = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
"""PyTorch does not choose by that: it takes the first in its order, and the backward raises."""


def _mask_learned(case: Case) -> bool:
    return case.positions == "relative" or (case.positions == "bias" and case.table_grad)


def _sdpa_why_not(backend: SDPBackend) -> Callable[[Case, str, bool], str | None]:
    def why_not(case: Case, device: str, grad: bool) -> str | None:
        if (
            backend == SDPBackend.FLASH_ATTENTION
            and device == "cuda"
            and (case.positions != "none" or case.lengths)
        ):
            return "flash takes no mask"
        if backend in _NO_MASK_GRADIENT and grad and _mask_learned(case):
            return f"{backend.name.lower()} has no gradient for its mask"
        if backend in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION) and device != "cuda":
            return "for GPUs"
        return None

    return why_not


def _score_mod(case: Case, b: Blocks, by_distance: Tensor | None, fold: bool) -> Callable[..., Tensor] | None:
    """FlexAttention's hook. `fold`: chunks are batch entries; else they lie one after another in the sequence."""
    m, r = case.shape.chunk, case.shape.neighbour_len
    table, lengths = b.tables.get("rel_bias"), b.lengths
    if table is None and by_distance is None and (lengths is None or not fold):
        return None

    def score_mod(score: Tensor, p: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row, column = (i, j % r) if fold else (i % m, j % r)
        if table is not None:
            score = score + table[h, row - column + r - 1]
        if by_distance is not None:
            score = score + by_distance[p, h, i, row - column + r - 1]
        if lengths is not None and fold:
            score = torch.where(column < lengths[p, j // r], score, float("-inf"))
        return score

    return score_mod


@functools.cache
def _compiled(mode: str | None) -> Any:
    # one graph a shape: a user who cares for speed gives static shapes
    return torch.compile(flex_attention, dynamic=False, mode=mode)


def _flex(
    fold: bool,
    query_block: int = 64,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
    compile: bool = True,
) -> Callable[[Case, Blocks], Attend]:
    def build(case: Case, b: Blocks) -> Attend:
        attention = _compiled(mode) if compile else flex_attention
        block_mask = None if fold else _chunk_mask(case, b, query_block)
        shape = case.shape

        def fold_sequence(x: Tensor) -> Tensor:  # [P, rows, H, D] → [B, H, L * rows, D]
            return x.reshape(shape.batch, -1, *x.shape[2:]).transpose(1, 2)

        lay = (lambda x: x.transpose(1, 2)) if fold else fold_sequence

        def attend(b: Blocks) -> Tensor:
            by_distance = None
            if case.positions == "relative":
                by_distance = _by_distance(b) * shape.head_dim**-0.5
                if not fold:  # [P, H, M, G] → [B, H, L * M, G]
                    by_distance = by_distance.unflatten(0, (shape.batch, -1)).transpose(1, 2).flatten(2, 3)
            query = _with_bias(b.query, b.tables.get("content_bias"))
            out = attention(
                lay(query),
                lay(b.key),
                lay(b.value),
                score_mod=_score_mod(case, b, by_distance, fold),
                block_mask=block_mask,
                kernel_options=options,
            )
            return out.transpose(1, 2).reshape(b.query.shape)

        return attend

    return build


def _chunk_mask(case: Case, b: Blocks, query_block: int) -> BlockMask:
    """Block-diagonal over [L·M, L·K·R]; in query blocks of 128 rows two chunks share one, and half of it is wasted."""
    s, lengths = case.shape, b.lengths
    if lengths is not None:
        lengths = lengths.reshape(s.batch, s.chunks, s.neighbours)

    def mask_mod(batch: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        chunk = j // s.keys
        own = (i // s.chunk) == chunk
        if lengths is None:
            return own
        return own & (j % s.neighbour_len < lengths[batch, chunk, j % s.keys // s.neighbour_len])

    return create_block_mask(
        mask_mod,
        None if lengths is None else s.batch,
        None,
        s.chunks * s.chunk,
        s.chunks * s.keys,
        device=b.query.device.type,
        BLOCK_SIZE=(query_block, s.neighbour_len if query_block == s.chunk else s.keys),
    )


def _flex_why_not(case: Case, device: str, grad: bool) -> str | None:
    if device != "cuda":
        return "FlexAttention has no backward on a CPU, and compiles its forward for a minute"
    if case.shape.head_dim < 16:
        return "FlexAttention needs a head size of at least 16"
    return None


def _never(case: Case, device: str, grad: bool) -> None:
    return None


# The main kernel instead of the decoding one, with tiles that fit 64 rows; w4 and w8 differ in the key tile.
_TILES_W4 = {
    "FORCE_USE_FLEX_ATTENTION": True,
    "fwd_BLOCK_M": 64,
    "fwd_BLOCK_N": 64,
    "fwd_num_warps": 4,
    "fwd_num_stages": 2,
    "bwd_BLOCK_M1": 64,
    "bwd_BLOCK_N1": 64,
    "bwd_BLOCK_M2": 64,
    "bwd_BLOCK_N2": 64,
    "bwd_num_warps": 4,
    "bwd_num_stages": 2,
}
_TILES_W8 = {**_TILES_W4, "fwd_BLOCK_N": 128, "bwd_BLOCK_N1": 128, "bwd_num_warps": 8}

_SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}

PEERS: tuple[Peer, ...] = (
    Peer("einsum", _einsum, _never),
    Peer("einsum, compiled", lambda case, b: _einsum_in_one_graph(case), _never),
    *(Peer(f"SDPA {name}", _sdpa(backend), _sdpa_why_not(backend)) for name, backend in _SDPA.items()),
    Peer("FlexAttention, chunks as batch", _flex(True), _flex_why_not, as_written=True),
    Peer("FlexAttention, chunks as batch, tiles 64x64", _flex(True, options=_TILES_W4), _flex_why_not),
    Peer("FlexAttention, chunks as batch, tiles 64x128", _flex(True, options=_TILES_W8), _flex_why_not),
    Peer(
        "FlexAttention, block mask 64, max-autotune",
        _flex(False, 64, mode="max-autotune-no-cudagraphs"),
        _flex_why_not,
    ),
    Peer("FlexAttention, block mask 128", _flex(False, 128), _flex_why_not),
)

WITHOUT_POSITIONS = Peer(
    "SDPA without positions",
    _sdpa(*_SDPA.values(), positions=False),
    lambda case, device, grad: "lengths need a mask" if case.lengths else None,
    positions=False,
)


def sdpa_chunked_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    chunk_size: int = 64,
    neighbour_lengths: Tensor | None = None,
    backend: str | None = None,
    **tables: Tensor | None,
) -> Tensor:
    """The library's function on SDPA with a materialised mask: what a model is built on where there is no kernel."""
    batch, tokens, heads, dim = query.shape
    if key.shape[1] == 0:
        return torch.zeros_like(query)
    given = {name: table for name, table in tables.items() if table is not None}
    t = Tensors(query, key, value, query, given, neighbour_lengths, chunk_size)
    shape = Shape(batch, tokens, heads, dim, key.shape[2], chunk_size, key.shape[3])
    return uncut(_attend_with_sdpa(shape, cut(t)), t)


def sdpa_block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: Tensor | None = None,
    key_repeat: int = 1,
    backend: str | None = None,
    **tables: Tensor | None,
) -> Tensor:
    """`block_attention` in the same way."""
    blocks, rows, heads, dim = query.shape
    key, value = (x.repeat_interleave(key_repeat, 0) if key_repeat > 1 else x for x in (key, value))
    if lengths is not None and key_repeat > 1:
        lengths = lengths.repeat_interleave(key_repeat, 0)
    given = {name: table for name, table in tables.items() if table is not None}
    shape = Shape(blocks, rows, heads, dim, key.shape[1], rows, key.shape[2])
    return _attend_with_sdpa(
        shape, Blocks(query, key.flatten(1, 2), value.flatten(1, 2), query, given, lengths, [])
    )


def _attend_with_sdpa(shape: Shape, b: Blocks) -> Tensor:
    positions: Positions = (
        "relative" if "rel_key" in b.tables else "bias" if "rel_bias" in b.tables else "none"
    )
    out = _sdpa(*_SDPA.values())(Case(shape, positions, b.lengths is not None), b)(b)
    if b.lengths is not None:  # a row without keys is NaN in SDPA
        out = torch.where((b.lengths > 0).any(1)[:, None, None, None], out, 0.0)
    return out


def uncompiled_flex() -> tuple[Peer, ...]:
    """The formulations of FlexAttention run eagerly, which any device can: for checking them, not for timing."""

    def why_not(case: Case, device: str, grad: bool) -> str | None:
        return "FlexAttention has no backward on a CPU" if grad and device == "cpu" else None

    return (
        Peer("FlexAttention, chunks as batch", _flex(True, compile=False), why_not),
        Peer("FlexAttention, block mask 64", _flex(False, 64, compile=False), why_not),
        Peer("FlexAttention, block mask 128", _flex(False, 128, compile=False), why_not),
    )
