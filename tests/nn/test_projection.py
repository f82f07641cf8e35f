"""ChunkedCrossAttention with and without keys and values: the same layer, the same model."""

from __future__ import annotations

import pytest
import torch

from retro_kernels.nn import ChunkedCrossAttention, Retro
from retro_kernels.nn import attention as attention_module

from .helpers import random_neighbours, randomise, tiny_model
from .test_decode import decode, random_split


def make(projection: str, **options: object) -> ChunkedCrossAttention:
    sizes = dict(head_dim=6, encoder_dim=10, chunk_size=4, neighbour_len=8, num_kv_heads=2)
    return ChunkedCrossAttention(12, 4, projection=projection, **{**sizes, **options}).double()


@pytest.mark.parametrize("position", ["relative", "bias", "none"])
@pytest.mark.parametrize("bias", [False, True])
def test_both_ways_are_one_layer(position: str, bias: bool, seed: int) -> None:
    materialised = randomise(make("materialised", position=position, bias=bias))
    absorbed = make("absorbed", position=position, bias=bias)
    absorbed.load_state_dict(materialised.state_dict())
    x, neighbours = torch.randn(2, 11, 12).double(), torch.randn(2, 2, 3, 8, 10).double()
    lengths = torch.randint(0, 9, (2, 2, 3))
    lengths[0, 0] = 0
    results = []
    for module in (materialised, absorbed):
        given = x.clone().requires_grad_(), neighbours.clone().requires_grad_()
        out = module(*given, lengths)
        (out * torch.linspace(0, 1, out.numel()).view_as(out)).sum().backward()
        grads = {name: p.grad for name, p in module.named_parameters()}
        results.append((out, *(y.grad for y in given), grads))
    assert results[0][0].norm() > 0 and all(grad is not None for grad in results[1][-1].values())
    torch.testing.assert_close(results[1], results[0])
    assert results[1][0][0, 3:7].eq(0).all()  # no neighbours, biases or not


@pytest.mark.parametrize("position", ["relative", "bias"])
def test_model_and_decoding_absorb(position: str, seed: int) -> None:
    model = tiny_model(torch.float32, cca_position=position)
    x, neighbours = torch.randint(50, (2, 22)), random_neighbours(2, 5)
    expected = {}
    for projection in ("materialised", "absorbed"):
        set_projection(model, projection)
        expected[projection] = model(x, neighbours)
    torch.testing.assert_close(expected["absorbed"], expected["materialised"], rtol=1e-4, atol=1e-4)
    for split in ([22], [1] * 22, random_split(22)):
        out = decode(model, x, neighbours, split)
        torch.testing.assert_close(out, expected["materialised"], rtol=1e-4, atol=1e-4, msg=f"{split}")


def test_layers_share_the_cached_states(seed: int) -> None:
    model = tiny_model(torch.float32)
    set_projection(model, "absorbed")
    cache = model.new_cache(2)
    model.decode(torch.randint(50, (2, 9)), cache, random_neighbours(2, 2))
    held = list(cache.neighbours.values())
    assert len(held) == 2 and all(x is not None and x.value is None for x in held)
    assert held[0].key.data_ptr() == held[1].key.data_ptr()
    assert held[0].key.untyped_storage().nbytes() == held[0].key.numel() * 4  # and no other chunk's memory


def set_projection(model: Retro, projection: str) -> None:
    for layer in model.modules():
        if isinstance(layer, ChunkedCrossAttention):
            layer.projection = projection


class Quantised(torch.Tensor):
    """A weight as torchao has them: the layer's type stays, and the product is the tensor's own."""

    _rounded: torch.Tensor

    @staticmethod
    def __new__(cls, weight: torch.Tensor) -> Quantised:
        made = torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)
        made._rounded = (8 * weight).round().char()
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["_rounded"], None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function is torch.nn.functional.linear:
            x, weight = args[:2]
            return x @ (weight._rounded.to(x.dtype) / 8).T
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{function} of a quantised weight")


def quantise(layer: torch.nn.Linear) -> None:
    layer.weight = torch.nn.Parameter(Quantised(layer.weight.detach()), requires_grad=False)


def test_what_the_weights_do_not_tell_is_not_absorbed(seed: int) -> None:
    sizes = dict(head_dim=256, encoder_dim=64, num_kv_heads=4)  # where absorbing pays
    assert make("auto", **sizes).absorbs(2, torch.device("cpu"), training=True)
    hooked, parametrised, replaced, wrapped, quantised = (make("auto", **sizes) for _ in range(5))
    hooked.k_proj.register_forward_hook(lambda module, inputs, output: 2 * output)
    torch.nn.utils.parametrizations.weight_norm(parametrised.v_proj)
    replaced.k_proj = torch.nn.Sequential(replaced.k_proj, torch.nn.Tanh())
    forward = wrapped.v_proj.forward
    wrapped.v_proj.forward = lambda states: 2 * forward(states)  # type: ignore[method-assign]
    quantise(quantised.k_proj)
    x, neighbours = torch.randn(1, 9, 12).double(), torch.randn(1, 2, 2, 8, 64).double()
    for module in (hooked, parametrised, replaced, wrapped, quantised):
        assert not module.absorbs(2, torch.device("cpu"), training=True)
        out, module.projection = module(x, neighbours), "materialised"
        assert torch.equal(out, module(x, neighbours))
        module.projection = "absorbed"
        with pytest.raises(ValueError, match="was replaced, parametrised, quantised or has hooks"):
            module.absorbs(2, torch.device("cpu"))
    with pytest.raises(ValueError, match="projection is 'both'"):
        make("both")


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_hooks_of_the_backward_pass_are_called(kind: str, seed: int) -> None:
    cca, seen = make("auto", head_dim=256, encoder_dim=64, num_kv_heads=4), []
    assert cca.absorbs(2, torch.device("cpu"), training=True)
    handle = getattr(cca.k_proj, kind)(lambda *given: seen.append(given))
    cca(torch.randn(1, 9, 12).double(), torch.randn(1, 2, 2, 8, 64).double()).sum().backward()
    assert len(seen) == 1
    handle.remove()
    assert cca.absorbs(2, torch.device("cpu"), training=True)


def test_the_choice_is_told_whether_there_are_gradients(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, cca = [], make("auto")
    choose = attention_module.choose_projection
    monkeypatch.setattr(
        attention_module,
        "choose_projection",
        lambda **given: asked.append(given["training"]) or choose(**given),
    )
    x, neighbours = torch.randn(1, 9, 12).double(), torch.randn(1, 2, 2, 8, 10).double()
    cca(x, neighbours)
    with torch.no_grad():
        cca(x, neighbours)
    assert asked == [True, False]
