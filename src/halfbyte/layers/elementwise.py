"""The elementwise operations of a decoder layer: norms, rotary embeddings, gated activations.

All are bound by memory bandwidth: each reads and writes all activations, several times if composed
of plain operations. Here each is one operation, forward and backward, in float32 internally:

    add_rms_norm    h = x + r, y = norm(h) · w        dh = dnorm(dy) + gradient of h
    rms_norm        y = norm(x) · w                   (Zhang and Sennrich 2019)
    rms_norm_beside the same, and x: the gradient of x is added in the same pass
    rotary          pairs of q and k rotated by their position, in place (Su et al. 2021)
    qk_norm_rotary  rotary(norm(q) · w, norm(k) · w'), of each head (Qwen 3)
    swiglu          silu(g) · u                       (Shazeer 2020), dg and du overwrite g, u

Weights of norms are frozen, so they get no gradient. On a GPU each direction is one Triton kernel
(triton_elementwise.py, triton_qk_norm.py); the functions named ``plain_*`` are the specification,
and run elsewhere.
"""

from typing import Any

import torch
from torch import Tensor

from halfbyte.quant.format import gpu_kernels


def _kernels(tensor: Tensor) -> Any:
    """The Triton kernels, or None if the plain versions run."""
    if not tensor.is_cuda or gpu_kernels() is None:
        return None
    from halfbyte.layers import triton_elementwise

    return triton_elementwise


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return y [..., n] and the reciprocal root mean squares, float32 [...]."""
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1) + eps)
    # transformers rounds before multiplying with the weight.
    return (wide * rstd[..., None]).to(x.dtype) * weight, rstd


def plain_rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """Return dx, float32 [..., n]."""
    g = dy.float() * weight.float()
    x_hat = x.float() * rstd[..., None]
    return rstd[..., None] * (g - x_hat * (g * x_hat).mean(-1, keepdim=True))


def plain_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [B, T, heads, n] rotated by cos, sin [1 or B, T, n], float32; halves are pairs."""
    first, second = x.float().chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return x.float() * cos[:, :, None].float() + turned * sin[:, :, None].float()


