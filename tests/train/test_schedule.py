"""The learning rate of each step."""

import pytest
import torch
from transformers import get_scheduler

from halfbyte.config.schema import TrainConfig
from halfbyte.train.schedule import Schedule


def config(**options):
    return TrainConfig(model="-", data="-", output="-", **options)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_schedules_are_those_of_transformers(kind, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=20)
    ours = Schedule(0.5, kind, warmup, 20)
    for step in range(20):
        assert ours.at(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_warm_up_is_a_ratio_unless_steps_are_given():
    assert Schedule.of(config(warmup_ratio=0.03), 101).warmup_steps == 4
    assert Schedule.of(config(warmup_ratio=0.03, warmup_steps=0), 101).warmup_steps == 0
