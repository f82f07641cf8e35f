"""Retro: the decoder, its neighbour encoder, and token-by-token decoding."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import InputError, RetroConfig
from . import saving
from .attention import ChunkedCrossAttention, SelfAttention
from .cache import DecodingCache, SelfAttentionCache
from .copying import heads_needed, start_copying
from .encoder import NeighbourEncoder
from .layers import FeedForward, RMSNorm, TokenEmbedding, initialise
from .positions import DistanceTable, causal_sinusoids
from .retrieving import DecodingStep, Retrieving, cross_attention, kept_tokens

if TYPE_CHECKING:
    from ..ops import NeighbourBatch


torch.serialization.add_safe_globals([RetroConfig])  # plain data, beside the weights of a checkpoint


def _call(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return function(*arguments)


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
            self.cca_norm, self.cca = cross_attention(config, backend)
        self.ffn_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn = FeedForward(config.dim, config.ffn_dim, config.dropout)

    def forward(
        self,
        x: Tensor,
        sinusoids: Tensor | None = None,
        encoded: Tensor | None = None,
        lengths: Tensor | None = None,
        *,
        encode: Callable[[Tensor], Tensor] | None = None,
        cache: SelfAttentionCache | None = None,
        contribution: Callable[[nn.Module, ChunkedCrossAttention, Tensor], Tensor] | None = None,
        run: Callable[..., Tensor] = _call,
    ) -> tuple[Tensor, Tensor | None]:
        """`x` [B, N, dim] → the same, and what `encode` made of the state after self-attention, in layer min(P): the
        `encoded` [B, L, K, R, encoder_dim] of the layers after it, which return None. `run` calls each half. In
        decoding, `x` are the tokens after those in `cache`, and `contribution` of norm, cross-attention and state is
        what the neighbours add.

        All stands behind one call, since that is what hooks, sharding and compilation of a layer see.
        """
        x = run(self.attend, x, sinusoids, cache)
        made = None if encode is None else encode(x)
        return run(self.finish, x, encoded if made is None else made, lengths, contribution), made

    def attend(
        self, x: Tensor, sinusoids: Tensor | None = None, cache: SelfAttentionCache | None = None
    ) -> Tensor:
        """The first half, whose result conditions the encoder in layer min(P)."""
        return x + self.attention(self.attention_norm(x), sinusoids=sinusoids, cache=cache)

    def finish(
        self,
        x: Tensor,
        encoded: Tensor | None = None,
        lengths: Tensor | None = None,
        contribution: Callable[[nn.Module, ChunkedCrossAttention, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The second half. `encoded` [B, L, K, R, encoder_dim] and `contribution` None: RETRO off."""
        if self.cca is not None and self.cca_norm is not None:
            if contribution is not None:
                x = x + contribution(self.cca_norm, self.cca, x)
            elif encoded is not None:
                x = x + self.cca(self.cca_norm(x), encoded, lengths)
        return x + self.ffn(self.ffn_norm(x))