def plain_norm_rotary(
    x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the rotated norm of x [B, T, heads, n], and the reciprocal root mean squares."""
    y, rstd = plain_rms_norm(x, weight, eps)
    return plain_rotary(y, cos, sin).to(y.dtype), rstd


def plain_norm_rotary_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """Return dx, in the dtype of x."""
    dy = plain_rotary(dy, cos, -sin).to(dy.dtype)
    return plain_rms_norm_backward(dy, x, weight, rstd).to(x.dtype)


def plain_swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return dgate and dup, float32."""
    g, sigmoid = gate.float(), torch.sigmoid(gate.float())
    d_up = dy.float() * g * sigmoid
    return dy.float() * up.float() * sigmoid * (1 + g * (1 - sigmoid)), d_up


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        kernels = _kernels(x)
        y, rstd = (kernels.rms_norm if kernels else plain_rms_norm)(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        kernels = _kernels(x)
        if kernels:
            return kernels.rms_norm_backward(grads[0], None, x, weight, rstd), None, None
        return plain_rms_norm_backward(grads[0], x, weight, rstd).to(x.dtype), None, None


class _RMSNormBeside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        kernels = _kernels(x)
        y, rstd = (kernels.rms_norm if kernels else plain_rms_norm)(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _norm_and_sum_backward(*grads, *ctx.saved_tensors), None, None


def _norm_and_sum_backward(
    dy: Tensor, dh: Tensor, h: Tensor, weight: Tensor, rstd: Tensor
) -> Tensor:
    """Return the gradient of h: through its norm plus directly."""
    kernels = _kernels(h)
    if kernels:
        result: Tensor = kernels.rms_norm_backward(dy, dh, h, weight, rstd)
        return result
    return (plain_rms_norm_backward(dy, h, weight, rstd) + dh.float()).to(h.dtype)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, known: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        kernels = _kernels(x)
        if known is not None:
            h = known.view_as(known)
            y, rstd = (kernels.rms_norm if kernels else plain_rms_norm)(h, weight, eps)
        elif kernels:
            y, rstd, h = kernels.add_rms_norm(x, residual, weight, eps)
        else:
            h = x + residual
            y, rstd = plain_rms_norm(h, weight, eps)
        ctx.save_for_backward(h, weight, rstd)
        return y, h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dh = _norm_and_sum_backward(*grads, *ctx.saved_tensors)
        return dh, dh, None, None, None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        kernels = _kernels(q)
        if kernels:
            q_out, k_out = kernels.rotary(q, k, cos, sin)
            return q_out, k_out
        return plain_rotary(q, cos, sin).to(q.dtype), plain_rotary(k, cos, sin).to(k.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        dq, dk = grads
        kernels = _kernels(dq)
        if kernels:
            return *kernels.rotary(dq, dk, cos, sin, backward=True), None, None
        dq, dk = (plain_rotary(d, cos, -sin).to(d.dtype) for d in (dq, dk))
        return dq, dk, None, None


class _QKNormRotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        q_eps: float,
        k_eps: float,
        cos: Tensor,
        sin: Tensor,
    ) -> tuple[Tensor, Tensor]:
        if _kernels(q):
            from halfbyte.layers import triton_qk_norm

            q_out, k_out, q_rstd, k_rstd = triton_qk_norm.qk_norm_rotary(
                q, k, q_weight, k_weight, q_eps, k_eps, cos, sin
            )
        else:
            q_out, q_rstd = plain_norm_rotary(q, q_weight, q_eps, cos, sin)
            k_out, k_rstd = plain_norm_rotary(k, k_weight, k_eps, cos, sin)
        ctx.save_for_backward(q, k, q_weight, k_weight, q_rstd, k_rstd, cos, sin)
        return q_out, k_out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, q_weight, k_weight, q_rstd, k_rstd, cos, sin = ctx.saved_tensors
        if _kernels(q):
            from halfbyte.layers import triton_qk_norm

            dq, dk = triton_qk_norm.qk_norm_rotary_backward(*grads, *ctx.saved_tensors)
        else:
            dq = plain_norm_rotary_backward(grads[0], q, q_weight, q_rstd, cos, sin)
            dk = plain_norm_rotary_backward(grads[1], k, k_weight, k_rstd, cos, sin)
        return dq, dk, None, None, None, None, None, None


class _UnreadSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return x.new_zeros(1).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], grads[0]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        kernels = _kernels(gate)
        if kernels:
            gate, up = (x if x.stride(-1) == 1 else x.contiguous() for x in (gate, up))
        ctx.written = False
        ctx.save_for_backward(gate, up)
        if kernels:
            result: Tensor = kernels.swiglu(gate, up)
            return result
        g = gate.float()
        return (g * torch.sigmoid(g) * up.float()).to(gate.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        kernels = _kernels(gate)
        if kernels:
            if ctx.written:
                raise RuntimeError("backward of swiglu overwrites gate and up: it runs once")
            ctx.written = True
            d_gate, d_up = kernels.swiglu_backward(grads[0], gate, up)
            return d_gate, d_up
        d_gate, d_up = plain_swiglu_backward(grads[0], gate, up)
        return d_gate.to(gate.dtype), d_up.to(up.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / √(mean(x²) + eps), rounded to the dtype of x, times ``weight`` [n].

    Args:
        x: [..., n], any floating dtype; statistics are float32.
        weight: [n], frozen.
        eps: Added to the mean of squares.
    """
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return, no-untyped-call]


def rms_norm_beside(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `rms_norm` of x, and x for uses of it other than the norm."""
    return _RMSNormBeside.apply(x, weight, eps)  # type: ignore[no-any-return, no-untyped-call]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, known: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``rms_norm(x + residual)`` and the sum, both [..., n]; see `rms_norm`.

    Args:
        x: [..., n].
        residual: Likewise.
        weight: [n], frozen.
        eps: Added to the mean of squares.
        known: The sum, if it has been kept; x and residual are not read then.
    """
    return _AddRMSNorm.apply(x, residual, weight, eps, known)  # type: ignore[no-any-return, no-untyped-call]


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return q and k rotated by their positions.

    On a GPU they are overwritten: q, k and v are columns of one product, which v keeps alive, and
    the original q and k are not read again.

    Args:
        q: [B, T, heads, n]; element i and i + n/2 are a pair. Tokens may be strided, as in columns
            of one product.
        k: Likewise, with as many heads or fewer.
        cos: [1 or B, T, n], as returned by transformers' rotary embeddings: both halves are equal.
        sin: Likewise.

    Returns:
        Tensors of the shapes of q and k.
    """
    return _Rotary.apply(q, k, cos, sin)  # type: ignore[no-any-return, no-untyped-call]


def qk_norm_rotary(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    q_eps: float,
    k_eps: float,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return `rotary` of q and k, each head of which is first normed as by `rms_norm`.

    For backward, q and k are kept as they are given, with a float32 for each of their heads. On a
    GPU what is between the two operations is not rounded.

    Args:
        q: [B, T, heads, n]. Tokens may be strided, as in columns of one product.
        k: Likewise, with as many heads or fewer.
        q_weight: Of the norm of q's heads, [n], frozen.
        k_weight: Likewise of k's.
        q_eps: Added to the mean of squares of q's heads.
        k_eps: Likewise of k's.
        cos: [1 or B, T, n]; see `rotary`.
        sin: Likewise.

    Returns:
        Tensors of the shapes of q and k.
    """
    return _QKNormRotary.apply(q, k, q_weight, k_weight, q_eps, k_eps, cos, sin)  # type: ignore[no-any-return, no-untyped-call]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) · up, [..., n] like both, rounded once.

    On a GPU backward overwrites both, so they must not be used elsewhere, and cannot run twice.
    """
    return _SwiGLU.apply(gate, up)  # type: ignore[no-any-return, no-untyped-call]


def unread_sum(x: Tensor, y: Tensor) -> Tensor:
    """Return a placeholder for x + y whose values are not read, with the backward of the sum."""
    return _UnreadSum.apply(x, y)  # type: ignore[no-any-return, no-untyped-call]
