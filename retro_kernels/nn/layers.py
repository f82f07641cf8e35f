"""What decoder and encoder share: normalisation, feed-forward network, initialisation; which weights are quantised."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RMSNorm = nn.RMSNorm
"""Root-mean-square normalisation with a gain, PyTorch's own."""


class TokenEmbedding(nn.Embedding):
    """A table of tokens that is the readout too: ids int [...] → [..., dim], and with `readout=True` states [..., dim]
    → logits.

    Both are calls of the module, since weights that are kept elsewhere (sharded or offloaded) are there during calls.
    """

    def reset_parameters(self) -> None:
        """As `nn.Embedding`; nothing on the meta device, where torch imports its compiler to draw no numbers."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor, readout: bool = False) -> Tensor:
        return F.linear(x, self.weight) if readout else super().forward(x)


class FeedForward(nn.Module):
    """Two matrices with a GELU between, `x` [..., dim] → [..., dim]: the paper's counts leave no room for a gate."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down_proj(F.gelu(self.up_proj(x))))


@torch.no_grad()
def initialise(module: nn.Module, residual_layers: int, width: int) -> None:
    """GPT-2's initialisation (Radford et al. 2019; the RETRO paper states none), at any width.

    Matrices and embeddings from N(0, σ²), those that write to the residual stream divided by √(2 · residual_layers);
    gains 1; biases, u and v 0. σ = √(2 / (5 · width)) (Nguyen and Salazar 2019), which is GPT-2's 0.02 at a width of
    1,000; narrow models learn several times slower from 0.02 itself.
    """
    std = (2 / (5 * width)) ** 0.5
    for name, parameter in module.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif name.endswith("bias"):
            parameter.zero_()
        elif not parameter.is_meta:  # see `TokenEmbedding`
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            parameter.normal_(std=std / (2 * residual_layers) ** 0.5 if writes else std)


def is_quantised(weight: Tensor | None) -> bool:
    """Whether it is a tensor made of others, as torchao's are, with neither a place nor elements of its own."""
    return hasattr(weight, "__tensor_flatten__")
