"""Neighbours found once and used again: a file made beforehand (`retro-kernels neighbours`), or a cache in memory.

What is kept for a chunk is the list of its S nearest chunks outside one document, its own (or outside none). A later
search that excludes that document among others takes the list, drops the others, and has the same k neighbours as a
live search would find, if k are left or the list holds all there is; else the row is searched live. So the file is not
tied to a seed, a sequence length or the packing of documents.

The same as live to the last one with an exact index, but for a text of which there are more copies than a search first
asks for (64): which of them it gets depends, live too, on the batch. One that refines (…RFlat) or walks a graph (HNSW)
looks farther where more is asked for: there it is the same for up to 16 neighbours of a chunk, since both searches
first ask for 64, unless one of the two has to ask again; then the lists may hold nearer ones.

What re-ranks (rerank.py) looks at candidates, not at what it chose before: its file or cache holds candidates.

File: one safetensors file, rows sorted by hash.
    hashes, checks   int64 [n]      two independent hashes of (chunk, document)
    ids              int64 [n, S]   −1 = there is no further chunk
    distances        float32 [n, S]
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from retro_kernels.config import InputError, as_count, check_readable, staged, write_safetensors
from retro_kernels.retrieval.rerank import Reranker
from retro_kernels.retrieval.search import (
    DocumentTable,
    Searcher,
    Stats,
    mixed,
    row_hashes,
    take_first,
    to_device,
    unfilled,
)
from retro_kernels.retrieval.store import ChunkStore, as_integers
from retro_kernels.retrieval.writing import check_no_folder, check_writable, forget_journal, journal

if TYPE_CHECKING:
    from retro_kernels.retrieval.retriever import Retriever

FORMAT, VERSION = "retro_kernels neighbours", "1"
_BLOCK = 4096  # chunks searched, and saved, at a time
_SAMPLE = 1 << 16  # chunks that are looked up to know how far a file goes
_CHECK_SEED = 0x5DEECE66D
_ARRAYS = {"hashes": "I64", "checks": "I64", "ids": "I64", "distances": "F32"}


def _hashes(queries: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
    """Two hashes of chunks [n, M] together with a document id [n], −1 = none."""
    return (
        mixed(row_hashes(queries) ^ mixed(documents + 2)),
        mixed(row_hashes(queries, _CHECK_SEED) ^ mixed(documents + 2)),
    )


def _narrow(
    distances: Tensor, ids: Tensor, documents: DocumentTable, exclude: Tensor | None, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """From kept lists [Q, S] to (distances [Q, k], ids [Q, k], bool [Q]: these are what a live search would find)."""
    keep = documents.allowed(ids, exclude)
    complete = (keep.sum(1) >= k) | (ids[:, -1] < 0)
    return *take_first(distances, ids, keep, k), complete


class NeighbourFile:
    """An opened file of neighbours. Attributes: num_rows, per_chunk, metadata."""

    def __init__(self, arrays: dict[str, Tensor], metadata: dict[str, str]) -> None:
        self.hashes, self.checks = arrays["hashes"], arrays["checks"]
        self.ids, self.distances = arrays["ids"], arrays["distances"]
        self.metadata = metadata
        self.num_rows, self.per_chunk = self.ids.shape

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, store: ChunkStore | None = None, retriever: str | None = None
    ) -> NeighbourFile:
        """Checks format, shapes, checksum, and that it was made with this set and this kind of retriever; else
        InputError."""
        from safetensors import SafetensorError, safe_open

        try:
            check_readable(path)
            with safe_open(os.fspath(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
                    raise InputError(f"{path} holds no neighbours of format version {VERSION}.")
                found = {name: file.get_slice(name).get_dtype() for name in file.keys()}
                if found != _ARRAYS:
                    raise InputError(f"{path} is damaged: it holds {found}.")
                arrays = {name: file.get_tensor(name) for name in _ARRAYS}
        except FileNotFoundError:
            raise InputError(
                f"There is no file of neighbours {path}. Make one with: retro-kernels neighbours"
            ) from None
        except PermissionError:
            raise
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is no whole file of neighbours: {error}") from None
        n = arrays["hashes"].shape
        if (
            arrays["checks"].shape != n
            or arrays["ids"].dim() != 2
            or arrays["ids"].shape[:1] != n
            or arrays["distances"].shape != arrays["ids"].shape
        ):
            raise InputError(f"{path} is damaged: its arrays do not fit each other.")
        if _checksum(arrays) != metadata.get("checksum"):
            raise InputError(
                f"{path} is damaged: its checksum is another. Make it again: retro-kernels neighbours"
            )
        if store is not None and metadata.get("set") != manifest_fingerprint(store.manifest):
            raise InputError(
                f"{path} was made with another retrieval set than {store.path}, or before it was changed. "
                "Make it again: retro-kernels neighbours"
            )
        if store is not None and bool((arrays["ids"] >= store.num_chunks).any()):
            raise InputError(f"{path} is damaged: it names chunks that {store.path} does not have.")
        if retriever is not None and metadata.get("retriever") != retriever:
            raise InputError(
                f"{path} holds the neighbours of the retriever {metadata.get('retriever')!r}, not of {retriever!r}."
            )
        return cls(arrays, metadata)

    def to(self, device: torch.device | str) -> NeighbourFile:
        return NeighbourFile({name: getattr(self, name).to(device) for name in _ARRAYS}, self.metadata)

    def rows(self, queries: Tensor, exclude: Tensor | None) -> Tensor:
        """int64 [Q]: a row whose list may serve a query [Q, M] that excludes documents [Q, E]; −1 where there is
        none."""
        found = torch.full((len(queries),), -1, dtype=torch.int64, device=queries.device)
        if not self.num_rows:
            return found
        columns = [] if exclude is None else list(exclude.unbind(1))
        for document in [*columns, torch.full_like(found, -1)]:
            hashes, checks = _hashes(queries, document)
            place = torch.searchsorted(self.hashes, hashes).clamp(max=self.num_rows - 1)
            same = (self.hashes[place] == hashes) & (self.checks[place] == checks)
            found = torch.where((found < 0) & same, place, found)
        return found


class PrecomputedSearcher:
    """Takes neighbours from a file as far as it goes, and searches live for the rest."""

    def __init__(
        self,
        table: NeighbourFile,
        documents: DocumentTable,
        inner: Searcher | None,
        stats: Stats | None = None,
    ) -> None:
        """inner: the live searcher. None: what the file does not hold has no neighbours, and a GPU is never waited
        for."""
        self.device = documents.document_ids.device
        self.table, self.documents = table.to(self.device), documents
        self.inner, self.stats = inner, stats or Stats()

    def search(self, queries: Tensor, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `search.Searcher.search`."""
        here, excluded = (
            to_device(queries, self.device),
            None if exclude is None else to_device(exclude, self.device),
        )
        with self.stats.time("lookup"):
            rows = self.table.rows(here, excluded)
            place = rows.clamp(min=0)
            if self.table.num_rows:
                distances, ids, complete = _narrow(
                    self.table.distances[place], self.table.ids[place], self.documents, excluded, k
                )
            else:
                (distances, ids), complete = unfilled(len(here), k, self.device), rows >= 0
            missing = (rows < 0)[:, None]
            distances, ids = distances.masked_fill(missing, torch.inf), ids.masked_fill(missing, -1)
        if self.inner is None:
            return distances, ids
        live = (~(complete & (rows >= 0))).nonzero().squeeze(1)
        self.stats.reused += len(queries) - live.numel()
        return _fill_live(self.inner, queries, k, exclude, live, distances, ids)


