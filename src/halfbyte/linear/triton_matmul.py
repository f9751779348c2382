"""The products of training on a GPU: base and adapter fused, linears that share an input fused.

An adapter's FLOPs are negligible beside the base's, but its memory traffic is not: adding x Aᵀ Bᵀ
to y reads and writes all of y, which at 8192 tokens takes a sixth of the time of the product. So
the adapter is the last step of the same contraction. A tile of y accumulates x Wᵀ and then, in the
same registers, (x Aᵀ)(s B)ᵀ; a tile of dx accumulates dy W and then (dy s B) A. No intermediate is
written, and the result is rounded once instead of twice.

Linears that read the same x (q, k, v; gate, up) are one product: their decoded weights are stacked
in memory, so x is read once, and dx accumulates the gradients of all of them without intermediate
writes.

    forward     p = x [A₁ A₂ …]ᵀ          y = x Wᵀ + pᵢ (s Bᵢ)ᵀ                    2 launches
    backward    gᵢ = dyᵢ (s Bᵢ) and dBᵢ = s dyᵢᵀ pᵢ, in one reading of dyᵢ         2
                dx = Σ dyᵢ Wᵢ + g [A₁ A₂ …]          dA = gᵀ x                       2

The contraction is a persistent kernel (one program per SM) on tiles loaded by Hopper's TMA, and
takes as long as the bare product in cuBLAS (benchmarks/results). It is tuned to Hopper, compute
capability 9.0, and needs enough rows to fill the GPU (see `fits`). Otherwise cuBLAS is used, and
the adapter is added to the base's output (`plain_forward`, `plain_backward`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from halfbyte.linear.triton_lora import CastAdapters, add_low_rank
from halfbyte.quant.triton_blockwise import on_device
from halfbyte.runtime import device as devices

# Minimum rows for one tile per SM to be enough work; below, cuBLAS splits better.
FEWEST_ROWS = 2048

TILE_M, TILE_K = 128, 64


@triton.jit
def _forward(
    x,
    weight,
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
        # The linear that the columns belong to; no tile spans two.
        member = (n * tile_n >= second).to(tl.int32) + (n * tile_n >= third).to(tl.int32)
        for r in tl.static_range(0, rank, part):
            left = p.load([m * tile_m, member * rank + r])
            right = b.load([n * tile_n, r])
            total = tl.dot(left, right.T, total)
        if half:
            # Heads have 2 · half columns; a lane holds the same columns of both halves.
            row = m * tile_m + tl.arange(0, tile_m)
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
        m, n = place(tile, tiles_m, tiles_n)
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
def place(tile, tiles_m, tiles_n):
    """Position of a tile: tile rows are grouped by eight, so neighbours share data in the cache."""
    strip = 8 * tiles_n
    first = tile // strip * 8
    height = tl.minimum(tiles_m - first, 8)
    return first + tile % strip % height, tile % strip // height


def copyable(x: Tensor) -> bool:
    """Returns whether TMA can read x [rows, n], 16-bit, in place."""
    return x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0


def fits(x: Tensor, outputs: Sequence[int]) -> bool:
    """Returns whether the fused contraction supports ``x`` [rows, in] and is faster for it."""
    return (
        x.is_cuda
        and x.shape[0] >= FEWEST_ROWS
        and x.dtype in (torch.bfloat16, torch.float16)
        and all(size % 8 == 0 for size in (x.shape[1], *outputs))
        and devices.spec_of(x.device).is_hopper
    )


def movable(x: Tensor) -> Tensor:
    """Returns x, or a copy of it that is `copyable`."""
    return x if copyable(x) else x.clone(memory_format=torch.contiguous_format)


def flat_of(members: int, ranks: int) -> tuple[bool, int]:
    """Whether a program's tiles and their steps form one loop, and the rank covered by a step.

    One loop starts the next tile's first step while a tile is written (2 to 5 % of the time), but
    the tile being written then needs shared memory of its own, which leaves enough only for narrow
    steps over a small rank.
    """
    return (True, 16) if members == 1 and ranks <= 64 else (False, 16 if ranks % 64 else 64)


def _adjacent(parts: Sequence[Tensor], dim: int) -> bool:
    """Whether matrices are adjacent in memory along ``dim``, in the given order."""
    first, at = parts[0], parts[0].storage_offset()
    storage = first.untyped_storage().data_ptr()
    for part in parts:
        one = part.untyped_storage().data_ptr() == storage and part.stride() == first.stride()
        if not one or part.storage_offset() != at:
            return False
        at += part.shape[dim] * part.stride(dim)
    return True


def _as_one(parts: Sequence[Tensor], dim: int) -> Tensor:
    """View adjacent ``parts`` as one matrix."""
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return parts[0].as_strided(shape, parts[0].stride())


def plain_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    p: Tensor,
    cast_adapters: CastAdapters,
    outputs: Sequence[int],
) -> Tensor:
    """`forward` with torch's products."""
    y = x.new_empty(x.shape[0], sum(outputs))
    parts = y.split(list(outputs), 1)
    if _adjacent(weights, 0):
        torch.mm(x, _as_one(weights, 0).t(), out=y)
    else:
        for part, weight in zip(parts, weights, strict=True):
            torch.mm(x, weight.t(), out=part)
    add_low_rank(y, p, cast_adapters.b, outputs)
    return y


