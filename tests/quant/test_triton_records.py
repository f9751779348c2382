"""Decoding weights at a constant distance, in Triton's interpreter."""

import os
from dataclasses import replace

import pytest
import torch

from halfbyte.quant import dequantize, quantize, quantize_mxfp4

gpu = pytest.importorskip(
    "halfbyte.quant.triton_records", reason="needs Triton", exc_type=ImportError
)
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton compiles here, so tests/gpu/ tests these",
)


def records_of(weights):
    """The weights, moved into one tensor of records with room between their tensors."""
    sizes = {name: t.nbytes for name, t in weights[0].tensors().items()}
    padded = {name: size + -size % 16 + 16 for name, size in sizes.items()}
    records = torch.randint(0, 256, (len(weights), sum(padded.values())), dtype=torch.uint8)
    moved = []
    for record, q in zip(records, weights, strict=True):
        start, tensors = 0, {}
        for name, tensor in q.tensors().items():
            place = record[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            tensors[name] = place.copy_(tensor)
            start += padded[name]
        moved.append(replace(q, **tensors))
    return moved, records.shape[1]


@pytest.mark.parametrize("kind", ["nf4", "nf4, plain scales", "fp4", "mxfp4"])
@pytest.mark.parametrize("shape", [(6, 96), (70, 64)])
def test_a_range_of_records_is_decoded_to_the_bit(kind, shape):
    def packed(seed):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        if kind == "mxfp4":
            return quantize_mxfp4(values)
        return quantize(values, quant_type=kind[:3], double_quant="plain" not in kind)

    weights, stride = records_of([packed(seed) for seed in range(4)])
    assert gpu.fits(weights[0])
    out = torch.full((4, *shape), torch.nan)
    gpu.decode_records(weights[1], stride, out[:2])
    expected = [dequantize(q, torch.float32, impl="torch") for q in weights[1:3]]
    assert torch.equal(out[:2], torch.stack(expected))
    assert out[2:].isnan().all()


def test_weights_that_end_within_a_word_do_not_fit():
    assert not gpu.fits(quantize(torch.ones(3, 5)))
