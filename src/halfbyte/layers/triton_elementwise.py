"""The operations of elementwise.py in Triton: one launch and one pass over memory each.

A program of the norms and of the loss handles a row, of the rotary embedding the heads of a token,
of the gated activation a part of a row. All read in the dtype of the tensors, compute in float32
and round once, except where transformers rounds in between (`plain_rms_norm`). Rows may be strided:
q, k, v and gate, up are columns of one product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.quant.triton_blockwise import on_device


@triton.jit
def _norm(
    y,
    rstds,
    h_out,
    x,
    residual,
    weight,
    inner,
    outer_stride,
    inner_stride,
    size,
    eps,
    add: tl.constexpr,
    lanes: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, lanes)
    inside = at < size
    start = row // inner * outer_stride + row % inner * inner_stride
    h = tl.load(x + start + at, mask=inside, other=0.0).to(tl.float32)
    if add:
        h += tl.load(residual + row * size + at, mask=inside, other=0.0).to(tl.float32)
        rounded = h.to(y.dtype.element_ty)
        tl.store(h_out + row * size + at, rounded, mask=inside)
        h = rounded.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(h * h, axis=0) / size + eps)
    tl.store(rstds + row, rstd)
    normal = (h * rstd).to(y.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * size + at, (normal * w).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward(
    dx,
    dy,
    dh,
    h,
    weight,
    rstds,
    inner,
    outer_stride,
    inner_stride,
    size,
    add: tl.constexpr,
    lanes: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, lanes)
    inside = at < size
    start = row // inner * outer_stride + row % inner * inner_stride
    rstd = tl.load(rstds + row)
    x_hat = tl.load(h + start + at, mask=inside, other=0.0).to(tl.float32) * rstd
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(dy + row * size + at, mask=inside, other=0.0).to(tl.float32) * w
    result = rstd * (g - x_hat * (tl.sum(g * x_hat, axis=0) / size))
    if add:
        result += tl.load(dh + row * size + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + row * size + at, result.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _turn_heads(y, x, cos, sin, heads, half, at, lanes: tl.constexpr, head_lanes: tl.constexpr):
    for first in range(0, heads, head_lanes):
        head = first + tl.arange(0, head_lanes)
        where = head[:, None] * (2 * half) + at[None, :]
        inside = (head[:, None] < heads) & (at[None, :] < half)
        one = tl.load(x + where, mask=inside, other=0.0).to(tl.float32)
        two = tl.load(x + where + half, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + where, (one * cos - two * sin).to(y.dtype.element_ty), mask=inside)
        tl.store(y + where + half, (two * cos + one * sin).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(
    q_out,
    k_out,
    q,
    k,
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
    backward: tl.constexpr,
    lanes: tl.constexpr,
    q_lanes: tl.constexpr,
    k_lanes: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    at = tl.arange(0, lanes)
    table = batch * table_stride + token * half * 2 + at
    c = tl.load(cos + table, mask=at < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + table, mask=at < half, other=0.0).to(tl.float32)[None, :]
    if backward:
        s = -s
    q_out += batch * q_out_batch + token * q_out_token
    k_out += batch * k_out_batch + token * k_out_token
    q += batch * q_batch + token * q_token
    k += batch * k_batch + token * k_token
    _turn_heads(q_out, q, c, s, q_heads, half, at, lanes, q_lanes)
    _turn_heads(k_out, k, c, s, k_heads, half, at, lanes, k_lanes)


@triton.jit
def _gate(y, gate, up, size, gate_stride, up_stride, lanes: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * lanes + tl.arange(0, lanes)
    inside = at < size
    g = tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + at, mask=inside, other=0.0).to(tl.float32)
    result = g * tl.sigmoid(g) * u
    tl.store(y + row * size + at, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gate_backward(
    dy, gate, up, size, gate_stride, up_stride, remake: tl.constexpr, lanes: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * lanes + tl.arange(0, lanes)
    inside = at < size
    dy += row * size + at
    d = tl.load(dy, mask=inside, other=0.0).to(tl.float32)
    gate += row * gate_stride + at
    up += row * up_stride + at
    g = tl.load(gate, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(gate, (d * u * s * (1.0 + g * (1.0 - s))).to(gate.dtype.element_ty), mask=inside)
    tl.store(up, (d * g * s).to(up.dtype.element_ty), mask=inside)
    if remake:
        tl.store(dy, (g * s * u).to(dy.dtype.element_ty), mask=inside)


@triton.jit
def _cross_entropy(
    logits,
    targets,
    losses,
    size,
    softcap,
    capped: tl.constexpr,
    with_grad: tl.constexpr,
    lanes: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * size
    target = tl.load(targets + row)
    at = tl.arange(0, lanes)
    # Its exponential is 0, but it is finite: lanes beyond the row do not contribute.
    lowest = -1e30
    largest = tl.full((lanes,), lowest, tl.float32)
    total = tl.zeros((lanes,), tl.float32)
    for start in range(0, size, lanes):
        inside = start + at < size
        z = tl.load(logits + start + at, mask=inside, other=0.0).to(tl.float32)
        if capped:
            z = softcap * (2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0)
        z = tl.where(inside, z, lowest)
        larger = tl.maximum(largest, z)
        total = total * tl.exp(largest - larger) + tl.exp(z - larger)
        largest = larger
    most = tl.max(largest, axis=0)
    total = tl.sum(total * tl.exp(largest - most), axis=0)
    normaliser = most + tl.log(total)
    mine = tl.load(logits + target).to(tl.float32)
    if capped:
        mine = softcap * (2.0 * tl.sigmoid(2.0 * mine / softcap) - 1.0)
    tl.store(losses + row, normaliser - mine)
    if with_grad:
        tl.debug_barrier()  # all have read the target's logit, which is overwritten now
        for start in range(0, size, lanes):
            inside = start + at < size
            z = tl.load(logits + start + at, mask=inside, other=0.0).to(tl.float32)
            inner = 1.0
            if capped:
                z = 2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0
                inner = 1.0 - z * z
                z = softcap * z
            slope = tl.exp(z - normaliser) - tl.where(start + at == target, 1.0, 0.0)
            slope = (slope * inner).to(logits.dtype.element_ty)
            tl.store(logits + start + at, slope, mask=inside)


@triton.jit
def _look_up(out, table, ids, size, lanes: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * lanes + tl.arange(0, lanes)
    source = table + tl.load(ids + row) * size
    tl.store(out + row * size + at, tl.load(source + at, mask=at < size), mask=at < size)


def _rows(x: Tensor) -> tuple[Tensor, int, int, int, int]:
    """X with contiguous rows, their number, the inner count, and the outer and inner stride."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    size = x.shape[-1]
    rows = x.numel() // size
    if x.is_contiguous():
        return x, rows, rows, 0, size
    # [B, T, heads, n] with the heads of a token contiguous.
    heads = x.shape[-2]
    even = x.dim() == 4 and x.stride(0) == x.shape[1] * x.stride(1)
    if even and x.stride(2) == size:
        return x, rows, heads, x.stride(1), size
    return x.contiguous(), rows, rows, 0, size


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`elementwise.plain_rms_norm` as a kernel."""
    y, rstd, _ = _norm_rows(x, None, weight, eps)
    return y, rstd


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the reciprocal root mean squares, and x + residual."""
    return _norm_rows(x, residual.contiguous(), weight, eps)


