"""The journal of a long job: what was kept comes back as it was, or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from retro_kernels.config import InputError
from retro_kernels.retrieval.writing import GrowingArray, Journal, journal

PARTS = [
    {"a": np.arange(7, dtype=np.int64), "b": np.linspace(0, 1, 3, dtype=np.float32)},
    {"a": np.arange(0), "b": np.full((2, 2), np.nan)},
    {"a": np.arange(12).reshape(3, 4).T, "b": np.array([True, False])},
]


class Stop(Exception):
    pass


def kept(path: Path, about: str = "this", parts: int = len(PARTS)) -> bytes:
    """What a job leaves that was interrupted after so many parts."""
    with pytest.raises(Stop), journal(path, about, "busy") as done:
        for part in PARTS[:parts]:
            assert done.take() is None and done.add(part) is part
        raise Stop
    return path.read_bytes() if path.exists() else b""


def taken(path: Path, about: str = "this", keys: tuple[str, ...] = ("",) * len(PARTS)) -> int:
    """How many parts another call takes up, each of them as it was; the others are made anew, and the file goes."""
    count = 0
    with journal(path, about, "busy") as done:
        for part, key in zip(PARTS, keys, strict=True):
            found = done.take(key)
            count += found is not None
            for name, values in (found or done.add(part, key)).items():
                np.testing.assert_array_equal(values, part[name])
                assert values.dtype == part[name].dtype
    assert not path.exists()
    return count


def test_cut_off_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "job.partial"
    ends = [len(kept(tmp_path / str(n), parts=n)) for n in range(1, len(PARTS) + 1)]
    content = kept(tmp_path / "whole")
    assert len(content) == ends[-1]
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        assert taken(path) == sum(length >= end for end in ends)


def test_a_damaged_byte_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "job.partial"
    content = kept(path)
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        if place < len(Journal._BEGINNING):
            with pytest.raises(InputError, match=f"{path} .* holds something else. Move it away"):
                taken(path)
            assert path.read_bytes() == damaged  # it may be somebody's
        else:
            assert taken(path) < len(PARTS)


def test_another_job_or_key_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "job.partial"
    content = kept(path)
    assert taken(path) == 3
    path.write_bytes(content)
    assert taken(path, about="that") == 0
    path.write_bytes(content)
    assert taken(path, keys=("", "other", "")) == 1  # what comes after another part is another part
    path.write_bytes(content)
    with pytest.raises(Stop), journal(path, "this", "busy") as done:
        assert done.take() is not None and done.take("other") is None
        done.add(PARTS[1], "other")  # as long as what was there
        raise Stop
    assert taken(path, keys=("", "other", "")) == 2  # nor does it come back later


def test_what_was_kept_stays_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "job.partial"
    assert kept(path, parts=0) == b"" and not list(tmp_path.iterdir())  # nothing worth keeping
    content = kept(path)
    with pytest.raises(Stop), journal(path, "this", "busy"):
        raise Stop  # before anything was taken
    assert path.read_bytes() == content
    with pytest.raises(KeyboardInterrupt, match=f"kept in {path}: the same command goes on"):
        with journal(path, "this", "busy") as done:
            done.take()
            raise KeyboardInterrupt
    assert path.read_bytes() == content
    with journal(path, "this", "another process has it"):
        with (
            pytest.raises(InputError, match="another process has it"),
            journal(path, "this", "another process has it"),
        ):
            pass
        assert path.exists()
    with journal(None, "this", "busy") as done:
        assert done.take() is None and done.add(PARTS[0]) is PARTS[0] and done.take() is None
    with pytest.raises(InputError, match="cannot be written"), journal(tmp_path / "no" / "j", "this", "busy"):
        pass


def test_what_begins_anew_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    """It may be a set's, which has it by another name."""
    path, name = tmp_path / "work.npy", tmp_path / "set.npy"
    for values in (np.arange(6), np.arange(3)):
        array = GrowingArray(path, np.dtype(np.int64), (), 0)
        array.append(values)
        array.close()
        assert np.array_equal(np.load(path), values)
        if not name.exists():
            os.link(path, name)
    assert np.array_equal(np.load(name), np.arange(6))


@pytest.mark.parametrize("parts", [0, 1])
@pytest.mark.parametrize("name", [None, "/disk/result.tmp"])
def test_where_a_disk_is_full_is_said_and_what_is_kept(tmp_path: Path, parts: int, name: str | None) -> None:
    """Also of a file without a name. What has nothing to do with the disk stays as it is."""
    path = tmp_path / "job.partial"
    for error in (OSError(errno.ENOSPC, "No space left on device", name), OSError(errno.EPIPE, "gone", name)):
        with pytest.raises(OSError) as said, journal(path, "this", "busy") as done:
            for part in PARTS[:parts]:
                done.take() or done.add(part)
            raise error
        if error.errno == errno.EPIPE:
            assert said.value is error
            continue
        again = f". What is done is kept in {path}: run the same command again." if parts else ""
        assert said.value.args == (errno.ENOSPC, f"No space left on device{again}")
        assert said.value.filename == (name or str(tmp_path)) and path.exists() == bool(parts)


def test_a_full_disk(tmp_path: Path) -> None:
    class Full:
        def __init__(self, path: Path, room: int) -> None:
            self.file, self.room = path.open("r+b", buffering=0), room
            self.name = str(path)

        def write(self, content: memoryview) -> int:
            if not self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            done = self.file.write(content[: self.room])
            self.room -= done
            return done

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

    path = tmp_path / "job.partial"
    two, three = len(kept(path, parts=2)), len(kept(tmp_path / "whole"))
    done = Journal(Full(path, three - two - 1), "this")
    assert done.take() and done.take() and done.take() is None
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        done.add(PARTS[2])
    assert path.stat().st_size == three - 1 and taken(path) == 2
