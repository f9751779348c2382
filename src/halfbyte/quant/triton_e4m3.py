"""e4m3 on a GPU: 4-bit weights decoded to it, and activations rounded to it row by row.

decode          The weights of a block have only 16 different values. These are rounded first, and
                fill four 32-bit registers; then an instruction that selects bytes (PRMT) decodes
                four codes, which are its selectors as they are packed. Rounding code by code took
                five times as many instructions, and more time than the memory needs.
                Also transposed: tensor cores multiply e4m3 only with the contracted dimension
                adjacent in memory, which is the other one in backward. There a lane decodes the
                same words of four rows, whose bytes are one 32-bit word of the result, and
                neighbouring lanes the next rows: nothing goes through shared memory. The scale of
                a row is found from the packed scales where it is needed (quant/e4m3.py), so there
                is no pass before.
quantize_rows   A program reads a row, holds it in registers if that is possible, and writes it.
                Several matrices become one, side by side: the gradients of linears that share an
                input, which are then one product.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.quant.e4m3 import DTYPE, SMALLEST, groups_across, in_whole_blocks, row_bounds
from halfbyte.quant.triton_blockwise import (
    dynamic_on,
    levels_on,
    on_device,
    scale_of,
)
from halfbyte.quant.weight import QuantizedWeight

# Columns of a program of `_decode_across`, in pairs of words of 8 codes, at most, and its rows, in
# fours.
_PAIRS, _QUADS = 4, 128
_LANES_DECODED = 256  # of a program of `_decode_e4m3`
# Of a program of `_quantize_rows`, and as many numbers as it holds in registers.
_LANES, _LANES_HELD = 4096, 16384
_MOST_PARTS = 3


@triton.jit
def to_e4m3(x, compiled: tl.constexpr):
    """Rounds float32 to the nearest e4m3, 448 at most."""
    if not compiled:
        x = tl.minimum(tl.maximum(x, -448.0), 448.0)  # as the instruction does, but for NaN
        # The cast of Triton's interpreter drops a carry, so what it is given is rounded already.
        bits = x.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        size = (tl.abs(x) + 24576.0) - 24576.0  # spacing 2**-9: 1.5 * 2**(23 - 9)
        x = tl.where(tl.abs(x) < 0.015625, tl.where(x < 0, -size, size), normal)
    return x.to(tl.float8e4nv)


@triton.jit
def _pack_four(a, b, c, d, compiled: tl.constexpr):
    """Rounds four float32 to e4m3, as the bytes of an integer, the first lowest."""
    if compiled:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; "
            "cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }",
            "=r,f,f,f,f",
            [a, b, c, d],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        four = to_e4m3(a, compiled).to(tl.uint8, bitcast=True).to(tl.int32)
        four |= to_e4m3(b, compiled).to(tl.uint8, bitcast=True).to(tl.int32) << 8
        four |= to_e4m3(c, compiled).to(tl.uint8, bitcast=True).to(tl.int32) << 16
        return four | (to_e4m3(d, compiled).to(tl.uint8, bitcast=True).to(tl.int32) << 24)


@triton.jit
def _row_exponent(
    row, has, scales, bounds, offset, blocks, double: tl.constexpr, span: tl.constexpr
):
    """The biased exponent of a row's scale: `e4m3.row_scales` of `e4m3.row_bounds`."""
    if double:
        group = (row * blocks) >> 8
        last = ((row + 1) * blocks - 1) >> 8
        bound = tl.load(scales + group, mask=has, other=0.0)
        for i in tl.static_range(1, span):
            more = tl.load(scales + tl.minimum(group + i, last), mask=has, other=0.0)
            bound = tl.maximum(bound, more)
        bound += tl.abs(offset)
    else:
        bound = tl.load(bounds + row, mask=has, other=0.0)
    return tl.maximum(((bound.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23) - 8, 1)


@triton.jit
def _inverse_of(exponent):
    # An exponent is at most 247, so the reciprocal is a normal number; it is exact.
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _factor_of_row(
    row,
    block,
    has,
    scales,
    scale_codes,
    first,
    bounds,
    dynamic,
    blocks,
    double: tl.constexpr,
    span: tl.constexpr,
):
    """What the levels of a row's block are multiplied with."""
    exponent = _row_exponent(row, has, scales, bounds, first, blocks, double, span)
    scale = scale_of(row * blocks + block, has, scales, scale_codes, first, dynamic, double)
    return scale * _inverse_of(exponent)


@triton.jit
def _table(levels, factor, compiled: tl.constexpr):
    """The 16 values of a block, rounded to e4m3, as the bytes of four integers."""
    a = _four_levels(levels, factor, 0, compiled)
    b = _four_levels(levels, factor, 4, compiled)
    c = _four_levels(levels, factor, 8, compiled)
    return a, b, c, _four_levels(levels, factor, 12, compiled)


@triton.jit
def _four_levels(levels, factor, first: tl.constexpr, compiled: tl.constexpr):
    return _pack_four(
        tl.load(levels + first) * factor,
        tl.load(levels + first + 1) * factor,
        tl.load(levels + first + 2) * factor,
        tl.load(levels + first + 3) * factor,
        compiled,
    )


@triton.jit
def _bytes_of(a, b, selector, compiled: tl.constexpr):
    """Selects four of eight bytes, those of a and then of b, each by a 4-bit number below 8."""
    if compiled:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [a, b, selector],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        selected = (a ^ a) | (b ^ b)
        for i in tl.static_range(4):
            number = (selector >> (4 * i)) & 7
            word = tl.where(number < 4, a, b)
            selected |= ((word >> ((number & 3) * 8)) & 255) << (8 * i)
        return selected


@triton.jit
def _values_of(word, table0, table1, table2, table3, compiled: tl.constexpr):
    """Decodes 8 codes to two integers: elements 1, 0, 3, 2 and 5, 4, 7, 6 of the word."""
    low, high = word & 0x77777777, (word >> 3) & 0x11111111
    first = _four_values(low, high, table0, table1, table2, table3, compiled)
    return first, _four_values(low >> 16, high >> 16, table0, table1, table2, table3, compiled)


@triton.jit
def _four_values(low, high, table0, table1, table2, table3, compiled: tl.constexpr):
    below = _bytes_of(table0, table1, low, compiled)
    above = _bytes_of(table2, table3, low, compiled)
    mask = _bytes_of(high * 0 + 0xFF00, high * 0, high, compiled)
    return (below & ~mask) | (above & mask)


@triton.jit
def _in_order(values, compiled: tl.constexpr):
    return _bytes_of(values, values, 0x2301, compiled)


@triton.jit
def _transposed(a, b, c, d, compiled: tl.constexpr):
    """Transposes four by four bytes."""
    ab, cd = _bytes_of(a, b, 0x5140, compiled), _bytes_of(c, d, 0x5140, compiled)
    ab_, cd_ = _bytes_of(a, b, 0x7362, compiled), _bytes_of(c, d, 0x7362, compiled)
    first, second = _bytes_of(ab, cd, 0x5410, compiled), _bytes_of(ab, cd, 0x7632, compiled)
    third, fourth = _bytes_of(ab_, cd_, 0x5410, compiled), _bytes_of(ab_, cd_, 0x7632, compiled)
    return first, second, third, fourth


@triton.jit
def _decode_e4m3(
    out,
    scale_out,
    codes,
    scales,
    scale_codes,
    offset,
    bounds,
    levels,
    dynamic,
    units,
    row_units,
    blocks,
    block_units: tl.constexpr,
    width: tl.constexpr,
    double: tl.constexpr,
    span: tl.constexpr,
    lanes: tl.constexpr,
    compiled: tl.constexpr,
):
    # A unit is what a lane decodes: `width` pairs of words of 8 codes, all of one block.
    first = 0.0
    if double:
        first = tl.load(offset)
    unit = tl.program_id(0) * lanes + tl.arange(0, lanes)
    inside = unit < units
    row, block = unit // row_units, unit // block_units
    exponent = _row_exponent(row, inside, scales, bounds, first, blocks, double, span)
    begins = inside & (unit == row * row_units)
    tl.store(scale_out + row, (exponent << 23).to(tl.float32, bitcast=True), mask=begins)
    factor = scale_of(block, inside, scales, scale_codes, first, dynamic, double)
    table0, table1, table2, table3 = _table(levels, factor * _inverse_of(exponent), compiled)
    pair = unit[:, None] * width + tl.arange(0, width)[None, :]
    packed = tl.load(codes + pair, mask=inside[:, None], other=0)
    t0, t1, t2, t3 = table0[:, None], table1[:, None], table2[:, None], table3[:, None]
    a, b = _values_of(packed.to(tl.int32), t0, t1, t2, t3, compiled)
    c, d = _values_of((packed >> 32).to(tl.int32), t0, t1, t2, t3, compiled)
    a, b = _in_order(a, compiled), _in_order(b, compiled)
    c, d = _in_order(c, compiled), _in_order(d, compiled)
    words = tl.join(tl.join(a, c), tl.join(b, d)).reshape(lanes, width * 4)
    target = out + unit.to(tl.int64)[:, None] * (width * 4) + tl.arange(0, width * 4)[None, :]
    tl.store(target, words, mask=inside[:, None])


@triton.jit
def _decode_across(
    across,
    codes,
    scales,
    scale_codes,
    offset,
    bounds,
    levels,
    dynamic,
    rows,
    row_pairs,
    blocks,
    stride,
    block_pairs: tl.constexpr,
    double: tl.constexpr,
    span: tl.constexpr,
    lanes: tl.constexpr,
    pairs: tl.constexpr,
    compiled: tl.constexpr,
):
    # Neighbouring lanes read words that are a row apart, each from a cache line of its own. So
    # there are as few loads as possible: of 16 codes at a time, and of the scale once for all of
    # its block that the program decodes.
    first = 0.0
    if double:
        first = tl.load(offset)
    quad = tl.program_id(1) * lanes + tl.arange(0, lanes)
    row = quad * 4
    has = row < rows
    together: tl.constexpr = min(block_pairs, pairs)
    for i in tl.static_range(pairs // together):
        start = tl.program_id(0) * pairs + i * together
        block = start // block_pairs
        f0 = _factor_of_row(
            row, block, has, scales, scale_codes, first, bounds, dynamic, blocks, double, span
        )
        f1 = _factor_of_row(
            row + 1, block, has, scales, scale_codes, first, bounds, dynamic, blocks, double, span
        )
        f2 = _factor_of_row(
            row + 2, block, has, scales, scale_codes, first, bounds, dynamic, blocks, double, span
        )
        f3 = _factor_of_row(
            row + 3, block, has, scales, scale_codes, first, bounds, dynamic, blocks, double, span
        )
        a0, a1, a2, a3 = _table(levels, f0, compiled)
        b0, b1, b2, b3 = _table(levels, f1, compiled)
        c0, c1, c2, c3 = _table(levels, f2, compiled)
        d0, d1, d2, d3 = _table(levels, f3, compiled)
        for j in tl.static_range(together):
            place = codes + row * row_pairs + start + j
            pair0 = tl.load(place, mask=has, other=0)
            pair1 = tl.load(place + row_pairs, mask=has, other=0)
            pair2 = tl.load(place + 2 * row_pairs, mask=has, other=0)
            pair3 = tl.load(place + 3 * row_pairs, mask=has, other=0)
            for half in tl.static_range(2):
                p0 = (pair0 >> (32 * half)).to(tl.int32)
                p1 = (pair1 >> (32 * half)).to(tl.int32)
                p2 = (pair2 >> (32 * half)).to(tl.int32)
                p3 = (pair3 >> (32 * half)).to(tl.int32)
                a, a_ = _values_of(p0, a0, a1, a2, a3, compiled)
                b, b_ = _values_of(p1, b0, b1, b2, b3, compiled)
                c, c_ = _values_of(p2, c0, c1, c2, c3, compiled)
                d, d_ = _values_of(p3, d0, d1, d2, d3, compiled)
                column = ((start + j) * 16 + half * 8).to(tl.int64)
                target = across + column * stride + quad
                _store_four(target, stride, a, b, c, d, has, compiled)
                _store_four(target + 4 * stride, stride, a_, b_, c_, d_, has, compiled)


@triton.jit
def _store_four(target, stride, a, b, c, d, has, compiled: tl.constexpr):
    one, zero, three, two = _transposed(a, b, c, d, compiled)
    tl.store(target, zero, mask=has)
    tl.store(target + stride, one, mask=has)
    tl.store(target + 2 * stride, two, mask=has)
    tl.store(target + 3 * stride, three, mask=has)


@triton.jit
def _scaled(x, factors, at, size, scaled: tl.constexpr):
    v = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
    if scaled:
        v *= tl.load(factors + at, mask=at < size, other=0.0).to(tl.float32)
    return v


@triton.jit
def _quantize_rows(
    out,
    scale_out,
    x0,
    x1,
    x2,
    factors,
    size0,
    size1,
    size2,
    stride0,
    stride1,
    stride2,
    parts: tl.constexpr,
    smallest: tl.constexpr,
    scaled: tl.constexpr,
    lanes: tl.constexpr,
    whole: tl.constexpr,
    compiled: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, lanes)
    x0 += row * stride0
    x1 += row * stride1
    x2 += row * stride2
    out0 = out + row * (size0 + size1 + size2)
    out1, factors1 = out0 + size0, factors + size0
    out2, factors2 = out1 + size1, factors1 + size1
    if whole:  # the row stays in registers
        v0 = _scaled(x0, factors, lane, size0, scaled)
        largest = tl.abs(v0)
        if parts > 1:
            v1 = _scaled(x1, factors1, lane, size1, scaled)
            largest = tl.maximum(largest, tl.abs(v1))
        if parts > 2:
            v2 = _scaled(x2, factors2, lane, size2, scaled)
            largest = tl.maximum(largest, tl.abs(v2))
        bound = tl.maximum(tl.max(largest, 0), smallest)
        inverse = tl.div_rn(448.0, bound)
        tl.store(out0 + lane, to_e4m3(v0 * inverse, compiled), mask=lane < size0)
        if parts > 1:
            tl.store(out1 + lane, to_e4m3(v1 * inverse, compiled), mask=lane < size1)
        if parts > 2:
            tl.store(out2 + lane, to_e4m3(v2 * inverse, compiled), mask=lane < size2)
    else:
        largest = tl.zeros((lanes,), tl.float32)
        for i in tl.static_range(parts):
            x, f, size = x0, factors, size0
            if i == 1:
                x, f, size = x1, factors1, size1
            if i == 2:
                x, f, size = x2, factors2, size2
            for first in range(0, size, lanes):
                largest = tl.maximum(largest, tl.abs(_scaled(x, f, first + lane, size, scaled)))
        bound = tl.maximum(tl.max(largest, 0), smallest)
        inverse = tl.div_rn(448.0, bound)
        for i in tl.static_range(parts):
            x, f, to, size = x0, factors, out0, size0
            if i == 1:
                x, f, to, size = x1, factors1, out1, size1
            if i == 2:
                x, f, to, size = x2, factors2, out2, size2
            for first in range(0, size, lanes):
                at = first + lane
                v = _scaled(x, f, at, size, scaled)
                tl.store(to + at, to_e4m3(v * inverse, compiled), mask=at < size)
    tl.store(scale_out + row, tl.div_rn(bound, 448.0))


def fits(packed: object) -> bool:
    """Returns whether `decode` supports a weight of a matrix."""
    return (
        isinstance(packed, QuantizedWeight)
        and in_whole_blocks(packed)
        and packed.shape[0] % 4 == 0
        and packed.block_size % 16 == 0
        and packed.codes.data_ptr() % 8 == 0
    )


def decode(q: QuantizedWeight, out: Tensor | None, across: Tensor | None, scale: Tensor) -> None:
    """Decodes a weight [out, in] to e4m3 with a scale for each row.

    Args:
        q: The weight; requires `fits`.
        out: e4m3 [out, in], contiguous; or None.
        across: e4m3 [in, out], the last dimension adjacent, rows aligned to 4 bytes; or None.
        scale: float32 [out], written with ``out``.
    """
    rows, columns = q.shape
    blocks = columns // q.block_size
    shared: dict[str, Any] = {
        "codes": q.codes.view(torch.int64),  # pairs of words of 8 codes
        "scales": q.scales if q.scales is not None else q.scale_scales,
        "scale_codes": q.scale_codes,
        "offset": q.scale_offset,
        "bounds": scale if q.double_quant else row_bounds(q),
        "levels": levels_on(q.quant_type, scale.device),
        "dynamic": dynamic_on(scale.device),
        "blocks": blocks,
        "double": q.double_quant,
        "span": groups_across(blocks),
        "compiled": scale.is_cuda,
        "enable_fp_fusion": False,
    }
    row_pairs, block_pairs = columns // 16, q.block_size // 16
    with on_device(scale):
        if out is not None:
            width = min(2, block_pairs)
            units = q.numel // (16 * width)
            _decode_e4m3[(triton.cdiv(units, _LANES_DECODED),)](
                out.view(torch.int32),
                scale,
                units=units,
                row_units=row_pairs // width,
                block_units=block_pairs // width,
                width=width,
                lanes=_LANES_DECODED,
                num_warps=4,
                **shared,
            )
        if across is not None:
            wide, pairs = across.view(torch.int32), gcd(row_pairs, _PAIRS)
            _decode_across[row_pairs // pairs, triton.cdiv(rows, 4 * _QUADS)](
                wide,
                rows=rows,
                row_pairs=row_pairs,
                block_pairs=block_pairs,
                stride=wide.stride(0),
                lanes=_QUADS,
                pairs=pairs,
                num_warps=4,
                **shared,
            )


def quantize_rows(parts: Sequence[Tensor], factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns matrices side by side as e4m3 [rows, sum of n], and the scale of each row.

    Args:
        parts: [rows, n], contiguous rows; at most three.
        factors: Of all columns, [sum of n], which the numbers are multiplied with first: read once
            a row, so of 16 bits where that is exact.

    Returns:
        e4m3 [rows, sum of n], and float32 [rows, 1].
    """
    first, rows = parts[0], parts[0].shape[0]
    sizes = [part.shape[1] for part in parts]
    filled = (*parts, *[first] * (_MOST_PARTS - len(parts)))
    out = torch.empty(rows, sum(sizes), dtype=DTYPE, device=first.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=first.device)
    sizes += [0] * (_MOST_PARTS - len(parts))
    lanes = triton.next_power_of_2(max(sizes))
    whole = len(parts) * lanes <= _LANES_HELD
    lanes = lanes if whole else _LANES
    with on_device(first):
        _quantize_rows[(rows,)](
            out,
            scale,
            *filled,
            scale if factors is None else factors,
            *sizes,
            *(part.stride(0) for part in filled),
            parts=len(parts),
            smallest=SMALLEST,
            scaled=factors is not None,
            lanes=lanes,
            whole=whole,
            compiled=first.is_cuda,
            num_warps=8 if whole else 16,
        )
    return out, scale
