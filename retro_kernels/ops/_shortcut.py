"""Calls whose kind has run before, straight to its kernels.

To check a call, to choose its backend and to pass torch's dispatcher takes twice as long as to launch its kernels. All
of that depends on types, shapes and options only, so it is done for the first call of a kind. A call that somebody
else takes part in (autocast, a transform, a mode, a tracer, a profiler) goes the long way each time; so does one that
autograd records, unless the op says how it is recorded (`with_gradient`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from retro_kernels.ops import _backend

_TENSORS = (Tensor, torch.nn.Parameter)
_OPTIONS = (int, float, str, type(None))
_MOST = 1024
"""Kinds of calls that are kept: a program with more has lengths of every size, and little to gain."""
Made = TypeVar("Made")
_kept: dict[Hashable, Callable[..., Any]] = {}


class _Thread(threading.local):
    listening = False
    gradients = False  # whether the call that listens is recorded by autograd
    ran: tuple[Callable[..., Any], list[Hashable]] | None = None


_thread = _Thread()


def unseen(tensors: Iterable[Tensor | None]) -> bool:
    """Whether nobody but the op takes part in a call with these tensors. Who calls this has seen to torch.compile,
    autograd and autocast."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and _backend.why_not_transformed() is None
        and not torch.autograd._profiler_enabled()
        and torch._C._get_tracing_state() is None
        and all(
            x is None
            or (
                type(x) in _TENSORS
                and x.layout is torch.strided
                and not x.is_nested
                and not x.is_neg()
                and not x.is_meta
            )
            for x in tensors
        )
    )


def kind(what: str, tensors: Sequence[Tensor | None], options: tuple[Any, ...]) -> Hashable:
    """What launches depend on besides the addresses. Of those, whether they are multiples of 16: machine code for one
    that is takes it for granted."""
    return (
        what,
        options,
        *(
            None if x is None else (x.dtype, x.shape, x.stride(), x.device, x.data_ptr() % 16 == 0)
            for x in tensors
        ),
    )


def look_up(
    what: str, tensors: Sequence[Tensor | None], options: tuple[Any, ...], differentiable: bool = False
) -> tuple[Hashable | None, Callable[..., Any] | None]:
    """The kind of a call of the op `what`, None where it has to go the long way, and what to call with `tensors` if
    such a call was remembered. Between this and `remember`, one pass of kernels may run (`note`).

    `differentiable`: calls that autograd records are remembered too, if between the two `with_gradient` says how."""
    if torch.compiler.is_compiling() or any(type(x) not in _OPTIONS for x in options):
        return None, None
    gradients = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors)
    if gradients and not differentiable:
        return None, None
    if not unseen(tensors) or not isinstance(first := tensors[0], Tensor):
        return None, None
    if torch.is_autocast_enabled(first.device.type):
        return None, None
    if first.is_cuda and first.device.index != torch.cuda.current_device():  # on which kernels are launched
        return None, None
    key = kind(what, tensors, (*options, _backend._preferred, gradients))
    made = _kept.get(key)
    _thread.listening, _thread.gradients, _thread.ran = made is None, gradients, None
    return key, made


def note(made: Callable[..., Any], tensors: Sequence[Tensor | None]) -> None:
    """A pass has run with `tensors`, which `launch` keeps for its kind."""
    if _thread.listening:
        _thread.ran = made, [_memory(x) for x in tensors]


def with_gradient(recorded: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """The pass that has run since `look_up`, if one has, is what `recorded` makes of it for autograd to see."""
    if _thread.gradients and _thread.ran is not None:
        made, given = _thread.ran
        _thread.gradients, _thread.ran = False, (recorded(made), given)


def remember(key: Hashable | None, tensors: Sequence[Tensor | None]) -> None:
    """The next call of the kind `key` may go to the pass that has run since `look_up`, if that got `tensors` as they
    are, and nothing besides."""
    if torch.compiler.is_compiling() or key is None:
        return
    ran, _thread.listening, _thread.ran = _thread.ran, False, None
    if ran is None or _thread.gradients:  # alone a pass has no gradient
        return
    made, given = ran
    missing = (None,) * (len(given) - len(tensors))
    if given == [*map(_memory, tensors), *missing]:
        keep(_kept, key, lambda *tensors: made(*tensors, *missing))


def keep(kept: dict[Hashable, Made], key: Hashable, made: Made) -> None:
    if len(kept) >= _MOST:
        kept.clear()
    kept[key] = made


def forget() -> None:
    _kept.clear()


def _memory(x: Tensor | None) -> Hashable:
    return None if x is None else (x.data_ptr(), x.dtype, x.numel())
