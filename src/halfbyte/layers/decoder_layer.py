"""A decoder layer of the Llama family with fused elementwise operations.

transformers' layers consist of small operations: a norm is six of them, a rotary embedding eight.
For the most common families, the layer is run here with the operations of elementwise.py on the
same modules. Nothing is copied, renamed or replaced, so adapters, checkpoints and generation are
not affected.

`fused` returns a callable that computes the same as the layer's own forward up to rounding (it
rounds less often), or None if the layer is not supported.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
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
from halfbyte.layers.long_attention import attend_long
from halfbyte.layers.mlp import gated_mlp
from halfbyte.layers.qkv import turned_heads
from halfbyte.layers.tiled_layer import tiled_layer
from halfbyte.linear.frozen import FrozenLinear
from halfbyte.linear.sequence_tiles import is_long


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
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Documents | None,
        scale: float,
        attention: Callable[..., Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention output [B, T, H · D] and, when recomputing, the stream after it.

        ``attention`` has the arguments and the result of `attend`, which it is by default.
        """
        if self._attended is None:
            self._attended = CheckpointedAttention(q, k, v, documents, scale, attention)
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
        if self.is_tiled(x, read=read):
            return self._by_tiles(x, cos, sin, documents, read=read, checkpoint=checkpoint)
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

    def is_tiled(self, x: Tensor, *, read: bool = True) -> bool:
        """Return whether a call with x [B, T, hidden] computes by tiles (layers/tiled_layer.py).

        Not if all activations are to be kept for backward: tiles keep less, and recompute it.
        """
        kept = read and torch.is_grad_enabled()
        return self.can_tile and not kept and is_long(x.shape[0], x.shape[1])

    @property
    def can_tile(self) -> bool:
        """Whether its parts treat every token alike: a mixture's router counts them all."""
        return self._mixture is None and self._sinks is None

    def _by_tiles(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        documents: Documents | None,
        *,
        read: bool,
        checkpoint: AttentionCheckpoint | None,
    ) -> Tensor:
        scale, first = self._attention.scaling, checkpoint is not None and not checkpoint.tensors

        def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
            if checkpoint is not None:
                return checkpoint.attend(q, k, v, documents, scale, attend_long)
            return attend_long(q, k, v, documents, scale), None

        leave = checkpoint.leave if checkpoint is not None and first else None
        parts = _Parts(self)
        return tiled_layer(parts, x, cos, sin, attention, read=read, on_residual=leave)

    def _heads(
        self, y: Tensor, cos: Tensor, sin: Tensor, *, read: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v, rotated, [B, T, heads, n]; not computed if that is not needed."""
        projections = self._projections
        if not self._head_norms:
            q, k, v = turned_heads(y, projections, cos, sin, read=read)
        else:
            q, k, v = (project(y).unflatten(-1, (-1, self.head_dim)) for project in projections)
            norm_q, norm_k = self._head_norms
            weights = norm_q.weight, norm_k.weight
            eps = norm_q.variance_epsilon, norm_k.variance_epsilon
            q, k = qk_norm_rotary(q, k, *weights, *eps, cos, sin)
        return q, k, v


class _Parts:
    """The parts of a fused layer, as `tiled_layer` calls them."""

    def __init__(self, layer: FusedLayer) -> None:
        self._layer = layer

    def linears(self, part: str) -> Sequence[FrozenLinear]:
        layer = self._layer
        found: dict[str, Sequence[FrozenLinear]] = {
            "heads": layer._projections,
            "output": (layer._out,),
            "mlp": layer._mlp,
        }
        return found[part]

    def heads(
        self, x: Tensor, cos: Tensor, sin: Tensor, *, read: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        norm = self._layer._first
        y, residual = rms_norm_beside(x, norm.weight, norm.variance_epsilon)
        return *self._layer._heads(y, cos, sin, read=read), residual

    def output(self, attended: Tensor, *, read: bool = True) -> Tensor:
        project = self._layer._out
        result: Tensor = project(attended) if read else project.unread(attended)
        return result

    def mlp(self, h: Tensor, *, read: bool = True) -> Tensor:
        norm = self._layer._second
        y, h = rms_norm_beside(h, norm.weight, norm.variance_epsilon)
        d = gated_mlp(y, *self._layer._mlp, read=read)
        return h + d if read else unread_sum(h, d)


def fused(layer: nn.Module) -> FusedLayer | None:
    """Return a fused forward of ``layer``, or None if it is not supported."""
    spec = spec_of(layer)
    if spec is None or spec.why_not(layer) is not None:
        return None
    # The fused operations compute no gradient for the weight of a norm that is trained in full.
    if any(type(n).__name__ != spec.norm or n.weight.requires_grad for n in spec.norms_of(layer)):
        return None
    return FusedLayer(layer, spec)
