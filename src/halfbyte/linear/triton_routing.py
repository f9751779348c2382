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
    """The slots of a layer, sorted by expert.

    Attributes:
        order: int32 [S], the slots of expert 0, then those of expert 1, ...; ascending in each.
        offsets: int32 [E + 1], the first sorted row of each expert, and S.
        tiles: int32 [n, 3], expert, first sorted row, and end of the expert's rows of each tile;
            not initialised from ``first_tiles[E]`` on.
        first_tiles: int32 [E + 1], the first tile of each expert, and the number of all.
        tile_rows: Rows of a tile.
        top_k: K.
    """

    order: Tensor
    offsets: Tensor
    tiles: Tensor
    first_tiles: Tensor
    tile_rows: int
    top_k: int


@triton.jit
def _count_slots(counts, index, slots, span: tl.constexpr, lanes: tl.constexpr, e: tl.constexpr):
    expert = tl.arange(0, e)
    found = tl.zeros((e,), tl.int32)
    start = tl.program_id(0) * span
    for first in range(start, start + span, lanes):
        slot = first + tl.arange(0, lanes)
        own = tl.load(index + slot, mask=slot < slots, other=-1).to(tl.int32)
        found += tl.sum((own[:, None] == expert[None, :]).to(tl.int32), axis=0)
    tl.store(counts + tl.program_id(0) * e + expert, found)


@triton.jit
def _sort_slots(
    order,
    offsets,
    tiles,
    first_tiles,
    counts,
    index,
    slots,
    experts,
    spans,
    most_tiles,
    tile_rows: tl.constexpr,
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
    ends = tl.cumsum(rows, axis=0)
    its_tiles = (rows + tile_rows - 1) // tile_rows
    tile_ends = tl.cumsum(its_tiles, axis=0)
    if program == 0:
        tl.store(offsets + expert, ends - rows, mask=expert <= experts)
        tl.store(first_tiles + expert, tile_ends - its_tiles, mask=expert <= experts)
    # Its slots.
    place = ends - rows + before
    start = program * span
    for first in range(start, start + span, lanes):
        slot = first + tl.arange(0, lanes)
        own = tl.load(index + slot, mask=slot < slots, other=-1).to(tl.int32)
        mine = (own[:, None] == expert[None, :]).to(tl.int32)
        rank = tl.cumsum(mine, axis=0) - 1
        target = tl.sum(mine * (place[None, :] + rank), axis=1)
        tl.store(order + target, slot, mask=slot < slots)
        place += tl.sum(mine, axis=0)
    # Its share of the tiles.
    share = tl.cdiv(most_tiles, tl.num_programs(0))
    for first in range(program * share, (program + 1) * share, 16):
        tile = first + tl.arange(0, 16)
        own = tl.sum((tile_ends[None, :] <= tile[:, None]).to(tl.int32), axis=1)
        mine = own[:, None] == expert[None, :]
        row = ends - rows - (tile_ends - its_tiles) * tile_rows
        row = tl.sum(tl.where(mine, row[None, :], 0), axis=1) + tile * tile_rows
        end = tl.sum(tl.where(mine, ends[None, :], 0), axis=1)
        used = (tile < (program + 1) * share) & (tile < most_tiles)
        tl.store(tiles + tile * 3, own, mask=used)
        tl.store(tiles + tile * 3 + 1, row, mask=used)
        tl.store(tiles + tile * 3 + 2, end, mask=used)


@triton.jit
def _sum_slots(y, slots, columns, top_k: tl.constexpr, lanes: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * lanes + tl.arange(0, lanes)
    inside = at < columns
    total = tl.zeros((lanes,), tl.float32)
    for k in tl.static_range(top_k):
        part = tl.load(slots + (token * top_k + k) * columns + at, mask=inside, other=0.0)
        total += part.to(tl.float32)
    tl.store(y + token * columns + at, total.to(y.dtype.element_ty), mask=inside)


def tile_rows_of(slots: int, experts: int) -> int:
    """Returns how many rows a tile has, by the rows of the mean expert."""
    return LARGE_TILE if slots >= ENOUGH_ROWS * experts else SMALL_TILE


def routing_of(index: Tensor, experts: int, tile_rows: int | None = None) -> Routing:
    """Sorts the slots by expert, in two launches.

    Args:
        index: int32 or int64 [T, K], contiguous: the experts of each token, in 0 .. E - 1, which is
            not checked.
        experts: E.
        tile_rows: Rows of a tile; None for `tile_rows_of`.
    """
    (tokens, top_k), device = index.shape, index.device
    slots = tokens * top_k
    tile_rows = tile_rows or tile_rows_of(slots, experts)
    e = triton.next_power_of_2(experts + 1)  # one more, whose first row is the end of the last
    e, spans = max(16, e), max(1, triton.cdiv(slots, _SPAN))
    most_tiles = slots // tile_rows + min(experts, slots)  # an expert has at most one in part
    counts = torch.empty(spans, e, dtype=torch.int32, device=device)
    sizes = (slots, experts + 1, most_tiles * 3, experts + 1)
    # Each starts where 16 bytes do, so that a kernel is not compiled for other alignments.
    room = torch.empty(sum(n + -n % 4 for n in sizes), dtype=torch.int32, device=device)
    parts = room.split([n + -n % 4 for n in sizes])
    order, offsets, tiles, first_tiles = (part[:n] for part, n in zip(parts, sizes, strict=True))
    options = {"span": _SPAN, "lanes": max(16, _COMPARED // e), "e": e, "num_warps": 8}
    with on_device(index):
        _count_slots[(spans,)](counts, index, slots, **options)
        _sort_slots[(spans,)](
            order,
            offsets,
            tiles,
            first_tiles,
            counts,
            index,
            slots,
            experts,
            spans,
            most_tiles,
            tile_rows=tile_rows,
            **options,
        )
    return Routing(order, offsets, tiles.view(-1, 3), first_tiles, tile_rows, top_k)


def sum_over_k(slots: Tensor, top_k: int) -> Tensor:
    """Returns [T, n], the sums of the slots of each token: in float32, in order, rounded once.

    Args:
        slots: [T · K, n], 16-bit or float32, contiguous.
        top_k: K.
    """
    tokens, columns = len(slots) // top_k, slots.shape[1]
    y = slots.new_empty(tokens, columns)
    if y.numel():
        with on_device(slots):
            _sum_slots[(tokens, triton.cdiv(columns, _COLUMNS))](
                y, slots, columns, top_k=top_k, lanes=_COLUMNS, num_warps=4
            )
    return y
