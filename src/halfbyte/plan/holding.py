"""How the base model's weights are stored, and their bytes.

A packed weight of n elements in blocks of b is

    codes          ⌈n / 2⌉
    scales         4·⌈n / b⌉            without double quantisation; with it:
    scale codes    ⌈n / b⌉              one byte each
    nested scales  4·⌈⌈n / b⌉ / 256⌉    one float32 for 256 of them
    offset         4

``models.build`` packs the same tensors into exactly these bytes. The matrix of each expert is such
a weight. In MXFP4 there is a scale of one byte for 32 numbers.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from halfbyte.plan.model_shape import ModelShape, Weight

SCALE_BLOCK = 256
MXFP4_BLOCK = 32  # weights that share a scale of one byte


@dataclass(frozen=True)
class Holding:
    """How the base model is stored: ``models.build.BaseRecipe``, with the dtype's bytes."""

    quant: str = "nf4"
    double_quant: bool = True
    block_size: int = 64
    itemsize: int = 2
    quantize_head: bool = False
    quantize_embeddings: bool = False
    experts: Literal["mxfp4"] | None = None

    @classmethod
    def of(cls, recipe: Any) -> "Holding":
        """Return the holding of a ``BaseRecipe``."""
        return cls(
            recipe.quant,
            recipe.double_quant,
            recipe.block_size,
            recipe.compute_dtype.itemsize,
            recipe.quantize_head,
            recipe.quantize_embeddings,
            recipe.experts,
        )

    def packs(self, weight: Weight, *, tied: bool) -> bool:
        """Return whether ``weight`` is stored in 4 bits."""
        if self.quant == "none" or not weight.packs:
            return False
        vocabulary = self.quantize_head or self.quantize_embeddings
        return {
            "linear": True,
            "experts": True,
            "head": vocabulary if tied else self.quantize_head,
            "embedding": vocabulary if tied else self.quantize_embeddings,
            "other": False,
        }[weight.role]


class Packed(NamedTuple):
    """The bytes of one packed weight, or of several."""

    codes: int = 0
    scales: int = 0
    scale_codes: int = 0
    nested_scales: int = 0
    offsets: int = 0

    @classmethod
    def of(cls, numel: int, block_size: int, *, double_quant: bool) -> "Packed":
        """Return the bytes of a weight of ``numel`` elements."""
        blocks = -(-numel // block_size)
        if not double_quant:
            return cls(codes=-(-numel // 2), scales=4 * blocks)
        return cls(-(-numel // 2), 0, blocks, 4 * -(-blocks // SCALE_BLOCK), 4)

    def times(self, count: int) -> "Packed":
        """Return the bytes of ``count`` such weights."""
        return Packed(*(count * size for size in self))

    def plus(self, other: "Packed") -> "Packed":
        """Return the bytes of both."""
        return Packed(*(a + b for a, b in zip(self, other, strict=True)))


def held(weight: Weight, shape: ModelShape, holding: Holding) -> Packed | int:
    """Return the bytes of a weight of the base model: packed, or plain."""
    if holding.packs(weight, tied=shape.tied):
        count = weight.shape[0] if weight.role == "experts" else 1
        if weight.role == "experts" and holding.experts == "mxfp4":
            return Packed(weight.numel // 2, scale_codes=weight.numel // MXFP4_BLOCK)
        one = Packed.of(
            weight.numel // count, holding.block_size, double_quant=holding.double_quant
        )
        return one.times(count)
    return weight.numel * holding.itemsize


def nbytes_of(weight: Weight, shape: ModelShape, holding: Holding) -> int:
    """Return the total bytes of a weight of the base model."""
    size = held(weight, shape, holding)
    return sum(size) if isinstance(size, Packed) else size


def in_fp8(weight: Weight) -> bool:
    """Return whether a packed linear can be multiplied in 8 bits: `fp8.supports`."""
    return all(size % 16 == 0 for size in weight.shape)
