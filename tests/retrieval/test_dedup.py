"""De-duplication: hashes against sets of strings, planted copies, and real textbooks."""

from __future__ import annotations

import errno
import io
import json
import lzma
import math
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retro_kernels.config import InputError
from retro_kernels.data.corpus import Document
from retro_kernels.retrieval.dedup import (
    DuplicateFinder,
    MinHash,
    _Words,
    bands_and_rows,
    deduplicate,
    find_copies,
    gram_hashes,
    jaccard,
)


def words(num: int, vocabulary: int = 800) -> list[str]:
    return [f"w{random.randrange(vocabulary)}" for _ in range(num)]


def grams(text: list[str], n: int = 13) -> set[tuple[str, ...]]:
    n = min(n, len(text))
    return {tuple(text[i : i + n]) for i in range(len(text) - n + 1)} if text else set()


def edited(text: list[str], edits: int) -> list[str]:
    text = list(text)
    for place in random.sample(range(len(text)), edits):
        text[place] = f"x{random.randrange(10**6)}"
    return text


def test_what_decides_is_in_the_fingerprint() -> None:
    documents = [Document("a", " ".join(words(40))), Document("b", "c")]
    options: list[dict[str, Any]] = [{}, {"threshold": 0.8001}, {"n": 12}]
    made = [DuplicateFinder(documents, **some) for some in options]
    made += [DuplicateFinder(documents[:1]), DuplicateFinder(documents[::-1])]
    assert len({finder.fingerprint for finder in made}) == 5
    assert DuplicateFinder(documents).fingerprint == made[0].fingerprint


@pytest.mark.parametrize("length", [0, 1, 12, 13, 14, 300])
def test_jaccard_of_hashes_is_that_of_strings(seed: int, length: int) -> None:
    a = words(length)
    hashes = _Words()
    for b in (a, edited(a, min(3, length)), words(length), a + words(20), []):
        x, y = (gram_hashes(hashes(" ".join(text))) for text in (a, b))
        union = grams(a) | grams(b)
        want = len(grams(a) & grams(b)) / len(union) if union else 0.0
        assert jaccard(x, y) == pytest.approx(want)
        assert len(x) == len(grams(a))


def test_a_document_takes_no_longer_after_many_words() -> None:
    hashes, text = _Words(), " ".join(f"w{i}" for i in range(50))

    def seconds() -> float:
        hashes(text)  # what is new is hashed here
        start = time.process_time()
        for _ in range(200):
            hashes(text)
        return time.process_time() - start

    before = seconds()
    hashes(" ".join(f"x{i}" for i in range(300_000)))
    assert seconds() < 10 * before + 0.1  # a pass over all that is known takes 500 times as long


def test_case_and_punctuation_do_not_matter(seed: int) -> None:
    text = " ".join(words(100))
    finder = DuplicateFinder([Document("a", text)])
    assert finder.find(text.upper().replace(" ", ",\n ")) == ("a", 1.0)


def test_signatures_estimate_the_jaccard_index(seed: int) -> None:
    generator, minhash = np.random.default_rng(seed), MinHash(2048)
    pool = generator.integers(0, 2**64, 3000, dtype=np.uint64)
    a, b = pool[:2000], pool[1000:]  # 1000 of 3000
    assert (minhash(a) == minhash(b)).mean() == pytest.approx(1 / 3, abs=0.06)  # 6 standard deviations
    assert (minhash(pool[:20_000]) == np.minimum(minhash(a), minhash(b))).all()


