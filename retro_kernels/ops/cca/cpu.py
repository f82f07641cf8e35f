"""Block attention on a CPU: backend "torch".

In float32 and bfloat16 and without dropout csrc does it where it can (`native.py`); everything else is done here:
the definition (`reference.py`) in units of blocks and heads whose logits fit a core's cache, with a closed-form
backward that makes them again: nothing but the inputs and the output is kept, and no tensor of all logits ever
exists. A unit's query, keys and values are views of the inputs wherever it is one block, which BLAS reads as they
lie; the last block of a sequence has as many rows as there are tokens, not M.

The position term is a matrix product with the *reversed* table, sheared for free. With C columns, of which the
first TQ + TK − 1 are r'[i, x] = (q_i + v)·rel_key[TQ + TK − 2 − x], logit (i, c) reads column x = TQ − 1 − i + c,
which is element (TQ − 1) + i·(C − 1) + c of the block: a strided view. A block of fewer rows is one of the same
table without its first columns.

Shapes: P blocks · G = P / repeat key groups · W = H / Hkv query heads of one key head · T = repeat·W·TQ rows
that share keys; of one unit g groups, h key heads and n = g·repeat blocks of r rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from retro_kernels.ops.cca import native
from retro_kernels.ops.cca.reference import dropout_keep, relative_column

_UNIT_BYTES = 1 << 20
"""The most logits of a unit, beyond which it takes a part of the heads. Blocks are taken together only up to half of
it, because their query, keys and values have to be copied. Tuned on a Xeon with 2 MiB of L2 a core."""
_ALIGN = 16
"""The table is filled up to so many columns: a leading dimension of whole cache lines makes the product
faster."""


class _Unit(NamedTuple):
    """Blocks and heads that are computed together: `blocks` of `rows` rows each, from row `first` of sequence `seq`."""

    seq: int
    first: int
    blocks: int
    rows: int
    group: slice  # of key groups
    heads: slice  # of key heads


@dataclass
class _Call:
    """What forward and backward share: the sizes, and views of the tensors by unit."""

    query: Tensor  # [S, N, H, D]
    key: Tensor  # [G, J * TK, Hkv, D]
    value: Tensor  # [G, J * TK, Hkv, D]
    reversed_key: Tensor | None  # [H, D, C]
    content_bias: Tensor | None
    position_bias: Tensor | None
    reversed_bias: Tensor | None  # [H, C], with `reversed_key` only
    bias_tile: Tensor | None  # [Hkv, 1, W, TQ, 1, TK], without `reversed_key` only
    hidden: Tensor | None  # bool [G, J * TK], keys behind a length
    missing: Tensor | None  # those of them whose logits are −inf: not where a group has no key
    absent: frozenset[int]  # groups without a key
    seed: Tensor | None
    num_keys: int
    block: int
    shift: int
    repeat: int
    scale: float
    dropout_p: float
    wide: torch.dtype
    narrow: torch.dtype

    @property
    def share(self) -> int:
        """W"""
        return self.query.shape[2] // self.key.shape[2]

    def units(self) -> Iterator[_Unit]:
        num_seqs, num_rows = self.query.shape[:2]
        groups = self.key.shape[0] // num_seqs
        full = (num_rows - self.shift) // (self.block * self.repeat)  # groups of which every row exists
        for seq in range(num_seqs):
            yield from self._units(seq, 0, full, self.block)
            if full < groups:
                yield from self._units(seq, full, groups, num_rows - self.shift - full * self.block)

    def _units(self, seq: int, start: int, stop: int, rows: int) -> Iterator[_Unit]:
        """Groups `start` … `stop` of one sequence. Several at a time where they are small, and where there are more
        threads than heads; a part of the heads at a time where one group is too large."""
        kv_heads, num_seqs = self.key.shape[2], self.query.shape[0]
        size = self.repeat * self.share * rows * self.key.shape[1] * self.wide.itemsize  # of one key head
        threads = torch.get_num_threads()
        parts = -(-kv_heads // min(kv_heads, max(threads, _UNIT_BYTES // size, 1)))
        heads = -(-kv_heads // parts)
        step = max(1, _UNIT_BYTES // 2 // (size * kv_heads), -(-threads // kv_heads))
        base = seq * (self.key.shape[0] // num_seqs)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            for head in range(0, kv_heads, heads):
                yield _Unit(
                    seq,
                    self.shift + first * self.repeat * self.block,
                    (last - first) * self.repeat,
                    rows,
                    slice(base + first, base + last),
                    slice(head, min(head + heads, kv_heads)),
                )

    def rows(self, x: Tensor, unit: _Unit) -> Tensor:
        """[S, N, H, D] → view [n, r, h·W, D]"""
        rows = x[unit.seq, unit.first : unit.first + unit.blocks * unit.rows, self.query_heads(unit)]
        return rows.unflatten(0, (unit.blocks, unit.rows))

    def query_heads(self, unit: _Unit) -> slice:
        return slice(unit.heads.start * self.share, unit.heads.stop * self.share)

    def by_key_head(self, rows: Tensor) -> Tensor:
        """[n, r, h·W, D] → [g·h, T, D], the rows that share keys together."""
        blocks, count, heads, size = rows.shape
        split = rows.view(-1, self.repeat, count, heads // self.share, self.share, size)
        return split.permute(0, 3, 1, 4, 2, 5).reshape(-1, self.repeat * self.share * count, size)

    def by_row(self, by_key_head: Tensor, unit: _Unit) -> Tensor:
        """The inverse, a view."""
        heads = unit.heads.stop - unit.heads.start
        size = by_key_head.shape[2]
        split = by_key_head.view(-1, heads, self.repeat, self.share, unit.rows, size).permute(
            0, 2, 4, 1, 3, 5
        )
        return split.reshape(unit.blocks, unit.rows, heads * self.share, size)

    def keys(self, source: Tensor, unit: _Unit) -> Tensor:
        """[g·h, J·TK, D] of `key` or `value`."""
        some = source[unit.group, :, unit.heads].transpose(1, 2).to(self.narrow)
        if self.hidden is not None:  # a weight of zero is not enough: whatever lies there may be NaN
            some = some.masked_fill(self.hidden[unit.group, None, :, None], 0.0)
        return some.reshape(-1, source.shape[1], source.shape[3])

    def scaled_query(self, unit: _Unit, bias: Tensor | None) -> Tensor:
        """[n, r, h·W, D]: rounded to the inputs' dtype as the definition does, then scaled."""
        query = self.rows(self.query, unit)
        if bias is not None:
            query = (query + bias[self.query_heads(unit)]).to(query.dtype)
        return query.to(self.narrow) * self.scale

    def content_query(self, unit: _Unit) -> Tensor:
        return self.by_key_head(self.scaled_query(unit, self.content_bias))

    def position_query(self, unit: _Unit) -> Tensor:
        """[h·W, n·r, D]"""
        query = self.scaled_query(unit, self.position_bias)
        return query.permute(2, 0, 1, 3).reshape(query.shape[2], -1, query.shape[3])

    def table(self, unit: _Unit) -> Tensor:
        """The columns that this unit's rows can reach: [h·W, D, C]."""
        assert self.reversed_key is not None
        return self.reversed_key[self.query_heads(unit), :, self.block - unit.rows :]

    def sheared(self, by_distance: Tensor, unit: _Unit) -> Tensor:
        """[h·W, n·r, C] by reversed distance → view [g, h, repeat, W, r, TK] by key."""
        rows, columns = unit.rows, by_distance.shape[2]
        head = unit.blocks * rows * columns
        return by_distance.as_strided(
            (
                unit.group.stop - unit.group.start,
                unit.heads.stop - unit.heads.start,
                self.repeat,
                self.share,
                rows,
                self.num_keys,
            ),
            (self.repeat * rows * columns, self.share * head, rows * columns, head, columns - 1, 1),
            by_distance.storage_offset() + rows - 1,
        )

    def split(self, logits: Tensor, unit: _Unit) -> Tensor:
        """[g·h, T, J·TK] → view [g, h, repeat, W, r, J, TK]"""
        heads = unit.heads.stop - unit.heads.start
        return logits.view(
            -1, heads, self.repeat, self.share, unit.rows, logits.shape[2] // self.num_keys, self.num_keys
        )

    def weights(self, unit: _Unit, content: Tensor, key: Tensor, position: Tensor | None) -> Tensor:
        """The softmax of one unit, before dropout: [g·h, T, J·TK] in the wide dtype."""
        logits = self.logits(unit, content, key, position)
        torch.softmax(logits, -1, out=logits)
        if logits[..., 0].isnan().any():  # of a row whose logits are all −inf, which has no key; or of a NaN
            again = self.logits(unit, content, key, position)
            logits.masked_fill_(again.amax(-1, keepdim=True) == float("-inf"), 0.0)
        by_group = logits.view(unit.group.stop - unit.group.start, -1, logits.shape[2])
        for i, group in enumerate(range(unit.group.start, unit.group.stop)):
            if group in self.absent:
                by_group[i].zero_()
        return logits

    def logits(self, unit: _Unit, content: Tensor, key: Tensor, position: Tensor | None) -> Tensor:
        """[g·h, T, J·TK]"""
        logits = torch.bmm(content, key.transpose(1, 2)).to(self.wide)
        if position is not None:
            by_distance = torch.bmm(position, self.table(unit))
            if self.reversed_bias is not None:
                bias = self.reversed_bias[self.query_heads(unit), None, self.block - unit.rows :]
                by_distance = by_distance.to(self.wide) + bias
            self.split(logits, unit).add_(self.sheared(by_distance, unit).unsqueeze(-2))
        elif self.bias_tile is not None:
            self.split(logits, unit).add_(self.bias_tile[unit.heads, :, :, : unit.rows])
        by_group = logits.view(unit.group.stop - unit.group.start, -1, logits.shape[2])
        if self.missing is not None:
            by_group.masked_fill_(self.missing[unit.group, None], float("-inf"))
        return logits

    def dropout(self, unit: _Unit) -> Tensor:
        """What the weights are multiplied by: [g·h, T, J·TK]."""
        assert self.seed is not None
        keep = dropout_keep(
            self.seed,
            (unit.blocks, self.query.shape[2], unit.rows, self.key.shape[1]),
            self.dropout_p,
            first_block=unit.group.start * self.repeat,
        )
        keep = keep[:, self.query_heads(unit)].transpose(1, 2)
        return self.by_key_head(keep.contiguous()).to(self.wide) / (1.0 - self.dropout_p)


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
    hidden = missing = bias_tile = reversed_key = reversed_bias = None
    absent: frozenset[int] = frozenset()
    if lengths is not None:
        hidden = missing = (torch.arange(num_keys) >= lengths[..., None]).flatten(1)
        empty = missing.all(1)
        if empty.any():
            # a softmax over nothing is NaN: such a group attends to everything, and its weights become zero
            missing, absent = missing & ~empty[:, None], frozenset(empty.nonzero().flatten().tolist())
    if rel_key is not None:
        filling = -(block + num_keys - 1) % _ALIGN
        reversed_key = F.pad(rel_key.to(narrow).flip(1).transpose(1, 2), (0, filling)).contiguous()
        if rel_bias is not None:
            reversed_bias = F.pad(rel_bias.to(wide).flip(1), (0, filling))
    elif rel_bias is not None:
        tile = rel_bias.to(wide)[:, relative_column(block, num_keys)]
        bias_tile = tile.view(kv_heads, 1, heads // kv_heads, block, 1, num_keys)
    return _Call(
        query=_sequences(query, block, shift, repeat),
        key=key.flatten(1, 2),
        value=value.flatten(1, 2),
        reversed_key=reversed_key,
        content_bias=content_bias,
        position_bias=position_bias,
        reversed_bias=reversed_bias,
        bias_tile=bias_tile,
        hidden=hidden,
        missing=missing,
        absent=absent,
        seed=seed,
        num_keys=num_keys,
        block=block,
        shift=shift,
        repeat=repeat,
        scale=scale,
        dropout_p=dropout_p,
        wide=wide,
        narrow=narrow,
    )


@dataclass
class _Tables:
    """Gradients of the position tables, summed over the units. Reversed as the tables are, and not scaled yet."""

    call: _Call
    needs: tuple[bool, ...]

    def __post_init__(self) -> None:
        call = self.call
        heads, size = call.query.shape[2:]
        kv_heads = call.key.shape[2]
        columns = call.block + call.num_keys - 1
        filled = columns if call.reversed_key is None else call.reversed_key.shape[2]
        self.key = torch.zeros(heads, filled, size, dtype=call.wide)
        self.content, self.position = (torch.zeros(heads, size, dtype=call.wide) for _ in range(2))
        self.bias = torch.zeros(heads, filled, dtype=call.wide)
        self.tile = torch.zeros(kv_heads, call.share, call.block, call.num_keys, dtype=call.wide)
        self.by_distance = torch.empty(0, dtype=call.narrow)

    def add(self, unit: _Unit, grad_logits: Tensor, grad_query: Tensor, position: Tensor | None) -> Tensor:
        """Adds what this unit gives; returns the gradient of its query [n, r, h·W, D] with the position's part."""
        call, heads = self.call, self.call.query_heads(unit)
        by_key = call.split(grad_logits, unit)
        if self.needs[1]:
            self.content[heads] += grad_query.sum((0, 1))
        if position is None:
            if self.needs[3]:
                summed = _over_neighbours(by_key)
                self.tile[unit.heads, :, : unit.rows] += (
                    summed[0, :, 0] if unit.blocks == 1 else summed.sum((0, 2))
                )
            return grad_query
        table, columns = call.table(unit), slice(call.block - unit.rows, None)
        shape = (position.shape[0], position.shape[1], table.shape[2])
        if self.by_distance.shape != shape:
            self.by_distance = torch.zeros(shape, dtype=call.narrow)
        _over_neighbours(by_key, call.sheared(self.by_distance, unit))  # what the view leaves out stays zero
        by_position = torch.bmm(self.by_distance, table.transpose(1, 2)).to(call.wide)
        by_position = by_position.view(shape[0], unit.blocks, unit.rows, -1)
        if self.needs[0]:
            self.key[heads, columns] += torch.bmm(self.by_distance.transpose(1, 2), position)
        if self.needs[2]:
            self.position[heads] += by_position.sum((1, 2))
        if self.needs[3]:
            self.bias[heads, columns] += self.by_distance.sum(1, dtype=call.wide)
        return grad_query + by_position.permute(1, 2, 0, 3)

    def finished(self) -> tuple[Tensor, ...]:
        """Of rel_key, content_bias, position_bias and rel_bias."""
        call = self.call
        columns = call.block + call.num_keys - 1
        bias = self.bias[:, :columns].flip(1)
        if call.reversed_key is None and self.needs[3]:
            column = relative_column(call.block, call.num_keys).flatten().expand(bias.shape[0], -1)
            bias.scatter_add_(1, column, self.tile.view(bias.shape[0], -1))
        return self.key[:, :columns].flip(1), self.content * call.scale, self.position * call.scale, bias


def _over_neighbours(by_key: Tensor, out: Tensor | None = None) -> Tensor:
    """[…, J, TK] → its sum over J, in `out` where it is given."""
    count = by_key.shape[-2]
    if count == 2:  # torch.sum over so few takes longer
        return torch.add(by_key[..., 0, :], by_key[..., 1, :], out=out)
    if count > 1:
        return torch.sum(by_key, -2, out=out)
    return by_key.squeeze(-2) if out is None else out.copy_(by_key.squeeze(-2))


def _sequences(rows: Tensor, block: int, shift: int, repeat: int) -> Tensor:
    """[S, N, H, D], as one sequence where no row lies outside a block: their blocks can then be taken together."""
    whole = (
        shift == 0 and rows.shape[0] * rows.shape[1] % (block * repeat) == 0 and rows.shape[1] % block == 0
    )
    return rows.reshape(1, -1, *rows.shape[2:]) if whole else rows


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
    if native.can_run(query, dropout_p):
        attention = native.Attention(
            query,
            key,
            value,
            rel_key,
            content_bias,
            position_bias,
            rel_bias,
            lengths,
            block,
            shift,
            repeat,
            scale,
        )
        return attention.forward(), query.new_empty(0)
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
    out = query.new_empty(query.shape)
    out[:, :shift] = 0
    out_rows = _sequences(out, block, shift, repeat)
    for unit in call.units():
        position = None if rel_key is None else call.position_query(unit)
        weights = call.weights(unit, call.content_query(unit), call.keys(call.key, unit), position)
        if dropout_p > 0.0:
            weights.mul_(call.dropout(unit))
        summed = torch.bmm(weights.to(call.narrow), call.keys(call.value, unit))
        call.rows(out_rows, unit).copy_(call.by_row(summed, unit))
    return out, query.new_empty(0)


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
    """As `op.py` describes. Gradients of tables and biases are summed unit by unit in one order."""
    given = (rel_key, content_bias, position_bias, rel_bias)
    if native.can_run(query, dropout_p):
        attention = native.Attention(
            query,
            key,
            value,
            rel_key,
            content_bias,
            position_bias,
            rel_bias,
            lengths,
            block,
            shift,
            repeat,
            scale,
        )
        found = attention.backward(grad_out, out)
        return (*found[:3], *_wanted(found[3:], given, needs))
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
    heads, size = query.shape[2:]
    grad_out = _sequences(grad_out, block, shift, repeat)
    grad_query = query.new_empty(query.shape)
    grad_query[:, :shift] = 0
    query_rows = _sequences(grad_query, block, shift, repeat)
    grad_key, grad_value = key.new_empty(call.key.shape), value.new_empty(call.value.shape)
    tables = _Tables(call, needs)
    for unit in call.units():
        content, keys, values = (
            call.content_query(unit),
            call.keys(call.key, unit),
            call.keys(call.value, unit),
        )
        position = None if rel_key is None else call.position_query(unit)
        weights = call.weights(unit, content, keys, position)  # [g·h, T, J·TK]
        grads = call.by_key_head(call.rows(grad_out, unit).to(call.narrow))
        grad_logits = torch.bmm(grads, values.transpose(1, 2)).to(call.wide)
        kept = weights
        if dropout_p > 0.0:
            factor = call.dropout(unit)
            grad_logits.mul_(factor)
            kept = weights * factor
        _put(grad_value, unit, torch.bmm(kept.to(call.narrow).transpose(1, 2), grads))
        _softmax_backward(grad_logits, weights)
        narrow = grad_logits.to(call.narrow)
        _put(grad_key, unit, torch.bmm(narrow.transpose(1, 2), content))
        grad_rows = call.by_row(torch.bmm(narrow, keys), unit).to(call.wide)  # [n, r, h·W, D]
        grad_rows = tables.add(unit, grad_logits, grad_rows, position)
        torch.mul(grad_rows, scale, out=call.rows(query_rows, unit))
    return (
        grad_query,
        grad_key.view(key.shape),
        grad_value.view(value.shape),
        *_wanted(tables.finished(), given, needs),
    )


def _wanted(
    grads: tuple[Tensor, ...], given: tuple[Tensor | None, ...], needs: tuple[bool, ...]
) -> Iterator[Tensor | None]:
    for x, grad, need in zip(given, grads, needs, strict=True):
        yield grad.to(x.dtype) if x is not None and need else None


def _softmax_backward(grad: Tensor, weights: Tensor) -> None:
    """The gradient of the weights [·, T, keys] → that of the logits, in place: weights·(grad − Σ weights·grad)."""
    torch.ops.aten._softmax_backward_data.out(grad, weights, -1, grad.dtype, grad_input=grad)


def _put(target: Tensor, unit: _Unit, result: Tensor) -> None:
    """[g·h, J·TK, D] into [G, J·TK, Hkv, D]."""
    heads = unit.heads.stop - unit.heads.start
    target[unit.group, :, unit.heads] = result.view(-1, heads, *result.shape[1:]).transpose(1, 2)
