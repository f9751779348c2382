"""The Triton kernels, in Triton's interpreter: the arithmetic, the masks and the addresses.

The interpreter runs a kernel on the CPU, one program after another; its bfloat16 is wrong, so the
types here are float16 and float32. That the kernels compile for each GPU is tests/nf4/
tests/test_compiling.py, and that they run on one tests/gpu/.
"""

import os

import pytest
import torch

from halfbyte.quant import blockwise, dequantize, quantize
from halfbyte.quant import format as quant_format

gpu = pytest.importorskip(
    "halfbyte.quant.triton_blockwise", reason="needs Triton", exc_type=ImportError
)
pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1",
        reason="Triton compiles here, so tests/gpu/ tests these",
    ),
    # NumPy says so when the interpreter divides by zero or multiplies NaN.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

SHAPES = [(1, 1), (1, 8), (3, 5), (7, 64), (16, 96), (5, 77), (33, 128), (2, 4097)]


def weight(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_decoding_is_that_of_plain_pytorch_to_the_bit(shape, double, quant_type, dtype):
    block_size = 64 if shape[0] % 2 else 32
    q = quantize(weight(shape), quant_type=quant_type, double_quant=double, block_size=block_size)
    expected = dequantize(q, dtype, impl="torch")
    out = torch.full(shape, torch.nan, dtype=dtype)
    gpu.decode_all([q], [out])
    assert torch.equal(out, expected)
    around = torch.full((shape[0], shape[1] + 3), torch.nan, dtype=dtype)
    gpu.decode_all([q], [around[:, : shape[1]]])
    assert torch.equal(around[:, : shape[1]], expected)
    assert around[:, shape[1] :].isnan().all()
    turned = torch.full((shape[1], shape[0]), torch.nan, dtype=dtype)
    gpu.decode_all([q], [turned.t()])
    assert torch.equal(turned.t(), expected)


def test_many_weights_of_several_kinds_go_in_few_launches():
    weights = [
        quantize(weight((rows, 64), seed=rows), quant_type=kind, double_quant=double)
        for rows in (1, 8, 700, 3)
        for kind in ("nf4", "fp4")
        for double in (True, False)
    ]
    weights += [quantize(weight((9, 64), seed=i)) for i in range(20)]
    outs = [torch.full(q.shape, torch.nan) for q in weights]
    gpu.decode_all(weights, outs)
    for q, out in zip(weights, outs, strict=True):
        assert torch.equal(out, dequantize(q, torch.float32, impl="torch"))


def test_a_weight_that_is_not_aligned_decodes():
    q = quantize(weight((8, 64)), double_quant=False)
    memory = torch.full((8 * 64 + 1,), torch.nan)
    gpu.decode_all([q], [memory[1:].view(8, 64)])
    assert torch.equal(memory[1:].view(8, 64), dequantize(q, torch.float32))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 256, 4096])
@pytest.mark.parametrize("count", [1, 63, 64, 65, 1000, 8193])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_encoding_is_that_of_plain_pytorch(quant_type, block_size, count, dtype):
    values = weight((count,), dtype, seed=count)
    values[: count // 3] = 0.0
    codes, scales = gpu.encode(values, quant_type, block_size)
    expected = quant_format._encode(values, quant_type, block_size, cuda=True)
    assert torch.equal(scales, expected[1])
    assert torch.equal(codes, expected[0])


def test_values_on_and_beside_every_bound_get_the_code_of_plain_pytorch():
    for quant_type in ("nf4", "fp4"):
        bounds, _ = blockwise.cuda_bounds(quant_type)
        one = torch.ones(1)
        beside = [torch.nextafter(bounds, bounds.new_tensor(side)) for side in (-2.0, 2.0)]
        values = torch.cat([one, bounds, *beside, -bounds, one * 0, -one * 0, -one])
        values = torch.nn.functional.pad(values, (0, 64 - len(values)))
        codes, _ = gpu.encode(values, quant_type, 64)
        assert torch.equal(codes, quant_format._encode(values, quant_type, 64, cuda=True)[0])


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_no_cell_has_two_bounds_nor_one_at_its_edge(quant_type):
    """What rounds into a neighbouring cell must get the same code from it."""
    bounds, _ = blockwise.cuda_bounds(quant_type)
    places = bounds * 16
    assert len(places.round().unique()) == len(bounds)
    assert ((places - places.round()).abs() < 0.5 - 1e-3).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_block_that_is_not_finite_has_a_scale_that_is_not(bad):
    values = weight((256,))
    values[100] = bad
    _, scales = gpu.encode(values, "nf4", 64)
    assert scales.isfinite().tolist() == [True, False, True, True]


@pytest.mark.parametrize("count", [1, 255, 256, 257, 3000])
def test_scales_are_encoded_as_by_plain_pytorch(count):
    scales = weight((count,), seed=count).abs()
    offset = scales.mean()
    expected = blockwise.encode_dynamic(scales - offset, 256, cuda=True)
    for got, wanted in zip(gpu.encode_scales(scales, offset), expected, strict=True):
        assert torch.equal(got, wanted)


def test_every_level_of_the_dynamic_table_and_every_middle_is_encoded():
    levels = blockwise.DYNAMIC_SIGNED
    values = torch.cat([levels, blockwise.midpoints(levels)])
    # Blocks of 256 whose largest is 1, so that values are not scaled.
    values = torch.cat([values[:255], values.new_ones(1), values[255:], values.new_ones(1)])
    zero = torch.zeros(())
    codes, _ = gpu.encode_scales(values, zero)
    assert torch.equal(codes, blockwise.encode_dynamic(values, 256, cuda=True)[0])
    assert torch.equal(codes[:255], torch.arange(255, dtype=torch.uint8))


def test_a_vector_of_any_length_is_decoded():
    q = quantize(weight((77,)), quant_type="nf4", double_quant=True, block_size=64)
    out = torch.full((77,), torch.nan, dtype=torch.float16)
    gpu.decode_all([q], [out])
    assert torch.equal(out, dequantize(q, torch.float16))
