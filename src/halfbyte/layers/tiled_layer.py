"""A decoder layer computed by tiles of the sequence, for parts too long to be computed at once.

    heads    q, k, v = rotary(projections(norm(x)))      by tiles; keeps x
    attention                                            whole; keeps q, k, v, output, log-sum-exp
    output   h = x + projection(attention)               by tiles; keeps attention's output
    mlp      y = h + mlp(norm(h))                        by tiles; keeps h

Each of the three recomputes a tile's activations in its backward, and then differentiates this
tile: what exists inside an MLP, 86 kB a token in an 8B model, exists for one tile only. That costs
nothing in a layer that is recomputed anyway: what would be recomputed before backward is recomputed
within it, and nothing twice. Gradients of adapters are summed over the tiles in float32.

Backward works in place: the gradient of the layer's output becomes that of h and then that of x, in
the memory it came in, and the gradients of q, k and v are written over q, k and v
(layers/long_attention.py). So it cannot run twice.

Values are those of the untiled layer up to rounding: rows of a product do not depend on each other.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from halfbyte.layers.attention import copy_heads
from halfbyte.linear.frozen import FrozenLinear
from halfbyte.linear.sequence_tiles import Tile, tiles_of

Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


class LayerParts(Protocol):
    """The parts of a layer; each treats every token alike."""

    def linears(self, part: str) -> Sequence[FrozenLinear]:
        """Return the linears of ``heads``, ``output`` or ``mlp``."""

    def heads(
        self, x: Tensor, cos: Tensor, sin: Tensor, *, read: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return q, k, v and x; with ``read`` false q, k, v may be placeholders."""

    def output(self, attended: Tensor, *, read: bool = True) -> Tensor:
        """Return the projection of attention's output, or a placeholder."""

    def mlp(self, h: Tensor, *, read: bool = True) -> Tensor:
        """Return h and the MLP of its norm, or a placeholder."""


