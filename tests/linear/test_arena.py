"""Packed weights in one tensor: the same weights, nothing between them, and no room for more."""

import pytest
import torch

from halfbyte.linear.arena import Arena
from halfbyte.quant import quantize
from halfbyte.quant.weight import empty_like_quantized

SHAPES = [(7, 10), (64, 64), (33, 130)]


@pytest.mark.parametrize("double_quant", [True, False])
def test_weights_lie_side_by_side_and_are_what_they_were(double_quant):
    how = {"quant_type": "nf4", "block_size": 64, "double_quant": double_quant}
    weights = [empty_like_quantized(shape, torch.bfloat16, **how) for shape in SHAPES]
    arena = Arena(weights, "cpu")
    given = [quantize(torch.randn(shape), **how) for shape in SHAPES]
    held = [arena.hold(q) for q in given]
    assert arena._used == len(arena._memory)
    for one, other in zip(held, given, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        for name, tensor in other.tensors().items():
            mine = one.tensors()[name]
            assert mine.dtype == tensor.dtype
            assert torch.equal(mine, tensor)
            assert mine.untyped_storage().data_ptr() == arena._memory.data_ptr()
            assert (mine.data_ptr() - arena._memory.data_ptr()) % 256 == 0


def test_a_weight_too_many_stays_where_it_is():
    one = quantize(torch.randn(64, 64))
    arena = Arena([one], "cpu")
    assert arena.hold(one).codes is not one.codes
    assert arena.hold(one) is one
