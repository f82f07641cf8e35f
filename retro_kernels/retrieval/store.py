"""The retrieval set on disk: one folder of flat arrays, described by a manifest that is checked when it is opened.

    manifest.json           format version, shapes, fingerprints, index factory, measurements, size and SHA-256 of files
    tokenizer.model         the SentencePiece model (or tokenizer.json, under this name) whose ids the chunks hold
    chunks.npy              uint16 (int32 for more than 65,536 ids) [C, M]: a document's last chunk is padded with 0
    document_ids.npy        int64 [C], ascending: a document's chunks lie side by side
    documents.jsonl         {"title": …, "bytes": …}, a document a line; document_offsets.npy int64 [D + 1] finds them
    document_hashes.npy     int64 [D]: `data.corpus.document_hash` of each text, which names it across corpora
    embeddings.npy          fp16 [C, E]
    chunk_hashes.npy        uint64 [C] sorted, and chunk_order.npy int64 [C]: finds chunks by their tokens
    index.faiss             absent where the index is exact: then embeddings.npy is the index

C chunks of M tokens, D documents, E embedding width. The value of a neighbour, chunk and continuation, is row i and row
i + 1 where both have the same document id, so every token is stored once.

A set may come from anywhere. Nothing in it is executed or unpickled, file names are not taken from it, links that lead
out of the folder are refused, JSON is read up to a limit, and every size is checked against the manifest before use.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import mmap
import os
import re
import tokenize
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from retro_kernels.config import InputError, write_whole
from retro_kernels.data.tokenizer import Tokenizer, token_dtype

FORMAT = "retro_kernels retrieval set"
VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
CHUNKS = "chunks.npy"
DOCUMENT_IDS = "document_ids.npy"
DOCUMENTS = "documents.jsonl"
DOCUMENT_OFFSETS = "document_offsets.npy"
DOCUMENT_HASHES = "document_hashes.npy"
EMBEDDINGS = "embeddings.npy"
CHUNK_HASHES = "chunk_hashes.npy"
CHUNK_ORDER = "chunk_order.npy"
INDEX = "index.faiss"
REQUIRED_FILES = (
    TOKENIZER,
    CHUNKS,
    DOCUMENT_IDS,
    DOCUMENTS,
    DOCUMENT_OFFSETS,
    DOCUMENT_HASHES,
    EMBEDDINGS,
    CHUNK_HASHES,
    CHUNK_ORDER,
)
ALL_FILES = (*REQUIRED_FILES, INDEX, MANIFEST)
MAX_MANIFEST_BYTES = 1 << 20
VERIFIED_BYTES = 256 << 20
"""The largest set of which every byte is read each time it is opened."""
MAX_TITLE_CHARS = 1000
_MAX_LINE_BYTES = 1 << 16
_BLOCK = 1 << 16  # rows handled at a time
NO_HEADER = (ValueError, SyntaxError, tokenize.TokenError, KeyError, TypeError, RecursionError, MemoryError)
"""What numpy raises for the header of a `.npy` file that is none: it is read as Python."""

# what a manifest must hold: path of keys -> type
_MANIFEST_TYPES: dict[tuple[str, ...], type] = {
    ("chunk_size",): int,
    ("num_chunks",): int,
    ("num_documents",): int,
    ("tokenizer", "fingerprint"): str,
    ("tokenizer", "vocab_size"): int,
    ("embedder", "name"): str,
    ("embedder", "fingerprint"): str,
    ("embedder", "dim"): int,
    ("index", "factory"): str,
    ("files",): dict,
}


class Replaced(InputError):
    """Another set has the name of the one that is being opened."""


_F = TypeVar("_F", bound=Callable[..., Any])


def opened_again(opening: _F) -> _F:
    """`opening` anew, once, where the set was replaced meanwhile by another build."""

    @functools.wraps(opening)
    def repeated(*args: Any, **options: Any) -> Any:
        with contextlib.suppress(Replaced):
            return opening(*args, **options)
        return opening(*args, **options)

    return repeated  # type: ignore[return-value]


class ChunkStore:
    """An opened retrieval set, memory-mapped: opening costs no memory, whatever its size.

    chunks [C, M], document_ids [C], embeddings [C, E], document_hashes [D]: read-only arrays over the files.
    path, manifest (dict), num_chunks, num_documents, chunk_size.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        """Use `ChunkStore.open`."""
        self.path = path
        self.manifest = manifest
        self._index_entry = dict(manifest["files"].get(INDEX) or {})
        self.num_chunks: int = manifest["num_chunks"]
        self.num_documents: int = manifest["num_documents"]
        self.chunk_size: int = manifest["chunk_size"]
        chunks, documents = self.num_chunks, self.num_documents
        tokens = token_dtype(manifest["tokenizer"]["vocab_size"])
        self.chunks = self._array(CHUNKS, tokens, (chunks, self.chunk_size), scattered=True)
        self.document_ids = self._array(DOCUMENT_IDS, np.int64, (chunks,))
        self.embeddings = self._array(EMBEDDINGS, np.float16, (chunks, manifest["embedder"]["dim"]))
        self.document_hashes = self._array(DOCUMENT_HASHES, np.int64, (documents,))
        self._document_offsets = self._array(DOCUMENT_OFFSETS, np.int64, (documents + 1,))
        self._chunk_hashes = self._array(CHUNK_HASHES, np.uint64, (chunks,))
        self._chunk_order = self._array(CHUNK_ORDER, np.int64, (chunks,), scattered=True)
        empty = not (path / DOCUMENTS).stat().st_size  # cannot be mapped
        self._documents = np.zeros(0, np.uint8) if empty else np.memmap(path / DOCUMENTS, np.uint8, mode="r")

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: str = "auto") -> ChunkStore:
        """Opens the set in the folder `path`.

        verify: "sizes" checks the manifest, the size of every file and the shape of every array. "full" also reads
            every byte: checksums, order of the document ids, range of the token ids. "auto" is "full" for sets of up
            to 256 MiB.

        A set that is replaced meanwhile is opened as it was or as it is then; every file but the index's is open when
        this returns, so that replacing it later does no harm.

        Raises InputError where there is no set, where it is half copied or damaged, or of another format version.
        """
        if verify not in ("auto", "sizes", "full"):
            raise InputError(f'ChunkStore.open: verify is {verify!r}; "auto", "sizes" and "full" can be had.')
        folder = Path(path)
        for _ in range(2):
            manifest = read_manifest(folder)
            failure: Exception | None = None
            try:
                store = cls._open(folder, manifest, verify)
            # not InputError alone: between two looks at a file it went
            except (ValueError, OSError) as error:
                failure = error
            if read_manifest(folder) == manifest:
                if failure:
                    raise failure
                return store
        raise Replaced(f"Retrieval set {folder} was replaced twice while it was being opened. Try again.")

    @classmethod
    def _open(cls, folder: Path, manifest: dict[str, Any], verify: str) -> ChunkStore:
        full = verify == "full" or (verify == "auto" and quick_to_read(manifest))
        check_files(folder, manifest, checksums=full)
        store = cls(folder, manifest)
        if full:
            store._check_contents()
        _ = store.tokenizer
        return store

    def check_index_is_its_own(self) -> None:
        """`Replaced` where the index file is by now that of another set, so that what was read of it is not this
        one's."""
        try:
            now = read_manifest(self.path)["files"].get(INDEX) or {}
        except InputError:
            return  # there is no other set
        if now != self._index_entry:
            raise Replaced(
                f"Retrieval set {self.path} was replaced while it was being opened. Open it again."
            ) from None

    def _array(self, name: str, dtype: Any, shape: tuple[int, ...], scattered: bool = False) -> np.ndarray:
        array = open_array(self.path / name, np.dtype(dtype), shape)
        if scattered and isinstance(array, np.memmap) and hasattr(mmap, "MADV_RANDOM"):
            array._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]  # rows are far apart: no read-ahead
        return array

    def read_ahead(self) -> None:
        """For whoever will read the chunks from the first to the last."""
        if isinstance(self.chunks, np.memmap) and hasattr(mmap, "MADV_NORMAL"):
            self.chunks._mmap.madvise(mmap.MADV_NORMAL)  # type: ignore[attr-defined]

    def check_document_ids(self) -> None:
        """InputError where a chunk belongs to no document: what is indexed by these ids is allocated after them."""
        for start in range(0, self.num_chunks, _BLOCK):
            block = self.document_ids[start : start + _BLOCK]
            if not 0 <= block.min() <= block.max() < self.num_documents:
                raise _damaged(self.path, f"{DOCUMENT_IDS} is not within 0 to {self.num_documents - 1:,}")

    def _check_contents(self) -> None:
        damaged = None
        ids, vocab_size = self.document_ids, self.manifest["tokenizer"]["vocab_size"]
        last = 0
        for start in range(0, self.num_chunks, _BLOCK):
            block = ids[start : start + _BLOCK]
            if block[0] < last or (np.diff(block) < 0).any() or block[-1] >= self.num_documents:
                damaged = f"{DOCUMENT_IDS} is not ascending from 0 to {self.num_documents - 1:,}"
            last = block[-1]
            tokens = self.chunks[start : start + _BLOCK]
            if tokens.min() < 0 or tokens.max() >= vocab_size:
                damaged = f"{CHUNKS} holds token ids beyond the vocabulary of {vocab_size:,}"
            order = self._chunk_order[start : start + _BLOCK]
            if order.min() < 0 or order.max() >= self.num_chunks:
                damaged = f"{CHUNK_ORDER} points beyond {CHUNKS}"
        if self.tokenizer.vocab_size != vocab_size:
            damaged = f"{TOKENIZER} has {self.tokenizer.vocab_size:,} entries, {MANIFEST} says {vocab_size:,}"
        if damaged:
            raise _damaged(self.path, damaged)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the chunks. InputError where it is not the one the manifest names."""
        tokenizer = Tokenizer(self.path / TOKENIZER)
        if tokenizer.fingerprint != self.manifest["tokenizer"]["fingerprint"]:
            raise _damaged(self.path, f"{TOKENIZER} is not the tokenizer with which the set was built")
        return tokenizer

    @cached_property
    def continuation(self) -> np.ndarray:
        """bool [C]: chunk i + 1 continues chunk i's document."""
        result = np.zeros(self.num_chunks, dtype=bool)
        for start in range(0, self.num_chunks - 1, _BLOCK):
            ids = self.document_ids[start : start + _BLOCK + 1]
            result[start : start + len(ids) - 1] = ids[1:] == ids[:-1]
        return result

    def find_documents(self, hashes: Iterable[int]) -> np.ndarray:
        """int64 [n]: the id of the document with each hash (`data.corpus.document_hash`), −1 where the set has none."""
        wanted = as_integers("hashes", hashes)
        sorted_hashes, order = self._sorted_document_hashes
        place = np.searchsorted(sorted_hashes, wanted)
        place = np.minimum(place, self.num_documents - 1)
        return np.where(sorted_hashes[place] == wanted, order[place], -1)

    @cached_property
    def _sorted_document_hashes(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self.document_hashes, kind="stable")
        return np.asarray(self.document_hashes[order]), order

    def find_chunks(self, tokens: Any) -> np.ndarray:
        """int64 [n]: the first row of the set that equals each row of `tokens` [n, M], −1 where none does.

        Exact: a 64-bit hash finds the candidates, comparing the tokens decides.
        """
        tokens = np.asarray(_as_array(tokens))
        if tokens.ndim != 2 or tokens.shape[1] != self.chunk_size:
            raise ValueError(
                f"find_chunks: tokens have shape {tokens.shape}; [n, {self.chunk_size}] is needed."
            )
        rows = np.full(len(tokens), -1, dtype=np.int64)
        hashes = hash_chunks(tokens)
        pending = np.argsort(hashes, kind="stable")  # neighbours in the table are looked up one after another
        place = np.searchsorted(self._chunk_hashes, hashes[pending])
        while len(pending):
            inside = place < self.num_chunks
            pending, place = pending[inside], place[inside]
            same_hash = self._chunk_hashes[place] == hashes[pending]
            pending, place = pending[same_hash], place[same_hash]
            candidates = self._chunk_order[place]
            if len(candidates) and not 0 <= candidates.min() <= candidates.max() < self.num_chunks:
                raise _damaged(self.path, f"{CHUNK_ORDER} points beyond {CHUNKS}")
            equal = (self.chunks[candidates] == tokens[pending]).all(axis=1)
            rows[pending[equal]] = candidates[equal]
            pending, place = pending[~equal], place[~equal] + 1
        return rows

    def document_chunks(self, document_id: int) -> range:
        """The rows that hold the chunks of one document."""
        first, last = np.searchsorted(self.document_ids, [document_id, document_id + 1])
        return range(int(first), int(last))

    def titles(self, document_ids: Any) -> list[str]:
        """The title of each document id; "" for −1. InputError for an id that the set does not have, ValueError for
        what is no integer."""
        titles = []
        for i in as_integers("document_ids", document_ids).tolist():
            if not -1 <= i < self.num_documents:
                raise InputError(
                    f"There is no document {i}: the set has documents 0 to {self.num_documents - 1:,}."
                )
            titles.append("" if i < 0 else self._document(i)["title"])
        return titles

    def _document(self, i: int) -> dict[str, Any]:
        start, stop = self._document_offsets[i : i + 2].tolist()
        if not 0 <= start < stop <= len(self._documents) or stop - start > _MAX_LINE_BYTES:
            raise _damaged(self.path, f"{DOCUMENT_OFFSETS} does not fit {DOCUMENTS}")
        try:
            entry = json.loads(self._documents[start:stop].tobytes())
            if isinstance(entry["title"], str):
                return entry
        except (ValueError, RecursionError, TypeError, KeyError):
            pass
        raise _damaged(self.path, f"line {i + 1:,} of {DOCUMENTS} is no document")

    def texts(self, chunk_ids: Any) -> list[str]:
        """The text of each chunk; "" for −1."""
        ids = as_integers("chunk_ids", chunk_ids)
        if len(ids) and not -1 <= ids.min() <= ids.max() < self.num_chunks:
            raise InputError(
                f"There is no chunk {ids.min()} or {ids.max()}: the set has {self.num_chunks:,} chunks."
            )
        return ["" if i < 0 else self.tokenizer.decode(self.chunks[i]) for i in ids.tolist()]


