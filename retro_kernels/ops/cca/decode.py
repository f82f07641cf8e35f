"""Chunked cross-attention for decoding: one new token, or a few, of every sequence against its current neighbours.

The sequences of a batch may stand at different rows of their attending chunks. `chunked_cross_attention_decode` reads
cached keys and values; `absorbed_decode` reads the encoder states themselves, once for all heads (see `absorbed.py`).
Neither has kernels for gradients: where one is needed, plain PyTorch runs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from retro_kernels.ops._backend import casts, is_small, pick_backend, why_not_transformed, why_not_triton
from retro_kernels.ops._register import register, without_autograd
from retro_kernels.ops._shortcut import look_up, remember
from retro_kernels.ops.cca import flops
from retro_kernels.ops.cca.absorbed import _by_head, have_keys
from retro_kernels.ops.cca.op import _check_float, _check_lengths, _check_table, _checked_scale


@casts
def chunked_cross_attention_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    rows: Tensor,
    rel_key: Tensor | None = None,
    content_bias: Tensor | None = None,
    position_bias: Tensor | None = None,
    rel_bias: Tensor | None = None,
    neighbour_lengths: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """`chunked_cross_attention` for single rows of attending chunks.

    Args:
        query: [B, T, H, D], the new tokens.
        key, value: [B, K, R, Hkv, D], of the neighbours that these tokens attend to; Hkv divides H.
        rows: integers [B, T], the row a = (t + 1) % M of each token in its attending chunk, 0..M - 1; -1 where there
            are no neighbours yet, which gives exactly zero. It is not checked, since it may be on a GPU.
        rel_key: [H, M + R - 1, D]; column g = a - c + R - 1.
        content_bias, position_bias: [H, D].
        rel_bias: [H, M + R - 1].
        neighbour_lengths: integers [B, K], 0..R; None for all R.
        scale: 1 / sqrt(D) by default.
        backend: "triton", "torch", "reference", or None for the fastest that can run here.

    Returns:
        [B, T, H, D] in the query's dtype, contiguous.

    Raises:
        ValueError: shapes, devices or numbers do not fit, or the asked backend cannot run here.
        TypeError: a dtype does not fit.

    Equivalent to:
        row a of an attending chunk in `chunked_cross_attention`, for every token
    """
    name = "chunked_cross_attention_decode"
    given = (
        query,
        key,
        value,
        rows,
        rel_key,
        content_bias,
        position_bias,
        rel_bias,
        neighbour_lengths,
    )
    kind, known = look_up(name, given, (scale, backend))
    if known is not None:
        return known(*given)
    _check_floating(name, query=query, key=key, value=value)
    _check_shape(name, "key", key, (query.shape[0], None, None, None, query.shape[-1]), "[B, K, R, Hkv, D]")
    if value.shape != key.shape:
        raise ValueError(f"{name}: value has shape {tuple(value.shape)}, but key has {tuple(key.shape)}.")
    neighbours, neighbour_len, kv_heads = key.shape[1:4]
    _check_positions(
        name,
        query,
        rows,
        neighbours,
        neighbour_len,
        rel_key,
        content_bias,
        position_bias,
        rel_bias,
        neighbour_lengths,
    )
    if kv_heads < 1 or query.shape[2] % kv_heads:
        raise ValueError(f"{name}: {kv_heads} key heads do not divide the query's {query.shape[2]} heads.")
    query, key, value, rel_key, content_bias, position_bias = _cast(
        name, query, key, value, rel_key, content_bias, position_bias
    )
    gradient = _needs_gradient(query, key, value, rel_key, content_bias, position_bias, rel_bias)
    chosen = pick_backend(name, backend, _candidates(query, gradient, None))
    scale = _checked_scale(name, scale, query.shape[-1])
    if chosen == "triton":
        tensors = (query, key, value, rows, rel_key, content_bias, position_bias, rel_bias, neighbour_lengths)
        out = without_autograd(_cca_decode, *tensors, scale)
        remember(kind, given)
        return out

    query, key, value, add, dtype = _plain_inputs(
        chosen,
        query,
        key,
        value,
        rows,
        rel_key,
        position_bias,
        rel_bias,
        neighbour_lengths,
        scale,
        neighbour_len,
    )
    if query.numel() == 0:
        return query.new_empty(query.shape, dtype=dtype)
    content = query if content_bias is None else (query + content_bias).to(dtype).to(query.dtype)
    batch, tokens, heads, head_dim = query.shape
    group = heads // kv_heads
    content = (
        content.view(batch, tokens, kv_heads, group, head_dim).transpose(1, 2).flatten(2, 3)
    )  # [B, Hkv, T * g, D]
    values = value.flatten(1, 2).transpose(1, 2)
    if chosen == "torch" and query.device.type == "cpu" and not gradient and why_not_transformed() is None:
        add = add.flatten(3)
        out = _attention_of_torch(content, key.flatten(1, 2).transpose(1, 2), values, add, scale)
        out = out.unflatten(2, (tokens, group)).transpose(1, 2).reshape(query.shape).contiguous()
        # where there is no key, PyTorch's versions and kernels do not agree
        nothing = ~_present(rows, key.shape[1], neighbour_lengths)
        if rel_bias is not None:  # it may forbid them all
            nothing = nothing | (add == float("-inf")).all(-1, keepdim=True)
        return out.masked_fill_(nothing, 0.0)
    keys = key.flatten(1, 2).permute(0, 2, 3, 1)
    logits = _products(content, keys)  # [B, Hkv, T * g, K * R]
    logits = logits.unflatten(2, (tokens, group)).transpose(1, 2).flatten(2, 3)  # [B, T, H, K * R]
    weights = _weights(logits, add, scale).to(value.dtype)
    weights = weights.unflatten(2, (kv_heads, group)).transpose(1, 2).flatten(2, 3)  # [B, Hkv, T * g, K * R]
    out = _products(weights, values)  # [B, Hkv, T * g, D]
    return out.unflatten(2, (tokens, group)).transpose(1, 2).reshape(query.shape).to(dtype).contiguous()


def _attention_of_torch(content: Tensor, key: Tensor, value: Tensor, add: Tensor, scale: float) -> Tensor:
    """[B, Hkv, T * g, D] of content in that shape, key and value [B, Hkv, K * R, D] and what is added [B, T, H or 1,
    K * R]: PyTorch's attention reads a cache once, where it lies."""
    kv_heads = content.shape[1]
    heads = content.shape[2] * kv_heads // add.shape[1]
    add = add.expand(-1, -1, heads, -1).unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(2, 3)
    return torch.nn.functional.scaled_dot_product_attention(content, key, value, attn_mask=add, scale=scale)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, [B, Hkv, ·, ·] each. A CPU takes the sequences one by one: together, the cache would be copied to
    bring its heads in front, which takes longer than reading it."""
    if left.device.type != "cpu" or left.shape[0] < 2:
        return left @ right
    return torch.stack([x @ y for x, y in zip(left.unbind(), right.unbind(), strict=True)])


@casts
def absorbed_decode(
    query: Tensor,
    states: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    *,
    rows: Tensor,
    key_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    rel_key: Tensor | None = None,
    content_bias: Tensor | None = None,
    position_bias: Tensor | None = None,
    rel_bias: Tensor | None = None,
    neighbour_lengths: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """`chunked_cross_attention_decode` to projections of encoder states that are never formed.

    Args:
        query: [B, T, H, D].
        states: [B, K, R, E], the encoded neighbours; the same for every layer that attends to them.
        key_weight, value_weight: [Hkv * D, E], as of `torch.nn.Linear`; key_bias (which has no effect) and value_bias
            [Hkv * D], as in `absorbed_cross_attention`.
        rows and everything else: as in `chunked_cross_attention_decode`. The kernel takes E up to 2,048
            (1,024 on a GPU with 99 KB of shared memory; 128 in float32).

    Returns:
        [B, T, H, D] in the query's dtype.

    Raises:
        ValueError, TypeError: as in `chunked_cross_attention_decode`.

    Equivalent to:
        key, value = (linear(states, w, b).unflatten(-1, (-1, D)) for w, b in ((key_weight, key_bias), …))
        out = chunked_cross_attention_decode(query, key, value, …)
    """
    name = "absorbed_decode"
    given = (
        query,
        states,
        key_weight,
        value_weight,
        rows,
        rel_key,
        content_bias,
        position_bias,
        rel_bias,
        neighbour_lengths,
    )
    without_biases = key_bias is None and value_bias is None  # of which the kernels know nothing
    kind, known = look_up(name, given, (scale, backend)) if without_biases else (None, None)
    if known is not None:
        return known(*given)
    _check_floating(name, query=query, states=states, key_weight=key_weight, value_weight=value_weight)
    _check_shape(name, "states", states, (query.shape[0], None, None, None), "[B, K, R, E]")
    _check_shape(name, "key_weight", key_weight, (None, states.shape[-1]), "[Hkv * D, E]")
    neighbours, neighbour_len, width = states.shape[1:]
    _check_positions(
        name,
        query,
        rows,
        neighbours,
        neighbour_len,
        rel_key,
        content_bias,
        position_bias,
        rel_bias,
        neighbour_lengths,
    )
    batch, tokens, heads, head_dim = query.shape
    inner = key_weight.shape[0]
    if inner == 0 or inner % head_dim or heads * head_dim % inner:
        raise ValueError(
            f"{name}: key_weight has {inner} rows; they have to be Hkv * D with D = {head_dim} and Hkv a "
            f"divisor of the query's {heads} heads."
        )
    for label, tensor, shape in (
        ("key_weight", key_weight, (inner, width)),
        ("value_weight", value_weight, (inner, width)),
        ("key_bias", key_bias, (inner,)),
        ("value_bias", value_bias, (inner,)),
    ):
        if tensor is not None:
            _check_table(name, label, tensor, shape, query)
    query, states, key_weight, value_weight, value_bias, rel_key, content_bias, position_bias = _cast(
        name, query, states, key_weight, value_weight, value_bias, rel_key, content_bias, position_bias
    )
    gradient = _needs_gradient(
        query, states, key_weight, value_weight, value_bias, rel_key, content_bias, position_bias, rel_bias
    )
    # the accumulator of 16 rows has to stay in the registers, and tiles of states in the shared memory
    limit = 128 if query.dtype == torch.float32 else 1024 if is_small(query.device) else 2048
    too_wide = (
        f"it takes states up to {limit:,} wide in {query.dtype}, not {width:,}" if width > limit else None
    )
    chosen = pick_backend(name, backend, _candidates(query, gradient, too_wide))
    scale = _checked_scale(name, scale, head_dim)
    if chosen == "reference":
        wide = torch.promote_types(query.dtype, torch.float32)
        key, value = (
            F.linear(states.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
            for weight, bias in ((key_weight, key_bias), (value_weight, value_bias))
        )
        key, value = key.unflatten(-1, (-1, head_dim)), value.unflatten(-1, (-1, head_dim))
        return chunked_cross_attention_decode(
            query.to(wide),
            key,
            value,
            rows=rows,
            rel_key=rel_key,
            content_bias=content_bias,
            position_bias=position_bias,
            rel_bias=rel_bias,
            neighbour_lengths=neighbour_lengths,
            scale=scale,
            backend="reference",
        ).to(query.dtype)

    if chosen == "triton":
        out = without_autograd(
            _cca_absorbed_decode,
            query,
            states,
            key_weight,
            value_weight,
            rows,
            rel_key,
            content_bias,
            position_bias,
            rel_bias,
            neighbour_lengths,
            scale,
        )
        remember(kind, given)
    else:
        content = query if content_bias is None else (query + content_bias).to(query.dtype)
        absorbed = torch.einsum("bthd,hde->bthe", content, _by_head(key_weight, heads, head_dim))
        add = _added_logits(
            query, rows, rel_key, position_bias, rel_bias, neighbour_lengths, scale, neighbours, neighbour_len
        )
        flat = states.flatten(1, 2)
        logits = (absorbed.flatten(1, 2) @ flat.transpose(1, 2)).unflatten(
            1, (tokens, heads)
        )  # [B, T, H, K * R]
        mixed = (_weights(logits, add, scale).to(flat.dtype).flatten(1, 2) @ flat).unflatten(
            1, (tokens, heads)
        )
        out = torch.einsum("bthe,hde->bthd", mixed, _by_head(value_weight, heads, head_dim))
    if value_bias is not None:
        bias = _by_head(value_bias[:, None], heads, head_dim)[..., 0]
        of_rows = None if rel_bias is None else rel_bias[:, _columns(rows, neighbour_len)].transpose(0, 1)
        present = have_keys(states, neighbour_lengths, of_rows).transpose(1, 2)  # [B, T or 1, H or 1]
        out = out + bias * (present & (rows >= 0)[..., None])[..., None]
    return out.contiguous()


def _present(rows: Tensor, neighbours: int, lengths: Tensor | None) -> Tensor:
    """Which tokens have any key: bool [B, T, 1, 1]."""
    any_key = (rows >= 0) & (neighbours > 0)
    if lengths is not None:
        any_key = any_key & (lengths > 0).any(1, keepdim=True)
    return any_key[..., None, None]


def _columns(rows: Tensor, neighbour_len: int) -> Tensor:
    """Of the position tables, by key: int64 [B, T, R]."""
    keys = torch.arange(neighbour_len, device=rows.device)
    return (rows[..., None] - keys + neighbour_len - 1).clamp_(min=0)


def _relative_logits(query: Tensor, rel_key: Tensor, position_bias: Tensor | None) -> Tensor:
    """Of every column: [H, B * T, M + R - 1], not scaled."""
    position = query if position_bias is None else (query + position_bias).to(query.dtype)
    return torch.bmm(position.flatten(0, 1).transpose(0, 1), rel_key.transpose(1, 2))


def _added_logits(
    query: Tensor,
    rows: Tensor,
    rel_key: Tensor | None,
    position_bias: Tensor | None,
    rel_bias: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    neighbours: int,
    neighbour_len: int,
) -> Tensor:
    """What is added to the scaled content logits, -inf where there is no key: [B, T, H or 1, K, R] in float32."""
    batch, tokens, heads, _ = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    keys = torch.arange(neighbour_len, device=query.device)
    column = _columns(rows, neighbour_len)
    add = torch.zeros((batch, tokens, 1, neighbour_len), dtype=wide, device=query.device)
    if rel_key is not None:
        rel = _relative_logits(query, rel_key.to(query.dtype), position_bias).to(wide)
        rel = rel.transpose(0, 1).unflatten(0, (batch, tokens))  # [B, T, H, G]
        add = add + rel.gather(-1, column[:, :, None].expand(-1, -1, heads, -1)) * scale
    if rel_bias is not None:
        add = add + rel_bias.to(wide)[:, column].permute(1, 2, 0, 3)
    seen = (rows >= 0)[:, :, None, None]  # [B, T, K, R]
    if lengths is not None:
        seen = seen & (keys < lengths[..., None])[:, None]
    seen = seen.expand(-1, -1, neighbours, neighbour_len)[:, :, None]
    return add[:, :, :, None].masked_fill(~seen, float("-inf"))


def _weights(logits: Tensor, add: Tensor, scale: float) -> Tensor:
    """One softmax over all keys, [B, T, H, K * R]; rows without any key are zero."""
    logits = logits.to(add.dtype) * scale + add.flatten(3)
    nothing = (logits == float("-inf")).all(-1, keepdim=True)
    return torch.softmax(logits.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0)


def _plain_inputs(
    chosen: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    rel_key: Tensor | None,
    position_bias: Tensor | None,
    rel_bias: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    neighbour_len: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, torch.dtype]:
    dtype = query.dtype
    if chosen == "reference":  # one rounding at the end
        wide = torch.promote_types(dtype, torch.float32)
        position_bias = None if position_bias is None else position_bias.to(wide)
        query, key, value = query.to(wide), key.to(wide), value.to(wide)
    add = _added_logits(
        query, rows, rel_key, position_bias, rel_bias, lengths, scale, key.shape[1], neighbour_len
    )
    return query, key, value, add, dtype


_MANY_ROWS = 128


def _candidates(query: Tensor, gradient: bool, reason: str | None) -> dict[str, str | None]:
    """Best first. The kernels are for a few rows, which are bound by memory; large products do better for many."""
    if reason is None and gradient:
        reason = "the decoding kernels have no gradient (wrap the call in torch.no_grad(), or take another backend)"
    triton = why_not_triton(query.device, query.dtype) or why_not_transformed() or reason
    many = query.shape[1] * query.shape[2] > _MANY_ROWS
    order = ("torch", "triton") if query.device.type == "cpu" or many else ("triton", "torch")
    return {name: triton if name == "triton" else None for name in (*order, "reference")}


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _cast(name: str, query: Tensor, *others: Tensor | None) -> list[Any]:
    """All in the query's dtype; the first two others are what it is multiplied with."""
    for x in others[:2]:
        if x is not None and x.dtype != query.dtype:
            raise TypeError(
                f"{name}: query is {query.dtype}, but it meets {x.dtype}; they have to be the same "
                "(cast them, or use torch.autocast)."
            )
    return [query, *(None if x is None else x.to(query.dtype) for x in others)]


