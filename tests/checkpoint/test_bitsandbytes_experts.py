"""Packed experts in a checkpoint: every byte comes back, and each row is bitsandbytes' weight."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.parametrize import (
    replace_parameter_4bit,
    replace_parameter_4bit_prequantized,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from halfbyte.checkpoint.base_model import load_base, open_base
from halfbyte.checkpoint.bitsandbytes import write_quantized
from halfbyte.checkpoint.bitsandbytes_experts import (
    PackedExperts,
    encode_common,
    encode_expert,
    plan_experts,
)
from halfbyte.checkpoint.bitsandbytes_keys import decode_keys, encode_keys
from halfbyte.checkpoint.safetensors_file import SafetensorsFile, write_model
from halfbyte.errors import CheckpointError
from halfbyte.linear.experts import expert_linears
from halfbyte.models.build import BaseRecipe
from halfbyte.quant import BLOCK_SIZES, QuantizedWeight, dequantize, quantize
from tests.checkpoint.families import tiny_model
from tests.tiny import tiny_tokenizer

NAME = "model.layers.0.mlp.experts.down_proj"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


def random_experts(count: int, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(count + rows + columns)
    scale = torch.arange(1.0, count + 1).view(-1, 1, 1)  # an offset for each
    return torch.randn(count, rows, columns, generator=generator) * scale


def write(directory: Path, packed: list[QuantizedWeight]) -> Path:
    def rows() -> Any:
        for expert, q in reversed(list(enumerate(packed))):
            yield from encode_expert(NAME, expert, q)
        yield from encode_common(NAME, packed[0], len(packed)).items()

    write_model(directory, plan_experts(NAME, packed[0], len(packed)), rows())
    return directory / "model.safetensors"


def read(path: Path, count: int) -> PackedExperts:
    file = SafetensorsFile(path)
    return PackedExperts(NAME, count, file.entries, file.read)


def assert_same(one: QuantizedWeight, other: QuantizedWeight) -> None:
    described = [(q.shape, q.dtype, q.quant_type, q.block_size) for q in (one, other)]
    assert described[0] == described[1]
    theirs = other.tensors()
    assert one.tensors().keys() == theirs.keys()
    assert all(tensor.equal(theirs[name]) for name, tensor in one.tensors().items())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_what_is_written_comes_back_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    recipe: dict[str, Any] = data.draw(
        st.fixed_dictionaries(
            {
                "quant_type": st.sampled_from(["nf4", "fp4"]),
                "block_size": st.sampled_from(BLOCK_SIZES),
                "double_quant": st.booleans(),
            }
        )
    )
    sizes = [data.draw(st.integers(1, most)) for most in (4, 20, 40)]
    packed = [quantize(matrix, **recipe) for matrix in random_experts(*sizes)]
    found = read(write(tmp_path_factory.mktemp("e"), packed), sizes[0])
    for expert, q in enumerate(packed):
        assert_same(found.weight(expert), q)


def test_each_row_is_the_weight_of_a_linear_of_bitsandbytes(tmp_path: Path) -> None:
    packed = [quantize(matrix) for matrix in random_experts(3, 64, 128)]
    tensors = load_file(write(tmp_path, packed))
    for expert, q in enumerate(packed):
        state = json.loads(bytes(tensors[STATE].tolist()))
        state["shape"] = state["shape"][1:]
        state["nested_offset"] = tensors[f"{NAME}.nested_offset"][expert].item()
        own = {
            key: tensor[expert] if len(tensor) == 3 else tensor for key, tensor in tensors.items()
        }
        own[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        del own[f"{NAME}.nested_offset"]
        assert_same(decode_keys(NAME, own), q)
        expected = encode_keys(NAME, q)
        assert own.keys() == expected.keys()
        assert all(own[key].flatten().equal(value.flatten()) for key, value in expected.items())


def test_with_plain_scales_it_is_bitsandbytes_packed_parameter(tmp_path: Path) -> None:
    experts = random_experts(3, 64, 128)
    tensors = load_file(write(tmp_path, [quantize(e, double_quant=False) for e in experts]))
    theirs = nn.ParameterDict({"w": nn.Parameter(experts.clone())})
    replace_parameter_4bit(theirs, "w", blocksize=64)
    state = theirs.state_dict()
    suffixes = {"absmax", "quant_map", "quant_state.bitsandbytes__nf4"}
    assert state.keys() == {"w", *(f"w.{suffix}" for suffix in suffixes)}
    for key, value in state.items():
        assert tensors[NAME + key.removeprefix("w")].flatten().equal(value.flatten()), key
    loaded = nn.Module()
    loaded.w = nn.Parameter(tensors[NAME].view(-1, 1), requires_grad=False)
    own = {suffix: tensors[f"{NAME}.{suffix}"].flatten() for suffix in suffixes}
    replace_parameter_4bit_prequantized(loaded, "w", own, torch.device("cpu"))
    decoded = torch.stack([dequantize(quantize(e, double_quant=False)) for e in experts])
    assert torch.equal(loaded.w, decoded)


def state_of(tensors: dict[str, Tensor], **changes: Any) -> None:
    fields = json.loads(bytes(tensors[STATE].tolist())) | changes
    tensors[STATE] = torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no state": (lambda t: t.pop(STATE), "0 quant_state"),
    "no offset": (lambda t: t.pop(f"{NAME}.nested_offset"), "nested_offset is missing"),
    "no levels": (lambda t: t.pop(f"{NAME}.quant_map"), "quant_map is missing"),
    "levels": (lambda t: t[f"{NAME}.quant_map"].mul_(1.01), "holds other levels"),
    "an expert less": (lambda t: t.update({NAME: t[NAME][:2].clone()}), r"expected is .*\[3, "),
    "scales plain": (
        lambda t: t.update({f"{NAME}.absmax": t[f"{NAME}.absmax"].float()}),
        "absmax is torch.float32",
    ),
    "other experts": (lambda t: state_of(t, shape=[4, 64, 128]), "of 4 experts"),
    "a fraction of experts": (lambda t: state_of(t, shape=[3.0, 64, 128]), "of 3.0 experts"),
    "a linear": (lambda t: state_of(t, shape=[]), "cannot be read"),
    "shape": (lambda t: state_of(t, shape=[3, 64, 64]), "expected is torch.uint8"),
    "shape huge": (lambda t: state_of(t, shape=[3, 2**62, 2**62]), "cannot be read"),
    "dtype": (lambda t: state_of(t, dtype="load"), "cannot be read"),
    "no JSON": (lambda t: t[STATE].zero_(), "cannot be read"),
    "a list": (
        lambda t: t.update({STATE: torch.tensor(list(b"[1, 2]"), dtype=torch.uint8)}),
        "cannot be read",
    ),
    "scales not finite": (
        lambda t: t[f"{NAME}.nested_absmax"][1].fill_(torch.nan),
        "row 1 of .*nested_absmax contains NaN",
    ),
    "offset not finite": (
        lambda t: t[f"{NAME}.nested_offset"][2].fill_(torch.inf),
        "row 2 of .*nested_offset contains NaN",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_told_with_the_name(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path, [quantize(matrix) for matrix in random_experts(3, 64, 128)])
    tensors = load_file(path)
    change, message = DAMAGE[damage]
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=f"{NAME} is not a 4-bit weight.*{message}"):
        [read(path, 3).weight(expert) for expert in range(3)]


json_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from(["nf4", "fp4", "float32", "load", ""]),
    st.lists(st.integers(-1, 2**40) | st.floats(), max_size=4),
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.sampled_from(["quant_type", "blocksize", "dtype", "shape", "nested_blocksize"]), json_values
)
def test_any_field_of_the_state_may_lie(
    tmp_path_factory: pytest.TempPathFactory, field: str, value: Any
) -> None:
    path = write(tmp_path_factory.mktemp("e"), [quantize(e) for e in random_experts(2, 4, 64)])
    tensors = load_file(path)
    state_of(tensors, **{field: value})
    save_file(tensors, path)
    try:
        q = read(path, 2).weight(1)
    except CheckpointError as error:
        assert NAME in str(error)  # noqa: PT017
    else:
        assert q.numel == 256
        assert dequantize(q).isfinite().all()


@pytest.fixture(scope="module")
def moe_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("moe")
    tiny_model("qwen3_moe", num_experts=3, moe_intermediate_size=48).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_packed_model_holds_the_experts_that_loading_packs(
    tmp_path: Path, moe_dir: Path, caplog: pytest.LogCaptureFixture, *, double_quant: bool
) -> None:
    recipe = BaseRecipe(double_quant=double_quant)
    read: list[tuple[int, int]] = []
    with caplog.at_level(logging.WARNING, logger="halfbyte"):
        out = write_quantized(
            moe_dir,
            tmp_path / "out",
            recipe,
            shard_bytes=20_000,
            progress=lambda *done: read.append(done),
        )
    assert "experts are packed too" in caplog.text
    assert read[-1][0] == read[-1][1]
    source = open_base(out)
    assert sum(p.packed for p in source.parameters if p.name in source.experts) == 4
    read.clear()
    again = load_base(source, BaseRecipe(), progress=lambda *done: read.append(done))
    assert read[-1][0] == read[-1][1]
    ours = expert_linears(load_base(moe_dir, recipe).model)
    theirs = expert_linears(again.model)
    assert ours.keys() == theirs.keys()
    for path, experts in ours.items():
        for one, other in zip(experts.packed, theirs[path].packed, strict=True):
            assert_same(one, other)
        decoded = source.tensor(path)
        assert isinstance(decoded, Tensor)
        assert decoded.equal(experts.decode(0, 3, torch.float32))
    plain = load_base(out, BaseRecipe("none")).model
    for path, experts in expert_linears(plain).items():
        assert torch.equal(experts.decode(0, 3, torch.float32), source.tensor(path))  # type: ignore[arg-type]


def test_transformers_does_not_load_packed_experts_in_silence(
    tmp_path: Path, moe_dir: Path
) -> None:
    out = write_quantized(moe_dir, tmp_path / "out", BaseRecipe())
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(out)
