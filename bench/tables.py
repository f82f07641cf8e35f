"""Result files into Markdown tables, and the tables of the README and docs/measurements.md kept equal to them.

python bench/tables.py            # print the tables of results/*.json
python bench/tables.py --write    # put them between the documents' markers

A file whose rows are no plain times has views of its own: `retrieval` (bench_search.py, one line a set and index),
`retrieval-quality` (retrieval_quality.py, recall of questions), `demo` and `demo-…` (as the demos print them),
`static` (static.py, machine code of the kernels), `gpu` (goals, from gpu.json, an H100's, and gpu_h200.json). These two
files have views with their name in front: `gpu-by-shape` (the operation), `gpu-around` (what surrounds it),
`gpu-search` (as `retrieval`), and `gpu-h200-by-shape` and so on.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import goals
import static

HERE = Path(__file__).resolve().parent
DOCUMENTS = (HERE.parent / "README.md", HERE.parent / "docs" / "measurements.md")
# <!-- bench:cpu --> for a whole result file, <!-- bench:cpu cca forward --> for the groups whose name begins so
MARKER = re.compile(
    r"(<!-- bench:(?P<name>[\w-]+)(?: (?P<only>[^>]*?))? -->\n).*?(?P<end><!-- /bench -->)", re.DOTALL
)


def conditions(result: dict[str, Any]) -> str:
    """A few words that say what a table's figures belong to."""
    environment, ceilings = result["environment"], result.get("ceilings")
    versions = ", ".join(_versions(result))
    made = dict.fromkeys(_made(row, environment) for row in result["results"])
    of_file = _made(environment, environment)
    alone = bool(made) and of_file not in made
    line = (
        f"{environment['device']}, {environment['torch_threads']} threads, Python {environment['python']}, {versions}; "
        f"commit {'; '.join(sorted(made)) if alone else of_file}. Median; ratio to the first row of its group."
    )
    said = dict.fromkeys(row.get("extra", {}).get("conditions") for row in result["results"])
    for text in filter(None, said):
        line += f" {text[0].upper()}{text[1:]}{'' if len(said) == 1 else ' in some rows'}."
    earlier = sorted({row["commit"] for row in result["results"] if "commit" in row})
    if earlier and not alone:
        line += f" Some rows are of {', '.join(earlier)} (the file says which)."
    if ceilings and any("share_of_floor" in row.get("extra", {}) for row in result["results"]):
        line += (
            " Each row's floor is of its own run; the ceilings measured last: "
            f"copy {ceilings['bandwidth'] / 1e9:,.0f} GB/s, matrix product {ceilings['matmul'] / 1e12:,.2f} TFLOP/s."
        )
    return line


def _made(row: dict[str, Any], environment: dict[str, Any]) -> str:
    """A row's commit and day, which are the file's where it names no commit; earlier rows may not know their day."""
    commit, date = (
        (row["commit"], row.get("date")) if "commit" in row else (environment["commit"], environment["date"])
    )
    return commit + (f", {date}" if date else "")


def _versions(result: dict[str, Any]) -> list[str]:
    """Of the packages that have a part in the figures: torch, triton, numpy and what a row is named after, or FAISS
    where something is searched."""
    named = " ".join(row["case"] for row in result["results"])
    searched = {"search", "training"} & {row.get("extra", {}).get("what") for row in result["results"]}
    return [
        f"{name} {version}"
        for name, version in result["environment"]["versions"].items()
        if name in ("torch", "triton", "numpy") or name in named or (searched and name.startswith("faiss"))
    ]


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
    return "\n".join([*_times(result["results"]), "", conditions(result), ""])


def _times(results: list[dict[str, Any]]) -> list[str]:
    lines = ["| measured | case | median | ratio | |", "|---|---|---:|---:|---|"]
    for group in dict.fromkeys(row["group"] for row in results):
        rows = [row for row in results if row["group"] == group]
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
    return lines


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def retrieval_table(result: dict[str, Any]) -> str:
    """Sets of growing size: one row an index, tuned to the recall that the group names; the stall of training with
    live retrieval from a set of that size stands in the row of the index that trained. Where the processor's seconds
    were measured too, all threads together, they stand beside the wall's."""
    rows = [row for row in result["results"] if row.get("extra", {}).get("what") == "search"]
    both = any("build_processor_s" in row["extra"] for row in rows)
    head = [
        "chunks",
        "index",
        "recall@10",
        "queries/s",
        *["per processor-s"] * both,
        "build",
        *["processor"] * both,
    ]
    stalls = any("stall_share" in row["extra"] for row in rows)
    head += ["bytes a chunk", *["stall"] * stalls]
    lines = [_line(head), "|---:|---" + "|---:" * (len(head) - 2) + "|"]
    last = None
    for row in sorted(rows, key=lambda row: row["extra"]["n"]):
        extra = row["extra"]
        size = f"{extra['n']:,}" if extra["n"] != last else ""
        last = extra["n"]
        if "median_s" not in row:
            lines.append(_line([size, row["case"], row["skipped"], *[""] * (len(head) - 3)]))
            continue
        rate, processor = extra.get("queries_per_processor_s"), extra.get("build_processor_s")
        stall = extra.get("stall_share")
        lines.append(
            _line(
                [
                    size,
                    row["case"],
                    f"{extra['recall']:.3f}",
                    f"{1 / row['median_s']:,.0f}",
                    *[_figure(rate, ",.0f")] * both,
                    duration(extra["build_s"]),
                    *["–" if processor is None else duration(processor)] * both,
                    _figure(extra.get("bytes_per_chunk"), ",.0f"),
                    *["" if stall is None else f"{100 * stall:.1f} %"] * stalls,
                ]
            )
        )
    return "\n".join([*lines, "", conditions(result), ""])


