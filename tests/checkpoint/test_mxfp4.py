"""gpt-oss as it is published: experts in MXFP4, kept as they are, from loading to merging."""

import dataclasses
import json
import logging
from collections.abc import Generator
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Mxfp4Config, PreTrainedModel

from halfbyte.checkpoint import steps
from halfbyte.checkpoint.base_model import load_base, open_base
from halfbyte.checkpoint.bitsandbytes import write_quantized
from halfbyte.checkpoint.cache import cached
from halfbyte.checkpoint.identity import weights_digest
from halfbyte.checkpoint.merged import Merged, ways, write_merged
from halfbyte.checkpoint.mxfp4_keys import dense
from halfbyte.checkpoint.staging import Request, read_to_device
from halfbyte.engine.choose import choose_engine
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.packing import Batch
from halfbyte.errors import CheckpointError
from halfbyte.linear.experts import expert_linears
from halfbyte.linear.lora import LoRAConfig, adapter_parameters, attach
from halfbyte.models.build import BaseRecipe
from halfbyte.plan.policy import ActivationPolicy
from halfbyte.quant import MXFP4Weight
from tests.checkpoint.mxfp4_models import write_gpt_oss

IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gpt_oss(tmp_path_factory.mktemp("gpt-oss"))


def by_transformers(directory: Path) -> PreTrainedModel:
    """The model that transformers decodes, in float32."""
    config = Mxfp4Config(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def test_its_weights_are_the_bytes_of_the_files(files: Path) -> None:
    stored = load_file(files / "model.safetensors")
    base = load_base(files, BaseRecipe())
    experts = expert_linears(base.model)
    assert len(experts) == 4
    for name, linear in experts.items():
        for expert, weight in enumerate(linear.packed):
            assert isinstance(weight, MXFP4Weight)
            assert torch.equal(weight.codes, stored[f"{name}_blocks"][expert].flatten())
            assert torch.equal(weight.scales, stored[f"{name}_scales"][expert].flatten())
    report = base.memory_report
    numbers = 2 * stored["model.layers.0.mlp.experts.gate_up_proj_blocks"].numel()
    numbers += 2 * stored["model.layers.0.mlp.experts.down_proj_blocks"].numel()
    assert report.mxfp4_parameters == report.quantized_parameters == 2 * numbers
    assert "in MXFP4, the bytes of the files: 0.1 MB (4.250 bits" in report.lines()[0]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_it_computes_what_transformers_and_peft_compute(quant: str, files: Path) -> None:
    """Logits, and a step's loss and gradients of adapters on attention, on the layer engine."""
    theirs = by_transformers(files)
    model = load_base(files, BaseRecipe(quant=quant)).model  # type: ignore[arg-type]
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-6)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    attach(model, LoRAConfig(r=4, alpha=8, target_modules=tuple(targets)), seed=0)
    reference = peft.get_peft_model(
        theirs, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    )
    pairs = {}
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapter_parameters(model).items():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        theirs_name = f"base_model.model.{name.removesuffix('.weight')}.default.weight"
        pairs[name] = reference.get_parameter(theirs_name)
        pairs[name].data = parameter.detach().clone()
    engine, reason = choose_engine(model, "cpu")
    assert isinstance(engine, LayerEngine), reason
    expected = reference(input_ids=IDS, labels=IDS).loss
    expected.backward()
    labels = torch.nn.functional.pad(IDS[:, 1:], (0, 1), value=-100)
    loss = engine.step([Batch(IDS, labels)], float(IDS.numel() - 1), ActivationPolicy(2))
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    for name, parameter in adapter_parameters(model).items():
        wanted = pairs[name].grad
        assert parameter.grad is not None
        assert wanted is not None
        scale = float(wanted.abs().max())
        assert scale > 1e-4
        assert (parameter.grad - wanted).abs().max() <= 1e-5 * scale + 1e-8, name


