"""A retrieval set made of random numbers: as large as a benchmark wants, with the structure that matters for its speed.

Vectors lie around the centres of their documents, those around the centres of subjects, and few directions hold most of
the variance, as with embeddings of sentences (uniformly random ones have no near neighbours, and every approximate
index fails on them). The spreads are such that half of the ten nearest of a chunk are of its own document, as in real
text.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retro_kernels.retrieval.store import hash_chunks

CHUNKS_OF_A_DOCUMENT = 33  # the median in real text
DECAY = 0.8
"""The i-th direction has i^−DECAY of the first one's spread."""


def vectors(n: int, dim: int, device: torch.device, seed: int = 0, out: Tensor | None = None) -> Tensor:
    """fp16 [n, dim], unit length, in the order of their documents; made block by block, into `out` where it is given
    (memory of a mapped file, for one)."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    scale = torch.arange(1, dim + 1, device=device) ** -DECAY
    spread = scale[:, None] * torch.linalg.qr(normal(dim, dim))[0]  # [direction, dim]
    documents = -(-n // CHUNKS_OF_A_DOCUMENT)
    # documents of one subject lie near each other
    subjects = normal(max(1, documents // 50), dim)
    out = torch.empty(n, dim, dtype=torch.float16, device=device) if out is None else out
    step = CHUNKS_OF_A_DOCUMENT * 10_000
    for start in range(0, n, step):
        rows = min(step, n - start)
        count = -(-rows // CHUNKS_OF_A_DOCUMENT)
        subject = torch.randint(0, len(subjects), (count,), generator=generator, device=device)
        centre = subjects[subject] + normal(count, dim)
        block = (centre.repeat_interleave(CHUNKS_OF_A_DOCUMENT, 0)[:rows] + normal(rows, dim)) @ spread
        out[start : start + rows] = torch.nn.functional.normalize(block, dim=1).half()
    return out


class Store:
    """What `Retriever` and its parts read of a `ChunkStore`: tokens, documents, keys; no text and no files."""

    chunk_size = 64

    def __init__(
        self,
        n: int,
        dim: int = 384,
        vocab_size: int = 8192,
        device: torch.device | None = None,
        embeddings: np.ndarray | None = None,
    ) -> None:
        """embeddings: fp16 [n, dim] of `vectors`, where they are at hand."""
        device = device or torch.device("cpu")
        self.num_chunks = n
        self.embeddings = vectors(n, dim, device).cpu().numpy() if embeddings is None else embeddings
        tokens = torch.randint(1, vocab_size, (n, self.chunk_size), device=device, dtype=torch.int32)
        self.chunks = tokens.cpu().numpy().astype(np.uint16)
        self.document_ids = np.arange(n, dtype=np.int64) // CHUNKS_OF_A_DOCUMENT
        self.num_documents = int(self.document_ids[-1]) + 1
        self.continuation = np.append(self.document_ids[1:] == self.document_ids[:-1], False)
        self.tokenizer = SimpleNamespace(pad_id=0)
        self.manifest: dict[str, Any] = {
            "tokenizer": {"vocab_size": vocab_size, "fingerprint": "random"},
            "index": {"factory": "Flat"},
            "embedder": {"dim": dim},
        }
        self._hashes: np.ndarray | None = None

    def find_chunks(self, tokens: Any) -> np.ndarray:
        """The id of each chunk [n, M], −1 where the set has none."""
        if self._hashes is None:
            hashes = hash_chunks(self.chunks)
            self._order = np.argsort(hashes)
            self._hashes = hashes[self._order]
        rows = np.ascontiguousarray(np.asarray(tokens).astype(np.uint16))
        place = np.searchsorted(self._hashes, hash_chunks(rows)).clip(max=self.num_chunks - 1)
        ids = self._order[place]
        return np.where((self.chunks[ids] == rows).all(1), ids, -1)
