"""Matrix products by whichever of torch's CPU libraries is faster on this processor.

On x86, PyTorch multiplies float32 matrices with MKL, and bfloat16 ones with oneDNN. MKL uses its
AVX-512 code on Intel processors only: on others it uses AVX2, and float32 products run at less than
half of the processor's speed. oneDNN decides by the instruction set. Measured on one core of an AMD
EPYC 9005, 1024x576x1536, float32: MKL 117 GFLOP/s, oneDNN 265.

So on a CPU that has AVX-512 and is not Intel's, float32 products use oneDNN, otherwise
``torch.mm``. The rule depends on the processor only, never on a timing: a resumed run must round as
before.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor


@cache
def float32_library() -> tuple[str, str]:
    """Return which library multiplies float32 matrices on the CPU, and why."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    vendor = next((line.split(":")[1].strip() for line in lines if "vendor_id" in line), "")
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "torch", "this build of torch has no oneDNN product"
    if vendor in ("", "GenuineIntel"):
        return "torch", "MKL uses all of this processor" if vendor else "the processor is not known"
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return "torch", "no AVX-512, so MKL's AVX2 code is used"
    return "onednn", "MKL uses AVX-512 on Intel's processors only"


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a·bᵀ.

    Args:
        a: [m, k], any strides.
        b: [n, k], dtype of ``a``, any strides: pass a transposed view for a·b.

    Returns:
        [m, n], contiguous, in the dtype of ``a``.
    """
    if a.dtype == torch.float32 and a.device.type == "cpu" and float32_library()[0] == "onednn":
        result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return result
    return torch.mm(a, b.t())
