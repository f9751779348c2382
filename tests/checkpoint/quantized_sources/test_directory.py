"""A model that is quantised otherwise is the model it decodes to, wherever a base model is used."""

import contextlib
import copy
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    GPT2Config,
    GPT2LMHeadModel,
)

from halfbyte.checkpoint.base_model import load_base, open_base, open_vocabulary
from halfbyte.checkpoint.bitsandbytes import write_quantized
from halfbyte.checkpoint.cache import cached
from halfbyte.checkpoint.identity import weights_digest
from halfbyte.checkpoint.merged import Merged, ways, write_merged
from halfbyte.checkpoint.quantized_sources.cost import packing_error
from halfbyte.checkpoint.source import ExpertSlice
from halfbyte.checkpoint.staging import read_to_device
from halfbyte.errors import CheckpointError
from halfbyte.linear.lora import LoRAConfig, adapter_state, attach, load_adapter_state
from halfbyte.models.build import BaseRecipe
from halfbyte.quant import dequantize, quantize
from tests.checkpoint.families import tiny_model
from tests.checkpoint.quantized_models import (
    Quantized,
    awq,
    change_config,
    fp8,
    gptq,
    hqq,
    int8,
    pack_quantized,
    write_quantized_model,
)
from tests.checkpoint.quantized_sources.test_compressed_tensors import packing
from tests.tiny import tiny_tokenizer, write_tiny_model

PROMPT = torch.arange(3, 43)[None]
PLAIN = BaseRecipe(quant="none", compute_dtype=torch.float32)
NAME = "model.layers.0.mlp.up_proj.weight"

Make = Callable[[torch.Generator, int, int], Quantized]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
CASES: dict[str, tuple[Make, dict[str, Any], str]] = {
    "gptq": (gptq, GPTQ, "GPTQ (4 bits, groups of 32)"),
    "awq": (
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
        "AWQ (4 bits, groups of 32)",
    ),
    "fp8": (
        lambda g, rows, columns: fp8(g, rows, columns, block=(48, 48)),
        {"quant_method": "fp8", "weight_block_size": [48, 48]},
        "FP8 (blocks of 48 x 48)",
    ),
    "compressed-tensors": (
        pack_quantized,
        packing("pack-quantized", strategy="group", group_size=32),
        "compressed-tensors (pack-quantized)",
    ),
    "hqq": (
        hqq,
        {"quant_method": "hqq", "quant_config": {}, "skip_modules": ["lm_head"]},
        "HQQ",
    ),
    "bitsandbytes": (
        int8,
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "bitsandbytes (8 bits)",
    ),
}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(PROMPT).logits.float()  # type: ignore[no-any-return]


@pytest.fixture
def gptq_model(tmp_path: Path) -> Path:
    write_quantized_model(tmp_path / "gptq", gptq, GPTQ)
    return tmp_path / "gptq"


def write_decoded(directory: Path, decoded: dict[str, Tensor]) -> Path:
    """Writes the model of 32 bits that a quantised one decodes to."""
    write_tiny_model(directory)
    path = directory / "model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(path) | decoded, path)
    return directory


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_model_it_decodes_to(case: str, tmp_path: Path) -> None:
    make, config, description = CASES[case]
    directory = tmp_path / "model"
    decoded = write_quantized_model(directory, make, config)
    source = open_base(directory)
    assert source.decoded_from == description
    found, kinds = dict(source.tensors()), {}
    for parameter in source.parameters:
        value, alone = found[parameter.name], source.tensor(parameter.name)
        assert isinstance(value, Tensor)
        assert isinstance(alone, Tensor)
        assert value.equal(alone)
        assert (parameter.shape, parameter.dtype) == (tuple(value.shape), value.dtype)
        assert parameter.decoded == (parameter.name in decoded)
        if parameter.decoded:
            assert value.equal(decoded[parameter.name].to(value.dtype))
            kinds[parameter.name] = value.float()
    # In the files, and in memory: the model of transformers that has these weights.
    assert source.total_bytes == sum(
        tensor.nbytes
        for tensor in safetensors.torch.load_file(directory / "model.safetensors").values()
    )
    plain = write_decoded(tmp_path / "plain", kinds)
    theirs = AutoModelForCausalLM.from_pretrained(plain)
    assert logits(load_base(directory, PLAIN).model).equal(logits(load_base(plain, PLAIN).model))
    assert logits(load_base(plain, PLAIN).model).sub(logits(theirs)).abs().max() < 1e-5
    packed, expected = (load_base(path, BaseRecipe()) for path in (directory, plain))
    assert logits(packed.model).equal(logits(expected.model))
    assert weights_digest(packed.model) == weights_digest(expected.model)


