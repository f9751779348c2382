"""The 4-bit layout: bitsandbytes' keys byte for byte, and checkpoints transformers loads."""

import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from halfbyte.checkpoint.base_model import load_base, open_base
from halfbyte.checkpoint.bitsandbytes import write_quantized
from halfbyte.checkpoint.bitsandbytes_keys import (
    decode_keys,
    encode_keys,
    packed_weights,
    plan_keys,
)
from halfbyte.checkpoint.safetensors_file import write_model, write_safetensors
from halfbyte.errors import CheckpointError, ConfigError, OutputError
from halfbyte.models.build import BaseRecipe, frozen_linears
from halfbyte.quant import BLOCK_SIZES, QuantizedWeight, dequantize, quantize
from tests.checkpoint.gguf_models import write_gguf
from tests.tiny import write_tiny_model

PROMPT = torch.arange(3, 43)[None]
NAME = "model.layers.0.mlp.up_proj.weight"

recipes = st.builds(
    dict,
    quant_type=st.sampled_from(["nf4", "fp4"]),
    block_size=st.sampled_from(BLOCK_SIZES),
    double_quant=st.booleans(),
)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(PROMPT).logits  # type: ignore[no-any-return]


def weight(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    return torch.randn(rows, columns, generator=generator).to(dtype)


def their_keys(
    w: Tensor,
    *,
    quant_type: str,
    block_size: int,
    double_quant: bool,
    storage: torch.dtype = torch.uint8,
) -> dict[str, Tensor]:
    codes, state = bnb.quantize_4bit(
        w,
        blocksize=block_size,
        compress_statistics=double_quant,
        quant_type=quant_type,
        quant_storage=storage,
    )
    return {NAME: codes} | {f"{NAME}.{k}": t for k, t in state.as_dict(packed=True).items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    for key, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[key].dtype, other[key].shape), key
        assert tensor.equal(other[key]), key


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    recipes,
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_keys_are_bitsandbytes_own_both_ways(
    recipe: dict[str, Any], rows: int, columns: int, dtype: torch.dtype
) -> None:
    w = weight(rows, columns, dtype)
    theirs = their_keys(w, **recipe)
    ours = encode_keys(NAME, quantize(w, **recipe))
    assert_same(ours, theirs)
    q = decode_keys(NAME, theirs)
    assert (q.shape, q.dtype, q.quant_type) == ((rows, columns), dtype, recipe["quant_type"])
    assert (q.block_size, q.double_quant) == (recipe["block_size"], recipe["double_quant"])
    assert_same(encode_keys(NAME, q), theirs)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(recipes, st.integers(1, 9), st.integers(1, 9))
def test_the_plan_has_room_for_the_keys(recipe: dict[str, Any], rows: int, columns: int) -> None:
    keys = encode_keys(NAME, quantize(weight(rows, columns, torch.float32), **recipe))
    plan = plan_keys(NAME, quantize(torch.zeros(rows, columns), **recipe))
    assert [planned.name for planned in plan] == list(keys)
    for planned in plan:
        fits = planned.shape >= keys[planned.name].shape
        assert fits if planned.flexible else planned.shape == keys[planned.name].shape


@settings(max_examples=40, deadline=None, derandomize=True)
@given(recipes, st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]))
def test_codes_stored_as_another_dtype_are_the_same_bytes(
    recipe: dict[str, Any], storage: torch.dtype
) -> None:
    w = weight(16, 96, torch.bfloat16)
    keys = their_keys(w, **recipe, storage=storage)
    assert keys[NAME].dtype == storage
    assert_same(encode_keys(NAME, decode_keys(NAME, keys)), their_keys(w, **recipe))


def test_keys_are_told_apart_by_their_weight() -> None:
    a = {
        f"a.{key}": t
        for key, t in their_keys(
            torch.ones(2, 64), quant_type="nf4", block_size=64, double_quant=True
        ).items()
    }
    others = {"a.model.layers.0.mlp.up_proj.bias": torch.ones(2), "b.weight": torch.ones(2)}
    assert packed_weights(a | others) == {f"a.{NAME}": list(a)}


