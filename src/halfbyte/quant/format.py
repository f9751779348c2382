"""Packs weights to 4 bits and decodes them: the specification in plain PyTorch, and the dispatch.

`dequantize` and `dequantize_all` take weights of both formats, `QuantizedWeight` and `MXFP4Weight`
(mxfp4.py has its specification); a table of each implementation has a decoder for each.

`quantize` and `dequantize` choose between the C++ kernels of cpu.py, the Triton kernels of
triton_blockwise.py, and the plain PyTorch here, which is the specification. They agree bit for bit,
except for encoding on a GPU: reciprocals are approximate there, as in bitsandbytes, so a quotient
within one bit of a bound may get the neighbouring code.

Decoding is the same everywhere. Encoding gives the bytes of bitsandbytes on the same kind of
device; its CPU and CUDA code differ in the rounding of scale codes, in FP4's bounds, and in a short
last block. There is one difference: a block of zeros gets the code of zero, whereas bitsandbytes'
CUDA code gives it that of -1, which with double quantisation decodes to a few millionths instead of
to 0.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import groupby
from math import ceil
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from halfbyte.errors import ConfigError, WeightError
from halfbyte.quant import blockwise, mxfp4
from halfbyte.quant.mxfp4 import MXFP4Weight
from halfbyte.quant.weight import (
    FLOAT_TYPES,
    SCALE_BLOCK,
    QuantizedWeight,
    QuantType,
    check_format,
    code_order,
    levels_of,
)
from halfbyte.runtime import device as devices

Implementation = Literal["auto", "cpu", "gpu", "torch"]

PackedWeight = QuantizedWeight | MXFP4Weight
"""A weight that `dequantize` decodes."""

logger = logging.getLogger("halfbyte")

# Elements the plain versions process at a time: limits their temporaries to a few tens of MB.
_CHUNK = 2**20


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

    Needs a few tens of MB in addition to the result, and a copy of a weight that is not contiguous.

    Args:
        weight: float32, bfloat16 or float16, any shape, finite.
        quant_type: Table of levels, ``"nf4"`` or ``"fp4"``.
        block_size: Elements that share one scale: a power of two from 32 to 4096.
        double_quant: Whether to quantise the scales too (4.127 bits per weight instead of 4.5).
        name: Name of the weight in error messages.
        impl: ``"torch"`` for plain PyTorch, ``"cpu"`` for the C++ kernels, ``"gpu"`` for Triton's,
            ``"auto"`` for the kernels of the device if available. The top of this file says where
            their bytes may differ.

    Returns:
        The quantised weight, on the device of `weight`.

    Raises:
        ConfigError: Unknown `quant_type`, `block_size` or `impl`.
        WeightError: NaN or infinity in `weight`, another dtype, or scales so large that their mean
            cannot be computed.
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
    # torch's summation order, and so the last bit of the offset, depends on its number of threads.
    # bitsandbytes uses the same order.
    offset = scales.mean() if len(scales) else scales.new_zeros(())
    scale_codes, scale_scales = backend.encode_scales(scales, offset)
    # Last, since on a GPU this synchronises and there is nothing left to launch.
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
    q: PackedWeight,
    dtype: torch.dtype | None = None,
    *,
    out: Tensor | None = None,
    impl: Implementation = "auto",
) -> Tensor:
    """Decodes a quantised weight: level times scale in float32, rounded once to the result's type.

    Args:
        q: The weight.
        dtype: Type of the result: float32, bfloat16, float16 or float64; `q.dtype` by default.
        out: Output instead of a new tensor, on the device of `q`: contiguous with the same number
            of elements, in any shape; or with the shape of a matrix `q` and a stride of 1 along one
            dimension, such as strided rows or a transposed view.
        impl: As for `quantize`.

    Returns:
        `out`, or a new tensor of `q.shape`.

    Raises:
        ValueError: `dtype` or `out` is not supported.
        ConfigError: Unknown `impl`.
    """
    if dtype is None:
        dtype = q.dtype if out is None else out.dtype
    if out is not None and out.dtype != dtype:
        raise ValueError(f"dtype is {dtype} and out is {out.dtype}: give one, or make them equal")
    return dequantize_all([q], dtype, outs=None if out is None else [out], impl=impl)[0]


@torch.no_grad()
def dequantize_all(
    weights: Sequence[PackedWeight],
    dtype: torch.dtype,
    *,
    outs: Sequence[Tensor] | None = None,
    impl: Implementation = "auto",
) -> list[Tensor]:
    """Decodes several weights on one device to one dtype; on a GPU those of a format in one launch.

    Args:
        weights: The weights, at least one, of any formats.
        dtype: As for `dequantize`.
        outs: As ``out`` of `dequantize`, for each.
        impl: As for `quantize`.

    Raises:
        ValueError: `dtype` or one of `outs` is not supported.
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
    for kind, group in groupby(zip(weights, outs, strict=True), lambda pair: type(pair[0])):
        some, their_outs = zip(*group, strict=True)
        backend.decode_all[kind](some, their_outs)
    return list(outs)


