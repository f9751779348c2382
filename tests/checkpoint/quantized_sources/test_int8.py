"""Weights of bitsandbytes' 8 bits are decoded as it does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from halfbyte.checkpoint.quantized_sources.int8 import find
from halfbyte.errors import CheckpointError
from tests.checkpoint.quantized_models import int8
from tests.checkpoint.quantized_sources.finding import decode, under
from tests.checkpoint.quantized_sources.finding import find as find_in

# As transformers writes it: with the options of 4 bits, too.
PACKING = {
    "quant_method": "bitsandbytes",
    "load_in_8bit": True,
    "load_in_4bit": False,
    "llm_int8_threshold": 6.0,
    "bnb_4bit_quant_type": "fp4",
}


def test_a_weight_is_what_bitsandbytes_makes_of_it() -> None:
    g = torch.Generator().manual_seed(0)
    codes, scales, _ = bnb.int8_vectorwise_quant(torch.randn(24, 40, generator=g).half())
    tensors = under("a", {"weight": codes, "SCB": scales})
    decoded = decode(find, PACKING, tensors, torch.float32)
    theirs = bnb.int8_vectorwise_dequant(codes, scales)
    # Theirs multiplies by 1 / 127, rounded, where ours divides: two roundings more.
    assert (decoded - theirs).abs().max() <= 2**-22 * theirs.abs().max()


def test_a_weight_is_what_its_numbers_say() -> None:
    made = int8(torch.Generator().manual_seed(0), 24, 40)
    assert decode(find, PACKING, under("a", made.tensors)).equal(made.weight.bfloat16())
    assert find_in(find, PACKING, {}).description == "bitsandbytes (8 bits)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("weight"), "a.weight is missing"),
        (lambda t: t.update(weight=t["weight"].half()), "a.weight is torch.float16"),
        (lambda t: t.update(SCB=t["SCB"][1:]), r"a.SCB has shape \[23\], expected \[24\]"),
        (lambda t: t.update(SCB=t["SCB"].half()), "a.SCB is torch.float16"),
        (lambda t: t.update(weight_format=t["weight_format"] + 1), "weight_format is 1, expected"),
        (lambda t: t.update(weight_format=torch.zeros(2).byte()), "weight_format has shape"),
    ],
)
def test_what_does_not_fit_is_told(
    change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    made = int8(torch.Generator().manual_seed(0), 24, 40)
    change(made.tensors)
    with pytest.raises(CheckpointError, match=message):
        decode(find, PACKING, under("a", made.tensors))


def test_what_is_neither_4_nor_8_bits_is_told() -> None:
    with pytest.raises(CheckpointError, match="'load_in_8bit': False; supported is True"):
        find_in(find, {"quant_method": "bitsandbytes"}, {})
