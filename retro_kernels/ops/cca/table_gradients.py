r"""Gradients of the position tables and biases of block attention, from what the main backward kernel writes down.

    d rel_bias[g] = Σ shear(dS)[·, g]                          partials by program, or by split
    d rel_key     = scale · (shear(dS)ᵀ q + d rel_bias ⊗ v)    a kernel over the stored, neighbour-summed shear(dS)
    d position_bias = scale · d rel_bias · rel_key
    d content_bias  = Σ_rows dQ − d position_bias

Two small kernels sum the partials in a fixed order: one by distance, one for the two biases. Where shear(dS) would take
much memory, blocks are worked on in a few slices, and it waits in the memory of dK that is not written yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from retro_kernels.ops.cca import launch, tiles
from retro_kernels.ops.cca.tiles import _load_tile

REL_SLICE = 64
"""Distance columns of one program of the kernel for rel_key, or twice as many; fewer if a window is no multiple."""

REL_SLOTS = 132
"""Programs of that kernel that a GPU is taken to run at a time: one for each multiprocessor of an H100. The same for
every GPU: into how many parts the sums are cut, and so their order, is to depend on shapes alone."""

MOST_WAVES = 4
"""Of such programs, where a single one would leave the last wave half empty. Each writes a partial sum of its own."""

MOST_SLICES = 10
"""Each is two launches more. Narrow heads with few keys and many blocks would need hundreds to stay within OWN_DS."""

OWN_DS = 2**21
"""Values of shear(dS) with memory of their own; what is more waits in that of dK for the kernel for rel_key."""


@triton.jit(do_not_specialize=["first_tile", "first_block", "last_block", "per_split"])
def _cca_bwd_rel_kernel(
    query,
    p_sheared,
    p_partial,
    p_columns,
    stride_qs,
    stride_qn,
    num_rows,
    num_heads,
    per_seq,
    first_tile,
    first_block,
    last_block,
    per_split,
    SHIFT: tl.constexpr,
    TQ: tl.constexpr,
    TK: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    W: tl.constexpr,
    WS: tl.constexpr,
    NEED_COLUMNS: tl.constexpr,
    BY_PRODUCT: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """shear(dS)ᵀ q for WS distance columns of one head and one tile, over a fixed share of the blocks from first_block
    to last_block, added to what earlier launches found; with NEED_COLUMNS also the sums of shear(dS) over the rows."""
    ROW_TILES: tl.constexpr = (TQ + BM - 1) // BM
    KEY_TILES: tl.constexpr = (TK + BN - 1) // BN
    SLICES: tl.constexpr = W // WS
    pid = tl.program_id(0)
    i_slice = pid % SLICES
    i_key_tile = pid // SLICES % KEY_TILES
    i_row_tile = pid // (SLICES * KEY_TILES) % ROW_TILES
    i_head = pid // (SLICES * KEY_TILES * ROW_TILES) % num_heads
    i_split = pid // (SLICES * KEY_TILES * ROW_TILES) // num_heads
    a = tl.arange(0, BM)
    t = tl.arange(0, WS)
    o_d = tl.arange(0, BD)
    o_i = i_row_tile * BM

    acc = tl.zeros([WS, BD], tl.float32)
    if NEED_COLUMNS and BY_PRODUCT:
        ones = tl.full([BM, 16], 1.0, query.dtype.element_ty)
        total = tl.zeros([WS, 16], tl.float32)
    elif NEED_COLUMNS:
        total = tl.zeros([WS, BM], tl.float32)
    begin = first_block + i_split * per_split
    for i_block in tl.range(begin, tl.minimum(last_block, begin + per_split)):
        o_row = i_block % per_seq * TQ + SHIFT + o_i
        m_row = (o_i + a < TQ) & (o_row + a < num_rows)
        b_q = _load_tile(
            query,
            i_block // per_seq,
            o_row,
            i_head * D,
            stride_qs,
            stride_qn,
            num_rows,
            m_row,
            BM,
            BD,
            D,
            True,
            False,
        )  # [BM, BD]
        i_tile = (tl.cast(i_block - first_block, tl.int64) * ROW_TILES + i_row_tile) * num_heads + i_head
        p_tile = p_sheared + (i_tile * KEY_TILES + i_key_tile + first_tile) * (BM * W)
        if KEYS_FIRST:
            by_distance = tl.load(p_tile + (i_slice * WS + t)[:, None] * BM + a[None, :])  # [WS, BM]
        else:
            by_distance = tl.trans(tl.load(p_tile + a[:, None] * W + (i_slice * WS + t)[None, :]))
        acc = tl.dot(by_distance, b_q, acc, input_precision=PRECISION)  # [WS, BD]
        if NEED_COLUMNS and BY_PRODUCT:
            total = tl.dot(by_distance, ones, total, input_precision=PRECISION)
        elif NEED_COLUMNS:
            total += by_distance
    later = tl.zeros([WS], tl.int32) + first_block > 0
    m_d = (o_d < D)[None, :]
    p_acc = p_partial + (pid.to(tl.int64) * WS + t)[:, None] * D + o_d[None, :]
    tl.store(p_acc, acc + tl.load(p_acc, mask=m_d & later[:, None], other=0.0), mask=m_d)
    if NEED_COLUMNS:
        p_sum = p_columns + pid.to(tl.int64) * WS + t
        columns = tl.sum(total, 1)
        if BY_PRODUCT:
            columns /= 16
        tl.store(p_sum, columns + tl.load(p_sum, mask=later, other=0.0))


@triton.jit(do_not_specialize=["splits"])
def _cca_bwd_columns_kernel(
    rel_key,
    p_position_bias,
    p_partial,
    p_columns,
    p_grad_rel,
    p_grad_bias,
    p_share,
    num_heads,
    stride_split,
    stride_row_tile,
    stride_head,
    stride_key_tile,
    scale,
    splits,
    TQ: tl.constexpr,
    TK: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    W: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
    NEED_REL: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    NEED_COLUMNS: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    NEED_SHARE: tl.constexpr,
):
    """Gradients of BC distance columns of one head, from what `splits` parts of the blocks found in the windows of the
    tiles, which overlap.

    p_partial: shear(dS)ᵀ q [splits, H, row tiles, key tiles, W, D]. p_columns: sums of shear(dS) over the rows
    [.., W]. p_share [H, programs, D]: Σ d rel_bias · rel_key over these columns.
    """
    ROW_TILES: tl.constexpr = (TQ + BM - 1) // BM
    KEY_TILES: tl.constexpr = (TK + BN - 1) // BN
    i_tile = tl.program_id(0)
    i_head = tl.program_id(1)
    g = i_tile * BC + tl.arange(0, BC)
    s = tl.arange(0, BS)
    o_d = tl.arange(0, BD)
    m_column = g < TQ + TK - 1
    m_rel = m_column[:, None] & (o_d < D)[None, :]
    # a thread adds up what it loads; the threads of a split meet once, at the end
    if NEED_REL:
        grad_rel = tl.zeros([BS, BC, BD], tl.float32)
    columns = tl.zeros([BS, BC], tl.float32)
    for i_row_tile in range(ROW_TILES):
        for i_key_tile in range(KEY_TILES):
            t = g - i_row_tile * BM + (i_key_tile + 1) * BN - TK
            inside = m_column & (t >= 0) & (t < W)
            for o_s in tl.range(0, splits, BS):
                i_split = (o_s + s).to(tl.int64)
                real = (o_s + s < splits)[:, None] & inside[None, :]
                if NEED_REL:
                    i_window = (
                        (i_split * num_heads + i_head) * ROW_TILES + i_row_tile
                    ) * KEY_TILES + i_key_tile
                    p = (p_partial + (i_window[:, None] * W + t[None, :]) * D)[:, :, None] + o_d[
                        None, None, :
                    ]
                    found = tl.load(p, mask=real[:, :, None] & (o_d < D)[None, None, :], other=0.0)
                    grad_rel += found
                if NEED_COLUMNS:
                    p = p_columns + i_head * stride_head + i_row_tile * stride_row_tile
                    p += i_key_tile * stride_key_tile
                    p = p + i_split[:, None] * stride_split + t[None, :]
                    columns += tl.load(p, mask=real, other=0.0)
    columns = tl.sum(columns, 0)  # [BC]
    at = (i_head * (TQ + TK - 1) + g)[:, None] * D + o_d[None, :]
    if NEED_REL:
        grad_rel = tl.sum(grad_rel, 0)  # [BC, BD]
        if HAS_POSITION:
            bias = tl.load(p_position_bias + i_head * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)
            grad_rel += columns[:, None] * bias[None, :]
        tl.store(p_grad_rel + at, (grad_rel * scale).to(p_grad_rel.dtype.element_ty), mask=m_rel)
    if NEED_BIAS:
        p = p_grad_bias + i_head * (TQ + TK - 1) + g
        tl.store(p, columns.to(p_grad_bias.dtype.element_ty), mask=m_column)
    if NEED_SHARE:
        rel = tl.load(rel_key + at, mask=m_rel, other=0.0).to(tl.float32)
        p = p_share + (i_head * tl.num_programs(0) + i_tile) * D + o_d
        tl.store(p, tl.sum(columns[:, None] * rel, 0), mask=o_d < D)


@triton.jit(do_not_specialize=["rows"])
def _cca_bwd_biases_kernel(
    p_share,
    p_rows,
    p_grad_content,
    p_grad_position,
    num_heads,
    shares,
    scale,
    rows,
    D: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
    HAS_SHARE: tl.constexpr,
    NEED_CONTENT: tl.constexpr,
    NEED_POSITION: tl.constexpr,
):
    """Gradients of BC columns of one head's two biases: of the position's from the shares of the distance columns, of
    the content's from the sums of dQ [rows, H, D] over each program's rows, less that."""
    i_head = tl.program_id(1)
    o_d = tl.program_id(0) * BC + tl.arange(0, BC)
    r = tl.arange(0, BR)
    m_d = o_d < D
    position = tl.zeros([BR, BC], tl.float32)
    if HAS_SHARE:
        for o_r in tl.range(0, shares, BR):
            p = p_share + (i_head * shares + o_r + r)[:, None] * D + o_d[None, :]
            position += tl.load(p, mask=(o_r + r < shares)[:, None] & m_d[None, :], other=0.0)
    position = tl.sum(position, 0) * scale  # [BC]
    if NEED_POSITION:
        tl.store(p_grad_position + i_head * D + o_d, position.to(p_grad_position.dtype.element_ty), mask=m_d)
    if NEED_CONTENT:
        content = tl.zeros([BR, BC], tl.float32)
        for o_r in tl.range(0, rows, BR):
            p = p_rows + ((o_r + r).to(tl.int64) * num_heads + i_head)[:, None] * D + o_d[None, :]
            content += tl.load(p, mask=(o_r + r < rows)[:, None] & m_d[None, :], other=0.0)
        content = tl.sum(content, 0) - position  # [BC]
        tl.store(p_grad_content + i_head * D + o_d, content.to(p_grad_content.dtype.element_ty), mask=m_d)


class Needs(NamedTuple):
    """Which gradients of tables are wanted, and what they take."""

    rel: bool
    content: bool
    position: bool
    bias: bool
    columns: bool
    """sums of dS by distance"""

    @staticmethod
    def of(
        needs: tuple[bool, ...],
        rel_key: Tensor | None,
        content_bias: Tensor | None,
        position_bias: Tensor | None,
        rel_bias: Tensor | None,
    ) -> Needs:
        tables = (rel_key, content_bias, position_bias, rel_bias)
        rel, content, position, bias = (need and x is not None for need, x in zip(needs, tables, strict=True))
        return Needs(rel, content, position, bias, bias or position or (content and rel_key is not None))


class Slice(NamedTuple):
    """Blocks that are worked on together."""

    first: int
    last: int
    tile: int | None
    """Where their shear(dS) goes, if it is kept: from this tile on in the memory of dK, which later blocks are to fill;
    None: in its own."""


def slices(blocks: int, tiles_each: int, tile_size: int, keys_each: int) -> list[Slice]:
    """Cuts the blocks so that the shear(dS) kept for the gradient of rel_key needs little memory of its own.

    Of a block it takes `tiles_each` tiles of `tile_size` values, dK `keys_each` values. While they are more than OWN_DS
    together, and not yet MOST_SLICES, those of as many blocks as fit there lie in the dK of blocks that are not yet
    reached.
    """
    found, first = [], 0
    while (blocks - first) * tiles_each * tile_size > OWN_DS and len(found) < MOST_SLICES - 1:
        last = first + (blocks - first) * keys_each // (keys_each + tiles_each * tile_size)
        tile = -(-last * keys_each // tile_size)
        while last > first and (tile + (last - first) * tiles_each) * tile_size > blocks * keys_each:
            last -= 1
            tile = -(-last * keys_each // tile_size)
        if last == first:
            break
        found.append(Slice(first, last, tile))
        first = last
    return [*found, Slice(first, blocks, None)]


class Scratch(NamedTuple):
    """What the kernels leave to each other, beside the gradients."""

    sheared: Tensor | None
    """shear(dS) of a slice that has no place in dK: [tiles, BM, W]; with keys first [tiles, W, BM]"""
    columns: Tensor | None
    """sums of shear(dS) over the rows: by program [P, row tiles, H, key tiles, W], or by split [.., H, row tiles,
    key tiles, W]"""
    rows: Tensor | None
    """sums of dQ over the rows of each program: [programs, D]"""
    partial: Tensor | None
    """shear(dS)ᵀ q: [splits, H, row tiles, key tiles, W, D]"""


class TableGradients:
    """The launches that follow the main kernel, for one kind of call.

    q: the query's rows [S, N, H * D]. window: W of the tiles of shear(dS). cut: how the blocks are worked on, if that
    is settled; else shear(dS) decides. keys_each: values of a block's dK. has_position: there is a position bias.
    """

    def __init__(
        self,
        need: Needs,
        q: Tensor,
        g: tiles.Geometry,
        config: tiles.Config,
        *,
        block: int,
        shift: int,
        num_keys: int,
        scale: float,
        window: int,
        cut: list[Slice] | None,
        keys_each: int,
        has_rel: bool,
        has_position: bool,
    ) -> None:
        self.need = need
        self._dtype, self._g = q.dtype, g
        self._key_tiles = triton.cdiv(num_keys, config.keys)
        self.column_window = triton.next_power_of_2(g.rows + config.keys - 1)
        self.window, self._keys_first = window, config.keys_first
        self._columns = need.columns or (need.rel and has_position)
        self.by_program = need.columns and not need.rel
        """the main kernel makes the sums by distance; else the one for rel_key does"""
        self._programs_each = g.row_tiles * g.num_heads
        self._tile = {"TQ": block, "TK": num_keys, "D": g.head_dim}
        self._blocks = {"BD": g.padded_dim, "BM": g.rows, "BN": config.keys}
        self._scale = scale

        self.slices = cut or [Slice(0, g.blocks, None)]
        self._splits = g.blocks
        self._rel: list[launch.Launch] = []
        if need.rel:
            if cut is None:
                tiles_each = self._programs_each * self._key_tiles
                self.slices = slices(g.blocks, tiles_each, g.rows * window, keys_each)
            self._rel = self._rel_launches(q, config, shift)
        columns = block + num_keys - 1
        each = 8 if need.rel else 16
        self._share_shape: tuple[int, ...] | None = None
        if (need.position or need.content) and has_rel:
            self._share_shape = (g.num_heads, triton.cdiv(columns, each), g.head_dim)
        self._has_position = has_position
        self._sums = self._sums_launch(each, columns) if need.rel or need.columns else None
        self._biases = self._biases_launch() if need.position or need.content else None
        self.launches = [*self._rel, *(x for x in (self._sums, self._biases) if x is not None)]

    def _rel_launches(self, q: Tensor, config: tiles.Config, shift: int) -> list[launch.Launch]:
        g = self._g
        arch = tiles.architecture(q.device)
        warps, stages, columns_each = _rel_blocks(arch, self._dtype, g, config.keys, self.window)
        parts = self._programs_each * self._key_tiles * (self.window // columns_each)
        most = max(1, min(triton.cdiv(g.blocks, 4), MOST_WAVES * REL_SLOTS // parts))
        self._splits = launch.splits(parts, g.blocks, REL_SLOTS, most)
        return [
            launch.Launch(
                _cca_bwd_rel_kernel,
                (self._splits * parts,),
                (),
                (
                    *q.stride()[:2],
                    g.num_rows,
                    g.num_heads,
                    g.per_seq,
                    part.tile or 0,
                    part.first,
                    part.last,
                    triton.cdiv(part.last - part.first, self._splits),
                ),
                {
                    "SHIFT": shift,
                    **self._tile,
                    **self._blocks,
                    "W": self.window,
                    "WS": columns_each,
                    "NEED_COLUMNS": self._columns,
                    # by one with ones, whose operand is in shared memory already; elsewhere it is in registers
                    "BY_PRODUCT": arch >= 90 and self._dtype != torch.float32 and g.padded_dim <= 128,
                    "KEYS_FIRST": config.keys_first,
                    "PRECISION": tiles.precision(self._dtype),
                },
                num_warps=warps,
                num_stages=stages,
            )
            for part in self.slices
        ]

    def _sums_launch(self, each: int, columns: int) -> launch.Launch:
        g, rel = self._g, self.need.rel
        window = self.window if rel else self.column_window
        steps = self._key_tiles * window
        # of the sums by distance: from split to split, row tile to row tile, head to head
        strides = (
            (self._programs_each * steps, steps, g.row_tiles * steps)
            if rel
            else (self._programs_each * steps, g.num_heads * steps, steps)
        )
        return launch.Launch(
            _cca_bwd_columns_kernel,
            (triton.cdiv(columns, each), g.num_heads),
            (),
            (g.num_heads, *strides, window, self._scale, self._splits),
            {
                **self._tile,
                **self._blocks,
                "W": window,
                "BC": each,
                "BS": 4 if rel else 256,
                "NEED_REL": rel,
                "HAS_POSITION": rel and self._has_position,
                "NEED_COLUMNS": self._columns,
                "NEED_BIAS": self.need.bias,
                "NEED_SHARE": self._share_shape is not None,
            },
            num_warps=4,
        )

    def _biases_launch(self) -> launch.Launch:
        g, columns_each = self._g, 16
        shares = 0 if self._share_shape is None else self._share_shape[1]
        return launch.Launch(
            _cca_bwd_biases_kernel,
            (triton.cdiv(g.head_dim, columns_each), g.num_heads),
            (),
            (g.num_heads, shares, self._scale, g.blocks * g.row_tiles),
            {
                "D": g.head_dim,
                "BC": columns_each,
                "BR": 128,
                "HAS_SHARE": self._share_shape is not None,
                "NEED_CONTENT": self.need.content,
                "NEED_POSITION": self.need.position,
            },
            num_warps=4,
        )

    def sheared(self, part: Slice, dk: Tensor, columns: int, tma: bool) -> launch.Window | None:
        """The window of `columns` distances into what the main kernel writes of shear(dS) for a slice. dk: as dK lies
        in memory."""
        if not self.need.rel:
            return None
        rows = self._g.rows
        count = self._own_tiles() if part.tile is None else dk.numel() // (rows * self.window)
        if self._keys_first:
            return launch.Window(dk.new_empty((count, self.window, rows)), columns, rows, tma)
        return launch.Window(dk.new_empty((count, rows, self.window)), rows, columns, tma)

    def _own_tiles(self) -> int:
        most = max(part.last - part.first for part in self.slices if part.tile is None)
        return most * self._programs_each * self._key_tiles

    def scratch(self, like: Tensor) -> Scratch:
        g, need = self._g, self.need
        sheared = columns = rows = partial = None
        if need.rel:
            sheared = like.new_empty((self._own_tiles(), g.rows, self.window))
            shape = (self._splits, g.num_heads, g.row_tiles, self._key_tiles, self.window)
            partial = like.new_empty((*shape, g.head_dim), dtype=torch.float32)
            columns = like.new_empty(shape, dtype=torch.float32) if self._columns else None
        elif need.columns:
            shape = (g.blocks, g.row_tiles, g.num_heads, self._key_tiles, self.column_window)
            columns = like.new_empty(shape, dtype=torch.float32)
        if need.content:
            rows = like.new_empty((g.blocks * self._programs_each, g.head_dim), dtype=torch.float32)
        return Scratch(sheared, columns, rows, partial)

    def add(self, i_slice: int, query: Tensor, sheared: Tensor | None, scratch: Scratch) -> None:
        """After the main kernel's launch for a slice."""
        if self._rel:
            self._rel[i_slice](query, sheared, scratch.partial, scratch.columns)

    def finish(
        self, scratch: Scratch, tables: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of rel_key, content_bias, position_bias and rel_bias, which `tables` are."""
        grad_rel, grad_content, grad_position, grad_bias = (
            x.new_empty(x.shape) if needed and x is not None else None
            for needed, x in zip(self.need, tables, strict=False)
        )
        share = None
        if self._share_shape is not None and tables[0] is not None:
            share = tables[0].new_empty(self._share_shape, dtype=torch.float32)
        if self._sums is not None:
            self._sums(tables[0], tables[2], scratch.partial, scratch.columns, grad_rel, grad_bias, share)
        if self._biases is not None:
            self._biases(share, scratch.rows, grad_content, grad_position)
        return grad_rel, grad_content, grad_position, grad_bias


def _rel_blocks(
    arch: int, dtype: torch.dtype, g: tiles.Geometry, keys: int, window: int
) -> tuple[int, int, int]:
    """Warps, stages and distance columns of a program of the kernel for rel_key.

    On sm_90 as measured there, when it sheared dS itself. Two stages of 256 dimensions in fp32 exceed what any GPU has.
    """
    wide = g.padded_dim > 64
    # those of float32 are too few for products of warpgroups, as are its rows (`tiles.most_rows`)
    columns = REL_SLICE // 2 if dtype == torch.float32 else REL_SLICE
    if tiles.hopper(arch) and dtype != torch.float32 and g.padded_dim <= 128 and max(g.rows, keys) <= 64:
        warps, stages, columns = 8, 3, 2 * REL_SLICE
    else:
        warps = 8 if wide or max(g.rows, keys) >= 128 else 4
        stages = 1 if dtype == torch.float32 and g.padded_dim > 128 else 2
    while window % columns:
        columns //= 2
    return warps, stages, columns