def test_planted_copies_are_found_and_nothing_else(seed: int) -> None:
    originals = [words(400, 5000) for _ in range(150)]
    finder = DuplicateFinder(Document(str(i), " ".join(text)) for i, text in enumerate(originals))
    clear, doubtful = 0, 0
    for i, text in enumerate(originals):
        for edits in (0, 1, 3, 8):
            copy = edited(text, edits)
            truth = len(grams(text) & grams(copy)) / len(grams(text) | grams(copy))
            found = finder.find(" ".join(copy))
            if truth >= 0.8:
                doubtful += truth < 0.9 and found is None
                clear += truth >= 0.9 and found is None
                assert found is None or found == (str(i), pytest.approx(truth))
            else:
                assert found is None
        assert finder.find(" ".join(words(400, 5000))) is None
    # a band is hit with 99.9995 % at 0.9, with 99 % at 0.8; about 150 pairs are clear, and as many doubtful
    assert clear <= 1 and doubtful <= 12


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.6, 0.8])
def test_pairs_just_above_any_threshold_are_found(seed: int, threshold: float) -> None:
    # a text of n words and one that begins with s of them: s − 12 grams in common of 2n − 24 − (s − 12)
    n, pairs, missed = 200, 100, 0
    grams_of_one = n - 12
    shared = math.ceil(2 * grams_of_one * threshold / (1 + threshold))
    texts = [[f"w{i}x{j}" for j in range(n)] for i in range(pairs)]
    finder = DuplicateFinder(
        (Document(str(i), " ".join(t)) for i, t in enumerate(texts)), threshold=threshold
    )
    for i, text in enumerate(texts):
        mark = random.randrange(10**9)  # other words, other hashes, in every run
        copy = text[: shared + 12] + [f"y{mark}z{j}" for j in range(n - shared - 12)]
        truth = len(grams(text) & grams(copy)) / len(grams(text) | grams(copy))
        assert threshold <= truth <= threshold + 0.01
        found = finder.find(" ".join(copy))
        assert found is None or found == (str(i), pytest.approx(truth))
        missed += found is None
    assert missed <= 10  # one is expected at most; of 16 bands of 8 rows it were 94 at 0.5


@pytest.mark.parametrize(
    "threshold, size, total", [(0.56, 14, 25), (0.68, 17, 25), (0.28, 7, 25), (0.5, 1, 2)]
)
def test_what_just_reaches_the_threshold_is_a_copy(
    monkeypatch: pytest.MonkeyPatch, threshold: float, size: int, total: int
) -> None:
    """A part of a document, and a document of which it is a part; one word less is none."""
    monkeypatch.setattr("retro_kernels.retrieval.dedup._MISSED", 1e-12)
    words = [f"w{i}" for i in range(total)]
    for ours, theirs in ((size, total), (total, size)):
        finder = DuplicateFinder([Document("a", " ".join(words[:theirs]))], n=1, threshold=threshold)
        assert finder.find(" ".join(words[:ours])) == ("a", size / total)
    finder = DuplicateFinder([Document("a", " ".join(words))], n=1, threshold=threshold)
    assert finder.find(" ".join(words[: size - 1]) or "other") is None
    several = [
        Document(str(count), " ".join(f"{count}x{i}" for i in range(count))) for count in (90, 5, 70, 20)
    ]
    finder = DuplicateFinder(several, n=1, threshold=threshold)
    assert [finder.find(document.text) for document in several] == [(one.title, 1.0) for one in several]


def test_bands_miss_one_in_a_hundred_at_the_threshold() -> None:
    for threshold in np.linspace(0.01, 1, 100).tolist():
        bands, rows = bands_and_rows(threshold)
        assert (1 - threshold**rows) ** bands <= 0.01 + 1e-12
        assert bands * rows <= 128 or (rows == 1 and bands <= 460)


def test_the_best_match_is_named(seed: int) -> None:
    text = words(500, 5000)
    finder = DuplicateFinder([Document("near", " ".join(edited(text, 2))), Document("same", " ".join(text))])
    assert finder.find(" ".join(text)) == ("same", 1.0)