class CachingSearcher:
    """Keeps the neighbours of the set's own chunks in memory, S for each, once they were asked for.

    For queries that are chunks of the set and exclude its document, as in training; any other is searched live.
    Memory: 12 · S bytes a chunk visited.
    """

    def __init__(
        self,
        inner: Searcher,
        store: ChunkStore,
        documents: DocumentTable,
        *,
        per_chunk: int = 16,
        stats: Stats | None = None,
    ) -> None:
        if per_chunk < 1:
            raise InputError(f"CachingSearcher: per_chunk is {per_chunk}; at least 1 neighbour is kept.")
        self.inner, self.store, self.per_chunk, self.stats = inner, store, per_chunk, stats or Stats()
        self.documents = documents
        self._on_host = DocumentTable(store.document_ids, store.num_documents)
        # pages of zeros take no memory until they are written; 0 is "not known", so ids are kept with 2 added
        self._ids = torch.from_numpy(np.zeros((store.num_chunks, per_chunk), dtype=np.int64))
        self._distances = torch.from_numpy(np.zeros((store.num_chunks, per_chunk), dtype=np.float32))

    def search(self, queries: Tensor, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `search.Searcher.search`. The cache is on the host: queries on a GPU are waited for."""
        if exclude is None or k > self.per_chunk or queries.shape[1] != self.store.chunk_size:
            return self.inner.search(queries, k, exclude)
        excluded = exclude.cpu()
        with self.stats.time("lookup"):
            chunks = torch.from_numpy(self.store.find_chunks(queries.cpu()))
            own = self._on_host.of(chunks)
            usable = (chunks >= 0) & (excluded == own[:, None]).any(1)
            fresh = (usable & (self._ids[chunks.clamp(min=0), -1] == 0)).nonzero().squeeze(1)
        if fresh.numel():
            self._learn(queries, chunks, own, fresh)
        with self.stats.time("lookup"):
            place = chunks.clamp(min=0)
            distances, ids, complete = _narrow(
                self._distances[place], self._ids[place] - 2, self._on_host, excluded, k
            )
            live = (~(complete & usable)).nonzero().squeeze(1)
        searched = torch.cat([fresh, live]).unique()  # some both: what was learnt did not suffice
        self.stats.reused += len(queries) - searched.numel()
        device = self.documents.document_ids.device
        distances, ids = to_device(distances, device), to_device(ids, device)
        return _fill_live(self.inner, queries, k, exclude, live, distances, ids)

    def _learn(self, queries: Tensor, chunks: Tensor, own: Tensor, rows: Tensor) -> None:
        first = np.unique(chunks[rows].numpy(), return_index=True)[1]
        rows = rows[torch.from_numpy(first)]
        exclude = to_device(own[rows, None], queries.device)
        found, ids = self.inner.search(queries[to_device(rows, queries.device)], self.per_chunk, exclude)
        self._distances[chunks[rows]] = found.cpu()
        self._ids[chunks[rows]] = ids.cpu() + 2


def _fill_live(
    inner: Searcher,
    queries: Tensor,
    k: int,
    exclude: Tensor | None,
    live: Tensor,
    distances: Tensor,
    ids: Tensor,
) -> tuple[Tensor, Tensor]:
    if live.numel():
        rows = to_device(live, queries.device)
        found, found_ids = inner.search(queries[rows], k, None if exclude is None else exclude[rows])
        place = to_device(live, ids.device)
        distances[place], ids[place] = found.to(distances.device), found_ids.to(ids.device)
    return distances, ids


def manifest_fingerprint(manifest: dict[str, Any]) -> str:
    """SHA-256 over what decides a set's neighbours: tokenizer, embedder, kind and search setting of the index, and the
    checksums of the files. How fast or how good the index was measured to be is left out."""
    parts: dict[str, Any] = {name: manifest[name] for name in ("tokenizer", "embedder", "files")}
    # "search" is absent from some exact indexes and "" in others, which have nothing to set
    parts["index"] = {name: manifest["index"].get(name) or "" for name in ("factory", "metric", "search")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def share_in_file(retriever: Retriever, chunks: np.ndarray, documents: np.ndarray) -> float | None:
    """Of chunks [n, M] of the set's documents int64 [n] (as for `precompute`) the share that the retriever's file of
    neighbours has; of many chunks, that of a sample spread over them. None where the retriever has no file."""
    searcher = retriever.searcher.inner if isinstance(retriever.searcher, Reranker) else retriever.searcher
    if not isinstance(searcher, PrecomputedSearcher):
        return None
    sample = np.linspace(0, len(chunks) - 1, min(len(chunks), _SAMPLE)).astype(np.int64)
    queries = torch.from_numpy(chunks[sample].astype(np.int64)).to(searcher.device)
    exclude = torch.from_numpy(documents[sample, None]).to(searcher.device)
    return (searcher.table.rows(queries, exclude) >= 0).double().mean().item()


def check_out(out: str | os.PathLike[str]) -> Path:
    """The path of the file of neighbours that is to be made. InputError where it cannot be written, to be known before
    anything is read: it is a folder or a file of another kind, or lies in a file or a folder that cannot be written."""
    path = Path(out)
    if path.is_dir():
        raise InputError(
            f"neighbours: out is {path}, which is a folder. Give the name of the file to write, such as "
            f"{path / 'neighbours.safetensors'}."
        )
    if path.exists() and not _may_be_replaced(path):
        raise InputError(
            f"neighbours: out is {path}, which is there and holds no neighbours. Give another name, or remove it first."
        )
    check_writable(
        path.parent, f", where the folder of {path} is to be. Give another place for the neighbours."
    )
    check_no_folder(_journal_of(path))
    return path


def _may_be_replaced(path: Path) -> bool:
    """Whether a file is empty or begins like one of neighbours, whole or not: nothing else is lost."""
    with open(path, "rb") as file:
        start = file.read(1 << 16)
    return not start or (start[8:9] == b"{" and FORMAT.encode() in start)  # a header's length, the header


def check_retriever(retriever: Retriever) -> None:
    """InputError for a retriever whose neighbours are not kept."""
    if isinstance(retriever.searcher, Reranker):
        raise InputError(
            f"neighbours: {retriever.name} re-ranks candidates when it is used, so a file for it holds the candidates. "
            f"Make it with the retriever {retriever.name.partition('+')[0]}, and more neighbours of a chunk than the "
            f"{retriever.searcher.fetch} that are re-ranked (--per-chunk)."
        )


def _journal_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def precompute(
    retriever: Retriever,
    chunks: Any,
    documents: Any,
    out: str | os.PathLike[str],
    *,
    per_chunk: int = 16,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Searches neighbours for every chunk and writes the file `out`, whole or not at all.

    chunks: token ids [n, M], padded with 0, an array or a memory map.  documents: int64 [n], the set's document that a
        chunk belongs to (`Retriever.find_documents`), −1 where the set does not have it.
    per_chunk: S, neighbours kept for each chunk: more than are used, so that other documents can be dropped; never
        more than the set has chunks.
    progress: is told how many chunks were done, those of an interrupted run included.

    Interrupted, the next call with the same arguments goes on (what is done lies in `out`.partial); where `out` has
    been made from the same input already, nothing is done. Memory: some 50 bytes a chunk; on the disk, until `out` is
    whole, three times its size.
    Returns {"rows", "chunks", "per_chunk", "path", "done_before", "without_neighbours": the share of the rows that have
    none, "filled": the share of the rows' places that hold one}.
    InputError for a retriever that re-ranks, and for an `out` that no file can have (`check_out`).
    """
    out = check_out(out)
    check_retriever(retriever)
    documents = as_integers("documents", documents)
    chunks = np.asarray(chunks)
    fits = chunks.ndim == 2 and chunks.shape[1] == retriever.chunk_size and len(documents) == len(chunks)
    if not fits or chunks.dtype.kind not in "iu":
        raise ValueError(
            f"precompute: chunks must be integers [n, {retriever.chunk_size}] and documents [n], not {chunks.dtype} "
            f"{list(chunks.shape)} and {list(documents.shape)}."
        )
    per_chunk = min(as_count("precompute", "per_chunk", per_chunk), retriever.num_chunks)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "set": manifest_fingerprint(retriever.store.manifest),
        "retriever": retriever.candidates,
        "per_chunk": str(per_chunk),
        "input": _input_hash(chunks, documents),
    }
    about = json.dumps(metadata, sort_keys=True)
    result = {"chunks": len(chunks), "per_chunk": per_chunk, "path": str(out)}
    if out.exists():
        with contextlib.suppress(InputError):  # a damaged one is replaced, when the new one is whole
            old = NeighbourFile.open(out)
            if {name: old.metadata.get(name) for name in metadata} == metadata:
                forget_journal(_journal_of(out), about)
                return {**result, **_filled(old.ids), "rows": old.num_rows, "done_before": True}
    out.parent.mkdir(parents=True, exist_ok=True)
    blocks = [slice(start, start + _BLOCK) for start in range(0, len(chunks), _BLOCK)]
    keys = np.zeros((2, len(chunks)), dtype=np.int64)
    for rows in blocks:
        found = _hashes(_tokens(chunks[rows]), torch.from_numpy(documents[rows].copy()))
        keys[:, rows] = torch.stack(found).numpy()
    kept = _distinct(keys)
    place = np.full(len(chunks), -1)
    place[kept] = np.arange(len(kept))
    busy = f"Another process is making {out} now."
    with journal(_journal_of(out), about, busy) as done:
        ids = _mapped(out.parent, np.int64, (len(kept), per_chunk))
        distances = _mapped(out.parent, np.float32, (len(kept), per_chunk))
        for rows in blocks:
            block = done.take() or done.add(_searched(retriever, chunks[rows], documents[rows], per_chunk))
            here = place[rows]
            ids[here[here >= 0]] = block["ids"][here >= 0]
            distances[here[here >= 0]] = block["distances"][here >= 0]
            if progress:
                progress(len(here))
        columns = {"hashes": keys[0, kept], "checks": keys[1, kept], "ids": ids, "distances": distances}
        arrays = {name: torch.from_numpy(array) for name, array in columns.items()}
        _save(arrays, out, {**metadata, "checksum": _checksum(arrays)})
        result |= _filled(arrays["ids"])
    return {**result, "rows": len(kept), "done_before": False}


