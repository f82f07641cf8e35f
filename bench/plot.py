"""The README's picture, docs/gains.png: what retrieval gains, and what the kernels gain, as far as it was measured.

    python bench/plot.py                             # from bench/results/*.json
    python bench/plot.py --demo demo/result.json     # keeps the demo's figures in results/demo.json first

Left: bits per byte of the demo's models (demo.json). Right: chunked cross-attention, forward and backward, beside what
one would write instead: the first group of each kind of positions that a result file holds. Predictions are not drawn.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from run import write

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
TARGET = HERE.parent / "docs" / "gains.png"
OURS = "retro_kernels"
KEPT = ("corpus_sha256", "python", "bits_per_byte", "report")
MODELS = {
    "plain": "plain decoder",
    "off": "RETRO off",
    "on": "RETRO on",
    "shuffled": "RETRO, shuffled neighbours",
}


def gains(folder: Path) -> dict[str, float]:
    """Bits per byte by model; empty where the demo's figures are not there."""
    path = folder / "demo.json"
    bits = json.loads(path.read_text())["bits_per_byte"] if path.exists() else {}
    return {label: bits[name] for name, label in MODELS.items() if name in bits}


def rivals(folder: Path) -> dict[str, list[tuple[str, float]]]:
    """For each kind of positions the group that is drawn: its name with the device, and (case, seconds) of its rows."""
    found: dict[str, tuple[str, list[tuple[str, float]]]] = {}
    for path in sorted(folder.glob("*.json")):
        result: dict[str, Any] = json.loads(path.read_text())
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in result.get("results", []):
            extra = row.get("extra", {})
            if "median_s" in row and extra.get("what") == "core" and extra.get("pass") == "forward+backward":
                groups.setdefault(row["group"], []).append(row)
        for group, rows in groups.items():
            kind = rows[0]["extra"].get("positions", "none")
            if (
                kind != "none"
                and kind not in found
                and OURS in {row["case"] for row in rows}
                and len(rows) > 1
            ):
                title = f"{group}\n{result['environment']['device']}"
                found[kind] = title, [(row["case"], row["median_s"]) for row in rows]
    return dict(found.values())


def draw(folder: Path = RESULTS, target: Path = TARGET) -> bool:
    """Writes the picture; False where nothing was measured yet."""
    bits, groups = gains(folder), rivals(folder)
    panels = (
        [("bits per byte of held-out text, less is better", list(bits.items()), "{:.3f}")] if bits else []
    )
    panels += [(title, [(c, 1e3 * s) for c, s in rows], "{:.3g} ms") for title, rows in groups.items()]
    if not panels:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 3.2), layout="constrained", squeeze=False
    )
    for axis, (title, rows, form) in zip(axes[0], panels, strict=True):
        names, values = [name for name, _ in rows], [value for _, value in rows]
        colours = ["tab:blue" if name in (OURS, MODELS["on"]) else "tab:gray" for name in names]
        bars = axis.barh(names, values, color=colours)
        axis.bar_label(bars, [form.format(value) for value in values], padding=3)
        axis.set_title(title, fontsize=9)
        axis.invert_yaxis()
        axis.margins(x=0.2)
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
        result = json.loads(args.demo.read_text())
        write(RESULTS / "demo.json", {name: result[name] for name in KEPT})
    if draw():
        print(f"written: {TARGET}")
        return 0
    print("nothing was measured yet: run the demo or the benchmarks first")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
