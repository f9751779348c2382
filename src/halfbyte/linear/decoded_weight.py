"""Decoded weights: the layout a packed weight is decoded to, and the products computed with it.

The numeric format of a decoded weight and the way to multiply with it are defined by its layout.
Code that decodes and multiplies (group.py, decoded_cache.py) is independent of it, and a linear
with another ``layout`` trains with that layout's products. All linears use ``DENSE`` today;
docs/extending.md adds a layout of int8 rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

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
    """

    data: Tensor
    scale: Tensor | None
    layout: "WeightLayout"


class WeightLayout(Protocol):
    """The format that weights are decoded to, and the products with them; stateless."""

    def data_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of ``data`` for products in ``dtype``."""

    def decode(
        self,
        packed: Sequence[QuantizedWeight],
        dtype: torch.dtype,
        outs: Sequence[Tensor] | None = None,
    ) -> list[DecodedWeight]:
        """Decode packed weights of one device.

        Args:
            packed: At least one weight.
            dtype: dtype of the products.
            outs: Destination of the ``data`` of each, `data_dtype`, [out, in]; None allocates.
        """

    def from_dense(self, weight: Tensor) -> DecodedWeight:
        """Convert a weight that is not packed: [out, in], in the dtype of the products."""

    def product(self, x: Tensor, weight: DecodedWeight) -> Tensor:
        """Return x Wᵀ [rows, out], for x [rows, in], in the dtype of x."""

    def input_gradient(self, dy: Tensor, weight: DecodedWeight, dx: Tensor | None = None) -> Tensor:
        """Return dy W [rows, in] for dy [rows, out], added to ``dx`` in place if that is given."""


class _Dense:
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
