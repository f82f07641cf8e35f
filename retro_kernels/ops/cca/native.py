"""Block attention in C++ (csrc/cpu/attention.cpp): addresses, sizes and strides."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from retro_kernels.ops.gather.native import WHY_NOT

_SPARE_COLUMNS = 64
"""What the vectors may read behind the table."""

if WHY_NOT is None:
    from retro_kernels import _C

    WORKS: bool = _C.attend_cpu_works()
else:
    WORKS = False


def attend(
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
) -> Tensor:
    """As `op.py` describes a backend's forward, for float32 and without dropout."""
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    flat_key, flat_value = key.flatten(1, 2), value.flatten(1, 2)
    table = None
    if rel_key is not None:
        # an odd number of cache lines, so that the rows of a column do not fall into one set of the cache
        filling = (16 - (rel_key.shape[1] + _SPARE_COLUMNS)) % 32 + _SPARE_COLUMNS
        table = F.pad(rel_key.flip(1).transpose(1, 2), (0, filling)).contiguous()
    tables = [
        None if x is None else x.to(query.dtype).contiguous() for x in (content_bias, position_bias, rel_bias)
    ]
    lengths = None if lengths is None else lengths.to(torch.int64).contiguous()
    out = query.new_empty(query.shape)
    out[:, :shift] = 0
    job = _C.Attention(
        query=query.data_ptr(),
        query_strides=query.stride()[:3],
        key=flat_key.data_ptr(),
        key_strides=flat_key.stride()[:3],
        value=flat_value.data_ptr(),
        value_strides=flat_value.stride()[:3],
        table=_address(table),
        columns=0 if table is None else table.shape[2],
        content_bias=_address(tables[0]),
        position_bias=_address(tables[1]),
        rel_bias=_address(tables[2]),
        lengths=_address(lengths),
        out=out.data_ptr(),
        query_shape=query.shape,
        key_shape=key.shape[:4],
        block=block,
        shift=shift,
        repeat=repeat,
        scale=scale,
    )
    _C.attend_cpu(job, torch.get_num_threads())
    return out


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
