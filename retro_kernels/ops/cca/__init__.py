"""Chunked cross-attention and its family: attention inside small blocks with relative positions."""

from retro_kernels.ops.cca.op import block_attention, chunked_cross_attention

__all__ = ["block_attention", "chunked_cross_attention"]