def test_transformers_decodes_fp8_to_the_same_model(tmp_path: Path) -> None:
    config = {"quant_method": "fp8", "weight_block_size": [16, 32], "fmt": "e4m3"}
    write_quantized_model(
        tmp_path, lambda g, rows, columns: fp8(g, rows, columns, block=(16, 32)), config
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=FineGrainedFP8Config(weight_block_size=(16, 32), dequantize=True),
    )
    ours = load_base(tmp_path, PLAIN).model
    for name, parameter in theirs.named_parameters():
        assert ours.get_parameter(name).equal(parameter.float()), name
    assert logits(ours).sub(logits(theirs)).abs().max() < 1e-5


def test_transformers_and_bitsandbytes_write_8_bits_that_we_read(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "plain")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    theirs.save_pretrained(tmp_path / "int8")
    tiny_tokenizer().save_pretrained(tmp_path / "int8")
    keys = safetensors.torch.load_file(tmp_path / "int8" / "model.safetensors")
    assert keys[NAME].dtype == torch.int8
    source = open_base(tmp_path / "int8")
    assert source.decoded_from == "bitsandbytes (8 bits)"
    original = safetensors.torch.load_file(tmp_path / "plain" / "model.safetensors")
    for parameter in source.parameters:
        value = source.tensor(parameter.name)
        assert isinstance(value, Tensor)
        error = value.float() - original[parameter.name].float()
        largest = original[parameter.name].float().abs().amax(-1, keepdim=True)
        # Half a step of 127, and the rounding of both sides to 16 bits.
        bound = largest / 254 + 2**-8 * largest if parameter.decoded else torch.zeros(())
        assert bool((error.abs() <= bound).all()), parameter.name
    assert sum(parameter.decoded for parameter in source.parameters) == 14


def test_experts_one_by_one_in_fp8_become_transformers_own(tmp_path: Path) -> None:
    model = tiny_model("mixtral", num_local_experts=4)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    path, g = tmp_path / "model.safetensors", torch.Generator().manual_seed(0)
    held, decoded = safetensors.torch.load_file(path), {}
    for name in list(held):
        if ".experts." in name or name.endswith("_proj.weight"):
            made = fp8(g, *held[name].shape, block=(16, 16))
            decoded[name] = made.weight.to(torch.bfloat16).float()
            held |= {
                name: made.tensors["weight"],
                f"{name}_scale_inv": made.tensors["weight_scale_inv"],
            }
    assert sum(".experts." in name for name in decoded) == 4 * 3 * model.config.num_hidden_layers
    safetensors.torch.save_file(held, path)
    config = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    change_config(tmp_path, quantization_config=config, dtype="bfloat16")
    source = open_base(tmp_path)
    up = source.tensor("model.layers.1.mlp.experts.gate_up_proj")
    prefix = "model.layers.1.block_sparse_moe.experts.2"
    assert isinstance(up, Tensor)
    assert (
        up[2]
        .float()
        .equal(torch.cat([decoded[f"{prefix}.w1.weight"], decoded[f"{prefix}.w3.weight"]]))
    )
    assert {p.name for p in source.parameters if p.decoded} == {
        p.name for p in source.parameters if ".experts." in p.name or "_proj" in p.name
    }
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=FineGrainedFP8Config(weight_block_size=(16, 16), dequantize=True),
        dtype=torch.float32,
    )
    ours = load_base(source, PLAIN).model
    assert logits(ours).sub(logits(theirs)).abs().max() < 2**-7 * logits(theirs).abs().max()


