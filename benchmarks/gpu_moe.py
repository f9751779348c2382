"""Training steps of mixtures of experts on one GPU, at their real shapes: time and memory.

    python benchmarks/gpu_moe.py --shape qwen3-30b-a3b --configs 1x2048 4x2048
    python benchmarks/gpu_moe.py --shape gpt-oss-20b --configs 1x2048

A config is batch x length of one optimizer step. Every layer is recomputed in backward
(``--keep offload``: with its input in host memory; ``--weights host``: weights too, as far as
``--memory-budget`` asks). LoRA with r = 16 on all linears that PEFT
adapts, no dropout, bfloat16, every position supervised, AdamW with 8-bit state.

Weights are random and packed layer by layer, since a checkpoint in 16 bits would not fit: eight
different matrices per shape, whose bytes the experts of all layers share in turn (in copies of
their own). Qwen's are in NF4 with double quantisation, except for embedding, head, norms and
routers. gpt-oss's experts are in MXFP4 and everything else in bfloat16, as it is published.

A figure is the median of the steps after the first ones; memory is torch's peak over all steps, the
first and the capture of graphs included, and the peak while the weights were made. *bare products*
are torch's grouped_mm of the experts in bfloat16, for three passes (forward, recomputation, dx) of
all layers, equally many rows per expert, timed in the same process for a second.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import Row, require_cuda, write
from torch import Tensor

RANK = 16
DIFFERENT = 8  # matrices per shape
SHAPES = ("qwen3-30b-a3b", "gpt-oss-20b")


def config_of(name: str, layers: int | None) -> Any:
    """Return transformers' configuration of a shape, with fewer layers if asked."""
    from halfbyte.plan import model_shape

    return model_shape.config_of(name if layers is None else f"{name},num_hidden_layers={layers}")


def random_tensor(shape: tuple[int, ...]) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16, device="cuda")
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda").mul_(0.02)


