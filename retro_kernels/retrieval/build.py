"""Building a retrieval set: documents → chunks → embeddings → index, in a work folder that becomes the set at the end.

The work lies beside the set, in `<out>.build`, and every step can be taken up again after a kill −9:

    plan.json                  what is being built; another input or another setting is refused, not mixed in
    set/                       the files of the set as they grow; cut.json says up to where they are whole
    embeddings-000000.npy …    one shard of chunks each, under that name only when whole

A set becomes visible in one rename, the manifest being its last file. Replacing a set exchanges the two folders, so a
reader sees the old one or the new one. Memory is bounded by one shard and one document, apart from 16 bytes a chunk for
the table that finds chunks by content, the tokenizer's sample, and what the index itself needs.

Large corpora: build parts in several processes or on several machines (`part=(i, n)`, one tokenizer for all), then
`merge_retrieval_sets`; `append_to_retrieval_set` adds documents to a set.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from retro_kernels.config import InputError
from retro_kernels.data.corpus import Document, ReadReport, document_hash, read_documents
from retro_kernels.data.tokenizer import TextSampler, Tokenizer, check_vocab_size
from retro_kernels.retrieval import store as files
from retro_kernels.retrieval.embedder import TextEmbedder, load_embedder
from retro_kernels.retrieval.index import EXACT, Index, check_factory, choose_factory, require_faiss
from retro_kernels.retrieval.store import hash_chunks, open_array, token_dtype
from retro_kernels.retrieval.writing import (
    HEADER_BYTES,
    ChunkWriter,
    GrowingArray,
    Progress,
    load_json,
    locked,
    save_array,
    save_json,
    swap,
    sync_folder,
)

SHARD_CHUNKS = 1024  # ten seconds of a slow processor: what an interrupted build loses at most
_EXACT_FALLBACK = 1_000_000  # vectors: 8 ms of a core for a query

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Sequence[Document]


def build_retrieval_set(
    paths: Source,
    out: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
    vocab_size: int | None = None,
    embedder: str | os.PathLike[str] | TextEmbedder | None = None,
    index: str | None = None,
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
        Documents with the same text are kept once.
    tokenizer: a SentencePiece model or tokenizer.json to use. None trains one on the corpus, with `vocab_size` entries
        (default: 16,384, or as many as the text supports).
    embedder: a BERT folder or name, "hashing", or an object (TextEmbedder). None: all-MiniLM-L6-v2.
    index: a FAISS factory string; None: by size (`choose_factory`). Where it can be tuned, the fastest search setting
        that reaches `recall`@10 is stored.
    device: of the embedder and of the index's training, default CPU.
    chunk_size: M, tokens in a chunk; a neighbour is 2M long.
    part: (i, n) takes every n-th document from the i-th on: n processes build n sets, to be merged. Needs a tokenizer.
    overwrite: replaces a set made from other input, and drops unfinished work on other input. Else that is an error.
    shard_chunks: chunks embedded between two savings.
    progress: bars and remarks on standard error.

    Interrupted, the same call takes the work up. Where `out` was already made from the same input, nothing is done.
    Raises InputError for input that cannot be used, for two builders on one folder, and as said above; OSError where
    the disk is full or read-only. `out` is untouched then, and what was done is kept.
    """
    if part is not None and not (0 <= part[0] < part[1]):
        raise InputError(f"part is {part}; (i, n) with 0 ≤ i < n is needed.")
    if part is not None and tokenizer is None:
        raise InputError("Parts of one set need one tokenizer: train it first and give it to each of them.")
    if vocab_size is not None and tokenizer is not None:
        raise InputError("Give a tokenizer, or the vocab_size of one to be trained, not both.")
    check_vocab_size(vocab_size)
    if not 1 <= chunk_size <= 65_536:
        raise InputError(f"chunk_size is {chunk_size}; 1 to 65,536 tokens can be had (the paper has 64).")
    if shard_chunks < 1:
        raise InputError(f"shard_chunks is {shard_chunks}; at least 1 is needed.")
    if index not in (None, "Flat"):
        require_faiss()
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer(tokenizer)
    reader = reader_of(paths, include, exclude)
    builder = Builder(Path(out), shard_chunks, progress)
    options = Options(tokenizer, vocab_size, index, recall, device, chunk_size, part, overwrite)
    return build_from(reader, builder, lambda: as_embedder(embedder, device), options)


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


