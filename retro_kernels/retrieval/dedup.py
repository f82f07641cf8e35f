"""Training documents that copy evaluation documents: a Jaccard index of 13-grams of 0.8 or more, RETRO's rule for
MassiveText (Borgeaud et al. 2021, arXiv 2112.04426, section 2.6).

    words → hashes of 13-grams → MinHash, up to 128 permutations → bands of rows → exact Jaccard of the candidates

Bands only propose; what is proposed is decided by the sets of hashes themselves. b bands of r rows miss a pair at J
with probability (1 − Jʳ)ᵇ, so both follow from the threshold: of the pairs that just reach it at most 1 % are missed.
At 0.8 that takes 16 × 6, which misses 0.0005 % at 0.9; at 0.5 it takes 35 × 3. The usual 8 × 16 would miss 80 % at 0.8.

What was compared is kept beside the result in `<out>.partial`, by the documents' content, until all is done.

For chunks inside documents use `leakage.containment`: a Jaccard index does not see copies shifted by six tokens.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retro_kernels.config import InputError
from retro_kernels.data.corpus import Document, document_hash, one_or_more, reader_of
from retro_kernels.data.text import Text, progress_bar, taken_up
from retro_kernels.data.words import terms
from retro_kernels.retrieval.writing import Journal, check_no_folder, journal

N = 13
THRESHOLD = 0.8
_MISSED = 0.01
_PERMUTATIONS = 128
_LOWEST = 0.01  # 459 permutations, each a band
_SLAB = 1 << 10  # hashes permuted at a time: 128 × 1 Ki × 8 B stays in the cache
_GRAMS = 1 << 16  # hashes of evaluation documents that are looked up at a time, and one document
_SEED = 20_211_208
_FIRST_LINE = 1 << 20  # bytes of it that are looked at
_PART = 4 << 20  # characters compared between two savings: a second's work


class _Words(dict[str, int]):
    """A 64-bit hash for each word, computed once."""

    def __missing__(self, word: str) -> int:
        made = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        self[word] = made
        return made

    def __call__(self, text: str) -> np.ndarray:
        words = terms(text, pairs=False)
        hashes = np.fromiter(map(self.__getitem__, words), np.uint64, len(words))
        if len(self) > 4_000_000:  # a stream of numbers and names need not stay in memory
            self.clear()
        return hashes


def gram_hashes(words: np.ndarray, n: int = N) -> np.ndarray:
    """The set of hashes of all n-grams of word hashes uint64 [w], sorted. Fewer than n words count as one gram."""
    if not len(words):
        return words[:0]
    n = min(n, len(words))
    multipliers = np.random.default_rng(_SEED).integers(1, 2**63, size=n, dtype=np.uint64) | np.uint64(1)
    count = len(words) - n + 1
    total = np.zeros(count, dtype=np.uint64)
    for i in range(n):
        total += words[i : i + count] * multipliers[i]
    total.sort()  # np.unique goes through a hash table, which is slower
    return total[np.r_[True, total[1:] != total[:-1]]]


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|a ∩ b| / |a ∪ b| of two sorted sets; 0 for two empty ones."""
    both = np.sort(np.concatenate([a, b]), kind="stable")
    common = int((both[1:] == both[:-1]).sum())
    return common / max(len(both) - common, 1)


class MinHash:
    """Signatures uint32 [size] of sets of 64-bit hashes: the smallest of each of `size` universal hashes."""

    def __init__(self, size: int) -> None:
        generator = np.random.default_rng(_SEED + 1)
        self.a = generator.integers(1, 2**63, size=size, dtype=np.uint64) | np.uint64(1)
        self.b = generator.integers(0, 2**63, size=size, dtype=np.uint64)

    def __call__(self, hashes: np.ndarray) -> np.ndarray:
        signature = np.full(len(self.a), np.iinfo(np.uint32).max, dtype=np.uint32)
        for start in range(0, len(hashes), _SLAB):
            # multiply-shift: the upper half of a·x + b
            permuted = (hashes[start : start + _SLAB, None] * self.a + self.b) >> np.uint64(32)
            signature = np.minimum(signature, permuted.min(0).astype(np.uint32))
        return signature


