"""Pretrained models of transformers with retrieval added: each kind of layer, from small random weights."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from retro_kernels import InputError, NeighbourBatch, RetroFitted
from retro_kernels.config import default_cca_layers
from retro_kernels.nn.retrofit import load_base

from .test_projection import quantise

transformers = pytest.importorskip("transformers")

M, R, V, LAYERS = 4, 8, 61, 4
COMMON: dict[str, Any] = dict(
    vocab_size=V,
    hidden_size=32,
    num_hidden_layers=LAYERS,
    num_attention_heads=2,
    intermediate_size=48,
    max_position_embeddings=128,
    bos_token_id=0,
    eos_token_id=0,
)
GPT2: dict[str, Any] = dict(
    vocab_size=V, n_embd=32, n_layer=LAYERS, n_head=2, n_positions=128, bos_token_id=0, eos_token_id=0
)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("GPT2", GPT2),
    "Llama, grouped heads": ("Llama", COMMON | {"num_key_value_heads": 1}),
    "Qwen2": ("Qwen2", COMMON | {"num_key_value_heads": 1}),
    "Mistral, sliding window": ("Mistral", COMMON | {"num_key_value_heads": 1, "sliding_window": 6}),
    "Gemma2, norm behind attention": (
        "Gemma2",
        COMMON | {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 6},
    ),
    "OPT": ("OPT", COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 0}),
    "GPT-NeoX, side by side": ("GPTNeoX", COMMON | {"use_parallel_residual": True}),
    "GPT-NeoX, one after another": ("GPTNeoX", COMMON | {"use_parallel_residual": False}),
    "GPT-J": ("GPTJ", GPT2 | {"rotary_dim": 8}),
    "Phi, one dropout for both": ("Phi", COMMON),
    "Falcon, sums in place": ("Falcon", {k: v for k, v in COMMON.items() if k != "intermediate_size"}),
    "Granite, attention scaled": (
        "Granite",
        COMMON | {"num_key_value_heads": 1, "residual_multiplier": 0.22, "embedding_multiplier": 3.0},
    ),
    "Gemma4, heads of two sizes": (
        "Gemma4Text",
        COMMON
        | {"num_key_value_heads": 1, "head_dim": 16, "global_head_dim": 32, "sliding_window": 6}
        | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": V, "num_kv_shared_layers": 0},
    ),
}
SIDE_BY_SIDE = {"GPT-NeoX, side by side", "GPT-J", "Phi, one dropout for both", "Falcon, sums in place"}
all_kinds = pytest.mark.parametrize("kind", KINDS)


def base_model(kind: str = "GPT-2", **changes: Any) -> Any:
    name, sizes = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**{**sizes, **changes})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def fitted(base: Any, filled: bool = True, **changes: Any) -> RetroFitted:
    """`filled`: as if trained, so that neighbours have an effect."""
    model = RetroFitted(base, chunk_size=M, neighbour_len=R, **changes).eval()
    for layer in model.added.values() if filled else ():
        torch.nn.init.normal_(layer["cca"].o_proj.weight, std=0.3)
    return model


def random_input(tokens: int = 14) -> tuple[torch.Tensor, NeighbourBatch]:
    chunks = tokens // M
    lengths = torch.randint(1, R + 1, (2, chunks, 2))
    return torch.randint(1, V, (2, tokens)), NeighbourBatch(torch.randint(1, V, (2, chunks, 2, R)), lengths)


@all_kinds
def test_starts_as_the_base_and_stays_it_without_neighbours(seed: int, kind: str) -> None:
    base = base_model(kind)
    x, neighbours = random_input()
    before = base(x).logits
    with torch.autocast("cpu", torch.bfloat16):  # is for its calls, not for what is found out at the start
        model = fitted(base, filled=False)
    assert model.config.cca_layers == (2, 4)
    assert torch.equal(model(x, neighbours), before)  # step 0
    torch.nn.init.normal_(model.added["2"]["cca"].o_proj.weight)
    assert not torch.equal(model(x, neighbours), before)
    assert torch.equal(model(x), before) and torch.equal(base(x).logits, before)  # no hook is left behind
    nobody = neighbours._replace(lengths=torch.zeros_like(neighbours.lengths))
    assert torch.equal(model(x, nobody), before)


@all_kinds
def test_reach_of_a_chunks_neighbours(seed: int, kind: str) -> None:
    """A chunk's last token is the first that its neighbours reach; nothing later in the text reaches back."""
    model = fitted(base_model(kind).double())
    x, neighbours = random_input()
    logits = model(x, neighbours)
    assert torch.equal(logits[:, : M - 1], model(x)[:, : M - 1])
    for u in range(3):
        tokens = neighbours.tokens.clone()
        tokens[:, u, :, 0] = tokens[:, u, :, 0] % (V - 1) + 1
        other = model(x, neighbours._replace(tokens=tokens))
        first = (u + 1) * M - 1
        assert torch.equal(other[:, :first], logits[:, :first])
        assert not torch.isclose(other[:, first], logits[:, first], rtol=0, atol=1e-12).all(-1).any()
    for t in (M - 1, 9):
        changed = x.clone()
        changed[:, t] = changed[:, t] % (V - 1) + 1
        torch.testing.assert_close(model(changed, neighbours)[:, :t], logits[:, :t])
    short, found = (
        x[:, :9],
        neighbours._replace(tokens=neighbours.tokens[:, :2], lengths=neighbours.lengths[:, :2]),
    )
    torch.testing.assert_close(model(short, found), logits[:, :9])


