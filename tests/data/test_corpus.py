"""Documents come in a fixed order out of every kind of file; what is no text is counted and left out."""

import bz2
import gzip
import io
import json
import lzma
import os
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from retro_kernels.config import InputError
from retro_kernels.data import corpus
from retro_kernels.data.corpus import (
    _SNIFF_BYTES,
    Document,
    ReadReport,
    document_hash,
    read_documents,
    split_documents,
)


def read(paths, **options):
    report = ReadReport()
    return [(d.title, d.text) for d in read_documents(paths, report=report, **options)], report


@pytest.fixture
def folder(tmp_path):
    files = {
        "b.py": "x = 1\n",
        "a.txt": "first\r\n",
        "sub/c.md": "third",
        "sub/deep/d.py": "fourth",
        "tests/t.py": "test",
        ".hidden": "no",
        ".git/config": "no",
        "__pycache__/x.py": "no",
    }
    for name, text in files.items():
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return tmp_path / "corpus"


def test_folders_are_read_in_order_and_line_ends_kept(folder):
    documents, report = read(folder)
    assert documents == [
        ("a.txt", "first\r\n"),
        ("b.py", "x = 1\n"),
        ("sub/c.md", "third"),
        ("sub/deep/d.py", "fourth"),
        ("tests/t.py", "test"),
    ]
    assert report.documents == 5 and report.text_bytes == sum(len(text) for _, text in documents)
    assert report.warning() is None


def test_patterns(folder):
    assert [title for title, _ in read(folder, include=["*.py"], exclude=["tests"])[0]] == [
        "b.py",
        "sub/deep/d.py",
    ]
    assert [title for title, _ in read(folder, exclude=["sub/deep/", "*.txt"])[0]] == [
        "b.py",
        "sub/c.md",
        "tests/t.py",
    ]
    assert read(folder, include="*.py", exclude="tests") == read(folder, include=["*.py"], exclude=["tests"])
    assert read(folder, leave_out=str(folder / "sub")) == read(folder, exclude=["sub"])


def packed(suffix, content):
    """`content` as a file with that suffix holds it."""
    if suffix == ".zst":
        zstd = corpus.zstd or pytest.skip("no zstd in this Python, and backports.zstd is not installed")
        half = len(content) // 2  # several frames, as pzstd and appending leave them
        return zstd.compress(content[:half]) + zstd.compress(content[half:])
    return {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}[suffix](content)


PACKED = ["", ".gz", ".xz", ".bz2", ".zst"]


@pytest.mark.parametrize("suffix", PACKED)
def test_packed_and_json_lines(tmp_path, suffix):
    lines = [{"text": "one", "title": "One"}, {"text": "two", "title": "", "id": 0}, {"text": "three"}]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode() + b"\n"
    (tmp_path / f"a.jsonl{suffix}").write_bytes(packed(suffix, content))
    (tmp_path / f"b.txt{suffix}").write_bytes(packed(suffix, "plain \u2581".encode()))
    expected = [("One", "one"), ("0", "two"), (f"a.jsonl{suffix}, line 3", "three")]
    assert read(tmp_path / f"a.jsonl{suffix}")[0] == expected
    assert read([tmp_path / f"b.txt{suffix}"])[0] == [(f"b.txt{suffix}", "plain \u2581")]
    assert len(read(tmp_path)[0]) == 4


def test_zstd_with_a_long_window(tmp_path):
    zstd = corpus.zstd or pytest.skip("no zstd in this Python, and backports.zstd is not installed")
    options = {zstd.CompressionParameter.window_log: 28, zstd.CompressionParameter.content_size_flag: 0}
    packer = zstd.ZstdCompressor(options=options)
    (tmp_path / "a.txt.zst").write_bytes(packer.compress(b"a" * 100_000) + packer.flush())
    with pytest.raises(zstd.ZstdError):  # without being asked to, zstd takes no more than 2^27
        zstd.open(tmp_path / "a.txt.zst").read()
    assert read(tmp_path / "a.txt.zst")[0] == [("a.txt.zst", "a" * 100_000)]


