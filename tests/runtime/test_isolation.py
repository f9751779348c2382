"""What a user's code does to global state is undone after it, also if it fails."""

import contextlib
import random

import numpy as np
import pytest
import torch
from torch import nn

from halfbyte.runtime.isolation import isolated


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def seed_all():
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


ACTIONS = {
    "draws": draw,
    "seeds": lambda: (random.seed(5), np.random.seed(5), torch.manual_seed(5)),
    "threads": lambda: torch.set_num_threads(2),
    "dtype": lambda: torch.set_default_dtype(torch.float64),
    "device": lambda: torch.set_default_device("meta"),
    "precision": lambda: torch.set_float32_matmul_precision("medium"),
    "deterministic": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "gradients": lambda: torch.set_grad_enabled(True),
}


def state():
    return (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
@pytest.mark.parametrize("fails", [False, True])
def test_global_state_is_what_it_was(action, fails):
    seed_all()
    expected, before = draw(), state()
    seed_all()
    with contextlib.suppress(KeyError), isolated():
        assert not torch.is_grad_enabled()
        action()
        if fails:
            raise KeyError
    assert state() == before
    assert draw() == expected


def test_modes_of_a_model_are_what_they_were():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2)).eval()
    model[1].train()
    model[0].weight.requires_grad_(False)
    with isolated(model):
        model.train()
        model[1].eval()
        model.requires_grad_(True)
        model[2].requires_grad_(False)
    assert [module.training for module in model] == [False, True, False]
    assert [one.requires_grad for one in model.parameters()] == [False, True, True, True]
