"""Rotary embeddings of GGUF files: the frequencies of a file are those of its model."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from halfbyte.checkpoint.gguf_file import GGUFFile
from halfbyte.checkpoint.gguf_rope import FREQUENCIES, Rope, read_rope
from halfbyte.errors import CheckpointError


def config(dimensions: int, **rope: Any) -> LlamaConfig:
    return LlamaConfig(hidden_size=2 * dimensions, num_attention_heads=2, rope_parameters=rope)


def write(path: Path, table: "np.ndarray[Any, Any]", theta: float, dimensions: int) -> GGUFFile:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_rope_freq_base(theta)
    writer.add_rope_dimension_count(dimensions)
    writer.add_tensor(FREQUENCIES, table)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(path)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    dimensions=st.sampled_from([16, 64, 128]),
    theta=st.sampled_from([1e4, 5e5]),
    factor=st.floats(2, 40),
    low=st.floats(0.5, 2),
    ratio=st.floats(1.5, 8),
    original=st.sampled_from([64, 4096, 8192]),
)
def test_the_frequencies_of_llama_3_come_back_from_their_table(
    tmp_path: Path,
    dimensions: int,
    theta: float,
    factor: float,
    low: float,
    ratio: float,
    original: int,
) -> None:
    given_ = config(
        dimensions,
        rope_type="llama3",
        rope_theta=theta,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=low * ratio,
        original_max_position_embeddings=original,
    )
    table = Rope(given_, dimensions, ("llama3",)).tensors()[FREQUENCIES]
    file = write(tmp_path / "m.gguf", table.numpy(), theta, dimensions)
    read = config(dimensions, **read_rope(file, dimensions, 8192))
    kind = read.rope_parameters["rope_type"]
    if kind == "default":
        assert torch.allclose(table, torch.ones_like(table), rtol=1e-4)
        return
    cpu = torch.device("cpu")
    wanted, found = (ROPE_INIT_FUNCTIONS["llama3"](one, cpu)[0] for one in (given_, read))
    assert torch.allclose(found, wanted, rtol=1e-3)


def test_a_table_of_another_formula_is_refused(tmp_path: Path) -> None:
    for table in (np.linspace(8, 1, 8), np.full(8, np.nan), np.ones(4)):
        file = write(tmp_path / "m.gguf", table.astype(np.float32), 1e4, 16)
        with pytest.raises(CheckpointError, match="is not one that the formula of Llama 3 gives"):
            read_rope(file, 16, 8192)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "llama3", "factor": 8.0}, "scaled by 'llama3' in llama"),
        ({"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.2}, "attention_factor"),
        ({"rope_type": "yarn", "factor": 4.0, "mscale": 0.7}, "mscale"),
    ],
)
def test_what_no_key_says_is_refused(rope: dict[str, Any], message: str) -> None:
    model = config(16)
    model.rope_parameters = {"rope_theta": 1e4, **rope}
    with pytest.raises(CheckpointError, match=message):
        Rope(model, 16, ("yarn",))
