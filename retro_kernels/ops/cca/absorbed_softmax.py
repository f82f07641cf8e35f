r"""Bias, mask, softmax and dropout of absorbed attention in one pass over the logits, forward and backward.

    W[r, j, c] = softmax over (j, c) of  S[r, j, c] + T[r, M − 1 − a + c] + bias[h, M − 1 − a + c],   r = a·H + h

S are the scaled content logits, T the scaled relative logits of the row (computed once and shared by all K
neighbours), both from matrix products. The position tables come with their columns *reversed* (column 0 is the
largest distance), so that a row's R values are contiguous and ascend with the key. The weights overwrite the logits,
and in backward the logits' gradient overwrites the weights' gradient:

    dS = W ∘ (dW − δ),   δ[r] = Σ W[r] dW[r],   dT[r, M − 1 − a + c] = Σ_j dS[r, j, c]

δ equals dout[r]·out[r], but is summed from the very dW that it is subtracted from: where one weight is nearly 1, the
two nearly cancel, and their rounding errors have to cancel too.

Shapes: P blocks (attending chunks) · M rows of a block · H heads · K neighbours · R tokens each · GP columns of T,
at least M + R − 1. Rows are [M, H], so the products around these kernels need no transposed copy.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from retro_kernels.ops.cca.reference import dropout_threshold
from retro_kernels.ops.cca.tiles import _dropout_keep


@triton.jit(do_not_specialize=["first"])
def _cca_absorbed_softmax_kernel(
    p_logits,  # [P, M * H, K * R], overwritten by the weights
    p_rel,  # [P, M * H, GP]
    p_bias,  # float32 [H, M + R - 1]
    p_lengths,  # int32 [P, K]
    p_dropped,  # [P, M * H, K * R], the weights after dropout
    p_seed,  # int64 [1]
    first,
    K,
    H,
    GP,
    keep_scale,
    M: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    BR: tl.constexpr,
    HAS_REL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    DROPOUT: tl.constexpr,
    THRESHOLD: tl.constexpr,
):
    """`first`: the block that p_logits starts with (dropout draws by the block's number)."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    tiles = tl.cdiv(M * H, ROWS)
    i_p = tl.program_id(0) // tiles
    i_p64 = i_p.to(tl.int64)
    o_row = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    o_c = tl.arange(0, BR)
    m_row = o_row < M * H
    m_tile = m_row[:, None] & (o_c < R)[None, :]  # [ROWS, BR]
    o_a = o_row // H
    o_h = o_row % H
    row64 = i_p64 * (M * H) + o_row
    p_tile = p_logits + row64[:, None] * (K * R) + o_c[None, :]

    b_add = tl.zeros([ROWS, BR], tl.float32)  # the same for every neighbour
    if HAS_REL:
        b_add += tl.load(
            p_rel + row64[:, None] * GP + (M - 1 - o_a[:, None] + o_c[None, :]), mask=m_tile, other=0.0
        )
    if HAS_BIAS:
        b_add += tl.load(
            p_bias + o_h[:, None] * (M + R - 1) + (M - 1 - o_a[:, None] + o_c[None, :]),
            mask=m_tile,
            other=0.0,
        )
    b_add = b_add * LOG2_E

    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    for j in tl.range(0, K):
        b_s = (
            tl.load(p_tile + j * R, mask=m_tile, other=float("-inf")).to(tl.float32) * LOG2_E + b_add
        )  # [ROWS, BR]
        if HAS_LENGTHS:  # not as the mask of the load, which would make it a scalar one
            b_s = tl.where((o_c < tl.load(p_lengths + i_p64 * K + j))[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp2(b_max - b_base) + tl.sum(tl.exp2(b_s - b_base[:, None]), 1)
        b_max = b_new
    b_base = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_inverse = tl.where(
        b_sum == 0.0, 0.0, 1.0 / tl.where(b_sum == 0.0, 1.0, b_sum)
    )  # no key at all: weights 0

    for j in tl.range(0, K):
        b_s = tl.load(p_tile + j * R, mask=m_tile, other=float("-inf")).to(tl.float32) * LOG2_E + b_add
        if HAS_LENGTHS:
            b_s = tl.where((o_c < tl.load(p_lengths + i_p64 * K + j))[None, :], b_s, float("-inf"))
        b_w = tl.exp2(b_s - b_base[:, None]) * b_inverse[:, None]
        tl.store(p_tile + j * R, b_w.to(p_logits.dtype.element_ty), mask=m_tile)
        if DROPOUT:
            keep = _dropout_keep(p_seed, i_p + first, o_h[:, None], o_a, j * R + o_c, THRESHOLD, False)
            b_w = tl.where(keep, b_w * keep_scale, 0.0)
            p_out = p_dropped + row64[:, None] * (K * R) + o_c[None, :] + j * R
            tl.store(p_out, b_w.to(p_dropped.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=["first"])
def _cca_absorbed_softmax_bwd_kernel(
    p_weights,  # [P, M * H, K * R], before dropout
    p_grad,  # [P, M * H, K * R], gradient of the weights, overwritten by that of the logits
    p_grad_rel,  # [P, M * H, GP]
    p_dropped,  # [P, M * H, K * R], the weights after dropout, written again
    p_seed,  # int64 [1]
    first,
    K,
    H,
    GP,
    keep_scale,
    M: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    BR: tl.constexpr,
    BG: tl.constexpr,
    GRAD_REL: tl.constexpr,
    DROPOUT: tl.constexpr,
    THRESHOLD: tl.constexpr,
):
    """`first`: the block that p_weights, p_grad and p_grad_rel start with."""
    tiles = tl.cdiv(M * H, ROWS)
    i_p = tl.program_id(0) // tiles
    i_p64 = i_p.to(tl.int64)
    o_row = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    o_c = tl.arange(0, BR)
    m_row = o_row < M * H
    m_tile = m_row[:, None] & (o_c < R)[None, :]  # [ROWS, BR]
    o_a = o_row // H
    o_h = o_row % H
    row64 = i_p64 * (M * H) + o_row
    o_tile = row64[:, None] * (K * R) + o_c[None, :]

    b_delta = tl.zeros([ROWS], tl.float32)
    for j in tl.range(0, K):
        b_w = tl.load(p_weights + o_tile + j * R, mask=m_tile, other=0.0).to(tl.float32)  # [ROWS, BR]
        b_g = tl.load(p_grad + o_tile + j * R, mask=m_tile, other=0.0).to(tl.float32)
        if DROPOUT:
            keep = _dropout_keep(p_seed, i_p + first, o_h[:, None], o_a, j * R + o_c, THRESHOLD, False)
            b_g = tl.where(keep, b_g * keep_scale, 0.0)
        b_delta += tl.sum(b_w * b_g, 1)

    b_grad_rel = tl.zeros([ROWS, BR], tl.float32)
    for j in tl.range(0, K):
        b_w = tl.load(p_weights + o_tile + j * R, mask=m_tile, other=0.0).to(tl.float32)  # [ROWS, BR]
        b_g = tl.load(p_grad + o_tile + j * R, mask=m_tile, other=0.0).to(tl.float32)
        if DROPOUT:
            keep = _dropout_keep(p_seed, i_p + first, o_h[:, None], o_a, j * R + o_c, THRESHOLD, False)
            b_dropped = tl.where(keep, b_w * keep_scale, 0.0)
            tl.store(p_dropped + o_tile + j * R, b_dropped.to(p_dropped.dtype.element_ty), mask=m_tile)
            b_g = tl.where(keep, b_g * keep_scale, 0.0)
        b_ds = b_w * (b_g - b_delta[:, None])
        tl.store(p_grad + o_tile + j * R, b_ds.to(p_grad.dtype.element_ty), mask=m_tile)
        if GRAD_REL:
            b_grad_rel += b_ds
    if GRAD_REL:
        p_row = p_grad_rel + row64[:, None] * GP
        o_first = (M - 1 - o_a)[:, None]
        tl.store(p_row + o_first + o_c[None, :], b_grad_rel.to(p_grad_rel.dtype.element_ty), mask=m_tile)
        o_g = tl.arange(0, BG)[None, :]
        outside = (o_g < o_first) | (o_g >= o_first + R)  # columns that this row does not read
        zero = tl.zeros([ROWS, BG], p_grad_rel.dtype.element_ty)
        tl.store(p_row + o_g, zero, mask=m_row[:, None] & outside & (o_g < GP))


_MOST_ZEROED = 2**15
"""Rows of a program times columns of T, of which those that a row does not read are set to 0: with very short
neighbours a program has many rows, and Triton would compile for minutes, or refuse a tile so large."""


def tile(rows: int, neighbour_len: int) -> dict[str, Any]:
    """Rows of a program and its warps: 4,096 logits for 128 threads, so that nothing spills and rows stay in the L1
    between the two passes."""
    columns = triton.next_power_of_2(neighbour_len)
    return {
        "ROWS": min(max(4096 // columns, 1), triton.next_power_of_2(rows)),
        "BR": columns,
        "num_warps": 4 if columns <= 4096 else 8,
    }


def softmax_triton(
    logits: Tensor,  # [P, M * H, K * R], overwritten by the weights
    rel: Tensor | None,  # [P, M * H, GP]
    bias: Tensor | None,  # float32 [H, M + R - 1]
    lengths: Tensor | None,  # int32 [P, K]
    seed: Tensor | None,
    *,
    first: int,
    block: int,
    heads: int,
    neighbour_len: int,
    dropout_p: float,
) -> Tensor:
    """Returns the weights after dropout: `logits` itself where there is none. `first`: the first block's number."""
    blocks, rows, keys = logits.shape
    dropped = logits if dropout_p == 0.0 else torch.empty_like(logits)
    if blocks > 0:
        sizes = tile(rows, neighbour_len)
        _cca_absorbed_softmax_kernel[(blocks * triton.cdiv(rows, sizes["ROWS"]),)](
            logits,
            logits if rel is None else rel,
            logits if bias is None else bias,
            logits if lengths is None else lengths,
            dropped,
            logits if seed is None else seed,
            first,
            keys // neighbour_len,
            heads,
            0 if rel is None else rel.shape[-1],
            1.0 / (1.0 - dropout_p),
            M=block,
            R=neighbour_len,
            HAS_REL=rel is not None,
            HAS_BIAS=bias is not None,
            HAS_LENGTHS=lengths is not None,
            DROPOUT=dropout_p > 0.0,
            THRESHOLD=dropout_threshold(dropout_p),
            **sizes,
        )
    return dropped


def softmax_backward_triton(
    weights: Tensor,  # [P, M * H, K * R], before dropout
    grad: Tensor,  # [P, M * H, K * R], gradient of the weights, overwritten by that of the logits
    grad_rel: Tensor | None,  # [P, M * H, GP], written
    seed: Tensor | None,
    *,
    first: int,
    block: int,
    heads: int,
    neighbour_len: int,
    dropout_p: float,
) -> Tensor:
    """Returns the weights after dropout again: `weights` itself where there is none."""
    blocks, rows, keys = weights.shape
    dropped = weights if dropout_p == 0.0 else torch.empty_like(weights)
    if blocks > 0:
        sizes = tile(rows, neighbour_len)
        columns = 1 if grad_rel is None else grad_rel.shape[-1]
        zeroed = triton.next_power_of_2(columns)
        sizes["ROWS"] = min(sizes["ROWS"], max(_MOST_ZEROED // zeroed, 1))
        _cca_absorbed_softmax_bwd_kernel[(blocks * triton.cdiv(rows, sizes["ROWS"]),)](
            weights,
            grad,
            grad if grad_rel is None else grad_rel,
            dropped,
            weights if seed is None else seed,
            first,
            keys // neighbour_len,
            heads,
            columns,
            1.0 / (1.0 - dropout_p),
            M=block,
            R=neighbour_len,
            BG=zeroed,
            GRAD_REL=grad_rel is not None,
            DROPOUT=dropout_p > 0.0,
            THRESHOLD=dropout_threshold(dropout_p),
            **sizes,
        )
    return dropped
