"""The data of a run: read, checked and ordered before the model is loaded."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from halfbyte.config.schema import TrainConfig
from halfbyte.data import Dataset, RowsInMemory, load_dataset
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
        self.dataset = _read(source, tokenizer, config, report)
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
            self.held_out = _read(rows, tokenizer, config, report)
        elif config.eval_data:
            self.held_out = _read(config.eval_data, tokenizer, config, report)
        self.plan = RunSteps(self.dataset.examples, config, tokenizer.pad_token_id or 0)
        for line in implausible(config, self.dataset.examples, self.plan.total, model_config):
            report.note(line)
        lengths = self.plan.lengths()
        self.shapes = [[(len(batch), batch[0]) for batch in step] for step in lengths]
        self.lengths = [[n for batch in step for n in batch] for step in lengths]

    def lines(self, step: int) -> list[list[str]]:
        """Return the lines of the rows of a step (0-based) in the data, by micro-batch."""
        return [[self.dataset.rows[row].line for row in rows] for rows in self.plan.rows(step)]


def _read(
    data: str | RowsInMemory,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    report: "RunReport",
) -> Dataset:
    with report.task(f"reading {data}") as progress:
        dataset = load_dataset(
            data,
            tokenizer,
            max_length=config.max_length,
            train_on=config.train_on,
            progress=progress,
        )
    for line in dataset.report.lines():
        report.note(line)
    return dataset
