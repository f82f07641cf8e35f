"""Small retrieval sets in memory, for tests of what is searched in them: the store's own code over arrays made here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from retro_kernels.retrieval.index import Index
from retro_kernels.retrieval.retriever import Retriever
from retro_kernels.retrieval.search import DenseSearcher, DocumentTable, Stats
from retro_kernels.retrieval.store import ChunkStore, hash_chunks

M = 8
VOCAB = 5000


class NumberTokenizer:
    """Token 17 is the word "17"."""

    pad_id, vocab_size, fingerprint = 0, VOCAB, "f" * 64

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Any) -> str:
        return " ".join(str(int(i)) for i in ids if i)

    def decode_batch(self, batch: Any) -> list[str]:
        return [self.decode(ids) for ids in batch]


class BagEmbedder:
    """A random vector for each token, averaged; exact for equal bags of tokens. Counts the texts it was given."""

    name, fingerprint = "bag", "b" * 64

    def __init__(self, dim: int = 16, seed: int = 0) -> None:
        self.dim, self.texts = dim, 0
        self.table = torch.randn(VOCAB, dim, generator=torch.Generator().manual_seed(seed))

    def embed(self, texts: Sequence[str], progress: Any = None) -> Tensor:
        self.texts += len(texts)
        rows = [torch.tensor([int(word) for word in text.split()], dtype=torch.int64) for text in texts]
        return torch.stack([self.table[row].mean(0) if len(row) else torch.zeros(self.dim) for row in rows])


class MemoryStore(ChunkStore):
    """documents: token ids [n] each; chunks are cut as in a set on disk. embeddings: [C, E] or the embedder that makes
    them."""

    def __init__(self, documents: Sequence[Sequence[int]], embeddings: Any) -> None:
        rows, owners = [], []
        for number, tokens in enumerate(documents):
            for start in range(0, len(tokens), M):
                row = list(tokens[start : start + M])
                rows.append(row + [0] * (M - len(row)))
                owners.append(number)
        self._set(np.array(rows, dtype=np.uint16).reshape(-1, M), np.array(owners), embeddings)

    @classmethod
    def of_arrays(cls, chunks: np.ndarray, owners: np.ndarray, embeddings: Any) -> MemoryStore:
        store = cls.__new__(cls)
        store._set(chunks, owners, embeddings)
        return store

    def _set(self, chunks: np.ndarray, owners: np.ndarray, embeddings: Any) -> None:
        self.path = Path("memory")
        self.chunks, self.document_ids = chunks, owners.astype(np.int64)
        self.num_chunks, self.num_documents = len(chunks), int(owners.max()) + 1
        self.chunk_size = M
        self.tokenizer = NumberTokenizer()  # type: ignore[assignment]
        if hasattr(embeddings, "embed"):
            embeddings = embeddings.embed(self.tokenizer.decode_batch(chunks.tolist())).numpy()
        self.embeddings = np.asarray(embeddings, dtype=np.float16)
        hashes = hash_chunks(chunks)
        self._chunk_order = np.argsort(hashes, kind="stable")
        self._chunk_hashes = hashes[self._chunk_order]
        self.document_hashes = np.arange(self.num_documents) * 1000 + 7
        self.manifest = {
            "tokenizer": {"fingerprint": "f" * 64, "vocab_size": VOCAB},
            "embedder": {"name": "bag", "fingerprint": "b" * 64, "dim": self.embeddings.shape[1]},
            "index": {"factory": "Flat"},
            "files": {"chunks.npy": {"sha256": hashes.tobytes().hex()[:64]}},
        }

    def titles(self, document_ids: Any) -> list[str]:
        return [f"document {i}" if i >= 0 else "" for i in np.asarray(document_ids).reshape(-1).tolist()]


class CountingIndex:
    """An index that remembers how many rows were searched with which k."""

    def __init__(self, embeddings: np.ndarray, factory: str = "Flat") -> None:
        self.index = Index.build(embeddings, factory)
        self.calls: list[tuple[int, int]] = []

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        self.calls.append((len(queries), k))
        return self.index.search(queries, k)


def make_documents(num: int, longest: int = 40, shared: bool = True) -> list[list[int]]:
    """Random documents; of several lengths, the last chunk often short."""
    generator = np.random.default_rng(torch.randint(2**31, ()).item())
    top = 60 if shared else VOCAB
    return [generator.integers(1, top, size=int(generator.integers(1, longest))).tolist() for _ in range(num)]


def dense(store: ChunkStore, *, index: Any = None, embedder: Any = None, **options: Any) -> Retriever:
    """A dense retriever over a store in memory."""
    stats, documents = Stats(), DocumentTable(store.document_ids, store.num_documents)
    embedder = embedder or BagEmbedder(store.embeddings.shape[1])
    searcher = DenseSearcher(
        store,
        index or Index.build(store.embeddings, "Flat"),
        lambda: embedder,
        documents=documents,
        stats=stats,
    )
    made = Retriever(store, searcher, documents=documents, stats=stats, **options)
    made.name = made.candidates = "dense"
    return made


def expected(
    store: ChunkStore, keys: Tensor, k: int, exclude: Tensor | None
) -> tuple[list[list[int]], list[list[float]]]:
    """Ids and distances by sorting all chunks, query by query."""
    ids, distances = [], []
    for row, key in enumerate(keys):
        d = (torch.from_numpy(store.embeddings.astype(np.float64)) - key.double()).square().sum(1)
        banned = set() if exclude is None else set(exclude[row].tolist())
        order = [i for i in d.argsort(stable=True).tolist() if store.document_ids[i] not in banned][:k]
        ids.append(order + [-1] * (k - len(order)))
        distances.append([float(d[i]) for i in order] + [float("inf")] * (k - len(order)))
    return ids, distances


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest tensor has that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return made
