"""What stands between a measurement and a published figure: floors, verdicts, merged result files, tables."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import cases
import goals
import peers
import pytest
import roofline
import run
import tables
import timing
import torch
from cases import Case, Shape

BENCH = Path(run.__file__).parent


def shape(head_dim: int, neighbours: int) -> Shape:
    return Shape(8, 2048, 16, head_dim, neighbours)


@pytest.mark.parametrize(
    ("head_dim", "neighbours", "forward", "backward"),
    [(64, 2, 78, 157), (64, 10, 328, 657), (128, 2, 156, 313), (128, 40, 2529, 5058)],
)
def test_floors_at_the_rates_of_an_h200(head_dim: int, neighbours: int, forward: int, backward: int) -> None:
    """Microseconds, worked out by hand from bytes: (2M + 2KR)·D·2 and (4M + 4KR)·D·2 a program at 4.3 TB/s."""
    case = Case(shape(head_dim, neighbours), "bias", table_grad=False)
    for which, expected in (("forward", forward), ("backward", backward)):
        floor = roofline.H200.floor(roofline.attention(case, which)) * 1e6
        assert floor == pytest.approx(expected, rel=0.01)


# by hand, from the arguments: 24 attending chunks of 4 rows, 2 neighbours of 8 tokens, 5 heads of 16, 2 bytes each
ODD = Shape(batch=8, tokens=3 * 4 + 2, heads=5, head_dim=16, neighbours=2, chunk=4, neighbour_len=8)
QUERY, KEY, LSE = 24 * 4 * 5 * 16 * 2, 24 * 16 * 5 * 16 * 2, 24 * 4 * 5 * 4
TABLE, REL_KEY, LENGTHS = 5 * 11 * 4, 5 * 11 * 16 * 2, 24 * 2 * 4
PRODUCT, BY_DISTANCE = 2 * 24 * 4 * 16 * 5 * 16, 2 * 24 * 4 * 11 * 5 * 16


@pytest.mark.parametrize(
    ("case", "which", "moved", "operations"),
    [
        (Case(ODD, "none"), "forward", 2 * QUERY + 2 * KEY + LSE, 2 * PRODUCT),
        (Case(ODD, "none"), "backward", 4 * QUERY + 4 * KEY + LSE, 5 * PRODUCT),
        (Case(ODD, "bias"), "forward", 2 * QUERY + 2 * KEY + LSE + TABLE, 2 * PRODUCT),
        (Case(ODD, "bias"), "backward", 4 * QUERY + 4 * KEY + LSE + 2 * TABLE, 5 * PRODUCT),
        (Case(ODD, "bias", table_grad=False), "backward", 4 * QUERY + 4 * KEY + LSE + TABLE, 5 * PRODUCT),
        (Case(ODD, "bias", True), "forward", 2 * QUERY + 2 * KEY + LSE + TABLE + LENGTHS, 2 * PRODUCT),
        (Case(ODD, "relative"), "forward", 2 * QUERY + 2 * KEY + LSE + REL_KEY, 2 * PRODUCT + BY_DISTANCE),
        (
            Case(ODD, "relative"),
            "backward",
            4 * QUERY + 4 * KEY + LSE + 2 * REL_KEY,
            5 * PRODUCT + 3 * BY_DISTANCE,
        ),
        (
            Case(ODD, "relative", table_grad=False),
            "backward",
            4 * QUERY + 4 * KEY + LSE + REL_KEY,
            5 * PRODUCT + 2 * BY_DISTANCE,
        ),
        (Case(ODD, "none"), "forward+backward", 6 * QUERY + 6 * KEY + 2 * LSE, 7 * PRODUCT),
    ],
    ids=str,
)
def test_bytes_and_operations_of_attention(
    case: Case, which: cases.Pass, moved: int, operations: int
) -> None:
    assert roofline.attention(case, which) == roofline.Cost(moved, operations)
    narrow = roofline.attention(case, which, e=1).bytes
    assert roofline.attention(case, which, e=4).bytes - narrow == 3 * (moved - narrow)  # the rest is float32


def test_bytes_and_operations_of_what_is_beside_it() -> None:
    width, rows, keys = 24, 24 * 4 * 5, 24 * 16
    project = roofline.Cost(keys * width * 2 + 2 * KEY, 2 * 2 * keys * width * 5 * 16)
    core = {p: roofline.attention(Case(ODD, "bias"), p) for p in ("forward", "backward")}
    assert roofline.materialised_training(ODD, width, "forward") == [project, core["forward"]]
    assert roofline.materialised_training(ODD, width, "backward") == [project, project, core["backward"]]
    weights, wide = rows * 16 * 2, rows * width * 2
    fold = roofline.Cost(QUERY + wide, 2 * rows * 16 * width)
    product = roofline.Cost(wide + keys * width * 2 + weights, 2 * rows * 16 * width)
    forward = [fold, product, roofline.Cost(2 * weights, 0), product, fold]
    backward = [fold] * 4 + [product] * 4 + [roofline.Cost(3 * weights, 0)]
    assert roofline.absorbed_training(ODD, width, "forward") == forward
    found = roofline.absorbed_training(ODD, width, "backward")
    assert sorted(map(repr, found)) == sorted(map(repr, backward))
    for costs in (roofline.absorbed_training, roofline.materialised_training):
        both = costs(ODD, width, "forward") + costs(ODD, width, "backward")
        assert costs(ODD, width, "forward+backward") == both

    found = roofline.decode(batch=3, heads=5, head_dim=16, keys=16, encoder_dim=width)
    assert found["materialised"] == roofline.Cost(3 * (2 * 16 * 80 + 2 * 80) * 2, 3 * 2 * 2 * 16 * 80)
    assert found["absorbed"].bytes == (3 * (16 * width + 2 * 80) + 2 * 80 * width) * 2
    assert found["absorbed"].flops == 3 * (2 * 2 * 16 * 5 * width + 2 * 2 * 80 * width)
    # 4M bytes in, 16M out (kernel.py), an id, a length, and whether the chunk and the next one are of one document
    assert roofline.gather(10).bytes == 10 * (4 * 64 + 16 * 64 + 8 + 4 + 2)
    assert roofline.gather(1, out_element=100).bytes - roofline.gather(1).bytes == 128 * 92


def test_a_floor_is_the_longer_of_two_times_kernel_by_kernel() -> None:
    ceilings = roofline.Ceilings("chip", bandwidth=10.0, matmul=100.0)
    slow, busy = roofline.Cost(50, 100), roofline.Cost(10, 700)
    assert ceilings.floor(slow) == 5 and ceilings.floor(busy) == 7
    assert ceilings.floor(slow, busy) == 12 > ceilings.floor(slow + busy) == 8


def test_ceilings_count_a_copy_twice_and_a_product_of_multiply_and_add(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing, "samples", lambda calls, rounds: [call() is None or 0.5 for call in calls])
    monkeypatch.setattr(roofline, "TINY", True)
    roofline.measured.cache_clear()
    try:
        found = roofline.measured()
    finally:
        roofline.measured.cache_clear()
    assert found.bandwidth == 2 * 2**20 / 0.5 and found.matmul == 2 * 256**3 / 0.5


def test_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The median, how far the halves of a run lie apart, and buffer sets in turn."""
    called: list[str] = []
    seconds = iter([9.0, 1.0, 2.0, 3.0, 5.0, 7.0, 9.0])  # the first decides how many rounds there are
    monkeypatch.setattr(timing, "wall_seconds", lambda call: (call(), next(seconds))[1])
    stats: list[float] = []
    benchmark = types.SimpleNamespace(
        extra_info={},
        disabled=False,
        _make_stats=lambda iterations: types.SimpleNamespace(update=stats.append),
    )
    calls = [lambda: called.append("a"), lambda: called.append("b")]
    assert timing.measure(benchmark, calls, rounds=6, wall=True, what="it") == 4.0
    assert stats == [1, 2, 3, 5, 7, 9] and called == list("aababab")
    assert benchmark.extra_info == {"what": "it", "spread": round((7 - 2) / 4, 4)}

    seconds = iter([1.0, 0.4, *[0.1, 0.2] * 3])
    found = timing.in_turn({"a": calls[0], "b": calls[1]}, most=3)
    assert found == {"a": [0.1] * 3, "b": [0.2] * 3} and called[7:] == list("abababab")


