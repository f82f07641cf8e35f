"""Which implementation of an op runs: an argument, else `use_backend`, else the first one that can run here."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, ParamSpec

import numpy as np
import torch
from torch.autograd import forward_ad

from retro_kernels.config import InputError

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
"""Triton decides when a kernel is defined whether it is compiled or interpreted, so this is read once as well."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_AS_IT_IS = ("rel_bias", "scale")
"""Added to float32 logits, and multiplied with them."""
_Given = ParamSpec("_Given")
uncompiled = getattr(torch, "_disable_dynamo", torch.compiler.disable)
"""Of a function what torch.compile calls as it is. The latter imports at once what doubles the time to import this
package; the former with the first call."""
_preferred: str | None = None


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Every op called inside runs on backend `name` ("reference", "torch", "triton", …); None chooses again by itself.

    An op that does not have this backend, or cannot run it here, raises ValueError: an explicit choice never
    falls back. A `backend=` argument of the op goes before this. For the whole process: one thread at a time.
    """
    global _preferred
    before, _preferred = _preferred, name
    try:
        yield
    finally:
        _preferred = before


def pick_backend(op: str, requested: str | None, candidates: Mapping[str, str | None]) -> str:
    """The backend that op `op` shall run on.

    `candidates` maps each backend's name, best first, to the reason why it cannot run here, or to None if it can.
    Raises ValueError for an explicit choice that does not exist or cannot run.
    """
    name = requested if requested is not None else _preferred
    if name is None:
        for candidate, reason in candidates.items():
            if reason is None:
                return candidate
        listed = "; ".join(f"{candidate}: {reason}" for candidate, reason in candidates.items())
        raise ValueError(f"{op}: no backend can run here. {listed}")
    if not isinstance(name, str) or name not in candidates:
        raise ValueError(
            f'{op}: there is no backend "{name}". Choose one of {", ".join(candidates)}, or None.'
        )
    if candidates[name] is not None:
        raise ValueError(f'{op}: backend "{name}" cannot run here: {candidates[name]}')
    return name


def limit_threads(count: int) -> None:
    """From now on loops of the calling thread, torch's and FAISS's, run on so many threads; those of other threads are
    left alone (`torch.set_num_threads` changes them all). Torch's only where `can_limit_threads`."""
    _limit_torch(count)
    # MKL heeds OpenMP's number only where torch.set_num_threads was never called
    if (mkl := mkl_library()) is not None:
        mkl.MKL_Set_Num_Threads_Local(count)
    if faiss := sys.modules.get("faiss"):  # it may bring an OpenMP of its own
        faiss.omp_set_num_threads(count)


def can_limit_threads() -> bool:
    """Whether csrc is here, and was built with OpenMP."""
    return _limit_torch(torch.get_num_threads())


@lru_cache
def mkl_library() -> Any:
    """The library that does torch's matrix products, as ctypes knows it, where that is MKL; else None."""
    if not torch.backends.mkl.is_available():
        return None
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        library.MKL_Set_Num_Threads_Local, library.MKL_Get_Max_Threads  # noqa: B018
    except (OSError, AttributeError):
        return None
    return library


def _limit_torch(count: int) -> bool:
    torch.get_num_threads()  # a new thread takes torch's number over when it first asks
    try:
        from retro_kernels import _C

        return bool(_C.limit_threads(count))
    except (ImportError, AttributeError):  # no csrc, or an older build of it
        return False


