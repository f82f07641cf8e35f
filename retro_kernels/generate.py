"""Generation with a cache and retrieval at every chunk boundary.

    result = generate("run", "def main():", set="set", max_tokens=200, on_text=print)

The chunks of the prompt are searched for like those that are generated: when a chunk is complete, its neighbours are
retrieved, and its last token is the first that sees them. A text longer than the training sequences goes on
with the last half of one, read anew with the neighbours it had.
"""

from __future__ import annotations

import codecs
import contextlib
import numbers
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .config import InputError, as_count, as_seed
from .data.tokenizer import Tokenizer
from .evaluate import check_plain, open_set
from .nn import RetroFitted
from .nn.retrofit import longest_sequence
from .ops import NeighbourBatch
from .runs import Run, autocast, load_run, pick_device, pick_dtype

if TYPE_CHECKING:
    from .retrieval import Retriever


@dataclass(frozen=True)
class Neighbour:
    """One thing that was retrieved."""

    distance: float
    chunk: int
    document: int
    title: str
    text: str
    """With its continuation."""


@dataclass
class ChunkTrace:
    """One complete chunk of the text and its neighbours, nearest first."""

    text: str
    neighbours: list[Neighbour] = field(default_factory=list)


def generate(
    run: str | os.PathLike[str] | Run,
    prompt: str,
    *,
    set: str | os.PathLike[str] | Retriever | None = None,
    max_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    num_neighbours: int | None = None,
    retriever: str | None = None,
    ignore_end: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    on_text: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Continues `prompt` by up to `max_tokens` tokens with the model in the folder `run`.

    set, num_neighbours, retriever: as in `evaluate`; a plain decoder takes none. temperature: 0 takes the
    likeliest token. top_k, top_p: sample from the k likeliest, from the likeliest that together have probability p.
    seed: the same seed gives the same text on the same device. ignore_end: go on where the model would end the
    document. dtype: fp32 or bf16; "auto" is bf16 where the device multiplies in it. on_text: is handed every piece of
    text, the prompt left out, as soon as it stands.

    Returns prompt, text (what was added), tokens, ended (whether the document ended), tokens_per_second,
    retrieval_seconds, and chunks: every complete chunk of prompt and text with its neighbours (`ChunkTrace`, as dicts).
    Raises InputError for settings out of range, or where set and model do not fit.
    """
    max_tokens = as_count("generate", "max_tokens", max_tokens)
    top_k = None if top_k is None else as_count("generate", "top_k", top_k)
    seed = as_seed("generate", seed)
    _check_sampling(temperature, top_p)
    where = pick_device(device)
    loaded = run if isinstance(run, Run) else load_run(run, where)
    loaded.model.to(where).eval()
    opened = None
    if loaded.model.config.cca_layers:
        opened = open_set(loaded, set, where, retriever, seed)
    else:
        check_plain("generate", loaded, {"--set": set, "-k": num_neighbours, "--retriever": retriever})
    k = loaded.num_neighbours if num_neighbours is None else num_neighbours
    k = as_count("generate", "the number of neighbours", k)
    if opened is not None:
        opened.check_num_neighbours(k)
    reader = _Reader(loaded, opened, k, pick_dtype(dtype, where))
    sampler = torch.Generator(where).manual_seed(seed)
    silent = _never(loaded.tokenizer, ignore_end).to(where)
    silent = F.pad(silent, (0, loaded.model.config.vocab_size - len(silent)), value=True)
    stream = _Stream(loaded.tokenizer, on_text)
    started = time.perf_counter()
    with _casts_kept(loaded.model, where):
        logits = reader.read(loaded.tokenizer.encode(prompt))
        added: list[int] = []
        ended = False
        while len(added) < max_tokens:
            token = sample(logits.masked_fill(silent, -torch.inf), temperature, top_k, top_p, sampler)
            if token == loaded.tokenizer.pad_id:
                ended = True
                break
            added.append(token)
            stream.add(token)
            if (
                len(added) < max_tokens or (len(reader.tokens) + 1) % reader.size == 0
            ):  # a last whole chunk is traced too
                logits = reader.read([token])
    stream.close()
    seconds = time.perf_counter() - started
    return {
        "prompt": prompt,
        "text": loaded.tokenizer.decode(added),
        "tokens": len(added),
        "ended": ended,
        "tokens_per_second": len(added) / seconds,
        "retrieval_seconds": reader.retrieval_seconds,
        "chunks": [asdict(trace) for trace in reader.traces],
    }


def _check_sampling(temperature: float, top_p: float | None) -> None:
    for name, given in (("temperature", temperature), ("top_p", 1.0 if top_p is None else top_p)):
        if not isinstance(given, numbers.Real):
            raise InputError(f"generate: {name} is {given!r}; it must be a number.")
    if not 0.0 <= temperature < float("inf"):
        raise InputError(f"generate: temperature is {temperature}; it must be 0 or more.")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise InputError(f"generate: top_p is {top_p}; it must lie above 0 and be at most 1.")


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> int:
    """One token id by logits [V]. top_p keeps the smallest set of likeliest tokens with that probability or more."""
    if temperature == 0:
        return int(logits.argmax())
    # seen from the likeliest, and by no number that float32 does not have: nothing becomes infinite, 0 / 0 or −∞ / ∞
    logits, limits = logits.float() - logits.max(), torch.finfo(torch.float32)
    logits = logits / min(max(temperature, limits.tiny), limits.max)
    logits, order = _likeliest_first(logits)
    if top_k is not None:
        logits, order = logits[:top_k], order[:top_k]
    probabilities = logits.softmax(-1)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= max(top_p, limits.tiny), 0.0)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def _likeliest_first(logits: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [V], none above 0, sorted descending, of equal ones the first first, and the places that they had."""
    if logits.device.type != "cpu":
        return torch.sort(logits, descending=True, stable=True)
    # of numbers of one sign the bits are in their order; numpy sorts integers many times as fast as torch sorts stably
    keys = logits.abs().view(torch.int32).long() << 32 | torch.arange(len(logits), device="cpu")
    order = torch.from_numpy(np.sort(keys.numpy())) & 0xFFFFFFFF
    return logits[order], order


@contextlib.contextmanager
def _casts_kept(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Weights that autocast casts inside stay cast to the end: to cast them anew for every token takes longer than the
    products. It does so until the outermost autocast ends, even one that is off, with weights that require a gradient,
    and not in inference mode."""
    frozen = [
        own
        for own in model.parameters()
        if own.is_floating_point() and not own.requires_grad and not own.is_inference()
    ]
    try:
        for own in frozen:
            own.requires_grad_()
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for own in frozen:
            own.requires_grad_(False)


class _Reader:
    """Feeds tokens to the model, retrieves at chunk boundaries, and forgets the first half of a window that is full."""

    def __init__(self, run: Run, retriever: Retriever | None, k: int, dtype: torch.dtype) -> None:
        self.model, self.tokenizer, self.retriever, self.k, self.dtype = (
            run.model,
            run.tokenizer,
            retriever,
            k,
            dtype,
        )
        self.device = next(run.model.parameters()).device
        self.size = run.model.config.chunk_size
        self.window = max(run.sequence_length, 2 * self.size)
        if isinstance(run.model, RetroFitted):
            self.window = int(min(self.window, longest_sequence(run.model.base, run.model.bos_id)))
        self.tokens: list[int] = []  # all
        self.start = 0  # of the tokens in the cache
        self.cache = self.model.new_cache(1)
        self.found: list[NeighbourBatch] = []  # of every complete chunk, [1, 1, K, R]
        self.traces: list[ChunkTrace] = []
        self.retrieval_seconds = 0.0

    def read(self, new: list[int]) -> Tensor:
        """Logits [V] of the token after `new`. No tokens at all: those after a lone pad, as at a document's start."""
        if not new:
            return self._decode([self.tokenizer.pad_id], self.model.new_cache(1), [])
        self.tokens += new
        self._retrieve()
        if len(self.tokens) - self.start <= self.window:
            return self._decode(new, self.cache, self._between(len(self.tokens) - len(new), len(self.tokens)))
        # Whole chunks are dropped, so the grid stays that of the document.
        keep = self.window // 2 // self.size * self.size or self.window - self.size + 1
        self.start = (len(self.tokens) - keep) // self.size * self.size
        self.cache = self.model.new_cache(1)
        return self._decode(
            self.tokens[self.start :], self.cache, self._between(self.start, len(self.tokens))
        )

    def _between(self, start: int, stop: int) -> list[NeighbourBatch]:
        """Neighbours of the chunks completed by the tokens start … stop − 1."""
        return self.found[start // self.size : stop // self.size]

    def _decode(self, new: list[int], cache: Any, found: list[NeighbourBatch]) -> Tensor:
        neighbours = None
        if found:
            neighbours = NeighbourBatch(
                torch.cat([n.tokens for n in found], 1), torch.cat([n.lengths for n in found], 1)
            )
        with torch.no_grad(), autocast(self.device, self.dtype):
            tokens = torch.tensor([new], device=self.device)
            return self.model.decode(tokens, cache, neighbours, logits_to_keep=1)[0, -1].float()

    def _retrieve(self) -> None:
        done, whole = len(self.traces), len(self.tokens) // self.size
        if done == whole:
            return
        started = time.perf_counter()
        text = torch.tensor(self.tokens[done * self.size : whole * self.size], device=self.device).view(
            -1, self.size
        )
        self.traces += [ChunkTrace(self.tokenizer.decode(row)) for row in text.tolist()]
        if self.retriever is not None:
            near = self.retriever(text.view(1, -1), num_neighbours=self.k).to(self.device)
            for u, trace in enumerate(self.traces[done:]):
                self.found.append(NeighbourBatch(near.tokens[:, u : u + 1], near.lengths[:, u : u + 1]))
                trace.neighbours = self._described(near, u)
        self.retrieval_seconds += time.perf_counter() - started

    def _described(self, near: NeighbourBatch, u: int) -> list[Neighbour]:
        assert self.retriever is not None and near.ids is not None and near.distances is not None
        ids = near.ids[0, u].cpu()
        documents = self.retriever.documents(ids)
        rows = zip(
            ids.tolist(),
            near.distances[0, u].tolist(),
            documents.tolist(),
            self.retriever.titles(documents),
            self.tokenizer.decode_batch(near.tokens[0, u]),
            strict=True,
        )
        return [
            Neighbour(distance, chunk, document, title, text)
            for chunk, distance, document, title, text in rows
            if chunk >= 0
        ]


class _Stream:
    """Hands out text as it comes; the bytes of an unfinished character wait for the rest."""

    def __init__(self, tokenizer: Tokenizer, on_text: Callable[[str], None] | None) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> None:
        if self._on_text and (text := self._decoder.decode(self._tokenizer.decode_bytes([token]))):
            self._on_text(text)

    def close(self) -> None:
        if self._on_text and (text := self._decoder.decode(b"", final=True)):
            self._on_text(text)


def _never(tokenizer: Tokenizer, ignore_end: bool) -> Tensor:
    """bool [V]: tokens that stand for no text and are never drawn."""
    silent = torch.from_numpy(tokenizer.token_bytes == 0)
    if tokenizer.unk_id >= 0:
        silent[tokenizer.unk_id] = True  # encoding never gives it
    silent[tokenizer.pad_id] = ignore_end
    return silent


def show_chunks(chunks: list[dict[str, Any]]) -> str:
    """The chunks with their neighbours, for a reader."""
    lines = [] if chunks else ["", "(no neighbours: the text has no whole chunk)"]
    for u, chunk in enumerate(chunks):
        lines += ["", f"── chunk {u} " + "─" * 60, chunk["text"].strip("\n")]
        if not chunk["neighbours"]:
            lines.append("   (no neighbour)")
        for rank, near in enumerate(chunk["neighbours"], 1):
            lines.append(
                f"   {rank}. {near['title']}  (chunk {near['chunk']:,}, distance {near['distance']:.3f})"
            )
            lines += ["      │ " + line for line in near["text"].strip("\n").splitlines()]
    return "\n".join(lines)
