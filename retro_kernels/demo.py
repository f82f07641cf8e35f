"""The whole path on text that is already here: tokenizer, retrieval set, two models, evaluation, generation, one table.

The corpus is the sources of the packages of Python's standard library, or any text. Some of its documents are held
out; the others are the retrieval set and the training text. The library's modules outside packages are left out: those
of a package share conventions and phrases, so that there is something to look up.
A decoder without retrieval is trained for most of the steps; then it goes on as it is, and a RETRO made of it goes on
with retrieval, both on the same tokens in the same order; the layers added to it start out copying from neighbours, and
lessons are mixed in (`TrainConfig`). What comes out is what is printed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .config import InputError, TrainConfig, write_whole
from .data.corpus import Document, ReadReport, document_hash, read_documents, split_documents
from .data.packing import tokenise
from .evaluate import draw, evaluate, find_neighbours
from .generate import generate, show_chunks
from .retrieval import Retriever, build_retrieval_set
from .retrieval.build import MadeFromOther
from .runs import TOKENS, checkpoints, load_run, note, write_json
from .train import train

LEFT_OUT = (
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "__pycache__",
)


@dataclass(frozen=True)
class Size:
    """How much of everything, chosen by measurement so that the demo takes less than eight minutes on two cores."""

    train_bytes: int = 1_800_000
    held_out_bytes: int = 120_000
    largest_document: int = 100_000
    held_out_share: float = 0.06
    vocab_size: int = 1024
    preset: str = "retro_tiny"
    model: tuple[str, ...] = ("cca_layers=2,3", "share_encoder_embedding=true")
    steps: int = 560
    retrieval_from: float = 0.75
    """Part of the steps after which RETRO parts from the plain decoder."""
    batch_size: int = 8
    sequence_length: int = 256
    learning_rate: float = 3e-3
    num_neighbours: int = 1
    """K in training; the more of them, the longer the step."""
    evaluated_neighbours: int = 4
    """K in evaluation, which is free to differ."""
    lessons: float = 0.25
    copy: float = 3.0
    added_rate: float = 0.25
    """Of the layers that start out copying, so that they change slowly."""
    prompt_tokens: int = 160
    generated_tokens: int = 160


def demo(
    out: str | os.PathLike[str] = "demo",
    *,
    corpus: str | os.PathLike[str] | None = None,
    steps: int | None = None,
    embedder: str | None = None,
    seed: int = 0,
    size: Size | None = None,
    say: Callable[[str], None] = note,
    progress: bool = True,
) -> dict[str, Any]:
    """Runs all of it in the folder `out` and returns the results, with the table as text under "report".

    corpus: files or a folder instead of the standard library. steps: of each model. embedder: as
    `build_retrieval_set`. size: other amounts. say: is handed what is told on the way.
    In the folder: set/, retro/, plain/, report.md, result.json, curve.png. Interrupted, the same call goes on.
    Raises InputError where there is too little text, or the folder holds something else.
    """
    size = size or Size()
    if steps is not None:
        size = replace(size, steps=steps)
    folder = Path(out)
    _check_target(folder)
    clock = Clock(say)
    if size.steps < 2:
        raise InputError(
            f"demo: steps is {size.steps}; both models need a common step and one of their own, so at least 2."
        )
    documents, source = read_corpus(corpus)
    training, held_out = split(documents, size, seed)
    names = {
        "corpus": "Packages of the standard library" if corpus is None else Path(source).name,
        "corpus_sha256": corpus_hash(documents),
        "python": platform.python_version(),
    }
    say(
        f"Corpus: {source}, {len(documents):,} documents, hash {names['corpus_sha256'][:16]}, Python {names['python']}"
    )
    say(f"Training: {_amount(training)}. Held out: {_amount(held_out)}.")

    clock.start("tokenizer and retrieval set")
    try:
        manifest = build_retrieval_set(
            training, folder / "set", vocab_size=size.vocab_size, embedder=embedder, progress=progress
        )
    except MadeFromOther as other:  # a set can be replaced, the models that were trained with it cannot
        raise InputError(
            f"demo: {folder} holds the demo of something else ({other.differences}). Go on with it with the same "
            "--corpus, --embedder and --seed as before, or give another --out for a new one."
        ) from None
    trained = train_both(folder, training, source, size, seed, clock, progress)

    clock.start("evaluation")
    retriever = Retriever.from_pretrained(folder / "set")
    run = load_run(folder / "retro")
    found = find_neighbours(
        tokenise(held_out, run.tokenizer, run.model.config.chunk_size),
        retriever,
        size.evaluated_neighbours,
        seed,
        progress,
    )
    scores = {
        name: evaluate(
            model,
            documents=held_out,
            found=found,
            num_neighbours=size.evaluated_neighbours,
            device="cpu",
            progress=progress,
        )
        for name, model in (("retro", run), ("plain", load_run(folder / "plain")))
    }

    clock.start("generation")
    prompt = run.tokenizer.decode(run.tokenizer.encode(held_out[0].text)[: size.prompt_tokens])
    text = generate(
        run,
        prompt,
        set=retriever,
        max_tokens=size.generated_tokens,
        temperature=0.8,
        top_p=0.9,
        seed=seed,
        device="cpu",
    )
    clock.stop()

    result: dict[str, Any] = {
        **names,
        "bits_per_byte": {
            "plain": scores["plain"]["bits_per_byte"]["off"],
            **scores["retro"]["bits_per_byte"],
        },
        "training": trained,
        "evaluation": scores,
        "set": {
            "chunks": manifest["num_chunks"],
            "documents": manifest["num_documents"],
            "index": manifest["index"]["factory"],
            "recall": manifest["index"]["recall"],
            "embedder": manifest["embedder"]["name"],
        },
        "seconds": clock.seconds,
        "generation": {"title": held_out[0].title, **text},
    }
    drawn = draw(scores["retro"], folder / "curve.png", {"plain decoder": scores["plain"]})
    result["report"] = report(result)
    write_json(folder / "result.json", result)
    passage = (
        f"## A passage after the first {size.prompt_tokens} tokens of `{held_out[0].title}`\n\n"
        f"```\n{prompt}⟦ from here on generated: ⟧"
        f"{text['text']}\n```\n\n```{show_chunks(text['chunks'])}\n```\n"
    )
    page = [
        result["report"],
        *(["![bits per byte by leakage](curve.png)\n"] if drawn else []),
        passage,
    ]
    write_whole(folder / "report.md", "\n".join(page).encode())
    say(passage)
    say(f"Written: {folder / 'report.md'}")
    return result


def train_both(
    folder: Path,
    documents: list[Document],
    source: str,
    size: Size,
    seed: int,
    clock: Clock,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains on `documents` (of `source`) the models `folder`/retro, with the retrieval set `folder`/set, and
    `folder`/plain, as told above. Returns what was measured of the two, and how much they were trained."""
    parting = max(1, min(size.steps - 1, round(size.retrieval_from * size.steps)))
    common: dict[str, Any] = dict(
        data=(source,),
        preset=size.preset,
        steps=size.steps,
        batch_size=size.batch_size,
        seed=seed,
        device="cpu",
        sequence_length=size.sequence_length,
        learning_rate=size.learning_rate,
        save_every=100,
    )
    decoder = TrainConfig(
        out=str(folder / "plain"),
        tokenizer=str(folder / "set" / "tokenizer.model"),
        model=size.model,
        **common,
    )
    fitted = TrainConfig(
        out=str(folder / "retro"),
        set=str(folder / "set"),
        model=size.model,
        retrofit=str(folder / "decoder"),
        unfreeze=True,
        copy=size.copy,
        added_rate=size.added_rate,
        first_step=parting,
        lessons=size.lessons,
        num_neighbours=size.num_neighbours,
        **common,
    )
    options: dict[str, Any] = dict(documents=documents, resume=True, progress=progress)
    if not (folder / "decoder").exists():
        clock.start("common training")
        newest = max((step for step, _ in checkpoints(folder / "plain")), default=0)
        if newest < parting:
            train(decoder, stop_after=parting - newest, **options)
        _keep(folder / "plain", folder / "decoder")
    clock.start("training RETRO")
    retro = train(fitted, **options)
    clock.start("training the plain decoder")
    plain = train(decoder, **options)
    return {
        "retro": retro,
        "plain": plain,
        "tokens": size.steps * size.batch_size * size.sequence_length,
        "steps": size.steps,
        "parting": parting,
        "num_neighbours": size.num_neighbours,
    }


