"""Runs, containment and the filtered curve, against slow loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from retro_kernels.retrieval import leakage
from retro_kernels.retrieval.leakage import (
    common_runs,
    containment,
    filtered_bits_per_byte,
    longest_common_run,
    overlap,
)


def slow_run(chunk: list[int], value: list[int]) -> int:
    best = 0
    for i in range(len(chunk)):
        for j in range(len(value)):
            n = 0
            while i + n < len(chunk) and j + n < len(value) and chunk[i + n] == value[j + n] != 0:
                n += 1
            best = max(best, n)
    return best


def slow_containment(chunk: list[int], value: list[int], n: int) -> float:
    n = min(n, len(chunk))
    if not n:
        return 0.0
    grams = [tuple(chunk[i : i + n]) for i in range(len(chunk) - n + 1)]
    there = {tuple(value[j : j + n]) for j in range(len(value) - n + 1)}
    return sum(g in there for g in grams) / len(grams)


def make(num: int = 17, m: int = 12, k: int = 3, r: int = 24) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # two letters and pads inside: many runs of many lengths
    chunks, values = torch.randint(0, 3, (num, m)), torch.randint(0, 3, (num, k, r))
    values[3, 1, 5 : 5 + m] = chunks[3]
    return chunks, values, torch.randint(0, m + 1, (num,)), torch.randint(0, r + 1, (num, k))


def test_runs_equal_the_slow_loop(seed: int) -> None:
    chunks, values, own, lengths = make()
    got = common_runs(chunks, values, chunk_lengths=own, value_lengths=lengths)
    for c, row in enumerate(values):
        want = [
            slow_run(chunks[c, : own[c]].tolist(), v[: lengths[c, j]].tolist()) for j, v in enumerate(row)
        ]
        assert got[c].tolist() == want
    assert torch.equal(
        longest_common_run(chunks, values, chunk_lengths=own, value_lengths=lengths), got.amax(1)
    )


@pytest.mark.parametrize("length", [127, 128, 300])
def test_runs_longer_than_the_narrow_numbers(seed: int, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    """In place of 32,768 tokens, which take seconds."""
    monkeypatch.setattr(leakage, "_NARROW", torch.int8)
    chunks = torch.randint(1, 100, (2, length))
    values = torch.zeros(2, 2, length + 40, dtype=torch.int64)
    values[:, 1, 20 : 20 + length] = chunks
    values[0, 0, :length] = chunks[0]
    values[0, 0, length - 1] = 100
    assert common_runs(chunks, values).tolist() == [[length - 1, length], [0, length]]
    assert containment(chunks, values)[:, 1].tolist() == [1.0, 1.0]


def test_many_blocks_equal_one(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks, values, _, _ = make(31)
    whole = common_runs(chunks, values), containment(chunks, values, n=3)
    monkeypatch.setattr("retro_kernels.retrieval.leakage._SLAB_CPU", 5 * 3 * 24)
    assert torch.equal(common_runs(chunks, values), whole[0])
    assert torch.equal(containment(chunks, values, n=3), whole[1])


def test_pads_never_match_and_bound_the_chunk() -> None:
    chunk = torch.tensor([[5, 6, 7, 0, 0, 0, 0, 0]])
    value = torch.tensor([[[9, 5, 6, 7, 0, 0, 0, 0], [0] * 8]])
    assert common_runs(chunk, value).tolist() == [[3, 0]]
    assert overlap(chunk, value).tolist() == [1.0]  # m is the chunk's own length
    assert overlap(torch.zeros(1, 8, dtype=torch.long), value).tolist() == [0.0]


@pytest.mark.parametrize("given", [True, False])
def test_any_id_may_stand_for_no_token(seed: int, given: bool) -> None:
    """Other names for the same tokens, of which 7 is the pad and 0 is a token, change nothing."""
    chunks, values, own, lengths = make()
    new_name = torch.tensor([7, 0, 2])
    counts = {"chunk_lengths": own, "value_lengths": lengths} if given else {}
    for measure in (common_runs, longest_common_run, overlap, containment):
        same = measure(new_name[chunks], new_name[values], **counts, pad_id=7)
        assert torch.equal(same, measure(chunks, values, **counts))


def test_unsigned_tokens_and_no_neighbours() -> None:
    chunk, value = (
        torch.tensor([[60_000, 3]]).to(torch.uint16),
        torch.tensor([[[60_000, 3]]]).to(torch.uint16),
    )
    assert longest_common_run(chunk, value).tolist() == [2]
    assert longest_common_run(chunk, value[:, :0]).tolist() == [0]
    assert longest_common_run(chunk[:0], value[:0]).shape == (0,)


@pytest.mark.parametrize("n", [1, 3, 13])
def test_containment_equals_the_slow_loop(seed: int, n: int) -> None:
    chunks, values, own, lengths = make(m=20, r=40)
    chunks, values = chunks + 1, values + 1
    own[0] = 0
    got = containment(chunks, values, n=n, chunk_lengths=own, value_lengths=lengths)
    for c, row in enumerate(values):
        for j, v in enumerate(row):
            want = slow_containment(chunks[c, : own[c]].tolist(), v[: lengths[c, j]].tolist(), n)
            assert got[c, j].item() == pytest.approx(want)


@pytest.mark.parametrize("shift", [0, 2, 6, 16, 32, 64])
def test_containment_sees_copies_at_every_shift(seed: int, shift: int) -> None:
    # the Jaccard index of 13-grams does not: 5 % at a shift of 6 (measured on real text)
    text = torch.randint(1, 5000, (192,))
    assert containment(text[shift : shift + 64][None], text[None, None, :128]).item() == 1.0


@pytest.mark.parametrize("run, found", [(12, 0.0), (13, 1 / 52), (14, 2 / 52)])
def test_containment_is_by_default_that_of_13_grams(run: int, found: float) -> None:
    chunk, value = torch.arange(1, 65)[None], torch.arange(100, 228)[None, None]
    value[..., 30 : 30 + run] = chunk[:, 20 : 20 + run]
    assert containment(chunk, value).item() == pytest.approx(found)


def test_filtered_curve() -> None:
    bits, size = torch.tensor([8.0, 16.0, 64.0]), torch.tensor([10, 10, 10])
    curve = filtered_bits_per_byte(bits, size, torch.tensor([0.5, 0.1, 1.0]), alphas=(0.05, 0.125, 0.5, 1.0))
    assert curve == {0.05: None, 0.125: 1.6, 0.5: 1.2, 1.0: pytest.approx(88 / 30)}


def test_bad_shapes() -> None:
    with pytest.raises(ValueError, match="same C"):
        common_runs(torch.zeros(2, 4), torch.zeros(3, 1, 4))
    with pytest.raises(ValueError, match="value_lengths"):
        common_runs(torch.zeros(2, 4), torch.zeros(2, 1, 4), value_lengths=torch.zeros(2))
    with pytest.raises(ValueError, match="one number per chunk"):
        filtered_bits_per_byte(torch.zeros(2), torch.zeros(2), torch.zeros(3))
