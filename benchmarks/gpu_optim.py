"""Times AdamW's update on a GPU, resident and paged, compared with bitsandbytes and torch.

    python benchmarks/gpu_optim.py

160 M float32 parameters in 448 tensors: the adapters of r = 64 on every linear of Llama-2-7B.

    beside    twenty steps of the kernel and of plain PyTorch: moments must be equal
    update    milliseconds per step: wall time over ten steps and one wait, the median of three; on
              the device, in a CUDA graph; on the host, until the call returns; and the time of a
              device copy of as many bytes
    paging    the same with the state on the host (explicit), and what it adds to the resident step;
              managed while everything fits; page-out before a step short of memory, and page-in
    hidden    a stand-in for backward (products of about 1 ms per layer, last layer first) alone,
              with the update after it, and with each layer updated when its products are done

``--tune`` tries other sizes of a program instead, and keeps its own row.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from gpu_kernels import copy_gb_per_s
from measuring import Row, captured, device_us, reason, require_cuda, write
from torch import Tensor

from halfbyte.optim import AdamW

RANK, LAYERS = 64, 32
LINEARS = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
# Parameter read and written, gradient read; each moment read and written, with its scales.
BYTES = {8: 12 + 4 * (1 + 4 / 256), 32: 12 + 4 * 4}


def adapters() -> list[Tensor]:
    """The parameters, each with a gradient, layer by layer."""
    made = []
    for out, inner in LINEARS * LAYERS:
        for shape in ((RANK, inner), (out, RANK)):
            parameter = torch.nn.Parameter(torch.randn(shape, device="cuda") * 0.02)
            parameter.grad = torch.randn(shape, device="cuda") * 1e-3
            made.append(parameter)
    return made


def wall_ms(run: Callable[[], object], calls: int = 10, rounds: int = 3) -> float:
    """Milliseconds a call."""
    for _ in range(3):
        run()
    taken = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
        taken.append((time.perf_counter() - begin) / calls * 1e3)
    return round(statistics.median(taken), 3)


def host_ms(run: Callable[[], object]) -> float:
    """Milliseconds until a call returns, the device idle before it."""
    taken = []
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        taken.append((time.perf_counter() - begin) * 1e3)
    return round(statistics.median(taken), 3)


def graph_ms(run: Callable[[], object]) -> float:
    """Milliseconds on the device in a CUDA graph."""
    graph = captured(run)
    return round(statistics.median(device_us(graph.replay) for _ in range(11)) / 1e3, 3)


def updates(parameters: Sequence[Tensor], copy: float) -> dict[str, Row]:
    """Every optimizer with its state on the device."""
    rate = torch.tensor(1e-4, device="cuda")
    makers: dict[str, Callable[[], Any]] = {
        "halfbyte 8 bits": lambda: AdamW(parameters, lr=rate, state_bits=8),
        "halfbyte 32 bits": lambda: AdamW(parameters, lr=rate),
        "bitsandbytes AdamW8bit": lambda: bitsandbytes.optim.AdamW8bit(parameters, lr=1e-4),
        "bitsandbytes PagedAdamW8bit": lambda: bitsandbytes.optim.PagedAdamW8bit(
            parameters, lr=1e-4
        ),
        "bitsandbytes AdamW": lambda: bitsandbytes.optim.AdamW(parameters, lr=1e-4),
        "torch fused": lambda: torch.optim.AdamW(parameters, lr=1e-4, fused=True),
    }
    count = sum(parameter.numel() for parameter in parameters)
    rows: dict[str, Row] = {}
    for name, make in makers.items():
        try:
            optimizer = make()
            rows[name] = {"ms": wall_ms(optimizer.step), "host_ms": host_ms(optimizer.step)}
            if name.startswith("halfbyte"):
                rows[name]["graph_ms"] = graph_ms(optimizer.step)
        except Exception as error:  # a peer that cannot: its row says why
            rows[name] = {"failed": reason(error)}
        bits = 32 if name.endswith(("32 bits", "AdamW", "fused")) else 8
        rows[name]["at_copy_speed_ms"] = round(count * BYTES[bits] / copy / 1e6, 3)
        optimizer = None
    return rows


def paged(parameters: Sequence[Tensor], bits: int, resident: float) -> dict[str, Row]:
    """Every way of paging, and what it adds to a resident step."""
    rows: dict[str, Row] = {}
    for mode in ("explicit", "managed"):
        optimizer = AdamW(parameters, lr=1e-4, state_bits=bits, paging=mode)
        taken = wall_ms(optimizer.step)
        optimizer.report()
        optimizer.step()
        reported = optimizer.report()._asdict()
        rows[mode] = {"ms": taken, "added_ms": round(taken - resident, 3), **reported}
        optimizer = None
    for mode in ("auto", "managed"):
        optimizer = AdamW(parameters, lr=1e-4, state_bits=bits, paging=mode)

        def tight(optimizer: AdamW = optimizer) -> None:
            optimizer.page_out()
            optimizer.step()

        taken = wall_ms(tight, calls=3)
        rows[f"{mode}, leaving and returning"] = {
            "ms": taken,
            "added_ms": round(taken - resident, 3),
        }
        optimizer = None
    return rows


def hidden(parameters: Sequence[Tensor], bits: int) -> Row:
    """The update beside a stand-in for backward, as an engine would call it."""
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) * 0.01
    out = torch.empty_like(x)
    each = 2 * len(LINEARS)
    layers = [parameters[i : i + each] for i in range(0, len(parameters), each)]

    def backward(done: Callable[[Sequence[Tensor]], None] = lambda layer: None) -> None:
        for layer in reversed(layers):
            for _ in range(5):
                torch.mm(x, x, out=out)
            done(layer)

    optimizer = AdamW(parameters, lr=1e-4, state_bits=bits, paging="explicit")

    def after() -> None:
        optimizer.prefetch()
        backward()
        optimizer.step()

    def beside() -> None:
        optimizer.prefetch()
        backward(optimizer.step_parameters)
        optimizer.step()

    return {
        "backward_ms": wall_ms(backward),
        "after_ms": wall_ms(after),
        "beside_ms": wall_ms(beside),
    }


SIZES = [
    *((4, 4, 64), (1, 1, 64), (2, 2, 64), (8, 8, 64), (4, 4, 72), (4, 4, 56), (4, 4, 48)),
    *((2, 1, 96), (4, 2, 96), (8, 4, 96), (8, 4, 128)),
]


def tuned(parameters: Sequence[Tensor]) -> dict[str, Row]:
    """Other sizes of a program, in a graph."""
    from halfbyte.optim import triton_adamw

    chosen, rows = (triton_adamw.BLOCKS, triton_adamw.WARPS, triton_adamw.REGISTERS), {}
    count = sum(parameter.numel() for parameter in parameters)
    rate = torch.tensor(1e-4, device="cuda")
    for size in SIZES:
        triton_adamw.BLOCKS, triton_adamw.WARPS, triton_adamw.REGISTERS = size
        row: Row = {}
        for bits in (8, 32):
            row[f"ms_{bits}"] = graph_ms(AdamW(parameters, lr=rate, state_bits=bits).step)
            row[f"gb_per_s_{bits}"] = round(count * BYTES[bits] / row[f"ms_{bits}"] / 1e6)
        rows["{} blocks, {} warps, {} registers".format(*size)] = row
        print(size, row, flush=True)
    triton_adamw.BLOCKS, triton_adamw.WARPS, triton_adamw.REGISTERS = chosen
    return rows


def checked() -> dict[str, Row]:
    """Twenty steps beside plain PyTorch on a CPU: moments that differ, parameters' distance."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(300_000, generator=generator)
    rows: dict[str, Row] = {}
    for bits in (8, 32):
        here, there = (torch.nn.Parameter(start.to(d, copy=True)) for d in ("cuda", "cpu"))
        pair = [AdamW([p], lr=1e-2, weight_decay=0.1, state_bits=bits) for p in (here, there)]
        sizes = 10 ** (-6 * torch.rand(len(start), generator=generator))
        for _ in range(20):
            there.grad = sizes * torch.randn(len(start), generator=generator)
            here.grad = there.grad.cuda()
            for optimizer in pair:
                optimizer.step()
        ours, plain = (optimizer.state_dict()["state"][0] for optimizer in pair)
        rows[f"{bits} bits"] = {
            "moments_that_differ": sum(
                int((ours[name] != plain[name]).sum()) for name in ours if name != "step"
            ),
            "largest_difference": float((here.detach().cpu() - there.detach()).abs().max()),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="other sizes of a program instead")
    parser.add_argument("--output", type=Path, help="file; a dated one in benchmarks/results")
    args = parser.parse_args()
    require_cuda()
    torch.manual_seed(0)
    copy = copy_gb_per_s(4_000_000_000, rounds=5)
    parameters = adapters()
    count = sum(parameter.numel() for parameter in parameters)
    print(f"copy: {copy:.0f} GB/s; {count / 1e6:.1f} M parameters in {len(parameters)} tensors")
    rows: dict[str, dict[str, Row]] = {}

    def show(title: str, found: dict[str, Row]) -> None:
        rows[title] = found
        print(f"\n{title}")
        for name, row in found.items():
            print(f"  {name:32s}", *(f"{key}={value}" for key, value in row.items()), flush=True)

    show("beside the plain rule", checked())
    if args.tune:
        show("tune", tuned(parameters))
    else:
        show("update", updates(parameters, copy))
        for bits in (8, 32):
            resident = rows["update"][f"halfbyte {bits} bits"]["ms"]
            show(f"paging, {bits} bits", paged(parameters, bits, resident))
            show(f"hidden, {bits} bits", {"explicit": hidden(parameters, bits)})
    script = "gpu_optim_tune" if args.tune else "gpu_optim"
    write(script, args.output, copy_gb_per_s=round(copy), parameters=count, rows=rows)


if __name__ == "__main__":
    main()
