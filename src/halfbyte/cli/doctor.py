"""``halfbyte doctor``: what this machine can do, and whether the kernels compute rightly here."""

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from typing import Any, get_args

from halfbyte import __version__
from halfbyte.cli.options import Verb, results
from halfbyte.errors import HalfbyteError
from halfbyte.train.config import Options

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "gguf", "numpy", "pydantic")
_ODD = 1021 * 769  # the last block is not full, the last byte is half used
_LARGE = 2**24


class DoctorOptions(Options):
    """There is nothing to choose."""


VERB = Verb(
    "doctor",
    DoctorOptions,
    about="What this machine can do: versions, processor, which kernels run and why; and, in a few "
    "seconds, whether they compute what plain PyTorch computes.",
    example="halfbyte doctor",
)


def main(argv: list[str]) -> None:
    """Run the verb.

    Raises:
        HalfbyteError: The kernels do not compute what they should on this machine.
    """
    as_json = VERB.read(argv).json

    from halfbyte.report import show

    with results(as_json=as_json) as result:
        result["versions"] = {"halfbyte": __version__, "python": platform.python_version()}
        result["versions"] |= {name: importlib.metadata.version(name) for name in _PACKAGES}
        show.heading("Versions")
        show.table(result["versions"])
        result["machine"] = _machine()
        show.heading("Machine")
        show.table({key.replace("_", " "): value for key, value in result["machine"].items()})
        result["self_test"] = tested = _self_test()
        show.heading("Kernels against plain PyTorch")
        right, speed = tested["cases"] - len(tested["wrong"]), "{:.1f} GB/s".format
        show.table(
            {
                "identical, to the bit": f"{right} of {tested['cases']} cases",
                "decoding to float32": f"{speed(tested['decoded_bytes_per_second'] / 1e9)} written",
                "copying float32": f"{speed(tested['copied_bytes_per_second'] / 1e9)} written",
            }
        )
    if tested["wrong"]:
        raise HalfbyteError(
            f"the kernels compute wrongly on this machine: {', '.join(tested['wrong'])}. Name "
            "another C++ compiler in $CXX, and please report this with the lines above"
        )


def _machine() -> dict[str, str]:
    import torch

    from halfbyte.model.precision import choose_device_and_dtype, cpu_matrix_units
    from halfbyte.nf4 import cpu

    device, dtype, reason = choose_device_and_dtype("auto", "auto")
    found = cpu.kernels()
    instructions: list[str] = [*found.variants[1:]] if found else []
    instructions += [name for name, present in cpu_matrix_units().items() if present]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    has_gpu = torch.cuda.is_available()
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} in use",
        "instructions": ", ".join(instructions) or "none beyond the architecture's own",
        "memory": f"{memory / 1e9:.1f} GB",
        "gpu": torch.cuda.get_device_name() if has_gpu else "no CUDA device",
        "computes_on": f"{device} in {str(dtype).removeprefix('torch.')}: {reason}",
        "kernels": cpu.describe(),
        "paging": "not in this version" if has_gpu else "no CUDA device: nothing to page",
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _self_test() -> dict[str, Any]:
    """Quantise and dequantise with the kernels and without, compare every bit, and time it."""
    import torch

    from halfbyte.nf4 import QuantType, cpu, dequantize, quantize
    from halfbyte.nf4.format import FLOAT_TYPES

    began = time.monotonic()
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(_ODD, generator=generator)
    kernels = cpu.kernels()
    identical: dict[str, bool] = {}
    for quant_type in get_args(QuantType):
        for dtype in FLOAT_TYPES:
            weight, name = values.to(dtype), f"{quant_type} {str(dtype).removeprefix('torch.')}"
            plain = quantize(weight, quant_type=quant_type, impl="torch")
            ours = quantize(weight, quant_type=quant_type).tensors()
            identical[f"quantise {name}"] = all(
                torch.equal(ours[part], tensor) for part, tensor in plain.tensors().items()
            )
            expected = dequantize(plain, dtype, impl="torch")
            if kernels is None:
                continue
            for variant in kernels.variants:
                out = torch.full_like(expected, float("nan"))
                kernels.decode(plain, out, variant=variant)
                identical[f"dequantise {name} ({variant})"] = torch.equal(out, expected)

    large = torch.randn(_LARGE, generator=generator)
    packed, out = quantize(large), torch.empty_like(large)
    decode = _fastest(lambda: dequantize(packed, out=out))
    copy = _fastest(lambda: out.copy_(large))
    return {
        "cases": len(identical),
        "wrong": [name for name, right in identical.items() if not right],
        "decoded_bytes_per_second": large.nbytes / decode,
        "copied_bytes_per_second": large.nbytes / copy,
        "seconds": time.monotonic() - began,
    }


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few tries."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)
