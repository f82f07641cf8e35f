r"""Backward kernels of block attention (the maths and the legend of shapes: `reference.py`).

Every key block belongs to exactly one attending block, so one pass is enough: a program holds BM query rows, owns
the dK and dV that it writes, keeps dQ in registers, and needs no atomics. With p from the saved base-2 lse,

    dV = pᵀ dO,   dS = p ∘ (dO Vᵀ − Σ dO ∘ O),   dK = scale · dSᵀ (q + u),   dQ = scale · (dS K + shear(Σⱼ dS) rel_key)

dS is summed over the neighbours in registers before it is sheared to distance columns, since positions do not depend
on the neighbour. What the tables get:

    d rel_bias[g] = Σ shear(dS)[·, g]            partials per program, summed in a fixed order
    d rel_key     = scale · shear(dS)ᵀ (q + v)   a second kernel over the stored, neighbour-summed dS
    d position_bias = scale · d rel_bias · rel_key
    d content_bias  = Σ_rows dQ − d position_bias

Where several programs read the same keys (grouped heads, key_repeat, more than 128 query rows) each writes its own
dK and dV, and they are summed in a fixed order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from retro_kernels.ops.cca import tiles, tuning
from retro_kernels.ops.cca.reference import dropout_threshold
from retro_kernels.ops.cca.tiles import (
    _column_sums,
    _dropout_keep,
    _first,
    _load_tile,
    _position_tile,
    _query_tile,
    _shear,
    _store_tile,
    _store_zero_rows,
)

REL_SLICE = 64
"""Distance columns of one program of the kernel for rel_key, which keeps nothing else."""


@triton.jit
def _cca_bwd_kernel(
    query,
    key,
    value,
    rel_key,
    rel_slice,
    out,
    grad_out,
    grad_query,
    grad_key,
    grad_value,
    p_grad_query,
    p_lse,
    p_content_bias,
    p_position_bias,
    p_rel_bias,
    p_lengths,
    p_seed,
    p_columns,
    p_ds,
    p_rows,
    stride_qs,
    stride_qn,
    stride_kg,
    stride_kt,
    stride_vg,
    stride_vt,
    stride_gs,
    stride_gn,
    num_rows,
    num_heads,
    per_seq,
    num_sets,
    num_keys,
    scale,
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
    PANELS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    W: tl.constexpr,
    WC: tl.constexpr,
    WP: tl.constexpr,
    WS: tl.constexpr,
    HAS_REL: tl.constexpr,
    HAS_CONTENT: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    NEED_COLUMNS: tl.constexpr,
    NEED_DS: tl.constexpr,
    NEED_ROWS: tl.constexpr,
    DROPOUT: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    FLAT: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    RELOAD: tl.constexpr,
    STAGES: tl.constexpr,
    WARPS: tl.constexpr,
):
    ROW_TILES: tl.constexpr = (TQ + BM - 1) // BM
    KEY_TILES: tl.constexpr = (TK + BN - 1) // BN
    MASK_KEYS: tl.constexpr = TK % BN != 0
    DW: tl.constexpr = BD // PANELS
    SUM_DS: tl.constexpr = HAS_REL or NEED_COLUMNS or NEED_DS
    pid = tl.program_id(0)
    i_head = pid % num_heads
    i_block = pid // num_heads // ROW_TILES
    o_i = pid // num_heads % ROW_TILES * BM
    i_seq = i_block // per_seq
    o_row = i_block % per_seq * TQ + SHIFT + o_i
    i_group = i_block // REPEAT
    q_col = i_head * D
    kv_col = i_head // GROUP * D
    a = tl.arange(0, BM)
    n = tl.arange(0, BN)
    m_row = (o_i + a < TQ) & (o_row + a < num_rows)
    stride_os = tl.cast(num_rows, tl.int64) * num_heads * D
    stride_on = num_heads * D

    b_q0 = _query_tile(
        query,
        p_content_bias,
        i_seq,
        o_row,
        q_col,
        stride_qs,
        stride_qn,
        num_rows,
        m_row,
        BM,
        DW,
        D,
        HAS_CONTENT,
        TMA,
    )  # [BM, DW]
    b_do0 = _load_tile(
        grad_out, i_seq, o_row, q_col, stride_gs, stride_gn, num_rows, m_row, BM, DW, D, True, TMA
    )
    b_o = _load_tile(out, i_seq, o_row, q_col, stride_os, stride_on, num_rows, m_row, BM, DW, D, True, TMA)
    delta = tl.sum(b_o.to(tl.float32) * b_do0.to(tl.float32), 1)  # [BM]
    dq0 = tl.zeros([BM, DW], tl.float32)
    if PANELS == 2:
        b_q1 = _query_tile(
            query,
            p_content_bias,
            i_seq,
            o_row,
            q_col + DW,
            stride_qs,
            stride_qn,
            num_rows,
            m_row,
            BM,
            DW,
            D - DW,
            HAS_CONTENT,
            TMA,
        )  # [BM, DW]
        b_do1 = _load_tile(
            grad_out,
            i_seq,
            o_row,
            q_col + DW,
            stride_gs,
            stride_gn,
            num_rows,
            m_row,
            BM,
            DW,
            D - DW,
            True,
            TMA,
        )  # [BM, DW]
        b_o = _load_tile(
            out, i_seq, o_row, q_col + DW, stride_os, stride_on, num_rows, m_row, BM, DW, D - DW, True, TMA
        )  # [BM, DW]
        delta += tl.sum(b_o.to(tl.float32) * b_do1.to(tl.float32), 1)
        dq1 = tl.zeros([BM, DW], tl.float32)
    p_row = p_lse + (i_block.to(tl.int64) * num_heads + i_head) * TQ + o_i + a
    lse = tl.load(p_row, mask=m_row, other=float("inf"))  # [BM]
    if KEYS_FIRST:
        lse = lse[None, :]
        delta = delta[None, :]
    else:
        lse = lse[:, None]
        delta = delta[:, None]

    for o_c in tl.range(0, num_keys if RELOAD == 2 else TK, BN, num_stages=1):
        if HAS_REL or HAS_BIAS:
            b_pos = (
                _position_tile(
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
                    PANELS,
                    TQ,
                    TK,
                    BM,
                    BN,
                    WP,
                    HAS_REL,
                    HAS_POSITION,
                    HAS_BIAS,
                    KEYS_FIRST,
                    FLAT,
                    PRECISION,
                    TMA,
                )
                - lse
            )  # [BN, BM] or [BM, BN]
        if SUM_DS:
            if KEYS_FIRST:
                ds_sum = tl.zeros([BN, BM], tl.float32)
            else:
                ds_sum = tl.zeros([BM, BN], tl.float32)
        m_key = o_c + n < TK
        for j in tl.range(0, num_sets, num_stages=STAGES):
            i_kv = i_group * num_sets + j
            b_k0 = _load_tile(
                key, i_kv, o_c, kv_col, stride_kg, stride_kt, TK, m_key, BN, DW, D, MASK_KEYS, TMA
            )  # [BN, DW]
            b_v0 = _load_tile(
                value, i_kv, o_c, kv_col, stride_vg, stride_vt, TK, m_key, BN, DW, D, MASK_KEYS, TMA
            )  # [BN, DW]
            if PANELS == 2:
                b_k1 = _load_tile(
                    key,
                    i_kv,
                    o_c,
                    kv_col + DW,
                    stride_kg,
                    stride_kt,
                    TK,
                    m_key,
                    BN,
                    DW,
                    D - DW,
                    MASK_KEYS,
                    TMA,
                )  # [BN, DW]
                b_v1 = _load_tile(
                    value,
                    i_kv,
                    o_c,
                    kv_col + DW,
                    stride_vg,
                    stride_vt,
                    TK,
                    m_key,
                    BN,
                    DW,
                    D - DW,
                    MASK_KEYS,
                    TMA,
                )  # [BN, DW]
            i_out = pid // num_heads * num_sets + j

            if KEYS_FIRST:
                s = tl.dot(b_k0, tl.trans(b_q0), input_precision=PRECISION)  # [BN, BM]
                if PANELS == 2:
                    s = tl.dot(b_k1, tl.trans(b_q1), s, input_precision=PRECISION)
            else:
                s = tl.dot(b_q0, tl.trans(b_k0), input_precision=PRECISION)  # [BM, BN]
                if PANELS == 2:
                    s = tl.dot(b_q1, tl.trans(b_k1), s, input_precision=PRECISION)
            if HAS_REL or HAS_BIAS:
                p = tl.math.exp2(s * scale_log2 + b_pos)
            else:
                p = tl.math.exp2(s * scale_log2 - lse)
            if HAS_LENGTHS or MASK_KEYS:
                if HAS_LENGTHS:
                    length = tl.minimum(tl.load(p_lengths + i_group.to(tl.int64) * num_sets + j), TK).to(
                        tl.int32
                    )
                    real = _first(length - o_c, BN, PRECISION)
                else:
                    real = m_key
                if KEYS_FIRST:
                    p = tl.where(real[:, None], p, 0.0)
                else:
                    p = tl.where(real[None, :], p, 0.0)
            dropped = p
            if DROPOUT:
                keep = _dropout_keep(
                    p_seed, i_block, i_head, o_i + a, j * TK + o_c + n, threshold, KEYS_FIRST
                )
                dropped = tl.where(keep, p * keep_scale, 0.0)
            p_low = dropped.to(b_do0.dtype)
            if not KEYS_FIRST:
                p_low = tl.trans(p_low)
            dv = tl.dot(p_low, b_do0, input_precision=PRECISION)  # [BN, DW]
            _store_tile(
                grad_value, dv, i_out, o_c, q_col, TK * stride_on, stride_on, m_key, BN, DW, D, MASK_KEYS, TMA
            )
            if PANELS == 2:
                dv = tl.dot(p_low, b_do1, input_precision=PRECISION)
                _store_tile(
                    grad_value,
                    dv,
                    i_out,
                    o_c,
                    q_col + DW,
                    TK * stride_on,
                    stride_on,
                    m_key,
                    BN,
                    DW,
                    D - DW,
                    MASK_KEYS,
                    TMA,
                )

            if KEYS_FIRST:
                dp = tl.dot(b_v0, tl.trans(b_do0), input_precision=PRECISION)  # [BN, BM]
                if PANELS == 2:
                    dp = tl.dot(b_v1, tl.trans(b_do1), dp, input_precision=PRECISION)
            else:
                dp = tl.dot(b_do0, tl.trans(b_v0), input_precision=PRECISION)  # [BM, BN]
                if PANELS == 2:
                    dp = tl.dot(b_do1, tl.trans(b_v1), dp, input_precision=PRECISION)
            if DROPOUT:
                dp = tl.where(keep, dp * keep_scale, 0.0)
            ds = p * (dp - delta)
            if SUM_DS:
                ds_sum += ds
            ds_low = ds.to(b_q0.dtype)
            ds_turned = tl.trans(ds_low)
            if KEYS_FIRST:
                ds_keys = ds_low  # [BN, BM]
                ds_rows = ds_turned  # [BM, BN]
            else:
                ds_keys = ds_turned
                ds_rows = ds_low
            dk = tl.dot(ds_keys, b_q0, input_precision=PRECISION) * scale  # [BN, DW]
            _store_tile(
                grad_key, dk, i_out, o_c, q_col, TK * stride_on, stride_on, m_key, BN, DW, D, MASK_KEYS, TMA
            )
            if PANELS == 2:
                dk = tl.dot(ds_keys, b_q1, input_precision=PRECISION) * scale
                _store_tile(
                    grad_key,
                    dk,
                    i_out,
                    o_c,
                    q_col + DW,
                    TK * stride_on,
                    stride_on,
                    m_key,
                    BN,
                    DW,
                    D - DW,
                    MASK_KEYS,
                    TMA,
                )
            dq0 = tl.dot(ds_rows, b_k0, dq0, input_precision=PRECISION)
            if PANELS == 2:
                dq1 = tl.dot(ds_rows, b_k1, dq1, input_precision=PRECISION)

        i_tile = pid.to(tl.int64) * KEY_TILES + o_c // BN
        if NEED_DS:
            if KEYS_FIRST:
                p_tile = p_ds + i_tile * (BM * BN) + n[:, None] * BM + a[None, :]
            else:
                p_tile = p_ds + i_tile * (BM * BN) + a[:, None] * BN + n[None, :]
            tl.store(p_tile, ds_sum.to(p_ds.dtype.element_ty))
        if NEED_COLUMNS:
            columns = _column_sums(ds_sum, BM, BN, WC, WARPS, KEYS_FIRST)  # [WC]
            tl.store(p_columns + i_tile * WC + tl.arange(0, WC), columns)
        if HAS_REL:
            for o_t in tl.range(0, W, WS, num_stages=1):
                by_distance = _shear(
                    ds_sum, o_t, BN - 1, BM, BN, WS, KEYS_FIRST, True, FLAT
                )  # [WS, BM] or [BM, WS]
                first = o_i - o_c + TK - BN + o_t
                column = first + tl.arange(0, WS)
                m_column = (column >= 0) & (column < TQ + TK - 1)
                by_distance_low = by_distance.to(b_q0.dtype)
                if KEYS_FIRST:
                    by_distance_low = tl.trans(by_distance_low)
                b_rel = _load_tile(
                    rel_slice,
                    i_head,
                    first,
                    0,
                    (TQ + TK - 1) * D,
                    D,
                    TQ + TK - 1,
                    m_column,
                    WS,
                    DW,
                    D,
                    True,
                    TMA,
                )  # [WS, DW]
                dq0 = tl.dot(by_distance_low, b_rel, dq0, input_precision=PRECISION)
                if PANELS == 2:
                    b_rel = _load_tile(
                        rel_slice,
                        i_head,
                        first,
                        DW,
                        (TQ + TK - 1) * D,
                        D,
                        TQ + TK - 1,
                        m_column,
                        WS,
                        DW,
                        D - DW,
                        True,
                        TMA,
                    )  # [WS, DW]
                    dq1 = tl.dot(by_distance_low, b_rel, dq1, input_precision=PRECISION)
        if RELOAD:
            if o_c + BN < TK:
                b_q0 = _query_tile(
                    query,
                    p_content_bias,
                    i_seq,
                    o_row,
                    q_col,
                    stride_qs,
                    stride_qn,
                    num_rows,
                    m_row,
                    BM,
                    DW,
                    D,
                    HAS_CONTENT,
                    TMA,
                )  # [BM, DW]
                if PANELS == 2:
                    b_q1 = _query_tile(
                        query,
                        p_content_bias,
                        i_seq,
                        o_row,
                        q_col + DW,
                        stride_qs,
                        stride_qn,
                        num_rows,
                        m_row,
                        BM,
                        DW,
                        D - DW,
                        HAS_CONTENT,
                        TMA,
                    )  # [BM, DW]

    dq0 *= scale
    _store_tile(grad_query, dq0, i_seq, o_row, q_col, stride_os, stride_on, m_row, BM, DW, D, True, TMA)
    o_d = tl.arange(0, DW)
    if NEED_ROWS:
        p_sum = p_rows + pid.to(tl.int64) * D + o_d
        tl.store(p_sum, tl.sum(dq0, 0), mask=o_d < D)
    if PANELS == 2:
        dq1 *= scale
        _store_tile(
            grad_query, dq1, i_seq, o_row, q_col + DW, stride_os, stride_on, m_row, BM, DW, D - DW, True, TMA
        )
        if NEED_ROWS:
            tl.store(p_sum + DW, tl.sum(dq1, 0), mask=o_d < D - DW)
    if SHIFT > 0:
        if o_row == SHIFT:
            _store_zero_rows(p_grad_query, i_seq, i_head, stride_os, stride_on, num_rows, D, BD, SHIFT, BM)


@triton.jit
def _cca_bwd_rel_kernel(
    query,
    p_position_bias,
    p_ds,
    p_partial,
    p_columns,
    stride_qs,
    stride_qn,
    num_rows,
    num_heads,
    per_seq,
    blocks,
    per_split,
    scale,
    SHIFT: tl.constexpr,
    TQ: tl.constexpr,
    TK: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    W: tl.constexpr,
    WS: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    NEED_COLUMNS: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    FLAT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """shear(dS)ᵀ (q + v) for WS distance columns of one head and one tile, over a fixed share of the blocks; with
    NEED_COLUMNS also the sums of shear(dS) over the rows."""
    ROW_TILES: tl.constexpr = (TQ + BM - 1) // BM
    KEY_TILES: tl.constexpr = (TK + BN - 1) // BN
    SLICES: tl.constexpr = W // WS
    pid = tl.program_id(0)
    i_slice = pid % SLICES
    i_key_tile = pid // SLICES % KEY_TILES
    i_row_tile = pid // (SLICES * KEY_TILES) % ROW_TILES
    i_head = pid // (SLICES * KEY_TILES * ROW_TILES) % num_heads
    i_split = pid // (SLICES * KEY_TILES * ROW_TILES) // num_heads
    a = tl.arange(0, BM)
    n = tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    o_i = i_row_tile * BM

    acc = tl.zeros([WS, BD], tl.float32)
    if NEED_COLUMNS:
        if KEYS_FIRST:
            total = tl.zeros([WS, BM], tl.float32)
        else:
            total = tl.zeros([BM, WS], tl.float32)
    for i_block in tl.range(i_split * per_split, tl.minimum(blocks, (i_split + 1) * per_split)):
        o_row = i_block % per_seq * TQ + SHIFT + o_i
        m_row = (o_i + a < TQ) & (o_row + a < num_rows)
        b_q = _query_tile(
            query,
            p_position_bias,
            i_block // per_seq,
            o_row,
            i_head * D,
            stride_qs,
            stride_qn,
            num_rows,
            m_row,
            BM,
            BD,
            D,
            HAS_POSITION,
            False,
        )  # [BM, BD]
        i_tile = (tl.cast(i_block, tl.int64) * ROW_TILES + i_row_tile) * num_heads + i_head
        p_tile = p_ds + (i_tile * KEY_TILES + i_key_tile) * (BM * BN)
        if KEYS_FIRST:
            ds = tl.load(p_tile + n[:, None] * BM + a[None, :]).to(tl.float32)  # [BN, BM]
        else:
            ds = tl.load(p_tile + a[:, None] * BN + n[None, :]).to(tl.float32)  # [BM, BN]
        by_distance = _shear(ds, i_slice * WS, BN - 1, BM, BN, WS, KEYS_FIRST, True, FLAT)
        if NEED_COLUMNS:
            total += by_distance
        by_distance = by_distance.to(b_q.dtype)
        if not KEYS_FIRST:
            by_distance = tl.trans(by_distance)
        acc = tl.dot(by_distance, b_q, acc, input_precision=PRECISION)  # [WS, BD]
    p = p_partial + (pid.to(tl.int64) * WS + tl.arange(0, WS))[:, None] * D + o_d[None, :]
    tl.store(p, acc * scale, mask=(o_d < D)[None, :])
    if NEED_COLUMNS:
        if KEYS_FIRST:
            columns = tl.sum(total, 1)
        else:
            columns = tl.sum(total, 0)
        tl.store(p_columns + pid.to(tl.int64) * WS + tl.arange(0, WS), columns)


def backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
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
    needs: tuple[bool, ...] = (True, True, True, True),
    *,
    config: tiles.Config | None = None,
    tma: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Launch: gradients of query, key, value, rel_key, content_bias, position_bias and rel_bias.

    `needs` says which of the last four are wanted; a table that is absent or not wanted gets None.
    """
    g = tiles.geometry(query, key, block, repeat)
    groups, num_sets, num_keys, kv_heads, _ = key.shape
    need_rel = needs[0] and rel_key is not None
    need_rows = needs[1] and content_bias is not None
    need_position = needs[2] and position_bias is not None
    need_bias = needs[3] and rel_bias is not None
    need_columns = need_bias or need_position or (need_rows and rel_key is not None)
    arch = tiles.architecture(query.device)
    kind = "relative" if rel_key is not None else "sums" if need_columns else "plain"
    problem = tuning.Problem("backward", arch, g.padded_dim, query.dtype, g.rows, kind)
    q, o = tiles.flat_rows(query, g.num_seqs), tiles.flat_rows(out, g.num_seqs)
    do = tiles.flat_rows(grad_out.to(query.dtype), g.num_seqs)
    k, v = tiles.flat_rows(key, groups * num_sets), tiles.flat_rows(value, groups * num_sets)
    r = None if rel_key is None else rel_key.contiguous()
    if tma is None:
        tma = block % g.rows == 0 and tiles.can_use_tma(
            arch, g.head_dim, g.padded_dim, (q, k, v, do) if r is None else (q, k, v, do, r)
        )

    flat = tiles.flat_shear(arch, query.dtype, g.rows, wide=g.padded_dim > 128)

    def launch(config: tiles.Config) -> tuple[Tensor | None, ...]:
        window = triton.cdiv(g.rows + config.keys - 1, REL_SLICE) * REL_SLICE
        column_window = triton.next_power_of_2(g.rows + config.keys - 1)
        # with eight warps heads of more than 64 leave no registers for a whole window
        whole = flat and (g.padded_dim <= 64 or config.warps == 4)
        slice_ = tiles.window_slice(g.rows, config.keys, config.warps, whole)
        small = tiles.SLICE if not flat or arch < 90 else 2 * tiles.SLICE
        key_tiles = triton.cdiv(num_keys, config.keys)
        width = g.padded_dim // config.panels
        programs = g.blocks * g.row_tiles * g.num_heads
        writers = g.num_heads // kv_heads * repeat * g.row_tiles

        grad_query = query.new_empty(query.shape)
        dq = tiles.flat_rows(grad_query, g.num_seqs)
        own_shape = (g.blocks * g.row_tiles * num_sets, num_keys, g.num_heads * g.head_dim)
        own_key, own_value = key.new_empty(own_shape), value.new_empty(own_shape)
        fp32 = {"dtype": torch.float32}
        in_kernel = need_columns and not need_rel  # else the kernel for rel_key makes them
        columns = query.new_empty((programs, key_tiles, column_window), **fp32) if in_kernel else None
        rows = query.new_empty((programs, g.head_dim), **fp32) if need_rows else None
        ds = query.new_empty((programs, key_tiles, g.rows * config.keys)) if need_rel else None

        _cca_bwd_kernel[(programs,)](
            tiles.descriptor(q, g.rows, width, tma),
            tiles.descriptor(k, config.keys, width, tma),
            tiles.descriptor(v, config.keys, width, tma),
            None if r is None else tiles.descriptor(r, slice_, width, tma),
            None if r is None else tiles.descriptor(r, small, width, tma),
            tiles.descriptor(o, g.rows, width, tma),
            tiles.descriptor(do, g.rows, width, tma),
            tiles.descriptor(dq, g.rows, width, tma),
            tiles.descriptor(own_key, config.keys, width, tma),
            tiles.descriptor(own_value, config.keys, width, tma),
            grad_query,
            lse,
            content_bias,
            position_bias,
            rel_bias,
            lengths,
            seed,
            columns,
            ds,
            rows,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            do.stride(0),
            do.stride(1),
            g.num_rows,
            g.num_heads,
            g.per_seq,
            num_sets,
            num_keys,
            scale,
            scale * math.log2(math.e),
            dropout_threshold(dropout_p),
            1.0 / (1.0 - dropout_p),
            REPEAT=repeat,
            GROUP=g.num_heads // kv_heads,
            SHIFT=shift,
            TQ=block,
            TK=num_keys,
            D=g.head_dim,
            BD=g.padded_dim,
            PANELS=config.panels,
            BM=g.rows,
            BN=config.keys,
            W=window,
            WC=column_window,
            WP=slice_,
            WS=small,
            HAS_REL=rel_key is not None,
            HAS_CONTENT=content_bias is not None,
            HAS_POSITION=position_bias is not None,
            HAS_BIAS=rel_bias is not None,
            HAS_LENGTHS=lengths is not None,
            NEED_COLUMNS=in_kernel,
            NEED_DS=need_rel,
            NEED_ROWS=need_rows,
            DROPOUT=dropout_p > 0.0,
            KEYS_FIRST=config.keys_first,
            FLAT=flat,
            PRECISION=tiles.precision(query.dtype),
            TMA=tma,
            # with keys first the query is the other operand, which is in shared memory anyway
            RELOAD=0
            if config.keys_first
            else tiles.reload(arch, query.dtype, content_bias, num_sets, num_keys, config.keys),
            STAGES=config.stages,
            WARPS=config.warps,
            num_warps=config.warps,
            num_stages=config.stages,
        )

        grad_key = (
            own_key.view(key.shape) if writers == 1 else _sum_writers(own_key, key, repeat * g.row_tiles)
        )
        grad_value = (
            own_value.view(value.shape)
            if writers == 1
            else _sum_writers(own_value, value, repeat * g.row_tiles)
        )
        summed = by_column = grad_position = grad_content = grad_rel = None
        if columns is not None:
            summed = columns.view(g.blocks, g.row_tiles, g.num_heads, key_tiles, column_window).sum(0)
        if ds is not None:
            assert rel_key is not None
            partial, summed = _rel_partials(
                q, position_bias, ds, need_columns, g, block, shift, num_keys, config, window, scale
            )
            grad_rel = _fold(partial, block, num_keys, g.rows, config.keys).to(rel_key.dtype)
        if need_columns:
            by_column = _fold(summed.unsqueeze(-1), block, num_keys, g.rows, config.keys)[
                ..., 0
            ]  # [H, columns]
        if by_column is not None and rel_key is not None and (need_position or need_rows):
            grad_position = torch.bmm(by_column[:, None], rel_key.float())[:, 0] * scale
        if rows is not None:
            assert content_bias is not None
            grad_content = rows.view(-1, g.num_heads, g.head_dim).sum(0)
            grad_content = (grad_content if grad_position is None else grad_content - grad_position).to(
                content_bias.dtype
            )
        if need_position:
            assert grad_position is not None and position_bias is not None
            grad_position = grad_position.to(position_bias.dtype)
        grad_bias = (
            by_column.to(rel_bias.dtype)
            if need_bias and by_column is not None and rel_bias is not None
            else None
        )
        return (
            grad_query,
            grad_key,
            grad_value,
            grad_rel,
            grad_content,
            grad_position if need_position else None,
            grad_bias,
        )

    return tuning.fitting(problem, config, launch)


