"""Calls whose kind has run before, straight to its kernels.

To check a call, to choose its backend and to pass torch's dispatcher takes longer than to launch its kernels. All of
that depends on types, shapes and options only, so it is done for the first call of a kind. A call that somebody
else takes part in (a transform, a mode, a tracer, a profiler; autocast, which `casts` takes ops out of) goes the long
way each time; so does one that autograd records, unless the op says how it is recorded (`with_gradient`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from retro_kernels.ops import _backend

_TENSORS = (Tensor, torch.nn.Parameter)
_OPTIONS = (int, float, str, type(None))
_MOST = 1024
"""Kinds of calls that are kept: a program with more has lengths of every size, and little to gain."""
_EACH = 8
"""And that are tried one after another, where only shapes differ."""
Made = TypeVar("Made")
_kept: dict[Hashable, Callable[..., Any]] = {}


class Recent(Generic[Made]):
    """What was found for the last kinds of calls, where all tensors lie at multiples of 16.

    Whether tensors are like earlier ones torch.compile has native code for: of the same type, dispatch keys (a bit of
    sign, a nested tensor, autocast and modes are among them), dtype, device, shape and strides, with or without a
    gradient. It takes far less time than `unseen` and `kind`, and is asked first."""

    def __init__(self) -> None:
        self._made: dict[Hashable, list[tuple[Callable[..., bool], Made]]] = {}

    def find(self, key: Hashable, tensors: list[Tensor]) -> Made | None:
        """`tensors`: without missing ones. All else that a kind depends on has to be in `key`, their number too."""
        candidates = self._made.get(key)
        if candidates is None or not _plain(tensors):
            return None
        for alike, made in candidates:
            if alike(*tensors):
                return made
        return None

    def add(self, key: Hashable, tensors: list[Tensor], made: Made) -> None:
        if _guards is None or not _plain(tensors):
            return
        try:
            alike = _guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
            if not alike(*tensors):
                return
        except Exception:  # without it a call takes a little longer
            return
        keep(self._made, key, [(alike, made), *self._made.get(key, ())][:_EACH])

    def clear(self) -> None:
        self._made.clear()


def _trusted_guards() -> Any:
    """torch.compile's TensorGuards, which are no interface of torch's: None where they are not here, or overlook a
    difference that `Recent` relies on them for, since kernels of another kind would read what is not there."""
    try:
        from torch._C._dynamo import guards

        made: Any = guards.TensorGuards
        with torch.inference_mode(False):
            x = torch.zeros(4, 6, device="cpu")
            z = torch.zeros(4, 6, dtype=torch.complex64, device="cpu")
            alike = made(x, z.imag, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
            others = [
                (x.double(), z.imag),
                (x[:3], z.imag),
                (x[..., None], z.imag),
                (x.T.contiguous().T, z.imag),
                (x.clone().requires_grad_(), z.imag),
                (torch.nn.Parameter(x, requires_grad=False), z.imag),
                (x.to("meta"), z.imag),
                (x, z.conj().imag),  # with a bit of sign
                (z.imag, x),
            ]
            right = alike(x.clone(), z.imag) and not any(alike(*other) for other in others)
    except Exception:
        return None
    return made if right else None


_guards = _trusted_guards()
_recent: Recent[tuple[Hashable, str, int | None, Callable[..., Any]]] = Recent()
"""By what is no tensor: a kind, the type of its device, the number of its GPU, and what to call."""


class _Thread(threading.local):
    listening = False
    gradients = False  # whether the call that listens is recorded by autograd
    ran: tuple[Callable[..., Any], list[Hashable]] | None = None


_thread = _Thread()


def unseen(tensors: Iterable[Tensor | None]) -> bool:
    """Whether nobody but the op takes part in a call with these tensors. Who calls this has seen to torch.compile,
    autograd and autocast."""
    if not _nobody():
        return False
    for x in tensors:
        if x is not None and (
            type(x) not in _TENSORS or x.layout is not torch.strided or x.is_nested or x.is_neg() or x.is_meta
        ):
            return False
    return True


def _nobody() -> bool:
    """The same, as far as it does not depend on the tensors."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and _backend.why_not_transformed() is None
        and not torch.autograd._profiler_enabled()
        and torch._C._get_tracing_state() is None
    )


def kind(what: str, tensors: Sequence[Tensor | None], options: tuple[Any, ...]) -> Hashable:
    """What launches depend on besides the addresses. Of those, whether they are multiples of 16: machine code for one
    that is takes it for granted."""
    return (
        what,
        options,
        *[
            None if x is None else (x.dtype, x.shape, x.stride(), x.device, x.data_ptr() % 16 == 0)
            for x in tensors
        ],
    )


def look_up(
    what: str, tensors: Sequence[Tensor | None], options: tuple[Any, ...], differentiable: bool = False
) -> tuple[Hashable | None, Callable[..., Any] | None]:
    """The kind of a call of the op `what`, None where it has to go the long way, and what to call with `tensors` if
    such a call was remembered. Between this and `remember`, one pass of kernels may run (`note`).

    `differentiable`: calls that autograd records are remembered too, if between the two `with_gradient` says how."""
    if torch.compiler.is_compiling():
        return None, None
    short = (
        what,
        differentiable,
        _backend._preferred,
        torch.is_grad_enabled(),
        *map(type, tensors),
        *map(type, options),
        options,
    )
    present = [x for x in tensors if x is not None]
    try:
        found = _recent.find(short, present)
    except TypeError:  # an option without a hash
        return None, None
    if found is not None:
        key, device, index, made = found
        return (None, None) if not _nobody() or _elsewhere(device, index) else (key, made)
    gradients = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors)
    if gradients and not differentiable:
        return None, None
    if any(type(x) not in _OPTIONS for x in options):
        return None, None
    if not unseen(tensors) or not isinstance(first := tensors[0], Tensor):
        return None, None
    device, index = first.device.type, first.device.index if first.is_cuda else None
    if _elsewhere(device, index):
        return None, None
    key = kind(what, tensors, (*options, *map(type, options), _backend._preferred, gradients))
    known = _kept.get(key)
    if known is not None:
        _recent.add(short, present, (key, device, index, known))
    _thread.listening, _thread.gradients, _thread.ran = known is None, gradients, None
    return key, known


def _elsewhere(device: str, index: int | None) -> bool:
    """Whether autocast takes part, or kernels would be launched on another GPU."""
    return torch.is_autocast_enabled(device) or (index is not None and index != torch.cuda.current_device())


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
    _recent.clear()


def _plain(tensors: list[Tensor]) -> bool:
    """Whether all lie at a multiple of 16, and none is a nested one, at which the native check ends the process."""
    try:
        for x in tensors:
            if x.data_ptr() % 16 or x.is_nested:
                return False
    except RuntimeError:  # it lies nowhere
        return False
    return True


def _memory(x: Tensor | None) -> Hashable:
    return None if x is None else (x.data_ptr(), x.dtype, x.numel())
