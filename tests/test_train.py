"""Training: what a batch is, what resuming promises, what cannot be combined."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small import CHUNK, MODEL, PLAIN, SEQUENCE, World, run

from retro_kernels.config import InputError, TrainConfig
from retro_kernels.data.corpus import Document
from retro_kernels.data.packing import IGNORE, Packed, tokenise
from retro_kernels.data.tokenizer import Tokenizer
from retro_kernels.nn import Retro
from retro_kernels.runs import checkpoints, load_state
from retro_kernels.train import learning_rate


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


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
    packed = Packed(corpus, SEQUENCE, seed, lambda hashes: np.arange(100, 100 + len(hashes)))
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
            assert 100 + number in batch.documents[order][row]
        place += chunks * CHUNK
    assert seen == set(range(len(documents)))
    # another epoch visits the same sequences
    again = sorted(packed.sequence(i) for i in range(packed.num_sequences, 2 * packed.num_sequences))
    assert again == list(range(packed.num_sequences))


def test_learning_rate() -> None:
    config = TrainConfig(data=("x",), out="y", steps=100, warmup=10, learning_rate=2.0)
    rates = [learning_rate(config, step) for step in range(100)]
    assert (
        rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(2.0) and max(rates) == rates[10] == 2.0
    )
    assert rates[55] == pytest.approx(2.0 * 0.55)  # half way down from 1 to 0.1
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0.2 < rates[99] < 0.21


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
    assert "Continue with: retro-kernels train" in last and last.endswith("--resume")
    step = checkpoints(out)[-1][0]
    assert run("train", "--data", world.train, "--out", out, "--resume", "--stop-after", 1) == 0
    assert checkpoints(out)[-1][0] == step + 1


def test_killed_at_any_moment(world: World, tmp_path: Path) -> None:
    """kill -9 leaves a checkpoint that training goes on from."""
    out = tmp_path / "r"
    words = [
        "train",
        "--data",
        world.train,
        "--out",
        out,
        "--tokenizer",
        world.set / "tokenizer.model",
        "--steps",
        10**6,
        "--save-every",
        1,
        *PLAIN,
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "retro_kernels.cli", *map(str, words)], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 90
    while len(losses(out) if (out / "metrics.jsonl").exists() else []) < 1:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    Retro.from_pretrained(out)
    step = checkpoints(out)[-1][0]
    assert step >= 1
    assert run("train", "--data", world.train, "--out", out, "--resume", "--stop-after", 1) == 0
    assert checkpoints(out)[-1][0] == step + 1


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
    state = checkpoints(out)[-1][1] / "training.pt"
    state.write_bytes(state.read_bytes()[:100])
    (data / "more.txt").unlink()
    assert run(*base, "--resume") == 2
    assert "cannot be read" in capfd.readouterr().err.strip().splitlines()[-1]
    assert weights(out) == before


def test_precomputed_neighbours_train_the_same(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "neighbours.safetensors"
    assert run("neighbours", "--data", world.train, "--set", world.set, "--out", file, "--device", "cpu") == 0
    options = ["--data", world.train, "--set", world.set, "--steps", 3, *MODEL]
    assert run("train", "--out", tmp_path / "live", *options) == 0
    assert run("train", "--out", tmp_path / "file", *options, "--neighbours", file) == 0
    # Equally near chunks may change places when one query or many are compared: the same loss, not the same bits.
    (_, live), (_, file_loss) = losses(tmp_path / "live")[-1], losses(tmp_path / "file")[-1]
    assert live == pytest.approx(file_loss, rel=1e-3)
    capfd.readouterr()
    assert run("train", "--out", tmp_path / "no", *options, "--neighbours", world.set / "manifest.json") == 2
    assert "manifest.json" in capfd.readouterr().err.splitlines()[-1]


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


def test_accumulated_batches_are_one_batch(world: World, tmp_path: Path) -> None:
    """The same sequences in one forward pass or in two: the same first loss and nearly the same gradient."""
    for name, size, parts in (("one", 4, 1), ("two", 2, 2)):
        words = [*MODEL[:4], "--batch-size", size, "--accumulate", parts, *MODEL[6:]]
        assert (
            run(
                "train",
                "--data",
                world.train,
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
        ({"unfreeze": True}, "unfreeze"),
        ({"set": "s", "tokenizer": "t"}, "not both"),
        ({"data": ()}, "no data"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
    ],
)
def test_settings_out_of_range(fields: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said.replace("(", r"\(")):
        TrainConfig(**{"data": ("x",), "out": "y", **fields})  # type: ignore[arg-type]
