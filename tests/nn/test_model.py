"""The whole model: what may influence what, what is exactly nothing, sizes, compilation, retrofit."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict

import numpy as np
import pytest
import timing
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from retro_kernels import InputError, Retro, RetroConfig, preset, retro_tiny
from retro_kernels.nn import NeighbourEncoder
from retro_kernels.nn import attention as attention_module
from retro_kernels.ops import NeighbourBatch

from .helpers import FREE_SIZES_WITH_GRADIENTS, TINY, offload, random_neighbours, tiny_model

M = TINY.chunk_size


def test_a_presets_other_depth_has_its_own_layers_of_attention() -> None:
    assert preset("retro_tiny", num_layers=2).cca_layers == (1, 2)
    assert preset("retro_small", num_layers=12).cca_layers == (6, 9, 12)
    assert preset("retro_small", num_layers=3, cca_layers=(3,)).cca_layers == (3,)
    with pytest.raises(InputError, match="num_layers is '3'"):
        preset("retro_tiny", num_layers="3")


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"dim": True}, "dim is True"),
        ({"dim": np.True_}, "dim is "),
        ({"dim": torch.tensor(True)}, r"dim is tensor\(True\)"),
        ({"dim": np.float64(896)}, "dim is "),
        ({"norm_eps": -1}, "norm_eps is -1"),
        ({"norm_eps": float("nan")}, "norm_eps is nan"),
        ({"dropout": "0.1"}, "dropout is '0.1'"),
        ({"cca_layers": (6.0,)}, r"cca_layers is \(6.0,\); it must be layer numbers"),
        ({"cca_layers": "6"}, "cca_layers is '6'"),
        ({"cca_layers": 6}, "cca_layers is 6;"),
        ({"encoder_cross_layers": (True,)}, "encoder_cross_layers is"),
        ({"tie_embeddings": "no"}, "tie_embeddings is 'no'; it must be True or False"),
        ({"pad_id": 0.5}, "pad_id is 0.5"),
        ({"pad_id": 128_000}, "pad_id is 128000; the vocabulary has 128000"),
        ({"pad_id": -1}, "pad_id is -1"),
        ({"dim": 0}, "dim is 0; it must be an integer of at least 1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"norm_eps": 0}, "norm_eps is 0"),
        ({"norm_eps": float("inf")}, "norm_eps is inf"),
        ({"cca_layers": (6, 13)}, "cca_layers is .* at most 12 here"),
        ({"cca_layers": (0, 6)}, "layer numbers are 1-based"),
        ({"cca_layers": (6, 6)}, "distinct"),
        ({"encoder_cross_layers": (3,)}, "encoder_cross_layers is .* at most 2 here"),
        ({"self_attention": "bias"}, "self_attention is 'bias'"),
        ({"cca_position": "rotary"}, "cca_position is 'rotary'"),
        ({"self_attention": "rotary", "head_dim": 63}, "an even head_dim, not 63"),
        ({"share_encoder_embedding": True, "encoder_dim": 64}, "not 896 and 64"),
    ],
)
def test_fields_out_of_range(fields: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        RetroConfig(**fields)  # type: ignore[arg-type]


def test_fields_at_the_end_of_their_range() -> None:
    config = RetroConfig(
        vocab_size=1, dim=1, encoder_dim=1, share_encoder_embedding=True, head_dim=63, cca_layers=[12, 1, 6]
    )
    assert config.cca_layers == (1, 6, 12)  # in their order, however they were given
    assert RetroConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(InputError, match=r"unknown fields \['width'\]"):
        RetroConfig.from_dict({"width": 3})


def test_integers_of_numpy_and_torch_are_integers() -> None:
    given = preset(
        "retro_tiny",
        dim=np.int64(64),
        num_layers=torch.tensor(4),
        cca_layers=np.array([2, 4]),
        pad_id=np.int32(3),
        dropout=np.int64(0),
        norm_eps=torch.tensor(1),
    )
    assert given == preset(
        "retro_tiny", dim=64, num_layers=4, cca_layers=(2, 4), pad_id=3, dropout=0, norm_eps=1
    )
    assert json.loads(json.dumps(given.to_dict()))["dim"] == 64
    assert preset("retro_tiny", num_layers=np.uint8(4)) == preset("retro_tiny", num_layers=4)


@pytest.mark.parametrize(
    "name, millions, plain",
    [
        ("retro_172m", 172, 132),
        ("retro_425m", 425, 368),
        ("retro_1_5b", 1451, 1309),
        ("retro_7_5b", 7532, 6982),
    ],
)
def test_presets_have_the_papers_sizes(name: str, millions: int, plain: int) -> None:
    def body(config: RetroConfig) -> int:
        with torch.device("meta"):
            model = Retro(config)
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        counted = sum(
            p.numel()
            for p in model.parameters()
            if p.ndim == 2 and min(p.shape) > 128 and id(p) not in embeddings
        )
        assert counted == config.body_parameters()
        return counted

    assert body(preset(name)) == pytest.approx(millions * 1e6, rel=0.005)
    assert body(preset(name, cca_layers=())) == pytest.approx(plain * 1e6, rel=0.005)
    others = {"self_attention": "rotary", "cca_position": "none", "encoder_cross_layers": (1, 2)}
    body(preset(name, **others))


@pytest.mark.parametrize(
    "name, dim, ffn_dim, heads, head_dim, layers, cca_layers, millions",
    [
        ("retro_172m", 896, 3584, 16, 64, 12, (6, 9, 12), 247),
        ("retro_425m", 1536, 6144, 12, 128, 12, (6, 9, 12), 564),
        ("retro_1_5b", 2048, 8192, 16, 128, 24, (6, 9, 12, 15, 18, 21, 24), 1574),
        ("retro_7_5b", 4096, 16384, 32, 128, 32, (6, 9, 12, 15, 18, 21, 24, 27, 30), 7505),
    ],
)
def test_presets_have_the_papers_shapes(
    name: str,
    dim: int,
    ffn_dim: int,
    heads: int,
    head_dim: int,
    layers: int,
    cca_layers: tuple[int, ...],
    millions: int,
) -> None:
    """Table 10, whose names count one table of tokens. Other numbers of heads have the same counts in Table 2."""
    given = dict(dim=dim, ffn_dim=ffn_dim, num_heads=heads, head_dim=head_dim, num_layers=layers)
    encoder = dict(
        encoder_dim=896, encoder_layers=2, encoder_heads=16, encoder_head_dim=64, encoder_ffn_dim=3584
    )
    lengths = dict(vocab_size=128_000, chunk_size=64, neighbour_len=128)
    wanted = RetroConfig(**given, **encoder, **lengths, cca_layers=cca_layers, encoder_cross_layers=(1,))
    assert preset(name) == wanted
    with torch.device("meta"):
        plain = Retro(preset(name, cca_layers=()))
    assert sum(p.numel() for p in plain.parameters()) == pytest.approx(millions * 1e6, rel=0.0025)


def test_layer_numbers_count_from_one() -> None:
    model = Retro(TINY.replace(cca_layers=(1, 3), encoder_cross_layers=(2,)))
    assert [layer.cca is not None for layer in model.layers] == [True, False, True, False]
    assert [layer.cross is not None for layer in model.encoder.layers] == [False, True]


def test_a_backend_is_that_of_every_attention(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = Retro(TINY, backend="reference")
    model.save_pretrained(tmp_path)
    plain = Retro(TINY.replace(cca_layers=()))
    for chosen in (
        model,
        Retro.from_pretrained(tmp_path, backend="reference"),
        Retro.from_decoder(plain, (2,), backend="reference"),
    ):
        assert {part.backend for part in chosen.modules() if hasattr(part, "backend")} == {"reference"}
    assert not model.gradient_checkpointing


@pytest.mark.parametrize("tokens", [1, M - 1, M, M + 1, 3 * M + 2])
@pytest.mark.parametrize("self_attention", ["relative", "rotary"])
def test_no_token_changes_the_past(seed: int, tokens: int, self_attention: str) -> None:
    model = tiny_model(self_attention=self_attention)
    x, neighbours = torch.randint(50, (2, tokens)), random_neighbours(2, tokens // M, full=True)
    logits = model(x, neighbours)
    for t in range(tokens):
        other = x.clone()
        other[:, t] = (other[:, t] + 1) % 50
        changed = (model(other, neighbours) - logits).abs().amax(-1) > 1e-12
        assert not changed[:, :t].any()
        assert changed[:, t:].any(0).all()  # every later token does see it


@pytest.mark.parametrize("tokens", [0, 1, M - 1, M])
@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("self_attention", ["relative", "rotary"])
def test_sizes_of_nothing(seed: int, tokens: int, batch: int, self_attention: str) -> None:
    """No sequence, no token, no whole chunk: the shapes of always, and the plain decoder's values."""
    model = tiny_model(self_attention=self_attention)
    x, neighbours = torch.randint(50, (batch, tokens)), random_neighbours(batch, tokens // M)
    hidden = torch.randn(batch, tokens // M, M, TINY.dim, dtype=torch.float64)
    encoded = model.encoder(neighbours.tokens, hidden, neighbours.lengths)
    assert encoded.shape == (batch, tokens // M, 3, TINY.neighbour_len, TINY.encoder_dim)
    logits = model(x, neighbours)
    assert logits.shape == (batch, tokens, 50)
    if tokens < M:
        assert torch.equal(logits, model(x, None))
    logits.sum().backward()


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"cca_layers": ()}])
def test_logits_of_the_last_tokens_alone(seed: int, changes: dict[str, object]) -> None:
    """Of no other token the product with the vocabulary is taken."""
    model = tiny_model(**changes)
    x = torch.randint(50, (2, 14))
    neighbours = random_neighbours(2, 3) if model.config.cca_layers else None
    whole, read = model(x, neighbours), []
    model.norm.register_forward_hook(lambda module, args, output: read.append(output.shape[1]))
    for count in (0, 1, 5, 14, 20):
        expected = whole[:, -count:]
        torch.testing.assert_close(model(x, neighbours, logits_to_keep=count), expected)
        cache = model.new_cache(2)
        torch.testing.assert_close(model.decode(x, cache, neighbours, logits_to_keep=count), expected)
        assert cache.length == 14
        assert read == [expected.shape[1]] * 2
        read.clear()
    cache = model.new_cache(2)
    for call in (model, lambda *given, **options: model.decode(given[0], cache, given[1], **options)):
        with pytest.raises(
            InputError, match="logits_to_keep is -1; it must be a number of last tokens, or 0"
        ):
            call(x, neighbours, logits_to_keep=-1)
    assert cache.length == 0


