"""Absorbed attention against projecting keys and values: values, gradients, registration."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_accurate
from torch import Tensor

from retro_kernels.ops import _backend, chunked_cross_attention
from retro_kernels.ops.cca import absorbed
from retro_kernels.ops.cca.absorbed import absorbed_cross_attention
from retro_kernels.ops.cca.reference import dropout_keep, relative_column

BACKENDS = [
    "torch",
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(
            not (_backend.INTERPRETING or torch.cuda.is_available()), reason="needs the interpreter or a GPU"
        ),
    ),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRADIENTS = (
    "query",
    "states",
    "key_weight",
    "value_weight",
    "rel_key",
    "content_bias",
    "position_bias",
    "rel_bias",
    "value_bias",
)


def make(
    B: int,
    N: int,
    H: int,
    Hkv: int,
    D: int,
    M: int,
    K: int,
    R: int,
    E: int,
    dtype: torch.dtype,
    lengths: bool = True,
) -> dict[str, Any]:
    columns = M + R - 1
    shapes = {
        "query": (B, N, H, D),
        "states": (B, N // M, K, R, E),
        "key_weight": (Hkv * D, E),
        "value_weight": (Hkv * D, E),
        "key_bias": (Hkv * D,),
        "value_bias": (Hkv * D,),
        "rel_key": (H, columns, D),
        "content_bias": (H, D),
        "position_bias": (H, D),
        "rel_bias": (H, columns),
    }
    tensors: dict[str, Any] = {name: torch.randn(shape, device=DEVICE) for name, shape in shapes.items()}
    for name in ("key_weight", "value_weight"):
        tensors[name] /= E**0.5
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    if lengths:
        tensors["neighbour_lengths"] = torch.randint(0, R + 1, (B, N // M, K), device=DEVICE)
        tensors["neighbour_lengths"][0, 0] = R
        if N // M > 1:
            tensors["neighbour_lengths"][0, 1] = 0  # nothing at all
    return tensors | {"chunk_size": M}


def plain(
    query: Tensor,
    states: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    *,
    chunk_size: int,
    rel_key: Tensor,
    content_bias: Tensor,
    position_bias: Tensor,
    rel_bias: Tensor,
    value_bias: Tensor,
    key_bias: Tensor,
    neighbour_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """The same without any care, in the dtype of its inputs: the yardstick."""
    B, N, H, D = query.shape
    _, L, K, R, E = states.shape
    M = chunk_size
    rows = F.pad(query[:, M - 1 :], (0, 0, 0, 0, 0, L * M - (N - M + 1))).view(B, L, M, H, D)
    group = H * D // key_weight.shape[0]
    to_states, from_states = (
        w.view(-1, D, E).repeat_interleave(group, 0) for w in (key_weight, value_weight)
    )
    mixing = torch.einsum("blahd,hde->blahe", rows + content_bias, to_states)
    logits = torch.einsum("blahe,bljce->blhajc", mixing, states)
    relative = torch.einsum("blahd,hgd->blhag", rows + position_bias, rel_key)
    column = relative_column(M, R, query.device)
    logits = logits + relative.gather(-1, column.expand(B, L, H, M, R))[..., None, :]
    logits = (
        logits.to(torch.promote_types(query.dtype, torch.float32)) * D**-0.5 + rel_bias[:, column][:, :, None]
    )
    present = torch.ones(B, L, device=query.device, dtype=torch.bool)
    if neighbour_lengths is not None:
        missing = torch.arange(R, device=query.device) >= neighbour_lengths[..., None]
        logits = logits.masked_fill(missing[:, :, None, None], float("-inf"))
        present = ~missing.flatten(2).all(2)
    weights = logits.flatten(-2).softmax(-1).masked_fill(~present[:, :, None, None, None], 0.0)
    if dropout_p:
        seed = torch.randint(2**63 - 1, (1,), device=query.device)
        keep = dropout_keep(seed, (B * L, H, M, K * R), dropout_p).view(weights.shape)
        weights = weights * keep / (1 - dropout_p)
    mixed = torch.einsum("blhak,blke->blahe", weights.to(query.dtype), states.flatten(2, 3))
    out = torch.einsum("blahe,hde->blahd", mixed, from_states)
    out = (
        out + value_bias.view(-1, D).repeat_interleave(group, 0) * weights.sum(-1).transpose(2, 3)[..., None]
    )
    out = out.to(query.dtype).flatten(1, 2)[:, : N - M + 1]
    return F.pad(out, (0, 0, 0, 0, M - 1, 0))


def run(
    function: Any, tensors: dict[str, Any], grad_out: Tensor, dtype: torch.dtype, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {
        name: x.detach().to(dtype).requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x
        for name, x in tensors.items()
    }
    torch.manual_seed(torch.initial_seed())  # so that all draw the same seed for dropout
    out = function(**leaves, **options)
    out.backward(grad_out.to(dtype))
    return out, {name: x.grad for name, x in leaves.items() if torch.is_tensor(x) and x.grad is not None}


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_layouts_do_not_matter(backend: str, seed: int) -> None:
    tensors = make(2, 37, 4, 2, 16, 8, 2, 16, 24, dtype=torch.float32)
    others = {
        name: x.transpose(0, -1).contiguous().transpose(0, -1) if torch.is_tensor(x) and x.dim() > 1 else x
        for name, x in tensors.items()
    }
    others["neighbour_lengths"] = torch.stack([tensors["neighbour_lengths"].int()] * 2, -1)[..., 0]
    assert sum(torch.is_tensor(x) and not x.is_contiguous() for x in others.values()) == 9
    grad_out = torch.randn(tensors["query"].shape, device=DEVICE)
    ours, expected = (
        run(absorbed_cross_attention, x, grad_out, torch.float32, backend=backend) for x in (others, tensors)
    )
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("sizes", "dropout_p"),
    [
        ((2, 37, 4, 2, 16, 8, 2, 16, 24), 0.0),  # grouped heads, two sequences, N odd
        ((1, 33, 3, 3, 16, 16, 3, 48, 40), 0.0),  # R no power of two
        ((1, 24, 2, 1, 24, 8, 1, 16, 16), 0.0),  # one neighbour, D no power of two
        ((1, 20, 2, 2, 16, 8, 2, 16, 24), 0.25),
    ],
)
def test_against_projection(
    backend: str, dtype: torch.dtype, sizes: Any, dropout_p: float, seed: int
) -> None:
    tensors = make(*sizes, dtype=dtype)
    grad_out = torch.randn(tensors["query"].shape, device=DEVICE, dtype=dtype)
    options = {"dropout_p": dropout_p}
    exact, exact_grads = run(
        absorbed_cross_attention, tensors, grad_out, torch.float64, backend="reference", **options
    )
    yardstick, yardstick_grads = run(plain, tensors, grad_out, dtype, **options)
    ours, grads = run(absorbed_cross_attention, tensors, grad_out, dtype, backend=backend, **options)
    assert_accurate(ours, yardstick, exact, "output")
    for name in GRADIENTS:
        assert_accurate(
            grads[name], yardstick_grads[name], exact_grads[name], f"gradient of {name}", gradient=True
        )
    assert torch.equal(grads["key_bias"], torch.zeros_like(grads["key_bias"]))
    M = tensors["chunk_size"]
    assert ours[:, : M - 1].eq(0).all()
    if sizes[1] // M > 1:
        assert ours[0, 2 * M - 1 : 3 * M - 1].eq(0).all()  # that chunk has no neighbour
        assert grads["states"][0, 1].eq(0).all()


def test_is_projection_then_attention(seed: int) -> None:
    tensors = make(2, 21, 4, 2, 16, 8, 2, 16, 24, torch.float64)
    states, rest = tensors["states"], dict(tensors)
    key, value = (
        F.linear(states, rest.pop(f"{x}_weight"), rest.pop(f"{x}_bias")).unflatten(-1, (-1, 16))
        for x in ("key", "value")
    )
    del rest["states"]
    expected = chunked_cross_attention(rest.pop("query"), key, value, **rest, backend="reference")
    assert expected.norm() > 0
    for backend in ("reference", "torch"):
        torch.testing.assert_close(absorbed_cross_attention(**tensors, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 7, 8, 15, 17])
def test_short_sequences(backend: str, tokens: int, seed: int) -> None:
    tensors = make(1, tokens, 2, 2, 16, 8, 2, 16, 16, torch.float32, lengths=False)
    grad_out = torch.randn(tensors["query"].shape, device=DEVICE)
    exact, exact_grads = run(absorbed_cross_attention, tensors, grad_out, torch.float64, backend="reference")
    ours, grads = run(absorbed_cross_attention, tensors, grad_out, torch.float32, backend=backend)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)
    for name in ("query", "value_weight", "rel_key"):
        torch.testing.assert_close(grads[name].double(), exact_grads[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_change_nothing(backend: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = make(2, 21, 4, 2, 16, 8, 2, 16, 24, torch.float32)
    grad_out = torch.randn(tensors["query"].shape, device=DEVICE)
    # the kernels draw by the number of a block, wherever a slice begins; plain PyTorch draws for all blocks at once
    options = {"backend": backend, "dropout_p": 0.25 if backend == "triton" else 0.0}
    whole, whole_grads = run(absorbed_cross_attention, tensors, grad_out, torch.float32, **options)
    monkeypatch.setattr(absorbed, "_SLICE", {DEVICE: 3 * 8 * 4 * 32})  # three of the four blocks, then one
    sliced, sliced_grads = run(absorbed_cross_attention, tensors, grad_out, torch.float32, **options)
    with torch.no_grad():
        torch.manual_seed(torch.initial_seed())
        unkept = absorbed_cross_attention(**tensors, **options)
    torch.testing.assert_close(sliced, whole)
    torch.testing.assert_close(unkept, whole)
    for name in GRADIENTS:
        torch.testing.assert_close(sliced_grads[name], whole_grads[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("chunk", "length", "rows"), [(64, 128, 32), (64, 16, 256), (1024, 2, 16)])
def test_a_tile_of_short_neighbours_is_one_that_triton_takes(
    chunk: int, length: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from retro_kernels.ops.cca import absorbed_softmax

    found: dict[str, Any] = {}
    kernel = {(chunk * 8 // rows,): lambda *_, **sizes: found.update(sizes)}
    monkeypatch.setattr(absorbed_softmax, "_cca_absorbed_softmax_bwd_kernel", kernel)
    weights, rel = torch.empty(1, chunk * 8, length), torch.empty(1, chunk * 8, chunk + length - 1)
    sizes: dict[str, Any] = {
        "first": 0,
        "block": chunk,
        "heads": 8,
        "neighbour_len": length,
        "dropout_p": 0.0,
    }
    absorbed_softmax.softmax_backward_triton(weights, weights, rel, None, **sizes)
    assert found["ROWS"] == rows and rows * found["BG"] <= 2**20


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_run_is_the_same(backend: str, seed: int) -> None:
    tensors = make(1, 21, 4, 2, 16, 8, 2, 16, 24, torch.float32)
    grad_out = torch.randn(tensors["query"].shape, device=DEVICE)
    first, first_grads = run(absorbed_cross_attention, tensors, grad_out, torch.float32, backend=backend)
    for _ in range(3):
        out, grads = run(absorbed_cross_attention, tensors, grad_out, torch.float32, backend=backend)
        assert torch.equal(out, first)
        assert all(torch.equal(grads[name], first_grads[name]) for name in GRADIENTS)


def test_only_wanted_gradients(seed: int) -> None:
    tensors = make(1, 21, 2, 2, 16, 8, 2, 16, 24, torch.float32)
    grad_out = torch.randn(tensors["query"].shape, device=DEVICE)
    _, expected = run(absorbed_cross_attention, tensors, grad_out, torch.float32, backend="torch")
    for name in GRADIENTS:
        leaf = tensors[name].detach().requires_grad_()
        absorbed_cross_attention(**{**tensors, name: leaf}, backend="torch").backward(grad_out)
        torch.testing.assert_close(leaf.grad, expected[name])


def test_gradcheck(seed: int) -> None:
    tensors = make(1, 9, 2, 1, 4, 4, 2, 4, 3, torch.float64)
    names = [*GRADIENTS]
    leaves = [tensors.pop(name).requires_grad_() for name in names]

    def function(*values: Tensor) -> Tensor:
        return absorbed_cross_attention(**tensors, **dict(zip(names, values, strict=True)), backend="torch")

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    (grad,) = torch.autograd.grad(function(*leaves).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("fused", [False, True])
def test_opcheck(fused: bool, seed: int) -> None:
    if fused and not (_backend.INTERPRETING or torch.cuda.is_available()):
        pytest.skip("needs the interpreter or a GPU")
    tensors = make(1, 17, 2, 1, 16, 8, 2, 16, 16, torch.float32)
    names = (
        "query",
        "states",
        "key_weight",
        "value_weight",
        "rel_key",
        "content_bias",
        "position_bias",
        "rel_bias",
        "neighbour_lengths",
    )
    args = (*(tensors[name] for name in names), None, 8, 0.25, 0.0, fused)
    for keep in (True, False):
        torch.library.opcheck(absorbed._cca_absorbed_fwd, (*args, keep))
    out, weights, mixed = absorbed._cca_absorbed_fwd(*args, True)
    for needs in ([True] * 8, [True, False] * 4):
        torch.library.opcheck(
            absorbed._cca_absorbed_bwd, (torch.randn_like(out), weights, mixed, *args, needs)
        )


def test_fullgraph(seed: int) -> None:
    tensors = make(1, 17, 2, 1, 16, 8, 2, 16, 16, torch.float32)
    grad_out = torch.randn(tensors["query"].shape, device=DEVICE)
    compiled = torch.compile(absorbed_cross_attention, fullgraph=True, backend="aot_eager")
    ours, grads = run(compiled, tensors, grad_out, torch.float32, backend="torch")
    eager, eager_grads = run(absorbed_cross_attention, tensors, grad_out, torch.float32, backend="torch")
    torch.testing.assert_close(ours, eager)
    for name in GRADIENTS:
        torch.testing.assert_close(grads[name], eager_grads[name])


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_bias_that_forbids_all_keys(backend: str, seed: int) -> None:
    tensors = make(2, 17, 2, 1, 16, 8, 2, 16, 16, torch.float32, lengths=False)
    tensors["rel_bias"][1] = -math.inf
    leaves = [tensors[name].requires_grad_() for name in ("query", "states")]
    for bias in (None, tensors["value_bias"]):
        out = absorbed_cross_attention(**{**tensors, "value_bias": bias}, backend=backend)
        assert not out[:, :, 1].any() and out[:, 7:, 0].ne(0).any(-1).all()
        assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_bias_that_forbids_the_keys_of_some_rows(backend: str, seed: int) -> None:
    """All that short neighbours have, for rows near the chunk's end; of one head."""
    tensors = make(2, 26, 2, 1, 16, 8, 2, 16, 16, torch.float32)
    tensors["rel_bias"][1, 16:] = -math.inf
    tensors["neighbour_lengths"] = torch.tensor([[[0, 3], [2, 5], [16, 1]], [[0, 0], [1, 1], [0, 16]]])
    tensors["neighbour_lengths"] = tensors["neighbour_lengths"].to(DEVICE)
    given = dict(tensors)
    states = given.pop("states")
    for name in ("key", "value"):
        projected = F.linear(states, given.pop(f"{name}_weight"), given.pop(f"{name}_bias"))
        given[name] = projected.unflatten(-1, (-1, 16))
    expected = chunked_cross_attention(**given, backend="reference")
    nothing = expected.eq(0).all(-1)
    assert nothing[:, :, 1].sum() > nothing[:, :, 0].sum()
    out = absorbed_cross_attention(**tensors, backend=backend)
    assert torch.equal(out.eq(0).all(-1), nothing)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_biases_of_a_wider_dtype(dropout_p: float, seed: int) -> None:
    tensors = make(1, 17, 2, 1, 16, 8, 2, 16, 16, torch.bfloat16)
    for name in ("key_bias", "value_bias"):
        tensors[name] = tensors[name].float()
    for backend in ("torch", "reference"):
        out = absorbed_cross_attention(**tensors, dropout_p=dropout_p, backend=backend)
        assert out.dtype == torch.bfloat16 and out.isfinite().all()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("biases", [False, True])
