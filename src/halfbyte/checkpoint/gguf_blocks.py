"""The block types of GGUF files, decoded to float32 and encoded, by torch on any device.

A block is 32 or 256 numbers: float16 scales, some bits of scales of sub-blocks, and the codes. Each
decoder takes blocks as uint8 [N, bytes] and returns float32 [N, numbers], each number by the same
products and sums, rounded in the same order, as in the ``gguf`` package, which is the reference in
tests. That package uses numpy: 2 s for the 135 M weights of SmolLM2, and 100 s for those of a 7B
model, which a GPU decodes in the time of reading the file. Types not listed here are decoded by it.
"""

from collections.abc import Callable

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from halfbyte.checkpoint.gguf_k_quants import to_q3_k, to_q4_k, to_q5_k, to_q6_k
from halfbyte.quant.mxfp4 import DOUBLED_LEVELS, half_scales

# Numbers decoded at a time. On a CPU no more than torch computes in one thread: temporaries stay in
# the cache (135 M numbers of q4_1 in 0.9 s of one core; 1.4 s at 2**18), and no small operation
# waits at a barrier for cores that other programs hold (64 s, on two busy ones).
_CPU_CHUNK, _PACKAGE_CHUNK, _GPU_CHUNK = 2**15, 2**20, 2**26


def decode(raw: Tensor, kind: GGMLQuantizationType) -> Tensor:
    """Decode whole blocks.

    Args:
        raw: uint8 [bytes], contiguous, on any device.
        kind: Type of the blocks.

    Returns:
        float32 [numbers], on the device of ``raw``. A damaged scale gives infinities or NaN.

    Raises:
        NotImplementedError: If neither we nor the gguf package can decode this type.
    """
    numbers, nbytes = GGML_QUANT_SIZES[kind]
    if kind not in _DECODERS:
        return _by_package(raw, kind)
    blocks = raw.view(-1, nbytes)
    out = torch.empty(len(blocks), numbers, dtype=torch.float32, device=raw.device)
    step = max(1, (_GPU_CHUNK if raw.is_cuda else _CPU_CHUNK) // numbers)
    for some, target in zip(torch.split(blocks, step), torch.split(out, step), strict=True):
        target.copy_(_DECODERS[kind](some).view_as(target))
    return out.view(-1)


def _by_package(raw: Tensor, kind: GGMLQuantizationType) -> Tensor:
    numbers, nbytes = GGML_QUANT_SIZES[kind]
    out = torch.empty(raw.numel() // nbytes * numbers, dtype=torch.float32)
    step = max(1, _PACKAGE_CHUNK // numbers)
    pieces = torch.split(raw.cpu(), step * nbytes)
    parts = zip(pieces, torch.split(out, step * numbers), strict=True)
    with np.errstate(all="ignore"):
        for some, target in parts:
            # As one row: the package processes 16 rows at a time, however short they are.
            target.numpy()[:] = gguf.dequantize(some.numpy().reshape(1, -1), kind).reshape(-1)
    return out.to(raw.device)


def _half(blocks: Tensor, at: int) -> Tensor:
    """Return the float16 at a byte of each block, as float32 [N, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _fields(packed: Tensor, width: int, bits: int, count: int | None = None) -> Tensor:
    """Unpack bytes: for each ``width`` of them, all lowest fields of ``bits`` bits, then the next.

    Returns:
        uint8 [N, groups, fields of a byte, width].
    """
    groups = packed.reshape(len(packed), -1, 1, width)
    fields = [(groups >> shift) & (2**bits - 1) for shift in range(0, 8, bits)][:count]
    return torch.cat(fields, 2)


def _bits(packed: Tensor) -> Tensor:
    """Return the bits of each byte, the lowest first: uint8 [N, 8 · bytes]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, :, None] >> shifts) & 1).flatten(1)


def _nibbles(packed: Tensor) -> Tensor:
    return torch.cat((packed & 15, packed >> 4), 1)


def _q4_0(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 2:]).float().sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 4:]).float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 6:]) | (_bits(blocks[:, 2:6]) << 4)
    return codes.float().sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 8:]) | (_bits(blocks[:, 4:8]) << 4)
    return codes.float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _mxfp4(blocks: Tensor) -> Tensor:
    # As in the gguf package, zeros have no sign.
    levels = torch.where(DOUBLED_LEVELS == 0, 0.0, DOUBLED_LEVELS).to(blocks.device)
    return levels[_nibbles(blocks[:, 1:]).int()].mul_(half_scales(blocks[:, :1]))


def _q2_k(blocks: Tensor) -> Tensor:
    scales, codes = blocks[:, :16], _fields(blocks[:, 16:80], 32, 2)
    step = (scales & 15).float().mul_(_half(blocks, 80))[:, :, None]
    least = (scales >> 4).float().mul_(_half(blocks, 82))[:, :, None]
    return codes.reshape(-1, 16, 16).float().mul_(step).sub_(least)


def _q3_k(blocks: Tensor) -> Tensor:
    low = _fields(blocks[:, 96:104], 8, 4).reshape(-1, 16)
    high = _fields(blocks[:, 104:108], 4, 2).reshape(-1, 16)
    scales = (low | (high << 4)).float().sub_(32).mul_(_half(blocks, 108))[:, :, None]
    codes = _fields(blocks[:, 32:96], 32, 2).reshape(-1, 16, 16)
    # 4 is subtracted if the third bit is not set.
    unset = 1 - _fields(blocks[:, :32], 32, 1).reshape(-1, 16, 16)
    return codes.float().sub_((unset << 2).float()).mul_(scales)


