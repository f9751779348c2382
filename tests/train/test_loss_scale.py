"""The loss scale: when it moves, what it says, and that float16 trains with it as float32 does."""

import json
import math

import pytest
import torch

from halfbyte.errors import CheckpointError, NonFiniteLossError
from halfbyte.train import loss_scale
from halfbyte.train.loss_scale import FIRST, GROWTH_STEPS, LARGEST, LEAST, LossScale


def test_only_float16_is_scaled():
    assert LossScale.wanted(torch.float32) is None
    assert LossScale.wanted(torch.bfloat16) is None
    scale = LossScale.wanted(torch.float16)
    assert scale is not None
    assert scale.factor == FIRST


def test_what_was_multiplied_is_divided_by():
    scale = LossScale(2.0**7)
    assert scale.unscale(1000) == 1 / 128_000
    assert scale.unscale(0) == 1 / 128


def test_it_doubles_after_many_updates_and_halves_at_once():
    scale = LossScale()
    for _ in range(GROWTH_STEPS - 1):
        scale.updated()
    assert scale.factor == FIRST
    scale.updated()
    assert (scale.factor, scale.clean) == (2 * FIRST, 0)
    for _ in range(GROWTH_STEPS - 1):
        scale.updated()
    message = scale.overflowed(41)
    assert scale.state() == {"factor": FIRST, "clean": 0, "skipped": 1}
    assert "step 42" in message
    assert "scale is 32 from now on (1 updates skipped" in message
    for _ in range(GROWTH_STEPS - 1):  # counted anew
        scale.updated()
    assert scale.factor == FIRST
    scale.updated()
    assert scale.factor == 2 * FIRST


def test_it_stays_a_power_of_two_that_float16_holds():
    scale = LossScale()
    for _ in range(40 * GROWTH_STEPS):
        scale.updated()
    assert scale.factor == LARGEST
    assert math.isfinite(float(torch.tensor(scale.factor).half()))
    while scale.factor > LEAST:
        scale.overflowed(0)
        assert math.frexp(scale.factor)[0] == 0.5


def test_it_gives_up_in_the_end():
    scale = LossScale()
    for _ in range(int(math.log2(FIRST / LEAST))):
        scale.overflowed(7)
    assert scale.factor == LEAST
    with pytest.raises(NonFiniteLossError, match=r"step 8: .*smallest loss scale, 6.1.*float32"):
        scale.overflowed(7)
    assert scale.factor == LEAST


def test_its_state_goes_through_json():
    scale = LossScale()
    scale.overflowed(0)
    for _ in range(3):
        scale.updated()
    other = LossScale()
    other.load(json.loads(json.dumps(scale.state())))
    assert other.state() == scale.state()


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({}, "clean and skipped"),
        ({"factor": 1.0, "clean": 0}, "clean and skipped"),
        ({"factor": "1", "clean": 0, "skipped": 0}, "clean and skipped"),
        ([], r"got \[\]"),
        ({"factor": 1.0, "clean": -1, "skipped": 0}, "clean and skipped"),
        ({"factor": 2.0**40, "clean": 0, "skipped": 0}, "got 1099511627776.0"),
        ({"factor": math.nan, "clean": 0, "skipped": 0}, "got nan"),
    ],
)
def test_another_state_is_refused(state, says):
    with pytest.raises(CheckpointError, match=says):
        LossScale().load(state)


def test_a_loss_that_is_not_finite_is_told_otherwise():
    assert "step 3: the loss is not finite" in loss_scale.too_large(2)
    assert "compute_dtype float32" in loss_scale.too_large(2)
