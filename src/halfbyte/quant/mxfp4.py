"""MXFP4, the format in which gpt-oss is published: its tensors, and its specification in PyTorch.

A row is split into blocks of 32. Each number is a code of E2M1 (a sign, two bits of exponent, one
of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6), and a block has a scale of E8M0, eight bits of exponent:

    weight = level[code] · 2^(scale − 127)

Two codes share a byte, the first in the *low* nibble (QuantizedWeight has it in the high one).
Every product is exact in bfloat16 and float32, or beyond their range; float16 rounds it once.

The formats are of the OCP Microscaling specification 1.0, which reserves scale 255 for NaN.
transformers and llama.cpp decode it as 2^128, and so do we: decoders are equal for every byte. A
file is refused for it, as for every scale that makes a code infinite (`LARGEST_SCALE`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from halfbyte.errors import WeightError

BLOCK = 32
"""Weights that share a scale."""

LARGEST_SCALE = 252
"""The largest scale with which every code is finite in bfloat16 and float32: 6 · 2^125."""

# Twice the levels, by code: whole numbers, to be multiplied by half the scale. So 2^128 needs no
# place in float32, which has none for it.
DOUBLED_LEVELS = torch.tensor(
    [0, 1, 2, 3, 4, 6, 8, 12, -0.0, -1, -2, -3, -4, -6, -8, -12], device="cpu"
)

# Between neighbours of the doubled levels. A value on one goes to the code with mantissa 0 (round
# to nearest, ties to even): the lower of the two at every other bound, the upper at the rest.
_TIES_DOWN = torch.tensor([0.5, 2.5, 5.0, 10.0], device="cpu")
_TIES_UP = torch.tensor([1.5, 3.5, 7.0], device="cpu")

# Bytes and blocks that the plain versions process at a time: temporaries of a few tens of MB.
_CHUNK = 2**15


@dataclass(frozen=True, eq=False)
class MXFP4Weight:
    """A weight in MXFP4; has what a ``QuantizedWeight`` has, as far as it applies.

    Inconsistent tensors are rejected (WeightError), so consumers need no further checks.

    Attributes:
        codes: uint8 ``[numel / 2]``; element 2i in the low nibble, 2i + 1 in the high one.
        scales: uint8 ``[numel / 32]``, exponents with a bias of 127.
        shape: Shape of the weight; its last dimension is a multiple of 32.
        dtype: `dequantize`'s result by default.
    """

    codes: Tensor
    scales: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype

    quant_type: ClassVar[Literal["mxfp4"]] = "mxfp4"
    block_size: ClassVar[int] = BLOCK

    def __post_init__(self) -> None:
        if not self.shape or self.shape[-1] % BLOCK:
            raise WeightError(
                f"MXFP4 has blocks of {BLOCK} along the last dimension, and a weight of shape "
                f"{self.shape} has none"
            )
        came = {name: (t.dtype, tuple(t.shape)) for name, t in self.tensors().items()}
        expected = {
            "codes": (torch.uint8, (self.numel // 2,)),
            "scales": (torch.uint8, (self.numel // BLOCK,)),
        }
        if came != expected:
            raise WeightError(
                f"an MXFP4 weight of shape {self.shape} is made of {expected}, and not of {came}: "
                "the checkpoint is damaged or of another format"
            )
        if self.codes.device != self.scales.device:
            raise WeightError("the tensors of a quantised weight must be on one device")

    @property
    def numel(self) -> int:
        """Number of elements of the weight."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors together."""
        return self.codes.nbytes + self.scales.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for each element, scales included: 4.25; 0 for an empty weight."""
        return 8 * self.nbytes / self.numel if self.numel else 0.0

    def tensors(self) -> dict[str, Tensor]:
        """Returns both tensors by field name."""
        return {"codes": self.codes, "scales": self.scales}

    def unbind(self) -> tuple[MXFP4Weight, ...]:
        """Returns the weights along the first dimension, such as those of experts, as views."""
        count, *shape = self.shape
        pairs = zip(self.codes.view(count, -1), self.scales.view(count, -1), strict=True)
        return tuple(MXFP4Weight(c, s, tuple(shape), self.dtype) for c, s in pairs)

    def to(self, device: torch.device | str) -> MXFP4Weight:
        """Returns this weight with its tensors on `device`."""
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device))


def empty_like_mxfp4(
    shape: tuple[int, ...] | torch.Size,
    dtype: torch.dtype,
    *,
    device: torch.device | str = "meta",
) -> MXFP4Weight:
    """Returns a weight with uninitialised tensors; ``"meta"`` allocates no memory.

    Raises:
        WeightError: The last dimension of `shape` is not a multiple of 32.
    """
    numel = prod(shape)
    codes = torch.empty(numel // 2, dtype=torch.uint8, device=device)
    scales = torch.empty(numel // BLOCK, dtype=torch.uint8, device=device)
    return MXFP4Weight(codes, scales, tuple(shape), dtype)


def half_scales(scales: Tensor) -> Tensor:
    """Returns half of what scales stand for, 2^(scale − 128), exactly: uint8 to float32.

    A float32 is made of its bits: scales 0 and 1 are subnormal, the others have their exponent less
    one in the exponent's field.
    """
    exponent = scales.to(torch.int32)
    subnormal = torch.bitwise_left_shift(torch.full_like(exponent, 1 << 21), exponent.clamp(max=1))
    return torch.where(exponent < 2, subnormal, (exponent - 1) << 23).view(torch.float32)


def decode(weight: MXFP4Weight, out: Tensor) -> None:
    """Decodes into `out`, contiguous, of any floating dtype: the specification of the kernels."""
    flat = out.view(-1)
    # Indexing a table of both values of a byte, as for NF4.
    levels = DOUBLED_LEVELS
    pairs = torch.stack([levels.repeat(16), levels.repeat_interleave(16)], 1).to(out.device)
    blocks = weight.codes.view(-1, BLOCK // 2)
    rows = flat.view(-1, BLOCK)
    scales = half_scales(weight.scales)[:, None]
    for start in range(0, len(blocks), _CHUNK):
        some = slice(start, start + _CHUNK)
        values = pairs.index_select(0, blocks[some].reshape(-1).int()).view(-1, BLOCK)
        rows[some] = values.mul_(scales[some])


@torch.no_grad()
def quantize_mxfp4(weight: Tensor, *, name: str | None = None) -> MXFP4Weight:
    """Quantises a weight to MXFP4 as section 6.3 of the OCP specification says.

    The scale is the power of two of the largest magnitude of a block, divided by that of the
    largest level, 4; values are rounded to the nearest level, ties to an even mantissa, and those
    beyond 6 become 6. A block of zeros has scale 0. The scales are those of the gguf package; it
    rounds ties towards zero, and has no negative zero. (What OpenAI quantised gpt-oss with is not
    published; the kernels that transformers uses for quantising round the scale up.)

    Args:
        weight: float32, bfloat16 or float16, finite; its last dimension is a multiple of 32.
        name: Name of the weight in error messages.

    Raises:
        WeightError: NaN or infinity in `weight`, another dtype, or another last dimension.
    """
    called = f"weight {name!r}" if name else "the weight"
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise WeightError(f"{called} is {weight.dtype}, and only floating weights are quantised")
    q = empty_like_mxfp4(weight.shape, weight.dtype, device=weight.device)
    blocks, codes = weight.detach().reshape(-1, BLOCK), q.codes.view(-1, BLOCK // 2)
    down, up = _TIES_DOWN.to(weight.device), _TIES_UP.to(weight.device)
    for start in range(0, len(blocks), _CHUNK):
        values = blocks[start : start + _CHUNK].float()
        largest = values.abs().amax(1)
        if not bool(largest.isfinite().all()):
            raise WeightError(f"{called} contains NaN or infinity, so it cannot be quantised")
        # frexp's mantissa is in [0.5, 1): its exponent is one more than that of the power of two.
        scales = (torch.frexp(largest).exponent - 1 - 2 + 127).clamp(0, 254)
        scales = torch.where(largest == 0, 0, scales).to(torch.uint8)
        doubled = values / half_scales(scales)[:, None]
        size = doubled.abs()
        code = torch.bucketize(size, down) + torch.bucketize(size, up, right=True)
        code = (code | (doubled.signbit() << 3)).to(torch.uint8)
        codes[start : start + _CHUNK] = code[:, ::2] | code[:, 1::2] << 4
        q.scales[start : start + _CHUNK] = scales
    return q
