"""One small way to register an op: `torch.library` define and impl, which cost a call less than `custom_op`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from retro_kernels.ops._shortcut import unseen

_library = torch.library.Library("retro_kernels", "FRAGMENT")
_implementations: dict[Any, dict[str, Callable[..., Any]]] = {}
"""By op and device type."""


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    differentiable: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
) -> Any:
    """Defines `retro_kernels::<schema>` for CPU and CUDA tensors and returns the overload to call.

    `fake` allocates results of the same shapes, dtypes and strides without computing; allocate them in both with
    `new_empty(shape)` and never with `empty_like`, so that the strides agree for permuted inputs too. The
    implementations run below autograd. `differentiable` is the same op as an autograd.Function around two such ops, for
    who calls the op itself with tensors that require a gradient, as a program does that torch.export made. `flops` is
    what torch's FLOP counter counts of it.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def below_autograd(*args: Any) -> Any:
        # an exported program calls the op itself, with parameters that require a gradient
        if not torch.is_grad_enabled():
            return implementation(*args)
        with torch.no_grad():
            return implementation(*args)

    def on_its_device(*args: Any) -> Any:
        # Triton and our own CUDA launch on the current device, so it has to be the tensors' one
        device = next(arg.device for arg in args if isinstance(arg, Tensor) and arg.is_cuda)
        if device.index == torch.cuda.current_device():
            return below_autograd(*args)
        with torch.cuda.device(device):
            return below_autograd(*args)

    _library.impl(name, below_autograd, "CPU")
    _library.impl(name, on_its_device, "CUDA")
    torch.library.register_fake(f"retro_kernels::{name}", fake, lib=_library)
    op = getattr(torch.ops.retro_kernels, name).default
    _implementations[op] = {"cpu": below_autograd, "cuda": on_its_device}
    if flops is not None:
        register_flop_formula(getattr(torch.ops.retro_kernels, name))(flops)
    if differentiable is not None:

        def autograd(*args: Any) -> Any:
            if forward_ad._current_level >= 0 and any(map(_has_tangent, args)):
                raise RuntimeError(
                    f"retro_kernels::{name} has no forward-mode derivative, the tangents of its arguments would be "
                    "lost. The library's function has one; the op itself, which an exported program calls, has not."
                )
            if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
                return differentiable(*args)
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)

        _library.impl(name, autograd, "Autograd")
    return op


def _has_tangent(x: Any) -> bool:
    return isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None


def without_autograd(op: Any, *args: Any) -> Any:
    """op(*args), past the kernel of `differentiable`; past torch's dispatcher too where nobody is to see the call: to
    take fifteen arguments apart and to put them together again costs as much as all else that a call does."""
    if torch.compiler.is_compiling():
        return op(*args)
    tensors = [x for x in args if isinstance(x, Tensor)]
    if unseen(tensors):
        device = "cuda" if any(x.is_cuda for x in tensors) else tensors[0].device.type
        if (implementation := _implementations[op].get(device)) is not None:
            return implementation(*args)
    elif any(hasattr(x, "to_local") for x in tensors):
        raise TypeError(
            f"{op._schema.name}: a tensor is a DTensor, which the kernels do not take apart. Give each rank its own "
            "part: x.to_local(), or torch.distributed.tensor.experimental.local_map around the call."
        )
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)
