"""The model: one training step and one generated token, on our operations and on the formulations they stand for.

"SDPA" is the same model with every block attention replaced by scaled_dot_product_attention and a materialised mask,
"einsum" by the definition; "RETRO off" skips encoder and cross-attention: what retrieval costs at all. Besides, the
decoder's self-attention alone, with its relative positions. On a CPU all take turns: its mood changes by more than
they differ.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import peers
import pytest
import timing
import torch
import torch.nn.functional as F
from cases import DEVICE, ON_GPU, TINY
from torch import Tensor

from retro_kernels.config import preset
from retro_kernels.nn import ChunkedCrossAttention, Retro
from retro_kernels.nn import attention as layers
from retro_kernels.ops import NeighbourBatch, use_backend

NAME = "retro_172m" if ON_GPU else "retro_tiny" if TINY else "retro_small"
BATCH, TOKENS, NEIGHBOURS = (8, 2048, 2) if ON_GPU else (1, 128, 2) if TINY else (4, 512, 2)
PAST = 512 if not TINY else 130
FORMULATIONS = ("retro_kernels", "SDPA", "einsum")


@contextlib.contextmanager
def formulation(name: str) -> Iterator[None]:
    if name == "SDPA":
        with (
            mock.patch(
                "retro_kernels.nn.attention.chunked_cross_attention", peers.sdpa_chunked_cross_attention
            ),
            mock.patch("retro_kernels.nn.attention.block_attention", peers.sdpa_block_attention),
            mock.patch(
                "retro_kernels.nn.attention._FEW_ROWS", 0
            ),  # decoding goes through block_attention as well
            mock.patch.object(ChunkedCrossAttention, "absorbs", lambda *args, **options: False),
        ):
            yield
    else:
        with use_backend("reference" if name == "einsum" else None):
            yield


def model(**changes: Any) -> Retro:
    torch.manual_seed(0)
    return Retro(preset(NAME, **changes)).to(DEVICE)


def data(config: Any, batch: int, tokens: int) -> tuple[Tensor, NeighbourBatch]:
    text = torch.randint(1, config.vocab_size, (batch, tokens + 1), device=DEVICE)
    chunks = tokens // config.chunk_size
    shape = (batch, chunks, NEIGHBOURS, config.neighbour_len)
    found = torch.randint(1, config.vocab_size, shape, device=DEVICE)
    lengths = torch.full(shape[:3], config.neighbour_len, dtype=torch.int32, device=DEVICE)
    return text, NeighbourBatch(found, lengths)


def training_step(
    net: Retro, optimiser: torch.optim.Optimizer, text: Tensor, found: NeighbourBatch | None
) -> None:
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_GPU):
        logits = net(text[:, :-1], found)
        loss = F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()


STEPS = (*FORMULATIONS, "RETRO off")
TOKEN = ("retro_kernels", "SDPA", "RETRO off", "no cache", "no cache, SDPA")


def _step(name: str) -> Callable[[], None]:
    net = model()
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)  # as train does
    text, found = data(net.config, BATCH, TOKENS)
    neighbours = None if name == "RETRO off" else found

    def call() -> None:
        with formulation(name):
            training_step(net, optimiser, text, neighbours)

    return call


@functools.cache
def _agree() -> None:
    """All formulations compute the same model."""
    net = model().eval()
    text, found = data(net.config, 1, 2 * net.config.chunk_size)
    with torch.no_grad():
        outputs = {}
        for name in FORMULATIONS:
            with formulation(name):
                outputs[name] = net(text, found)
        for name, out in outputs.items():
            peers.same(out, outputs["einsum"], name)
        off = net(text, None)
    assert not torch.allclose(off, outputs["einsum"], rtol=1e-3), "neighbours change nothing here"


@functools.cache
def _steps_in_turn() -> dict[str, list[float]]:
    return timing.in_turn({name: _step(name) for name in STEPS})


@pytest.mark.benchmark(group=f"training step, {NAME}, B {BATCH}, N {TOKENS}, K {NEIGHBOURS}")
@pytest.mark.parametrize("name", STEPS)
def test_training_step(benchmark: Any, name: str) -> None:
    if ON_GPU:
        step = _step(name)
        median = timing.measure(benchmark, step, rounds=20, wall=True, case=name, what="step")
        torch.cuda.reset_peak_memory_stats()
        step()
        shown = {"peak GiB": torch.cuda.max_memory_allocated() / 2**30}
    else:
        _agree()
        samples, shown = _steps_in_turn()[name], {}
        median = statistics.median(samples)
        timing.record(benchmark, samples, case=name, what="step")
    benchmark.extra_info["shown"] = {"tokens/s": BATCH * TOKENS / median, **shown}


def _token(name: str) -> Callable[[], Tensor]:
    net = model().eval()
    text, found = data(net.config, 1, PAST)
    way = "SDPA" if name.endswith("SDPA") else "retro_kernels"

    def under(call: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad(), formulation(way), torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_GPU):
            return call()

    if name.startswith("no cache"):
        return lambda: under(lambda: net(text[:, :-1], found)[:, -1])
    cache = net.new_cache(1)
    under(lambda: net.decode(text[:, :-1], cache, None if name == "RETRO off" else found))
    return lambda: under(lambda: net.decode(text[:, -1:], cache))


@functools.cache
def _tokens_in_turn(cached: bool) -> dict[str, list[float]]:
    names = [name for name in TOKEN if name.startswith("no cache") != cached]
    return timing.in_turn({name: _token(name) for name in names}, most=40 if cached else 5)


@pytest.mark.benchmark(group=f"one generated token after {PAST}, {NAME}, B 1, K {NEIGHBOURS}")
@pytest.mark.parametrize("name", TOKEN)
def test_generated_token(benchmark: Any, name: str) -> None:
    """Between two chunk boundaries. Without a cache (what other implementations do) everything is computed again."""
    cached = not name.startswith("no cache")
    if ON_GPU:  # 40 rounds and the warm-up stay within a chunk of 64
        rounds = 40 if cached else 5
        # weights stay cast from token to token, as in generation
        with torch.autocast(DEVICE.type, enabled=False):
            timing.measure(benchmark, _token(name), rounds=rounds, wall=True, case=name, what="token")
    else:
        timing.record(benchmark, _tokens_in_turn(cached)[name], case=name, what="token")


SELF = (8, 16, 2048, 64) if ON_GPU else (1, 2, 128, 32) if TINY else (4, 8, 512, 32)
SELF_DTYPE = torch.bfloat16 if ON_GPU else torch.float32
PATHS = ("block attention", "PyTorch", "SDPA without positions")


def _self_attention(name: str, backward: bool) -> Callable[[], Any]:
    """One call of [B, H, N, D], causal: by the kernels of block attention, or by passes over blocks of logits."""
    torch.manual_seed(0)
    batch, heads, tokens, size = SELF
    made: dict[str, Any] = {"device": DEVICE, "dtype": SELF_DTYPE, "requires_grad": backward}
    q, k, v = (torch.randn(batch, tokens, heads, size, **made) for _ in range(3))
    rel, biases = torch.randn(heads, tokens, size, **made), torch.randn(2, heads, size, **made)
    grad = torch.randn(batch, heads, tokens, size, device=DEVICE, dtype=SELF_DTYPE)
    wanted = (q, k, v) if name == PATHS[2] else (q, k, v, rel, biases)

    def call() -> Any:
        args = [x.transpose(1, 2) for x in (q, k, v)]
        if name == PATHS[2]:
            out = F.scaled_dot_product_attention(*args, is_causal=True)
        elif name == PATHS[0]:
            out = layers._by_block_attention(*args, rel, *biases)
        else:
            with mock.patch.object(layers, "_kernels_pay", lambda q: False):
                out = layers.relative_attention(*args, rel, *biases)
        return torch.autograd.grad(out, wanted, grad) if backward else out

    return call


@functools.cache
def _self_attention_in_turn(backward: bool) -> dict[str, list[float]]:
    return timing.in_turn({name: _self_attention(name, backward) for name in PATHS}, most=30)


@pytest.mark.parametrize("what", ["forward", "forward+backward"])
@pytest.mark.parametrize("name", PATHS)
def test_self_attention(benchmark: Any, name: str, what: str) -> None:
    backward = what != "forward"
    batch, heads, tokens, size = SELF
    benchmark.group = f"the decoder's self-attention, {what}, B {batch}, H {heads}, N {tokens}, D {size}"
    if name == PATHS[0]:
        both = [_self_attention(path, backward=False)() for path in PATHS[:2]]
        peers.same(*both, name)
    if ON_GPU:
        timing.measure(benchmark, _self_attention(name, backward), case=name, what=what)
    else:
        timing.record(benchmark, _self_attention_in_turn(backward)[name], case=name, what=what)