class Retro(Retrieving):
    """The RETRO language model of Borgeaud et al. 2021 (arXiv 2112.04426).

    Pre-norm decoder (RMSNorm, GELU, readout tied to the embedding by default) whose layers `config.cca_layers`
    attend to encoded neighbours. `config.cca_layers == ()` is the plain decoder. Initialisation as GPT-2, at any
    width: N(0, 2/(5·dim)), matrices that write to the residual stream divided by √(2 · layers) of their stack.

    `backend` picks the implementation of the attention ops ("reference", "torch", "triton"; None: the best here).
    `gradient_checkpointing` (an attribute; False) recomputes each layer in the backward pass.
    Raises TypeError for what is no RetroConfig.
    """

    def __init__(self, config: RetroConfig, *, backend: str | None = None) -> None:
        super().__init__()
        if not isinstance(config, RetroConfig):  # a preset that was not called, or the fields themselves
            raise TypeError(
                f"Retro: config is of type {type(config).__name__}; it must be a RetroConfig, such as retro_small() or "
                "RetroConfig(**fields)."
            )
        self.config = config
        self.embedding = TokenEmbedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            DecoderLayer(config, number in config.cca_layers, backend)
            for number in range(1, config.num_layers + 1)
        )
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.readout = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.encoder = NeighbourEncoder(config, backend) if config.cca_layers else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all weights anew (see the class) and computes the constant tables, as is needed after `to_empty`."""
        initialise(self, self.config.num_layers, self.config.dim)
        if self.encoder is not None:
            initialise(self.encoder, self.config.encoder_layers, self.config.encoder_dim)
        for module in self.modules():
            if isinstance(module, DistanceTable):
                module.reset_parameters()

    def forward(
        self, tokens: Tensor, neighbours: NeighbourBatch | None = None, *, logits_to_keep: int = 0
    ) -> Tensor:
        """`tokens` int [B, N] → logits [B, N, vocab_size] of each next token.

        `neighbours` holds those of the L = N // M whole chunks: tokens [B, L, K, R], lengths [B, L, K] (None: all R;
        0: no such neighbour). More chunks than L are left out, K is free. None is RETRO off: the encoder and every
        CCA are skipped. N is free; a chunk's neighbours reach its last token and the tokens after it.
        `logits_to_keep`: of the last so many tokens alone, 0 = of all; each takes a product with the whole vocabulary.
        Raises ValueError for shapes that do not fit and a negative number, TypeError for what is no tensor of integers
        or no such tuple.
        """
        found = self.fitting_neighbours(tokens, neighbours)
        kept = kept_tokens(type(self).__name__, logits_to_keep)
        run: Callable[..., Tensor] = self._checkpointed if self.gradient_checkpointing else _call
        x = self.dropout(self.embedding(tokens.long()))
        relative = self.config.self_attention == "relative"
        sinusoids = causal_sinusoids(x.shape[1], x.shape[2], x) if relative else None
        encoded: Tensor | None = None
        lengths: Tensor | None = None
        for number, layer in self._numbered():
            encode = None
            if found is not None and number == self.config.cca_layers[0]:
                lengths = found[1]
                encode = partial(self.encode, found[0], lengths=lengths)
            x, made = layer(x, sinusoids, encoded, lengths, encode=encode, run=run)
            encoded = encoded if made is None else made
        return self._logits(x[:, kept])

    def input_embedding(self) -> nn.Embedding:
        """The table of the tokens."""
        return self.embedding

    def new_cache(self, batch_size: int) -> DecodingCache:
        """An empty cache for `decode`."""
        return DecodingCache(batch_size, self_attention=[SelfAttentionCache() for _ in self.layers])

    @torch.no_grad()
    def decode(
        self,
        tokens: Tensor,
        cache: DecodingCache,
        neighbours: NeighbourBatch | None = None,
        *,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """Reads `tokens` int [B, T] after those in `cache` → logits [B, T, vocab_size]; the cache moves on by T.

        `neighbours` are those of the chunks *completed within these T tokens*, tokens [B, L_new, K, R] (they are
        needed now, because a chunk's last token is the first that sees them); None is RETRO off for those chunks.
        Any split of a sequence into calls gives the logits of `forward`; `logits_to_keep` as there. A chunk's
        neighbours are encoded and projected once. Raises ValueError as `forward`, before the cache is touched.
        """
        kept = kept_tokens(type(self).__name__, logits_to_keep)
        step = DecodingStep(self, tokens, cache, neighbours)
        x = self.dropout(self.embedding(tokens.long()))
        for number, layer in self._numbered():
            held = cache.self_attention[number - 1]
            x, _ = layer(x, cache=held, contribution=partial(step.contribution, number))
        cache.length += tokens.shape[1]
        return self._logits(x[:, kept])

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes `config.json` and `model.safetensors` into `directory` (made if needed); each appears whole.

        Raises InputError for weights that `from_pretrained` could not read: of adapters or parametrisations, tied by
        hand, offloaded or sharded.
        """
        weights = self.state_dict()
        saving.check_at_hand(weights)
        saving.check_savable(weights, (lambda: Retro(self.config)) if type(self) is Retro else None)
        saving.save(weights, self.config.to_dict(), Path(directory))

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
        config = decoder.config.replace(cca_layers=cca_layers, **changes)
        if not config.cca_layers:
            raise InputError(
                "Retro.from_decoder: cca_layers is empty; name the layers (1-based) that shall attend "
                "to neighbours."
            )
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

    def _checkpointed(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return function(*arguments)
        return cast(Tensor, checkpoint(function, *arguments, use_reentrant=False))

    def _logits(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.readout is not None:
            return cast(Tensor, self.readout(x))
        if isinstance(self.embedding, TokenEmbedding):
            return cast(Tensor, self.embedding(x, readout=True))
        # replaced, as by one with an adapter, which its weight alone does not tell
        return F.linear(x, self.embedding(torch.arange(self.config.vocab_size, device=x.device)))
