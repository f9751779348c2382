"""Few shapes for all of a run's parts, and every token of it in one of them, once."""

from collections import Counter
from itertools import combinations
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from halfbyte.engine import buckets
from halfbyte.engine.buckets import (
    MOST_SIZES,
    ROUND,
    Buckets,
    PartShape,
    as_rows,
    divide,
    fillers,
    own_shape,
    wave_tokens,
)
from halfbyte.engine.packing import part_of_shape, parts_of
from tests.engine.test_packing import batches_of, documents_of

LENGTHS = st.lists(st.integers(1, 700), min_size=1, max_size=12)
STEPS = st.lists(LENGTHS, min_size=1, max_size=8)
WIDTHS = st.sampled_from([64, 4096, 10**9])  # a further size costs 234375, 3662 and 0.015 tokens
PART_TOKENS = st.sampled_from([128, 1000, 8192])


def tokens_of(batches):
    """All (token, label) of micro-batches that are supervised, or would be but for their mask."""
    return Counter(
        (int(i), int(k))
        for batch in batches
        for ids, labels, n in zip(*batch[:3], strict=True)
        for i, k in zip(ids[:n], labels[:n], strict=True)
    )


# --- what a run is divided into -----------------------------------------------------------------


@given(STEPS, WIDTHS, PART_TOKENS)
@settings(max_examples=40)
def test_every_token_of_every_step_comes_once_in_a_planned_shape(steps, width, part_tokens):
    planned = Buckets.of(steps, width, part_tokens)
    assert 1 <= len(planned.shapes) <= MOST_SIZES
    assert list(planned.shapes) == sorted(planned.shapes, key=lambda s: -s.numel)
    assert planned.largest.numel == max(s.numel for s in planned.shapes)
    for step in steps:
        batches = batches_of([[n] for n in step])
        made = parts_of(batches, "cpu", pack=True, buckets=planned)
        assert all(part.shape in planned.shapes for part in made)
        found = Counter()
        for part in made:
            for ids, _, labels in documents_of(part):
                found.update((i, k) for i, k in zip(ids, labels, strict=True) if i)
        assert found == tokens_of(batches)


@given(STEPS, WIDTHS, PART_TOKENS)
def test_a_part_has_the_smallest_shape_that_it_fits_into(steps, width, part_tokens):
    planned = Buckets.of(steps, width, part_tokens)
    sizes = sorted(shape.numel for shape in planned.shapes)
    for step in steps:
        for part in divide(step, part_tokens):
            lengths = [step[i] for i in part]
            shape = planned.fit(lengths)
            assert shape.numel == next(size for size in sizes if size >= sum(lengths))
            if shape.documents:
                filled = fillers(shape.tokens - sum(lengths), shape.max_seqlen)
                assert len(lengths) + len(filled) <= shape.documents
                assert max(lengths) <= shape.max_seqlen


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=40), st.integers(1, 10_000))
def test_documents_are_divided_once_each_and_evenly(lengths, part_tokens):
    parts = divide(lengths, part_tokens)
    assert sorted(number for part in parts for number in part) == list(range(len(lengths)))
    assert all(part == sorted(part) and part for part in parts)
    wanted = -(-sum(lengths) // part_tokens)
    assert len(parts) == min(wanted, len(lengths))
    tokens = [sum(lengths[i] for i in part) for part in parts]
    # The longest first, each to the part with fewest: no part can be worse than one document.
    for part, total in zip(parts, tokens, strict=True):
        shortest = min(lengths[i] for i in part)
        assert total - shortest <= min(tokens)


def test_a_step_is_divided_into_halves_and_not_into_a_whole_and_a_rest():
    assert divide([100] * 10, 900) == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]
    assert divide([100] * 10, 1000) == [list(range(10))]
    assert divide([700, 300, 300], 1000) == [[0], [1, 2]]


