"""What every decoder with retrieval does alike, ours or one of another library: neighbours checked and encoded, and
chunked cross-attention token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import InputError, RetroConfig
from .attention import ChunkedCrossAttention
from .cache import ChunkNeighbours, DecodingCache
from .encoder import NeighbourEncoder
from .layers import RMSNorm

if TYPE_CHECKING:
    from ..ops import NeighbourBatch


def cross_attention(config: RetroConfig, backend: str | None) -> tuple[RMSNorm, ChunkedCrossAttention]:
    """What a layer of P has more than others: a norm, and the chunked cross-attention behind it."""
    cca = ChunkedCrossAttention(
        config.dim,
        config.num_heads,
        head_dim=config.head_dim,
        encoder_dim=config.encoder_dim,
        chunk_size=config.chunk_size,
        neighbour_len=config.neighbour_len,
        position=config.cca_position,
        dropout=config.dropout,
        backend=backend,
    )
    return RMSNorm(config.dim, eps=config.norm_eps), cca


def kept_tokens(name: str, logits_to_keep: int) -> slice:
    """Of a sequence's tokens those whose logits are asked for, checked; 0: all."""
    if logits_to_keep < 0:
        raise InputError(
            f"{name}: logits_to_keep is {logits_to_keep}; it must be a number of last tokens, or 0 for all."
        )
    return slice(-logits_to_keep, None)


class Retrieving(nn.Module):
    """A decoder some of whose layers attend to encoded neighbours.

    `config` says which and how, `encoder` is None for a plain decoder, `gradient_checkpointing` (False) recomputes
    the encoder's layers in the backward pass.
    """

    config: RetroConfig
    encoder: NeighbourEncoder | None
    gradient_checkpointing = False

    def input_embedding(self) -> nn.Embedding:
        """The decoder's own, for an encoder that shares it."""
        raise NotImplementedError

    def fitting_neighbours(
        self, tokens: Tensor, neighbours: NeighbourBatch | None, chunks: int | None = None
    ) -> tuple[Tensor, Tensor | None] | None:
        """Tokens [B, chunks, K, R] and lengths, checked; None where there is nothing to attend to. `chunks`: None for
        the whole ones of `tokens`."""
        name, config = type(self).__name__, self.config
        _check_types(name, tokens, neighbours)
        if tokens.ndim != 2:
            raise InputError(f"{name}: tokens is {list(tokens.shape)}; it must be [B, N].")
        if neighbours is None:
            return None
        if self.encoder is None:
            raise InputError(
                f"{name}: neighbours are given, but this model is a plain decoder (cca_layers is empty)."
            )
        found, lengths = neighbours[0], neighbours[1]
        if chunks is None:
            chunks = tokens.shape[1] // config.chunk_size
        shape = list(found.shape)
        if (
            found.ndim != 4
            or shape[0] != tokens.shape[0]
            or shape[1] < chunks
            or shape[3] != config.neighbour_len
        ):
            raise InputError(
                f"{name}: neighbours.tokens is {shape}; for tokens {list(tokens.shape)} and chunk_size "
                f"{config.chunk_size} it must be [{tokens.shape[0]}, {chunks}, K, {config.neighbour_len}]."
            )
        if lengths is not None and list(lengths.shape) != shape[:3]:
            raise InputError(f"{name}: neighbours.lengths is {list(lengths.shape)}; it must be {shape[:3]}.")
        if chunks == 0 or shape[2] == 0:
            return None
        return found[:, :chunks], None if lengths is None else lengths[:, :chunks]

    def encode(self, found: Tensor, x: Tensor, lengths: Tensor | None) -> Tensor:
        """Neighbours `found` [B, L, K, R] in the light of `x` [B, ≥ L·M, dim], the decoder's state after self-attention
        of the first CCA layer → [B, L, K, R, encoder_dim]."""
        assert self.encoder is not None
        self.encoder.gradient_checkpointing = self.gradient_checkpointing
        chunks, size = found.shape[1], self.config.chunk_size
        if torch.compiler.is_exporting():  # a slice ties the program to multiples of M, or to other lengths
            x = x.index_select(1, torch.arange(chunks * size, device=x.device))
        hidden = x[:, : chunks * size].unflatten(1, (chunks, size))
        if self.encoder.embedding is None:
            # here, since accelerate would move a module that is an argument to the device of the encoder
            found = self.input_embedding()(found.to(torch.int64)).to(x.dtype)  # a base may have another dtype
        return self.encoder(found, hidden, lengths)


