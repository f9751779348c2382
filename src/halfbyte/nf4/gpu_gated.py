"""The product of gate and up with the gate in it: inner = silu(x Gᵀ) · (x Uᵀ).

Between the products of an MLP lie the widest activations of a layer, and a kernel that reads and
writes them takes as long as a sixth of the product before it. So the gate is done in registers,
before a tile is written, and gate and up are written only if backward will come, which wants them.

The contraction is that of gpu_products.py, rounded where it is rounded there, so results are the
same bits as with a kernel of its own for the gate (model/gpu.py). A tile gathers 128 columns of
gate and the same 128 of up, from one block of two pages: two matrices of one shape are one of two
pages, wherever they lie.

Backward has no such kernel. Three tiles read and written for one in registers were tried, and take
longer in the product than in a kernel of their own (LAB.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from halfbyte.nf4.gpu import multiprocessors, on_device
from halfbyte.nf4.gpu_adapters import Shadow
from halfbyte.nf4.gpu_products import TILE_K, TILE_M, flat_of, movable, place

# Columns of gate, and as many of up.
_TILE_N = 128


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
            # Each has a p of its own. What lies beside a matrix of one page reads as zeros.
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


def gated_forward(
    x: Tensor, weights: Sequence[Tensor], p: Tensor, shadow: Shadow, *, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns silu(gate) · up for two linears that share x, and both as they are if they are kept.

    Args:
        x: [rows, in], contiguous rows; such that `gpu_products.fits`.
        weights: Of gate and of up, [out, in] each, contiguous.
        p: x Aᵀ, [rows, 2 · rank].
        shadow: The adapters of both.
        keep: Whether gate and up are wanted.

    Returns:
        inner [rows, out], and [rows, 2 · out], gate beside up, or None.
    """
    x = movable(x)
    (rows, inputs), outputs = x.shape, len(weights[0])
    inner = x.new_empty(rows, outputs)
    both = x.new_empty(rows, 2 * outputs) if keep else None
    parts = (inner, inner) if both is None else both.split(outputs, 1)
    apart = (weights[1].data_ptr() - weights[0].data_ptr()) // x.element_size()
    b = shadow.b.split(outputs)
    if swapped := apart < 0:
        weights, b = weights[::-1], b[::-1]
    flat, part = flat_of(1, 2 * shadow.rank)  # twice the steps
    block, programs = [TILE_M, _TILE_N], multiprocessors(x.device)
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
            rank=shadow.rank,
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
