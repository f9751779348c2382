"""``halfbyte eval``: evaluates a model, with or without an adapter, on a data file."""

import dataclasses
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from halfbyte.cli.opening import ReadModelOptions, open_model
from halfbyte.cli.startup import import_transformers
from halfbyte.config.command_line import Command, results
from halfbyte.config.data_sources import Columns, DataSources, name_of

_MISSES_SHOWN = 3


class EvalOptions(ReadModelOptions):
    """What to evaluate on, and how."""

    data: DataSources = Field(min_length=1, description="what to evaluate on: sources as for train")
    column: Columns = Field(
        {}, description="columns under other names, such as messages=conversation"
    )
    max_samples: PositiveInt | None = Field(
        None, description="use the first N rows of each source only"
    )
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
    about="Measure loss, perplexity and exact-match accuracy on a data file.",
    example="halfbyte eval --model model.gguf --adapter out --data test.jsonl",
)


def main(argv: list[str]) -> None:
    """Run the command."""
    options, notes, as_json = COMMAND.read(argv)

    import_transformers(gpu=options.device != "cpu")
    from halfbyte.data.sources import require_source
    from halfbyte.report import open_report, show
    from halfbyte.train.evaluate import evaluate

    require_source(options.data)
    with results(as_json=as_json) as answer:
        with open_report() as report:
            for note in notes:
                report.note(note)
            model, tokenizer = open_model(options, report)
            with report.task(f"evaluating on {name_of(options.data)}", None) as progress:
                result = evaluate(
                    model,
                    tokenizer,
                    options.data,
                    columns=options.column,
                    max_samples=options.max_samples,
                    max_length=options.max_length,
                    train_on=options.train_on,
                    batch_size=options.batch_size,
                    exact_match=options.exact_match,
                    max_new_tokens=options.max_new_tokens,
                    progress=progress,
                    note=report.note,
                )
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
        answer |= dataclasses.asdict(result)
