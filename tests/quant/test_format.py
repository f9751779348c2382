"""The format, in plain PyTorch and in C++: bitsandbytes' bytes, bounded errors, refusals."""

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from halfbyte.errors import ConfigError, WeightError
from halfbyte.quant import (
    BLOCK_SIZES,
    QuantizedWeight,
    dequantize,
    dequantize_all,
    empty_like_quantized,
    quantize,
)
from halfbyte.quant.blockwise import NF4_LEVELS
from halfbyte.quant.weight import levels_of

reproducible = settings(derandomize=True, deadline=None)
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (1,), (7,), (31, 33), (3, 80), (40, 1000), (16, 4096)]
IMPLS = ["torch", "cpu"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and on a busy machine lose much."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weight(shape: tuple[int, ...], dtype: torch.dtype, magnitude: float = 0.02) -> Tensor:
    """Normal values with some zeros, and some blocks much larger than others."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))) * magnitude
    values.view(-1)[::11] = 0
    values.view(-1)[64:200] *= 30
    return values.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({4: torch.int32, 2: torch.int16}[tensor.element_size()]).view(-1)


def assert_equal_codes(q: QuantizedWeight, codes: Tensor, state: bnb.QuantState) -> None:
    assert torch.equal(q.codes, codes.view(-1))
    if q.double_quant:
        assert torch.equal(q.scale_codes, state.absmax)
        assert torch.equal(q.scale_scales, state.state2.absmax)
        assert torch.equal(q.scale_offset, state.offset)
    else:
        assert torch.equal(q.scales, state.absmax)


def their_dequantize(codes: Tensor, state: bnb.QuantState, numel: int) -> Tensor:
    """bitsandbytes' result for the weight as one row.

    Its AVX-512 path takes the wrong scales where rows are not whole blocks. It is told to run
    eagerly what it would compile, which would take seconds for each shape.
    """
    state.shape = torch.Size([numel])
    with torch.compiler.set_stance("force_eager"):
        return bnb.dequantize_4bit(codes, state).view(-1)


def assert_equal_values(ours: Tensor, theirs: Tensor, quant_type: str) -> None:
    """Bit for bit, but for two things in which bitsandbytes differs between its own code paths.

    FP4's second zero is -0 on some paths and +0 on others and on GPUs. With AVX512-BF16,
    results that are subnormal in bfloat16 are flushed to zero.
    """
    same = bits(ours.view(-1)) == bits(theirs)
    if quant_type == "fp4":
        same |= (ours.view(-1) == 0) & (theirs == 0)
    if ours.dtype == torch.bfloat16:
        same |= (ours.view(-1).abs() < torch.finfo(torch.bfloat16).tiny) & (theirs == 0)
    assert same.all()


def test_levels_follow_from_the_paper():
    """README.md's derivation, to float32's precision."""
    offset = 1 - (1 / 32 + 1 / 30) / 2

    def quantiles(count: int) -> list[float]:
        step = (offset - 0.5) / count
        return [NormalDist().inv_cdf(0.5 + step * i) for i in range(1, count + 1)]

    positive, negative = quantiles(8), quantiles(7)
    largest = positive[-1]
    derived = [-x / largest for x in reversed(negative)] + [0.0] + [x / largest for x in positive]
    assert NF4_LEVELS.tolist() == pytest.approx(derived, abs=3e-7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_bytes_and_values_equal_those_of_bitsandbytes(quant_type, block_size, impl):
    for dtype, double, shape in itertools.product(FLOATS, [True, False], SHAPES):
        for magnitude in (0.02, 1e30, 1e-30, 1e-40):
            w = weight(shape, dtype, magnitude)
            q = quantize(
                w, quant_type=quant_type, block_size=block_size, double_quant=double, impl=impl
            )
            codes, state = bnb.quantize_4bit(
                w, blocksize=block_size, compress_statistics=double, quant_type=quant_type
            )
            assert_equal_codes(q, codes, state)
            for result in FLOATS:
                state.dtype = result
                theirs = their_dequantize(codes, state, w.numel())
                assert_equal_values(dequantize(q, result, impl=impl), theirs, quant_type)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@reproducible
@given(
    values=arrays(
        np.float32,
        st.integers(1, 300),
        elements=st.floats(allow_nan=False, allow_infinity=False, width=32),
    ),
    double=st.booleans(),
)
def test_bytes_equal_those_of_bitsandbytes_for_any_values(quant_type, values, double):
    w = torch.from_numpy(values)
    codes, state = bnb.quantize_4bit(
        w, blocksize=32, compress_statistics=double, quant_type=quant_type
    )
    for impl in IMPLS:
        if double and not torch.isfinite(state.offset):
            with pytest.raises(WeightError, match="too large for double quantisation"):
                quantize(w, quant_type=quant_type, block_size=32, impl=impl)
            continue
        q = quantize(w, quant_type=quant_type, block_size=32, double_quant=double, impl=impl)
        assert_equal_codes(q, codes, state)


@pytest.mark.parametrize("impl", IMPLS)
def test_scales_whose_sum_overflows_need_single_quantisation(impl):
    w = torch.full((128,), 3e38)
    with pytest.raises(WeightError, match=r"'up' is too large.*3e\+38.*double quantisation off"):
        quantize(w, name="up", impl=impl)
    assert torch.equal(dequantize(quantize(w, double_quant=False, impl=impl)), w)


def test_bytes_of_a_large_weight_equal_those_of_bitsandbytes():
    """Large enough for torch to take the mean of the scales in parallel."""
    torch.set_num_threads(2)
    w = weight((2300, 1024), torch.bfloat16)
    q = quantize(w)
    codes, state = bnb.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
    assert_equal_codes(q, codes, state)
    assert_equal_values(dequantize(q), their_dequantize(codes, state, w.numel()), "nf4")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_blocks_of_zeros_stay_zero(quant_type, double, impl):
    w = torch.zeros(200)
    w[64:128] = torch.linspace(-1, 1, 64)
    q = quantize(w, quant_type=quant_type, double_quant=double, impl=impl)
    decoded = dequantize(q, impl=impl)
    if double:  # their scale is what remains of the offset
        assert (decoded[:64].abs() + decoded[128:192].abs() < 1e-3).all()
    else:
        assert not decoded[:64].any()
        assert not decoded[128:].any()
    zeros = quantize(torch.zeros(100), quant_type=quant_type, double_quant=double, impl=impl)
    assert not dequantize(zeros, impl=impl).any()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@reproducible
@given(
    values=arrays(
        np.float32, st.integers(1, 400), elements=st.floats(-(2.0**100), 2.0**100, width=32)
    ),
    block_size=st.sampled_from(BLOCK_SIZES),
)
def test_error_is_at_most_half_a_gap(quant_type, values, block_size):
    w = torch.from_numpy(values)
    q = quantize(w, quant_type=quant_type, block_size=block_size, double_quant=False)
    half_gap = levels_of(quant_type).sort().values.diff().max() / 2
    bound = half_gap * q.scales.repeat_interleave(block_size)[: len(w)]
    assert ((dequantize(q) - w).abs() <= bound * (1 + 1e-6) + 1e-37).all()


@reproducible
@given(
    arrays(
        np.float32,
        st.integers(1, 400),
        elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
    )
)
def test_a_decoded_weight_has_the_same_codes_again(values):
    """Without double quantisation the largest of a block is exact, so nothing moves.

    (Values under 1e-38, which only subnormal numbers are, are divided by 1e-38 instead.)
    """
    first = quantize(torch.from_numpy(values), double_quant=False)
    second = quantize(dequantize(first), double_quant=False)
    assert torch.equal(dequantize(first), dequantize(second))


def test_error_of_normal_weights_is_that_of_the_readme():
    w = torch.randn(2**20, generator=torch.Generator().manual_seed(0))

    def error(**options) -> float:
        return float((dequantize(quantize(w, **options)) - w).norm() / w.norm())

    single, double = error(double_quant=False), error()
    assert single == pytest.approx(0.0920, abs=2e-4)
    assert double - single < 1e-4
    assert error(quant_type="fp4") == pytest.approx(0.1220, abs=2e-4)
    assert error(block_size=4096) > error(block_size=32)


@pytest.mark.parametrize(("double", "expected"), [(True, 4 + 8 / 64 + 32 / 64 / 256), (False, 4.5)])
def test_bits_per_weight(double, expected):
    q = quantize(weight((1024, 1024), torch.bfloat16), double_quant=double)
    assert q.bits_per_weight == pytest.approx(expected, abs=1e-4)
    assert q.nbytes == sum(tensor.nbytes for tensor in q.tensors().values())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0,), (0, 64)])
@pytest.mark.parametrize("double", [True, False])
def test_an_empty_weight_is_a_weight(shape, double, impl):
    q = quantize(torch.empty(shape, dtype=torch.bfloat16), double_quant=double, impl=impl)
    assert q.bits_per_weight == 0
    assert dequantize(q, impl=impl).shape == shape


@pytest.mark.parametrize("impl", IMPLS)
def test_views_and_parameters_are_read_as_they_look(impl):
    base = weight((64, 96), torch.float32)
    for view in (base.t(), base[::2], base[:, 3:70], base.view(-1)[::3]):
        assert torch.equal(quantize(view, impl=impl).codes, quantize(view.clone()).codes)
    parameter = torch.nn.Parameter(base)
    assert not dequantize(quantize(parameter, impl=impl), impl=impl).requires_grad


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("impl", IMPLS)
def test_another_default_device_does_not_matter(impl, double):
    w = weight((65, 33), torch.float32)
    with torch.device("meta"):
        q = quantize(w, double_quant=double, impl=impl)
        decoded = dequantize(q, impl=impl)
    assert torch.equal(decoded, dequantize(quantize(w, double_quant=double)))


def test_the_tables_hold_numbers_even_if_imported_under_another_default_device():
    program = """
import torch
with torch.device("meta"):
    from halfbyte.quant import dequantize, quantize
    assert not dequantize(quantize(torch.ones(64, device="cpu"))).is_meta
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [0, 63, 1000, 1023])
def test_nan_and_infinity_are_refused_by_name(position, bad, dtype, impl):
    w = torch.ones(1024, dtype=dtype)
    w[position] = bad
    with pytest.raises(WeightError, match=r"'layers\.3\.up'.*1 value\(s\)"):
        quantize(w, name="layers.3.up", impl=impl)