@all_kinds
def test_any_split_into_decoding_steps_is_one_pass(seed: int, kind: str) -> None:
    model = fitted(base_model(kind).double())
    model.base.config.use_cache = False  # as one sets it to train
    x, neighbours = random_input(22)
    whole = model(x, neighbours)
    cache, parts, start = model.new_cache(2), [], 0
    for count in (3, 1, 1, 6, 1, 1, 4, 5):
        chunks = slice(start // M, (start + count) // M)
        found = neighbours._replace(
            tokens=neighbours.tokens[:, chunks], lengths=neighbours.lengths[:, chunks]
        )
        parts.append(model.decode(x[:, start : start + count], cache, found))
        start += count
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    off = model.new_cache(2)
    torch.testing.assert_close(model.decode(x, off), model(x))


@all_kinds
def test_stands_behind_self_attention(seed: int, kind: str) -> None:
    """CCA reads the layer's input plus its attention; that and no later state conditions the encoder; and the
    feed-forward network of the layer reads the sum, except where both stand side by side."""
    base = base_model(kind)
    model = fitted(base)
    layer, norm = model._layers[2], model.added["2"]["cca_norm"]
    x, neighbours = random_input()
    seen: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            seen[name] = (given, output[0] if isinstance(output, tuple) else output)

        return hook

    attention = next(
        part
        for name, part in layer.named_children()
        if name in ("attn", "attention", "self_attn", "self_attention")
    )
    behind = getattr(layer, "post_attention_layernorm", None) if "Gemma" in kind else attention
    feed = {
        "OPT": "final_layer_norm",
        "Gemma2": "pre_feedforward_layernorm",
        "Gemma4": "pre_feedforward_layernorm",
        "Falcon": "input_layernorm",
        "GPT-2": "ln_2",
        "GPT-J": "ln_1",
        "Phi": "input_layernorm",
    }
    before = getattr(layer, feed.get(kind.split(",")[0], "post_attention_layernorm"))
    parts = dict(layer=layer, behind=behind, norm=norm, before=before, cca=model.added["2"]["cca"])
    for name, part in parts.items():
        part.register_forward_hook(keep(name), with_kwargs=True)
    model.encoder.register_forward_hook(lambda module, args, output: seen.update(encoder=args[1]))
    model(x, neighbours)
    scale = getattr(layer, "residual_multiplier", 1.0)
    state = seen["layer"][0] + seen["behind"][1] * scale  # this hook runs before those of the call
    torch.testing.assert_close(seen["norm"][0], state)
    read = seen["layer"][0] if kind in SIDE_BY_SIDE else state + seen["cca"][1]
    torch.testing.assert_close(seen["before"][0].view_as(read), read)
    torch.testing.assert_close(seen["encoder"], state[:, : 3 * M].unflatten(1, (3, M)))


@pytest.mark.parametrize("freeze", [True, False])
def test_learns_to_copy_from_neighbours(seed: int, freeze: bool) -> None:
    """Random text that nothing but its neighbours foretells. Frozen, the base gets no gradient and stays as it is."""
    letters, size = 6, 3 * M
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": False}
    base = base_model("GPT-2", n_layer=2, vocab_size=letters, **quiet)
    for module in (base.get_input_embeddings(), base.lm_head):
        torch.nn.init.normal_(module.weight, std=0.3)
    kept = copy.deepcopy(base.state_dict())
    model = RetroFitted(base, chunk_size=M, neighbour_len=R, encoder_layers=1, freeze=freeze).train()
    added = {id(p) for name, p in model.named_parameters() if not name.startswith("base.")}
    assert ({id(p) for p in model.trainable_parameters()} == added) == freeze
    optimiser = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2)
    lengths = torch.tensor([R, R, 0]).expand(16, 3)[..., None]
    losses = []
    for _ in range(45):
        x = torch.randint(letters, (16, size + 1))
        # a chunk's neighbour is the chunk with its continuation
        tokens = torch.stack([x[:, :R], x[:, M : M + R], x[:, :R]], 1)[:, :, None]
        logits = model(x[:, :-1], NeighbourBatch(tokens, lengths))
        loss = F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert all(torch.equal(value, kept[name]) for name, value in base.state_dict().items()) == freeze
    assert losses[-1] < min(losses[0], math.log(letters)) - 0.2


def test_every_added_weight_gets_a_gradient(seed: int) -> None:
    model = fitted(base_model("Llama, grouped heads"))
    x, neighbours = random_input()
    model(x, neighbours).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("base."):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("asked", ["of the model", "of the base"])
