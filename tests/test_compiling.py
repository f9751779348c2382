"""Every Triton kernel compiles for every architecture we support, though there is no GPU here.

In a process of its own, since the kernels of this one are interpreted (tests/conftest.py).
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("triton", reason="needs Triton")

# Shared memory one program may have, in bytes (CUDA C++ Programming Guide, compute capabilities).
SHARED = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}


@pytest.fixture(scope="module")
def compiling(request, tmp_path_factory):
    """Return what waits for an architecture; those of the tests that run, two at a time."""
    cache = str(tmp_path_factory.mktemp("triton"))
    environment = {**os.environ, "TRITON_CACHE_DIR": cache, "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)

    def run(capability):
        return subprocess.run(
            [sys.executable, "-m", "tests.compiling", str(capability)],
            capture_output=True,
            text=True,
            env=environment,
        )

    wanted = [
        item.callspec.params["capability"]
        for item in request.session.items
        if item.module is request.module
    ]
    with ThreadPoolExecutor(2) as pool:
        running = {capability: pool.submit(run, capability) for capability in wanted}
        yield lambda capability: running[capability].result()


@pytest.mark.parametrize("capability", SHARED)
def test_every_kernel_compiles_and_fits(capability, compiling):
    done = compiling(capability)
    assert done.returncode == 0, done.stderr[-2000:]
    needed = [(name, int(size)) for name, size in map(str.split, done.stdout.splitlines())]
    assert len(needed) >= 18 + 13 * (capability == 90)
    for name, size in needed:
        assert size <= SHARED[capability], name
