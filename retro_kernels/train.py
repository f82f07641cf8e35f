"""Training: text and a retrieval set to a model that uses it, or text alone to the plain decoder.

    summary = train(TrainConfig(data=("corpus/",), out="run", set="set"))

One step: `accumulate` batches of packed sequences; for each the neighbours of its chunks (found while the step before
was computed), the forward pass, the backward pass; then one update by AdamW. The order of the data, the learning rate
and all random numbers are functions of the seed and the step, so a run continues from a checkpoint as if it had never
stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import math
import os
import shlex
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .config import (
    DEFAULT_PRESET,
    PLACES,
    InputError,
    RetroConfig,
    TrainConfig,
    as_count,
    parse_overrides,
    preset,
    write_whole,
)
from .data.corpus import Document
from .data.packing import IGNORE, Packed, TokenDocuments
from .data.tokenizer import TextSampler, Tokenizer, check_vocab_size
from .nn import Retro, RetroFitted
from .nn.retrofit import load_base, longest_sequence
from .nn.saving import CONFIG, WEIGHTS, read_config
from .ranks import Ranks, joined
from .runs import (
    METRICS,
    SETTINGS,
    TOKENIZER,
    TOKENS,
    Interrupted,
    KeptTokens,
    Text,
    alone_in,
    autocast,
    check_target,
    checkpoints,
    dtype_name,
    interruptible,
    load_run,
    load_state,
    losses,
    note,
    pick_dtype,
    places,
    progress_bar,
    publish_checkpoint,
    read_settings,
    remove_staged,
    save_checkpoint,
    silent,
    text_of,
    write_json,
)

if TYPE_CHECKING:
    from .ops import NeighbourBatch
    from .retrieval import Retriever

# What may differ when a run is resumed: none of it changes what is computed, but `steps`, which is announced.
_FREE = {"out", "steps", "device", "save_every", "log_every"}
LESSONS_END = 0.8  # of the steps; the rest are for learning how far real neighbours are to be trusted
LEAST_FROM_FILE = (
    0.05  # of the chunks: a file of neighbours with fewer was made for another text that shares a few
)
FINAL_RATE = 0.1  # of the highest learning rate, at the end of the cosine


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    stop_after: int | None = None,
    documents: list[Document] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains one model into the folder `config.out` and returns what was measured.

    resume: continue from the newest checkpoint there; where there is none, start, but not over a trained model. On a
    CPU the weights come out as those of a run that never stopped, to the last bit. stop_after: leave with a checkpoint
    after so many steps of this call. documents: in place of reading `config.data`.

    Returns run, steps, loss (nats per token, mean of the last steps), tokens, seconds, tokens_per_second, stall_share
    (the part of that time in which a step waited for its batch and neighbours), first_wait_seconds (for the first of
    them, before the clock starts), neighbours_from_file (the share of the chunks whose neighbours the file
    `config.neighbours` had, the others were searched for; None without one), without_neighbours and neighbours_filled
    (the share of the chunks that had none at all, and of the places for neighbours that were filled; None without a
    set), parameters, dtype, processes.

    On several processes (torchrun, or a process group of the caller's) they divide the forward passes of a step among
    them, so `accumulate` is a multiple of their number, and what is computed is the same but for rounding, on however
    many. Each opens the retrieval set; the first alone reads the text, writes and speaks, in a folder that all see.
    What waits and stalls is the first's. All return the same. What they are called with is the same but for paths, and
    so is what they find there: InputError where it is not. Where the forward or backward pass fails in one alone, for
    want of memory, say, the others wait for its gradients: until that process ends (torchrun ends all), or as long as
    the caller's group has patience.
    Raises InputError where data, set, tokenizer or run do not fit, where the folder holds something else or another
    process trains in it, Interrupted after Ctrl-C, with a checkpoint written.
    """
    from .retrieval.writing import check_writable

    stop_after = None if stop_after is None else as_count("train", "stop_after", stop_after)
    folder = Path(config.out)
    with joined() as ranks, contextlib.ExitStack() as held:
        held.enter_context(silent(not ranks.first))
        ranks.agree("train", _call(config, resume, stop_after), "Call all of them with the same.")
        with ranks.together("train"):
            if ranks.first:
                check_writable(folder, "; a run is a folder. Give another --out.")
                _check_out(config, documents, ranks)
                held.enter_context(alone_in(folder))
        device = ranks.device(config.device)
        trainer = _in_turn(ranks, device, config, folder, resume, documents, progress and ranks.first)
        try:
            return trainer.run(
                config.steps if stop_after is None else min(config.steps, trainer.step + stop_after)
            )
        except Interrupted as stopped:
            if documents is not None:  # they are the caller's, and so is the way to go on
                raise
            raise Interrupted(f"{stopped} Continue with: {_resume_command(config, ranks)}") from None