def test_rounds_fill_a_second_within_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for once, alone, in_turn in ((0.5, 5, 4), (0.125, 8, 9), (0.01, 30, 9), (3.0, 5, 3)):
        monkeypatch.setattr(timing, "wall_seconds", lambda call, once=once: once)
        assert len(timing.samples([print], wall=True)) == alone
        assert len(timing.in_turn({"a": print})["a"]) == in_turn


def test_buffer_sets_exceed_the_cache_eight_times(monkeypatch: pytest.MonkeyPatch) -> None:
    assert timing.sets_to_rotate(1) == 1 or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(timing, "l2_bytes", lambda: 100)
    assert [timing.sets_to_rotate(n) for n in (0, 1, 100, 399, 400, 401, 800, 10**6)] == [
        64,
        64,
        8,
        3,
        2,
        2,
        1,
        1,
    ]


def test_bytes_are_counted_by_storage() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    assert timing.size([x, x[1], None, torch.empty(3)]) == 4 * 8 * 4 + 3 * 4
    # of exp its result is kept, which is the output; of the product its two factors, of which one is given
    assert timing.saved_bytes(x.exp, [x]) == 0
    assert timing.saved_bytes(lambda: x * x.exp(), [x]) == x.nbytes


def test_what_computes_something_else_is_no_opponent() -> None:
    x = torch.randn(50)
    peers.same(x * (1 + 5e-5), x, "close")
    peers.same((x * 1.01).half(), x.half(), "close, in 16 bits")
    for wrong, right in (
        (x * 1.001, x),
        ((x * 1.03).half(), x.half()),
        (x * float("nan"), x),
        (x * 0, x * 0),
    ):
        with pytest.raises(AssertionError, match="other"):
            peers.same(wrong, right, "other")


