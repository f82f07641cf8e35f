"""Whatever goes wrong during a build, the set is there as before or as it should be, never half, and work is kept."""

import errno
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from retrieval.corpora import build, contents, documents

from retro_kernels.config import InputError
from retro_kernels.data.corpus import Document
from retro_kernels.data.tokenizer import Tokenizer
from retro_kernels.retrieval import build as build_module
from retro_kernels.retrieval import merge as merge_module
from retro_kernels.retrieval import writing
from retro_kernels.retrieval.embedder import HashingEmbedder
from retro_kernels.retrieval.index import Index
from retro_kernels.retrieval.merge import append_to_retrieval_set, merge_retrieval_sets, tune_retrieval_set
from retro_kernels.retrieval.store import MANIFEST, ChunkStore, read_manifest, write_manifest

CORPUS = documents(5, 16)
OTHER = documents(6, 5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    Tokenizer.train([d.text for d in CORPUS], path, 400)
    return path


@pytest.fixture(scope="module")
def expected(tmp_path_factory, model):
    out = tmp_path_factory.mktemp("expected") / "set"
    build(CORPUS, out, tokenizer=model, index="IVF2,SQfp16")
    return contents(out)


KILLED_EVERYWHERE = """
    import os, shutil, signal, sys
    from pathlib import Path
    from retrieval.corpora import build, contents, documents
    from retro_kernels.retrieval import build as build_module, store, writing
    import retro_kernels.retrieval.index, sentencepiece, faiss, torch

    folder, model = Path(sys.argv[1]), sys.argv[2]
    build_module._CUT_SHARDS = 1
    corpus, other = documents(5, 16), documents(6, 5)
    steps = 0

    def counted(function, die_at):
        def call(*args, **options):
            global steps
            steps += 1
            if steps == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)
        return call

    def run(out, die_at, **options):
        # a step: every write, sync and rename, whatever it is for
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)
            faiss.omp_set_num_threads(1)
            for module, name in ((os, "replace"), (os, "rename"), (os, "fsync"), (writing, "_write"),
                                 (build_module.shutil, "rmtree"), (writing, "_exchange")):
                setattr(module, name, counted(getattr(module, name), die_at))
            build(corpus, out, tokenizer=model, index="IVF2,SQfp16", shard_chunks=40, **options)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL, status
            return True
        assert status == 0, status
        return False

    build(corpus, folder / "whole", tokenizer=model, index="IVF2,SQfp16")
    build(other, folder / "before", tokenizer=model)
    expected, before = contents(folder / "whole"), contents(folder / "before")

    # one build is killed again and again, a step later each time
    kills = 0
    while run(folder / "again", 3 + 2 * kills):
        kills += 1
        assert kills < 200
        if (folder / "again").exists():
            assert contents(folder / "again") == expected
    assert contents(folder / "again") == expected
    assert kills >= 5, kills

    # a set that is being replaced is the old one or the new one after a kill at any step
    def replaced(die_at):
        out = folder / f"replaced{die_at}"
        build(other, out, tokenizer=model)
        killed = run(out, die_at, overwrite=True)
        found = contents(out)
        assert found in (before, expected), die_at
        if killed:
            seen.add(found == expected)
        assert not run(out, 0, overwrite=True)
        assert contents(out) == expected
        assert not (folder / f"{out.name}.build").exists(), die_at
        shutil.rmtree(out)
        return killed

    die_at, seen = 1, set()
    while replaced(die_at):
        die_at += 12
    for last in range(die_at - 1, die_at - 14, -1):  # the swap and the tidying up, step by step
        replaced(last)
    assert seen == {False, True} and die_at > 30, (seen, die_at)

    # so is one that only gets another index
    build(corpus, folder / "exact", tokenizer=model)
    exact = contents(folder / "exact")
    again, seen = 2, set()
    while True:
        out = folder / f"indexed{again}"
        shutil.copytree(folder / "exact", out)
        killed = run(out, again)
        found = contents(out)
        assert found in (exact, expected), again
        if not killed:
            break
        seen.add(found == expected)
        assert not run(out, 0)
        assert contents(out) == expected and not (folder / f"{out.name}.build").exists(), again
        again += 4
    assert False in seen and again > 20, (seen, again)
    print("kills", kills, "steps", die_at, again)
"""


def test_kill_9_at_any_moment(model, tmp_path):
    tests = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED_EVERYWHERE), tmp_path, model],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)


