"""The retriever that a training step calls: token ids in, neighbours with their continuations out.

    retriever = Retriever.from_pretrained("set")
    neighbours = retriever(tokens, num_neighbours=2, exclude_documents=documents)      # a NeighbourBatch
    for batch, neighbours in retriever.prefetch(loader): ...                           # one step ahead

Tokens are cut into chunks; each chunk is searched for outside the excluded documents (search.py), and the tokens of
what was found are gathered. Borgeaud et al. 2021 (arXiv 2112.04426), sections 2.2 and 2.3.

Shapes: B sequences of N tokens, M tokens of a chunk, L = N // M chunks, K neighbours, R = 2M, E excluded documents.
"""

from __future__ import annotations

import functools
import os
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from retro_kernels.config import InputError, as_count, as_seed
from retro_kernels.ops._backend import limit_threads, numbered, pick_device, uncompiled
from retro_kernels.ops.gather import NeighbourBatch, gather_neighbours
from retro_kernels.ops.gather.native import WITH_CUDA
from retro_kernels.retrieval.bm25 import BM25Searcher
from retro_kernels.retrieval.embedder import TextEmbedder, as_embedder, load_described
from retro_kernels.retrieval.index import Index
from retro_kernels.retrieval.leakage import containment
from retro_kernels.retrieval.prefetch import Prefetcher
from retro_kernels.retrieval.rerank import MEASURES, Reranker
from retro_kernels.retrieval.search import (
    DenseSearcher,
    DeviceStore,
    DocumentTable,
    InnerProductIndex,
    RandomSearcher,
    Searcher,
    Stats,
    check_queries,
    take_first,
    to_device,
    unfilled,
)
from retro_kernels.retrieval.store import ChunkStore, opened_again

RETRIEVERS = (
    "dense",
    "bm25",
    "random",
    "bm25:tokens",
    *(f"dense+{by}" for by in MEASURES),
    *(f"{source}+{by}" for source in ("bm25", "bm25:tokens") for by in MEASURES if by != "bm25"),
)

_ELEMENTS = 1 << 22  # candidates, or tokens of candidates, that are tested for copies at a time


