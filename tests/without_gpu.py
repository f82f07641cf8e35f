"""Scripts that compile Triton's kernels for a GPU that is not here, and see what would be launched on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import static

DRIVER = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from retro_kernels.ops.cca import tiles

class Driver:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = get_current_stream = lambda self, *device: 0

def described(x):
    if isinstance(x, torch.Tensor):
        return tensor(x)
    if hasattr(x, "block_shape"):
        return tensor(x.base), tuple(x.shape), tuple(x.strides), tuple(x.block_shape), x.padding
    return "metadata" if type(x).__name__ == "LazyDict" else x

def run(self):
    return lambda *args: calls.append((self.hash, *map(described, args)))

triton.runtime.driver.set_active(Driver())
CompiledKernel._init_handles, CompiledKernel.function = lambda self: None, "function"
CompiledKernel.run = property(run)
tiles.architecture = lambda device: 90
"""
"""By the installed Triton's compiler and objects: what is launched goes into a list `calls`, its tensors as a function
`tensor` describes them, both of the script's own."""

LAUNCHER = (
    DRIVER.partition("triton.runtime")[0]
    + """
from triton.backends.nvidia import driver as nvidia

class Map:
    def __init__(self, *fields):
        self.fields = [tuple(x) if isinstance(x, (list, torch.Size)) else x for x in fields]
        encoded.append(self.fields)

class Utils:
    fill_tma_descriptor = fill_tma_descriptor_tiled = Map
    build_signature_metadata = staticmethod(tuple)
    get_device_properties = lambda self, device: {"max_shared_mem": 232448}
    load_binary = lambda self, *given: ("module", "function", 32, 0, 1024)
    unload_module = lambda self, module: None
    launch = lambda self, *given: passed(given[:-1], given[-1])

def passed(given, own):
    calls.append([*given, *own])

def compiled(**given):  # by older Tritons, for each kernel
    return type("Module", (), {"launch": staticmethod(lambda *given: passed(given, ()))})

Driver.utils, Driver.launcher_cls = Utils(), nvidia.CudaLauncher
nvidia.PyKernelArg = lambda **fields: fields
nvidia.make_launcher, nvidia.library_dirs = lambda *given: "", list
nvidia.compile_module_from_src = compiled
triton.runtime.driver.set_active(Driver())
tiles.architecture = lambda device: 90
encoded = []
"""
)
"""The same with Triton's own launcher: `calls` are of its native function, and `encoded` what maps of TMA windows are
made of."""

NATIVE = (
    DRIVER.partition("class Driver")[0]
    + """
import ctypes, os
from triton.backends.nvidia.driver import CudaDriver

cuda = ctypes.CDLL("libcuda.so.1")
cuda.written_bytes.restype, cuda.encoded_maps.restype = ctypes.c_size_t, ctypes.c_long
driver = CudaDriver()
driver.get_current_target = lambda: GPUTarget("cuda", 90, 32)
driver.get_current_device, driver.get_current_stream = lambda: 0, lambda device: 77
triton.runtime.driver.set_active(driver)
tiles.architecture = lambda device: 90

BYTES = {"i1": 1, "u1": 1, "i8": 1, "u8": 1, "i16": 2, "u16": 2, "fp16": 2, "bf16": 2, "i64": 8, "u64": 8, "fp64": 8}

def parameters(made):
    found = []
    for kind in made.src.signature.values():
        if kind.startswith("tensordesc"):
            rank = kind.count(",", kind.index("[")) + 1
            found += [128, *[4] * rank, *[8] * rank]
        elif kind != "constexpr":
            found.append(8 if kind.startswith("*") else BYTES.get(kind, 4))
    return [*found, 8, 8]  # memory of its own, and a profiler's

def expect(sizes):
    cuda.expect_parameters((ctypes.c_int * 1024)(*sizes), len(sizes))

def written():
    text = ctypes.create_string_buffer(max(cuda.written_bytes(None), 1))
    cuda.written_bytes(text)
    return text.raw
"""
)
"""The same with all of Triton's own, down to the driver of CUDA (ops/cuda_driver.c): `written` are its launches."""


def driver_of_cuda(folder: Path) -> Path:
    """Built in `folder`, as libcuda.so.1; skips where it cannot be."""
    if (reason := static.why_not()) or (compiler := shutil.which("gcc")) is None:
        pytest.skip(reason or "there is no gcc, by which Triton builds its launcher")
    import triton

    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source = Path(__file__).parent / "ops" / "cuda_driver.c"
    library = folder / "libcuda.so.1"
    subprocess.run(
        [compiler, "-shared", "-fPIC", f"-I{include}", str(source), "-o", str(library)], check=True
    )
    (folder / "libcuda.so").symlink_to(library)  # Triton 3.5 looks for it by this name
    return folder


def run(script: str, cache: Path, driver: str = DRIVER, **environment: str) -> None:
    """In a process of its own, since this one interprets kernels; it has to print "the same" at last."""
    if reason := static.why_not():
        pytest.skip(reason)
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", driver + script],
        env={
            **os.environ,
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": str(cache),
            "PYTHONPATH": str(root),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0 and done.stdout.endswith("the same\n"), done.stdout + done.stderr
