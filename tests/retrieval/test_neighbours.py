"""Neighbours kept in a file or in memory are those of a live search, and damage is noticed."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from retrieval.sets import BagEmbedder, CountingIndex, M, MemoryStore, dense, make_documents
from torch import Tensor

from retro_kernels.config import InputError
from retro_kernels.ops.gather import NeighbourBatch
from retro_kernels.retrieval import neighbours as module
from retro_kernels.retrieval import writing
from retro_kernels.retrieval.index import Index
from retro_kernels.retrieval.neighbours import (
    CachingSearcher,
    NeighbourFile,
    PrecomputedSearcher,
    precompute,
    share_in_file,
)
from retro_kernels.retrieval.rerank import Reranker
from retro_kernels.retrieval.retriever import Retriever
from retro_kernels.retrieval.writing import Journal


@pytest.fixture
def store(seed: int) -> MemoryStore:
    text = torch.randint(1, 5000, (3 * M,)).tolist()
    # one text in two documents: its chunks stand in the file once for each
    return MemoryStore([text, *make_documents(40, shared=False), text], BagEmbedder())


def packed(store: MemoryStore, b: int = 6, chunks: int = 4) -> tuple[Tensor, Tensor]:
    picked = np.sort(torch.randint(store.num_chunks, (b, chunks)).numpy())
    tokens = torch.from_numpy(store.chunks[picked].astype(np.int64)).reshape(b, -1)
    return tokens, torch.from_numpy(store.document_ids[picked])


def same(a: NeighbourBatch, b: NeighbourBatch) -> None:
    # by what they say: of copies of a text, equally near up to rounding, one is as good as another
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.ids < 0, b.ids < 0)
    assert torch.equal(a.lengths, b.lengths)
    torch.testing.assert_close(a.distances, b.distances, rtol=1e-4, atol=1e-4)


def with_file(store: MemoryStore, path: Path, index: Any = None) -> Retriever:
    retriever = dense(store, index=index)
    table = NeighbourFile.open(path, store=store, retriever="dense")
    retriever.searcher = PrecomputedSearcher(table, retriever._documents, retriever.searcher, retriever.stats)
    return retriever


def test_training_from_the_file_has_the_neighbours_of_a_live_search(
    store: MemoryStore, tmp_path: Path
) -> None:
    live = dense(store)
    result = precompute(live, store.chunks, store.document_ids, tmp_path / "near", per_chunk=8)
    assert result["rows"] <= store.num_chunks == result["chunks"] and not result["done_before"]
    index = CountingIndex(store.embeddings)
    kept = with_file(store, tmp_path / "near", index)
    tokens, exclude = packed(store)
    same(
        kept(tokens, num_neighbours=2, exclude_documents=exclude),
        live(tokens, num_neighbours=2, exclude_documents=exclude),
    )
    assert (
        kept.stats.reused > 0
        and sum(rows for rows, _ in index.calls) <= 24 - kept.stats.reused + kept.stats.widened * 9
    )


@pytest.mark.parametrize("all_there_is", [False, True])
def test_all_of_a_whole_pass_comes_from_the_file(
    store: MemoryStore, tmp_path: Path, all_there_is: bool
) -> None:
    per_chunk, k = [store.num_chunks] * 2 if all_there_is else (4, 3)
    precompute(dense(store), store.chunks, store.document_ids, tmp_path / "near", per_chunk=per_chunk)
    index = CountingIndex(store.embeddings)
    kept, live = with_file(store, tmp_path / "near", index), dense(store)
    tokens, own = (
        torch.from_numpy(store.chunks.astype(np.int64)),
        torch.from_numpy(store.document_ids)[:, None],
    )
    same(
        kept(tokens, num_neighbours=k, exclude_documents=own),
        live(tokens, num_neighbours=k, exclude_documents=own),
    )
    assert not index.calls


def test_equal_hashes_of_different_chunks_do_no_harm(
    store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes, without = module._hashes, tmp_path / "without"
    rows = precompute(dense(store), store.chunks, store.document_ids, without, per_chunk=8)["rows"]

    def colliding(queries: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
        first, second = hashes(queries, documents)
        return first.remainder(8), second

    monkeypatch.setattr(module, "_hashes", colliding)
    made = precompute(dense(store), store.chunks, store.document_ids, tmp_path / "near", per_chunk=8)
    assert made["rows"] == rows == len({*NeighbourFile.open(without).checks.tolist()})
    tokens, exclude = packed(store)
    kept, live = with_file(store, tmp_path / "near"), dense(store)
    same(kept(tokens, exclude_documents=exclude), live(tokens, exclude_documents=exclude))


@pytest.mark.parametrize(
    "case",
    ["own document not excluded", "list too short", "list one short", "unknown chunk", "none excluded"],
)
def test_rows_that_the_file_cannot_serve_are_searched(store: MemoryStore, tmp_path: Path, case: str) -> None:
    precompute(dense(store), store.chunks[:50], store.document_ids[:50], tmp_path / "near", per_chunk=3)
    tokens, own = (
        torch.from_numpy(store.chunks[:50].astype(np.int64)),
        torch.from_numpy(store.document_ids[:50])[:, None],
    )
    k, exclude = 2, own
    if case == "own document not excluded":
        exclude = (own + 7) % store.num_documents
    elif case == "list too short":
        k = 5
    elif case == "list one short":
        nearest = dense(store)(tokens, exclude_documents=own)
        k, exclude = 3, torch.cat([own, dense(store).documents(nearest.ids[:, 0, :1])], 1)
    elif case == "unknown chunk":
        tokens = tokens.flip(1)
    else:
        exclude = None
    kept, live = with_file(store, tmp_path / "near"), dense(store)
    same(
        kept(tokens, num_neighbours=k, exclude_documents=exclude),
        live(tokens, num_neighbours=k, exclude_documents=exclude),
    )


def test_lists_made_for_text_outside_the_set_serve_any_exclusion(store: MemoryStore, tmp_path: Path) -> None:
    chunks = np.random.default_rng(0).integers(1, 5000, (20, M))
    precompute(dense(store), chunks, np.full(20, -1), tmp_path / "near", per_chunk=store.num_chunks + 2)
    index = CountingIndex(store.embeddings)
    kept, live, tokens = with_file(store, tmp_path / "near", index), dense(store), torch.from_numpy(chunks)
    exclude = torch.randint(-1, store.num_documents, (20, 3))
    same(
        kept(tokens, num_neighbours=9, exclude_documents=exclude),
        live(tokens, num_neighbours=9, exclude_documents=exclude),
    )
    assert not index.calls  # the lists hold everything: none can run short


def test_a_file_has_what_was_asked_for(store: MemoryStore, tmp_path: Path) -> None:
    """Copies too, which a retriever may leave out later; with more places it is another file."""
    made = []
    for per_chunk, drop_copies, before in (
        (4, None, False),
        (4, 0.5, True),
        (5, 0.5, False),
        (5, None, True),
    ):
        live = dense(store, drop_copies=drop_copies)
        result = precompute(live, store.chunks, store.document_ids, tmp_path / "near", per_chunk=per_chunk)
        assert result["done_before"] == before and result["per_chunk"] == per_chunk
        made.append(NeighbourFile.open(tmp_path / "near").ids)
    assert made[2].shape[1] == 5 and torch.equal(made[0], made[2][:, :4])
    nowhere = np.full_like(store.document_ids, -1)  # the same chunks, of text that the set does not have
    for documents, before in ((nowhere, False), (nowhere, True), (store.document_ids, False)):
        result = precompute(dense(store), store.chunks, documents, tmp_path / "near", per_chunk=5)
        assert result["done_before"] == before


def test_without_a_live_searcher_the_rest_is_missing(store: MemoryStore, tmp_path: Path) -> None:
    precompute(dense(store), store.chunks[:9], store.document_ids[:9], tmp_path / "near", per_chunk=4)
    retriever = dense(store)
    retriever.searcher = PrecomputedSearcher(
        NeighbourFile.open(tmp_path / "near"), retriever._documents, None
    )
    own = torch.from_numpy(store.document_ids[:12])[:, None]
    got = retriever(torch.from_numpy(store.chunks[:12].astype(np.int64)), exclude_documents=own)
    assert (got.ids[:9] >= 0).all() and (got.ids[9:] == -1).all() and (got.lengths[9:] == 0).all()


def test_an_index_that_refines_is_asked_for_as_much_either_way(store: MemoryStore, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    index = Index.build(
        store.embeddings, "PQ2x4,RFlat"
    )  # what is refined, and so what is found, depends on the fetch
    precompute(dense(store, index=index), store.chunks, store.document_ids, tmp_path / "near", per_chunk=16)
    tokens = torch.from_numpy(store.chunks.astype(np.int64))
    others = torch.randint(store.num_documents, (len(tokens), 2))
    exclude = torch.cat([torch.from_numpy(store.document_ids)[:, None], others], 1)
    kept, live = with_file(store, tmp_path / "near", index), dense(store, index=index)
    got = kept(tokens, num_neighbours=2, exclude_documents=exclude)
    assert torch.equal(got.ids, live(tokens, num_neighbours=2, exclude_documents=exclude).ids)
    assert kept.stats.reused == len(tokens) and live.stats.widened == 0


def test_memory_is_bounded_by_the_block(
    store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[weakref.ref[Any]] = []
    add = Journal.add

    def watched(done: Journal, block: dict[str, np.ndarray], *key: str) -> dict[str, np.ndarray]:
        if block:
            kept.append(weakref.ref(block["ids"]))
        assert sum(block() is not None for block in kept) <= 2
        return add(done, block, *key)

    with monkeypatch.context() as patched:
        patched.setattr(module, "_BLOCK", 8)
        patched.setattr(Journal, "add", watched)
        precompute(dense(store), store.chunks, store.document_ids, tmp_path / "near", per_chunk=4)
    assert len(kept) == -(-store.num_chunks // 8)
    opened = NeighbourFile.open(tmp_path / "near")
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path / "near") in maps.read_text()  # the file is mapped, not read into memory
    precompute(dense(store), store.chunks, store.document_ids, tmp_path / "whole", per_chunk=4)
    whole = NeighbourFile.open(tmp_path / "whole")
    assert torch.equal(opened.hashes, whole.hashes) and torch.equal(opened.checks, whole.checks)
    assert torch.equal(opened.ids < 0, whole.ids < 0)
    torch.testing.assert_close(opened.distances, whole.distances, rtol=1e-4, atol=1e-4)


def test_no_chunks_make_an_empty_file(store: MemoryStore, tmp_path: Path) -> None:
    assert precompute(dense(store), store.chunks[:0], store.document_ids[:0], tmp_path / "near")["rows"] == 0
    tokens, exclude = packed(store)
    same(
        with_file(store, tmp_path / "near")(tokens, exclude_documents=exclude),
        dense(store)(tokens, exclude_documents=exclude),
    )


class Stop(Exception):
    pass


@pytest.mark.parametrize("damage", ["cut off", "overwritten"])
def test_an_interrupted_run_goes_on(
    store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(module, "_BLOCK", 16)
    done: list[int] = []

    def stop_after_three(n: int) -> None:
        done.append(n)
        if len(done) == 3:
            raise Stop

    out = tmp_path / "near"
    with pytest.raises(Stop):
        precompute(
            dense(store), store.chunks, store.document_ids, out, per_chunk=4, progress=stop_after_three
        )
    assert not out.exists()
    partial = tmp_path / "near.partial"
    content = partial.read_bytes()
    partial.write_bytes(content[:-7] if damage == "cut off" else content[:-7] + b"wrong!!")
    index, done = CountingIndex(store.embeddings), []
    precompute(
        dense(store, index=index), store.chunks, store.document_ids, out, per_chunk=4, progress=done.append
    )
    assert sum(done) == store.num_chunks
    first_fetches = [rows for rows, k in index.calls if rows == 16]
    assert (
        len(first_fetches) <= store.num_chunks // 16 - 2 + 1
    )  # two whole blocks were kept, the damaged one was not
    assert [p.name for p in tmp_path.iterdir()] == ["near"]
    precompute(dense(store), store.chunks, store.document_ids, tmp_path / "again", per_chunk=4)
    a, b = NeighbourFile.open(out), NeighbourFile.open(tmp_path / "again")
    assert torch.equal(a.ids, b.ids) and a.metadata == b.metadata
    before = out.read_bytes()
    assert precompute(dense(store), store.chunks, store.document_ids, out, per_chunk=4)["done_before"]
    assert out.read_bytes() == before


def test_a_run_that_was_killed_when_its_file_stood_leaves_nothing(
    store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But the journal of another one stays, and one that a process writes."""
    out, partial = tmp_path / "near", tmp_path / "near.partial"
    arguments = dense(store), store.chunks, store.document_ids, out
    save = module._save

    def killed(*args: Any) -> None:
        save(*args)
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(module, "_save", killed)
        with pytest.raises(Stop):
            precompute(*arguments, per_chunk=4)
        left, other = partial.read_bytes(), tmp_path / "other"
        with pytest.raises(Stop):
            precompute(*arguments[:-1], other, per_chunk=5)
    assert out.stat().st_mode == partial.stat().st_mode  # whoever may read the one may read the other
    shutil.copy(tmp_path / "other.partial", partial)
    assert precompute(*arguments, per_chunk=4)["done_before"]
    assert partial.read_bytes() == (tmp_path / "other.partial").read_bytes()
    partial.write_bytes(left)
    with writing.locked(partial, "busy"):
        assert precompute(*arguments, per_chunk=4)["done_before"]
    assert partial.read_bytes() == left
    for _ in range(2):
        assert precompute(*arguments, per_chunk=4)["done_before"]
        assert not partial.exists()


