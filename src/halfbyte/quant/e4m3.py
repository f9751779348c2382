"""Weights as e4m3 numbers (8 bits: sign, 4 of exponent, 3 of mantissa), a scale for each row.

This is the specification of the weights of FP8 products; triton_e4m3.py has the kernels, which give
the same numbers. W [out, in] becomes e4m3 [out, in] and float32 [out].

A scale is a power of two. e4m3 is a floating-point format: its relative error does not depend on
the scale, as long as numbers are normal. So a scale need not be tight, and one that is a power of
two makes its products exact. Rows are scaled to at most 256 of the 448 that e4m3 has, which leaves
fourteen powers of two below before numbers become subnormal: in trained weights no row's numbers
are as far apart, and what is rounded more coarsely is too small to matter.

With double quantisation, the largest scale of a row is not searched: a scale is level · scale of
256 blocks + offset with levels of at most 1, so the scales of blocks bound it. That is one or a few
numbers per row, so a kernel needs no pass before the one that decodes.

(NF4's sixteen levels are no e4m3 numbers; rounding them times a scale adds an error of 2.6 % of the
weight, root mean square, to the 9.2 % of NF4.)
"""

import torch
from torch import Tensor

from halfbyte.quant.format import PackedWeight, dequantize
from halfbyte.quant.weight import SCALE_BLOCK, QuantizedWeight

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
# Of the largest magnitude of a row of activations: 448 divided by it is finite.
SMALLEST = 2.0**-100
# Of a row of a weight after scaling: the largest power of two in e4m3.
_ROW_BITS = 8


def in_whole_blocks(packed: PackedWeight) -> bool:
    """Return whether it is a 4-bit weight whose blocks do not cross its rows."""
    return isinstance(packed, QuantizedWeight) and packed.shape[-1] % packed.block_size == 0


def row_bounds(q: QuantizedWeight) -> Tensor:
    """Return a bound of the magnitudes of each row, float32 [out].

    Args:
        q: A weight [out, in]; `in_whole_blocks`.
    """
    out, blocks = q.shape[0], q.shape[1] // q.block_size
    if q.scales is not None:
        return q.scales.view(out, blocks).abs().amax(1)
    assert q.scale_scales is not None
    assert q.scale_offset is not None
    row = torch.arange(out, device=q.codes.device)
    first, last = row * blocks // SCALE_BLOCK, ((row + 1) * blocks - 1) // SCALE_BLOCK
    bound = q.scale_scales[first]
    for i in range(1, groups_across(blocks)):
        bound = torch.maximum(bound, q.scale_scales[torch.minimum(first + i, last)])
    return bound + q.scale_offset.abs()


def groups_across(blocks: int) -> int:
    """Return how many groups of 256 scales a row of so many blocks is in, at most."""
    return (blocks + SCALE_BLOCK - 2) // SCALE_BLOCK + 1


def row_scales(bounds: Tensor) -> Tensor:
    """Return the scale of each row: the power of two that makes its bound at most 256.

    Args:
        bounds: Of the magnitudes of each row, float32, finite.
    """
    # The exponent of the power of two at or above; 1 at least, so that a scale is never 0.
    exponents = (bounds.contiguous().view(torch.int32) + 0x7FFFFF) >> 23
    return ((exponents - _ROW_BITS).clamp(min=1) << 23).view(torch.float32)


def decode(packed: PackedWeight, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return a packed weight [out, in] as e4m3 and the scale of each row, float32 [out].

    Args:
        packed: In any format. A 4-bit one is rounded once, from its float32 numbers.
        out: Where to write the e4m3 numbers.
    """
    wide = dequantize(packed, torch.float32)
    if isinstance(packed, QuantizedWeight) and in_whole_blocks(packed):
        bounds = row_bounds(packed)
    else:
        bounds = wide.abs().amax(1)
    return _divided(wide, row_scales(bounds), out)


def encode(weight: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return a plain weight [out, in] as e4m3 and the scale of each row, float32 [out]."""
    return _divided(weight, row_scales(weight.float().abs().amax(1)), out)


def _divided(weight: Tensor, scale: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    data = (weight.float() / scale[:, None]).to(DTYPE)
    return (data if out is None else out.copy_(data)), scale


def quantize_rows(x: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return activations as e4m3 [rows, n], and the scale of each row, float32 [rows, 1].

    The largest magnitude of a row becomes 448, so it is exact: where few numbers are much larger
    than the rest, as in the residual stream of language models, they matter most.

    Args:
        x: [rows, n], finite.
        factors: Of the columns, float32 [n], which x is multiplied with first.
    """
    wide = x.float() if factors is None else x.float() * factors
    bound = wide.abs().amax(1, keepdim=True).clamp(min=SMALLEST)
    # Correctly rounded: torch multiplies with a reciprocal where one of two is a number, and with
    # e.g. 3.75 as bound a hundredth of a row lies halfway between two numbers but for that.
    largest = torch.full_like(bound, LARGEST)
    rounded = (wide * (largest / bound)).clamp(-LARGEST, LARGEST).to(DTYPE)
    return rounded, bound / largest
