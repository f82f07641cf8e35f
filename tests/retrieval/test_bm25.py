"""BM25 and the re-rankers, against formulas written out."""

from __future__ import annotations

import json
import lzma
import math
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from retrieval.sets import BagEmbedder, M, MemoryStore, NumberTokenizer, dense, make_documents
from torch import Tensor

from retro_kernels.config import InputError
from retro_kernels.data.corpus import Document
from retro_kernels.data.tokenizer import Tokenizer
from retro_kernels.retrieval.bm25 import BM25Searcher, TermWeights, terms
from retro_kernels.retrieval.build import build_retrieval_set
from retro_kernels.retrieval.rerank import MEASURES, Reranker, edit_distance, normalised_edit_distance
from retro_kernels.retrieval.retriever import Retriever
from retro_kernels.retrieval.search import Stats

K1, B = 0.9, 0.4


@pytest.fixture
def store(seed: int) -> MemoryStore:
    return MemoryStore(make_documents(40), BagEmbedder())


def weight(query: list[int], chunk: list[int], all_chunks: list[list[int]]) -> float:
    """Lucene's BM25, term by term; (k1 + 1) left out, as Lucene does."""
    mean = sum(map(len, all_chunks)) / len(all_chunks)
    total, counts = 0.0, Counter(chunk)
    for token in query:
        df = sum(token in other for other in all_chunks)
        idf = math.log(1 + (len(all_chunks) - df + 0.5) / (df + 0.5))
        total += idf * counts[token] / (counts[token] + K1 * (1 - B + B * len(chunk) / mean))
    return total


def scores(store: MemoryStore, query: Tensor) -> np.ndarray:
    chunks = [[t for t in row if t] for row in store.chunks.tolist()]
    return np.array([weight([t for t in query.tolist() if t], chunk, chunks) for chunk in chunks])


@pytest.mark.parametrize("analyser", ["tokens", "words"])
def test_bm25_is_the_formula_and_excludes_documents(store: MemoryStore, analyser: str) -> None:
    queries = torch.randint(1, 60, (6, M))
    queries[0, 3:] = 0
    exclude = torch.randint(-1, 40, (6, 3))
    distances, ids = BM25Searcher(store, analyser=analyser).search(queries, 7, exclude)
    for row in range(6):
        truth = scores(store, queries[row])
        truth[np.isin(store.document_ids, exclude[row].numpy())] = 0
        best = np.sort(truth)[::-1][:7]
        got = -distances[row].numpy()
        present = ids[row].numpy() >= 0
        assert present.sum() == (truth > 0).sum().clip(max=7)
        ratio = got[present] / best[present]
        assert np.allclose(
            ratio, ratio[0], rtol=1e-4
        )  # up to one factor, (k1 + 1), which some write and others do not
        assert np.allclose(truth[ids[row].numpy()[present]], best[present], rtol=1e-4)
        assert np.isinf(distances[row].numpy()[~present]).all()


