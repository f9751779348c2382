"""bitsandbytes in 8 bits: rows of int8, each with its largest absolute value.

    weight         int8 [out, in]
    SCB            float32 [out]
    weight_format  uint8, 0 for rows as they are

and W[o, i] = weight[o, i] · SCB[o] / 127. Which columns are computed in 16 bits (``threshold``) is
decided from the activations, so all columns are in the files.

Source: bitsandbytes 0.50, ``functional.int8_vectorwise_dequant``.
"""

from functools import partial

import torch
from torch import Tensor

from halfbyte.checkpoint.quantized_sources.arithmetic import dequantize_blocks
from halfbyte.checkpoint.quantized_sources.weight import (
    Found,
    Headers,
    Options,
    Read,
    StoredWeight,
)


def find(options: Options, headers: Headers, dtype: torch.dtype) -> Found:
    """Find the weights of a model that bitsandbytes has quantised to 8 bits.

    Args:
        options: Its ``quantization_config``.
        headers: Its files.
        dtype: The decoded dtype.

    Raises:
        CheckpointError: If it is not of 8 bits, or a tensor is missing or does not fit.
    """
    # Its other options say how it computes, or belong to its 4 bits, and are always there.
    options.choice("load_in_8bit", (True,), False)
    weights = []
    for prefix in headers.with_suffix(".SCB"):
        key, scale, form = (f"{prefix}.{leaf}" for leaf in ("weight", "SCB", "weight_format"))
        outputs, inputs = headers.matrix(key, torch.int8)
        headers.expect(scale, torch.float32, (outputs,))
        members = [key, scale]
        if headers.get(form) is not None:
            members.append(headers.expect(form, torch.uint8, ()).name)
        decode = partial(_decode, headers, members, dtype)
        weights.append(StoredWeight(key, tuple(members), (outputs, inputs), dtype, decode))
    return Found(weights, "bitsandbytes (8 bits)", [])


def _decode(headers: Headers, members: list[str], dtype: torch.dtype, read: Read) -> Tensor:
    for form in members[2:]:
        if number := int(read(form)):
            raise headers.wrong(form, f"is {number}, expected is 0, rows as they are")
    weight, scales = read(members[0]), read(members[1])
    return dequantize_blocks(weight, scales[:, None] / 127, (1, weight.shape[1]), dtype)
