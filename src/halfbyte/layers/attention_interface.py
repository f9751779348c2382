"""The attention of transformers' modules: ours where it is plain causal attention.

It is registered with transformers' ``AttentionInterface`` under the name ``halfbyte``. Plain causal
attention without a mask is ours on a CPU (layers/attention_cpu.py); everything else is passed to
transformers' own ``sdpa``.

Within a packed row (layers/packed_row.py), every document attends to itself. transformers would
describe documents by a mask of T² elements; here attention is computed

    on a CPU     one document after the other. Padding documents to a common number of blocks, to
                 have fewer products, took longer: 60 to 77 ms instead of 37 to 65 for eight
                 documents of 47 to 1024 tokens
    on a GPU     by torch's variable-length attention (layers/attention.py), else likewise

Heads whose keys and values differ in width (latent attention) are passed to ``sdpa`` one document
at a time. What is not plain causal attention is an error.
"""

from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from halfbyte.layers.attention import Documents, attend
from halfbyte.layers.attention_cpu import causal_attention
from halfbyte.layers.packed_row import NotPackable, PackedRow, current_row

NAME = "halfbyte"

# Arguments of some architectures' attention that change the result.
_UNUSUAL = ("softcap", "s_aux", "position_bias", "cache", "output_attentions")


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
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if (row := current_row()) is not None:
        row.attention_calls += 1
        if not plain:
            raise NotPackable("its attention is not plain causal attention")
        total = sum(row.lengths)
        if query.shape[0] != 1 or query.shape[2] != total or key.shape[2] != total:
            raise NotPackable("its attention sees other tokens than its layers")
        if shaped:
            return _within(query, key, value, row, scale), None
        split = (torch.split(x, list(row.lengths), 2) for x in (query, key, value))
        outs = [
            sdpa_attention_forward(module, *one, None, scaling=scaling, is_causal=True)[0]
            for one in zip(*split, strict=True)
        ]
        return torch.cat(outs, 1), None
    if plain and shaped and query.device.type == "cpu":
        out = causal_attention(query, key, value, scale=scale)
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


def _within(query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scale: float) -> Tensor:
    """Return [1, T, H, D] for q [1, H, T, D] and k, v [1, G, T, D]."""
    if query.device.type == "cpu":
        out = causal_attention(query, key, value, scale=scale, lengths=row.lengths)
        return out.transpose(1, 2).contiguous()
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    documents = Documents(_cu_seqlens(row.lengths, query.device), max(row.lengths))
    return attend(q, k, v, documents, scale).view(q.shape)


@lru_cache(maxsize=8)
def _cu_seqlens(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return `Documents.cu_seqlens`; all layers of a part ask for the same."""
    return torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32, device=device)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Return the mask for `_interface`: in a packed row none, as documents are known."""
    if (row := current_row()) is None:
        result: Tensor | None = sdpa_mask(*args, **kwargs)
        return result
    window = kwargs.get("local_size")
    if kwargs.get("use_vmap"):
        raise NotPackable("its attention has a mask of its own")
    if window is not None:
        row.window = window if row.window is None else min(window, row.window)
        if max(row.lengths) > window:
            raise NotPackable(f"a document is longer than its attention window of {window} tokens")
    return None


def register() -> str:
    """Register the attention with transformers; returns its name."""
    AttentionInterface.register(NAME, _interface)
    AttentionMaskInterface.register(NAME, _mask)
    return NAME
