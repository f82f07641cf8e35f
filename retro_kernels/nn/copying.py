"""A start for the layers that a retrofit adds: they copy from neighbours before they have learnt anything.

What continues a text by a neighbour is a circuit of three parts that learn only together, and late: encoder heads that
bring a token's predecessors to it, cross-attention that compares these with the present tokens, values that give the
token itself (the induction heads of Olsson et al. 2022, across the encoder). Here all three are set by least squares
on text that the decoder writes itself; training goes on from there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from .encoder import EncoderLayer
from .positions import causal_sinusoids, sinusoid

if TYPE_CHECKING:
    from .model import DecoderLayer, Retro

_SAMPLES = 16  # tokens written for each dimension of the states, for the least squares
# attention logit of a key whose predecessor is the present token, and whose predecessor's is the one before that
_MATCH = (8.0, 6.0)
_FOCUS = 6.0  # of the encoder's heads on one distance: e^−6.6 is left for the tokens beside it
_NEARLY_NOTHING = 0.1  # factor of what shall not disturb, but must have a gradient


@torch.no_grad()
def start_copying(model: Retro, strength: float) -> None:
    """Sets the encoder and every cross-attention of `model`, a retrofit with an encoder of the decoder's width.

    strength: what all cross-attentions together add to the logit of a token on which all their weight lies.
    """
    training = model.training
    model.eval()
    assert model.encoder is not None
    text = _write(model)
    if model.encoder.embedding is not None:
        model.encoder.embedding.load_state_dict(model.embedding.state_dict())
    table = model.embedding.weight.float()
    normed = table / table.pow(2).mean(1, keepdim=True).sqrt()
    values, axes = torch.linalg.eigh(normed.T @ normed / len(normed))  # ascending
    whiten = axes * values.clamp(min=0.01 * values.mean()).rsqrt() @ axes.T
    whiten = whiten * table.shape[1] ** 0.5 / (normed @ whiten).norm(dim=1).mean()
    # half the width of the states carries the keys, in the directions where tokens differ least
    widths = _shares(table.shape[1] // 2)
    parts = _orthonormal(sum(widths), table.shape[1], table).split(widths)
    _look_back(model, whiten, parts, axes[:, : sum(widths)] * 2 * table.pow(2).mean().sqrt())

    codes, length = normed @ whiten, text.shape[1]
    states, last = _states(model, text)
    encoded = _encode(model, text)[:, 2:].flatten(0, 1)
    answers = _answers(model, text, last)[text[:, 2:].flatten()] * (strength / len(model.config.cca_layers))
    for layer in cast("list[DecoderLayer]", model.layers):
        if layer.cca is None:
            continue
        cca, size = layer.cca, layer.cca.head_dim
        now = states.pop(0)[:, 1:].flatten(0, 1)
        cca.q_proj.weight.zero_()
        for head in range(cca.num_heads):
            row = head * size
            for part, share, match, back in zip(parts, _shares(size), _MATCH, (0, 1), strict=True):
                width = min(share, len(part))
                seen = codes @ (_orthonormal(width, len(part), table) @ part).T
                query = seen[text[:, 1 - back : length - back].flatten()] * (
                    match * size**0.5 / max(width, 1)
                )
                key = seen[text[:, 1 - back : length - 1 - back].flatten()]
                cca.q_proj.weight[row : row + width] = _fit(now, query)
                cca.k_proj.weight[row : row + width] = _fit(encoded, key)
                row += width
        out, gains, into = torch.linalg.svd(_fit(encoded, answers))
        rank = min(len(gains), cca.num_heads * size)
        order = torch.randperm(rank, device=table.device)  # so that no head has all of the strongest
        cca.o_proj.weight.zero_()
        cca.o_proj.weight[:, :rank] = out[:, order] * gains[order].sqrt()
        cca.v_proj.weight[:rank] = gains[order].sqrt()[:, None] * into[order]
        if cca.position == "relative":
            cca.rel_proj.weight.mul_(_NEARLY_NOTHING)
    model.train(training)


def _write(model: Retro) -> Tensor:
    """Text by the decoder itself: tokens [S, R], enough of them."""
    length = model.config.neighbour_len
    count = -(-_SAMPLES * model.config.dim // length)
    cache = model.new_cache(count)
    tokens = [torch.full((count, 1), model.config.pad_id, device=model.embedding.weight.device)]
    for _ in range(length):
        chances = model.decode(tokens[-1], cache)[:, -1].float().softmax(-1)
        tokens.append(torch.multinomial(chances, 1))
    return torch.cat(tokens[1:], 1)


def _look_back(model: Retro, whiten: Tensor, parts: tuple[Tensor, ...], places: Tensor) -> None:
    """Encoder heads that fetch the predecessor of every token, and the one before it; all else is kept quiet."""
    assert model.encoder is not None
    for layer in cast("list[EncoderLayer]", model.encoder.layers):
        quiet = [layer.attention.o_proj, layer.ffn.down_proj]
        for matrix in quiet if layer.cross is None else [*quiet, layer.cross.o_proj]:
            matrix.weight.mul_(_NEARLY_NOTHING)
    attention = cast(EncoderLayer, model.encoder.layers[0]).attention
    size, dim = attention.head_dim, len(whiten)
    steps = torch.arange(0, dim, 2, device=whiten.device)
    frequencies = (10000.0 ** (-steps / dim)).repeat(2)[
        :dim
    ]  # the high ones tell neighbouring distances apart
    attention.q_proj.weight.zero_()
    attention.rel_proj.weight.mul_(_NEARLY_NOTHING)
    first = done = 0
    for back, part in enumerate(parts, 1):
        near = sinusoid(torch.tensor([back], device=whiten.device), dim, torch.float32)[0]
        for rows in part.split(size):
            attention.v_proj.weight[first : first + size] = 0.0
            attention.v_proj.weight[first : first + len(rows)] = rows @ whiten
            attention.o_proj.weight[:, first : first + size] = 0.0
            attention.o_proj.weight[:, first : first + len(rows)] = places[:, done : done + len(rows)]
            attention.rel_proj.weight[first : first + size] = 0.0
            attention.rel_proj.weight[first] = _FOCUS * near * frequencies
            attention.position_bias[first // size] = 0.0
            attention.position_bias[first // size, 0] = size**0.5
            first, done = first + size, done + len(rows)


def heads_needed(dim: int, head_dim: int) -> int:
    """Heads of the encoder's first layer that `start_copying` takes."""
    return sum(-(-width // head_dim) for width in _shares(dim // 2))


def _shares(width: int) -> tuple[int, int]:
    """Of so many dimensions, those for the nearer and for the farther of two tokens."""
    return width * 5 // 8, width - width * 5 // 8


def _states(model: Retro, text: Tensor) -> tuple[list[Tensor], Tensor]:
    """What each cross-attention reads over `text`, and the last states [S, T, dim]; without retrieval."""
    x = model.embedding(text)
    relative = model.config.self_attention == "relative"
    sinusoids = causal_sinusoids(x.shape[1], x.shape[2], x) if relative else None
    states = []
    for layer in cast("list[DecoderLayer]", model.layers):
        x = layer.attend(x, sinusoids)
        if layer.cca_norm is not None:
            states.append(layer.cca_norm(x).float())
        x = layer.finish(x)
    return states, x.float()


def _encode(model: Retro, text: Tensor) -> Tensor:
    """`text` [S, R] as a neighbour → [S, R, encoder_dim], with nothing to be said of its chunk."""
    assert model.encoder is not None
    config, like = model.config, model.embedding.weight
    hidden = like.new_zeros(len(text), 1, config.chunk_size, config.dim)
    return model.encoder(text[:, None, None], hidden, embedding=model.embedding)[:, 0, 0].float()


def _answers(model: Retro, text: Tensor, last: Tensor) -> Tensor:
    """[vocab_size, dim]: what to add to a last state to raise the logit of each token by 1 and others little."""
    readout = model.embedding if model.readout is None else model.readout
    table = readout.weight.float() * model.norm.weight.float()
    spread = table.T @ table / len(table)
    spread.diagonal().add_(0.01 * spread.diagonal().mean())
    answers = torch.linalg.solve(spread, table.T).T
    answers = answers * (last.pow(2).mean(-1).sqrt().mean() / (table * answers).sum(1).mean())
    return answers - answers[text].mean((0, 1))


def _fit(x: Tensor, y: Tensor) -> Tensor:
    """The matrix W [out, in] with the least (x Wᵀ − y)², a little regularised; `x` [P, in], `y` [P, out]."""
    products = x.T @ x
    products.diagonal().add_(0.001 * products.diagonal().mean())
    return torch.linalg.solve(products, x.T @ y).T


def _orthonormal(rows: int, columns: int, like: Tensor) -> Tensor:
    return torch.linalg.qr(torch.randn(columns, rows, dtype=like.dtype, device=like.device))[0].T
