"""Micro-batches: labels by mask and shifted, every example once, order from (seed, epoch) alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.data import Encoder, Example, collate, steps
from halfbyte.data.formats import Conversation
from tests.data.chats import only
from tests.tiny import tiny_tokenizer

IGNORED = -100


def example(length, *, start=10, learned_from=1):
    tokens = np.arange(start, start + length, dtype=np.int32)
    mask = np.arange(length) >= learned_from
    return Example(tokens, mask, learned_from)


def examples(lengths):
    """Each example is told by its first token."""
    return [example(length, start=1000 * (at + 1)) for at, length in enumerate(lengths)]


def test_labels_are_the_next_tokens_where_these_are_learned():
    batch = collate([example(5, learned_from=3), example(3)], pad_id=7)
    assert batch.input_ids.tolist() == [[10, 11, 12, 13, 14], [10, 11, 12, 7, 7]]
    assert batch.labels.tolist() == [
        [IGNORED, IGNORED, 13, 14, IGNORED],
        [11, 12, IGNORED, IGNORED, IGNORED],
    ]
    assert batch.lengths.tolist() == [5, 3]
    assert (batch.tokens, batch.supervised_tokens) == (8, 4)
    for array in (batch.input_ids, batch.labels, batch.lengths):
        assert array.dtype == np.int64


def test_padding_does_not_hide_an_end_of_turn_that_is_the_same_token():
    tokenizer = tiny_tokenizer()
    end = tokenizer.eos_token_id
    assert end == tokenizer.pad_token_id
    rows = [
        Conversation("1", [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": w}])
        for w in ("Yes.", "No, and again no.")
    ]
    batch = collate([only(Encoder(tokenizer).encode(row)) for row in rows], pad_id=end)
    assert (batch.labels == end).sum(axis=1).tolist() == [1, 1]
    assert batch.labels[0, batch.lengths[0] :].tolist() == [IGNORED] * int(
        batch.input_ids.shape[1] - batch.lengths[0]
    )


@given(
    lengths=st.lists(st.integers(2, 9), min_size=1, max_size=40),
    batch_size=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 9),
)
def test_an_epoch_holds_every_example_once(lengths, batch_size, accumulation, seed, epoch):
    plan = steps(
        examples(lengths),
        batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        seed=seed,
        epoch=epoch,
    )
    firsts = []
    for at, step in enumerate(plan):
        rows = [int(length) for batch in step for length in batch.lengths]
        assert rows == sorted(rows, reverse=True)
        assert all(len(batch.lengths) <= batch_size for batch in step)
        full = at < len(plan) - 1
        assert len(step) == accumulation if full else 1 <= len(step) <= accumulation
        assert not full or len(rows) == batch_size * accumulation
        firsts += [int(first) for batch in step for first in batch.input_ids[:, 0]]
    assert sorted(firsts) == [1000 * (at + 1) for at in range(len(lengths))]


def test_the_same_examples_make_a_step_however_it_is_cut():
    made = examples([4, 9, 2, 7, 5, 3, 8, 6, 4, 4, 2, 9])

    def contents(batch_size, accumulation):
        plan = steps(
            made,
            batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            seed=5,
            epoch=1,
        )
        return [sorted(int(i) for batch in step for i in batch.input_ids[:, 0]) for step in plan]

    assert contents(1, 8) == contents(2, 4) == contents(8, 1)


def test_seed_and_epoch_decide_the_order_and_a_step_can_be_asked_for_alone():
    made = examples([5] * 20)

    def plan(seed, epoch):
        return steps(made, batch_size=2, gradient_accumulation_steps=2, seed=seed, epoch=epoch)

    def order(seed, epoch):
        return [batch.input_ids[:, 0].tolist() for step in plan(seed, epoch) for batch in step]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)
    alone = plan(0, 0)[3]
    assert [batch.input_ids[:, 0].tolist() for batch in alone] == order(0, 0)[6:8]
    assert [len(step) for step in plan(0, 0)[3:]] == [2, 2]
    # A resumed run, on another machine and years later, must find the same order.
    assert order(0, 0)[:2] == [[5000, 20000], [7000, 3000]]
    with pytest.raises(IndexError):
        plan(0, 0)[5]


@given(
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=60),
    batch_size=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
def test_with_packs_every_example_is_in_an_epoch_once(lengths, batch_size, accumulation, seed):
    def plan(epoch, count=None):
        return steps(
            examples(lengths),
            batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            seed=seed,
            epoch=epoch,
            pack_tokens=30,
            count=count,
        )

    first = plan(0)
    assert len(first) == -(-len(first.packs) // (batch_size * accumulation))
    for one in (first, plan(1, len(first))):
        assert len(one) == len(first)
        rows = [one.rows(step) for step in reversed(range(len(one)))]
        assert sorted(i for step in rows for batch in step for i in batch) == list(
            range(len(lengths))
        )
        for number, step in enumerate(one):
            # With padding, a micro-batch is no larger than rows of full length would be.
            assert step
            assert all(batch.input_ids.size <= batch_size * 30 for batch in step)
            assert one.lengths(number) == [batch.lengths.tolist() for batch in step]
            assert one.lengths(number) == [sorted(b, reverse=True) for b in one.lengths(number)]
    of_step = [sum(map(sum, first.lengths(step))) for step in range(len(first))]
    assert max(of_step) <= batch_size * accumulation * 30
