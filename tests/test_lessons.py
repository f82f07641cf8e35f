"""A retrofit that goes on where its decoder stands: schedule, a start that copies, lessons in copying."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small import MODEL, World, run

from retro_kernels import NeighbourBatch, Retro
from retro_kernels import train as train_module
from retro_kernels.config import InputError, TrainConfig, retro_tiny
from retro_kernels.nn import copying
from retro_kernels.train import give_lessons, learning_rate

SIZE, COUNT = 64, 2


def batch(share: float, seed: int) -> tuple[torch.Tensor, NeighbourBatch, NeighbourBatch]:
    """(tokens [6, 256], neighbours as found, neighbours with lessons); a document ends inside each sequence."""
    tokens = torch.randint(1, 1000, (6, 256))
    tokens[:, 150:192] = 0
    found = NeighbourBatch(
        torch.randint(1, 1000, (6, 4, COUNT, 2 * SIZE)), torch.full((6, 4, COUNT), 100, dtype=torch.int32)
    )
    return tokens, found, give_lessons(tokens, found, share, torch.Generator().manual_seed(seed))


def test_a_lesson_is_the_sequences_own_text_nearby(seed: int) -> None:
    tokens, found, taught = batch(1.0, seed)
    assert taught.tokens.shape == found.tokens.shape and taught.lengths.dtype == found.lengths.dtype
    shifts = set()
    for b, u, j in torch.cartesian_prod(torch.arange(6), torch.arange(4), torch.arange(COUNT)).tolist():
        length = int(taught.lengths[b, u, j])
        text = taught.tokens[b, u, j]
        assert not text[length:].any() and text[:length].all()  # no pad inside, nothing behind
        if length < 8:
            continue  # it begins at the document's end
        first = max(0, u * SIZE - 48)
        places = [
            s for s in range(first, u * SIZE + 49) if torch.equal(tokens[b, s : s + length], text[:length])
        ]
        assert places, (b, u, j)
        shifts.add(places[0] - u * SIZE)
        stop = places[0] + length
        assert length == 2 * SIZE or stop == 256 or tokens[b, stop] == 0
    assert len(shifts) > 5  # the answer does not always stand at the same distance


def test_lessons_are_shifted_by_up_to_three_quarters_of_a_chunk_either_way(seed: int) -> None:
    tokens = torch.arange(1, 40 * 32 + 1).view(40, 32)
    found = NeighbourBatch(
        torch.zeros(40, 8, 2, 8, dtype=torch.int64), torch.zeros(40, 8, 2, dtype=torch.int32)
    )
    taught = give_lessons(tokens, found, 1.0, torch.Generator().manual_seed(seed))
    shifts = taught.tokens[:, 1:, :, 0] - tokens[:, 4::4, None]
    assert {*shifts.flatten().tolist()} == {*range(-3, 4)}


def test_lessons_are_for_their_share(seed: int) -> None:
    _, found, same = batch(0.0, seed)
    assert torch.equal(same.tokens, found.tokens) and torch.equal(same.lengths, found.lengths)
    _, found, some = batch(0.5, seed)
    changed = (some.tokens != found.tokens).flatten(1)
    assert all(row.float().mean() > 0.5 or not row.any() for row in changed)  # whole sequences
    _, _, again = batch(0.5, seed)
    assert torch.equal(
        (again.lengths == 100).all(-1), (some.lengths == 100).all(-1)
    )  # drawn by the generator alone


def test_the_schedule_goes_on(tmp_path: Path) -> None:
    common = {"data": ("x",), "out": "o", "steps": 1000, "warmup": 10}
    whole = TrainConfig(**common)
    later = TrainConfig(**common, set="s", retrofit="r", first_step=700)
    for step in (700, 850, 999):
        assert learning_rate(later, step) == learning_rate(whole, step) < whole.learning_rate
    with pytest.raises(InputError, match="first_step is 1000"):
        TrainConfig(**common, set="s", retrofit="r", first_step=1000)
    with pytest.raises(InputError, match="retrofit"):
        TrainConfig(**common, set="s", copy=0.5)
    with pytest.raises(InputError, match="lessons is 1.5"):
        TrainConfig(**common, set="s", lessons=1.5)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("rotary", [True, False])
def test_a_retrofit_can_start_copying(seed: int, shared: bool, rotary: bool) -> None:
    """Before any training, text that a neighbour holds is likelier than without that neighbour, or without any."""
    plain = Retro(
        retro_tiny(vocab_size=300, cca_layers=(), self_attention="rotary" if rotary else "relative")
    )
    model = Retro.from_decoder(plain, (2, 3), copy=8.0, share_encoder_embedding=shared)
    assert model.training and all(weight.is_leaf for weight in model.parameters())
    assert all(module.training for module in model.modules())
    model.eval()
    tokens = torch.randint(1, 300, (4, 192))
    assert torch.equal(model(tokens), plain.eval()(tokens))
    other = torch.randint(1, 300, (4, 3, 2, 128))
    holds = other.clone()
    holds[:, 0, 1, 20:104] = tokens[:, 50:134]  # the answers of rows 63 … 126 among them, at another place

    def bits(neighbours: torch.Tensor | None) -> float:
        logits = model(tokens, None if neighbours is None else NeighbourBatch(neighbours, None))
        return F.cross_entropy(
            logits[:, 66:126].flatten(0, 1), tokens[:, 67:127].flatten()
        ).item() / math.log(2)

    with torch.no_grad():
        assert bits(holds) < bits(other) - 0.3 and bits(holds) < bits(None) - 0.3


def start(copy: float, layers: tuple[int, ...] = (2, 3), **changes: object) -> Retro:
    """Of the same plain decoder, apart from `changes`."""
    torch.manual_seed(torch.initial_seed())
    plain = Retro(retro_tiny(vocab_size=300, cca_layers=(), **changes))
    torch.nn.init.uniform_(plain.norm.weight, 0.2, 1.8)
    return Retro.from_decoder(plain, layers, copy=copy)


@pytest.mark.parametrize("self_attention", ["rotary", "relative"])
@torch.no_grad()
def test_every_head_compares_a_token_and_the_one_before(
    seed: int, self_attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the predecessors in the neighbour, and adds up what it finds, where states hold the token before."""
    plainly = copying._states

    def states(model: Retro, text: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        found, last = plainly(model, text)
        before = model.embedding(text).roll(1, 1).flip(2)
        return [state + state.std() / before.std() * before for state in found], last

    monkeypatch.setattr(copying, "_states", states)
    model = start(1.0, self_attention=self_attention).eval()
    text = torch.randint(1, 300, (8, 128))
    encoded = copying._encode(model, text)[:, 2:]
    token = text[:, 1:].flatten()[:, None] == text[:, 1:-1].flatten()
    before = text[:, :-1].flatten()[:, None] == text[:, :-2].flatten()
    for layer, state in zip((2, 3), states(model, text)[0], strict=True):
        cca = model.layers[layer - 1].cca
        queries, keys = cca.q_proj(state[:, 1:]), cca.k_proj(encoded)
        logits = torch.einsum(
            "qhd,khd->hqk", *(x.flatten(0, 1).unflatten(-1, (cca.num_heads, -1)) for x in (queries, keys))
        )
        for head in logits / cca.head_dim**0.5:
            one, other = head[token & ~before].mean(), head[before & ~token].mean()
            assert one > 1 and other > 2 and head[token & before].mean() > one + other - 0.5
            assert head[~token & ~before].mean().abs() < 0.3


@torch.no_grad()
def test_the_encoder_fetches_two_predecessors_of_every_token(seed: int) -> None:
    """Wherever it stands and whatever there is."""
    attention = start(1.0).eval().encoder.layers[0].attention
    x, y, one = torch.randn(3, 4, 128, 128)
    torch.testing.assert_close(attention(x) + attention(y), attention(x + y), rtol=1e-4, atol=1e-5)
    one[:, :60], one[:, 61:] = 0, 0
    fetched = attention(one).norm(dim=-1).mean(0)
    assert fetched[61:63].min() > 0.3 and fetched.sort().values[-3] < 0.01


@torch.no_grad()
def test_what_a_start_that_copies_does_not_set_is_nearly_nothing(seed: int) -> None:
    model, usual = start(1.0, encoder_layers=2), dict(start(0.0, encoder_layers=2).named_parameters())
    quiet = [
        name
        for name in usual
        if re.search(r"encoder.*(down_proj|cross.o_proj|[^0].attention.o_proj)|cca.rel_proj", name)
    ]
    assert len(quiet) >= 6
    for name in quiet:
        assert torch.equal(model.get_parameter(name), 0.1 * usual[name]), name


@pytest.mark.parametrize("self_attention", ["rotary", "relative"])
@torch.no_grad()
def test_a_start_that_copies_knows_what_cross_attention_reads(seed: int, self_attention: str) -> None:
    model, seen = start(1.0, self_attention=self_attention).eval(), []
    model.layers[1].cca_norm.register_forward_hook(lambda *found: seen.append(found[2]))
    model.norm.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    text = torch.randint(1, 300, (2, 128))
    model(text, NeighbourBatch(torch.randint(1, 300, (2, 2, 1, 128)), None))
    model(text)
    reads, ends = seen[0], seen[-1]
    states, last = copying._states(model, text)
    torch.testing.assert_close(states[0], reads)
    torch.testing.assert_close(last, ends)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layers", [(2,), (2, 3)])
@torch.no_grad()
def test_the_strength_is_that_of_all_cross_attentions(seed: int, layers: tuple[int, ...], tied: bool) -> None:
    """Up to what the states do not tell: the logit of a neighbour's token is raised, and others are not."""
    model = start(0.1, layers, tie_embeddings=tied).eval()
    readout = model.embedding if tied else model.readout
    text = torch.randint(1, 300, (8, 128))
    _, last = copying._states(model, text)
    encoded = copying._encode(model, text)
    added = sum(
        encoded @ (cca.o_proj.weight @ cca.v_proj.weight).T
        for cca in (model.layers[i - 1].cca for i in layers)
    )
    before, after = (F.linear(model.norm(x), readout.weight) for x in (last, last + added.roll(-1, 1)))
    gain = (after - before)[:, 1:-1] / 0.1
    # of a readout that is no function of the embedding a matrix can tell less
    least, most = (0.4, 0.7) if tied else (0.15, 0.35)
    assert least < gain.gather(2, text[:, 2:, None]).mean() < most and gain.mean().abs() < 0.05


def test_a_start_that_copies_drops_nothing_out(seed: int) -> None:
    wanted, model = start(1.0), start(1.0, dropout=0.5)
    assert all(map(torch.equal, model.parameters(), wanted.parameters()))


def test_parts_of_a_start_that_copies(seed: int) -> None:
    """A matrix that maps states to others is found again; directions are orthonormal, and each head has its own."""
    x, matrix = torch.randn(500, 8), torch.randn(5, 8)
    torch.testing.assert_close(copying._fit(x, x @ matrix.T), matrix, rtol=0.02, atol=0.02)
    same = torch.ones(20, 4)  # of which the products have no inverse
    torch.testing.assert_close(same @ copying._fit(same, same).T, same, rtol=0.02, atol=0.02)
    rows = copying._orthonormal(5, 9, x)
    torch.testing.assert_close(rows @ rows.T, torch.eye(5), rtol=1e-5, atol=1e-5)
    assert copying._shares(32) == (20, 12)
    assert [copying.heads_needed(64, size) for size in (10, 12, 16, 32)] == [4, 3, 3, 2]


def test_a_start_that_copies_needs_room_in_the_encoder() -> None:
    plain = Retro(retro_tiny(vocab_size=50, cca_layers=()))
    for changes in ({"encoder_dim": 64}, {"encoder_heads": 2}):
        with pytest.raises(InputError, match="copy needs an encoder"):
            Retro.from_decoder(plain, (2, 3), copy=0.5, **changes)


def test_lessons_become_fewer(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None in the last fifth of the steps, of those that a retrofit goes on for too; each forward pass draws anew."""
    shares, drawn = [], []

    def watched(tokens, neighbours, share, generator):  # type: ignore[no-untyped-def]
        shares.append(share)
        drawn.append(generator.initial_seed())
        return give_lessons(tokens, neighbours, share, generator)

    monkeypatch.setattr(train_module, "give_lessons", watched)
    words = ["--data", world.train, "--set", world.set, "--out", tmp_path / "r", *MODEL]
    assert run("train", *words, "--lessons", 0.5, "--steps", 10, "--accumulate", 2) == 0
    assert shares[::2] == shares[1::2]
    assert shares[::2] == pytest.approx([0.5, 0.4375, 0.375, 0.3125, 0.25, 0.1875, 0.125, 0.0625, 0, 0])
    shares.clear()
    words = ["--data", world.train, "--set", world.set, "--out", tmp_path / "later", *MODEL]
    later = ["--retrofit", world.plain, "--first-step", 5, "--seed", 1]
    assert run("train", *words, *later, "--lessons", 0.5, "--steps", 10) == 0
    assert shares == pytest.approx([0.5, 0.375, 0.25, 0.125, 0])
    assert len(set(drawn)) == len(drawn) == 25


def test_what_is_added_has_a_rate_of_its_own(world: World, tmp_path: Path) -> None:
    """Adam's first step is as long as the rate, whatever the gradient; output projections start at zero."""
    words = [
        "train",
        "--data",
        world.train,
        "--set",
        world.set,
        "--retrofit",
        world.plain,
        "--unfreeze",
        *MODEL,
    ]
    options = ["--steps", 1, "--lr", 0.01, "--added-rate", 3, "--weight-decay", 0]
    assert run(*words, "--out", tmp_path / "r", *options) == 0
    trained, before = Retro.from_pretrained(tmp_path / "r"), Retro.from_pretrained(world.plain)
    step = (trained.embedding.weight - before.embedding.weight).abs().max().item()
    added = trained.layers[0].cca.o_proj.weight.abs().max().item()
    assert (step, added) == (pytest.approx(0.01, rel=1e-3), pytest.approx(0.03, rel=1e-3))


def test_lessons_from_the_command_line_resume_bit_for_bit(world: World, tmp_path: Path) -> None:
    words = ["train", "--data", world.train, "--set", world.set, "--retrofit", world.plain, "--unfreeze"]
    words += ["--copy", 0.5, "--added-rate", 2, "--first-step", 2, "--lessons", 0.5, "--steps", 6, *MODEL]
    assert run(*words, "--out", tmp_path / "whole") == 0
    assert run(*words, "--out", tmp_path / "parts", "--stop-after", 2) == 0
    assert run("train", "--data", world.train, "--out", tmp_path / "parts", "--resume") == 0
    tokens = torch.randint(4, 50, (1, 70))
    whole, parts = (Retro.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    assert torch.equal(whole(tokens), parts(tokens))
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps[-1] == 6