def _check_target(folder: Path) -> None:
    """InputError where results would replace files that are no demo's."""
    results = [name for name in ("report.md", "result.json", "curve.png") if (folder / name).exists()]
    if results and not (folder / "set").is_dir():
        raise InputError(
            f"demo: {folder} holds {', '.join(results)}, and no demo: that would be replaced. Give another --out."
        )


def _keep(run: Path, copy: Path) -> None:
    """The run as it is now, without its checkpoints and its text; it goes on changing, the copy does not."""
    staged = copy.with_name(f"{copy.name}.tmp-{os.getpid()}")
    ignored = shutil.ignore_patterns("checkpoint-*", TOKENS)
    try:  # it is there already, where a process of the same number was killed meanwhile
        shutil.copytree(run, staged, ignore=ignored, dirs_exist_ok=True)
        os.replace(staged, copy)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def read_corpus(corpus: str | os.PathLike[str] | None) -> tuple[list[Document], str]:
    """The documents, and where they came from."""
    report = ReadReport()
    if corpus is None:
        source = sysconfig.get_paths()["stdlib"]
        documents = list(read_documents([source], include=["*/*.py"], exclude=LEFT_OUT, report=report))
    else:
        source = os.fspath(corpus)
        documents = list(read_documents([source], report=report))
    if warning := report.warning():
        note(warning)
    return documents, source


