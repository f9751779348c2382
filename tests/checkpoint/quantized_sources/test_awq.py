"""Weights of AWQ are decoded exactly in each of its layouts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbyte.checkpoint.quantized_sources.awq import find
from halfbyte.errors import CheckpointError
from tests.checkpoint.quantized_models import awq
from tests.checkpoint.quantized_sources.finding import decode, under
from tests.checkpoint.quantized_sources.finding import find as find_in

PACKING = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}


@pytest.mark.parametrize("version", ["gemm", "gemv", "gemv_fast"])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("rows", [8, 40])
def test_a_weight_is_what_its_codes_say(version: str, group_size: int, rows: int) -> None:
    made = awq(
        torch.Generator().manual_seed(rows), rows, 384, version=version, group_size=group_size
    )
    packing = PACKING | {"group_size": group_size, "version": version.upper()}
    assert decode(find, packing, under("a", made.tensors)).equal(made.weight.half())


def test_options_have_two_spellings() -> None:
    made = awq(torch.Generator().manual_seed(0), 8, 64)
    # AutoAWQ's own, and transformers'.
    for packing in (
        {"w_bit": 4, "q_group_size": 32, "version": "GEMM", "modules_to_not_convert": None},
        PACKING | {"format": "gemm", "backend": "auto", "modules_to_not_convert": ["visual"]},
    ):
        assert decode(find, packing, under("a", made.tensors)).equal(made.weight.half())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "'bits': 3"),
        ({"zero_point": False}, "'zero_point': False"),
        ({"version": "marlin"}, "'version': 'marlin'; supported is gemm or gemv or gemv_fast"),
        ({"backend": "llm-awq"}, "'backend': 'llm-awq'"),
        ({"group_size": None, "q_group_size": 1.5}, "'group_size': 1.5"),
        ({"unheard_of": 1}, "'unheard_of': 1"),
    ],
)
def test_an_option_that_is_not_understood_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        find_in(find, PACKING | change, {})


def replaced(leaf: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({leaf: change(tensors[leaf])})


@pytest.mark.parametrize("version", ["gemm", "gemv", "gemv_fast"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("qzeros"), "a.qzeros is missing"),
        (lambda t: t.pop("scales"), "a.scales is missing"),
        (replaced("scales", lambda t: t[:-1]), "a.scales has shape"),
        (replaced("qzeros", lambda t: t[:, :-1]), "a.qzeros has shape"),
        (replaced("qweight", lambda t: t.long()), "a.qweight is torch.int64"),
        (replaced("qweight", lambda t: t[0]), "expected is a matrix"),
    ],
)
def test_what_does_not_fit_is_told(
    version: str, change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    made = awq(torch.Generator().manual_seed(0), 8, 64, version=version)
    change(made.tensors)
    with pytest.raises(CheckpointError, match=message):
        decode(find, PACKING | {"version": version}, under("a", made.tensors))


def test_groups_divide_the_inputs() -> None:
    made = awq(torch.Generator().manual_seed(0), 8, 64)
    with pytest.raises(CheckpointError, match="64 inputs, which groups of 48 do not divide"):
        decode(find, PACKING | {"group_size": 48}, under("a", made.tensors))