def test_of_many_near_copies_few_are_compared(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retro_kernels.retrieval.dedup._GRAMS", 3000)
    text = words(600, 5000)
    originals = [*(edited(text, random.choice([0, 1, 1, 2])) for _ in range(100)), words(300, 5000)]
    sets = [grams(t) for t in originals]
    finder = DuplicateFinder(Document(str(i), " ".join(t)) for i, t in enumerate(originals))
    assert max(map(len, finder._buckets.values())) <= len({tuple(t) for t in originals})
    compared: list[int] = []

    def counted(a: np.ndarray, b: np.ndarray) -> float:
        compared.append(1)
        return jaccard(a, b)

    monkeypatch.setattr("retro_kernels.retrieval.dedup.jaccard", counted)
    for _ in range(20):
        copy = edited(text, random.choice([0, 1, 2]))
        own = grams(copy)
        truth = [len(other & own) / len(other | own) for other in sets]
        best = max(truth)
        assert finder.find(" ".join(copy)) == (str(truth.index(best)), pytest.approx(best))
    assert len(compared) <= 20 * 10  # of 101 documents each


def test_files_in_and_out(seed: int, tmp_path: Path) -> None:
    texts = [" ".join(words(200, 5000)) for _ in range(6)]
    train, test, out = tmp_path / "train.jsonl", tmp_path / "test.txt", tmp_path / "kept.jsonl"
    train.write_text("".join(json.dumps({"title": f"t{i}", "text": t}) + "\n" for i, t in enumerate(texts)))
    test.write_text(texts[4])
    result = deduplicate(train, test, out=out, progress=False)
    assert result["copies"] == [{"title": "t4", "against": "test.txt", "jaccard": 1.0, "index": 4}]
    assert (result["documents"], result["kept"], result["against"]) == (6, 5, 1)
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert kept == [{"title": f"t{i}", "text": texts[i]} for i in (0, 1, 2, 3, 5)]
    assert sorted(os.listdir(tmp_path)) == ["kept.jsonl", "test.txt", "train.jsonl"]


def test_a_full_disk_leaves_only_what_goes_on(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_disk(path: Path, *_: object, **__: object) -> io.TextIOWrapper:
        Path(path).touch()
        return io.TextIOWrapper(io.BufferedWriter(Full(), 1 << 20), encoding="utf-8")

    data, test, out = (tmp_path / name for name in ("train.txt", "test.txt", "kept.jsonl"))
    data.write_text(" ".join(words(100)))
    test.write_text(" ".join(words(100)))
    with monkeypatch.context() as patch:
        patch.setattr("retro_kernels.retrieval.dedup.open", full_disk, raising=False)
        with pytest.raises(OSError, match="No space left"):
            deduplicate(data, test, out=out, progress=False)
    assert sorted(os.listdir(tmp_path)) == ["kept.jsonl.partial", "test.txt", "train.txt"]
    monkeypatch.setattr(DuplicateFinder, "compare", None)
    assert deduplicate(data, test, out=out, progress=False)["kept"] == 1
    assert sorted(os.listdir(tmp_path)) == ["kept.jsonl", "test.txt", "train.txt"]


@pytest.fixture
def planted(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(training text, evaluation text): two of twelve documents are copies, and two are compared at a time."""
    monkeypatch.setattr("retro_kernels.retrieval.dedup._PART", 700)
    texts = [" ".join(words(100, 5000)) for _ in range(12)]
    test, train = tmp_path / "test.jsonl", tmp_path / "train.jsonl"
    for path, chosen in ((test, [3, 8]), (train, range(12))):
        lines = [json.dumps({"title": f"{path.stem} {i}", "text": texts[i]}) + "\n" for i in chosen]
        path.write_text("".join(lines))
    return train, test


def test_interrupted_at_any_moment_the_result_is_the_same(
    planted: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = planted
    expected = deduplicate(train, test, out=tmp_path / "whole.jsonl", progress=False)
    assert [copy["index"] for copy in expected["copies"]] == [3, 8]
    out, compare = tmp_path / "kept.jsonl", DuplicateFinder.compare
    compared: list[str] = []
    interrupted = 0

    def one_more(finder: DuplicateFinder, part: list[Document]) -> dict[str, np.ndarray]:
        if compared and not stop:
            raise KeyboardInterrupt
        compared.extend(document.title for document in part)
        stop.clear()
        return compare(finder, part)

    while True:  # each call does one part more
        stop = [True]
        try:
            with monkeypatch.context() as patch:
                patch.setattr(DuplicateFinder, "compare", one_more)
                result = deduplicate(train, test, out=out, progress=False)
            break
        except KeyboardInterrupt as said:
            interrupted += 1
            assert f"is kept in {out}.partial: the same command goes on" in str(said)
            assert not out.exists() and not (tmp_path / "kept.jsonl.tmp").exists()
            (tmp_path / "kept.jsonl.tmp").write_text("what a kill −9 leaves")
    assert interrupted == 5 and compared == [f"train {i}" for i in range(12)]
    assert result == expected and out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["kept.jsonl", "test.jsonl", "train.jsonl", "whole.jsonl"]


@pytest.mark.parametrize("change", ["a document", "one more", "evaluation text", "threshold", "damage"])
def test_what_changed_since_is_compared_again(
    planted: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    train, test = planted
    out, compare = tmp_path / "kept.jsonl", DuplicateFinder.compare
    compared: list[str] = []

    def watched(finder: DuplicateFinder, part: list[Document]) -> dict[str, np.ndarray]:
        if len(compared) == limit:
            raise KeyboardInterrupt
        compared.extend(document.title for document in part)
        return compare(finder, part)

    monkeypatch.setattr(DuplicateFinder, "compare", watched)
    limit = 10  # documents 10 and 11 are left
    with pytest.raises(KeyboardInterrupt):
        deduplicate(train, test, out=out, progress=False)
    threshold, again = 0.8, range(12)
    match change:
        case "a document":  # 9 becomes a copy of 3
            lines = train.read_text().splitlines(keepends=True)
            lines[9] = lines[3].replace("train 3", "train 9")
            train.write_text("".join(lines))
            again = range(8, 12)
        case "one more":
            with train.open("a") as file:
                file.write(json.dumps({"title": "train 12", "text": " ".join(words(100))}) + "\n")
            again = range(10, 13)
        case "evaluation text":
            test.write_text(test.read_text().splitlines()[1])
        case "threshold":
            threshold = 0.9
        case "damage":
            partial = tmp_path / "kept.jsonl.partial"
            content = bytearray(partial.read_bytes())
            content[len(content) * 7 // 10] ^= 1
            partial.write_bytes(content)
            again = range(6, 12)
    compared.clear()
    limit = -1
    result = deduplicate(train, test, out=out, threshold=threshold, progress=False)
    assert compared == [f"train {i}" for i in again]
    assert result == deduplicate(
        train, test, out=tmp_path / "whole.jsonl", threshold=threshold, progress=False
    )
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["kept.jsonl", "test.jsonl", "train.jsonl", "whole.jsonl"]


def test_bad_input(seed: int, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="does not exist"):
        deduplicate(tmp_path / "b.txt", tmp_path / "a.txt", progress=False)
    with pytest.raises(InputError, match="no evaluation document"):
        deduplicate(tmp_path / "a.txt", tmp_path / "empty", progress=False)
    for threshold in (0.0, 0.009, 1.1, float("nan")):
        with pytest.raises(InputError, match="threshold"):
            deduplicate(tmp_path / "a.txt", tmp_path / "a.txt", threshold=threshold, progress=False)
    with pytest.raises(InputError, match="one word"):
        DuplicateFinder([], n=0)
    (tmp_path / "in").mkdir()
    for name in ("b.jsonl", "in/b.jsonl"):
        text = json.dumps({"title": "b", "text": "some other text"})
        (tmp_path / name).write_text(text)
        (tmp_path / "link.jsonl").unlink(missing_ok=True)
        (tmp_path / "link.jsonl").symlink_to(tmp_path / name)
        folder = tmp_path / "in" if "/" in name else tmp_path / name
        for out in (tmp_path / name, tmp_path / "link.jsonl"):
            for data, against in (
                (tmp_path / name, tmp_path / "a.txt"),
                (tmp_path / "a.txt", [tmp_path / "a.txt", folder]),
            ):
                with pytest.raises(InputError, match="is there and among the texts to read"):
                    deduplicate(data, against, out=out, progress=False)
        assert (tmp_path / name).read_text() == text


@pytest.fixture(scope="module")
def textbooks(data: Path) -> dict[str, Document]:
    """Each edition as one document."""
    path = data / "openstax" / "openstax-dev.jsonl.xz"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    books: dict[str, list[str]] = {}
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            module = json.loads(line)
            for book in module["book"]:
                books.setdefault(book, []).append(module["text"])
    return {title: Document(title, "\n".join(texts)) for title, texts in books.items()}


def test_the_ap_edition_of_college_physics_is_found_and_other_textbooks_are_not(
    textbooks: dict[str, Document],
) -> None:
    ap = textbooks["college-physics-ap-courses-2e"]
    finder = DuplicateFinder([ap])
    names = [
        "college-physics-2e",
        "university-physics-volume-1",
        "university-physics-volume-2",
        "astronomy-2e",
        "chemistry-2e",
    ]
    found = {
        document.title: copy for document, copy in find_copies((textbooks[name] for name in names), finder)
    }
    assert {name for name, copy in found.items() if copy} == {"college-physics-2e"}
    copy = found["college-physics-2e"]
    assert copy is not None and copy.against == ap.title and 0.9 < copy.jaccard < 1.0


def test_the_result_is_no_part_of_the_text(tmp_path: Path) -> None:
    """Written into the folder that is read, and once more over itself."""
    train, test = tmp_path / "train", tmp_path / "test.txt"
    train.mkdir()
    words = [" ".join(f"w{i}x{j}" for j in range(40)) for i in range(3)]
    for i, text in enumerate(words):
        (train / f"{i}.txt").write_text(text)
    test.write_text(words[1])
    for _ in range(2):
        found = deduplicate(train, test, out=train / "clean.jsonl", progress=False)
        assert (found["documents"], found["kept"], found["skipped"]) == (3, 2, {})
    lines = (train / "clean.jsonl").read_text().splitlines()
    assert [json.loads(line)["title"] for line in lines] == ["0.txt", "2.txt"]
    held = tmp_path / "held"
    held.mkdir()
    (held / "test.txt").write_text(words[1])
    for empty in (train / "empty.txt", held / "empty.txt"):
        empty.write_text(" ")
    assert sum(deduplicate(train, held, progress=False)["skipped"].values()) == 2  # of both texts
    assert deduplicate(train, test, progress=False)["documents"] == 3 + 2  # else it is text like any other


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clean.jsonl.gz", "ends in .jsonl"),
        ("clean.txt", "ends in .jsonl"),
        ("none/clean.jsonl", "there is no folder .*none. Make it first"),
    ],
)
def test_bad_names_are_refused_before_anything_is_read(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(InputError, match=message):
        deduplicate(tmp_path / "missing", tmp_path / "a.txt", out=tmp_path / name, progress=False)
    assert [x.name for x in tmp_path.iterdir()] == ["a.txt"]


def test_what_is_no_result_is_not_replaced(tmp_path: Path) -> None:
    """Lines of others, and a text that is read; only what looks like an earlier result is written over."""
    train, test = tmp_path / "train", tmp_path / "test.txt"
    train.mkdir()
    (train / "a.txt").write_text("some text of its own")
    test.write_text("another text")
    for place in (train / "data.jsonl", tmp_path / "data.jsonl"):
        for line in ('{"text": "mine", "meta": 1}', '{"title": "a", "text": "b", "id": 3}', "no JSON"):
            place.write_text(line + "\n")
            with pytest.raises(InputError, match="is there and no result of dedup"):
                deduplicate(train, test, out=place, progress=False)
            assert place.read_text() == line + "\n"
        place.write_text('{"title": "a", "text": "b", "id": 3}')  # without an end of line
        with pytest.raises(InputError, match="is there and no result of dedup"):
            deduplicate(train, test, out=place, progress=False)
        place.write_text("")
        assert deduplicate(train, test, out=place, progress=False)["kept"] == 1
        place.unlink()


def test_scripts_without_spaces(seed: int) -> None:
    """Letters are their words: a copy with a letter changed here and there is one."""
    rng = random.Random(seed)
    letters = [chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(1500)]
    text = "".join(x + "，" * (i % 15 == 14) for i, x in enumerate(letters))
    for i in rng.sample(range(1500), 4):
        letters[i] = "が"
    copy = "".join(x + "。" * (i % 15 == 14) for i, x in enumerate(letters))
    found = DuplicateFinder([Document("a", text)]).find(copy)
    assert found is not None and 0.9 < found[1] < 1.0
    assert len(DuplicateFinder([Document("a", text)])._grams[0]) == 1500 - 12


def test_names_that_are_no_text(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/\xff.txt", "w") as file:
        file.write("some text")
    (tmp_path / "test").write_text("another")
    deduplicate(tmp_path, tmp_path / "test", out=tmp_path / "o.jsonl", progress=False)
    titles = [json.loads(line)["title"] for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert "?.txt" in titles
