"""Positions: sinusoids of a signed distance (Transformer-XL) and rotary angles.

A relative position costs one more matrix product: (q + v)·W_R φ(d), with φ the sinusoid of the distance d and W_R
(`rel_proj`) a matrix of every attention layer (Dai et al. 2019; RETRO's parameter counts fit no other reading).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def sinusoid(distances: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """φ(d) = concat(sin(d·f), cos(d·f)) with f_j = 10000^(−2j/dim): `distances` [G] → [G, dim].

    Sine and cosine both, because the cosine alone cannot tell d from −d. An odd `dim` has one sine more.
    """
    steps = torch.arange(0, dim, 2, device=distances.device, dtype=torch.float64)
    angles = distances.to(torch.float64)[:, None] * 10000.0 ** (-steps / dim)
    table = torch.cat((angles.sin(), angles.cos()), -1)[:, :dim]
    return table.to(dtype or torch.get_default_dtype())


def causal_sinusoids(count: int, dim: int, like: Tensor) -> Tensor:
    """φ of the distances count − 1 … 0 on the device of `like`: [count, dim], float32 or float64 where that is."""
    distances = torch.arange(count - 1, -1, -1, device=like.device)
    return sinusoid(distances, dim, torch.promote_types(like.dtype, torch.float32))


class DistanceTable(nn.Module):
    """φ of the distances `first` … `last`, ascending, as a constant [last − first + 1, dim] that is not saved."""

    table: Tensor

    def __init__(self, first: int, last: int, dim: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.first, self.last, self.dim = first, last, dim
        self.register_buffer(
            "table", self._compute(torch.device(device) if device else None), persistent=False
        )

    def _compute(self, device: torch.device | None) -> Tensor:
        with torch.inference_mode(False):  # it may serve training later
            table = torch.empty(self.last + 1 - self.first, self.dim, dtype=torch.float32, device=device)
            if table.is_meta:  # where torch imports its compiler to compute nothing
                return table
            return sinusoid(torch.arange(self.first, self.last + 1, device=device), self.dim, torch.float32)

    def reset_parameters(self, device: torch.device | str | None = None) -> None:
        """Computes the table again, on its device or another one."""
        self.table = self._compute(self.table.device if device is None else torch.device(device))

    def _apply(self, *args: Any, **kwargs: Any) -> DistanceTable:
        # no checkpoint brings it back after `to_empty`, and what a cast rounds is not what this is made of
        try:
            super()._apply(*args, **kwargs)
        except NotImplementedError:  # weights were assigned, and this alone is on the meta device still
            self.table = self._compute(torch.device("cpu"))
            super()._apply(*args, **kwargs)
        self.reset_parameters()
        return self

    def forward(self, like: Tensor) -> Tensor:
        """The table in the dtype of `like`: [G, dim]."""
        if like.dtype == torch.float64:  # which the table, kept in float32, has not the digits for
            distances = torch.arange(self.first, self.last + 1, device=like.device)
            return sinusoid(distances, self.dim, like.dtype)
        # after load_state_dict(assign=True), which brings parameters only
        if self.table.is_meta and not like.is_meta:
            self.table = self._compute(like.device)
        return self.table.to(like.dtype)

    def extra_repr(self) -> str:
        return f"{self.first}…{self.last}, dim={self.dim}"


def rotate(x: Tensor, first: int = 0) -> Tensor:
    """Rotary positions (Su et al. 2021): `x` [B, T, H, D] stands at tokens first … first + T − 1; halves are paired."""
    half, wide = x.shape[-1] // 2, torch.promote_types(x.dtype, torch.float32)
    frequencies = 10000.0 ** (-torch.arange(half, device=x.device, dtype=wide) / half)
    angles = torch.arange(first, first + x.shape[1], device=x.device, dtype=wide)[:, None] * frequencies
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # [T, 1, D / 2]
    low, high = x.to(wide).chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1).to(x.dtype)
