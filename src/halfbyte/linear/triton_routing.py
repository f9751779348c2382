"""Where the tokens of a mixture of experts go, found on the GPU: a stable sort by expert.

Each of T tokens is sent to K of E experts: S = T · K slots, slot s = t · K + k. The products of
the experts (triton_experts.py) process the slots sorted by expert, in tiles of rows of which none
spans two experts. How many rows an expert gets is known on the device only: nothing here waits for
the GPU, so all of it can be captured in a CUDA graph.

The sort is a counting sort in two launches. The first counts the experts of each span of slots. In
the second, each program sums the counts of the spans before its own, which gives the place of its
first slot of each expert, and numbers its slots from there. So slots of one expert stay in order,
and results do not depend on which program is first. The sum over the K slots of a token is taken
in their order, too, without atomics: the same bits each time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.quant.triton_blockwise import on_device

# Slots numbered by one program, elements (slots by experts) compared at a time, and the columns of
# a program of `_sum_slots`.
_SPAN, _COMPARED, _COLUMNS = 1024, 8192, 1024

# Rows of a tile, and how many rows the mean expert must have for the larger one: a tile is computed
# whole, so on average half a tile for each expert is wasted.
SMALL_TILE, LARGE_TILE, ENOUGH_ROWS = 64, 128, 256


class Routing(NamedTuple):
    """The rows of a layer's experts, sorted, and the tiles they are processed in.

    Attributes:
        order: int32 [S], the slots of expert 0, then those of expert 1, ..., ascending in each;
            slots of no expert come last. Empty if rows come sorted.
        offsets: int32 [E + 1], the first sorted row of each expert, and the end of the last.
        tiles: int32 [n, 3], expert, first sorted row, and end of the expert's rows of each tile;
            those from ``first_tiles[E]`` on are not used.
        first_tiles: int32 [E + 1], the first tile of each expert, and the number of all.
        tile_rows: Rows of a tile.
        top_k: K; 1 if rows come sorted.
    """

    order: Tensor
    offsets: Tensor
    tiles: Tensor
    first_tiles: Tensor
    tile_rows: int
    top_k: int


@triton.jit
def _experts_of(index, slot, slots, experts):
    """Loads the experts of slots; E for those of none, and beyond the last slot E + 1."""
    found = tl.load(index + slot, mask=slot < slots, other=0).to(tl.int32)
    found = tl.where((found < 0) | (found > experts), experts, found)
    return tl.where(slot < slots, found, experts + 1)


@triton.jit
def _count_slots(
    counts, index, slots, experts, span: tl.constexpr, lanes: tl.constexpr, e: tl.constexpr
):
    expert = tl.arange(0, e)
    found = tl.zeros((e,), tl.int32)
    start = tl.program_id(0) * span
    for first in range(start, start + span, lanes):
        own = _experts_of(index, first + tl.arange(0, lanes), slots, experts)
        found += tl.sum((own[:, None] == expert[None, :]).to(tl.int32), axis=0)
    tl.store(counts + tl.program_id(0) * e + expert, found)


@triton.jit
def _sort_slots(
    order,
    offsets,
    counts,
    index,
    slots,
    experts,
    spans,
    span: tl.constexpr,
    lanes: tl.constexpr,
    e: tl.constexpr,
):
    program, expert = tl.program_id(0), tl.arange(0, e)
    rows, before = tl.zeros((e,), tl.int32), tl.zeros((e,), tl.int32)
    for first in range(0, spans, 16):
        other = first + tl.arange(0, 16)
        at = counts + other[:, None] * e + expert[None, :]
        found = tl.load(at, mask=(other < spans)[:, None], other=0)
        rows += tl.sum(found, axis=0)
        before += tl.sum(tl.where((other < program)[:, None], found, 0), axis=0)
    starts = tl.cumsum(rows, axis=0) - rows
    if program == 0:
        tl.store(offsets + expert, starts, mask=expert <= experts)
    place = starts + before
    start = program * span
    for first in range(start, start + span, lanes):
        slot = first + tl.arange(0, lanes)
        own = _experts_of(index, slot, slots, experts)
        mine = (own[:, None] == expert[None, :]).to(tl.int32)
        rank = tl.cumsum(mine, axis=0) - 1
        target = tl.sum(mine * (place[None, :] + rank), axis=1)
        tl.store(order + target, slot, mask=slot < slots)
        place += tl.sum(mine, axis=0)


@triton.jit
def _find_tiles(
    tiles,
    first_tiles,
    offsets,
    experts,
    tile_rows: tl.constexpr,
    lanes: tl.constexpr,
    e: tl.constexpr,
):
    expert = tl.arange(0, e)
    start = tl.load(offsets + expert, mask=expert < experts, other=0)
    end = tl.load(offsets + expert + 1, mask=expert < experts, other=0)
    count = (end - start + tile_rows - 1) // tile_rows
    ends = tl.cumsum(count, axis=0)
    if tl.program_id(0) == 0:
        tl.store(first_tiles + expert, ends - count, mask=expert <= experts)
    tile = tl.program_id(0) * lanes + tl.arange(0, lanes)
    past = ends[None, :] <= tile[:, None]
    own = tl.sum(past.to(tl.int32), axis=1)
    first = tl.sum(tl.where(past, count[None, :], 0), axis=1)
    used = own < experts
    row = tl.load(offsets + own, mask=used, other=0) + (tile - first) * tile_rows
    tl.store(tiles + tile * 3, own, mask=used)
    tl.store(tiles + tile * 3 + 1, row, mask=used)
    tl.store(tiles + tile * 3 + 2, tl.load(offsets + own + 1, mask=used, other=0), mask=used)


@triton.jit
def _sum_slots(y, slots, index, columns, experts, top_k: tl.constexpr, lanes: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * lanes + tl.arange(0, lanes)
    total = tl.zeros((lanes,), tl.float32)
    for k in tl.static_range(top_k):
        expert = tl.load(index + token * top_k + k)
        inside = (at < columns) & (expert >= 0) & (expert < experts)
        part = tl.load(slots + (token * top_k + k) * columns + at, mask=inside, other=0.0)
        total += part.to(tl.float32)
    tl.store(y + token * columns + at, total.to(y.dtype.element_ty), mask=at < columns)


def tile_rows_of(rows: int, experts: int) -> int:
    """Returns how many rows a tile has, by the rows of the mean expert."""
    return LARGE_TILE if rows >= ENOUGH_ROWS * experts else SMALL_TILE


def routing_of(index: Tensor, experts: int, tile_rows: int | None = None) -> Routing:
    """Sorts the slots by expert.

    Args:
        index: int32 or int64 [T, K], contiguous: the experts of each token. Numbers outside of
            0 .. E - 1 are of no expert.
        experts: E.
        tile_rows: Rows of a tile; None for `tile_rows_of`.
    """
    (tokens, top_k), device = index.shape, index.device
    slots, spans = tokens * top_k, max(1, triton.cdiv(tokens * top_k, _SPAN))
    e = max(16, triton.next_power_of_2(experts + 1))
    counts = torch.empty(spans, e, dtype=torch.int32, device=device)
    order = torch.empty(slots, dtype=torch.int32, device=device)
    offsets = torch.empty(experts + 1, dtype=torch.int32, device=device)
    sizes = {"span": _SPAN, "lanes": max(16, _COMPARED // e), "e": e}
    with on_device(index):
        _count_slots[(spans,)](counts, index, slots, experts, num_warps=8, **sizes)
        _sort_slots[(spans,)](
            order, offsets, counts, index, slots, experts, spans, num_warps=8, **sizes
        )
    return _tiled(order, offsets, slots, tile_rows, top_k)


def routing_of_sorted(offsets: Tensor, rows: int, tile_rows: int | None = None) -> Routing:
    """Returns the routing of rows that come sorted.

    Args:
        offsets: int32 [E + 1], the first row of each expert, and the end of the last.
        rows: Number of rows, at least those of all experts.
        tile_rows: Rows of a tile; None for `tile_rows_of`.
    """
    return _tiled(offsets.new_empty(0), offsets, rows, tile_rows, 1)


def _tiled(order: Tensor, offsets: Tensor, rows: int, tile_rows: int | None, top_k: int) -> Routing:
    experts = len(offsets) - 1
    tile_rows = tile_rows or tile_rows_of(rows, experts)
    most = rows // tile_rows + min(experts, rows)  # of an expert, at most one is in part
    tiles = torch.empty(most, 3, dtype=torch.int32, device=offsets.device)
    first_tiles = torch.empty_like(offsets)
    e = max(16, triton.next_power_of_2(experts + 1))
    lanes = max(16, _COMPARED // e)
    with on_device(offsets):
        _find_tiles[(max(1, triton.cdiv(most, lanes)),)](
            tiles, first_tiles, offsets, experts, tile_rows=tile_rows, lanes=lanes, e=e, num_warps=8
        )
    return Routing(order, offsets, tiles, first_tiles, tile_rows, top_k)


def sum_over_k(slots: Tensor, index: Tensor, experts: int) -> Tensor:
    """Returns [T, n], the sums of the slots of each token: in float32, in order, rounded once.

    Args:
        slots: [T · K, n], contiguous. Slots of no expert are not read.
        index: As for `routing_of`.
        experts: E.
    """
    (tokens, top_k), columns = index.shape, slots.shape[1]
    y = slots.new_empty(tokens, columns)
    if y.numel():
        with on_device(slots):
            _sum_slots[(tokens, triton.cdiv(columns, _COLUMNS))](
                y, slots, index, columns, experts, top_k=top_k, lanes=_COLUMNS, num_warps=4
            )
    return y