@dataclass(frozen=True)
class Hit:
    """One neighbour of a text."""

    distance: float
    chunk: int
    document: int
    title: str
    text: str
    continuation: str
    """"" where the document ends with the chunk."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_searching: int | None = None  # the process that searched first, and after a fork still its parent


def _know_process() -> None:
    """In a process that was forked after a search, as `datasets.map(num_proc=…)` and multiprocessing do, loops run on
    one thread from now on: OpenMP would wait for its other ones for ever, which were not forked."""
    global _searching
    if _searching is None:
        _searching = os.getpid()
    elif _searching != os.getpid():
        torch.set_num_threads(1)
        limit_threads(1)


class Retriever:
    """See the module. Public: store, tokenizer, num_chunks, num_documents, chunk_size, stats, searcher.

    One call at a time: a lock makes a prefetching thread and an evaluation in between wait for each other.
    A copy, such as a worker of a DataLoader gets that is spawned, opens the set anew, with the same options.
    In a process that was forked after a search, torch and FAISS run on one thread.
    """

    def __init__(
        self,
        store: ChunkStore,
        searcher: Searcher,
        *,
        documents: DocumentTable | None = None,
        device: torch.device | str | None = None,
        device_store: DeviceStore | None = None,
        drop_copies: float | None = None,
        stats: Stats | None = None,
    ) -> None:
        """From parts; `Retriever.from_pretrained` makes them. documents, device_store and the searcher's results are on
        `device`. Arguments as there."""
        if drop_copies is not None and not 0.0 < drop_copies <= 1.0:
            raise InputError(
                f"Retriever: drop_copies is {drop_copies}; it is a share of a chunk's 13-grams, above 0 and at most 1."
            )
        self.store, self.searcher = store, searcher
        self.device = numbered(device)
        self.device_store, self.drop_copies, self.stats = device_store, drop_copies, stats or Stats()
        self._pinned = _pinned(store, self.device) if device_store is None else None
        self._documents = documents or DocumentTable(store.document_ids, store.num_documents, self.device)
        self._lock = threading.RLock()

    @classmethod
    @opened_again
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        retriever: str = "dense",
        embedder: TextEmbedder | str | os.PathLike[str] | None = None,
        query_embedder: TextEmbedder | str | os.PathLike[str] | None = None,
        metric: str = "l2",
        neighbours: str | os.PathLike[str] | None = None,
        cache: int = 0,
        index_device: torch.device | str | None = None,
        drop_copies: float | None = None,
        embed_unknown: bool = True,
        rerank_fetch: int = 64,
        seed: int = 0,
        verify: str = "auto",
        progress: bool = True,
    ) -> Retriever:
        """Opens the retrieval set in the folder `path`.

        device: where the index, the filter and, if they fit, tokens and keys are; None: the CPU, "auto": a GPU where
            there is one.
        index_device: where the index alone is. None: on `device`; where that is a GPU on which this index, or this
            FAISS, cannot run, on the CPU, which a warning says.
        retriever: "dense" (embeddings), "bm25" (shared words), "bm25:tokens" (shared tokens), "random" (the control),
            or with a re-ranking "+bm25" (by shared tokens), "+edit", "+run" of `rerank_fetch` candidates.
        embedder: the set's own one, where it cannot be found under the name in the manifest: a folder, a name, or an
            object (TextEmbedder). Loaded when a chunk comes that is not in the set.
        query_embedder: another encoder for queries, as `embedder` (of DPR's two, `Embedder.from_pretrained(…,
            pooling="cls")`, with metric "inner product"). Keys of the set are then never taken for queries.
        metric: "l2" (squared, the set's index), or "inner product": exact search, distances are negative products.
        neighbours: a file of `retro-kernels neighbours` to take instead of searching, as far as it goes. With a
            re-ranking it is a file of what comes before (of "dense" for "dense+edit"), with at least `rerank_fetch`
            neighbours of a chunk: the candidates are taken, and re-ranked anew.
        cache: how many neighbours to keep in memory for each chunk of the set, 0 = none; with a re-ranking, candidates.
        drop_copies: leave out neighbours which, with continuation, hold this share or more of the chunk's 13-grams.
        embed_unknown: False gives chunks that are not in the set no neighbours, and never loads the embedder.
        seed: of the "random" retriever.  verify: as in `ChunkStore.open`.
        progress: bars on standard error while the index of BM25 is made, where it takes more than a moment.

        InputError where there is no set, it is damaged, the embedder is not the one it was built with, or the index
        cannot run on index_device (ImportError: FAISS is missing, or has no GPUs).
        """
        options = {name: value for name, value in locals().items() if name not in ("cls", "path")}
        if retriever not in RETRIEVERS:
            raise InputError(f"Retriever: {retriever!r} is not one of {', '.join(RETRIEVERS)}.")
        if metric not in ("l2", "inner product"):
            raise InputError(f'Retriever: metric is {metric!r}; "l2" or "inner product" can be had.')
        if not retriever.startswith("dense") and (metric != "l2" or query_embedder is not None):
            raise InputError(
                f"Retriever: {retriever!r} has neither metric nor query_embedder; leave them out."
            )
        if query_embedder is not None and not embed_unknown:
            raise InputError(
                "Retriever: query_embedder embeds every query, which embed_unknown=False forbids."
            )
        seed = as_seed("Retriever", seed)
        cache = as_count("Retriever", "cache", cache, least=0)
        rerank_fetch = as_count("Retriever", "rerank_fetch", rerank_fetch)
        device = numbered(pick_device(device or "cpu"))
        index_device = None if index_device is None else pick_device(index_device)
        store = ChunkStore.open(path, verify=verify)
        store.check_document_ids()
        stats = Stats()
        documents = DocumentTable(store.document_ids, store.num_documents, device)
        device_store = _device_store(store, device)
        source, _, measure = retriever.partition("+")
        candidates = source  # what decides them
        searcher: Searcher
        if source == "dense":
            product = metric == "inner product"
            load = functools.cache(_embedder_loader(store, embedder, query_embedder, device))
            if query_embedder is not None:
                encoder = load()  # no query does without it
                candidates += f" by {encoder.name} ({encoder.fingerprint[:12]})"
            candidates += f", {metric}" if product else ""
            candidates += "" if embed_unknown else ", of known chunks"
            searcher = DenseSearcher(
                store,
                _index(store, device, index_device, device_store, product),
                load,
                documents=documents,
                stats=stats,
                device=device,
                device_store=device_store,
                look_up=query_embedder is None,
                embed_unknown=embed_unknown,
                inner_product=product,
            )
        elif source.startswith("bm25"):
            analyser: Any = "tokens" if source == "bm25:tokens" else "words"
            searcher = BM25Searcher(store, analyser=analyser, stats=stats, progress=progress)
            if analyser == "words":
                candidates += ", words of the second kind"  # those of before are found no more
        else:
            searcher = RandomSearcher(documents, seed)
            candidates += f", seed {seed}, without padding"  # which chose others before
        needed = min(rerank_fetch, store.num_chunks) if measure else 1
        if neighbours is not None:
            from retro_kernels.retrieval.neighbours import NeighbourFile, PrecomputedSearcher

            table = NeighbourFile.open(neighbours, store=store, retriever=candidates)
            if table.per_chunk < needed:
                raise InputError(
                    f"{neighbours} holds {table.per_chunk} neighbours of a chunk, but {retriever} re-ranks {needed} "
                    f"candidates. Make it with more than that (retro-kernels neighbours --per-chunk {needed + 16}), or "
                    "re-rank fewer (rerank_fetch, in Python)."
                )
            searcher = PrecomputedSearcher(table, documents, searcher, stats=stats)
        cache = min(cache, store.num_chunks)  # places beyond could not be filled
        if cache:
            from retro_kernels.retrieval.neighbours import CachingSearcher

            if cache < needed:
                raise InputError(
                    f"Retriever: cache is {cache}, but {retriever} re-ranks {needed} candidates of a chunk. Keep more "
                    "than that, or re-rank fewer (rerank_fetch)."
                )
            searcher = CachingSearcher(searcher, store, documents, per_chunk=cache, stats=stats)
        if measure:  # last: a list that was chosen by another measure has not the candidates of this one
            searcher = Reranker(searcher, store, measure, fetch=rerank_fetch, stats=stats)
        made = cls(
            store,
            searcher,
            documents=documents,
            device=device,
            device_store=device_store,
            drop_copies=drop_copies,
            stats=stats,
        )
        made.name, made.candidates = retriever, candidates
        if neighbours is not None and not measure:
            made._kept = table.per_chunk
        made._opened = os.path.abspath(path), options
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        if self._opened is None:
            raise TypeError(
                f"{type(self).__name__}: only what Retriever.from_pretrained opened can be copied or sent to another "
                "process. Open the set there."
            )
        from retro_kernels.retrieval.neighbours import manifest_fingerprint

        return _open_again, (*self._opened, manifest_fingerprint(self.store.manifest))

    collective = False
    """Whether `gather` and searching are calls that all ranks make together."""
    _opened: tuple[str, dict[str, Any]] | None = None
    """The folder and the options of `from_pretrained`."""
    _kept: int | None = None
    """How many neighbours of a chunk a file has; None where it is not the file's that are used."""

    name: str = "custom"
    """Which retriever this is, as given to `from_pretrained`."""
    candidates: str = "custom"
    """What decides the neighbours that it finds in a set, before a re-ranking; a file of neighbours is known by it."""

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.name}, {self.num_chunks:,} chunks of {self.num_documents:,} documents in "
            f"{self.store.path}, {self.device})"
        )

    @property
    def tokenizer(self) -> Any:
        return self.store.tokenizer

    @property
    def num_chunks(self) -> int:
        return self.store.num_chunks

    @property
    def num_documents(self) -> int:
        return self.store.num_documents

    @property
    def chunk_size(self) -> int:
        return self.store.chunk_size

    def check_tokenizer(self, fingerprint: str) -> None:
        """InputError unless the set was built with the tokenizer of this fingerprint (`Tokenizer.fingerprint`)."""
        own = self.store.manifest["tokenizer"]["fingerprint"]
        if fingerprint != own:
            raise InputError(
                f"The retrieval set {self.store.path} has another tokenizer ({own[:12]}…) than the model or data it is "
                f"to be used with ({fingerprint[:12]}…). Build the set again: retro-kernels index PATH --tokenizer "
                "MODEL --out SET"
            )

    def check_num_neighbours(self, k: int) -> None:
        """InputError for more neighbours of a chunk than the set has chunks, places that nothing can ever fill, or than
        the file of neighbours has, which would spare no search."""
        if self._kept is not None and self._kept < min(k, self.num_chunks):
            raise InputError(
                f"{k:,} neighbours of a chunk were asked for, but the file of neighbours has {self._kept:,}. Make it "
                f"with more (retro-kernels neighbours --per-chunk {k + 14}), or leave it out."
            )
        if k > self.num_chunks:
            raise InputError(
                f"{k:,} neighbours were asked for, but {self._called()} holds {self.num_chunks:,} chunks. Ask for no "
                "more than that."
            )

    def _called(self) -> str:
        """What a message calls the whole of what is searched."""
        return f"the retrieval set {self.store.path}"

    @uncompiled  # what is traced through locks and numpy fails in ways of its own
    def __call__(
        self, tokens: Tensor, *, num_neighbours: int = 2, exclude_documents: Tensor | None = None
    ) -> NeighbourBatch:
        """The neighbours of each whole chunk of each sequence.

        tokens: integers [B, N] of the set's tokenizer, L = N // M chunks; a rest shorter than a chunk is left out.
        exclude_documents: int64 [B, E], document ids from which no neighbour of this sequence may come, −1 = none; on
            the device of tokens. A training sequence lists every document that it holds.

        Returns tokens int64 [B, L, K, 2M], lengths, ids and distances [B, L, K] on the device of tokens where that is a
        GPU, else on the retriever's. Missing neighbours: length 0, id −1, distance +inf. A chunk wholly of padding
        has none.
        Raises TypeError for what is no tensor, ValueError for shapes and dtypes that do not fit, InputError for a token
        id beyond the vocabulary.
        """
        with self._lock, torch.no_grad():
            self.stats.calls += 1
            queries, num_neighbours, exclude = self._queries(tokens, num_neighbours, exclude_documents)
            distances, ids = self.search(queries, num_neighbours, exclude)
            home = tokens.device if tokens.is_cuda else self.device
            distances, ids = distances.to(home), ids.to(home)
            with self.stats.time("gather"):
                found, lengths = self.gather(ids)
        m = self.chunk_size
        shape = (tokens.shape[0], tokens.shape[1] // m, num_neighbours)
        return NeighbourBatch(
            found.view(*shape, 2 * m), lengths.view(shape), ids.view(shape), distances.view(shape)
        )

    def _queries(self, tokens: Tensor, k: int, exclude: Tensor | None) -> tuple[Tensor, int, Tensor | None]:
        """What `search` takes, of checked arguments of a call."""
        k = self._check(tokens, k, exclude)
        m = self.chunk_size
        b, chunks = tokens.shape[0], tokens.shape[1] // m
        queries = tokens[:, : chunks * m].reshape(b * chunks, m).to(torch.int64)
        check_queries(queries, self.store.manifest["tokenizer"]["vocab_size"])
        if exclude is None or not exclude.shape[1]:
            return queries, k, None
        return queries, k, exclude.to(queries.device, torch.int64).repeat_interleave(chunks, dim=0)

    def _check(self, tokens: Tensor, k: int, exclude: Tensor | None) -> int:
        """k as an int of Python's."""
        _check_tensor("tokens", tokens, "[B, N]")
        if exclude is not None:
            _check_tensor("exclude_documents", exclude, "[B, E]")
        if tokens.dim() != 2 or not _holds_integers(tokens):
            raise ValueError(
                f"Retriever: tokens must be integers [B, N], not {tokens.dtype} {list(tokens.shape)}."
            )
        k = as_count("Retriever", "num_neighbours", k)
        if exclude is None:
            return k
        if (
            exclude.dim() != 2
            or exclude.shape[0] != tokens.shape[0]
            or exclude.dtype not in (torch.int64, torch.int32)
        ):
            raise ValueError(
                f"Retriever: exclude_documents must be int64 [B, E] with B = {tokens.shape[0]}, "
                f"not {exclude.dtype} {list(exclude.shape)}."
            )
        if exclude.device != tokens.device:
            raise ValueError(
                f"Retriever: exclude_documents is on {exclude.device}, tokens on {tokens.device}; "
                "move one of them."
            )
        return k

    def search(
        self, queries: Tensor, k: int, exclude: Tensor | None = None, *, keep_copies: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Distances and ids [Q, k] of queries int64 [Q, M]; chunks of padding get none. keep_copies overrides
        drop_copies."""
        _know_process()
        drop = None if keep_copies else self.drop_copies
        real = (queries != self.tokenizer.pad_id).any(1)
        self.stats.queries += queries.shape[0]
        if queries.is_cuda:  # picking rows would wait for the GPU: search all, then blank
            distances, ids = self._search(queries, k, exclude, drop)
            real = real.to(ids.device)[:, None]
            return distances.masked_fill(~real, torch.inf), ids.masked_fill(~real, -1)
        rows = real.nonzero().squeeze(1)
        self.stats.padding += queries.shape[0] - rows.numel()
        if rows.numel() == queries.shape[0] > 0:
            return self._search(queries, k, exclude, drop)
        distances, ids = unfilled(queries.shape[0], k, self.device)
        if rows.numel():
            found, found_ids = self._search(
                queries[rows], k, None if exclude is None else exclude[rows], drop
            )
            distances, ids = distances.to(found.device), ids.to(found.device)
            places = to_device(rows, found.device)
            distances[places], ids[places] = found, found_ids
        return distances, ids

    def _search(
        self, queries: Tensor, k: int, exclude: Tensor | None, drop: float | None
    ) -> tuple[Tensor, Tensor]:
        if drop is None:
            return self.searcher.search(queries, k, exclude)
        return _search_without_copies(self, queries, k, exclude, drop)

    def gather(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens int64 [..., 2M] and lengths of chunk ids with their continuations, on the device of ids."""
        near = self.device_store or self._pinned
        source = near if near is not None and ids.device == self.device else self.store
        return gather_neighbours(source.chunks, ids, continuation=source.continuation)

    def documents(self, ids: Tensor) -> Tensor:
        """The document id of each chunk id, −1 for −1; any shape. InputError for an id that the set does not have,
        TypeError for what is no tensor, ValueError for one that is not of integers. On a GPU it is waited for: an index
        beyond the end would be the end of the process there."""
        ids = self._chunk_ids(ids)
        return self._documents.of(ids.to(self._documents.document_ids.device)).to(ids.device)

    def _chunk_ids(self, ids: Tensor) -> Tensor:
        """ids, checked, as int64: bytes would be taken for a mask, and torch has no order of some other integers."""
        _check_tensor("ids", ids, "of any shape")
        if not _holds_integers(ids):
            raise ValueError(f"Retriever: ids must be integers, not {ids.dtype}.")
        ids = ids.to(torch.int64)
        low, high = (int(ids.min()), int(ids.max())) if ids.numel() else (-1, -1)
        if not -1 <= low <= high < self.num_chunks:
            raise InputError(
                f"There is no chunk {low if low < -1 else high}: the set has chunks 0 to {self.num_chunks - 1:,}."
            )
        return ids

    def titles(self, document_ids: Any) -> list[str]:
        """The title of each document id, "" for −1, flat. Errors are those of `ChunkStore.titles`."""
        return self.store.titles(document_ids)

    def find_documents(self, hashes: Iterable[int]) -> Tensor:
        """int64 [n]: the set's document with each hash (`data.corpus.document_hash` of its text), −1 where it has
        none."""
        return torch.from_numpy(np.asarray(self.store.find_documents(hashes), dtype=np.int64))

    def search_text(self, text: str | list[str], k: int = 2) -> Any:
        """The k nearest chunks of a text, as a list of `Hit`, nearest first; of a list of texts, a list of such
        lists. TypeError for what is no text."""
        texts = list(text) if isinstance(text, (list, tuple)) else [text]
        for given in texts:
            if not isinstance(given, str):
                raise TypeError(
                    f"search_text: text must be a str or a list of them, not {type(given).__name__}."
                )
        with self._lock, torch.no_grad():
            queries, k = self._text_queries(texts, k)
            distances, ids = (x.cpu() for x in self.search(queries, k)) if texts else unfilled(0, k)
        hits = [self._hits(d, i) for d, i in zip(distances.tolist(), ids.tolist(), strict=True)]
        return hits[0] if isinstance(text, str) else hits

    def _text_queries(self, texts: list[str], k: int) -> tuple[Tensor, int]:
        """What `search` takes, of checked arguments of `search_text`."""
        k = as_count("search_text", "k", k)
        if not all(t.strip() for t in texts):
            raise InputError("search_text: the text is empty. Give some words to search for.")
        encoded = self.tokenizer.encode_batch(texts)
        width = max(map(len, encoded), default=1)
        rows = [row + [self.tokenizer.pad_id] * (width - len(row)) for row in encoded]
        queries = torch.tensor(rows, dtype=torch.int64, device="cpu")
        return queries.reshape(len(texts), width), k

    def _hits(self, distances: list[float], ids: list[int]) -> list[Hit]:
        chosen = torch.tensor([i for i in ids if i >= 0], dtype=torch.int64, device="cpu")
        documents = self.documents(chosen)
        tokens = self.gather(chosen)[0].reshape(len(chosen), 2, self.chunk_size).tolist()
        rows = zip(
            distances[: len(chosen)],
            chosen.tolist(),
            documents.tolist(),
            self.titles(documents),
            tokens,
            strict=True,
        )
        return [Hit(*row, *self.tokenizer.decode_batch(halves)) for *row, halves in rows]

    def prefetch(
        self,
        loader: Iterable[Any],
        *,
        num_neighbours: int = 2,
        depth: int = 1,
        inputs: Callable[[Any], tuple[Tensor, Tensor | None]] | None = None,
    ) -> Prefetcher:
        """`for batch, neighbours in retriever.prefetch(loader)`: the neighbours of each batch, retrieved while the step
        before it runs. See `prefetch.Prefetcher`."""
        return Prefetcher(self, loader, num_neighbours=num_neighbours, depth=depth, inputs=inputs)


def _open_again(path: str, options: dict[str, Any], fingerprint: str) -> Retriever:
    from retro_kernels.retrieval.neighbours import manifest_fingerprint

    made = Retriever.from_pretrained(path, **{**options, "progress": False})
    if manifest_fingerprint(made.store.manifest) != fingerprint:  # the same ids would be other chunks
        raise InputError(
            f"The retrieval set {path} was changed since it was opened to be copied. Open it anew."
        )
    return made


def _check_tensor(name: str, given: Any, shape: str) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(
            f"Retriever: {name} must be a tensor of integers {shape}, not {type(given).__name__}. Make it one with "
            "torch.as_tensor."
        )


def _holds_integers(given: Tensor) -> bool:
    return not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)


def _search_without_copies(
    retriever: Retriever, queries: Tensor, k: int, exclude: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor]:
    """More is fetched, and widened, until k neighbours are left that hold less than `threshold` of the 13-grams."""
    distances, ids = retriever.searcher.search(queries, 4 * k, exclude)
    chunks = queries.to(ids.device)
    result, result_ids = unfilled(queries.shape[0], k, ids.device)
    rows = torch.arange(queries.shape[0], device=ids.device)
    keep = _no_copies(retriever, chunks, ids, ids >= 0, threshold)
    pending: list[tuple[Tensor, ...]] = []  # rows, their candidates that were tested, and which were kept
    while True:
        result[rows], result_ids[rows] = take_first(distances, ids, keep, k)
        # a row whose last candidate is missing has seen them all
        short = ((keep.sum(1) < k) & (ids[:, -1] >= 0)).nonzero().squeeze(1)
        for part in short.split(max(1, _ELEMENTS // (4 * ids.shape[1]))) if short.numel() else ():
            pending.append((rows[part], ids[part], keep[part]))
        if not pending:
            return result, result_ids
        rows, tested, kept = pending.pop()  # the last first: so few wait that remember many
        again, fetch = rows.to(queries.device), min(4 * tested.shape[1], retriever.num_chunks + 1)
        distances, ids = retriever.searcher.search(
            queries[again], fetch, None if exclude is None else exclude[again]
        )
        # what was tested comes again, but not always in its place: near ties, or what is re-ranked, change theirs
        tested, order = tested.sort(dim=1)
        place = torch.searchsorted(tested, ids.contiguous()).clamp(max=tested.shape[1] - 1)
        known = tested.gather(1, place) == ids
        keep = _no_copies(retriever, chunks[rows], ids, (ids >= 0) & ~known, threshold)
        keep |= known & kept.gather(1, order).gather(1, place)


def _no_copies(retriever: Retriever, chunks: Tensor, ids: Tensor, wanted: Tensor, threshold: float) -> Tensor:
    """bool [Q, F]: wanted, and a chunk that with its continuation holds less than `threshold` of the 13-grams."""
    keep = torch.zeros_like(wanted)
    for part in wanted.nonzero().split(max(1, _ELEMENTS // (2 * retriever.chunk_size))):
        rows, places = part.unbind(1)
        values, lengths = retriever.gather(ids[rows, places, None])
        keep[rows, places] = containment(chunks[rows], values, value_lengths=lengths)[:, 0] < threshold
    return keep


def _index(
    store: ChunkStore,
    device: torch.device,
    index_device: torch.device | str | None,
    device_store: DeviceStore | None,
    product: bool,
) -> Any:
    if product:
        return InnerProductIndex(
            store.embeddings if device_store is None else device_store.embeddings, device
        )
    if index_device is not None:
        return Index.open(store, device=index_device)
    return Index.open(store, device=device, or_cpu=True)


def _embedder_loader(
    store: ChunkStore, embedder: Any, query_embedder: Any, device: torch.device
) -> Callable[[], TextEmbedder]:
    entry = store.manifest["embedder"]

    def load() -> TextEmbedder:
        if query_embedder is None:
            made = load_described(entry, store.path, embedder, device)
        else:
            made = as_embedder(query_embedder, device)
        if made.dim != entry["dim"]:
            raise InputError(
                f"The retrieval set {store.path} holds keys of {entry['dim']} numbers ({entry['name']}); "
                f"the embedder {made.name} makes {made.dim}."
            )
        return made

    return load


class _PinnedTokens(NamedTuple):
    chunks: Tensor
    continuation: Tensor


def _pinned(store: ChunkStore, device: torch.device) -> _PinnedTokens | None:
    """The set's tokens in pinned memory, out of which a GPU takes a step's neighbours while the host goes on. None
    where this build has no such gather, or where they take more than a third of the memory that is free, of which each
    of torchrun's processes on this machine has its part."""
    share = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type != "cuda" or not WITH_CUDA or 3 * store.chunks.nbytes * share > _free_memory():
        return None
    chunks, continuation = (np.array(array) for array in (store.chunks, store.continuation))
    return _PinnedTokens(torch.from_numpy(chunks).pin_memory(), torch.from_numpy(continuation).pin_memory())


def _free_memory() -> int:
    """Bytes of this machine that can be had, 0 where it does not say."""
    try:
        found = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def _device_store(store: ChunkStore, device: torch.device) -> DeviceStore | None:
    """The set's tokens and keys on a GPU, where they take less than a third of what is free."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return DeviceStore(store, device) if 3 * DeviceStore.bytes_needed(store) < free else None
