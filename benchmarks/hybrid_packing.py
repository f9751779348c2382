"""A step of hybrid models with documents of many lengths: packed, padded, and one by one.

    python benchmarks/hybrid_packing.py                                     (CPU, float32)
    python benchmarks/hybrid_packing.py --device cuda --dtype bfloat16

Models have the shapes of published ones (Qwen3.5, Qwen3-Next, Granite 4 hybrid, LFM2), with fewer
layers of each kind and a small vocabulary, and random weights in NF4. Steps of documents with
lognormal lengths are made

    packed     documents in rows, without padding (on a GPU: in the shapes of buckets)
    padded     all documents in one micro-batch, padded to the longest
    alone      every document in a micro-batch of its own, as where packing would not be exact

in turns and in one process, with all layers saved, from the same adapters. Reported are the medians
of tokens per second (without padding), of the ratios of each pair, by the clock and, on a CPU, by
the processor's time; and how far the gradients of a step are from those of its documents alone.
"""

import argparse
import json
import os
import statistics
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    GraniteMoeHybridConfig,
    Lfm2Config,
    PretrainedConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)

from halfbyte.data import Example, collate
from halfbyte.engine.choose import buckets_of, choose_engine
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.packing import Batch
from halfbyte.layers.multimodal import build_decoder
from halfbyte.linear.lora import LoRAConfig, adapter_parameters, attach
from halfbyte.models.build import BaseRecipe, build, finalize, load_tensor
from halfbyte.plan.policy import ActivationPolicy
from halfbyte.runtime.malloc import keep_freed_memory
from halfbyte.train.evaluate import as_batch

MEDIAN, SIGMA, LONGEST, RANK, VOCABULARY = 200, 0.8, 1024, 16, 4096
WAYS = ("packed", "padded", "alone")
_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def configs() -> dict[str, PretrainedConfig]:
    """Return the shapes; layers are one period of the model's pattern."""
    gated = {"head_dim": 256, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
    three_to_one = ["linear_attention"] * 3 + ["full_attention"]
    return {
        "qwen3.5-0.8b": Qwen3_5TextConfig(
            **_TOKENS, **gated, hidden_size=1024, intermediate_size=3584, num_hidden_layers=4,
            num_attention_heads=8, num_key_value_heads=2, linear_num_key_heads=16,
            linear_num_value_heads=16, layer_types=three_to_one, tie_word_embeddings=False,
        ),
        "qwen3-next (1/4 width, 32 experts)": Qwen3NextConfig(
            **_TOKENS, **gated, hidden_size=512, intermediate_size=1280, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=1, linear_num_key_heads=4,
            linear_num_value_heads=8, num_experts=32, num_experts_per_tok=4,
            moe_intermediate_size=128, shared_expert_intermediate_size=128,
            layer_types=three_to_one,
        ),
        "granite-4.0-h-350m": GraniteMoeHybridConfig(
            **_TOKENS, hidden_size=768, intermediate_size=2048, shared_intermediate_size=2048,
            num_hidden_layers=4, num_attention_heads=12, num_key_value_heads=4,
            num_local_experts=0, num_experts_per_tok=0, position_embedding_type=None,
            mamba_n_heads=48, mamba_d_head=32, mamba_d_state=128, mamba_n_groups=1,
            mamba_chunk_size=256, layer_types=three_to_one, tie_word_embeddings=False,
        ),
        "lfm2-350m": Lfm2Config(
            **_TOKENS, hidden_size=1024, intermediate_size=6656, num_hidden_layers=4,
            num_attention_heads=16, num_key_value_heads=8,
            layer_types=["conv", "conv", "full_attention", "conv"], tie_word_embeddings=False,
        ),
    }  # fmt: skip


def model_of(config: PretrainedConfig, device: str, dtype: torch.dtype) -> Any:
    """Return a model with random weights in NF4 and adapters that change something."""
    model = build(config, BaseRecipe(compute_dtype=dtype, device=device))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in build_decoder(config).named_parameters():
        one = name.endswith(("norm.weight", "layernorm.weight", "A_log", "dt_bias", ".D"))
        drawn = torch.randn(parameter.shape, generator=generator) * 0.02
        load_tensor(model, name, (drawn + 1 if one else drawn).to(device, dtype))
    finalize(model)
    attach(model, LoRAConfig(r=RANK, alpha=RANK), seed=0)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if "lora_B" in name:  # or A would have no gradient
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 50)
    return model


