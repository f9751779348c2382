"""The fused layer against transformers' own, family by family."""

import copy

import pytest
import torch
from transformers import GptOssConfig, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

from halfbyte.engine.layerwise import LayerEngine
from halfbyte.layers.attention import Documents
from halfbyte.layers.decoder_layer import fused
from halfbyte.linear.lora import adapter_parameters
from halfbyte.plan.policy import ActivationPolicy
from tests.engine.test_layerwise import FAMILIES, SIZES, batches_of, gradients, model_of

KNOWN = ("llama", "mistral", "qwen2", "qwen3")
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MIXTURES = {
    "gpt_oss": GptOssConfig(
        **SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=5
    ),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    # One layer of the three has an MLP.
    "qwen2_moe": Qwen2MoeConfig(
        **SIZES,
        **_EXPERTS,
        num_experts=4,
        shared_expert_intermediate_size=24,
        mlp_only_layers=[1],
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, **_EXPERTS, num_experts=4, head_dim=8, mlp_only_layers=[2]
    ),
}


@pytest.mark.parametrize("family", [*KNOWN, *MIXTURES])
def test_losses_and_gradients_are_those_of_transformers_layers(family):
    batches = batches_of([(2, 17), (1, 9)])
    results = []
    for fuse in (False, True):
        model = model_of((FAMILIES | MIXTURES)[family])
        engine = LayerEngine(model, fuse=fuse)
        assert engine.fused == (3 if fuse else 0)
        loss = engine.step(batches, 20.0, ActivationPolicy(1))
        results.append((float(loss), gradients(model)))
    (loss, true), (got_loss, got) = results
    assert got_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in got.items():
        assert (gradient - true[name]).norm() <= 1e-5 * true[name].norm(), name


@pytest.mark.parametrize("family", ["phi3", "gemma3"])
def test_other_families_are_left_to_transformers(family):
    model = model_of(FAMILIES[family])
    assert all(fused(layer) is None for layer in LayerEngine(model, fuse=True).layers)


def test_a_layer_that_trains_its_norms_is_not_fused():
    model = model_of(FAMILIES["llama"])
    layer = model.model.layers[0]
    assert fused(layer) is not None
    layer.input_layernorm.weight.requires_grad_(True)
    assert fused(layer) is None


def test_another_activation_is_not_fused():
    model = model_of(copy.deepcopy(FAMILIES["llama"]))
    model.config.hidden_act = "gelu"
    assert fused(model.model.layers[0]) is None


def test_an_output_nobody_reads_has_the_same_gradients():
    model = model_of(FAMILIES["qwen3"])
    run = fused(model.model.layers[0])
    x = torch.randn(2, 9, 32, requires_grad=True)
    cos, sin = model.model.rotary_emb(x, torch.arange(9)[None])
    dy, wanted = torch.randn(2, 9, 32), [x, *adapter_parameters(model.model.layers[0]).values()]
    true = torch.autograd.grad(run(x, cos, sin), wanted, dy)
    stand_in = run(x, cos, sin, read=False)
    assert stand_in.shape == x.shape
    assert not stand_in.any()
    for got, exact in zip(torch.autograd.grad(stand_in, wanted, dy), true, strict=True):
        assert torch.equal(got, exact)


@pytest.mark.parametrize("family", [*KNOWN, *MIXTURES])
def test_documents_in_a_row_are_what_they_are_alone(family):
    model = model_of((FAMILIES | MIXTURES)[family])
    # Gpt-oss's tables are of half a head: the engine repeats them.
    rotary = model.model.rotary_emb
    if family == "gpt_oss":
        rotary = lambda *args: [table.repeat(1, 1, 2) for table in model.model.rotary_emb(*args)]  # noqa: E731
    run = fused(model.model.layers[1])
    lengths = (5, 1, 0, 8)
    documents = Documents(torch.tensor([0, 5, 6, 6, 14], dtype=torch.int32), 8)
    x = torch.randn(1, 14, 32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    together = run(x, *rotary(x, positions), documents)
    for part, own in zip(x.split(lengths, 1), together.split(lengths, 1), strict=True):
        if part.shape[1]:
            alone = run(part, *rotary(x, torch.arange(part.shape[1])[None]))
            torch.testing.assert_close(own, alone)