def _scales_and_least(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the steps and the minima of the 8 sub-blocks of q4_k and q5_k: float32 [N, 8, 1]."""
    low, least, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((low & 63, (high & 15) | ((low >> 2) & 48)), 1)
    minima = torch.cat((least & 63, (high >> 4) | ((least >> 2) & 48)), 1)
    step = scales.float().mul_(_half(blocks, 0))
    return step[:, :, None], minima.float().mul_(_half(blocks, 2))[:, :, None]


def _q4_k(blocks: Tensor) -> Tensor:
    step, least = _scales_and_least(blocks)
    codes = _fields(blocks[:, 16:], 32, 4).reshape(-1, 8, 32)
    return codes.float().mul_(step).sub_(least)


def _q5_k(blocks: Tensor) -> Tensor:
    step, least = _scales_and_least(blocks)
    low = _fields(blocks[:, 48:], 32, 4).reshape(-1, 8, 32)
    high = _fields(blocks[:, 16:48], 32, 1).reshape(-1, 8, 32)
    return (low | (high << 4)).float().mul_(step).sub_(least)


def _q6_k(blocks: Tensor) -> Tensor:
    low = _fields(blocks[:, :128], 64, 4).reshape(-1, 8, 32)
    high = _fields(blocks[:, 128:192], 32, 2).reshape(-1, 8, 32)
    scales = blocks[:, 192:208].view(torch.int8).float().mul_(_half(blocks, 208))
    codes = (low | (high << 4)).float().sub_(32)
    return codes.view(-1, 16, 16).mul_(scales[:, :, None])


_DECODERS: dict[GGMLQuantizationType, Callable[[Tensor], Tensor]] = {
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q5_0: _q5_0,
    GGMLQuantizationType.Q5_1: _q5_1,
    GGMLQuantizationType.Q8_0: _q8_0,
    GGMLQuantizationType.MXFP4: _mxfp4,
    GGMLQuantizationType.Q2_K: _q2_k,
    GGMLQuantizationType.Q3_K: _q3_k,
    GGMLQuantizationType.Q4_K: _q4_k,
    GGMLQuantizationType.Q5_K: _q5_k,
    GGMLQuantizationType.Q6_K: _q6_k,
}

_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


def encode(value: Tensor, kind: GGMLQuantizationType) -> Tensor:
    """Round numbers to a type of the format, bit-identical to the gguf package and ggml.

    Args:
        value: float32 [..., columns], finite; whole blocks in a row. On any device.
        kind: F32, F16, BF16, Q8_0, Q4_0, MXFP4, or Q3_K to Q6_K.

    Returns:
        uint8 [bytes], on the device of ``value``; MXFP4, which the package encodes, on the CPU.

    Raises:
        KeyError: If this type is not supported.
    """
    if kind in _PLAIN:
        return value.to(_PLAIN[kind]).contiguous().view(torch.uint8).reshape(-1)
    encoder, chunk = _ENCODERS[kind]
    blocks = value.reshape(-1, GGML_QUANT_SIZES[kind][0])
    step = max(1, (_GPU_CHUNK if value.is_cuda else chunk) // blocks.shape[1])
    return torch.cat([encoder(some) for some in torch.split(blocks, step)]).view(-1)


def _quotients(blocks: Tensor, step: Tensor) -> Tensor:
    # A block whose numbers are so small that its step is 0 becomes zeros.
    return blocks * torch.where(step == 0, torch.zeros_like(step), step.reciprocal())


def _as_bytes(step: Tensor) -> Tensor:
    return step.to(torch.float16).view(torch.uint8)


def _to_q8_0(blocks: Tensor) -> Tensor:
    # By a tensor: given a Python number, torch multiplies by its reciprocal on a GPU.
    step = blocks.abs().amax(1, keepdim=True) / blocks.new_full((), 127.0)
    scaled = _quotients(blocks, step)
    size = scaled.abs()
    # Halves go away from zero.
    whole = size.floor()
    codes = (whole + (2 * (size - whole)).floor()) * scaled.sign()
    return torch.cat((_as_bytes(step), codes.to(torch.int8).view(torch.uint8)), 1)


def _to_q4_0(blocks: Tensor) -> Tensor:
    extreme = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    step = extreme / -8
    codes = (_quotients(blocks, step) + 8.5).trunc_().clamp_(0, 15).to(torch.uint8)
    low, high = codes.chunk(2, 1)
    return torch.cat((_as_bytes(step), low | (high << 4)), 1)


def _to_mxfp4(blocks: Tensor) -> Tensor:
    packed = gguf.quants.quantize(blocks.cpu().numpy(), GGMLQuantizationType.MXFP4)
    return torch.from_numpy(packed)


# With how many numbers at a time on a CPU: the search of K-quants is two thousand operations, each
# of which should be worth its threads.
_ENCODERS: dict[GGMLQuantizationType, tuple[Callable[[Tensor], Tensor], int]] = {
    GGMLQuantizationType.Q8_0: (_to_q8_0, _CPU_CHUNK),
    GGMLQuantizationType.Q4_0: (_to_q4_0, _CPU_CHUNK),
    GGMLQuantizationType.MXFP4: (_to_mxfp4, _PACKAGE_CHUNK),
    GGMLQuantizationType.Q3_K: (to_q3_k, _PACKAGE_CHUNK),
    GGMLQuantizationType.Q4_K: (to_q4_k, _PACKAGE_CHUNK),
    GGMLQuantizationType.Q5_K: (to_q5_k, _PACKAGE_CHUNK),
    GGMLQuantizationType.Q6_K: (to_q6_k, _PACKAGE_CHUNK),
}
