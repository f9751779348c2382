"""The best evaluation and the end of training are those that transformers would choose."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import EarlyStoppingCallback

from halfbyte.config.schema import TrainConfig
from halfbyte.errors import CheckpointError
from halfbyte.train.early_stopping import BestEvaluation

BASE = {"model": "m", "data": "d", "output": "o", "eval_data": "e"}


def best(**options):
    return BestEvaluation(TrainConfig.model_validate(BASE | {"load_best": True} | options))


def by_transformers(values, *, greater, patience, threshold):
    """The number of evaluations made and the index of the best, as transformers' Trainer has it."""
    callback = EarlyStoppingCallback(patience, threshold)
    args = object.__new__(TrainingArguments)  # its __init__ looks for devices
    args.__dict__.update(metric_for_best_model="eval_m", greater_is_better=greater)
    state, control, chosen = TrainerState(), TrainerControl(), None
    for index, value in enumerate(values):
        callback.on_evaluate(args, state, control, {"eval_m": value})
        # Trainer._determine_best_metric
        if state.best_metric is None or (
            value > state.best_metric if greater else value < state.best_metric
        ):
            state.best_metric, chosen = value, index
        if control.should_training_stop:
            return index + 1, chosen
    return len(values), chosen


VALUES = st.lists(
    st.integers(-8, 8).map(lambda n: n / 4) | st.floats(-2, 2), min_size=1, max_size=30
)


@given(VALUES, st.booleans(), st.integers(1, 5), st.sampled_from([0.0, 0.25, 0.3]))
def test_it_decides_as_transformers_does(values, greater, patience, threshold):
    ours = best(
        early_stopping_patience=patience,
        early_stopping_threshold=threshold,
        metric_mode="max" if greater else "min",
    )
    made = 0
    for index, value in enumerate(values):
        ours.see(index, value)
        made = index + 1
        # Going on from a checkpoint changes nothing.
        again = best(
            early_stopping_patience=patience,
            early_stopping_threshold=threshold,
            metric_mode="max" if greater else "min",
        )
        again.load(json.loads(json.dumps(ours.state())))
        ours = again
        if ours.exhausted:
            break
    expected = by_transformers(values, greater=greater, patience=patience, threshold=threshold)
    assert (made, ours.step) == expected


@pytest.mark.parametrize(
    ("metric", "mode", "first"),
    [
        ("loss", "auto", True),
        ("perplexity", "auto", True),
        ("eval_loss", "auto", True),
        ("f1", "auto", False),
        ("f1", "min", True),
        ("loss", "max", False),
    ],
)
def test_what_is_better_depends_on_the_metric(metric, mode, first):
    seen = best(metric_for_best=metric, metric_mode=mode)
    assert seen.see(1, 1.0)
    assert seen.see(2, 2.0) is not first
    assert seen.step == (1 if first else 2)


def test_values_that_are_not_finite_are_never_the_best():
    seen = best(early_stopping_patience=2)
    assert not seen.see(1, math.nan)
    assert (seen.step, seen.exhausted) == (None, False)
    assert seen.see(2, 3.0)
    assert not seen.see(3, math.inf)
    assert not seen.see(4, math.nan)
    assert (seen.step, seen.exhausted) == (2, True)
    assert seen.in_words() == "loss 3.0000 after step 2"


def test_without_patience_it_never_ends():
    seen = best()
    for step in range(100):
        seen.see(step, 1.0)
    assert (seen.step, seen.without, seen.exhausted) == (0, 99, False)


@pytest.mark.parametrize("state", [None, 3, {}, {"step": 1, "value": None, "without": 0}])
def test_another_state_is_refused(state):
    with pytest.raises(CheckpointError, match="expected the best evaluation of a run, got"):
        best().load(state)
