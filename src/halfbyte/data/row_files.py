"""Rows of data as JSON lines on disk: one JSON value per line, read by byte offset.

Every source is such a file when it is read: a ``.jsonl`` file is used where it is, everything else
has been converted once (`halfbyte.data.conversion`). So rows need not be held in memory, and any
process can read any of them.

In a converted file every line is a row, and a line that starts with ``!`` is one that could not be
converted: after the mark come the problem and the beginning of the row, as a JSON array.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from halfbyte.errors import DataError
from halfbyte.input_files import open_file

LONGEST_ROW = 8_000_000
"""Longest row of a file, in bytes: some two million tokens, which take ten seconds to encode."""

TOO_LONG = f"longer than {LONGEST_ROW // 10**6} MB; divide it"
"""The problem of a longer one."""

MARK = b"!"
"""The first byte of a line of a converted file that holds a problem; no JSON starts with it."""

_BEGINNING = 1000  # bytes that are kept of a row that cannot be read
_DEEPEST = 100  # levels of lists and objects; beyond about 1000, Python's functions on them fail
BOM = b"\xef\xbb\xbf"
"""UTF-8's byte order mark, which is allowed at the beginning of a file."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # an escape for half of a pair, or for a whole one
_HALF = re.compile("[\ud800-\udfff]")
_MARK_OF_ROW = re.compile(r"(?i)true|false|[01](?:\.[0-9]+)?")
_SKIPPED = 1 << 20  # bytes at a time of the rest of a row that is too long

# What is text in the cells of a table, and not in rows: lists, and marks of preference data.
_LISTS = ("messages", "conversations", "tools", "functions", "history")
_MARKS = ("weight", "label", "kto_tag")


class Row(NamedTuple):
    """A row: its line and its value; or the reason it could not be read, and its beginning."""

    line: str
    value: object
    problem: str | None = None


class Line(NamedTuple):
    """A line of a stream: its number from 1, its bytes, and whether it is cut off as too long."""

    number: int
    raw: bytes
    too_long: bool = False


@dataclass(frozen=True)
class RowFile:
    """A file of JSON lines, and which of its rows are used.

    Attributes:
        path: The file, in UTF-8; blank lines are no rows.
        name: What messages call it: the file, data set or stream that the user named.
        source: Index of the source of the run's data that it belongs to.
        lines: For a converted file whose lines are not those of the original, a ``.npy`` of int64
            with the number in the original of each line; None: a line's own number.
        start: The first row used, counted without blank lines.
        stop: The first row not used any more; None: all are.
        converted: Whether halfbyte wrote the file: it may have lines marked as problems, and has
            no blank ones.
        named: Whether lines are ``name:number`` in messages, since there are several files.
        columns: Pairs of a key that halfbyte reads, and the row's key that it is read from.
        json_cells: Whether lists, such as ``messages``, may be text in JSON, as in tables.
    """

    path: Path
    name: str
    source: int = 0
    lines: Path | None = None
    start: int = 0
    stop: int | None = None
    converted: bool = False
    named: bool = False
    columns: tuple[tuple[str, str], ...] = ()
    json_cells: bool = False

    def rows(self) -> Iterator[Row]:
        """Read the rows that are used, in order.

        Raises:
            OSError: The file cannot be read.
        """
        numbers = self.numbers()
        for line in self.lines_used():
            yield self.parse(line.raw, self.number(line.number, numbers))

    def lines_used(self) -> Iterator[Line]:
        """Read the lines of the rows that are used, with their numbers in this file.

        Raises:
            OSError: The file cannot be read.
        """
        with open_file(self.path) as file:
            lines = (line for line in bounded_lines(file) if line.raw.strip())
            yield from islice(lines, self.start, self.stop)

    def read_rows(self, start: int, stop: int, first: int) -> Iterator[Row]:
        """Read the rows in a range of bytes, whatever ``start`` and ``stop`` of the file are.

        Args:
            start: The byte at which the first line begins.
            stop: The byte after the last line.
            first: Number from 1 of the first line in this file, blank lines included.

        Raises:
            OSError: The file cannot be read.
        """
        numbers = self.numbers()
        with open_file(self.path) as file:
            file.seek(start)
            for line in bounded_lines(file, first):
                if line.raw.strip():
                    yield self.parse(line.raw, self.number(line.number, numbers))
                if file.tell() >= stop:
                    return

    def parse(self, raw: bytes, number: int, problem: str | None = None) -> Row:
        """Read one line.

        Args:
            raw: The line; of one longer than `LONGEST_ROW`, at least one byte more than that.
            number: Its number in the original; see `number`.
            problem: Why it cannot be read, if that is known.
        """
        line = f"{self.name}:{number}" if self.named else str(number)
        if problem is not None:
            return Row(line, beginning_of(raw), problem)
        if self.converted and raw.startswith(MARK):
            problem, beginning = json.loads(raw[1:])
            return Row(line, beginning, problem)
        row = parse_row(line, raw)
        if row.problem is None:
            value = with_columns(row.value, self.columns)
            try:
                row = Row(line, _with_lists(value) if self.json_cells else value)
            except ValueError as error:
                row = Row(line, beginning_of(raw), str(error))
        return row

    def numbers(self) -> np.ndarray[tuple[int], np.dtype[np.int64]] | None:
        """The numbers in the original of all lines, memory-mapped; None: their own."""
        return None if self.lines is None else np.load(self.lines, mmap_mode="r")

    def number(self, own: int, numbers: np.ndarray[tuple[int], np.dtype[np.int64]] | None) -> int:
        """The number in the original of the line that is number ``own`` (from 1) in this file."""
        return own if numbers is None else int(numbers[own - 1])


