"""Block attention on a CPU: backend "torch".

The definition (`reference.py`) in groups of blocks whose logits fit a core's cache, with a closed-form backward that
makes them again: nothing but the inputs and the output is kept, and no tensor of all logits ever exists.

The position term is a matrix product with the *reversed* table, sheared for free. With C = TQ + TK − 1 and
r'[i, x] = (q_i + v)·rel_key[C − 1 − x], logit (i, c) reads column x = TQ − 1 − i + c, which is element
(TQ − 1) + i·(C − 1) + c of the block: a strided view.

Shapes: P blocks · G = P / repeat key groups · W = H / Hkv query heads of one key head · T = repeat·W·TQ rows that
share keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from retro_kernels.ops.cca.reference import dropout_keep, relative_column

_GROUP_BYTES = 1 << 20
"""Logits of one group of blocks. Tuned on an EPYC with 1 MiB of L2 a core: 512 KiB to 2 MiB differ by some per cent."""


@dataclass
class _Call:
    """What forward and backward share: the sizes, and the tensors cut into groups of blocks."""

    query: Tensor  # [P, TQ, H, D]
    key: Tensor  # [G, J * TK, Hkv, D]
    value: Tensor  # [G, J * TK, Hkv, D]
    reversed_key: Tensor | None  # [H, C, D]
    content_bias: Tensor | None
    position_bias: Tensor | None
    reversed_bias: Tensor | None  # [H, C], with `reversed_key` only
    bias_tile: Tensor | None  # [Hkv, 1, W, TQ, 1, TK], without `reversed_key` only
    missing: Tensor | None  # bool [G, J * TK]
    present: Tensor | None  # bool [G]; None where every group has a key
    seed: Tensor | None
    num_keys: int
    repeat: int
    scale: float
    dropout_p: float
    wide: torch.dtype
    narrow: torch.dtype

    def groups(self) -> Iterator[slice]:
        blocks, rows, heads, _ = self.query.shape
        item = rows * heads * self.key.shape[1] * self.repeat * self.wide.itemsize
        step = max(1, _GROUP_BYTES // max(item, 1))
        for start in range(0, self.key.shape[0], step):
            yield slice(start, min(start + step, self.key.shape[0]))

    def by_key_head(self, blocks: Tensor) -> Tensor:
        """[g·repeat, TQ, H, D] → [g·Hkv, T, D], the rows that share keys together."""
        count, rows, heads, size = blocks.shape
        kv_heads = self.key.shape[2]
        split = blocks.reshape(count // self.repeat, self.repeat, rows, kv_heads, heads // kv_heads, size)
        return split.permute(0, 3, 1, 4, 2, 5).reshape(-1, self.repeat * (heads // kv_heads) * rows, size)

    def to_blocks(self, rows: Tensor) -> Tensor:
        """The inverse: [g·Hkv, T, D] → [g·repeat, TQ, H, D], a view where it can be one."""
        _, num_rows, heads, size = self.query.shape
        kv_heads = self.key.shape[2]
        split = rows.view(-1, kv_heads, self.repeat, heads // kv_heads, num_rows, size)
        return split.permute(0, 2, 4, 1, 3, 5).reshape(-1, num_rows, heads, size)

    def keys(self, source: Tensor, group: slice) -> Tensor:
        """[g·Hkv, J·TK, D] of `key` or `value`."""
        return source[group].transpose(1, 2).to(self.narrow).reshape(-1, source.shape[1], source.shape[3])

    def blocks_of(self, group: slice) -> slice:
        return slice(group.start * self.repeat, group.stop * self.repeat)

    def content_query(self, group: slice) -> Tensor:
        return self.by_key_head(self._with_bias(group, self.content_bias))

    def position_query(self, group: slice) -> Tensor:
        """[H, g·repeat·TQ, D]"""
        query = self._with_bias(group, self.position_bias)
        return query.permute(2, 0, 1, 3).reshape(query.shape[2], -1, query.shape[3])

    def _with_bias(self, group: slice, bias: Tensor | None) -> Tensor:
        query = self.query[self.blocks_of(group)]
        # rounded to the inputs' dtype as the definition does, then scaled: a power of two for the usual head sizes
        return (query if bias is None else (query + bias).to(query.dtype)).to(self.narrow) * self.scale

    def sheared(self, by_distance: Tensor, count: int) -> Tensor:
        """[H, g·repeat·TQ, C] by reversed distance → view [g, Hkv, repeat, W, TQ, TK] by key."""
        _, rows, heads, _ = self.query.shape
        kv_heads, columns = self.key.shape[2], by_distance.shape[2]
        head = count * self.repeat * rows * columns
        return by_distance.as_strided(
            (count, kv_heads, self.repeat, heads // kv_heads, rows, self.num_keys),
            (self.repeat * rows * columns, (heads // kv_heads) * head, rows * columns, head, columns - 1, 1),
            by_distance.storage_offset() + rows - 1,
        )

    def split(self, logits: Tensor) -> Tensor:
        """[g·Hkv, T, J·TK] → view [g, Hkv, repeat, W, TQ, J, TK]"""
        _, rows, heads, _ = self.query.shape
        kv_heads = self.key.shape[2]
        return logits.view(
            -1,
            kv_heads,
            self.repeat,
            heads // kv_heads,
            rows,
            logits.shape[2] // self.num_keys,
            self.num_keys,
        )

    def weights(self, group: slice, content: Tensor, key: Tensor, position: Tensor | None) -> Tensor:
        """The softmax of one group, before dropout: [g·Hkv, T, J·TK] in the wide dtype."""
        logits = torch.bmm(content, key.transpose(1, 2)).to(self.wide)
        if position is not None:
            assert self.reversed_key is not None
            by_distance = torch.bmm(position, self.reversed_key.transpose(1, 2))
            if self.reversed_bias is not None:
                by_distance = by_distance.to(self.wide) + self.reversed_bias[:, None]
            self.split(logits).add_(self.sheared(by_distance, group.stop - group.start).unsqueeze(-2))
        elif self.bias_tile is not None:
            self.split(logits).add_(self.bias_tile)
        by_group = logits.view(group.stop - group.start, -1, logits.shape[2])
        if self.missing is not None:
            by_group.masked_fill_(self.missing[group, None], float("-inf"))
        torch.softmax(logits, -1, out=logits)
        if self.present is not None:
            by_group.mul_(self.present[group, None, None])
        return logits

    def dropout(self, group: slice) -> Tensor:
        """What the weights are multiplied by: [g·Hkv, T, J·TK]."""
        assert self.seed is not None
        _, rows, heads, _ = self.query.shape
        blocks = self.blocks_of(group)
        keep = dropout_keep(
            self.seed,
            (blocks.stop - blocks.start, heads, rows, self.key.shape[1]),
            self.dropout_p,
            first_block=blocks.start,
        )
        return self.by_key_head(keep.transpose(1, 2)).to(self.wide) / (1.0 - self.dropout_p)


def _prepare(
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
) -> _Call:
    num_keys, kv_heads = key.shape[2], key.shape[3]
    heads = query.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    narrow = query.dtype if query.dtype == torch.bfloat16 else wide  # float16 products are slow on CPUs
    missing = present = bias_tile = reversed_bias = None
    if lengths is not None:
        missing = (torch.arange(num_keys) >= lengths[..., None]).flatten(1)
        empty = missing.all(1)
        if empty.any():
            # a softmax over nothing is NaN: such a group attends to everything and is multiplied by zero
            missing, present = missing & ~empty[:, None], ~empty
    if rel_bias is not None and rel_key is not None:
        reversed_bias = rel_bias.to(wide).flip(1)
    elif rel_bias is not None:
        tile = rel_bias.to(wide)[:, relative_column(block, num_keys)]
        bias_tile = tile.view(kv_heads, 1, heads // kv_heads, block, 1, num_keys)
    return _Call(
        query=_blocks(query, block, shift, key.shape[0] * repeat),
        key=key.flatten(1, 2),
        value=value.flatten(1, 2),
        reversed_key=None if rel_key is None else rel_key.to(narrow).flip(1),
        content_bias=content_bias,
        position_bias=position_bias,
        reversed_bias=reversed_bias,
        bias_tile=bias_tile,
        missing=missing,
        present=present,
        seed=seed,
        num_keys=num_keys,
        repeat=repeat,
        scale=scale,
        dropout_p=dropout_p,
        wide=wide,
        narrow=narrow,
    )


def _blocks(rows: Tensor, block: int, shift: int, num_blocks: int) -> Tensor:
    """[S, N, H, D] → [P, TQ, H, D]: from row `shift` on, the last block of a sequence filled with zeros."""
    per_seq = num_blocks // rows.shape[0]
    used = rows[:, shift : shift + per_seq * block]
    if used.shape[1] < per_seq * block:
        used = F.pad(used, (0, 0, 0, 0, 0, per_seq * block - used.shape[1]))
    return used.reshape(num_blocks, block, *rows.shape[2:])


def _rows(blocks: Tensor, like: Tensor, shift: int) -> Tensor:
    """[P, TQ, H, D] → [S, N, H, D] with zeros before row `shift`: the inverse of `_blocks`."""
    num_seqs, num_rows = like.shape[:2]
    if shift == 0 and blocks.shape[0] * blocks.shape[1] == num_seqs * num_rows:
        return blocks.reshape(like.shape)
    out = like.new_empty(like.shape)
    first = min(shift, num_rows)
    out[:, :first] = 0
    sequences = blocks.reshape(num_seqs, -1, *blocks.shape[2:])
    filled = min(num_rows - first, sequences.shape[1])
    out[:, first : first + filled] = sequences[:, :filled]
    out[:, first + filled :] = 0
    return out


def forward(
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
) -> tuple[Tensor, Tensor]:
    """As `op.py` describes, but without a log-sum-exp (an empty tensor): the backward makes the softmax again."""
    call = _prepare(
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
    out = query.new_empty(call.query.shape)
    for group in call.groups():
        position = None if rel_key is None else call.position_query(group)
        weights = call.weights(group, call.content_query(group), call.keys(call.key, group), position)
        if dropout_p > 0.0:
            weights.mul_(call.dropout(group))
        summed = torch.bmm(weights.to(call.narrow), call.keys(call.value, group))
        out[call.blocks_of(group)] = call.to_blocks(summed)
    return _rows(out, query, shift), query.new_empty(0)


def backward(
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
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """As `op.py` describes. Gradients of tables and biases are summed group by group in one order."""
    call = _prepare(
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
    blocks = call.query.shape[0]
    heads, size = query.shape[2:]
    grad_blocks, out_blocks = _blocks(grad_out, block, shift, blocks), _blocks(out, block, shift, blocks)
    grad_query = query.new_empty(call.query.shape)
    grad_key, grad_value = key.new_empty(call.key.shape), value.new_empty(call.value.shape)
    grad_table = torch.zeros(heads, block + call.num_keys - 1, size, dtype=call.wide)
    grad_by_column = torch.zeros(heads, block + call.num_keys - 1, dtype=call.wide)
    grad_tile = torch.zeros(heads, block, call.num_keys, dtype=call.wide)
    grad_content, grad_position = (torch.zeros(heads, size, dtype=call.wide) for _ in range(2))
    by_distance = None
    for group in call.groups():
        count, cut = group.stop - group.start, call.blocks_of(group)
        content, keys, values = (
            call.content_query(group),
            call.keys(call.key, group),
            call.keys(call.value, group),
        )
        position = None if rel_key is None else call.position_query(group)
        weights = call.weights(group, content, keys, position)  # [g·Hkv, T, J·TK]
        grads = call.by_key_head(grad_blocks[cut].to(call.narrow))
        delta = (grad_blocks[cut].to(call.wide) * out_blocks[cut].to(call.wide)).sum(-1, keepdim=True)
        grad_logits = torch.bmm(grads, values.transpose(1, 2)).to(call.wide)
        if dropout_p > 0.0:
            factor = call.dropout(group)
            grad_logits.mul_(factor)
            kept = weights * factor
        else:
            kept = weights
        _put(grad_value, group, torch.bmm(kept.to(call.narrow).transpose(1, 2), grads))
        grad_logits.sub_(call.by_key_head(delta)).mul_(weights)
        narrow = grad_logits.to(call.narrow)
        _put(grad_key, group, torch.bmm(narrow.transpose(1, 2), content))
        grad_content_query = (
            call.to_blocks(torch.bmm(narrow, keys)).to(call.wide) * scale
        )  # [g·repeat, TQ, H, D]
        if needs[1]:
            grad_content += grad_content_query.sum((0, 1))
        if rel_key is not None:
            assert position is not None and call.reversed_key is not None
            rows = position.shape[1]
            if by_distance is None or by_distance.shape[1] != rows:
                by_distance = torch.zeros(heads, rows, block + call.num_keys - 1, dtype=call.narrow)
            by_neighbour = call.split(grad_logits)
            summed = by_neighbour.sum(-2) if by_neighbour.shape[-2] > 1 else by_neighbour.squeeze(-2)
            call.sheared(by_distance, count).copy_(summed)  # what the view leaves out stays zero
            grad_position_query = torch.bmm(by_distance, call.reversed_key).to(call.wide)
            grad_position_query = grad_position_query.view(heads, -1, block, size).permute(1, 2, 0, 3) * scale
            grad_content_query += grad_position_query
            if needs[0]:
                grad_table += torch.bmm(by_distance.transpose(1, 2), position)
            if needs[2]:
                grad_position += grad_position_query.sum((0, 1))
            if needs[3]:
                grad_by_column += by_distance.sum(1, dtype=call.wide)
        elif needs[3]:
            grad_tile += call.split(grad_logits).sum((0, 2, 5)).flatten(0, 1)
        grad_query[cut] = grad_content_query
    if rel_key is None and needs[3]:
        column = relative_column(block, call.num_keys).flatten().expand(heads, -1)
        grad_by_column.scatter_add_(1, column, grad_tile.flatten(1))
    elif needs[3]:
        grad_by_column = grad_by_column.flip(1)
    tables = (
        (rel_key, grad_table.flip(1)),
        (content_bias, grad_content),
        (position_bias, grad_position),
        (rel_bias, grad_by_column),
    )
    return (
        _rows(grad_query, query, shift),
        grad_key.view(key.shape),
        grad_value.view(value.shape),
        *(
            grad.to(x.dtype) if x is not None and need else None
            for (x, grad), need in zip(tables, needs, strict=True)
        ),
    )


def _put(target: Tensor, group: slice, result: Tensor) -> None:
    """[g·Hkv, J·TK, D] into [G, J·TK, Hkv, D]."""
    kv_heads = target.shape[2]
    target[group] = result.view(-1, kv_heads, *result.shape[1:]).transpose(1, 2)