def corpus_hash(documents: Sequence[Document]) -> str:
    """SHA-256 over the texts, in whatever order they were read."""
    hashes = sorted(document_hash(document.text) for document in documents)
    return hashlib.sha256(b"".join(h.to_bytes(8, "little", signed=True) for h in hashes)).hexdigest()


def split(documents: Sequence[Document], size: Size, seed: int) -> tuple[list[Document], list[Document]]:
    """(training, held out), each a random part of at most so many bytes. Which side a document is on depends
    on its text."""
    unique = list({document.text: document for document in documents}.values())
    training, held_out = split_documents(unique, size.held_out_share, seed)
    training, held_out = (
        _part(side, limit, size.largest_document)
        for side, limit in ((training, size.train_bytes), (held_out, size.held_out_bytes))
    )
    if not training or len(held_out) < 2:
        raise InputError(
            f"The corpus has {len(unique):,} usable documents; a demo needs some to train on and two to hold out. "
            f"Give a folder with more files of up to {size.largest_document:,} bytes."
        )
    return training, held_out


def _part(documents: list[Document], limit: int, largest: int) -> list[Document]:
    """Documents in an order drawn by their text, as many as fit; returned in the order given."""
    taken, total = set(), 0
    for document in sorted(documents, key=lambda d: document_hash(d.text)):
        length = len(document.text.encode())
        if length <= largest and total + length <= limit:
            taken.add(document.text)
            total += length
    return [document for document in documents if document.text in taken]


def report(result: dict[str, Any]) -> str:
    """The table of the README."""
    bpb, training, found = result["bits_per_byte"], result["training"], result["set"]
    retro = result["evaluation"]["retro"]
    rows = [
        ("bits per byte: plain decoder", f"{bpb['plain']:.4f}"),
        ("bits per byte: RETRO off", f"{bpb['off']:.4f}"),
        ("bits per byte: RETRO on", f"{bpb['on']:.4f}"),
        ("bits per byte: RETRO, shuffled neighbours", f"{bpb['shuffled']:.4f}"),
        (
            "held-out documents better on than",
            ", ".join(f"{mode}: {n} of {retro['documents']}" for mode, n in retro["better_on"].items()),
        ),
        (
            "longest run of tokens shared with ten neighbours",
            f"{retro['mean_overlap']:.1%} of a held-out chunk, on average",
        ),
        ("training, plain decoder", f"{training['plain']['tokens_per_second']:,.0f} tokens/s"),
        (
            "training, RETRO with retrieval in the step",
            f"{training['retro']['tokens_per_second']:,.0f} tokens/s",
        ),
        ("share of the step spent waiting for retrieval", f"{training['retro']['stall_share']:.1%}"),
        ("recall@10 of the index", f"{found['recall']:.3f} ({found['index']})"),
        (
            "parameters, plain and RETRO",
            f"{training['plain']['parameters']:,} and {training['retro']['parameters']:,}",
        ),
        (
            "training tokens, each",
            f"{training['tokens']:,} in {training['steps']:,} steps, the first {training['parting']:,} in common",
        ),
        (
            "retrieval set",
            f"{found['chunks']:,} chunks of {found['documents']:,} documents, {found['embedder']}",
        ),
        (
            "neighbours of a chunk",
            f"{training['num_neighbours']} in training, {retro['num_neighbours']} in evaluation",
        ),
        ("held out", f"{retro['documents']} documents, {retro['bytes']:,} bytes"),
        (
            "time",
            ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result["seconds"].items())
            + f"; in all {sum(result['seconds'].values()):.0f} s",
        ),
    ]
    wide = max(len(name) for name, _ in rows), max(len(value) for _, value in rows)
    lines = [
        f"{result['corpus']} (hash {result['corpus_sha256'][:16]}), Python {result['python']}",
        "",
        f"| {'':<{wide[0]}} | {'':<{wide[1]}} |",
        f"|{'-' * (wide[0] + 2)}|{'-' * (wide[1] + 2)}|",
    ]
    lines += [f"| {name:<{wide[0]}} | {value:<{wide[1]}} |" for name, value in rows]
    return "\n".join(lines) + "\n"


def _amount(documents: Sequence[Document]) -> str:
    return f"{len(documents):,} documents, {sum(len(d.text.encode()) for d in documents):,} bytes"


class Clock:
    """Seconds of each stage, announced."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._say, self._name, self._started = say, "", 0.0

    def start(self, name: str) -> None:
        self.stop()
        self._name, self._started = name, time.perf_counter()
        self._say(f"— {name}")

    def stop(self) -> None:
        if self._name:
            self.seconds[self._name] = time.perf_counter() - self._started
            self._name = ""
