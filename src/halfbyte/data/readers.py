"""Readers of text: JSON lines, a JSON array, CSV. Each yields rows one by one, as lines of JSON.

Memory is bounded whatever the file holds, and what cannot be read is one row with a problem: a
malformed row never costs the rows after it, except in an array whose structure is broken.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections import Counter, deque
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from halfbyte.data import row_files
from halfbyte.data.row_files import TOO_LONG, Line, bounded_lines, parse_row
from halfbyte.errors import DataError
from halfbyte.foreign_text import quote

_CHUNK = 1 << 20  # bytes read at a time
_BEGINNING = 1000  # characters of a row that cannot be read
_LONGEST_WORD = (
    20  # characters of JSON that are an error if one is missing: -Infinity, \ud83d\ude00
)
_SPACE = re.compile(r"[ \t\r\n]*")
_NOT_READ = "; the rest of the array is not read"


class RawRow(NamedTuple):
    """A row before it is parsed.

    Attributes:
        number: Its line in the original, or its number from 1 in a table.
        raw: JSON without line ends; of a row with a problem, its beginning or all of it.
        problem: Why it cannot be read, or None.
    """

    number: int
    raw: bytes
    problem: str | None = None


# --- JSON ---------------------------------------------------------------------------------------


def read_lines(file: BinaryIO) -> Iterator[RawRow]:
    """Read JSON lines."""
    for line in bounded_lines(file):
        if line.raw.strip():
            yield RawRow(line.number, line.raw.strip(), TOO_LONG if line.too_long else None)


def read_object(file: BinaryIO) -> RawRow | None:
    """Read a file that is one object over several lines; None if it is not.

    At most ten times `LONGEST_ROW` is read, and of a file with an object per line, one line.
    """
    first = file.readline(row_files.LONGEST_ROW).removeprefix(codecs.BOM_UTF8)
    while first and not first.strip():
        first = file.readline(row_files.LONGEST_ROW)
    if not first or parse_row("1", first).problem is None:
        return None
    most = 10 * row_files.LONGEST_ROW
    raw = first + file.read(most + 1)
    if len(raw) > most or not _is_json(raw):
        return None
    return RawRow(1, _one_line(raw), parse_row("1", raw).problem)


def _is_json(raw: bytes) -> bool:
    try:
        json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        return False
    return True


def read_array(file: BinaryIO) -> Iterator[RawRow]:
    """Read the elements of an array, each with the line on which it begins."""
    window, decoder = _Window(file), json.JSONDecoder()
    at = window.after_space(window.after_space(0) + 1)
    while window[at] not in ("]", ""):
        at = window.begin(at)
        line, beginning = window.line, window.text[at : at + _BEGINNING]
        try:
            end = _end_of_value(decoder, window, at)
            raw, at = window.text[at:end], window.after_space(end)
            if window[at] not in (",", "]"):
                raise ValueError("neither a comma nor the end of the array")
        except (ValueError, RecursionError) as error:
            problem = TOO_LONG if isinstance(error, _TooLongError) else "malformed JSON"
            yield RawRow(line, _bytes_of(beginning), problem + _NOT_READ)
            return
        yield _element(line, raw)
        if window[at] == ",":
            at = window.after_space(at + 1)
    if window[at] == "":
        window.begin(at)
        yield RawRow(window.line, b"", "the array does not end")
    elif window[rest := window.after_space(at + 1)]:
        at = window.begin(rest)
        beginning = window.text[at : at + _BEGINNING]
        yield RawRow(window.line, _bytes_of(beginning), "after the end of the array: not read")


class _TooLongError(ValueError):
    """No end of a value is found in twice the longest row."""


class _Window:
    """A part of a stream's text that moves along; positions are in ``text``.

    Bytes that are not UTF-8 become halves of surrogate pairs, as in ``surrogateescape``.

    Attributes:
        text: The text.
        line: The line of the position that was last begun at.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.line, self.ended = "", 1, False
        self._counted = 0  # the position of `line`
        self.grow(0)
        self.text = self.text.removeprefix("\ufeff")

    def __getitem__(self, at: int) -> str:
        """The character at a position, or nothing at the end of the stream."""
        while at >= len(self.text) and not self.ended:
            self.grow(at)
        return self.text[at : at + 1]

    def grow(self, at: int) -> None:
        """Read as much again as there is from a position on, and at least a chunk."""
        raw = self._file.read(max(_CHUNK, len(self.text) - at))
        self.ended = not raw
        self.text += self._decoder.decode(raw, final=self.ended)

    def begin(self, at: int) -> int:
        """Count the lines up to a position; what is before may be forgotten.

        Returns:
            The position, which is another one then.
        """
        self.line += self.text.count("\n", self._counted, at)
        if at > _CHUNK:  # copying the rest each time would take a time that is quadratic
            self.text, at = self.text[at:], 0
        self._counted = at
        return at

    def after_space(self, at: int) -> int:
        """The position of the first character from ``at`` on that is no white space."""
        while True:
            found = _SPACE.match(self.text, at)
            end = len(self.text) if found is None else found.end()
            if end < len(self.text) or self.ended:
                return end
            at = self.begin(end)  # white space alone may be longer than memory
            self.grow(at)


