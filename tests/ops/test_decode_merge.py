"""The parts of a row that was decoded by several programs, put together."""

from __future__ import annotations

import pytest
import torch

from retro_kernels.ops import _backend
from retro_kernels.ops.cca.decode import absorbed_decode, chunked_cross_attention_decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.skipif(
    not (_backend.INTERPRETING or torch.cuda.is_available()), reason="needs the interpreter or a GPU"
)
@pytest.mark.parametrize(("common", "last"), [(300.0, 300.0), (-300.0, -300.0), (0.0, 300.0)])
@pytest.mark.parametrize("neighbours", [3, 7])  # few parts are merged by the product with W_V, more before
def test_logits_beyond_the_exponents_of_float32(
    neighbours: int, common: float, last: float, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What all of a row have in common changes nothing; the last part may be all that there is to see."""
    from retro_kernels.ops.cca import decode_kernel

    splits = []
    monkeypatch.setattr(decode_kernel, "slots", lambda device, resident: splits.append(resident) or 10_000)
    query = torch.randn((1, 1, 1, 16), device=DEVICE)
    key, value = (torch.randn((1, neighbours, 16, 1, 16), device=DEVICE) for _ in range(2))
    query[..., 0], key[..., 0] = 1.0, common
    key[:, -1, ..., 0] = last
    rest = {"rows": torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), "scale": 1.0}
    one = torch.eye(16, device=DEVICE)
    half = torch.diag(torch.tensor([0.0] + [1.0] * 15, device=DEVICE))  # the large part is in no value
    for function, tensors in (
        (chunked_cross_attention_decode, (query, key, value)),
        (absorbed_decode, (query, key[:, :, :, 0], one, half)),
    ):
        splits.clear()
        ours = function(*tensors, **rest, backend="triton")
        exact = function(*(x.double() for x in tensors), **rest, backend="reference")
        assert splits and exact.norm() > 0
        torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-4)
