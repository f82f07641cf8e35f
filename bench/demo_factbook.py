"""One model, several retrieval sets: the World Factbook of 2023, with what it said in 2016 and in 2020.

    python bench/demo_factbook.py [--out demo-factbook]      # writes bench/results/demo_factbook.json

Tokenizer, training text and the set that is retrieved from in training are of the 2016 edition, without the countries
whose entries of 2023 are scored. The same weights score them without retrieval, and with sets of the editions of 2016,
of 2020 and of both, which hold all countries. The models are trained as the demo's. Interrupted, the same command goes
on. The corpora are found as in retrieval_quality.py.
"""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path
from typing import Any

from retrieval_quality import corpora, json_lines
from run import environment, write

from retro_kernels.data.corpus import Document, document_hash
from retro_kernels.data.packing import tokenise
from retro_kernels.demo import Clock, Size, corpus_hash, train_both
from retro_kernels.evaluate import evaluate, find_neighbours
from retro_kernels.retrieval import Retriever, build_retrieval_set, merge_retrieval_sets
from retro_kernels.runs import load_run, note

TARGET = Path(__file__).resolve().parent / "results" / "demo_factbook.json"
SCORED = 8  # countries


def editions(path: Path) -> dict[str, dict[str, Document]]:
    """By edition and country."""
    found: dict[str, dict[str, Document]] = {}
    for entry in json_lines(path):
        _, edition, _, country = entry["id"].split("/")
        document = Document(f"{entry['title']} ({edition})", entry["text"])
        found.setdefault(edition, {})[country] = document
    return found


def swap(
    folder: Path, books: dict[str, dict[str, Document]], scored: int, size: Size, embedder: str | None = None
) -> dict[str, Any]:
    """What is committed, but for the environment. `books` are of 2016, 2020 and 2023."""
    new = books["2023"]
    shared = sorted(
        set.intersection(*map(set, books.values())), key=lambda name: document_hash(new[name].text)
    )
    held_out = [new[name] for name in shared[:scored]]
    training = [document for name, document in books["2016"].items() if name not in shared[:scored]]
    options: dict[str, Any] = {"embedder": embedder, "shard_chunks": 4096}

    clock = Clock(note)
    clock.start("retrieval sets")
    first = build_retrieval_set(training, folder / "set", vocab_size=size.vocab_size, **options)
    options["tokenizer"] = folder / "set" / "tokenizer.model"
    paths = {name: folder / f"set-{name}" for name in ("2016", "2020", "both")}
    made = {
        name: build_retrieval_set(list(books[name].values()), paths[name], **options)
        for name in ("2016", "2020")
    }
    made["both"] = merge_retrieval_sets([paths["2020"], paths["2016"]], paths["both"])
    trained = train_both(folder, training, "the World Factbook of 2016", size, 0, clock)
    run, plain = load_run(folder / "retro"), load_run(folder / "plain")

    clock.start("evaluation")
    told: dict[str, Any] = {"documents": held_out, "device": "cpu"}
    bits = {"plain decoder": evaluate(plain, **told)["bits_per_byte"]["off"]}
    results = {}
    tokens = tokenise(held_out, run.tokenizer, run.model.config.chunk_size)
    for name, path in paths.items():
        found = find_neighbours(tokens, Retriever.from_pretrained(path), size.evaluated_neighbours, 0, True)
        results[name] = evaluate(run, found=found, num_neighbours=size.evaluated_neighbours, **told)
        bits["RETRO off"] = results[name]["bits_per_byte"]["off"]
        bits[f"RETRO on, {_of(name)}"] = results[name]["bits_per_byte"]["on"]
    bits["RETRO, set of 2020, shuffled"] = results["2020"]["bits_per_byte"]["shuffled"]
    result = {
        "corpus": "World Factbook of 2023, model of 2016",
        "corpus_sha256": corpus_hash([document for book in books.values() for document in book.values()]),
        "python": platform.python_version(),
        "bits_per_byte": bits,
        "overlap": {name: result["mean_overlap"] for name, result in results.items()},
        "better_on": {name: result["better_on"] for name, result in results.items()},
        "filtered": {name: result["filtered"] for name, result in results.items()},
        "filtered_off": {name: result["filtered_off"] for name, result in results.items()},
        "documents": len(held_out),
        "bytes": sum(len(document.text.encode()) for document in held_out),
        "sets": {
            name: {key: of[key] for key in ("num_chunks", "num_documents")} for name, of in made.items()
        },
        "training": {
            "documents": first["num_documents"],
            "tokens": trained["tokens"],
            "steps": trained["steps"],
        },
        "neighbours": {"training": size.num_neighbours, "evaluation": size.evaluated_neighbours},
    }
    return {**result, "report": report(result)}


def _of(name: str) -> str:
    return "set of both" if name == "both" else f"set of {name}"


def report(result: dict[str, Any]) -> str:
    """The table, with what it is of."""
    lines = [
        f"{result['corpus']} (hash {result['corpus_sha256'][:16]}), Python {result['python']}",
        "",
        "| | bits per byte | chunks in the set | longest run shared with ten neighbours |",
        "|---|---:|---:|---:|",
    ]
    about = {f"RETRO on, {_of(name)}": name for name in result["sets"]}
    for label, bits in result["bits_per_byte"].items():
        name = about.get(label)
        held = f"{result['sets'][name]['num_chunks']:,}" if name else ""
        shared = f"{result['overlap'][name]:.1%}" if name else ""
        lines.append(f"| {label} | {bits:.4f} | {held} | {shared} |")
    told, trained, taken = result["neighbours"], result["training"], result["documents"]
    lines += [
        "",
        f"Scored: {taken} countries, {result['bytes']:,} bytes, with {told['evaluation']} neighbours. Trained on "
        f"{trained['tokens']:,} tokens of the other {trained['documents']}, with {told['training']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="demo-factbook")
    args = parser.parse_args()
    path = corpora("factbook", "factbook-2016-2020-2023.jsonl.xz")
    if path is None:
        return 0
    result = swap(Path(args.out), editions(path), SCORED, Size())
    write(TARGET, {"environment": environment(), **result})
    print(result["report"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
