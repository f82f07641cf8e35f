"""The attention layers of RETRO. Every one is pre-norm and returns what is to be added to its input.

B batch, N tokens, L chunks, M chunk size, K neighbours, R tokens per neighbour, H heads, D head dimension.
"""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import as_integer
from ..ops import (
    absorbed_cross_attention,
    absorbed_decode,
    block_attention,
    choose_projection,
    chunked_cross_attention,
    chunked_cross_attention_decode,
)
from .layers import is_quantised
from .positions import DistanceTable, causal_sinusoids, rotate

if TYPE_CHECKING:
    from .cache import SelfAttentionCache

_FEW_ROWS = 4  # of a chunk: what decoding kernels are for
_ROWS = 256  # query rows whose logits [H, rows, N] exist at one time


def _refuse_scripting(module: nn.Module) -> NoReturn:
    """What torch.jit.script calls first, which else fails at an annotation and could not call the kernels anyway."""
    raise TypeError(
        f"{type(module).__name__}: torch.jit.script cannot take it. Use torch.export to save it, or torch.compile."
    )


class SelfAttention(nn.Module):
    """Causal self-attention of the decoder, distance d = i − j ≥ 0.

    `position="relative"` is Transformer-XL (Dai et al. 2019) with `rel_proj`, `content_bias` and `position_bias`,
    as the paper has it; `"rotary"` has no such parameters and runs on PyTorch's fused attention.
    The dropout is that of the output. Parameters otherwise: `q_proj`, `k_proj`, `v_proj`, `o_proj`.
    """

    __prepare_scriptable__ = _refuse_scripting

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        position: str = "relative",
        dropout: float = 0.0,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        head_dim = _head_dim(dim, num_heads, head_dim)
        if position not in ("relative", "rotary"):
            raise ValueError(f'SelfAttention: position is {position!r}; it must be "relative" or "rotary".')
        if position == "rotary" and head_dim % 2:
            raise ValueError(
                f"SelfAttention: head_dim is {head_dim}; rotary positions turn pairs: it must be even."
            )
        self.dim, self.num_heads, self.head_dim, self.position = dim, num_heads, head_dim, position
        inner = num_heads * head_dim
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(dim, inner, bias=bias, **made)
        self.k_proj = nn.Linear(dim, inner, bias=bias, **made)
        self.v_proj = nn.Linear(dim, inner, bias=bias, **made)
        self.o_proj = nn.Linear(inner, dim, bias=bias, **made)
        if position == "relative":
            self.rel_proj = nn.Linear(dim, inner, bias=False, **made)
            self.content_bias = nn.Parameter(torch.zeros(num_heads, head_dim, **made))
            self.position_bias = nn.Parameter(torch.zeros(num_heads, head_dim, **made))
        self.dropout = nn.Dropout(dropout)

    def reset_parameters(self) -> None:
        """Sets the biases, which are this module's own, to zero, as is needed after `to_empty`."""
        _zero_own(self)

    def relative_keys(self, sinusoids: Tensor) -> Tensor:
        """φ of some distances [G, dim] → their keys [H, G, D]."""
        return _heads(self.rel_proj(sinusoids.to(self.content_bias.dtype)), self.num_heads)

    def forward(
        self, x: Tensor, *, sinusoids: Tensor | None = None, cache: SelfAttentionCache | None = None
    ) -> Tensor:
        """`x` [B, T, dim] → [B, T, dim]. With a cache, x are the tokens after those that the cache holds.

        `sinusoids` [T, dim] is `causal_sinusoids(T, dim, x)`, if the caller has it at hand for several layers.
        """
        q, k, v = (p(x).unflatten(-1, (self.num_heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
        past = 0 if cache is None else cache.length
        if self.position == "rotary":
            q, k = rotate(q, past), rotate(k, past)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # [B, H, T, D]
        if cache is not None:
            k, v = cache.append(k, v)  # [B, H, past + T, D]
        if self.position == "rotary":
            out = _rotary_attention(q, k, v)
        else:
            if cache is not None:
                rel = cache.relative_keys(self)
            else:
                made = causal_sinusoids(x.shape[1], self.dim, x) if sinusoids is None else sinusoids
                rel = self.relative_keys(made)
            out = relative_attention(q, k, v, rel, self.content_bias, self.position_bias)
        return self.dropout(self.o_proj(out.transpose(1, 2).flatten(2)))


def _rotary_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows, past = q.shape[2], k.shape[2] - q.shape[2]
    if past == 0:  # compiled for any length, this is no bool that could be handed on
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if rows == 1:
        return F.scaled_dot_product_attention(q, k, v)
    seen = torch.ones(rows, past + rows, dtype=torch.bool, device=q.device).tril(past)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def relative_attention(
    q: Tensor, k: Tensor, v: Tensor, rel: Tensor, content_bias: Tensor, position_bias: Tensor
) -> Tensor:
    """Causal attention with relative keys. The T queries are the last T of the S tokens of `k` and `v`.

    q [B, H, T, D], k and v [B, H, S, D], rel [H, S, D] with the distances S−1 … 0, both biases [H, D] → [B, H, T, D].
    A CPU takes its kernels of `block_attention`. Elsewhere, and where torch.compile fuses it, the logits exist for
    `_ROWS` query rows at a time; a gradient recomputes those of a longer sequence.
    """
    rows, past = q.shape[2], k.shape[2] - q.shape[2]
    if rows == 0:
        return torch.zeros_like(q)
    if _kernels_pay(q):
        return _by_block_attention(q, k, v, rel, content_bias, position_bias)
    parts = []
    blocks = (rows + _ROWS - 1) // _ROWS
    for number in range(blocks):  # compiled for any length, a program serves all of as many blocks
        start = number * _ROWS
        stop = rows if number == blocks - 1 else start + _ROWS
        block = (
            q[:, :, start:stop],
            k[:, :, : past + stop],
            v[:, :, : past + stop],
            rel[:, rows - stop :],
            content_bias,
            position_bias,
        )
        if rows > _ROWS and torch.is_grad_enabled():
            parts.append(checkpoint(_relative_rows, *block, use_reentrant=False))
        else:
            parts.append(_relative_rows(*block))
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]


def _kernels_pay(q: Tensor) -> bool:
    """For self-attention of queries [B, H, T, D]. The threads of a CPU share out sequences and heads."""
    if q.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return q.shape[2] > _FEW_ROWS and q.shape[0] * q.shape[1] >= torch.get_num_threads()


def _by_block_attention(
    q: Tensor, k: Tensor, v: Tensor, rel: Tensor, content_bias: Tensor, position_bias: Tensor
) -> Tensor:
    """A block of rows attends to the keys up to its last row. Those behind a row, to which distances are negative, are
    forbidden by a bias."""
    rows, seen = q.shape[2], k.shape[2]
    size = 128 if rows <= 512 else 256
    keys = F.pad(rel.flip(1), (0, 0, size - 1, 0))  # [H, size − 1 + S, D], distances 1 − size … S − 1
    bias = q.new_zeros(keys.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    bias[:, : size - 1] = float("-inf")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    parts = []
    for start in range(0, rows, size):
        block = q[:, start : start + size]
        count = block.shape[1]
        stop = seen - rows + start + count
        columns = slice(size - count, size - 1 + stop)  # distances 1 − count … stop − 1
        parts.append(
            block_attention(
                block,
                k[:, None, :stop],
                v[:, None, :stop],
                rel_key=keys[:, columns],
                content_bias=content_bias,
                position_bias=position_bias,
                rel_bias=bias[:, columns],
            )
        )
    return torch.cat(parts, 1).transpose(1, 2)


def _relative_rows(
    q: Tensor, k: Tensor, v: Tensor, rel: Tensor, content_bias: Tensor, position_bias: Tensor
) -> Tensor:
    batch, heads, rows, head_dim = q.shape
    seen = k.shape[2]
    scale = head_dim**-0.5
    q_content = (q + content_bias[:, None]).to(q.dtype) * scale
    q_position = (q + position_bias[:, None]).to(q.dtype) * scale
    # one product for all sequences, since a product by sequence would copy `rel` for each of them: [H, B, rows, seen]
    by_distance = torch.bmm(q_position.transpose(0, 1).flatten(1, 2), rel.to(q.dtype).transpose(1, 2))
    # Column c of the last row is key c. Row a, which is rows − 1 − a tokens earlier, reads rows − 1 − a columns further
    # right; with one column of padding that shear is a reshape. What wraps around lies in the future, masked below.
    by_row = F.pad(by_distance.unflatten(1, (batch, rows)), (0, 1)).flatten(2)
    sheared = by_row[:, :, rows - 1 : rows - 1 + rows * seen].unflatten(2, (rows, seen)).transpose(0, 1)
    logits = q_content @ k.transpose(2, 3) + sheared
    if rows > 1:
        future = torch.ones(rows, seen, dtype=torch.bool, device=q.device).triu(seen - rows + 1)
        logits = logits.masked_fill(future, float("-inf"))
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.softmax(logits, -1, dtype=wide).to(v.dtype) @ v


class ChunkedCrossAttention(nn.Module):
    """Attention of every chunk to the neighbours of the chunk before it (Borgeaud et al. 2021, §2.4).

    Token t ≥ M−1 (0-based) attends to all tokens of all neighbours of chunk u = (t+1)//M − 1 under one softmax. So
    the *last* token of a chunk is the first that sees the chunk's own neighbours, and only that token sees
    those of the sequence's last chunk. Use: `x = x + cca(norm(x), neighbours)`.

    The result is exactly zero for t < M−1 and where a chunk has no neighbour, bias and dropout included.

    dim            width of x
    num_heads      H, query heads
    head_dim       D, width of a head (default dim // num_heads); num_heads · head_dim need not equal dim
    encoder_dim    width of the encoded neighbours (default dim)
    num_kv_heads   key/value heads (default num_heads); must divide num_heads
    chunk_size     M, tokens of a chunk
    neighbour_len  R, tokens of a neighbour with its continuation
    position       "relative": Transformer-XL with the sinusoid of the signed distance d = a − c + M − 1 (the paper);
                   "bias": learned per head and distance; "none"
    dropout        probability, 0 to 1, with which an element of the output projection's result is left out in training
    bias           whether q_proj, k_proj, v_proj and o_proj have one
    backend        of the kernels: "triton", "torch", "reference"; None chooses
    projection     "materialised" forms keys and values; "absorbed" attends to the neighbours' states themselves (the
                   same to rounding, without K and V in memory); "auto" takes the one that `choose_projection` predicts
                   to be faster, and never absorbs a k_proj or v_proj which was replaced, parametrised, quantised or
                   has hooks
    device, dtype  of the parameters

    Parameters: `q_proj`, `k_proj`, `v_proj`, `o_proj`; `rel_proj`, `content_bias`, `position_bias` [H, D] ("relative");
    `rel_bias` [H, M+R−1] ("bias"). Raises ValueError for sizes that do not fit together, TypeError for what is none.
    """

    __prepare_scriptable__ = _refuse_scripting

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        encoder_dim: int | None = None,
        num_kv_heads: int | None = None,
        chunk_size: int = 64,
        neighbour_len: int = 128,
        position: str = "relative",
        dropout: float = 0.0,
        bias: bool = False,
        backend: str | None = None,
        projection: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        given = {"dim": dim, "num_heads": num_heads, "head_dim": head_dim, "encoder_dim": encoder_dim}
        given |= {"num_kv_heads": num_kv_heads, "chunk_size": chunk_size, "neighbour_len": neighbour_len}
        # numpy's would be data to torch.compile, on which nothing may depend
        sizes = {name: as_integer(size) for name, size in given.items()}
        for name, size in sizes.items():
            if size is None and name in ("head_dim", "encoder_dim", "num_kv_heads"):
                continue
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"ChunkedCrossAttention: {name} is {size!r}; it must be an integer.")
        dim, num_heads, head_dim, encoder_dim, num_kv_heads, chunk_size, neighbour_len = sizes.values()
        head_dim = _head_dim(dim, num_heads, head_dim)
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(
                f"ChunkedCrossAttention: num_kv_heads is {kv_heads}; it must divide num_heads = {num_heads}."
            )
        if position not in ("relative", "bias", "none"):
            raise ValueError(
                f'ChunkedCrossAttention: position is {position!r}; choose "relative", "bias" or "none".'
            )
        if projection not in ("auto", "materialised", "absorbed"):
            raise ValueError(
                f"ChunkedCrossAttention: projection is {projection!r}; choose "
                '"auto", "materialised" or "absorbed".'
            )
        encoder_dim = dim if encoder_dim is None else encoder_dim
        if encoder_dim < 1:
            raise ValueError(f"ChunkedCrossAttention: encoder_dim is {encoder_dim}; it must be at least 1.")
        if chunk_size < 1 or neighbour_len < 1:
            raise ValueError(
                f"ChunkedCrossAttention: chunk_size is {chunk_size} and neighbour_len {neighbour_len}; "
                "both must be at least 1."
            )
        if backend not in (None, "triton", "torch", "reference"):
            raise ValueError(
                f'ChunkedCrossAttention: backend is {backend!r}; choose "triton", "torch", "reference" or None.'
            )
        drawn: Any = dropout  # whatever it is
        if not isinstance(drawn, numbers.Real) or not 0.0 <= dropout <= 1.0:
            raise ValueError(f"ChunkedCrossAttention: dropout is {dropout!r}; it must be a number in [0, 1].")
        self.dim, self.encoder_dim = dim, encoder_dim
        self.num_heads, self.head_dim, self.num_kv_heads = num_heads, head_dim, kv_heads
        self.chunk_size, self.neighbour_len, self.position, self.backend = (
            chunk_size,
            neighbour_len,
            position,
            backend,
        )
        self.projection = projection
        inner, columns = num_heads * head_dim, chunk_size + neighbour_len - 1
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(dim, inner, bias=bias, **made)
        self.k_proj = nn.Linear(encoder_dim, kv_heads * head_dim, bias=bias, **made)
        self.v_proj = nn.Linear(encoder_dim, kv_heads * head_dim, bias=bias, **made)
        self.o_proj = nn.Linear(inner, dim, bias=bias, **made)
        if position == "relative":
            self.rel_proj = nn.Linear(dim, inner, bias=False, **made)
            self.content_bias = nn.Parameter(torch.zeros(num_heads, head_dim, **made))
            self.position_bias = nn.Parameter(torch.zeros(num_heads, head_dim, **made))
            self.distances = DistanceTable(chunk_size - neighbour_len, 2 * chunk_size - 2, dim, device=device)
        elif position == "bias":
            self.rel_bias = nn.Parameter(torch.zeros(num_heads, columns, **made))
        self.dropout = nn.Dropout(dropout)

    def reset_parameters(self) -> None:
        """Sets the biases, which are this module's own, to zero, as is needed after `to_empty`."""
        _zero_own(self)

    def forward(self, x: Tensor, neighbours: Tensor, neighbour_lengths: Tensor | None = None) -> Tensor:
        """`x` [B, N, dim], `neighbours` [B, L, K, R, encoder_dim] with L = N // M → [B, N, dim], to be added to x.

        `neighbour_lengths` int [B, L, K]: how many leading tokens are real, 0 = no such neighbour, None = all. What
        lies behind them is never weighted, but has to be finite.
        Raises ValueError for shapes that do not fit, TypeError for what is no tensor.
        """
        self._check(x, neighbours)
        if (
            neighbour_lengths is None and neighbours.shape[2] == 0
        ):  # o_proj's bias must know that none is there
            neighbour_lengths = torch.zeros(neighbours.shape[:3], dtype=torch.int32, device=x.device)
        query = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        options = {"neighbour_lengths": neighbour_lengths, "backend": self.backend, **self.position_terms()}
        if self.absorbs(neighbours.shape[2], neighbours.device, training=torch.is_grad_enabled()):
            out = absorbed_cross_attention(
                query, neighbours, **self._weights(), chunk_size=self.chunk_size, **options
            )
        else:
            key, value = self.keys_and_values(neighbours)
            out = chunked_cross_attention(query, key, value, chunk_size=self.chunk_size, **options)
        out = self.dropout(self.o_proj(out.flatten(2)))
        if self._leaves_zeros():
            return out
        # a mask, and no rows cut off, so that what is exported for any length serves all of them
        chunk = torch.arange(1, x.shape[1] + 1, device=x.device) // self.chunk_size  # 1-based, 0 = none
        present = (chunk > 0)[None]
        if neighbour_lengths is not None:
            present = F.pad((neighbour_lengths > 0).any(-1), (1, 0))[:, chunk]
        return torch.where(present[..., None], out, 0.0)

    def absorbs(
        self,
        num_neighbours: int,
        device: torch.device,
        *,
        training: bool = False,
        decoding_batch: int | None = None,
    ) -> bool:
        """Whether heads attend to the neighbours' states themselves. `decoding_batch`: for `attend_rows`, with so many
        sequences. Raises ValueError for `projection="absorbed"` where the weights alone are not the projections."""
        plain = _is_linear(self.k_proj) and _is_linear(self.v_proj)
        if self.projection == "absorbed" and not plain:
            raise ValueError(
                "ChunkedCrossAttention: k_proj or v_proj was replaced, parametrised, quantised or has hooks, which "
                'attention to the states would pass over. Use projection="auto" or "materialised".'
            )
        if self.projection != "auto" or not plain:
            return self.projection == "absorbed"
        if _exported_for_any(num_neighbours):  # the choice would tie the program to some
            return False
        return "absorbed" == choose_projection(
            head_dim=self.head_dim,
            encoder_dim=self.encoder_dim,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            chunk_size=self.chunk_size,
            neighbour_len=self.neighbour_len,
            num_neighbours=num_neighbours,
            training=training,
            decoding=decoding_batch is not None,
            batch=decoding_batch or 1,
            device=device.type,
        )

    def _leaves_zeros(self) -> bool:
        """Whether rows without a neighbour are zero behind `o_proj` as they are before it."""
        return _is_linear(self.o_proj) and self.o_proj.bias is None

    def _weights(self) -> dict[str, Any]:
        return {
            "key_weight": self.k_proj.weight,
            "key_bias": self.k_proj.bias,
            "value_weight": self.v_proj.weight,
            "value_bias": self.v_proj.bias,
        }

    def keys_and_values(self, neighbours: Tensor) -> tuple[Tensor, Tensor]:
        """`neighbours` [..., encoder_dim] → key and value, both [..., Hkv, D]."""
        shape = (self.num_kv_heads, self.head_dim)
        return self.k_proj(neighbours).unflatten(-1, shape), self.v_proj(neighbours).unflatten(-1, shape)

    def position_terms(self) -> dict[str, Any]:
        """The position arguments of `chunked_cross_attention`, projected."""
        if self.position == "relative":
            return {
                "rel_key": _relative_keys(self),
                "content_bias": self.content_bias,
                "position_bias": self.position_bias,
            }
        return {"rel_bias": self.rel_bias} if self.position == "bias" else {}

    def attend_rows(
        self,
        x: Tensor,
        first_row: int,
        key: Tensor,
        value: Tensor | None,
        lengths: Tensor | None,
        terms: dict[str, Any],
    ) -> Tensor:
        """A few rows of one attending chunk, for decoding.

        `x` [B, T, dim] are its rows `first_row` … `first_row` + T − 1; key and value [B, K, R, Hkv, D] and
        lengths [B, K] belong to its chunk, or key is the neighbours [B, K, R, encoder_dim] and value None to attend
        to them directly; `terms` is `position_terms()`. Returns [B, T, dim], and costs T rows.
        """
        count = x.shape[1]
        query = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        rows = torch.arange(first_row, first_row + count, device=x.device).expand(x.shape[0], -1)
        if value is None:
            out = absorbed_decode(
                query,
                key,
                **self._weights(),
                rows=rows,
                neighbour_lengths=lengths,
                backend=self.backend,
                **terms,
            )
        elif count <= _FEW_ROWS:
            out = chunked_cross_attention_decode(
                query, key, value, rows=rows, neighbour_lengths=lengths, backend=self.backend, **terms
            )
        else:
            columns = slice(first_row, first_row + count + self.neighbour_len - 1)
            terms = {
                name: term[:, columns] if name in ("rel_key", "rel_bias") else term
                for name, term in terms.items()
            }
            out = block_attention(query, key, value, lengths=lengths, backend=self.backend, **terms)
        out = self.dropout(self.o_proj(out.flatten(2)))
        if lengths is not None and not self._leaves_zeros():
            out = torch.where((lengths > 0).any(-1)[:, None, None], out, 0.0)
        return out

    def _check(self, x: Tensor, neighbours: Tensor) -> None:
        for name, tensor, of in (("x", x, ""), ("neighbours", neighbours, " of encoded neighbours")):
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"ChunkedCrossAttention: {name} is of type {type(tensor).__name__}; it must be a tensor{of}."
                )
        if x.ndim != 3 or x.shape[2] != self.dim:
            raise ValueError(f"ChunkedCrossAttention: x is {list(x.shape)}; it must be [B, N, {self.dim}].")
        expected = [
            x.shape[0],
            x.shape[1] // self.chunk_size,
            "K",
            self.neighbour_len,
            self.encoder_dim,
        ]
        given = list(neighbours.shape)
        if len(given) != 5 or any(
            want != "K" and want != have for want, have in zip(expected, given, strict=True)
        ):
            raise ValueError(
                f"ChunkedCrossAttention: neighbours is {given}; with x {list(x.shape)} and chunk_size "
                f"{self.chunk_size} it must be [B, L, K, R, encoder_dim] = [{', '.join(map(str, expected))}]."
            )

    def extra_repr(self) -> str:
        names = ("num_heads", "head_dim", "num_kv_heads", "chunk_size", "neighbour_len", "position")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


class BlockAttention(nn.Module):
    """Attention of the neighbour encoder: `rows` neighbour tokens to `keys` tokens, both directions of distance.

    The queries are always the neighbour's tokens. In self-attention the keys are the same tokens; in the
    cross-attention they are the M states of the chunk that retrieved the neighbour (`context_dim` wide).
    Distance d = (neighbour token) − (key), from −(keys − 1) to rows − 1 (Borgeaud et al. 2021, eq. 7).
    """

    __prepare_scriptable__ = _refuse_scripting

    def __init__(
        self,
        dim: int,
        num_heads: int,
        rows: int,
        keys: int,
        *,
        head_dim: int | None = None,
        context_dim: int | None = None,
        dropout: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        head_dim = _head_dim(dim, num_heads, head_dim)
        self.num_heads, self.head_dim, self.rows, self.keys, self.backend = (
            num_heads,
            head_dim,
            rows,
            keys,
            backend,
        )
        inner, context_dim = num_heads * head_dim, dim if context_dim is None else context_dim
        self.q_proj = nn.Linear(dim, inner, bias=False)
        self.k_proj = nn.Linear(context_dim, inner, bias=False)
        self.v_proj = nn.Linear(context_dim, inner, bias=False)
        self.o_proj = nn.Linear(inner, dim, bias=False)
        self.rel_proj = nn.Linear(dim, inner, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(num_heads, head_dim))
        self.position_bias = nn.Parameter(torch.zeros(num_heads, head_dim))
        self.distances = DistanceTable(1 - keys, rows - 1, dim)
        self.dropout = nn.Dropout(dropout)

    def reset_parameters(self) -> None:
        """Sets the biases, which are this module's own, to zero, as is needed after `to_empty`."""
        _zero_own(self)

    def forward(self, x: Tensor, context: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """`x` [P, rows, dim]; `context` [G, keys, context_dim], each for P / G successive blocks (None: x itself);
        `lengths` int [P], how many leading keys are real (self-attention only) → [P, rows, dim]."""
        source = x if context is None else context
        shape = (self.num_heads, self.head_dim)
        out = block_attention(
            self.q_proj(x).unflatten(-1, shape),
            self.k_proj(source).unflatten(-1, shape)[:, None],
            self.v_proj(source).unflatten(-1, shape)[:, None],
            rel_key=_relative_keys(self),
            content_bias=self.content_bias,
            position_bias=self.position_bias,
            lengths=None if lengths is None else lengths[:, None],
            key_repeat=max(x.shape[0] // max(source.shape[0], 1), 1),  # without a block, too
            backend=self.backend,
        )
        return self.dropout(self.o_proj(out.flatten(2)))


@torch.no_grad()
def _zero_own(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.zero_()


def _is_linear(module: nn.Module) -> bool:
    """Whether it is what its weights say: neither replaced, parametrised nor quantised, and without hooks."""
    own = "forward" in vars(module)  # as accelerate sets it, to bring weights from elsewhere
    if type(module) is not nn.Linear or own or module._forward_hooks or module._forward_pre_hooks:
        return False
    if module._backward_hooks or module._backward_pre_hooks:
        return False
    # a tensor made of others, as torchao quantises in place, multiplies in its own way and is no argument of our ops
    weight = module._parameters.get("weight")  # a third of the time of module.weight
    return type(weight) is nn.Parameter or not is_quantised(weight)


def _exported_for_any(size: Any) -> bool:
    if isinstance(size, torch.SymInt):
        return True
    if not torch.compiler.is_exporting():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value  # takes long to import

    return not has_static_value(size)  # a strict export shows an int


def _heads(table: Tensor, num_heads: int) -> Tensor:
    return table.unflatten(-1, (num_heads, -1)).transpose(0, 1)  # [G, H·D] → [H, G, D]


def _relative_keys(attention: ChunkedCrossAttention | BlockAttention) -> Tensor:
    """Of every distance column: [H, G, D], in one piece, or each call would copy it and find no earlier kernels."""
    distances = attention.distances(attention.content_bias)
    return _heads(attention.rel_proj(distances), attention.num_heads).contiguous()


def _head_dim(dim: int, num_heads: int, head_dim: int | None) -> int:
    if dim < 1 or (head_dim is not None and head_dim < 1):
        raise ValueError(f"attention: dim is {dim} and head_dim {head_dim}; both must be at least 1.")
    if num_heads < 1:
        raise ValueError(f"attention: num_heads is {num_heads}; it must be at least 1.")
    if head_dim is None and dim % num_heads:
        raise ValueError(f"attention: dim {dim} is not a multiple of num_heads {num_heads}; give head_dim.")
    return dim // num_heads if head_dim is None else head_dim