def _check_out(q: PackedWeight, dtype: torch.dtype, out: Tensor) -> None:
    whole = out.is_contiguous() and out.numel() == q.numel
    matrix = out.dim() == 2 and out.shape == q.shape and 1 in out.stride()
    if out.dtype != dtype or out.device != q.codes.device or not (whole or matrix):
        raise ValueError(
            f"out must be {dtype} on {q.codes.device}, and either contiguous with {q.numel}"
            f" elements or of shape {q.shape} with one stride of 1; it is {out.dtype} on"
            f" {out.device}, of shape {tuple(out.shape)} and strides {out.stride()}"
        )


_Decode = Callable[[Any, Tensor], None]
_Decoders = Mapping[type[PackedWeight], _Decode]
_DecodeAll = Callable[[Sequence[Any], Sequence[Tensor]], None]


class _Backend(NamedTuple):
    """An implementation of `quantize` and `dequantize`; ``decode_all`` is by type of the weight."""

    encode: Callable[[Tensor, QuantType, int], tuple[Tensor, Tensor]]
    encode_scales: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    decode_all: Mapping[type[PackedWeight], _DecodeAll]
    empty: Callable[..., Tensor]


def _backend(impl: Implementation, device: torch.device) -> _Backend:
    """The implementation to use on a device."""
    from halfbyte.quant import cpu

    if impl not in get_args(Implementation):
        raise ConfigError(f'impl must be "auto", "cpu", "gpu" or "torch", not {impl!r}')
    empty = partial(torch.empty, device=device)
    if device.type == "cpu" and impl in ("auto", "cpu") and (found := cpu.kernels()):
        decoders: _Decoders = {QuantizedWeight: found.decode, MXFP4Weight: found.decode_mxfp4}
        return _Backend(found.encode, _encode_scales, _each(decoders), found.empty)
    if device.type == "cuda" and impl in ("auto", "gpu") and (gpu := gpu_kernels()):
        from halfbyte.quant import triton_mxfp4

        launchers = {QuantizedWeight: gpu.decode_all, MXFP4Weight: triton_mxfp4.decode_all}
        return _Backend(gpu.encode, gpu.encode_scales, launchers, empty)
    if impl in ("cpu", "gpu"):
        why = cpu.describe() if impl == "cpu" else "Triton on a CUDA device"
        raise ConfigError(
            f'impl "{impl}" is not available for a tensor on {device} ({why}): use "auto"'
        )
    encode = partial(_encode, cuda=device.type == "cuda")
    specification: _Decoders = {QuantizedWeight: _decode, MXFP4Weight: mxfp4.decode}
    return _Backend(encode, _encode_scales, _each(specification), empty)


def _each(decoders: _Decoders) -> dict[type[PackedWeight], _DecodeAll]:
    """Turns decoders of one weight to contiguous memory into those of several to any memory."""

    def decode_all(decode: _Decode, weights: Sequence[Any], outs: Sequence[Tensor]) -> None:
        for q, out in zip(weights, outs, strict=True):
            whole = out if out.is_contiguous() else out.new_empty(q.shape)
            decode(q, whole)
            if whole is not out:
                out.copy_(whole)

    return {kind: partial(decode_all, decode) for kind, decode in decoders.items()}


@cache
def gpu_kernels() -> ModuleType | None:
    """Returns the Triton kernels, or None if the GPU is not supported; the reason is logged."""
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
        logger.warning("no Triton (%s): plain PyTorch is used on the GPU, which is slower", error)
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
        # bitsandbytes stores the raised scale for a short block, and the true one for others.
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
    """Codes of ``scales - offset``, and their scales."""
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