def bounded_lines(file: BinaryIO, first: int = 1) -> Iterator[Line]:
    """Yield the lines of a stream, the blank ones too, with bounded memory.

    Of a line that is too long, little more than `LONGEST_ROW` is kept. A byte order mark at the
    start of the stream is removed.

    Args:
        file: The stream.
        first: The number of the first line; only line 1 can have a byte order mark.
    """
    most, number = LONGEST_ROW, first
    while raw := file.readline(most + 1):
        too_long = len(raw) > most
        if too_long and not raw.endswith(b"\n"):
            while (rest := file.readline(_SKIPPED)) and not rest.endswith(b"\n"):
                pass
        yield Line(number, raw.removeprefix(BOM) if number == 1 else raw, too_long)
        number += 1


def parse_row(line: str, raw: bytes) -> Row:
    """Parse one row, or say why it cannot be used, whatever its format."""
    if len(raw) > LONGEST_ROW:
        return Row(line, beginning_of(raw), TOO_LONG)
    try:
        text = raw.decode("utf-8")
        value = json.loads(text)
    except UnicodeDecodeError:
        return Row(line, beginning_of(raw), "not UTF-8")
    except (ValueError, RecursionError):
        return Row(line, beginning_of(raw), "malformed JSON")
    # What JSON allows but what cannot be tokenised, or printed by a template.
    if text.count("[") + text.count("{") > _DEEPEST and _is_deeper(value, _DEEPEST):
        problem = f"nested more than {_DEEPEST} levels deep"
    elif _SURROGATE.search(text) and _HALF.search(json.dumps(value, ensure_ascii=False)):
        problem = "text that is not valid Unicode (half a surrogate pair)"
    else:
        return Row(line, value)
    return Row(line, beginning_of(raw), problem)


def beginning_of(raw: bytes) -> str:
    """What is kept of a row that cannot be read."""
    return raw[:_BEGINNING].decode("utf-8", errors="replace").rstrip("\r\n")


def problem_line(problem: str, raw: bytes) -> bytes:
    """The line of a converted file for a row that cannot be read."""
    return MARK + json.dumps([problem, beginning_of(raw)]).encode()


@contextmanager
def reading_errors(name: str) -> Iterator[None]:
    """Turn an ``OSError`` raised inside into a `DataError` that names the file, or ``name``."""
    try:
        yield
    except OSError as error:
        file = error.filename or name
        raise DataError(f"{file} cannot be read: {error.strerror or error}.") from error


def with_columns(value: object, columns: Sequence[tuple[str, str]]) -> object:
    """Rename the keys of a row: each of ``columns`` is our key and that of the row.

    A key that the row does not have changes nothing. All are read before any is written, so keys
    can be exchanged.
    """
    if not columns or not isinstance(value, dict):
        return value
    found = {ours: value[theirs] for ours, theirs in columns if theirs in value}
    renamed = {theirs for _, theirs in columns}
    return {key: kept for key, kept in value.items() if key not in renamed} | found


def _with_lists(value: object) -> object:
    """A row of a table, with what its cells hold as JSON in place of the text.

    Raises:
        ValueError: A cell that should be a list is not JSON; the message is the row's problem.
    """
    if not isinstance(value, dict):
        return value
    for key in _LISTS:
        cell = value.get(key)
        if isinstance(cell, str) and cell.lstrip().startswith(("[", "{")):
            inner = parse_row("", cell.encode())
            if inner.problem is not None:
                raise ValueError(f"column {key!r}: {inner.problem}")
            value[key] = inner.value
    for key in _MARKS:
        cell = value.get(key)
        if isinstance(cell, str) and _MARK_OF_ROW.fullmatch(cell):
            value[key] = json.loads(cell.lower())
    return value


def _is_deeper(value: object, depth: int) -> bool:
    level = [value]
    while depth >= 0 and (level := [one for one in level if isinstance(one, dict | list)]):
        lists = [one.values() if isinstance(one, dict) else one for one in level]
        level = [inner for one in lists for inner in one]
        depth -= 1
    return bool(level)
