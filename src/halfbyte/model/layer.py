"""A decoder layer of the Llama family, with everything between its products fused.

transformers' layers are right for every model and made of small operations: a norm is six of them,
a rotary turn eight. For the families most people train, the same layer is run here with the
operations of elementwise.py, over the very same modules: nothing is copied, renamed or replaced,
so adapters, checkpoints and generation see the layer they know.

`fused` says whether a layer is one of these; what it returns computes what the layer's own forward
computes, but for rounding (it rounds less often).
"""

from typing import Any

from torch import Tensor, nn

from halfbyte.model.documents import Documents, attend
from halfbyte.model.elementwise import (
    add_rms_norm,
    rms_norm,
    rms_norm_beside,
    rotary,
    swiglu,
    unread_sum,
)
from halfbyte.nf4.linear import FrozenLinear

# The names of transformers' classes, which this file was read beside. Others, derived or not, may
# do more than these.
FAMILIES = {
    "LlamaDecoderLayer": "LlamaRMSNorm",
    "MistralDecoderLayer": "MistralRMSNorm",
    "Qwen2DecoderLayer": "Qwen2RMSNorm",
    "Qwen3DecoderLayer": "Qwen3RMSNorm",
}


class FusedLayer:
    """Runs a decoder layer; see `fused`.

    Attributes:
        window: How far back attention sees at most, or None for all the way.
        head_dim: Width of a head.
    """

    def __init__(self, layer: nn.Module) -> None:
        parts: Any = layer
        self._first, self._second = parts.input_layernorm, parts.post_attention_layernorm
        self._attention, self._mlp = parts.self_attn, parts.mlp
        self.head_dim: int = self._attention.head_dim
        config = self._attention.config
        self.window: int | None = getattr(
            self._attention, "sliding_window", getattr(config, "sliding_window", None)
        )

    def __call__(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        documents: Documents | None = None,
        *,
        read: bool = True,
    ) -> Tensor:
        """Return the layer's output [B, T, hidden].

        Args:
            x: [B, T, hidden].
            cos: [1 or B, T, head_dim], of the positions.
            sin: Likewise.
            documents: See `attend`. Nobody's longer than ``window``.
            read: Whether anybody reads the values of the output. If not, it is a stand-in with
                the backward of the real one, and saves the last product of the layer.
        """
        y, residual = rms_norm_beside(x, self._first.weight, self._first.variance_epsilon)
        heads = self._heads(y, cos, sin, documents)
        y, h = add_rms_norm(
            self._attention.o_proj(heads),
            residual,
            self._second.weight,
            self._second.variance_epsilon,
        )
        inner = swiglu(self._mlp.gate_proj(y), self._mlp.up_proj(y))
        if not read:
            return unread_sum(h, self._mlp.down_proj.unread(inner))
        result: Tensor = h + self._mlp.down_proj(inner)
        return result

    def _heads(self, y: Tensor, cos: Tensor, sin: Tensor, documents: Documents | None) -> Tensor:
        """Return what goes into the output projection, [B, T, heads · n]."""
        attention = self._attention
        q, k, v = (
            project(y).unflatten(-1, (-1, self.head_dim))
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):
            q = rms_norm(q, attention.q_norm.weight, attention.q_norm.variance_epsilon)
            k = rms_norm(k, attention.k_norm.weight, attention.k_norm.variance_epsilon)
        q, k = rotary(q, k, cos, sin)
        return attend(q, k, v, documents, attention.scaling)


def fused(layer: nn.Module) -> FusedLayer | None:
    """Return what runs ``layer`` fused, or None if it is not one that is known."""
    norm = FAMILIES.get(type(layer).__name__)
    if norm is None or not type(layer).__module__.startswith("transformers.models."):
        return None
    parts: Any = layer
    norms = [parts.input_layernorm, parts.post_attention_layernorm]
    norms += [m for n in ("q_norm", "k_norm") if (m := getattr(parts.self_attn, n, None))]
    known = all(type(n).__name__ == norm and not n.weight.requires_grad for n in norms)
    linear = isinstance(parts.mlp.down_proj, FrozenLinear)
    if not known or not linear or parts.self_attn.config.hidden_act != "silu":
        return None
    return FusedLayer(layer)
