"""The sort of slots by expert in Triton's interpreter, against torch's stable sort."""

import os
from itertools import pairwise

import pytest
import torch

routing = pytest.importorskip(
    "halfbyte.linear.triton_routing", reason="needs Triton", exc_type=ImportError
)
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton compiles here, so tests/gpu/ tests these",
)


def index_of(tokens, top_k, experts, seed=0, lowest=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(lowest, experts, (tokens, top_k), generator=generator)


CASES = {
    "one span": (index_of(37, 3, 5), 5),
    "several spans": (index_of(1100, 2, 20), 20),
    "many experts": (index_of(20, 8, 100), 100),
    "as many experts as lanes": (index_of(50, 4, 16), 16),
    "experts without rows": (index_of(40, 2, 9) // 4 * 4, 9),
    "all rows to one expert": (torch.full((300, 1), 2), 4),
    "one expert": (torch.zeros(5, 1, dtype=torch.long), 1),
    "int32": (index_of(33, 2, 6).int(), 6),
    "some of no expert": (index_of(41, 3, 9, lowest=-2), 6),
    "no tokens": (torch.zeros(0, 2, dtype=torch.long), 3),
}


@pytest.mark.parametrize("case", CASES)
def test_slots_are_sorted_stably_and_tiles_cover_each_experts_rows(case):
    (index, experts), tile_rows = CASES[case], 16
    got = routing.routing_of(index, experts, tile_rows)
    flat = index.reshape(-1).long()
    flat = torch.where((flat < 0) | (flat >= experts), experts, flat)
    counts = torch.bincount(flat, minlength=experts + 1)[:experts]
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    assert torch.equal(got.offsets.long(), offsets)
    used = int(offsets[-1])
    assert torch.equal(got.order[:used].long(), torch.sort(flat, stable=True).indices[:used])
    assert got.top_k == index.shape[1]
    check_tiles(got, offsets.tolist(), tile_rows)
    alone = routing.routing_of_sorted(got.offsets, len(flat), tile_rows)
    assert torch.equal(alone.first_tiles, got.first_tiles)
    used = int(got.first_tiles[-1])
    assert torch.equal(alone.tiles[:used], got.tiles[:used])


def check_tiles(got, offsets, tile_rows):
    expected, first = [], [0]
    for expert, (start, end) in enumerate(pairwise(offsets)):
        expected += [[expert, row, end] for row in range(start, end, tile_rows)]
        first.append(len(expected))
    assert got.first_tiles.tolist() == first
    assert got.tiles[: len(expected)].tolist() == expected


def test_a_tile_is_large_where_experts_have_many_rows():
    sizes = {16: (64, True), 95: (64, True), 96: (128, True), 256: (128, False)}
    for rows, expected in sizes.items():
        got = routing.routing_of_sorted(torch.tensor([0, rows], dtype=torch.int32), rows)
        assert (got.tile_rows, got.few) == expected


@pytest.mark.parametrize(("top_k", "columns"), [(1, 8), (3, 1100), (8, 64)])
def test_the_sum_of_a_tokens_slots_is_rounded_once(top_k, columns):
    index = index_of(7, top_k, 5, seed=1, lowest=-1)
    slots = torch.randn(7 * top_k, columns, generator=torch.Generator().manual_seed(2)).half()
    chosen = (index >= 0) & (index < 4)
    expected = torch.zeros(7, columns)
    for k in range(top_k):
        expected += torch.where(chosen[:, k, None], slots.view(7, top_k, -1)[:, k].float(), 0.0)
    slots.view(7, top_k, -1)[~chosen] = torch.nan
    assert torch.equal(routing.sum_over_k(slots, index, 4), expected.half())
