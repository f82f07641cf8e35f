r"""Forward kernel of block attention (the maths and the legend of shapes: `reference.py`).

One program holds BM query rows of one block and one head and walks over key tiles, neighbours inside: the position
term does not depend on the neighbour (Borgeaud et al. 2021, eq. 6), so its [BM, BN] tile is made once per key tile
from (q + v) · rel_keyᵀ by a shear and stays in registers. Softmax is online and in base 2, with fp32 accumulation:

    s = (q + u) · kᵀ · scale · log2 e + tile,   p = 2^(s − max),   out = Σ p v / Σ p,   lse = max + log2 Σ p

A row without any finite logit has out = 0 and lse = +inf, which makes every gradient of it zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from retro_kernels.ops.cca import launch, tiles, tuning
from retro_kernels.ops.cca.reference import dropout_threshold
from retro_kernels.ops.cca.tiles import (
    _dropout_keep,
    _first,
    _load_tile,
    _position_tile,
    _query_tile,
    _store_tile,
    _store_zero_rows,
)


@triton.jit
def _cca_fwd_kernel(
    query,
    key,
    value,
    rel_key,
    out,
    p_out,
    p_lse,
    p_content_bias,
    p_position_bias,
    p_rel_bias,
    p_lengths,
    p_seed,
    stride_qs,
    stride_qn,
    stride_kg,
    stride_kt,
    stride_vg,
    stride_vt,
    num_rows,
    num_heads,
    per_seq,
    num_sets,
    num_keys,
    scale_log2,
    threshold,
    keep_scale,
    REPEAT: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFT: tl.constexpr,
    TQ: tl.constexpr,
    TK: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WS: tl.constexpr,
    HAS_REL: tl.constexpr,
    HAS_CONTENT: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    FLAT: tl.constexpr,
    PARTS: tl.constexpr,
    TMA: tl.constexpr,
    RELOAD: tl.constexpr,
    STAGES: tl.constexpr,
):
    ROW_TILES: tl.constexpr = (TQ + BM - 1) // BM
    MASK_KEYS: tl.constexpr = TK % BN != 0
    pid = tl.program_id(0)
    i_head = pid % num_heads
    i_block = pid // num_heads // ROW_TILES
    o_i = pid // num_heads % ROW_TILES * BM
    i_seq = i_block // per_seq
    o_row = i_block % per_seq * TQ + SHIFT + o_i
    i_group = i_block // REPEAT
    kv_col = i_head // GROUP * D
    a = tl.arange(0, BM)
    n = tl.arange(0, BN)
    m_row = (o_i + a < TQ) & (o_row + a < num_rows)

    b_q = _query_tile(
        query,
        p_content_bias,
        i_seq,
        o_row,
        i_head * D,
        stride_qs,
        stride_qn,
        num_rows,
        m_row,
        BM,
        BD,
        D,
        HAS_CONTENT,
        TMA,
    )  # [BM, BD]

    row_max = tl.full([BM], float("-inf"), tl.float32)
    row_sum = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    # a bound that the compiler knows saves registers, but of one tile it makes no loop
    for o_c in tl.range(0, num_keys if RELOAD == 2 else TK, BN, num_stages=1):
        if HAS_REL or HAS_BIAS:
            b_pos = _position_tile(
                query,
                rel_key,
                p_position_bias,
                p_rel_bias,
                i_seq,
                i_head,
                o_row,
                o_i,
                o_c,
                stride_qs,
                stride_qn,
                num_rows,
                m_row,
                scale_log2,
                D,
                BD,
                1,
                TQ,
                TK,
                BM,
                BN,
                WS,
                HAS_REL,
                HAS_POSITION,
                HAS_BIAS,
                False,
                FLAT,
                PARTS,
                PRECISION,
                TMA,
            )  # [BM, BN]
        m_key = o_c + n < TK
        for j in tl.range(0, num_sets, num_stages=STAGES):
            b_k = _load_tile(
                key,
                i_group * num_sets + j,
                o_c,
                kv_col,
                stride_kg,
                stride_kt,
                TK,
                m_key,
                BN,
                BD,
                D,
                MASK_KEYS,
                TMA,
            )  # [BN, BD]
            s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2  # [BM, BN]
            if HAS_REL or HAS_BIAS:
                s += b_pos
            if HAS_LENGTHS:
                length = tl.minimum(tl.load(p_lengths + i_group.to(tl.int64) * num_sets + j), TK).to(tl.int32)
                s = tl.where(_first(length - o_c, BN, PRECISION)[None, :], s, float("-inf"))
            elif MASK_KEYS:
                s = tl.where(m_key[None, :], s, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(s, 1))
            safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
            p = tl.math.exp2(s - safe_max[:, None])
            decay = tl.math.exp2(row_max - safe_max)
            row_sum = row_sum * decay + tl.sum(p, 1)
            row_max = new_max
            if DROPOUT:
                keep = _dropout_keep(p_seed, i_block, i_head, o_i + a, j * TK + o_c + n, threshold, False)
                p = tl.where(keep, p, 0.0)
            acc = acc * decay[:, None]
            b_v = _load_tile(
                value,
                i_group * num_sets + j,
                o_c,
                kv_col,
                stride_vg,
                stride_vt,
                TK,
                m_key,
                BN,
                BD,
                D,
                MASK_KEYS,
                TMA,
            )  # [BN, BD]
            acc = tl.dot(p.to(b_v.dtype), b_v, acc, input_precision=PRECISION)
        if RELOAD:
            if o_c + BN < TK:
                b_q = _query_tile(
                    query,
                    p_content_bias,
                    i_seq,
                    o_row,
                    i_head * D,
                    stride_qs,
                    stride_qn,
                    num_rows,
                    m_row,
                    BM,
                    BD,
                    D,
                    HAS_CONTENT,
                    TMA,
                )  # [BM, BD]

    empty = row_sum == 0.0
    total = tl.where(empty, 1.0, row_sum)
    acc = acc * (keep_scale / total)[:, None]
    lse = tl.where(empty | (o_row + a >= num_rows), float("inf"), row_max + tl.math.log2(total))
    _store_tile(
        out,
        acc,
        i_seq,
        o_row,
        i_head * D,
        tl.cast(num_rows, tl.int64) * num_heads * D,
        num_heads * D,
        m_row,
        BM,
        BD,
        D,
        True,
        TMA,
    )
    p_row = p_lse + (i_block.to(tl.int64) * num_heads + i_head) * TQ + o_i + a
    tl.store(p_row, lse, mask=o_i + a < TQ)
    if SHIFT > 0:
        if o_row == SHIFT:
            _store_zero_rows(
                p_out,
                i_seq,
                i_head,
                tl.cast(num_rows, tl.int64) * num_heads * D,
                num_heads * D,
                num_rows,
                D,
                BD,
                SHIFT,
                BM,
            )


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rel_key: Tensor | None,
    content_bias: Tensor | None,
    position_bias: Tensor | None,
    rel_bias: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    block: int,
    shift: int,
    repeat: int,
    scale: float,
    dropout_p: float,
    *,
    config: tiles.Config | None = None,
    tma: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch: out [S, N, H, D] and lse [P, H, TQ] in base 2."""
    options = (block, shift, repeat, scale, dropout_p)

    def fitting(attempt: Callable[[tiles.Config], Any]) -> Any:
        g = tiles.geometry(query, key, block, repeat, False)
        arch = tiles.architecture(query.device)
        tables = "plain" if rel_key is None else "relative"
        problem = tuning.Problem("forward", arch, g.padded_dim, query.dtype, g.rows, tables)
        return tuning.fitting(problem, config, attempt)

    return launch.run(
        "forward",
        (query, key, value, rel_key, content_bias, position_bias, rel_bias, lengths, seed),
        (*options, config, tma),
        lambda tensors, config: _Forward(*tensors, *options, config, tma),
        fitting,
    )


