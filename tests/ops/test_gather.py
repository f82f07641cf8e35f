"""The gather against a loop over single tokens, on every backend and in every kind of memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import retro_kernels
from retro_kernels.ops.gather import NeighbourBatch, gather_embeddings, gather_neighbours, native, op

HOST_BACKENDS = ["native", "torch", "reference", "triton"]
DTYPES = {"uint16": torch.uint16, "int32": torch.int32}


@pytest.fixture(params=HOST_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is off: kernels run on the GPU here, in the tests marked gpu")
    return request.param


def slow_gather(
    store: np.ndarray, ids: np.ndarray, continuation: np.ndarray, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Token by token, straight from the contract."""
    m = store.shape[1]
    out = np.empty((*ids.shape, 2 * m), dtype=np.int64)
    lengths = np.empty(ids.shape, dtype=np.int32)
    for place, i in np.ndenumerate(ids):
        row = [int(t) for t in store[i]] if i >= 0 else []
        if i >= 0 and i + 1 < len(store) and continuation[i]:
            row += [int(t) for t in store[i + 1]]
        row += [pad_id] * (2 * m - len(row))
        out[place] = row
        lengths[place] = max((n + 1 for n, token in enumerate(row) if token != pad_id), default=0)
    return out, lengths


def make_store(
    rng: np.random.Generator, num_chunks: int, chunk_size: int, dtype: str, pad_id: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Documents of 1 to 5 chunks whose last chunk is padded; tokens over the whole range of the dtype."""
    high = 2**16 if dtype == "uint16" else 2**17
    store = rng.integers(1, high, (num_chunks, chunk_size)).astype(dtype)
    store[store == pad_id] = pad_id + 1
    continuation = np.zeros(num_chunks, dtype=bool)
    begin = 0
    while begin < num_chunks:
        end = min(begin + int(rng.integers(1, 6)), num_chunks)
        continuation[begin : end - 1] = True
        store[end - 1, int(rng.integers(1, chunk_size + 1)) :] = pad_id
        begin = end
    return store, continuation


def make_ids(rng: np.random.Generator, num_chunks: int, shape: tuple[int, ...]) -> Tensor:
    """The first and the last chunk and -1 are always among them."""
    ids = rng.integers(-1, num_chunks, shape)
    ids.reshape(-1)[:3] = [-1, 0, num_chunks - 1]
    return torch.from_numpy(ids)


def check(result: tuple[Tensor, Tensor], expected: tuple[np.ndarray, np.ndarray]) -> None:
    tokens, lengths = result
    assert lengths.dtype == torch.int32
    np.testing.assert_array_equal(tokens.cpu().numpy().astype(np.int64), expected[0])
    np.testing.assert_array_equal(lengths.cpu().numpy(), expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("chunk_size", "pad_id"), [(64, 0), (5, 3), (1, 0)])
def test_equals_the_loop(backend: str, dtype: str, chunk_size: int, pad_id: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    store, continuation = make_store(rng, 37, chunk_size, dtype, pad_id)
    ids = make_ids(rng, 37, (2, 3, 4))
    expected = slow_gather(store, ids.numpy(), continuation, pad_id)
    for out_dtype in (torch.int64, torch.int32, torch.uint16):
        if out_dtype == torch.uint16 and dtype != "uint16":
            continue
        result = gather_neighbours(
            torch.from_numpy(store),
            ids,
            continuation=torch.from_numpy(continuation),
            pad_id=pad_id,
            dtype=out_dtype,
            backend=backend,
        )
        assert result[0].dtype == out_dtype
        assert result[0].shape == (2, 3, 4, 2 * chunk_size)
        check(result, expected)


def test_pads_in_odd_places(backend: str, seed: int) -> None:
    """Only trailing pads shorten a row: those inside stay, also where a whole chunk is made of them."""
    rng = np.random.default_rng(seed)
    store = rng.integers(0, 2, (64, 3)).astype("uint16")
    store[5:7], store[20] = 0, 0
    continuation = rng.integers(0, 2, 64).astype(bool)
    ids = torch.arange(-1, 64).reshape(1, 13, 5)
    result = gather_neighbours(store, ids, continuation=continuation, backend=backend)
    check(result, slow_gather(store, ids.numpy(), continuation, 0))


def test_never_crosses_a_document(backend: str) -> None:
    store = torch.tensor([[1, 2], [3, 0], [4, 5], [6, 7]], dtype=torch.int32)
    # a store whose flags claim that its last chunk goes on must not be read past its end either
    continuation = torch.tensor([True, False, True, True])
    tokens, lengths = gather_neighbours(
        store, torch.tensor([0, 1, 2, 3, -1]), continuation=continuation, backend=backend
    )
    assert tokens.tolist() == [[1, 2, 3, 0], [3, 0, 0, 0], [4, 5, 6, 7], [6, 7, 0, 0], [0, 0, 0, 0]]
    assert lengths.tolist() == [3, 1, 4, 2, 0]


def test_default_is_native_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        native, "gather_host", lambda *a, **k: seen.append(a) or (torch.zeros(1), torch.zeros(1))
    )
    gather_neighbours(
        torch.zeros(2, 4, dtype=torch.int32), torch.tensor([0]), continuation=torch.zeros(2) > 0
    )
    assert len(seen) == 1


def test_memory_mapped(tmp_path: Path, backend: str, seed: int) -> None:
    """A read-only map, rows apart in a wider file, and no warning about it."""
    rng = np.random.default_rng(seed)
    store, continuation = make_store(rng, 50, 8, "uint16")
    wide = rng.integers(0, 2**16, (50, 11)).astype("uint16")
    wide[:, 2:10] = store
    np.save(tmp_path / "chunks.npy", wide)
    np.save(tmp_path / "continuation.npy", continuation)
    ids = make_ids(rng, 50, (3, 2, 2))
    mapped = np.load(tmp_path / "chunks.npy", mmap_mode="r")[:, 2:10]
    flags = np.load(tmp_path / "continuation.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = gather_neighbours(mapped, ids, continuation=flags, backend=backend)
    check(result, slow_gather(store, ids.numpy(), continuation, 0))


def test_past_two_to_the_31_tokens(tmp_path: Path) -> None:
    """Sparse, so it costs no disk: 2³² + 2⁷ tokens, of which a few rows are written."""
    chunk_size, num_chunks = 64, 2**26 + 2
    path = tmp_path / "chunks.bin"
    with open(path, "wb") as file:
        file.truncate(num_chunks * chunk_size * 2)
    store = np.memmap(path, dtype="uint16", mode="r+", shape=(num_chunks, chunk_size))
    flags = np.memmap(tmp_path / "flags.bin", dtype=bool, mode="w+", shape=(num_chunks,))
    rows = [0, 2**25 - 1, 2**25, 2**26 - 1, 2**26, 2**26 + 1]
    for i in rows:
        store[i] = np.arange(64) + 60_000 + i % 97
    flags[[2**25 - 1, 2**26 - 1, 2**26]] = True
    ids = torch.tensor([*rows, -1, 2**25 + 5])
    for backend in ("native", "reference"):
        tokens, lengths = gather_neighbours(store, ids, continuation=flags, backend=backend)
        assert lengths.tolist() == [64, 128, 64, 128, 128, 64, 0, 0]
        for place, i in enumerate(rows):
            assert tokens[place, :64].tolist() == list(range(60_000 + i % 97, 60_064 + i % 97))
            after = list(range(60_000 + (i + 1) % 97, 60_064 + (i + 1) % 97)) if flags[i] else [0] * 64
            assert tokens[place, 64:].tolist() == after


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("advise", ["never", "always", "when cold"])
def test_threads_and_advice_change_nothing(tmp_path: Path, threads: int, advise: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    store, continuation = make_store(rng, 500, 16, "uint16")
    np.save(tmp_path / "chunks.npy", store)
    mapped = np.load(tmp_path / "chunks.npy", mmap_mode="r")
    # more than a thread's share, and no multiple of anything
    ids = make_ids(rng, 500, (9001,))
    tokens, lengths = native.gather_host(
        mapped, ids, continuation, 0, torch.int64, threads=threads, advise=advise
    )
    expected = op.gather_reference(
        torch.from_numpy(store), ids, torch.from_numpy(continuation), 0, torch.int64
    )
    assert torch.equal(tokens, expected[0])
    assert torch.equal(lengths, expected[1])


@pytest.mark.skipif(native.WHY_NOT is not None, reason="needs the extension")
@pytest.mark.parametrize("chunk_size", [64, 6])  # a multiple of 16 bytes, and none
@pytest.mark.parametrize(
    ("stored", "dtype"),
    [("uint16", torch.int64), ("uint16", torch.int32), ("int32", torch.int64), ("int32", torch.int32)],
)
def test_outputs_beyond_the_caches(stored: str, dtype: torch.dtype, chunk_size: int, seed: int) -> None:
    """Of 32 MiB and more, which are written past the caches."""
    rng = np.random.default_rng(seed)
    store, continuation = make_store(rng, 300, chunk_size, stored)
    store[::3, 0] = np.iinfo(store.dtype).max
    rows = (32 << 20) // (2 * chunk_size * dtype.itemsize) + 1
    ids = make_ids(rng, 300, (rows,))
    tokens, lengths = native.gather_host(store, ids, continuation, 0, dtype, threads=2)
    assert tokens.nbytes >= 32 << 20
    expected = op.gather_reference(torch.from_numpy(store), ids, torch.from_numpy(continuation), 0, dtype)
    assert torch.equal(tokens, expected[0]) and torch.equal(lengths, expected[1])


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no posix_fadvise: pages cannot be dropped")
def test_cold_pages(tmp_path: Path, seed: int) -> None:
    """The same rows when they have to come from the disk first."""
    rng = np.random.default_rng(seed)
    store, continuation = make_store(rng, 20_000, 64, "uint16")
    path = tmp_path / "chunks.npy"
    np.save(path, store)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    ids = make_ids(rng, 20_000, (3000,))
    result = gather_neighbours(np.load(path, mmap_mode="r"), ids, continuation=continuation)
    expected = op.gather_reference(
        torch.from_numpy(store), ids, torch.from_numpy(continuation), 0, torch.int64
    )
    assert torch.equal(result[0], expected[0])
    assert torch.equal(result[1], expected[1])


def test_releases_the_gil() -> None:
    """While it gathers, Python goes on: with the lock held, no other thread would count at all."""
    num_chunks = 4096
    store, flags = np.ones((num_chunks, 64), dtype="uint16"), np.zeros(num_chunks, dtype=bool)
    ids = torch.randint(num_chunks, (150_000,))
    out, lengths = torch.zeros(len(ids), 128, dtype=torch.int64), torch.zeros(len(ids), dtype=torch.int32)
    job = native._describe(store, ids, flags, 0, out, lengths)
    ticks, counted, inside, done = 0, 0, threading.Event(), threading.Event()

    def gather() -> None:
        nonlocal counted
        inside.set()
        for _ in range(100):  # a busy machine lets the other thread count late
            native._C.gather_neighbours_cpu(job, 1, 0)
            counted = ticks
            if counted > 10:
                break
        done.set()

    interval = sys.getswitchinterval()
    # a switch can then only come from the lock being given up, not from a time slice
    sys.setswitchinterval(1000)
    try:
        worker = threading.Thread(target=gather)
        worker.start()
        inside.wait()
        while not done.is_set():
            ticks += 1
            time.sleep(0.001)
        worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert lengths.eq(64).all()
    assert counted > 10


def test_strided_ids(backend: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    store, continuation = make_store(rng, 20, 4, "int32")
    ids = make_ids(rng, 20, (3, 8, 6))[:, ::2].transpose(0, 2)
    assert not ids.is_contiguous()
    result = gather_neighbours(store, ids, continuation=continuation, backend=backend)
    check(result, slow_gather(store, ids.numpy(), continuation, 0))


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 2), (2, 3, 0)])
def test_no_ids(backend: str, shape: tuple[int, ...]) -> None:
    tokens, lengths = gather_neighbours(
        torch.ones(3, 4, dtype=torch.int32),
        torch.empty(shape, dtype=torch.int64),
        continuation=torch.zeros(3, dtype=torch.bool),
        backend=backend,
    )
    assert tokens.shape == (*shape, 8)
    assert lengths.shape == shape


STORE = torch.ones(3, 4, dtype=torch.int32)
FLAGS = torch.zeros(3, dtype=torch.bool)
IDS = torch.zeros(1, 1, 1, dtype=torch.int64)


@pytest.mark.parametrize("wrong", [-2, 3, 2**40, -(2**63)])
def test_ids_out_of_range(backend: str, wrong: int) -> None:
    ids = torch.tensor([[[0, -1], [wrong, 2]]])
    with pytest.raises(
        ValueError, match=rf"ids has {wrong}\b.*the store has 3 chunks, so ids run from 0 to 2"
    ):
        gather_neighbours(STORE, ids, continuation=FLAGS, backend=backend)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokens": STORE.long()}, TypeError, "tokens are torch.int64; a store is uint16 or int32"),
        ({"tokens": np.ones((3, 4), dtype=">u2")}, TypeError, "tokens are >u2; a store is uint16 or int32"),
        ({"tokens": [[1, 2]]}, TypeError, "got list; tokens and continuation are tensors or numpy arrays"),
        ({"tokens": STORE[0]}, ValueError, r"tokens have shape \(4,\); expected \[C, M\]"),
        (
            {"tokens": STORE[:0]},
            ValueError,
            r"tokens have shape \(0, 4\); expected \[C, M\], neither of them 0",
        ),
        ({"tokens": STORE.T.contiguous().T}, ValueError, "have to lie side by side"),
        (  # a field of records
            {"tokens": np.ones(3, dtype="4u2, u1")["f0"], "pad_id": 0},
            ValueError,
            "rows of tokens lie 9 bytes apart, which is no multiple of the 2 bytes of a token",
        ),
        ({"ids": IDS.int()}, TypeError, "ids are torch.int32; expected a tensor of torch.int64"),
        ({"ids": [[[0]]]}, TypeError, "ids are list; expected a tensor of torch.int64"),
        ({"continuation": FLAGS.int()}, TypeError, "continuation is torch.int32; expected bool"),
        (
            {"continuation": FLAGS[:2]},
            ValueError,
            r"continuation has shape \(2,\), but the store has 3 chunks",
        ),
        ({"dtype": torch.float32}, TypeError, "dtype is torch.float32; choose torch.int64"),
        ({"dtype": torch.uint16}, TypeError, "torch.uint16 cannot hold the tokens of a store in int32"),
        ({"pad_id": 2**31}, ValueError, "pad_id is 2147483648; the store's torch.int32 holds"),
        ({"tokens": STORE.to(torch.uint16), "pad_id": -1}, ValueError, "torch.uint16 holds 0 to 65535"),
        ({"pad_id": 0.5}, TypeError, "pad_id is 0.5; it has to be an integer"),
        ({"ids": IDS.to("meta")}, ValueError, "ids are on meta"),
        ({"tokens": STORE.to("meta")}, ValueError, "tokens are on meta, without data"),
        ({"continuation": FLAGS.to("meta")}, ValueError, "continuation is on meta, without data"),
        ({"backend": "cuda"}, ValueError, 'backend "cuda" cannot run here'),
        ({"backend": "faiss"}, ValueError, 'there is no backend "faiss"'),
    ],
)
def test_wrong_input(changes: dict, error: type[Exception], message: str) -> None:
    arguments = {"tokens": STORE, "ids": IDS, "continuation": FLAGS, **changes}
    with pytest.raises(error, match=message):
        gather_neighbours(**arguments)


@pytest.mark.parametrize("numpy_store", [False, True])
def test_continuation_on_a_gpu_is_brought_to_a_store_on_the_host(numpy_store: bool) -> None:
    """To read it there would be the end of the process. The GPU is a stand-in."""

    class OnGpu(Tensor):
        def cpu(self) -> Tensor:
            return self.as_subclass(Tensor)

        def data_ptr(self) -> int:
            pytest.fail("its address is a GPU's")

    tokens, lengths = op._gather_native(
        STORE.numpy() if numpy_store else STORE, IDS, FLAGS.as_subclass(OnGpu), 0, torch.int64
    )
    wanted = gather_neighbours(STORE, IDS, continuation=FLAGS)
    assert torch.equal(tokens, wanted[0]) and torch.equal(lengths, wanted[1])


def test_a_gpu_reads_nothing_of_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "WHY_NOT", None)
    monkeypatch.setattr(native, "WITH_CUDA", True)
    monkeypatch.setattr(Tensor, "is_pinned", lambda x: x is STORE)
    monkeypatch.setattr(native, "why_not_on", lambda device: None)
    with FakeTensorMode():
        ids = torch.empty(2, dtype=torch.int64, device="cuda:0")
        near, far = (torch.empty(len(STORE), dtype=torch.bool, device=f"cuda:{i}") for i in (0, 1))
    assert op._candidates(STORE, ids, near)["cuda"] is None
    found = op._candidates(STORE, ids, far)
    assert "on the same one" in str(found["cuda"]) and found["native"] is None


@pytest.mark.parametrize(
    ("archs", "gpu", "runs"),
    [
        ([80, 90], (8, 0), True),
        ([80, 90], (8, 9), True),
        ([80, 90], (12, 0), True),  # by the PTX of the last
        ([80, 90], (7, 5), False),
        ([90], (8, 6), False),
        ([86, 100], (8, 0), False),
        ([86, 100], (9, 0), False),
    ],
)
def test_a_gpu_that_the_build_has_no_code_for(
    archs: list[int], gpu: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gathers in another way, where its driver would refuse the launch."""
    monkeypatch.setattr(native, "WHY_NOT", None)
    monkeypatch.setattr(native, "WITH_CUDA", True)
    monkeypatch.setattr(native, "_ARCHS", archs)
    found = SimpleNamespace(major=gpu[0], minor=gpu[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    with FakeTensorMode():
        store, ids, flags = (
            torch.empty(x.shape, dtype=x.dtype, device="cuda:0") for x in (STORE, IDS, FLAGS)
        )
    reason = op._candidates(store, ids, flags)["cuda"]
    assert reason is None if runs else f"RETRO_CUDA_ARCHS={gpu[0]}{gpu[1]}" in str(reason)


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """An uninstalled checkout gathers in PyTorch, and an explicit wish for the C++ code says what to do."""
    monkeypatch.setattr(native, "WHY_NOT", "retro_kernels._C cannot be loaded")
    monkeypatch.setattr(native, "gather_host", None)
    assert gather_neighbours(STORE, IDS, continuation=FLAGS)[1].item() == 4
    with pytest.raises(ValueError, match='"native" cannot run here: retro_kernels._C cannot be loaded'):
        gather_neighbours(STORE, IDS, continuation=FLAGS, backend="native")


@pytest.mark.parametrize("backend_name", ["native", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(backend_name: str, dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    store, continuation = make_store(rng, 20, 4, "int32")
    torch.library.opcheck(
        torch.ops.retro_kernels.gather_neighbours.default,
        (
            torch.from_numpy(store).to(DTYPES[dtype]),
            make_ids(rng, 20, (2, 3, 2)),
            torch.from_numpy(continuation),
            0,
            torch.int64,
            backend_name,
        ),
    )


def test_compiles_into_one_graph(seed: int) -> None:
    rng = np.random.default_rng(seed)
    store, continuation = (torch.from_numpy(x) for x in make_store(rng, 20, 4, "uint16"))

    def step(ids: Tensor) -> Tensor:
        tokens, lengths = gather_neighbours(store, ids, continuation=continuation)
        return tokens.sum(-1) * lengths

    ids = make_ids(rng, 20, (2, 3, 2))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), step(ids))


def test_neighbour_batch_moves() -> None:
    batch = NeighbourBatch(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1), distances=torch.ones(1, 1, 1))
    moved = batch.to("meta")
    assert isinstance(moved, retro_kernels.NeighbourBatch)
    assert moved.tokens.is_meta and moved.lengths.is_meta and moved.distances.is_meta  # type: ignore[union-attr]
    assert moved.ids is None


def embed_and_compare(
    store: Tensor, ids: Tensor, flags: Tensor, weight: Tensor, pad_id: int, backend: str | None
) -> None:
    """Output and gradient are those of a gather and a lookup after it, to the last bit."""
    ours, theirs = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    embedded, lengths = gather_embeddings(
        store, ids, ours, continuation=flags, pad_id=pad_id, backend=backend
    )
    tokens, expected_lengths = gather_neighbours(store, ids, continuation=flags, pad_id=pad_id)
    expected = torch.nn.functional.embedding(tokens, theirs)
    grad = torch.randn_like(expected)
    embedded.backward(grad)
    expected.backward(grad)
    assert torch.equal(embedded, expected) and torch.equal(lengths, expected_lengths)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("chunk_size", "pad_id", "width"), [(64, 0, 24), (5, 3, 200), (1, 0, 1)])
def test_embeddings(backend: str, dtype: str, chunk_size: int, pad_id: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    store, continuation = make_store(rng, 37, chunk_size, dtype, pad_id)
    store %= 97
    ids, weight = make_ids(rng, 37, (2, 3, 4)), torch.randn(97, width)
    embed_and_compare(torch.from_numpy(store), ids, torch.from_numpy(continuation), weight, pad_id, backend)


def test_embeddings_of_wrong_tables_and_of_nothing(backend: str) -> None:
    store = torch.tensor([[1, 2], [3, 0]], dtype=torch.int32)
    flags, weight = torch.tensor([True, False]), torch.randn(4, 3)
    ids = torch.tensor([[0, -1]])
    with pytest.raises(TypeError, match="weight is torch.int64"):
        gather_embeddings(store, ids, weight.long(), continuation=flags, backend=backend)
    with pytest.raises(ValueError, match=r"weight has shape \(4,\)"):
        gather_embeddings(store, ids, weight[:, 0], continuation=flags, backend=backend)
    with pytest.raises(ValueError, match="ids has 2"):
        gather_embeddings(store, ids + 2, weight, continuation=flags, backend=backend)
    embedded, lengths = gather_embeddings(store, ids[:, :0], weight, continuation=flags, backend=backend)
    assert embedded.shape == (1, 0, 4, 3) and lengths.shape == (1, 0)
    if backend == "triton":
        embedded, _ = gather_embeddings(store, ids, weight[:3], continuation=flags, backend=backend)
        assert embedded[0, 0, 2].isnan().all() and not embedded[0, 1].isnan().any()
    else:
        with pytest.raises(IndexError):
            gather_embeddings(store, ids, weight[:3], continuation=flags, backend=backend)


def test_embeddings_are_a_registered_op(seed: int) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is off")
    rng = np.random.default_rng(seed)
    store, continuation = (torch.from_numpy(x) for x in make_store(rng, 9, 4, "int32"))
    arguments = (store % 11, make_ids(rng, 9, (2, 2, 2)), continuation, torch.randn(11, 6), 0)
    torch.library.opcheck(torch.ops.retro_kernels.gather_embeddings, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_embeddings_on_the_gpu(seed: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(seed)
    store, continuation = make_store(rng, 997, 64, "uint16")
    ids, weight = make_ids(rng, 997, (4, 33, 2)), torch.randn(2**16, 896, dtype=dtype)
    embed_and_compare(
        torch.from_numpy(store).cuda(),
        ids.cuda(),
        torch.from_numpy(continuation).cuda(),
        weight.cuda(),
        0,
        None,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["gpu", "pinned", "host", "mapped"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("chunk_size", "pad_id"), [(64, 0), (5, 3)])
def test_on_the_gpu(tmp_path: Path, place: str, dtype: str, chunk_size: int, pad_id: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    store, continuation = make_store(rng, 997, chunk_size, dtype, pad_id)
    many = place == "pinned"  # enough to be read by place, too
    ids = make_ids(rng, 997, (native._IN_ORDER // 2, 3) if many else (4, 33, 2)).cuda()
    expected = slow_gather(store, ids.cpu().numpy(), continuation, pad_id)
    tokens, flags = torch.from_numpy(store), torch.from_numpy(continuation)
    backends: list[str | None] = [None, "native"]
    if place == "gpu":
        tokens, flags, backends = tokens.cuda(), flags.cuda(), [None, "triton", "torch"]
    if place == "pinned":
        tokens, flags = tokens.pin_memory(), flags.pin_memory()
    if place in ("gpu", "pinned") and native.WITH_CUDA:
        backends.append("cuda")
    if place == "mapped":
        np.save(tmp_path / "chunks.npy", store)
        tokens, flags = np.load(tmp_path / "chunks.npy", mmap_mode="r"), continuation
    for backend in backends:
        for out_dtype in (torch.int64, torch.int32):
            result = gather_neighbours(
                tokens, ids, continuation=flags, pad_id=pad_id, dtype=out_dtype, backend=backend
            )
            assert result[0].is_cuda and result[1].is_cuda
            check(result, expected)


@pytest.mark.parametrize("num_chunks", [1, 2, 32_768, 32_769, 10**9])
def test_rows_by_place(num_chunks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, num_chunks, (5, 7, 3), generator=generator)
    ids[0, 0, 0], ids[4, 6, 2] = num_chunks - 1, -1
    order = native._by_place(ids, num_chunks)
    assert sorted(order.tolist()) == list(range(ids.numel()))
    apart = ids.flatten()[order].diff()
    assert apart.min() > -max(1, num_chunks / 2**14), "a row lies before one that is read earlier"


@pytest.mark.gpu
@pytest.mark.parametrize(("backend_name", "place"), [("triton", "gpu"), ("cuda", "gpu"), ("cuda", "pinned")])
def test_on_the_gpu_without_waiting(backend_name: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No synchronisation, capturable, and ids out of range read nothing."""
    if backend_name == "cuda" and not native.WITH_CUDA:
        pytest.skip("built without nvcc")
    monkeypatch.setattr(native, "_IN_ORDER", 6)
    store = torch.arange(1, 257, dtype=torch.int32, device="cuda").reshape(4, 64)
    flags = torch.tensor([True, True, True, False], device="cuda")
    ids = torch.tensor([3, -1, 2**40, 4, 1, -7], device="cuda")
    if place == "pinned":
        store, flags = store.cpu().pin_memory(), flags.cpu().pin_memory()
    arguments = {"continuation": flags, "backend": backend_name}
    gather_neighbours(store, ids, **arguments)  # compiled before it is captured
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            tokens, lengths = gather_neighbours(store, ids, **arguments)
        graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert lengths.tolist() == [64, 0, 0, 0, 128, 0]
    assert tokens[4].tolist() == list(range(65, 193))


@pytest.mark.gpu
@pytest.mark.parametrize("backend_name", ["triton", "cuda"])
def test_on_the_gpu_past_two_to_the_31_tokens(backend_name: str) -> None:
    if backend_name == "cuda" and not native.WITH_CUDA:
        pytest.skip("built without nvcc")
    num_chunks = 2**25 + 2**10
    store = torch.zeros(num_chunks, 64, dtype=torch.uint16, device="cuda")
    store[-2:] = torch.arange(60_000, 60_128, device="cuda").reshape(2, 64).to(torch.uint16)
    flags = torch.ones(num_chunks, dtype=torch.bool, device="cuda")
    tokens, lengths = gather_neighbours(
        store,
        torch.tensor([num_chunks - 2, num_chunks - 1], device="cuda"),
        continuation=flags,
        backend=backend_name,
    )
    assert lengths.tolist() == [128, 64]
    assert tokens[0].tolist() == list(range(60_000, 60_128))


@pytest.mark.skipif(native.WHY_NOT is not None, reason="needs the extension")
@pytest.mark.skipif(not shutil.which("objdump"), reason="needs objdump")
def test_the_compiler_kept_the_prefetches() -> None:
    """GCC drops calls of a function that does nothing but prefetch, and the gather takes twice as long without them."""
    command = ["objdump", "-dC", native._C.__file__]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, bool] = {}  # for each pair of types, since each is compiled for itself
    for function in re.split(r"\n(?=[0-9a-f]+ <)", code):
        if name := re.match(r"[0-9a-f]+ <[^\n]*retro::[^\n]*\b(?:Copier|gather)<([^<>]*)>", function):
            found[name[1]] = found.get(name[1], False) or bool(re.search(r"\b(prefetch\w*|prfm)\b", function))
    if not found:
        pytest.skip("the extension was stripped of the names of its functions")
    assert len(found) == 5 and all(found.values()), found
