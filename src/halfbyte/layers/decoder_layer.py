"""A decoder layer of the Llama family with fused elementwise operations.

transformers' layers consist of small operations: a norm is six of them, a rotary embedding eight.
For the most common families, the layer is run here with the operations of elementwise.py on the
same modules. Nothing is copied, renamed or replaced, so adapters, checkpoints and generation are
not affected.

`fused` returns a callable that computes the same as the layer's own forward up to rounding (it
rounds less often), or None if the layer is not supported.
"""

from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from halfbyte.layers.attention import Documents, attend
from halfbyte.layers.attention_checkpoint import CheckpointedAttention
from halfbyte.layers.elementwise import (
    add_rms_norm,
    qk_norm_rotary,
    rms_norm_beside,
    unread_sum,
)
from halfbyte.layers.families import LayerSpec, spec_of
from halfbyte.layers.flash_attention import attend_with_sinks
from halfbyte.layers.gated_experts import outputs_unread
from halfbyte.layers.mlp import gated_mlp
from halfbyte.layers.qkv import turned_heads


class AttentionCheckpoint:
    """Tensors that a layer's forward leaves for its recomputation, so that less is recomputed.

    Attributes:
        tensors: The residual stream between attention and MLP, then the tensors of
            `CheckpointedAttention`. They may be replaced by copies before recomputation.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._attended: CheckpointedAttention | None = None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention output [B, T, H · D] and, when recomputing, the stream after it."""
        if self._attended is None:
            self._attended = CheckpointedAttention(q, k, v, documents, scale)
            return self._attended.tensors[0], None
        (h, *rest), self.tensors = self.tensors, []
        return self._attended.again(q, k, v, rest), h

    def leave(self, h: Tensor) -> None:
        """Store the stream after attention, [B, T, hidden], in the first forward."""
        assert self._attended is not None
        self.tensors, self._attended.tensors = [h, *self._attended.tensors], []


class FusedLayer:
    """Runs a decoder layer; see `fused`.

    Attributes:
        window: Size of the sliding attention window that documents must fit into, or None without
            one. With sinks, windows are computed.
        head_dim: Width of a head.
    """

    def __init__(self, layer: nn.Module, spec: LayerSpec) -> None:
        parts: Any = layer
        self._first, self._second, *self._head_norms = spec.norms_of(layer)
        self._attention = parts.self_attn
        q, k, v, self._out, *self._mlp = spec.linears_of(layer)
        self._mixture = spec.mixture_of(layer)
        self._projections = q, k, v
        self.head_dim: int = self._attention.head_dim
        config = self._attention.config
        self.window: int | None = getattr(
            self._attention, "sliding_window", getattr(config, "sliding_window", None)
        )
        self._sinks: Tensor | None = getattr(self._attention, "sinks", None)
        if self._sinks is not None:
            self._own_window, self.window = self.window, None

    def __call__(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        documents: Documents | None = None,
        *,
        read: bool = True,
        checkpoint: AttentionCheckpoint | None = None,
    ) -> Tensor:
        """Return the layer's output [B, T, hidden].

        Args:
            x: [B, T, hidden].
            cos: [1 or B, T, head_dim], of the positions.
            sin: Likewise.
            documents: See `attend`. None may be longer than ``window``.
            read: Whether the values of the output are read. If not, it is a placeholder with the
                same backward, which saves the last product of the layer.
            checkpoint: If empty, it is filled for the next run on the same input; otherwise it
                replaces the computation of attention and its output projection. Attention with
                sinks leaves it empty, and is computed again.
        """
        if self._sinks is not None:
            checkpoint = None
        y, residual = rms_norm_beside(x, self._first.weight, self._first.variance_epsilon)
        q, k, v = self._heads(y, cos, sin)
        scale, known = self._attention.scaling, None
        if self._sinks is not None:
            heads = attend_with_sinks(q, k, v, documents, scale, self._own_window, self._sinks)
        elif checkpoint is None:
            heads = attend(q, k, v, documents, scale)
        else:
            heads, known = checkpoint.attend(q, k, v, documents, scale)
        project, norm = self._out, self._second
        o = project(heads) if known is None else project.unread(heads)
        y, h = add_rms_norm(o, residual, norm.weight, norm.variance_epsilon, known)
        if checkpoint is not None and known is None:
            checkpoint.leave(h)
        if self._mixture is None:
            d = gated_mlp(y, *self._mlp, read=read)
        else:
            with nullcontext() if read else outputs_unread():
                d = self._mixture(y)
            d = d[0] if isinstance(d, tuple) else d  # gpt-oss's also returns what the router said
        result: Tensor = h + d if read else unread_sum(h, d)
        return result

    def _heads(self, y: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v, rotated, [B, T, heads, n]."""
        projections = self._projections
        if not self._head_norms:
            q, k, v = turned_heads(y, projections, cos, sin)
        else:
            q, k, v = (project(y).unflatten(-1, (-1, self.head_dim)) for project in projections)
            norm_q, norm_k = self._head_norms
            weights = norm_q.weight, norm_k.weight
            eps = norm_q.variance_epsilon, norm_k.variance_epsilon
            q, k = qk_norm_rotary(q, k, *weights, *eps, cos, sin)
        return q, k, v


def fused(layer: nn.Module) -> FusedLayer | None:
    """Return a fused forward of ``layer``, or None if it is not supported."""
    spec = spec_of(layer)
    if spec is None or spec.why_not(layer) is not None:
        return None
    # The fused operations compute no gradient for the weight of a norm that is trained in full.
    if any(type(n).__name__ != spec.norm or n.weight.requires_grad for n in spec.norms_of(layer)):
        return None
    return FusedLayer(layer, spec)
