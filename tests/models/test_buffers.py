"""Buffers that no checkpoint holds are those that transformers computes, or refused."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from halfbyte.errors import CheckpointError
from halfbyte.layers.multimodal import build_decoder
from halfbyte.models.buffers import compute_buffers
from tests import multimodal
from tests.checkpoint.families import SIZES

FAMILIES = {
    "bert": {"is_decoder": True},  # position ids: whole numbers
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8},
    "llama": {},
}


def models(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    config = AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
    reference = AutoModelForCausalLM.from_config(config)
    with torch.device("meta"):
        return reference, AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_those_of_transformers(family: str) -> None:
    reference, model = models(family)
    compute_buffers(model, "cpu")
    wanted = dict(reference.named_buffers())
    found = dict(model.named_buffers())
    assert found.keys() == wanted.keys()
    assert found
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []
    assert all(parameter.is_meta for parameter in model.parameters())


def test_one_that_nothing_computes_is_named() -> None:
    _, model = models("llama")
    with torch.device("meta"):
        model.model.layers[0].register_buffer("scale", torch.ones(3, dtype=torch.int64))
    with pytest.raises(CheckpointError, match=r"the buffer model\.layers\.0\.scale is in no check"):
        compute_buffers(model, "cpu")


def test_one_that_will_come_from_files_is_left_alone() -> None:
    model = models("llama")[1]
    with torch.device("meta"):
        model.register_buffer("threshold", nn.Parameter(torch.ones(3)).data)
    compute_buffers(model, "cpu", stored={"threshold"})
    assert model.threshold.is_meta


@pytest.mark.parametrize("family", multimodal.FAMILIES)
def test_a_decoder_without_its_encoders_has_all_of_its_buffers(family: str) -> None:
    model = build_decoder(multimodal.tiny_config(family))
    stored = model.state_dict().keys()
    compute_buffers(model, "cpu", stored=stored)
    whole = dict(multimodal.tiny_multimodal(family).named_buffers())
    computed = {path: held for path, held in model.named_buffers() if path not in stored}
    assert computed
    for path, held in computed.items():
        assert held.equal(whole[path]), path
