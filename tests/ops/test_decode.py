"""Decoding: row a of an attending chunk, alone, against the same row of the whole."""

from __future__ import annotations

import math
import runpy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_accurate
from torch import Tensor

from retro_kernels.ops import _backend, chunked_cross_attention
from retro_kernels.ops.cca import decode
from retro_kernels.ops.cca.decode import absorbed_decode, chunked_cross_attention_decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_TRITON = _backend.INTERPRETING or torch.cuda.is_available()
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs the interpreter or a GPU")
BACKENDS = ["torch", "reference", pytest.param("triton", marks=needs_triton)]
SIZES = [
    (3, 1, 4, 2, 16, 8, 2, 16, 24),  # one token, grouped heads
    (2, 3, 3, 3, 24, 16, 3, 48, 112),  # a few; D and R no powers of two; states in three panels
    (2, 2, 20, 4, 16, 8, 1, 16, 64),  # more rows than one tile
]


def make(
    B: int, T: int, H: int, Hkv: int, D: int, M: int, K: int, R: int, E: int, dtype: torch.dtype
) -> dict[str, Any]:
    columns = M + R - 1
    shapes = {
        "query": (B, T, H, D),
        "states": (B, K, R, E),
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
    rows = torch.randint(0, M, (B, T), device=DEVICE)
    rows[0, 0] = -1
    lengths = torch.randint(1, R + 1, (B, K), device=DEVICE)
    lengths[:1, :1] = 0
    return tensors | {"rows": rows, "neighbour_lengths": lengths}


def project(tensors: dict[str, Any]) -> dict[str, Any]:
    """Keys and values instead of states and weights."""
    rest = dict(tensors)
    states, head_dim = rest.pop("states"), rest["query"].shape[-1]
    for name in ("key", "value"):
        projected = F.linear(states, rest.pop(f"{name}_weight"), rest.pop(f"{name}_bias"))
        rest[name] = projected.unflatten(-1, (-1, head_dim))
    return rest


def whole(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    rows: Tensor,
    neighbour_lengths: Tensor,
    chunk_size: int,
    **terms: Tensor,
) -> Tensor:
    """Every token in a full sequence of two chunks of its own, of which the second has its row."""
    B, T, H, D = query.shape
    out = torch.zeros_like(query)
    for b in range(B):
        for t in range(T):
            row = int(rows[b, t])
            if row >= 0:
                sequence = torch.zeros(1, 2 * chunk_size, H, D, dtype=query.dtype, device=query.device)
                sequence[0, chunk_size - 1 + row] = query[b, t]
                of_two = [x[b].expand(1, 2, *x[b].shape) for x in (key, value, neighbour_lengths)]
                full = chunked_cross_attention(
                    sequence,
                    of_two[0],
                    of_two[1],
                    chunk_size=chunk_size,
                    neighbour_lengths=of_two[2],
                    **terms,
                    backend="reference",
                )
                out[b, t] = full[0, chunk_size - 1 + row]
    return out


def to(tensors: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: x.to(dtype) if x is not None and x.is_floating_point() else x for name, x in tensors.items()
    }


@pytest.fixture(params=[pytest.param(False, id="whole"), pytest.param(True, id="split", marks=needs_triton)])
def split(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program has all keys of a row, or each has one tile of them and the parts are merged."""
    if HAS_TRITON:
        from retro_kernels.ops.cca import decode_kernel

        monkeypatch.setattr(decode_kernel, "slots", lambda device, resident: 10_000 if request.param else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", SIZES)
@needs_triton
def test_kernels_compute_rows_of_the_whole(dtype: torch.dtype, sizes: Any, split: None, seed: int) -> None:
    backend = "triton"
    chunk_size = sizes[5]
    tensors = make(*sizes, dtype=dtype)
    exact = whole(**project(to(tensors, torch.float64)), chunk_size=chunk_size)
    plain = absorbed_decode(**tensors, backend="torch")
    ours = absorbed_decode(**tensors, backend=backend)
    assert_accurate(ours, plain, exact, "absorbed")
    assert ours[0, 0].eq(0).all()

    projected = project(tensors)
    exact = whole(**to(projected, torch.float64), chunk_size=chunk_size)
    plain = chunked_cross_attention_decode(**projected, backend="torch")
    ours = chunked_cross_attention_decode(**projected, backend=backend)
    assert_accurate(ours, plain, exact, "over keys and values")
    assert ours[0, 0].eq(0).all()


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 34), (torch.float16, 66)])
@needs_triton
def test_products_of_more_rows_than_a_tile(dtype: torch.dtype, rows: int, split: None, seed: int) -> None:
    """Nor are their widths multiples of a tile's."""
    tensors = make(rows, 1, 2, 1, 24, 4, 1, 64, 72, dtype)
    exact = absorbed_decode(**to(tensors, torch.float64), backend="reference")
    plain = absorbed_decode(**tensors, backend="torch")
    assert_accurate(absorbed_decode(**tensors, backend="triton"), plain, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("integers", [torch.int64, torch.int32, torch.uint8])
def test_layouts_and_integer_types_do_not_matter(backend: str, integers: torch.dtype, seed: int) -> None:
    def strided(x: Tensor) -> Tensor:
        turned = x.transpose(0, -1).contiguous().transpose(0, -1)
        return turned if x.numel() == 1 or not turned.is_contiguous() else x

    tensors = make(*SIZES[1], dtype=torch.float32)
    tensors["rows"] = tensors["rows"].clamp(min=0)
    for function, given in ((absorbed_decode, tensors), (chunked_cross_attention_decode, project(tensors))):
        others = {name: strided(x if x.is_floating_point() else x.to(integers)) for name, x in given.items()}
        assert sum(not x.is_contiguous() for x in others.values()) >= 8
        ours, expected = function(**others, backend=backend), function(**given, backend=backend)
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("sizes", SIZES[:2])
def test_plain_computes_rows_of_the_whole(sizes: Any, seed: int) -> None:
    """The yardstick above is the "torch" backend; in float64 it is the definition."""
    tensors = make(*sizes, dtype=torch.float64)
    exact = whole(**project(tensors), chunk_size=sizes[5])
    assert exact.norm() > 0
    for backend in ("torch", "reference"):
        torch.testing.assert_close(absorbed_decode(**tensors, backend=backend), exact)
        torch.testing.assert_close(chunked_cross_attention_decode(**project(tensors), backend=backend), exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "kept", [(), ("rel_bias",), ("rel_key", "position_bias"), ("rel_key",), ("content_bias",)]
)
def test_without_terms(backend: str, kept: tuple[str, ...], seed: int) -> None:
    tensors = make(*SIZES[0], dtype=torch.float32)
    for name in ("rel_key", "position_bias", "rel_bias", "content_bias", "key_bias", "value_bias"):
        if name not in kept:
            tensors[name] = None
    rest = project(
        {name: x for name, x in tensors.items() if x is not None} | {"key_bias": None, "value_bias": None}
    )
    exact = whole(**to(rest, torch.float64), chunk_size=8)
    for out in (
        absorbed_decode(**tensors, backend=backend),
        chunked_cross_attention_decode(**rest, backend=backend),
    ):
        torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "small", "limit"),
    [(torch.float32, False, 128), (torch.float16, False, 2048), (torch.float16, True, 1024)],
)
def test_states_that_are_too_wide_for_the_kernel(
    dtype: torch.dtype, small: bool, limit: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused where the kernel is asked for, else PyTorch decodes them; less where there is little shared memory."""
    monkeypatch.setattr(decode, "is_small", lambda device: small)
    wider = make(1, 1, 1, 1, 16, 8, 1, 16, limit + 16, dtype=dtype)
    with pytest.raises(ValueError, match=f"it takes states up to {limit:,} wide in {dtype}"):
        absorbed_decode(**wider, backend="triton")
    torch.testing.assert_close(absorbed_decode(**wider), absorbed_decode(**wider, backend="torch"))
    if limit < 2048:
        widest = make(1, 1, 1, 1, 16, 8, 1, 16, limit, dtype=dtype)
        assert absorbed_decode(**widest, backend="triton").shape == (1, 1, 1, 16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_attend_to(backend: str, split: None, seed: int) -> None:
    tensors = make(*SIZES[0], dtype=torch.float32)
    tensors["neighbour_lengths"][1] = 0
    tensors["rows"][2] = -1
    for out in (
        absorbed_decode(**tensors, backend=backend),
        chunked_cross_attention_decode(**project(tensors), backend=backend),
    ):
        assert out.eq(0).all()
    tensors["neighbour_lengths"] = None
    assert absorbed_decode(**tensors, backend=backend)[1].ne(0).any()


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_neighbours_at_all(backend: str, lengths: bool, seed: int) -> None:
    tensors = make(*SIZES[0], dtype=torch.float32)
    tensors["states"] = tensors["states"][:, :0]
    tensors["neighbour_lengths"] = tensors["neighbour_lengths"][:, :0] if lengths else None
    assert absorbed_decode(**tensors, backend=backend).eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_that_forbids_all_keys(backend: str, split: None, seed: int) -> None:
    """Of one head and of some rows."""
    tensors = project(make(*SIZES[1], dtype=torch.float32))
    tensors["rel_bias"][1, :24] = -math.inf
    tensors["rows"][:] = torch.randint(0, 5, tensors["rows"].shape)
    out = chunked_cross_attention_decode(**tensors, backend=backend)
    lengths = tensors["neighbour_lengths"] = torch.full_like(tensors["neighbour_lengths"], 48)
    assert out.isfinite().all()
    tensors["rel_bias"][1, :] = -math.inf
    out = chunked_cross_attention_decode(**tensors, backend=backend)
    assert lengths.min() == 48 and not out[:, :, 1].any() and out[:, :, [0, 2]].ne(0).any(-1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_that_forbids_all_keys_of_the_states(backend: str, split: None, seed: int) -> None:
    """The bias of the values goes with the keys: of all rows of one head, of some rows of another."""
    tensors = make(*SIZES[1], dtype=torch.float32)
    tensors["rel_bias"][1], tensors["rel_bias"][2, 50:] = -math.inf, -math.inf
    tensors["rows"] = torch.tensor([[-1, 2, 15], [0, 9, 14]], device=DEVICE)
    tensors["neighbour_lengths"] = torch.tensor([[3, 0, 1], [2, 9, 4]], device=DEVICE)
    expected = chunked_cross_attention_decode(**project(tensors), backend="reference")
    out = absorbed_decode(**tensors, backend=backend)
    nothing = torch.zeros(2, 3, 3, dtype=torch.bool)
    nothing[:, :, 1] = nothing[0, 0] = nothing[0, 2, 2] = nothing[1, 2, 2] = True
    assert torch.equal(expected.eq(0).all(-1).cpu(), nothing) and torch.equal(out.eq(0), expected.eq(0))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_no_tokens_and_layouts(seed: int) -> None:
    """Results are contiguous, also those of which a gradient is wanted."""
    tensors = project(make(*SIZES[1], dtype=torch.float32))
    none = {**tensors, "query": tensors["query"][:, :0], "rows": tensors["rows"][:, :0]}
    for backend in ("torch", "reference"):
        out = chunked_cross_attention_decode(**none, backend=backend)
        assert out.shape == none["query"].shape and out.dtype == torch.float32
        for query in (
            tensors["query"].detach().requires_grad_(),
            tensors["query"].transpose(1, 2).contiguous(),
        ):
            given = query if query.requires_grad else query.transpose(1, 2)
            assert chunked_cross_attention_decode(
                **{**tensors, "query": given}, backend=backend
            ).is_contiguous()


@needs_triton
def test_every_run_is_the_same(split: None, seed: int) -> None:
    tensors = make(*SIZES[1], dtype=torch.float16)
    first = absorbed_decode(**tensors, backend="triton")
    assert all(torch.equal(absorbed_decode(**tensors, backend="triton"), first) for _ in range(3))


def test_gradients_run_plainly(seed: int) -> None:
    tensors = make(*SIZES[0], dtype=torch.float64)
    tensors["query"].requires_grad_()
    assert absorbed_decode(**tensors).requires_grad
    half = to(tensors, torch.float32)
    with pytest.raises(ValueError, match="no gradient" if HAS_TRITON else "cannot run here"):
        absorbed_decode(**half, backend="triton")
    names = ("query", "states", "value_weight", "rel_key", "rel_bias")
    leaves = [tensors.pop(name).detach().requires_grad_() for name in names]

    def function(*values: Tensor) -> Tensor:
        return absorbed_decode(**tensors, **dict(zip(names, values, strict=True)), backend="torch")

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("gradients", [False, True])
def test_autocast_gives_what_inputs_cast_beforehand_give(backend: str, gradients: bool, seed: int) -> None:
    """All but the bias: 200 and a bit has no fraction in bfloat16. Each backend computes as outside of autocast."""
    states = make(*SIZES[1], torch.float32)
    states["rel_bias"] += 200
    for function, tensors in (
        (chunked_cross_attention_decode, project(states)),
        (absorbed_decode, states),
    ):
        tensors["query"] = tensors["query"].clone().requires_grad_(gradients)
        cast = {
            name: x.bfloat16() if x.is_floating_point() and name != "rel_bias" else x
            for name, x in tensors.items()
        }
        with torch.autocast(DEVICE, torch.bfloat16):
            out = function(**tensors, backend=backend)
        assert out.dtype == torch.bfloat16 and torch.equal(out, function(**cast, backend=backend))


@needs_triton
def test_opcheck_and_fullgraph(seed: int) -> None:
    tensors = make(*SIZES[0], dtype=torch.float32)
    terms = [
        tensors[name]
        for name in ("rows", "rel_key", "content_bias", "position_bias", "rel_bias", "neighbour_lengths")
    ]
    projected = [project(tensors)[name] for name in ("query", "key", "value")]
    torch.library.opcheck(decode._cca_decode, (*projected, *terms, 0.25))
    absorbed = [tensors[name] for name in ("query", "states", "key_weight", "value_weight")]
    torch.library.opcheck(decode._cca_absorbed_decode, (*absorbed, *terms, 0.25))
    torch.library.opcheck(decode._cca_absorbed_decode, (*absorbed, tensors["rows"], *(None,) * 5, 0.25))
    compiled = torch.compile(absorbed_decode, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(**tensors, backend="triton"), absorbed_decode(**tensors, backend="triton")
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(3, 2, dtype=torch.int64)}, "rows has shape"),
        ({"states": torch.zeros(2, 2, 16, 24)}, "states has shape"),
        ({"neighbour_lengths": torch.zeros(3, 1, dtype=torch.int64)}, "neighbour_lengths has shape"),
        ({"rel_key": torch.zeros(4, 12, 16), "rel_bias": None}, "the position table has 12 columns"),
        ({"rel_key": None}, "position_bias is given without rel_key"),
        ({"key_weight": torch.zeros(())}, r"key_weight has shape \(\); expected"),
    ],
)
def test_wrong_inputs(change: dict[str, Any], message: str) -> None:
    tensors = {name: x.cpu() for name, x in make(*SIZES[0], dtype=torch.float32).items()}
    with pytest.raises(ValueError, match=message):
        absorbed_decode(**{**tensors, **change})
    with pytest.raises(TypeError, match="rows is"):
        absorbed_decode(**{**tensors, "rows": tensors["rows"].float()})
    with pytest.raises(TypeError, match="key_weight is of type NoneType"):
        absorbed_decode(**{**tensors, "key_weight": None})
    for name in ("rel_key", "rel_bias"):
        with pytest.raises(TypeError, match=f"{name} is of type list; it has to be a tensor"):
            absorbed_decode(**{**tensors, name: tensors[name].tolist()})


@needs_triton
def test_splits_fill_the_last_wave() -> None:
    from retro_kernels.ops.cca.launch import splits

    for programs in (1, 3, 64, 132, 133, 5000):
        for tiles in (1, 4, 20, 80):
            parts = splits(programs, tiles, 132)
            assert 1 <= parts <= tiles and (parts - 1) * -(-tiles // parts) < tiles  # none is empty
    assert splits(1, 80, 132, 3) == 3 and splits(7, 0, 132) == 1
    assert splits(5000, 80, 132) <= 2 and splits(1, 80, 132) >= 20 and splits(64, 80, 132) in (2, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [16, 32])
def test_gpu(dtype: torch.dtype, heads: int, seed: int) -> None:
    tensors = make(2, 1, heads, heads, 128, 64, 3, 128, 896, dtype)
    exact = whole(**project(to(tensors, torch.float64)), chunk_size=64)
    assert_accurate(
        absorbed_decode(**tensors, backend="triton"), absorbed_decode(**tensors, backend="torch"), exact
    )
    projected = project(tensors)
    exact = whole(**to(projected, torch.float64), chunk_size=64)
    ours, plain = (chunked_cross_attention_decode(**projected, backend=x) for x in ("triton", "torch"))
    assert_accurate(ours, plain, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("written", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "neighbours", "length", "width"),
    [
        (2, 1, 12, 2, 64, 512),
        (2, 1, 32, 5, 48, 768),  # R no multiple of a tile
        (3, 2, 24, 2, 16, 896),  # rows of two tiles, R less than one
        (70, 1, 32, 2, 128, 896),  # one part of every row
        (40, 1, 32, 2, 128, 896),  # a few, which a cluster merges, or the product with W_V
        (64, 1, 32, 4, 128, 896),
        (1, 3, 5, 40, 128, 1024),
        (2, 1, 32, 3, 128, 1024),  # shared memory for two tiles of states, not three
        (2, 1, 16, 0, 128, 896),
    ],
)
@pytest.mark.parametrize("terms", ["all", "rel_bias", "rel_key", "none"])
def test_states_on_the_gpu(
    terms: str,
    written: str,
    dtype: torch.dtype,
    batch: int,
    tokens: int,
    heads: int,
    neighbours: int,
    length: int,
    width: int,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the kernel in CUDA C++ and by the one in Triton; padding is not read, whatever it holds."""
    from retro_kernels.ops.cca import decode_native, launch

    launch.forget()
    calls, native = [], decode_native.Launch
    if written == "triton":
        monkeypatch.setattr(decode_native, "can_run", lambda *tensors: False)
    elif not decode_native.WITH_CUDA:
        pytest.skip("the extension is built without CUDA")
    monkeypatch.setattr(decode_native, "Launch", lambda *args: calls.append(args) or native(*args))
    tensors = make(batch, tokens, heads, heads, 64, 64, neighbours, length, width, dtype)
    if terms != "all":
        without = {"rel_bias", "rel_key", "position_bias", "content_bias"} - {terms}
        tensors.update(dict.fromkeys(without))
    if neighbours:
        padding = torch.arange(length, device=DEVICE) >= tensors["neighbour_lengths"][..., None]
        tensors["states"][padding] = 0.0
        exact = absorbed_decode(**to(tensors, torch.float64), backend="reference")
        plain = absorbed_decode(**tensors, backend="torch")
        tensors["states"][padding] = torch.nan
    small = {
        **tensors,
        "rows": tensors["rows"].int(),
        "neighbour_lengths": tensors["neighbour_lengths"].int(),
    }
    with torch.no_grad():
        ours = absorbed_decode(**tensors, backend="triton")
        again = [absorbed_decode(**x, backend="triton") for x in (tensors, small)]
    assert all(torch.equal(ours, x) for x in again)
    assert bool(calls) == (written == "cuda" and neighbours > 0)
    if not neighbours:
        assert torch.count_nonzero(ours) == 0
    else:
        assert_accurate(ours, plain, exact.to(torch.float64))
        # states at another address are another kernel's
        shifted = torch.empty(tensors["states"].numel() + 1, dtype=dtype, device=DEVICE)[1:]
        moved = {**tensors, "states": shifted.view_as(tensors["states"]).copy_(tensors["states"])}
        assert_accurate(absorbed_decode(**moved, backend="triton"), plain, exact.to(torch.float64))


def test_an_interpreter_that_does_not_know_this_numpy_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would raise a TypeError of its own from within a kernel."""
    pairs = [
        ("3.5.1", "2.4.0"),
        ("3.6.0", "2.5.2"),
        ("3.6.0", "2.3.5"),
        ("3.7.1", "2.5.2"),
        ("3.10.0", "2.4.6"),
    ]
    reasons = [_backend.why_not_interpreted(*pair) for pair in pairs]
    assert [x is None for x in reasons] == [False, False, True, True, True]
    monkeypatch.setattr(_backend, "INTERPRETING", True)
    monkeypatch.setattr(_backend, "_TRITON", "3.6.0")
    monkeypatch.setattr(_backend, "NOT_INTERPRETED", reasons[1])
    with pytest.raises(ValueError, match="Triton 3.6.0 does not run with numpy 2.5.2: it needs numpy<2.4"):
        absorbed_decode(
            **{n: x.cpu() for n, x in make(*SIZES[0], dtype=torch.float32).items()}, backend="triton"
        )


@pytest.mark.parametrize("value", ["1", "true", "Yes", "on", "y", "0", "2", ""])
def test_interpreting_is_what_triton_takes_for_it(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = pytest.importorskip("triton.knobs", reason="triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert runpy.run_path(_backend.__file__)["INTERPRETING"] == knobs.runtime.interpret


@needs_triton
def test_smaller_blocks_where_a_gpu_has_less_shared_memory(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    from triton.runtime.errors import OutOfResources

    from retro_kernels.ops.cca import decode_kernel

    tensors = make(*SIZES[0], dtype=torch.float32)
    expected = absorbed_decode(**tensors, backend="triton")
    make_launch, limit, tried = decode_kernel._attention, {"STAGES": 1, "BN": 16}, []

    def small(*args: Any, **chain: bool) -> Any:
        tried.append(args[-1])
        if any(args[-1][name] > most for name, most in limit.items()):
            raise OutOfResources(132_096, 101_376, "shared memory")
        return make_launch(*args, **chain)

    monkeypatch.setattr(decode_kernel, "_attention", small)
    monkeypatch.setattr(decode_kernel, "_fitted", {})
    torch.testing.assert_close(absorbed_decode(**tensors, backend="triton"), expected)
    assert len(tried) > 1 and tried[0]["STAGES"] == 2
    tried.clear()
    absorbed_decode(**tensors, backend="triton")
    assert len(tried) == 1  # it is remembered
    limit["BN"] = 8
    monkeypatch.setattr(decode_kernel, "_fitted", {})
    with pytest.raises(RuntimeError, match="needs 132,096 of shared memory in its smallest blocks"):
        absorbed_decode(**tensors, backend="triton")
