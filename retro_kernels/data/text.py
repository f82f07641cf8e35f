"""The text of a long job: read as often as it is needed, under bars that know how much there is."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator

from tqdm import tqdm

from ..config import InputError
from .corpus import Document, Fingerprint, ReadReport, document_hash
from .packing import TokenDocuments, tokenise
from .tokenizer import TextSampler, Tokenizer


class Text:
    """Documents that are read anew whenever they are needed, under a progress bar, and never all held at once."""

    def __init__(
        self,
        reader: Callable[[ReadReport], Iterator[Document]],
        nothing: str,
        *,
        name: str = "",
        show: bool = True,
    ) -> None:
        """reader: see `corpus.reader_of`. nothing: begins the message where there is no text. name: tells it
        from another text of the same job."""
        self._reader, self._nothing, self._name, self._show = reader, nothing, name, show
        self._characters: int | None = None
        self._fingerprint = ""
        self.skipped: Counter[str] = Counter()
        """What the survey found to be left out, by reason."""

    def survey(self, sampler: TextSampler | None = None) -> None:
        """Reads everything once, to know how much there is, and says what is left out. sampler: is given the texts.
        InputError where there is none."""
        report, characters, fingerprint = ReadReport(), 0, Fingerprint()
        with progress_bar(None, f"reading {self._name}".rstrip(), "document", show=self._show) as bar:
            for document in self._reader(report):
                characters += len(document.text)
                fingerprint.add(document_hash(document.text), document.title)
                if sampler is not None:
                    sampler.add(document.text)
                bar.update()
        warning = report.warning()
        if not characters:
            raise InputError(f"{self._nothing}. {warning or 'No file with text was found.'}")
        if warning:
            note(f"{self._name.capitalize()}: {warning}" if self._name else warning)
        self._characters, self._fingerprint, self.skipped = characters, fingerprint.hex(), report.skipped

    def known(self, characters: int, fingerprint: str) -> None:
        """What another process found, which read the same text: it is not read for that again."""
        self._characters, self._fingerprint = characters, fingerprint

    @property
    def characters(self) -> int:
        """How many there are; read for it, where they were not counted yet."""
        if self._characters is None:
            self.survey()
        assert self._characters is not None
        return self._characters

    @property
    def fingerprint(self) -> str:
        """Of the documents in their order, by text and title; read for it, where they were not counted yet."""
        return self._fingerprint if self.characters else ""

    def documents(self) -> Iterator[Document]:
        """One after another, read anew."""
        return self._reader(ReadReport())

    def tokenise(self, tokenizer: Tokenizer, chunk_size: int) -> TokenDocuments:
        """See `data.packing.tokenise`."""
        with progress_bar(self.characters, "tokenising", "character", show=self._show) as bar:
            return tokenise(self.documents(), tokenizer, chunk_size, bar.update)


def progress_bar(
    total: int | None, description: str, unit: str, *, show: bool = True, initial: int = 0
) -> tqdm:
    """On standard error, redrawn seldom where that is a file. Without a total it leaves nothing behind."""
    return tqdm(
        total=total,
        desc=description,
        unit=" " + unit,
        unit_scale=unit in ("character", "B"),  # of which there are billions
        initial=initial,
        disable=not show,
        file=sys.stderr,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10,
        smoothing=0.05,
        leave=total is not None,
        # what is found wrong at once shall be the only line of a log
        delay=1 if total is None and not sys.stderr.isatty() else 0,
        bar_format=None if unit else "{desc} …",
    )


def taken_up(bar: tqdm, count: int) -> None:
    """`count` of the total were done in an earlier call: they say nothing of the rate, and so of the time left."""
    if not bar.disable:
        bar.initial += count
        bar.last_print_n += count
        bar.n += count


_silent = False


@contextlib.contextmanager
def silent(yes: bool = True) -> Iterator[None]:
    """Within, `note` says nothing: of several processes one speaks."""
    global _silent
    before, _silent = _silent, yes
    try:
        yield
    finally:
        _silent = before


def note(message: str) -> None:
    """One line on standard error that a progress bar does not tear."""
    if not _silent:
        tqdm.write(message, file=sys.stderr)
