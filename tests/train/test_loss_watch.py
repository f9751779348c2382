"""What is odd about a loss is told as it happens; noise, however large, is not odd."""

import math
import random

import pytest

from halfbyte.train.loss_watch import LossWatch

RATE = 1e-3


def watched(losses, norms=None, rates=None):
    """The findings about a series: (step, kind)."""
    watch, found = LossWatch(RATE), []
    for i, loss in enumerate(losses):
        seen = watch.see(loss, norms[i] if norms else 1.0, rates[i] if rates else RATE)
        if seen is not None:
            found.append((i + 1, seen.kind))
    return found


def noisy(steps, start, end, noise, seed, fall=100.0):
    """Losses that fall to ``end``, log-normal as those of single steps are."""
    draw = random.Random(seed)
    return [
        (end + (start - end) * math.exp(-i / fall))
        * math.exp(draw.gauss(0.0, noise) - noise**2 / 2)
        for i in range(steps)
    ]


@pytest.mark.parametrize(
    ("start", "end", "noise", "fall"),
    [
        (2.5, 1.6, 0.6, 100),  # one example a step
        (2.5, 1.6, 0.05, 100),  # many
        (2.5, 0.001, 1.0, 60),  # learned by heart
        (2.9, 2.75, 0.03, 300),  # a book, of which little can be learned
        (2.9, 2.75, 0.1, 300),
        (2.9, 2.84, 0.03, 300),
        (3.0, 3.0, 0.3, 1),  # nothing learned, but too noisy to know
    ],
)
def test_there_is_no_false_alarm(start, end, noise, fall):
    cosine = [RATE * 0.5 * (1 + math.cos(math.pi * i / 1000)) for i in range(1000)]
    for seed in range(10):
        losses = noisy(1000, start, end, noise, seed, fall)
        assert watched(losses, rates=cosine) == []


def test_a_zero_gradient_is_told_once_while_it_lasts():
    losses = noisy(40, 2.0, 2.0, 0.1, 0)
    norms = [1.0] * 10 + [0.0] * 10 + [1.0, 0.0, 0.0] + [1.0] * 7 + [0.0] * 10
    assert watched(losses, norms) == [(13, "gradient"), (33, "gradient")]


def test_a_constant_loss_is_told_once_while_it_lasts():
    assert watched([2.0] * 5 + [1.5] * 60) == [(25, "constant")]
    assert watched([2.0 * (1 + 1e-8 * i) for i in range(30)]) == [(20, "constant")]
    assert watched([2.0 * (1 + 1e-6 * i) for i in range(30)]) == []


def test_at_the_end_of_the_schedule_a_loss_may_be_constant():
    losses = noisy(100, 2.0, 1.0, 0.05, 0) + [1.0] * 100
    rates = [RATE] * 100 + [0.05 * RATE] * 100
    assert watched(losses, rates=rates) == []


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.2])
def test_a_spike_is_told_as_it_happens(noise):
    losses = noisy(120, 2.5, 1.5, noise, 3)
    losses[80] = 9.0
    assert watched(losses) == [(81, "spike")]
    losses[80:] = [9.0 + noise * (i % 3) for i in range(40)]  # it stays there
    assert watched(losses) == [(81, "spike")]


def test_a_rare_hard_row_among_easy_ones_is_told_seldom():
    draw = random.Random(0)
    losses = [
        max(0.01, 2.5 * math.exp(-i / 60)) * math.exp(draw.gauss(0, 0.3))
        + (draw.random() < 0.02) * draw.expovariate(3)
        for i in range(1500)
    ]
    assert len(watched(losses)) <= 5  # of thirty rows


@pytest.mark.parametrize("end", [2.5, 2.55])
def test_a_loss_that_does_not_fall_is_told_when_that_is_known(end):
    assert watched(noisy(1000, 2.5, end, 0.01, 1)) == [(200, "flat")]


def test_a_text_says_what_to_look_at():
    watch = LossWatch(RATE)
    found = [watch.see(2.0, 1.0, RATE) for _ in range(20)][-1]
    assert "2 for 20 steps" in found.text
    assert "learning_rate" in found.text
