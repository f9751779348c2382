"""The data of a step is a function of its number, and its rows are the ones it trains on."""

import numpy as np
import pytest

from halfbyte.config.schema import TrainConfig
from halfbyte.data import Example
from halfbyte.train.run_steps import RunSteps


@pytest.fixture
def examples():
    """Each has its own first token; lengths repeat."""
    return [
        Example(np.arange(n, n + 3 + n % 4, dtype=np.int64), np.ones(3 + n % 4, bool), 1)
        for n in range(0, 110, 10)
    ]


def plan(examples, **options):
    config = TrainConfig(
        model="-", data="-", output="-", batch_size=2, gradient_accumulation_steps=2, **options
    )
    return RunSteps(examples, config, pad_id=0)


def test_rows_are_those_of_the_micro_batches(examples):
    steps = plan(examples, epochs=3)
    assert (steps.per_epoch, steps.total) == (3, 9)
    for step in range(steps.total):
        for batch, rows in zip(steps[step], steps.rows(step), strict=True):
            assert batch.input_ids[:, 0].tolist() == [examples[row].tokens[0] for row in rows]
        assert steps.lengths()[step] == [batch.lengths.tolist() for batch in steps[step]]


def test_every_epoch_has_every_row_once_in_another_order(examples):
    steps = plan(examples, epochs=2)
    epochs = [
        [row for step in range(3 * epoch, 3 * epoch + 3) for b in steps.rows(step) for row in b]
        for epoch in (0, 1)
    ]
    assert [sorted(rows) for rows in epochs] == [list(range(11))] * 2
    assert epochs[0] != epochs[1]


def test_steps_can_be_asked_for_in_any_order(examples):
    one, other = plan(examples, max_steps=7), plan(examples, max_steps=7)
    assert one.total == 7
    forward = [one.rows(step) for step in range(7)]
    assert [other.rows(step) for step in reversed(range(7))] == forward[::-1]


def test_with_packs_every_epoch_has_the_same_number_of_steps(examples):
    steps = plan(examples, packing=True, max_length=8, epochs=4)
    assert steps.per_epoch < 3  # eleven documents of 3 to 6 tokens in packs of 8, four a step
    assert steps.total == 4 * steps.per_epoch
    for epoch in range(4):
        of_epoch = range(epoch * steps.per_epoch, (epoch + 1) * steps.per_epoch)
        rows = [row for step in of_epoch for batch in steps.rows(step) for row in batch]
        assert sorted(rows) == list(range(11))
    again = plan(examples, packing=True, max_length=8, epochs=4)
    assert [again.rows(step) for step in reversed(range(again.total))] == [
        steps.rows(step) for step in reversed(range(steps.total))
    ]
