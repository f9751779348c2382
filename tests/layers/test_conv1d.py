"""GPT-2's Conv1D is built as a linear layer, and nothing else is changed."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, OpenAIGPTConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from halfbyte.layers.conv1d import conv1d_weights
from halfbyte.layers.multimodal import build_whole
from tests.checkpoint.families import skeleton

SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 32}


@pytest.mark.parametrize("config", [GPT2Config(**SIZES), OpenAIGPTConfig(**SIZES)])
def test_every_conv1d_is_a_linear(config: PretrainedConfig) -> None:
    model = build_whole(config, torch.float16)
    assert not any(isinstance(module, Conv1D) for module in model.modules())
    names = conv1d_weights(model)
    assert len(names) == 2 * 4  # c_attn, c_proj, c_fc and c_proj of two layers
    attention = model.get_submodule("transformer.h.1.attn.c_attn")
    assert isinstance(attention, nn.Linear)
    assert (attention.in_features, attention.out_features) == (32, 96)
    assert attention.weight.dtype == torch.float16
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_model_of_linears_is_left_as_it_is() -> None:
    model = build_whole(skeleton("llama").config)
    assert conv1d_weights(model) == frozenset()