def tiled_layer(
    layer: LayerParts,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    attend: Attend,
    *,
    read: bool,
    on_residual: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Return the layer's output [B, T, H].

    Args:
        layer: Its parts.
        x: [B, T, H].
        cos: [1 or B, T, n], of the positions.
        sin: Likewise.
        attend: Returns attention's output [B, T, heads · n] for q, k and v, and the stream after
            its projection if that is known. It may overwrite q, k and v in backward.
        read: Whether the values of the output are read; otherwise it is a placeholder.
        on_residual: Called with the stream after attention [B, T, H], if that was computed.
    """

    def parameters(part: str) -> list[nn.Parameter]:
        linears = layer.linears(part)
        return [p for linear in linears for p in linear.parameters() if p.requires_grad]

    q, k, v, residual = _Heads.apply(x, cos, sin, layer, *parameters("heads"))  # type: ignore[no-untyped-call]
    attended, known = attend(q, k, v)
    del q, k, v  # without gradients, nothing else keeps them
    h = _Output.apply(attended, residual, known, layer, *parameters("output"))  # type: ignore[no-untyped-call]
    del attended, residual
    if known is None and on_residual is not None:
        on_residual(h.detach())
    return _MLP.apply(h, layer, read, *parameters("mlp"))  # type: ignore[no-any-return, no-untyped-call]


def _each(x: Tensor, linears: Sequence[FrozenLinear]) -> Iterator[Tile]:
    """Yield the tiles of x [B, T, ...]; masks of dropout are those of the tile while it is used."""
    adapters: list[Any] = [linear.adapter for linear in linears if linear.adapter is not None]
    clock = adapters[0].clock if adapters else None
    for tile in tiles_of(x.shape[0], x.shape[1]):
        if clock is not None:
            clock.tile = tile
        try:
            yield tile
        finally:
            if clock is not None:
                clock.tile = None


def _of(x: Tensor, tile: Tile) -> Tensor:
    """Return a tile [1, t, ...] of x [B, T, ...], or of one row for all."""
    row = tile.row if x.shape[0] > 1 else 0
    return x[row : row + 1, tile.start : tile.stop]


class _Sums:
    """The sums of the gradients of parameters over tiles."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self._sums: list[Tensor | None] = [None] * len(self.parameters)

    def gradients(
        self, outputs: Sequence[Tensor], x: Tensor, dys: Sequence[Tensor]
    ) -> Tensor | None:
        """Add the gradients of a tile; return that of x, if x requires one."""
        leaves = [x] * x.requires_grad + self.parameters
        made = torch.autograd.grad(outputs, leaves, dys, allow_unused=True)
        found: list[Tensor | None] = list(made)  # None of what the outputs do not depend on
        dx = found.pop(0) if x.requires_grad else None
        for i, new in enumerate(found):
            if new is None:
                continue
            old = self._sums[i]
            self._sums[i] = new.clone() if old is None else old.add_(new)
        return dx

    def total(self) -> list[Tensor | None]:
        return self._sums


def _own(dy: Tensor) -> Tensor:
    """Return a gradient that may be written to: itself, unless elements share memory."""
    return dy if dy.is_contiguous() else dy.contiguous()


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, layer: LayerParts, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.layer, ctx.parameters = layer, parameters
        ctx.save_for_backward(x, cos, sin)
        whole: Tensor | None = None
        counts: list[int] = []
        for tile in _each(x, layer.linears("heads")):
            *heads, _ = layer.heads(_of(x, tile), _of(cos, tile), _of(sin, tile))
            if whole is None:  # side by side, as one product of all rows would leave them
                counts = [each.shape[2] for each in heads]
                shape = (*x.shape[:2], sum(counts), heads[0].shape[3])
                whole = heads[0].new_empty(shape)
            for place, each in zip(torch.split(_of(whole, tile), counts, 2), heads, strict=True):
                copy_heads(place, each)
            del heads, each
        assert whole is not None
        return *torch.split(whole, counts, 2), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, cos, sin = ctx.saved_tensors
        *d_heads, d_residual = grads
        dx = _own(d_residual) if ctx.needs_input_grad[0] else None
        sums = _Sums(ctx.parameters)
        for tile in _each(x, ctx.layer.linears("heads")):
            own = _of(x, tile).detach().requires_grad_(dx is not None)
            with torch.enable_grad():
                *heads, residual = ctx.layer.heads(own, _of(cos, tile), _of(sin, tile), read=False)
            outputs, dys = heads, [_of(d, tile) for d in d_heads]
            if dx is not None:
                outputs, dys = [*outputs, residual], [*dys, _of(dx, tile)]
            found = sums.gradients(outputs, own, dys)
            if dx is not None and found is not None:
                _of(dx, tile).copy_(found)
            del heads, residual, outputs, dys, found
        return dx, None, None, None, *sums.total()


class _Output(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        attended: Tensor,
        residual: Tensor,
        known: Tensor | None,
        layer: LayerParts,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.layer, ctx.parameters = layer, parameters
        ctx.save_for_backward(attended)
        if known is not None:
            return known.view_as(known)
        h = torch.empty_like(residual)
        for tile in _each(attended, layer.linears("output")):
            torch.add(layer.output(_of(attended, tile)), _of(residual, tile), out=_of(h, tile))
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (attended,) = ctx.saved_tensors
        dh, d_attended = grads[0], torch.empty_like(attended)
        sums = _Sums(ctx.parameters)
        for tile in _each(attended, ctx.layer.linears("output")):
            own = _of(attended, tile).detach().requires_grad_()
            with torch.enable_grad():
                o = ctx.layer.output(own, read=False)
            found = sums.gradients([o], own, [_of(dh, tile)])
            assert found is not None
            _of(d_attended, tile).copy_(found)
            del o, found
        return d_attended, dh, None, None, *sums.total()


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, layer: LayerParts, read: bool, *parameters: Tensor) -> Tensor:
        ctx.layer, ctx.parameters = layer, parameters
        ctx.save_for_backward(h)
        if not read:
            return h.new_zeros(1).expand(h.shape)
        y = torch.empty_like(h)
        for tile in _each(h, layer.linears("mlp")):
            _of(y, tile).copy_(layer.mlp(_of(h, tile)))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (h,) = ctx.saved_tensors
        dh = _own(grads[0])
        sums = _Sums(ctx.parameters)
        for tile in _each(h, ctx.layer.linears("mlp")):
            own = _of(h, tile).detach().requires_grad_()
            with torch.enable_grad():
                y = ctx.layer.mlp(own, read=False)
            found = sums.gradients([y], own, [_of(dh, tile)])
            assert found is not None
            _of(dh, tile).copy_(found)
            del y, found
        return dh, None, None, *sums.total()
