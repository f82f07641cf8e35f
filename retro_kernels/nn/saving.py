"""A model in a folder: `config.json` and `model.safetensors`."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..config import InputError, RetroConfig, check_readable, staged, write_safetensors
from .layers import is_quantised
from .positions import DistanceTable

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_GATHER = (
    "Bring the weights together first: within FSDP.summon_full_params, after remove_hook_from_module(model, "
    "recurse=True) of accelerate, or with get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) "
    "for a model that is whole."
)
_CHECKSUM = "crc32"  # in the metadata of the weights: of what is in them, whatever their order in the file


def save(weights: dict[str, Tensor], config: dict[str, Any], directory: Path) -> None:
    """Writes both files; each appears under its name only when it is whole, the weights first. OSError: disk full, …"""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().contiguous() for name, value in weights.items()}
    with staged(directory / CONFIG) as temporary_config, staged(directory / WEIGHTS) as temporary:
        # nothing beside it: safetensors writes several in any order, and the same weights shall be the same file
        write_safetensors(weights, temporary, directory / WEIGHTS, {_CHECKSUM: _checksum(weights)})
        temporary_config.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        with open(temporary_config, "r+b") as file:  # or a power cut might leave nothing under its name
            os.fsync(file.fileno())


def content(weights: dict[str, Tensor]) -> Iterator[Any]:
    """What `weights` are, in bytes and byte buffers, for a checksum: names, dtypes, shapes and values."""
    for name, value in weights.items():
        yield f"{name} {value.dtype} {list(value.shape)}".encode()
        yield value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _checksum(weights: dict[str, Tensor]) -> str:
    crc = 0  # a gigabyte takes a third of a second, where a cryptographic digest takes two
    for part in content(dict(sorted(weights.items()))):
        crc = zlib.crc32(part, crc)
    return f"{crc:08x}"


def check_at_hand(weights: dict[str, Tensor]) -> None:
    """InputError where some are elsewhere: offloaded, or divided among processes."""
    for name, value in weights.items():
        if value.is_meta or hasattr(value, "full_tensor"):  # DTensor's; its class takes long to import
            raise InputError(
                f"save_pretrained: {name} {'is on the meta device' if value.is_meta else 'is sharded'}, so that its "
                f"values are not here. {_GATHER}"
            )


def check_savable(weights: dict[str, Tensor], made: Callable[[], nn.Module] | None) -> None:
    """InputError where what `save` would write could not be read again: `weights` are not those of the module that
    `made` makes or not of their shapes (None: of a class of the user's, which may have more), or two of them are one
    tensor."""
    wanted: dict[str, Tensor] | None = None
    if made is not None:
        with torch.device("meta"):
            wanted = made().state_dict()
    if strange := [name for name in weights if wanted is not None and name not in wanted]:
        raise InputError(
            f"save_pretrained: the model has {', '.join(strange[:3])}{', …' if strange[3:] else ''}, which no model of "
            "its configuration has, so that from_pretrained could not read it. Merge or remove what was put into it "
            "(adapters, parametrisations, masks, a compiled part), or save its state_dict()."
        )
    seen: dict[tuple[torch.device, int], str] = {}
    for name, value in weights.items():
        # of FSDP1, which leaves a piece under the whole's name
        if wanted is not None and value.shape != wanted[name].shape:
            raise InputError(
                f"save_pretrained: {name} is {list(value.shape)}, and its configuration says "
                f"{list(wanted[name].shape)}, so that from_pretrained could not read it. Where it is a shard: {_GATHER}"
            )
        if is_quantised(value):
            raise InputError(
                f"save_pretrained: {name} is quantised ({type(value).__name__}), so that from_pretrained could not "
                "read it. Save the model before it is quantised, or save its state_dict()."
            )
        if (place := value.data_ptr()) and (other := seen.setdefault((value.device, place), name)) != name:
            raise InputError(
                f"save_pretrained: {other} and {name} are one tensor, and from_pretrained would make two of them. Give "
                "one a copy, or take a configuration that ties them (tie_embeddings, share_encoder_embedding), or "
                "save the state_dict()."
            )


def read_config(directory: Path) -> dict[str, Any]:
    """What `save` was given. InputError: missing or damaged."""
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
    return values


def load_config(directory: Path) -> RetroConfig:
    return model_config(read_config(directory), directory)


def model_config(values: dict[str, Any], directory: Path) -> RetroConfig:
    """`values`, read from `directory`, as a configuration. InputError: they are none."""
    try:
        return RetroConfig.from_dict(values)
    except (InputError, TypeError) as error:
        raise InputError(f"{directory / CONFIG}: {error}") from None


def read_weights(
    directory: Path, wanted: dict[str, Tensor], device: torch.device | str, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """What `save` was given: as many, of the names and shapes of `wanted`; in `dtype`, None: as they were.
    InputError: missing, damaged, or others; OSError: it cannot be opened."""
    path = directory / WEIGHTS
    try:
        check_readable(path)
        with safe_open(path, framework="pt", device=str(device)) as file:
            checksum = (file.metadata() or {}).get(_CHECKSUM)
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise InputError(
            f"{directory} holds no {WEIGHTS}; give a folder that save_pretrained wrote."
        ) from None
    except SafetensorError as error:
        raise InputError(f"{path} is damaged ({error}).") from None
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
    # others, and earlier versions, write none
    if checksum is not None and _checksum(weights) != checksum:
        raise InputError(
            f"{path} is damaged: its weights are not those that were saved (their checksum is another). Copy it again, "
            "or train again."
        )
    return weights if dtype is None else {name: value.to(dtype) for name, value in weights.items()}


def load_weights(
    model: nn.Module,
    directory: Path,
    device: torch.device | str,
    dtype: torch.dtype | None,
    wanted: dict[str, Tensor] | None = None,
) -> None:
    """Fills `model`, or what of it is `wanted`, which stands on the meta device, so that no weight is ever held twice
    or drawn at random."""
    wanted = model.state_dict() if wanted is None else wanted
    model.load_state_dict(read_weights(directory, wanted, device, dtype), strict=False, assign=True)
    for module in model.modules():
        if isinstance(module, DistanceTable):  # not in the file, and empty on the meta device
            module.reset_parameters(device)
