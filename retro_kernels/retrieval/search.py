"""From query chunks to neighbour ids: the protocol of all retrievers, the exclusion of documents, and dense search.

A searcher is anything with `search(queries, k, exclude) -> (distances, ids)`. Excluding documents is not left to an
index: FAISS on the GPU ignores selectors, and none has a selector per query. So more is fetched than needed, dropped by
document id on the device, and where a row ran short, for that row alone the fetch is widened, and at last every chunk
outside its excluded documents is compared.

Shapes: Q queries, M tokens of a query chunk, k neighbours wanted, F candidates fetched, E excluded documents, C chunks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from retro_kernels.config import InputError
from retro_kernels.ops._backend import numbered
from retro_kernels.retrieval.embedder import TextEmbedder, embedded
from retro_kernels.retrieval.store import ChunkStore

# FAISS on the GPU returns no more, for some kinds of indexes fewer; beyond it a row is cheaper compared with everything
WIDEST_FETCH = 2048
_GROWTH = 4
# The same for every k up to 16, since an index that refines or walks a graph finds others where more is asked for. On
# real text a fetch of 50 fills nearly all rows where k = 2; many stay short with 13.
_FIRST_FETCH = 64
_SCAN_ROWS = 1 << 16  # chunks compared at a time …
_SCAN_QUERIES = 256  # … with this many queries: 64 MiB of distances
_PENDING_ELEMENTS = 1 << 24  # candidates in flight while widening
_FEW_EXCLUDED = 32  # documents that are compared one after another; more are looked up


class Searcher(Protocol):
    """What a retriever asks for neighbours."""

    def search(self, queries: Tensor, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k nearest chunks of each query outside its excluded documents.

        queries: int64 [Q, M] token ids, padded at the end with 0. exclude: int64 [Q, E] document ids, −1 = none.
        Returns distances float32 [Q, k], ascending, and ids int64 [Q, k]; +inf and −1 where nothing is left.
        """
        ...


@dataclass
class Stats:
    """Where the time of retrieval went, in seconds of the calling thread, and what was counted."""

    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("lookup", "embed", "search", "filter", "gather"), 0.0)
    )
    calls: int = 0
    queries: int = 0
    padding: int = 0
    """Chunks wholly of padding: not searched."""
    looked_up: int = 0
    embedded: int = 0
    reused: int = 0
    """Rows taken from a cache or a file of neighbours."""
    widened: int = 0
    """Rows that ran short at the first fetch."""
    scanned: int = 0
    """Rows compared with every admissible chunk."""

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def to_dict(self) -> dict[str, Any]:
        counts = {name: value for name, value in vars(self).items() if name != "seconds"}
        return {**counts, **{f"{stage}_seconds": value for stage, value in self.seconds.items()}}

    def reset(self) -> None:
        self.__dict__.update(Stats().__dict__)


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """x on the device, over pinned memory, so that nothing waits on the way to a GPU."""
    device = torch.device(device)
    return (
        x.pin_memory().to(device, non_blocking=True) if x.is_cpu and device.type == "cuda" else x.to(device)
    )


