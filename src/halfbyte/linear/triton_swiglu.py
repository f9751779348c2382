"""SwiGLU fused into the products: inner = silu(x Gᵀ) · (x Uᵀ), forward and backward.

The widest activations of a layer are those inside an MLP, and a separate kernel that reads and
writes them takes a sixth of the time of the product before it. So in forward the gate is applied in
registers before a tile is written, and gate and up are written only if backward needs them.

The contraction is that of triton_matmul.py with the same rounding, so results are bit-identical to
a separate kernel for the gate (layers/triton_elementwise.py). A tile accumulates 128 columns of
gate and the same 128 of up, from one TMA block of two pages: two matrices of one shape can be
addressed as two pages, wherever they are in memory.

Fusing backward the same way, with three tiles read and written for one in registers, was tried and
is slower than a separate kernel (LAB.md). That kernel does everything between the products: it
replaces the gradient of inner by those of gate and up in place, and computes the adapter products
of all three linears while these and inner are in registers. So inner is never written, and nothing
is read twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from halfbyte.linear.triton_lora import CastAdapters, sum_parts
from halfbyte.linear.triton_matmul import TILE_K, TILE_M, flat_of, movable, place
from halfbyte.quant.triton_blockwise import on_device
from halfbyte.runtime import device as devices

# Columns of gate, and the same number of up.
_TILE_N = 128

# Tile of `_gated_backward`, maximum rows summed by one program, minimum programs per SM, and the
# maximum rank: a higher one exceeds the registers.
_PASS_ROWS, _PASS_COLUMNS, _LONGEST_SPAN, _PROGRAMS, _PASS_RANK = 16, 128, 1024, 3, 32


@triton.jit
def _gated_forward(
    inner,
    gate,
    up,
    x,
    weights,
    p,
    b0,
    b1,
    rows,
    outputs,
    inputs,
    swapped: tl.constexpr,
    keep: tl.constexpr,
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
        m, n = place(tile, tiles_m, tiles_n)
        total = tl.zeros((tile_m, 2 * tile_n), tl.float32)
        for k in range(tl.cdiv(inputs, tile_k)):
            left = x.load([m * tile_m, k * tile_k])
            right = weights.load([0, n * tile_n, k * tile_k]).reshape(2 * tile_n, tile_k)
            total = tl.dot(left, right.T, total)
        for r in tl.static_range(0, rank, part):
            # Each has its own p. Reads outside a matrix of one page return zeros.
            right = b0.load([0, n * tile_n, r]).reshape(2 * tile_n, part)
            left = p.load([m * tile_m, (rank if swapped else 0) + r])
            total = tl.dot(left, right.T, total)
            right = b1.load([-1, n * tile_n, r]).reshape(2 * tile_n, part)
            left = p.load([m * tile_m, (0 if swapped else rank) + r])
            total = tl.dot(left, right.T, total)
        one, two = total.reshape(tile_m, 2, tile_n).permute(0, 2, 1).split()
        if swapped:
            one, two = two, one
        one, two = one.to(inner.dtype), two.to(inner.dtype)
        if keep:
            gate.store([m * tile_m, n * tile_n], one)
            up.store([m * tile_m, n * tile_n], two)
        one, two = one.to(tl.float32), two.to(tl.float32)
        result = one * tl.sigmoid(one) * two
        inner.store([m * tile_m, n * tile_n], result.to(inner.dtype))


@triton.jit
def _settled(x, compiled: tl.constexpr):
    # Without this, the compiler computes operands of two products once for each, and once more for
    # the store, instead of moving them through shared memory, and runs out of registers. It does
    # not duplicate inline assembly.
    if compiled:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2
        )
    else:
        return x


@triton.jit
def _gated_backward(
    d_inner,
    gate,
    up,
    p,
    g_last,
    b,
    g_parts,
    b_parts,
    rows,
    outputs,
    inner_stride,
    gate_stride,
    up_stride,
    p_stride,
    g_stride,
    rank: tl.constexpr,
    span: tl.constexpr,
    tile_m: tl.constexpr,
    tile_n: tl.constexpr,
    compiled: tl.constexpr,
):
    tile, tiles = tl.program_id(0), tl.cdiv(outputs, tile_n)
    column = tile * tile_n + tl.arange(0, tile_n)
    r = tl.arange(0, rank)
    has = column < outputs
    own = column[:, None] * rank + r[None, :]
    b_gate = tl.load(b + own, mask=has[:, None], other=0.0)
    b_up = tl.load(b + outputs * rank + own, mask=has[:, None], other=0.0)
    of_gate = tl.zeros((rank, tile_n), tl.float32)
    of_up = tl.zeros((rank, tile_n), tl.float32)
    of_inner = tl.zeros((rank, tile_n), tl.float32)
    for first in range(tl.program_id(1) * span, (tl.program_id(1) + 1) * span, tile_m):
        row = first + tl.arange(0, tile_m)
        there, in_rows = (row < rows)[:, None], (row < rows)[None, :]
        inside = there & has[None, :]
        at, across = row.to(tl.int64)[:, None], row.to(tl.int64)[None, :]
        gate_at = gate + at * gate_stride + column[None, :]
        up_at = up + at * up_stride + column[None, :]
        d = tl.load(d_inner + at * inner_stride + column[None, :], mask=inside, other=0.0)
        one, two = tl.load(gate_at, mask=inside, other=0.0), tl.load(up_at, mask=inside, other=0.0)
        p_gate = tl.load(p + across * p_stride + r[:, None], mask=in_rows, other=0.0)
        p_up = tl.load(p + across * p_stride + rank + r[:, None], mask=in_rows, other=0.0)
        g_inner = tl.load(g_last + across * g_stride + r[:, None], mask=in_rows, other=0.0)
        kind = one.dtype
        d, one, two = d.to(tl.float32), one.to(tl.float32), two.to(tl.float32)
        s = tl.sigmoid(one)
        # Sequential, so that not all are in registers at the same time.
        d_gate = _settled((d * two * s * (1.0 + one * (1.0 - s))).to(kind), compiled)
        tl.store(gate_at, d_gate, mask=inside)
        of_gate = tl.dot(p_gate, d_gate, of_gate)
        target = g_parts + (tile.to(tl.int64) * rows + row[:, None]) * rank + r[None, :]
        tl.store(target, tl.dot(d_gate, b_gate).to(kind), mask=there)
        d_up = _settled((d * one * s).to(kind), compiled)
        tl.store(up_at, d_up, mask=inside)
        of_up = tl.dot(p_up, d_up, of_up)
        target += tiles.to(tl.int64) * rows * rank
        tl.store(target, tl.dot(d_up, b_up).to(kind), mask=there)
        inner = _settled((one * s * two).to(kind), compiled)
        of_inner = tl.dot(g_inner, inner, of_inner)
    target = b_parts + tl.program_id(1).to(tl.int64) * 3 * outputs * rank
    target += r[:, None] * outputs + column[None, :]
    tl.store(target, of_gate, mask=has[None, :])
    tl.store(target + outputs * rank, of_up, mask=has[None, :])
    tl.store(target + 2 * outputs * rank, of_inner, mask=has[None, :])


def gated_forward(
    x: Tensor, weights: Sequence[Tensor], p: Tensor, cast_adapters: CastAdapters, *, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns silu(gate) · up for two linears that share x, and both as they are if they are kept.

    Args:
        x: [rows, in], contiguous rows; requires `triton_matmul.fits`.
        weights: Of gate and of up, [out, in] each, contiguous.
        p: x Aᵀ, [rows, 2 · rank].
        cast_adapters: The adapters of both.
        keep: Whether to return gate and up.

    Returns:
        inner [rows, out], and [rows, 2 · out], gate beside up, or None.
    """
    x = movable(x)
    (rows, inputs), outputs = x.shape, len(weights[0])
    inner = x.new_empty(rows, outputs)
    both = x.new_empty(rows, 2 * outputs) if keep else None
    parts = (inner, inner) if both is None else both.split(outputs, 1)
    apart = (weights[1].data_ptr() - weights[0].data_ptr()) // x.element_size()
    b = cast_adapters.b.split(outputs)
    if swapped := apart < 0:
        weights, b = weights[::-1], b[::-1]
    flat, part = flat_of(1, 2 * cast_adapters.rank)  # twice the steps
    block, programs = [TILE_M, _TILE_N], devices.spec_of(x.device).num_sms
    with on_device(x):
        _gated_forward[(programs,)](
            *(TensorDescriptor.from_tensor(tensor, block) for tensor in (inner, *parts)),
            TensorDescriptor.from_tensor(x, [TILE_M, TILE_K]),
            TensorDescriptor(
                weights[0], [2, outputs, inputs], [abs(apart), inputs, 1], [2, _TILE_N, TILE_K]
            ),
            TensorDescriptor.from_tensor(p, [TILE_M, part]),
            *(TensorDescriptor.from_tensor(one[None], [2, _TILE_N, part]) for one in b),
            rows,
            outputs,
            inputs,
            swapped=swapped,
            keep=keep,
            rank=cast_adapters.rank,
            part=part,
            tile_m=TILE_M,
            tile_n=_TILE_N,
            tile_k=TILE_K,
            programs=programs,
            flat=flat,
            num_warps=8,
            num_stages=3,
        )
    return inner, both


