"""Held-out rows: as many as wanted, no text on both sides, whatever the order of the rows."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.data import load_dataset
from halfbyte.data.content_hash import content_hash
from halfbyte.data.dataset_report import RowRejected
from halfbyte.data.formats import preferred_formats, to_conversation, to_row
from halfbyte.data.split import draw_rows, hold_out, split_dataset
from halfbyte.errors import DataError
from tests.data.chats import tokenizer_of
from tests.tiny import tiny_tokenizer


def conversation(row):
    return to_conversation(row, "1", preferred_formats([row]))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@given(
    st.lists(st.integers(0, 30), min_size=2, max_size=120).filter(lambda ids: len(set(ids)) > 1),
    st.floats(0.01, 0.99),
    st.integers(0, 2**63 - 1),
    st.randoms(use_true_random=False),
)
def test_no_text_is_on_both_sides_in_any_order(ids, share, seed, random):
    hashes = np.array(ids, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    wanted = max(1, round(share * len(ids)))
    if wanted == len(ids):
        with pytest.raises(DataError, match="none would be left"):
            hold_out(hashes, share, seed)
        return
    held_out, groups = hold_out(hashes, share, seed)
    inside, outside = (set(hashes[mask]) for mask in (held_out, ~held_out))
    assert inside
    assert outside
    assert not inside & outside
    assert groups == len(inside)
    sizes = Counter(ids)
    least = min(sizes.values())
    assert held_out.sum() <= max(wanted, least)
    # Every group that is left would have been too much.
    left = wanted - held_out.sum()
    assert all(count > left for one, count in sizes.items() if one in set(np.array(ids)[~held_out]))
    order = random.sample(range(len(ids)), len(ids))
    again, _ = hold_out(hashes[order], share, seed)
    assert (again == held_out[order]).all()


def test_it_is_exact_where_rows_differ_and_another_seed_is_another_choice():
    hashes = np.random.Generator(np.random.PCG64(0)).integers(0, 2**64, 5000, np.uint64)
    first, groups = hold_out(hashes, 0.02, 1)
    second, _ = hold_out(hashes, 0.02, 2)
    assert first.sum() == second.sum() == groups == 100
    assert (first & second).sum() < 20  # 2 of 100 by chance
    assert hold_out(hashes, 37, 1).held_out.sum() == 37
    # A longer file keeps nearly all of what was held out.
    longer = np.append(hashes, hashes[:500] ^ np.uint64(7))
    kept = hold_out(longer, 0.02, 1).held_out[:5000]
    assert (kept & first).sum() > 90


def test_a_choice_is_spread_over_the_data():
    hashes = np.array([content_hash(conversation({"text": str(n)})) for n in range(4000)])
    held_out, _ = hold_out(hashes.astype(np.uint64), 0.5, 0)
    quarters = held_out.reshape(4, 1000).sum(1)
    assert (abs(quarters - 500) < 64).all()  # four standard deviations


@pytest.mark.parametrize(("rows", "wanted"), [(1, 0.5), (3, 3), (3, 8), (2, 0.9)])
def test_too_many_rows_are_refused(rows, wanted):
    with pytest.raises(DataError, match=f"of {rows} rows: none would be left to train on"):
        hold_out(np.arange(rows, dtype=np.uint64), wanted, 0)


def test_rows_that_all_say_the_same_are_refused():
    with pytest.raises(DataError, match="all 9 rows say the same"):
        hold_out(np.zeros(9, np.uint64), 0.5, 0)


def test_a_group_larger_than_wanted_is_held_out_only_if_all_are():
    pairs = np.repeat(np.arange(6, dtype=np.uint64), 2)
    assert hold_out(pairs, 1.0 / 12, 0).held_out.sum() == 2
    assert hold_out(pairs, 3, 0).held_out.sum() == 2
    mixed = np.append(pairs, np.arange(90, 93, dtype=np.uint64))
    assert hold_out(mixed, 3, 0).held_out.sum() == 3


# --- what is the same text -----------------------------------------------------------------------

USER, REPLY = {"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "Here."}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, REPLY]},
        {"messages": [{"content": " where  IS\nit?", "role": "user"}, REPLY]},
        {"conversations": [{"from": "human", "value": "Where is it?"}, REPLY]},
        {"prompt": "Where is it?", "completion": "here."},
        {"instruction": "Where is it?", "output": "Here.", "id": 3},
        {"messages": [USER, REPLY | {"weight": 1}]},
    ],
)
def test_the_same_text_has_one_hash(row):
    assert content_hash(conversation(row)) == content_hash(
        conversation({"messages": [USER, REPLY]})
    )


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, REPLY | {"content": "There."}]},
        {"messages": [USER, REPLY, USER, REPLY]},
        {"messages": [REPLY | {"role": "user"}, USER | {"role": "assistant"}]},
        {"messages": [USER, REPLY], "tools": [{"name": "look"}]},
        {"text": "Where is it? Here."},
    ],
)
def test_another_text_has_another(row):
    assert content_hash(conversation(row)) != content_hash(
        conversation({"messages": [USER, REPLY]})
    )


@given(st.integers(2, 400), st.integers(1, 399), st.integers(0, 2**63 - 1))
def test_rows_drawn_by_number_are_different_and_those_of_the_seed(rows, count, seed):
    count = min(count, rows - 1)
    drawn = draw_rows(rows, count, seed)
    assert len(drawn) == count
    assert (np.diff(drawn) > 0).all()
    assert 0 <= drawn[0] <= drawn[-1] < rows
    assert (draw_rows(rows, count, seed) == drawn).all()


def test_each_row_is_drawn_as_often_as_others():
    times = np.bincount(np.concatenate([draw_rows(50, 10, seed) for seed in range(2000)]))
    assert abs(times / 2000 - 0.2).max() < 0.04  # 4.5 standard deviations


# --- data sets -----------------------------------------------------------------------------------


def test_a_data_set_is_divided_and_each_part_is_reported(tmp_path):
    rows = [
        {"prompt": f"What is {n // 2}?", "completion": "Yes. " * (n // 2)} for n in range(2, 62)
    ]
    data = load_dataset(
        write(tmp_path / "a.jsonl", [*rows, {"prompt": 3}]), tiny_tokenizer(), max_length=60
    )
    rest, part, groups = split_dataset(data, 0.1, 0)
    assert (len(part.last_of_row), groups) == (6, 3)  # each text is there twice
    assert sorted([*rest.rows, *part.rows], key=lambda row: int(row.line)) == list(data.rows)
    assert not {row.expected for row in rest.rows} & {row.expected for row in part.rows}
    for one in (rest, part):
        assert one.report.examples == len(one.examples) == len(one.rows)
        assert one.report.usable == len(one.cases)
        assert one.report.tokens == sum(len(example.tokens) for example in one.examples)
        lines = {row.line for row in one.rows}
        assert set(one.report.truncated_lines) == {*data.report.truncated_lines} & lines
    assert data.report.truncated == rest.report.truncated + part.report.truncated
    assert (rest.report.rows, part.report.rows) == (55, 6)
    assert [len(one.report.rejections) for one in (rest, part)] == [1, 0]
    for row, example in part.cases:
        place = data.rows.index(row)
        assert np.array_equal(example.tokens, data.examples[place].tokens)


def test_examples_of_a_conversation_stay_together(tmp_path):
    turn = [USER, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHere."}]
    rows = [{"messages": [*turn, USER | {"content": f"And {n}?"}, *turn[1:]]} for n in range(12)]
    data = load_dataset(write(tmp_path / "a.jsonl", rows), tokenizer_of("qwen3"), max_length=400)
    assert len(data.examples) == 24
    rest, part, _ = split_dataset(data, 5, 3)
    assert (len(rest.examples), len(part.examples)) == (14, 10)
    for one in (rest, part):
        assert Counter(Counter(row.line for row in one.rows).values()) == {
            2: len(one.examples) // 2
        }
        assert list(one.last_of_row) == list(range(1, len(one.examples), 2))
        assert [len(row.messages) for row, _ in one.cases] == [4] * len(one.last_of_row)


# --- rows written again --------------------------------------------------------------------------

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": words},
    optional={"weight": st.sampled_from([0, 1]), "name": words, "reasoning_content": words},
)
any_row = st.one_of(
    st.fixed_dictionaries(
        {"messages": st.lists(messages, min_size=1, max_size=5)},
        optional={"system": words, "tools": st.just([{"type": "function", "function": {}}])},
    ),
    st.fixed_dictionaries(
        {"prompt": words | st.lists(messages, min_size=1, max_size=3), "completion": words},
        optional={"system": words},
    ),
    st.fixed_dictionaries({"instruction": words, "output": words}, optional={"input": words}),
    st.fixed_dictionaries({"text": words}),
)


@given(any_row)
def test_a_row_written_again_is_the_same_conversation(row):
    try:
        first = conversation(row)
    except RowRejected:
        return
    again = conversation(json.loads(json.dumps(to_row(first))))
    assert again == replace(first, unused=())  # what nothing read is not written
