"""The parts of a layer, copied together from the GPUs that hold them, beside products.

In a CUDA graph the driver copies between GPUs with a kernel that fills the multiprocessors, and
products wait for it: 12 ms in a step of a 7B model. This one has a program on each, of 128 threads
with few registers and no shared memory. The largest product (triton_matmul._forward) takes 59,392
of a multiprocessor's 65,536 registers and 224 of 227 KiB, which leaves enough for both to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.quant.triton_blockwise import on_device
from halfbyte.runtime import device as devices

WARPS, REGISTERS = 4, 40
_WORDS = 1024  # of 8 bytes, at a time


@triton.jit
def _copy_parts(out, parts, start, words, total, rank, size, lanes: tl.constexpr):
    lane = tl.arange(0, lanes)
    for step in range(size):
        source = (rank + step) % size  # not all from the same GPU at once
        part = tl.multiple_of(tl.load(parts + source).to(tl.pointer_type(tl.int64)), 16)
        count = tl.minimum(words, total - source * words)
        for first in range(tl.program_id(0) * lanes, count, tl.num_programs(0) * lanes):
            inside = first + lane < count
            word = tl.load(part + start + first + lane, mask=inside)
            tl.store(out + source * words + first + lane, word, mask=inside)


def copy_parts(parts: Tensor, start: int, nbytes: int, out: Tensor, *, rank: int = 0) -> None:
    """Copies adjacent bytes of each part to their places in ``out``, one after the other.

    Args:
        parts: int64 [N], on the device: addresses that it can read, aligned to 16 bytes.
        start: The first byte of each part that is copied, a multiple of 256.
        nbytes: Bytes of each part, a multiple of 256; of the last ones what ``out`` has room for.
        out: uint8 on the device, contiguous, a multiple of 8 bytes.
        rank: Number of the part to begin with.
    """
    with on_device(out):
        _copy_parts[(devices.spec_of(out.device).num_sms,)](
            out.view(torch.int64),
            parts,
            start // 8,
            nbytes // 8,
            len(out) // 8,
            rank,
            len(parts),
            lanes=_WORDS,
            num_warps=WARPS,
            maxnreg=REGISTERS,
        )
