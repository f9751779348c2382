"""Types of GGUF files: which tensor gets which, and what the documentation says of them."""

from pathlib import Path
from typing import get_args

import pytest
from gguf import GGMLQuantizationType as Kind

from halfbyte.checkpoint.gguf_architectures import ARCHITECTURES
from halfbyte.checkpoint.gguf_types import FILE_TYPES, TensorTypes
from halfbyte.cli.export import ExportOptions
from halfbyte.errors import CheckpointError
from tests.checkpoint.gguf_families import FAMILIES

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"
NAMES = ("token_embd.weight", "output.weight", "blk.0.ffn_down_exps.weight")
SQUARE = (256, 512)


def kinds(file_type: str, name: str, layers: int = 32) -> list[Kind]:
    types = TensorTypes(file_type, layers, NAMES)  # type: ignore[arg-type]
    return [types.of(f"blk.{layer}.{name}.weight", SQUARE) for layer in range(layers)]


def test_q4_k_m_has_more_bits_where_llama_cpp_s_has() -> None:
    """First and last eighth, every third layer between: 16 of 32."""
    more = [layer for layer, kind in enumerate(kinds("q4_k_m", "attn_v")) if kind == Kind.Q6_K]
    assert more == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert kinds("q4_k_m", "ffn_down") == kinds("q4_k_m", "attn_v")
    assert set(kinds("q4_k_m", "attn_k")) == set(kinds("q4_k_m", "attn_output")) == {Kind.Q4_K}
    assert set(kinds("q4_k_m", "attn_qkv")) == {Kind.Q5_K}
    assert kinds("q3_k_m", "attn_v")[:3] == [Kind.Q5_K, Kind.Q5_K, Kind.Q4_K]
    assert kinds("q3_k_m", "ffn_down")[:3] == [Kind.Q5_K, Kind.Q5_K, Kind.Q4_K]
    assert set(kinds("q3_k_m", "ffn_up")) == {Kind.Q3_K}


def test_the_output_is_the_embedding_if_there_is_no_other() -> None:
    embedding = "token_embd.weight"
    assert TensorTypes("q4_k_m", 2, NAMES).of(embedding, SQUARE) == Kind.Q4_K
    assert TensorTypes("q4_k_m", 2, NAMES).of("output.weight", SQUARE) == Kind.Q6_K
    assert TensorTypes("q4_k_m", 2, NAMES[:1]).of(embedding, SQUARE) == Kind.Q6_K


def test_what_does_not_fit_and_what_is_small_is_stored_otherwise() -> None:
    types = TensorTypes("q4_k_m", 2, NAMES)
    assert types.of("blk.0.attn_k.weight", (4, 96)) == Kind.Q8_0
    assert types.of("blk.0.attn_k.weight", (4, 80)) == Kind.F16
    for name in ("blk.0.ffn_gate_inp.weight", "blk.0.ffn_up_exps.bias", "blk.0.attn_norm.weight"):
        shape = (256,) if "norm" in name else SQUARE
        assert types.of(name, shape) == Kind.F32


def test_mxfp4_is_for_experts() -> None:
    assert set(kinds("mxfp4", "ffn_down_exps")) == {Kind.MXFP4}
    assert set(kinds("mxfp4", "attn_q")) == {Kind.Q8_0}
    with pytest.raises(CheckpointError, match="mxfp4 is one of experts, and this model has none"):
        TensorTypes("mxfp4", 2, NAMES[:2])


def test_the_command_has_every_type() -> None:
    assert get_args(ExportOptions.model_fields["type"].annotation) == FILE_TYPES


def test_every_architecture_is_compared_with_llama_cpp() -> None:
    assert {row.model_type for row in ARCHITECTURES} == {family for family, _ in FAMILIES}


def test_the_documentation_names_every_architecture_and_type() -> None:
    text = DOCS.read_text()
    lines = [
        f"| {row.title} | `{row.model_type}` | `{row.name}` | {', '.join(row.ropes) or 'none'} |"
        for row in ARCHITECTURES
    ]
    assert "\n".join(lines) + "\n\n" in text
    for name in FILE_TYPES:
        assert f"`{name}`" in text
