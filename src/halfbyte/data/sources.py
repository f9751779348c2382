"""Opens the sources of a run's data: files, directories, patterns, the hub and standard input.

Each becomes files of JSON lines (`halfbyte.data.row_files`); what is already one is used in place,
everything else is converted (`halfbyte.data.conversion`). A malformed row is a row with a problem,
counted with the others; only a source without any rows, or one that cannot be read, is an error.
With streaming, rows are read as they come instead, from sources that need not have an end.
"""

from __future__ import annotations

import dataclasses
import difflib
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from io import BufferedReader
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from halfbyte.config.data_sources import Data, sources_of
from halfbyte.data.conversion import Progress, Reading, convert, count_rows, reading, row_file
from halfbyte.data.directories import files_in, files_matching, is_pattern
from halfbyte.data.hub import open_hub
from halfbyte.data.kinds import DataFile
from halfbyte.data.readers import RawRow, read_array, read_lines
from halfbyte.data.row_files import Row, RowFile, reading_errors
from halfbyte.data.specs import STANDARD_INPUT, Slice, Spec
from halfbyte.errors import DataError
from halfbyte.foreign_text import quote, shorten
from halfbyte.user_cache import temporary_directory

_LOOKED_AT = 100  # rows of a source, to see whether it has the columns that are asked for


class Source(NamedTuple):
    """All rows of sources, and messages about how they were found."""

    rows: list[Row]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Sources:
    """The sources of a run's data, in the order in which they were given.

    Attributes:
        files: Their files; those of one source are adjacent. Empty if they are streamed.
        names: Each source as the user named it.
        weights: The weight of each source, or None if none has one.
        notes: Messages for the user.
    """

    files: list[RowFile]
    names: list[str]
    weights: list[float] | None
    notes: tuple[str, ...]
    _streams: tuple[Callable[[], Iterator[Row]], ...] = ()

    def rows(self) -> Iterator[Row]:
        """Read all rows, in order.

        Raises:
            DataError: A file cannot be read.
        """
        for file in self.files:
            yield from self.rows_of(file)

    def rows_of(self, file: RowFile) -> Iterator[Row]:
        """Read the rows of one of the files.

        Raises:
            DataError: It cannot be read.
        """
        with reading_errors(file.name):
            yield from file.rows()

    def stream(self, seed: int = 0) -> Iterator[Row]:
        """Read the rows of streamed sources as they come.

        With weights, each row is of a source drawn at random, until all have ended; without, one
        source is read after another.

        Args:
            seed: Determines which source each row is of.

        Raises:
            DataError: A source cannot be read any more.
        """
        streams = [open_() for open_ in self._streams]
        if self.weights is None:
            yield from chain.from_iterable(streams)
            return
        generator = np.random.Generator(np.random.PCG64([seed]))
        left = dict(zip(range(len(streams)), self.weights, strict=True))
        while left:
            shares = np.array(list(left.values())) / sum(left.values())
            chosen = list(left)[generator.choice(len(left), p=shares)]
            row = next(streams[chosen], None)
            if row is None:
                del left[chosen]
            else:
                yield row


def open_sources(
    data: Data,
    *,
    columns: Mapping[str, str] | None = None,
    max_samples: int | None = None,
    streaming: bool = False,
    keep: bool = True,
    progress: Progress | None = None,
) -> Sources:
    """Open sources, and convert what is not JSON lines.

    Args:
        data: One source or several; `halfbyte.data.specs` has the grammar.
        columns: For keys that halfbyte reads, such as ``messages``, the rows' own; a source's own
            columns come first.
        max_samples: Rows of each source that are used at most, the first.
        streaming: Whether to read rows as they come (`Sources.stream`).
        keep: Whether converted files may be kept in the user's cache, and taken from there.
        progress: Called while a source is converted.

    Raises:
        DataError: A source does not exist, cannot be read, or has no rows.
        OutputError: There is no space for a converted file.
    """
    specs = [_with_columns(Spec.parse(one), columns) for one in sources_of(data)]
    for one in specs:  # before the first is converted
        _require(one)
    names = [one.name for one in specs]
    weights = _weights(specs)
    if streaming:
        streams = tuple(_stream_of(spec, max_samples, several=len(specs) > 1) for spec in specs)
        return Sources([], names, weights, (), streams)
    files: list[RowFile] = []
    notes: list[str] = []
    for index, spec in enumerate(specs):
        with reading_errors(spec.path):
            found, said = _files_of(spec, max_samples, progress, keep=keep)
            found = [
                dataclasses.replace(file, source=index, columns=spec.columns) for file in found
            ]
            if not any(next(file.lines_used(), None) for file in found):
                raise DataError(_no_rows(spec, found))
            _check_columns(spec, found, alone=len(specs) == 1)
        files += found
        notes += said
    return Sources(_named(files), names, weights, tuple(dict.fromkeys(notes)))