def build_from(
    reader: Reader, builder: Builder, load: Callable[[], TextEmbedder], options: Options
) -> dict[str, Any]:
    builder.check_target(options.overwrite)
    embedder = load()
    check_factory(options.index, embedder.dim)
    corpus = _survey(reader, options.part, None if options.tokenizer else TextSampler(), builder)
    trained = f"trained, vocabulary {options.vocab_size or 'by default'}"
    plan = {
        "corpus": corpus.fingerprint,
        "chunk_size": options.chunk_size,
        "tokenizer": options.tokenizer.fingerprint if options.tokenizer else trained,
        "embedder": embedder.fingerprint,
        "index": options.index or "by size",
        "recall": options.recall,
    }
    if (manifest := builder.already_built(plan, options.overwrite)) is not None:
        return manifest
    with builder.work(plan, options.overwrite):
        if not builder.is_complete(plan):
            model = builder.tokenizer(options.tokenizer, corpus, options.vocab_size)
            builder.cut(reader, options.part, corpus, model, options.chunk_size)
            builder.embed(embedder, model)
            builder.finish(plan, corpus, model, embedder, options.index, options.recall, options.device)
        return builder.publish()


class _Describes(Protocol):
    """What the manifest says of an embedder."""

    name: str
    dim: int

    @property
    def fingerprint(self) -> str: ...


@dataclass
class Corpus:
    """What one reading of the documents says about them."""

    fingerprint: str
    documents: int
    duplicates: int
    text_bytes: int
    skipped: dict[str, int]
    sampler: TextSampler | None = None


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


Reader = Callable[[ReadReport], Iterator[Document]]


def reader_of(paths: Source, include: Sequence[str], exclude: Sequence[str]) -> Reader:
    """A function that reads the documents; it can be called again, stdin included."""
    if not isinstance(paths, (str, os.PathLike)):
        paths = list(paths)  # type: ignore[assignment]
        if paths and all(isinstance(path, Document) for path in paths):
            return lambda report: _count(paths, report)  # type: ignore[arg-type]
    entries: Any = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    read_documents(entries, include=include, exclude=exclude)  # checks the paths, reads nothing
    if "-" not in entries:
        return lambda report: read_documents(entries, include=include, exclude=exclude, report=report)
    piped: list[Document] = []
    piped_report = ReadReport()

    def read(report: ReadReport) -> Iterator[Document]:
        for entry in entries:
            if entry != "-":
                yield from read_documents(entry, include=include, exclude=exclude, report=report)
                continue
            if not piped and not piped_report.skipped:
                piped.extend(read_documents("-", report=piped_report))
            report.skipped.update(piped_report.skipped)
            report.examples.update(piped_report.examples)
            yield from _count(piped, report)

    return read


def _count(documents: Iterable[Document], report: ReadReport) -> Iterator[Document]:
    for document in documents:
        if not document.text.strip():
            report.skip("empty", document.title)
            continue
        report.documents += 1
        report.text_bytes += len(document.text.encode())
        yield document


def _unique(
    documents: Iterator[Document], part: tuple[int, int] | None
) -> Iterator[tuple[int, Document | None]]:
    """(hash, document) of each document of this part; None in place of a copy of an earlier one."""
    seen: set[int] = set()
    for document in documents:
        text_hash = document_hash(document.text)
        if text_hash in seen:
            yield text_hash, None
        else:
            mine = part is None or len(seen) % part[1] == part[0]
            seen.add(text_hash)
            if mine:
                yield text_hash, document


