"""The gather of neighbour tokens out of the chunk store: on the host from a memory-mapped file, on a GPU from its own
memory and from pinned host memory.

On the host beside what one would write instead, warm (the pages are in memory) and cold (they are dropped before every
round, and the file is mapped anew, since pages that are mapped cannot be dropped). A row's value is the chunk and its
continuation, pads where the document ends; int64 comes out in every case.
"""

from __future__ import annotations

import errno
import functools
import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import roofline
import timing
import torch
from cases import DEVICE, ON_GPU, TINY
from numpy.lib.stride_tricks import as_strided
from torch import Tensor

from retro_kernels.ops import gather_embeddings, gather_neighbours
from retro_kernels.ops.gather import native
from retro_kernels.retrieval.store import open_array

M = 64
CHUNKS = 4_096 if TINY else 8 << 20  # 1 GiB of uint16: beyond every cache
COUNTS = (
    (64, 1_024) if TINY else (16_384, 131_072)
)  # the neighbours of a step of 256 sequences, and eight of them
GPU_COUNT = 327_680
DOCUMENT = 33  # chunks; the median in real text
OURS = "retro_kernels"

Gather = Callable[[np.ndarray, np.ndarray, Tensor], Any]  # store [C, M], continuation [C], ids [n]


@functools.cache
def folder() -> tempfile.TemporaryDirectory[str]:
    """Deleted when the process ends."""
    return tempfile.TemporaryDirectory(prefix="retro-gather-")


@functools.cache
def store_path() -> Path:
    """A file as a set has it: chunks.npy, uint16 [C, M], on the disk and not only in memory."""
    path = Path(folder().name) / "chunks.npy"
    generator = np.random.default_rng(0)
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint16, shape=(CHUNKS, M))
    for start in range(0, CHUNKS, 1 << 17):
        array[start : start + (1 << 17)] = generator.integers(1, 1 << 16, (1 << 17, M), dtype=np.uint16)[
            : CHUNKS - start
        ]
    array.flush()
    return path


@functools.cache
def continuation() -> np.ndarray:
    """bool [C]"""
    flags = np.ones(CHUNKS, dtype=bool)
    flags[DOCUMENT - 1 :: DOCUMENT] = False
    flags[-1] = False
    return flags


def random_ids(count: int) -> Tensor:
    return torch.randint(0, CHUNKS, (count,), generator=torch.Generator().manual_seed(1))


def mapped(scattered: bool) -> np.ndarray:
    """The store's file, mapped anew; scattered: without read-ahead, as `ChunkStore` opens it."""
    array = open_array(store_path(), np.dtype(np.uint16), (CHUNKS, M))
    if scattered:
        array._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    return array


def ours(threads: int, advise: Any = "when cold") -> Gather:
    def call(store: np.ndarray, flags: np.ndarray, ids: Tensor) -> Any:
        return native.gather_host(store, ids, flags, 0, torch.int64, threads=threads, advise=advise)

    return call


def numpy_fancy(store: np.ndarray, flags: np.ndarray, ids: Tensor) -> np.ndarray:
    """Two fancy indexes: the chunks, and those behind them."""
    rows = ids.numpy()
    after = np.where(flags[rows][:, None], store[np.minimum(rows + 1, len(store) - 1)], 0)
    return np.concatenate([store[rows], after], axis=1).astype(np.int64)


def numpy_strided(store: np.ndarray, flags: np.ndarray, ids: Tensor) -> np.ndarray:
    """One fancy index into overlapping rows of 2M."""
    rows = ids.numpy()
    overlapping = as_strided(store, (len(store) - 1, 2 * M), store.strides, writeable=False)
    out = overlapping[np.minimum(rows, len(store) - 2)].astype(np.int64)
    out[~flags[rows], M:] = 0
    return out


def torch_select(store: np.ndarray, flags: np.ndarray, ids: Tensor) -> Tensor:
    """index_select on a tensor that shares the file's memory; int16, since uint16 has no index_select."""
    tensor = torch.from_numpy(store.view(np.int16))
    after = tensor.index_select(0, (ids + 1).clamp(max=len(store) - 1)).long() & 0xFFFF
    after.masked_fill_(~torch.from_numpy(flags).index_select(0, ids)[:, None], 0)
    return torch.cat([tensor.index_select(0, ids).long() & 0xFFFF, after], dim=1)