@pytest.mark.parametrize("suffix", PACKED)
def test_json_with_a_document_a_line(tmp_path, suffix):
    """As C4 and Dolma name their files; any other JSON is the document itself."""
    lines = b'\n{"text": "one", "url": "there"}\n{"text": "two"}'
    others = [
        b'{"text": 3}\n',
        b'{\n "text": "one"}',
        b'[{"text": "one"}]',
        b'{"other": "one"}',
        b"[" * 100_000,
    ]
    (tmp_path / f"a.json{suffix}").write_bytes(packed(suffix, lines))
    for number, content in enumerate(others):
        (tmp_path / f"b{number}.json{suffix}").write_bytes(packed(suffix, content))
    expected = [(f"a.json{suffix}, line 2", "one"), (f"a.json{suffix}, line 3", "two")]
    assert read(tmp_path / f"a.json{suffix}")[0] == expected
    whole = [(f"b{number}.json{suffix}", content.decode()) for number, content in enumerate(others)]
    assert read(tmp_path)[0] == expected + whole
    (tmp_path / f"a.json{suffix}").write_bytes(packed(suffix, b'{"text": null}\n' + lines))
    documents, report = read(tmp_path / f"a.json{suffix}")
    assert [text for _, text in documents] == ["one", "two"] and report.skipped == {'without a "text"': 1}


def test_json_lines_have_one_name_from_wherever_they_are_read(folder, monkeypatch):
    (folder / "sub" / "lines.jsonl").write_text('{"text": "one"}\n')
    titles = [title for title, _ in read(folder)[0]]
    assert "sub/lines.jsonl, line 1" in titles
    monkeypatch.chdir(folder / "sub")
    assert [title for title, _ in read("..")[0]] == titles
    assert (
        read("lines.jsonl")[0] == read(folder / "sub" / "lines.jsonl")[0] == [("lines.jsonl, line 1", "one")]
    )


@pytest.fixture
def parquet():
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow
    from pyarrow import parquet

    def write(path, columns, **options):
        parquet.write_table(pyarrow.table(columns), path, **options)

    return write


def test_parquet(tmp_path, parquet, seed):
    rng = np.random.default_rng(seed)
    rows = 3 * corpus._PARQUET_ROWS + 17
    texts = ["".join(rng.choice(list("ab\u00e9\u2581 \n"), 20)) + "." for _ in range(rows)]
    columns = {"other": list(range(rows)), "id": [f"n{i}" for i in range(rows)], "text": texts}
    parquet(tmp_path / "b.parquet", columns, row_group_size=100, compression="zstd")
    parquet(tmp_path / "a.parquet", {"text": ["one", None, " ", "two"], "title": ["One", "", "", None]})
    (tmp_path / "c.txt").write_text("three")
    first = [("One", "one"), ("a.parquet, row 4", "two")]
    documents, report = read(tmp_path)
    assert documents == first + [(f"n{i}", text) for i, text in enumerate(texts)] + [("c.txt", "three")]
    assert report.skipped == {'without a "text"': 1, "empty": 1}
    assert f"{tmp_path}/a.parquet, row 2" in report.warning()
    assert read(tmp_path / "a.parquet")[0] == first


