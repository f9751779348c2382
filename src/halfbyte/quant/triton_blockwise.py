"""The 4-bit format on a GPU, in Triton: decode and encode.

These kernels are memory-bound: a decode takes at least the time to read 0.516 bytes per weight and
write 2. So their structure follows the memory accesses.

    decode     A lane reads one 32-bit word, 8 codes, and writes 16 bytes of 16-bit weights, so a
               warp reads 128 and writes 512 contiguous bytes. Levels come from a 64-byte table that
               stays in the L1 cache; scales are decoded on the fly from their 8-bit codes.
               Many weights share a launch, since a small one cannot fill the GPU.
    encode     A lane holds 8 adjacent weights; the maximum of a block is found by shuffles. The
               level is found with two loads and one comparison: in cells of 1/16, no cell has more
               than one bound.

Decoding equals the plain PyTorch of format.py bit for bit, and encoding that with ``cuda=True``
except for an approximate reciprocal: the bytes of bitsandbytes' CUDA code. Scales are multiplied,
rounded, and added to: a fused operation would change the last bit of many, so the compiler may not
fuse (``enable_fp_fusion=False``).

Measurements are in benchmarks/results, failed experiments in LAB.md.
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

from halfbyte.quant import blockwise
from halfbyte.quant.weight import SCALE_BLOCK, QuantizedWeight, QuantType, levels_of

# Maximum weights in one launch of `_decode_flat`; a program finds its own by testing every start.
WEIGHTS_A_LAUNCH = 16
LANES, UNROLL = 256, 2


@triton.jit
def scale_of(block, inside, scales, scale_codes, offset, dynamic, double: tl.constexpr):
    """Loads the scales of blocks, decoding them if they are coded."""
    if double:
        code = tl.load(scale_codes + block, mask=inside, other=0).to(tl.int32)
        level = tl.load(dynamic + code)
        return level * tl.load(scales + (block >> 8), mask=inside, other=0.0) + offset
    else:
        return tl.load(scales + block, mask=inside, other=0.0)


@triton.jit
def decode_words(
    out,
    first,
    words,
    codes,
    scales,
    scale_codes,
    offset,
    levels,
    dynamic,
    block_words: tl.constexpr,
    double: tl.constexpr,
    lanes: tl.constexpr,
    unroll: tl.constexpr,
):
    """Decodes `lanes` · `unroll` words of 8 codes from ``first`` on, to their place in ``out``."""
    out += tl.cast(first, tl.int64) * 8
    element = tl.arange(0, 8)
    shift = (element >> 1) * 8 + (1 - (element & 1)) * 4
    for i in tl.static_range(unroll):
        lane = i * lanes + tl.arange(0, lanes)
        word = first + lane
        inside = word < words
        packed = tl.load(codes + word, mask=inside, other=0)
        block = word // block_words
        scale = scale_of(block, inside, scales, scale_codes, offset, dynamic, double)
        code = (packed[:, None] >> shift[None, :]) & 15
        value = tl.load(levels + code) * scale[:, None]
        tl.store(
            out + lane[:, None] * 8 + element[None, :],
            value.to(out.dtype.element_ty),
            mask=inside[:, None],
        )


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
    # A row of the table: first program, words, codes, scales, scale codes, offset, and the offset
    # of the result in words after `out`.
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
    # There may be more than 2**31 elements, but not words: an eighth of that.
    out += tl.load(row + 6) * 8
    decode_words(
        out,
        first,
        words,
        codes,
        scales,
        scale_codes,
        offset,
        levels,
        dynamic,
        block_words,
        double,
        lanes,
        unroll,
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
    value = tl.load(levels + code) * scale_of(
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
    # The maximum as an integer: NaN is larger than all values, and so is preserved.
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


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Returns the context to launch a kernel in: Triton looks at the current device only."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@cache
def levels_on(quant_type: QuantType, device: torch.device) -> Tensor:
    """Returns `levels_of`, kept on a device."""
    return levels_of(quant_type).to(device)


@cache
def dynamic_on(device: torch.device) -> Tensor:
    """Returns the table of scale codes, kept on a device."""
    return blockwise.DYNAMIC_SIGNED.to(device)


@cache
def encode_cells(quant_type: QuantType) -> tuple[Tensor, Tensor]:
    """Returns the code tables of `encode`, on the CPU.

    Cell c of 64 contains the values that, times 16, round to the integer c (from 32 on: c - 64).
    FP4 is looked up by magnitude.

    Returns:
        int32 ``[64]``: the code below the cell's bound, plus sixteen times the one above;
        float32 ``[64]``: the bound, infinite in a cell without one.
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
                dynamic_on(scales.device),
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
        outs: The output of each: float32, bfloat16 or float16, either contiguous with the same
            number of elements, or ``[rows, columns]`` for such a weight, with one stride of 1.
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
        for start in range(0, len(pairs), WEIGHTS_A_LAUNCH):
            _decode_flat_ones(pairs[start : start + WEIGHTS_A_LAUNCH])
    for q, out in others:
        _decode_other(q, out)