@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("kind", ["GPT-2", "Llama, grouped heads", "GPT-NeoX, side by side"])
def test_gradient_checkpointing_changes_nothing_but_memory(
    seed: int, kind: str, freeze: bool, asked: str
) -> None:
    """Layers run again in the backward pass, with what is added to them; several passes may wait for theirs."""
    model = fitted(base_model(kind), freeze=freeze, cca_layers=(1, 2, 4), bos_id=3).train()
    inputs = [random_input() for _ in range(2)]
    inputs[1] = (inputs[1][0], None)
    parameters, calls, results = model.trainable_parameters(), [0] * LAYERS, []
    for number, site in model._sites.items():
        site.module.register_forward_hook(
            lambda *_, number=number: calls.__setitem__(number - 1, calls[number - 1] + 1)
        )
    for on in (False, True):
        if asked == "of the model":
            model.gradient_checkpointing = on
        elif on:
            model.base.gradient_checkpointing_enable()
        torch.manual_seed(seed)  # of the dropout
        calls[:] = [0] * LAYERS
        logits = [model(*each) for each in inputs[: 1 if freeze else 2]]
        passes = len(logits)
        gradients = torch.autograd.grad(sum(y.logsumexp(-1).sum() for y in logits), parameters)
        assert calls == ([2 * passes - 1, 2 * passes, 0, 2 * passes] if on else [passes, passes, 0, passes])
        results.append((*logits, *gradients))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_bases_cache_by_its_name_before_and_since_transformers_5_24(seed: int, name: str) -> None:
    model, (x, neighbours) = fitted(base_model()), random_input()
    once = model.decode(x, model.new_cache(2), neighbours)
    original = model.base.forward
    real = "cache" if "cache" in inspect.signature(original).parameters else "past_key_values"

    def forward(*args: Any, **options: Any) -> Any:
        assert not {"past_key_values", "cache"} & set(options) - {name}
        given = {real: options.pop(name)} if name in options else {}
        result = original(*args, **options, **given)
        return SimpleNamespace(logits=result.logits, **{name: getattr(result, real)})

    model.base.forward = forward
    cache = model.new_cache(2)
    first = model.decode(
        x[:, :5],
        cache,
        neighbours._replace(tokens=neighbours.tokens[:, :1], lengths=neighbours.lengths[:, :1]),
    )
    rest = neighbours._replace(tokens=neighbours.tokens[:, 1:], lengths=neighbours.lengths[:, 1:])
    torch.testing.assert_close(torch.cat((first, model.decode(x[:, 5:], cache, rest)), 1), once)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_decoding_keeps_its_cache_where_layers_are_recomputed(seed: int) -> None:
    """The base's own way would take it away in training mode."""
    model = fitted(base_model("Llama, grouped heads").double())
    model.base.gradient_checkpointing_enable()
    x, neighbours = random_input()
    cache = model.train().new_cache(2)
    parts = [model.decode(x[:, :3], cache), model.decode(x[:, 3:], cache, neighbours)]
    torch.testing.assert_close(torch.cat(parts, 1), model.eval()(x, neighbours))
    assert model.base.is_gradient_checkpointing  # as it was


def test_compiled_it_is_the_same(seed: int) -> None:
    """Not the base alone, which is what a compiler sees that knows nothing of what is added while a layer runs."""
    model, (x, neighbours) = fitted(base_model(), freeze=False), random_input()
    compiled = torch.compile(model)
    assert not torch.allclose(model(x, neighbours), model(x))
    for given in (neighbours, None, neighbours):
        assert torch.equal(compiled(x, given), model(x, given))
    compiled(x, neighbours).sum().backward()
    assert all(layer["cca"].o_proj.weight.grad.any() for layer in model.added.values())
    with pytest.raises(InputError, match="the base is compiled"):
        fitted(torch.compile(base_model()))
    model.base.compile()
    with pytest.raises(InputError, match="the base is compiled"):
        model(x, neighbours)


def test_threads_take_turns(seed: int) -> None:
    """What is added to the base's layers while one thread calls it, another thread's call does not see."""
    base = base_model()
    x, neighbours = random_input()
    models = [fitted(base), fitted(base)]
    with torch.no_grad():
        calls = [functools.partial(model, x, found) for model in models for found in (None, neighbours)]
        wanted = [call() for call in calls]

        def repeat(number: int) -> bool:
            with torch.no_grad():
                return all(torch.equal(calls[number](), wanted[number]) for _ in range(30))

        with ThreadPoolExecutor(len(calls)) as threads:
            assert all(threads.map(repeat, range(len(calls))))


def test_end_of_text_and_zero_are_exchanged(seed: int) -> None:
    """With pad_id, tokens, neighbours and logits call the base's end of text 0, and its 0 pad_id."""
    base, end = base_model(), 57
    plain, model = fitted(base), RetroFitted(base, chunk_size=M, neighbour_len=R, pad_id=end).eval()
    model.load_state_dict(plain.state_dict())
    x, neighbours = random_input()
    x[:, 2], neighbours.tokens[..., 3] = 0, end
    order = torch.arange(V)
    order[[0, end]] = torch.tensor([end, 0])
    theirs = neighbours._replace(tokens=order[neighbours.tokens])
    assert torch.equal(model(x, neighbours), plain(order[x], theirs)[..., order])
    assert torch.equal(model(x), base(order[x]).logits[..., order])
    narrow = neighbours._replace(tokens=neighbours.tokens.to(torch.uint16))
    assert torch.equal(model(x.to(torch.uint8), narrow), model(x, neighbours))
    model(x, neighbours).sum().backward()