class Interrupted(HashingEmbedder):
    """Ctrl-C in the n-th shard."""

    def __init__(self, shards):
        super().__init__(64)
        self.left = shards
        self.texts = 0

    def embed(self, texts, progress=None):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.texts += len(texts)
        return super().embed(texts, progress)


def test_interrupted_work_is_kept_and_not_done_again(model, tmp_path, expected, capsys):
    first, second = Interrupted(3), Interrupted(10**6)
    with pytest.raises(KeyboardInterrupt, match=r"is kept in .*set\.build: the same command goes on"):
        build(CORPUS, tmp_path / "set", tokenizer=model, shard_chunks=10, index="IVF2,SQfp16", embedder=first)
    assert not (tmp_path / "set").exists()
    with pytest.raises(InputError, match="holds unfinished work on something else.*another corpus"):
        build(OTHER, tmp_path / "set", tokenizer=model, shard_chunks=10, index="IVF2,SQfp16")
    manifest = build(
        CORPUS,
        tmp_path / "set",
        tokenizer=model,
        shard_chunks=10,
        index="IVF2,SQfp16",
        embedder=second,
        progress=True,
    )
    assert "taking up unfinished work" in capsys.readouterr().err
    assert first.texts == 30 and second.texts == manifest["num_chunks"] - 30
    assert contents(tmp_path / "set") == expected


def test_unfinished_work_is_dropped_on_demand(model, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build(OTHER, tmp_path / "set", tokenizer=model, embedder=Interrupted(0))
    build(CORPUS, tmp_path / "set", tokenizer=model, overwrite=True)
    assert ChunkStore.open(tmp_path / "set", verify="full").num_documents == 16
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("room", [0, 500, 5_000, 20_000])
def test_full_disk(model, tmp_path, expected, monkeypatch, room):
    build(OTHER, tmp_path / "set", tokenizer=model)
    before = contents(tmp_path / "set")
    written = 0
    write = writing._write

    def limited(file, values):
        nonlocal written
        written += values.nbytes
        if written > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, values)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "_write", limited)
        with pytest.raises(
            OSError, match="No space left on device. What is done is kept in .*set.build"
        ) as error:
            build(CORPUS, tmp_path / "set", tokenizer=model, index="IVF2,SQfp16", overwrite=True)
        assert error.value.errno == errno.ENOSPC
    assert contents(tmp_path / "set") == before
    build(CORPUS, tmp_path / "set", tokenizer=model, index="IVF2,SQfp16", overwrite=True)
    assert contents(tmp_path / "set") == expected


