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


def _audio(text: str, encoder: dict[str, Any], token: str = "audio_token_id") -> dict[str, Any]:
    """A decoder of another family, an encoder of sound, and a projector."""
    return {
        "text_config": TEXT | {"model_type": text},
        "audio_config": encoder,
        token: 390,
    }


_SAM = {
    "hidden_size": 16,
    "output_channels": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
    "window_size": 2,
    "global_attn_indexes": [0],
    "mlp_dim": 24,
}
_VQ = {
    "embed_dim": 8,
    "num_embeddings": 16,
    "codebook_size": 16,
    "latent_channels": 8,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "resolution": 28,
}
_QWEN_AUDIO = {
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "num_mel_bins": 8,
    "output_dim": 32,
    "downsample_hidden_size": 8,
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
    "voxtral": _audio("llama", _VISION),
    "aria": {
        "text_config": TEXT | {"moe_num_experts": 4},
        "vision_config": _VISION | {"model_type": "idefics3_vision"},
        "projector_patch_to_query_dict": {4: 2},
        "image_token_index": 390,
    },
    "cohere_compass": {
        "text_config": TEXT
        | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
        | {
            "rope_parameters": {
                kind: _rope(1, 1, 2)["rope_parameters"]
                for kind in ("sliding_attention", "full_attention")
            }
        },
        "vision_config": _QWEN_VISION | {"deepstack_visual_indexes": [0]},
        **_QWEN_TOKENS,
    },
    "deepseek_vl": _llava("llama", "siglip_vision_model", "image_token_id"),
    "deepseek_vl_hybrid": _llava(
        "llama",
        "siglip_vision_model",
        "image_token_id",
        high_res_vision_config=_SAM | {"model_type": "sam_vision_model"},
    ),
    "ernie4_5_vl_moe": {
        "text_config": TEXT
        | _rope(1, 1, 2)
        | {"moe_intermediate_size": [16, 16], "moe_num_experts": 4, "moe_k": 2}
        | {"moe_num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"]},
        "vision_config": _QWEN_VISION | {"in_channels": 3},
        **_QWEN_TOKENS,
    },
    "exaone4_5": {
        "text_config": TEXT | {"model_type": "exaone4", "sliding_window": 16},
        "vision_config": _QWEN_VISION | {"num_key_value_heads": 1, "fullatt_block_indexes": [0]},
        "image_token_id": 390,
        "video_token_id": 391,
    },
    "fuyu": {
        "text_config": TEXT | {"model_type": "persimmon"},
        "image_size": 28,
        "patch_size": 14,
        "image_token_id": 390,
    },
    "gemma4_unified": {
        "text_config": TEXT | {"sliding_window": 16, "global_head_dim": 8},
        "vision_config": {"patch_size": 4, "mm_embed_dim": 16, "mm_posemb_size": 4}
        | {"output_proj_dims": 16, "pooling_kernel_size": 1},
        "audio_config": {"audio_embed_dim": 16},
        **_GEMMA_TOKENS,
    },
    "glm4v_moe": {
        "text_config": TEXT
        | _rope(1, 1, 0, partial_rotary_factor=0.5)
        | {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2},
        "vision_config": _QWEN_VISION | {"image_size": 28},
        **_QWEN_TOKENS,
    },
    "glm46v": {
        "text_config": TEXT
        | _rope(1, 1, 0, partial_rotary_factor=0.5)
        | {"model_type": "glm4v_text"},
        "vision_config": _QWEN_VISION | {"image_size": 28, "model_type": "glm4v_vision"},
        **_QWEN_TOKENS,
    },
    "glm_ocr": {
        "text_config": TEXT | _rope(1, 1, 2),
        "vision_config": _QWEN_VISION | {"image_size": 28},
        **_QWEN_TOKENS,
    },
    "glmasr": _audio("llama", _VISION | {"model_type": "glmasr_encoder", "num_mel_bins": 8}),
    "got_ocr2": _llava("qwen2", "", vision_config=_SAM),
    "kimi_k25": {
        "text_config": TEXT
        | {"model_type": "deepseek_v3", "num_key_value_heads": 4, "first_k_dense_replace": 1}
        | {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 4}
        | {"v_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
        | {"num_experts_per_tok": 2, "moe_intermediate_size": 16},
        "vision_config": _VISION | {"pos_emb_height": 2, "pos_emb_width": 2, "pos_emb_time": 1},
        "projection_hidden_size": 16,
        **_QWEN_TOKENS,
    },
    "lighton_ocr": _llava("qwen3", "pixtral", "image_token_id"),
    "llava_next_video": _llava("llama", "clip_vision_model", video_token_index=391),
    "minicpmv4_6": _llava("qwen3_5_text", "", "image_token_id", vision_config=_VISION)
    | {"video_token_id": 391, "text_config": TEXT | _LINEAR_ATTENTION},
    "moss_transcribe_diarize": _audio("qwen3", _VISION | {"num_mel_bins": 8}),
    "ovis2": {
        "text_config": TEXT | {"model_type": "qwen2"},
        "vision_config": _VISION | {"vocab_size": 16},
        "vocab_size": 400,
        "hidden_size": 32,
        "image_token_id": 390,
        "visual_indicator_token_ids": [391, 392, 393, 394, 395],
    },
    "paddleocr_vl": {
        "text_config": TEXT | _rope(1, 1, 2),
        "vision_config": _VISION,
        **_QWEN_TOKENS,
    },
    "phi4_multimodal": TEXT
    | {"original_max_position_embeddings": 2048}
    | {"vision_config": _VISION | {"crop_size": 28, "image_token_id": 390}}
    | {
        "audio_config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 16,
            "depthwise_separable_out_channel": 16,
            "nemo_conv_channels": 16,
            "input_size": 16,
            "audio_token_id": 391,
        }
    },
    "qwen2_5_omni_thinker": {
        "text_config": TEXT | _rope(1, 1, 2),
        "vision_config": _QWEN_VISION | {"fullatt_block_indexes": [0]},
        "audio_config": _QWEN_AUDIO,
        "image_token_index": 390,
        "video_token_index": 391,
        "audio_token_index": 392,
        "vision_start_token_id": 393,
    },
    "qwen3_omni_moe_thinker": {
        "text_config": TEXT | _EXPERTS | _rope(1, 1, 2),
        "vision_config": _QWEN_VISION | {"deepstack_visual_indexes": [0]},
        "audio_config": _QWEN_AUDIO,
        **_QWEN_TOKENS,
        "audio_token_id": 394,
    },
    "qwen3_asr": _audio("qwen3", _QWEN_AUDIO | {"model_type": "qwen3_asr_encoder"}),
    "chameleon": TEXT
    | {"vq_config": _VQ, "vocabulary_map": {"<image>": 390, "IMGIMGAZ": 391, "IMGIMGBZ": 392}},
    "cosmos3_omni": {
        "text_config": TEXT | _rope(1, 1, 2) | {"model_type": "qwen3_vl_text"},
        "vision_config": _QWEN_VISION
        | {"model_type": "qwen3_vl_vision", "deepstack_visual_indexes": [0]},
        **_QWEN_TOKENS,
    },
    "emu3": {
        "text_config": TEXT,
        "vq_config": _VQ | {"hidden_size": 16},
        "vocabulary_map": {
            "<image>": 390,
            "<|extra_200|>": 391,
            "<|visual token 000000|>": 392,
            "<|visual token 000001|>": 393,
        },
    },
    "granite_docling": {
        "text_config": TEXT,
        "vision_config": _VISION | {"out_hidden_size": 32, "scale_factor": 2},
        "image_token_id": 390,
        "pad_token_id": 2,
    },
    "granite_speech": {
        "text_config": TEXT | {"model_type": "granite"},
        "encoder_config": {
            "input_dim": 8,
            "num_layers": 2,
            "hidden_dim": 16,
            "num_heads": 2,
            "dim_head": 8,
            "output_dim": 8,
            "context_size": 4,
            "max_pos_emb": 8,
        },
        "projector_config": _VISION
        | {"model_type": "blip_2_qformer", "vocab_size": 8, "encoder_hidden_size": 16},
        "audio_token_index": 390,
        "has_lora_adapter": False,
    },
    "hunyuan_vl": {
        "text_config": TEXT | {"pad_id": 2} | _rope(1, 1, 1, 1),
        "vision_config": _VISION | {"out_hidden_size": 32, "text_hidden_size": 32},
        "image_token_id": 390,
    },
    "hyperclovax_vision_v2": {
        "text_config": TEXT | {"model_type": "hyperclovax"},
        "vision_config": _QWEN_VISION
        | {"model_type": "qwen2_5_vl_vision", "fullatt_block_indexes": [0]},
        "image_token_id": 390,
        "video_token_id": 391,
    },
    "janus": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": _VISION | {"projection_dim": 32},
        "vq_config": _VQ | {"num_patches": 4, "projection_dim": 32, "image_token_embed_dim": 32},
        "image_token_id": 390,
    },
    "lfm3_vl": {
        "text_config": TEXT
        | {"model_type": "lfm3", "sliding_window": 16}
        | {"layer_types": ["conv", "full_attention"]},
        "vision_config": _VISION | {"num_key_value_heads": 1},
        "projector_hidden_size": 16,
        **_QWEN_TOKENS,
    },
    "minicpm_ocr": _llava("qwen3_5_text", "", "image_token_id", vision_config=_VISION)
    | {"video_token_id": 391, "text_config": TEXT | _LINEAR_ATTENTION},
    "minicpmv4_7": _llava("qwen3_5_text", "", "image_token_id", vision_config=_VISION)
    | {"video_token_id": 391, "text_config": TEXT | _LINEAR_ATTENTION},
    "minimax_m3_vl": {
        "text_config": TEXT
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "dense_intermediate_size": 48}
        | {"shared_intermediate_size": 16, "rotary_dim": 4, "index_n_heads": 2}
        | {"index_head_dim": 8, "index_block_size": 4, "index_topk_blocks": 2},
        "vision_config": _VISION,
        "image_token_id": 390,
        "video_token_id": 391,
    },
    "mistral_large4": {
        "text_config": TEXT
        | {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8}
        | {"qk_nope_head_dim": 4, "v_head_dim": 8, "index_head_dim": 8, "index_n_heads": 2}
        | {"index_topk": 8},
        "vision_config": _VISION | {"model_type": "pixtral"},
        "image_token_id": 390,
    },
    "molmo2": {
        "text_config": TEXT | {"additional_vocab_size": 0},
        "vision_config": _VISION
        | {"image_size": [28, 28], "num_key_value_heads": 2, "head_dim": 8},
        "adapter_config": {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 24,
            "text_hidden_size": 32,
            "vision_feature_layer": [0],
        },
        "image_patch_id": 390,
    },
    "qianfan_ocr": _llava(
        "qwen3",
        "",
        "image_token_id",
        vision_config=_VISION | {"image_size": [28, 28], "patch_size": [14, 14]},
    ),
    "qwen2_audio": _audio(
        "qwen2", _QWEN_AUDIO | {"model_type": "qwen2_audio_encoder"}, "audio_token_index"
    ),
    "qwen4_exp": {
        "text_config": TEXT
        | _EXPERTS
        | _LINEAR_ATTENTION
        | {"shared_expert_intermediate_size": 16, "indexer_n_heads": 2, "indexer_kv_heads": 1}
        | {"indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2},
        "vision_config": _QWEN_VISION,
        **_QWEN_TOKENS,
    },
    "video_llama_3": _llava("qwen2", "", "image_token_id", vision_config=_VISION),
    "video_llava": _llava("llama", "clip_vision_model", video_token_index=391),
    "vipllava": _llava("llama", "clip_vision_model", vision_feature_layers=[-1]),
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