def _sum_writers(own: Tensor, like: Tensor, blocks_each: int) -> Tensor:
    """[P · tiles · J, TK, H · D] → [G, J, TK, Hkv, D]: the shares of the programs that read the same keys."""
    groups, num_sets, num_keys, kv_heads, head_dim = like.shape
    return own.view(groups, blocks_each, num_sets, num_keys, kv_heads, -1, head_dim).sum((1, 5))


def _rel_partials(
    q: Tensor,
    position_bias: Tensor | None,
    ds: Tensor,
    need_columns: bool,
    g: tiles.Geometry,
    block: int,
    shift: int,
    num_keys: int,
    config: tiles.Config,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    """Gradient of rel_key by tile, [row tiles, H, key tiles, W, D], and the sums of dS [row tiles, H, key tiles, W]."""
    key_tiles = triton.cdiv(num_keys, config.keys)
    columns_each = min(REL_SLICE, tiles.FP32_ROWS) if q.dtype == torch.float32 else REL_SLICE
    parts = g.num_heads * g.row_tiles * key_tiles * (window // columns_each)
    # depends on shapes alone, so that the order of the sum, and with it every bit, is the same in every run
    splits = max(1, min(triton.cdiv(g.blocks, 4), triton.cdiv(1056, parts)))
    per_split = triton.cdiv(g.blocks, splits)
    splits = triton.cdiv(g.blocks, per_split)
    partial = q.new_empty(
        (splits, g.num_heads, g.row_tiles, key_tiles, window, g.head_dim), dtype=torch.float32
    )
    columns = q.new_empty(partial.shape[:-1], dtype=torch.float32) if need_columns else None
    warps, stages = _rel_blocks(q, g, config.keys)
    _cca_bwd_rel_kernel[(splits * parts,)](
        q,
        position_bias,
        ds,
        partial,
        columns,
        q.stride(0),
        q.stride(1),
        g.num_rows,
        g.num_heads,
        g.per_seq,
        g.blocks,
        per_split,
        scale,
        SHIFT=shift,
        TQ=block,
        TK=num_keys,
        D=g.head_dim,
        BD=g.padded_dim,
        BM=g.rows,
        BN=config.keys,
        W=window,
        WS=columns_each,
        HAS_POSITION=position_bias is not None,
        NEED_COLUMNS=need_columns,
        KEYS_FIRST=config.keys_first,
        FLAT=tiles.flat_shear(tiles.architecture(q.device), q.dtype, g.rows, wide=g.padded_dim > 128),
        PRECISION=tiles.precision(q.dtype),
        num_warps=warps,
        num_stages=stages,
    )
    return partial.sum(0).transpose(0, 1), None if columns is None else columns.sum(0).transpose(0, 1)


def _rel_blocks(q: Tensor, g: tiles.Geometry, keys: int) -> tuple[int, int]:
    """Warps and stages of the kernel for rel_key.

    On sm_90 as measured there. On sm_80 the tiles to come take registers, and 128 rows of 128 dimensions would spill in
    the loop; two stages of 256 dimensions in fp32 exceed what any GPU has.
    """
    arch, wide = tiles.architecture(q.device), g.padded_dim > 64
    if tiles.hopper(arch) and q.dtype != torch.float32 and g.padded_dim <= 128 and max(g.rows, keys) <= 64:
        return 4, 3
    tight = (arch < 90 and wide and g.rows >= 128) or (q.dtype == torch.float32 and g.padded_dim > 128)
    return 8 if wide or max(g.rows, keys) >= 128 else 4, 1 if tight else 2


def _fold(parts: Tensor, block: int, num_keys: int, rows: int, keys: int) -> Tensor:
    """[row tiles, H, key tiles, W, C] → [H, TQ + TK − 1, C]: adds up where the windows of tiles overlap."""
    row_tiles, num_heads, key_tiles, window, width = parts.shape
    first = num_keys - key_tiles * keys  # the leftmost window may start before column 0
    total = parts.new_zeros((num_heads, (row_tiles - 1) * rows + (key_tiles - 1) * keys + window, width))
    for i in range(row_tiles):
        for c in range(key_tiles):
            start = i * rows + (key_tiles - 1 - c) * keys
            total[:, start : start + window] += parts[i, :, c]
    return total[:, -first : -first + block + num_keys - 1].contiguous()
