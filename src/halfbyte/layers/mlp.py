"""The gated MLP of a decoder layer, down(silu(gate(x)) · up(x)), as one operation on a GPU.

Its intermediates are the widest activations of a layer: 22 kB per token each for gate, up and their
product in a 7B model. Separate operations write all three in forward and in recomputation and keep
them for backward, although only inner = silu(gate) · up is needed, by the last product and by its
adapter's dA. As one operation,

    forward         writes only inner if there is no backward
    recomputation   computes only gate and up: its output is not read, and inner Aᵀ of the adapter
                    is kept from forward (`OpenLayer`); if it is not, inner is computed for it
    backward        recomputes inner in registers, in the kernel that overwrites gate and up with
                    their gradients

The products are those of linear/fused_lora.py. Separate operations are the specification, and run
everywhere else.
"""

from typing import Any

import torch
from torch import Tensor

from halfbyte.layers.elementwise import swiglu
from halfbyte.linear.frozen import FrozenLinear
from halfbyte.linear.fused_lora import FusedLoraLinear
from halfbyte.linear.group import factors_of


def gated_mlp(
    x: Tensor, gate: FrozenLinear, up: FrozenLinear, down: FrozenLinear, *, read: bool = True
) -> Tensor:
    """Return down(silu(gate(x)) · up(x)), [..., H] for x [..., H].

    On a GPU backward overwrites the saved tensors and cannot run twice.

    Args:
        x: In a dtype of the products.
        gate: [I, H].
        up: [I, H].
        down: [H, I].
        read: Whether the values are read. If not, it is a placeholder with the same backward.
    """
    both, last = gate.group.fused_alone(x, (gate, up)), down.group.fused_alone(x, (down,))
    if both is None or last is None:
        inner = swiglu(gate(x), up(x))
        return down(inner) if read else down.unread(inner)
    gradients = torch.is_grad_enabled()  # always False inside forward
    restored = down.group.has_lora_activation
    factors = factors_of([*both.updates, *last.updates])
    return _GatedMLP.apply(x, both, last, gradients, read, restored, *factors)  # type: ignore[no-any-return, no-untyped-call]


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        both: FusedLoraLinear,
        last: FusedLoraLinear,
        gradients: bool,
        read: bool,
        restored: bool,
        *_factors: Tensor | None,
    ) -> Tensor:
        from halfbyte.layers import triton_elementwise

        rows = x.reshape(-1, x.shape[-1])
        p = both.into_a(rows)
        between: Tensor | None
        if not read and restored:
            between = both.forward(rows, p)
            q = last.into_a(rows)  # restored; rows are not read
        else:
            gated = both.gated_forward(rows, p, keep=gradients)
            if gated is None:
                between = both.forward(rows, p)
                inner = triton_elementwise.swiglu(*between.chunk(2, 1))
            else:
                inner, between = gated
            q = last.into_a(inner)
        if read:
            y = last.forward(inner, q)
        else:
            y = rows.new_zeros(1, 1).expand(len(rows), *last.outputs)
        ctx.both, ctx.last, ctx.written = both, last, False
        ctx.save_for_backward(rows, between, p, q)
        return y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from halfbyte.layers import triton_elementwise
        from halfbyte.linear import triton_swiglu

        if ctx.written:
            raise RuntimeError("backward of a gated MLP overwrites its saved tensors: it runs once")
        ctx.written = True
        rows, between, p, q = ctx.saved_tensors
        gate, up = between.chunk(2, 1)
        dy = grads[0].reshape(len(rows), -1)
        dy = dy if dy.stride(1) == 1 else dy.contiguous()
        both, last = ctx.both, ctx.last
        g, d_bs = last.through_b([dy], q)
        d_inner = last.input_gradient([dy], g)
        if triton_swiglu.backward_fits(both.cast_adapters, last.cast_adapters, rows.device):
            made = triton_swiglu.gated_backward(
                d_inner, gate, up, p, both.cast_adapters, both.scalings, g
            )
            of_last = last.trained([made.d_a], d_bs)
            g, d_bs = made.g, made.d_bs
            del d_inner
        else:
            triton_elementwise.swiglu_backward(d_inner, gate, up, remake=True)
            of_last = last.factor_gradients(d_inner, g, d_bs)
            del d_inner  # freed before the partial sums are allocated
            g, d_bs = both.through_b([gate, up], p)
        of_both = both.factor_gradients(rows, g, d_bs)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = both.input_gradient([gate, up], g).view(*grads[0].shape[:-1], -1)
        return dx, None, None, None, None, None, *of_both, *of_last
