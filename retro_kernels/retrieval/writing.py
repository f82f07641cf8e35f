"""Files that grow, survive a kill −9, and appear under their names only when whole: what long jobs write with.

Nothing here knows what a retrieval set is, but for `ChunkWriter`, which keeps the growing files of one in step. A job
whose parts are not yet its result (neighbours, evaluation, de-duplication) keeps them in a `Journal`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load as unpacked
from safetensors.numpy import save as packed

from retro_kernels.config import InputError, staged, write_whole
from retro_kernels.data.text import note
from retro_kernels.data.tokenizer import Tokenizer, token_dtype
from retro_kernels.retrieval import store as files

HEADER_BYTES = 128
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""After these the same command goes on, once there is."""


@contextlib.contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Holds the lock file `path`, or raises InputError(busy). The kernel frees it when a process dies."""
    import fcntl

    check_no_folder(path)
    try:
        file = open(path, "a+b")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}. Choose a writable place.") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(busy) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
            note(
                f"{path}: no lock is to be had there ({error.strerror}); see that no other process does the same."
            )
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise InputError(busy)  # it finished, and deleted the file, just now
        yield


def check_no_folder(path: Path) -> None:
    """InputError for a folder in the place of a file with which a job works; to be known before the job begins."""
    if path.is_dir():
        raise InputError(
            f"{path} is where this job keeps what is done, but it is a folder. Move it away, or choose another name "
            "for the result."
        )


def check_writable(folder: Path, advice: str) -> None:
    """InputError, ending with `advice`, where `folder` is no folder, or can be neither written nor made: now, and not
    after hours."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{nearest} {'cannot be written' if nearest.is_dir() else 'is a file'}{advice}")


class GrowingArray:
    """A `.npy` file that is appended to; its header is written when its length is known."""

    def __init__(self, path: Path, dtype: np.dtype, width: tuple[int, ...], rows: int) -> None:
        self._path, self._dtype, self._width = path, dtype, width
        self.rows = rows
        self._row_bytes = int(dtype.itemsize * np.prod(width, dtype=np.int64))
        self._file = _opened(path, rows)
        if self._file.seek(0, os.SEEK_END) < HEADER_BYTES + rows * self._row_bytes and rows:
            raise InputError(
                f"{path} is shorter than its journal says. Delete {path.parent.parent} and build again."
            )
        self._file.truncate(HEADER_BYTES + rows * self._row_bytes)
        self._file.seek(0, os.SEEK_END)

    def append(self, values: np.ndarray) -> None:
        values = np.ascontiguousarray(values, dtype=self._dtype).reshape(-1, *self._width)
        _write(self._file, values)
        self.rows += len(values)

    def save(self) -> None:
        """Everything appended is on the disk afterwards."""
        _sync(self._file)

    def close(self) -> None:
        """Writes the header. numpy leaves room in it for any length, so it has the same size for all."""
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False}
        self._file.seek(0)
        np.lib.format.write_array_header_1_0(self._file, {**header, "shape": (self.rows, *self._width)})
        if self._file.tell() != HEADER_BYTES:
            raise AssertionError(f"the header of {self._path} has {self._file.tell()} bytes")
        _sync(self._file)
        self._file.close()


def _opened(path: Path, length: int) -> Any:
    """For writing on after `length`. What begins anew is a new file: the old one may be a set's, by another name."""
    if length == 0:
        path.unlink(missing_ok=True)
    return open(path, "r+b" if path.exists() else "w+b")


def _write(file: Any, values: np.ndarray) -> None:
    """Not ndarray.tofile, which hides why a write failed."""
    if values.size:
        file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def save_array(path: Path, values: np.ndarray) -> None:
    """A `.npy` file, whole or not at all."""
    with staged(path) as temporary, open(temporary, "wb") as file:
        header = np.lib.format.header_data_from_array_1_0(values)
        np.lib.format.write_array_header_1_0(file, header)
        _write(file, values)
        _sync(file)


def save_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value).encode())


