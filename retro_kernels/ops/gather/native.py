"""The gather in C++ and CUDA (csrc/cpu/gather.cpp, csrc/cuda/gather.cu): addresses, sizes and the stream."""

from __future__ import annotations

import re
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

WHY_NOT: str | None = None
"""Why the native code cannot run here, or None."""
try:
    from retro_kernels import _C
except ImportError as error:  # a checkout that nobody installed still has everything that needs no compiler
    WHY_NOT = f"retro_kernels._C cannot be loaded ({error}); build it with pip install -e ."
WITH_CUDA: bool = WHY_NOT is None and _C.cuda
"""Was the extension built by nvcc as well?"""
# one that was built before it said so has what is the default
_ARCHS = [int(arch) for arch in re.findall(r"\d+", getattr(_C, "cuda_archs", "80;90"))] if WITH_CUDA else []

_IN_ORDER = 8192
"""From so many rows on, those in host memory are read in the order of their addresses, which the GPU translates page by
page: it saves more than sorting takes."""

Array: TypeAlias = Tensor | np.ndarray
_ADVISE = {"never": 0, "always": 1, "when cold": 2}


def why_not_on(device: torch.device) -> str | None:
    """The reason why the CUDA code of this build cannot run on a GPU, or None.

    It has machine code for some, which later ones of their generation run too, and PTX of the last, which every later
    one runs."""
    found = torch.cuda.get_device_properties(device)
    here = 10 * found.major + found.minor
    if any(arch // 10 == found.major and arch <= here for arch in _ARCHS) or _ARCHS[-1] <= here:
        return None
    built = ", ".join(f"sm_{arch}" for arch in _ARCHS)
    return (
        f"this build's CUDA code is for {built}, not for sm_{here} (install it with RETRO_CUDA_ARCHS={here})"
    )


def gather_host(
    tokens: Array,  # [C, M] uint16 or int32, in host memory or mapped from a file
    ids: Tensor,  # [..., K] int64 on the host
    continuation: Array,  # [C] bool, on the host
    pad_id: int,
    dtype: torch.dtype,
    *,
    threads: int | None = None,
    advise: Literal["never", "always", "when cold"] = "when cold",
    pin: bool = False,
) -> tuple[Tensor, Tensor]:  # [..., K, 2M] dtype, [..., K] int32
    """`threads`: as many as PyTorch uses by default. `advise`: whether the pages of a mapped file are asked for
    before they are read. `pin`: allocate the results in pinned memory. Ids out of range raise ValueError."""
    ids = ids.contiguous()
    # said, since the user may have set another default
    out = torch.empty((*ids.shape, 2 * tokens.shape[1]), dtype=dtype, pin_memory=pin, device="cpu")
    lengths = torch.empty(ids.shape, dtype=torch.int32, pin_memory=pin, device="cpu")
    job = _describe(tokens, ids, continuation, pad_id, out, lengths)
    _C.gather_neighbours_cpu(job, threads or torch.get_num_threads(), _ADVISE[advise])
    return out, lengths


def gather_cuda(
    tokens: Tensor,  # [C, M] uint16 or int32, on the GPU or in pinned host memory
    ids: Tensor,  # [..., K] int64 on the GPU
    continuation: Tensor,  # [C] bool, on the GPU or in pinned host memory
    pad_id: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # [..., K, 2M] dtype, [..., K] int32
    ids = ids.contiguous()
    out = torch.empty((*ids.shape, 2 * tokens.shape[1]), dtype=dtype, device=ids.device)
    lengths = torch.empty(ids.shape, dtype=torch.int32, device=ids.device)
    order = _by_place(ids, tokens.shape[0]) if not tokens.is_cuda and ids.numel() >= _IN_ORDER else None
    job = _describe(tokens, ids, continuation, pad_id, out, lengths, order)
    stream = torch.cuda.current_stream(ids.device).cuda_stream
    _C.gather_neighbours_cuda(job, not tokens.is_cuda, not continuation.is_cuda, stream)
    return out, lengths


def _by_place(ids: Tensor, num_chunks: int) -> Tensor:
    """int64 [n]: the rows of ids by where in the store they lie, to 1/32,768 of it, since narrow keys sort fast."""
    shift = max(0, (num_chunks - 1).bit_length() - 15)
    return (ids.flatten() >> shift).to(torch.int16).argsort()


def _describe(
    tokens: Array,
    ids: Tensor,
    continuation: Array,
    pad_id: int,
    out: Tensor,
    lengths: Tensor,
    order: Tensor | None = None,
) -> _C.Gather:
    if isinstance(tokens, np.ndarray):
        token_bytes, row_stride = tokens.itemsize, tokens.strides[0] // tokens.itemsize
    else:
        token_bytes, row_stride = tokens.element_size(), tokens.stride(0)
    return _C.Gather(
        tokens=_address(tokens),
        token_bytes=token_bytes,
        row_stride=row_stride,
        num_chunks=tokens.shape[0],
        chunk_size=tokens.shape[1],
        continuation=_address(continuation),
        ids=ids.data_ptr(),
        n=ids.numel(),
        pad_id=pad_id,
        out=out.data_ptr(),
        out_bytes=out.element_size(),
        lengths=lengths.data_ptr(),
        order=0 if order is None else order.data_ptr(),
    )


def _address(x: Array) -> int:
    return x.__array_interface__["data"][0] if isinstance(x, np.ndarray) else x.data_ptr()