def test_bm25_looks_up_excluded_documents_together(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, exclude = torch.randint(1, 60, (3, M)), torch.randint(-1, 20, (3, 2000))
    searcher, searched, looked_up = BM25Searcher(store, analyser="tokens"), np.searchsorted, []

    def counted(*arguments: Any, **options: Any) -> Any:
        looked_up.append(1)
        return searched(*arguments, **options)

    monkeypatch.setattr(np, "searchsorted", counted)
    _, ids = searcher.search(queries, 7, exclude)
    assert len(looked_up) == 3
    assert (ids >= 0).any() and (store.document_ids[ids[ids >= 0].numpy()] >= 20).all()


def test_bm25_without_a_common_term_or_any_term(store: MemoryStore) -> None:
    queries = torch.tensor([[4000] * M, [0] * M])
    distances, ids = BM25Searcher(store, analyser="tokens").search(queries, 3)
    assert (ids == -1).all() and distances.isinf().all()
    with pytest.raises(InputError, match="analyser"):
        BM25Searcher(store, analyser="letters")  # type: ignore[arg-type]


@pytest.mark.parametrize("analyser", ["tokens", "words"])
def test_terms_are_held_in_four_bytes(seed: int, analyser: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retro_kernels.retrieval.bm25._BLOCK", 64)
    documents = [[300 + i % 700 for i in range(j, j + M - j % 2)] for j in range(3000)]
    searcher = BM25Searcher(MemoryStore(documents, BagEmbedder(dim=1)), analyser=analyser)  # type: ignore[arg-type]
    tracemalloc.start()
    rows = searcher._corpus(progress=False)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 3000 * (4 * M + 8) * 1.2  # 120 or more bytes a row of a list
    assert len(rows) == 3000 and rows.total == sum(map(len, documents))
    number = searcher._vocabulary
    assert list(rows) == [[number[str(token)] for token in document] for document in documents]


def test_bm25_in_a_retriever(store: MemoryStore) -> None:
    retriever = Retriever(store, BM25Searcher(store, analyser="tokens"))
    tokens = torch.from_numpy(store.chunks[:4].astype(np.int64)).reshape(2, -1)
    own = torch.from_numpy(store.document_ids[:4]).reshape(2, 2)
    got = retriever(tokens, num_neighbours=3, exclude_documents=own)
    assert not (retriever.documents(got.ids)[..., None] == own[:, None, None, :]).any()
    plain = retriever(tokens, num_neighbours=1)
    # the best of all chunks by the formula: the chunk itself, unless another says its words more often
    for query, found in zip(tokens.reshape(4, M), plain.ids.flatten().tolist(), strict=True):
        expected = scores(store, query)
        assert expected[found] >= expected.max() * (1 - 1e-5) > 0


def test_term_weights_are_the_formula(store: MemoryStore) -> None:
    queries, candidates = torch.randint(1, 60, (5, M)), torch.randint(store.num_chunks, (5, 9))
    queries[2, 4:] = 0
    values = torch.from_numpy(store.chunks[candidates.numpy()].astype(np.int64))
    got = TermWeights(store, K1, B).scores(queries, values)
    for row in range(5):
        np.testing.assert_allclose(
            got[row].numpy(), scores(store, queries[row])[candidates[row].numpy()], rtol=1e-4, atol=1e-5
        )


def test_reranking_has_the_weights_of_shared_tokens(store: MemoryStore) -> None:
    queries = torch.from_numpy(store.chunks[:5].astype(np.int64))
    distances, ids = BM25Searcher(store, analyser="tokens").search(queries, 6)
    values = torch.from_numpy(store.chunks[ids.clamp(min=0).numpy()].astype(np.int64))
    ratio = (TermWeights(store).scores(queries, values) / -distances)[ids >= 0]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "text, found",
    [
        ("C or R, a_b; don't", ["c", "or", "r", "a_b", "don", "t"]),
        ("Übergrößen – naïve", ["übergrößen", "naïve"]),
        ("猫の耳 v2、犬", ["猫", "の", "耳", "猫の", "の耳", "v2", "犬"]),
        ("लेकिन हिन्दी में।", ["लेकिन", "हिन्दी", "में"]),
        ("ไปบ้าน", ["ไ", "ป", "บ", "้", "า", "น", "ไป", "ปบ", "บ้", "้า", "าน"]),
        ("학교에 갔다", ["학교에", "갔다"]),
        ("→ ⇒ 🙂 --", []),
    ],
)
def test_words_of_every_script(text: str, found: list[str]) -> None:
    assert terms(text) == found


def test_text_without_spaces_is_found(tmp_path: Path) -> None:
    texts = [
        "神经网络使用交叉注意力来预测下一个词。检索到的邻居被编码器读取。",
        "这只猫在垫子上睡觉。明天会下雨吗？我们去公园散步。",
        "彼は毎朝コーヒーを飲みながら新聞を読みます。",
    ]
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    build_retrieval_set(documents, tmp_path / "set", embedder="hashing:64", progress=False)
    for kind in ("bm25", "bm25:tokens", "bm25+run", "bm25:tokens+edit"):
        retriever = Retriever.from_pretrained(tmp_path / "set", retriever=kind)
        assert retriever.name == kind and retriever.candidates.partition(",")[0] == kind.partition("+")[0]
        of_words = [("交叉注意力来预测", "0"), ("猫在睡觉", "1"), ("コーヒーを", "2")]
        for query, title in zip(texts, "012", strict=True) if "tokens" in kind else of_words:
            assert retriever.search_text(query, k=1)[0].title == title, (kind, query)
    retriever = Retriever.from_pretrained(tmp_path / "set", retriever="bm25")
    assert retriever.search_text("猫", k=3)[0].title == "1" and retriever.search_text("nowhere") == []


@pytest.mark.filterwarnings("error")
def test_a_set_without_any_word_finds_nothing() -> None:
    class Symbols(NumberTokenizer):
        def decode(self, ids: Any) -> str:
            return "→ " * len(ids)

    store = MemoryStore(make_documents(5), BagEmbedder())
    store.tokenizer = Symbols()  # type: ignore[assignment]
    distances, ids = BM25Searcher(store).search(torch.ones(2, M, dtype=torch.int64), 3)
    assert (ids == -1).all() and distances.isinf().all()


def test_making_the_index_shows_how_far_it_is(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    BM25Searcher(store)
    assert capfd.readouterr() == ("", "")  # a moment
    monkeypatch.setattr("retro_kernels.retrieval.bm25._SLOW", 10)
    BM25Searcher(store, progress=False)
    assert capfd.readouterr() == ("", "")
    BM25Searcher(store)
    out, err = capfd.readouterr()
    assert out == "" and "reading for BM25: 100%" in err and f"/{store.num_chunks} [" in err


def slow_edit_distance(a: list[int], b: list[int]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        row = [i + 1] + [0] * len(b) if (last := row) else []
        for j, y in enumerate(b):
            row[j + 1] = min(last[j] + (x != y), last[j + 1] + 1, row[j] + 1)
    return row[-1]


@pytest.mark.parametrize("pad_id", [0, 9])
def test_edit_distance_equals_the_slow_table(seed: int, pad_id: int) -> None:
    queries, values = torch.randint(1, 4, (12, 10)), torch.randint(1, 4, (12, 5, 13))
    for row in range(12):
        queries[row, torch.randint(11, ()) if row else 0 :] = pad_id
        for f in range(5):
            values[row, f, torch.randint(14, ()) if row + f else 0 :] = pad_id
    got = edit_distance(queries, values, pad_id)
    normalised = normalised_edit_distance(queries, values, pad_id)
    for row in range(12):
        for f in range(5):
            a, b = ([t for t in x.tolist() if t != pad_id] for x in (queries[row], values[row, f]))
            assert got[row, f] == slow_edit_distance(a, b)
            assert normalised[row, f].item() == pytest.approx(
                slow_edit_distance(a, b) / max(len(a), len(b), 1)
            )


@pytest.mark.parametrize("by", ["bm25", "edit", "run"])
def test_reranking_sorts_the_candidates(store: MemoryStore, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retro_kernels.retrieval.rerank._BLOCK", 4)
    inner = dense(store).searcher
    queries, exclude = torch.randint(1, 60, (9, M)), torch.randint(0, 40, (9, 2))
    queries[0, 3:] = queries[1] = 0
    stats = Stats()
    distances, ids = Reranker(inner, store, by, fetch=12, stats=stats).search(queries, 5, exclude)
    assert stats.seconds["rerank"] > 0
    _, candidates = inner.search(queries, 12, exclude)
    for row in range(9):
        assert set(ids[row].tolist()) <= set(candidates[row].tolist())
        chunks = torch.from_numpy(store.chunks[candidates[row].numpy()].astype(np.int64))
        if by == "bm25":
            truth = -scores(store, queries[row])[candidates[row].numpy()]
        elif by == "edit":
            truth = normalised_edit_distance(queries[row : row + 1], chunks[None])[0].numpy()
        else:
            query = [token for token in queries[row].tolist() if token]
            truth = np.array([1 - longest(query, chunk) / max(len(query), 1) for chunk in chunks.tolist()])
        np.testing.assert_allclose(distances[row].numpy(), np.sort(truth)[:5], rtol=1e-4, atol=1e-5)
        of = dict(zip(candidates[row].tolist(), truth.tolist(), strict=True))
        own = [of[i] for i in ids[row].tolist()]
        np.testing.assert_allclose(distances[row].numpy(), own, rtol=1e-4, atol=1e-5)
    _, few = Reranker(inner, store, by).search(queries, store.num_chunks + 2, exclude)
    assert (few[:, -2:] == -1).all()


@pytest.mark.parametrize("by", MEASURES)
def test_equal_candidates_keep_their_order(store: MemoryStore, by: str) -> None:
    candidates = torch.randperm(store.num_chunks)[:17].expand(3, -1)
    inner: Any = SimpleNamespace(search=lambda *_: (None, candidates))
    queries = torch.full((3, M), 4999)  # which no chunk has
    _, ids = Reranker(inner, store, by).search(queries, 9)
    assert torch.equal(ids, candidates[:, :9])


def longest(a: list[int], b: list[int]) -> int:
    runs = [(i, i + n) for i in range(len(a)) for n in range(1, len(a) - i + 1)]
    return max((e - s for s, e in runs if any(b[j : j + e - s] == a[s:e] for j in range(len(b)))), default=0)


def test_bad_measure(store: MemoryStore) -> None:
    with pytest.raises(InputError, match="bm25, edit, run"):
        Reranker(dense(store).searcher, store, "cosine")
    with pytest.raises(InputError, match="fetch"):
        Reranker(dense(store).searcher, store, "run", fetch=0)
    assert [Reranker(dense(store).searcher, store, "run", **fetch).fetch for fetch in ({}, {"fetch": 1})] == [
        64,
        1,
    ]


def test_bm25_finds_the_paragraph_of_a_question(data: Path, tmp_path: Path) -> None:
    """Words against the published order of magnitude: R@1 .755 on all of SQuAD's 2,067 paragraphs (their data,
    Lucene)."""
    paragraphs, questions = squad(data, 300)
    tokenizer = Tokenizer.train(paragraphs, tmp_path / "t.model", vocab_size=2000)
    documents = [Document(str(i), text) for i, text in enumerate(paragraphs)]
    build_retrieval_set(documents, tmp_path / "set", tokenizer=tokenizer, embedder="hashing", progress=False)
    retriever = Retriever.from_pretrained(tmp_path / "set", retriever="bm25")
    hits = retriever.search_text([question for question, _ in questions], k=5)
    first = sum(
        bool(found) and found[0].title == str(gold) for found, (_, gold) in zip(hits, questions, strict=True)
    )
    five = sum(
        str(gold) in {hit.title for hit in found} for found, (_, gold) in zip(hits, questions, strict=True)
    )
    assert first / len(questions) > 0.65 and five / len(questions) > 0.85


def squad(data: Path, num: int) -> tuple[list[str], list[tuple[str, int]]]:
    """The first paragraphs, and a question to each with the paragraph's number."""
    path = data / "squad" / "squad-v1.1-dev-rebuilt.jsonl.xz"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    paragraphs: list[str] = []
    questions: list[tuple[str, int]] = []
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            entry = json.loads(line)
            if entry["qas"] and entry["context"] not in paragraphs:
                questions.append((entry["qas"][0]["question"], len(paragraphs)))
                paragraphs.append(entry["context"])
            if len(paragraphs) == num:
                break
    return paragraphs, questions
