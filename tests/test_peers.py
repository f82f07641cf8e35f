"""The benchmark's opponents compute what the library's definition does: outputs and gradients, in float64."""

from __future__ import annotations

import warnings

import cases
import peers
import pytest
import torch
from cases import Case, Shape

from retro_kernels.ops import block_attention, chunked_cross_attention

SHAPE = Shape(batch=2, tokens=2 * 16 + 16 // 2, heads=2, head_dim=8, neighbours=2, chunk=16, neighbour_len=32)
CASES = [Case(SHAPE, p, lengths) for p in ("none", "bias", "relative") for lengths in (False, True)]
EAGER = [
    *(p for p in peers.PEERS if p.why_not(CASES[0], "cpu", False) is None and "compiled" not in p.name),
    *peers.uncompiled_flex(),
]
"""Compiled is no other function, which `peers.same` sees to before it is timed."""


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("peer", EAGER, ids=lambda p: p.name)
def test_peer_equals_definition(peer: peers.Peer, case: Case, seed: int) -> None:
    grad = peer.why_not(case, "cpu", True) is None
    t = cases.tensors(case, torch.device("cpu"), torch.float64, grad)
    expected = chunked_cross_attention(t.query, t.key, t.value, **t.arguments(), backend="reference")
    blocks = peers.cut(t)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FlexAttention says that it is slow without compilation
        out = peers.uncut(peer.build(case, blocks)(blocks), t)
    assert expected.norm() > 0
    torch.testing.assert_close(out, expected, rtol=1e-7, atol=1e-7)
    if grad:
        wanted = torch.autograd.grad(expected, t.wanted(), t.grad_out)
        given = torch.autograd.grad(out, t.wanted(), t.grad_out)
        for ours, theirs in zip(wanted, given, strict=True):
            assert ours.norm() > 0
            torch.testing.assert_close(theirs, ours, rtol=1e-7, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("positions", ["bias", "relative"])
@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda p: p.name)
def test_peer_on_the_gpu(peer: peers.Peer, positions: cases.Positions, seed: int) -> None:
    case = Case(Shape(2, 512, 4, 64, 2), positions)
    if reason := peer.why_not(case, "cuda", True):
        pytest.skip(reason)
    t = cases.tensors(case, torch.device("cuda"), torch.bfloat16)
    plain = chunked_cross_attention(t.query, t.key, t.value, **t.arguments(), backend="reference")
    blocks = peers.leaf_blocks(t)
    out = peers.uncut(peer.build(case, blocks)(blocks), t)
    assert plain.norm() > 0 and (out - plain).norm() / plain.norm() < 2e-2
    wanted = torch.autograd.grad(plain, t.key, t.grad_out)[0]
    given = torch.autograd.grad(out, blocks.key, t.grad_out)[0].reshape(wanted.shape)
    assert (given - wanted).norm() / wanted.norm() < 2e-2


@pytest.mark.parametrize("positions", ["none", "bias", "relative"])
def test_model_functions_on_sdpa_equal_the_definition(positions: cases.Positions, seed: int) -> None:
    case = Case(SHAPE, positions, lengths=True)
    t = cases.tensors(case, torch.device("cpu"), torch.float64)
    t.lengths[0, 0] = 0  # a chunk with no neighbour at all
    expected = chunked_cross_attention(t.query, t.key, t.value, **t.arguments(), backend="reference")
    out = peers.sdpa_chunked_cross_attention(t.query, t.key, t.value, **t.arguments())
    torch.testing.assert_close(out, expected, rtol=1e-7, atol=1e-7)

    query = torch.randn(6, 16, 2, 8, dtype=torch.float64)
    key, value = (torch.randn(3, 1, 32, 2, 8, dtype=torch.float64) for _ in range(2))
    options = {"lengths": torch.tensor([[32], [5], [0]]), "key_repeat": 2, **t.tables}
    expected = block_attention(query, key, value, **options, backend="reference")
    torch.testing.assert_close(
        peers.sdpa_block_attention(query, key, value, **options), expected, rtol=1e-7, atol=1e-7
    )


def test_leaf_blocks_share_what_the_blocks_hold(seed: int) -> None:
    case = CASES[2]
    t = cases.tensors(case, torch.device("cpu"), torch.float64)
    b = peers.leaf_blocks(t)
    assert all(x.is_leaf and x.requires_grad for x in b.leaves) and len(b.leaves) == 4
    torch.testing.assert_close(b.key, peers.cut(t).key)
