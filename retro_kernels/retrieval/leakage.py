"""How much of a chunk stands word for word in what was retrieved for it.

Borgeaud et al. 2021 (arXiv 2112.04426), section 2.6: s is the longest run of tokens that a chunk C shares with any of
its neighbours [N, F], m its length, r(C) = s / m, and bpb(α) the bits per byte over the chunks with r(C) ≤ α.

One recurrence serves everything here: run[i, j] = run[i−1, j−1] + 1 where token i of the chunk equals token j of the
value, else 0. Its maximum is s; row i holds a run of n or more exactly where the n-gram that ends at i stands in the
value, so containment of n-grams needs no hashes and catches copies at every shift.

Shapes: C chunks, M tokens of a chunk, K neighbours, R tokens of a neighbour with its continuation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Elements of one [block, K, R] slab: the recurrence passes over it M times, so it should stay in the cache.
_SLAB_CPU, _SLAB_GPU = 1 << 17, 1 << 26
_NARROW = torch.int16


def own_lengths(tokens: Tensor, pad_id: int = 0) -> Tensor:
    """Tokens before the trailing pads, int64 [...] for tokens [..., R]."""
    places = torch.arange(1, tokens.shape[-1] + 1, device=tokens.device)
    return torch.where(tokens != pad_id, places, 0).amax(-1) if tokens.shape[-1] else tokens.sum(-1)


def _checked(
    chunks: Tensor, values: Tensor, chunk_lengths: Tensor | None, value_lengths: Tensor | None, pad_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(chunks, values, chunk lengths): signed, with −1 and −2 in the places that may never match."""
    if chunks.dim() != 2 or values.dim() != 3 or chunks.shape[0] != values.shape[0]:
        raise ValueError(
            f"leakage: chunks must be [C, M] and values [C, K, R] with the same C, "
            f"not {list(chunks.shape)} and {list(values.shape)}."
        )
    chunks, values = chunks.to(torch.int32), values.to(torch.int32)
    for name, lengths, shape in (
        ("chunk_lengths", chunk_lengths, chunks.shape[:1]),
        ("value_lengths", value_lengths, values.shape[:2]),
    ):
        if lengths is not None and lengths.shape != shape:
            raise ValueError(f"leakage: {name} must be {list(shape)}, not {list(lengths.shape)}.")
    own = own_lengths(chunks, pad_id) if chunk_lengths is None else chunk_lengths.to(torch.int64)
    m_chunk = chunks == pad_id
    m_chunk |= torch.arange(chunks.shape[1], device=chunks.device) >= own[:, None]
    m_value = values == pad_id
    if value_lengths is not None:
        m_value |= torch.arange(values.shape[2], device=values.device) >= value_lengths[..., None]
    return chunks.masked_fill(m_chunk, -1), values.masked_fill(m_value, -2), own


def _length_dtype(chunks: Tensor, values: Tensor) -> torch.dtype:
    """Of the length of a run. It is memory that takes the time, so the narrowest that holds them all."""
    longest = min(chunks.shape[1], values.shape[2])
    return _NARROW if longest <= torch.iinfo(_NARROW).max else torch.int32


def _rows(chunks: Tensor, values: Tensor) -> Iterator[Tensor]:
    """Row by row of the recurrence: run[i] [C, K, R]. The tensor is written again by the row after the next."""
    last, run, same = values.new_zeros((3, *values.shape), dtype=_length_dtype(chunks, values))
    for i in range(chunks.shape[1]):
        run, last = last, run
        torch.add(last[..., :-1], 1, out=run[..., 1:])
        run[..., :1] = 1
        # 0 and 1 as numbers: on a processor PyTorch is slower with bools
        torch.eq(values, chunks[:, i, None, None], out=same)
        run *= same
        yield run