def _survey(
    reader: Reader, part: tuple[int, int] | None, sampler: TextSampler | None, builder: Builder
) -> Corpus:
    """Reads everything once: what is it, is it new, and, for training a tokenizer, what does it look like."""
    report = ReadReport()
    fingerprint = Fingerprint()
    documents = duplicates = text_bytes = 0
    with builder.bar("reading", None, "documents") as bar:
        for text_hash, document in _unique(reader(report), part):
            bar.update()
            if document is None:
                duplicates += 1
                continue
            documents += 1
            text_bytes += len(document.text.encode())
            fingerprint.add(text_hash, _title(document))
            if sampler is not None:
                sampler.add(document.text)
    warning = report.warning()
    if documents == 0:
        raise InputError(f"There is no text to build a retrieval set from. {warning or 'No file was found.'}")
    if warning:
        builder.say(warning)
    if duplicates:
        builder.say(f"{duplicates:,} copies of documents are left out.")
    return Corpus(fingerprint.hex(), documents, duplicates, text_bytes, dict(report.skipped), sampler)


def _title(document: Document) -> str:
    return document.title[: files.MAX_TITLE_CHARS]


def as_embedder(embedder: str | os.PathLike[str] | TextEmbedder | None, device: Any) -> TextEmbedder:
    if embedder is None or isinstance(embedder, (str, os.PathLike)):
        return load_embedder(embedder, device=device)
    return embedder


_INDEX_ONLY = {"index", "recall"}
"""Parts of a plan that the vectors do not depend on: unfinished work is taken up for another index."""


