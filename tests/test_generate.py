"""Generation: the cache and the retrieval at chunk boundaries against whole forward passes, and sampling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small import CHUNK, SEQUENCE, World, run
from torch.utils._python_dispatch import TorchDispatchMode

from retro_kernels import generate as module
from retro_kernels.config import InputError
from retro_kernels.generate import generate, sample
from retro_kernels.nn import RetroFitted
from retro_kernels.retrieval import Retriever
from retro_kernels.runs import load_run

PROMPTS = {"short": "lomi ka", "a chunk and a bit": "lomi kater suneka " * 6, "empty": ""}


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_greedy_text_is_that_of_whole_forward_passes(world: World, prompt: str, on: bool) -> None:
    loaded = load_run(world.run if on else world.plain)
    retriever = Retriever.from_pretrained(world.set) if on else None
    result = generate(loaded, prompt, max_tokens=24, temperature=0, ignore_end=True, device="cpu")
    tokens = loaded.tokenizer.encode(prompt)
    start = len(tokens)
    while len(tokens) < start + 24:
        context = torch.tensor([tokens or [0]])
        near = retriever(context) if retriever else None
        with torch.no_grad():
            logits = loaded.model(context, near)[0, -1]
        logits[:4] = -torch.inf
        tokens.append(int(logits.argmax()))
    assert result["text"] == loaded.tokenizer.decode(tokens[start:])
    assert result["tokens"] == 24 and not result["ended"]
    assert len(result["chunks"]) == len(tokens) // CHUNK
    expected = retriever(torch.tensor([tokens])) if retriever else None
    for u, chunk in enumerate(result["chunks"]):
        assert chunk["text"] == loaded.tokenizer.decode(tokens[u * CHUNK : (u + 1) * CHUNK])
        ids = [near["chunk"] for near in chunk["neighbours"]]
        assert ids == ([] if expected is None else [i for i in expected.ids[0, u].tolist() if i >= 0])


def test_of_a_prompt_the_last_logits_alone_are_made(world: World) -> None:
    loaded, made = load_run(world.run), []
    loaded.model.norm.register_forward_hook(lambda module, args, output: made.append(output.shape[:2]))
    generate(loaded, PROMPTS["a chunk and a bit"], max_tokens=3, ignore_end=True, device="cpu")
    assert made == [(1, 1)] * 3


def test_text_longer_than_the_window(world: World) -> None:
    """The first half is dropped on the grid of chunks; the next token is that of a forward pass over the rest."""
    loaded = load_run(world.run)
    retriever = Retriever.from_pretrained(world.set)
    reader = module._Reader(loaded, retriever, 2, torch.float32)
    text = torch.randint(4, loaded.tokenizer.vocab_size, (3 * SEQUENCE,)).tolist()
    logits, before = reader.read(text[:10]), 0
    for token in text[10:]:
        logits = reader.read([token])
        assert reader.start % CHUNK == 0 and 0 < len(reader.tokens) - reader.start <= SEQUENCE
        assert (reader.start == 0) == (
            len(reader.tokens) <= SEQUENCE
        )  # nothing is forgotten before it must be
        if reader.start != before:
            assert len(reader.tokens) - reader.start < SEQUENCE // 2 + CHUNK
        before = reader.start
    context = torch.tensor([text[reader.start :]])
    with torch.no_grad():
        expected = loaded.model(context, retriever(context))[0, -1]
    torch.testing.assert_close(logits, expected)
    near = retriever(context, num_neighbours=3)
    assert near.ids is not None
    near.ids[0, 0, 1] = -1
    assert [one.chunk for one in reader._described(near, 0)] == near.ids[0, 0, [0, 2]].tolist()
    chunks = generate(loaded, "lomi kater suneka " * 6, num_neighbours=3, max_tokens=1, device="cpu")[
        "chunks"
    ]
    assert chunks and all(len(chunk["neighbours"]) == 3 for chunk in chunks)
    loaded.settings["config"]["sequence_length"] = CHUNK  # of which half would be no chunk
    assert module._Reader(loaded, retriever, 2, torch.float32).window == 2 * CHUNK
    assert len(reader.traces) == 3 * SEQUENCE // CHUNK
    whole = module._Reader(loaded, retriever, 2, torch.float32).read(text)  # a prompt longer than the window
    assert torch.isfinite(whole).all()


@pytest.mark.parametrize("positions", [16, 17, 24, 31, 40])
def test_a_model_with_few_positions(tmp_path: Path, world: World, positions: int, seed: int) -> None:
    """A pretrained one's window may hold no two chunks, and not even whole ones."""
    import transformers

    config = transformers.GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=2, n_positions=positions)
    base = transformers.AutoModelForCausalLM.from_config(config)
    loaded = load_run(world.run)
    loaded.model = RetroFitted(base, chunk_size=CHUNK, neighbour_len=2 * CHUNK).eval()
    torch.nn.init.normal_(loaded.model.added["2"]["cca"].o_proj.weight, std=0.3)
    loaded.settings["config"]["sequence_length"] = CHUNK
    retriever = Retriever.from_pretrained(world.set)
    reader = module._Reader(loaded, retriever, 2, torch.float32)
    text = torch.randint(4, 400, (4 * CHUNK,)).tolist()
    for token in text:
        logits = reader.read([token])
        assert reader.start % CHUNK == 0 and 0 < len(reader.tokens) - reader.start <= min(
            positions, 2 * CHUNK
        )
        context = torch.tensor([reader.tokens[reader.start :]])
        with torch.no_grad():
            expected = loaded.model(context, retriever(context, num_neighbours=2))[0, -1]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_same_seed_same_text_and_the_stream_is_the_text(world: World, seed: int) -> None:
    parts: list[str] = []
    options = {"max_tokens": 60, "temperature": 1.5, "seed": seed, "ignore_end": True, "device": "cpu"}
    loaded = load_run(world.run)
    first = generate(loaded, "lomi", on_text=parts.append, **options)  # type: ignore[arg-type]
    assert "".join(parts) == first["text"] and first["tokens"] == 60 and len(parts) > 20
    assert generate(loaded, "lomi", **options)["text"] == first["text"]  # type: ignore[arg-type]
    options["seed"] = seed + 1
    assert generate(loaded, "lomi", **options)["text"] != first["text"]  # type: ignore[arg-type]


