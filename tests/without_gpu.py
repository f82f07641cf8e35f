"""Scripts that compile Triton's kernels for a GPU that is not here, and see what would be launched on it."""

from __future__ import annotations

import os
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


def run(script: str, cache: Path, driver: str = DRIVER) -> None:
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
        },
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0 and done.stdout.endswith("the same\n"), done.stdout + done.stderr