def bands_and_rows(threshold: float) -> tuple[int, int]:
    """The longest bands, which propose the fewest pairs in vain, with which at most 1 % of the pairs at the threshold
    are missed and 128 permutations do; of one row, with as many bands as it takes, where there are none."""
    chosen = (0, 0)
    for rows in range(1, _PERMUTATIONS + 1):
        hit = threshold**rows
        if hit < 1 / _PERMUTATIONS and rows > 1:
            break
        bands = 1 if hit >= 1 - _MISSED else math.ceil(math.log(_MISSED) / math.log1p(-hit))
        if bands * rows <= _PERMUTATIONS or rows == 1:
            chosen = (bands, rows)
    return chosen


@dataclass(frozen=True)
class Copy:
    """A training document and the evaluation document that it resembles most."""

    title: str
    against: str
    jaccard: float
    index: int
    """Which document of the training text, in the order read."""

    def to_dict(self) -> dict[str, Any]:
        return vars(self).copy()


class DuplicateFinder:
    """The evaluation documents, ready to be compared with. Memory: their n-gram hashes, 8 bytes each."""

    def __init__(self, documents: Iterable[Document], *, n: int = N, threshold: float = THRESHOLD) -> None:
        """n: words of a gram.  threshold: Jaccard index from which on a document counts as a copy, 0.01 to 1."""
        if not _LOWEST <= threshold <= 1.0:
            raise InputError(
                f"dedup: the threshold is {threshold}; a Jaccard index of {_LOWEST} to 1 is needed."
            )
        if n < 1:
            raise InputError(f"dedup: n is {n}; a gram has at least one word.")
        self.n, self.threshold = n, threshold
        self._bands, rows = bands_and_rows(threshold)
        self._words, self._minhash = _Words(), MinHash(self._bands * rows)
        self._titles: list[str] = []
        self._grams: list[np.ndarray] = []
        self._buckets: dict[bytes, list[int]] = {}
        digest = hashlib.blake2b(
            repr(("words of any script", n, threshold, self._minhash.a.tolist())).encode(), digest_size=16
        )
        seen: set[bytes] = set()
        for document in documents:
            grams = self._hashes(document.text)
            digest.update(len(grams).to_bytes(8, "little"))
            digest.update(grams.data)
            # of equal ones the first is named: the others need not be proposed
            key = hashlib.blake2b(grams.data, digest_size=16).digest()
            if len(grams) and key not in seen:
                seen.add(key)
                for band in self._keys(grams):
                    self._buckets.setdefault(band, []).append(len(self._grams))
            self._titles.append(document.title)
            self._grams.append(grams)
        self._sizes = sorted(map(len, self._grams))
        self.fingerprint = digest.hexdigest()
        """Of whatever decides which document is found, and with which Jaccard index."""

    def __len__(self) -> int:
        return len(self._titles)

    def _hashes(self, text: str) -> np.ndarray:
        return gram_hashes(self._words(text), self.n)

    def _keys(self, grams: np.ndarray) -> list[bytes]:
        signature = self._minhash(grams).reshape(self._bands, -1)
        return [i.to_bytes(2, "little") + band.tobytes() for i, band in enumerate(signature)]

    def find(self, text: str) -> tuple[str, float] | None:
        """(title, Jaccard index) of the evaluation document that the text resembles most, if it reaches the
        threshold."""
        place, index = self._find(text)
        return None if place < 0 else (self._titles[place], index)

    def _find(self, text: str) -> tuple[int, float]:
        """As `find`, with the document's place; (−1, 0) where there is none."""
        grams = self._hashes(text)
        if not len(grams):
            return -1, 0.0
        # a set cannot resemble one of a very different size: |a ∩ b| / |a ∪ b| ≤ smaller / larger. Divided as the index
        # is: a product rounds otherwise, and would miss what just reaches the threshold
        smallest = bisect.bisect_left(self._sizes, True, key=lambda size: size / len(grams) >= self.threshold)
        if smallest == len(self) or len(grams) / self._sizes[smallest] < self.threshold:
            return -1, 0.0
        proposed = sorted(set[int]().union(*(self._buckets.get(band, ()) for band in self._keys(grams))))
        bounds = self._at_most(grams, proposed)
        best = (self.threshold, -len(self))
        for i in np.argsort(-bounds, kind="stable").tolist():
            if (bounds[i], -proposed[i]) < best:
                break
            best = max(best, (jaccard(grams, self._grams[proposed[i]]), -proposed[i]))
        return (-best[1], best[0]) if -best[1] < len(self) else (-1, 0.0)

    def _at_most(self, grams: np.ndarray, places: list[int]) -> np.ndarray:
        """What the Jaccard index with each of these documents cannot exceed, float64 [n]. A gram counts as common where
        its last bits are those of one of `grams`, which is fast, and wrong for few: of many documents that resemble
        each other hardly any has to be compared for certain."""
        mask = (32 << len(grams).bit_length()) - 1
        present = np.zeros(mask + 1, dtype=bool)
        present[grams.view(np.int64) & mask] = True
        sizes = np.array([len(self._grams[place]) for place in places], np.int64)
        common, stops = np.zeros(len(places), np.int64), np.cumsum(sizes)
        for part in np.split(np.arange(len(places)), np.flatnonzero(np.diff(stops // _GRAMS)) + 1):
            if len(part):
                found = present[np.concatenate([self._grams[places[i]] for i in part]).view(np.int64) & mask]
                starts = stops[part] - sizes[part]
                common[part] = np.add.reduceat(found, starts - starts[0], dtype=np.int64)
        np.minimum(common, len(grams), out=common)
        return common / (len(grams) + sizes - common)

    def compare(self, documents: Sequence[Document]) -> dict[str, np.ndarray]:
        """For each document "place" int64 [n], that of the evaluation document which it copies, −1 for none, and
        "jaccard" float64 [n]."""
        places, indices = zip(*(self._find(document.text) for document in documents), strict=True)
        return {"place": np.array(places, np.int64), "jaccard": np.array(indices, np.float64)}

    def title(self, place: int) -> str:
        return self._titles[place]


def find_copies(
    documents: Iterable[Document],
    finder: DuplicateFinder,
    kept: Journal | None = None,
    progress: Callable[[int, bool], object] | None = None,
) -> Iterator[tuple[Document, Copy | None]]:
    """Each training document, and what it copies or None. kept: what was compared before, taken where the text is the
    same. progress: is told how many characters are done, and whether they were before."""
    kept = kept or Journal()
    index = 0
    for part in _parts(documents):
        key = " ".join(str(document_hash(document.text)) for document in part)
        before = kept.take(key)
        found = before or kept.add(finder.compare(part), key)
        if progress is not None:
            progress(sum(len(document.text) for document in part), before is not None)
        for document, place, j in zip(part, found["place"].tolist(), found["jaccard"].tolist(), strict=True):
            copy = None if place < 0 else Copy(document.title, finder.title(place), round(j, 4), index)
            yield document, copy
            index += 1


def _parts(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Some documents at a time, `_PART` characters or a bit more."""
    part: list[Document] = []
    size = 0
    for document in documents:
        part.append(document)
        size += len(document.text)
        if size >= _PART:
            yield part
            part, size = [], 0
    if part:
        yield part


Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def deduplicate(
    data: Paths,
    against: Paths,
    *,
    out: str | os.PathLike[str] | None = None,
    threshold: float = THRESHOLD,
    n: int = N,
    progress: bool = True,
) -> dict[str, Any]:
    """Finds the training documents in `data` that copy an evaluation document in `against` (`retro-kernels dedup`).

    data, against: paths as `read_documents` takes them; each is read once to know how much there is, and a pipe kept.
    out: a `.jsonl` that gets the training documents which are no copies, whole or not at all; it is no part of a folder
    in `data`. Interrupted, the same call goes on, as far as `data` is what it was; without `out` it begins again.
    progress: bars on standard error, where in any case is said what of the texts is left out.
    Returns {"documents", "against", "copies": [{"title", "against", "jaccard", "index"}, …], "kept", "threshold",
    "n", "skipped": the number of documents left out of both texts, by reason}.
    Raises InputError for paths that do not exist, text without a document, a bad threshold, or an `out` of another
    name, in no folder, that is there and one of the texts to read, or that another process is writing. Memory is
    bounded by the evaluation text, 4 Mi characters and one document.
    """
    data, against, out = one_or_more(data), one_or_more(against), None if out is None else Path(out)
    own = [] if out is None else [out, *(out.with_name(out.name + end) for end in (".partial", ".tmp"))]
    if out is not None:
        _check_out(out, data, against)
        check_no_folder(own[1])
    training, evaluation = (
        Text(
            reader_of(paths, (), (), leave_out),
            f"dedup: there is no {kind} document",
            name=f"{kind} text",
            show=progress,
        )
        for kind, paths, leave_out in (("training", data, list(map(str, own))), ("evaluation", against, []))
    )
    finder = DuplicateFinder(_shown(evaluation, progress), threshold=threshold, n=n)
    busy = f"Another process is writing {out}. Wait for it."
    copies: list[Copy] = []
    count = 0
    with (
        journal(own[1] if own else None, finder.fingerprint, busy) as kept,
        _writer(out) as write,
        progress_bar(training.characters, "comparing", "character", show=progress) as bar,
    ):

        def done(characters: int, before: bool) -> None:
            taken_up(bar, characters) if before else bar.update(characters)

        for document, copy in find_copies(training.documents(), finder, kept, done):
            count += 1
            if copy is not None:
                copies.append(copy)
            else:
                write(document)
    return {
        "documents": count,
        "against": len(finder),
        "copies": [copy.to_dict() for copy in copies],
        "kept": count - len(copies),
        "threshold": threshold,
        "n": n,
        "skipped": dict(training.skipped + evaluation.skipped),
    }


def _shown(text: Text, progress: bool) -> Iterator[Document]:
    with progress_bar(text.characters, "preparing", "character", show=progress) as bar:
        for document in text.documents():
            yield document
            bar.update(len(document.text))


def _check_out(out: Path, data: Sequence[Any], against: Sequence[Any]) -> None:
    if out.suffix.lower() != ".jsonl" or out.is_dir():
        raise InputError(
            f"dedup: out is {out}; it has to be a file with a name that ends in .jsonl, which is what is written there."
        )
    if not out.parent.is_dir():
        raise InputError(f"dedup: out is {out}, but there is no folder {out.parent}. Make it first.")
    if not out.exists() or not out.stat().st_size:
        return
    read, place = [Path(path).resolve() for path in data], out.resolve()
    # in a folder of training text it may be an earlier result, which is not read
    if place in read or any(place.is_relative_to(Path(path).resolve()) for path in against):
        raise InputError(
            f"dedup: out is {out}, which is there and among the texts to read. Give another name, or remove it first."
        )
    with open(out, "rb") as file:
        first = file.readline(_FIRST_LINE)
    try:  # a longer line is known by its beginning alone
        ours = len(first) == _FIRST_LINE or list(json.loads(first)) == ["title", "text"]
    except (ValueError, TypeError):
        ours = False
    if not (ours and first.startswith(b'{"title": ')):
        raise InputError(f"dedup: out is {out}, which is there and no result of dedup. Give another name.")


@contextlib.contextmanager
def _writer(path: Path | None) -> Iterator[Callable[[Document], object]]:
    """Writes documents to a `.jsonl` that appears under its name when all are there. None: nowhere.

    Under the lock of the journal: what a kill −9 left under the other name is written over."""
    if path is None:
        yield lambda document: None
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            yield lambda document: file.write(
                json.dumps({"title": document.title, "text": document.text}, ensure_ascii=False) + "\n"
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
