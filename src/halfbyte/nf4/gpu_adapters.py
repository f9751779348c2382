"""The thin products of adapters on a GPU: copies of A and B to multiply with, and one pass over dy.

Adapters are trained in float32 and multiplied in the dtype of the activations, side by side for
linears that share an input. So they are copied, scaled and cast, in one launch for all of them
(`shadow_of`); and what an adapter needs of dy is had in one reading of it (`adapter_pass`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.nf4.gpu import is_hopper, multiprocessors, on_device

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


@triton.jit(do_not_specialize=["rank0", "rank1", "rank2", "scaling0", "scaling1", "scaling2"])
def _copy(
    out_a,
    out_b,
    a0,
    a1,
    a2,
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
    inputs,
    a_programs,
    rank: tl.constexpr,
    lanes: tl.constexpr,
    tile: tl.constexpr,
):
    program = tl.program_id(0)
    if program < a_programs:
        pieces = tl.cdiv(inputs, lanes)
        at = program % pieces * lanes + tl.arange(0, lanes)
        row = program // pieces + tl.zeros_like(at)
        member, r = row // rank, row % rank
        there = at < inputs
        x = tl.load(a0 + r * inputs + at, mask=there & (member == 0) & (r < rank0), other=0.0)
        x += tl.load(a1 + r * inputs + at, mask=there & (member == 1) & (r < rank1), other=0.0)
        x += tl.load(a2 + r * inputs + at, mask=there & (member == 2) & (r < rank2), other=0.0)
        tl.store(out_a + row * inputs + at, x.to(out_a.dtype.element_ty), mask=there)
    else:
        out_row = ((program - a_programs) * tile + tl.arange(0, tile))[:, None]
        column = tl.arange(0, rank)[None, :]
        one = (out_row < second) & (column < rank0)
        two = (out_row >= second) & (out_row < third) & (column < rank1)
        three = (out_row >= third) & (out_row < outputs) & (column < rank2)
        from1, from2 = out_row - second, out_row - third
        # Scaled before it is rounded: one rounding, and s is nowhere else in dx and dA.
        scaled = tl.load(b0 + out_row * rank0 + column, mask=one, other=0.0) * scaling0
        scaled += tl.load(b1 + from1 * rank1 + column, mask=two, other=0.0) * scaling1
        scaled += tl.load(b2 + from2 * rank2 + column, mask=three, other=0.0) * scaling2
        target = out_b + out_row * rank + column
        tl.store(target, scaled.to(out_b.dtype.element_ty), mask=out_row < outputs)


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
    lanes, tile = 1024, 64
    a_programs = a.shape[0] * triton.cdiv(inputs, lanes)
    with on_device(a):
        _copy[(a_programs + triton.cdiv(b.shape[0], tile),)](
            a,
            b,
            *factors[0::2],
            *factors[1::2],
            *ranks,
            *(u[2] for u in three),
            second,
            third,
            b.shape[0],
            inputs,
            a_programs,
            rank=rank,
            lanes=lanes,
            tile=tile,
        )
    return Shadow(a, b, rank)


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
    if rank > _PASS_RANK or not is_hopper(dy.device):
        torch.mm(dy, b, out=g)
        return torch.mm(dy.t(), p).float().mul_(scaling)
    tiles, span = triton.cdiv(outputs, _PASS_COLUMNS), _LONGEST_SPAN
    while (
        span > 2 * _PASS_ROWS
        and tiles * triton.cdiv(rows, span) < multiprocessors(dy.device) * 7 // 8
    ):
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
