"""Documents as token chunks, and chunks packed into training sequences.

Every document is cut into chunks of M tokens from its start, the last one padded with 0: the grid of the retrieval
set, so that a training chunk is a chunk of the set where its document is. A sequence is a run of whole chunks, of one
document or of several. S sequences, N tokens in each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ..config import InputError
from .corpus import Document, document_hash
from .tokenizer import Tokenizer, token_dtype

IGNORE = -100
"""A target that is not scored (the default of torch's cross_entropy)."""


@dataclass
class TokenDocuments:
    """Token chunks of documents, one after another."""

    chunks: np.ndarray
    """uint16 or int32 [C, M], 0 after a document's end."""
    starts: np.ndarray
    """int64 [D + 1]: document d has chunks starts[d] … starts[d + 1] − 1."""
    hashes: np.ndarray
    """int64 [D], `document_hash` of each."""
    titles: list[str]
    num_bytes: np.ndarray
    """int64 [D], UTF-8 bytes of each document."""
    num_words: np.ndarray
    """int64 [D], runs of anything but white space."""

    @property
    def num_documents(self) -> int:
        return len(self.titles)

    def fingerprint(self) -> str:
        """SHA-256 over the texts and the size of a chunk; of the tokenizer it says nothing."""
        size = self.chunks.shape[1].to_bytes(4, "little")
        return hashlib.sha256(self.hashes.tobytes() + size).hexdigest()

    def of_chunks(self) -> np.ndarray:
        """int64 [C]: the document of each chunk."""
        return np.repeat(np.arange(self.num_documents), np.diff(self.starts))

    def tokens(self, document: int) -> np.ndarray:
        """The tokens of one document, without the padding."""
        flat = self.chunks[self.starts[document] : self.starts[document + 1]].reshape(-1)
        return flat[: np.count_nonzero(flat)]  # encoding never gives 0


def tokenise(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    chunk_size: int,
    progress: Callable[[int], object] | None = None,
) -> TokenDocuments:
    """Encodes and cuts all documents; those without text are left out, for they have no chunk.

    documents: taken one by one, and none is kept. progress: is told the characters of each when it is done.
    Raises InputError where there is no text.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    # it grows in place, where joining arrays at the end would take all of the memory twice
    grown = bytearray()
    titles, hashes, lengths, num_bytes, num_words = [], [], [], [], []
    for document in documents:
        tokens = tokenizer.encode_array(document.text)
        if progress is not None:
            progress(len(document.text))
        if not len(tokens):
            continue
        chunks = np.zeros((-(-len(tokens) // chunk_size), chunk_size), dtype)
        chunks.reshape(-1)[: len(tokens)] = tokens
        grown += chunks.tobytes()
        lengths.append(len(chunks))
        titles.append(document.title)
        hashes.append(document_hash(document.text))
        num_bytes.append(len(document.text.encode()))
        num_words.append(len(document.text.split()))
    if not titles:
        raise InputError("There is no document with text: every one was empty, unreadable or left out.")
    starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    return TokenDocuments(
        np.frombuffer(grown, dtype).reshape(-1, chunk_size),
        starts,
        np.array(hashes, np.int64),
        titles,
        np.array(num_bytes, np.int64),
        np.array(num_words, np.int64),
    )


@dataclass
class Sequences:
    """What one forward pass reads. All int64."""

    tokens: np.ndarray
    """[B, N]"""
    targets: np.ndarray
    """[B, N], the next token of each; `IGNORE` where nothing is to be learnt."""
    documents: np.ndarray
    """[B, E]: the set's ids of the documents in each sequence, −1 to fill up."""


class Packed:
    """Training sequences of whole chunks in an order that depends on the seed only.

    The documents are shuffled once and laid one after another; sequence s is the s-th run of N tokens. Every epoch
    visits the sequences in a new order, and `sequence(i)` is the i-th one visited, for any i, so a run can continue
    anywhere.

    The target of a document's last token is the pad that follows it (the end of the document), also where the document
    fills its last chunk and no pad is stored; a document's first token is learnt where a pad stands before it.
    """

    def __init__(
        self,
        documents: TokenDocuments,
        sequence_length: int,
        seed: int,
        set_ids: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        """`set_ids` maps document hashes to the ids of the same documents in the retrieval set, −1 for none."""
        chunk_size = documents.chunks.shape[1]
        if sequence_length % chunk_size:
            raise InputError(
                f"A sequence consists of whole chunks: {sequence_length} tokens are not a multiple of "
                f"{chunk_size}."
            )
        self.seed, self.length = seed, sequence_length
        order = np.random.default_rng([seed, 0]).permutation(documents.num_documents)
        spans = [np.arange(documents.starts[d], documents.starts[d + 1]) for d in order]
        self._chunks = documents.chunks
        self._order = np.concatenate(spans)  # chunk ids in the order of the training text
        ids = np.full(documents.num_documents, -1, np.int64) if set_ids is None else set_ids(documents.hashes)
        owner = documents.of_chunks()
        self._documents = ids[owner[self._order]]
        last = np.zeros(len(owner), bool)
        last[documents.starts[1:] - 1] = True
        self._ends = last[self._order]
        self._per_sequence = sequence_length // chunk_size
        self.num_sequences = -(-len(self._order) // self._per_sequence)
        self._epoch: tuple[int, np.ndarray] = -1, np.zeros(0, np.int64)

    def sequence(self, i: int) -> int:
        """The i-th sequence visited, counted over all epochs."""
        epoch, place = divmod(i, self.num_sequences)
        if self._epoch[0] != epoch:
            self._epoch = epoch, np.random.default_rng([self.seed, 1, epoch]).permutation(self.num_sequences)
        return int(self._epoch[1][place])

    def read(self, visits: Iterable[int]) -> Sequences:
        """The sequences visited at `visits`, as one batch."""
        rows = [self._row(self.sequence(i)) for i in visits]
        wide = max(len(row[2]) for row in rows)
        documents = np.full((len(rows), wide), -1, np.int64)
        for b, row in enumerate(rows):
            documents[b, : len(row[2])] = row[2]
        return Sequences(np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows]), documents)

    def _row(self, s: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        places = slice(s * self._per_sequence, (s + 1) * self._per_sequence)
        stream = np.zeros(self.length + 1, np.int64)  # one token more: the target of the last
        text = self._chunks[self._order[places.start : places.stop + 1]].reshape(-1)[: self.length + 1]
        stream[: len(text)] = text
        tokens, targets = stream[:-1], stream[1:].copy()
        ends = np.zeros(self.length, bool)  # whether a document ends with the chunk that this token ends
        chunk_size = self.length // self._per_sequence
        stops = self._ends[places]
        ends[chunk_size - 1 : len(stops) * chunk_size : chunk_size] = stops
        targets[ends & (tokens != 0)] = 0
        targets[(tokens == 0) & (targets == 0)] = IGNORE
        ids = self._documents[places]
        return tokens, targets, np.unique(ids[ids >= 0])

    def batches(self, first: int, batch_size: int) -> Iterator[Sequences]:
        """Batches without end from the visit `first` on."""
        while True:
            yield self.read(range(first, first + batch_size))
            first += batch_size