class Gated(NamedTuple):
    """Adapter products from the backward of a gate.

    Attributes:
        g: dy (s B) of gate and of up, side by side, [rows, 2 · rank].
        d_bs: dB of gate and of up, float32 [out, rank].
        d_a: dA of the linear that reads inner, float32 [rank, out].
    """

    g: Tensor
    d_bs: tuple[Tensor, Tensor]
    d_a: Tensor


def backward_fits(cast_adapters: CastAdapters, last: CastAdapters, device: torch.device) -> bool:
    """Returns whether `gated_backward` is faster with these adapters: gate and up, and the last."""
    return cast_adapters.rank == last.rank <= _PASS_RANK and devices.spec_of(device).is_hopper


def backward_span(rows: int, outputs: int, device: torch.device) -> int:
    """Returns how many rows a program of `gated_backward` sums over (plan/activation_cost.py)."""
    tiles, span = triton.cdiv(outputs, _PASS_COLUMNS), _LONGEST_SPAN
    fewest = _PROGRAMS * devices.spec_of(device).num_sms
    while span > 2 * _PASS_ROWS and tiles * triton.cdiv(rows, span) < fewest:
        span //= 2  # fewer programs leave a part of the GPU idle
    return span


def gated_backward(
    d_inner: Tensor,
    gate: Tensor,
    up: Tensor,
    p: Tensor,
    cast_adapters: CastAdapters,
    scalings: Sequence[float],
    g_last: Tensor,
) -> Gated:
    """Computes the gradients of gate and up from that of inner, overwriting gate and up.

    Partial sums of tiles are added in a fixed order (`triton_lora.sum_parts`).

    Args:
        d_inner: [rows, out], contiguous rows; not modified.
        gate: [rows, out], contiguous rows.
        up: Likewise.
        p: x Aᵀ of both, [rows, 2 · rank], contiguous rows.
        cast_adapters: The adapters of both; requires `backward_fits`.
        scalings: s of each.
        g_last: dy (s B) of the linear that reads inner, [rows, rank], contiguous rows.
    """
    (rows, outputs), rank, device = gate.shape, cast_adapters.rank, gate.device
    tiles, span = triton.cdiv(outputs, _PASS_COLUMNS), backward_span(rows, outputs, device)
    spans = triton.cdiv(rows, span)
    # In 16 bits, like their sum: one more rounding of that size, half the bytes.
    g_parts = p.new_empty(2 * tiles, rows, rank)
    b_parts = torch.empty(spans, 3 * rank * outputs, dtype=torch.float32, device=device)
    with on_device(gate):
        _gated_backward[(tiles, spans)](
            d_inner,
            gate,
            up,
            p,
            g_last,
            cast_adapters.b,
            g_parts,
            b_parts,
            rows,
            outputs,
            d_inner.stride(0),
            gate.stride(0),
            up.stride(0),
            p.stride(0),
            g_last.stride(0),
            rank=rank,
            span=span,
            tile_m=_PASS_ROWS,
            tile_n=_PASS_COLUMNS,
            compiled=d_inner.is_cuda,
            num_warps=4,
            num_stages=3,
        )
    g = torch.empty_like(p)
    sums = sum_parts(
        g, g_parts, b_parts, [outputs] * 3, [*scalings, 1.0], _PASS_COLUMNS, flipped=True
    )
    of_gate, of_up, of_inner = sums.split(outputs)
    return Gated(g, (of_gate, of_up), of_inner.view(rank, outputs))