def plain_backward(
    dys: Sequence[Tensor], weights: Sequence[Tensor], g: Tensor, cast_adapters: CastAdapters
) -> Tensor:
    """`backward` with torch's products."""
    if len(dys) > 1 and _adjacent(dys, 1) and _adjacent(weights, 0):
        dys, weights = [_as_one(dys, 1)], [_as_one(weights, 0)]
    dx = torch.mm(dys[0], weights[0])
    for dy, weight in zip(dys[1:], weights[1:], strict=True):
        dx.addmm_(dy, weight)
    add_low_rank(dx, g, cast_adapters.a, None)
    return dx


class Turn(NamedTuple):
    """A rotary embedding of the first columns of a product.

    Attributes:
        cos: [1 or B, T, n], contiguous, for rows of B · T.
        sin: Likewise.
        columns: Number of columns to rotate, in heads of n columns.
    """

    cos: Tensor
    sin: Tensor
    columns: int

    @property
    def fits(self) -> bool:
        """Whether no head spans two tiles, and a lane holds the same columns of both halves."""
        return self.cos.shape[2] in (32, 64, 128, 256)


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    p: Tensor,
    cast_adapters: CastAdapters,
    outputs: Sequence[int],
    turn: Turn | None = None,
) -> Tensor:
    """Returns x Wᵀ + pᵢ (s Bᵢ)ᵀ for linears that share x.

    Args:
        x: [rows, in], contiguous rows.
        weights: [out, in] of each. Weights adjacent in memory are one product.
        p: x Aᵀ, [rows, members · rank].
        cast_adapters: The adapters.
        outputs: Rows of each weight, at most three.
        turn: Rotary embedding of the first columns, applied after rounding; requires `fits`.

    Returns:
        [rows, sum of outputs].
    """
    if turn is None and x.is_cuda and not fits(x, outputs):
        return plain_forward(x, weights, p, cast_adapters, outputs)
    x = movable(x)
    rows, inputs = x.shape
    y = x.new_empty(rows, sum(outputs))
    starts = [sum(outputs[:i]) for i in range(len(outputs))]
    whole = _adjacent(weights, 0) and all(size % 256 == 0 for size in outputs[:-1])
    if whole:
        parts = [(0, sum(outputs), starts[1:])]
    else:  # otherwise a tile would span two linears
        parts = [(start, size, []) for start, size in zip(starts, outputs, strict=True)]
    tile_n, programs = 256, devices.spec_of(x.device).num_sms
    for i, (start, size, others) in enumerate(parts):
        second, third = (*others, size, size)[:2]
        p_part = p if whole else p[:, i * cast_adapters.rank :]
        weight = weights[i].as_strided((size, inputs), weights[i].stride())
        flat, part = flat_of(1, cast_adapters.rank)
        turned = 0 if turn is None else max(0, min(size, turn.columns - start))
        cos, sin = (x, x) if turn is None else turn[:2]
        with on_device(x):
            _forward[(programs,)](
                TensorDescriptor.from_tensor(x, [TILE_M, TILE_K]),
                TensorDescriptor.from_tensor(weight, [tile_n, TILE_K]),
                TensorDescriptor.from_tensor(y[:, start : start + size], [TILE_M, tile_n]),
                TensorDescriptor.from_tensor(p_part, [TILE_M, part]),
                TensorDescriptor.from_tensor(cast_adapters.b[start : start + size], [tile_n, part]),
                cos,
                sin,
                rows,
                size,
                inputs,
                second,
                third,
                turned,
                cos.shape[-2] if len(cos) == 1 else rows,
                half=cos.shape[-1] // 2 if turned else 0,
                rank=cast_adapters.rank,
                part=part,
                tile_m=TILE_M,
                tile_n=tile_n,
                tile_k=TILE_K,
                programs=programs,
                flat=flat,
                num_warps=8,
                num_stages=3,
            )
    return y


def backward(
    dys: Sequence[Tensor], weights: Sequence[Tensor], g: Tensor, cast_adapters: CastAdapters
) -> Tensor:
    """Returns dx = Σ dyᵢ Wᵢ + g A, [rows, in].

    Args:
        dys: For each linear [rows, out], contiguous rows.
        weights: As for `forward`.
        g: dyᵢ (s Bᵢ) side by side, [rows, members · rank].
        cast_adapters: The adapters.
    """
    rows, inputs = dys[0].shape[0], weights[0].shape[1]
    if dys[0].is_cuda and not fits(dys[0], [inputs, *(dy.shape[1] for dy in dys)]):
        return plain_backward(dys, weights, g, cast_adapters)
    dys = [movable(dy) for dy in dys]
    dx = dys[0].new_empty(rows, inputs)
    tile_n, programs = 256, devices.spec_of(dx.device).num_sms
    lefts = [TensorDescriptor.from_tensor(dy, [TILE_M, TILE_K]) for dy in dys]
    rights = [TensorDescriptor.from_tensor(weight, [TILE_K, tile_n]) for weight in weights]
    sizes = [dy.shape[1] for dy in dys] + [0, 0]
    ranks = cast_adapters.a.shape[0]
    flat, part = flat_of(len(dys), ranks)
    with on_device(dx):
        _backward[(programs,)](
            TensorDescriptor.from_tensor(dx, [TILE_M, tile_n]),
            *(lefts + lefts[:1] * 2)[:3],
            *(rights + rights[:1] * 2)[:3],
            TensorDescriptor.from_tensor(g, [TILE_M, part]),
            TensorDescriptor.from_tensor(cast_adapters.a, [part, tile_n]),
            rows,
            inputs,
            *sizes[:3],
            members=len(dys),
            ranks=ranks,
            part=part,
            tile_m=TILE_M,
            tile_n=tile_n,
            tile_k=TILE_K,
            programs=programs,
            flat=flat,
            num_warps=8,
            num_stages=3,
        )
    return dx
