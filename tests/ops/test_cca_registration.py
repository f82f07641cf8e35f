"""The ops as PyTorch sees them: schema, fakes, compilation, autocast, checkpointing, export, second derivatives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from retro_kernels import chunked_cross_attention
from retro_kernels.ops.cca import op

M, R, D = 8, 16, 16


def example(backend, requires_grad=True):
    names = ("query", "key", "value", "rel_key", "content_bias", "position_bias", "rel_bias")
    batch, chunks = (1, 1) if backend == "triton" else (2, 3)  # the interpreter is slow
    keys = (batch, chunks, 2, R, 2, D)
    shapes = ((batch, chunks * M + 3, 2, D), keys, keys, (2, M + R - 1, D), (2, D), (2, D), (2, M + R - 1))
    tensors = {n: torch.randn(s, requires_grad=requires_grad) for n, s in zip(names, shapes, strict=True)}
    lengths = torch.randint(0, R + 1, (batch, chunks, 2))
    lengths[0, 0, 0] = R
    return tensors, {"neighbour_lengths": lengths, "chunk_size": M, "backend": backend}


def flat(backend):
    tensors, options = example(backend, requires_grad=False)
    tensors["key"], tensors["value"] = (tensors[n].flatten(0, 1) for n in ("key", "value"))
    tensors["query"] = (
        tensors["query"].transpose(1, 2).contiguous().transpose(1, 2)
    )  # strides must agree here too
    lengths = options["neighbour_lengths"].flatten(0, 1)
    return [*tensors.values(), lengths, None], (M, M - 1, 1, D**-0.5, 0.0, backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck(seed, backend):
    tensors, options = flat(backend)
    torch.library.opcheck(op._cca_fwd, (*tensors, *options))
    out, lse = op._cca_fwd(*tensors, *options)
    grad = torch.randn_like(out)
    for needs in ([True] * 4, [True, False, True, False]):
        torch.library.opcheck(op._cca_bwd, (grad, out, lse, *tensors, *options, needs))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_whole_with_equal_gradients(seed, backend):
    tensors, options = example(backend)

    def f(**given):
        return chunked_cross_attention(**given, **options) * 2

    eager = f(**tensors)
    expected = torch.autograd.grad(eager.sum(), tensors.values())
    out = torch.compile(f, fullgraph=True, backend="aot_eager")(**tensors)
    torch.testing.assert_close(out, eager)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), tensors.values()), expected)


def test_checkpointing_computes_the_same(seed):
    tensors, options = example("torch")

    def f(*given):
        return chunked_cross_attention(
            *given[:3],
            rel_key=given[3],
            content_bias=given[4],
            position_bias=given[5],
            rel_bias=given[6],
            dropout_p=0.2,
            **options,
        )

    results = []
    for run in (f, lambda *x: checkpoint(f, *x, use_reentrant=False)):
        torch.manual_seed(seed)
        out = run(*tensors.values())
        results.append((out, *torch.autograd.grad(out.sum(), tensors.values())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=False))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_multiplies_in_the_lower_dtype(seed, backend):
    tensors, options = example(backend)
    with torch.autocast("cpu", torch.bfloat16):
        out = chunked_cross_attention(**tensors, **options)
    assert out.dtype == torch.bfloat16
    gradients = torch.autograd.grad(out.float().sum(), tensors.values())
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)
    torch.testing.assert_close(
        out.float(), chunked_cross_attention(**tensors, **options), rtol=0.05, atol=0.05
    )


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_leaves_the_bias_and_the_softmax_in_float32(seed, backend):
    """What comes out is what inputs cast beforehand give; a bias of 200 and a bit has no fraction in bfloat16."""
    tensors, options = example(backend, requires_grad=False)
    tensors["rel_bias"] = 200 + torch.rand_like(tensors["rel_bias"])
    with torch.autocast("cpu", torch.bfloat16):
        out = chunked_cross_attention(**tensors, **options)
    cast = {name: x if name == "rel_bias" else x.bfloat16() for name, x in tensors.items()}
    assert torch.equal(out, chunked_cross_attention(**cast, **options))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_leaves_float64_alone(seed, backend):
    tensors, options = example(backend, requires_grad=False)
    wide = {name: x.double() for name, x in tensors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        out = chunked_cross_attention(**wide, **options)
    assert out.dtype == torch.float64 and torch.equal(out, chunked_cross_attention(**wide, **options))


def test_the_op_itself_is_differentiable(seed):
    """As in an exported program, where it stands alone."""
    tensors, options = flat("torch")
    leaves = [x.detach().requires_grad_() for x in tensors[:7]]
    out, lse = op._cca_fwd(*leaves, *tensors[7:], *options)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, grad)
    want = op._cca_bwd(grad, out, lse, *tensors, *options, [True] * 4)
    assert not lse.requires_grad and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_what_has_no_gradient_takes_no_memory(seed, monkeypatch):
    """The backward gets no zeros in place of gradients of what is kept for it."""
    from retro_kernels.ops import absorbed_cross_attention
    from retro_kernels.ops.cca import absorbed

    seen = []
    for function in (op._BlockAttention, absorbed._AbsorbedCrossAttention):
        backward = function.backward

        def watched(ctx, grad, *rest, backward=backward):
            seen.append(rest)
            return backward(ctx, grad, *rest)

        monkeypatch.setattr(function, "backward", staticmethod(watched))
    tensors, options = example("torch")
    out = chunked_cross_attention(**tensors, **options)
    torch.autograd.grad(out.sum(), tensors.values())
    states, weights = torch.randn(2, 3, 2, R, 12), torch.randn(2, 2 * D, 12)
    query = tensors["query"]
    out = absorbed_cross_attention(query, states, *weights, chunk_size=M, backend="torch")
    torch.autograd.grad(out.sum(), [query])
    assert seen == [(None,), (None, None)]
    out = absorbed_cross_attention(query, states, *weights, chunk_size=M, backend="torch")
    assert torch.autograd.grad(_NoGradient.apply(out).sum(), [query], allow_unused=True) == (None,)


class _NoGradient(torch.autograd.Function):
    """Says that its input has none."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_transforms_inside_a_compiled_function(seed):
    """A gradient by torch.func is the definition's, and not zero."""
    tensors, options = example(None, requires_grad=False)
    query = tensors.pop("query")

    def attend(query):
        return chunked_cross_attention(query, **tensors, **options)

    for f in (
        torch.func.grad(lambda query: attend(query).square().sum()),
        lambda query: torch.func.jvp(attend, (query,), (query,))[1],
    ):
        compiled = torch.compile(lambda query, f=f: f(query), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(query), f(query))
        assert compiled(query).abs().max() > 0.01


