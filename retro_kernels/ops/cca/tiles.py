"""What the forward and the backward kernel share: tile loads and stores by TMA or by pointer, the shear between
distance and key columns, the dropout draw, and the block sizes.

Tiles: BM query rows · BN keys · BD head dimension padded to a power of two · W = window of distance columns that one
[BM, BN] tile touches. Query row i of the block and key c meet in column i − c + TK − 1, so inside a tile that starts
at (i0, c0) local row a and key n meet in column t = a − n + BN − 1 of a window that starts at i0 − c0 + TK − BN.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from retro_kernels.ops._backend import SMALL, family

NARROW = 128
"""Registers of a thread: four programs of four warps fill a multiprocessor."""
SLICE = 32
"""Distance columns that are sheared back at a time: a whole window would not fit into registers beside the rest."""


# A source is a TMA descriptor [batch, rows, H * D] (TMA) or a pointer with two strides; TMA clips at `num_rows`.
@triton.jit
def _load_tile(
    src,
    i_batch,
    o_row,
    o_col,
    stride_batch,
    stride_row,
    num_rows,
    m_row,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LIMIT: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Rows o_row … and columns o_col … of batch i_batch; columns from LIMIT on and masked rows are zero."""
    if TMA:
        return tl.reshape(src.load([i_batch, o_row, o_col]), (ROWS, COLS))
    else:
        o_r = tl.arange(0, ROWS)
        o_c = tl.arange(0, COLS)
        p = src + i_batch.to(tl.int64) * stride_batch + o_col
        p = p + (o_row + o_r).to(tl.int64)[:, None] * stride_row + o_c[None, :]
        if MASK_ROWS and LIMIT < COLS:
            return tl.load(p, mask=m_row[:, None] & (o_c < LIMIT)[None, :], other=0.0)
        elif MASK_ROWS:
            return tl.load(p, mask=m_row[:, None], other=0.0)
        elif LIMIT < COLS:
            return tl.load(p, mask=(o_c < LIMIT)[None, :], other=0.0)
        else:
            return tl.load(p)


@triton.jit
def _store_tile(
    dst,
    x,
    i_batch,
    o_row,
    o_col,
    stride_batch,
    stride_row,
    m_row,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LIMIT: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    TMA: tl.constexpr,
):
    if TMA:
        dst.store([i_batch, o_row, o_col], tl.reshape(x.to(dst.dtype), (1, ROWS, COLS)))
    else:
        o_r = tl.arange(0, ROWS)
        o_c = tl.arange(0, COLS)
        p = dst + i_batch.to(tl.int64) * stride_batch + o_col
        p = p + (o_row + o_r).to(tl.int64)[:, None] * stride_row + o_c[None, :]
        x = x.to(dst.dtype.element_ty)
        if MASK_ROWS and LIMIT < COLS:
            tl.store(p, x, mask=m_row[:, None] & (o_c < LIMIT)[None, :])
        elif MASK_ROWS:
            tl.store(p, x, mask=m_row[:, None])
        elif LIMIT < COLS:
            tl.store(p, x, mask=(o_c < LIMIT)[None, :])
        else:
            tl.store(p, x)


@triton.jit
def _store_zero_rows(
    dst,
    i_batch,
    i_head,
    stride_batch,
    stride_row,
    num_rows,
    D: tl.constexpr,
    BD: tl.constexpr,
    SHIFT: tl.constexpr,
    BM: tl.constexpr,
):
    """The rows before the first attending chunk, which belong to no block."""
    o_r = tl.arange(0, BM)
    o_c = tl.arange(0, BD)
    for o_row in tl.range(0, SHIFT, BM):
        rows = o_row + o_r
        p = dst + i_batch.to(tl.int64) * stride_batch + i_head * D + rows.to(tl.int64)[:, None] * stride_row
        keep = ((rows < SHIFT) & (rows < num_rows))[:, None] & (o_c < D)[None, :]
        tl.store(p + o_c[None, :], tl.zeros([BM, BD], dst.dtype.element_ty), mask=keep)


