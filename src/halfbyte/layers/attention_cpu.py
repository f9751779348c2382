"""Causal attention on a CPU, in blocks of queries, for training.

For queries q [B, H, T, D] and grouped keys and values k, v [B, G, T, D] (H / G queries per group):

    S = scale · q kᵀ, causally masked                   P = softmax(S)        o = P v
    backward, with Δ = rowsum(dO ∘ o):  dv = Pᵀ dO     dS = P ∘ (dO vᵀ − Δ)
                                        dq = scale · dS k     dk = scale · dSᵀ q

torch's CPU flash attention does not use the bfloat16 matrix instructions of the processor: at
4x9x256x64, 3 groups, it takes 6.8 ms forward and 14.5 ms backward on one core in bfloat16. These
batched products take 2.3 and 6.2 ms (float32: 4.9 and 12.6, against 6.2 and 15.0), because the
instructions are used and because a block of queries is multiplied only with the keys before its
end. As in flash attention (Dao et al. 2022), P is not kept: backward recomputes it from q and k, so
saved memory grows with T, not with T².

The queries of a group share keys, so they are the rows of one product and keys are never copied.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# 64, 128 and 256 take 8.5, 10.2 and 13.9 ms forward and backward in the case above.
QUERY_BLOCK = 64


def _bounds(length: int) -> list[tuple[int, int]]:
    return [(s, min(s + QUERY_BLOCK, length)) for s in range(0, length, QUERY_BLOCK)]


def _weights(q: Tensor, k: Tensor, start: int, stop: int, scale: float) -> Tensor:
    """Return P for queries start:stop, float32 [B·G, R, stop − start, stop]."""
    groups, repeat, _, width = q.shape
    size = stop - start
    rows = q[:, :, start:stop].reshape(groups, repeat * size, width)
    scores = torch.bmm(rows, k[:, :stop].transpose(1, 2)).view(groups, repeat, size, stop)
    # Only the last `size` keys can be in the future of a query of this block.
    future = torch.ones(size, size, dtype=torch.bool).triu_(1)
    scores[..., start:].masked_fill_(future, -torch.inf)
    return torch.softmax(scores.float().mul_(scale), dim=-1)


class _CausalAttention(torch.autograd.Function):
    """Takes q [B·G, R, T, D] and k, v [B·G, T, D], contiguous; returns o like q."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        groups, repeat, length, width = q.shape
        out = torch.empty_like(q)
        for start, stop in _bounds(length):
            weights = _weights(q, k, start, stop, scale).to(q.dtype).flatten(1, 2)
            mixed = torch.bmm(weights, v[:, :stop])
            out[:, :, start:stop] = mixed.view(groups, repeat, stop - start, width)
        ctx.save_for_backward(q, k, v, out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        (d_out,) = grad_outputs
        groups, repeat, length, width = q.shape
        dq = torch.empty_like(q)
        dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        delta = (d_out.float() * out.float()).sum(-1, keepdim=True)
        for start, stop in _bounds(length):
            size = stop - start
            weights = _weights(q, k, start, stop, ctx.scale)
            d_rows = d_out[:, :, start:stop].reshape(groups, repeat * size, width)
            packed = weights.to(q.dtype).flatten(1, 2)
            dv[:, :stop] += torch.bmm(packed.transpose(1, 2), d_rows)
            d_weights = torch.bmm(d_rows, v[:, :stop].transpose(1, 2)).view_as(weights)
            d_scores = d_weights.sub(delta[:, :, start:stop]).mul_(weights).mul_(ctx.scale)
            d_scores = d_scores.to(q.dtype).flatten(1, 2)
            dq[:, :, start:stop] = torch.bmm(d_scores, k[:, :stop]).view(
                d_out[:, :, start:stop].shape
            )
            rows = q[:, :, start:stop].reshape(groups, repeat * size, width)
            dk[:, :stop] += torch.bmm(d_scores.transpose(1, 2), rows)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, lengths: Sequence[int] = ()
) -> Tensor:
    """Return softmax(scale · q kᵀ, causal) v.

    Args:
        q: [B, H, T, D].
        k: [B, G, T, D], G a divisor of H; head h belongs to group h // (H / G).
        v: [B, G, T, D].
        scale: Factor of the scores.
        lengths: If documents are packed into rows, the tokens of each: each attends to itself.

    Returns:
        [B, H, T, D] in the dtype of ``q``.
    """
    if len(lengths) > 1:
        documents = zip(*(torch.split(x, list(lengths), 2) for x in (q, k, v)), strict=True)
        return torch.cat([causal_attention(*one, scale=scale) for one in documents], 2)
    batch, heads, length, width = q.shape
    groups = k.shape[1]
    folded = q.reshape(batch * groups, heads // groups, length, width).contiguous()
    keys = k.reshape(batch * groups, length, width).contiguous()
    values = v.reshape(batch * groups, length, width).contiguous()
    out: Tensor = _CausalAttention.apply(folded, keys, values, scale)  # type: ignore[no-untyped-call]
    return out.view(batch, heads, length, width)
