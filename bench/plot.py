"""The README's picture, docs/gains.png: what retrieval gains, and what the kernels gain, as far as it was measured.

    python bench/plot.py                             # from bench/results/*.json
    python bench/plot.py --demo demo/result.json     # keeps the demo's figures in results/demo.json first

First, bits per byte of the demos' models (demo.json, demo_rfc.json, demo_factbook.json); then chunked cross-attention,
forward and backward, beside what one would write instead: on the CPU and on the GPU that was measured last, the first
group of each kind of positions that the file holds. No predictions.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from run import environment, write

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
TARGET = HERE.parent / "docs" / "gains.png"
OURS = "retro_kernels"
KEPT = ("corpus", "corpus_sha256", "python", "bits_per_byte", "report", "seconds")
DEMOS = ("demo.json", "demo_rfc.json", "demo_factbook.json")
TITLES = {"rfc-families.jsonl": "RFCs, those that they replaced in the set"}
MODELS = {
    "plain": "plain decoder",
    "off": "RETRO off",
    "on": "RETRO on",
    "shuffled": "RETRO, shuffled neighbours",
}


def kept(result: dict[str, Any]) -> dict[str, Any]:
    """What is committed of a demo's result.json."""
    retro = result["evaluation"]["retro"]
    return {
        "environment": environment(),
        **{name: result[name] for name in KEPT},
        **{
            name: retro[name]
            for name in ("filtered", "filtered_off", "better_on", "documents", "mean_overlap")
        },
    }


def gains(folder: Path) -> dict[str, dict[str, float]]:
    """By corpus, bits per byte by model; empty where no demo's figures are there."""
    found = {}
    for path in (folder / name for name in DEMOS):
        if path.exists():
            result = json.loads(path.read_text())
            bits = result["bits_per_byte"]
            title = TITLES.get(result["corpus"], result["corpus"])
            found[title] = {MODELS.get(name, name): value for name, value in bits.items()}
    return found


def rivals(folder: Path) -> dict[str, list[tuple[str, float]]]:
    """For the last CPU, the last GPU and each kind of positions the group that is drawn: its name with the device, and
    (case, seconds) of its rows, ours first."""
    found: dict[tuple[bool, str], tuple[str, list[tuple[str, float]]]] = {}
    results: list[dict[str, Any]] = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    measured = (result for result in results if "device" in result.get("environment", {}))
    for result in sorted(measured, key=lambda r: r["environment"].get("date", ""), reverse=True):
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in result.get("results", []):
            extra = row.get("extra", {})
            if (
                "median_s" in row
                and extra.get("what") in ("core", "module")
                and extra.get("pass") == "forward+backward"
            ):
                groups.setdefault(row["group"], []).append(row)
        for group, rows in groups.items():
            positions, device = rows[0]["extra"].get("positions", "none"), result["environment"]["device"]
            kind = ("NVIDIA" in device, positions)
            if (
                positions != "none"
                and kind not in found
                and OURS in {row["case"] for row in rows}
                and len(rows) > 1
            ):
                title = f"{group}\n{device}"
                rows.sort(key=lambda row: row["case"] != OURS)
                found[kind] = title, [(row["case"], row["median_s"]) for row in rows]
    return dict(found[kind] for kind in sorted(found))


def draw(folder: Path = RESULTS, target: Path = TARGET) -> bool:
    """Writes the picture; False where nothing was measured yet."""
    bits, groups = gains(folder), rivals(folder)
    panels = [
        (f"{corpus}:\nbits per byte, less is better", list(b.items()), "{:.4f}") for corpus, b in bits.items()
    ]
    panels += [(title, [(c, 1e3 * s) for c, s in rows], "{:.3g} ms") for title, rows in groups.items()]
    if not panels:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    wide = len(panels) if len(panels) < 4 else 2
    high = -(-len(panels) // wide)
    figure, axes = pyplot.subplots(
        high, wide, figsize=(6.2 * wide, 2.8 * high), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, rows, form) in zip(axes.flat, panels, strict=False):
        names, values = [name for name, _ in rows], [value for _, value in rows]
        ours = (name == OURS or name.startswith(MODELS["on"]) for name in names)
        colours = ["tab:blue" if own else "tab:gray" for own in ours]
        axis.set_title(title, fontsize=9)
        if "ms" in form:
            bars = axis.barh(names, values, color=colours)
            axis.bar_label(bars, [form.format(value) for value in values], padding=3)
            axis.margins(x=0.2)
        else:  # the differences are small beside the values, so points: a bar would have to begin at 0
            axis.scatter(values, names, color=colours)
            for name, value in zip(names, values, strict=True):
                axis.annotate(
                    form.format(value), (value, name), (0, 6), textcoords="offset points", ha="center"
                )
            axis.margins(x=0.2, y=0.2)
            axis.locator_params(axis="x", nbins=5)
            axis.grid(axis="x", alpha=0.3)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, format="png", dpi=130)
    pyplot.close(figure)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, help="result.json of a demo")
    args = parser.parse_args()
    if args.demo:
        write(RESULTS / "demo.json", kept(json.loads(args.demo.read_text())))
    if draw():
        print(f"written: {TARGET}")
        return 0
    print("nothing was measured yet: run the demo or the benchmarks first")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
