"""The README is true: its commands run, its code runs, its tables are those of the results, its files exist."""

from __future__ import annotations

import inspect
import json
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import plot
import pytest
import small
import tables

import retro_kernels

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
COMMANDS = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines() if line.strip()]
MAPPED = re.findall(r"^\| ((?:`[^`]+`(?:, )?)+) \|", README.split("## Files")[1], re.MULTILINE)
PATHS = [path for cell in MAPPED for path in re.findall("`([^`]+)`", cell)]

TINY = [
    *("--model", "dim=32", "ffn_dim=64", "num_heads=2", "head_dim=16", "num_layers=2", "encoder_dim=32"),
    *("encoder_heads=2", "encoder_head_dim=16", "encoder_ffn_dim=64", "cca_layers=1,2"),
]
PLAIN = [word for word in TINY if not word.startswith(("cca_", "encoder_"))]
SIZES = ["--steps", "2", "--batch-size", "2", "--sequence-length", "128", "--device", "cpu"]


def smaller(words: list[str]) -> list[str]:
    """Options that make a command take a second; they come last, so they win."""
    match words[0]:
        case "index":
            if "--merge" in words:
                return []
            own_tokenizer = {"--tokenizer", "--append"} & set(words)
            few_lists = (
                ["--index", "IVF4,PQ32x4fs,RFlat"] if "PCAR256,IVF4096,PQ128x4fs,RFlat" in words else []
            )
            vocabulary = [] if own_tokenizer else ["--vocab-size", "400"]
            return ["--embedder", "hashing:64", *vocabulary, *few_lists]
        case "train":
            pretrained = "models/gpt2" in words
            return [*SIZES, *([] if pretrained else TINY if "--set" in words else PLAIN)]
        case "generate":
            return ["--max-tokens", "70", "--device", "cpu"]
        case "eval":
            return ["--device", "cpu"]
    return []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README calls corpus/, more/, held-out/ and models/gpt2."""
    root, rng = tmp_path_factory.mktemp("readme"), random.Random(3)
    passages = [" ".join(small._word(rng) for _ in range(24)) for _ in range(12)]
    for name, count in (("corpus", 8), ("more", 2), ("held-out", 2)):
        (root / name).mkdir()
        for i in range(count):
            (root / name / f"{name}-{i}.txt").write_text(small.text(rng, passages, 250), encoding="utf-8")
    small.pretrained(root / "models" / "gpt2", root / "corpus")
    return root


def test_commands_and_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the README, each in the folder that those before it left."""
    monkeypatch.chdir(folder)
    for kind, block in BLOCKS:
        if kind == "python":
            exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
        for line in block.splitlines() if kind == "sh" else []:
            program, *words = shlex.split(line)
            if program == "retro-kernels":
                assert small.run(*words, *smaller(words)) == 0, line
            if program == "torchrun":
                words += smaller(words[words.index("retro_kernels") + 1 :])
                subprocess.run([sys.executable, "-m", "torch.distributed.run", *words], check=True)


def test_other_commands_are_there() -> None:
    """What sets up an environment is shown to be what make and pip would run; test_demo.py runs the demo itself."""
    others = [shlex.split(line) for line in COMMANDS if not line.startswith(("retro-kernels ", "torchrun "))]
    assert ["make", "demo"] in others and ["make", "test"] in others
    for words in others:
        if words[0] == "make":
            shown = subprocess.run([words[0], "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
            assert (
                shown.returncode == 0
                and {"demo": "retro-kernels demo", "test": "-m pytest", "bench": "bench/run.py"}[words[1]]
                in shown.stdout
            )
        else:
            assert words[:2] == ["pip", "install"], words
            extras = re.fullmatch(r"\.\[(.*)\]", words[2])
            assert extras and set(extras[1].split(",")) <= declared_extras()


def declared_extras() -> set[str]:
    listed = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    return set(re.findall(r"^([\w-]+) = \[", listed, re.MULTILINE))


def test_tables_are_those_of_the_results() -> None:
    """A place that is still to be filled is empty; a filled one is what bench/tables.py makes of the results."""
    assert set(tables.DOCUMENTS) == {path for path, text in DOCUMENTS.items() if tables.MARKER.search(text)}
    for text in DOCUMENTS.values():
        for match in tables.MARKER.finditer(text):
            if match[0] != f"{match[1]}{match[match.lastindex or 0]}":
                assert tables.rendered(match[0]) == match[0], f"python bench/tables.py --write: {match[1]}"


def test_file_map_is_whole() -> None:
    for path in PATHS:
        assert (ROOT / path).exists(), f"{path} is in the README's file map only"
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "retro_kernels").rglob("*.py")}
    packages = {name for name in modules if name.endswith("/__init__.py")}
    assert not modules - packages - set(PATHS)
    assert len(PATHS) == len(set(PATHS))


def test_links() -> None:
    """To files, and to headings as GitHub names them."""
    for path, text in DOCUMENTS.items():
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)]+)\)", prose):
            if target.startswith("https://"):
                continue
            name, _, heading = target.partition("#")
            found = (path.parent / name).resolve() if name else path
            assert found.exists(), target
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE) if heading else []
            assert not heading or heading in {anchor(h) for h in headings}, target


def anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", [name for name in retro_kernels.__all__ if name != "__version__"])
def test_public_names_are_documented(name: str) -> None:
    found = getattr(retro_kernels, name)
    assert inspect.getdoc(found), name
    if inspect.isfunction(found) and not name.startswith("retro_"):
        documented = found.__doc__ or ""
        assert "rais" in documented.lower(), f"{name} says nothing of errors"
        for argument in inspect.signature(found).parameters:
            assert argument in documented, f"{name} says nothing of {argument}"


def test_picture(tmp_path: Path) -> None:
    """From whatever was measured: nothing, the demo, kernels; predictions never."""
    target = tmp_path / "docs" / "gains.png"
    (tmp_path / "predictions.json").write_text(json.dumps({"predictions": [{"group": "g"}]}))
    assert not plot.draw(tmp_path, target) and not target.exists()
    extra = {"what": "core", "pass": "forward+backward", "positions": "bias"}
    rows = [
        {"group": "g", "case": c, "median_s": s, "extra": extra}
        for c, s in (("retro_kernels", 1e-3), ("SDPA", 2e-3))
    ]
    rows.append({"group": "g", "case": "Flex", "skipped": "no such", "extra": extra})
    for name, device, date, turned in (
        ("cpu", "old chip", "2026-01-01", rows),
        ("cpu_new", "chip", "2026-01-02", rows[::-1]),
    ):
        environment = {"device": device, "date": date}
        (tmp_path / f"{name}.json").write_text(json.dumps({"environment": environment, "results": turned}))
    assert plot.rivals(tmp_path) == {"g\nchip": [("retro_kernels", 1e-3), ("SDPA", 2e-3)]}
    (tmp_path / "demo.json").write_text(
        json.dumps({"corpus": "c", "bits_per_byte": {"plain": 2.0, "on": 1.5}})
    )
    assert plot.gains(tmp_path) == {"c": {"plain decoder": 2.0, "RETRO on": 1.5}}
    assert plot.draw(tmp_path, target) and target.read_bytes().startswith(b"\x89PNG")