def test_stream_waits_for_whole_characters(world: World) -> None:
    tokenizer = load_run(world.run).tokenizer
    parts: list[str] = []
    stream = module._Stream(tokenizer, parts.append)
    for token in tokenizer.encode("é€🙂Ω"):
        stream.add(token)
    stream.close()
    assert "".join(parts) == "é€🙂Ω" and "\ufffd" not in "".join(parts)
    parts.clear()
    stream, cut = module._Stream(tokenizer, parts.append), tokenizer.encode("\u1234")[:-1]
    for token in cut:
        stream.add(token)
    assert cut and not parts
    stream.close()  # what will not come any more
    assert "".join(parts) == tokenizer.decode(cut) == "\ufffd"


def test_likeliest_come_first(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of a stable sort, which torch takes a seventh of a token's time for on a CPU."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5000, generator=generator).to(torch.bfloat16).float()  # many are equal
    logits[torch.randint(5000, (500,), generator=generator)] = -torch.inf
    for scale in (1e-44, 1.0, 1e37):  # subnormal and infinite ones are among them
        given = (logits - logits.max()) * scale
        expected, places = torch.sort(given, descending=True, stable=True)
        with monkeypatch.context() as without:
            without.setattr(torch, "sort", None)
            without.setattr(torch.Tensor, "sort", None)
            found, order = module._likeliest_first(given)
        assert torch.equal(found, expected) and torch.equal(order, places)


def test_sampling_keeps_what_it_should(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    probabilities = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])
    logits = probabilities.log()
    generator = torch.Generator().manual_seed(seed)

    def drawn(**options) -> dict[int, int]:  # type: ignore[no-untyped-def]
        options = {"temperature": 1.0, "top_k": None, "top_p": None, **options}
        counts: dict[int, int] = {}
        for _ in range(400):
            token = sample(logits, generator=generator, **options)
            counts[token] = counts.get(token, 0) + 1
        return counts

    assert set(drawn(temperature=0)) == {1} == set(drawn(top_k=1)) == set(drawn(top_p=0.3))
    assert set(drawn(top_k=2)) == {1, 3}
    assert set(drawn(top_p=0.6)) == {1, 3} and set(drawn(top_p=0.7)) == {1, 3, 4}
    assert set(drawn()) == {0, 1, 2, 3, 4}
    assert set(drawn(temperature=1e-40)) == set(drawn(temperature=1e-300)) == set(drawn(top_p=1e-300)) == {1}
    even = torch.zeros(4)  # a quarter each, to the last bit
    assert {sample(even, 1.0, None, 0.5, generator) for _ in range(100)} == {0, 1}
    logits[3] = -torch.inf  # as what stands for no text
    assert set(drawn(temperature=1e300)) == {0, 1, 2, 4}
    logits[3] = probabilities[3].log()
    given: list[torch.Tensor] = []
    multinomial = torch.multinomial
    monkeypatch.setattr(
        torch, "multinomial", lambda x, *a, **o: (given.append(x), multinomial(x, *a, **o))[1]
    )
    for temperature in (1.0, 0.25):
        shares = probabilities ** (1 / temperature)
        shares /= shares.sum()
        wrong = drawn(temperature=temperature)[1] - 400 * shares[1]
        assert abs(wrong) < 6 * (400 * shares[1] * (1 - shares[1])).sqrt()  # six standard deviations
        torch.testing.assert_close(given[-1], shares.sort(descending=True).values)


