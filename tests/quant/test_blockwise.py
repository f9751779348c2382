"""The one algorithm and its tables: against brute force, and against bitsandbytes' 8-bit codes."""

import hashlib

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from halfbyte.quant import blockwise
from halfbyte.quant.blockwise import DYNAMIC_SIGNED, DYNAMIC_UNSIGNED, FP4_LEVELS, NF4_LEVELS

reproducible = settings(derandomize=True, deadline=None)
finite_floats = st.floats(allow_nan=False, allow_infinity=False, width=32)


@pytest.mark.parametrize(
    ("table", "digest"),
    [
        (DYNAMIC_SIGNED, "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"),
        (DYNAMIC_UNSIGNED, "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398"),
    ],
)
def test_dynamic_tables_are_the_bytes_checkpoints_hold(table, digest):
    assert hashlib.sha256(table.numpy().tobytes()).hexdigest() == digest


@pytest.mark.parametrize(("levels", "name"), [(NF4_LEVELS, "nf4"), (FP4_LEVELS, "fp4")])
def test_weight_tables_are_those_of_bitsandbytes(levels, name):
    assert torch.equal(levels, bnb.get_4bit_type(name, device="cpu"))
    assert not levels.signbit()[levels == 0].any()


@pytest.mark.parametrize("table", [NF4_LEVELS, FP4_LEVELS.sort().values, DYNAMIC_SIGNED])
@reproducible
@given(data=st.data())
def test_nearest_is_nearest(table, data):
    """No other level is nearer, beyond the rounding of the division."""
    values = torch.from_numpy(
        data.draw(arrays(np.float32, (3, 16), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
    )
    scales = blockwise.block_maxima(values)
    ranks = blockwise.nearest(values, scales, blockwise.midpoints(table))
    scaled = values.double() / scales.double().clamp(min=1e-38)[:, None]
    distance = (scaled[..., None] - table.double()).abs()
    chosen = distance.gather(-1, ranks.long()[..., None])[..., 0]
    assert (chosen <= distance.amin(-1) + 3e-7).all()


@pytest.mark.parametrize("table", [NF4_LEVELS, FP4_LEVELS.sort().values])
def test_a_value_between_two_levels_takes_the_lower(table):
    bounds = blockwise.midpoints(table)
    ranks = blockwise.nearest(bounds[None], torch.ones(1), bounds)
    assert ranks[0].tolist() == list(range(15))
    above = torch.nextafter(bounds, torch.tensor(2.0))
    assert blockwise.nearest(above[None], torch.ones(1), bounds)[0].tolist() == list(range(1, 16))


@pytest.mark.parametrize("count", [1, 255, 256, 257, 5000])
@pytest.mark.parametrize("magnitude", [1.0, 1e-3, 1e30, 1e-30, 1e-41])
def test_dynamic_codes_equal_those_of_bitsandbytes(count, magnitude):
    values = torch.randn(count, generator=torch.Generator().manual_seed(count)) * magnitude
    values[::7] = 0
    codes, scales = blockwise.encode_dynamic(values, 256)
    their_codes, state = bnb.quantize_blockwise(values, blocksize=256)
    assert torch.equal(codes, their_codes)
    assert torch.equal(scales, state.absmax)
    decoded = blockwise.decode_dynamic(codes, scales, 256)
    theirs = bnb.dequantize_blockwise(their_codes, state)
    assert torch.equal(decoded.view(torch.int32), theirs.view(torch.int32))


@reproducible
@given(arrays(np.float32, st.integers(1, 600), elements=finite_floats))
def test_dynamic_codes_equal_those_of_bitsandbytes_for_any_values(values):
    values = torch.from_numpy(values)
    codes, scales = blockwise.encode_dynamic(values, 256)
    their_codes, state = bnb.quantize_blockwise(values, blocksize=256)
    assert torch.equal(codes, their_codes)
    assert torch.equal(scales, state.absmax)


@reproducible
@given(arrays(np.float32, st.integers(1, 600), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_dynamic_error_is_half_a_step_and_the_grid(values):
    """Half the widest gap of the table, 0.0141, and half a step of the 65536 points."""
    values = torch.from_numpy(values)
    codes, scales = blockwise.encode_dynamic(values, 256)
    decoded = blockwise.decode_dynamic(codes, scales, 256)
    widest = DYNAMIC_SIGNED.diff().max()
    bound = (widest / 2 + 1 / 65535) * scales.repeat_interleave(256)[: len(values)]
    assert ((decoded - values).abs() <= bound * (1 + 1e-6) + 1e-37).all()


def test_zero_has_a_code_of_its_own_only_where_all_is_zero():
    codes, scales = blockwise.encode_dynamic(torch.tensor([0.0, 1.0]), 256)
    assert codes.tolist() == [131, 255]
    codes, scales = blockwise.encode_dynamic(torch.zeros(300), 256)
    assert not codes.any()
    assert not scales.any()
    assert not blockwise.decode_dynamic(codes, scales, 256).any()
