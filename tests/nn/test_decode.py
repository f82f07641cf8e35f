"""Decoding: however a sequence is cut into calls, the logits are those of the full pass."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from retro_kernels import InputError, Retro
from retro_kernels.nn import attention as attention_module
from retro_kernels.nn.cache import SelfAttentionCache
from retro_kernels.ops import NeighbourBatch

from .helpers import TINY, random_neighbours, randomise, tiny_model

M = TINY.chunk_size


def decode(
    model: Retro,
    x: torch.Tensor,
    neighbours: NeighbourBatch | None,
    split: list[int],
    off: tuple[int, ...] = (),
) -> torch.Tensor:
    cache, parts, done = model.new_cache(x.shape[0]), [], 0
    for count in split:
        first, last = done // M, (done + count) // M
        found = None
        if neighbours is not None and not set(off) & set(range(first, last)):
            found = NeighbourBatch(neighbours.tokens[:, first:last], neighbours.lengths[:, first:last])
        parts.append(model.decode(x[:, done : done + count], cache, found))
        done += count
    assert cache.length == done == x.shape[1]
    return torch.cat(parts, 1)


def random_split(total: int) -> list[int]:
    split = []
    while sum(split) < total:
        split.append(random.randint(1, min(total - sum(split), random.choice((1, 3, 9)))))
    return split


@pytest.mark.parametrize("self_attention", ["relative", "rotary"])
@pytest.mark.parametrize("position", ["relative", "bias", "none"])
def test_any_split_is_the_full_pass(seed: int, self_attention: str, position: str) -> None:
    model = tiny_model(torch.float32, self_attention=self_attention, cca_position=position)
    x, neighbours = torch.randint(50, (2, 22)), random_neighbours(2, 5)
    full = model(x, neighbours)
    for split in ([22], [1] * 22, [M] * 5 + [2], random_split(22), random_split(22)):
        torch.testing.assert_close(
            decode(model, x, neighbours, split), full, rtol=1e-4, atol=1e-4, msg=f"{split}"
        )


def test_splits_in_double_precision(seed: int) -> None:
    model = tiny_model()
    x, neighbours = torch.randint(50, (2, 70)), random_neighbours(2, 17)
    full = model(x, neighbours)
    split = random_split(70)
    torch.testing.assert_close(
        decode(model, x, neighbours, split), full, rtol=1e-5, atol=1e-5, msg=f"{split}"
    )


def test_off_for_some_chunks(seed: int) -> None:
    model = tiny_model()
    x, neighbours = torch.randint(50, (2, 22)), random_neighbours(2, 5, full=True)
    torch.testing.assert_close(decode(model, x, None, random_split(22)), model(x), rtol=1e-5, atol=1e-5)
    missing = neighbours._replace(lengths=neighbours.lengths.clone())
    missing.lengths[:, 2] = 0
    torch.testing.assert_close(
        decode(model, x, neighbours, [1] * 22, (2,)), model(x, missing), rtol=1e-5, atol=1e-5
    )


def test_of_more_chunks_than_there_are_the_first_count(seed: int) -> None:
    model, x, neighbours = tiny_model(), torch.randint(50, (2, 22)), random_neighbours(2, 7)
    first = NeighbourBatch(neighbours.tokens[:, :5], neighbours.lengths[:, :5])
    assert torch.equal(model(x, neighbours), model(x, first))


def test_short_prompts_have_no_neighbours(seed: int) -> None:
    model = tiny_model()
    x = torch.randint(50, (1, M - 1))
    torch.testing.assert_close(decode(model, x, None, [M - 1]), model(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="hold 1 chunks"):
        model.decode(x, model.new_cache(1), random_neighbours(1, 1))


def test_number_of_neighbours_may_change(seed: int) -> None:
    model, cache = tiny_model(), None
    x = torch.randint(50, (1, 12))
    five, two = random_neighbours(1, 1, 5), random_neighbours(1, 1, 2)
    cache = model.new_cache(1)
    parts = [
        model.decode(x[:, :5], cache, five),
        model.decode(x[:, 5:10], cache, two),
        model.decode(x[:, 10:], cache),
    ]
    padded = NeighbourBatch(
        torch.zeros(1, 3, 5, 8, dtype=torch.int64), torch.zeros(1, 3, 5, dtype=torch.int32)
    )
    padded.tokens[:, 0], padded.lengths[:, 0] = five.tokens[:, 0], five.lengths[:, 0]
    padded.tokens[:, 1, :2], padded.lengths[:, 1, :2] = two.tokens[:, 0], two.lengths[:, 0]
    torch.testing.assert_close(torch.cat(parts, 1), model(x, padded), rtol=1e-5, atol=1e-5)


def test_no_more_is_kept_than_is_needed(seed: int) -> None:
    """Of a long prompt the tokens since its last chunk and that chunk's neighbours, not all that came with them."""
    model = tiny_model()
    cache = model.new_cache(2)
    model.decode(torch.randint(50, (2, 22)), cache, random_neighbours(2, 5))
    kept = [cache.conditioning]
    for near in cache.neighbours.values():
        assert near is not None
        kept += [near.key, near.value, near.lengths]
    for tensor in kept:
        if tensor is not None:
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size() > 0
    keys, places = SelfAttentionCache(), set()
    for _ in range(1000):
        held, _ = keys.append(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
        places.add(held.data_ptr())
    assert len(places) <= 5  # 64, 128, … 1,024: copied a few times, not for each token


class Copies(TorchDispatchMode):
    """The largest tensor that an operation copies."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default):
            self.largest = max(self.largest, out.numel())
        return out


def test_a_token_copies_no_keys_of_the_tokens_before(seed: int) -> None:
    """Neither the cache nor, for each sequence, the keys of distances: it reads them where they lie."""
    model = randomise(Retro(TINY)).eval()
    x, cache = torch.randint(1, TINY.vocab_size, (3, 150)), model.new_cache(3)
    model.decode(x, cache)
    with Copies() as copies:
        model.decode(x[:, :1], cache)
    assert copies.largest < 150 * TINY.num_heads * TINY.head_dim


def test_a_token_costs_a_token(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between chunk boundaries no matrix product of a layer, and no attention to neighbours, sees more rows than the
    call has tokens; at a boundary the neighbours are encoded and projected once."""
    model = randomise(Retro(TINY)).eval()
    rows: list[int] = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, args, out: rows.append(out.numel() // out.shape[-1]))
    attended: list[tuple[str, int]] = []

    def watched(name: str) -> Callable[..., torch.Tensor]:
        op = getattr(attention_module, name)
        return lambda query, *given, **options: (
            attended.append((name, query.shape[1])) or op(query, *given, **options)
        )

    for name in ("absorbed_decode", "chunked_cross_attention_decode", "block_attention"):
        monkeypatch.setattr(attention_module, name, watched(name))
    encoded = []
    model.encoder.register_forward_hook(lambda *_: encoded.append(1))
    cache = model.new_cache(1)
    model.decode(torch.randint(50, (1, M)), cache, random_neighbours(1, 1))
    rows.clear()
    attended.clear()
    for _ in range(M - 1):
        model.decode(torch.randint(50, (1, 1)), cache, None)
        assert set(rows) == {1}
        assert {row for _, row in attended} == {1} and "block_attention" not in dict(attended)
        rows.clear()
        attended.clear()
    assert len(encoded) == 1
    model.decode(torch.randint(50, (1, 1)), cache, random_neighbours(1, 1))
    assert len(encoded) == 2


def test_hooks_of_a_layer_are_called(seed: int) -> None:
    model, x, neighbours = tiny_model(), torch.randint(50, (2, 11)), random_neighbours(2, 2)
    for layer in model.layers:
        layer.register_forward_hook(lambda layer, given, result: (1.5 * result[0], result[1]))
    got = decode(model, x, neighbours, random_split(11))
    torch.testing.assert_close(got, model(x, neighbours))


def test_what_begins_in_inference_mode_goes_on_outside(seed: int) -> None:
    model, x = tiny_model(torch.float32), torch.randint(50, (1, 7))
    cache = model.new_cache(1)
    with torch.inference_mode():
        model.decode(x[:, :5], cache)
    torch.testing.assert_close(model.decode(x[:, 5:], cache), model(x)[:, 5:], rtol=1e-4, atol=1e-4)


def test_a_refused_call_leaves_the_cache_alone(seed: int) -> None:
    model = tiny_model()
    x, neighbours = torch.randint(50, (2, 6)), random_neighbours(2, 1)
    cache = model.new_cache(2)
    for bad in (x[:1], x[:, :0]):
        with pytest.raises(InputError, match=r"\[2, T\]"):
            model.decode(bad, cache)
    with pytest.raises(InputError, match="must be"):
        model.decode(x, cache, NeighbourBatch(neighbours.tokens[..., :3], neighbours.lengths))
    torch.testing.assert_close(model.decode(x, cache, neighbours), model(x, neighbours), rtol=1e-5, atol=1e-5)
