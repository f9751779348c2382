"""The low-rank products of adapters on a GPU: few launches, and wide operands are read only once.

An adapter's products have one dimension of 8 to 64; memory traffic and launches dominate, not
arithmetic.

    cast_adapters_of
                    Copies, scales and casts the adapters of a decoder layer in one launch. They are
                    trained in float32 and multiplied in the dtype of the activations, stacked for
                    linears that share an input.
    add_low_rank    Adds an adapter's product to the base's: y += p (s B)ᵀ for linears that share
                    an input, dx += g A for all of them.
    adapter_pass    Reads dy once for both adapter products of linears that share an input:
                    g = dy (s B) and dB = s dyᵀ p.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.quant.triton_blockwise import on_device
from halfbyte.runtime import device as devices

# The tile of `_adapter_pass`, and the most rows of dy that one program sums over.
_PASS_ROWS, _PASS_COLUMNS, _LONGEST_SPAN = 64, 256, 1024
# A higher rank exceeds the registers, and its products are no longer bound by memory.
_PASS_RANK = 64
# The tile of `_add_low_rank`, and its warps.
_LOW_RANK_ROWS, _LOW_RANK_COLUMNS, _LOW_RANK_WARPS = 64, 128, 4
# Without tensor cores, multiplying with a higher rank takes longer than reading and writing the
# result: on a T4, 64 operations per element at 8.1 TFLOP/s are 8 ps, 4 bytes at 320 GB/s are 12.
_SCALAR_RANK = 32
_LANES = 1024
# Alignment of the parts of a buffer in elements, for TMA.
_ALIGNED = 128


class CastAdapters(NamedTuple):
    """The adapters of linears that share an input, in the dtype of the products.

    Attributes:
        a: [members · rank, in], the A stacked; rows that pad the rank are 0.
        b: [sum of out, rank], the s·B stacked; columns likewise.
        rank: A power of two, at least 16.
    """

    a: Tensor
    b: Tensor
    rank: int


class Factors(NamedTuple):
    """The adapters of linears that share an input, in their trained form.

    Attributes:
        pairs: For each linear None, or A [r, in], B [out, r] and the scaling s; not all None.
        outputs: Rows of each weight.
        inputs: Columns of all.
    """

    pairs: Sequence[tuple[Tensor, Tensor, float] | None]
    outputs: Sequence[int]
    inputs: int


@triton.jit
def _lay_out(out, table, kind: tl.constexpr, count: tl.constexpr, lanes: tl.constexpr):
    # A row of the table: first program, source, its rows and columns, columns and elements of the
    # result, its offset in `out`, and the bits of the float32 scale.
    program = tl.program_id(0)
    mine = 0
    for i in tl.static_range(1, count):
        mine += tl.where(program >= tl.load(table + i * 8), 1, 0)
    row = table + mine * 8
    source = tl.load(row + 1).to(tl.pointer_type(kind))
    rows, columns = tl.load(row + 2).to(tl.int32), tl.load(row + 3).to(tl.int32)
    width, numel = tl.load(row + 4).to(tl.int32), tl.load(row + 5).to(tl.int32)
    scale = tl.load(row + 7).to(tl.int32).to(tl.float32, bitcast=True)
    at = (program - tl.load(row).to(tl.int32)) * lanes + tl.arange(0, lanes)
    i, j = at // width, at % width
    x = tl.load(source + i * columns + j, mask=(i < rows) & (j < columns), other=0.0)
    # Scaled before rounding: rounded once, and s appears nowhere else in dx and dA.
    x = x.to(tl.float32) * scale
    tl.store(out + tl.load(row + 6) + at, x.to(out.dtype.element_ty), mask=at < numel)


@triton.jit
def _add_low_rank(
    out,
    left,
    right,
    rows,
    columns,
    second,
    third,
    out_stride,
    left_stride,
    rank: tl.constexpr,
    ranks: tl.constexpr,
    part: tl.constexpr,
    transposed: tl.constexpr,
    tile_m: tl.constexpr,
    tile_n: tl.constexpr,
):
    # Columns of one linear: no tile spans two, since each has its own part of `left`.
    two, three = tl.cdiv(second, tile_n), tl.cdiv(second, tile_n) + tl.cdiv(third - second, tile_n)
    tile = tl.program_id(0)
    member = (tile >= two).to(tl.int32) + (tile >= three).to(tl.int32)
    start = tl.where(member == 0, 0, tl.where(member == 1, second, third))
    stop = tl.where(member == 0, second, tl.where(member == 1, third, columns))
    tile -= tl.where(member == 0, 0, tl.where(member == 1, two, three))
    column = start + tile * tile_n + tl.arange(0, tile_n)
    row = tl.program_id(1) * tile_m + tl.arange(0, tile_m)
    here, there = (row < rows)[:, None], (column < stop)[None, :]
    at = row.to(tl.int64)[:, None]
    if transposed:
        left += member * rank
    place = out + at * out_stride + column[None, :]
    total = tl.load(place, mask=here & there, other=0.0).to(tl.float32)
    for first in tl.static_range(0, ranks, part):
        r = first + tl.arange(0, part)
        x = tl.load(left + at * left_stride + r[None, :], mask=here, other=0.0)
        if transposed:
            w = tl.load(right + column[None, :] * rank + r[:, None], mask=there, other=0.0)
        else:
            w = tl.load(right + r[:, None] * columns + column[None, :], mask=there, other=0.0)
        total = tl.dot(x, w, total)
    tl.store(place, total.to(out.dtype.element_ty), mask=here & there)


@triton.jit
def _adapter_pass(
    dy0,
    dy1,
    dy2,
    p,
    b,
    g_parts,
    b_parts,
    rows,
    outputs,
    second,
    third,
    dy_stride0,
    dy_stride1,
    dy_stride2,
    p_stride,
    rank: tl.constexpr,
    span: tl.constexpr,
    tile_m: tl.constexpr,
    tile_n: tl.constexpr,
):
    # As in `_add_low_rank`, a tile covers columns of one linear.
    two, three = tl.cdiv(second, tile_n), tl.cdiv(second, tile_n) + tl.cdiv(third - second, tile_n)
    tile = tl.program_id(0)
    member = (tile >= two).to(tl.int32) + (tile >= three).to(tl.int32)
    dy, dy_stride, start, stop, before = dy0, dy_stride0, 0, second, 0
    if member == 1:
        dy, dy_stride, start, stop, before = dy1, dy_stride1, second, third, two
    if member == 2:
        dy, dy_stride, start, stop, before = dy2, dy_stride2, third, outputs, three
    own = (tile - before) * tile_n + tl.arange(0, tile_n)
    column = start + own
    r = tl.arange(0, rank)
    has = column < stop
    p += member * rank
    b_tile = tl.load(b + column[:, None] * rank + r[None, :], mask=has[:, None], other=0.0)
    total = tl.zeros((tile_n, rank), tl.float32)
    for first in range(tl.program_id(1) * span, (tl.program_id(1) + 1) * span, tile_m):
        row = first + tl.arange(0, tile_m)
        there = row < rows
        at = row.to(tl.int64)[:, None]
        d = tl.load(
            dy + at * dy_stride + own[None, :], mask=there[:, None] & has[None, :], other=0.0
        )
        p_tile = tl.load(p + at * p_stride + r[None, :], mask=there[:, None], other=0.0)
        total = tl.dot(tl.trans(d), p_tile, total)
        target = g_parts + (tile.to(tl.int64) * rows + row[:, None]) * rank + r[None, :]
        tl.store(target, tl.dot(d, b_tile), mask=there[:, None])
    target = b_parts + (tl.program_id(1).to(tl.int64) * outputs + column[:, None]) * rank
    tl.store(target + r[None, :], total, mask=has[:, None])


@triton.jit
def _sum_parts(
    g,
    d_b,
    g_parts,
    b_parts,
    spans,
    g_numel,
    outputs,
    second,
    third,
    tiles,
    g_programs,
    g_stride,
    scaling0,
    scaling1,
    scaling2,
    members: tl.constexpr,
    rank: tl.constexpr,
    tile_n: tl.constexpr,
    lanes: tl.constexpr,
    flipped: tl.constexpr,
):
    program = tl.program_id(0)
    total = tl.zeros((lanes,), tl.float32)
    if program < members * g_programs:
        two = tl.cdiv(second, tile_n)
        three = two + tl.cdiv(third - second, tile_n)
        member = program // g_programs
        first = tl.where(member == 0, 0, tl.where(member == 1, two, three))
        last = tl.where(member == 0, two, tl.where(member == 1, three, tiles))
        at = program % g_programs * lanes + tl.arange(0, lanes)
        inside = at < g_numel
        g_parts += first.to(tl.int64) * g_numel
        for _ in range(first, last):
            total += tl.load(g_parts + at, mask=inside, other=0.0).to(tl.float32)
            g_parts += g_numel
        target = g + (at // rank).to(tl.int64) * g_stride + member * rank + at % rank
        tl.store(target, total.to(g.dtype.element_ty), mask=inside)
    else:
        at = (program - members * g_programs) * lanes + tl.arange(0, lanes)
        inside = at < outputs * rank
        for _ in range(spans):
            total += tl.load(b_parts + at, mask=inside, other=0.0)
            b_parts += outputs * rank
        row = at // rank  # of its linear, in either orientation
        scaling = tl.where(row < second, scaling0, tl.where(row < third, scaling1, scaling2))
        if flipped:
            start = tl.where(row < second, 0, second)
            size, own = tl.where(row < second, second, third - second), at - start * rank
            at = tl.where(row < third, (start + own % size) * rank + own // size, at)
        tl.store(d_b + at, total * scaling, mask=inside)


def rank_of(pairs: Sequence[tuple[Tensor, Tensor, float] | None]) -> int:
    """Returns the padded rank of the adapters of linears that share an input."""
    return int(triton.next_power_of_2(max(16, *(len(pair[0]) for pair in pairs if pair))))


def cast_adapters_of(sets: Sequence[Factors], dtype: torch.dtype) -> list[CastAdapters]:
    """Returns the adapters of each set in the form of `forward` and `backward`, in one launch.

    Args:
        sets: Adapters of linears that share an input; all contiguous, with one dtype and device.
        dtype: dtype of the products.
    """
    given = next(pair for one in sets for pair in one.pairs if pair is not None)
    device, kind = given[0].device, given[0].dtype
    nothing = (0, 0, 1)  # no element of it is read
    jobs: list[tuple[int, ...]] = []
    places, size = [], 0
    for one in sets:
        rank, members = rank_of(one.pairs), len(one.pairs)
        a_start, b_start = size, size + _aligned(members * rank * one.inputs)
        size = b_start + _aligned(sum(one.outputs) * rank)
        places.append((rank, members * rank, one.inputs, a_start, sum(one.outputs), b_start))
        for pair, out in zip(one.pairs, one.outputs, strict=True):
            a, b = (nothing, nothing) if pair is None else (_source(pair[0]), _source(pair[1]))
            scale = _bits(0.0 if pair is None else pair[2])
            jobs.append((*a, one.inputs, rank * one.inputs, a_start, _bits(1.0)))
            jobs.append((*b, rank, out * rank, b_start, scale))
            a_start += rank * one.inputs
            b_start += out * rank
    whole = torch.empty(size, dtype=dtype, device=device)
    table, programs = _table(tuple(jobs), device)
    with on_device(whole):
        _lay_out[(programs,)](
            whole, table, kind=_KINDS[kind], count=len(jobs), lanes=_LANES, num_warps=4
        )
    return [
        CastAdapters(
            whole[a_start : a_start + rows * inputs].view(rows, inputs),
            whole[b_start : b_start + outputs * rank].view(outputs, rank),
            rank,
        )
        for rank, rows, inputs, a_start, outputs, b_start in places
    ]


def _aligned(numel: int) -> int:
    return numel + -numel % _ALIGNED


def _source(factor: Tensor) -> tuple[int, int, int]:
    """Address, rows and columns of a factor."""
    rows, columns = factor.shape
    return factor.data_ptr(), rows, columns


_KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _bits(x: float) -> int:
    """The bits of a float32."""
    return int(struct.unpack("<i", struct.pack("<f", x))[0])


@lru_cache(maxsize=1024)
def _table(jobs: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, int]:
    """The table of `_lay_out` and its number of programs; as `gpu._launch_table`."""
    rows, programs = [], 0
    for source, height, columns, width, numel, start, scale in jobs:
        rows.append([programs, source, height, columns, width, numel, start, scale])
        programs += triton.cdiv(numel, _LANES)
    return torch.tensor(rows, dtype=torch.int64, device="cpu").to(device), programs


def add_low_rank(out: Tensor, left: Tensor, right: Tensor, outputs: Sequence[int] | None) -> None:
    """Adds a product with a small inner dimension to ``out`` [rows, columns], in place.

    Args:
        out: Contiguous rows.
        left: [rows, members · rank], contiguous rows.
        right: For linears that share an input [columns, rank]; the columns of each get the product
            of its part of ``left`` with the transpose. Without ``outputs`` [members · rank,
            columns].
        outputs: Columns of each linear, at most three; or None.
    """
    (rows, columns), wide = out.shape, left.shape[1]
    rank = wide if outputs is None else right.shape[1]
    sizes = [columns] if outputs is None else list(outputs)
    if rank > _SCALAR_RANK and not devices.spec_of(out.device).has_tensor_cores:
        if outputs is None:
            out.addmm_(left, right)
            return
        parts = zip(out.split(sizes, 1), left.split(rank, 1), right.split(sizes), strict=True)
        for own, product, factor in parts:
            own.addmm_(product, factor.t())
        return
    second, third = sizes[0], sum(sizes[:2])
    tiles = sum(triton.cdiv(size, _LOW_RANK_COLUMNS) for size in sizes)
    with on_device(out):
        _add_low_rank[(tiles, triton.cdiv(rows, _LOW_RANK_ROWS))](
            out,
            left,
            right,
            rows,
            columns,
            second,
            third,
            out.stride(0),
            left.stride(0),
            rank=rank,
            ranks=rank,
            part=min(64, rank & -rank),
            transposed=outputs is not None,
            tile_m=_LOW_RANK_ROWS,
            tile_n=_LOW_RANK_COLUMNS,
            num_warps=_LOW_RANK_WARPS,
        )


def adapter_pass(
    dys: Sequence[Tensor], p: Tensor, b: Tensor, scalings: Sequence[float], g: Tensor
) -> Tensor:
    """Computes both adapter products of dy, reading each dy once.

    Partial sums of tiles are added in a fixed order, so the result does not depend on the order in
    which programs run.

    Args:
        dys: For each of at most three linears that share an input [rows, out], contiguous rows.
        p: x Aᵀ of all, [rows, members · rank], contiguous rows.
        b: s·B of all, [sum of out, rank].
        scalings: s of each.
        g: Output: dy·b of all, [rows, members · rank], contiguous rows.

    Returns:
        dB = s · dyᵀ p of all, float32 [sum of out, rank].
    """
    (outputs, rank), rows = b.shape, len(p)
    sizes, device = [dy.shape[1] for dy in dys], p.device
    if rank > _PASS_RANK or not devices.spec_of(device).is_hopper:
        d_bs = []
        parts = zip(dys, p.split(rank, 1), b.split(sizes), g.split(rank, 1), scalings, strict=True)
        for dy, mine, own, target, scaling in parts:
            torch.mm(dy, own, out=target)
            d_bs.append(_summed(dy, mine).mul_(scaling))
        return torch.cat(d_bs)
    tiles, span = sum(triton.cdiv(size, _PASS_COLUMNS) for size in sizes), pass_span(sizes, p)
    spans = triton.cdiv(rows, span)
    g_parts = torch.empty(tiles, rows, rank, dtype=torch.float32, device=device)
    b_parts = torch.empty(spans, outputs, rank, dtype=torch.float32, device=device)
    second, third = sizes[0], sum(sizes[:2])
    three = (*dys, dys[0], dys[0])[:3]
    with on_device(p):
        _adapter_pass[(tiles, spans)](
            *three,
            p,
            b,
            g_parts,
            b_parts,
            rows,
            outputs,
            second,
            third,
            *(dy.stride(0) for dy in three),
            p.stride(0),
            rank=rank,
            span=span,
            tile_m=_PASS_ROWS,
            tile_n=_PASS_COLUMNS,
            num_warps=8,
            num_stages=3,
        )
    return sum_parts(g, g_parts, b_parts, sizes, scalings, _PASS_COLUMNS)


def _summed(dy: Tensor, p: Tensor) -> Tensor:
    """dyᵀ p in float32.

    Rounded to bfloat16 on Hopper, so that a rank too high for `_adapter_pass` keeps its bits.
    Elsewhere never rounded to 16 bits: a sum over thousands of rows may overflow float16.
    """
    if dy.dtype == torch.bfloat16 and devices.spec_of(dy.device).is_hopper:
        return torch.mm(dy.t(), p).float()
    if dy.device.type == "cpu":  # which has no such product
        return torch.mm(dy.t().float(), p.float())
    return torch.mm(dy.t(), p, out_dtype=torch.float32)


def pass_span(sizes: Sequence[int], p: Tensor) -> int:
    """Returns how many rows a program of `_adapter_pass` sums over.

    Args:
        sizes: Outputs of each linear.
        p: As for `adapter_pass`.
    """
    tiles, span = sum(triton.cdiv(size, _PASS_COLUMNS) for size in sizes), _LONGEST_SPAN
    fewest = devices.spec_of(p.device).num_sms * 7 // 8
    while span > 2 * _PASS_ROWS and tiles * triton.cdiv(len(p), span) < fewest:
        span //= 2  # fewer programs than SMs leave a part of the GPU idle
    return span


def sum_parts(
    g: Tensor,
    g_parts: Tensor,
    b_parts: Tensor,
    sizes: Sequence[int],
    scalings: Sequence[float],
    tile_n: int,
    *,
    flipped: bool = False,
) -> Tensor:
    """Adds the partial sums of tiles and spans in a fixed order.

    Args:
        g: Output: the sums of ``g_parts``, [rows, members · rank], contiguous rows.
        g_parts: [tiles, rows, rank]; the tiles of one linear follow those of another.
        b_parts: float32 [spans, sum of sizes · rank]: for each linear [size, rank].
        sizes: Columns of each linear; possibly of one more than g has members.
        scalings: Factors of the sums of ``b_parts`` of each linear.
        tile_n: Columns of a tile.
        flipped: Whether b_parts is [rank, size] for each linear, and so is the result of the third.

    Returns:
        The sums of ``b_parts``, float32 [sum of sizes, rank].
    """
    (tiles, rows, rank), spans, outputs = g_parts.shape, len(b_parts), sum(sizes)
    d_b = torch.empty(outputs, rank, dtype=torch.float32, device=g.device)
    members, lanes = g.shape[1] // rank, 512
    g_programs = triton.cdiv(rows * rank, lanes)
    second, third = sizes[0], sum(sizes[:2])
    with on_device(g):
        _sum_parts[(members * g_programs + triton.cdiv(outputs * rank, lanes),)](
            g,
            d_b,
            g_parts,
            b_parts,
            spans,
            rows * rank,
            outputs,
            second,
            third,
            tiles,
            g_programs,
            g.stride(0),
            *(*scalings, 0.0, 0.0)[:3],
            members=members,
            rank=rank,
            tile_n=tile_n,
            lanes=lanes,
            flipped=flipped,
            num_warps=4,
        )
    return d_b
