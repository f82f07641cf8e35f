r"""When to project keys and values, and when to attend to the encoder states directly (`absorbed.py`).

A model of time, from operations and bytes, of one attending chunk (or, decoding, of one token of one sequence). M
rows · S = K·R keys · E width of the states · I = H·D · J = Hkv·D:

    materialised   projection  4·S·E·J FLOP          core  4·M·S·I FLOP
    absorbed       folding     4·M·I·E FLOP          products with the states  4·M·H·S·E FLOP, softmax apart

and in the backward twice the projection, 10·M·S·I for the core, five foldings (one repeated, two for the weights) and
four products. So absorbing saves operations where J is large against M·H·E / (E + M·H·D / J), about D > 60 for the
paper's widths, and moves weights [M·H, S] and states of width H·E through memory, which the core does not.

Operations and bytes add up, except in the attention core of a GPU, where the longer of the two counts.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Projection = Literal["materialised", "absorbed"]


class Kernel(NamedTuple):
    """Work of one kernel, or of several that are alike."""

    flops: float
    elements: float
    """Numbers read and written."""
    logits: float = 0.0
    """Of these, a softmax or its gradient is taken here."""


class _Cpu(NamedTuple):
    """Seconds on one core in float32, fitted to times of an AMD EPYC; what a logit costs the materialised way was
    fitted anew, to the six shapes of bench/results/cpu.json, when its kernel had become faster. The softmax of the
    absorbed way is memory traffic. Only ratios matter here."""

    per_flop: float
    per_logit: float
    per_element: float


_CPU = {
    ("materialised", False): _Cpu(1 / 84.5e9, 1.3e-9, 0.0),
    ("materialised", True): _Cpu(1 / 86.6e9, 5.7e-9, 0.24e-9),
    ("absorbed", False): _Cpu(1 / 83.9e9, 0.0, 0.39e-9),
    ("absorbed", True): _Cpu(1 / 87.4e9, 0.0, 0.58e-9),
}
_CPU_MARGIN = 1.01
"""Closer than this the model cannot tell."""
_CPU_THIN = 1 / 37e9
"""Seconds an operation of products with a few rows, as in decoding."""
_CPU_BYTE = 1 / 7.5e9

# Training in bfloat16, fitted to 17 shapes measured on an H100 (bench/results/gpu.json), within 7 %: operations and
# bytes of the products add up; the attention core takes the longer of the two, times a factor: forward less than one,
# since the L2 holds part of what was just projected; backward more, with the two gradients of the states to be added.
_GPU_FLOPS = 820e12
_GPU_BYTES = 3.5e12
_GPU_CORE = {False: 0.58, True: 2.3}  # of the pass: whether it is the backward
_GPU_MARGIN = 1.03
"""Closer than this the model cannot tell."""

# Decoding, fitted to the times of an H100 (bench/results/gpu.json): a call's bytes at 95 % of the copy bandwidth, after
# what its launches take whatever the size, and for each part that is merged.
_GPU_DECODE_BYTES = 2.87e12
_GPU_MATERIALISED_LAUNCHES = 11e-6
_GPU_ABSORBED_LAUNCHES = 17e-6
_GPU_PART = 0.05e-6


def projection_costs(
    *,
    head_dim: int,
    encoder_dim: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    chunk_size: int = 64,
    neighbour_len: int = 128,
    num_neighbours: int = 2,
    training: bool = False,
    decoding: bool = False,
    batch: int = 1,
    device: str = "cuda",
) -> dict[Projection, float]:
    """Predicted seconds of both ways, for one attending chunk or, decoding, for one token of one sequence.

    `training` adds the backward. `decoding`: keys and values are projected once per chunk and read M times; `batch`
    sequences share one reading of the weights. `device` is a device type: "cpu", or else a GPU is assumed.
    """
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    rows, keys = chunk_size, num_neighbours * neighbour_len
    inner, kv_inner = num_heads * head_dim, kv_heads * head_dim
    if decoding:
        return _decoding(rows, keys, encoder_dim, num_heads, inner, kv_inner, batch, device)

    logits = rows * num_heads * keys
    states, both, narrow, wide = (
        keys * encoder_dim,
        2 * keys * kv_inner,
        rows * inner,
        rows * num_heads * encoder_dim,
    )
    project = Kernel(4 * keys * encoder_dim * kv_inner, states + both)
    fold = Kernel(2 * narrow * encoder_dim, narrow + wide)
    product = Kernel(2 * logits * encoder_dim, wide + states + logits)
    core = {False: Kernel(4 * rows * keys * inner, 2 * narrow + both, logits)}
    projections, folds, products = [project], [fold] * 2, [product] * 2
    softmax = [Kernel(0, 2 * logits, logits)]
    if training:
        core[True] = Kernel(10 * rows * keys * inner, 4 * narrow + 2 * both)
        projections += [project] * 2
        folds += [fold] * 5
        products += [product] * 4
        softmax.append(Kernel(0, 3 * logits))
    ways: dict[Projection, list[Kernel]] = {
        "materialised": [*projections, *core.values()],
        "absorbed": folds + products + softmax,
    }
    if device == "cpu":
        return {way: _on_cpu(kernels, _CPU[way, training]) for way, kernels in ways.items()}
    return {
        "materialised": sum(sum(_on_gpu(kernel)) for kernel in projections)
        + sum(_GPU_CORE[backward] * max(_on_gpu(kernel)) for backward, kernel in core.items()),
        "absorbed": sum(sum(_on_gpu(kernel)) for kernel in ways["absorbed"]),
    }


def choose_projection(
    *,
    head_dim: int,
    encoder_dim: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    chunk_size: int = 64,
    neighbour_len: int = 128,
    num_neighbours: int = 2,
    training: bool = False,
    decoding: bool = False,
    batch: int = 1,
    device: str = "cuda",
) -> Projection:
    """The cheaper way by `projection_costs`, of which these are the arguments; materialised where they are close."""
    costs = projection_costs(
        head_dim=head_dim,
        encoder_dim=encoder_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        chunk_size=chunk_size,
        neighbour_len=neighbour_len,
        num_neighbours=num_neighbours,
        training=training,
        decoding=decoding,
        batch=batch,
        device=device,
    )
    margin = _CPU_MARGIN if device == "cpu" else _GPU_MARGIN
    return "absorbed" if margin * costs["absorbed"] < costs["materialised"] else "materialised"


def _on_cpu(kernels: list[Kernel], cost: _Cpu) -> float:
    flops, elements, logits = (sum(column) for column in zip(*kernels, strict=True))
    return flops * cost.per_flop + elements * cost.per_element + logits * cost.per_logit


def _on_gpu(kernel: Kernel) -> tuple[float, float]:
    """Seconds of its operations, and of its bytes."""
    return kernel.flops / _GPU_FLOPS, 2 * kernel.elements / _GPU_BYTES


def _decoding(
    rows: int, keys: int, width: int, heads: int, inner: int, kv_inner: int, batch: int, device: str
) -> dict[Projection, float]:
    project, weights = 4 * keys * width * kv_inner / rows, 2 * kv_inner * width
    fold, attend = 4 * inner * width, 4 * heads * keys * width
    both, states = 2 * keys * kv_inner, keys * width
    if device == "cpu":
        materialised = 4 * both * _CPU_BYTE + project / 86e9
        folding = max(4 * weights / batch * _CPU_BYTE, fold * _CPU_THIN)
        return {
            "materialised": materialised,
            "absorbed": folding + max(4 * states * _CPU_BYTE, attend * _CPU_THIN),
        }
    per_row = heads * width * 8  # the query of width E and the result, written and read
    absorbed = (2 * weights + per_row * batch + 2 * states * batch) / _GPU_DECODE_BYTES
    parts = max(1.0, min(keys / 32, 132 / batch))  # into which a few sequences are cut to fill the GPU
    absorbed = max(absorbed, (fold + attend) * batch / (_GPU_FLOPS / 2)) + parts * _GPU_PART
    absorbed += _GPU_ABSORBED_LAUNCHES
    materialised = 2 * both * batch / _GPU_DECODE_BYTES + _GPU_MATERIALISED_LAUNCHES
    return {
        "materialised": materialised / batch + project / _GPU_FLOPS,
        "absorbed": absorbed / batch,
    }