@triton.jit
def _query_tile(
    query,
    p_bias,
    i_seq,
    o_row,
    o_col,
    stride_qs,
    stride_qn,
    num_rows,
    m_row,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Rows o_row … and columns o_col … of the query, plus the same columns of bias [H * D], rounded once."""
    x = _load_tile(
        query, i_seq, o_row, o_col, stride_qs, stride_qn, num_rows, m_row, ROWS, COLS, LIMIT, True, TMA
    )  # [ROWS, COLS]
    if HAS_BIAS:
        o_c = tl.arange(0, COLS)
        bias = tl.load(p_bias + o_col + o_c, mask=o_c < LIMIT, other=0.0).to(tl.float32)  # [COLS]
        x = (x.to(tl.float32) + bias[None, :]).to(x.dtype)
    return x


# A thread holds rows 8 apart and pairs of columns 8 apart. Where indices are put together from eights, what differs
# between its values is known to the compiler, which then keeps one register for all of them instead of one for each.
@triton.jit
def _first(count, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """[SIZE], true for the first `count`."""
    if PRECISION == "tf32x3":  # whose kernels spill more so
        return tl.arange(0, SIZE) < count
    low = tl.arange(0, 8)
    high = tl.arange(0, SIZE // 8) * 8
    return tl.reshape(high[:, None] < (count - low)[None, :], (SIZE,))


@triton.jit
def _linear_index(
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ROW8: tl.constexpr,
    ROW1: tl.constexpr,
    COL8: tl.constexpr,
    COL1: tl.constexpr,
):
    """[ROWS · COLS], of row 8 i + j and column 8 k + l: i ROW8 + j ROW1 + k COL8 + l COL1."""
    low = tl.arange(0, 8)
    row = (tl.arange(0, ROWS // 16) * (2 * ROW8))[:, None, None] + (low * ROW1)[None, :, None]
    by_thread = row + (low * COL1)[None, None, :]  # [ROWS / 16, 8, 8]
    of_thread = (tl.arange(0, 2) * ROW8)[:, None] + (tl.arange(0, COLS // 8) * COL8)[None, :]  # [2, COLS / 8]
    return tl.reshape(by_thread[:, None, :, None, :] + of_thread[None, :, None, :, None], (ROWS * COLS,))


@triton.jit
def _shear(
    x,
    offset,
    SHIFT: tl.constexpr,
    BM: tl.constexpr,
    X: tl.constexpr,
    Y: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    MASK: tl.constexpr,
    FLAT: tl.constexpr,
):
    """[BM, X] → [BM, Y], out[a, y] = x[a, a − (y + offset) + SHIFT], from keys to distances as well as back.

    KEYS_FIRST: [X, BM] → [Y, BM]. MASK: what lies outside of x is 0; else nothing may. FLAT: by shared memory, in the
    layout of the products; else from thread to thread, with a pass for every 32 columns of x.
    """
    if not FLAT:
        a = tl.arange(0, BM)
        y = offset + tl.arange(0, Y)
        if KEYS_FIRST:
            at = a[None, :] - y[:, None] + SHIFT  # [Y, BM]
            inside = (at >= 0) & (at < X)
            return tl.where(inside, tl.gather(x, tl.where(inside, at, 0), 0), 0.0)
        else:
            at = a[:, None] - y[None, :] + SHIFT  # [BM, Y]
            inside = (at >= 0) & (at < X)
            return tl.where(inside, tl.gather(x, tl.where(inside, at, 0), 1), 0.0)
    # eight rows side by side, which spreads what the threads of a warp read at a time over the banks of shared memory
    if KEYS_FIRST:
        flat = tl.permute(tl.reshape(x, (X, BM // 8, 8)), (1, 0, 2))
        index = _linear_index(Y, BM, -64, -8, 8 * X + 64, 9) + (SHIFT - offset) * 8
        at = _linear_index(Y, BM, -8, -1, 8, 1) + (SHIFT - offset)
    else:
        flat = tl.permute(tl.reshape(x, (BM // 8, 8, X)), (0, 2, 1))
        index = _linear_index(BM, Y, 8 * X + 64, 9, -64, -8) + (SHIFT - offset) * 8
        at = _linear_index(BM, Y, 8, 1, -8, -1) + (SHIFT - offset)
    flat = tl.reshape(flat, (BM * X,))
    if MASK:
        inside = (at >= 0) & (at < X)
        out = tl.where(inside, tl.gather(flat, tl.where(inside, index, 0), 0), 0.0)
    else:
        out = tl.gather(flat, index, 0)
    if KEYS_FIRST:
        return tl.reshape(out, (Y, BM))
    else:
        return tl.reshape(out, (BM, Y))


@triton.jit
def _shear_part(
    x, OFFSET: tl.constexpr, SHIFT: tl.constexpr, BM: tl.constexpr, X: tl.constexpr, Y: tl.constexpr
):
    """As a flat `_shear` of keys first, [X, BM] to rows first, [BM, Y], without a mask: whatever is read in place of
    what lies outside of x is of no use."""
    flat = tl.reshape(tl.permute(tl.reshape(x, (X, BM // 8, 8)), (1, 0, 2)), (BM * X,))
    index = _linear_index(BM, Y, 8 * X + 64, 9, -64, -8) + (SHIFT - OFFSET) * 8
    index = tl.minimum(tl.maximum(index, 0), BM * X - 1)
    return tl.reshape(tl.gather(flat, index, 0), (BM, Y))


@triton.jit
def _column_sums(
    x,
    BM: tl.constexpr,
    X: tl.constexpr,
    W: tl.constexpr,
    WARPS: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """[BM, X] → [W], out[t] = Σ_a x[a, a − t + X − 1]: what keys get, by distance. KEYS_FIRST: x is [X, BM].

    A warp reads eight rows of four distances at a time, without a conflict of banks; a thread adds up its rows, and
    eight threads their sums.
    """
    SIDE: tl.constexpr = W if W < 4 * WARPS else 4 * WARPS
    if KEYS_FIRST:
        flat = tl.permute(tl.reshape(x, (X, BM // 8, 8)), (1, 0, 2))
    else:
        flat = tl.permute(tl.reshape(x, (BM // 8, 8, X)), (0, 2, 1))
    flat = tl.reshape(flat, (BM * X,))
    high = tl.arange(0, BM // 8)[:, None, None, None]
    low = tl.arange(0, 8)[None, None, None, :]
    t = (tl.arange(0, W // SIDE) * SIDE)[None, :, None, None] + tl.arange(0, SIDE)[None, None, :, None]
    at = high * 8 + low - t + (X - 1)  # [BM / 8, W / SIDE, SIDE, 8]
    at = tl.reshape(at, (BM * W,))
    index = tl.reshape(high * (8 * X + 64) + low * 9 - t * 8 + (X - 1) * 8, (BM * W,))
    inside = (at >= 0) & (at < X)
    out = tl.where(inside, tl.gather(flat, tl.where(inside, index, 0), 0), 0.0)
    out = tl.sum(tl.sum(tl.reshape(out, (BM // 8, W // SIDE, SIDE, 8)), 0), 2)  # [W / SIDE, SIDE]
    return tl.reshape(out, (W,))


@triton.jit
def _position_tile(
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
    D: tl.constexpr,
    BD: tl.constexpr,
    PANELS: tl.constexpr,
    TQ: tl.constexpr,
    TK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WS: tl.constexpr,
    HAS_REL: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    FLAT: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """What positions add to the logits of query rows o_i … and keys o_c …, in base 2; the same for every neighbour.

    The query is loaded again rather than kept, since its biased copy would take registers through the hot loop. PARTS:
    with rows first and FLAT, the window is made in parts, of products with keys first, whose query takes no registers.
    """
    COLUMNS: tl.constexpr = TQ + TK - 1
    W: tl.constexpr = 2 * (BM if BM > BN else BN)  # no call of max, which makes no constant in Triton 3.5
    DW: tl.constexpr = BD // PANELS
    if HAS_REL:
        q_col = i_head * D
        b_q0 = _query_tile(
            query,
            p_position_bias,
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
            HAS_POSITION,
            TMA,
        )  # [BM, DW]
        if PANELS == 2:
            b_q1 = _query_tile(
                query,
                p_position_bias,
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
                HAS_POSITION,
                TMA,
            )  # [BM, DW]
        WHOLE: tl.constexpr = WS >= BM + BN - 1
        if KEYS_FIRST:
            tile = tl.zeros([BN, BM], tl.float32)
        else:
            tile = tl.zeros([BM, BN], tl.float32)
        for o_t in tl.static_range(0, BM + BN - 1, WS):
            first = o_i - o_c + TK - BN + o_t
            column = first + tl.arange(0, WS)
            m_column = (column >= 0) & (column < COLUMNS)
            b_rel = _load_tile(
                rel_key, i_head, first, 0, COLUMNS * D, D, COLUMNS, m_column, WS, DW, D, True, TMA
            )  # [WS, DW]
            if KEYS_FIRST or PARTS:
                by_distance = tl.dot(b_rel, tl.trans(b_q0), input_precision=PRECISION)  # [WS, BM]
            else:
                by_distance = tl.dot(b_q0, tl.trans(b_rel), input_precision=PRECISION)  # [BM, WS]
            if PANELS == 2:
                b_rel = _load_tile(
                    rel_key, i_head, first, DW, COLUMNS * D, D, COLUMNS, m_column, WS, DW, D - DW, True, TMA
                )  # [WS, DW]
                if KEYS_FIRST:
                    by_distance = tl.dot(b_rel, tl.trans(b_q1), by_distance, input_precision=PRECISION)
                else:
                    by_distance = tl.dot(b_q1, tl.trans(b_rel), by_distance, input_precision=PRECISION)
            if PARTS:
                part = _shear_part(by_distance, o_t, BN - 1, BM, WS, BN)
                if o_t > 0:
                    at = _linear_index(BM, BN, 8, 1, -8, -1) + (BN - 1 - o_t)
                    part = tl.where(tl.reshape(at >= 0, (BM, BN)), part, tile)
                tile = part
            elif WHOLE:
                tile = _shear(by_distance, 0, BN - 1, BM, WS, BN, KEYS_FIRST, False, FLAT)
            else:
                tile += _shear(by_distance, o_t, BN - 1, BM, WS, BN, KEYS_FIRST, True, FLAT)
        tile *= scale_log2
    if HAS_BIAS:
        b_bias = _bias_window(p_rel_bias, i_head, o_i - o_c + TK - BN, COLUMNS, W)
        b_bias = _bias_tile(b_bias, 0, BM, BN, KEYS_FIRST)
        if HAS_REL:
            tile += b_bias
        else:
            tile = b_bias
    return tile


@triton.jit
def _bias_window(p_rel_bias, i_head, first, COLUMNS, W: tl.constexpr):
    """Of the distance columns from `first` on, in units of log 2: [W]."""
    column = first + tl.arange(0, W)
    m_column = (column >= 0) & (column < COLUMNS)
    b_bias = tl.load(p_rel_bias + i_head * COLUMNS + column, mask=m_column, other=0.0).to(tl.float32)
    return b_bias * 1.4426950408889634


@triton.jit
def _bias_tile(b_bias, nought, BM: tl.constexpr, BN: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """[W] → [BM, BN], of a − c + BN − 1. KEYS_FIRST: [BN, BM]. `nought`: 0, as an expression that says until when the
    tile may be kept in registers."""
    if KEYS_FIRST:
        index = _linear_index(BN, BM, -8, -1, 8, 1) + (BN - 1 + nought)
        return tl.reshape(tl.gather(b_bias, index, 0), (BN, BM))
    else:
        index = _linear_index(BM, BN, 8, 1, -8, -1) + (BN - 1 + nought)
        return tl.reshape(tl.gather(b_bias, index, 0), (BM, BN))


@triton.jit
def _row_tile(x, nought, BM: tl.constexpr, BN: tl.constexpr):
    """[BM] → [BN, BM], as in `_bias_tile`."""
    return tl.reshape(tl.gather(x, _linear_index(BN, BM, 0, 0, 8, 1) + nought, 0), (BN, BM))


@triton.jit
def _dropout_keep(p_seed, i_block, i_head, o_row, o_key, threshold, KEYS_FIRST: tl.constexpr):
    """Philox with key `seed` and counter (key, row, head, block): the same draw whatever the tiles are."""
    if KEYS_FIRST:
        key = o_key[:, None] + o_row[None, :] * 0
        row = o_key[:, None] * 0 + o_row[None, :]
    else:
        key = o_row[:, None] * 0 + o_key[None, :]
        row = o_row[:, None] + o_key[None, :] * 0
    draw, _, _, _ = tl.philox(tl.load(p_seed), key, row, key * 0 + i_head, key * 0 + i_block)
    return draw >= tl.cast(threshold, tl.uint32)


class Config(NamedTuple):
    """Block sizes of one launch."""

    keys: int
    """BN"""
    warps: int
    stages: int
    panels: int = 1
    """Backward: the head dimension is worked on in so many panels, which halves the live parts of dK and dV."""
    keys_first: bool = False
    """Backward: logits as [BN, BM], so that 8 warps split the keys; with rows first, 4 warps split 64 rows."""
    narrow: bool = False
    """Forward: at most 128 registers a thread, and of distances half a window at a time, which leaves enough of them
    for products that overlap."""


def forward_config(arch: int, padded_dim: int, dtype: torch.dtype, rows: int, tables: str) -> Config:
    """By what compiles for every `architecture` with fewest spills; `tables`: "relative" with relative keys.

    Chosen from machine code: `bench/results/static.json` has registers and spills of each kernel and, under `known`,
    which of them miss a guard.
    """
    # four warps repeat few of each other's products; with 256 dimensions they would spill
    if dtype == torch.float32:
        return Config(16, 8, 1) if padded_dim > 128 else Config(32, 4, 1)
    if padded_dim > 128:
        return Config(32, 8, 1) if arch < 90 else Config(64, 8, 1 if tables == "relative" else 2)
    # tensor memory holds the products on sm_100: there 8 warps repeat none of them. Below sm_90 a query of 128
    # dimensions and its positions take the registers of 8, and two programs with it more than the 99 KB of sm_89
    wide = arch < 90 and padded_dim > 64
    crowded = (tables == "relative" and (wide or arch >= 100)) or (wide and arch == SMALL)
    return Config(64, 8 if rows >= 128 or crowded else 4, 2)


def backward_config(arch: int, padded_dim: int, dtype: torch.dtype, rows: int, tables: str) -> Config:
    """Like `forward_config`; `tables`: "plain" where no dS is summed, "sums" for the gradient of a bias, "relative".

    For sm_90 chosen from times, of RETRO's chunks on an H100 (`bench/results/gpu_block_sizes.json`): programs of four
    warps, of which a multiprocessor holds two or three, hide each other's waiting. With 8 warps and two panels Triton
    3.7 turns some into a trap on sm_100, without an error: at 128 dimensions with keys first, at 256 with rows first.
    """
    warps = 8 if rows >= 128 else 4
    if dtype == torch.float32:
        wide = padded_dim > (64 if rows >= 32 else 128)
        return Config(16 if padded_dim > 128 else 32, 8, 1, panels=2 if wide else 1)
    if padded_dim > 128:
        return Config(16, 8, 1, panels=2, keys_first=True)
    if rows == 64 and hopper(arch):
        if padded_dim <= 64:
            return Config(64, 4, 3)
        return Config(64, 4, 2, panels=2, keys_first=tables == "sums")
    if rows == 64 and padded_dim > 64 and arch < 90:
        return Config(32, 8, 1, keys_first=True)
    if rows == 64 and (tables != "plain" or arch < 90):
        several = padded_dim <= 64 and tables == "plain" and arch != SMALL
        return Config(64, 4 if several else 8, 1, keys_first=True)
    if rows >= 128 and arch < 90:
        # without tensor memory or products from shared memory, 64 keys of 128 rows spill hundreds of values
        return Config(32, 8, 1, panels=2 if padded_dim >= 64 else 1)
    if padded_dim <= 64:
        return Config(64, warps, 2 if arch >= 90 else 1)
    return Config(64, warps, 1, panels=2)


class Geometry(NamedTuple):
    """Sizes of one direction of a call."""

    num_seqs: int
    num_rows: int
    num_heads: int
    head_dim: int
    blocks: int
    per_seq: int
    row_tiles: int
    rows: int
    """BM"""
    padded_dim: int
    """BD"""


def most_rows(arch: int, padded_dim: int, dtype: torch.dtype, backward: bool) -> int:
    """Of a program, which keeps their query: as many as spill nothing.

    In fp32 at most 32, too few for the warpgroup products of sm_90: ptxas 12.8 (of Triton 3.5 to 3.7) makes some of
    those read past the shared memory, where a tile takes dozens of them. Backward, each further program for the same
    keys writes gradients of its own, so 32 rows of 128 dimensions are taken where the shared memory holds them.
    """
    if arch == 0:
        return 128
    if dtype == torch.float32:
        return 32 if padded_dim <= (128 if backward and arch != SMALL else 64) else 16
    if padded_dim > 128:
        return 32 if backward and arch < 90 else 64
    if padded_dim > 64 and arch < 90:
        return 64
    return 64 if backward and arch >= 100 else 128  # of 128, Triton 3.7 makes traps


def geometry(query: Tensor, key: Tensor, block: int, repeat: int, backward: bool) -> Geometry:
    num_seqs, num_rows, num_heads, head_dim = query.shape
    blocks = key.shape[0] * repeat
    padded = max(16, triton.next_power_of_2(head_dim))
    most = most_rows(architecture(query.device), padded, query.dtype, backward)
    rows = min(max(16, triton.next_power_of_2(block)), most)
    return Geometry(
        num_seqs, num_rows, num_heads, head_dim, blocks, blocks // num_seqs, -(-block // rows), rows, padded
    )


def reload(
    arch: int, dtype: torch.dtype, content_bias: Tensor | None, num_sets: int, num_keys: int, keys: int
) -> int:
    """Whether the biased query is loaded anew at the end of each tile of keys: 1, or 2 where there is but one tile, in
    a loop whose bound the compiler does not know.

    So it is an argument of the loop, which Triton keeps in shared memory. As an operand in registers that stays the
    same through a loop ptxas 12.8 (of Triton 3.5 to 3.7) may give its registers to the weights as well, without an
    error, on sm_90. `bench/static.py` looks for that.
    """
    several = num_keys > keys
    needed = content_bias is not None and dtype != torch.float32 and (several or num_sets > 1)
    if not needed or not (hopper(arch) or arch == 0):
        return 0
    return 1 if several else 2


def flat_shear(arch: int, dtype: torch.dtype, rows: int, wide: bool) -> bool:
    """Whether `_shear` goes by shared memory: not where the machine code has more spills then, which is with fp32, on
    sm_80 with 128 rows, and backward with `wide` heads, of more than 128 dimensions."""
    return dtype != torch.float32 and (rows < 128 or not 0 < arch < 90) and not wide


def window_slice(rows: int, keys: int, warps: int, flat: bool) -> int:
    """Distance columns whose products with the query are made and sheared at a time: where `flat`, as many of a tile's
    window as 64 registers of a thread hold."""
    return min(2 * max(rows, keys), 2048 * warps // rows) if flat else SLICE


def precision(dtype: torch.dtype) -> str:
    """Products of fp32 operands: three tf32 products keep fp32's accuracy; plain fp32 has no tensor cores."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def hopper(arch: int) -> bool:
    """Whether products are those of warpgroups: sm_90."""
    return 90 <= arch < 100


@functools.lru_cache
def architecture(device: torch.device) -> int:
    """By what the block sizes are chosen, see `family`; 0 in the interpreter, which takes every path."""
    return family(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else 0


def can_use_tma(
    arch: int, head_dim: int, padded_dim: int, dtype: torch.dtype, tensors: tuple[Tensor, ...]
) -> bool:
    """TMA needs sm_90, 16-byte aligned bases and strides; a padded head would run into its neighbour's columns. A
    stride of 0, as of an expanded tensor, is none that CUDA's documentation allows. Tiles of fp32 that came by TMA
    are taken into registers early, where hundreds of values spill."""
    if 0 < arch < 90 or (arch and dtype == torch.float32) or head_dim != padded_dim:
        return False
    return all(
        x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in x.stride()[:2])
        for x in tensors
    )