def read_source(data: Data) -> Source:
    """Read every row of ``data``; for sources that fit into memory.

    Raises:
        DataError: As `open_sources`.
    """
    opened = open_sources(data)
    return Source(list(opened.rows()), opened.notes)


def require_source(data: Data) -> None:
    """Check that sources exist, or can be ids of data sets on the hub.

    Raises:
        DataError: One does not, and is none.
    """
    for one in sources_of(data):
        _require(Spec.parse(one))


def local_paths(data: Data) -> list[Path]:
    """The files and directories among sources, as they were named."""
    return [Path(spec.path) for spec in map(Spec.parse, sources_of(data)) if spec.is_local]


# --- from names to files --------------------------------------------------------------------------


def _with_columns(spec: Spec, columns: Mapping[str, str] | None) -> Spec:
    merged = dict(columns or {}) | dict(spec.columns)
    return dataclasses.replace(spec, columns=tuple(merged.items()))


def _weights(specs: Sequence[Spec]) -> list[float] | None:
    weights = [spec.weight for spec in specs]
    if all(weight is None for weight in weights):
        return None
    without = next((spec for spec in specs if spec.weight is None), None)
    if without is not None:
        raise DataError(
            f"{without.name} has no weight, but others have one: give every source a weight "
            f"({without.name}:1), or none."
        )
    return [weight for weight in weights if weight is not None]


def _files_of(
    spec: Spec, max_samples: int | None, progress: Progress | None, *, keep: bool
) -> tuple[list[RowFile], tuple[str, ...]]:
    """The files of a source, with the rows that are used of each, and messages."""
    if spec.is_hub_id and not spec.is_local:
        return _hub_file(spec, max_samples, progress, keep=keep)
    paths, notes = _paths_of(spec)
    # With what is known before anything is converted, no more is converted than is needed.
    known = spec.rows.known if len(paths) == 1 or spec.rows.is_everything else None
    limit = None
    if known is not None:
        limit = known[1] if max_samples is None else _earlier(known[0] + max_samples, known[1])
    files = []
    for path, name in paths:
        data = DataFile.of(path, name)
        file, said = row_file(data, limit=limit, keep=keep, progress=progress)
        files.append(file)
        notes += said
    return _rows_used(files, spec.rows, max_samples), notes


def _require(spec: Spec) -> None:
    if spec.path == STANDARD_INPUT and not spec.is_local:
        if sys.stdin is None or sys.stdin.isatty():
            raise DataError("Expected data on standard input (-): pipe it in, or name a file.")
        return
    if not spec.is_local and not is_pattern(spec.path) and not spec.is_hub_id:
        raise DataError(_missing(Path(spec.path)))
    if spec.is_local and not Path(spec.path).is_dir():
        for key, value in (("split", spec.split), ("config", spec.config)):
            if value not in (None, "train"):
                raise DataError(f"{spec.path} is a file, which has no {key} {quote(value)}.")


def _paths_of(spec: Spec) -> tuple[list[tuple[Path, str]], tuple[str, ...]]:
    """The files of a local source with their names, and messages."""
    path = Path(spec.path)
    if spec.path == STANDARD_INPUT and not spec.is_local:
        return [(_spooled(), spec.name)], ()
    if path.is_dir():
        files, notes = files_in(path, spec.split)
    elif spec.is_local:
        return [(path, str(path))], ()
    else:
        files, notes = files_matching(spec.path)
    return [(file, str(file)) for file in files], notes


_spool: list[Path] = []


