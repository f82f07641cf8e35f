"""Documents out of files: folders of text or source, JSON a line, Parquet, packed or not, and stdin.

The order is the same wherever the files are the same, so document numbers mean something. What cannot be read as text
inside a folder, or in a line, is counted, reported once and left out; a file that was named is wanted, so that it does
not exist, or cannot be read, is an error.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import fnmatch
import gzip
import hashlib
import importlib.util
import json
import logging
import lzma
import math
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

from retro_kernels.config import InputError

try:
    from compression import zstd
except ImportError:  # before Python 3.14
    try:
        from backports import zstd
    except ImportError:
        zstd = None

MAX_DOCUMENT_BYTES = 1 << 30
_log = logging.getLogger(__name__)
_SNIFF_BYTES = 8192


def _open_zstd(path: Path, mode: str) -> Any:
    # 31: what `zstd --long=31` packs, as large dumps are, needs its whole window of 2 GiB
    return zstd.open(path, mode, options={zstd.DecompressionParameter.window_log_max: 31})


_COMPRESSED: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".lzma": lzma.open,
    ".bz2": bz2.open,
    ".zst": _open_zstd,
    ".zstd": _open_zstd,
}
_NOT_UNPACKED = {".lz4", ".br", ".zip", ".7z", ".rar", ".tar", ".tgz", ".txz", ".tbz2", ".tzst"}
_ARROW_FILES = {"dataset_dict.json", "dataset_info.json", "state.json"}
"""What `datasets` writes about its Arrow files beside them, or above their folders."""
_PARQUET, _PARQUET_ROWS = ".parquet", 256
_PARQUET_BUFFER = 1 << 20
"""Bytes of a column read at a time. Without it all of a row group's are, and a group may be the whole file."""
_TITLES = ("title", "id")
"""What names a document in a line or row, the first of them that it has."""


class _Damaged(Exception):
    """pyarrow's errors as one, which can be caught without pyarrow."""


_READ_ERRORS: tuple[type[Exception], ...] = (OSError, EOFError, lzma.LZMAError, zlib.error, _Damaged)
if zstd is not None:
    _READ_ERRORS += (zstd.ZstdError,)
_BROKEN_OFF, _EMPTY, _NOT_UTF8 = "unreadable", "empty", "not UTF-8"
LONE_SURROGATES = "with lone surrogates"
_TOO_LARGE, _NOT_JSON, _NO_TEXT = "larger than 1 GiB", "not JSON", 'without a "text"'
_PACKED = "packed in a way that is not read (.gz, .xz, .bz2 and .zst are)"
_ARROW = "in Arrow, which is not read (Parquet is: Dataset.to_parquet)"
_NO_ZSTD = "packed with zstd, which takes backports.zstd to read"
_NO_PYARROW = "in Parquet, which takes pyarrow to read"
_ADVICE = {
    _NOT_UTF8: "Convert it to UTF-8",
    LONE_SURROGATES: "Spell characters by both surrogates of their pair, or as they are",
    _TOO_LARGE: "Split it into several documents",
    _NOT_JSON: "Make it one JSON object a line",
    _NO_TEXT: 'Give its lines or rows a "text"',
    _PACKED: "Unpack it",
    _ARROW: "Write its rows as Parquet or JSON lines",
    _NO_ZSTD: "Install it (pip install backports.zstd), unpack the file",
    _NO_PYARROW: "Install it (pip install pyarrow)",
}
"""What to do about a file that was named and is left out for that reason."""
_SKIPPED_DIRECTORIES = {"__pycache__", "node_modules"}
_OWN_FOLDERS = {
    "a training run": ("train.json", "tokenizer.model"),
    "a retrieval set": ("manifest.json", "chunks.npy"),
    "an unfinished retrieval set": ("plan.json", "lock"),
}
"""By files in them: no text of the user's, and it changes with every step."""


@dataclass(frozen=True, slots=True)
class Document:
    """One document: a file, a line of a `.jsonl`, or all of stdin."""

    title: str
    text: str


@dataclass
class ReadReport:
    """What was read and what was left out, by reason, with the first example of each."""

    documents: int = 0
    text_bytes: int = 0
    """UTF-8 bytes of the documents read."""
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def skip(self, reason: str, where: str) -> None:
        self.skipped[reason] += 1
        self.examples.setdefault(reason, where)

    def add(self, other: ReadReport) -> None:
        """What was left out of something that was read later."""
        self.skipped.update(other.skipped)
        self.examples = other.examples | self.examples

    def warning(self) -> str | None:
        """One line on what was left out; None where nothing was."""
        if not self.skipped:
            return None
        reasons = [
            f"{count:,} {reason} (first: {self.examples[reason]})" for reason, count in self.skipped.items()
        ]
        return f"Documents left out: {self.skipped.total():,}. " + "; ".join(reasons) + "."


