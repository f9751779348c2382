"""FP8 products on one GPU: decode, rounding of activations, and products, beside those in bfloat16.

    python benchmarks/gpu_fp8.py

The shapes are those of Llama-2-7B with 8192 tokens: q, k and v as one, gate and up as one, the
output projection, the last of the MLP, and the gradient of gate and up's input. Milliseconds are
the median of replays of a CUDA graph. *bf16* is base and adapter in one kernel (triton_matmul.py),
*own* the same in FP8, *torch* torch._scaled_mm with scales of rows and *whole* with one scale each,
both without an adapter. *low* adds an adapter to what exists. ``error`` is relative to float64.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROWS, RANK = 8192, 16
SHAPES = {
    "qkv": ([4096] * 3, 4096),
    "o": ([4096], 4096),
    "gate, up": ([11008] * 2, 4096),
    "down": ([4096], 11008),
    "d qkv": ([4096], 12288),
    "d gate, up": ([4096], 22016),
}


def milliseconds(work: Callable[[], Any], seconds: float = 0.15) -> float:
    """Median time of one call in a CUDA graph of ten, without launches from the host."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds * 1e3:
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[1:]) / 10


def measured(work: Callable[[], Any]) -> float | str:
    """As `milliseconds`; what is raised instead, so that one failure loses nothing else."""
    try:
        return round(milliseconds(work), 3)
    except Exception as error:  # any kernel's; it is in the table
        return f"{type(error).__name__}: {str(error)[:60]}"


def products_of(outputs: list[int], inputs: int) -> dict[str, Any]:
    from halfbyte.linear import triton_fp8, triton_matmul
    from halfbyte.linear.fp8 import scaled_product
    from halfbyte.linear.triton_lora import CastAdapters, add_low_rank
    from halfbyte.quant import e4m3, triton_e4m3

    generator = torch.Generator("cuda").manual_seed(0)

    def drawn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, device="cuda") * scale).bfloat16()

    x, w = drawn(ROWS, inputs), drawn(sum(outputs), inputs, scale=0.02)
    adapters = CastAdapters(
        drawn(len(outputs) * RANK, inputs, scale=0.01), drawn(sum(outputs), RANK, scale=0.01), RANK
    )
    p = x @ adapters.a.t()
    weights = list(w.split(outputs))
    data, scale = e4m3.encode(w)
    rounded, x_scale = triton_e4m3.quantize_rows([x])
    one = torch.ones((), device="cuda")

    def own() -> torch.Tensor:
        return triton_fp8.product(rounded, x_scale, data, scale, p, adapters.b, RANK, outputs)

    def torchs(fast: bool) -> torch.Tensor:
        return scaled_product(rounded, x_scale, data, scale, x.dtype, fast=fast)

    def whole() -> torch.Tensor:
        return torch._scaled_mm(
            rounded,
            data.t(),
            scale_a=one,
            scale_b=one,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    y = drawn(ROWS, sum(outputs))
    row: dict[str, Any] = {
        "bf16": measured(lambda: triton_matmul.forward(x, weights, p, adapters, outputs)),
        "own": measured(own),
        "torch": measured(lambda: torchs(True)),
        "slow": measured(lambda: torchs(False)),
        "whole": measured(whole),
        "low": measured(lambda: add_low_rank(y, p, adapters.b, outputs)),
        "round": measured(lambda: triton_e4m3.quantize_rows([x])),
    }
    tflop = 2 * ROWS * sum(outputs) * inputs / 1e12
    row["own_tflops"] = round(tflop / row["own"] * 1e3) if isinstance(row["own"], float) else None
    few = 256  # rows compared with float64
    exact = (rounded[:few].double() * x_scale[:few]) @ (data.double() * scale[:, None]).t()
    low = torch.cat(
        [
            a @ b.t()
            for a, b in zip(
                p[:few].double().split(RANK, 1), adapters.b.double().split(outputs), strict=True
            )
        ],
        1,
    )
    for name, work, wanted in (
        ("own", own, exact + low),
        ("torch", lambda: torchs(True), exact),
        ("slow", lambda: torchs(False), exact),
    ):
        try:
            error = (work()[:few].double() - wanted).norm() / wanted.norm()
            row[f"{name}_error"] = float(f"{error.item():.2g}")
        except Exception as error:
            row[f"{name}_error"] = type(error).__name__
    return row


def decoding(out: int, inputs: int) -> dict[str, Any]:
    from halfbyte.quant import dequantize, e4m3, quantize, triton_e4m3

    w = torch.randn(out, inputs, device="cuda").mul_(0.02).bfloat16()
    q = quantize(w, quant_type="nf4", block_size=64, double_quant=True)
    data = torch.empty(out, inputs, dtype=e4m3.DTYPE, device="cuda")
    across = torch.empty(inputs, out, dtype=e4m3.DTYPE, device="cuda")
    scale = torch.empty(out, device="cuda")
    row: dict[str, Any] = {
        "bf16": measured(lambda: dequantize(q, torch.bfloat16, out=w)),
        "e4m3": measured(lambda: triton_e4m3.decode(q, data, None, scale)),
        "both": measured(lambda: triton_e4m3.decode(q, data, across, scale)),
    }
    wanted, wanted_scale = e4m3.decode(q)
    pairs = ((data, wanted), (across.t().contiguous(), wanted), (scale, wanted_scale))
    row["differ"] = [int((a.float() != b.float()).sum()) for a, b in pairs]
    return row


def rounding(sizes: tuple[int, ...]) -> dict[str, Any]:
    from halfbyte.quant import triton_e4m3

    parts = [torch.randn(ROWS, size, device="cuda").bfloat16() for size in sizes]
    factors = torch.ones(sum(sizes), device="cuda")
    took = measured(lambda: triton_e4m3.quantize_rows(parts, factors))
    gigabytes = 3e-9 * ROWS * sum(sizes)
    return {
        "ms": took,
        "tb_per_s": round(gigabytes / took, 2) if isinstance(took, float) else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="a JSON file for the table")
    parser.add_argument("--quick", action="store_true", help="only what is around the products")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA device, and torch sees none", file=sys.stderr)
        raise SystemExit(2)
    rows: dict[str, Any] = {}
    for out, inputs in ((4096, 4096), (11008, 4096), (4096, 11008)):
        rows[f"decode {out}x{inputs}"] = decoding(out, inputs)
    for sizes in ((4096,), (11008,), (4096,) * 3, (11008,) * 2):
        rows[f"round {sizes}"] = rounding(sizes)
    for name, (outputs, inputs) in SHAPES.items() if not args.quick else ():
        rows[name] = products_of(outputs, inputs)
    for name, row in rows.items():
        print(f"{name:20s}", *(f"{key} {value}" for key, value in row.items()), flush=True)
    if args.output is not None:
        args.output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
