"""Blockwise quantisation: the nearest level of a sorted table, one scale per block.

Every low-bit format of halfbyte is this one algorithm with a table of levels in [-1, 1]: split the
values into blocks, divide each block by its largest magnitude (its *scale*), and store the index
of the nearest level. The tables are data: NF4 and FP4 for weights, the dynamic 8-bit table for
the scales of weights (and, unsigned, for optimizer state).

Wherever rounding or the treatment of zeros is a choice, it follows bitsandbytes' CPU code, so that
the bytes are the same; comments mark these places. The code here is plain PyTorch, runs on any
device, and is the specification that the kernels are tested against.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# Devices are always explicit here: models are built, and modules imported, under
# torch.device("meta"), where a tensor without an explicit device has no data.

# The quantiles of a normal distribution that quant/README.md derives, as float32, by code.
NF4_LEVELS = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    device="cpu",
)

# A sign bit (8), then eight magnitudes in twelfths. Codes do not ascend with their levels, and
# zero has two codes, both +0.
FP4_LEVELS = (
    torch.tensor(
        [0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3],
        dtype=torch.float32,
        device="cpu",
    )
    / 12
)

# The smallest scale a 4-bit block is divided by: keeps a block of zeros at 0/1e-38 = 0.
SMALLEST_SCALE = 1e-38


def dynamic_levels(*, signed: bool) -> Tensor:
    """Builds the dynamic 8-bit table: one decade per leading bit, finer steps in larger decades.

    Decade i of 7 (0 is the smallest) covers ``[0.1, 1] * 10**(i - 6)`` in ``2**i`` equal parts
    (twice as many without a sign) and holds their midpoints; zero and one complete the table.
    There is a +1 but no -1. Method: Dettmers 2016, arXiv 1511.04561.

    Args:
        signed: Whether each decade has both signs.

    Returns:
        float32 ``[256]``, ascending.
    """
    decades = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i + (not signed)) + 1, device="cpu")
        middles = (edges[:-1] + edges[1:]) / 2 * 10 ** (i - 6)
        decades += [middles, -middles] if signed else [middles]
    return torch.cat([*decades, torch.tensor([0.0, 1.0], device="cpu")]).sort().values


DYNAMIC_SIGNED = dynamic_levels(signed=True)
DYNAMIC_UNSIGNED = dynamic_levels(signed=False)


# bitsandbytes' CUDA code looks an FP4 level up by its magnitude, and its bounds are decimals that
# differ from the midpoints in their last digits.
_FP4_CUDA_BOUNDS = torch.tensor(
    [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333], device="cpu"
)


def cuda_bounds(quant_type: str) -> tuple[Tensor, Tensor]:
    """Returns the bounds between the codes of bitsandbytes' CUDA code.

    Returns:
        Bounds, float32 ``[n]`` ascending, and codes, int64 ``[n + 1]``, on the CPU. For FP4 both
        are of magnitudes; a value below zero has 8 added to its code.
    """
    if quant_type == "nf4":
        return midpoints(NF4_LEVELS), torch.arange(16, device="cpu")
    return _FP4_CUDA_BOUNDS, FP4_LEVELS[:8].argsort()


def midpoints(levels: Tensor) -> Tensor:
    """Returns the float32 midpoints between adjacent levels of an ascending table, ``[len - 1]``.

    The level of a value has the number of midpoints strictly below the value as its index, so a
    value exactly between two levels takes the lower one.
    """
    return (levels[:-1] + levels[1:]) / 2


def block_maxima(blocks: Tensor) -> Tensor:
    """Returns the scale of each row of ``[rows, block]``: its largest magnitude, NaN if any is."""
    return blocks.abs().amax(dim=1)


def nearest(blocks: Tensor, scales: Tensor, bounds: Tensor, *, divide: bool = False) -> Tensor:
    """Finds the nearest level of every value, relative to its block's scale.

    Args:
        blocks: float32 ``[rows, block]``, finite.
        scales: float32 ``[rows]``, not negative; raised to ``SMALLEST_SCALE`` if below.
        bounds: float32 ``[levels - 1]``, the `midpoints` of an ascending table with levels in
            [-1, 1].
        divide: Divide by the scale instead of multiplying by its reciprocal. The results differ in
            the last bit; bitsandbytes divides in the short last block only.

    Returns:
        int32 ``[rows, block]``: indices of levels in ascending order.
    """
    scales = scales.clamp(min=SMALLEST_SCALE)[:, None]
    scaled = blocks / scales if divide else blocks * (1 / scales)
    return torch.bucketize(scaled, bounds, out_int32=True)


@cache
def _dynamic_grid(device: torch.device) -> Tensor:
    """uint8 [65536]: the code of each of 65536 equidistant points of [-1, 1]."""
    points = 2 * torch.arange(65536, dtype=torch.float32, device="cpu") / 65535 - 1
    return torch.bucketize(points, midpoints(DYNAMIC_SIGNED)).to(torch.uint8).to(device)


def _search(values: Tensor, levels: Tensor) -> Tensor:
    """The nearest of 256 ascending levels, int64, by the binary search of bitsandbytes' CUDA code.

    A value halfway between two levels gets the one at which the search ended.
    """
    pivot = torch.full(values.shape, 127, device=values.device)
    lower, upper = torch.zeros_like(pivot), torch.full_like(pivot, 255)
    for step in (64, 32, 16, 8, 4, 2, 1):
        above = values > levels[pivot]
        lower, upper = torch.where(above, pivot, lower), torch.where(above, upper, pivot)
        pivot = torch.where(above, pivot + step, pivot - step)
    above = values > levels[pivot]
    neighbour = torch.where(above, upper, lower)
    middle = (levels[neighbour] + levels[pivot]) * 0.5
    moves = torch.where(above, values > middle, values < middle)
    return torch.where(moves, neighbour, pivot)


def encode_dynamic(values: Tensor, block_size: int, *, cuda: bool = False) -> tuple[Tensor, Tensor]:
    """Quantises values to 8 bits over `DYNAMIC_SIGNED`.

    bitsandbytes' CPU code first rounds a value to one of 65536 equidistant points of [-1, 1]. The
    table is finer than that near zero, so zero itself gets code 131 (5e-6 of the scale), not 127.
    Its CUDA code searches the table. A block of zeros gets code 0 and scale 0 from both.

    Args:
        values: float32 ``[n]``, finite.
        block_size: Values that share one scale; the last block may be short.
        cuda: Whether to return the codes of bitsandbytes' CUDA code.

    Returns:
        Codes, uint8 ``[n]``, and scales, float32 ``[ceil(n / block_size)]``.
    """
    count = values.numel()
    padded = torch.nn.functional.pad(values, (0, -count % block_size)).view(-1, block_size)
    scales = block_maxima(padded)
    if cuda:
        codes = _search(padded * (1 / scales)[:, None], DYNAMIC_SIGNED.to(values.device))
        codes = codes.masked_fill((scales == 0)[:, None], 0)
        return codes.to(torch.uint8).view(-1)[:count], scales
    scaled = (padded * (1 / scales)[:, None]).clamp(-1, 1)
    # A scale below 1/float32's maximum has an infinite reciprocal, and 0 * inf is NaN: point 0.
    points = ((scaled + 1) * 0.5 * 65535 + 0.5).nan_to_num(0).to(torch.int32)
    return _dynamic_grid(values.device)[points].view(-1)[:count], scales


def decode_dynamic(codes: Tensor, scales: Tensor, block_size: int) -> Tensor:
    """Decodes the result of `encode_dynamic`: level times scale, rounded, float32 ``[n]``."""
    levels = DYNAMIC_SIGNED.to(codes.device)[codes.int()]
    return levels * scales.repeat_interleave(block_size)[: codes.numel()]