def _end_of_value(decoder: json.JSONDecoder, window: _Window, at: int) -> int:
    """The end of the value at a position; the window grows until it has all of it.

    Raises:
        ValueError: There is no JSON value.
    """
    while True:
        try:
            _, end = decoder.raw_decode(window.text, at)
            if end < len(window.text) or window.ended:  # a number may go on after its window
                return end
        except json.JSONDecodeError as error:
            near_the_end = error.pos > len(window.text) - _LONGEST_WORD
            if window.ended or not (near_the_end or error.msg.startswith("Unterminated")):
                raise
        if len(window.text) - at > 2 * row_files.LONGEST_ROW:
            raise _TooLongError
        window.grow(at)


def _element(line: int, text: str) -> RawRow:
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        return RawRow(line, _bytes_of(text[:_BEGINNING]), "not UTF-8")
    problem = TOO_LONG if len(raw) > row_files.LONGEST_ROW else None
    return RawRow(line, _one_line(raw), problem)


def _one_line(raw: bytes) -> bytes:
    """JSON without line ends, which are white space: strings have none."""
    return raw.replace(b"\n", b" ").replace(b"\r", b" ").strip()


def _bytes_of(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


# --- CSV ----------------------------------------------------------------------------------------

_DELIMITERS = (",", ";", "\t", "|")


def read_csv(file: BinaryIO, name: str, delimiter: str | None = None) -> Iterator[RawRow]:
    """Read rows of comma-separated values, of which the first are the names of the columns.

    Cells are text; an empty one is missing. Where a quote is missing, the row it was opened in has
    a problem, and reading goes on with the next line.

    Args:
        file: The stream.
        name: What messages call it.
        delimiter: Between cells; None: the one of ``, ; tab |`` that the first line has most of.

    Raises:
        DataError: The first line has no usable names.
    """
    lines = bounded_lines(file)
    first = next((line for line in lines if line.raw.strip()), None)
    if first is None:
        return
    if delimiter is None:
        delimiter = max(_DELIMITERS, key=lambda one: first.raw.count(one.encode()))
    records = _Records(first, lines)
    limit = csv.field_size_limit(row_files.LONGEST_ROW)
    try:
        parsed = csv.reader(records, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            records.taken.clear()
            try:
                cells = next(parsed)
            except StopIteration:
                return
            except csv.Error as error:
                row = RawRow(records.taken[0].number, records.taken[0].raw, _in_words(error))
                records.back()
            else:
                if not any(line.raw.strip() for line in records.taken):
                    continue
                row = _row_of(cells, header, records.taken)
            if header is None:
                header = _header(cells if row.problem is None else None, row, name)
            else:
                yield row
    finally:
        csv.field_size_limit(limit)


class _Records:
    """Lines for ``csv.reader``, which can be read again after an error in a record of several.

    Attributes:
        taken: The lines since it was last cleared: those of one record.
    """

    def __init__(self, first: Line, lines: Iterator[Line]) -> None:
        self._lines, self._again = lines, deque([first])
        self.taken: list[Line] = []
        self._bytes = 0

    def __iter__(self) -> _Records:
        return self

    def __next__(self) -> str:
        self._bytes = self._bytes if self.taken else 0
        if self._bytes > row_files.LONGEST_ROW:
            raise csv.Error("unexpected end of data")
        line = self._again.popleft() if self._again else next(self._lines)
        self.taken.append(line)
        self._bytes += len(line.raw)
        if line.too_long:
            raise csv.Error("field larger than field limit")
        return line.raw.decode("utf-8", "surrogateescape")

    def back(self) -> None:
        """Give all lines of the record again, except the first."""
        self._again.extendleft(reversed(self.taken[1:]))


def _row_of(cells: list[str], header: list[str] | None, taken: list[Line]) -> RawRow:
    number, raw = taken[0].number, b"".join(line.raw for line in taken)
    problem = None
    if header is not None and len(cells) != len(header):
        problem = f"{len(cells)} cells, and {len(header)} columns"
    elif len(raw) > row_files.LONGEST_ROW:
        problem = TOO_LONG
    try:
        found = dict(zip(header or cells, cells, strict=True)) if problem is None else {}
        value = {name: cell for name, cell in found.items() if cell}
        text = json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        problem = "not UTF-8"
    return RawRow(number, text if problem is None else raw, problem)


def _header(cells: list[str] | None, row: RawRow, name: str) -> list[str]:
    if cells is None:
        raise DataError(f"{name}, line {row.number}: expected names of columns: {row.problem}.")
    twice = [column for column, count in Counter(filter(None, cells)).items() if count > 1]
    if twice:
        raise DataError(
            f"{name}: the column {quote(twice[0])} occurs twice in the first line; rename one."
        )
    return cells


_CSV_ERRORS = {
    "unexpected end of data": "a quote that is not closed",
    "field larger": "a quote that is not closed, or " + "a cell that is too long",
    "new-line character": "a carriage return outside quotes",
}


def _in_words(error: csv.Error) -> str:
    known = (text for start, text in _CSV_ERRORS.items() if str(error).startswith(start))
    return f"malformed CSV: {next(known, 'text after a quote was closed')}"
