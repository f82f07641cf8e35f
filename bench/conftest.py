"""Every finished case leaves its row at once, so a run that is cut short keeps what it measured."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
import roofline
import torch


@pytest.fixture(scope="session")
def ceilings() -> roofline.Ceilings:
    """Copy bandwidth and matrix-product rate of this machine, measured in this run."""
    found = roofline.measured()
    _leave({"ceilings": {"bandwidth": found.bandwidth, "matmul": found.matmul}})
    print(f"\ncopy {found.bandwidth / 1e9:,.0f} GB/s, matrix product {found.matmul / 1e12:,.2f} TFLOP/s")
    return found


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Before any is left out: what benchmarks there are in the files that were read, for `run.merged`."""
    found: dict[str, dict[str, Any]] = {}
    for item in items:
        function = item.function  # type: ignore[attr-defined]
        test = found.setdefault(
            _name(item).partition("[")[0], {"form": getattr(function, "form", 1), "names": []}
        )
        if getattr(function, "varies", False):
            test["names"] = None
        else:
            test["names"].append(_name(item))
    _leave({"collected": found})


def _name(item: pytest.Item) -> str:
    return f"{item.path.name}::{item.name}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    fixture = getattr(item, "funcargs", {}).get("benchmark")
    if call.when == "call" and fixture is not None:
        name = item.name.split("[")[0].removeprefix("test_")
        extra = dict(fixture.extra_info)
        row: dict[str, Any] = {
            "group": fixture.group or name,
            "case": extra.pop("case", fixture.param or name),
            "test": _name(item),
        }
        if form := getattr(item.function, "form", None):  # type: ignore[attr-defined]
            row["form"] = form
        if report.passed and fixture.stats:
            stats = fixture.stats.stats
            row |= {"median_s": stats.median, "min_s": stats.min, "max_s": stats.max, "rounds": stats.rounds}
            _leave(row | {"extra": extra} if extra else row)
        elif report.skipped and isinstance(report.longrepr, tuple):
            _leave({**row, "skipped": report.longrepr[2].removeprefix("Skipped: "), "extra": extra})
        elif report.failed and call.excinfo:  # or it would be missing, and an earlier row stand for it
            lines = call.excinfo.exconly().splitlines()
            _leave({**row, "skipped": f"failed: {lines[0][:200]}", "failed": True, "extra": extra})
    return report


def _leave(row: dict[str, Any]) -> None:
    if path := os.environ.get("RETRO_BENCH_ROWS"):
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")


@pytest.fixture(autouse=True)
def _freed_memory() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
