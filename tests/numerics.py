"""The one tolerance of every kernel test (FlashAttention's): against float64, the error of ours is at most twice the
error that plain PyTorch makes in the same dtype (a gradient's largest error: three times), plus the rounding noise.

Noise: one rounding of the result to its dtype, and eight of float32, in which everything is accumulated: a logit
between 8 and 16 is rounded to half of 2^-20, which the exponential turns into a relative error of its weight.
"""

from __future__ import annotations

import torch
from torch import Tensor


def assert_accurate(
    ours: Tensor, plain: Tensor, exact: Tensor, what: str = "result", *, gradient: bool = False
) -> None:
    """`ours` and `plain` in one dtype, `exact` the same in float64; in the largest and in the quadratic mean error.

    The largest of a few hundred rounding errors is itself a random number, and a gradient has been through more of
    them: for a `gradient` it may be three times plain PyTorch's, as in FlashAttention's tests. The mean may not.

    A result that is zero everywhere proves nothing, so `exact` must not be.
    """
    assert ours.shape == exact.shape == plain.shape, f"{what}: {ours.shape}, {plain.shape}, {exact.shape}"
    assert ours.dtype == plain.dtype, f"{what}: {ours.dtype} against {plain.dtype}"
    assert exact.dtype == torch.float64, f"{what}: the exact result is {exact.dtype}"
    exact = exact.detach()
    assert exact.norm() > 0, f"{what}: the exact result is zero everywhere, so the comparison is empty"
    noise = torch.finfo(ours.dtype).eps + 8 * torch.finfo(torch.promote_types(ours.dtype, torch.float32)).eps
    for norm, name, factor in (
        (_largest, "largest", 3 if gradient else 2),
        (_quadratic_mean, "quadratic mean", 2),
    ):
        error = norm(ours.detach().double() - exact)
        allowed = factor * norm(plain.detach().double() - exact) + noise * norm(exact)
        assert error <= allowed, f"{what}: {name} error {error:.3e}, allowed {allowed:.3e}"  # NaN fails too


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _quadratic_mean(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
