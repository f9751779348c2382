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
from typing import Any, NamedTuple

import torch
from torch import Tensor

# 64, 128 and 256 take 8.5, 10.2 and 13.9 ms forward and backward in the case above.
QUERY_BLOCK = 64


def _bounds(length: int) -> list[tuple[int, int]]:
    return [(s, min(s + QUERY_BLOCK, length)) for s in range(0, length, QUERY_BLOCK)]


class _Scores(NamedTuple):
    """How scores become weights.

    Attributes:
        scale: Factor of q kᵀ.
        window: Keys that a query sees, itself included, or None for all before it.
        sinks: The score of each head's sink [B·G, R], float32, or None: softmax's denominator has
            it in addition, and it has no value.
    """

    scale: float
    window: int | None = None
    sinks: Tensor | None = None

    def first(self, start: int) -> int:
        """Return the first key that any query from ``start`` on sees."""
        return 0 if self.window is None else max(0, start + 1 - self.window)

    def weights(self, q: Tensor, k: Tensor, start: int, stop: int) -> Tensor:
        """Return P of queries start:stop and keys first:stop, float32 [B·G, R, queries, keys]."""
        groups, repeat, _, width = q.shape
        size, first = stop - start, self.first(start)
        rows = q[:, :, start:stop].reshape(groups, repeat * size, width)
        scores = torch.bmm(rows, k[:, first:stop].transpose(1, 2))
        scores = scores.view(groups, repeat, size, stop - first)
        # Only the last `size` keys can be in the future of a query of this block.
        future = torch.ones(size, size, dtype=torch.bool).triu_(1)
        scores[..., start - first :].masked_fill_(future, -torch.inf)
        if self.window is not None and stop - first > self.window:
            past = torch.ones(size, stop - first, dtype=torch.bool)
            scores.masked_fill_(past.tril_(start - self.window - first), -torch.inf)
        scores = scores.float().mul_(self.scale)
        if self.sinks is None:
            return torch.softmax(scores, dim=-1)
        total = torch.logsumexp(scores, -1, keepdim=True)
        return (scores - torch.logaddexp(total, self.sinks[..., None, None])).exp_()


class _CausalAttention(torch.autograd.Function):
    """Takes q [B·G, R, T, D] and k, v [B·G, T, D], contiguous; returns o like q."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, of: _Scores) -> Tensor:
        groups, repeat, length, width = q.shape
        out = torch.empty_like(q)
        for start, stop in _bounds(length):
            weights = of.weights(q, k, start, stop).to(q.dtype).flatten(1, 2)
            mixed = torch.bmm(weights, v[:, of.first(start) : stop])
            out[:, :, start:stop] = mixed.view(groups, repeat, stop - start, width)
        ctx.save_for_backward(q, k, v, out)
        ctx.of = of
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        (d_out,) = grad_outputs
        of: _Scores = ctx.of
        groups, repeat, length, width = q.shape
        dq = torch.empty_like(q)
        dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        delta = (d_out.float() * out.float()).sum(-1, keepdim=True)
        for start, stop in _bounds(length):
            size, keys = stop - start, slice(of.first(start), stop)
            weights = of.weights(q, k, start, stop)
            d_rows = d_out[:, :, start:stop].reshape(groups, repeat * size, width)
            packed = weights.to(q.dtype).flatten(1, 2)
            dv[:, keys] += torch.bmm(packed.transpose(1, 2), d_rows)
            d_weights = torch.bmm(d_rows, v[:, keys].transpose(1, 2)).view_as(weights)
            d_scores = d_weights.sub(delta[:, :, start:stop]).mul_(weights).mul_(of.scale)
            d_scores = d_scores.to(q.dtype).flatten(1, 2)
            dq[:, :, start:stop] = torch.bmm(d_scores, k[:, keys]).view(
                d_out[:, :, start:stop].shape
            )
            rows = q[:, :, start:stop].reshape(groups, repeat * size, width)
            dk[:, keys] += torch.bmm(d_scores.transpose(1, 2), rows)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    lengths: Sequence[int] = (),
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return softmax(scale · q kᵀ, causal) v.

    Args:
        q: [B, H, T, D].
        k: [B, G, T, D], G a divisor of H; head h belongs to group h // (H / G).
        v: [B, G, T, D].
        scale: Factor of the scores.
        lengths: If documents are packed into rows, the tokens of each: each attends to itself.
        window: Keys that a query sees, itself included, or None for all before it.
        sinks: [H], not trained: each head's score of a sink, which has no value (gpt-oss).

    Returns:
        [B, H, T, D] in the dtype of ``q``.
    """
    if len(lengths) > 1:
        documents = zip(*(torch.split(x, list(lengths), 2) for x in (q, k, v)), strict=True)
        outs = [
            causal_attention(*one, scale=scale, window=window, sinks=sinks) for one in documents
        ]
        return torch.cat(outs, 2)
    batch, heads, length, width = q.shape
    groups = k.shape[1]
    folded = q.reshape(batch * groups, heads // groups, length, width).contiguous()
    keys = k.reshape(batch * groups, length, width).contiguous()
    values = v.reshape(batch * groups, length, width).contiguous()
    if sinks is not None:
        sinks = sinks.detach().float().view(groups, -1).repeat(batch, 1)
    of = _Scores(scale, window, sinks)
    out: Tensor = _CausalAttention.apply(folded, keys, values, of)  # type: ignore[no-untyped-call]
    return out.view(batch, heads, length, width)
