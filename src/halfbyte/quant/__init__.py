"""4-bit weights: a code of NF4, FP4 or MXFP4 for each weight, and a scale for each block.

`quantize` packs a tensor into a `QuantizedWeight`, `dequantize` decodes it; the bytes are those of
bitsandbytes. `MXFP4Weight` is the format of gpt-oss, decoded by the same function. README.md here
derives the levels, shows the layout and measures the error.
"""

from halfbyte.quant.format import PackedWeight, dequantize, dequantize_all, quantize
from halfbyte.quant.mxfp4 import MXFP4Weight, empty_like_mxfp4, quantize_mxfp4
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
    "MXFP4Weight",
    "PackedWeight",
    "QuantType",
    "QuantizedWeight",
    "dequantize",
    "dequantize_all",
    "empty_like_mxfp4",
    "empty_like_quantized",
    "quantize",
    "quantize_mxfp4",
]