def test_blocks_of_other_input_are_not_taken(
    store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK", 16)

    def stop(n: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        precompute(
            dense(store),
            store.chunks[::-1],
            store.document_ids[::-1],
            tmp_path / "near",
            per_chunk=4,
            progress=stop,
        )
    precompute(dense(store), store.chunks, store.document_ids, tmp_path / "near", per_chunk=4)
    precompute(dense(store), store.chunks, store.document_ids, tmp_path / "again", per_chunk=4)
    assert torch.equal(NeighbourFile.open(tmp_path / "near").ids, NeighbourFile.open(tmp_path / "again").ids)


def test_how_much_is_filled(store: MemoryStore, tmp_path: Path) -> None:
    chunks = np.concatenate([store.chunks, np.zeros((1, store.chunk_size), store.chunks.dtype)])
    documents = np.append(store.document_ids, -1)  # the last chunk is padding, which has no neighbours
    for _ in range(2):  # made, and found made
        found = precompute(dense(store), chunks, documents, tmp_path / "near", per_chunk=store.num_chunks - 1)
        ids = NeighbourFile.open(tmp_path / "near").ids
        assert found["filled"] == pytest.approx((ids >= 0).double().mean().item()) and found["filled"] < 1
        assert found["without_neighbours"] == pytest.approx(1 / len(ids))


def test_two_processes_on_one_file(store: MemoryStore, tmp_path: Path) -> None:
    def meanwhile(n: int) -> None:
        with pytest.raises(InputError, match="Another process"):
            precompute(dense(store), store.chunks, store.document_ids, tmp_path / "near")

    precompute(dense(store), store.chunks, store.document_ids, tmp_path / "near", progress=meanwhile)


@pytest.mark.parametrize(
    "damage", ["truncated", "bit flipped", "text", "missing", "other set", "other retriever", "empty"]
)
def test_what_is_wrong_with_a_file_is_said(store: MemoryStore, tmp_path: Path, damage: str) -> None:
    path, wanted = tmp_path / "near", "dense"
    precompute(dense(store), store.chunks, store.document_ids, path, per_chunk=4)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-100])
    elif damage == "bit flipped":
        content[-5] ^= 4
        path.write_bytes(content)
    elif damage == "text":
        path.write_text("neighbours")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "missing":
        path.unlink()
    elif damage == "other set":
        store.manifest["files"]["chunks.npy"]["sha256"] = "0" * 64
    else:
        wanted = "bm25"
    with pytest.raises(InputError, match=str(path)):
        NeighbourFile.open(path, store=store, retriever=wanted)


