"""Readers of tables: Parquet, Arrow and data sets of the hub. Each yields rows as lines of JSON.

pyarrow reads the files, a batch of rows at a time. Text, numbers, lists and structs are what they
are in JSON; dates, times and decimals become text, as do bytes in UTF-8. A row with a value that is
none of these has a problem.
"""

from __future__ import annotations

import datetime
import decimal
import json
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from halfbyte.data.readers import RawRow
from halfbyte.errors import DataError
from halfbyte.foreign_text import quote, shorten
from halfbyte.input_files import open_file

if TYPE_CHECKING:
    import pyarrow

_ROWS = 256  # converted together
_MOST_CHECKED = 10_000  # rows of a batch with a value that is not valid
_BUFFER = 1 << 20  # bytes of a column of a Parquet file that are read together

PARQUET, ARROW_FILE, FEATHER_1 = b"PAR1", b"ARROW1", b"FEA1"
"""The first bytes of files."""


class Table(NamedTuple):
    """A table that is being read.

    Attributes:
        rows: Its rows.
        size: Their number, if it is known.
    """

    rows: Iterator[RawRow]
    size: int | None


@contextmanager
def open_parquet(path: Path, name: str) -> Iterator[Table]:
    """Open a Parquet file.

    Raises:
        DataError: It is none, is damaged, or has a column twice.
        OSError: It cannot be read.
    """
    from pyarrow import parquet

    with open_file(path) as stream:
        with _read_as("Parquet", name):
            file = parquet.ParquetFile(
                stream, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True
            )
            _require_names(file.schema_arrow, name)
        rows = _rows(file.iter_batches(batch_size=_ROWS), "Parquet", name)
        yield Table(rows, file.metadata.num_rows)


@contextmanager
def open_arrow(path: Path, name: str) -> Iterator[Table]:
    """Open an Arrow file (Feather 2) or a stream of Arrow's format, as `datasets` writes it.

    One record batch is in memory at a time.

    Raises:
        DataError: It is none, is damaged, or has a column twice.
        OSError: It cannot be read.
    """
    import pyarrow

    batches: Iterator[pyarrow.RecordBatch]
    with open_file(path) as stream:
        beginning = stream.read(len(ARROW_FILE))
        stream.seek(0)
        with _read_as("Arrow", name):
            if beginning == ARROW_FILE:
                file = pyarrow.ipc.open_file(stream)
                batches = (file.get_batch(index) for index in range(file.num_record_batches))
            else:
                batches = file = pyarrow.ipc.open_stream(stream)
            _require_names(file.schema, name)
        yield Table(_rows(batches, "Arrow", name), None)


def rows_of(values: Iterable[Mapping[str, Any]], first: int = 1) -> Iterator[RawRow]:
    """Rows that are Python's values, as `datasets` gives them, numbered from ``first``."""
    for number, value in enumerate(values, first):
        yield _row(number, value)


def _require_names(schema: pyarrow.Schema, name: str) -> None:
    counts = Counter(schema.names)
    if twice := next((column for column, count in counts.items() if count > 1), None):
        raise DataError(f"{name}: the column {quote(twice)} occurs twice; rename one.")


@contextmanager
def _read_as(kind: str, name: str) -> Iterator[None]:
    """Turn pyarrow's errors, which are of many kinds, into one of ours."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:
        text = shorten(" ".join(str(error).split()).rstrip(".")) or "it is damaged"
        raise DataError(f"{name} cannot be read as {kind}: {text}.") from error


def _rows(batches: Iterator[pyarrow.RecordBatch], kind: str, name: str) -> Iterator[RawRow]:
    number, left = 1, iter(batches)
    while True:
        with _read_as(kind, name):
            if (batch := next(left, None)) is None:
                return
            parts = list(_parts(batch))
        for part, problem in parts:
            for row in _rows_of_part(part, problem, number):
                yield row
                number += 1
        del batch, parts, part  # before the next is read


def _parts(batch: pyarrow.RecordBatch) -> Iterator[tuple[pyarrow.RecordBatch, str | None]]:
    """Slices of a batch that are safe to read, and rows of which one value is not, with why.

    Without this check, pyarrow would follow the offsets of a damaged file wherever they point. It
    looks at a whole list column even for a slice, so single rows are checked in small batches only.

    Raises:
        ArrowException: A large batch is not safe.
    """
    import pyarrow

    try:
        batch.validate(full=True)
    except pyarrow.ArrowInvalid:
        if batch.num_rows > _MOST_CHECKED:
            raise
        for index in range(batch.num_rows):
            row = batch.slice(index, 1)
            try:
                row.validate(full=True)
            except pyarrow.ArrowInvalid as error:
                yield (
                    row,
                    "not UTF-8" if "UTF8" in str(error) else f"damaged: {shorten(str(error))}",
                )
            else:
                yield row, None
    else:
        for start in range(0, batch.num_rows, _ROWS):
            yield batch.slice(start, _ROWS), None


def _rows_of_part(part: pyarrow.RecordBatch, problem: str | None, first: int) -> Iterator[RawRow]:
    if problem is not None:
        yield RawRow(first, b"", problem)
        return
    try:
        values = part.to_pylist()
    except Exception:  # of any kind, for a value that Python does not have, as the year 10000
        for index in range(part.num_rows):
            yield _alone(first + index, part, index)
        return
    for number, value in enumerate(values, first):
        yield _row(number, value)


def _alone(number: int, batch: pyarrow.RecordBatch, index: int) -> RawRow:
    """Convert one row of a batch that has values which cannot be converted, column by column."""
    value = {}
    for column, cells in zip(batch.schema.names, batch.columns, strict=True):
        try:
            value[column] = cells[index].as_py()
        except Exception as error:
            what = "not UTF-8" if isinstance(error, UnicodeDecodeError) else f"{error}"
            return RawRow(number, b"", f"column {quote(column)}: {shorten(what)}")
    return _row(number, value)


class _NoJsonError(TypeError):
    """A value that is not text, a number, or made of these."""


def _row(number: int, value: Mapping[str, Any]) -> RawRow:
    try:
        return RawRow(number, _as_json(value))
    except (TypeError, ValueError, RecursionError) as error:
        problem = "not UTF-8" if isinstance(error, UnicodeError) else str(error)
    for column, cell in value.items():  # which column is it?
        try:
            _as_json({column: cell})
        except (TypeError, ValueError, RecursionError):
            problem = f"column {quote(column)}: {problem}"
            break
    return RawRow(number, repr(value)[:200].encode("utf-8", "replace"), problem)


def _as_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, default=_as_text).encode()


def _as_text(value: object) -> str | list[Any] | dict[str, Any]:
    match value:
        case bytes() | bytearray() | memoryview():
            try:
                return bytes(value).decode()
            except UnicodeDecodeError:
                raise _NoJsonError("bytes that are not text") from None
        case datetime.datetime() | datetime.date() | datetime.time():
            return value.isoformat()
        case datetime.timedelta() | decimal.Decimal() | uuid.UUID():
            return str(value)
    raise _NoJsonError(f"expected text or numbers, found {type(value).__name__}")
