"""Mixtures of experts against transformers' own, for each kind of expert class."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts, MuseSparkTextConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHConfig, NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeExperts

from halfbyte.layers.experts import Routing, expert_parameters, freeze_experts

_SMALL: dict[str, Any] = {"hidden_size": 32, "moe_intermediate_size": 16, "num_experts": 6}
_KINDS = {
    "gated": (Qwen3MoeExperts, Qwen3MoeConfig(**_SMALL)),
    "transposed, with biases": (
        GptOssExperts,
        GptOssConfig(hidden_size=32, intermediate_size=16, num_local_experts=6),
    ),
    "without gate": (
        NemotronHExperts,
        NemotronHConfig(hidden_size=32, moe_intermediate_size=16, n_routed_experts=6),
    ),
    "with a norm": (
        MuseSparkExperts,
        MuseSparkTextConfig(
            hidden_size=32,
            moe_hidden_size=32,
            moe_intermediate_size=16,
            num_local_experts=6,
            num_attention_heads=2,
        ),
    ),
}


def _module(kind: str) -> tuple[nn.Module, PreTrainedConfig]:
    made, config = _KINDS[kind]
    config = copy.deepcopy(config)
    config._experts_implementation = "eager"
    module = made(config).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return module, config


def _routing(tokens: int, k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(tokens, 5, generator=generator, dtype=torch.float64)  # none to the last
    weights, index = scores.softmax(1).topk(k)
    return index, weights


@pytest.mark.parametrize("kind", _KINDS)
def test_output_and_gradients_are_those_of_transformers(kind: str) -> None:
    module, _ = _module(kind)
    index, weights = _routing(9, 2)
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = []
    for ours in (False, True):
        if ours:
            values = {name: p.detach() for name, p in module.named_parameters()}
            freeze_experts(module, lambda *_: None, torch.float64)  # type: ignore[arg-type]
            for name, child in module.named_children():
                if name in values:
                    child.weight = nn.Parameter(values[name], requires_grad=False)
        inputs = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        y = module(inputs[0], index, inputs[1])
        found.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for own, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


def test_pairs_are_sorted_by_expert_in_the_order_of_tokens() -> None:
    index = torch.tensor([[2, 0], [0, 3], [2, 2]])  # 3 is no expert
    routing = Routing.of(index, 3)
    assert routing.order.tolist() == [1, 2, 0, 4, 5, 3]
    assert routing.offsets.tolist() == [0, 2, 2, 5]
    assert torch.equal(routing.order[routing.place], torch.arange(6))


def test_only_three_dimensional_parameters_of_experts_are_found() -> None:
    module, _ = _module("transposed, with biases")
    found = expert_parameters(module)
    assert {path: transposed for path, (_, transposed) in found.items()} == {
        ".gate_up_proj": True,
        ".down_proj": True,
    }
