"""The data of a run: read, checked and ordered before the model is loaded."""

from typing import TYPE_CHECKING

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from halfbyte.config.schema import TrainConfig
from halfbyte.data import Dataset, load_dataset
from halfbyte.train.plausibility import implausible
from halfbyte.train.run_steps import RunSteps

if TYPE_CHECKING:
    from halfbyte.report import RunReport


class RunData:
    """The data of a run.

    Attributes:
        dataset: What is trained on.
        held_out: What is evaluated on, or None.
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
    ) -> None:
        """Read the data and note what is odd about it.

        Raises:
            DataError: There is no data, or no usable row.
        """
        self.dataset = _read(config.data, tokenizer, config, report)
        self.held_out: Dataset | None = None
        if config.eval_data:
            self.held_out = _read(config.eval_data, tokenizer, config, report)
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


def _read(
    data: str, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, report: "RunReport"
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
