"""The 4-bit format: what a quantised weight is, and the plain PyTorch that makes and reads it.

A weight is flattened in row-major order and cut into blocks, without regard to its rows. Two
4-bit codes share a byte, the earlier in the high nibble. Each block has a float32 scale; with
double quantisation the scales are 8-bit codes themselves, in blocks of `SCALE_BLOCK`, after the
mean of all (the *offset*) is taken away.

`quantize` and `dequantize` choose between implementations: the C++ kernels of cpu.py, the Triton
kernels of triton_blockwise.py, and the plain PyTorch here, which is the specification. They agree
bit for bit, but for encoding on a GPU: reciprocals are approximate there, as they are in
bitsandbytes, so where a quotient is a bound but for its last bit, the code may be the neighbour's.

Decoding is the same everywhere. Encoding gives the bytes of bitsandbytes on the same kind of
device, and its CPU and CUDA code differ: in the rounding of scale codes, in FP4's bounds, and in a
short last block. One thing is ours on both: a block of zeros gets the code of zero, where
bitsandbytes' CUDA code gives it that of -1, which with double quantisation decodes to a few
millionths instead of to 0.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from math import ceil, prod
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from halfbyte.errors import ConfigError, WeightError
from halfbyte.quant import blockwise
from halfbyte.runtime import device as devices

QuantType = Literal["nf4", "fp4"]
Implementation = Literal["auto", "cpu", "gpu", "torch"]

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SCALE_BLOCK = 256
FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of cpu.cpp's enum

logger = logging.getLogger("halfbyte")

_TENSORS = ("codes", "scales", "scale_codes", "scale_scales", "scale_offset")

# Elements the plain versions work on at a time: bounds their temporaries to a few tens of MB.
_CHUNK = 2**20


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight in 4 bits: its tensors, and what is needed to read them.

    Tensors that do not fit together are refused (WeightError), so those who read one need not
    look again.

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
        """Returns the tensors there are, by field name."""
        named = ((name, getattr(self, name)) for name in _TENSORS)
        return {name: tensor for name, tensor in named if tensor is not None}

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """Returns this weight with its tensors on `device`; no type ever changes."""
        moved: dict[str, Any] = {name: t.to(device) for name, t in self.tensors().items()}
        return replace(self, **moved)

    def block_scales(self) -> Tensor:
        """Returns the scale of every block, decoded: float32 ``[blocks]``.

        Coded scales are multiplied by their block's scale, rounded, and the offset is added, and
        rounded again. One fused operation would change the last bit of many a scale.
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


@torch.no_grad()
def quantize(
    weight: Tensor,
    *,
    quant_type: QuantType = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    name: str | None = None,
    impl: Implementation = "auto",
) -> QuantizedWeight:
    """Quantises a weight to 4 bits.

    Needs a few tens of MB beside the result, and a copy of the weight if that is not contiguous.

    Args:
        weight: float32, bfloat16 or float16, any shape, finite.
        quant_type: Table of levels, ``"nf4"`` or ``"fp4"``.
        block_size: Elements that share one scale: a power of two from 32 to 4096.
        double_quant: Whether to quantise the scales too (4.127 bits a weight instead of 4.5).
        name: What error messages call the weight.
        impl: ``"torch"`` for plain PyTorch, ``"cpu"`` for the C++ kernels, ``"gpu"`` for Triton's,
            ``"auto"`` for the kernels of the device where they can be had. See the top of this file
            for where their bytes may differ.

    Returns:
        The quantised weight, on the device of `weight`.

    Raises:
        ConfigError: Unknown `quant_type`, `block_size` or `impl`.
        WeightError: NaN or infinity in `weight`, another type of numbers, or scales so large that
            their mean cannot be computed.
    """
    check_format(quant_type, block_size)
    called = f"weight {name!r}" if name else "the weight"
    if weight.dtype not in FLOAT_TYPES:
        raise WeightError(
            f"{called} is {weight.dtype}, and only float32, bfloat16 and float16 can be"
            " quantised: cast it first, or leave it as it is."
        )
    backend = _backend(impl, weight.device)
    flat = weight.detach().reshape(-1).contiguous()
    codes, scales = backend.encode(flat, quant_type, block_size)
    single = QuantizedWeight(
        codes, scales, None, None, None, tuple(weight.shape), weight.dtype, quant_type, block_size
    )
    if not double_quant:
        _check_finite(weight, scales, scales, called)
        return single
    # torch adds up in an order that depends on its number of threads, and so, in the last bit,
    # may the offset. It is the order bitsandbytes takes.
    offset = scales.mean() if len(scales) else scales.new_zeros(())
    scale_codes, scale_scales = backend.encode_scales(scales, offset)
    # Asked last: on a GPU the answer is waited for, and there is nothing left to launch.
    _check_finite(weight, scales, offset, called)
    return replace(
        single,
        scales=None,
        scale_codes=scale_codes,
        scale_scales=scale_scales,
        scale_offset=offset,
    )


