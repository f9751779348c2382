"""4-bit weights: a code of NF4 or FP4 for each weight, and a scale for each block.

`quantize` packs a tensor into a `QuantizedWeight`, `dequantize` decodes it; the bytes are those of
bitsandbytes. README.md in this directory derives the levels, shows the layout and measures the
error.
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