def test_the_end_of_the_document(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "sample", lambda logits, *_: 0 if torch.isfinite(logits[0]) else 5)
    ended = generate(world.run, "lomi", max_tokens=3, device="cpu")
    assert ended["ended"] and ended["text"] == "" and ended["tokens"] == 0
    assert not generate(world.run, "lomi", max_tokens=3, ignore_end=True, device="cpu")["ended"]
    tokenizer = load_run(
        world.run
    ).tokenizer  # whose first four ids stand for no text, unknown and the end among them
    for ignore_end in (True, False):
        never = module._never(tokenizer, ignore_end).nonzero().flatten().tolist()
        assert never == [*range(not ignore_end, 4)]


def test_command_line(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    words = [
        "generate",
        PROMPTS["a chunk and a bit"],
        "--run",
        world.run,
        "--max-tokens",
        20,
        "--seed",
        3,
        "--device",
        "cpu",
    ]
    assert run(*words, "--json") == 0
    result = json.loads(capfd.readouterr().out)
    assert run(*words, "--show-neighbours", "--top-k", 400, "--top-p", 1.0) == 0
    shown = capfd.readouterr().out
    assert shown.startswith(result["prompt"] + result["text"])
    neighbours = [near for chunk in result["chunks"] for near in chunk["neighbours"]]
    assert neighbours and all(
        near["title"] in shown and f"{near['distance']:.3f}" in shown for near in neighbours
    )
    assert all(near["title"].startswith("train-") for near in neighbours)
    assert (
        run("generate", "lomi", *words[2:4], "--max-tokens", 1, "--show-neighbours", "--device", "cpu") == 0
    )
    assert capfd.readouterr().out.endswith("\n(no neighbours: the text has no whole chunk)\n")


def test_arithmetic_that_was_asked_for(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[torch.dtype] = []
    autocast = module.autocast

    def watched(device: torch.device, dtype: torch.dtype) -> torch.autocast:
        seen.append(dtype)
        return autocast(device, dtype)

    monkeypatch.setattr(module, "autocast", watched)
    words = ["generate", "lomi", "--run", world.run, "--max-tokens", 2, "--device", "cpu"]
    assert run(*words) == 0 and set(seen) == {torch.float32}
    seen.clear()
    assert run(*words, "--dtype", "bf16") == 0 and set(seen) == {torch.bfloat16}


class CastWeights(TorchDispatchMode):
    """Counts how often each parameter of `model` is copied to another dtype."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.times = {own.data_ptr(): 0 for own in model.parameters() if own.ndim == 2}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.times:
            self.times[args[0].data_ptr()] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("frozen", [False, True])
def test_weights_are_cast_once_for_all_tokens(world: World, frozen: bool) -> None:
    """And are as they were afterwards. What is handed out on the way is handed out outside of autocast."""
    loaded = load_run(world.plain)
    loaded.model.requires_grad_(not frozen)
    seen = set()

    def on_text(text: str) -> None:
        seen.add(torch.is_autocast_enabled("cpu"))

    with CastWeights(loaded.model) as casts:
        result = generate(
            loaded, "lomi ka", max_tokens=8, ignore_end=True, device="cpu", dtype="bf16", on_text=on_text
        )
    assert result["tokens"] == 8 and seen == {False}
    assert max(casts.times.values()) == 1, casts.times
    assert all(own.requires_grad != frozen for own in loaded.model.parameters())


@pytest.mark.parametrize(
    "words", [["--set", "{set}"], ["-k", 2], ["--retriever", "bm25"], ["--show-neighbours"]]
)
def test_a_plain_decoder_takes_no_neighbours(
    world: World, words: list[object], capfd: pytest.CaptureFixture[str]
) -> None:
    words = [str(word).format(set=world.set) for word in words]
    assert run("generate", "lomi", "--run", world.plain, *words, "--device", "cpu") == 2
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert f"{words[0]} means nothing without neighbours" in err and "Leave it out" in err


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"max_tokens": 2.5},
        {"seed": -1},
        {"seed": 99999999999999999999999},
        {"temperature": -1.0},
        {"temperature": float("inf")},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": [0.9]},
        {"num_neighbours": 0},
    ],
)
def test_settings_out_of_range(world: World, options: dict[str, float]) -> None:
    with pytest.raises(InputError, match="generate"):
        generate(world.run, "x", device="cpu", **options)  # type: ignore[arg-type]


def test_a_chunk_that_the_last_token_completes_is_traced(world: World) -> None:
    """With its neighbours, though nothing is read after it; and a model that was being trained does not drop out."""
    loaded = load_run(world.run)
    loaded.model.train()
    begun = len(loaded.tokenizer.encode("ka lo"))
    made = generate(loaded, "ka lo", max_tokens=2 * CHUNK - begun, ignore_end=True, device="cpu")
    assert not loaded.model.training
    assert len(made["chunks"]) == 2 and len(made["chunks"][1]["neighbours"]) == 2
    assert "".join(chunk["text"] for chunk in made["chunks"]) == "ka lo" + made["text"]
