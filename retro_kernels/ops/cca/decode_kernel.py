r"""Chunked cross-attention of a few query rows per sequence, for decoding: one kernel over cached keys and values, one
over the encoder states themselves, which are read once for all heads.

    logit[t, h, j, c] = (q + u)[t, h]·k[j, c] · scale + T[h, t, a − c + R − 1] · scale + rel_bias[h, a − c + R − 1]

with a = rows[b, t], the row of the token in its attending chunk (−1: there is none, the result is zero), and
T = (q + v)·rel_key from one small matrix product for the whole batch. Over the states, (q + u) is the query of width E
(`absorbed.py`) and k = v = state.

The bytes of the cache are the floor, so tiles of 16 query rows are multiplied on tensor cores even where one row is
real. K·R is split over programs where the batch alone does not fill the GPU; the parts are merged in fixed order.
The states' width is held in up to three panels of powers of two, as 896 = 512 + 256 + 128.

A call is a chain of launches that wait for one another, each of which costs some microseconds besides its bytes: what
the query is multiplied with (W_K and the position table, in one launch), the attention, and over states the product
with W_V, which merges a few parts as it reads them; many are merged before. From sm_90 on, a launch of the chain begins
where there is room while the one before it still runs (programmatic dependent launch): it asks for what that one does
not write, and then waits for it to end.

Shapes: B batch · T new tokens · H heads · Hkv key heads · K neighbours · R tokens each · W panel widths.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from retro_kernels.ops._backend import SMALL
from retro_kernels.ops.cca import decode_native, launch
from retro_kernels.ops.cca import tiles as attention_tiles
from retro_kernels.ops.cca.tiles import precision
from retro_kernels.ops.cca.tuning import lacks, until_it_fits


@triton.jit
def _biased_rows(p_q, p_bias, i_head, o_n, m_n, H, D: tl.constexpr, BD: tl.constexpr, HAS_BIAS: tl.constexpr):
    """(q + bias)[n, h] of one head: [BQ, BD]."""
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    p = p_q + (o_n.to(tl.int64) * H + i_head)[:, None] * D + o_d[None, :]
    b_q = tl.load(p, mask=m_n[:, None] & m_d[None, :], other=0.0)
    if HAS_BIAS:
        b_q = (b_q + tl.load(p_bias + i_head * D + o_d, mask=m_d, other=0.0)[None, :]).to(b_q.dtype)
    return b_q


@triton.jit
def _cca_decode_product_kernel(
    p_q,  # [N, H, D]
    p_content_bias,  # [H, D]
    p_weight,  # [Hkv * D, E]
    p_absorbed,  # [N, H, E]
    p_position_bias,  # [H, D]
    p_rel_key,  # [H, G, D]
    p_rel,  # [H, N, G_REL]
    N,
    H,
    GROUP,
    E,
    G,
    G_REL,
    D: tl.constexpr,
    BD: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    HAS_STATES: tl.constexpr,
    HAS_REL: tl.constexpr,
    HAS_U: tl.constexpr,
    HAS_V: tl.constexpr,
    PRECISION: tl.constexpr,
    LETS_NEXT: tl.constexpr,
):
    """Of BQ rows and one head: BN columns of (q + u)·W_K, or after those BN columns of (q + v)·rel_key."""
    if LETS_NEXT:
        tl.extra.cuda.gdc_launch_dependents()
    i_tile = tl.program_id(0)
    i_head = tl.program_id(1)
    o_n = tl.program_id(2) * BQ + tl.arange(0, BQ)
    m_n = o_n < N
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    tiles_e = tl.cdiv(E, BN) if HAS_STATES else 0
    if HAS_STATES:
        if i_tile < tiles_e:
            o_e = i_tile * BN + tl.arange(0, BN)
            m_e = o_e < E
            b_q = _biased_rows(p_q, p_content_bias, i_head, o_n, m_n, H, D, BD, HAS_U)  # [BQ, BD]
            p = p_weight + ((i_head // GROUP).to(tl.int64) * D + o_d)[:, None] * E + o_e[None, :]
            b_w = tl.load(p, mask=m_d[:, None] & m_e[None, :], other=0.0)  # [BD, BN]
            b_out = tl.dot(b_q, b_w, input_precision=PRECISION)  # [BQ, BN]
            p = p_absorbed + (o_n.to(tl.int64) * H + i_head)[:, None] * E + o_e[None, :]
            tl.store(p, b_out.to(p_absorbed.dtype.element_ty), mask=m_n[:, None] & m_e[None, :])
    if HAS_REL:
        if i_tile >= tiles_e:
            o_g = (i_tile - tiles_e) * BN + tl.arange(0, BN)
            m_g = o_g < G
            b_q = _biased_rows(p_q, p_position_bias, i_head, o_n, m_n, H, D, BD, HAS_V)  # [BQ, BD]
            p = p_rel_key + (i_head.to(tl.int64) * G + o_g)[:, None] * D + o_d[None, :]
            b_w = tl.load(p, mask=m_g[:, None] & m_d[None, :], other=0.0)  # [BN, BD]
            b_out = tl.dot(b_q, tl.trans(b_w), input_precision=PRECISION)  # [BQ, BN]
            p = p_rel + (i_head.to(tl.int64) * N + o_n)[:, None] * G_REL + o_g[None, :]
            tl.store(p, b_out.to(p_rel.dtype.element_ty), mask=m_n[:, None] & m_g[None, :])


@triton.jit
def _position_logits(
    p_rel,
    p_rel_bias,
    o_bt,
    o_h,
    o_a,
    o_c,
    m_tile,
    BT,
    G,
    G_REL,
    scale_log2,
    R: tl.constexpr,
    HAS_REL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """In units of log 2: [BQ, BN]."""
    o_g = o_a[:, None] - o_c[None, :] + (R - 1)
    mask = m_tile & (o_g >= 0) & (o_g < G)
    b_add = tl.zeros(o_g.shape, tl.float32)
    if HAS_REL:
        p_row = p_rel + (o_h.to(tl.int64) * BT + o_bt)[:, None] * G_REL
        b_add += tl.load(p_row + o_g, mask=mask, other=0.0).to(tl.float32) * scale_log2
    if HAS_BIAS:
        LOG2_E: tl.constexpr = 1.4426950408889634
        b_add += tl.load(p_rel_bias + o_h[:, None] * G + o_g, mask=mask, other=0.0).to(tl.float32) * LOG2_E
    return b_add


@triton.jit
def _online_softmax(b_s, b_max, b_sum):
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = tl.exp2(b_s - b_base[:, None])
    b_alpha = tl.exp2(b_max - b_base)
    return b_p, b_alpha, b_new, b_sum * b_alpha + tl.sum(b_p, 1)


@triton.jit
def _finish(b_acc, b_max, b_sum, p_out, p_lse, o_flat, o_w, m_row, m_w, i_split, W, SPLITS: tl.constexpr):
    """Normalises a part; writes the result [.., W], or for the merge [.., SPLITS, W]."""
    b_acc = b_acc * tl.where(b_sum == 0.0, 0.0, 1.0 / tl.where(b_sum == 0.0, 1.0, b_sum))[:, None]
    mask = m_row[:, None] & m_w[None, :]
    o_part = o_flat * SPLITS + i_split
    tl.store(p_out + o_part[:, None] * W + o_w[None, :], b_acc.to(p_out.dtype.element_ty), mask=mask)
    if SPLITS > 1:
        b_lse = tl.where(b_sum == 0.0, float("-inf"), b_max + tl.log2(tl.where(b_sum == 0.0, 1.0, b_sum)))
        tl.store(p_lse + o_part, b_lse, mask=m_row)


@triton.jit
def _cca_decode_kernel(
    p_q,  # [B, T, H, D]
    p_k,
    p_v,  # [B, K, R, Hkv, D]
    p_rows,  # integers [B, T]
    p_rel,  # [H, B * T, G_REL], of which G are real
    p_content_bias,  # [H, D]
    p_rel_bias,  # [H, G]
    p_lengths,  # integers [B, K]
    p_out,  # [B, T, H, (SPLITS,) D]
    p_lse,  # float32 [B, T, H, SPLITS]
    scale_log2,
    B,
    T,
    H,
    HKV,
    K,
    G,
    G_REL,
    R: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_REL: tl.constexpr,
    HAS_U: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    WAITS: tl.constexpr,
    LETS_NEXT: tl.constexpr,
):
    group = H // HKV
    tiles = tl.cdiv(T * group, BQ)
    pid = tl.program_id(0)
    i_split = pid % SPLITS
    i_tile = (pid // SPLITS) % tiles
    i_kv = (pid // (SPLITS * tiles)) % HKV
    i_b = pid // (SPLITS * tiles * HKV)
    i_b64 = i_b.to(tl.int64)

    o_r = i_tile * BQ + tl.arange(0, BQ)
    m_row = o_r < T * group
    o_bt = i_b * T + o_r // group
    o_h = i_kv * group + o_r % group
    o_a = tl.where(m_row, tl.load(p_rows + o_bt, mask=m_row, other=0).to(tl.int32), -1)
    o_flat = o_bt.to(tl.int64) * H + o_h
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_q = tl.load(
        p_q + o_flat[:, None] * D + o_d[None, :], mask=m_row[:, None] & m_d[None, :], other=0.0
    )  # [BQ, BD]
    if HAS_U:
        m_u = m_row[:, None] & m_d[None, :]
        b_q = (b_q + tl.load(p_content_bias + o_h[:, None] * D + o_d[None, :], mask=m_u, other=0.0)).to(
            b_q.dtype
        )
    if WAITS:
        tl.extra.cuda.gdc_wait()

    TILES_R: tl.constexpr = (R + BN - 1) // BN
    per_split = tl.cdiv(K * TILES_R, SPLITS)
    b_max = tl.full([BQ], float("-inf"), tl.float32)
    b_sum = tl.zeros([BQ], tl.float32)
    b_acc = tl.zeros([BQ, BD], tl.float32)
    for i in tl.range(i_split * per_split, min((i_split + 1) * per_split, K * TILES_R), num_stages=STAGES):
        j = i // TILES_R
        o_c = (i % TILES_R) * BN + tl.arange(0, BN)
        m_c = o_c < R
        if HAS_LENGTHS:
            m_c = m_c & (o_c < tl.load(p_lengths + i_b * K + j))
        o_kv = (((i_b64 * K + j) * R + o_c)[:, None] * HKV + i_kv) * D + o_d[None, :]
        m_kv = m_c[:, None] & m_d[None, :]
        b_k = tl.load(p_k + o_kv, mask=m_kv, other=0.0)  # [BN, BD]
        b_v = tl.load(p_v + o_kv, mask=m_kv, other=0.0)  # [BN, BD]
        m_tile = (o_a >= 0)[:, None] & m_c[None, :]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2  # [BQ, BN]
        b_s += _position_logits(
            p_rel, p_rel_bias, o_bt, o_h, o_a, o_c, m_tile, B * T, G, G_REL, scale_log2, R, HAS_REL, HAS_BIAS
        )
        b_s = tl.where(m_tile, b_s, float("-inf"))
        b_p, b_alpha, b_max, b_sum = _online_softmax(b_s, b_max, b_sum)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision=PRECISION)
    if LETS_NEXT:
        tl.extra.cuda.gdc_launch_dependents()
    _finish(b_acc, b_max, b_sum, p_out, p_lse, o_flat, o_d, m_row, m_d, i_split, D, SPLITS)


@triton.jit
def _cca_absorbed_decode_kernel(
    p_q,  # [B, T, H, E]
    p_states,  # [B, K, R, E]
    p_rows,  # integers [B, T]
    p_rel,  # [H, B * T, G_REL], of which G are real
    p_rel_bias,  # [H, G]
    p_lengths,  # integers [B, K]
    p_out,  # [B, T, H, (SPLITS,) E]
    p_lse,  # float32 [B, T, H, SPLITS]
    scale_log2,
    B,
    T,
    H,
    K,
    G,
    G_REL,
    R: tl.constexpr,
    E: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_REL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    WAITS: tl.constexpr,
    LETS_NEXT: tl.constexpr,
):
    if WAITS:
        tl.extra.cuda.gdc_wait()
    tiles = tl.cdiv(T * H, BQ)
    pid = tl.program_id(0)
    i_split = pid % SPLITS
    i_tile = (pid // SPLITS) % tiles
    i_b = pid // (SPLITS * tiles)
    i_b64 = i_b.to(tl.int64)

    o_r = i_tile * BQ + tl.arange(0, BQ)
    m_row = o_r < T * H
    o_bt = i_b * T + o_r // H
    o_h = o_r % H
    o_a = tl.where(m_row, tl.load(p_rows + o_bt, mask=m_row, other=0).to(tl.int32), -1)
    o_flat = i_b64 * T * H + o_r
    p_qr = p_q + o_flat[:, None] * E
    o_w0 = tl.arange(0, W0)
    m_w0 = o_w0 < E
    b_q0 = tl.load(p_qr + o_w0[None, :], mask=m_row[:, None] & m_w0[None, :], other=0.0)  # [BQ, W0]
    b_acc0 = tl.zeros([BQ, W0], tl.float32)
    if W1 > 0:
        o_w1 = W0 + tl.arange(0, W1)
        m_w1 = o_w1 < E
        b_q1 = tl.load(p_qr + o_w1[None, :], mask=m_row[:, None] & m_w1[None, :], other=0.0)  # [BQ, W1]
        b_acc1 = tl.zeros([BQ, W1], tl.float32)
    if W2 > 0:
        o_w2 = W0 + W1 + tl.arange(0, W2)
        m_w2 = o_w2 < E
        b_q2 = tl.load(p_qr + o_w2[None, :], mask=m_row[:, None] & m_w2[None, :], other=0.0)  # [BQ, W2]
        b_acc2 = tl.zeros([BQ, W2], tl.float32)

    TILES_R: tl.constexpr = (R + BN - 1) // BN
    per_split = tl.cdiv(K * TILES_R, SPLITS)
    b_max = tl.full([BQ], float("-inf"), tl.float32)
    b_sum = tl.zeros([BQ], tl.float32)
    for i in tl.range(i_split * per_split, min((i_split + 1) * per_split, K * TILES_R), num_stages=STAGES):
        j = i // TILES_R
        o_c = (i % TILES_R) * BN + tl.arange(0, BN)
        m_c = o_c < R
        if HAS_LENGTHS:
            m_c = m_c & (o_c < tl.load(p_lengths + i_b * K + j))
        p_e = p_states + ((i_b64 * K + j) * R + o_c)[:, None] * E
        b_e0 = tl.load(p_e + o_w0[None, :], mask=m_c[:, None] & m_w0[None, :], other=0.0)  # [BN, W0]
        b_s = tl.dot(b_q0, tl.trans(b_e0), input_precision=PRECISION)  # [BQ, BN]
        if W1 > 0:
            b_e1 = tl.load(p_e + o_w1[None, :], mask=m_c[:, None] & m_w1[None, :], other=0.0)  # [BN, W1]
            # chains of products that do not wait for each other
            b_s += tl.dot(b_q1, tl.trans(b_e1), input_precision=PRECISION)
        if W2 > 0:
            b_e2 = tl.load(p_e + o_w2[None, :], mask=m_c[:, None] & m_w2[None, :], other=0.0)  # [BN, W2]
            b_s += tl.dot(b_q2, tl.trans(b_e2), input_precision=PRECISION)
        m_tile = (o_a >= 0)[:, None] & m_c[None, :]
        b_s = b_s * scale_log2 + _position_logits(
            p_rel, p_rel_bias, o_bt, o_h, o_a, o_c, m_tile, B * T, G, G_REL, scale_log2, R, HAS_REL, HAS_BIAS
        )
        b_s = tl.where(m_tile, b_s, float("-inf"))
        b_p, b_alpha, b_max, b_sum = _online_softmax(b_s, b_max, b_sum)
        b_p = b_p.to(b_e0.dtype)
        b_acc0 = tl.dot(b_p, b_e0, b_acc0 * b_alpha[:, None], input_precision=PRECISION)
        if W1 > 0:
            b_acc1 = tl.dot(b_p, b_e1, b_acc1 * b_alpha[:, None], input_precision=PRECISION)
        if W2 > 0:
            b_acc2 = tl.dot(b_p, b_e2, b_acc2 * b_alpha[:, None], input_precision=PRECISION)
    if LETS_NEXT:
        tl.extra.cuda.gdc_launch_dependents()
    _finish(b_acc0, b_max, b_sum, p_out, p_lse, o_flat, o_w0, m_row, m_w0, i_split, E, SPLITS)
    if W1 > 0:
        _finish(b_acc1, b_max, b_sum, p_out, p_lse, o_flat, o_w1, m_row, m_w1, i_split, E, SPLITS)
    if W2 > 0:
        _finish(b_acc2, b_max, b_sum, p_out, p_lse, o_flat, o_w2, m_row, m_w2, i_split, E, SPLITS)


@triton.jit
def _cca_decode_merge_kernel(
    p_parts,  # float32 [rows, SPLITS, W]
    p_lse,  # float32 [rows, SPLITS]
    p_out,  # [rows, W]
    W,
    SPLITS,
    BW: tl.constexpr,
    BS: tl.constexpr,
    WAITS: tl.constexpr,
    LETS_NEXT: tl.constexpr,
):
    """The parts in a fixed order, BS of them at once, so that the result does not depend on who finished first."""
    if LETS_NEXT:
        tl.extra.cuda.gdc_launch_dependents()
    if WAITS:
        tl.extra.cuda.gdc_wait()
    i_row = tl.program_id(0).to(tl.int64)
    o_w = tl.program_id(1) * BW + tl.arange(0, BW)
    m_w = o_w < W
    o_s = tl.arange(0, BS)
    p_lse += i_row * SPLITS
    high = tl.full([BS], float("-inf"), tl.float32)
    for first in tl.range(0, SPLITS, BS):
        high = tl.maximum(high, tl.load(p_lse + first + o_s, mask=first + o_s < SPLITS, other=float("-inf")))
    high = tl.max(high, 0)
    base = tl.where(high == float("-inf"), 0.0, high)
    b_total = tl.zeros([BS], tl.float32)
    b_acc = tl.zeros([BW], tl.float32)
    for first in tl.range(0, SPLITS, BS):
        m_s = first + o_s < SPLITS
        b_weight = tl.exp2(tl.load(p_lse + first + o_s, mask=m_s, other=float("-inf")) - base)  # [BS]
        b_total += b_weight
        p = p_parts + (i_row * SPLITS + first + o_s)[:, None] * W + o_w[None, :]
        b_part = tl.load(p, mask=m_s[:, None] & m_w[None, :], other=0.0)  # [BS, BW]
        b_acc += tl.sum(b_weight[:, None] * b_part, 0)
    total = tl.sum(b_total, 0)
    b_acc = b_acc / tl.where(total == 0.0, 1.0, total)
    tl.store(p_out + i_row * W + o_w, b_acc.to(p_out.dtype.element_ty), mask=m_w)


@triton.jit
def _cca_decode_project_kernel(
    p_mixed,  # [N, H, (SPLITS,) E]
    p_lse,  # float32 [N, H, SPLITS]
    p_weight,  # [Hkv * D, E]
    p_out,  # [N, H, D]
    N,
    H,
    GROUP,
    E,
    D: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    BE: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    WAITS: tl.constexpr,
    LINES: tl.constexpr,
):
    """What a head made of the states times W_V, for BQ rows and BN columns; SPLITS > 1: of parts, merged in order."""
    i_head = tl.program_id(1)
    o_n = tl.program_id(2) * BQ + tl.arange(0, BQ)
    o_d = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n, m_d = o_n < N, o_d < D
    o_row = o_n.to(tl.int64) * H + i_head
    o_weight = ((i_head // GROUP).to(tl.int64) * D + o_d) * E
    if WAITS:
        # the weight comes into the L2 meanwhile: an address of each of its LINES (or more) of 128 bytes
        LINE: tl.constexpr = 128 // (p_weight.dtype.element_ty.primitive_bitwidth // 8)
        o_line = tl.minimum(tl.arange(0, LINES) * LINE, E - 1)
        p_line = p_weight + tl.where(m_d, o_weight, 0)[:, None] + o_line[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [p_line.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        tl.extra.cuda.gdc_wait()
    if SPLITS > 1:
        high = tl.full([BQ], float("-inf"), tl.float32)
        for i in tl.static_range(SPLITS):
            high = tl.maximum(high, tl.load(p_lse + o_row * SPLITS + i, mask=m_n, other=float("-inf")))
        base = tl.where(high == float("-inf"), 0.0, high)
        total = tl.zeros([BQ], tl.float32)
        for i in tl.static_range(SPLITS):
            total += tl.exp2(tl.load(p_lse + o_row * SPLITS + i, mask=m_n, other=float("-inf")) - base)
        total = tl.where(total == 0.0, 1.0, total)
    b_out = tl.zeros([BQ, BN], tl.float32)
    for start in tl.range(0, E, BE, num_stages=STAGES):
        o_e = start + tl.arange(0, BE)
        m_e = o_e < E
        mask = m_n[:, None] & m_e[None, :]
        if SPLITS > 1:
            b_sum = tl.zeros([BQ, BE], tl.float32)
            for i in tl.static_range(SPLITS):
                weight = tl.exp2(tl.load(p_lse + o_row * SPLITS + i, mask=m_n, other=float("-inf")) - base)
                p = p_mixed + (o_row * SPLITS + i)[:, None] * E + o_e[None, :]
                b_sum += weight[:, None] * tl.load(p, mask=mask, other=0.0)
            b_mixed = (b_sum / total[:, None]).to(p_weight.dtype.element_ty)  # [BQ, BE]
        else:
            b_mixed = tl.load(p_mixed + o_row[:, None] * E + o_e[None, :], mask=mask, other=0.0)  # [BQ, BE]
        p = p_weight + o_weight[:, None] + o_e[None, :]
        b_w = tl.load(p, mask=m_d[:, None] & m_e[None, :], other=0.0)  # [BN, BE]
        b_out = tl.dot(b_mixed, tl.trans(b_w), b_out, input_precision=PRECISION)
    p = p_out + o_row[:, None] * D + o_d[None, :]
    tl.store(p, b_out.to(p_out.dtype.element_ty), mask=m_n[:, None] & m_d[None, :])


def panels(width: int) -> tuple[int, int, int]:
    """Up to three powers of two that cover `width`; 0: there is none."""
    first = max(16, 1 << (width.bit_length() - 1))
    rest = max(width - first, 0)
    if rest == 0:
        return first, 0, 0
    second = max(16, 1 << (rest.bit_length() - 1))
    rest = max(rest - second, 0)
    return first, second, 0 if rest == 0 else max(16, triton.next_power_of_2(rest))


# Compiled for GPUs from sm_80 to sm_120 (`bench/static.py`): no spill in the loop, and 32 KB or more under way on each
# multiprocessor. For states 256 to 1,024 wide as measured on an H100.
def decode_tile(head_dim: int, rows: int, itemsize: int) -> dict[str, int]:
    """Sizes of the kernel over keys and values for `rows` query rows that share a key head."""
    width = max(16, triton.next_power_of_2(head_dim))
    return {
        "BD": width,
        "BQ": 16 if rows <= 16 else 32,
        "BN": 64 if width * itemsize <= 256 and itemsize < 4 else 32 if width * itemsize <= 512 else 16,
        "STAGES": 2,
        "num_warps": 8 if width > (128 if itemsize == 4 else 64) else 4,
        "resident": 5 if width * itemsize <= 128 else 2,
    }


def absorbed_tile(width: int, rows: int, itemsize: int, arch: int) -> dict[str, int]:
    """Sizes of the kernel over states for `rows` query rows of a sequence; the accumulator is BQ · width float32."""
    covered = panels(width)
    wide = sum(covered)
    small = itemsize < 4 and wide <= (256 if 0 < arch < 90 else 1024)  # two fit a multiprocessor
    return {
        "W0": covered[0],
        "W1": covered[1],
        "W2": covered[2],
        "BQ": 16 if rows <= 16 or wide > (512 if arch == SMALL else 1024) or (small and wide > 256) else 32,
        "BN": 32 if wide <= (896 if arch == SMALL else 1024) else 16,
        "STAGES": 2,
        "num_warps": 4 if small else 8,
        "resident": 2 if small else 1,
    }


def project_tile(rows: int, itemsize: int, merges: bool, device: torch.device) -> dict[str, int]:
    """Sizes of the product with W_V of `rows` query rows: enough programs to fill a GPU, though each reads its rows of
    the weight anew; `merges`: several parts."""
    arch = attention_tiles.architecture(device)
    if merges or itemsize == 4:
        block = 16 if rows <= 32 else 32 if rows <= 64 or itemsize == 4 else 64
        wide = block > 16 and itemsize < 4
        stages = 2 if arch == SMALL and block == 64 else 3  # a tile of 16 KB for each part
        return {"BQ": block, "BN": 64 if wide else 32, "BE": 64 if itemsize < 4 else 32, "STAGES": stages}
    block = 64 if rows > 32 else 32 if rows > 16 else 16
    # nearly all of it is asked for at once; then one program fills a multiprocessor, and those that begin before the
    # attention has ended do not gather on the few that are free first
    deep = arch >= 90
    return {"BQ": block, "BN": 32, "BE": 64, "STAGES": (10 if block == 64 else 14) if deep else 3}


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def slots(device: torch.device, resident: int) -> int:
    """Programs that run at the same time; an interpreter has one after another."""
    return resident * _multiprocessors(device.index or 0) if device.type == "cuda" else 1


def _in_chain(
    device: torch.device, first: bool = False, last: bool = False
) -> tuple[bool, bool, dict[str, Any]]:
    """Of a launch of a chain, where they overlap: whether it waits for the one before it, whether it lets the next one
    begin, and Triton's options."""
    if attention_tiles.architecture(device) < 90:
        return False, False, {}
    return not first, not last, {} if first else {"launch_pdl": True}