@dataclass
class Builder:
    """One build: where it takes place, what it has done, and how it speaks to the user."""

    out: Path
    shard_chunks: int
    progress: bool
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.out = Path(os.path.abspath(self.out))
        self.folder = self.out.with_name(self.out.name + ".build")
        self.set = self.folder / "set"

    def say(self, text: str) -> None:
        say(self.progress, text)

    def bar(self, what: str, total: int | None, unit: str, done: int = 0) -> Any:
        return tqdm(
            total=total,
            initial=done,
            desc=what,
            unit=" " + unit,
            unit_scale=unit == "B",
            disable=not self.progress,
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.5,
            leave=total is not None,
            # what is found wrong at once shall be the only line of a log
            delay=1 if total is None and not sys.stderr.isatty() else 0,
            bar_format=None if unit else "{desc} …",
        )

    def check_target(self, overwrite: bool) -> None:
        """`out` may be absent, empty or a retrieval set: nothing else is ever replaced."""
        old = self.out.with_name(self.out.name + ".old")
        if old.is_dir() and not self.out.exists():
            os.rename(old, self.out)  # a swap was interrupted between its two renames
        if not self.out.exists():
            return
        if not self.out.is_dir():
            raise InputError(f"{self.out} is a file; the retrieval set is a folder. Choose another name.")
        if any(self.out.iterdir()) and not (self.out / files.MANIFEST).exists():
            raise InputError(f"{self.out} holds other files, and no retrieval set. Choose another folder.")
        if (self.out / files.MANIFEST).exists() and not overwrite:
            files.read_manifest(self.out)

    def already_built(self, plan: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
        if not (self.out / files.MANIFEST).exists():
            return None
        try:
            manifest = files.read_manifest(self.out)
            files.check_files(self.out, manifest, checksums=False)
        except InputError:
            if overwrite:
                return None
            raise
        differs = _differences(manifest.get("build", {}), plan)
        if not differs:
            self.say(f"{self.out}: already built from this input; nothing to do.")
            self._drop_leftovers(plan)
            return manifest
        if not overwrite:
            raise InputError(
                f"{self.out} was built from something else ({differs}). Choose another folder, or replace the set with "
                "overwrite (--overwrite)."
            )
        return None

    def _drop_leftovers(self, plan: dict[str, Any]) -> None:
        """Of a build that was killed between its last rename and its tidying up."""
        if load_json(self.folder / "plan.json") == plan:
            with contextlib.suppress(OSError, InputError), self._lock():
                shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def work(self, plan: dict[str, Any], overwrite: bool) -> Iterator[None]:
        """The work folder, locked, for this plan; unfinished work on the same plan is taken up."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{self.folder} cannot be made: {error.strerror}. Choose a writable place."
            ) from None
        with self._lock():
            found = load_json(self.folder / "plan.json")
            if found is not None and any(found.get(key) != plan[key] for key in plan.keys() - _INDEX_ONLY):
                if not overwrite:
                    raise InputError(
                        f"{self.folder} holds unfinished work on something else ({_differences(found, plan)}). Finish "
                        "it with the same arguments as before, delete it, or drop it with overwrite (--overwrite)."
                    )
                found = None
            if found is None:
                self._clear()
                self.set.mkdir()
            else:
                self.set.mkdir(exist_ok=True)
                self.say(f"{self.folder}: taking up unfinished work.")
            if found != plan:
                save_json(self.folder / "plan.json", plan)
            try:
                yield
            except InputError:
                if (
                    not self._shards()
                ):  # nothing worth keeping, which would stand in the way of better arguments
                    shutil.rmtree(self.folder, ignore_errors=True)
                raise
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
                    text = f"{error.strerror}. What is done is kept in {self.folder}: run the same command again."
                    raise OSError(error.errno, f"The build of {self.out} stopped: {text}") from error
                raise

    def _lock(self) -> contextlib.AbstractContextManager[None]:
        """One builder at a time."""
        busy = f"Another process is building {self.out}. Wait for it, or choose another folder."
        return locked(self.folder / "lock", busy)

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.name == "lock":
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def is_complete(self, plan: dict[str, Any]) -> bool:
        """Whether only the renaming is missing. After an exchange the older set lies here: then it is not."""
        manifest = load_json(self.set / files.MANIFEST)
        return manifest is not None and manifest.get("build") == plan

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
        """Documents → rows of `chunk_size` tokens, saved every `shard_chunks` rows."""
        journal = self.folder / "cut.json"
        state = Progress(**(load_json(journal) or {}))
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
                if state.chunks - saved >= self.shard_chunks:
                    writer.save()
                    save_json(journal, vars(state))
                    saved = state.chunks
        if fingerprint.hex() != corpus.fingerprint:
            writer.close()
            journal.unlink(missing_ok=True)
            raise InputError("The input changed while it was being read. Run the command again.")
        writer.close()
        state.done = True
        state.fingerprint = corpus.fingerprint
        save_json(journal, vars(state))
        self.seconds["cut"] = round(time.perf_counter() - start, 2)

    def state(self) -> Progress:
        return Progress(**(load_json(self.folder / "cut.json") or {}))

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
                vectors = embedder.embed(texts, bar.update).cpu().numpy().astype(np.float16)
                if not np.isfinite(vectors).all():
                    raise InputError(f"{embedder.name} gave vectors with NaN or beyond the range of fp16.")
                save_array(self._shard_path(shard), vectors)
        self.seconds["embed"] = round(time.perf_counter() - start, 2)
        joined = GrowingArray(self.set / files.EMBEDDINGS, np.dtype(np.float16), (embedder.dim,), 0)
        for shard in shards:
            joined.append(
                open_array(self._shard_path(shard), np.dtype(np.float16), (len(shard), embedder.dim))
            )
        joined.close()

    def _shards(self) -> list[Path]:
        return list(self.folder.glob("embeddings-*.npy"))

    def _shard_path(self, shard: range) -> Path:
        return self.folder / f"embeddings-{shard.start // self.shard_chunks:06d}.npy"

    def _has_shard(self, shard: range, dim: int) -> bool:
        path = self._shard_path(shard)
        if not path.exists():
            return False
        try:
            open_array(path, np.dtype(np.float16), (len(shard), dim))
        except InputError:  # of another shard size
            return False
        return True

    def finish(
        self,
        plan: dict[str, Any],
        corpus: Corpus,
        tokenizer: Tokenizer,
        embedder: _Describes,
        factory: str | None,
        recall: float,
        device: Any,
        grown: Index | None = None,
    ) -> None:
        """The table of chunk hashes, the index, and last of all the manifest."""
        state = self.state()
        chunks = self.chunks(tokenizer)
        hashes = hash_chunks(chunks)
        order = np.argsort(hashes, kind="stable")
        save_array(self.set / files.CHUNK_HASHES, hashes[order])
        save_array(self.set / files.CHUNK_ORDER, order.astype(np.int64))
        vectors = open_array(self.set / files.EMBEDDINGS, np.dtype(np.float16), (state.chunks, embedder.dim))
        manifest: dict[str, Any] = {
            "format": files.FORMAT,
            "version": files.VERSION,
            "chunk_size": int(chunks.shape[1]),
            "num_chunks": state.chunks,
            "num_documents": state.documents,
            "num_tokens": state.tokens,
            "text_bytes": corpus.text_bytes,
            "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
            "embedder": {"name": embedder.name, "fingerprint": embedder.fingerprint, "dim": embedder.dim},
            "index": self._index(vectors, factory, recall, device, grown),
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
        self, vectors: np.ndarray, factory: str | None, recall: float, device: Any, grown: Index | None
    ) -> dict[str, Any]:
        by_size = factory is None
        factory = factory or (
            grown.factory if grown else choose_factory(len(vectors), vectors.shape[1], device)
        )
        start = time.perf_counter()
        with self.bar(f"index {factory}", len(vectors), "chunks", len(grown) if grown else 0) as bar:
            if grown:
                grown.add(vectors[len(grown) :], bar.update)
                index = grown
            else:
                index = Index.build(vectors, factory, device=device, progress=bar.update)
        self.seconds["index"] = round(time.perf_counter() - start, 2)
        (self.set / files.INDEX).unlink(missing_ok=True)
        measured = index.tune(vectors, recall)
        if not measured["reached"]:
            self.say(
                f"index {factory}: recall@{measured['k']} is {measured['recall']:.3f}, {recall} was wished."
            )
            if by_size and len(vectors) <= _EXACT_FALLBACK:
                self.say("These vectors do not suit it; the exact index is taken.")
                return self._index(vectors, EXACT, recall, device, None)
        if not index.is_exact:
            index.save(self.set / files.INDEX)
        return {
            "factory": factory,
            "metric": "squared L2",
            **measured,
            "build_seconds": self.seconds["index"],
        }

    def _file_entries(self) -> dict[str, Any]:
        paths = [path for name in (*files.REQUIRED_FILES, files.INDEX) if (path := self.set / name).exists()]
        entries = {}
        with self.bar("checksums", sum(path.stat().st_size for path in paths), "B") as bar:
            for path in paths:
                entries[path.name] = {
                    "bytes": path.stat().st_size,
                    "sha256": files.file_sha256(path, bar.update),
                }
        return entries

    def publish(self) -> dict[str, Any]:
        """The finished folder takes the name of the set."""
        for path in self.set.iterdir():
            if path.name not in (*files.REQUIRED_FILES, files.INDEX, files.MANIFEST):
                path.unlink()  # a temporary file of a process that was killed
        sync_folder(self.set)
        swap(self.set, self.out)
        sync_folder(self.out.parent)
        manifest = files.read_manifest(self.out)
        shutil.rmtree(self.folder, ignore_errors=True)
        index = manifest["index"]
        self.say(
            f"{self.out}: {manifest['num_chunks']:,} chunks of {manifest['num_documents']:,} documents, index "
            f"{index['factory']}, recall@{index['k']} {index['recall']:.3f}."
        )
        return manifest


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    names = [key for key in new if old.get(key) != new[key]]
    return ", ".join(f"another {name}" for name in names)


def say(progress: bool, text: str) -> None:
    if progress:
        tqdm.write(text, file=sys.stderr)
