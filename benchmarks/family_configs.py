"""Tiny random models of every causal language model that transformers has.

``ROWS`` names what the sweep of ``families.py`` goes through: every model type for which
transformers has a causal language model, variants of them that take other paths, and the models of
more than text whose text decoder is trained (``tests/multimodal.py`` has their configurations).
``tiny_config`` makes a configuration small by the names of its fields, which most families share;
``CHANGES`` has what a family needs beyond that.
"""

import inspect
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests import multimodal

VOCABULARY = 400  # entries of tests/tiny.py's tokenizer

# What the fields of configurations are called, and small values that go together.
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "embed_dim": 64,
    "emb_dim": 64,
    "embedding_size": 64,
    "dim": 64,
    "n_embed": 64,
    "dim_model": 64,
    "word_embed_proj_dim": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "ffn_hidden_size": 96,
    "n_inner": 96,
    "d_ff": 96,
    "dim_ff": 96,
    "dff": 96,
    "feed_forward_size": 96,
    "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "d_inner": 96,
    "moe_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "dim_head": 16,
    "v_head_dim": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
    "max_seq_len": 256,
    "n_positions": 256,
    "n_ctx": 256,
    "sliding_window": 8,
    "index_topk": 8,
    "index_topk_blocks": 2,
    "index_block_size": 4,
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_d_state": 8,
    "mamba_d_head": 16,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_dt_rank": 8,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "time_step_rank": 8,
    "lru_width": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "image_size": 28,
    "patch_size": 14,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "decoder_start_token_id": 1,
}

# What a family needs beyond or instead of these.
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
CHANGES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        **{f"{part}_config": {"hidden_size_global": 64} for part in ("encoder", "decoder")},
    },
    "codegen": {"rotary_dim": 16},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 3, 3],
            }
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 0.5},
        "ffn_config": {"ffn_hidden_size": 96},
    },
    "dots3_note": {
        "vision_config": {"num_hidden_layers": 42, "adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_output_size": 64},
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 4},
    "gemma4_assistant": {
        "text_config": {
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
        }
    },
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "moshi": {"audio_vocab_size": 64},
    "qwen4_exp_text": _INDEXER,
    "qwen4_exp": {"text_config": _INDEXER},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (16, 48), "axial_pos_shape": (16, 16)},
    "xlstm": {"hidden_size": 128},  # queries and keys are a multiple of 64 wide
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba": {"layers_block_type": ["mamba", "hybrid", "hybrid", "mamba"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_mem_blocks": 1},
    "zaya": {"num_experts_per_tok": 1},
}

# Rows of their own: (model type, changes).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo (clip_qkv)": ("olmo", {"clip_qkv": 0.5}),
    "opt (350m's shape)": (
        "opt",
        {
            "do_layer_norm_before": False,
            "word_embed_proj_dim": 32,
            "_remove_final_layer_norm": False,
        },
    ),
    "falcon (new decoder)": ("falcon", {"new_decoder_architecture": True}),
    "falcon (alibi)": (
        "falcon",
        {"alibi": True, "multi_query": False, "parallel_attn": False, "num_kv_heads": 4},
    ),
    "llama (biases)": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama (untied)": ("llama", {"tie_word_embeddings": False}),
    "llama (tied)": ("llama", {"tie_word_embeddings": True}),
    "phi (parallel, biased head)": ("phi", {"qk_layernorm": True}),
    "bert (decoder)": ("bert", {"is_decoder": True}),
    "roberta (decoder)": ("roberta", {"is_decoder": True}),
    "stablelm (parallel residual)": ("stablelm", {"use_parallel_residual": True}),
    "gpt_neox (sequential)": ("gpt_neox", {"use_parallel_residual": False}),
    "persimmon (no qk norm)": ("persimmon", {"qk_layernorm": False}),
    "deepseek_v3 (no query rank)": ("deepseek_v3", {"q_lora_rank": None}),
}

# Models of more than text whose class is not the one of the row of their type.
WHOLE: dict[str, str] = {
    f"{kind} (whole)" if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else kind: kind
    for kind in multimodal.FAMILIES
    if MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(kind)
    not in (None, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind))
}

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES},
    **VARIANTS,
    **{row: (kind, {}) for row, kind in WHOLE.items()},
}


def tiny_config(row: str) -> PretrainedConfig:
    """Return a small configuration of a row of ``ROWS``."""
    kind, changes = ROWS[row]
    if row in WHOLE:
        return multimodal.tiny_config(kind)
    changes = CHANGES.get(kind, {}) | changes
    return _shrunk(CONFIG_MAPPING[kind], changes)


def _shrunk(kind: type[PretrainedConfig], changes: dict[str, Any]) -> PretrainedConfig:
    """Return a configuration with the small values of the fields it has, and ``changes``."""
    accepted = set(inspect.signature(kind.__init__).parameters) | set(
        getattr(kind, "__dataclass_fields__", {})
    )
    fields = {name: value for name, value in _SMALL.items() if name in accepted}
    if "kv_lora_rank" in accepted:  # latent attention has no groups of queries
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    defaults = getattr(kind, "sub_configs_defaults", {})
    for name, part in kind.sub_configs.items():
        own = dict(changes.get(name, {}))
        if part is AutoConfig and (spec := defaults.get(name)) is not None:
            part = CONFIG_MAPPING[own.pop("model_type", spec.model_type)]
        if part is not AutoConfig and name in accepted:
            fields[name] = _shrunk(part, own).to_dict()
    fields |= {name: value for name, value in changes.items() if name not in kind.sub_configs}
    return kind(**fields)


def tiny_model(row: str) -> PreTrainedModel:
    """Return a random model in float32 in which no two tensors are alike, norms and biases too."""
    if row in WHOLE:
        return multimodal.tiny_multimodal(WHOLE[row])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(row), dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    for module in model.modules():  # rows of padding are zero, as in any model that was trained
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            module.weight.data[module.padding_idx] = 0
    return model.eval()