def test_what_cannot_be_quantised_is_refused():
    w = torch.ones(64)
    with pytest.raises(WeightError, match=r"'x' is torch\.int8"):
        quantize(w.to(torch.int8), name="x")
    with pytest.raises(ConfigError, match="quant_type"):
        quantize(w, quant_type="int4")
    for block_size in (0, 16, 96, 8192):
        with pytest.raises(ConfigError, match=f"block_size.*{block_size}"):
            quantize(w, block_size=block_size)
        with pytest.raises(ConfigError, match="block_size"):
            empty_like_quantized(
                (64,), w.dtype, quant_type="nf4", block_size=block_size, double_quant=True
            )
    with pytest.raises(ConfigError, match="impl"):
        quantize(w, impl="gpu")


@pytest.mark.parametrize("impl", IMPLS)
def test_out_is_filled_whatever_its_shape(impl):
    q = quantize(weight((31, 33), torch.bfloat16), impl=impl)
    for dtype in (*FLOATS, torch.float64):
        expected = dequantize(q, dtype, impl=impl)
        assert expected.shape == (31, 33)
        for shape in ((31, 33), (33, 31), (1023,)):
            out = torch.full(shape, float("nan"), dtype=dtype)
            assert dequantize(q, out=out, impl=impl) is out
            assert torch.equal(out.view(31, 33), expected)
    assert torch.equal(
        dequantize(q, torch.float64, impl=impl), dequantize(q, torch.float32, impl=impl).double()
    )
    assert dequantize(q, impl=impl).dtype == torch.bfloat16