def test_relative_keys_add_operations_and_hardly_bytes() -> None:
    bias, relative = (roofline.attention(Case(shape(64, 2), p), "forward") for p in ("bias", "relative"))
    assert relative.flops / bias.flops == pytest.approx(1 + 191 / 512)  # 2·M·G·D over 4·M·KR·D
    assert relative.bytes / bias.bytes < 1.01


def test_the_committed_predictions_are_those_of_the_code() -> None:
    written = json.loads((roofline.RESULTS / "predictions.json").read_text())
    assert written == json.loads(json.dumps(roofline.predictions()))
    assert all(row["predicted"] is True for row in written["predictions"])


def test_every_gpu_case_fills_the_chip_and_fits_its_memory() -> None:
    for s in cases.grid(gpu=True, tiny=False):
        assert s.blocks * s.heads >= 4096
        assert roofline.attention(Case(s), "forward").bytes <= 12e9


def row(seconds: float, case: str = "retro_kernels", group: str = "g", **extra: object) -> dict:
    fields = {
        "what": "core",
        "positions": "bias",
        "lengths": False,
        "table_grad": True,
        "H": 16,
        "D": 128,
        "K": 2,
    }
    return {
        "group": group,
        "case": case,
        "median_s": seconds,
        "extra": {**fields, "pass": "forward", **extra},
    }


def verdicts(rows: list[dict]) -> dict[str, tuple[str, str, str]]:
    return {goal.name: goal.verdict(rows) for goal in goals.GPU_GOALS}


def test_a_goal_is_judged_by_its_worst_shape_and_its_best_opponent() -> None:
    rows = [
        row(1.0, share_of_floor=0.95),
        row(1.6, goals.FLEX[0]),
        row(1.2, goals.FLEX[1]),
        row(0.5, "SDPA without positions"),
        row(9.9, "SDPA math"),
        row(2.1, "SDPA efficient"),
        row(1.0, group="h", share_of_floor=0.80, H=32),
        row(1.05, goals.FLEX[0], group="h", H=32),
        *({"group": g, "case": c, "skipped": "why"} for g in "gh" for c in goals.FLEX[2:]),
        {"group": "h", "case": goals.FLEX[1], "skipped": "why"},
    ]
    found = verdicts(rows)
    assert found["forward, share of the floor, D 128, K = 2"] == ("0.8", "H32 D128 K2", "met")
    assert found["over the best FlexAttention: forward"] == ("1.05×", "H32 D128 K2", "MISSED")
    assert found["over the best masked SDPA: forward"] == ("2.1×", "H16 D128 K2 (without SDPA cudnn)", "aim")
    first = found["over FlexAttention as one writes it first: forward"]
    assert first == ("1.05×", "H32 D128 K2", "MISSED")
    assert found["absorbed over materialised in training, D 128, K = 10"][2] == "not measured"


