"""Converts what is not JSON lines into a file of JSON lines in the user's cache, once.

A small file is converted each time, into a temporary directory, and so is any file if the cache is
not to be used (``--no-cache-data``). A larger one is kept, named by everything its content depends
on; of a local file these are its path, size, time of change and inode. It has the rows in their
order, and where its lines are not those of the original, an array of the original numbers; see
`halfbyte.data.row_files`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.atomic import output_errors
from halfbyte.data.kinds import DataFile, Stream
from halfbyte.data.readers import RawRow, read_array, read_csv, read_lines, read_object
from halfbyte.data.row_files import BOM, MARK, RowFile, problem_line, reading_errors
from halfbyte.data.tables import open_arrow, open_parquet
from halfbyte.user_cache import CachedDirectory, cached_directory, temporary_directory

CACHE_LIMIT = 50 * 10**9
"""Bytes that all converted files together may take in the user's cache."""

Progress = Callable[[int, int], None]
"""Called with what is done, and the total."""

_KEPT = 4 * 10**6  # bytes; smaller files are converted again each time, in a fraction of a second
_FORMAT = 1  # incremented when a converted file would be another
_ROWS, _NUMBERS, _CARD = "rows.jsonl", "lines.npy", "card.json"
_REPORT_EVERY = 1000  # rows
_HELD = 1 << 16  # line numbers in memory


@dataclass(frozen=True)
class Reading:
    """Rows that are being read, and how far.

    Attributes:
        rows: The rows.
        position: Returns how much has been read.
        total: How much there is, in the same unit; 0 if it is not known.
    """

    rows: Iterator[RawRow]
    position: Callable[[], int]
    total: int


@contextmanager
def reading(file: DataFile) -> Iterator[Reading]:
    """Read the rows of a file of any kind.

    Raises:
        DataError: It is damaged, or is a table without usable names of columns.
        OSError: It cannot be read.
    """
    if file.kind in ("parquet", "arrow"):
        open_table = open_parquet if file.kind == "parquet" else open_arrow
        done = 0

        def counted(rows: Iterator[RawRow]) -> Iterator[RawRow]:
            nonlocal done
            for row in rows:
                done = row.number
                yield row

        with open_table(file.path, file.name) as table:
            rows = _guarded(counted(table.rows), file.name)
            yield Reading(rows, lambda: done, table.size or 0)
        return
    if file.kind == "object":
        with file.open() as stream:
            whole = read_object(stream)
        if whole is not None:
            yield Reading(iter([whole]), lambda: file.size, file.size)
            return
    with file.open() as stream:
        rows = _guarded(_text_rows(file, stream), file.name)
        yield Reading(rows, lambda: stream.position, file.size)


def _guarded(rows: Iterator[RawRow], name: str) -> Iterator[RawRow]:
    """The rows, with errors of reading told apart from those of writing them."""
    with reading_errors(name):
        yield from rows


def is_row_file(file: DataFile) -> bool:
    """Whether a file can be used as it is: it has one JSON value per line.

    Raises:
        OSError: It cannot be read.
    """
    if file.compression is not None or file.kind not in ("lines", "object"):
        return False
    if file.kind == "lines":
        return True
    with file.open() as stream:
        return read_object(stream) is None


def _text_rows(file: DataFile, stream: Stream) -> Iterator[RawRow]:
    match file.kind:
        case "array":
            return read_array(stream)
        case "csv":
            return read_csv(stream, file.name)
        case "tsv":
            return read_csv(stream, file.name, "\t")
    return read_lines(stream)


