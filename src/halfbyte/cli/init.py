"""``halfbyte init``: writes a commented configuration for this machine, a model and data."""

import math
import textwrap
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

from pydantic import BeforeValidator, Field, PositiveInt

from halfbyte.cli.config_file import ConfigFileOptions
from halfbyte.cli.plan import Forecast, PlanOptions, forecast, time_of_step
from halfbyte.config.command_line import Command, invocation, results
from halfbyte.config.importing.writing import yaml_line
from halfbyte.config.options import parse_bytes
from halfbyte.config.reading import check

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from halfbyte.plan.advice import Way
    from halfbyte.report import RunReport


class InitOptions(ConfigFileOptions):
    """The model, the data and the file to write."""

    model: str = Field(
        min_length=1,
        description="base model: a directory of safetensors, a .gguf file, or a hub id",
    )
    data: str = Field(min_length=1, description="training data")
    gpu_memory: Annotated[PositiveInt | None, BeforeValidator(parse_bytes)] = Field(
        None, description="available memory, such as 24GB (default: this machine's)"
    )
    card: str | None = Field(
        None, description="a GPU to write it for, such as 4090 (default: this machine)"
    )

    sections: ClassVar[dict[str, str]] = {"output": "the file", "model": "what it is for"}


COMMAND = Command(
    "init",
    InitOptions,
    about="Write a commented configuration for this machine, a model and data: it reads the "
    "lengths of the rows, asks `halfbyte plan` whether LoRA or QLoRA fits, and comments on "
    "each value.",
    example="halfbyte init model.gguf train.jsonl",
    positional=("model", "data"),
)

_SHARE = 0.98  # of the rows that max_length leaves whole
_LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_PER_STEP = 8  # examples of an optimizer step
_HELD_OUT = 0.02  # share of the rows


class _Lengths(NamedTuple):
    """What the data says about ``max_length``.

    Attributes:
        tokens: int64 [examples], the tokens of each, before truncation.
        positions: Positions that the model was made for, if known.
        usable: How many rows are, in words.
    """

    tokens: "NDArray[np.int64]"
    positions: int | None
    usable: str

    def whole(self, length: int) -> float:
        """The share of the examples that are not longer."""
        return float((self.tokens <= length).mean())

    def candidates(self) -> list[int]:
        """Values of ``max_length``, the best first: the least that leaves nearly all whole."""
        most = self.positions or _LENGTHS[-1]
        possible = [length for length in _LENGTHS if length <= most] or [most]
        enough = [length for length in possible if self.whole(length) >= _SHARE]
        best = enough[0] if enough else possible[-1]
        return [best, *(length for length in reversed(possible) if length < best)]


def main(argv: list[str]) -> None:
    """Run the command."""
    options, notes, as_json = COMMAND.read(argv)
    options.require_new()

    from halfbyte.report import open_report, show

    with results(as_json=as_json) as result, open_report() as report:
        for note in notes:
            report.note(note)
        lengths = _lengths_of(options, report)
        plan, max_length = _planned(options, lengths)
        for note in plan.notes:
            report.note(note)
        way = _chosen(plan.ways)
        values = _values(options, way, max_length)
        options.write(_text(plan, way, lengths, values))
        show.paragraph(plan.advice)
        show.paragraph(f"{options.output} has been written. To train with it:")
        show.command(invocation("train", str(options.output)))
        result |= {"output": str(options.output), "options": values, "advice": plan.advice}


def _lengths_of(options: InitOptions, report: "RunReport") -> _Lengths:
    import numpy as np

    from halfbyte.checkpoint.base_model import open_vocabulary
    from halfbyte.data import load_dataset

    tokenizer, positions = open_vocabulary(options.model)
    with report.task(f"reading {options.data}") as progress:
        dataset = load_dataset(options.data, tokenizer, max_length=_LENGTHS[-1], progress=progress)
    for line in dataset.report.lines():
        report.note(line)
    tokens = np.array([len(example.tokens) for example in dataset.examples])
    usable = f"{dataset.report.usable:,} of {dataset.report.rows:,} rows usable"
    return _Lengths(tokens, positions, usable)


