"""Trains a model with random weights and random tokens, to measure memory and speed.

Everything that memory and step time depend on is the same as in a real run, without a checkpoint.
Its journal is that of any run; its losses mean nothing. ``halfbyte compare --shape`` starts it:

    python -m halfbyte.tools.synthetic_model CONFIG.yaml        (model: shape:llama2-7b)
"""

import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.config.reading import load_config
from halfbyte.config.schema import TrainConfig
from halfbyte.engine.choose import choose_engine
from halfbyte.engine.packing import Batch
from halfbyte.errors import UserError
from halfbyte.foreign_text import as_message
from halfbyte.layers.multimodal import build_decoder
from halfbyte.layers.vocabulary import embedding_to_host, head_to_host
from halfbyte.linear.fp8_choice import require_fp8
from halfbyte.linear.lora import adapter_parameters, attach
from halfbyte.models.build import MemoryReport, build, finalize, load_tensor, stream_layers
from halfbyte.plan.model_shape import config_of, shape_of_config
from halfbyte.report import open_report
from halfbyte.runtime.malloc import keep_freed_memory
from halfbyte.runtime.precision import choose_device_and_dtype
from halfbyte.train import metadata
from halfbyte.train.loading import choose_products, lora_of, recipe_of
from halfbyte.train.output import claim_output
from halfbyte.train.schedule import Schedule
from halfbyte.train.trainer import StepResult, Trainer
from halfbyte.train.weight_location import Processes, locate

if TYPE_CHECKING:
    from halfbyte.report import RunReport

PREFIX = "shape:"


def run(config: TrainConfig, report: "RunReport") -> None:
    """Make ``config.max_steps`` steps of ``batch_size`` x ``max_length`` tokens, all supervised.

    Raises:
        ConfigError: The shape is unknown, or the memory budget too small.
    """
    device, dtype, why = choose_device_and_dtype(config.device, config.compute_dtype)
    report.note(f"on {device}, products in {str(dtype).removeprefix('torch.')}: {why}")
    if config.compute == "fp8" and (emulated := require_fp8(device, dtype)):
        report.note(emulated)
    if device == "cpu":
        keep_freed_memory()
    architecture = config_of(config.model.removeprefix(PREFIX))
    began = time.perf_counter()
    model, base_report = random_model(config, dtype, device, report)
    report.record("loaded", {"seconds": time.perf_counter() - began} | metadata.memory_now(device))
    parameters = adapter_parameters(model)
    for message in choose_products(model, config):
        report.note(message)
    engine, message = choose_engine(model, device, graphs=config.cuda_graphs)
    report.note(message)
    total = config.max_steps or 1
    trainer = Trainer(engine, parameters, config, Schedule.of(config, total))
    size = (config.batch_size, config.max_length)
    micro_batches = config.gradient_accumulation_steps
    memory = trainer.fit([[size] * micro_batches], [[size[1]] * size[0] * micro_batches])
    report.note(memory.summary())
    made: dict[str, Any] = {
        "model": config.model,
        "quant": config.quant,
        "device": device,
        "machine": metadata.machine(device),
        "compute_dtype": str(dtype).removeprefix("torch."),
        "versions": metadata.versions(),
        "base_bytes": base_report.total_bytes,
    }
    report.begin(total_steps=total, start_step=0, metadata=made | metadata.options(config))
    tokens = size[0] * size[1] * micro_batches
    spent, loss = 0.0, math.nan

    def done(step: int, result: StepResult) -> None:
        nonlocal spent, loss
        spent, loss = spent + result.seconds, result.loss
        for line in engine.messages:
            report.note(line)
        engine.messages.clear()
        report.step(
            {
                "step": step + 1,
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "learning_rate": result.learning_rate,
                "tokens": tokens,
                "tokens_per_second": tokens / result.seconds,
                "seconds": result.seconds,
            }
            | metadata.memory_now(device)
        )

    trainer.capture()
    trainer.train(
        range(total),
        lambda _: [_drawn(size, architecture.vocab_size) for _ in range(micro_batches)],
        done,
    )
    report.finish(
        {"steps": total, "seconds": spent, "final_loss": loss} | metadata.memory_now(device)
    )


def random_model(
    config: TrainConfig,
    dtype: torch.dtype,
    device: str,
    report: "RunReport",
    processes: Processes = Processes(),  # noqa: B008
) -> tuple[PreTrainedModel, MemoryReport]:
    """Return a model with random weights, stored as a run would store them, and adapters.

    Args:
        config: The options; ``model`` is ``shape:`` and a shape.
        dtype: dtype of products.
        device: Where it is to be trained.
        report: Where to log.
        processes: Those that hold the model, or with ``shard`` a part of it.

    Raises:
        ConfigError: The shape is unknown.
    """
    architecture = config_of(config.model.removeprefix(PREFIX))
    recipe = recipe_of(config, dtype, device)
    model = build(architecture, recipe)
    place = locate(config, partial(shape_of_config, architecture, config.model), recipe, processes)
    if place.message:
        report.note(place.message)
    if place.store is not None:
        stream_layers(model, place.store)
    torch.manual_seed(config.seed)
    shapes = build_decoder(architecture)
    for name, parameter in shapes.named_parameters():  # a tied head is not among them
        load_tensor(model, name, _random(tuple(parameter.shape), dtype, device))
    memory = finalize(model)
    attach(model, lora_of(config), seed=config.seed)
    embedding_to_host(model)
    if place.store is not None:
        head_to_host(model)
    return model, memory


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype, device=device)
    return torch.randn(shape, dtype=dtype, device=device).mul_(0.02)


def _drawn(size: tuple[int, int], vocabulary: int) -> Batch:
    ids = torch.randint(3, vocabulary, size)
    return Batch(ids, ids)


def main(file: str) -> int:
    """Run a configuration file; return the exit code."""
    try:
        config, _ = load_config(Path(file), {})
        with open_report(config.output) as report, claim_output(config):
            run(config, report)
    except UserError as error:
        print(as_message(f"halfbyte compare: {error}"), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
