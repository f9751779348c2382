"""The data of a run: read, checked and ordered before the model is loaded.

Data up to a size is encoded whole by then; of what is larger, or has no end, a sample is, and the
rest while it is trained on (`growing_data`).
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from halfbyte.config.data_sources import Data, name_of
from halfbyte.config.schema import TrainConfig
from halfbyte.data import Dataset, Mixture, RowsInMemory
from halfbyte.data.checks import TRAIN_ROWS, CheckOptions, DataCheck, check_data
from halfbyte.data.encoding import EncoderSpec
from halfbyte.data.loading import OpenedSource, load_rows, open_source
from halfbyte.data.row_encoder import RowEncoder
from halfbyte.data.sources import require_source
from halfbyte.data.split import split_dataset
from halfbyte.report.rejected import REJECTED_NAME, write_rejected
from halfbyte.train.growing_data import GrowingData, LargeData, StreamedData
from halfbyte.train.lazy_steps import LazySteps
from halfbyte.train.metadata import dataset_report
from halfbyte.train.plausibility import implausible
from halfbyte.train.run_steps import RunSteps

if TYPE_CHECKING:
    from halfbyte.report import RunReport


Progress = Callable[[int, int], None]
Source = Data | RowsInMemory


class RunData:
    """The data of a run.

    Attributes:
        dataset: What is trained on; a sample of it, if the rest is encoded while training.
        held_out: What is evaluated on, or None.
        check: What was found in both.
        divided: Whether that was held out of the same data, by ``eval_split``.
        plan: The examples of every step.
        lengths: For each step that ``plan.lengths`` covers, the tokens of its examples.
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
        self._run_report = report
        train: Source = config.data
        if train_data is not None:
            train = RowsInMemory(train_data, name_of(config.data))
        held_out: Source | None = config.eval_data
        if eval_data is not None:
            held_out = RowsInMemory(eval_data, name_of(config.eval_data or "eval_data"))
        elif config.eval_data is not None:
            require_source(config.eval_data)  # before the data is read, which may take long
        with ExitStack() as stack:
            self._read(config, tokenizer, train, held_out, stack)
            self._plan(config, tokenizer.pad_token_id or 0, model_config)
            self._open = stack.pop_all()

    def _plan(self, config: TrainConfig, pad_id: int, model_config: PretrainedConfig) -> None:
        report = self._run_report
        self.plan: RunSteps | LazySteps
        if self._growing is None:
            self.plan = RunSteps(self.dataset.examples, config, pad_id, self.dataset.mixture)
            if config.packing:
                report.note(_fill(self.dataset, self.plan.packs(), config.max_length))
        else:
            self.plan = LazySteps(self._growing.rows, self.dataset, config, pad_id)
            if config.packing:
                report.note(self.plan.summary())
        rows = None if self._growing is None else self._growing.rows or sys.maxsize
        lengths_of = self.dataset.lengths
        for line in implausible(config, lengths_of, self.plan.total, model_config, rows):
            report.note(line)
        lengths = self.plan.lengths()
        self.shapes = [[(len(batch), batch[0]) for batch in step] for step in lengths]
        self.lengths = [[n for batch in step for n in batch] for step in lengths]

    def _read(
        self,
        config: TrainConfig,
        tokenizer: PreTrainedTokenizerBase,
        train: Source,
        held_out: Source | None,
        stack: ExitStack,
    ) -> None:
        """Read what is trained on, and what is evaluated on, and check both."""
        report = self._run_report
        dataset, self._growing = self._read_training(config, tokenizer, train, stack)
        self.dataset, self.held_out = _noted(dataset, report), None
        self.divided = config.eval_split is not None
        if config.eval_split is not None and self._growing is not None:
            self.held_out = self._growing.held_out
        elif config.eval_split is not None:
            whole = len(dataset.last_of_row)
            self.dataset, self.held_out, texts = split_dataset(
                dataset, config.eval_split, config.seed
            )
            part = len(self.held_out.last_of_row)
            report.note(f"held out: {part:,} of {whole:,} rows, with {texts:,} different texts")
        elif held_out is not None:
            self.held_out = _noted(read_data(held_out, tokenizer, config, report), report)
        how = check_options(config, most_rows=TRAIN_ROWS)
        self.check = check_data(self.dataset, tokenizer, how, held_out=self.held_out)
        _say(self.check, report)

    def _read_training(
        self,
        config: TrainConfig,
        tokenizer: PreTrainedTokenizerBase,
        data: Source,
        stack: ExitStack,
    ) -> tuple[Dataset, GrowingData | None]:
        report = self._run_report
        growing: GrowingData
        if config.streaming and not isinstance(data, RowsInMemory):
            growing = StreamedData(config, tokenizer, report, stack)
        else:
            with _reading(data, report) as progress:
                source = _open(data, config, progress)
                if not source.is_large:
                    return _whole(source, tokenizer, config, report, progress), None
            growing = LargeData(source, config, tokenizer, report, stack)
        return growing.sample, growing

    @property
    def identity(self) -> str:
        """A digest of what is trained on, which must be equal to resume a run."""
        if self._growing is not None:
            return self._growing.identity
        return self.dataset.digest()

    @property
    def mixture(self) -> Mixture | None:
        """The rows or examples, and weights, of the sources; None without weights."""
        return self.dataset.mixture if self._growing is None else self._growing.mixture

    def lines(self, step: int) -> list[list[str]]:
        """Return the lines of the rows of a step (0-based) in the data, by micro-batch.

        Of data that is encoded while training, only of the last steps.
        """
        if isinstance(self.plan, LazySteps):
            return self.plan.lines(step)
        return [self.dataset.lines(rows) for rows in self.plan.rows(step)]

    def begin(self, output: Path, step: int, progress: Mapping[str, Any]) -> None:
        """Write rejected.jsonl, and take the examples of ``step`` (0-based) and all later ones.

        Args:
            output: The directory of the run.
            step: The first step that is made.
            progress: What the checkpoint says that the run is resumed from; nothing if there is
                none.

        Raises:
            OutputError: The file cannot be written.
            CheckpointError: The checkpoint does not say how far the run had come in the data.
        """
        held_out = [] if self.held_out is None else [self.held_out.report]
        if self._growing is None:
            path = write_rejected(output, [self.dataset.report, *held_out])
        else:
            assert isinstance(self.plan, LazySteps)
            path = write_rejected(output, held_out) if not progress else None
            size = path.stat().st_size if path is not None else 0
            self.plan.begin(step, self._growing.stream(output, progress, size))
        if path is not None:
            self._run_report.note(f"every row left out, with its line and the reason: {path}")

    def state(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint after ``step`` steps says about the data, as JSON values.

        The report on the rows so far is recorded in the journal.
        """
        if self._growing is None or not isinstance(self.plan, LazySteps):
            return {}
        self._run_report.record("data", {"step": step} | dataset_report(self._growing.report))
        return self.plan.position(step) | self._growing.state()

    def finish(self, output: Path) -> None:
        """Say of data that was encoded while training what was found in all of it."""
        if self._growing is None:
            return
        report = self._run_report
        report.note("of all rows that were read for training:")
        for line in self._growing.report.lines():
            report.note(line)
        if self._growing.has_rejected:
            path = output / REJECTED_NAME
            report.note(f"every row left out, with its line and the reason: {path}")

    def close(self) -> None:
        """End the processes that encode data, and remove temporary files."""
        self._open.close()


def _whole(
    source: OpenedSource,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    report: "RunReport",
    progress: Progress,
) -> Dataset:
    """Encode all rows of a source."""
    spec = EncoderSpec(tokenizer, source.preferred(), config.max_length, config.train_on)
    rows, small = np.arange(len(source.table)), source.is_small
    keep = source.keep and not small
    with RowEncoder(source.table, spec, keep=keep, in_process=small) as encoder:
        dataset = load_rows(source, spec, rows, encoder=encoder, progress=progress)
    if encoder.directory is not None:
        report.note(
            f"all {len(rows):,} rows ({source.table.bytes / 1e6:,.0f} MB) are encoded at once, and "
            f"kept in {encoder.directory}"
        )
    return dataset


def _fill(dataset: Dataset, packs: int, capacity: int) -> str:
    """Return how full packs are."""
    tokens = sum(len(example.tokens) for example in dataset.examples)
    return (
        f"{len(dataset.examples)} documents in {packs} packs of up to {capacity} tokens, "
        f"{tokens / (packs * capacity):.1%} full"
    )


def read_data(
    data: Source,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    report: "RunReport",
) -> Dataset:
    """Read and encode a data set as the options say, with a progress line.

    Raises:
        DataError: There is no data, or no usable row.
    """
    with _reading(data, report) as progress:
        source = _open(data, config, progress)
        return _whole(source, tokenizer, config, report, progress)


def _reading(data: Source, report: "RunReport") -> AbstractContextManager[Progress]:
    return report.task(f"reading {data if isinstance(data, RowsInMemory) else name_of(data)}")


def _open(data: Source, config: TrainConfig, progress: Progress) -> OpenedSource:
    return open_source(
        data,
        columns=config.column,
        max_samples=config.max_samples,
        keep=config.cache_data,
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
