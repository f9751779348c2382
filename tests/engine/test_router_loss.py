"""The auxiliary loss of routers against transformers' models, which add it themselves."""

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, LlamaConfig, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from halfbyte.engine.autograd import AutogradEngine
from halfbyte.engine.choose import minimise_router_loss
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.packing import Batch
from halfbyte.errors import ConfigError
from halfbyte.linear.lora import adapter_parameters
from halfbyte.plan.policy import ActivationPolicy
from tests.engine.test_layerwise import SIZES, gradients, model_of

COEFFICIENT = 0.7
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **_EXPERTS, head_dim=8, mlp_only_layers=[1]),
    "olmoe": OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
    "gpt_oss": GptOssConfig(**SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
}


def _batch(lengths):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 120, (len(lengths), max(lengths) + 1), generator=generator)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return ids[:, :-1], ids[:, 1:].masked_fill(~mask, -100), mask


def _expected(config, lengths):
    model = model_of(config)
    ids, targets, mask = _batch(lengths)
    model.router_aux_loss_coef = COEFFICIENT
    out = model(input_ids=ids, attention_mask=mask.long(), output_router_logits=True)
    rows = out.logits.flatten(0, 1)
    loss = nn.functional.cross_entropy(rows, targets.flatten()) + COEFFICIENT * out.aux_loss
    found = torch.autograd.grad(loss, list(adapter_parameters(model).values()))
    assert out.aux_loss > 0
    return loss.detach(), dict(zip(adapter_parameters(model), found, strict=True))


@pytest.mark.parametrize("lengths", [(9, 9), (11, 4)])
@pytest.mark.parametrize("saved", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_transformers(family, saved, lengths):
    true, true_gradients = _expected(FAMILIES[family], lengths)
    model = model_of(FAMILIES[family])
    ids, targets, _ = _batch(lengths)
    engine = LayerEngine(model, fuse=family != "olmoe")
    minimise_router_loss(engine, COEFFICIENT)
    batch = Batch(ids, targets, list(lengths))
    loss = engine.step([batch], float((targets >= 0).sum()), ActivationPolicy(saved))
    torch.testing.assert_close(loss, true, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(model).items():
        difference = (gradient - true_gradients[name]).norm()
        assert difference <= 2e-5 * true_gradients[name].norm() + 1e-8, name


def test_plain_autograd_minimises_it_too():
    lengths = (11, 4)
    true, true_gradients = _expected(FAMILIES["mixtral"], lengths)
    model = model_of(FAMILIES["mixtral"])
    ids, targets, _ = _batch(lengths)
    engine = AutogradEngine(model)
    minimise_router_loss(engine, COEFFICIENT)
    batch = Batch(ids, targets, list(lengths))
    loss = engine.step([batch], float((targets >= 0).sum()), ActivationPolicy())
    torch.testing.assert_close(loss, true, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, true_gradients[name], rtol=1e-4, atol=1e-7)


def test_parts_count_by_their_tokens():
    model = model_of(FAMILIES["mixtral"])
    ids, targets, _ = _batch((9, 9))
    engine = LayerEngine(model)
    minimise_router_loss(engine, COEFFICIENT)
    losses = []
    for batches in (
        [Batch(ids, targets)],
        [Batch(ids[:1], targets[:1]), Batch(ids[1:], targets[1:])],
    ):
        losses.append(engine.step(batches, 18.0, ActivationPolicy()) - engine.loss(batches) / 18.0)
    alone = [
        engine.step([Batch(ids[i : i + 1], targets[i : i + 1])], 9.0, ActivationPolicy())
        - engine.loss([Batch(ids[i : i + 1], targets[i : i + 1])]) / 9.0
        for i in range(2)
    ]
    torch.testing.assert_close(losses[1], (alone[0] + alone[1]) / 2, rtol=1e-4, atol=1e-5)
    assert losses[0] > 0


def test_a_model_without_it_is_an_error():
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no auxiliary loss"):
        minimise_router_loss(LayerEngine(model_of(LlamaConfig(**SIZES))), 0.1)
