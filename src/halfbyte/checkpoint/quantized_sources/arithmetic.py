"""The two computations that all formats share: codes out of words of bits, and codes times scales.

Values are computed in float32 and rounded once, to the dtype of the decoded weight. The difference
of a code of up to 8 bits and its zero point is exact there, so is an FP8 number, and the product
with a scale of 16 bits differs from what a library computes in 16 bits in nothing: it rounds the
same product once. Temporaries are a few million elements, whatever the size of the weight.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_CHUNK = 2**20  # elements decoded at a time; 4 MB in float32

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Return the codes in a stream of bits.

    Code i is the bits from i·``bits`` on of the words of a row, the low bits of a word first. So
    a code may begin in one word and end in the next, if ``bits`` does not divide the word.

    Args:
        words: [..., W], int32 or int16.
        bits: Bits of a code, 1 to 8; W words hold a whole number of codes, or rest bits are unused.

    Returns:
        [..., W · word bits // ``bits``], uint8.
    """
    if 8 % bits == 0:  # four times as fast as below; bytes are in order on little-endian machines
        octets = words.contiguous().view(torch.uint8)
        parts = [octets >> start & 2**bits - 1 for start in range(0, 8, bits)]
        return torch.stack(parts, -1).flatten(-2) if bits < 8 else octets
    width = 8 * words.dtype.itemsize
    period = bits // math.gcd(bits, width)  # words after which the pattern repeats
    each = period * width // bits
    count = words.shape[-1] * width // bits
    if padding := -words.shape[-1] % period:
        words = torch.nn.functional.pad(words, (0, padding))
    groups = words.reshape(*words.shape[:-1], -1, period)
    codes = torch.empty(*groups.shape[:-1], each, dtype=torch.uint8, device=words.device)
    for i in range(each):
        word, start = divmod(i * bits, width)
        code = groups[..., word] >> start
        if (low := width - start) < bits:
            # The sign has been shifted in from above.
            code = (code & (2**low - 1)) | (groups[..., word + 1] << low)
        codes[..., i] = code & (2**bits - 1)
    return codes.flatten(-2)[..., :count]


def unpack_rows(words: Tensor, shifts: Sequence[int]) -> Tensor:
    """Return the 4-bit codes of words that hold several rows each.

    Args:
        words: [W, columns], int32.
        shifts: For each of the rows in a word, in order, where its bits start.

    Returns:
        [W · len(``shifts``), columns], uint8.
    """
    rows, columns = words.shape
    codes = torch.empty(rows, len(shifts), columns, dtype=torch.uint8, device=words.device)
    for i, start in enumerate(shifts):
        codes[:, i] = words >> start & 15
    return codes.view(-1, columns)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Return the FP4 numbers of bytes, two in each, the low half first.

    Args:
        packed: [..., n], uint8.

    Returns:
        [..., 2n], float16, which is exact.
    """
    table = torch.tensor(
        [*_E2M1, *(-value for value in _E2M1)], dtype=torch.float16, device=packed.device
    )
    low, high = table[(packed & 15).int()], table[(packed >> 4).int()]
    return torch.stack((low, high), -1).flatten(-2)


def exponents(scales: Tensor) -> Tensor:
    """Return scales that are powers of two, stored as exponents (E8M0), in float32."""
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    return scales.float()


def dequantize_blocks(
    codes: Tensor,
    scales: Tensor,
    block: tuple[int, int],
    dtype: torch.dtype,
    zeros: Tensor | float | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Return (codes - zeros) · scales + offsets, each scale for a block of the codes.

    Args:
        codes: [..., rows, columns], of any dtype.
        scales: [..., ⌈rows / block[0]⌉, ⌈columns / block[1]⌉]; leading dimensions may be 1.
        block: Rows and columns that share a scale; the last ones may be fewer.
        dtype: Of the result.
        zeros: Zero points like the scales of a matrix, or one for all.
        offsets: Like the scales of a matrix.

    Returns:
        A tensor like the codes.
    """
    rows, columns = codes.shape[-2:]
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    flat, results = codes.reshape(-1, rows, columns), out.view(-1, rows, columns)
    scales = scales.expand(*codes.shape[:-2], -1, -1).reshape(len(flat), *scales.shape[-2:])
    whole, width = columns % block[1] == 0, block[1]

    def spread(values: Tensor) -> Tensor:
        """Return one value for each block, or each column, of some rows, with a last dimension."""
        if not whole:
            values = values.repeat_interleave(width, dim=1)[:, :columns]
        return values.float()[..., None]

    step = max(1, _CHUNK // max(1, columns))
    for index in range(len(flat)):
        for start in range(0, rows, step):
            part = flat[index, start : start + step]
            own = torch.arange(start, start + len(part), device=codes.device) // block[0]
            value = part.to(torch.float32, copy=True)
            value = value.reshape(len(part), -1, width if whole else 1)
            if isinstance(zeros, Tensor):
                value.sub_(spread(zeros[own]))
            elif zeros is not None:
                value.sub_(zeros)
            value.mul_(spread(scales[index, own]))
            if offsets is not None:
                value.add_(spread(offsets[own]))
            results[index, start : start + step] = value.view(len(part), columns)
    return out


def dequantize_columns(
    codes: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return (codes - zeros) · scales, where each column says which group it is in.

    Args:
        codes: [rows, columns].
        scales: [rows, groups].
        zeros: [rows, groups].
        groups: [columns], int; each is the number of a group.
        dtype: Of the result.
    """
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    step = max(1, _CHUNK // max(1, codes.shape[1]))
    for start in range(0, len(codes), step):
        part = slice(start, start + step)
        value = codes[part].float() - zeros[part].float().index_select(1, groups)
        out[part] = value.mul_(scales[part].float().index_select(1, groups))
    return out