def _call(config: TrainConfig, resume: bool, stop_after: int | None) -> dict[str, Any]:
    """What all are to be called with. Paths may be others on each machine; of devices `Ranks.device` tells."""
    given = {name: value for name, value in config.to_dict().items() if name not in (*PLACES, "device")}
    there = {name: "given" if getattr(config, name) else None for name in PLACES if name != "data"}
    return {**given, **there, "resume": resume, "stop_after": stop_after}


def _check_out(config: TrainConfig, documents: list[Document] | None, ranks: Ranks) -> None:
    folder = Path(config.out)
    if documents is None and os.path.realpath(folder) in map(os.path.realpath, config.data):
        raise InputError(
            f"train: out is {folder}, and so is data. What is written there would be read as text when the run is "
            "continued: give a folder in it, or another one."
        )
    check_target(folder, config)
    if config.accumulate % ranks.world:
        raise InputError(
            f"train: accumulate is {config.accumulate}, and there are {ranks.world} processes, which divide a step's "
            f"forward passes among them. Give a multiple of {ranks.world}."
        )


def _in_turn(ranks: Ranks, *arguments: Any) -> _Trainer:
    """The first process prepares the run and writes what the others read then, who do the same after it."""
    text, trainer = None, None
    with ranks.together("train"):
        if ranks.first:
            text, trainer = _prepared(ranks, None, *arguments)
    known = ranks.told((text.characters, text.fingerprint) if text is not None else None)
    with ranks.together("train"):
        if trainer is None:
            _, trainer = _prepared(ranks, known, *arguments)
    ranks.agree(
        "train", trainer.view(), "Give all of them the same --data, --set and --out, on machines of one kind."
    )
    return trainer


def _prepared(
    ranks: Ranks,
    known: tuple[int, str] | None,
    device: torch.device,
    config: TrainConfig,
    folder: Path,
    resume: bool,
    documents: list[Document] | None,
    progress: bool,
) -> tuple[Text, _Trainer]:
    """The text, and the trainer at the step where it begins or goes on, with the folder made a run's. known: what the
    first process found of the text, in all others."""
    if known is not None and not (folder / SETTINGS).exists():
        raise InputError(
            f"train: rank {ranks.rank} does not find in {folder} what the first process wrote there. Give an --out "
            "that all of them see."
        )
    saved, trained = checkpoints(folder), (folder / WEIGHTS).exists()
    if resume and not saved and trained:
        raise InputError(
            f"{folder} holds a trained model, and no checkpoint from which it could go on; from the beginning it would "
            "be replaced. Bring the checkpoint back, or give another --out."
        )
    if resume and not saved:
        note(f"{folder} holds no checkpoint yet: starting from the beginning.")
    elif not resume and (saved or trained):
        raise InputError(
            f"{folder} holds a training run already. Continue it with --resume, or give another --out."
        )
    if saved:
        _check_same(config, read_settings(folder)["config"], folder)
        if config.steps < saved[-1][0]:
            raise InputError(
                f"train: steps is {config.steps:,}, but the checkpoint in {folder} is of step {saved[-1][0]:,}. "
                "Ask for at least as many, or give another --out."
            )

    if config.retrofit and not os.path.isdir(config.retrofit):
        raise InputError(
            f"retrofit: there is no folder {config.retrofit}. Give the run of a plain decoder, or the folder of a "
            "pretrained model, as it is now."
        )
    if config.retrofit and not any((Path(config.retrofit) / name).exists() for name in (SETTINGS, CONFIG)):
        raise InputError(
            f"retrofit: {config.retrofit} is neither a training run (no {SETTINGS} in it) nor a pretrained model (no "
            f"{CONFIG}). Give the folder that holds one of these."
        )
    retriever = _open_set(config, device, progress)
    # neither this run nor another is text
    text = text_of(config.data, documents, "train: there is no text to train on", progress, (config.out,))
    if known is not None:
        text.known(*known)
    tokenizer = _tokenizer(config, retriever, text, bool(saved) or not ranks.first)
    torch.manual_seed(config.seed)
    model: Retro | RetroFitted
    if retriever is not None and _is_pretrained(config.retrofit):
        model = _fitted(config, tokenizer, retriever.chunk_size)
    else:
        model = _new_model(config, _model_config(config, tokenizer, retriever))
    model.to(device)
    # after all that can be refused has been: hours, where there is much text
    kept = KeptTokens(folder / TOKENS, text, tokenizer, model.config.chunk_size)
    corpus = kept.get()
    packed = Packed(
        corpus,
        config.sequence_length,
        config.seed,
        None if retriever is None else lambda hashes: retriever.find_documents(hashes).numpy(),
    )
    if retriever is not None and config.neighbours:
        _check_file(config.neighbours, retriever, corpus)
    settings = {
        "config": config.absolute().to_dict(),
        "dtype": dtype_name(pick_dtype(config.dtype, device)),
        "device": device.type,
        "tokenizer": tokenizer.fingerprint,
        "corpus": corpus.fingerprint(),
        "set": None if retriever is None else _set_fingerprint(retriever),
        "documents": corpus.num_documents,
        "bytes": int(corpus.num_bytes.sum()),
    }
    trainer = _Trainer(config, folder, model, packed, retriever, settings, progress, ranks)
    if saved:
        trainer.load(saved[-1][1], read_settings(folder))
    if ranks.first:
        write_json(folder / SETTINGS, trainer.settings)  # first: it marks the folder as a run's
        remove_staged(folder)
        kept.keep(corpus)
        _cut_metrics(folder / METRICS, trainer.step)
        tokenizer.save(folder / TOKENIZER)
    return text, trainer


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of the update number `step` (0-based): linear warm-up, then half a cosine down to a tenth.

    A run that begins at a later first step begins inside this schedule.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (
        FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * min(1.0, done))) / 2
    )


