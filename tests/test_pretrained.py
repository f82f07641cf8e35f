"""A pretrained model of transformers with its own tokenizer, from the set to generation, on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from small import CHUNK, SEQUENCE, World, run

from retro_kernels import InputError, Retriever, RetroFitted, Tokenizer
from retro_kernels.config import TrainConfig
from retro_kernels.evaluate import evaluate
from retro_kernels.generate import generate
from retro_kernels.runs import load_run
from retro_kernels.train import train as train_run

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def pretrained(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.pretrained(tmp_path_factory.mktemp("pretrained"), world.train, begins=True)


@pytest.fixture(scope="module")
def fitted(world: World, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Set and run."""
    root = tmp_path_factory.mktemp("fitted")
    tokenizer = [
        "--tokenizer",
        pretrained / "tokenizer.json",
        "--embedder",
        "hashing:64",
        "--chunk-size",
        CHUNK,
    ]
    assert run("index", world.train, "--out", root / "set", *tokenizer) == 0
    assert train(world, root / "set", pretrained, root / "run", "--steps", 4) == 0
    return root / "set", root / "run"


def train(world: World, set: Path, pretrained: Path, out: Path, *words: object) -> int:
    sizes = [
        "--sequence-length",
        SEQUENCE,
        "--batch-size",
        2,
        "--device",
        "cpu",
        "--model",
        "encoder_layers=1",
    ]
    return run(
        "train", "--data", world.train, "--set", set, "--retrofit", pretrained, "--out", out, *sizes, *words
    )


def test_set_and_run(world: World, pretrained: Path, fitted: tuple[Path, Path], seed: int) -> None:
    """Ids are those of the file but for two; off is the base, in its own ids and with its token before the text; what
    was added is trained."""
    retriever, loaded = Retriever.from_pretrained(fitted[0]), load_run(fitted[1])
    tokenizer = Tokenizer(pretrained / "tokenizer.json")
    assert retriever.tokenizer.fingerprint == loaded.tokenizer.fingerprint == tokenizer.fingerprint
    assert retriever.tokenizer.file_pad_id == loaded.model.config.pad_id == tokenizer.vocab_size - 2
    assert retriever.tokenizer.file_bos_id == loaded.model.bos_id == tokenizer.vocab_size - 1
    assert isinstance(loaded.model, RetroFitted) and loaded.model.config.vocab_size == 416
    base = transformers.AutoModelForCausalLM.from_pretrained(pretrained)
    theirs = tokenizers.Tokenizer.from_file(str(pretrained / "tokenizer.json")).encode("naïve! ka lo mi").ids
    ours = torch.tensor([tokenizer.encode("naïve! ka lo mi")])
    assert theirs[0] == tokenizer.file_bos_id and len(theirs) == 1 + ours.shape[1]
    logits = base(torch.tensor([theirs])).logits[:, 1:]
    assert torch.equal(loaded.model(ours)[..., 1:399], logits[..., 1:399])
    assert torch.equal(loaded.model(ours)[..., 0], logits[..., tokenizer.file_pad_id])
    assert all(layer["cca"].o_proj.weight.abs().sum() > 0 for layer in loaded.model.added.values())
    assert not (fitted[1] / "base").exists()
    tokens = torch.randint(1, 399, (1, 3 * CHUNK))
    assert not torch.equal(loaded.model(tokens, retriever(tokens)), loaded.model(tokens))


def test_evaluation_and_generation(world: World, fitted: tuple[Path, Path]) -> None:
    result = evaluate(fitted[1], [world.held_out], progress=False)
    assert set(result["bits_per_byte"]) == {"off", "on", "shuffled"}
    made = [generate(fitted[1], "ka lo mi " * 12, max_tokens=40, seed=5, ignore_end=True) for _ in range(2)]
    assert made[0]["text"] == made[1]["text"] and made[0]["tokens"] == 40
    assert len(made[0]["chunks"]) > 1 and made[0]["chunks"][0]["neighbours"]


