"""The product of a few rows with a packed weight: generation on a GPU.

Generating a token reads every weight once, so the bytes read are the cost: weights are read in 4
bits, and decoded ones are not written to memory. One row of x is multiplied in registers. From two
rows to `SMALL_ROWS`, decoded tiles go to the tensor cores. Above, decoding and cuBLAS are faster.

With one row the limit is not memory but the lookup of levels; see `_unpacking`.

Turing (T4, RTX 20) supports the product of one row only, in float16. Triton multiplies tiles there
without tensor cores: ptxas counts 4096 multiplications per thread and spills 4 to 8 KB of each
thread's registers, compared with 0 to 0.5 KB on an A100.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.quant.triton_blockwise import dynamic_on, levels_on, on_device, scale_of
from halfbyte.quant.weight import QuantizedWeight, QuantType, levels_of
from halfbyte.runtime import device as devices

# Rows up to which `small_products` beats decoding and cuBLAS (H100, Llama-2-7B's shapes).
SMALL_ROWS = 64


# Maps the eight codes of a word to levels without a table in memory: a lookup there takes the load
# unit four cycles per warp, and an 11008x4096 weight needs 45 million. PRMT selects bytes of
# registers by the low three bits of a nibble; the fourth selects one of two results. One pass gives
# the low bytes of bfloat16 levels, one the high bytes, which are combined as float32.
# Operands: 0 to 7 the levels, 8 the word, 9 to 12 and 13 to 16 the low and high bytes by code.
def _unpacking() -> str:
    lines = [
        ".reg .b32 low, four, high, five, a, b, p0, p1, q0, q1;",
        "and.b32 low, $8, 0x77777777;",
        "shr.u32 high, low, 16;",
        "shr.u32 four, $8, 1;",
        "lop3.b32 four, four, 0x44444444, 0x32103210, 0xEA;",  # (four & 0x44444444) | 0x32103210
        "shr.u32 five, four, 16;",
    ]
    for name, first in (("p", 9), ("q", 13)):
        for half, (index, choice) in enumerate((("low", "four"), ("high", "five"))):
            lines += [
                f"prmt.b32 a, ${first}, ${first + 1}, {index};",
                f"prmt.b32 b, ${first + 2}, ${first + 3}, {index};",
                f"prmt.b32 {name}{half}, a, b, {choice};",
            ]
    for half in (0, 1):
        for pair, order in enumerate(("0x5140", "0x7362")):
            even = 4 * half + 2 * pair  # of a byte, the high nibble comes first
            lines += [
                f"prmt.b32 a, p{half}, q{half}, {order};",
                f"and.b32 ${even}, a, 0xffff0000;",
                f"shl.b32 ${even + 1}, a, 16;",
            ]
    return "{" + "\n".join(lines) + "}"


_UNPACKING = tl.constexpr(_unpacking())
_EIGHT_INTEGERS = tl.constexpr((tl.int32,) * 8)
_UNPACKING_OPERANDS = tl.constexpr(",".join(["=r"] * 8 + ["r"] * 9))


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _multiply_word(total, word, x, planes, levels, rounded: tl.constexpr):
    # Adds the products of eight weights per lane with eight elements of x.
    if rounded:
        p = planes
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            _UNPACKING,
            _UNPACKING_OPERANDS,
            [word, p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]],
            dtype=_EIGHT_INTEGERS,
            is_pure=True,
            pack=1,
        )
        total = tl.fma(_float(a), x[0], total)
        total = tl.fma(_float(b), x[1], total)
        total = tl.fma(_float(c), x[2], total)
        total = tl.fma(_float(d), x[3], total)
        total = tl.fma(_float(e), x[4], total)
        total = tl.fma(_float(f), x[5], total)
        total = tl.fma(_float(g), x[6], total)
        total = tl.fma(_float(h), x[7], total)
    else:
        for j in tl.static_range(8):
            code = (word >> ((j // 2) * 8 + (1 - j % 2) * 4)) & 15
            total = tl.fma(tl.load(levels + code), x[j], total)
    return total


@triton.jit
def _multiply_row(
    total,
    row,
    quad,
    there,
    x,
    codes,
    scales,
    scale_codes,
    offset,
    levels,
    dynamic,
    planes,
    row_quads,
    block_quads: tl.constexpr,
    double: tl.constexpr,
    rounded: tl.constexpr,
):
    index = row * row_quads + quad
    at = index[:, None] * 4 + tl.arange(0, 4)[None, :]
    words = _quarters(tl.load(codes + at, mask=there[:, None], other=0))
    block = index // block_quads
    scale = scale_of(block, there, scales, scale_codes, offset, dynamic, double)
    sums = tl.zeros_like(total)
    for i in tl.static_range(4):
        sums = _multiply_word(sums, words[i], x[i], planes, levels, rounded)
    return tl.fma(sums, scale, total)


@triton.jit
def _halves(x):
    # The even and the odd columns.
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def _quarters(x):
    # Four columns.
    even, odd = tl.split(tl.reshape(x, (x.shape[0], 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _pair(bits, dtype: tl.constexpr):
    # Two 16-bit values of a word, the first in its low half.
    low = bits.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    high = (bits >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _eight(a, b, c, d, dtype: tl.constexpr):
    x0, x1 = _pair(a, dtype)
    x2, x3 = _pair(b, dtype)
    x4, x5 = _pair(c, dtype)
    x6, x7 = _pair(d, dtype)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _product_row(
    y,
    x,
    codes,
    scales,
    scale_codes,
    offset,
    codes1,
    scales1,
    scale_codes1,
    offset1,
    codes2,
    scales2,
    scale_codes2,
    offset2,
    levels,
    dynamic,
    planes,
    second,
    third,
    outputs,
    row_quads,
    members: tl.constexpr,
    block_quads: tl.constexpr,
    double: tl.constexpr,
    lanes: tl.constexpr,
    rounded: tl.constexpr,
):
    # A program computes four rows. A lane takes 32 adjacent weights of each: one load of codes, one
    # scale, and 32 elements of x reused for all four. The rows are separate variables, since the
    # compiler would distribute a dimension, and x with it, over warps.
    row = tl.program_id(0) * 4
    if members > 1:
        # In y, the second weight starts at `second`, the third at `third`, both multiples of four.
        in1, in2 = row >= second, row >= third
        codes = tl.where(in2, codes2, tl.where(in1, codes1, codes))
        scales = tl.where(in2, scales2, tl.where(in1, scales1, scales))
        if double:
            scale_codes = tl.where(in2, scale_codes2, tl.where(in1, scale_codes1, scale_codes))
            offset = tl.where(in2, offset2, tl.where(in1, offset1, offset))
        start = tl.where(in2, third, tl.where(in1, second, 0))
        outputs = tl.where(in2, outputs, tl.where(in1, third, second)) - start
        y += start
        row -= start
    first = 0.0
    if double:
        first = tl.load(offset)
    row0 = tl.minimum(row, outputs - 1)
    row1 = tl.minimum(row + 1, outputs - 1)
    row2 = tl.minimum(row + 2, outputs - 1)
    row3 = tl.minimum(row + 3, outputs - 1)
    p = (0, 0, 0, 0, 0, 0, 0, 0)
    if rounded:  # from memory; constants would be moved to registers again for every word
        p = (
            tl.load(planes),
            tl.load(planes + 1),
            tl.load(planes + 2),
            tl.load(planes + 3),
            tl.load(planes + 4),
            tl.load(planes + 5),
            tl.load(planes + 6),
            tl.load(planes + 7),
        )
    total0 = tl.zeros((lanes,), tl.float32)
    total1 = tl.zeros((lanes,), tl.float32)
    total2 = tl.zeros((lanes,), tl.float32)
    total3 = tl.zeros((lanes,), tl.float32)
    dtype: tl.constexpr = y.dtype.element_ty
    for start in range(0, row_quads, lanes):
        quad = start + tl.arange(0, lanes)
        there = quad < row_quads
        at = quad[:, None] * 16 + tl.arange(0, 16)[None, :]
        even, odd = _halves(tl.load(x + at, mask=there[:, None], other=0))
        x04, x26 = _halves(even)
        x15, x37 = _halves(odd)
        a, b, c, d = _quarters(x04), _quarters(x15), _quarters(x26), _quarters(x37)
        word0 = _eight(a[0], b[0], c[0], d[0], dtype)
        word1 = _eight(a[1], b[1], c[1], d[1], dtype)
        word2 = _eight(a[2], b[2], c[2], d[2], dtype)
        word3 = _eight(a[3], b[3], c[3], d[3], dtype)
        e = (word0, word1, word2, word3)
        q, t, n, bq = quad, there, row_quads, block_quads
        s, sc, lv, dy = scales, scale_codes, levels, dynamic
        total0 = _multiply_row(
            total0, row0, q, t, e, codes, s, sc, first, lv, dy, p, n, bq, double, rounded
        )
        total1 = _multiply_row(
            total1, row1, q, t, e, codes, s, sc, first, lv, dy, p, n, bq, double, rounded
        )
        total2 = _multiply_row(
            total2, row2, q, t, e, codes, s, sc, first, lv, dy, p, n, bq, double, rounded
        )
        total3 = _multiply_row(
            total3, row3, q, t, e, codes, s, sc, first, lv, dy, p, n, bq, double, rounded
        )
    tl.store(y + row, tl.sum(total0).to(dtype), mask=row < outputs)
    tl.store(y + row + 1, tl.sum(total1).to(dtype), mask=row + 1 < outputs)
    tl.store(y + row + 2, tl.sum(total2).to(dtype), mask=row + 2 < outputs)
    tl.store(y + row + 3, tl.sum(total3).to(dtype), mask=row + 3 < outputs)


@triton.jit
def _product_tile(
    y,
    x,
    codes,
    scales,
    scale_codes,
    offset,
    levels,
    dynamic,
    rows,
    outputs,
    row_words,
    x_stride,
    stride,
    block_words: tl.constexpr,
    double: tl.constexpr,
    tile_outputs: tl.constexpr,
    tile_rows: tl.constexpr,
    step: tl.constexpr,
    split: tl.constexpr,
):
    output = tl.program_id(0) * tile_outputs + tl.arange(0, tile_outputs)
    held = tl.minimum(output, outputs - 1)
    row = tl.arange(0, tile_rows)
    part = tl.program_id(1)
    element = tl.arange(0, 8)
    shift = (element >> 1) * 8 + (1 - (element & 1)) * 4
    first = 0.0
    if double:
        first = tl.load(offset)
    total = tl.zeros((tile_outputs, tile_rows), tl.float32)
    word = part * step + tl.arange(0, step)
    inside = (word < row_words)[None, :]
    index = held[:, None] * row_words + word[None, :]
    packed = tl.load(codes + index, mask=inside, other=0)
    scale = scale_of(index // block_words, inside, scales, scale_codes, first, dynamic, double)
    for start in range(part * step, row_words, step * split):
        k = start * 8 + tl.arange(0, step * 8)
        values = tl.load(
            x + row[None, :] * x_stride + k[:, None],
            mask=(k[:, None] < row_words * 8) & (row[None, :] < rows),
            other=0.0,
        )
        code = (packed[:, :, None] >> shift[None, None, :]) & 15
        weight = tl.load(levels + code) * scale[:, :, None]
        # The next codes are loaded before these are multiplied.
        word = start + step * split + tl.arange(0, step)
        inside = (word < row_words)[None, :]
        index = held[:, None] * row_words + word[None, :]
        packed = tl.load(codes + index, mask=inside, other=0)
        scale = scale_of(index // block_words, inside, scales, scale_codes, first, dynamic, double)
        weight = tl.reshape(weight, (tile_outputs, step * 8)).to(x.dtype.element_ty)
        total = tl.dot(weight, values, total)
    target = y + (part * rows + row[None, :]) * stride + output[:, None]
    has = (output[:, None] < outputs) & (row[None, :] < rows)
    tl.store(target, total.to(y.dtype.element_ty), mask=has)


@triton.jit
def _sum_products(y, parts, numel, split: tl.constexpr, lanes: tl.constexpr):
    at = tl.program_id(0) * lanes + tl.arange(0, lanes)
    total = tl.zeros((lanes,), tl.float32)
    for i in tl.static_range(split):
        total += tl.load(parts + i * numel + at, mask=at < numel, other=0.0)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=at < numel)


@cache
def _planes(quant_type: QuantType, device: torch.device) -> Tensor:
    """Low and high bytes of the 16 levels in bfloat16, four bytes per int32."""
    pairs = levels_of(quant_type).bfloat16().view(torch.uint8).view(16, 2)
    return pairs.t().contiguous().view(-1).view(torch.int32).to(device)


def _accepted(device: torch.device) -> tuple[int, tuple[torch.dtype, ...]]:
    """Maximum number of rows on a device, and the supported dtypes."""
    spec = devices.spec_of(device)
    types = (torch.bfloat16, torch.float16) if spec.has_bfloat16 else (torch.float16,)
    return SMALL_ROWS if spec.has_tensor_cores else 1, types


def most_rows(dtype: torch.dtype, q: QuantizedWeight) -> int:
    """Returns the maximum number of rows for which `small_products` beats decoding and cuBLAS.

    It is 0 if the weight or the dtype of the rows is not supported.
    """
    rows, types = _accepted(q.codes.device)
    fits = q.shape[1] % 32 == 0 and q.numel < 2**31 and q.codes.data_ptr() % 16 == 0
    return rows if fits and dtype in types else 0


def can_multiply(x: Tensor, q: QuantizedWeight) -> bool:
    """Returns whether `small_products` supports this and is faster than decoding and cuBLAS."""
    return x.shape[0] <= most_rows(x.dtype, q)


def small_product(x: Tensor, q: QuantizedWeight) -> Tensor:
    """Returns x·Wᵀ without decoding W to memory; see `small_products`."""
    return small_products(x, [q])


def small_products(x: Tensor, weights: Sequence[QuantizedWeight]) -> Tensor:
    """Returns x·Wᵀ of each weight, concatenated, without decoding W to memory; for generation.

    A single row is multiplied by the levels (for bfloat16: rounded to bfloat16), and the sum of
    each 32 products by their scale, in float32. More rows are multiplied by the weight rounded to
    the dtype of x, as `dequantize` does.

    Args:
        x: [rows, in], with at most `most_rows` rows for each weight.
        weights: Each [out, in] with in a multiple of 32.

    Returns:
        [rows, sum of out] in the dtype of x.

    Raises:
        ValueError: If ``can_multiply(x, q)`` is False for one of them.
    """
    for q in weights:
        if not can_multiply(x, q):
            rows, types = _accepted(q.codes.device)
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in types)
            raise ValueError(
                f"a product of at most {rows} rows of {names} with a weight whose rows are a "
                f"multiple of 32 is expected; got {tuple(x.shape)}, {x.dtype}, and a weight "
                f"{q.shape}: decode it, and use torch.mm"
            )
    x = x if x.stride(1) == 1 else x.contiguous()
    y = x.new_empty(x.shape[0], sum(q.shape[0] for q in weights))
    with on_device(x):
        if x.shape[0] == 1:
            _launch_row(y, x, weights)
        else:
            _launch_tiles(y, x, weights)
    return y


def _operands(q: QuantizedWeight) -> tuple[Tensor | None, ...]:
    """The tensors of a weight that a kernel reads: codes, scales, their codes, their offset."""
    scales = q.scales if q.scales is not None else q.scale_scales
    return q.codes.view(torch.int32), scales, q.scale_codes, q.scale_offset


def _options(q: QuantizedWeight) -> dict[str, Any]:
    fixed = {"num_stages": 1, "num_warps": 4, "enable_fp_fusion": False}
    return {"double": q.double_quant, **fixed}


def _launch_row(y: Tensor, x: Tensor, weights: Sequence[QuantizedWeight]) -> None:
    """Writes the products of one row, [1, in], to y [1, sum of out]."""
    sizes = [q.shape[0] for q in weights]
    kinds = {(q.quant_type, q.block_size, q.double_quant) for q in weights}
    if len(weights) > 3 or len(kinds) > 1 or any(size % 4 for size in sizes[:-1]):
        for q, part in zip(weights, torch.split(y, sizes, 1), strict=True):
            _launch_row(part, x, [q])
        return
    q = weights[0]
    read = [operand for one in (*weights, q, q)[:3] for operand in _operands(one)]
    _product_row[(triton.cdiv(sum(sizes), 4),)](
        y,
        x.view(torch.int32),
        *read,
        levels_on(q.quant_type, x.device),
        dynamic_on(x.device),
        _planes(q.quant_type, x.device),
        sizes[0],
        sum(sizes[:2]),
        sum(sizes),
        q.shape[1] // 32,
        members=len(weights),
        block_quads=q.block_size // 32,
        lanes=128,
        rounded=x.dtype == torch.bfloat16 and x.is_cuda,
        **_options(q),
    )


def _launch_tiles(y: Tensor, x: Tensor, weights: Sequence[QuantizedWeight]) -> None:
    """Writes the products of rows, [rows, in], to y [rows, sum of out]."""
    rows, width = y.shape
    # The sum over a row is split across programs; otherwise there are too few.
    split = 4
    parts = torch.empty(split, rows, width, dtype=torch.float32, device=x.device)
    sizes = [q.shape[0] for q in weights]
    for q, own in zip(weights, torch.split(parts, sizes, 2), strict=True):
        _product_tile[(triton.cdiv(q.shape[0], 64), split)](
            own,
            x,
            *_operands(q),
            levels_on(q.quant_type, x.device),
            dynamic_on(x.device),
            rows,
            q.shape[0],
            q.shape[1] // 8,
            x.stride(0),
            width,
            block_words=q.block_size // 8,
            tile_outputs=64,
            tile_rows=max(16, triton.next_power_of_2(rows)),
            step=32 if rows <= 32 else 16,
            split=split,
            **_options(q),
        )
    numel = rows * width
    _sum_products[(triton.cdiv(numel, 512),)](y, parts, numel, split=split, lanes=512)