def state_of(keys: dict[str, Tensor], **changes: Any) -> None:
    key = next(key for key in keys if "quant_state" in key)
    fields = json.loads(bytes(keys[key].tolist())) | changes
    fields = {name: value for name, value in fields.items() if value is not ...}
    keys[key] = torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no state": (lambda k: k.pop(f"{NAME}.quant_state.bitsandbytes__nf4"), "0 quant_state"),
    "no scales": (lambda k: k.pop(f"{NAME}.absmax"), "absmax is missing"),
    "no nested": (lambda k: k.pop(f"{NAME}.nested_absmax"), "nested_absmax is missing"),
    "codes cut": (lambda k: k.update({NAME: k[NAME][:-1]}), "expected is torch.uint8"),
    "scales cut": (lambda k: k.update({f"{NAME}.absmax": torch.zeros(3).byte()}), "absmax is"),
    "scales plain": (lambda k: k.update({f"{NAME}.absmax": torch.zeros(16)}), "absmax is torch.f"),
    "levels": (lambda k: k[f"{NAME}.quant_map"].mul_(1.01), "quant_map holds other levels"),
    "shape": (lambda k: state_of(k, shape=[2, 3]), "expected is torch.uint8"),
    "shape huge": (lambda k: state_of(k, shape=[2**62, 2**62]), "cannot be read"),
    "shape large": (lambda k: state_of(k, shape=[2**39, 2**39]), "cannot be read"),
    "shape larger than the file": (lambda k: state_of(k, shape=[2**20, 2**20]), "is torch.uint8"),
    "shape a fraction": (lambda k: state_of(k, shape=[16.0, 64]), "cannot be read"),
    "shape a number": (lambda k: state_of(k, shape=1024), "cannot be read"),
    "dtype of 8 bits": (lambda k: state_of(k, dtype="float8_e4m3fn"), "cannot be read"),
    "block a fraction": (lambda k: state_of(k, blocksize=64.0), "cannot be read"),
    "offset no number": (lambda k: state_of(k, nested_offset="none"), "cannot be read"),
    "offset infinite": (lambda k: state_of(k, nested_offset=float("inf")), "cannot be read"),
    "offset huge": (lambda k: state_of(k, nested_offset=10**400), "cannot be read"),
    "scales not finite": (
        lambda k: k[f"{NAME}.nested_absmax"].fill_(torch.inf),
        "nested_absmax contains NaN or infinity",
    ),
    "scales in 16 bits": (
        lambda k: k.update({f"{NAME}.nested_absmax": k[f"{NAME}.nested_absmax"].bfloat16()}),
        "nested_absmax is torch.bfloat16",
    ),
    "two states": (
        lambda k: k.update(
            {f"{NAME}.quant_state.bitsandbytes__fp4": k[f"{NAME}.quant_state.bitsandbytes__nf4"]}
        ),
        "2 quant_state",
    ),
    "dtype": (lambda k: state_of(k, dtype="load"), "cannot be read"),
    "kind": (lambda k: state_of(k, quant_type="int4"), "cannot be read"),
    "block": (lambda k: state_of(k, blocksize=7), "cannot be read"),
    "nested block": (lambda k: state_of(k, nested_blocksize=128), "nested_blocksize 128"),
    "no field": (lambda k: state_of(k, dtype=...), "cannot be read"),
    "no JSON": (
        lambda k: k[f"{NAME}.quant_state.bitsandbytes__nf4"].zero_(),
        "cannot be read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_told_with_the_name_of_the_weight(damage: str) -> None:
    keys = their_keys(
        weight(16, 64, torch.float32), quant_type="nf4", block_size=64, double_quant=True
    )
    change, message = DAMAGE[damage]
    change(keys)
    with pytest.raises(CheckpointError, match=f"{NAME}.*{message}"):
        decode_keys(NAME, keys)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(0, 200), st.integers(0, 255))