class _Made(TorchDispatchMode):
    """Counts the tensors made with at least `size` elements; views are none."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        if isinstance(made, torch.Tensor) and made.numel() >= self.size:
            self.count += made.untyped_storage().data_ptr() not in given
        return made


@pytest.mark.parametrize("kept", [0, 3])
@pytest.mark.parametrize("bos", [None, 5])
def test_gradients_of_logits_in_our_ids(seed: int, bos: int | None, kept: int) -> None:
    """Those of the base's logits, moved with them; all are copied once, and once more where one comes before them."""
    base, end = base_model("Llama, grouped heads").double(), 57
    model = fitted(base, bos_id=bos, pad_id=end, freeze=False)
    x = torch.randint(1, V, (64, 14))
    x[0, 0], x[:, 5] = 0, end
    order = torch.arange(V)
    order[[0, end]] = torch.tensor([end, 0])
    lead = x.new_full((64, int(bos is not None)), bos or 0)
    theirs = base(torch.cat((lead, order[x]), 1)).logits[..., order]
    if bos is not None:
        first = torch.where(x[:, :1, None] == 0, theirs[:, :1], theirs[:, 1:2])
        theirs = torch.cat((first, theirs[:, 2:]), 1)
    theirs = theirs[:, -kept:]
    given = torch.randn_like(theirs)
    before, weights = given.clone(), list(base.parameters())
    expected = torch.autograd.grad(theirs, weights, given)
    logits = model(x, logits_to_keep=kept)
    torch.testing.assert_close(logits, theirs)
    torch.testing.assert_close(torch.autograd.grad(logits, weights, given), expected)
    assert torch.equal(given, before)
    logits = model(x)
    given = torch.randn_like(logits)
    with _Made(logits.numel()) as copies:
        torch.autograd.grad(logits, base.lm_head.weight, given)
    assert copies.count == (1 if bos is None else 2)


