"""Which device, which dtype to multiply in, in which order to add: decided once, with the reason.

On a CPU the answer turns on one instruction set. Without AVX512-BF16 or AMX a bfloat16 matrix
product is emulated and 5 to 7 times slower than float32; with it, it is about 4 times faster
(measured on two cores: 850 against 225 GFLOP/s at 1024x1536x576). The adapters, the gradients and
the optimizer stay float32 in either case.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from halfbyte.errors import ConfigError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device_and_dtype(device: str, compute_dtype: str) -> tuple[str, torch.dtype, str]:
    """Resolve ``auto`` and check the rest.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        compute_dtype: ``auto``, ``float32`` or ``bfloat16``.

    Returns:
        The device, the dtype of activations and products, and the reason in one line.

    Raises:
        ConfigError: If the device is not there, or a name is unknown.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu or cuda, got {device!r}")
    if compute_dtype not in ("auto", *_DTYPES):
        raise ConfigError(f"compute_dtype must be auto, float32 or bfloat16, got {compute_dtype!r}")
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ConfigError(
            "device cuda was asked for, but torch sees no CUDA device; use --device cpu"
        )
    if device == "auto":
        device = "cuda" if has_cuda else "cpu"
    if compute_dtype != "auto":
        return device, _DTYPES[compute_dtype], "as asked for"
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return device, torch.bfloat16, "this GPU multiplies bfloat16"
        return device, torch.float32, "this GPU has no bfloat16 units"
    for name, present in cpu_matrix_units().items():
        if present:
            return device, torch.bfloat16, f"this CPU has {name}"
    return device, torch.float32, "this CPU has neither AVX512-BF16 nor AMX"


def cpu_matrix_units() -> dict[str, bool]:
    """Return which of the CPU's bfloat16 matrix instructions are there, by name."""
    return {
        "AMX": torch.cpu._is_amx_tile_supported(),
        "AVX512-BF16": torch.cpu._is_avx512_bf16_supported(),
    }


@contextmanager
def deterministic(wanted: bool = True) -> Iterator[None]:
    """Have torch add up in a fixed order on a GPU: what is run twice gives the same bits.

    Attention's backward, above all, adds up in whatever order its programs come; in a fixed one it
    is slower. cuBLAS is told by CUBLAS_WORKSPACE_CONFIG, which it looks at in its first product: so
    this is to be entered before that. A CPU adds in a fixed order as it is.

    Args:
        wanted: Whether to.

    Raises:
        RuntimeError: By torch, inside, for what it cannot do so, and says what.
    """
    if not wanted or not torch.cuda.is_available():
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    switches: Any = torch.utils.deterministic
    filled = switches.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # Nothing here reads what it has not written (tests poison it), and filling takes time.
    switches.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        switches.fill_uninitialized_memory = filled
