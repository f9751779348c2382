"""Gated DeltaNet in GGUF files: how the parameters of Qwen 3.5 and Qwen3-Next are rearranged.

A layer has fewer heads of keys than of values. transformers groups the heads of values by the head
of keys they share; llama.cpp repeats the keys as a whole, so for Qwen 3.5 the heads of values are
put in that order, in every parameter that has them. Qwen3-Next keeps queries, keys, values and
gates of a head of keys together, and llama.cpp wants all queries first, then keys, values; gates
are a tensor of their own. The decay is stored as -exp(A_log).
"""

import torch
from gguf import GGUFWriter
from torch import Tensor
from transformers import PretrainedConfig

from halfbyte.checkpoint.gguf_forms import (
    Form,
    columns_in_order,
    convolution,
    decay,
    plain,
    rows_in_order,
)

SECTIONS = [11, 11, 10]
"""How many rotary frequencies follow time, height and width, where a configuration says nothing."""


def _values_in_order(config: PretrainedConfig, width: int) -> Tensor:
    """Return the rows of values, of ``width`` a head, in llama.cpp's order."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    rows = torch.arange(values * width).view(keys, values // keys, width)
    return rows.transpose(0, 1).reshape(-1)


def _named(heads: Tensor, conv: Tensor, values: Tensor | None) -> dict[str, Form]:
    forms = {
        "A_log": decay("ssm_a", heads),
        "dt_bias": rows_in_order(("ssm_dt.bias", heads)),
        "conv1d.weight": convolution("ssm_conv1d.weight", conv),
        "norm.weight": plain("ssm_norm.weight"),
    }
    if values is not None:
        forms["out_proj.weight"] = columns_in_order("ssm_out.weight", values)
    return {f"linear_attn.{name}": form for name, form in forms.items()}


def qwen35(config: PretrainedConfig) -> dict[str, Form]:
    """Return the forms of a layer's parameters, by their names in it."""
    width = config.linear_value_head_dim
    others = 2 * config.linear_num_key_heads * config.linear_key_head_dim
    values, heads = _values_in_order(config, width), _values_in_order(config, 1)
    mixed = torch.cat((torch.arange(others), others + values))
    rows = {
        "in_proj_qkv": ("attn_qkv.weight", mixed),
        "in_proj_z": ("attn_gate.weight", values),
        "in_proj_b": ("ssm_beta.weight", heads),
        "in_proj_a": ("ssm_alpha.weight", heads),
    }
    forms = {f"linear_attn.{name}.weight": rows_in_order(pair) for name, pair in rows.items()}
    return forms | _named(heads, mixed, values)


def qwen3_next(config: PretrainedConfig) -> dict[str, Form]:
    """Return the forms of a layer's parameters, by their names in it."""
    keys, size = config.linear_num_key_heads, config.linear_key_head_dim
    values = config.linear_num_value_heads // keys * config.linear_value_head_dim
    parts = [size, size, values, values]
    rows = torch.split(torch.arange(keys * sum(parts)).view(keys, -1), parts, 1)
    query, key, value, gate = (part.reshape(-1) for part in rows)
    mixed = rows_in_order(
        ("attn_qkv.weight", torch.cat((query, key, value))), ("attn_gate.weight", gate)
    )
    heads = torch.arange(config.linear_num_value_heads)
    channels = torch.arange(keys * (2 * size + values))
    forms = _named(heads, channels, None)
    return {"linear_attn.in_proj_qkvz.weight": mixed, **forms}


def add_keys(writer: GGUFWriter, config: PretrainedConfig) -> None:
    """Add the keys that are computed from several options, or are lists."""
    writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
    writer.add_full_attention_interval(config.layer_types.index("full_attention") + 1)
    if writer.arch.startswith("qwen35"):
        sections = config.rope_parameters.get("mrope_section") or SECTIONS
        writer.add_rope_dimension_sections([*sections, 0])
