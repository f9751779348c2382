"""Opens a source, and loads rows of it as a data set: encoded before they are needed.

The rows of small data are encoded in this process; from `SEVERAL_FROM` on by several, and kept in
the user's cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.dataset import Conversations, Dataset, Examples, last_of_row
from halfbyte.data.dataset_report import Rejection, by_reason, describe_rejected, in_words
from halfbyte.data.encoding import EncodedChunk, EncoderSpec, EncodingReport
from halfbyte.data.formats import preferred_formats
from halfbyte.data.row_encoder import RowEncoder, chunks_of
from halfbyte.data.row_files import RowFile
from halfbyte.data.row_table import RowTable
from halfbyte.data.sources import read_source
from halfbyte.errors import DataError
from halfbyte.input_files import read_file
from halfbyte.user_cache import cached_directory

COMPLETE_BYTES, COMPLETE_ROWS = 64 * 10**6, 250_000
"""Data that is larger is encoded while it is trained on (`example_stream`): this much takes half a
minute on two cores."""

SEVERAL_FROM = 4 * 10**6
"""Bytes of rows from which several processes encode them, and they are kept in the cache: below, an
encoding takes about as long as starting the processes."""

_FORMATS = "formats.json"


@dataclass(frozen=True, eq=False)
class OpenedSource:
    """A source: its rows, and messages about how they were found."""

    name: str
    table: RowTable
    notes: tuple[str, ...]
    keep: bool

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

        kept = cached_directory("formats", key, write, limit=10**7)
        return tuple(map(str, json.loads(read_file(kept.path / _FORMATS, 10_000))))

    def _vote(self, rows: NDArray[np.int64]) -> tuple[str, ...]:
        read = self.table.read(rows)
        try:
            return preferred_formats(row.value for row in read if row.problem is None)
        except DataError as error:
            raise DataError(f"{self.name}: {error}") from error


def open_source(
    source: str | Path, *, keep: bool = True, progress: Callable[[int, int], None] | None = None
) -> OpenedSource:
    """Open a source, and find its rows.

    Args:
        source: A file, a directory or a hub id; see `halfbyte.data.sources`.
        keep: Whether the cache may be used.
        progress: Called with (bytes done, total bytes), for each large file.

    Raises:
        DataError: It does not exist, cannot be read, or has no rows.
    """
    files, notes = _files_of(source)
    table = RowTable(files, keep=keep, progress=progress)
    if not len(table):
        raise DataError(f"{source} is empty: expected rows, one JSON object per line.")
    return OpenedSource(str(source), table, notes, keep)


def load_rows(
    source: OpenedSource,
    spec: EncoderSpec,
    rows: NDArray[np.int64],
    *,
    encoder: RowEncoder | None = None,
    hold: bool = False,
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
        progress: Called with (rows done, total rows).

    Raises:
        DataError: None of them is usable.
    """
    if encoder is None:
        small = source.is_small
        with RowEncoder(
            source.table, spec, keep=source.keep and not small, in_process=small
        ) as encoder:
            return load_rows(source, spec, rows, encoder=encoder, progress=progress)
    table, report, done = source.table, EncodingReport(source.name, spec, source.notes), 0
    divided = list(chunks_of(table, rows))
    held: list[EncodedChunk] = []
    row, messages = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
    for chunk_rows, chunk in zip(divided, encoder.encode(divided), strict=True):
        report.add(chunk)
        row.append(chunk_rows[chunk.row])
        messages.append(chunk.messages)
        if encoder.store is None:
            held.append(chunk)
            if hold:
                encoder.held[chunk_rows.tobytes()] = chunk
        done += len(chunk_rows)
        if progress is not None:
            progress(done, len(rows))
    found = report.report()
    if not found.examples:
        raise DataError(nothing_usable(source.name, found.rows, found.formats, found.rejections))
    if encoder.store is not None:
        held = list(encoder.mapped(divided))
    of_examples = np.concatenate(row)
    return Dataset(
        examples=Examples(held),
        report=found,
        rows=Conversations(table, spec.preferred, of_examples, np.concatenate(messages)),
        last_of_row=last_of_row(of_examples),
    )


def nothing_usable(
    source: str, rows: int, formats: Mapping[str, int], rejections: Sequence[Rejection]
) -> str:
    """Return a message that lists why no row is usable."""
    listed = "".join(f"\n  {line}" for line in describe_rejected(by_reason(rejections)))
    read_as = f" (read as {in_words(formats)})" if formats else ""
    return f"{source}: none of the {rows:,} rows{read_as} is usable.{listed}"


def _files_of(source: str | Path) -> tuple[list[RowFile], tuple[str, ...]]:
    """Stand-in until `sources.open_sources` is merged."""
    import tempfile
    from halfbyte.data.row_files import problem_line
    path = Path(source)
    if path.suffix == ".jsonl" and path.is_file() and not read_head(path).startswith((b"[", b"\xff\xfe", b"\xfe\xff")):
        return [RowFile(path, path.name)], ()
    rows, notes = read_source(source)
    directory = tempfile.mkdtemp()
    out = Path(directory) / "rows.jsonl"
    named = any(":" in row.line for row in rows)
    groups: dict[str, list] = {}
    for row in rows:
        groups.setdefault(row.line.rpartition(":")[0], []).append(row)
    files = []
    for at, (name, group) in enumerate(groups.items()):
        out = Path(directory) / f"{at}.jsonl"
        with open(out, "wb") as file:
            for row in group:
                if row.problem is not None:
                    file.write(problem_line(row.problem, str(row.value).encode()) + b"\n")
                else:
                    file.write(json.dumps(row.value).encode() + b"\n")
        np.save(Path(directory) / f"{at}.npy", np.array([int(row.line.rpartition(":")[2]) for row in group]))
        files.append(RowFile(out, name, converted=True, named=named, lines=Path(directory) / f"{at}.npy"))
    return files, notes


def read_head(path: Path) -> bytes:
    from halfbyte.input_files import open_file
    with open_file(path) as file:
        return file.read(100).removeprefix(b"\xef\xbb\xbf").lstrip()
