"""Training on two processes against training on one; what happens to one of them happens to both."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small
import torch
from small import MODEL, OF_RANKS, World, losses, run, weights

from retro_kernels import cli, ranks
from retro_kernels.config import InputError, InputFailedElsewhere, TrainConfig
from retro_kernels.ranks import Ranks, joined, together
from retro_kernels.retrieval import bm25, retriever
from retro_kernels.retrieval.store import ChunkStore
from retro_kernels.runs import checkpoints, load_state
from retro_kernels.train import _open_set, _Trainer

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def options(world: World, out: Path, seed: int) -> list[str]:
    fields = ["--data", world.train, "--set", world.set, "--out", out, "--seed", seed % 1000]
    fields += ["--accumulate", 2, "--steps", 4, "--log-every", 1, "--dtype", "fp32", *MODEL]
    return ["train", *map(str, fields)]


def test_two_processes_train_the_weights_of_one(world: World, tmp_path: Path, seed: int) -> None:
    """The sum of two gradients has no order: the same bits, as long as each product has as many threads."""
    one, two = tmp_path / "one", tmp_path / "two"
    subprocess.run(
        [sys.executable, "-m", "retro_kernels", *options(world, one, seed)], env=OF_RANKS, check=True
    )
    ran = subprocess.run(
        [*TORCHRUN, "-m", "retro_kernels", *options(world, two, seed)],
        env=OF_RANKS,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("step 4") == 1  # one of them speaks
    assert ran.stderr.count("step/s") and "FutureWarning" not in ran.stderr
    assert weights(one) == weights(two)
    for (step, loss), (same_step, same_loss) in zip(losses(one), losses(two), strict=True):
        assert step == same_step and loss == pytest.approx(same_loss)
    assert len(load_state(checkpoints(two)[0][1])["others"]) == 1
    # and one goes on where two were
    assert run("train", "--data", world.train, "--out", two, "--resume", "--steps", 5) == 0
    assert checkpoints(two)[-1][0] == 5


@pytest.fixture(scope="module")
def told(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What two processes of ranks_worker.py wrote: their folder, and what each was told."""
    folder = tmp_path_factory.mktemp("ranks")
    small.run_ranks("ranks_worker.py", folder, world.set, world.train, 3)
    return folder, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_resume_bit_for_bit(told: tuple[Path, list[dict[str, Any]]]) -> None:
    """With dropout, which each draws for itself."""
    folder, (first, second) = told
    assert weights(folder / "parts") == weights(folder / "whole")
    assert losses(folder / "parts") == losses(folder / "whole")
    assert len(losses(folder / "whole")) == 4
    for name in ("whole", "parts"):
        assert first[name] == second[name]
        assert first[name]["processes"] == 2 and first[name]["neighbours_filled"] > 0.5
    randoms = load_state(checkpoints(folder / "whole")[0][1])
    assert not torch.equal(randoms["rng"], randoms["others"][0]["rng"])


