"""A run on a CPU measures the machine, 0.2 s of it, for the time it predicts: here once."""

import functools

import pytest

from halfbyte.train import memory_check


@pytest.fixture(scope="session", autouse=True)
def _measured_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            memory_check, "measure_machine", functools.cache(memory_check.measure_machine)
        )
        yield
