"""Triton's launcher of one kernel, without what it does anew for each launch.

It goes through all arguments for the descriptors of TMA windows, encodes those, and gathers for hooks what nobody asks
for. That takes the processor longer than the launch itself. But how a window is encoded depends on its tensor's address
alone, as all else of it is fixed, and allocators give the same addresses again and again.

Triton's own objects do the work, so that a kernel gets what they pass on. Their insides are no interface: where these
are not as expected, `launcher` raises an error, and its caller launches as Triton would have it.
"""

from __future__ import annotations

import copy
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from triton import knobs, runtime
from triton.tools.tensor_descriptor import TensorDescriptor

_MOST = 256
"""Addresses for which the encoding of a window is kept."""


class Unexpected(Exception):
    """Triton's objects are not those that this file knows."""


def launcher(
    made: Any,
    grid: tuple[int, ...],
    described: Callable[[Sequence[Tensor | None]], list[Any]],
    tensors: Sequence[Tensor | None],
) -> Callable[..., None]:
    """Launches the compiled kernel `made` with the tensors that it is called with.

    `described`: all arguments of the kernel for these: first they, windows described, then what is the same each time.
    `tensors`: some of the kind that will come, for a trial."""
    whole = made.run
    if type(whole).__module__ != "triton.backends.nvidia.driver":
        raise Unexpected("the launcher is not NVIDIA's")
    active = runtime.driver.active
    device, stream_of = active.get_current_device(), active.get_current_stream
    before, after = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    if not isinstance(before, knobs.HookChain) or not isinstance(after, knobs.HookChain):
        raise Unexpected("the hooks are no chains, which can be empty")
    ordinary = made[grid]
    kernel = made.function, made.packed_metadata, None, None, None  # nothing for hooks, and no hooks
    given = described(tensors)
    rest = tuple(given[len(tensors) :])
    count = max((i + 1 for i, x in enumerate(given) if isinstance(x, TensorDescriptor)), default=0)
    first = given[:count]
    # what becomes of a window: its encoding, sizes and strides
    lengths = [1 + 2 * len(x.shape) if isinstance(x, TensorDescriptor) else 1 for x in first]
    known: list[dict[int, list[Any]] | None] = [
        {} if isinstance(x, TensorDescriptor) else None for x in first
    ]
    only_encodes, only_launches = _halves(whole, count > 0)

    def encoded(given: list[Any]) -> tuple[list[Any], list[list[Any]]]:
        """All that is passed on of these arguments, and the parts of it that became of the first ones."""
        passed = _passed_on(only_encodes, *grid, 0, *kernel, *given)
        at = len(passed) - (len(given) - count) - sum(lengths)
        return passed, [passed[(at := at + length) - length : at] for length in lengths]

    def launch(*tensors: Tensor | None) -> None:
        hooks = knobs.runtime
        if (
            hooks.launch_enter_hook is not before
            or hooks.launch_exit_hook is not after
            or before.calls
            or after.calls
        ):
            ordinary(*described(tensors))
            return
        args: list[Any] = []
        for x, encodings in zip(tensors, known, strict=False):
            if encodings is None:
                args.append(x)
            elif (part := encodings.get(x.data_ptr())) is not None:  # type: ignore[union-attr]
                args += part
            else:
                args = new(tensors)
                break
        only_launches(*grid, stream_of(device), *kernel, *args, *tensors[count:], *rest)

    def new(tensors: Sequence[Tensor | None]) -> list[Any]:
        _, parts = encoded(described(tensors))
        for x, part, encodings in zip(tensors, parts, known, strict=False):
            if x is not None and encodings is not None:
                if len(encodings) >= _MOST:
                    encodings.clear()
                encodings[x.data_ptr()] = part
        return [y for part in parts for y in part]

    passed, parts = encoded(given)
    for x, (head, *sizes) in zip(first, parts, strict=True):
        if isinstance(x, TensorDescriptor) and (isinstance(head, Tensor) or sizes != [*x.shape, *x.strides]):
            raise Unexpected("a window is passed on in another form")
    args = [*(y for part in parts for y in part), *given[count:]]
    found = _passed_on(_with(only_launches, _pass), *grid, 0, *kernel, *args)
    if len(found) != len(passed) or any(x is not y for x, y in zip(found, passed, strict=True)):
        raise Unexpected("the halves do not pass on what the whole does")
    return launch


def _halves(whole: Any, encodes: bool) -> tuple[Any, Any]:
    """The launcher `whole` up to what it calls to launch, which is noted instead, and without what encodes windows."""
    if not encodes:
        return _with(whole, _pass), whole
    function = whole.launch
    place = function.__code__.co_freevars.index("launcher")
    cells = list(function.__closure__)
    only_launches = _with(whole, cells[place].cell_contents)
    cells[place] = types.CellType(_pass)
    noting = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
    )
    return _with(whole, noting), only_launches


def _with(whole: Any, launch: Callable[..., None]) -> Any:
    other = copy.copy(whole)
    other.launch = launch
    return other


class _Passed(threading.local):
    args: tuple[Any, ...] = ()


_passed = _Passed()


def _pass(*args: Any) -> None:
    _passed.args = args


def _passed_on(noting: Any, *args: Any) -> list[Any]:
    """What a launcher that ends in `_pass` passes on; Triton 3.7 and newer keep the kernel's own in a list."""
    noting(*args)
    passed, _passed.args = _passed.args, ()
    return [*passed[:-1], *passed[-1]] if isinstance(passed[-1], (list, tuple)) else [*passed]
