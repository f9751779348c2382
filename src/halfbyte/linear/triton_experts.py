"""The products of a mixture of experts: each row with the weight of its expert, in one launch.

    forward     inner = glu(x[token] W_gate_upᵀ)          y[slot] = w · (inner W_downᵀ)
    backward    h = x[token] W_gate_upᵀ (recomputed)      d_inner₀ = dy[token] W_down
                dh, d_w from h, d_inner₀ and w            dx[slot] = dh W_gate_up

Rows are sorted by expert (triton_routing.py), and a tile of rows belongs to one expert. Which rows
an expert has is known on the device only: a fixed number of programs shares the tiles that there
are. A tile is computed whole, and only the rows of its expert are stored.

Rows are gathered by pointers while they are loaded, and scattered as they are stored: sorted copies
of x, dy, y and dx are never made. Bias, routing weight and activation are applied to a tile in
registers. Weights are those of a few experts at a time: they are decoded into one buffer, chunk by
chunk, and the launches of a chunk process the rows of its experts.

On Hopper, weights and sorted rows are loaded by TMA; elsewhere all is loaded by pointers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from halfbyte.linear.glu import Glu
from halfbyte.linear.triton_matmul import copyable, place
from halfbyte.linear.triton_routing import (
    LARGE_TILE,
    Routing,
    routing_of,
    routing_of_sorted,
    sum_over_k,
)
from halfbyte.quant.triton_blockwise import on_device
from halfbyte.runtime import device as devices

__all__ = [
    "Routing",
    "gated_backward",
    "grouped_product",
    "routing_of",
    "routing_of_sorted",
    "sum_over_k",
]

# Tile of `_glu_backward`, and its programs per SM.
_GLU_ROWS, _GLU_LANES, _GLU_PROGRAMS = 16, 256, 4


class Tile(NamedTuple):
    """How a product is divided; `tile_of` has those that were found to be fast.

    Attributes:
        n: Columns of a tile.
        k: Elements of a step.
        warps: Warps of a program.
        stages: Steps that are loaded ahead.
        per_sm: Programs per SM.
        flat: Whether a program's tiles and their steps form one loop.
    """

    n: int
    k: int
    warps: int
    stages: int
    per_sm: int
    flat: bool


@triton.jit
def _glu(gate, up, limit: tl.constexpr, slope: tl.constexpr, offset: tl.constexpr):
    if limit is not None:
        gate = tl.minimum(gate, limit)
        up = tl.maximum(tl.minimum(up, limit), -limit)
    return gate * tl.sigmoid(slope * gate) * (up + offset)


@triton.jit
def _epilogue(
    value, bias, expert, column, columns, factor, biased: tl.constexpr, scaled: tl.constexpr
):
    if biased:
        at = expert.to(tl.int64) * columns + column
        value += tl.load(bias + at, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    if scaled:
        value *= factor[:, None]
    return value


@triton.jit(do_not_specialize=["base", "first", "experts"])
def _grouped_product(
    out,
    x,
    weight,
    bias,
    row_scale,
    order,
    offsets,
    tiles,
    first_tiles,
    base,
    first,
    experts,
    columns,
    inputs,
    out_stride,
    x_stride,
    top_k: tl.constexpr,
    transposed: tl.constexpr,
    gather: tl.constexpr,
    scatter: tl.constexpr,
    biased: tl.constexpr,
    scaled: tl.constexpr,
    gated: tl.constexpr,
    interleaved: tl.constexpr,
    limit: tl.constexpr,
    slope: tl.constexpr,
    offset: tl.constexpr,
    tma: tl.constexpr,
    tile_m: tl.constexpr,
    tile_n: tl.constexpr,
    tile_k: tl.constexpr,
    programs: tl.constexpr,
    flat: tl.constexpr,
):
    half: tl.constexpr = tile_n // 2
    paired: tl.constexpr = gated and not interleaved  # half a tile of gate, the same half of up
    origin = tl.load(offsets + base)
    first_tile = tl.load(first_tiles + first)
    tiles_m = tl.load(first_tiles + first + experts) - first_tile
    tiles_n = tl.cdiv(columns, tile_n)
    kind = out.dtype.element_ty
    step = tl.arange(0, tile_k)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, programs, flatten=flat):
        m, n = place(tile, tiles_m, tiles_n)
        entry = tiles + (first_tile + m) * 3
        expert, start, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        row = start + tl.arange(0, tile_m)
        inside = row < end
        slot = row
        if gather or scatter or scaled:
            slot = tl.load(order + row, mask=inside, other=0)
        if gather or not tma:
            source = slot // top_k if gather else row - origin
            left_at = x + source.to(tl.int64)[:, None] * x_stride + step[None, :]
        lane = tl.arange(0, tile_n)
        if paired:
            outer = lane // half * (columns // 2) + n * half + lane % half
            whole = n * half + lane % half < columns // 2
        else:
            outer = n * tile_n + lane
            whole = outer < columns
        if not tma:
            right_at = weight + (expert - first).to(tl.int64) * columns * inputs
        total = tl.zeros((tile_m, tile_n), tl.float32)
        for k in range(tl.cdiv(inputs, tile_k)):
            there = k * tile_k + step < inputs
            if gather or not tma:
                mask = inside[:, None] & there[None, :]
                left = tl.load(left_at + k * tile_k, mask=mask, other=0.0)
            else:
                left = x.load([start - origin, k * tile_k])
            if tma:
                if not transposed:
                    right = weight.load([expert - first, k * tile_k, n * tile_n])
                    right = right.reshape(tile_k, tile_n)
                elif paired:
                    right = weight.load([expert - first, 0, n * half, k * tile_k])
                    right = right.reshape(tile_n, tile_k).T
                else:
                    right = weight.load([expert - first, n * tile_n, k * tile_k])
                    right = right.reshape(tile_n, tile_k).T
            else:
                inner = (k * tile_k + step)[:, None]
                if transposed:
                    at = right_at + outer[None, :] * inputs + inner
                else:
                    at = right_at + inner * columns + outer[None, :]
                right = tl.load(at, mask=there[:, None] & whole[None, :], other=0.0)
            total = tl.dot(left, right, total)
        factor = tl.full((tile_m,), 1.0, tl.float32)
        if scaled:
            factor = tl.load(row_scale + slot, mask=inside, other=0.0).to(tl.float32)
        target = slot if scatter else row - origin
        target = out + target.to(tl.int64)[:, None] * out_stride
        lane = n * half + tl.arange(0, half)
        if gated and interleaved:
            one, two = total.reshape(tile_m, half, 2).split()
            one_at, two_at = 2 * lane, 2 * lane + 1
        else:
            one, two = total.reshape(tile_m, 2, half).permute(0, 2, 1).split()
            if gated:
                one_at, two_at = lane, columns // 2 + lane
            else:
                one_at, two_at = lane + n * half, lane + n * half + half
        one = _epilogue(one, bias, expert, one_at, columns, factor, biased, scaled and not gated)
        two = _epilogue(two, bias, expert, two_at, columns, factor, biased, scaled and not gated)
        if gated:
            one, two = one.to(kind).to(tl.float32), two.to(kind).to(tl.float32)
            value = _glu(one, two, limit, slope, offset)
            mask = inside[:, None] & (lane < columns // 2)[None, :]
            tl.store(target + lane[None, :], value.to(kind), mask=mask)
        else:
            mask = inside[:, None] & (one_at < columns)[None, :]
            tl.store(target + one_at[None, :], one.to(kind), mask=mask)
            mask = inside[:, None] & (two_at < columns)[None, :]
            tl.store(target + two_at[None, :], two.to(kind), mask=mask)


@triton.jit(do_not_specialize=["base", "first", "experts"])
def _glu_backward(
    h,
    d_inner,
    d_scale,
    row_scale,
    order,
    offsets,
    base,
    first,
    experts,
    columns,
    interleaved: tl.constexpr,
    limit: tl.constexpr,
    slope: tl.constexpr,
    offset: tl.constexpr,
    programs: tl.constexpr,
    rows: tl.constexpr,
    lanes: tl.constexpr,
):
    origin = tl.load(offsets + base)
    start, end = tl.load(offsets + first), tl.load(offsets + first + experts)
    kind = h.dtype.element_ty
    for top in range(start + tl.program_id(0) * rows, end, programs * rows):
        row = top + tl.arange(0, rows)
        there = row < end
        slot = tl.load(order + row, mask=there, other=0)
        w = tl.load(row_scale + slot, mask=there, other=0.0).to(tl.float32)[:, None]
        at_row = (row - origin).to(tl.int64)[:, None] * columns
        total = tl.zeros((rows, lanes), tl.float32)
        for left in range(0, columns, lanes):
            at = left + tl.arange(0, lanes)[None, :]
            inside = there[:, None] & (at < columns)
            d = tl.load(d_inner + at_row + at, mask=inside, other=0.0).to(tl.float32)
            gate_at = h + 2 * at_row + at
            pair = 2 * left + tl.arange(0, 2 * lanes)[None, :]
            both_at, both_inside = h + 2 * at_row + pair, there[:, None] & (pair < 2 * columns)
            if interleaved:
                both = tl.load(both_at, mask=both_inside, other=0.0)
                gate, up = both.reshape(rows, lanes, 2).split()
            else:
                gate = tl.load(gate_at, mask=inside, other=0.0)
                up = tl.load(gate_at + columns, mask=inside, other=0.0)
            gate, up = gate.to(tl.float32), up.to(tl.float32)
            gate_moves, up_moves = inside, inside
            if limit is not None:
                gate_moves, up_moves = gate <= limit, tl.abs(up) <= limit
                gate = tl.minimum(gate, limit)
                up = tl.maximum(tl.minimum(up, limit), -limit)
            s = tl.sigmoid(slope * gate)
            total += d * (up + offset) * gate * s
            d *= w
            d_gate = d * (up + offset) * s * (1.0 + slope * gate * (1.0 - s))
            d_gate = tl.where(gate_moves, d_gate, 0.0).to(kind)
            d_up = tl.where(up_moves, d * gate * s, 0.0).to(kind)
            if interleaved:
                both = tl.join(d_gate, d_up).reshape(rows, 2 * lanes)
                tl.store(both_at, both, mask=both_inside)
            else:
                tl.store(gate_at, d_gate, mask=inside)
                tl.store(gate_at + columns, d_up, mask=inside)
        tl.store(d_scale + slot, tl.sum(total, axis=1), mask=there)


def tile_of(device: torch.device, tile_rows: int, few: bool) -> Tile:
    """Returns the tile of a product, by the GPU and the rows of the mean expert.

    Those of Hopper are the fastest of twenty for both orientations, with and without gathering
    (``benchmarks/gpu_experts.py --tune``).
    """
    large = tile_rows >= LARGE_TILE
    if not devices.spec_of(device).is_hopper:
        return Tile(n=128, k=32, warps=8 if large else 4, stages=3, per_sm=2, flat=False)
    if not large:
        return Tile(n=128, k=64, warps=4, stages=3, per_sm=3, flat=False)
    # With few rows, a product waits for weights; with many, a deeper pipeline is slower.
    return Tile(n=256, k=64, warps=8, stages=4 if few else 3, per_sm=1, flat=True)


def grouped_product(
    x: Tensor,
    weight: Tensor,
    routing: Routing,
    first: int,
    out: Tensor,
    *,
    transposed: bool,
    gather: bool = False,
    scatter: bool = False,
    row_scale: Tensor | None = None,
    bias: Tensor | None = None,
    glu: Glu | None = None,
    base: int = 0,
    tile: Tile | None = None,
) -> None:
    """Computes out[o(r)] = (x[i(r)] op(Wₑ) + bₑ) · row_scale[s(r)] for the rows r of some experts.

    r counts the sorted rows, and s(r) is the slot of row r. With ``glu``, out gets the activation
    of the products, which are rounded before it. Tensors of sorted rows begin with the first row
    of the expert ``base``, b, and need not have rows after those of the given experts.

    Args:
        x: 16-bit, contiguous rows: those of tokens with ``gather``, i(r) = s(r) // K; otherwise
            sorted rows, i(r) = r - b.
        weight: The weights of experts first, first + 1, ...; [n, out, in] if ``transposed``,
            [n, in, out] otherwise, contiguous, in the dtype of x.
        routing: Of the layer.
        first: The first expert.
        out: Like x: rows of slots with ``scatter``, o(r) = s(r); otherwise sorted rows,
            o(r) = r - b. Rows of other experts are not written.
        transposed: Whether op(W) is Wᵀ.
        gather: See ``x``.
        scatter: See ``out``.
        row_scale: [S]; not with ``glu``.
        bias: [E, out], of all experts.
        glu: The activation; the product then has twice the columns of ``out``.
        base: At most ``first``.
        tile: For benchmarks; None for `tile_of`.

    Raises:
        ValueError: If the columns of gate and up are the halves of a weight that is not
            transposed, or row_scale is given with ``glu``.
    """
    experts = len(weight)
    columns, inputs = weight.shape[1:] if transposed else weight.shape[:0:-1]
    if glu is not None and (row_scale is not None or not (transposed or glu.interleaved)):
        raise ValueError("expected gate and up in rows of W, or interleaved, and no row_scale")
    tile = tile or tile_of(x.device, routing.tile_rows, routing.few)
    spec = devices.spec_of(x.device)
    # TMA: addresses and strides of 16 bytes.
    tma = spec.is_hopper and columns % 8 == inputs % 8 == 0 and weight.data_ptr() % 16 == 0
    tma = tma and (gather or copyable(x))
    paired = glu is not None and not glu.interleaved
    left: Any = x
    right: Any = weight
    if tma:
        if not gather:
            left = TensorDescriptor.from_tensor(x, [routing.tile_rows, tile.k])
        if paired:
            right = TensorDescriptor.from_tensor(
                weight.view(experts, 2, columns // 2, inputs), [1, 2, tile.n // 2, tile.k]
            )
        else:
            block = [1, tile.n, tile.k] if transposed else [1, tile.k, tile.n]
            right = TensorDescriptor.from_tensor(weight, block)
    glu_or_none = glu or Glu()
    programs = tile.per_sm * spec.num_sms
    with on_device(x):
        _grouped_product[(programs,)](
            out,
            left,
            right,
            x if bias is None else bias,
            x if row_scale is None else row_scale,
            routing.order,
            routing.offsets,
            routing.tiles,
            routing.first_tiles,
            base,
            first,
            experts,
            columns,
            inputs,
            out.stride(0),
            x.stride(0),
            top_k=routing.top_k,
            transposed=transposed,
            gather=gather,
            scatter=scatter,
            biased=bias is not None,
            scaled=row_scale is not None,
            gated=glu is not None,
            **glu_or_none._asdict(),
            tma=tma,
            tile_m=routing.tile_rows,
            tile_n=tile.n,
            tile_k=tile.k,
            programs=programs,
            flat=tile.flat,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


def gated_backward(
    h: Tensor,
    d_inner: Tensor,
    d_scale: Tensor,
    row_scale: Tensor,
    routing: Routing,
    first: int,
    experts: int,
    glu: Glu,
    *,
    base: int = 0,
) -> None:
    """Computes the gradients of an activation and of the routing weights, overwriting h.

    Args:
        h: [rows, 2 · I], contiguous, sorted rows from the first of the expert ``base``: gate and
            up. Overwritten by their gradients in the rows of the experts.
        d_inner: [rows, I], like h: the gradient of the scaled activation, dy W.
        d_scale: float32 [S], of slots: gets Σ inner · d_inner, the gradient of the routing weight.
        row_scale: [S], of slots: the routing weights.
        routing: Of the layer.
        first: The first expert.
        experts: Number of experts.
        glu: The activation.
        base: At most ``first``.
    """
    programs = _GLU_PROGRAMS * devices.spec_of(h.device).num_sms
    with on_device(h):
        _glu_backward[(programs,)](
            h,
            d_inner,
            d_scale,
            row_scale,
            routing.order,
            routing.offsets,
            base,
            first,
            experts,
            d_inner.shape[1],
            **glu._asdict(),
            programs=programs,
            rows=_GLU_ROWS,
            lanes=_GLU_LANES,
            num_warps=8,
        )
