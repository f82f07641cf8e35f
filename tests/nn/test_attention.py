"""The attention layers against loops written from the paper, and the properties that its text promises."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import peers
import pytest
import timing
import torch

from retro_kernels import retro_172m
from retro_kernels.nn import BlockAttention, ChunkedCrossAttention, SelfAttention
from retro_kernels.nn import attention as attention_module
from retro_kernels.nn.positions import sinusoid

from .helpers import FREE_SIZES_WITH_GRADIENTS, attend, cca_by_hand, phi, randomise, tiny_model

M, R, K = 4, 8, 3
CLOSE = dict(rtol=1e-11, atol=1e-11)  # float64 throughout, sinusoids too


def make(position: str = "relative", **options: object) -> ChunkedCrossAttention:
    sizes = dict(head_dim=6, encoder_dim=10, chunk_size=M, neighbour_len=R)
    return randomise(ChunkedCrossAttention(12, 4, position=position, **{**sizes, **options})).double()


def inputs(
    tokens: int, batch: int = 2, count: int = K, chunk: int = M
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chunks = tokens // chunk
    return (
        torch.randn(batch, tokens, 12).double(),
        torch.randn(batch, chunks, count, R, 10).double(),
        torch.randint(0, R + 1, (batch, chunks, count)),
    )


@pytest.mark.parametrize("position", ["relative", "bias", "none"])
@pytest.mark.parametrize(
    "tokens, kv_heads, bias", [(1, 4, True), (3, 4, True), (4, 2, False), (5, 1, True), (11, 2, True)]
)
def test_cca_is_the_papers(seed: int, position: str, tokens: int, kv_heads: int, bias: bool) -> None:
    cca = make(position, num_kv_heads=kv_heads, bias=bias)
    x, neighbours, lengths = inputs(tokens)
    torch.testing.assert_close(cca(x, neighbours, lengths), cca_by_hand(cca, x, neighbours, lengths), **CLOSE)
    if tokens >= M:
        everything = torch.full_like(lengths, R)
        torch.testing.assert_close(cca(x, neighbours), cca_by_hand(cca, x, neighbours, everything), **CLOSE)


def test_cca_parameters() -> None:
    def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in module.named_parameters()}

    projections = {
        "q_proj.weight": (24, 12),
        "k_proj.weight": (12, 10),
        "v_proj.weight": (12, 10),
        "o_proj.weight": (12, 24),
    }
    biases = {"q_proj.bias": (24,), "k_proj.bias": (12,), "v_proj.bias": (12,), "o_proj.bias": (12,)}
    relative = {"rel_proj.weight": (24, 12), "content_bias": (4, 6), "position_bias": (4, 6)}
    assert shapes(make(num_kv_heads=2)) == projections | relative
    assert shapes(make(num_kv_heads=2, bias=True)) == projections | biases | relative
    assert shapes(make("bias", num_kv_heads=2)) == projections | {"rel_bias": (4, M + R - 1)}
    assert shapes(make("none", num_kv_heads=2)) == projections
    assert set(make().state_dict()) == set(shapes(make()))  # the sinusoids are not saved
    plain = ChunkedCrossAttention(12, 4)
    assert (plain.head_dim, plain.k_proj.in_features, plain.chunk_size, plain.neighbour_len) == (
        3,
        12,
        64,
        128,
    )


@pytest.mark.parametrize("dim", [12, 7])
def test_distances_are_signed_and_as_wide_as_the_query(dim: int) -> None:
    cca = ChunkedCrossAttention(dim, 1, chunk_size=M, neighbour_len=R)
    assert (cca.distances.first, cca.distances.last) == (-(R - M), 2 * M - 2)
    table = cca.distances(torch.empty(0, dtype=torch.float32))
    assert table.shape == (M + R - 1, dim)
    if dim % 2 == 0:
        exact = torch.stack([phi(d, dim) for d in range(-(R - M), 2 * M - 1)])
        torch.testing.assert_close(table, exact.float(), rtol=0, atol=1e-7)
    assert torch.cdist(table, table).fill_diagonal_(9).min() > 0.05  # a cosine alone has φ(d) = φ(−d)
    assert sinusoid(torch.tensor([0]), 4).tolist() == [[0, 0, 1, 1]]


def test_paper_sizes_have_191_distances() -> None:
    with torch.device("meta"):
        cca = ChunkedCrossAttention(896, 16, head_dim=64, encoder_dim=retro_172m().encoder_dim)
    assert (cca.distances.first, cca.distances.last) == (-64, 126)
    assert cca.position_terms()["rel_key"].shape == (16, 191, 64)


@pytest.mark.parametrize("training", [False, True])
def test_prefix_and_missing_neighbours_are_exactly_zero(seed: int, training: bool) -> None:
    cca = make(bias=True, dropout=0.5).train(training)
    x, neighbours, lengths = inputs(14)
    lengths[0, 1] = 0
    lengths[1, 0, 0] = R
    out = cca(x, neighbours, lengths)
    assert out[:, : M - 1].eq(0).all()
    assert out[0, 2 * M - 1 : 3 * M - 1].eq(0).all()
    assert out[1, M - 1 : 2 * M - 1].ne(0).any()
    assert torch.equal((x + out)[:, : M - 1], x[:, : M - 1])
    assert cca(x[:, :2], neighbours[:, :0], lengths[:, :0]).eq(0).all()
    assert cca(x, neighbours[:, :, :0]).eq(0).all()


class PlusOne(torch.nn.Module):
    """In place of a projection: no Linear, without `weight`, `bias` and sizes, and nothing stays zero."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + 1


