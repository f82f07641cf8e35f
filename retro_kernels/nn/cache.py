"""What decoding keeps from one call to the next, so that a token costs a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .positions import causal_sinusoids

if TYPE_CHECKING:
    from .attention import SelfAttention


class SelfAttentionCache:
    """Keys and values of the tokens so far, in buffers that double when they are full; and projected distances."""

    def __init__(self) -> None:
        self.length = 0
        # [B, H, capacity, D]: a product of all sequences and heads reads them where they lie
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._relative: Tensor | None = None  # [H, capacity, D], distances capacity − 1 … 0

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Adds [B, H, T, D] and returns all that is held, [B, H, length, D]."""
        stop = self.length + key.shape[2]
        if self._keys is None or self._values is None or stop > self._keys.shape[2]:
            self._keys, self._values = (
                self._grown(old, new, stop) for old, new in ((self._keys, key), (self._values, value))
            )
        self._keys[:, :, self.length : stop] = key
        self._values[:, :, self.length : stop] = value
        self.length = stop
        return self._keys[:, :, :stop], self._values[:, :, :stop]

    def _grown(self, old: Tensor | None, new: Tensor, needed: int) -> Tensor:
        capacity = max(64, 1 << (needed - 1).bit_length())
        with torch.inference_mode(False):  # what begins in it may go on outside
            grown = new.new_empty(*new.shape[:2], capacity, new.shape[3])
        if old is not None:
            grown[:, :, : self.length] = old[:, :, : self.length]
        return grown

    def relative_keys(self, attention: SelfAttention) -> Tensor:
        """Keys of the distances length − 1 … 0, [H, length, D]; projected once for as long as they suffice."""
        if self._relative is None or self._relative.shape[1] < self.length:
            capacity = max(64, 1 << (self.length - 1).bit_length())
            sinusoids = causal_sinusoids(capacity, attention.dim, attention.content_bias)
            self._relative = attention.relative_keys(sinusoids)
        return self._relative[:, self._relative.shape[1] - self.length :]


@dataclass
class ChunkNeighbours:
    """A chunk's encoded neighbours as one CCA layer sees them: key, value [B, K, R, Hkv, D], lengths int [B, K].

    Where the layer attends to the states themselves, `key` is these, [B, K, R, encoder_dim], and `value` None.
    """

    key: Tensor
    value: Tensor | None
    lengths: Tensor | None


class DecodingCache:
    """State of `Retro.decode` and `RetroFitted.decode`. `length` tokens of `batch_size` sequences have been read.

    It belongs to the weights that it was filled with: throw it away when they change.
    """

    # no dataclass: FSDP makes those among a call's arguments anew, and what is written into the copy would be lost
    def __init__(self, batch_size: int, self_attention: list[SelfAttentionCache] | None = None) -> None:
        self.batch_size = batch_size
        self.length = 0
        self.self_attention = self_attention or []
        self.conditioning: Tensor | None = None
        """State that conditions the encoder, of the tokens since the last chunk boundary: [B, length % M, dim]."""
        self.neighbours: dict[int, ChunkNeighbours | None] = {}
        """Per CCA layer (1-based), the neighbours of the last whole chunk; None or absent: RETRO is off for it."""
        self.position_terms: dict[int, dict[str, Any]] = {}
        self.past: dict[str, Any] = {}
        """By the name of its argument, what a base from another library keeps its keys and values in."""
