"""The time of a layer against the tokens of a part, on one GPU.

    python benchmarks/gpu_part_sizes.py

Forward and backward through the layers of Llama-2-7B's shape (random weights, NF4, r = 16 on all
linears) as a run makes them: documents of chats' lengths packed, recomputed with their inputs
offloaded, as CUDA graphs. Milliseconds a layer, the median of seven; loss and optimizer are not in
it. It is why parts are filled to multiples of 1024 tokens there (``engine.buckets.wave_tokens``).
"""

import argparse
import random
import statistics
from pathlib import Path
from typing import Any

import torch
from gpu_step import config_of, random_tensor
from measuring import Row, require_cuda, write

from halfbyte.config.schema import TrainConfig
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.packing import part_of_shape
from halfbyte.layers.vocabulary import embedding_to_host
from halfbyte.linear.lora import LoRAConfig, adapter_parameters, attach
from halfbyte.models.build import BaseRecipe, build, finalize, load_tensor
from halfbyte.train.schedule import Schedule
from halfbyte.train.trainer import Trainer


def model_of(layers: int) -> Any:
    from transformers import AutoModelForCausalLM

    config = config_of("llama2-7b", layers)
    model = build(config, BaseRecipe(quant="nf4", compute_dtype=torch.bfloat16, device="cuda"))
    with torch.device("meta"):
        names = AutoModelForCausalLM.from_config(config).state_dict()
    for name, tensor in names.items():
        load_tensor(model, name, random_tensor(tuple(tensor.shape)))
    finalize(model)
    attach(model, LoRAConfig(r=16, alpha=16), seed=0)
    embedding_to_host(model)
    return model


def documents(tokens: int) -> list[int]:
    """Lengths of documents that have so many tokens together."""
    drawn, lengths = random.Random(0), list[int]()
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(left, 2048, int(drawn.lognormvariate(5.8, 0.7)) + 16))
    return lengths


def measured(model: Any, tokens: int, activations: str) -> Row:
    options = {"model": "m", "data": "d", "output": "o", "activations": activations}
    config = TrainConfig.model_validate(options)
    engine = LayerEngine(model, fuse=True, graphs=True)
    schedule = Schedule(1e-4, "constant", 0, 1)
    trainer = Trainer(engine, adapter_parameters(model), config, schedule)
    lengths = documents(tokens)
    trainer.fit([[(1, n) for n in lengths]], [lengths])
    trainer.capture()
    assert engine.buckets is not None
    assert engine._graphs is not None
    shape = engine.buckets.largest
    part = part_of_shape(shape, "cuda", supervised=16)
    part.ids.random_(3, 30_000)
    (layer_input,) = engine.embed([part])
    times: list[tuple[float, float]] = []
    for _ in range(9):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        marks[0].record()
        y = engine._graphs.forward(shape, layer_input)
        marks[1].record()
        engine._graphs.backward(shape, torch.randn_like(y))
        marks[2].record()
        torch.cuda.synchronize()
        times.append((marks[0].elapsed_time(marks[1]), marks[1].elapsed_time(marks[2])))
    forward, backward = (
        statistics.median(side) / len(engine.layers) for side in zip(*times[2:], strict=True)
    )
    trainer.clear_gradients()
    engine.forget_graphs()
    torch.cuda.empty_cache()
    return {
        "tokens": shape.tokens,
        "forward_ms": round(forward, 3),
        "backward_ms": round(backward, 3),
        "us_a_token": round(1e3 * (forward + backward) / shape.tokens, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--activations", default="offload", choices=["offload", "save"])
    parser.add_argument("--sizes", nargs=3, type=int, default=[2048, 8192, 256], metavar="N")
    parser.add_argument("--output", type=Path, help="file; a dated one in benchmarks/results")
    args = parser.parse_args()
    require_cuda()
    model = model_of(args.layers)
    first, last, step = args.sizes
    rows = []
    for tokens in range(first, last + 1, step):
        rows.append(measured(model, tokens, args.activations))
        print(rows[-1], flush=True)
    write(
        "gpu_part_sizes", args.output, layers=args.layers, activations=args.activations, rows=rows
    )


if __name__ == "__main__":
    main()
