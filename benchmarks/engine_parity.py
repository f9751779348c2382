"""Twenty optimizer steps with the layer engine, in each of its modes, compared with plain autograd.

    python benchmarks/engine_parity.py --model SmolLM2-135M-Instruct.gguf

From the same base model, adapters and data: the losses of all steps, and the gradients of the
first, by plain autograd over transformers' own layers, and the distance of each mode from them:

    layers     layer by layer, transformers' layers
    fused      the fused layers of layers/decoder_layer.py
    packed     and the documents of a step packed                 (GPU)
    graphs     and CUDA graphs                                    (GPU)
    offload    and layer inputs in host memory                    (GPU)
    saved      as fused or graphs, with every layer saved
    decoded    and decoded weights kept

Modes with the same arithmetic must be equal bit for bit; the table says so.
"""

import argparse
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import write

from halfbyte.checkpoint.base_model import load_base, open_base
from halfbyte.config.schema import TrainConfig
from halfbyte.engine import layerwise
from halfbyte.engine.autograd import AutogradEngine
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.packing import Batch, lengths_of
from halfbyte.linear.lora import LoRAConfig, adapter_parameters, attach
from halfbyte.models.build import BaseRecipe
from halfbyte.plan.policy import ActivationPolicy
from halfbyte.train.schedule import Schedule
from halfbyte.train.trainer import Trainer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def steps(count: int, vocabulary: int) -> Iterator[list[Batch]]:
    """Two micro-batches a step, of rows of different lengths."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        batches = []
        for rows in (3, 2):
            lengths = torch.randint(24, 97, (rows,), generator=generator).sort(descending=True)[0]
            ids = torch.randint(3, vocabulary, (rows, int(lengths[0])), generator=generator)
            labels = ids.roll(-1, 1)
            for row, length in enumerate(lengths.tolist()):
                labels[row, length - 1 :] = -100
            batches.append(Batch(ids, labels, lengths.tolist()))
        yield batches


def run(args: argparse.Namespace, form: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses, and the gradients of the first step."""
    gc.collect()
    recipe = BaseRecipe(args.quant, compute_dtype=DTYPES[args.dtype], device=args.device)
    model = load_base(open_base(args.model), recipe).model
    attach(model, LoRAConfig(r=16, alpha=16), seed=0)
    parameters = adapter_parameters(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if "lora_B" in name:  # or A would have no gradient in the first step
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 100)
    packs = layerwise.can_pack
    captured = ("graphs", "offload", "notes", "saved", "decoded")
    if form not in ("packed", *captured):
        layerwise.can_pack = lambda *_: False
    engine: Any = AutogradEngine(model)
    if form != "plain":
        graphs = args.device == "cuda" and form in captured
        engine = LayerEngine(model, fuse=form != "layers", graphs=graphs)
    count = len(getattr(engine, "layers", []))
    options = TrainConfig(model="m", data="d", output="o", learning_rate=args.learning_rate)
    trainer = Trainer(engine, parameters, options, Schedule(args.learning_rate, "constant", 0, 99))
    all_steps = list(steps(args.steps, model.config.vocab_size))
    if args.device == "cuda" and form != "plain":
        shapes = [[tuple(batch.input_ids.shape) for batch in batches] for batches in all_steps]
        trainer.fit(shapes, [lengths_of(batches) for batches in all_steps])
    trainer.memory.use(
        ActivationPolicy(
            count if form in ("saved", "decoded") else 0,
            count - 1 if form in ("offload", "notes") else 0,
            form == "notes",
            count if form == "decoded" else 0,
        )
    )
    trainer.capture()
    first: dict[str, torch.Tensor] = {}
    clear = trainer.clear_gradients

    def keep_first() -> None:
        if not first:
            first.update({name: p.grad.detach().cpu().clone() for name, p in parameters.items()})
        clear()

    trainer.clear_gradients = keep_first  # type: ignore[method-assign]
    losses = [trainer.step(number, batches).loss for number, batches in enumerate(all_steps)]
    layerwise.can_pack = packs
    return losses, first


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """‖one - other‖ / ‖other‖, all gradients together."""
    apart = sum(float((one[n].double() - other[n].double()).norm() ** 2) for n in other)
    return (apart / sum(float(t.double().norm() ** 2) for t in other.values())) ** 0.5


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a directory or a GGUF file")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--quant", choices=["nf4", "none"], default="nf4")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--output", type=Path, help="file; a dated one in benchmarks/results")
    args = parser.parse_args(argv)
    forms = ["layers", "fused", "saved", "decoded"]
    if args.device == "cuda":
        forms = ["layers", "fused", "packed", "graphs", "offload", "notes", "saved", "decoded"]
    wanted, true = run(args, "plain")
    rows: dict[str, Any] = {"plain": {"losses": wanted}}
    found = {}
    for form in forms:
        losses, first = found[form] = run(args, form)
        apart = max(abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True))
        same = [
            other
            for other, (theirs, grads) in found.items()
            if other != form
            and theirs == losses
            and all(torch.equal(first[name], grads[name]) for name in grads)
        ]
        rows[form] = {
            "largest_loss_difference": apart,
            "gradient_difference": distance(first, true),
            "bit_equal_to": same,
            "last_loss": losses[-1],
        }
        print(f"{form:8s}", rows[form], flush=True)
    options = {"model": Path(args.model).name, "dtype": args.dtype, "quant": args.quant}
    write("engine_parity", args.output, machine=args.device, **options, rows=rows)


if __name__ == "__main__":
    main()
