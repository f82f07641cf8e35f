"""Evaluation: bits per byte by its definition, one token at a time, against the windows and batches of the script."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import CHUNK, MODEL, SEQUENCE, World, run, watch_reading

from retro_kernels import evaluate as evaluate_module
from retro_kernels import runs
from retro_kernels.config import InputError
from retro_kernels.data.corpus import Document, document_hash, read_documents
from retro_kernels.data.packing import tokenise
from retro_kernels.evaluate import derangement, evaluate, find_neighbours, table, windows
from retro_kernels.generate import generate
from retro_kernels.nn import Retro
from retro_kernels.retrieval import Retriever
from retro_kernels.retrieval.writing import Journal, locked
from retro_kernels.runs import load_run, pick_dtype


def score_by_definition(world: World, held_out: list[Path], window: int, stride: int, on: bool) -> float:
    """Bits of all documents: every token from one forward pass of its own, over what its window has before it."""
    loaded, retriever = load_run(world.run), Retriever.from_pretrained(world.set)
    total = 0.0
    for document in read_documents(held_out):
        tokens = torch.tensor(loaded.tokenizer.encode(document.text))
        for place in range(len(tokens)):
            start = (
                max(0, -(-(place - window) // stride)) * stride
            )  # of the first window that holds the token as a target
            context = tokens[None, start:place] if place else torch.zeros(1, 1, dtype=torch.int64)
            near = retriever(context) if on else None
            with torch.no_grad():
                logits = loaded.model(context, near)[0, -1].double()
            total -= torch.log_softmax(logits, -1)[tokens[place]].item() / math.log(2)
    return total


@pytest.mark.parametrize("window, stride, documents", [(None, None, None), (3 * CHUNK, CHUNK, 1)])
def test_bits_per_byte_is_its_definition(
    world: World,
    window: int | None,
    stride: int | None,
    documents: int | None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """By default in windows as long as a training sequence, moved by half of one."""
    held_out = sorted(world.held_out.iterdir())[:documents]
    result = evaluate(
        world.run, held_out, window=window, stride=stride, batch_size=3, device="cpu", progress=False
    )
    assert "retrieving" not in capfd.readouterr().err
    texts = [document.text for document in read_documents(held_out)]
    size = sum(len(text.encode()) for text in texts)
    assert result["bytes"] == size and result["words"] == sum(len(text.split()) for text in texts)
    for mode in ("off", "on"):
        places = (window or SEQUENCE, stride or SEQUENCE // 2)
        expected = score_by_definition(world, held_out, *places, mode == "on") / size
        assert result["bits_per_byte"][mode] == pytest.approx(expected, rel=2e-6)
    assert len({*result["bits_per_byte"].values()}) == 3
    assert result["filtered"]["1"] == pytest.approx(result["bits_per_byte"]["on"], rel=1e-12)
    assert result["filtered_off"]["1"] == pytest.approx(result["bits_per_byte"]["off"], rel=1e-12)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_logits_are_made_of_what_is_scored(world: World, batch_size: int) -> None:
    """Windows overlap by half, and of all but a document's first one the first half is there to be read only: the first
    ones of the three documents are a batch of their own."""
    loaded, made, needed = load_run(world.plain), [], 1  # after the lone pad
    loaded.model.norm.register_forward_hook(lambda module, args, output: made.append(output[..., 0].numel()))
    evaluate(loaded, [world.held_out], batch_size=batch_size, device="cpu", progress=False)
    lengths = [len(loaded.tokenizer.encode(document.text)) for document in read_documents([world.held_out])]
    every = [w for length in lengths for w in windows(length, SEQUENCE, SEQUENCE // 2)]
    every.sort(key=lambda w: w.start - w.stop)
    for some in ([w for w in every if not w.start], [w for w in every if w.start]):
        for batch in (some[i : i + batch_size] for i in range(0, len(some), batch_size)):
            size, read = batch[0].stop - batch[0].start, batch[0].scored - batch[0].start
            needed += len(batch) * (-(-size // CHUNK) * CHUNK - read)
    assert sum(made) == needed


def test_documents_that_are_better_with_neighbours_are_counted(world: World) -> None:
    paths = sorted(world.held_out.iterdir())
    alone = [evaluate(world.run, [path], device="cpu", progress=False)["bits_per_byte"] for path in paths]
    result = evaluate(world.run, paths, device="cpu", progress=False)
    assert len(alone) == 3 and result["better_on"]["off"] == sum(bits["on"] < bits["off"] for bits in alone)


def test_leakage_is_that_of_ten_neighbours_however_many_are_read(world: World) -> None:
    retriever = Retriever.from_pretrained(world.set)
    corpus = tokenise(read_documents([world.held_out]), retriever.tokenizer, CHUNK)
    found = find_neighbours(corpus, retriever, 1, seed=0, progress=False)
    assert found.ids.shape[1] == 1
    near = retriever(torch.from_numpy(corpus.chunks.reshape(1, -1).astype(np.int64)), num_neighbours=10)
    for u, chunk in enumerate(corpus.chunks.tolist()):
        chunk = chunk[: np.count_nonzero(chunk)]
        longest = 0
        for tokens, length in zip(near.tokens[0, u].tolist(), near.lengths[0, u].tolist(), strict=True):
            match = SequenceMatcher(None, chunk, tokens[:length], autojunk=False)
            longest = max(longest, match.find_longest_match().size)
        assert found.overlap[u] == longest / len(chunk)


def test_text_is_read_as_a_stream(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A document is gone when the next is read, and a bar knows the end."""
    reading = watch_reading(monkeypatch)
    evaluate(world.plain, [world.held_out], device="cpu")
    assert 1 <= reading.most <= 2 and not reading.alive
    assert re.search(r"tokenising: 100%.*character/s", capfd.readouterr().err)


