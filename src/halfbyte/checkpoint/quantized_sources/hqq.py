"""HQQ, as its linears are saved in safetensors files.

A linear of shape [out, in] is reshaped before it is quantised: to [out · in / g, g] with ``axis``
1, to [g, out · in / g] with ``axis`` 0, for groups of g. Of that matrix [R, C] the files have

    W_q            codes, packed along R: uint8 [R · bits / 8, C]; with 3 bits int32 [⌈R / 10⌉, C]
    scale, zero    float [R, 1] with axis 1, [1, C] with axis 0
    shape          int64 [2], that of the linear
    nbits, axis    int32
    ….             more, that says how it was made or follows from these

and W = (code - zero) · scale, where a zero point is no whole number. Rows are packed in parts: the
first part of the rows is in the highest bits. The shape is a value, so it is read when a model is
opened.

Source: hqq 0.2.8, ``core/quantize.py``, ``core/bitpack.py`` and ``core/utils.py``.
"""

from functools import partial
from math import prod

import torch
from torch import Tensor

from halfbyte.checkpoint.quantized_sources.arithmetic import dequantize_blocks
from halfbyte.checkpoint.quantized_sources.weight import (
    FLOAT_TYPES,
    Found,
    Headers,
    Options,
    Read,
    StoredWeight,
)

_BITS = (8, 4, 3, 2, 1)
# What is in the files beside codes, scales, zero points and the three values that are read.
_MORE = (
    *("group_size", "packing", "unpack_view_dtype", "view_as_float", "quant_scale", "quant_zero"),
    *("compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config"),
    *("channel_wise", "optimize", "round_zero"),
)


def find(options: Options, headers: Headers, dtype: torch.dtype) -> Found:
    """Find the weights of a model quantised by HQQ.

    Args:
        options: Its ``quantization_config``.
        headers: Its files.
        dtype: The decoded dtype of weights whose scales are float32.

    Raises:
        CheckpointError: If an option is not supported, or a tensor is missing or does not fit.
    """
    options.ignore("quant_config", "skip_modules")  # each linear has its own in the files
    options.finish()
    weights = [_weight(headers, prefix, dtype) for prefix in headers.with_suffix(".W_q")]
    return Found(weights, "HQQ", [])


def _weight(headers: Headers, prefix: str, dtype: torch.dtype) -> StoredWeight:
    codes, scale, zero = members = [f"{prefix}.{leaf}" for leaf in ("W_q", "scale", "zero")]
    (bits,), (axis,) = headers.numbers(f"{prefix}.nbits"), headers.numbers(f"{prefix}.axis")
    shape = tuple(headers.numbers(f"{prefix}.shape"))
    if bits not in _BITS or axis not in (0, 1) or len(shape) != 2 or min(shape) < 1:
        raise headers.wrong(
            f"{prefix}.nbits", f"is {bits}, with an axis of {axis} and a shape of {list(shape)}"
        )
    words, columns = headers.matrix(codes, torch.int32 if bits == 3 else torch.uint8)
    each = 10 if bits == 3 else 8 // bits
    rows = prod(shape) // columns
    if rows * columns != prod(shape) or words != -(-rows // each):
        raise headers.wrong(codes, f"has shape {[words, columns]} for {bits} bits of {list(shape)}")
    of_groups = (rows, 1) if axis == 1 else (1, columns)
    own = headers.expect(scale, FLOAT_TYPES, of_groups).dtype
    headers.expect(zero, FLOAT_TYPES, of_groups)
    members += [f"{prefix}.{leaf}" for leaf in ("shape", "nbits", "axis")]
    members += [f"{prefix}.{leaf}" for leaf in _MORE if headers.get(f"{prefix}.{leaf}") is not None]
    kept = dtype if own == torch.float32 else own
    decode = partial(_decode, prefix, bits, (rows, columns), shape, axis, kept)
    return StoredWeight(f"{prefix}.weight", tuple(members), shape, kept, decode)


def _decode(
    prefix: str,
    bits: int,
    matrix: tuple[int, int],
    shape: tuple[int, ...],
    axis: int,
    dtype: torch.dtype,
    read: Read,
) -> Tensor:
    words = read(f"{prefix}.W_q")
    top = 30 if bits == 3 else 8  # two bits of a word of ten codes are unused
    parts = [(words >> start & 2**bits - 1).byte() for start in range(top - bits, -1, -bits)]
    codes = torch.cat(parts)[: matrix[0]]
    block = (1, matrix[1]) if axis == 1 else (matrix[0], 1)
    scales, zeros = read(f"{prefix}.scale"), read(f"{prefix}.zero")
    return dequantize_blocks(codes, scales, block, dtype, zeros).view(shape)
