"""``halfbyte eval``: evaluates a model, with or without adapters, on a data file."""

import dataclasses
from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from halfbyte.cli.opening import ReadModelOptions, open_model, open_side_by_side
from halfbyte.cli.startup import import_transformers
from halfbyte.config.command_line import Command, results

if TYPE_CHECKING:
    from halfbyte.report import RunReport
    from halfbyte.train.evaluate import EvalResult

_MISSES_SHOWN = 3


class EvalOptions(ReadModelOptions):
    """What to evaluate on, and how."""

    data: str = Field(min_length=1, description="a .jsonl or .json file, a directory, or a hub id")
    max_length: int = Field(
        1024, ge=2, description="longest example, in tokens; longer ones are truncated"
    )
    train_on: Literal["assistant", "all"] = Field(
        "assistant", description="tokens of the loss: the assistant's, or all"
    )
    batch_size: PositiveInt | None = Field(
        None, description="examples per batch (default: chosen automatically)"
    )
    exact_match: bool = Field(True, description="generate answers and compare them")
    max_new_tokens: PositiveInt = Field(256, description="longest answer, in tokens")

    sections: ClassVar[dict[str, str]] = {"model": "the model", "data": "the evaluation"}


COMMAND = Command(
    "eval",
    EvalOptions,
    about="Measure loss, perplexity and exact-match accuracy on a data file, of several adapters "
    "and their base model in one table.",
    example="halfbyte eval --model model.gguf --adapter out --data test.jsonl",
)


def main(argv: list[str]) -> None:
    """Run the command."""
    options, notes, as_json = COMMAND.read(argv)

    import_transformers(gpu=options.device != "cpu")
    from halfbyte.data.sources import require_source
    from halfbyte.report import open_report

    require_source(options.data)
    with results(as_json=as_json) as answer:
        with open_report() as report:
            for note in notes:
                report.note(note)
            if len(options.adapter) < 2:
                result = _evaluated(options, report, open_model(options, report))
            else:
                found: dict[str, EvalResult] = {}
                sides = open_side_by_side(options, report)
                for name in sides.names:
                    with sides.using(name) as opened:
                        found[name] = _evaluated(options, report, opened, name, first=not found)
        if len(options.adapter) < 2:
            _show(result)
            answer |= dataclasses.asdict(result)
        else:
            _show_side_by_side(found)
            answer |= {name: dataclasses.asdict(one) for name, one in found.items()}


def _evaluated(
    options: EvalOptions,
    report: "RunReport",
    opened: tuple[Any, Any],
    name: str = "",
    *,
    first: bool = True,
) -> "EvalResult":
    """Evaluate; the first of several evaluations reports on the data."""
    from halfbyte.train.evaluate import evaluate

    what = f"evaluating {name} on" if name else "evaluating on"
    with report.task(f"{what} {options.data}", None) as progress:
        return evaluate(
            *opened,
            options.data,
            max_length=options.max_length,
            train_on=options.train_on,
            batch_size=options.batch_size,
            exact_match=options.exact_match,
            max_new_tokens=options.max_new_tokens,
            progress=progress,
            note=report.note if first else None,
        )


def _show(result: "EvalResult") -> None:
    from halfbyte.report import show

    rows: dict[str, Any] = {
        "loss": f"{result.loss:.4f}",
        "perplexity": f"{result.perplexity:.3f}",
        "supervised tokens": f"{result.supervised_tokens:,}",
    }
    if result.exact_match is not None:
        rows["exact match"] = f"{100 * result.exact_match:.1f} % of {result.cases:,} cases"
    show.table(rows)
    misses = [one for one in result.samples if one["got"].strip() != one["expected"].strip()]
    for miss in misses[:_MISSES_SHOWN]:
        show.answer(miss["prompt"], {"expected": miss["expected"], "got": miss["got"]})


def _show_side_by_side(found: "Mapping[str, EvalResult]") -> None:
    """Print a table, and the first prompts that not all answer alike."""
    from halfbyte.report import show

    heads = ["", "loss", "perplexity", "tokens"]
    rows = [
        [name, f"{one.loss:.4f}", f"{one.perplexity:.3f}", f"{one.supervised_tokens:,}"]
        for name, one in found.items()
    ]
    exact = [one.exact_match for one in found.values()]
    if None not in exact:
        heads.append("exact match")
        for row, share in zip(rows, exact, strict=True):
            row.append(f"{100 * (share or 0.0):.1f} %")
    show.columns(heads, rows)
    prompts = [[case["prompt"] for case in one.samples] for one in found.values()]
    if any(one != prompts[0] for one in prompts):  # their templates refuse different rows
        return
    several = zip(*(one.samples for one in found.values()), strict=True)
    different = (cases for cases in several if len({case["got"].strip() for case in cases}) > 1)
    for cases in islice(different, _MISSES_SHOWN):
        answers = {name: case["got"] for name, case in zip(found, cases, strict=True)}
        show.answer(cases[0]["prompt"], {"expected": cases[0]["expected"]} | answers)
