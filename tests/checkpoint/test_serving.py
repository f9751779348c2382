"""What vLLM and llama.cpp do not take of an adapter is known from its configuration."""

from pathlib import Path
from typing import Any

import pytest

from halfbyte.checkpoint.base_model import load_base, open_base
from halfbyte.checkpoint.gguf_export import write_gguf_lora
from halfbyte.checkpoint.peft import load_adapter, save_adapter
from halfbyte.checkpoint.reading import read_json
from halfbyte.checkpoint.serving import VLLM_RANKS, llama_cpp_refuses, vllm_rank, vllm_refuses
from halfbyte.errors import CheckpointError
from halfbyte.linear.lora import LoRAConfig, adapter_state, attach
from halfbyte.models.build import BaseRecipe
from tests.tiny import write_tiny_model

# What vLLM 0.33 did with adapters of these options, written by `save_adapter` (LAB.md).
IN_VLLM: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({}, ""),
    "rslora": ({"use_rslora": True}, ""),
    "patterns": ({"rank_pattern": {"v_proj": 32}, "alpha_pattern": {"k_proj": 3.5}}, ""),
    "some layers": ({"target_modules": r".*layers\.1\.mlp\.(up|down)_proj"}, ""),
    "rank 24": ({"r": 24}, ""),
    "rank 600": ({"r": 600}, "rank 600, more than 512"),
    "dora": ({"use_dora": True}, "DoRA"),
    "of parameters": (
        {"target_modules": (), "target_parameters": ("self_attn.q_proj.weight",)},
        "",
    ),
    "head": ({"modules_to_save": ("lm_head",)}, "modules trained in full (lm_head)"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("case", IN_VLLM)
def test_what_is_written_is_served_or_the_reason_is_known(
    base: Path, tmp_path: Path, case: str
) -> None:
    changes, reason = IN_VLLM[case]
    config = LoRAConfig(**({"r": 8} | changes))
    model = load_base(base, BaseRecipe(quant="none")).model
    attach(model, config, seed=0)
    save_adapter(tmp_path, adapter_state(model), config, base={"name": "b"}, recipe={})
    fields = read_json(tmp_path / "adapter_config.json", "")
    assert vllm_refuses(fields) == ([reason] if reason else [])
    adapter, path = load_adapter(tmp_path), tmp_path / "adapter.gguf"
    if llama_cpp_refuses(fields):
        with pytest.raises(CheckpointError, match="cannot express"):
            write_gguf_lora(open_base(base), adapter, path)
    else:
        write_gguf_lora(open_base(base), adapter, path)


@pytest.mark.parametrize(
    ("fields", "rank"),
    [
        ({"r": 1}, 1),
        ({"r": 2}, 8),
        ({"r": 16, "rank_pattern": None}, 16),
        ({"r": 16, "rank_pattern": {"v_proj": 65}}, 128),
        ({"r": 512}, 512),
        ({"r": 513}, None),
    ],
)
def test_the_rank_that_vllm_needs(fields: dict[str, Any], rank: int | None) -> None:
    assert vllm_rank(fields) == rank
    assert rank is None or rank in VLLM_RANKS


@pytest.mark.parametrize("fields", [{"bias": "all"}, {"lora_bias": True}])
def test_biases_of_peft_s_adapters(fields: dict[str, Any]) -> None:
    assert vllm_refuses({"r": 8} | fields) == ["biases"]
