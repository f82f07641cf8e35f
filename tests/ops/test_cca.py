"""Chunked cross-attention and block attention: definition against loops from the paper, backends against it."""

from __future__ import annotations

import math
import mmap

import numpy as np
import pytest
import torch
from numerics import assert_accurate
from torch import Tensor

from retro_kernels import block_attention, chunked_cross_attention, use_backend
from retro_kernels.ops import _backend
from retro_kernels.ops.cca import native, op, tiles
from retro_kernels.ops.cca.reference import block_attention_reference

M, R, D = 16, 32, 16
TABLES = ("rel_key", "content_bias", "position_bias", "rel_bias")
BACKENDS = ("torch", "triton")


def inputs(
    dtype=torch.float32,
    device="cpu",
    *,
    batch=2,
    tokens=3 * M,
    heads=2,
    kv_heads=None,
    neighbours=2,
    chunk=M,
    length=R,
    size=D,
    tables=TABLES,
    lengths=True,
):
    """Query, key, value and the optional arguments of one call; lengths include none and all."""
    kv_heads = heads if kv_heads is None else kv_heads
    chunks = tokens // chunk

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, dtype=torch.float64) * scale).to(device, dtype)

    shapes = {
        "rel_key": (heads, chunk + length - 1, size),
        "content_bias": (heads, size),
        "position_bias": (heads, size),
        "rel_bias": (heads, chunk + length - 1),
    }
    options = {name: draw(*shapes[name], scale=0.5) for name in tables}
    if lengths and chunks:
        given = torch.randint(0, length + 1, (batch, chunks, neighbours))
        given[0, 0, 0] = 0
        if chunks > 1:
            given[0, 1] = 0  # a chunk without any neighbour
        given[0, 0, -1] = length  # set last: whatever the seed, something is attended to
        options["neighbour_lengths"] = given.to(device)
    block = (batch, chunks, neighbours, length, kv_heads, size)
    return [draw(batch, tokens, heads, size), draw(*block), draw(*block)], options


def loop(
    query,
    key,
    value,
    *,
    chunk_size=M,
    rel_key=None,
    content_bias=None,
    position_bias=None,
    rel_bias=None,
    neighbour_lengths=None,
    scale=None,
):
    """Section 2.4 and eq. 6 of the paper, one token, head, neighbour and key at a time, in float64."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    batch, tokens, heads, size = query.shape
    neighbours, length, kv_heads = key.shape[2:5]
    scale = 1 / math.sqrt(size) if scale is None else scale
    for b in range(batch):
        for t in range(chunk_size - 1, tokens):
            u, a = (t + 1) // chunk_size - 1, (t + 1) % chunk_size
            for h in range(heads):
                q, g = query[b, t, h].double(), h // (heads // kv_heads)
                logits, values = [], []
                for j in range(neighbours):
                    real = length if neighbour_lengths is None else int(neighbour_lengths[b, u, j])
                    for c in range(real):
                        distance = a - c + chunk_size - 1
                        column = distance + length - chunk_size
                        content = q if content_bias is None else q + content_bias[h].double()
                        logit = content @ key[b, u, j, c, g].double() * scale
                        if rel_key is not None:
                            position = q if position_bias is None else q + position_bias[h].double()
                            logit = logit + position @ rel_key[h, column].double() * scale
                        if rel_bias is not None:
                            logit = logit + rel_bias[h, column].double()
                        logits.append(logit)
                        values.append(value[b, u, j, c, g].double())
                if logits:
                    out[b, t, h] = torch.softmax(torch.stack(logits), 0) @ torch.stack(values)
    return out


def run(function, tensors, options, grad, **fixed):
    """Output and the gradients of every floating tensor, by name."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    named = {
        n: x.detach().clone().requires_grad_() if x.is_floating_point() else x for n, x in options.items()
    }
    out = function(*leaves, **named, **fixed)
    out.backward(grad.to(out.dtype))
    result = {"out": out.detach()}
    result |= {name: x.grad for name, x in zip(("query", "key", "value"), leaves, strict=False)}
    return result | {name: x.grad for name, x in named.items() if x.is_floating_point()}


def plain(*tensors, chunk_size=M, neighbour_lengths=None, scale=None, **tables):
    """The definition, rounding where plain PyTorch code in the inputs' dtype would: the yardstick of the tolerance."""
    query, key, value = tensors
    blocks = (-1, *key.shape[2:])
    lengths = None if neighbour_lengths is None else neighbour_lengths.flatten(0, 1)
    return block_attention_reference(
        query,
        key.reshape(blocks),
        value.reshape(blocks),
        tables.get("rel_key"),
        tables.get("content_bias"),
        tables.get("position_bias"),
        tables.get("rel_bias"),
        lengths,
        block=chunk_size,
        shift=chunk_size - 1,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        upcast=False,
    )


