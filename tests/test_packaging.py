"""What a person gets who installs this: the archives' contents, the pins, the cost of an import, the build's words."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

import retro_kernels

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def tracked() -> list[str]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in the source archive, built in a copy so that the checkout stays as it is."""
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path_factory.mktemp("sdist") / "checkout"
    unwanted = shutil.ignore_patterns(
        ".*", "*.so", "*.egg-info", "__pycache__", "build", "dist", "runs", "sets"
    )
    shutil.copytree(ROOT, copy, ignore=unwanted)
    code = "import setuptools.build_meta as b; print(b.build_sdist('..'))"
    built = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    with tarfile.open(copy.parent / built.stdout.split()[-1]) as archive:
        return {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}


def test_sdist_holds_all_that_a_build_needs(sdist: set[str]) -> None:
    wanted = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.*")}
    wanted |= {
        "LICENSE",
        "README.md",
        "setup.py",
        "pyproject.toml",
        "retro_kernels/py.typed",
        "retro_kernels/_C.pyi",
    }
    assert {"csrc/cuda/gather.cu", "csrc/cpu/gather.cpp", "csrc/bindings.cpp", "csrc/ops.h"} <= wanted
    assert not wanted - sdist


def test_every_module_is_packaged(sdist: set[str]) -> None:
    """A folder without __init__.py works in an editable install and is missing from the wheel."""
    assert not {str(p.relative_to(ROOT)) for p in (ROOT / "retro_kernels").rglob("*.py")} - sdist
    for folder in {p.parent for p in (ROOT / "retro_kernels").rglob("*.py")}:
        assert (folder / "__init__.py").exists(), f"{folder.relative_to(ROOT)} has no __init__.py"


def test_top_level() -> None:
    """A stranger reads this first. A new entry wants a reason, and a line in the README's file map."""
    assert {name.split("/")[0] for name in tracked()} <= {
        ".ci",
        ".gitignore",
        "LICENSE",
        "MANIFEST.in",
        "Makefile",
        "README.md",
        "bench",
        "constraints.txt",
        "csrc",
        "docs",
        "pyproject.toml",
        "retro_kernels",
        "setup.py",
        "tests",
    }


def test_licence() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["project"]["license"] == "Apache-2.0"


def test_version_in_one_place() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"] and "version" not in PROJECT["project"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "retro_kernels.__version__"}
    assert metadata.version("retro-kernels") == retro_kernels.__version__


def test_import_is_cheap() -> None:
    code = "import sys, retro_kernels; print(*{name.split('.')[0] for name in sys.modules})"
    # -S: without site, so that nothing else's .pth files count
    run = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    heavy = {"torch", "triton", "numpy", "faiss", "transformers", "sentencepiece", "safetensors"}
    assert "retro_kernels" in run.stdout.split()
    assert not heavy & set(run.stdout.split())


@pytest.mark.parametrize("shared", [True, False])
def test_models_come_without_the_compiler(tmp_path: Path, shared: bool) -> None:
    """torch.compile's modules take longer to import than all of ours, and few programs need them: with the layers, with
    what searches, and with a model that is opened."""
    config = retro_kernels.retro_tiny(vocab_size=50, share_encoder_embedding=shared)
    retro_kernels.Retro(config).save_pretrained(tmp_path)
    code = (
        "import sys, retro_kernels.evaluate, retro_kernels.generate, retro_kernels.nn\n"
        "from retro_kernels.retrieval import Retriever\n"
    )
    if torch.__version__ >= (2, 11):  # before, to allocate on the meta device brings a part of them
        code += f"retro_kernels.nn.Retro.from_pretrained({str(tmp_path)!r})\n"
    code += "print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"retro_kernels.nn.retrofit", "retro_kernels.retrieval.retriever"} <= {*run.stdout.split()}
    assert not {"torch._dynamo", "torch._inductor", "transformers", "sympy"} & set(run.stdout.split())


def test_every_public_name_resolves() -> None:
    for name in retro_kernels.__all__:
        assert getattr(retro_kernels, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        retro_kernels.nonsense  # noqa: B018


def direct_dependencies() -> list[Requirement]:
    lists = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    found = [Requirement(line) for lines in lists for line in lines]
    # faiss-gpu cannot stand beside faiss-cpu, so nothing here installs it
    return [r for r in found if r.name not in ("retro-kernels", "faiss-gpu")]


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_pin_every_direct_dependency(python: str) -> None:
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
    }
    pins: dict[str, str] = {}
    for pin in (Requirement(line) for line in lines if line):
        if pin.marker is None or pin.marker.evaluate(environment):
            assert pin.name not in pins, f"{pin.name} is pinned twice for Python {python}"
            (only,) = pin.specifier
            assert only.operator == "=="
            pins[pin.name] = only.version
    for wanted in direct_dependencies():
        assert wanted.name in pins, f"{wanted.name} has no pin for Python {python}"
        assert wanted.specifier.contains(pins[wanted.name]), f"{wanted}, but {pins[wanted.name]} is pinned"