def test_experts_stacked_in_fp8_are_decoded_together(tmp_path: Path) -> None:
    model = tiny_model("mixtral", num_local_experts=4)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    # Under today's names, as transformers holds them.
    state, g, decoded = dict(model.state_dict()), torch.Generator().manual_seed(0), {}
    for name in [name for name in state if ".experts." in name]:
        experts = [fp8(g, *expert.shape, block=(16, 16)) for expert in state[name]]
        state[name] = torch.stack([e.tensors["weight"].view(torch.uint8) for e in experts])
        state[name] = state[name].view(torch.float8_e4m3fn)
        scales = torch.stack([e.tensors["weight_scale_inv"] for e in experts])
        state[f"{name}_scale_inv"] = scales
        decoded[name] = torch.stack([e.weight for e in experts])
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    config = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    change_config(tmp_path, quantization_config=config, dtype="float32")
    source = open_base(tmp_path)
    slices = [(name, value) for name, value in source.tensors() if name in decoded]
    assert len(slices) == 4 * len(decoded)
    for name, value in slices:
        assert isinstance(value, ExpertSlice)
        assert isinstance(value.value, Tensor)
        assert value.value.equal(decoded[name][value.expert])
    for name, expected in decoded.items():
        whole = source.tensor(name)
        assert isinstance(whole, Tensor)
        assert whole.equal(expected)
        assert torch.stack([m for m in source.matrices(name) if isinstance(m, Tensor)]).equal(whole)


def test_a_quantised_head_is_decoded(tmp_path: Path) -> None:
    decoded = write_quantized_model(
        tmp_path,
        lambda g, rows, columns: gptq(g, rows, columns),
        GPTQ | {"lm_head": True},
        head=True,
    )
    head = load_base(tmp_path, PLAIN).model.lm_head.weight
    assert head.equal(decoded["lm_head.weight"].half().float())