def take_first(distances: Tensor, ids: Tensor, keep: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k kept candidates of each row, in their order: [Q, F] → [Q, k], filled with +inf and −1. Waits for
    nothing on a GPU."""
    place = keep.long().cumsum(1) - 1
    place = torch.where(keep & (place < k), place, k)
    rows = ids.shape[0]
    out = torch.full((rows, k + 1), torch.inf, dtype=torch.float32, device=ids.device)
    out_ids = torch.full((rows, k + 1), -1, dtype=torch.int64, device=ids.device)
    out.scatter_(1, place, distances.float())
    out_ids.scatter_(1, place, ids)
    return out[:, :k], out_ids[:, :k]


def settle_ties(distances: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Equally near candidates in the order of their ids. An index gives copies of a text in any order, another one for
    another batch size. On a GPU nothing is done: it would cost two sorts of every row, or a wait."""
    if distances.is_cuda or distances.shape[1] < 2:
        return distances, ids
    tied = ((distances[:, 1:] == distances[:, :-1]) & (ids[:, 1:] >= 0)).any(1).nonzero().squeeze(1)
    if not tied.numel():
        return distances, ids
    row_ids, order = ids[tied].sort(dim=1)
    row, again = distances[tied].gather(1, order).sort(dim=1, stable=True)
    distances, ids = distances.clone(), ids.clone()
    distances[tied], ids[tied] = row, row_ids.gather(1, again)
    return distances, ids


def unfilled(num: int, k: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Distances [num, k] of +inf and ids [num, k] of −1."""
    return (
        torch.full((num, k), torch.inf, dtype=torch.float32, device=device),
        torch.full((num, k), -1, dtype=torch.int64, device=device),
    )


class DocumentTable:
    """The document of every chunk, and how many chunks each document has, on one device."""

    def __init__(self, document_ids: Any, num_documents: int, device: torch.device | str = "cpu") -> None:
        """document_ids: int64 [C], each below num_documents; there is a chunk."""
        ids = torch.from_numpy(np.array(document_ids, dtype=np.int64))
        counts = torch.bincount(ids, minlength=num_documents)
        self.num_chunks, self.num_documents = ids.numel(), num_documents
        self.longest = int(counts.max())
        self.document_ids, self.counts = ids.to(device), counts.to(device)

    def of(self, ids: Tensor) -> Tensor:
        """The document of each chunk id; −1 for −1."""
        return torch.where(ids >= 0, self.document_ids[ids.clamp(min=0)], -1)

    def allowed(self, ids: Tensor, exclude: Tensor | None) -> Tensor:
        """bool [Q, F]: a chunk, and of no excluded document. ids [Q, F], exclude [Q, E]."""
        keep = ids >= 0
        if exclude is not None and exclude.shape[1]:
            documents = self.of(ids)
            if exclude.shape[1] > _FEW_EXCLUDED:
                listed = exclude.sort(dim=1).values
                place = torch.searchsorted(listed, documents.contiguous()).clamp_(max=exclude.shape[1] - 1)
                return keep & (listed.gather(1, place) != documents)
            for column in exclude.unbind(1):  # [Q, F, E] at once might be large
                keep &= documents != column[:, None]
        return keep

    def num_excluded(self, exclude: Tensor) -> Tensor:
        """int64 [Q]: chunks of the excluded documents, each document counted once."""
        listed = exclude.sort(dim=1).values
        first = torch.ones_like(listed, dtype=torch.bool)
        first[:, 1:] = listed[:, 1:] != listed[:, :-1]
        real = first & (listed >= 0) & (listed < self.num_documents)
        return torch.where(real, self.counts[listed.clamp(0, self.num_documents - 1)], 0).sum(1)


Candidates = Callable[["Tensor | None", int], "tuple[Tensor, Tensor]"]
Scan = Callable[[Tensor, int], "tuple[Tensor, Tensor]"]


def search_excluding(
    candidates: Candidates,
    documents: DocumentTable,
    num_queries: int,
    k: int,
    exclude: Tensor | None,
    *,
    scan: Scan | None,
    stats: Stats | None = None,
    max_fetch: int = WIDEST_FETCH,
    waits: bool = False,
) -> tuple[Tensor, Tensor]:
    """The first k candidates of each query that are of no excluded document, [num_queries, k].

    candidates(rows, fetch): distances and ids [n, fetch], ascending, of the queries `rows` (None = all).
    scan(rows, k): the k best admissible ones for certain, dearer. None: a row ends where `candidates` ends.
    waits: candidates are found on the host, whatever device they are given on.

    Where the first fetch covers the largest documents that could be excluded, a GPU is never waited for; else once, to
    learn which rows ran short.
    """
    stats = stats if stats is not None else Stats()
    most = k if exclude is None else k + exclude.shape[1] * documents.longest
    most = min(most, documents.num_chunks)
    without_waiting = documents.document_ids.is_cuda and not waits and most <= max_fetch
    fetch = most if exclude is None or without_waiting else max(_GROWTH * k, _FIRST_FETCH)
    fetch = min(fetch, documents.num_chunks, max_fetch)
    with stats.time("search"):
        distances, ids = candidates(None, fetch)
    with stats.time("filter"):
        distances, ids = take_first(distances, ids, documents.allowed(ids, exclude), k)
        if without_waiting:
            return distances, ids
        available = documents.num_chunks - (0 if exclude is None else documents.num_excluded(exclude))
        wanted = torch.as_tensor(available, device=ids.device).clamp(max=k).expand(num_queries)
        short = ((ids >= 0).sum(1) < wanted).nonzero().squeeze(1)
    stats.widened += short.numel()
    while short.numel() and fetch < min(max_fetch, most):
        fetch = min(fetch * _GROWTH, max_fetch, most)
        for rows in short.split(max(1, _PENDING_ELEMENTS // fetch)):
            with stats.time("search"):
                found, found_ids = candidates(rows, fetch)
            with stats.time("filter"):
                keep = documents.allowed(found_ids, None if exclude is None else exclude[rows])
                distances[rows], ids[rows] = take_first(found, found_ids, keep, k)
        short = short[(ids[short] >= 0).sum(1) < wanted[short]]
    if short.numel() and scan is not None:
        stats.scanned += short.numel()
        with stats.time("search"):
            distances[short], ids[short] = scan(short, k)
    return distances, ids


def scan_exact(
    keys: Tensor,
    embeddings: Any,
    documents: DocumentTable,
    exclude: Tensor | None,
    k: int,
    *,
    inner_product: bool = False,
) -> tuple[Tensor, Tensor]:
    """The k nearest chunks of no excluded document by comparing with all of them: [Q, k].

    keys float32 [Q, D]; embeddings [C, D], a tensor or a (memory-mapped) array read block by block.
    Distances are squared L2, or the negative inner product. Memory does not grow with Q or C but for the results.
    """
    best, best_ids = unfilled(keys.shape[0], k, keys.device)
    for start in range(0, documents.num_chunks, _SCAN_ROWS):
        rows = embeddings[start : start + _SCAN_ROWS]
        as_tensor = torch.from_numpy(np.array(rows)) if isinstance(rows, np.ndarray) else rows
        block = as_tensor.to(keys.device, torch.float32)
        owners, squares = documents.document_ids[start : start + len(block)], block.square().sum(1)
        if exclude is not None:  # looked up: all of E compared with each chunk took hours
            present, places = owners.unique(return_inverse=True)
        for first in range(0, len(keys), _SCAN_QUERIES):
            part = slice(first, first + _SCAN_QUERIES)
            with torch.autocast(keys.device.type, enabled=False):  # that of a caller's training step
                d = keys[part] @ block.T  # [queries, chunks]
            if inner_product:
                d.neg_()
            else:
                d.mul_(-2).add_(keys[part].square().sum(1, keepdim=True)).add_(squares).clamp_(min=0)
            if exclude is not None:
                d.masked_fill_(_which(present, exclude[part])[:, places], torch.inf)
            d, place = d.topk(min(k, d.shape[1]), largest=False)
            d, ids = torch.cat([best[part], d], 1), torch.cat([best_ids[part], place + start], 1)
            d, order = d.sort(dim=1, stable=True)  # what was there comes first: −1 before what is excluded
            best[part], best_ids[part] = d[:, :k], ids.gather(1, order[:, :k])
    return best, best_ids


def _which(present: Tensor, exclude: Tensor) -> Tensor:
    """bool [Q, P]: which of `present` [P], ascending, are in each row of `exclude` [Q, E]."""
    place = torch.searchsorted(present, exclude)
    there = present[place.clamp(max=len(present) - 1)] == exclude
    banned = torch.zeros(len(exclude), len(present) + 1, dtype=torch.bool, device=exclude.device)
    return banned.scatter_(1, place.masked_fill_(~there, len(present)), True)[:, :-1]


class DenseSearcher:
    """Nearest embeddings. A query chunk that is itself in the set has its key there; any other is embedded."""

    def __init__(
        self,
        store: ChunkStore,
        index: Any,
        load_embedder: Callable[[], TextEmbedder],
        *,
        documents: DocumentTable,
        stats: Stats | None = None,
        device: torch.device | str = "cpu",
        device_store: DeviceStore | None = None,
        look_up: bool = True,
        embed_unknown: bool = True,
        inner_product: bool = False,
    ) -> None:
        """load_embedder is called when the first unknown chunk arrives. look_up=False: queries have an encoder of their
        own (DPR), so the set's keys are none of theirs. embed_unknown=False: a chunk that is not in the set gets no
        neighbours, and a GPU is not waited for to learn which chunks these are."""
        self.store, self.index, self.documents, self.stats = store, index, documents, stats or Stats()
        self.device, self.device_store = numbered(device), device_store
        self.look_up, self.embed_unknown, self.inner_product = look_up, embed_unknown, inner_product
        self._load_embedder = load_embedder

    @cached_property
    def embedder(self) -> TextEmbedder:
        return self._load_embedder()

    def keys(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """(keys float32 [Q, D] on the search device, known bool [Q]: has a key) of queries int64 [Q, M]."""
        with self.stats.time("lookup"):
            known, keys = self.known_keys(queries)
            keys = to_device(keys, self.device)
        if not self.embed_unknown:
            return keys, to_device(known, self.device)
        unknown = (~known).nonzero().squeeze(1)
        self.stats.looked_up += queries.shape[0] - unknown.numel()
        self.stats.embedded += unknown.numel()
        if unknown.numel():
            with self.stats.time("embed"):
                made = self.embed(queries[to_device(unknown, queries.device)])
                keys[to_device(unknown, self.device)] = to_device(made, self.device)
        return keys, torch.ones(len(keys), dtype=torch.bool, device=self.device)

    def known_keys(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """(known bool [Q], keys [Q, D]), both on the host, or on the device where the set's tokens are there."""
        if not self.look_up or queries.shape[1] != self.store.chunk_size:
            shape = (len(queries), self.store.embeddings.shape[1])
            return torch.zeros(shape[:1], dtype=torch.bool, device="cpu"), torch.zeros(
                shape, dtype=torch.float32, device="cpu"
            )
        if self.device_store is not None and queries.is_cuda:
            ids = self.device_store.find_chunks(queries)
            return ids >= 0, self.device_store.embeddings[ids.clamp(min=0)].float()
        found = self.store.find_chunks(queries)
        keys = self.store.embeddings[np.maximum(found, 0)].astype(np.float32)
        return torch.from_numpy(found >= 0), torch.from_numpy(keys)

    def embed(self, queries: Tensor) -> Tensor:
        """float32 [Q, D]: detokenised, in which pads are nothing, and embedded; rounded to fp16 as the keys of the set
        are."""
        return embedded(self.embedder, self.store.tokenizer.decode_batch(queries)).half().float()

    def search(self, queries: Tensor, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Searcher.search`. Distances are squared L2 (negative inner products for a set of that metric)."""
        keys, known = self.keys(queries)
        exclude = None if exclude is None else to_device(exclude, self.device)
        distances, ids = self.search_keys(keys, k, exclude)
        if not self.embed_unknown:
            distances = distances.masked_fill(~known[:, None], torch.inf)
            ids = ids.masked_fill(~known[:, None], -1)
        return distances, ids

    def search_keys(self, keys: Tensor, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The same for queries that are embedded already, float32 [Q, D]."""
        documents = self.documents

        def candidates(rows: Tensor | None, fetch: int) -> tuple[Tensor, Tensor]:
            return settle_ties(*self.index.search(keys if rows is None else keys[rows], fetch))

        def scan(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
            embeddings = self.store.embeddings if self.device_store is None else self.device_store.embeddings
            return scan_exact(
                keys[rows],
                embeddings,
                documents,
                None if exclude is None else exclude[rows],
                k,
                inner_product=self.inner_product,
            )

        on_host = self.device.type == "cuda" and getattr(self.index, "device", self.device).type == "cpu"
        return search_excluding(
            candidates,
            documents,
            keys.shape[0],
            k,
            exclude,
            scan=scan,
            stats=self.stats,
            max_fetch=min(WIDEST_FETCH, getattr(self.index, "most", None) or WIDEST_FETCH),
            waits=on_host,
        )


class InnerProductIndex:
    """Exact search by inner product (the metric of DPR), over the stored embeddings. Distances are the negative
    products."""

    def __init__(self, embeddings: Any, device: torch.device | str = "cpu") -> None:
        """embeddings: [C, D], a tensor or a (memory-mapped) array."""
        self.embeddings = embeddings
        self._documents = DocumentTable(np.zeros(len(embeddings), dtype=np.int64), 1, device)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return scan_exact(queries, self.embeddings, self._documents, None, k, inner_product=True)


class RandomSearcher:
    """The control: chunks drawn by chance, the same ones for the same query in every call. Distances are 0."""

    def __init__(self, documents: DocumentTable, seed: int = 0) -> None:
        self.documents, self.seed = documents, seed
        num = documents.num_chunks
        generator = np.random.default_rng(seed)
        strides = [
            s for s in generator.integers(1, max(num, 2), size=512).tolist() if np.gcd(s, num) == 1
        ] or [1]
        self._strides = torch.tensor(strides, device=documents.document_ids.device)

    def search(self, queries: Tensor, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Searcher.search`. Row i of a query is chunk (start + i · stride) mod C, the stride coprime to C, so a
        walk meets every chunk once."""
        documents = self.documents
        queries = to_device(queries, documents.document_ids.device)
        exclude = None if exclude is None else to_device(exclude, queries.device)
        # a pad adds nothing to the sum that is hashed, so how long the other queries are does not matter
        hashes = mixed(row_hashes(queries.masked_fill(queries == 0, -1)) + self.seed)
        start = hashes.remainder(documents.num_chunks)
        stride = self._strides[mixed(hashes).remainder(self._strides.numel())]

        def candidates(rows: Tensor | None, fetch: int) -> tuple[Tensor, Tensor]:
            a, b = (start, stride) if rows is None else (start[rows], stride[rows])
            steps = torch.arange(fetch, device=a.device)
            ids = (a[:, None] + steps * b[:, None]).remainder(documents.num_chunks)
            return torch.zeros(ids.shape, dtype=torch.float32, device=a.device), ids

        return search_excluding(
            candidates, documents, queries.shape[0], k, exclude, scan=None, max_fetch=documents.num_chunks
        )


def _wrap(value: int) -> int:
    """An unsigned 64-bit constant as torch's int64 holds it."""
    return value - (1 << 64) if value >= 1 << 63 else value


def mixed(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 on int64 tensors, bit for bit `store._mixed` on uint64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _wrap(factor)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def row_hashes(tokens: Tensor, seed: int = 0) -> Tensor:
    """int64 [n]: the bits of `store.hash_chunks`, on any device; another hash for another seed. tokens: [n, M]; −1 for
    a place that does not count."""
    places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    multipliers = mixed(places * _wrap(0x9E3779B97F4A7C15) + seed) | 1
    return mixed(((tokens.to(torch.int64) + 1) * multipliers).sum(1))


class DeviceStore:
    """What a step needs of a set, on the device: tokens, continuation, keys, and the hashes that find a chunk."""

    def __init__(self, store: ChunkStore, device: torch.device | str) -> None:
        self.chunks = torch.from_numpy(np.array(store.chunks)).to(device)
        self.continuation = torch.from_numpy(np.array(store.continuation)).to(device)
        self.embeddings = torch.from_numpy(np.array(store.embeddings)).to(device)
        # a part at a time: in 64 bits all tokens would take more memory than `bytes_needed` counts for everything
        starts = range(0, store.num_chunks, _SCAN_ROWS)
        hashes = [row_hashes(self._rows(slice(start, start + _SCAN_ROWS))) for start in starts]
        # stable: of equal chunks the first is found, as on the host
        self._hashes, self._order = torch.cat(hashes).sort(stable=True)

    def _rows(self, ids: Tensor | slice) -> Tensor:
        """Tokens int64 [n, M] of some chunks."""
        if self.chunks.dtype != torch.uint16:
            return self.chunks[ids].to(torch.int64)
        # equal bits: indexing uint16 is not implemented on every device, indexing its view is
        return self.chunks.view(torch.int16)[ids].to(torch.int64).bitwise_and_(0xFFFF)

    @staticmethod
    def bytes_needed(store: ChunkStore) -> int:
        return store.num_chunks * (
            store.chunks.dtype.itemsize * store.chunk_size + 2 * store.embeddings.shape[1] + 17
        )

    def find_chunks(self, tokens: Tensor) -> Tensor:
        """int64 [n] chunk ids of tokens [n, M], −1 where the set has no such chunk. Waits for nothing."""
        hashes = row_hashes(tokens)
        place = torch.searchsorted(self._hashes, hashes).clamp(max=self._hashes.numel() - 1)
        ids = self._order[place]
        return torch.where((self._rows(ids) == tokens).all(1), ids, -1)


def check_queries(queries: Tensor, vocab_size: int) -> None:
    """InputError where a token id on the host lies outside the vocabulary. (On a GPU the check would wait.)"""
    if not queries.is_cuda and queries.numel():
        low, high = int(queries.min()), int(queries.max())
        if low < 0 or high >= vocab_size:
            raise InputError(
                f"Retriever: token id {low if low < 0 else high} is outside the set's vocabulary of "
                f"{vocab_size:,}. Encode the text with the set's own tokenizer."
            )
