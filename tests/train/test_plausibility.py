"""Options that are hardly meant with a model and data are noted, others are not."""

import re

import numpy as np
import pytest
from transformers import LlamaConfig

from halfbyte.config.schema import TrainConfig
from halfbyte.train.plausibility import implausible


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"warmup_steps": 10}, "the warm-up of 10 steps is not shorter than the run of 10"),
        ({"warmup_steps": 9}, None),
        ({"gradient_accumulation_steps": 2, "batch_size": 2}, "a step has 4 examples .* data 3:"),
        ({"gradient_accumulation_steps": 3}, None),
    ],
)
def test_what_is_hardly_meant_is_noted(options, note):
    config = TrainConfig(
        **{"model": "-", "data": "-", "output": "-", "gradient_accumulation_steps": 1} | options
    )
    lengths = np.array([8, 8, 8])
    notes = implausible(config, lengths, 10, LlamaConfig(max_position_embeddings=8))
    assert len(notes) == (note is not None)
    assert note is None or re.match(note, notes[0])


def test_examples_beyond_the_model_s_positions_are_counted():
    config = TrainConfig(model="-", data="-", output="-", gradient_accumulation_steps=1)
    lengths = np.array([8, 9, 10])
    [note] = implausible(config, lengths, 10, LlamaConfig(max_position_embeddings=8))
    assert note.startswith("2 examples are longer than the 8 positions")
    assert note.endswith("--max-length 8 truncates them")