def test_a_file_outlives_another_measurement_of_the_index_but_not_another_setting(
    store: MemoryStore, tmp_path: Path
) -> None:
    index = store.manifest["index"]
    index.update(search="nprobe=4", recall=0.9, queries_per_second=100.0, build_seconds=3.0, threads=2)
    precompute(dense(store), store.chunks, store.document_ids, tmp_path / "near", per_chunk=4)
    index.update(recall=0.91, queries_per_second=140.0, build_seconds=2.0, threads=8, target=0.9)
    NeighbourFile.open(tmp_path / "near", store=store)
    for change in ({"search": "nprobe=8"}, {"factory": "IVF4,Flat"}, {"metric": "inner product"}):
        before = dict(index)
        index.update(change)
        with pytest.raises(InputError, match="another retrieval set"):
            NeighbourFile.open(tmp_path / "near", store=store)
        index.clear()
        index.update(before)
    for part in ("tokenizer", "embedder"):
        before = dict(store.manifest[part])
        store.manifest[part]["fingerprint"] = "0" * 64
        with pytest.raises(InputError, match="another retrieval set"):
            NeighbourFile.open(tmp_path / "near", store=store)
        store.manifest[part] = before
    # of an exact index some versions wrote no setting, others an empty one
    before = {**store.manifest, "index": {"factory": "Flat", "search": ""}}
    same_set = {**store.manifest, "index": {"factory": "Flat"}}
    assert module.manifest_fingerprint(before) == module.manifest_fingerprint(same_set)