def one_or_more(paths: Any) -> list[Any]:
    """Paths or patterns as a list, where they may be one alone, which as a str would be taken for its characters."""
    return [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)


def read_documents(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    leave_out: Sequence[str | os.PathLike[str]] = (),
    report: ReadReport | None = None,
) -> Iterator[Document]:
    """Yields the documents of `paths`, in the order given; a folder's files in the order of their names.

    paths: files, folders and `"-"` for stdin (UTF-8 text, one document). A `.jsonl` holds one JSON object a line with
        `text`, and `title` or `id` for its title, and so does a `.json` whose first line is such an object (C4, Dolma);
        a `.parquet` has these as columns (and needs pyarrow). Any other file is one document. All are unpacked where
        they end in `.gz`, `.xz`, `.bz2` or `.zst` (which before Python 3.14 needs backports.zstd).
    include, exclude: shell patterns (`*.py`, `tests`, `docs/*.md`) for files inside folders, matched against the name
        and the path relative to the folder; an excluded folder is not entered. Hidden files, `__pycache__`, the
        folders of training runs and retrieval sets, and what `datasets` writes about its Arrow files are left out.
    leave_out: folders that are not entered and files that are not read where they lie in a folder of `paths`, such as
        what is being written.
    report: is filled in while reading. Without one, what was left out is logged as one warning at the end.

    Left out and counted: lines of a `.jsonl`, rows of a `.parquet`, and files inside folders, that cannot be read or
    unpacked, are not UTF-8, have lone surrogates (which JSON can spell), are larger than 1 GiB, or no JSON object with
    a text; in folders also binary files (a NUL in the first 8 KiB); and whatever is empty or white space.
    Raises InputError, before anything is read, for a path that does not exist, for no path at all, for the folder of a
    training run or a retrieval set, and for a file in `paths` whose first bytes cannot be read; while reading, for one
    that shows later that it cannot be.
    """
    checked = [os.fspath(path) for path in one_or_more(paths)]
    if not checked:
        raise InputError("No text was given: name files, folders or - for stdin.")
    for path in checked:
        if path != "-" and not os.path.exists(path):
            raise InputError(
                f"{path} does not exist. Give a text file, a .jsonl, a folder of such, or - for stdin."
            )
        if os.path.isfile(path):
            _check_beginning(Path(path))
        elif path != "-" and (kind := _own_kind(path)):
            raise InputError(
                f"{path} is {kind}, and no text. Give the text that it was made from (or a file in it, by its name)."
            )
    left_out = frozenset(map(os.path.realpath, one_or_more(leave_out)))
    wanted = _Wanted(one_or_more(include), one_or_more(exclude), left_out)
    return _read(checked, wanted, report)


Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Sequence[Document]
Reader = Callable[[ReadReport], Iterator[Document]]


def reader_of(
    paths: Source, include: Sequence[str], exclude: Sequence[str], leave_out: Sequence[str]
) -> Reader:
    """A function that reads the documents; it can be called again, stdin and pipes included."""
    entries: Any = one_or_more(paths)
    if entries and all(isinstance(entry, Document) for entry in entries):
        return lambda report: _count(entries, report)
    options: Any = {"include": include, "exclude": exclude, "leave_out": leave_out}
    read_documents(entries, **options)  # checks the paths, reads nothing
    if not any(map(_once, entries)):
        return lambda report: read_documents(entries, **options, report=report)
    kept: dict[Any, tuple[list[Document], ReadReport]] = {}

    def read(report: ReadReport) -> Iterator[Document]:
        for entry in entries:
            if not _once(entry):
                yield from read_documents(entry, **options, report=report)
                continue
            if entry not in kept:
                own = ReadReport()
                kept[entry] = list(read_documents(entry, report=own)), own
            documents, own = kept[entry]
            report.add(own)
            yield from _count(documents, report)

    return read


def _once(path: str | os.PathLike[str]) -> bool:
    """Whether it can be read but once: stdin, or a pipe."""
    return path == "-" or not (os.path.isfile(path) or os.path.isdir(path))


def _count(documents: Iterable[Document], report: ReadReport) -> Iterator[Document]:
    for document in documents:
        if not document.text.strip():
            report.skip(_EMPTY, document.title)
            continue
        try:
            size = len(document.text.encode())
        except UnicodeEncodeError:
            report.skip(LONE_SURROGATES, document.title)
            continue
        report.documents += 1
        report.text_bytes += size
        yield document


