"""The product of two matrices, by whichever of torch's libraries is faster on this processor.

PyTorch multiplies float32 matrices on x86 with MKL, and bfloat16 ones with oneDNN. MKL keeps its
AVX-512 code to Intel's processors: elsewhere it takes its AVX2 code, and float32 products run at
less than half of what the processor can do. oneDNN asks the processor, not its maker. Measured on
one core of an AMD EPYC 9005, 1024x576x1536, float32: MKL 117 GFLOP/s, oneDNN 265.

So float32 products go to oneDNN on a CPU that has AVX-512 and is not Intel's, and to ``torch.mm``
otherwise. The rule looks at the processor only, never at a stopwatch: a run that is resumed must
round as it did before.
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
        return "torch", "this build of torch offers no oneDNN product"
    if vendor in ("", "GenuineIntel"):
        return "torch", "MKL uses all of this processor" if vendor else "the processor is not known"
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return "torch", "no AVX-512, so MKL's AVX2 code is the best there is"
    return "onednn", "MKL keeps its AVX-512 code to Intel's processors"


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