def compare(backend, dtype, device="cpu", **sizes):
    tensors, options = inputs(dtype, device, **sizes)
    chunk = {"chunk_size": sizes.get("chunk", M)}
    grad = torch.randn(tensors[0].shape, dtype=torch.float64, device=device).to(dtype)
    ours = run(chunked_cross_attention, tensors, options, grad, backend=backend, **chunk)
    yardstick = run(plain, tensors, options, grad, **chunk)
    exact_options = {n: x.double() if x.is_floating_point() else x for n, x in options.items()}
    exact = run(
        chunked_cross_attention,
        [x.double() for x in tensors],
        exact_options,
        grad.double(),
        backend="reference",
        **chunk,
    )
    for name in exact:
        assert_accurate(ours[name], yardstick[name], exact[name], f"{backend} {name}", gradient=name != "out")


SHAPES = {
    "everything": {},
    "no positions": {"tables": (), "lengths": False},
    "relative keys": {"tables": ("rel_key",)},
    "content bias alone": {"tables": ("content_bias",)},
    "additive bias": {"tables": ("rel_bias",)},
    "grouped heads": {"heads": 4, "kv_heads": 2},
    "one token past a chunk's end": {"tokens": 2 * M},
    "one token short of a chunk": {"tokens": 3 * M - 1},
    "five tokens past": {"tokens": 2 * M + 5},
    "only the last token attends": {"tokens": M},
    "five neighbours": {"neighbours": 5},
    "length no power of two": {"length": 48},
    "wide heads": {"size": 64, "heads": 1},
    "odd heads": {"size": 22, "heads": 1},
    "chunks of 64": {"chunk": 64, "tokens": 2 * 64 + 5, "length": 128, "heads": 1, "batch": 1},
    "chunks of 128": {"chunk": 128, "tokens": 128 + 9, "length": 48, "heads": 1, "batch": 1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_compute_the_definition(seed, backend, shape, dtype):
    compare(backend, dtype, **SHAPES[shape])


@pytest.mark.parametrize("shape", ["everything", "grouped heads", "five tokens past"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_cpu_path_in_other_dtypes(seed, shape, dtype):
    if dtype != torch.float64:
        return compare("torch", dtype, **SHAPES[shape])
    tensors, options = inputs(dtype, **SHAPES[shape])
    grad = torch.randn_like(tensors[0])
    ours, exact = (
        run(chunked_cross_attention, tensors, options, grad, backend=b, chunk_size=M)
        for b in ("torch", "reference")
    )
    for name in exact:
        torch.testing.assert_close(ours[name], exact[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("shape", ["everything", "additive bias", "grouped heads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_path_without_the_extension(seed, monkeypatch, shape, dtype):
    monkeypatch.setattr("retro_kernels.ops.cca.native._WORKS", False)
    compare("torch", dtype, **SHAPES[shape])


@pytest.mark.parametrize("strange", [False, True])
def test_bfloat16_is_float32_rounded_once(seed, monkeypatch, strange):
    """In C++, of numbers to the nearest, of two as near to the even one; infinities and NaN stay what they are."""
    if not native.can_run(torch.zeros(1), 0.0):
        pytest.skip("the extension has no attention for this processor")
    monkeypatch.setattr(native, "_BF16", True)  # as without AMX
    tensors, options = inputs(torch.bfloat16, heads=2)
    assert native.can_run(tensors[0], 0.0)
    if strange:
        tensors[2][0, 0, :, :, :, :4] = torch.tensor([math.inf, -math.inf, math.nan, 3.3e38])
        options["neighbour_lengths"][0, 0] = R
    else:  # many a mean lies in the middle between two numbers of bfloat16
        tensors[0].zero_()
        options = {"neighbour_lengths": options["neighbour_lengths"].clamp(max=2)}
    wide = [x.float() for x in tensors]
    names = [name for name, x in options.items() if x is not None and x.is_floating_point()]
    for_wide = options | {name: options[name].float() for name in names}
    out = chunked_cross_attention(*tensors, chunk_size=M, backend="torch", **options)
    expected = chunked_cross_attention(*wide, chunk_size=M, backend="torch", **for_wide).bfloat16()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert expected.isnan().any() == strange and expected.isinf().any() == strange


def test_cpu_path_with_a_second_tile_of_rows(seed):
    """At the paper's chunks and neighbours; with three of them also where the vectors are of 512 bits."""
    compare(
        "torch",
        torch.float32,
        batch=1,
        tokens=127,
        heads=1,
        neighbours=3,
        chunk=64,
        length=128,
        lengths=False,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_length_beyond_the_keys_is_all_of_them(seed, backend):
    """Of a number of keys that fills no tile, and for a length that 32 bits do not hold."""
    tensors, options = inputs(
        batch=1, tokens=2 * M - 1, heads=1, neighbours=1, length=24, tables=("rel_bias",)
    )
    grad = torch.randn_like(tensors[0])
    beyond, everything = (
        run(chunked_cross_attention, tensors, given, grad, chunk_size=M, backend=backend)
        for given in (
            {**options, "neighbour_lengths": torch.full_like(options["neighbour_lengths"], 2**32)},
            {"rel_bias": options["rel_bias"]},
        )
    )
    torch.testing.assert_close(beyond, everything)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [16, 64, 128, 256])
@pytest.mark.parametrize(
    "shape", ["everything", "relative keys", "additive bias", "grouped heads", "five tokens past"]
)
def test_kernels_on_the_gpu(seed, shape, size, dtype):
    compare(
        "triton",
        dtype,
        "cuda",
        **{**SHAPES[shape], "chunk": 64, "length": 128, "tokens": 64 * 3 + 5, "size": size},
    )


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"tokens": M + 3},
        {"heads": 4, "kv_heads": 2, "tables": ("rel_key",)},
        {"tables": ("rel_bias",), "lengths": False},
        {"tokens": M - 1},
    ],
)
def test_definition_is_the_papers(seed, sizes):
    """Traps 1, 2, 3, 5 and 6 of other implementations would all show here."""
    sizes = {"batch": 1, "chunk": 4, "length": 8, "size": 4, **sizes}
    sizes["tokens"] = {3 * M: 11, M + 3: 7, M - 1: 3}[sizes.get("tokens", 3 * M)]
    tensors, options = inputs(torch.float64, **sizes)
    exact = loop(*tensors, chunk_size=4, **options)
    out = chunked_cross_attention(*tensors, chunk_size=4, backend="reference", **options)
    torch.testing.assert_close(out, exact, rtol=1e-12, atol=1e-12)
    assert torch.equal(out[:, :3], torch.zeros_like(out[:, :3]))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(seed, backend):
    tensors, options = inputs(
        torch.float64, batch=1, tokens=5, chunk=2, length=4, size=3, heads=2, kv_heads=1
    )
    names = [n for n, x in options.items() if x.is_floating_point()]
    lengths = options["neighbour_lengths"]

    def f(query, key, value, *tables):
        return chunked_cross_attention(
            query,
            key,
            value,
            chunk_size=2,
            neighbour_lengths=lengths,
            backend=backend,
            **dict(zip(names, tables, strict=False)),
        )

    leaves = [x.requires_grad_() for x in (*tensors, *(options[n] for n in names))]
    torch.autograd.gradcheck(f, leaves, fast_mode=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_chunk_reaches_its_attending_tokens_only(seed, backend):
    """Changing chunk u's neighbours changes tokens (u+1)M − 1 … (u+2)M − 2, nothing else (trap 22)."""
    tensors, options = inputs(tokens=3 * M + 2, lengths=False)
    before = chunked_cross_attention(*tensors, chunk_size=M, backend=backend, **options)
    for u in range(3):
        key, value = tensors[1].clone(), tensors[2].clone()
        key[:, u] += 1
        value[:, u] -= 1
        after = chunked_cross_attention(tensors[0], key, value, chunk_size=M, backend=backend, **options)
        changed = (before != after).flatten(2).any(2).all(0).nonzero().flatten().tolist()
        assert changed == list(range((u + 1) * M - 1, min((u + 2) * M - 1, 3 * M + 2)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbours_have_no_order_and_copies_change_nothing(seed, backend):
    tensors, options = inputs(neighbours=3)
    lengths = options.pop("neighbour_lengths")
    order = torch.randperm(3)
    query, key, value = tensors

    def call(k, v, n):
        return chunked_cross_attention(
            query, k, v, chunk_size=M, neighbour_lengths=n, backend=backend, **options
        )

    base = call(key, value, lengths)
    torch.testing.assert_close(call(key[:, :, order], value[:, :, order], lengths[:, :, order]), base)
    one = call(key[:, :, :1], value[:, :, :1], lengths[:, :, :1])
    copies = call(key[:, :, [0, 0, 0]], value[:, :, [0, 0, 0]], lengths[:, :, [0, 0, 0]])
    torch.testing.assert_close(copies, one)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_nothing_to_attend_to_is_exactly_zero(seed, backend):
    tensors, options = inputs(batch=1, tokens=2 * M + 5)
    options["neighbour_lengths"] = torch.zeros_like(options["neighbour_lengths"])
    result = run(
        chunked_cross_attention, tensors, options, torch.ones_like(tensors[0]), chunk_size=M, backend=backend
    )
    for name, x in result.items():
        assert torch.equal(x, torch.zeros_like(x)), name
    query, key, value = (x.half() for x in tensors)
    out = chunked_cross_attention(
        query, torch.full_like(key, math.nan), value, chunk_size=M, backend=backend, **options
    )
    assert not out.any()  # whatever the keys hold that do not exist


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_what_lies_behind_a_length_may_be_nan_where_no_kernel_runs(seed, backend, dtype):
    """Neither the result nor a gradient sees it; a chunk of missing neighbours is zero, never NaN."""
    tensors, options = inputs(dtype)
    options["neighbour_lengths"][0, 0] = 0
    hidden = (torch.arange(R) >= options["neighbour_lengths"][..., None])[..., None, None]
    key, value = (x.masked_fill(hidden, math.nan) for x in tensors[1:])
    call = dict(grad=torch.ones_like(tensors[0]), chunk_size=M, backend=backend)
    base = run(chunked_cross_attention, tensors, options, **call)
    for name, x in run(chunked_cross_attention, (tensors[0], key, value), options, **call).items():
        assert torch.equal(x, base[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_behind_a_length_is_never_read_into_the_result(seed, backend):
    tensors, options = inputs()
    lengths = options["neighbour_lengths"]
    base = chunked_cross_attention(*tensors, chunk_size=M, backend=backend, **options)
    hidden = (torch.arange(R) >= lengths[..., None])[..., None, None]
    key, value = (torch.where(hidden, torch.randn_like(x) * 50, x) for x in tensors[1:])
    assert torch.equal(
        chunked_cross_attention(tensors[0], key, value, chunk_size=M, backend=backend, **options), base
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_do_not_matter(seed, backend):
    tensors, options = inputs()
    base = chunked_cross_attention(*tensors, chunk_size=M, backend=backend, **options)
    query = tensors[0].transpose(1, 2).contiguous().transpose(1, 2)
    key = tensors[1].transpose(3, 4).contiguous().transpose(3, 4)
    value = torch.cat((tensors[2], tensors[2]), -1)[..., :D]
    for name, x in options.items():  # a view of every second element
        options[name] = torch.stack((x, x), -1)[..., 0]
    assert torch.equal(
        chunked_cross_attention(query, key, value, chunk_size=M, backend=backend, **options), base
    )


@pytest.mark.skipif(not _backend.INTERPRETING, reason="needs the interpreter")
def test_blocks_lie_further_apart_than_32_bits_reach(seed):
    """Three of them in 8 GiB of address space, of which a few pages are real; a stride itself does fit 32 bits."""
    apart, middle = 2**30, 2**31
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # without reserving memory
    try:
        memory = mmap.mmap(-1, 2 * (middle + 2 * apart + M * 12), flags=flags)
    except OSError as error:
        pytest.skip(f"no such address space here: {error}")
    rows = torch.randn(3, M, 1, 12).half()  # which tiles are loaded from pointers for
    far = torch.frombuffer(memory, dtype=torch.float16).as_strided(rows.shape, (apart, 12, 12, 1), middle)
    far.copy_(rows)
    outs = [block_attention(x, x[:, None], x[:, None], backend="triton") for x in (far, rows)]
    assert torch.equal(*outs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_run_is_the_same(seed, backend):
    tensors, options = inputs(tokens=2 * M + 3)
    grad = torch.randn_like(tensors[0])
    first = run(chunked_cross_attention, tensors, options, grad, chunk_size=M, backend=backend)
    for _ in range(20 if backend == "torch" else 2):
        again = run(chunked_cross_attention, tensors, options, grad, chunk_size=M, backend=backend)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_threads_change_no_bit(seed, monkeypatch):
    tensors, options = inputs(tokens=4 * M + 3, heads=4)
    if not native.can_run(tensors[0], 0.0):
        pytest.skip("the threads are torch's here")
    grad = torch.randn_like(tensors[0])
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        found.append(run(chunked_cross_attention, tensors, options, grad, chunk_size=M, backend="torch"))
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in other)


@pytest.mark.parametrize("waves", [0, 10**6])
def test_gradients_are_the_same_in_slices(seed, monkeypatch, waves):
    """Where dS waits in the memory of dK, in several launches, whose sums are cut in few or in many."""
    tables = pytest.importorskip("retro_kernels.ops.cca.table_gradients", reason="triton is not installed")
    cut, slices = [], tables.slices
    monkeypatch.setattr(tables, "OWN_DS", 0)
    monkeypatch.setattr(tables, "MOST_WAVES", waves)
    monkeypatch.setattr(tables, "REL_SLOTS", 10**6)
    monkeypatch.setattr(tables, "slices", lambda *sizes: cut.append(slices(*sizes)) or cut[-1])
    compare("triton", torch.float32, batch=1, tokens=5 * M + 3)
    compare("triton", torch.float16, batch=1, tokens=6 * M, tables=("rel_key",))
    assert len(cut) == 2 and all(len(x) > 2 for x in cut)


@pytest.mark.parametrize("tables", [("rel_bias",), TABLES])
def test_shares_of_the_same_keys_are_summed_in_slices(seed, monkeypatch, tables):
    """Of grouped heads, and of blocks with the same keys: the same bits as all at once, dropout's too."""
    pytest.importorskip("triton", reason="triton is not installed")
    from retro_kernels.ops.cca import backward, launch

    cut, slices = [], backward.slices_of_shares
    monkeypatch.setattr(backward, "slices_of_shares", lambda *sizes: cut.append(slices(*sizes)) or cut[-1])
    tensors, options = inputs(batch=1, tokens=5 * M + 3, kv_heads=1, neighbours=1, tables=tables)
    blocks = [
        tensors[0][:, : 4 * M].reshape(4, M, 2, D),
        *(x[0, :2].repeat(1, 1, 1, 2, 1) for x in tensors[1:]),
    ]
    of_blocks = {name: x for name, x in options.items() if name != "neighbour_lengths"}
    fixed = {"backend": "triton", "dropout_p": 0.2}
    found = []
    for own, waiting in ((backward.OWN_SHARES, 1), (0, 4), (0, 1)):
        monkeypatch.setattr(backward, "OWN_SHARES", own)
        monkeypatch.setattr(backward, "LEAST_PROGRAMS", waiting)
        launch.forget()
        torch.manual_seed(seed)
        ours = run(chunked_cross_attention, tensors, options, tensors[0], chunk_size=M, **fixed)
        encoders = run(block_attention, blocks, of_blocks, blocks[0], key_repeat=2, **fixed)
        found.append({**ours, **{f"encoder's {name}": x for name, x in encoders.items()}})
    assert [len(x) for x in cut] == [1, 1, 3, 2, 5, 2]
    whole, *others = found
    for other in others:
        for name in whole:
            if "rel" in name or "bias" in name:  # cut in other parts
                torch.testing.assert_close(other[name], whole[name], rtol=1e-4, atol=1e-5, msg=name)
            else:
                assert torch.equal(other[name], whole[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", TABLES)
def test_the_gradient_of_one_table_alone(seed, backend, wanted):
    """What it takes of the sums that the others share."""
    tensors, options = inputs(batch=1, tokens=2 * M - 1, heads=1, neighbours=1, length=16, lengths=False)
    grad, found = torch.randn_like(tensors[0]), []
    for name in (backend, "reference"):
        leaf = options[wanted].clone().requires_grad_()
        given = {**options, wanted: leaf}
        chunked_cross_attention(*tensors, chunk_size=M, backend=name, **given).backward(grad)
        found.append(leaf.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_every_run_is_the_same_on_the_gpu(seed):
    tensors, options = inputs(torch.bfloat16, "cuda", tokens=64 * 8, chunk=64, length=128, size=64)
    grad = torch.randn_like(tensors[0])
    first = run(chunked_cross_attention, tensors, options, grad, backend="triton")
    for _ in range(20):
        again = run(chunked_cross_attention, tensors, options, grad, backend="triton")
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_in_half_precision(seed, backend):
    tensors, options = inputs(torch.float16, tables=("rel_bias",))
    tensors = [tensors[0] * 30, tensors[1] * 30, tensors[2]]
    grad = torch.randn_like(tensors[0])
    result = run(chunked_cross_attention, tensors, options, grad, chunk_size=M, backend=backend)
    assert all(x.isfinite().all() for x in result.values())
    exact = chunked_cross_attention(
        *(x.double() for x in tensors),
        chunk_size=M,
        backend="reference",
        **{n: x.double() if x.is_floating_point() else x for n, x in options.items()},
    )
    assert_accurate(result["out"], plain(*tensors, **options), exact, "out")


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_that_of_the_definition(seed, backend):
    """One seed draws the same weights on every backend; what is kept grows so that the mean stays."""
    tensors, options = inputs(batch=1, tokens=2 * M)
    grad = torch.randn_like(tensors[0])
    results = []
    for name in ("reference", backend):
        torch.manual_seed(seed)
        results.append(
            run(chunked_cross_attention, tensors, options, grad, chunk_size=M, backend=name, dropout_p=0.3)
        )
    for name in results[0]:
        torch.testing.assert_close(results[1][name], results[0][name], rtol=2e-4, atol=2e-5, msg=name)
    with use_backend(backend):
        other = chunked_cross_attention(*tensors, chunk_size=M, dropout_p=0.3, **options)
    assert not torch.equal(other, results[1]["out"])


@pytest.mark.parametrize("keys_first", [False, True])
def test_block_sizes_of_other_gpus(seed, monkeypatch, keys_first):
    """Several key tiles, each with several slices of distance columns, the head dimension in two panels."""
    config = tiles.Config(32, 4, 1, panels=2, keys_first=keys_first)
    monkeypatch.setattr(tiles, "forward_config", lambda *_: config)
    monkeypatch.setattr(tiles, "backward_config", lambda *_: config)
    compare("triton", torch.float32, batch=1, heads=1, chunk=32, length=64, size=32, tokens=64)


@pytest.mark.parametrize(
    ("arch", "dtype", "size"),
    [
        *((arch, torch.float16, 64) for arch in (80, 90, 100)),
        *((arch, dtype, 128) for arch in (89, 100) for dtype in (torch.float16, torch.float32)),
    ],
)
def test_as_gpus_launch_it(seed, monkeypatch, arch, dtype, size):
    """Rows of a program, block sizes and loads as on each kind of GPU; in fp32 a block takes several programs."""
    monkeypatch.setattr(tiles, "architecture", lambda device: arch)
    chunk = 32 if dtype == torch.float32 else 64
    compare("triton", dtype, batch=1, heads=1, chunk=chunk, length=32, size=size, tokens=chunk)


@pytest.mark.parametrize(
    ("capability", "kind"),
    [((8, 0), 80), ((8, 7), 80), ((8, 6), 89), ((8, 9), 89), ((9, 0), 90), ((10, 0), 100), ((10, 3), 100)]
    + [((11, 0), 100), ((12, 0), 89), ((12, 1), 89), ((13, 0), 100)],
)
def test_which_gpus_are_alike(capability, kind, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert tiles.architecture.__wrapped__(torch.device("cuda", 0)) == kind
    assert tiles.architecture(torch.device("cpu")) == 0


@pytest.mark.parametrize(
    ("size", "capability"), [(128, (12, 0)), (256, (12, 0)), (256, (8, 6)), (256, (8, 0))]
)
def test_wide_heads_of_float32_on_little_shared_memory(size, capability, monkeypatch):
    """Backward they do not fit: refused where they are asked for, else the definition takes them."""
    found = type("Properties", (), {"major": capability[0], "minor": capability[1]})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(_backend, "INTERPRETING", False)
    query = type("Query", (), {"device": torch.device("cuda"), "dtype": torch.float32, "is_cuda": True})()
    query.shape = (1, 1, 1, size)
    reason = op._candidates(query)["triton"]
    assert (reason is None) == (size == 128 or capability == (8, 0))
    assert reason is None or "99 KB" in reason


def test_gpus_of_amd_are_refused(monkeypatch):
    """Of which an architecture's number, 9.4 say, would pass for that of NVIDIA's."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "AMD's" in str(_backend.why_not_triton(torch.device("cuda"), torch.bfloat16))


@pytest.mark.parametrize(("chunk", "keys", "parts"), [(32, 32, 2), (16, 64, 2), (64, 16, 2), (128, 64, 6)])
def test_a_window_in_parts(seed, monkeypatch, chunk, keys, parts):
    """As a kernel with few registers makes it: each part sheared by itself, and put in its place of the tile."""
    made, window_slice = [], tiles.window_slice
    monkeypatch.setattr(tiles, "forward_config", lambda *_: tiles.Config(keys, 4, 2, narrow=True))
    monkeypatch.setattr(tiles, "window_slice", lambda *given: made.append(window_slice(*given)) or made[-1])
    compare("triton", torch.float16, batch=1, heads=1, chunk=chunk, length=64, size=16, tokens=2 * chunk)
    assert -(-(chunk + keys - 1) // (made[0] // 2)) == parts


@pytest.mark.parametrize(
    ("arch", "dtype", "biased", "sets", "keys", "expected"),
    [
        (90, torch.bfloat16, True, 2, 128, 1),
        (90, torch.bfloat16, True, 1, 128, 1),  # the loop is that over tiles
        (90, torch.bfloat16, True, 2, 64, 2),
        (90, torch.bfloat16, True, 1, 64, 0),  # no loop at all
        (90, torch.bfloat16, False, 2, 128, 0),
        (90, torch.float32, True, 2, 128, 0),  # has no warpgroup products
        (80, torch.bfloat16, True, 2, 128, 0),
        (100, torch.bfloat16, True, 2, 128, 0),
    ],
)
def test_when_a_biased_query_is_loaded_anew(arch, dtype, biased, sets, keys, expected):
    bias = torch.zeros(1, 16) if biased else None
    assert tiles.reload(arch, dtype, bias, sets, keys, 64) == expected


BLOCKS = {
    "self": dict(blocks=5, rows=R, sets=1, keys=R, repeat=1),
    "cross": dict(blocks=6, rows=R, sets=1, keys=M, repeat=3),
    "sets": dict(blocks=4, rows=M, sets=3, keys=R, repeat=2),
}


def compare_blocks(backend, dtype, device="cpu", *, blocks, rows, sets, keys, repeat, size=D):
    groups, columns = blocks // repeat, rows + keys - 1

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape) * scale).to(device, dtype)

    tensors = [draw(blocks, rows, 4, size), *(draw(groups, sets, keys, 2, size) for _ in "kv")]
    options = {
        "rel_key": draw(4, columns, size, scale=0.5),
        "content_bias": draw(4, size),
        "position_bias": draw(4, size),
        "rel_bias": draw(4, columns),
        "lengths": torch.randint(0, keys + 1, (groups, sets)).to(device),
    }
    options["lengths"][0] = keys
    fixed = {"key_repeat": repeat}
    grad = torch.randn_like(tensors[0])

    def narrow(query, key, value, *, key_repeat, rel_key, content_bias, position_bias, rel_bias, lengths):
        return block_attention_reference(
            query,
            key,
            value,
            rel_key,
            content_bias,
            position_bias,
            rel_bias,
            lengths,
            block=query.shape[1],
            repeat=key_repeat,
            scale=size**-0.5,
            upcast=False,
        )

    ours = run(block_attention, tensors, options, grad, backend=backend, **fixed)
    yardstick = run(narrow, tensors, options, grad, **fixed)
    exact = run(
        block_attention,
        [x.double() for x in tensors],
        {n: x.double() if x.is_floating_point() else x for n, x in options.items()},
        grad.double(),
        backend="reference",
        **fixed,
    )
    for name in exact:
        assert_accurate(ours[name], yardstick[name], exact[name], f"{backend} {name}", gradient=name != "out")


@pytest.mark.parametrize("shape", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_block_attention_is_the_definition(seed, backend, dtype, shape):
    compare_blocks(backend, dtype, **BLOCKS[shape])


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_where_blocks_share_their_keys(seed, monkeypatch, backend):
    """It is drawn by the number of the block, not of the keys that it shares."""
    monkeypatch.setattr("retro_kernels.ops.cca.cpu._UNIT_BYTES", 1)  # each group of blocks by itself
    tensors = [torch.randn(4, M, 1, D), *(torch.randn(2, 1, M, 1, D) for _ in "kv")]
    results, fixed = [], {"key_repeat": 2, "dropout_p": 0.3}
    for name in ("reference", backend):
        torch.manual_seed(seed)
        results.append(run(block_attention, tensors, {}, torch.ones_like(tensors[0]), backend=name, **fixed))
    for name in results[0]:
        torch.testing.assert_close(results[1][name], results[0][name], rtol=2e-4, atol=2e-5, msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("shape", BLOCKS)
def test_block_attention_on_the_gpu(seed, shape, size, dtype):
    """RETRO's own blocks: neighbours of 128 tokens, chunks of 64."""
    large = {name: n * 4 if name in ("rows", "keys") else n for name, n in BLOCKS[shape].items()}
    compare_blocks("triton", dtype, "cuda", **large, size=size)


def test_it_saves_its_inputs_and_its_output_only(seed):
    """For a plain call nothing else, whatever the number of logits."""
    tensors, options = inputs(tokens=8 * M)
    leaves = [x.requires_grad_() for x in tensors]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = chunked_cross_attention(*leaves, chunk_size=M, backend="torch", **options)
    known = {x.untyped_storage().data_ptr() for x in (*leaves, out, *options.values())}
    extra = sum(x.numel() * x.element_size() for x in saved if x.untyped_storage().data_ptr() not in known)
    assert extra <= out.numel() * out.element_size() // 8


def test_bad_arguments_say_what_to_do(seed):
    (query, key, value), options = inputs()
    lengths = options["neighbour_lengths"]
    ragged = torch.nested.nested_tensor([key[0, 0], key[0, 0, :1]], layout=torch.jagged)
    cases = [
        (dict(key=key[:, 1:], value=value[:, 1:]), ValueError, "2 chunks.*48 tokens.*3 expected"),
        (dict(query=query.int()), TypeError, "floating-point"),
        (dict(query=query.half()), TypeError, "the same"),
        (dict(value=value[..., :8]), ValueError, "value has shape"),
        (dict(neighbour_lengths=torch.ones(2, 3)), TypeError, "integers"),
        (dict(neighbour_lengths=torch.ones(2, 3, 5, dtype=torch.int32)), ValueError, "expected"),
        (dict(rel_key=options["rel_key"][:, 1:]), ValueError, "rel_key has shape"),
        (dict(rel_bias=options["rel_bias"][:1]), ValueError, "rel_bias has shape"),
        (dict(position_bias=options["position_bias"], rel_key=None), ValueError, "without rel_key"),
        (dict(dropout_p=1.0), ValueError, "dropout_p"),
        (dict(chunk_size=0), ValueError, "chunk_size"),
        (dict(chunk_size=16.0), TypeError, "chunk_size is 16.0; it has to be an integer"),
        (dict(scale=math.nan), ValueError, "scale is nan; it has to be finite"),
        (dict(query=query.numpy()), TypeError, "query is of type ndarray; it has to be a tensor"),
        (dict(neighbour_lengths=[1]), TypeError, "neighbour_lengths is of type list"),
        (
            dict(query=query.to(torch.float8_e4m3fn)),
            TypeError,
            "float8_e4m3fn; it has to be a floating-point",
        ),
        (dict(scale="wide"), TypeError, "scale is 'wide'; it has to be a number"),
        (dict(scale=[1.0]), TypeError, r"scale is \[1.0\]; it has to be a number"),
        (dict(dropout_p=None), TypeError, "dropout_p is None; it has to be a number"),
        (dict(query=query.to_sparse()), TypeError, "query is of layout torch.sparse_coo; .* a dense one"),
        (dict(rel_bias=ragged), TypeError, "rel_bias is a nested tensor; .* pad it, and give lengths"),
        (dict(neighbour_lengths=lengths.to_sparse()), TypeError, "neighbour_lengths is of layout"),
        (dict(backend="cuda"), ValueError, "no backend"),
        (dict(backend=["torch"]), ValueError, "no backend"),
        (dict(query=query[:1]), ValueError, "batch"),
        (dict(query=torch.cat((query, query[..., :1]), -1)), ValueError, "head size"),
    ]
    for changes, error, message in cases:
        call = {"query": query, "key": key, "value": value, "chunk_size": M, **changes}
        with pytest.raises(error, match=message):
            chunked_cross_attention(**call)
    for number in (np.float16(0.5), torch.tensor(0.5)):  # 2^32 times the one is infinite
        torch.manual_seed(seed)
        dropped = chunked_cross_attention(query, key, value, chunk_size=M, dropout_p=number)
        torch.manual_seed(seed)
        assert torch.equal(dropped, chunked_cross_attention(query, key, value, chunk_size=M, dropout_p=0.5))
    blocks = torch.randn(4, M, 2, D), *(torch.randn(2, 1, R, 2, D) for _ in "kv")
    with pytest.raises(TypeError, match="key_repeat is 2.0; it has to be an integer"):
        block_attention(*blocks, key_repeat=2.0)
    with pytest.raises(ValueError, match="key_repeat is 0; it has to be at least 1"):
        block_attention(*blocks, key_repeat=0)


@pytest.mark.parametrize("backend", ("reference", *BACKENDS))
def test_an_empty_batch_is_one(seed, backend):
    tensors, options = inputs(batch=0, tokens=2 * M + 5, lengths=False)
    leaves = [x.requires_grad_() for x in (*tensors, options["rel_key"])]
    out = chunked_cross_attention(*tensors, chunk_size=M, backend=backend, **options)
    assert out.shape == tensors[0].shape
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert all(g.shape == x.shape and not g.any() for g, x in zip(gradients, leaves, strict=True))


@pytest.mark.parametrize("tables", (("rel_bias",), TABLES))
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_of_minus_infinity_forbids(seed, backend, tables):
    """Neighbour tokens at some distances; in the first rows all of them."""
    tensors, options = inputs(tables=tables)
    options["rel_bias"][:, : R + 3] = -math.inf
    results = []
    for chosen in (backend, "reference"):
        leaves = [x.detach().requires_grad_() for x in (*tensors, options["rel_bias"])]
        given = {**options, "rel_bias": leaves[3]}
        out = chunked_cross_attention(*leaves[:3], chunk_size=M, backend=chosen, **given)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert not results[0][0][:, : M + 2].any() and results[0][0].any()
    for ours, definition in zip(*results, strict=True):
        torch.testing.assert_close(ours, definition, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("large", [-math.inf, "finite"])
def test_keys_that_forbid(seed, dtype, large):
    """Rows whose logits are all −inf have no key, whatever made them so: infinite keys, or products that overflow."""
    (query, key, value), _ = inputs(batch=1, tokens=4 * M - 1, lengths=False)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    query[..., 0] = query[..., 0].abs() + 1.0
    key[:, 1, ..., 0] = large if large != "finite" else torch.finfo(dtype).min
    query[:, 2 * M - 1 : 3 * M - 1, :, 0] *= 4 / D**-0.5
    out = chunked_cross_attention(query, key, value, chunk_size=M, backend="torch")
    definition = chunked_cross_attention(query, key, value, chunk_size=M, backend="reference")
    assert not out[:, 2 * M - 1 : 3 * M - 1].any()
    assert out[:, M - 1 : 2 * M - 1].any(-1).all() and out[:, 3 * M - 1 :].any(-1).all()
    torch.testing.assert_close(out, definition, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("backend", "dtype"), [("torch", torch.float32), ("torch", torch.float64), ("triton", torch.float32)]
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's numpy
def test_nan_and_infinity_come_out_as_nan(seed, backend, dtype):
    """In the rows that the definition makes NaN and in no others: of a query, a key and an infinite query."""
    tensors, options = inputs(batch=1, tokens=4 * M - 1, length=16, lengths=False)
    query, key, _ = tensors
    query[0, M + 2, 0], query[0, 3 * M + 2, 1, 3] = math.nan, math.inf
    key[0, 1, 1, 5, 1, 2] = math.nan
    results = []
    for chosen, wide in ((backend, dtype), ("reference", torch.float64)):
        leaves = [x.detach().to(wide).requires_grad_() for x in tensors]
        given = {name: x.to(wide) for name, x in options.items()}
        out = chunked_cross_attention(*leaves, chunk_size=M, backend=chosen, **given)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(0 < x.isnan().sum() < 0.6 * x.numel() for x in results[1])
    for ours, definition in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), definition, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms_run_on_the_definition_or_are_refused(seed, backend):
    """An op without a forward derivative would lose the tangent without a word."""
    (query, key, value), options = inputs()

    def attend(query, backend=None):
        return chunked_cross_attention(query, key, value, chunk_size=M, backend=backend, **options)

    out, tangent = torch.func.jvp(attend, (query,), (query,))
    step = 1e-2
    difference = (attend(query * (1 + step)) - attend(query * (1 - step))) / (2 * step)
    torch.testing.assert_close(tangent, difference, rtol=1e-2, atol=1e-2)
    assert tangent.abs().max() > 0.01
    torch.testing.assert_close(torch.func.vmap(attend)(query[None])[0], out)
    with pytest.raises(ValueError, match="no torch.func transforms"):
        torch.func.jvp(lambda x: attend(x, backend), (query,), (query,))
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(ValueError, match="no forward-mode derivative"),
    ):
        attend(torch.autograd.forward_ad.make_dual(query, query), backend)


def test_shapes_alone_on_the_meta_device():
    (query, key, value), options = inputs(device="meta", lengths=False)
    out = chunked_cross_attention(query.requires_grad_(), key, value, chunk_size=M, **options)
    assert out.is_meta and out.shape == query.shape
    assert torch.autograd.grad(out.sum(), [query])[0].is_meta
