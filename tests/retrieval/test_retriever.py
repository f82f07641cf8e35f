"""The retriever against sorting all chunks: exclusion, widening, missing neighbours, keys, text search."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from retrieval.sets import (
    VOCAB,
    BagEmbedder,
    CountingIndex,
    Largest,
    M,
    MemoryStore,
    dense,
    expected,
    make_documents,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from retro_kernels.config import InputError
from retro_kernels.retrieval import search
from retro_kernels.retrieval.build import build_retrieval_set
from retro_kernels.retrieval.index import exact_search
from retro_kernels.retrieval.leakage import containment
from retro_kernels.retrieval.retriever import Retriever
from retro_kernels.retrieval.search import (
    DenseSearcher,
    DeviceStore,
    DocumentTable,
    RandomSearcher,
    mixed,
    row_hashes,
    scan_exact,
    search_excluding,
    settle_ties,
    take_first,
)
from retro_kernels.retrieval.store import _mixed, hash_chunks


def sequences(store: MemoryStore, b: int, chunks: int) -> tuple[Tensor, Tensor]:
    """Sequences of the set's own chunks, and all documents in them."""
    picked = torch.randint(store.num_chunks, (b, chunks))
    tokens = torch.from_numpy(store.chunks[picked.numpy()].astype(np.int64)).reshape(b, chunks * M)
    return tokens, torch.from_numpy(store.document_ids[picked.numpy()])


def test_neighbours_are_those_of_sorting_everything(seed: int) -> None:
    embedder = BagEmbedder()
    store = MemoryStore(make_documents(50, shared=False), embedder)
    tokens, exclude = sequences(store, 3, 4)
    retriever = dense(store, embedder=embedder)
    got = retriever(tokens, num_neighbours=5, exclude_documents=exclude)
    keys = torch.from_numpy(store.embeddings[store.find_chunks(tokens.reshape(-1, M))].astype(np.float32))
    ids, distances = expected(store, keys, 5, exclude.repeat_interleave(4, dim=0))
    assert got.ids.reshape(-1, 5).tolist() == ids
    torch.testing.assert_close(
        got.distances.reshape(-1, 5).double(), torch.tensor(distances).double(), rtol=1e-4, atol=1e-4
    )
    assert (
        got.tokens.shape == (3, 4, 5, 2 * M)
        and got.tokens.dtype == torch.int64
        and got.lengths.dtype == torch.int32
    )
    documents = retriever.documents(got.ids)
    assert not (documents[..., None] == exclude[:, None, None, :]).any()
    assert embedder.texts == store.num_chunks  # every key was looked up


def test_the_continuation_never_crosses_a_document(seed: int) -> None:
    store = MemoryStore(make_documents(40), BagEmbedder())
    tokens, _ = sequences(store, 2, 3)
    got = dense(store)(tokens, num_neighbours=4)
    for i, row, length in zip(
        got.ids.flatten().tolist(), got.tokens.reshape(-1, 2 * M), got.lengths.flatten(), strict=True
    ):
        whole = store.chunks[i].tolist()
        last = i + 1 == store.num_chunks or store.document_ids[i + 1] != store.document_ids[i]
        whole += [0] * M if last else store.chunks[i + 1].tolist()
        assert row.tolist() == whole and length == sum(t != 0 for t in whole)


def test_a_book_of_100_000_chunks_queried_by_its_own_chunks(seed: int) -> None:
    book, others, dim = 100_000, 60, 8
    generator = np.random.default_rng(seed)
    embeddings = generator.standard_normal((book + others, dim)).astype(np.float16)
    embeddings[book:] += 3  # everything else is farther away than the book
    chunks = generator.integers(1, VOCAB, size=(book + others, M)).astype(np.uint16)
    store = MemoryStore.of_arrays(chunks, np.r_[np.zeros(book), np.arange(1, others + 1)], embeddings)
    index = CountingIndex(store.embeddings)
    retriever = dense(store, index=index)
    own = torch.from_numpy(chunks[generator.integers(0, book, 3)].astype(np.int64))
    mixed_batch = torch.cat([own, torch.from_numpy(chunks[-2:].astype(np.int64))]).reshape(1, -1)
    got = retriever(mixed_batch, num_neighbours=2, exclude_documents=torch.tensor([[0, -1]]))
    ids, _ = expected(
        store,
        torch.from_numpy(store.embeddings[store.find_chunks(mixed_batch.reshape(-1, M))].astype("f4")),
        2,
        torch.zeros(5, 1),
    )
    assert got.ids[0].tolist() == ids
    assert (got.ids >= book).all()
    fetches = [k for _, k in index.calls]
    assert fetches == sorted(fetches) and len(fetches) > 2  # widened step by step …
    assert all(rows <= 3 for rows, _ in index.calls[1:])  # … for the rows which ran short alone
    assert retriever.stats.widened == 3 and retriever.stats.scanned == 3


