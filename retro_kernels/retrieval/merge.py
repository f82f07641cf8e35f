"""Sets that grow: parts built apart are merged, documents are appended, the search is tuned again.

Nothing is embedded twice: vectors are copied, indexes that were trained alike are joined as they are, and else a
trained index is kept where most of the new set was in it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from retro_kernels.config import InputError
from retro_kernels.data.corpus import (
    Document,
    Fingerprint,
    ReadReport,
    Source,
    document_hash,
    one_or_more,
    reader_of,
)
from retro_kernels.ops._backend import pick_device
from retro_kernels.retrieval import store as files
from retro_kernels.retrieval.build import (
    APPEND,
    SHARD_CHUNKS,
    Builder,
    Corpus,
    Options,
    Start,
    build_from,
    check_factory_of,
    measure_exact,
    own_folders,
)
from retro_kernels.retrieval.embedder import TextEmbedder, embedder_in_words, load_described
from retro_kernels.retrieval.index import EXACT, Index, check_factory, check_recall
from retro_kernels.retrieval.store import ChunkStore
from retro_kernels.retrieval.writing import ChunkWriter, GrowingArray, Progress, load_json, save_json

_COPY_ROWS = 1 << 16
_FILES_OF_A_SET = 8
"""Which stay open while it is: those that are mapped into memory."""


def merge_retrieval_sets(
    sets: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    index: str | None = None,
    recall: float = 0.95,
    device: Any = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Joins sets with the same tokenizer, embedder and chunk size into the set `out`, without embedding anything again.

    Documents come in the order of the sets; of equal ones the first is kept. If no other kind of index is asked for,
    the sets' inverted lists are joined, with no vector encoded again, where their indexes have one trained state (see
    `trained_index` of `build_retrieval_set`) and no document was dropped. Else, where the first set holds at least half
    of the chunks, its trained index is kept and the others' vectors are added to it; otherwise an index is trained
    anew. Arguments, errors and return value are those of `build_retrieval_set`. Where all sets together take more open
    files than this process may have, its limit is raised; InputError where the system does not allow as many.
    """
    builder = Builder(Path(out), SHARD_CHUNKS, progress)
    return _merge(one_or_more(sets), builder, index, recall, device, overwrite, overwrite)


def _merge(
    sets: Sequence[str | os.PathLike[str]],
    builder: Builder,
    index: str | None,
    recall: float,
    device: Any,
    overwrite: bool,
    drop: bool,
) -> dict[str, Any]:
    """overwrite: the set `builder.out`.  drop: other unfinished work on it."""
    if not sets:
        raise InputError("merge: no retrieval sets were given.")
    recall = check_recall(recall)
    device = pick_device(device or "cpu")
    builder.recover()
    _allow_open_files(_FILES_OF_A_SET * len(sets), len(sets))
    stores = [ChunkStore.open(path) for path in sets]
    _check_mergeable(stores)
    check_factory(index, stores[0].manifest["embedder"]["dim"])
    builder.check_target(overwrite)
    corpus, kept = _survey_sets(builder, stores)
    first = stores[0].manifest
    plan = {
        "corpus": corpus.fingerprint,
        "chunk_size": first["chunk_size"],
        "tokenizer": first["tokenizer"]["fingerprint"],
        "embedder": first["embedder"]["fingerprint"],
        "index": index or "by size",
        "recall": recall,
    }
    if (manifest := builder.already_built(plan, overwrite)) is not None:
        return manifest
    with builder.work(plan, drop):
        for store in stores:  # from here on no other builder can exchange `out`, if it is among them
            if files.read_manifest(store.path) != store.manifest:
                raise InputError(f"{store.path} was replaced while it was being read. Run the command again.")
        if not builder.is_complete(plan):
            adopted = builder.adopt(plan, overwrite)
            model = builder.tokenizer(stores[0].tokenizer, corpus, None)
            start = None
            if not adopted:
                _copy(builder, stores, kept)
                builder.tabulate(model)
                start = _start(builder, stores, kept, index)
            builder.finish(plan, corpus, model, first["embedder"], index, recall, device, start)
        return builder.publish()


