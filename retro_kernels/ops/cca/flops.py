"""What torch's FLOP counter (`torch.utils.flop_counter.FlopCounterMode`) counts of the ops of this folder, which it
would take for nothing: matrix products, a multiply and an add being two, products that are made again included, as it
does for PyTorch's attention.

It hands over the ops' arguments with shapes for tensors. H heads of D · E width of the states · C distance columns.
"""

from __future__ import annotations

from typing import Any

Shape = tuple[int, ...]


def attention(
    query: Shape,  # [S, N, H, D]
    key: Shape,  # [G, J, TK, Hkv, D]
    value: Shape,
    rel_key: Shape | None,  # [H, C, D]
    *rest: Any,
    **_: Any,
) -> int:
    """Of `cca_fwd`: two products, and one for the logits by distance."""
    block, shift, repeat = rest[5:8]
    return (
        _rows(query, key[0], block, shift, repeat) * query[3] * (4 * key[1] * key[2] + 2 * _columns(rel_key))
    )


def attention_backward(out: Shape, _out: Shape, lse: Shape, *inputs: Any, **_: Any) -> int:
    """Of `cca_bwd`: five products; by distance the logits again, and what the query and the table get of them."""
    query, key, _value, rel_key, *rest = inputs
    block, shift, repeat = rest[5:8]
    by_distance = (4 + 2 * rest[-1][0]) * _columns(rel_key)
    return _rows(query, key[0], block, shift, repeat) * query[3] * (10 * key[1] * key[2] + by_distance)


def absorbed(
    query: Shape,  # [B, N, H, D]
    states: Shape,  # [B, L, K, R, E]
    key_weight: Shape,
    value_weight: Shape,
    rel_key: Shape | None,
    *rest: Any,
    **_: Any,
) -> int:
    """Of `cca_absorbed_fwd`: W_K into the query and W_V into the result, two products with the states."""
    return _absorbed(query, states, rel_key, rest[5], folds=2, products=2, by_distance=1)


def absorbed_backward(grad: Shape, weights: Shape, mixed: Shape, *inputs: Any, **_: Any) -> int:
    """Of `cca_absorbed_bwd`: five foldings, one of them made again, two gradients of each product."""
    query, states, _key, _value, rel_key, *rest = inputs
    return _absorbed(query, states, rel_key, rest[5], folds=5, products=4, by_distance=2 + rest[-1][4])


def decode(
    query: Shape, key: Shape, value: Shape, rows: Shape, rel_key: Shape | None, *_: Any, **__: Any
) -> int:
    """Of `cca_decode`: query [B, T, H, D], key [B, K, R, Hkv, D]."""
    batch, tokens, heads, head_dim = query
    return batch * tokens * heads * head_dim * (4 * key[1] * key[2] + 2 * _columns(rel_key))


def absorbed_decode(
    query: Shape,
    states: Shape,
    key_weight: Shape,
    value_weight: Shape,
    rows: Shape,
    rel_key: Shape | None,
    *_: Any,
    **__: Any,
) -> int:
    """Of `cca_absorbed_decode`: query [B, T, H, D], states [B, K, R, E]."""
    batch, tokens, heads, head_dim = query
    keys, width = states[1] * states[2], states[3]
    each = 4 * head_dim * width + 4 * keys * width + 2 * head_dim * _columns(rel_key)
    return batch * tokens * heads * each


def _columns(rel_key: Shape | None) -> int:
    return 0 if rel_key is None else rel_key[1]


def _rows(query: Shape, groups: int, block: int, shift: int, repeat: int) -> int:
    """Rows that attend, in all heads: those behind the shift, as far as there are blocks."""
    return min(query[0] * max(0, query[1] - shift), groups * repeat * block) * query[2]


def _absorbed(
    query: Shape,
    states: Shape,
    rel_key: Shape | None,
    chunk_size: int,
    *,
    folds: int,
    products: int,
    by_distance: int,
) -> int:
    batch, chunks, count, length, width = states
    rows = _rows(query, batch * chunks, chunk_size, chunk_size - 1, 1)
    each = (
        folds * query[3] * width
        + products * count * length * width
        + by_distance * query[3] * _columns(rel_key)
    )
    return 2 * rows * each
