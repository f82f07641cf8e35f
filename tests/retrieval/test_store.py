"""A set reads as it was written, finds what it holds, and refuses to open when anything about it is wrong."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from retrieval.corpora import build, documents

from retro_kernels.config import InputError
from retro_kernels.data.corpus import Document, document_hash
from retro_kernels.retrieval import Retriever
from retro_kernels.retrieval import store as store_module
from retro_kernels.retrieval.store import MANIFEST, REQUIRED_FILES, ChunkStore, hash_chunks, open_array

CORPUS = documents(7)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    out = tmp_path_factory.mktemp("store") / "set"
    build(CORPUS, out)
    return out


@pytest.fixture
def copy(path, tmp_path):
    return shutil.copytree(path, tmp_path / "copy")


def edit(folder, change):
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_documents_stand_in_chunks_one_after_another(path):
    store = ChunkStore.open(path, verify="full")
    assert store.num_documents == len(CORPUS) and store.chunks.dtype == np.uint16
    rows = 0
    for i, document in enumerate(CORPUS):
        ids = store.tokenizer.encode(document.text)
        chunk_rows = store.document_chunks(i)
        assert len(chunk_rows) == -(-len(ids) // 16)
        tokens = store.chunks[chunk_rows.start : chunk_rows.stop].reshape(-1)
        assert tokens[: len(ids)].tolist() == ids and not tokens[len(ids) :].any()
        assert (store.document_ids[chunk_rows.start : chunk_rows.stop] == i).all()
        assert store.continuation[chunk_rows.start : chunk_rows.stop].tolist() == [True] * (
            len(chunk_rows) - 1
        ) + [False]
        assert "".join(store.texts(list(chunk_rows))) == document.text
        rows += len(chunk_rows)
    assert rows == store.num_chunks == len(store.embeddings)
    assert store.manifest["num_tokens"] == sum(len(store.tokenizer.encode(d.text)) for d in CORPUS)
    assert store.manifest["text_bytes"] == sum(len(d.text.encode()) for d in CORPUS)


def test_documents_are_found_by_hash_and_have_titles(path):
    store = ChunkStore.open(path)
    hashes = [document_hash(d.text) for d in CORPUS]
    assert store.find_documents([*hashes[::-1], 5]).tolist() == [*range(len(CORPUS))][::-1] + [-1]
    assert store.titles([3, -1, 0]) == ["title 3", "", "title 0"] and store.titles([]) == []
    for bad in (0.5, [1.0], np.array([0.0]), "1", [True], None):
        for look_up in (store.titles, store.find_documents):
            with pytest.raises(ValueError, match="must be integers, not"):
                look_up(bad)
    assert store.texts([-1]) == [""]
    for wrong in (-2, len(CORPUS)):
        with pytest.raises(InputError, match="no document"):
            store.titles([wrong])
    with pytest.raises(InputError, match="no chunk"):
        store.texts([store.num_chunks])


def test_chunks_are_found_by_their_tokens(path, seed):
    store = ChunkStore.open(path)
    rng = np.random.default_rng(seed)
    rows = rng.permutation(store.num_chunks)
    found = store.find_chunks(store.chunks[rows].astype(np.int64))
    np.testing.assert_array_equal(store.chunks[found], store.chunks[rows])
    assert (found <= rows).all()
    changed = store.chunks[rows].astype(np.int64)
    changed[np.arange(len(rows)), rng.integers(0, 16, len(rows))] += 1000
    assert (store.find_chunks(changed) == -1).all()
    assert store.find_chunks(np.zeros((0, 16), np.int64)).shape == (0,)
    with pytest.raises(ValueError, match=r"\[n, 16\]"):
        store.find_chunks(np.zeros((2, 8), np.int64))


def test_equal_hashes_of_different_chunks_do_no_harm(path, monkeypatch):
    store = ChunkStore.open(path)
    monkeypatch.setattr(store_module, "hash_chunks", lambda tokens: np.full(len(tokens), 9, np.uint64))
    store._chunk_hashes = np.full(store.num_chunks, 9, np.uint64)
    store._chunk_order = np.arange(store.num_chunks)
    queries = np.concatenate([store.chunks[[5, 2]].astype(np.int64), np.full((1, 16), 7)])
    assert store.find_chunks(queries).tolist() == [5, 2, -1]


def test_hash_depends_on_every_token_and_its_place(seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 60_000, (1, 64))
    variants = np.repeat(tokens, 64 + 63, axis=0)
    variants[np.arange(64), np.arange(64)] += 1
    for i in range(63):
        variants[64 + i, [i, i + 1]] = tokens[0, [i + 1, i]]
    distinct = np.unique(np.concatenate([variants, tokens]), axis=0)
    assert len(set(hash_chunks(distinct).tolist())) == len(distinct)
    assert (hash_chunks(tokens.astype(np.uint16)) == hash_chunks(tokens.astype(np.int32))).all()


def test_rows_beyond_two_thousand_million_tokens(tmp_path):
    rows = (1 << 31) // 64 + 100
    path = tmp_path / "big.npy"
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<u2", "fortran_order": False, "shape": (rows, 64)}
        )
        start = file.tell()
        file.truncate(start + rows * 128)  # a hole: takes no room on the disk
        file.seek(start + (rows - 3) * 128)
        file.write(np.arange(64, dtype=np.uint16).tobytes())
    array = open_array(path, np.dtype(np.uint16), (rows, 64))
    assert array.size > 1 << 31 and array[-3].tolist() == list(range(64)) and not array[-4].any()


def test_arrays_cannot_be_written(path):
    store = ChunkStore.open(path)
    with pytest.raises(ValueError):
        store.chunks[0] = 1


def test_no_set(tmp_path):
    with pytest.raises(InputError, match="is no folder.*retro-kernels index"):
        ChunkStore.open(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no manifest.json"):
        ChunkStore.open(tmp_path)
    with pytest.raises(InputError, match="verify"):
        ChunkStore.open(tmp_path, verify="some")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format": 3}',
        b" " * (1 << 20) + b"{}",
        b'{"a": ' * 50_000,
    ],
    ids=["empty", "open", "list", "bytes", "deep", "other", "large", "deep objects"],
)
def test_manifests_that_are_none(copy, content):
    (copy / MANIFEST).write_bytes(content)
    with pytest.raises(InputError):
        ChunkStore.open(copy)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.update(version=2), "format version 2"),
        (lambda m: m.update(num_chunks=-1), "num_chunks"),
        (lambda m: m.update(num_chunks=0), "num_chunks in manifest.json is '0'"),
        (lambda m: m.update(num_chunks=2**60), "num_chunks"),
        (lambda m: m.update(num_chunks=True), "num_chunks"),
        (lambda m: m.update(num_chunks=m["num_chunks"] + 1), "chunks.npy"),
        (lambda m: m.update(chunk_size="16"), "chunk_size"),
        (lambda m: m.update(tokenizer=None), "tokenizer.fingerprint"),
        (lambda m: m["embedder"].update(dim=65), "embeddings.npy"),
        (lambda m: m["tokenizer"].update(vocab_size=70_000), "chunks.npy holds uint16"),
        (lambda m: m["files"].pop("chunks.npy"), "does not list chunks.npy"),
        (
            lambda m: m["files"].update({"../../etc/passwd": m["files"]["chunks.npy"]}),
            "no file of a retrieval set",
        ),
        (
            lambda m: m["files"].update({"index.faiss": {"bytes": 3, "sha256": "0" * 64}}),
            "index.faiss is missing",
        ),
        (lambda m: m["files"]["chunks.npy"].update(bytes=-3), "entry of chunks.npy"),
        (lambda m: m["files"]["chunks.npy"].update(sha256="x"), "entry of chunks.npy"),
        (lambda m: m["files"].update({"chunks.npy": 3}), "entry of chunks.npy"),
    ],
)
def test_manifests_that_do_not_fit(copy, change, message):
    edit(copy, change)
    with pytest.raises(InputError, match=message):
        ChunkStore.open(copy)


@pytest.mark.parametrize("name", REQUIRED_FILES)
def test_every_file_is_checked(copy, name, monkeypatch):
    size = (copy / name).stat().st_size
    flipped = bytearray((copy / name).read_bytes())
    flipped[size * 3 // 4] ^= 4
    (copy / name).write_bytes(flipped)
    for verify in ("full", "auto"):
        with pytest.raises(InputError, match=f"content of {name} has changed"):
            ChunkStore.open(copy, verify=verify)
    monkeypatch.setattr(store_module, "VERIFIED_BYTES", 1)
    if name == "tokenizer.model":  # is read in any case
        with pytest.raises(InputError, match="tokenizer.model is not"):
            ChunkStore.open(copy)
    else:
        ChunkStore.open(copy)  # too large to be read each time
    with pytest.raises(InputError, match=f"content of {name} has changed"):
        ChunkStore.open(copy, verify="full")
    os.truncate(copy / name, size - 1)
    with pytest.raises(InputError, match=f"{name} has"):
        ChunkStore.open(copy)
    (copy / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        ChunkStore.open(copy)


def replace(folder, name, content):
    """As someone would who also corrects the manifest."""
    (folder / name).write_bytes(content)
    entry = {"bytes": len(content), "sha256": store_module.file_sha256(folder / name)}
    edit(folder, lambda manifest: manifest["files"].update({name: entry}))


class Exploit:
    def __reduce__(self):
        return os.mkdir, ("exploited",)


def test_nothing_is_unpickled(copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "objects.npy", np.array([Exploit()], dtype=object), allow_pickle=True)
    for content in (
        (tmp_path / "objects.npy").read_bytes(),
        pickle.dumps(Exploit()),
        b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 9,
    ):
        replace(copy, "chunks.npy", content)
        with pytest.raises(InputError, match="chunks.npy"):
            ChunkStore.open(copy)
    assert not (tmp_path / "exploited").exists()


def test_header_that_promises_more_than_the_file_holds(copy):
    with open(copy / "chunks.npy", "rb") as file:
        content = file.read()
    manifest = json.loads((copy / MANIFEST).read_text())
    rows = manifest["num_chunks"]
    larger = content.replace(f"({rows}, 16)".encode(), f"({rows}0, 16)".encode()).replace(
        b"), } ", b"), }", 1
    )
    assert larger != content
    replace(copy, "chunks.npy", larger)
    edit(copy, lambda m: m.update(num_chunks=rows * 10))
    with pytest.raises(InputError, match="does not fit its shape"):
        ChunkStore.open(copy)


def test_a_header_that_says_less_or_otherwise_than_the_file_holds(copy):
    content = (copy / "chunks.npy").read_bytes()
    replace(copy, "chunks.npy", content + b"\0\0")
    with pytest.raises(InputError, match="does not fit its shape"):
        ChunkStore.open(copy)
    replace(copy, "chunks.npy", content.replace(b"'fortran_order': False", b"'fortran_order': True "))
    with pytest.raises(InputError, match="chunks.npy holds uint16"):
        ChunkStore.open(copy)


def test_a_damaged_byte_anywhere_in_a_header(tmp_path):
    """numpy reads it as Python, and raises whatever Python's parts do."""
    path, values = tmp_path / "a.npy", np.arange(50)
    np.save(path, values)
    content = bytearray(path.read_bytes())
    for place in range(128):
        for other in (0, content[place] ^ 2, content[place] ^ 64):
            damaged = bytearray(content)
            damaged[place] = other
            path.write_bytes(damaged)
            try:
                assert np.array_equal(open_array(path, values.dtype, values.shape), values)
            except InputError as error:
                assert "a.npy" in str(error)


