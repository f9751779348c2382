"""Packs hold every document of an epoch once, are full, and depend on the order alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.data import packing
from halfbyte.data.packing import pack

DOCUMENTS = st.lists(st.integers(1, 40), max_size=80)


def packs_of(packs):
    bounds = zip(packs.starts[:-1], packs.starts[1:], strict=True)
    return [packs.members[first:end].tolist() for first, end in bounds]


def best_fit_decreasing(lengths, capacity):
    """The tokens of each pack, by the definition: the fullest pack that has room."""
    packs = []
    for length in sorted(lengths, reverse=True):
        fitting = [used for used in packs if used + length <= capacity]
        if fitting:
            packs[packs.index(max(fitting))] += length
        else:
            packs.append(length)
    return sorted(packs)


@given(DOCUMENTS, st.integers(40, 90), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_packs_are_those_of_best_fit_decreasing(lengths, capacity, seed):
    order = np.random.default_rng(seed).permutation(len(lengths))
    made = packs_of(pack(order, np.array(lengths, dtype=np.int64), capacity))
    assert sorted(i for one in made for i in one) == list(range(len(lengths)))
    found = sorted(sum(lengths[i] for i in one) for one in made)
    assert found == best_fit_decreasing(lengths, capacity)


@given(DOCUMENTS, st.integers(1, 30), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_packs_of_windows_are_packs_too(lengths, window, seed):
    order = np.random.default_rng(seed).permutation(len(lengths))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WINDOW", window)
        made = packs_of(pack(order, np.array(lengths, dtype=np.int64), 50))
    assert sorted(i for one in made for i in one) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in one) <= 50 for one in made)
    # No pack has documents of two windows.
    window_of = {int(i): place // window for place, i in enumerate(order)}
    assert all(len({window_of[i] for i in one}) == 1 for one in made)


def test_packs_of_2048_tokens_are_97_percent_full_and_random_in_size():
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(5.7, 0.8, 20_000), 2, 2048).astype(np.int64)
    packs = pack(generator.permutation(len(lengths)), lengths, 2048)
    assert lengths.sum() / (2048 * len(packs)) >= 0.97
    # Best fit makes packs of long documents first; they are not in that order.
    counts = np.diff(packs.starts)
    halves = np.array_split(counts, 2)
    assert abs(halves[0].mean() - halves[1].mean()) < 0.1 * counts.mean()


def test_an_example_that_occurs_twice_is_packed_twice():
    packs = pack(np.array([1, 0, 1]), np.array([3, 5]), 8)
    assert sorted(map(sorted, packs_of(packs))) == [[0, 1], [1]]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=80), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_steps_divide_packs_evenly(lengths, steps):
    packs = pack(np.arange(len(lengths)), np.array(lengths, dtype=np.int64), 40)
    of_steps = [packs.of_step(step, steps).tolist() for step in range(steps)]
    assert [i for step in of_steps for i in step] == packs.members.tolist()
    tokens = [sum(lengths[i] for i in step) for step in of_steps]
    assert max(tokens) <= 40 * -(-len(packs) // steps)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_there_are_as_many_packs_as_steps_need(lengths, at_least):
    order, sizes = np.arange(len(lengths)), np.array(lengths, dtype=np.int64)
    packs, fewest = pack(order, sizes, 40, at_least), len(pack(order, sizes, 40))
    made = packs_of(packs)
    assert len(made) == max(fewest, min(at_least, len(lengths)))
    assert sorted(i for one in made for i in one) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in one) <= 40 for one in made)


@pytest.mark.parametrize(("lengths", "found"), [([3, 9], 9), ([3, 0], 0)])
def test_a_document_that_fits_no_pack_is_an_error(lengths, found):
    with pytest.raises(ValueError, match=f"1 to 8 tokens fits a pack, not one of {found}"):
        pack(np.arange(2), np.array(lengths), 8)
