"""Every Triton kernel compiles for every GPU that would be given it, though there is none here.

In a process of its own, since the kernels of this one are interpreted (tests/conftest.py).
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import halfbyte
from tests.devices import DEVICES

pytest.importorskip("triton", reason="needs Triton")

# An L4 is given what a 4090 is, and an H200 what an H100 is.
# An A100 has no instruction that a 4090 has not, and more shared memory, as has a 3090.
NAMES = ("t4", "4090", "h100", "b200")
COUNTS = {"h100": 101, "b200": 51, "4090": 51, "t4": 44}
FOR_TENSOR_CORES = {
    *("_product_tile", "_sum_products", "_grouped_product", "_glu_backward"),
    *("_count_slots", "_scan_counts", "_sort_slots", "_find_tiles", "_sum_slots"),
}
FOR_FP8 = {"_decode_e4m3", "_decode_across", "_quantize_rows"}
FOR_HOPPER = {
    *("_fp8_product", "_fp8_gated"),
    *("_forward", "_backward", "_gated_forward", "_gated_backward", "_adapter_pass", "_sum_parts"),
}


@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_compiles_and_fits(name):
    # Triton keeps what it has compiled, by the source of a kernel and of all that it calls.
    environment = {**os.environ, "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiling", name],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    needed = [(kernel, int(size)) for kernel, size in map(str.split, done.stdout.splitlines())]
    assert len(needed) == COUNTS[name]
    for kernel, size in needed:
        assert size <= DEVICES[name].shared_memory, kernel
    # Each that is launched anywhere is among them, or is kept from the device.
    kept = {"t4": FOR_TENSOR_CORES | FOR_FP8 | FOR_HOPPER, "h100": set()}.get(name, FOR_HOPPER)
    assert {kernel for kernel, _ in needed} == launched() - kept


def launched() -> set[str]:
    """Returns the names of all kernels."""
    files = Path(halfbyte.__file__).parent.glob("*/triton_*.py")
    text = "".join(path.read_text() for path in files)
    kernels = set(re.findall(r"@triton\.jit(?:\(.*\))?\ndef (\w+)", text))
    return kernels & set(re.findall(r"^ *(_\w+)\[.*\]\(", text, re.MULTILINE))
