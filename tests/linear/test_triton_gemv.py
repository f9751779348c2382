"""Products of a few rows with a packed weight, in Triton's interpreter, against float64."""

import os

import pytest
import torch

from halfbyte.quant import dequantize, quantize
from halfbyte.runtime import device as devices
from tests.devices import DEVICES

triton_gemv = pytest.importorskip(
    "halfbyte.linear.triton_gemv", reason="needs Triton", exc_type=ImportError
)
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
@pytest.mark.parametrize("shape", [(64, 64), (5, 32), (66, 544)])
@pytest.mark.parametrize("double", [True, False])
def test_small_products_are_those_of_the_decoded_weight(rows, shape, double):
    q = quantize(weight(shape), double_quant=double)
    x = weight((rows, shape[1]), torch.float16, seed=1)
    exact = x.double() @ dequantize(q, torch.float64).t()
    got = triton_gemv.small_product(x, q).double()
    usual = (x.float() @ dequantize(q, torch.float16).float().t()).half().double()
    assert got.shape == exact.shape
    assert (got - exact).norm() <= 1.2 * (usual - exact).norm() + 1e-6 * exact.norm()


# (outputs, quant_type, block size, double quantisation) of each weight. The first three sets are
# one launch. The others are not: their kinds differ, one ends inside a program's four rows, or
# there are more than three.
SETS = {
    "three": [(16, "nf4", 64, True), (8, "nf4", 64, True), (12, "nf4", 64, True)],
    "two, an odd end": [(8, "nf4", 32, False), (5, "nf4", 32, False)],
    "fp4": [(12, "fp4", 64, True), (4, "fp4", 64, True)],
    "scales": [(8, "nf4", 64, True), (8, "nf4", 64, False)],
    "blocks": [(8, "nf4", 64, True), (8, "nf4", 128, True)],
    "types": [(8, "nf4", 64, True), (8, "fp4", 64, True), (8, "nf4", 64, True)],
    "inside": [(6, "nf4", 64, True), (7, "nf4", 64, True)],
    "four": [(4, "nf4", 64, True)] * 4,
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", SETS)
def test_products_of_one_input_are_those_of_each_weight(rows, name):
    weights = [
        quantize(weight((out, 544), seed=i), quant_type=kind, block_size=block, double_quant=double)
        for i, (out, kind, block, double) in enumerate(SETS[name])
    ]
    x = weight((rows, 544), torch.float16, seed=9)
    got = triton_gemv.small_products(x, weights)
    assert torch.equal(got, torch.cat([triton_gemv.small_product(x, q) for q in weights], 1))


def test_weights_of_one_kind_are_one_launch(monkeypatch):
    calls = []

    class Counted:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: calls.append((grid, kwargs["members"]))

    monkeypatch.setattr(triton_gemv, "_product_row", Counted())
    x = torch.zeros(1, 544, dtype=torch.float16)
    for name in SETS:
        weights = [
            quantize(weight((s[0], 544)), quant_type=s[1], block_size=s[2], double_quant=s[3])
            for s in SETS[name]
        ]
        calls.clear()
        triton_gemv.small_products(x, weights)
        together = name in ("three", "two, an odd end", "fp4")
        assert len(calls) == (1 if together else len(weights)), name
        assert all(members == (len(weights) if together else 1) for _, members in calls)


def test_a_product_that_is_too_large_is_refused():
    q = quantize(weight((8, 64)))
    with pytest.raises(ValueError, match="at most 64 rows"):
        triton_gemv.small_product(torch.zeros(65, 64, dtype=torch.float16), q)
    with pytest.raises(ValueError, match="multiple of 32"):
        triton_gemv.small_product(
            torch.zeros(1, 48, dtype=torch.float16), quantize(weight((8, 48)))
        )


@pytest.mark.parametrize("name", ["t4", "a100", "4090", "h100", "b200"])
def test_a_gpu_is_given_what_its_units_multiply(name, monkeypatch):
    monkeypatch.setattr(devices, "spec_of", lambda _: DEVICES[name])
    q = quantize(weight((8, 64)))
    turing = name == "t4"
    assert triton_gemv.most_rows(torch.float16, q) == (1 if turing else triton_gemv.SMALL_ROWS)
    assert triton_gemv.most_rows(torch.bfloat16, q) == (0 if turing else triton_gemv.SMALL_ROWS)
    assert triton_gemv.most_rows(torch.float32, q) == 0
    few = torch.zeros(2, 64, dtype=torch.float16)
    assert triton_gemv.can_multiply(few, q) != turing
    if turing:
        with pytest.raises(ValueError, match="at most 1 rows of float16 with"):
            triton_gemv.small_product(few, q)
        assert not triton_gemv.can_multiply(few[:1].bfloat16(), q)
