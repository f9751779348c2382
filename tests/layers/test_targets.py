"""Which linears are frozen, and what PEFT would not load gets no adapter."""

import pytest
import torch

from halfbyte.errors import ConfigError
from halfbyte.layers.targets import linears_to_freeze, why_no_adapter
from halfbyte.linear.lora import LoRAConfig, frozen_linears
from halfbyte.models.build import BaseRecipe, build
from halfbyte.models.support import require_trainable
from tests.checkpoint.families import skeleton


def leaves(paths: object) -> set[str]:
    return {str(path).rpartition(".")[2] for path in paths}  # type: ignore[attr-defined]


def test_a_linear_whose_weight_the_model_reads_stays_as_it_is() -> None:
    model = skeleton("mamba", time_step_rank=8, state_size=8)
    # transformers' scan reads the weights of the other three, on a GPU or everywhere.
    assert leaves(linears_to_freeze(model)) == {"in_proj", "lm_head"}
    built = build(model.config, BaseRecipe())
    assert leaves(frozen_linears(built)) == {"in_proj"}
    assert type(built.backbone.layers[0].mixer.dt_proj) is torch.nn.Linear
    with pytest.raises(ConfigError, match=r"out_proj, which cannot get an adapter: transformers'"):
        require_trainable(model, LoRAConfig(target_modules=("in_proj", "out_proj")))


def test_a_linear_of_another_name_is_one_too() -> None:
    model = skeleton("falcon")
    assert {"query_key_value", "dense"} <= leaves(linears_to_freeze(model))
    require_trainable(model, LoRAConfig())


def test_experts_of_another_family_are_no_reason() -> None:
    # PEFT knows Mixtral's names w1, w2, w3, and its router; these are Llama's.
    assert why_no_adapter(skeleton("llama")) == {}
    require_trainable(skeleton("llama"), LoRAConfig(target_modules=("down_proj",)))


def test_a_linear_whose_key_peft_would_rename_gets_no_adapter() -> None:
    """Laguna's older checkpoints have ``shared_expert``, and PEFT makes one more s of it."""
    model = skeleton("laguna", num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2)
    refused = why_no_adapter(model)
    assert refused
    assert all(".shared_experts." in path for path in refused)
    assert any(path.endswith("mlp.gate_proj") for path in linears_to_freeze(model))
