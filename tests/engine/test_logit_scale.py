"""The factor of the logits: found in the configuration, and applied by the layer engine."""

import pytest
import torch
from benchmarks.family_configs import tiny_config

from halfbyte.engine.autograd import AutogradEngine
from halfbyte.engine.choose import choose_engine
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.logit_scale import logit_scale
from halfbyte.plan.policy import ActivationPolicy
from tests.engine.test_layerwise import batches_of, gradients, model_of

SCALES = {
    "cohere": ("logit_scale", 0.0625, 0.0625),
    "granite": ("logits_scaling", 8.0, 0.125),
    "hyperclovax": ("logits_scaling", 8.0, 8.0),
    "falcon_h1": ("lm_head_multiplier", 0.25, 0.25),
}


@pytest.mark.parametrize("family", SCALES)
def test_the_layer_engine_scales_logits_as_the_model_does(family):
    name, value, scale = SCALES[family]
    config = tiny_config(family)
    setattr(config, name, value)
    config.mamba_chunk_size = 8  # of Falcon-H1: rows of 9 tokens are padded to it
    assert logit_scale(config) == scale
    model = model_of(config)
    engine, _ = choose_engine(model, "cpu")
    assert isinstance(engine, LayerEngine)
    engine.unpadded = None
    batches = batches_of([(2, 9)])
    loss, found = engine.step(batches, 50.0, ActivationPolicy(1)), gradients(model)
    wanted, true = AutogradEngine(model).step(batches, 50.0, ActivationPolicy(0)), gradients(model)
    torch.testing.assert_close(loss, wanted)
    for key, one in true.items():
        torch.testing.assert_close(found[key], one, rtol=1e-4, atol=1e-7 + 1e-5 * float(one.norm()))


def test_other_families_have_none():
    assert logit_scale(tiny_config("llama")) == 1
    assert logit_scale(tiny_config("mpt")) == 1
