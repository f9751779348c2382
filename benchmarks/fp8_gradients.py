"""What FP8 products change in a model's loss and gradients, by layer and by kind of linear.

    python benchmarks/fp8_gradients.py --model MODEL --rows 4

The same rows of a book (benchmarks/texts) go through the model once with products in float32 or
bfloat16 and once in FP8, forward and backward. Adapters (r = 16 on all linears) have learnt
something: their B are random, of standard deviation 0.001. A cosine is that of all
gradients of a layer's adapters in both; *alone* has one kind of linear in FP8 and the rest as it
was. Nothing is trained.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.packing import Batch
from halfbyte.linear.decoded_weight import DENSE
from halfbyte.linear.fp8_choice import use_fp8
from halfbyte.linear.lora import LoRAConfig, adapter_parameters, attach
from halfbyte.plan.policy import ActivationPolicy
from halfbyte.train.loading import open_model

TEXT = Path(__file__).with_name("texts") / "alice.txt"
KINDS = {
    "q, k, v": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate, up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


def measured(engine: LayerEngine, batch: Batch, count: float) -> tuple[float, list[torch.Tensor]]:
    """The loss, and the gradients of each layer's adapters as one vector."""
    for layer in engine.trained:
        for parameter in layer:
            parameter.grad = None
    loss = float(engine.step([batch], count, ActivationPolicy()))
    return loss, [
        torch.cat([p.grad.flatten().double() for p in layer if p.grad is not None])
        for layer in engine.trained
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a directory, a GGUF file or a hub id")
    parser.add_argument("--rows", type=int, default=4, help="of 512 tokens")
    parser.add_argument("--compute-dtype", default="auto")
    parser.add_argument("--output", type=Path, help="a JSON file")
    args = parser.parse_args()
    model, tokenizer, _ = open_model(args.model, compute_dtype=args.compute_dtype)
    attach(model, LoRAConfig(r=16, alpha=16), seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapter_parameters(model).items():
        if "lora_B" in name:
            drawn = torch.randn(parameter.shape, generator=generator) * 1e-3
            parameter.data.copy_(drawn)
    ids = tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"]
    ids = ids[0, : args.rows * 512 + 1].to(model.device)
    inputs, labels = ids[:-1].view(-1, 512), ids[1:].view(-1, 512)  # what follows each token
    batch, count = Batch(inputs, labels), float(labels.numel())
    engine = LayerEngine(model, fuse=model.device.type == "cuda")
    linears = [linear for layer in engine.linears for linear in layer]
    loss, true = measured(engine, batch, count)
    named = {linear: path for path, linear in model.named_modules() if linear in linears}

    def compared(chosen: tuple[str, ...]) -> dict[str, Any]:
        for linear in linears:
            linear.layout = DENSE
        use_fp8(linear for linear in linears if named[linear].endswith(chosen))
        found, got = measured(engine, batch, count)
        cosines = [float(torch.cosine_similarity(a, b, 0)) for a, b in zip(true, got, strict=True)]
        whole = float(torch.cosine_similarity(torch.cat(true), torch.cat(got), 0))
        return {
            "loss": found,
            "loss_percent": 100 * (found / loss - 1),
            "cosine": whole,
            "least": min(cosines),
            "of_layers": [round(cosine, 5) for cosine in cosines],
        }

    rows: dict[str, Any] = {"without": {"loss": loss}}
    every = tuple(name for names in KINDS.values() for name in names)
    for kind, names in {"all": every, **KINDS}.items():
        rows[kind] = compared(names)
        shown = {k: round(v, 5) for k, v in rows[kind].items() if k != "of_layers"}
        print(f"{kind:10s}", shown, flush=True)
    print("cosines of layers:", *rows["all"]["of_layers"])
    if args.output is not None:
        content = {"model": Path(args.model).name, "tokens": labels.numel(), "rows": rows}
        args.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
