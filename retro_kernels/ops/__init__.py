"""Functions on tensors: the kernels and their functional API."""

from retro_kernels.ops._backend import pick_backend, use_backend
from retro_kernels.ops.cca import block_attention, chunked_cross_attention
from retro_kernels.ops.gather import NeighbourBatch, gather_neighbours

__all__ = [
    "NeighbourBatch",
    "block_attention",
    "chunked_cross_attention",
    "gather_neighbours",
    "pick_backend",
    "use_backend",
]