def test_reach_of_neighbours(seed: int) -> None:
    """Chunk u's neighbours reach its own last token and everything after it, and nothing before."""
    model = tiny_model()
    x, neighbours = torch.randint(50, (2, 14)), random_neighbours(2, 3, full=True)
    logits = model(x, neighbours)
    for u in range(3):
        other = neighbours.tokens.clone()
        other[:, u] = (other[:, u] + 1) % 50
        changed = ((model(x, neighbours._replace(tokens=other)) - logits).abs().amax(-1) > 1e-12).any(0)
        assert changed.nonzero().flatten().tolist() == list(range((u + 1) * M - 1, 14))


def test_order_of_neighbours_and_padding_do_not_matter(seed: int) -> None:
    model = tiny_model()
    x, neighbours = torch.randint(50, (2, 14)), random_neighbours(2, 3)
    logits, order = model(x, neighbours), torch.randperm(3)
    shuffled = NeighbourBatch(neighbours.tokens[:, :, order], neighbours.lengths[:, :, order])
    torch.testing.assert_close(model(x, shuffled), logits)
    behind = torch.arange(TINY.neighbour_len) >= neighbours.lengths[..., None]
    other = torch.where(behind, (neighbours.tokens + 1) % 50, neighbours.tokens)
    assert torch.equal(model(x, neighbours._replace(tokens=other)), logits)


