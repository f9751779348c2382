"""The products of training in FP8: base and adapter fused, as in triton_matmul.py.

The base's product is of e4m3 numbers, with a scale for each row of x and of W; the adapter's is of
16-bit ones, as ever. A tile accumulates x̂ Ŵᵀ, is multiplied with both scales in registers, and then
accumulates (x Aᵀ)(s B)ᵀ, so the adapter is neither rounded to 8 bits nor a pass over y.

    forward     y = s_x s_W x̂ Ŵᵀ + pᵢ (s Bᵢ)ᵀ
    backward    d = dy · s_W, rounded row by row          dx = s_d d̂ Ŵ + g A

Backward contracts over the rows of W, where each has its own scale. These are multiplied into dy
before it is rounded, so both directions multiply with the same e4m3 numbers, W being rounded once.
Tensor cores read e4m3 with the contracted dimension adjacent only: backward has its own, transposed
copy. Both products are one kernel. That of gate and up applies SwiGLU before it writes a tile, as
triton_swiglu.py does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from halfbyte.linear.fp8 import scaled_product
from halfbyte.linear.triton_lora import add_low_rank
from halfbyte.linear.triton_matmul import FEWEST_ROWS, Turn, flat_of, place
from halfbyte.quant.triton_blockwise import on_device
from halfbyte.runtime import device as devices

TILE_M, TILE_N, TILE_K = 128, 256, 128


@triton.jit
def _fp8_product(
    x,
    x_scale,
    weight,
    w_scale,
    y,
    p,
    b,
    cos,
    sin,
    rows,
    outputs,
    inputs,
    second,
    third,
    turned,
    tokens,
    half: tl.constexpr,
    scaled: tl.constexpr,
    across: tl.constexpr,
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
        total = tl.zeros((tile_m, tile_n), tl.float32)
        for k in range(tl.cdiv(inputs, tile_k)):
            left = x.load([m * tile_m, k * tile_k])
            right = weight.load([n * tile_n, k * tile_k])
            total = tl.dot(left, right.T, total)
        row, column = m * tile_m + tl.arange(0, tile_m), n * tile_n + tl.arange(0, tile_n)
        total *= tl.load(x_scale + row, mask=row < rows, other=0.0)[:, None]
        if scaled:
            total *= tl.load(w_scale + column, mask=column < outputs, other=0.0)[None, :]
        # The linear that the columns belong to; no tile spans two.
        member = (n * tile_n >= second).to(tl.int32) + (n * tile_n >= third).to(tl.int32)
        for r in tl.static_range(0, rank, part):
            left = p.load([m * tile_m, member * rank + r])
            if across:
                total = tl.dot(left, b.load([r, n * tile_n]), total)
            else:
                total = tl.dot(left, b.load([n * tile_n, r]).T, total)
        if half:
            # As in triton_matmul.py.
            at = (row % tokens)[:, None] * (2 * half) + tl.arange(0, half)[None, :]
            inside = row[:, None] < tl.where(n * tile_n < turned, rows, 0)
            c = tl.load(cos + at, mask=inside, other=1.0).to(tl.float32)[:, None, :]
            s = tl.load(sin + at, mask=inside, other=0.0).to(tl.float32)[:, None, :]
            heads = total.to(y.dtype).to(tl.float32).reshape(tile_m, tile_n // (2 * half), 2, half)
            one, two = heads.permute(0, 1, 3, 2).split()
            heads = tl.join(one * c - two * s, two * c + one * s)
            total = heads.permute(0, 1, 3, 2).reshape(tile_m, tile_n)
        y.store([m * tile_m, n * tile_n], total.to(y.dtype))


@triton.jit
def _fp8_gated(
    inner,
    gate,
    up,
    x,
    x_scale,
    weights,
    w_scale,
    p,
    b0,
    b1,
    rows,
    outputs,
    inputs,
    keep: tl.constexpr,
    rank: tl.constexpr,
    part: tl.constexpr,
    tile_m: tl.constexpr,
    tile_n: tl.constexpr,
    tile_k: tl.constexpr,
    programs: tl.constexpr,
    flat: tl.constexpr,
):
    # As triton_swiglu._gated_forward, whose comments hold here.
    tiles_m, tiles_n = tl.cdiv(rows, tile_m), tl.cdiv(outputs, tile_n)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, programs, flatten=flat):
        m, n = place(tile, tiles_m, tiles_n)
        total = tl.zeros((tile_m, 2 * tile_n), tl.float32)
        for k in range(tl.cdiv(inputs, tile_k)):
            left = x.load([m * tile_m, k * tile_k])
            right = weights.load([0, n * tile_n, k * tile_k]).reshape(2 * tile_n, tile_k)
            total = tl.dot(left, right.T, total)
        row, lane = m * tile_m + tl.arange(0, tile_m), tl.arange(0, 2 * tile_n)
        column = n * tile_n + lane % tile_n
        scale = tl.load(
            w_scale + lane // tile_n * outputs + column, mask=column < outputs, other=0.0
        )
        total *= tl.load(x_scale + row, mask=row < rows, other=0.0)[:, None]
        total *= scale[None, :]
        for r in tl.static_range(0, rank, part):
            right = b0.load([0, n * tile_n, r]).reshape(2 * tile_n, part)
            total = tl.dot(p.load([m * tile_m, r]), right.T, total)
            right = b1.load([-1, n * tile_n, r]).reshape(2 * tile_n, part)
            total = tl.dot(p.load([m * tile_m, rank + r]), right.T, total)
        one, two = total.reshape(tile_m, 2, tile_n).permute(0, 2, 1).split()
        one, two = one.to(inner.dtype), two.to(inner.dtype)
        if keep:
            gate.store([m * tile_m, n * tile_n], one)
            up.store([m * tile_m, n * tile_n], two)
        one, two = one.to(tl.float32), two.to(tl.float32)
        result = one * tl.sigmoid(one) * two
        inner.store([m * tile_m, n * tile_n], result.to(inner.dtype))


def fits(rows: int, outputs: Sequence[int], device: torch.device) -> bool:
    """Returns whether the fused contraction supports so many rows, and these sizes of linears."""
    return (
        rows >= FEWEST_ROWS
        and all(size % TILE_N == 0 for size in outputs[:-1])  # no tile spans two
        and devices.spec_of(device).is_hopper
    )


def product(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    w_scale: Tensor | None,
    p: Tensor,
    right: Tensor,
    rank: int,
    outputs: Sequence[int] | None,
    turn: Turn | None = None,
) -> Tensor:
    """Returns s_x s_W x̂ Ŵᵀ and a low-rank product, in one kernel.

    Args:
        x: e4m3 [rows, in], contiguous.
        x_scale: float32 [rows, 1].
        weight: e4m3 [out, in], contiguous rows.
        w_scale: float32 [out], or None for 1.
        p: [rows, members · rank], of the dtype of the result.
        right: With ``outputs`` [out, rank], and the columns of each linear get the product of its
            part of p with the transpose; otherwise [members · rank, out].
        rank: Columns of p for each linear; all of them without ``outputs``.
        outputs: Columns of each linear: at most three, multiples of 256 but for the last.
        turn: Rotary embedding of the first columns, applied after rounding.
    """
    (rows, inputs), columns = x.shape, len(weight)
    y = torch.empty(rows, columns, dtype=p.dtype, device=x.device)
    sizes = outputs or [columns]
    starts = [sum(sizes[:i]) for i in range(1, len(sizes))]
    second, third = (*starts, columns, columns)[:2]
    flat, part = flat_of(1, rank)
    cos, sin = (y, y) if turn is None else turn[:2]
    programs = devices.spec_of(x.device).num_sms
    with on_device(x):
        _fp8_product[(programs,)](
            TensorDescriptor.from_tensor(x, [TILE_M, TILE_K]),
            x_scale,
            TensorDescriptor.from_tensor(weight, [TILE_N, TILE_K]),
            x_scale if w_scale is None else w_scale,
            TensorDescriptor.from_tensor(y, [TILE_M, TILE_N]),
            TensorDescriptor.from_tensor(p, [TILE_M, part]),
            TensorDescriptor.from_tensor(
                right, [part, TILE_N] if outputs is None else [TILE_N, part]
            ),
            cos,
            sin,
            rows,
            columns,
            inputs,
            second,
            third,
            0 if turn is None else turn.columns,
            cos.shape[-2] if len(cos) == 1 else rows,
            half=0 if turn is None else cos.shape[-1] // 2,
            scaled=w_scale is not None,
            across=outputs is None,
            rank=rank,
            part=part,
            tile_m=TILE_M,
            tile_n=TILE_N,
            tile_k=TILE_K,
            programs=programs,
            flat=flat,
            num_warps=8,
            num_stages=3,
        )
    return y


def gated_product(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    p: Tensor,
    b: Tensor,
    rank: int,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """Returns silu(gate) · up for two linears that share x, and both as they are if they are kept.

    Args:
        x: e4m3 [rows, in], contiguous.
        x_scale: float32 [rows, 1].
        weight: e4m3 [2 · out, in], gate above up, contiguous.
        w_scale: float32 [2 · out].
        p: [rows, 2 · rank].
        b: [2 · out, rank].
        rank: Columns of p for each linear.
        keep: Whether to return gate and up.

    Returns:
        inner [rows, out], and [rows, 2 · out], gate beside up, or None.
    """
    (rows, inputs), outputs = x.shape, len(weight) // 2
    inner = torch.empty(rows, outputs, dtype=p.dtype, device=x.device)
    both = inner.new_empty(rows, 2 * outputs) if keep else None
    parts = (inner, inner) if both is None else both.split(outputs, 1)
    flat, part = flat_of(1, 2 * rank)  # twice the steps
    half = TILE_N // 2
    programs = devices.spec_of(x.device).num_sms
    with on_device(x):
        _fp8_gated[(programs,)](
            *(TensorDescriptor.from_tensor(out, [TILE_M, half]) for out in (inner, *parts)),
            TensorDescriptor.from_tensor(x, [TILE_M, TILE_K]),
            x_scale,
            TensorDescriptor.from_tensor(weight.view(2, outputs, inputs), [2, half, TILE_K]),
            w_scale,
            TensorDescriptor.from_tensor(p, [TILE_M, part]),
            *(TensorDescriptor.from_tensor(one[None], [2, half, part]) for one in b.split(outputs)),
            rows,
            outputs,
            inputs,
            keep=keep,
            rank=rank,
            part=part,
            tile_m=TILE_M,
            tile_n=half,
            tile_k=TILE_K,
            programs=programs,
            flat=flat,
            num_warps=8,
            num_stages=3,
        )
    return inner, both


def plain_product(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    w_scale: Tensor | None,
    p: Tensor,
    right: Tensor,
    outputs: Sequence[int] | None,
) -> Tensor:
    """`product` with torch's product, without a rotary embedding; any sizes of linears."""
    y = scaled_product(x, x_scale, weight, w_scale, p.dtype)
    add_low_rank(y, p, right, outputs)
    return y
