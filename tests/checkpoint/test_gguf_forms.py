"""Forms of parameters in GGUF files: each is undone by its inverse, rows and blocks alike."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from halfbyte.checkpoint import gguf_forms as forms

MATRICES = {
    "plain": forms.plain("a"),
    "rotary_pairs": forms.rotary_pairs("a", 3),
    "halves": forms.halves("a", "b"),
}
EXPERTS = {
    "halves": forms.halves("a", "b"),
    "transposed": forms.transposed("a"),
    "alternating": forms.alternating("a", "b"),
}


@pytest.mark.parametrize("name", MATRICES)
def test_rows_move_as_wholes_and_come_back(name: str) -> None:
    form, value = MATRICES[name], torch.randn(12, 5)
    parts = form.split(value)
    assert [tuple(part.shape) for part in parts] == form.shapes(value.shape)
    assert form.join(parts).equal(value)
    assert form.moves_rows
    # So blocks of any width, and B of an adapter, may be moved as well.
    assert torch.cat([part[:, :2] for part in parts]).equal(
        torch.cat(tuple(form.split(value[:, :2].contiguous())))
    )


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_come_back(name: str) -> None:
    form, value = EXPERTS[name], torch.randn(3, 4, 6)
    parts = form.split(value)
    assert [tuple(part.shape) for part in parts] == form.shapes(value.shape)
    assert form.join(parts).equal(value)


def test_gate_and_up_of_gpt_oss_are_every_other_column() -> None:
    value = torch.arange(2 * 3 * 4.0).view(2, 3, 4)
    gate, up = forms.alternating("gate", "up").split(value)
    assert gate[1].equal(value[1, :, ::2].T)
    assert up[1].equal(value[1, :, 1::2].T)
    biases = forms.alternating_biases("gate", "up")
    assert biases.join(biases.split(value[0])).equal(value[0])


def test_vectors_come_back() -> None:
    value = torch.tensor([[0.5, -1.0, 2.0]])
    [row] = forms.single_row("a").split(value)
    assert row.shape == (3,)
    assert forms.single_row("a").join([row]).equal(value)
    [moved] = forms.plus_one("a").split(value[0])
    assert moved.tolist() == [1.5, 0.0, 3.0]
    assert forms.plus_one("a").join([moved]).equal(value[0])


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4))
def test_rows_go_where_transformers_takes_them_from(heads: int, groups: int, half: int) -> None:
    counts = {"q": heads * groups, "k": heads}
    config = {"num_attention_heads": counts["q"], "num_key_value_heads": counts["k"]}
    processor = LlamaTensorProcessor(config=config)
    for module, count in counts.items():
        value = torch.randn(2 * half * count, 3)
        [ordered] = forms.rotary_pairs("a", count).split(value)
        back = processor.process(ordered.numpy(), f"blk.0.attn_{module}.weight").weights
        assert np.array_equal(back, value.numpy())