def test_links_out_of_the_folder_are_refused(copy, tmp_path):
    shutil.move(copy / "chunks.npy", tmp_path / "elsewhere.npy")
    (copy / "chunks.npy").symlink_to(tmp_path / "elsewhere.npy")
    with pytest.raises(InputError, match="link out of the folder"):
        ChunkStore.open(copy)


def test_document_ids_are_checked_before_anything_is_allocated_by_them(copy):
    content = bytearray((copy / "document_ids.npy").read_bytes())
    content[-3] ^= 64  # 2^46 documents
    (copy / "document_ids.npy").write_bytes(content)
    with pytest.raises(InputError, match="document_ids.npy is not within 0 to"):
        Retriever.from_pretrained(copy, verify="sizes")


@pytest.mark.parametrize(
    "name, places, value, message",
    [
        ("chunks", (3, 3), "vocab_size", "beyond the vocabulary"),
        ("chunk_order", 2, "num_chunks", "chunk_order.npy points beyond chunks.npy"),
        ("chunk_order", 2, -1, "chunk_order.npy points beyond chunks.npy"),
        ("document_ids", slice(4), 2, "document_ids.npy is not ascending"),  # between two blocks
        ("document_ids", 1, 2, "document_ids.npy is not ascending"),
        ("document_ids", -1, "num_documents", "document_ids.npy is not ascending"),
    ],
)
def test_contents_that_make_no_sense_are_found_in_full(copy, monkeypatch, name, places, value, message):
    monkeypatch.setattr(store_module, "_BLOCK", 4)
    store = ChunkStore.open(copy, verify="full")
    limits = {"num_chunks": store.num_chunks, "num_documents": store.num_documents}
    limits["vocab_size"] = store.tokenizer.vocab_size
    array = np.array(np.load(copy / f"{name}.npy"))
    array[places] = limits.get(value, value)
    replace(copy, f"{name}.npy", (copy / f"{name}.npy").read_bytes()[:128] + array.tobytes())
    with pytest.raises(InputError, match=message):
        ChunkStore.open(copy, verify="full")


