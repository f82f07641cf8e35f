"""Block attention in C++ (csrc/cpu/attention.cpp), without dropout: addresses, sizes and strides. float32, and bfloat16
that is computed in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from retro_kernels.ops._backend import cpu_flags
from retro_kernels.ops.gather.native import WHY_NOT

_SPARE_COLUMNS = 96
"""What the vectors may read and write behind the table."""
_PARTS = 32
"""Into about so many tasks a backward is cut, whatever the number of threads: sums come in one order."""

if WHY_NOT is None:
    from retro_kernels import _C
# an extension that was built before this op was written has everything else
_WORKS: bool = WHY_NOT is None and hasattr(_C, "attend_cpu") and _C.attend_cpu_works()
# with AMX PyTorch's products of bfloat16 are an order of magnitude faster than those of float32
_BF16: bool = WHY_NOT is None and hasattr(_C, "attend_cpu_takes_bf16") and "amx_bf16" not in cpu_flags()


def can_run(query: Tensor, dropout_p: float) -> bool:
    """Whether this processor and build can (x86-64 with AVX2, GCC with OpenMP), and the op does what is asked."""
    taken = query.dtype == torch.float32 or (_BF16 and query.dtype == torch.bfloat16)
    return _WORKS and taken and dropout_p == 0.0


class Attention:
    """The arguments of a backend's `forward` and `backward`, as `op.py` describes them."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rel_key: Tensor | None,
        content_bias: Tensor | None,
        position_bias: Tensor | None,
        rel_bias: Tensor | None,
        lengths: Tensor | None,
        block: int,
        shift: int,
        repeat: int,
        scale: float,
    ) -> None:
        self._key_shape, self._shift = key.shape, shift
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        key, value = key.flatten(1, 2), value.flatten(1, 2)
        self._columns = block + self._key_shape[2] - 1
        # an odd number of cache lines, so that the rows of a column do not fall into one set of the cache
        self._filled = self._columns + (16 - (self._columns + _SPARE_COLUMNS)) % 32 + _SPARE_COLUMNS
        self._table: Tensor | None = None
        if rel_key is not None:
            self._table = F.pad(
                rel_key.flip(1).float(), (0, -rel_key.shape[2] % 32, 0, self._filled - self._columns)
            )
        across = (
            None if self._table is None else self._table[..., : query.shape[3]].transpose(1, 2).contiguous()
        )
        content, position, bias = (
            None if x is None else x.float() for x in (content_bias, position_bias, rel_bias)
        )
        lengths = None if lengths is None else lengths.to(torch.int64).clamp(0, self._key_shape[2])
        self._query = query
        self._out = query.new_empty(query.shape)
        self._alive = (key, value, across, content, position, bias, lengths)
        self._job = _C.Attention(
            query=query.data_ptr(),
            query_strides=query.stride()[:3],
            key=key.data_ptr(),
            key_strides=key.stride()[:3],
            value=value.data_ptr(),
            value_strides=value.stride()[:3],
            table=_address(across),
            columns=self._filled,
            content_bias=_address(content),
            position_bias=_address(position),
            rel_bias=_address(bias),
            lengths=_address(lengths),
            out=self._out.data_ptr(),
            query_shape=query.shape,
            key_shape=self._key_shape[:4],
            block=block,
            shift=shift,
            repeat=repeat,
            scale=scale,
            # an older extension does not know the word
            **({"bf16": True} if query.dtype == torch.bfloat16 else {}),
        )

    def forward(self) -> Tensor:
        self._out[:, : self._shift] = 0
        _C.attend_cpu(self._job, torch.get_num_threads())
        return self._out

    def backward(self, grad_out: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        """Gradients of query, key, value, rel_key, content_bias, position_bias and rel_bias, given or not."""
        query, table = self._query, self._table
        heads, size = query.shape[2:]
        parts = min(self._key_shape[0], -(-_PARTS // self._key_shape[3]))
        grad_out, out = grad_out.contiguous(), out.contiguous()
        grad_query = query.new_empty(query.shape)
        grad_query[:, : self._shift] = 0
        grad_key, grad_value = query.new_empty(self._key_shape), query.new_empty(self._key_shape)
        wide = size + -size % 32
        summed = query.new_empty(0, dtype=torch.float32)
        grad_table = summed.new_zeros(0 if table is None else parts, heads, self._filled, wide)
        grad_bias = summed.new_zeros(parts, heads, self._filled)
        grad_content, grad_position = summed.new_zeros(2, parts, heads, size)
        job = _C.Gradients(
            grad_out=grad_out.data_ptr(),
            out=out.data_ptr(),
            table_rows=_address(table),
            grad_query=grad_query.data_ptr(),
            grad_key=grad_key.data_ptr(),
            grad_value=grad_value.data_ptr(),
            grad_table=grad_table.data_ptr(),
            grad_bias=grad_bias.data_ptr(),
            grad_content=grad_content.data_ptr(),
            grad_position=grad_position.data_ptr(),
            parts=parts,
            wide=wide,
        )
        _C.attend_backward_cpu(self._job, job, torch.get_num_threads())
        return (
            grad_query,
            grad_key,
            grad_value,
            grad_table.sum(0)[:, : self._columns, :size].flip(1),
            grad_content.sum(0),
            grad_position.sum(0),
            grad_bias.sum(0)[:, : self._columns].flip(1),
        )


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
