"""FP8: frozen weights decoded to e4m3, multiplied with activations and gradients rounded to it.

GPUs from Ada and Hopper on multiply 8-bit floating-point numbers about twice as fast as bfloat16.
Only the base's two products of a linear are computed with them; what is small, trained or sensitive
stays as it is: adapters, norms, attention, embedding, head and loss.

    Ŵ = round(W / s_W)              s_W of a row of W, a power of two           (quant/e4m3.py)
    x̂ = round(x / s_x)              s_x of a row of x: its largest becomes 448
    y = s_x s_W x̂ Ŵᵀ               d̂ = round(dy · s_W / s_d)      dx = s_d d̂ Ŵ

In backward the scales of W belong to the contracted dimension, so they are multiplied into dy
before that is rounded. Thus both directions see one frozen function, that of Ŵ, up to the rounding
of x and dy. Both are e4m3: a gradient's row has its own scale, so it needs no wider exponents, and
the third bit of the mantissa is worth more.

Tensor cores read e4m3 with the contracted dimension adjacent only, so on a GPU there is a second,
transposed copy of Ŵ: together as many bytes as W in bfloat16. Linears that share an input are
stacked, row by row in one and column by column in the other, so each direction is one product.

`FP8` is the layout; fp8_choice.py gives it to linears. On a CPU it is plain PyTorch with the same
numbers, which is slow and there for tests and for measuring what training in FP8 loses.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from halfbyte.linear.decoded_weight import DecodedWeight, WeightLayout
from halfbyte.quant import e4m3
from halfbyte.quant.format import gpu_kernels
from halfbyte.quant.weight import QuantizedWeight
from halfbyte.runtime.matmul import product


class Place(NamedTuple):
    """Where a weight is decoded to.

    Attributes:
        data: e4m3 [out, in].
        across: e4m3 [in, out], columns adjacent; a part of a matrix of all of its group.
        scale: float32 [out].
    """

    data: Tensor
    across: Tensor
    scale: Tensor


class _FP8(WeightLayout):
    """e4m3 [out, in], and float32 [out]; on a GPU also e4m3 [in, out]."""

    def data_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return e4m3.DTYPE

    def nbytes(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> int:
        return sum(2 * out * inputs + 4 * out for out, inputs in shapes)

    def places(
        self, memory: Tensor, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
    ) -> list[Any]:
        outs, inputs = [out for out, _ in shapes], shapes[0][1]
        numel = sum(outs) * inputs
        data = torch.split(memory[:numel].view(e4m3.DTYPE).view(-1, inputs), outs)
        across = torch.split(memory[numel : 2 * numel].view(e4m3.DTYPE).view(inputs, -1), outs, 1)
        scale = torch.split(memory[2 * numel :].view(torch.float32), outs)
        return [Place(*parts) for parts in zip(data, across, scale, strict=True)]

    def decode(
        self,
        packed: Sequence[QuantizedWeight],
        dtype: torch.dtype,
        outs: Sequence[Any] | None = None,
        *,
        forward_only: bool = False,
    ) -> list[DecodedWeight]:
        device = packed[0].codes.device
        if outs is None:
            outs = []
            for q in packed:  # linears that share an input are adjacent only in a cache
                memory = torch.empty(
                    self.nbytes([q.shape], dtype), dtype=torch.uint8, device=device
                )
                outs += self.places(memory, [q.shape], dtype)
        pairs = zip(packed, outs, strict=True)
        return [self._decode(q, place, forward_only) for q, place in pairs]

    def _decode(self, q: QuantizedWeight, place: Place, forward_only: bool) -> DecodedWeight:
        if not _by_units(place.data):
            _, scale = e4m3.decode(q, place.data)
            place.scale.copy_(scale)
            return DecodedWeight(place.data, place.scale, self)
        across = None if forward_only else place.across
        if gpu_kernels() is not None:
            from halfbyte.quant import triton_e4m3

            if triton_e4m3.fits(q):
                triton_e4m3.decode(q, place.data, across, place.scale)
                return DecodedWeight(place.data, place.scale, self, across)
        _, scale = e4m3.decode(q, place.data)
        place.scale.copy_(scale)
        if across is not None:
            across.copy_(place.data.t())
        return DecodedWeight(place.data, place.scale, self, across)

    def from_dense(self, weight: Tensor) -> DecodedWeight:
        data, scale = e4m3.encode(weight)
        across = data.t().contiguous() if _by_units(data) else None
        return DecodedWeight(data, scale, self, across)

    def product(self, x: Tensor, weight: DecodedWeight) -> Tensor:
        return _scaled(*_rounded(x), weight.data, weight.scale, x.dtype)

    def input_gradient(self, dy: Tensor, weight: DecodedWeight, dx: Tensor | None = None) -> Tensor:
        across = weight.data.t() if weight.across is None else weight.across
        made = _scaled(*_rounded(dy, weight.scale), across, None, dy.dtype)
        return made if dx is None else dx.add_(made)


FP8 = _FP8()


def _by_units(data: Tensor) -> bool:
    """Return whether products with e4m3 numbers there are a GPU's, which need a transposed copy."""
    return data.is_cuda


def _rounded(x: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return `e4m3.quantize_rows`, on a GPU by a kernel."""
    if not x.is_cuda or gpu_kernels() is None:
        return e4m3.quantize_rows(x, factors)
    from halfbyte.quant import triton_e4m3

    return triton_e4m3.quantize_rows([x if x.stride(1) == 1 else x.contiguous()], factors)


def _scaled(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return s_x s_W x̂ Ŵᵀ [rows, out] in ``dtype``; ``scale`` None is 1."""
    if x.is_cuda and dtype == torch.bfloat16:
        return scaled_product(x, x_scale, weight, scale, dtype)
    # e4m3 numbers are exact in any wider type; their sums exceed float16's range.
    wide = torch.float32 if dtype == torch.float16 else dtype
    y = product(x.to(wide), weight.to(wide)).float().mul_(x_scale)
    return (y if scale is None else y.mul_(scale)).to(dtype)


def scaled_product(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    dtype: torch.dtype,
    *,
    fast: bool = True,
) -> Tensor:
    """Return s_x s_W x̂ Ŵᵀ [rows, out] by a GPU's FP8 units.

    Args:
        x: e4m3 [rows, in], contiguous.
        x_scale: float32 [rows, 1].
        weight: e4m3 [out, in], contiguous rows.
        scale: float32 [out], or None for 1.
        dtype: bfloat16.
        fast: Whether to leave partial sums in the units, whose sums of e4m3 products have fewer
            bits than float32.
    """
    if scale is None:
        scale = torch.ones(len(weight), dtype=torch.float32, device=x.device)
    y: Tensor = torch._scaled_mm(
        x,
        weight.t(),
        scale_a=x_scale,
        scale_b=scale[None],
        out_dtype=dtype,
        use_fast_accum=fast,
    )
    return y
