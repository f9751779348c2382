"""MXFP4 in GGUF files: the same scales and codes as in an ``MXFP4Weight``, in another order.

A block is 17 bytes: the scale, then 16 bytes of codes, of which byte i has element i in the low
nibble and element i + 16 in the high one (MXFP4Weight: elements 2i and 2i + 1). Both directions
move bits only, so an expert of gpt-oss goes from one format to the other and back unchanged.
"""

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from halfbyte.checkpoint.mxfp4_keys import require_finite
from halfbyte.errors import CheckpointError
from halfbyte.quant import MXFP4Weight
from halfbyte.quant.mxfp4 import BLOCK

_BYTES = GGML_QUANT_SIZES[GGMLQuantizationType.MXFP4][1]

# Blocks at a time: bounds the temporaries to a few tens of MB.
_CHUNK = 2**19


def to_blocks(weight: MXFP4Weight) -> Tensor:
    """Return the rows of a weight [..., columns] as blocks: uint8 [..., columns / 32 · 17]."""
    codes = weight.codes.view(-1, BLOCK // 2)
    out = torch.empty(len(codes), _BYTES, dtype=torch.uint8, device=codes.device)
    out[:, 0] = weight.scales
    for some, target in zip(torch.split(codes, _CHUNK), torch.split(out, _CHUNK), strict=True):
        elements = torch.stack((some & 15, some >> 4), 2).view(-1, BLOCK)
        low, high = elements.chunk(2, 1)
        target[:, 1:] = low | high << 4
    *rows, columns = weight.shape
    return out.view(*rows, columns // BLOCK * _BYTES)


def from_blocks(blocks: Tensor, name: str) -> MXFP4Weight:
    """Return the weight [..., columns] whose rows are ``blocks``, uint8 [..., columns / 32 · 17].

    Args:
        blocks: Whole blocks of type MXFP4.
        name: Its name in messages.

    Raises:
        CheckpointError: If a row has no whole blocks, a scale is the one of NaN, or makes weights
            infinite.
    """
    *rows, nbytes = blocks.shape
    if nbytes % _BYTES:
        raise CheckpointError(f"{name}: rows of {nbytes} bytes are no whole blocks of MXFP4")
    flat = blocks.reshape(-1, _BYTES)
    scales = flat[:, 0].contiguous()
    require_finite(name, scales)
    codes = torch.empty(len(flat), BLOCK // 2, dtype=torch.uint8, device=flat.device)
    for some, target in zip(torch.split(flat, _CHUNK), torch.split(codes, _CHUNK), strict=True):
        packed = some[:, 1:]
        elements = torch.cat((packed & 15, packed >> 4), 1)
        target.copy_(elements[:, ::2] | elements[:, 1::2] << 4)
    shape = (*rows, nbytes // _BYTES * BLOCK)
    return MXFP4Weight(codes.view(-1), scales, shape, torch.bfloat16)
