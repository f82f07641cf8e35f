"""Retro: the decoder, its neighbour encoder, and token-by-token decoding."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import InputError, RetroConfig
from . import saving
from .attention import ChunkedCrossAttention, SelfAttention, causal_sinusoids
from .cache import ChunkNeighbours, DecodingCache, SelfAttentionCache
from .copying import heads_needed, start_copying
from .encoder import NeighbourEncoder
from .layers import FeedForward, RMSNorm, initialise
from .positions import DistanceTable

if TYPE_CHECKING:
    from ..ops import NeighbourBatch


class DecoderLayer(nn.Module):
    """Self-attention, chunked cross-attention (layers of P only), feed-forward network; each behind an RMSNorm."""

    def __init__(self, config: RetroConfig, cca: bool, backend: str | None = None) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = SelfAttention(
            config.dim,
            config.num_heads,
            head_dim=config.head_dim,
            position=config.self_attention,
            dropout=config.dropout,
        )
        self.cca_norm, self.cca = None, None
        if cca:
            self.cca_norm = RMSNorm(config.dim, eps=config.norm_eps)
            self.cca = ChunkedCrossAttention(
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
        self.ffn_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn = FeedForward(config.dim, config.ffn_dim, config.dropout)

    def attend(self, x: Tensor, sinusoids: Tensor | None) -> Tensor:
        """The first half, whose result conditions the encoder in layer min(P)."""
        return x + self.attention(self.attention_norm(x), sinusoids=sinusoids)

    def finish(self, x: Tensor, encoded: Tensor | None, lengths: Tensor | None) -> Tensor:
        """The second half. `encoded` [B, L, K, R, encoder_dim] or None: RETRO off."""
        if self.cca is not None and self.cca_norm is not None and encoded is not None:
            x = x + self.cca(self.cca_norm(x), encoded, lengths)
        return x + self.ffn(self.ffn_norm(x))


class Retro(nn.Module):
    """The RETRO language model of Borgeaud et al. 2021 (arXiv 2112.04426).

    Pre-norm decoder (RMSNorm, GELU, readout tied to the embedding by default) whose layers `config.cca_layers`
    attend to encoded neighbours. `config.cca_layers == ()` is the plain decoder. Initialisation as GPT-2, at any
    width: N(0, 2/(5·dim)), matrices that write to the residual stream divided by √(2 · layers) of their stack.

    `backend` picks the implementation of the attention ops ("reference", "torch", "triton"; None: the best here).
    `gradient_checkpointing` (an attribute; False) recomputes each layer in the backward pass.
    """

    def __init__(self, config: RetroConfig, *, backend: str | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            DecoderLayer(config, number in config.cca_layers, backend)
            for number in range(1, config.num_layers + 1)
        )
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.readout = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.encoder = NeighbourEncoder(config, backend) if config.cca_layers else None
        self.gradient_checkpointing = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all weights anew (see the class) and computes the constant tables, as is needed after `to_empty`."""
        initialise(self, self.config.num_layers, self.config.dim)
        if self.encoder is not None:
            initialise(self.encoder, self.config.encoder_layers, self.config.encoder_dim)
        for module in self.modules():
            if isinstance(module, DistanceTable):
                module.reset_parameters()

    def forward(self, tokens: Tensor, neighbours: NeighbourBatch | None = None) -> Tensor:
        """`tokens` int [B, N] → logits [B, N, vocab_size] of each next token.

        `neighbours` holds those of the L = N // M whole chunks: tokens [B, L, K, R], lengths [B, L, K] (None: all R;
        0: no such neighbour). More chunks than L are left out, K is free. None is RETRO off: the encoder and every
        CCA are skipped. N is free; a chunk's neighbours reach its last token and the tokens after it. Raises
        ValueError for shapes that do not fit.
        """
        found = self._neighbours(tokens, neighbours, tokens.shape[-1] // self.config.chunk_size)
        run: Callable[..., Tensor] = self._checkpointed if self.gradient_checkpointing else _call
        x = self.dropout(self.embedding(tokens))
        sinusoids = causal_sinusoids(x) if self.config.self_attention == "relative" else None
        encoded, lengths = None, None
        for number, layer in self._numbered():
            x = run(layer.attend, x, sinusoids)
            if found is not None and number == self.config.cca_layers[0]:
                lengths = found[1]
                encoded = self._encode(found, x)
            x = run(layer.finish, x, encoded, lengths)
        return self._logits(x)

    def new_cache(self, batch_size: int) -> DecodingCache:
        """An empty cache for `decode`."""
        return DecodingCache(batch_size, self_attention=[SelfAttentionCache() for _ in self.layers])

    @torch.no_grad()
    def decode(
        self, tokens: Tensor, cache: DecodingCache, neighbours: NeighbourBatch | None = None
    ) -> Tensor:
        """Reads `tokens` int [B, T] after those in `cache` → logits [B, T, vocab_size]; the cache moves on by T.

        `neighbours` are those of the chunks *completed within these T tokens*, tokens [B, L_new, K, R] (they are
        needed now, because a chunk's last token is the first that sees them); None is RETRO off for those chunks.
        Any split of a sequence into calls gives the logits of `forward`. A chunk's neighbours are encoded and
        projected once. Raises ValueError for shapes that do not fit, before the cache is touched.
        """
        size = self.config.chunk_size
        if tokens.ndim != 2 or tokens.shape[0] != cache.batch_size or tokens.shape[1] < 1:
            raise InputError(
                f"Retro.decode: tokens is {list(tokens.shape)}; it must be [{cache.batch_size}, T] "
                "with T ≥ 1."
            )
        start = cache.length
        completed = (start + tokens.shape[1]) // size - start // size
        if neighbours is not None and neighbours[0].ndim == 4 and neighbours[0].shape[1] != completed:
            raise InputError(
                f"Retro.decode: neighbours hold {neighbours[0].shape[1]} chunks, but tokens {start} … "
                f"{start + tokens.shape[1] - 1} complete {completed}."
            )
        found = self._neighbours(tokens, neighbours, completed)
        segments = _segments(start, tokens.shape[1], size)
        x = self.dropout(self.embedding(tokens))
        encoded = last_states = None
        for number, layer in self._numbered():
            x = x + layer.attention(layer.attention_norm(x), cache=cache.self_attention[number - 1])
            if self.config.cca_layers and number == self.config.cca_layers[0]:
                encoded = self._encode_completed(found, x, cache, completed)
                last_states = None if encoded is None else encoded[:, -1].clone()
            if layer.cca is not None and layer.cca_norm is not None:
                chunks = [cache.neighbours.get(number), *_project(layer.cca, encoded, found, completed)]
                x = x + self._cached_cca(number, layer.cca, layer.cca_norm(x), chunks, segments, cache)
                if completed:
                    last = chunks[-1]
                    cache.neighbours[number] = None if last is None else last.detached(last_states)
            x = x + layer.ffn(layer.ffn_norm(x))
        cache.length = start + tokens.shape[1]
        return self._logits(x)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes `config.json` and `model.safetensors` into `directory` (made if needed); each appears whole."""
        saving.save(self, self.config, Path(directory))

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> Retro:
        """The model that `save_pretrained` wrote, in evaluation mode.

        Raises InputError if the folder lacks a file, or its weights do not fit its configuration.
        """
        config = saving.load_config(Path(directory))
        with torch.device("meta"):
            model = cls(config, backend=backend)
        saving.load_weights(model, Path(directory), device or "cpu", dtype)
        return model.eval()

    @classmethod
    def from_decoder(
        cls,
        decoder: Retro | str | os.PathLike[str],
        cca_layers: tuple[int, ...],
        *,
        freeze: bool = True,
        copy: float = 0.0,
        backend: str | None = None,
        **changes: Any,
    ) -> Retro:
        """Retrofit: a RETRO around a plain decoder's weights (Borgeaud et al. 2021, section 4.2).

        The output projections of the new cross-attentions start at zero, so the first step computes exactly what
        `decoder` (a model with `cca_layers=()`, or its folder) computes. `freeze=True` trains the encoder and the
        cross-attentions only: RETRO off then stays the decoder for good. Unfrozen is reported to reach a better
        perplexity (Wang et al. 2023) and gives that up. `changes` are fields of the configuration that concern the
        encoder and the cross-attention, such as `encoder_dim`.

        `copy` > 0 starts the new layers so that they copy: where neighbours hold the present tokens, the token after
        them gets a logit higher by up to `copy` (`nn.copying`). It needs an encoder of the decoder's width.
        """
        if not isinstance(decoder, Retro):
            decoder = cls.from_pretrained(decoder, backend=backend)
        if decoder.config.cca_layers:
            raise InputError(
                f"Retro.from_decoder: the model has cca_layers={decoder.config.cca_layers} already; "
                "a plain decoder is needed."
            )
        if not cca_layers:
            raise InputError(
                "Retro.from_decoder: cca_layers is empty; name the layers (1-based) that shall attend "
                "to neighbours."
            )
        config = decoder.config.replace(cca_layers=tuple(cca_layers), **changes)
        model = cls(config, backend=backend)
        reference = decoder.embedding.weight
        model.to(device=reference.device, dtype=reference.dtype)
        weights = decoder.state_dict()
        own = model.state_dict()
        if misfits := [name for name in weights if name not in own or own[name].shape != weights[name].shape]:
            raise InputError(
                f"Retro.from_decoder: {sorted(changes)} change the decoder itself ({misfits[0]} does "
                "not fit)."
            )
        model.load_state_dict(weights, strict=False)
        for _, layer in model._numbered():
            if layer.cca is not None:
                nn.init.zeros_(layer.cca.o_proj.weight)
        if copy:
            needed = heads_needed(config.dim, config.encoder_head_dim)
            if config.encoder_dim != config.dim or config.encoder_heads < needed:
                raise InputError(
                    f"Retro.from_decoder: copy needs an encoder of the decoder's width, {config.dim}, and {needed} "
                    f"heads, not {config.encoder_dim} and {config.encoder_heads}. Change the encoder, or leave copy "
                    "at 0."
                )
            start_copying(model, copy)
        if freeze:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name not in weights)
        return model

    def _numbered(self) -> Iterator[tuple[int, DecoderLayer]]:
        return enumerate(cast("list[DecoderLayer]", self.layers), 1)

    def _neighbours(
        self, tokens: Tensor, neighbours: NeighbourBatch | None, chunks: int
    ) -> tuple[Tensor, Tensor | None] | None:
        """Tokens [B, chunks, K, R] and lengths, checked; None where there is nothing to attend to."""
        if tokens.ndim != 2:
            raise InputError(f"Retro: tokens is {list(tokens.shape)}; it must be [B, N].")
        if neighbours is None:
            return None
        config = self.config
        if self.encoder is None:
            raise InputError(
                "Retro: neighbours are given, but this model is a plain decoder (cca_layers is empty)."
            )
        found, lengths = neighbours[0], neighbours[1]
        shape = list(found.shape)
        if (
            found.ndim != 4
            or shape[0] != tokens.shape[0]
            or shape[1] < chunks
            or shape[3] != config.neighbour_len
        ):
            raise InputError(
                f"Retro: neighbours.tokens is {shape}; for tokens {list(tokens.shape)} and chunk_size "
                f"{config.chunk_size} it must be [{tokens.shape[0]}, {chunks}, K, {config.neighbour_len}]."
            )
        if lengths is not None and list(lengths.shape) != shape[:3]:
            raise InputError(f"Retro: neighbours.lengths is {list(lengths.shape)}; it must be {shape[:3]}.")
        if chunks == 0 or shape[2] == 0:
            return None
        return found[:, :chunks], None if lengths is None else lengths[:, :chunks]

    def _encode(self, found: tuple[Tensor, Tensor | None], x: Tensor) -> Tensor:
        assert self.encoder is not None
        self.encoder.gradient_checkpointing = self.gradient_checkpointing
        chunks, size = found[0].shape[1], self.config.chunk_size
        hidden = x[:, : chunks * size].unflatten(1, (chunks, size))
        return self.encoder(*found[:1], hidden, found[1], embedding=self.embedding)

    def _encode_completed(
        self, found: tuple[Tensor, Tensor | None] | None, x: Tensor, cache: DecodingCache, completed: int
    ) -> Tensor | None:
        held = x if cache.conditioning is None else torch.cat((cache.conditioning, x), 1)
        cache.conditioning = held[:, completed * self.config.chunk_size :].clone()
        return None if found is None else self._encode(found, held)

    def _cached_cca(
        self,
        number: int,
        cca: ChunkedCrossAttention,
        x: Tensor,
        chunks: list[ChunkNeighbours | None],
        segments: list[tuple[int, int, int]],
        cache: DecodingCache,
    ) -> Tensor:
        if number not in cache.position_terms:
            cache.position_terms[number] = cca.position_terms()
        terms, parts = cache.position_terms[number], []
        for index, (first_row, start, stop) in enumerate(segments):
            chunk = chunks[index]
            if chunk is None or start == stop:
                parts.append(torch.zeros_like(x[:, start:stop]))
            else:
                rows = x[:, start:stop]
                parts.append(cca.attend_rows(rows, first_row, chunk.key, chunk.value, chunk.lengths, terms))
        return torch.cat(parts, 1)

    def _checkpointed(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return function(*arguments)
        return cast(Tensor, checkpoint(function, *arguments, use_reentrant=False))

    def _logits(self, x: Tensor) -> Tensor:
        weight = self.embedding.weight if self.readout is None else self.readout.weight
        return F.linear(self.norm(x), weight)


def _call(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return function(*arguments)


def _segments(start: int, count: int, size: int) -> list[tuple[int, int, int]]:
    """Tokens start … start + count − 1 by the chunk they attend to: (first row, from, to), relative to start.

    The first segment always belongs to the chunk attended to so far, and may be empty.
    """
    boundaries = (t + size - 1 - start for t in range(start // size * size, start + count - size + 1, size))
    cuts = [0, *boundaries, count]
    return [((start + cut + 1) % size, cut, end) for cut, end in pairwise(cuts)]


def _project(
    cca: ChunkedCrossAttention,
    encoded: Tensor | None,
    found: tuple[Tensor, Tensor | None] | None,
    completed: int,
) -> list[ChunkNeighbours | None]:
    if encoded is None or found is None:
        return [None] * completed
    batch, _, neighbours = encoded.shape[:3]
    lengths = [None] * completed if found[1] is None else found[1].unbind(1)
    if cca.absorbs(neighbours, encoded.device, decoding_batch=batch):
        return [ChunkNeighbours(x, None, n) for x, n in zip(encoded.unbind(1), lengths, strict=True)]
    key, value = cca.keys_and_values(encoded)
    return [ChunkNeighbours(k, v, n) for k, v, n in zip(key.unbind(1), value.unbind(1), lengths, strict=True)]