def as_integers(name: str, values: Any) -> np.ndarray:
    """`values`, of any shape, as int64 [n]. ValueError where they are no integers: rounded they would name others."""
    array = np.asarray(_as_array(values))
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, not {array.dtype}.")
    return array.astype(np.int64).reshape(-1)


def _as_array(values: Any) -> Any:
    if hasattr(values, "cpu"):
        return values.cpu().numpy()
    # of a set or an iterator numpy would make one object
    return list(values) if isinstance(values, Iterable) and not hasattr(values, "__array__") else values


_MIX = np.uint64(0x9E3779B97F4A7C15)


def hash_chunks(tokens: np.ndarray) -> np.ndarray:
    """uint64 [n]: a hash of each row of token ids [n, M], whatever their dtype."""
    multipliers = _mixed(np.arange(1, tokens.shape[1] + 1, dtype=np.uint64) * _MIX) | np.uint64(1)
    result = np.empty(len(tokens), dtype=np.uint64)
    for start in range(0, len(tokens), _BLOCK):
        block = tokens[start : start + _BLOCK].astype(np.uint64) + np.uint64(1)
        result[start : start + _BLOCK] = _mixed((block * multipliers).sum(axis=1, dtype=np.uint64))
    return result


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every bit of x moves half of the bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def open_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """A `.npy` file as a read-only map, if it holds just this dtype and shape and all of its bytes; else InputError."""
    with contextlib.ExitStack() as opened:
        try:
            # once: by the next opening the set may be another one
            file = opened.enter_context(open(path, "rb"))
            version = np.lib.format.read_magic(file)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            found_shape, fortran, found_dtype = read_header(file, max_header_size=4096)
            offset, size = file.tell(), os.fstat(file.fileno()).st_size
        except OSError as error:
            raise _damaged(path.parent, f"{path.name} cannot be read ({error.strerror or error})") from None
        except NO_HEADER:
            raise _damaged(path.parent, f"{path.name} is no array file") from None
        if found_dtype != dtype or found_shape != shape or (fortran and len(shape) > 1):
            expected, found = f"{dtype} {list(shape)}", f"{found_dtype} {list(found_shape)}"
            raise _damaged(path.parent, f"{path.name} holds {found}, but {expected} belongs there")
        if size != offset + math.prod(shape) * dtype.itemsize:
            raise _damaged(
                path.parent, f"{path.name} is {size:,} bytes long, which does not fit its shape {list(shape)}"
            )
        if 0 in shape:
            return np.zeros(shape, dtype)
        return np.memmap(file, dtype=dtype, mode="r", offset=offset, shape=shape)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a set, its values of the right types and signs. InputError where it is missing or damaged."""
    path = folder / MANIFEST
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        if not folder.is_dir():
            reason = f"{folder} is no folder"
        elif isinstance(error, FileNotFoundError):
            reason = (
                f"{folder} holds no {MANIFEST} (an unfinished build lies in a folder that ends in .build)"
            )
        else:
            reason = f"{path} cannot be read ({error.strerror})"
        advice = f"Build one with: retro-kernels index PATH --out {folder}"
        raise InputError(f"No retrieval set: {reason}. {advice}") from None
    try:
        if len(content) > MAX_MANIFEST_BYTES:
            raise ValueError
        manifest = json.loads(content)
        if not isinstance(manifest, dict):
            raise ValueError
    except (ValueError, RecursionError):
        raise _damaged(folder, f"{MANIFEST} is no JSON object") from None
    if manifest.get("format") != FORMAT:
        raise InputError(f"{folder} holds no retrieval set: its {MANIFEST} describes something else.")
    if manifest.get("version") != VERSION:
        raise InputError(
            f"{folder} is a retrieval set of format version {str(manifest.get('version'))[:40]}; this retro_kernels "
            f"reads version {VERSION}. Build it again, or use the release that wrote it."
        )
    _check_types(folder, manifest)
    return manifest


def _check_types(folder: Path, manifest: dict[str, Any]) -> None:
    for keys, kind in _MANIFEST_TYPES.items():
        value: Any = manifest
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if type(value) is not kind or (isinstance(value, int) and not 0 < value < 2**48):
            raise _damaged(folder, f"{'.'.join(keys)} in {MANIFEST} is {str(value)[:40]!r}")
    for name in REQUIRED_FILES:
        if name not in manifest["files"]:
            raise _damaged(folder, f"{MANIFEST} does not list {name}")
    for name, entry in manifest["files"].items():
        if name not in (*REQUIRED_FILES, INDEX):
            raise _damaged(folder, f"{MANIFEST} lists {name[:80]!r}, which is no file of a retrieval set")
        fits = isinstance(entry, dict) and type(entry.get("bytes")) is int and 0 <= entry["bytes"] < 2**63
        if (
            not fits
            or not isinstance(entry.get("sha256"), str)
            or not re.fullmatch("[0-9a-f]{64}", entry["sha256"])
        ):
            raise _damaged(folder, f"the entry of {name} in {MANIFEST} is {str(entry)[:40]!r}")


def quick_to_read(manifest: dict[str, Any]) -> bool:
    """Whether all bytes of a set are read when it is opened."""
    return sum(entry["bytes"] for entry in manifest["files"].values()) <= VERIFIED_BYTES


def check_files(folder: Path, manifest: dict[str, Any], *, checksums: bool) -> None:
    """Every file listed is there, inside the folder, of the right size and, if asked, content; else InputError."""
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise _damaged(folder, f"{name} is missing")
        if path.is_symlink() and path.resolve().parent != folder.resolve():
            raise InputError(
                f"Retrieval set {folder}: {name} is a link out of the folder. Copy the file itself."
            )
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise _damaged(folder, f"{name} has {size:,} bytes, {MANIFEST} says {entry['bytes']:,}")
        if checksums:
            check_checksum(folder, name, entry)


def check_checksum(folder: Path, name: str, entry: dict[str, Any]) -> None:
    """InputError where the content of a file is not what it was when the set was built."""
    if file_sha256(folder / name) != entry["sha256"]:
        raise _damaged(folder, f"the content of {name} has changed (its SHA-256 is not that of {MANIFEST})")


def file_sha256(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """SHA-256 of a file in hexadecimal. progress: is told the number of bytes after each block."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 22):
            digest.update(block)
            if progress:
                progress(len(block))
    return digest.hexdigest()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, whole or not at all."""
    content = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    write_whole(folder / MANIFEST, content.encode())


def _damaged(folder: Path, what: str) -> InputError:
    return InputError(
        f"Retrieval set {folder} is damaged or half copied: {what}. Copy it again or build it again."
    )
