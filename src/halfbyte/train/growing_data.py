"""Data that is encoded while a run trains on it: a file of many gigabytes, or a stream.

Before the first step only a sample is encoded, the first rows that are trained on. It decides in
which formats rows are read, what sizes of steps are planned for, and which prompts are answered;
what is said of the data before the first step is said of it. The report on all rows so far is in
the journal (event ``data``) with every checkpoint and at the end; rejected rows are added to
rejected.jsonl as they come.

What ``eval_split`` holds out of a file is drawn by row numbers, and encoded before the first step,
too; rows with the same text are left out when they come.
"""

import hashlib
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from halfbyte.config.data_sources import name_of
from halfbyte.config.schema import TrainConfig
from halfbyte.data import Dataset, DatasetReport, Mixture, NothingUsable
from halfbyte.data.encoding import EncoderSpec, EncodingReport
from halfbyte.data.encoding_pool import EncodingPool
from halfbyte.data.example_stream import (
    EncodedRow,
    ExampleStream,
    Position,
    rows_from,
    shuffled,
    stream_from,
)
from halfbyte.data.loading import SEVERAL_FROM, OpenedSource, load_rows, spooled
from halfbyte.data.row_encoder import RowEncoder, chunks_of
from halfbyte.data.row_files import Row
from halfbyte.data.row_table import RowTable
from halfbyte.data.sources import open_sources
from halfbyte.data.split import draw_rows, wanted_rows
from halfbyte.errors import CheckpointError, DataError
from halfbyte.foreign_text import quote
from halfbyte.report import RunReport
from halfbyte.report.rejected import RejectedFile
from halfbyte.user_cache import temporary_directory

SAMPLE_ROWS, SAMPLE_BYTES = 2048, 16 << 20
"""Of the rows that are encoded before the first step; in each limit the last chunk is whole."""
_FORMAT_ROWS = 4096  # rows, evenly over a file, by which its formats are judged
MOST_HELD_OUT = 5000
"""Rows that ``eval_split`` holds out at most: they are encoded before the first step, and all
evaluated at the end. The standard error of a mean over so many is 1.4 % of a row's standard
deviation."""
BUFFER_ROWS = 10_000
"""Rows of a stream from which the next is drawn."""


