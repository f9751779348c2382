"""Adapters of experts: LoRA on the matrix of every expert of a layer.

    y = x Wₑᵀ + s·(x Aₑᵀ) Bₑᵀ        e: the expert that a row belongs to

The tensors are laid out as in PEFT: A [experts·r, in] with the rows of an expert together, and
B [out, r·experts] with the columns of a rank together. Products are grouped, as in experts.py: in
a loop over the experts, which is the specification, or by torch's grouped products on a GPU, which
need neither a loop nor the offsets on the host.

    gradients   dAₑ = s·(dy Bₑ)ᵀ x,   dBₑ = s·dyᵀ (x Aₑᵀ),   summed over the rows of an expert
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from halfbyte.linear.experts import ExpertLinear, grouped_product
from halfbyte.linear.parameter_lora import ParameterLoRA
from halfbyte.runtime.device import spec_of
from halfbyte.runtime.matmul import product

# Ranks that a grouped product takes: rows of 16 bytes in bfloat16.
_RANKS = 8


class ExpertLoRA(ParameterLoRA):
    """The adapters of one linear of every expert of a layer.

    Args:
        linear: The adapted linear, with its weights loaded; the adapters are on its device.
        r: The rank of each expert's adapter.
        scaling: The factor s.
    """

    def __init__(self, linear: ExpertLinear, *, r: int, scaling: float) -> None:
        sides = linear.in_features, linear.out_features
        super().__init__(
            *(reversed(sides) if linear.swaps_factors else sides),
            r=r,
            scaling=scaling,
            device=linear.device,
            experts=linear.num_experts,
        )
        self._swaps, self._transposed = linear.swaps_factors, linear.transposed

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return Aₑ [experts, r, in] and s·Bₑ [experts, out, r] in ``dtype``."""
        a = self.lora_A.view(self.experts, self.r, -1)
        b = self.lora_B.view(-1, self.r, self.experts).permute(2, 0, 1)
        if self._swaps:
            a, b = b.mT, a.mT
        # Contiguous, as torch's grouped products take them.
        return a.to(dtype).contiguous(), (self.scaling * b).to(dtype).contiguous()

    def forward(self, x: Tensor, linear: ExpertLinear, offsets: Tensor) -> Tensor:  # type: ignore[override]
        """Return x Wₑᵀ + s·(x Aₑᵀ) Bₑᵀ [rows, out]; see ``ExpertLinear.forward``."""
        down, up = self.factors(x.dtype)
        return _AdaptedProduct.apply(x, down, up, linear, offsets)  # type: ignore[no-any-return, no-untyped-call]

    @torch.no_grad()
    def delta(self, expert: int) -> Tensor:
        """Return the change of an expert's matrix [rows, columns], as that is stored; float32."""
        down, up = self.factors(torch.float32)
        change = up[expert] @ down[expert]
        return change.t() if self._transposed else change


class _AdaptedProduct(torch.autograd.Function):
    """The products of rows with the adapted weights of their experts."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, down: Tensor, up: Tensor, linear: ExpertLinear, offsets: Tensor
    ) -> Tensor:
        h = grouped_matmul(x, down.mT, offsets)
        ctx.save_for_backward(x, h, down, up)
        ctx.linear, ctx.offsets = linear, offsets
        y = grouped_product(x, linear, offsets, backward=False)
        return y.add_(grouped_matmul(h, up.mT, offsets))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, h, down, up = ctx.saved_tensors
        dy, offsets = grads[0].contiguous(), ctx.offsets
        dh = grouped_matmul(dy, up, offsets)
        d_up = grouped_outer(dy, h, offsets)
        d_down = grouped_outer(dh, x, offsets)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = grouped_product(dy, ctx.linear, offsets, backward=True)
            dx.add_(grouped_matmul(dh, down, offsets))
        return dx, d_down, d_up, None, None


def grouped_matmul(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Return x Mₑ [rows, n], Mₑ the matrix of a row's expert; 0 for rows of no expert.

    Args:
        x: Rows sorted by expert, [rows, k].
        weights: [experts, k, n].
        offsets: int32 [experts + 1], as in ``ExpertLinear.forward``.
    """
    if _on_gpu(x):
        return matmul_by_torch(x, weights, offsets)
    y = x.new_zeros(len(x), weights.shape[2])
    for weight, (start, stop) in zip(weights, pairwise(offsets.tolist()), strict=True):
        if start < stop:
            y[start:stop] = product(x[start:stop], weight.t())
    return y


def grouped_outer(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Return aₑᵀ bₑ [experts, m, n] over the rows of each expert; 0 where it has none.

    Args:
        a: Rows sorted by expert, [rows, m].
        b: Likewise, [rows, n].
        offsets: int32 [experts + 1], as in ``ExpertLinear.forward``.
    """
    if _on_gpu(a):
        return outer_by_torch(a, b, offsets)
    found = a.new_zeros(len(offsets) - 1, a.shape[1], b.shape[1])
    for matrix, (start, stop) in zip(found, pairwise(offsets.tolist()), strict=True):
        if start < stop:
            matrix.copy_(product(a[start:stop].t(), b[start:stop].t()))
    return found


def _on_gpu(x: Tensor) -> bool:
    """Whether torch's grouped products take x: bfloat16, from Ampere on."""
    return x.is_cuda and x.dtype == torch.bfloat16 and spec_of(x.device).has_bfloat16


def matmul_by_torch(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """`grouped_matmul` by torch's grouped product; bfloat16 with rows of 16 bytes."""
    *_, k, n = weights.shape
    x, weights = _padded(x, k), _padded(_padded(weights, n).mT, k).mT
    y: Tensor = functional.grouped_mm(x, weights, offs=offsets[1:])[:, :n]
    # What is not in a group is not written.
    within = torch.arange(len(y), device=y.device) < offsets[-1]
    return y.where(within[:, None], 0)


def outer_by_torch(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """`grouped_outer` by torch's grouped product; bfloat16 with rows of 16 bytes."""
    m, n = a.shape[1], b.shape[1]
    found: Tensor = functional.grouped_mm(_padded(a, m).mT, _padded(b, n), offs=offsets[1:])
    some = offsets.diff() > 0
    return found[:, :m, :n].where(some[:, None, None], 0)


def _padded(x: Tensor, width: int) -> Tensor:
    """Fill the last dimension with zeros to a multiple of `_RANKS`."""
    return functional.pad(x, (0, -width % _RANKS)) if width % _RANKS else x
