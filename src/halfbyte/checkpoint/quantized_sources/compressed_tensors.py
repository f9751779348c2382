"""compressed-tensors, as llm-compressor writes it: several number formats, described by groups.

``config_groups`` has a scheme for each group of layers: bits, int or float, one scale for a tensor,
a channel (row), a group of inputs or a block. A linear is, by ``format``,

    pack-quantized         weight_packed int32 [out, ⌈in · bits / 32⌉], codes plus 2^(bits - 1);
                           weight_scale [out, groups]; weight_shape int64 [2]; if not symmetric
                           weight_zero_point int32 [⌈out · bits / 32⌉, groups], packed along out;
                           if reordered weight_g_idx int32 [in]
    int-quantized          weight int8, weight_scale; weight_zero_point int8 if not symmetric
    float-quantized        weight float8_e4m3fn, weight_scale
    naive-quantized        either
    nvfp4-pack-quantized   weight_packed uint8 [out, in / 2], two E2M1 in a byte; weight_scale
                           float8_e4m3fn [out, in / 16], over weight_global_scale float32 [1]
    mxfp4-pack-quantized   the same with weight_scale uint8 (E8M0) [out, in / 32] alone
    mxfp8-quantized        weight float8_e4m3fn, weight_scale uint8 (E8M0) [out, in / 32]

and W = weight_scale · (code - zero point). Scales of activations are ignored.

Source: compressed-tensors 0.20, ``compressors/`` and ``quantization/lifecycle/``.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from halfbyte.checkpoint.quantized_sources.arithmetic import (
    dequantize_blocks,
    dequantize_columns,
    exponents,
    unpack,
    unpack_e2m1,
)
from halfbyte.checkpoint.quantized_sources.fp8 import FP8, IGNORED, scaled_weight
from halfbyte.checkpoint.quantized_sources.weight import (
    FLOAT_TYPES,
    Found,
    Headers,
    Options,
    Read,
    StoredWeight,
    scale_shape,
)

_PLAIN = ("int-quantized", "float-quantized", "naive-quantized", "mxfp8-quantized")
_FP4 = {"nvfp4-pack-quantized": 16, "mxfp4-pack-quantized": 32}
_FORMATS = ("pack-quantized", *_PLAIN, *_FP4)


class _Scheme(NamedTuple):
    """How the weights of one group are quantised.

    Attributes:
        format: One of ``_FORMATS``.
        bits: Bits of a code.
        symmetric: Whether there are no zero points.
        block: Rows and columns that share a scale, or None: a whole row, or all.
        targets: Names of modules, patterns (``re:…``) and classes.
    """

    format: str
    bits: int
    symmetric: bool
    block: tuple[int, int] | None
    targets: tuple[str, ...]


def find(options: Options, headers: Headers, dtype: torch.dtype) -> Found:
    """Find the weights of a model in the layouts of compressed-tensors.

    Args:
        options: Its ``quantization_config``.
        headers: Its files.
        dtype: The decoded dtype of weights whose scales are not of 16 bits.

    Raises:
        CheckpointError: If an option is not supported, or a tensor is missing or does not fit.
    """
    sparsity = options.get("sparsity_config", {})
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise options.wrong("sparsity_config", sparsity.get("format"), "dense")
    own = options.choice("format", (*_FORMATS, "mixed-precision"), "pack-quantized")
    schemes = _schemes(options, own)
    options.ignore("ignore", "quantization_status", "global_compression_ratio", "version")
    options.ignore("kv_cache_scheme", "sparsity_config")
    options.finish()
    weights = [
        _packed(headers, prefix, _scheme_of(options, schemes, prefix), dtype)
        for prefix in headers.with_suffix(".weight_packed")
    ]
    for key in (*headers.of_dtype(FP8), *headers.of_dtype(torch.int8)):
        if key.endswith(".weight"):
            scheme = _scheme_of(options, schemes, key.removesuffix(".weight"))
            weights.append(_plain(headers, key, scheme, dtype))
    return Found(weights, f"compressed-tensors ({own})", headers.ending_in(IGNORED))


def _schemes(options: Options, own: str) -> list[_Scheme]:
    """Return the scheme of each group of ``config_groups`` that has quantised weights."""
    groups = options.get("config_groups", {})
    if not isinstance(groups, dict) or not all(isinstance(each, dict) for each in groups.values()):
        raise options.wrong("config_groups", groups, "an object for each group of layers")
    found = []
    for group in groups.values():
        if group.get("weights") is None:
            continue  # a scheme of activations alone leaves the weights as they are
        form = own if own != "mixed-precision" else group.get("format")
        if form not in _FORMATS:
            raise options.wrong("format", form, " or ".join(_FORMATS))
        found.append(_scheme(options, group, form))
    return found


def _scheme(options: Options, group: Mapping[str, Any], form: str) -> _Scheme:
    weights = group["weights"] if isinstance(group["weights"], dict) else {}
    bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
    floating = form in _FP4 or form in ("float-quantized", "mxfp8-quantized")
    widths = range(1, 9) if form == "pack-quantized" else (4,) if form in _FP4 else (8,)
    if type(bits) is not int or bits not in widths:
        raise options.wrong("num_bits", bits, f"{widths[0]} to {widths[-1]} in {form}")
    if kind != ("float" if floating else kind if form == "naive-quantized" else "int"):
        raise options.wrong("type", kind, f"what {form} has")
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None:
        strategy = "group" if type(size) is int and size > 0 else "channel"
    block: Any = None
    if strategy in ("group", "tensor_group"):
        block = [1, size]
    elif strategy == "block":
        block = weights.get("block_structure")
    elif strategy not in ("tensor", "channel"):
        raise options.wrong("strategy", strategy, "tensor, channel, group or block")
    if block is not None and (
        not isinstance(block, list)
        or [type(n) for n in block] != [int, int]
        or not all(0 < n <= 2**24 for n in block)
    ):
        raise options.wrong(
            "block_structure" if strategy == "block" else "group_size", block, "> 0"
        )
    targets = group.get("targets", [])
    if not isinstance(targets, list) or not all(isinstance(each, str) for each in targets):
        raise options.wrong("targets", targets, "a list of names")
    symmetric = weights.get("symmetric", True)
    return _Scheme(form, bits, bool(symmetric), tuple(block) if block else None, tuple(targets))


def _scheme_of(options: Options, schemes: list[_Scheme], module: str) -> _Scheme:
    """Return the scheme of a module: of the group that names it, by a pattern or else by class.

    Names are not looked at if there is one scheme only: what is quantised is quantised by it.
    """
    if len({scheme._replace(targets=()) for scheme in schemes}) == 1:
        return schemes[0]

    def rank(target: str) -> int:
        if target.startswith("re:"):
            return 1 if re.match(target[3:], module) else -1
        if "." in target or target == module:
            return 2 if target == module else -1
        return 0  # a class, such as Linear: what is quantised is one

    best: tuple[int, _Scheme] | None = None
    try:
        for scheme in schemes:
            degree = max(map(rank, scheme.targets), default=-1)
            if degree >= 0 and (best is None or degree > best[0]):
                best = (degree, scheme)
    except re.error as error:
        raise options.wrong("targets", str(error), "valid patterns") from error
    if best is None:
        raise options.wrong("config_groups", f"no group for {module}", "a group for each weight")
    return best[1]


def _packed(headers: Headers, prefix: str, scheme: _Scheme, dtype: torch.dtype) -> StoredWeight:
    """Return a weight whose codes are packed in ``weight_packed``."""
    if scheme.format in _FP4:
        return _fp4(headers, prefix, scheme, dtype)
    if scheme.format != "pack-quantized":
        raise headers.wrong(f"{prefix}.weight_packed", f"is there in the format {scheme.format}")
    names = {leaf: f"{prefix}.weight_{leaf}" for leaf in ("packed", "scale", "shape", "zero_point")}
    outputs, words = headers.matrix(names["packed"], torch.int32)
    # The exact number is in weight_shape, a value: what fits exactly is assumed, and checked then.
    shape = (outputs, words * 32 // scheme.bits)
    headers.expect(names["shape"], (torch.int64, torch.int32), (2,))
    scale = headers.expect(names["scale"], FLOAT_TYPES)
    block = headers.grid(names["packed"], names["scale"], shape, scheme.block)
    members = [names["packed"], names["scale"], names["shape"]]
    if not scheme.symmetric:
        expected = (-(-outputs * scheme.bits // 32), -(-shape[1] // block[1]))
        members.append(headers.expect(names["zero_point"], torch.int32, expected).name)
    index = headers.get(f"{prefix}.weight_g_idx")
    if index is not None:
        members.append(headers.expect(index.name, torch.int32, (shape[1],)).name)
    kept = dtype if scale.dtype == torch.float32 else scale.dtype
    decode = partial(_decode_packed, headers, prefix, scheme, shape, block, kept, index is not None)
    return StoredWeight(f"{prefix}.weight", tuple(members), shape, kept, decode)


def _decode_packed(
    headers: Headers,
    prefix: str,
    scheme: _Scheme,
    shape: tuple[int, int],
    block: tuple[int, int],
    dtype: torch.dtype,
    indexed: bool,
    read: Read,
) -> Tensor:
    named = read(f"{prefix}.weight_shape").tolist()
    if named != list(shape):
        raise headers.wrong(f"{prefix}.weight_shape", f"is {named}, the codes are {list(shape)}")
    codes = unpack(read(f"{prefix}.weight_packed"), scheme.bits)
    scales = read(f"{prefix}.weight_scale")
    scales = scales.reshape(scale_shape(tuple(scales.shape), 2))
    zeros: Tensor | float = float(2 ** (scheme.bits - 1))
    if not scheme.symmetric:
        zeros = unpack(read(f"{prefix}.weight_zero_point").T, scheme.bits).T[: shape[0]]
    if indexed:
        groups = read(f"{prefix}.weight_g_idx")
        # All -1 where no order has been given.
        if not bool((groups == -1).all()):
            low, high = groups.aminmax()
            if not 0 <= low <= high < scales.shape[1]:
                raise headers.wrong(f"{prefix}.weight_g_idx", "names groups that do not exist")
            return dequantize_columns(
                codes,
                scales,
                zeros if isinstance(zeros, Tensor) else torch.full_like(scales, zeros),
                groups,
                dtype,
            )
    return dequantize_blocks(codes, scales, block, dtype, zeros)


def _plain(headers: Headers, key: str, scheme: _Scheme, dtype: torch.dtype) -> StoredWeight:
    """Return a weight whose codes are numbers of 8 bits, under its own key."""
    if scheme.format not in _PLAIN:
        raise headers.wrong(key, f"is of 8 bits in the format {scheme.format}")
    weight = scaled_weight(headers, key, f"{key}_scale", scheme.block, dtype)
    zero_point, scale = f"{key}_zero_point", f"{key}_scale"
    if scheme.symmetric and headers.get(zero_point) is None:
        return weight
    own = headers.get(scale)
    assert own is not None
    headers.expect(zero_point, (torch.int8, FP8), own.shape)
    block = headers.grid(key, scale, weight.shape, scheme.block)
    decode = partial(_decode_with_zeros, (key, scale, zero_point), block, weight.dtype)
    return StoredWeight(key, (key, scale, zero_point), weight.shape, weight.dtype, decode)


def _decode_with_zeros(
    members: tuple[str, ...], block: tuple[int, int], dtype: torch.dtype, read: Read
) -> Tensor:
    codes, scales, zeros = (read(key) for key in members)
    shape = scale_shape(tuple(scales.shape), codes.dim())
    return dequantize_blocks(codes, scales.reshape(shape), block, dtype, zeros.reshape(shape))


def _fp4(headers: Headers, prefix: str, scheme: _Scheme, dtype: torch.dtype) -> StoredWeight:
    packed, scale = f"{prefix}.weight_packed", f"{prefix}.weight_scale"
    outputs, halves = headers.matrix(packed, torch.uint8)
    size, nvidia = _FP4[scheme.format], scheme.format.startswith("nv")
    kind = FP8 if nvidia else (torch.uint8, torch.float8_e8m0fnu)
    if 2 * halves % size:
        raise headers.wrong(packed, f"has {2 * halves} columns, expected a multiple of {size}")
    headers.expect(scale, kind, (outputs, 2 * halves // size))
    members = [packed, scale]
    if nvidia:
        whole = headers.expect(f"{prefix}.weight_global_scale", torch.float32)
        if whole.shape not in ((), (1,)):
            raise headers.wrong(whole.name, f"has shape {list(whole.shape)}, expected is a number")
        members.append(whole.name)
    decode = partial(_decode_fp4, tuple(members), size, dtype)
    return StoredWeight(f"{prefix}.weight", tuple(members), (outputs, 2 * halves), dtype, decode)


def _decode_fp4(members: tuple[str, ...], size: int, dtype: torch.dtype, read: Read) -> Tensor:
    scales = exponents(read(members[1]))
    for key in members[2:]:
        scales = scales / read(key).reshape(())
    return dequantize_blocks(unpack_e2m1(read(members[0])), scales, (1, size), dtype)
