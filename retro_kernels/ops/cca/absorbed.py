r"""Absorbed chunked cross-attention: all heads attend to the encoder states themselves; K and V never exist.

    logit = (q + u)·(W_K e) = (W_Kᵀ(q + u))·e          Σ p (W_V e) = W_V (Σ p e)

so the query is taken to the width E of the states before the products with them, and the mixture of states back
afterwards (as multi-head latent attention does; DeepSeek-V2 2024, section 2.1). The positional terms stay with the
original query. The matrix products are PyTorch's batched ones (cuBLAS on a GPU); between them stands one fused kernel,
`absorbed_softmax.py`. `projection.py` says when this is worth it.

Backward keeps the weights in the input dtype, [P, M·H, K·R], and the mixed states, [P, M·H, E]; it recomputes the query
of width E. Content logits and relative logits are rounded to the input dtype once, as in plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from retro_kernels.ops._backend import casts, pick_backend, why_not_transformed, why_not_triton
from retro_kernels.ops._register import register, without_autograd
from retro_kernels.ops.cca import flops
from retro_kernels.ops.cca.op import (
    _check_count,
    _check_float,
    _check_lengths,
    _check_table,
    _checked_dropout,
    _checked_scale,
)
from retro_kernels.ops.cca.reference import block_attention_reference, dropout_keep, relative_column

_SLICE = {"cuda": 2**27, "cpu": 2**21}  # logits that exist at one time where they need not be kept


def _rows(query: Tensor, block: int, chunks: int, shift: int) -> Tensor:
    """The rows of the attending chunks, [B, N, H, D] → [B * L * M, H, D]; what a sequence lacks is zero."""
    rows = query[:, shift:]
    return F.pad(rows, (0, 0, 0, 0, 0, chunks * block - rows.shape[1])).flatten(0, 1)


def _by_head(weight: Tensor, heads: int, head_dim: int) -> Tensor:
    """[Hkv * D, E] → [H, D, E]; a view where every head has its own."""
    weight = weight.unflatten(0, (-1, head_dim))
    return weight if weight.shape[0] == heads else weight.repeat_interleave(heads // weight.shape[0], 0)


def _per_head(rows: Tensor, weight: Tensor, out: Tensor, alpha: float = 1.0) -> Tensor:
    """out[n, h] = alpha · rows[n, h] @ weight[h]: [n, H, X], [H, X, Y] → [n, H, Y], without transposed copies."""
    target = out.transpose(0, 1)
    torch.baddbmm(target, rows.transpose(0, 1), weight, beta=0, alpha=alpha, out=target)
    return out


def _over_rows(left: Tensor, right: Tensor, alpha: float = 1.0) -> Tensor:
    """[n, H, X], [n, H, Y] → [H, X, Y], the sum over n."""
    left, right = left.permute(1, 2, 0), right.transpose(0, 1)
    out = left.new_empty((left.shape[0], left.shape[1], right.shape[2]))
    return torch.baddbmm(out, left, right, beta=0, alpha=alpha, out=out)


def _reversed_columns(rel_key: Tensor) -> Tensor:
    """[H, M + R - 1, D] → [H, GP, D], largest distance first, GP a multiple of 8 so that the products stay aligned."""
    return F.pad(rel_key.flip(1), (0, 0, 0, -rel_key.shape[1] % 8))


def _slices(blocks: int, logits_per_block: int, device: torch.device, whole: bool) -> list[tuple[int, int]]:
    step = blocks if whole else _SLICE.get(device.type, 2**27) // max(logits_per_block, 1)
    step = max(step, 1)
    return [(start, min(start + step, blocks)) for start in range(0, blocks, step)]


def _sheared(rel: Tensor, block: int, heads: int, neighbour_len: int) -> Tensor:
    """The view [P, M, H, R] of relative logits [P, M * H, GP] (reversed columns) that key c of row a reads."""
    rel = rel.unflatten(1, (block, heads))
    p, m, h, g = rel.stride()
    offset = rel.storage_offset() + (block - 1) * g
    return rel.as_strided((rel.shape[0], block, heads, neighbour_len), (p, m - g, h, g), offset)


def _softmax(
    logits: Tensor,
    rel: Tensor | None,
    bias: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    *,
    first: int,
    block: int,
    heads: int,
    neighbour_len: int,
    dropout_p: float,
) -> Tensor:
    """`absorbed_softmax.softmax_triton` in plain PyTorch."""
    view = logits.unflatten(1, (block, heads)).unflatten(3, (-1, neighbour_len))  # [P, M, H, K, R]
    wide = view if view.dtype.itemsize >= 4 else view.float()
    if rel is not None:
        wide.add_(_sheared(rel, block, heads, neighbour_len).unsqueeze(3))
    if bias is not None:
        column = relative_column(block, neighbour_len, bias.device)
        wide.add_(bias[:, column].transpose(0, 1).unsqueeze(2))
    if lengths is not None:
        missing = torch.arange(neighbour_len, device=lengths.device) >= lengths[:, :, None]  # [P, K, R]
        wide.masked_fill_(missing[:, None, None], float("-inf"))
    wide = wide.flatten(3)
    weights = torch.softmax(wide, -1)
    # NaN is of a row without any key; a GPU would be waited for
    if weights.is_cuda or weights[..., 0].isnan().any():
        weights.masked_fill_(wide.amax(-1, keepdim=True) == float("-inf"), 0.0)
    logits.copy_(weights.flatten(1, 2))
    return logits if seed is None else _dropped(logits, seed, block, heads, dropout_p)


def _dropped(weights: Tensor, seed: Tensor, block: int, heads: int, dropout_p: float) -> Tensor:
    blocks, _, keys = weights.shape
    keep = dropout_keep(seed, (blocks, heads, block, keys), dropout_p)
    return weights * keep.transpose(1, 2).flatten(1, 2) / (1.0 - dropout_p)


def _softmax_backward(
    weights: Tensor,
    grad: Tensor,
    grad_rel: Tensor | None,
    seed: Tensor | None,
    *,
    first: int,
    block: int,
    heads: int,
    neighbour_len: int,
    dropout_p: float,
) -> Tensor:
    """`absorbed_softmax.softmax_backward_triton` in plain PyTorch."""
    wide = torch.promote_types(weights.dtype, torch.float32)
    dropped = weights
    if seed is not None:
        dropped = _dropped(weights, seed, block, heads, dropout_p)
        grad.copy_(_dropped(grad, seed, block, heads, dropout_p))
    delta = (grad.to(wide) * weights.to(wide)).sum(-1, keepdim=True)
    if grad.dtype == wide:
        grad.sub_(delta).mul_(weights)
    else:
        grad.copy_((grad - delta) * weights)
    if grad_rel is not None:
        by_key = grad.unflatten(1, (block, heads)).unflatten(3, (-1, neighbour_len)).sum(3, dtype=wide)
        _sheared(grad_rel.zero_(), block, heads, neighbour_len).copy_(by_key)
    return dropped


def _seen(states: Tensor, lengths: Tensor | None, fused: bool) -> Tensor:
    """The states, 0 behind a length where no kernel runs: a weight of zero is not enough for what may be NaN."""
    if lengths is None or fused:
        return states
    hidden = torch.arange(states.shape[3], device=states.device) >= lengths[..., None]
    return states.masked_fill(hidden[..., None], 0.0)


def _softmax_of(fused: bool) -> tuple[Any, Any]:
    if not fused:
        return _softmax, _softmax_backward
    from retro_kernels.ops.cca.absorbed_softmax import softmax_backward_triton, softmax_triton

    return softmax_triton, softmax_backward_triton


def _forward(
    query: Tensor,
    states: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    rel_key: Tensor | None,
    content_bias: Tensor | None,
    position_bias: Tensor | None,
    rel_bias: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    chunk_size: int,
    scale: float,
    dropout_p: float,
    fused: bool,
    keep: bool,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out [B, N, H, D], and what backward needs: weights [P, M * H, K * R] and mixed states [P, M * H, E]."""
    batch, tokens, heads, head_dim = query.shape
    _, chunks, neighbours, neighbour_len, width = states.shape
    blocks, rows, keys = batch * chunks, chunk_size * heads, neighbours * neighbour_len
    shift = chunk_size - 1
    softmax, _ = _softmax_of(fused)
    states = _seen(states, lengths, fused).reshape(blocks, keys, width)
    to_states = _by_head(key_weight, heads, head_dim)
    from_states = _by_head(value_weight, heads, head_dim).transpose(1, 2)
    q = _rows(query, chunk_size, chunks, shift)
    content = q if content_bias is None else q + content_bias.to(q.dtype)
    position = q if position_bias is None else q + position_bias.to(q.dtype)
    table = None if rel_key is None else _reversed_columns(rel_key)
    bias = None if rel_bias is None else rel_bias.flip(1).contiguous().float() if fused else rel_bias
    lengths = None if lengths is None else lengths.reshape(blocks, neighbours).int().contiguous()

    attended = query.new_empty((blocks * chunk_size, heads, head_dim))
    weights = query.new_empty((blocks, rows, keys) if keep else (0,))
    mixed = query.new_empty((blocks, rows, width) if keep else (0,))
    for start, stop in _slices(blocks, rows * keys, query.device, whole=seed is not None and not fused):
        part, of_part = slice(start * chunk_size, stop * chunk_size), slice(start, stop)
        logits = weights[of_part] if keep else query.new_empty((stop - start, rows, keys))
        absorbed = _per_head(
            content[part], to_states, query.new_empty((part.stop - part.start, heads, width))
        )
        keys_of = states[of_part].transpose(1, 2)
        torch.baddbmm(logits, absorbed.view(-1, rows, width), keys_of, beta=0, alpha=scale, out=logits)
        rel = None
        if table is not None:
            rel = query.new_empty((part.stop - part.start, heads, table.shape[1]))
            rel = _per_head(position[part], table.transpose(1, 2), rel, scale).view(-1, rows, table.shape[1])
        dropped = softmax(
            logits,
            rel,
            bias,
            None if lengths is None else lengths[of_part],
            seed,
            first=start,
            block=chunk_size,
            heads=heads,
            neighbour_len=neighbour_len,
            dropout_p=dropout_p,
        )
        mix = torch.bmm(dropped, states[of_part], out=mixed[of_part] if keep else None)
        _per_head(mix.view(-1, heads, width), from_states, attended[part])

    out = query.new_empty((batch, tokens, heads, head_dim))
    out[:, :shift] = 0.0
    out[:, shift:] = attended.view(batch, chunks * chunk_size, heads, head_dim)[:, : max(tokens - shift, 0)]
    return out, weights, mixed


