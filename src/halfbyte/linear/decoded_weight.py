"""Decoded weights: the layout a packed weight is decoded to, and the products computed with it.

The numeric format of a decoded weight and the way to multiply with it are defined by its layout.
Code that decodes and multiplies (group.py, decoded_cache.py) is independent of it, and a linear
with another ``layout`` trains with that layout's products. Linears use ``DENSE`` unless they are
told otherwise (`fp8.use_fp8`); docs/extending.md adds a layout of int8 rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from halfbyte.quant.format import dequantize_all
from halfbyte.quant.weight import QuantizedWeight
from halfbyte.runtime.matmul import product


@dataclass(frozen=True, eq=False, slots=True)
class DecodedWeight:
    """W [out, in], decoded.

    Attributes:
        data: The values, in the format of the layout.
        scale: The factors of the values, in the format of the layout, or None.
        layout: The layout that decoded it and multiplies with it.
        across: The values transposed, [in, out], if backward has its own copy.
    """

    data: Tensor
    scale: Tensor | None
    layout: "WeightLayout"
    across: Tensor | None = None


class WeightLayout(Protocol):
    """The format that weights are decoded to, and the products with them; stateless."""

    def data_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of ``data`` for products in ``dtype``."""

    def nbytes(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> int:
        """Return the bytes of decoded weights of linears that share an input.

        Args:
            shapes: [out, in] of each.
            dtype: dtype of the products.
        """
        return self.data_dtype(dtype).itemsize * sum(prod(shape) for shape in shapes)

    def places(
        self, memory: Tensor, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
    ) -> list[Any]:
        """Divide memory into the destinations of `decode`, so that one product can cover all.

        Args:
            memory: uint8 [`nbytes`], aligned to 256 bytes.
            shapes: As for `nbytes`.
            dtype: Likewise.
        """
        whole = memory.view(self.data_dtype(dtype))
        parts = torch.split(whole, [prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def decode(
        self,
        packed: Sequence[QuantizedWeight],
        dtype: torch.dtype,
        outs: Sequence[Any] | None = None,
        *,
        forward_only: bool = False,
    ) -> list[DecodedWeight]:
        """Decode packed weights of one device.

        Args:
            packed: At least one weight.
            dtype: dtype of the products.
            outs: Destination of each, of `places`: by default a tensor of `data_dtype`, [out, in].
                None allocates.
            forward_only: Whether `input_gradient` is not used, so that a copy for it may be left
                out.
        """

    def from_dense(self, weight: Tensor) -> DecodedWeight:
        """Convert a weight that is not packed: [out, in], in the dtype of the products."""

    def product(self, x: Tensor, weight: DecodedWeight) -> Tensor:
        """Return x Wᵀ [rows, out], for x [rows, in], in the dtype of x."""

    def input_gradient(self, dy: Tensor, weight: DecodedWeight, dx: Tensor | None = None) -> Tensor:
        """Return dy W [rows, in] for dy [rows, out], added to ``dx`` in place if that is given."""


class _Dense(WeightLayout):
    """W itself, row-major, in the dtype of the products, without a scale.

    On a GPU, `FusedLoraLinear` reads this layout too, for base and adapter together.
    """

    def data_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def decode(
        self,
        packed: Sequence[QuantizedWeight],
        dtype: torch.dtype,
        outs: Sequence[Tensor] | None = None,
        *,
        forward_only: bool = False,
    ) -> list[DecodedWeight]:
        if outs is not None or len(packed) < 2 or packed[0].codes.device.type != "cuda":
            decoded = dequantize_all(packed, dtype, outs=outs)
        else:  # stacked in memory, so that one product with x can cover all of them
            sizes = [q.numel for q in packed]
            whole = torch.empty(sum(sizes), dtype=dtype, device=packed[0].codes.device)
            pieces = torch.split(whole, sizes)
            outs = [piece.view(q.shape) for piece, q in zip(pieces, packed, strict=True)]
            decoded = dequantize_all(packed, dtype, outs=outs)
        return [DecodedWeight(data, None, self) for data in decoded]

    def from_dense(self, weight: Tensor) -> DecodedWeight:
        return DecodedWeight(weight, None, self)

    def product(self, x: Tensor, weight: DecodedWeight) -> Tensor:
        return product(x, weight.data)

    def input_gradient(self, dy: Tensor, weight: DecodedWeight, dx: Tensor | None = None) -> Tensor:
        if dx is None:
            return product(dy, weight.data.t())
        if dx.is_cuda:
            return dx.addmm_(dy, weight.data)
        return dx.add_(product(dy, weight.data.t()))


DENSE = _Dense()
