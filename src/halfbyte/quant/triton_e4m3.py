"""e4m3 on a GPU: 4-bit weights decoded to it, and activations rounded to it row by row.

decode          As triton_blockwise.py does, and transposed: tensor cores multiply e4m3 only
                with the contracted dimension adjacent in memory, which is the other one in
                backward. There a lane decodes the same words of four rows, whose bytes are one
                32-bit word of the result, and neighbouring lanes the next rows: nothing goes
                through shared memory. The scale of a row is found from the packed scales where
                it is needed (quant/e4m3.py), so there is no pass before.
quantize_rows   A program reads a row twice, the second time from the L1 cache if it is long,
                and writes it once. Several matrices become one, side by side: the gradients of
                linears that share an input, which are then one product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.quant.e4m3 import DTYPE, SMALLEST, groups_across, in_whole_blocks, row_bounds
from halfbyte.quant.triton_blockwise import (
    LANES,
    UNROLL,
    dynamic_on,
    levels_on,
    on_device,
    scale_of,
)
from halfbyte.quant.weight import QuantizedWeight

# Columns of a program of `_decode_across`, in words of 8 codes, and its rows, in fours.
_WORDS, _QUADS = 4, 128
_LANES = 4096
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
    words,
    row_words,
    blocks,
    block_words: tl.constexpr,
    double: tl.constexpr,
    span: tl.constexpr,
    lanes: tl.constexpr,
    unroll: tl.constexpr,
    compiled: tl.constexpr,
):
    first = 0.0
    if double:
        first = tl.load(offset)
    element = tl.arange(0, 8)
    shift = (element >> 1) * 8 + (1 - (element & 1)) * 4
    for i in tl.static_range(unroll):
        word = (tl.program_id(0) * unroll + i) * lanes + tl.arange(0, lanes)
        inside = word < words
        row = word // row_words
        exponent = _row_exponent(row, inside, scales, bounds, first, blocks, double, span)
        begins = inside & (word == row * row_words)
        tl.store(scale_out + row, (exponent << 23).to(tl.float32, bitcast=True), mask=begins)
        packed = tl.load(codes + word, mask=inside, other=0)
        block = word // block_words
        scale = scale_of(block, inside, scales, scale_codes, first, dynamic, double)
        scale *= _inverse_of(exponent)
        code = (packed[:, None] >> shift[None, :]) & 15
        value = to_e4m3(tl.load(levels + code) * scale[:, None], compiled)
        target = out + word.to(tl.int64)[:, None] * 8 + element[None, :]
        tl.store(target, value, mask=inside[:, None])


@triton.jit
def _word_of_row(
    row,
    word,
    has,
    codes,
    scales,
    scale_codes,
    first,
    bounds,
    dynamic,
    row_words,
    blocks,
    block_words: tl.constexpr,
    double: tl.constexpr,
    span: tl.constexpr,
):
    """A word of 8 codes, and what their levels are multiplied with."""
    exponent = _row_exponent(row, has, scales, bounds, first, blocks, double, span)
    block = row * blocks + word // block_words
    scale = scale_of(block, has, scales, scale_codes, first, dynamic, double)
    packed = tl.load(codes + row * row_words + word, mask=has, other=0)
    return packed, scale * _inverse_of(exponent)


@triton.jit
def _level(levels, packed, element: tl.constexpr):
    return tl.load(levels + ((packed >> ((element >> 1) * 8 + (1 - (element & 1)) * 4)) & 15))


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
    row_words,
    blocks,
    stride,
    block_words: tl.constexpr,
    double: tl.constexpr,
    span: tl.constexpr,
    lanes: tl.constexpr,
    unroll: tl.constexpr,
    compiled: tl.constexpr,
):
    first = 0.0
    if double:
        first = tl.load(offset)
    quad = tl.program_id(1) * lanes + tl.arange(0, lanes)
    row = quad * 4
    has = row < rows
    for i in tl.static_range(unroll):
        word = tl.program_id(0) * unroll + i
        p0, s0 = _word_of_row(
            row,
            word,
            has,
            codes,
            scales,
            scale_codes,
            first,
            bounds,
            dynamic,
            row_words,
            blocks,
            block_words,
            double,
            span,
        )
        p1, s1 = _word_of_row(
            row + 1,
            word,
            has,
            codes,
            scales,
            scale_codes,
            first,
            bounds,
            dynamic,
            row_words,
            blocks,
            block_words,
            double,
            span,
        )
        p2, s2 = _word_of_row(
            row + 2,
            word,
            has,
            codes,
            scales,
            scale_codes,
            first,
            bounds,
            dynamic,
            row_words,
            blocks,
            block_words,
            double,
            span,
        )
        p3, s3 = _word_of_row(
            row + 3,
            word,
            has,
            codes,
            scales,
            scale_codes,
            first,
            bounds,
            dynamic,
            row_words,
            blocks,
            block_words,
            double,
            span,
        )
        for element in tl.static_range(8):
            a = _level(levels, p0, element) * s0
            b = _level(levels, p1, element) * s1
            c = _level(levels, p2, element) * s2
            d = _level(levels, p3, element) * s3
            target = across + (word * 8 + element).to(tl.int64) * stride + quad
            tl.store(target, _pack_four(a, b, c, d, compiled), mask=has)


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
    single: tl.constexpr,
    compiled: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, lanes)
    out += row * (size0 + size1 + size2)
    if single:  # it stays in registers
        inside = lane < size0
        v = tl.load(x0 + row * stride0 + lane, mask=inside, other=0.0).to(tl.float32)
        if scaled:
            v *= tl.load(factors + lane, mask=inside, other=0.0)
        bound = tl.maximum(tl.max(tl.abs(v), 0), smallest)
        tl.store(out + lane, to_e4m3(v * tl.div_rn(448.0, bound), compiled), mask=inside)
    else:
        largest = tl.zeros((lanes,), tl.float32)
        for i in tl.static_range(parts):
            x, size, start = x0 + row * stride0, size0, 0
            if i == 1:
                x, size, start = x1 + row * stride1, size1, size0
            if i == 2:
                x, size, start = x2 + row * stride2, size2, size0 + size1
            for first in range(0, size, lanes):
                at = first + lane
                v = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
                if scaled:
                    v *= tl.load(factors + start + at, mask=at < size, other=0.0)
                largest = tl.maximum(largest, tl.abs(v))
        bound = tl.maximum(tl.max(largest, 0), smallest)
        inverse = tl.div_rn(448.0, bound)
        for i in tl.static_range(parts):
            x, size, start = x0 + row * stride0, size0, 0
            if i == 1:
                x, size, start = x1 + row * stride1, size1, size0
            if i == 2:
                x, size, start = x2 + row * stride2, size2, size0 + size1
            for first in range(0, size, lanes):
                at = first + lane
                v = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
                if scaled:
                    v *= tl.load(factors + start + at, mask=at < size, other=0.0)
                tl.store(out + start + at, to_e4m3(v * inverse, compiled), mask=at < size)
    tl.store(scale_out + row, tl.div_rn(bound, 448.0))


def fits(packed: object) -> bool:
    """Returns whether `decode` supports a weight of a matrix."""
    return (
        isinstance(packed, QuantizedWeight)
        and in_whole_blocks(packed)
        and packed.shape[0] % 4 == 0
        and packed.shape[1] % (8 * _WORDS) == 0
        and packed.codes.data_ptr() % 4 == 0
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
        "codes": q.codes.view(torch.int32),
        "scales": q.scales if q.scales is not None else q.scale_scales,
        "scale_codes": q.scale_codes,
        "offset": q.scale_offset,
        "bounds": scale if q.double_quant else row_bounds(q),
        "levels": levels_on(q.quant_type, scale.device),
        "dynamic": dynamic_on(scale.device),
        "row_words": columns // 8,
        "blocks": blocks,
        "block_words": q.block_size // 8,
        "double": q.double_quant,
        "span": groups_across(blocks),
        "compiled": scale.is_cuda,
        "enable_fp_fusion": False,
    }
    with on_device(scale):
        if out is not None:
            words = q.numel // 8
            _decode_e4m3[(triton.cdiv(words, LANES * UNROLL),)](
                out, scale, words=words, lanes=LANES, unroll=UNROLL, num_warps=8, **shared
            )
        if across is not None:
            grid = (columns // (8 * _WORDS), triton.cdiv(rows, 4 * _QUADS))
            wide = across.view(torch.int32)
            _decode_across[grid](
                wide,
                rows=rows,
                stride=wide.stride(0),
                lanes=_QUADS,
                unroll=_WORDS,
                num_warps=4,
                **shared,
            )


def quantize_rows(parts: Sequence[Tensor], factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns matrices side by side as e4m3 [rows, sum of n], and the scale of each row.

    Args:
        parts: [rows, n], contiguous rows; at most three.
        factors: Of all columns, float32 [sum of n], which the numbers are multiplied with first.

    Returns:
        e4m3 [rows, sum of n], and float32 [rows, 1].
    """
    first, rows = parts[0], parts[0].shape[0]
    sizes = [part.shape[1] for part in parts]
    filled = (*parts, *[first] * (_MOST_PARTS - len(parts)))
    out = torch.empty(rows, sum(sizes), dtype=DTYPE, device=first.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=first.device)
    sizes += [0] * (_MOST_PARTS - len(parts))
    lanes = min(_LANES, triton.next_power_of_2(max(sizes)))
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
            single=len(parts) == 1 and sizes[0] <= lanes,
            compiled=first.is_cuda,
            num_warps=8 if lanes >= 2048 else 4,
        )
    return out, scale
