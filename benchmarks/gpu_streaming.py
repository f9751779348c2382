"""Training steps whose frozen weights wait in host memory or on the disk, on one GPU.

    python benchmarks/gpu_streaming.py --shape llama2-70b --run 1x2048:7.5 4x2048:10
    python benchmarks/gpu_streaming.py --shape llama2-7b --weights disk --run 1x512:1.6

A run is batch x length, and the memory budget in GB. Each is compared with the same steps where all
weights are on the GPU and there is no budget. The model is that of ``halfbyte compare --shape``:
random weights in NF4 with double quantisation, made once; r = 16 on all linears, every layer
recomputed from inputs in host memory, no dropout, bfloat16. A figure is the median of the steps
after the first two; memory is torch's peak over all steps, the first and the capture of graphs
included. *bare copies* are the same bytes copied from page-locked memory in a loop, without a step;
*disk* is the same bytes of the file read by 8 threads past the page cache, without halfbyte.
"""

import argparse
import gc
import mmap
import os
import resource
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from halfbyte.runtime.precision import configure_allocators

if __name__ == "__main__":
    configure_allocators()  # as the command does, before CUDA starts

import torch
from measuring import Row, require_cuda, write

from halfbyte.config.schema import TrainConfig
from halfbyte.engine.choose import choose_engine
from halfbyte.engine.memory_policy import memory_limit
from halfbyte.engine.packing import Batch
from halfbyte.linear.layer_store import DiskLayers
from halfbyte.linear.layer_stream import stream_of
from halfbyte.linear.lora import adapter_parameters
from halfbyte.report import open_report
from halfbyte.tools.synthetic_model import PREFIX, random_model
from halfbyte.train.schedule import Schedule
from halfbyte.train.trainer import Trainer


def settings(args: argparse.Namespace, budget: float | None) -> TrainConfig:
    options: Row = {"model": PREFIX + args.shape, "data": "d", "output": "o"}
    options |= {"optim": args.optim, "activations": args.keep, "weights": args.weights}
    options["memory_budget"] = None if budget is None else int(budget * 1e9)
    return TrainConfig.model_validate(options)


def measured(model: Any, args: argparse.Namespace, size: str, budget: float | None) -> Row:
    """Make steps within the budget, and return their time and memory."""
    config, stream = settings(args, budget), stream_of(model)
    assert stream is not None
    stream.stream_all_but([])  # before the limit: all may still be on the GPU
    gc.collect()
    torch.cuda.empty_cache()
    with memory_limit("cuda", config.memory_budget):
        return within(model, args, config, size, budget)


def within(
    model: Any, args: argparse.Namespace, config: TrainConfig, size: str, budget: float | None
) -> Row:
    batch, length = map(int, size.split("x"))
    stream = stream_of(model)
    assert stream is not None
    torch._C._host_emptyCache()  # what offloaded inputs of the runs before took
    torch.cuda.reset_peak_memory_stats()
    engine, message = choose_engine(
        model, "cuda", lengths=[[length] * batch], state_bits=config.state_bits
    )
    print(message)
    schedule = Schedule(1e-4, "constant", 0, 100)
    trainer = Trainer(engine, adapter_parameters(model), config, schedule)
    plan = trainer.fit([[(batch, length)]], [[length] * batch])
    print(plan.summary())
    trainer.capture()
    vocabulary = model.config.vocab_size
    seconds = []
    for step in range(args.steps + 2):
        ids = torch.randint(3, vocabulary, (batch, length))
        torch.cuda.synchronize()
        began = time.perf_counter()
        result = trainer.step(step, [Batch(ids, ids)])
        seconds.append(time.perf_counter() - began)
        assert result.loss > 0
    for note in engine.messages:
        print(note)
    streamed = len(stream.streamed)
    row: Row = {
        "shape": args.shape,
        "size": size,
        "weights": "gpu" if not streamed else args.weights,
        "optim": args.optim,
        "activations": plan.policy.summary(len(engine.layers)),
        "graphs": engine.num_graphs,
        "budget_GB": budget,
        "ms": round(1e3 * statistics.median(seconds[2:]), 1),
        "peak_GB": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "reserved_GB": round(torch.cuda.max_memory_reserved() / 1e9, 2),
        "predicted_GB": round(plan.reserved_bytes / 1e9, 2),
        "streamed_layers": streamed,
        "copied_GB": round(2 * streamed * stream.layers[0].nbytes / 1e9, 2),
        "host_GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }
    trainer.release()
    return row


def bare_copies_ms(model: Any, layers: int) -> float:
    """Milliseconds to bring so many layers to the GPU, twice, without anything else."""
    stream = stream_of(model)
    assert stream is not None
    stream.stream_all_but([])
    order = [i % len(stream.layers) for i in range(2 * layers)]
    torch.cuda.synchronize()
    began = time.perf_counter()
    for layer in order:
        stream.acquire(layer)
        stream.release(layer)
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began)


def disk_ms(source: DiskLayers, layers: int) -> float:
    """Milliseconds to read the file of so many layers, twice, as fast as threads can."""
    file, nbytes = source._source, source._starts[layers]
    assert file is not None, "the file system has no direct reads"
    piece, local = 8 << 20, threading.local()

    def read(start: int) -> None:
        if not hasattr(local, "buffer"):
            local.buffer = mmap.mmap(-1, piece)  # aligned to pages
        count = os.preadv(file, [memoryview(local.buffer)[: min(piece, nbytes - start)]], start)
        assert count == min(piece, nbytes - start)

    with ThreadPoolExecutor(8) as threads:
        began = time.perf_counter()
        for _ in range(2):
            list(threads.map(read, range(0, nbytes, piece)))
        return 1e3 * (time.perf_counter() - began)


def work(args: argparse.Namespace) -> list[Row]:
    began = time.perf_counter()
    with open_report(None, quiet=True) as report:
        model, memory = random_model(settings(args, None), torch.bfloat16, "cuda", report)
    print(f"built in {time.perf_counter() - began:.0f} s, {memory.total_bytes / 1e9:.2f} GB")
    stream, rows = stream_of(model), []
    assert stream is not None
    bare: dict[int, float] = {}
    resident: dict[str, Row] = {}
    for one in args.run:
        size, _, budget = one.partition(":")
        row = measured(model, args, size, float(budget))
        layers = row["streamed_layers"]
        if layers not in bare:
            bare[layers] = round(bare_copies_ms(model, layers), 1)
        row["bare_copies_ms"] = bare[layers]
        if isinstance(stream.source, DiskLayers):
            row["disk_ms"] = round(disk_ms(stream.source, layers), 1)
            row["of_disk_speed"] = round(row["disk_ms"] / row["ms"], 3)
        if not args.no_resident:
            if size not in resident:
                resident[size] = measured(model, args, size, None)
                rows.append(resident[size])
            row["over_resident"] = round(row["ms"] / resident[size]["ms"], 3)
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama2-70b")
    parser.add_argument("--run", nargs="+", default=["1x2048:7.5", "4x2048:10"])
    parser.add_argument("--weights", choices=["host", "disk"], default="host")
    parser.add_argument("--keep", default="offload")
    parser.add_argument("--optim", default="adamw_8bit")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--no-resident", action="store_true")
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/DATE_gpu_streaming.json"
    )
    args = parser.parse_args()
    require_cuda()
    write("gpu_streaming", args.output, rows=work(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
