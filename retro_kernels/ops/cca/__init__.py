"""Chunked cross-attention and its family: attention inside small blocks with relative positions."""

from retro_kernels.ops.cca.absorbed import absorbed_cross_attention
from retro_kernels.ops.cca.decode import absorbed_decode, chunked_cross_attention_decode
from retro_kernels.ops.cca.op import block_attention, chunked_cross_attention
from retro_kernels.ops.cca.projection import choose_projection

__all__ = [
    "absorbed_cross_attention",
    "absorbed_decode",
    "block_attention",
    "choose_projection",
    "chunked_cross_attention",
    "chunked_cross_attention_decode",
]