def test_off_missing_and_short_are_the_plain_decoder(seed: int) -> None:
    model = tiny_model()
    plain = Retro(TINY.replace(cca_layers=())).double().eval()
    plain.load_state_dict(
        {name: w for name, w in model.state_dict().items() if "cca" not in name and "encoder" not in name}
    )
    x, neighbours = torch.randint(50, (2, 14)), random_neighbours(2, 3)
    off = plain(x)
    assert torch.equal(model(x), off)
    assert torch.equal(model(x, neighbours._replace(lengths=torch.zeros_like(neighbours.lengths))), off)
    assert torch.equal(
        model(x, NeighbourBatch(neighbours.tokens[:, :, :0], neighbours.lengths[:, :, :0])), off
    )
    assert torch.equal(model(x[:, : M - 1], neighbours), plain(x[:, : M - 1]))
    on = model(x, neighbours._replace(lengths=torch.full_like(neighbours.lengths, 8)))
    assert torch.equal(on[:, : M - 1], off[:, : M - 1])
    assert (on - off)[:, M - 1 :].abs().amax(-1).min() > 1e-6


def test_a_missing_neighbour_is_one_fewer(seed: int) -> None:
    model = tiny_model()
    x, neighbours = torch.randint(50, (2, 14)), random_neighbours(2, 3, full=True)
    neighbours.lengths[:, :, 2] = 0
    two = NeighbourBatch(neighbours.tokens[:, :, :2], neighbours.lengths[:, :, :2])
    torch.testing.assert_close(model(x, neighbours), model(x, two))