def test_a_tied_head_that_is_quantised_is_another_tensor(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    decoded = write_quantized_model(tmp_path, gptq, GPTQ, head=True)
    change_config(tmp_path, tie_word_embeddings=True)
    with caplog.at_level(logging.WARNING, logger="halfbyte"):
        base = load_base(tmp_path, PLAIN)
    assert "two different tensors" in caplog.text
    assert base.model.lm_head.weight.equal(decoded["lm_head.weight"].half().float())


def test_what_it_costs_is_measured_and_said(
    gptq_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, recipe = open_base(gptq_model), BaseRecipe()
    with caplog.at_level(logging.WARNING, logger="halfbyte"):
        load_base(source, recipe)
    names = [parameter.name for parameter in source.parameters if parameter.decoded]
    error = size = 0.0
    for name in (names[0], names[6], names[12]):
        weight = source.tensor(name)
        assert isinstance(weight, Tensor)
        again = dequantize(
            quantize(weight.float(), quant_type="nf4", block_size=64, double_quant=True)
        )
        error += float((again - weight.float()).square().sum())
        size += float(weight.float().square().sum())
    expected = (error / size) ** 0.5
    assert packing_error(names, source.tensor, recipe) == pytest.approx(expected, rel=1e-5)
    assert 0.05 < expected < 0.15
    assert (
        "is quantised: GPTQ (4 bits, groups of 32). It is decoded and packed in nf4" in caplog.text
    )
    assert f"with a relative error of {100 * expected:.1f} %" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="halfbyte"):
        load_base(source, PLAIN)
    assert "is decoded and held in 16 or 32 bits" in caplog.text
    assert packing_error([], source.tensor, recipe) == 0


def test_a_packed_copy_is_the_model(
    gptq_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    expected = logits(load_base(gptq_model, BaseRecipe()).model)
    packed = write_quantized(gptq_model, tmp_path / "packed", BaseRecipe())
    assert open_base(packed).decoded_from is None
    assert logits(load_base(packed, BaseRecipe()).model).equal(expected)
    for _ in range(2):
        copied = load_base(open_base(gptq_model), BaseRecipe(), packed_copy=cached)
        assert logits(copied.model).equal(expected)
    assert any((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_a_merge_is_of_16_bits_and_quantised_no_more(
    quant: Any, gptq_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_base(gptq_model)
    model = load_base(source, BaseRecipe(quant=quant)).model
    attach(model, LoRAConfig(r=4, target_modules=("q_proj", "down_proj")), seed=0)
    generator = torch.Generator().manual_seed(1)
    state = {
        name: 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in adapter_state(model).items()
    }
    load_adapter_state(model, state)
    into = ways(source, model)
    assert into == (["decoded", "original", "nf4"] if quant == "nf4" else ["decoded", "nf4"])
    out = write_merged(Merged(source, model, "decoded", torch.float32), tmp_path / "merged")
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    was = {"nf4": "nf4", "none": "GPTQ (4 bits, groups of 32)"}[quant]
    assert config["halfbyte_decoded_from"] == was
    theirs = AutoModelForCausalLM.from_pretrained(out)
    assert logits(theirs).sub(logits(model)).abs().max() < 1e-4
    with caplog.at_level(logging.WARNING, logger="halfbyte"):
        load_base(out, BaseRecipe())
    assert f"is an adapter merged into weights decoded from {was}. Packing it" in caplog.text
    if quant == "nf4":  # W + Δ, of the weights that the files decode to
        original = Merged(source, model, "original", torch.float32)
        assert original.config.halfbyte_decoded_from == "GPTQ (4 bits, groups of 32)"
        weight = source.tensor(NAME)
        assert isinstance(weight, Tensor)
        assert original.tensor(NAME).equal(weight.float())  # a linear without an adapter
        assert not hasattr(Merged(source, model, "nf4").config, "halfbyte_decoded_from")


def test_a_fingerprint_is_of_the_files(gptq_model: Path, tmp_path: Path) -> None:
    shutil.copytree(gptq_model, tmp_path / "copy")
    first = open_base(gptq_model).fingerprint
    assert open_base(tmp_path / "copy").fingerprint == first
    path = tmp_path / "copy" / "model.safetensors"
    held = safetensors.torch.load_file(path)
    held[NAME.replace("weight", "qweight")] += 1
    safetensors.torch.save_file(held, path)
    assert open_base(tmp_path / "copy").fingerprint != first


def test_a_vocabulary_needs_no_files_of_weights(gptq_model: Path) -> None:
    (gptq_model / "model.safetensors").unlink()
    assert open_vocabulary(gptq_model).positions == 2048


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    held = safetensors.torch.load_file(path)
    change(held)
    safetensors.torch.save_file(held, path)


PREFIX = NAME.removesuffix(".weight")
WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "not quantised": (
        lambda d: (write_tiny_model(d), change_config(d, quantization_config=GPTQ)),
        "says that it is quantised by GPTQ .* no tensor in its files is",
    ),
    "unknown": (
        lambda d: change_config(d, quantization_config={"quant_method": "aqlm"}),
        "is quantised by 'aqlm'; supported are gptq, awq, fp8",
    ),
    "nonsense": (lambda d: change_config(d, quantization_config=[4]), "cannot read config.json"),
    "method of nonsense": (
        lambda d: change_config(d, quantization_config={"quant_method": ["gptq"]}),
        "is quantised by",
    ),
    "missing": (
        lambda d: rewrite(d, lambda h: h.pop(f"{PREFIX}.scales")),
        f"{PREFIX}.scales is missing",
    ),
    "no codes": (
        lambda d: rewrite(d, lambda h: h.pop(f"{PREFIX}.qweight")),
        f"{PREFIX}.qzeros: unknown to LlamaForCausalLM",
    ),
    "twice": (
        lambda d: rewrite(d, lambda h: h.update({NAME: torch.ones(128, 64)})),
        f"{NAME} is there beside {PREFIX}.qweight",
    ),
    "another shape": (
        lambda d: change_config(d, intermediate_size=96),
        r"has shape \[64, 128\], the configuration requires \[64, 96\]",
    ),
    "FP8 that nothing scales": (
        lambda d: rewrite(
            d, lambda h: h.update({"model.norm.weight": torch.ones(64).to(torch.float8_e4m3fn)})
        ),
        r"model.norm.weight is torch.float8_e4m3fn, expected are floating numbers; is it quantised",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_the_model_is_told(case: str, gptq_model: Path) -> None:
    change, message = WRONG[case]
    change(gptq_model)
    with pytest.raises(CheckpointError, match=message):
        load_base(gptq_model, PLAIN)


def test_a_file_that_ends_early_is_told(gptq_model: Path) -> None:
    source = open_base(gptq_model)
    path = gptq_model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        dict(source.tensors())


def test_transposed_layers_are_refused(tmp_path: Path) -> None:
    # A quantised Conv1D has the shape of a linear, and may be square.
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=400, **sizes))
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    made = gptq(torch.Generator().manual_seed(0), 64, 64)
    prefix = "transformer.h.0.attn.c_proj"

    def change(held: dict[str, Tensor]) -> None:
        del held[f"{prefix}.weight"]
        held |= {f"{prefix}.{leaf}": tensor for leaf, tensor in made.tensors.items()}

    rewrite(tmp_path, change)
    change_config(tmp_path, quantization_config=GPTQ)
    with pytest.raises(CheckpointError, match="whose weights are transposed"):
        open_base(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 2**40) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("kinds")
    for case, (make, config, _) in CASES.items():
        write_quantized_model(directory / case, make, config)
    return {case: directory / case for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_ahead_for_a_gpu_is_the_same(case: str, every_kind: dict[str, Path]) -> None:
    source = open_base(every_kind[case])
    steps = list(source._steps())  # type: ignore[attr-defined]
    requests = [request for step in steps for request in step.requests]
    stream = read_to_device(requests, torch.device("cpu"), piece_bytes=4096, ring=4)
    made = [item for step in steps for item in step.make([next(stream) for _ in step.requests])]
    assert [name for name, _ in made] == [parameter.name for parameter in source.parameters]
    for name, value in made:
        expected = source.tensor(name)
        assert isinstance(expected, Tensor)
        assert expected.equal(value)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(list(CASES)), st.data())
def test_any_option_may_hold_anything(
    every_kind: dict[str, Path], case: str, data: st.DataObject
) -> None:
    config = copy.deepcopy(CASES[case][1])
    place: Any = config
    while isinstance(place, dict):
        last, key = place, data.draw(st.sampled_from([*place, "more"]))
        place = place.get(key)
    last[key] = data.draw(json_values)
    change_config(every_kind[case], quantization_config=config)
    try:
        with contextlib.suppress(CheckpointError):
            dict(open_base(every_kind[case]).tensors())
    finally:
        change_config(every_kind[case], quantization_config=CASES[case][1])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(list(CASES)), st.data())
def test_any_tensor_may_be_another(
    every_kind: dict[str, Path], case: str, data: st.DataObject
) -> None:
    path = every_kind[case] / "model.safetensors"
    whole = path.read_bytes()
    held = safetensors.torch.load(whole)
    key = data.draw(st.sampled_from([key for key in held if ".layers.0.mlp.up_proj." in key]))
    shape = data.draw(
        st.lists(st.integers(0, 130), max_size=3).map(tuple) | st.just(held[key].shape)
    )
    kinds = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16]
    kinds += [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e8m0fnu]
    value = torch.full(shape, data.draw(st.sampled_from([0, 1, 3, 100])), dtype=torch.float32)
    held[key] = value.to(data.draw(st.sampled_from(kinds) | st.just(held[key].dtype)))
    try:
        path.write_bytes(safetensors.torch.save(held))
        with contextlib.suppress(CheckpointError):
            source = open_base(every_kind[case])
            for parameter in source.parameters:
                tensor = source.tensor(parameter.name)
                assert (tuple(tensor.shape), tensor.dtype) == (parameter.shape, parameter.dtype)
    finally:
        path.write_bytes(whole)
