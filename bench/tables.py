"""Result files into Markdown tables, and the README's tables kept equal to them.

python bench/tables.py            # print the tables of results/*.json
python bench/tables.py --write    # put them between the README's markers
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
# <!-- bench:cpu --> for a whole result file, <!-- bench:cpu cca forward --> for the groups whose name begins so
MARKER = re.compile(
    r"(<!-- bench:(?P<name>[\w-]+)(?: (?P<only>[^>]*?))? -->\n).*?(<!-- /bench -->)", re.DOTALL
)


def conditions(result: dict[str, Any]) -> str:
    """A few words that say what a table's figures belong to."""
    environment, ceilings = result["environment"], result.get("ceilings")
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    line = (
        f"{environment['device']}, {environment['torch_threads']} threads, Python {environment['python']}, {versions}; "
        f"commit {environment['commit']}, {environment['date']}. Median; ratio to the first row of its group."
    )
    if ceilings:
        line += (
            f" Floors from the ceilings of the same run: copy {ceilings['bandwidth'] / 1e9:,.0f} GB/s, "
            f"matrix product {ceilings['matmul'] / 1e12:,.2f} TFLOP/s."
        )
    return line


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def note(extra: dict[str, Any]) -> str:
    """What stands beside a time. The fields that only scripts look up (sizes, flags) are left out."""
    parts = []
    if "share_of_floor" in extra:
        parts.append(f"{100 * extra['share_of_floor']:.0f} % of the floor's speed")
    if "extra_bytes" in extra:
        parts.append(
            f"{extra['extra_bytes'] / 2**20:,.1f} MiB beyond inputs, outputs, gradients "
            f"({100 * extra['extra_share']:.1f} %)"
        )
    if "cold_s" in extra:
        parts.append(f"{duration(extra['cold_s'])} with an empty cache")
    parts += [
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in extra.get("shown", {}).items()
    ]
    return ", ".join(parts)


def table(result: dict[str, Any]) -> str:
    """A Markdown table: one row a case, grouped, each beside its ratio to the group's first case (ours)."""
    lines = ["| measured | case | median | ratio | |", "|---|---|---:|---:|---|"]
    order = list(dict.fromkeys(row["group"] for row in result["results"]))
    for group in order:
        rows = [row for row in result["results"] if row["group"] == group]
        first = next((row["median_s"] for row in rows if "median_s" in row), None)
        name = group
        for row in rows:
            if "median_s" in row:
                median, ratio = duration(row["median_s"]), f"{row['median_s'] / first:.2f}"
                beside = note(row.get("extra", {}))
            else:
                median, ratio, beside = "–", "", row["skipped"]
            lines.append(f"| {name} | {row['case']} | {median} | {ratio} | {beside} |")
            name = ""
    return "\n".join([*lines, "", conditions(result), ""])


def rendered(readme: str, folder: Path = HERE / "results") -> str:
    """The README's text with every table between its markers made anew from its result file."""

    def one(match: re.Match[str]) -> str:
        result = json.loads((folder / f"{match['name']}.json").read_text())
        if only := match["only"]:
            result["results"] = [row for row in result["results"] if row["group"].startswith(only)]
        return f"{match[1]}{table(result)}{match[3]}"

    return MARKER.sub(one, readme)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the tables into README.md")
    args = parser.parse_args()
    if args.write:
        README.write_text(rendered(README.read_text()))
        return
    for path in sorted((HERE / "results").glob("*.json")):
        result = json.loads(path.read_text())
        if "results" in result:
            print(f"{path.name}\n\n{table(result)}")


if __name__ == "__main__":
    main()
