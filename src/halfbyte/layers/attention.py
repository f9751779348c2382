"""Causal attention for training, with several documents packed into a row (varlen).

Examples differ in length. A batch of them needs padding; packed into a single row they need none if
attention is restricted to each of them. `Documents` holds their boundaries, which `attend`
respects:

    no documents    each row of the batch is a document: torch's attention, ours on a CPU
    documents       torch's variable-length attention on a GPU; otherwise one at a time

Variable-length attention is flash attention, which requires Ampere. A Turing GPU has torch's
memory-efficient attention. It needs as many heads of keys and values as of queries, so these are
copied: with grouped heads, torch would select a kernel that materialises all weights, which takes
T² memory for T tokens.
"""

from collections.abc import Callable
from functools import cache
from inspect import signature
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.layers.attention_cpu import causal_attention
from halfbyte.runtime import device as devices


class Documents(NamedTuple):
    """Documents packed into the only row of a batch (varlen).

    Attributes:
        cu_seqlens: int32 [documents + 1], the start of each and the end of the last, which is the
            length of the row. A document may be empty.
        max_seqlen: Upper bound on the tokens of a document.
        lengths: The tokens of each, if the host knows them; not where passes are captured as CUDA
            graphs, which are replayed for other documents.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    lengths: tuple[int, ...] = ()


@cache
def _over_sequences() -> tuple[Callable[..., Any], dict[str, Any]] | None:
    """Torch's variable-length attention and the arguments to make it causal; since 2.10."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    names = signature(varlen_attn).parameters
    options: dict[str, Any] = {}
    if "window_size" in names:
        options["window_size"] = (-1, 0)
    else:
        options["is_causal"] = True
    return varlen_attn, options


def can_pack(dtype: torch.dtype, device: torch.device, head_dim: int) -> bool:
    """Return whether `attend` processes packed documents in one call, not one at a time."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and devices.spec_of(device).runs_flash_attention(head_dim)
        and _over_sequences() is not None
    )


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, scale: float) -> Tensor:
    """Return softmax(scale · q kᵀ, causal, within documents) v.

    Args:
        q: [B, T, H, D].
        k: [B, T, G, D], G a divisor of H.
        v: Like k.
        documents: None, or the documents packed into the only row (B = 1).
        scale: Factor of the scores.

    Returns:
        [B, T, H · D].
    """
    if documents is not None:
        out = _within(q[0], k[0], v[0], documents, scale)[None]
    elif q.is_cuda:
        if not devices.spec_of(q.device).runs_flash_attention(q.shape[-1]):
            k, v = (for_each_head(x, q.shape[2]) for x in (k, v))
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
        ).transpose(1, 2)
    else:
        heads = [x.transpose(1, 2) for x in (q, k, v)]
        out = causal_attention(heads[0], heads[1], heads[2], scale=scale).transpose(1, 2)
    return out.flatten(2)


def for_each_head(x: Tensor, heads: int) -> Tensor:
    """Return [B, T, heads, D] for x [B, T, G, D], repeated for the query heads of each group."""
    groups = x.shape[2]
    if groups == heads:
        return x
    return x[:, :, :, None].expand(-1, -1, -1, heads // groups, -1).flatten(2, 3)


def _within(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float) -> Tensor:
    """Return [T, H, D] for q [T, H, D] and k, v [T, G, D]."""
    cu_seqlens, max_seqlen, _ = documents
    known = _over_sequences()
    if can_pack(q.dtype, q.device, q.shape[-1]) and known is not None:
        function, options = known
        if q.shape[1] != k.shape[1] and "enable_gqa" in signature(function).parameters:
            options = options | {"enable_gqa": True}
        if "scale" in signature(function).parameters:
            options = options | {"scale": scale}
        elif scale != q.shape[-1] ** -0.5:
            q = q * (scale * q.shape[-1] ** 0.5)
        result: Tensor = function(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options
        )
        return result
    bounds = cu_seqlens.tolist()
    parts = []
    for start, stop in pairwise(bounds):
        if start < stop:
            one, two, three = (x[None, start:stop] for x in (q, k, v))
            out = attend(one, two, three, None, scale)
            parts.append(out.view(stop - start, *q.shape[1:]))
    return torch.cat(parts)


def copy_heads(to: Tensor, x: Tensor) -> None:
    """Copy x to ``to``, both [..., n], in elements of 16 bytes if sizes and places allow it.

    Heads side by side are strided, and torch copies such tensors element by element: a third of the
    speed with elements of two bytes.
    """
    wide = torch.complex128
    each = wide.itemsize // to.element_size()

    def fits(t: Tensor) -> bool:
        steps = [*t.stride()[:-1], t.shape[-1], t.storage_offset()]
        return t.stride(-1) == 1 and all(step % each == 0 for step in steps)

    if to.dtype == x.dtype and fits(to) and fits(x):
        to, x = to.view(wide), x.view(wide)
    to.copy_(x)