def give_lessons(
    tokens: Tensor, neighbours: NeighbourBatch, share: float, generator: torch.Generator
) -> NeighbourBatch:
    """A part of the sequences get their own text as neighbours, each shifted by up to 3/4 of a chunk either way.

    tokens int [B, N], neighbours of L chunks of M tokens, `share` of the sequences drawn by `generator` (on the CPU).
    Neighbour j of chunk u becomes the R tokens from uM + shift on, as far as the sequence reaches and up to padding
    (behind a document that fills its last chunk, the next one's first tokens). It holds what comes next, but at another
    place than a neighbour's own continuation, so it can be used only by looking up the present tokens in it: the skill
    that real neighbours, which rarely have the answer, teach slowly. More overlap with neighbours makes RETRO learn
    faster (Doostmohammadi and Kuhlmann 2025).
    """
    batch, chunks, count, length = neighbours.tokens.shape
    taught = torch.rand(batch, generator=generator) < share
    size = length // 2
    shift = torch.randint(-3 * size // 4, 3 * size // 4 + 1, (batch, chunks, count), generator=generator)
    start = (torch.arange(chunks)[:, None] * size + shift).clamp(min=0).to(tokens.device)
    place = start[..., None] + torch.arange(length, device=tokens.device)  # [B, L, K, R]
    rows = torch.arange(batch, device=tokens.device)[:, None, None, None]
    text = tokens[rows, place.clamp(max=tokens.shape[1] - 1)]
    real = ((place < tokens.shape[1]) & (text != 0)).cumprod(-1)
    taught = taught.to(tokens.device)[:, None, None]
    return neighbours._replace(
        tokens=torch.where(taught[..., None], text * real, neighbours.tokens),
        lengths=torch.where(taught, real.sum(-1).to(neighbours.lengths.dtype), neighbours.lengths),
    )


class _Batch(NamedTuple):
    """One forward pass: tokens and targets [B, N], documents [B, E]; the targets scored in the whole step,
    so that every token of a step counts alike, whichever of its batches it stands in."""

    tokens: Tensor
    targets: Tensor
    documents: Tensor
    scored_in_step: int


class _Trainer:
    """Model, optimiser and place in the data of one run."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        model: Retro | RetroFitted,
        packed: Packed,
        retriever: Retriever | None,
        settings: dict[str, Any],
        progress: bool,
        ranks: Ranks,
    ) -> None:
        self.config, self.folder, self.model, self.packed = config, folder, model, packed
        self.retriever, self.settings, self.progress, self.ranks = retriever, settings, progress, ranks
        self.device = next(model.parameters()).device
        self.step = config.first_step
        self.optimiser = _optimiser(config, model)
        self.chunks = 0  # with text, for which neighbours were looked up
        # those that have a neighbour, and the neighbours: counted on the device, which is not waited for
        self.found = torch.zeros(2, dtype=torch.int64)
        self._draw_apart()

    def _draw_apart(self) -> None:
        """Dropout of the other processes is not the first's, which draws as one alone does."""
        if not self.ranks.first:
            torch.manual_seed(hash((self.config.seed, self.ranks.rank, self.step)) % 2**63)

    def view(self) -> dict[str, Any]:
        """What of the run is the same in all processes, or their gradients would be of different runs."""
        found = {
            f"the fingerprint of the {name}": self.settings[name] for name in ("corpus", "tokenizer", "set")
        }
        return {**found, "step": self.step, **{name: self.settings[name] for name in ("device", "dtype")}}

    def load(self, checkpoint: Path, settings: dict[str, Any]) -> None:
        """Goes back to the moment of `checkpoint`."""
        state = load_state(checkpoint)
        if missing := [name for name in ("device", "dtype") if settings.get(name) is None]:
            raise InputError(f"{self.folder / SETTINGS} is damaged ({missing[0]} is missing).")
        for name, what in (
            ("corpus", "The data"),
            ("tokenizer", "The tokenizer"),
            ("set", "The retrieval set"),
        ):
            # runs of earlier versions do not know of their set
            if name in settings and settings[name] != self.settings[name]:
                raise InputError(
                    f"{what} changed since {self.folder} was started, so it cannot be continued. "
                    "Give the same --data and --set, or another --out."
                )
        if self.device.type != settings["device"]:
            note(
                f"The run was started on {settings['device']} and goes on on {self.device.type}: not bit for bit."
            )
        self.settings["dtype"] = settings["dtype"]
        if "summary" in settings:
            self.settings["summary"] = settings["summary"]
        saved: nn.Module
        if isinstance(self.model, RetroFitted):
            saved = RetroFitted.from_pretrained(checkpoint, base=self.model.base)
        else:
            saved = Retro.from_pretrained(checkpoint, device=self.device)
        self.model.load_state_dict(saved.state_dict())
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]
        randoms = [state, *state.get("others", ())]  # of each process
        if self.ranks.rank < len(randoms):
            random = randoms[self.ranks.rank]
            torch.set_rng_state(random["rng"])
            if self.device.type == "cuda" and "cuda_rng" in random:
                torch.cuda.set_rng_state(random["cuda_rng"], self.device)
        else:
            self._draw_apart()
        if len(randoms) != self.ranks.world:
            note(
                f"The run was on {len(randoms)} processes and goes on on {self.ranks.world}: the same but for rounding "
                "and what dropout draws."
            )
        if state["steps"] != self.config.steps:
            note(
                f"The run was planned for {state['steps']:,} steps and now for {self.config.steps:,}: "
                "the learning rate follows the new plan from here on."
            )

    def save(self) -> None:
        random = {"rng": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        random, *others = self.ranks.gathered(random)
        state: dict[str, Any] = {
            "step": self.step,
            "steps": self.config.steps,
            **random,
            "others": others,
            "optimiser": self.optimiser.state_dict(),
        }
        with self.ranks.together("train"):
            if self.ranks.first:
                save_checkpoint(self.folder, self.step, self.model, state)

    def run(self, until: int) -> dict[str, Any]:
        """Steps up to number `until`, a checkpoint at the end."""
        config = self.config
        dtype = pick_dtype(self.settings["dtype"], self.device)
        tokens_per_step = config.accumulate * config.batch_size * config.sequence_length
        first = self.step
        log = _Log(self.folder / METRICS, first, tokens_per_step, self.ranks)
        summary = self.settings.get("summary")
        if first >= until and summary and summary["steps"] == first:  # a finished run that is "resumed"
            return summary
        self.model.train()
        model = self.model if self.ranks.world == 1 else _shared(self.model)
        forward: Any = torch.compile(model) if config.compile else model
        with (
            interruptible() as asked,
            log,
            progress_bar(config.steps, "training", "step", show=self.progress, initial=first) as bar,
        ):
            batches, stopped = self._batches(until), False
            while self.step < until and not stopped:
                rate = learning_rate(config, self.step)
                for group in self.optimiser.param_groups:
                    group["lr"] = rate * group["factor"]
                loss = self._accumulate(batches, forward, dtype, log)
                norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip or math.inf)
                self.optimiser.step()
                self.optimiser.zero_grad(set_to_none=True)
                self.step += 1
                bar.update()
                log.add(loss, norm)
                stopped = self.ranks.any(asked.is_set())
                saved = stopped or self.step == until or self.step % config.save_every == 0
                # before a checkpoint too, so that no step is missing where a run goes on from it
                if saved or self.step % config.log_every == 0:
                    line = log.write(self.step, rate)
                    bar.set_postfix_str(
                        f"loss {line['loss']:.3f}, {line['tokens_per_second']:,.0f} tokens/s, "
                        f"waiting {line['stall_share']:.1%}"
                    )
                    self._check_finite(line)
                if saved:
                    self.save()
            batches.close()
        if stopped and self.step < until:
            raise Interrupted(f"Stopped at step {self.step:,} of {config.steps:,}, checkpoint written.")
        self.settings["summary"] = self.ranks.told(self._summary(log, (self.step - first) * tokens_per_step))
        with self.ranks.together("train"):
            if self.ranks.first:
                if first >= until:  # killed between the last checkpoint and what follows it
                    publish_checkpoint(self.folder, first)
                write_json(self.folder / SETTINGS, self.settings)
        return self.settings["summary"]

    def _accumulate(
        self,
        batches: Iterator[tuple[_Batch, NeighbourBatch | None]],
        forward: Any,
        dtype: torch.dtype,
        log: _Log,
    ) -> Tensor:
        """Gradients of one step; returns what this process's batches add to its mean loss over the scored tokens of
        all its batches."""
        total = torch.zeros((), device=self.device)
        parts = self._parts()
        for part in parts:
            started = time.perf_counter()
            with self.ranks.together("train"):  # or the others would wait for this one's gradients
                batch, neighbours = next(batches)
                log.waited(time.perf_counter() - started)
            tokens, targets = (x.to(self.device, non_blocking=True) for x in (batch.tokens, batch.targets))
            if self.config.lessons and neighbours is not None:
                done = (self.step - self.config.first_step) / (self.config.steps - self.config.first_step)
                share = self.config.lessons * max(0.0, 1 - done / LESSONS_END)
                draw = torch.Generator().manual_seed(hash((self.config.seed, self.step, part)) % 2**63)
                neighbours = give_lessons(tokens, neighbours, share, draw)
            # gradients meet once a step, while those of its last batch are computed
            apart = self.ranks.world > 1 and part != parts[-1]
            with forward.no_sync() if apart else contextlib.nullcontext():
                with autocast(self.device, dtype):
                    logits = forward(tokens, neighbours)
                loss = losses(logits, targets).sum() / batch.scored_in_step
                (loss * self.ranks.world).backward()  # of which the mean over the processes is taken
            total += loss.detach()
        return total

    def _parts(self) -> range:
        """Which of a step's batches are this process's."""
        return range(self.ranks.rank, self.config.accumulate, self.ranks.world)

    def _batches(self, until: int) -> Generator[tuple[_Batch, NeighbourBatch | None], None, None]:
        """The batches from the present step on, each with the neighbours of its chunks on the device."""
        batches = self._read(until)
        if self.retriever is None:
            yield from ((batch, None) for batch in batches)
            return
        found = self.retriever.prefetch(
            batches,
            num_neighbours=self.config.num_neighbours,
            # from the host: on the device they would have to wait for the step that is running
            inputs=lambda batch: (batch.tokens, batch.documents),
        )
        with contextlib.closing(found):
            for batch, neighbours in found:
                there = neighbours.lengths > 0
                self.chunks += int((batch.tokens.unflatten(1, (there.shape[1], -1)) != 0).any(-1).sum())
                self.found = self.found.to(there.device) + torch.stack([there.any(-1).sum(), there.sum()])
                yield batch, neighbours.to(self.device)

    def _read(self, until: int) -> Iterator[_Batch]:
        size = self.config.batch_size
        for step in range(self.step, until):
            first = step * self.config.accumulate * size
            parts = [
                self.packed.read(range(i, i + size))
                for i in range(first, first + self.config.accumulate * size, size)
            ]
            scored = max(1, sum(int((part.targets != IGNORE).sum()) for part in parts))
            for part in (parts[i] for i in self._parts()):
                tokens, targets, documents = map(
                    torch.from_numpy, (part.tokens, part.targets, part.documents)
                )
                yield _Batch(tokens, targets, documents, scored)

    def _check_finite(self, line: dict[str, Any]) -> None:
        if not math.isfinite(line["loss"]) or not math.isfinite(line["grad_norm"]):
            raise InputError(
                f"The loss is {line['loss']} and the gradient's norm {line['grad_norm']} at step {self.step:,}: "
                "training diverged. Give a lower "
                "--learning-rate or a longer --warmup, and another --out."
            )

    def _summary(self, log: _Log, tokens: int) -> dict[str, Any]:
        counts = torch.cat([torch.tensor([self.chunks]), self.found.cpu()])
        chunks, served, neighbours = self.ranks.sum(counts).tolist()
        return {
            "run": str(self.folder),
            "steps": self.step,
            "loss": log.last_loss,
            "tokens": tokens,
            "seconds": log.seconds,
            "tokens_per_second": tokens / log.seconds if log.seconds else None,
            "stall_share": log.total_stalled / log.seconds if log.seconds else None,
            "first_wait_seconds": log.first_wait,
            "neighbours_from_file": self._from_file(),
            "without_neighbours": 1 - served / chunks if chunks else None,
            "neighbours_filled": neighbours / (chunks * self.config.num_neighbours) if chunks else None,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "dtype": self.settings["dtype"],
            "processes": self.ranks.world,
        }

    def _from_file(self) -> float | None:
        if self.retriever is None or not self.config.neighbours:
            return None
        stats = self.retriever.stats
        reused, asked = self.ranks.sum(torch.tensor([stats.reused, stats.queries - stats.padding])).tolist()
        return reused / max(1, asked)


