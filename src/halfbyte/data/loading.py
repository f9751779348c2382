"""Opens a source, and loads rows of it as a data set: encoded before they are needed.

The rows of small data are encoded in this process; from `SEVERAL_FROM` on by several, and kept in
the user's cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from halfbyte.config.data_sources import Data, name_of
from halfbyte.data.batching import Mixture
from halfbyte.data.dataset import Conversations, Dataset, Examples, last_of_row
from halfbyte.data.dataset_report import (
    NothingUsable,
    Rejection,
    by_reason,
    describe_rejected,
    in_words,
)
from halfbyte.data.encoding import EncodedChunk, EncoderSpec, EncodingReport, without
from halfbyte.data.formats import preferred_formats
from halfbyte.data.in_memory import RowsInMemory
from halfbyte.data.row_encoder import RowEncoder, chunks_of
from halfbyte.data.row_files import Row, RowFile, problem_line
from halfbyte.data.row_table import RowTable
from halfbyte.data.sources import open_sources
from halfbyte.errors import DataError, OutputError
from halfbyte.input_files import read_file
from halfbyte.user_cache import cached_directory, temporary_directory

COMPLETE_BYTES, COMPLETE_ROWS = 64 * 10**6, 250_000
"""Data that is larger is encoded while it is trained on (`example_stream`): this much takes half a
minute on two cores."""

SEVERAL_FROM = 4 * 10**6
"""Bytes of rows from which several processes encode them, and they are kept in the cache: below, an
encoding takes about as long as starting the processes."""

_FORMATS = "formats.json"


@dataclass(frozen=True, eq=False)
class OpenedSource:
    """A source, or several: their rows, and how they were found.

    Attributes:
        name: What messages call them.
        table: Their rows.
        notes: Messages for the user.
        keep: Whether the cache may be used.
        names: What the user calls each.
        weights: The weight of each, or None if none has one.
    """

    name: str
    table: RowTable
    notes: tuple[str, ...]
    keep: bool
    names: Sequence[str] = ()
    weights: Sequence[float] | None = None

    def mixture(self, rows: NDArray[np.int64] | None = None) -> Mixture | None:
        """Return how examples of these rows, or all rows, are mixed; None without weights."""
        if self.weights is None:
            return None
        rows = np.arange(len(self.table)) if rows is None else rows
        counts = np.bincount(self.table.sources(rows), minlength=len(self.names))
        return Mixture.of(self.names, counts.tolist(), self.weights)

    @property
    def is_large(self) -> bool:
        """Whether it is encoded while it is trained on."""
        return self.table.bytes > COMPLETE_BYTES or len(self.table) > COMPLETE_ROWS

    @property
    def is_small(self) -> bool:
        """Whether several processes, and the cache, are not worth their time."""
        return self.table.bytes < SEVERAL_FROM

    def preferred(self, rows: NDArray[np.int64] | None = None) -> tuple[str, ...]:
        """Return the formats of rows, the most frequent first (`formats.preferred_formats`).

        Args:
            rows: The rows that are looked at; default: all.

        Raises:
            DataError: No row is in a known format, or the data cannot be read.
        """
        if rows is not None or not self.keep or self.is_small:
            return self._vote(np.arange(len(self.table)) if rows is None else rows)
        key = hashlib.sha256(f"1 {self.table.digest}".encode()).hexdigest()[:32]

        def write(directory: Path) -> None:
            found = self._vote(np.arange(len(self.table)))
            (directory / _FORMATS).write_text(json.dumps(found))

        try:
            kept = cached_directory("formats", key, write, limit=10**7)
        except OutputError:  # other files cannot be kept either, which is said
            return self._vote(np.arange(len(self.table)))
        return tuple(map(str, json.loads(read_file(kept.path / _FORMATS, 10_000))))

    def _vote(self, rows: NDArray[np.int64]) -> tuple[str, ...]:
        read = self.table.read(rows)
        try:
            return preferred_formats(row.value for row in read if row.problem is None)
        except DataError as error:
            raise DataError(f"{self.name}: {error}") from error


def open_source(
    source: Data | RowsInMemory,
    *,
    columns: Mapping[str, str] | None = None,
    max_samples: int | None = None,
    keep: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> OpenedSource:
    """Open sources, and find their rows.

    Args:
        source: One source or several: files, directories, hub ids; see `halfbyte.data.specs`; or
            a program's rows, which are written to a temporary file.
        columns: For keys of a row format, the rows' own; see `halfbyte.data.sources`.
        max_samples: Rows of each source that are used at most, the first.
        keep: Whether the cache may be used for converted files, indices and encoded rows.
        progress: Called with (bytes done, total bytes), for each large file.

    Raises:
        DataError: It does not exist, cannot be read, or has no rows.
    """
    if isinstance(source, RowsInMemory):
        rows, notes = source.read()
        table = RowTable([spooled(rows, str(source), temporary_directory())], keep=False)
        return OpenedSource(str(source), table, notes, keep=False)
    opened = open_sources(
        source, columns=columns, max_samples=max_samples, keep=keep, progress=progress
    )
    table = RowTable(opened.files, keep=keep, progress=progress)
    return OpenedSource(name_of(source), table, opened.notes, keep, opened.names, opened.weights)


def load_rows(
    source: OpenedSource,
    spec: EncoderSpec,
    rows: NDArray[np.int64],
    *,
    encoder: RowEncoder | None = None,
    hold: bool = False,
    held_out: NDArray[np.uint64] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Encode rows, and return them as a data set.

    Args:
        source: The source.
        spec: How they are encoded.
        rows: int64, the rows, in the order in which the data set is to have them.
        encoder: Encodes them; default: one for this call.
        hold: Whether the encoder is to hold the chunks that it cannot keep, as they are needed
            again.
        held_out: uint64, ascending: hashes of what held-out rows say; rows that say the same are
            left out. Default: none are.
        progress: Called with (rows done, total rows).

    Raises:
        DataError: None of them is usable, or left.
    """
    if encoder is None:
        small = source.is_small
        with RowEncoder(
            source.table, spec, keep=source.keep and not small, in_process=small
        ) as encoder:
            return load_rows(
                source, spec, rows, encoder=encoder, held_out=held_out, progress=progress
            )
    held_out = np.empty(0, np.uint64) if held_out is None else held_out
    table, report, done = source.table, EncodingReport(source.name, spec, source.notes), 0
    divided = list(chunks_of(table, rows))
    held: list[EncodedChunk | None] = []  # None: it is in the cache
    row, messages = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
    for chunk_rows, chunk in zip(divided, encoder.encode(divided), strict=True):
        used = without(chunk, held_out)
        report.add(used)
        row.append(chunk_rows[used.row])
        messages.append(used.messages)
        held.append(None if encoder.has(chunk_rows) else chunk)
        if hold and held[-1] is not None:
            encoder.held[chunk_rows.tobytes()] = chunk
        done += len(chunk_rows)
        if progress is not None:
            progress(done, len(rows))
    found = report.report()
    if not found.examples and found.held_out:
        raise DataError(
            f"{source.name}: none of the first {len(rows):,} rows is left to train on: "
            f"{found.held_out:,} are held out by eval_split, or have the text of a row that is"
        )
    if not found.examples:
        raise nothing_usable(source.name, found.rows, found.formats, found.rejections)
    # Mapped when all are there, so that it is one mapping.
    chunks = [
        without(one or encoder.mapped(chunk_rows) or next(encoder.encode([chunk_rows])), held_out)
        for one, chunk_rows in zip(held, divided, strict=True)
    ]
    of_examples = np.concatenate(row)
    # A sample is mixed already.
    mixture = None if hold else source.mixture(of_examples)
    if mixture is not None:
        found = replace(found, notes=(*found.notes, *mixture.lines()))
    return Dataset(
        examples=Examples(chunks),
        report=found,
        rows=Conversations(table, spec.preferred, of_examples, np.concatenate(messages)),
        last_of_row=last_of_row(of_examples),
        mixture=mixture,
    )


def nothing_usable(
    source: str, rows: int, formats: Mapping[str, int], rejections: Sequence[Rejection]
) -> NothingUsable:
    """Return the error that lists why no row is usable."""
    listed = "".join(f"\n  {line}" for line in describe_rejected(by_reason(rejections)))
    read_as = f" (read as {in_words(formats)})" if formats else ""
    message = f"{source}: none of the {rows:,} rows{read_as} is usable.{listed}"
    return NothingUsable(message, source, rows, rejections)


def spooled(rows: Iterable[Row], name: str, directory: Path) -> RowFile:
    """Write rows as a file in a directory, from which they can be read again."""
    path, lines = directory / "rows.jsonl", directory / "lines.npy"
    numbers = []
    with open(path, "wb") as file:
        for row in rows:
            numbers.append(int(row.line.rpartition(":")[2]))
            if row.problem is None:
                file.write(json.dumps(row.value).encode() + b"\n")
            else:
                file.write(problem_line(row.problem, str(row.value).encode()) + b"\n")
    np.save(lines, np.array(numbers, dtype=np.int64))
    return RowFile(path, name, lines=lines, converted=True)
