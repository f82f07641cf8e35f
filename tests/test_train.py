"""Training: what a batch is, what resuming promises, what cannot be combined."""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import CHUNK, MODEL, PLAIN, SEQUENCE, World, losses, run, watch_reading, weights
from torch.utils._python_dispatch import TorchDispatchMode

from retro_kernels import runs
from retro_kernels import train as train_module
from retro_kernels.config import DEFAULT_PRESET, PLACES, InputError, TrainConfig, parse_overrides, preset
from retro_kernels.data.corpus import Document, read_documents
from retro_kernels.data.packing import IGNORE, Packed, TokenDocuments, tokenise
from retro_kernels.data.tokenizer import Tokenizer
from retro_kernels.evaluate import evaluate
from retro_kernels.generate import generate
from retro_kernels.nn import Retro, attention, saving
from retro_kernels.ops import NeighbourBatch
from retro_kernels.ranks import Ranks
from retro_kernels.retrieval import Retriever, writing
from retro_kernels.runs import Interrupted, alone_in, checkpoints, load_run, load_state
from retro_kernels.train import learning_rate, train


def test_packed_sequences_are_the_documents(world: World, seed: int) -> None:
    """Every token of every document once an epoch, each with its successor as target, on the grid of the chunks."""
    tokenizer = Tokenizer(world.set / "tokenizer.model")
    rng = random.Random(seed)
    documents = [
        Document(f"{i}", f"{i}: " + "lomi ka " * rng.randint(1, 90)) for i in range(rng.randint(3, 12))
    ]
    exact = tokenizer.decode(tokenizer.encode("lomi ka " * 90)[: 2 * CHUNK])
    documents.append(Document("fills its last chunk", exact))
    corpus = tokenise(documents, tokenizer, CHUNK)
    assert len(corpus.tokens(len(documents) - 1)) == 2 * CHUNK
    assert corpus.fingerprint() != tokenise(documents, tokenizer, 2 * CHUNK).fingerprint()
    packed = Packed(corpus, SEQUENCE, seed, lambda hashes: np.arange(len(hashes)))
    batch = packed.read(range(packed.num_sequences))
    order = np.argsort([packed.sequence(i) for i in range(packed.num_sequences)])
    tokens, targets = batch.tokens[order].reshape(-1), batch.targets[order].reshape(-1)
    seen = set()
    place = 0
    while place < len(tokens) and tokens[place]:  # documents one after another, in any order
        rest = tokens[place:]
        number = next(
            d
            for d in range(len(documents))
            if d not in seen and np.array_equal(rest[: len(corpus.tokens(d))], corpus.tokens(d))
        )
        seen.add(number)
        text = corpus.tokens(number)
        assert np.array_equal(targets[place : place + len(text)], [*text[1:], 0])
        chunks = -(-len(text) // CHUNK)
        padding = targets[place + len(text) : place + chunks * CHUNK]
        if len(padding):
            assert (padding[:-1] == IGNORE).all()
            following = tokens[place + chunks * CHUNK] if place + chunks * CHUNK < len(tokens) else 0
            assert padding[-1] == (following or IGNORE)
        for row in range(place // SEQUENCE, (place + chunks * CHUNK - 1) // SEQUENCE + 1):
            assert number in batch.documents[order][row]
        place += chunks * CHUNK
    assert seen == set(range(len(documents)))
    # another epoch visits the same sequences
    again = sorted(packed.sequence(i) for i in range(packed.num_sequences, 2 * packed.num_sequences))
    assert again == list(range(packed.num_sequences))


def test_the_order_of_the_data_is_the_seeds(seed: int) -> None:
    """Of the documents, and in each epoch another one of the sequences."""
    ids = np.arange(1, 41, dtype=np.uint16)
    corpus = TokenDocuments(
        ids[:, None], np.arange(41), ids.astype(int), ["x"] * 40, ids.astype(int), ids.astype(int)
    )

    def orders(seed: int, length: int) -> list[tuple[int, ...]]:
        packed = Packed(corpus, length, seed)
        count = packed.num_sequences
        epochs = [packed.read(range(e * count, (e + 1) * count)).tokens for e in range(2)]
        return [tuple(epoch.flatten().tolist()) for epoch in epochs]

    assert orders(seed, 1) == orders(seed, 1) and orders(seed, 40) == orders(seed, 40)
    assert len({*orders(seed, 1), *orders(seed + 1, 1), tuple(ids.tolist())}) == 5
    assert (
        len({*orders(seed, 40), *orders(seed + 1, 40), tuple(ids.tolist())}) == 3
    )  # one sequence, of all documents
    packed = [Packed(corpus, 2, s) for s in (seed, seed + 1)]
    assert len({tuple(map(p.sequence, range(start, start + 20))) for p in packed for start in (0, 20)}) == 4
    # where a run begins does not matter, nor what was read before
    one, another = Packed(corpus, 3, seed), Packed(corpus, 3, seed)
    assert one.num_sequences == 14  # the last holds one chunk
    read = one.read(range(14))  # every token is the last of its document
    assert np.count_nonzero(read.targets == 0) == 40 and np.count_nonzero(read.targets == IGNORE) == 2
    assert read.documents.size == 0  # of a set, and there is none
    visits = random.sample(range(70), 70)
    assert sorted(zip(visits, map(one.sequence, visits), strict=True)) == [
        (i, another.sequence(i)) for i in range(70)
    ]
    batches = one.batches(20, 4)
    for first in (20, 24):
        assert np.array_equal(next(batches).tokens, another.read(range(first, first + 4)).tokens)
    with pytest.raises(InputError, match="of whole chunks: 5 tokens are not a multiple of 2"):
        Packed(
            TokenDocuments(np.ones((2, 2), np.uint16), np.arange(3), ids[:2], ["x"] * 2, ids[:2], ids[:2]),
            5,
            seed,
        )


class _Sizes(TorchDispatchMode):
    """Remembers the largest float32 tensor that was made."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.largest = max(self.largest, tensor.numel())
        return made


@pytest.mark.parametrize("reach", [1, 100, 240, 1 << 20])
def test_losses_are_cross_entropy(monkeypatch: pytest.MonkeyPatch, seed: int, reach: int) -> None:
    """In parts, by the definition in float64, with the gradients that all rows at once have, to the last bit."""
    monkeypatch.setattr(runs, "_LOGITS", reach)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 7, 40, generator=generator).to(torch.bfloat16)[:, :5].requires_grad_()
    targets = torch.randint(40, (3, 5), generator=generator)
    targets[1, 2:] = IGNORE
    made = runs.losses(logits, targets)
    expected = -logits.double().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(
        made.double(), expected.masked_fill(targets == IGNORE, 0), rtol=1e-6, atol=1e-6
    )
    assert made.dtype == torch.float32 and (made[1, 2:] == 0).all()
    whole = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
    in_parts, at_once = (torch.autograd.grad(x / 12, logits)[0] for x in (made.sum(), whole))
    assert torch.equal(in_parts, at_once)


def test_logits_are_never_copied_whole(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, where they are in bf16: to get the memory for that took longer than what is computed."""
    monkeypatch.setattr(runs, "_LOGITS", 1 << 12)
    logits = 2 * SEQUENCE * load_run(world.plain).tokenizer.vocab_size  # the batch of both
    words = ("--tokenizer", world.set / "tokenizer.model", *PLAIN, "--steps", 1, "--dtype", "bf16")
    with _Sizes() as trained:
        assert run("train", "--data", world.train, "--out", tmp_path / "run", *words) == 0
    with _Sizes() as scored:
        evaluate(world.plain, [world.held_out], batch_size=2, dtype="bf16", device="cpu", progress=False)
    assert 0 < trained.largest < logits and 0 < scored.largest < logits


def test_what_is_counted_of_documents(world: World) -> None:
    """Bytes and words of those with text; progress is told of the others too, for it to end at the whole."""
    tokenizer = Tokenizer(world.set / "tokenizer.model")
    documents = [Document("a", ""), Document("b", " naïve\n\n文字 \t🙂 "), Document("c", "ka")]
    told: list[int] = []
    corpus = tokenise(documents, tokenizer, CHUNK, told.append)
    assert corpus.titles == ["b", "c"] and told == [len(document.text) for document in documents]
    assert corpus.num_words.tolist() == [3, 1]
    assert corpus.num_bytes.tolist() == [len(document.text.encode()) for document in documents[1:]]
    with pytest.raises(InputError, match="no document with text"):
        tokenise(documents[:1], tokenizer, CHUNK)


def test_neighbours_are_of_other_documents(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model is given in training: no neighbour is of a document that its sequence holds a part of."""
    given: list[tuple[torch.Tensor, NeighbourBatch]] = []
    forward = Retro.forward

    def watched(model: Retro, tokens: torch.Tensor, neighbours: NeighbourBatch) -> torch.Tensor:
        given.append((tokens, neighbours))
        return forward(model, tokens, neighbours)

    monkeypatch.setattr(Retro, "forward", watched)
    words = ["--data", world.train, "--out", tmp_path / "r", "--set", world.set, "--steps", 3]
    assert run("train", *words, "--accumulate", 2, *MODEL) == 0
    retriever = Retriever.from_pretrained(world.set)
    owners: dict[tuple[int, ...], set[int]] = {}
    for chunk, document in zip(retriever.store.chunks, retriever.store.document_ids, strict=True):
        owners.setdefault(tuple(chunk.tolist()), set()).add(int(document))
    assert len(given) == 6
    for tokens, neighbours in given:
        for row, ids in zip(tokens, neighbours.ids, strict=True):
            held = [owners[tuple(chunk)] for chunk in row.view(-1, CHUNK).tolist() if any(chunk)]
            own = {document for some in held if len(some) == 1 for document in some}  # without doubt
            found = {*retriever.documents(ids).flatten().tolist()} - {-1}
            assert own and found and not own & found


def test_learning_rate() -> None:
    config = TrainConfig(data=("x",), out="y", steps=100, warmup=10, learning_rate=2.0)
    rates = [learning_rate(config, step) for step in range(100)]
    assert (
        rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(2.0) and max(rates) == rates[10] == 2.0
    )
    assert rates[55] == pytest.approx(2.0 * 0.55)  # half way down from 1 to 0.1
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0.2 < rates[99] < 0.21


def test_defaults_of_training_are_the_papers() -> None:
    config = TrainConfig(data=("x",), out="y", steps=100_000)
    assert (config.weight_decay, config.num_neighbours, config.warmup_steps) == (0.1, 2, 750)


def test_matrices_alone_decay_and_gradients_are_clipped(world: World, tmp_path: Path) -> None:
    """To nearly nothing here, so that the decay is what a step does."""
    words = ["--data", world.train, "--set", world.set, "--out", tmp_path / "r", *MODEL]
    options = ["--steps", 1, "--lr", 0.1, "--weight-decay", 0.5, "--clip", 1e-12]
    assert run("train", *words, *options) == 0
    trained = Retro.from_pretrained(tmp_path / "r")
    torch.manual_seed(0)
    for (name, before), after in zip(
        Retro(trained.config).named_parameters(), trained.parameters(), strict=True
    ):
        decays = before.ndim == 2 and name.endswith(".weight")
        torch.testing.assert_close(after, 0.95 * before if decays else before, rtol=0, atol=1e-4)
    for name, clip in (("none", 0), ("far", 1e12)):  # 0 is no limit
        words[5] = tmp_path / name
        assert run("train", *words, "--steps", 2, "--clip", clip) == 0
    assert weights(tmp_path / "none") == weights(tmp_path / "far")


def test_a_run_is_this_loop(world: World, tmp_path: Path) -> None:
    """Data, neighbours, schedule, clipping and AdamW written out once more: the weights come out the same."""
    steps, rate, warmup, decay, clip, seed = 6, 0.01, 2, 0.3, 0.4, 3
    words = ["--steps", steps, "--lr", rate, "--warmup", warmup, "--weight-decay", decay, "--clip", clip]
    out = ["--data", world.train, "--set", world.set, "--out", tmp_path / "r"]
    assert run("train", *out, *words, "--seed", seed, "--accumulate", 2, "--log-every", 1, *MODEL) == 0
    trained, retriever = Retro.from_pretrained(tmp_path / "r"), Retriever.from_pretrained(world.set)
    corpus = tokenise(read_documents([world.train]), retriever.tokenizer, CHUNK)
    packed = Packed(corpus, SEQUENCE, seed, lambda hashes: retriever.find_documents(hashes).numpy())
    torch.manual_seed(seed)
    model = Retro(trained.config)
    first = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    second = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    reported, clipped = losses(tmp_path / "r"), 0
    for step in range(steps):
        batch = packed.read(range(4 * step, 4 * step + 4))
        tokens, targets, documents = map(torch.from_numpy, (batch.tokens, batch.targets, batch.documents))
        found = retriever(tokens, num_neighbours=2, exclude_documents=documents)
        log = torch.log_softmax(model(tokens, found), -1)
        scored = targets != IGNORE
        loss = -log[scored].gather(-1, targets[scored][:, None]).mean()
        assert reported[step] == (step + 1, pytest.approx(loss.item(), rel=1e-4))
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.cat([g.flatten() for g in gradients]).norm().item()
        clipped += norm > clip
        done = (step - warmup) / (steps - warmup)
        now = rate * ((step + 1) / warmup if step < warmup else 0.1 + 0.45 * (1 + math.cos(math.pi * done)))
        with torch.no_grad():
            for name, p, g in zip(names, parameters, gradients, strict=True):
                g = g * min(1.0, clip / norm)
                first[name].mul_(0.9).add_(0.1 * g)
                second[name].mul_(0.95).add_(0.05 * g * g)
                if p.ndim == 2 and name.endswith("weight"):
                    p.mul_(1 - now * decay)
                m, v = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.95 ** (step + 1))
                p.sub_(now * m / (v.sqrt() + 1e-8))
    assert clipped
    pairs = zip(model.parameters(), trained.parameters(), strict=True)
    far = torch.cat([(p - q).abs().flatten() for p, q in pairs])
    # AdamW makes a step out of the sign of a gradient that is nothing but noise
    assert (far > 0.01 * rate).double().mean() < 1e-2


def test_training_that_diverges(world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The line names what is no number, and no checkpoint holds it: the one before is kept."""
    words = ["--data", world.train, "--set", world.set, "--out", tmp_path / "r", *MODEL]
    assert run("train", *words, "--steps", 2) == 0
    kept = weights(tmp_path / "r")
    state_path = checkpoints(tmp_path / "r")[0][1] / "training.pt"
    state = torch.load(state_path, weights_only=True)
    for moments in state["optimiser"]["state"].values():
        moments["exp_avg"].fill_(math.inf)
    torch.save(state, state_path)
    capfd.readouterr()
    assert run("train", *words, "--resume", "--steps", 9, "--log-every", 9, "--save-every", 2) == 2
    err = capfd.readouterr().err
    assert "The loss is nan and the gradient's norm nan at step 4: training diverged" in err
    assert weights(tmp_path / "r") == kept and [step for step, _ in checkpoints(tmp_path / "r")] == [2]


def test_an_infinite_gradient_is_as_bad_as_an_infinite_loss() -> None:
    trainer: Any = types.SimpleNamespace(step=3)
    train_module._Trainer._check_finite(trainer, {"loss": 1.0, "grad_norm": 2.0})
    for loss, norm in ((1.0, math.inf), (math.inf, 1.0), (math.nan, 1.0)):
        with pytest.raises(InputError, match="at step 3: training diverged"):
            train_module._Trainer._check_finite(trainer, {"loss": loss, "grad_norm": norm})


def test_resume_is_bit_for_bit(world: World, tmp_path: Path, seed: int) -> None:
    """With live retrieval, dropout and accumulation: 4 and 4 steps are the 8 steps of a run that never stopped."""
    options = [
        "--data",
        world.train,
        "--set",
        world.set,
        "--steps",
        8,
        "--seed",
        seed % 1000,
        "--accumulate",
        2,
        "--log-every",
        1,
        *MODEL,
        "dropout=0.1",
    ]
    assert run("train", "--out", tmp_path / "whole", *options) == 0
    assert run("train", "--out", tmp_path / "parts", *options, "--stop-after", 4) == 0
    assert weights(tmp_path / "parts") != weights(tmp_path / "whole")
    assert run("train", "--data", world.train, "--out", tmp_path / "parts", "--resume") == 0
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 8
    assert [step for step, _ in checkpoints(tmp_path / "parts")] == [8]
    assert not list(tmp_path.rglob("*.tmp-*"))
    before = losses(tmp_path / "parts")
    assert (
        run("train", "--data", world.train, "--out", tmp_path / "parts", "--resume") == 0
    )  # nothing is left to do
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole") and losses(tmp_path / "parts") == before
    state = load_state(checkpoints(tmp_path / "parts")[0][1])  # loads without unpickling
    assert state["step"] == 8 and state["optimiser"]["state"]


def test_training_learns(world: World, tmp_path: Path) -> None:
    assert (
        run(
            "train",
            "--data",
            world.train,
            "--out",
            tmp_path / "r",
            "--set",
            world.set,
            "--steps",
            60,
            "--lr",
            "1e-2",
            "--log-every",
            5,
            *MODEL,
        )
        == 0
    )
    curve = losses(tmp_path / "r")
    assert curve[-1][1] < curve[0][1] - 1.0


def interrupt_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Ctrl-C during that forward pass of a `Retro`, counted from 1."""
    forward, calls = Retro.forward, []

    def interrupting(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(*args)

    monkeypatch.setattr(Retro, "forward", interrupting)


def test_no_step_is_missing_from_the_metrics(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines every three steps, and before each checkpoint: of a run that was interrupted too, all on one grid."""
    words = ["--data", world.train, "--tokenizer", world.set / "tokenizer.model", "--steps", 8, *PLAIN]
    words = [*words[:-1], f"chunk_size={CHUNK}", "dropout=0.1"]
    grid = ["--log-every", 3, "--save-every", 7]
    assert run("train", "--out", tmp_path / "all", "--log-every", 1, *words) == 0
    every = [loss for _, loss in losses(tmp_path / "all")]
    assert run("train", "--out", tmp_path / "whole", *grid, *words) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        assert run("train", "--out", tmp_path / "parts", *grid, *words) == 130
    assert [step for step, _ in losses(tmp_path / "parts")] == [3, 4]
    assert run("train", "--data", world.train, "--out", tmp_path / "parts", "--resume") == 0
    with monkeypatch.context() as patch:  # there is nothing left to be interrupted
        interrupt_at(patch, 2)
        assert run("train", "--out", tmp_path / "last", *words, "--steps", 2) == 0
    for name, steps in (("whole", [3, 6, 7, 8]), ("parts", [3, 4, 6, 7, 8])):
        lines = losses(tmp_path / name)
        assert [step for step, _ in lines] == steps
        for (start, _), (stop, loss) in zip([(0, 0.0), *lines], lines, strict=False):
            assert loss == pytest.approx(np.mean(every[start:stop]), rel=1e-6)


def test_what_a_line_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time and losses since the line before, without the first wait; tokens from the beginning."""
    now = [0.0]
    monkeypatch.setattr(train_module, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(train_module, "_tensorboard", lambda *_: None)
    with train_module._Log(tmp_path / "metrics.jsonl", 0, 10, Ranks()) as log:
        now[0] = 5.0
        log.waited(5.0)
        log.waited(0.5)
        now[0] = 9.0
        log.add(torch.tensor(2.0), torch.tensor(3.0))
        log.write(1, 0.1)
        for loss in (4.0, 8.0):
            log.add(torch.tensor(loss), torch.tensor(1.0))
        now[0] = 11.0
        log.write(3, 0.2)
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first == {
        "step": 1,
        "loss": 2.0,
        "learning_rate": 0.1,
        "grad_norm": 3.0,
        "tokens": 10,
        "tokens_per_second": 2.5,
        "stall_share": 0.125,
    }
    assert second == {
        "step": 3,
        "loss": 6.0,
        "learning_rate": 0.2,
        "grad_norm": 1.0,
        "tokens": 30,
        "tokens_per_second": 10.0,
        "stall_share": 0.0,
    }
    assert (log.seconds, log.total_stalled, log.first_wait, log.last_loss) == (6.0, 0.5, 5.0, 6.0)


def test_tensorboard_gets_the_metrics_of_each_step_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is installed; what follows a resumed step is forgotten, as in metrics.jsonl."""
    told: list[Any] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            told.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            told.append((name, step))

        def close(self) -> None:
            told.append("closed")

    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    words = ["train", "--data", world.train, "--set", world.set, "--out", tmp_path / "r", "--log-every", 1]
    assert run(*words, "--steps", 3, "--stop-after", 2, *MODEL) == 0
    assert run("train", "--data", world.train, "--out", tmp_path / "r", "--resume") == 0
    folder = str(tmp_path / "r" / "tensorboard")
    assert [line for line in told if line[0] in (folder, "train/loss", "c")] == [
        (folder, 1),
        ("train/loss", 1),
        ("train/loss", 2),
        "closed",
        (folder, 3),
        ("train/loss", 3),
        "closed",
    ]


def test_interrupt_saves_and_says_how_to_go_on(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r"

    def interrupt() -> None:
        metrics = out / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    assert (
        run(
            "train",
            "--data",
            world.train,
            "--out",
            out,
            "--set",
            world.set,
            "--steps",
            100000,
            "--log-every",
            2,
            *MODEL,
        )
        == 130
    )
    thread.join()
    last = capfd.readouterr().err.strip().splitlines()[-1]
    before, words = last.split("Continue with: retro-kernels ")
    assert "checkpoint written" in before
    step = checkpoints(out)[-1][0]
    assert run(*shlex.split(words), "--stop-after", 1) == 0
    assert checkpoints(out)[-1][0] == step + 1


def test_interrupted_with_documents_of_the_callers(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No command line has them, so none is named."""
    interrupt_at(monkeypatch, 1)
    config = TrainConfig(
        data=("x",),
        out=str(tmp_path / "r"),
        preset="retro_tiny",
        tokenizer=str(world.set / "tokenizer.model"),
        sequence_length=SEQUENCE,
        model=(f"chunk_size={CHUNK}",),
        device="cpu",
    )
    with pytest.raises(Interrupted) as stopped:
        train(config, documents=[Document("a", "lomi ka " * 200)], progress=False)
    assert str(stopped.value) == "Stopped at step 1 of 1,000, checkpoint written."
    with pytest.raises(InputError, match="stop_after is 0; it must be an integer of at least 1"):
        train(config, resume=True, stop_after=0, documents=[Document("a", "lomi ka " * 200)], progress=False)
    interrupt_at(monkeypatch, 1)  # in the last step there is nothing left to go on with
    assert run("train", "--data", world.train, "--out", tmp_path / "whole", "--steps", 1, *PLAIN) == 0


def test_a_run_keeps_its_arithmetic_and_its_summary(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also on another processor, which multiplies in bf16; the kind of device it began on is said where it is another.
    What is left of it without a checkpoint is not trained over."""
    words = ["train", "--data", world.train, "--set", world.set, *MODEL, "--steps", 4]
    assert run(*words, "--out", tmp_path / "whole") == 0
    assert run(*words, "--out", tmp_path / "parts", "--stop-after", 2) == 0
    capfd.readouterr()
    monkeypatch.setattr(runs, "cpu_has_bf16", lambda: True)
    assert run("train", "--data", world.train, "--out", tmp_path / "parts", "--resume", "--json") == 0
    out, err = capfd.readouterr()
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole") and "was started on" not in err
    settings = json.loads((tmp_path / "parts" / "train.json").read_text())
    assert (
        json.loads(out) == settings["summary"] and settings["dtype"] == settings["summary"]["dtype"] == "fp32"
    )
    (tmp_path / "parts" / "train.json").write_text(json.dumps({**settings, "device": "cuda"}))
    assert run("train", "--data", world.train, "--out", tmp_path / "parts", "--resume", "--json") == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == settings["summary"]
    assert "was started on cuda and goes on on cpu: not bit for bit" in err
    shutil.rmtree(tmp_path / "parts" / "checkpoint-00000004")
    for more, said in (
        ([], "holds a training run already"),
        (["--resume"], "holds a trained model, and no checkpoint from which it could go on"),
    ):
        assert run(*words, "--out", tmp_path / "parts", *more) == 2
        assert said in capfd.readouterr().err
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_the_new_checkpoint_is_on_the_disk_before_the_old_one_goes(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "r"
    words = ["--data", world.train, "--tokenizer", world.set / "tokenizer.model", *PLAIN]
    assert run("train", *words, "--out", out, "--steps", 4, "--stop-after", 2) == 0
    synced: set[int] = set()  # inode numbers
    fsync, rmtree = os.fsync, shutil.rmtree

    def syncing(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def removing(path: Path, **options: Any) -> None:
        if Path(path).name == "checkpoint-00000002":
            new = out / "checkpoint-00000004"
            missing = [p for p in (out, new, *new.iterdir()) if p.stat().st_ino not in synced]
            assert not missing and len(list(new.iterdir())) == 3
            removed.append(path)
        rmtree(path, **options)

    removed: list[Path] = []
    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(shutil, "rmtree", removing)
    assert run("train", "--data", world.train, "--out", out, "--resume") == 0
    assert len(removed) == 1


def test_metrics_are_whole_at_any_moment(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines of steps that are done again are left out of another file, which takes the name when it is whole."""
    out = tmp_path / "r"
    words = ["--data", world.train, "--tokenizer", world.set / "tokenizer.model", "--log-every", 1, *PLAIN]
    assert run("train", *words, "--out", out, "--steps", 4, "--stop-after", 2) == 0
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "loss": 1')
    before = (out / "metrics.jsonl").read_bytes()

    def failing(source: Any, target: Any) -> None:
        if Path(target).name == "metrics.jsonl":
            raise OSError(28, "No space left on device")
        replace(source, target)

    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        assert run("train", "--data", world.train, "--out", out, "--resume") == 2
    assert (out / "metrics.jsonl").read_bytes() == before and not list(out.glob("*.tmp-*"))
    assert run("train", "--data", world.train, "--out", out, "--resume") == 0
    assert [step for step, _ in losses(out)] == [1, 2, 3, 4]


def test_fewer_steps_than_are_done(world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r"
    words = ["--data", world.train, "--tokenizer", world.set / "tokenizer.model", *PLAIN]
    assert run("train", *words, "--out", out, "--steps", 2) == 0
    again = ["train", "--data", world.train, "--out", out, "--resume", "--json"]
    assert run(*again, "--steps", 6, "--stop-after", 2) == 0
    before = (out / "train.json").read_bytes()
    capfd.readouterr()
    assert run(*again, "--steps", 3) == 2
    said = capfd.readouterr()
    assert said.out == "" and "steps is 3, but the checkpoint in" in said.err and "is of step 4" in said.err
    assert (out / "train.json").read_bytes() == before
    # cut off while it was to go on: the summary in train.json is of an earlier end
    settings = json.loads(before)
    settings["summary"]["steps"] = 2
    (out / "train.json").write_text(json.dumps(settings))
    assert run(*again, "--steps", 4) == 0
    assert json.loads(capfd.readouterr().out)["steps"] == 4


@pytest.mark.parametrize("tokenizer", ["given", "trained"])
def test_text_is_read_as_a_stream(
    world: World,
    tmp_path: Path,
    tokenizer: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A document is gone when the next is read, none is left when steps run, and a bar knows the end."""
    reading = watch_reading(monkeypatch)
    step: list[int] = []
    forward = Retro.forward

    def watched(*args: Any) -> torch.Tensor:
        step.append(len(reading.alive))
        return forward(*args)

    monkeypatch.setattr(Retro, "forward", watched)
    words = ["--data", world.train, "--out", tmp_path / "r", "--steps", 1, *PLAIN]
    words[4:4] = (
        ["--tokenizer", world.set / "tokenizer.model"] if tokenizer == "given" else ["--vocab-size", 400]
    )
    assert run("train", *words) == 0
    assert 1 <= reading.most <= 2 and step == [0]
    assert re.search(r"tokenising: 100%.*character/s", capfd.readouterr().err)


def test_a_run_inside_its_data(world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither it nor another run nor a set is text: it can be continued, whatever the others have done meanwhile."""
    shutil.copytree(world.train, tmp_path, dirs_exist_ok=True)
    shutil.copytree(world.set, tmp_path / "sets" / "s")
    words = ["train", "--data", tmp_path, "--set", tmp_path / "sets" / "s", "--steps", 4, *MODEL]
    assert run(*words, "--out", tmp_path / "a", "--stop-after", 2) == 0
    assert run(*words, "--out", tmp_path / "runs" / "b", "--stop-after", 2) == 0
    assert run("train", "--data", tmp_path, "--out", tmp_path / "a", "--resume") == 0
    documents = json.loads((tmp_path / "a" / "train.json").read_text())["documents"]
    assert documents == len(list(world.train.iterdir()))
    capfd.readouterr()
    assert run(*words, "--out", tmp_path) == 2
    assert f"out is {tmp_path}, and so is data" in capfd.readouterr().err


def test_documents_without_text(world: World, tmp_path: Path) -> None:
    """Of a caller's are left out, wherever they stand; nothing but such is refused in words."""
    settings: dict[str, Any] = {"data": ("x",), "preset": "retro_tiny", "sequence_length": SEQUENCE}
    settings |= {"steps": 1, "model": tuple(PLAIN[PLAIN.index("--model") + 1 :]), "device": "cpu"}
    settings["tokenizer"] = str(world.set / "tokenizer.model")
    none, text = Document("a", ""), Document("b", "lomi ka " * 200)
    for name, documents in (("with", [none, text, none]), ("without", [text])):
        train(TrainConfig(out=str(tmp_path / name), **settings), documents=documents, progress=False)
    assert weights(tmp_path / "with") == weights(tmp_path / "without")
    with pytest.raises(InputError, match="no text to train on"):
        train(TrainConfig(out=str(tmp_path / "no"), **settings), documents=[none], progress=False)
    del settings["tokenizer"]
    with pytest.raises(InputError, match="no text to train on"):
        train(TrainConfig(out=str(tmp_path / "no"), **settings), documents=[none], progress=False)


@pytest.mark.parametrize(
    "moment, time, goes_on_from",
    [
        ("checkpoint-00000002", 1, 1),  # written, but not yet under its name
        ("model.safetensors", 2, 2),  # whole, but the weights beside it are still those of step 1
        ("model.safetensors", 3, 3),  # the same, and no step is left to do
        ("train.json", 2, 3),  # at the end, when all that is missing is the summary
    ],
)
def test_killed_in_the_middle_of_saving(
    world: World, tmp_path: Path, moment: str, time: int, goes_on_from: int
) -> None:
    """kill -9 just before something gets its final name for that time leaves a run that loads, and goes on to the same
    weights."""
    words = ["train", "--data", world.train, "--tokenizer", world.set / "tokenizer.model", "--steps", 3]
    words += ["--save-every", 1, "--dtype", "fp32", *PLAIN]
    code = f"""
import os, signal, sys
from retro_kernels import cli
replace, seen = os.replace, []
def replacing(source, target):
    seen.append(os.path.relpath(target, sys.argv[-1]))
    if seen.count({moment!r}) == {time}:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = replacing
cli.main(sys.argv[1:])
"""
    out = tmp_path / "r"
    command = [sys.executable, "-c", code, *map(str, words), "--out", str(out)]
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
    Retro.from_pretrained(out)
    assert checkpoints(out)[-1][0] == goes_on_from
    assert run("train", "--data", world.train, "--out", out, "--resume") == 0
    assert run(*words, "--out", tmp_path / "whole") == 0
    assert weights(out) == weights(tmp_path / "whole") and losses(out) == losses(tmp_path / "whole")
    assert [step for step, _ in checkpoints(out)] == [3]
    assert sorted(os.listdir(out)) == sorted(os.listdir(tmp_path / "whole"))


def test_a_resumed_run_does_not_tokenise_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is that of one which never stopped, also where the tokens are damaged, or there was no room for them."""
    words = ["train", "--data", world.train, "--set", world.set, "--steps", 4, "--log-every", 1, *MODEL]
    resume = ["train", "--data", world.train, "--resume", "--out"]
    assert run(*words, "--out", tmp_path / "whole") == 0
    for case in ("kept", "damaged", "cut", "other text", "no room"):
        out = tmp_path / case
        with monkeypatch.context() as patch:
            if case == "no room":
                patch.setattr(writing, "save_array", no_room)
            assert run(*words, "--out", out, "--stop-after", 2) == 0
        chunks, said = out / "tokens" / "chunks.npy", ""
        if case == "damaged":
            content = bytearray(chunks.read_bytes())
            content[-40] ^= 1
            chunks.write_bytes(content)
            said = f"{out / 'tokens'} is damaged: the text is tokenised again."
        elif case == "cut":
            chunks.write_bytes(chunks.read_bytes()[:200])
            said = "is damaged"
        elif case == "other text":
            about = json.loads((out / "tokens" / "about.json").read_text())
            (out / "tokens" / "about.json").write_text(json.dumps(about | {"text": "0" * 32}))
        elif case == "no room":
            assert not chunks.exists()
            assert "The tokens are not kept in" in capfd.readouterr().err
        capfd.readouterr()
        with monkeypatch.context() as patch:
            if case == "kept":
                patch.setattr(Tokenizer, "encode_array", None)
            assert run(*resume, out) == 0
        assert said in capfd.readouterr().err
        assert weights(out) == weights(tmp_path / "whole") and losses(out) == losses(tmp_path / "whole")
        about = json.loads((out / "tokens" / "about.json").read_text())
        assert about == json.loads((tmp_path / "whole" / "tokens" / "about.json").read_text())


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_kept_tokens_are_those_of_what_they_depend_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def corpus() -> TokenDocuments:
        chunks = np.arange(1, 9, dtype=np.uint16).reshape(4, 2)
        return TokenDocuments(
            chunks, np.array([0, 1, 4]), np.array([3, 4]), ["a", "b"], *np.ones((2, 2), int)
        )

    made = []

    def kept(text: str = "t", tokenizer: str = "k", chunk_size: int = 2) -> runs.KeptTokens:
        source: Any = types.SimpleNamespace(fingerprint=text, tokenise=lambda *_: made.append(1) or corpus())
        return runs.KeptTokens(
            tmp_path / "tokens", source, types.SimpleNamespace(fingerprint=tokenizer), chunk_size
        )  # type: ignore[arg-type]

    first = kept()
    first.keep(first.get())
    assert len(made) == 1
    again = kept()
    found, before = again.get(), corpus()
    assert len(made) == 1 and found.titles == before.titles
    assert all(np.array_equal(getattr(found, n), getattr(before, n)) for n in vars(before) if n != "titles")
    chunks = tmp_path / "tokens" / "chunks.npy"
    inode = chunks.stat().st_ino
    again.keep(found)  # they are there
    assert chunks.stat().st_ino == inode
    for other in ({"text": "x"}, {"tokenizer": "x"}, {"chunk_size": 4}):
        kept(**other).get()
    assert len(made) == 4 and capfd.readouterr().err == ""
    for damaged in (before.chunks.reshape(2, 4), before.chunks.view(np.int16), before.chunks + 1):
        np.save(chunks, damaged)  # with the bytes of the others, too
        kept().get()
    assert len(made) == 7 and capfd.readouterr().err.count("is damaged") == 3
    titles = tmp_path / "tokens" / "titles.npy"
    for damage in (b"", b"no array at all", titles.read_bytes().replace(b")", b"(")):
        titles.write_bytes(damage)
        kept().get()
    assert len(made) == 10
    # what is there goes before it is exchanged, and what there is no room for goes again
    for name in ("save_array", "save_json"):
        with monkeypatch.context() as patch:
            patch.setattr(writing, name, no_room)
            writer = kept()
            writer.keep(writer.get())
        assert not (tmp_path / "tokens").exists()
    seen: list[bool] = []
    save, about = writing.save_array, tmp_path / "tokens" / "about.json"
    monkeypatch.setattr(writing, "save_array", lambda *given: seen.append(about.exists()) or save(*given))
    for text in ("x", "y"):
        writer = kept(text=text)
        writer.keep(writer.get())
    assert len(seen) == 12 and not any(seen) and about.exists()


def test_settings_that_are_damaged_or_none(tmp_path: Path) -> None:
    settings = tmp_path / "train.json"
    with pytest.raises(InputError, match="is no training run"):
        runs.read_settings(tmp_path)
    for content in ("{}", "[]", '"x"', "{", '{"config": {"sequence_length": 1}}', '{"config": null}'):
        settings.write_text(content)
        with pytest.raises(InputError, match="train.json is damaged"):
            runs.read_settings(tmp_path)
    with pytest.raises(InputError, match="train.json is damaged"):
        runs.read_settings(settings)
    config = {"sequence_length": 64, "num_neighbours": 2, "set": None, "data": ["a"]}
    settings.write_text(json.dumps({"config": config}))  # an earlier version's, which has no more
    assert runs.read_settings(tmp_path)["config"] == config
    for name, value in [
        *(("sequence_length", value) for value in ("64", 0, 6.5, True, None)),
        *(("num_neighbours", value) for value in ([2], -1)),
        *(("set", value) for value in (["a"], 3)),
        *((name, ["a"]) for name in ("out", "retrofit", "neighbours", "tokenizer", "retriever")),
        *(("data", value) for value in ([3], 3)),
    ]:
        settings.write_text(json.dumps({"config": {**config, name: value}}))
        with pytest.raises(
            InputError, match=rf"train.json is damaged \((ValueError: config.{name} is|TypeError)"
        ):
            runs.read_settings(tmp_path)
    for name in ("dtype", "device", "tokenizer", "corpus", "set"):
        settings.write_text(json.dumps({"config": config, name: 3}))
        with pytest.raises(InputError, match=rf"train.json is damaged \(ValueError: {name} is 3"):
            runs.read_settings(tmp_path)
    del config["set"]
    settings.write_text(json.dumps({"config": config}))
    with pytest.raises(InputError, match=r"train.json is damaged \(KeyError: 'set'\)"):
        runs.read_settings(tmp_path)


def test_where_a_path_of_a_run_may_be_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "moved" / "runs" / "r"
    assert runs.places("/a/set", {"out": "/a/runs/r"}, run) == ["/a/set", str(tmp_path / "moved" / "set")]
    both = [str(tmp_path / "moved" / "set"), str(tmp_path / "set")]
    assert runs.places("set", {"out": "runs/r"}, run) == both  # of an earlier version
    assert runs.places("/a/set", {"out": "runs/r"}, run) == runs.places("/a/set", {}, run) == ["/a/set"]


def test_a_run_goes_on_with_what_lies_beside_it_now(tmp_path: Path) -> None:
    folder, moved = tmp_path / "moved" / "runs" / "r", tmp_path / "moved"
    (moved / "set").mkdir(parents=True)
    folder.mkdir(parents=True)
    config = {"out": "/a/runs/r", "set": "/a/set", "tokenizer": "/a/t.model", "neighbours": "/a/near"}
    config |= {"sequence_length": 64, "num_neighbours": 2, "steps": 5}
    (folder / "train.json").write_text(json.dumps({"config": config}))
    for name in ("t.model", "near"):
        (moved / name).write_text("")
    now = {"set": str(moved / "set"), "tokenizer": str(moved / "t.model"), "neighbours": str(moved / "near")}
    assert runs.resumed(folder, {"steps": 9}) == {**config, **now, "steps": 9}
    assert runs.resumed(folder, {"neighbours": "x"}) == {**config, **now, "neighbours": "x"}
    # an earlier version did not note which set it was: any in that place is it
    settings = runs.read_settings(folder)
    assert runs._sets(settings, folder) == ([now["set"]], now["set"])
    settings["set"] = "f" * 64
    assert runs._sets(settings, folder) == ([now["set"]], None)
    (folder / "train.json").write_text(json.dumps(settings))
    assert runs.resumed(folder, {})["set"] == now["set"]  # of which is said then that it is another
    (moved / "near").unlink()
    assert runs.resumed(folder, {})["neighbours"] == "/a/near"


def test_only_checkpoints_are_taken_for_such(tmp_path: Path) -> None:
    """In the order of their steps; and of what was staged only what a process of ours left goes."""
    names = ["checkpoint-00000900", "checkpoint-100000000", "checkpoint-00001000", "checkpoint-mine"]
    names += ["checkpoint-00000007.tmp-12", "checkpoint-mine.tmp-12", "checkpoint-00000007.tmp-mine"]
    for name in names:
        (tmp_path / name).mkdir()
    assert [step for step, _ in checkpoints(tmp_path)] == [900, 1000, 100_000_000]
    files = ["model.safetensors", "model.safetensors.tmp-12", "train.json.tmp-mine", "mine.json.tmp-12"]
    for name in files:
        (tmp_path / name).write_text("")
    runs.remove_staged(tmp_path)
    gone = {"checkpoint-00000007.tmp-12", "model.safetensors.tmp-12"}
    assert {path.name for path in tmp_path.iterdir()} == {*names, *files} - gone


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    def save(folder: Path) -> None:
        (folder / "model").mkdir(parents=True)
        no_room()

    with pytest.raises(OSError, match="No space"):
        runs.save_checkpoint(tmp_path, 3, types.SimpleNamespace(save_pretrained=save), {})  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_state_that_runs_code_is_not_loaded(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"optimiser": Code()}, tmp_path / "training.pt")
    with pytest.raises(InputError, match="cannot be read .*Remove .* and start again"):
        load_state(tmp_path)
    assert not (tmp_path / "made").exists()


def test_a_state_that_is_not_what_was_written_is_not_loaded(tmp_path: Path) -> None:
    """With other bits in the optimiser's state training would go on, to other weights."""
    path, tensor = tmp_path / "training.pt", torch.full((1000,), 1.5)
    runs._save_state({"optimiser": tensor}, path)
    assert torch.equal(load_state(tmp_path)["optimiser"], tensor)
    content = bytearray(path.read_bytes())
    content[content.index(tensor.numpy().tobytes()) + 2003] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path} cannot be read .*not what was written.*start again"):
        load_state(tmp_path)


def test_the_first_signal_asks_and_the_second_stops() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number in (signal.SIGINT, signal.SIGTERM):
        with runs.interruptible() as asked:
            assert not asked.is_set()
            signal.raise_signal(number)
            assert asked.is_set()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_arithmetic_that_is_asked_for() -> None:
    cpu = torch.device("cpu")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        assert runs.pick_dtype(name, cpu) == dtype and runs.dtype_name(dtype) == name
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch's, of a type that autocast does not take
            with runs.autocast(cpu, dtype):
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    with pytest.raises(InputError, match="dtype is 'fp16'"):
        runs.pick_dtype("fp16", cpu)


def test_what_belongs_to_a_model_is_checked_and_fingerprinted(world: World, tmp_path: Path) -> None:
    loaded = runs.load_run(world.run)
    prints = {loaded.fingerprint(), runs.load_run(world.run).fingerprint()}
    assert len(prints) == 1
    with torch.no_grad():
        loaded.model.norm.weight[0] += 1e-3
    prints.add(loaded.fingerprint())
    loaded.model.config = loaded.model.config.replace(norm_eps=1e-3)
    prints.add(loaded.fingerprint())
    loaded.tokenizer = types.SimpleNamespace(fingerprint="another")  # type: ignore[assignment]
    prints.add(loaded.fingerprint())
    assert len(prints) == 4
    with pytest.raises(InputError, match="not made from a model of transformers; leave out base .--base "):
        runs.load_run(world.run, base=tmp_path)
    for name, rows in (("more", 1), ("fewer", -1)):
        copy = shutil.copytree(world.plain, tmp_path / name)
        size = loaded.model.config.vocab_size + rows
        Retro(Retro.from_pretrained(world.plain).config.replace(vocab_size=size)).save_pretrained(copy)
        with pytest.raises(InputError, match="They do not belong together"):
            runs.load_run(copy)


def test_more_than_the_memory_holds_is_said_in_one_line(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", world.train, "--set", world.set, "--out", tmp_path / "r", *MODEL]
    assert run("train", *words, "--sequence-length", CHUNK * 10**14) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("retro-kernels train: ") and "allocate" in last


@pytest.mark.parametrize("what", ["weights", "state"])
@pytest.mark.parametrize("room", [0, 1000, 70_000, 399_000])
def test_what_torch_and_safetensors_cannot_write_is_an_error_of_the_disk(
    tmp_path: Path, what: str, room: int
) -> None:
    tensors = {"a": torch.zeros(50_000), "b": torch.zeros(50_000)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(OSError, match="File too large: '.*(model.safetensors|training.pt)'") as caught:
            if what == "weights":
                saving.save(tensors, {}, tmp_path)
            else:
                runs._save_state(tensors, tmp_path / "training.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    runs._save_state({**tensors, "step": 3}, tmp_path / "training.pt")
    state = runs.load_state(tmp_path)
    assert state["step"] == 3 and torch.equal(state["b"], tensors["b"])


def test_resume_refuses_what_changed(world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, data = tmp_path / "r", tmp_path / "data"
    shutil.copytree(world.train, data)
    base = ["train", "--data", data, "--out", out, "--set", world.set]
    assert run(*base, "--steps", 4, "--stop-after", 2, *MODEL) == 0
    before = weights(out)
    for words, said in (
        (base, "holds a training run already"),
        ([*base, "--resume", "--lr", "0.5"], "learning_rate was 0.001 and is now 0.5"),
        ([*base, "--resume", "--seed", "5"], "seed was 0 and is now 5"),
        (["train", "--data", world.held_out, "--out", out, "--resume"], "data was"),
    ):
        capfd.readouterr()
        assert run(*words) == 2
        assert said in capfd.readouterr().err.strip().splitlines()[-1]
    (data / "more.txt").write_text("another document")
    assert run(*base, "--resume") == 2
    assert "The data changed" in capfd.readouterr().err.strip().splitlines()[-1]
    (data / "more.txt").unlink()
    checkpoint = checkpoints(out)[-1][1]
    for path, damage in (
        (checkpoint / "model.safetensors", lambda content: content[:-4] + b"bits"),
        (out / "train.json", lambda content: content.replace(b'\n  "device"', b'\n  "x"')),
    ):
        content = path.read_bytes()
        path.write_bytes(damage(content))
        assert run(*base, "--resume") == 2
        assert f"{path} is damaged" in capfd.readouterr().err.strip().splitlines()[-1]
        path.write_bytes(content)
    state = checkpoint / "training.pt"
    state.write_bytes(state.read_bytes()[:100])
    assert run(*base, "--resume") == 2
    assert "cannot be read" in capfd.readouterr().err.strip().splitlines()[-1]
    assert weights(out) == before


def test_a_changed_retrieval_set_is_noticed(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, changing = tmp_path / "r", tmp_path / "set"
    shutil.copytree(world.set, changing)
    words = ["train", "--data", world.train, "--out", out, "--set", changing]
    assert run(*words, "--steps", 4, "--stop-after", 1, *MODEL) == 0
    assert run(*words, "--resume", "--stop-after", 1) == 0
    assert run("index", world.held_out, "--out", changing, "--append", "--embedder", "hashing:64") == 0
    before = weights(out)
    capfd.readouterr()
    assert run(*words, "--resume") == 2
    assert "The retrieval set changed" in capfd.readouterr().err.strip().splitlines()[-1]
    assert weights(out) == before
    settings = json.loads((out / "train.json").read_text())
    del settings["set"]  # as runs of earlier versions are
    (out / "train.json").write_text(json.dumps(settings))
    assert run(*words, "--resume", "--stop-after", 1) == 0 and checkpoints(out)[-1][0] == 3


def project(root: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with text, a set and a run of it, all named relative to it."""
    shutil.copytree(world.train, root / "corpus")
    shutil.copytree(world.set, root / "sets" / "mine")
    with monkeypatch.context() as patch:
        patch.chdir(root)
        words = ["--data", "corpus", "--set", "sets/mine", "--out", "runs/r", "--steps", 4]
        assert run("train", *words, "--stop-after", 2, *MODEL) == 0
    return root


def as_earlier_versions_were(folder: Path) -> None:
    """Paths in train.json as they were given, relative to a directory that is not noted."""
    settings = json.loads((folder / "train.json").read_text())
    settings["config"] |= {"data": ["corpus"], "set": "sets/mine", "out": "runs/r"}
    (folder / "train.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("moved", [False, True])
def test_a_run_finds_its_set_from_any_directory(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    earlier: bool,
    moved: bool,
) -> None:
    """In place or moved together, and never a stranger that has its name where the command runs."""
    root = project(tmp_path / "a", world, monkeypatch)
    if earlier:
        as_earlier_versions_were(root / "runs" / "r")
    if moved:
        root = root.rename(tmp_path / "b")
    elsewhere = tmp_path / "elsewhere"
    words = ["--vocab-size", 300, "--embedder", "hashing:32", "--chunk-size", CHUNK]
    assert run("index", world.held_out, "--out", elsewhere / "sets" / "mine", *words) == 0
    monkeypatch.chdir(elsewhere)
    capfd.readouterr()
    asked = ["--run", "../" + root.name + "/runs/r", "--device", "cpu", "--json"]
    assert run("generate", "lomi kater suneka " * 6, *asked, "--max-tokens", 1) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["chunks"][0]["neighbours"] and "changed" not in err
    assert run("eval", *asked, "--data", world.held_out) == 0
    corpus = f"../{root.name}/corpus"
    assert run("train", "--data", corpus, "--out", asked[1], "--resume", "--steps", 5) == 0
    stored = json.loads((root / "runs" / "r" / "train.json").read_text())["config"]
    assert stored["set"] == str(root / "sets" / "mine") and stored["data"] == [str(root / "corpus")]


def test_a_set_that_is_another_now(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    root = project(tmp_path / "a", world, monkeypatch)
    words = ["generate", "lomi kater suneka " * 6, "--run", root / "runs" / "r"]
    words += ["--max-tokens", 1, "--device", "cpu"]
    appended = ["--append", "--embedder", "hashing:64"]
    assert run("index", world.held_out, "--out", root / "sets" / "mine", *appended) == 0
    capfd.readouterr()
    assert run(*words) == 0  # it is the place: with more in it, as one may want
    err = capfd.readouterr().err
    assert f"{root / 'sets' / 'mine'}, which has been changed since. It is used as it is now" in err
    assert run(*words, "--set", root / "sets" / "mine") == 0
    assert "changed" not in capfd.readouterr().err
    root = root.rename(tmp_path / "b")
    words[3] = root / "runs" / "r"
    assert run(*words) == 2  # beside the run lies something, which may be anything
    err = capfd.readouterr().err
    assert "is another one, or has been changed since" in err and "--set" in err
    assert len(err.splitlines()) == 1
    as_earlier_versions_were(root / "runs" / "r")
    monkeypatch.chdir(root)
    assert run(*words) == 2
    err = capfd.readouterr().err
    assert "sets/mine (noted by an earlier version, which did not say in what directory). What is in " in err
    assert (
        f"is another one, or has been changed since, and not taken unasked. Name the one to use: --set {root}"
        in err
    )
    assert run(*words, "--set", root / "sets" / "mine") == 0
    capfd.readouterr()
    shutil.rmtree(root / "sets")
    assert run(*words) == 2
    err = capfd.readouterr().err
    assert f"sets/mine, which is not there: no folder {root / 'sets' / 'mine'}. Name one with --set" in err


def test_data_that_has_moved(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """To any place: what is in it decides."""
    root = project(tmp_path / "a", world, monkeypatch)
    (root / "corpus").rename(tmp_path / "text")
    words = ["train", "--out", root / "runs" / "r", "--resume", "--data"]
    capfd.readouterr()
    assert run(*words, world.held_out) == 2
    assert "The data changed" in capfd.readouterr().err
    for other in ("-", tmp_path / "text"):  # neither stdin nor more of it is another place of what there was
        assert run(*words, other, *[tmp_path / "text"][: other != "-"]) == 2
        assert "cannot be continued: data was" in capfd.readouterr().err
    assert run(*words[:-1]) == 2
    assert f"{root / 'corpus'} does not exist" in capfd.readouterr().err
    assert run(*words, tmp_path / "text") == 0


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["--set", "{set}", "--model", "vocab_size=500"],
            "vocab_size=500, but it is 400, fixed by the token",
        ),
        (
            ["--set", "{set}", "--model", "chunk_size=32"],
            f"chunk_size=32, but it is {CHUNK}, fixed by the set",
        ),
        (
            ["--set", "{set}", "--model", "neighbour_len=48"],
            f"neighbour_len=48, but it is {2 * CHUNK}, fixed",
        ),
        (["--set", "{set}", "--vocab-size", "300"], "vocab_size is 300, but the tokenizer of"),
        (
            ["--tokenizer", "{set}/tokenizer.model", "--vocab-size", "300"],
            "vocab_size is 300, but the tokenizer",
        ),
        (
            ["--set", "{set}", "--retrofit", "{plain}", "--model", "dim=64"],
            "dim is 64 by --preset or --model",
        ),
        (["--set", "{set}", "--retrofit", "{plain}", "--model", "norm_eps=0.1"], "has 1e-06. Its own"),
        (
            ["--set", "{set}", "--retrofit", "{set}"],
            "neither a training run (no train.json in it) nor a pretrained",
        ),
        (["--model", "pad_id=3"], "pad_id=3, but it is 0, fixed by the tokenizer"),
        (
            ["--set", "{set}", "--model", "cca_layers="],
            "the model has no cca_layers, so it cannot use the set",
        ),
        (["--retriever", "bm25"], "retriever needs a retrieval set"),
        (["-k", "2"], "num_neighbours needs a retrieval set"),
        (["--set", "{set}", "--retriever", "bm52"], "'bm52' is not one of dense, bm25, random"),
    ],
)
def test_nothing_that_was_asked_for_is_ignored(
    world: World, tmp_path: Path, words: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(set=world.set, plain=world.plain) for word in words]
    base = ["--data", world.train, "--out", tmp_path / "r", "--steps", 1, "--sequence-length", SEQUENCE]
    assert run("train", *base, "--device", "cpu", *words) == 2
    assert said in capfd.readouterr().err.strip().splitlines()[-1] and not (tmp_path / "r").exists()


def test_layers_that_only_a_retrofit_will_use_are_said(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Who forgot --set learns it before the training; cca_layers= is what the plain decoder has."""
    for layers, said in (("1,2", True), ("", False)):
        out = tmp_path / f"r{layers}"
        words = ["--data", world.train, "--out", out, "--steps", 1, *PLAIN, f"cca_layers={layers}"]
        assert run("train", *words, "--vocab-size", 400) == 0
        assert ("without --set the plain decoder is trained" in capfd.readouterr().err) == said
        assert json.loads((out / "config.json").read_text())["cca_layers"] == []


def test_what_is_asked_for_and_holds_anyway_is_taken(world: World, tmp_path: Path) -> None:
    words = ["--data", world.train, "--out", tmp_path / "r", "--steps", 1, "--vocab-size", 400, *MODEL]
    same = ["vocab_size=400", f"chunk_size={CHUNK}", f"neighbour_len={2 * CHUNK}"]
    assert run("train", "--set", world.set, "--retrofit", world.plain, *words, *same) == 0


def test_neighbours_by_words(world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """BM25 from the precomputed file to generation: what was trained with is what is used, unless told otherwise."""
    pytest.importorskip("bm25s")
    file, out = tmp_path / "neighbours.safetensors", tmp_path / "r"
    common = ["--data", world.train, "--set", world.set]
    assert run("neighbours", *common, "--out", file, "--retriever", "bm25", "--device", "cpu") == 0
    words = ["train", *common, "--steps", 4, "--log-every", 1, "--neighbours", file]
    capfd.readouterr()
    assert run(*words, "--out", tmp_path / "no", *MODEL) == 2
    assert (
        "holds the neighbours of the retriever 'bm25, words of the second kind', not of 'dense'"
        in capfd.readouterr().err
    )
    assert run(*words, "--out", out, "--retriever", "bm25", "--stop-after", 2, *MODEL) == 0
    assert (
        run("neighbours", *common, "--out", tmp_path / "x", "--retriever", "bm25+run", "--device", "cpu") == 2
    )
    assert "Make it with the retriever bm25" in capfd.readouterr().err
    config = TrainConfig(data=("x",), out="y", set=str(world.set), retriever="random", seed=5)
    opened, seeded = (
        train_module._open_set(config, torch.device("cpu"), False),
        {"retriever": "random", "seed": 5},
    )
    assert opened is not None
    assert opened.candidates == Retriever.from_pretrained(world.set, **seeded).candidates  # type: ignore[arg-type]
    assert run("train", *common, "--out", out, "--resume") == 0  # still with BM25
    live = ["train", *common, "--steps", 4, "--log-every", 1]
    for name in ("bm25", "dense"):
        assert run(*live, "--out", tmp_path / name, "--retriever", name, *MODEL) == 0
    assert losses(out)[-1][1] == pytest.approx(losses(tmp_path / "bm25")[-1][1], rel=1e-6)
    assert losses(out)[-1][1] != pytest.approx(losses(tmp_path / "dense")[-1][1], rel=1e-6)
    scores = {}
    for name, option in (
        ("bm25", []),
        ("dense", ["--retriever", "dense"]),
        ("random", ["--retriever", "random"]),
    ):
        capfd.readouterr()
        assert run("eval", "--run", out, "--data", world.held_out, "--json", "--device", "cpu", *option) == 0
        result = json.loads(capfd.readouterr().out)
        assert result["retriever"] == name
        scores[name] = result["bits_per_byte"]
    assert len({score["on"] for score in scores.values()}) == 3
    assert len({score["off"] for score in scores.values()}) == 1
    retriever = Retriever.from_pretrained(world.set, retriever="bm25")
    with pytest.raises(InputError, match="'dense' was asked for, but the one handed over is 'bm25'"):
        generate(out, "lomi ka", set=retriever, retriever="dense", device="cpu")
    prompt = "lomi kater suneka " * 6
    for chosen, options in ((retriever, {}), (Retriever.from_pretrained(world.set), {"retriever": "dense"})):
        chunk = generate(out, prompt, max_tokens=1, device="cpu", **options)["chunks"][0]
        expected = chosen(torch.tensor([chosen.tokenizer.encode(prompt)[:CHUNK]])).ids[0, 0]
        assert [near["chunk"] for near in chunk["neighbours"]] == expected[expected >= 0].tolist()


def test_the_share_of_chunks_without_neighbours_is_said(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """All of a text that is the whole set; none of the same text beside other documents."""
    text = world.train / "train-0.txt"
    alone = ["--tokenizer", world.set / "tokenizer.model", "--embedder", "hashing:64", "--chunk-size", CHUNK]
    assert run("index", text, "--out", tmp_path / "s", *alone) == 0
    for set, without, name in ((tmp_path / "s", 1.0, "alone"), (world.set, 0.0, "beside")):
        common = ["--data", text, "--set", set]
        capfd.readouterr()
        assert run("train", *common, "--out", tmp_path / name, "--steps", 2, *MODEL) == 0
        assert f"{without:.1%} of the chunks without a neighbour" in capfd.readouterr().out
        summary = json.loads((tmp_path / name / "train.json").read_text())["summary"]
        assert (summary["without_neighbours"], summary["neighbours_filled"]) == (without, 1 - without)
        assert run("eval", "--run", tmp_path / name, "--data", text, "--device", "cpu") == 0
        assert f"2 neighbours (dense), {without:.1%} of the chunks have none" in capfd.readouterr().out
        assert run("neighbours", *common, "--out", tmp_path / f"{name}.file", "--device", "cpu") == 0
        assert (
            f"{1 - without:.1%} of the places are filled, {without:.1%} of the chunks have none"
            in capfd.readouterr().out
        )


def test_precomputed_neighbours_train_the_same(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "neighbours.safetensors"
    assert run("neighbours", "--data", world.train, "--set", world.set, "--out", file, "--device", "cpu") == 0
    options = ["--data", world.train, "--set", world.set, "--steps", 3, *MODEL]
    assert run("train", "--out", tmp_path / "live", *options) == 0
    # of all of the text once, the padding at its end not counted
    every = [*options, "--neighbours", file, "--batch-size", 60, "--steps", 1]
    assert run("train", "--out", tmp_path / "every", *every) == 0
    every_summary = json.loads((tmp_path / "every" / "train.json").read_text())["summary"]
    assert every_summary["neighbours_from_file"] == 1.0
    assert run("train", "--out", tmp_path / "file", *options, "--neighbours", file) == 0
    # Equally near chunks may change places when one query or many are compared: the same loss, not the same bits.
    (_, live), (_, file_loss) = losses(tmp_path / "live")[-1], losses(tmp_path / "file")[-1]
    assert live == pytest.approx(file_loss, rel=1e-3)
    summaries = [
        json.loads((tmp_path / name / "train.json").read_text())["summary"] for name in ("live", "file")
    ]
    assert [summary["neighbours_from_file"] for summary in summaries] == [None, 1.0]
    assert f"100.0% of the neighbours from {file}" in capfd.readouterr().out
    assert run("train", "--out", tmp_path / "no", *options, "--neighbours", world.set / "manifest.json") == 2
    assert "manifest.json" in capfd.readouterr().err.splitlines()[-1]
    few = ["neighbours", "--data", world.train, "--set", world.set, "--out", file, "--per-chunk", 1]
    assert run(*few, "--device", "cpu") == 0
    capfd.readouterr()
    assert run("train", "--out", tmp_path / "no", *options, "--neighbours", file) == 2
    assert (
        "2 neighbours of a chunk were asked for, but the file of neighbours has 1" in capfd.readouterr().err
    )


@pytest.mark.parametrize("retriever", ["dense", "dense+run"])
def test_precomputed_neighbours_of_another_text(
    world: World, tmp_path: Path, retriever: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Are refused, and said to be so many where some are of this text."""
    file = tmp_path / "neighbours.safetensors"
    kept = ["neighbours", "--set", world.set, "--out", file, "--device", "cpu", "--per-chunk", 70]
    words = ["train", "--data", world.train, "--set", world.set, "--retriever", retriever, "--steps", 16]
    words += ["--neighbours", file, "--out", tmp_path / "r"]
    assert run(*kept, "--data", world.held_out) == 0
    capfd.readouterr()
    assert run(*words, *MODEL) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert re.search(
        r"neighbours.safetensors holds the neighbours of [0-4]\.\d% of the chunks of this text", last
    )
    assert not (tmp_path / "r").exists()
    file.unlink()
    assert run(*kept, "--data", *sorted(world.train.iterdir())[:4]) == 0
    capfd.readouterr()
    assert run(*words, "--json", *MODEL) == 0
    out, err = capfd.readouterr()
    said = re.search(r"holds the neighbours of ([\d.]+)% of the chunks", err)
    assert said and 10 < float(said[1]) < 90 and 0 < json.loads(out)["neighbours_from_file"] < 1


@pytest.mark.parametrize("frozen", [True, False])
def test_retrofit(world: World, tmp_path: Path, frozen: bool) -> None:
    """Frozen, RETRO off stays the decoder to the last bit; what is new is trained."""
    out = tmp_path / "r"
    assert (
        run(
            "train",
            "--data",
            world.train,
            "--out",
            out,
            "--set",
            world.set,
            "--retrofit",
            world.plain,
            "--steps",
            4,
            *MODEL,
            *([] if frozen else ["--unfreeze"]),
        )
        == 0
    )
    base, model = Retro.from_pretrained(world.plain), Retro.from_pretrained(out)
    tokens = torch.randint(4, base.config.vocab_size, (2, 40))
    assert torch.equal(model(tokens), base(tokens)) == frozen
    assert all(
        layer.cca.o_proj.weight.abs().sum() > 0 for layer in model.layers
    )  # zero before the first step
    # resumed, what was frozen stays so
    assert run("train", "--data", world.train, "--out", out, "--resume", "--steps", 6) == 0
    assert torch.equal(Retro.from_pretrained(out)(tokens), base(tokens)) == frozen


def test_retrofit_takes_the_architecture_of_the_run(world: World, tmp_path: Path) -> None:
    """Without --preset and --model; a learning-rate schedule of its own begins."""
    out = tmp_path / "r"
    words = [
        "--data",
        world.train,
        "--set",
        world.set,
        "--retrofit",
        world.plain,
        "--sequence-length",
        SEQUENCE,
    ]
    model = ["cca_layers=2", "encoder_dim=32", "encoder_ffn_dim=64"]
    assert (
        run(
            "train",
            "--out",
            out,
            *words,
            "--steps",
            2,
            "--log-every",
            1,
            "--device",
            "cpu",
            "--model",
            *model,
        )
        == 0
    )
    base, fitted = Retro.from_pretrained(world.plain).config, Retro.from_pretrained(out).config
    assert fitted.cca_layers == (2,) and fitted.replace(
        cca_layers=(),
        **{name: getattr(base, name) for name in fitted.to_dict() if name.startswith("encoder_")},
    ) == base.replace(neighbour_len=2 * CHUNK)
    assert (
        fitted.encoder_layers == preset("retro_tiny").encoder_layers != preset(DEFAULT_PRESET).encoder_layers
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    config = TrainConfig(data=("x",), out="y", steps=2)
    assert [line["learning_rate"] for line in lines] == [learning_rate(config, 0), learning_rate(config, 1)]


def test_a_start_anew_leaves_nothing_of_an_attempt_without_checkpoint(world: World, tmp_path: Path) -> None:
    """Neither its lines in metrics.jsonl nor its tokenizer. A small text gets the tokenizer that it supports."""
    out = tmp_path / "r"
    words = ["train", "--data", world.train, "--out", out, *PLAIN]
    assert run(*words, "--vocab-size", 330, "--lr", "1e12", "--steps", 40, "--log-every", 1) == 2
    assert not checkpoints(out) and losses(out)
    assert run(*words, "--vocab-size", 340, "--steps", 2, "--log-every", 1) == 0
    assert [step for step, _ in losses(out)] == [1, 2]
    assert Tokenizer(out / "tokenizer.model").vocab_size == 340
    small = tmp_path / "small.txt"
    small.write_text("hello world")
    assert run("train", "--data", small, "--out", tmp_path / "s", "--steps", 1, *PLAIN) == 0


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "train.json", "metrics.jsonl", "tokens"])
def test_what_is_no_runs_is_not_replaced(
    world: World, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("as they are")
    if name == "tokens":
        (tmp_path / name).mkdir()
        (tmp_path / name / "about.json").write_text("{}")
    else:
        (tmp_path / name).write_text('{"model_type": "gpt2"}\n')
    before = contents(tmp_path)
    for words in ([], ["--resume"][: name != "train.json"]):  # that one is said to be damaged
        assert run("train", "--data", world.train, "--steps", 1, *PLAIN, "--out", tmp_path, *words) == 2
        said = capfd.readouterr().err.splitlines()[-1]
        assert f"holds {name}, and no training run: that would be replaced" in said
        assert contents(tmp_path) == before
    if name == "tokens":
        shutil.rmtree(tmp_path / name)
    else:
        (tmp_path / name).unlink()
    assert (
        run("train", "--data", world.train, "--steps", 1, *PLAIN, "--out", tmp_path) == 0
    )  # beside other files
    assert contents(tmp_path)["notes.txt"] == b"as they are" and not (tmp_path / ".train.lock").exists()


def test_a_run_does_not_lie_in_what_it_is_made_from(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world.set, tmp_path / "set")
    before = contents(tmp_path)
    words = ["train", "--data", world.train, "--set", tmp_path / "set", "--steps", 1, *MODEL, "--out"]
    for out, said in [(tmp_path / "set", "which is set"), (tmp_path / "set" / "runs" / "r", "or lies in it")]:
        assert run(*words, out) == 2
        assert said in capfd.readouterr().err.splitlines()[-1]
    base = shutil.copytree(world.plain, tmp_path / "base")
    before = contents(tmp_path)
    assert run(*words, base / "r", "--retrofit", base) == 2
    assert "which is retrofit" in capfd.readouterr().err.splitlines()[-1]
    assert run("train", "--data", world.train, "--steps", 1, *PLAIN, "--out", tmp_path / "set") == 2
    assert "manifest.json" in capfd.readouterr().err.splitlines()[-1]
    assert contents(tmp_path) == before
    inside = tmp_path / "set" / "r"  # a run of an earlier version that lies there goes on
    assert run(*words[:-1], "--stop-after", 1, "--steps", 2, "--out", tmp_path / "r") == 0
    shutil.move(tmp_path / "r", inside)
    assert run("train", "--data", world.train, "--resume", "--out", inside) == 0


def test_an_attempt_of_an_earlier_version_is_taken_up(world: World, tmp_path: Path) -> None:
    """Which wrote its settings last; and a run is known as one from the first file on."""
    words = ["train", "--data", world.train, "--steps", 1, *PLAIN, "--out"]
    assert run(*words, tmp_path / "a") == 0
    (tmp_path / "b").mkdir()
    shutil.copytree(tmp_path / "a" / "tokens", tmp_path / "b" / "tokens")
    shutil.copy(tmp_path / "a" / "tokenizer.model", tmp_path / "b")
    assert run(*words, tmp_path / "b") == 0
    shutil.rmtree(tmp_path / "b" / "tokens")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.KeptTokens, "keep", lambda *args: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            run(*words, tmp_path / "c")
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["train.json"] and run(
        *words, tmp_path / "c"
    ) == 0


def test_one_process_trains_in_a_folder(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--data", world.train, *PLAIN, "--out", tmp_path / "new" / "r"]
    with alone_in(tmp_path / "new" / "r"):
        for more in (["--steps", 1], ["--steps", 1, "--resume"]):
            assert run(*words, *more) == 2
            assert f"Another process trains in {tmp_path / 'new' / 'r'}" in capfd.readouterr().err
    assert not (tmp_path / "new").exists()
    (tmp_path / "new" / "r" / "checkpoint-best.tmp-old").mkdir(
        parents=True
    )  # a user's, and so is a file "lock"
    (tmp_path / "new" / "r" / "lock").write_text("mine")
    assert run(*words, "--steps", 2, "--stop-after", 1) == 0
    assert (tmp_path / "new" / "r" / "checkpoint-best.tmp-old").is_dir()
    assert (tmp_path / "new" / "r" / "lock").read_text() == "mine"
    left = tmp_path / "new" / "r" / "checkpoint-00000002.tmp-123"
    left.mkdir()  # by one that was killed while it saved
    (left / "model.safetensors").write_bytes(b"half")
    assert run("train", "--data", world.train, "--out", tmp_path / "new" / "r", "--resume") == 0
    assert not left.exists() and [step for step, _ in checkpoints(tmp_path / "new" / "r")] == [2]


def test_a_file_system_without_locks(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    def refused(*args: Any) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refused)
    assert run("train", "--data", world.train, "--steps", 1, *PLAIN, "--out", tmp_path / "r") == 0
    assert "no lock is to be had there (Operation not supported)" in capfd.readouterr().err


def test_compiled_steps_are_the_same(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced whole, with sequences longer than the rows of logits that exist at one time."""
    traced: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        traced.append(graph)
        return graph.forward  # without a compiler, which would take a minute

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend, fullgraph=True))
    monkeypatch.setattr(attention, "_ROWS", SEQUENCE // 4)
    torch._dynamo.reset()
    for name, words in (("eager", []), ("compiled", ["--compile"])):
        given = ["--data", world.train, "--set", world.set, "--out", tmp_path / name, *MODEL, *words]
        assert run("train", *given, "--steps", 2, "--log-every", 1) == 0
        assert bool(traced) == bool(words)
    eager, compiled = (losses(tmp_path / name) for name in ("eager", "compiled"))
    assert compiled == [(step, pytest.approx(loss, rel=1e-3)) for step, loss in eager]


def test_accumulated_batches_are_one_batch(world: World, tmp_path: Path) -> None:
    """The same sequences in one forward pass or in two: the same first loss and nearly the same gradient, whatever the
    number of tokens that is scored in each."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(40):
        (texts / f"{i}.txt").write_text("lomi ka ter " * (1 + 3 * (i % 5)), encoding="utf-8")
    for name, size, parts in (("one", 4, 1), ("two", 2, 2)):
        words = [*MODEL[:4], "--batch-size", size, "--accumulate", parts, *MODEL[6:]]
        assert (
            run(
                "train",
                "--data",
                texts,
                "--set",
                world.set,
                "--out",
                tmp_path / name,
                "--steps",
                1,
                *words,
            )
            == 0
        )
    one, two = (json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in ("one", "two"))
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-5)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"steps": 0}, "steps is 0"),
        ({"dtype": "fp8"}, "dtype is 'fp8'"),
        ({"neighbours": "x"}, "neighbours needs a retrieval set"),
        ({"compile": "no"}, "compile is 'no'; it must be True or False"),
        ({"unfreeze": "false"}, "unfreeze is 'false'; it must be True or False"),
        ({"unfreeze": True}, "unfreeze"),
        ({"set": "s", "tokenizer": "t"}, "not both"),
        ({"data": ()}, "no data"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": "0.1"}, "learning_rate is '0.1'"),
        ({"steps": True}, "steps is True"),
        ({"warmup": 2.5}, "warmup is 2.5"),
        ({"seed": -1}, "seed is -1; it must be an integer from 0"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"seed": 1.0}, "seed is 1.0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"clip": -0.1}, "clip is -0.1"),
        ({"weight_decay": float("inf")}, "weight_decay is inf"),
        ({"lessons": 1.01, "set": "s"}, "lessons is 1.01"),
        ({"lessons": 0.5}, "lessons needs a retrieval set"),
        ({"retrofit": "r"}, "retrofit needs a retrieval set"),
        ({"copy": 1.0, "set": "s"}, "copy only means something together with retrofit"),
        ({"added_rate": 2.0, "set": "s"}, "added_rate only means something together with retrofit"),
        ({"first_step": 1, "set": "s"}, "first_step only means something together with retrofit"),
        ({"first_step": -1, "set": "s", "retrofit": "r"}, "first_step is -1"),
        ({"preset": "retro", "set": "s", "retrofit": "r"}, "'retro' is not one of"),
        ({"model": ("dim=0",)}, "dim is 0"),
        ({"model": ("dim",)}, "'dim' is not FIELD=VALUE"),
        ({"model": ("width=3",)}, "'width=3' is not FIELD=VALUE"),
        ({"model": ("dim=3.5",)}, "'3.5' is no value for dim; its default is 896"),
        ({"model": ("cca_layers=1,b",)}, "'1,b' is no value for cca_layers"),
        ({"model": ("tie_embeddings=yes",)}, "'yes' is no value for tie_embeddings"),
    ],
)
def test_settings_out_of_range(fields: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said.replace("(", r"\(")):
        TrainConfig(**{"data": ("x",), "out": "y", **fields})  # type: ignore[arg-type]


def test_settings_at_the_end_of_their_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common: dict[str, Any] = {"data": ("x",), "out": "o", "set": "s"}
    zeros = ("seed", "warmup", "learning_rate", "weight_decay", "clip", "lessons")
    assert TrainConfig(**common, **dict.fromkeys(zeros, 0), steps=1).warmup_steps == 0
    TrainConfig(**common, retrofit="r", first_step=999, lessons=1.0, added_rate=0, copy=0, seed=2**63 - 1)
    for steps, warmup in ((19, 0), (1000, 50), (15_000, 750), (10**6, 750)):
        assert TrainConfig(**common, steps=steps).warmup_steps == warmup
    changes = ("tie_embeddings=False", "norm_eps=1e-5", "cca_layers=2,4,", "self_attention=rotary")
    assert parse_overrides(changes) == {
        "tie_embeddings": False,
        "norm_eps": 1e-5,
        "cca_layers": (2, 4),
        "self_attention": "rotary",
    }
    TrainConfig(data=("x",), out="o", model=("num_layers=2", "cca_layers=9"))  # the plain decoder has none
    with pytest.raises(InputError, match=r"unknown fields \['epochs'\]"):
        TrainConfig.from_dict({**common, "epochs": 1})
    # every path, and nothing that is none
    monkeypatch.chdir(tmp_path)
    places = {name: name for name in PLACES[1:] if name != "tokenizer"}
    found = TrainConfig(data=("-", "x"), preset="retro_tiny", **places).absolute()
    assert found.data == ("-", str(tmp_path / "x")) and found.preset == "retro_tiny"
    assert {name: getattr(found, name) for name in places} == {name: str(tmp_path / name) for name in places}
    paths = TrainConfig(data=("x",), **{name: Path(name) for name in places})  # type: ignore[arg-type]
    assert {name: getattr(paths, name) for name in places} == places and found.tokenizer is None


def test_integers_of_numpy_are_integers() -> None:
    """And stand in train.json as any other."""
    names = ("steps", "seed", "batch_size", "sequence_length", "num_neighbours", "warmup", "vocab_size")
    given: dict[str, Any] = {name: np.int64(300) for name in names}
    config = TrainConfig(data="x", out="y", clip=np.int32(1), **given)  # type: ignore[arg-type]
    assert config == TrainConfig(data=("x",), out="y", **{name: 300 for name in names})  # type: ignore[arg-type]
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_one_path_alone_is_one_path() -> None:
    """Not its characters; and paths of any kind, in settings that are JSON."""
    assert TrainConfig(data="./", out="x").data == ("./",)  # type: ignore[arg-type]
    config = TrainConfig(data=Path("a"), out=Path("b"), set=Path("c"), model="dim=32")  # type: ignore[arg-type]
    assert (config.data, config.out, config.set, config.model) == (("a",), "b", "c", ("dim=32",))
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert TrainConfig(data=(Path("a"), "b"), out="x").data == ("a", "b")  # type: ignore[arg-type]
