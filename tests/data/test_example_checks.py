"""The pass over examples against counting them one by one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.data import Example, collate
from halfbyte.data.example_checks import (
    EDGES,
    ControlIds,
    ExampleScan,
    Found,
    lengths_of,
    together,
)

END, BOS, UNKNOWN = 1, 2, 3


@st.composite
def examples(draw: st.DrawFn) -> list[Example]:
    found = []
    for _ in range(draw(st.integers(1, 6))):
        pairs = draw(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30))
        tokens, mask = zip(*pairs, strict=True)
        mask = (False, *mask[1:])
        found.append(Example(np.array(tokens, np.int32), np.array(mask), 0))
    return found


def replies_of(example: Example) -> list[tuple[int, int]]:
    """Where supervised stretches begin, and where their last token is."""
    found: list[tuple[int, int]] = []
    for at in np.flatnonzero(example.labels_mask).tolist():
        if found and found[-1][1] == at - 1:
            found[-1] = (found[-1][0], at)
        else:
            found.append((at, at))
    return found


@given(examples(), st.integers(2, 32), st.booleans())
def test_counts_are_those_of_each_example_by_itself(
    data: list[Example], most: int, everything: bool
) -> None:
    ids = ControlIds((END,), BOS, UNKNOWN)
    indices = np.arange(len(data))
    scan = ExampleScan(data, indices, ids, max_length=most, everything=everything)
    assert scan.lengths.tolist() == [len(one.tokens) for one in data]
    assert scan.supervised.tolist() == [one.labels_mask.sum() for one in data]
    assert scan.supervised_within == sum(one.labels_mask[:most].sum() for one in data)
    for edge, beyond in zip(EDGES, scan.supervised_from, strict=True):
        assert beyond == sum(one.labels_mask[edge:].sum() for one in data)
    assert scan.cut.count == sum(len(one.tokens) > most for one in data)
    twos = [one.tokens[:2].tolist() == [BOS, BOS] for one in data]
    assert (scan.two_bos.count, scan.two_bos.first) == (
        sum(twos),
        np.flatnonzero(twos)[:5].tolist(),
    )
    assert scan.unknown.count == sum(UNKNOWN in one.tokens for one in data)
    whole = unended = lost = replies = 0
    for one in data:
        for first, last in replies_of(one):
            replies += 1
            lost += first >= most
            part = one.tokens[first : last + 1]
            ended = END in part if everything else part[-1] == END
            truncated = len(one.tokens) == most == last + 1 and not ended
            if last < most and not truncated:
                whole += 1
                unended += not ended
    assert (scan.replies, scan.whole, scan.lost.count) == (replies, whole, lost)
    assert scan.unended.count == unended


@given(st.lists(st.integers(1, 200), min_size=1, max_size=60), st.integers(2, 150))
def test_lengths_say_what_a_run_would_do(counts: list[int], most: int) -> None:
    data = [Example(np.zeros(n, np.int32), np.arange(n) > 0, 1) for n in counts]
    scan = ExampleScan(
        data, np.arange(len(data)), ControlIds((), -1, -1), max_length=most, everything=False
    )
    found = lengths_of(scan, max_length=most, batch_size=len(data), gradient_accumulation_steps=1)
    visible = np.minimum(counts, most)
    assert (found.examples, found.tokens) == (len(counts), visible.sum())
    assert sum(count for _, _, count in found.bins) == len(counts)
    for low, high, count in found.bins:
        assert count == sum(low <= n < high for n in counts)
    for percentile, length in found.percentiles.items():
        assert np.mean(np.array(counts) <= length) >= percentile / 100
        assert np.mean(np.array(counts) < length) < percentile / 100
    for length, share, supervised in found.choices:
        assert share == pytest.approx(np.mean(np.array(counts) > length))
        lost = sum(max(0, n - max(length, 1)) for n in counts)
        assert supervised == pytest.approx(lost / max(sum(n - 1 for n in counts), 1))
    batch = collate([Example(one.tokens[:most], one.labels_mask[:most], 1) for one in data])
    assert found.padding == pytest.approx(1 - batch.tokens / batch.input_ids.size)
    packs = visible.sum() / (found.packed * most)
    assert packs == pytest.approx(round(packs))
    assert round(packs) == best_fit(sorted(visible.tolist(), reverse=True), most)


def best_fit(lengths: list[int], capacity: int) -> int:
    rooms: list[int] = []
    for length in lengths:
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - length)
    return len(rooms)


def test_a_sample_is_looked_at_in_pieces() -> None:
    data = [
        Example(np.full(3, at % 7, np.int32), np.array([0, 1, 1], bool), 1) for at in range(9000)
    ]
    indices = np.arange(0, 9000, 3)
    scan = ExampleScan(data, indices, ControlIds((END,), -1, -1), max_length=9, everything=False)
    wrong = [at for at in indices.tolist() if at % 7 != END]
    assert (scan.unended.count, scan.unended.first) == (len(wrong), wrong[:5])


def test_pieces_are_bounded_in_number_and_tokens() -> None:
    lengths = [1] * 5000 + [300_000, 200_001, 900_000, 5]
    items = [np.zeros(n, np.int32) for n in lengths]
    parts = list(together(items, lambda item: item))
    assert [len(one) for part in parts for one in part] == lengths
    assert [len(part) for part in parts] == [2048, 2048, 905, 1, 1, 1]


def test_only_the_first_are_kept() -> None:
    found = Found()
    for at in range(7):
        found.see(at, f"at {at}")
    found.add(range(100), 100)
    assert (found.count, found.first, found.instance) == (107, [0, 1, 2, 3, 4], "at 0")
