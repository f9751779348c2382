"""What files store in another form than transformers' models is what transformers makes of it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from halfbyte.checkpoint.base_model import load_base, open_base
from halfbyte.checkpoint.bitsandbytes import write_quantized
from halfbyte.errors import CheckpointError
from halfbyte.linear.experts import ExpertLinear
from halfbyte.models.build import BaseRecipe
from halfbyte.quant import dequantize, quantize
from tests.checkpoint.families import tiny_model
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """A model of four experts and its files, in which they are stored one by one."""
    directory = tmp_path_factory.mktemp("mixtral")
    model = tiny_model("mixtral", num_local_experts=4)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    assert any("experts.3.w2" in key for key in load_file(directory / "model.safetensors"))
    return model, directory


def test_experts_one_by_one_become_one_tensor(mixtral: tuple[PreTrainedModel, Path]) -> None:
    model, directory = mixtral
    source, wanted = open_base(directory), model.state_dict()
    found = dict(source.tensors())
    assert found.keys() == wanted.keys() == {p.name for p in source.parameters}
    for parameter in source.parameters:
        value, alone = found[parameter.name], source.tensor(parameter.name)
        assert isinstance(value, Tensor)
        assert isinstance(alone, Tensor)
        assert value.equal(wanted[parameter.name])
        assert alone.equal(value)
        assert (parameter.shape, parameter.nbytes) == (tuple(value.shape), value.nbytes)


def test_each_expert_is_packed_as_a_linear_layer(
    mixtral: tuple[PreTrainedModel, Path], tmp_path: Path
) -> None:
    model, directory = mixtral
    base = load_base(directory, BaseRecipe())
    name = "model.layers.1.mlp.experts.gate_up_proj"
    experts = base.model.get_submodule(name)
    assert isinstance(experts, ExpertLinear)
    for packed, matrix in zip(experts.packed, model.get_parameter(name), strict=True):
        assert torch.equal(dequantize(packed), dequantize(quantize(matrix.detach())))
    assert base.memory_report.expert_bytes == 0
    numbers = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert base.memory_report.quantized_parameters > numbers
    again = load_base(write_quantized(directory, tmp_path / "packed", BaseRecipe()), BaseRecipe())
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, base.model(ids).logits)


def test_experts_that_do_not_fit_together_are_told(
    mixtral: tuple[PreTrainedModel, Path], tmp_path: Path
) -> None:
    tensors = load_file(mixtral[1] / "model.safetensors")
    key = next(key for key in tensors if "experts.2.w1" in key)
    for path in mixtral[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file(tensors | {key: tensors[key][:-1].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"cannot make .*experts.* of .*experts\.0.* stack"):
        open_base(tmp_path)
    del tensors[key]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"cannot make|has shape"):
        open_base(tmp_path)


def test_files_in_the_form_of_the_model_are_read_as_they_are(
    mixtral: tuple[PreTrainedModel, Path], tmp_path: Path
) -> None:
    model, directory = mixtral
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    found = dict(open_base(tmp_path).tensors())
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())  # type: ignore[arg-type]
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())
