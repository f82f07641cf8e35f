"""A world small enough for every test of the scripts: text, a set, a RETRO and a plain decoder trained for seconds."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from retro_kernels import cli
from retro_kernels.data import corpus
from retro_kernels.data.corpus import Document

CHUNK, SEQUENCE = 16, 64
MODEL = [
    "--preset",
    "retro_tiny",
    "--sequence-length",
    str(SEQUENCE),
    "--batch-size",
    "2",
    "--device",
    "cpu",
    "--model",
    "dim=32",
    "ffn_dim=64",
    "num_heads=2",
    "head_dim=16",
    "num_layers=2",
    "cca_layers=1,2",
    "encoder_dim=32",
    "encoder_heads=2",
    "encoder_head_dim=16",
    "encoder_ffn_dim=64",
]
PLAIN = [*(word for word in MODEL if not word.startswith(("cca_", "encoder_"))), f"chunk_size={CHUNK}"]


@dataclass
class World:
    root: Path
    train: Path
    held_out: Path
    set: Path
    run: Path
    plain: Path


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def weights(folder: Path) -> bytes:
    """Of the run in `folder`."""
    return (folder / "model.safetensors").read_bytes()


def losses(folder: Path) -> list[tuple[int, float]]:
    """By step, of the run in `folder`."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


HERE = Path(__file__).resolve().parent
OF_RANKS = {
    **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")},
    "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
    "OMP_NUM_THREADS": "1",
}
"""The environment of processes that share a job."""


def run_ranks(script: str, *words: object, world: int = 2) -> None:
    """`script RANK WORLD words…`, a file of tests/, in as many processes; each must end well."""
    command = [sys.executable, str(HERE / script)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world), *map(str, words)],
            env=OF_RANKS,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=180)
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:
            rank.kill()


def text(rng: random.Random, passages: list[str], words: int) -> str:
    """Passages that other documents have too, between words of its own; now and then something that is not ASCII."""
    parts: list[str] = []
    while sum(len(part.split()) for part in parts) < words:
        parts.append(rng.choice(passages) if rng.random() < 0.5 else " ".join(_word(rng) for _ in range(12)))
        if rng.random() < 0.1:
            parts.append("naïve 文字 🙂\n\tindented")
    return "\n".join(parts) + "\n"


def _word(rng: random.Random) -> str:
    return "".join(
        rng.choice(["ka", "lo", "mi", "ter", "su", "ne", "ra", "po"]) for _ in range(rng.randint(1, 3))
    )


class Watched(Document):
    __slots__ = ("__weakref__",)

    def __hash__(self) -> int:
        return id(self)


@dataclass
class Reading:
    """The documents that are in memory, and how many were at most."""

    alive: weakref.WeakSet[Watched] = field(default_factory=weakref.WeakSet)
    most: int = 0


def watch_reading(monkeypatch: pytest.MonkeyPatch) -> Reading:
    reading, read = Reading(), corpus.read_documents

    def watching(*args: Any, **options: Any) -> Iterator[Document]:
        for document in read(*args, **options):
            made = Watched(document.title, document.text)
            reading.alive.add(made)
            reading.most = max(reading.most, len(reading.alive))
            yield made

    monkeypatch.setattr(corpus, "read_documents", watching)
    return reading


def pretrained(folder: Path, texts: Path, begins: bool = False) -> Path:
    """A folder as one is downloaded: model and tokenizer.json, with more rows in the table than tokens. `begins`: a
    model of Llama's kind, whose texts have a token before them."""
    import tokenizers
    import transformers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=399, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train([str(path) for path in sorted(texts.iterdir())], trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", *["<|begin|>"][:begins]])
    if begins:
        ids = [("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
        template = tokenizers.processors.TemplateProcessing(single="<|begin|> $A", special_tokens=ids)
        tokenizer.post_processor = template
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    config = transformers.GPT2Config(
        vocab_size=416, n_embd=32, n_layer=2, n_head=2, n_positions=128, bos_token_id=end, eos_token_id=end
    )
    if begins:
        config = transformers.LlamaConfig(
            vocab_size=416,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=48,
            max_position_embeddings=128,
            bos_token_id=end + 1,
            eos_token_id=end,
        )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def build(root: Path) -> World:
    """Deterministic, apart from what the machine's arithmetic does."""
    rng = random.Random(7)
    passages = [" ".join(_word(rng) for _ in range(24)) for _ in range(12)]
    for folder, count in (("train", 8), ("held-out", 3)):
        (root / folder).mkdir(parents=True)
        for i in range(count):
            (root / folder / f"{folder}-{i}.txt").write_text(
                text(rng, passages, 150 + 40 * i), encoding="utf-8"
            )
    world = World(root, root / "train", root / "held-out", root / "set", root / "run", root / "plain")
    assert (
        run(
            "index",
            world.train,
            "--out",
            world.set,
            "--vocab-size",
            400,
            "--embedder",
            "hashing:64",
            "--chunk-size",
            CHUNK,
        )
        == 0
    )
    assert (
        run("train", "--data", world.train, "--out", world.run, "--set", world.set, "--steps", 6, *MODEL) == 0
    )
    assert (
        run(
            "train",
            "--data",
            world.train,
            "--out",
            world.plain,
            "--tokenizer",
            world.set / "tokenizer.model",
            "--steps",
            6,
            *PLAIN,
        )
        == 0
    )
    return world
