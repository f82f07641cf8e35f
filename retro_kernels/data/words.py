"""The words of a text, of any script: what BM25 looks for, and what documents are compared by."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

_ASCII = re.compile(r"\w+")
UNSPACED = (
    "\u0e01-\u0e3a\u0e40-\u0e4e"  # Thai
    "\u0e81-\u0ece\u0edc-\u0edf"  # Lao
    "\u1000-\u103f\u1050-\u109f"  # Burmese
    "\u1780-\u17d3\u17d7\u17dc\u17dd"  # Khmer
    "\u3005-\u3007\u3041-\u309f\u30a1-\u30fa\u30fc-\u312f\u31f0-\u31ff\uff66-\uff9f"  # kana, bopomofo
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
)
"""Letters and vowel signs of scripts that put nothing between words."""


@lru_cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What is a piece of a text, and which pieces are of scripts without spaces."""
    # \w has letters and digits, but not the vowel signs and accents that stand on letters (of Hindi, say). Beyond 16
    # bits there are but a few of dead scripts, with which re would look for a character in a list, which is slower.
    marks = "".join(c for c in map(chr, range(0x10000)) if unicodedata.category(c) in ("Mn", "Mc"))
    letter, run = rf"[^\W{UNSPACED}]", f"[{UNSPACED}]+"
    return re.compile(f"{run}|{letter}+(?:[{marks}]+{letter}*)*"), re.compile(run)


def terms(text: str, pairs: bool = True) -> list[str]:
    """The words of a text in lower case. Where a script puts no space between words, each letter, and with `pairs` each
    pair of neighbouring ones, stands for a word, as in Lucene's analysers of Chinese and Japanese."""
    text = text.lower()
    if text.isascii():
        return _ASCII.findall(text)
    pieces, unspaced = _patterns()
    if not unspaced.search(text):
        return pieces.findall(text)
    found: list[str] = []
    for piece in pieces.findall(text):
        if unspaced.match(piece):
            found += piece
            if pairs:
                found += map("".join, zip(piece, piece[1:], strict=False))
        else:
            found.append(piece)
    return found