class DecodingStep:
    """One call of `decode`: T tokens after those in the cache, by the chunk they attend to; checked first."""

    def __init__(
        self, model: Retrieving, tokens: Tensor, cache: DecodingCache, neighbours: NeighbourBatch | None
    ) -> None:
        size, name = model.config.chunk_size, type(model).__name__
        _check_types(name, tokens, neighbours)
        if tokens.ndim != 2 or tokens.shape[0] != cache.batch_size or tokens.shape[1] < 1:
            raise InputError(
                f"{name}.decode: tokens is {list(tokens.shape)}; it must be [{cache.batch_size}, T] "
                "with T ≥ 1."
            )
        start, count = cache.length, tokens.shape[1]
        completed = (start + count) // size - start // size
        if neighbours is not None and neighbours[0].ndim == 4 and neighbours[0].shape[1] != completed:
            raise InputError(
                f"{name}.decode: neighbours hold {neighbours[0].shape[1]} chunks, but tokens {start} … "
                f"{start + count - 1} complete {completed}."
            )
        self._found = model.fitting_neighbours(tokens, neighbours, completed)
        if not start and not tokens.is_meta:
            _check_at_hand(model)
        self._model, self._cache, self._completed = model, cache, completed
        self._first_row = start % size + 1  # of the rows of the chunk attended to so far
        self._encoded: Tensor | None = None
        self._last_states: Tensor | None = None

    def contribution(self, number: int, norm: nn.Module, cca: ChunkedCrossAttention, x: Tensor) -> Tensor:
        """What is to be added to `x` [B, T, dim], the state after self-attention of layer `number`.

        The layers come in order: the first one encodes the neighbours of the chunks that these tokens complete.
        """
        cache, size = self._cache, self._model.config.chunk_size
        if number == self._model.config.cca_layers[0]:
            self._encode(x)
        if number not in cache.position_terms:
            cache.position_terms[number] = cca.position_terms()
        terms, x = cache.position_terms[number], norm(x)

        def attended(near: ChunkNeighbours | None, rows: Tensor, first_row: int = 0) -> Tensor:
            if near is None or not rows.shape[1]:
                return torch.zeros_like(rows)
            return cca.attend_rows(rows, first_row, near.key, near.value, near.lengths, terms)

        before = cache.neighbours.get(number)
        if not self._completed:
            return attended(before, x, self._first_row)
        # A chunk's last token is the first that attends to it. These chunks but for the last one have all their rows,
        # which is a forward pass, whose first rows come before all chunks.
        last, whole, cut = self._last(cca), self._completed - 1, size - self._first_row
        begun, between, rest = x.tensor_split((cut, cut + whole * size), 1)
        parts = [attended(before, begun, self._first_row)]
        if whole and self._encoded is not None:
            lengths = self._lengths_of(slice(None, -1))
            parts.append(
                cca(F.pad(between, (0, 0, size - 1, 0)), self._encoded[:, :-1], lengths)[:, size - 1 :]
            )
        else:
            parts.append(torch.zeros_like(between))
        parts.append(attended(last, rest))
        cache.neighbours[number] = last
        return torch.cat(parts, 1)

    def _encode(self, x: Tensor) -> None:
        cache, read = self._cache, self._completed * self._model.config.chunk_size
        held = x if cache.conditioning is None else torch.cat((cache.conditioning, x), 1)
        cache.conditioning = held[:, read:].clone()
        if self._found is not None:
            self._encoded = self._model.encode(self._found[0], held, self._found[1])
            self._last_states = self._encoded[:, -1].clone()  # which all layers share

    def _lengths_of(self, chunks: int | slice) -> Tensor | None:
        """Of the neighbours of these chunks; None: all are whole, or there are none."""
        lengths = None if self._found is None else self._found[1]
        return None if lengths is None else lengths[:, chunks]

    def _last(self, cca: ChunkedCrossAttention) -> ChunkNeighbours | None:
        """Of the last chunk that these tokens complete. It keeps no other chunk's memory alive."""
        states, lengths = self._last_states, self._lengths_of(-1)
        if states is None:
            return None
        lengths = None if lengths is None else lengths.clone()
        if cca.absorbs(states.shape[1], states.device, decoding_batch=states.shape[0]):
            return ChunkNeighbours(states, None, lengths)
        return ChunkNeighbours(*cca.keys_and_values(states), lengths)


def _check_at_hand(model: Retrieving) -> None:
    for cca in (module for module in model.modules() if isinstance(module, ChunkedCrossAttention)):
        if any(own.is_meta for own in cca.parameters(recurse=False)):
            raise InputError(
                f"{type(model).__name__}.decode: weights of a ChunkedCrossAttention are on the meta device. What "
                "offloads them (accelerate's hooks) brings them for calls of forward only; to generate, keep these "
                "modules on a device."
            )


def _check_types(name: str, tokens: Any, neighbours: Any) -> None:
    """TypeError: `tokens` or `neighbours` are what no shape can be asked of, or mean something else."""
    if (
        not isinstance(tokens, Tensor)
        or tokens.is_floating_point()
        or tokens.is_complex()
        or tokens.dtype == torch.bool
    ):
        given = tokens.dtype if isinstance(tokens, Tensor) else f"of type {type(tokens).__name__}"
        raise TypeError(f"{name}: tokens is {given}; it must be a tensor of integers, [B, N].")
    # the first and second rows of a tensor would be taken for tokens and lengths
    if neighbours is not None and not isinstance(neighbours, (tuple, list)):
        given = "a tensor" if isinstance(neighbours, Tensor) else f"of type {type(neighbours).__name__}"
        raise TypeError(
            f"{name}: neighbours is {given}; it must be a NeighbourBatch, or (tokens, lengths or None)."
        )
    if neighbours is not None and (
        len(neighbours) < 2
        or not isinstance(neighbours[0], Tensor)
        or not isinstance(neighbours[1], (Tensor, type(None)))
    ):
        kinds = ", ".join(type(part).__name__ for part in neighbours)
        raise TypeError(
            f"{name}: neighbours holds ({kinds}); it must be a NeighbourBatch of tensors, or (tokens, lengths or None)."
        )
