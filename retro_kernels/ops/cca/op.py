"""Chunked cross-attention and block attention: registration, autograd and the public functions.

Both are one family (its definition is `reference.py`), told apart by how query rows are cut into blocks. A backend
other than "reference" is a module with

    forward(query, key, value, rel_key, content_bias, position_bias, rel_bias, lengths, seed,
            block, shift, repeat, scale, dropout_p) -> (out, lse)
    backward(grad_out, out, lse, query, key, value, rel_key, content_bias, position_bias, rel_bias, lengths, seed,
             block, shift, repeat, scale, dropout_p, needs) -> seven gradients, in the order of the forward's tensors

where query is [S, N, H, D], key and value are [G, J, TK, Hkv, D], lengths [G, J] and lse float32 (float64 for float64)
[P, H, TQ], which a backend that does not need it leaves empty. Results are contiguous and new; `needs` says which of
the last four gradients are wanted, the others are None. Nothing in it may use autograd: it runs below it.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retro_kernels.ops._backend import (
    FLOATS,
    casts,
    is_small,
    pick_backend,
    why_not_transformed,
    why_not_triton,
)
from retro_kernels.ops._register import register, without_autograd
from retro_kernels.ops._shortcut import look_up, remember, with_gradient
from retro_kernels.ops.cca import flops
from retro_kernels.ops.cca.reference import block_attention_reference

_HAS_CPU_PATH = importlib.util.find_spec("retro_kernels.ops.cca.cpu") is not None


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rel_key: Tensor | None,
    content_bias: Tensor | None,
    position_bias: Tensor | None,
    rel_bias: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    block: int,
    shift: int,
    repeat: int,
    scale: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    args = (
        query,
        key,
        value,
        rel_key,
        content_bias,
        position_bias,
        rel_bias,
        lengths,
        seed,
        block,
        shift,
        repeat,
        scale,
        dropout_p,
    )
    if backend == "triton":
        from retro_kernels.ops.cca.forward import forward
    else:
        forward = importlib.import_module("retro_kernels.ops.cca.cpu").forward
    return forward(*args)


def _forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rel_key: Tensor | None,
    content_bias: Tensor | None,
    position_bias: Tensor | None,
    rel_bias: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    block: int,
    shift: int,
    repeat: int,
    scale: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    accumulated = torch.promote_types(query.dtype, torch.float32)
    if backend == "torch":  # makes the softmax again without it
        return query.new_empty(query.shape), query.new_empty(0)
    lse = query.new_empty((key.shape[0] * repeat, query.shape[2], block), dtype=accumulated)
    return query.new_empty(query.shape), lse


def _backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rel_key: Tensor | None,
    content_bias: Tensor | None,
    position_bias: Tensor | None,
    rel_bias: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    block: int,
    shift: int,
    repeat: int,
    scale: float,
    dropout_p: float,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    args = (
        grad_out,
        out,
        lse,
        query,
        key,
        value,
        rel_key,
        content_bias,
        position_bias,
        rel_bias,
        lengths,
        seed,
        block,
        shift,
        repeat,
        scale,
        dropout_p,
        tuple(needs),
    )
    if backend == "triton":
        from retro_kernels.ops.cca.backward import backward
    else:
        backward = importlib.import_module("retro_kernels.ops.cca.cpu").backward
    grads = backward(*args)
    return tuple(query.new_empty(0) if grad is None else grad for grad in grads)


def _backward_fake(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rel_key: Tensor | None,
    content_bias: Tensor | None,
    position_bias: Tensor | None,
    rel_bias: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    block: int,
    shift: int,
    repeat: int,
    scale: float,
    dropout_p: float,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    tables = (rel_key, content_bias, position_bias, rel_bias)
    return tuple(x.new_empty(x.shape) for x in (query, key, value)) + tuple(
        query.new_empty(0) if x is None or not need else x.new_empty(x.shape)
        for x, need in zip(tables, needs, strict=True)
    )


_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor? rel_key, Tensor? content_bias, Tensor? position_bias, "
    "Tensor? rel_bias, Tensor? lengths, Tensor? seed"
)
_OPTIONS = "int block, int shift, SymInt repeat, float scale, float dropout_p, str backend"
_cca_fwd = register(
    f"cca_fwd({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    lambda *args: _BlockAttention.apply(None, *args),
    flops=flops.attention,
)
_cca_bwd = register(
    f"cca_bwd(Tensor grad_out, Tensor out, Tensor lse, {_TENSORS}, {_OPTIONS}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    flops=flops.attention_backward,
)


class _BlockAttention(torch.autograd.Function):
    """Keeps the inputs, the output and the log-sum-exp; the weights are computed again.

    `made`: the pass that calls of this kind run (`_shortcut`), whose tensors are as they were given: keys and lengths
    have an axis for the batch and one for its chunks."""

    @staticmethod
    def forward(ctx: Any, made: Callable[..., Any] | None, *args: Any) -> tuple[Tensor, Tensor]:
        if made is not None:
            out, lse = made(*args[:9])
        else:
            out, lse = without_autograd(_cca_fwd, *args)
            if not torch.compiler.is_compiling():
                options = args[9:]
                with_gradient(lambda made: lambda *tensors: _BlockAttention.apply(made, *tensors, *options))
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)  # or there would be zeros in place of a gradient of lse
        ctx.save_for_backward(out, lse, *args[:9])
        ctx.options = args[9:]
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * len(ctx.needs_input_grad)
        needs, given = ctx.needs_input_grad[4:8], (grad_out, *ctx.saved_tensors)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            return (None, *_FirstDerivative.apply(needs, *given, *ctx.options), *(None,) * 8)
        wanted = sum(need << i for i, need in enumerate(needs))
        kind, known = look_up("cca_bwd", given, (wanted, *ctx.options))
        if known is not None:
            return (None, *known(*given), *(None,) * 8)
        gradients = _gradients(needs, *given, *ctx.options)
        remember(kind, given)
        return (None, *gradients, *(None,) * 8)


class _FirstDerivative(torch.autograd.Function):
    """The gradients once more as a node of the graph, so that differentiating them fails by name."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        return _gradients(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            'block attention has no second derivative on this backend; backend="reference" has one (slow).'
        )