def test_parquet_with_odd_columns(tmp_path, parquet):
    import pyarrow

    texts = pyarrow.array(["one", "two"])
    # what Python's datetime cannot hold, for being too fine or too late
    for unit, time in (("ns", 1), ("s", 1 << 50)):
        columns = {"text": texts, "id": pyarrow.array([time, None], pyarrow.timestamp(unit))}
        parquet(tmp_path / f"{unit}.parquet", columns)
        assert read(tmp_path)[0] == [(f"{unit}.parquet, row 1", "one"), (f"{unit}.parquet, row 2", "two")]
        (tmp_path / f"{unit}.parquet").unlink()
    twice = pyarrow.table([texts, texts, texts.take([1, 0])], names=["text", "id", "id"])
    parquet(tmp_path / "twice.parquet", twice)
    assert read(tmp_path / "twice.parquet")[0] == [("one", "one"), ("two", "two")]
    packed = {"title": texts.dictionary_encode(), "text": texts.cast(pyarrow.large_string())}
    parquet(tmp_path / "packed.parquet", packed)
    assert read(tmp_path / "packed.parquet")[0] == [("one", "one"), ("two", "two")]


def test_of_a_row_group_of_parquet_little_is_held_at_a_time(tmp_path, parquet, monkeypatch):
    """A row group may be the whole file."""
    most = []

    class Watched(io.FileIO):
        def read(self, size=-1):
            most.append(size)
            return super().read(size)

    monkeypatch.setattr(corpus, "_open", Watched)
    texts = [os.urandom(2000).hex() for _ in range(2000)]
    parquet(tmp_path / "a.parquet", {"text": texts}, use_dictionary=False, write_batch_size=64)
    assert (tmp_path / "a.parquet").stat().st_size > 5 * corpus._PARQUET_BUFFER
    assert [text for _, text in read(tmp_path)[0]] == texts
    assert 0 <= min(most) and max(most) <= 2 * corpus._PARQUET_BUFFER


def test_parquet_that_cannot_be_read(tmp_path, parquet):
    import pyarrow

    parquet(tmp_path / "none.parquet", {"content": ["one"]})
    parquet(tmp_path / "numbers.parquet", {"text": [1, 2]})
    latin = pyarrow.Array.from_buffers(
        pyarrow.string(),
        2,
        [None, pyarrow.py_buffer(np.array([0, 1, 2], np.int32)), pyarrow.py_buffer(b"\xe9b")],
    )
    parquet(tmp_path / "latin.parquet", {"text": latin})
    parquet(tmp_path / "damaged.parquet", {"text": [os.urandom(50).hex() for _ in range(1000)]})
    content = bytearray((tmp_path / "damaged.parquet").read_bytes())
    content[4:20_000] = bytes(len(content[4:20_000]))
    (tmp_path / "damaged.parquet").write_bytes(content)
    (tmp_path / "cut.parquet").write_bytes(content[:-20])
    for name, why in (
        ("none", 'without a "text". Give its lines or rows'),
        ("cut", "Parquet magic bytes not found.*copy it again"),
    ):
        with pytest.raises(InputError, match=f"{name}.parquet cannot be read: {why}"):
            read_documents(tmp_path / f"{name}.parquet")
    for name, why in (
        ("numbers", r"without a \"text\" \(.*row 1\)"),
        ("damaged", "Couldn't deserialize.*copy it again"),
    ):
        with pytest.raises(InputError, match=f"{name}.parquet cannot be read: {why}"):
            read(tmp_path / f"{name}.parquet")
    assert read(tmp_path / "latin.parquet")[0] == [("latin.parquet, row 2", "b")]
    documents, report = read(tmp_path)
    assert [text for _, text in documents] == ["b"]
    assert report.skipped == {"unreadable": 2, "not UTF-8": 1, 'without a "text"': 3}


def test_what_takes_a_package_to_read_says_which(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "zstd", None)
    monkeypatch.setattr(corpus.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "a.txt.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    for name, advice in (("a.txt.zst", "pip install backports.zstd"), ("b.parquet", "pip install pyarrow")):
        with pytest.raises(InputError, match=rf"{name} cannot be read: .*\({advice}\).*leave it out"):
            read_documents(tmp_path / name)
    (tmp_path / "c.txt").write_text("text")
    documents, report = read(tmp_path)
    assert len(documents) == 1 and report.skipped.total() == 2 and "which takes pyarrow" in report.warning()


def test_stdin(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("\ufeffpiped".encode())))
    assert read("-")[0] == [("stdin", "piped")]