def test_any_byte_of_the_state_may_be_damaged(at: int, value: int) -> None:
    keys = their_keys(
        weight(4, 64, torch.float32), quant_type="nf4", block_size=64, double_quant=True
    )
    state = keys[f"{NAME}.quant_state.bitsandbytes__nf4"]
    state[at % len(state)] = value
    try:
        q = decode_keys(NAME, keys)
    except CheckpointError as error:
        assert NAME in str(error)  # noqa: PT017
    else:
        assert q.numel == 256


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["nf4", "float32", "load", "", "1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.sampled_from(
        ["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_offset"]
    ),
    json_values,
)
def test_any_field_of_the_state_may_lie(field: str, value: Any) -> None:
    keys = their_keys(
        weight(4, 64, torch.float32), quant_type="nf4", block_size=64, double_quant=True
    )
    state_of(keys, **{field: value})
    try:
        q = decode_keys(NAME, keys)
    except CheckpointError as error:
        assert NAME in str(error)  # noqa: PT017
    else:
        assert q.numel == 256
        assert dequantize(q).isfinite().all()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def wide_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide rows: bitsandbytes 0.50.2 decodes wrongly on a CPU where blocks cross rows."""
    directory = tmp_path_factory.mktemp("wide")
    return write_tiny_model(directory, layers=1, hidden=256, tied=False)


CASES = {
    "usual": (BaseRecipe(), torch.float32),
    "plain scales": (BaseRecipe(double_quant=False), torch.float32),
    "fp4": (BaseRecipe(quant="fp4"), torch.float16),
    "fp4, plain scales": (BaseRecipe(quant="fp4", double_quant=False), torch.bfloat16),
    "blocks of 32": (BaseRecipe(block_size=32), torch.float16),
    "blocks of 128": (BaseRecipe(block_size=128), torch.bfloat16),
    "blocks of 256": (BaseRecipe(block_size=256, quant="fp4"), torch.bfloat16),
    "search": (BaseRecipe(quant_search=True), torch.bfloat16),
    "search, plain scales": (BaseRecipe(quant_search=True, double_quant=False), torch.float32),
    "head": (BaseRecipe(quantize_head=True), torch.bfloat16),
    "head, fp4": (BaseRecipe("fp4", double_quant=False, quantize_head=True), torch.float32),
}


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_what_was_written(
    tmp_path: Path, wide_model_dir: Path, case: str
) -> None:
    recipe, dtype = CASES[case]
    out = tmp_path / "out"
    write_quantized(wide_model_dir, out, recipe, dtype=dtype, shard_bytes=300_000)
    assert len(list(out.glob("*.safetensors"))) > 1
    theirs = AutoModelForCausalLM.from_pretrained(out)
    assert theirs.is_loaded_in_4bit
    assert isinstance(theirs.lm_head, Linear4bit) == recipe.quantize_head
    ours = load_base(wide_model_dir, recipe).model
    # As it is written, whatever is asked for.
    again = load_base(out, BaseRecipe()).model
    linears = frozen_linears(ours)
    assert linears.keys() == frozen_linears(again).keys()
    assert ("lm_head" in linears) == recipe.quantize_head
    for path, linear in linears.items():
        module = theirs.get_submodule(path)
        assert linear.quantized is not None
        packed = frozen_linears(again)[path].quantized
        assert packed is not None
        assert packed.dtype == dtype
        for name, tensor in linear.quantized.tensors().items():
            assert tensor.equal(packed.tensors()[name]), name
        decoded = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert decoded.dtype == dtype
        assert decoded.equal(linear.decode(dtype))
    expected = logits(again)
    rounding = 1e-5 if dtype == torch.float32 else 2e-2 * float(expected.abs().max())
    # Where no gradient is wanted, bitsandbytes computes in bfloat16 if the CPU has it.
    assert theirs(PROMPT).logits.float().sub(expected).abs().max() < rounding
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).exists()


@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_embedding_is_ours_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, *, tied: bool
) -> None:
    source = write_tiny_model(tmp_path / "model", tied=tied)
    with caplog.at_level(logging.WARNING, logger="halfbyte"):
        out = write_quantized(source, tmp_path / "out", BaseRecipe(quantize_embeddings=True))
    assert "halfbyte loads what is written, transformers does not" in caplog.text
    ours = load_base(source, BaseRecipe(quantize_embeddings=True)).model
    again = load_base(out, BaseRecipe()).model
    assert again.halfbyte_recipe.quantize_embeddings
    assert again.halfbyte_recipe.quantize_head == tied
    assert logits(again).equal(logits(ours))
    # Not in silence: it finds a shape that it did not expect.
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(out)
    decoded = load_base(out, BaseRecipe(quant="none")).model
    torch.testing.assert_close(logits(decoded), logits(ours))


def test_a_gguf_file_is_packed_from_its_own_numbers(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    out = write_quantized(path, tmp_path / "out", BaseRecipe())
    theirs = AutoModelForCausalLM.from_pretrained(out)
    assert theirs.dtype == torch.bfloat16
    for module, linear in frozen_linears(load_base(path, BaseRecipe()).model).items():
        assert linear.quantized is not None
        assert theirs.get_submodule(module).weight.data.flatten().equal(linear.quantized.codes)


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant", ["nf4", "fp4"])
def test_what_bitsandbytes_wrote_loads_as_it_is(
    tmp_path: Path,
    model_dir: Path,
    caplog: pytest.LogCaptureFixture,
    quant: str,
    storage: str,
    *,
    double_quant: bool,
) -> None:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_storage=storage,
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        model_dir, quantization_config=config, dtype=torch.bfloat16
    )
    theirs.save_pretrained(tmp_path)
    open_base(model_dir).tokenizer().save_pretrained(tmp_path)
    held = safetensors.torch.load_file(tmp_path / "model.safetensors")
    recipe = BaseRecipe(quant=quant, double_quant=double_quant)
    other = BaseRecipe(quant="fp4" if quant == "nf4" else "nf4", double_quant=double_quant)
    with caplog.at_level(logging.WARNING, logger="halfbyte"):
        ours = load_base(tmp_path, recipe).model
        assert caplog.text == ""
        load_base(tmp_path, other)
    assert f"already packed and is used as it is: {quant}, blocks of 64" in caplog.text
    for path, linear in frozen_linears(ours).items():
        packed = linear.quantized
        assert packed is not None
        # Byte for byte what is in the file, the dtype of its storage aside.
        mine = encode_keys(f"{path}.weight", packed)
        for key, tensor in mine.items():
            assert tensor.flatten().equal(held[key].flatten().view(tensor.dtype)), key
        module = theirs.get_submodule(path)
        expected = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert linear.decode(torch.bfloat16).equal(expected)


def test_a_packed_model_can_be_held_decoded(
    tmp_path: Path, model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = write_quantized(model_dir, tmp_path / "out", BaseRecipe())
    with caplog.at_level(logging.WARNING, logger="halfbyte"):
        plain = load_base(out, BaseRecipe(quant="none")).model
    assert "is packed in 4 bits (nf4); it is decoded" in caplog.text
    packed = load_base(out, BaseRecipe()).model
    for path, linear in frozen_linears(plain).items():
        assert linear.quantized is None
        assert linear.dense(torch.float32).equal(frozen_linears(packed)[path].decode(torch.float32))


def test_linears_a_packed_model_left_alone_stay_so_and_are_named(
    tmp_path: Path, model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = write_quantized(model_dir, tmp_path / "out", BaseRecipe())
    held = safetensors.torch.load_file(out / "model.safetensors")
    for key in packed_weights(held)[NAME]:
        del held[key]
    held[NAME] = weight(128, 64, torch.float32)
    safetensors.torch.save_file(held, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"].append(NAME.removesuffix(".weight"))
    (out / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING, logger="halfbyte"):
        model = load_base(out, BaseRecipe()).model
    path = NAME.removesuffix(".weight")
    assert f"1 of its linear layers, which stay in 16 or 32 bits: {path}" in caplog.text
    linears = frozen_linears(model)
    assert [name for name, linear in linears.items() if linear.quantized is None] == [path]
    assert linears[path].dense(torch.float32).equal(held[NAME])
    theirs = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(theirs(PROMPT).logits, logits(model), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_packed_is_told(tmp_path: Path, model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="nf4 or fp4"):
        write_quantized(model_dir, tmp_path / "out", BaseRecipe(quant="none"))
    out = write_quantized(model_dir, tmp_path / "out", BaseRecipe())
    with pytest.raises(OutputError, match="it exists already"):
        write_quantized(model_dir, out, BaseRecipe())
    with pytest.raises(CheckpointError, match="is already packed in 4 bits"):
        write_quantized(out, tmp_path / "again", BaseRecipe())
    write_quantized(model_dir, out, BaseRecipe(quant="fp4"), replace=True)
    assert "fp4" in (out / "config.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_packed_weight_in_a_file_reads_back(tmp_path: Path) -> None:
    q: QuantizedWeight = quantize(weight(7, 9, torch.bfloat16))
    write_model(tmp_path, plan_keys(NAME, q), encode_keys(NAME, q).items())
    held = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert decode_keys(NAME, held).codes.equal(q.codes)
    file = io.BytesIO()
    write_safetensors(file, held)
    assert decode_keys(NAME, safetensors.torch.load(file.getvalue())).codes.equal(q.codes)
