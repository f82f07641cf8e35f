"""Retrievers opened from a set on disk, in each of their kinds."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from torch.utils.data import DataLoader

from retro_kernels.config import InputError
from retro_kernels.data.corpus import Document, document_hash
from retro_kernels.retrieval.build import build_retrieval_set
from retro_kernels.retrieval.embedder import HashingEmbedder
from retro_kernels.retrieval.merge import append_to_retrieval_set
from retro_kernels.retrieval.neighbours import precompute
from retro_kernels.retrieval.retriever import RETRIEVERS, Retriever

WORDS = [
    a + b
    for a in ("bar", "cor", "del", "fen", "gul", "him")
    for b in ("ao", "eda", "isk", "ola", "um", "yx", "zent")
]


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    generator = random.Random(random.SystemRandom().random())
    return [
        Document(f"title {i}", " ".join(generator.choices(WORDS, k=generator.randrange(20, 400))))
        for i in range(40)
    ]


@pytest.fixture(scope="module")
def folder(documents: list[Document], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sets") / "set"
    build_retrieval_set(documents, path, vocab_size=330, embedder="hashing:64", chunk_size=16, progress=False)
    return path


@pytest.mark.parametrize("kind", RETRIEVERS)
def test_every_kind_excludes_and_fills(folder: Path, documents: list[Document], kind: str) -> None:
    retriever = Retriever.from_pretrained(folder, retriever=kind, rerank_fetch=8)
    assert (
        repr(retriever)
        == f"Retriever({kind}, {retriever.num_chunks:,} chunks of 40 documents in {folder}, cpu)"
    )
    tokens = [
        retriever.tokenizer.encode(document.text)[:48] for document in documents if len(document.text) > 400
    ][:5]
    own = retriever.find_documents([document_hash(d.text) for d in documents if len(d.text) > 400][:5])[
        :, None
    ]
    assert (own >= 0).all()
    got = retriever(torch.tensor(tokens), num_neighbours=3, exclude_documents=own)
    assert got.tokens.shape == (5, 3, 3, 32) and (got.ids >= 0).all()
    assert not (retriever.documents(got.ids) == own[:, None]).any()
    assert (got.distances.diff(dim=-1) >= 0).all() and got.distances.isfinite().all()
    hits = retriever.search_text(documents[3].text[:80], k=4)
    assert len(hits) == 4 and {h.title for h in hits} <= {d.title for d in documents}


def test_text_is_found_where_it_stands(folder: Path, documents: list[Document]) -> None:
    for kind in ("dense", "bm25", "dense+run"):
        retriever = Retriever.from_pretrained(folder, retriever=kind)
        chunk = 5
        text = retriever.store.texts([chunk])[0]
        hit = retriever.search_text(text, k=1)[0]
        assert (hit.chunk, hit.text) == (chunk, text), kind
        assert text in next(d.text for d in documents if d.title == hit.title)


def test_the_file_of_neighbours_and_the_cache_change_nothing(folder: Path, tmp_path: Path) -> None:
    live = Retriever.from_pretrained(folder)
    precompute(live, live.store.chunks, live.store.document_ids, tmp_path / "near", per_chunk=6)
    tokens = torch.from_numpy(live.store.chunks[:60].astype(np.int64)).reshape(10, -1)
    own = torch.from_numpy(live.store.document_ids[:60].copy()).reshape(10, -1)
    want = live(tokens, exclude_documents=own)
    for options in (
        {"neighbours": tmp_path / "near"},
        {"cache": 6},
        {"neighbours": tmp_path / "near", "cache": 6},
    ):
        retriever = Retriever.from_pretrained(folder, **options)
        for _ in range(2):
            got = retriever(tokens, exclude_documents=own)
            assert torch.equal(got.ids, want.ids) and torch.equal(got.tokens, want.tokens)
        assert retriever.stats.reused > 0
    with pytest.raises(InputError, match="'dense', not of 'bm25, words of the second kind'"):
        Retriever.from_pretrained(folder, retriever="bm25", neighbours=tmp_path / "near")


@pytest.mark.parametrize("kind", [name for name in RETRIEVERS if "+" in name])
def test_what_is_kept_for_a_re_ranking_are_its_candidates(folder: Path, tmp_path: Path, kind: str) -> None:
    source, chosen = kind.partition("+")[0], {"retriever": kind, "rerank_fetch": 8}
    plain, live = (
        Retriever.from_pretrained(folder, retriever=source),
        Retriever.from_pretrained(folder, **chosen),
    )
    chunks, owners = live.store.chunks[:60], live.store.document_ids[:60]
    precompute(plain, chunks, owners, tmp_path / "near", per_chunk=30)
    precompute(plain, chunks, owners, tmp_path / "few", per_chunk=7)
    tokens = torch.from_numpy(chunks.astype(np.int64)).reshape(60, -1)
    found = live.documents(plain(tokens, num_neighbours=5).ids)[:, 0]
    # its own document, and some out of which its first candidates are
    exclude = torch.cat([torch.from_numpy(owners.copy())[:, None], found[:, 3:]], 1)
    want = live(tokens, exclude_documents=exclude, num_neighbours=3)
    for options in ({"neighbours": tmp_path / "near"}, {"cache": 30}):
        kept = Retriever.from_pretrained(folder, **chosen, **options)
        got = kept(tokens, exclude_documents=exclude, num_neighbours=3)
        assert torch.equal(got.ids, want.ids) and torch.equal(got.distances, want.distances)
        kept(tokens, exclude_documents=exclude, num_neighbours=3)
        assert kept.stats.reused > 0
        kept.check_num_neighbours(31)  # of the candidates that are re-ranked, more can be searched for
    precompute(plain, chunks, owners, tmp_path / "enough", per_chunk=8)
    Retriever.from_pretrained(folder, **chosen, neighbours=tmp_path / "enough", cache=8)
    with pytest.raises(
        InputError, match="7 neighbours of a chunk, .* re-ranks 8.*--per-chunk.*rerank_fetch, in Python"
    ):
        Retriever.from_pretrained(folder, **chosen, neighbours=tmp_path / "few")
    with pytest.raises(InputError, match="cache is 7, .* re-ranks 8"):
        Retriever.from_pretrained(folder, **chosen, cache=7)
    with pytest.raises(
        InputError, match=f"re-ranks .* the retriever {source}, .*more neighbours .* 8 .*--per-chunk"
    ):
        precompute(live, chunks, owners, tmp_path / "chosen", per_chunk=30)
    assert not (tmp_path / "chosen").exists()


def test_a_file_of_another_seed_or_another_query_encoder_is_refused(folder: Path, tmp_path: Path) -> None:
    for made, opened in (
        ({"retriever": "random", "seed": 1}, {"retriever": "random", "seed": 2}),
        ({"query_embedder": QueryEncoder(64)}, {"query_embedder": QueryEncoder(64, "other")}),
        ({"query_embedder": QueryEncoder(64)}, {}),
        ({}, {"metric": "inner product"}),
    ):
        first = Retriever.from_pretrained(folder, **made)
        precompute(
            first, first.store.chunks[:5], first.store.document_ids[:5], tmp_path / "near", per_chunk=4
        )
        Retriever.from_pretrained(folder, **made, neighbours=tmp_path / "near")
        with pytest.raises(InputError, match="holds the neighbours of the retriever"):
            Retriever.from_pretrained(folder, **opened, neighbours=tmp_path / "near")


@pytest.mark.gpu
def test_an_index_that_cannot_run_on_a_gpu_is_searched_on_the_cpu(
    documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    if sentencepiece.__version__ in ("0.2.1", "0.2.2"):
        pytest.skip("this sentencepiece ends the process where a text has too few pairs")
    options = dict(vocab_size=330, embedder="hashing:64", chunk_size=16, progress=False, index="HNSW16,SQ8")
    build_retrieval_set(documents, tmp_path / "set", **options)  # type: ignore[arg-type]
    on_host = Retriever.from_pretrained(tmp_path / "set")
    with pytest.warns(UserWarning, match="HNSW16,SQ8"):
        retriever = Retriever.from_pretrained(tmp_path / "set", device="cuda")
    tokens = torch.from_numpy(retriever.store.chunks[:12].astype(np.int64)).reshape(3, -1)
    own = torch.from_numpy(retriever.store.document_ids[:12].copy()).reshape(3, -1)
    got = retriever(tokens.cuda(), exclude_documents=own.cuda())
    want = on_host(tokens, exclude_documents=own)
    assert got.ids.is_cuda and got.tokens.is_cuda
    torch.testing.assert_close(got.distances.cpu(), want.distances, rtol=1e-3, atol=1e-3)
    with pytest.raises((InputError, ImportError), match="HNSW16,SQ8"):
        Retriever.from_pretrained(tmp_path / "set", device="cuda", index_device="cuda")


def test_another_embedder_is_refused_when_it_is_needed(folder: Path) -> None:
    known = torch.from_numpy(Retriever.from_pretrained(folder).store.chunks[:1].astype(np.int64))
    for wrong, message in (("hashing:32", "numbers|was loaded"), (HashingEmbedder(128), "was loaded")):
        retriever = Retriever.from_pretrained(folder, embedder=wrong)
        retriever(known)  # every key is in the set: no embedder is loaded
        with pytest.raises(InputError, match=message):
            retriever(known.flip(1))
    assert Retriever.from_pretrained(folder, embedder=HashingEmbedder(64))(known.flip(1)).ids.min() >= 0


class Own:
    """An embedder that is no class of the library's."""

    name, fingerprint, dim = "own/letters", "f" * 64, 26

    def embed(self, texts: Any, progress: Any = None) -> torch.Tensor:
        counts = [[text.count(chr(97 + letter)) for letter in range(26)] for text in texts]
        return torch.tensor(counts, dtype=torch.float32)


