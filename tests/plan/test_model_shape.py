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
