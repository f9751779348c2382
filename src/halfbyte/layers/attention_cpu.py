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

It is registered with transformers' ``AttentionInterface`` under the name ``halfbyte``. Everything
but plain causal attention without a mask is passed to transformers' own ``sdpa``.

Within `packed_row`, the only row of a batch holds several documents, each of which attends to
itself. transformers would describe them by a mask of T² elements; here attention is computed one
document after the other. Padding documents to a common number of blocks, to have fewer products,
took longer: 60 to 77 ms instead of 37 to 65 for eight documents of 47 to 1024 tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from inspect import getsource
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "halfbyte"


class NotPackable(Exception):
    """A model's attention cannot be restricted to documents; the message says why."""


@dataclass
class PackedRow:
    """The documents of a packed row, and what its decoder asked of attention.

    Attributes:
        lengths: The tokens of each document, in order.
        calls: How often attention was computed.
        window: The smallest window of a mask (sliding or chunked attention), if any.
    """

    lengths: tuple[int, ...]
    calls: int = 0
    window: int | None = None


# The row that is passed through a decoder or a layer; not an argument, since few architectures pass
# theirs on to attention.
_row: PackedRow | None = None


@contextmanager
def packed_row(lengths: Sequence[int]) -> Iterator[PackedRow]:
    """Restrict attention to documents while the context lasts.

    If another is entered within it, what is asked of attention there counts here as well.

    Args:
        lengths: The tokens of each document in the only row of the batch.

    Raises:
        NotPackable: Inside, if the model does not use plain causal attention, or a document is
            longer than its attention window.
    """
    global _row
    before, row = _row, PackedRow(tuple(lengths))
    _row = row
    try:
        yield row
    finally:
        _row = before
        if before is not None:
            before.calls += row.calls
            windows = [n for n in (before.window, row.window) if n is not None]
            before.window = min(windows, default=None)


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


def _interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = attention_mask is None and causal and not dropout
    plain = plain and not any(value is not None for key, value in kwargs.items() if key in _UNUSUAL)
    shaped = query.shape[2] == key.shape[2] > 1 and query.shape[-1] == value.shape[-1]
    if _row is not None:
        _row.calls += 1
        if not plain or not shaped or query.device.type != "cpu":
            raise NotPackable("its attention is not plain causal attention")
        if query.shape[0] != 1 or query.shape[2] != sum(_row.lengths):
            raise NotPackable("its attention sees other tokens than its layers")
    if plain and shaped and query.device.type == "cpu":
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        lengths = () if _row is None else _row.lengths
        out = causal_attention(query, key, value, scale=scale, lengths=lengths)
        return out.transpose(1, 2).contiguous(), None
    result: tuple[Tensor, None] = sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **kwargs,
    )
    return result


# Arguments of some architectures' attention that change the result.
_UNUSUAL = ("softcap", "s_aux", "position_bias", "cache", "output_attentions")


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Return the mask for `_interface`: in a packed row none, as documents are known."""
    if _row is None:
        result: Tensor | None = sdpa_mask(*args, **kwargs)
        return result
    window = kwargs.get("local_size")
    if kwargs.get("use_vmap"):
        raise NotPackable("its attention has a mask of its own")
    if window is not None:
        _row.window = window if _row.window is None else min(window, _row.window)
        if max(_row.lengths) > window:
            raise NotPackable(f"a document is longer than its attention window of {window} tokens")
    return None


def masks_for_sdpa_alone(model: nn.Module) -> bool:
    """Return whether a model's own code adds to the mask only if attention is transformers' own.

    Sparse attention does (DeepSeek V3.2 and those after it): the tokens that its indexer has not
    selected are masked for attention named ``eager`` or ``sdpa``. With another name, it would be
    dense.
    """
    return any(_names_sdpa(type(module)) for module in model.modules())  # type: ignore[arg-type]


@cache  # reading the source of a class takes milliseconds, and a model is looked at several times
def _names_sdpa(kind: type[nn.Module]) -> bool:
    return kind.__module__.startswith("transformers.models.") and (
        '_attn_implementation in ("eager", "sdpa")' in getsource(kind)
    )


def register() -> str:
    """Register the attention with transformers; returns its name."""
    AttentionInterface.register(NAME, _interface)
    AttentionMaskInterface.register(NAME, _mask)
    return NAME
