"""Where the tokens of a mixture of experts go, found on the GPU: a stable sort by expert.

Each of T tokens is sent to K of E experts: S = T · K slots, slot s = t · K + k. The products of
the experts (triton_experts.py) process the slots sorted by expert, in tiles of rows of which none
spans two experts. How many rows an expert gets is known on the device only: nothing here waits for
the GPU, so all of it can be captured in a CUDA graph.

The sort is a counting sort in three launches: each span of slots counts its experts, the counts of
an expert are summed over the spans before each, and each span numbers its slots from there. So
slots of one expert stay in order, and results do not depend on which program is first. The sum over
the K slots of a token is taken in their order, too, without atomics: the same bits each time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.quant.triton_blockwise import on_device

# Slots numbered by one program, elements (slots by experts) compared at a time, spans summed at a
# time, and the columns of a program of `_sum_slots`.
_SPAN, _COMPARED, _SCANNED, _COLUMNS = 256, 8192, 1024, 1024

# Rows of a tile. A tile is computed whole, which wastes half a tile per expert on average, so the
# smaller one is for experts with few rows: the mean expert has fewer than FEW_ROWS. Up to
# MANY_ROWS, products are bound by the memory of weights, not by arithmetic.
SMALL_TILE, LARGE_TILE, FEW_ROWS, MANY_ROWS = 64, 128, 96, 256


class Routing(NamedTuple):
    """The rows of a layer's experts, sorted, and the tiles they are processed in.

    Attributes:
        order: int32 [S], the slots of expert 0, then those of expert 1, ..., ascending in each;
            not initialised from ``offsets[E]`` on. Empty if rows come sorted.
        offsets: int32 [E + 1], the first sorted row of each expert, and the end of the last.
        tiles: int32 [n, 3], expert, first sorted row, and end of the expert's rows of each tile;
            those from ``first_tiles[E]`` on are not used.
        first_tiles: int32 [E + 1], the first tile of each expert, and the number of all.
        tile_rows: Rows of a tile.
        few: Whether the mean expert has fewer than `MANY_ROWS` rows.
        top_k: K; 1 if rows come sorted.
    """

    order: Tensor
    offsets: Tensor
    tiles: Tensor
    first_tiles: Tensor
    tile_rows: int
    few: bool
    top_k: int


@triton.jit
def _count_slots(
    counts, index, slots, spans, span: tl.constexpr, lanes: tl.constexpr, e: tl.constexpr
):
    expert = tl.arange(0, e)
    found = tl.zeros((e,), tl.int32)
    start = tl.program_id(0) * span
    for first in range(start, start + span, lanes):
        slot = first + tl.arange(0, lanes)
        own = tl.load(index + slot, mask=slot < slots, other=-1).to(tl.int32)
        found += tl.sum((own[:, None] == expert[None, :]).to(tl.int32), axis=0)
    tl.store(counts + expert * spans + tl.program_id(0), found)


@triton.jit
def _scan_counts(counts, totals, spans, lanes: tl.constexpr):
    row = counts + tl.program_id(0) * spans
    total = 0
    for first in range(0, spans, lanes):
        at = first + tl.arange(0, lanes)
        found = tl.load(row + at, mask=at < spans, other=0)
        tl.store(row + at, total + tl.cumsum(found, axis=0) - found, mask=at < spans)
        total += tl.sum(found, axis=0)
    tl.store(totals + tl.program_id(0), total)


@triton.jit
def _sort_slots(
    order,
    offsets,
    counts,
    totals,
    index,
    slots,
    experts,
    spans,
    span: tl.constexpr,
    lanes: tl.constexpr,
    e: tl.constexpr,
):
    expert = tl.arange(0, e)
    rows = tl.load(totals + expert)
    ends = tl.cumsum(rows, axis=0)
    place = ends - rows + tl.load(counts + expert * spans + tl.program_id(0))
    start = tl.program_id(0) * span
    if start == 0:
        tl.store(offsets + expert, ends - rows, mask=expert < experts)
        tl.store(offsets + experts, tl.sum(tl.where(expert < experts, rows, 0), axis=0))
    for first in range(start, start + span, lanes):
        slot = first + tl.arange(0, lanes)
        own = tl.load(index + slot, mask=slot < slots, other=-1).to(tl.int32)
        mine = (own[:, None] == expert[None, :]).to(tl.int32)
        rank = tl.cumsum(mine, axis=0) - 1
        target = tl.sum(mine * (place[None, :] + rank), axis=1)
        tl.store(order + target, slot, mask=(own >= 0) & (own < experts))
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
        tl.store(first_tiles + expert, ends - count, mask=expert < experts)
        tl.store(first_tiles + experts, tl.sum(count, axis=0))
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


def routing_of(index: Tensor, experts: int, tile_rows: int | None = None) -> Routing:
    """Sorts the slots by expert.

    Args:
        index: int32 or int64 [T, K], contiguous: the experts of each token. Numbers outside of
            0 .. E - 1 are of no expert.
        experts: E.
        tile_rows: Rows of a tile; None for those that are fast.
    """
    (tokens, top_k), device = index.shape, index.device
    slots, e = tokens * top_k, _lanes_of(experts)
    spans = max(1, triton.cdiv(slots, _SPAN))
    counts = torch.empty(e * spans, dtype=torch.int32, device=device)
    totals = torch.empty(e, dtype=torch.int32, device=device)
    order = torch.empty(slots, dtype=torch.int32, device=device)
    offsets = torch.empty(experts + 1, dtype=torch.int32, device=device)
    sizes = {"span": _SPAN, "lanes": min(_SPAN, max(16, _COMPARED // e)), "e": e}
    with on_device(index):
        _count_slots[(spans,)](counts, index, slots, spans, num_warps=8, **sizes)
        _scan_counts[(e,)](counts, totals, spans, lanes=_SCANNED, num_warps=4)
        _sort_slots[(spans,)](
            order, offsets, counts, totals, index, slots, experts, spans, num_warps=8, **sizes
        )
    return _tiled(order, offsets, slots, tile_rows, top_k)


def routing_of_sorted(offsets: Tensor, rows: int, tile_rows: int | None = None) -> Routing:
    """Returns the routing of rows that come sorted.

    Args:
        offsets: int32 [E + 1], the first row of each expert, and the end of the last.
        rows: Number of rows, at least those of all experts.
        tile_rows: Rows of a tile; None for those that are fast.
    """
    return _tiled(offsets.new_empty(0), offsets, rows, tile_rows, 1)


def _lanes_of(experts: int) -> int:
    lanes: int = triton.next_power_of_2(experts)
    return max(16, lanes)


def _tiled(order: Tensor, offsets: Tensor, rows: int, tile_rows: int | None, top_k: int) -> Routing:
    experts = len(offsets) - 1
    tile_rows = tile_rows or (SMALL_TILE if rows < FEW_ROWS * experts else LARGE_TILE)
    most = rows // tile_rows + min(experts, rows)  # of an expert, at most one is in part
    tiles = torch.empty(most, 3, dtype=torch.int32, device=offsets.device)
    first_tiles = torch.empty_like(offsets)
    e = _lanes_of(experts)
    lanes = max(16, _COMPARED // e)
    with on_device(offsets):
        _find_tiles[(max(1, triton.cdiv(most, lanes)),)](
            tiles, first_tiles, offsets, experts, tile_rows=tile_rows, lanes=lanes, e=e, num_warps=8
        )
    few = rows < MANY_ROWS * experts
    return Routing(order, offsets, tiles, first_tiles, tile_rows, few, top_k)


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
