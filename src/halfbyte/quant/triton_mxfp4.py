"""MXFP4 on a GPU, in Triton: decode. Equal to the plain PyTorch of mxfp4.py bit for bit.

Memory is read and written as in triton_blockwise.py: a lane reads one 32-bit word, 8 codes, and
writes 8 adjacent weights, and many weights share a launch, as the experts of a layer do. There are
no tables: doubled levels are digits of a constant, half the scale is put together from its bits.
The product of both is exact, so it matters not what the compiler fuses. The sign is set last, since
a zero has one, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from halfbyte.quant.mxfp4 import MXFP4Weight
from halfbyte.quant.triton_blockwise import (
    LANES,
    UNROLL,
    WEIGHTS_A_LAUNCH,
    launch_table,
    on_device,
)


@triton.jit
def _value(code, scale):
    """Returns float32 weights of codes and scales, both int32 and of shapes that broadcast."""
    # The hexadecimal digits, from the last: 0 1 2 3 4 6 8 12, the magnitudes of codes 0 to 7.
    doubled = ((0xC8643210 >> ((code & 7) * 4).to(tl.uint32)) & 15).to(tl.float32)
    # float32's bits of 2^(scale - 128); scales 0 and 1 are subnormal there.
    half = tl.where(scale < 2, 0x200000 << (scale & 1), (scale - 1) << 23)
    magnitude = doubled * half.to(tl.float32, bitcast=True)
    return (magnitude.to(tl.int32, bitcast=True) | ((code & 8) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def decode_mxfp4_words(out, first, words, codes, scales, lanes: tl.constexpr, unroll: tl.constexpr):
    """Decodes `lanes` · `unroll` words of 8 codes from ``first`` on, to their place in ``out``."""
    out += tl.cast(first, tl.int64) * 8
    element = tl.arange(0, 8)
    for i in tl.static_range(unroll):
        lane = i * lanes + tl.arange(0, lanes)
        word = first + lane
        inside = word < words
        packed = tl.load(codes + word, mask=inside, other=0)
        scale = tl.load(scales + word // 4, mask=inside, other=0).to(tl.int32)
        code = (packed[:, None] >> (element * 4)[None, :]) & 15
        tl.store(
            out + lane[:, None] * 8 + element[None, :],
            _value(code, scale[:, None]).to(out.dtype.element_ty),
            mask=inside[:, None],
        )


@triton.jit
def _decode_mxfp4(out, weights, count: tl.constexpr, lanes: tl.constexpr, unroll: tl.constexpr):
    # A row of the table: first program, words, codes, scales, and the offset of the result in words
    # after `out`.
    program = tl.program_id(0)
    mine = 0
    for i in tl.static_range(1, count):
        mine += tl.where(program >= tl.load(weights + i * 5), 1, 0)
    row = weights + mine * 5
    first = (program - tl.load(row).to(tl.int32)) * (lanes * unroll)
    words = tl.load(row + 1).to(tl.int32)
    codes = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(tl.int32)), 16)
    scales = tl.load(row + 3).to(tl.pointer_type(tl.uint8))
    # There may be more than 2**31 elements, but not words: an eighth of that.
    out += tl.load(row + 4) * 8
    decode_mxfp4_words(out, first, words, codes, scales, lanes, unroll)


@triton.jit
def _decode_mxfp4_tile(
    out,
    codes,
    scales,
    rows,
    columns,
    stride,
    transposed: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64) * tile_rows + tl.arange(0, tile_rows)
    column = tl.program_id(0).to(tl.int64) * tile_columns + tl.arange(0, tile_columns)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    index = row[:, None] * columns + column[None, :]
    byte = tl.load(codes + index // 2, mask=inside, other=0).to(tl.int32)
    code = (byte >> ((index & 1) * 4).to(tl.int32)) & 15
    scale = tl.load(scales + index // 32, mask=inside, other=0).to(tl.int32)
    value = _value(code, scale).to(out.dtype.element_ty)
    if transposed:
        target = out + column[:, None] * stride + row[None, :]
        inside = (column[:, None] < columns) & (row[None, :] < rows)
        tl.store(target, tl.trans(value), mask=inside)
    else:
        tl.store(out + row[:, None] * stride + column[None, :], value, mask=inside)


def decode_all(weights: Sequence[MXFP4Weight], outs: Sequence[Tensor]) -> None:
    """Decodes several weights of one device, in one launch where their memory allows it.

    Args:
        weights: The weights.
        outs: The output of each, as for `triton_blockwise.decode_all`.
    """
    flat: list[tuple[MXFP4Weight, Tensor]] = []
    for q, out in zip(weights, outs, strict=True):
        if not q.numel:
            continue
        if out.is_contiguous() and q.codes.data_ptr() % 16 == 0 and out.data_ptr() % 16 == 0:
            flat.append((q, out))
        else:
            _decode_other(q, out)
    for _, group in groupby(flat, _launch):
        pairs = list(group)
        for start in range(0, len(pairs), WEIGHTS_A_LAUNCH):
            _decode_flat(pairs[start : start + WEIGHTS_A_LAUNCH])


def _launch(pair: tuple[MXFP4Weight, Tensor]) -> tuple[Any, ...]:
    """Key of the weights that can share a launch."""
    return pair[1].dtype, pair[1].untyped_storage().data_ptr()


def _decode_flat(pairs: Sequence[tuple[MXFP4Weight, Tensor]]) -> None:
    first = pairs[0][1]
    rows = tuple(
        (
            q.numel // 8,
            q.codes.data_ptr(),
            q.scales.data_ptr(),
            (out.data_ptr() - first.data_ptr()) // (8 * out.itemsize),
        )
        for q, out in pairs
    )
    table, programs = launch_table(rows, first.device)
    with on_device(first):
        _decode_mxfp4[(programs,)](
            first, table, count=len(pairs), lanes=LANES, unroll=UNROLL, num_warps=8
        )


def _decode_other(q: MXFP4Weight, out: Tensor) -> None:
    """Decodes to any two strides, one of them 1, and from any alignment."""
    if out.is_contiguous():
        out = out.view(-1, q.shape[-1])
    rows, columns = out.shape
    transposed = out.stride(1) != 1
    tile_rows, tile_columns = (64, 64) if transposed or rows > 8 else (1, 1024)
    grid = (triton.cdiv(columns, tile_columns), triton.cdiv(rows, tile_rows))
    with on_device(out):
        _decode_mxfp4_tile[grid](
            out,
            q.codes,
            q.scales,
            rows,
            columns,
            out.stride(1) if transposed else out.stride(0),
            transposed=transposed,
            tile_rows=tile_rows,
            tile_columns=tile_columns,
            num_warps=4,
        )
