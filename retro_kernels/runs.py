"""A training run as a folder, and what every script needs around a model: device, arithmetic, progress, interruption.

    RUN/config.json, model.safetensors   the newest weights, as `Retro.from_pretrained` reads them (`RetroFitted`: those
                                         added to a pretrained model)
    RUN/tokenizer.model                  the tokenizer of those weights
    RUN/train.json                       how it was trained (TrainConfig) and what was found: arithmetic, fingerprints
    RUN/metrics.jsonl                    one JSON object every few steps
    RUN/checkpoint-00001000/             weights, optimiser, RNG at one moment; the newest is kept

A checkpoint is written into a folder of another name and renamed when whole, so that weights and optimiser
always belong together. `model.safetensors` beside it is a hard link to the same bytes where the file system has such.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .config import InputError
from .data.tokenizer import Tokenizer, _write_whole
from .nn import Retro, RetroFitted
from .ops._backend import cpu_has_bf16
from .ops._backend import pick_device as pick_device

SETTINGS, TOKENIZER, METRICS, STATE = "train.json", "tokenizer.model", "metrics.jsonl", "training.pt"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after everything worth keeping was written. On the command line the message says how to go on."""


@dataclass
class Run:
    """A trained model with what belongs to it. `settings` is train.json."""

    folder: Path
    model: Retro | RetroFitted
    tokenizer: Tokenizer
    settings: dict[str, Any]

    @property
    def sequence_length(self) -> int:
        return int(self.settings["config"]["sequence_length"])

    @property
    def num_neighbours(self) -> int:
        return int(self.settings["config"]["num_neighbours"])


def load_run(
    folder: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    *,
    base: str | os.PathLike[str] | None = None,
) -> Run:
    """Opens the folder that `train` wrote. `base`: where the pretrained model lies now that retrieval was added to.
    Raises InputError where the folder is no run, or is damaged, or where it has no such model."""
    folder = Path(folder)
    settings = read_settings(folder)
    model: Retro | RetroFitted
    if RetroFitted.is_saved_in(folder):
        model = RetroFitted.from_pretrained(folder, base=base, device=device)
    elif base is not None:
        raise InputError(f"{folder} was not made from a model of transformers; leave out base ({base}).")
    else:
        model = Retro.from_pretrained(folder, device=device)
    tokenizer = Tokenizer(folder / TOKENIZER)
    # a pretrained model's table is often rounded up
    if model.config.vocab_size < tokenizer.vocab_size or (
        isinstance(model, Retro) and model.config.vocab_size > tokenizer.vocab_size
    ):
        raise InputError(
            f"{folder}: the model has {model.config.vocab_size:,} tokens, but tokenizer.model has "
            f"{tokenizer.vocab_size:,}. They do not belong together."
        )
    return Run(folder, model, tokenizer, settings)


def read_settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings["config"]["sequence_length"], settings["config"]["num_neighbours"]
        return settings
    except FileNotFoundError:
        raise InputError(
            f"{folder} is no training run (no {SETTINGS} in it). Give the folder that "
            "`retro-kernels train --out` wrote."
        ) from None
    except (ValueError, TypeError, KeyError, NotADirectoryError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}).") from None


def write_json(path: Path, values: dict[str, Any]) -> None:
    _write_whole(path, (json.dumps(values, indent=2) + "\n").encode())


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every whole checkpoint, oldest first."""
    found = [(path.name.removeprefix("checkpoint-"), path) for path in folder.glob("checkpoint-*")]
    return sorted((int(step), path) for step, path in found if step.isdecimal())


def save_checkpoint(folder: Path, step: int, model: Retro | RetroFitted, state: dict[str, Any]) -> None:
    """Weights and `state` (tensors and plain values only) as the newest checkpoint; older ones go afterwards."""
    final = folder / f"checkpoint-{step:08d}"
    staged = folder / f"{final.name}.tmp-{os.getpid()}"
    try:
        model.save_pretrained(staged)
        torch.save(state, staged / STATE)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(staged, final)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    for name in ("config.json", "model.safetensors"):
        copy = folder / f"{name}.tmp-{os.getpid()}"
        copy.unlink(missing_ok=True)
        try:
            os.link(final / name, copy)
        except OSError:  # a file system without hard links
            shutil.copyfile(final / name, copy)
        os.replace(copy, folder / name)
    for old, path in checkpoints(folder):
        if old != step:
            shutil.rmtree(path, ignore_errors=True)


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The optimiser's and generators' state; never unpickles an object."""
    try:
        return torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types for a damaged file
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{checkpoint / STATE} cannot be read ({reason}). Remove {checkpoint} and start again."
        ) from None


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Arithmetic of the forward pass. `"auto"`: bf16 where the device multiplies in it."""
    if name in ("fp32", "bf16"):
        return torch.float32 if name == "fp32" else torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """As options, summaries and `train.json` call it."""
    return "bf16" if dtype == torch.bfloat16 else "fp32"


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in `dtype`; nothing where that is fp32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def progress_bar(total: int, description: str, unit: str, *, show: bool = True, initial: int = 0) -> tqdm:
    """On standard error, redrawn seldom where that is a file."""
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        initial=initial,
        disable=not show,
        file=sys.stderr,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10,
        smoothing=0.05,
    )


def note(message: str) -> None:
    """One line on standard error that a progress bar does not tear."""
    tqdm.write(message, file=sys.stderr)


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Within, the first SIGINT or SIGTERM sets the event, so that a step can be finished; the second stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield asked
        return

    def ask(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
