"""Sets that grow: parts built apart are merged, documents are appended, the search is tuned again.

Nothing is embedded twice: vectors are copied, and a trained index is kept where most of the new set was in it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retro_kernels.config import InputError
from retro_kernels.data.corpus import Document, ReadReport, document_hash
from retro_kernels.retrieval import store as files
from retro_kernels.retrieval.build import (
    SHARD_CHUNKS,
    Builder,
    Corpus,
    Fingerprint,
    Options,
    Source,
    as_embedder,
    build_from,
    reader_of,
    say,
)
from retro_kernels.retrieval.embedder import TextEmbedder
from retro_kernels.retrieval.index import Index
from retro_kernels.retrieval.store import ChunkStore
from retro_kernels.retrieval.writing import ChunkWriter, GrowingArray, Progress, save_json

_COPY_ROWS = 1 << 16


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

    Documents come in the order of the sets; of equal ones the first is kept. Where the first set holds at least half of
    the chunks and no other kind of index is asked for, its trained index is kept and the others' vectors are added to
    it; otherwise an index is trained anew. Arguments, errors and return value are those of `build_retrieval_set`.
    """
    if not sets:
        raise InputError("merge: no retrieval sets were given.")
    stores = [ChunkStore.open(path) for path in sets]
    _check_mergeable(stores)
    builder = Builder(Path(out), SHARD_CHUNKS, progress)
    builder.check_target(overwrite)
    corpus, kept = _survey_sets(stores)
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
    with builder.work(plan, overwrite):
        for store in stores:  # from here on no other builder can exchange `out`, if it is among them
            if files.read_manifest(store.path) != store.manifest:
                raise InputError(f"{store.path} was replaced while it was being read. Run the command again.")
        if not builder.is_complete(plan):
            _copy(builder, stores, kept)
            model = builder.tokenizer(stores[0].tokenizer, corpus, None)
            grown = Index.open(stores[0]) if _can_grow(stores[0], kept, index) else None
            described = _Described(**{key: first["embedder"][key] for key in ("name", "fingerprint", "dim")})
            builder.finish(plan, corpus, model, described, index, recall, device, grown)
        return builder.publish()


def append_to_retrieval_set(
    path: str | os.PathLike[str],
    paths: Source,
    *,
    embedder: str | os.PathLike[str] | TextEmbedder | None = None,
    device: Any = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    shard_chunks: int = SHARD_CHUNKS,
    progress: bool = True,
) -> dict[str, Any]:
    """Adds the documents that the set does not hold yet, and returns the new manifest.

    The set's tokenizer is used; the embedder must be the set's own. The larger set is written beside the old one and
    exchanged for it in one step. The new part, built in `<path>.append`, is taken up after an interruption. Where the
    set holds every document already, nothing is done. Errors are those of `build_retrieval_set`.
    """
    target = Path(path)
    store = ChunkStore.open(target)
    loaded = as_embedder(embedder, device)
    if loaded.fingerprint != store.manifest["embedder"]["fingerprint"]:
        name = store.manifest["embedder"]["name"]
        raise InputError(
            f"The set {target} was embedded with {name}; {loaded.name} here is not the same. Use that."
        )
    known = set(store.document_hashes.tolist())
    read = reader_of(paths, include, exclude)

    def read_new(report: ReadReport) -> Iterator[Document]:
        return (document for document in read(report) if document_hash(document.text) not in known)

    if next(read_new(ReadReport()), None) is None:
        say(progress, f"{target}: holds every one of these documents already; nothing to do.")
        return store.manifest
    addition = target.with_name(target.name + ".append")
    if (addition / files.MANIFEST).exists() and known.issuperset(
        ChunkStore.open(addition).document_hashes.tolist()
    ):
        shutil.rmtree(addition)  # of an earlier call that was killed after its last step but one
    options = Options(store.tokenizer, None, "Flat", 1.0, device, store.chunk_size, None, overwrite=False)
    build_from(read_new, Builder(addition, shard_chunks, progress), lambda: loaded, options)
    asked = store.manifest.get("build", {})
    manifest = merge_retrieval_sets(
        [target, addition],
        target,
        index=None if asked.get("index") == "by size" else asked.get("index"),
        recall=asked.get("recall", 0.95),
        device=device,
        overwrite=True,
        progress=progress,
    )
    shutil.rmtree(addition)
    return manifest