def test_the_cache_has_the_neighbours_of_a_live_search(store: MemoryStore) -> None:
    live, index = dense(store), CountingIndex(store.embeddings)
    cached = dense(store, index=index)
    cached.searcher = CachingSearcher(
        cached.searcher, store, cached._documents, per_chunk=8, stats=cached.stats
    )
    for _ in range(3):
        tokens, exclude = packed(store)
        unknown = torch.randint(1, 5000, (6, M))
        tokens = torch.cat([tokens, unknown], 1)
        for k in (2, 12):  # 12: more than are kept
            same(
                cached(tokens, num_neighbours=k, exclude_documents=exclude),
                live(tokens, num_neighbours=k, exclude_documents=exclude),
            )
        same(cached(tokens), live(tokens))
    own = torch.from_numpy(store.document_ids)[:, None]
    everything = torch.from_numpy(store.chunks.astype(np.int64))
    cached(everything, exclude_documents=own)
    index.calls.clear()
    same(cached(everything, exclude_documents=own), live(everything, exclude_documents=own))
    repeated = store.num_chunks - len(np.unique(store.find_chunks(store.chunks)))
    assert (
        sum(rows for rows, _ in index.calls) <= 2 * repeated
    )  # only the copy that another document holds first
    with pytest.raises(InputError, match="per_chunk"):
        CachingSearcher(live.searcher, store, live._documents, per_chunk=0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_not_missing(store: MemoryStore, tmp_path: Path) -> None:
    precompute(dense(store), store.chunks, store.document_ids, tmp_path / "near", per_chunk=4)
    (tmp_path / "near").chmod(0)
    with pytest.raises(PermissionError):
        NeighbourFile.open(tmp_path / "near")


def test_bad_input(store: MemoryStore, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="chunks must be"):
        precompute(dense(store), store.chunks[:, :-1], store.document_ids, tmp_path / "x")
    with pytest.raises(ValueError, match="chunks must be"):
        precompute(dense(store), store.chunks[0], store.document_ids, tmp_path / "x")
    with pytest.raises(ValueError, match="documents must be integers, not float64"):
        precompute(dense(store), store.chunks, store.document_ids + 0.5, tmp_path / "x")
    with pytest.raises(ValueError, match="chunks must be integers .* not float64"):
        precompute(dense(store), store.chunks + 0.5, store.document_ids, tmp_path / "x")
    with pytest.raises(InputError, match="per_chunk"):
        precompute(dense(store), store.chunks, store.document_ids, tmp_path / "x", per_chunk=0)
    assert not list(tmp_path.iterdir())


def test_only_neighbours_are_replaced(store: MemoryStore, tmp_path: Path) -> None:
    out = tmp_path / "near"
    arguments = dense(store), store.chunks, store.document_ids, out
    out.write_text("my text on retro_kernels neighbours")
    with pytest.raises(InputError, match="is there and holds no neighbours"):
        precompute(*arguments, per_chunk=4)
    assert out.read_text() == "my text on retro_kernels neighbours"
    out.write_bytes(b"")
    precompute(*arguments, per_chunk=4)
    content, ids = out.read_bytes(), NeighbourFile.open(out).ids
    for damaged in (content[:-9], content[:-9] + b"123456789"):
        out.write_bytes(damaged)
        precompute(*arguments, per_chunk=4)
        assert torch.equal(NeighbourFile.open(out).ids, ids)


def test_a_disk_that_fills_up_while_the_file_is_written(
    store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors says it in its own way."""
    live, out = dense(store), tmp_path / "near"
    save = module._save

    def with_room_for_1000_bytes(*args: Any) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            save(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_save", with_room_for_1000_bytes)
        with pytest.raises(OSError, match="File too large: '.*near'") as caught:
            precompute(live, store.chunks, store.document_ids, out)
    assert caught.value.errno == errno.EFBIG and [p.name for p in tmp_path.iterdir()] == ["near.partial"]
    searched = live.stats.queries
    precompute(live, store.chunks, store.document_ids, out)
    assert live.stats.queries == searched and NeighbourFile.open(out).num_rows


def test_a_file_that_names_chunks_beyond_the_set_is_refused(store: MemoryStore, tmp_path: Path) -> None:
    """Whoever made it, with a checksum that is right; on a GPU such a number would be the end of the process."""
    out = tmp_path / "near"
    precompute(dense(store), store.chunks, store.document_ids, out, per_chunk=4)
    table = NeighbourFile.open(out, store=store)
    arrays = {name: getattr(table, name) for name in module._ARRAYS}
    arrays["ids"][-1, -1] = store.num_chunks
    module._save(arrays, out, {**table.metadata, "checksum": module._checksum(arrays)})
    with pytest.raises(InputError, match="damaged: it names chunks that memory does not have"):
        NeighbourFile.open(out, store=store)


def test_arrays_that_do_not_fit_each_other_are_refused(store: MemoryStore, tmp_path: Path) -> None:
    out = tmp_path / "near"
    precompute(dense(store), store.chunks, store.document_ids, out, per_chunk=4)
    table = NeighbourFile.open(out)
    whole = {name: getattr(table, name) for name in module._ARRAYS}
    for damage in (
        {"hashes": whole["hashes"][:, None]},
        {"hashes": whole["hashes"][1:], "checks": whole["checks"][1:]},
        {"checks": whole["checks"][1:]},
        {"ids": whole["ids"][:, 0], "distances": whole["distances"][:, 0]},
        {"ids": whole["ids"][1:], "distances": whole["distances"][1:]},
        {"distances": whole["distances"][:, 1:]},
        {"ids": whole["ids"].int()},
        {"more": whole["ids"]},
    ):
        arrays = {name: array.clone().contiguous() for name, array in {**whole, **damage}.items()}
        module._save(arrays, out, {**table.metadata, "checksum": module._checksum(arrays)})
        with pytest.raises(InputError, match="damaged: (its arrays do not fit|it holds)"):
            NeighbourFile.open(out)
    for said in ({"format": "another"}, {"version": "2"}):
        module._save(whole, out, {**table.metadata, **said})
        with pytest.raises(InputError, match="no neighbours of format version 1"):
            NeighbourFile.open(out)


def test_a_file_is_on_the_disk_before_it_has_its_name(
    store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where it does not get there, nothing of it is left."""
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino) or fsync(file))
    out = tmp_path / "new folder" / "near"
    arguments = dense(store), store.chunks, store.document_ids, out
    # where temporary files go there may be too little room for what is as large as the file
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_disk)
        with pytest.raises(OSError, match="No space"):
            precompute(*arguments, per_chunk=4)
    assert [path.name for path in out.parent.iterdir()] == ["near.partial"]
    synced.clear()
    precompute(*arguments, per_chunk=4)
    assert out.stat().st_ino in synced


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_share_of_chunks_that_a_file_has(
    store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a sample, which is spread over all of them, and where its candidates are re-ranked."""
    n = store.num_chunks // 2
    precompute(dense(store), store.chunks[:n], store.document_ids[:n], tmp_path / "near", per_chunk=4)
    retriever = with_file(store, tmp_path / "near")
    found = retriever.searcher.table.rows(
        torch.from_numpy(store.chunks.astype(np.int64)), torch.from_numpy(store.document_ids)[:, None]
    )
    share = (found >= 0).double().mean().item()
    assert 0 < share < 1
    assert share_in_file(retriever, store.chunks, store.document_ids) == pytest.approx(share)
    assert share_in_file(dense(store), store.chunks, store.document_ids) is None
    retriever.searcher = Reranker(retriever.searcher, store, "edit")
    assert share_in_file(retriever, store.chunks, store.document_ids) == pytest.approx(share)
    monkeypatch.setattr(module, "_SAMPLE", 10)
    assert share_in_file(retriever, store.chunks, store.document_ids) == pytest.approx(0.5, abs=0.11)


def test_what_is_reused_is_counted_once(store: MemoryStore) -> None:
    """Also where what a cache learnt was not enough."""
    retriever = dense(store)
    stats = retriever.stats
    cache = CachingSearcher(retriever.searcher, store, retriever._documents, per_chunk=2, stats=stats)
    row = store.document_chunks(5).start
    query, own = torch.from_numpy(store.chunks[[row]].astype(np.int64)), torch.tensor([[5]])
    cache.search(query, 2, own)
    assert stats.reused == 0
    cache.search(query, 2, own)
    assert stats.reused == 1
    cache.search(query, 2, torch.tensor([[-1, 5]]))  # as rows of fewer documents are filled up
    assert stats.reused == 2
    unknown, none = query.flip(1), torch.tensor([[-1]])
    live = retriever.searcher.search(unknown, 2, none)
    assert all(map(torch.equal, cache.search(unknown, 2, none), live)) and stats.reused == 2
    row = store.document_chunks(7).start
    query, own = torch.from_numpy(store.chunks[[row]].astype(np.int64)), torch.tensor([[7]])
    near = retriever.searcher.search(query, 2, own)[1]
    cache.search(query, 2, torch.cat([own, retriever.documents(near)], 1))
    assert stats.reused == 2


def test_what_is_no_chunk_is_searched_as_it_is(store: MemoryStore) -> None:
    live: Any = SimpleNamespace(search=lambda *given: given)
    cache = CachingSearcher(live, store, dense(store)._documents)
    own = torch.from_numpy(store.document_ids[:3])[:, None]
    short = torch.from_numpy(store.chunks[:3, 1:].astype(np.int64))
    assert cache.search(short, 2, own) == (short, 2, own)


def test_no_more_places_are_kept_than_there_are_chunks(store: MemoryStore, tmp_path: Path) -> None:
    result = precompute(dense(store), store.chunks, store.document_ids, tmp_path / "near", per_chunk=10**15)
    assert result["per_chunk"] == NeighbourFile.open(tmp_path / "near").per_chunk == store.num_chunks
    live, kept = dense(store), with_file(store, tmp_path / "near")
    tokens, exclude = packed(store)
    same(
        kept(tokens, num_neighbours=store.num_chunks + 2, exclude_documents=exclude),
        live(tokens, num_neighbours=store.num_chunks + 2, exclude_documents=exclude),
    )
