"""Bits per byte of held-out documents: RETRO on, off and with shuffled neighbours, and filtered by leakage.

    result = evaluate("run", ["held-out/"], set="set")

Whole documents are scored (Borgeaud et al. 2021, section 3): windows as long as the training sequences, moved by half
of one, cut on the grid of chunks that starts with the document, so a chunk has the same neighbours in every window.
Each token is scored once, with at least half a window before it where the document has that much. A document's first
token is predicted from a lone pad. Bits per byte divides by all UTF-8 bytes of the documents, whatever the tokenizer
made of them.

Shuffled: every chunk gets the neighbours of a chunk of another document. A model that does as well with them does not
use what was retrieved. Filtered: bpb(α) over the chunks that share at most a part α of their length, in one run of
tokens, with any of their ten nearest neighbours and their continuations (section 2.6).

What is done is kept in the run's folder until all of it is: neighbours of 256 chunks, or losses of one batch, at a
time. The same call goes on from there, and its result is that of one that was never interrupted.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import __version__
from .config import InputError, as_count, as_seed, write_whole
from .data.corpus import Document
from .data.packing import TokenDocuments
from .nn import RetroFitted
from .nn.retrofit import longest_sequence
from .ops import NeighbourBatch
from .runs import (
    Run,
    autocast,
    dtype_name,
    load_run,
    losses,
    note,
    pick_device,
    pick_dtype,
    progress_bar,
    set_of,
    taken_up,
    text_of,
)

if TYPE_CHECKING:
    from .retrieval import Retriever
    from .retrieval.writing import Journal

LEAKAGE_NEIGHBOURS = 10


@dataclass
class Found:
    """Neighbours of every chunk of the documents, in the order of the chunks."""

    ids: Tensor
    """int64 [C, K], −1 = none. Their tokens, R times as much, are gathered batch by batch."""
    gather: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Tokens and lengths of the neighbours of chunks int64 [...]."""
    overlap: Tensor
    """float64 [C], r(C) of each chunk with its ten nearest neighbours."""
    shuffled: Tensor | None
    """int64 [C]: the chunk whose neighbours each gets in the control; None where there is only one chunk."""
    own: Tensor | None
    """bool [C, K]: which of those are of the chunk's own document, and are left out."""


@dataclass(frozen=True)
class Window:
    """Tokens start … stop − 1 of a document are read; those after `scored` are scored, and the one after the last."""

    document: int
    start: int
    stop: int
    scored: int


