"""`FusedLoraLinear` for the layout ``FP8``: the base's products in 8 bits, the adapters' in 16."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte.linear.fused_lora import FusedLoraLinear


class Fp8LoraLinear(FusedLoraLinear):
    """Products of base and adapter together, with x and dy rounded to e4m3 for the base's.

    Inputs of linears that share one are rounded once, and so are the gradients of all of them: both
    directions are one product, however many linears there are.
    """

    def forward(self, x: Tensor, p: Tensor, turn: Any = None) -> Tensor:
        """Return the outputs side by side, [rows, sum of out]; see `triton_fp8.product`."""
        from halfbyte.linear import triton_fp8
        from halfbyte.quant import triton_e4m3

        data, scale = self._stacked()
        rounded = triton_e4m3.quantize_rows([_in_rows(x)])
        adapters, outputs = self.cast_adapters, self.outputs
        if triton_fp8.fits(len(x), outputs, x.device):
            b, rank = adapters.b, adapters.rank
            return triton_fp8.product(*rounded, data, scale, p, b, rank, outputs, turn)
        return triton_fp8.plain_product(*rounded, data, scale, p, adapters.b, outputs)

    def input_gradient(self, dys: Sequence[Tensor], g: Tensor) -> Tensor:
        """Return dx [rows, in]; ``g`` is the first result of `through_b`."""
        from halfbyte.linear import triton_fp8
        from halfbyte.quant import triton_e4m3

        weights = self._group.weights(self._dtype)
        across = [weight.across for weight in weights if weight.across is not None]
        assert len(across) == len(weights), "weights were decoded for forward only"
        _, scale = self._stacked()
        # Powers of two, which are exact in bfloat16.
        rounded = triton_e4m3.quantize_rows([_in_rows(dy) for dy in dys], scale.bfloat16())
        a = self.cast_adapters.a
        whole = _beside(across, 1)
        if triton_fp8.fits(len(g), [a.shape[1]], g.device):
            return triton_fp8.product(*rounded, whole, None, g, a, len(a), None)
        return triton_fp8.plain_product(*rounded, whole, None, g, a, None)

    def turns(self, x: Tensor, turn: Any) -> bool:
        """Return whether `forward` of x can apply a `triton_matmul.Turn`."""
        from halfbyte.linear import triton_fp8

        return bool(turn.fits) and triton_fp8.fits(len(x), self.outputs, x.device)

    def gated_forward(
        self, x: Tensor, p: Tensor, *, keep: bool
    ) -> tuple[Tensor, Tensor | None] | None:
        """Return silu(gate) · up of two linears; see `triton_fp8.gated_product`.

        None if that is not one kernel for this x.
        """
        from halfbyte.linear import triton_fp8
        from halfbyte.quant import triton_e4m3

        if not triton_fp8.fits(len(x), self.outputs[:1], x.device):
            return None
        data, scale = self._stacked()
        rounded = triton_e4m3.quantize_rows([_in_rows(x)])
        adapters = self.cast_adapters
        return triton_fp8.gated_product(
            *rounded, data, scale, p, adapters.b, adapters.rank, keep=keep
        )

    def _stacked(self) -> tuple[Tensor, Tensor]:
        """Return e4m3 [sum of out, in] of all linears, and the scales of its rows."""
        weights = self._group.weights(self._dtype)
        scales = [weight.scale for weight in weights if weight.scale is not None]
        return _beside([weight.data for weight in weights], 0), _beside(scales, 0)


def _in_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _beside(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Return matrices as one along ``dim``: a view if they are adjacent in memory, else a copy."""
    first, at = parts[0], parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != at or part.stride() != first.stride():
            return torch.cat(list(parts), dim)
        at += part.shape[dim] * part.stride(dim) * part.element_size()
    shape = list(first.shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return first.as_strided(shape, first.stride())
