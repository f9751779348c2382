"""The products of training on a Hopper GPU or newer: base and adapter in one accumulator.

An adapter's arithmetic is nothing beside the base's, but its bytes are not: adding x Aᵀ Bᵀ to y
reads and writes all of y, which at 8192 tokens takes a sixth of the time of the product itself.
So the adapter is the last step of the same contraction. A tile of y gathers x Wᵀ and then, in the
same registers, (x Aᵀ)(s B)ᵀ; a tile of dx gathers dy W and then (dy s B) A. Nothing is written that
is not a result, and there is one rounding where there were two.

Linears that read the same x (q, k, v; gate, up) are one product: their decoded weights lie one
below the other, so x is read once, and dx gathers the gradients of all of them without being
written in between.

    forward     p = x [A₁ A₂ …]ᵀ          y = x Wᵀ + pᵢ (s Bᵢ)ᵀ                    2 launches
    backward    gᵢ = dyᵢ (s Bᵢ) and dBᵢ = s dyᵢᵀ pᵢ, in one reading of dyᵢ         2 for each i
                dx = Σ dyᵢ Wᵢ + g [A₁ A₂ …]          dA = gᵀ x                       2

The contraction runs on tiles brought by the card's copy engine, one program a multiprocessor, and
takes what cuBLAS takes for the bare product (benchmarks/results). It is tuned to Hopper, compute
capability 9.0, and needs enough rows to fill the card; `fits` says so, and linear.py does it
plainly otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from halfbyte.nf4.gpu import on_device

# Rows from which one tile a multiprocessor is enough work; below, cuBLAS splits better.
FEWEST_ROWS = 2048

_TILE_M, _TILE_K = 128, 64
# The tile of `_adapter_pass`, and the most rows of dy that one program sums over.
_PASS_ROWS, _PASS_COLUMNS, _LONGEST_SPAN = 64, 256, 1024
# A higher rank takes more registers than there are, and its products are no longer all bytes.
_PASS_RANK = 64


class Shadow(NamedTuple):
    """The adapters of linears that share an input, in the dtype of the products.

    Attributes:
        a: [members · rank, in], each A below the last; rows that fill up the rank are 0.
        b: [sum of out, rank], each s·B below the last; columns likewise.
        rank: A power of two, at least 16.
    """

    a: Tensor
    b: Tensor
    rank: int


@triton.jit
def _forward(
    x,
    weight,
    y,
    p,
    b,
    rows,
    outputs,
    inputs,
    second,
    third,
    rank: tl.constexpr,
    part: tl.constexpr,
    tile_m: tl.constexpr,
    tile_n: tl.constexpr,
    tile_k: tl.constexpr,
    programs: tl.constexpr,
    flat: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(rows, tile_m), tl.cdiv(outputs, tile_n)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, programs, flatten=flat):
        m, n = _place(tile, tiles_m, tiles_n)
        total = tl.zeros((tile_m, tile_n), tl.float32)
        for k in range(tl.cdiv(inputs, tile_k)):
            left = x.load([m * tile_m, k * tile_k])
            right = weight.load([n * tile_n, k * tile_k])
            total = tl.dot(left, right.T, total)
        # Which linear the columns belong to; no tile has columns of two.
        member = (n * tile_n >= second).to(tl.int32) + (n * tile_n >= third).to(tl.int32)
        for r in tl.static_range(0, rank, part):
            left = p.load([m * tile_m, member * rank + r])
            right = b.load([n * tile_n, r])
            total = tl.dot(left, right.T, total)
        y.store([m * tile_m, n * tile_n], total.to(y.dtype))


@triton.jit
def _backward(
    dx,
    dy0,
    dy1,
    dy2,
    weight0,
    weight1,
    weight2,
    g,
    a,
    rows,
    inputs,
    outputs0,
    outputs1,
    outputs2,
    members: tl.constexpr,
    ranks: tl.constexpr,
    part: tl.constexpr,
    tile_m: tl.constexpr,
    tile_n: tl.constexpr,
    tile_k: tl.constexpr,
    programs: tl.constexpr,
    flat: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(rows, tile_m), tl.cdiv(inputs, tile_n)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, programs, flatten=flat):
        m, n = _place(tile, tiles_m, tiles_n)
        total = tl.zeros((tile_m, tile_n), tl.float32)
        for k in range(tl.cdiv(outputs0, tile_k)):
            left = dy0.load([m * tile_m, k * tile_k])
            total = tl.dot(left, weight0.load([k * tile_k, n * tile_n]), total)
        if members > 1:
            for k in range(tl.cdiv(outputs1, tile_k)):
                left = dy1.load([m * tile_m, k * tile_k])
                right = weight1.load([k * tile_k, n * tile_n])
                total = tl.dot(left, right, total)
        if members > 2:
            for k in range(tl.cdiv(outputs2, tile_k)):
                left = dy2.load([m * tile_m, k * tile_k])
                right = weight2.load([k * tile_k, n * tile_n])
                total = tl.dot(left, right, total)
        for r in tl.static_range(0, ranks, part):
            total = tl.dot(g.load([m * tile_m, r]), a.load([r, n * tile_n]), total)
        dx.store([m * tile_m, n * tile_n], total.to(dx.dtype))


@triton.jit
def _place(tile, tiles_m, tiles_n):
    # Eight rows of tiles at a time: what neighbours read is still in the second cache.
    strip = 8 * tiles_n
    first = tile // strip * 8
    height = tl.minimum(tiles_m - first, 8)
    return first + tile % strip % height, tile % strip // height


@triton.jit
def _adapter_pass(
    dy,
    p,
    b,
    g_parts,
    b_parts,
    rows,
    outputs,
    dy_stride,
    p_stride,
    rank: tl.constexpr,
    span: tl.constexpr,
    tile_m: tl.constexpr,
    tile_n: tl.constexpr,
):
    column = tl.program_id(0) * tile_n + tl.arange(0, tile_n)
    r = tl.arange(0, rank)
    has = column < outputs
    b_tile = tl.load(b + column[:, None] * rank + r[None, :], mask=has[:, None], other=0.0)
    total = tl.zeros((tile_n, rank), tl.float32)
    for start in range(tl.program_id(1) * span, (tl.program_id(1) + 1) * span, tile_m):
        row = start + tl.arange(0, tile_m)
        there = row < rows
        at = row.to(tl.int64)[:, None]
        d = tl.load(
            dy + at * dy_stride + column[None, :], mask=there[:, None] & has[None, :], other=0.0
        )
        p_tile = tl.load(p + at * p_stride + r[None, :], mask=there[:, None], other=0.0)
        total = tl.dot(tl.trans(d), p_tile, total)
        target = g_parts + (tl.program_id(0).to(tl.int64) * rows + row[:, None]) * rank + r[None, :]
        tl.store(target, tl.dot(d, b_tile), mask=there[:, None])
    target = b_parts + (tl.program_id(1).to(tl.int64) * outputs + column[:, None]) * rank
    tl.store(target + r[None, :], total, mask=has[:, None])


@triton.jit
def _sum_parts(
    g,
    d_b,
    g_parts,
    b_parts,
    g_count,
    b_count,
    g_numel,
    b_numel,
    g_programs,
    g_stride,
    scaling,
    rank: tl.constexpr,
    lanes: tl.constexpr,
):
    program = tl.program_id(0)
    total = tl.zeros((lanes,), tl.float32)
    if program < g_programs:
        at = program * lanes + tl.arange(0, lanes)
        inside = at < g_numel
        for _ in range(g_count):
            total += tl.load(g_parts + at, mask=inside, other=0.0)
            g_parts += g_numel
        target = g + (at // rank).to(tl.int64) * g_stride + at % rank
        tl.store(target, total.to(g.dtype.element_ty), mask=inside)
    else:
        at = (program - g_programs) * lanes + tl.arange(0, lanes)
        inside = at < b_numel
        for _ in range(b_count):
            total += tl.load(b_parts + at, mask=inside, other=0.0)
            b_parts += b_numel
        tl.store(d_b + at, total * scaling, mask=inside)


@triton.jit(do_not_specialize=["rank0", "rank1", "rank2"])
def _copy_a(out, a0, a1, a2, rank0, rank1, rank2, inputs, rank: tl.constexpr, lanes: tl.constexpr):
    at = tl.program_id(1) * lanes + tl.arange(0, lanes)
    row = tl.program_id(0) + tl.zeros_like(at)
    member, r = row // rank, row % rank
    there = at < inputs
    x = tl.load(a0 + r * inputs + at, mask=there & (member == 0) & (r < rank0), other=0.0)
    x += tl.load(a1 + r * inputs + at, mask=there & (member == 1) & (r < rank1), other=0.0)
    x += tl.load(a2 + r * inputs + at, mask=there & (member == 2) & (r < rank2), other=0.0)
    tl.store(out + row * inputs + at, x.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["rank0", "rank1", "rank2", "scaling0", "scaling1", "scaling2"])
def _copy_b(
    out,
    b0,
    b1,
    b2,
    rank0,
    rank1,
    rank2,
    scaling0,
    scaling1,
    scaling2,
    second,
    third,
    outputs,
    rank: tl.constexpr,
    tile: tl.constexpr,
):
    row = (tl.program_id(0) * tile + tl.arange(0, tile))[:, None]
    r = tl.arange(0, rank)[None, :]
    one, two = row < second, (row >= second) & (row < third)
    three = (row >= third) & (row < outputs)
    # Scaled before it is rounded: one rounding, and s is nowhere else in dx and dA.
    x = tl.load(b0 + row * rank0 + r, mask=one & (r < rank0), other=0.0) * scaling0
    x += tl.load(b1 + (row - second) * rank1 + r, mask=two & (r < rank1), other=0.0) * scaling1
    x += tl.load(b2 + (row - third) * rank2 + r, mask=three & (r < rank2), other=0.0) * scaling2
    tl.store(out + row * rank + r, x.to(out.dtype.element_ty), mask=row < outputs)


@cache
def _device_fits(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def copyable(x: Tensor) -> bool:
    """Returns whether the copy engine can read x [rows, n], of 16-bit numbers, where it lies."""
    return x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0


def fits(x: Tensor, outputs: Sequence[int]) -> bool:
    """Returns whether `forward` and `backward` can do products of ``x`` [rows, in]."""
    return (
        x.is_cuda
        and x.shape[0] >= FEWEST_ROWS
        and x.dtype in (torch.bfloat16, torch.float16)
        and copyable(x)
        and len(outputs) <= 3
        and all(size % 8 == 0 for size in (x.shape[1], *outputs))
        and _device_fits(x.device)
    )


def _flat(members: int, ranks: int) -> tuple[bool, int]:
    """Whether a program's tiles and their steps are one loop, and how much rank a step takes.

    One loop has the next tile's first step under way while a tile is written (2 to 5 % of the
    time), but what is being written then needs room of its own: beside it there is none left for
    more than thin steps over a small rank.
    """
    return (True, 16) if members == 1 and ranks <= 64 else (False, 16 if ranks % 64 else 64)


@cache
def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # the interpreter's
    return torch.cuda.get_device_properties(device).multi_processor_count


def shadow_of(
    updates: Sequence[tuple[Tensor, Tensor, float, Tensor | None] | None],
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
) -> Shadow:
    """Returns the adapters of linears that share an input, as `forward` and `backward` want them.

    Args:
        updates: For each linear None, or A [r, in], B [out, r], scaling and anything.
        shapes: For each linear (out, in).
        dtype: That of the products.
    """
    given = [update for update in updates if update is not None]
    rank = max(16, triton.next_power_of_2(max(update[0].shape[0] for update in given)))
    inputs, outputs = shapes[0][1], [out for out, _ in shapes]
    device = given[0][0].device
    a = torch.empty(len(updates) * rank, inputs, dtype=dtype, device=device)
    b = torch.empty(sum(outputs), rank, dtype=dtype, device=device)
    # A linear without an adapter, and one that is not there, has rank 0 and reads nothing.
    none = (given[0][0], given[0][1], 0.0, None)
    three = [update or none for update in updates] + [none] * (3 - len(updates))
    ranks = [0 if u is None else u[0].shape[0] for u in updates] + [0] * (3 - len(updates))
    factors = [tensor.detach().contiguous() for u in three for tensor in u[:2]]
    second, third = (outputs[0], sum(outputs[:2]))
    with on_device(a):
        _copy_a[(a.shape[0], triton.cdiv(inputs, 1024))](
            a, *factors[0::2], *ranks, inputs, rank=rank, lanes=1024
        )
        _copy_b[(triton.cdiv(b.shape[0], 64),)](
            b,
            *factors[1::2],
            *ranks,
            *(u[2] for u in three),
            second,
            third,
            b.shape[0],
            rank=rank,
            tile=64,
        )
    return Shadow(a, b, rank)


def forward(
    x: Tensor, weights: Sequence[Tensor], p: Tensor, shadow: Shadow, outputs: Sequence[int]
) -> Tensor:
    """Returns x Wᵀ + pᵢ (s Bᵢ)ᵀ for linears that share x.

    Args:
        x: [rows, in], contiguous rows.
        weights: [out, in] of each. Where one lies below the other in memory, they are one product.
        p: x Aᵀ, [rows, members · rank].
        shadow: The adapters.
        outputs: Rows of each weight, at most three.

    Returns:
        [rows, sum of outputs].
    """
    rows, inputs = x.shape
    y = x.new_empty(rows, sum(outputs))
    starts = [sum(outputs[:i]) for i in range(len(outputs))]
    storage = weights[0].untyped_storage().data_ptr()
    adjacent = all(
        weight.untyped_storage().data_ptr() == storage
        and weight.data_ptr() == weights[0].data_ptr() + start * weight.stride(0) * weight.itemsize
        for weight, start in zip(weights, starts, strict=True)
    )
    whole = adjacent and all(size % 256 == 0 for size in outputs[:-1])
    if whole:
        parts = [(0, sum(outputs), starts[1:])]
    else:  # or a tile would have columns of two linears
        parts = [(start, size, []) for start, size in zip(starts, outputs, strict=True)]
    tile_n, programs = 256, _programs(x.device)
    for i, (start, size, others) in enumerate(parts):
        second, third = (*others, size, size)[:2]
        p_part = p if whole else p[:, i * shadow.rank :]
        weight = weights[i].as_strided((size, inputs), weights[i].stride())
        flat, part = _flat(1, shadow.rank)
        with on_device(x):
            _forward[(programs,)](
                TensorDescriptor.from_tensor(x, [_TILE_M, _TILE_K]),
                TensorDescriptor.from_tensor(weight, [tile_n, _TILE_K]),
                TensorDescriptor.from_tensor(y[:, start : start + size], [_TILE_M, tile_n]),
                TensorDescriptor.from_tensor(p_part, [_TILE_M, part]),
                TensorDescriptor.from_tensor(shadow.b[start : start + size], [tile_n, part]),
                rows,
                size,
                inputs,
                second,
                third,
                rank=shadow.rank,
                part=part,
                tile_m=_TILE_M,
                tile_n=tile_n,
                tile_k=_TILE_K,
                programs=programs,
                flat=flat,
                num_warps=8,
                num_stages=3,
            )
    return y


def backward(dys: Sequence[Tensor], weights: Sequence[Tensor], g: Tensor, shadow: Shadow) -> Tensor:
    """Returns dx = Σ dyᵢ Wᵢ + g A, [rows, in].

    Args:
        dys: For each linear [rows, out], contiguous rows.
        weights: As for `forward`.
        g: dyᵢ (s Bᵢ) side by side, [rows, members · rank].
        shadow: The adapters.
    """
    rows, inputs = dys[0].shape[0], weights[0].shape[1]
    dx = dys[0].new_empty(rows, inputs)
    tile_n, programs = 256, _programs(dx.device)
    lefts = [TensorDescriptor.from_tensor(dy, [_TILE_M, _TILE_K]) for dy in dys]
    rights = [TensorDescriptor.from_tensor(weight, [_TILE_K, tile_n]) for weight in weights]
    sizes = [dy.shape[1] for dy in dys] + [0, 0]
    ranks = shadow.a.shape[0]
    flat, part = _flat(len(dys), ranks)
    with on_device(dx):
        _backward[(programs,)](
            TensorDescriptor.from_tensor(dx, [_TILE_M, tile_n]),
            *(lefts + lefts[:1] * 2)[:3],
            *(rights + rights[:1] * 2)[:3],
            TensorDescriptor.from_tensor(g, [_TILE_M, part]),
            TensorDescriptor.from_tensor(shadow.a, [part, tile_n]),
            rows,
            inputs,
            *sizes[:3],
            members=len(dys),
            ranks=ranks,
            part=part,
            tile_m=_TILE_M,
            tile_n=tile_n,
            tile_k=_TILE_K,
            programs=programs,
            flat=flat,
            num_warps=8,
            num_stages=3,
        )
    return dx


def adapter_pass(dy: Tensor, p: Tensor, b: Tensor, scaling: float, g: Tensor) -> Tensor:
    """Reads dy once for both products it is needed in beside dx.

    The sums over tiles are kept apart and added up in their order, so the result does not depend
    on the order in which programs run.

    Args:
        dy: [rows, out], contiguous rows.
        p: x Aᵀ of this linear, [rows, rank], contiguous rows.
        b: s·B, [out, rank].
        scaling: s.
        g: Where dy·b goes, [rows, rank], contiguous rows.

    Returns:
        dB = s · dyᵀ p, float32 [out, rank].
    """
    (rows, outputs), rank = dy.shape, b.shape[1]
    if rank > _PASS_RANK:
        torch.mm(dy, b, out=g)
        return torch.mm(dy.t(), p).float().mul_(scaling)
    tiles, span = triton.cdiv(outputs, _PASS_COLUMNS), _LONGEST_SPAN
    while span > 2 * _PASS_ROWS and tiles * triton.cdiv(rows, span) < _programs(dy.device) * 7 // 8:
        span //= 2  # fewer programs than multiprocessors read with a part of the card
    spans = triton.cdiv(rows, span)
    g_parts = torch.empty(tiles, rows, rank, dtype=torch.float32, device=dy.device)
    b_parts = torch.empty(spans, outputs, rank, dtype=torch.float32, device=dy.device)
    d_b = torch.empty(outputs, rank, dtype=torch.float32, device=dy.device)
    lanes = 512
    g_programs = triton.cdiv(rows * rank, lanes)
    with on_device(dy):
        _adapter_pass[(tiles, spans)](
            dy,
            p,
            b,
            g_parts,
            b_parts,
            rows,
            outputs,
            dy.stride(0),
            p.stride(0),
            rank=rank,
            span=span,
            tile_m=_PASS_ROWS,
            tile_n=_PASS_COLUMNS,
            num_warps=8,
            num_stages=3,
        )
        _sum_parts[(g_programs + triton.cdiv(outputs * rank, lanes),)](
            g,
            d_b,
            g_parts,
            b_parts,
            tiles,
            spans,
            rows * rank,
            outputs * rank,
            g_programs,
            g.stride(0),
            scaling,
            rank=rank,
            lanes=lanes,
            num_warps=4,
        )
    return d_b
