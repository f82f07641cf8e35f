"""A second look at a searcher's candidates: by BM25 of the tokenizer's ids, by edit distance or by the longest
common run of tokens.

Edit distance as in Gu et al. 2018 (1705.07267): a shortlist, then the normalised distance D / max(lengths); BM25 over
dense candidates as in Doostmohammadi et al. 2023 (2305.16243). Shapes as in search.py; F candidates of R tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from retro_kernels.config import InputError
from retro_kernels.retrieval.bm25 import TermWeights
from retro_kernels.retrieval.leakage import common_runs, own_lengths
from retro_kernels.retrieval.search import Searcher, Stats
from retro_kernels.retrieval.store import ChunkStore

MEASURES = ("bm25", "edit", "run")
_BLOCK = 64  # queries at a time


class Reranker:
    """The best k of another searcher's `fetch` first candidates, by another measure; its distances are that
    measure's. `inner` may take its candidates from a file or a cache; this may not be in one itself, since what it
    chooses depends on all that is excluded."""

    def __init__(
        self, inner: Searcher, store: ChunkStore, by: str, *, fetch: int = 64, stats: Stats | None = None
    ) -> None:
        """by: "bm25" (of tokens, distance −score), "edit" (edit distance over the longer length, 0..1), "run" (1 −
        longest common run over the query's length)."""
        if by not in MEASURES:
            raise InputError(f"Reranker: the measure is {by!r}; it must be one of {', '.join(MEASURES)}.")
        if fetch < 1:
            raise InputError(f"Reranker: fetch is {fetch}; at least 1 candidate is needed.")
        self.inner, self.store, self.by, self.fetch, self.stats = inner, store, by, fetch, stats or Stats()
        weights = TermWeights(store) if by == "bm25" else None
        measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "bm25": lambda queries, values: -weights.scores(queries, values),  # type: ignore[union-attr]
            "edit": normalised_edit_distance,
            "run": lambda queries, values: (
                1 - common_runs(queries, values) / own_lengths(queries).clamp(min=1)[:, None]
            ),
        }
        self._measure = measures[by]

    def search(self, queries: Tensor, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `search.Searcher.search`. Of equal candidates the one that came first stays first."""
        _, ids = self.inner.search(queries, max(k, self.fetch), exclude)
        queries = queries.to(ids.device)
        distances = torch.full(ids.shape, torch.inf, dtype=torch.float32, device=ids.device)
        with self.stats.time("rerank"):
            for start in range(0, len(ids), _BLOCK):
                rows = slice(start, start + _BLOCK)
                values = self.store.chunks[ids[rows].clamp(min=0).cpu().numpy()].astype(np.int64)  # [Q, F, M]
                values = torch.from_numpy(values).to(ids.device)
                distances[rows] = self._measure(queries[rows], values).float()
            distances.masked_fill_(ids < 0, torch.inf)
            distances, order = distances.sort(dim=1, stable=True)
        return distances[:, :k], ids.gather(1, order)[:, :k]


def edit_distance(queries: Tensor, values: Tensor, pad_id: int = 0) -> Tensor:
    """Levenshtein distance int64 [Q, F] of token ids queries [Q, M] and values [Q, F, R], trailing pads left out.

    Row i of the table follows from row i − 1 but for the insertions, D[j] = min over j' ≤ j of t[j'] + j − j', which is
    a running minimum of t − j.
    """
    query_lengths, lengths = own_lengths(queries, pad_id), own_lengths(values, pad_id)
    places = torch.arange(values.shape[2] + 1, device=values.device)
    row = places.expand(*values.shape[:2], -1).clone()
    for i in range(queries.shape[1]):
        t = row + 1
        differs = (queries[:, i, None, None] != values).to(row.dtype)
        t[..., 1:] = torch.minimum(t[..., 1:], row[..., :-1] + differs)
        following = (t - places).cummin(-1).values + places
        row = torch.where((i < query_lengths)[:, None, None], following, row)
    return row.gather(2, lengths[..., None]).squeeze(2)


def normalised_edit_distance(queries: Tensor, values: Tensor, pad_id: int = 0) -> Tensor:
    """`edit_distance` over the longer of the two lengths, float32 [Q, F] in 0..1; 0 for two empty ones."""
    longer = torch.maximum(own_lengths(queries, pad_id)[:, None], own_lengths(values, pad_id))
    return edit_distance(queries, values, pad_id) / longer.clamp(min=1)
