"""Whichever library multiplies, the error is no worse than ``torch.mm``'s."""

import pytest
import torch

from halfbyte.runtime import matmul
from halfbyte.runtime.matmul import float32_library, product


@pytest.mark.parametrize("library", ["torch", "onednn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (3, 5, 7), (64, 48, 130), (0, 4, 8)])
@pytest.mark.parametrize("strides", ["rows", "columns"])
def test_against_float64(monkeypatch, library, dtype, m, n, k, strides):
    monkeypatch.setattr(matmul, "float32_library", lambda: (library, "for the test"))
    torch.manual_seed(m + n + k)
    a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    if strides == "columns":
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    got = product(a, b)
    truth = a.double() @ b.double().t()
    assert got.shape == (m, n)
    assert got.dtype == dtype
    if m:
        plain = (torch.mm(a, b.t()).double() - truth).abs().max()
        rounding = torch.finfo(dtype).eps * (truth.abs().max() + k**0.5)
        assert (got.double() - truth).abs().max() <= plain + rounding


def test_the_choice_has_a_reason():
    library, reason = float32_library()
    assert library in ("torch", "onednn")
    assert len(reason) > 10
