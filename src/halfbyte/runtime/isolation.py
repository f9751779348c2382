"""Runs a user's code between the steps of a run so that it cannot change the run by accident.

Whatever the code draws, seeds or sets of Python's, NumPy's and torch's global state is restored
after it: generators of random numbers, gradient mode, the number of threads, default dtype and
device, the precision of products; of a model whether its modules are in training mode and which
parameters get gradients. Weights are not copied: code that writes into them changes the run.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

_Restore = Callable[[], object]


@contextmanager
def isolated(model: nn.Module | None = None) -> Iterator[None]:
    """Run the block without gradients, and restore global state and ``model``'s modes after it."""
    before = [*_generators(), *_settings(), *([] if model is None else _modes(model))]
    try:
        with torch.no_grad():
            yield
    finally:
        for restore in before:
            restore()


def _generators() -> Iterator[_Restore]:
    python, numpy, host = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield lambda: random.setstate(python)
    yield lambda: np.random.set_state(numpy)
    yield lambda: torch.set_rng_state(host)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        devices = torch.cuda.get_rng_state_all()
        yield lambda: torch.cuda.set_rng_state_all(devices)


def _settings() -> Iterator[_Restore]:
    # Set only if they have changed: setting a default device, for one, makes every operation slow.
    def keep(get: Callable[[], Any], put: Callable[[Any], object]) -> _Restore:
        before = get()
        return lambda: None if get() == before else put(before)

    yield keep(torch.get_default_dtype, torch.set_default_dtype)
    yield keep(torch.get_num_threads, torch.set_num_threads)
    yield keep(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision)
    yield keep(
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        lambda mode: torch.use_deterministic_algorithms(mode[0], warn_only=mode[1]),
    )
    yield keep(
        torch.get_default_device,
        lambda device: torch.set_default_device(None if device.type == "cpu" else device),
    )


def _modes(model: nn.Module) -> Iterator[_Restore]:
    modules = [(module, module.training) for module in model.modules()]
    parameters = [(one, one.requires_grad) for one in model.parameters()]

    def restore() -> None:
        for module, training in modules:
            module.training = training
        for parameter, trained in parameters:
            if parameter.requires_grad != trained:
                parameter.requires_grad_(trained)

    yield restore