def _check_finite(weight: Tensor, scales: Tensor, witness: Tensor, called: str) -> None:
    """Raises WeightError unless `witness`, the scales or their mean, is finite."""
    if bool(witness.isfinite().all()):
        return
    if not scales.isfinite().all():
        bad = int((~weight.isfinite()).sum())
        raise WeightError(
            f"{called} ({tuple(weight.shape)}, {weight.dtype}) holds {bad} value(s) that are NaN"
            " or infinite, so it cannot be quantised: the checkpoint is damaged or its training"
            " diverged. Use another one."
        )
    raise WeightError(
        f"{called} is too large for double quantisation: its scales, up to"
        f" {scales.max():.3g}, add up to more than float32 holds. Turn double quantisation off."
    )


@torch.no_grad()
def dequantize(
    q: QuantizedWeight,
    dtype: torch.dtype | None = None,
    *,
    out: Tensor | None = None,
    impl: Implementation = "auto",
) -> Tensor:
    """Decodes a quantised weight: level times scale in float32, rounded once to the result's type.

    Args:
        q: The weight.
        dtype: Type of the result: float32, bfloat16, float16 or float64; `q.dtype` by default.
        out: Where to write, instead of a new tensor, on the device of `q`: contiguous and of as
            many elements, in any shape; or of the shape of a matrix `q`, with a stride of 1 along
            one dimension, so rows with gaps between them or a transposed view.
        impl: As for `quantize`.

    Returns:
        `out`, or a new tensor of `q.shape`.

    Raises:
        ValueError: `dtype` or `out` is unfit.
        ConfigError: Unknown `impl`.
    """
    if dtype is None:
        dtype = q.dtype if out is None else out.dtype
    if out is not None and out.dtype != dtype:
        raise ValueError(f"dtype is {dtype} and out is {out.dtype}: give one, or make them equal")
    return dequantize_all([q], dtype, outs=None if out is None else [out], impl=impl)[0]


@torch.no_grad()
def dequantize_all(
    weights: Sequence[QuantizedWeight],
    dtype: torch.dtype,
    *,
    outs: Sequence[Tensor] | None = None,
    impl: Implementation = "auto",
) -> list[Tensor]:
    """Decodes several weights of one device to one type: on a GPU in one launch.

    Args:
        weights: The weights, at least one.
        dtype: As for `dequantize`.
        outs: As ``out`` of `dequantize`, for each.
        impl: As for `quantize`.

    Raises:
        ValueError: `dtype` or one of `outs` is unfit.
        ConfigError: Unknown `impl`.
    """
    backend = _backend(impl, weights[0].codes.device)
    if dtype not in (*FLOAT_TYPES, torch.float64):
        raise ValueError(f"can decode to float32, bfloat16, float16 or float64, not {dtype}")
    if outs is None:
        outs = [backend.empty(q.shape, dtype=dtype) for q in weights]
    for q, out in zip(weights, outs, strict=True):
        _check_out(q, dtype, out)
    if dtype == torch.float64:
        return [
            out.copy_(dequantize(q, torch.float32, impl=impl).view(out.shape))
            for q, out in zip(weights, outs, strict=True)
        ]
    backend.decode_all(weights, outs)
    return list(outs)


def _check_out(q: QuantizedWeight, dtype: torch.dtype, out: Tensor) -> None:
    whole = out.is_contiguous() and out.numel() == q.numel
    matrix = out.dim() == 2 and out.shape == q.shape and 1 in out.stride()
    if out.dtype != dtype or out.device != q.codes.device or not (whole or matrix):
        raise ValueError(
            f"out must be {dtype} on {q.codes.device}, and either contiguous with {q.numel}"
            f" elements or of shape {q.shape} with one stride of 1; it is {out.dtype} on"
            f" {out.device}, of shape {tuple(out.shape)} and strides {out.stride()}"
        )


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
        device: Where the tensors are; ``"meta"`` for no memory at all.

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
    """Raises ConfigError unless the two are of the format."""
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


class _Backend(NamedTuple):
    """The four things that `quantize` and `dequantize` leave to an implementation."""

    encode: Callable[[Tensor, QuantType, int], tuple[Tensor, Tensor]]
    encode_scales: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    decode_all: Callable[[Sequence[QuantizedWeight], Sequence[Tensor]], None]
    empty: Callable[..., Tensor]


def _backend(impl: Implementation, device: torch.device) -> _Backend:
    """The implementation to use on a device."""
    from halfbyte.quant import cpu

    if impl not in get_args(Implementation):
        raise ConfigError(f'impl must be "auto", "cpu", "gpu" or "torch", not {impl!r}')
    empty = partial(torch.empty, device=device)
    if device.type == "cpu" and impl in ("auto", "cpu") and (found := cpu.kernels()):
        return _Backend(found.encode, _encode_scales, _each(found.decode), found.empty)
    if device.type == "cuda" and impl in ("auto", "gpu") and (gpu := gpu_kernels()):
        return _Backend(gpu.encode, gpu.encode_scales, gpu.decode_all, empty)
    if impl in ("cpu", "gpu"):
        why = cpu.describe() if impl == "cpu" else "Triton on a CUDA device"
        raise ConfigError(
            f'impl "{impl}" cannot be had for a tensor on {device} ({why}): use "auto"'
        )
    encode = partial(_encode, cuda=device.type == "cuda")
    return _Backend(encode, _encode_scales, _each(_decode), empty)