def _own_kind(folder: str) -> str | None:
    """Which of `_OWN_FOLDERS` it is, if any."""
    for kind, names in _OWN_FOLDERS.items():
        if all(os.path.isfile(os.path.join(folder, name)) for name in names):
            return kind
    return None


@dataclass(frozen=True)
class _Wanted:
    """Which files of a folder are read."""

    include: Sequence[str]
    exclude: Sequence[str]
    leave_out: frozenset[str]

    def enters(self, folder: os.DirEntry[str]) -> bool:
        if folder.name in _SKIPPED_DIRECTORIES or _own_kind(folder.path):
            return False
        return not self._left_out(folder)

    def reads(self, file: os.DirEntry[str], relative: str) -> bool:
        wanted = not self.include or _matches(relative, file.name, self.include)
        return wanted and not self._left_out(file)

    def _left_out(self, entry: os.DirEntry[str]) -> bool:
        return bool(self.leave_out) and os.path.realpath(entry.path) in self.leave_out


def _read(paths: list[str], wanted: _Wanted, given: ReadReport | None) -> Iterator[Document]:
    report = given or ReadReport()
    for path in paths:
        for document in _read_path(path, wanted, report):
            report.documents += 1
            report.text_bytes += len(document.text.encode())
            yield document
    if given is None and (warning := report.warning()):
        _log.warning(warning)


def _check_beginning(path: Path) -> None:
    """InputError at once, and not after hours with the paths before it, for a file that was named and begins wrong."""
    if why := _not_read(path):
        raise _unreadable(str(path), why, _ADVICE[why])
    try:
        with _open(path) as file:
            if _suffix(path) == _PARQUET:
                if "text" not in _parquet(file)[1]:
                    raise _unreadable(str(path), _NO_TEXT, _ADVICE[_NO_TEXT])
                return
            lines = _is_json_lines(path, file)
            head = file.read(_SNIFF_BYTES)
        if not lines:
            # a letter may be cut in two where the file goes on
            codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < _SNIFF_BYTES)
    except UnicodeDecodeError as error:
        raise _unreadable(str(path), f"not UTF-8 (byte {error.start:,})", _ADVICE[_NOT_UTF8]) from None
    except _READ_ERRORS as error:
        raise _broken(str(path), error) from None


def _unreadable(path: str, why: str, advice: str) -> InputError:
    return InputError(
        f"{path} cannot be read: {why}. {advice}, or leave it out (of a folder, such a file is left out)."
    )


def _broken(path: str, error: BaseException) -> InputError:
    if isinstance(error, PermissionError):
        advice = "Get the right to read it"
    # those of gzip, bz2 and pyarrow are OSErrors without a number
    elif not isinstance(error, OSError) or error.errno is None:
        advice = "It is damaged, cut off, or no such file as its name says: copy it again"
    else:
        advice = "See to the disk that it is on"
    return _unreadable(path, _reason(error), advice)


def _reason(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error)).partition("\n")[0]


def _read_named(
    path: str, read: Callable[[ReadReport], Iterator[Document]], report: ReadReport
) -> Iterator[Document]:
    """What `read` finds in a file that was named; InputError where nothing of it can be read, or not all of it."""
    own, found = ReadReport(), False
    try:
        for document in read(own):
            found = True
            yield document
    except _READ_ERRORS as error:
        raise _broken(path, error) from None
    wrong = [reason for reason in own.skipped if reason != _EMPTY and not found]
    if wrong:
        raise _unreadable(path, f"{wrong[0]} ({own.examples[wrong[0]]})", _ADVICE[wrong[0]])
    report.add(own)


def _read_path(path: str, wanted: _Wanted, report: ReadReport) -> Iterator[Document]:
    if path == "-":
        yield from _read_named(
            "stdin", lambda own: _one_document(sys.stdin.buffer, "stdin", "stdin", own), report
        )
    elif os.path.isdir(path):
        root = Path(path)
        for relative in _walk(root, "", wanted, report):
            try:
                yield from _read_file(root / relative, relative, report, in_folder=True)
            except _READ_ERRORS as error:
                report.skip(_BROKEN_OFF, f"{root / relative}: {_reason(error)}")
    else:
        yield from _read_named(
            path, lambda own: _read_file(Path(path), Path(path).name, own, in_folder=False), report
        )


