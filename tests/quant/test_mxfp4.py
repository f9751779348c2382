"""MXFP4: its decoders are those of transformers and of the gguf package, bit for bit."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from halfbyte.errors import ConfigError, WeightError
from halfbyte.quant import (
    MXFP4Weight,
    cpu,
    dequantize,
    dequantize_all,
    empty_like_mxfp4,
    quantize,
    quantize_mxfp4,
)
from halfbyte.quant.mxfp4 import LARGEST_SCALE, half_scales
from halfbyte.quant.weight import FLOAT_TYPES

KERNELS = cpu.kernels()
assert KERNELS is not None, "these tests need a C++ compiler"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


def every_byte(dtype: torch.dtype = torch.bfloat16) -> MXFP4Weight:
    """Every byte of codes with every scale: 256 rows of 16 blocks."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(256)
    scales = torch.arange(256).repeat_interleave(16).to(torch.uint8)
    return MXFP4Weight(codes, scales, (256, 512), dtype)


def weight(rows: int, columns: int, seed: int = 0) -> MXFP4Weight:
    """Random bytes."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows * columns // 2,), generator=generator)
    scales = torch.randint(0, 256, (rows * columns // 32,), generator=generator)
    return MXFP4Weight(
        codes.to(torch.uint8), scales.to(torch.uint8), (rows, columns), torch.bfloat16
    )


def by_definition(q: MXFP4Weight) -> torch.Tensor:
    """Level times 2^(scale - 127), in float64, which has room for all of them."""
    levels = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    levels = torch.tensor([*levels, *(-level for level in levels)], dtype=torch.float64)
    codes = torch.stack([q.codes & 15, q.codes >> 4], 1).view(-1, 32).long()
    scales = torch.pow(torch.tensor(2.0, dtype=torch.float64), q.scales.double() - 127)
    return (levels[codes] * scales[:, None]).view(q.shape)


def by_transformers(q: MXFP4Weight, dtype: torch.dtype) -> torch.Tensor:
    """Its weights are [experts, in, out]."""
    rows, columns = q.shape
    blocks = q.codes.view(1, rows, columns // 32, 16)
    made = convert_moe_packed_tensors(blocks, q.scales.view(1, rows, -1), dtype=dtype)
    return made[0].t().contiguous()


def by_gguf(q: MXFP4Weight) -> torch.Tensor:
    """Its blocks have the scale before the codes, and elements i and i + 16 in byte i."""
    codes = torch.stack([q.codes & 15, q.codes >> 4], 1).view(-1, 32)
    packed = codes[:, :16] | codes[:, 16:] << 4
    raw = torch.cat([q.scales[:, None], packed], 1).view(q.shape[0], -1)
    with np.errstate(over="ignore"):
        made = gguf.dequantize(raw.numpy(), GGMLQuantizationType.MXFP4)
    return torch.from_numpy(made)


@pytest.mark.parametrize("impl", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_every_byte_with_every_scale_is_what_the_others_make_of_it(dtype, impl):
    q = every_byte()
    got = dequantize(q, dtype, impl=impl)
    assert torch.equal(bits(got), bits(by_definition(q).to(dtype)))
    assert torch.equal(bits(got), bits(by_transformers(q, dtype)))
    # It has one zero only; and other numbers have the same bits if they are equal.
    assert torch.equal(got, by_gguf(q).to(dtype))
    if dtype != torch.float16:
        finite = q.scales.view(256, 16) <= LARGEST_SCALE
        assert got.view(256, 16, 32)[finite].isfinite().all()
        assert not got.view(256, 16, 32)[~finite].isfinite().all()


@given(st.lists(st.integers(0, 255), min_size=17, max_size=17 * 5))
def test_any_bytes_are_what_the_others_make_of_them(data):
    count = len(data) // 17
    raw = torch.tensor(data[: count * 17], dtype=torch.uint8).view(count, 17)
    q = MXFP4Weight(raw[:, 1:].reshape(-1), raw[:, 0].contiguous(), (1, count * 32), torch.bfloat16)
    for impl in ("torch", "cpu"):
        got = dequantize(q, impl=impl)
        assert torch.equal(bits(got), bits(by_transformers(q, torch.bfloat16)))
        assert torch.equal(dequantize(q, torch.float32, impl=impl), by_gguf(q))


def test_decoded_to_bfloat16_nothing_is_rounded():
    q = every_byte()
    finite = q.scales <= LARGEST_SCALE
    got = dequantize(q).view(-1, 32)[finite]
    assert torch.equal(got.double(), by_definition(q).view(-1, 32)[finite])


@pytest.mark.parametrize("variant", KERNELS.variants)
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_every_variant_equals_plain_pytorch(dtype, variant):
    """On a poisoned buffer at an odd address, whose neighbours stay as they are."""
    for q in (every_byte(), weight(1, 32), weight(3, 96), weight(70, 320)):
        around = torch.full((q.numel + 9,), float("nan"), dtype=dtype)
        KERNELS.decode_mxfp4(q, around[3 : q.numel + 3], variant=variant)
        expected = dequantize(q, dtype, impl="torch").view(-1)
        assert torch.equal(bits(around[3 : q.numel + 3]), bits(expected))
        assert around[:3].isnan().all()
        assert around[q.numel + 3 :].isnan().all()


def test_the_number_of_threads_does_not_matter():
    q = weight(1, 2 * cpu._DECODE_SHARE + 64)
    one, two = (torch.empty(q.shape, dtype=torch.bfloat16) for _ in range(2))
    KERNELS.decode_mxfp4(q, one, threads=1)
    KERNELS.decode_mxfp4(q, two, threads=2)
    assert torch.equal(bits(one), bits(two))


@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_both_formats_are_decoded_together_to_any_memory(impl):
    g = torch.Generator().manual_seed(1)
    nf4 = quantize(torch.randn(5, 64, generator=g))
    weights = [weight(4, 64), nf4, weight(2, 32, seed=1), weight(3, 96, seed=2)]
    outs = [
        torch.empty(64, 4).t(),
        torch.empty(5, 64),
        torch.empty(2, 40)[:, :32],
        torch.empty(3 * 96),
    ]
    made = dequantize_all(weights, torch.float32, outs=outs, impl=impl)
    for q, out, came in zip(weights, outs, made, strict=True):
        assert came is out
        assert torch.equal(out.view(q.shape), dequantize(q, torch.float32, impl="torch"))
    assert torch.equal(dequantize(weights[0], torch.float64), by_definition(weights[0]))
    with pytest.raises(ValueError, match="out must be"):
        dequantize(weights[0], out=torch.empty(7))
    with pytest.raises(ConfigError):
        dequantize(weights[0], impl="gpu")


def test_a_weight_describes_itself_and_refuses_what_does_not_fit():
    q = weight(4, 64)
    assert (q.numel, q.nbytes, q.bits_per_weight) == (256, 136, 4.25)
    assert (q.quant_type, q.block_size, list(q.tensors())) == ("mxfp4", 32, ["codes", "scales"])
    empty = empty_like_mxfp4((4, 64), torch.float32)
    assert empty.codes.is_meta
    assert empty_like_mxfp4((0, 64), torch.float32).bits_per_weight == 0
    assert q.to("meta").scales.is_meta
    with pytest.raises(WeightError, match="blocks of 32"):
        empty_like_mxfp4((4, 48), torch.float32)
    with pytest.raises(WeightError, match="blocks of 32"):
        empty_like_mxfp4((), torch.float32)
    with pytest.raises(WeightError, match="damaged"):
        MXFP4Weight(q.codes, q.scales[1:], (4, 64), torch.float32)
    with pytest.raises(WeightError, match="damaged"):
        MXFP4Weight(q.codes, q.scales.char(), (4, 64), torch.float32)
    with pytest.raises(WeightError, match="one device"):
        MXFP4Weight(q.codes, q.scales.to("meta"), (4, 64), torch.float32)


def test_half_a_scale_is_exact():
    scales = torch.arange(256, dtype=torch.uint8)
    exact = torch.pow(torch.tensor(2.0, dtype=torch.float64), torch.arange(256).double() - 128)
    assert torch.equal(half_scales(scales).double(), exact)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_quantised_to_the_nearest_level_with_the_scale_of_the_gguf_package(dtype):
    """Away from ties, and from scales that do not fit into eight bits, which it lets overflow."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(40, 320, generator=g) * torch.exp2(torch.arange(-20.0, 20.0))[:, None] / 1e3
    w[3] = 0
    w = w.to(dtype)
    q = quantize_mxfp4(w)
    raw = torch.from_numpy(gguf.quantize(w.float().numpy(), GGMLQuantizationType.MXFP4))
    raw = raw.view(-1, 17)
    assert torch.equal(q.scales, raw[:, 0])
    if dtype == torch.float32:  # 16-bit values are often in the middle
        with np.errstate(over="ignore"):
            other = gguf.dequantize(raw.view(40, -1).numpy(), GGMLQuantizationType.MXFP4)
        assert torch.equal(dequantize(q, torch.float32), torch.from_numpy(other))
    # By the definition: no level of a block is nearer, and the largest one is in use.
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]).double()
    scales = torch.pow(torch.tensor(2.0).double(), q.scales.double() - 127)[:, None, None]
    every = torch.cat([levels, -levels]) * scales
    values = w.double().view(-1, 32, 1)
    least = (values - every).abs().amin(2)
    got = dequantize(q, torch.float64).view(-1, 32)
    assert torch.equal((values[..., 0] - got).abs(), least)
    assert (got.abs().amax(1) >= 4 * scales[:, 0, 0])[w.view(-1, 32).abs().amax(1) > 0].all()