def test_the_best_is_sought_among_all_opponents() -> None:
    """No formulation of a kind is left out, so that none can be absent unnoticed."""
    kinds = {name: [p.name for p in peers.PEERS if p.name.startswith(name)] for name in ("Flex", "SDPA")}
    assert list(goals.FLEX) == kinds["Flex"] and [p.name for p in peers.PEERS if p.as_written] == [
        goals.FLEX[0]
    ]
    assert set(goals.MASKED_SDPA) == set(kinds["SDPA"]) - {"SDPA flash"}  # which takes no mask


@pytest.mark.parametrize(
    ("smaller", "values", "verdict"),
    [
        (False, [2.0, 3.0], ("2", "0", "aim")),
        (False, [3.0, 1.9], ("1.9", "1", "met")),
        (False, [1.0, 5.0], ("1", "0", "met")),
        (False, [5.0, 0.999], ("0.999", "1", "MISSED")),
        (True, [2.0, 2.5], ("2.5", "1", "MISSED")),
        (True, [2.0, 1.5], ("2", "0", "met")),
        (True, [0.5, 1.0], ("1", "1", "aim")),
        (True, [], ("", "", "not measured")),
    ],
)
def test_verdicts(smaller: bool, values: list[float], verdict: tuple[str, str, str]) -> None:
    limits = (2.0, 1.0) if smaller else (1.0, 2.0)
    goal = goals.Goal("g", *limits, lambda rows: [(v, str(i)) for i, v in enumerate(values)], smaller)
    assert goal.verdict([]) == verdict


def test_every_goal_is_found_by_rows_as_the_benchmarks_leave_them() -> None:
    """The worst of two shapes of each; a row of another kind, pass or shape changes nothing."""
    both = {"pass": "forward+backward"}
    absorbed = {"what": "absorbed training", "H": 16, "D": 128, "K": 10, **both}
    rows = [
        row(2.0, "absorbed", **absorbed),
        row(3.0, "materialised", **absorbed),
        row(2.4, "auto", **absorbed),
        row(4.0, "auto", **{**absorbed, "K": 40, "over_best": 1.01}),
        row(0.1, "SDPA", **absorbed),
        row(1.0, "absorbed", "d", what="decode", model="7.5B", batch=64, K=10, share_of_floor=0.8),
        row(6.0, "materialised", "d", what="decode", model="7.5B", batch=64, K=10, share_of_floor=0.1),
        row(9.0, "absorbed", "e", what="decode", model="7.5B", batch=64, K=2, share_of_floor=0.2),
        row(5e-5, group="o", what="overhead"),
        row(9e-5, "SDPA efficient", "o", what="overhead"),
        row(0.7, "warm cache", "f", what="first call", cold_s=21.0),
        row(1.0, group="m", what="memory", extra_share=0.015),
        row(1.0, "einsum", "m", what="memory", extra_share=0.9),
        row(1.0, what="gather", group="q", share_of_floor=0.85),
        row(2.0, "retro_kernels, read in place", "p", what="pinned gather", count=8),
        row(1.0, "copy, no gather", "p", what="pinned gather", count=8),
        row(2.0, group="r", what="gather and embedding"),
        row(3.0, "gather, then F.embedding", "r", what="gather and embedding"),
        row(1.0, "ahead", "t", what="training", stall_share=0.02),
        row(1.0, "at hand", "t", what="training"),
    ]
    found = verdicts(rows)
    assert found["absorbed over materialised in training, D 128, K = 10"] == ("1.5×", "H16 D128 K10", "met")
    assert found['projection="auto" over the better of the two'] == ("1.2", "H16 D128 K10", "MISSED")
    assert found["absorbed decoding, share of bandwidth, K = 10"][::2] == ("0.8", "met")
    assert found["absorbed decoding, share of bandwidth, K = 40"][2] == "not measured"
    assert found["absorbed decoding over K/V decoding, 7.5B"][::2] == ("6×", "met")
    assert found["absorbed decoding over K/V decoding, 172M"][2] == "not measured"
    assert found["CPU overhead, forward without gradients"] == ("50 µs", "o", "MISSED")
    assert found["CPU overhead, forward + backward"][2] == "not measured"
    assert found["first call, warm cache"] == ("0.7 s", "f", "met")
    assert found["first call, empty cache"][::2] == ("21 s", "MISSED")
    assert found["peak memory beyond inputs, outputs and gradients"][::2] == ("1.5 %", "met")
    assert found["gather on the GPU, share of copy bandwidth"][::2] == ("0.85", "met")
    assert found["gather out of pinned memory, share of the rate of a copy"][::2] == ("0.5", "MISSED")
    assert found["gather and embedding in one kernel over the two"][::2] == ("1.5×", "aim")
    assert found["training with live retrieval: stall, share of the step"][::2] == ("2 %", "met")