def test_a_source_s_values_are_transformers_parameters(files: Path) -> None:
    wanted, source = by_transformers(files).state_dict(), open_base(files)
    assert {p.name for p in source.parameters} == wanted.keys()
    for parameter in source.parameters:
        value = source.tensor(parameter.name)
        assert parameter.shape == tuple(wanted[parameter.name].shape)
        assert parameter.packed == parameter.mxfp4 == isinstance(value, MXFP4Weight)
        assert torch.equal(dense(value).float(), wanted[parameter.name])
        assert parameter.nbytes == value.nbytes
    assert source.total_bytes == sum(
        v.nbytes for v in load_file(files / "model.safetensors").values()
    )


def test_staged_to_a_gpu_they_are_the_same(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and scales take the way of plain tensors, here on a CPU."""

    def on_cpu(asked: list[Request], device: torch.device) -> Generator[Tensor, None, None]:
        assert device.type == "cuda"
        yield from read_to_device(asked, torch.device("cpu"), piece_bytes=1000)

    source = open_base(files)
    expected = dict(source.tensors())
    monkeypatch.setattr(steps, "read_to_device", on_cpu)
    found = dict(source.tensors("cuda"))
    assert list(found) == list(expected)
    for name, value in expected.items():
        came = found[name]
        if isinstance(value, MXFP4Weight):
            assert isinstance(came, MXFP4Weight)
            assert all(torch.equal(came.tensors()[n], t) for n, t in value.tensors().items())
        else:
            assert torch.equal(dense(came), dense(value))


def test_the_files_are_not_packed_again(
    files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, recipe = open_base(files), BaseRecipe()
    assert cached(source, recipe) is source
    with pytest.raises(CheckpointError, match="already packed in 4 bits"):
        write_quantized(source, tmp_path / "packed", recipe)
    with caplog.at_level(logging.WARNING, "halfbyte"):
        load_base(source, recipe)
        assert "are in MXFP4; they are used as they are" in caplog.text
        assert "except for 8 of its linear layers" in caplog.text
        load_base(source, BaseRecipe(quant="none"))
        assert "are in MXFP4; they are decoded" in caplog.text


def test_the_head_is_packed_if_that_is_asked_for(files: Path) -> None:
    base = load_base(files, BaseRecipe(quantize_head=True))
    head = base.model.get_output_embeddings()
    assert head.quantized.quant_type == "nf4"
    assert base.memory_report.quantized_parameters > base.memory_report.mxfp4_parameters
    lines = base.memory_report.lines()
    assert "in 4 bits" in lines[0]
    assert "in MXFP4" in lines[1]


def test_experts_that_the_files_have_in_16_bits_stay_so(tmp_path: Path) -> None:
    plain = tuple(f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
    base = load_base(write_gpt_oss(tmp_path, plain=plain), BaseRecipe())
    held = {name: bool(linear.packed) for name, linear in expert_linears(base.model).items()}
    assert [name for name, packed in held.items() if not packed] == list(plain)
    with torch.no_grad():
        expected = by_transformers(tmp_path)(IDS).logits
        torch.testing.assert_close(base.model(IDS).logits, expected, rtol=0, atol=1e-6)


def test_another_model_has_another_digest(files: Path, tmp_path: Path) -> None:
    digest = weights_digest(load_base(files, BaseRecipe()).model)
    assert weights_digest(load_base(files, BaseRecipe()).model) == digest
    other = write_gpt_oss(tmp_path)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.experts.down_proj_scales"] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert weights_digest(load_base(other, BaseRecipe()).model) != digest


def damaged(files: Path, to: Path, **changes: Tensor | None) -> Path:
    """The files with other tensors of the first gate_up_proj; None leaves one out."""
    for path in files.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    tensors = load_file(files / "model.safetensors")
    for name, value in changes.items():
        key = f"model.layers.0.mlp.experts.gate_up_proj_{name}"
        del tensors[key]
        if value is not None:
            tensors[key] = value
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": None}, "gate_up_proj_scales is missing"),
        ({"blocks": None}, "gate_up_proj_scales: unknown to GptOssForCausalLM"),
        (
            {"scales": torch.zeros(4, 192, 3, dtype=torch.uint8)},
            r"requires torch.uint8 \[4, 192, 2",
        ),
        ({"blocks": torch.zeros(4, 192, 2, 16)}, "gate_up_proj_blocks is torch.float32"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_read(
    changes: dict[str, Tensor | None], message: str, files: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_base(damaged(files, tmp_path, **changes))


def test_a_scale_of_infinity_is_damage(files: Path, tmp_path: Path) -> None:
    scales = torch.full((4, 192, 2), 120, dtype=torch.uint8)
    scales[3, 7, 1] = 253
    with pytest.raises(CheckpointError, match=r"gate_up_proj_scales has a scale of 2\^126"):
        load_base(damaged(files, tmp_path, scales=scales), BaseRecipe())


def test_config_json_must_say_so(files: Path, tmp_path: Path) -> None:
    damaged(files, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="does not say that they are in MXFP4"):
        open_base(tmp_path)
    config["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"quantised by GPTQ .* no tensor in its files is"):
        open_base(tmp_path)


@pytest.fixture
def adapted(files: Path) -> PreTrainedModel:
    """Its model with an adapter on attention that changes the outputs."""
    model = load_base(files, BaseRecipe()).model
    attach(model, LoRAConfig(r=4, alpha=8), seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def test_a_merge_leaves_the_experts_as_they_are(
    files: Path, adapted: PreTrainedModel, tmp_path: Path
) -> None:
    source = open_base(files)
    assert ways(source, adapted) == ["decoded"]
    merged = Merged(source, adapted, dtype=torch.float32)
    out = write_merged(merged, tmp_path / "merged")
    before, after = (load_file(path / "model.safetensors") for path in (files, out))
    assert before.keys() == after.keys()
    for name in before:
        same = torch.equal(before[name].float(), after[name].float())
        assert same == (not name.endswith("_proj.weight"))
        assert (after[name].dtype == torch.uint8) == ("_blocks" in name or "_scales" in name)
    packing, of_base = (
        json.loads((path / "config.json").read_text())["quantization_config"]
        for path in (out, files)
    )
    assert packing == of_base
    with torch.no_grad():
        live = adapted(IDS).logits
        torch.testing.assert_close(by_transformers(out)(IDS).logits, live, rtol=0, atol=1e-5)
        again = load_base(out, BaseRecipe()).model(IDS).logits
        torch.testing.assert_close(again, live, rtol=0, atol=1e-5)


@pytest.mark.parametrize("into", ["original", "nf4"])
def test_it_is_not_packed_beside_them(into: str, files: Path, adapted: PreTrainedModel) -> None:
    with pytest.raises(CheckpointError, match="Merge into decoded"):
        Merged(open_base(files), adapted, into)  # type: ignore[arg-type]


def test_a_decoded_base_is_written_in_mxfp4_too(files: Path, tmp_path: Path) -> None:
    """With ``--quant none`` the model computes with the same weights."""
    model = load_base(files, BaseRecipe(quant="none")).model
    out = write_merged(Merged(open_base(files), model), tmp_path / "merged")
    expected, found = (load_file(path / "model.safetensors") for path in (files, out))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_experts_with_an_adapter_are_decoded(
    files: Path, adapted: PreTrainedModel, tmp_path: Path
) -> None:
    """All of them, since other programs take all experts in MXFP4 or none."""
    name = "model.layers.1.mlp.experts.down_proj"
    expert_linears(adapted)[name].adapter = torch.nn.Identity()
    source = open_base(files)
    out = write_merged(Merged(source, adapted), tmp_path / "merged")
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["halfbyte_decoded_from"] == "mxfp4"
    found, expected = load_file(out / "model.safetensors"), by_transformers(files).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n].float(), expected[n]) for n in found if ".experts." in n)


def test_recipe_says_in_what_the_experts_are(files: Path) -> None:
    recipe = load_base(files, BaseRecipe()).model.halfbyte_recipe
    assert recipe == dataclasses.replace(BaseRecipe(), experts="mxfp4")
