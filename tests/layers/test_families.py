"""The table of families names classes and attributes that transformers has."""

import pytest
from torch import nn

from halfbyte.layers.families import FAMILIES, is_known_norm, spec_of
from halfbyte.linear.frozen import FrozenLinear
from tests.engine.test_layerwise import FAMILIES as CONFIGS
from tests.engine.test_layerwise import model_of

KNOWN = {"llama": 0, "mistral": 1, "qwen2": 2, "qwen3": 3}


@pytest.mark.parametrize("family", KNOWN)
def test_a_row_is_what_transformers_has(family):
    model, spec = model_of(CONFIGS[family]), FAMILIES[KNOWN[family]]
    layer = model.get_decoder().layers[0]
    assert type(model).__name__ == spec.model
    assert spec_of(layer) is spec
    assert spec.why_not(layer) is None
    # All linears and all norms of the layer, and no others.
    linears = [m for m in layer.modules() if isinstance(m, FrozenLinear)]
    assert {id(m) for m in linears} == {id(m) for m in spec.linears_of(layer)}
    norms = [m for m in layer.modules() if type(m).__name__.endswith("RMSNorm")]
    assert {id(m) for m in norms} == {id(m) for m in spec.norms_of(layer)}
    assert all(is_known_norm(norm) for norm in norms)


@pytest.mark.parametrize("family", sorted(set(CONFIGS) - set(KNOWN)))
def test_others_have_no_row(family):
    model = model_of(CONFIGS[family])
    assert spec_of(model.get_decoder().layers[0]) is None
    assert not is_known_norm(model.get_decoder().norm)


def test_a_class_of_that_name_from_elsewhere_has_no_row():
    layer = type("LlamaDecoderLayer", (nn.Module,), {})()
    assert spec_of(layer) is None


def test_a_layer_that_was_changed_says_why(monkeypatch):
    layer = model_of(CONFIGS["llama"]).get_decoder().layers[0]
    spec = spec_of(layer)
    kept, layer.self_attn.k_proj = layer.self_attn.k_proj, nn.Linear(2, 2)
    assert spec.why_not(layer) == "a linear of a layer has been replaced"
    layer.self_attn.k_proj = kept
    kept, layer.input_layernorm = layer.input_layernorm, nn.LayerNorm(2)
    assert spec.why_not(layer) == "a norm of a layer is no LlamaRMSNorm"
    layer.input_layernorm = kept
    # The configuration is one object for all tests.
    monkeypatch.setattr(layer.self_attn.config, "hidden_act", "gelu")
    assert spec.why_not(layer) == "its activation is gelu"