def test_a_graph_with_less_recall_is_no_opponent() -> None:
    turn = {"what": "search in turn", "n": 1_000_000, "recall": 0.95}
    rows = [row(1.0, "chosen", **turn, default=True), row(1.5, "graph", **turn, default=False)]
    rows += [row(0.1, "graph", **{**turn, "recall": 0.949}, default=False)]
    rows += [row(0.1, "graph", **{**turn, "n": 10}, default=False)]
    goal = next(g for g in goals.CPU_GOALS if g.name.startswith("search"))
    assert goal.verdict(rows) == ("1.5×", "1,000,000 chunks", "met")


def test_a_report_names_every_goal_and_counts_what_is_missed() -> None:
    text, missed = goals.report(result("a", [row(1.0, share_of_floor=0.5)], "NVIDIA chip"))
    assert missed == 1 and text.count("not measured") == len(goals.GPU_GOALS) - 1
    assert len(text.splitlines()) == 2 + len(goals.GPU_GOALS)
    assert "| forward, share of the floor, D 128, K = 2 | ≥ 0.75 | 0.9 | 0.5 | H16 D128 K2 | MISSED |" in text
    assert "| first call, warm cache | ≤ 1 s | 0.5 s |  |  | not measured |" in text
    assert goals.report(result("a", []))[0].count("not measured") == len(goals.CPU_GOALS)


def test_the_price_of_the_table_gradient_is_a_ratio_of_two_runs() -> None:
    rows = [
        row(1.1, **{"pass": "backward"}),
        row(1.0, table_grad=False, **{"pass": "backward"}),
        row(5.0, what="memory"),
    ]
    assert verdicts(rows)["table gradient: backward with over without"] == ("1.1", "H16 D128 K2", "met")


def result(commit: str, rows: list[dict], device: str = "chip") -> dict:
    environment = {
        "device": device,
        "commit": commit,
        "versions": {"torch": "2"},
        "torch_threads": 2,
        "python": "3",
        "date": "2000-01-01",
    }
    return {"environment": environment, "ceilings": {}, "results": rows}


def test_a_merged_file_says_which_commit_a_row_is_from() -> None:
    old = result("a", [row(1.0), row(2.0, "other")])
    both = run.merged(old, result("b", [row(3.0)]))
    assert [(r["case"], r["median_s"], r.get("commit")) for r in both["results"]] == [
        ("retro_kernels", 3.0, None),  # where it was: the others' ratios are to it
        ("other", 2.0, "a"),
    ]
    assert run.merged(old, result("b", [row(3.0)], "another chip"))["results"] == [row(3.0)]
    # ceilings are those of the run, or of the file where the run measured none
    old["ceilings"], new = {"bandwidth": 1.0}, result("b", [row(3.0)])
    assert run.merged(old, new)["ceilings"] == {"bandwidth": 1.0}
    assert run.merged(old, {**new, "ceilings": {"bandwidth": 2.0}})["ceilings"] == {"bandwidth": 2.0}


def test_a_merged_row_says_in_what_else_it_was_measured_differently() -> None:
    old = result(
        "a", [row(1.0), {**row(2.0, "other"), "commit": "z", "environment": {"versions": {"triton": "1"}}}]
    )
    old["environment"]["versions"] |= {"triton": "3", "gone": "1"}
    new = result("b", [row(1.0, "new")])
    new["environment"] |= {"versions": {"torch": "3", "triton": "3"}, "python": "4"}
    kept = run.merged(old, new)["results"][:2]
    assert [r["commit"] for r in kept] == ["a", "z"]
    assert kept[0]["environment"] == {"python": "3", "versions": {"torch": "2"}}
    assert kept[1]["environment"] == {"python": "3", "versions": {"torch": "2", "triton": "1"}}
    back = run.merged({**new, "results": kept}, {**old, "results": [row(5.0, "newest")]})["results"]
    assert "environment" not in back[0] and back[1]["environment"] == {"versions": {"triton": "1"}}