def load_json(path: Path) -> Any:
    """None where it is absent or was never finished. OSError where it is there and cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None


class Journal:
    """The parts of a long job that are done, for the same job to take up after a kill −9. `journal` opens one.

        for item in items:
            part = journal.take() or journal.add(work(item))

    A part is named arrays. Parts come in the same order whenever the job runs; each is in the file, with a checksum, as
    soon as it was added (a power cut, and nothing less, may cost the last half minute's). From the first on that is
    damaged, or has another key, they are made again. Without a file nothing is kept.
    """

    _BEGINNING = b"retro_kernels journal 1\n"
    _HEAD = struct.Struct("<Q16s")  # bytes of the part; checksum of key and part

    def __init__(self, file: Any = None, about: str = "") -> None:
        """file: open for reading and writing, unbuffered, so that a full disk is found out in `add`.  about: the key of
        a first, empty part: what all others depend on. InputError for a file that is no journal."""
        self._file = file
        self._ahead = file is not None
        """Whether there may be parts that were not taken yet."""
        if file is None:
            return
        found = file.read(len(self._BEGINNING))
        if not self._BEGINNING.startswith(found):
            raise InputError(
                f"{file.name} is where this job keeps what is done, but it holds something else. Move it away, delete "
                "it if it is not needed, or choose another name for the result."
            )
        self._write(self._BEGINNING[len(found) :])
        if self.take(about) is None:
            self.add({}, about)
        self._first = file.tell()

    def take(self, key: str = "") -> dict[str, np.ndarray] | None:
        """The next part, if it was made for `key`; None where it is yet to be made."""
        if not self._ahead:
            return None
        start = self._file.tell()
        content = self._read(key)
        if content is None:
            self._ahead = False
            self._file.truncate(start)
            self._file.seek(start)
            return None
        return unpacked(content)

    def add(self, part: dict[str, np.ndarray], key: str = "") -> dict[str, np.ndarray]:
        """Keeps the part that `take` did not have, and returns it. OSError where it cannot be written."""
        if self._file is not None:
            self._write(self._framed(part, key))
        return part

    @classmethod
    def beginning(cls, about: str) -> bytes:
        """What a journal about that begins with."""
        return cls._BEGINNING + cls._framed({}, about)

    @classmethod
    def _framed(cls, part: dict[str, np.ndarray], key: str) -> bytes:
        content = packed({name: np.ascontiguousarray(values) for name, values in part.items()})
        return cls._HEAD.pack(len(content), cls._checksum(key, content)) + content

    def _write(self, content: bytes) -> None:
        rest = memoryview(content)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from error

    def has_parts(self) -> bool:
        """Whether there is anything to take up later, be it of an earlier call."""
        return os.fstat(self._file.fileno()).st_size > self._first

    def _read(self, key: str) -> bytes | None:
        """The next part, if all of it is there as it was written."""
        head = self._file.read(self._HEAD.size)
        if len(head) < self._HEAD.size:
            return None
        size, checksum = self._HEAD.unpack(head)
        if size > os.fstat(self._file.fileno()).st_size - self._file.tell():  # nor would a damaged number fit
            return None
        content = self._file.read(size)
        return content if self._checksum(key, content) == checksum else None

    @staticmethod
    def _checksum(key: str, content: bytes) -> bytes:
        digest = hashlib.blake2b(key.encode() + b"\0", digest_size=16)
        digest.update(content)
        return digest.digest()


@contextlib.contextmanager
def journal(path: Path | None, about: str, busy: str) -> Iterator[Journal]:
    """The journal in the file `path`, of one process at a time: InputError(busy) for another. None: nothing is kept.

    about: text on whatever the parts depend on. A journal about something else is begun anew; a file that is no journal
    is left as it is: InputError.
    The file is deleted at the end, so the result must be written before that; it stays after an exception, if a part
    was done. Ctrl-C and a full disk then say where, and that the same command goes on.
    """
    if path is None:
        yield Journal()
        return
    with locked(path, busy), open(path, "r+b", buffering=0) as file:
        kept = Journal(file, about)
        try:
            yield kept
        except BaseException as stopped:
            if done := kept.has_parts():
                if type(stopped) is KeyboardInterrupt and not stopped.args:
                    raise interrupted(path) from None
            else:
                path.unlink(missing_ok=True)
            if isinstance(stopped, OSError) and stopped.errno in NO_ROOM:
                again = f". What is done is kept in {path}: run the same command again." if done else ""
                # a file without a name, or one that is open already, does not say which disk it is
                where = stopped.filename or str(path.parent)
                raise OSError(stopped.errno, f"{stopped.strerror}{again}", where) from stopped
            raise
        path.unlink(missing_ok=True)


def forget_journal(path: Path, about: str) -> None:
    """Deletes the journal in `path`, if it is about the same: whoever kept it was killed when the result stood. One
    that is about something else, or that a process writes, stays."""
    start = Journal.beginning(about)
    with contextlib.suppress(InputError, OSError), open(path, "rb") as file:
        if file.read(len(start)) == start:
            with locked(path, ""):
                path.unlink()


def interrupted(path: Path) -> KeyboardInterrupt:
    """Ctrl-C, where `path` holds what the same command goes on from."""
    return KeyboardInterrupt(
        f"Interrupted. What is done is kept in {path}: the same command goes on from there."
    )


def link_or_copy(source: Path, target: Path) -> None:
    """`source` under a second name; where the file system has no such links, a copy that is on the disk."""
    target.unlink(missing_ok=True)
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)
        with open(target, "rb") as file:
            os.fsync(file.fileno())


@dataclass
class Progress:
    """cut.json: up to where the growing files are whole."""

    read: int = 0  # documents of the input, copies included
    documents: int = 0
    chunks: int = 0
    tokens: int = 0
    title_bytes: int = 0
    done: bool = False
    fingerprint: str = ""


class ChunkWriter:
    """The five files that grow with the documents, kept in step with a `Progress`."""

    def __init__(self, folder: Path, vocab_size: int, chunk_size: int, state: Progress) -> None:
        self.state = state
        self._chunk_size = chunk_size
        self._chunks = GrowingArray(
            folder / files.CHUNKS, token_dtype(vocab_size), (chunk_size,), state.chunks
        )
        long = np.dtype(np.int64)
        self._ids = GrowingArray(folder / files.DOCUMENT_IDS, long, (), state.chunks)
        self._hashes = GrowingArray(folder / files.DOCUMENT_HASHES, long, (), state.documents)
        self._offsets = GrowingArray(folder / files.DOCUMENT_OFFSETS, long, (), state.documents)
        self._titles = _opened(folder / files.DOCUMENTS, state.title_bytes)
        self._titles.truncate(state.title_bytes)
        self._titles.seek(0, os.SEEK_END)

    def add(self, text_hash: int, title: str, text: str, tokenizer: Tokenizer) -> None:
        """A whole document: its chunks, the last one padded, and its entry."""
        tokens = tokenizer.encode_array(text)
        rows = -(-len(tokens) // self._chunk_size)
        padded = np.zeros(rows * self._chunk_size, dtype=np.int32)
        padded[: len(tokens)] = tokens
        self.add_chunks(padded.reshape(rows, -1), np.full(rows, self.state.documents))
        self.state.tokens += len(tokens)
        self.add_document(text_hash, title, len(text.encode()))

    def add_chunks(self, chunks: np.ndarray, document_ids: np.ndarray) -> None:
        self._chunks.append(chunks)
        self._ids.append(document_ids)
        self.state.chunks += len(chunks)

    def add_document(self, text_hash: int, title: str, text_bytes: int) -> None:
        clean = title.encode(errors="replace").decode()
        line = json.dumps({"title": clean, "bytes": text_bytes}, ensure_ascii=False).encode() + b"\n"
        self._hashes.append(np.array([text_hash]))
        self._offsets.append(np.array([self.state.title_bytes]))
        self._titles.write(line)
        self.state.title_bytes += len(line)
        self.state.documents += 1

    def save(self) -> None:
        for array in (self._chunks, self._ids, self._hashes, self._offsets):
            array.save()
        _sync(self._titles)

    def close(self) -> None:
        self._offsets.append(np.array([self.state.title_bytes]))
        for array in (self._chunks, self._ids, self._hashes, self._offsets):
            array.close()
        _sync(self._titles)
        self._titles.close()


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def swap(new: Path, out: Path, parked: Path) -> None:
    """`new` becomes `out`; an older `out` is deleted afterwards.

    Where names cannot be exchanged, the older one lies at `parked` between two renames, and is deleted from there.
    """
    if not out.exists() or not any(out.iterdir()):
        os.rename(new, out)
    elif _exchange(new, out):
        shutil.rmtree(new)
    else:
        if parked.exists():
            shutil.rmtree(parked)
        os.rename(out, parked)
        os.rename(new, out)
        shutil.rmtree(parked)


def _exchange(a: Path, b: Path) -> bool:
    """Linux's renameat2 with RENAME_EXCHANGE: both names change hands in one step. False where there is none."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, exchange = -100, 2
    return rename(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0