def _walk(root: Path, folder: str, wanted: _Wanted, report: ReadReport) -> Iterator[str]:
    """Relative paths of the files wanted, in an order set by the names only. Links to folders are not followed."""
    try:
        entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
    except OSError as error:
        if not folder:  # it was named
            raise _broken(str(root), error) from None
        report.skip(_BROKEN_OFF, f"{root / folder}: {error.strerror}")
        return
    files = {entry.name for entry in entries if not entry.is_dir(follow_symlinks=False)}
    arrow = files == {"dataset_dict.json"} or any(name.endswith(".arrow") for name in files)
    for entry in entries:
        relative = f"{folder}/{entry.name}" if folder else entry.name
        if arrow and entry.name in _ARROW_FILES:
            continue
        if entry.name.startswith(".") or _matches(relative, entry.name, wanted.exclude):
            continue
        if entry.is_dir(follow_symlinks=False):
            if wanted.enters(entry):
                yield from _walk(root, relative, wanted, report)
        elif wanted.reads(entry, relative):
            try:
                there = entry.is_file()
            except OSError as error:  # a link that leads in a circle, or to where nobody may look
                report.skip(_BROKEN_OFF, f"{root / relative}: {error.strerror}")
                continue
            if there:
                yield relative


def _matches(relative: str, name: str, patterns: Sequence[str]) -> bool:
    return any(
        fnmatch.fnmatchcase(text, pattern.rstrip("/")) for pattern in patterns for text in (relative, name)
    )


def _suffix(path: Path) -> str:
    """Of what is in a file when it is unpacked."""
    return (Path(path.stem) if path.suffix.lower() in _COMPRESSED else path).suffix.lower()


def _not_read(path: Path) -> str | None:
    """Why no file of this name can be read here, whatever is in it."""
    if _suffix(path) in _NOT_UNPACKED:
        return _PACKED
    if _suffix(path) == ".arrow":
        return _ARROW
    if zstd is None and _COMPRESSED.get(path.suffix.lower()) is _open_zstd:
        return _NO_ZSTD
    if _suffix(path) == _PARQUET and importlib.util.find_spec("pyarrow") is None:
        return _NO_PYARROW
    return None


def _is_json_lines(path: Path, file: IO[bytes] | Any) -> bool:
    """`file` stands at its beginning, before and after."""
    if _suffix(path) != ".json":
        return _suffix(path) in (".jsonl", ".ndjson")
    while (first := file.readline(MAX_DOCUMENT_BYTES)) and not first.strip():
        pass
    file.seek(0)
    try:
        text = json.loads(first.decode("utf-8-sig"))["text"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
    return text is None or isinstance(text, str)  # the first document may lack what the others have


def _open(path: Path) -> Any:
    return _COMPRESSED.get(path.suffix.lower(), open)(path, "rb")


def _read_file(path: Path, title: str, report: ReadReport, *, in_folder: bool) -> Iterator[Document]:
    if why := _not_read(path):
        report.skip(why, str(path))
        return
    with _open(path) as file:
        if _suffix(path) == _PARQUET:
            yield from _parquet_rows(file, title, str(path), report)
        elif _is_json_lines(path, file):
            yield from _json_lines(file, title, str(path), report)
        elif in_folder and _is_binary(file.read(_SNIFF_BYTES)):
            report.skip("binary", str(path))
        else:
            if in_folder:
                file.seek(0)
            yield from _one_document(file, title, str(path), report)


def _is_binary(head: bytes) -> bool:
    """UTF-16 has a NUL in every other byte, too: it is text, to be counted as what can be converted."""
    return b"\0" in head and not head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))


def _one_document(file: IO[bytes] | Any, title: str, where: str, report: ReadReport) -> Iterator[Document]:
    content = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(content) > MAX_DOCUMENT_BYTES:
        report.skip(_TOO_LARGE, where)
        return
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        report.skip(_NOT_UTF8, f"{where}, byte {error.start:,}")
        return
    if text.strip():
        yield Document(title.encode(errors="replace").decode(), text)  # a name may be no text
    else:
        report.skip(_EMPTY, where)


def _json_lines(file: IO[bytes] | Any, title: str, where: str, report: ReadReport) -> Iterator[Document]:
    number = 0
    while line := file.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        place = f"{where}, line {number:,}"
        if len(line) > MAX_DOCUMENT_BYTES:
            report.skip(_TOO_LARGE, place)
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_DOCUMENT_BYTES)
        elif line.strip():
            try:
                entry = json.loads(line.decode("utf-8-sig"))
            except UnicodeError:
                report.skip(_NOT_UTF8, place)
            except (ValueError, RecursionError):
                report.skip(_NOT_JSON, place)
            else:
                yield from _entry(entry, f"{title}, line {number:,}", place, report)


