"""The learning rate of each step."""

import math

import pytest
import torch
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import get_scheduler

from halfbyte.config.reading import load_config, to_yaml
from halfbyte.config.schema import TrainConfig
from halfbyte.errors import ConfigError
from halfbyte.train.schedule import Schedule

REQUIRED = {"model": "-", "data": "-", "output": "-"}
PEAK, STEPS = 0.5, 40


def config(**options):
    return TrainConfig(**REQUIRED, **options)


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        ("cosine", {}),
        ("cosine", {"num_cycles": 1.5}),
        ("linear", {}),
        ("constant_with_warmup", {}),
        ("cosine_with_min_lr", {"min_lr": 0.05}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.3}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.3, "num_cycles": 1.0}),
        ("cosine_with_restarts", {}),
        ("cosine_with_restarts", {"num_cycles": 3}),
        ("polynomial", {}),
        ("polynomial", {"power": 2.5, "lr_end": 1e-3}),
        ("inverse_sqrt", {}),
        ("inverse_sqrt", {"timescale": 5}),
        ("warmup_stable_decay", {"num_decay_steps": 9}),
        ("warmup_stable_decay", {"num_decay_steps": 9, "decay_type": "linear"}),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 12, "decay_type": "1-sqrt", "min_lr_ratio": 0.1},
        ),
    ],
)
def test_schedules_are_those_of_transformers_under_their_names(kind, kwargs, warmup):
    """As ``lr_scheduler_kwargs`` of a file of theirs."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    theirs = get_scheduler(kind, optimizer, warmup, STEPS, scheduler_specific_kwargs=dict(kwargs))
    options = {"learning_rate": PEAK, "warmup_steps": warmup, "lr_scheduler_type": kind}
    asked, _ = load_config(None, REQUIRED | options | {"lr_scheduler_kwargs": kwargs})
    ours = Schedule.of(asked, STEPS)
    for step in range(STEPS):
        assert ours.at(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


_RATIO = st.floats(0, 1)
KWARGS = {
    "linear": st.just({}),
    "cosine": st.fixed_dictionaries({"num_cycles": st.floats(0.1, 4)}),
    "cosine_with_min_lr": st.fixed_dictionaries({"min_lr_rate": _RATIO}),
    "cosine_with_restarts": st.fixed_dictionaries({"num_cycles": st.integers(1, 9)}),
    "polynomial": st.fixed_dictionaries(
        {"power": st.floats(0.1, 4), "lr_end": st.floats(0, 0.9 * PEAK)}
    ),
    "inverse_sqrt": st.fixed_dictionaries({"timescale": st.integers(1, 99)}),
    "warmup_stable_decay": st.fixed_dictionaries(
        {
            "num_decay_steps": st.integers(1, 50),
            "min_lr_ratio": _RATIO,
            "decay_type": st.sampled_from(["cosine", "linear", "1-sqrt"]),
        }
    ),
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), total=st.integers(1, 60), warmup=st.integers(0, 70))
def test_whatever_is_asked_for_it_is_what_transformers_does(data, total, warmup):
    """And it is so again when the options are read from the run's config.yaml."""
    kind = data.draw(st.sampled_from(sorted(KWARGS)))
    kwargs = data.draw(KWARGS[kind])
    assume(kind != "polynomial" or warmup < total)  # theirs divides by zero
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    theirs = get_scheduler(kind, optimizer, warmup, total, scheduler_specific_kwargs=dict(kwargs))
    options = {"learning_rate": PEAK, "warmup_steps": warmup, "lr_scheduler_type": kind}
    asked, _ = load_config(None, REQUIRED | options | {"lr_scheduler_kwargs": kwargs})
    again, _ = load_config(None, yaml.safe_load(to_yaml(asked)))
    assert Schedule.of(again, total) == Schedule.of(asked, total)
    for step in range(total):
        wanted = PEAK * theirs.lr_lambdas[0](step)
        assert Schedule.of(asked, total).at(step) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "polynomial", "warmup_stable_decay"])
def test_the_lowest_rate_is_reached_and_not_passed(kind):
    asked = config(learning_rate=1e-3, min_learning_rate=1e-4, lr_scheduler_type=kind)
    rates = [Schedule.of(asked, 50).at(step) for step in range(2, 60)]
    assert min(rates) == pytest.approx(1e-4) == rates[48]
    relative = config(learning_rate=1e-3, min_lr_rate=0.1, lr_scheduler_type=kind)
    assert [Schedule.of(relative, 50).at(step) for step in range(2, 60)] == pytest.approx(rates)


def test_without_new_options_the_rates_are_those_of_before_to_the_bit():
    for total, peak in ((1, 2e-4), (97, 3e-4)):
        warmup = math.ceil(0.03 * total)
        for step in range(total):
            rate = peak * step / max(1, warmup)
            if step >= warmup:
                part = (step - warmup) / max(1, total - warmup)
                rate = peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, part)))
            assert Schedule.of(config(learning_rate=peak), total).at(step) == rate


def test_a_stable_run_decays_in_its_last_tenth_unless_told():
    asked = config(learning_rate=1.0, lr_scheduler_type="warmup_stable_decay", warmup_steps=5)
    rates = [Schedule.of(asked, 200).at(step) for step in range(200)]
    assert rates[5] == rates[180] == 1.0 > rates[181]


@pytest.mark.parametrize("kind", TrainConfig.model_fields["lr_scheduler_type"].annotation.__args__)
def test_a_run_of_one_step_has_a_rate(kind):
    given = {"min_lr_rate": 0.1} if kind == "cosine_with_min_lr" else {}
    for warmup in (0, 1, 9):
        asked = config(lr_scheduler_type=kind, warmup_steps=warmup, **given)
        assert all(0.0 <= Schedule.of(asked, 1).at(step) <= 2e-4 for step in range(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"min_lr_rate": 0.1, "lr_scheduler_type": "linear"},
            "needs `lr_scheduler_type` cosine, ",
        ),
        ({"lr_power": 2}, "`lr_power` needs `lr_scheduler_type` polynomial"),
        ({"min_lr": 1e-5, "cosine_min_lr_ratio": 0.1}, "exclude each other"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "needs `min_learning_rate` or `min_lr_rate`"),
        ({"min_learning_rate": 1.0}, "must not be above `learning_rate`"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "`lr_scheduler_type`: expected"),
        ({"lr_scheduler_kwargs": {"warmup_type": "cosine"}}, "expected min_lr, min_lr_rate,"),
        ({"lr_scheduler_kwargs": "fast"}, "expected a mapping, got 'fast'"),
        ({"lr_scheduler_kwargs": {"min_lr": 1e-5}, "min_lr": 1e-6}, "`min_lr` is given twice"),
    ],
)
def test_what_no_schedule_means_is_refused(options, message):
    with pytest.raises(ConfigError) as caught:
        load_config(None, REQUIRED | options)
    assert message in str(caught.value)


def test_keywords_of_a_schedule_are_read_as_json_too():
    asked, notes = load_config(None, REQUIRED | {"lr_scheduler_kwargs": '{"min_lr": 1e-5}'})
    assert asked.min_learning_rate == 1e-5
    assert notes == ["`min_lr: 1e-05` read as `min_learning_rate: 1e-05`"]


def test_warm_up_is_a_ratio_unless_steps_are_given():
    assert Schedule.of(config(warmup_ratio=0.03), 101).warmup_steps == 4
    assert Schedule.of(config(warmup_ratio=0.03, warmup_steps=0), 101).warmup_steps == 0
