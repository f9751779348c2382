"""The Triton kernels on a GPU, against plain PyTorch, float64 and bitsandbytes' CUDA code."""

import bitsandbytes.functional as bnb
import pytest
import torch

from halfbyte.errors import WeightError
from halfbyte.quant import dequantize, dequantize_all, quantize
from halfbyte.quant.weight import QuantizedWeight
from halfbyte.tools.self_test import same_but_at_bounds
from tests.quant.test_mxfp4 import bits, every_byte
from tests.quant.test_mxfp4 import weight as mxfp4

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1), (3, 5), (7, 64), (129, 77), (1000, 96), (1024, 4096), (33, 4097)]


def weight(shape, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(shape, generator=generator, device="cuda") * 0.02).to(dtype)


def as_bitsandbytes(q: QuantizedWeight):
    """The same packed tensors as bitsandbytes' (codes, state)."""
    code = bnb.get_4bit_type(q.quant_type, device="cuda")
    state = bnb.QuantState(q.scales, q.shape, code, q.block_size, q.quant_type, q.dtype)
    if q.double_quant:
        nested = bnb.QuantState(
            q.scale_scales,
            blocksize=256,
            code=bnb.create_dynamic_map().cuda(),
            dtype=torch.float32,
        )
        state = bnb.QuantState(
            q.scale_codes,
            q.shape,
            code,
            q.block_size,
            q.quant_type,
            q.dtype,
            q.scale_offset,
            nested,
        )
    return q.codes.view(-1, 1), state


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", TYPES)
def test_decoding_is_bitsandbytes_to_the_bit(shape, quant_type, double, dtype):
    q = quantize(weight(shape, dtype), quant_type=quant_type, double_quant=double)
    expected = bnb.dequantize_4bit(*as_bitsandbytes(q)).reshape(shape)
    assert torch.equal(dequantize(q, impl="torch"), expected)
    out = torch.full(shape, torch.nan, dtype=dtype, device="cuda")
    assert torch.equal(dequantize(q, out=out, impl="gpu"), expected)
    around = torch.full((shape[0], shape[1] + 8), torch.nan, dtype=dtype, device="cuda")
    dequantize(q, out=around[:, : shape[1]])
    assert torch.equal(around[:, : shape[1]], expected)
    assert around[:, shape[1] :].isnan().all()
    turned = torch.full((shape[1], shape[0]), torch.nan, dtype=dtype, device="cuda")
    dequantize(q, out=turned.t())
    assert torch.equal(turned.t(), expected)


def test_a_layer_decodes_in_one_launch_to_one_rounding():
    """float16 weights trained in bfloat16: from 4 bits to bfloat16, never through float16."""
    weights = [quantize(weight(shape, torch.float16, seed=i)) for i, shape in enumerate(SHAPES)]
    for q, out in zip(weights, dequantize_all(weights, torch.bfloat16), strict=True):
        exact = dequantize(q, torch.float32, impl="torch")
        assert torch.equal(out, exact.bfloat16())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [64, 256, 4096])
@pytest.mark.parametrize("dtype", TYPES[:2])
def test_bytes_are_those_of_bitsandbytes_cuda_code(shape, quant_type, block_size, dtype):
    w = weight(shape, dtype)
    q = quantize(w, quant_type=quant_type, block_size=block_size)
    codes, state = bnb.quantize_4bit(
        w, blocksize=block_size, compress_statistics=True, quant_type=quant_type
    )
    assert torch.equal(q.codes, codes.view(-1))
    assert torch.equal(q.scale_codes, state.absmax)
    assert torch.equal(q.scale_scales, state.state2.absmax)
    assert torch.equal(q.scale_offset, state.offset)


def test_float32_weights_get_bitsandbytes_bytes_but_for_a_last_bit():
    """x / scale within a unit of its last place of a bound may fall on either side of it."""
    w = weight((4096, 4096), torch.float32)
    q = quantize(w)
    codes, state = bnb.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
    assert int((q.codes != codes.view(-1)).sum()) <= 4
    assert torch.equal(q.scale_codes, state.absmax)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", TYPES)
