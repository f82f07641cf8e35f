"""Text to token ids and back, without losing a character: a SentencePiece BPE model with byte fallback.

Or the BPE of a pretrained model's tokenizer.json (tokenizer_json.py), behind the same class.

SentencePiece is used for what it does well (learning merges and applying them); three things it does are undone here:

* It writes a space as U+2581, so a literal U+2581 in the text would come back as a space. Encoding cuts the text
  there and writes that character as its three UTF-8 bytes.
* Its decoder guesses at spaces and malformed bytes. Decoding here is a table of bytes per piece, joined.
* Its trainer keeps the corpus in memory. Here it sees a deterministic sample of bounded size.

Ids 0..3 are `<pad>`, `<unk>`, `<s>`, `</s>`; text never encodes to any of them, whatever it says. Every other id stands
for one or more bytes of UTF-8 text.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from retro_kernels.config import InputError, as_integer, write_whole

from .tokenizer_json import ANOTHER, TokenizerJson

DEFAULT_VOCAB_SIZE = 16_384
MAX_VOCAB_SIZE = 131_072
MIN_VOCAB_SIZE = 288  # 4 special, 256 bytes, 9 kinds of white space, and a few letters

_SPACE = "\u2581"  # how SentencePiece spells a space inside a piece
_SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
_WHITESPACE = ("\t", "\t\t", "\t\t\t", "\t\t\t\t", "\r\n")  # not learnable
_UNTRAINABLE = re.compile(
    "[\0\t\r\u2581\u2585]+"
)  # NUL, U+2585: SentencePiece's own marks; the others are above
_SAMPLE_CHARS = 4096  # length of a training sample: long enough to hold line ends and indentation
_SEGMENT_CHARS = 1 << 9  # SentencePiece sorts the merges of all it is given: of 64 Ki a fifth slower
_PROBE = (
    "  a  b\n\n\tc\r\n"
    + "".join(map(chr, range(33)))
    + "\u00a0\u3000\ufb01\u00c5e\u0301 \U0001f600<s></s><pad> "
)
_FILES = ("tokenizer.json", "tokenizer.model")
"""How a pretrained model and a retrieval set call theirs."""


class Tokenizer:
    """A trained tokenizer, lossless for every `str` that UTF-8 can hold: `decode(encode(text)) == text`.

    `Tokenizer(path)` opens a SentencePiece model file, or a pretrained model's tokenizer.json: a BPE that is
    byte-level or falls back to bytes.
    Models made elsewhere are accepted where they keep the same promises (id 0 pads and is never produced, byte
    fallback, no normalisation, white space kept), and refused with an InputError that names the broken one otherwise.

    A tokenizer.json has 0 exchanged with `file_pad_id`, the id that its end-of-text token has in the file (0: the
    ids are those of the file); `file_bos_id` is the token that it has put before every text, which is not done here
    (None: there is none). A model that goes by the file's ids needs to know both: `RetroFitted(base,
    pad_id=file_pad_id, bos_id=file_bos_id)`.
    """

    pad_id = 0

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        try:
            model = path.read_bytes()
        except OSError as error:
            there = next((name for name in _FILES if os.path.isfile(os.path.join(path, name))), None)
            hint = "" if there is None else f" Give the file in it: {os.path.join(path, there)}"
            raise InputError(f"Tokenizer: cannot read {path}: {error.strerror or error}.{hint}") from None
        self._load(model, str(path))

    def _load(self, model: bytes, source: str) -> None:
        if not model:
            raise InputError(
                f"Tokenizer: {source} is empty. Give a SentencePiece model file (tokenizer.model) or a tokenizer.json."
            )
        json = model[:64].lstrip().startswith(b"{")
        self._backend: _SentencePiece | TokenizerJson = (TokenizerJson if json else _SentencePiece)(
            model, source
        )
        self._model = model
        self._source = source
        self._pieces = self._backend.pieces
        self.file_pad_id = self._backend.file_pad_id
        self.file_bos_id = self._backend.file_bos_id
        self.vocab_size: int = len(self._pieces)
        self.fingerprint: str = hashlib.sha256(model).hexdigest()
        self.token_bytes = np.array([len(piece) for piece in self._pieces], dtype=np.int32)
        """int32 [vocab_size]: how many bytes of UTF-8 text each token stands for; 0 for pad, bos and eos."""
        self._check_round_trip()

    def _check_round_trip(self) -> None:
        """White space collapsed, characters normalised, a space put in front: two probes show them all."""
        probes = (_PROBE + self._backend.special_text, "a")
        encoded = [self.encode(probe) for probe in probes]
        if any(
            self.decode(ids) != probe or not self.token_bytes[ids].all()
            for probe, ids in zip(probes, encoded, strict=True)
        ):
            raise InputError(
                f"Tokenizer: {self._source} loses characters or white space. A model is needed that was trained with "
                f"identity normalisation, without dummy prefix and with white space kept. {ANOTHER}"
            )

    def __reduce__(self) -> tuple[Any, ...]:  # workers of a DataLoader get the model itself, not a path
        return _from_model, (self._model, self._source)

    def __repr__(self) -> str:
        return f"Tokenizer({self._source!r}, vocab_size={self.vocab_size})"

    @property
    def bos_id(self) -> int:
        return self._backend.bos_id

    @property
    def eos_id(self) -> int:
        return self._backend.eos_id

    @property
    def unk_id(self) -> int:
        """Never produced; −1: there is none."""
        return self._backend.unk_id

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`; no special token is added, and the text cannot spell one.

        Raises InputError for a `str` with lone surrogates, which is not Unicode text, and TypeError for no `str`.
        """
        return [i for part in self._encoded(text) for i in part]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`[encode(text) for text in texts]`, several at a time."""
        return [self.encode(text) for text in texts]

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` as an int32 array: four bytes a token where a list of a long document takes forty."""
        parts = [np.array(part, dtype=np.int32) for part in self._encoded(text)]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)

    def _encoded(self, text: str) -> Iterator[list[int]]:
        if not isinstance(text, str):
            raise TypeError(f"Tokenizer: text must be a str, not {type(text).__name__}.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"Tokenizer: the text holds a lone surrogate, U+{ord(text[error.start]):04X}, at character "
                f"{error.start}: no Unicode text, and what bytes become that are not UTF-8. Convert them to UTF-8."
            ) from None
        return self._backend.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Bytes that form no character become U+FFFD; pad, bos and eos become nothing."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`: a character whose bytes are still to come is kept as it is. InputError: not an id."""
        pieces = self._pieces
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        if ids and not (0 <= min(ids) and max(ids) < len(pieces)):
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise InputError(
                f"Tokenizer: {wrong} is no token id; this tokenizer has ids 0 to {len(pieces) - 1:,}."
            )
        return b"".join([pieces[i] for i in ids])

    def decode_batch(self, batch: Iterable[Iterable[int]]) -> list[str]:
        """`[decode(ids) for ids in batch]`; rows of an array or tensor [n, M] too."""
        return [self.decode(ids) for ids in (batch.tolist() if hasattr(batch, "tolist") else batch)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model file; it appears under its name only when whole."""
        write_whole(Path(path), self._model)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        path: str | os.PathLike[str],
        vocab_size: int | None = None,
        *,
        sample_bytes: int = 64 << 20,
    ) -> Tokenizer:
        """Learns a tokenizer from a stream of documents, writes it to `path` and returns it.

        texts: read once; of a larger stream a sample of `sample_bytes` is used, chosen by content, so the same texts
            give the same file to the last byte. Memory is bounded by the sample, about twelve times its size.
        vocab_size: exactly so many entries, 288 to 131,072. None: 16,384, or as many as the text supports.

        Raises InputError for a size out of range, for no text, and where the text is too small for the size asked;
        the message then names the largest size possible.
        """
        check_vocab_size(vocab_size)
        if isinstance(texts, str):  # of which each character would be a document
            raise TypeError("Tokenizer.train: texts are several documents; put a single one in a list.")
        sampler = TextSampler(sample_bytes)
        for text in texts:
            sampler.add(text)
        return cls.train_on_sample(sampler, path, vocab_size)

    @classmethod
    def train_on_sample(
        cls, sampler: TextSampler, path: str | os.PathLike[str], vocab_size: int | None = None
    ) -> Tokenizer:
        """As `train`, from a sample that was drawn while the documents were read for another purpose."""
        check_vocab_size(vocab_size)
        wanted = vocab_size or DEFAULT_VOCAB_SIZE
        sample = sampler.sample()
        if not sample:
            raise InputError("Tokenizer.train: there is no text to learn from (every document was empty).")
        model = _train(sample, wanted)
        tokenizer = _from_model(model, str(path))
        if vocab_size is not None and tokenizer.vocab_size < vocab_size:
            raise InputError(
                f"Tokenizer.train: vocab_size is {vocab_size:,}, but this text yields at most {tokenizer.vocab_size:,} "
                "entries. Ask for no more than that, or give more text."
            )
        tokenizer.save(path)
        return tokenizer


