"""BM25: neighbours by shared words, with the library bm25s; and the same weights to re-rank dense candidates
(rerank.py).

At test time BM25 in place of dense retrieval lowers RETRO's perplexity further (Doostmohammadi et al. 2023,
2305.16243).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from retro_kernels.config import InputError
from retro_kernels.retrieval.search import Stats, unfilled
from retro_kernels.retrieval.store import ChunkStore

_BLOCK = 1 << 14


class BM25Searcher:
    """All chunks scored for each query; distances are the negative scores. A chunk that shares no term is no neighbour.

    The index lives in memory and is built when the searcher is made: some seconds and about 600 bytes a chunk.
    """

    def __init__(
        self,
        store: ChunkStore,
        *,
        analyser: Literal["words", "tokens"] = "words",
        k1: float = 0.9,
        b: float = 0.4,
        stats: Stats | None = None,
    ) -> None:
        """analyser: "words" scores lower-case words of the text, "tokens" the tokenizer's ids as they are."""
        if analyser not in ("words", "tokens"):
            raise InputError(f'BM25Searcher: analyser is {analyser!r}; "words" or "tokens" can be had.')
        self.store, self.analyser, self.stats = store, analyser, stats or Stats()
        self._bm25s = _library()
        self._index = self._bm25s.BM25(k1=k1, b=b, method="lucene")
        self._index.index(self._corpus(), create_empty_token=False, show_progress=False)

    def _corpus(self) -> Any:
        store = self.store
        if self.analyser == "tokens":
            ids = [[t for t in row if t] for row in np.asarray(store.chunks).tolist()]
            vocabulary = {str(i): i for i in range(store.tokenizer.vocab_size)}
            return self._bm25s.tokenization.Tokenized(ids=ids, vocab=vocabulary)
        texts: list[str] = []
        for start in range(0, store.num_chunks, _BLOCK):
            rows = [[t for t in row if t] for row in store.chunks[start : start + _BLOCK].tolist()]
            texts += store.tokenizer.decode_batch(rows)
        return self._bm25s.tokenize(texts, stopwords=None, show_progress=False)

    def _terms(self, queries: Tensor) -> list[list[int]]:
        rows = [[t for t in row if t] for row in queries.tolist()]
        if self.analyser == "tokens":
            return rows
        words = self._bm25s.tokenize(
            self.store.tokenizer.decode_batch(rows), stopwords=None, return_ids=False, show_progress=False
        )
        return [self._index.get_tokens_ids(terms) for terms in words]

    def search(self, queries: Tensor, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `search.Searcher.search`. Results are on the host."""
        distances, ids = unfilled(queries.shape[0], k)
        excluded = [[]] * queries.shape[0] if exclude is None else exclude.tolist()
        with self.stats.time("search"):
            for row, terms in enumerate(self._terms(queries)):
                if not terms:
                    continue
                scores = np.array(self._index.get_scores_from_ids(terms), dtype=np.float32)
                for document in excluded[row]:
                    if document >= 0:
                        chunks = self.store.document_chunks(document)
                        scores[chunks.start : chunks.stop] = 0.0
                best = _top(scores, k)
                ids[row, : len(best)] = torch.from_numpy(best)
                distances[row, : len(best)] = torch.from_numpy(-scores[best])
        return distances, ids


def _top(scores: np.ndarray, k: int) -> np.ndarray:
    """The places of the k largest positive scores, largest first, of equal ones the first."""
    positive = np.flatnonzero(scores > 0)
    if len(positive) > k:
        border = np.partition(scores[positive], -k)[-k]
        positive = positive[scores[positive] >= border]
    return positive[np.argsort(-scores[positive], kind="stable")][:k]


def _library() -> Any:
    try:
        import bm25s
    except ImportError:
        raise ImportError("Retrieval by BM25 needs bm25s: pip install bm25s") from None
    return bm25s


class TermWeights:
    """BM25 statistics of a set's chunks by token id, and the score of a few candidates for each query."""

    def __init__(self, store: ChunkStore, k1: float = 0.9, b: float = 0.4, pad_id: int = 0) -> None:
        self.k1, self.b, self.pad_id = k1, b, pad_id
        frequency = np.zeros(store.tokenizer.vocab_size, dtype=np.int64)
        total = 0
        for start in range(0, store.num_chunks, _BLOCK):
            rows = np.sort(store.chunks[start : start + _BLOCK], axis=1)
            first = np.ones(rows.shape, dtype=bool)
            first[:, 1:] = rows[:, 1:] != rows[:, :-1]
            frequency += np.bincount(rows[first], minlength=len(frequency))[: len(frequency)]
            total += int((rows != pad_id).sum())
        self.mean_length = max(total / max(store.num_chunks, 1), 1.0)
        idf = np.log1p((store.num_chunks - frequency + 0.5) / (frequency + 0.5))
        self.idf = torch.from_numpy(idf.astype(np.float32))

    def scores(self, queries: Tensor, candidates: Tensor) -> Tensor:
        """float32 [Q, F] for token ids queries [Q, M] and candidates [Q, F, R]; a repeated query token counts again."""
        real = candidates != self.pad_id
        norm = self.k1 * (1 - self.b + self.b * real.sum(-1) / self.mean_length)
        idf = self.idf.to(queries.device)[queries.long()].masked_fill(queries == self.pad_id, 0.0)
        total = torch.zeros(candidates.shape[:2], device=queries.device)
        for i in range(queries.shape[1]):
            tf = (candidates == queries[:, i, None, None]).sum(-1).float()
            total += idf[:, i, None] * tf / (tf + norm)
        return total
