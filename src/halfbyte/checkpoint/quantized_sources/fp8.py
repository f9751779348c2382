"""FP8: weights in E4M3 with float scales, one for a block, a row, or the whole weight.

Two methods store it in the same way, ``W = weight · scale``, under different names:

    fp8           weight float8_e4m3fn, weight_scale_inv [⌈out / 128⌉, ⌈in / 128⌉] (DeepSeek) or one
                  number (transformers without blocks), or weight_scale, one number (vLLM)
    fbgemm_fp8    weight, weight_scale [out, 1]; experts as one tensor, with gate_up_proj_scale

``weight_scale_inv`` is, despite its name, what the weight is multiplied by: the inverse of what it
was multiplied by. It is float32, bfloat16, or E8M0. Whether a weight is FP8 is its dtype in the
files, so the lists of layers that are not are not needed. Scales of activations are ignored.

Source: transformers 5.23, ``integrations/finegrained_fp8.py`` and ``fbgemm_fp8.py``.
"""

from functools import partial

import torch
from torch import Tensor

from halfbyte.checkpoint.quantized_sources.arithmetic import dequantize_blocks, exponents
from halfbyte.checkpoint.quantized_sources.weight import (
    FLOAT_TYPES,
    Found,
    Headers,
    Options,
    Read,
    StoredWeight,
    scale_shape,
)

FP8 = torch.float8_e4m3fn
E8M0 = (torch.float8_e8m0fnu, torch.uint8)

IGNORED = (
    *(".input_scale", ".activation_scale", ".input_scale_ub", ".input_zero_point"),
    *(".input_global_scale", ".output_scale", ".k_scale", ".v_scale", ".q_scale"),
    *("_input_scale", "_activation_scale", ".k_proj.output_scale", ".v_proj.output_scale"),
)
"""Ends of keys with scales of activations and of the KV cache."""

_NOT_CONVERTED = ("modules_to_not_convert", "ignored_layers", "modules_to_convert")


def find(options: Options, headers: Headers, dtype: torch.dtype) -> Found:
    """Find the weights of a model in FP8.

    Args:
        options: Its ``quantization_config``.
        headers: Its files.
        dtype: The decoded dtype of weights whose scales are not of 16 bits.

    Raises:
        CheckpointError: If an option is not supported, or a tensor is missing or does not fit.
    """
    block = options.get("weight_block_size")
    if block is not None:
        if not isinstance(block, list) or [type(n) for n in block] != [int, int] or min(block) < 1:
            raise options.wrong("weight_block_size", block, "two positive numbers")
        block = (block[0], block[1])
    options.choice("fmt", ("e4m3",), "e4m3")
    options.choice("expert_dtype", ("fp8",), "fp8")
    options.choice("activation_scheme", ("dynamic", "static"), "dynamic")
    options.choice("scale_fmt", ("float", "ue8m0"), "float")
    options.ignore(*_NOT_CONVERTED, "activation_scale_ub", "dequantize", "kv_cache_scheme")
    options.finish()
    weights = []
    for key in headers.of_dtype(FP8):
        inverse = f"{key}_scale_inv"
        scale = inverse if headers.get(inverse) is not None else f"{key}_scale"
        weights.append(scaled_weight(headers, key, scale, block, dtype))
    blocks = f" (blocks of {block[0]} x {block[1]})" if block else ""
    return Found(weights, f"FP8{blocks}", headers.ending_in(IGNORED))


def scaled_weight(
    headers: Headers, key: str, scale: str, block: tuple[int, int] | None, dtype: torch.dtype
) -> StoredWeight:
    """Return a weight that is stored under its own key, beside its scales.

    Args:
        headers: The files.
        key: The weight, FP8 or int8.
        scale: The key of its scales.
        block: Rows and columns that share a scale, if they are blocks.
        dtype: The decoded dtype, unless the scales are of 16 bits.

    Raises:
        CheckpointError: If the scales are missing or do not fit.
    """
    shape = headers.expect(key, (FP8, torch.int8)).shape
    own = headers.expect(scale, (*FLOAT_TYPES, *E8M0)).dtype
    kept = own if own in (torch.float16, torch.bfloat16) else dtype
    decode = partial(_decode, key, scale, headers.grid(key, scale, shape, block), kept)
    return StoredWeight(key, (key, scale), shape, kept, decode)


def _decode(key: str, scale: str, block: tuple[int, int], dtype: torch.dtype, read: Read) -> Tensor:
    weight, scales = read(key), read(scale)
    scales = scales.reshape(scale_shape(tuple(scales.shape), weight.dim()))
    if scales.dtype in E8M0:
        scales = exponents(scales)
    return dequantize_blocks(weight, scales, block, dtype)
