"""Encoded rows in a file that grows: chunks of examples, found by row.

A run encodes rows in the order in which it needs them, and appends each chunk to ``chunks.bin`` of
the cache's entry. A chunk starts with a header, checked by a checksum; each example has a checksum
of its own, so a row is read without the rest of its chunk. ``where.bin`` has for each row of the
data where its chunk starts. It is not trusted: a chunk says itself which rows it has, and whatever
does not agree (a file cut off, a block never written) counts as not encoded.

One process at a time appends, others read what is there. Layout of a chunk, little endian, each
part padded to 8 bytes: `_HEADER`; the rows, int64; the hash of what each says, uint64; a table with
`_COLUMNS`, int32; what is said about the rows, JSON; the tokens, int32; the masks, one byte for
each token.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.dataset_report import Notes
from halfbyte.data.encoding import EncodedChunk
from halfbyte.data.templates import Example

_MAGIC = b"hbchunk2"
_HEADER = struct.Struct("<8sQQQQQQ")  # magic; bytes of the chunk; rows, examples, tokens; JSON; CRC
_COLUMNS = ("row", "length", "prompt_length", "messages", "checksum")
_HEAD_READ = 1 << 16  # bytes that are read of a chunk at first: mostly all but tokens and masks
_MOST_JSON = 1 << 30
_HEADS = 64  # chunks whose heads are held
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW


def _padded(size: int) -> int:
    return -(-size // 8) * 8


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@dataclass(frozen=True, eq=False)
class _Head:
    """A chunk without tokens and masks.

    Attributes:
        rows: int64 [rows], the rows of the data that it has.
        content: uint64 [rows], the hash of what each says.
        table: int32 [examples, 5], the columns `_COLUMNS`; ``row`` is the position in the chunk.
        starts: int64 [examples], where in the tokens, and the masks, an example starts.
        tokens_at: Where in the file the tokens start.
        mask_at: Where in the file the masks start.
        said: What is said about the rows.
        stop: Where in the file the chunk ends.
    """

    rows: NDArray[np.int64]
    content: NDArray[np.uint64]
    table: NDArray[np.int32]
    starts: NDArray[np.int64]
    tokens_at: int
    mask_at: int
    said: bytes
    stop: int

    @property
    def lengths(self) -> NDArray[np.int32]:
        return self.table[:, 1]


class StoredRow(NamedTuple):
    """A row: its examples, none if it was rejected, and the hash of what it says."""

    examples: list[Example]
    content: int


class ExampleStore:
    """The encoded rows of an entry of the cache.

    Attributes:
        appends: Whether this process may append.
        size: Bytes of the chunks.
    """

    def __init__(self, directory: Path, rows: int) -> None:
        """Open the store of a data set with that many rows, or create it.

        Raises:
            OSError: The files cannot be opened.
        """
        self._count = rows
        self._lock = os.open(directory / "appending.lock", _FLAGS, 0o666)
        self.appends = True
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another process has it, or there are no locks
            self.appends = False
        chunks, where = directory / "chunks.bin", directory / "where.bin"
        if self.appends and _size(where) != 8 * rows:
            # Not emptied, since another process may have it in its memory.
            chunks.unlink(missing_ok=True)
            where.unlink(missing_ok=True)
        self._chunks = os.open(chunks, _FLAGS, 0o666)
        self._where = os.open(where, _FLAGS, 0o666)
        if self.appends:
            os.ftruncate(self._where, 8 * rows)
        self.size = _padded(os.fstat(self._chunks).st_size)
        self._heads: dict[int, _Head] = {}
        self._map: mmap.mmap | None = None

    def close(self) -> None:
        """Close the files; arrays that were mapped stay."""
        for descriptor in (self._chunks, self._where, self._lock):
            os.close(descriptor)

    def stop_appending(self) -> None:
        """Append nothing from now on."""
        self.appends = False

    def append(self, rows: NDArray[np.int64], chunk: EncodedChunk) -> None:
        """Add a chunk.

        Args:
            rows: int64, the row of the data at each position of the chunk.
            chunk: Its examples, and what is said about its rows.

        Raises:
            OSError: There is no space.
        """
        parts = _as_bytes(rows, chunk)
        start = self.size
        os.pwrite(self._chunks, b"".join(parts), start)
        self.size = start + sum(map(len, parts))
        order = np.sort(rows)
        runs = np.flatnonzero(np.diff(order, prepend=order[:1] - 2) != 1).tolist()
        for first, last in zip(runs, [*runs[1:], len(order)], strict=True):
            at = np.full(last - first, start + 1, dtype="<i8")
            os.pwrite(self._where, at.tobytes(), 8 * int(order[first]))

    def has(self, rows: NDArray[np.int64]) -> bool:
        """Whether there is a chunk that has exactly these rows, in this order."""
        return self._of(rows) is not None

    def chunk(self, rows: NDArray[np.int64], lines: list[str]) -> EncodedChunk | None:
        """Return the chunk that has exactly these rows, in this order; None if there is none.

        Args:
            rows: Rows of the data.
            lines: Their lines.
        """
        head = self._of(rows)
        if head is None:
            return None
        count = int(head.lengths.sum())
        tokens = np.frombuffer(os.pread(self._chunks, 4 * count, head.tokens_at), "<i4")
        mask = np.frombuffer(os.pread(self._chunks, count, head.mask_at), np.bool_)
        return self._checked(head, tokens, mask, lines)

    def mapped_chunk(self, rows: NDArray[np.int64], lines: list[str]) -> EncodedChunk | None:
        """As `chunk`, but tokens and masks stay in the file, mapped into memory."""
        head = self._of(rows)
        if head is None:
            return None
        if self._map is None or len(self._map) < head.stop:
            self._map = mmap.mmap(self._chunks, 0, prot=mmap.PROT_READ)
        if len(self._map) < head.stop:
            return None
        count = int(head.lengths.sum())
        tokens = np.frombuffer(self._map, "<i4", count, head.tokens_at)
        mask = np.frombuffer(self._map, np.bool_, count, head.mask_at)
        return self._checked(head, tokens, mask, lines)

    def row(self, row: int) -> StoredRow | None:
        """Return a row; None if it is not encoded."""
        head = self._head_of(row)
        if head is None:
            return None
        found = np.flatnonzero(head.rows == row)
        if not len(found):
            return None
        examples = []
        for at in np.flatnonzero(head.table[:, 0] == found[0]).tolist():
            _, length, prompt, _, checksum = head.table[at].tolist()
            start = int(head.starts[at])
            tokens = os.pread(self._chunks, 4 * length, head.tokens_at + 4 * start)
            mask = os.pread(self._chunks, length, head.mask_at + start)
            if len(mask) != length or _checksum(tokens, mask) != checksum:
                return None
            arrays = np.frombuffer(tokens, "<i4"), np.frombuffer(mask, np.bool_)
            examples.append(Example(*arrays, prompt))
        return StoredRow(examples, int(head.content[found[0]]))

    def _checked(
        self, head: _Head, tokens: NDArray[np.int32], mask: NDArray[np.bool_], lines: list[str]
    ) -> EncodedChunk | None:
        if len(mask) != head.lengths.sum():
            return None
        checks = zip(head.starts.tolist(), head.table[:, [1, 4]].tolist(), strict=True)
        for start, (length, checksum) in checks:
            part = slice(start, start + length)
            if _checksum(tokens[part].data, mask[part].data) != checksum:
                return None
        try:
            said = json.loads(head.said)
            notes = Notes()
            notes.texts, notes.tokens = (_keys(kept) for kept in said.pop("notes"))
            for name in ("unread", "rejected"):
                said[name] = [tuple(one) for one in said[name]]
            return EncodedChunk(
                tokens=tokens,
                mask=mask,
                lengths=head.lengths,
                prompt_lengths=head.table[:, 2],
                row=head.table[:, 0].astype(np.int64),
                messages=head.table[:, 3],
                lines=lines,
                notes=notes,
                content=head.content,
                **said,
            )
        except (ValueError, TypeError, LookupError, AttributeError):
            return None

    def _of(self, rows: NDArray[np.int64]) -> _Head | None:
        # A row that is repeated, as with weights, is known in its last chunk only.
        heads = (self._head_of(row) for row in rows.tolist())
        for head in heads:
            if head is None:  # then so is the whole chunk, unless the file is damaged
                return None
            if np.array_equal(head.rows, rows):
                return head
        return None

    def _head_of(self, row: int) -> _Head | None:
        if not 0 <= row < self._count:
            return None
        raw = os.pread(self._where, 8, 8 * row)
        start = int.from_bytes(raw, "little") - 1
        if len(raw) < 8 or start < 0:
            return None
        head = self._heads.get(start) or self._read_head(start)
        if head is not None:
            self._heads[start] = head
            if len(self._heads) > _HEADS:
                del self._heads[next(iter(self._heads))]
        return head

    def _read_head(self, start: int) -> _Head | None:
        """Read a chunk without tokens and masks; None if there is not a whole one."""
        raw = os.pread(self._chunks, _HEAD_READ, start) if 0 <= start < 2**62 else b""
        if len(raw) < _HEADER.size:
            return None
        magic, size, rows, examples, tokens, said, checksum = _HEADER.unpack_from(raw)
        if magic != _MAGIC or max(rows, examples, tokens) > 2**40 or said > _MOST_JSON:
            return None
        table_at = _HEADER.size + 16 * rows
        said_at = table_at + _padded(4 * len(_COLUMNS) * examples)
        tokens_at = said_at + _padded(said)
        mask_at = tokens_at + _padded(4 * tokens)
        if size != mask_at + _padded(tokens) or start + size > os.fstat(self._chunks).st_size:
            return None
        if len(raw) < tokens_at:
            raw += os.pread(self._chunks, tokens_at - len(raw), start + len(raw))
        if zlib.crc32(raw[_HEADER.size : tokens_at]) != checksum:
            return None
        table = np.frombuffer(raw, "<i4", len(_COLUMNS) * examples, table_at)
        table = table.reshape(examples, len(_COLUMNS))
        starts = np.cumsum(table[:, 1], dtype=np.int64) - table[:, 1]
        if tokens != table[:, 1].sum(dtype=np.int64):
            return None
        return _Head(
            rows=np.frombuffer(raw, "<i8", rows, _HEADER.size),
            content=np.frombuffer(raw, "<u8", rows, _HEADER.size + 8 * rows),
            table=table,
            starts=starts,
            tokens_at=start + tokens_at,
            mask_at=start + mask_at,
            said=raw[said_at : said_at + said],
            stop=start + size,
        )


def _keys(kept: dict[str, list[str]]) -> dict[str, dict[str, None]]:
    return {note: dict.fromkeys(rows) for note, rows in kept.items()}


def _checksum(tokens: Any, mask: Any) -> int:
    """Return a checksum of an example, as an int32."""
    found = zlib.crc32(mask, zlib.crc32(tokens))
    return found - (1 << 32) if found >= 1 << 31 else found


def _as_bytes(rows: NDArray[np.int64], chunk: EncodedChunk) -> list[bytes]:
    """Return the parts of a chunk, each padded."""
    tokens, mask = chunk.tokens.astype("<i4", copy=False), chunk.mask
    table = np.zeros((len(chunk.lengths), len(_COLUMNS)), dtype="<i4")
    table[:, 0], table[:, 1], table[:, 2] = chunk.row, chunk.lengths, chunk.prompt_lengths
    table[:, 3] = chunk.messages
    start = 0
    for at, length in enumerate(chunk.lengths.tolist()):
        stop = start + length
        table[at, 4] = _checksum(tokens[start:stop].data, mask[start:stop].data)
        start = stop
    said = {
        "unread": chunk.unread,
        "rejected": chunk.rejected,
        "formats": chunk.formats,
        "unused": chunk.unused,
        "truncated": chunk.truncated,
        "split": chunk.split,
        "longest": chunk.longest,
        "notes": [
            {note: list(rows) for note, rows in kept.items()}
            for kept in (chunk.notes.texts, chunk.notes.tokens)
        ],
        "exceeded": chunk.exceeded,
    }
    written = json.dumps(said).encode()
    numbers, content = rows.astype("<i8", copy=False), chunk.content.astype("<u8", copy=False)
    head = [numbers.tobytes(), content.tobytes(), table.tobytes(), written]
    body = [tokens.tobytes(), mask.tobytes()]
    padded = [part + bytes(-len(part) % 8) for part in head + body]
    checksum = 0
    for part in padded[: len(head)]:
        checksum = zlib.crc32(part, checksum)
    counts = len(rows), len(chunk.lengths), len(tokens), len(written)
    header = _HEADER.pack(_MAGIC, _HEADER.size + sum(map(len, padded)), *counts, checksum)
    return [header, *padded]
