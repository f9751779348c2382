"""The form in which a model is saved is that of transformers' ``save_pretrained``."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, WeightConverter, WeightRenaming

from halfbyte.checkpoint import saved_form
from halfbyte.checkpoint.base_model import open_base
from halfbyte.checkpoint.safetensors_file import Row
from halfbyte.checkpoint.saved_form import SavedForm
from halfbyte.checkpoint.source import BaseSource, ExpertSlice
from halfbyte.layers.multimodal import build_whole
from tests.checkpoint.families import tiny_model
from tests.tiny import tiny_tokenizer

EXPERTS: dict[str, Any] = {"num_experts": 4, "moe_intermediate_size": 48}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("llama", {}),
    "one by one": ("mixtral", {"num_local_experts": 4}),
    "one by one, other names": ("qwen3_moe", EXPERTS),
    "no gate": (
        "nemotron_h",
        {
            "layers_block_type": ["moe", "attention"],
            "n_routed_experts": 4,
            "moe_intermediate_size": 48,
            "moe_shared_expert_intermediate_size": 48,
        },
    ),
    "stacked": ("granitemoe", {"num_local_experts": 4}),
    "stacked and transposed, with biases": ("gpt_oss", {"num_local_experts": 4}),
}


def saved(family: str, changes: dict[str, Any], directory: Path) -> PreTrainedModel:
    model = tiny_model(family, **changes)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return model


def form_of(source: BaseSource) -> SavedForm:
    empty = {p.name: torch.empty(p.shape, dtype=p.dtype, device="meta") for p in source.parameters}
    return SavedForm(build_whole(source.config), empty, source.experts)


def written(form: SavedForm, values: Iterator[tuple[str, Any]]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, value in form.convert(values):
        if isinstance(value, Row):
            empty = torch.empty_like(form.keys[key], device="cpu")
            found.setdefault(key, empty)[value.number] = value.tensor
        else:
            found[key] = value
    return found


@pytest.mark.parametrize("kind", FAMILIES)
def test_files_are_those_of_save_pretrained(tmp_path: Path, kind: str) -> None:
    saved(*FAMILIES[kind], tmp_path)
    source = open_base(tmp_path)
    theirs = load_file(tmp_path / "model.safetensors")
    form = form_of(source)
    found = written(form, source.tensors())  # type: ignore[arg-type]
    assert found.keys() == theirs.keys() == form.keys.keys()
    for key, value in found.items():
        assert (value.dtype, value.shape) == (form.keys[key].dtype, form.keys[key].shape)
        assert value.equal(theirs[key]), key


def test_an_expert_is_written_when_it_comes(tmp_path: Path) -> None:
    saved("mixtral", {"num_local_experts": 4}, tmp_path)
    source = open_base(tmp_path)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    form = form_of(source)
    for expert, matrix in enumerate(source.matrices(name)):
        keys = dict(form.convert([(name, ExpertSlice(expert, matrix))]))
        prefix = f"model.layers.1.block_sparse_moe.experts.{expert}"
        assert list(keys) == [f"{prefix}.w1.weight", f"{prefix}.w3.weight"]
        assert torch.cat(list(keys.values())).equal(matrix)  # type: ignore[arg-type]


def test_experts_that_are_converted_together_wait_for_the_last(tmp_path: Path) -> None:
    saved("mixtral", {"num_local_experts": 4}, tmp_path)
    source = open_base(tmp_path)
    form = form_of(source)
    for group in form._groups:
        group.of_expert = []
    theirs = load_file(tmp_path / "model.safetensors")
    found = written(form, source.tensors())  # type: ignore[arg-type]
    assert found.keys() == theirs.keys()
    assert all(value.equal(theirs[key]) for key, value in found.items())


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (
            WeightRenaming("self_attn.other_proj", "self_attn.q_proj"),
            "other_proj.weight is no",
        ),
        (WeightRenaming("self_attn.q_proj", "self_attn.k_proj"), "two parameters become one key"),
        (
            WeightConverter(
                ["self_attn.q_proj.weight", "self_attn.k_proj.weight"],
                "mlp.down_proj.weight",
                [Concatenate(1)],
            ),
            "Undefined Operation",
        ),
    ],
)
def test_a_form_that_would_not_be_read_is_told_and_not_used(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    transform: Any,
    message: str,
) -> None:
    saved("llama", {}, tmp_path)
    source = open_base(tmp_path)
    names = {parameter.name for parameter in source.parameters}
    monkeypatch.setattr(saved_form, "get_model_conversion_mapping", lambda *_, **__: [transform])
    with caplog.at_level(logging.WARNING, logger="halfbyte"):
        form = form_of(source)
    assert "saved under the names of today's transformers" in caplog.text
    assert message in caplog.text
    assert form.keys.keys() == names
    found = written(form, source.tensors())  # type: ignore[arg-type]
    theirs = load_file(tmp_path / "model.safetensors")
    assert found.keys() == theirs.keys()
    assert all(value.equal(theirs[key]) for key, value in found.items())