def test_a_base_that_has_moved(
    world: World,
    pretrained: Path,
    fitted: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Run and base on another machine: eval and generate are told where the base lies."""
    moved = tmp_path / "run"
    shutil.copytree(fitted[1], moved)
    config = json.loads((moved / "config.json").read_text())
    config["base"]["source"] = str(tmp_path / "nowhere")
    (moved / "config.json").write_text(json.dumps(config))
    settings = json.loads((moved / "train.json").read_text())
    settings["config"]["retrofit"] = str(tmp_path / "nowhere")
    (moved / "train.json").write_text(json.dumps(settings))
    generating = ["generate", "ka lo", "--max-tokens", 2, "--device", "cpu"]
    evaluating = ["eval", "--data", world.held_out, "--device", "cpu"]
    for words in (generating, evaluating):
        assert run(*words, "--run", moved) == 2
        said = capsys.readouterr().err
        assert f"there is no folder {tmp_path / 'nowhere'}" in said and "--base" in said
        assert run(*words, "--run", moved, "--base", pretrained) == 0
        there = capsys.readouterr().out
        assert run(*words, "--run", fitted[1]) == 0
        assert capsys.readouterr().out.replace(str(fitted[1]), str(moved)) == there
    assert run(*generating, "--run", world.run, "--base", pretrained) == 2
    assert "was not made from a model of transformers" in capsys.readouterr().err


def test_a_base_that_has_moved_with_its_run(
    world: World,
    pretrained: Path,
    fitted: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is found beside the run, as the set is; gone, the message names its folder and what to do."""
    (tmp_path / "here").mkdir()
    shutil.copytree(pretrained, tmp_path / "here" / "base")
    run_of = tmp_path / "here" / "run"
    assert train(world, fitted[0], tmp_path / "here" / "base", run_of, "--steps", 1) == 0
    (tmp_path / "here").rename(tmp_path / "there")
    run_of = tmp_path / "there" / "run"
    words = ["train", "--data", world.train, "--out", run_of, "--steps", 2]
    assert run("generate", "ka lo", "--max-tokens", 2, "--device", "cpu", "--run", run_of) == 0
    (tmp_path / "there" / "base").rename(tmp_path / "base")
    capsys.readouterr()
    # without --retrofit: the run has one, with which --added-rate makes sense
    words += ["--resume", "--added-rate", 1]
    assert run(*words) == 2
    said = capsys.readouterr().err
    assert f"there is no folder {tmp_path / 'here' / 'base'} or {tmp_path / 'there' / 'base'}. Put" in said
    assert "is now with --retrofit." in said and len(said.splitlines()) == 1
    assert run(*words, "--retrofit", tmp_path / "nowhere") == 2
    assert f"there is no folder {tmp_path / 'nowhere'}" in capsys.readouterr().err
    (tmp_path / "base").rename(tmp_path / "there" / "base")
    assert run(*words, "--stop-after", 1) == 0  # found beside the run
    (tmp_path / "there" / "base").rename(tmp_path / "base")
    words[words.index("--steps") + 1] = 3
    assert run(*words, "--retrofit", tmp_path / "base") == 0


def test_resumed_is_not_interrupted(
    world: World, pretrained: Path, fitted: tuple[Path, Path], tmp_path: Path
) -> None:
    common: dict[str, Any] = {
        "data": (str(world.train),),
        "set": str(fitted[0]),
        "retrofit": str(pretrained),
        "steps": 5,
    }
    common |= {"sequence_length": SEQUENCE, "batch_size": 2, "device": "cpu", "model": ("encoder_layers=1",)}
    whole, stopped = (TrainConfig(out=str(tmp_path / name), **common) for name in ("whole", "stopped"))
    train_run(whole, progress=False)
    train_run(stopped, progress=False, stop_after=2)
    train_run(stopped, progress=False, resume=True)
    weights = load_run(whole.out).model.state_dict()
    for name, value in load_run(stopped.out).model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_what_does_not_fit(
    world: World,
    pretrained: Path,
    fitted: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for words, message in [
        (["--unfreeze"], "unfreeze is not possible"),
        (["--compile"], "compile is not possible"),
        (["--sequence-length", 128], "at most 127 tokens"),  # and one before them
        (["--model", "chunk_size=32"], f"chunk_size=32, but it is {CHUNK}, fixed by the set"),
        (["--model", "pad_id=3"], "pad_id=3, but it is 399"),
        (["--model", "ffn_dim=64"], "['ffn_dim'] are those of the model in"),
        (["--model", "dim=64"], "['dim'] are those of the base"),
    ]:
        assert train(world, fitted[0], pretrained, tmp_path / "r", "--steps", 2, *words) == 2
        assert message in capsys.readouterr().err
    assert train(world, world.set, pretrained, tmp_path / "r", "--steps", 2) == 2
    said = capsys.readouterr().err
    assert "has another tokenizer" in said and f"--tokenizer {pretrained / 'tokenizer.json'}" in said
    bare = tmp_path / "bare"
    shutil.copytree(pretrained, bare, ignore=shutil.ignore_patterns("tokenizer.json"))
    assert train(world, fitted[0], bare, tmp_path / "r", "--steps", 2) == 2
    said = capsys.readouterr().err
    assert f"{bare} has no tokenizer.json" in said
    assert f"AutoTokenizer.from_pretrained('{bare}').save_pretrained('{bare}')" in said
    assert not (tmp_path / "r" / "model.safetensors").exists()
    with pytest.raises(
        InputError, match="window is 128; the pretrained model was made for at most 127 tokens"
    ):
        evaluate(fitted[1], [world.held_out], window=128, progress=False)
    with pytest.raises(InputError, match="base"):
        RetroFitted.from_pretrained(world.run)


def test_more_tokens_than_the_table_has(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As where a padding token was added to the tokenizer alone; said before the training, and not after it."""
    folder = small.pretrained(tmp_path / "model", world.train)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([f"<|{i}|>" for i in range(17)])
    tokenizer.save(str(folder / "tokenizer.json"))
    words = ["--tokenizer", folder / "tokenizer.json", "--embedder", "hashing:64", "--chunk-size", CHUNK]
    assert run("index", world.train, "--out", tmp_path / "set", *words) == 0
    assert (
        train(world, tmp_path / "set", folder, tmp_path / "run", "--steps", 1, "--sequence-length", 50) == 2
    )
    assert "it must be a multiple of the chunk size" in capfd.readouterr().err.splitlines()[-1]
    assert train(world, tmp_path / "set", folder, tmp_path / "run", "--steps", 1) == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert "has 417 tokens, but the model's table only 416" in said and "resize_token_embeddings(417)" in said
    assert not (tmp_path / "run").exists()