def documents_of(step: int, count: int) -> list[Example]:
    """Return a step's documents, the longest first, two thirds of each learned."""
    generator = np.random.default_rng(step)
    drawn = np.clip(generator.lognormal(np.log(MEDIAN), SIGMA, count), 8, LONGEST).astype(int)
    return [
        Example(generator.integers(3, VOCABULARY, n), np.arange(n) >= n // 3, int(n // 3))
        for n in sorted(drawn.tolist(), reverse=True)
    ]


def batches_of(documents: list[Example], way: str) -> list[Batch]:
    """Return the micro-batches of a step."""
    groups = [documents] if way == "padded" else [[document] for document in documents]
    return [as_batch(collate(group)) for group in groups]


def gradients(model: Any) -> torch.Tensor:
    """Return all gradients as one vector in float64, and clear them."""
    parameters = [p for p in adapter_parameters(model).values() if p.grad is not None]
    found = torch.cat([p.grad.flatten() for p in parameters]).double().cpu()
    for parameter in parameters:
        parameter.grad = None
    return found


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Time the steps of one shape in all ways."""
    model = model_of(configs()[name], args.device, getattr(torch, args.dtype))
    steps = [documents_of(number, args.documents) for number in range(args.rounds + 1)]
    lengths = [[len(document.tokens) for document in step] for step in steps]
    engine, message = choose_engine(model, args.device)
    assert isinstance(engine, LayerEngine), message
    packed = engine.unpadded, engine.packable
    if engine.packable:
        engine.max_seqlen = max(map(max, lengths))
        engine.buckets = buckets_of(engine, lengths)
    policy = ActivationPolicy(len(engine.layers))
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in args.ways}
    found: dict[str, torch.Tensor] = {}
    for number, step in enumerate(steps):
        for way in args.ways if number % 2 else args.ways[::-1]:
            engine.unpadded, engine.packable = packed if way == "packed" else (None, False)
            batches = batches_of(step, way)
            if args.device == "cuda":
                torch.cuda.synchronize()
            clock, processor = time.perf_counter(), time.process_time()
            engine.step(batches, 1e3, policy)
            if args.device == "cuda":
                torch.cuda.synchronize()
            spent = time.perf_counter() - clock, time.process_time() - processor
            seconds[way].append(spent)
            found[way] = gradients(model)
    tokens = [sum(step) for step in lengths][1:]
    row: dict[str, Any] = {"engine": message, "tokens_per_step": tokens}
    for way in args.ways:
        rates = [n / clock for n, (clock, _) in zip(tokens, seconds[way][1:], strict=True)]
        row[f"{way}_tokens_per_second"] = round(statistics.median(rates), 1)
    for way in [way for way in args.ways if way != "packed"]:
        for index, kind in enumerate(("clock", "processor")[: 1 if args.device == "cuda" else 2]):
            pairs = zip(seconds[way][1:], seconds["packed"][1:], strict=True)
            ratios = [one[index] / other[index] for one, other in pairs]
            row[f"packed_over_{way}_{kind}"] = round(statistics.median(ratios), 2)
    for way in [way for way in args.ways if way != "alone"]:
        apart = (found[way] - found["alone"]).norm() / found["alone"].norm()
        row[f"{way}_gradient_error"] = float(f"{float(apart):.2g}")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--shapes", nargs="*", default=list(configs()))
    parser.add_argument(
        "--ways", nargs="*", choices=WAYS, default=list(WAYS), help="packed and alone are needed"
    )
    parser.add_argument("--documents", type=int, default=8, help="of a step")
    parser.add_argument("--rounds", type=int, default=6, help="steps, all ways each")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cpu":
        keep_freed_memory()
    rows = {}
    for name in args.shapes:
        rows[name] = measure(name, args)
        print(name, rows[name], flush=True)
    on_gpu = args.device == "cuda"
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python " + " ".join(sys.argv),
        "device": torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} cores",
        "load": os.getloadavg(),
        "versions": {package: version(package) for package in ("torch", "transformers")},
        "documents": f"{args.documents} a step, lognormal: median {MEDIAN}, sigma {SIGMA}, "
        f"8 to {LONGEST} tokens",
        "rows": rows,
    }
    kind = "gpu" if on_gpu else "cpu"
    path = args.output / f"{record['date'][:10]}_hybrid_packing_{kind}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