def _gradients(
    needs: tuple[bool, ...], grad_out: Tensor, out: Tensor, lse: Tensor, *args: Any
) -> tuple[Any, ...]:
    query, key, value, *tables, lengths = args[:8]
    wanted = [need and x is not None for need, x in zip(needs, tables, strict=True)]
    shape = key.shape
    if key.dim() == 6:
        key, value = key.flatten(0, 1), value.flatten(0, 1)
        lengths = None if lengths is None else lengths.flatten(0, 1)
    grad_query, grad_key, grad_value, *others = without_autograd(
        _cca_bwd, grad_out, out, lse, query, key, value, *tables, lengths, *args[8:], wanted
    )
    if len(shape) == 6:
        grad_key, grad_value = grad_key.view(shape), grad_value.view(shape)
    kept = (grad if need else None for grad, need in zip(others, wanted, strict=True))
    return grad_query, grad_key, grad_value, *kept


@casts
def chunked_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    chunk_size: int = 64,
    rel_key: Tensor | None = None,
    content_bias: Tensor | None = None,
    position_bias: Tensor | None = None,
    rel_bias: Tensor | None = None,
    neighbour_lengths: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """RETRO's chunked cross-attention (Borgeaud et al. 2021, section 2.4), without projections and residual.

    Token t >= M - 1 attends to the K·R tokens of the neighbours of chunk u = (t + 1) // M - 1 under one softmax, as
    row a = (t + 1) % M of its attending chunk; the tokens before get exactly zero.

    Args:
        query: [B, N, H, D]. N need not be a multiple of M.
        key, value: [B, L, K, R, Hkv, D] with L = N // M; Hkv divides H, head h reads key head h // (H / Hkv).
        chunk_size: M.
        rel_key: [H, M + R - 1, D], keys of positions; column g = a - c + R - 1 stands for distance g - (R - M).
        content_bias: [H, D], added to the query where it meets `key`.
        position_bias: [H, D], added to the query where it meets `rel_key`.
        rel_bias: [H, M + R - 1], added to the logits, unscaled, by the same column.
        neighbour_lengths: integers [B, L, K], 0..R: how many leading tokens of a neighbour are real, 0 for none at
            all; None for all R. What lies behind them is never weighted, but has to be finite for "triton".
        scale: of both products; 1 / sqrt(D) by default.
        dropout_p: chance that a weight of the softmax is dropped. The seed comes from torch's generator.
        backend: "triton", "torch", "reference", or None for the fastest that can run here.

    Returns:
        [B, N, H, D] in the query's dtype, contiguous. Rows t < M - 1 and rows with no key at all are exactly zero.

    Raises:
        ValueError: shapes, devices or numbers do not fit, or the asked backend cannot run here.
        TypeError: a dtype does not fit.

    Equivalent to:
        logits = (einsum(query_block + u, key) + shear(einsum(query_block + v, rel_key))) * scale + shear(rel_bias)
        out = einsum(softmax(logits.flatten(-2)), value)
    """
    name = "chunked_cross_attention"
    given = (
        query,
        key,
        value,
        rel_key,
        content_bias,
        position_bias,
        rel_bias,
        neighbour_lengths,
    )
    kind, known = look_up(name, given, (chunk_size, scale, dropout_p, backend), differentiable=True)
    if known is not None:
        return known(*given)[0]
    _check_ranks(name, query, key, value, 6, "[B, L, K, R, Hkv, D]")
    batch, num_tokens, num_heads, _ = query.shape
    key_batch, num_chunks, num_neighbours, neighbour_len, kv_heads, head_dim = key.shape
    _check_count(name, "chunk_size", chunk_size)
    if key_batch != batch:
        raise ValueError(f"{name}: key has a batch of {key_batch}, but query has one of {batch}.")
    if num_chunks != num_tokens // chunk_size:
        raise ValueError(
            f"{name}: key has {num_chunks:,} chunks, but query has {num_tokens:,} tokens and chunk_size is "
            f"{chunk_size} ({num_tokens // chunk_size:,} expected)."
        )
    if neighbour_lengths is not None:
        _check_lengths(
            name, "neighbour_lengths", neighbour_lengths, (batch, num_chunks, num_neighbours), query
        )
        neighbour_lengths = neighbour_lengths.reshape(batch * num_chunks, num_neighbours)
    blocks = (batch * num_chunks, num_neighbours, neighbour_len, kv_heads, head_dim)
    out = _attend(
        name,
        query,
        key.reshape(blocks),
        value.reshape(blocks),
        rel_key,
        content_bias,
        position_bias,
        rel_bias,
        neighbour_lengths,
        chunk_size,
        chunk_size - 1,
        1,
        scale,
        dropout_p,
        backend,
    )
    remember(kind, given)
    return out