def _backward(
    grad_out: Tensor,
    weights: Tensor,
    mixed: Tensor,
    query: Tensor,
    states: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    rel_key: Tensor | None,
    content_bias: Tensor | None,
    position_bias: Tensor | None,
    rel_bias: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    chunk_size: int,
    scale: float,
    dropout_p: float,
    fused: bool,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of query, states, both weights, rel_key and the three biases; empty where it is not needed."""
    batch, tokens, heads, head_dim = query.shape
    _, chunks, neighbours, neighbour_len, width = states.shape
    blocks, rows, keys = batch * chunks, chunk_size * heads, neighbours * neighbour_len
    shift, columns = chunk_size - 1, chunk_size + neighbour_len - 1
    _, softmax_backward = _softmax_of(fused)
    grad_out = grad_out.contiguous()
    flat = _seen(states, lengths, fused).reshape(blocks, keys, width)
    to_states, from_states = (_by_head(weight, heads, head_dim) for weight in (key_weight, value_weight))
    q, dout = (_rows(x, chunk_size, chunks, shift) for x in (query, grad_out))
    content = q if content_bias is None else q + content_bias.to(q.dtype)
    need_query, need_states, need_key, need_value, need_rel, need_content, need_position, need_bias = needs
    need_absorbed = need_query or need_key or need_content
    positions = (
        rel_bias is not None
        and need_bias
        or rel_key is not None
        and (need_query or need_rel or need_position)
    )

    none = query.new_empty((0,))
    grad_states = flat.new_empty(flat.shape) if need_states else none
    grad_absorbed = query.new_empty((blocks * chunk_size, heads, width)) if need_absorbed else none
    grad_rel = query.new_empty((blocks, rows, columns + -columns % 8)) if positions else None
    for start, stop in _slices(blocks, rows * keys, query.device, whole=seed is not None and not fused):
        part, of_part = slice(start * chunk_size, stop * chunk_size), slice(start, stop)
        many = part.stop - part.start
        dmix = _per_head(dout[part], from_states, query.new_empty((many, heads, width))).view(-1, rows, width)
        grad = torch.bmm(dmix, flat[of_part].transpose(1, 2))
        dropped = softmax_backward(
            weights[of_part],
            grad,
            None if grad_rel is None else grad_rel[of_part],
            seed,
            first=start,
            block=chunk_size,
            heads=heads,
            neighbour_len=neighbour_len,
            dropout_p=dropout_p,
        )
        if need_states:
            target = grad_states[of_part]
            absorbed = _per_head(content[part], to_states, query.new_empty((many, heads, width))).view(
                -1, rows, width
            )
            torch.bmm(dropped.transpose(1, 2), dmix, out=target)
            torch.baddbmm(target, grad.transpose(1, 2), absorbed, alpha=scale, out=target)
        if need_absorbed:
            target = grad_absorbed[part].view(-1, rows, width)
            torch.baddbmm(target, grad, flat[of_part], beta=0, alpha=scale, out=target)

    grad_key_weight = grad_value_weight = grad_content_bias = dq = none
    if need_query or need_content:
        dq = _per_head(grad_absorbed, to_states.transpose(1, 2), q.new_empty(q.shape))
    if content_bias is not None and need_content:
        grad_content_bias = _summed(dq, content_bias)
    if need_key:
        grad_key_weight = _of_weight(_over_rows(content, grad_absorbed), key_weight)
    if need_value:
        grad_value_weight = _of_weight(_over_rows(dout, mixed.view(-1, heads, width)), value_weight)
    grad_rel_key = grad_position_bias = grad_rel_bias = none
    if grad_rel is not None:
        grad_rel = grad_rel.view(blocks * chunk_size, heads, -1)
        if rel_bias is not None and need_bias:
            grad_rel_bias = _summed(grad_rel[..., :columns], rel_bias).flip(1)
        if rel_key is not None and need_rel:
            position = q if position_bias is None else q + position_bias.to(q.dtype)
            grad_rel_key = _over_rows(grad_rel, position, scale)[:, :columns].flip(1)
        if rel_key is not None and (need_query or need_position):
            dposition = _per_head(grad_rel, _reversed_columns(rel_key), q.new_empty(q.shape), scale)
            if position_bias is not None and need_position:
                grad_position_bias = _summed(dposition, position_bias)
            if need_query:
                dq = dq + dposition
    grad_query = none
    if need_query:
        grad_query = query.new_empty(query.shape)
        grad_query[:, :shift] = 0.0
        grad_query[:, shift:] = dq.view(batch, -1, heads, head_dim)[:, : max(tokens - shift, 0)]
    grads = (
        grad_query,
        grad_states.view(states.shape) if need_states else none,
        grad_key_weight,
        grad_value_weight,
        grad_rel_key,
        grad_content_bias,
        grad_position_bias,
        grad_rel_bias,
    )
    # an op's results may not be one tensor twice
    return tuple(none.clone() if grad is none else grad for grad in grads)


def _of_weight(per_head: Tensor, weight: Tensor) -> Tensor:
    """[H, D, E] → [Hkv * D, E], the sum over the heads that share a key head."""
    _, head_dim, width = per_head.shape
    return per_head.view(weight.shape[0] // head_dim, -1, head_dim, width).sum(1).view(weight.shape)


def _summed(rows: Tensor, table: Tensor) -> Tensor:
    """The sum over rows [n, H, X] → [H, X], in float32 or wider."""
    return rows.sum(0, dtype=torch.promote_types(table.dtype, torch.float32)).to(table.dtype)


def _forward_fake(
    query: Tensor,
    states: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    rel_key: Tensor | None,
    content_bias: Tensor | None,
    position_bias: Tensor | None,
    rel_bias: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    chunk_size: int,
    scale: float,
    dropout_p: float,
    fused: bool,
    keep: bool,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, chunks, neighbours, neighbour_len, width = states.shape
    blocks, rows = batch * chunks, chunk_size * query.shape[2]
    return (
        query.new_empty(query.shape),
        query.new_empty((blocks, rows, neighbours * neighbour_len) if keep else (0,)),
        query.new_empty((blocks, rows, width) if keep else (0,)),
    )


def _backward_fake(
    grad_out: Tensor,
    weights: Tensor,
    mixed: Tensor,
    query: Tensor,
    states: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    rel_key: Tensor | None,
    content_bias: Tensor | None,
    position_bias: Tensor | None,
    rel_bias: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    chunk_size: int,
    scale: float,
    dropout_p: float,
    fused: bool,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    tensors = (query, states, key_weight, value_weight, rel_key, content_bias, position_bias, rel_bias)
    return tuple(
        query.new_empty((0,)) if x is None or not need else x.new_empty(x.shape)
        for x, need in zip(tensors, needs, strict=True)
    )


_INPUTS = (
    "Tensor query, Tensor states, Tensor key_weight, Tensor value_weight, Tensor? rel_key, Tensor? content_bias, "
    "Tensor? position_bias, Tensor? rel_bias, Tensor? lengths, Tensor? seed, int chunk_size, float scale, "
    "float dropout_p, bool fused"
)
_cca_absorbed_fwd = register(
    f"cca_absorbed_fwd({_INPUTS}, bool keep, Tensor? key_bias=None) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    # what an exported program does not keep is needed where it is trained; torch leaves out what is its default
    lambda *args: _AbsorbedCrossAttention.apply(args[15] if len(args) > 15 else None, *args[:14]),
    flops=flops.absorbed,
)
_cca_absorbed_bwd = register(
    f"cca_absorbed_bwd(Tensor grad_out, Tensor weights, Tensor mixed, {_INPUTS}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    flops=flops.absorbed_backward,
)


class _AbsorbedCrossAttention(torch.autograd.Function):
    """Keeps the inputs, the weights and the mixed states."""

    @staticmethod
    def forward(ctx: Any, key_bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        out, weights, mixed = without_autograd(_cca_absorbed_fwd, *args, True, key_bias)
        ctx.mark_non_differentiable(weights, mixed)
        ctx.set_materialize_grads(False)  # or there would be zeros in place of gradients of both
        ctx.save_for_backward(weights, mixed, *args[:10], key_bias)
        ctx.options = args[10:]
        return out, weights, mixed

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * len(ctx.needs_input_grad)
        args = (ctx.needs_input_grad[:9], grad_out, *ctx.saved_tensors, *ctx.options)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return (*_FirstDerivative.apply(*args), *(None,) * 6)  # create_graph=True
        return (*_gradients(*args), *(None,) * 6)


class _FirstDerivative(torch.autograd.Function):
    """The gradients once more as a node of the graph, so that differentiating them fails by name."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        return _gradients(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            'absorbed cross-attention has no second derivative on this backend; backend="reference" has one (slow).'
        )


