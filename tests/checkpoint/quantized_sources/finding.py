"""Finds and decodes weights from tensors in memory, as a format does from files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.checkpoint.quantized_sources.weight import Found, Headers, Options
from halfbyte.checkpoint.safetensors_file import Entry

Find = Callable[[Options, Headers, torch.dtype], Found]


def find(
    method: Find,
    packing: dict[str, Any],
    tensors: dict[str, Tensor],
    dtype: torch.dtype = torch.bfloat16,
) -> Found:
    """Returns what a format finds in a model of these tensors."""
    entries = {k: Entry(k, t.dtype, tuple(t.shape), 0, t.nbytes) for k, t in tensors.items()}
    return method(
        Options(Path("model"), packing), Headers(Path("model"), entries, tensors.__getitem__), dtype
    )


def decode(
    method: Find,
    packing: dict[str, Any],
    tensors: dict[str, Tensor],
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Returns the only weight, checked against what was said of it beforehand."""
    (weight,) = find(method, packing, tensors, dtype).weights
    assert set(weight.members) <= tensors.keys()
    value = weight.decode(lambda key: tensors[key])
    assert (tuple(value.shape), value.dtype) == (weight.shape, weight.dtype)
    assert value.is_contiguous()
    return value


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors by their keys in a model."""
    return {f"{prefix}.{leaf}": tensor for leaf, tensor in tensors.items()}
