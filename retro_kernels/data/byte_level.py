"""Byte-level BPE out of a `tokenizer.json`, as pretrained models bring it (GPT-2, Llama 3, Qwen, GPT-NeoX, …).

Such a tokenizer spells every byte, so it loses nothing, if one leaves out what a file may ask for before that:
normalisation, and special tokens recognised in the text. Text that is normalised already (NFC, nearly all there is)
gets the ids that the pretrained model knows. Padding needs id 0, which text must never give: the end-of-text token
takes it, and the token that had it gets the end's id.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from retro_kernels.config import InputError

_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>")


class ByteLevel:
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
            backend = tokenizers.Tokenizer.from_str(
                json.dumps({**values, "normalizer": None, "post_processor": None})
            )
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
        plain = {token["id"]: token["content"] for token in added if not token["special"]}
        self.special_text = "".join(special)
        ends = [special[name] for name in _ENDS if name in special] or [0][: 0 in special.values()]
        vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        broken = None
        if not ends:
            broken = f"it has no special token that ends a text, such as {', '.join(_ENDS[:3])}"
        elif missing := [byte for byte, letter in enumerate(_LETTERS) if letter not in vocabulary]:
            broken = f"it is no byte-level BPE (byte {missing[0]} has no token)"
        elif any(token["lstrip"] or token["rstrip"] for token in added if not token["special"]):
            broken = "it has tokens that swallow white space"
        if broken:
            raise InputError(f"Tokenizer: {source} cannot be used: {broken}. Or train one on your own text.")
        self.file_pad_id: int = ends[0]
        self.pieces = [b""] * (max(vocabulary.values()) + 1)
        for token, i in vocabulary.items():
            if token not in special:
                self.pieces[i] = plain[i].encode() if i in plain else _bytes_of(token)
        self.pieces[0], self.pieces[self.file_pad_id] = b"", self.pieces[0]

    def encode(self, text: str) -> Iterator[list[int]]:
        """The ids of `text`, in parts."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        yield [self.file_pad_id if i == 0 else i for i in ids] if self.file_pad_id else ids


def _letters() -> list[str]:
    """The letter that stands for each byte: itself where it prints, or else the next one from U+0100 on."""
    printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
    rest = iter(range(256, 512))
    return [chr(byte if byte in printing else next(rest)) for byte in range(256)]


_LETTERS = _letters()
_BYTES = {letter: byte for byte, letter in enumerate(_LETTERS)}


def _bytes_of(token: str) -> bytes:
    return bytes(_BYTES[letter] for letter in token) if _BYTES.keys() >= set(token) else token.encode()
