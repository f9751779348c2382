"""Weights of HQQ are decoded exactly: packed in parts, grouped along either axis."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbyte.checkpoint.quantized_sources.hqq import find
from halfbyte.errors import CheckpointError
from tests.checkpoint.quantized_models import hqq
from tests.checkpoint.quantized_sources.finding import decode, under
from tests.checkpoint.quantized_sources.finding import find as find_in

PACKING = {
    "quant_method": "hqq",
    "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64, "axis": 1}},
    "skip_modules": ["lm_head"],
}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from([1, 2, 3, 4, 8]),
    st.sampled_from([0, 1]),
    st.sampled_from([8, 16, 32]),
    st.integers(1, 5),
)
def test_a_weight_is_what_its_codes_say(bits: int, axis: int, group_size: int, rows: int) -> None:
    g = torch.Generator().manual_seed(rows)
    made = hqq(g, 8 * rows, 64, bits=bits, axis=axis, group_size=group_size)
    assert decode(find, PACKING, under("a", made.tensors)).equal(made.weight.half())
    found = find_in(find, PACKING, under("a", made.tensors))
    assert set(found.weights[0].members) == under("a", made.tensors).keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("zero"), "a.zero is missing"),
        (lambda t: t.pop("shape"), "a.shape is missing"),
        (lambda t: t.update(nbits=torch.tensor(1.58)), "a.nbits is torch.float32"),
        (lambda t: t.update(nbits=torch.tensor(5)), "a.nbits is 5"),
        (lambda t: t.update(axis=torch.tensor(2)), "an axis of 2"),
        (lambda t: t.update(shape=torch.tensor([16, -64])), "a shape of"),
        (lambda t: t.update(shape=torch.tensor([0, 0])), "a shape of"),
        (lambda t: t.update(shape=torch.ones(3).long()), "expected are one or two numbers"),
        (
            lambda t: t.update(shape=torch.tensor([16, 32])),
            r"a.W_q has shape \[32, 16\] for 4 bits",
        ),
        (lambda t: t.update(axis=torch.tensor(0)), r"a.scale has shape \[64, 1\]"),
        (lambda t: t.update(W_q=t["W_q"].half()), "a.W_q is torch.float16"),
        (lambda t: t.update(scale=t["scale"][1:]), "a.scale has shape"),
    ],
)
def test_what_does_not_fit_is_told(
    change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    made = hqq(torch.Generator().manual_seed(0), 16, 64, group_size=16)
    change(made.tensors)
    with pytest.raises(CheckpointError, match=message):
        decode(find, PACKING, under("a", made.tensors))