def test_runtime_imports_are_declared() -> None:
    """Whatever the package imports is the standard library, itself or a declared dependency."""
    module_of = {"faiss-cpu": "faiss", "backports.zstd": "backports"}
    known = {module_of.get(r.name, r.name.replace("-", "_")) for r in direct_dependencies()}
    known |= {"retro_kernels", *sys.stdlib_module_names, "compression"}  # the last since Python 3.14
    for path in (ROOT / "retro_kernels").rglob("*.py"):
        for module in imported_modules(path):
            top = module.split(".")[0]
            assert top in known, f"{path}: {top}"


def test_native_code_has_two_doors() -> None:
    for path in (ROOT / "retro_kernels").rglob("*.py"):
        if "retro_kernels._C" in imported_modules(path):
            inside = path.relative_to(ROOT / "retro_kernels")
            assert inside.parts[0] == "ops" or inside == Path("retrieval/store.py"), inside


def imported_modules(path: Path) -> set[str]:
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def test_words() -> None:
    """One spelling, and no path of the machine that it was written on."""
    machine = re.compile("/(work|root)/" + r"[\w.]")
    spelling = re.compile("neighb" + "or(?!Joining)", re.IGNORECASE)
    for name in tracked():
        if (ROOT / name).suffix in (".png", ".svg", ".json"):
            continue
        text = (ROOT / name).read_text()
        assert not machine.search(text), f"{name} names a path of one machine: {machine.search(text)}"
        assert not spelling.search(text), f"{name}: write neighbour"


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """setup.py's own functions, without building anything."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setattr("pybind11.setup_helpers.ParallelCompile.install", lambda self: None)
    for name in ("RETRO_CUDA", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path("setup.py")


def put_nvcc(folder: Path, top: Path) -> Path:
    """A wrapper as some systems have it: nvcc's own --dryrun says where the toolkit is."""
    folder.mkdir(parents=True)
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '#$ _SPACE_= ' >&2\necho '#$ TOP={top}' >&2\n")
    nvcc.chmod(0o755)
    return nvcc


def test_finds_nvcc_and_its_toolkit(
    build: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toolkit").mkdir()
    nvcc = put_nvcc(tmp_path / "somewhere", tmp_path / "toolkit")
    monkeypatch.setenv("PATH", f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}")
    assert build["find_nvcc"]() == str(nvcc)
    assert build["toolkit_root"](str(nvcc)) == tmp_path / "toolkit"
    at_home = put_nvcc(tmp_path / "home" / "bin", tmp_path / "home")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert build["find_nvcc"]() == str(at_home)
    monkeypatch.setenv("RETRO_CUDA", "0")
    assert build["find_nvcc"]() is None


def test_without_nvcc(build: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build["find_nvcc"]() is None
    monkeypatch.setenv("RETRO_CUDA", "1")
    with pytest.raises(
        SystemExit, match="RETRO_CUDA=1, but nvcc was not found. Put it on PATH or set CUDA_HOME"
    ):
        build["find_nvcc"]()
    monkeypatch.setenv("RETRO_CUDA", "yes")
    with pytest.raises(SystemExit, match="RETRO_CUDA is 'yes'; it must be 0"):
        build["find_nvcc"]()


def test_build_needs_no_torch() -> None:
    assert {Requirement(line).name for line in PROJECT["build-system"]["requires"]} == {
        "setuptools",
        "pybind11",
    }
    for path in (ROOT / "csrc").rglob("*.*"):
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path
    assert len((ROOT / "setup.py").read_text().splitlines()) < 80


def test_the_oldest_versions_that_are_promised_were_tested() -> None:
    """And the README names them and the newest."""
    runs = json.loads((ROOT / "bench" / "results" / "versions.json").read_text())["runs"]
    assert all(run["failed"] == 0 and run["passed"] > 2000 for run in runs)
    promised = {r.name: str(r.specifier) for r in map(Requirement, PROJECT["project"]["dependencies"])}
    promised["Python"] = PROJECT["project"]["requires-python"]
    readme = " ".join((ROOT / "README.md").read_text().split())
    for name in ("Python", "torch", "triton"):
        tested = sorted(Version(run["versions"][name]) for run in runs)
        first, last = (f"{v.major}.{v.minor}" for v in (tested[0], tested[-1]))
        assert promised[name] == f">={first}"
        for version in (first, last):
            assert f"{'Triton' if name == 'triton' else name} {version}" in readme
