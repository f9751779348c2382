"""``halfbyte plan``: predicts memory and time of LoRA and QLoRA before any download."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from halfbyte.config.command_line import Command, results
from halfbyte.config.options import BlockSize, Options, parse_bytes, parse_names
from halfbyte.errors import ConfigError

if TYPE_CHECKING:
    from halfbyte.plan.advice import Way
    from halfbyte.plan.holding import Holding
    from halfbyte.plan.ledger import Run
    from halfbyte.plan.model_shape import ModelShape
    from halfbyte.plan.roofline import GpuSpec


_COLUMNS = 4  # ways in a table


class PlanOptions(Options):
    """The model, the device and the run to predict."""

    model: str | None = Field(
        None,
        min_length=1,
        description="base model: a directory (config.json is enough), a .gguf file, a hub id, "
        "of which only config.json and file headers are downloaded, or a size such as 70b",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    shape: str | None = Field(
        None,
        min_length=1,
        description="instead of a model: llama2-7b, llama3-8b, qwen3-8b …, or fields of a "
        "config.json (model_type=llama,hidden_size=2048,…)",
    )
    quant: Literal["nf4", "fp4"] = Field("nf4", description="4-bit type of QLoRA's base")
    double_quant: bool = Field(True, description="quantise the scales (double quantisation)")
    block_size: BlockSize = Field(64, description="weights that share a scale")

    card: str | None = Field(
        None,
        description="t4, 3060, 4060, 4080, 3090, 4090, l4, a10, a100-40, a100-80, h100, h200, "
        "b200, or this-machine, which is measured (default)",
    )
    gpu_memory: Annotated[PositiveInt | None, BeforeValidator(parse_bytes)] = Field(
        None, description="available memory, such as 24GB (default: the card's)"
    )

    host_memory: Annotated[PositiveInt | None, BeforeValidator(parse_bytes)] = Field(
        None, description="host memory that may be taken, such as 64GB (default: any)"
    )
    gpus: PositiveInt = Field(1, description="number of GPUs, which share the examples of a step")

    lora_r: PositiveInt = Field(16, description="rank of the adapters")
    target_modules: Annotated[tuple[str, ...], BeforeValidator(parse_names)] = Field(
        ("all-linear",), description="linear layers with an adapter: all-linear, or q_proj,v_proj …"
    )
    target_parameters: Annotated[tuple[str, ...], BeforeValidator(parse_names)] = Field(
        (), description="parameters with an adapter too, such as experts"
    )
    optim: Literal["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = Field(
        "adamw", description="optimizer"
    )
    batch_size: PositiveInt = Field(1, description="examples per micro-batch")
    gradient_accumulation_steps: PositiveInt = Field(
        8, description="micro-batches per optimizer step"
    )
    max_length: int = Field(1024, ge=2, description="tokens per example")
    compute: Literal["auto", "fp8"] = Field(
        "auto", description="products with packed weights in 16 bits, or in 8 (fp8)"
    )

    sections: ClassVar[dict[str, str]] = {
        "model": "the base model",
        "card": "the machine",
        "lora_r": "the run",
    }

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if (self.model is None) == (self.shape is None):
            raise ValueError("give either `model` or `shape`")
        return self


COMMAND = Command(
    "plan",
    PlanOptions,
    about="Predict memory and time of a run before any download: 16-bit LoRA and QLoRA side by "
    "side, which of them fit, the longest sequence, the largest batch and the largest model that "
    "fit, and a recommendation.",
    example="halfbyte plan --model meta-llama/Llama-2-7b-hf --gpu-memory 24GB",
    positional=("model",),
)


class Forecast(NamedTuple):
    """What the planner says of a model on a device."""

    shape: "ModelShape"
    card: "GpuSpec"
    memory: float
    run: "Run"
    ways: list["Way"]
    advice: str
    notes: list[str]


def forecast(options: PlanOptions) -> Forecast:
    """Predict memory and time of each way to train.

    Raises:
        UserError: The model cannot be opened or trained, or the card is not known.
    """
    from halfbyte.plan.advice import advice, ways
    from halfbyte.plan.holding import Holding
    from halfbyte.plan.ledger import Run

    card, notes = _card(options), []
    if options.card is None and not card.measured:
        notes.append(f"seconds are those of {card.name}; --card names another")
    holding = Holding(
        options.quant, options.double_quant, options.block_size, itemsize=card.itemsize
    )
    shape, holding, said = _shape(options, holding)
    notes += said
    memory = float(options.gpu_memory or card.memory)
    batch, micro_batches = options.batch_size, options.gradient_accumulation_steps
    if options.gpus > 1:  # each takes its share of the examples, rounded up
        batch, micro_batches = 1, -(-batch * micro_batches // options.gpus)
    run = Run(
        holding,
        options.lora_r,
        () if _targets(options) == "all-linear" else options.target_modules,
        batch,
        options.max_length,
        micro_batches,
        options.optim,
        fused=card.device == "cuda",
        device=card.device,
        checkpoint_width=card.checkpoint_width,
        gpu=card.gpu,
        embedding_on_host=True,
        parameters=options.target_parameters,
        fp8=options.compute == "fp8",
    )
    if run.fp8 and card.device == "cuda" and not card.gpu.has_fp8:
        raise ConfigError(f"compute fp8 is not for {card.name}: FP8 units come with Ada and Hopper")
    found = ways(shape, run, card, memory, host_memory=options.host_memory, gpus=options.gpus)
    return Forecast(shape, card, memory, run, found, advice(found, memory), notes)


def main(argv: list[str]) -> None:
    """Run the command."""
    options, notes, as_json = COMMAND.read(argv)

    from halfbyte.plan.advice import choices
    from halfbyte.report import open_report

    with results(as_json=as_json) as result, open_report() as report:
        for note in notes:
            report.note(note)
        shape, card, memory, run, found, message, said = forecast(options)
        for note in said:
            report.note(note)
        _show(shape, found, card, memory, message, options.gpus, options.host_memory)
        result |= {
            "model": shape.name,
            "parameters": shape.parameters,
            "active_parameters": shape.active_parameters,
            "card": card._asdict(),
            "memory_bytes": int(memory),
            "gpus": options.gpus,
            "tokens_per_step": options.gpus * run.tokens,
            "longest_context": max((way.longest or 0 for way in found), default=0),
            "ways": [_as_json(shape, way, options.gpus) for way in found],
            "choices": [choice._asdict() for choice in choices(shape, found[1].run)],
            "advice": message,
        }


def _card(options: PlanOptions) -> "GpuSpec":
    from halfbyte.plan.roofline import CARDS, HERE, card_named

    if options.card is not None:
        return card_named(options.card)
    import torch  # takes a second, and is not needed if the card is named

    if options.gpu_memory is None or torch.cuda.is_available():
        return card_named(HERE)
    wanted = float(options.gpu_memory)
    return min(CARDS.values(), key=lambda card: abs(card.memory - wanted))


def _shape(options: PlanOptions, holding: "Holding") -> tuple["ModelShape", "Holding", list[str]]:
    """Return the model's shape, how it is held, and notes on its files.

    Tensors already packed stay packed.
    """
    from halfbyte.plan.model_shape import config_of, shape_of_config, shape_of_known

    known = options.shape or options.model or ""
    if (shape := shape_of_known(known)) is not None and not Path(known).exists():
        return shape, holding, []
    import torch
    from transformers import AutoConfig

    from halfbyte.checkpoint.base_model import is_hub_id, open_base
    from halfbyte.checkpoint.directory import require_files
    from halfbyte.checkpoint.hub_headers import fetch_headers
    from halfbyte.checkpoint.source import foreign_reader
    from halfbyte.layers.multimodal import build_decoder
    from halfbyte.linear.lora import LoRAConfig
    from halfbyte.models.build import BaseRecipe
    from halfbyte.models.support import require_trainable
    from halfbyte.plan.holding import Holding
    from halfbyte.train.memory_check import shape_of_source

    def of_config(config: Any, name: str) -> tuple["ModelShape", "Holding", list[str]]:
        shape = shape_of_config(config, name)
        require_trainable(build_decoder(config), adapters)
        if config.model_type == "gpt_oss" and holding.quant != "none":  # as it is published
            weights = tuple(w._replace(packs=w.role != "linear") for w in shape.weights)
            return replace(shape, weights=weights), replace(holding, experts="mxfp4"), []
        return shape, holding, []

    adapters = LoRAConfig(
        target_modules=_targets(options), target_parameters=options.target_parameters
    )
    if options.shape is not None:
        return of_config(config_of(options.shape), options.shape)
    assert options.model is not None
    path = Path(options.model).expanduser()
    with tempfile.TemporaryDirectory() as directory:
        if not path.exists() and is_hub_id(options.model):
            path = Path(directory)
            fetch_headers(options.model, path, revision=options.revision)
        elif (path / "config.json").exists() and not any(path.glob("*.safetensors")):
            require_files(path)
            with foreign_reader(f"{path}: transformers cannot read config.json"):
                config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            return of_config(config, options.model)
        source = open_base(path)
        require_trainable(source.skeleton, adapters)
        shape = replace(shape_of_source(source), name=options.model)
        dtype = torch.bfloat16 if holding.itemsize == 2 else torch.float32
        recipe = BaseRecipe(options.quant, options.double_quant, options.block_size, dtype)
        notes = [source.left_out] if source.left_out else []
        if source.decoded_from is not None:
            notes.append(f"its weights are quantised, {source.decoded_from}, and are decoded first")
        return shape, Holding.of(source.fitted(recipe)), notes


def _targets(options: PlanOptions) -> str | tuple[str, ...]:
    given = options.target_modules
    return "all-linear" if given == ("all-linear",) else given


def _batch(most: int | None) -> str:
    """Return the largest batch as text; packed steps are split, so there any batch fits."""
    from halfbyte.plan.advice import MOST

    return "–" if most is None else "any" if most == MOST else f"{most:,}"


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f}"


def time_of_step(seconds: float) -> str:
    """Seconds in words, also if they are few: ``12 ms``, ``3.2 s``, ``4:05``."""
    from halfbyte.report.live import duration

    return duration(seconds) if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def _tokens(number: int) -> str:
    """Return a number of tokens to three digits: ``262k``, ``1.05M``."""
    return f"{number / 1e6:.3g}M" if number >= 999_500 else f"{number / 1e3:.3g}k"


def _count(number: float) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def _show(
    shape: "ModelShape",
    found: list["Way"],
    card: "GpuSpec",
    memory: float,
    message: str,
    gpus: int,
    host_memory: float | None,
) -> None:
    from halfbyte.plan.advice import choices, longest_context, usable
    from halfbyte.plan.ledger import policy_of
    from halfbyte.plan.traffic import traffic
    from halfbyte.report import show

    run, every, found = found[0].run, found, _shown(found)
    show.heading(f"{_count(shape.parameters)} parameters: {shape.name}")
    shown = found[1]
    show.paragraph(f"{shown.name}, in bytes:")
    show.columns(
        ["", "bytes", "GB"],
        [(line.name, f"{line.nbytes:,}", _gb(line.nbytes)) for line in shown.ledger.all_lines()],
    )
    show.heading(
        f"{run.micro_batches} x {run.batch} x {run.length:,} tokens a step on "
        + (f"each of {gpus} x " if gpus > 1 else "")
        + f"{card.name}, {memory / 1e9:.1f} GB"
    )
    moved = [traffic(shape, way.run, gpus) for way in found]
    rows: dict[str, list[str]] = {
        "fits": ["yes" if way.fits else "no" for way in found],
        "base, GB": [_gb(way.ledger.base) for way in found],
        "trained, GB": [_gb(way.ledger.total("trained")) for way in found],
        "load peak, GB": [_gb(way.ledger.load_peak) for way in found],
        "least, GB": [_gb(way.least) for way in found],
        "peak, GB": [_gb(way.ledger.peak) for way in found],
        "needs, GB": [_gb(way.ledger.needed) for way in found],
        "host, GB": [_gb(gpus * way.ledger.on_host) for way in found],
        "over the bus, GB": [_gb(one.to_gpu + one.to_host) for one in moved],
        "between GPUs, GB": [_gb(one.between_gpus) for one in moved],
        "activations": [way.run.policy.summary(shape.layers) for way in found],
        "a step": [time_of_step(way.seconds.total) for way in found],
        "tokens/s": [f"{gpus * way.run.tokens / way.seconds.total:,.0f}" for way in found],
        "longest sequence": [f"{way.longest:,}" if way.longest else "–" for way in found],
        "largest batch": [_batch(way.most) for way in found],
        "largest model": [_count(way.parameters) for way in found],
    }
    if not any(way.ledger.on_host for way in found):
        del rows["host, GB"]
    if not any(one.to_gpu for one in moved):
        del rows["over the bus, GB"]
    if gpus == 1:
        del rows["between GPUs, GB"]
    graphs = any(way.ledger.needed > way.ledger.peak for way in found)
    if not graphs:
        del rows["needs, GB"]
    show.columns(["", *(way.name for way in found)], [(name, *row) for name, row in rows.items()])
    show.paragraph(
        "\nTrained: adapters, gradients and moments. Least: with every layer recomputed in "
        "backward. "
        + "Over the bus, between GPUs: in a step, of each GPU. "
        * (gpus > 1 or any(one.to_gpu for one in moved))
        + "Longest and largest are for one micro-batch and every layer recomputed; the "
        "largest model is one of this model's proportions. "
        + "CUDA graphs keep the memory of the passes, so more is needed than the peak. " * graphs
        + "Speeds "
        + ("were measured here." if card.measured else "follow from the maker's figures.")
    )
    if len(found) < len(every):
        names = ", ".join(way.name for way in every if way not in found)
        show.paragraph(f"Not shown, but in --json: {names}.")
    policies = [way.run.policy for way in found if way.fits]
    if any(0 < kept < shape.layers for each in policies for kept in (each.saved, each.decoded)):
        budget = int(usable(memory, card.device) / 1e8) / 10
        show.paragraph(f"To keep as much for backward, train with --memory-budget {budget:g}GB.")
    if any(way.ledger.on_host or "offload" in way.name for way in found):
        one = replace(run, batch=1, micro_batches=1)
        per_sequence = one.step_cost(shape).host_bytes(policy_of(shape, run, 0, offload=True))
        show.paragraph(
            f"Offloading takes up to {per_sequence / 1e9:.2f} GB of the host's memory for each "
            f"sequence of {run.length:,} tokens."
        )
    if any(way.seconds.launching == way.seconds.total for way in found):
        show.paragraph("Where a step is short, it is Python's launching that takes the time.")
    if (mixture := shape.mixture) is not None:
        show.paragraph(
            f"A mixture of experts: a token goes through {mixture.per_token} of {mixture.experts} "
            f"in {mixture.layers} layers, {_count(shape.active_parameters)} of its parameters. "
            f"The base takes {_formats(shape, shown.run)}."
        )
    if not shape.fusable:
        show.paragraph(
            "The layers of this family are run as transformers has them: what they keep for "
            "backward, and the time between their products, are estimates."
        )
    if shape.positions and any((way.longest or 0) > shape.positions for way in found):
        show.paragraph(f"The model itself was made for sequences of up to {shape.positions:,}.")
    if (longest := longest_context(every)) is not None and longest.longest:
        within = "" if host_memory is None else f" and {host_memory / 1e9:.0f} GB of host memory"
        show.paragraph(
            f"Longest context: about {_tokens(longest.longest)} tokens, with {longest.name} "
            f"({longest.option}) within {memory / 1e9:.0f} GB{within}."
        )
    show.heading("Activations and optimizers, of QLoRA")
    show.columns(
        ["", "GB", "host, GB", "peak, GB"],
        [
            (f"--{c.option} {c.value}", _gb(c.nbytes), _gb(c.on_host), _gb(c.peak))
            for c in choices(shape, found[1].run)
        ],
    )
    show.heading("Advice")
    show.paragraph(message)


def _shown(found: list["Way"]) -> list["Way"]:
    """Return the ways that a table has room for: the plain ones, and the first others that fit."""
    others = [way for way in found[2:] if way.fits and way.run.waits is None]
    others += [way for way in found[2:] if way.fits and way not in others]
    if not any(way.fits for way in found):
        others = sorted(found[2:], key=lambda way: way.ledger.needed)
    chosen = [*found[:2], *others[: _COLUMNS - 2]]
    return [way for way in found if way in chosen]


def _formats(shape: "ModelShape", run: "Run") -> str:
    """Return the bytes of the base model in each format, in words."""
    from halfbyte.plan.holding import Holding, nbytes_of

    ways = {
        "in 16 bits": Holding("none"),
        "in NF4": Holding("nf4", double_quant=False),
        "in NF4 with double quantisation": Holding("nf4"),
    }
    if run.holding.experts is not None:
        ways["with its experts in MXFP4, as published"] = run.holding
    sizes = {
        name: sum(nbytes_of(weight, shape, holding) for weight in shape.weights)
        for name, holding in ways.items()
    }
    return ", ".join(f"{_gb(size)} GB {name}" for name, size in sizes.items())


def _as_json(shape: "ModelShape", way: "Way", gpus: int) -> dict[str, Any]:
    from halfbyte.plan.traffic import traffic

    entries = way.ledger
    return {
        "name": way.name,
        "fits": way.fits,
        "holding": way.run.holding.__dict__,
        "saved_layers": way.run.policy.saved,
        "offloaded_layers": way.run.policy.offloaded,
        "attention_checkpoints": way.run.policy.attention_checkpoints,
        "decoded_layers": way.run.policy.decoded,
        "streamed_layers": way.run.policy.streamed,
        "every_nth_input": way.run.policy.every,
        "options": way.option,
        "ledger": [line._asdict() for line in entries.all_lines()],
        "base_bytes": entries.base,
        "resident_bytes": entries.resident,
        "load_peak_bytes": entries.load_peak,
        "least_peak_bytes": way.least,
        "peak_bytes": entries.peak,
        "needed_bytes": entries.needed,
        "host_bytes": gpus * entries.on_host,
        "traffic_bytes": traffic(shape, way.run, gpus)._asdict(),
        "seconds_per_step": way.seconds.total,
        "seconds": way.seconds._asdict(),
        "tokens_per_second": gpus * way.run.tokens / way.seconds.total,
        "longest_sequence": way.longest,
        "largest_batch": way.most,
        "largest_model_parameters": int(way.parameters),
    }