@all_kinds
def test_token_before_every_text(seed: int, kind: str) -> None:
    """The base reads it, and chunks, neighbours, logits and caches do not count it."""
    base, bos, end = base_model(kind).double(), 5, 57
    model = fitted(base, bos_id=bos, pad_id=end)
    x, neighbours = random_input(22)
    x[x == end] = 1
    lead = torch.full((2, 1), bos)
    off = base(torch.cat((lead, x), 1)).logits[:, 1:]
    off[..., [0, end]] = off[..., [end, 0]]
    assert torch.equal(model(x), off)
    whole = model(x, neighbours)
    assert torch.equal(whole[:, : M - 1], off[:, : M - 1])
    assert not torch.isclose(whole[:, M - 1], off[:, M - 1], rtol=0, atol=1e-12).all(-1).any()
    changed = x.clone()
    changed[:, 9] = changed[:, 9] % (end - 1) + 1
    torch.testing.assert_close(model(changed, neighbours)[:, :9], whole[:, :9])
    assert torch.equal(model(x, neighbours, attention_mask=torch.ones_like(x, dtype=torch.bool)), whole)
    for split in ([22], [1] * 22, [3, 1, 6, 12]):
        cache, parts, start = model.new_cache(2), [], 0
        for count in split:
            found = NeighbourBatch(*(y[:, start // M : (start + count) // M] for y in neighbours[:2]))
            parts.append(model.decode(x[:, start : start + count], cache, found))
            start += count
        torch.testing.assert_close(torch.cat(parts, 1), whole)
    x[0, 0] = 0  # the end of the text before: what follows is the beginning
    first = base(lead).logits[0, 0]
    first[[0, end]] = first[[end, 0]]
    torch.testing.assert_close(model(x)[0, 0], first)
    torch.testing.assert_close(model.decode(x[:1, :1], model.new_cache(1))[0, 0], first)
    torch.testing.assert_close(model(x)[1], off[1])
    model(x, neighbours).sum().backward()


@all_kinds
@pytest.mark.parametrize("bos", [None, 5])
def test_logits_of_the_last_tokens_alone(
    seed: int, kind: str, bos: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the base makes no others, or makes them all whatever it is asked for."""
    base = base_model(kind).double()
    x, neighbours = random_input(22)
    x[0, 0] = 0
    models, forward, read = [fitted(base, bos_id=bos, pad_id=57)], base.forward, []
    with monkeypatch.context() as without:
        without.setattr(base, "forward", lambda *args, **kwargs: forward(*args, **kwargs))
        models.append(fitted(base, bos_id=bos, pad_id=57))
    models[1].load_state_dict(models[0].state_dict())
    watched = base.get_output_embeddings()
    watched.register_forward_hook(lambda module, args, output: read.append(output.shape[1]))
    for model, made in zip(models, (3, 22 + (bos is not None)), strict=True):
        for given in (None, neighbours):
            for count in (3, 22, 30):
                whole = model(x, given)
                read.clear()
                torch.testing.assert_close(model(x, given, logits_to_keep=count), whole[:, -count:])
                assert read[0] == (made if count == 3 else 22 + (bos is not None))
        cache = model.new_cache(2)
        begun = model.decode(
            x[:, :9], cache, NeighbourBatch(*(y[:, :2] for y in neighbours[:2])), logits_to_keep=1
        )
        torch.testing.assert_close(begun, whole[:, 8:9])
        rest = model.decode(
            x[:, 9:], cache, NeighbourBatch(*(y[:, 2:] for y in neighbours[:2])), logits_to_keep=2
        )
        torch.testing.assert_close(rest, whole[:, -2:])
    with pytest.raises(InputError, match="logits_to_keep is -1"):
        model(x, neighbours, logits_to_keep=-1)


@pytest.mark.parametrize("kind", ["GPT-2", "Llama, grouped heads", "Gemma2, norm behind attention"])
def test_what_is_added_may_be_wider(seed: int, tmp_path: Path, kind: str) -> None:
    """A base in bfloat16 and float32 beside it, with autocast and without, saved and loaded; the base's positions
    keep their precision."""
    base_model(kind).save_pretrained(tmp_path / "base")
    load = transformers.AutoModelForCausalLM.from_pretrained
    base = load(tmp_path / "base", dtype=torch.bfloat16)
    model = fitted(base)
    model.added.float(), model.encoder.float()
    x, neighbours = random_input()
    model.save_pretrained(tmp_path / "fitted")
    again = RetroFitted.from_pretrained(tmp_path / "fitted")
    given = RetroFitted.from_pretrained(
        tmp_path / "fitted", base=load(tmp_path / "base", dtype=torch.bfloat16)
    )
    narrow = RetroFitted.from_pretrained(tmp_path / "fitted", dtype=torch.bfloat16)
    cast = RetroFitted.from_pretrained(
        tmp_path / "fitted", base=load(tmp_path / "base"), dtype=torch.bfloat16
    )
    assert {p.dtype for p in (*narrow.parameters(), *cast.parameters())} == {torch.bfloat16}
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            on, off = model(x, neighbours), base(x).logits
            assert on.dtype == off.dtype == torch.bfloat16 and not torch.equal(on, off)
            for other in (again, given):
                assert torch.equal(other(x, neighbours), on)
            for other in (again, given, narrow, cast):
                assert torch.equal(other(x), off)
                assert other(x, neighbours).isfinite().all()
            assert model.decode(x, model.new_cache(2), neighbours).dtype == torch.bfloat16
    model(x, neighbours).float().logsumexp(-1).sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in model.trainable_parameters())


def test_padding(seed: int) -> None:
    """On the right it changes nothing, with a mask or without; on the left it is refused."""
    model = fitted(base_model("Qwen2").double())
    x, neighbours = random_input()
    logits, mask = model(x, neighbours), torch.ones_like(x)
    mask[1, 9:] = 0
    for given in (mask, None):
        padded = model(x.where(mask > 0, 0), neighbours, attention_mask=given)
        torch.testing.assert_close(padded[1, :9], logits[1, :9])
        torch.testing.assert_close(padded[0], logits[0])
    with pytest.raises(InputError, match="pad on the right"):
        model(x, neighbours, attention_mask=mask.flip(1))
    for found in (neighbours, None):
        with pytest.raises(InputError, match=r"attention_mask is \[2, 9\]; it must be \[B, N\] = \[2, 14\]"):
            model(x, found, attention_mask=mask[:, :9])


def test_added_heads_are_as_wide_as_those_of_the_base() -> None:
    config = fitted(base_model("Gemma2, norm behind attention", head_dim=24)).config
    assert config.head_dim == config.encoder_head_dim == 24


@pytest.mark.parametrize("freeze", [True, False])
def test_round_trip(seed: int, tmp_path: Path, freeze: bool) -> None:
    """What was added alone, with the base by name; a base that was trained too goes along."""
    base_model().save_pretrained(tmp_path / "base model")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base model")
    model = fitted(base, freeze=freeze, cca_layers=(3,), encoder_dim=24, encoder_layers=1)
    if not freeze:
        torch.nn.init.normal_(base.lm_head.weight)
    model.save_pretrained(tmp_path / "fitted")
    assert (tmp_path / "fitted" / "base").exists() != freeze
    x, neighbours = random_input()
    drawn = torch.get_rng_state()
    again = RetroFitted.from_pretrained(tmp_path / "fitted")
    assert torch.equal(torch.get_rng_state(), drawn)  # no weight at random, to be replaced
    assert not any(value.is_meta for value in (*again.parameters(), *again.buffers()))
    assert not again.training and again.config == model.config
    assert torch.equal(again(x, neighbours), model(x, neighbours))
    assert len(again.trainable_parameters()) == len(model.trainable_parameters())
    other = copy.deepcopy(base).bfloat16()

    def masked(_: Any, states: Any) -> Any:  # as by a base that makes a mask where tensors are made unasked
        return states[0] + torch.zeros(1, dtype=torch.bfloat16), *states[1:]

    other.transformer.h[0].register_forward_pre_hook(masked)
    given = RetroFitted.from_pretrained(
        tmp_path / "fitted", base=other, dtype=torch.bfloat16, backend="reference"
    )
    assert {p.dtype for p in given.parameters()} == {torch.bfloat16}
    assert {part.backend for part in given.modules() if hasattr(part, "backend")} == {"reference"}
    given(x, neighbours)


def test_a_trained_base_is_written_even_if_it_is_frozen_by_then(seed: int, tmp_path: Path) -> None:
    base_model().save_pretrained(tmp_path / "base model")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base model")
    model = fitted(base, freeze=False, bos_id=7)
    torch.nn.init.normal_(base.transformer.h[1].mlp.c_fc.weight)
    base.requires_grad_(False)
    x, neighbours = random_input()
    for turn in range(2):
        model.save_pretrained(tmp_path / f"fitted {turn}")
        model = RetroFitted.from_pretrained(tmp_path / f"fitted {turn}")
        assert not model.frozen and model.bos_id == 7
        assert torch.equal(model(x), base(F.pad(x, (1, 0), value=7)).logits[:, 1:])
    (tmp_path / "fitted 1" / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="the base was trained as well"):
        RetroFitted.from_pretrained(tmp_path / "fitted 1")
    assert not RetroFitted.from_pretrained(tmp_path / "fitted 1", base=tmp_path / "elsewhere").frozen


def test_a_frozen_base_takes_no_other_ones_place(seed: int, tmp_path: Path) -> None:
    """Saved where a trained base lies: that goes. But the folder that the base came from stays, whatever its name."""
    base_model().save_pretrained(tmp_path / "original")
    load = transformers.AutoModelForCausalLM.from_pretrained
    trained = fitted(load(tmp_path / "original"), freeze=False)
    torch.nn.init.normal_(trained.base.lm_head.weight)
    trained.save_pretrained(tmp_path / "run")
    frozen = fitted(load(tmp_path / "original"))
    frozen.save_pretrained(tmp_path / "run")
    x, neighbours = random_input()
    again = RetroFitted.from_pretrained(tmp_path / "run")
    assert again.frozen and torch.equal(again(x, neighbours), frozen(x, neighbours))
    assert not (tmp_path / "run" / "base").exists()

    trained.save_pretrained(tmp_path / "run")
    fitted(load(tmp_path / "run" / "base")).save_pretrained(tmp_path / "run")
    assert torch.equal(RetroFitted.from_pretrained(tmp_path / "run")(x), trained(x))

    (tmp_path / "original").rename(tmp_path / "base")
    with pytest.raises(InputError, match="is where the base came from"):
        fitted(load(tmp_path / "base"), freeze=False).save_pretrained(tmp_path)
    fitted(load(tmp_path / "base")).save_pretrained(tmp_path)
    assert (tmp_path / "base").is_dir()


def test_added_weights_that_could_not_be_read_again_are_not_written(seed: int, tmp_path: Path) -> None:
    model = fitted(base_model(), freeze=False)
    first = next(iter(model.added.values()))["cca"]
    torch.nn.utils.parametrizations.weight_norm(first.q_proj)
    with pytest.raises(InputError, match=r"has added\.\d\.cca\.q_proj\.parametrizations.* Merge or remove"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("part", ["base", "added"])
@pytest.mark.parametrize("freeze", [True, False])
def test_offloaded_weights_are_not_written(seed: int, tmp_path: Path, freeze: bool, part: str) -> None:
    model = fitted(base_model(), freeze=freeze)
    getattr(model, part).to("meta")
    with pytest.raises(InputError, match=rf"{part}\..* is on the meta device"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_quantised_base_is_named_as_any(seed: int, tmp_path: Path) -> None:
    """And takes what was trained with it before it was quantised."""
    base = base_model("Llama, grouped heads")
    model = fitted(copy.deepcopy(base))
    model.save_pretrained(tmp_path / "before")
    for layer in (part for part in base.model.modules() if isinstance(part, torch.nn.Linear)):
        quantise(layer)
    x, neighbours = random_input()
    again = RetroFitted.from_pretrained(tmp_path / "before", base=base)
    again.save_pretrained(tmp_path / "behind")
    loaded = RetroFitted.from_pretrained(tmp_path / "behind", base=base)
    assert torch.equal(loaded(x, neighbours), again(x, neighbours))
    assert not torch.equal(again(x, neighbours), model(x, neighbours))
    with pytest.raises(InputError, match="another base"):
        RetroFitted.from_pretrained(tmp_path / "behind", base=base_model("Llama, grouped heads"))


@pytest.mark.filterwarnings("ignore:FSDP")
@pytest.mark.parametrize("whole", [True, False])
def test_sharded_it_is_the_same(seed: int, whole: bool) -> None:
    """`whole`: the weights stay parameters of their modules, where else these have none."""
    model, (x, neighbours) = fitted(base_model(), freeze=False), random_input()
    wanted = model(x, neighbours)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        cpu = torch.device("cpu")
        sharded = FullyShardedDataParallel(model, use_orig_params=whole, device_id=cpu)
        torch.testing.assert_close(sharded(x, neighbours), wanted)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("freeze", [True, False])
def test_no_model_of_transformers_is_replaced(seed: int, tmp_path: Path, freeze: bool) -> None:
    for name in ("base", "other"):
        base_model().save_pretrained(tmp_path / name)
    load = transformers.AutoModelForCausalLM.from_pretrained
    base = load(tmp_path / "base")
    for name in ("base", "other"):
        before = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        with pytest.raises(InputError, match="holds a model of transformers, which would be replaced"):
            fitted(base, freeze=freeze).save_pretrained(tmp_path / name)
        assert {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} == before
    (tmp_path / "base" / "config.json").unlink()  # it is known without, as the place where the base came from
    with pytest.raises(InputError, match="holds a model of transformers"):
        fitted(base, freeze=freeze).save_pretrained(tmp_path / "base")


@pytest.mark.parametrize("damage", ["truncated", "of other sizes"])
def test_a_damaged_base(seed: int, tmp_path: Path, damage: str) -> None:
    base_model().save_pretrained(tmp_path)
    if damage == "truncated":
        weights = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    else:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "n_embd": 64}))
    with pytest.raises(InputError, match="cannot be loaded"):
        load_base(tmp_path)


def test_a_base_without_some_weights_gets_none_at_random(seed: int, tmp_path: Path) -> None:
    """As one saved without the head of a language model: each process would read another model."""
    base_model("Llama, grouped heads").model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"lacks 1 weights of a LlamaForCausalLM, such as lm_head\.weight"):
        load_base(tmp_path)


def test_another_base_is_refused(seed: int, tmp_path: Path) -> None:
    base = base_model()
    fitted(base).save_pretrained(tmp_path)

    def refused(match: str, given: Any = None) -> None:
        with pytest.raises(InputError, match=match):
            RetroFitted.from_pretrained(tmp_path, base=given)

    refused("num_layers is 4, not 3", base_model(n_layer=3))
    refused("model_type is 'gpt2', not 'llama'", base_model("Llama, grouped heads"))
    refused("another base of the same kind", base_model())
    merged = copy.deepcopy(base)
    merged.transformer.h[2].attn.c_attn.weight.data *= 1.001  # as an adapter that was merged
    refused(r"another base of the same kind: transformer\.h\.2\.attn\.c_attn\.weight differs", merged)
    RetroFitted.from_pretrained(tmp_path, base=copy.deepcopy(base).bfloat16())
    refused(
        "cannot be loaded.* as base= .train: --retrofit; eval, generate: --base", str(tmp_path / "nowhere")
    )
    config = json.loads((tmp_path / "config.json").read_text())
    config["added"]["encoder_ffn_dim"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused("does not fit", base)
    (tmp_path / "config.json").write_text(json.dumps({"dim": 3}))
    refused("names no base", base)


def test_adapters_in_the_base_are_not_forgotten(seed: int, tmp_path: Path) -> None:
    """PEFT leaves `peft_config` on what it changed. The folder that the base came from lacks them, and says nothing."""
    base_model().save_pretrained(tmp_path / "base model")
    load = transformers.AutoModelForCausalLM.from_pretrained
    plain, adapted = load(tmp_path / "base model"), load(tmp_path / "base model")
    adapted.peft_config = {"default": None}
    fitted(adapted).save_pretrained(tmp_path / "adapted")
    for given in (None, plain):
        with pytest.raises(
            InputError, match=r"had adapters \(PEFT\), and this one has none\. Give that base"
        ):
            RetroFitted.from_pretrained(tmp_path / "adapted", base=given)
    RetroFitted.from_pretrained(tmp_path / "adapted", base=adapted)
    fitted(plain).save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match=r"had no adapters \(PEFT\), and this one has some"):
        RetroFitted.from_pretrained(tmp_path / "plain", base=adapted)


def test_adapters_are_trained_without_the_base(seed: int, tmp_path: Path) -> None:
    """They alone are saved with it, so that what else was trained would be lost."""
    peft = pytest.importorskip("peft")
    base_model().save_pretrained(tmp_path / "base model")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base model")
    lora = peft.LoraConfig(target_modules=["c_attn"], r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    model, (x, neighbours) = fitted(peft.get_peft_model(base, lora), freeze=False), random_input()
    for _ in range(2):
        trained = [name for name, p in model.base.named_parameters() if p.requires_grad]
        assert len(trained) == 2 * LAYERS and all("lora_" in name for name in trained)
        model.save_pretrained(tmp_path / "fitted")
        expected, model = model(x, neighbours), RetroFitted.from_pretrained(tmp_path / "fitted")
        torch.testing.assert_close(model(x, neighbours), expected)
        assert not model.frozen


def test_the_active_adapter_is_saved_whatever_its_name(seed: int, tmp_path: Path) -> None:
    """PEFT saves each in a folder of its name, but for the one called default; transformers loads that."""
    peft = pytest.importorskip("peft")
    base_model().save_pretrained(tmp_path / "base model")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base model")
    lora = peft.LoraConfig(target_modules=["c_attn"], r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(base, lora)
    adapted.add_adapter("second", lora)
    adapted.set_adapter("second")
    model, (x, neighbours) = fitted(adapted, freeze=False), random_input()
    model.save_pretrained(tmp_path / "fitted")
    again = RetroFitted.from_pretrained(tmp_path / "fitted")
    torch.testing.assert_close(again(x, neighbours), model(x, neighbours))
    adapted.base_model.set_adapter(["default", "second"])
    with pytest.raises(InputError, match=r"2 active adapters \(default, second\), of which one"):
        model.save_pretrained(tmp_path / "both")
    assert not list(tmp_path.glob("both/*"))


def test_refuses(seed: int) -> None:
    with pytest.raises(TypeError, match="AutoModelForCausalLM"):
        RetroFitted(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="GPT2Model, which gives no logits; take .* AutoModelForCausalLM"):
        RetroFitted(base_model().transformer)(random_input()[0])
    encoder_decoder = transformers.T5Config(
        vocab_size=V, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    with pytest.raises(InputError, match="decoder-only"):
        RetroFitted(transformers.T5ForConditionalGeneration(encoder_decoder))
    bloom = transformers.BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=2)
    with pytest.raises(InputError, match="layer 1 .* cannot be fitted"):
        RetroFitted(transformers.BloomForCausalLM(bloom))
    mamba = transformers.MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(InputError, match="no decoder with attention"):
        RetroFitted(transformers.MambaForCausalLM(mamba))
    base = base_model()
    for match, changes in [
        ("those of the base", {"dim": 8}),
        ("unknown fields", {"surprise": 8}),
        ("1-based", {"cca_layers": (0,)}),
        ("cca_layers is 1; it must be layer numbers", {"cca_layers": 1}),
        ("empty", {"cca_layers": ()}),
        ("share_encoder_embedding", {"encoder_dim": 8, "share_encoder_embedding": True}),
    ]:
        with pytest.raises(InputError, match=match):
            RetroFitted(base, **changes)
    with torch.device("meta"), pytest.raises(InputError, match="meta device"):
        RetroFitted(base_model())
    model = fitted(base)
    x, neighbours = random_input()
    with pytest.raises(InputError, match=r"RetroFitted: neighbours.tokens is \[2, 3, 2, 8\]"):
        model(x[:1], neighbours)
    with pytest.raises(InputError, match="complete 3"):
        model.decode(x, model.new_cache(2), neighbours._replace(tokens=neighbours.tokens[:, :2]))
    with pytest.raises(InputError, match="bos_id is 61; it must be an id of the base, 0 to 60"):
        fitted(base, bos_id=V)
    without_cache = transformers.OpenAIGPTConfig(vocab_size=V, n_embd=32, n_layer=2, n_head=2)
    model = fitted(transformers.OpenAIGPTLMHeadModel(without_cache))
    with pytest.raises(InputError, match="OpenAIGPTLMHeadModel keeps no keys and values"):
        model.decode(x, model.new_cache(2), neighbours)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0)])
def test_an_empty_batch_is_refused(shape: tuple[int, int]) -> None:
    """On which transformers fails with a reshape."""
    batch, length = shape
    x, none = torch.zeros(shape, dtype=torch.int64), torch.zeros(batch, length // M, 2, R, dtype=torch.int64)
    model = fitted(base_model())
    for neighbours in (None, (none, None)):
        with pytest.raises(InputError, match=rf"tokens is \[{batch}, {length}\].*no empty batch"):
            model(x, neighbours)
    if not batch:
        with pytest.raises(InputError, match="no empty batch"):
            model.decode(x, model.new_cache(0))


def test_default_layers() -> None:
    """The paper's, and a rule for models too shallow for it."""
    assert default_cca_layers(12) == (6, 9, 12) and default_cca_layers(32)[-2:] == (27, 30)
    assert [default_cca_layers(n) for n in (1, 2, 4, 6, 8, 9)] == [
        (1,),
        (1, 2),
        (2, 4),
        (3, 6),
        (4, 8),
        (6, 9),
    ]


@pytest.mark.parametrize("kind", ["tuple", "list", "named tuple", "tensor"])
def test_outputs_of_every_kind_stay_what_they_are(seed: int, kind: str) -> None:
    class Attended(NamedTuple):
        states: torch.Tensor
        weights: str

    x = torch.randn(2, 4, 32)
    output: Any = {"tuple": (x, "w"), "list": [x, "w"], "named tuple": Attended(x, "w"), "tensor": x}[kind]
    model = fitted(base_model(), cca_layers=(2,))
    result = model._added(2, lambda number, norm, cca, state: torch.ones_like(state), 0, x, None, (), output)  # type: ignore[arg-type]
    assert type(result) is type(output)
    states = result if kind == "tensor" else result[0]
    assert torch.equal(states, x + 1) and (kind == "tensor" or result[1] == "w")