def test_encoding_is_that_of_plain_pytorch(quant_type, dtype):
    w = weight((515, 1000), dtype)
    w[:100] = 0
    got, plain = (quantize(w, quant_type=quant_type, impl=i) for i in ("gpu", "torch"))
    assert same_but_at_bounds(got, plain, w)
    if quant_type == "nf4" and dtype != torch.float32:
        assert torch.equal(got.codes, plain.codes)
    found, wanted = (
        dequantize(quantize(w, quant_type=quant_type, impl=i)) for i in ("gpu", "torch")
    )
    assert (found.float() - wanted.float()).abs().max() <= 0.4 * w.float().abs().max()


def test_a_block_of_zeros_stays_zero():
    w = weight((64, 64))
    w[10] = 0
    assert (dequantize(quantize(w))[10] == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(bad):
    w = weight((64, 64))
    w[3, 5] = bad
    with pytest.raises(WeightError, match="1 value"):
        quantize(w, name="here")


@pytest.mark.parametrize("rows", [1, 2, 5, 16, 33, 64])
@pytest.mark.parametrize("shape", [(4096, 4096), (1000, 352), (11008, 4096), (5, 32)])
@pytest.mark.parametrize("dtype", TYPES[:2])
@pytest.mark.parametrize("double", [True, False])
def test_small_products(rows, shape, dtype, double):
    from halfbyte.linear import triton_gemv

    q = quantize(weight(shape, dtype), double_quant=double)
    x = weight((rows, shape[1]), dtype, seed=1) * 50
    exact = x.double() @ dequantize(q, torch.float32).double().t()
    usual = (x @ dequantize(q, dtype).t()).double()
    got = triton_gemv.small_product(x, q).double()
    assert got.shape == exact.shape
    assert (got - exact).norm() <= 1.1 * (usual - exact).norm()


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("outputs", [(4096, 1024, 1024), (11008, 11008), (6, 7), (64, 64, 64, 64)])
@pytest.mark.parametrize("dtype", TYPES[:2])
@pytest.mark.parametrize("double", [True, False])
def test_small_products_of_one_input(rows, outputs, dtype, double):
    from halfbyte.linear import triton_gemv

    weights = [
        quantize(weight((out, 4096), dtype, seed=i), double_quant=double)
        for i, out in enumerate(outputs)
    ]
    x = weight((rows, 4096), dtype, seed=9) * 50
    got = triton_gemv.small_products(x, weights)
    assert torch.equal(got, torch.cat([triton_gemv.small_product(x, q) for q in weights], 1))


def test_more_than_two_to_the_31_elements():
    rows, columns = 2**19 + 8, 4096
    w = torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
    q = quantize(w)
    out = torch.full_like(w, torch.nan)
    dequantize(q, out=out)
    for some in (slice(0, 8), slice(2**19 - 4, 2**19 + 8)):
        part = quantize(w[some], double_quant=False)
        codes = q.codes.view(rows, -1)[some]
        assert torch.equal(codes.reshape(-1), part.codes)
        assert (out[some] - dequantize(part)).abs().max() < 1e-3
    assert not out.isnan().any()


@pytest.mark.parametrize("dtype", TYPES)
def test_mxfp4_decodes_as_plain_pytorch_does(dtype):
    """Every byte with every scale; and experts of a layer, in one launch and to any memory."""
    q = every_byte(dtype).to("cuda")
    assert torch.equal(bits(dequantize(q, impl="gpu")), bits(dequantize(q, impl="torch")))
    experts = [mxfp4(2880, 2880, seed=i).to("cuda") for i in range(20)]
    for expert, out in zip(experts, dequantize_all(experts, dtype), strict=True):
        expected = dequantize(expert, dtype, impl="torch")
        assert torch.equal(bits(out), bits(expected))
    turned = torch.full((2880, 2880), torch.nan, dtype=dtype, device="cuda")
    dequantize(experts[-1], out=turned.t())
    assert torch.equal(bits(turned.t()), bits(expected))
