"""BPE out of a `tokenizer.json`, as pretrained models bring it: byte-level (GPT-2, Llama 3, Qwen, GPT-NeoX, …), or with
byte fallback (Llama 2, Mistral, Gemma, …).

Such a tokenizer can spell every byte, so it loses nothing, if one leaves out what a file may ask for before that:
normalisation, and special tokens recognised in the text. Text that is normalised already (NFC, nearly all there is)
gets the ids that the pretrained model knows. With byte fallback a space is written as U+2581: a literal one is written
as its bytes here, and no space is put before a text, which changes the ids of its first word.

Padding needs id 0, which text must never give: the end-of-text token takes it, and the token that had it gets the
end's id.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from retro_kernels.config import InputError

_SPACE = "\u2581"
_SEGMENT_CHARS = 1 << 18  # tokenizers takes 200 bytes a character
_BORDER = re.compile(r"[^\W\d_](?=[ \n][^\W\d_])")  # where a word ends, before another one
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>")

ANOTHER = "Give another, or none: then one is trained on your own text."
"""What to do about a tokenizer that cannot be used."""


class TokenizerJson:
    """The backend of a `Tokenizer`: `pieces`, the bytes of each id (none for special ones), and `encode`."""

    bos_id, unk_id = -1, -1
    eos_id = 0

    def __init__(self, model: bytes, source: str) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(f"{source} needs the package tokenizers: pip install tokenizers") from error
        try:
            values = json.loads(model)
            added = values["added_tokens"]
            self._falls_back = values["model"].get("byte_fallback", False)
            self.file_bos_id = _before_text(values.get("post_processor"))
            values |= {"normalizer": self._normalizer(), "post_processor": None}
            if values["model"].get("dropout"):  # each call would cut a text another way
                values["model"]["dropout"] = None
            if (values.get("pre_tokenizer") or {}).get("type") == "Metaspace":
                values["pre_tokenizer"] |= {"prepend_scheme": "never", "add_prefix_space": False}
            backend = tokenizers.Tokenizer.from_str(json.dumps(values))
        except Exception as error:  # the library raises plain Exception
            reason = str(error).split("\n")[0]
            raise InputError(
                f"Tokenizer: {source} is no tokenizer.json that can be read ({reason})."
            ) from None
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True  # those that the text spells are text
        self._backend: Any = backend
        special = {token["content"]: token["id"] for token in added if token["special"]}
        plain = {token["id"] for token in added if not token["special"]}
        self.special_text = "".join(special)
        ends = [special[name] for name in _ENDS if name in special] or [0][: 0 in special.values()]
        vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self._bytes = _FALLBACK if self._falls_back else _LETTERS
        broken = None
        if not ends:
            broken = f"it has no special token that ends a text, such as {', '.join(_ENDS[:3])}"
        elif missing := [byte for byte, token in enumerate(self._bytes) if token not in vocabulary]:
            broken = f"it is no BPE that can spell every byte (byte {missing[0]} has no token)"
        elif any(token["lstrip"] or token["rstrip"] for token in added if not token["special"]):
            broken = "it has tokens that swallow white space"
        if broken:
            raise InputError(f"Tokenizer: {source} cannot be used: {broken}. {ANOTHER}")
        self.file_pad_id: int = ends[0]
        self.pieces = [b""] * (max(vocabulary.values()) + 1)
        for token, i in vocabulary.items():
            if token not in special:
                literal = i in plain and not self._falls_back
                self.pieces[i] = token.encode() if literal else self._piece(token)
        self.pieces[0], self.pieces[self.file_pad_id] = b"", self.pieces[0]
        inside = (piece[i - 1 : i + 1] for piece in self.pieces for i in range(1, len(piece)))
        self._joined = {pair for pair in inside if pair[1:] in (b" ", b"\n")}
        self._literal_space = [vocabulary[self._bytes[byte]] for byte in _SPACE.encode()]

    def _normalizer(self) -> dict[str, Any] | None:
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
        return spaces if self._falls_back else None

    def _piece(self, token: str) -> bytes:
        if self._falls_back:
            byte = _FALLBACK_BYTES.get(token)
            return token.replace(_SPACE, " ").encode() if byte is None else bytes([byte])
        return bytes(_BYTES[letter] for letter in token) if _BYTES.keys() >= set(token) else token.encode()

    def encode(self, text: str) -> Iterator[list[int]]:
        """The ids of `text`, in parts."""
        for n, part in enumerate(text.split(_SPACE) if self._falls_back else [text]):
            ids = self._literal_space if n else []
            for segment in self._segments(part):
                ids = ids + self._backend.encode(segment, add_special_tokens=False).ids
                yield [self.file_pad_id if i == 0 else i for i in ids] if self.file_pad_id else ids
                ids = []

    def _segments(self, text: str) -> Iterator[str]:
        """A long text, cut where a word ends that no token joins to the white space behind it: at such places these
        tokenizers divide a text, too, so that the ids are those of the whole."""
        start = 0
        while len(text) - start > _SEGMENT_CHARS:
            ends = (border.end() for border in _BORDER.finditer(text, start + _SEGMENT_CHARS))
            cut = next((i for i in ends if text[i - 1 : i + 1].encode()[-2:] not in self._joined), len(text))
            yield text[start:cut]
            start = cut
        if start < len(text) or not text:
            yield text[start:]


def _before_text(post_processor: dict[str, Any] | None) -> int | None:
    """The id of the one token that the file has put before every text."""
    for part in (post_processor or {}).get("processors", [post_processor or {}]):
        if part.get("type") == "TemplateProcessing":
            first, *rest = part["single"]
            if "SpecialToken" in first and rest and "Sequence" in rest[0]:
                (i,) = part["special_tokens"][first["SpecialToken"]["id"]]["ids"]
                return i
    return None


def _letters() -> list[str]:
    """The letter that stands for each byte: itself where it prints, or else the next one from U+0100 on."""
    printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
    rest = iter(range(256, 512))
    return [chr(byte if byte in printing else next(rest)) for byte in range(256)]


_LETTERS = _letters()
_BYTES = {letter: byte for byte, letter in enumerate(_LETTERS)}
_FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]
_FALLBACK_BYTES = {token: byte for byte, token in enumerate(_FALLBACK)}
