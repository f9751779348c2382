"""Every Triton kernel compiles for every GPU that would be given it, though there is none here.

In a process of its own, since the kernels of this one are interpreted (tests/conftest.py).
"""

import os
import subprocess
import sys

import pytest

from tests.devices import DEVICES

pytest.importorskip("triton", reason="needs Triton")

# An L4 is given what a 4090 is, and an H200 what an H100 is.
NAMES = ("t4", "a100", "3090", "4090", "h100", "b200")


@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_compiles_and_fits(name, tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiling", name],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    needed = [(kernel, int(size)) for kernel, size in map(str.split, done.stdout.splitlines())]
    assert len(needed) == {"t4": 28, "h100": 70}.get(name, 30)
    for kernel, size in needed:
        assert size <= DEVICES[name].shared_memory, kernel
