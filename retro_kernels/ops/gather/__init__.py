"""Gathering the tokens of neighbours and their continuations out of the chunk store."""

from retro_kernels.ops.gather.op import NeighbourBatch, gather_neighbours

__all__ = ["NeighbourBatch", "gather_neighbours"]
