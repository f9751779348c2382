"""The Triton kernels of MXFP4, in Triton's interpreter (see test_triton_blockwise.py)."""

import os

import pytest
import torch

from halfbyte.quant import dequantize
from tests.quant.test_mxfp4 import bits, every_byte, weight

gpu = pytest.importorskip(
    "halfbyte.quant.triton_mxfp4", reason="needs Triton", exc_type=ImportError
)
pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1",
        reason="Triton compiles here, so tests/gpu/ tests these",
    ),
    # NumPy says so when a float32 becomes an infinite float16.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_byte_with_every_scale_is_plain_pytorch_to_the_bit(dtype):
    q = every_byte()
    expected = dequantize(q, dtype, impl="torch")
    out = torch.full(q.shape, torch.nan, dtype=dtype)
    gpu.decode_all([q], [out])
    assert torch.equal(bits(out), bits(expected))
    turned = torch.full((q.shape[1], q.shape[0]), torch.nan, dtype=dtype)
    gpu.decode_all([q], [turned.t()])
    assert torch.equal(bits(turned.t()), bits(expected))


@pytest.mark.parametrize("shape", [(1, 32), (3, 96), (7, 64), (70, 320), (2, 4096)])
def test_any_shape_goes_to_any_memory(shape):
    q = weight(*shape)
    expected = dequantize(q, torch.float32, impl="torch")
    out = torch.full((q.numel,), torch.nan)
    gpu.decode_all([q], [out])
    assert torch.equal(out.view(shape), expected)
    around = torch.full((shape[0], shape[1] + 3), torch.nan)
    gpu.decode_all([q], [around[:, : shape[1]]])
    assert torch.equal(around[:, : shape[1]], expected)
    assert around[:, shape[1] :].isnan().all()
    unaligned = torch.full((q.numel + 1,), torch.nan)
    gpu.decode_all([q], [unaligned[1:].view(shape)])
    assert torch.equal(unaligned[1:].view(shape), expected)


def test_the_experts_of_a_layer_share_launches():
    """More than one launch takes, of several sizes, to one tensor and to several."""
    weights = [weight(rows, 64, seed=rows) for rows in (1, 8, 700, 3, *range(1, 20))]
    weights.append(weight(0, 64))
    whole = torch.full((sum(q.numel for q in weights),), torch.nan)
    outs = list(torch.split(whole, [q.numel for q in weights]))
    outs[3] = torch.full((3 * 64,), torch.nan)
    gpu.decode_all(weights, outs)
    for q, out in zip(weights, outs, strict=True):
        assert torch.equal(out.view(q.shape), dequantize(q, torch.float32, impl="torch"))