def test_exports_for_any_number_of_neighbours(seed):
    from retro_kernels import ChunkedCrossAttention

    module = ChunkedCrossAttention(16, 2, head_dim=8, encoder_dim=12, chunk_size=M, neighbour_len=R)
    x = torch.randn(1, 2 * M, 16)
    several = torch.export.Dim("neighbours", min=2, max=64)
    exported = torch.export.export(
        module, (x, torch.randn(1, 2, 3, R, 12)), dynamic_shapes=({}, {2: several})
    ).module()
    for count in (2, 5, 40):
        neighbours = torch.randn(1, 2, count, R, 12)
        torch.testing.assert_close(exported(x, neighbours), module(x, neighbours))


def test_what_is_no_argument_of_the_op_is_named(seed):
    tensors, options = example("torch", requires_grad=False)
    out = chunked_cross_attention(**tensors, **options)
    assert torch.equal(chunked_cross_attention(**tensors, **{**options, "chunk_size": np.int64(M)}), out)
    with pytest.raises(TypeError, match="scale gets no gradient"):
        chunked_cross_attention(**tensors, **options, scale=torch.tensor(0.3, requires_grad=True))
    empty = {name: tensors[name][:, :0] for name in ("query", "key", "value")}
    for backend in ("torch", "triton", None):
        assert chunked_cross_attention(**empty, chunk_size=M, backend=backend).shape == empty["query"].shape
    with pytest.raises(ValueError, match='no backend "bogus"'):
        chunked_cross_attention(**empty, chunk_size=M, backend="bogus")


def test_distributed_tensors(seed):
    """Of which torch knows nothing for an op that is not its own."""
    tensors, options = example("torch")
    del options["backend"], options["neighbour_lengths"]
    wanted = chunked_cross_attention(**tensors, **options)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh, places = init_device_mesh("cpu", (1,)), [Shard(0)]
        spread = {n: distribute_tensor(x, mesh, places if x.dim() > 3 else None) for n, x in tensors.items()}
        for given in (spread, {**tensors, "query": spread["query"]}):
            with pytest.raises(TypeError, match=r"a tensor is a DTensor, which .*x\.to_local\(\)"):
                chunked_cross_attention(**given, **options)
        local = chunked_cross_attention(**{n: x.to_local() for n, x in spread.items()}, **options)
        torch.testing.assert_close(local, wanted)
    finally:
        dist.destroy_process_group()


def test_exports(seed):
    class Module(torch.nn.Module):
        def forward(self, query, key, value, rel_key):
            return chunked_cross_attention(query, key, value, rel_key=rel_key, chunk_size=M)

    tensors, _ = example("torch", requires_grad=False)
    given = tuple(tensors[n] for n in ("query", "key", "value", "rel_key"))
    exported = torch.export.export(Module(), given)
    assert "retro_kernels.cca_fwd" in str(exported.graph)
    torch.testing.assert_close(exported.module()(*given), Module()(*given))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_second_derivative_says_so(seed, backend):
    tensors, options = example(backend)
    out = chunked_cross_attention(**tensors, **options)
    (gradient,) = torch.autograd.grad(out.square().sum(), [tensors["query"]], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.sum().backward()


@pytest.mark.gpu
def test_captures_into_a_cuda_graph(seed):
    tensors, options = example("triton")
    tensors = {n: x.detach().cuda() for n, x in tensors.items()}
    options["neighbour_lengths"] = options["neighbour_lengths"].cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = chunked_cross_attention(**tensors, **options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chunked_cross_attention(**tensors, **options)
    graph.replay()
    torch.testing.assert_close(out, expected)