class _SentencePiece:
    """The backend of a `Tokenizer`: `pieces`, the bytes of each id (none for special ones), and `encode`."""

    file_pad_id, file_bos_id = 0, None
    special_text = ""  # the probe spells them already

    def __init__(self, model: bytes, source: str) -> None:
        import sentencepiece

        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise InputError(
                f"Tokenizer: {source} is not a SentencePiece model and no tokenizer.json, or is damaged. {ANOTHER}"
            ) from None
        self._processor: Any = processor
        ids = range(processor.vocab_size())
        broken = None
        if processor.pad_id() != 0 or not processor.is_control(0):
            broken = f"its padding id is {processor.pad_id()}, not 0 (training option --pad_id=0)"
        elif sum(map(processor.is_byte, ids)) != 256:
            broken = "it has no byte fallback (training option --byte_fallback)"
        if broken:
            raise InputError(f"Tokenizer: {source} cannot be used: {broken}. {ANOTHER}")
        self.bos_id, self.eos_id, self.unk_id = processor.bos_id(), processor.eos_id(), processor.unk_id()
        self.pieces = [self._piece(i) for i in ids]
        byte_ids = {self.pieces[i][0]: i for i in ids if processor.is_byte(i)}
        self._space_ids = [byte_ids[byte] for byte in _SPACE.encode()]

    def _piece(self, i: int) -> bytes:
        if self._processor.is_control(i):
            return b""
        if self._processor.is_unknown(i):
            return "\ufffd".encode()
        piece = self._processor.id_to_piece(i)
        if self._processor.is_byte(i):
            return bytes([int(piece[1:-1], 16)])
        return piece.replace(_SPACE, " ").encode()

    def encode(self, text: str) -> Iterator[list[int]]:
        """The ids of `text`, in parts: cut where no piece can reach across, so that they are those of the whole.

        U+2581 comes as a part of its own. A long text is cut between two characters that stand side by side in no
        piece: before a space, if one follows something else soon, for the pieces that are trained here hold a space
        only in front or throughout.
        """
        for part in re.split(f"({_SPACE})", text) if _SPACE in text else (text,):
            start = 0
            while len(part) - start > _SEGMENT_CHARS:
                cut = self._cut(part, start + _SEGMENT_CHARS)
                yield self._processor.encode(part[start:cut])
                start = cut
            if part == _SPACE:
                yield self._space_ids
            elif start < len(part):
                yield self._processor.encode(part[start:])

    def _cut(self, text: str, start: int) -> int:
        """The first such place from `start` on; the end of the text where there is none."""
        stop, pairs = min(start + _SEGMENT_CHARS, len(text)), self._pairs
        if (cut := _word_start(text, start, stop)) < stop and text[cut - 1 : cut + 1] not in pairs:
            return cut
        return next((i for i in range(start, len(text)) if text[i - 1 : i + 1] not in pairs), len(text))

    @cached_property
    def _pairs(self) -> set[str]:
        """Any two characters that stand side by side in a piece: nothing else is ever joined."""
        texts = (piece.decode(errors="ignore") for piece in self.pieces)
        return {text[i : i + 2] for text in texts for i in range(len(text) - 1)}