@pytest.mark.parametrize("output", ["plain", "hooked", "replaced"])
def test_missing_neighbours_are_exactly_zero_without_a_bias_too(seed: int, output: str) -> None:
    cca = make(dropout=0.5)
    if output == "hooked":  # what the output projection makes of a zero is then not known
        cca.o_proj.register_forward_hook(lambda module, given, out: out + 1)
    elif output == "replaced":
        cca.o_proj = PlusOne(cca.o_proj)
    x, neighbours, lengths = inputs(14)
    lengths[0, 1], lengths[1, 1] = 0, R
    out = cca(x, neighbours, lengths)
    assert out[:, : M - 1].eq(0).all()
    assert out[0, 2 * M - 1 : 3 * M - 1].eq(0).all()
    assert out[1, 2 * M - 1 : 3 * M - 1].ne(0).any()
    key, value = cca.keys_and_values(neighbours[:, 1])
    rows = cca.attend_rows(x[:, 7:9], 0, key, value, lengths[:, 1], cca.position_terms())
    assert rows[0].eq(0).all() and rows[1].ne(0).any()
    full = cca(x, neighbours)
    assert full[:, : M - 1].eq(0).all() and full[:, M - 1 : 2 * M - 1].ne(0).any()
    assert cca.attend_rows(x[:, 7:9], 0, key, value, None, cca.position_terms()).ne(0).any()


@pytest.mark.parametrize("position", ["relative", "bias", "none"])
def test_every_projection_can_be_replaced(seed: int, position: str) -> None:
    cca, (x, neighbours, lengths) = make(position), inputs(14)
    for name in [name for name, _ in cca.named_children() if name.endswith("_proj")]:
        setattr(cca, name, PlusOne(getattr(cca, name)))
    expected = cca_by_hand(cca, x, neighbours, lengths)
    torch.testing.assert_close(cca(x, neighbours, lengths), expected, **CLOSE)


def test_modules_that_own_parameters_can_fill_them(seed: int) -> None:
    """After the meta device and `to_empty`, as sharding does it: each module's own reset, and nothing else."""
    makers = [
        lambda: make(bias=True),
        lambda: make("bias"),
        lambda: SelfAttention(12, 2, bias=True),
        lambda: SelfAttention(12, 2, position="rotary"),
        lambda: BlockAttention(10, 2, R, M, head_dim=4, context_dim=7),
    ]
    for maker in makers:
        with torch.device("meta"):
            empty = maker().float()
        empty.to_empty(device="cpu")
        for tensor in (*empty.parameters(), *empty.buffers()):
            tensor.detach().fill_(float("nan"))
        for module in empty.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        fresh = maker().float()
        for name, value in empty.state_dict().items():
            if name in ("content_bias", "position_bias", "rel_bias"):
                assert value.eq(0).all(), name
            else:
                assert value.isfinite().all() and value.std() > 0, name
        assert {n: b.dtype for n, b in empty.named_buffers()} == {
            n: b.dtype for n, b in fresh.named_buffers()
        }
        assert all(torch.equal(a, b) for a, b in zip(empty.buffers(), fresh.buffers(), strict=True))
        weights = {name: p.clone() for name, p in empty.named_parameters()}
        empty.reset_parameters()
        assert all(torch.equal(p, weights[name]) for name, p in empty.named_parameters())


