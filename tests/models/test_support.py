"""Which models can be trained, and on which linears, from the architecture alone."""

from dataclasses import replace

import pytest

from halfbyte.errors import CheckpointError, ConfigError
from halfbyte.layers.multimodal import build_decoder
from halfbyte.layers.targets import parameters_in_peft, why_no_adapter
from halfbyte.linear.lora import LoRAConfig, attach
from halfbyte.models.build import BaseRecipe, build
from halfbyte.models.support import require_trainable
from tests.checkpoint.families import skeleton
from tests.multimodal import tiny_config

DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}


def leaves(paths: object) -> set[str]:
    return {str(path).rpartition(".")[2] for path in paths}  # type: ignore[attr-defined]


def test_what_peft_adapts_as_a_parameter_has_neither_dropout_nor_dora() -> None:
    model = skeleton("deepseek_v3", **DEEPSEEK)
    assert why_no_adapter(model) == {}
    assert leaves(parameters_in_peft(model)) == {"gate_proj", "up_proj", "down_proj"}
    wanted = LoRAConfig(target_modules=("o_proj", "down_proj"))
    require_trainable(model, wanted)
    built = build(model.config, BaseRecipe(quant="none"))
    require_trainable(model, LoRAConfig(dropout=0.1))  # all-linear leaves them out
    for unable in (replace(wanted, dropout=0.1), replace(wanted, use_dora=True)):
        message = "down_proj, which cannot get an adapter: PEFT adapts it as a parameter"
        with pytest.raises(ConfigError, match=message):
            require_trainable(model, unable)
        with pytest.raises(ConfigError, match=message):
            attach(built, unable, seed=0)


def test_layers_that_text_skips_get_no_adapter() -> None:
    model = build_decoder(tiny_config("mllama"))
    refused = why_no_adapter(model)
    assert leaves(refused) == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert {path.split(".")[3] for path in refused} == {"1"}  # the layer of cross-attention
    base = build(model.config, BaseRecipe(quant="none"))
    assert {path.split(".")[3] for path in attach(base, LoRAConfig(), seed=0)} == {"0"}
    with pytest.raises(ConfigError, match="text does not pass through this layer"):
        require_trainable(model, LoRAConfig(target_modules=("layers.1.mlp.up_proj",)))


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        (
            "bert",
            {},
            r"an encoder \(is_decoder is false\), which sees the tokens",
        ),
        ("rwkv", {"attention_hidden_size": 64}, "divides its weights in place when it is called"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    family: str, changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        require_trainable(skeleton(family, **changes), LoRAConfig())


@pytest.mark.parametrize(
    ("family", "changes"), [("bert", {"is_decoder": True}), ("gpt_neox", {"is_decoder": False})]
)
def test_a_decoder_is_trained(family: str, changes: dict[str, object]) -> None:
    model = skeleton(family, **changes)
    require_trainable(model, LoRAConfig())
    assert {tensor.device.type for tensor in model.buffers()} == {"meta"}


def test_targets_are_compared_with_the_model_before_it_is_loaded() -> None:
    with pytest.raises(ConfigError, match="target_modules names what this model does not have"):
        require_trainable(skeleton("llama"), LoRAConfig(target_modules=("query_key_value",)))
