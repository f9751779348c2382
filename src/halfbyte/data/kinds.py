"""What a data file is, by its first bytes and its suffix, and opening it decompressed.

Content decides where it can: a compressed file, Parquet and Arrow begin with bytes of their own,
and JSON that begins with ``[`` is an array. Only CSV is known by its suffix alone.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import BinaryIO, Literal, NamedTuple, cast

from halfbyte.data.tables import ARROW_FILE, FEATHER_1, PARQUET
from halfbyte.errors import DataError
from halfbyte.foreign_text import shorten
from halfbyte.input_files import open_file

Kind = Literal["lines", "array", "object", "csv", "tsv", "parquet", "arrow"]

_COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
_COMPRESSED |= {".gzip": "gzip", ".zstd": "zstd"}
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bz2",
    b"\xfd7zXZ\x00": "xz",
}
_JSON = (".jsonl", ".ndjson", ".json")
_TABLES: dict[str, Kind] = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv"}
_TABLES |= {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow"}
_OTHERS = (".txt", ".xlsx", ".xls", ".zip", ".tar", ".tgz", ".7z", ".pkl", ".pickle", ".xml")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_CHUNK = 1 << 20

READABLE = (*_JSON, *_TABLES)
"""Suffixes of data files, in the order in which one is preferred if several have the same name."""


class Name(NamedTuple):
    """The parts of a file's name: ``train``, ``.jsonl``, ``.gz``."""

    stem: str
    suffix: str
    compressed: str

    @classmethod
    def of(cls, path: PurePath) -> Name:
        """Take a name apart; suffixes in lower case."""
        compressed = path.suffix.lower() if path.suffix.lower() in _COMPRESSED else ""
        inner = PurePath(path.stem) if compressed else PurePath(path.name)
        return cls(inner.stem, inner.suffix.lower(), compressed)

    @property
    def is_readable(self) -> bool:
        """Whether it is that of a data file."""
        return self.suffix in READABLE


def is_file_name(name: str) -> bool:
    """Whether a name has the suffix of a file, so that it is no hub id."""
    parts = Name.of(PurePath(name))
    return parts.is_readable or parts.suffix in _OTHERS or bool(parts.compressed)


@dataclass(frozen=True)
class DataFile:
    """A file whose kind is known.

    Attributes:
        path: The file.
        name: What messages call it.
        kind: What it holds.
        compression: How it is compressed, or None.
        size: Its size in bytes.
    """

    path: Path
    name: str
    kind: Kind
    compression: str | None
    size: int

    @classmethod
    def of(cls, path: Path, name: str) -> DataFile:
        """Find out what a file is.

        Raises:
            DataError: It is of a kind that is not read.
            OSError: It cannot be read.
        """
        parts = Name.of(path)
        if parts.suffix in _OTHERS:
            raise DataError(
                f"{name} is a {parts.suffix} file: expected JSONL, JSON, CSV, TSV, Parquet or "
                "Arrow. Convert it first, e.g. with pandas' DataFrame.to_parquet."
            )
        with open_file(path) as file:
            beginning = file.read(8)
            size = file.seek(0, io.SEEK_END)
        compression = next(
            (how for magic, how in _MAGIC.items() if beginning.startswith(magic)), None
        )
        if compression is None and parts.compressed and size:
            raise DataError(f"{name} is not compressed as its name says ({parts.compressed}).")
        kind: Kind | None = _TABLES.get(parts.suffix)
        if compression is None:
            if beginning.startswith(PARQUET):
                kind = "parquet"
            elif beginning.startswith(ARROW_FILE):
                kind = "arrow"
            elif beginning.startswith(FEATHER_1) and kind == "arrow":
                raise DataError(f"{name} is in the first version of Feather: save it as Parquet.")
        elif kind in ("parquet", "arrow"):
            raise DataError(f"{name} is a compressed {parts.suffix} file: decompress it first.")
        file_ = cls(path, name, kind or "lines", compression, size)
        if kind in ("parquet", "arrow"):
            return file_
        with file_.open() as stream:
            start = stream.peek(1)
            if start.startswith(_UTF16):
                raise DataError(f"{name} is in UTF-16: expected UTF-8. Save it as UTF-8.")
        if kind is None:
            start = start.removeprefix(b"\xef\xbb\xbf").lstrip()
            array = start.startswith(b"[")
            kind = "array" if array else "object" if parts.suffix == ".json" else "lines"
        return cls(path, name, kind, compression, size)

    @property
    def is_table(self) -> bool:
        """Whether it has columns, whose cells may be JSON."""
        return self.kind in ("csv", "tsv", "parquet", "arrow")

    @contextmanager
    def open(self) -> Iterator[Stream]:
        """Open its text.

        Raises:
            DataError: Inside the block, the compressed data turns out to be damaged.
            OSError: It cannot be read.
        """
        with open_file(self.path) as raw:
            try:
                with Stream(_decompressed(raw, self.compression), raw) as stream:
                    yield stream
            except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
                raise self._damaged(error) from error
            except OSError as error:
                if error.errno is not None:
                    raise
                raise self._damaged(error) from error  # of bz2 and zstd

    def _damaged(self, error: Exception) -> DataError:
        why = shorten(str(error)).rstrip(".")
        return DataError(f"{self.name} is damaged or incomplete ({why}): get it again.")


class Stream(io.BufferedReader):
    """A stream of bytes, and how much of its file has been read."""

    def __init__(self, stream: io.RawIOBase, file: BinaryIO) -> None:
        super().__init__(stream, _CHUNK)
        self._file = file

    @property
    def position(self) -> int:
        """Bytes of the file that have been read, compressed ones if it is compressed."""
        return self._file.tell()


def _decompressed(file: BinaryIO, compression: str | None) -> io.RawIOBase:
    match compression:
        case "gzip":
            return cast(io.RawIOBase, gzip.GzipFile(fileobj=file))
        case "bz2":
            return cast(io.RawIOBase, bz2.BZ2File(file))
        case "xz":
            return cast(io.RawIOBase, lzma.LZMAFile(file))
        case "zstd":
            import pyarrow

            source = pyarrow.PythonFile(file, "r")
            return cast(io.RawIOBase, pyarrow.CompressedInputStream(source, "zstd"))
    return cast(io.RawIOBase, file)