def test_a_manifest_with_another_vocabulary_is_noticed(copy):
    edit(copy, lambda m: m["tokenizer"].update(vocab_size=m["tokenizer"]["vocab_size"] + 1))
    with pytest.raises(InputError, match="tokenizer.model has"):
        ChunkStore.open(copy)


def test_continuations_are_those_of_the_documents_in_blocks_too(path, monkeypatch):
    ids = ChunkStore.open(path).document_ids
    monkeypatch.setattr(store_module, "_BLOCK", 3)
    assert ChunkStore.open(path).continuation.tolist() == [*(ids[1:] == ids[:-1]), False]


def test_titles_of_a_damaged_table(copy):
    offsets = np.array(ChunkStore.open(copy)._document_offsets)
    for wrong in (offsets + 1, -offsets, offsets * 1000):
        replace(
            copy, "document_offsets.npy", (copy / "document_offsets.npy").read_bytes()[:128] + wrong.tobytes()
        )
        with pytest.raises(InputError, match="documents.jsonl"):
            ChunkStore.open(copy).titles([2, 3])
    # no line is so long that it takes memory worth mentioning
    first = (copy / "documents.jsonl").read_bytes().splitlines()[0]
    padding = (1 << 16) - len(first)
    for more in (0, 1):
        content = first + b" " * (padding + more)
        replace(copy, "documents.jsonl", content)
        long = np.full(len(offsets), len(content))
        long[0] = 0
        head = (copy / "document_offsets.npy").read_bytes()[:128]
        replace(copy, "document_offsets.npy", head + long.astype(offsets.dtype).tobytes())
        if more:
            with pytest.raises(InputError, match="documents.jsonl"):
                ChunkStore.open(copy).titles([0])
        else:
            assert ChunkStore.open(copy).titles([0]) == ["title 0"]


