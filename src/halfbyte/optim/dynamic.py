"""The dynamic 8-bit tables as arithmetic: level of a code, and nearest code, without a search.

Positions count levels from zero: |code - 127| in the signed table, code + 1 in the unsigned one.
Those from 2ᵈ up to 2ᵈ⁺¹ divide a decade, from *s* up to 10·s, into equal parts and represent their
midpoints. So, with f the fraction in [1, 2) of the number 2·position + 1,

    level    = s · (9·f - 8)
    position = 2ᵈ/(9·s) · y + (8/9 · 2ᵈ - 1/2), rounded, and at most 2ᵈ⁺¹ - 1

The constants of a decade come from tables of 32 entries, indexed by the last five bits of an
exponent: a warp of a GPU has such a table in one register, an entry per lane. If the next decade
begins within a binade, a number added to y's bits carries all values beyond the bound into the next
exponent.

Products and sums are each rounded to float32, which determines the bound between two levels: within
10⁻⁶ of their midpoint. The levels are bitsandbytes' to two units in the last digit.
"""

from functools import cache

import torch
from torch import Tensor

LEAST = 2.0**-24  # smaller magnitudes count as this, or exponents would share their last five bits
# Added to a signed position, or to an unsigned one, it is a float32 whose last byte is the code.
ZERO_SIGNED, ZERO_UNSIGNED = 2.0**23 + 127, 2.0**23 - 1
_FIELDS = range(127 - 24, 127 + 1)


def _float_bits(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu").view(torch.int32)


def _scales(*, signed: bool) -> Tensor:
    """Return *s* for zero, for each decade, and for one, as bits ``[9]``."""
    last = 8 if signed else 9  # the exponent of 2·position + 1 where the level is one
    decades = [10.0**exponent for exponent in range(-7, 0)]
    return _float_bits([0.0, *decades, 1 / (1 + 9 * 2.0**-last)])


def _regions(*, signed: bool) -> Tensor:
    """Return by exponent: the number added to bits, factor and summand as bits, ``[3, 32]``."""
    first = 0 if signed else 1  # d of the first decade
    # (Lower bound of the magnitude, factor, summand). Everything below the first decade is zero; in
    # the unsigned table it is the smallest level above zero.
    regions = [(0.0, 0.0, 2.0 * first)]
    for number, s in enumerate(10.0**exponent for exponent in range(-7, 0)):
        parts = 2 ** (number + first)
        low = s * (1 + 1.8 / parts) if number else s * (2.75 if signed else 2.5)
        regions.append((low, parts / (9 * s), parts * 8 / 9 - 0.5))
    regions.append((1 - 0.225 / parts, 0.0, 2.0 * parts))
    found = torch.zeros(3, 32, dtype=torch.int32, device="cpu")
    for field in _FIELDS:
        low, high = 2.0 ** (field - 127), 2.0 ** (field - 126)
        _, factor, summand = [region for region in regions if region[0] <= low][-1]
        carried = [
            ((field + 1) << 23) - int(_float_bits([bound]))
            for bound, _, _ in regions
            if low < bound < high
        ]
        assert len(carried) <= 1
        found[0, field % 32] = sum(carried)
        found[1:, field % 32] = _float_bits([factor, summand])
    return found


@cache
def tables(device: torch.device) -> Tensor:
    """Return the constants that depend on a decade, int32 ``[7, 32]``.

    Returns:
        Row 0: *s*, by the exponent of 2·position + 1: from 6 on for the signed table, from 14 on
        for the unsigned one; and a one, at 31. Rows 1 to 3 for signed values and 4 to 6 for
        unsigned ones, by exponent fields modulo 32: the number added to a value's bits; then by the
        exponent of the sum, factor and summand of its position. All but 1 and 4 are float32's bits.
    """
    scales = torch.zeros(32, dtype=torch.int32, device="cpu")
    scales[31:] = _float_bits([1.0])
    scales[6:15], scales[15:24] = _scales(signed=True), _scales(signed=False)
    rows = [scales[None], _regions(signed=True), _regions(signed=False)]
    return torch.cat(rows).to(device)


@cache
def levels(signed: bool, device: torch.device) -> Tensor:
    """Return the table of m (signed) or v, float32 ``[256]``, ascending."""
    code = torch.arange(256, dtype=torch.float32, device="cpu")
    number = 2 * (code - 127).abs() + 1 if signed else 2 * code + 3
    fraction, exponent = torch.frexp(number)
    exponent -= 1 if signed else 2
    s = _scales(signed=signed).view(torch.float32)[exponent.long()]
    found = s * (9 * (2 * fraction) - 8)
    return (torch.copysign(found, code - 127) if signed else found).to(device)


def _position(y: Tensor, *, signed: bool) -> Tensor:
    """Return the position of magnitudes ``[n]``, as a kernel computes it."""
    carry, factor, summand = _regions(signed=signed)
    bits = y.clamp(min=LEAST).view(torch.int32)
    field = (bits >> 23) % 32
    field = ((bits + carry[field]) >> 23) % 32
    factor, summand = factor.view(torch.float32)[field], summand.view(torch.float32)[field]
    most = 2.25 * summand + 0.125
    place = torch.minimum(y * factor + summand, most)
    # The code's last bit is a float's: rounding is to the nearest, and to even codes.
    zero = ZERO_SIGNED if signed else ZERO_UNSIGNED
    return (place + zero) - zero


@cache
def bounds(signed: bool, device: torch.device) -> Tensor:
    """Return the bounds between nearest codes, float32 ``[255]``, ascending.

    Values above bound i have codes above i. They are found by bisection, so that a search of them
    and the arithmetic above agree for every float32.
    """
    wanted = torch.arange(1 if signed else 3, 129 if signed else 257, device="cpu")
    # As bits: floats above zero are in their order.
    below = torch.zeros(len(wanted), dtype=torch.int32, device="cpu")
    above = _float_bits([1.0]).expand_as(below)
    for _ in range(31):
        middle = (below + above) // 2
        reached = _position(middle.view(torch.float32), signed=signed) >= wanted
        below, above = torch.where(reached, below, middle), torch.where(reached, middle, above)
    low, high = below.view(torch.float32), above.view(torch.float32)
    # Signs are apart: under zero, what is not above a bound is at least as far from zero.
    return torch.cat([-high[:-1].flip(0) if signed else torch.zeros(1, device="cpu"), low]).to(
        device
    )