def _gradients(needs: tuple[bool, ...], grad_out: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    saved, key_bias, options = args[:12], args[12], args[13:]
    wanted = [need and x is not None for need, x in zip(needs[1:], saved[2:10], strict=True)]
    grads = _cca_absorbed_bwd(grad_out, *saved, *options, wanted)
    of_key_bias = torch.zeros_like(key_bias) if key_bias is not None and needs[0] else None
    return (of_key_bias, *(grad if need else None for grad, need in zip(grads, wanted, strict=True)))


@casts
def absorbed_cross_attention(
    query: Tensor,
    states: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    *,
    key_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
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
    """`chunked_cross_attention` to linear projections of encoder states, without ever forming keys and values.

    Fewer operations than projecting where D is large against E / H (see `choose_projection`), and far less memory
    where there are many neighbours. Gradients for every floating tensor.

    Args:
        query: [B, N, H, D].
        states: [B, L, K, R, E] with L = N // M, the encoded neighbours; finite, for "triton" also behind a length.
        key_weight, value_weight: [Hkv * D, E], as of `torch.nn.Linear`; Hkv divides H.
        key_bias, value_bias: [Hkv * D]. A key bias adds the same to every logit of a row, so the softmax takes it
            away again: it changes nothing, and its gradient is zero.
        backend: "triton", "torch", "reference" (which does project), or None for the fastest that can run here.
        chunk_size, rel_key, content_bias, position_bias, rel_bias, neighbour_lengths, scale, dropout_p: as in
            `chunked_cross_attention`; with the same seed of torch's generator, the same weights are dropped.

    Returns:
        [B, N, H, D] in the query's dtype, contiguous. Rows t < M - 1 and rows with no key at all are exactly zero.

    Raises:
        ValueError: shapes, devices or numbers do not fit, or the asked backend cannot run here.
        TypeError: a dtype does not fit.

    Equivalent to:
        key, value = (linear(states, w, b).unflatten(-1, (-1, D)) for w, b in ((key_weight, key_bias), …))
        out = chunked_cross_attention(query, key, value, …)
    """
    name = "absorbed_cross_attention"
    options = _check(
        name,
        query,
        states,
        key_weight,
        value_weight,
        key_bias,
        value_bias,
        chunk_size,
        rel_key,
        content_bias,
        position_bias,
        rel_bias,
        neighbour_lengths,
    )
    query, states, key_weight, value_weight, key_bias, value_bias, rel_key, content_bias, position_bias = (
        options
    )
    heads, head_dim = query.shape[2:]
    scale, dropout_p = _checked_scale(name, scale, head_dim), _checked_dropout(name, dropout_p)
    transformed = why_not_transformed()
    candidates = {
        "triton": why_not_triton(query.device, query.dtype) or transformed,
        "torch": transformed,
        "reference": None,
    }
    if query.device.type == "cpu" and backend is None:
        candidates["triton"] = candidates["triton"] or "interpreted, and slow"
    empty = query.numel() == 0 or states.numel() == 0
    chosen = pick_backend(name, backend, dict.fromkeys(candidates) if empty else candidates)
    seed = torch.randint(2**63 - 1, (1,), device=query.device) if dropout_p > 0.0 else None
    if chosen == "reference" or empty:
        return _projected(
            query,
            states,
            key_weight,
            value_weight,
            key_bias,
            value_bias,
            rel_key,
            content_bias,
            position_bias,
            rel_bias,
            neighbour_lengths,
            seed,
            chunk_size,
            scale,
            dropout_p,
        )
    if value_bias is not None and dropout_p > 0.0:
        # the weights of a row no longer sum to one: the bias becomes one more column of the states, which is 1
        states = F.pad(F.pad(states, (0, 1), value=1.0), (0, 7))
        key_weight = F.pad(key_weight, (0, 8))
        value_weight = F.pad(torch.cat((value_weight, value_bias[:, None]), 1), (0, 7))
    args = (
        query,
        states,
        key_weight,
        value_weight,
        rel_key,
        content_bias,
        position_bias,
        rel_bias,
        neighbour_lengths,
        seed,
        chunk_size,
        scale,
        dropout_p,
        chosen == "triton",
    )
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (key_bias, *args[:8])):
        out, _, _ = _AbsorbedCrossAttention.apply(key_bias, *args)
    else:
        out, _, _ = without_autograd(_cca_absorbed_fwd, *args, False, key_bias)
    if value_bias is None or dropout_p > 0.0:
        return out
    bias = value_bias.view(-1, 1, head_dim).expand(-1, heads * head_dim // value_bias.shape[0], -1)
    attending = _attending(query, states, neighbour_lengths, rel_bias, chunk_size)
    return out + bias.reshape(heads, head_dim) * attending


def _attending(
    query: Tensor, states: Tensor, lengths: Tensor | None, rel_bias: Tensor | None, chunk_size: int
) -> Tensor:
    """1 for tokens which have any key, 0 for the others: [B, N, H or 1, 1] in the query's dtype."""
    tokens, shift = query.shape[1], chunk_size - 1
    column = relative_column(chunk_size, states.shape[3], query.device)
    present = have_keys(states, lengths, None if rel_bias is None else rel_bias[:, column])
    present = present.expand(-1, -1, -1, chunk_size).transpose(2, 3).flatten(1, 2)  # [B, L * M, H or 1]
    present = F.pad(present.to(query.dtype), (0, 0, shift, 0))
    # an index, and no slice, so that what is exported for any length serves all of them
    return present[:, torch.arange(tokens, device=query.device), :, None]


def have_keys(states: Tensor, lengths: Tensor | None, bias: Tensor | None) -> Tensor:
    """Which rows that attend to states [..., K, R, E] have any key: bool [..., H or 1, rows or 1].

    lengths: [..., K]. bias: [..., H, rows, R], which forbids keys where it is minus infinity."""
    neighbours, neighbour_len = states.shape[-3:-1]
    if lengths is None or neighbours == 0:
        longest = torch.full(states.shape[:-3], neighbour_len if neighbours else 0, device=states.device)
    else:
        longest = lengths.amax(-1)
    forbidden = 0 if bias is None else (bias == float("-inf")).cumprod(-1).sum(-1)  # of the leading keys
    return longest[..., None, None] > forbidden


def _projected(
    query: Tensor,
    states: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    key_bias: Tensor | None,
    value_bias: Tensor | None,
    rel_key: Tensor | None,
    content_bias: Tensor | None,
    position_bias: Tensor | None,
    rel_bias: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    chunk_size: int,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """The definition: project, then attend. Half precision is computed in float32 and rounded once at the end."""
    wide = torch.promote_types(query.dtype, torch.float32)
    states = _seen(states, lengths, fused=False)
    key, value = (
        F.linear(states.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
        .unflatten(-1, (-1, query.shape[-1]))
        .flatten(0, 1)
        for weight, bias in ((key_weight, key_bias), (value_weight, value_bias))
    )
    return block_attention_reference(
        query,
        key,
        value,
        rel_key,
        content_bias,
        position_bias,
        rel_bias,
        None if lengths is None else lengths.flatten(0, 1),
        seed,
        block=chunk_size,
        shift=chunk_size - 1,
        scale=scale,
        dropout_p=dropout_p,
    )


def _check(
    name: str,
    query: Tensor,
    states: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    key_bias: Tensor | None,
    value_bias: Tensor | None,
    chunk_size: int,
    rel_key: Tensor | None,
    content_bias: Tensor | None,
    position_bias: Tensor | None,
    rel_bias: Tensor | None,
    lengths: Tensor | None,
) -> list[Any]:
    """The tensors, the added ones in the query's dtype."""
    for label, tensor in (
        ("query", query),
        ("states", states),
        ("key_weight", key_weight),
        ("value_weight", value_weight),
    ):
        _check_float(name, label, tensor)
    if query.dim() != 4:
        raise ValueError(f"{name}: query has shape {tuple(query.shape)}; expected 4 dimensions [B, N, H, D].")
    if states.dim() != 5:
        raise ValueError(
            f"{name}: states has shape {tuple(states.shape)}; expected 5 dimensions [B, L, K, R, E]."
        )
    batch, tokens, heads, head_dim = query.shape
    neighbour_len, width = states.shape[3:]
    _check_count(name, "chunk_size", chunk_size)
    if states.shape[:2] != (batch, tokens // chunk_size):
        raise ValueError(
            f"{name}: states has a batch of {states.shape[0]} with {states.shape[1]:,} chunks, but query has one of "
            f"{batch} with {tokens:,} tokens and chunk_size is {chunk_size} ({tokens // chunk_size:,} chunks expected)."
        )
    if key_weight.dim() != 2:
        raise ValueError(f"{name}: key_weight has shape {tuple(key_weight.shape)}; expected [Hkv * D, E].")
    inner = key_weight.shape[0]
    if inner == 0 or inner % head_dim or heads * head_dim % inner:
        raise ValueError(
            f"{name}: key_weight has {inner} rows; they have to be Hkv * D with D = {head_dim} and Hkv a divisor of "
            f"the query's {heads} heads."
        )
    if position_bias is not None and rel_key is None:
        raise ValueError(
            f"{name}: position_bias is given without rel_key, where it has no effect. Give both."
        )
    columns = chunk_size + neighbour_len - 1
    for label, table, shape in (
        ("key_weight", key_weight, (inner, width)),
        ("value_weight", value_weight, (inner, width)),
        ("key_bias", key_bias, (inner,)),
        ("value_bias", value_bias, (inner,)),
        ("rel_key", rel_key, (heads, columns, head_dim)),
        ("content_bias", content_bias, (heads, head_dim)),
        ("position_bias", position_bias, (heads, head_dim)),
        ("rel_bias", rel_bias, (heads, columns)),
    ):
        if table is not None:
            _check_table(name, label, table, shape, query)
    if states.device != query.device:
        raise ValueError(f"{name}: query is on {query.device}, but states on {states.device}.")
    if lengths is not None:
        _check_lengths(name, "neighbour_lengths", lengths, tuple(states.shape[:3]), query)

    tensors: list[Any] = [
        query,
        states,
        key_weight,
        value_weight,
        key_bias,
        value_bias,
        rel_key,
        content_bias,
        position_bias,
    ]
    if len({x.dtype for x in tensors[:4]}) > 1:
        raise TypeError(
            f"{name}: query is {query.dtype}, states {states.dtype}, key_weight {key_weight.dtype} and value_weight "
            f"{value_weight.dtype}; they have to be the same (cast them, or use torch.autocast)."
        )
    for i in (4, 5, 6):  # what is added to products; the biases of the query are cast where they are added
        tensors[i] = None if tensors[i] is None else tensors[i].to(tensors[0].dtype)
    return tensors
