"""What stands between a measurement and a published figure: floors, verdicts, merged result files, tables."""

from __future__ import annotations

import json
from pathlib import Path

import cases
import goals
import pytest
import roofline
import run
import tables
from cases import Case, Shape


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
        row(1.6, "FlexAttention, a"),
        row(1.2, "FlexAttention, b"),
        row(0.5, "SDPA without positions"),
        row(9.9, "SDPA math"),
        row(2.1, "SDPA efficient"),
        row(1.0, group="h", share_of_floor=0.80, H=32),
        row(1.05, "FlexAttention, a", group="h", H=32),
    ]
    found = verdicts(rows)
    assert found["forward, share of the floor, D 128, K = 2"] == ("0.8", "H32 D128 K2", "met")
    assert found["over the best FlexAttention: forward"] == ("1.05×", "H32 D128 K2", "MISSED")
    assert found["over the best masked SDPA: forward"] == ("2.1×", "H16 D128 K2", "aim")
    assert found["absorbed over materialised in training, D 128, K = 10"][2] == "not measured"


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
        ("other", 2.0, "a"),
        ("retro_kernels", 3.0, None),
    ]
    assert run.merged(old, result("b", [row(3.0)], "another chip"))["results"] == [row(3.0)]


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
    (tmp_path / "gpu.json").write_text(json.dumps(result("a", rows)))
    goals, shapes, around = (
        tables.rendered(f"<!-- bench:{name} -->\n<!-- /bench -->", tmp_path)
        for name in ("gpu", "gpu-by-shape", "gpu-around")
    )
    assert "| additive bias, learned | backward | D 64 K 2 | 1 ms | 0.50 | 2.00x | 3.00x |" in shapes
    assert "9 ms" not in shapes and "7 ms" not in shapes
    assert "| gather | retro_kernels | 7 ms | 1.00 |" in around and "1 ms" not in around
    assert "| goal |" in goals and all("Some rows are of b" in text for text in (goals, shapes, around))


def test_a_long_cell_of_the_demo_widens_no_other() -> None:
    environment = {"device": "chip", "cores": 2, "versions": {"torch": "2"}, "commit": "a", "date": "d"}
    report = "corpus\n\n|        |      |\n|--------|------|\n| short  | 1    |\n| longer | long |\n"
    lines = tables.demo_report({"environment": environment, "report": report}).splitlines()
    assert "| short | 1 |" in lines and "|---|---|" in lines and "  " not in "".join(lines)