class _Forward:
    """The forward pass of one kind of call."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rel_key: Tensor | None,
        content_bias: Tensor | None,
        position_bias: Tensor | None,
        rel_bias: Tensor | None,
        lengths: Tensor | None,
        seed: Tensor | None,
        block: int,
        shift: int,
        repeat: int,
        scale: float,
        dropout_p: float,
        config: tiles.Config,
        tma: bool | None,
    ) -> None:
        g = tiles.geometry(query, key, block, repeat, False)
        _, num_sets, num_keys, kv_heads, _ = key.shape
        arch = tiles.architecture(query.device)
        out = torch.empty(query.shape, dtype=query.dtype, device="meta")
        q, k, v, o = (launch.flat_rows(x) for x in (query, key, value, out))
        if tma is None:
            tma = block % g.rows == 0 and tiles.can_use_tma(
                arch,
                g.head_dim,
                g.padded_dim,
                query.dtype,
                (q, k, v) if rel_key is None else (q, k, v, rel_key),
            )
        flat = tiles.flat_shear(arch, query.dtype, g.rows, wide=False)
        slice_ = tiles.window_slice(g.rows, config.keys, config.warps, flat)
        parts = config.narrow and flat
        slice_ = slice_ // 2 if parts else slice_
        self._lse_shape = (g.blocks, g.num_heads, block)
        self.launches = [
            launch.Launch(
                _cca_fwd_kernel,
                (g.blocks * g.row_tiles * g.num_heads,),
                (
                    launch.Window(q, g.rows, g.padded_dim, tma),
                    launch.Window(k, config.keys, g.padded_dim, tma),
                    launch.Window(v, config.keys, g.padded_dim, tma),
                    None if rel_key is None else launch.Window(rel_key, slice_, g.padded_dim, tma),
                    launch.Window(o, g.rows, g.padded_dim, tma),
                ),
                (
                    *q.stride()[:2],
                    *k.stride()[:2],
                    *v.stride()[:2],
                    g.num_rows,
                    g.num_heads,
                    g.per_seq,
                    num_sets,
                    num_keys,
                    scale * math.log2(math.e),
                    dropout_threshold(dropout_p),
                    1.0 / (1.0 - dropout_p),
                ),
                {
                    "REPEAT": repeat,
                    "GROUP": g.num_heads // kv_heads,
                    "SHIFT": shift,
                    "TQ": block,
                    "TK": num_keys,
                    "D": g.head_dim,
                    "BD": g.padded_dim,
                    "BM": g.rows,
                    "BN": config.keys,
                    "WS": slice_,
                    "HAS_REL": rel_key is not None,
                    "HAS_CONTENT": content_bias is not None,
                    "HAS_POSITION": position_bias is not None,
                    "HAS_BIAS": rel_bias is not None,
                    "HAS_LENGTHS": lengths is not None,
                    "DROPOUT": dropout_p > 0.0,
                    "PRECISION": tiles.precision(query.dtype),
                    "FLAT": flat,
                    "PARTS": parts,
                    "TMA": tma,
                    "RELOAD": tiles.reload(arch, query.dtype, content_bias, num_sets, num_keys, config.keys),
                    "STAGES": config.stages,
                },
                num_warps=config.warps,
                num_stages=config.stages,
                **({"maxnreg": tiles.NARROW} if config.narrow else {}),
            )
        ]

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, rel_key: Tensor | None, *rest: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out = query.new_empty(query.shape)
        lse = query.new_empty(self._lse_shape, dtype=torch.float32)
        self.launches[0](query, key, value, rel_key, out, out, lse, *rest)
        return out, lse
