"""``halfbyte compare``: trains LoRA, QLoRA and other variants and compares them."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator

from halfbyte.checkpoint.output_lock import output_lock
from halfbyte.cli.opening import AdapterName
from halfbyte.config.command_line import Command, results
from halfbyte.config.data_sources import Data, DataSources, as_words, name_of
from halfbyte.config.options import one_or_several, parse_names
from halfbyte.config.schema import TrainConfig

_VARIED = ("quant", "double_quant", "seed", "resume")

# For runs with random weights: enough steps to time, with the size and options of most published
# measurements.
_SHAPE_RUN: dict[str, Any] = {
    "batch_size": 2,
    "max_length": 512,
    "gradient_accumulation_steps": 1,
    "max_steps": 20,
    "activations": "recompute",
}


class CompareOptions(TrainConfig):
    """The options of the comparison; those of training apply to all variants."""

    model: str = Field("", description="base model, as for train")
    data: DataSources = Field((), description="training data, as for train")
    variants: Annotated[tuple[str, ...], BeforeValidator(parse_names)] = Field(
        ("lora", "qlora"),
        description="what to train: lora, qlora, fp4, no-double-quant, any option as name=value "
        "(r=64), or several joined by + (lora+r=64)",
    )
    seeds: Annotated[tuple[NonNegativeInt, ...], BeforeValidator(parse_names)] = Field(
        (0,), min_length=1, description="seeds to train each variant from, such as 0,1,2"
    )
    exact_match: bool = Field(
        True,
        description="generate answers to held-out rows and compare them with the expected ones",
    )
    max_new_tokens: PositiveInt = Field(256, description="longest answer, in tokens")
    adapter: Annotated[tuple[AdapterName, ...], BeforeValidator(one_or_several)] = Field(
        (),
        description="an adapter that exists, such as the output of a run: evaluated on eval_data, "
        "not trained. Can be given several times, and without variants nothing is trained",
    )
    shape: str | None = Field(
        None,
        min_length=1,
        description="instead of model and data: random weights of a known shape, such as "
        "llama2-7b; measures memory and speed only",
    )
    samples: int = Field(0, ge=0, description="prompts to answer before and after each run")

    sections: ClassVar[dict[str, str]] = TrainConfig.sections | {"variants": "the comparison"}

    @model_validator(mode="after")
    def _what_is_compared(self) -> Self:
        varied = [f"`{name}`" for name in _VARIED if name in self.model_fields_set]
        if varied:
            raise ValueError(f"{', '.join(varied)}: use `variants` and `seeds` instead")
        if self.push_to_hub is not None:
            raise ValueError("`push_to_hub`: upload the adapter you choose with `halfbyte push`")
        if self.adapter and not self.eval_data:
            raise ValueError("`adapter` needs `eval_data`: what to evaluate on")
        if {"-"} & {str(one) for one in (*self.data, *(self.eval_data or ()))}:
            raise ValueError(
                "standard input is read once, and every run reads its data: use a file"
            )
        if self.shape is None:
            needed = ("model", "data") if self.trained else ("model",)
            missing = [f"`{name}`" for name in needed if not getattr(self, name)]
            if missing:
                raise ValueError(f"{' and '.join(missing)} missing; give them, or `shape`")
        elif self.model or self.data or self.eval_data or self.eval_split:  # so also with `adapter`
            raise ValueError(
                "`shape` cannot be combined with `model`, `data`, `eval_data` or `eval_split`"
            )
        return self

    @property
    def trained(self) -> tuple[str, ...]:
        """The variants to train: none if only adapters were named."""
        return () if self.adapter and "variants" not in self.model_fields_set else self.variants


COMMAND = Command(
    "compare",
    CompareOptions,
    about="Train variants with the same seeds and data, each in its own process, and print one "
    "table of memory, speed, held-out loss, exact matches and sizes. Finished runs are not "
    "repeated. Adapters that exist can be evaluated beside them.",
    example="halfbyte compare --model M --data a.jsonl --eval-data b.jsonl --output cmp",
)


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        HalfbyteError: A run has no result; the results of the others are still written.
    """
    options, notes, as_json = COMMAND.read(argv)
    with output_lock(options.output):
        _compare(options, notes, as_json=as_json)


