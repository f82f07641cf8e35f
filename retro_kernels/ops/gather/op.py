"""The public gather: checks, choice of the backend, registration with torch.library."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from retro_kernels.ops._backend import pick_backend, why_not_triton
from retro_kernels.ops._register import register, without_autograd
from retro_kernels.ops.gather import native
from retro_kernels.ops.gather.native import Array
from retro_kernels.ops.gather.reference import gather_reference

NAME = "gather_neighbours"


class NeighbourBatch(NamedTuple):
    """The neighbours of a batch: for every chunk of every sequence K neighbours with their continuations."""

    tokens: Tensor
    """[B, L, K, R] integers; pads where there is nothing."""
    lengths: Tensor
    """int32 [B, L, K], 0..R: how many leading tokens are real; 0 = no such neighbour."""
    ids: Tensor | None = None
    """int64 [B, L, K], the neighbours' chunk ids; -1 = none."""
    distances: Tensor | None = None
    """float32 [B, L, K], nearest first; +inf = none. In what unit, the retriever decides: squared L2 between the keys
    of chunk and neighbour ("dense"), their negative product (metric "inner product"), the negative BM25 score ("bm25",
    "bm25:tokens", "…+bm25"), the edit distance over the longer length, 0 to 1 ("…+edit"), 1 − the longest run in
    common over the chunk's length ("…+run"), 0 ("random")."""

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> NeighbourBatch:
        """The same batch on `device`."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=non_blocking)

        return NeighbourBatch(
            move(self.tokens),
            move(self.lengths),
            None if self.ids is None else move(self.ids),
            None if self.distances is None else move(self.distances),
        )


torch.serialization.add_safe_globals([NeighbourBatch])  # plain data: torch.load may read it back


def gather_neighbours(
    tokens: Tensor | np.ndarray,
    ids: Tensor,
    *,
    continuation: Tensor | np.ndarray,
    pad_id: int = 0,
    dtype: torch.dtype = torch.int64,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The tokens of neighbours, each followed by its continuation, out of the store of all chunks
    (Borgeaud et al. 2021, section 2.2: the value [N, F] of a key).

    Args:
        tokens: [C, M] uint16 or int32, the store: a tensor on the GPU, in pinned or ordinary host memory, or a numpy
            array, memory-mapped or not. Rows may lie apart, the tokens of a row must be adjacent.
        ids: int64 [B, L, K] (or any shape), chunk ids; -1 is no neighbour. On the GPU where `tokens` is.
        continuation: bool [C], chunk i + 1 continues chunk i's document. Where it is False, and for the store's last
            chunk, the second half of the row is pads. On the device of `tokens`.
        pad_id: token that fills up a document's last chunk and rows without a neighbour.
        dtype: of the gathered tokens: torch.int64, torch.int32, or torch.uint16 out of a store in uint16.
        backend: None chooses: "triton" where the store is on the GPU; "cuda" (csrc) where the GPU reads pinned host
            memory in place; "native" (C++ threads) where the store is in host memory or a file. With ids on the GPU and
            a store that it cannot reach, "native" copies ids and tokens between the two and waits for the ids.
            "torch" and "reference" are the definition in plain PyTorch, for a store on the ids' device.

    Returns:
        tokens [B, L, K, 2M] in `dtype` and lengths int32 [B, L, K] on the device of `ids`. A length counts the tokens
        before the row's trailing pads: 2M for two full chunks, 0 for -1.

    Raises:
        ValueError: shapes, devices or `pad_id` do not fit, the backend cannot run here, or, on the host, an id lies
            outside -1 .. C-1. On the GPU, where a check would have to wait, such an id counts as -1.
        TypeError: a dtype does not fit.

    Equivalent to:
        tokens = torch.cat((store[ids], store[ids + 1].where(continuation[ids], pad_id)), -1)
        lengths = 2 * M - trailing_pads(tokens)
    """
    _check(tokens, ids, continuation, pad_id, dtype)
    chosen = pick_backend(NAME, backend, _candidates(tokens, ids, continuation))
    if isinstance(tokens, np.ndarray) or isinstance(continuation, np.ndarray):
        if (
            chosen == "native"
        ):  # no tensor, no dispatcher: a read-only map cannot become a tensor without a warning
            return _gather_native(tokens, ids, continuation, pad_id, dtype)
        tokens, continuation = _as_tensor(tokens), _as_tensor(continuation)
    return _gather_neighbours(tokens, ids, continuation, pad_id, dtype, chosen)