@pytest.mark.parametrize("case", ["k beyond the set", "everything excluded", "all but one excluded"])
def test_what_cannot_be_filled_is_missing_all_the_way(seed: int, case: str) -> None:
    store = MemoryStore(make_documents(4, longest=30), BagEmbedder())
    tokens, _ = sequences(store, 1, 2)
    banned = {
        "k beyond the set": [-1],
        "everything excluded": [0, 1, 2, 3],
        "all but one excluded": [0, 3, 1],
    }[case]
    k = store.num_chunks + 3
    got = dense(store)(tokens, num_neighbours=k, exclude_documents=torch.tensor([banned]))
    left = int((~np.isin(store.document_ids, banned)).sum())
    for j in range(2):
        assert (
            sorted(got.ids[0, j, :left].tolist())
            == np.flatnonzero(~np.isin(store.document_ids, banned)).tolist()
        )
    assert (got.ids[0, :, left:] == -1).all() and got.distances[0, :, left:].isinf().all()
    assert (got.lengths[0, :, left:] == 0).all() and (got.tokens[0, :, left:] == 0).all()
    assert (got.lengths[0, :, :left] > 0).all() and got.distances[0, :, :left].isfinite().all()


class Sloppy:
    """An approximate index: finds only a third of the vectors, and ends with −1 like FAISS."""

    def __init__(self, store: MemoryStore) -> None:
        self.index, self.size = CountingIndex(store.embeddings), store.num_chunks

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        distances, ids = self.index.search(queries, self.size)
        distances, ids = take_first(distances, ids, ids % 3 == 0, k)
        return distances, ids


def test_rows_that_an_approximate_index_leaves_short_are_compared_with_everything(seed: int) -> None:
    store = MemoryStore(make_documents(30), BagEmbedder())
    tokens, exclude = sequences(store, 2, 3)
    k = store.num_chunks - 10
    retriever = dense(store, index=Sloppy(store))
    got = retriever(tokens, num_neighbours=k, exclude_documents=exclude)
    allowed = store.num_chunks - np.array([np.isin(store.document_ids, e).sum() for e in exclude.numpy()])
    assert torch.equal((got.ids >= 0).sum(-1), torch.from_numpy(np.minimum(allowed, k))[:, None].expand(2, 3))
    documents = retriever.documents(got.ids)
    assert not ((documents[..., None] == exclude[:, None, None, :]) & (got.ids >= 0)[..., None]).any()
    assert (retriever(tokens, num_neighbours=k).ids >= 0).all()