def test_a_disk_that_is_full_when_the_index_is_written(model, tmp_path, expected, monkeypatch):
    """FAISS says why it failed, but not with a number."""

    def full(self, path):
        raise OSError("The index could not be written: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Index, "save", full)
        with pytest.raises(
            OSError,
            match="The build of .*set stopped: The index .*No space left on device. What is done is kept",
        ):
            build(CORPUS, tmp_path / "set", tokenizer=model, index="IVF2,SQfp16")
    build(CORPUS, tmp_path / "set", tokenizer=model, index="IVF2,SQfp16")
    assert contents(tmp_path / "set") == expected


def on_a_small_file_system(program, size, *arguments):
    """Standard output of a Python program to which /mnt is an empty file system of `size`; skips where this user may
    not mount one."""
    tests = Path(__file__).resolve().parents[1]
    script = f'mount -t tmpfs -o size={size} tmpfs /mnt && exec "$0" -c "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, sys.executable, textwrap.dedent(program), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip(f"cannot mount a small file system here: {done.stderr.strip().splitlines()[0]}")
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_disk_that_is_really_full(model):
    """A file system of 64 KiB, where this user may mount one."""
    found = on_a_small_file_system(
        """
        import sys
        from pathlib import Path
        from retrieval.corpora import build, documents
        try:
            build(documents(5, 60), Path("/mnt/set"), tokenizer=sys.argv[1])
        except OSError as error:
            print(error)
        print(Path("/mnt/set").exists())
        """,
        "64k",
        model,
    )
    assert "No space left on device" in found and "is kept in /mnt/set.build" in found
    assert found.strip().endswith("False")


def test_a_file_system_that_is_read_only(model):
    """A set there is opened and searched; whatever would write to it says so, and changes nothing."""
    found = on_a_small_file_system(
        """
        import os, sys
        from pathlib import Path
        from retrieval.corpora import build, contents, documents
        from retro_kernels.config import InputError
        from retro_kernels.retrieval import Retriever, append_to_retrieval_set, tune_retrieval_set
        out, corpus = Path("/mnt/set"), documents(5, 16)
        build(corpus, out, tokenizer=sys.argv[1], index="IVF2,SQfp16")
        before = contents(out)
        if os.system("exec 2>&1; mount -o remount,ro /mnt"):
            sys.exit("mount: cannot make it read-only")
        def refused(what, call):
            try:
                call()
            except (InputError, OSError) as error:
                print(what, "|", type(error).__name__, "|", error)
        refused("build", lambda: build(documents(6, 5), out, tokenizer=sys.argv[1], overwrite=True))
        refused("append", lambda: append_to_retrieval_set(out, documents(6, 5), embedder="hashing:64", progress=False))
        refused("tune", lambda: tune_retrieval_set(out))
        build(corpus, out, tokenizer=sys.argv[1], index="IVF2,SQfp16")
        hits = Retriever.from_pretrained(out, verify="full").search_text(corpus[3].text[:80], 2)
        print("found", len(hits), contents(out) == before)
        """,
        "16m",
        model,
    )
    lines = found.strip().splitlines()
    assert [line.split(" | ")[0] for line in lines[:3]] == ["build", "append", "tune"], found
    assert all("Read-only file system" in line and "/mnt" in line for line in lines[:3]), found
    assert lines[3] == "found 2 True"


def test_two_builders(model, tmp_path):
    (tmp_path / "set.build").mkdir()
    with writing.locked(tmp_path / "set.build" / "lock", "busy"):
        with pytest.raises(InputError, match="Another process is building .*set. Wait for it"):
            build(CORPUS, tmp_path / "set", tokenizer=model)
    build(CORPUS, tmp_path / "set", tokenizer=model)


def test_places_that_cannot_be_written(model, tmp_path):
    for place in ("/proc/set", "/dev/null/set"):
        with pytest.raises((InputError, NotADirectoryError), match="set"):
            build(CORPUS, Path(place), tokenizer=model)
    if os.geteuid() != 0:  # root writes everywhere
        tmp_path.chmod(0o500)
        with pytest.raises(InputError, match="cannot be made: Permission denied"):
            build(CORPUS, tmp_path / "set", tokenizer=model)


def test_a_damaged_set_is_named_and_can_be_replaced(model, tmp_path):
    out = tmp_path / "set"
    build(CORPUS, out, tokenizer=model)
    os.truncate(out / "chunks.npy", 100)
    with pytest.raises(InputError, match="damaged.*chunks.npy has 100 bytes"):
        build(CORPUS, out, tokenizer=model)
    build(CORPUS, out, tokenizer=model, overwrite=True)
    content = bytearray((out / "embeddings.npy").read_bytes())
    content[-3] ^= 16
    (out / "embeddings.npy").write_bytes(content)
    with pytest.raises(InputError, match="damaged.*the content of embeddings.npy has changed"):
        build(CORPUS, out, tokenizer=model)
    build(CORPUS, out, tokenizer=model, overwrite=True)
    ChunkStore.open(out, verify="full")
    os.truncate(out / MANIFEST, 100)
    with pytest.raises(InputError, match="damaged.*is no JSON"):
        build(CORPUS, out, tokenizer=model)
    build(CORPUS, out, tokenizer=model, overwrite=True)
    ChunkStore.open(out, verify="full")


def test_input_that_changes_meanwhile(model, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("before " * 100)
    survey = build_module._survey

    def survey_then_edit(*args):
        corpus = survey(*args)
        path.write_text("after " * 100)
        return corpus

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "_survey", survey_then_edit)
        with pytest.raises(InputError, match="changed while it was being read"):
            build(path, tmp_path / "set", tokenizer=model)
    assert not (tmp_path / "set").exists()


def test_vectors_that_are_no_numbers(model, tmp_path):
    class Broken(HashingEmbedder):
        def embed(self, texts, progress=None):
            return super().embed(texts, progress) * float("nan")

    with pytest.raises(InputError, match="NaN"):
        build(CORPUS, tmp_path / "set", tokenizer=model, embedder=Broken(64))
    assert not (tmp_path / "set").exists()


def test_without_an_exchange_of_names(model, tmp_path, expected, monkeypatch):
    monkeypatch.setattr(writing, "_exchange", lambda *_: False)
    out = tmp_path / "set"
    build(OTHER, out, tokenizer=model)
    build(CORPUS, out, tokenizer=model, index="IVF2,SQfp16", overwrite=True)
    assert contents(out) == expected
    before = contents(out)

    def rename(source, target):
        if Path(target) == out and Path(source).name == "set":
            raise KeyboardInterrupt
        rename_really(source, target)

    rename_really = os.rename
    with monkeypatch.context() as patch:
        patch.setattr(writing.os, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            build(OTHER, out, tokenizer=model, overwrite=True)
    assert not out.exists()  # between the two renames
    tuned = tune_retrieval_set(out)
    assert contents(out) == {**before, MANIFEST: contents(out)[MANIFEST]} and tuned["num_documents"] == 16
    with pytest.raises(InputError, match="another corpus"):
        build(OTHER, out, tokenizer=model)
    build(OTHER, out, tokenizer=model, overwrite=True)
    assert ChunkStore.open(out, verify="full").num_documents == 5
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("exchange", [True, False])
def test_names_beside_the_set_belong_to_the_user(model, tmp_path, expected, monkeypatch, exchange):
    """Backups called .old are neither taken back nor deleted, folders called .build or .append are not emptied."""
    if not exchange:
        monkeypatch.setattr(writing, "_exchange", lambda *_: False)
    out = tmp_path / "mine"
    build(CORPUS, out, tokenizer=model, index="IVF2,SQfp16")
    os.rename(out, tmp_path / "mine.old")
    build(OTHER, out, tokenizer=model)
    assert ChunkStore.open(out).num_documents == 5
    build(OTHER, out, tokenizer=model, chunk_size=8, overwrite=True)
    assert contents(tmp_path / "mine.old") == expected

    folder = tmp_path / "theirs.build"
    (folder / "set").mkdir(parents=True)
    (folder / "set" / "thesis.tex").write_text("x")
    for plan in (None, "{", "[]", '{"rooms": 3}'):
        if plan:
            (folder / "plan.json").write_text(plan)
        for overwrite in (False, True):
            with pytest.raises(InputError, match="holds other files .*Move it away"):
                build(CORPUS, tmp_path / "theirs", tokenizer=model, overwrite=overwrite)
    assert (folder / "set" / "thesis.tex").exists() and not (folder / "lock").exists()

    os.rename(tmp_path / "mine.old", tmp_path / "mine.append")
    with pytest.raises(InputError, match="mine.append is where .*holds something else. Move it away"):
        append_to_retrieval_set(out, CORPUS[:2], progress=False)
    assert contents(tmp_path / "mine.append") == expected


def test_work_whose_plan_cannot_be_read_is_kept(model, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build(CORPUS, tmp_path / "set", tokenizer=model, shard_chunks=10, embedder=Interrupted(2))
    folder = tmp_path / "set.build"
    plan = (folder / "plan.json").read_text()
    (folder / "plan.json").unlink()
    (folder / "plan.json").mkdir()  # root reads whatever is a file
    for overwrite in (False, True):
        with pytest.raises(OSError):
            build(CORPUS, tmp_path / "set", tokenizer=model, shard_chunks=10, overwrite=overwrite)
    (folder / "plan.json").rmdir()
    (folder / "plan.json").write_text(plan)
    again = Interrupted(10**6)
    manifest = build(CORPUS, tmp_path / "set", tokenizer=model, shard_chunks=10, embedder=again)
    assert again.texts == manifest["num_chunks"] - 20


def test_interrupted_appending(model, tmp_path):
    out = tmp_path / "set"
    build(CORPUS, out, tokenizer=model)
    before = contents(out)
    options = dict(progress=False, shard_chunks=10)
    with pytest.raises(KeyboardInterrupt):
        append_to_retrieval_set(out, OTHER, embedder=Interrupted(2), **options)
    assert contents(out) == before
    second = Interrupted(10**6)
    append_to_retrieval_set(out, OTHER, embedder=second, **options)
    store = ChunkStore.open(out, verify="full")
    new = sum(len(store.document_chunks(i)) for i in range(16, 21))
    assert store.num_documents == 21 and second.texts == new - 20
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_two_appenders_lose_nothing(model, tmp_path, monkeypatch):
    out = tmp_path / "set"
    build(CORPUS, out, tokenizer=model)
    stale = ChunkStore.open(out)
    append_to_retrieval_set(out, OTHER, embedder="hashing:64", progress=False)
    build([Document("x", "some more text")], tmp_path / "more", tokenizer=model)
    monkeypatch.setattr(merge_module, "_check_mergeable", lambda stores: stores.__setitem__(0, stale))
    with pytest.raises(InputError, match="was replaced while it was being read"):
        merge_retrieval_sets([out, tmp_path / "more"], out, overwrite=True, progress=False)
    assert ChunkStore.open(out, verify="full").num_documents == 21


def test_other_documents_after_an_interrupted_addition(model, tmp_path, monkeypatch):
    out, third = tmp_path / "set", documents(7, 4)
    build(CORPUS, out, tokenizer=model)
    options = dict(progress=False, shard_chunks=10)
    with pytest.raises(KeyboardInterrupt):
        append_to_retrieval_set(out, OTHER, embedder=Interrupted(2), **options)
    with pytest.raises(InputError, match="unfinished work on something else.*--overwrite"):
        append_to_retrieval_set(out, third, embedder="hashing:64", **options)
    append_to_retrieval_set(out, third, embedder="hashing:64", overwrite=True, **options)
    assert ChunkStore.open(out, verify="full").num_documents == 20

    with monkeypatch.context() as patch:  # embedded, and not yet merged
        patch.setattr(merge_module, "_merge", interrupt)
        with pytest.raises(KeyboardInterrupt):
            append_to_retrieval_set(out, OTHER[:3], embedder="hashing:64", **options)
    with pytest.raises(InputError, match="addition to .*set that was interrupted.*--overwrite"):
        append_to_retrieval_set(out, OTHER[3:], embedder="hashing:64", **options)
    append_to_retrieval_set(out, OTHER[3:], embedder="hashing:64", overwrite=True, **options)
    assert ChunkStore.open(out, verify="full").num_documents == 22
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def interrupt(*args, **options):
    raise KeyboardInterrupt


@pytest.mark.parametrize("whole", [True, False])
def test_an_addition_that_was_merged_is_no_longer_there(model, tmp_path, monkeypatch, whole):
    """Also where the process was killed before it could delete it, or in the middle of that."""
    out = tmp_path / "set"
    build(CORPUS, out, tokenizer=model)
    drop = merge_module._drop_merged
    with monkeypatch.context() as patch:
        patch.setattr(
            merge_module, "_drop_merged", lambda at, known: drop(at, known) if known else interrupt()
        )
        patch.setattr(build_module.Builder, "_tidy", lambda self: None)
        with pytest.raises(KeyboardInterrupt):
            append_to_retrieval_set(out, OTHER, embedder="hashing:64", progress=False)
    assert (tmp_path / "set.append").exists() and (tmp_path / "set.build").exists()
    if not whole:
        (tmp_path / "set.append" / "chunks.npy").unlink()
    append_to_retrieval_set(out, OTHER, embedder="hashing:64", progress=False)
    assert ChunkStore.open(out, verify="full").num_documents == 21
    left = {path.name for path in tmp_path.iterdir()}
    assert "set.append" not in left and "set.build" not in left


@pytest.mark.parametrize("moment", ["iterdir", "rmdir"])
def test_another_process_deletes_the_addition_as_well(model, tmp_path, monkeypatch, moment):
    """One that appends next finds it in the set, and deletes it, too."""
    out, addition = tmp_path / "set", tmp_path / "set.append"
    build(CORPUS, out, tokenizer=model)
    drop = merge_module._drop_merged

    def drop_together(at, known):
        usual = getattr(Path, moment)

        def after_another(path):
            found = list(usual(path)) if moment == "iterdir" else None
            if path == at:
                shutil.rmtree(at, ignore_errors=True)
            return found if moment == "iterdir" else usual(path)

        with monkeypatch.context() as patch:
            if known is None:
                patch.setattr(Path, moment, after_another)
            drop(at, known)

    monkeypatch.setattr(merge_module, "_drop_merged", drop_together)
    manifest = append_to_retrieval_set(out, OTHER, embedder="hashing:64", progress=False)
    assert manifest["num_documents"] == 21 and not addition.exists()


def test_an_addition_does_not_drop_a_replacement_that_is_being_built(model, tmp_path):
    out = tmp_path / "set"
    build(CORPUS, out, tokenizer=model)
    with pytest.raises(KeyboardInterrupt):
        build(documents(8, 9), out, tokenizer=model, shard_chunks=10, embedder=Interrupted(1), overwrite=True)
    with pytest.raises(InputError, match="set.build holds unfinished work on something else"):
        append_to_retrieval_set(out, OTHER, embedder="hashing:64", progress=False)
    append_to_retrieval_set(out, OTHER, embedder="hashing:64", progress=False, overwrite=True)
    assert ChunkStore.open(out, verify="full").num_documents == 21


def test_a_merging_drops_unfinished_work_on_demand(model, tmp_path):
    part, out = tmp_path / "part", tmp_path / "set"
    build(CORPUS, part, tokenizer=model)
    with pytest.raises(KeyboardInterrupt):
        build(OTHER, out, tokenizer=model, shard_chunks=10, embedder=Interrupted(1))
    with pytest.raises(InputError, match="set.build holds unfinished work on something else"):
        merge_retrieval_sets([part], out, progress=False)
    merge_retrieval_sets([part], out, progress=False, overwrite=True)
    assert ChunkStore.open(out, verify="full").num_documents == 16
    assert {path.name for path in tmp_path.iterdir()} == {"part", "set"}


@pytest.mark.parametrize("appended", [True, False])
def test_a_set_that_was_parked_grows(model, tmp_path, monkeypatch, appended):
    """By one replacement killed between two renames, which are then taken back."""
    monkeypatch.setattr(writing, "_exchange", lambda *_: False)
    out, more, rename_really = tmp_path / "set", tmp_path / "more", os.rename
    build(CORPUS, out, tokenizer=model)
    build(OTHER, more, tokenizer=model)
    with monkeypatch.context() as patch:
        patch.setattr(
            writing.os,
            "rename",
            lambda a, b: interrupt() if (Path(a).name, Path(b)) == ("set", out) else rename_really(a, b),
        )
        with pytest.raises(KeyboardInterrupt):
            build(documents(8, 9), out, tokenizer=model, overwrite=True)
    assert not out.exists()
    if appended:
        manifest = append_to_retrieval_set(out, OTHER, progress=False, overwrite=True)
    else:
        manifest = merge_retrieval_sets([out, more], out, progress=False, overwrite=True)
    assert manifest["num_documents"] == ChunkStore.open(out, verify="full").num_documents == 21


def test_a_merged_set_that_lacks_only_its_name_is_not_copied_again(model, tmp_path, monkeypatch):
    out = tmp_path / "set"
    build(CORPUS, tmp_path / "part", tokenizer=model)
    with monkeypatch.context() as patch:
        patch.setattr(build_module.Builder, "publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            merge_retrieval_sets([tmp_path / "part"], out, progress=False)
    monkeypatch.setattr(merge_module, "_copy", None)
    assert merge_retrieval_sets([tmp_path / "part"], out, progress=False)["num_documents"] == 16
    assert ChunkStore.open(out, verify="full").num_documents == 16


def test_a_set_is_not_replaced_while_it_is_tuned(model, tmp_path, monkeypatch):
    out = tmp_path / "set"
    build(CORPUS, out, tokenizer=model, index="IVF2,SQfp16")
    tune = Index.tune

    def tune_meanwhile(self, *args, **options):
        with pytest.raises(InputError, match="Another process is building"):
            build(OTHER, out, tokenizer=model, overwrite=True)
        return tune(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Index, "tune", tune_meanwhile)
        assert tune_retrieval_set(out, 0.5)["num_documents"] == 16

    def tune_and_change(self, *args, **options):  # by something that knows of no lock
        write_manifest(out, {**read_manifest(out), "note": "new"})
        return tune(self, *args, **options)

    before = read_manifest(out)
    with monkeypatch.context() as patch:
        patch.setattr(Index, "tune", tune_and_change)
        with pytest.raises(InputError, match="was replaced while it was being tuned"):
            tune_retrieval_set(out, 0.9)
    assert read_manifest(out) == {**before, "note": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_unfinished_work_is_not_in_the_way_of_tuning(model, tmp_path):
    out = tmp_path / "set"
    build(CORPUS, out, tokenizer=model)
    with pytest.raises(KeyboardInterrupt):
        build(OTHER, out, tokenizer=model, shard_chunks=10, embedder=Interrupted(1), overwrite=True)
    (tmp_path / "set.build" / "lock").unlink()
    tune_retrieval_set(out, 0.9)
    again = Interrupted(10**6)
    build(OTHER, out, tokenizer=model, shard_chunks=10, embedder=again, overwrite=True)
    assert again.texts == ChunkStore.open(out).num_chunks - 10


@pytest.mark.parametrize("step, done", [("add", {"train"}), ("tune", {"train", "add"})])
def test_a_trained_or_filled_index_is_taken_up(model, tmp_path, expected, monkeypatch, step, done, capsys):
    def count(name):
        usual = getattr(Index, name)

        def counted(*args, **options):
            calls.add(name)
            return usual(*args, **options)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(Index, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(CORPUS, tmp_path / "set", tokenizer=model, index="IVF2,SQfp16")
    calls: set[str] = set()
    with monkeypatch.context() as patch:
        for name in ("train", "add", "tune"):
            patch.setattr(Index, name, count(name))
        build(CORPUS, tmp_path / "set", tokenizer=model, index="IVF2,SQfp16", progress=True)
    assert calls == {"train", "add", "tune"} - done
    assert contents(tmp_path / "set") == expected
    shown = capsys.readouterr().err
    assert "joining the shards" in shown and ("filling the index IVF2,SQfp16" in shown) == (step == "add")


@pytest.mark.parametrize("step", ["join", "save", "tune"])
def test_a_merge_that_joins_lists_is_taken_up(model, tmp_path, monkeypatch, step):
    parts = [tmp_path / "part0", tmp_path / "part1"]
    build(CORPUS, parts[0], tokenizer=model, part=(0, 2), index="IVF2,SQfp16")
    build(CORPUS, parts[1], tokenizer=model, part=(1, 2), trained_index=parts[0])
    merge_retrieval_sets(parts, tmp_path / "direct", index="IVF2,SQfp16", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(Index, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            merge_retrieval_sets(parts, tmp_path / "set", index="IVF2,SQfp16", progress=False)
    assert not (tmp_path / "set").exists()
    with monkeypatch.context() as patch:
        patch.setattr(Index, "train", interrupt)
        if step == "tune":  # it was whole
            patch.setattr(Index, "join", interrupt)
        merge_retrieval_sets(parts, tmp_path / "set", index="IVF2,SQfp16", progress=False)
    assert contents(tmp_path / "set") == contents(tmp_path / "direct")
    assert not (tmp_path / "set.build").exists()


@pytest.mark.parametrize("step", ["open_trained", "add", "save", "tune"])
def test_a_part_with_a_trained_index_is_taken_up(model, tmp_path, expected, monkeypatch, step):
    build(OTHER, tmp_path / "first", tokenizer=model, index="IVF2,SQfp16")
    given = {"trained_index": tmp_path / "first"}
    build(CORPUS, tmp_path / "direct", tokenizer=model, **given)
    for out in ("set", "other"):
        with monkeypatch.context() as patch:
            patch.setattr(Index, step, interrupt)
            with pytest.raises(KeyboardInterrupt):
                build(CORPUS, tmp_path / out, tokenizer=model, **given)
    with monkeypatch.context() as patch:
        patch.setattr(Index, "train", interrupt)
        build(CORPUS, tmp_path / "set", tokenizer=model, **given)
    assert contents(tmp_path / "set") == contents(tmp_path / "direct")
    build(CORPUS, tmp_path / "other", tokenizer=model, index="IVF2,SQfp16")  # what was taken is not taken up
    assert contents(tmp_path / "other") == expected


def test_cutting_is_saved_every_few_shards(model, tmp_path, expected, monkeypatch):
    saves, save = [], writing.ChunkWriter.save
    monkeypatch.setattr(
        writing.ChunkWriter, "save", lambda self: saves.append(self.state.chunks) or save(self)
    )
    build(CORPUS, tmp_path / "set", tokenizer=model, shard_chunks=2, index="IVF2,SQfp16")
    assert contents(tmp_path / "set") == expected
    assert saves and all(b - a >= 32 for a, b in zip([0, *saves], saves, strict=False))


def test_what_was_trained_for_another_index_is_not_taken(model, tmp_path, expected, monkeypatch):
    for index, step in (("IVF4,SQfp16", "add"), ("HNSW8,Flat", "tune")):
        with monkeypatch.context() as patch:
            patch.setattr(Index, step, interrupt)
            with pytest.raises(KeyboardInterrupt):
                build(CORPUS, tmp_path / "set", tokenizer=model, index=index)
    build(CORPUS, tmp_path / "set", tokenizer=model, index="IVF2,SQfp16")
    assert contents(tmp_path / "set") == expected


def test_shards_of_another_size_are_not_taken_for_others(model, tmp_path, expected, monkeypatch):
    """The last shard is shorter: as long as any is of another size."""
    total = expected[MANIFEST]["num_chunks"]
    size = next(size for size in range(10, total) if total % size)
    with monkeypatch.context() as patch:
        patch.setattr(build_module.Builder, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(CORPUS, tmp_path / "set", tokenizer=model, shard_chunks=size, index="IVF2,SQfp16")
    build(CORPUS, tmp_path / "set", tokenizer=model, shard_chunks=total % size, index="IVF2,SQfp16")
    assert contents(tmp_path / "set") == expected


@pytest.mark.parametrize("step", ["train", "add", "tune", "save"])
def test_a_set_whose_index_is_being_made_again_is_not_touched(model, tmp_path, expected, monkeypatch, step):
    out = tmp_path / "set"
    build(CORPUS, out, tokenizer=model, index="HNSW8,Flat")
    before = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(Index, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(CORPUS, out, tokenizer=model, index="IVF2,SQfp16")
    assert contents(out) == before
    with monkeypatch.context() as patch:  # then something else is built there, and stopped as well
        patch.setattr(ChunkStore, "open", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(CORPUS, out, tokenizer=model, index="IVF4,SQfp16")
        with pytest.raises(KeyboardInterrupt):
            build(OTHER, out, tokenizer=model, embedder=Interrupted(0), overwrite=True)
    assert contents(out) == before
    build(CORPUS, out, tokenizer=model, index="IVF2,SQfp16", overwrite=True)
    assert contents(out) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_work_that_was_exchanged_for_the_finished_set_is_not_taken_up(model, tmp_path, expected, monkeypatch):
    """A process killed after the exchange leaves the older set in the work folder: it is not built on."""
    out = tmp_path / "set"
    build(OTHER, out, tokenizer=model)
    with monkeypatch.context() as patch:
        patch.setattr(writing.shutil, "rmtree", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(CORPUS, out, tokenizer=model, overwrite=True)
    assert ChunkStore.open(out).num_documents == 16 and (tmp_path / "set.build" / "set").exists()
    build_module.shutil.rmtree(out)
    build(CORPUS, out, tokenizer=model, index="IVF2,SQfp16")
    assert contents(out) == expected
