"""Fused chunked cross-attention and everything around it: RETRO from raw text to a trained model.

Names are resolved on first use (PEP 562), so `import retro_kernels` imports neither torch nor triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "InputError": "config",
    "RetroConfig": "config",
    "preset": "config",
    "retro_172m": "config",
    "retro_425m": "config",
    "retro_1_5b": "config",
    "retro_7_5b": "config",
    "retro_small": "config",
    "retro_tiny": "config",
    "NeighbourBatch": "ops",
    "block_attention": "ops",
    "chunked_cross_attention": "ops",
    "gather_embeddings": "ops",
    "gather_neighbours": "ops",
    "use_backend": "ops",
    "ChunkedCrossAttention": "nn",
    "NeighbourEncoder": "nn",
    "Retro": "nn",
    "RetroFitted": "nn",
    "Tokenizer": "data",
    "Retriever": "retrieval",
    "build_retrieval_set": "retrieval",
}
__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from .config import (
        InputError,
        RetroConfig,
        preset,
        retro_1_5b,
        retro_7_5b,
        retro_172m,
        retro_425m,
        retro_small,
        retro_tiny,
    )
    from .data import Tokenizer
    from .nn import ChunkedCrossAttention, NeighbourEncoder, Retro, RetroFitted
    from .ops import (
        NeighbourBatch,
        block_attention,
        chunked_cross_attention,
        gather_embeddings,
        gather_neighbours,
        use_backend,
    )
    from .retrieval import Retriever, build_retrieval_set


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'retro_kernels' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
