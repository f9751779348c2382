"""Converts experts in MXFP4 to and from the tensors of a checkpoint as gpt-oss is published.

transformers has one parameter X for a linear of all experts of a layer, [experts, in, out]. The
files have ``X_blocks``, uint8 [experts, out, in / 32, 16], the codes, and ``X_scales``, uint8
[experts, out, in / 32]. The bytes are those of an ``MXFP4Weight`` [experts, out, in], in its order.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from halfbyte.checkpoint.safetensors_file import Planned
from halfbyte.errors import CheckpointError
from halfbyte.quant import MXFP4Weight, PackedWeight, dequantize
from halfbyte.quant.mxfp4 import BLOCK, LARGEST_SCALE

_BLOCKS, _SCALES = "_blocks", "_scales"

METHOD = "mxfp4"
"""What the ``quantization_config`` of a checkpoint calls the format."""

PUBLISHED: dict[str, Any] = {
    "quant_method": METHOD,
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
"""The ``quantization_config`` of gpt-oss as it is published, for files that have none."""


def mxfp4_weights(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the keys of the blocks and scales of each weight in MXFP4 among ``names``."""
    owners = [name.removesuffix(_BLOCKS) for name in names if name.endswith(_BLOCKS)]
    return {owner: [owner + _BLOCKS, owner + _SCALES] for owner in owners}


def stored_shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the shapes of the blocks and scales of a parameter [experts, in, out].

    Raises:
        ValueError: If it has no whole blocks.
    """
    count, n_in, n_out = shape
    if n_in % BLOCK:
        raise ValueError(f"{n_in} inputs are no whole blocks of {BLOCK}")
    return [(count, n_out, n_in // BLOCK, BLOCK // 2), (count, n_out, n_in // BLOCK)]


def require_finite(name: str, scales: Tensor) -> None:
    """Refuse scales, uint8, with which some code is infinite or NaN.

    Raises:
        CheckpointError: If there is one.
    """
    if scales.numel() and (largest := int(scales.max())) > LARGEST_SCALE:
        raise CheckpointError(
            f"{name} has a scale of 2^{largest - 127}, which stands for weights that are infinite "
            "or NaN; the checkpoint is damaged"
        )


def decode_mxfp4(name: str, blocks: Tensor, scales: Tensor) -> MXFP4Weight:
    """Return the weights [experts, out, in] that a checkpoint holds for ``name``.

    Raises:
        CheckpointError: If a scale is one of NaN, or makes weights infinite.
    """
    require_finite(name + _SCALES, scales)
    count, n_out, groups = scales.shape
    shape = (count, n_out, groups * BLOCK)
    return MXFP4Weight(blocks.reshape(-1), scales.reshape(-1), shape, torch.bfloat16)


def encode_mxfp4(name: str, weight: MXFP4Weight) -> dict[str, Tensor]:
    """Return the tensors that a checkpoint holds for the weights [experts, out, in] of ``name``."""
    count, n_out, n_in = weight.shape
    blocks, scales = stored_shapes((count, n_in, n_out))
    return {name + _BLOCKS: weight.codes.view(blocks), name + _SCALES: weight.scales.view(scales)}


def plan_mxfp4(name: str, shape: tuple[int, ...]) -> list[Planned]:
    """Return what ``encode_mxfp4`` will make of the parameter ``name`` [experts, in, out]."""
    blocks, scales = stored_shapes(shape)
    return [
        Planned(name + _BLOCKS, torch.uint8, blocks),
        Planned(name + _SCALES, torch.uint8, scales),
    ]


def dense(value: Tensor | PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """Return a value of a source as transformers' parameter, decoded if it is packed.

    Args:
        value: A tensor, or a packed weight; experts in MXFP4 become [experts, in, out].
        dtype: dtype of a decoded weight; by default the one it was packed from.
    """
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, MXFP4Weight):
        return dequantize(value, dtype)
    count, n_out, n_in = value.shape
    dtype = dtype or value.dtype
    out = torch.empty(count, n_in, n_out, dtype=dtype, device=value.codes.device)
    for matrix, target in zip(value.unbind(), out, strict=True):
        dequantize(matrix, out=target.t())
    return out
