"""The norms of queries and keys and their rotary embedding as one Triton kernel each way.

Some families (Qwen 3) norm every head of q and k before they are rotated:

    y = x · rstd · w,  rstd = 1 / √(mean(x²) + eps)             x a head of q or k, [n]
    out = y · cos + turned(y) · sin                             turned(y) = (-y₂, y₁), of y's halves

The pairs that are rotated are of the same head, so a head is read once, normed and rotated in
registers, and written once. Separate kernels read and write q and k twice in each direction. A
program handles the heads of a token, a block of them at a time, as that of the rotary embedding
does: a program for each row of 128 has too little to do, and there are 36 of them per token in
Qwen3-30B-A3B.

Backward has q and k as they came from the projections and rstd, and recomputes the rest:

    dy = dout · cos - turned(dout) · sin
    dx = rstd · (g - x̂ · mean(g · x̂)),  g = dy · w,  x̂ = x · rstd

Everything in between is float32, and each direction rounds once. The sequence of operations, which
is the specification (`elementwise.plain_norm_rotary`), rounds three times in forward and twice in
backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.quant.triton_blockwise import on_device

# Most pairs of a block of heads, and the warps that share them.
_PAIRS, _WARPS = 2048, 4


@triton.jit
def _load(source, inside):
    return tl.load(source, mask=inside, other=0.0).to(tl.float32)


# Tables and weights are loaded after the heads, whose loads take longest, so that none waits.
@triton.jit
def _norm_turn(
    y, rstds, x, weight, eps, cos, sin, heads, half, lanes: tl.constexpr, head_lanes: tl.constexpr
):
    at = tl.arange(0, lanes)
    for first in range(0, heads, head_lanes):
        head = first + tl.arange(0, head_lanes)
        where = head[:, None] * (2 * half) + at[None, :]
        inside = (head[:, None] < heads) & (at[None, :] < half)
        x1, x2 = _load(x + where, inside), _load(x + where + half, inside)
        c, s = _load(cos + at, at < half)[None, :], _load(sin + at, at < half)[None, :]
        w1 = _load(weight + at, at < half)[None, :]
        w2 = _load(weight + half + at, at < half)[None, :]
        rstd = 1.0 / tl.sqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) / (2 * half) + eps)
        tl.store(rstds + head, rstd, mask=head < heads)
        y1, y2 = x1 * rstd[:, None] * w1, x2 * rstd[:, None] * w2
        tl.store(y + where, (y1 * c - y2 * s).to(y.dtype.element_ty), mask=inside)
        tl.store(y + where + half, (y2 * c + y1 * s).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _norm_turn_backward(
    dx, dy, x, rstds, weight, cos, sin, heads, half, lanes: tl.constexpr, head_lanes: tl.constexpr
):
    at = tl.arange(0, lanes)
    for first in range(0, heads, head_lanes):
        head = first + tl.arange(0, head_lanes)
        where = head[:, None] * (2 * half) + at[None, :]
        inside = (head[:, None] < heads) & (at[None, :] < half)
        d1, d2 = _load(dy + where, inside), _load(dy + where + half, inside)
        x1, x2 = _load(x + where, inside), _load(x + where + half, inside)
        rstd = _load(rstds + head, head < heads)[:, None]
        c, s = _load(cos + at, at < half)[None, :], _load(sin + at, at < half)[None, :]
        w1 = _load(weight + at, at < half)[None, :]
        w2 = _load(weight + half + at, at < half)[None, :]
        g1, g2 = (d1 * c + d2 * s) * w1, (d2 * c - d1 * s) * w2
        x1, x2 = x1 * rstd, x2 * rstd
        mean = (tl.sum(g1 * x1 + g2 * x2, axis=1) / (2 * half))[:, None]
        tl.store(dx + where, (rstd * (g1 - x1 * mean)).to(dx.dtype.element_ty), mask=inside)
        tl.store(dx + where + half, (rstd * (g2 - x2 * mean)).to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _norm_rotate(
    q_out,
    k_out,
    q_rstds,
    k_rstds,
    q,
    k,
    q_weight,
    k_weight,
    q_eps,
    k_eps,
    cos,
    sin,
    q_heads,
    k_heads,
    half,
    q_batch,
    q_token,
    k_batch,
    k_token,
    table_stride,
    lanes: tl.constexpr,
    q_lanes: tl.constexpr,
    k_lanes: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    row = batch * tl.num_programs(0) + token
    cos += batch * table_stride + token * half * 2
    sin += batch * table_stride + token * half * 2
    q += batch * q_batch + token * q_token
    k += batch * k_batch + token * k_token
    q_out += row * q_heads * half * 2
    k_out += row * k_heads * half * 2
    q_rstds += row * q_heads
    k_rstds += row * k_heads
    _norm_turn(q_out, q_rstds, q, q_weight, q_eps, cos, sin, q_heads, half, lanes, q_lanes)
    _norm_turn(k_out, k_rstds, k, k_weight, k_eps, cos, sin, k_heads, half, lanes, k_lanes)


@triton.jit
def _norm_rotate_backward(
    dq,
    dk,
    q_out,
    k_out,
    q_rstds,
    k_rstds,
    q,
    k,
    q_weight,
    k_weight,
    cos,
    sin,
    q_heads,
    k_heads,
    half,
    q_out_batch,
    q_out_token,
    k_out_batch,
    k_out_token,
    q_batch,
    q_token,
    k_batch,
    k_token,
    table_stride,
    lanes: tl.constexpr,
    q_lanes: tl.constexpr,
    k_lanes: tl.constexpr,
):
    # q_out and k_out are the gradients of forward's q_out and k_out.
    token = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    row = batch * tl.num_programs(0) + token
    cos += batch * table_stride + token * half * 2
    sin += batch * table_stride + token * half * 2
    q += batch * q_batch + token * q_token
    k += batch * k_batch + token * k_token
    q_out += batch * q_out_batch + token * q_out_token
    k_out += batch * k_out_batch + token * k_out_token
    dq += row * q_heads * half * 2
    dk += row * k_heads * half * 2
    q_rstds += row * q_heads
    k_rstds += row * k_heads
    _norm_turn_backward(dq, q_out, q, q_rstds, q_weight, cos, sin, q_heads, half, lanes, q_lanes)
    _norm_turn_backward(dk, k_out, k, k_rstds, k_weight, cos, sin, k_heads, half, lanes, k_lanes)


def _adjacent(x: Tensor) -> Tensor:
    """X [B, T, heads, n] with the heads of a token one after the other; a copy if they are not."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def _blocks(q: Tensor, k: Tensor) -> dict[str, int]:
    """The constants and options of a launch."""
    lanes = triton.next_power_of_2(q.shape[3] // 2)
    most = max(1, _PAIRS // lanes)
    q_lanes, k_lanes = (min(triton.next_power_of_2(x.shape[2]), most) for x in (q, k))
    return {"lanes": lanes, "q_lanes": q_lanes, "k_lanes": k_lanes, "num_warps": _WARPS}


def qk_norm_rotary(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    q_eps: float,
    k_eps: float,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`elementwise.plain_norm_rotary` of q and of k, in one launch; neither is overwritten.

    Args:
        q: [B, T, heads, n]; tokens may be strided.
        k: Likewise, with as many heads or fewer.
        q_weight: [n], contiguous, any floating dtype.
        k_weight: Likewise.
        q_eps: Added to the mean of squares.
        k_eps: Likewise.
        cos: [1 or B, T, n], any floating dtype; both halves are equal.
        sin: Likewise.

    Returns:
        The results in the dtype of q and k, contiguous, and the reciprocal root mean squares of
        their heads, float32 [B, T, heads]: q, k, q's, k's.
    """
    q, k, cos, sin = _adjacent(q), _adjacent(k), cos.contiguous(), sin.contiguous()
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    q_rstd, k_rstd = (
        torch.empty(x.shape[:3], dtype=torch.float32, device=x.device) for x in (q, k)
    )
    batch, tokens, q_heads, size = q.shape
    if q.numel():
        with on_device(q):
            _norm_rotate[(tokens, batch)](
                q_out,
                k_out,
                q_rstd,
                k_rstd,
                q,
                k,
                q_weight,
                k_weight,
                q_eps,
                k_eps,
                cos,
                sin,
                q_heads,
                k.shape[2],
                size // 2,
                *q.stride()[:2],
                *k.stride()[:2],
                0 if cos.shape[0] == 1 else cos.stride(0),
                **_blocks(q, k),
            )
    return q_out, k_out, q_rstd, k_rstd


def qk_norm_rotary_backward(
    q_out_grad: Tensor,
    k_out_grad: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    q_rstd: Tensor,
    k_rstd: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    """`elementwise.plain_norm_rotary_backward` for q and k, in one launch and in their dtype.

    Args:
        q_out_grad: The gradient of the rotated q, [B, T, heads, n]; tokens may be strided.
        k_out_grad: Likewise.
        q: What `qk_norm_rotary` was called with, like all that follow.
        k: Likewise.
        q_weight: [n].
        k_weight: [n].
        q_rstd: What it returned, float32 [B, T, heads].
        k_rstd: Likewise.
        cos: [1 or B, T, n].
        sin: Likewise.

    Returns:
        The gradients of q and k, contiguous.
    """
    q, k, cos, sin = _adjacent(q), _adjacent(k), cos.contiguous(), sin.contiguous()
    q_out_grad, k_out_grad = _adjacent(q_out_grad), _adjacent(k_out_grad)
    dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    batch, tokens, q_heads, size = q.shape
    if q.numel():
        with on_device(q):
            _norm_rotate_backward[(tokens, batch)](
                dq,
                dk,
                q_out_grad,
                k_out_grad,
                q_rstd,
                k_rstd,
                q,
                k,
                q_weight,
                k_weight,
                cos,
                sin,
                q_heads,
                k.shape[2],
                size // 2,
                *q_out_grad.stride()[:2],
                *k_out_grad.stride()[:2],
                *q.stride()[:2],
                *k.stride()[:2],
                0 if cos.shape[0] == 1 else cos.stride(0),
                **_blocks(q, k),
            )
    return dq, dk