@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=40),
    st.integers(1, 10_000),
    st.sampled_from([128, 384, 768, 1024]),
)
@example([1, 1, 1, 766], 256, 128)  # fewer parts than tokens would need
def test_documents_are_divided_once_each_at_waves(lengths, part_tokens, wave):
    parts = divide(lengths, part_tokens, wave)
    assert sorted(number for part in parts for number in part) == list(range(len(lengths)))
    assert all(part == sorted(part) and part for part in parts)
    assert len(parts) <= min(-(-sum(lengths) // part_tokens), len(lengths))
    if 2 * wave > part_tokens:
        assert parts == divide(lengths, part_tokens)
        return
    for part in parts[:-1]:
        assert sum(lengths[i] for i in part) <= max(part_tokens, max(lengths))


@given(st.integers(1, 30_000), st.sampled_from([2048, 6144, 8192]))
def test_all_parts_but_the_last_are_multiples_of_a_wave_where_documents_allow(tokens, part_tokens):
    parts = [len(part) for part in divide([1] * tokens, part_tokens, 1024)]
    assert all(part % 1024 == 0 for part in parts[:-1])
    assert max(parts) <= part_tokens
    assert len(parts) == -(-tokens // part_tokens)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=9), st.integers(1, 300))
def test_the_fullest_part_is_the_fullest_there_is(lengths, most):
    found = buckets._fullest(lengths, most)
    sums = [sum(c) for k in range(len(lengths) + 1) for c in combinations(lengths, k)]
    fitting = max(total for total in sums if total <= most)
    assert sum(lengths[i] for i in found) == (fitting or lengths[0])


def test_a_wave_is_the_rows_that_fill_a_gpu_with_tiles():
    assert wave_tokens(4096, num_sms=132) == 1024  # H100, a 7B model: 8 tiles of rows times 16
    assert wave_tokens(4096, num_sms=108) == 768  # A100
    assert wave_tokens(4096, num_sms=0) == wave_tokens(4096, num_sms=15) == 0


def test_how_much_a_part_has_at_most_is_that_of_the_ledger_unless_it_is_given():
    assert len(divide([4096] * 4)) == 2
    assert Buckets.of([[4096] * 4], 64).largest == PartShape(2, 4096, 0, 4096)
    assert Buckets.of([[4096] * 4], 64, 4096).largest == PartShape(1, 4096, 0, 4096)


# --- which sizes are chosen ---------------------------------------------------------------------


def cost_of(sizes, tokens, price):
    waste = sum(count * (min(s for s in sizes if s >= n) - n) for n, count in tokens.items())
    return waste + price * len(sizes)


@given(
    st.dictionaries(st.integers(1, 60), st.integers(1, 9), min_size=1, max_size=7),
    st.sampled_from([0.0, 3.0, 20.0, 200.0]),
    st.sampled_from([1, 2, 3, 16]),
)
def test_no_other_sizes_waste_less(tokens, price, most):
    counts = sorted(tokens)
    with mock.patch.object(buckets, "MOST_SIZES", most):
        found = buckets._sizes(Counter(tokens), price)
    assert found == sorted(set(found))
    assert found[-1] == counts[-1]
    assert len(found) <= most
    # A size that is no part's could be lowered to the largest part that it is for.
    others = [
        (*chosen, counts[-1])
        for number in range(min(most, len(counts)))
        for chosen in combinations(counts[:-1], number)
    ]
    best = min(cost_of(sizes, tokens, price) for sizes in others)
    assert cost_of(found, tokens, price) == pytest.approx(best)


def test_a_further_size_is_worth_it_where_a_run_is_long_or_the_model_wide():
    steps = [[1000, 50], [300, 20]]  # 1152 and 384 tokens: one size wastes 768 more a step
    assert [s.tokens for s in Buckets.of(steps, 4096).shapes] == [1152]
    assert [s.tokens for s in Buckets.of(steps * 6, 4096).shapes] == [1152]
    assert [s.tokens for s in Buckets.of(steps * 7, 4096).shapes] == [1152, 384]
    assert [s.tokens for s in Buckets.of(steps * 7, 2048).shapes] == [1152]


def test_a_run_of_any_lengths_has_few_sizes_and_wastes_little():
    steps = [[100 + (37 * i * i + 101 * j) % 400 for j in range(8)] for i in range(300)]
    planned = Buckets.of(steps, 4096)
    filled = sum(planned.fit(step).numel for step in steps)
    assert len(planned.shapes) <= MOST_SIZES
    assert filled < 1.05 * sum(map(sum, steps))


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 8192, 8193, 100_000, 1_000_000])
def test_sizes_are_multiples_that_kernels_like_and_not_much_more(tokens):
    rounded = buckets._rounded(tokens)
    assert rounded % ROUND == 0
    assert 0 <= rounded - tokens < max(ROUND, tokens / 30)


# --- rows ---------------------------------------------------------------------------------------


def test_rows_of_one_length_stay_rows():
    steps = [[128] * 6] * 3
    planned = Buckets.of(steps, 4096)
    assert planned.shapes == (PartShape(6, 128, 0, 128),)
    (part,) = parts_of(batches_of([[128] * 4, [128] * 2]), "cpu", pack=True, buckets=planned)
    assert part.documents is None
    assert part.ids.shape == (6, 128)
    # A step at the end of an epoch may have fewer.
    assert Buckets.of([*steps, [128] * 2], 4096).shapes == (
        PartShape(6, 128, 0, 128),
        PartShape(2, 128, 0, 128),
    )


@pytest.mark.parametrize(
    "steps",
    [
        [[128] * 6, [128] * 5, [128] * 4],  # of three numbers
        [[128] * 6, [128] * 5 + [127]],  # of two lengths
        [[100] * 6],  # of a length that kernels do not like
    ],
)
def test_others_are_packed(steps):
    planned = Buckets.of(steps, 4096)
    assert all(shape.rows == 1 and shape.documents for shape in planned.shapes)
    for step in steps:
        made = parts_of(batches_of([step]), "cpu", pack=True, buckets=planned)
        assert all(part.documents is not None for part in made)


def test_what_may_stay_rows():
    assert as_rows([64, 64]) == PartShape(2, 64, 0, 64)
    assert as_rows([64, 128]) is None
    assert as_rows([65]) is None


# --- what fills a part up, and what no part was planned for -------------------------------------


@given(st.integers(0, 10_000), st.integers(1, 600))
def test_fillers_fill_up_and_none_is_too_long(tokens, longest):
    found = fillers(tokens, longest)
    assert sum(found) == tokens
    assert all(0 < n <= longest for n in found)
    assert len(found) == -(-tokens // longest)


@given(LENGTHS)
def test_a_shape_by_itself_holds_what_it_is_for(lengths):
    shape = own_shape(lengths)
    assert shape.numel >= sum(lengths)
    assert shape.numel < 1.125 * sum(lengths) + ROUND
    assert max(lengths) <= shape.max_seqlen
    if shape.documents:
        filled = fillers(shape.tokens - sum(lengths), shape.max_seqlen)
        assert len(lengths) + len(filled) <= shape.documents


@given(STEPS, LENGTHS, WIDTHS)
@settings(max_examples=40)
def test_a_step_that_was_not_seen_fits_all_the_same(steps, unseen, width):
    planned = Buckets.of(steps, width)
    made = parts_of(batches_of([unseen]), "cpu", pack=True, buckets=planned)
    assert tokens_of(batches_of([unseen])) == sum(
        (
            Counter((i, k) for i, k in zip(ids, labels, strict=True) if i)
            for part in made
            for ids, _, labels in documents_of(part)
        ),
        Counter(),
    )
    for part in made:
        assert part.shape in planned.shapes or part.shape.numel >= sum(unseen) // len(made)


def test_it_gets_a_shape_of_its_own_only_where_it_fits_into_none():
    planned = Buckets.of([[1000, 50], [300, 20], [100, 90, 80, 70]], 10**9)
    sizes = [shape.tokens for shape in planned.shapes]
    assert sizes == [1152, 384]
    documents, longest = planned.largest.documents, planned.largest.max_seqlen
    assert (documents, longest) == (8, 2048)
    assert planned.fit([10]).tokens == 384
    assert planned.fit([385]).tokens == 1152
    assert planned.fit([1152]) == planned.largest
    assert planned.fit([1153]).tokens == 1280
    assert planned.fit([40] * 8) == PartShape(1, 384, 16, 128)  # with what fills up, nine
    assert planned.fit([40] * 7).tokens == 384
    assert Buckets.of([[100, 28]], 64).fit([129]) == PartShape(1, 256, 2, 512)


def test_a_step_of_other_rows_is_packed_where_parts_are_and_a_row_where_they_are_not():
    packed, rows = Buckets.of([[100, 28]], 64), Buckets.of([[128] * 2], 64)
    assert packed.fit([64]) == packed.largest
    assert rows.fit([128]) == PartShape(1, 128, 0, 128)
    assert rows.fit([100, 28]) == PartShape(1, 128, 2, 128)


@given(STEPS, WIDTHS, st.integers(0, 100))
def test_a_part_can_be_made_of_its_shape_alone(steps, width, supervised):
    for shape in Buckets.of(steps, width).shapes:
        part = part_of_shape(shape, "cpu", supervised)
        assert part.shape == shape
        assert not part.ids.any()
        assert part.rows.tolist() == list(range(min(supervised, shape.numel)))
        assert part.targets.shape == part.rows.shape
        assert all(len(ids) <= shape.max_seqlen for ids, *_ in documents_of(part))


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=40),
    st.sampled_from([None, 5, 30]),
    st.sampled_from([20, 100, 2048]),
)
@settings(max_examples=100, deadline=None)
def test_parts_without_padding_are_as_long_as_their_documents(lengths, window, part_tokens):
    parts = buckets.UnpaddedParts(part_tokens, window)
    divided = parts.divide(lengths)
    assert sorted(i for part in divided for i in part) == list(range(len(lengths)))
    for part, shape in zip(divided, parts.shapes(lengths), strict=True):
        own = [lengths[i] for i in part]
        assert shape.numel == sum(own)
        assert shape.max_seqlen == max(own)
        if shape.documents:  # packed, none longer than the window
            assert (shape.rows, shape.documents) == (1, len(own))
            assert window is None or max(own) <= window
        else:
            assert own == [shape.tokens] * shape.rows
        assert len(own) == 1 or sum(own) <= part_tokens + max(own)
