"""Block sizes: smaller ones where a GPU's shared memory is too small, and those that were tuned."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton.runtime.errors import OutOfResources

from retro_kernels import chunked_cross_attention
from retro_kernels.ops.cca import tiles, tuning
from retro_kernels.ops.cca.tiles import Config

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the interpreter")
PROBLEM = tuning.Problem("backward", 89, 128, torch.bfloat16, 64, "relative")
TOO_BIG = OutOfResources(114_688, 101_376, "shared memory")
SMALL = {"num_heads": 1, "chunk_size": 16, "neighbour_len": 32, "device": "cpu"}


@pytest.fixture(autouse=True)
def own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RETRO_KERNELS_TUNED", str(tmp_path / "cache" / "block_sizes.json"))
    monkeypatch.setattr(tuning, "_fitted", {})
    tuning._tuned.cache_clear()
    return tuning.tuned_file()


def test_block_sizes_shrink_until_they_fit() -> None:
    tried: list[Config] = []

    def launch(config: Config) -> str:
        tried.append(config)
        if config.keys * config.stages > 32 or config.panels < 2:
            raise TOO_BIG
        return "done"

    assert tuning.fitting(PROBLEM, None, launch) == "done"
    assert tried[0] == tiles.backward_config(*PROBLEM[1:]) and len(tried) > 1
    before = len(tried)
    assert tuning.fitting(PROBLEM, None, launch) == "done" and len(tried) == before + 1  # it is remembered
    with pytest.raises(OutOfResources):  # what is asked for is not replaced
        tuning.fitting(PROBLEM, Config(128, 8, 2), launch)


def test_what_never_fits_is_said() -> None:
    def launch(config: Config) -> None:
        raise TOO_BIG

    with pytest.raises(
        RuntimeError, match=r"128 wide in bfloat16 needs 114,688 of shared memory.*has 101,376"
    ):
        tuning.fitting(PROBLEM, None, launch)


@interpreted
def test_a_kernel_runs_in_the_blocks_that_fit(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The public function, on a GPU that has room for 16 keys only: the same results."""
    launched: list[Config] = []
    fitting = tuning.fitting

    def tight(problem, config, launch):  # type: ignore[no-untyped-def]
        def fits(sizes: Config) -> object:
            if sizes.keys > 16:
                raise TOO_BIG
            launched.append(sizes)
            return launch(sizes)

        return fitting(problem, config, fits)

    monkeypatch.setattr(tuning, "fitting", tight)
    tensors = [torch.randn(1, 40, 2, 16), *(torch.randn(1, 2, 2, 32, 2, 16) for _ in "kv")]
    table = torch.randn(2, 47, 16)
    results = []
    for name in ("reference", "triton"):
        leaves = [x.clone().requires_grad_() for x in (*tensors, table)]
        out = chunked_cross_attention(*leaves[:3], rel_key=leaves[3], chunk_size=16, backend=name)
        out.square().sum().backward()
        results.append([out.detach(), *(x.grad for x in leaves)])
    assert [config.keys for config in launched] == [16, 16]
    for ours, exact in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-4)


@interpreted
def test_tuning_keeps_the_fastest_that_is_right(own_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that prefers few warps; one candidate gives wrong results, one does not compile."""
    few = [Config(32, 4, 1), Config(16, 4, 1), Config(16, 8, 1), Config(32, 8, 1)]
    monkeypatch.setattr(tuning, "candidates", lambda direction, dim: iter(few))
    told: list[str] = []
    times = itertools.count()
    running: list[Config] = []
    fitting = tuning.fitting

    def wrong_or_broken(problem, config, launch):  # type: ignore[no-untyped-def]
        if config == few[1]:
            raise TOO_BIG
        running.append(config)
        return fitting(problem, config, launch)

    monkeypatch.setattr(tuning, "fitting", wrong_or_broken)
    close = tuning._close
    monkeypatch.setattr(
        tuning, "_close", lambda found, expected: running[-1] != few[2] and close(found, expected)
    )

    def clock(call) -> float:  # type: ignore[no-untyped-def]
        call()
        return {few[0]: 2.0, few[3]: 1.0}.get(running[-1], 5.0 + next(times))

    best = tuning.tune(16, torch.float32, **SMALL, chunks=2, clock=clock, tell=told.append)
    assert set(best.values()) == {few[3]} and len(best) == 2
    assert any("wrong results" in line for line in told) and any("OutOfResources" in line for line in told)
    saved = json.loads(own_file.read_text())
    assert saved["block_sizes"] == {name: list(config) for name, config in best.items()}
    problem = tuning.Problem(
        "forward", tiles.architecture(torch.device("cpu")), 16, torch.float32, 16, "relative"
    )
    assert tuning.block_sizes(problem) == few[3]
    assert [path.name for path in own_file.parent.iterdir()] == [own_file.name]


@interpreted
def test_tuning_asks_the_table_alone(own_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged file says to tune again; and what was found to fit before is not preferred to what was tuned."""
    own_file.parent.mkdir()
    own_file.write_text('{"format": 2')
    monkeypatch.setattr(tuning, "candidates", lambda direction, dim: iter([Config(32, 8, 1)]))
    problem = tuning.Problem("forward", 0, 16, torch.float32, 16, "relative")
    monkeypatch.setitem(tuning._fitted, problem, Config(16, 4, 1))
    best = tuning.tune(16, torch.float32, **SMALL, chunks=1, clock=lambda call: 1.0, tell=lambda line: None)
    assert tuning.block_sizes(problem) == best[problem.name] != Config(16, 4, 1)


def test_the_file_is_checked(own_file: Path) -> None:
    tuning.save({PROBLEM.name: Config(16, 4, 1)}, "some GPU")
    assert tuning.block_sizes(PROBLEM) == Config(16, 4, 1)
    tuning.save({"forward-other": Config(32, 4, 1)}, "some GPU")
    assert len(json.loads(own_file.read_text())["block_sizes"]) == 2
    for damaged in ("{", "[]", '{"format": 99, "block_sizes": {}}', '{"format": 2, "block_sizes": [1]}'):
        own_file.write_text(damaged)
        tuning._tuned.cache_clear()
        with pytest.raises(ValueError, match="Delete it, or tune again"):
            tuning.block_sizes(PROBLEM)
    own_file.write_text(json.dumps({"format": 2, "triton": "0.1", "block_sizes": {PROBLEM.name: [16, 4, 1]}}))
    tuning._tuned.cache_clear()
    with pytest.warns(UserWarning, match="tuned with Triton 0.1"):
        assert tuning.block_sizes(PROBLEM) == tiles.backward_config(*PROBLEM[1:])


def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr("sys.argv", ["tuning"])
    assert tuning.main() == 2
    assert "CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
def test_tuning_on_the_gpu(own_file: Path) -> None:
    best = tuning.tune(64, torch.bfloat16, chunks=8, num_heads=2, tell=lambda line: None)
    assert len(best) == 2 and own_file.exists()