WAYS: dict[str, Gather] = {
    OURS: ours(2),
    f"{OURS}, 1 thread": ours(1),
    "numpy": numpy_fancy,
    "numpy, strided view": numpy_strided,
    "torch": torch_select,
}
COLD: dict[str, tuple[Gather, bool]] = {
    OURS: (ours(2), True),
    f"{OURS}, 1 thread": (ours(1), True),
    f"{OURS}, nothing asked for ahead": (ours(2, "never"), True),
    "numpy": (numpy_fancy, False),
    "numpy, no read-ahead": (numpy_fancy, True),
}


def _tokens(result: Any) -> Tensor:
    result = result[0] if isinstance(result, tuple) else result
    return torch.as_tensor(result)


@functools.cache
def host_arrays(scattered: bool = True) -> tuple[np.ndarray, np.ndarray]:
    return mapped(scattered), continuation()


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.skipif(ON_GPU, reason="a GPU has rows of its own")
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", WAYS)
def test_warm(benchmark: Any, name: str, count: int) -> None:
    store, flags = host_arrays()
    ids = random_ids(count)
    benchmark.group = f"host gather, {count:,} neighbours out of {CHUNKS:,} chunks, warm"
    gather = WAYS[name]
    expected = _tokens(ours(1)(store, flags, ids))
    assert torch.equal(_tokens(gather(store, flags, ids)), expected), "another result than ours"
    median = timing.measure(
        benchmark, lambda: gather(store, flags, ids), rounds=30, case=name, what="host gather", count=count
    )
    benchmark.extra_info["shown"] = {"million neighbours/s": count / median / 1e6}