def _filled(ids: Tensor) -> dict[str, float]:
    rows = places = 0
    for block in ids.split(_BLOCK):  # the file may be larger than the memory
        there = block >= 0
        rows, places = rows + int(there[:, 0].sum()), places + int(there.sum())
    return {
        "without_neighbours": 1 - rows / max(1, len(ids)),
        "filled": places / max(1, ids.numel()),
    }


def _tokens(chunks: np.ndarray) -> Tensor:
    return torch.from_numpy(chunks.astype(np.int64))


def _searched(
    retriever: Retriever, chunks: np.ndarray, documents: np.ndarray, per_chunk: int
) -> dict[str, np.ndarray]:
    """ids int64 [n, S] and distances float32 [n, S]."""
    own = torch.from_numpy(documents.copy())[:, None]
    distances, ids = retriever.search(_tokens(chunks), per_chunk, own, keep_copies=True)
    return {"ids": ids.cpu().numpy(), "distances": distances.cpu().numpy()}


def _distinct(keys: np.ndarray) -> np.ndarray:
    """Which columns of `keys` [2, n] to keep, int64, in the order of their hashes: of equal ones the first, since a
    chunk may stand in a document twice."""
    order = np.lexsort((keys[1], keys[0]))
    first = np.zeros(len(order), dtype=bool)
    first[:1] = True
    for key in keys:
        first[1:] |= key[order[1:]] != key[order[:-1]]
    return order[first]


def _mapped(folder: Path, dtype: Any, shape: tuple[int, int]) -> np.ndarray:
    """An array of zeros in a file of `folder` that has no name and goes with the process. The zeros are written: a hole
    that finds the disk full later kills the process."""
    if not shape[0]:
        return np.zeros(shape, dtype)
    row = np.zeros(shape[1], dtype=dtype).tobytes()
    with tempfile.TemporaryFile(dir=folder) as file:
        for start in range(0, shape[0], _BLOCK):
            file.write(row * min(_BLOCK, shape[0] - start))
        file.flush()
        return np.memmap(file, dtype, "r+", shape=shape)


def _input_hash(chunks: np.ndarray, documents: np.ndarray) -> str:
    digest = hashlib.blake2b(documents.tobytes(), digest_size=16)
    for start in range(0, len(chunks), _BLOCK):
        digest.update(np.ascontiguousarray(chunks[start : start + _BLOCK], dtype=np.int32).tobytes())
    return digest.hexdigest()


def _checksum(arrays: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in _ARRAYS:
        digest.update(arrays[name].contiguous().numpy().data)
    return digest.hexdigest()


def _save(arrays: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    with staged(path) as temporary:
        write_safetensors(arrays, temporary, path, metadata)