def test_encoder_sees_the_state_after_self_attention_of_the_first_cca_layer(seed: int) -> None:
    model = tiny_model()
    x, neighbours = torch.randint(50, (1, 2 * M)), random_neighbours(1, 2)
    seen = []
    model.encoder.register_forward_hook(lambda _, args, __: seen.append(args[1]))
    model(x, neighbours)
    first, second = model.layers[0], model.layers[1]
    h = model.embedding(x)
    h = h + first.attention(first.attention_norm(h))
    h = h + first.ffn(first.ffn_norm(h))
    h = h + second.attention(second.attention_norm(h))
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], h.view(1, 2, M, -1))


def test_what_stands_between_the_attentions_is_the_papers(seed: int) -> None:
    """Algorithm 1, written out: order, RMSNorm before each part and behind all, two matrices with a GELU."""
    model = tiny_model()
    x, neighbours = torch.randint(50, (2, 3 * M + 2)), random_neighbours(2, 3)

    def norm(h: Tensor, module: nn.Module) -> Tensor:
        return h * (h.square().mean(-1, keepdim=True) + TINY.norm_eps).rsqrt() * module.weight

    def network(h: Tensor, layer: nn.Module) -> Tensor:
        up = norm(h, layer.ffn_norm) @ layer.ffn.up_proj.weight.T
        return h + up * (1 + torch.erf(up / 2**0.5)) / 2 @ layer.ffn.down_proj.weight.T

    def encode(h: Tensor) -> Tensor:
        encoder = model.encoder
        chunks = norm(h[:, : 3 * M].reshape(6, M, -1), encoder.conditioning_norm)
        e = encoder.embedding.weight[neighbours.tokens.flatten(0, 2)]
        for number, layer in enumerate(encoder.layers, 1):
            e = e + layer.attention(norm(e, layer.attention_norm), lengths=neighbours.lengths.flatten())
            if number in TINY.encoder_cross_layers:
                e = e + layer.cross(norm(e, layer.cross_norm), chunks)
            e = network(e, layer)
        return norm(e, encoder.norm).unflatten(0, neighbours.tokens.shape[:3])

    h, encoded = model.embedding.weight[x], None
    for number, layer in enumerate(model.layers, 1):
        h = h + layer.attention(norm(h, layer.attention_norm))
        if number in TINY.cca_layers:
            encoded = encode(h) if encoded is None else encoded
            h = h + layer.cca(norm(h, layer.cca_norm), encoded, neighbours.lengths)
        h = network(h, layer)
    torch.testing.assert_close(model(x, neighbours), norm(h, model.norm) @ model.embedding.weight.T)


def test_neighbours_are_encoded_one_by_one(seed: int) -> None:
    encoder: NeighbourEncoder = tiny_model().encoder
    neighbours, hidden = random_neighbours(2, 3), torch.randn(2, 3, M, 24).double()
    whole = encoder(neighbours.tokens, hidden, neighbours.lengths)
    for j in range(3):
        alone = encoder(
            neighbours.tokens[:, 1:2, j : j + 1], hidden[:, 1:2], neighbours.lengths[:, 1:2, j : j + 1]
        )
        torch.testing.assert_close(alone[:, 0, 0], whole[:, 1, j])
    for part in ((0, 3, 3), (2, 0, 3), (2, 3, 0)):  # nothing to encode
        few, shape = NeighbourBatch(*(v[: part[0], : part[1], : part[2]] for v in neighbours[:2])), part[:2]
        encoded = encoder(few.tokens, hidden[: shape[0], : shape[1]], few.lengths)
        assert encoded.shape == (*part, TINY.neighbour_len, 16) and encoded.sum().requires_grad


