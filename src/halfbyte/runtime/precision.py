"""Chooses the device, the dtype of products and deterministic summation, once, with the reason.

On a CPU the dtype depends on the instruction set. Without AVX512-BF16 or AMX a bfloat16 matrix
product is emulated and 5 to 7 times slower than float32; with it, it is about 4 times faster
(measured on two cores: 850 against 225 GFLOP/s at 1024x1536x576). Adapters, gradients and the
optimizer are float32 in either case.

On a GPU it depends on the generation. From Ampere on products are bfloat16. Turing (T4, RTX 20) has
no hardware for that: there they are float16, which has eight times the precision but a small range,
so the gradient of the loss must be scaled (train/loss_scale.py). Float32 is an eighth as fast on a
T4 (8.1 against 65 TFLOP/s, the manufacturer's figures), and takes twice the memory.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from halfbyte.errors import ConfigError
from halfbyte.runtime import device as devices
from halfbyte.runtime.device import DeviceSpec

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def configure_allocators() -> None:
    """Configure torch's allocators for a GPU, unless the user has; only before a context exists.

    Expandable segments, since those of fixed size cause fragmentation: a 7B model on chats of many
    lengths reserved 47 to 82 GB with fixed ones, 40 to 53 without. Page-locked memory touched by
    threads: 5.7 GB, for the offloaded inputs of a 7B's layers, took 1.7 s with 8 threads and 3.6 s
    by the driver alone; copies are as fast (2026-11-29_gpu_page_locked.json).
    """
    newer = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)
    name = "PYTORCH_ALLOC_CONF" if newer else "PYTORCH_CUDA_ALLOC_CONF"
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        threads = 1 << min(4, (os.cpu_count() or 1).bit_length() - 1)  # torch needs a power of 2
        os.environ[name] = (
            "expandable_segments:True,pinned_use_cuda_host_register:True,"
            f"pinned_num_register_threads:{threads}"
        )


def choose_device_and_dtype(device: str, compute_dtype: str) -> tuple[str, torch.dtype, str]:
    """Resolve ``auto`` and check the rest.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        compute_dtype: ``auto``, ``float32``, ``bfloat16`` or, on a GPU, ``float16``.

    Returns:
        The device, the dtype of activations and products, and the reason in one line.

    Raises:
        ConfigError: If the device is not available, a name is unknown, or the device does not
            support the dtype.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu or cuda, got {device!r}")
    if compute_dtype not in ("auto", *_DTYPES):
        raise ConfigError(
            f"compute_dtype must be auto, {', '.join(_DTYPES)}, got {compute_dtype!r}"
        )
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ConfigError(
            "device cuda was requested, but torch finds no CUDA device; use --device cpu"
        )
    if device == "auto":
        device = "cuda" if has_cuda else "cpu"
    if device == "cuda":
        configure_allocators()
        return device, *_gpu_dtype(devices.spec_of(torch.device(device)), compute_dtype)
    if compute_dtype == "float16":
        raise ConfigError(
            "compute_dtype float16 is for a GPU; use auto, bfloat16 or float32 on a CPU"
        )
    if compute_dtype != "auto":
        return device, _DTYPES[compute_dtype], "as requested"
    for name, present in cpu_matrix_units().items():
        if present:
            return device, torch.bfloat16, f"this CPU has {name}"
    return device, torch.float32, "this CPU has neither AVX512-BF16 nor AMX"


def _gpu_dtype(spec: DeviceSpec, compute_dtype: str) -> tuple[torch.dtype, str]:
    """Return the dtype of products on a GPU, and why."""
    if compute_dtype == "bfloat16" and not spec.has_bfloat16:
        raise ConfigError(
            f"compute_dtype bfloat16 is not for {spec.name}, which has no bfloat16 units; "
            "use auto, float16 or float32"
        )
    if compute_dtype != "auto":
        return _DTYPES[compute_dtype], "as requested"
    if spec.has_bfloat16:
        return torch.bfloat16, "this GPU multiplies bfloat16"
    if spec.runs_triton:
        return torch.float16, "this GPU has no bfloat16 units; the loss is scaled"
    return torch.float32, "this GPU has no bfloat16 units, and Triton's kernels do not run on it"


def cpu_matrix_units() -> dict[str, bool]:
    """Return which bfloat16 matrix instructions the CPU has, by name."""
    return {
        "AMX": torch.cpu._is_amx_tile_supported(),
        "AVX512-BF16": torch.cpu._is_avx512_bf16_supported(),
    }


@contextmanager
def deterministic(wanted: bool = True) -> Iterator[None]:
    """Make torch's sums on a GPU deterministic, so that repeated runs give the same bits.

    By default the backward of attention, in particular, sums in the order in which its programs
    run; the deterministic one is slower. cuBLAS reads CUBLAS_WORKSPACE_CONFIG at its first product,
    so the context must be entered before. A CPU is deterministic anyway.

    Args:
        wanted: Whether to enable it.

    Raises:
        RuntimeError: By torch, inside, for operations without a deterministic implementation.
    """
    if not wanted or not torch.cuda.is_available():
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    switches: Any = torch.utils.deterministic
    filled = switches.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # No code here reads uninitialised memory (tests poison it), and filling it takes time.
    switches.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        switches.fill_uninitialized_memory = filled
