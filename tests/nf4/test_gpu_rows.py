"""Products of a few rows with a packed weight, in Triton's interpreter, against float64."""

import os

import pytest
import torch

from halfbyte.nf4 import dequantize, quantize

gpu_rows = pytest.importorskip("halfbyte.nf4.gpu_rows", reason="needs Triton", exc_type=ImportError)
pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1",
        reason="Triton compiles here, so tests/gpu/ tests these",
    ),
]


def weight(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("shape", [(64, 64), (5, 32), (130, 544)])
@pytest.mark.parametrize("double", [True, False])
def test_small_products_are_those_of_the_decoded_weight(rows, shape, double):
    q = quantize(weight(shape), double_quant=double)
    x = weight((rows, shape[1]), torch.float16, seed=1)
    exact = x.double() @ dequantize(q, torch.float64).t()
    got = gpu_rows.small_product(x, q).double()
    usual = (x.float() @ dequantize(q, torch.float16).float().t()).half().double()
    assert got.shape == exact.shape
    assert (got - exact).norm() <= 1.2 * (usual - exact).norm() + 1e-6 * exact.norm()


def test_a_product_that_is_too_large_is_refused():
    q = quantize(weight((8, 64)))
    with pytest.raises(ValueError, match="at most 64 rows"):
        gpu_rows.small_product(torch.zeros(65, 64, dtype=torch.float16), q)
    with pytest.raises(ValueError, match="multiple of 32"):
        gpu_rows.small_product(torch.zeros(1, 48, dtype=torch.float16), quantize(weight((8, 48))))
