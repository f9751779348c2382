"""A decoder layer of the Llama family, with everything between its products fused.

transformers' layers are right for every model and made of small operations: a norm is six of them,
a rotary turn eight. For the families most people train, the same layer is run here with the
operations of elementwise.py, over the very same modules: nothing is copied, renamed or replaced,
so adapters, checkpoints and generation see the layer they know.

`fused` says whether a layer is one of these; what it returns computes what the layer's own forward
computes, but for rounding (it rounds less often).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from halfbyte.model.elementwise import add_rms_norm, rms_norm, rotary, swiglu

# The names of transformers' classes, which this file was read beside. Others, derived or not, may
# do more than these.
FAMILIES = {
    "LlamaDecoderLayer": "LlamaRMSNorm",
    "MistralDecoderLayer": "MistralRMSNorm",
    "Qwen2DecoderLayer": "Qwen2RMSNorm",
    "Qwen3DecoderLayer": "Qwen3RMSNorm",
}


def fused(layer: nn.Module) -> Callable[..., Tensor] | None:
    """Return what runs ``layer`` fused, or None if it is not one that is known.

    What is returned takes what the layer takes by name (``position_embeddings``,
    ``attention_mask``; a cache is not for training) and returns its output [B, T, hidden].
    """
    norm = FAMILIES.get(type(layer).__name__)
    if norm is None or not type(layer).__module__.startswith("transformers.models."):
        return None
    parts: Any = layer
    norms = [parts.input_layernorm, parts.post_attention_layernorm]
    norms += [m for n in ("q_norm", "k_norm") if (m := getattr(parts.self_attn, n, None))]
    known = all(type(n).__name__ == norm and not n.weight.requires_grad for n in norms)
    if not known or parts.self_attn.config.hidden_act != "silu":
        return None

    def run(
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        first, second, attention, mlp = norms[0], norms[1], parts.self_attn, parts.mlp
        y = rms_norm(hidden_states, first.weight, first.variance_epsilon)
        heads = _attend(attention, y, position_embeddings, attention_mask, others)
        y, h = add_rms_norm(
            attention.o_proj(heads), hidden_states, second.weight, second.variance_epsilon
        )
        result: Tensor = h + mlp.down_proj(swiglu(mlp.gate_proj(y), mlp.up_proj(y)))
        return result

    return run


def _attend(
    attention: Any,
    y: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    mask: Tensor | None,
    others: dict[str, Any],
) -> Tensor:
    """Return what goes into the output projection, [B, T, heads · n]."""
    if others.pop("past_key_values", None) is not None:
        raise ValueError("a fused layer has no use for a cache: call the layer itself")
    config = attention.config
    shape = (*y.shape[:-1], -1, attention.head_dim)
    q, k = attention.q_proj(y).view(shape), attention.k_proj(y).view(shape)
    v = attention.v_proj(y).view(shape)
    if hasattr(attention, "q_norm"):
        q = rms_norm(q, attention.q_norm.weight, attention.q_norm.variance_epsilon)
        k = rms_norm(k, attention.k_norm.weight, attention.k_norm.variance_epsilon)
    cos, sin = position_embeddings
    q, k = rotary(q, cos, sin), rotary(k, cos, sin)
    window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    out, _ = ALL_ATTENTION_FUNCTIONS[config._attn_implementation](
        attention,
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        mask,
        dropout=0.0,
        scaling=attention.scaling,
        sliding_window=window,
        **others,
    )
    return torch.flatten(out, 2)
