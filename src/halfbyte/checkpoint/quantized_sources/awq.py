"""AWQ, as AutoAWQ writes it, in the layouts of its three kernels (``version``).

A linear of shape [out, in], in groups of g along in, is

    gemm        qweight  int32 [in, out / 8]        packed along out, in the order below
                qzeros   int32 [in / g, out / 8]    likewise
                scales   float16 [in / g, out]
    gemv        qweight  int32 [out, in / 8]        packed along in, in order
                qzeros   int32 [out, Z]             likewise along groups, padded
                scales   float16 [out, 8Z]          padded
    gemv_fast   qweight  int16 [out / 4, in]        below
                qzeros   float16 [8Z, out]          minus scale times zero point, padded
                scales   float16 [8Z, out]          padded

and W = scale · (code - zero). gemm packs outputs 0 2 4 6 1 3 5 7 of eight into a word, the low bits
first. Z is the number of groups over 8, rounded up and then, for groups of 64 and 32, to a multiple
of 2 and 4.

gemv_fast interleaves four rows of 64 inputs each. Of a row, each 32 inputs are 4 x 4 pairs, which
are transposed; then each 8 are put in gemm's order. Four rows of 64 follow each other, and each
four of these numbers are one word.

Sources: AutoAWQ 0.2.9, ``modules/linear/gemm.py``, ``gemv.py`` and ``gemv_fast.py``.
"""

from functools import partial

import torch
from torch import Tensor

from halfbyte.checkpoint.quantized_sources.arithmetic import (
    dequantize_blocks,
    unpack,
    unpack_rows,
)
from halfbyte.checkpoint.quantized_sources.weight import (
    FLOAT_TYPES,
    Found,
    Headers,
    Options,
    Read,
    StoredWeight,
)

_BITS = 4
# Where the bits of output i of eight are in a word: the inverse of the order 0 2 4 6 1 3 5 7.
_SHIFTS = tuple(_BITS * place for place in (0, 4, 1, 5, 2, 6, 3, 7))


def find(options: Options, headers: Headers, dtype: torch.dtype) -> Found:
    """Find the weights of a model quantised by AWQ.

    Args:
        options: Its ``quantization_config``.
        headers: Its files.
        dtype: The decoded dtype of weights whose scales are float32.

    Raises:
        CheckpointError: If an option is not supported, or a tensor is missing or does not fit.
    """
    options.choice("w_bit", (_BITS,), options.choice("bits", (_BITS,), _BITS))
    group_size = options.get("q_group_size")
    group_size = options.group_size(128 if group_size is None else group_size)
    options.choice("zero_point", (True,), True)
    layouts = {"gemm": _gemm, "gemv": _gemv, "gemv_fast": _gemv_fast}
    made_as = str(options.get("format", "gemm")).lower()
    version = str(options.get("version", made_as)).lower()
    if version not in layouts:
        raise options.wrong("version", version, " or ".join(layouts))
    if options.get("backend") == "llm-awq":
        raise options.wrong("backend", "llm-awq", "AutoAWQ's own layout")
    options.ignore("modules_to_not_convert", "do_fuse", "fuse_max_seq_len", "modules_to_fuse")
    options.ignore("exllama_config", "meta", "desc_act", "sym", "lm_head")
    options.finish()
    found = headers.with_suffix(".qweight")
    weights = [layouts[version](headers, prefix, group_size, dtype) for prefix in found]
    groups = "whole rows" if group_size == -1 else f"groups of {group_size}"
    return Found(weights, f"AWQ ({_BITS} bits, {groups})", [])


def _group_size(headers: Headers, prefix: str, inputs: int, group_size: int) -> int:
    size = inputs if group_size == -1 else group_size
    if inputs % size:
        raise headers.wrong(
            f"{prefix}.qweight", f"has {inputs} inputs, which groups of {size} do not divide"
        )
    return size


