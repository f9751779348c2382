"""What holds for every test: one thread, the same examples each time, kernels interpreted."""

import os
import signal

import hypothesis
import pytest
import torch

# Triton asks when a kernel is defined, so before anything imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# cuBLAS looks at it in its first product, whichever test makes that.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# On few and busy cores, two threads of a small operation wait for each other at its barrier for
# milliseconds: 133 s instead of 17 for the tests of the format alone.
torch.set_num_threads(1)

# A shell has its background processes ignore SIGINT, and nohup SIGHUP, also for their children.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True)
hypothesis.settings.load_profile("fixed")


@pytest.fixture
def signal_handlers():
    """Restore the handlers of signals after the test."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, known in before.items():
        signal.signal(number, known)
