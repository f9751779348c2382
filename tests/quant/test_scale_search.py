"""The search: never a worse block than by the largest magnitude, and bitsandbytes reads it."""

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbyte.errors import WeightError
from halfbyte.quant import QuantizedWeight, dequantize, quantize
from halfbyte.quant.scale_search import search


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def block_errors(weight: Tensor, q: QuantizedWeight, importance: Tensor | None = None) -> Tensor:
    square = (dequantize(q, torch.float32) - weight.float()).double().square()
    if importance is not None:
        square = square * importance
    rest = -square.numel() % q.block_size
    return torch.nn.functional.pad(square.view(-1), (0, rest)).view(-1, q.block_size).sum(1)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_bitsandbytes_decodes_the_same(quant_type: str, double_quant: bool) -> None:
    weight = normal(96, 128)
    q = search(weight, quant_type=quant_type, double_quant=double_quant)  # type: ignore[arg-type]
    code = bnb.get_4bit_type(quant_type, device="cpu")
    common = {"shape": weight.shape, "dtype": torch.float32, "quant_type": quant_type}
    if double_quant:
        nested = bnb.QuantState(
            absmax=q.scale_scales,
            code=bnb.create_dynamic_map(),
            blocksize=256,
            dtype=torch.float32,
        )
        state = bnb.QuantState(
            absmax=q.scale_codes,
            code=code,
            blocksize=64,
            offset=q.scale_offset,
            state2=nested,
            **common,
        )
    else:
        state = bnb.QuantState(absmax=q.scales, code=code, blocksize=64, **common)
    theirs = bnb.dequantize_4bit(q.codes.view(-1, 1), state)
    assert torch.equal(dequantize(q), theirs)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(1, 1), (3, 7), (5, 64), (9, 100), (2, 1536)]),
    block_size=st.sampled_from([32, 64, 256]),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    weighted=st.booleans(),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 2**32),
)
def test_no_block_is_worse_than_by_its_largest(
    shape: tuple[int, int],
    block_size: int,
    quant_type: str,
    weighted: bool,
    exponent: int,
    seed: int,
) -> None:
    weight = normal(*shape, seed=seed) * 10.0**exponent
    importance = normal(shape[1], seed=seed + 1).square() + 0.01 if weighted else None
    how = {"quant_type": quant_type, "block_size": block_size, "double_quant": False}
    found = block_errors(weight, search(weight, importance=importance, **how), importance)
    plain = block_errors(weight, quantize(weight, **how), importance)
    assert (found <= plain * (1 + 1e-5)).all()


def test_the_error_is_that_much_smaller() -> None:
    weight, importance = normal(512, 576), normal(576, seed=1).square()
    plain = block_errors(weight, quantize(weight)).sum()
    assert block_errors(weight, search(weight)).sum() < 0.9 * plain
    # Weighted, each of the two is better at what it was asked for.
    weighted = search(weight, importance=importance)
    by_weight = block_errors(weight, weighted, importance).sum()
    assert by_weight < 0.95 * block_errors(weight, search(weight), importance).sum()
    assert by_weight < 0.85 * block_errors(weight, quantize(weight), importance).sum()
    assert block_errors(weight, search(weight)).sum() < block_errors(weight, weighted).sum()


def test_codes_are_the_nearest_for_the_scale_as_decoded() -> None:
    weight = normal(64, 64)
    q = search(weight)
    levels = bnb.get_4bit_type("nf4", device="cpu")
    values = levels * q.block_scales()[:, None]
    nearest = (weight.view(-1, 64, 1) - values[:, None]).abs().amin(-1)
    error = (weight - dequantize(q)).abs().view(-1, 64)
    torch.testing.assert_close(error, nearest)


def test_what_the_levels_hold_exactly_is_found_again() -> None:
    q = quantize(normal(64, 64), double_quant=False)
    weight = dequantize(q)
    torch.testing.assert_close(dequantize(search(weight, double_quant=False)), weight)


def test_zeros_stay_zeros() -> None:
    weight = normal(4, 128)
    weight[1] = 0
    for double_quant in (True, False):
        assert not dequantize(search(weight, double_quant=double_quant))[1].any()
    assert not dequantize(search(torch.zeros(3, 100))).any()
    assert dequantize(search(torch.zeros(0, 64))).shape == (0, 64)


def test_columns_the_text_never_moved_are_kept() -> None:
    weight, importance = normal(64, 128), torch.zeros(128)
    importance[:64] = 1
    error = (dequantize(search(weight, importance=importance)) - weight).square().mean(0)
    assert error[64:].mean() < 0.01


def test_a_bfloat16_weight_is_searched_as_its_own_numbers() -> None:
    weight = normal(8, 128).bfloat16()
    q = search(weight)
    assert q.dtype == torch.bfloat16
    assert torch.equal(q.codes, search(weight.float()).codes)


def test_bad_input_is_refused() -> None:
    with pytest.raises(WeightError, match=r"'w'.*NaN"):
        search(torch.tensor([[1.0, torch.nan]]), name="w")
    with pytest.raises(ValueError, match=r"each of 64 columns.*\(32,\)"):
        search(normal(2, 64), importance=torch.ones(32))
    for bad in (-1.0, torch.inf):
        with pytest.raises(ValueError, match="finite and not negative"):
            search(normal(2, 64), importance=torch.full((64,), bad))