def test_an_embedder_of_ones_own_is_looked_for_nowhere(
    documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name may be anything, so the Hub is not asked for a model of that name, which can take minutes."""

    def look_for(*_: Any) -> None:
        raise AssertionError("looked for")

    monkeypatch.setattr("retro_kernels.retrieval.embedder.load_embedder", look_for)
    path = tmp_path / "set"
    build_retrieval_set(documents[:10], path, vocab_size=330, embedder=Own(), chunk_size=16, progress=False)
    retriever = Retriever.from_pretrained(path)
    known = torch.from_numpy(retriever.store.chunks[:1].astype(np.int64))
    assert retriever(known).ids.min() >= 0  # nothing is to be embedded
    said = "was built with an embedder of somebody's own, own/letters: give that object"
    with pytest.raises(InputError, match=said):
        retriever(known.flip(1))
    with pytest.raises(InputError, match=said):
        append_to_retrieval_set(path, documents[10:], progress=False)
    append_to_retrieval_set(path, documents[10:], embedder=Own(), progress=False)
    assert Retriever.from_pretrained(path, embedder=Own())(known.flip(1)).ids.min() >= 0


class QueryEncoder:
    """Queries have an encoder of their own: here one that turns everything into the same vector."""

    name = "query"

    def __init__(self, dim: int, fingerprint: str = "q") -> None:
        self.dim, self.fingerprint = dim, fingerprint

    def embed(self, texts: list[str], progress: object = None) -> torch.Tensor:
        return torch.ones(len(texts), self.dim)


def test_queries_may_have_an_encoder_of_their_own(folder: Path) -> None:
    retriever = Retriever.from_pretrained(folder, query_embedder=QueryEncoder(64))
    tokens = torch.from_numpy(retriever.store.chunks[:6].astype(np.int64))
    got = retriever(tokens, num_neighbours=4)
    nearest = (
        (torch.from_numpy(retriever.store.embeddings.astype("f4")) - 1).square().sum(1).sort().values[:4]
    )
    torch.testing.assert_close(got.distances[:, 0], nearest.expand(6, 4), rtol=1e-4, atol=1e-4)
    dpr = Retriever.from_pretrained(folder, query_embedder=QueryEncoder(64), metric="inner product")
    near = dpr(tokens, num_neighbours=4, exclude_documents=torch.zeros(6, 1, dtype=torch.int64))
    products = torch.from_numpy(dpr.store.embeddings.astype("f4")).sum(1)
    best = products[torch.from_numpy(dpr.store.document_ids != 0)].sort(descending=True).values[:4]
    torch.testing.assert_close(-near.distances[:, 0], best.expand(6, 4), rtol=1e-3, atol=1e-3)
    assert (dpr.documents(near.ids) > 0).all()
    with pytest.raises(InputError, match="metric"):
        Retriever.from_pretrained(folder, metric="cosine")
    with pytest.raises(InputError, match="makes 3"):
        Retriever.from_pretrained(folder, query_embedder=QueryEncoder(3))(tokens)


def test_options_that_mean_nothing_are_refused(
    folder: Path, tmp_path: Path, documents: list[Document]
) -> None:
    for kind in ("bm25", "random", "bm25:tokens+edit"):
        for options in ({"metric": "inner product"}, {"query_embedder": QueryEncoder(64)}):
            with pytest.raises(InputError, match="has neither metric nor query_embedder"):
                Retriever.from_pretrained(folder, retriever=kind, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="which embed_unknown=False forbids"):
        Retriever.from_pretrained(folder, query_embedder=QueryEncoder(64), embed_unknown=False)
    known = Retriever.from_pretrained(folder, embed_unknown=False)
    assert (
        known.candidates != Retriever.from_pretrained(folder).candidates
    )  # nor is a file of the one the other's


def test_unknown_kinds_and_missing_sets(folder: Path, tmp_path: Path) -> None:
    for name in ("dpr", "bm25+bm25"):  # of which the second would sort by what it was sorted by
        with pytest.raises(InputError, match="dense, bm25"):
            Retriever.from_pretrained(folder, retriever=name)
    with pytest.raises(InputError, match="No retrieval set"):
        Retriever.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"cache": -1}, "cache is -1; it must be an integer of at least 0"),
        ({"cache": 1.5}, "cache is 1.5"),
        ({"cache": True}, "cache is True"),
        (
            {"rerank_fetch": 0, "retriever": "dense+edit"},
            "rerank_fetch is 0; it must be an integer of at least 1",
        ),
        ({"seed": -1}, "seed is -1; it must be an integer from 0"),
        ({"seed": 0.5, "retriever": "random"}, "seed is 0.5"),
    ],
)
def test_numbers_out_of_range(folder: Path, options: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Retriever.from_pretrained(folder, **options)


def test_devices_are_those_of_every_other_part(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("auto", "cpu", None):
        assert Retriever.from_pretrained(folder, device=device).device == torch.device("cpu")
    for device, said in (("cuda", "sees no GPU"), ("gpu", "give auto, cpu, cuda")):
        with pytest.raises(InputError, match=said):
            Retriever.from_pretrained(folder, device=device)
        with pytest.raises(InputError, match=said):
            Retriever.from_pretrained(folder, index_device=device)
        with pytest.raises(InputError, match=said):
            build_retrieval_set([Document("a", "b")], folder / "never", device=device)


def test_random_neighbours_do_not_depend_on_the_other_queries(folder: Path) -> None:
    retriever = Retriever.from_pretrained(folder, retriever="random")
    texts = [WORDS[0], " ".join(WORDS[:9]), " ".join(WORDS * 3)]
    together = retriever.search_text(texts, 5)
    assert together == [retriever.search_text(text, 5) for text in texts]
    assert len({tuple(hit.chunk for hit in hits) for hits in together}) == 3
    assert Retriever.from_pretrained(folder, retriever="random", seed=1).search_text(texts, 5) != together


def test_a_cache_has_no_more_places_than_the_set_has_chunks(folder: Path) -> None:
    retriever: Any = Retriever.from_pretrained(folder, cache=10**15)
    assert retriever.searcher.per_chunk == retriever.num_chunks


def test_a_copy_opens_the_set_anew(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    retriever = Retriever.from_pretrained(
        folder.name, retriever="dense+edit", cache=8, rerank_fetch=8, embedder=HashingEmbedder(64)
    )
    tokens = torch.randint(4, 300, (3, 40))
    sent = pickle.dumps(retriever)
    assert len(sent) < 10_000  # the folder is named, not sent
    monkeypatch.chdir(tmp_path)
    for made in (
        pickle.loads(sent),
        copy.deepcopy(retriever),
        pickle.loads(pickle.dumps(pickle.loads(sent))),
    ):
        assert made.name == retriever.name and made.candidates == retriever.candidates
        for mine, theirs in zip(retriever(tokens), made(tokens), strict=True):
            assert torch.equal(mine, theirs)
    spawned = DataLoader(
        [tokens, tokens[:1]],  # type: ignore[arg-type]
        batch_size=None,
        collate_fn=retriever,
        num_workers=1,
        multiprocessing_context="spawn",
    )
    assert [torch.equal(found.ids, retriever(tokens[: len(found.ids)]).ids) for found in spawned] == [
        True
    ] * 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_a_fork_of_a_process_that_searched_can_search(folder: Path) -> None:
    """As in `datasets.map(num_proc=2)`. The threads of the parent's loops are not forked, and OpenMP waits for them."""
    retriever, tokens = Retriever.from_pretrained(folder), torch.randint(4, 300, (64, 400))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # one would be none to wait for
    try:
        wanted = retriever(tokens).ids

        def child() -> None:
            again = Retriever.from_pretrained(folder)
            sys.exit(not all(torch.equal(each(tokens).ids, wanted) for each in (retriever, again)))

        forked = multiprocessing.get_context("fork").Process(target=child)
        forked.start()
        forked.join(60)
        forked.kill()
        assert forked.exitcode == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_what_cannot_be_copied_says_so(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "set")
    opened = Retriever.from_pretrained(tmp_path / "set")
    sent = pickle.dumps(opened)
    append_to_retrieval_set(tmp_path / "set", [Document("new", " ".join(WORDS))], progress=False)
    with pytest.raises(InputError, match="was changed since it was opened to be copied"):
        pickle.loads(sent)
    with pytest.raises(TypeError, match="only what Retriever.from_pretrained opened"):
        pickle.dumps(Retriever(opened.store, opened.searcher))


class Foreign:
    """An embedder as one writes it oneself."""

    name, dim, fingerprint = "foreign", 8, "foreign, 1"

    def __init__(self, made: Any = None) -> None:
        self.made = made

    def embed(self, texts: Any, progress: Any = None) -> Any:
        vectors = torch.tensor([[text.count(letter) for letter in "aeioubcd"] for text in texts])
        return vectors / 64 if self.made is None else self.made(vectors)


def test_an_embedder_of_ones_own(documents: list[Document], tmp_path: Path) -> None:
    options: dict[str, Any] = {"vocab_size": 330, "chunk_size": 16, "progress": False}
    for made, error, said in (
        (lambda vectors: vectors.numpy(), TypeError, "foreign gave a ndarray; embed must give a tensor"),
        (
            lambda vectors: vectors[:, :7] / 64,
            InputError,
            r"foreign gave \[\d+, 7\] for [\d,]+ texts; .* 8\]",
        ),
    ):
        with pytest.raises(error, match=said):
            build_retrieval_set(documents, tmp_path / "set", embedder=Foreign(made), **options)
    build_retrieval_set(documents, tmp_path / "set", embedder=Foreign(), **options)
    hit = Retriever.from_pretrained(tmp_path / "set", embedder=Foreign()).search_text(
        documents[7].text[:90], k=1
    )
    assert len(hit) == 1
    with pytest.raises(InputError, match="gave .* texts"):
        Retriever.from_pretrained(
            tmp_path / "set", embedder=Foreign(lambda vectors: vectors[:1] / 64)
        ).search_text(["bar", "cor"])