def _compare(options: CompareOptions, notes: list[str], *, as_json: bool) -> None:
    from halfbyte.atomic import require_writable
    from halfbyte.report import open_report, show
    from halfbyte.report.comparison import Comparison
    from halfbyte.tools import compare

    variants = compare.parse_variants(options.trained) if options.trained else []
    given = {
        name: getattr(options, name)
        for name in options.model_fields_set & TrainConfig.model_fields.keys()
    } | {"samples": options.samples}
    module: tuple[str, ...] = ("halfbyte", "train")
    if options.shape is not None:
        module = ("halfbyte.tools.synthetic_model",)
        given = _SHAPE_RUN | given | {"model": f"shape:{options.shape}", "data": "random"}

    def evaluation(config: TrainConfig) -> tuple[str, ...]:
        return _evaluation(options, config)

    todo = compare.jobs(
        variants, options.seeds, given, options.output, evaluation=evaluation, module=module
    )
    output = require_writable(options.output)
    compare.require_free(output)
    found = []
    with results(as_json=as_json) as result:
        with open_report() as report:
            for note in notes:
                report.note(note)
            if not (options.eval_data or options.eval_split or options.shape):
                report.note(
                    "neither --eval-data nor --eval-split: only memory and speed are compared"
                )
            for count, job in enumerate(todo, 1):
                message = f"{job.variant}, seed {job.config.seed} ({count} of {len(todo)})"
                if job.finished():
                    report.note(f"{message}: finished before")
                    found.append(compare.run(job))
                    continue
                with report.task(message, None) as progress:
                    found.append(compare.run(job, progress))
            if todo and found[0].failure is None and (left := compare.rows_left_out(todo[0])):
                report.note(left)
            for adapter in options.adapter:
                with report.task(f"evaluating {adapter}", None):
                    words = _words_of_eval(options, adapter, options.eval_data or ())
                    found.append(compare.evaluate_existing(adapter, words, output))
        comparison, about = Comparison(tuple(found)), "random weights and tokens"
        if not options.shape:
            about = name_of(options.data or options.eval_data or ())
        names = [*options.trained, *map(compare.name_of, options.adapter)]
        compare.write_results(
            comparison,
            todo,
            output,
            title=f"{options.shape or Path(options.model).name}: {', '.join(names)}",
            about=about,
            curves=options.shape is None,
        )
        show.columns(*comparison.rows())
        show.paragraph(comparison.sentence())
        show.paragraph(str(output / "compare.html"))
        result |= comparison.as_json()
    compare.require_results(comparison)


def _evaluation(options: CompareOptions, config: TrainConfig) -> tuple[str, ...]:
    """The arguments of ``halfbyte eval`` for the adapter of a run."""
    from halfbyte.report.held_out import HELD_OUT_NAME

    data: Data | None = options.eval_data
    if options.eval_split is not None:
        data = str(config.output / HELD_OUT_NAME)  # by the same seed, the same for all variants
    if data is None or not options.exact_match:
        return ()
    return _words_of_eval(options, str(config.output), data, config)


def _words_of_eval(
    options: CompareOptions, adapter: str, data: Data, config: TrainConfig | None = None
) -> tuple[str, ...]:
    """The arguments of ``halfbyte eval`` for an adapter, with the options of its run if given."""
    config = config or options
    words = ["--model", config.model, "--adapter", adapter]
    words += [f"--data={one}" for one in as_words(data)]
    if options.eval_split is None:  # what was held out has our names, and is all used
        words += [f"--column={ours}={theirs}" for ours, theirs in config.column.items()]
        words += [] if config.max_samples is None else ["--max-samples", str(config.max_samples)]
    words += ["--max-length", str(config.max_length), "--train-on", config.train_on]
    words += ["--max-new-tokens", str(options.max_new_tokens), "--device", config.device]
    words += ["--compute-dtype", config.compute_dtype]
    if config.revision is not None:
        words += ["--revision", config.revision]
    if not options.exact_match:
        words += ["--no-exact-match"]
    if options.allow_mismatch:
        words += ["--allow-mismatch"]
    return tuple(words)
