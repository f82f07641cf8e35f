"""The gather in plain PyTorch: the definition that the kernels are tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_reference(
    tokens: Tensor,  # [C, M] uint16 or int32
    ids: Tensor,  # [..., K] int64
    continuation: Tensor,  # [C] bool
    pad_id: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # [..., K, 2M] dtype, [..., K] int32
    num_chunks = len(tokens)
    present = (ids >= 0) & (ids < num_chunks)
    first = ids.where(present, 0)
    second = (first + 1).clamp(max=num_chunks - 1)
    continues = present & (first < second) & continuation[first]
    pair = torch.stack((_rows(tokens, first), _rows(tokens, second)), dim=-2)  # [..., K, 2, M]
    real = torch.stack((present, continues), dim=-1)
    out = pair.where(real[..., None], pad_id).flatten(-2)
    places = torch.arange(1, out.shape[-1] + 1, device=out.device)
    lengths = ((out != pad_id) * places).amax(-1)
    return out.to(dtype), lengths.to(torch.int32)


def _rows(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows as int64. PyTorch has no indexing of uint16, but it has it of the same bits."""
    if tokens.dtype == torch.uint16:
        return tokens.view(torch.int16)[index].to(torch.int64) & 0xFFFF
    return tokens[index].to(torch.int64)