def append_to_retrieval_set(
    path: str | os.PathLike[str],
    paths: Source,
    *,
    embedder: str | os.PathLike[str] | TextEmbedder | None = None,
    device: Any = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overwrite: bool = False,
    shard_chunks: int = SHARD_CHUNKS,
    progress: bool = True,
) -> dict[str, Any]:
    """Adds the documents that the set does not hold yet, and returns the new manifest.

    The set's tokenizer is used, and its embedder in its dtype; `embedder` says where that is, if not under the name in
    the manifest. The larger set is written beside the old one and exchanged for it in one step. The new part, built in
    `<path>.append`, is taken up after an interruption; one of other documents is an error, or dropped with `overwrite`.
    Where the set holds every document already, nothing is done. Errors are those of `build_retrieval_set`.
    """
    device = pick_device(device or "cpu")
    target = Path(os.path.realpath(path))
    whole = Builder(target, SHARD_CHUNKS, progress)
    whole.recover()
    whole.check_nothing_else()
    store = ChunkStore.open(target)
    loaded = load_described(store.manifest["embedder"], target, embedder, device)
    known = set(store.document_hashes.tolist())
    read = reader_of(paths, include, exclude, own_folders(target))

    def read_new(report: ReadReport) -> Iterator[Document]:
        return (document for document in read(report) if document_hash(document.text) not in known)

    addition = Builder(
        target.with_name(target.name + APPEND),
        shard_chunks,
        progress,
        f"It is an addition to {target} that was interrupted: finish it with the same text as before, or drop it with "
        "overwrite (--overwrite).",
    )
    _drop_merged(addition.out, known)
    if next(read_new(ReadReport()), None) is None:
        whole.drop_leftovers(store.manifest.get("build"))
        whole.say(f"{target}: holds every one of these documents already; nothing to do.")
        return store.manifest
    asked = store.manifest.get("build") or {}
    index = asked.get("index", store.manifest["index"]["factory"])
    if index != "by size":
        check_factory_of(store, index)
    options = Options(store.tokenizer, None, "Flat", 1.0, device, store.chunk_size, None, overwrite, True)
    build_from(read_new, addition, lambda: loaded, options)
    manifest = _merge(
        [target, addition.out],
        whole,
        None if index == "by size" else index,
        asked.get("recall", 0.95),
        device,
        overwrite=True,
        drop=overwrite or not whole.has_shards(),  # without shards it is a merging, and takes minutes
    )
    _drop_merged(addition.out, None)
    return manifest


def _drop_merged(addition: Path, known: set[int] | None) -> None:
    """Deletes an addition, its manifest last, that is ours and in the set (known: hashes of its documents; None: it
    is). InputError where something else has that name."""
    with contextlib.suppress(FileNotFoundError):  # another process may be deleting it, too
        manifest = load_json(addition / files.MANIFEST)
        build = manifest.get("build") if isinstance(manifest, dict) else None
        if not isinstance(build, dict) or not build.get("addition"):
            if not any(addition.iterdir()):
                return
            raise InputError(
                f"{addition} is where documents to be added are embedded, but it holds something else. Move it away."
            )
        with contextlib.suppress(InputError):  # half of it was deleted
            if known is not None and not known.issuperset(ChunkStore.open(addition).document_hashes.tolist()):
                return
        for path in addition.iterdir():
            if path.name != files.MANIFEST:
                path.unlink(missing_ok=True)
        (addition / files.MANIFEST).unlink(missing_ok=True)
        addition.rmdir()


