"""BM25: neighbours by shared words, or by shared tokens, with the library bm25s; and the weights of shared tokens, to
re-rank dense candidates (rerank.py), for which no index is needed.

At test time BM25 in place of dense retrieval lowers RETRO's perplexity further (Doostmohammadi et al. 2023,
2305.16243).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from retro_kernels.config import InputError
from retro_kernels.data.text import progress_bar
from retro_kernels.data.words import terms
from retro_kernels.retrieval.search import Stats, unfilled
from retro_kernels.retrieval.store import ChunkStore

_BLOCK = 1 << 12
_SLOW = 1 << 15  # chunks of which an index takes some seconds


class BM25Searcher:
    """All chunks scored for each query; distances are the negative scores. A chunk that shares no term is no neighbour.

    The index lives in memory and is built when the searcher is made: a minute for a million chunks, 8 bytes for each
    term of a chunk but its repetitions, and some 45 while bm25s makes it: of tokens 350 and 1,900 bytes a chunk of 64.
    """

    def __init__(
        self,
        store: ChunkStore,
        *,
        analyser: Literal["words", "tokens"] = "words",
        k1: float = 0.9,
        b: float = 0.4,
        stats: Stats | None = None,
        progress: bool = True,
    ) -> None:
        """analyser: "words" scores the words of the text (`terms`), "tokens" the tokenizer's ids as they are.
        progress: bars on standard error, where it takes long."""
        if analyser not in ("words", "tokens"):
            raise InputError(f'BM25Searcher: analyser is {analyser!r}; "words" or "tokens" can be had.')
        self.store, self.analyser, self.stats = store, analyser, stats or Stats()
        bm25s = _library()
        self._vocabulary: dict[str, int] = {}
        if analyser == "tokens":
            self._vocabulary = {str(i): i for i in range(store.tokenizer.vocab_size)}
        progress = progress and store.num_chunks >= _SLOW
        ids = self._corpus(progress)
        self._index = None
        if ids.total:  # bm25s divides by the mean length
            self._index = bm25s.BM25(k1=k1, b=b, method="lucene")
            corpus = bm25s.tokenization.Tokenized(ids=ids, vocab=self._vocabulary)
            self._index.index(corpus, create_empty_token=False, show_progress=progress)

    def _corpus(self, progress: bool) -> _Rows:
        """The terms of every chunk; "words" are numbered as they come."""
        ids = _Rows()
        number = self._vocabulary
        with progress_bar(self.store.num_chunks, "reading for BM25", "chunks", show=progress) as bar:
            for start in range(0, self.store.num_chunks, _BLOCK):
                rows = _without_pads(self.store.chunks[start : start + _BLOCK])
                if self.analyser == "words":
                    texts = self.store.tokenizer.decode_batch(rows)
                    rows = [[number.setdefault(term, len(number)) for term in terms(text)] for text in texts]
                ids.extend(rows)
                bar.update(len(rows))
        return ids

    def _terms(self, queries: Tensor) -> list[list[int]]:
        rows = _without_pads(queries)
        if self.analyser == "tokens":
            return rows
        number = self._vocabulary
        texts = self.store.tokenizer.decode_batch(rows)
        return [[number[term] for term in terms(text) if term in number] for text in texts]

    def search(self, queries: Tensor, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `search.Searcher.search`. Results are on the host."""
        distances, ids = unfilled(queries.shape[0], k)
        excluded = queries.new_zeros(len(queries), 0).cpu() if exclude is None else exclude.cpu()
        with self.stats.time("search"):
            for row, ids_of_terms in enumerate(self._terms(queries)):
                if not ids_of_terms or self._index is None:
                    continue
                scores = np.array(self._index.get_scores_from_ids(ids_of_terms), dtype=np.float32)
                documents = excluded[row].numpy()  # −1 has no chunks
                places = np.searchsorted(self.store.document_ids, [documents, documents + 1])
                for first, last in places.T.tolist():
                    scores[first:last] = 0.0
                best = _top(scores, k)
                ids[row, : len(best)] = torch.from_numpy(best)
                distances[row, : len(best)] = torch.from_numpy(-scores[best])
        return distances, ids


class _Rows:
    """Rows of numbers below 2³¹, 4 bytes each, for bm25s, which reads them row by row: as lists they take ten times as
    much."""

    def __init__(self) -> None:
        self.total = 0
        self._blocks: list[tuple[np.ndarray, np.ndarray]] = []

    def extend(self, rows: list[list[int]]) -> None:
        stops = np.cumsum([len(row) for row in rows])
        self._blocks.append((np.fromiter(chain.from_iterable(rows), np.int32, int(stops[-1])), stops))
        self.total += int(stops[-1])

    def __len__(self) -> int:
        return sum(len(stops) for _, stops in self._blocks)

    def __iter__(self) -> Iterator[list[int]]:
        for numbers, stops in self._blocks:
            start = 0
            for stop in stops.tolist():
                yield numbers[start:stop].tolist()
                start = stop


def _without_pads(rows: Any) -> list[list[int]]:
    return [[t for t in row if t] for row in rows.tolist()]


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
    """BM25 statistics of a set's chunks by token id, and the score of a few candidates for each query: those of
    `BM25Searcher` with the analyser "tokens"."""

    def __init__(self, store: ChunkStore, k1: float = 0.9, b: float = 0.4) -> None:
        self.k1, self.b = k1, b
        frequency = np.zeros(store.tokenizer.vocab_size, dtype=np.int64)
        total = 0
        for start in range(0, store.num_chunks, _BLOCK):
            rows = np.sort(store.chunks[start : start + _BLOCK], axis=1)
            first = np.ones(rows.shape, dtype=bool)
            first[:, 1:] = rows[:, 1:] != rows[:, :-1]
            frequency += np.bincount(rows[first], minlength=len(frequency))[: len(frequency)]
            total += int(np.count_nonzero(rows))
        self.mean_length = max(total / store.num_chunks, 1.0)
        idf = np.log1p((store.num_chunks - frequency + 0.5) / (frequency + 0.5))
        self.idf = torch.from_numpy(idf.astype(np.float32))

    def scores(self, queries: Tensor, candidates: Tensor) -> Tensor:
        """float32 [Q, F] for token ids queries [Q, M] and candidates [Q, F, R]; a repeated query token counts again."""
        real = candidates != 0
        norm = self.k1 * (1 - self.b + self.b * real.sum(-1).float() / self.mean_length)
        idf = self.idf.to(queries.device)[queries.long()].masked_fill(queries == 0, 0.0)
        total = torch.zeros(candidates.shape[:2], dtype=torch.float32, device=queries.device)
        for i in range(queries.shape[1]):
            tf = (candidates == queries[:, i, None, None]).sum(-1).float()
            total += idf[:, i, None] * tf / (tf + norm)
        return total