def test_what_lies_behind_a_length_may_be_nan_where_no_kernel_runs(
    backend: str, biases: bool, seed: int
) -> None:
    """Neither the result nor a gradient sees it; a chunk of missing neighbours is zero, never NaN."""
    tensors = make(2, 17, 2, 1, 16, 8, 2, 16, 16, torch.float32)
    if not biases:
        del tensors["key_bias"], tensors["value_bias"]
    hidden = torch.arange(16, device=DEVICE) >= tensors["neighbour_lengths"][..., None]
    found = []
    for behind in (1.0, math.nan):
        given = {n: x.clone() if torch.is_tensor(x) else x for n, x in tensors.items()}
        given["states"].masked_fill_(hidden[..., None], behind)
        leaves = [given[name].requires_grad_() for name in GRADIENTS if name in given]
        out = absorbed_cross_attention(**given, backend=backend)
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert not found[0][0][0, 15:].any()  # its second chunk has no neighbour
    for plain_one, with_nan in zip(*found, strict=True):
        assert torch.equal(plain_one, with_nan)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_gives_what_inputs_cast_beforehand_give(backend: str, seed: int) -> None:
    """All but the bias: 200 and a bit has no fraction in bfloat16. Each backend computes as outside of autocast."""
    tensors = make(1, 17, 2, 1, 16, 8, 2, 16, 16, torch.float32)
    tensors["rel_bias"] += 200
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = absorbed_cross_attention(**tensors, backend=backend)
    cast = {
        name: x.bfloat16() if torch.is_tensor(x) and x.is_floating_point() and name != "rel_bias" else x
        for name, x in tensors.items()
    }
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, absorbed_cross_attention(**cast, backend=backend))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"states": torch.zeros(1, 3, 2, 16, 16)}, "2 chunks expected"),
        ({"key_weight": torch.zeros(24, 16)}, "Hkv"),
        ({"key_weight": torch.zeros(())}, r"key_weight has shape \(\); expected"),
        ({"value_weight": torch.zeros(32, 8)}, "value_weight has shape"),
        ({"rel_key": None}, "position_bias is given without rel_key"),
        ({"neighbour_lengths": torch.zeros(1, 2, 3, dtype=torch.int64)}, "neighbour_lengths has shape"),
        ({"dropout_p": 1.0}, "dropout_p"),
        ({"backend": "cuda"}, "there is no backend"),
    ],
)
def test_wrong_inputs(change: dict[str, Any], message: str) -> None:
    tensors = {
        name: x.cpu() if torch.is_tensor(x) else x
        for name, x in make(1, 17, 2, 2, 16, 8, 2, 16, 16, torch.float32).items()
    }
    with pytest.raises(ValueError, match=message):
        absorbed_cross_attention(**{**tensors, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gpu(dtype: torch.dtype, seed: int) -> None:
    tensors = make(2, 200, 4, 2, 64, 64, 2, 128, 896, dtype)
    grad_out = torch.randn(tensors["query"].shape, device=DEVICE, dtype=dtype)
    exact, exact_grads = run(absorbed_cross_attention, tensors, grad_out, torch.float64, backend="reference")
    yardstick, yardstick_grads = run(plain, tensors, grad_out, dtype)
    ours, grads = run(absorbed_cross_attention, tensors, grad_out, dtype, backend="triton")
    assert_accurate(ours, yardstick, exact, "output")
    for name in GRADIENTS:
        assert_accurate(
            grads[name], yardstick_grads[name], exact_grads[name], f"gradient of {name}", gradient=True
        )
