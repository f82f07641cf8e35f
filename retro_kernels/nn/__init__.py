"""Modules: thin layers over `retro_kernels.ops`."""

from .attention import BlockAttention, ChunkedCrossAttention, SelfAttention
from .cache import DecodingCache
from .encoder import NeighbourEncoder
from .layers import FeedForward, RMSNorm
from .model import DecoderLayer, Retro
from .retrofit import RetroFitted

__all__ = [
    "BlockAttention",
    "ChunkedCrossAttention",
    "DecoderLayer",
    "DecodingCache",
    "FeedForward",
    "NeighbourEncoder",
    "RMSNorm",
    "Retro",
    "RetroFitted",
    "SelfAttention",
]
