"""The 4-bit format: the tensors of a weight, their layout, and the levels of its codes.

A weight is flattened in row-major order and split into blocks, which may cross rows. Two 4-bit
codes share a byte, the first in the high nibble. Each block has a float32 scale; with double
quantisation the scales are themselves 8-bit codes, in blocks of `SCALE_BLOCK`, after subtracting
the mean of all scales (the *offset*).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import ceil, prod
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from halfbyte.errors import ConfigError, WeightError
from halfbyte.quant import blockwise

QuantType = Literal["nf4", "fp4"]

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SCALE_BLOCK = 256
FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of cpu.cpp's enum

_TENSORS = ("codes", "scales", "scale_codes", "scale_scales", "scale_offset")


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight in 4 bits: its tensors, and the metadata to decode them.

    Inconsistent tensors are rejected (WeightError), so consumers need no further checks.

    Attributes:
        codes: uint8 ``[ceil(numel / 2)]``; element 2i in the high nibble, 2i + 1 in the low one.
        scales: float32 ``[blocks]``, or None with double quantisation.
        scale_codes: uint8 ``[blocks]``, codes of ``scale - scale_offset``; None without double
            quantisation, as are the next two.
        scale_scales: float32 ``[ceil(blocks / 256)]``.
        scale_offset: float32, 0-dimensional: the mean of all scales.
        shape: Shape of the weight.
        dtype: Type of the weight that was quantised, and of `dequantize`'s result by default.
        quant_type: ``"nf4"`` or ``"fp4"``.
        block_size: Elements that share one scale; the last block may be short.
    """

    codes: Tensor
    scales: Tensor | None
    scale_codes: Tensor | None
    scale_scales: Tensor | None
    scale_offset: Tensor | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    quant_type: QuantType
    block_size: int

    def __post_init__(self) -> None:
        check_format(self.quant_type, self.block_size)
        expected = _layout(self.numel, self.block_size, self.double_quant)
        came = {name: (t.dtype, tuple(t.shape)) for name, t in self.tensors().items()}
        if came != expected:
            raise WeightError(
                f"a {self.quant_type} weight of shape {self.shape} in blocks of {self.block_size}"
                f" is made of {expected}, and not of {came}: the checkpoint is damaged or of"
                " another format."
            )
        if len({tensor.device for tensor in self.tensors().values()}) > 1:
            raise WeightError("the tensors of a quantised weight must be on one device")

    @property
    def double_quant(self) -> bool:
        """Whether the scales are quantised too."""
        return self.scales is None

    @property
    def numel(self) -> int:
        """Number of elements of the weight."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for each element, scales included; 0 for an empty weight."""
        return 8 * self.nbytes / self.numel if self.numel else 0.0

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors that are not None, by field name."""
        named = ((name, getattr(self, name)) for name in _TENSORS)
        return {name: tensor for name, tensor in named if tensor is not None}

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """Returns this weight with its tensors on `device`, with unchanged dtypes."""
        moved: dict[str, Any] = {name: t.to(device) for name, t in self.tensors().items()}
        return replace(self, **moved)

    def block_scales(self) -> Tensor:
        """Returns the scale of every block, decoded: float32 ``[blocks]``.

        Coded scales are multiplied by their block's scale and rounded; then the offset is added,
        and the sum rounded. A fused operation would change the last bit of many scales.
        """
        if self.scales is not None:
            return self.scales
        assert self.scale_codes is not None
        assert self.scale_scales is not None
        assert self.scale_offset is not None
        decoded = blockwise.decode_dynamic(self.scale_codes, self.scale_scales, SCALE_BLOCK)
        return decoded + self.scale_offset


def levels_of(quant_type: QuantType) -> Tensor:
    """Returns the level of each code, float32 ``[16]`` on the CPU."""
    return blockwise.NF4_LEVELS if quant_type == "nf4" else blockwise.FP4_LEVELS


@cache
def code_order(quant_type: QuantType) -> Tensor:
    """Returns the codes in ascending order of their levels, int64 ``[16]`` on the CPU.

    FP4's two zeros stay in the order of their codes: 0 and values just below it get code 0,
    values just above it code 8.
    """
    return levels_of(quant_type).argsort(stable=True)


def empty_like_quantized(
    shape: tuple[int, ...] | torch.Size,
    dtype: torch.dtype,
    *,
    quant_type: QuantType,
    block_size: int,
    double_quant: bool,
    device: torch.device | str = "meta",
) -> QuantizedWeight:
    """Returns a quantised weight with uninitialised tensors of the right sizes.

    Args:
        shape: Shape of the weight.
        dtype: Type the weight would have had.
        quant_type: As for `quantize`.
        block_size: As for `quantize`.
        double_quant: As for `quantize`.
        device: Device of the tensors; ``"meta"`` allocates no memory.

    Raises:
        ConfigError: Unknown `quant_type` or `block_size`.
    """
    check_format(quant_type, block_size)
    tensors: dict[str, Any] = dict.fromkeys(_TENSORS)
    for name, (kind, sizes) in _layout(prod(shape), block_size, double_quant).items():
        tensors[name] = torch.empty(sizes, dtype=kind, device=device)
    return QuantizedWeight(
        **tensors, shape=tuple(shape), dtype=dtype, quant_type=quant_type, block_size=block_size
    )


def check_format(quant_type: str, block_size: int) -> None:
    """Raises ConfigError unless both are valid for the format."""
    if quant_type not in get_args(QuantType):
        raise ConfigError(f'quant_type must be "nf4" or "fp4", not {quant_type!r}')
    if block_size not in BLOCK_SIZES:
        raise ConfigError(
            f"block_size must be a power of two from 32 to 4096, not {block_size!r}; 64 is usual"
        )


def _layout(
    numel: int, block_size: int, double_quant: bool
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of each tensor of a quantised weight, in the order of its fields."""
    blocks = ceil(numel / block_size)
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    layout = {"codes": (torch.uint8, (ceil(numel / 2),))}
    if double_quant:
        layout["scale_codes"] = torch.uint8, (blocks,)
        layout["scale_scales"] = torch.float32, (ceil(blocks / SCALE_BLOCK),)
        layout["scale_offset"] = torch.float32, ()
    else:
        layout["scales"] = torch.float32, (blocks,)
    return layout
