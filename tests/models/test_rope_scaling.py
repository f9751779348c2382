"""Scaled rotary embeddings: the option, and layers run with them against transformers' model."""

import json

import pytest
import torch
from transformers import AutoConfig, GPT2Config, LlamaConfig, LlamaForCausalLM

from halfbyte.engine.layerwise import LayerEngine
from halfbyte.errors import ConfigError
from halfbyte.models.rope_scaling import parameters_of, scale_rope
from halfbyte.plan.policy import ActivationPolicy
from tests.engine.test_layerwise import SIZES, batches_of, gradients, model_of, plain_step

POSITIONS = 16
LONG = json.dumps(
    {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [1.0, 2.0, 4.0, 8.0],
        "factor": 4.0,
    }
)
WANTED = ("linear:2", "dynamic:2", "yarn:4", "llama3:8", LONG, '{"type": "linear", "factor": 3}')


def config_of(wanted=None):
    config = LlamaConfig(**SIZES | {"max_position_embeddings": POSITIONS})
    if wanted is not None:
        scale_rope(config, wanted)
    return config


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("shapes", [[(1, 40)], [(2, 40), (1, 9)], [(1, 9)], [(1, 16)]])
@pytest.mark.parametrize("fuse", [False, True])
def test_losses_and_gradients_are_those_of_transformers(wanted, shapes, fuse):
    """Of sequences longer than the model was made for, and shorter ones."""
    batches = batches_of(shapes)
    loss, true = torch.zeros(()), None
    # A new model for each, since transformers' dynamic scaling remembers the longest.
    for batch in batches:
        model = model_of(config_of(wanted))
        loss = loss + plain_step(model, [batch], 20.0)
        found = gradients(model)
        true = found if true is None else {name: true[name] + found[name] for name in true}
    model = model_of(config_of(wanted))
    engine = LayerEngine(model, fuse=fuse)
    if fuse or len(batches) == 1:
        got = engine.step(batches, 20.0, ActivationPolicy(0))
        torch.testing.assert_close(got, loss, rtol=1e-5, atol=1e-5)
        for name, gradient in gradients(model).items():
            assert (gradient - true[name]).norm() <= 1e-5 * true[name].norm(), name


@pytest.mark.parametrize("wanted", WANTED[:5])
def test_a_scaled_model_is_another(wanted):
    batches = batches_of([(1, 40)])
    losses = []
    for each in (None, wanted):
        engine = LayerEngine(model_of(config_of(each)), fuse=True)
        losses.append(float(engine.loss(batches)))
    assert abs(losses[0] - losses[1]) > 1e-3


def test_dynamic_tables_do_not_depend_on_lengths_seen_before():
    batches = {n: batches_of([(1, n)]) for n in (40, 30, 9)}
    seen = LayerEngine(model_of(config_of("dynamic:2")), fuse=True)
    after = {n: float(seen.loss(batch)) for n, batch in batches.items()}
    for n, batch in batches.items():
        fresh = LayerEngine(model_of(config_of("dynamic:2")), fuse=True)
        assert float(fresh.loss(batch)) == after[n], n


@pytest.mark.parametrize(
    ("wanted", "packs"), [("yarn:4", True), ("dynamic:2", False), (LONG, False)]
)
def test_documents_are_packed_where_tables_do_not_depend_on_others(wanted, packs, monkeypatch):
    monkeypatch.setattr("halfbyte.engine.layerwise.can_pack", lambda *_: True)
    engine = LayerEngine(model_of(config_of(wanted)), fuse=True)
    engine.max_seqlen = 40
    assert engine.packs is packs
    engine.max_seqlen = 12
    assert engine.packs
    parts = engine.make_parts(batches_of([(1, 40), (1, 9)]))
    assert len(parts) == (1 if packs else 2)


@pytest.mark.parametrize(
    ("wanted", "positions", "kind"),
    [
        ("linear:2", 32, "linear"),
        ("yarn:4", 64, "yarn"),
        ("llama3:8", 128, "llama3"),
        (LONG, 64, "longrope"),
        ("dynamic:2", POSITIONS, "dynamic"),  # from there on the base grows
    ],
)
def test_the_configuration_has_it_when_it_is_saved(wanted, positions, kind, tmp_path):
    config = config_of(wanted)
    config.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert read.max_position_embeddings == positions
    assert read.rope_parameters["rope_type"] == kind
    assert read.rope_parameters["rope_theta"] == config_of().rope_parameters["rope_theta"]
    model = LlamaForCausalLM(read)
    ids = torch.arange(3, 43)[None]
    assert model(input_ids=ids).logits.isfinite().all()


def test_scaling_again_starts_from_the_original_positions():
    config = config_of("yarn:4")
    scale_rope(config, "yarn:8")
    assert config.rope_parameters["original_max_position_embeddings"] == POSITIONS
    assert config.max_position_embeddings == 8 * POSITIONS


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ("yarn", "a factor of 1 or more, as in yarn:4"),
        ("yarn:0.5", "a factor of 1 or more"),
        ("ntk:2", "expected linear:4, dynamic:4"),
        ("[1]", "a JSON object"),
        ('{"rope_type": "su"}', "rope_type is one of"),
        ('{"rope_type": "longrope"}', "long_factor"),
    ],
)
def test_what_it_cannot_be_is_refused(wanted, says):
    with pytest.raises(ConfigError, match=says):
        scale_rope(config_of(), wanted)


def test_models_without_one_rotary_embedding_are_refused():
    with pytest.raises(ConfigError, match="no rotary embedding"):
        scale_rope(GPT2Config(), "yarn:4")


def test_methods_are_read():
    assert parameters_of("yarn:4") == {"rope_type": "yarn", "factor": 4.0}
    assert parameters_of("llama3:8")["high_freq_factor"] == 4.0