def _each(
    decode: Callable[[QuantizedWeight, Tensor], None],
) -> Callable[[Sequence[QuantizedWeight], Sequence[Tensor]], None]:
    """Makes of a `decode` of one weight, to contiguous memory, one of several to any."""

    def decode_all(weights: Sequence[QuantizedWeight], outs: Sequence[Tensor]) -> None:
        for q, out in zip(weights, outs, strict=True):
            whole = out if out.is_contiguous() else out.new_empty(q.shape)
            decode(q, whole)
            if whole is not out:
                out.copy_(whole)

    return decode_all


@cache
def gpu_kernels() -> ModuleType | None:
    """Returns the Triton kernels, or None where there are none for the GPU; why is announced."""
    if torch.cuda.is_available():
        spec = devices.spec_of(torch.device("cuda"))
        if not spec.runs_triton:
            major, minor = spec.capability
            logger.warning(
                "%s has compute capability %d.%d, and Triton compiles for 7.5 and newer: what runs "
                "on it is plain PyTorch, which is slower",
                *(spec.name, major, minor),
            )
            return None
    try:
        from halfbyte.quant import triton_blockwise
    except ImportError as error:
        logger.warning(
            "no Triton (%s): what runs on a GPU is plain PyTorch, which is slower", error
        )
        return None
    return triton_blockwise


def _chunks(numel: int, block_size: int) -> Iterator[tuple[slice, slice]]:
    """Yields pieces of whole blocks as (elements, blocks); a short last block is its own piece."""
    whole = numel - numel % block_size
    for start in range(0, whole, _CHUNK):
        stop = min(start + _CHUNK, whole)
        yield slice(start, stop), slice(start // block_size, stop // block_size)
    if whole < numel:
        yield slice(whole, numel), slice(whole // block_size, whole // block_size + 1)


def _encode(
    flat: Tensor, quant_type: QuantType, block_size: int, *, cuda: bool = False
) -> tuple[Tensor, Tensor]:
    """Codes (packed, as QuantizedWeight's) and scales of flat values.

    Those of bitsandbytes' CPU code, or with `cuda` those of its CUDA code.
    """
    numel = flat.numel()
    codes = torch.empty(ceil(numel / 2), dtype=torch.uint8, device=flat.device)
    scales = torch.empty(ceil(numel / block_size), dtype=torch.float32, device=flat.device)
    order = code_order(quant_type)
    bounds = blockwise.midpoints(levels_of(quant_type)[order])
    by_magnitude = cuda and quant_type == "fp4"
    if cuda:
        bounds, order = blockwise.cuda_bounds(quant_type)
    order, bounds = order.to(flat.device, torch.uint8), bounds.to(flat.device)
    zero = order[torch.bucketize(bounds.new_zeros(1), bounds)]
    for elements, blocks in _chunks(numel, block_size):
        values = flat[elements].float().view(blocks.stop - blocks.start, -1)
        short = values.shape[1] < block_size and not cuda
        maxima = blockwise.block_maxima(values)
        # bitsandbytes stores the raised scale of a short block, and the true one of others.
        scales[blocks] = maxima.clamp(min=blockwise.SMALLEST_SCALE) if short else maxima
        levels = values.abs() if by_magnitude else values
        ranks = blockwise.nearest(levels, maxima, bounds, divide=short)
        nibbles = order[ranks.view(-1)]
        if by_magnitude:
            nibbles = nibbles | (values.view(-1) < 0).to(torch.uint8) << 3
        if len(nibbles) % 2:
            nibbles = torch.cat([nibbles, zero])
        codes[elements.start // 2 : ceil(elements.stop / 2)] = nibbles[::2] << 4 | nibbles[1::2]
    return codes, scales


def _encode_scales(scales: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of ``scales - offset``, and the scales of these."""
    return blockwise.encode_dynamic(scales - offset, SCALE_BLOCK, cuda=scales.is_cuda)


def _decode(q: QuantizedWeight, out: Tensor) -> None:
    """Decodes into `out`, contiguous."""
    out = out.view(-1)
    # Indexing a table of both values of a byte is the fastest way through plain PyTorch.
    levels = levels_of(q.quant_type)
    pairs = torch.cartesian_prod(levels, levels).to(out.device)
    scales = q.block_scales()
    for elements, blocks in _chunks(q.numel, q.block_size):
        packed = q.codes[elements.start // 2 : ceil(elements.stop / 2)].int()
        values = pairs.index_select(0, packed).view(-1)[: elements.stop - elements.start]
        rows = values.view(blocks.stop - blocks.start, -1)
        out[elements] = rows.mul_(scales[blocks, None]).view(-1)
