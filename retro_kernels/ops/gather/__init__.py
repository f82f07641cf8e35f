"""Gathering the tokens of neighbours and their continuations, or their embeddings, out of the chunk store."""

from retro_kernels.ops.gather.op import NeighbourBatch, gather_embeddings, gather_neighbours

__all__ = ["NeighbourBatch", "gather_embeddings", "gather_neighbours"]
