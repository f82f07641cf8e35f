"""Decoding over encoder states in CUDA C++ (csrc/cuda/absorbed_decode.cu), for 16-bit states of the usual widths."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from retro_kernels.ops.gather.native import WITH_CUDA

_INTEGERS = (torch.int32, torch.int64)

if WITH_CUDA:
    from retro_kernels import _C
# an extension that was built before this op was written has everything else
_BUILT: bool = WITH_CUDA and hasattr(_C, "absorbed_decode_takes")


def can_run(
    query: Tensor, states: Tensor, rows: Tensor, rel_bias: Tensor | None, lengths: Tensor | None
) -> bool:
    """Whether this build and GPU can, and the op takes these types; if not, the Triton kernel does it."""
    return (
        _BUILT
        and states.is_cuda
        and torch.version.hip is None
        and states.dtype in (torch.float16, torch.bfloat16)
        and rows.dtype in _INTEGERS
        and (lengths is None or lengths.dtype in _INTEGERS)
        and (rel_bias is None or rel_bias.dtype in (torch.float32, states.dtype))
        and states.data_ptr() % 16 == 0
        and _C.absorbed_decode_takes(
            states.shape[3], states.shape[1], states.shape[2], query.shape[1] * query.shape[2]
        )
    )


class Launch:
    """The launch for one kind of call, as `launch.Launch`; `parts`: into how many the keys of every row are cut.

    It comes behind the one that makes `absorbed` and `rel`, and may begin before that one has ended.

    `merges`: whether it merges them, as the programs can that share a row's keys where all of them run at once and read
    each other's shared memory (a cluster). Else `out` and `lse` are of parts.
    """

    compiled = True

    def __init__(
        self,
        query: Tensor,  # [B, T, H, D]
        states: Tensor,  # [B, K, R, E]
        rows: Tensor,  # integers [B, T]
        rel_bias: Tensor | None,  # [H, G]
        lengths: Tensor | None,  # integers [B, K]
        columns: int,
        rel_stride: int,
        scale_log2: float,
        parts: int,
    ) -> None:
        batch, tokens, heads, _ = query.shape
        self._job = _C.AbsorbedDecode(
            scale_log2=scale_log2,
            batch=batch,
            tokens=tokens,
            heads=heads,
            width=states.shape[3],
            neighbours=states.shape[1],
            keys=states.shape[2],
            columns=columns,
            rel_stride=rel_stride,
            splits=parts,
            row_bytes=rows.element_size(),
            length_bytes=0 if lengths is None else lengths.element_size(),
            bias_bytes=0 if rel_bias is None else rel_bias.element_size(),
            half=states.dtype == torch.float16,
        )
        groups, _ = work(query, states)
        self.merges = groups <= _C.absorbed_decode_clusters(self._job)
        self._job.cluster = self.merges
        self._device = states.device

    def __call__(
        self,
        absorbed: Tensor,  # [B, T, H, E]
        states: Tensor,
        rows: Tensor,
        rel: Tensor | None,  # [H, B * T, rel_stride]
        rel_bias: Tensor | None,
        lengths: Tensor | None,
        out: Tensor,  # [B * T * H, E], or float32 [B * T * H, parts, E]
        lse: Tensor | None,  # float32 [B * T * H, parts]
    ) -> None:
        addresses = [
            0 if x is None else x.data_ptr()
            for x in (absorbed, states, rows, rel, rel_bias, lengths, out, lse)
        ]
        stream = torch.cuda.current_stream(self._device).cuda_stream
        _C.absorbed_decode_cuda(self._job, addresses, stream)


def work(query: Tensor, states: Tensor) -> tuple[int, int]:
    """Groups of rows, and tiles of keys for each of them."""
    batch, tokens, heads, _ = query.shape
    _, neighbours, keys, _ = states.shape
    groups = batch * triton.cdiv(tokens * heads, _C.absorbed_decode_rows(tokens * heads))
    return groups, neighbours * triton.cdiv(keys, _C.absorbed_decode_keys)