def test_a_processor_with_bf16(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains and generates in it by itself, keeps float32 weights, and evaluates in float32 unless told otherwise."""
    monkeypatch.setattr(runs, "cpu_has_bf16", lambda: True)
    seen: list[torch.dtype] = []
    forward = Retro.forward

    def watched(model: Retro, *args: Any, **options: Any) -> torch.Tensor:
        logits = forward(model, *args, **options)
        seen.append(logits.dtype)
        return logits

    monkeypatch.setattr(Retro, "forward", watched)
    words = ["--data", world.train, "--out", tmp_path / "r", "--set", world.set, "--steps", 2, *MODEL]
    assert run("train", *words) == 0 and set(seen) == {torch.bfloat16}
    loaded = load_run(tmp_path / "r")
    assert loaded.settings["dtype"] == loaded.settings["summary"]["dtype"] == "bf16"
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.float32}
    scores = {}
    for dtype, said in (("auto", "fp32"), ("fp32", "fp32"), ("bf16", "bf16")):
        seen.clear()
        result = evaluate(loaded, [world.held_out], dtype=dtype, device="cpu", progress=False)
        scores[dtype] = result["bits_per_byte"]
        assert result["dtype"] == said and set(seen) == {pick_dtype(said, torch.device("cpu"))}
        assert f"computed in {said}, 2 neighbours (dense)" in table(result)
        assert f"better than off in {result['better_on']['off']} of {result['documents']} doc" in table(
            result
        )
        assert table(result).splitlines()[-1].startswith("r: the longest run of tokens that a chunk shares")
    assert scores["auto"] == scores["fp32"] != scores["bf16"]
    assert scores["bf16"] == pytest.approx(scores["fp32"], rel=0.02)
    made = generate(loaded, "lomi ka " * 12, max_tokens=3, ignore_end=True, device="cpu")
    assert made["tokens"] == 3 and made["chunks"]


def test_windows_score_each_token_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(50):
        stride = int(rng.integers(1, 5)) * CHUNK
        window = stride + int(rng.integers(0, 5)) * CHUNK
        length = int(rng.integers(1, 400))
        scored = [0] * length
        for w in windows(length, window, stride):
            assert w.start % CHUNK == 0 and w.stop - w.start <= window
            for place in range(w.scored + 1, min(w.stop, length - 1) + 1):
                scored[place] += 1
                assert place - w.start >= min(place, window - stride)
        assert scored == [0] + [1] * (length - 1)


def test_derangement(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(50):
        counts = rng.integers(1, 20, rng.integers(2, 8))
        owner = np.repeat(np.arange(len(counts)), counts)
        partner = derangement(owner, seed)
        assert partner is not None and (owner[partner] != owner).all()
        assert np.array_equal(partner, derangement(owner, seed))
        if counts.max() * 2 <= counts.sum():
            assert np.array_equal(np.sort(partner), np.arange(len(owner)))
    owner = np.repeat([0, 1, 2], [60_000, 50, 100])
    begun = time.process_time()
    partner = derangement(owner, seed)
    assert time.process_time() - begun < 2  # 10 s where those beyond the half are drawn one by one
    assert partner is not None and (owner[partner] != owner).all()
    drawn = np.bincount(partner[:60_000])[60_000:]
    assert len(drawn) == 150 and 200 < drawn.min() and drawn.max() < 600  # all alike, 400 expected
    alone = derangement(np.zeros(5, np.int64), seed)  # one document: other chunks of it
    assert alone is not None and sorted(alone) == [0, 1, 2, 3, 4] and (alone != np.arange(5)).all()
    assert derangement(np.zeros(1, np.int64), seed) is None


def test_a_document_of_the_set_does_not_see_itself(world: World) -> None:
    loaded, retriever = load_run(world.run), Retriever.from_pretrained(world.set)
    documents = list(read_documents([world.train]))
    corpus = tokenise(documents, loaded.tokenizer, CHUNK)
    found = find_neighbours(corpus, retriever, 2, 0, progress=False)
    ids = retriever.find_documents([document_hash(d.text) for d in documents]).numpy()
    assert (ids >= 0).all()
    held = sum(x.nbytes for x in vars(found).values() if isinstance(x, torch.Tensor))
    # ids, overlap and control with what is left out of it, but no neighbour's tokens
    assert held == len(corpus.chunks) * (2 * 8 + 8 + 8 + 2)
    for chunk, (tokens, lengths) in enumerate(zip(*found.gather(torch.arange(len(found.ids))), strict=True)):
        own = torch.from_numpy(corpus.tokens(corpus.of_chunks()[chunk]).astype(np.int32)).unfold(0, CHUNK, 1)
        for neighbour, length in zip(tokens, lengths, strict=True):
            if length == 2 * CHUNK:  # would stand in the document as it is, if it came from there
                assert not (own[:, None] == neighbour[:CHUNK]).all(-1).any() or _elsewhere(
                    corpus, chunk, neighbour
                )


def test_nor_in_the_control(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two documents each gets the other's neighbours, which are its own chunks: none of them is shown."""
    loaded, retriever = load_run(world.run), Retriever.from_pretrained(world.set)
    documents = list(read_documents([world.train]))[:2]
    corpus = tokenise(documents, loaded.tokenizer, CHUNK)
    found = find_neighbours(corpus, retriever, 2, 0, progress=False)
    assert found.shuffled is not None and found.own is not None
    ids = retriever.find_documents(corpus.hashes)[torch.from_numpy(corpus.of_chunks())]
    theirs = retriever.documents(found.ids[found.shuffled])
    assert torch.equal(found.own, theirs == ids[:, None]) and 0 < found.own.sum() < found.own.numel()
    shown = {"on": 0, "shuffled": 0}
    before = evaluate_module._Scorer._neighbours

    def counted(self: Any, batch: Any, tokens: Any, found: Any, mode: str) -> Any:
        given = before(self, batch, tokens, found, mode)
        shown[mode] += int((given.lengths > 0).sum())
        return given

    monkeypatch.setattr(evaluate_module._Scorer, "_neighbours", counted)
    evaluate(loaded, documents=documents, found=found, num_neighbours=2, device="cpu", progress=False)
    assert 0 < shown["shuffled"] < shown["on"]


def test_documents_that_come_once(world: World) -> None:
    documents = [Document("a", "lomi ka"), Document("b", "ter mi su")]
    results = [
        evaluate(world.plain, documents=x, device="cpu", progress=False) for x in (documents, iter(documents))
    ]
    assert results[0]["documents"] == 2 and results[0]["bits_per_byte"] == results[1]["bits_per_byte"]


def test_neighbours_that_are_handed_over_belong_to_the_question(world: World) -> None:
    loaded, retriever = load_run(world.run), Retriever.from_pretrained(world.set)
    documents = list(read_documents([world.held_out]))
    found = find_neighbours(tokenise(documents, loaded.tokenizer, CHUNK), retriever, 4, 0, progress=False)
    given: dict[str, Any] = {"documents": documents, "num_neighbours": 4}
    for match, changes in (
        (r"found has 4 neighbours .* num_neighbours is 2\.", {"num_neighbours": None}),
        (r"found has 4 neighbours for each of \d+ chunks; the documents have", {"documents": documents[1:]}),
        ("found takes the place of set and retriever", {"set": world.set}),
        ("found takes the place of set and retriever", {"retriever": "bm25"}),
    ):
        with pytest.raises(InputError, match=match):
            evaluate(loaded, found=found, device="cpu", progress=False, **{**given, **changes})


def _elsewhere(corpus, chunk: int, neighbour: torch.Tensor) -> bool:  # type: ignore[no-untyped-def]
    owner = corpus.of_chunks()
    rows = (corpus.chunks.astype(np.int64) == neighbour[:CHUNK].numpy()).all(1)
    return bool((owner[rows] != owner[chunk]).any())


def test_plain_decoder_and_single_document(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    plain = evaluate(world.plain, [world.held_out], device="cpu", progress=False)
    assert list(plain["bits_per_byte"]) == ["off"] and plain["filtered"] == {} == plain["filtered_off"]
    with_set = evaluate(world.plain, [world.held_out], set=world.set, device="cpu", progress=False)
    assert with_set["bits_per_byte"] == plain["bits_per_byte"]
    assert with_set["filtered_off"]["1"] == pytest.approx(plain["bits_per_byte"]["off"], rel=1e-12)
    one = evaluate(world.run, documents=[Document("a", "lomi")], device="cpu", progress=False)
    assert list(one["bits_per_byte"]) == ["off", "on"] and "only one chunk" in capfd.readouterr().err
    assert (
        one["bits_per_byte"]["on"] == one["bits_per_byte"]["off"]
    )  # shorter than a chunk: nothing to attend to
    text = " ".join(path.read_text() for path in sorted(world.held_out.rglob("*.txt")))[:600]
    several = evaluate(world.run, documents=[Document("a", text)], device="cpu", progress=False)
    assert several["chunks"] > 1 and list(several["bits_per_byte"]) == ["off", "on", "shuffled"]
    assert "only one document" in capfd.readouterr().err


def scored(world: World, **options: Any) -> dict[str, Any]:
    """An evaluation of many small parts, without what was measured of it."""
    settings: dict[str, Any] = {"batch_size": 4, "device": "cpu", "progress": False, **options}
    result = evaluate(settings.pop("run", world.run), [settings.pop("data", world.held_out)], **settings)
    assert result.pop("tokens_per_second") > 0
    return result


def left(run: Path) -> list[Path]:
    return sorted(run.glob("eval-*.partial"))


def interrupted(world: World, monkeypatch: pytest.MonkeyPatch, parts: int, **options: Any) -> Path:
    """The file that an evaluation leaves which was interrupted after so many parts."""
    add, before = Journal.add, left(options.get("run", world.run))

    def last(journal: Journal, part: dict[str, np.ndarray], *key: str) -> dict[str, np.ndarray]:
        nonlocal parts
        parts -= bool(part)
        add(journal, part, *key)
        if parts == 0:
            raise KeyboardInterrupt
        return part

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", last)
        with pytest.raises(KeyboardInterrupt) as said:
            scored(world, **options)
    (path,) = set(left(options.get("run", world.run))) - set(before)
    assert f"is kept in {path}: the same command goes on" in str(said.value)
    return path


def test_interrupted_at_any_moment_the_result_is_the_same(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call does one part more: neighbours, then the batches of all three modes; none is done twice."""
    expected, calls, forward = scored(world), 0, Retro.forward
    assert not left(world.run)

    def stopped(model: Retro, tokens: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        nonlocal calls, budget
        if tokens.shape[1] > 1:  # not a document's first token
            if budget == 0:
                raise KeyboardInterrupt
            calls, budget = calls + 1, budget - 1
        return forward(model, tokens, *rest, **options)

    monkeypatch.setattr(Retro, "forward", stopped)
    interruptions = 0
    while True:
        budget = 1
        try:
            result = scored(world)
            break
        except KeyboardInterrupt:
            interruptions += 1
            assert len(left(world.run)) == 1
    assert result == expected and not left(world.run)
    budget, whole = -1, calls
    assert scored(world) == expected
    assert interruptions == whole - 1 > 5 and calls == 2 * whole


def test_neighbours_are_not_searched_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = scored(world, num_neighbours=3)  # of ten that are found
    interrupted(world, monkeypatch, 1, num_neighbours=3)
    monkeypatch.setattr(Retriever, "__call__", None)
    assert scored(world, num_neighbours=3) == expected and not left(world.run)


def test_another_evaluation_takes_nothing_up(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, data = tmp_path / "run", tmp_path / "held-out"
    shutil.copytree(world.run, run)
    shutil.copytree(world.held_out, data)
    first = interrupted(world, monkeypatch, 5, run=run, data=data)
    content = first.read_bytes()
    options: list[dict[str, Any]] = [
        {"num_neighbours": 3},
        {"batch_size": 3},
        {"window": 3 * CHUNK},
        {"stride": CHUNK},
        {"seed": 1},
        {"retriever": "random"},
        {"dtype": "bf16"},
        {"data": world.train},
    ]
    for option in options:
        assert interrupted(world, monkeypatch, 2, **{"run": run, "data": data, **option}) != first
    assert len(left(run)) == 1 + len(options)
    for option in options[:3]:  # each goes on by itself
        assert scored(world, **{"run": run, "data": data, **option}) == scored(world, **option)
    assert len(left(run)) == 1 + len(options[3:])
    for path in {*left(run)} - {first}:
        path.unlink()
    assert left(run) == [first] and first.read_bytes() == content

    text = (data / "held-out-1.txt").read_text()
    (data / "held-out-1.txt").write_text(text.replace("a", "e", 1))
    changed = scored(world, run=run, data=data)
    assert left(run) == [first] and changed == scored(world, data=data)
    (data / "held-out-1.txt").write_text(text)
    damaged = bytearray(content)
    damaged[len(content) * 2 // 3] ^= 16
    first.write_bytes(damaged)
    assert scored(world, run=run, data=data) == scored(world) and not left(run)

    first.write_bytes(content)
    model = load_run(run)
    with torch.no_grad():
        model.model.get_parameter("norm.weight").mul_(1.5)
    assert scored(world, run=model, data=data) != scored(world)
    assert not left(run)  # what was kept of other weights can never be taken up


def test_a_run_that_cannot_be_written(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = scored(world)
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr("retro_kernels.retrieval.writing.locked", None)
    assert scored(world) == expected
    assert "interrupted, this evaluation will have to begin again" in capfd.readouterr().err


def test_kill_9(world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A process in the middle of writing a part; the same command, and one that another process gives meanwhile."""
    code = (
        "import os, signal, sys\n"
        "from retro_kernels import cli, runs\n"
        "from retro_kernels.retrieval.writing import Journal\n"
        "runs.cpu_has_bf16 = lambda: False\n"
        "add, parts = Journal.add, []\n"
        "def killed(journal, part, *key):\n"
        "    parts.append(part)\n"
        "    if len(parts) == 6:\n"
        "        add(journal, part, *key)\n"
        "        journal._file.truncate(journal._file.tell() - 9)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return add(journal, part, *key)\n"
        "Journal.add = killed\n"
        "cli.main(sys.argv[1:])\n"
    )
    words = ["eval", "--run", world.run, "--data", world.held_out, "--batch-size", 4]
    words += ["--device", "cpu", "--json"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL and done.stdout == "", done.stderr
    (path,) = left(world.run)
    with locked(path, ""):
        assert run(*words) == 2
        assert "Another process is at the same evaluation" in capfd.readouterr().err
    before = path.stat().st_size
    assert before > 0 and run(*words) == 0
    result = json.loads(capfd.readouterr().out)
    result.pop("tokens_per_second")
    assert result == scored(world) and not left(world.run)


def test_documents_without_text_are_left_out(world: World) -> None:
    none, text = Document("a", ""), Document("b", "lomi ka " * 40)
    results = [
        evaluate(world.run, documents=documents, device="cpu", progress=False)
        for documents in ([text, none], [none, text], [text])
    ]
    for result in results:
        result.pop("tokens_per_second")
    assert results[0] == results[1] == results[2] and results[0]["documents"] == 1


def test_json_table_and_plot(world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    words = [
        "eval",
        "--run",
        world.run,
        "--data",
        world.held_out,
        "--set",
        world.set,
        "-k",
        3,
        "--device",
        "cpu",
    ]
    assert run(*words, "--json", "--plot", tmp_path / "curve.png") == 0
    result = json.loads(capfd.readouterr().out)
    assert {"off", "on", "shuffled"} == set(result["bits_per_byte"]) and result["num_neighbours"] == 3
    assert list(result["filtered"])[-1] == "1" and result["words"] > 0 and result["bytes"] > 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1
    assert run(*words) == 0
    shown = capfd.readouterr().out
    assert all(name in shown for name in ("RETRO off", "RETRO on", "RETRO shuffled", "r ≤ 0.125"))
    assert f"{result['bits_per_byte']['on']:.4f}" in shown


def test_no_plot_is_refused_before_the_work(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "--data", world.held_out, "--device", "cpu", "--plot"]
    missing = tmp_path / "no" / "curve.png"
    for plot, model, said in [
        (missing, world.run, f"the folder {missing.parent} does not exist"),
        (world.held_out, world.run, "which exists and is no PNG"),
        (tmp_path / "curve.png", world.plain, "--plot means nothing without neighbours"),
        (world.held_out / "held-out-0.txt", world.run, "which exists and is no PNG"),
        (tmp_path / "curve.png", world.run, "pip install matplotlib"),
    ]:
        if plot == tmp_path / "curve.png" and model == world.run:
            monkeypatch.setitem(sys.modules, "matplotlib", None)
        else:
            pytest.importorskip("matplotlib")
        assert run(*words, plot, "--run", model) == 2
        out, err = capfd.readouterr()
        assert out == "" and len(err.splitlines()) == 1 and said in err
    assert not list(tmp_path.iterdir())


def test_a_plot_that_cannot_be_written_costs_no_evaluation(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A folder that is not to be written to is refused before it, and after a full disk the same command goes on."""
    pytest.importorskip("matplotlib")
    words = ["eval", "--run", world.run, "--data", world.held_out, "--device", "cpu"]
    words += ["--plot", tmp_path / "curve.png"]
    before = set(world.run.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, *_: Path(path) != tmp_path)
        assert run(*words) == 2
    assert f"{tmp_path} cannot be written, where --plot" in capfd.readouterr().err

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert run(*words) == 2
    (kept,) = set(world.run.iterdir()) - before
    said = f"{tmp_path}/curve.png: No space left on device. What is done is kept in {kept}: run the same"
    assert said in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(Journal, "add", None)  # nothing is computed again
    assert run(*words) == 0 and set(world.run.iterdir()) == before and len(list(tmp_path.iterdir())) == 1


def test_what_does_not_fit(world: World, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert (
        run(
            "index",
            world.held_out,
            "--out",
            other,
            "--vocab-size",
            350,
            "--embedder",
            "hashing:64",
            "--chunk-size",
            CHUNK,
        )
        == 0
    )
    with pytest.raises(InputError, match="another tokenizer"):
        evaluate(world.run, [world.held_out], set=other, device="cpu", progress=False)
    with pytest.raises(InputError, match="multiples of the chunk size"):
        evaluate(world.run, [world.held_out], window=SEQUENCE + 1, device="cpu", progress=False)
    with pytest.raises(InputError, match="multiples of the chunk size"):
        evaluate(world.run, [world.held_out], stride=CHUNK + 1, device="cpu", progress=False)
    with pytest.raises(InputError, match="the stride at most the window"):
        evaluate(world.run, [world.held_out], window=CHUNK, stride=2 * CHUNK, device="cpu", progress=False)
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(InputError, match="no document"):
        evaluate(world.run, [empty], device="cpu", progress=False)
    for name, value in {"batch_size": 0, "num_neighbours": 1.5, "window": 16.0}.items():
        with pytest.raises(InputError, match="must be an integer of at least 1"):
            evaluate(world.run, [world.held_out], device="cpu", progress=False, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="dtype is 'fp16'; it must be auto, fp32 or bf16"):
        evaluate(world.run, [world.held_out], device="cpu", progress=False, dtype="fp16")
    asked: dict[str, Any] = {"num_neighbours": 3, "retriever": "bm25"}
    for name, value in asked.items():  # a plain decoder without a set
        with pytest.raises(InputError, match="means nothing without neighbours"):
            evaluate(world.plain, [world.held_out], **{name: value}, device="cpu", progress=False)
    with pytest.raises(InputError, match="no document with text"):
        evaluate(world.run, documents=[Document("a", "")], device="cpu", progress=False)
    with pytest.raises(InputError, match="no training run"):
        evaluate(tmp_path, [world.held_out], device="cpu", progress=False)
