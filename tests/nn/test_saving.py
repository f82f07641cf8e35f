"""A model in a folder: what is written comes back bit for bit, and what does not fit is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from retro_kernels import InputError, Retro

from .helpers import TINY, offload, random_neighbours, tiny_model
from .test_projection import quantise


@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": False}, {"share_encoder_embedding": True, "encoder_dim": 24}]
)
def test_round_trip(seed: int, tmp_path: Path, changes: dict[str, object]) -> None:
    model = tiny_model(torch.float32, **changes)
    model.save_pretrained(tmp_path / "new" / "folder")
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    again = Retro.from_pretrained(tmp_path / "new" / "folder")
    assert again.config == model.config and not again.training
    x, neighbours = torch.randint(50, (2, 14)), random_neighbours(2, 3)
    assert torch.equal(again(x, neighbours), model(x, neighbours))
    again(x, neighbours).sum().backward()  # nothing is frozen
    half = Retro.from_pretrained(tmp_path / "new" / "folder", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_what_takes_a_name_is_on_the_disk(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, int]] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda file: done.append(("sync", os.fstat(file).st_ino)) or sync(file))
    monkeypatch.setattr(
        "os.replace", lambda old, new: done.append(("name", os.stat(old).st_ino)) or replace(old, new)
    )
    tiny_model().save_pretrained(tmp_path)
    files = [(tmp_path / name).stat().st_ino for name in ("model.safetensors", "config.json")]
    assert done == [("sync", files[0]), ("sync", files[1]), ("name", files[0]), ("name", files[1])]


def test_what_does_not_fit(seed: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no config\.json"):
        Retro.from_pretrained(tmp_path)
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def refused(match: str, **changes: object) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(InputError, match=match):
            Retro.from_pretrained(tmp_path)

    refused("does not fit", ffn_dim=33)
    refused("lacks", cca_layers=[1, 2])
    refused("unknown fields", surprise=1)
    refused("at least 1", dim=0)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        Retro.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match="damaged"):
        Retro.from_pretrained(tmp_path)
    if os.geteuid() != 0:  # root reads everything
        (tmp_path / "model.safetensors").chmod(0)
        with pytest.raises(PermissionError):
            Retro.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match="model"):
        Retro.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rmdir()
    with pytest.raises(InputError, match="holds no model"):
        Retro.from_pretrained(tmp_path)


def test_other_weights_than_were_saved_are_refused(seed: int, tmp_path: Path) -> None:
    """One bit is enough: the model would compute something else, and nothing would tell."""
    model, path = tiny_model(), tmp_path / "model.safetensors"
    model.save_pretrained(tmp_path)
    content = bytearray(path.read_bytes())
    for _ in range(9):
        model.save_pretrained(tmp_path)
        assert path.read_bytes() == content  # byte for byte the same, for whoever compares files
    for place in (-3, len(content) // 2):
        content[place] ^= 4
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{path} is damaged: its weights are not those .*Copy it again"):
            Retro.from_pretrained(tmp_path)
        content[place] ^= 4
    save_file({name: value + 1 for name, value in load_file(path).items()}, path)
    Retro.from_pretrained(tmp_path)  # written by something else, which keeps no checksum


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_who_may_read_the_settings_may_read_the_weights(seed: int, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        tiny_model().save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask}


def test_a_failed_save_leaves_the_old_model(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model().save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full_disk(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        tiny_model().save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_what_could_not_be_read_again_is_not_written(seed: int, tmp_path: Path) -> None:
    normed = tiny_model()
    torch.nn.utils.parametrizations.weight_norm(normed.layers[1].cca.k_proj)
    tied = tiny_model(tie_embeddings=False)
    tied.readout.weight = tied.embedding.weight
    quantised = tiny_model()
    quantise(quantised.layers[1].cca.k_proj)
    for model, match in (
        (quantised, r"layers\.1\.cca\.k_proj\.weight is quantised \(Quantised\)"),
        (normed, r"has layers\.1\.cca\.k_proj\.parametrizations\.weight\.original0, .* Merge or remove"),
        (tied, r"embedding\.weight and readout\.weight are one tensor, .*\(tie_embeddings"),
    ):
        with pytest.raises(InputError, match=match):
            model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    torch.nn.utils.parametrize.remove_parametrizations(normed.layers[1].cca.k_proj, "weight")
    normed.save_pretrained(tmp_path)

    class Wider(Retro):
        def __init__(self, name: str) -> None:
            super().__init__(TINY)
            self.head = torch.nn.Linear(TINY.dim, len(name))

    Wider("a subclass, which reads its own").save_pretrained(tmp_path)


def test_weights_that_are_not_whole_replace_nothing(seed: int, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    away, sharded, pieces = (tiny_model(torch.float32) for _ in range(3))
    offload(away)
    pieces.norm.weight = torch.nn.Parameter(pieces.norm.weight[:7])  # as FSDP1 leaves it between calls
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
        for model, match in (
            (away, "weight is on the meta device, .* remove_hook_from_module"),
            (sharded, "weight is sharded, .* get_model_state_dict"),
            (pieces, r"norm\.weight is \[7\], .* says \[24\], .*summon_full_params"),
        ):
            with pytest.raises(InputError, match=match):
                model.save_pretrained(tmp_path)
    finally:
        dist.destroy_process_group()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_configuration_and_neighbours_are_safe_to_load(seed: int, tmp_path: Path) -> None:
    """As in a checkpoint of a training framework, which torch.load reads with weights_only=True."""
    given = {"config": TINY, "neighbours": random_neighbours(2, 3)}
    torch.save(given, tmp_path / "checkpoint.pt")
    script = (
        "import sys, torch; from retro_kernels import Retro, NeighbourBatch; Retro, NeighbourBatch; "
        "print(torch.load(sys.argv[1], weights_only=True)['config'])"
    )
    read = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "checkpoint.pt"], capture_output=True, text=True
    )
    assert read.stdout == f"{TINY}\n", read.stderr
