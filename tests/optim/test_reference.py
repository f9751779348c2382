"""8-bit state: the nearest level, one scale a block; rounding that keeps the mean."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.optim import dynamic, reference
from halfbyte.quant import blockwise

values = st.integers(1, 700).flatmap(
    lambda count: st.tuples(
        st.integers(0, 2**31), st.just(count), st.floats(1e-18, 1e18), st.floats(0.5, 12)
    )
)


def spread(drawn):
    """Values over several decades, from (seed, how many, the largest, decades)."""
    seed, count, largest, decades = drawn
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (-decades * torch.rand(count, generator=generator))
    return largest * sizes * (2 * torch.randint(0, 2, (count,), generator=generator) - 1)


@given(values, st.booleans())
def test_a_round_trip_ends_at_the_nearest_level(drawn, signed):
    x = spread(drawn) if signed else spread(drawn).abs()
    codes, scales = reference.encode(x, signed=signed)
    got = reference.decode(codes, scales, signed=signed).double()
    levels = dynamic.levels(signed, torch.device("cpu")).double()
    scale = scales.double().repeat_interleave(reference.BLOCK)[: len(x), None]
    nearest = (levels * scale - x.double()[:, None]).abs().amin(1)
    error = (got - x.double()).abs()
    rounding = 1e-6 * x.double().abs() + 1e-12 * scale[:, 0]
    if not signed:
        flushed = got == 0
        assert not flushed[x > 0].any()
        kept = codes > 1
        assert (error <= nearest + rounding)[kept].all()
    else:
        assert (error <= nearest + rounding).all()
    assert torch.equal(scales, torch.stack([part.abs().max() for part in x.split(reference.BLOCK)]))


@given(values, st.booleans())
def test_what_was_decoded_encodes_to_the_same(drawn, signed):
    x = spread(drawn) if signed else spread(drawn).abs()
    codes, scales = reference.encode(x, signed=signed)
    again, same = reference.encode(reference.decode(codes, scales, signed=signed), signed=signed)
    # A block whose largest is below zero has no level for it, so that its scale shrinks.
    kept = (scales == same).repeat_interleave(reference.BLOCK)[: len(x)]
    assert kept.all() or signed
    assert torch.equal(again[kept], codes[kept])


@pytest.mark.parametrize("signed", [True, False])
def test_no_cell_has_two_midpoints(signed):
    middles = dynamic.bounds(signed, torch.device("cpu"))
    numbers = (middles[middles > 0].view(torch.int32) >> 16) - reference.FIRST_CELL
    assert (numbers >= 1).all()
    assert len(numbers.unique()) == len(numbers)


@pytest.mark.parametrize("signed", [True, False])
def test_every_level_every_midpoint_and_their_neighbours_are_searched_as_in_blockwise(signed):
    device = torch.device("cpu")
    levels, middles = dynamic.levels(signed, device), dynamic.bounds(signed, device)
    beside = [torch.nextafter(middles, middles.new_tensor(side)) for side in (-2.0, 2.0)]
    x = torch.cat([levels, middles, *beside, levels.new_tensor([-0.0, 1e-30, 1e-38])])
    x = x if signed else x[x >= 0]
    for scale in (1.0, 3e-5, 1e-36):
        one = torch.nn.functional.pad(x, (0, -len(x) % 255)).view(-1, 255)
        blocks = torch.nn.functional.pad(one, (0, 1), value=1.0) * scale
        found = reference.encode(blocks.view(-1), signed=signed)[0].view(-1, 256).int()
        wanted = blockwise.nearest(blocks, blocks.abs().amax(1), middles)
        tiny = (wanted == 0) & (blocks > 0) if not signed else torch.zeros_like(found, dtype=bool)
        assert torch.equal(found[~tiny], wanted[~tiny])
        assert (found[tiny] == 1).all()


@pytest.mark.parametrize("signed", [True, False])
def test_zeros_stay_zeros(signed):
    x = torch.zeros(300)
    codes, scales = reference.encode(x, signed=signed)
    assert torch.equal(reference.decode(codes, scales, signed=signed), x)
    zeroed = torch.zeros(300, dtype=torch.uint8), torch.zeros(2)
    assert torch.equal(reference.decode(*zeroed, signed=signed), x)


@pytest.mark.parametrize("value", [1.0, -3.14159, 1e-3, 0.0, 255.99])
def test_stochastic_rounding_keeps_the_mean(value):
    x = torch.full((1 << 16,), value)
    got = reference.round_stochastically(x, seed=3, step=5, start=0).double()
    low = x[:1].view(torch.int32) & -0x10000
    around = {float(low.view(torch.float32)), float((low + 0x10000).view(torch.float32))}
    assert set(got.unique().tolist()) <= around
    gap = max(around) - min(around)
    assert abs(got.mean() - value) <= 4 * gap / 2 / 256  # four standard deviations at most


def test_stochastic_rounding_is_a_function_of_seed_step_and_place():
    x = torch.full((512,), 1.001)
    whole = reference.round_stochastically(x, seed=1, step=2, start=0)
    parts = [reference.round_stochastically(x[:256], seed=1, step=2, start=s) for s in (0, 256)]
    assert torch.equal(torch.cat(parts), whole)
    for other in ({"seed": 2, "step": 2}, {"seed": 1, "step": 3}):
        assert not torch.equal(reference.round_stochastically(x, start=0, **other), whole)