def model_of(config: Any, weights: str) -> Any:
    """Return a model of a shape with random weights, packed as they are made."""
    from halfbyte.layers.multimodal import build_whole
    from halfbyte.layers.vocabulary import embedding_to_host, head_to_host
    from halfbyte.linear.experts import expert_linears
    from halfbyte.linear.layer_store import HostLayers
    from halfbyte.linear.lora import LoRAConfig, attach, frozen_linears
    from halfbyte.models.build import (
        BaseRecipe,
        build,
        finalize,
        load_expert,
        load_tensor,
        stream_layers,
    )
    from halfbyte.quant import quantize
    from halfbyte.quant.mxfp4 import MXFP4Weight

    published = config.model_type == "gpt_oss"
    recipe = BaseRecipe(
        quant="nf4",
        compute_dtype=torch.bfloat16,
        device="cuda",
        experts="mxfp4" if published else None,
    )
    whole = build_whole(config)
    plain = [path for path, m in whole.named_modules() if isinstance(m, torch.nn.Linear)]
    model = build(config, recipe, plain=plain if published else [])
    if weights == "host":
        stream_layers(model, HostLayers)
    experts = expert_linears(model)
    for name, parameter in whole.named_parameters():
        if name not in experts:
            load_tensor(model, name, random_tensor(tuple(parameter.shape)))
    assert published == (not any(m.quantized for m in frozen_linears(model).values()))
    made: dict[tuple[int, ...], list[Any]] = {}
    for name, linear in experts.items():
        size = tuple(linear.matrix)
        if size not in made and published:
            count = linear.matrix[0] * linear.matrix[1]
            made[size] = [
                MXFP4Weight(
                    torch.randint(0, 256, (count // 2,), dtype=torch.uint8, device="cuda"),
                    torch.randint(116, 122, (count // 32,), dtype=torch.uint8, device="cuda"),
                    size,
                    torch.bfloat16,
                )
                for _ in range(DIFFERENT)
            ]
        elif size not in made:
            made[size] = [quantize(random_tensor(size)) for _ in range(DIFFERENT)]
        for expert in range(linear.num_experts):
            load_expert(model, name, expert, made[size][expert % DIFFERENT])
    report = finalize(model)
    attach(model, LoRAConfig(r=RANK, alpha=RANK), seed=0)
    embedding_to_host(model)
    if weights == "host":
        head_to_host(model)
    for line in report.lines():
        print(line)
    return model


def stepping(
    model: Any, batch: int, length: int, keep: str, *, graphs: bool, budget: float | None
) -> Callable[..., Any]:
    """Return a step of a new engine, as a run makes it."""
    from halfbyte.config.schema import TrainConfig
    from halfbyte.engine.choose import choose_engine
    from halfbyte.engine.packing import Batch
    from halfbyte.linear.lora import adapter_parameters
    from halfbyte.train.schedule import Schedule
    from halfbyte.train.trainer import Trainer

    settings = TrainConfig.model_validate(
        {
            "model": "m",
            "data": "d",
            "output": "o",
            "learning_rate": 1e-4,
            "optim": "adamw_8bit",
            "activations": keep,
            "memory_budget": None if budget is None else int(budget * 1e9),
        }
    )
    engine, message = choose_engine(model, "cuda", graphs=graphs, lengths=[[length] * batch])
    print(message)
    trainer = Trainer(
        engine, adapter_parameters(model), settings, Schedule(1e-4, "constant", 0, 100)
    )
    plan = trainer.fit([[(batch, length)]], [[length] * batch])
    trainer.capture()
    for note in engine.messages:
        print(note)
    engine.messages.clear()
    print(plan.summary())

    def step(ids: Tensor) -> float:
        return float(trainer.step(0, [Batch(ids, ids)]).loss)

    step.plan = plan  # type: ignore[attr-defined]
    return step


def bare_products_ms(config: Any, tokens: int) -> float:
    """Return the milliseconds of the experts' bare products in bfloat16 of a step."""
    experts = getattr(config, "num_local_experts", None) or config.num_experts
    inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    hidden, rows = config.hidden_size, tokens * config.num_experts_per_tok
    offsets = torch.arange(1, experts + 1, device="cuda", dtype=torch.int32) * (rows // experts)
    up, down = random_tensor((experts, 2 * inner, hidden)), random_tensor((experts, hidden, inner))
    x, y = random_tensor((rows, hidden)), random_tensor((rows, inner))
    dh = random_tensor((rows, 2 * inner))
    product = torch.nn.functional.grouped_mm

    def layer() -> None:
        for _ in range(2):  # forward, and its recomputation
            product(x, up.mT, offs=offsets)
            product(y, down.mT, offs=offsets)
        product(x, down, offs=offsets)
        product(dh, up, offs=offsets)

    for _ in range(5):
        layer()
    torch.cuda.synchronize()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 1.0:
        for _ in range(5):
            layer()
        torch.cuda.synchronize()
        count += 5
    return (time.perf_counter() - start) / count * 1e3 * config.num_hidden_layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--configs", nargs="+", default=["1x2048", "4x2048"])
    parser.add_argument("--keep", choices=["recompute", "offload", "auto"], default="recompute")
    parser.add_argument("--weights", choices=["gpu", "host"], default="gpu")
    parser.add_argument("--memory-budget", type=float, help="GB")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a step")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    require_cuda()
    config = config_of(args.shape, args.layers)
    bare = {}
    for text in args.configs:
        batch, length = map(int, text.split("x"))
        bare[text] = bare_products_ms(config, batch * length)
        gc.collect()
        torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    model = model_of(config, args.weights)
    loading, seconds = torch.cuda.max_memory_allocated(), time.perf_counter() - started
    print(f"made in {seconds:.1f} s, peak {loading / 1e9:.2f} GB")
    rows: list[Row] = []
    for text in args.configs:
        batch, length = map(int, text.split("x"))
        step = None
        gc.collect()
        torch.cuda.empty_cache()
        resident = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step = stepping(
            model,
            batch,
            length,
            args.keep,
            graphs=not args.no_graphs,
            budget=args.memory_budget,
        )
        generator, times, losses = torch.Generator().manual_seed(0), [], []
        for _ in range(5 + args.steps):
            ids = torch.randint(3, config.vocab_size, (batch, length), generator=generator)
            torch.cuda.synchronize()
            began = time.perf_counter()
            losses.append(step(ids))
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        ms = statistics.median(times[5:]) * 1e3
        plan: Any = step.plan  # type: ignore[attr-defined]
        rows.append(
            {
                "shape": args.shape,
                "layers": config.num_hidden_layers,
                "config": text,
                "keep": args.keep,
                "weights": args.weights,
                "streamed_layers": plan.policy.streamed,
                "ms": round(ms, 1),
                "bare_products_ms": round(bare[text], 1),
                "ratio": round(ms / bare[text], 2),
                "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
                "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
                "predicted_gb": round(plan.predicted_bytes / 1e9, 2),
                "resident_gb": round(resident / 1e9, 2),
                "load_peak_gb": round(loading / 1e9, 2),
                "loss": round(losses[-1], 4),
            }
        )
        print(rows[-1])
        print(plan.cost)
        if args.profile:
            with torch.profiler.profile() as profiled:
                step(ids)
                torch.cuda.synchronize()
            table = profiled.key_averages().table(sort_by="cuda_time_total", row_limit=40)
            print(table, file=sys.stderr)
    write("gpu_moe", args.out, rows=rows)


if __name__ == "__main__":
    main()
