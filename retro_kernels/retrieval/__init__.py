"""Chunks to neighbours: the retrieval set on disk, its index, and the retriever that a training step calls.

The names here are resolved on first use, so that opening a set does not import what building one needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .build import build_retrieval_set
    from .embedder import Embedder, HashingEmbedder, load_embedder
    from .index import Index
    from .merge import append_to_retrieval_set, merge_retrieval_sets, tune_retrieval_set
    from .retriever import Retriever
    from .store import ChunkStore

_HOME = {
    "ChunkStore": "store",
    "Embedder": "embedder",
    "HashingEmbedder": "embedder",
    "Index": "index",
    "Retriever": "retriever",
    "append_to_retrieval_set": "merge",
    "build_retrieval_set": "build",
    "load_embedder": "embedder",
    "merge_retrieval_sets": "merge",
    "tune_retrieval_set": "merge",
}
__all__ = [
    "ChunkStore",
    "Embedder",
    "HashingEmbedder",
    "Index",
    "Retriever",
    "append_to_retrieval_set",
    "build_retrieval_set",
    "load_embedder",
    "merge_retrieval_sets",
    "tune_retrieval_set",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
