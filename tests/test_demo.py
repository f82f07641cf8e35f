"""The demo, on a corpus of a few kilobytes: every stage, the table, how it goes on after Ctrl-C, and that a second run
trains and builds nothing again."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import demo_factbook
import pytest
import torch
from small import MODEL, World, run

from retro_kernels import demo as module
from retro_kernels.config import InputError
from retro_kernels.data.corpus import Document
from retro_kernels.demo import Size, read_corpus, split
from retro_kernels.nn import Retro

TINY = Size(
    held_out_share=0.4,
    vocab_size=400,
    model=tuple(MODEL[MODEL.index("--model") + 1 :]),
    steps=3,
    batch_size=2,
    sequence_length=128,
    prompt_tokens=70,
    generated_tokens=60,
)


def test_demo(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "Size", lambda: TINY)
    steps: list[int] = []
    forward = Retro.forward

    def watched(model: Retro, *args: Any, **options: Any) -> torch.Tensor:
        if model.training:
            steps.append(1)
            if len(steps) == 1:
                os.kill(os.getpid(), signal.SIGINT)
        return forward(model, *args, **options)

    monkeypatch.setattr(Retro, "forward", watched)
    words = ["demo", "--corpus", world.train, "--out", tmp_path / "d", "--embedder", "hashing:64"]
    assert run(*words) == 130
    said, command = capfd.readouterr().err.splitlines()[-1].split(" Continue with: retro-kernels ")
    assert said == "retro-kernels demo: Stopped at step 1 of 3, checkpoint written."
    assert sorted(shlex.split(command)) == sorted(map(str, words))
    assert run(*shlex.split(command)) == 0 and len(steps) == 4  # 2 in common, and 1 of each model
    table = capfd.readouterr().out
    for name in (
        "plain decoder",
        "RETRO off",
        "RETRO on",
        "shuffled neighbours",
        "tokens/s",
        "waiting for retrieval",
        "recall@10",
    ):
        assert name in table
    result = json.loads((tmp_path / "d" / "result.json").read_text())
    assert set(result["bits_per_byte"]) == {"plain", "off", "on", "shuffled"}
    assert all(f"{value:.4f}" in table for value in result["bits_per_byte"].values())
    training = result["training"]
    assert training["tokens"] == 3 * 2 * 128 and training["parting"] == 2
    assert training["retro"]["steps"] == training["plain"]["steps"] == 3
    assert training["retro"]["tokens"] == training["plain"]["tokens"] == 2 * 128  # after the parting
    assert set(result["evaluation"]["retro"]["better_on"]) == {"off", "shuffled"}
    assert result["generation"]["chunks"][0]["neighbours"][0]["title"].startswith("train-")
    page = (tmp_path / "d" / "report.md").read_text()
    assert table.strip() in page and result["generation"]["chunks"][0]["neighbours"][0]["title"] in page
    kept = {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "d" / "set").rglob("*"))}
    assert run(*words, "--json") == 0
    assert len(steps) == 4 and kept == {path: path.stat().st_mtime_ns for path in kept}
    again = json.loads(capfd.readouterr().out)
    assert again["bits_per_byte"] == result["bits_per_byte"]
    assert again["generation"]["text"] == result["generation"]["text"]
    words[words.index("--corpus") + 1] = world.root
    assert run(*words) == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert f"{tmp_path / 'd'} holds the demo of something else (another corpus). Go on with it" in said
    assert "--out" in said and "--overwrite" not in said


def test_standard_library() -> None:
    documents, source = read_corpus(None)
    titles = {document.title for document in documents}
    assert "email/message.py" in titles and len(titles) > 200 and all("/" in title for title in titles)
    assert not any(
        part in title.split("/")
        for title in titles
        for part in ("test", "encodings", "pydoc_data", "site-packages")
    )
    training, held_out = split(documents, Size(), 0)
    assert sum(len(d.text.encode()) for d in training) <= Size.train_bytes
    assert not {d.text for d in training} & {d.text for d in held_out} and len(held_out) >= 2
    again = split(list(reversed(documents)), Size(), 0)  # a document's side depends on its text alone
    assert [{d.text for d in side} for side in again] == [
        {d.text for d in side} for side in (training, held_out)
    ]


def test_too_little_text() -> None:
    with pytest.raises(InputError, match="two to hold out"):
        split([Document("a", "b" * 100)], replace(Size(), held_out_share=0.5), 0)


@pytest.mark.parametrize("name", ["report.md", "result.json", "curve.png"])
def test_what_is_no_demos_is_not_replaced(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("mine")
    assert run("demo", "--out", tmp_path) == 2
    assert f"holds {name}, and no demo: that would be replaced" in capfd.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_both_models_need_a_step_of_their_own(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("demo", "--steps", 1, "--out", tmp_path / "d") == 2
    error = capfd.readouterr().err
    assert "steps is 1" in error and error.count("\n") == 1 and not (tmp_path / "d").exists()
    with pytest.raises(InputError, match="steps is 0"):
        module.demo(tmp_path / "d", steps=0, size=replace(Size(), train_bytes=0))


def test_the_decoder_is_kept_after_a_copy_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "train.json").write_text("whole")
    (tmp_path / f"decoder.tmp-{os.getpid()}").mkdir()
    (tmp_path / f"decoder.tmp-{os.getpid()}" / "train.json").write_text("wh")  # as kill -9 leaves it
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no room"):
        patch.setattr(os, "replace", mock.Mock(side_effect=OSError("no room")))
        module._keep(tmp_path / "plain", tmp_path / "decoder")
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]
    (tmp_path / f"decoder.tmp-{os.getpid()}").mkdir()
    module._keep(tmp_path / "plain", tmp_path / "decoder")
    assert (tmp_path / "decoder" / "train.json").read_text() == "whole"


def test_one_model_and_several_sets(tmp_path: Path, seed: int) -> None:
    """Of newer text more is found in the newer edition, and the models have read the other documents alone."""
    rng = random.Random(seed)
    words = [["".join(rng.choices("abcdefgh", k=5)) for _ in range(250)] for _ in range(6)]
    books: dict[str, dict[str, Document]] = {}
    for edition, changed in (("2023", 0.0), ("2020", 0.03), ("2016", 0.3)):
        for i, text in enumerate(words):
            edited = [rng.choice(text) if rng.random() < changed else word for word in text]
            books.setdefault(edition, {})[f"c{i}"] = Document(f"{i} ({edition})", " ".join(edited))
    result = demo_factbook.swap(tmp_path / "f", books, 2, TINY, "hashing:64")
    assert result["documents"] == 2 and result["training"]["documents"] == 4
    assert {name: of["num_documents"] for name, of in result["sets"].items()} == {
        "2016": 6,
        "2020": 6,
        "both": 12,
    }
    # the ten nearest of both editions need not have all of the newer one's ten among them
    overlap = result["overlap"]
    assert overlap["2016"] < min(overlap["2020"], overlap["both"])
    assert set(result["bits_per_byte"]) == {
        "plain decoder",
        "RETRO off",
        *(f"RETRO on, set of {name}" for name in ("2016", "2020", "both")),
        "RETRO, set of 2020, shuffled",
    }
    assert "| RETRO on, set of 2020 |" in result["report"]
