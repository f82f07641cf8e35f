"""How often the right passage is found: recall@1, 5, 20 and MRR of questions whose passage is known.

    python bench/retrieval_quality.py                # → bench/results/retrieval_quality.json
    python bench/retrieval_quality.py --questions 200          # fewer of them, written nowhere unless --out is given

SQuAD 1.1 (dev): each of 10,570 questions against 2,067 paragraphs, without their titles. NQ-open: each of 2,655
questions against the 2,600 gold passages, title and text. Both through the library as anyone uses it: a set is built
with `build_retrieval_set`, and `Retriever.search` is asked. A passage is one document; it is found where its first
chunk is.

    whole passages     a chunk is the whole passage, as in the published figures
    chunks of 64       RETRO's own chunks: what a training step searches

The corpora are read from RETRO_DATA, or from ../shared/data beside the checkout; where they are absent nothing is
measured. The published figures stand beside ours: BM25, k1 0.9, b 0.4, over the same questions and passages.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run import HERE, environment, write
from tables import quality_table
from tqdm import tqdm

from retro_kernels.data.corpus import Document
from retro_kernels.data.tokenizer import Tokenizer
from retro_kernels.retrieval import Retriever, build_retrieval_set

OUT = HERE / "results" / "retrieval_quality.json"
CUTS = (1, 5, 20)
DEPTH = 100
"""Passages looked at; one that comes later counts as not found, in the MRR too."""
CHUNKS = {"whole passages": 2048, "chunks of 64": 64}
RETRIEVERS = {"MiniLM": "dense", "BM25": "bm25"}
PUBLISHED = {
    "SQuAD": {"recall@1": 0.755, "recall@5": 0.909, "recall@20": 0.958, "mrr": 0.824},
    "NQ": {"recall@1": 0.753, "recall@5": 0.907, "recall@20": 0.953},
}
BATCH = 512

Questions = list[tuple[str, int]]  # a question, and the number of its passage


def data_folder() -> Path | None:
    """RETRO_DATA, or ../shared/data beside the checkout; None where there is neither."""
    folder = Path(os.environ.get("RETRO_DATA") or HERE.parent.parent / "shared" / "data")
    return folder if folder.is_dir() else None


def corpora(*parts: str) -> Path | None:
    """Their folder, or what is in it; None, said on standard error, where it is absent."""
    folder = data_folder()
    if folder is not None and (path := folder.joinpath(*parts)).exists():
        return path
    print(
        "skipped: there are no corpora; RETRO_DATA names their folder, or ../shared/data holds them.",
        file=sys.stderr,
    )
    return None


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Those of an xz file, one at a time."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def squad(folder: Path) -> tuple[list[str], Questions]:
    """Paragraphs, and every question to them."""
    passages: list[str] = []
    questions: Questions = []
    for entry in json_lines(folder / "squad" / "squad-v1.1-dev-rebuilt.jsonl.xz"):
        questions += [(qa["question"], len(passages)) for qa in entry["qas"]]
        passages.append(entry["context"])
    return passages, questions


def natural_questions(folder: Path) -> tuple[list[str], Questions]:
    """Gold passages with their titles, each once, and the questions that they answer."""
    numbers: dict[str, int] = {}
    questions: Questions = []
    for entry in json_lines(folder / "nq-open" / "nq-open-oracle.jsonl.xz"):
        gold = next(passage for passage in entry["ctxs"] if passage["isgold"])
        passage = f"{gold['title']}\n{gold['text']}"
        questions.append((entry["question"], numbers.setdefault(passage, len(numbers))))
    return list(numbers), questions


CORPORA = {"SQuAD": squad, "NQ": natural_questions}


def first_ranks(documents: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """int64 [Q]: the place of each gold document among the distinct documents of its row, from 1; 0 where it is not
    among the first DEPTH. documents: int64 [Q, k], best first, −1 = none. gold: int64 [Q]."""
    ranks = np.zeros(len(gold), dtype=np.int64)
    for row, (found, wanted) in enumerate(zip(documents.tolist(), gold.tolist(), strict=True)):
        distinct = list(dict.fromkeys(i for i in found if i >= 0))[:DEPTH]
        if wanted in distinct:
            ranks[row] = distinct.index(wanted) + 1
    return ranks


def figures(ranks: np.ndarray) -> dict[str, float]:
    """recall@1, 5, 20 and MRR of `first_ranks`."""
    found = ranks > 0
    reciprocal = np.divide(1.0, ranks, out=np.zeros(len(ranks)), where=found)
    recall = {f"recall@{cut}": float((found & (ranks <= cut)).mean()) for cut in CUTS}
    return {name: round(value, 4) for name, value in (*recall.items(), ("mrr", float(reciprocal.mean())))}


def ranks_of(
    retriever: Retriever, questions: Questions, numbers: np.ndarray, k: int, name: str
) -> np.ndarray:
    """`first_ranks` of all questions. numbers: int64 [documents of the set], the passage that each of them is."""
    gold = np.array([number for _, number in questions])
    found = []
    for start in tqdm(range(0, len(questions), BATCH), desc=name, unit=f" x{BATCH} questions"):
        rows = retriever.tokenizer.encode_batch([text for text, _ in questions[start : start + BATCH]])
        width = max(map(len, rows))
        padded = torch.tensor([row + [retriever.tokenizer.pad_id] * (width - len(row)) for row in rows])
        _, ids = retriever.search(padded, k)
        documents = retriever.documents(ids).numpy()
        passages = np.where(documents >= 0, numbers[documents], -1)
        found.append(first_ranks(passages, gold[start : start + BATCH]))
    return np.concatenate(found)


def rows_of(
    corpus: str, passages: list[str], questions: Questions, embedder: str | None, workspace: Path
) -> Iterator[dict[str, Any]]:
    """A row for each way to cut passages and each retriever, as it is measured; then the published one."""
    group = f"{corpus}, {len(questions):,} questions, {len(passages):,} passages"
    tokenizer = Tokenizer.train(passages, workspace / f"{corpus}.model")
    # sets keep a text once and in any order of theirs: a title says which passage a document is
    documents = [Document(str(number), text) for number, text in enumerate(passages)]
    for cut, chunk_size in CHUNKS.items():
        path = workspace / f"{corpus}-{chunk_size}"
        begin = time.perf_counter()
        manifest = build_retrieval_set(
            documents, path, tokenizer=tokenizer, embedder=embedder, index="Flat", chunk_size=chunk_size
        )
        built = time.perf_counter() - begin
        for name, kind in RETRIEVERS.items():
            retriever = Retriever.from_pretrained(path, retriever=kind)
            numbers = np.array([int(title) for title in retriever.titles(range(retriever.num_documents))])
            longest = int(np.bincount(np.asarray(retriever.store.document_ids)).max())
            k = min(retriever.num_chunks, DEPTH * min(longest, 4))
            begin = time.perf_counter()
            ranks = ranks_of(retriever, questions, numbers, k, f"{corpus}, {cut}, {name}")
            yield {
                "group": group,
                "case": f"{name}, {cut}",
                "corpus": corpus,
                "questions": len(questions),
                "passages": len(passages),
                "chunks": manifest["num_chunks"],
                "embedder": manifest["embedder"]["name"] if kind == "dense" else None,
                "figures": figures(ranks),
                "questions_per_second": round(len(questions) / (time.perf_counter() - begin), 1),
                "build_s": round(built, 1),
            }
    yield {
        "group": group,
        "case": "BM25, published",
        "corpus": corpus,
        "published": True,
        "figures": PUBLISHED[corpus],
    }


def measure(folder: Path, limit: int | None, embedder: str | None) -> list[dict[str, Any]]:
    """All rows. A limit takes evenly spaced questions and leaves all passages in."""
    rows = []
    with tempfile.TemporaryDirectory() as workspace:
        for corpus, read in CORPORA.items():
            passages, questions = read(folder)
            if limit is not None:
                questions = questions[:: max(1, len(questions) // limit)][:limit]
            for row in rows_of(corpus, passages, questions, embedder, Path(workspace)):
                print(f"{row['group']} | {row['case']} | {row['figures']}", file=sys.stderr)
                rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, help="only so many of each corpus (default: all)")
    parser.add_argument("--embedder", help="a BERT folder or name (default: all-MiniLM-L6-v2)")
    parser.add_argument("--out", type=Path, help=f"result file (default, with all questions: {OUT.name})")
    args = parser.parse_args(argv)
    folder = corpora()
    if folder is None:
        return 0
    rows = measure(folder, args.questions, args.embedder)
    result = {"environment": environment(), "results": rows}
    out = args.out or (OUT if args.questions is None and args.embedder is None else None)
    if out is not None:
        write(out, result)
        print(f"written: {out}", file=sys.stderr)
    print(quality_table(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
