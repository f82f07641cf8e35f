"""One process of test_ranks.py: `ranks_worker.py RANK WORLD FOLDER SET DATA SEED`. Trains in a process group that there
is already, and writes what it was told to FOLDER/rank-RANK.json."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from small import MODEL

from retro_kernels import ranks
from retro_kernels import train as train_module
from retro_kernels.config import InputError, TrainConfig
from retro_kernels.train import train

FIELDS = {"preset": "retro_tiny", "sequence_length": 64, "batch_size": 2, "device": "cpu", "dtype": "fp32"}
READ = train_module._Trainer._read
MODEL_FIELDS = (*MODEL[MODEL.index("--model") + 1 :], "dropout=0.1")


def main(rank: int, world: int, folder: Path, set_: str, data: str, seed: int) -> dict[str, Any]:
    def config(out: str, **fields: Any) -> TrainConfig:
        common = {"accumulate": 2, "steps": 4, "log_every": 1, "seed": seed, "model": MODEL_FIELDS, **FIELDS}
        return TrainConfig(data=(data,), out=str(folder / out), set=set_, **{**common, **fields})

    def attempt(out: str, **fields: Any) -> str:
        try:
            return str(train(config(out, **fields), progress=False))
        except BaseException as error:
            return f"{type(error).__name__}: {error}"

    found: dict[str, Any] = {"whole": train(config("whole"), progress=False)}
    train(config("parts"), stop_after=2, progress=False)
    found["parts"] = train(config("parts"), resume=True, progress=False)

    found["not divided"] = attempt("not-divided", accumulate=3)
    with mock.patch.object(train_module, "_open_set", train_module._open_set if rank == 0 else no_set):
        found["no set on one"] = attempt("no-set")
    with mock.patch.object(
        train_module, "save_checkpoint", full if rank == 0 else train_module.save_checkpoint
    ):
        found["no room"] = attempt("no-room")

    with mock.patch.object(train_module, "_open_set", train_module._open_set if rank == 0 else interrupted):
        found["interrupted early"] = attempt("interrupted-early")
    with mock.patch.object(
        train_module._Trainer, "_read", train_module._Trainer._read if rank == 0 else ends_early
    ):
        found["no batch on one"] = attempt("no-batch")
    board = mock.Mock()
    board.add_scalar.side_effect = OSError(28, "No space left on device", "events")
    with mock.patch.object(train_module, "_tensorboard", lambda *_: board):
        found["no room for metrics"] = attempt("no-metrics")
    found["another seed"] = attempt("another-seed", seed=seed + rank)
    with mock.patch.object(train_module, "_set_fingerprint", lambda _: f"of {rank}"):
        found["another set"] = attempt("another-set")
    found["unused"] = attempt("unused", model=(*MODEL_FIELDS, "encoder_cross_layers="))

    if rank == world - 1:
        threading.Thread(target=interrupt, args=(folder / "stopped" / "metrics.jsonl",), daemon=True).start()
    found["stopped"] = attempt("stopped", steps=10**6)

    with ranks.joined() as joined:
        found["any"] = [joined.any(rank == 1), joined.any(False)]
        found["gathered"], found["told"] = joined.gathered(rank), joined.told(f"of {rank}")
    return found


def no_set(*_: Any) -> Any:
    raise InputError("no such set here")


def interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt


def ends_early(trainer: Any, until: int) -> Any:
    yield from itertools.islice(READ(trainer, until), 1)
    raise OSError(5, "Input/output error", "text")


def full(*_: Any) -> Any:
    raise OSError(28, "No space left on device", "checkpoint")


def interrupt(metrics: Path) -> None:
    while not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    place = Path(sys.argv[3])
    me, size = int(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{place}/rendezvous", rank=me, world_size=size)
    told = main(me, size, place, sys.argv[4], sys.argv[5], int(sys.argv[6]))
    (place / f"rank-{me}.json").write_text(json.dumps(told))
    dist.destroy_process_group()
