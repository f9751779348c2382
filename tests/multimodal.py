"""Tiny random models of more than text, one of each family whose text decoder is trained.

Every family has encoders and projectors of its own, so each has a row of the few sizes that its
configuration requires to be consistent. Their random weights differ in every element, norms and
biases included.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from tests.tiny import tiny_tokenizer

TEXT: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
# Of Qwen's encoders and those like them: other names for the same, and the width of the decoder.
_QWEN_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "out_hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 24,
    "num_position_embeddings": 16,
}
_QWEN_TOKENS = {
    "image_token_id": 390,
    "video_token_id": 391,
    "vision_start_token_id": 392,
    "vision_end_token_id": 393,
}
_GEMMA_TOKENS = {"boi_token_id": 388, "eoi_token_id": 389, "image_token_id": 390}


def _rope(*sections: int, **more: Any) -> dict[str, Any]:
    """Rotary embeddings whose frequencies are divided among time, height and width."""
    parameters = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}
    return {"rope_parameters": parameters | more}


def _llava(text: str, vision: str, token: str = "image_token_index", **more: Any) -> dict[str, Any]:
    """A decoder and an encoder of other families, with a projector."""
    return {
        "text_config": TEXT | {"model_type": text, "sliding_window": 16},
        "vision_config": _VISION | {"model_type": vision},
        token: 390,
        **more,
    }


_EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
_LINEAR_ATTENTION = {
    **_rope(1, 0, 0, partial_rotary_factor=0.25),
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "aya_vision": _llava("cohere2", "siglip_vision_model", alignment_intermediate_size=32),
    "cohere2_vision": _llava(
        "cohere2", "siglip_vision_model", "image_token_id", alignment_intermediate_size=32
    ),
    "gemma3": _llava("gemma3_text", "siglip_vision_model", mm_tokens_per_image=4),
    "gemma4": {
        "text_config": TEXT
        | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 400}
        | {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
        | {"num_kv_shared_layers": 2, "global_head_dim": 8, "sliding_window": 16},
        "vision_config": _VISION
        | {"head_dim": 8, "num_key_value_heads": 2, "pooling_kernel_size": 1},
        "audio_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        **_GEMMA_TOKENS,
    },
    "glm4v": {
        "text_config": TEXT | _rope(1, 1, 0, partial_rotary_factor=0.5),
        "vision_config": _QWEN_VISION | {"image_size": 28},
        **_QWEN_TOKENS,
    },
    "idefics2": _llava(
        "mistral",
        "idefics2",
        "image_token_id",
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": 2,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "num_key_value_heads": 1,
            "resampler_head_dim": 8,
        },
    ),
    "idefics3": _llava("llama", "idefics3_vision", "image_token_id"),
    "internvl": _llava("qwen2", "internvl_vision", "image_token_id"),
    "lfm2_vl": {
        "text_config": TEXT | {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
        "vision_config": _VISION | {"model_type": "siglip2_vision_model", "num_patches": 4},
        "image_token_id": 390,
        "projector_hidden_size": 16,
    },
    "llama4": {
        "text_config": TEXT | {"intermediate_size_mlp": 48, "num_local_experts": 2},
        "vision_config": _VISION
        | {"intermediate_size": 64, "vision_output_dim": 16}
        | {"projector_input_dim": 16, "projector_output_dim": 16},
        **_GEMMA_TOKENS,
    },
    "llava": _llava("llama", "clip_vision_model"),
    "llava_next": _llava("mistral", "clip_vision_model"),
    "llava_onevision": _llava("qwen2", "siglip_vision_model"),
    "mistral3": _llava("mistral", "pixtral"),
    "mllama": {
        "text_config": TEXT
        | {"cross_attention_layers": [1]}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "vision_output_dim": 32,
            "intermediate_layers_indices": [0],
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        "image_token_id": 390,
    },
    "qwen2_vl": {
        "text_config": TEXT | _rope(1, 1, 2),
        "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2},
        **_QWEN_TOKENS,
    },
    "qwen2_5_vl": {
        "text_config": TEXT | _rope(1, 1, 2),
        "vision_config": _QWEN_VISION | {"fullatt_block_indexes": [0]},
        **_QWEN_TOKENS,
    },
    "qwen3_vl": {
        "text_config": TEXT | _rope(1, 1, 2),
        "vision_config": _QWEN_VISION | {"deepstack_visual_indexes": [0]},
        **_QWEN_TOKENS,
    },
    "qwen3_vl_moe": {
        "text_config": TEXT | _EXPERTS | _rope(1, 1, 2),
        "vision_config": _QWEN_VISION | {"deepstack_visual_indexes": [0]},
        **_QWEN_TOKENS,
    },
    "qwen3_5": {
        "text_config": TEXT | _LINEAR_ATTENTION,
        "vision_config": _QWEN_VISION,
        **_QWEN_TOKENS,
    },
    "qwen3_5_moe": {
        "text_config": TEXT
        | _EXPERTS
        | _LINEAR_ATTENTION
        | {"shared_expert_intermediate_size": 16},
        "vision_config": _QWEN_VISION,
        **_QWEN_TOKENS,
    },
    "smolvlm": _llava("llama", "smolvlm_vision", "image_token_id"),
    "voxtral": {
        "text_config": TEXT | {"model_type": "llama"},
        "audio_config": _VISION,
        "audio_token_id": 390,
    },
}


def tiny_config(family: str) -> PretrainedConfig:
    """The configuration of a tiny model of a family, by its ``model_type``."""
    return AutoConfig.for_model(family, **FAMILIES[family])


def tiny_multimodal(family: str) -> PreTrainedModel:
    """A random whole model in float32, the same on every call."""
    from halfbyte.layers.multimodal import class_name

    config = tiny_config(family)
    name = class_name(config)
    assert name is not None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = getattr(transformers, name)(config)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def write_multimodal(directory: Path, family: str) -> PreTrainedModel:
    """Write a tiny model with a tokenizer and a processor's file to ``directory``; return it."""
    model = tiny_multimodal(family)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text('{"image_size": 28}')
    return model
