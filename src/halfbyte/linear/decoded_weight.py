"""A weight as it is multiplied with: what the packed one is decoded to, and the products of that.

Which numbers a weight is decoded to, and how one multiplies with them, is its layout's to say. So
whoever has weights decoded (group.py, decoded_cache.py) and multiplies knows of no layout, and a
linear whose ``layout`` is another trains by another's products. ``DENSE`` is that of all linears
today; docs/extending.md adds one of int8 rows.
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
        data: Its numbers, as the layout has them.
        scale: What they are multiplied by, as the layout has it, or None.
        layout: What decoded it, and multiplies with it.
    """

    data: Tensor
    scale: Tensor | None
    layout: "WeightLayout"


class WeightLayout(Protocol):
    """What weights are decoded to, and the products with them. It has no state."""

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
            packed: At least one.
            dtype: That of the products.
            outs: Where the ``data`` of each goes, of `data_dtype`, [out, in]; or in new tensors.
        """

    def from_dense(self, weight: Tensor) -> DecodedWeight:
        """Return what a weight becomes that is not packed: [out, in], dtype of the products."""

    def product(self, x: Tensor, weight: DecodedWeight) -> Tensor:
        """Return x Wᵀ [rows, out], for x [rows, in], in the dtype of x."""

    def input_gradient(self, dy: Tensor, weight: DecodedWeight, dx: Tensor | None = None) -> Tensor:
        """Return dy W [rows, in], for dy [rows, out]; or ``dx``, to which that was added."""


class _Dense:
    """W itself, row by row, in the dtype of the products; there is no scale.

    On a GPU these are what `FusedLoraLinear` multiplies with, too, base and adapter together.
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
        else:  # each below the last, so that their product with one x can be one
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
