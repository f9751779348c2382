"""FP8 is decoded as transformers does it, in blocks, rows or whole."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight

from halfbyte.checkpoint.quantized_sources.fp8 import find
from halfbyte.errors import CheckpointError
from tests.checkpoint.quantized_models import fp8
from tests.checkpoint.quantized_sources.finding import decode, under
from tests.checkpoint.quantized_sources.finding import find as find_in

PACKING = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def made(*shape: int, scales: tuple[int, ...]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=g).to(torch.float8_e4m3fn)
    return {"a.weight": weight, "a.weight_scale_inv": 0.1 + torch.rand(scales, generator=g)}


@pytest.mark.parametrize("shape", [(256, 128), (200, 300), (7, 129), (3, 130, 140)])
def test_blocks_are_those_of_transformers_also_the_last_ones(shape: tuple[int, ...]) -> None:
    grid = (*shape[:-2], *(-(-n // 128) for n in shape[-2:]))
    tensors = made(*shape, scales=grid)
    weight, scales = tensors.values()
    expected = _dequantize_fp8_weight(weight, scales, [128, 128], torch.float32)
    assert decode(find, PACKING, tensors).equal(expected.bfloat16())
    assert decode(find, PACKING, tensors, torch.float32).equal(expected)
    if not any(n % 128 for n in shape):
        theirs = Fp8Dequantize(None)._dequantize_one(weight, scales, torch.bfloat16)
        assert decode(find, PACKING, tensors).equal(theirs)


@pytest.mark.parametrize("block", [(128, 128), (16, 8), None])
@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_is_what_its_numbers_say(
    block: tuple[int, int] | None, name: str, dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(0)
    quantized = fp8(g, 20, 30, block=block, name=name, scale_dtype=dtype)
    packing = PACKING | {"weight_block_size": list(block) if block else None}
    tensors = under("a", quantized.tensors)
    assert decode(find, packing, tensors).equal(quantized.weight.bfloat16())


def test_rows_and_experts_have_scales_of_their_own() -> None:
    # fbgemm_fp8: a scale for each row; of the experts of Llama 4, for each output, transposed.
    packing = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
    rows = made(6, 4, scales=(6, 1))
    rows["a.weight_scale"] = rows.pop("a.weight_scale_inv")
    expected = rows["a.weight"].float() * rows["a.weight_scale"]
    assert decode(find, packing, rows, torch.float32).equal(expected)
    rows["a.weight_scale"] = rows["a.weight_scale"][:, 0]
    assert decode(find, packing, rows, torch.float32).equal(expected)
    experts = made(3, 4, 6, scales=(3, 1, 6))
    stacked = {
        "experts.gate_up_proj": experts["a.weight"],
        "experts.gate_up_proj_scale": experts["a.weight_scale_inv"],
    }
    expected = experts["a.weight"].float() * experts["a.weight_scale_inv"]
    assert decode(find, packing, stacked, torch.float32).equal(expected)
    stacked["experts.gate_up_proj_scale"] = torch.tensor([1.0, 2.0, 3.0])  # one for each expert
    expected = experts["a.weight"].float() * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    assert decode(find, packing, stacked, torch.float32).equal(expected)


def test_scales_may_be_powers_of_two() -> None:
    tensors = made(256, 128, scales=(2, 1))
    codes = torch.tensor([[120], [130]], dtype=torch.uint8)
    theirs = Fp8Dequantize(None)._dequantize_one(tensors["a.weight"], codes, torch.bfloat16)
    for scales in (codes, codes.view(torch.float8_e8m0fnu)):
        tensors["a.weight_scale_inv"] = scales
        assert decode(find, PACKING | {"scale_fmt": "ue8m0"}, tensors).equal(theirs)


def test_scales_of_activations_and_of_the_cache_are_left_out() -> None:
    tensors = made(4, 4, scales=())
    extra = ["a.input_scale", "a.activation_scale", "self_attn.k_scale", "self_attn.v_scale"]
    others = dict.fromkeys(extra, torch.ones(()))
    packing = PACKING | {"weight_block_size": None, "activation_scheme": "static"}
    found = find_in(find, packing, tensors | others | {"a.bias": torch.ones(4)})
    assert [weight.key for weight in found.weights] == ["a.weight"]
    assert found.ignored == extra


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fmt": "e5m2"}, "'fmt': 'e5m2'"),
        ({"expert_dtype": "fp4"}, "'expert_dtype': 'fp4'"),
        ({"activation_scheme": "other"}, "'activation_scheme': 'other'"),
        ({"weight_block_size": [0, 128]}, "'weight_block_size'"),
        ({"weight_block_size": 128}, "'weight_block_size': 128"),
        ({"weight_block_size": [True, 2]}, "'weight_block_size'"),
        ({"pruned": "2:4"}, "'pruned': '2:4'"),
    ],
)
def test_an_option_that_is_not_understood_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        find_in(find, PACKING | change, {})


@pytest.mark.parametrize("scales", [(2, 2), (1,), (3, 2, 2), (2, 1, 1), (4, 4), (0, 2), (256, 1)])
def test_scales_that_do_not_fit_are_told(scales: tuple[int, ...]) -> None:
    tensors = made(200, 300, scales=scales)
    if scales == (1,):
        assert decode(find, PACKING, tensors).shape == (200, 300)  # one for all
        return
    with pytest.raises(CheckpointError, match=r"a\.weight_scale_inv has shape"):
        decode(find, PACKING, tensors)


def test_a_weight_without_scales_is_told() -> None:
    tensors = made(4, 4, scales=())
    del tensors["a.weight_scale_inv"]
    with pytest.raises(CheckpointError, match=r"a\.weight_scale is missing"):
        decode(find, PACKING, tensors)
    tensors["a.weight_scale"] = torch.ones((), dtype=torch.int32)
    with pytest.raises(CheckpointError, match=r"a.weight_scale is torch.int32, expected"):
        decode(find, PACKING, tensors)
