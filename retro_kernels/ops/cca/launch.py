"""Launching the attention kernels. What is worked out for one call is kept for others of its kind.

A training step makes the same calls over and over, and Python takes longer to work one out (block sizes, strides, and
in Triton the machine code that fits the types and alignment of the arguments) than to make it. A pass is an object that
has done so: it holds the launches of its kernels, and its call allocates and launches.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from retro_kernels.ops import _shortcut
from retro_kernels.ops._backend import INTERPRETING
from retro_kernels.ops._shortcut import Recent, keep, kind, note
from retro_kernels.ops.cca import tiles
from retro_kernels.ops.cca.launcher import launcher


class NotCompiled(OutOfResources):  # type: ignore[misc]
    """For sm_100 Triton 3.7 makes of a kernel in some block sizes, without an error, an instruction that stops the GPU,
    and 3.5 fails. In others there is a kernel, as where shared memory does not suffice."""

    def __init__(self, kernel: Any) -> None:
        super().__init__(1, 0, kernel.__name__)

    def __str__(self) -> str:
        return "is not compiled by this Triton in any blocks that were tried"


class Window:
    """By TMA a [1, rows, columns] window into `flat` [batch, rows, columns in all], else the tensor itself."""

    def __init__(self, flat: Tensor, rows: int, columns: int, tma: bool) -> None:
        self._fields: dict[str, Any] | None = None
        if tma:
            # Triton checks the sizes here, once; their kind keeps the alignment
            made = TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [1, rows, columns])
            self._fields = {**vars(made), "base": None}

    def __call__(self, x: Tensor) -> Any:
        """`x`: of the memory layout of `flat`, in any shape."""
        if self._fields is None:
            return x
        made = TensorDescriptor.__new__(TensorDescriptor)
        vars(made).update(self._fields)
        made.base = x
        return made


class Launch:
    """One launch of a kernel: its tensors come with each call, in the kernel's order; all else is fixed.

    `windows`: of the first tensors; the others, and those without a window, are passed on as they are. `scalars` and
    then `constants` follow the tensors in the kernel's signature; `options` are Triton's.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        windows: Sequence[Window | None],
        scalars: tuple[int | float, ...],
        constants: dict[str, Any],
        **options: int,
    ) -> None:
        names = tuple(constants)
        assert tuple(kernel.arg_names[-len(names) :]) == names, "constants have to be in the kernel's order"
        self._kernel = kernel
        self._grid = (*grid, 1, 1)[:3]
        self._windows = tuple(windows)
        self._rest = (*scalars, *constants.values())
        self._options = options
        self._run: Callable[..., Any] | None = None

    @property
    def compiled(self) -> bool:
        return self._run is not None

    def __call__(self, *tensors: Tensor | None) -> None:
        if self._run is not None:
            self._run(*tensors)
            return
        given = self._described(tensors)
        device = next(x.device for x in tensors if x is not None)
        if tiles.architecture(device) >= 100 and not INTERPRETING:
            try:
                only_made = self._kernel.warmup(*given, grid=self._grid, **self._options)
            except RuntimeError as error:
                raise NotCompiled(self._kernel) from error
            # what reads none of its arguments is a trap
            if only_made is not None and "ld.param" not in only_made.asm["ptx"]:
                raise NotCompiled(self._kernel)
        made = self._kernel[self._grid](*given, **self._options)
        if made is not None:  # an interpreter makes nothing
            self._run = self._launcher(made, tensors)

    def _described(self, tensors: Sequence[Tensor | None]) -> list[Any]:
        first = zip(tensors, self._windows, strict=False)
        return [
            *(x if x is None or window is None else window(x) for x, window in first),
            *tensors[len(self._windows) :],
            *self._rest,
        ]

    def _launcher(self, made: Any, tensors: Sequence[Tensor | None]) -> Callable[..., Any]:
        with contextlib.suppress(Exception):  # whatever is not as expected in there is no reason to fail
            return launcher(made, self._grid, self._described, tensors)
        ordinary = made[self._grid]
        return lambda *tensors: ordinary(*self._described(tensors))


Sizes = TypeVar("Sizes")


class Pass(Protocol):
    """One direction of a kind of call."""

    launches: Sequence[Launch]

    def __call__(self, *tensors: Tensor | None) -> Any: ...


_kept: dict[Hashable, Pass] = {}
_recent: Recent[Pass] = Recent()


def run(
    what: str,
    tensors: Sequence[Tensor | None],
    options: tuple[Any, ...],
    make: Callable[[Sequence[Any], Sizes], Pass],
    fitting: Callable[[Callable[[Sizes], Any]], Any],
) -> Any:
    """Calls the pass `what` with `tensors`: the one that was kept for this kind of call, else one that `make(tensors,
    sizes)` makes. `fitting` calls what it is given with block sizes, with others where those do not fit the GPU."""
    short, present = (what, options, *map(type, tensors)), [x for x in tensors if x is not None]
    made = _recent.find(short, present)
    if made is None:
        key = kind(what, tensors, options)
        made = _kept.get(key)
        if made is not None:
            _recent.add(short, present, made)
    if made is None:
        tensors = [_dense(x) for x in tensors]
        key = kind(what, tensors, options)
        made = _kept.get(key)
    if made is not None:
        note(made, tensors)
        return made(*tensors)

    def attempt(sizes: Sizes) -> Any:
        made = make(tensors, sizes)
        result = made(*tensors)
        # where nothing was compiled there is nothing to keep
        if all(launch.compiled for launch in made.launches):
            keep(_kept, key, made)
            note(made, tensors)
        return result

    return fitting(attempt)


@functools.cache
def splits(programs: int, steps: int, slots: int, most: int | None = None) -> int:
    """Into how many parts (`most` at most) the `steps` of each of `programs` pieces of work are cut, so that the last
    wave of programs is full on a GPU that runs `slots` at a time. A program's start and end, and adding up the parts,
    weigh as much as two steps."""
    steps = max(steps, 1)
    best = min(
        range(1, min(steps, slots if most is None else most) + 1),
        key=lambda n: -(-programs * n // slots) * (-(-steps // n) + 2),
    )
    return -(-steps // -(-steps // best))  # none is empty


def forget() -> None:
    """Block sizes are to be chosen anew."""
    _kept.clear()
    _recent.clear()
    _shortcut.forget()


def _dense(x: Tensor | None) -> Tensor | None:
    """x itself, or a copy where a kernel could not walk it: its `flat_rows` has to be a view with a dense last axis,
    and what has fewer dimensions has to lie in one piece."""
    if x is None:
        return None
    if x.dim() < 4:
        return x.contiguous()
    flat = flat_rows(x)
    if flat.data_ptr() != x.data_ptr():
        return flat.view(x.shape)
    return x if flat.stride(2) == 1 else x.contiguous()


def flat_rows(x: Tensor) -> Tensor:
    """[.., rows, heads, D] → [batch, rows, heads * D]: a view wherever the strides allow it."""
    return x.reshape(math.prod(x.shape[:-3]), x.shape[-3], x.shape[-2] * x.shape[-1])