def tune_retrieval_set(
    path: str | os.PathLike[str],
    recall: float = 0.95,
    *,
    k: int = 10,
    device: Any = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Finds the fastest search setting of a set's index reaching `recall`@k, and stores it; returns the manifest.

    Where none reaches it, the one that finds most is stored; see `build_retrieval_set`.
    Raises InputError where there is no such set, where it is being built anew, or was replaced meanwhile.
    """
    recall = check_recall(recall)
    device = pick_device(device or "cpu")
    builder = Builder(Path(path), SHARD_CHUNKS, progress)
    builder.recover()
    store = ChunkStore.open(path)
    with builder.held():
        if store.manifest["index"]["factory"] == EXACT:
            measured = measure_exact(store.embeddings, recall, k=k, device=device)
        else:
            measured = builder.tune(Index.open(store, device=device), store.embeddings, recall, k)
        if files.read_manifest(store.path) != store.manifest:
            raise InputError(f"{store.path} was replaced while it was being tuned. Run the command again.")
        manifest = {**store.manifest, "index": {**store.manifest["index"], **measured}}
        if isinstance(manifest.get("build"), dict):
            manifest["build"] = {**manifest["build"], "recall": recall}
        files.write_manifest(store.path, manifest)
    return manifest


@dataclass
class _Kept:
    """What of one set goes into a merged one."""

    documents: np.ndarray  # int64: ids of the documents kept
    rows: np.ndarray  # int64: rows of their chunks


def _start(builder: Builder, stores: list[ChunkStore], kept: list[_Kept], index: str | None) -> Start | None:
    """The index that need not be trained, if there is one: that of all sets, or of the first."""
    first = stores[0].manifest["index"]
    factory, trained = first["factory"], first.get("trained")
    if factory in (EXACT, "CAGRA") or index not in (None, factory):
        return None
    whole = [len(part.rows) == store.num_chunks for store, part in zip(stores, kept, strict=True)]
    alike = trained and all(store.manifest["index"].get("trained") == trained for store in stores)
    if alike and all(whole):
        builder.say(f"index {factory}: the lists of the sets are joined as they are.")
        return Start(factory, trained, partial(Index.join, stores))
    reason = (
        ", since a document is in two sets" if alike else ", since the sets have no trained index in common"
    )
    if any(store.manifest["index"]["factory"] != factory for store in stores):
        reason = ""  # nobody expects them to be joined
    # what it was trained on is to be most of what it will hold
    if whole[0] and 2 * stores[0].num_chunks >= sum(len(part.rows) for part in kept):
        builder.say(f"index {factory}: vectors are added to that of {stores[0].path}{reason}.")
        return Start(factory, trained, partial(Index.open, stores[0]))
    builder.say(f"The indexes of the sets are not kept{reason}.")
    return None


def _allow_open_files(needed: int, sets: int) -> None:
    """Lets this process have `needed` files open, and some more. InputError where the system does not."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if hard != unlimited and hard < needed:
        raise InputError(
            f"merge: {sets:,} sets take {needed:,} open files, and this process may have {hard:,}. Raise that "
            "(ulimit -n), or merge some of the sets first, and then what comes of it."
        )
    wanted = needed + 256 if hard == unlimited else min(needed + 256, hard)
    if soft != unlimited and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _check_mergeable(stores: list[ChunkStore]) -> None:
    first = stores[0]
    for other in stores[1:]:
        for what, keys in (
            ("chunk size", ("chunk_size",)),
            ("tokenizer", ("tokenizer", "fingerprint")),
            ("embedder", ("embedder", "fingerprint")),
        ):
            a: Any = first.manifest
            b: Any = other.manifest
            for key in keys:
                a, b = a[key], b[key]
            if a != b:
                advice = ""
                if what == "embedder":
                    a, b = (embedder_in_words(store.manifest["embedder"]) for store in (first, other))
                    what = f"embedder: {a} and {b}"
                    advice = " A BERT computes in what is fast on its machine, or in embedder_dtype (--embedder-dtype)."
                raise InputError(
                    f"{first.path} and {other.path} cannot be merged: they differ in the {what}. Build all parts with "
                    f"the same one.{advice}"
                )


def _survey_sets(builder: Builder, stores: list[ChunkStore]) -> tuple[Corpus, list[_Kept]]:
    fingerprint = Fingerprint()
    seen: set[int] = set()
    kept, text_bytes, duplicates = [], 0, 0
    skipped: dict[str, int] = {}
    with builder.bar("reading", None, "documents") as bar:
        for store in stores:
            mine = []
            for i, text_hash in enumerate(store.document_hashes.tolist()):
                bar.update()
                if text_hash in seen:
                    duplicates += 1
                    continue
                seen.add(text_hash)
                mine.append(i)
                entry = store._document(i)
                fingerprint.add(text_hash, entry["title"])
                text_bytes += int(entry.get("bytes", 0))
            ids = np.array(mine, dtype=np.int64)
            keep = np.zeros(store.num_documents, dtype=bool)
            keep[ids] = True
            kept.append(_Kept(ids, np.flatnonzero(keep[store.document_ids])))
            for reason, count in store.manifest.get("corpus", {}).get("skipped", {}).items():
                skipped[reason] = skipped.get(reason, 0) + count
            duplicates += store.manifest.get("corpus", {}).get("duplicates", 0)
    return Corpus(fingerprint.hex(), duplicates, text_bytes, skipped), kept


def _copy(builder: Builder, stores: list[ChunkStore], kept: list[_Kept]) -> None:
    """The rows kept of several sets, one after another. Begun anew after an interruption: it only copies."""
    state = Progress()
    manifest = stores[0].manifest
    dim = manifest["embedder"]["dim"]
    writer = ChunkWriter(builder.set, manifest["tokenizer"]["vocab_size"], manifest["chunk_size"], state)
    embeddings = GrowingArray(builder.set / files.EMBEDDINGS, np.dtype(np.float16), (dim,), 0)
    for store in stores:
        store.read_ahead()
    total = sum(len(part.documents) + len(part.rows) for part in kept)
    with builder.bar("copying", total, "documents and chunks") as bar:
        for store, part in zip(stores, kept, strict=True):
            number = np.full(store.num_documents, -1, dtype=np.int64)
            number[part.documents] = state.documents + np.arange(len(part.documents))
            for i in part.documents.tolist():
                entry = store._document(i)
                writer.add_document(int(store.document_hashes[i]), entry["title"], int(entry.get("bytes", 0)))
                bar.update()
            for start in range(0, len(part.rows), _COPY_ROWS):
                rows = part.rows[start : start + _COPY_ROWS]
                chunks = np.asarray(store.chunks[rows])
                writer.add_chunks(chunks, number[store.document_ids[rows]])
                state.tokens += int(np.count_nonzero(chunks))  # encoding never gives 0
                embeddings.append(store.embeddings[rows])
                bar.update(len(rows))
    writer.close()
    embeddings.close()
    state.done = True
    save_json(builder.journal, vars(state))
