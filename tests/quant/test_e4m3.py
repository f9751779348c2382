"""Weights and activations as e4m3: the specification against its claims, kernels against it."""

import os

import pytest
import torch

from halfbyte.quant import dequantize, e4m3, quantize

SHAPES = [
    # out, in, block, double quantisation
    (48, 192, 64, True),
    (132, 4096, 64, True),
    (24, 11008, 64, True),
    (96, 256, 32, False),
    (40, 96, 64, True),  # blocks cross rows
]


def packed(out, inputs, block, double):
    generator = torch.Generator().manual_seed(out + inputs)
    weight = torch.randn(out, inputs, generator=generator)
    weight *= 0.01 + torch.rand(out, 1, generator=generator)  # rows that differ much
    return quantize(weight, quant_type="nf4", block_size=block, double_quant=double)


def same(a, b):
    return torch.equal(a.float(), b.float())  # but for the sign of zero


@pytest.mark.parametrize("case", SHAPES)
def test_a_weight_is_rounded_once_to_three_bits(case):
    q = packed(*case)
    data, scale = e4m3.decode(q)
    true = dequantize(q, torch.float64)
    assert torch.equal(torch.exp2(torch.log2(scale).round()), scale)
    wide = data.double() * scale[:, None]
    # Half of the last place: 2**-4 of a normal number, or 2**-10 of the scale.
    bound = torch.maximum(true.abs() * 2**-4, scale[:, None].double() * 2**-10)
    assert ((wide - true).abs() <= bound * (1 + 1e-6)).all()
    largest = data.double().abs().amax(1)
    assert (largest <= 256).all()
    assert (largest >= 2**-6 * 8).all()  # normal numbers three bits below


def test_the_scales_of_blocks_bound_the_rows():
    for case in SHAPES[:4]:
        q = packed(*case)
        true = dequantize(q, torch.float32).abs().amax(1)
        assert (e4m3.row_bounds(q) >= true).all()


def test_rows_of_zeros_and_tiny_rows():
    weight = torch.zeros(3, 64)
    weight[1] = 1e-39
    data, scale = e4m3.encode(weight)
    assert scale.isfinite().all()
    assert (scale > 0).all()
    assert not data.float().isnan().any()
    x, x_scale = e4m3.quantize_rows(weight)
    assert (x_scale > 0).all()
    assert not x.float().isnan().any()


def test_the_largest_of_a_row_of_activations_is_exact():
    x = torch.randn(9, 40, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 1000.0  # an outlier
    data, scale = e4m3.quantize_rows(x)
    torch.testing.assert_close((data.float() * scale)[:, 3], x[:, 3])
    error = ((data.float() * scale) - x).abs()
    assert (error <= torch.maximum(x.abs() * 2**-4, scale * 2**-10) * (1 + 1e-6)).all()


SMALL = [0.0, 1e-40, 1e-37, 2.0**-110, 1e-30, 1.0, 1e30]


def test_rows_of_any_size_are_rounded():
    """Zero, subnormal and tiny ones, too; the smallest become zero."""
    x = torch.randn(len(SMALL), 64, generator=torch.Generator().manual_seed(0))
    x *= torch.tensor(SMALL)[:, None]
    data, scale = e4m3.quantize_rows(x)
    assert scale.isfinite().all()
    assert not data.float().isnan().any()
    error = (data.float() * scale - x).norm(dim=1)
    assert (error[4:] <= 0.04 * x.norm(dim=1)[4:]).all()
    assert (error[:4] <= 2.0**-100).all()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_so(bad):
    x = torch.ones(3, 64)
    x[1, 7] = bad
    data, scale = e4m3.quantize_rows(x)
    wide = data.float() * scale
    assert wide[[0, 2]].isfinite().all()
    assert not wide[1].isfinite().all()


interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton compiles here, so tests/gpu/ tests these",
)


@interpreted
@pytest.mark.parametrize(
    ("wanted", "case"),
    [("both", case) for case in SHAPES[:4]] + [("straight", SHAPES[1]), ("across", SHAPES[0])],
)
def test_the_kernel_decodes_to_the_same_numbers(case, wanted):
    kernels = pytest.importorskip("halfbyte.quant.triton_e4m3", exc_type=ImportError)
    if wanted != "straight" and case[1] > 1000:
        case = (case[0], 320, *case[2:])  # fewer programs
    q = packed(*case)
    out, inputs = q.shape
    assert kernels.fits(q)
    data, scale = e4m3.decode(q)
    straight = torch.zeros(out, inputs, dtype=e4m3.DTYPE)
    whole = torch.zeros(inputs, out + 32, dtype=e4m3.DTYPE)  # of a group
    across, scales = whole[:, 16 : 16 + out], torch.zeros(out)
    kernels.decode(
        q,
        straight if wanted != "across" else None,
        across if wanted != "straight" else None,
        scales,
    )
    assert wanted == "across" or torch.equal(scales, scale)
    assert wanted == "across" or same(straight, data)
    assert wanted == "straight" or same(across.t(), data)
    outside = torch.cat([whole[:, :16], whole[:, 16 + out :]], 1)
    assert not outside.float().any()


@interpreted
def test_the_kernel_refuses_blocks_that_cross_rows():
    kernels = pytest.importorskip("halfbyte.quant.triton_e4m3", exc_type=ImportError)
    assert not kernels.fits(packed(*SHAPES[4]))


@interpreted
@pytest.mark.parametrize("sizes", [(48,), (80, 48), (48, 80, 5000), (5000,), (4096,)])
@pytest.mark.parametrize("scaled", [True, False])
def test_the_kernel_rounds_rows_to_the_same_numbers(sizes, scaled):
    kernels = pytest.importorskip("halfbyte.quant.triton_e4m3", exc_type=ImportError)
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(5, size, generator=generator).half() for size in sizes]
    parts[0][2] = 0
    for part in parts:  # many numbers of such a row are halfway between two
        part[3] = part[3].bfloat16().clamp(-3.75, 3.75)
        part[3, 0] = 3.75
    factors = torch.rand(sum(sizes), generator=generator) if scaled else None
    data, scale = kernels.quantize_rows(parts, factors)
    wanted, wanted_scale = e4m3.quantize_rows(torch.cat(parts, 1), factors)
    assert torch.equal(scale, wanted_scale)
    assert same(data, wanted)


@interpreted
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("held", [0, 1 << 15])
def test_the_kernel_rounds_rows_of_any_size(parts, held, monkeypatch):
    kernels = pytest.importorskip("halfbyte.quant.triton_e4m3", exc_type=ImportError)
    monkeypatch.setattr(kernels, "_LANES_HELD", held)
    monkeypatch.setattr(kernels, "_LANES", 32)
    x = torch.randn(len(SMALL), 96, generator=torch.Generator().manual_seed(0))
    x *= torch.tensor(SMALL)[:, None]
    data, scale = kernels.quantize_rows(x.split(96 // parts, 1))
    wanted, wanted_scale = e4m3.quantize_rows(x)
    assert torch.equal(scale, wanted_scale)
    assert same(data, wanted)
