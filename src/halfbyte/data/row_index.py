"""Where the rows of a JSONL file are: byte offsets, found without parsing a line.

One pass over the file, in blocks that several threads read, gives the offset of every row (a line
that is not blank) and a digest of the content. Both are kept in the user's cache under the file's
path, size, time of change and inode, so 20 GB are read once, not at every start. Rows are then read
by offset, in any order; no row is held in memory.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.row_files import LONGEST_ROW
from halfbyte.errors import DataError, OutputError
from halfbyte.input_files import open_file, read_file
from halfbyte.user_cache import cached_directory

_BLOCK = 4 << 20  # bytes that a thread looks at together
_PIECE = 1 << 16  # bytes of a checksum; _BLOCK is a multiple
_THREADS = min(4, os.cpu_count() or 1)
_KEPT_FROM = 32 << 20  # bytes of a file whose index is kept: below, a pass takes some 20 ms
_BOM = b"\xef\xbb\xbf"
_SPACE = np.frombuffer(b" \t\n\r\x0b\x0c", dtype=np.uint8)
_FORMAT = 1  # incremented when the files of an index change
_INT64 = np.dtype("<i8")
_DIGEST = 20  # bytes
_LIMIT = 4 * 10**9  # bytes of all indices in the cache: those of some 500 million rows
logger = logging.getLogger("halfbyte")
_OFFSETS, _LINES, _CARD = "offsets.bin", "lines.bin", "index.json"


class FileState(NamedTuple):
    """What changes when a file is written or replaced."""

    path: str
    size: int
    mtime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        """Return the state of a file; raises ``OSError``."""
        found = os.stat(path)
        place = os.path.realpath(path)
        return cls(place, found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev)


@dataclass(frozen=True, eq=False)
class RowIndex:
    """The rows of a file.

    Attributes:
        path: The file.
        state: Its state when it was read.
        digest: Of its content.
        offsets: int64 [rows + 1], where each row starts, in bytes; at the end the file's size.
            In the cache it is mapped into memory.
        lines: int64 [rows], the number of each row's line, from 1; None if no line is blank.
    """

    path: Path
    state: FileState
    digest: str
    offsets: NDArray[np.int64]
    lines: NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def line_numbers(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the numbers of the lines of rows, from 1."""
        return rows + 1 if self.lines is None else self.lines[rows]

    def require_unchanged(self) -> None:
        """Check that the file is the one that was indexed.

        Raises:
            DataError: It has been changed or removed since.
        """
        try:
            same = FileState.of(self.path) == self.state
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror or error}.") from error
        if not same:
            raise DataError(
                f"{self.path} has changed since its rows were counted: start again, and leave the "
                "file as it is while it is read."
            )

    def spans(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return int64 [len(rows), 2]: where the lines of rows start and stop, in bytes.

        Blank lines that follow a row are within its span.
        """
        return np.stack([self.offsets[rows], self.offsets[rows + 1]], axis=1)


def read_span(file: BinaryIO, start: int, stop: int) -> bytes:
    """Return the row of a span of `RowIndex.spans`, with its line feed.

    Of a row longer than `LONGEST_ROW`, one byte more than that.

    Raises:
        OSError: The file cannot be read, or is shorter than the span says.
    """
    most = min(stop - start, LONGEST_ROW + 1)
    raw = os.pread(file.fileno(), most, start)
    if len(raw) < most:
        raise OSError(errno.EIO, "it has become shorter since it was indexed", file.name)
    return raw[: raw.find(b"\n") + 1 or None]


def row_index(
    path: Path, *, keep: bool = True, progress: Callable[[int, int], None] | None = None
) -> RowIndex:
    """Return the index of a JSONL file, from the cache if it is there.

    Args:
        path: The file: UTF-8, with or without a byte order mark.
        keep: Whether the cache may be used, for large files.
        progress: Called with (bytes done, total bytes).

    Raises:
        OSError: The file cannot be read.
        DataError: It changes while it is read.
    """
    state = FileState.of(path)
    if not keep or state.size < _KEPT_FROM:
        starts, lines, digest = _scan(path, state.size, progress)
        index = RowIndex(path, state, digest, np.append(starts, state.size), lines)
    else:
        key = json.dumps({"format": _FORMAT, **state._asdict()})
        try:
            kept = cached_directory(
                "rows",
                hashlib.sha256(key.encode()).hexdigest()[:32],
                lambda directory: _write(directory, path, state, progress),
                limit=_LIMIT,
                is_whole=lambda directory: _load(directory, path, state) is not None,
            )
        except OutputError as error:
            logger.warning("where the rows are is not kept: %s", error)
            return row_index(path, keep=False, progress=progress)
        found = _load(kept.path, path, state)
        if found is None:
            raise OSError(errno.EIO, "its index was changed while it was read", str(kept.path))
        index = found
    index.require_unchanged()
    return index


def _write(
    directory: Path, path: Path, state: FileState, progress: Callable[[int, int], None] | None
) -> None:
    starts, lines, digest = _scan(path, state.size, progress)
    np.append(starts, state.size).astype(_INT64, copy=False).tofile(directory / _OFFSETS)
    if lines is not None:
        lines.astype(_INT64, copy=False).tofile(directory / _LINES)
    card = {"rows": len(starts), "digest": digest, "blank": lines is not None}
    (directory / _CARD).write_text(json.dumps(card), encoding="utf-8")


def _load(directory: Path, path: Path, state: FileState) -> RowIndex | None:
    """Return an index of the cache; None if it is damaged."""
    try:
        card = json.loads(read_file(directory / _CARD, 10_000))
        rows, digest = int(card["rows"]), str(card["digest"])
        offsets = _mapped(directory / _OFFSETS, rows + 1)
        lines = _mapped(directory / _LINES, rows) if card["blank"] else None
        whole = int(offsets[-1]) == state.size and len(digest) == 2 * _DIGEST
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return RowIndex(path, state, digest, offsets, lines) if whole else None


def _mapped(path: Path, count: int) -> NDArray[np.int64]:
    """Map a file into memory.

    Raises:
        OSError: It cannot be read.
        ValueError: It does not have that many elements.
    """
    if path.stat().st_size != count * _INT64.itemsize:
        raise ValueError(f"{path} has another size")
    return np.memmap(path, _INT64, "r", shape=(count,)) if count else np.empty(0, _INT64)


class _Block(NamedTuple):
    """What a block has: the starts of its rows, their ordinals among its lines, and a digest."""

    starts: NDArray[np.int64]
    ordinals: NDArray[np.int64] | None  # None: each line is a row
    lines: int
    digest: bytes  # checksums of its pieces


def _scan(
    path: Path, size: int, progress: Callable[[int, int], None] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64] | None, str]:
    """Return the starts of the rows, the numbers of their lines if some are blank, and a digest."""
    digest = hashlib.blake2b(str(size).encode(), digest_size=_DIGEST)
    blocks: list[_Block] = []
    with open_file(path) as file, ThreadPoolExecutor(_THREADS, "index-rows") as threads:
        descriptor = file.fileno()
        jobs = (
            threads.submit(_block, descriptor, start, min(start + _BLOCK, size))
            for start in range(0, size, _BLOCK)
        )
        waiting = list(islice(jobs, 2 * _THREADS))
        with closing(jobs):
            while waiting:
                block = waiting.pop(0).result()
                waiting.extend(islice(jobs, 1))
                digest.update(block.digest)
                blocks.append(block)
                if progress is not None:
                    progress(min(len(blocks) * _BLOCK, size), size)
    none = np.empty(0, dtype=np.int64)
    starts = np.concatenate([none, *(block.starts for block in blocks)])
    lines = None
    if any(block.ordinals is not None for block in blocks):
        before = np.cumsum([0, *(block.lines for block in blocks)])
        lines = np.concatenate([none, *map(_numbers, blocks, before.tolist())])
    return starts, lines, digest.hexdigest()


def _numbers(block: _Block, before: int) -> NDArray[np.int64]:
    ordinals = np.arange(len(block.starts)) if block.ordinals is None else block.ordinals
    return ordinals + (before + 1)


_threads = threading.local()


def _buffer() -> NDArray[np.uint8]:
    """Return the memory into which this thread reads."""
    if not hasattr(_threads, "buffer"):
        _threads.buffer = np.empty(_BLOCK + 1, dtype=np.uint8)
    return cast(NDArray[np.uint8], _threads.buffer)


def _block(descriptor: int, start: int, stop: int) -> _Block:
    """Look at the lines that start in a block; the line before it ends at a line feed there."""
    before = min(start, 1)
    raw = _buffer()[: stop - start + before]
    view, done = raw.data, 0
    while done < len(raw):
        count = os.preadv(descriptor, [view[done:]], start - before + done)
        if not count:
            raise DataError("a file of the data has become shorter while it was read.")
        done += count
    # Five times as fast as a cryptographic hash, which would take half of the time of a pass.
    pieces = range(before, len(raw), _PIECE)
    checksums = [zlib.crc32(view[piece : piece + _PIECE]) for piece in pieces]
    digest = np.array(checksums, dtype="<u4").tobytes()
    first = np.flatnonzero(raw[:-1] == 10) + 1
    if not start:
        mark = len(_BOM) if bytes(raw[:3]) == _BOM else 0
        first = np.concatenate([np.array([mark] if mark < len(raw) else [], np.int64), first])
    odd = np.flatnonzero(np.isin(raw[first], _SPACE))
    blank = odd[_are_blank(descriptor, raw, first[odd], start - before)]
    if not len(blank):
        return _Block(first + (start - before), None, len(first), digest)
    rows = np.ones(len(first), dtype=np.bool_)
    rows[blank] = False
    return _Block(first[rows] + (start - before), np.flatnonzero(rows), len(first), digest)


def _are_blank(
    descriptor: int, raw: NDArray[np.uint8], starts: NDArray[np.int64], base: int
) -> NDArray[np.bool_]:
    """Return which of the lines that start with white space have nothing else."""
    blank: NDArray[np.bool_] = raw[starts] == 10
    for at in np.flatnonzero(~blank).tolist():
        blank[at] = _is_blank(descriptor, base + int(starts[at]))
    return blank


def _is_blank(descriptor: int, start: int) -> bool:
    while part := os.pread(descriptor, 256, start):
        line, ended, _ = part.partition(b"\n")
        if line.strip():
            return False
        if ended:
            return True
        start += len(part)
    return True
