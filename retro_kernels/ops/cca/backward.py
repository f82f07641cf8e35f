r"""Backward kernels of block attention (the maths and the legend of shapes: `reference.py`).

Every key block belongs to exactly one attending block, so one pass is enough: a program holds BM query rows, owns
the dK and dV that it writes, keeps dQ in registers, and needs no atomics. With p from the saved base-2 lse,

    dV = pᵀ dO,   dS = p ∘ (dO Vᵀ − Σ dO ∘ O),   dK = scale · dSᵀ (q + u),   dQ = scale · (dS K + shear(Σⱼ dS) rel_key)

dS is summed over the neighbours in registers before it is sheared to distance columns, since positions do not depend
on the neighbour; what the tables get of it, sheared, is in `table_gradients.py`.

Where several programs read the same keys (grouped heads, key_repeat, more query rows than a program takes) each writes
its own dK and dV, and they are summed in a fixed order, slice by slice of the blocks.
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
from retro_kernels.ops.cca.table_gradients import Needs, Slice, TableGradients
from retro_kernels.ops.cca.tiles import (
    _bias_tile,
    _bias_window,
    _column_sums,
    _dropout_keep,
    _first,
    _load_tile,
    _position_tile,
    _query_tile,
    _row_tile,
    _shear,
    _store_tile,
    _store_zero_rows,
)

Gradients = tuple[Tensor, Tensor, Tensor, "Tensor | None", "Tensor | None", "Tensor | None", "Tensor | None"]
"""Of query, key, value, rel_key, content_bias, position_bias and rel_bias."""


OWN_SHARES = 2**25
"""Values of the programs' own dK, and as many of dV, where those are to be summed: blocks are worked on in slices that
have no more, so that the shares of large calls take little memory beside the sums."""

LEAST_PROGRAMS = 528
"""Programs that a slice has all the same, where there are as many: four for each multiprocessor of an H100."""


# what differs between the launches of one call makes no machine code of its own
@triton.jit(do_not_specialize=["first_program", "first_tile"])
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
    sheared,
    p_grad_query,
    p_lse,
    p_content_bias,
    p_position_bias,
    p_rel_bias,
    p_lengths,
    p_seed,
    p_columns,
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
    first_program,
    first_tile,
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
    NEED_SHEARED: tl.constexpr,
    NEED_ROWS: tl.constexpr,
    OF_SLICE: tl.constexpr,
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
    WB: tl.constexpr = 2 * (BM if BM > BN else BN)
    SUM_DS: tl.constexpr = HAS_REL or NEED_COLUMNS or NEED_SHEARED
    FROM_SHARED: tl.constexpr = HAS_BIAS and not HAS_REL
    pid = tl.program_id(0) + first_program
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
        b_lse = lse[None, :]
        b_delta = delta[None, :]
    else:
        b_lse = lse[:, None]
        b_delta = delta[:, None]

    # dK and dV begin with those of the slice's first block
    first_out = first_program // num_heads * num_sets if OF_SLICE else 0
    for o_c in tl.range(0, num_keys if RELOAD == 2 else TK, BN, num_stages=1):
        if FROM_SHARED:
            b_bias = _bias_window(p_rel_bias, i_head, o_i - o_c + TK - BN, TQ + TK - 1, WB)
        if HAS_REL:
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
                    False,
                    PRECISION,
                    TMA,
                )
                - b_lse
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
            i_out = pid // num_heads * num_sets + j - first_out

            if KEYS_FIRST:
                s = tl.dot(b_k0, tl.trans(b_q0), input_precision=PRECISION)  # [BN, BM]
                if PANELS == 2:
                    s = tl.dot(b_k1, tl.trans(b_q1), s, input_precision=PRECISION)
            else:
                s = tl.dot(b_q0, tl.trans(b_k0), input_precision=PRECISION)  # [BM, BN]
                if PANELS == 2:
                    s = tl.dot(b_q1, tl.trans(b_k1), s, input_precision=PRECISION)
            if FROM_SHARED:
                # 0, which the compiler cannot know: what depends on it is not kept in registers through the loop
                nought = tl.minimum(j, 0)
                b_pos = _bias_tile(b_bias, nought, BM, BN, KEYS_FIRST)
                if KEYS_FIRST:  # where a thread has many rows
                    p = tl.math.exp2(s * scale_log2 + (b_pos - _row_tile(lse, nought, BM, BN)))
                else:
                    p = tl.math.exp2(s * scale_log2 + (b_pos - b_lse))
            elif HAS_REL:
                p = tl.math.exp2(s * scale_log2 + b_pos)
            else:
                p = tl.math.exp2(s * scale_log2 - b_lse)
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
            if FROM_SHARED and KEYS_FIRST:
                ds = p * (dp - _row_tile(delta, nought, BM, BN))
            else:
                ds = p * (dp - b_delta)
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

        if NEED_COLUMNS:
            i_tile = pid.to(tl.int64) * KEY_TILES + o_c // BN
            columns = _column_sums(ds_sum, BM, BN, WC, WARPS, KEYS_FIRST)  # [WC]
            tl.store(p_columns + i_tile * WC + tl.arange(0, WC), columns)
        if HAS_REL:
            for o_t in tl.range(0, W, WS, num_stages=1):
                by_distance = _shear(
                    ds_sum, o_t, BN - 1, BM, BN, WS, KEYS_FIRST, True, FLAT
                )  # [WS, BM] or [BM, WS]
                if FLAT and WS == BN:
                    # never, but so both have one layout: that of a product, whose operand it then is without a detour
                    # through shared memory
                    by_distance = tl.where(num_rows < 0, ds_sum, by_distance)
                first = o_i - o_c + TK - BN + o_t
                column = first + tl.arange(0, WS)
                m_column = (column >= 0) & (column < TQ + TK - 1)
                by_distance_low = by_distance.to(b_q0.dtype)
                if NEED_SHEARED:
                    i_stored = (pid - first_program) * KEY_TILES + o_c // BN + first_tile
                    if KEYS_FIRST:
                        _store_tile(
                            sheared,
                            by_distance_low,
                            i_stored,
                            o_t,
                            0,
                            BM * W,
                            BM,
                            m_row,
                            WS,
                            BM,
                            BM,
                            False,
                            TMA,
                        )
                    else:
                        _store_tile(
                            sheared,
                            by_distance_low,
                            i_stored,
                            0,
                            o_t,
                            BM * W,
                            W,
                            m_row,
                            BM,
                            WS,
                            WS,
                            False,
                            TMA,
                        )
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
) -> Gradients:
    """Launch: gradients of query, key, value, rel_key, content_bias, position_bias and rel_bias.

    `needs` says which of the last four are wanted; a table that is absent or not wanted gets None.
    """
    options = (block, shift, repeat, scale, dropout_p, needs)

    def fitting(attempt: Callable[[tiles.Config], Any]) -> Any:
        g = tiles.geometry(query, key, block, repeat, True)
        need = Needs.of(needs, rel_key, content_bias, position_bias, rel_bias)
        tables = "relative" if rel_key is not None else "sums" if need.columns else "plain"
        arch = tiles.architecture(query.device)
        problem = tuning.Problem("backward", arch, g.padded_dim, query.dtype, g.rows, tables)
        return tuning.fitting(problem, config, attempt)

    return launch.run(
        "backward",
        (
            grad_out.to(query.dtype),
            out,
            lse,
            query,
            key,
            value,
            rel_key,
            content_bias,
            position_bias,
            rel_bias,
            lengths,
            seed,
        ),
        (*options, config, tma),
        lambda tensors, config: _Backward(*tensors, *options, config, tma),
        fitting,
    )


class _Backward:
    """The backward pass of one kind of call."""

    def __init__(
        self,
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
        needs: tuple[bool, ...],
        config: tiles.Config,
        tma: bool | None,
    ) -> None:
        g = tiles.geometry(query, key, block, repeat, True)
        _, num_sets, num_keys, kv_heads, _ = key.shape
        arch = tiles.architecture(query.device)
        need = Needs.of(needs, rel_key, content_bias, position_bias, rel_bias)
        writers = g.num_heads // kv_heads * repeat * g.row_tiles
        keys_each = g.row_tiles * num_sets * num_keys * g.num_heads * g.head_dim
        cut, most = None, g.blocks
        if writers > 1:
            cut = slices_of_shares(g.blocks, repeat, g.row_tiles * g.num_heads, keys_each)
            most = max(part.last - part.first for part in cut)
        own_shape = (most * g.row_tiles, num_sets, num_keys, g.num_heads, g.head_dim)
        q, k, v, o, do = (launch.flat_rows(x) for x in (query, key, value, out, grad_out))
        dq, dk = (
            launch.flat_rows(torch.empty(shape, dtype=query.dtype, device="meta"))
            for shape in (query.shape, own_shape)
        )
        if tma is None:
            tma = block % g.rows == 0 and tiles.can_use_tma(
                arch,
                g.head_dim,
                g.padded_dim,
                query.dtype,
                (q, k, v, do) if rel_key is None else (q, k, v, do, rel_key),
            )
        flat = tiles.flat_shear(arch, query.dtype, g.rows, wide=g.padded_dim > 128)
        # with eight warps heads of more than 64 leave no registers for a whole window
        whole = flat and (g.padded_dim <= 64 or config.warps == 4)
        slice_ = tiles.window_slice(g.rows, config.keys, config.warps, whole)
        small = tiles.SLICE if not flat or arch < 90 else 2 * tiles.SLICE
        width = g.padded_dim // config.panels
        self._own_shape, self._shared = own_shape, writers > 1
        self._repeat, self._row_tiles = repeat, g.row_tiles
        # in a later call of the kind, the blocks may have an axis for the batch too
        self._key_shape = key.shape
        self._tables = TableGradients(
            need,
            q,
            g,
            config,
            block=block,
            shift=shift,
            num_keys=num_keys,
            scale=scale,
            window=triton.cdiv(g.rows + config.keys - 1, small) * small,
            cut=cut,
            keys_each=keys_each,
            has_rel=rel_key is not None,
            has_position=position_bias is not None,
        )
        programs_each = g.row_tiles * g.num_heads
        self._main = [
            launch.Launch(
                _cca_bwd_kernel,
                ((part.last - part.first) * programs_each,),
                (
                    launch.Window(q, g.rows, width, tma),
                    launch.Window(k, config.keys, width, tma),
                    launch.Window(v, config.keys, width, tma),
                    None if rel_key is None else launch.Window(rel_key, slice_, width, tma),
                    None if rel_key is None else launch.Window(rel_key, small, width, tma),
                    launch.Window(o, g.rows, width, tma),
                    launch.Window(do, g.rows, width, tma),
                    launch.Window(dq, g.rows, width, tma),
                    launch.Window(dk, config.keys, width, tma),
                    launch.Window(dk, config.keys, width, tma),
                    self._tables.sheared(part, dk, small, tma),
                ),
                (
                    *q.stride()[:2],
                    *k.stride()[:2],
                    *v.stride()[:2],
                    *do.stride()[:2],
                    g.num_rows,
                    g.num_heads,
                    g.per_seq,
                    num_sets,
                    num_keys,
                    scale,
                    scale * math.log2(math.e),
                    dropout_threshold(dropout_p),
                    1.0 / (1.0 - dropout_p),
                    part.first * programs_each,
                    part.tile or 0,
                ),
                {
                    "REPEAT": repeat,
                    "GROUP": g.num_heads // kv_heads,
                    "SHIFT": shift,
                    "TQ": block,
                    "TK": num_keys,
                    "D": g.head_dim,
                    "BD": g.padded_dim,
                    "PANELS": config.panels,
                    "BM": g.rows,
                    "BN": config.keys,
                    "W": self._tables.window,
                    "WC": self._tables.column_window,
                    "WP": slice_,
                    "WS": small,
                    "HAS_REL": rel_key is not None,
                    "HAS_CONTENT": content_bias is not None,
                    "HAS_POSITION": position_bias is not None,
                    "HAS_BIAS": rel_bias is not None,
                    "HAS_LENGTHS": lengths is not None,
                    "NEED_COLUMNS": self._tables.by_program,
                    "NEED_SHEARED": need.rel,
                    "NEED_ROWS": need.content,
                    "OF_SLICE": most < g.blocks,
                    "DROPOUT": dropout_p > 0.0,
                    "KEYS_FIRST": config.keys_first,
                    "FLAT": flat,
                    "PRECISION": tiles.precision(query.dtype),
                    "TMA": tma,
                    # with keys first the query is the other operand, which is in shared memory anyway
                    "RELOAD": 0
                    if config.keys_first
                    else tiles.reload(arch, query.dtype, content_bias, num_sets, num_keys, config.keys),
                    "STAGES": config.stages,
                    "WARPS": config.warps,
                },
                num_warps=config.warps,
                num_stages=config.stages,
            )
            for part in self._tables.slices
        ]

        self.launches = [*self._main, *self._tables.launches]

    def __call__(
        self,
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
    ) -> Gradients:
        grad_query = query.new_empty(query.shape)
        own_key, own_value = (query.new_empty(self._own_shape) for _ in "kv")
        grad_key, grad_value = own_key, own_value
        if self._shared:
            grad_key, grad_value = (query.new_empty(self._key_shape) for _ in "kv")
        scratch = self._tables.scratch(query)
        for i, (part, main) in enumerate(zip(self._tables.slices, self._main, strict=True)):
            sheared = scratch.sheared if part.tile is None else own_key
            main(
                query,
                key,
                value,
                rel_key,
                rel_key,
                out,
                grad_out,
                grad_query,
                own_key,
                own_value,
                sheared,
                grad_query,
                lse,
                content_bias,
                position_bias,
                rel_bias,
                lengths,
                seed,
                scratch.columns if self._tables.by_program else None,
                scratch.rows,
            )
            self._tables.add(i, query, sheared, scratch)
            if self._shared:
                self._sum_shares(own_key, grad_key, part)
                self._sum_shares(own_value, grad_value, part)
        tables = self._tables.finish(scratch, (rel_key, content_bias, position_bias, rel_bias))
        return grad_query, grad_key.view(key.shape), grad_value.view(key.shape), *tables

    def _sum_shares(self, own: Tensor, grad: Tensor, part: Slice) -> None:
        """own [P · tiles, J, TK, H, D] → grad [G, J, TK, Hkv, D], of these blocks."""
        groups = slice(part.first // self._repeat, part.last // self._repeat)
        summed = grad[groups]
        shares = own[: (part.last - part.first) * self._row_tiles]
        num, num_sets, num_keys, kv_heads, head_dim = summed.shape
        each = self._repeat * self._row_tiles
        torch.sum(shares.view(num, each, num_sets, num_keys, kv_heads, -1, head_dim), (1, 5), out=summed)


def slices_of_shares(blocks: int, repeat: int, programs_each: int, keys_each: int) -> list[Slice]:
    """Cuts the blocks, of which `repeat` read the same keys, into slices of about one size; see OWN_SHARES.

    A block has `programs_each` programs, which write `keys_each` values of dK."""
    groups = blocks // repeat
    most = max(1, OWN_SHARES // (keys_each * repeat), -(-LEAST_PROGRAMS // (programs_each * repeat)))
    each = -(-groups // -(-groups // most)) * repeat
    return [Slice(first, min(first + each, blocks), None) for first in range(0, blocks, each)]