def _kept(headers: Headers, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a weight with the scales in ``key``."""
    own = headers.expect(key, FLOAT_TYPES, shape).dtype
    return dtype if own == torch.float32 else own


def _members(prefix: str) -> tuple[str, ...]:
    return (f"{prefix}.qweight", f"{prefix}.qzeros", f"{prefix}.scales")


def _gemm(headers: Headers, prefix: str, group_size: int, dtype: torch.dtype) -> StoredWeight:
    codes, zeros, scales = members = _members(prefix)
    inputs, words = headers.matrix(codes, torch.int32)
    size = _group_size(headers, prefix, inputs, group_size)
    headers.expect(zeros, torch.int32, (inputs // size, words))
    kept = _kept(headers, scales, (inputs // size, 8 * words), dtype)
    decode = partial(_decode_gemm, members, size, kept)
    return StoredWeight(f"{prefix}.weight", members, (8 * words, inputs), kept, decode)


def _decode_gemm(
    members: tuple[str, ...], group_size: int, dtype: torch.dtype, read: Read
) -> Tensor:
    codes, zeros = (unpack_rows(read(key).T.contiguous(), _SHIFTS) for key in members[:2])
    return dequantize_blocks(codes, read(members[2]).T, (1, group_size), dtype, zeros)


def _gemv(headers: Headers, prefix: str, group_size: int, dtype: torch.dtype) -> StoredWeight:
    codes, zeros, scales = members = _members(prefix)
    outputs, words = headers.matrix(codes, torch.int32)
    inputs = 8 * words
    size = _group_size(headers, prefix, inputs, group_size)
    width = _padded(inputs // size, size)
    headers.expect(zeros, torch.int32, (outputs, width))
    kept = _kept(headers, scales, (outputs, 8 * width), dtype)
    decode = partial(_decode_gemv, members, inputs // size, size, kept)
    return StoredWeight(f"{prefix}.weight", members, (outputs, inputs), kept, decode)


def _padded(groups: int, size: int) -> int:
    """Return Z, the words of the zero points of a row."""
    multiple = 8 * {64: 2, 32: 4}.get(size, 1)
    return -(-groups // multiple) * multiple // 8


def _decode_gemv(
    members: tuple[str, ...], groups: int, group_size: int, dtype: torch.dtype, read: Read
) -> Tensor:
    codes, zeros = (unpack(read(key), _BITS) for key in members[:2])
    scales = read(members[2])[:, :groups]
    return dequantize_blocks(codes, scales, (1, group_size), dtype, zeros[:, :groups])


def _gemv_fast(headers: Headers, prefix: str, group_size: int, dtype: torch.dtype) -> StoredWeight:
    codes, zeros, scales = members = _members(prefix)
    rows, inputs = headers.matrix(codes, torch.int16)
    size = _group_size(headers, prefix, inputs, group_size)
    if inputs % 64:
        raise headers.wrong(codes, f"has {inputs} inputs, expected a multiple of 64")
    shape = (8 * _padded(inputs // size, size), 4 * rows)
    headers.expect(zeros, FLOAT_TYPES, shape)
    kept = _kept(headers, scales, shape, dtype)
    decode = partial(_decode_gemv_fast, members, inputs // size, size, kept)
    return StoredWeight(f"{prefix}.weight", members, (4 * rows, inputs), kept, decode)


def _decode_gemv_fast(
    members: tuple[str, ...], groups: int, group_size: int, dtype: torch.dtype, read: Read
) -> Tensor:
    words = read(members[0])
    rows, columns = 4 * words.shape[0], words.shape[1]
    codes = unpack(words, _BITS).view(rows // 4, columns // 64, 4, 64).transpose(1, 2)
    codes = codes.reshape(rows, columns // 32, 4, 2, 4).transpose(3, 4)
    codes = codes.reshape(rows, columns // 32, 4, 4, 2).transpose(2, 3)
    offsets, scales = (read(key)[:groups].T for key in members[1:])
    block = (1, group_size)
    return dequantize_blocks(codes.reshape(rows, columns), scales, block, dtype, offsets=offsets)