class GrowingData(ABC):
    """Data of which only a sample is encoded before the first step.

    Attributes:
        sample: The first rows that are trained on.
        held_out: What is held out of the same data; None without ``eval_split``.
        rows: Rows of an epoch, without those held out; None if there is no end.
        identity: What must be equal to resume a run.
        mixture: The rows of the sources and their weights; None without weights.
    """

    sample: Dataset
    held_out: Dataset | None = None
    rows: int | None
    identity: str
    mixture: Mixture | None = None
    _name: str
    _spec: EncoderSpec
    _most_unusable: int  # rows one after the other

    def __init__(self) -> None:
        self._report: EncodingReport | None = None
        self._rejected: RejectedFile | None = None

    @abstractmethod
    def _rows(self, start: int, report: EncodingReport) -> Iterator[EncodedRow]:
        """Yield the rows from one on, encoded."""

    def stream(self, output: Path, progress: Mapping[str, Any], size: int = 0) -> ExampleStream:
        """Return the examples of a run, from where a checkpoint was written.

        Args:
            output: The run's directory, for rejected.jsonl.
            progress: What the checkpoint says; nothing for the first step.
            size: Bytes of rejected.jsonl that a new run keeps.

        Raises:
            CheckpointError: It does not say where that is.
            OutputError: rejected.jsonl cannot be written.
        """
        position = _position_of(progress)
        self._report = EncodingReport(self._name, self._spec, rejected=self._reject)
        if position != Position():
            try:
                self._report.load(progress["data_report"])
                size = int(progress["rejected_bytes"])
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise CheckpointError(
                    "the checkpoint's report on the data: expected what halfbyte has written, got "
                    f"{quote(progress.get('data_report'))}"
                ) from error
        self._rejected = RejectedFile(output, size)
        rows = self._rows(position.rows, self._report)
        return ExampleStream(rows, position, self._most_unusable)

    def _reject(self, rejections: list[Any]) -> None:
        assert self._rejected is not None
        self._rejected.add(self._name, rejections)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint says besides the position, as JSON values."""
        if self._report is None or self._rejected is None:
            return {}
        return {"data_report": self._report.state(), "rejected_bytes": self._rejected.size}

    @property
    def report(self) -> DatasetReport:
        """The report on the rows so far; on the sample before the first step."""
        return self.sample.report if self._report is None else self._report.report()

    @property
    def has_rejected(self) -> bool:
        """Whether rows have been rejected so far."""
        return self._rejected is not None and self._rejected.size > 0


class LargeData(GrowingData):
    """A source whose rows are on disk, too large to be encoded before the first step."""

    def __init__(
        self,
        source: OpenedSource,
        config: TrainConfig,
        tokenizer: PreTrainedTokenizerBase,
        report: RunReport,
        stack: ExitStack,
    ) -> None:
        """Encode the sample; ``stack`` closes what is opened.

        Raises:
            DataError: None of its rows is usable, or too few to hold some out.
        """
        super().__init__()
        table = self._table = source.table
        # An epoch may begin with its only usable row, and the next one end with it.
        self._name, self.rows, self._most_unusable = source.name, len(table), 2 * len(table)
        places = np.unique(np.linspace(0, len(table) - 1, _FORMAT_ROWS).astype(np.int64))
        preferred = source.preferred(places)
        self._spec = EncoderSpec(tokenizer, preferred, config.max_length, config.train_on)
        self._content = np.empty(0, np.uint64)
        if config.eval_split is not None:
            self._hold_out(source, config.eval_split, config.seed, report)
        self._encoder = stack.enter_context(
            RowEncoder(table, self._spec, keep=source.keep, in_process=source.is_small)
        )
        self.mixture = source.mixture()
        self._order = shuffled(len(table), config.data_seed, self.mixture)
        directory = self._encoder.directory
        kept = "not kept" if directory is None else f"kept in {directory}"
        sample = _sample_of(table, self._order(0))
        report.note(
            f"{source.name}: {len(table):,} rows, {table.bytes / 1e9:.2f} GB, which are encoded "
            f"while training needs them, and {kept}; what is said now is of the first "
            f"{len(sample):,} rows in the order of training"
        )
        with report.task("encoding these rows") as progress:
            self.sample = load_rows(
                source,
                self._spec,
                sample,
                encoder=self._encoder,
                hold=True,
                held_out=self._content,
                progress=progress,
            )
        for line in self.mixture.lines() if self.mixture is not None else ():
            report.note(line)
        self.identity = self._encoder.identity

    def _hold_out(self, source: OpenedSource, wanted: float, seed: int, report: RunReport) -> None:
        """Encode the rows that are held out, and find what is left out of training with them."""
        table = source.table
        count = wanted_rows(wanted, len(table))
        if count > MOST_HELD_OUT:
            report.note(
                f"`eval_split` asks for {count:,} rows, of which {MOST_HELD_OUT:,} are held out: "
                "of data that is encoded while training, no more are, since these are encoded "
                "before the first step, and all evaluated at the end"
            )
            count = MOST_HELD_OUT
        drawn = draw_rows(len(table), count, seed)
        small = table.job(drawn).bytes < SEVERAL_FROM
        keep, part = source.keep and not small, f"held out: {count} rows, seed {seed}"
        try:
            with (
                RowEncoder(table, self._spec, keep=keep, in_process=small, part=part) as encoder,
                report.task("encoding the rows held out") as progress,
            ):
                found = load_rows(
                    source, self._spec, drawn, encoder=encoder, hold=True, progress=progress
                )
                chunks = list(encoder.encode(chunks_of(table, drawn)))
        except NothingUsable as error:
            raise DataError(f"rows held out by `eval_split` of {error}") from error
        used = [chunk.content[np.unique(chunk.row)] for chunk in chunks]
        self._content = np.unique(np.concatenate(used))
        # Those rejected are listed among the rows that are trained on, where they come, too.
        usable = found.report.usable
        whole = replace(found.report, rows=usable, rejections=[], notes=())
        self.held_out = replace(found, report=whole)
        self.rows = len(table) - usable
        report.note(
            f"held out: {usable:,} of {len(table):,} rows, with {len(self._content):,} different "
            "texts; rows with the text of one of these are left out of training"
        )

    def _rows(self, start: int, report: EncodingReport) -> Iterator[EncodedRow]:
        return rows_from(self._table, self._encoder, self._order, start, report, self._content)


class StreamedData(GrowingData):
    """A source that is read once, from its beginning, and may have no end."""

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: PreTrainedTokenizerBase,
        report: RunReport,
        stack: ExitStack,
    ) -> None:
        """Read the first rows, and encode them; ``stack`` closes what is opened.

        Raises:
            DataError: None of them is usable.
        """
        super().__init__()
        name = _name_of_stream(config)
        self._most_unusable = SAMPLE_ROWS * 100
        self._name, self.rows, self._seed = name, None, config.data_seed
        with report.task(f"reading {name}"):
            head, rows = _begin_stream(name, config)
            self._stream = chain(head, rows)
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            source = _source_of(head, name, directory)
            table, preferred = source.table, source.preferred()
            self._spec = EncoderSpec(tokenizer, preferred, config.max_length, config.train_on)
            self.sample = load_rows(source, self._spec, np.arange(len(table)))
        report.note(
            f"{name} is read and encoded while training needs it, in an order that is shuffled "
            f"within {BUFFER_ROWS:,} rows; what is said now is of its first {len(head):,} rows"
        )
        small = len(head) < SAMPLE_ROWS
        processes = 0 if small or not tokenizer.is_fast else None
        self._pool = stack.enter_context(EncodingPool(self._spec, processes))
        self.identity = hashlib.sha256(f"stream {table.digest}".encode()).hexdigest()

    def _rows(self, start: int, report: EncodingReport) -> Iterator[EncodedRow]:
        return stream_from(self._stream, self._pool, self._seed, start, report, buffer=BUFFER_ROWS)


def read_beginning(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, report: RunReport
) -> Dataset:
    """Read and encode the first rows of a stream only.

    Raises:
        DataError: There are none, or none is usable.
    """
    name = _name_of_stream(config)
    with report.task(f"reading {name}"):
        head, _ = _begin_stream(name, config)
        source = _source_of(head, name, temporary_directory())
        spec = EncoderSpec(tokenizer, source.preferred(), config.max_length, config.train_on)
        found = load_rows(source, spec, np.arange(len(head)))
    report.note(f"{name} is a stream: its first {len(head):,} rows are read, no others")
    return found


def _name_of_stream(config: TrainConfig) -> str:
    return "standard input" if config.data == ("-",) else name_of(config.data)


def _begin_stream(name: str, config: TrainConfig) -> tuple[list[Row], Iterator[Row]]:
    """Return the first rows of a stream, and an iterator of the others."""
    sources = open_sources(
        config.data, columns=config.column, max_samples=config.max_samples, streaming=True
    )
    rows = sources.stream(config.data_seed)
    head = list(islice(rows, SAMPLE_ROWS))
    if not head:
        raise DataError(f"{name} is empty: expected rows, one JSON object per line.")
    return head, rows


def _source_of(rows: list[Row], name: str, directory: Path) -> OpenedSource:
    """Write rows into a directory, as a source."""
    table = RowTable([spooled(rows, name, directory)], keep=False)
    return OpenedSource(name, table, (), keep=False)


def _sample_of(table: RowTable, rows: NDArray[np.unsignedinteger[Any]]) -> NDArray[np.int64]:
    """Return the first rows of an order, whole chunks of them, within the limits of a sample."""
    found: list[NDArray[np.int64]] = []
    size = 0
    for chunk in chunks_of(table, rows[:SAMPLE_ROWS].astype(np.int64)):
        found.append(chunk)
        size += table.job(chunk).bytes
        if size >= SAMPLE_BYTES:
            break
    return np.concatenate(found)


def _position_of(progress: Mapping[str, Any]) -> Position:
    match progress.get("data_position", [0, 0]):
        case [int(rows), int(examples)] if rows >= 0 and examples >= 0:
            return Position(rows, examples)
        case other:
            raise CheckpointError(
                f"the checkpoint's data_position: expected two whole numbers, got {quote(other)}"
            )
