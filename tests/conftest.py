"""What every test shares: a fresh printed seed, poisoned memory, the gpu marker, and where real text lies."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest
import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    # Triton settles at import whether kernels are compiled or interpreted; without a GPU the tests interpret them
    os.environ.setdefault("TRITON_INTERPRET", "1")

LIBRARY = str(Path(__file__).resolve().parent.parent / "retro_kernels") + os.sep


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
        import triton

        old, new = (tuple(map(int, m.__version__.split(".")[:2])) for m in (triton, numpy))
        if old < (3, 7) and new >= (2, 4):
            raise pytest.UsageError(
                f"The interpreter of Triton {triton.__version__} fails with numpy {numpy.__version__}. Without a GPU "
                "the tests need an older one, or a newer Triton: pip install 'numpy<2.4'."
            )
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped where there is none")
    config.addinivalue_line("markers", "slow: takes more than a few seconds")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none here"))


@pytest.fixture(autouse=True)
def seed() -> int:
    """A new one in every run, shown with a failure. RETRO_SEED=… repeats a run."""
    value = int(os.environ.get("RETRO_SEED", random.SystemRandom().randrange(2**31)))
    print(f"seed {value} (repeat with RETRO_SEED={value})")
    torch.manual_seed(value)
    random.seed(value)
    return value


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library allocates without filling starts as NaN (or the lowest integer), so that an element which no
    one wrote shows up in the result."""

    def poison(allocate):  # type: ignore[no-untyped-def]
        def allocate_poisoned(*args, **kwargs):  # type: ignore[no-untyped-def]
            tensor = allocate(*args, **kwargs)
            if not sys._getframe(1).f_code.co_filename.startswith(LIBRARY) or tensor.is_meta:
                return tensor
            if type(tensor) is not torch.Tensor:  # a fake one, while tracing
                return tensor
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).min)

        return allocate_poisoned

    # `with torch.device(…)` remembers the factory functions at its first use: it must not remember ours
    with torch.device("meta"):
        torch.empty(0)
    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture(autouse=True, scope="session")
def same_arithmetic_everywhere() -> Iterator[None]:
    """A run's dtype "auto" is fp32 on every CPU, so that no result depends on the processor; a test that is about the
    other ones says so itself. Of the session, since `world` is trained in it."""
    from retro_kernels import runs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "cpu_has_bf16", lambda: False)
        yield


@pytest.fixture(scope="session")
def data() -> Iterator[Path]:
    """The folder of real text corpora: RETRO_DATA, or ../shared/data beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ["RETRO_DATA"]) if "RETRO_DATA" in os.environ else beside
    if not folder.is_dir():
        pytest.skip(f"no corpora here: RETRO_DATA is not set and {beside} does not exist")
    yield folder


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """Text, a retrieval set, a RETRO and a plain decoder (small.py), shared by the tests of the scripts: read only."""
    import small

    return small.build(tmp_path_factory.mktemp("world"))
