"""What torch's FLOP counter counts of our ops, against products counted by hand and against the definition's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from retro_kernels import chunked_cross_attention
from retro_kernels.ops import use_backend
from retro_kernels.ops.cca import flops
from retro_kernels.ops.cca.absorbed import absorbed_cross_attention

B, H, D, K, R, M, E = 2, 3, 16, 2, 32, 16, 24
COLUMNS = M + R - 1


def counted(call: Any) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        call()
    return {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}


def tensors(
    tokens: int, relative: bool, learned: bool = True
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    chunks = tokens // M
    query = torch.randn(B, tokens, H, D, requires_grad=True)
    key, value = (torch.randn(B, chunks, K, R, H, D, requires_grad=True) for _ in "kv")
    table = {"rel_key": torch.randn(H, COLUMNS, D, requires_grad=learned)} if relative else {}
    return query, key, value, table


@pytest.mark.parametrize("tokens", [M, 3 * M, 3 * M + 5])
@pytest.mark.parametrize(("relative", "learned"), [(False, False), (True, False), (True, True)])
def test_cca(tokens: int, relative: bool, learned: bool, seed: int) -> None:
    query, key, value, table = tensors(tokens, relative, learned)
    rows = B * H * (tokens - M + 1)
    out: list[Tensor] = []
    found = counted(lambda: out.append(chunked_cross_attention(query, key, value, chunk_size=M, **table)))
    forward = rows * D * (4 * K * R + 2 * COLUMNS * relative)
    assert found == {"retro_kernels.cca_fwd": forward}
    with use_backend("reference"):  # which pads its last block
        definition = sum(
            counted(lambda: chunked_cross_attention(query, key, value, chunk_size=M, **table)).values()
        )
    assert forward <= definition == forward * (tokens // M * M) // (tokens - M + 1)
    found = counted(lambda: out[0].sum().backward())
    by_distance = (4 + 2 * learned) * COLUMNS * relative
    assert found == {"retro_kernels.cca_bwd": rows * D * (10 * K * R + by_distance)}


@pytest.mark.parametrize("relative", [False, True])
def test_absorbed(relative: bool, seed: int) -> None:
    tokens = 3 * M + 5
    query, _, _, table = tensors(tokens, relative)
    states = torch.randn(B, tokens // M, K, R, E, requires_grad=True)
    weights = [torch.randn(H * D, E, requires_grad=True) for _ in "kv"]
    rows = B * H * (tokens - M + 1)
    out: list[Tensor] = []
    found = counted(
        lambda: out.append(absorbed_cross_attention(query, states, *weights, chunk_size=M, **table))
    )
    each = 4 * D * E + 4 * K * R * E + 2 * D * COLUMNS * relative
    assert found == {"retro_kernels.cca_absorbed_fwd": rows * each}
    found = counted(lambda: out[0].sum().backward())
    each = 10 * D * E + 8 * K * R * E + 6 * D * COLUMNS * relative
    assert found == {"retro_kernels.cca_absorbed_bwd": rows * each}


def test_decoding() -> None:
    """The ops themselves run on a GPU only."""
    query, rows, table = (B, 1, H, D), (B, 1), (H, COLUMNS, D)
    key = (B, K, R, H, D)
    assert flops.decode(query, key, key, rows, None) == B * H * D * 4 * K * R
    assert flops.decode(query, key, key, rows, table) == B * H * D * (4 * K * R + 2 * COLUMNS)
    weight, states = (H * D, E), (B, K, R, E)
    each = 4 * D * E + 4 * K * R * E
    assert flops.absorbed_decode(query, states, weight, weight, rows, None) == B * H * each
    assert flops.absorbed_decode(query, states, weight, weight, rows, table) == B * H * (
        each + 2 * D * COLUMNS
    )


def test_a_module_and_its_training(seed: int) -> None:
    from retro_kernels import ChunkedCrossAttention

    cca = ChunkedCrossAttention(
        48, 3, encoder_dim=E, chunk_size=M, neighbour_len=R, projection="materialised"
    )
    x, states = torch.randn(B, 2 * M, 48), torch.randn(B, 2, K, R, E)
    found = counted(lambda: cca(x, states).sum().backward())
    assert {"retro_kernels.cca_fwd", "retro_kernels.cca_bwd", "aten.mm"} <= found.keys()
