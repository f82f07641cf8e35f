"""The parts of a row that was decoded by several programs, put together."""

from __future__ import annotations

import pytest
import torch

from retro_kernels.ops import _backend
from retro_kernels.ops.cca.decode import chunked_cross_attention_decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.skipif(
    not (_backend.INTERPRETING or torch.cuda.is_available()), reason="needs the interpreter or a GPU"
)
@pytest.mark.parametrize(("common", "last"), [(300.0, 300.0), (-300.0, -300.0), (0.0, 300.0)])
def test_logits_beyond_the_exponents_of_float32(
    common: float, last: float, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What all of a row have in common changes nothing; the last part may be all that there is to see."""
    from retro_kernels.ops.cca import decode_kernel

    splits = []
    monkeypatch.setattr(decode_kernel, "slots", lambda device, resident: splits.append(resident) or 10_000)
    query, key, value = (
        torch.randn(shape, device=DEVICE) for shape in ((1, 1, 1, 16), *[(1, 3, 16, 1, 16)] * 2)
    )
    query[..., 0], key[..., 0] = 1.0, common
    key[:, -1, ..., 0] = last
    rows = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    ours = chunked_cross_attention_decode(query, key, value, rows=rows, scale=1.0, backend="triton")
    exact = chunked_cross_attention_decode(
        query.double(), key.double(), value.double(), rows=rows, scale=1.0, backend="reference"
    )
    assert splits and exact.norm() > 0
    torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-4)
