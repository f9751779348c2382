"""The layouts of compressed-tensors are decoded exactly; schemes that are not known are named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbyte.checkpoint.quantized_sources.compressed_tensors import find
from halfbyte.errors import CheckpointError
from tests.checkpoint.quantized_models import fp8, pack_quantized
from tests.checkpoint.quantized_sources.finding import decode, under
from tests.checkpoint.quantized_sources.finding import find as find_in


def packing(form: str, *, targets: Any = ("Linear",), **weights: Any) -> dict[str, Any]:
    """A ``quantization_config`` of one group, as compressed-tensors 0.20 writes it."""
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False, "actorder": None}
    group = {
        "targets": list(targets),
        "weights": scheme | weights,
        "input_activations": None,
        "output_activations": None,
        "format": form,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.20.1",
    }


GROUPS = packing("pack-quantized", strategy="group", group_size=32)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 8), st.sampled_from([32, 64, -1]), st.booleans(), st.integers(1, 70))
def test_packed_integers_are_what_their_codes_say(
    bits: int, group_size: int, symmetric: bool, rows: int
) -> None:
    g = torch.Generator().manual_seed(rows)
    made = pack_quantized(g, rows, 128, bits=bits, group_size=group_size, symmetric=symmetric)
    strategy: dict[str, Any] = {"strategy": "group", "group_size": group_size}
    if group_size == -1:
        strategy = {"strategy": "channel", "group_size": None}
    config = packing("pack-quantized", num_bits=bits, symmetric=symmetric, **strategy)
    assert decode(find, config, under("a", made.tensors)).equal(made.weight.bfloat16())


@pytest.mark.parametrize("symmetric", [True, False])
def test_columns_may_be_in_another_order(symmetric: bool) -> None:
    g = torch.Generator().manual_seed(0)
    index = (torch.arange(96) // 32)[torch.randperm(96, generator=g)]
    made = pack_quantized(g, 16, 96, symmetric=symmetric, index=index)
    config = packing("pack-quantized", strategy="group", group_size=32, symmetric=symmetric)
    assert decode(find, config, under("a", made.tensors)).equal(made.weight.bfloat16())
    made.tensors["weight_g_idx"] += 1
    with pytest.raises(CheckpointError, match="names groups that do not exist"):
        decode(find, config, under("a", made.tensors))
    made = pack_quantized(g, 16, 96, symmetric=symmetric)
    made.tensors["weight_g_idx"] = torch.full((96,), -1, dtype=torch.int32)  # no order given
    assert decode(find, config, under("a", made.tensors)).equal(made.weight.bfloat16())


@pytest.mark.parametrize("form", ["int-quantized", "naive-quantized"])
@pytest.mark.parametrize("scale", [(6, 1), (1,), (6, 2)])
def test_integers_of_8_bits(form: str, scale: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (6, 64), generator=g, dtype=torch.int8)
    scales = (0.01 + torch.rand(scale, generator=g)).bfloat16()
    zeros = torch.randint(-8, 8, scale, generator=g, dtype=torch.int8)
    strategy = {"strategy": "group", "group_size": 32} if scale == (6, 2) else {}
    spread = scales.float().repeat_interleave(32, 1) if scale == (6, 2) else scales.float()
    offset = zeros.float().repeat_interleave(32, 1) if scale == (6, 2) else zeros.float()
    tensors = {"a.weight": codes, "a.weight_scale": scales}
    config = packing(form, num_bits=8, **strategy)
    assert decode(find, config, tensors).equal((codes.float() * spread).bfloat16())
    tensors["a.weight_zero_point"] = zeros
    config = packing(form, num_bits=8, symmetric=False, **strategy)
    assert decode(find, config, tensors).equal(((codes.float() - offset) * spread).bfloat16())
    del tensors["a.weight_zero_point"]
    with pytest.raises(CheckpointError, match=r"a\.weight_zero_point is missing"):
        decode(find, config, tensors)


@pytest.mark.parametrize("block", [(1, 1), (16, 8), None])
def test_floats_of_8_bits(block: tuple[int, int] | None) -> None:
    g = torch.Generator().manual_seed(0)
    made = fp8(g, 20, 30, block=block, name="weight_scale", scale_dtype=torch.bfloat16)
    strategy = {"strategy": "block", "block_structure": list(block)} if block else {}
    config = packing("float-quantized", num_bits=8, type="float", **strategy)
    assert decode(find, config, under("a", made.tensors)).equal(made.weight.bfloat16())


def test_scales_of_8_bits_that_are_powers_of_two() -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 64, generator=g).to(torch.float8_e4m3fn)
    powers = torch.randint(110, 130, (6, 2), generator=g, dtype=torch.uint8)
    spread = (2.0 ** (powers.float() - 127)).repeat_interleave(32, 1)
    tensors = {"a.weight": weight, "a.weight_scale": powers}
    config = packing("mxfp8-quantized", num_bits=8, type="float", strategy="group", group_size=32)
    assert decode(find, config, tensors).equal((weight.float() * spread).bfloat16())


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@pytest.mark.parametrize("form", ["nvfp4-pack-quantized", "mxfp4-pack-quantized"])
def test_floats_of_4_bits(form: str) -> None:
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (6, 64), generator=g)
    values = E2M1[codes % 8] * torch.where(codes < 8, 1, -1)
    tensors = {"a.weight_packed": (codes[:, ::2] + 16 * codes[:, 1::2]).byte()}
    size = 16 if form.startswith("nv") else 32
    if size == 16:
        scales = (1 + 200 * torch.rand(6, 4, generator=g)).to(torch.float8_e4m3fn)
        tensors |= {"a.weight_scale": scales, "a.weight_global_scale": torch.tensor([2000.0])}
        own = scales.float() / 2000
    else:
        powers = torch.randint(110, 130, (6, 2), generator=g, dtype=torch.uint8)
        tensors |= {"a.weight_scale": powers}
        own = 2.0 ** (powers.float() - 127)
    config = packing(form, type="float", strategy="group", group_size=size)
    expected = (values * own.repeat_interleave(size, 1)).bfloat16()
    assert decode(find, config, tensors).equal(expected)
    for key in list(tensors):
        kept = tensors.pop(key)
        if tensors.keys() >= {"a.weight_packed"}:
            with pytest.raises(CheckpointError, match=f"{key} is missing"):
                decode(find, config, tensors)
        tensors[key] = kept


def test_groups_are_found_by_name_by_pattern_and_by_class() -> None:
    g = torch.Generator().manual_seed(0)
    made = {
        "m.0.q_proj": pack_quantized(g, 8, 64, bits=4),
        "m.0.down_proj": pack_quantized(g, 8, 64, bits=8),
        "m.1.down_proj": pack_quantized(g, 8, 64, bits=2),
    }
    tensors = {k: t for name, each in made.items() for k, t in under(name, each.tensors).items()}
    group = {"strategy": "group", "group_size": 32}
    config = packing("pack-quantized", **group)
    for name, bits, targets in (
        ("group_1", 8, ["re:.*down_proj$"]),
        ("group_2", 2, ["m.1.down_proj"]),
    ):
        other = packing("pack-quantized", targets=targets, num_bits=bits, **group)
        config["config_groups"][name] = other["config_groups"]["group_0"]
    config["format"] = "mixed-precision"
    found = {w.key: w.decode(tensors.__getitem__) for w in find_in(find, config, tensors).weights}
    for name, each in made.items():
        assert found[f"{name}.weight"].equal(each.weight.bfloat16())
    del config["config_groups"]["group_0"]
    with pytest.raises(CheckpointError, match=r"no group for m\.0\.q_proj"):
        find_in(find, config, tensors)
    config["config_groups"]["group_1"]["targets"] = ["re:("]
    with pytest.raises(CheckpointError, match=r"'targets': .*valid patterns"):
        find_in(find, config, tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "marlin-24"}, "'format': 'marlin-24'"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "'sparsity_config': 'sparse-24"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "'transform_config'"),
        ({"config_groups": ["W4A16"]}, "'config_groups'"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "'config_groups'"),
        ({"moe_sparsity_config": {"method": "prune"}}, "'moe_sparsity_config'"),
        (packing("pack-quantized", num_bits=9), "'num_bits': 9; supported is 1 to 8"),
        (packing("float-quantized", num_bits=8), "'type': 'int'"),
        (packing("pack-quantized", type="float"), "'type': 'float'"),
        (packing("nvfp4-pack-quantized", num_bits=8), "'num_bits': 8; supported is 4"),
        (packing("pack-quantized", strategy="token"), "'strategy': 'token'"),
        (packing("pack-quantized", strategy="group"), "'group_size': "),
        (packing("pack-quantized", strategy="block", block_structure="2x2"), "'block_structure'"),
        (packing("pack-quantized", targets=[4]), "'targets'"),
        ({"config_groups": {}}, "'config_groups': 'no group for a'"),
        (packing("mixed-precision"), "'format': 'mixed-precision'"),
    ],
)
def test_an_option_that_is_not_understood_is_named(change: dict[str, Any], message: str) -> None:
    made = pack_quantized(torch.Generator().manual_seed(0), 8, 64)
    with pytest.raises(CheckpointError, match=message):
        find_in(find, GROUPS | change, under("a", made.tensors))


def test_what_no_weight_needs_is_left_out() -> None:
    made = pack_quantized(torch.Generator().manual_seed(0), 8, 64)
    tensors = under("a", made.tensors | {"input_scale": torch.ones(1)})
    tensors |= {"self_attn.k_scale": torch.ones(1), "norm.weight": torch.ones(8)}
    found = find_in(find, GROUPS, tensors)
    assert found.ignored == ["a.input_scale", "self_attn.k_scale"]
    activations = packing("int-quantized")
    activations["config_groups"]["group_0"]["weights"] = None
    assert find_in(find, activations, {"a.weight": torch.ones(2, 2)}).weights == []


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no scale": (lambda t: t.pop("weight_scale"), "weight_scale is missing"),
    "no shape": (lambda t: t.pop("weight_shape"), "weight_shape is missing"),
    "no zeros": (lambda t: t.pop("weight_zero_point"), "weight_zero_point is missing"),
    "shape": (
        lambda t: t.update(weight_shape=torch.tensor([8, 60])),
        r"weight_shape is \[8, 60\], the codes are \[8, 64\]",
    ),
    "scales cut": (
        lambda t: t.update(weight_scale=t["weight_scale"][:, 1:].repeat(1, 3)),
        "weight_scale has shape",
    ),
    "zeros cut": (
        lambda t: t.update(weight_zero_point=t["weight_zero_point"][:, 1:]),
        "weight_zero_point has shape",
    ),
    "dtype": (
        lambda t: t.update(weight_packed=t["weight_packed"].long()),
        r"weight_packed is torch\.int64",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_does_not_fit_is_told(case: str) -> None:
    change, message = DAMAGE[case]
    made = pack_quantized(torch.Generator().manual_seed(0), 8, 64, symmetric=False)
    change(made.tensors)
    config = packing("pack-quantized", strategy="group", group_size=32, symmetric=False)
    with pytest.raises(CheckpointError, match=message):
        decode(find, config, under("a", made.tensors))
