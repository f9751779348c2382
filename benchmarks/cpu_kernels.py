"""Times decoding and encoding of 4-bit weights on a CPU, compared with bitsandbytes and a copy.

    python benchmarks/cpu_kernels.py --threads 2

For a 4096x4096 weight and one of SmolLM2-135M's (1536x576), NF4, blocks of 64, double quantisation,
to float32 and bfloat16. Contestants take turns within every round, so that a slow moment of the
machine affects all of them. *reused* decodes into an existing tensor; *fresh* into a new one, whose
pages the system has yet to provide if it is large. *copy* is ``out.copy_(source)`` of the result's
dtype, reused or fresh. All results are compared with plain PyTorch's before they are timed.

bitsandbytes writes into new tensors only. *bitsandbytes-bare* calls its library function directly
on an existing tensor, to exclude page faults from the comparison. bitsandbytes runs AVX-512 code if
the CPU has it, and scalar code with AVX2 only; rows of 8 elements make it run the latter here too
(*bitsandbytes-scalar*).
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from math import prod
from pathlib import Path

import bitsandbytes.functional as bnb
import torch

from halfbyte.quant import cpu, dequantize, quantize

SHAPES = {"4096x4096": (4096, 4096), "1536x576": (1536, 576)}
RESULTS = (torch.float32, torch.bfloat16)
PEERS = ("bitsandbytes fresh", "bitsandbytes-bare reused", "bitsandbytes-scalar fresh")
Times = dict[str, dict[str, float]]


def take_turns(contestants: dict[str, Callable[[], object]], rounds: int) -> Times:
    """Times every contestant once a round; least and median, in milliseconds."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):  # the first warms up
        for name, run in contestants.items():
            start = time.perf_counter()
            result = run()
            seconds[name].append(time.perf_counter() - start)
            del result
    return {
        name: {
            "least_ms": round(min(taken[1:]) * 1e3, 4),
            "median_ms": round(statistics.median(taken[1:]) * 1e3, 4),
        }
        for name, taken in seconds.items()
    }


def bare(codes: torch.Tensor, state: bnb.QuantState, out: torch.Tensor) -> torch.Tensor:
    """What `bnb.dequantize_4bit` does, into `out`."""
    scales = bnb.dequantize_blockwise(state.absmax, state.state2)
    scales += state.offset
    kind = {torch.float32: "fp32", torch.bfloat16: "bf16"}[out.dtype]
    function = getattr(bnb.lib, f"cdequantize_blockwise_cpu_nf4_{kind}")
    addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (codes, scales, out)]
    function(*addresses, *(ctypes.c_longlong(size) for size in (state.blocksize, *out.shape)))
    return out


def decoding(shape: tuple[int, int], dtype: torch.dtype, rounds: int) -> Times:
    kernels = cpu.kernels()
    assert kernels is not None, cpu.describe()
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    q = quantize(weight)
    codes, state = bnb.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    state.dtype = dtype
    _, scalar = bnb.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    scalar.dtype = dtype
    scalar.shape = torch.Size((prod(shape) // 8, 8))
    expected = dequantize(q, dtype, impl="torch")
    out, source = torch.empty_like(expected), expected.clone()
    contestants: dict[str, Callable[[], torch.Tensor]] = {
        "bitsandbytes fresh": lambda: bnb.dequantize_4bit(codes, state),
        "bitsandbytes-bare reused": lambda: bare(codes, state, out),
        "bitsandbytes-scalar fresh": lambda: bnb.dequantize_4bit(codes, scalar),
        "copy reused": lambda: out.copy_(source),
        "copy fresh": lambda: source.clone(),
        "plain PyTorch reused": lambda: dequantize(q, out=out, impl="torch"),
    }

    def with_variant(variant: cpu.Variant, fresh: bool) -> torch.Tensor:
        result = kernels.empty(shape, dtype) if fresh else out
        kernels.decode(q, result, variant=variant)
        return result

    for variant in kernels.variants:
        contestants[f"{variant} reused"] = lambda variant=variant: with_variant(variant, False)
        contestants[f"{variant} fresh"] = lambda variant=variant: with_variant(variant, True)
    for name, run in contestants.items():
        out.fill_(float("nan"))
        assert torch.equal(run().view(-1), expected.view(-1)), name
    return take_turns(contestants, rounds)


def encoding(shape: tuple[int, int], dtype: torch.dtype, rounds: int) -> Times:
    kernels = cpu.kernels()
    assert kernels is not None
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    contestants: dict[str, Callable[[], object]] = {
        "bitsandbytes": lambda: bnb.quantize_4bit(
            weight, compress_statistics=True, quant_type="nf4"
        ),
        "plain PyTorch": lambda: quantize(weight, impl="torch"),
        "halfbyte": lambda: quantize(weight),
    }
    for variant in kernels.variants:  # without the scales' second quantisation
        contestants[f"{variant} codes"] = lambda variant=variant: kernels.encode(
            weight.view(-1), "nf4", 64, variant=variant
        )
    return take_turns(contestants, rounds)


def ratios(times: Times) -> dict[str, float]:
    """Of medians: times faster than bitsandbytes, and time over that of a copy."""
    found = {}
    for name, taken in times.items():
        variant, _, where = name.partition(" ")
        if variant not in ("scalar", "avx2", "avx512"):
            continue
        for peer in PEERS:
            found[f"{name} / {peer}: faster"] = times[peer]["median_ms"] / taken["median_ms"]
        copy = times[f"copy {where}"]["median_ms"]
        found[f"{name} / copy {where}: its time"] = taken["median_ms"] / copy
    return {name: round(ratio, 2) for name, ratio in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: dict[str, Times] = {}
    compared: dict[str, dict[str, float]] = {}
    for label, shape in SHAPES.items():
        rounds = args.rounds if shape[0] > 2000 else 10 * args.rounds
        for dtype in RESULTS:
            name = str(dtype).removeprefix("torch.")
            rows[f"decode {label} to {name}"] = times = decoding(shape, dtype, rounds)
            compared[f"decode {label} to {name}"] = ratios(times)
            rows[f"encode {label} from {name}"] = encoding(shape, dtype, max(5, rounds // 8))
    for row, times in rows.items():
        print(f"\n{row}\n{'':30s}{'least':>10s}{'median':>10s}  ms")
        for name, taken in times.items():
            print(f"{name:30s}{taken['least_ms']:10.3f}{taken['median_ms']:10.3f}")
        for name, ratio in compared.get(row, {}).items():
            print(f"    {name}: {ratio}")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python " + " ".join(sys.argv),
        "device": next((line.split(":")[1].strip() for line in lines if "model name" in line), "?"),
        "kernels": cpu.describe(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in ("torch", "bitsandbytes")},
        "rows": rows,
        "ratios_of_medians": compared,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{record['date'][:10]}_cpu_kernels.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{path}")


if __name__ == "__main__":
    main()
