"""The Triton kernels of a decoding step on the KV cache (kv_cache.py).

    turn_and_store   rotates q and k of one token per slot and stores k and v, in one launch
    attend_cached    splits the keys of a slot over programs, since one program per slot and head
                     would leave most of the GPU idle; a second launch combines their results

The work depends on positions, not on the capacity, so one CUDA graph serves any length: a program
reads the position of its slot and processes its share of the keys. Heads that share keys are the
rows of one product, padded to the 16 that tensor cores need. As in flash attention (Dao et al.
2022), a program keeps the largest score and the sums of exponentials and values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.quant.triton_blockwise import on_device
from halfbyte.runtime import device as devices

# Programs per SM that saturate memory bandwidth, and the maximum number of parts.
_PROGRAMS, _MOST_PARTS = 2, 16
# Heads rotated by one program.
TURNED = 8


@triton.jit
def _turn_and_store(
    q,
    k,
    v,
    cos,
    sin,
    positions,
    keys,
    values,
    q_heads,
    heads,
    capacity,
    q_stride,
    k_stride,
    v_stride,
    half: tl.constexpr,
    lanes: tl.constexpr,
    count: tl.constexpr,
):
    # Programs of a slot: first those of its query heads, then those of its keys and values.
    slot = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    position = tl.load(positions + slot)
    at = tl.arange(0, lanes)[None, :]
    table = position * (2 * half) + at
    c = tl.load(cos + table, mask=at < half, other=0.0).to(tl.float32)
    s = tl.load(sin + table, mask=at < half, other=0.0).to(tl.float32)
    q_parts = tl.cdiv(q_heads, count)
    kind: tl.constexpr = q.dtype.element_ty
    if part < q_parts:
        head = part * count + tl.arange(0, count)[:, None]
        inside = (head < q_heads) & (at < half)
        place = q + slot * q_stride + head * (2 * half) + at
        one = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        two = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
        tl.store(place, (one * c - two * s).to(kind), mask=inside)
        tl.store(place + half, (two * c + one * s).to(kind), mask=inside)
    else:
        head = (part - q_parts) * count + tl.arange(0, count)[:, None]
        inside = (head < heads) & (at < half)
        source = head * (2 * half) + at
        target = ((slot * heads + head) * capacity + position) * (2 * half) + at
        place = k + slot * k_stride + source
        one = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        two = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
        tl.store(keys + target, (one * c - two * s).to(kind), mask=inside)
        tl.store(keys + target + half, (two * c + one * s).to(kind), mask=inside)
        place = v + slot * v_stride + source
        low = tl.load(place, mask=inside, other=0.0)
        high = tl.load(place + half, mask=inside, other=0.0)
        tl.store(values + target, low, mask=inside)
        tl.store(values + target + half, high, mask=inside)


@triton.jit
def _attend_part(
    sums,
    scores,
    q,
    keys,
    values,
    positions,
    heads,
    capacity,
    window,
    q_stride,
    scale,
    repeat: tl.constexpr,
    rows: tl.constexpr,
    width: tl.constexpr,
    lanes: tl.constexpr,
    tile: tl.constexpr,
):
    slot = (tl.program_id(0) // heads).to(tl.int64)
    group = tl.program_id(0) % heads
    part, parts = tl.program_id(1), tl.num_programs(1)
    stop = tl.load(positions + slot).to(tl.int32) + 1
    first = tl.maximum(stop - window, 0)
    share = tl.cdiv(tl.cdiv(stop - first, parts), tile) * tile
    start = first + part * share
    stop = tl.minimum(start + share, stop)
    row, at = tl.arange(0, rows), tl.arange(0, lanes)
    head = group * repeat + row
    mine = (row < repeat)[:, None] & (at < width)[None, :]
    queries = tl.load(
        q + slot * q_stride + head[:, None] * width + at[None, :], mask=mine, other=0.0
    )
    keys += (slot * heads + group) * capacity * width
    values += (slot * heads + group) * capacity * width
    # Its exponential is 0, but it is finite: a part may have no keys.
    lowest = -1e30
    largest = tl.full((rows,), lowest, tl.float32)
    total = tl.zeros((rows,), tl.float32)
    found = tl.zeros((rows, lanes), tl.float32)
    for begin in range(start, stop, tile):
        key = begin + tl.arange(0, tile)
        there = (key < stop)[:, None] & (at < width)[None, :]
        where = key[:, None] * width + at[None, :]
        k = tl.load(keys + where, mask=there, other=0.0)
        v = tl.load(values + where, mask=there, other=0.0)
        z = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        z = tl.where((key < stop)[None, :], z, lowest)
        larger = tl.maximum(largest, tl.max(z, axis=1))
        p = tl.exp(z - larger[:, None])
        shrink = tl.exp(largest - larger)
        total = total * shrink + tl.sum(p, axis=1)
        found = found * shrink[:, None]
        found = tl.dot(p.to(v.dtype), v, found, input_precision="ieee")
        largest = larger
    target = (slot * (heads * repeat) + head) * parts + part
    tl.store(sums + target[:, None] * width + at[None, :], found, mask=mine)
    tl.store(scores + target * 2, largest, mask=row < repeat)
    tl.store(scores + target * 2 + 1, total, mask=row < repeat)


@triton.jit
def _join_parts(out, sums, scores, width: tl.constexpr, lanes: tl.constexpr, parts: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part, at = tl.arange(0, parts), tl.arange(0, lanes)
    largest = tl.load(scores + (row * parts + part) * 2)
    total = tl.load(scores + (row * parts + part) * 2 + 1)
    weight = tl.exp(largest - tl.max(largest, axis=0))
    place = sums + (row * parts + part[:, None]) * width + at[None, :]
    found = tl.load(place, mask=(at < width)[None, :], other=0.0)
    result = tl.sum(found * weight[:, None], axis=0) / tl.sum(total * weight, axis=0)
    tl.store(out + row * width + at, result.to(out.dtype.element_ty), mask=at < width)


def turn_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    turn: tuple[Tensor, Tensor],
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """`kv_cache.turn_and_store`, with q in place."""
    (slots, q_heads, width), heads = q.shape, keys.shape[1]
    q, k, v = (x if _heads_together(x) else x.contiguous() for x in (q, k, v))
    with on_device(q):
        _turn_and_store[(slots, triton.cdiv(q_heads, TURNED) + triton.cdiv(heads, TURNED))](
            q,
            k,
            v,
            *turn,
            positions,
            keys,
            values,
            q_heads,
            heads,
            keys.shape[2],
            q.stride(0),
            k.stride(0),
            v.stride(0),
            half=width // 2,
            lanes=triton.next_power_of_2(width // 2),
            count=TURNED,
            num_warps=4,
        )
    return q


def _heads_together(x: Tensor) -> bool:
    return x.stride(2) == 1 and x.stride(1) == x.shape[2]


def parts_of(programs: int, capacity: int, device: torch.device) -> int:
    """Returns the number of programs that share the keys of a slot and head; a power of two."""
    wanted = triton.cdiv(_PROGRAMS * devices.spec_of(device).num_sms, programs)
    return int(triton.next_power_of_2(max(1, min(wanted, _MOST_PARTS, capacity // 64))))


def shape_of(repeat: int, width: int, itemsize: int) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the constants of `_attend_part`, and how it is compiled.

    Args:
        repeat: Query heads per head of keys.
        width: Width of a head.
        itemsize: Bytes per element.
    """
    lanes = max(16, triton.next_power_of_2(width))
    shape = {"repeat": repeat, "rows": max(16, triton.next_power_of_2(repeat))}
    # 16 kB each of keys and values, double-buffered: a Turing GPU has 64 kB.
    shape |= {"width": width, "lanes": lanes, "tile": max(16, 16384 // (lanes * itemsize))}
    return shape, {"num_warps": 4, "num_stages": 2}


def attend_cached(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float, window: int | None
) -> Tensor:
    """`kv_cache.attend_cached` with float32 sums and weights rounded to the dtype of the values."""
    (slots, q_heads, width), (heads, capacity) = q.shape, keys.shape[1:3]
    q = q if _heads_together(q) else q.contiguous()
    shape, options = shape_of(q_heads // heads, width, q.element_size())
    parts = parts_of(slots * heads, capacity, q.device)
    sums = torch.empty(slots, q_heads, parts, width, dtype=torch.float32, device=q.device)
    scores = torch.empty(slots, q_heads, parts, 2, dtype=torch.float32, device=q.device)
    out = torch.empty(slots, q_heads * width, dtype=q.dtype, device=q.device)
    with on_device(q):
        _attend_part[(slots * heads, parts)](
            sums,
            scores,
            q,
            keys,
            values,
            positions,
            heads,
            capacity,
            capacity if window is None else window,
            q.stride(0),
            scale,
            **shape,
            **options,
        )
        _join_parts[(slots * q_heads,)](
            out, sums, scores, width=width, lanes=shape["lanes"], parts=parts, num_warps=1
        )
    return out
