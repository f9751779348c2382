"""GGUF files of tiny models, written with the gguf package as llama.cpp's converter writes them."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.tiny import tiny_llama, tiny_tokenizer

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}


def _interleaved(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows as llama.cpp wants them: the two halves of each head's rotary pairs side by side."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    kind: Kind = Kind.Q8_0,
    *,
    tied: bool = True,
    extra: dict[str, np.ndarray[Any, Any]] | None = None,
    tokenizer: bool = True,
    name: str = "tiny",
) -> Path:
    """Write a random Llama of 2 layers, its matrices as ``kind``, norms as F32."""
    vocabulary = tiny_tokenizer()
    model = tiny_llama(vocabulary, tied=tied)
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer:
        _add_tokenizer(writer, vocabulary)
    for parameter, value in tensors_of(model).items():
        numbers = value.numpy()
        if ".attn_q" in parameter:
            numbers = _interleaved(numbers, config.num_attention_heads)
        elif ".attn_k." in parameter:
            numbers = _interleaved(numbers, config.num_key_value_heads)
        stored = Kind.F32 if numbers.ndim == 1 else kind
        packed = gguf.quants.quantize(numbers, stored)
        writer.add_tensor(parameter, packed, raw_dtype=stored)
    for parameter, numbers in (extra or {}).items():
        writer.add_tensor(parameter, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_family(path: Path, architecture: str, model: PreTrainedModel) -> Path:
    """Write any model under llama.cpp's names for ``architecture``, matrices as F16.

    Nothing is rearranged: the file holds other numbers than ``model``, but of the right shapes.
    """
    config = model.config
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    wide = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(wide)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_layer_norm_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_sliding_window(64)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tiny_tokenizer())
    if experts := getattr(config, "num_experts", None):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        numbers = value.numpy()
        stored = {name: numbers}
        if name.endswith("experts.gate_up_proj"):
            half = numbers.shape[1] // 2
            layer = f"blk.{name.split('.')[2]}"
            stored = {
                f"{layer}.ffn_gate_exps.weight": numbers[:, :half],
                f"{layer}.ffn_up_exps.weight": numbers[:, half:],
            }
        elif name.endswith("experts.down_proj"):
            stored = {f"blk.{name.split('.')[2]}.ffn_down_exps.weight": numbers}
        else:
            theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
            stored = {theirs or name: numbers}
        for key, part in stored.items():
            part = np.ascontiguousarray(part)
            writer.add_tensor(key, part if part.ndim == 1 else part.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors_of(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The model's tensors under llama.cpp's names."""
    named = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        for theirs, ours in _NAMES.items():
            name = name.replace(theirs, ours)
        named[name] = value
    return named


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    backend = tokenizer.backend_tokenizer
    tokens = sorted(backend.get_vocab(), key=backend.get_vocab().get)
    special = set(tokenizer.all_special_tokens)
    merges = json.loads(backend.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_chat_template(tokenizer.chat_template)