def test_rows_of_a_benchmark_that_is_gone_or_another_go(capsys: pytest.CaptureFixture[str]) -> None:
    def of(test: str, **more: object) -> dict:
        return {**row(1.0, test), "test": test, **more}

    rows = [
        of("a.py::gone[1]"),
        of("a.py::it[1]"),
        of("a.py::it[2]"),
        of("a.py::varies[9]"),
        of("b.py::it[1]"),
    ]
    rows += [of("a.py::form", form=1), of("a.py::form2", form=2), of("a.py::form3"), row(1.0, "says nothing")]
    collected = {
        "a.py::it": {"form": 1, "names": ["a.py::it[1]"]},
        "a.py::varies": {"form": 1, "names": None},
        **{f"a.py::form{x}": {"form": 2, "names": [f"a.py::form{x}"]} for x in ("", "2", "3")},
    }
    new = result("b", [row(3.0, "new")])
    kept = run.merged(result("a", rows), new, collected)["results"]
    names = ["a.py::it[1]", "a.py::varies[9]", "b.py::it[1]", "a.py::form2", "says nothing", "new"]
    assert [r["case"] for r in kept] == names
    said = capsys.readouterr().err
    assert said.count("left out") == 4 and "a.py::gone[1]" in said
    renamed = {**row(3.0, "renamed", "h"), "test": "a.py::it[1]"}
    assert [r["case"] for r in run.merged(result("a", rows[1:2]), result("b", [renamed]))["results"]] == [
        "renamed"
    ]


def test_what_cannot_run_here_takes_no_measured_place_and_what_fails_does() -> None:
    old = result("a", [row(1.0), row(2.0, "peer")])
    absent, failed = ({"group": "g", "case": c, "skipped": "why"} for c in ("peer", "retro_kernels"))
    new = result("b", [row(5.0, "new"), absent, {**failed, "failed": True}])
    found = run.merged(old, new)["results"]
    assert [(r["case"], r.get("median_s")) for r in found] == [
        ("retro_kernels", None),
        ("peer", 2.0),
        ("new", 5.0),
    ]
    assert verdicts(found)["forward, share of the floor, D 128, K = 2"][2] == "not measured"


def test_each_processor_and_gpu_has_its_file(tmp_path: Path) -> None:
    """Nobody's measurements are replaced by another machine's."""
    committed = sorted((BENCH / "results").glob("[cg]pu*.json"))
    for name in ("cpu", "cpu_avx512", "gpu", "gpu_h200"):
        path = BENCH / "results" / f"{name}.json"
        assert run.file_of(json.loads(path.read_text())["environment"]) == path
    for found, name in (
        ({"device": "NVIDIA A100-SXM4-80GB", "processor": "AMD EPYC"}, "gpu_a100_sxm4_80gb"),
        ({"device": "Intel(R) Xeon(R)", "processor": "Intel(R) Xeon(R)"}, "cpu_intel_r_xeon_r"),
    ):
        new = run.file_of(found)
        assert new.name == f"{name}.json" and new not in committed
        first = run.file_of(found, tmp_path)
        assert first.name == f"{name[:3]}.json"
        first.write_text(json.dumps({"environment": {**found, "device": "another"}, "ceilings": {}}))
        (tmp_path / f"{name[:3]}_1.json").write_text(json.dumps({"environment": found}))  # no benchmarks
        own = run.file_of(found, tmp_path)
        own.write_text(json.dumps({"environment": found, "ceilings": {}}))
        assert own.name == new.name and run.file_of(found, tmp_path) == own


CASES = """
import pytest

@pytest.mark.benchmark(group="g")
@pytest.mark.parametrize("x", [1, 2, 3, 4])
def test_it(benchmark, x):
    benchmark.extra_info["case"] = f"case {x}"
    if x == 2:
        pytest.skip("not here")
    assert x != 3, "a wrong result"
    stats = benchmark._make_stats(iterations=1)
    for seconds in (3.0, 1.0, 2.5):
        stats.update(seconds)

test_it.form = 7
"""


def test_every_case_leaves_a_row(tmp_path: Path) -> None:
    """Also one that fails, which would else be missing; and what cases there are, those left out too."""
    (tmp_path / "bench_it.py").write_text(CASES)
    (tmp_path / "conftest.py").write_text((BENCH / "conftest.py").read_text())
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, BENCH / "run.py", "bench_it.py", "-k", "not 4", "--out", out, "--merge"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{BENCH}:{BENCH.parent}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and out.exists(), done.stdout + done.stderr
    one, two, three = json.loads(out.read_text())["results"]
    assert (one["median_s"], one["rounds"], one["test"], one["form"]) == (
        2.5,
        3,
        "bench_it.py::test_it[1]",
        7,
    )
    assert two["skipped"] == "not here" and "failed" not in two and two["case"] == "case 2"
    assert three["failed"] and three["skipped"].startswith("failed: AssertionError: a wrong result")
    assert "| – |  | not here |" in done.stdout and "a wrong result" in done.stdout


