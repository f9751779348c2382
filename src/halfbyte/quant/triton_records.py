"""Decodes weights at a constant distance in memory, such as the experts of a layer, in one launch.

Their packed tensors are given by those of the first and the distance in bytes. A launch for any
weights (`triton_blockwise.decode_all`) needs a table of all their addresses instead, and finding it
takes the host longer than decoding takes the GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.quant.mxfp4 import MXFP4Weight
from halfbyte.quant.triton_blockwise import (
    LANES,
    UNROLL,
    decode_words,
    dynamic_on,
    levels_on,
    on_device,
)
from halfbyte.quant.triton_mxfp4 import decode_mxfp4_words
from halfbyte.quant.weight import QuantizedWeight


@triton.jit
def _decode_records(
    out,
    codes,
    scales,
    scale_codes,
    offset,
    levels,
    dynamic,
    words,
    stride,
    block_words: tl.constexpr,
    double: tl.constexpr,
    lanes: tl.constexpr,
    unroll: tl.constexpr,
):
    record, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * (lanes * unroll)
    four = record * (stride // 4)  # bytes
    start = 0.0
    if double:
        start = tl.load(offset + four)
    decode_words(
        out + record * words * 8,
        first,
        words,
        codes + four,
        scales + four,
        scale_codes + record * stride,
        start,
        levels,
        dynamic,
        block_words,
        double,
        lanes,
        unroll,
    )


@triton.jit
def _decode_mxfp4_records(
    out, codes, scales, words, stride, lanes: tl.constexpr, unroll: tl.constexpr
):
    record, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * (lanes * unroll)
    codes += record * (stride // 4)
    scales += record * stride
    decode_mxfp4_words(out + record * words * 8, first, words, codes, scales, lanes, unroll)


def fits(weight: QuantizedWeight | MXFP4Weight) -> bool:
    """Returns whether weights of this shape can be decoded by `decode_records`."""
    return weight.numel > 0 and weight.numel % 8 == 0


def decode_records(first: QuantizedWeight | MXFP4Weight, stride: int, out: Tensor) -> None:
    """Decodes weights of one format and shape; bit for bit as `triton_blockwise.decode_all` does.

    Args:
        first: The first weight; requires `fits`. Its tensors start at multiples of 16 bytes.
        stride: Bytes from each tensor of a weight to that of the next, a multiple of 16.
        out: [n, ...], contiguous, float32, bfloat16 or float16; n weights are decoded.
    """
    words = first.numel // 8
    codes = first.codes.view(torch.int32)
    grid = (triton.cdiv(words, LANES * UNROLL), len(out))
    with on_device(out):
        if isinstance(first, MXFP4Weight):
            _decode_mxfp4_records[grid](
                out, codes, first.scales, words, stride, lanes=LANES, unroll=UNROLL, num_warps=8
            )
            return
        scales = first.scales if first.scales is not None else first.scale_scales
        _decode_records[grid](
            out,
            codes,
            scales,
            first.codes if first.scale_codes is None else first.scale_codes,
            scales if first.scale_offset is None else first.scale_offset,
            levels_on(first.quant_type, out.device),
            dynamic_on(out.device),
            words,
            stride,
            block_words=first.block_size // 8,
            double=first.double_quant,
            lanes=LANES,
            unroll=UNROLL,
            num_warps=8,
            enable_fp_fusion=False,
        )
