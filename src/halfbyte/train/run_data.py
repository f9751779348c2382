"""The data of a run: read, checked and ordered before the model is loaded.

Data up to a size is encoded whole by then; of what is larger, or has no end, a sample is, and the
rest while it is trained on (`growing_data`).
"""

import hashlib
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from halfbyte.config.data_sources import Data, name_of
from halfbyte.config.schema import TrainConfig
from halfbyte.data import Dataset, Mixture
from halfbyte.data.encoding import EncoderSpec
from halfbyte.data.loading import OpenedSource, load_rows, open_source
from halfbyte.data.row_encoder import RowEncoder
from halfbyte.report.rejected import REJECTED_NAME, write_rejected
from halfbyte.train.growing_data import GrowingData, LargeData, StreamedData
from halfbyte.train.lazy_steps import LazySteps
from halfbyte.train.metadata import dataset_report
from halfbyte.train.plausibility import implausible
from halfbyte.train.run_steps import RunSteps

if TYPE_CHECKING:
    from halfbyte.report import RunReport


Progress = Callable[[int, int], None]


class RunData:
    """The data of a run.

    Attributes:
        dataset: What is trained on; a sample of it, if the rest is encoded while training.
        held_out: What is evaluated on, or None.
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
    ) -> None:
        """Read the data and note what is odd about it.

        Raises:
            DataError: There is no data, or no usable row.
        """
        self._run_report = report
        with ExitStack() as stack:
            self._prepare(config, tokenizer, model_config, stack)
            self._open = stack.pop_all()

    def _prepare(
        self,
        config: TrainConfig,
        tokenizer: PreTrainedTokenizerBase,
        model_config: PretrainedConfig,
        stack: ExitStack,
    ) -> None:
        report, pad_id = self._run_report, tokenizer.pad_token_id or 0
        self.dataset, self._growing = self._read(config, tokenizer, stack)
        for line in self.dataset.report.lines():
            report.note(line)
        self.held_out: Dataset | None = None
        if config.eval_data:
            with _reading(config.eval_data, report) as progress:
                source = _open(config.eval_data, config, progress)
                self.held_out = _whole(source, tokenizer, config, report, progress)
            for line in self.held_out.report.lines():
                report.note(line)
        self.plan: RunSteps | LazySteps
        if self._growing is None:
            self.plan = RunSteps(self.dataset.examples, config, pad_id, self.dataset.mixture)
        else:
            self.plan = LazySteps(self._growing.rows, self.dataset.examples, config, pad_id)
        rows = None if self._growing is None else self._growing.rows or sys.maxsize
        lengths_of = self.dataset.lengths
        for line in implausible(config, lengths_of, self.plan.total, model_config, rows):
            report.note(line)
        lengths = self.plan.lengths()
        self.shapes = [[(len(batch), batch[0]) for batch in step] for step in lengths]
        self.lengths = [[n for batch in step for n in batch] for step in lengths]

    def _read(
        self, config: TrainConfig, tokenizer: PreTrainedTokenizerBase, stack: ExitStack
    ) -> tuple[Dataset, GrowingData | None]:
        report = self._run_report
        growing: GrowingData
        if config.streaming:
            growing = StreamedData(config, tokenizer, report, stack)
        else:
            with _reading(config.data, report) as progress:
                source = _open(config.data, config, progress)
                if not source.is_large:
                    return _whole(source, tokenizer, config, report, progress), None
            growing = LargeData(source, config, tokenizer, report, stack)
        return growing.sample, growing

    @property
    def identity(self) -> str:
        """A digest of what is trained on, which must be equal to resume a run."""
        if self._growing is not None:
            return self._growing.identity
        digest = hashlib.sha256()
        for example in self.dataset.examples:
            digest.update(np.asarray(example.tokens).tobytes())
            digest.update(np.asarray(example.labels_mask).tobytes())
            digest.update(b"|")
        return digest.hexdigest()

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
        report.note("of all rows that were trained on:")
        for line in self._growing.report.lines():
            report.note(line)
        if self._growing.has_rejected:
            path = output / REJECTED_NAME
            report.note(f"every row left out, with its line and the reason: {path}")

    def close(self) -> None:
        """End the processes that encode data, and remove temporary files."""
        self._open.close()


def _reading(data: Data, report: "RunReport") -> AbstractContextManager[Progress]:
    return report.task(f"reading {name_of(data)}")


def _open(data: Data, config: TrainConfig, progress: Progress) -> OpenedSource:
    return open_source(
        data,
        columns=config.column,
        max_samples=config.max_samples,
        keep=config.cache_data,
        progress=progress,
    )


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
            f"all {len(rows):,} rows ({source.table.bytes / 1e6:,.0f} MB) are encoded before the "
            f"first step, and kept in {encoder.directory}"
        )
    return dataset