def _blocks(values: Tensor) -> Iterator[slice]:
    slab = _SLAB_GPU if values.is_cuda else _SLAB_CPU
    step = max(1, slab // max(1, values.shape[1] * values.shape[2]))
    return (slice(start, start + step) for start in range(0, values.shape[0], step))


def common_runs(
    chunks: Tensor,
    values: Tensor,
    *,
    chunk_lengths: Tensor | None = None,
    value_lengths: Tensor | None = None,
    pad_id: int = 0,
) -> Tensor:
    """Longest run of tokens that each chunk shares with each of its values.

    chunks [C, M], values [C, K, R] of any integer dtype; lengths int [C] and [C, K], None = up to the trailing pads.
    Pads never match. Returns int64 [C, K]. ValueError for shapes that do not fit.
    """
    chunks, values, _ = _checked(chunks, values, chunk_lengths, value_lengths, pad_id)
    longest = torch.zeros(values.shape[:2], dtype=torch.int64, device=values.device)
    if values.numel():
        for part in _blocks(values):
            dtype = _length_dtype(chunks, values)
            best = torch.zeros(values[part].shape, dtype=dtype, device=values.device)
            for run in _rows(chunks[part], values[part]):
                torch.maximum(best, run, out=best)
            longest[part] = best.amax(-1).long()
    return longest


def longest_common_run(chunks: Tensor, values: Tensor, **lengths: Tensor | None) -> Tensor:
    """s: the longest run that each chunk shares with any of its values, int64 [C]. Arguments as `common_runs`."""
    runs = common_runs(chunks, values, **lengths)  # type: ignore[arg-type]
    return runs.amax(1) if runs.shape[1] else runs.new_zeros(runs.shape[0])


def overlap(
    chunks: Tensor,
    values: Tensor,
    *,
    chunk_lengths: Tensor | None = None,
    value_lengths: Tensor | None = None,
    pad_id: int = 0,
) -> Tensor:
    """r(C) = s / m, float64 [C]; 0 for a chunk without a token. Arguments as `common_runs`."""
    own = own_lengths(chunks, pad_id) if chunk_lengths is None else chunk_lengths
    longest = longest_common_run(
        chunks,
        values,
        chunk_lengths=chunk_lengths,
        value_lengths=value_lengths,
        pad_id=pad_id,  # type: ignore[arg-type]
    )
    return longest.double() / own.clamp(min=1).double()


def containment(
    chunks: Tensor,
    values: Tensor,
    *,
    n: int = 13,
    chunk_lengths: Tensor | None = None,
    value_lengths: Tensor | None = None,
    pad_id: int = 0,
) -> Tensor:
    """Share of each chunk's n-grams that stand in each value, float32 [C, K].

    Unlike a Jaccard index it sees copies at every shift, since a value is longer than a chunk. A chunk of fewer than n
    tokens counts as one gram of its own length; one without a token is contained in nothing. Arguments as
    `common_runs`.
    """
    if n < 1:
        raise ValueError(f"containment: n is {n}; an n-gram has at least one token.")
    chunks, values, own = _checked(chunks, values, chunk_lengths, value_lengths, pad_id)
    found = torch.zeros(values.shape[:2], dtype=torch.int32, device=values.device)
    gram = own.clamp(1, n)
    if values.numel():
        for part in _blocks(values):
            for run in _rows(chunks[part], values[part]):
                found[part] += run.amax(-1) >= gram[part, None]
    return found / (own - gram + 1).masked_fill(own == 0, 1)[:, None]


DEFAULT_ALPHAS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)


def filtered_bits_per_byte(
    bits: Tensor, num_bytes: Tensor, r: Tensor, alphas: Sequence[float] = DEFAULT_ALPHAS
) -> dict[float, float | None]:
    """bpb(α) = Σ bits / Σ bytes over the chunks with r ≤ α, for each α; None where no chunk is left.

    bits, num_bytes, r: one number per chunk, [C]. bpb(1) is the plain score over all chunks.
    """
    if not bits.shape == num_bytes.shape == r.shape:
        raise ValueError(
            f"filtered_bits_per_byte: bits, num_bytes and r hold one number per chunk each, "
            f"not {list(bits.shape)}, {list(num_bytes.shape)} and {list(r.shape)}."
        )
    curve: dict[float, float | None] = {}
    for alpha in alphas:
        kept = r <= alpha
        size = num_bytes[kept].sum().item()
        curve[float(alpha)] = bits[kept].double().sum().item() / size if size else None
    return curve
