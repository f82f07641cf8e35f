"""The model: one training step and one generated token, on our operations and on the formulations they stand for.

"SDPA" is the same model with every block attention replaced by scaled_dot_product_attention and a materialised mask,
"einsum" by the definition; "RETRO off" skips encoder and cross-attention: what retrieval costs at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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


@pytest.mark.benchmark(group=f"training step, {NAME}, B {BATCH}, N {TOKENS}, K {NEIGHBOURS}")
@pytest.mark.parametrize("name", [*FORMULATIONS, "RETRO off"])
def test_training_step(benchmark: Any, name: str) -> None:
    net = model()
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=ON_GPU)
    text, found = data(net.config, BATCH, TOKENS)
    neighbours = None if name == "RETRO off" else found
    with formulation(name):
        median = timing.measure(
            benchmark,
            lambda: training_step(net, optimiser, text, neighbours),
            rounds=20 if ON_GPU else 3,
            wall=True,
            case=name,
            what="step",
        )
        benchmark.extra_info["shown"] = {"tokens/s": BATCH * TOKENS / median}
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
            training_step(net, optimiser, text, neighbours)
            benchmark.extra_info["shown"]["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30


@pytest.mark.benchmark(group=f"one generated token after {PAST}, {NAME}, B 1, K {NEIGHBOURS}")
@pytest.mark.parametrize("name", ["retro_kernels", "SDPA", "RETRO off", "no cache", "no cache, SDPA"])
@torch.no_grad()
def test_generated_token(benchmark: Any, name: str) -> None:
    """Between two chunk boundaries. Without a cache (what other implementations do) everything is computed again."""
    net = model().eval()
    text, found = data(net.config, 1, PAST)
    off = name == "RETRO off"
    with formulation("SDPA" if name.endswith("SDPA") else "retro_kernels"):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_GPU):
            if name.startswith("no cache"):

                def call() -> Tensor:
                    return net(text[:, :-1], found)[:, -1]
            else:
                cache = net.new_cache(1)
                net.decode(text[:, :-1], cache, None if off else found)

                def call() -> Tensor:
                    return net.decode(text[:, -1:], cache)

            # 40 rounds and the warm-up stay within a chunk of 64
            timing.measure(
                benchmark,
                call,
                rounds=40 if not name.startswith("no cache") else 5,
                wall=True,
                case=name,
                what="token",
            )