def _planned(options: InitOptions, lengths: _Lengths) -> tuple[Forecast, int]:
    """Ask the planner, with a shorter ``max_length`` if nothing fits otherwise."""
    for max_length in lengths.candidates():
        asked = {
            "model": options.model,
            "max_length": max_length,
            "batch_size": 1,
            "gradient_accumulation_steps": _PER_STEP,
            "gpu_memory": options.gpu_memory,
            "card": options.card,
        }
        plan = forecast(check(PlanOptions, asked))
        if any(way.fits for way in plan.ways):
            break
    return plan, max_length


def _chosen(ways: Sequence["Way"]) -> "Way":
    """The way of the planner's advice: the first that fits, unless QLoRA is faster than LoRA."""
    fitting = [way for way in ways if way.fits] or [ways[1]]
    if ways[0].fits and ways[1].fits and ways[1].seconds.total < 0.97 * ways[0].seconds.total:
        return ways[1]
    return fitting[0]


def _values(options: InitOptions, way: "Way", max_length: int) -> dict[str, Any]:
    holding = way.run.holding
    values: dict[str, Any] = {
        "model": options.model,
        "quant": holding.quant,
        "data": options.data,
        "max_length": max_length,
        "eval_split": _HELD_OUT,
        "batch_size": 1,
        "gradient_accumulation_steps": _PER_STEP,
        "epochs": 1,
        "learning_rate": 2e-4,
        "output": "out",
    }
    if "offload" in way.name:
        values["activations"] = "offload"
    if holding.quant != "none" and holding.quantize_head:
        values |= {"quantize_head": True, "quantize_embeddings": holding.quantize_embeddings}
    return values


def _text(plan: Forecast, way: "Way", lengths: _Lengths, values: dict[str, Any]) -> str:
    """The configuration: the options, and in comments why they have these values."""
    examples = math.ceil(len(lengths.tokens) * (1 - _HELD_OUT))
    steps = max(1, math.ceil(examples / _PER_STEP))
    longest, length = int(lengths.tokens.max()), values["max_length"]
    shorter = f"{lengths.whole(length):.1%} of the examples are not longer; the longest has"
    why = {
        "quant": "nf4: 4 bits (QLoRA); none: 16 bits (LoRA)",
        "data": lengths.usable,
        "max_length": f"{shorter} {longest:,} tokens",
        "eval_split": "the share of the rows that is held out, to measure the loss on",
        "gradient_accumulation_steps": f"{_PER_STEP} examples a step: {steps:,} steps an epoch",
        "learning_rate": "1e-5 to 1e-3 is usual",
        "activations": "layer inputs wait in host memory",
        "quantize_head": "saves memory and costs quality: nothing else fits",
        "output": "the adapter, checkpoints, journal.jsonl and report.html",
    }
    memory, need = plan.memory / 1e9, way.ledger.needed / 1e9
    fits = f"{need:.1f} of {memory:.3g} GB" if way.fits else f"{need:.1f} GB, and has {memory:.3g}"
    comments = [
        f"Written by halfbyte init on {datetime.now(UTC):%Y-%m-%d}, for {plan.card.name}.",
        "",
        f"Predicted: {way.name} needs {fits}; a step of {_PER_STEP} x {length:,} tokens "
        f"takes {time_of_step(way.seconds.total)}.",
        plan.advice,
        "",
        "halfbyte train --help lists all options and their defaults.",
    ]
    lines = [
        line
        for comment in comments
        for line in textwrap.wrap(comment, 98, initial_indent="# ", subsequent_indent="# ") or ["#"]
    ]
    entries = {name: yaml_line(name, value) for name, value in values.items()}
    column = min(44, max(map(len, entries.values())))
    lines.append("")
    for name, entry in entries.items():
        lines.append(f"{entry:<{column}}  # {why[name]}" if name in why else entry)
    return "\n".join(lines) + "\n"
