"""Searches for the scales and codes of least squared error, in the same format.

The format only requires that a weight be ``level[code] × scale``. With a block's largest magnitude
as its scale, one element is exact and the others are not considered. Here several scales are tried
on each block and the best is kept. What matters is the error of the layer's output, so an element
can be weighted by the mean square of its input:

    error of a block = Σ importance · (x − scale · level[code])²,  importance[j]: mean of input[j]²

1. For each of ``FRACTIONS`` of the largest magnitude: the nearest codes, and for these codes the
   scale of least error, ``s = Σ importance·x·level / Σ importance·level²``. The remaining error is
   ``Σ importance·x² − s² · Σ importance·level²``, so the best has the largest ``s² · Σ …``.
2. With double quantisation these scales are quantised.
3. Codes are chosen again for the scale as it will be decoded.

The result has bitsandbytes' format, but not the bytes that bitsandbytes would choose; `quantize`
gives those.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from halfbyte.quant import blockwise
from halfbyte.quant.format import quantize as by_largest
from halfbyte.quant.weight import SCALE_BLOCK, QuantizedWeight, QuantType, code_order, levels_of

FRACTIONS = (1.0, 0.7, 0.8, 0.9, 1.1, 1.2, 1.3, 1.4)
"""First the scale that `quantize` takes, so that no block comes out worse."""

# Minimum importance of an input, relative to the mean: some are near zero in the calibration text.
_LEAST_IMPORTANCE = 1e-4

# Elements at a time: on a CPU temporaries stay in the cache, on a GPU they take 0.2 GB.
_CHUNK = {"cpu": 2**18, "cuda": 2**22}


class _Table(NamedTuple):
    """Levels in ascending order, their midpoints and their codes, on one device."""

    levels: Tensor
    bounds: Tensor
    codes: Tensor

    def nearest(self, x: Tensor, scales: Tensor) -> Tensor:
        """Indices of the levels nearest to `x` [n, block], with scales [n] of any sign."""
        tiny = scales.abs() < blockwise.SMALLEST_SCALE
        inverse = (1 / scales).masked_fill(tiny, 0)
        return torch.bucketize(x * inverse[:, None], self.bounds, out_int32=True)


@torch.no_grad()
def search(
    weight: Tensor,
    *,
    quant_type: QuantType = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    importance: Tensor | None = None,
    name: str | None = None,
) -> QuantizedWeight:
    """Quantises a weight to 4 bits with the least squared error found in a few tries.

    Args:
        weight: As for `quantize`.
        quant_type: As for `quantize`.
        block_size: As for `quantize`.
        double_quant: As for `quantize`.
        importance: Weight of the squared error of each column: float ``[weight.shape[-1]]``, not
            negative; uniform if None.
        name: Name of the weight in error messages.

    Returns:
        The quantised weight, on the device of `weight`.

    Raises:
        ConfigError: As `quantize`.
        WeightError: As `quantize`.
        ValueError: `importance` is of another size, negative, or not finite.
    """
    q = by_largest(
        weight, quant_type=quant_type, block_size=block_size, double_quant=double_quant, name=name
    )
    if importance is not None:
        importance = normalised(importance, weight)
    order = code_order(quant_type)
    levels = levels_of(quant_type)[order]
    device = weight.device
    table = _Table(
        levels.to(device),
        blockwise.midpoints(levels).to(device),
        order.to(device, torch.uint8),
    )
    pieces = _Pieces(weight, importance, block_size)
    scales = torch.cat([_best_scales(table, x, w) for x, w in pieces])
    if double_quant:
        offset = scales.mean() if len(scales) else scales.new_zeros(())
        codes, maxima = blockwise.encode_dynamic(scales - offset, SCALE_BLOCK, cuda=scales.is_cuda)
        q = replace(q, scale_codes=codes, scale_scales=maxima, scale_offset=offset)
    else:
        q = replace(q, scales=scales)
    decoded = torch.split(q.block_scales(), pieces.blocks)
    nibbles = torch.cat(
        [
            table.codes[table.nearest(x, held)].view(-1)
            for (x, _), held in zip(pieces, decoded, strict=True)
        ]
    )[: 2 * len(q.codes)]
    return replace(q, codes=nibbles[::2] << 4 | nibbles[1::2])


def normalised(importance: Tensor, weight: Tensor) -> Tensor:
    """Normalises importances to mean 1, with a lower bound.

    Args:
        importance: One for each column of `weight`, not negative.
        weight: The weight, on the device of the result.

    Returns:
        float32 ``[weight.shape[-1]]``.

    Raises:
        ValueError: `importance` is of another size, negative, or not finite.
    """
    if importance.shape != weight.shape[-1:]:
        raise ValueError(
            f"expected an importance for each of {weight.shape[-1]} columns, got shape"
            f" {tuple(importance.shape)}"
        )
    importance = importance.to(weight.device, torch.float32)
    if not bool((importance >= 0).all() & importance.isfinite().all()):
        raise ValueError("importance must be finite and not negative")
    mean = importance.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return (importance / mean).clamp(min=_LEAST_IMPORTANCE)


class _Pieces:
    """A weight in pieces of whole blocks, float32 [n, block], each with its importances.

    The last block is padded with zeros, which have the code of zero and importance 0.
    """

    def __init__(self, weight: Tensor, importance: Tensor | None, block_size: int) -> None:
        self.flat, self.importance = weight.reshape(-1), importance
        self.block_size = block_size
        self.blocks = max(1, _CHUNK.get(weight.device.type, _CHUNK["cpu"]) // block_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        size = self.blocks * self.block_size
        # An empty weight is one piece without blocks, so that there is something to concatenate.
        for start in range(0, max(1, len(self.flat)), size):
            x = self.flat[start : start + size].float()
            rest = (0, -len(x) % self.block_size)
            w = None
            if self.importance is not None:
                index = torch.arange(start, start + len(x), device=x.device)
                w = pad(self.importance[index % len(self.importance)], rest)
                w = w.view(-1, self.block_size)
            yield pad(x, rest).view(-1, self.block_size), w


def _best_scales(table: _Table, x: Tensor, importance: Tensor | None) -> Tensor:
    """Scales [n] with the least error, of blocks [n, block]."""
    maxima = blockwise.block_maxima(x)
    best, most = maxima, torch.full_like(maxima, -torch.inf)
    for fraction in FRACTIONS:
        levels = table.levels[table.nearest(x, maxima * fraction)]
        weighted = levels if importance is None else levels * importance
        scales, squares = (x * weighted).sum(1), (levels * weighted).sum(1).clamp(min=1e-30)
        gain = scales / squares.sqrt()  # the root, which does not underflow
        better = gain > most
        best, most = torch.where(better, scales / squares, best), torch.where(better, gain, most)
    return best
