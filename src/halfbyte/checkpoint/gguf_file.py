"""GGUF files: the header is checked, then one tensor is decoded at a time.

A file is ``"GGUF" | version u32 | tensors u64 | keys u64 | key-value pairs | tensor table | padding
| tensor bytes``. ``gguf_blocks`` decodes the blocks. The header is read by our own code:
``gguf.GGUFReader`` wraps every element of every array in numpy objects (3 s and 130 MB for a
vocabulary of 49 thousand), maps the file, and does not check the header against the file's size.
"""

import math
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from halfbyte.checkpoint.gguf_blocks import decode
from halfbyte.checkpoint.reading import read_into
from halfbyte.errors import CheckpointError
from halfbyte.input_files import open_file

TORCH_DTYPES = {np.float32: torch.float32, np.float16: torch.float16, np.uint16: torch.bfloat16}
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))  # as struct
U32, F32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9
_MAX_STRING = 2**26  # bytes; a chat template has 2**14
_MAX_EXTENT = 2**50
_AHEAD = 2**20  # bytes of the header read at once


class Key(NamedTuple):
    """One key of the header: its type, its value (an array's length), its bytes in the file."""

    kind: int
    value: Any
    start: int
    end: int


class Stored(NamedTuple):
    """One tensor of the file; its shape as in PyTorch, slowest dimension first."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    nbytes: int


class GGUFFile:
    """A GGUF file whose header has been read and checked.

    Attributes:
        path: The file.
        size: Its size in bytes.
        architecture: llama.cpp's name of the architecture.
        keys: The header's key-value pairs.
        tensors: Its tensors by name, in the order of the table.
        data_start: Offset of the tensor bytes.

    Raises:
        CheckpointError: If the file cannot be read, or a claim of its header does not hold.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_file(path) as file:
                self.size = os.fstat(file.fileno()).st_size
                self._parse(_Header(path, file, self.size))
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error

    def _parse(self, header: "_Header") -> None:
        if header.take(4) != b"GGUF":
            raise CheckpointError(f"{self.path} is not a GGUF file: it does not begin with GGUF")
        version = header.number("I")
        if version not in (2, 3):
            raise header.damaged(f"its version is {version}; 2 and 3 are supported")
        tensor_count, key_count = header.count(24), header.count(13)
        self.keys: dict[str, Key] = {}
        for _ in range(key_count):
            start = header.position
            name, kind = header.string(), header.number("I")
            if name in self.keys:
                raise header.damaged(f"the key {name} occurs twice")
            self.keys[name] = Key(kind, header.value(kind), start, header.position)
        table = [self._table_row(header) for _ in range(tensor_count)]
        self.architecture = self._key("general.architecture", STRING, "")
        alignment = self._key("general.alignment", U32, 32)
        if alignment not in (2**i for i in range(17)):
            raise header.damaged(f"its alignment is {alignment}, no power of two up to 65536")
        self.data_start = -(-header.position // alignment) * alignment
        self.tensors: dict[str, Stored] = {}
        end = self.data_start
        for row in sorted(table, key=lambda row: row.start):
            tensor = row._replace(start=self.data_start + row.start)
            if tensor.start < end or tensor.start + tensor.nbytes > self.size:
                raise header.damaged(
                    f"{tensor.name} should take {tensor.nbytes} bytes from {tensor.start} on; "
                    f"the tensor before ends at {end}, the file at {self.size}"
                )
            end = tensor.start + tensor.nbytes
            if self.tensors.setdefault(tensor.name, tensor) is not tensor:
                raise header.damaged(f"{tensor.name} occurs twice")

    def _key(self, name: str, kind: int, default: Any) -> Any:
        key = self.keys.get(name)
        if key is not None and key.kind != kind:
            raise CheckpointError(f"{self.path}: the key {name} is of type {key.kind}, not {kind}")
        return default if key is None else key.value

    def architecture_key(self, name: str, kind: int) -> Any:
        """Return the value of a key of the architecture, or None if the file has none.

        Args:
            name: Its name without the architecture's, such as ``block_count``.
            kind: Its type.

        Raises:
            CheckpointError: If it is of another type.
        """
        return self._key(f"{self.architecture}.{name}", kind, None)

    def _table_row(self, header: "_Header") -> Stored:
        name = header.string()
        dimensions = header.number("I")
        if dimensions > 8:
            raise header.damaged(f"{name} has {dimensions} dimensions")
        shape = tuple(reversed([header.number("Q") for _ in range(dimensions)]))
        code, offset = header.number("I"), header.number("Q")
        try:
            kind = GGMLQuantizationType(code)
        except ValueError:
            raise header.damaged(f"{name} is of type {code}, which gguf does not know") from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        extent = math.prod(max(n, 1) for n in shape)
        if extent > _MAX_EXTENT or (shape[-1] if shape else 1) % block:
            raise header.damaged(f"{name} is {kind.name} and has the shape {list(shape)}")
        return Stored(name, kind, shape, offset, math.prod(shape) // block * block_bytes)

    def array(self, name: str) -> tuple[int, list[Any]]:
        """Return the type of the values of an array, and the values.

        Raises:
            CheckpointError: If it is no array, its texts are not UTF-8, or the file ends early.
        """
        key = self.keys[name]
        if key.kind != ARRAY:
            raise CheckpointError(f"{self.path}: the key {name} is of type {key.kind}, not {ARRAY}")
        raw = bytearray(key.end - key.start)
        read_into(self.path, key.start, memoryview(raw))
        at = 8 + len(name.encode()) + 4
        kind, count = struct.unpack_from("<IQ", raw, at)
        at += 12
        if kind in _SCALARS:
            return kind, list(struct.unpack_from(f"<{count}{_SCALARS[kind]}", raw, at))
        length_at, found = struct.Struct("<Q").unpack_from, []
        try:
            for _ in range(count):
                start = at + 8
                at = start + length_at(raw, at)[0]
                found.append(raw[start:at].decode())
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self.path}: the key {name} contains text that is not UTF-8: {error}"
            ) from error
        return kind, found

    def raw(self, tensor: Stored) -> np.ndarray[Any, Any]:
        """Return the bytes of one tensor: uint8, the last dimension in bytes of its blocks."""
        out = np.empty(tensor.nbytes, np.uint8)
        read_into(self.path, tensor.start, out.data)
        rows = tensor.shape[:-1]
        return out.reshape(*rows, tensor.nbytes // max(1, math.prod(rows)))

    def tensor(self, tensor: Stored) -> torch.Tensor:
        """Return one tensor, decoded: float32, float16 or bfloat16."""
        value = torch.from_numpy(np.ascontiguousarray(self.read(tensor)))
        return value.view(torch.bfloat16) if value.dtype == torch.uint16 else value

    def read(self, tensor: Stored) -> np.ndarray[Any, Any]:
        """Return one tensor, decoded: float32, or the type of `held_as`."""
        held = np.dtype(held_as(tensor))
        block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
        raw = self.raw(tensor).reshape(-1)
        if block == 1 and held.itemsize == block_bytes:
            return raw.view(held).reshape(tensor.shape)
        return decode(torch.from_numpy(raw), tensor.kind).numpy().reshape(tensor.shape)


def held_as(tensor: Stored) -> type[np.generic]:
    """Return the numpy type a tensor is read as; bfloat16, which numpy lacks, is read as uint16.

    llama.cpp's rearrangements of matrices only permute, so 16-bit values stay as they are. Tensors
    used in arithmetic (norms; Mamba's A) are decoded to float32, as transformers does for all.
    """
    if len(tensor.shape) < 2 or tensor.name.endswith("ssm_a"):
        return np.float32
    kinds = {GGMLQuantizationType.F16: np.float16, GGMLQuantizationType.BF16: np.uint16}
    return kinds.get(tensor.kind, np.float32)


class _Header:
    """A position in the header; reading past the end of the file is an error."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.size = path, size
        self.position = 0
        # The buffered part of the file from ``_start`` on: 100 thousand small reads take 0.4 s.
        self._file, self._buffer, self._start = file, b"", 0

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is not a whole GGUF file: {what}; download or copy it again"
        )

    def _check(self, length: int) -> None:
        if length > self.size - self.position:
            raise self.damaged(
                f"its header continues for {length} bytes after {self.position}, the file has "
                f"{self.size}"
            )

    def _at(self, length: int) -> int:
        """Return the offset in the buffer of the next ``length`` bytes, after reading them."""
        self._check(length)
        at = self.position - self._start
        if at + length > len(self._buffer):
            self._file.seek(self.position)
            self._start, at = self.position, 0
            self._buffer = self._file.read(max(length, _AHEAD))
            if len(self._buffer) < length:
                end = self._start + len(self._buffer)
                raise self.damaged(f"it was cut at byte {end} while we read it")
        return at

    def take(self, length: int) -> bytes:
        at = self._at(length)
        self.position += length
        return self._buffer[at : at + length]

    def skip(self, length: int) -> None:
        self._check(length)
        self.position += length

    def skip_texts(self, count: int) -> None:
        """Skip ``count`` length-prefixed texts."""
        length_at = struct.Struct("<Q").unpack_from
        while count:
            start = at = self._at(8)
            last = len(self._buffer) - 8
            while count and at <= last:
                at += 8 + length_at(self._buffer, at)[0]
                count -= 1
            self.skip(at - start)

    def number(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        at = self._at(size)
        self.position += size
        return struct.unpack_from("<" + code, self._buffer, at)[0]

    def count(self, least: int) -> int:
        """Read the number of following items, of at least ``least`` bytes each."""
        count = int(self.number("Q"))
        if count * least > self.size - self.position:
            raise self.damaged(f"it should have {count} entries, the file has {self.size} bytes")
        return count

    def string(self) -> str:
        length = self.number("Q")
        if length > _MAX_STRING:
            raise self.damaged(f"its header has a text of {length} bytes")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise self.damaged("its header contains text that is not UTF-8") from None

    def value(self, kind: int) -> Any:
        """Read a value; for an array, return its length."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise self.damaged(f"its header holds a value of type {kind}")
        kind = self.number("I")
        if kind in _SCALARS:
            width = struct.calcsize("<" + _SCALARS[kind])
            count = self.count(width)
            self.skip(count * width)
        elif kind == STRING:
            count = self.count(8)
            self.skip_texts(count)
        else:
            raise self.damaged(f"its header holds an array of type {kind}")
        return count