def test_weights_are_all_that_a_module_needs_after_the_meta_device(seed: int) -> None:
    """`to_empty` and a checkpoint, without any reset: no table is left as memory that nobody filled."""
    for maker in (make, lambda: BlockAttention(10, 2, R, M, head_dim=4, context_dim=7)):
        whole = maker()
        with torch.device("meta"):
            empty = maker()
        empty.to_empty(device="cpu").load_state_dict(whole.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(empty.buffers(), whole.buffers(), strict=True))
        assert len(list(empty.buffers())) == 1


def test_casting_rounds_no_table() -> None:
    """A model that was in bfloat16 for a while has the distances of one that never was."""
    module = make().float()
    before = module.distances.table.clone()
    module.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(module.distances.table, before)


def test_what_was_moved_in_inference_mode_trains_later(seed: int) -> None:
    module, (x, neighbours, lengths) = make().float(), inputs(11)
    with torch.inference_mode():
        module.to("cpu")
    module(x.float(), neighbours.float(), lengths).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("position", ["relative", "bias", "none"])
def test_it_keeps_no_more_for_the_backward_than_sdpa_without_positions(
    seed: int, monkeypatch: pytest.MonkeyPatch, position: str
) -> None:
    """Bytes of the distinct storages beyond inputs and parameters, on the benchmark's small shape."""
    x, neighbours = torch.randn(4, 1024, 256), torch.randn(4, 16, 2, 128, 256)

    def kept(module: ChunkedCrossAttention) -> int:
        tensors = [x.requires_grad_(), neighbours.requires_grad_(), *module.parameters()]
        return timing.saved_bytes(lambda: module(x, neighbours), tensors)

    ours = kept(ChunkedCrossAttention(256, 8, position=position, projection="materialised"))
    name = "retro_kernels.nn.attention.chunked_cross_attention"
    monkeypatch.setattr(name, peers.sdpa_chunked_cross_attention)
    assert 0 < ours <= kept(ChunkedCrossAttention(256, 8, position="none", projection="materialised"))


def test_reach_of_a_chunks_neighbours(seed: int) -> None:
    cca = make(bias=True)
    x, neighbours, _ = inputs(3 * M)
    for u in range(3):
        other = neighbours.clone()
        other[:, u] += 1
        changed = (cca(x, other) != cca(x, neighbours)).any(-1).any(0)
        assert changed.nonzero().flatten().tolist() == list(
            range((u + 1) * M - 1, min((u + 2) * M - 1, 3 * M))
        )


def test_neighbours_have_no_order_and_copies_add_nothing(seed: int) -> None:
    cca = make()
    x, neighbours, lengths = inputs(14)
    order = torch.randperm(K)
    out = cca(x, neighbours, lengths)
    torch.testing.assert_close(cca(x, neighbours[:, :, order], lengths[:, :, order]), out)
    one = cca(x, neighbours[:, :, :1], lengths[:, :, :1])
    copies = cca(x, neighbours[:, :, :1].expand(-1, -1, 5, -1, -1), lengths[:, :, :1].expand(-1, -1, 5))
    torch.testing.assert_close(copies, one)


def test_padding_of_a_neighbour_is_never_read(seed: int) -> None:
    cca = make()
    x, neighbours, lengths = inputs(14)
    behind = torch.arange(R) >= lengths[..., None]
    other = torch.where(behind[..., None], 1e3, neighbours)
    assert torch.equal(cca(x, other, lengths), cca(x, neighbours, lengths))


