"""Functions on tensors: the kernels and their functional API."""

from retro_kernels.ops._backend import pick_backend, use_backend
from retro_kernels.ops.cca import block_attention, chunked_cross_attention

__all__ = ["block_attention", "chunked_cross_attention", "pick_backend", "use_backend"]