class _Log:
    """Sums over the steps since the last line, and the lines, which the first process writes. Losses stay on the device
    until then."""

    def __init__(self, path: Path, step: int, tokens_per_step: int, ranks: Ranks) -> None:
        """step: after which the lines begin."""
        self._path, self._step, self._tokens_per_step, self._ranks = path, step, tokens_per_step, ranks
        self.seconds = self.stalled = self.total_stalled = 0.0
        self.first_wait: float | None = None  # for the first batch, which no step before it can hide
        self.last_loss: float | None = None
        self._losses: list[Tensor] = []
        self._norm: Tensor | None = None

    def __enter__(self) -> _Log:
        with self._ranks.together("train"):
            self._file = open(self._path if self._ranks.first else os.devnull, "a", encoding="utf-8")
            self._board = _tensorboard(self._path.parent, self._step) if self._ranks.first else None
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._board:
            self._board.close()

    def waited(self, seconds: float) -> None:
        """For a batch and its neighbours. The first wait is start-up, and the clock of the steps starts after it."""
        if self.first_wait is None:
            self.first_wait, self._started = seconds, time.perf_counter()
        else:
            self.stalled += seconds

    def add(self, loss: Tensor, norm: Tensor) -> None:
        self._losses.append(loss)
        self._norm = norm

    def write(self, step: int, rate: float) -> dict[str, Any]:
        assert self._norm is not None
        steps = len(self._losses)
        self.last_loss = self._ranks.sum(torch.stack(self._losses).mean()).item()
        seconds = time.perf_counter() - self._started
        line = {
            "step": step,
            "loss": self.last_loss,
            "learning_rate": rate,
            "grad_norm": self._norm.item(),
            "tokens": step * self._tokens_per_step,
            "tokens_per_second": steps * self._tokens_per_step / seconds,
            "stall_share": self.stalled / seconds,
        }
        with self._ranks.together("train"):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            if self._board:
                for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second", "stall_share"):
                    self._board.add_scalar(f"train/{name}", line[name], step)
        self.seconds += seconds
        self.total_stalled += self.stalled
        self.stalled, self._losses, self._started = 0.0, [], time.perf_counter()
        return line


