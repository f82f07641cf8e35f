"""The CUDA C++ of csrc/cuda on a CPU, by way of cuda_on_cpu.h: its results, on machines without a GPU."""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from numerics import assert_accurate
from torch import Tensor

from retro_kernels.ops.cca import decode_native
from retro_kernels.ops.gather import native
from retro_kernels.ops.gather.reference import gather_reference

pybind11 = pytest.importorskip(
    "pybind11", reason="the CUDA code is built against pybind11, which is not here"
)
HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"


def compiler_version() -> int:
    """Of g++; 0 where it does not run here."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or shutil.which("g++") is None:
        return 0
    return int(subprocess.check_output(["g++", "-dumpversion"], text=True).split(".")[0])


# the first version with numbers of 16 bits
pytestmark = pytest.mark.skipif(compiler_version() < 12, reason="needs g++ 12 or newer on Linux and x86-64")
SHARED = "extern __shared__ __align__(16) unsigned char shared[];"


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """retro_kernels._C as nvcc would have built it, whose CUDA ops run on the CPU."""
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    for name in ("cuda_runtime", "cuda_fp16", "cuda_bf16", "ptx"):
        (folder / f"{name}.h").write_text(f'#include "{HERE}/cuda_on_cpu.h"\n')
    sources = [CSRC / "bindings.cpp", *(CSRC / "cpu").glob("*.cpp")]
    for path in sorted((CSRC / "cuda").glob("*.cu")):
        text = path.read_text().replace('"../', '"')
        text = text.replace(SHARED, "unsigned char* const shared = ::on_cpu::self().block->shared;")
        assert not re.search(r"__shared__|<<<|\basm\b", text), f"{path.name}: not known to cuda_on_cpu.h"
        sources.append(folder / f"{path.stem}_cuda.cpp")
        sources[-1].write_text(text)
    include = [folder, CSRC, CSRC / "cuda", pybind11.get_include(), sysconfig.get_paths()["include"]]
    # another name for the namespace, since pybind11 knows the types of the real extension by theirs
    flags = ["-std=gnu++17", "-fPIC", "-w", "-march=native", "-DRETRO_WITH_CUDA", "-D__CUDA_ARCH__=900"]
    flags += ['-DRETRO_CUDA_ARCHS="90"']
    # coroutines jump to other stacks, which a fortified longjmp takes for an attack
    flags += ["-U_FORTIFY_SOURCE", "-Dretro=retro_on_cpu", *(f"-I{path}" for path in include)]
    compilers = [
        subprocess.Popen(
            [
                "g++",
                "-O2" if path.parent == folder else "-O0",
                "-c",
                path,
                "-o",
                folder / f"{path.stem}.o",
                *flags,
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        for path in sources
    ]
    errors = [compiler.communicate()[1] for compiler in compilers]
    assert all(compiler.returncode == 0 for compiler in compilers), "\n".join(errors)
    library = folder / "_C.so"
    objects = [folder / f"{path.stem}.o" for path in sources]
    subprocess.run(["g++", "-shared", "-o", library, *objects], check=True)
    loader = importlib.machinery.ExtensionFileLoader("_C", os.fspath(library))
    spec = importlib.util.spec_from_loader("_C", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture
def on_cpu(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch, seed: int) -> ModuleType:
    assert emulated.__file__ is not None
    ctypes.CDLL(emulated.__file__).on_cpu_seed(seed & 0xFFFFFFFF)
    for module in (decode_native, native):
        monkeypatch.setattr(module, "_C", emulated, raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    return emulated


def attention(query: Tensor, states: Tensor, seen: Tensor, add: Tensor, scale: float) -> Tensor:
    """[B, T, H, E] for logits query · state · scale + add [B, T, H, K, R], -inf where not seen [B, T, 1, K, R]."""
    logits = torch.einsum("bthe,bkre->bthkr", query, states).to(add.dtype) * scale + add
    logits = logits.masked_fill(~seen, float("-inf")).flatten(3)
    weights = logits.softmax(-1).nan_to_num(0.0).to(states.dtype)
    return weights.flatten(1, 2).bmm(states.flatten(1, 2)).view(query.shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "neighbours", "length", "width", "parts", "merges", "terms"),
    [
        (2, 1, 12, 2, 64, 512, 1, False, "rel rel_bias lengths"),
        (1, 2, 10, 3, 48, 768, 2, True, "rel lengths"),  # R no multiple of a tile; 32 rows, not all real
        (1, 2, 24, 2, 40, 896, 4, True, "none"),  # two tiles of rows
        (1, 3, 5, 3, 32, 1024, 3, False, "rel_bias lengths"),
        (1, 2, 16, 3, 64, 1024, 2, True, "rel lengths"),  # two tiles of states in shared memory, not three
        (2, 1, 16, 2, 64, 896, 3, True, "rel rel_bias lengths"),
        (2, 1, 32, 5, 128, 896, 2, True, "rel lengths"),
    ],
)
def test_decoding_over_states(
    dtype: torch.dtype,
    batch: int,
    tokens: int,
    heads: int,
    neighbours: int,
    length: int,
    width: int,
    parts: int,
    merges: bool,
    terms: str,
    on_cpu: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    query = torch.randn(batch, tokens, heads, width).to(dtype)
    states = (torch.randn(batch, neighbours, length, width) * width**-0.25).to(dtype)
    columns = 64 + length - 1
    rows = torch.randint(0, 64, (batch, tokens), dtype=torch.int32)
    rows[0, 0] = -1
    rel = torch.full(
        (heads, batch * tokens, columns + 3), torch.nan, dtype=dtype
    )  # not all columns are written
    rel[..., :columns] = torch.randn(heads, batch * tokens, columns)
    rel_bias = torch.randn(heads, columns, dtype=torch.float32 if dtype == torch.float16 else dtype)
    lengths = torch.randint(0, length + 1, (batch, neighbours))
    lengths[-1, : (neighbours + 1) // 2] = 0  # so that a part has no key at all
    lengths[-1, -1:].clamp_(min=1)  # and another has
    scale = width**-0.25

    def exact(wide: torch.dtype, content: torch.dtype) -> Tensor:
        column = (rows[..., None] - torch.arange(length) + length - 1).clamp(min=0).long()  # [B, T, R]
        add = torch.zeros(batch, tokens, heads, length, dtype=wide)
        if "rel " in f"{terms} ":
            of_rows = rel.view(heads, batch, tokens, -1).permute(1, 2, 0, 3).to(wide)
            add += of_rows.gather(-1, column[:, :, None].expand(-1, -1, heads, -1)) * scale
        if "rel_bias" in terms:
            add += rel_bias[:, column].permute(1, 2, 0, 3)
        seen = (rows >= 0)[:, :, None, None, None].expand(-1, -1, 1, neighbours, length)
        if "lengths" in terms:
            seen = seen & (torch.arange(length) < lengths[..., None])[:, None, None]
        return attention(query.to(content), states.to(content), seen, add[:, :, :, None], scale)

    expected, plain = exact(torch.float64, torch.float64), exact(torch.float32, dtype)
    if "lengths" in terms:  # padding is not read
        states[torch.arange(length) >= lengths[..., None]] = torch.nan
    given = (
        rel if "rel " in f"{terms} " else None,
        rel_bias if "rel_bias" in terms else None,
        lengths if "lengths" in terms else None,
    )
    if not merges:
        monkeypatch.setattr(on_cpu, "absorbed_decode_clusters", lambda job: 0)
    launch = decode_native.Launch(
        query,
        states,
        rows,
        *given[1:],
        columns,
        columns + 3,
        scale / torch.log(torch.tensor(2.0)).item(),
        parts,
    )
    assert launch.merges == merges
    assert on_cpu.__file__ is not None
    before = ctypes.CDLL(on_cpu.__file__).on_cpu_previous
    before.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
    made = query.clone(), rel.clone()
    runs = []
    for _ in range(2):
        for to, source in zip((query, rel), made, strict=True):  # what the launch before has yet to write
            to.fill_(torch.nan)
            before(to.data_ptr(), source.data_ptr(), source.nbytes)
        shape = (batch * tokens * heads, width)
        if parts == 1 or merges:
            out, lse = torch.full(shape, torch.nan, dtype=dtype), None
            launch(query, states, rows, *given, out, lse)
        else:
            out = torch.full((shape[0], parts, width), torch.nan)
            lse = torch.full((shape[0], parts), torch.nan)
            launch(query, states, rows, *given, out, lse)
            weights = torch.exp2(lse - lse.amax(1, keepdim=True).clamp(min=-1e30))
            out = ((weights[..., None] * out).sum(1) / weights.sum(1, keepdim=True).clamp(min=1e-30)).to(
                dtype
            )
        runs.append(out.view(batch, tokens, heads, width))
    assert torch.equal(runs[0], runs[1])  # in whatever order threads run
    assert runs[0][0, 0].eq(0).all()
    assert_accurate(runs[0], plain, expected)


def test_decoding_over_states_of_other_widths(on_cpu: ModuleType) -> None:
    assert not on_cpu.absorbed_decode_takes(640, 2, 64, 16)
    for width in (512, 768, 896, 1024):  # in the shared memory of an H100
        assert on_cpu.absorbed_decode_takes(width, 40, 128, 16) and on_cpu.absorbed_decode_takes(
            width, 40, 128, 32
        )
    query, states = torch.zeros(1, 1, 1, 640).half(), torch.zeros(1, 1, 16, 640).half()
    rows = torch.zeros(1, 1, dtype=torch.int64)
    launch = decode_native.Launch(query, states, rows, None, None, 1, 1, 1.0, 1)
    with pytest.raises(ValueError, match="640 wide; 512, 768, 896 and 1024 are allowed"):
        launch(query, states, rows, None, None, None, torch.empty(1, 640), None)


def test_threads_decode_at_the_same_time(on_cpu: ModuleType) -> None:
    """How much shared memory a kernel may have is said before its launch: not what another thread's call needs."""
    assert on_cpu.__file__ is not None
    pause = ctypes.c_int.in_dll(ctypes.CDLL(on_cpu.__file__), "on_cpu_pause")

    def decode(neighbours: int) -> Tensor:
        query, states = torch.ones(1, 1, 2, 512).half(), torch.ones(1, neighbours, 16, 512).half()
        rows, out = torch.zeros(1, 1, dtype=torch.int64), torch.full((2, 512), torch.nan).half()
        launch = decode_native.Launch(query, states, rows, None, None, 1, 8, 1e-3, 1)
        launch(query, states, rows, None, None, None, out, None)
        return out

    pause.value = 100
    try:
        with ThreadPoolExecutor(2) as threads:
            assert all(out.eq(1).all() for out in threads.map(decode, (40, 1)))
    finally:
        pause.value = 0


@pytest.mark.parametrize("stored", [torch.uint16, torch.int32])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("chunk_size", [64, 5])  # 16 bytes a load, or one token
@pytest.mark.parametrize("in_order", [2, 10**9])  # so many ids are read by place, or as they stand
def test_gather(
    stored: torch.dtype,
    dtype: torch.dtype,
    chunk_size: int,
    in_order: int,
    on_cpu: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    monkeypatch.setattr(native, "_IN_ORDER", in_order)
    tokens = torch.randint(0, 9, (40, chunk_size), dtype=torch.int32).to(stored)  # pads among them
    continuation = torch.rand(40) < 0.7
    ids = torch.randint(-1, 40, (3, 7, 2))
    ids[0, 0, 0], ids[0, 0, 1] = 39, -1
    out, lengths = native.gather_cuda(tokens, ids, continuation, 0, dtype)
    wanted, wanted_lengths = gather_reference(tokens, ids, continuation, 0, dtype)
    assert torch.equal(out, wanted) and torch.equal(lengths, wanted_lengths)
    outside = native.gather_cuda(tokens, torch.tensor([[40, -7]]), continuation, 0, dtype)
    assert outside[0].eq(0).all() and outside[1].eq(0).all()  # an id from elsewhere reads nothing
