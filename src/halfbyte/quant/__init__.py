"""Weights in four bits: a code of NF4 or FP4 for each, a scale for each block of them.

`quantize` makes a `QuantizedWeight` of a tensor and `dequantize` a tensor of that again; the
bytes are those of bitsandbytes. README.md beside this file derives the levels, draws the bytes
and measures the error.
"""

from halfbyte.quant.format import dequantize, dequantize_all, quantize
from halfbyte.quant.weight import (
    BLOCK_SIZES,
    SCALE_BLOCK,
    QuantizedWeight,
    QuantType,
    empty_like_quantized,
)

__all__ = [
    "BLOCK_SIZES",
    "SCALE_BLOCK",
    "QuantType",
    "QuantizedWeight",
    "dequantize",
    "dequantize_all",
    "empty_like_quantized",
    "quantize",
]