def _norm_rows(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    shape = x.shape
    x, rows, inner, outer_stride, inner_stride = _rows(x)
    size = shape[-1]
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(shape[:-1], dtype=torch.float32, device=x.device)
    h = y if residual is None else torch.empty_like(y)
    lanes = triton.next_power_of_2(size)
    if rows:
        with on_device(x):
            _norm[(rows,)](
                y,
                rstd,
                h,
                x,
                y if residual is None else residual,
                weight,
                inner,
                outer_stride,
                inner_stride,
                size,
                eps,
                add=residual is not None,
                lanes=lanes,
                num_warps=min(16, max(1, lanes // 512)),
            )
    return y, rstd, h


def rms_norm_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor
) -> Tensor:
    """`elementwise.plain_rms_norm_backward` plus ``dh``, in the dtype of h."""
    shape = h.shape
    h, rows, inner, outer_stride, inner_stride = _rows(h)
    dx = torch.empty(shape, dtype=h.dtype, device=h.device)
    lanes = triton.next_power_of_2(shape[-1])
    dy = dy.contiguous()
    if rows:
        with on_device(h):
            _norm_backward[(rows,)](
                dx,
                dy,
                dy if dh is None else dh.contiguous(),
                h,
                weight,
                rstd,
                inner,
                outer_stride,
                inner_stride,
                shape[-1],
                add=dh is not None,
                lanes=lanes,
                num_warps=min(16, max(1, lanes // 512)),
            )
    return dx


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backward: bool = False
) -> tuple[Tensor, Tensor]:
    """`elementwise.plain_rotary` of q and k, each in its dtype, in one launch.

    Forward overwrites q and k if their heads are contiguous and returns new tensors otherwise;
    ``backward`` rotates in the other direction and does not modify its inputs.
    """
    q, k = (x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous() for x in (q, k))
    if backward:
        q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    else:
        q_out, k_out = q.detach(), k.detach()
    (batch, tokens, q_heads, size), k_heads = q.shape, k.shape[2]
    cos, sin = cos.contiguous(), sin.contiguous()
    lanes = triton.next_power_of_2(size // 2)
    widest = max(1, 2048 // lanes)
    if q.numel():
        with on_device(q):
            _rotate[(tokens, batch)](
                q_out,
                k_out,
                q,
                k,
                cos,
                sin,
                q_heads,
                k_heads,
                size // 2,
                *q_out.stride()[:2],
                *k_out.stride()[:2],
                *q.stride()[:2],
                *k.stride()[:2],
                0 if cos.shape[0] == 1 else cos.stride(0),
                backward=backward,
                lanes=lanes,
                q_lanes=min(triton.next_power_of_2(q_heads), widest),
                k_lanes=min(triton.next_power_of_2(k_heads), widest),
                num_warps=4,
            )
    return q_out, k_out


def _flat(x: Tensor) -> Tensor:
    """[rows, n] with contiguous rows."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`elementwise.swiglu` as a kernel."""
    g, u = _flat(gate), _flat(up)
    y = torch.empty(g.shape, dtype=g.dtype, device=g.device)
    if y.numel():
        with on_device(g):
            _gate[(g.shape[0], triton.cdiv(g.shape[1], 2048))](
                y, g, u, g.shape[1], g.stride(0), u.stride(0), lanes=2048, num_warps=8
            )
    return y.view(gate.shape)


def swiglu_backward(
    dy: Tensor, gate: Tensor, up: Tensor, *, remake: bool = False
) -> tuple[Tensor, Tensor]:
    """`elementwise.plain_swiglu_backward` in the dtype of gate and up, overwriting them.

    So the widest activations of a layer and their gradients never exist at the same time, and
    gradients of columns of one product are columns of one tensor. Rows must be contiguous.
    With ``remake``, dy, [rows, n] and contiguous, is overwritten by silu(gate) · up.
    """
    g, u = _flat(gate), _flat(up)
    if g.numel():
        with on_device(g):
            _gate_backward[(g.shape[0], triton.cdiv(g.shape[1], 2048))](
                dy if remake else dy.contiguous(),
                g,
                u,
                g.shape[1],
                g.stride(0),
                u.stride(0),
                remake=remake,
                lanes=2048,
                num_warps=8,
            )
    return gate, up


def cross_entropy_forward_backward(
    logits: Tensor, targets: Tensor, softcap: float, *, with_grad: bool
) -> Tensor:
    """Cross-entropy of rows, and its gradient in place of the logits.

    Args:
        logits: [S, V], contiguous; with ``with_grad`` it is overwritten by dL/dz.
        targets: int64 [S], column indices.
        softcap: Gemma's cap on the logits; 0 for none.
        with_grad: Whether to compute the gradient.

    Returns:
        The losses, float32 [S].
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if losses.numel():
        with on_device(logits):
            _cross_entropy[(len(logits),)](
                logits,
                targets,
                losses,
                logits.shape[1],
                softcap,
                capped=softcap != 0,
                with_grad=with_grad,
                lanes=4096,
                num_warps=8,
            )
    return losses


def look_up(table: Tensor, ids: Tensor) -> Tensor:
    """Returns rows ``ids`` int64 [...] of ``table`` [V, H], which may be pinned host memory."""
    out = torch.empty(*ids.shape, table.shape[1], dtype=table.dtype, device=ids.device)
    if out.numel():
        with on_device(out):
            _look_up[(ids.numel(), triton.cdiv(table.shape[1], 1024))](
                out, table, ids.contiguous(), table.shape[1], lanes=1024
            )
    return out