def test_the_encoder_says_what_does_not_fit(seed: int) -> None:
    encoder: NeighbourEncoder = tiny_model().encoder
    neighbours, hidden = random_neighbours(2, 3), torch.randn(2, 3, M, 24).double()
    with pytest.raises(TypeError, match="tokens is of type NeighbourBatch; .* give tokens and lengths"):
        encoder(neighbours, hidden)
    with pytest.raises(TypeError, match="lengths is of type list"):
        encoder(neighbours.tokens, hidden, neighbours.lengths.tolist())
    with pytest.raises(ValueError, match=r"lengths is \[2, 3, 1\]; it must be \[B, L, K\] = \[2, 3, 3\]"):
        encoder(neighbours.tokens, hidden, neighbours.lengths[..., :1])
    with pytest.raises(ValueError, match=r"hidden \[2, 2, 4, 24\]; .* of the same sequences and chunks"):
        encoder(neighbours.tokens, hidden[:, 1:], neighbours.lengths)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cca_position": "bias"},
        {"tie_embeddings": False, "self_attention": "rotary"},
        {"share_encoder_embedding": True, "encoder_dim": 24},
    ],
)
def test_every_parameter_learns(seed: int, changes: dict[str, object]) -> None:
    model = tiny_model(**changes).train()
    x, neighbours = torch.randint(50, (2, 14)), random_neighbours(2, 3, full=True)
    model(x, neighbours).logsumexp(-1).sum().backward()
    assert [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0
    ] == []


def test_initialisation(seed: int) -> None:
    model = Retro(TINY.replace(dim=64, ffn_dim=256, num_layers=8))
    layer = model.layers[1]
    assert layer.attention.q_proj.weight.std().item() == pytest.approx(0.079, rel=0.2)
    assert layer.ffn.down_proj.weight.std().item() == pytest.approx(0.079 / 4, rel=0.2)
    assert layer.cca.o_proj.weight.std().item() == pytest.approx(0.079 / 4, rel=0.2)
    assert model.encoder.layers[0].ffn.down_proj.weight.std().item() == pytest.approx(0.158 / 2, rel=0.2)
    assert layer.ffn_norm.weight.eq(1).all() and layer.cca.content_bias.eq(0).all()


def test_gradient_checkpointing_changes_nothing_but_memory(seed: int) -> None:
    model = tiny_model(dropout=0.3).train()
    x, neighbours = torch.randint(50, (2, 14)), random_neighbours(2, 3, full=True)
    inner = [layer.ffn for layer in (*model.layers, *model.encoder.layers)]
    calls: list[torch.nn.Module] = []
    for module in inner:
        module.register_forward_pre_hook(lambda module, _: calls.append(module))
    results, kept = [], []
    for model.gradient_checkpointing in (False, True):
        calls.clear()
        torch.manual_seed(seed)
        logits = model(x, neighbours)
        results.append((logits, *torch.autograd.grad(logits.logsumexp(-1).sum(), list(model.parameters()))))
        assert [calls.count(module) for module in inner] == [1 + model.gradient_checkpointing] * len(inner)
        kept.append(timing.saved_bytes(lambda: model(x, neighbours), list(model.parameters())))
    torch.testing.assert_close(results[1], results[0])
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False},
        {"share_encoder_embedding": True, "encoder_dim": 24},
        {"cca_position": "bias"},
    ],
)
@torch.no_grad()
def test_weights_that_are_kept_elsewhere_between_calls(seed: int, changes: dict[str, object]) -> None:
    """Read outside a call they are what stands in for them, from which torch computes something."""
    model = tiny_model(torch.float32, **changes)
    x, neighbours = torch.randint(50, (2, 14)), random_neighbours(2, 3)
    wanted = model(x, neighbours)
    offload(model)
    torch.testing.assert_close(model(x, neighbours), wanted)
    cache = model.new_cache(2)
    with pytest.raises(InputError, match="on the meta device"):
        model.decode(x[:, :2], cache)
    assert cache.length == cache.self_attention[0].length == 0