def tune_retrieval_set(
    path: str | os.PathLike[str], recall: float = 0.95, *, k: int = 10, device: Any = None
) -> dict[str, Any]:
    """Finds the fastest search setting of a set's index reaching `recall`@k, and stores it; returns the manifest."""
    store = ChunkStore.open(path)
    index = Index.open(store, device=device)
    manifest = {
        **store.manifest,
        "index": {**store.manifest["index"], **index.tune(store.embeddings, recall, k=k)},
    }
    files.write_manifest(store.path, manifest)
    return manifest


@dataclass
class _Described:
    """An embedder that is not loaded: sets are merged by their stored vectors."""

    name: str
    fingerprint: str
    dim: int


@dataclass
class _Kept:
    """What of one set goes into a merged one."""

    documents: np.ndarray  # int64: ids of the documents kept
    rows: np.ndarray  # int64: rows of their chunks


def _can_grow(store: ChunkStore, kept: list[_Kept], index: str | None) -> bool:
    """Whether the index of the first set may be kept: what it was trained on is most of what it will hold."""
    factory = store.manifest["index"]["factory"]
    whole = len(kept[0].rows) == store.num_chunks
    mostly = 2 * store.num_chunks >= sum(len(part.rows) for part in kept)
    return factory not in ("Flat", "CAGRA") and index in (None, factory) and whole and mostly


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
                raise InputError(
                    f"{first.path} and {other.path} cannot be merged: they differ in the {what}. Build all parts with "
                    "the same one."
                )


def _survey_sets(stores: list[ChunkStore]) -> tuple[Corpus, list[_Kept]]:
    fingerprint = Fingerprint()
    seen: set[int] = set()
    kept, text_bytes, duplicates = [], 0, 0
    skipped: dict[str, int] = {}
    for store in stores:
        mine = []
        for i, text_hash in enumerate(store.document_hashes.tolist()):
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
    return Corpus(fingerprint.hex(), len(seen), duplicates, text_bytes, skipped), kept


def _copy(builder: Builder, stores: list[ChunkStore], kept: list[_Kept]) -> None:
    """The rows kept of several sets, one after another. Begun anew after an interruption: it only copies."""
    state = Progress()
    manifest = stores[0].manifest
    dim = manifest["embedder"]["dim"]
    writer = ChunkWriter(builder.set, manifest["tokenizer"]["vocab_size"], manifest["chunk_size"], state)
    embeddings = GrowingArray(builder.set / files.EMBEDDINGS, np.dtype(np.float16), (dim,), 0)
    with builder.bar("copying", sum(len(part.rows) for part in kept), "chunks") as bar:
        for store, part in zip(stores, kept, strict=True):
            number = np.full(store.num_documents, -1, dtype=np.int64)
            number[part.documents] = state.documents + np.arange(len(part.documents))
            for i in part.documents.tolist():
                entry = store._document(i)
                writer.add_document(int(store.document_hashes[i]), entry["title"], int(entry.get("bytes", 0)))
            for start in range(0, len(part.rows), _COPY_ROWS):
                rows = part.rows[start : start + _COPY_ROWS]
                chunks = np.asarray(store.chunks[rows])
                writer.add_chunks(chunks, number[store.document_ids[rows]])
                state.tokens += _count_tokens(chunks)
                embeddings.append(store.embeddings[rows])
                bar.update(len(rows))
    writer.close()
    embeddings.close()
    state.done = True
    save_json(builder.folder / "cut.json", vars(state))


def _count_tokens(chunks: np.ndarray) -> int:
    """Tokens before each row's trailing pads."""
    return int((chunks != 0).sum())