def _launch(pair: tuple[QuantizedWeight, Tensor]) -> tuple[Any, ...]:
    """Key of the weights that can share a launch."""
    q, out = pair
    return q.quant_type, q.block_size, q.double_quant, out.dtype, out.untyped_storage().data_ptr()


def _decode_flat_ones(pairs: Sequence[tuple[QuantizedWeight, Tensor]]) -> None:
    (q, out), device = pairs[0], pairs[0][1].device
    # Offsets from the first result, so that a layer's table does not depend on the address.
    places = [(o.data_ptr() - out.data_ptr()) // (8 * o.itemsize) for _, o in pairs]
    rows = ((q.numel // 8, *_pointers(q), p) for (q, _), p in zip(pairs, places, strict=True))
    table, programs = launch_table(tuple(rows), device)
    with on_device(out):
        _decode_flat[(programs,)](
            out,
            table,
            levels_on(q.quant_type, device),
            dynamic_on(device),
            count=len(pairs),
            block_words=q.block_size // 8,
            double=q.double_quant,
            lanes=LANES,
            unroll=UNROLL,
            num_warps=8,
            enable_fp_fusion=False,
        )


def _pointers(q: QuantizedWeight) -> tuple[int, int, int, int]:
    """Pointers of codes, (nested) scales, scale codes, offset; zero for those that are None."""
    scales = q.scales if q.scales is not None else q.scale_scales
    held = (q.codes, scales, q.scale_codes, q.scale_offset)
    codes, scale, scale_codes, offset = (0 if t is None else t.data_ptr() for t in held)
    return codes, scale, scale_codes, offset


@lru_cache(maxsize=1024)
def launch_table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, int]:
    """Returns the table of a kernel of `LANES` times `UNROLL` words, and its number of programs.

    A row of ``rows`` is a weight's number of words, and what else the kernel reads of it.

    It depends only on its key, so a cached one is always valid. Building it synchronises with the
    device and cannot be captured in a CUDA graph; it is built when a layer is first decoded.
    """
    table, programs = [], 0
    for words, *pointers in rows:
        table.append([programs, words, *pointers])
        programs += triton.cdiv(words, LANES * UNROLL)
    return torch.tensor(table, dtype=torch.int64, device="cpu").to(device), programs


def _decode_other(q: QuantizedWeight, out: Tensor) -> None:
    """Decodes to any two strides, one of them 1, and from any alignment."""
    if out.is_contiguous() and out.shape != q.shape:
        out = out.view(q.shape)
    if out.dim() != 2:
        out = out.view(1, -1) if out.dim() < 2 else out.flatten(0, -2)
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
            levels_on(q.quant_type, out.device),
            dynamic_on(out.device),
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