@pytest.mark.filterwarnings("error:FSDP2-wrapped module .* returned a view")  # into which a hook may write
@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_can_be_sharded_one_by_one(seed: int, checkpointing: bool) -> None:
    """Who wraps a layer, or hooks it, sees it called."""
    model = tiny_model(torch.float32).train()
    model.gradient_checkpointing = checkpointing
    x, neighbours = torch.randint(50, (2, 14)), random_neighbours(2, 3, full=True)
    wanted = model(x, neighbours)
    wanted.logsumexp(-1).sum().backward()
    sharded = copy.deepcopy(model)
    sharded.zero_grad()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for part in (*sharded.layers, *sharded.encoder.layers, sharded.encoder, sharded):
            fully_shard(part, mesh=mesh)
        logits = sharded(x, neighbours)
        logits.logsumexp(-1).sum().backward()
        torch.testing.assert_close(logits, wanted)
        for (name, parameter), like in zip(sharded.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad.full_tensor(), like.grad, msg=name)
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_sharded_model_decodes(seed: int, dtype: torch.dtype | None, apart: bool) -> None:
    """FSDP makes some of a call's arguments anew: tensors that require a gradient, or are to be of `dtype`. `apart`:
    each CCA is sharded by itself."""
    model = tiny_model(torch.float32)
    x, neighbours = torch.randint(50, (2, 14)), random_neighbours(2, 3)
    wanted = model(x, neighbours)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh, policy = init_device_mesh("cpu", (1,)), MixedPrecisionPolicy(param_dtype=dtype)
        ccas = [model.layers[number - 1].cca for number in TINY.cca_layers] if apart else []
        for part in (*ccas, *model.layers, model.encoder, model):
            fully_shard(part, mesh=mesh, mp_policy=policy)
        for cca in ccas:
            for name in ("attend_rows", "keys_and_values", "position_terms"):
                register_fsdp_forward_method(cca, name)
        register_fsdp_forward_method(model, "decode")
        cache, logits = model.new_cache(2), []
        for t in range(14):
            u = t // M
            done = NeighbourBatch(neighbours.tokens[:, u : u + 1], neighbours.lengths[:, u : u + 1])
            logits.append(model.decode(x[:, t : t + 1], cache, done if t % M == M - 1 else None))
            read = cache.length
            assert read == t + 1
        torch.testing.assert_close(torch.cat(logits, 1), wanted)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.int32])
def test_tokens_of_any_integers(seed: int, dtype: torch.dtype) -> None:
    model, x, neighbours = tiny_model(), torch.randint(50, (2, 14)), random_neighbours(2, 3)
    wanted = model(x, neighbours)
    narrow = NeighbourBatch(neighbours.tokens.to(dtype), neighbours.lengths)
    assert torch.equal(model(x.to(dtype), narrow), wanted)
    torch.testing.assert_close(model.decode(x.to(dtype), model.new_cache(2), narrow), wanted)