def row_file(
    file: DataFile, *, limit: int | None, keep: bool = True, progress: Progress | None = None
) -> tuple[RowFile, tuple[str, ...]]:
    """Return a file's rows as a file of JSON lines, and messages for the user.

    Args:
        file: The file.
        limit: Rows that are needed at most, or None; with it, no more are converted.
        keep: Whether the cache may be used.
        progress: Called while it is converted.

    Raises:
        DataError: It is damaged, or is a table without usable names of columns.
        OutputError: No space is left.
        OSError: It cannot be read.
    """
    if is_row_file(file):
        return RowFile(file.path, file.name), ()
    identity, found = None, os.stat(file.path)
    if keep and file.size >= _KEPT:
        identity = {
            "path": os.path.realpath(file.path),
            "size": found.st_size,
            "time": found.st_mtime_ns,
            "inode": found.st_ino,
            "kind": file.kind,
        }
    converted, notes = convert(
        file.name, identity, lambda: reading(file), limit=limit, progress=progress
    )
    return replace(converted, json_cells=file.is_table), notes


def convert(
    name: str,
    identity: dict[str, Any] | None,
    read: Callable[[], Any],
    *,
    limit: int | None,
    progress: Progress | None = None,
) -> tuple[RowFile, tuple[str, ...]]:
    """Convert rows, or find them in the cache.

    Args:
        name: What messages call the source.
        identity: All that the rows depend on; None: not known, and they are not kept.
        read: Returns a context in which there is a `Reading`.
        limit: Rows that are needed at most, or None.
        progress: Called while they are converted.

    Raises:
        OutputError: No space is left.
    """

    def make(directory: Path) -> None:
        with read() as source:
            _write(directory, source, limit, progress)

    if identity is None:
        directory = temporary_directory()
        with output_errors(directory):
            make(directory)
        found = CachedDirectory(directory)
    else:
        key = json.dumps([_FORMAT, identity, limit], sort_keys=True)
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        found = cached_directory("data", digest, make, limit=CACHE_LIMIT, is_whole=_is_whole)
    numbers = found.path / _NUMBERS
    converted = RowFile(
        found.path / _ROWS,
        name,
        lines=numbers if numbers.exists() else None,
        converted=True,
    )
    return converted, () if found.note is None else (found.note,)


def count_rows(file: RowFile) -> int:
    """Return how many rows a file has, whatever its ``start`` and ``stop``.

    Raises:
        OSError: It cannot be read.
    """
    card = file.path.with_name(_CARD)
    if file.converted and card.exists():
        return int(json.loads(card.read_text())["rows"])
    whole = RowFile(file.path, file.name, converted=file.converted)
    return sum(1 for _ in whole.lines_used())


def _is_whole(directory: Path) -> bool:
    try:
        card = json.loads((directory / _CARD).read_text())
        sizes = {name: (directory / name).stat().st_size for name in card["sizes"]}
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return bool(sizes == card["sizes"])


def _write(directory: Path, source: Reading, limit: int | None, progress: Progress | None) -> None:
    """Write rows, their numbers if these are not 1, 2, 3 …, and a card with the sizes."""
    count, differs = 0, False
    numbers = array("q")
    scratch = directory / "numbers"
    with open(directory / _ROWS, "wb", buffering=1 << 20) as out, open(scratch, "wb") as kept:
        for number, raw, problem in islice(source.rows, limit):
            if problem is not None or raw.startswith((MARK, BOM)):
                raw = problem_line(problem or "malformed JSON", raw)
            out.write(raw + b"\n")
            count += 1
            differs |= number != count
            numbers.append(number)
            if len(numbers) >= _HELD:
                numbers.tofile(kept)
                del numbers[:]
            if progress is not None and count % _REPORT_EVERY == 0 and source.total:
                progress(source.position(), source.total)
        numbers.tofile(kept)
    if differs:
        with open(directory / _NUMBERS, "wb") as file, open(scratch, "rb") as kept:
            header = {"descr": "<i8", "fortran_order": False, "shape": (count,)}
            np.lib.format.write_array_header_1_0(file, header)
            shutil.copyfileobj(kept, file)
    scratch.unlink()
    sizes = {file.name: file.stat().st_size for file in directory.iterdir()}
    (directory / _CARD).write_text(json.dumps({"rows": count, "sizes": sizes}))
    if progress is not None and source.total:
        progress(source.total, source.total)
