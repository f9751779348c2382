"""Every Triton kernel compiles for every architecture we support, though there is no GPU here.

In a process of its own, since the kernels of this one are interpreted (tests/conftest.py).
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs Triton")

# Shared memory one program may have, in bytes (CUDA C++ Programming Guide, compute capabilities).
SHARED = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}


@pytest.mark.parametrize("capability", SHARED)
def test_every_kernel_compiles_and_fits(capability, tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiling", str(capability)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    needed = [(name, int(size)) for name, size in map(str.split, done.stdout.splitlines())]
    assert len(needed) >= 18 + 13 * (capability == 90)
    for name, size in needed:
        assert size <= SHARED[capability], name