@pytest.mark.parametrize("self_attention, rows", [("relative", None), ("relative", 4), ("rotary", None)])
def test_compiles_without_a_graph_break(
    seed: int, self_attention: str, rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a sequence is longer than the rows of logits that exist at one time, which are then recomputed."""
    if rows:
        monkeypatch.setattr(attention_module, "_ROWS", rows)
    model = tiny_model(torch.float32, self_attention=self_attention, num_layers=2, cca_layers=(2,)).train()
    x, neighbours = torch.randint(50, (2, 14)), random_neighbours(2, 3, full=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        logits = run(x, neighbours)
        results.append((logits, *torch.autograd.grad(logits.logsumexp(-1).mean(), list(model.parameters()))))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-5)


def test_compiled_for_any_length_and_number_of_neighbours(seed: int) -> None:
    """One program for all of them: torch gives up after eight."""
    sizes = dict(num_layers=1, cca_layers=(1,), encoder_layers=1, encoder_cross_layers=(1,))
    model, programs = tiny_model(torch.float32, **sizes), CompileCounter()
    model.layers[0].cca.projection = "materialised"  # the other one would be a program of its own
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=programs)
    for tokens, count in ((19, 3), (22, 3), (30, 5), (18, 7), (33, 2)):
        x, neighbours = torch.randint(50, (2, tokens)), random_neighbours(2, tokens // M, count)
        torch.testing.assert_close(compiled(x, neighbours), model(x, neighbours))
    assert programs.frame_count == 1


@torch.set_grad_enabled(FREE_SIZES_WITH_GRADIENTS)
def test_exports_for_any_length_and_number_of_neighbours(seed: int) -> None:
    """From two chunks and two neighbours on; one program for multiples of a chunk and for other lengths."""
    model, some = tiny_model(torch.float32), torch.export.Dim.DYNAMIC

    def given(tokens: int, batch: int = 2, count: int = 3) -> tuple[torch.Tensor, NeighbourBatch]:
        return torch.randint(50, (batch, tokens)), random_neighbours(batch, tokens // M, count)

    found = NeighbourBatch({0: some, 1: some, 2: some}, {0: some, 1: some, 2: some})
    exported = torch.export.export(model, given(18), dynamic_shapes=({0: some, 1: some}, found)).module()
    for sizes in ((18, 2, 3), (20, 3, 2), (8, 1, 5), (11, 2, 3), (64, 1, 2)):
        x, neighbours = given(*sizes)
        torch.testing.assert_close(exported(x, neighbours), model(x, neighbours))


def test_rotary_attention_compiles_for_any_length(seed: int) -> None:
    """As it does by itself once a second length has come."""
    compiled = torch.compile(
        attention_module._rotary_attention, fullgraph=True, backend="aot_eager", dynamic=True
    )
    for rows, keys in ((6, 6), (9, 9), (1, 7), (3, 8)):
        q, k, v = torch.randn(2, 2, rows, 8), torch.randn(2, 2, keys, 8), torch.randn(2, 2, keys, 8)
        torch.testing.assert_close(compiled(q, k, v), attention_module._rotary_attention(q, k, v))


def test_autocast(seed: int) -> None:
    model = Retro(TINY).train()
    x, neighbours = torch.randint(50, (2, 14)), random_neighbours(2, 3, full=True)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x, neighbours)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - model(x, neighbours)).norm() < 0.05 * logits.float().norm()
    logits.float().logsumexp(-1).sum().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all()
        for p in model.parameters()
    )


@pytest.mark.parametrize("freeze", [True, False])
def test_retrofit_starts_as_the_decoder(seed: int, freeze: bool) -> None:
    decoder = tiny_model(cca_layers=())
    model = Retro.from_decoder(decoder, (2, 3), freeze=freeze, encoder_dim=32).eval()
    x, neighbours = torch.randint(50, (2, 14)), random_neighbours(2, 3, full=True)
    off = decoder(x)
    assert torch.equal(model(x, neighbours), off)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        model(x, neighbours).logsumexp(-1).sum().backward()
        optimiser.step()
    new = {name for name, p in model.named_parameters() if p.requires_grad}
    assert ("embedding.weight" in new) == (not freeze)
    assert {"encoder.embedding.weight", "layers.1.cca.q_proj.weight", "layers.2.cca_norm.weight"} <= new
    assert model.encoder.embedding.weight.grad.abs().max() > 0
    assert (model(x, neighbours) - off).abs().max() > 1e-6
    assert torch.equal(model(x), off) == freeze


def test_retrofit_refuses(seed: int, tmp_path) -> None:  # type: ignore[no-untyped-def]
    decoder = tiny_model(cca_layers=())
    decoder.save_pretrained(tmp_path)
    assert Retro.from_decoder(tmp_path, (4,)).config.cca_layers == (4,)
    with pytest.raises(InputError, match="already"):
        Retro.from_decoder(tiny_model(), (2,))
    with pytest.raises(InputError, match="empty"):
        Retro.from_decoder(decoder, ())
    with pytest.raises(InputError, match="cca_layers is 3; it must be layer numbers"):
        Retro.from_decoder(decoder, 3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="does not fit"):
        Retro.from_decoder(decoder, (2,), ffn_dim=8)
    with pytest.raises(InputError, match="does not fit"):
        Retro.from_decoder(decoder, (2,), num_layers=decoder.config.num_layers - 1)


def test_bad_input(seed: int) -> None:
    model = tiny_model()
    x, neighbours = torch.randint(50, (2, 14)), random_neighbours(2, 3)
    model(x, random_neighbours(2, 5))  # more chunks than whole ones are left out
    with pytest.raises(InputError, match=r"\[2, 3, K, 8\]"):
        model(x, NeighbourBatch(neighbours.tokens[:, :2], neighbours.lengths[:, :2]))
    with pytest.raises(InputError, match=r"\[2, 3, K, 8\]"):
        model(x, NeighbourBatch(neighbours.tokens[..., :7], neighbours.lengths))
    with pytest.raises(InputError, match="lengths"):
        model(x, NeighbourBatch(neighbours.tokens, neighbours.lengths[:, :2]))
    with pytest.raises(InputError, match=r"\[B, N\]"):
        model(x[0], neighbours)
    for tokens, given, match in [
        (x, neighbours.tokens, "neighbours is a tensor; it must be a NeighbourBatch"),
        (x, neighbours._asdict(), "neighbours is of type dict; it must be a NeighbourBatch"),
        (x, neighbours.tokens.numpy(), "neighbours is of type ndarray"),
        (x, (neighbours.tokens.numpy(), neighbours.lengths), r"neighbours holds \(ndarray, Tensor\)"),
        (x, (neighbours.tokens,), r"neighbours holds \(Tensor\)"),
        (x.tolist(), neighbours, r"tokens is of type list; it must be a tensor of integers, \[B, N\]"),
        (x.numpy(), None, "tokens is of type ndarray"),
        (x.float(), None, r"tokens is torch\.float32; it must be a tensor of integers"),
        (x > 0, None, r"tokens is torch\.bool; it must be a tensor of integers"),
    ]:
        with pytest.raises(TypeError, match=f"Retro: {match}"):
            model(tokens, given)
        cache = model.new_cache(2)
        with pytest.raises(TypeError, match=f"Retro: {match}"):
            model.decode(tokens, cache, given)
        assert cache.length == 0
    with pytest.raises(InputError, match="plain decoder"):
        tiny_model(cca_layers=())(x, neighbours)
    for config, kind in [(retro_tiny, "function"), (asdict(TINY), "dict"), (None, "NoneType")]:
        with pytest.raises(TypeError, match=rf"config is of type {kind}; it must be a RetroConfig, such as"):
            Retro(config)


class WithAdapter(nn.Module):
    """As LoRA replaces a layer: beside the old weight there is a new one."""

    def __init__(self, layer: nn.Embedding | nn.Linear) -> None:
        super().__init__()
        self.layer, self.added = layer, copy.deepcopy(layer)
        nn.init.normal_(self.added.weight)
        self.weight = layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.added(x)


@pytest.mark.parametrize("tied, name", [(True, "embedding"), (False, "embedding"), (False, "readout")])
def test_a_replaced_embedding_or_readout_is_what_is_used(seed: int, tied: bool, name: str) -> None:
    """Also where the logits are read off the embedding: what was trained is the same once it is merged."""
    model = tiny_model(tie_embeddings=tied)
    x, neighbours = torch.randint(50, (2, 14)), random_neighbours(2, 3)
    before, merged, adapter = model(x, neighbours), copy.deepcopy(model), WithAdapter(getattr(model, name))
    setattr(model, name, adapter)
    with torch.no_grad():
        getattr(merged, name).weight += adapter.added.weight
    logits = model(x, neighbours)
    assert not torch.allclose(logits, before)
    torch.testing.assert_close(logits, merged(x, neighbours))
    torch.testing.assert_close(model.decode(x, model.new_cache(2), neighbours), logits)


def test_every_attention_of_the_encoder_reads_normalised_states(seed: int) -> None:
    """Queries are made of the norm of the state as it is after self-attention, not of what went into the layer."""
    model, seen = Retro(TINY.replace(normalise_conditioning=True)), {}  # gains are 1 in a new model

    def record(name: str):
        return lambda module, args: seen.setdefault(name, args)

    layer = model.encoder.layers[0]
    layer.attention.register_forward_pre_hook(record("attention"))
    layer.cross_norm.register_forward_pre_hook(record("before"))
    layer.cross.register_forward_pre_hook(record("cross"))
    model(torch.randint(50, (2, 14)), random_neighbours(2, 3, full=True))
    query, context = seen["cross"]
    assert torch.equal(query, layer.cross_norm(seen["before"][0]))
    for states in (seen["attention"][0], query, context):
        assert torch.allclose(states.square().mean(-1), torch.ones(states.shape[:-1]), atol=1e-2), (
            "not normalised"
        )


def test_the_encoder_takes_embedded_tokens(seed):
    """What `gather_embeddings` gives stands for the tokens; a table of the encoder's own is left alone then."""
    model = tiny_model()
    encoder = model.encoder
    neighbours, hidden = (
        random_neighbours(2, 3),
        torch.randn(2, 3, M, model.config.dim).to(model.embedding.weight.dtype),
    )
    embedded = encoder.embedding(neighbours.tokens)
    expected = encoder(neighbours.tokens, hidden, neighbours.lengths)
    assert torch.equal(encoder(embedded, hidden, neighbours.lengths), expected)
    with pytest.raises(ValueError, match=r"must be \[B, L, K, \d+, \d+\]"):
        encoder(embedded[..., :-1], hidden, neighbours.lengths)
