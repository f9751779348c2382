"""The data of a run: read, checked and ordered before the model is loaded."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from halfbyte.config.schema import TrainConfig
from halfbyte.data import Dataset, RowsInMemory, load_dataset
from halfbyte.data.checks import TRAIN_ROWS, CheckOptions, DataCheck, check_data
from halfbyte.data.split import split_dataset
from halfbyte.train.plausibility import implausible
from halfbyte.train.run_steps import RunSteps

if TYPE_CHECKING:
    from halfbyte.report import RunReport


class RunData:
    """The data of a run.

    Attributes:
        dataset: What is trained on.
        held_out: What is evaluated on, or None.
        check: What was found in both.
        divided: Whether that was held out of the same data, by ``eval_split``.
        plan: The examples of every step.
        lengths: For each step that `RunSteps.lengths` covers, the tokens of its examples.
        shapes: For each of these steps, the rows and tokens of its micro-batches, padded.
    """

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: PreTrainedTokenizerBase,
        model_config: PretrainedConfig,
        report: "RunReport",
        *,
        train_data: Iterable[object] | None = None,
        eval_data: Iterable[object] | None = None,
    ) -> None:
        """Read the data, hold some out if wanted, and note what is odd about it.

        Args:
            config: The options of the run.
            tokenizer: The tokenizer of the base model.
            model_config: Its configuration.
            report: Where to log.
            train_data: Rows of a program, instead of those that ``config.data`` names.
            eval_data: The same instead of ``config.eval_data``.

        Raises:
            DataError: There is no data, no usable row, or too few to hold some out.
        """
        source = config.data if train_data is None else RowsInMemory(train_data, config.data)
        self.dataset = _noted(read_data(source, tokenizer, config, report), report)
        self.held_out: Dataset | None = None
        self.divided = config.eval_split is not None
        if config.eval_split is not None:
            whole = len(self.dataset.last_of_row)
            self.dataset, self.held_out, texts = split_dataset(
                self.dataset, config.eval_split, config.seed
            )
            part = len(self.held_out.last_of_row)
            report.note(f"held out: {part:,} of {whole:,} rows, with {texts:,} different texts")
        elif eval_data is not None:
            rows = RowsInMemory(eval_data, config.eval_data or "eval_data")
            self.held_out = _noted(read_data(rows, tokenizer, config, report), report)
        elif config.eval_data:
            self.held_out = _noted(read_data(config.eval_data, tokenizer, config, report), report)
        how = check_options(config, most_rows=TRAIN_ROWS)
        self.check = check_data(self.dataset, tokenizer, how, held_out=self.held_out)
        _say(self.check, report)
        self.plan = RunSteps(self.dataset.examples, config, tokenizer.pad_token_id or 0)
        if config.packing:
            report.note(_fill(self.dataset, self.plan.packs(), config.max_length))
        for line in implausible(config, self.dataset.examples, self.plan.total, model_config):
            report.note(line)
        lengths = self.plan.lengths()
        self.shapes = [[(len(batch), batch[0]) for batch in step] for step in lengths]
        self.lengths = [[n for batch in step for n in batch] for step in lengths]

    def lines(self, step: int) -> list[list[str]]:
        """Return the lines of the rows of a step (0-based) in the data, by micro-batch."""
        return [[self.dataset.rows[row].line for row in rows] for rows in self.plan.rows(step)]


def _fill(dataset: Dataset, packs: int, capacity: int) -> str:
    """Return how full packs are."""
    tokens = sum(len(example.tokens) for example in dataset.examples)
    return (
        f"{len(dataset.examples)} documents in {packs} packs of up to {capacity} tokens, "
        f"{tokens / (packs * capacity):.1%} full"
    )


def read_data(
    data: str | RowsInMemory,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    report: "RunReport",
) -> Dataset:
    """Read and encode a data set as the options say, with a progress line.

    Raises:
        DataError: There is no data, or no usable row.
    """
    with report.task(f"reading {data}") as progress:
        return load_dataset(
            data,
            tokenizer,
            max_length=config.max_length,
            train_on=config.train_on,
            progress=progress,
        )


def check_options(
    config: TrainConfig,
    positions: int | None = None,
    *,
    most_rows: int | None = None,
    ignore: tuple[str, ...] = (),
) -> CheckOptions:
    """Return how the data of a run is checked; arguments as in `CheckOptions`."""
    return CheckOptions(
        max_length=config.max_length,
        everything=config.train_on == "all",
        positions=positions,
        batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        most_rows=most_rows,
        ignore=ignore,
    )


def _noted(dataset: Dataset, report: "RunReport") -> Dataset:
    for line in dataset.report.lines():
        report.note(line)
    return dataset


_MOST_SAID = 5


def _say(check: DataCheck, report: "RunReport") -> None:
    """Warn of errors, and note a few warnings that the report on the data has not said already.

    The run goes on: whether repeated rows, or held-out rows in the training data, are a mistake is
    for the user to decide. `halfbyte check` ends with an exit code.
    """
    several = len({one.source for one in check.findings if one.source}) > 1
    new: dict[str, str] = {}
    for one in check.findings:
        if not one.reported and one.severity != "info":
            where = f"{one.source}: " if several and one.source else ""
            new.setdefault(f"{one.code}: {where}{one.text}", one.severity)
    for text, severity in list(new.items())[:_MOST_SAID]:
        if severity == "error":
            report.warning(0, "data", text)
        else:
            report.note(text)
    if len(new) > _MOST_SAID:
        report.note(f"{len(new) - _MOST_SAID} more findings are in report.html")
    if new and check.looked_at < check.rows:
        report.note(
            f"{check.looked_at:,} of {check.rows:,} rows were checked; `halfbyte check` checks all"
        )