@contextlib.contextmanager
def _parquet_errors() -> Iterator[None]:
    import pyarrow

    try:
        yield
    except pyarrow.ArrowException as error:
        raise _Damaged(error) from None


def _parquet(file: IO[bytes] | Any) -> tuple[Any, list[str]]:
    """(the file, which of the columns that are read it has)."""
    from pyarrow import parquet

    with _parquet_errors():
        opened = parquet.ParquetFile(file, buffer_size=_PARQUET_BUFFER, pre_buffer=False)
    return opened, [name for name in ("text", *_TITLES) if name in opened.schema_arrow.names]


def _parquet_rows(file: IO[bytes] | Any, title: str, where: str, report: ReadReport) -> Iterator[Document]:
    opened, columns = _parquet(file)
    if "text" not in columns:
        report.skip(_NO_TEXT, where)
        return
    batches = opened.iter_batches(batch_size=_PARQUET_ROWS, columns=columns, use_threads=False)
    number = 0
    while True:
        with _parquet_errors():
            batch = next(batches, None)
        if batch is None:
            return
        # by number, for a name may stand there twice: the first counts
        read = {name: batch.column(batch.schema.names.index(name)) for name in columns}
        for row in range(batch.num_rows):
            number += 1
            place = f"{where}, row {number:,}"
            try:
                entry = {name: _plain(column[row]) for name, column in read.items()}
            except UnicodeError:
                report.skip(_NOT_UTF8, place)
            else:
                yield from _entry(entry, f"{title}, row {number:,}", place, report)


def _plain(value: Any) -> Any:
    """A value of pyarrow as one of Python's; None where there is none, or a time that Python cannot hold."""
    try:
        found = value.as_py()
    except UnicodeError:
        raise
    except (ValueError, OverflowError):
        return None
    # where pandas is installed, such a time is one of its own
    return None if getattr(found, "nanosecond", 0) else found


def _entry(entry: Any, title: str, place: str, report: ReadReport) -> Iterator[Document]:
    """The document of one line or row. title: where it has none of its own."""
    try:
        text = entry["text"]
        size = len(text.encode())
    except UnicodeEncodeError as error:
        report.skip(LONE_SURROGATES, f"{place}, \\u{ord(error.object[error.start]):04x}")
        return
    except (TypeError, KeyError, AttributeError):
        report.skip(_NO_TEXT, place)
        return
    if size > MAX_DOCUMENT_BYTES:
        report.skip(_TOO_LARGE, place)
        return
    if not text.strip():
        report.skip(_EMPTY, place)
        return
    names = (entry.get(key) for key in _TITLES)
    own = next((name for name in names if name is not None and name != ""), title)  # 0 is one
    yield Document(str(own).encode(errors="replace").decode(), text)


def document_hash(text: str) -> int:
    """A 64-bit name for a document, the same in every corpus: BLAKE2b of its UTF-8 text, as a signed integer."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


class Fingerprint:
    """Hash of a sequence of documents, by their text and title."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, text_hash: int, title: str) -> None:
        name = title.encode(errors="replace")
        self._digest.update(
            text_hash.to_bytes(8, "little", signed=True) + len(name).to_bytes(8, "little") + name
        )

    def hex(self) -> str:
        return self._digest.hexdigest()


_D = TypeVar("_D", bound=Document)


def split_documents(documents: Iterable[_D], fraction: float, seed: int = 0) -> tuple[list[_D], list[_D]]:
    """(kept, held out): each document is held out with probability `fraction`, by a hash of its text and the seed.

    Copies of a text land on the same side, and adding documents moves none. Where that would leave a side empty (few
    documents, 0 < fraction < 1), the text nearest to the border changes sides.
    """
    if not 0.0 <= fraction <= 1.0:
        raise InputError(f"fraction is {fraction}; it is the share of documents to hold out, from 0 to 1.")
    documents = list(documents)
    places = [_place(document.text, seed) for document in documents]
    border = fraction
    if 0.0 < fraction < 1.0 and len(distinct := sorted(set(places))) > 1:
        border = min(max(fraction, math.nextafter(distinct[0], 1.0)), distinct[-1])
    kept = [document for document, place in zip(documents, places, strict=True) if place >= border]
    held_out = [document for document, place in zip(documents, places, strict=True) if place < border]
    return kept, held_out


def _place(text: str, seed: int) -> float:
    """A number in [0, 1), uniform over texts."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=f"held out {seed}".encode()).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2.0**53