def quality_table(result: dict[str, Any]) -> str:
    """Questions whose passage is known: one row a retriever, under the corpus it was asked of."""
    names = ["recall@1", "recall@5", "recall@20", "mrr"]
    lines = [_line(["questions", "retriever", *(n.replace("mrr", "MRR") for n in names)])]
    lines.append("|---|---|" + "---:|" * len(names))
    last = None
    for row in result["results"]:
        cells = [_figure(row["figures"].get(name), ".3f") for name in names]
        lines.append(_line([row["group"] if row["group"] != last else "", row["case"], *cells]))
        last = row["group"]
    environment = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    belongs = f"{environment['device']}, {versions}; commit {environment['commit']}, {environment['date']}."
    return "\n".join([*lines, "", belongs, ""])


STATIC_ROWS = [
    *(f"sm_{arch}/forward-{mode}-{dim}" for arch, mode, dim in [(90, "none", 64), (90, "bias", 64)]),
    *(f"sm_{arch}/forward-relative-{dim}" for arch, dim in [(90, 64), (80, 128), (90, 128), (100, 128)]),
    "sm_120/forward-relative-128",
    *(f"sm_90/backward-{mode}-{dim}" for dim in (64, 128) for mode in ("none", "biasgrad", "relative")),
    *(f"sm_{arch}/backward-relative-128" for arch in (80, 100, 120)),
    "sm_90/decode-relative-64",
    "sm_90/absorbed-decode-896",
]
"""The kernels of the README, in bf16; the file has all."""


