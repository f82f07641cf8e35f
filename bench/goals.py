"""What was measured against what was aimed at: one line a goal, from a result file.

    python bench/goals.py                          # bench/results/gpu.json
    python bench/goals.py bench/results/cpu.json

A goal covers several shapes; the worst of them is what counts, and it is named. Verdicts: "aim", "met", "MISSED" or
"not measured". Exit status 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
OURS = "retro_kernels"
OTHER_IMPLEMENTATIONS = ("retro-pytorch", "labml-nn")
FLEX = (
    "FlexAttention, chunks as batch",
    "FlexAttention, chunks as batch, tiles 64x64",
    "FlexAttention, chunks as batch, tiles 64x128",
    "FlexAttention, block mask 64, max-autotune",
    "FlexAttention, block mask 128",
)
MASKED_SDPA = ("SDPA efficient", "SDPA cudnn", "SDPA math")
"""The opponents of peers.py, by kind, among which the best is sought."""
TARGET_RECALL = 0.95
Row = dict[str, Any]
Found = list[tuple[float, str]]  # values, and where each was measured


@dataclass(frozen=True)
class Goal:
    name: str
    at_least: float
    aim: float
    find: Callable[[list[Row]], Found]
    smaller: bool = False
    """The goal is an upper limit."""
    unit: str = ""

    def limits(self) -> tuple[str, str]:
        """What is to be reached, and what is aimed at."""
        return f"{'≤' if self.smaller else '≥'} {self.at_least:g}{self.unit}", f"{self.aim:g}{self.unit}"

    def verdict(self, rows: list[Row]) -> tuple[str, str, str]:
        """The worst value, where it was measured, and the word for it."""
        found = self.find(rows)
        if not found:
            return "", "", "not measured"
        value, where = (max if self.smaller else min)(found)
        better = (lambda limit: value <= limit) if self.smaller else (lambda limit: value >= limit)
        word = "aim" if better(self.aim) else "met" if better(self.at_least) else "MISSED"
        return f"{value:.3g}{self.unit}", where, word


def select(rows: list[Row], case: str | None = OURS, **fields: Any) -> list[Row]:
    """Measured rows of a case with these fields; a field given as a tuple may have any of its values."""
    return [
        row
        for row in rows
        if "median_s" in row
        and (case is None or row["case"] == case)
        and all(
            row.get("extra", {}).get(name) in (want if isinstance(want, tuple) else (want,))
            for name, want in fields.items()
        )
    ]


def _where(row: Row) -> str:
    extra = row["extra"]
    return " ".join(f"{name}{extra[name]}" for name in ("H", "D", "K", "batch", "count") if name in extra)


def share(**fields: Any) -> Callable[[list[Row]], Found]:
    """Share of the byte floor."""
    return extra("share_of_floor", **fields)


_ABSENT = " (without "


def over(best_of: tuple[str, ...], **fields: Any) -> Callable[[list[Row]], Found]:
    """How many times faster than the best row of these cases in the same group. Which of them has no row there, not
    even one that says why, is named: the best of fewer is less."""

    def find(rows: list[Row]) -> Found:
        found = []
        for ours in select(rows, **fields):
            there = {r["case"]: r.get("median_s") for r in rows if r["group"] == ours["group"]}
            peers = [there[name] for name in best_of if there.get(name) is not None]
            absent = [name for name in best_of if name not in there]
            where = f"{_where(ours)}{_ABSENT}{'; '.join(absent)})" if absent else _where(ours)
            if peers:
                found.append((min(peers) / ours["median_s"], where))
        return found

    return find


def ratio(top: dict[str, Any], bottom: dict[str, Any], case: str = OURS) -> Callable[[list[Row]], Found]:
    """Ours with the fields of `top` over ours with those of `bottom`, shape by shape."""

    def find(rows: list[Row]) -> Found:
        below = {_where(r): r["median_s"] for r in select(rows, case, **bottom)}
        return [
            (r["median_s"] / below[_where(r)], _where(r))
            for r in select(rows, case, **top)
            if _where(r) in below
        ]

    return find


def between(what: str, top: str, bottom: str, **fields: Any) -> Callable[[list[Row]], Found]:
    """Time of case `top` over that of case `bottom` in each group of which the field `what` is set so."""

    def find(rows: list[Row]) -> Found:
        below = {r["group"]: r["median_s"] for r in select(rows, bottom, what=what, **fields)}
        return [
            (r["median_s"] / below[r["group"]], _where(r))
            for r in select(rows, top, what=what, **fields)
            if r["group"] in below
        ]

    return find


def extra(
    name: str, scale: float = 1.0, case: str | None = OURS, **fields: Any
) -> Callable[[list[Row]], Found]:
    return lambda rows: [
        (scale * r["extra"][name], _where(r)) for r in select(rows, case, **fields) if name in r["extra"]
    ]


def seconds(scale: float = 1.0, case: str | None = OURS, **fields: Any) -> Callable[[list[Row]], Found]:
    return lambda rows: [(scale * r["median_s"], r["group"]) for r in select(rows, case, **fields)]


BIAS = {"what": "core", "positions": "bias", "lengths": False}
FIXED, LEARNED = {**BIAS, "table_grad": False}, {**BIAS, "table_grad": True}
RELATIVE = {"what": "core", "positions": "relative", "lengths": False}


def _pass(which: str) -> dict[str, str]:
    return {"pass": which}


GPU_GOALS = (
    Goal(
        "forward, share of the floor, D 128, K = 2",
        0.75,
        0.90,
        share(**LEARNED, **_pass("forward"), D=128, K=2),
    ),
    Goal(
        "forward, share of the floor, D 128, K ≥ 10",
        0.85,
        0.93,
        share(**LEARNED, **_pass("forward"), D=128, K=(10, 40)),
    ),
    Goal(
        "forward, share of the floor, D 64, K = 2",
        0.70,
        0.87,
        share(**LEARNED, **_pass("forward"), D=64, K=2),
    ),
    Goal(
        "forward, share of the floor, D 64, K ≥ 10",
        0.80,
        0.91,
        share(**LEARNED, **_pass("forward"), D=64, K=(10, 40)),
    ),
    Goal(
        "backward without table gradient, share of the floor, D 128",
        0.70,
        0.87,
        share(**FIXED, **_pass("backward"), D=128),
    ),
    Goal(
        "backward without table gradient, share of the floor, D 64",
        0.60,
        0.82,
        share(**FIXED, **_pass("backward"), D=64),
    ),
    Goal(
        "table gradient: backward with over without",
        1.15,
        1.04,
        ratio({**LEARNED, **_pass("backward")}, {**FIXED, **_pass("backward")}),
        smaller=True,
    ),
    Goal(
        "relative keys over additive bias, forward, K = 2",
        1.35,
        1.15,
        ratio({**RELATIVE, **_pass("forward"), "K": 2}, {**LEARNED, **_pass("forward"), "K": 2}),
        smaller=True,
    ),
    Goal(
        "relative keys over additive bias, forward, K = 40",
        1.08,
        1.03,
        ratio({**RELATIVE, **_pass("forward"), "K": 40}, {**LEARNED, **_pass("forward"), "K": 40}),
        smaller=True,
    ),
    Goal(
        "over the best FlexAttention: forward",
        1.1,
        1.5,
        over(FLEX, **LEARNED, **_pass("forward")),
        unit="×",
    ),
    Goal(
        "over the best FlexAttention: backward",
        1.25,
        1.7,
        over(FLEX, **FIXED, **_pass("backward")),
        unit="×",
    ),
    Goal(
        "over the best FlexAttention: backward with learned table",
        2,
        4,
        over(FLEX, **LEARNED, **_pass("backward")),
        unit="×",
    ),
    Goal(
        "over the best FlexAttention: relative keys, forward + backward",
        1.8,
        3,
        over(FLEX, **RELATIVE, **_pass("forward+backward")),
        unit="×",
    ),
    Goal(
        "over FlexAttention as one writes it first: forward",
        1.8,
        3,
        over(FLEX[:1], **LEARNED, **_pass("forward")),
        unit="×",
    ),
    Goal("over einsum: forward", 4, 7, over(("einsum",), **LEARNED, **_pass("forward")), unit="×"),
    Goal("over einsum: backward", 4, 7, over(("einsum",), **LEARNED, **_pass("backward")), unit="×"),
    Goal(
        "over the best masked SDPA: forward",
        1.4,
        2,
        over(MASKED_SDPA, **LEARNED, **_pass("forward")),
        unit="×",
    ),
    Goal(
        "over the best masked SDPA: forward + backward with bias gradient",
        1.8,
        3,
        over(("SDPA efficient", "SDPA math"), **LEARNED, **_pass("forward+backward")),
        unit="×",
    ),
    Goal(
        "peak memory beyond inputs, outputs and gradients",
        2,
        1,
        extra("extra_share", 100, what="memory"),
        smaller=True,
        unit=" %",
    ),
    Goal(
        "absorbed over materialised in training, D 128, K = 10",
        1.25,
        1.6,
        between("absorbed training", "materialised", "absorbed", D=128, K=10, **_pass("forward+backward")),
        unit="×",
    ),
    Goal(
        "absorbed over materialised in training, D 128, K = 40",
        1.4,
        1.8,
        between("absorbed training", "materialised", "absorbed", D=128, K=40, **_pass("forward+backward")),
        unit="×",
    ),
    Goal(
        'projection="auto" over the better of the two',
        1.03,
        1.0,
        lambda rows: _auto_over_best(rows),
        smaller=True,
    ),
    Goal(
        "absorbed decoding, share of bandwidth, K = 10",
        0.70,
        0.87,
        extra("share_of_floor", case="absorbed", what="decode", K=10),
    ),
    Goal(
        "absorbed decoding, share of bandwidth, K = 40",
        0.70,
        0.87,
        extra("share_of_floor", case="absorbed", what="decode", K=40),
    ),
    Goal(
        "absorbed decoding over K/V decoding, 7.5B",
        4,
        7,
        over(("materialised", "SDPA"), case="absorbed", what="decode", model="7.5B", K=(10, 40)),
        unit="×",
    ),
    Goal(
        "absorbed decoding over K/V decoding, 172M",
        1.4,
        2,
        over(("materialised", "SDPA"), case="absorbed", what="decode", model="172M", K=(10, 40)),
        unit="×",
    ),
    Goal(
        "CPU overhead, forward without gradients",
        40,
        20,
        seconds(1e6, what="overhead", **_pass("forward")),
        smaller=True,
        unit=" µs",
    ),
    Goal(
        "CPU overhead, forward + backward",
        120,
        60,
        seconds(1e6, what="overhead", **_pass("forward+backward")),
        smaller=True,
        unit=" µs",
    ),
    Goal(
        "first call, warm cache",
        1,
        0.5,
        seconds(case="warm cache", what="first call"),
        smaller=True,
        unit=" s",
    ),
    Goal(
        "first call, empty cache",
        20,
        10,
        extra("cold_s", case="warm cache", what="first call"),
        smaller=True,
        unit=" s",
    ),
    Goal(
        "gather on the GPU, share of copy bandwidth",
        0.80,
        0.90,
        extra("share_of_floor", case=None, what="gather"),
    ),
    Goal(
        "gather and embedding in one kernel over the two",
        0.97,
        1.05,
        between("gather and embedding", "gather, then F.embedding", OURS),
        unit="×",
    ),
    Goal(
        "gather out of pinned memory, share of the rate of a copy",
        0.60,
        0.85,
        between("pinned gather", "copy, no gather", f"{OURS}, read in place"),
    ),
    Goal(
        "training with live retrieval: stall, share of the step",
        3,
        1,
        extra("stall_share", 100, case=None, what="training"),
        smaller=True,
        unit=" %",
    ),
)

CPU_GOALS = (
    Goal(
        "module, additive bias, over SDPA with bias",
        1.0,
        1.2,
        between("module", "SDPA with bias", OURS, positions="bias"),
        unit="×",
    ),
    Goal(
        "module, relative positions: time over SDPA with bias",
        1.15,
        1.0,
        between("module", OURS, "SDPA with bias", positions="relative"),
        smaller=True,
    ),
    Goal(
        "module, relative positions, small: over the fastest other implementation",
        1.2,
        1.5,
        over(OTHER_IMPLEMENTATIONS, what="module", size="small", positions="relative"),
        unit="×",
    ),
    Goal(
        "module: bytes kept for the backward over those of SDPA without positions",
        1.0,
        0.95,
        extra("saved_ratio", what="module"),
        smaller=True,
    ),
    Goal("host gather over numpy, warm", 3, 5, between("host gather", "numpy", OURS), unit="×"),
    Goal("host gather over numpy, cold", 4, 6, between("cold gather", "numpy", OURS), unit="×"),
    Goal(
        "search in a million chunks over the best HNSW at equal recall",
        1.4,
        2,
        lambda rows: _default_over_graphs(rows, 1_000_000),
        unit="×",
    ),
    Goal(
        "training with live retrieval: stall, share of the step",
        5,
        2,
        extra("stall_share", 100, case=None, what="training"),
        smaller=True,
        unit=" %",
    ),
)


def _default_over_graphs(rows: list[Row], n: int) -> Found:
    """Queries/s of the index that is chosen by itself over those of a graph, searched in turn, both with the recall."""
    both = [
        [
            r["median_s"]
            for r in select(rows, None, what="search in turn", n=n, default=default)
            if r["extra"]["recall"] >= TARGET_RECALL
        ]
        for default in (True, False)
    ]
    return [(graph / ours, f"{n:,} chunks") for ours in both[0] for graph in both[1]]


def _auto_over_best(rows: list[Row]) -> Found:
    found = []
    for auto in select(rows, "auto", what="absorbed training"):
        if "over_best" in auto["extra"]:  # taken in turn
            found.append((auto["extra"]["over_best"], _where(auto)))
            continue
        rivals = [
            r["median_s"]
            for r in select(rows, None)
            if r["group"] == auto["group"] and r["case"] in ("absorbed", "materialised")
        ]
        if rivals:
            found.append((auto["median_s"] / min(rivals), _where(auto)))
    return found


def report(result: dict[str, Any]) -> tuple[str, int]:
    """The table, and how many goals were missed."""
    rows = result["results"]
    gpu = "NVIDIA" in result["environment"]["device"]
    lines = ["| goal | at least | aim | measured | at | verdict |", "|---|---:|---:|---:|---|---|"]
    missed = 0
    for goal in GPU_GOALS if gpu else CPU_GOALS:
        value, where, word = goal.verdict(rows)
        missed += word == "MISSED"
        lines.append("| " + " | ".join([goal.name, *goal.limits(), value, where, word]) + " |")
    return "\n".join(lines), missed


def beside(results: dict[str, dict[str, Any]]) -> str:
    """The goals of GPUs, and what each GPU, by its name, made of them, without which opponents, if any were absent."""
    lines = [
        "| " + " | ".join(["goal", "at least", "aim", *results]) + " |",
        "|---|---:|---:" + "|---:" * len(results) + "|",
    ]
    for goal in GPU_GOALS:
        verdicts = [goal.verdict(result["results"]) for result in results.values()]
        cells = [
            f"{value}, {word}{''.join(where.partition(_ABSENT)[1:])}" if value else word
            for value, where, word in verdicts
        ]
        lines.append("| " + " | ".join([goal.name, *goal.limits(), *cells]) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument(
        "--gpu", action="store_true", help="a GPU's goals, wherever it was measured (a rehearsal)"
    )
    args = parser.parse_args()
    if not args.file.exists():
        parser.exit(2, f"goals: there is no {args.file}; python bench/run.py writes it.\n")
    result = json.loads(args.file.read_text())
    if args.gpu:
        result["environment"]["device"] = "NVIDIA (rehearsal)"
    text, missed = report(result)
    print(text)
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
