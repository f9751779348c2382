"""Forms of parameters in GGUF files: each is undone by its inverse, rows and blocks alike."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from halfbyte.checkpoint import gguf_delta_net
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


SIZES = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
}


@pytest.mark.parametrize("forms_of", [gguf_delta_net.qwen35, gguf_delta_net.qwen3_next])
def test_every_parameter_of_a_delta_net_comes_back(forms_of: Any) -> None:
    conv, width = 2 * 8 + 24, 24
    rows = {"in_proj_qkv": conv, "in_proj_z": width, "in_proj_b": 6, "in_proj_a": 6}
    shapes = {f"{name}.weight": (count, 5) for name, count in rows.items()}
    shapes |= {"in_proj_qkvz.weight": (conv + width, 5), "out_proj.weight": (5, width)}
    shapes |= {"conv1d.weight": (conv, 1, 4), "norm.weight": (4,), "A_log": (6,), "dt_bias": (6,)}
    for name, form in forms_of(SimpleNamespace(**SIZES)).items():
        value = torch.randn(shapes[name.removeprefix("linear_attn.")])
        parts = form.split(value)
        assert [tuple(part.shape) for part in parts] == form.shapes(value.shape)
        assert torch.allclose(form.join(parts), value, atol=1e-6)
        if not name.endswith("A_log"):
            assert (
                torch.cat([part.flatten() for part in parts])
                .sort()
                .values.equal(value.flatten().sort().values)
            )


def test_heads_of_values_follow_the_repeated_keys() -> None:
    form = gguf_delta_net.qwen35(SimpleNamespace(**SIZES))["linear_attn.dt_bias"]
    # Heads 0, 1, 2 share the first head of keys, 3, 4, 5 the second.
    [order] = form.split(torch.arange(6.0))
    assert order.tolist() == [0, 3, 1, 4, 2, 5]
