"""Definitions written from the paper as loops over tokens, in float64, and a small model to try them on."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from retro_kernels.config import RetroConfig
from retro_kernels.nn import Retro
from retro_kernels.ops import NeighbourBatch

FREE_SIZES_WITH_GRADIENTS = torch.torch_version.TorchVersion(torch.__version__) >= (2, 10)
"""torch.export of 2.9 loses track of sizes that are free where something requires a gradient."""

TINY = RetroConfig(
    vocab_size=50,
    dim=24,
    num_layers=4,
    num_heads=2,
    head_dim=8,
    ffn_dim=32,
    cca_layers=(2, 4),
    encoder_dim=16,
    encoder_layers=2,
    encoder_heads=2,
    encoder_head_dim=8,
    encoder_ffn_dim=32,
    chunk_size=4,
    neighbour_len=8,
)


def randomise(module: nn.Module, std: float = 0.4) -> nn.Module:
    """Every parameter drawn anew, biases included: a zero would hide what it is multiplied with."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module


def tiny_model(dtype: torch.dtype = torch.float64, **changes: object) -> Retro:
    return randomise(Retro(TINY.replace(**changes))).to(dtype).eval()


def offload(module: nn.Module) -> None:
    """Each module's own weights are there while its forward runs, as accelerate's hooks have it."""
    for part in module.modules():
        own = {name: p for name, p in part.named_parameters(recurse=False)}
        away = {name: nn.Parameter(p.to("meta"), requires_grad=False) for name, p in own.items()}

        def forward(*given: Any, part=part, own=own, away=away, inner=part.forward, **options: Any) -> Any:
            for value in (*given, *options.values()):
                if isinstance(value, nn.Module):  # brought to the device of this part, as tensors are
                    value.to("cpu")
            part._parameters.update(own)
            try:
                return inner(*given, **options)
            finally:
                part._parameters.update(away)

        part.forward = forward
        part._parameters.update(away)


def random_neighbours(
    batch: int, chunks: int, count: int = 3, config: RetroConfig = TINY, full: bool = False
) -> NeighbourBatch:
    tokens = torch.randint(config.vocab_size, (batch, chunks, count, config.neighbour_len))
    low = config.neighbour_len if full else 0
    return NeighbourBatch(
        tokens, torch.randint(low, config.neighbour_len + 1, tokens.shape[:3], dtype=torch.int32)
    )


def phi(distance: int, dim: int) -> Tensor:
    """Sinusoid of one signed distance."""
    angles = [distance * 10000 ** (-2 * j / dim) for j in range(dim // 2)]
    return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)


def attend(module: nn.Module, x: Tensor, keys: Tensor, distances: list[int]) -> Tensor:
    """One query token x [dim] against `keys` [n, width] at `distances`, through all the projections of `module`."""
    heads, head_dim, dim = module.num_heads, module.head_dim, x.shape[0]
    q = module.q_proj(x).view(heads, head_dim)
    k, v = (p(keys).view(len(keys), -1, head_dim) for p in (module.k_proj, module.v_proj))
    parts = []
    for h in range(heads):
        shared = h // (heads // k.shape[1])
        logits = []
        for n, distance in enumerate(distances):
            if hasattr(module, "rel_proj"):
                r = module.rel_proj(phi(distance, dim)).view(heads, head_dim)[h]
                logit = (q[h] + module.content_bias[h]) @ k[n, shared] + (q[h] + module.position_bias[h]) @ r
                logits.append(logit / math.sqrt(head_dim))
            else:
                logits.append(q[h] @ k[n, shared] / math.sqrt(head_dim))
                if hasattr(module, "rel_bias"):
                    logits[-1] = (
                        logits[-1] + module.rel_bias[h, distance + module.neighbour_len - module.chunk_size]
                    )
        parts.append(torch.softmax(torch.stack(logits), 0) @ v[:, shared])
    return module.o_proj(torch.cat(parts))


def cca_by_hand(module: nn.Module, x: Tensor, neighbours: Tensor, lengths: Tensor) -> Tensor:
    """Section 2.4, 1-based: the attending chunk of C_u holds positions uM … uM + M − 1; its i-th token is
    i − i' + M − 1 away from token i' of each neighbour (eq. 6, where "l" is the chunk length)."""
    size, out = module.chunk_size, torch.zeros_like(x)
    for b in range(x.shape[0]):
        for u in range(1, x.shape[1] // size + 1):
            for i in range(1, size + 1):
                position = u * size + i - 1
                if position > x.shape[1]:
                    continue
                keys, distances = [], []
                for j in range(neighbours.shape[2]):
                    for i2 in range(1, int(lengths[b, u - 1, j]) + 1):
                        keys.append(neighbours[b, u - 1, j, i2 - 1])
                        distances.append(i - i2 + size - 1)
                if keys:
                    out[b, position - 1] = attend(module, x[b, position - 1], torch.stack(keys), distances)
    return out
