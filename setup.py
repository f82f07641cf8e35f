"""Compile csrc/ into retro_kernels._C. Everything else about the package is in pyproject.toml.

Needs no torch, so build isolation stays cheap and one build serves every torch. csrc/cuda/*.cu is compiled where nvcc
is found: RETRO_CUDA=0 leaves it out, RETRO_CUDA=1 insists. RETRO_CUDA_ARCHS (default "80;90") names the GPU
architectures; PTX of the last one is kept, so that newer GPUs run too.
"""

import os
import shutil
import subprocess
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

CPU_SOURCES = ["csrc/bindings.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]
CUDA_SOURCES = sorted(map(str, Path("csrc/cuda").glob("*.cu")))
HEADERS = sorted(map(str, Path("csrc").rglob("*.h")))
NVCC_FLAGS = ["-O3", "-std=c++17", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DRETRO_WITH_CUDA"]


def find_nvcc() -> str | None:
    wish = os.environ.get("RETRO_CUDA", "auto")
    if wish not in ("0", "1", "auto"):
        raise SystemExit(
            f"RETRO_CUDA is {wish!r}; it must be 0 (never), 1 (must) or auto (where nvcc is found)."
        )
    if wish == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")
    if nvcc is None and wish == "1":
        raise SystemExit("RETRO_CUDA=1, but nvcc was not found. Put it on PATH or set CUDA_HOME.")
    return nvcc


def toolkit_root(nvcc: str) -> Path:
    """The toolkit that nvcc itself belongs to; nvcc may be a link or a wrapper script."""
    dry_run = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True)
    for line in dry_run.stderr.splitlines():
        if " TOP=" in line:
            return Path(line.split(" TOP=", 1)[1]).resolve()
    raise SystemExit(
        f"{nvcc} --dryrun names no toolkit (TOP=). Set CUDA_HOME, or RETRO_CUDA=0 to build without."
    )


class BuildExt(build_ext):
    """pybind11's build_ext that also compiles the .cu files and links the CUDA runtime statically."""

    def has_openmp(self) -> bool:
        probe = [*self.compiler.compiler_cxx[:1], "-fopenmp", "-shared", "-x", "c++", "-", "-o", os.devnull]
        return subprocess.run(probe, input=b"#include <omp.h>\n", capture_output=True).returncode == 0

    def build_extension(self, ext):
        if (
            self.compiler.compiler_type == "unix" and self.has_openmp()
        ):  # else attention on a CPU runs in torch
            ext.extra_compile_args.append("-fopenmp")
            ext.extra_link_args.append("-fopenmp")
        if nvcc := find_nvcc():
            archs = os.environ.get("RETRO_CUDA_ARCHS", "80;90").replace(",", ";").strip("; ").split(";")
            targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
            targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
            Path(self.build_temp).mkdir(parents=True, exist_ok=True)
            for source in CUDA_SOURCES:
                target = str(Path(self.build_temp, Path(source).stem + ".cu.o"))
                self.spawn([nvcc, "-c", source, "-o", target, *NVCC_FLAGS, *targets])
                ext.extra_objects.append(target)
            ext.define_macros += [("RETRO_WITH_CUDA", None), ("RETRO_CUDA_ARCHS", f'"{";".join(archs)}"')]
            root = toolkit_root(nvcc)
            ext.library_dirs += [str(p) for p in (root / "lib64", root / "lib") if p.is_dir()]
            ext.libraries += ["cudart_static", "rt", "dl", "pthread"]
        super().build_extension(ext)


ParallelCompile("MAX_JOBS").install()
extension = Pybind11Extension("retro_kernels._C", CPU_SOURCES, depends=[*HEADERS, *CUDA_SOURCES], cxx_std=17)
setup(ext_modules=[extension], cmdclass={"build_ext": BuildExt})