def test_an_unfit_out_is_refused():
    q = quantize(torch.ones(6, 10))
    with pytest.raises(ValueError, match="60 elements"):
        dequantize(q, out=torch.empty(59))
    with pytest.raises(ValueError, match="contiguous"):
        dequantize(q, out=torch.empty(6, 20)[:, ::2])
    with pytest.raises(ValueError, match="contiguous"):
        dequantize(q, out=torch.empty(10, 12)[:, :6])
    with pytest.raises(ValueError, match="on cpu"):
        dequantize(q, out=torch.empty(6, 10, device="meta"))
    with pytest.raises(ValueError, match=re.escape("dtype is torch.float16")):
        dequantize(q, torch.float16, out=torch.empty(60))
    with pytest.raises(ValueError, match=re.escape("not torch.int32")):
        dequantize(q, torch.int32)


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_rows_with_gaps_and_transposed_views_are_written_and_nothing_else(impl):
    w = weight((6, 10), torch.float32)
    q = quantize(w)
    around = torch.full((8, 16), torch.nan)
    dequantize(q, out=around[1:7, 3:13], impl=impl)
    assert torch.equal(around[1:7, 3:13], dequantize(q))
    assert int(around.isnan().sum()) == 8 * 16 - 60
    turned = torch.full((10, 6), torch.nan)
    dequantize(q, out=turned.t(), impl=impl)
    assert torch.equal(turned.t(), dequantize(q))