@pytest.mark.parametrize("position", ["relative", "bias", "none"])
def test_a_few_rows_are_rows_of_the_whole(seed: int, position: str) -> None:
    """More than a few, too: those of a prompt that ends inside a chunk."""
    cases = {M: ((0, 1), (2, 2), (0, M), (M - 1, 1)), 16: ((0, 16), (5, 9))}
    for size, spans in cases.items():
        cca = make(position, bias=True, num_kv_heads=2, chunk_size=size)
        x, neighbours, lengths = inputs(3 * size - 1, chunk=size)
        whole, (key, value) = cca(x, neighbours, lengths), cca.keys_and_values(neighbours)
        for first, count in spans:
            start = 2 * size - 1 + first  # rows of the chunk that attends to chunk 1
            rows = cca.attend_rows(
                x[:, start : start + count],
                first,
                key[:, 1],
                value[:, 1],
                lengths[:, 1],
                cca.position_terms(),
            )
            torch.testing.assert_close(rows, whole[:, start : start + count], **CLOSE)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_kv_heads=3), "must divide"),
        (dict(position="absolute"), "choose"),
        (dict(chunk_size=0), "at least 1"),
        (dict(head_dim=0), "head_dim 0; both must be at least 1"),
        (dict(backend="cuda"), 'backend is \'cuda\'; choose "triton", "torch", "reference" or None'),
        (dict(dropout=1.5), "dropout is 1.5; it must be a number in"),
        (dict(dropout="a"), "dropout is 'a'; it must be a number in"),
        (dict(encoder_dim=0), "encoder_dim is 0"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("name", ["head_dim", "encoder_dim", "num_kv_heads", "chunk_size", "neighbour_len"])
@pytest.mark.parametrize("size", [2.0, True, "4"])
def test_sizes_that_are_no_integers(name: str, size: object) -> None:
    with pytest.raises(TypeError, match=f"{name} is {size!r}; it must be an integer"):
        make(**{name: size})
    if name in ("chunk_size", "neighbour_len"):  # the others have a default for it
        with pytest.raises(TypeError, match=f"{name} is None; it must be an integer"):
            make(**{name: None})


def test_sizes_that_are_numpys(seed: int) -> None:
    sizes = dict(head_dim=8, encoder_dim=10, num_kv_heads=1, chunk_size=4, neighbour_len=8)
    cca = ChunkedCrossAttention(
        np.int64(12), np.int8(2), **{name: np.int16(size) for name, size in sizes.items()}
    )
    x, neighbours = torch.randn(1, 9, 12), torch.randn(1, 2, 3, 8, 10)
    compiled = torch.compile(cca, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, neighbours), cca(x, neighbours))
    assert all(type(getattr(cca, name)) is int for name in ("dim", "num_heads", *sizes))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("projection", ["materialised", "absorbed"])
