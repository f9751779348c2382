"""The attention of transformers' modules: ours where it is causal attention.

It is registered with transformers' ``AttentionInterface`` under the name ``halfbyte``. Causal
attention, also in a sliding window and with sinks, is ours on a CPU (layers/attention_cpu.py) and,
where torch's ``sdpa`` would need a mask of T² elements, on a GPU (layers/flash_attention.py).
Everything else is passed to transformers' own ``sdpa``, or ``eager`` with sinks.

Within a packed row (layers/packed_row.py), every document attends to itself. transformers would
describe documents by a mask of T² elements; here attention is computed

    on a CPU     one document after the other. Padding documents to a common number of blocks, to
                 have fewer products, took longer: 60 to 77 ms instead of 37 to 65 for eight
                 documents of 47 to 1024 tokens
    on a GPU     by torch's variable-length attention (layers/attention.py), else one by one

Heads whose keys and values differ in width (latent attention) are passed to ``sdpa`` one document
at a time. What is not causal attention is an error there.

Modules pass the mask that transformers made on to attention. The mask of a sliding window is a
description: a tensor without memory that knows its window (`_WINDOW`).
"""

import sys
from functools import cache, lru_cache
from inspect import getsource
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from halfbyte.layers import flash_attention
from halfbyte.layers.attention import Documents, attend
from halfbyte.layers.attention_cpu import causal_attention
from halfbyte.layers.packed_row import NotPackable, PackedRow, current_row

NAME = "halfbyte"

# Arguments of some architectures' attention that change the result.
_UNUSUAL = ("softcap", "position_bias", "cache", "output_attentions")

# Families whose attention has sinks, for which transformers has no sdpa.
_WITH_SINKS = {"flint", "gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash"}

_WINDOW = "halfbyte_window"


def use(decoder: PreTrainedModel) -> None:
    """Have a decoder use our attention, if ours is correct for it.

    If transformers would not choose sdpa (ALiBi, capped scores), ours is not correct either, except
    for known families with sinks.
    """
    config = decoder.config
    if config._attn_implementation == "sdpa" and not masks_for_sdpa_alone(decoder):
        decoder.set_attn_implementation(NAME)
    elif config.model_type in _WITH_SINKS:
        # Set as transformers would: it refuses what a family does not declare.
        config._attn_implementation = NAME


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
    window: int | None = getattr(attention_mask, _WINDOW, None)
    sinks: Tensor | None = kwargs.get("s_aux")
    plain = (attention_mask is None or window is not None) and causal and not dropout
    plain = plain and not any(value is not None for key, value in kwargs.items() if key in _UNUSUAL)
    plain = plain and not (sinks is not None and sinks.requires_grad)
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
            return _within(query, key, value, row, scale, window, sinks), None
        if sinks is not None or (window is not None and max(row.lengths) > window):
            raise NotPackable("its keys and values differ in width, in a window or with sinks")
        split = (torch.split(x, list(row.lengths), 2) for x in (query, key, value))
        outs = [
            sdpa_attention_forward(module, *one, None, scaling=scaling, is_causal=True)[0]
            for one in zip(*split, strict=True)
        ]
        return torch.cat(outs, 1), None
    if plain and shaped and query.device.type == "cpu":
        out = causal_attention(query, key, value, scale=scale, window=window, sinks=sinks)
        return out.transpose(1, 2).contiguous(), None
    special = window is not None or sinks is not None
    if plain and shaped and special and flash_attention.runs(query):
        heads = (x.transpose(1, 2) for x in (query, key, value))
        return flash_attention.flash_attention(
            *heads, scale=scale, window=window, sinks=sinks
        ), None
    mask = attention_mask
    if window is not None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask = mask.tril_().triu_(1 - window)[None, None]
    if sinks is not None:
        return _eager(module, query, key, value, mask, scaling=scale, causal=causal, **kwargs)
    result: tuple[Tensor, None] = sdpa_attention_forward(
        module,
        query,
        key,
        value,
        mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **kwargs,
    )
    return result


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    causal: bool,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return what the module's own eager attention does, which adds its mask to the scores."""
    queries, keys = query.shape[2], key.shape[2]
    if mask is None and causal and queries > 1:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
        mask = mask.tril_(keys - queries)[None, None]
    if mask is not None and mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, lowest)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    out, _ = eager(module, query, key, value, mask, scaling=scaling, dropout=0.0, **kwargs)
    return out, None


def _within(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: PackedRow,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """Return [1, T, H, D] for q [1, H, T, D] and k, v [1, G, T, D]."""
    if window is not None and window >= max(row.lengths):
        window = None
    if query.device.type == "cpu":
        out = causal_attention(
            query, key, value, scale=scale, lengths=row.lengths, window=window, sinks=sinks
        )
        return out.transpose(1, 2).contiguous()
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    documents = Documents(_cu_seqlens(row.lengths, query.device), max(row.lengths))
    if window is None and sinks is None:
        return attend(q, k, v, documents, scale).view(q.shape)
    if not flash_attention.runs(q):
        raise NotPackable("attention in windows or with sinks needs flash attention to be packed")
    return flash_attention.flash_attention(
        q, k, v, scale=scale, documents=documents, window=window, sinks=sinks
    )


@lru_cache(maxsize=8)
def _cu_seqlens(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return `Documents.cu_seqlens`; all layers of a part ask for the same."""
    return torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32, device=device)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Return the mask for `_interface`: in a packed row no documents, as those are known."""
    row, window = current_row(), kwargs.get("local_size")
    config, q_length = kwargs.get("config"), kwargs["q_length"]
    slides = window is not None and window == getattr(config, "sliding_window", None)
    slides = slides and window != getattr(config, "attention_chunk_size", None)
    if row is not None:
        if kwargs.get("use_vmap"):
            raise NotPackable("its attention has a mask of its own")
        if window is None:
            return None
        if slides:
            return _described(kwargs, window)
        row.window = window if row.window is None else min(window, row.window)
        if max(row.lengths) > window:
            raise NotPackable(f"a document is longer than its attention window of {window} tokens")
        return None
    whole = q_length == kwargs["kv_length"] > 1 and not kwargs.get("q_offset")
    own = kwargs.get("attention_mask") is not None or kwargs.get("use_vmap")
    # Documents that are described by their positions alone are part of the mask's function.
    if slides and whole and not own and kwargs.get("allow_is_causal_skip") and q_length > window:
        return _described(kwargs, window)
    result: Tensor | None = sdpa_mask(*args, **kwargs)
    return result


def _described(kwargs: dict[str, Any], window: int | None) -> Tensor:
    shape = (kwargs["batch_size"], 1, kwargs["q_length"], kwargs["kv_length"])
    mask = torch.empty(shape, dtype=torch.bool, device="meta")
    setattr(mask, _WINDOW, window)
    return mask


AttentionInterface.register(NAME, _interface)
AttentionMaskInterface.register(NAME, _mask)