def pick_device(name: torch.device | str = "auto") -> torch.device:
    """`"auto"` is the first GPU, or the CPU where there is none. InputError for one that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device is {name!r}; give auto, cpu, cuda or cuda:0, cuda:1, ….") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"device is {str(name)!r}, but this torch ({torch.__version__}) sees no GPU. Use cpu (--device cpu)."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device is {str(name)!r}, but there are {torch.cuda.device_count()} GPUs.")
    return device


def numbered(device: torch.device | str | None) -> torch.device:
    """The device as its tensors will name it: "cuda" is not equal to "cuda:0", and another thread's current GPU need
    not be this one's. None: the CPU."""
    device = torch.device("cpu" if device is None else device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


_TRITON = _triton_version()


def why_not_interpreted(version: str, of_numpy: str) -> str | None:
    """The reason why the interpreter of this version of Triton does not run with this one of numpy, or None."""

    def at_least(given: str, *wanted: int) -> bool:
        return tuple(map(int, given.split(".")[:2])) >= wanted

    # it takes arrays of one element for numbers
    if at_least(version, 3, 7) or not at_least(of_numpy, 2, 4):
        return None
    return f"the interpreter of Triton {version} does not run with numpy {of_numpy}: it needs numpy<2.4, or triton>=3.7"


NOT_INTERPRETED = None if _TRITON is None else why_not_interpreted(_TRITON, np.__version__)


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why the Triton kernels cannot take tensors of this device and dtype, or None if they can."""
    if _TRITON is None:
        return "triton is not installed (pip install triton; it exists for Linux only)"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, not {str(dtype)[6:]}"
    if device.type == "cuda":
        if torch.version.hip is not None:  # whose numbers of architectures mean something else
            return "the kernels are for NVIDIA GPUs, and this PyTorch is for AMD's"
        if INTERPRETING:
            return "TRITON_INTERPRET=1 is set, which is for tests on a CPU"
        # torch.compile folds the properties into a constant, unlike get_device_capability
        if torch.cuda.get_device_properties(device).major < 8:
            return "the kernels need a GPU of compute capability 8.0 (A100) or newer"
        return None
    if device.type == "cpu" and INTERPRETING:
        return (
            "Triton's interpreter multiplies bfloat16 wrongly" if dtype == torch.bfloat16 else NOT_INTERPRETED
        )
    if device.type == "cpu":
        return "it needs a GPU (on a CPU only Triton's slow interpreter, TRITON_INTERPRET=1, meant for tests)"
    return f"the kernels run on CUDA devices, not on {device.type}"


SMALL = 89
"""Of `family`: GPUs of which a program has 99 KB of shared memory."""


def family(major: int, minor: int) -> int:
    """Which GPUs of compute capability 8.0 on are alike in what block sizes depend on: shared memory, and how products
    are made. 80 (A100, Orin), 89 (Ampere's and Ada's others; Blackwell's without tensor memory, 12.x), 90 (Hopper)
    and 100 (Blackwell with tensor memory; what is newer is taken for the like)."""
    if major == 8:
        return 80 if minor in (0, 7) else SMALL
    return {9: 90, 12: SMALL}.get(major, 100)


def is_small(device: torch.device) -> bool:
    """Whether it is a GPU of family SMALL."""
    if device.type != "cuda":
        return False
    # torch.compile folds the properties into a constant, unlike get_device_capability
    properties = torch.cuda.get_device_properties(device)
    return family(properties.major, properties.minor) == SMALL


def why_not_transformed() -> str | None:
    """The reason why an op with a backward of its own cannot run inside `torch.func` or forward-mode differentiation,
    where its tangent would be lost without a word, or None outside of them."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "it has no torch.func transforms (vmap, grad, jvp) and no forward-mode derivative"
    return None


def casts(op: Callable[_Given, torch.Tensor]) -> Callable[_Given, torch.Tensor]:
    """Inside autocast the op, whose first argument is the query, gets what it multiplies in autocast's dtype, and is
    called outside, where it takes the short way (`_shortcut`). A float64 query is left alone."""

    @wraps(op)
    def wrapped(*args: _Given.args, **kwargs: _Given.kwargs) -> torch.Tensor:
        query: Any = args[0] if args else kwargs.get("query")
        if (
            not isinstance(query, torch.Tensor)
            or query.is_meta  # has no autocast
            or not torch.is_autocast_enabled(query.device.type)
            or query.dtype == torch.float64
        ):
            return op(*args, **kwargs)
        dtype = torch.get_autocast_dtype(query.device.type)

        def cast(x: Any) -> Any:  # what is of no such dtype is refused as it is outside of autocast
            return x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype in FLOATS else x

        given = [cast(x) for x in args]
        named = {name: x if name in _AS_IT_IS else cast(x) for name, x in kwargs.items()}
        with torch.autocast(query.device.type, enabled=False):
            return op(*given, **named)  # type: ignore[arg-type]

    return wrapped


@lru_cache
def cpu_flags() -> frozenset[str]:
    """What this processor can, in Linux's words; nothing where it does not say."""
    try:
        words = Path("/proc/cpuinfo").read_text().partition("\nflags")[2].partition("\n")[0]
    except OSError:
        return frozenset()
    return frozenset(words.split())


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bfloat16 itself (AVX512_BF16 or AMX). Emulated, it is slower than float32."""
    return not cpu_flags().isdisjoint(("avx512_bf16", "amx_bf16"))
