"""A model in a folder: `config.json` and `model.safetensors`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..config import InputError, RetroConfig
from .positions import DistanceTable

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save(model: nn.Module, config: RetroConfig, directory: Path) -> None:
    """Writes both files; each appears under its name only when it is whole, the weights first."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    staged = directory / f"{WEIGHTS}.tmp-{os.getpid()}"
    staged_config = directory / f"{CONFIG}.tmp-{os.getpid()}"
    try:
        save_file(weights, staged, metadata={"format": "pt"})
        staged_config.write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
        os.replace(staged, directory / WEIGHTS)
        os.replace(staged_config, directory / CONFIG)
    finally:
        staged.unlink(missing_ok=True)
        staged_config.unlink(missing_ok=True)


def load_config(directory: Path) -> RetroConfig:
    path = directory / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{directory} holds no {CONFIG}; give a folder that save_pretrained wrote."
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is damaged ({error}).") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} is damaged (it must hold one JSON object).")
    try:
        return RetroConfig.from_dict(values)
    except (InputError, TypeError) as error:
        raise InputError(f"{path}: {error}") from None


def load_weights(
    model: nn.Module, directory: Path, device: torch.device | str, dtype: torch.dtype | None
) -> None:
    """Fills `model`, which stands on the meta device, so that no weight is ever held twice or drawn at random."""
    path = directory / WEIGHTS
    try:
        weights = load_file(path, device=str(device))
    except FileNotFoundError:
        raise InputError(
            f"{directory} holds no {WEIGHTS}; give a folder that save_pretrained wrote."
        ) from None
    except SafetensorError as error:
        raise InputError(f"{path} is damaged ({error}).") from None
    wanted = model.state_dict()
    missing, unknown = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    if missing or unknown:
        raise InputError(
            f"{path} does not fit {CONFIG}: it lacks {missing[:3] or 'nothing'} and has "
            f"{unknown[:3] or 'nothing'} beyond."
        )
    for name, value in weights.items():
        if value.shape != wanted[name].shape:
            raise InputError(
                f"{path} does not fit {CONFIG}: {name} is {list(value.shape)}, not "
                f"{list(wanted[name].shape)}."
            )
    if dtype is not None:
        weights = {name: value.to(dtype) for name, value in weights.items()}
    model.load_state_dict(weights, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, DistanceTable):  # not in the file, and empty on the meta device
            module.to_empty(device=device)
            module.reset_parameters()
