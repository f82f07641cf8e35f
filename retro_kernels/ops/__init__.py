"""Functions on tensors: the kernels and their functional API."""

from retro_kernels.ops._backend import pick_backend, use_backend
from retro_kernels.ops.cca import (
    absorbed_cross_attention,
    absorbed_decode,
    block_attention,
    choose_projection,
    chunked_cross_attention,
    chunked_cross_attention_decode,
)
from retro_kernels.ops.gather import NeighbourBatch, gather_embeddings, gather_neighbours

__all__ = [
    "NeighbourBatch",
    "absorbed_cross_attention",
    "absorbed_decode",
    "block_attention",
    "choose_projection",
    "chunked_cross_attention",
    "chunked_cross_attention_decode",
    "gather_embeddings",
    "gather_neighbours",
    "pick_backend",
    "use_backend",
]
