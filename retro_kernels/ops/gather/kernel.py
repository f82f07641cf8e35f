"""The gather in Triton, for a store that lies on the GPU.

    row i = [chunk ids[i], chunk ids[i] + 1 if that continues its document else pads],  all pads for -1
    lengths[i] = tokens before the row's trailing pads

tokens [C, M], ids [n], continuation [C], out [n, 2M], lengths [n]. A pure copy: 4M bytes in (uint16) and 16M bytes out
(int64) a row, so its floor is memory bandwidth; a row is one contiguous piece of the store, read 16 bytes a thread.
Addresses are 64-bit: a store of 10⁹ chunks has 6.4·10¹⁰ tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


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
    b_token = tl.where(m_token, b_token.to(tl.int64), pad_id)
    b_length = tl.max(tl.where((b_token != pad_id) & m_token, o_col[None, :] + 1, 0), axis=1)  # [BR]
    p_out = out + (o_row * (2 * M))[:, None] + o_col[None, :]
    m_out = m_row[:, None] & (o_col < 2 * M)[None, :]
    tl.store(p_out, b_token.to(out.dtype.element_ty), mask=m_out)
    tl.store(lengths + o_row, b_length, mask=m_row)


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