def patterns() -> list[re.Pattern[str]]:
    """Of the groups that the benchmarks name."""
    texts = [path.read_text() for path in sorted(BENCH.glob("bench_*.py"))]
    found = {
        name for text in texts for name in re.findall(r'(?:group ?= ?|_group.*\n +return )f"([^"]+)"', text)
    }
    found = {name.replace("{which}", "(forward|backward|forward+backward)") for name in found}
    return [re.compile(re.sub(r"\{.*?\}", ".+", name.replace("+", r"\+"))) for name in found]


@pytest.mark.parametrize(
    "name",
    [
        f"{name}.json"
        for name in (
            "cpu",
            "cpu_avx512",
            "gpu",
            "retrieval",
            "retrieval_avx512",
            "build",
            "build_avx512",
        )
    ],
)
def test_committed_rows_are_of_benchmarks_that_there_are(name: str) -> None:
    known = patterns()
    assert len(known) > 10 and not any(p.fullmatch("cca second call: bias, D64") for p in known)
    opponents = {p.name for p in (*peers.PEERS, peers.WITHOUT_POSITIONS)} | {goals.OURS}
    for found in json.loads((roofline.RESULTS / name).read_text())["results"]:
        assert any(p.fullmatch(found["group"]) for p in known), found["group"]
        assert found.get("extra", {}).get("what") != "core" or found["case"] in opponents, found["case"]


