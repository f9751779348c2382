"""The 4-bit format on a GPU, in Triton: decode, encode, and the product with a few rows.

All of these move bytes: the least a decode can take is the time to read 0.516 bytes a weight and
write 2. So the kernels are shaped by how memory wants to be asked.

    decode     A lane reads one 32-bit word, 8 codes, and writes 16 bytes of 16-bit weights, so a
               warp reads 128 and writes 512 bytes in a row. Levels come from a 64-byte table that
               stays in the first cache; scales are decoded on the way, from their 8-bit codes.
               Many weights go in one launch: a small one alone cannot fill the card.
    encode     A lane holds 8 neighbours; the largest of a block is found by shuffles. The level
               is found with two loads and one comparison: cut in cells of 1/16, no cell has more
               than one bound.
    product    For generation: the weight is read in 4 bits and never written out. One row of x:
               sums in registers. Up to `SMALL_ROWS`: decoded tiles go to the tensor cores.

Decoding is bit for bit the plain PyTorch of format.py, encoding that with ``cuda=True``: the bytes
of bitsandbytes' CUDA code. Scales are multiplied, rounded, and added to: one fused operation
would change the last bit of many, so the compiler may not fuse (``enable_fp_fusion=False``).

What was measured is in benchmarks/results, what did not help in LAB.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from itertools import groupby
from math import ceil
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte import blockwise
from halfbyte.nf4.format import SCALE_BLOCK, QuantizedWeight, QuantType, levels_of

# Rows up to which `small_product` beats decoding and cuBLAS (H100, every Llama shape).
SMALL_ROWS = 64

# Weights in one launch of `_decode_flat`; the kernel finds its own by looking at every start.
_WEIGHTS_A_LAUNCH = 16
_LANES, _UNROLL = 256, 2


@triton.jit
def _scale_of(block, inside, scales, scale_codes, offset, dynamic, double: tl.constexpr):
    if double:
        code = tl.load(scale_codes + block, mask=inside, other=0).to(tl.int32)
        level = tl.load(dynamic + code)
        return level * tl.load(scales + (block >> 8), mask=inside, other=0.0) + offset
    else:
        return tl.load(scales + block, mask=inside, other=0.0)


@triton.jit
def _decode_flat(
    out,
    weights,
    levels,
    dynamic,
    count: tl.constexpr,
    block_words: tl.constexpr,
    double: tl.constexpr,
    lanes: tl.constexpr,
    unroll: tl.constexpr,
):
    # A row of the table: first program, words, codes, scales, scale codes, offset, and where the
    # result goes, in words after `out`.
    program = tl.program_id(0)
    mine = 0
    for i in tl.static_range(1, count):
        mine += tl.where(program >= tl.load(weights + i * 7), 1, 0)
    row = weights + mine * 7
    first = (program - tl.load(row).to(tl.int32)) * (lanes * unroll)
    words = tl.load(row + 1).to(tl.int32)
    codes = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(tl.int32)), 16)
    scales = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    scale_codes = tl.load(row + 4).to(tl.pointer_type(tl.uint8))
    offset = 0.0
    if double:
        offset = tl.load(tl.load(row + 5).to(tl.pointer_type(tl.float32)))
    # Elements may be more than 2**31, words are not: an eighth of them.
    out += (tl.load(row + 6) + first) * 8
    element = tl.arange(0, 8)
    shift = (element >> 1) * 8 + (1 - (element & 1)) * 4
    for i in tl.static_range(unroll):
        lane = i * lanes + tl.arange(0, lanes)
        word = first + lane
        inside = word < words
        packed = tl.load(codes + word, mask=inside, other=0)
        block = word // block_words
        scale = _scale_of(block, inside, scales, scale_codes, offset, dynamic, double)
        code = (packed[:, None] >> shift[None, :]) & 15
        value = tl.load(levels + code) * scale[:, None]
        tl.store(
            out + lane[:, None] * 8 + element[None, :],
            value.to(out.dtype.element_ty),
            mask=inside[:, None],
        )


@triton.jit
def _decode_tile(
    out,
    codes,
    scales,
    scale_codes,
    offset,
    levels,
    dynamic,
    rows,
    columns,
    stride,
    block_size: tl.constexpr,
    double: tl.constexpr,
    transposed: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64) * tile_rows + tl.arange(0, tile_rows)
    column = tl.program_id(0).to(tl.int64) * tile_columns + tl.arange(0, tile_columns)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    index = row[:, None] * columns + column[None, :]
    byte = tl.load(codes + index // 2, mask=inside, other=0).to(tl.int32)
    code = tl.where(index % 2 == 0, byte >> 4, byte & 15)
    first = 0.0
    if double:
        first = tl.load(offset)
    block = index // block_size
    value = tl.load(levels + code) * _scale_of(
        block, inside, scales, scale_codes, first, dynamic, double
    )
    value = value.to(out.dtype.element_ty)
    if transposed:
        target = out + column[:, None] * stride + row[None, :]
        inside = (column[:, None] < columns) & (row[None, :] < rows)
        tl.store(target, tl.trans(value), mask=inside)
    else:
        tl.store(out + row[:, None] * stride + column[None, :], value, mask=inside)


@triton.jit
def _encode_blocks(
    weight,
    codes,
    scales,
    cell_codes,
    cell_bounds,
    numel,
    nbytes,
    blocks,
    block_size: tl.constexpr,
    rows: tl.constexpr,
    signed: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * rows
    row = tl.arange(0, rows)
    start = first * block_size
    where = row[:, None] * block_size + tl.arange(0, block_size)[None, :]
    x = tl.load(weight + start + where, mask=where < numel - start, other=0.0).to(tl.float32)
    # The largest magnitude as an integer: NaN is larger than all, and is not lost.
    magnitude = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    largest = magnitude.to(tl.float32, bitcast=True)
    tl.store(scales + first + row, largest, mask=first + row < blocks)
    # The smallest float32 of full precision.
    inverse = 1.0 / tl.maximum(largest, 1.1754943508222875e-38)
    x = x * inverse[:, None]
    level = x if signed else tl.abs(x)
    # 1.5 * 2**23 is added, so the nearest integer to 16 x stands in the lowest bits.
    cell = tl.fma(level, 16.0, 12582912.0).to(tl.int32, bitcast=True) & 63
    two = tl.load(cell_codes + cell)
    code = tl.where(level > tl.load(cell_bounds + cell), two >> 4, two & 15)
    if not signed:
        code = code | tl.where(x < 0.0, 8, 0)
    high, low = tl.split(tl.reshape(code, (rows, block_size // 2, 2)))
    place = row[:, None] * (block_size // 2) + tl.arange(0, block_size // 2)[None, :]
    packed = ((high << 4) | low).to(tl.uint8)
    tl.store(codes + start // 2 + place, packed, mask=place < nbytes - start // 2)


@triton.jit
def _encode_scales(
    scales,
    offset,
    scale_codes,
    scale_scales,
    dynamic,
    blocks,
    groups,
    block_size: tl.constexpr,
    rows: tl.constexpr,
):
    group = tl.program_id(0) * rows + tl.arange(0, rows)
    where = group[:, None] * block_size + tl.arange(0, block_size)[None, :]
    inside = where < blocks
    x = tl.load(scales + where, mask=inside, other=0.0) - tl.load(offset)
    x = tl.where(inside, x, 0.0)
    largest = tl.max(tl.abs(x), axis=1)
    tl.store(scale_scales + group, largest, mask=group < groups)
    x = x * (1.0 / largest)[:, None]
    pivot = tl.full((rows, block_size), 127, tl.int32)
    lower = tl.full((rows, block_size), 0, tl.int32)
    upper = tl.full((rows, block_size), 255, tl.int32)
    value = tl.load(dynamic + pivot)
    for i in tl.static_range(7):
        above = x > value
        lower = tl.where(above, pivot, lower)
        upper = tl.where(above, upper, pivot)
        pivot += tl.where(above, 64 >> i, -(64 >> i))
        value = tl.load(dynamic + pivot)
    above = x > value
    neighbour = tl.where(above, upper, lower)
    middle = (tl.load(dynamic + neighbour) + value) * 0.5
    moves = (above & (x > middle)) | ((x <= value) & (x < middle))
    code = tl.where(moves, neighbour, pivot)
    code = tl.where((largest == 0.0)[:, None], 0, code)
    tl.store(scale_codes + where, code.to(tl.uint8), mask=inside)


# Eight codes of a word to eight levels, without a table in memory: a lookup there takes the load
# unit four cycles a warp, and there are 45 million in an 11008x4096 weight. PRMT picks bytes of
# registers by the low three bits of a nibble; the fourth chooses between two picks. One pass gives
# the low bytes of bfloat16 levels, one the high ones, and they are put together as float32.
# Operands: 0 to 7 the levels, 8 the word, 9 to 12 and 13 to 16 the low and high bytes by code.
def _unpacking() -> str:
    lines = [
        ".reg .b32 low, four, high, five, a, b, p0, p1, q0, q1;",
        "and.b32 low, $8, 0x77777777;",
        "shr.u32 high, low, 16;",
        "shr.u32 four, $8, 1;",
        "lop3.b32 four, four, 0x44444444, 0x32103210, 0xEA;",  # (four & 0x44444444) | 0x32103210
        "shr.u32 five, four, 16;",
    ]
    for name, first in (("p", 9), ("q", 13)):
        for half, (index, choice) in enumerate((("low", "four"), ("high", "five"))):
            lines += [
                f"prmt.b32 a, ${first}, ${first + 1}, {index};",
                f"prmt.b32 b, ${first + 2}, ${first + 3}, {index};",
                f"prmt.b32 {name}{half}, a, b, {choice};",
            ]
    for half in (0, 1):
        for pair, order in enumerate(("0x5140", "0x7362")):
            even = 4 * half + 2 * pair  # of a byte, the high nibble comes first
            lines += [
                f"prmt.b32 a, p{half}, q{half}, {order};",
                f"and.b32 ${even}, a, 0xffff0000;",
                f"shl.b32 ${even + 1}, a, 16;",
            ]
    return "{" + "\n".join(lines) + "}"


_UNPACKING = tl.constexpr(_unpacking())
_EIGHT_INTEGERS = tl.constexpr((tl.int32,) * 8)
_UNPACKING_OPERANDS = tl.constexpr(",".join(["=r"] * 8 + ["r"] * 9))


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _multiply_word(total, word, x, planes, levels, rounded: tl.constexpr):
    # Adds the products of eight weights a lane with eight elements of x.
    if rounded:
        p = planes
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            _UNPACKING,
            _UNPACKING_OPERANDS,
            [word, p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]],
            dtype=_EIGHT_INTEGERS,
            is_pure=True,
            pack=1,
        )
        total = tl.fma(_float(a), x[0], total)
        total = tl.fma(_float(b), x[1], total)
        total = tl.fma(_float(c), x[2], total)
        total = tl.fma(_float(d), x[3], total)
        total = tl.fma(_float(e), x[4], total)
        total = tl.fma(_float(f), x[5], total)
        total = tl.fma(_float(g), x[6], total)
        total = tl.fma(_float(h), x[7], total)
    else:
        for j in tl.static_range(8):
            code = (word >> ((j // 2) * 8 + (1 - j % 2) * 4)) & 15
            total = tl.fma(tl.load(levels + code), x[j], total)
    return total


@triton.jit
def _multiply_row(
    total,
    row,
    quad,
    there,
    x,
    codes,
    scales,
    scale_codes,
    offset,
    levels,
    dynamic,
    planes,
    row_quads,
    block_quads: tl.constexpr,
    double: tl.constexpr,
    rounded: tl.constexpr,
):
    index = row * row_quads + quad
    at = index[:, None] * 4 + tl.arange(0, 4)[None, :]
    words = _quarters(tl.load(codes + at, mask=there[:, None], other=0))
    block = index // block_quads
    scale = _scale_of(block, there, scales, scale_codes, offset, dynamic, double)
    sums = tl.zeros_like(total)
    for i in tl.static_range(4):
        sums = _multiply_word(sums, words[i], x[i], planes, levels, rounded)
    return tl.fma(sums, scale, total)


@triton.jit
def _halves(x):
    # The even and the odd columns.
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def _quarters(x):
    # Four columns.
    even, odd = tl.split(tl.reshape(x, (x.shape[0], 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _pair(bits, dtype: tl.constexpr):
    # Two 16-bit numbers of a word, the earlier in its low half.
    low = bits.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    high = (bits >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _eight(a, b, c, d, dtype: tl.constexpr):
    x0, x1 = _pair(a, dtype)
    x2, x3 = _pair(b, dtype)
    x4, x5 = _pair(c, dtype)
    x6, x7 = _pair(d, dtype)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _product_one(
    y,
    x,
    codes,
    scales,
    scale_codes,
    offset,
    levels,
    dynamic,
    planes,
    outputs,
    row_quads,
    block_quads: tl.constexpr,
    double: tl.constexpr,
    lanes: tl.constexpr,
    rounded: tl.constexpr,
):
    # A program has four rows. A lane has 32 neighbouring weights of each: one load of codes, one
    # scale, and 32 elements of x that it keeps for all four. Rows are variables of their own, not
    # a dimension: the compiler would spread that over warps, and x with it.
    row = tl.program_id(0) * 4
    row0 = tl.minimum(row, outputs - 1)
    row1 = tl.minimum(row + 1, outputs - 1)
    row2 = tl.minimum(row + 2, outputs - 1)
    row3 = tl.minimum(row + 3, outputs - 1)
    first = 0.0
    if double:
        first = tl.load(offset)
    p = (0, 0, 0, 0, 0, 0, 0, 0)
    if rounded:  # from memory, or every word would have the constants moved to registers again
        p = (
            tl.load(planes),
            tl.load(planes + 1),
            tl.load(planes + 2),
            tl.load(planes + 3),
            tl.load(planes + 4),
            tl.load(planes + 5),
            tl.load(planes + 6),
            tl.load(planes + 7),
        )
    total0 = tl.zeros((lanes,), tl.float32)
    total1 = tl.zeros((lanes,), tl.float32)
    total2 = tl.zeros((lanes,), tl.float32)
    total3 = tl.zeros((lanes,), tl.float32)
    dtype: tl.constexpr = y.dtype.element_ty
    for start in range(0, row_quads, lanes):
        quad = start + tl.arange(0, lanes)
        there = quad < row_quads
        at = quad[:, None] * 16 + tl.arange(0, 16)[None, :]
        even, odd = _halves(tl.load(x + at, mask=there[:, None], other=0))
        x04, x26 = _halves(even)
        x15, x37 = _halves(odd)
        a, b, c, d = _quarters(x04), _quarters(x15), _quarters(x26), _quarters(x37)
        word0 = _eight(a[0], b[0], c[0], d[0], dtype)
        word1 = _eight(a[1], b[1], c[1], d[1], dtype)
        word2 = _eight(a[2], b[2], c[2], d[2], dtype)
        word3 = _eight(a[3], b[3], c[3], d[3], dtype)
        e = (word0, word1, word2, word3)
        q, t, n, bq = quad, there, row_quads, block_quads
        s, sc, lv, dy = scales, scale_codes, levels, dynamic
        total0 = _multiply_row(
            total0, row0, q, t, e, codes, s, sc, first, lv, dy, p, n, bq, double, rounded
        )
        total1 = _multiply_row(
            total1, row1, q, t, e, codes, s, sc, first, lv, dy, p, n, bq, double, rounded
        )
        total2 = _multiply_row(
            total2, row2, q, t, e, codes, s, sc, first, lv, dy, p, n, bq, double, rounded
        )
        total3 = _multiply_row(
            total3, row3, q, t, e, codes, s, sc, first, lv, dy, p, n, bq, double, rounded
        )
    tl.store(y + row, tl.sum(total0).to(dtype), mask=row < outputs)
    tl.store(y + row + 1, tl.sum(total1).to(dtype), mask=row + 1 < outputs)
    tl.store(y + row + 2, tl.sum(total2).to(dtype), mask=row + 2 < outputs)
    tl.store(y + row + 3, tl.sum(total3).to(dtype), mask=row + 3 < outputs)


@triton.jit
def _product_tile(
    y,
    x,
    codes,
    scales,
    scale_codes,
    offset,
    levels,
    dynamic,
    rows,
    outputs,
    row_words,
    x_stride,
    block_words: tl.constexpr,
    double: tl.constexpr,
    tile_outputs: tl.constexpr,
    tile_rows: tl.constexpr,
    step: tl.constexpr,
    split: tl.constexpr,
):
    output = tl.program_id(0) * tile_outputs + tl.arange(0, tile_outputs)
    held = tl.minimum(output, outputs - 1)
    row = tl.arange(0, tile_rows)
    part = tl.program_id(1)
    element = tl.arange(0, 8)
    shift = (element >> 1) * 8 + (1 - (element & 1)) * 4
    first = 0.0
    if double:
        first = tl.load(offset)
    total = tl.zeros((tile_outputs, tile_rows), tl.float32)
    word = part * step + tl.arange(0, step)
    inside = (word < row_words)[None, :]
    index = held[:, None] * row_words + word[None, :]
    packed = tl.load(codes + index, mask=inside, other=0)
    scale = _scale_of(index // block_words, inside, scales, scale_codes, first, dynamic, double)
    for start in range(part * step, row_words, step * split):
        k = start * 8 + tl.arange(0, step * 8)
        values = tl.load(
            x + row[None, :] * x_stride + k[:, None],
            mask=(k[:, None] < row_words * 8) & (row[None, :] < rows),
            other=0.0,
        )
        code = (packed[:, :, None] >> shift[None, None, :]) & 15
        weight = tl.load(levels + code) * scale[:, :, None]
        # The next codes are asked for before these are multiplied.
        word = start + step * split + tl.arange(0, step)
        inside = (word < row_words)[None, :]
        index = held[:, None] * row_words + word[None, :]
        packed = tl.load(codes + index, mask=inside, other=0)
        scale = _scale_of(index // block_words, inside, scales, scale_codes, first, dynamic, double)
        weight = tl.reshape(weight, (tile_outputs, step * 8)).to(x.dtype.element_ty)
        total = tl.dot(weight, values, total)
    target = y + (part * rows + row[None, :]) * outputs + output[:, None]
    has = (output[:, None] < outputs) & (row[None, :] < rows)
    tl.store(target, total.to(y.dtype.element_ty), mask=has)


@triton.jit
def _sum_products(y, parts, numel, split: tl.constexpr, lanes: tl.constexpr):
    at = tl.program_id(0) * lanes + tl.arange(0, lanes)
    total = tl.zeros((lanes,), tl.float32)
    for i in tl.static_range(split):
        total += tl.load(parts + i * numel + at, mask=at < numel, other=0.0)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=at < numel)


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Returns the context to launch a kernel in: Triton looks at the current device only."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@cache
def _levels(quant_type: QuantType, device: torch.device) -> Tensor:
    return levels_of(quant_type).to(device)


@cache
def _dynamic(device: torch.device) -> Tensor:
    return blockwise.DYNAMIC_SIGNED.to(device)


@cache
def _planes(quant_type: QuantType, device: torch.device) -> Tensor:
    """The low bytes of the 16 levels in bfloat16, four to an int32, and the high bytes."""
    pairs = levels_of(quant_type).bfloat16().view(torch.uint8).view(16, 2)
    return pairs.t().contiguous().view(-1).view(torch.int32).to(device)


@cache
def encode_cells(quant_type: QuantType) -> tuple[Tensor, Tensor]:
    """Returns the tables `encode` looks codes up in, on the CPU.

    Cell c of 64 is what rounds to the integer c (from 32 on: c - 64) when multiplied by 16. FP4 is
    looked up by magnitude.

    Returns:
        int32 ``[64]``: the code below the cell's bound, and sixteen times the one above;
        float32 ``[64]``: the bound, infinite in a cell that has none.
    """
    bounds, codes = blockwise.cuda_bounds(quant_type)
    middles = torch.arange(64, device="cpu").float()
    middles[32:] -= 64
    lows = (middles - 0.5) / 16
    below = torch.bucketize(lows, bounds)
    bound = torch.cat([bounds, bounds.new_full((1,), torch.inf)])[below]
    bound[bound > lows + 1 / 16] = torch.inf
    above = (below + 1).clamp(max=len(codes) - 1)
    return codes[below].int() + 16 * codes[above].int(), bound


@cache
def _cells(quant_type: QuantType, device: torch.device) -> tuple[Tensor, Tensor]:
    codes, bounds = encode_cells(quant_type)
    return codes.to(device), bounds.to(device)


def encode(flat: Tensor, quant_type: QuantType, block_size: int) -> tuple[Tensor, Tensor]:
    """Finds the codes (packed, as QuantizedWeight's) and scales of flat values, in one launch."""
    numel, device = flat.numel(), flat.device
    codes = torch.empty(ceil(numel / 2), dtype=torch.uint8, device=device)
    scales = torch.empty(ceil(numel / block_size), dtype=torch.float32, device=device)
    if numel:
        rows = max(1, 1024 // block_size)
        warps = max(1, rows * block_size // 1024)
        with on_device(flat):
            _encode_blocks[(triton.cdiv(len(scales), rows),)](
                flat,
                codes,
                scales,
                *_cells(quant_type, device),
                numel,
                len(codes),
                len(scales),
                block_size=block_size,
                rows=rows,
                signed=quant_type == "nf4",
                num_warps=warps,
            )
    return codes, scales


def encode_scales(scales: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises ``scales - offset`` as `blockwise.encode_dynamic` does with ``cuda=True``."""
    blocks, groups = len(scales), ceil(len(scales) / SCALE_BLOCK)
    codes = torch.empty(blocks, dtype=torch.uint8, device=scales.device)
    scale_scales = torch.empty(groups, dtype=torch.float32, device=scales.device)
    if blocks:
        with on_device(scales):
            _encode_scales[(triton.cdiv(groups, 4),)](
                scales,
                offset,
                codes,
                scale_scales,
                _dynamic(scales.device),
                blocks,
                groups,
                block_size=SCALE_BLOCK,
                rows=4,
                num_warps=4,
            )
    return codes, scale_scales


def decode_all(weights: Sequence[QuantizedWeight], outs: Sequence[Tensor]) -> None:
    """Decodes several weights of one device, in one launch where their memory allows it.

    Args:
        weights: The weights.
        outs: For each, where it goes: float32, bfloat16 or float16, either contiguous and of as
            many elements, or ``[rows, columns]`` of a weight that is, with one stride of 1.
    """
    flat: list[tuple[QuantizedWeight, Tensor]] = []
    others: list[tuple[QuantizedWeight, Tensor]] = []
    for q, out in zip(weights, outs, strict=True):
        if not q.numel:
            continue
        aligned = q.numel % 8 == 0 and q.codes.data_ptr() % 16 == 0 and out.data_ptr() % 16 == 0
        (flat if aligned and out.is_contiguous() else others).append((q, out))
    for _, group in groupby(flat, _launch):
        pairs = list(group)
        for start in range(0, len(pairs), _WEIGHTS_A_LAUNCH):
            _decode_flat_ones(pairs[start : start + _WEIGHTS_A_LAUNCH])
    for q, out in others:
        _decode_other(q, out)


def _launch(pair: tuple[QuantizedWeight, Tensor]) -> tuple[Any, ...]:
    """What weights of one launch have in common."""
    q, out = pair
    return q.quant_type, q.block_size, q.double_quant, out.dtype, out.untyped_storage().data_ptr()


def _decode_flat_ones(pairs: Sequence[tuple[QuantizedWeight, Tensor]]) -> None:
    (q, out), device = pairs[0], pairs[0][1].device
    # Places after the first result, so that the table of a layer is the same wherever it goes.
    places = [(o.data_ptr() - out.data_ptr()) // (8 * o.itemsize) for _, o in pairs]
    rows = ((q.numel // 8, *_pointers(q), p) for (q, _), p in zip(pairs, places, strict=True))
    table, programs = _launch_table(tuple(rows), device)
    with on_device(out):
        _decode_flat[(programs,)](
            out,
            table,
            _levels(q.quant_type, device),
            _dynamic(device),
            count=len(pairs),
            block_words=q.block_size // 8,
            double=q.double_quant,
            lanes=_LANES,
            unroll=_UNROLL,
            num_warps=8,
            enable_fp_fusion=False,
        )


def _pointers(q: QuantizedWeight) -> tuple[int, int, int, int]:
    """Codes, (nested) scales, scale codes, offset; zero for what there is not."""
    scales = q.scales if q.scales is not None else q.scale_scales
    held = (q.codes, scales, q.scale_codes, q.scale_offset)
    codes, scale, scale_codes, offset = (0 if t is None else t.data_ptr() for t in held)
    return codes, scale, scale_codes, offset


@lru_cache(maxsize=1024)
def _launch_table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, int]:
    """The table of `_decode_flat`, and how many programs it takes.

    It says nothing that its key does not, so one that is kept is never wrong. Building it waits for
    the device, and cannot be part of a CUDA graph; a layer's is built when it is first decoded.
    """
    table, programs = [], 0
    for words, *pointers in rows:
        table.append([programs, words, *pointers])
        programs += triton.cdiv(words, _LANES * _UNROLL)
    return torch.tensor(table, dtype=torch.int64, device="cpu").to(device), programs


def _decode_other(q: QuantizedWeight, out: Tensor) -> None:
    """Decodes to any two strides of which one is 1, and from any alignment."""
    if out.is_contiguous() and out.shape != q.shape:
        out = out.view(q.shape)
    if out.dim() != 2:
        out = out.view(1, -1) if not out.dim() else out.flatten(0, -2)
    rows, columns = out.shape
    transposed = out.stride(1) != 1
    scales = q.scales if q.scales is not None else q.scale_scales
    tile_rows, tile_columns = (64, 64) if transposed or rows > 8 else (1, 1024)
    grid = (triton.cdiv(columns, tile_columns), triton.cdiv(rows, tile_rows))
    with on_device(out):
        _decode_tile[grid](
            out,
            q.codes,
            scales,
            q.scale_codes,
            q.scale_offset,
            _levels(q.quant_type, out.device),
            _dynamic(out.device),
            rows,
            columns,
            out.stride(1) if transposed else out.stride(0),
            block_size=q.block_size,
            double=q.double_quant,
            transposed=transposed,
            tile_rows=tile_rows,
            tile_columns=tile_columns,
            num_warps=4,
            enable_fp_fusion=False,
        )


def can_multiply(x: Tensor, q: QuantizedWeight) -> bool:
    """Returns whether `small_product` can do it, and is faster than decoding and cuBLAS."""
    return (
        x.shape[0] <= SMALL_ROWS
        and x.dtype in (torch.bfloat16, torch.float16)
        and q.shape[1] % 32 == 0
        and q.numel < 2**31
        and q.codes.data_ptr() % 16 == 0
    )


def small_product(x: Tensor, q: QuantizedWeight) -> Tensor:
    """Returns x·Wᵀ without writing W out: for the few rows of generation.

    A single row is multiplied by the levels (with bfloat16: rounded to that) and the sum of each
    32 by their scale, in float32; more rows by the weight rounded to the type of x, as `dequantize`
    rounds it.

    Args:
        x: [rows, in], bfloat16 or float16, at most `SMALL_ROWS` rows.
        q: A weight [out, in] with in a multiple of 32.

    Returns:
        [rows, out] in the dtype of x.

    Raises:
        ValueError: If ``can_multiply(x, q)`` is not so.
    """
    if not can_multiply(x, q):
        raise ValueError(
            f"a product of at most {SMALL_ROWS} rows of bfloat16 or float16 with a weight whose"
            f" rows are a multiple of 32 is expected; got {tuple(x.shape)}, {x.dtype}, and a"
            f" weight {q.shape}: decode it, and use torch.mm"
        )
    rows, outputs = x.shape[0], q.shape[0]
    x = x if x.stride(1) == 1 else x.contiguous()
    y = x.new_empty(rows, outputs)
    held = (
        q.codes.view(torch.int32),
        q.scales if q.scales is not None else q.scale_scales,
        q.scale_codes,
        q.scale_offset,
        _levels(q.quant_type, x.device),
        _dynamic(x.device),
    )
    kind: dict[str, Any] = {
        "double": q.double_quant,
        "num_stages": 1,
        "num_warps": 4,
        "enable_fp_fusion": False,
    }
    with on_device(x):
        if rows == 1:
            _product_one[(triton.cdiv(outputs, 4),)](
                y,
                x.view(torch.int32),
                *held,
                _planes(q.quant_type, x.device),
                outputs,
                q.shape[1] // 32,
                block_quads=q.block_size // 32,
                lanes=128,
                rounded=x.dtype == torch.bfloat16 and x.is_cuda,
                **kind,
            )
            return y
        # Parts of the sum over a row go to programs of their own, or there are too few.
        split = 4
        parts = torch.empty(split, rows, outputs, dtype=torch.float32, device=x.device)
        _product_tile[(triton.cdiv(outputs, 64), split)](
            parts,
            x,
            *held,
            rows,
            outputs,
            q.shape[1] // 8,
            x.stride(0),
            block_words=q.block_size // 8,
            tile_outputs=64,
            tile_rows=max(16, triton.next_power_of_2(rows)),
            step=32 if rows <= 32 else 16,
            split=split,
            **kind,
        )
        numel = rows * outputs
        _sum_products[(triton.cdiv(numel, 512),)](y, parts, numel, split=split, lanes=512)
    return y