@casts
def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    rel_key: Tensor | None = None,
    content_bias: Tensor | None = None,
    position_bias: Tensor | None = None,
    rel_bias: Tensor | None = None,
    lengths: Tensor | None = None,
    key_repeat: int = 1,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Attention inside independent small blocks, with the relative positions of chunked cross-attention.

    It serves RETRO's neighbour encoder (Borgeaud et al. 2021, section 2.3 and Algorithm 1): self-attention within
    one neighbour (P = G = number of neighbours, J = 1, TQ = TK = R), and the neighbours' attention to the chunk
    which retrieved them (TQ = R, J = 1, TK = M, key_repeat = K).

    Args:
        query: [P, TQ, H, D].
        key, value: [G, J, TK, Hkv, D] with P = G * key_repeat; block p reads group p // key_repeat.
        rel_key: [H, TQ + TK - 1, D]; column g = i - j + TK - 1 for query row i and key j of a block.
        content_bias, position_bias: [H, D], as in `chunked_cross_attention`.
        rel_bias: [H, TQ + TK - 1].
        lengths: integers [G, J], 0..TK: how many leading keys are real; None for all.
        key_repeat: how many consecutive query blocks share one group of keys.
        scale, dropout_p, backend: as in `chunked_cross_attention`.

    Returns:
        [P, TQ, H, D] in the query's dtype, contiguous; rows without any key are exactly zero.

    Raises:
        ValueError, TypeError: as in `chunked_cross_attention`.

    Equivalent to:
        logits = (einsum(query + u, key) + shear(einsum(query + v, rel_key))) * scale + shear(rel_bias)
        out = einsum(softmax(logits.flatten(-2)), value)
    """
    name = "block_attention"
    given = (query, key, value, rel_key, content_bias, position_bias, rel_bias, lengths)
    kind, known = look_up(name, given, (key_repeat, scale, dropout_p, backend), differentiable=True)
    if known is not None:
        return known(*given)[0]
    _check_ranks(name, query, key, value, 5, "[G, J, TK, Hkv, D]")
    _check_count(name, "key_repeat", key_repeat)
    if query.shape[0] != key.shape[0] * key_repeat:
        raise ValueError(
            f"{name}: query has {query.shape[0]:,} blocks, but key has {key.shape[0]:,} groups and key_repeat is "
            f"{key_repeat} ({key.shape[0] * key_repeat:,} expected)."
        )
    if lengths is not None:
        _check_lengths(name, "lengths", lengths, tuple(key.shape[:2]), query)
    out = _attend(
        name,
        query,
        key,
        value,
        rel_key,
        content_bias,
        position_bias,
        rel_bias,
        lengths,
        query.shape[1],
        0,
        key_repeat,
        scale,
        dropout_p,
        backend,
    )
    remember(kind, given)
    return out


def _attend(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rel_key: Tensor | None,
    content_bias: Tensor | None,
    position_bias: Tensor | None,
    rel_bias: Tensor | None,
    lengths: Tensor | None,
    block: int,
    shift: int,
    repeat: int,
    scale: float | None,
    dropout_p: float,
    backend: str | None,
) -> Tensor:
    _, _, num_heads, head_dim = query.shape
    num_keys, kv_heads = key.shape[2], key.shape[3]
    if kv_heads < 1 or num_heads % kv_heads != 0:
        raise ValueError(f"{name}: {kv_heads} key heads do not divide the query's {num_heads} heads.")
    dropout_p = _checked_dropout(name, dropout_p)
    if position_bias is not None and rel_key is None:
        raise ValueError(
            f"{name}: position_bias is given without rel_key, where it has no effect. Give both."
        )
    columns = block + num_keys - 1
    for label, table, shape in (
        ("rel_key", rel_key, (num_heads, columns, head_dim)),
        ("content_bias", content_bias, (num_heads, head_dim)),
        ("position_bias", position_bias, (num_heads, head_dim)),
        ("rel_bias", rel_bias, (num_heads, columns)),
    ):
        if table is not None:
            _check_table(name, label, table, shape, query)

    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"{name}: query is {query.dtype}, key {key.dtype} and value {value.dtype}; they have to be the same "
            "(cast them, or use torch.autocast)."
        )
    if rel_key is not None:
        rel_key = rel_key.to(query.dtype)

    empty = query.numel() == 0 or key.numel() == 0
    candidates = _candidates(query)
    chosen = pick_backend(name, backend, dict.fromkeys(candidates) if empty else candidates)
    scale = _checked_scale(name, scale, head_dim)
    seed = torch.randint(2**63 - 1, (1,), device=query.device) if dropout_p > 0.0 else None
    # the backends walk query, key and value by their strides; the small tensors they expect whole
    rel_key, content_bias, position_bias, rel_bias, lengths = (
        None if x is None else x.contiguous()
        for x in (rel_key, content_bias, position_bias, rel_bias, lengths)
    )
    tensors = (query, key, value, rel_key, content_bias, position_bias, rel_bias, lengths, seed)
    if chosen == "reference" or empty:
        options: dict[str, Any] = {
            "block": block,
            "shift": shift,
            "repeat": repeat,
            "scale": scale,
            "dropout_p": dropout_p,
        }
        return block_attention_reference(*tensors, **options)  # type: ignore[arg-type]
    args = (*tensors, block, shift, repeat, scale, dropout_p, chosen)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return _BlockAttention.apply(None, *args)[0]
    return without_autograd(_cca_fwd, *args)[0]


def _candidates(query: Tensor) -> dict[str, str | None]:
    """Backends, best first, with the reason why one cannot run here."""
    transformed = why_not_transformed()
    triton = why_not_triton(query.device, query.dtype) or transformed
    if triton is None and query.shape[-1] > 256:
        triton = f"the kernels hold a head in registers, at most 256 wide; this one has {query.shape[-1]}"
    if query.dtype == torch.float32 and query.shape[-1] > 128 and is_small(query.device):
        # the backward's operands, split in two for tf32x3; smaller blocks of keys do not change that
        triton = triton or (
            "in float32 heads wider than 128 need more shared memory than this GPU's 99 KB; take bfloat16 or "
            "float16"
        )
    if query.device.type != "cpu":
        return {"triton": triton, "torch": "it is the fast path of CPUs", "reference": None}
    missing = transformed if _HAS_CPU_PATH else "it is not part of this installation"
    return {"torch": missing, "reference": None, "triton": triton}


def _check_ranks(name: str, query: Tensor, key: Tensor, value: Tensor, rank: int, legend: str) -> None:
    for label, tensor in (("query", query), ("key", key), ("value", value)):
        _check_float(name, label, tensor)
    if query.dim() != 4:
        raise ValueError(f"{name}: query has shape {tuple(query.shape)}; expected 4 dimensions [·, ·, H, D].")
    if key.dim() != rank:
        raise ValueError(f"{name}: key has shape {tuple(key.shape)}; expected {rank} dimensions {legend}.")
    if value.shape != key.shape:
        raise ValueError(f"{name}: value has shape {tuple(value.shape)}, but key has {tuple(key.shape)}.")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"{name}: key has head size {key.shape[-1]}, but query has {query.shape[-1]}.")
    if key.device != query.device or value.device != query.device:
        raise ValueError(
            f"{name}: query is on {query.device}, key on {key.device} and value on {value.device}."
        )


def _check_float(name: str, label: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: {label} is of type {type(tensor).__name__}; it has to be a tensor.")
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{name}: {label} is {tensor.dtype}; it has to be a floating-point tensor (float32, float16, bfloat16 or "
            "float64)."
        )
    _check_dense(name, label, tensor)


def _check_dense(name: str, label: str, tensor: Tensor) -> None:
    if tensor.is_nested or tensor.layout is not torch.strided:
        given = "a nested tensor" if tensor.is_nested else f"of layout {tensor.layout}"
        raise TypeError(
            f"{name}: {label} is {given}; it has to be a dense one (to_dense; a nested one: pad it, and give lengths)."
        )


def _check_count(name: str, label: str, count: Any) -> None:
    if not isinstance(count, (int, np.integer, torch.SymInt)) or isinstance(count, bool):
        raise TypeError(f"{name}: {label} is {count!r}; it has to be an integer.")
    if count < 1:
        raise ValueError(f"{name}: {label} is {count}; it has to be at least 1.")


def _checked_scale(name: str, scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5 if head_dim else 1.0
    if isinstance(scale, Tensor) and scale.requires_grad:
        raise TypeError(f"{name}: scale gets no gradient; multiply the query with what is learned.")
    scale = _as_float(name, "scale", scale)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"{name}: scale is {scale}; it has to be finite.")
    return scale


def _checked_dropout(name: str, dropout_p: float) -> float:
    dropout_p = _as_float(name, "dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{name}: dropout_p is {dropout_p}; it has to be in [0, 1).")
    return dropout_p


def _as_float(name: str, label: str, number: Any) -> float:
    try:
        return float(number)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"{name}: {label} is {number!r}; it has to be a number.") from None


def _check_lengths(name: str, label: str, lengths: Tensor, shape: tuple[int, ...], query: Tensor) -> None:
    if not isinstance(lengths, Tensor):
        raise TypeError(f"{name}: {label} is of type {type(lengths).__name__}; it has to be a tensor.")
    if lengths.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
        raise TypeError(
            f"{name}: {label} is {lengths.dtype}; it has to hold integers"
            + (" (a mask: use mask.sum(-1))." if label.endswith("lengths") else ".")
        )
    _check_dense(name, label, lengths)
    if lengths.shape != shape:
        raise ValueError(f"{name}: {label} has shape {tuple(lengths.shape)}; expected {tuple(shape)}.")
    if lengths.device != query.device:
        raise ValueError(f"{name}: {label} is on {lengths.device}, but query on {query.device}.")


def _check_table(name: str, label: str, table: Tensor, shape: tuple[int, ...], query: Tensor) -> None:
    _check_float(name, label, table)
    if table.shape != shape:
        raise ValueError(f"{name}: {label} has shape {tuple(table.shape)}; expected {shape}.")
    if table.device != query.device:
        raise ValueError(f"{name}: {label} is on {table.device}, but query on {query.device}.")