def test_the_script_for_a_gpu_goes_on_where_parts_fail_and_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", BENCH / "gpu.sh", "--rehearse", "gather", "warm", "peers", "search"],
        env={**os.environ, "OUT": str(tmp_path), "PYTHON": "false"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "failed or not begun: gather peers search warm" in done.stdout, (
        done.stdout
    )
    log = (tmp_path / "log.txt").read_text()
    assert all(f"{part}: status 1, " in log for part in ("gather", "warm", "peers", "search"))


def test_tables_show_ratios_to_the_first_row_and_why_a_row_is_missing(tmp_path: Path) -> None:
    rows = [
        row(1e-3, share_of_floor=0.5),
        row(2e-3, "other"),
        {"group": "g", "case": "third", "skipped": "no such"},
    ]
    (tmp_path / "cpu.json").write_text(json.dumps(result("a", rows)))
    readme = "before\n<!-- bench:cpu g -->\nold\n<!-- /bench -->\n<!-- bench:cpu h -->\nold\n<!-- /bench -->\nafter\n"
    text = tables.rendered(readme, tmp_path)
    assert "| g | retro_kernels | 1 ms | 1.00 | 50 % of the floor's speed |" in text
    assert "|  | other | 2 ms | 2.00 |  |" in text and "| – |  | no such |" in text
    assert "old" not in text and text.startswith("before") and text.endswith("after\n")
    assert text.count("retro_kernels") == 1  # the second table is of another group


def test_a_table_of_earlier_rows_alone_has_their_commits(tmp_path: Path) -> None:
    rows = [{**row(1e-3), "commit": "b", "date": "2020-01-02"}, {**row(2e-3, "other"), "commit": "c"}]
    document = "<!-- bench:cpu g -->\n<!-- /bench -->"
    for given, said, other in (
        (rows, "commit b, 2020-01-02; c. ", "Some rows"),
        ([*rows, row(3e-3, "new")], "Some rows are of b, c", "; c."),
    ):
        found = result("a", given)
        (tmp_path / "cpu.json").write_text(json.dumps(found))
        text = tables.rendered(document, tmp_path)
        assert said in text and other not in text
        assert (f"commit a, {found['environment']['date']}" in text) == (len(given) == 3)


def test_a_gpus_report_sets_each_shape_against_the_fastest_of_each_kind(tmp_path: Path) -> None:
    core = {"what": "core", "positions": "bias", "pass": "backward", "table_grad": True, "lengths": False}
    core |= {"H": 16, "D": 64, "K": 2}
    rows = [
        row(1e-3, share_of_floor=0.5, **core),
        *(
            row(s, c, **core)
            for s, c in ((4e-3, "SDPA math"), (2e-3, "SDPA efficient"), (3e-3, "FlexAttention"))
        ),
        row(1e-3, "SDPA without positions", **core),
        {**row(9e-3, share_of_floor=0.1, **{**core, "H": 32}), "group": "other"},
        {**row(7e-3, "retro_kernels", what="gather"), "group": "gather", "commit": "b"},
    ]
    (tmp_path / "gpu.json").write_text(json.dumps(result("a", rows, "NVIDIA H100 80GB HBM3")))
    other = [row(1e-3, share_of_floor=0.9, **core), row(8e-3, "retro_kernels", what="gather")]
    found = [{"n": 10, "what": "search", "recall": 0.99, "build_s": 1.0, "build_processor_s": 2.0}]
    other += [{**row(1e-6, "CAGRA", **extra), "group": "search"} for extra in found]
    (tmp_path / "gpu_h200.json").write_text(json.dumps(result("c", other, "NVIDIA H200")))
    names = ("gpu", "gpu-by-shape", "gpu-around", "gpu-h200-by-shape", "gpu-h200-around", "gpu-h200-search")
    goals, shapes, around, *of_h200 = (
        tables.rendered(f"<!-- bench:{name} -->\n<!-- /bench -->", tmp_path) for name in names
    )
    assert "| D 64 K 2 | 1 ms | 0.90 |" in of_h200[0] and "| retro_kernels | 8 ms | 1.00 |" in of_h200[1]
    assert "| 10 | CAGRA | 0.990 | 1,000,000 |" in of_h200[2]
    assert "| goal | at least | aim | H200 | H100 |" in goals and "chip" not in goals
    assert "| backward without table gradient, share of the floor, D 64 |" in goals
    assert "| additive bias, learned | backward | D 64 K 2 | 1 ms | 0.50 | 2.00x | 3.00x |" in shapes
    assert "9 ms" not in shapes and "7 ms" not in shapes
    assert "| gather | retro_kernels | 7 ms | 1.00 |" in around and "1 ms" not in around
    assert "| goal |" in goals and all("Some rows are of b" in text for text in (goals, shapes, around))


def test_goals_of_gpus_beside_one_another() -> None:
    fields = {"D": 64, "pass": "forward"}
    fast, slow = (result("a", [row(1.0, share_of_floor=x, **fields)]) for x in (0.95, 0.5))
    lines = goals.beside({"X200": fast, "X100": slow}).splitlines()
    assert lines[0] == "| goal | at least | aim | X200 | X100 |" and len(lines) == 2 + len(goals.GPU_GOALS)
    assert "| forward, share of the floor, D 64, K = 2 | ≥ 0.7 | 0.87 | 0.95, aim | 0.5, MISSED |" in lines
    assert sum(line.endswith("| not measured | not measured |") for line in lines) == len(goals.GPU_GOALS) - 1


def test_a_goal_over_opponents_names_those_that_were_absent() -> None:
    some = [row(1.0, **{"pass": "forward"}), row(2.0, "SDPA efficient"), row(9.0, "SDPA math")]
    every = [*some, row(1.5, "SDPA cudnn")]
    lines = goals.beside({"X200": result("a", every), "X100": result("a", some)}).splitlines()
    name = "over the best masked SDPA: forward"
    assert f"| {name} | ≥ 1.4× | 2× | 1.5×, met | 2×, aim (without SDPA cudnn) |" in lines


def test_an_unpacked_faiss_has_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise run.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(run.metadata, "version", version)
    for fields, name in (({}, "faiss-cpu"), ({"StandardGpuResources": None}, "faiss-gpu")):
        monkeypatch.setitem(sys.modules, "faiss", types.SimpleNamespace(__version__="1.9", **fields))
        assert run.environment()["versions"] == {name: "1.9"}
    monkeypatch.setitem(sys.modules, "faiss", None)  # none at all
    assert run.environment()["versions"] == {}


def test_a_long_cell_of_the_demo_widens_no_other() -> None:
    environment = {"device": "chip", "cores": 2, "versions": {"torch": "2"}, "commit": "a", "date": "d"}
    report = "corpus\n\n|        |      |\n|--------|------|\n| short  | 1    |\n| longer | long |\n"
    lines = tables.demo_report({"environment": environment, "report": report}).splitlines()
    assert "| short | 1 |" in lines and "|---|---|" in lines and "  " not in "".join(lines)