def test_ties_go_to_an_even_mantissa_and_what_is_too_large_saturates():
    values = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.5, 6.0, 4.0, -0.25, -5.0, -7.0, 0.1]
    wanted = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, 4.0, -0.0, -4.0, -6.0, 0.0]
    w = torch.nn.functional.pad(torch.tensor(values), (0, 32 - len(values)))
    got = dequantize(quantize_mxfp4(w))
    assert got[: len(wanted)].tolist() == wanted
    assert got[10].signbit()


@given(st.lists(st.integers(0, 255), min_size=16, max_size=16), st.integers(0, 250))
def test_what_is_in_the_format_already_comes_back_bit_by_bit(codes, scale):
    """If its block uses the upper levels; else the same values have a smaller scale."""
    codes[0] = codes[0] & 0x0F | 0x70  # 6
    q = MXFP4Weight(
        torch.tensor(codes, dtype=torch.uint8),
        torch.tensor([scale], dtype=torch.uint8),
        (32,),
        torch.float32,
    )
    again = quantize_mxfp4(dequantize(q))
    assert torch.equal(again.codes, q.codes)
    assert torch.equal(again.scales, q.scales)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_or_no_float_is_refused(bad):
    w = torch.zeros(2, 64)
    w[1, 40] = bad
    with pytest.raises(WeightError, match="'here' contains NaN or infinity"):
        quantize_mxfp4(w, name="here")
    with pytest.raises(WeightError, match="int64"):
        quantize_mxfp4(torch.zeros(2, 32, dtype=torch.int64))


def test_the_smallest_and_the_largest_numbers_are_quantised():
    tiny, largest = torch.full((32,), 1e-45), torch.full((32,), torch.finfo(torch.float32).max)
    assert quantize_mxfp4(tiny).scales.tolist() == [0]
    assert dequantize(quantize_mxfp4(tiny)).tolist() == [0.0] * 32
    q = quantize_mxfp4(largest)
    assert q.scales.tolist() == [LARGEST_SCALE]
    assert dequantize(q).isfinite().all()