def _spooled() -> Path:
    """Standard input as a file; it is read once, whoever asks for it."""
    if not _spool:
        path = temporary_directory() / "standard-input"
        with open(path, "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
        _spool.append(path)
    return _spool[0]


def _hub_file(
    spec: Spec, max_samples: int | None, progress: Progress | None, *, keep: bool
) -> tuple[list[RowFile], tuple[str, ...]]:
    data = open_hub(spec)
    used = spec.rows.of(data.count or 0)[:max_samples]
    done = 0

    def counted() -> Iterator[RawRow]:
        nonlocal done
        for row in data.rows(used.start, used.stop):
            done += 1
            yield row

    identity = data.fingerprint and {
        "hub": [data.name, data.fingerprint],
        "rows": [used.start, used.stop],
    }
    file, notes = convert(
        data.name,
        (identity or None) if keep else None,
        lambda: nullcontext(Reading(counted(), lambda: done, len(used))),
        limit=None,
        progress=progress,
    )
    return [dataclasses.replace(file, json_cells=True)], notes


def _rows_used(files: list[RowFile], rows: Slice, max_samples: int | None) -> list[RowFile]:
    """Set which rows of each file are used; files of which none is are left out."""
    if rows.is_everything and max_samples is None:
        return files
    known = rows.known
    if known is not None and len(files) == 1:
        start, stop = known
        if max_samples is not None:
            stop = _earlier(start + max_samples, stop)
        return [dataclasses.replace(files[0], start=start, stop=stop)]
    counts = [count_rows(file) for file in files]
    used = rows.of(sum(counts))[:max_samples]
    found, before = [], 0
    for file, count in zip(files, counts, strict=True):
        start, stop = max(used.start - before, 0), min(used.stop - before, count)
        if start < stop:
            found.append(dataclasses.replace(file, start=start, stop=stop))
        before += count
    return found


def _earlier(one: int, other: int | None) -> int:
    return one if other is None else min(one, other)


def _named(files: list[RowFile]) -> list[RowFile]:
    """Give files the shortest names that tell them apart; lines have them if there are several."""
    if len(files) < 2:
        return files
    short = [Path(file.name).name for file in files]
    counts = Counter(short)
    return [
        dataclasses.replace(file, name=name if counts[name] == 1 else file.name, named=True)
        for file, name in zip(files, short, strict=True)
    ]


def _no_rows(spec: Spec, files: Sequence[RowFile]) -> str:
    if spec.rows.is_everything:
        return f"{spec.name} is empty: expected rows, one JSON object per line."
    asked = f"[{spec.rows.start or ''}:{spec.rows.stop or ''}]"
    return f"{spec.name} has no rows in {asked}."


def _check_columns(spec: Spec, files: Sequence[RowFile], *, alone: bool) -> None:
    """Check that some of the first rows have the columns that are asked for, or our keys.

    Raises:
        DataError: None has.
    """
    if not spec.columns:
        return
    bare = (dataclasses.replace(file, columns=()) for file in files)
    rows = list(islice(chain.from_iterable(file.rows() for file in bare), _LOOKED_AT))
    keys: dict[str, None] = {}
    for row in rows:
        if row.problem is None and isinstance(row.value, dict):
            keys |= dict.fromkeys(row.value)
    for ours, theirs in spec.columns:
        if keys and theirs not in keys and ours not in keys:
            near = difflib.get_close_matches(theirs, keys, n=1)
            hint = f"; did you mean {quote(near[0])}?" if near else "."
            if not alone:
                hint += " A source of several can have `columns` of its own, in a YAML file."
            found = ", ".join(map(quote, list(keys)[:12]))
            raise DataError(
                f"{spec.path} has no column {quote(theirs)} to read {quote(ours)} from, only "
                f"{found}{hint}"
            )


def _missing(path: Path) -> str:
    message = f"There is no data file or directory {shorten(str(path))}."
    if path.parent.is_dir():
        names = [entry.name for entry in path.parent.iterdir()]
        if near := difflib.get_close_matches(path.name, names, n=1):
            return f"{message} Did you mean {path.parent / near[0]}?"
    return f"{message} (A data set on the hub is written owner/name.)"


# --- streaming ------------------------------------------------------------------------------------


def _stream_of(
    spec: Spec, max_samples: int | None, *, several: bool
) -> Callable[[], Iterator[Row]]:
    """A function that starts to read the rows of a source as they come."""
    if spec.rows.known is None:
        raise DataError(
            f"The rows of {spec.name} are counted from its end or in percent, which a stream does "
            "not have: give numbers, or leave `streaming` out."
        )
    start, stop = spec.rows.known
    if max_samples is not None:
        stop = _earlier(start + max_samples, stop)

    def parsed(
        raw: Iterator[RawRow], name: str, *, tables: bool, named: bool = several
    ) -> Iterator[Row]:
        file = RowFile(Path(), name, named=named, columns=spec.columns, json_cells=tables)
        for row in raw:
            yield file.parse(row.raw, row.number, row.problem)

    def rows() -> Iterator[Row]:
        if spec.path == STANDARD_INPUT and not spec.is_local:
            stream = cast(BufferedReader, sys.stdin.buffer)
            array = stream.peek(1).lstrip().startswith(b"[")
            raw = (read_array if array else read_lines)(stream)
            yield from parsed(islice(raw, start, stop), spec.name, tables=False)
        elif spec.is_hub_id and not spec.is_local:
            data = open_hub(spec, streaming=True)
            yield from parsed(data.rows(start, stop), data.name, tables=True)
        else:
            yield from islice(of_files(), start, stop)

    def of_files() -> Iterator[Row]:
        paths, _ = _paths_of(spec)
        for path, name in paths:
            with reading_errors(name):
                file = DataFile.of(path, name)
                named = several or len(paths) > 1
                with reading(file) as source:
                    yield from parsed(source.rows, name, tables=file.is_table, named=named)

    return rows