def test_another_tokenizer_is_noticed(copy, tmp_path):
    build(documents(8), tmp_path / "other")
    replace(copy, "tokenizer.model", (tmp_path / "other" / "tokenizer.model").read_bytes())
    with pytest.raises(InputError, match="tokenizer.model is not the tokenizer"):
        _ = ChunkStore.open(copy).tokenizer


OTHER = documents(9, 7)


def holds(store, corpus):
    texts = ["".join(store.texts(list(store.document_chunks(i)))) for i in range(store.num_documents)]
    return list(zip(store.titles(range(store.num_documents)), texts, strict=True)) == [
        (d.title, d.text) for d in corpus
    ]


def test_an_open_set_is_not_changed_by_its_replacement(copy):
    store = ChunkStore.open(copy)
    build([Document(f"other {i}", d.text) for i, d in enumerate(OTHER)], copy, overwrite=True)
    assert holds(store, CORPUS)


@pytest.mark.parametrize("moment", ["check_files", "open_array"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_set_that_is_replaced_while_it_is_opened(copy, monkeypatch, moment, times):
    usual, left = getattr(store_module, moment), times

    def replace_first(*args, **options):
        nonlocal left
        if left and (moment == "check_files" or args[0].name == "chunks.npy"):
            left -= 1
            monkeypatch.setattr(store_module, moment, usual)
            build(OTHER if left % 2 == 0 else CORPUS[:3], copy, overwrite=True)
            monkeypatch.setattr(store_module, moment, replace_first)
        return usual(*args, **options)

    monkeypatch.setattr(store_module, moment, replace_first)
    monkeypatch.setattr(store_module, "VERIFIED_BYTES", 1)
    if times == 1:
        assert holds(ChunkStore.open(copy), OTHER)
    else:
        with pytest.raises(InputError, match="was replaced twice while it was being opened"):
            ChunkStore.open(copy)


def advised_random(array):
    """Whether the kernel was told that this map is read here and there (a flag in /proc/self/smaps)."""
    address, current = array.__array_interface__["data"][0], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            start, stop = (int(number, 16) for number in first.split("-"))
            current = start <= address < stop
        elif current and first == "VmFlags:":
            return "rr" in line.split()
    raise AssertionError("no such map")


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="the kernel does not show its maps here")
def test_only_what_is_read_here_and_there_is_read_without_looking_ahead(path):
    store = ChunkStore.open(path)
    assert advised_random(store.chunks) and not advised_random(store.embeddings)
    store.read_ahead()
    assert not advised_random(store.chunks)