def evaluate(
    run: str | os.PathLike[str] | Run,
    data: Sequence[str | os.PathLike[str]] = (),
    *,
    set: str | os.PathLike[str] | Retriever | None = None,
    num_neighbours: int | None = None,
    retriever: str | None = None,
    batch_size: int = 8,
    window: int | None = None,
    stride: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    documents: Iterable[Document] | None = None,
    found: Found | None = None,
    plot: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Scores `data` (files, folders), or `documents`, with the model in the folder `run`.

    set: retrieval set, any one of the model's tokenizer. Default: the set that the model was trained with, where it
    was or, moved together with the run, as it lay beside it; one changed in place is used, and said to be. A plain
    decoder uses none, and given one reports its own filtered curve. Documents that are in the set never see themselves.
    found: neighbours from `find_neighbours` for the same documents and K, instead of set and retriever.
    num_neighbours: K, default as in training. retriever: how they are found, a name as in `Retriever.from_pretrained`,
    default as in training. window, stride: tokens, whole chunks; default the training sequence and half of it. seed: of
    the shuffle, and of the retriever "random". dtype: fp32 or bf16; "auto" is fp32 on a CPU, since models differ by
    less than bf16 rounds, and bf16 on a GPU that multiplies in it. plot: a PNG with the filtered curve.

    Interrupted, the same call goes on. What is done lies in a file `eval-….partial` of the run's folder, named by all
    that decides the result, and gone with the last of it; that of other weights is deleted. Nothing is kept where the
    folder cannot be written, and of a retriever or `found` that was handed over.

    Returns bits_per_byte {off, on, shuffled} (off alone without neighbours), filtered {α: bpb} of RETRO
    on and filtered_off, better_on {off, shuffled} (the number of documents where RETRO on needs fewer bits than
    that), without_neighbours and neighbours_filled (the share of the chunks that have none, and of the K places of each
    that are filled), bytes, words, tokens, documents, chunks, num_neighbours, retriever, dtype, tokens_per_second.
    Raises InputError where nothing can be read, set and model do not fit, what was asked for cannot be done, or another
    process is at the same evaluation.
    """
    seed = as_seed("eval", seed)
    if found is not None and (set is not None or retriever is not None):
        raise InputError("eval: found takes the place of set and retriever. Leave them out, or found.")
    where = pick_device(device)
    if plot is not None:
        _check_plot(Path(plot))
    loaded = run if isinstance(run, Run) else load_run(run, where)
    text = text_of(data, documents, "eval: there is no document with text", progress)
    model, tokenizer = loaded.model.to(where), loaded.tokenizer
    opened = open_set(loaded, set, where, retriever, seed) if found is None else None
    if opened is None and found is None:
        check_plain("eval", loaded, {"-k": num_neighbours, "--retriever": retriever, "--plot": plot})
    size = model.config.chunk_size
    batch_size = as_count("eval", "batch_size", batch_size)
    window = loaded.sequence_length if window is None else as_count("eval", "window", window)
    stride = max(size, window // 2 // size * size) if stride is None else as_count("eval", "stride", stride)
    if window % size or stride % size or stride > window:
        raise InputError(
            f"eval: window is {window} and stride {stride}; both must be multiples of the chunk size {size}, "
            "and the stride at most the window."
        )
    longest = longest_sequence(model.base, model.bos_id) if isinstance(model, RetroFitted) else window
    if window > longest:
        raise InputError(
            f"eval: window is {window}; the pretrained model was made for at most {longest} tokens."
        )
    k = as_count("eval", "-k", loaded.num_neighbours if num_neighbours is None else num_neighbours)
    if opened is not None:
        opened.check_num_neighbours(k)
    corpus = text.tokenise(tokenizer, size)
    if found is not None and (given := list(found.ids.shape)) != [len(corpus.chunks), k]:
        raise InputError(
            f"eval: found has {given[1]:,} neighbours for each of {given[0]:,} chunks; the documents have "
            f"{len(corpus.chunks):,} chunks, and num_neighbours is {k}. Give what find_neighbours found for them."
        )
    arithmetic = pick_dtype("fp32" if dtype == "auto" and where.type == "cpu" else dtype, where)
    about = {
        "corpus": corpus.fingerprint(),
        "num_neighbours": k,
        "seed": seed,
        "control": "without the document's own chunks",
        "batches": "longest first, then the first of their documents",
        "window": window,
        "stride": stride,
        "batch_size": batch_size,
        "dtype": dtype_name(arithmetic),
        "device": where.type,
    }
    keep = found is None and (opened is None or opened is not set)
    with _kept(loaded, opened, about) if keep else contextlib.nullcontext() as kept:
        if opened is not None:
            found = find_neighbours(corpus, opened, k, seed, progress, kept)
        modes = ["off"]
        if found is not None and model.config.cca_layers:
            modes += ["on"] if found.shuffled is None else ["on", "shuffled"]
            if found.shuffled is None:
                note("There is only one chunk, so neighbours cannot be shuffled: that control is left out.")
            elif corpus.num_documents == 1:
                note(
                    "There is only one document, so neighbours are shuffled among its chunks: those are about the same "
                    "things, and the control says less than one among documents."
                )
        scorer = _Scorer(loaded, corpus, window, stride, batch_size, arithmetic, kept)
        with progress_bar(len(modes) * scorer.tokens_read, "evaluating", "token", show=progress) as bar:
            bits = {mode: scorer.bits(mode, found, bar) for mode in modes}
        result = _report(loaded, corpus, found, bits) | {
            "num_neighbours": k if "on" in bits else 0,
            "retriever": None if opened is None else opened.name,
            "dtype": dtype_name(arithmetic),
            "tokens_per_second": scorer.tokens_read * len(modes) / max(scorer.seconds, 1e-9),
        }
        if plot is not None:
            draw(result, plot)
    return result


@contextlib.contextmanager
def _kept(run: Run, retriever: Retriever | None, about: dict[str, Any]) -> Iterator[Journal]:
    """The journal of the evaluation that `run`, `retriever` and `about` decide; see `evaluate`."""
    from .retrieval.neighbours import manifest_fingerprint
    from .retrieval.writing import journal

    weights = run.fingerprint()
    about = {**about, "version": __version__, "weights": weights}
    if retriever is not None:
        about |= {"set": manifest_fingerprint(retriever.store.manifest), "retriever": retriever.name}
    text = json.dumps(about, sort_keys=True)
    mine = f"eval-{weights[:8]}-"
    path = run.folder / f"{mine}{hashlib.sha256(text.encode()).hexdigest()[:12]}.partial"
    if not os.access(run.folder, os.W_OK | os.X_OK):
        note(f"{run.folder} cannot be written: interrupted, this evaluation will have to begin again.")
        with journal(None, text, "") as kept:
            yield kept
        return
    for old in run.folder.glob("eval-*.partial"):
        if not old.name.startswith(mine):  # of weights that are no more
            old.unlink(missing_ok=True)
    with journal(path, text, f"Another process is at the same evaluation of {run.folder}.") as kept:
        yield kept


def _check_plot(path: Path) -> None:
    """Before the work, and not after it."""
    from .retrieval.writing import check_writable

    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("eval: --plot needs matplotlib, which is missing: pip install matplotlib")
    if not path.absolute().parent.is_dir():
        raise InputError(f"eval: --plot is {path}, but the folder {path.absolute().parent} does not exist.")
    check_writable(path.absolute().parent, f", where --plot {path} is to be. Give another place.")
    try:
        with open(path, "rb") as file:
            replaces = file.read(8) not in (b"", b"\x89PNG\r\n\x1a\n")
    except FileNotFoundError:
        return
    except OSError:  # a folder, or not ours to read
        replaces = True
    if replaces:
        raise InputError(f"eval: --plot is {path}, which exists and is no PNG. Give another name.")


def check_plain(verb: str, run: Run, options: dict[str, Any]) -> None:
    """InputError for `options` that ask a plain decoder without a set for something with neighbours."""
    for name, value in options.items():
        if value is not None:
            raise InputError(
                f"{verb}: {name} means nothing without neighbours, and {run.folder} is a plain decoder"
                + (". Leave it out." if verb == "generate" else ". Name a set with --set, or leave it out.")
            )


def open_set(
    run: Run, given: Any, device: torch.device, name: str | None = None, seed: int = 0
) -> Retriever | None:
    """The set asked for, or the one of the training, or None for a plain decoder that was given none; checked.

    name: of the retriever, None: as in training. seed: of the retriever "random"."""
    from .retrieval import Retriever

    if isinstance(given, Retriever) and name not in (None, given.name):
        raise InputError(
            f"The retriever {name!r} was asked for, but the one handed over is {given.name!r}. Give the set's folder."
        )
    name = name or run.settings["config"].get("retriever", "dense")
    if given is None and (given := set_of(run.settings, run.folder)) is None:
        return None
    retriever = (
        given
        if isinstance(given, Retriever)
        else Retriever.from_pretrained(given, device=device, retriever=name, seed=seed)
    )
    retriever.check_tokenizer(run.tokenizer.fingerprint)
    if retriever.chunk_size != run.model.config.chunk_size:
        raise InputError(
            f"The retrieval set has chunks of {retriever.chunk_size} tokens, the model of "
            f"{run.model.config.chunk_size}. Build the set again, or give another."
        )
    return retriever


def find_neighbours(
    corpus: TokenDocuments,
    retriever: Retriever,
    k: int,
    seed: int,
    progress: bool,
    kept: Journal | None = None,
) -> Found:
    """Neighbours of every chunk, never of the chunk's own document, and how much of the chunk they hold word
    for word. kept: has what an earlier call found."""
    from .retrieval.leakage import overlap
    from .retrieval.writing import Journal

    kept = kept or Journal()
    owner = corpus.of_chunks()
    ids = retriever.find_documents(corpus.hashes).numpy()[owner]
    chunks = torch.from_numpy(corpus.chunks.astype(np.int64))
    fetch = max(k, LEAKAGE_NEIGHBOURS)
    parts = []
    with progress_bar(len(chunks), "retrieving", "chunk", show=progress) as bar:
        for start in range(0, len(chunks), 256):
            rows = chunks[start : start + 256]
            if part := kept.take():
                taken_up(bar, len(rows))
            else:
                own = torch.from_numpy(ids[start : start + 256, None])
                near = retriever(rows, num_neighbours=fetch, exclude_documents=own).to("cpu")
                assert near.ids is not None
                lengths = near.lengths[:, 0, :LEAKAGE_NEIGHBOURS]
                r = overlap(rows, near.tokens[:, 0, :LEAKAGE_NEIGHBOURS], value_lengths=lengths)
                part = kept.add({"ids": near.ids[:, 0, :k].numpy(), "overlap": r.numpy()})
                bar.update(len(rows))
            parts.append((torch.from_numpy(part["ids"]), torch.from_numpy(part["overlap"])))
    near_ids, r = (torch.cat(column) for column in zip(*parts, strict=True))
    order = derangement(owner, seed)
    if retriever.collective:  # ranks need not have as many batches as one another
        tokens, lengths = retriever.gather(near_ids)

        def gather(rows: Tensor) -> tuple[Tensor, Tensor]:
            return tokens[rows], lengths[rows]
    else:

        def gather(rows: Tensor) -> tuple[Tensor, Tensor]:
            return retriever.gather(near_ids[rows])

    if order is None:
        return Found(near_ids, gather, r, None, None)
    shuffled = torch.from_numpy(order)
    own = torch.from_numpy(ids)[:, None]
    return Found(near_ids, gather, r, shuffled, (own >= 0) & (retriever.documents(near_ids[shuffled]) == own))


def derangement(owner: np.ndarray, seed: int) -> np.ndarray | None:
    """For every chunk a chunk of another document, int64 [C]; another chunk where there is one document only, and
    None where there is one chunk only.

    Each chunk is taken once, unless one document has more than half of all chunks: then those beyond are drawn again.
    """
    if len(owner) < 2:
        return None
    rng = np.random.default_rng([seed, 2])
    documents, counts = np.unique(owner, return_counts=True)
    if len(documents) == 1:
        owner = np.arange(len(owner))
        documents, counts = owner, np.ones_like(owner)
    rank = np.empty(owner.max() + 1, np.int64)
    rank[rng.permutation(documents)] = np.arange(len(documents))
    order = np.lexsort(
        (rng.random(len(owner)), rank[owner])
    )  # documents in random order, chunks in random order within
    # A turn by the largest document's chunks leaves every document, unless that is more than the rest: then it is the
    # only one with chunks that are left to be drawn for.
    partner = np.roll(order, -counts.max())
    same = np.flatnonzero(owner[order] == owner[partner])
    partner[same] = rng.choice(np.flatnonzero(owner != documents[counts.argmax()]), len(same))
    result = np.empty(len(owner), np.int64)
    result[order] = partner
    return result


def windows(num_tokens: int, window: int, stride: int, document: int = 0) -> Iterator[Window]:
    """Windows over a document, whose scored tokens 1 … num_tokens − 1 do not overlap; token 0 has nothing before it."""
    start = scored = 0
    while scored < num_tokens - 1:
        stop = min(start + window, num_tokens)
        yield Window(document, start, stop, scored)
        scored = min(start + window, num_tokens - 1)
        start += stride


class _Scorer:
    """Negative log-likelihoods in bits of every token of every document."""

    def __init__(
        self,
        run: Run,
        corpus: TokenDocuments,
        window: int,
        stride: int,
        batch_size: int,
        dtype: torch.dtype,
        kept: Journal | None,
    ) -> None:
        """kept: has what an earlier call computed, mode by mode, batch by batch."""
        from .retrieval.writing import Journal

        self.kept = kept or Journal()
        self.seconds = 0.0
        """What the forward passes took, those of an earlier call included."""
        self.model, self.corpus, self.dtype = run.model.eval(), corpus, dtype
        self.device = next(run.model.parameters()).device
        self.size = run.model.config.chunk_size
        lengths = [len(corpus.tokens(d)) for d in range(corpus.num_documents)]
        # Longest first, so that a batch holds little padding and running out of memory happens at once. Of those the
        # first of their documents, which are scored whole: of the others only the end needs logits.
        todo = sorted(
            (w for d, n in enumerate(lengths) for w in windows(n, window, stride, d)),
            key=lambda w: (w.start - w.stop, w.scored > w.start),
        )
        self.batches = [todo[i : i + batch_size] for i in range(0, len(todo), batch_size)]
        self.tokens_read = sum(w.stop - w.start for w in todo)

    @torch.inference_mode()
    def bits(self, mode: str, found: Found | None, bar: Any) -> np.ndarray:
        """float64 [C, M], 0 for the padding."""
        result = np.zeros(self.corpus.chunks.shape)
        flat = result.reshape(-1)
        first = self.corpus.chunks[self.corpus.starts[:-1], 0].astype(np.int64)
        flat[self.corpus.starts[:-1] * self.size] = self._first_token()[first]
        for batch in self.batches:
            if part := self.kept.take():
                taken_up(bar, sum(w.stop - w.start for w in batch))
            else:
                part = self.kept.add(self._scored(batch, mode, found))
                bar.update(sum(w.stop - w.start for w in batch))
            self.seconds += float(part["seconds"][0])
            scored = part["nats"].astype(np.float64) / np.log(2)
            done = 0
            for w in batch:
                base = int(self.corpus.starts[w.document]) * self.size
                count = w.start + len(self._text(w)) - 1 - w.scored
                flat[base + w.scored + 1 : base + w.scored + 1 + count] = scored[done : done + count]
                done += count
        return result

    def _scored(self, batch: list[Window], mode: str, found: Found | None) -> dict[str, np.ndarray]:
        """`nats` float32 of the tokens that each window scores, one window after another, and `seconds` float64 [1]."""
        begun = time.perf_counter()
        stop = max(w.stop - w.start for w in batch)
        tokens = torch.zeros(len(batch), -(-stop // self.size) * self.size, dtype=torch.int64)
        targets = torch.zeros(len(batch), stop, dtype=torch.int64)
        for row, w in enumerate(batch):
            text = torch.from_numpy(self._text(w).astype(np.int64))
            tokens[row, : w.stop - w.start] = text[: w.stop - w.start]
            targets[row, : len(text) - 1] = text[1:]
        neighbours = None if mode == "off" or found is None else self._neighbours(batch, tokens, found, mode)
        first = min(w.scored - w.start for w in batch)
        with autocast(self.device, self.dtype):
            logits = self.model(tokens.to(self.device), neighbours, logits_to_keep=tokens.shape[1] - first)
        nats = losses(logits[:, : stop - first], targets[:, first:].to(self.device)).cpu().numpy()
        # tokens start + 1 … start + len(text) − 1 have been predicted
        rows = [
            nats[i, w.scored - w.start - first : len(self._text(w)) - 1 - first] for i, w in enumerate(batch)
        ]
        return {"nats": np.concatenate(rows), "seconds": np.array([time.perf_counter() - begun])}

    def _text(self, w: Window) -> np.ndarray:
        """The window's tokens and the one after it, where the document has one."""
        flat = self.corpus.chunks[
            self.corpus.starts[w.document] : self.corpus.starts[w.document + 1]
        ].reshape(-1)
        text = flat[w.start : w.stop + 1]
        return text[: np.count_nonzero(text)]

    def _first_token(self) -> np.ndarray:
        with autocast(self.device, self.dtype):
            logits = self.model(torch.zeros(1, 1, dtype=torch.int64, device=self.device))[0, 0]
        return (-F.log_softmax(logits.double(), -1) / np.log(2)).cpu().numpy()

    def _neighbours(self, batch: list[Window], tokens: Tensor, found: Found, mode: str) -> NeighbourBatch:
        chunks = tokens.shape[1] // self.size
        rows = torch.zeros(len(batch), chunks, dtype=torch.int64)
        there = torch.zeros(len(batch), chunks, 1, dtype=torch.int32)
        for b, w in enumerate(batch):
            whole = -(-(w.stop - w.start) // self.size)
            first = int(self.corpus.starts[w.document]) + w.start // self.size
            rows[b, :whole] = torch.arange(first, first + whole)
            there[b, :whole] = 1
        if mode == "shuffled":
            assert found.shuffled is not None and found.own is not None
            there = there * ~found.own[rows]
            rows = found.shuffled[rows]
        near, lengths = found.gather(rows)
        return NeighbourBatch(near.to(self.device), (lengths * there).to(self.device))


def _report(
    run: Run,
    corpus: TokenDocuments,
    found: Found | None,
    bits: dict[str, np.ndarray],
) -> dict[str, Any]:
    from .retrieval.leakage import filtered_bits_per_byte

    num_bytes = int(corpus.num_bytes.sum())
    result: dict[str, Any] = {
        "bits_per_byte": {mode: float(values.sum()) / num_bytes for mode, values in bits.items()},
        "filtered": {},
        "filtered_off": {},
        "bytes": num_bytes,
        "words": int(corpus.num_words.sum()),
        "tokens": int(np.count_nonzero(corpus.chunks)),
        "documents": corpus.num_documents,
        "chunks": len(corpus.chunks),
    }
    if "on" in bits:
        per_document = {m: np.add.reduceat(x.sum(1), corpus.starts[:-1]) for m, x in bits.items()}
        result["better_on"] = {
            mode: int((per_document["on"] < per_document[mode]).sum()) for mode in bits if mode != "on"
        }
    if found is not None:
        per_chunk = torch.from_numpy(run.tokenizer.token_bytes[corpus.chunks.astype(np.int64)].sum(1))
        for name, mode in (("filtered", "on"), ("filtered_off", "off")):
            if mode in bits:
                curve = filtered_bits_per_byte(torch.from_numpy(bits[mode].sum(1)), per_chunk, found.overlap)
                result[name] = {f"{alpha:g}": value for alpha, value in curve.items()}
        result["mean_overlap"] = float(found.overlap.mean())
        there = found.ids >= 0
        result["without_neighbours"] = 1 - float(there.any(1).double().mean())
        result["neighbours_filled"] = float(there.double().mean())
    return result


def table(result: dict[str, Any]) -> str:
    """The result for a reader: one line a mode, one line an α."""
    about = f"computed in {result['dtype']}"
    if result["num_neighbours"]:
        how = f" ({result['retriever']})" if result["retriever"] else ""
        about += f", {result['num_neighbours']} neighbours{how}"
        about += f", {result['without_neighbours']:.1%} of the chunks have none"
    lines = [
        f"{result['documents']:,} documents, {result['bytes']:,} bytes, {result['words']:,} words, "
        f"{result['tokens']:,} tokens",
        about,
        "",
        f"{'':<24}{'bits per byte':>14}",
    ]
    lines += [f"{'RETRO ' + mode:<24}{value:>14.4f}" for mode, value in result["bits_per_byte"].items()]
    lines += [
        f"RETRO on is better than {mode} in {count:,} of {result['documents']:,} documents"
        for mode, count in result.get("better_on", {}).items()
    ]
    if result["filtered_off"]:
        lines += ["", f"{'leakage filter':<24}{'RETRO on':>14}{'RETRO off':>14}"]
        for alpha, off in result["filtered_off"].items():
            cells = (result["filtered"].get(alpha), off)
            lines.append(
                f"{'r ≤ ' + alpha:<24}" + "".join(f"{'–' if x is None else f'{x:.4f}':>14}" for x in cells)
            )
        lines.append(
            "r: the longest run of tokens that a chunk shares with ten neighbours, as a part of the chunk"
        )
    return "\n".join(lines)


def draw(
    result: dict[str, Any], path: str | os.PathLike[str], also: dict[str, dict[str, Any]] | None = None
) -> bool:
    """Writes the filtered curves as a PNG; `also` names further results. False where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        note("No plot: matplotlib is missing (pip install matplotlib).")
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = {"RETRO on": result["filtered"], "RETRO off": result["filtered_off"]}
    curves |= {name: other["filtered_off"] for name, other in (also or {}).items()}
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, curve in curves.items():
        points = [(float(alpha), value) for alpha, value in curve.items() if value is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(
        xlabel="largest share α of a chunk found word for word",
        ylabel="bits per byte of chunks with r(C) ≤ α",
    )
    axes.legend()
    axes.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    pyplot.close(figure)
    write_whole(Path(path), image.getvalue())
    return True