def _tensorboard(folder: Path, step: int) -> Any:
    """Forgets what stands there from `step` on, as metrics.jsonl does: those steps are done again."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # optional: metrics.jsonl holds the same
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)


def _cut_metrics(path: Path, step: int) -> None:
    """Forgets the lines after `step`: those steps are done again."""
    if path.exists():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        write_whole(path, "".join(line + "\n" for line in lines).encode())


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # the last line of a run that was killed
        return math.inf


def _shared(model: Retro | RetroFitted) -> nn.Module:
    """Whose gradients are the mean over all processes; its buffers are constants, which need not be sent each time."""
    encoder = model.encoder
    if encoder is not None and encoder.conditioning_norm is not None:
        if not encoder.config.encoder_cross_layers:  # no layer reads it: there is no gradient to wait for
            encoder.conditioning_norm.requires_grad_(False)
    known = inspect.signature(DistributedDataParallel).parameters
    # as it is called up to torch 2.12
    name = "broadcast_buffers" if "forward_sync_buffers" not in known else "forward_sync_buffers"
    options: dict[str, Any] = {name: False}
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **options)


def _optimiser(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    groups: dict[tuple[float, float], list[Tensor]] = {}  # (weight decay, factor of the learning rate)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim == 2 and name.endswith("weight")
            added = config.retrofit and (name.startswith("encoder.") or ".cca" in name)
            kind = (config.weight_decay if matrix else 0.0, config.added_rate if added else 1.0)
            groups.setdefault(kind, []).append(parameter)
    made = [{"params": p, "weight_decay": decay, "factor": factor} for (decay, factor), p in groups.items()]
    return torch.optim.AdamW(made, lr=config.learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)


def _new_model(config: TrainConfig, model_config: RetroConfig) -> Retro:
    if not config.retrofit:
        return Retro(model_config)
    base = load_run(config.retrofit)
    if not isinstance(base.model, Retro) or base.model.config.cca_layers:
        raise InputError(f"retrofit: {config.retrofit} is a RETRO already; give the run of a plain decoder.")
    own, wanted = base.model.config.to_dict(), model_config.to_dict()
    for name in own:
        if name not in ("cca_layers", *_RETROFIT_FIELDS) and wanted[name] != own[name]:
            raise InputError(
                f"retrofit: {name} is {wanted[name]} by --preset or --model, but the decoder {config.retrofit} has "
                f"{own[name]}. Its own sizes stay: leave out --preset and such fields."
            )
    changes = {name: wanted[name] for name in _RETROFIT_FIELDS}
    return Retro.from_decoder(
        base.model, model_config.cca_layers, freeze=not config.unfreeze, copy=config.copy, **changes
    )


def _is_pretrained(folder: str | None) -> bool:
    """Whether `folder`, which holds one of the two, holds a model of transformers, and no run."""
    if not folder or (Path(folder) / SETTINGS).exists():
        return False
    return "model_type" in read_config(Path(folder))


def _fitted(config: TrainConfig, tokenizer: Tokenizer, chunk_size: int) -> RetroFitted:
    """Retrieval for the model of transformers in the folder `config.retrofit`."""
    folder = Path(str(config.retrofit))
    for name in ("preset", "unfreeze", "copy", "compile"):
        if getattr(config, name):
            raise InputError(f"retrofit: {name} is not possible where {folder} is a model of transformers.")
    files = [folder / name for name in ("tokenizer.json", TOKENIZER) if (folder / name).is_file()]
    if not files:
        save = f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        raise InputError(
            f"retrofit: {folder} has no tokenizer.json, with which its set is to be built. Write it in Python: "
            f"from transformers import AutoTokenizer; {save}"
        )
    if tokenizer.fingerprint not in [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]:
        raise InputError(
            f"retrofit: {folder} has another tokenizer than {config.set}. Build the set with --tokenizer {files[0]}."
        )
    base = load_base(folder, torch.float32)
    longest = longest_sequence(base, tokenizer.file_bos_id)
    if config.sequence_length > longest:
        raise InputError(
            f"train: sequence_length is {config.sequence_length}; {folder} was made for at most {longest} tokens."
        )
    _check_whole_chunks(config, chunk_size)
    if (entries := base.get_input_embeddings().num_embeddings) < tokenizer.vocab_size:
        raise InputError(
            f"retrofit: the tokenizer of {folder} has {tokenizer.vocab_size:,} tokens, but the model's table only "
            f"{entries:,}. Make it larger in Python: model.resize_token_embeddings({tokenizer.vocab_size}), and "
            "save_pretrained."
        )
    given = parse_overrides(config.model)
    if useless := sorted(given.keys() & {"ffn_dim", "self_attention", "tie_embeddings"}):
        raise InputError(
            f"retrofit: {useless} are those of the model in {folder}; leave them out of --model."
        )
    fixed = {"chunk_size": chunk_size, "neighbour_len": 2 * chunk_size, "pad_id": tokenizer.file_pad_id}
    return RetroFitted(
        base, bos_id=tokenizer.file_bos_id, **{**given, **_fixed(given, f"by the set {config.set}", **fixed)}
    )


_RETROFIT_FIELDS = (
    "chunk_size",
    "neighbour_len",
    "encoder_dim",
    "encoder_layers",
    "encoder_heads",
    "encoder_head_dim",
    "encoder_ffn_dim",
    "encoder_cross_layers",
    "cca_position",
    "share_encoder_embedding",
    "normalise_conditioning",
    "normalise_encoder_output",
    "dropout",
)


def _fixed(given: dict[str, Any], by: str, **values: Any) -> dict[str, Any]:
    """`values`, which something else than --model decides; InputError where --model gives another one."""
    for name, value in values.items():
        if given.get(name, value) != value:
            raise InputError(
                f"train: --model {name}={given[name]}, but it is {value}, fixed {by}. Leave it out."
            )
    return values


def _model_config(config: TrainConfig, tokenizer: Tokenizer, retriever: Retriever | None) -> RetroConfig:
    base = read_settings(Path(config.retrofit)) if config.retrofit else None
    if base is not None and base["tokenizer"] != tokenizer.fingerprint:
        raise InputError(
            f"retrofit: {config.retrofit} has another tokenizer than {config.set}. Build the set with "
            f"--tokenizer {Path(str(config.retrofit)) / TOKENIZER}."
        )
    before = {} if base is None else base["config"]
    name = config.preset or before.get("preset") or DEFAULT_PRESET
    given = parse_overrides(config.model)
    overrides: dict[str, Any] = {**parse_overrides(tuple(before.get("model", ()))), **given}
    overrides.update(
        _fixed(given, "by the tokenizer", vocab_size=tokenizer.vocab_size, pad_id=tokenizer.pad_id)
    )
    if retriever is None:
        overrides["cca_layers"] = ()
    else:
        size = retriever.chunk_size
        overrides.update(_fixed(given, f"by the set {config.set}", chunk_size=size, neighbour_len=2 * size))
    model_config = preset(name, **overrides)
    if retriever is not None and not model_config.cca_layers:
        raise InputError(
            "train: the model has no cca_layers, so it cannot use the set. Name layers, or leave out --set."
        )
    _check_whole_chunks(config, model_config.chunk_size)
    return model_config


def _check_whole_chunks(config: TrainConfig, chunk_size: int) -> None:
    if config.sequence_length % chunk_size:
        raise InputError(
            f"train: sequence_length is {config.sequence_length}; it must be a multiple of the chunk size, "
            f"{chunk_size}."
        )


def _open_set(config: TrainConfig, device: torch.device, progress: bool) -> Retriever | None:
    if config.set is None:
        return None
    from .retrieval import Retriever

    retriever = Retriever.from_pretrained(
        config.set,
        device=device,
        retriever=config.retriever,
        neighbours=config.neighbours,
        seed=config.seed,
        progress=progress,
    )
    retriever.check_num_neighbours(config.num_neighbours)
    return retriever


def _check_file(file: str, retriever: Retriever, corpus: TokenDocuments) -> None:
    """Whether the file of neighbours is of this text: what it does not have is searched for, which it was to spare."""
    from .retrieval.neighbours import share_in_file

    documents = retriever.find_documents(corpus.hashes).numpy()[corpus.of_chunks()]
    share = share_in_file(retriever, corpus.chunks, documents)
    assert share is not None
    told = f"{file} holds the neighbours of {share:.1%} of the chunks of this text"
    if share < LEAST_FROM_FILE:
        raise InputError(
            f"train: {told}, so it was made for another. Make one for this text (retro-kernels neighbours --data …), "
            "or leave --neighbours out."
        )
    if share < 1:
        note(f"{told}. For the others they are searched for in the step.")


def _tokenizer(config: TrainConfig, retriever: Retriever | None, text: Text, resumed: bool) -> Tokenizer:
    if retriever is not None or config.tokenizer:
        found = retriever.tokenizer if retriever is not None else Tokenizer(str(config.tokenizer))
        if config.vocab_size not in (None, found.vocab_size):
            raise InputError(
                f"train: vocab_size is {config.vocab_size}, but the tokenizer of {config.set or config.tokenizer} has "
                f"{found.vocab_size} entries. It is for a tokenizer that is trained here: leave it out."
            )
        return found
    if resumed:
        return Tokenizer(Path(config.out) / TOKENIZER)
    check_vocab_size(config.vocab_size)
    sampler = TextSampler()
    text.survey(sampler)
    with tempfile.TemporaryDirectory() as scratch:
        return Tokenizer.train_on_sample(sampler, Path(scratch) / TOKENIZER, config.vocab_size)


def _set_fingerprint(retriever: Retriever) -> str:
    from .retrieval.neighbours import manifest_fingerprint

    return manifest_fingerprint(retriever.store.manifest)


def _check_same(config: TrainConfig, stored: dict[str, Any], folder: Path) -> None:
    """InputError where more than what is free differs from what `stored`, out of train.json, says."""
    before = TrainConfig.from_dict(stored)
    different = [
        name
        for name in before.to_dict()
        if name not in _FREE
        and getattr(before, name) != getattr(config, name)
        and not (name in PLACES and _may_be_same(_paths(before, name), _paths(config, name), stored, folder))
    ]
    if different:
        shown = ", ".join(
            f"{name} was {getattr(before, name)!r} and is now {getattr(config, name)!r}" for name in different
        )
        raise InputError(f"{folder} cannot be continued: {shown}. Give the same options, or another --out.")


def _paths(config: TrainConfig, name: str) -> tuple[str, ...]:
    value = getattr(config, name)
    return value if isinstance(value, tuple) else () if value is None else (value,)


def _may_be_same(old: tuple[str, ...], new: tuple[str, ...], stored: dict[str, Any], folder: Path) -> bool:
    """The same place may be spelt in two ways, or have moved. Fingerprints tell whether it holds the same."""
    if len(old) != len(new):
        return False
    for before, now in zip(old, new, strict=True):
        if "-" in (before, now):
            if before != now:
                return False
            continue
        found = places(before, stored, folder)
        gone = not any(map(os.path.exists, found))
        if not gone and os.path.realpath(now) not in map(os.path.realpath, found):
            return False
    return True


def _resume_command(config: TrainConfig, ranks: Ranks) -> str:
    program = ["retro-kernels"]
    if ranks.world > 1:
        here = os.environ.get("LOCAL_WORLD_SIZE", str(ranks.world))
        # several machines meet as they did before
        alone = ["--standalone"] if here == str(ranks.world) else []
        program = ["torchrun", *alone, "--nproc-per-node", here, "-m", "retro_kernels"]
    return shlex.join([*program, "train", "--out", config.out, "--resume"])
