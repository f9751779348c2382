"""The attention projections and rotary embeddings, as one operation on a GPU.

q, k and v of one x are one product (linear/group.py). q and k are then rotated by their positions,
and a separate kernel that reads and writes both takes a tenth of the time of the product. With
enough rows they are rotated in the product before a tile is written, otherwise by a kernel of its
own, in place. Backward rotates the gradients back and continues as any product.

The specification is the sequence of both operations, which runs everywhere else.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte.layers.elementwise import rotary
from halfbyte.linear.frozen import FrozenLinear
from halfbyte.linear.fused_lora import FusedLoraLinear
from halfbyte.linear.group import factors_of


def turned_heads(
    x: Tensor,
    projections: Sequence[FrozenLinear],
    cos: Tensor,
    sin: Tensor,
    *,
    read: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q and k rotated by their positions, and v, [B, T, heads, n] each.

    Args:
        x: [B, T, H], in a dtype of the products.
        projections: The linears of q, k and v.
        cos: [1 or B, T, n]; see `elementwise.rotary`.
        sin: Likewise.
        read: Whether the values are read. If not, they may be placeholders with the same backward.
    """
    call = projections[0].group.fused_alone(x, projections)
    if call is None:
        heads = (project(x).unflatten(-1, (-1, cos.shape[-1])) for project in projections)
        q, k, v = heads
        return *rotary(q, k, cos, sin), v
    return _TurnedHeads.apply(x, call, cos, sin, read, *factors_of(call.updates))  # type: ignore[no-any-return, no-untyped-call]


class _TurnedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        call: FusedLoraLinear,
        cos: Tensor,
        sin: Tensor,
        read: bool,
        *_factors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        from halfbyte.layers import triton_elementwise
        from halfbyte.linear import triton_matmul

        rows, cos, sin = x.reshape(-1, x.shape[-1]), cos.contiguous(), sin.contiguous()
        turn = triton_matmul.Turn(cos, sin, sum(call.outputs[:2]))
        turns = call.turns(rows, turn)
        p = call.into_a(rows)
        ctx.call = call
        ctx.save_for_backward(rows, p, cos, sin)
        if not read:  # backward reads neither
            zero, size = x.new_zeros(1), cos.shape[-1]
            return tuple(zero.expand(*x.shape[:-1], n // size, size) for n in call.outputs)
        y = call.forward(rows, p, turn if turns else None)
        parts = torch.split(y, call.outputs, 1)
        q, k, v = (part.view(*x.shape[:-1], -1, cos.shape[-1]) for part in parts)
        if not turns:
            q, k = triton_elementwise.rotary(q, k, cos, sin)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from halfbyte.layers import triton_elementwise

        rows, p, cos, sin = ctx.saved_tensors
        turned = triton_elementwise.rotary(grads[0], grads[1], cos, sin, backward=True)
        dys = [dy.reshape(len(rows), -1) for dy in (*turned, grads[2])]
        dys = [dy if dy.stride(1) == 1 else dy.contiguous() for dy in dys]
        dx, gradients = ctx.call.backward(dys, rows, p, dx=ctx.needs_input_grad[0])
        if dx is not None:
            dx = dx.view(*grads[0].shape[:2], -1)
        return dx, None, None, None, None, *gradients
