"""One new token a sequence: attention to stored keys and values of its chunk's neighbours, or to the encoder states.

"absorbed" reads the states once for all heads (and the same ones in every layer), "materialised" the keys and values of
this layer; "SDPA" is the latter as one would write it without a kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import peers
import pytest
import roofline
import timing
import torch
import torch.nn.functional as F
from cases import DEVICE, DTYPE, ON_GPU, TINY
from torch import Tensor

from retro_kernels.ops import absorbed_decode, chunked_cross_attention_decode

SIZES = {name: (heads, head_dim) for name, heads, head_dim in roofline.MODELS}
NEIGHBOUR_LEN, CHUNK = 128, 64
if ON_GPU:
    RUNS = [(model, batch, k) for model in ("172M", "7.5B") for batch in (64, 1) for k in (2, 10, 40)]
else:
    RUNS = [("172M", 2, 2)] if TINY else [("172M", 4, 2), ("172M", 4, 10)]


def _calls(model: str, batch: int, neighbours: int) -> dict[str, Callable[[], Tensor]]:
    heads, head_dim = SIZES[model]
    inner = heads * head_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=DTYPE)

    query, states = (
        normal(batch, 1, heads, head_dim),
        normal(batch, neighbours, NEIGHBOUR_LEN, roofline.ENCODER_DIM),
    )
    weights = [normal(inner, roofline.ENCODER_DIM) * roofline.ENCODER_DIM**-0.5 for _ in range(2)]
    key, value = (F.linear(states, weight).unflatten(-1, (heads, head_dim)) for weight in weights)
    row = 17  # the same in all sequences, so that SDPA can take a slice of the tables
    rows = torch.full((batch, 1), row, device=DEVICE)
    tables = {
        "rel_key": normal(heads, CHUNK + NEIGHBOUR_LEN - 1, head_dim),
        "content_bias": normal(heads, head_dim),
        "position_bias": normal(heads, head_dim),
    }
    sliced = {**tables, "rel_key": tables["rel_key"][:, row : row + NEIGHBOUR_LEN]}
    return {
        "absorbed": lambda: absorbed_decode(query, states, *weights, rows=rows, **tables),
        "materialised": lambda: chunked_cross_attention_decode(query, key, value, rows=rows, **tables),
        "SDPA": lambda: peers.sdpa_block_attention(query, key, value, **sliced),
    }


@functools.lru_cache(1)
def _agree(model: str, batch: int, neighbours: int) -> None:
    """All cases compute the same."""
    calls = _calls(model, batch, neighbours)
    expected = calls["materialised"]()
    for case, call in calls.items():
        peers.same(call(), expected, case)


@pytest.mark.parametrize("case", ["absorbed", "materialised", "SDPA"])
@pytest.mark.parametrize(("model", "batch", "neighbours"), RUNS)
@torch.no_grad()
def test_decode(
    benchmark: Any, model: str, batch: int, neighbours: int, case: str, ceilings: roofline.Ceilings
) -> None:
    benchmark.group = f"decode, {model}, batch {batch}, K {neighbours}"
    _agree(model, batch, neighbours)
    keys = neighbours * NEIGHBOUR_LEN
    costs = roofline.decode(batch, *SIZES[model], keys, roofline.ENCODER_DIM, DTYPE.itemsize)
    cost = costs["absorbed" if case == "absorbed" else "materialised"]
    calls = [_calls(model, batch, neighbours)[case] for _ in range(timing.sets_to_rotate(int(cost.bytes)))]
    floor = ceilings.floor(cost)
    # the larger batch is the goals'; one sequence is bound by launches
    what = "decode" if batch > 1 else "decode, one sequence"
    benchmark.extra_info.update(case=case, what=what, model=model, batch=batch, K=neighbours, floor_s=floor)
    median = timing.measure(benchmark, calls)
    benchmark.extra_info["share_of_floor"] = round(floor / median, 4)
