"""Training on a CPU with documents of many lengths, packed and padded.

    python benchmarks/cpu_packing.py --model SmolLM2-135M-Instruct.Q4_1.gguf

Steps of eight documents with lognormal lengths go through a user's Trainer, as eight micro-batches
of one document (the default), and as one of eight. Speed: every step is made padded and packed, in
turns and in one process, so that a machine that does something else slows both; reported are the
medians of the tokens per second (without padding) of all steps, and of the ratio of each pair, by
the clock and by the processor's time. Padded steps are what the engine does with a model that it
cannot pack. Memory: the peak of a process of its own that makes the same steps in one way, and what
its plan predicted. Packs: documents of lognormal lengths are packed into 2048 tokens.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

DOCUMENTS, MEDIAN, SIGMA, LONGEST, RANK = 8, 200, 0.8, 1024, 16
LAYOUTS = {"1x8": 1, "8x1": 8}


def lengths_of(count: int, seed: int) -> Any:
    """Return lognormal lengths, int64 [count]."""
    drawn = np.random.default_rng(seed).lognormal(np.log(MEDIAN), SIGMA, count)
    return np.clip(drawn, 8, LONGEST).astype(np.int64)


def batches_of(step: int, size: int) -> Any:
    """Return a step's micro-batches as a run makes them: the longest first, the reply learned."""
    from halfbyte.data import Example, collate
    from halfbyte.train.evaluate import as_batch

    generator = np.random.default_rng(step)
    examples = [
        Example(generator.integers(3, 49_000, n), np.arange(n) >= n // 3, int(n // 3))
        for n in sorted(lengths_of(DOCUMENTS, step).tolist(), reverse=True)
    ]
    return [
        as_batch(collate(examples[first : first + size])) for first in range(0, DOCUMENTS, size)
    ]


def prepare(args: argparse.Namespace) -> tuple[Any, Any, list[Any]]:
    """Return engine, trainer and the steps' micro-batches."""
    import torch

    from halfbyte.checkpoint.base_model import load_base
    from halfbyte.config.schema import TrainConfig
    from halfbyte.engine.choose import choose_engine
    from halfbyte.engine.memory_policy import keep_few_products
    from halfbyte.linear.lora import LoRAConfig, adapter_parameters, attach
    from halfbyte.models.build import BaseRecipe
    from halfbyte.runtime.malloc import keep_freed_memory
    from halfbyte.train.schedule import Schedule
    from halfbyte.train.trainer import Trainer

    if args.threads:
        torch.set_num_threads(args.threads)
    steps = [batches_of(step, LAYOUTS[args.layout]) for step in range(args.rounds + 1)]
    keep_freed_memory()
    keep_few_products(shapes_of(steps), documents_of(steps))
    model = load_base(str(args.model), BaseRecipe(compute_dtype=getattr(torch, args.dtype))).model
    attach(model, LoRAConfig(r=RANK, alpha=RANK), seed=0)
    config = TrainConfig(model="-", data="-", output=Path("-"))
    engine, _ = choose_engine(model, "cpu")
    schedule = Schedule(1e-4, "constant", 0, 10**6)
    return engine, Trainer(engine, adapter_parameters(model), config, schedule), steps


def shapes_of(steps: list[Any]) -> list[list[tuple[int, int]]]:
    return [[tuple(batch.input_ids.shape) for batch in step] for step in steps]


def documents_of(steps: list[Any]) -> list[list[int]]:
    return [[n for batch in step for n in batch.lengths] for step in steps]


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Time every step both ways."""
    engine, trainer, steps = prepare(args)
    how = {"padded": None, "packed": engine.unpadded}
    trainer.fit(shapes_of(steps), documents_of(steps))
    found: dict[str, list[tuple[float, float]]] = {"padded": [], "packed": []}
    for number, step in enumerate(steps):
        for name in sorted(how, reverse=number % 2 == 1):
            engine.unpadded = how[name]
            clock, processor = time.perf_counter(), time.process_time()
            trainer.step(number, step)
            found[name].append((time.perf_counter() - clock, time.process_time() - processor))
    tokens = [sum(step) for step in documents_of(steps)][1:]
    padded = sum(b * t for step in shapes_of(steps)[1:] for b, t in step)
    row: dict[str, Any] = {"steps": len(tokens), "fill_of_padded": round(sum(tokens) / padded, 3)}
    for name, seconds in found.items():
        rates = [n / clock for n, (clock, _) in zip(tokens, seconds[1:], strict=True)]
        row[f"{name}_tokens_per_second"] = round(statistics.median(rates), 1)
    for index, name in enumerate(("ratio", "ratio_of_processor_time")):
        pairs = zip(found["padded"][1:], found["packed"][1:], strict=True)
        ratios = sorted(one[index] / other[index] for one, other in pairs)
        row[name] = round(statistics.median(ratios), 2)
        row[f"{name}_quartiles"] = [
            round(ratios[len(ratios) * quarter // 4], 2) for quarter in (1, 3)
        ]
    return row


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Make a few steps in one way."""
    from halfbyte.engine.memory_policy import peak_memory

    engine, trainer, steps = prepare(args)
    if args.way == "padded":
        engine.unpadded = None
    plan = trainer.fit(shapes_of(steps), documents_of(steps))
    for number, step in enumerate(steps):
        trainer.step(number, step)
    return {
        f"{args.way}_peak_gb": round(peak_memory("cpu") / 1e9, 3),
        f"{args.way}_planned_gb": round(plan.predicted_bytes / 1e9, 3),
    }


def packs(_: argparse.Namespace) -> dict[str, Any]:
    """Pack 5 million documents."""
    from halfbyte.data.packing import pack
    from halfbyte.engine.memory_policy import peak_memory, used_memory

    count, capacity = 5_000_000, 2048
    drawn = np.random.default_rng(0).lognormal(np.log(300), 0.8, count)
    lengths = np.clip(drawn, 2, capacity).astype(np.int64)
    del drawn
    order = np.random.default_rng(1).permutation(count)
    before, processor = used_memory("cpu"), time.process_time()
    made = pack(order, lengths, capacity)
    return {
        "documents": count,
        "seconds_of_processor": round(time.process_time() - processor, 1),
        "more_memory_mb": round((peak_memory("cpu") - before) / 1e6),
        "packs": len(made),
        "fill": round(int(lengths.sum()) / (capacity * len(made)), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2's GGUF file")
    parser.add_argument("--rounds", type=int, default=20, help="steps, both ways each")
    parser.add_argument("--memory-rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=0, help="default: torch's")
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument("--layout", help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps({"speed": speed, "memory": memory, "packs": packs}[args.worker](args)))
        return

    def call(worker: str, rounds: int = args.rounds, **options: str) -> dict[str, Any]:
        words = [f"--{name}={value}" for name, value in options.items()]
        command = [sys.executable, __file__, "--model", str(args.model), "--worker", worker]
        command += ["--rounds", str(rounds), "--threads", str(args.threads), *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        return dict(json.loads(done.stdout.splitlines()[-1]))

    rows: dict[str, Any] = {"packs": call("packs")}
    print("packs", rows["packs"], flush=True)
    for dtype in args.dtypes:
        for layout in LAYOUTS:
            row = call("speed", dtype=dtype, layout=layout)
            for way in ("padded", "packed"):
                row |= call("memory", args.memory_rounds, dtype=dtype, layout=layout, way=way)
            rows[f"{dtype} {layout}"] = row
            print(dtype, layout, row, flush=True)
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python " + " ".join(sys.argv),
        "cores": os.cpu_count(),
        "threads": args.threads or os.cpu_count(),
        "load": os.getloadavg(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "documents": f"{DOCUMENTS} a step, lognormal: median {MEDIAN}, sigma {SIGMA}, "
        f"8 to {LONGEST} tokens",
        "rows": rows,
    }
    path = args.output / f"{record['date'][:10]}_cpu_packing.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
