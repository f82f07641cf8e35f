"""The cost model that chooses between projected keys and values and absorbed ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from retro_kernels.ops.cca import absorbed, projection
from retro_kernels.ops.cca.projection import choose_projection, projection_costs

PAPER = {"172M": (16, 64), "425M": (12, 128), "1.5B": (16, 128), "7.5B": (32, 128)}  # heads and their size


def test_operations_are_those_that_run(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """The model's operations of the absorbed way against what PyTorch counts while it runs."""
    B, N, H, D, M, K, R, E = 1, 32, 4, 16, 16, 2, 16, 24
    query, states = torch.randn(B, N, H, D), torch.randn(B, N // M, K, R, E)
    weights = torch.randn(H * D, E), torch.randn(H * D, E)
    args = (query, states, *weights, None, None, None, None, None, None, M, 0.25, 0.0, False)
    with FlopCounterMode(display=False) as forward:
        out, probs, mixed = absorbed._forward(*args, True)
    with FlopCounterMode(display=False) as backward:
        absorbed._backward(torch.randn_like(out), probs, mixed, *args, [True] * 8)

    seen: list[float] = []
    monkeypatch.setattr(
        projection, "_on_cpu", lambda kernels, cost: seen.append(sum(k.flops for k in kernels)) or 0.0
    )
    sizes = {
        "head_dim": D,
        "encoder_dim": E,
        "num_heads": H,
        "chunk_size": M,
        "neighbour_len": R,
        "num_neighbours": K,
    }
    projection_costs(**sizes, training=False, device="cpu")
    projection_costs(**sizes, training=True, device="cpu")
    assert seen[1] * (N // M) == forward.get_total_flops()
    assert seen[3] * (N // M) == forward.get_total_flops() + backward.get_total_flops()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("training", [False, True])
def test_gains_with_head_size_and_neighbours(device: str, training: bool) -> None:
    def gain(**sizes: int) -> float:
        costs = projection_costs(
            **{"head_dim": 128, "encoder_dim": 896, "num_heads": 16, **sizes},
            training=training,
            device=device,
        )
        return costs["materialised"] / costs["absorbed"]

    assert gain(head_dim=64) < gain(head_dim=128) < gain(head_dim=256)
    assert gain(num_neighbours=2) < gain(num_neighbours=10) < gain(num_neighbours=40)
    assert gain(num_kv_heads=4) < gain(num_kv_heads=16)
    assert gain(encoder_dim=1792) < gain(encoder_dim=448)


@pytest.mark.parametrize(
    ("model", "neighbours", "chosen"),
    [
        ("172M", 2, "materialised"),
        ("172M", 40, "materialised"),
        ("425M", 2, "materialised"),
        ("425M", 10, "absorbed"),
        ("7.5B", 2, "materialised"),
        ("7.5B", 10, "absorbed"),
        ("7.5B", 40, "absorbed"),
    ],
)
def test_choices_in_training_on_a_gpu(model: str, neighbours: int, chosen: str) -> None:
    heads, head_dim = PAPER[model]
    assert chosen == choose_projection(
        head_dim=head_dim,
        encoder_dim=896,
        num_heads=heads,
        num_neighbours=neighbours,
        training=True,
        device="cuda",
    )


def test_choices_in_decoding() -> None:
    sizes = {"encoder_dim": 896, "num_neighbours": 10, "decoding": True}
    for (
        heads,
        head_dim,
    ) in PAPER.values():  # a large batch shares the weights' bytes; a single sequence pays them alone
        assert (
            choose_projection(head_dim=head_dim, num_heads=heads, **sizes, batch=64, device="cuda")
            == "absorbed"
        )
        assert (
            choose_projection(head_dim=head_dim, num_heads=heads, **sizes, batch=1, device="cuda")
            == "materialised"
        )


def measured_on_a_gpu() -> list[dict[str, Any]]:
    return json.loads((Path(__file__).parents[2] / "bench" / "results" / "gpu.json").read_text())["results"]


def test_training_is_predicted_as_it_was_measured() -> None:
    """Within a tenth of the times of a GPU; and what is chosen is not the slower way by more than 3 %."""
    groups: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in measured_on_a_gpu():
        extra = row["extra"]
        if extra.get("what") == "absorbed training" and row["case"] in ("absorbed", "materialised"):
            of = tuple(extra[name] for name in ("H", "D", "K", "pass", "B", "N", "E"))
            groups.setdefault(of, {})[row["case"]] = row["median_s"]
    assert len(groups) >= 16
    for (heads, head_dim, neighbours, which, batch, tokens, width), measured in groups.items():
        sizes = {
            "head_dim": head_dim,
            "encoder_dim": width,
            "num_heads": heads,
            "num_neighbours": neighbours,
            "training": which != "forward",
        }
        costs = projection_costs(**sizes, device="cuda")
        for way, seconds in measured.items():
            predicted = costs[way] * batch * (tokens // 64)
            assert seconds / 1.1 < predicted < seconds * 1.1, (sizes, way, predicted, seconds)
        if len(measured) == 2:
            chosen = choose_projection(**sizes, device="cuda")
            assert measured[chosen] <= 1.03 * min(measured.values()), sizes


def test_decoding_is_predicted_as_it_was_measured() -> None:
    """Within a tenth of the times of a GPU; and what is chosen is not the slower way by more than 3 %, with the
    projections of a chunk's keys and values spread over its tokens."""
    results = measured_on_a_gpu()
    groups: dict[tuple[str, int, int], dict[str, float]] = {}
    for row in results:
        extra = row["extra"]
        if str(extra.get("what")).startswith("decode") and row["case"] != "SDPA":
            groups.setdefault((extra["model"], extra["batch"], extra["K"]), {})[row["case"]] = row["median_s"]
    assert len(groups) == 12
    for (model, batch, neighbours), measured in groups.items():
        heads, head_dim = PAPER[model]
        sizes = {"head_dim": head_dim, "encoder_dim": 896, "num_heads": heads, "num_neighbours": neighbours}
        options = {"decoding": True, "batch": batch, "device": "cuda"}
        costs = {way: seconds * batch for way, seconds in projection_costs(**sizes, **options).items()}
        project = 4 * neighbours * 128 * 896 * heads * head_dim / 64 * batch / projection._GPU_FLOPS
        measured["materialised"] += project
        for way, seconds in costs.items():
            bound = 1.1 if batch > 1 else 1.3  # one sequence is bound by launches, whose time varies
            assert measured[way] / bound < seconds < measured[way] * bound, (model, batch, neighbours, way)
        chosen = choose_projection(**sizes, **options)
        assert measured[chosen] <= 1.03 * min(measured.values()), (model, batch, neighbours)