def test_a_pipe_is_read_to_its_end(tmp_path):
    """As the shell's <(…) names one: it cannot be rewound."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("out of a pipe",), daemon=True)
    writer.start()
    assert read([pipe])[0] == [("pipe", "out of a pipe")]
    writer.join()


def test_what_is_no_text_is_counted(tmp_path, caplog):
    (tmp_path / "latin.txt").write_bytes("caf\u00e9 ".encode("latin-1") * 10)
    for order in ("le", "be"):
        (tmp_path / f"notepad-{order}.txt").write_bytes("\ufeffplain".encode(f"utf-16-{order}"))
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "blank.txt").write_bytes(b" \n\t ")
    (tmp_path / "library.so").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "broken.xz").write_bytes(lzma.compress(b"text" * 1000)[:-20])
    (tmp_path / "broken.gz").write_bytes(gzip.compress(b"text" * 1000)[:-20])
    (tmp_path / "noise.gz").write_bytes(b"no gzip at all")
    (tmp_path / "fine.txt").write_bytes(b"fine")
    bad = [
        b"{",
        b"[1]",
        b'{"text": 3}',
        b'{"title": "none"}',
        b'{"text": ""}',
        b'{"text": "\\ud800"}',
        b"[" * 100_000,
    ]
    (tmp_path / "mixed.jsonl").write_bytes(b"\n".join([*bad, b'{"text": "\xff"}', b'{"text": "good"}']))
    documents, report = read(tmp_path)
    assert [text for _, text in documents] == ["fine", "good"]
    assert report.skipped == {
        "not UTF-8": 4,
        "with lone surrogates": 1,
        "empty": 3,
        "binary": 1,
        "unreadable": 3,
        "not JSON": 2,
        'without a "text"': 3,
    }
    assert r"with lone surrogates (first:" in report.warning() and r"line 6, \ud800" in report.warning()
    assert "latin.txt, byte 3" in report.warning() and "Documents left out: 17" in report.warning()
    assert len(list(read_documents(tmp_path))) == 2
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "left out: 17" in caplog.text


LATER = 3 * _SNIFF_BYTES


@pytest.mark.parametrize(
    "name, content, why",
    [
        ("a.txt", b"caf\xe9", r"not UTF-8 \(byte 3\). Convert it to UTF-8"),
        ("a.gz", b"no gzip at all", "Not a gzipped file.*copy it again"),
        ("a.txt.xz", lzma.compress(b"\xff"), "not UTF-8"),
        ("a.jsonl.xz", b"no xz", "Input format not supported.*copy it again"),
        ("a.jsonl.bz2", b"no bzip2", "Invalid data stream.*copy it again"),
        ("a.txt.lz4", b"\x04\x22\x4d\x18", "packed in a way that is not read .*bz2 and .zst are.. Unpack it"),
        ("a.tar.gz", gzip.compress(b"text"), "packed in a way that is not read"),
        ("a.tzst", b"\x28\xb5\x2f\xfd", "packed in a way that is not read"),
    ],
)
def test_a_named_file_that_cannot_be_read_is_refused_at_once(tmp_path, name, content, why):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.txt").write_text("good")
    with pytest.raises(InputError, match=f"{name} cannot be read.*{why}.*leave it out"):
        read_documents([tmp_path / "good.txt", tmp_path / name])
    documents, report = read([tmp_path])  # as part of a folder it is left out
    assert documents == [("good.txt", "good")] and report.skipped.total() == 1


@pytest.mark.parametrize(
    "name, content, why",
    [
        ("a.txt", b"a" * LATER + b"\xff", rf"not UTF-8 \(.*byte {LATER:,}\)"),
        ("a.txt.gz", gzip.compress(os.urandom(LATER).hex().encode())[:-20], "Compressed file ended.*again"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "good"}\n' * LATER)[:-20], "Compressed file ended.*again"),
        ("a.jsonl", b"one\ntwo\n", r"not JSON \(.*line 1\). Make it one JSON object a line"),
        (
            "a.jsonl",
            b'{"text": "\\udfff"}',
            r"with lone surrogates \(.*line 1, .udfff\). Spell characters by both",
        ),
        ("a.jsonl", b"{}\n", r"without a \"text\" \(.*\). Give its lines or rows a \"text\""),
    ],
)
def test_a_named_file_that_turns_out_unreadable_is_an_error(tmp_path, name, content, why):
    (tmp_path / name).write_bytes(content)
    documents = read_documents([tmp_path / name])
    with pytest.raises(InputError, match=f"{name} cannot be read: {why}"):
        list(documents)
    read([tmp_path])


def test_lines_and_emptiness_of_a_named_file_are_left_out(tmp_path, monkeypatch):
    (tmp_path / "c.txt").write_text("a" + "\u00e9" * LATER)  # a letter is cut in two where the beginning ends
    assert read(tmp_path / "c.txt")[0] == [("c.txt", "a" + "\u00e9" * LATER)]
    (tmp_path / "a.jsonl").write_text('one\n{"text": "good"}\n{"text": " "}\n')
    (tmp_path / "b.txt").write_text("")
    documents, report = read([tmp_path / "a.jsonl", tmp_path / "b.txt"])
    assert [text for _, text in documents] == ["good"] and report.skipped == {"not JSON": 1, "empty": 2}
    assert "a.jsonl, line 1" in report.warning() and report.documents == 1
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"\xff")))
    with pytest.raises(InputError, match="stdin cannot be read: not UTF-8"):
        read("-")


def test_a_named_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match="cannot be read: Permission denied. Get the right to read it"):
        read(tmp_path)


def test_the_advice_is_for_the_reason(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    for error, advice in (
        (PermissionError(13, "Permission denied"), "Get the right to read it"),
        (OSError(5, "Input/output error"), "See to the disk that it is on"),
    ):

        def refuse(path, error=error):
            raise error

        monkeypatch.setattr(corpus, "_open", refuse)
        with pytest.raises(InputError, match=f"a.txt cannot be read: {error.strerror}. {advice}, or leave"):
            read_documents(tmp_path / "a.txt")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file_and_folder(folder):
    (folder / "a.txt").chmod(0)
    (folder / "sub").chmod(0)
    try:
        documents, report = read(folder)
    finally:
        (folder / "sub").chmod(0o755)
    assert [title for title, _ in documents] == ["b.py", "tests/t.py"] and report.skipped["unreadable"] == 2


def test_loops_of_links_end(folder):
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "dangling.txt").symlink_to(folder / "nowhere")
    assert len(read(folder)[0]) == 5


def test_a_link_to_itself_is_left_out(folder):
    (folder / "circle.txt").symlink_to("circle.txt")
    (folder / "sub" / "long.txt").symlink_to("x" * 300)
    documents, report = read(folder)
    assert len(documents) == 5 and report.skipped["unreadable"] == 2
    assert "circle.txt: Too many levels" in report.warning()
    assert read(folder, exclude=["circle.txt", "long.txt"])[1].skipped["unreadable"] == 0


def test_paths_are_checked_before_reading(folder):
    with pytest.raises(InputError, match="nowhere does not exist"):
        read_documents([folder, "/nowhere"])
    with pytest.raises(InputError, match="No text"):
        read_documents([])


def test_document_hash_names_the_text():
    assert document_hash("a") == document_hash("a") != document_hash("b")
    assert -(2**63) <= document_hash("anything") < 2**63
    assert len({document_hash(str(i)) for i in range(10_000)}) == 10_000


def test_split_depends_on_text_and_seed_only(seed):
    documents = [Document(str(i), f"text {i // 2}") for i in range(20_000)]  # every text twice
    kept, held = split_documents(documents, 0.2, seed)
    # of 10,000 texts, each twice there, 40 more or fewer are one standard deviation
    assert 3500 < len(held) < 4500 and len(kept) + len(held) == 20_000
    assert not {d.text for d in kept} & {d.text for d in held}
    again = split_documents(documents[::-1], 0.2, seed)
    assert {d.text for d in again[1]} == {d.text for d in held}
    assert split_documents(documents, 0.2, seed + 1)[1] != held
    smaller = split_documents(documents, 0.1, seed)[1]
    assert {d.text for d in smaller} < {d.text for d in held}


def test_split_leaves_no_side_empty():
    documents = [Document("", text) for text in "abc"]
    for fraction in (1e-9, 0.5, 1 - 1e-9):
        assert all(split_documents(documents, fraction))
    assert split_documents(documents, 0.0) == (documents, [])
    assert split_documents(documents, 1.0) == ([], documents)
    assert sum(map(len, split_documents(documents[:1], 0.5))) == 1
    with pytest.raises(InputError, match="0 to 1"):
        split_documents(documents, 1.5)


def test_folders_that_are_left_out(tmp_path):
    for name in ("a/b", "a/c", "d"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "text.txt").write_text(name)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    found, _ = read(tmp_path / "link", leave_out=[tmp_path / "in" / "a" / "b", tmp_path / "in" / "nowhere"])
    assert found == [("a/c/text.txt", "a/c"), ("d/text.txt", "d")]


def test_runs_and_retrieval_sets_are_no_text(tmp_path):
    """In a folder they are left out, named they are an error; a file of theirs may be wanted."""
    for folder, names in (
        ("run", ["train.json", "tokenizer.model"]),
        ("set", ["manifest.json", "chunks.npy"]),
        ("set.build", ["plan.json", "lock"]),
    ):
        (tmp_path / "in" / folder).mkdir(parents=True)
        for name in names:
            (tmp_path / "in" / folder / name).write_text(name)
    (tmp_path / "in" / "mine").mkdir()
    (tmp_path / "in" / "mine" / "manifest.json").write_text("{}")
    assert read(tmp_path / "in")[0] == [("mine/manifest.json", "{}")]
    kinds = {"run": "a training run", "set": "a retrieval set", "set.build": "an unfinished retrieval set"}
    for name, kind in kinds.items():
        with pytest.raises(
            InputError, match=f"{name} is {kind}, and no text. Give the text that it was made from"
        ):
            read_documents([tmp_path / "in" / "mine", tmp_path / "in" / name])
    assert read(tmp_path / "in" / "run" / "train.json")[0] == [("train.json", "train.json")]


def test_a_dataset_in_arrow_is_no_text(tmp_path):
    """As `save_to_disk` of `datasets` writes it: what it says about the rows must not be read in their place."""
    for split in ("train", "test"):
        (tmp_path / "in" / "set" / split).mkdir(parents=True)
        (tmp_path / "in" / "set" / split / "data-00000-of-00001.arrow").write_bytes(b"\xff\xff\xff\xff\x10\0")
        for name in ("state.json", "dataset_info.json"):
            (tmp_path / "in" / "set" / split / name).write_text('{\n  "features": {}\n}')
    (tmp_path / "in" / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    (tmp_path / "in" / "mine").mkdir()
    for name in ("state.json", "dataset_dict.json"):
        (tmp_path / "in" / "mine" / name).write_text(name)
    found, report = read(tmp_path / "in")
    assert found == [("mine/dataset_dict.json", "dataset_dict.json"), ("mine/state.json", "state.json")]
    assert report.skipped == {"in Arrow, which is not read (Parquet is: Dataset.to_parquet)": 2}
    with pytest.raises(
        InputError, match=r"Dataset\.to_parquet\)\. Write its rows as Parquet or JSON lines, or leave"
    ):
        read_documents(tmp_path / "in" / "set" / "test" / "data-00000-of-00001.arrow")
