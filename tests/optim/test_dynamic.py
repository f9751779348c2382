"""The dynamic tables as arithmetic, against bitsandbytes' and against exact decimals."""

from fractions import Fraction

import bitsandbytes.functional as bnb
import pytest
import torch

from halfbyte.optim import dynamic

CPU = torch.device("cpu")
both = pytest.mark.parametrize("signed", [True, False])


def digits_between(one, other):
    """How many float32 lie between two of equal signs."""
    return (one.view(torch.int32) - other.view(torch.int32)).abs().max()


def exact_levels(signed):
    """The levels as fractions."""
    found = [Fraction(0), Fraction(1)]
    for decade in range(7):
        count = 2 ** (decade + (not signed))
        for i in range(count):
            middle = Fraction(1, 10) + Fraction(9, 10) * Fraction(2 * i + 1, 2 * count)
            found += [s * middle / 10 ** (6 - decade) for s in ((1, -1) if signed else (1,))]
    return torch.tensor([float(level) for level in sorted(found)], dtype=torch.float64)


@both
def test_levels_are_bitsandbytes_but_for_rounding(signed):
    levels = dynamic.levels(signed, CPU)
    assert digits_between(levels, bnb.create_dynamic_map(signed=signed)) <= 2
    assert digits_between(levels, exact_levels(signed).float()) <= 1
    assert levels[[127, 255] if signed else [0, 255]].tolist() == [0.0, 1.0]


@both
def test_bounds_are_midpoints_but_for_rounding(signed):
    exact = exact_levels(signed)
    middles = ((exact[:-1] + exact[1:]) / 2)[0 if signed else 1 :]
    bounds = dynamic.bounds(signed, CPU).double()[0 if signed else 1 :]
    torch.testing.assert_close(bounds, middles, rtol=1e-6, atol=0)


@both
def test_computed_positions_and_a_search_of_the_bounds_agree(signed):
    """At every bound, beside it, and at every 997th float between."""
    bounds = dynamic.bounds(signed, CPU)
    bits = bounds[bounds > 0].view(torch.int32)
    bits = torch.cat([bits + d for d in (-1, 0, 1)] + [torch.arange(80 << 23, 127 << 23, 997)])
    y = bits.int().view(torch.float32)
    position = dynamic._position(y, signed=signed)
    searched = torch.bucketize(y, bounds)
    assert torch.equal(position, searched - 127 if signed else (searched + 1).clamp(min=2))
    if signed:  # the lowest level is not -1, so under zero the last two positions are one
        assert torch.equal(position.clamp(max=127), 127 - torch.bucketize(-y, bounds))