def _check_floating(name: str, **tensors: Tensor) -> None:
    query = tensors["query"]
    for label, tensor in tensors.items():
        _check_float(name, label, tensor)
    if query.dim() != 4:
        raise ValueError(f"{name}: query has shape {tuple(query.shape)}; expected 4 dimensions [B, T, H, D].")
    for label, tensor in tensors.items():
        if tensor.device != query.device:
            raise ValueError(f"{name}: {label} is on {tensor.device}, but query on {query.device}.")


def _check_shape(name: str, label: str, tensor: Tensor, shape: tuple[int | None, ...], legend: str) -> None:
    given = tuple(tensor.shape)
    if len(given) != len(shape) or any(
        want not in (None, have) for want, have in zip(shape, given, strict=True)
    ):
        fixed = ", ".join("·" if want is None else str(want) for want in shape)
        raise ValueError(f"{name}: {label} has shape {given}; expected {legend} = [{fixed}].")


def _check_positions(
    name: str,
    query: Tensor,
    rows: Tensor,
    neighbours: int,
    neighbour_len: int,
    rel_key: Tensor | None,
    content_bias: Tensor | None,
    position_bias: Tensor | None,
    rel_bias: Tensor | None,
    lengths: Tensor | None,
) -> None:
    batch, tokens, heads, head_dim = query.shape
    _check_lengths(name, "rows", rows, (batch, tokens), query)
    if lengths is not None:
        _check_lengths(name, "neighbour_lengths", lengths, (batch, neighbours), query)
    if position_bias is not None and rel_key is None:
        raise ValueError(
            f"{name}: position_bias is given without rel_key, where it has no effect. Give both."
        )
    # what is no table is told below, with the shape expected for so many columns
    tables = [
        x.shape[1] for x in (rel_key, rel_bias) if isinstance(x, Tensor) and not x.is_nested and x.dim() > 1
    ]
    columns = tables[0] if tables else neighbour_len
    if columns < neighbour_len:
        raise ValueError(
            f"{name}: the position table has {columns} columns; they have to be M + R - 1 with R = "
            f"{neighbour_len} and M at least 1."
        )
    for label, table, shape in (
        ("rel_key", rel_key, (heads, columns, head_dim)),
        ("content_bias", content_bias, (heads, head_dim)),
        ("position_bias", position_bias, (heads, head_dim)),
        ("rel_bias", rel_bias, (heads, columns)),
    ):
        if table is not None:
            _check_table(name, label, table, shape, query)


def _decode(*args: Any) -> Tensor:
    from retro_kernels.ops.cca.decode_kernel import decode_triton

    return decode_triton(*args)


def _absorbed(*args: Any) -> Tensor:
    from retro_kernels.ops.cca.decode_kernel import absorbed_decode_triton

    return absorbed_decode_triton(*args)


def _like_query(query: Tensor, *rest: object) -> Tensor:
    return query.new_empty(query.shape)


_TERMS = (
    "Tensor rows, Tensor? rel_key, Tensor? content_bias, Tensor? position_bias, Tensor? rel_bias, Tensor? lengths, "
    "float scale"
)
_cca_decode = register(
    f"cca_decode(Tensor query, Tensor key, Tensor value, {_TERMS}) -> Tensor",
    _decode,
    _like_query,
    flops=flops.decode,
)
_cca_absorbed_decode = register(
    f"cca_absorbed_decode(Tensor query, Tensor states, Tensor key_weight, Tensor value_weight, {_TERMS}) -> Tensor",
    _absorbed,
    _like_query,
    flops=flops.absorbed_decode,
)
