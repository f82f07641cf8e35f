"""Building a retrieval set: documents → chunks → embeddings → index, in a work folder that becomes the set at the end.

The work lies beside the set, in `<out>.build`, and every step can be taken up again after a kill −9:

    plan.json                  what is being built; another input or another setting is refused, not mixed in
    set/                       the files of the set as they grow; cut.json says up to where they are whole
    embeddings-0-1023.npy …    the rows of one shard each, under that name only when whole
    trained.faiss              the index before vectors are added; index.json says how far the index is
    old/                       the set that is being replaced, between two renames, where names cannot be exchanged

A folder of that name without a plan is somebody else's, and is not touched. A set becomes visible in one rename, the
manifest being its last file. Replacing a set exchanges the two folders, so a reader sees the old one or the new one.
Where only the index is to be another one, chunks and vectors of the set in place are taken over. Memory is bounded by
one shard and one document, apart from 30 bytes a document while the text is read, 20 bytes a chunk while the table that
finds chunks by content is sorted, the tokenizer's sample, and what the index itself needs.

Large corpora: build parts in several processes or on several machines (`part=(i, n)`, one tokenizer for all), then
`merge_retrieval_sets`. Parts whose index begins with the trained one of the first (`trained_index`) are merged without
encoding a vector again. `append_to_retrieval_set` adds documents to a set.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from retro_kernels.config import InputError, as_integer
from retro_kernels.data.corpus import (
    Document,
    Fingerprint,
    Reader,
    ReadReport,
    Source,
    document_hash,
    reader_of,
)
from retro_kernels.data.text import note, progress_bar
from retro_kernels.data.tokenizer import TextSampler, Tokenizer, check_vocab_size, token_dtype
from retro_kernels.ops._backend import pick_device
from retro_kernels.retrieval import store as files
from retro_kernels.retrieval.embedder import (
    TextEmbedder,
    as_embedder,
    describe_embedder,
    embedded,
    embedder_in_words,
)
from retro_kernels.retrieval.index import (
    EXACT,
    Index,
    check_factory,
    check_recall,
    choose_factory,
    require_faiss,
)
from retro_kernels.retrieval.store import ChunkStore, hash_chunks, open_array
from retro_kernels.retrieval.writing import (
    HEADER_BYTES,
    NO_ROOM,
    ChunkWriter,
    GrowingArray,
    Progress,
    interrupted,
    link_or_copy,
    load_json,
    locked,
    save_array,
    save_json,
    swap,
    sync_folder,
)

SHARD_CHUNKS = 1024  # ten seconds of a slow processor: what an interrupted build loses at most
# as many are cut in a second; to bring six files to the disk for each would take a good part of that
_CUT_SHARDS = 16
_UNSORTED = 1 << 16  # hashes of documents that are kept aside before they are sorted
_EXACT_FALLBACK = 1_000_000  # vectors: 15 ms of a core for a query (bench/results/retrieval.json)
_EXACT_SAMPLE = 1 << 16  # vectors among which the speed of an exact search is measured
_PLAN, _LOCK = "plan.json", "lock"
APPEND = ".append"
"""Ends the name of the set in which documents are embedded that are to be added to one."""


def build_retrieval_set(
    paths: Source,
    out: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
    vocab_size: int | None = None,
    embedder: str | os.PathLike[str] | TextEmbedder | None = None,
    embedder_dtype: str | None = None,
    index: str | None = None,
    trained_index: str | os.PathLike[str] | None = None,
    recall: float = 0.95,
    device: Any = None,
    chunk_size: int = 64,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    part: tuple[int, int] | None = None,
    overwrite: bool = False,
    shard_chunks: int = SHARD_CHUNKS,
    progress: bool = True,
) -> dict[str, Any]:
    """Builds the retrieval set `out` from text and returns its manifest.

    paths: files, folders and "-" as `read_documents` takes them (also include, exclude), or a list of `Document`.
        Documents with the same text are kept once. `out` itself is not read where it lies in one of them.
    tokenizer: a SentencePiece model or tokenizer.json to use. None trains one on the corpus, with `vocab_size` entries
        (default: 16,384, or as many as the text supports).
    embedder: a BERT folder or name, "hashing", or an object (TextEmbedder). None: all-MiniLM-L6-v2.
    embedder_dtype: "float32" or "bfloat16", in which a BERT computes; None: what is fast on `device`. Vectors of one
        are not those of the other: parts that are built on several machines are to have the same.
    index: a FAISS factory string; None: by size (`choose_factory`). Where it can be tuned, the fastest search setting
        that reaches `recall`@10 is stored. Where none does, the one that finds most is, which a remark says, and
        `reached` under `index` in the manifest. Where `out` differs in these alone, only its index is made again.
    trained_index: a retrieval set with the same embedder, whose trained index is taken, emptied and filled; its kind is
        `index` then, and none is trained. Sets with one trained index are merged by joining their inverted lists.
    device: of the embedder and of the index's training, default CPU; "auto" is a GPU where there is one.
    chunk_size: M, tokens in a chunk; a neighbour is 2M long.
    part: (i, n) takes every n-th document from the i-th on: n processes build n sets, to be merged. Needs a tokenizer.
    overwrite: replaces a set made from other input, and drops unfinished work on other input. Else that is an error.
    shard_chunks: chunks embedded between two savings.
    progress: bars and remarks on standard error.

    Interrupted, the same call takes the work up. Where `out` was already made from the same input, nothing is done.
    Raises InputError for input that cannot be used, for two builders on one folder, and as said above; OSError where
    the disk is full or read-only. `out` is untouched then, and what was done is kept.
    """
    part = None if part is None else (as_integer(part[0]), as_integer(part[1]))
    if part is not None and not (type(part[0]) is type(part[1]) is int and 0 <= part[0] < part[1]):
        raise InputError(f"part is {part}; (i, n) with 0 ≤ i < n is needed (--part I/N).")
    if part is not None and tokenizer is None:
        raise InputError(
            "Parts of one set need one tokenizer: train it first and give it to each of them (--tokenizer)."
        )
    if vocab_size is not None and tokenizer is not None:
        raise InputError(
            "Give a tokenizer (--tokenizer), or the vocab_size (--vocab-size) of one to be trained, not both."
        )
    vocab_size = as_integer(vocab_size)
    check_vocab_size(vocab_size)
    recall = check_recall(recall)
    device = pick_device(device or "cpu")
    chunk_size = as_integer(chunk_size)
    if not (type(chunk_size) is int and 1 <= chunk_size <= 65_536):
        raise InputError(f"chunk_size is {chunk_size}; 1 to 65,536 tokens can be had (the paper has 64).")
    shard_chunks = as_integer(shard_chunks)
    if not (type(shard_chunks) is int and shard_chunks >= 1):
        raise InputError(f"shard_chunks is {shard_chunks}; at least 1 is needed.")
    if index not in (None, EXACT) or trained_index is not None:
        require_faiss()
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer(tokenizer)
    reader = reader_of(paths, include, exclude, own_folders(out))
    builder = Builder(Path(out), shard_chunks, progress)
    options = Options(
        tokenizer, vocab_size, index, recall, device, chunk_size, part, overwrite, trained_index=trained_index
    )
    return build_from(reader, builder, lambda: as_embedder(embedder, device, embedder_dtype), options)


@dataclass
class Options:
    """Arguments of `build_retrieval_set`, checked."""

    tokenizer: Tokenizer | None
    vocab_size: int | None
    index: str | None
    recall: float
    device: Any
    chunk_size: int
    part: tuple[int, int] | None
    overwrite: bool
    addition: bool = False
    """Whether this set is made to be merged into another, and may be deleted after that."""
    trained_index: str | os.PathLike[str] | None = None


@dataclass
class Start:
    """An index to go on from in place of training one."""

    factory: str
    trained: str | None
    """`Index.trained_state` of it when it was empty."""
    open: Callable[[], Index]
    """It holds the first of the vectors, all, or none."""


def build_from(
    reader: Reader, builder: Builder, load: Callable[[], TextEmbedder], options: Options
) -> dict[str, Any]:
    builder.check_target(options.overwrite)
    embedder = load()
    check_factory(options.index, embedder.dim)
    start = _given_start(options, embedder)
    factory = start.factory if start else options.index
    corpus = _survey(reader, options.part, None if options.tokenizer else TextSampler(), builder)
    trained = f"trained, vocabulary {options.vocab_size or 'by default'}"
    plan = {
        "corpus": corpus.fingerprint,
        "chunk_size": options.chunk_size,
        "tokenizer": options.tokenizer.fingerprint if options.tokenizer else trained,
        "embedder": embedder.fingerprint,
        "index": factory or "by size",
        "recall": options.recall,
    }
    if start:
        plan["trained"] = start.trained
    if options.addition:
        plan["addition"] = True
    if (manifest := builder.already_built(plan, options.overwrite)) is not None:
        return manifest
    with builder.work(plan, options.overwrite):
        if not builder.is_complete(plan):
            adopted = builder.adopt(plan, options.overwrite)
            model = builder.tokenizer(options.tokenizer, corpus, options.vocab_size)
            if not adopted:
                builder.cut(reader, options.part, corpus, model, options.chunk_size)
                builder.embed(embedder, model)
                builder.tabulate(model)
            described = describe_embedder(embedder)
            builder.finish(plan, corpus, model, described, factory, options.recall, options.device, start)
        return builder.publish()


def _given_start(options: Options, embedder: TextEmbedder) -> Start | None:
    """From the trained index of another set."""
    if options.trained_index is None:
        return None
    store = ChunkStore.open(options.trained_index)
    index, theirs = store.manifest["index"], store.manifest["embedder"]
    given = f"The trained index of {store.path} cannot be taken"
    if theirs["fingerprint"] != embedder.fingerprint:
        raise InputError(
            f"{given}: its vectors are those of {embedder_in_words(theirs)}, this set's are those of "
            f"{embedder_in_words(describe_embedder(embedder))}. Build both with the same one (--embedder, "
            "--embedder-dtype)."
        )
    if index["factory"] == EXACT:
        raise InputError(
            f"{given}: it is exact, and nothing was trained. Leave trained_index (--trained-index) out, or build that "
            "set with an index that is trained (--index IVF4096,SQfp16)."
        )
    if not isinstance(index.get("trained"), str):
        raise InputError(
            f"{given}: {index['factory'][:80]} is of a kind that FAISS cannot join, or was made before such could be "
            "taken. Leave trained_index (--trained-index) out, or make that set's index again, of IVF…, Flat, SQ, PQ, "
            "x4fs or RaBitQ."
        )
    if options.index not in (None, index["factory"]):
        raise InputError(
            f"{given} for an index {options.index}: it is {index['factory'][:80]}. Leave one of the two out."
        )
    check_factory_of(store, index["factory"])
    return Start(
        index["factory"], index["trained"], partial(Index.open_trained, store, device=options.device)
    )


def check_factory_of(store: ChunkStore, factory: str) -> None:
    """`check_factory` of the kind of index that an older set has, of which earlier versions took more."""
    try:
        check_factory(factory, store.manifest["embedder"]["dim"])
    except InputError as error:
        raise InputError(
            f"{store.path} was built with an index that is refused by now. {error} Its vectors can stay: make a set "
            f"with another index of them (retro-kernels index {store.path} --merge --out NEW --index Flat)."
        ) from None


@dataclass
class Corpus:
    """What one reading of the documents says about them."""

    fingerprint: str
    duplicates: int
    text_bytes: int
    skipped: dict[str, int]
    sampler: TextSampler | None = None


def own_folders(out: str | os.PathLike[str]) -> list[str]:
    """Where `out` and the work on it lie: nothing to be read as text."""
    name = os.path.realpath(out)
    return [name, _work_folder(name), name + APPEND, _work_folder(name + APPEND)]


def _work_folder(name: str) -> str:
    return name + ".build"


def _unique(
    documents: Iterator[Document], part: tuple[int, int] | None
) -> Iterator[tuple[int, Document | None]]:
    """(hash, document) of each document of this part; None in place of a copy of an earlier one."""
    seen = _Seen()
    for document in documents:
        text_hash = document_hash(document.text)
        number = len(seen)
        if not seen.add(text_hash):
            yield text_hash, None
        elif part is None or number % part[1] == part[0]:
            yield text_hash, document


class _Seen:
    """A set of 64-bit numbers: 8 bytes each, some 30 while it grows, where one of Python's takes 90."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, np.int64)
        self._new: set[int] = set()

    def __len__(self) -> int:
        return len(self._sorted) + len(self._new)

    def add(self, number: int) -> bool:
        """Whether it was not there."""
        place = self._sorted.searchsorted(number)
        if number in self._new or (place < len(self._sorted) and self._sorted[place] == number):
            return False
        self._new.add(number)
        if len(self._new) > max(_UNSORTED, len(self._sorted) // 8):
            new = np.fromiter(self._new, np.int64, len(self._new))
            self._new.clear()
            self._sorted = np.concatenate([self._sorted, new])
            self._sorted.sort()
        return True


def _survey(
    reader: Reader, part: tuple[int, int] | None, sampler: TextSampler | None, builder: Builder
) -> Corpus:
    """Reads everything once: what is it, is it new, and, for training a tokenizer, what does it look like."""
    report = ReadReport()
    fingerprint = Fingerprint()
    duplicates = text_bytes = 0
    with builder.bar("reading", None, "documents") as bar:
        for text_hash, document in _unique(reader(report), part):
            bar.update()
            if document is None:
                duplicates += 1
                continue
            text_bytes += len(document.text.encode())
            fingerprint.add(text_hash, _title(document))
            if sampler is not None:
                sampler.add(document.text)
    warning = report.warning()
    if not text_bytes:
        raise InputError(f"There is no text to build a retrieval set from. {warning or 'No file was found.'}")
    if warning:
        builder.say(warning)
    if duplicates:
        builder.say(f"{duplicates:,} copies of documents are left out.")
    # every part has seen them all, and merged the parts are to have them once
    skipped = {reason: n for reason, count in report.skipped.items() if (n := _share(count, part))}
    return Corpus(fingerprint.hex(), _share(duplicates, part), text_bytes, skipped, sampler)


def _share(count: int, part: tuple[int, int] | None) -> int:
    """Of `count` things those of this part, if they are dealt out one by one."""
    return count if part is None else len(range(part[0], count, part[1]))


def _title(document: Document) -> str:
    return document.title[: files.MAX_TITLE_CHARS]


class MadeFromOther(InputError):
    """A set, or unfinished work on one, is of another input or setting than what is to be built."""

    def __init__(self, where: Path, differing: Sequence[str], what: str, advice: str) -> None:
        # another index alone is not in the way
        self.differences = ", ".join(f"another {name}" for name in differing if name not in _INDEX_ONLY)
        super().__init__(f"{where} {what} ({self.differences}). {advice}")


_INDEX_ONLY = {"index", "recall", "trained"}
"""Parts of a plan that the vectors do not depend on: sets and unfinished work are taken up for another index."""
_PLAN_KEYS = {"corpus", "chunk_size", "tokenizer", "embedder", "index", "recall"}


@dataclass
class Builder:
    """One build: where it takes place, what it has done, and how it speaks to the user."""

    out: Path
    shard_chunks: int
    progress: bool
    otherwise: str = "Choose another folder, or replace the set with overwrite (--overwrite)."
    """What to do where `out` was built from something else."""
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.out = Path(os.path.realpath(self.out))  # what a link points to is replaced, not the link
        self.folder = Path(_work_folder(str(self.out)))
        self.set = self.folder / "set"
        self.journal = self.folder / "cut.json"
        self.parked = self.folder / "old"

    def say(self, text: str) -> None:
        if self.progress:
            note(text)

    def bar(self, what: str, total: int | None, unit: str, done: int = 0) -> Any:
        return progress_bar(total, what, unit, show=self.progress, initial=done)

    def check_target(self, overwrite: bool) -> None:
        """`out` may be absent, empty or a retrieval set: nothing else is ever replaced."""
        self.recover()
        if not self.out.exists():
            return
        if not self.out.is_dir():
            raise InputError(f"{self.out} is a file; the retrieval set is a folder. Choose another name.")
        names = {path.name for path in self.out.iterdir()}
        manifest = load_json(self.out / files.MANIFEST)
        ours = isinstance(manifest, dict) and manifest.get("format") == files.FORMAT
        # of a damaged set the manifest may be what is damaged
        if names and not ours and not {files.MANIFEST, files.CHUNKS, files.EMBEDDINGS} <= names:
            raise InputError(f"{self.out} holds other files, and no retrieval set. Choose another folder.")
        if overwrite:
            self.check_nothing_else()
        elif files.MANIFEST in names:
            files.read_manifest(self.out)

    def check_nothing_else(self) -> None:
        """InputError where replacing the set would delete what is no part of one."""
        names = sorted(path.name for path in self.out.iterdir()) if self.out.is_dir() else []
        if others := [name for name in names if name not in files.ALL_FILES and ".tmp-" not in name]:
            shown = ", ".join(others[:3]) + (f" and {len(others) - 3:,} more" if len(others) > 3 else "")
            raise InputError(
                f"{self.out} also holds {shown}, which would be gone with the set that is replaced. Move that away, "
                "and give the same command again: what is done by then is kept."
            )

    def recover(self) -> None:
        """Gives the set its name back where a replacement was killed between two renames (`swap`)."""
        if self._is_parked():
            with contextlib.suppress(InputError), self._lock():  # locked: the replacement is under way
                self._give_back()

    def _is_parked(self) -> bool:
        return not self.out.exists() and (self.parked / files.MANIFEST).exists() and self._plan() is not None

    def _give_back(self) -> bool:
        if found := self._is_parked():
            os.rename(self.parked, self.out)
        return found

    def already_built(self, plan: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
        if not (self.out / files.MANIFEST).exists():
            return None
        try:
            manifest = files.read_manifest(self.out)
            files.check_files(self.out, manifest, checksums=files.quick_to_read(manifest))
            differs = _differing(manifest.get("build"), plan)
            if overwrite and set(differs) <= _INDEX_ONLY:  # its files would be taken over
                files.check_files(self.out, manifest, checksums=True)
        except InputError:
            if overwrite:
                return None
            raise
        if not differs:
            self.say(f"{self.out}: already built from this input; nothing to do.")
            self.drop_leftovers(plan)
            return manifest
        if set(differs) <= _INDEX_ONLY:
            self.check_nothing_else()  # now, and not when the index is made
            self.say(f"{self.out}: built from this input; only its index is made again.")
        elif not overwrite:
            raise MadeFromOther(self.out, differs, "was built from something else", self.otherwise)
        return None

    def drop_leftovers(self, plan: Any) -> None:
        """Of a build that was killed between its last rename and its tidying up."""
        with contextlib.suppress(OSError, InputError):
            if plan is not None and self._plan() == plan:
                with self._lock():
                    self._tidy()

    @contextlib.contextmanager
    def work(self, plan: dict[str, Any], overwrite: bool) -> Iterator[None]:
        """The work folder, locked, for this plan; unfinished work on the same plan is taken up."""
        fresh = self._make_folder()
        with self._lock():
            if self._give_back():
                raise InputError(f"A replacement of {self.out} was cut off just now. Run the command again.")
            found = self._plan()
            if found is None:
                self._refuse_others(fresh)
            elif not set(differs := _differing(found, plan)) <= _INDEX_ONLY:
                if not overwrite:
                    raise MadeFromOther(
                        self.folder,
                        differs,
                        "holds unfinished work on something else",
                        "Finish it with the same arguments as before, delete it, or drop it with overwrite "
                        "(--overwrite).",
                    )
                found = None
            if found is None:
                self._clear()
            else:
                self.say(f"{self.folder}: taking up unfinished work.")
            if found != plan:
                if found and found.get("trained") != plan.get("trained"):
                    self._index_note_path.unlink(missing_ok=True)  # it speaks of the other's index
                save_json(self.folder / _PLAN, plan)
            if not self.journal.exists() and not self.is_complete(plan):
                # nothing was begun, or what lies here is the set for which the finished one was exchanged
                self._index_note_path.unlink(missing_ok=True)
                if self.set.exists():
                    shutil.rmtree(self.set)
                self.set.mkdir()
                save_json(self.journal, vars(Progress()))
            try:
                yield
            except InputError:
                # nothing worth keeping, and in the way of better arguments
                if not self.has_shards() and not self._index_note():
                    self._tidy()
                raise
            except KeyboardInterrupt as signal:
                raise signal if signal.args else interrupted(self.folder) from None
            except OSError as error:
                # FAISS, which writes the index, gives no number
                if error.errno in (None, *NO_ROOM, errno.EIO):
                    reason = error.strerror or str(error).rstrip(".")
                    text = f"{reason}. What is done is kept in {self.folder}: run the same command again."
                    stopped = f"The build of {self.out} stopped: {text}"
                    raise (OSError(error.errno, stopped) if error.errno else OSError(stopped)) from error
                raise

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The lock alone, for a change to the set in place: no builder replaces it meanwhile."""
        self._make_folder()
        with self._lock():
            try:
                yield
            finally:
                self._leave()

    def _make_folder(self) -> bool:
        """Whether there was no lock, so no builder, in it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{self.folder} cannot be made: {error.strerror}. Choose a writable place."
            ) from None
        return not (self.folder / _LOCK).exists()

    def _lock(self) -> contextlib.AbstractContextManager[None]:
        """One builder at a time."""
        busy = f"Another process is building {self.out}. Wait for it, or choose another folder."
        return locked(self.folder / _LOCK, busy)

    def _plan(self) -> dict[str, Any] | None:
        """plan.json, if it is one. OSError where it cannot be read: who knows what it says?"""
        found = load_json(self.folder / _PLAN)
        return found if isinstance(found, dict) and found.keys() >= _PLAN_KEYS else None

    def _refuse_others(self, fresh: bool) -> None:
        others = [
            name for name in sorted(os.listdir(self.folder)) if name != _LOCK and _PLAN + ".tmp-" not in name
        ]
        if others:
            if fresh:
                (self.folder / _LOCK).unlink(missing_ok=True)
            raise InputError(
                f"{self.folder} is where {self.out.name} is built, but it holds other files ({others[0]}, …) and no "
                f"{_PLAN} that says they are a build's. Move it away, delete it if it is not needed, or choose "
                "another name for the set (--out)."
            )

    def _clear(self) -> None:
        """Deletes the work, its plan last: what a kill leaves is then known to be ours."""
        for path in self.folder.iterdir():
            if path.name not in (_LOCK, _PLAN):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        (self.folder / _PLAN).unlink(missing_ok=True)

    def _tidy(self) -> None:
        """The end of the work, under its lock."""
        with contextlib.suppress(OSError):
            self._clear()
        self._leave()

    def _leave(self) -> None:
        with contextlib.suppress(OSError):
            if os.listdir(self.folder) == [_LOCK]:
                (self.folder / _LOCK).unlink()
                self.folder.rmdir()

    def is_complete(self, plan: dict[str, Any]) -> bool:
        """Whether only the renaming is missing. After an exchange the older set lies here: then it is not."""
        manifest = load_json(self.set / files.MANIFEST)
        return manifest is not None and manifest.get("build") == plan

    def adopt(self, plan: dict[str, Any], overwrite: bool) -> bool:
        """Takes over the files of the set in place, and says so, where it differs from `plan` in its index alone."""
        manifest = load_json(self.out / files.MANIFEST)
        if not isinstance(manifest, dict) or not set(_differing(manifest.get("build"), plan)) <= _INDEX_ONLY:
            return False
        try:
            store = ChunkStore.open(self.out)
        except InputError:
            if overwrite:
                return False
            raise
        # until all is here, what is here is not to be written on: these are the files of the set in place
        self.journal.unlink(missing_ok=True)
        for name in files.REQUIRED_FILES:
            link_or_copy(store.path / name, self.set / name)
        index, entry = store.manifest["index"], store.manifest["files"].get(files.INDEX)
        same_start = store.manifest["build"].get("trained") == plan.get("trained")
        if entry is not None and same_start and not self._index_note():
            files.check_checksum(store.path, files.INDEX, entry)
            link_or_copy(store.path / files.INDEX, self.set / files.INDEX)
            seconds = index.get("build_seconds", 0.0)
            self._note_index(index["factory"], store.num_chunks, "full", seconds, index.get("trained"))
        tokens = int(store.manifest.get("num_tokens", 0))
        state = Progress(
            0, store.num_documents, store.num_chunks, tokens, done=True, fingerprint=plan["corpus"]
        )
        save_json(self.journal, vars(state))
        self.seconds.update(store.manifest.get("seconds", {}))
        return True

    def tokenizer(self, given: Tokenizer | None, corpus: Corpus, vocab_size: int | None) -> Tokenizer:
        path = self.set / files.TOKENIZER
        if not path.exists():
            if given is not None:
                given.save(path)
            else:
                if corpus.sampler is None:
                    raise AssertionError("no sample was drawn")
                with self.bar("training the tokenizer", None, ""):
                    Tokenizer.train_on_sample(corpus.sampler, path, vocab_size)
        return Tokenizer(path)

    def cut(
        self,
        reader: Reader,
        part: tuple[int, int] | None,
        corpus: Corpus,
        tokenizer: Tokenizer,
        chunk_size: int,
    ) -> None:
        """Documents → rows of `chunk_size` tokens, saved every few shards of them."""
        state = self.state()
        if state.done:
            return
        start = time.perf_counter()
        writer = ChunkWriter(self.set, tokenizer.vocab_size, chunk_size, state)
        fingerprint = Fingerprint()
        saved = state.chunks
        with self.bar("cutting into chunks", corpus.text_bytes, "B") as bar:
            for number, (text_hash, document) in enumerate(_unique(reader(ReadReport()), part)):
                if document is None:
                    continue
                fingerprint.add(text_hash, _title(document))
                bar.update(len(document.text.encode()))
                if number < state.read:
                    continue
                writer.add(text_hash, _title(document), document.text, tokenizer)
                state.read = number + 1
                if state.chunks - saved >= _CUT_SHARDS * self.shard_chunks:
                    writer.save()
                    save_json(self.journal, vars(state))
                    saved = state.chunks
        if fingerprint.hex() != corpus.fingerprint:
            writer.close()
            self.journal.unlink(missing_ok=True)
            raise InputError("The input changed while it was being read. Run the command again.")
        writer.close()
        state.done = True
        state.fingerprint = corpus.fingerprint
        save_json(self.journal, vars(state))
        self.seconds["cut"] = round(time.perf_counter() - start, 2)

    def state(self) -> Progress:
        return Progress(**(load_json(self.journal) or {}))

    def chunks(self, tokenizer: Tokenizer) -> np.ndarray:
        path = self.set / files.CHUNKS
        rows = self.state().chunks
        width = (path.stat().st_size - HEADER_BYTES) // (rows * token_dtype(tokenizer.vocab_size).itemsize)
        return open_array(path, token_dtype(tokenizer.vocab_size), (rows, width))

    def embed(self, embedder: TextEmbedder, tokenizer: Tokenizer) -> None:
        """Each shard into a file of its own, then all of them into embeddings.npy."""
        chunks = self.chunks(tokenizer)
        shards = [
            range(i, min(i + self.shard_chunks, len(chunks)))
            for i in range(0, len(chunks), self.shard_chunks)
        ]
        todo = [shard for shard in shards if not self._has_shard(shard, embedder.dim)]
        start = time.perf_counter()
        done = len(chunks) - sum(map(len, todo))
        with self.bar("embedding", len(chunks), "chunks", done) as bar:
            for shard in todo:
                texts = tokenizer.decode_batch(chunks[shard.start : shard.stop])
                vectors = embedded(embedder, texts, bar.update).cpu().numpy().astype(np.float16)
                if not np.isfinite(vectors).all():
                    raise InputError(f"{embedder.name} gave vectors with NaN or beyond the range of fp16.")
                save_array(self._shard_path(shard), vectors)
        self.seconds["embed"] = round(time.perf_counter() - start, 2)
        joined = GrowingArray(self.set / files.EMBEDDINGS, np.dtype(np.float16), (embedder.dim,), 0)
        with self.bar("joining the shards", len(chunks), "chunks") as bar:
            for shard in shards:
                joined.append(
                    open_array(self._shard_path(shard), np.dtype(np.float16), (len(shard), embedder.dim))
                )
                bar.update(len(shard))
        joined.close()

    def has_shards(self) -> bool:
        """Whether there is work here that took long."""
        return any(self.folder.glob("embeddings-*.npy"))

    def _shard_path(self, shard: range) -> Path:
        return self.folder / f"embeddings-{shard.start}-{shard.stop - 1}.npy"

    def _has_shard(self, shard: range, dim: int) -> bool:
        path = self._shard_path(shard)
        if not path.exists():
            return False
        try:
            open_array(path, np.dtype(np.float16), (len(shard), dim))
        except InputError:
            return False
        return True

    def tabulate(self, tokenizer: Tokenizer) -> None:
        """The table that finds chunks by their content."""
        hashes = hash_chunks(self.chunks(tokenizer))
        order = np.argsort(hashes, kind="stable")
        save_array(self.set / files.CHUNK_ORDER, order.astype(np.int64, copy=False))
        del order
        hashes.sort()
        save_array(self.set / files.CHUNK_HASHES, hashes)

    def finish(
        self,
        plan: dict[str, Any],
        corpus: Corpus,
        tokenizer: Tokenizer,
        embedder: dict[str, Any],
        factory: str | None,
        recall: float,
        device: Any,
        start: Start | None = None,
    ) -> None:
        """The index, and last of all the manifest. embedder: its entry there."""
        state = self.state()
        chunks = self.chunks(tokenizer)
        vectors = open_array(
            self.set / files.EMBEDDINGS, np.dtype(np.float16), (state.chunks, embedder["dim"])
        )
        manifest: dict[str, Any] = {
            "format": files.FORMAT,
            "version": files.VERSION,
            "chunk_size": int(chunks.shape[1]),
            "num_chunks": state.chunks,
            "num_documents": state.documents,
            "num_tokens": state.tokens,
            "text_bytes": corpus.text_bytes,
            "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
            "embedder": embedder,
            "index": self._index(vectors, factory, recall, device, start),
            "corpus": {"duplicates": corpus.duplicates, "skipped": corpus.skipped},
            "build": plan,
            "seconds": self.seconds,
        }
        manifest["files"] = self._file_entries()
        manifest["bytes_per_chunk"] = round(
            sum(e["bytes"] for e in manifest["files"].values()) / state.chunks, 1
        )
        files.write_manifest(self.set, manifest)

    def _index(
        self, vectors: np.ndarray, factory: str | None, recall: float, device: Any, start: Start | None
    ) -> dict[str, Any]:
        by_size = factory is None
        factory = factory or (
            start.factory if start else choose_factory(len(vectors), vectors.shape[1], device)
        )
        described: dict[str, Any] = {"factory": factory, "metric": "squared L2"}
        if factory == EXACT:
            (self.set / files.INDEX).unlink(missing_ok=True)
            self.seconds["index"] = 0.0
            return {**described, **measure_exact(vectors, recall, device=device), "build_seconds": 0.0}
        index = self._filled_index(vectors, factory, device, start)
        measured = self.tune(index, vectors, recall)
        if not measured["reached"] and by_size and len(vectors) <= _EXACT_FALLBACK:
            self.say("These vectors do not suit it; the exact index is taken.")
            return self._index(vectors, EXACT, recall, device, None)
        if trained := self._index_note().get("trained"):
            described["trained"] = trained
        return {**described, **measured, "build_seconds": self.seconds["index"]}

    def tune(self, index: Index, vectors: np.ndarray, recall: float, k: int = 10) -> dict[str, Any]:
        """See `Index.tune`. It is shown what is tried, and said where the best is not enough."""
        with self.bar(f"tuning the index {index.factory}", None, "settings") as bar:

            def tried(result: dict[str, Any]) -> None:
                found = f"{result['search']} finds {result['recall']:.3f} of the {result['k']} nearest"
                bar.set_postfix_str(found, refresh=False)
                bar.update()

            measured = index.tune(vectors, recall, k=k, progress=tried)
        if not measured["reached"]:
            self.say(
                f"index {index.factory}: recall@{measured['k']} is {measured['recall']:.4f}, {recall} was wished."
            )
        return measured

    def _filled_index(self, vectors: np.ndarray, factory: str, device: Any, start: Start | None) -> Index:
        """The index of all vectors, also in its file. Trained, and filled, it is saved: neither is done again."""
        empty, n = self.folder / "trained.faiss", len(vectors)
        note = self._index_note()
        if (note.get("factory"), note.get("chunks")) != (factory, n):
            note = {}
            self._index_note_path.unlink(missing_ok=True)  # before the files change of which it speaks
        self.seconds["index"] = note.get("seconds", 0.0)
        begun = time.perf_counter() - self.seconds["index"]
        if note.get("stage") == "full":
            return Index.load(self.set / files.INDEX, factory, device=device)
        if start is not None:
            index, trained = start.open(), start.trained
        elif note.get("stage") == "trained":
            index, trained = Index.load(empty, factory, device=device), note.get("trained")
        else:
            with self.bar(f"training the index {factory}", None, ""):
                index = Index.train(vectors, factory, device=device)
            trained = index.trained_state()
            if factory != "CAGRA":  # which is made of all its vectors at once
                index.save(empty)
                self._note_index(factory, n, "trained", time.perf_counter() - begun, trained)
        with self.bar(f"filling the index {factory}", n, "chunks", len(index)) as bar:
            index.add(vectors[len(index) :], bar.update)
        self.seconds["index"] = round(time.perf_counter() - begun, 2)
        index.save(self.set / files.INDEX)
        self._note_index(factory, n, "full", self.seconds["index"], trained)
        empty.unlink(missing_ok=True)
        return index

    @property
    def _index_note_path(self) -> Path:
        return self.folder / "index.json"

    def _index_note(self) -> dict[str, Any]:
        return load_json(self._index_note_path) or {}

    def _note_index(self, factory: str, chunks: int, stage: str, seconds: float, trained: str | None) -> None:
        note = {"factory": factory, "chunks": chunks, "stage": stage, "seconds": round(seconds, 2)}
        save_json(self._index_note_path, {**note, "trained": trained})

    def _file_entries(self) -> dict[str, Any]:
        paths = [path for name in (*files.REQUIRED_FILES, files.INDEX) if (path := self.set / name).exists()]
        entries = {}
        known = load_json(self.out / files.MANIFEST) or {}
        with self.bar("checksums", sum(path.stat().st_size for path in paths), "B") as bar:
            for path in paths:
                twin = self.out / path.name
                if twin.exists() and twin.samefile(path):  # adopted: read when the set was built
                    entries[path.name] = known["files"][path.name]
                    bar.update(path.stat().st_size)
                    continue
                entries[path.name] = {
                    "bytes": path.stat().st_size,
                    "sha256": files.file_sha256(path, bar.update),
                }
        return entries

    def publish(self) -> dict[str, Any]:
        """The finished folder takes the name of the set."""
        self.check_nothing_else()
        for path in self.set.iterdir():
            if path.name not in files.ALL_FILES:
                path.unlink()  # a temporary file of a process that was killed
        sync_folder(self.set)
        self.journal.unlink(
            missing_ok=True
        )  # from here on nothing is written into `set`, whichever set that is
        sync_folder(self.folder)
        swap(self.set, self.out, self.parked)
        sync_folder(self.out.parent)
        manifest = files.read_manifest(self.out)
        self._tidy()
        index = manifest["index"]
        self.say(
            f"{self.out}: {manifest['num_chunks']:,} chunks of {manifest['num_documents']:,} documents, index "
            f"{index['factory']}, recall@{index['k']} {index['recall']:.3f}."
        )
        return manifest


def measure_exact(vectors: np.ndarray, recall: float, *, k: int = 10, device: Any = None) -> dict[str, Any]:
    """What `Index.tune` says of the exact index of `vectors` [n, E], which finds all by its nature: only its speed is
    measured, among some of them, and falls with their number."""
    sample = vectors[:_EXACT_SAMPLE]
    measured = Index.build(sample, EXACT, device=device).tune(sample, recall, k=k)
    speed = round(measured["queries_per_second"] * len(sample) / len(vectors), 1)
    return {**measured, "queries_per_second": speed, "recall": 1.0, "reached": True}


def _differing(old: Any, new: dict[str, Any]) -> list[str]:
    """Keys of a plan under which another one, or something that is none, has something else."""
    keys = [*new, *(key for key in _INDEX_ONLY if key not in new)]
    return [key for key in keys if not isinstance(old, dict) or old.get(key) != new.get(key)]
