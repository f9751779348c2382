"""``halfbyte doctor``: what this machine has, what will be used, and whether it works."""

import ctypes
import importlib.metadata
import os
import platform
import shutil
from typing import Any

from halfbyte.cli.startup import import_transformers
from halfbyte.config.command_line import Command, results
from halfbyte.config.options import Options
from halfbyte.errors import HalfbyteError
from halfbyte.version import __version__

_PACKAGES = ("torch", "transformers", "tokenizers", "gguf", "numpy", "pydantic")
_WHERE_THERE = ("triton", "datasets", "tensorboard", "wandb", "trackio", "peft", "bitsandbytes")

_CONCURRENT_MANAGED_ACCESS = 89  # CUdevice_attribute


class DoctorOptions(Options):
    """``halfbyte doctor`` has no options."""


COMMAND = Command(
    "doctor",
    DoctorOptions,
    about="Show versions, processor and GPU of this machine, what halfbyte will use of them and "
    "why, and test in a few seconds whether every part of a training run computes correct "
    "results. Exits with 1 if one does not.",
    example="halfbyte doctor",
)


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        HalfbyteError: A self-test fails on this machine.
    """
    as_json = COMMAND.read(argv).json

    import_transformers()
    from halfbyte.report import show
    from halfbyte.runtime.precision import choose_device_and_dtype
    from halfbyte.tools.self_test import checks

    with results(as_json=as_json) as result:
        result["versions"] = _versions()
        show.heading("Installed")
        show.table(result["versions"])
        device, dtype, reason = choose_device_and_dtype("auto", "auto")
        result["machine"] = _machine()
        show.heading("Machine")
        show.table(result["machine"])
        result["used"] = _used(device, f"{str(dtype).removeprefix('torch.')}: {reason}")
        show.heading("What will be used, and why")
        show.table(result["used"])
        show.heading("Self-test")
        result["self_test"] = done = []
        for check in checks(device, dtype):
            show.outcome(check.passed, f"{check.name}: {check.message}")
            done.append(check._asdict())
        wrong = [check["name"] for check in done if not check["passed"]]
        result["passed"] = not wrong
        if not wrong:
            spent = sum(check["seconds"] for check in done)
            show.paragraph(f"All {len(done)} passed ({spent:.1f} s).")
    if wrong:
        raise HalfbyteError(
            f"wrong results on this machine: {'; '.join(wrong)}. If it is the decoding, try "
            "another C++ compiler ($CXX), otherwise another version of torch. Please report this "
            "with the lines above"
        )


def _versions() -> dict[str, str]:
    found = {"halfbyte": __version__, "python": platform.python_version()}
    found |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    for name in _WHERE_THERE:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _machine() -> dict[str, str]:
    import torch

    from halfbyte.runtime import device as devices
    from halfbyte.runtime.precision import cpu_matrix_units

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    units = [name for name, present in cpu_matrix_units().items() if present]
    vector = torch.backends.cpu.get_cpu_capability()
    found = {
        "processor": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} in use",
        "instructions": ", ".join([vector, *units]),
        "memory": f"{memory / 1e9:.1f} GB, {free / 1e9:.1f} free",
    }
    if not torch.cuda.is_available():
        return found | {"gpu": "no CUDA device"}
    spec = devices.spec_of(torch.device("cuda"))
    major, minor = spec.capability
    unused, total = torch.cuda.mem_get_info()
    return found | {
        "gpu": f"{spec.name}, sm_{major}{minor}, "
        f"{spec.num_sms} multiprocessors, CUDA {torch.version.cuda}"
        + (f"; the first of {torch.cuda.device_count()}" if torch.cuda.device_count() > 1 else ""),
        "gpu memory": f"{total / 1e9:.1f} GB, {unused / 1e9:.1f} free",
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _used(device: str, products: str) -> dict[str, str]:
    from halfbyte.quant import cpu
    from halfbyte.runtime.matmul import float32_library

    library, reason = float32_library()
    found = {
        "products": f"on {device} in {products}",
        "4-bit weights, CPU": cpu.describe(),
        "C++ compiler": _compiler(),
        "float32, CPU": f"products by {library}: {reason}",
    }
    if device == "cuda":
        found["4-bit weights, GPU"] = _gpu_kernels()
        found["attention"] = _gpu_attention()
    else:
        found["attention"] = "halfbyte's own on a CPU, in blocks of queries; masked: torch's"
    return found | {"paging": paging(device)}


def _compiler() -> str:
    named = os.environ.get("CXX")
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return f"{named}, from $CXX" if named else found or "none: c++, g++ and clang++ were not found"


def _gpu_kernels() -> str:
    from halfbyte.quant.format import gpu_kernels

    if gpu_kernels() is None:
        return "plain PyTorch, because Triton cannot be imported"
    return f"Triton {importlib.metadata.version('triton')}, compiled on first use"


def _gpu_attention() -> str:
    import torch

    cuda: Any = torch.backends.cuda  # its functions are untyped
    kinds = {
        "flash": cuda.flash_sdp_enabled(),
        "cuDNN": cuda.cudnn_sdp_enabled(),
        "memory-efficient": cuda.mem_efficient_sdp_enabled(),
    }
    on = [name for name, enabled in kinds.items() if enabled]
    return f"torch's: the first of {', '.join(on)} that supports the shapes" if on else "torch's"


def paging(device: str) -> str:
    """Describe how optimizer state can be paged, or why it cannot."""
    if device != "cuda":
        return "no CUDA device: there is nothing to page from"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        answer, number = ctypes.c_int(), ctypes.c_int()
        failed = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(number), 0)
        failed = failed or driver.cuDeviceGetAttribute(
            ctypes.byref(answer), _CONCURRENT_MANAGED_ACCESS, number
        )
    except (OSError, AttributeError) as error:
        return f"page-locked memory only: the driver cannot be queried ({error})"
    if failed:
        return f"page-locked memory only: the driver returns error {failed}"
    if not answer.value:
        return "page-locked memory only: concurrentManagedAccess is 0 (Windows, WSL, vGPU)"
    return "managed memory (concurrentManagedAccess is 1), or page-locked memory"
