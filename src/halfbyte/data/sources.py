"""Reads rows, with their line numbers, from a file, a directory or the hub.

A malformed line is a row with a problem, counted with the others; only a source without any rows,
or one that cannot be read, is an error. A file is JSONL (one object per line) or a JSON array of
objects, which is decided by its first character, not its suffix.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from halfbyte.errors import DataError
from halfbyte.input_files import open_file, read_file

SUFFIXES = (".jsonl", ".json", ".ndjson")
"""Suffixes of data files in a directory."""

_OTHER_KINDS = (".parquet", ".csv", ".tsv", ".txt", ".xlsx", ".arrow", ".gz", ".zst", ".zip")
LONGEST_ROW = 8_000_000
"""Longest row of a file, in bytes: some two million tokens, which take ten seconds to encode."""

_TOO_LONG = f"longer than {LONGEST_ROW // 10**6} MB; divide it"
_BEGINNING = 1000  # bytes that are kept of a row that cannot be read
_DEEPEST = 100  # levels of lists and objects; beyond about 1000, Python's functions on them fail
_BOM = b"\xef\xbb\xbf"
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")  # of half of a pair, or of a whole one
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


class Row(NamedTuple):
    """A row: its line and its value; or the reason it could not be read, and its beginning."""

    line: str
    value: object
    problem: str | None = None


class Source(NamedTuple):
    """The rows of a source, and messages about how they were found."""

    rows: list[Row]
    notes: tuple[str, ...]


def require_source(source: str | Path) -> None:
    """Check that a source exists, or can be the id of a data set on the hub.

    Raises:
        DataError: It does not, and is none.
    """
    path = Path(source)
    try:
        found = path.exists()
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror or error}.") from error
    if not found and not _is_hub_id(source):
        raise DataError(_missing(path))


def read_source(source: str | Path) -> Source:
    """Reads every row of ``source``.

    Args:
        source: A ``.jsonl`` or ``.json`` file; a directory, of which ``train.jsonl`` (or
            ``train.json``) is read if it exists, otherwise every such file in alphabetical order;
            or the id of a data set on the hub, ``owner/name``.

    Raises:
        DataError: It does not exist, is of another kind, or has no rows.
    """
    require_source(source)
    path = Path(source)
    notes: tuple[str, ...] = ()
    try:
        if path.is_dir():
            files, notes = _files_of(path)
            rows = [
                row._replace(line=f"{file.name}:{row.line}") if len(files) > 1 else row
                for file in files
                for row in _read_file(file)
            ]
        elif path.exists():
            rows = list(_read_file(path))
        else:
            rows = list(_read_hub(str(source)))
    except OSError as error:
        file = error.filename or source  # one of a directory's files
        raise DataError(f"{file} cannot be read: {error.strerror or error}.") from error
    if not rows:
        raise DataError(f"{source} is empty: expected rows, one JSON object per line.")
    return Source(rows, notes)


def _files_of(directory: Path) -> tuple[list[Path], tuple[str, ...]]:
    every = sorted(file for file in directory.iterdir() if file.suffix.lower() in SUFFIXES)
    if not every:
        raise DataError(
            f"{directory} contains no data: expected train.jsonl, or other files named "
            f"{', '.join('*' + suffix for suffix in SUFFIXES)}."
        )
    train = [file for file in every if file.stem.lower() == "train"]
    if not train:
        return every, (f"read {', '.join(file.name for file in every)}",) if every[1:] else ()
    left = [file.name for file in every if file not in train]
    note = f"read {', '.join(file.name for file in train)} only, not {', '.join(left)}"
    return train, (note,) if left else ()


def _read_file(path: Path) -> Iterator[Row]:
    if path.suffix.lower() in _OTHER_KINDS:
        raise DataError(
            f"{path} is a {path.suffix} file: expected JSONL, one JSON object per line. Convert it "
            "first, e.g. with pandas' DataFrame.to_json(path, orient='records', lines=True)."
        )
    raw = read_file(path)
    if raw.startswith(_UTF16):
        raise DataError(f"{path} is in UTF-16: expected UTF-8. Save it as UTF-8.")
    raw = raw.removeprefix(_BOM)
    if raw.lstrip().startswith(b"["):
        yield from _read_array(raw)
        return
    if path.suffix.lower() == ".json":
        row = _parse("1", raw)
        if row.problem in (None, _TOO_LONG):  # the whole file is one object
            yield row
            return
    for number, line in enumerate(io.BytesIO(raw), 1):
        if line.strip():
            yield _parse(str(number), line)


def read_lines(path: str, start: int, stop: int, first: int) -> Iterator[Row]:
    """Yield the rows in a range of bytes of a JSONL file, which has whole lines.

    Args:
        path: The file.
        start: The first byte; not that of a byte order mark.
        stop: The byte after the last.
        first: Number of the first line, blank lines included.

    Raises:
        OSError: The file cannot be read.
    """
    with open_file(path) as file:
        file.seek(start)
        number = first
        while file.tell() < stop and (line := file.readline(LONGEST_ROW + 1)):
            if len(line) > LONGEST_ROW:
                yield Row(str(number), _beginning(line), _TOO_LONG)
                while not line.endswith(b"\n") and (line := file.readline(LONGEST_ROW)):
                    pass
            elif line.strip():
                yield _parse(str(number), line)
            number += 1


def _parse(number: str, line: bytes) -> Row:
    try:
        text = line.decode("utf-8")
        row = checked(number, json.loads(text), text)
        return row if len(line) <= LONGEST_ROW else Row(number, _beginning(line), _TOO_LONG)
    except UnicodeDecodeError:
        return Row(number, _beginning(line), "not UTF-8")
    except (ValueError, RecursionError):
        return Row(number, _beginning(line), "malformed JSON")


def _beginning(raw: bytes) -> str:
    return raw[:_BEGINNING].decode("utf-8", errors="replace")


def checked(number: str, value: object, text: str | None = None) -> Row:
    """Return a row; with a problem if it is nothing that can be tokenised or rendered.

    Args:
        number: Its line.
        value: Its value.
        text: The JSON that it was read from, if any.
    """
    if text is None:
        text = json.dumps(value)
    if _ESCAPE.search(text) and _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        problem = "text that is not valid Unicode (half a surrogate pair)"
    elif text.count("[") + text.count("{") > _DEEPEST and _is_deeper(value, _DEEPEST):
        problem = f"nested more than {_DEEPEST} levels deep"
    else:
        return Row(number, value)
    return Row(number, json.dumps(value)[:_BEGINNING], problem)


def _is_deeper(value: object, depth: int) -> bool:
    level = [value]
    while depth >= 0 and (level := [one for one in level if isinstance(one, dict | list)]):
        lists = [one.values() if isinstance(one, dict) else one for one in level]
        level = [inner for one in lists for inner in one]
        depth -= 1
    return bool(level)


def _read_array(raw: bytes) -> Iterator[Row]:
    """Reads the elements of an array one by one, to know the line of each."""
    decoder, space = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        start = raw.rfind(b"\n", 0, error.start) + 1
        number = str(raw.count(b"\n", 0, start) + 1)
        yield Row(number, _beginning(raw[start : start + _BEGINNING]), "not UTF-8")
        return
    line, counted_to = 1, 0

    def skip(position: int) -> int:
        found = space.match(text, position)
        return found.end() if found else position

    position = skip(skip(0) + 1)
    while text[position : position + 1] != "]":
        line, counted_to = line + text.count("\n", counted_to, position), position
        start, beginning = position, text[position : position + _BEGINNING]
        try:
            value, position = decoder.raw_decode(text, position)
            written = text[start:position]
            position = skip(position)
            if text[position : position + 1] not in (",", "]"):
                raise ValueError("neither a comma nor the end of the array")
            row = checked(str(line), value, written)
            if position - counted_to > LONGEST_ROW:
                row = Row(row.line, beginning, _TOO_LONG)
        except (ValueError, RecursionError):
            yield Row(str(line), beginning, "malformed JSON; the rest of the array is not read")
            return
        yield row
        if text[position] == ",":
            position = skip(position + 1)


def _is_hub_id(source: str | Path) -> bool:
    """Whether it is a hub id, not a mistyped path: ``owner/name``, and no directory ``owner``."""
    named = isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source)
    path = Path(source)
    known = path.suffix.lower() in (*SUFFIXES, *_OTHER_KINDS)
    return bool(named) and not known and not path.parent.exists()


def _read_hub(name: str) -> Iterator[Row]:
    if importlib.util.find_spec("datasets") is None:
        raise DataError(
            f"{name} is neither a file nor a directory. To read a data set from the hub, install "
            "the optional package 'datasets': pip install datasets."
        )
    datasets = importlib.import_module("datasets")
    try:
        rows = datasets.load_dataset(name, split="train")
    except (OSError, ValueError) as error:
        raise DataError(f"The data set {name} could not be read from the hub: {error}") from error
    for number, value in enumerate(rows, 1):
        yield Row(str(number), value)


def _missing(path: Path) -> str:
    message = f"There is no data file or directory {path}."
    if path.parent.is_dir():
        names = [entry.name for entry in path.parent.iterdir()]
        if near := difflib.get_close_matches(path.name, names, n=1):
            return f"{message} Did you mean {path.parent / near[0]}?"
    return f"{message} (A data set on the hub is written owner/name.)"