def drop_pages(path: Path) -> None:
    """Afterwards no page of the file is in memory. Skips where the system keeps them (a file system in memory)."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            for offset in np.linspace(0, path.stat().st_size - 1, 16, dtype=np.int64).tolist():
                if os.preadv(file.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT):
                    pytest.skip("the pages of a file cannot be dropped here")
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise


@pytest.mark.skipif(ON_GPU, reason="a GPU has rows of its own")
@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no posix_fadvise: pages cannot be dropped")
@pytest.mark.parametrize("name", COLD)
def test_cold(benchmark: Any, name: str) -> None:
    """Fewer rows, and other ones in each round; the disk is what is measured. Results are compared once."""
    count = COUNTS[0] // 2
    gather, scattered = COLD[name]
    flags = continuation()
    host_arrays.cache_clear()  # while anything maps a page it stays
    path = store_path()
    benchmark.group = f"host gather, {count:,} neighbours out of {CHUNKS:,} chunks, cold"
    seconds = []
    for turn in range(1 if TINY else 5):
        ids = torch.randint(0, CHUNKS, (count,), generator=torch.Generator().manual_seed(100 + turn))
        drop_pages(path)
        store = mapped(scattered)
        seconds.append(timing.wall_seconds(lambda ids=ids, store=store: gather(store, flags, ids)))
        if turn == 0:
            assert torch.equal(_tokens(gather(store, flags, ids)), _tokens(ours(1)(store, flags, ids)))
        del store
    timing.record(
        benchmark,
        seconds,
        case=name,
        what="cold gather",
        shown={"thousand neighbours/s": count / sorted(seconds)[len(seconds) // 2] / 1e3},
    )


@functools.cache
def gpu_store(place: str) -> tuple[Tensor, Tensor]:
    tokens = torch.from_numpy(np.array(mapped(False)))
    flags = torch.from_numpy(continuation())
    if place == "pinned":
        return tokens.pin_memory(), flags.to(DEVICE)
    return tokens.to(DEVICE), flags.to(DEVICE)


def _id_sets(count: int) -> list[Tensor]:
    sets = timing.sets_to_rotate(int(roofline.gather(count).bytes))
    return [torch.randint(0, CHUNKS, (count,), device=DEVICE) for _ in range(sets)]


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("backend", ["triton", "cuda", "torch"])
@pytest.mark.parametrize("count", [*COUNTS, GPU_COUNT])
def test_on_the_gpu(benchmark: Any, count: int, backend: str, ceilings: roofline.Ceilings) -> None:
    """Store and results in the GPU's memory; the floor is the machine's measured copy bandwidth."""
    benchmark.group = f"gather of {count:,} ids on the GPU"
    name = OURS if backend == "triton" else f"{OURS}, {backend}"
    benchmark.extra_info["case"] = name
    if backend == "cuda" and not native.WITH_CUDA:
        pytest.skip("built without nvcc")
    tokens, flags = gpu_store("gpu")
    floor = ceilings.floor(roofline.gather(count))
    # the goal is for sizes that fill the chip, and for what is chosen by itself
    counts = {"what": "gather"} if backend == "triton" and count == GPU_COUNT else {"what": "gather, other"}
    median = timing.measure(
        benchmark,
        [
            lambda ids=ids: gather_neighbours(tokens, ids, continuation=flags, backend=backend)
            for ids in _id_sets(count)
        ],
        count=count,
        floor_s=floor,
        **counts,
    )
    benchmark.extra_info["share_of_floor"] = round(floor / median, 4)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    "name", [f"{OURS}, read in place", f"{OURS}, gathered on the host", "copy, no gather"]
)
def test_pinned(benchmark: Any, count: int, name: str) -> None:
    """The store in pinned host memory, read by the GPU in place, beside a plain copy of as many bytes of tokens."""
    benchmark.group = f"gather of {count:,} ids out of pinned memory"
    benchmark.extra_info.update(case=name, what="pinned gather", count=count)
    if name.endswith("in place") and not native.WITH_CUDA:
        pytest.skip("built without nvcc")
    tokens, flags = gpu_store("pinned")
    host_flags = continuation()
    calls: list[Callable[[], Any]] = []
    for ids in _id_sets(count):
        if name.endswith("in place"):
            calls.append(lambda ids=ids: gather_neighbours(tokens, ids, continuation=flags, backend="cuda"))
        elif name.endswith("on the host"):
            calls.append(
                lambda ids=ids: gather_neighbours(tokens, ids, continuation=host_flags, backend="native")
            )
        else:
            rows = tokens[: 2 * count].view(torch.int16)
            calls.append(lambda rows=rows: rows.to(DEVICE, non_blocking=True))
    timing.measure(benchmark, calls, wall=name.endswith("on the host"))


WIDTH, VOCABULARY = 896, 32_000


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("count", [512, 20_480])
@pytest.mark.parametrize("name", [OURS, "gather, then F.embedding"])
def test_embeddings_on_the_gpu(benchmark: Any, count: int, name: str, ceilings: roofline.Ceilings) -> None:
    """Neighbours embedded as the encoder reads them (bf16, 896 wide), in one kernel and in two."""
    benchmark.group = f"gather and embedding of {count:,} ids on the GPU"
    tokens, flags = gpu_store("gpu")
    tokens = (tokens.to(torch.int32) % VOCABULARY).to(torch.uint16)
    weight = torch.randn(VOCABULARY, WIDTH, device=DEVICE, dtype=torch.bfloat16)

    def fused(ids: Tensor) -> Any:
        return gather_embeddings(tokens, ids, weight, continuation=flags, backend="triton")

    def apart(ids: Tensor) -> Any:
        gathered, lengths = gather_neighbours(tokens, ids, continuation=flags, backend="triton")
        return torch.nn.functional.embedding(gathered, weight), lengths

    call = fused if name == OURS else apart
    floor = ceilings.floor(roofline.gather(count, out_element=WIDTH * weight.element_size()))
    median = timing.measure(
        benchmark,
        [lambda ids=ids: call(ids) for ids in _id_sets(count)],
        case=name,
        what="gather and embedding",
        count=count,
        floor_s=floor,
    )
    benchmark.extra_info["share_of_floor"] = round(floor / median, 4)
