"""What files store in another form than transformers' models is what transformers makes of it."""

import weakref
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import ConversionOps, Transpose, WeightConverter

from halfbyte.checkpoint import steps
from halfbyte.checkpoint.base_model import load_base, open_base
from halfbyte.checkpoint.bitsandbytes import write_quantized
from halfbyte.checkpoint.conversion import Conversion, find_experts
from halfbyte.checkpoint.reading import read_into
from halfbyte.checkpoint.source import ExpertSlice
from halfbyte.checkpoint.staging import Request, read_to_device
from halfbyte.errors import CheckpointError
from halfbyte.linear.experts import ExpertLinear
from halfbyte.models.build import BaseRecipe
from halfbyte.quant import dequantize, quantize
from tests.checkpoint.families import tiny_model
from tests.checkpoint.streams import streamed
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
    found = streamed(source)
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
    found = streamed(open_base(tmp_path))
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())  # type: ignore[arg-type]
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())


def test_experts_are_read_one_at_a_time(mixtral: tuple[PreTrainedModel, Path]) -> None:
    source = open_base(mixtral[1])
    wanted = mixtral[0].state_dict()
    alive: list[weakref.ref[Tensor]] = []
    came: list[tuple[str, int]] = []
    again = {name: source.matrices(name) for name in source.experts}
    for name, value in source.tensors():
        assert not any(ref() is not None for ref in alive)
        if isinstance(value, ExpertSlice):
            assert isinstance(value.value, Tensor)
            assert value.value.equal(wanted[name][value.expert])
            assert value.value.equal(next(again[name]))  # type: ignore[arg-type]
            came.append((name, value.expert))
            alive = [weakref.ref(value.value)]
        del value
    assert came == [(name, e) for name in dict.fromkeys(n for n, _ in came) for e in range(4)]
    assert {name for name, _ in came} == source.experts.keys()


def test_stacked_experts_are_read_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("granitemoe", num_local_experts=3)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    source = open_base(tmp_path)
    largest: list[int] = []
    monkeypatch.setattr(
        steps,
        "read_into",
        lambda path, start, target: (largest.append(len(target)), read_into(path, start, target)),
    )
    found, wanted = streamed(source), model.state_dict()
    assert all(value.equal(wanted[name]) for name, value in found.items())
    matrices = [wanted[name] for name in source.experts]
    assert max(m.nbytes for m in matrices) > max(largest)
    assert largest.count(matrices[0].nbytes // 3) >= 3


def test_experts_that_are_staged_are_the_experts(
    mixtral: tuple[PreTrainedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, what each expert needs is read ahead; here the device is the CPU."""
    asked: list[Request] = []

    def on_cpu(requests: list[Request], device: torch.device) -> Generator[Tensor]:
        assert device.type == "cuda"
        asked.extend(requests)
        return read_to_device(requests, torch.device("cpu"), piece_bytes=1000, ring=3)

    monkeypatch.setattr(steps, "read_to_device", on_cpu)
    found, wanted = streamed(open_base(mixtral[1]), "cuda"), mixtral[0].state_dict()
    assert all(value.equal(wanted[name]) for name, value in found.items())
    # Two layers of four experts, each of gate, up and down.
    assert sum(request.shape in ((96, 64), (64, 96)) for request in asked) == 2 * 4 * 3


class _Model(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.config = None
        self.w = nn.Parameter(torch.empty(shape, device="meta"))


class _Reversed(ConversionOps):
    """Numbers the experts from the last: correct for all together alone."""

    def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, Any]:
        [tensor] = next(iter(input_dict.values()))
        return {"w": tensor.flip(0)}


@pytest.mark.parametrize(
    ("operation", "stored", "alone"),
    [
        (Transpose(1, 2), (3, 5, 4), True),
        (Transpose(1, 2, check_dims=True), (3, 5, 4), True),
        (Transpose(1, 2, check_dims=True), (3, 4, 5), True),
        (_Reversed(), (3, 4, 5), False),
    ],
)
def test_operations_that_mix_experts_are_applied_to_all_together(
    operation: ConversionOps, stored: tuple[int, ...], *, alone: bool
) -> None:
    model: Any = _Model(3, 4, 5)
    conversion = Conversion(WeightConverter("w", "w", [operation]), "w", [("w", "w")])
    values = {"w": torch.arange(60.0).view(stored)}

    def empty(key: str) -> Tensor:
        return values[key].to("meta")

    conversion.infer(model, empty)
    find_experts(model, [conversion], {"w": 3}, empty)
    assert bool(conversion.inputs) == alone
    expected = conversion.apply(model, values.__getitem__)["w"]
    for expert, inputs in enumerate(conversion.inputs):
        read = [values[i.key] if i.row is None else values[i.key][i.row] for i in inputs]
        assert conversion.apply_to_expert(model, expert, read)["w"].equal(expected[expert])