@pytest.mark.parametrize("limit", [0, 7])
def test_widening_ends_with_what_is_sought(seed: int, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """From a first fetch that is hardly ever enough, with documents named twice or not there. limit: what the index
    finds at most, beyond which all are compared."""
    monkeypatch.setattr("retro_kernels.retrieval.search._FIRST_FETCH", 1)
    monkeypatch.setattr("retro_kernels.retrieval.search._GROWTH", 2)
    rng = np.random.default_rng(seed)
    for most_wanted in (2, 30) * 20:
        table = DocumentTable(np.sort(rng.integers(0, 6, 60)), 6)
        exclude, k = torch.randint(-1, 9, (8, 5)), int(torch.randint(1, most_wanted, ()))
        everything = torch.rand(8, 60).sort(dim=1)
        most = limit or table.num_chunks

        def candidates(rows: Tensor | None, fetch: int, found: Any = everything, most: int = most) -> Any:
            assert fetch <= most
            return tuple(x[slice(None) if rows is None else rows, :fetch] for x in found)

        def scan(rows: Tensor, k: int, found: Any = everything, kept: Any = (table, exclude)) -> Any:
            distances, ids = (x[rows] for x in found)
            return take_first(distances, ids, kept[0].allowed(ids, kept[1][rows]), k)

        got = search_excluding(
            candidates, table, 8, k, exclude, scan=scan if limit else None, max_fetch=limit or 2048
        )
        for found, sought in zip(got, scan(torch.arange(8), k), strict=True):
            assert torch.equal(found, sought)
        gone = torch.stack([torch.isin(table.document_ids, row).sum() for row in exclude])
        assert torch.equal(table.num_excluded(exclude), gone)


def test_rank_zero_is_not_taken_for_the_chunk_itself(seed: int) -> None:
    # the same text in two documents: only what is excluded may go
    text = list(range(1, 2 * M + 1))
    store = MemoryStore([text, text, *make_documents(5, shared=False)], BagEmbedder())
    tokens = torch.tensor([text[:M]])
    got = dense(store)(tokens, num_neighbours=2, exclude_documents=torch.tensor([[1]]))
    assert got.ids[0, 0, 0] == 0 and got.distances[0, 0, 0] == 0
    got = dense(store)(tokens, num_neighbours=2)
    assert sorted(got.ids[0, 0].tolist()) == [0, 2]


def test_unknown_chunks_are_embedded_as_the_set_was(seed: int) -> None:
    embedder = BagEmbedder()
    store = MemoryStore(make_documents(30, shared=False), embedder)
    built = embedder.texts
    known = store.chunks[:2].astype(np.int64)
    shuffled = known[:, ::-1].copy()  # the same bag, another order (short chunks: pads in front)
    tokens = torch.from_numpy(np.concatenate([known, shuffled])).reshape(1, -1)
    retriever = dense(store, embedder=embedder)
    got = retriever(tokens, num_neighbours=3)
    asymmetric = len({tuple(r) for r in shuffled.tolist()} - {tuple(r) for r in store.chunks.tolist()})
    assert embedder.texts - built == asymmetric == retriever.stats.embedded
    assert torch.equal(got.ids[:, :2], got.ids[:, 2:])
    # in the precision of the keys
    made = retriever.searcher.embed(tokens.view(-1, M))
    assert torch.equal(made, made.half().float()) and made.any()
    torch.testing.assert_close(got.distances[:, :2], got.distances[:, 2:], rtol=1e-3, atol=1e-3)


def test_unknown_chunks_get_nothing_where_the_embedder_is_switched_off(seed: int) -> None:
    store = MemoryStore(make_documents(30, shared=False), BagEmbedder())
    retriever = dense(store)
    retriever.searcher.embed_unknown = False
    tokens = torch.cat([torch.from_numpy(store.chunks[4].astype(np.int64)), torch.full((M,), VOCAB - 1)])[
        None
    ]
    got = retriever(tokens, num_neighbours=2)
    assert got.ids[0, 0, 0] == 4 and (got.ids[0, 1] == -1).all() and got.distances[0, 1].isinf().all()


def test_padding_is_not_searched(seed: int) -> None:
    store = MemoryStore(make_documents(30), BagEmbedder())
    index = CountingIndex(store.embeddings)
    retriever = dense(store, index=index)
    tokens, _ = sequences(store, 2, 3)
    tokens[0, M:] = 0
    got = retriever(tokens, num_neighbours=2)
    assert (got.lengths[0, 1:] == 0).all() and (got.ids[0, 1:] == -1).all() and (got.lengths[1] > 0).all()
    assert sum(rows for rows, _ in index.calls) == 4 and retriever.stats.padding == 2
    # what is excluded is that of the chunks that are left
    exclude = retriever.documents(got.ids[:, 0])
    excluded = dense(store)(tokens, num_neighbours=2, exclude_documents=exclude)
    for row in range(2):
        one = dense(store)(tokens[row, None], num_neighbours=2, exclude_documents=exclude[row, None])
        assert torch.equal(excluded.ids[row], one.ids[0])
    assert not (retriever.documents(excluded.ids[:, 0]) == exclude[:, :1]).any()
    alone = retriever(torch.zeros(1, M, dtype=torch.int64), num_neighbours=2)
    assert (alone.ids == -1).all() and len(index.calls) == 1


def test_copies_come_in_the_order_of_their_ids(seed: int) -> None:
    distances = torch.tensor(
        [
            [0.5, 1.0, 1.0, 1.0, 2.0, torch.inf],
            [1.0, 2.0, 3.0, 4.0, torch.inf, torch.inf],
            [1.0, 1.0, 2.0, 2.0, torch.inf, torch.inf],
        ]
    )
    ids = torch.tensor([[9, 7, 2, 5, 1, -1], [4, 3, 2, 1, -1, -1], [8, 3, 1, 0, -1, -1]])
    d, i = settle_ties(distances, ids)
    assert i.tolist() == [[9, 2, 5, 7, 1, -1], [4, 3, 2, 1, -1, -1], [3, 8, 0, 1, -1, -1]] and torch.equal(
        d, distances
    )
    assert settle_ties(distances[:, 1:3], ids[:, 1:3])[1].tolist() == [[2, 7], [3, 2], [3, 1]]
    text = list(range(1, M + 1))
    store = MemoryStore([text] * 20 + make_documents(10, shared=False), BagEmbedder())
    for rows in (1, 64):  # FAISS searches few and many queries differently
        got = dense(store)(
            torch.tensor([text * rows]), num_neighbours=5, exclude_documents=torch.tensor([[2, 0]])
        )
        assert got.ids[0].tolist() == [[1, 3, 4, 5, 6]] * rows


@pytest.mark.parametrize("n", [0, 1, M - 1, M, 3 * M + 5])
def test_a_rest_shorter_than_a_chunk_is_left_out(seed: int, n: int) -> None:
    store = MemoryStore(make_documents(10), BagEmbedder())
    tokens = torch.randint(1, 60, (2, n))
    got = dense(store)(tokens, num_neighbours=3)
    assert got.tokens.shape == (2, n // M, 3, 2 * M) and got.lengths.shape == got.ids.shape == (2, n // M, 3)
    whole = dense(store)(tokens[:, : n // M * M], num_neighbours=3)
    assert torch.equal(got.tokens, whole.tokens)


def test_near_copies_can_be_dropped(seed: int) -> None:
    text = torch.randint(1, VOCAB, (6 * M,)).tolist()
    # shifted by one and two tokens, so that they are nearer than what is unlike
    store = MemoryStore([text[M - 1 :], text[M - 2 :], *make_documents(25, shared=False)], BagEmbedder())
    tokens = torch.tensor([text[: 4 * M]])
    plain, filtered = (
        dense(store)(tokens, num_neighbours=4),
        dense(store, drop_copies=0.5)(tokens, num_neighbours=4),
    )
    copies = containment(tokens.reshape(-1, M), plain.tokens.reshape(-1, 4, 2 * M)) >= 0.5
    assert copies.any()
    chunks, values = tokens.reshape(-1, M), filtered.tokens.reshape(-1, 4, 2 * M)
    assert (containment(chunks, values) < 0.5).all() and (filtered.ids >= 0).all()
    # what is kept for later has them
    kept = dense(store, drop_copies=0.5).search(chunks, 4, keep_copies=True)
    assert torch.equal(kept[1], plain.ids.view(-1, 4))
    # whoever holds all of a chunk holds "this share or more"
    whole = dense(store, drop_copies=1.0)(tokens, num_neighbours=4)
    most = [containment(chunks, found.tokens.view(-1, 4, 2 * M)).max() for found in (plain, whole)]
    assert most[0] == 1 > most[1]
    everywhere = MemoryStore([text[:M]] * 3, BagEmbedder())
    assert (dense(everywhere, drop_copies=0.5)(tokens[:, :M], num_neighbours=2).ids == -1).all()
    for share in (0, 1.5):
        with pytest.raises(InputError, match="drop_copies"):
            dense(store, drop_copies=share)


@pytest.mark.parametrize("tied", [True, False])
def test_near_copies_are_tested_once_and_some_at_a_time(
    seed: int, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    text = torch.randint(1, VOCAB, (M,)).tolist()
    # tied, which a wider fetch may order anew; or in another order than their ids, with two others among them
    copies = [[*text, 100 + i, *text[: i % M]] if tied else [100 + i, *text] for i in range(150)]
    others = [] if tied else [text[::-1]] * 2
    store = MemoryStore([*copies, *others, *make_documents(30)], BagEmbedder())
    tokens = torch.tensor([text * 2, torch.randint(1, 60, (2 * M,)).tolist()])
    exclude = torch.tensor([[3], [-1]])
    everything = dense(store)(tokens, num_neighbours=store.num_chunks, exclude_documents=exclude)
    values, lengths, ids, distances = (x.flatten(0, 1) for x in everything)
    keep = (containment(tokens.reshape(-1, M), values, value_lengths=lengths) < 0.8) & (ids >= 0)
    distances, ids = take_first(distances, ids, keep, 3)
    monkeypatch.setattr("retro_kernels.retrieval.retriever._ELEMENTS", 40 * 2 * M)
    retriever = dense(store, drop_copies=0.8)
    gather, gathered = retriever.gather, list[int]()

    def watched(ids: Tensor) -> tuple[Tensor, Tensor]:
        gathered.append(ids.numel())
        return gather(ids)

    monkeypatch.setattr(retriever, "gather", watched)
    got = retriever(tokens, num_neighbours=3, exclude_documents=exclude)
    assert torch.equal(got.distances.flatten(0, 1), distances) and torch.equal(got.ids.flatten(0, 1), ids)
    *tested, results = gathered
    assert max(tested) <= 40 and sum(tested) <= 2 * store.num_chunks + 2 * 48 and results == 12


def test_random_is_a_repeatable_control(seed: int) -> None:
    store = MemoryStore(make_documents(40), BagEmbedder())
    documents = DocumentTable(store.document_ids, store.num_documents)
    queries, exclude = torch.randint(1, 60, (20, M)), torch.randint(0, 40, (20, 3))
    distances, ids = RandomSearcher(documents, seed=3).search(queries, 6, exclude)
    again = RandomSearcher(documents, seed=3).search(queries[5:9], 6, exclude[5:9])[1]
    assert torch.equal(ids[5:9], again) and not torch.equal(
        ids, RandomSearcher(documents, seed=4).search(queries, 6, exclude)[1]
    )
    assert all(len(set(row)) == 6 for row in ids.tolist()) and (distances == 0).all()
    assert not (documents.of(ids)[..., None] == exclude[:, None]).any()
    _, everything = RandomSearcher(documents).search(queries, store.num_chunks + 1)
    assert [sorted(row) for row in everything.tolist()] == [[-1, *range(store.num_chunks)]] * 20
    assert len({(b - a) % store.num_chunks for a, b, *_ in everything.tolist()}) > 1
    _, firsts = RandomSearcher(documents).search(torch.randint(1, 60, (50 * store.num_chunks, M)), 1)
    assert {*firsts[:, 0].tolist()} == {*range(store.num_chunks)}
    assert (
        abs(ids.double().mean() / store.num_chunks - 0.5) < 0.15
    )  # 120 draws: 0.026 is one standard deviation
    book = DocumentTable(np.repeat([0, 1], [3000, 5]), 2)
    assert (RandomSearcher(book).search(queries, 4, torch.zeros(20, 1, dtype=torch.int64))[1] >= 3000).all()


def test_search_text(seed: int) -> None:
    store = MemoryStore(make_documents(20, shared=False), BagEmbedder())
    retriever = dense(store)
    chunk = next(i for i in range(store.num_chunks) if store.continuation[i])
    text = store.texts([chunk])[0]
    hits = retriever.search_text(text, k=3)
    assert [hit.distance for hit in hits] == sorted(hit.distance for hit in hits)
    assert (
        hits[0].text == text
        and hits[0].chunk == chunk
        and hits[0].continuation == store.texts([chunk + 1])[0]
    )
    assert hits[0].title == f"document {hits[0].document}" and hits[0].document == store.document_ids[chunk]
    both = retriever.search_text([text, "1 2 3 4 5 6 7 8 9 10 11 12"], k=3)  # longer than a chunk
    assert both[0][0].chunk == chunk and len(both[1]) == 3
    assert len(retriever.search_text(text, k=store.num_chunks + 5)) == store.num_chunks
    for bad in ("", " \n", ["1", ""]):
        with pytest.raises(InputError, match="empty"):
            retriever.search_text(bad)
    for bad in (None, b"1 2", [1], 3):
        with pytest.raises(TypeError, match="search_text: text must be a str or a list of them, not"):
            retriever.search_text(bad)


def test_documents_titles_and_hashes(seed: int) -> None:
    store = MemoryStore(make_documents(9), BagEmbedder())
    retriever = dense(store)
    ids = torch.tensor([[0, -1], [store.num_chunks - 1, -1]])
    assert retriever.documents(ids).tolist() == [[0, -1], [8, -1]]
    last = torch.zeros(store.num_chunks, dtype=torch.int64)
    last[-1] = store.num_chunks - 1
    for dtype in (torch.uint8, torch.int16, torch.uint16, torch.int32):
        assert retriever.documents(last.to(dtype)).tolist() == [0] * (len(last) - 1) + [8]
    assert retriever.titles(retriever.documents(ids)) == ["document 0", "", "document 8", ""]
    for bad in (-2, store.num_chunks):
        with pytest.raises(InputError, match=f"no chunk {bad}: the set has chunks 0 to"):
            retriever.documents(torch.tensor([0, bad, -1]))
    assert retriever.documents(torch.empty(0, 2, dtype=torch.int64)).shape == (0, 2)
    for bad in ([1], np.array([1]), 1):
        with pytest.raises(TypeError, match="ids must be a tensor of integers of any shape"):
            retriever.documents(bad)
    for bad in (torch.tensor([0.5]), torch.tensor([True]), torch.tensor([1j])):
        with pytest.raises(ValueError, match="ids must be integers, not torch"):
            retriever.documents(bad)
    assert retriever.find_documents([7, 2007, 8]).tolist() == [0, 2, -1]
    assert (retriever.num_chunks, retriever.num_documents) == (store.num_chunks, 9)


def test_bad_input(seed: int) -> None:
    retriever = dense(MemoryStore(make_documents(5), BagEmbedder()))
    tokens = torch.ones(2, M, dtype=torch.int64)
    for bad in (tokens[0], tokens.float(), tokens.bool(), tokens.cfloat()):
        with pytest.raises(ValueError, match=r"integers \[B, N\]"):
            retriever(bad)
    for bad in (tokens.tolist(), tokens.numpy()):
        with pytest.raises(TypeError, match=r"tokens must be a tensor .*as_tensor"):
            retriever(bad)
        with pytest.raises(TypeError, match="exclude_documents must be a tensor"):
            retriever(tokens, exclude_documents=bad)
    for k in (0, -1, 2.0, True, "2", None):
        with pytest.raises(InputError, match="num_neighbours"):
            retriever(tokens, num_neighbours=k)
        with pytest.raises(InputError, match="search_text: k is"):
            retriever.search_text("1 2", k)
    for k in (np.int64(2), np.uint8(2), torch.tensor(2)):
        assert torch.equal(retriever(tokens, num_neighbours=k).ids, retriever(tokens).ids)
        assert retriever.search_text("1 2", k) == retriever.search_text("1 2")
    for bad in (torch.zeros(2), torch.zeros(3, 1, dtype=torch.int64), torch.zeros(2, 1)):
        with pytest.raises(ValueError, match="exclude_documents"):
            retriever(tokens, exclude_documents=bad)
    for bad in (-1, VOCAB):
        with pytest.raises(InputError, match=f"token id {bad} .*the set's own tokenizer"):
            retriever(tokens * bad)
    retriever.check_tokenizer("f" * 64)
    with pytest.raises(InputError, match="another tokenizer"):
        retriever.check_tokenizer("0" * 64)


@pytest.mark.parametrize("retriever", ["dense", "random", "bm25:tokens", "dense+bm25", "dense+edit"])
def test_defaults_of_torch_change_nothing(seed: int, tmp_path: Path, retriever: str) -> None:
    """Of the user's model: a dtype, and a device, on which nothing of what lies on the host may be made."""
    text = "\n\n".join(" ".join(random.choices(["ka", "lo", "mi", "ter", "su"], k=200)) for _ in range(3))
    (tmp_path / "a.txt").write_text(text)
    build_retrieval_set(tmp_path / "a.txt", tmp_path / "set", embedder="hashing:32")

    def found() -> Any:
        opened = Retriever.from_pretrained(tmp_path / "set", device="cpu", retriever=retriever)
        return opened.search_text("ka lo mi", 2), opened(tokens, num_neighbours=3)

    @contextlib.contextmanager
    def double() -> Iterator[None]:
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)

    tokens = torch.randint(5, 250, (2, 130))
    hits, wanted = found()
    for default in (double(), torch.device("meta")):
        with default:
            again, given = found()
        assert again == hits
        for one, same in zip(given, wanted, strict=True):
            assert one.dtype == same.dtype and torch.equal(one, same)


def test_compiled_a_step_runs_it_as_it_is(seed: int) -> None:
    store = MemoryStore(make_documents(20), embedder := BagEmbedder())
    retriever, (tokens, _) = dense(store, embedder=embedder), sequences(store, 2, 3)
    step = torch.compile(lambda x: retriever(x + 0, num_neighbours=2).tokens + 1, backend="eager")
    assert torch.equal(step(tokens), retriever(tokens, num_neighbours=2).tokens + 1)


def test_an_empty_exclusion_excludes_nothing(seed: int) -> None:
    store = MemoryStore(make_documents(15), BagEmbedder())
    tokens, _ = sequences(store, 2, 2)
    a, b = dense(store)(tokens), dense(store)(tokens, exclude_documents=torch.zeros(2, 0, dtype=torch.int64))
    assert torch.equal(a.ids, b.ids)


def test_times_and_counts_are_kept(seed: int) -> None:
    retriever = dense(MemoryStore(make_documents(30, shared=False), BagEmbedder()))
    retriever(torch.randint(1, VOCAB, (2, 3 * M)))
    stats = retriever.stats.to_dict()
    assert stats["queries"] == stats["embedded"] == 6 and stats["looked_up"] == 0 and stats["calls"] == 1
    assert all(stats[f"{stage}_seconds"] > 0 for stage in ("lookup", "embed", "search", "filter", "gather"))
    retriever.stats.reset()
    assert retriever.stats.queries == 0 and sum(retriever.stats.seconds.values()) == 0


def test_hashes_on_tensors_are_those_of_the_store(seed: int) -> None:
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (50, 64)).astype(np.uint16)
    assert np.array_equal(
        row_hashes(torch.from_numpy(tokens.astype(np.int64))).numpy().view(np.uint64), hash_chunks(tokens)
    )
    x = np.random.default_rng(seed).integers(0, 2**64, 1000, dtype=np.uint64)
    assert np.array_equal(mixed(torch.from_numpy(x.view(np.int64))).numpy().view(np.uint64), _mixed(x))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_chunks_are_found_in_a_set_held_on_a_device(
    seed: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "_SCAN_ROWS", 7)
    hashed, usual = [], search.row_hashes
    monkeypatch.setattr(search, "row_hashes", lambda tokens: hashed.append(len(tokens)) or usual(tokens))
    chunks = MemoryStore(make_documents(30), BagEmbedder()).chunks
    chunks[5:9] += 1 << 15  # of a vocabulary as large as two bytes hold
    store = MemoryStore.of_arrays(
        np.r_[chunks, chunks[:9]], np.arange(len(chunks) + 9), np.zeros((len(chunks) + 9, 1))
    )
    queries = torch.cat([torch.from_numpy(store.chunks.astype(np.int64)), torch.randint(1, 60, (9, M))])
    held = DeviceStore(store, device)
    assert max(hashed) == 7, "the set's tokens in 64 bits may not fit the device"
    found = held.find_chunks(queries.to(device)).cpu()
    assert found.tolist() == store.find_chunks(queries).tolist()
    assert (found[: store.num_chunks] >= 0).all()


def test_scan_is_exact_over_several_blocks(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retro_kernels.retrieval.search._SCAN_ROWS", 7)
    store = MemoryStore(make_documents(30), BagEmbedder())
    keys, exclude = torch.randn(4, 16), torch.randint(0, 30, (4, 2))
    table = DocumentTable(store.document_ids, 30)
    distances, ids = scan_exact(keys, store.embeddings, table, exclude, 9)
    want, want_distances = expected(store, keys, 9, exclude)
    torch.testing.assert_close(
        distances.double(), torch.tensor(want_distances).double(), rtol=1e-4, atol=1e-4
    )
    assert [set(a) for a in ids.tolist()] == [set(b) for b in want]
    # nothing is nearer than the chunk itself, and what is excluded is not there when nothing else is left
    distances, ids = scan_exact(
        torch.from_numpy(store.embeddings.astype("f4")), store.embeddings, table, None, 1
    )
    assert distances.min() >= 0
    distances, ids = scan_exact(keys, store.embeddings, table, exclude, store.num_chunks)
    left = store.num_chunks - table.num_excluded(exclude)
    assert torch.equal((ids >= 0).sum(1), left) and torch.equal(ids < 0, distances.isinf())
    products = scan_exact(keys, store.embeddings, table, None, 3, inner_product=True)
    want = (keys @ torch.from_numpy(store.embeddings.astype("f4")).T).topk(3)
    torch.testing.assert_close(-products[0], want.values, rtol=1e-4, atol=1e-4)


def test_tokens_that_a_gpu_does_not_hold_are_pinned(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fakes: where there is room, and a build that reads them in place."""
    from retro_kernels.retrieval import retriever as module

    store, device = MemoryStore(make_documents(30), BagEmbedder()), torch.device("cuda", 0)
    table, given = DocumentTable(store.document_ids, 30), []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: given.append("pinned") or self)
    monkeypatch.setattr(
        module, "gather_neighbours", lambda tokens, ids, continuation: given.append((tokens, continuation))
    )

    def source(free: int, with_cuda: bool) -> tuple[Any, Any]:
        monkeypatch.setattr(module, "_free_memory", lambda: free)
        monkeypatch.setattr(module, "WITH_CUDA", with_cuda)
        given.clear()
        made = Retriever(store, SimpleNamespace(), documents=table, device=device)
        made.gather(SimpleNamespace(device=device))
        return given[-1]

    size = store.chunks.nbytes
    chunks, continuation = source(3 * size, True)
    assert given[:-1] == ["pinned", "pinned"] and isinstance(chunks, Tensor)
    assert np.array_equal(chunks.numpy(), store.chunks) and chunks.data_ptr() != store.chunks.ctypes.data
    assert np.array_equal(continuation.numpy(), store.continuation)
    for free, with_cuda in ((3 * size - 1, True), (10 * size, False)):
        assert source(free, with_cuda)[0] is store.chunks
    assert module._free_memory() > 0 or not Path("/proc/meminfo").exists()


@pytest.mark.parametrize(
    ("on_host", "most", "first"), [(False, 2048, 2 + 2 * 100), (True, 2048, 64), (False, 201, 64)]
)
def test_no_more_is_fetched_from_a_host_than_there(seed: int, on_host: bool, most: int, first: int) -> None:
    """On a GPU the first fetch is so large that nothing has to be waited for, if an index finds so many; a host is
    waited for in any case."""
    table = DocumentTable(np.arange(1000) // 100, 10)
    on_gpu = SimpleNamespace(
        document_ids=SimpleNamespace(is_cuda=True),
        num_chunks=table.num_chunks,
        longest=table.longest,
        allowed=table.allowed,
        num_excluded=table.num_excluded,
    )
    asked = []

    def candidates(rows: Tensor | None, fetch: int) -> tuple[Tensor, Tensor]:
        asked.append(fetch)
        return torch.zeros(1, fetch), torch.randperm(1000)[None, :fetch]

    exclude = torch.tensor([[3, 4]])
    search_excluding(candidates, on_gpu, 1, 2, exclude, scan=None, max_fetch=most, waits=on_host)  # type: ignore[arg-type]
    assert asked[0] == first


def test_no_more_is_fetched_than_the_index_finds(seed: int) -> None:
    """Rows that are short then are compared with everything."""
    store = MemoryStore([list(range(1, 60)) * 40, *make_documents(30)], BagEmbedder())
    index = CountingIndex(store.embeddings)
    index.most = 5  # type: ignore[attr-defined]
    tokens = torch.from_numpy(store.chunks[:1].astype(np.int64))
    exclude = torch.tensor([[0]])
    got = dense(store, index=index)(tokens, num_neighbours=3, exclude_documents=exclude)
    assert {k for _, k in index.calls} == {5}
    assert torch.equal(got.ids, dense(store)(tokens, num_neighbours=3, exclude_documents=exclude).ids)


@pytest.mark.parametrize("inner_product", [False, True])
def test_within_autocast_a_search_is_as_exact(seed: int, inner_product: bool) -> None:
    """As in a training step, whose products need not be."""
    store = MemoryStore(make_documents(30), BagEmbedder())
    keys, table = torch.randn(4, 16), DocumentTable(store.document_ids, 30)

    def found() -> list[Tensor]:
        scanned = scan_exact(keys, store.embeddings, table, None, 9, inner_product=inner_product)
        return [*scanned, *exact_search(store.embeddings, keys, 9)]

    wanted = found()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, found(), wanted))


def test_scan_of_many_rows_takes_no_more_memory(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retro_kernels.retrieval.search._SCAN_ROWS", 500)
    monkeypatch.setattr("retro_kernels.retrieval.search._SCAN_QUERIES", 32)
    store = MemoryStore.of_arrays(
        np.random.default_rng(seed).integers(1, VOCAB, (1200, M)).astype(np.uint16),
        np.arange(1200) // 100,
        BagEmbedder(),
    )
    table = DocumentTable(store.document_ids, store.num_documents)
    keys, exclude = torch.randn(600, 16), torch.randint(-1, 12, (600, 3))
    with Largest() as largest:
        distances, ids = scan_exact(keys, store.embeddings, table, exclude, 3)
    assert largest.elements <= 32 * 500
    whole = (keys[:, None].double() - torch.from_numpy(store.embeddings.astype("f8"))).square().sum(-1)
    banned = (torch.from_numpy(store.document_ids) == exclude[..., None]).any(1)
    want = whole.masked_fill(banned, torch.inf).topk(3, largest=False)
    torch.testing.assert_close(distances.double(), want.values, rtol=1e-4, atol=1e-4)
    assert not (table.of(ids)[..., None] == exclude[:, None]).any()
    torch.testing.assert_close(whole.gather(1, ids), want.values, rtol=1e-4, atol=1e-4)


class Operations(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("many", [2, 33, 3000])
def test_many_documents_are_excluded_without_one_operation_for_each(seed: int, many: int) -> None:
    store = MemoryStore(make_documents(300), BagEmbedder())
    table = DocumentTable(store.document_ids, store.num_documents)
    exclude = torch.randint(-1, 400, (5, many)) if many > 300 else torch.randint(-1, 300, (5, many))
    exclude[exclude % 7 == 3] = -1  # of 3,000 there would be none left
    keys, ids = torch.randn(5, 16), torch.randint(-1, store.num_chunks, (20, 5)).T
    with Operations() as operations:
        keep = table.allowed(ids, exclude)
        distances, found = scan_exact(keys, store.embeddings, table, exclude, 9)
    assert operations.count < 200
    gone = (table.document_ids[:, None, None] == exclude).any(-1).T  # [Q, C]
    assert torch.equal(keep, (ids >= 0) & ~gone.gather(1, ids.clamp(min=0)))
    whole = torch.cdist(keys.double(), torch.from_numpy(store.embeddings.astype("f8"))).square()
    want = whole.masked_fill(gone, torch.inf).topk(9, largest=False).values
    torch.testing.assert_close(distances.double(), want, rtol=1e-4, atol=1e-4)
    assert torch.equal(found < 0, want.isinf()) and not gone.gather(1, found.clamp(min=0))[found >= 0].any()


@pytest.mark.gpu
def test_a_step_on_a_gpu_waits_for_nothing(seed: int) -> None:
    from retro_kernels.retrieval.index import Index
    from retro_kernels.retrieval.search import Stats

    store = MemoryStore(make_documents(300), BagEmbedder())
    device = torch.device("cuda")
    on_device, stats = DeviceStore(store, device), Stats()
    documents = DocumentTable(store.document_ids, store.num_documents, device)
    searcher = DenseSearcher(
        store,
        Index.build(store.embeddings, "Flat", device=device),
        BagEmbedder,
        documents=documents,
        stats=stats,
        device=device,
        device_store=on_device,
        embed_unknown=False,
    )
    retriever = Retriever(
        store, searcher, documents=documents, device=device, device_store=on_device, stats=stats
    )
    host_tokens, host_exclude = sequences(store, 4, 5)
    tokens, exclude = host_tokens.to(device), host_exclude.to(device)
    retriever(tokens, num_neighbours=2, exclude_documents=exclude)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = retriever(tokens, num_neighbours=2, exclude_documents=exclude)
        from_host = retriever(host_tokens, num_neighbours=2, exclude_documents=host_exclude)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = dense(store)(host_tokens, num_neighbours=2, exclude_documents=host_exclude)
    # keys in fp16 on both sides; ties may change places
    torch.testing.assert_close(got.distances.cpu(), want.distances, rtol=1e-2, atol=1e-2)
    assert torch.equal(got.ids, from_host.ids)


def test_excluded_chunks_are_counted_once_and_of_known_documents_only(seed: int) -> None:
    table = DocumentTable(np.array([0, 0, 0, 1, 2, 2]), 3)
    exclude = torch.tensor([[0, 0, -1], [2, 1, 2], [-1, -1, -1], [7, 1, 7]])
    assert table.num_excluded(exclude).tolist() == [3, 3, 0, 1]


def test_random_neighbours_depend_on_the_seed_and_not_on_padding(seed: int) -> None:
    table = DocumentTable(np.zeros(997, dtype=np.int64), 1)
    queries = torch.randint(1, 5000, (20, 8))
    _, ids = RandomSearcher(table, seed).search(queries, 2)
    _, others = RandomSearcher(table, seed + 1).search(queries, 2)
    _, wider = RandomSearcher(table, seed).search(torch.nn.functional.pad(queries, (0, 5)), 2)
    assert (ids[:, 0] != others[:, 0]).any()
    assert torch.equal(ids, wider)
    assert len({(b - a) % 997 for a, b in ids.tolist()}) > 1, "one stride for all is no chance"


def test_keys_of_queries_are_rounded_as_those_of_the_set_and_never_nearer_than_nothing(seed: int) -> None:
    store = MemoryStore(make_documents(30), BagEmbedder())
    searcher = dense(store).searcher
    keys = searcher.embed(torch.randint(1, 60, (9, M)))  # type: ignore[attr-defined]
    assert torch.equal(keys, keys.half().float())
    vectors = torch.randn(64, 48) * 100
    distances, _ = scan_exact(vectors, vectors, DocumentTable(np.zeros(64, dtype=np.int64), 1), None, 1)
    assert distances.min() >= 0