def gather_embeddings(
    tokens: Tensor | np.ndarray,
    ids: Tensor,
    weight: Tensor,
    *,
    continuation: Tensor | np.ndarray,
    pad_id: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`gather_neighbours` and the encoder's embedding lookup in one: the embedded tokens of neighbours, as
    `NeighbourEncoder` takes them in place of tokens.

    Args:
        tokens, ids, continuation, pad_id: as in `gather_neighbours`.
        weight: [V, E] float32, float16, bfloat16 or float64, the embedding table, on the device of `ids`.
        backend: that of the gather. "triton", chosen where the store is on the GPU, looks up in the same kernel; with
            every other one the tokens are gathered first and looked up by PyTorch.

    Returns:
        embedded [B, L, K, 2M, E] in weight's dtype (pads as weight[pad_id]) and lengths int32 [B, L, K]. The gradient
        of `weight` is that of `torch.nn.functional.embedding`; the tokens for it are gathered again.

    Raises:
        ValueError: as `gather_neighbours`; `weight` is not a matrix on the device of `ids`.
        TypeError: as `gather_neighbours`; `weight` is not floating-point.
        IndexError: a token is none of the V, on the host. In the kernel, where a check would have to wait, its
            embedding is NaN.

    Equivalent to:
        tokens, lengths = gather_neighbours(tokens, ids, continuation=continuation, pad_id=pad_id)
        embedded = torch.nn.functional.embedding(tokens, weight)
    """
    _check(tokens, ids, continuation, pad_id, torch.int64)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        found = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"gather_embeddings: weight is {found}; it must be a floating-point tensor.")
    if weight.ndim != 2 or weight.device != ids.device:
        raise ValueError(
            f"gather_embeddings: weight has shape {tuple(weight.shape)} on {weight.device}; it must be [V, E] on "
            f"{ids.device}, where ids are."
        )
    chosen = pick_backend("gather_embeddings", backend, _candidates(tokens, ids, continuation))
    if chosen == "triton":
        tokens, continuation = _as_tensor(tokens), _as_tensor(continuation)
        if ids.is_cpu and ids.numel():
            _check_range(ids, len(tokens))
        return _GatherEmbeddings.apply(tokens, ids, continuation, weight, pad_id)
    gathered, lengths = gather_neighbours(
        tokens, ids, continuation=continuation, pad_id=pad_id, backend=chosen
    )
    return F.embedding(gathered, weight), lengths


def _check(tokens: Array, ids: Tensor, continuation: Array, pad_id: int, dtype: torch.dtype) -> None:
    kind = _dtype(tokens)
    if kind not in (torch.uint16, torch.int32):
        raise TypeError(f"{NAME}: tokens are {tokens.dtype}; a store is uint16 or int32.")
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 1:
        raise ValueError(
            f"{NAME}: tokens have shape {tuple(tokens.shape)}; expected [C, M], neither of them 0."
        )
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        found = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{NAME}: ids are {found}; expected a tensor of torch.int64.")
    if _dtype(continuation) != torch.bool:
        raise TypeError(f"{NAME}: continuation is {continuation.dtype}; expected bool.")
    if tuple(continuation.shape) != (tokens.shape[0],):
        raise ValueError(
            f"{NAME}: continuation has shape {tuple(continuation.shape)}, but the store has {tokens.shape[0]:,} "
            f"chunks; expected ({tokens.shape[0]},)."
        )
    if not _steps_by_one(tokens) or not _steps_by_one(continuation):
        raise ValueError(
            f"{NAME}: the tokens of a chunk, and continuation, have to lie side by side in memory."
        )
    if isinstance(tokens, np.ndarray) and tokens.strides[0] % tokens.itemsize:
        raise ValueError(
            f"{NAME}: the rows of tokens lie {tokens.strides[0]} bytes apart, which is no multiple of the "
            f"{tokens.itemsize} bytes of a token. Copy them (numpy.ascontiguousarray)."
        )
    if dtype not in (torch.int64, torch.int32, torch.uint16):
        raise TypeError(f"{NAME}: dtype is {dtype}; choose torch.int64, torch.int32 or torch.uint16.")
    if dtype == torch.uint16 and kind != torch.uint16:
        raise TypeError(f"{NAME}: dtype torch.uint16 cannot hold the tokens of a store in int32.")
    limits = (0, 2**16 - 1) if kind == torch.uint16 else (-(2**31), 2**31 - 1)
    if not isinstance(pad_id, (int, np.integer)):
        raise TypeError(f"{NAME}: pad_id is {pad_id!r}; it has to be an integer.")
    if not limits[0] <= pad_id <= limits[1]:
        raise ValueError(
            f"{NAME}: pad_id is {pad_id}; the store's {tokens.dtype} holds {limits[0]} to {limits[1]}."
        )
    given = (("tokens are", tokens), ("ids are", ids), ("continuation is", continuation))
    without = [label for label, x in given if isinstance(x, Tensor) and x.is_meta]
    # torch would take the others to be without data, too, and fill in nothing
    if 0 < len(without) < len(given):
        raise ValueError(
            f"{NAME}: {without[0]} on meta, without data, but tokens, ids and continuation are not all there. Move "
            "them to one device."
        )
    on_gpu = isinstance(tokens, Tensor) and tokens.is_cuda
    if on_gpu and ids.device != tokens.device:
        raise ValueError(f"{NAME}: tokens are on {tokens.device}, but ids on {ids.device}. Move ids there.")
    if on_gpu and not (isinstance(continuation, Tensor) and continuation.device == tokens.device):
        raise ValueError(f"{NAME}: tokens are on {tokens.device}, but continuation is not. Move it there.")


def _candidates(tokens: Array, ids: Tensor, continuation: Array) -> dict[str, str | None]:
    """Each backend, best first, with the reason why it cannot run here, or None."""
    in_place: str | None = None
    if not (ids.is_cuda and all(_reachable(x, ids.device) for x in (tokens, continuation))):
        in_place = (
            "ids have to be on a GPU, and tokens and continuation on the same one or in pinned host memory"
        )
    elif native.WHY_NOT:
        in_place = native.WHY_NOT
    elif not native.WITH_CUDA:
        in_place = (
            "this build of retro_kernels has no CUDA code (install it with nvcc on PATH and RETRO_CUDA=1)"
        )
    else:
        in_place = native.why_not_on(ids.device)
    stored_on_gpu = isinstance(tokens, Tensor) and tokens.is_cuda
    host = "tokens are on the GPU" if stored_on_gpu else native.WHY_NOT
    plain: str | None = None
    if isinstance(tokens, np.ndarray) != isinstance(continuation, np.ndarray) and not ids.is_cpu:
        plain = "tokens, continuation and ids have to be on one device"
    elif not stored_on_gpu and not ids.is_cpu:
        plain = f"tokens are in host memory, but ids on {ids.device}"
    triton = plain or why_not_triton(ids.device, torch.float32)
    if stored_on_gpu:
        return {"triton": triton, "cuda": in_place, "torch": plain, "reference": plain, "native": host}
    return {"cuda": in_place, "native": host, "torch": plain, "reference": plain, "triton": triton}


def _gather_native(
    tokens: Array, ids: Tensor, continuation: Array, pad_id: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if isinstance(continuation, Tensor):
        continuation = continuation.cpu()
    if ids.is_cpu:
        return native.gather_host(tokens, ids, continuation, pad_id, dtype)
    # narrow over the bus, wide on the device
    narrow = torch.uint16 if _dtype(tokens) == torch.uint16 else torch.int32
    out, lengths = native.gather_host(tokens, ids.cpu(), continuation, pad_id, narrow, pin=True)
    return (
        out.to(ids.device, non_blocking=True).to(dtype),
        lengths.to(ids.device, non_blocking=True),
    )


def _gather(
    tokens: Tensor, ids: Tensor, continuation: Tensor, pad_id: int, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "native":
        return _gather_native(tokens, ids, continuation, pad_id, dtype)
    if backend == "cuda":
        return native.gather_cuda(tokens, ids, continuation, pad_id, dtype)
    if ids.is_cpu and ids.numel():
        _check_range(ids, len(tokens))
    if backend == "triton":
        from retro_kernels.ops.gather.kernel import gather_triton  # triton exists on Linux only

        return gather_triton(tokens, ids, continuation, pad_id, dtype)
    return gather_reference(tokens, ids, continuation, pad_id, dtype)


def _check_range(ids: Tensor, num_chunks: int) -> None:
    low, high = ids.amin().item(), ids.amax().item()
    if low < -1 or high >= num_chunks:
        raise ValueError(
            f"{NAME}: ids has {low if low < -1 else high}; the store has {num_chunks} chunks, so ids run from 0 to "
            f"{num_chunks - 1}, and -1 is none."
        )


def _gather_fake(
    tokens: Tensor, ids: Tensor, continuation: Tensor, pad_id: int, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    out = torch.empty((*ids.shape, 2 * tokens.shape[1]), dtype=dtype, device=ids.device)
    return out, torch.empty(ids.shape, dtype=torch.int32, device=ids.device)


_gather_neighbours = register(
    f"{NAME}(Tensor tokens, Tensor ids, Tensor continuation, int pad_id, ScalarType dtype, str backend) "
    "-> (Tensor, Tensor)",
    _gather,
    _gather_fake,
)


def _embed(
    tokens: Tensor, ids: Tensor, continuation: Tensor, weight: Tensor, pad_id: int
) -> tuple[Tensor, Tensor]:
    from retro_kernels.ops.gather.kernel import gather_embeddings_triton  # triton exists on Linux only

    return gather_embeddings_triton(tokens, ids, continuation, weight, pad_id)


def _embed_fake(
    tokens: Tensor, ids: Tensor, continuation: Tensor, weight: Tensor, pad_id: int
) -> tuple[Tensor, Tensor]:
    out = weight.new_empty((*ids.shape, 2 * tokens.shape[1], weight.shape[1]))
    return out, torch.empty(ids.shape, dtype=torch.int32, device=ids.device)


_gather_embeddings = register(
    "gather_embeddings(Tensor tokens, Tensor ids, Tensor continuation, Tensor weight, int pad_id) -> (Tensor, Tensor)",
    _embed,
    _embed_fake,
    lambda *args: _GatherEmbeddings.apply(*args),
)


class _GatherEmbeddings(torch.autograd.Function):
    """Keeps no tokens: gathering them again reads and writes 1/E of what the gradient takes."""

    @staticmethod
    def forward(ctx, tokens, ids, continuation, weight, pad_id):  # type: ignore[no-untyped-def]
        out, lengths = without_autograd(_gather_embeddings, tokens, ids, continuation, weight, pad_id)
        ctx.save_for_backward(tokens, ids, continuation)
        ctx.pad_id, ctx.num_embeddings = pad_id, weight.shape[0]
        ctx.mark_non_differentiable(lengths)
        return out, lengths

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):  # type: ignore[no-untyped-def]
        tokens, ids, continuation = ctx.saved_tensors
        gathered, _ = _gather_neighbours(tokens, ids, continuation, ctx.pad_id, torch.int64, "triton")
        grad_weight = torch.ops.aten.embedding_dense_backward(grad, gathered, ctx.num_embeddings, -1, False)
        return None, None, None, grad_weight, None


def _dtype(x: Array) -> torch.dtype | None:
    if isinstance(x, Tensor):
        return x.dtype
    if not isinstance(x, np.ndarray):
        raise TypeError(
            f"{NAME}: got {type(x).__name__}; tokens and continuation are tensors or numpy arrays."
        )
    if not x.dtype.isnative:
        return None
    return {"uint16": torch.uint16, "int32": torch.int32, "bool": torch.bool}.get(x.dtype.name)


def _steps_by_one(x: Array) -> bool:
    if x.shape[-1] < 2:
        return True
    return x.stride(-1) == 1 if isinstance(x, Tensor) else x.strides[-1] == x.itemsize


def _reachable(x: Array, device: torch.device) -> bool:
    """Can this GPU read it where it is?"""
    return isinstance(x, Tensor) and (x.device == device or x.is_pinned())


def _as_tensor(x: Array) -> Tensor:
    """A tensor over the same memory. It is read only, so a map without write access is as good."""
    if isinstance(x, Tensor):
        return x
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(x)