def programs(row: dict[str, Any]) -> int:
    """How many of a kernel's programs a multiprocessor holds: by its registers, its shared memory, its warps."""
    registers = static.LIMITS["registers"] // (-(-row["registers"] // 8) * 8 * 32 * row["warps"])
    shared = static.SHARED[row["arch"]][1] // (row["shared"] + 1024)
    warps = 48 if row["arch"] in static.SMALL else 64
    return int(min(registers, shared, warps // row["warps"]))


def static_table(result: dict[str, Any]) -> str:
    """Machine code of kernels for GPUs that need not be here."""
    head = ["kernel", "for", "registers", "spills in the hot loop", "shared memory", "matrix instructions"]
    lines = [_line([*head, "programs a multiprocessor"]), "|---|---|---:|---:|---:|---|---:|"]
    for variant in STATIC_ROWS:
        name, row = next((n, r) for n, r in result["rows"].items() if n.startswith(f"{variant}-bf16:"))
        kernel = name.partition("/")[2].partition("-bf16")[0].rsplit("-", 1)
        lines.append(
            _line(
                [
                    f"{kernel[0].replace('-', ', ').replace('biasgrad', 'bias and its gradient')}, D {kernel[1]}",
                    f"sm_{row['arch']}",
                    f"{row['registers']} x {32 * row['warps']} threads",
                    str(row["spills_hot"]),
                    f"{row['shared'] / 1024:.0f} KiB",
                    ", ".join(f"{count} {op}" for op, count in row["matrix_hot"].items()),
                    str(programs(row)),
                ]
            )
        )
    belongs = f"bf16, Triton {result['triton']}; commit {result['commit'][:12]}, {result['date']}."
    return "\n".join([*lines, "", belongs, ""])


def demo_report(result: dict[str, Any]) -> str:
    """The table as the demo prints it, but for what aligns its columns: a long cell would make all others as wide."""
    environment = result["environment"]
    report = re.sub(r" {2,}\|", " |", re.sub(r"-{3,}", "---", result["report"]))
    return (
        f"{report}\n{environment['device']}, {environment['cores']} cores, torch "
        f"{environment['versions']['torch']}; commit {environment['commit']}, {environment['date']}.\n"
    )


def gpu_goals(folder: Path) -> str:
    """Every goal, on every GPU that was measured, and the conditions of all that the files have."""
    paths = [path for name in GPUS if (path := folder / f"{name}.json").exists()]
    results = [json.loads(path.read_text()) for path in paths]
    names = {" ".join(r["environment"]["device"].split()[:2]).removeprefix("NVIDIA "): r for r in results}
    return "\n\n".join([goals.beside(names), *map(conditions, results)]) + "\n"


def gpu_by_shape(result: dict[str, Any]) -> str:
    """The operation by shape, beside its floor and the fastest of what one would write instead. With 16 heads and
    without lengths: the file has the rest."""
    rows = [r for r in result["results"] if "median_s" in r]
    core = [r for r in rows if r.get("extra", {}).get("what") == "core"]
    head = ["positions", "pass", "shape", "median", "share of the floor", "over SDPA", "over FlexAttention"]
    lines = [_line(head), "|---|---|---|---:|---:|---:|---:|"]
    for row in sorted((r for r in core if r["case"] == goals.OURS), key=_shape):
        extra = row["extra"]
        positions = {"bias": "additive bias", "relative": "relative keys"}.get(extra["positions"], "none")
        if extra["positions"] == "bias":
            positions += ", learned" if extra["table_grad"] else ", fixed"
        both = extra["pass"] == "forward+backward"
        if extra["H"] != 16 or extra["lengths"] or (both and not _fastest(core, row, "SDPA", "Flex")):
            continue
        if positions.endswith("fixed") and extra["pass"] == "forward":
            continue  # the same kernel as for a learned one
        others = [_fastest(core, row, kind) for kind in ("SDPA", "Flex")]
        lines.append(
            _line(
                [
                    positions,
                    extra["pass"],
                    f"D {extra['D']} K {extra['K']}",
                    duration(row["median_s"]),
                    f"{extra['share_of_floor']:.2f}",
                    *(f"{other / row['median_s']:.2f}x" if other else "" for other in others),
                ]
            )
        )
    return "\n".join([*lines, "", conditions(result), ""])


def _shape(row: dict[str, Any]) -> tuple[Any, ...]:
    """Forward first, then by head size and neighbours: beside one another stand what differs in positions."""
    extra = row["extra"]
    return extra["pass"] != "forward", extra["pass"], extra["D"], extra["K"], extra["positions"]


def gpu_around(result: dict[str, Any]) -> str:
    """The absorbed form with 16 heads, the gather, training and decoding."""
    kept = [
        r
        for r in result["results"]
        if "median_s" in r
        and (
            r["extra"].get("what") in ("training", "gather", "decode")
            or (r["extra"].get("what") == "absorbed training" and r["extra"]["H"] == 16 and "+" in r["group"])
        )
    ]
    return "\n".join([*_times(kept), "", conditions(result), ""])


def _fastest(rows: list[dict[str, Any]], ours: dict[str, Any], *kinds: str) -> float | None:
    """Seconds of the fastest row of the same group whose case begins so."""
    found = [
        r["median_s"]
        for r in rows
        if r["group"] == ours["group"] and r["case"].startswith(kinds) and "without" not in r["case"]
    ]
    return min(found, default=None)


VIEWS: dict[str, Callable[[dict[str, Any]], str]] = {
    "retrieval": retrieval_table,
    "retrieval_quality": quality_table,
    "static": static_table,
    "demo": demo_report,
    "demo_rfc": demo_report,
    "demo_factbook": demo_report,
}
"""By the name of the result file; every other one is shown as times."""
GPUS = ("gpu_h200", "gpu")
"""Result files of GPUs."""
OF_GPU: dict[str, Callable[[dict[str, Any]], str]] = {
    "by_shape": gpu_by_shape,
    "around": gpu_around,
    "search": retrieval_table,
}
"""Views of a GPU's file, whose name comes first."""


def rendered(text: str, folder: Path = HERE / "results") -> str:
    """A document's text with every table between its markers made anew from its result file."""

    def one(match: re.Match[str]) -> str:
        stem = match["name"].replace("-", "_")
        if stem == "gpu":
            return match[1] + gpu_goals(folder) + match["end"]
        gpu = re.fullmatch(f"({'|'.join(GPUS)})_({'|'.join(OF_GPU)})", stem)
        file, view = (gpu[1], OF_GPU[gpu[2]]) if gpu else (stem, VIEWS.get(stem, table))
        result = json.loads((folder / f"{file}.json").read_text())
        if only := match["only"]:
            result["results"] = [row for row in result["results"] if row["group"].startswith(only)]
        return match[1] + view(result) + match["end"]

    return MARKER.sub(one, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the tables into the documents")
    args = parser.parse_args()
    if args.write:
        for document in DOCUMENTS:
            document.write_text(rendered(document.read_text()))
        return
    for path in sorted((HERE / "results").glob("*.json")):
        result = json.loads(path.read_text())
        if "results" in result:
            for view in OF_GPU.values() if path.stem in GPUS else (VIEWS.get(path.stem, table),):
                print(f"{path.name}\n\n{view(result)}")
    print(f"goals of GPUs\n\n{gpu_goals(HERE / 'results')}")


if __name__ == "__main__":
    main()