def token_dtype(vocab_size: int) -> np.dtype:
    """In which token ids are kept: uint16 where every one fits, else int32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


def check_vocab_size(vocab_size: int | None) -> None:
    """InputError for a size that no tokenizer trained here can have."""
    if vocab_size is None:
        return
    if type(as_integer(vocab_size)) is not int:
        raise InputError(f"Tokenizer.train: vocab_size is {vocab_size!r}; it must be an integer.")
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise InputError(
            f"Tokenizer.train: vocab_size is {vocab_size:,}; {MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE:,} can be had."
        )


class TextSampler:
    """A sample of a stream of texts, bounded in bytes and the same for the same stream.

    Texts are cut into pieces of some 4,096 characters; each piece gets a random number that depends on its place and
    content, and the pieces with the smallest numbers are kept (a bottom-k sample: every piece equally likely).
    """

    def __init__(self, max_bytes: int = 64 << 20) -> None:
        self.max_bytes = max_bytes
        self._heap: list[tuple[int, int, str]] = []  # (-number, place, piece): the root is the next to go
        self._bytes = 0
        self._place = 0

    def add(self, text: str) -> None:
        for piece in _training_pieces(text):
            content = piece.encode()
            digest = hashlib.blake2b(content, digest_size=8, salt=self._place.to_bytes(8, "little")).digest()
            heapq.heappush(self._heap, (-int.from_bytes(digest, "little"), self._place, piece))
            self._place += 1
            self._bytes += len(content)
            while self._bytes > self.max_bytes and len(self._heap) > 1:
                self._bytes -= len(heapq.heappop(self._heap)[2].encode())

    def sample(self) -> list[str]:
        """The pieces kept, in the order in which they came."""
        return [piece for _, _, piece in sorted(self._heap, key=lambda entry: entry[1])]


def _training_pieces(text: str) -> Iterator[str]:
    for part in _UNTRAINABLE.split(text):
        start = 0
        while start < len(part):
            cut = _piece_end(part, start)
            if piece := part[start:cut].strip("\n"):
                yield piece.encode(errors="replace").decode()
            start = cut


def _piece_end(text: str, start: int) -> int:
    """Where a piece that begins at `start` ends: where a word begins, or if none does for long, as in Chinese, at the
    end of a line or anywhere."""
    end = start + _SAMPLE_CHARS
    stop = min(end + _SAMPLE_CHARS, len(text))
    cut = _word_start(text, end, stop)
    return cut if cut < stop or stop == len(text) else text.rfind("\n", start, end) + 1 or end


def _word_start(text: str, start: int, stop: int) -> int:
    """The first place from `start` on where a space follows something else; `stop` where there is none before it."""
    while (space := text.find(" ", start, stop)) >= 0:
        if text[space - 1] != " ":
            return space
        start = space + 1
    return stop


def _train(sample: list[str], vocab_size: int) -> bytes:
    counts: Counter[str] = Counter(" \n")
    for piece in sample:
        counts.update(piece)
    letters = [letter for letter, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    # Letters get at most a quarter of the free entries; the rare rest is spelt in bytes.
    free = vocab_size - len(_SPECIAL) - 256 - len(_WHITESPACE)
    model = _train_on_letters(sample, vocab_size, letters, free // 4)
    if _entries(model) < vocab_size:  # too little text to merge: then every letter that fits gets its entry
        model = _train_on_letters(sample, vocab_size, letters, free)
    return model


def _entries(model: bytes) -> int:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()


def _train_on_letters(sample: list[str], vocab_size: int, letters: list[str], num_letters: int) -> bytes:
    import sentencepiece

    kept = {" ", "\n", *letters[: num_letters - 2]}
    if len(kept) < len(letters):
        rare = re.compile("[" + re.escape("".join(letter for letter in letters if letter not in kept)) + "]+")
        sample = [part for piece in sample for part in rare.split(piece) if part.strip("\n")] or [" "]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sample),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        byte_fallback=True,
        character_coverage=1.0,
        required_chars=_SPACE + "\n",
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        user_defined_symbols=list(_WHITESPACE),
        max_sentence_length=1 << 30,
        minloglevel=3,
    )
    return model.getvalue()


def _from_model(model: bytes, source: str) -> Tokenizer:
    tokenizer = Tokenizer.__new__(Tokenizer)
    tokenizer._load(model, source)
    return tokenizer
