"""e4m3 on a GPU: 4-bit weights decoded to it, and activations rounded to it row by row.

decode          A program decodes a tile of 128 rows and 128 columns, and writes it as it is,
                transposed, or both: tensor cores multiply e4m3 only with the contracted
                dimension adjacent in memory, which is the other one in backward. A lane reads
                a word of 8 codes. The scale of a row is found from the packed scales in the
                same program (quant/e4m3.py), so there is no pass before.
quantize_rows   A program reads a row twice, the second time from the L1 cache if it is long,
                and writes it once. Several matrices become one, side by side: the gradients of
                linears that share an input, which are then one product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.quant.e4m3 import DTYPE, SMALLEST, groups_across, in_whole_blocks, row_bounds
from halfbyte.quant.triton_blockwise import dynamic_on, levels_on, on_device, scale_of
from halfbyte.quant.weight import QuantizedWeight

_TILE = 128
_MOST_PARTS = 3


@triton.jit
def to_e4m3(x, compiled: tl.constexpr):
    """Rounds float32 to the nearest e4m3, 448 at most."""
    if not compiled:
        x = tl.minimum(tl.maximum(x, -448.0), 448.0)  # as the instruction does
        # The cast of Triton's interpreter drops a carry, so what it is given is rounded already.
        bits = x.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        size = (tl.abs(x) + 24576.0) - 24576.0  # spacing 2**-9: 1.5 * 2**(23 - 9)
        x = tl.where(tl.abs(x) < 0.015625, tl.where(x < 0, -size, size), normal)
    return x.to(tl.float8e4nv)


@triton.jit
def _decode_e4m3(
    out,
    across,
    scale_out,
    codes,
    scales,
    scale_codes,
    offset,
    bounds,
    levels,
    dynamic,
    rows,
    columns,
    across_stride,
    block_size: tl.constexpr,
    double: tl.constexpr,
    span: tl.constexpr,
    straight: tl.constexpr,
    transposed: tl.constexpr,
    tile: tl.constexpr,
    compiled: tl.constexpr,
):
    start = tl.program_id(0) * tile
    blocks = columns // block_size
    word = start // 8 + tl.arange(0, tile // 8)
    element = tl.arange(0, 8)
    shift = (element >> 1) * 8 + (1 - (element & 1)) * 4
    first = 0.0
    if double:
        first = tl.load(offset)
    # Four rows at a time: in the transposed copy they are adjacent, and one 32-bit word.
    quad = tl.program_id(1) * (tile // 4) + tl.arange(0, tile // 4)
    four = tl.zeros((tile // 4, tile), tl.int32)
    for i in tl.static_range(4):
        row = 4 * quad + i
        has = row < rows
        if double:
            group = (row * blocks) >> 8
            last = ((row + 1) * blocks - 1) >> 8
            bound = tl.load(scales + group, mask=has, other=0.0)
            for j in tl.static_range(1, span):
                more = tl.load(scales + tl.minimum(group + j, last), mask=has, other=0.0)
                bound = tl.maximum(bound, more)
            bound += tl.abs(first)
        else:
            bound = tl.load(bounds + row, mask=has, other=0.0)
        exponent = ((bound.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23) - 8
        exponent = tl.maximum(exponent, 1)
        if tl.program_id(0) == 0:
            tl.store(scale_out + row, (exponent << 23).to(tl.float32, bitcast=True), mask=has)
        # exponent is at most 247, so the reciprocal is a normal number; it is exact.
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        inside = has[:, None] & (word * 8 < columns)[None, :]
        # Words are an eighth of the elements, so their numbers fit 32 bits.
        at = row[:, None] * (columns // 8) + word[None, :]
        packed = tl.load(codes + at, mask=inside, other=0)
        block = row[:, None] * blocks + (word * 8 // block_size)[None, :]
        scale = scale_of(block, inside, scales, scale_codes, first, dynamic, double)
        scale *= inverse[:, None]
        code = (packed[:, :, None] >> shift[None, None, :]) & 15
        value = to_e4m3(tl.load(levels + code) * scale[:, :, None], compiled)
        value = value.reshape(tile // 4, tile)
        if straight:
            column = start + tl.arange(0, tile)
            inside = has[:, None] & (column < columns)[None, :]
            target = out + row.to(tl.int64)[:, None] * columns + column[None, :]
            tl.store(target, value, mask=inside)
        if transposed:
            four |= value.to(tl.uint8, bitcast=True).to(tl.int32) << (8 * i)
    if transposed:
        column = start + tl.arange(0, tile)
        target = across + column.to(tl.int64)[:, None] * across_stride + quad[None, :]
        tl.store(target, tl.trans(four), mask=(column < columns)[:, None] & (4 * quad < rows)[None])


@triton.jit
def _scaled(held, factors, start, size, lane, scaled: tl.constexpr):
    v = held.to(tl.float32)
    if scaled:
        v *= tl.load(factors + start + lane, mask=lane < size, other=0.0)
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
    compiled: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, lanes)
    out += row * (size0 + size1 + size2)
    # All of a row stays in registers, in the 16 bits it has in memory.
    held0 = tl.load(x0 + row * stride0 + lane, mask=lane < size0, other=0.0)
    largest = tl.abs(_scaled(held0, factors, 0, size0, lane, scaled))
    held1, held2 = held0, held0
    if parts > 1:
        held1 = tl.load(x1 + row * stride1 + lane, mask=lane < size1, other=0.0)
        more = tl.abs(_scaled(held1, factors, size0, size1, lane, scaled))
        largest = tl.maximum(largest, more)
    if parts > 2:
        held2 = tl.load(x2 + row * stride2 + lane, mask=lane < size2, other=0.0)
        more = tl.abs(_scaled(held2, factors, size0 + size1, size2, lane, scaled))
        largest = tl.maximum(largest, more)
    bound = tl.maximum(tl.max(largest, 0), smallest)
    tl.store(scale_out + row, tl.div_rn(bound, 448.0))
    inverse = tl.div_rn(448.0, bound)
    v = _scaled(held0, factors, 0, size0, lane, scaled)
    tl.store(out + lane, to_e4m3(v * inverse, compiled), mask=lane < size0)
    if parts > 1:
        v = _scaled(held1, factors, size0, size1, lane, scaled)
        tl.store(out + size0 + lane, to_e4m3(v * inverse, compiled), mask=lane < size1)
    if parts > 2:
        v = _scaled(held2, factors, size0 + size1, size2, lane, scaled)
        tl.store(out + size0 + size1 + lane, to_e4m3(v * inverse, compiled), mask=lane < size2)


def fits(packed: object) -> bool:
    """Returns whether `decode` supports a weight of a matrix."""
    return (
        isinstance(packed, QuantizedWeight)
        and in_whole_blocks(packed)
        and packed.shape[0] % 4 == 0
        and packed.shape[1] % 8 == 0
        and packed.codes.data_ptr() % 4 == 0
    )


def decode(q: QuantizedWeight, out: Tensor | None, across: Tensor | None, scale: Tensor) -> None:
    """Decodes a weight [out, in] to e4m3 with a scale for each row.

    Args:
        q: The weight; requires `fits`.
        out: e4m3 [out, in], contiguous; or None.
        across: e4m3 [in, out], the last dimension adjacent, rows aligned to 4 bytes; or None.
        scale: float32 [out].
    """
    rows, columns = q.shape
    bounds = scale if q.double_quant else row_bounds(q)
    scales = q.scales if q.scales is not None else q.scale_scales
    words = scale if across is None else across.view(torch.int32)
    grid = (triton.cdiv(columns, _TILE), triton.cdiv(rows, _TILE))
    with on_device(scale):
        _decode_e4m3[grid](
            scale if out is None else out,
            words,
            scale,
            q.codes.view(torch.int32),
            scales,
            q.scale_codes,
            q.scale_offset,
            bounds,
            levels_on(q.quant_type, scale.device),
            dynamic_on(scale.device),
            rows,
            columns,
            words.stride(0),
            block_size=q.block_size,
            double=q.double_quant,
            span=groups_across(columns // q.block_size),
            straight=out is not None,
            transposed=across is not None,
            tile=_TILE,
            compiled=scale.is_cuda,
            num_warps=8,
            enable_fp_fusion=False,
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
    lanes = triton.next_power_of_2(max(sizes))
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
            compiled=first.is_cuda,
            num_warps=min(16, max(4, triton.next_power_of_2(len(parts)) * lanes // 512)),
        )
    return out, scale
