"""One retrieval set spread over the ranks of torch.distributed, with the results of one set.

Each rank holds a set of its own, built from its share of the documents (`retro-kernels index --part`). The queries of
all ranks go to all ranks; each searches its shard; the shards' first k are merged by distance. Chunk and document ids
are those of the sets laid one after another in the order of ranks. What travels is small: tokens and keys of the
queries out, k distances and ids back, then the tokens of the neighbours that were chosen.

What a rank does alone may fail there alone. Before the ranks meet again each says whether it did: all of them raise
then, where the others would wait for it for ever (`ranks.together`).

Shapes: W ranks, Q queries of this rank, M tokens of a chunk, k neighbours, E excluded documents, D width of a key.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from retro_kernels.config import InputError
from retro_kernels.ranks import together
from retro_kernels.retrieval.retriever import Retriever
from retro_kernels.retrieval.search import DenseSearcher, to_device
from retro_kernels.retrieval.store import as_integers

_NAME = "ShardedRetriever"


class ShardedRetriever(Retriever):
    """A `Retriever` whose set lies on all ranks. Every call but the constants is collective: all ranks make it, in the
    same order, with the same num_neighbours; the number of sequences may differ, and be 0. What raises on one rank
    raises on all.

    It has a process group of its own, so a prefetching thread does not meet the training's collectives.
    """

    collective = True

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **options: Any) -> ShardedRetriever:  # type: ignore[override]
        """Opens this rank's set. Options as for `Retriever.from_pretrained`, of retriever="dense". Collective.

        InputError, on every rank, where one of them cannot open its set, or the sets have different tokenizers,
        embedders or chunk sizes."""
        if options.get("retriever", "dense") != "dense":
            raise InputError("ShardedRetriever: only the dense retriever is sharded.")
        for name in ("neighbours", "cache", "drop_copies"):
            if options.get(name):
                raise InputError(f"ShardedRetriever: {name} is not available for a sharded set.")
        _check_initialised()
        with together(None, _meeting_place(), _NAME):
            local = Retriever.from_pretrained(path, **options)
        return cls.of(local)

    @classmethod
    def of(cls, local: Retriever) -> ShardedRetriever:
        """From this rank's dense retriever. Collective.

        InputError, on every rank, where one of them cannot be taken."""
        _check_initialised()
        with together(None, _meeting_place(), _NAME):
            if not isinstance(local.searcher, DenseSearcher) or not local.searcher.embed_unknown:
                raise InputError("ShardedRetriever: a dense retriever with its embedder is needed.")
            if local.drop_copies is not None:
                raise InputError("ShardedRetriever: drop_copies is not available for a sharded set.")
        made = cls(
            local.store,
            local.searcher,
            documents=local._documents,
            device=local.device,
            device_store=local.device_store,
            stats=local.stats,
        )
        made.name, made.candidates = local.name, local.candidates
        made._join()
        return made

    def _join(self) -> None:
        self.group = dist.new_group()
        self.rank, self.world = dist.get_rank(self.group), dist.get_world_size(self.group)
        manifest = self.store.manifest
        fingerprints = (manifest[name]["fingerprint"] for name in ("tokenizer", "embedder"))
        mine = (self.chunk_size, *fingerprints, self.candidates)
        sizes = (self.store.num_chunks, self.store.num_documents)
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(
            everyone, (mine, sizes, self._documents.counts.cpu().numpy()), group=self.group
        )
        for rank, (theirs, _, _) in enumerate(everyone):
            if theirs != everyone[0][0]:
                raise InputError(
                    f"ShardedRetriever: the sets of ranks 0 and {rank} have different chunk sizes, tokenizers or "
                    "embedders, or another metric is asked for. Build all parts with the same ones, and open them with "
                    "the same options."
                )
        chunks, documents = (np.cumsum([0, *(one[1][i] for one in everyone)]) for i in (0, 1))
        self._first_chunk, self._first_document = int(chunks[self.rank]), int(documents[self.rank])
        self._all_chunks, self._all_documents = int(chunks[-1]), int(documents[-1])
        # chunks of a document lie side by side: where documents end tells whose a chunk is
        ends = np.cumsum(np.concatenate([one[2] for one in everyone]))
        self._ends = torch.from_numpy(ends).to(self.device)

    def _called(self) -> str:
        return f"the retrieval set on {self.world} ranks"

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        return together(self.group, self.device, _NAME)

    @property
    def num_chunks(self) -> int:
        return self._all_chunks

    @property
    def num_documents(self) -> int:
        return self._all_documents

    def documents(self, ids: Tensor) -> Tensor:
        """See `Retriever.documents`; not collective."""
        ids = self._chunk_ids(ids)
        found = torch.searchsorted(self._ends, ids.to(self.device).clamp(min=0), right=True).to(ids.device)
        return torch.where(ids >= 0, found, -1)

    def find_documents(self, hashes: Iterable[int]) -> Tensor:
        """See `Retriever.find_documents`. Collective; each rank may ask for others."""
        with self._alone():
            mine = as_integers("hashes", hashes).tolist()
        asked: list[Any] = [None] * self.world
        dist.all_gather_object(asked, mine, group=self.group)
        with self._alone():
            found = [np.asarray(self.store.find_documents(theirs), dtype=np.int64) for theirs in asked]
        joined = torch.from_numpy(np.concatenate(found)).to(self.device)
        joined = torch.where(joined >= 0, joined + self._first_document, self._all_documents)
        dist.all_reduce(joined, dist.ReduceOp.MIN, group=self.group)
        joined = torch.where(joined < self._all_documents, joined, -1)
        return joined.cpu().split([len(theirs) for theirs in asked])[self.rank]

    def titles(self, document_ids: Any) -> list[str]:
        """See `Retriever.titles`. Collective."""
        with self._alone():
            wanted = as_integers("document_ids", document_ids).tolist()
            if bad := [i for i in wanted if not -1 <= i < self.num_documents]:
                raise InputError(
                    f"There is no document {bad[0]}: {self._called()} has documents 0 to {self.num_documents - 1:,}."
                )
        asked: list[Any] = [None] * self.world
        dist.all_gather_object(asked, wanted, group=self.group)
        here = range(self._first_document, self._first_document + self.store.num_documents)
        mine = sorted({i for theirs in asked for i in theirs if i in here})
        known: list[Any] = [None] * self.world
        with self._alone():
            titles = self.store.titles([i - self._first_document for i in mine])
        dist.all_gather_object(known, dict(zip(mine, titles, strict=True)), group=self.group)
        table = {i: title for theirs in known for i, title in theirs.items()}
        return [table[i] if i >= 0 else "" for i in wanted]

    def _queries(self, tokens: Tensor, k: int, exclude: Tensor | None) -> tuple[Tensor, int, Tensor | None]:
        with self._alone():
            return super()._queries(tokens, k, exclude)

    def _text_queries(self, texts: list[str], k: int) -> tuple[Tensor, int]:
        with self._alone():
            return super()._text_queries(texts, k)

    def search(
        self, queries: Tensor, k: int, exclude: Tensor | None = None, *, keep_copies: bool = False
    ) -> tuple[Tensor, Tensor]:
        """See `Retriever.search`. Collective."""
        with self.stats.time("exchange"):
            excluded = (
                torch.zeros(len(queries), 0, dtype=torch.int64, device="cpu") if exclude is None else exclude
            )
            everyones, rows = self._share(to_device(queries, self.device), k)
            excludes, _ = self._share(to_device(excluded, self.device), k, fill=-1)
        self.stats.queries += len(queries)
        real = (everyones != self.tokenizer.pad_id).any(1)
        keys = self._keys(everyones, rows, real)
        local = excludes - self._first_document
        local = torch.where((local >= 0) & (local < self.store.num_documents), local, -1)
        with self._alone():
            distances, ids = self.searcher.search_keys(keys, k, local)  # type: ignore[attr-defined]
        distances = distances.masked_fill(~real[:, None], torch.inf)
        ids = torch.where((ids >= 0) & real[:, None], ids + self._first_chunk, -1)
        with self.stats.time("exchange"):
            # [Q, W·k], shard by shard, so that ids ascend among equal distances
            distances = torch.cat([part[rows] for part in self._gathered(distances)], 1)
            ids = torch.cat([part[rows] for part in self._gathered(ids)], 1)
            distances, order = distances.sort(dim=1, stable=True)
        return distances[:, :k], ids.gather(1, order)[:, :k]

    def _keys(self, queries: Tensor, rows: slice, real: Tensor) -> Tensor:
        """The key of every rank's queries on every rank: from the first shard that has the chunk, else embedded by the
        rank that asks. Each key is added to zeros, so it arrives unchanged."""
        searcher = self.searcher
        assert isinstance(searcher, DenseSearcher)
        with self.stats.time("lookup"):
            with self._alone():
                known, found = (to_device(x, self.device) for x in searcher.known_keys(queries))
            owner = torch.where(known, self.rank, self.world)
            dist.all_reduce(owner, dist.ReduceOp.MIN, group=self.group)
            keys = torch.where((owner == self.rank)[:, None], found, 0.0)
        own = torch.arange(rows.start, rows.stop, device=self.device)
        unknown = own[(owner[own] == self.world) & real[own]]
        self.stats.embedded += unknown.numel()
        searched = int(real[own].sum())
        self.stats.looked_up += searched - unknown.numel()
        self.stats.padding += len(own) - searched
        with self._alone():
            if unknown.numel():
                with self.stats.time("embed"):
                    keys[unknown] = to_device(searcher.embed(queries[unknown]), self.device)
        with self.stats.time("exchange"):
            dist.all_reduce(keys, group=self.group)
        return keys

    def gather(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """See `Retriever.gather`. Collective: each rank hands out the tokens that it holds."""
        flat, rows = self._share(to_device(ids.reshape(-1, 1), self.device), 0, fill=-1)
        local = flat[:, 0] - self._first_chunk
        local = torch.where((flat[:, 0] >= 0) & (local >= 0) & (local < self.store.num_chunks), local, -1)
        with self._alone():
            tokens, lengths = super().gather(local)
        tokens = tokens.to(torch.int32)  # which are 0 where the id is −1
        dist.all_reduce(tokens, group=self.group)
        dist.all_reduce(lengths, group=self.group)
        return (
            tokens[rows].long().view(*ids.shape, 2 * self.chunk_size).to(ids.device),
            lengths[rows].view(ids.shape).to(ids.device),
        )

    def _share(self, x: Tensor, k: int, fill: int = 0) -> tuple[Tensor, slice]:
        """Every rank's [Q, width] below one another, filled up to the same width, and the rows that are this rank's."""
        sizes = torch.stack(
            self._gathered(torch.tensor([len(x), x.shape[1], k], device=self.device))
        ).tolist()
        if len({size[2] for size in sizes}) > 1:
            raise ValueError(
                f"ShardedRetriever: the ranks ask for different numbers of neighbours, {[s[2] for s in sizes]}."
            )
        longest, width = (max(size[i] for size in sizes) for i in (0, 1))
        padded = torch.full((longest, width), fill, dtype=torch.int64, device=self.device)
        padded[: len(x), : x.shape[1]] = x
        start = sum(size[0] for size in sizes[: self.rank])
        whole = torch.cat([part[: size[0]] for part, size in zip(self._gathered(padded), sizes, strict=True)])
        return whole, slice(start, start + len(x))

    def _gathered(self, x: Tensor) -> list[Tensor]:
        """Every rank's x, all of one shape."""
        parts = [torch.zeros_like(x) for _ in range(self.world)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return parts


def _check_initialised() -> None:
    if not dist.is_initialized():
        raise InputError(
            "ShardedRetriever: torch.distributed is not initialised. Start with torchrun and call "
            "torch.distributed.init_process_group first; one process needs Retriever only."
        )


def _meeting_place() -> torch.device:
    """Where tensors of the default group's collectives lie."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
