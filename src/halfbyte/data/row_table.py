"""The rows of a source, numbered from 0 over all its files, and read by number.

What is sent to a process that encodes rows is where they are (`RowJob`), not the rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.row_files import Row, RowFile
from halfbyte.data.row_index import RowIndex, read_span, row_index
from halfbyte.errors import DataError
from halfbyte.input_files import open_file


@dataclass(frozen=True, eq=False)
class RowJob:
    """Rows that are to be read, in any process; calling it yields them.

    Attributes:
        files: The files that they are of.
        file: int32 [rows], the file of each row.
        spans: int64 [rows, 2], where in it the row starts and stops, in bytes.
        numbers: int64 [rows], the number in the original of the row's line.
    """

    files: tuple[RowFile, ...]
    file: NDArray[np.int32]
    spans: NDArray[np.int64]
    numbers: NDArray[np.int64]

    def __call__(self) -> Iterator[Row]:
        """Yield the rows.

        Raises:
            OSError: A file cannot be read, or has become shorter.
        """
        opened: dict[int, BinaryIO] = {}
        every = zip(self.file.tolist(), self.spans.tolist(), self.numbers.tolist(), strict=True)
        with ExitStack() as stack:
            for at, (start, stop), number in every:
                if at not in opened:
                    opened[at] = stack.enter_context(open_file(self.files[at].path))
                yield self.files[at].parse(read_span(opened[at], start, stop), number)

    @property
    def bytes(self) -> int:
        """The length of the rows."""
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())


class RowTable:
    """The rows of a source.

    Attributes:
        files: Its files.
        counts: The rows that are used of each.
        digest: Of the content of the rows that are used, and of how they are read.
        bytes: Their length, with blank lines between them.
    """

    def __init__(
        self,
        files: Sequence[RowFile],
        *,
        keep: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Index the files.

        Args:
            files: The files.
            keep: Whether indices may be read from the cache, and be kept there.
            progress: Called with (bytes done, total bytes), for each file.

        Raises:
            DataError: A file cannot be read, or changes while it is read.
        """
        self.files = tuple(files)
        self._indices = [_indexed(file, keep, progress) for file in files]
        ranges = [
            range(len(index))[file.start : file.stop]
            for file, index in zip(files, self._indices, strict=True)
        ]
        self._starts = [rows.start for rows in ranges]
        self.counts = [len(rows) for rows in ranges]
        self._first = np.cumsum([0, *self.counts])
        self.bytes = 0
        read_as = []
        for file, index, rows in zip(files, self._indices, ranges, strict=True):
            if rows:
                self.bytes += int(index.offsets[rows.stop] - index.offsets[rows.start])
            how = [file.converted, file.json_cells, file.columns]
            read_as.append([index.digest, rows.start, rows.stop, *how])
        self.digest = hashlib.sha256(json.dumps(read_as).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._first[-1])

    def sources(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return for each row the index of the source that it is of."""
        of_files = np.array([file.source for file in self.files], dtype=np.int64)
        return of_files[np.searchsorted(self._first, rows, side="right") - 1]

    def job(self, rows: NDArray[np.int64]) -> RowJob:
        """Return where rows are."""
        file = (np.searchsorted(self._first, rows, side="right") - 1).astype(np.int32)
        spans = np.empty((len(rows), 2), dtype=np.int64)
        numbers = np.empty(len(rows), dtype=np.int64)
        for at in np.unique(file).tolist():
            index, chosen = self._indices[at], file == at
            own = rows[chosen] - self._first[at] + self._starts[at]
            spans[chosen] = index.spans(own)
            lines = index.line_numbers(own)
            original = self._numbers[at]
            numbers[chosen] = lines if original is None else original[lines - 1]
        used, places = np.unique(file, return_inverse=True)
        files = tuple(self.files[at] for at in used.tolist())
        return RowJob(files, places.astype(np.int32), spans, numbers)

    def read(self, rows: NDArray[np.int64]) -> Iterator[Row]:
        """Yield rows.

        Raises:
            DataError: A file cannot be read.
        """
        try:
            yield from self.job(rows)()
        except OSError as error:
            raise _unreadable(error) from error

    def lines(self, rows: NDArray[np.int64]) -> list[str]:
        """Return the lines of rows, as messages name them."""
        job = self.job(rows)
        return [
            f"{job.files[file].name}:{number}" if job.files[file].named else str(number)
            for file, number in zip(job.file.tolist(), job.numbers.tolist(), strict=True)
        ]

    def require_unchanged(self) -> None:
        """Check that the files are those that were indexed.

        Raises:
            DataError: One has been changed or removed since.
        """
        for index in self._indices:
            index.require_unchanged()

    @cached_property
    def _numbers(self) -> list[NDArray[np.int64] | None]:
        return [file.numbers() for file in self.files]


def _indexed(file: RowFile, keep: bool, progress: Callable[[int, int], None] | None) -> RowIndex:
    try:
        return row_index(file.path, keep=keep, progress=progress)
    except OSError as error:
        raise _unreadable(error) from error


def _unreadable(error: OSError) -> DataError:
    return DataError(f"{error.filename} cannot be read: {error.strerror or error}.")
