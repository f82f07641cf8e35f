"""The gather in Triton, for a store that lies on the GPU: the tokens themselves, or their rows of an embedding table.

    row i = [chunk ids[i], chunk ids[i] + 1 if that continues its document else pads],  all pads for -1
    lengths[i] = tokens before the row's trailing pads

tokens [C, M], ids [n], continuation [C], out [n, 2M], lengths [n]. A pure copy: 4M bytes in (uint16) and 16M bytes out
(int64) a row, so its floor is memory bandwidth; a row is one contiguous piece of the store, read 16 bytes a thread.
Addresses are 64-bit: a store of 10⁹ chunks has 6.4·10¹⁰ tokens.

With the lookup, weight [V, E] and out [n, 2M, E]: the tokens never reach memory, which saves a launch and 1/E of the
bytes; the floor is the writing of `out`, and the reading of as much of the table as the L2 does not hold.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rows(tokens, continuation, b_id, o_col, num_chunks, pad_id, M: tl.constexpr, ROW_STRIDE: tl.constexpr):
    """Columns o_col [BW] of the rows b_id [BR] as int64 [BR, BW], and where they hold tokens of the store."""
    m_first = (b_id >= 0) & (b_id < num_chunks)
    b_next = tl.load(continuation + b_id, mask=m_first & (b_id + 1 < num_chunks), other=0)  # [BR]
    m_second = b_next != 0
    m_token = (m_first[:, None] & (o_col < M)[None, :]) | (
        m_second[:, None] & ((o_col >= M) & (o_col < 2 * M))[None, :]
    )  # [BR, BW]
    # where rows are packed (stride M) the continuation stands right behind, and the whole row is one piece
    o_source = o_col + tl.where(o_col >= M, ROW_STRIDE - M, 0) if ROW_STRIDE != M else o_col
    p_token = tokens + (b_id * ROW_STRIDE)[:, None] + o_source[None, :]
    b_token = tl.load(p_token, mask=m_token, other=0)  # [BR, BW]
    # widened before the pad goes in: as a literal it would have to fit the store's type
    return tl.where(m_token, b_token.to(tl.int64), pad_id), m_token


@triton.jit
def _gather_neighbours_kernel(
    tokens,  # [C, M] uint16 or int32
    ids,  # [n] int64
    continuation,  # [C] uint8
    out,  # [n, 2M]
    lengths,  # [n] int32
    n,
    num_chunks,
    pad_id,
    M: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    BR: tl.constexpr,
    BW: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    o_col = tl.arange(0, BW)  # [BW]
    m_row = o_row < n
    b_id = tl.load(ids + o_row, mask=m_row, other=-1)  # [BR]
    b_token, m_token = _rows(tokens, continuation, b_id, o_col, num_chunks, pad_id, M, ROW_STRIDE)
    b_length = tl.max(tl.where((b_token != pad_id) & m_token, o_col[None, :] + 1, 0), axis=1)  # [BR]
    p_out = out + (o_row * (2 * M))[:, None] + o_col[None, :]
    m_out = m_row[:, None] & (o_col < 2 * M)[None, :]
    tl.store(p_out, b_token.to(out.dtype.element_ty), mask=m_out)
    tl.store(lengths + o_row, b_length, mask=m_row)


@triton.jit
def _gather_embeddings_kernel(
    tokens,  # [C, M] uint16 or int32
    ids,  # [n] int64
    continuation,  # [C] uint8
    weight,  # [V, E]
    out,  # [n, 2M, E]
    lengths,  # [n] int32
    num_chunks,
    pad_id,
    num_embeddings,
    M: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    E: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
    BW: tl.constexpr,
):
    i_part, i_row = tl.program_id(0) % ((2 * M + BT - 1) // BT), tl.program_id(0) // ((2 * M + BT - 1) // BT)
    i_row = i_row.to(tl.int64)
    b_id = tl.load(ids + i_row + tl.zeros([1], tl.int64))  # [1]
    if i_part == 0:
        o_col = tl.arange(0, BW)
        b_all, m_all = _rows(tokens, continuation, b_id, o_col, num_chunks, pad_id, M, ROW_STRIDE)  # [1, BW]
        b_length = tl.max(tl.where((b_all != pad_id) & m_all, o_col[None, :] + 1, 0), axis=1)  # [1]
        tl.store(lengths + i_row + tl.zeros([1], tl.int64), b_length)
    o_token = i_part * BT + tl.arange(0, BT)  # [BT]
    b_part, _ = _rows(tokens, continuation, b_id, o_token, num_chunks, pad_id, M, ROW_STRIDE)  # [1, BT]
    b_token = tl.reshape(b_part, (BT,))
    m_known = (b_token >= 0) & (b_token < num_embeddings)
    p_weight = weight + b_token * E  # [BT]
    p_out = out + (i_row * (2 * M) + o_token) * E  # [BT]
    for i_column in range(0, E, BE):
        o_column = i_column + tl.arange(0, BE)  # [BE]
        m_column = (o_column < E)[None, :]
        b_weight = tl.load(
            p_weight[:, None] + o_column[None, :], mask=m_known[:, None] & m_column, other=float("nan")
        )  # [BT, BE]
        tl.store(p_out[:, None] + o_column[None, :], b_weight, mask=(o_token < 2 * M)[:, None] & m_column)


TILE = 2048
"""Elements a program of 4 warps holds: 16 a thread, two loads of 16 bytes. Not tuned on a GPU yet."""


def gather_triton(
    tokens: Tensor,  # [C, M] uint16 or int32
    ids: Tensor,  # [..., K] int64
    continuation: Tensor,  # [C] bool
    pad_id: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # [..., K, 2M] dtype, [..., K] int32
    num_chunks, chunk_size = tokens.shape
    ids = ids.contiguous()
    out = torch.empty((*ids.shape, 2 * chunk_size), dtype=dtype, device=ids.device)
    lengths = torch.empty(ids.shape, dtype=torch.int32, device=ids.device)
    if ids.numel() == 0:
        return out, lengths
    width = triton.next_power_of_2(2 * chunk_size)
    rows = max(1, TILE // width)
    _gather_neighbours_kernel[(triton.cdiv(ids.numel(), rows),)](
        tokens,
        ids,
        continuation.view(torch.uint8),
        out,
        lengths,
        ids.numel(),
        num_chunks,
        pad_id,
        M=chunk_size,
        ROW_STRIDE=tokens.stride(0),
        BR=rows,
        BW=width,
        num_warps=4,
    )
    return out, lengths


def gather_embeddings_triton(
    tokens: Tensor,  # [C, M] uint16 or int32
    ids: Tensor,  # [..., K] int64
    continuation: Tensor,  # [C] bool
    weight: Tensor,  # [V, E]
    pad_id: int,
) -> tuple[Tensor, Tensor]:  # [..., K, 2M, E], [..., K] int32
    num_chunks, chunk_size = tokens.shape
    ids, weight = ids.contiguous(), weight.contiguous()
    num_embeddings, width = weight.shape
    out = weight.new_empty((*ids.shape, 2 * chunk_size, width))
    lengths = torch.empty(ids.shape, dtype=torch.int32, device=ids.device)
    if out.numel() == 0:
        return out, lengths
    columns = min(triton.next_power_of_2(width), 128)
    rows = min(triton.next_power_of_2(2 * chunk_size), TILE // columns)
    _gather_embeddings_kernel[(ids.numel() * triton.cdiv(2 * chunk_size, rows),)](
        tokens,
        ids,
        continuation.view(torch.uint8),
        weight,
        out,
        lengths,
        num_chunks,
        pad_id,
        num_embeddings,
        M=chunk_size,
        ROW_STRIDE=tokens.stride(0),
        E=width,
        BT=rows,
        BE=columns,
        BW=triton.next_power_of_2(2 * chunk_size),
        num_warps=4,
    )
    return out, lengths
