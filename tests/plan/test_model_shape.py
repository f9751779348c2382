"""The shapes that are arithmetic, against what transformers builds of the same numbers."""

import pytest

from halfbyte.plan.model_shape import KNOWN, config_of, shape_of_config, shape_of_known


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_shape_is_what_transformers_builds(name: str) -> None:
    assert shape_of_known(name) == shape_of_config(config_of(name), name)


def test_names_are_read_as_configurations_are() -> None:
    assert shape_of_known(" Llama2-7B ") == shape_of_config(config_of(" Llama2-7B "), " Llama2-7B ")
    assert shape_of_known("llama2-7b,num_hidden_layers=4") is None
    assert shape_of_known("llama9-7b") is None


def test_layers_that_differ_are_planned() -> None:
    """Those of Gemma 4 have heads of different sizes, and no size of the whole model."""
    sizes = "hidden_size=64,num_hidden_layers=6,num_attention_heads=4,num_key_value_heads=2"
    gemma4 = f"model_type=gemma4_text,{sizes},head_dim=16,vocab_size=400"
    shape = shape_of_config(config_of(gemma4), "gemma4")
    assert (shape.hidden, shape.heads, shape.layers) == (64, 4, 6)