def test_several_weights_decode_as_they_would_alone():
    weights = [quantize(weight(shape, torch.float32)) for shape in ((4, 64), (3, 5), (0, 2))]
    for dtype in (torch.bfloat16, torch.float64):
        for q, out in zip(weights, dequantize_all(weights, dtype), strict=True):
            assert torch.equal(out, dequantize(q, dtype))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(), (7,), (300, 77), (0, 5)])
def test_an_empty_like_has_the_layout_of_the_real(shape, double):
    q = quantize(weight(shape, torch.float16), block_size=32, double_quant=double)
    like = empty_like_quantized(
        shape, torch.float16, quant_type="nf4", block_size=32, double_quant=double
    )
    assert like.double_quant == q.double_quant == double
    assert (like.shape, like.dtype, like.nbytes) == (q.shape, q.dtype, q.nbytes)
    for name, tensor in q.tensors().items():
        assert like.tensors()[name].device.type == "meta"
        assert like.tensors()[name].shape == tensor.shape
    moved = q.to("meta")
    assert moved.tensors().keys() == q.tensors().keys()
    assert all(tensor.is_meta for tensor in moved.tensors().values())


def test_tensors_that_do_not_fit_are_refused():
    q = quantize(weight((40, 40), torch.float32))
    for change in (
        {"codes": q.codes[:-1]},
        {"scale_codes": q.scale_codes.float()},
        {"scale_offset": q.scale_offset[None]},
        {"scale_scales": None},
        {"scales": q.block_scales()},
        {"shape": (40, 41)},
        {"block_size": 128},
    ):
        with pytest.raises(WeightError, match="is made of"):
            replace(q, **change)
    with pytest.raises(WeightError, match="one device"):
        replace(q, scale_offset=q.scale_offset.to("meta"))


@pytest.mark.parametrize("impl", IMPLS)
def test_quantising_needs_little_memory(impl):
    """The process' peak, reset before, rises by less than the tensor's own size."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not os.access(clear, os.W_OK):
        pytest.skip("this system does not let a process reset its peak memory")

    def kilobytes(field: str) -> int:
        return int(re.search(rf"{field}:\s+(\d+)", status.read_text())[1])

    w = torch.randn(2**24, generator=torch.Generator().manual_seed(0))
    quantize(w[: 2**20], impl=impl)
    clear.write_text("5")
    before = kilobytes("VmRSS")
    quantize(w, impl=impl)
    assert (kilobytes("VmHWM") - before) * 1024 < w.nbytes
