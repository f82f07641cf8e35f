"""The neighbour encoder: each neighbour by itself, in the light of the chunk that retrieved it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import RetroConfig
from .attention import BlockAttention
from .layers import FeedForward, RMSNorm, TokenEmbedding


class EncoderLayer(nn.Module):
    """Self-attention inside one neighbour, attention to its chunk (layers of P_enc only), feed-forward network."""

    def __init__(self, config: RetroConfig, cross: bool, backend: str | None = None) -> None:
        super().__init__()
        dim, length = config.encoder_dim, config.neighbour_len
        options: dict[str, Any] = {
            "head_dim": config.encoder_head_dim,
            "dropout": config.dropout,
            "backend": backend,
        }
        self.attention_norm = RMSNorm(dim, eps=config.norm_eps)
        self.attention = BlockAttention(dim, config.encoder_heads, length, length, **options)
        self.cross_norm, self.cross = None, None
        if cross:
            self.cross_norm = RMSNorm(dim, eps=config.norm_eps)
            self.cross = BlockAttention(
                dim, config.encoder_heads, length, config.chunk_size, context_dim=config.dim, **options
            )
        self.ffn_norm = RMSNorm(dim, eps=config.norm_eps)
        self.ffn = FeedForward(dim, config.encoder_ffn_dim, config.dropout)

    def forward(self, e: Tensor, chunks: Tensor, lengths: Tensor | None) -> Tensor:
        """`e` [B·L·K, R, encoder_dim], `chunks` [B·L, M, dim], `lengths` int [B·L·K] → like e."""
        e = e + self.attention(self.attention_norm(e), lengths=lengths)
        if self.cross is not None and self.cross_norm is not None:
            e = e + self.cross(self.cross_norm(e), chunks)
        return e + self.ffn(self.ffn_norm(e))


class NeighbourEncoder(nn.Module):
    """Encodes neighbours, conditioned on the decoder's state over their chunk (Borgeaud et al. 2021, Algorithm 1).

    That state is the one *after self-attention* of the first layer with chunked cross-attention, before its
    cross-attention and feed-forward network. Neighbours meet one another only in the decoder's softmax. The
    neighbour's tokens are the queries of the cross-attention, the chunk's M states its keys and values.
    Options of `config`: `normalise_conditioning` (RMSNorm on that state), `normalise_encoder_output`,
    `share_encoder_embedding` (then there is no table here and the embedded tokens are handed in).
    """

    def __init__(self, config: RetroConfig, backend: str | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = (
            None if config.share_encoder_embedding else TokenEmbedding(config.vocab_size, config.encoder_dim)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.conditioning_norm = (
            RMSNorm(config.dim, eps=config.norm_eps) if config.normalise_conditioning else None
        )
        self.layers = nn.ModuleList(
            EncoderLayer(config, number in config.encoder_cross_layers, backend)
            for number in range(1, config.encoder_layers + 1)
        )
        self.norm = (
            RMSNorm(config.encoder_dim, eps=config.norm_eps) if config.normalise_encoder_output else None
        )
        self.gradient_checkpointing = False

    def forward(
        self,
        tokens: Tensor,
        hidden: Tensor,
        lengths: Tensor | None = None,
        *,
        embedding: nn.Embedding | None = None,
    ) -> Tensor:
        """`tokens` int [B, L, K, R], `hidden` [B, L, M, dim], `lengths` int [B, L, K] (None: all R) →
        [B, L, K, R, encoder_dim].

        Tokens that are embedded already (`gather_embeddings`) are taken as they are: [B, L, K, R, encoder_dim].
        What stands behind a neighbour's length is finite and carries no meaning. Raises ValueError for shapes that
        do not fit together, TypeError for what is no tensor.
        """
        given = {"tokens": tokens, "hidden": hidden, **({} if lengths is None else {"lengths": lengths})}
        for name, tensor in given.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"NeighbourEncoder: {name} is of type {type(tensor).__name__}; it must be a tensor. Of a "
                    "NeighbourBatch give tokens and lengths."
                )
        config = self.config
        expected = [*tokens.shape[:2], config.chunk_size, config.dim]
        embedded = tokens.is_floating_point()
        row = [config.neighbour_len, config.encoder_dim] if embedded else [config.neighbour_len]
        if tokens.ndim != 3 + len(row) or list(tokens.shape[3:]) != row or list(hidden.shape) != expected:
            raise ValueError(
                f"NeighbourEncoder: tokens is {list(tokens.shape)} and hidden {list(hidden.shape)}; they must be "
                f"[B, L, K, {', '.join(map(str, row))}] and [B, L, {config.chunk_size}, {config.dim}], of the same "
                "sequences and chunks."
            )
        if lengths is not None and lengths.shape != tokens.shape[:3]:
            raise ValueError(
                f"NeighbourEncoder: lengths is {list(lengths.shape)}; it must be [B, L, K] = {list(tokens.shape[:3])}."
            )
        table = self.embedding if self.embedding is not None else embedding
        if table is None and not embedded:
            raise ValueError(
                "NeighbourEncoder: with share_encoder_embedding, the decoder's embedding must be given."
            )
        chunks = hidden.flatten(0, 1)  # [B·L, M, dim]
        if tokens.shape[2] == 0:  # no neighbour attends to any
            chunks = chunks[:0]
        if self.conditioning_norm is not None:
            chunks = self.conditioning_norm(chunks)
        flat = tokens.flatten(0, 2)
        e = self.dropout(flat if table is None or embedded else table(flat.to(torch.int64)))  # [B·L·K, R, d']
        flat_lengths = None if lengths is None else lengths.flatten()
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                e = checkpoint(layer, e, chunks, flat_lengths, use_reentrant=False)
            else:
                e = layer(e, chunks, flat_lengths)
        e = e.unflatten(0, tokens.shape[:3])
        return e if self.norm is None else self.norm(e)  # no view, of which FSDP2 warns
