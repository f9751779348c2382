"""Flash attention with windows, sinks and packed documents, by torch's own kernels on a GPU.

torch's flash attention (Dao 2023) takes sliding windows and documents, but no sinks: an additional
score in the softmax's denominator, per head and without a value (gpt-oss). They need no other
kernel. With ℓ = log Σ exp(scores) of a query, and its head's sink s,

    ℓ' = log(exp ℓ + exp s)          o' = o · exp(ℓ − ℓ')

are the log-sum-exp and the output with the sink. Flash attention's backward computes P as
exp(scores − ℓ) from what it is given, and Δ as rowsum(dO ∘ o): given ℓ' and o', it returns the
gradients with the sink, since the sink's value is 0. Sinks themselves are not trained.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from halfbyte.layers.attention import Documents
from halfbyte.layers.attention_cpu import causal_attention
from halfbyte.runtime import device as devices


def runs(q: Tensor) -> bool:
    """Return whether `flash_attention` takes queries like these."""
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] % 8 == 0
        and devices.spec_of(q.device).runs_flash_attention(q.shape[-1])
    )


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    documents: Documents | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return softmax(scale · q kᵀ, causal, within documents and windows) v, [B, T, H, D].

    Args:
        q: [B, T, H, D], see `runs`.
        k: [B, T, G, D], G a divisor of H.
        v: Like k.
        scale: Factor of the scores.
        documents: None, or the documents packed into the only row (B = 1).
        window: Keys that a query sees, itself included, or None for all before it.
        sinks: [H], not trained: the score of each head's sink.
    """
    return _FlashAttention.apply(q, k, v, scale, documents, window, sinks)  # type: ignore[no-any-return, no-untyped-call]


def attend_with_sinks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents | None,
    scale: float,
    window: int | None,
    sinks: Tensor,
) -> Tensor:
    """Return `flash_attention`, [B, T, H · D], on any device and in any dtype.

    Without flash attention, the weights of all queries and keys of a document exist at once on a
    GPU.
    """
    if runs(q):
        out = flash_attention(q, k, v, scale=scale, documents=documents, window=window, sinks=sinks)
        return out.flatten(2)
    if documents is not None:
        bounds = pairwise(documents.cu_seqlens.tolist())
        outs = []
        for start, stop in bounds:
            if start < stop:
                one, two, three = (x[:, start:stop] for x in (q, k, v))
                outs.append(attend_with_sinks(one, two, three, None, scale, window, sinks))
        return torch.cat(outs, 1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.is_cuda:
        out = _with_all_weights(q, k, v, scale, window, sinks)
    else:
        out = causal_attention(q, k, v, scale=scale, window=window, sinks=sinks)
    return out.transpose(1, 2).flatten(2)


def _with_all_weights(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, sinks: Tensor
) -> Tensor:
    """Return the formula's [B, H, T, D] for q [B, H, T, D]."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    unseen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu_(1)
    if window is not None:
        unseen |= torch.ones_like(unseen).tril_(-window)
    scores = (scale * (q @ k.mT)).masked_fill(unseen, -torch.inf)
    total = torch.logaddexp(scores.logsumexp(-1, keepdim=True), sinks.detach()[:, None, None])
    return torch.exp(scores - total).to(v.dtype) @ v


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        documents: Documents | None,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        batch, length = q.shape[:2]
        ctx.shapes = [x.shape for x in (q, k, v)]
        if documents is None:  # each row is one
            ends = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * length
            documents = Documents(ends, length)
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        starts, longest, _ = documents
        options: dict[str, Any] = {"scale": scale}
        if window is not None:
            options |= {"window_size_left": window - 1, "window_size_right": 0}
        out, total, rng, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, starts, starts, longest, longest, 0.0, window is None, False, **options
        )
        if sinks is not None:
            with_sink = torch.logaddexp(total, sinks.detach().float()[:, None])  # [H, T]
            factor = (total - with_sink).exp_().t()[..., None]
            out, total = (out * factor).to(out.dtype), with_sink
        ctx.save_for_backward(q, k, v, out, total, starts, rng, unused)
        ctx.longest, ctx.causal, ctx.options = longest, window is None, options
        result: Tensor = out.view(ctx.shapes[0])
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, total, starts, rng, unused = ctx.saved_tensors
        dy, n = grads[0].reshape(out.shape).contiguous(), ctx.longest
        found = torch.ops.aten._flash_attention_backward(
            *(dy, q, k, v, out, total, starts, starts, n, n, 0.0, ctx.causal, rng, unused),
            **ctx.options,
        )
        dq, dk, dv = (x.view(shape) for x, shape in zip(found, ctx.shapes, strict=True))
        return dq, dk, dv, None, None, None, None
