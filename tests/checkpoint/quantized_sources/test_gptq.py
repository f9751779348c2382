"""Weights of GPTQ are decoded exactly; options and files that do not fit are told by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbyte.checkpoint.quantized_sources.gptq import find
from halfbyte.errors import CheckpointError
from tests.checkpoint.quantized_models import gptq
from tests.checkpoint.quantized_sources.finding import decode, under
from tests.checkpoint.quantized_sources.finding import find as find_in

PACKING = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([32, 64, -1]),
    st.booleans(),
    st.sampled_from([1, 2]),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_a_weight_is_what_its_codes_say(
    bits: int, group_size: int, desc_act: bool, version: int, rows: int, columns: int
) -> None:
    g = torch.Generator().manual_seed(bits)
    made = gptq(
        g,
        32 * rows,
        64 * columns,
        bits=bits,
        group_size=group_size,
        desc_act=desc_act,
        version=version,
    )
    packing = PACKING | {"bits": bits, "group_size": group_size, "desc_act": desc_act}
    if version == 2:
        packing |= {"checkpoint_format": "gptq_v2"}
    assert decode(find, packing, under("a", made.tensors)).equal(made.weight.half())


def test_a_last_group_may_be_smaller_and_an_index_in_order_left_out() -> None:
    made = gptq(torch.Generator().manual_seed(0), 32, 96, group_size=64)
    made.tensors.pop("g_idx")
    packing = PACKING | {"group_size": 64}
    assert decode(find, packing, under("a", made.tensors)).equal(made.weight.half())


def test_layers_may_have_bits_of_their_own() -> None:
    g = torch.Generator().manual_seed(0)
    one, other = gptq(g, 32, 64), gptq(g, 32, 64, bits=8, group_size=64)
    tensors = under("a", one.tensors) | under("b", other.tensors)
    packing = PACKING | {"dynamic": {"+:b": {"bits": 8, "group_size": 64}}}
    found = {
        weight.key: weight.decode(tensors.__getitem__)
        for weight in find_in(find, packing, tensors).weights
    }
    assert found["a.weight"].equal(one.weight.half())
    assert found["b.weight"].equal(other.weight.half())


def test_options_of_the_tools_that_say_nothing_of_the_weights_are_accepted() -> None:
    # As GPTQModel 5.6 writes them, and transformers 5.23.
    packing = PACKING | {
        "lm_head": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "meta": {"quantizer": ["gptqmodel:5.6.12"], "damp_percent": 0.05, "mse": 0.0},
        "pack_impl": "cpu",
        "format": "gptq",
        "dataset": None,
        "a_new_switch": False,
    }
    made = gptq(torch.Generator().manual_seed(0), 32, 64)
    assert decode(find, packing, under("a", made.tensors)).equal(made.weight.half())
    assert find_in(find, packing, {}).description == "GPTQ (4 bits, groups of 32)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "'bits': 5; supported is 2 or 3 or 4 or 8"),
        ({"bits": True}, "'bits': True"),
        ({"group_size": 0}, "'group_size': 0"),
        ({"group_size": "128"}, "'group_size': '128'"),
        ({"pack_dtype": "int16"}, "'pack_dtype': 'int16'; supported is int32"),
        ({"checkpoint_format": "marlin"}, "'checkpoint_format': 'marlin'"),
        ({"is_marlin_format": True}, "'is_marlin_format'"),
        ({"rotation": "hadamard"}, "'rotation': 'hadamard'"),
    ],
)
def test_an_option_that_is_not_understood_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        find_in(find, PACKING | change, {})


def replaced(leaf: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({leaf: change(tensors[leaf])})


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no zeros": (lambda t: t.pop("qzeros"), "a.qzeros is missing"),
    "no scales": (lambda t: t.pop("scales"), "a.scales is missing"),
    "no index": (lambda t: t.pop("g_idx"), "a.g_idx is missing, and with desc_act"),
    "scales cut": (replaced("scales", lambda t: t[:, :-1]), r"a.scales has shape \[2, 31\]"),
    "zeros cut": (replaced("qzeros", lambda t: t[:, :-1]), r"a.qzeros has shape \[2, 3\] for"),
    "other groups": (replaced("qzeros", lambda t: t[:1]), r"a.qzeros has shape \[1, 4\] for"),
    "weight cut": (replaced("qweight", lambda t: t[:-1]), "a.qzeros|a.g_idx"),
    "index short": (replaced("g_idx", lambda t: t[:-1]), "a.g_idx has shape"),
    "index wild": (replaced("g_idx", lambda t: t + 1), "names groups 1 to 2, and there are 2"),
    "index negative": (replaced("g_idx", lambda t: t - 1), "names groups -1 to 0"),
    "floats": (replaced("qweight", lambda t: t.float()), "a.qweight is torch.float32, expected"),
    "a vector": (replaced("qweight", lambda t: t[0]), "expected is a matrix"),
    "whole scales": (replaced("scales", lambda t: t.int()), "a.scales is torch.int32"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_does_not_fit_is_told(case: str) -> None:
    change, message = DAMAGE[case]
    made = gptq(torch.Generator().manual_seed(0), 32, 64, desc_act=True)
    change(made.tensors)
    with pytest.raises(CheckpointError, match=message):
        decode(find, PACKING | {"desc_act": True}, under("a", made.tensors))