_fitted: dict[tuple[Any, ...], dict[str, int]] = {}


def _fitting(kernel: Any, sizes: dict[str, int], attempt: Callable[[dict[str, int]], Tensor]) -> Tensor:
    """`attempt` with these sizes, or with fewer stages, keys and rows where a GPU has not the shared memory for them.

    Raises RuntimeError where nothing smaller is left.
    """
    wanted = (kernel, *sizes.items())

    def smaller(sizes: dict[str, int], error: OutOfResources) -> dict[str, int]:
        for name, least in (("STAGES", 1), ("BN", 16), ("BQ", 16)):
            if sizes[name] > least:
                _fitted[wanted] = {**sizes, name: sizes[name] // 2}
                return _fitted[wanted]
        raise RuntimeError(
            f'decoding: the kernel {lacks(error)}. Use backend="torch", or a narrower dtype.'
        ) from error

    return until_it_fits(_fitted.get(wanted, sizes), attempt, smaller)


def _attention(
    kernel: Any,
    query: Tensor,
    programs: int,
    tiles: int,
    scalars: tuple[int | float, ...],
    constants: dict[str, Any],
    sizes: dict[str, int],
    first: bool,
    alone: bool,
) -> tuple[launch.Launch, int]:
    """A Triton kernel for `programs` groups of rows, each split over its `tiles` of keys, and the number of parts.

    `first` of its chain: nothing is launched before it; `alone`: nor behind it, where there is one part."""
    parts = launch.splits(programs, tiles, slots(query.device, sizes["resident"]))
    waits, lets_next, options = _in_chain(query.device, first, alone and parts == 1)
    given = {
        **constants,
        **sizes,
        "SPLITS": parts,
        "PRECISION": precision(query.dtype),
        "WAITS": waits,
        "LETS_NEXT": lets_next,
    }
    names = {name: given[name] for name in kernel.arg_names if name in given}
    options["num_warps"] = sizes["num_warps"]
    return launch.Launch(kernel, (programs * parts,), (), scalars, names, **options), parts


class _Products:
    """(q + u)·W_K, (q + v)·rel_key or both, for one kind of call."""

    def __init__(
        self,
        query: Tensor,  # [B, T, H, D]
        content_bias: Tensor | None,  # [H, D]
        key_weight: Tensor | None,  # [Hkv * D, E]
        position_bias: Tensor | None,  # [H, D]
        rel_key: Tensor | None,  # [H, G, D]
    ) -> None:
        batch, tokens, heads, head_dim = query.shape
        rows = batch * tokens
        width, group = 0, 1
        if key_weight is not None:
            width, group = key_weight.shape[1], heads * head_dim // key_weight.shape[0]
        columns = 0 if rel_key is None else rel_key.shape[1]
        self._absorbed_shape = None if key_weight is None else (batch, tokens, heads, width)
        self._rel_shape = None if rel_key is None else (heads, rows, rel_stride(columns))
        narrow = query.dtype == torch.float32
        sizes = {
            "BD": max(16, triton.next_power_of_2(head_dim)),
            "BQ": 16 if narrow else min(64, max(16, triton.next_power_of_2(rows))),
            "BN": 32 if narrow else 64,
        }
        tiles = triton.cdiv(width, sizes["BN"]) + triton.cdiv(columns, sizes["BN"])
        self.launch = None
        if tiles:
            _, lets_next, options = _in_chain(query.device, first=True)
            self.launch = launch.Launch(
                _cca_decode_product_kernel,
                (tiles, heads, triton.cdiv(rows, sizes["BQ"])),
                (),
                (rows, heads, group, width, columns, rel_stride(columns)),
                {
                    "D": head_dim,
                    **sizes,
                    "HAS_STATES": key_weight is not None,
                    "HAS_REL": rel_key is not None,
                    "HAS_U": content_bias is not None,
                    "HAS_V": position_bias is not None,
                    "PRECISION": precision(query.dtype),
                    "LETS_NEXT": lets_next,
                },
                num_warps=4,
                **options,
            )

    def __call__(
        self,
        query: Tensor,
        content_bias: Tensor | None,
        key_weight: Tensor | None,
        position_bias: Tensor | None,
        rel_key: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """[B, T, H, E] and [H, B * T, G_REL], of which what is behind G is not written."""
        absorbed, rel = (
            None if shape is None else query.new_empty(shape)
            for shape in (self._absorbed_shape, self._rel_shape)
        )
        if self.launch is not None:
            self.launch(query, content_bias, key_weight, absorbed, position_bias, rel_key, rel)
        return absorbed, rel


def rel_stride(columns: int) -> int:
    """Elements of a row of position logits: rows begin at multiples of 16 bytes."""
    return columns + -columns % 8


class _Parts:
    """Of one kind of call: where attention writes its parts of every row, and their merging."""

    def __init__(
        self, device: torch.device, rows: int, width: int, parts: int, last: bool, merged_later: bool = False
    ) -> None:
        self._shape = (rows, width) if parts == 1 else (rows, parts, width)
        self._parts, self._width = parts, width
        self.launch = None
        if parts > 1 and not merged_later:
            block = min(triton.next_power_of_2(width), 128)
            waits, lets_next, options = _in_chain(device, last=last)
            self.launch = launch.Launch(
                _cca_decode_merge_kernel,
                (rows, triton.cdiv(width, block)),
                (),
                (width, parts),
                {
                    "BW": block,
                    "BS": min(triton.next_power_of_2(parts), 32),
                    "WAITS": waits,
                    "LETS_NEXT": lets_next,
                },
                num_warps=4,
                **options,
            )

    def space(self, query: Tensor) -> tuple[Tensor, Tensor | None]:
        """[rows, (parts,) width], and the log-sum-exp of several parts [rows, parts]."""
        if self._parts == 1:
            return query.new_empty(self._shape), None
        made = query.new_empty(self._shape, dtype=torch.float32)
        return made, query.new_empty(self._shape[:2], dtype=torch.float32)

    def merged(self, mixed: Tensor, lse: Tensor | None, query: Tensor) -> Tensor:
        """`mixed`, or where there is something to merge, the rows [rows, width] in the query's dtype."""
        if self.launch is None:
            return mixed
        out = query.new_empty((mixed.shape[0], self._width))
        self.launch(mixed, lse, out)
        return out


def _present(*launches: Any) -> list[Any]:
    return [x for x in launches if x is not None]


class _OverKeys:
    """Attention to keys and values, for one kind of call."""

    def __init__(
        self,
        attend: Callable[..., None],
        parts: int,
        query: Tensor,
        rel_key: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        self._attend = attend
        self._products = _Products(query, None, None, bias, rel_key)
        width = query.shape[-1]
        self._parts = _Parts(query.device, query.numel() // width, width, parts, last=True)
        self.launches = _present(self._products.launch, attend, self._parts.launch)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rows: Tensor,
        rel_key: Tensor | None,
        content_bias: Tensor | None,
        position_bias: Tensor | None,
        rel_bias: Tensor | None,
        lengths: Tensor | None,
    ) -> Tensor:
        _, rel = self._products(query, None, None, position_bias, rel_key)
        mixed, lse = self._parts.space(query)
        self._attend(query, key, value, rows, rel, content_bias, rel_bias, lengths, mixed, lse)
        return self._parts.merged(mixed, lse, query).view(query.shape)


_MERGED_IN_PRODUCT = 4
"""So many parts at most are merged by the product with W_V, every program of which reads all parts of its rows."""


class _OverStates:
    """Attention to states, for one kind of call."""

    def __init__(
        self,
        attend: Callable[..., None],
        parts: int,
        query: Tensor,
        key_weight: Tensor,
        rel_key: Tensor | None,
        content_bias: Tensor | None,
        position_bias: Tensor | None,
    ) -> None:
        batch, tokens, heads, head_dim = query.shape
        width = key_weight.shape[1]
        rows = batch * tokens
        in_product = parts <= _MERGED_IN_PRODUCT
        self._attend = attend
        self._products = _Products(query, content_bias, key_weight, position_bias, rel_key)
        self._parts = _Parts(query.device, rows * heads, width, parts, last=False, merged_later=in_product)
        sizes = project_tile(rows, query.element_size(), in_product and parts > 1, query.device)
        waits, _, options = _in_chain(query.device, last=True)
        self._project = launch.Launch(
            _cca_decode_project_kernel,
            (triton.cdiv(head_dim, sizes["BN"]), heads, triton.cdiv(rows, sizes["BQ"])),
            (),
            (rows, heads, heads * head_dim // key_weight.shape[0], width),
            {
                "D": head_dim,
                "BQ": sizes["BQ"],
                "BN": sizes["BN"],
                "BE": sizes["BE"],
                "SPLITS": parts if in_product else 1,
                "PRECISION": precision(query.dtype),
                "STAGES": sizes["STAGES"],
                "WAITS": waits,
                "LINES": triton.next_power_of_2(triton.cdiv(width * query.element_size(), 128)),
            },
            num_warps=4,
            **options,
        )
        self.launches = _present(self._products.launch, attend, self._parts.launch, self._project)

    def __call__(
        self,
        query: Tensor,
        states: Tensor,
        key_weight: Tensor,
        value_weight: Tensor,
        rows: Tensor,
        rel_key: Tensor | None,
        content_bias: Tensor | None,
        position_bias: Tensor | None,
        rel_bias: Tensor | None,
        lengths: Tensor | None,
    ) -> Tensor:
        absorbed, rel = self._products(query, content_bias, key_weight, position_bias, rel_key)
        mixed, lse = self._parts.space(query)
        self._attend(absorbed, states, rows, rel, rel_bias, lengths, mixed, lse)
        out = query.new_empty(query.shape)
        self._project(self._parts.merged(mixed, lse, query), lse, value_weight, out)
        return out


def decode_triton(
    query: Tensor,  # [B, T, H, D]
    key: Tensor,  # [B, K, R, Hkv, D]
    value: Tensor,  # [B, K, R, Hkv, D]
    rows: Tensor,  # integers [B, T]
    rel_key: Tensor | None,  # [H, G, D]
    content_bias: Tensor | None,  # [H, D]
    position_bias: Tensor | None,  # [H, D]
    rel_bias: Tensor | None,  # [H, G]
    lengths: Tensor | None,  # integers [B, K]
    scale: float,
) -> Tensor:  # [B, T, H, D]
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    batch, tokens, heads, head_dim = query.shape
    _, neighbours, neighbour_len, kv_heads, _ = key.shape
    if query.numel() == 0 or key.numel() == 0:
        return query.new_zeros(query.shape)
    of_group = tokens * heads // kv_heads
    columns = _columns(rel_key, rel_bias)

    def make(tensors: Sequence[Any], sizes: dict[str, int]) -> _OverKeys:
        query, _, _, _, rel_key, content_bias, position_bias, rel_bias, lengths = tensors
        attend, parts = _attention(
            _cca_decode_kernel,
            query,
            batch * kv_heads * triton.cdiv(of_group, sizes["BQ"]),
            neighbours * triton.cdiv(neighbour_len, sizes["BN"]),
            (
                scale * math.log2(math.e),
                batch,
                tokens,
                heads,
                kv_heads,
                neighbours,
                columns,
                rel_stride(columns),
            ),
            {
                "R": neighbour_len,
                "D": head_dim,
                "HAS_REL": rel_key is not None,
                "HAS_U": content_bias is not None,
                "HAS_BIAS": rel_bias is not None,
                "HAS_LENGTHS": lengths is not None,
            },
            sizes,
            first=rel_key is None,
            alone=True,
        )
        return _OverKeys(attend, parts, query, rel_key, position_bias)

    def fitting(attempt: Callable[[dict[str, int]], Tensor]) -> Tensor:
        sizes = decode_tile(head_dim, of_group, query.element_size())
        return _fitting(_cca_decode_kernel, sizes, attempt)

    tensors = (query, key, value, rows, rel_key, content_bias, position_bias, rel_bias, lengths)
    return launch.run("decode", tensors, (scale,), make, fitting)


def absorbed_decode_triton(
    query: Tensor,  # [B, T, H, D]
    states: Tensor,  # [B, K, R, E]
    key_weight: Tensor,  # [Hkv * D, E]
    value_weight: Tensor,  # [Hkv * D, E]
    rows: Tensor,  # integers [B, T]
    rel_key: Tensor | None,  # [H, G, D]
    content_bias: Tensor | None,  # [H, D]
    position_bias: Tensor | None,  # [H, D]
    rel_bias: Tensor | None,  # [H, G]
    lengths: Tensor | None,  # integers [B, K]
    scale: float,
) -> Tensor:  # [B, T, H, D]
    query, states = query.contiguous(), states.contiguous()
    batch, tokens, heads, _ = query.shape
    _, neighbours, neighbour_len, width = states.shape
    if query.numel() == 0 or states.numel() == 0:
        return query.new_zeros(query.shape)
    columns = _columns(rel_key, rel_bias)
    scale_log2 = scale * math.log2(math.e)

    def make(tensors: Sequence[Any], sizes: dict[str, int]) -> _OverStates:
        query, states, key_weight, _, rows, rel_key, content_bias, position_bias, rel_bias, lengths = tensors
        if decode_native.can_run(query, states, rows, rel_bias, lengths):
            parts = launch.splits(*decode_native.work(query, states), slots(query.device, 1))
            attend = decode_native.Launch(
                query, states, rows, rel_bias, lengths, columns, rel_stride(columns), scale_log2, parts
            )
            if attend.merges:
                parts = 1
        else:
            attend, parts = _attention(
                _cca_absorbed_decode_kernel,
                query,
                batch * triton.cdiv(tokens * heads, sizes["BQ"]),
                neighbours * triton.cdiv(neighbour_len, sizes["BN"]),
                (scale_log2, batch, tokens, heads, neighbours, columns, rel_stride(columns)),
                {
                    "R": neighbour_len,
                    "E": width,
                    "HAS_REL": rel_key is not None,
                    "HAS_BIAS": rel_bias is not None,
                    "HAS_LENGTHS": lengths is not None,
                },
                sizes,
                first=False,
                alone=False,
            )
        return _OverStates(attend, parts, query, key_weight, rel_key, content_bias, position_bias)

    def fitting(attempt: Callable[[dict[str, int]], Tensor]) -> Tensor:
        arch = attention_tiles.architecture(states.device)
        sizes = absorbed_tile(width, tokens * heads, states.element_size(), arch)
        return _fitting(_cca_absorbed_decode_kernel, sizes, attempt)

    tensors = (
        query,
        states,
        key_weight,
        value_weight,
        rows,
        rel_key,
        content_bias,
        position_bias,
        rel_bias,
        lengths,
    )
    return launch.run("absorbed decode", tensors, (scale,), make, fitting)


def _columns(rel_key: Tensor | None, rel_bias: Tensor | None) -> int:
    table = rel_bias if rel_key is None else rel_key
    return 1 if table is None else table.shape[1]
