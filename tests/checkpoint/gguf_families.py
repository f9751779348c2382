"""A tiny random model of each architecture that is exported to GGUF, with unusual options."""

from typing import Any

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * place for place in range(8)],
    "long_factor": [2.0 + 0.5 * place for place in range(8)],
    "original_max_position_embeddings": 512,
}
_GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 20000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
}
_MULTIPLIERS = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "logits_scaling": 2.0,
}
_EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
_GLM = {
    **_EXPERTS,
    "head_dim": 32,
    "n_routed_experts": 4,
    "num_hidden_layers": 3,
    "routed_scaling_factor": 1.5,
}
_OSS = {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
# With larger weights, half a unit in the last place of them moves answers by 7e-5.
_DELTA_FLAT = {
    "initializer_range": 0.1,
    "num_hidden_layers": 4,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_SECTIONS = {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
_DELTA = {
    **_DELTA_FLAT,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        **_SECTIONS,
    },
}
_SHARED = {**_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 48}

# (model_type, options)
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"head_dim": 32, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {}),
    ("mistral", {}),
    ("mixtral", {"num_local_experts": 4, "head_dim": 32}),
    ("qwen2", {"rope_parameters": YARN}),
    ("qwen2_moe", {**_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 48}),
    ("qwen3", {"head_dim": 32}),
    ("qwen3_moe", {**_EXPERTS, "num_experts": 4, "head_dim": 32, "norm_topk_prob": True}),
    ("gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}),
    (
        "gemma3_text",
        {
            **{"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8},
            **{"num_hidden_layers": 6, "rope_parameters": _GEMMA3_ROPE},
        },
    ),
    ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 512}),
    ("phi3", {}),
    ("smollm3", {"num_hidden_layers": 4}),
    ("granite", _MULTIPLIERS),
    ("granitemoe", {**_MULTIPLIERS, "num_local_experts": 4}),
    ("granitemoeshared", {**_MULTIPLIERS, "num_local_experts": 4, "shared_intermediate_size": 48}),
    ("glm4", {"head_dim": 32}),
    ("glm4_moe", _GLM),
    ("glm4_moe", {**_GLM, "use_qk_norm": True, "attention_bias": True}),
    ("gpt_oss", {**_OSS, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    ("qwen3_5_text", _DELTA),
    ("qwen3_5_moe_text", {**_DELTA, **_SHARED}),
    ("qwen3_next", {**_DELTA_FLAT, **_SHARED}),
    ("olmo2", {}),
]
TIED = {"gemma2", "gemma3_text"}
UNTIED = {"qwen2_moe", "gpt_oss", "olmo2"}


def tied(family: str, wanted: bool) -> bool:
    """Return whether the head is the embedding, which some architectures prescribe."""
    return family in TIED or (wanted and family not in UNTIED)
