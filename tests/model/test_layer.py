"""The fused layer against transformers' own, family by family."""

import copy

import pytest
import torch

from halfbyte.lora import adapter_parameters
from halfbyte.model.layer import fused
from halfbyte.train.engine import LayerEngine
from tests.train.test_engine import FAMILIES, batches_of, gradients, model_of

KNOWN = ("llama", "mistral", "qwen2", "qwen3")


@pytest.mark.parametrize("family", KNOWN)
def test_losses_and_gradients_are_those_of_transformers_layers(family):
    batches = batches_of([(2, 17), (1, 9)])
    results = []
    for fuse in (False, True):
        model = model_of(FAMILIES[family])
        engine = LayerEngine(model, fuse=fuse)
        assert engine.fused == (3 if fuse else 0)
        loss = engine.step(batches, 20.0, saved_layers=1)
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


def test_a_cache_is_refused():
    model = model_of(FAMILIES["llama"])
    run = fused(model.model.layers[0])
    x = torch.zeros(1, 3, 32)
    positions = model.model.rotary_emb(x, torch.arange(3)[None])
    with pytest.raises(ValueError, match="no use for a cache"):
        run(x, position_embeddings=positions, past_key_values=object())
    assert run(x, position_embeddings=positions).shape == x.shape
    assert adapter_parameters(model)