def test_what_fails_on_one_fails_on_both(told: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (first, second) = told
    assert first["not divided"].startswith("InputError: train: accumulate is 3, and there are 2 processes")
    assert second["not divided"].startswith(
        "InputFailedElsewhere: train: rank 0 failed: InputError: train: a"
    )
    assert first["no set on one"] == (
        "InputFailedElsewhere: train: rank 1 failed: InputError: no such set here"
    )
    assert second["no set on one"] == "InputError: no such set here"
    assert first["no room"].startswith("OSError: [Errno 28]")
    assert second["no room"].startswith("FailedElsewhere: train: rank 0 failed: OSError: [Errno 28]")
    assert not (folder / "not-divided").exists()
    assert first["no batch on one"] == (
        "FailedElsewhere: train: rank 1 failed: OSError: [Errno 5] Input/output error: 'text'"
    )
    assert second["no batch on one"].startswith("OSError: [Errno 5]")
    assert first["no room for metrics"].startswith("OSError: [Errno 28]")
    assert second["no room for metrics"].startswith("FailedElsewhere: train: rank 0 failed: OSError")
    assert first["interrupted early"] == "KeyboardInterrupt: train: rank 1 was interrupted."
    assert second["interrupted early"] == "KeyboardInterrupt: "


def test_what_differs_between_processes_is_noticed(told: tuple[Path, list[dict[str, Any]]]) -> None:
    for kind, one in zip(("InputError", "InputFailedElsewhere"), told[1], strict=True):
        assert one["another seed"] == (
            f"{kind}: train: seed is 3 in the first process and 4 in that of rank 1. Call all of them with the same."
        )
        assert one["another set"].startswith(
            f"{kind}: train: the fingerprint of the set is 'of 0' in the first process and 'of 1' in that of rank 1."
        )


def test_a_weight_that_nothing_reads_is_not_waited_for(told: tuple[Path, list[dict[str, Any]]]) -> None:
    for one in told[1]:
        assert one["unused"].startswith("{'run'"), one["unused"]


def test_who_is_asked_to_stop_stops_all(told: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (first, second) = told
    step = checkpoints(folder / "stopped")[-1][0]
    for one in (first, second):
        assert one["stopped"].startswith(f"Interrupted: Stopped at step {step:,} of 1,000,000, checkpoint")
        assert "torchrun --standalone --nproc-per-node 2 -m retro_kernels train" in one["stopped"]


def test_what_processes_tell_each_other(told: tuple[Path, list[dict[str, Any]]]) -> None:
    for one in told[1]:
        assert one["any"] == [True, False] and one["gathered"] == [0, 1] and one["told"] == "of 0"


def test_processes_of_torchrun_meet_again(tmp_path: Path) -> None:
    """Its store keeps what the groups before have left there."""
    script = tmp_path / "again.py"
    script.write_text(
        "import signal\n"
        "from retro_kernels.ranks import joined\n"
        "signal.alarm(60)\n"  # they would wait for half an hour
        "for i in range(20):\n"
        "    with joined() as ranks:\n"
        "        assert ranks.gathered(i + ranks.rank) == [i, i + 1]\n"
    )
    ran = subprocess.run([*TORCHRUN, str(script)], env=OF_RANKS, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr


def test_who_fails_does_not_wait_for_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its groups end together; the others may be in the middle of a step."""
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    destroyed: list[bool] = []
    backends: list[str] = []
    groups: list[dict[str, Any]] = []
    monkeypatch.setattr(ranks, "_store", torch.distributed.HashStore)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda name, **_: backends.append(name))
    monkeypatch.setattr(torch.distributed, "new_group", lambda **options: groups.append(options))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    for cuda in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(
            torch.distributed, "destroy_process_group", lambda cuda=cuda: destroyed.append(cuda)
        )
        with joined():
            pass
        with pytest.raises(OSError), joined():
            raise OSError
    assert destroyed == [False, False, True]
    assert backends == ["gloo"] * 2 + ["cpu:gloo,cuda:nccl"] * 2
    # where one tokenises for hours, the others wait for it
    assert all(group["backend"] == "gloo" and group["timeout"].days >= 1 for group in groups)


def test_a_group_that_there_is_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is of this process alone."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: pytest.fail("another"))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: pytest.fail("destroyed"))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda _: 1)
    for world, group in ((1, "one"), (2, "two")):
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_, world=world: world)
        monkeypatch.setattr(torch.distributed, "new_group", lambda group=group, **_: group)
        with joined() as found:
            assert (found.rank, found.world) == (world - 1, world)
        with pytest.raises(OSError), joined():
            raise OSError


def test_a_sum_leaves_what_is_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Ranks()
    found.world = 2
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values, group: values.mul_(2))
    values = torch.ones(2, requires_grad=True)
    summed = found.sum(values)
    assert summed.tolist() == [2, 2] and values.tolist() == [1, 1] and not summed.requires_grad


def test_the_own_error_is_raised_where_another_process_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object, **__: object) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(torch.distributed, "all_reduce", closed)
    with pytest.raises(OSError, match="mine"), together(None, torch.device("cpu"), "train"):
        raise OSError("mine")
    with pytest.raises(RuntimeError, match="closed"), together(None, torch.device("cpu"), "train"):
        pass
    # a ValueError, too, says that an argument cannot be used
    kinds = [
        ranks._kind(kind("")) for kind in (KeyboardInterrupt, InputError, ValueError, OSError, SystemExit)
    ]
    assert kinds == ["interrupt", "input", "input", "other", "other"]


@pytest.mark.parametrize("verb", ["demo", "index", "eval"])
def test_torchrun_is_refused_where_nothing_is_divided(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    started = {"WORLD_SIZE": 2, "RANK": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    for name, value in {**started, "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, str(value))
    out = tmp_path / "out"
    words = {
        "demo": ["--corpus", out, "--out", out],
        "index": [out, "--out", out],
        "eval": ["--run", out, "--data", out],
    }
    assert run(verb, *words[verb]) == 2
    assert capsys.readouterr().err == ""  # one of them speaks
    monkeypatch.setenv("RANK", "0")
    assert run(verb, *words[verb]) == 2
    assert capsys.readouterr().err.startswith(f"retro-kernels {verb}: torchrun started 2 processes, and all")
    assert not out.exists()
    for allowed in ("train", "info"):
        cli._check_processes(allowed)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    cli._check_processes(verb)  # a scheduler may describe a job of other programs so


def test_bars_are_the_first_process_s(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bm25, "_SLOW", 0)
    config = TrainConfig(data=(str(world.train),), out=str(tmp_path), set=str(world.set), retriever="bm25")
    for progress in (True, False):
        _open_set(config, torch.device("cpu"), progress)
        assert ("reading for BM25" in capsys.readouterr().err) == progress


def test_processes_share_the_memory_that_is_free(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ChunkStore.open(world.set)
    monkeypatch.setattr(retriever, "WITH_CUDA", True)
    monkeypatch.setattr(retriever, "_free_memory", lambda: 4 * store.chunks.nbytes)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    assert retriever._pinned(store, torch.device("cuda:1")) is not None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert retriever._pinned(store, torch.device("cuda:1")) is None


def test_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")  # alone, it says nothing
    assert cli._speaks()
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")  # torchrun with one process
    with joined() as ranks:
        assert (ranks.rank, ranks.world, ranks.first) == (0, 1, True)
        assert ranks.any(True) and not ranks.any(False) and ranks.told(3) == 3
        assert ranks.sum(torch.ones(2)).tolist() == [1, 1] and ranks.gathered(3) == [3]
        with pytest.raises(OSError, match="as it is"), ranks.together("train"):
            raise OSError("as it is")


def test_each_process_drops_others() -> None:
    """Than every other, and in another order after a start anew."""

    def drawn(rank: int, step: int, seed: int) -> tuple[float, ...]:
        torch.manual_seed(0)
        config = SimpleNamespace(seed=seed)
        ranks = SimpleNamespace(rank=rank, first=rank == 0)
        _Trainer._draw_apart(SimpleNamespace(config=config, ranks=ranks, step=step))  # type: ignore[arg-type]
        return tuple(torch.rand(4).tolist())

    assert len({drawn(*which) for which in [(0, 0, 0), (1, 0, 0), (2, 0, 0), (1, 5, 0), (1, 0, 3)]}) == 5
    assert drawn(1, 5, 3) == drawn(1, 5, 3) and drawn(0, 5, 3) == drawn(0, 0, 0)


def several(monkeypatch: pytest.MonkeyPatch, rank: int, visible: int, uuids: list[str]) -> Ranks:
    """This process as one of as many as there are `uuids`, their GPUs', with `visible` GPUs to choose from."""
    ranks = Ranks()
    ranks.rank, ranks.world = rank, len(uuids)
    monkeypatch.setattr(ranks, "together", lambda name: contextlib.nullcontext())
    monkeypatch.setattr(ranks, "gathered", lambda own: [*uuids[:rank], own, *uuids[rank + 1 :]])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuids[rank]))
    return ranks


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, chosen = several(monkeypatch, 1, 2, ["a", "b", "c"]), []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "0")  # on a second machine
    assert ranks.device("auto") == ranks.device("cuda") == torch.device("cuda:0") == chosen[-1]
    monkeypatch.delenv("LOCAL_RANK")
    assert ranks.device("auto") == torch.device("cuda:1")
    with pytest.raises(InputError, match="each with a GPU of its own"):
        ranks.device("cuda:1")
    ranks.rank = 2
    met: list[str] = []
    monkeypatch.setattr(ranks, "together", lambda name: met.append(name) or contextlib.nullcontext())
    with pytest.raises(InputError, match="there are 2 GPUs"):
        ranks.device("cuda")
    assert met == ["device"]  # the others hear of it
    assert several(monkeypatch, 0, 2, ["a"]).device("cuda:1") == torch.device(
        "cuda:1"
    )  # alone, it may choose


def test_processes_that_see_one_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """As schedulers start them: each calls its own GPU the first. Where it is the same one for two, all are told."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert several(monkeypatch, 1, 1, ["a", "b"]).device("auto") == torch.device("cuda:0")
    for rank in (0, 1, 2):
        said = "ranks 0 and 2 have the same GPU. Start as many processes"
        with pytest.raises(InputError, match=said) as caught:
            several(monkeypatch, rank, 1, ["a", "b", "a"]).device("cuda")
        assert caught.type is (InputFailedElsewhere if rank else InputError)  # one of them speaks
    on_cpus = several(monkeypatch, 1, 1, ["a", "b"])
    monkeypatch.setattr(on_cpus, "gathered", lambda own: [own] * 2)
    assert on_cpus.device("cpu") == torch.device("cpu")
