"""The demo on text that quotes itself: RFCs, each with the one that it replaced. Needs the corpora, see below.

    python bench/demo_rfc.py [--out demo-rfc]      # writes bench/results/demo_rfc.json

Of an RFC that obsoletes another, more than half is copied from it (64-word chunks of which at least half stands in the
older text: .59). So here, unlike among the sources of the standard library, there is something to look up; the figures
stand beside the demo's, filtered by leakage as well. The first 45 families are taken, by number of the older RFC.
The corpora are found as in retrieval_quality.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from plot import kept
from retrieval_quality import corpora, json_lines
from run import write

from retro_kernels.demo import demo

TARGET = Path(__file__).resolve().parent / "results" / "demo_rfc.json"
FAMILIES = 45


def families(path: Path, count: int) -> list[dict[str, str]]:
    """All members of the first `count` families that have at least two, of at most 100,000 bytes each."""
    groups: dict[str, list[dict[str, str]]] = {}
    for entry in json_lines(path):
        if len(entry["text"].encode()) <= 100_000:
            groups.setdefault(entry["family"], []).append(entry)
    whole = sorted(
        (name for name, members in groups.items() if len(members) > 1), key=lambda name: (len(name), name)
    )
    return [entry for name in whole[:count] for entry in groups[name]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="demo-rfc")
    args = parser.parse_args()
    path = corpora("rfc", "rfc-families-dev.jsonl.xz")
    if path is None:
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "rfc-families.jsonl"
        with corpus.open("w", encoding="utf-8") as out:
            for entry in families(path, FAMILIES):
                text = {"title": entry["id"], "text": entry["text"]}
                out.write(json.dumps(text) + "\n")
        result = demo(args.out, corpus=corpus)
    write(TARGET, kept(result))
    print(result["report"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