def test_exports_with_parameters_that_require_a_gradient(seed: int, projection: str, bias: bool) -> None:
    cca = make(projection=projection, bias=bias)
    given = inputs(3 * M + 1)
    exported = torch.export.export(cca, given).module()
    out = exported(*given)
    torch.testing.assert_close(out, cca(*given))
    grad = torch.randn_like(out)
    out.backward(grad)
    cca(*given).backward(grad)
    wanted = dict(cca.named_parameters())
    assert len(dict(exported.named_parameters())) == len(wanted)
    for name, parameter in exported.named_parameters():  # it can be trained as well
        torch.testing.assert_close(parameter.grad, wanted[name].grad, msg=lambda m, name=name: f"{name}: {m}")
    x = given[0]
    with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        torch.func.jvp(lambda x: exported(x, *given[1:]), (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        torch.testing.assert_close(exported(*given), out)
        with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
            exported(torch.autograd.forward_ad.make_dual(x, x), *given[1:])


@torch.set_grad_enabled(FREE_SIZES_WITH_GRADIENTS)
@pytest.mark.parametrize("strict", [False, True])
def test_exports_for_any_number_of_neighbours(seed: int, strict: bool) -> None:
    """Whichever of the two projections is predicted to be faster for some."""
    cca, chunks = make(), torch.export.Dim("chunks", min=2)
    batch, count = torch.export.Dim("batch", min=2), torch.export.Dim("count", min=2)
    shapes = {0: batch, 1: M * chunks}, {0: batch, 1: chunks, 2: count}, {0: batch, 1: chunks, 2: count}
    exported = torch.export.export(cca, inputs(3 * M), dynamic_shapes=shapes, strict=strict).module()
    for given in (inputs(4 * M, 3, 2), inputs(2 * M, 2, 40)):
        torch.testing.assert_close(exported(*given), cca(*given))


@torch.set_grad_enabled(FREE_SIZES_WITH_GRADIENTS)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("projection", ["materialised", "absorbed"])
def test_exports_for_any_length(seed: int, projection: str, strict: bool) -> None:
    """Biases, of which rows without a neighbour are free, must not tie the program to some lengths."""
    cca, some = make(projection=projection, bias=True).float(), torch.export.Dim.DYNAMIC

    def given(tokens: int) -> tuple[torch.Tensor, ...]:
        return tuple(x.float() if x.is_floating_point() else x for x in inputs(tokens))

    exported = torch.export.export(cca, given(3 * M + 1), dynamic_shapes=({1: some},) * 3, strict=strict)
    for tokens in (M, M + 1, 2 * M - 1, 2 * M, 5 * M - 1):
        x, neighbours, lengths = given(tokens)
        lengths[0, 0] = 0
        out = exported.module()(x, neighbours, lengths)
        torch.testing.assert_close(out, cca(x, neighbours, lengths))
        assert not out[0, : 2 * M - 1].any()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_scripting_is_refused_by_name() -> None:
    """Also of what holds one, as every model does."""
    cca = ChunkedCrossAttention(32, 2, chunk_size=4, neighbour_len=8)
    for module, name in (
        (cca, "ChunkedCrossAttention"),
        (torch.nn.Sequential(torch.nn.ModuleDict({"cca": cca})), "ChunkedCrossAttention"),
        (tiny_model(cca_layers=()), "SelfAttention"),
        (tiny_model().encoder, "BlockAttention"),
    ):
        with pytest.raises(
            TypeError, match=rf"{name}: torch\.jit\.script cannot take it\. Use torch\.export"
        ):
            torch.jit.script(module)


def test_what_is_exported_loads_where_the_ops_are(seed: int, tmp_path: Path) -> None:
    cca, given = make().eval().float(), inputs(3 * M + 1)
    given = tuple(x.float() if x.is_floating_point() else x for x in given)
    torch.export.save(torch.export.export(cca, given), tmp_path / "cca.pt2")
    torch.save((given, cca(*given).detach()), tmp_path / "wanted.pt")
    code = """
        import sys, torch, retro_kernels.ops
        given, wanted = torch.load(sys.argv[1] + "/wanted.pt")
        torch.testing.assert_close(torch.export.load(sys.argv[1] + "/cca.pt2").module()(*given), wanted)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], check=True, timeout=300)


def test_the_reference_exports_without_ops_of_its_own(seed: int) -> None:
    """Which is what ONNX needs."""
    cca = make(backend="reference")
    graph = torch.export.export(cca, inputs(3 * M + 1)).run_decompositions().graph
    assert not [node for node in graph.nodes if "retro_kernels" in str(node.target)]


@pytest.mark.parametrize("position", ["relative", "bias", "none"])
def test_weights_assigned_to_a_module_without_memory(seed: int, position: str) -> None:
    cca = make(position).float()
    with torch.device("meta"):
        other = make(position).float()
    other.load_state_dict(cca.state_dict(), assign=True)
    x, neighbours, lengths = inputs(3 * M + 1)
    given = x.float(), neighbours.float(), lengths
    with torch.inference_mode():
        assert torch.equal(other(*given), cca(*given))
    other(*given).sum().backward()
    if position == "relative":
        assert not other.distances.table.is_meta
    with torch.device("meta"):
        moved = make(position).float()
    moved.load_state_dict(cca.state_dict(), assign=True)
    assert torch.equal(moved.to("cpu")(*given), cca(*given))


def test_bad_shapes(seed: int) -> None:
    cca = make()
    x, neighbours, lengths = inputs(8)
    for bad in (neighbours[:, :1], neighbours[..., :5, :], neighbours[..., :5], neighbours[0]):
        with pytest.raises(ValueError, match=r"\[2, 2, K, 8, 10\]"):
            cca(x, bad, lengths[:, : bad.shape[1]])
    with pytest.raises(ValueError, match="must be"):
        cca(x[..., :5], neighbours)
    with pytest.raises(TypeError, match="neighbours is of type NoneType"):
        cca(x, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give head_dim"):
        ChunkedCrossAttention(10, 4)


def test_relative_self_attention_is_transformer_xl(seed: int) -> None:
    module = randomise(SelfAttention(12, 3, head_dim=6, bias=True)).double()
    x = torch.randn(2, 9, 12).double()
    expected = torch.stack(
        [
            torch.stack(
                [attend(module, row[i], row[: i + 1], [i - j for j in range(i + 1)]) for i in range(9)]
            )
            for row in x
        ]
    )
    torch.testing.assert_close(module(x), expected, **CLOSE)


@pytest.mark.parametrize("rows", [5, 11, 128, 131])
def test_kernels_and_blocks_of_rows_change_neither_result_nor_gradient(
    rows: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = randomise(SelfAttention(12, 2)).double()
    x = torch.randn(2, rows, 12).double().requires_grad_()

    def both() -> list[torch.Tensor]:
        out = module(x)
        return [out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])]

    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)  # as many as there are sequences and heads
    calls = []
    block_attention = attention_module.block_attention

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(args)
        return block_attention(*args, **kwargs)

    monkeypatch.setattr(attention_module, "block_attention", counted)
    by_kernels = both()
    assert len(calls) == (2 if rows > 128 else 1)
    monkeypatch.setattr(attention_module, "_kernels_pay", lambda q: False)
    torch.testing.assert_close(both(), by_kernels)
    monkeypatch.setattr(attention_module, "_ROWS", 4)
    torch.testing.assert_close(both(), by_kernels)
    monkeypatch.undo()
    monkeypatch.setattr(attention_module, "block_attention", counted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)  # of which one would have nothing to do
    torch.testing.assert_close(both(), by_kernels)
    assert len(calls) == (2 if rows > 128 else 1)


@pytest.mark.parametrize(("rows", "past"), [(1, 9), (4, 9), (5, 9), (130, 3), (513, 40)])
def test_tokens_behind_those_of_a_cache(
    rows: int, past: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last rows of the whole, however many are computed at once."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    q, k, v, rel = (torch.randn(2, 2, past + rows, 4).double() for _ in range(4))
    biases = torch.randn(2, 2, 4).double()
    whole = attention_module._relative_rows(q, k, v, rel[0], *biases)
    last = attention_module.relative_attention(q[:, :, past:], k, v, rel[0], *biases)
    torch.testing.assert_close(last, whole[:, :, past:])


def test_rotary_positions_turn_pairs() -> None:
    with pytest.raises(ValueError, match="head_dim is 3; rotary positions turn pairs"):
        SelfAttention(9, 3, position="rotary")
    assert SelfAttention(9, 3)(torch.randn(1, 4, 9)).shape == (1, 4, 9)


def test_rotary_self_attention(seed: int) -> None:
    module = randomise(SelfAttention(12, 2, position="rotary")).double()
    assert {name for name, _ in module.named_parameters()} == {f"{p}_proj.weight" for p in "qkvo"}
    x = torch.randn(1, 8, 12).double()
    out = module(x)
    q, k, v = (p(x)[0].view(8, 2, 6) for p in (module.q_proj, module.k_proj, module.v_proj))
    for i in range(8):
        heads = []
        for h in range(2):
            logits = []
            for j in range(
                i + 1
            ):  # only the difference of the two positions counts: pairs are complex numbers
                as_complex = lambda y: torch.complex(y[:3], y[3:])  # noqa: E731
                turn = torch.polar(
                    torch.ones(3).double(), (i - j) * 10000.0 ** (-torch.arange(3).double() / 3)
                )
                logits.append((as_complex(q[i, h]) * turn * as_complex(k[j, h]).conj()).real.sum() / 6**0.5)
            heads.append(torch.softmax(torch.stack(logits), 0) @ v[: i + 1, h])
        torch.testing.assert_close(out[0, i], module.o_proj(torch.cat(heads)), **CLOSE)


def test_encoder_self_attention_looks_both_ways(seed: int) -> None:
    module = randomise(BlockAttention(10, 2, R, R, head_dim=4)).double()
    x, lengths = torch.randn(3, R, 10).double(), torch.tensor([R, 3, 0])
    out = module(x, lengths=lengths)
    for p, length in enumerate(lengths.tolist()):
        for i in range(R):
            hand = (
                attend(module, x[p, i], x[p, :length], [i - j for j in range(length)])
                if length
                else torch.zeros(10)
            )
            torch.testing.assert_close(out[p, i], hand.double(), **CLOSE)


def test_encoder_cross_attention_queries_with_neighbour_tokens(seed: int) -> None:
    """Distance is neighbour token minus chunk token (eq. 7); the other direction is a common misreading."""
    module = randomise(BlockAttention(10, 2, R, M, head_dim=4, context_dim=7)).double()
    assert (module.distances.first, module.distances.last) == (-(M - 1), R - 1)
    x, chunks = torch.randn(6, R, 10).double(), torch.randn(2, M, 7).double()
    out = module(x, chunks)
    for p in range(6):
        for c in range(R):
            hand = attend(module, x[p, c], chunks[p // 3], [c - a for a in range(M)])
            torch.testing.assert_close(out[p, c], hand, **CLOSE)
