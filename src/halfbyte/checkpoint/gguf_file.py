"""GGUF files: the header checked, then one tensor decoded at a time.

A file is ``"GGUF" | version u32 | tensors u64 | keys u64 | key-value pairs | tensor table | padding
| tensor bytes``. How blocks decode is the ``gguf`` package's to know. The header we read ourselves:
``gguf.GGUFReader`` wraps every element of every array in numpy objects (3 s and 130 MB for a
vocabulary of 49 thousand), maps the file, and does not compare the header with the file's size.
"""

import math
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from halfbyte.checkpoint.reading import read_into
from halfbyte.errors import CheckpointError

TORCH_DTYPES = {np.float32: torch.float32, np.float16: torch.float16, np.uint16: torch.bfloat16}
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))  # as struct
U32, STRING, ARRAY = 4, 8, 9
_MAX_STRING = 2**26  # bytes; a chat template has 2**14
_MAX_EXTENT = 2**50
_CHUNK_BLOCKS = 32768  # decoded at a time: 1 M weights in blocks of 32, 4 MB as float32


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
        size: Its bytes.
        architecture: llama.cpp's name of the architecture.
        keys: The header's key-value pairs.
        tensors: Its tensors by name, in the order of the table.
        data_start: Where the tensor bytes begin.

    Raises:
        CheckpointError: If the file cannot be read, or a claim of its header does not hold.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
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

    def read(self, tensor: Stored) -> np.ndarray[Any, Any]:
        """Return one tensor as the file means it: float32, or the type of `held_as`."""
        held = held_as(tensor)
        block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
        out = np.empty(tensor.shape, held)
        flat = out.reshape(-1)
        if block == 1 and flat.itemsize == block_bytes:
            read_into(self.path, tensor.start, flat.view(np.uint8).data)
            return out
        chunk = max(1, 32 * _CHUNK_BLOCKS // block)
        raw = np.empty(chunk * block_bytes, np.uint8)
        blocks = flat.size // block
        for first in range(0, blocks, chunk):
            count = min(chunk, blocks - first)
            part = raw[: count * block_bytes]
            read_into(self.path, tensor.start + first * block_bytes, part.data)
            flat[first * block : (first + count) * block] = decode(part, tensor.kind)
        return out


def held_as(tensor: Stored) -> type[np.generic]:
    """Return the numpy type a tensor is read as; bfloat16, which numpy lacks, moves as uint16.

    llama.cpp's rearrangements of matrices only move numbers, so 16 bits may stay 16 bits. What is
    computed with (norms; Mamba's A) is decoded to float32, as transformers does for all.
    """
    if len(tensor.shape) < 2 or tensor.name.endswith("ssm_a"):
        return np.float32
    kinds = {GGMLQuantizationType.F16: np.float16, GGMLQuantizationType.BF16: np.uint16}
    return kinds.get(tensor.kind, np.float32)


def decode(blocks: np.ndarray[Any, Any], kind: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    """Decode the bytes of whole blocks to float32 (flat).

    Raises:
        NotImplementedError: If the package does not know how to decode this type.
    """
    # As one row: the package works through 16 rows at a time, however short they are.
    with np.errstate(all="ignore"):  # a damaged scale makes infinities, which are found later
        return dequantize(blocks.reshape(1, -1), kind).reshape(-1)  # type: ignore[no-any-return]


class _Header:
    """A position in the header; whatever would lead past the end of the file is an error."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size
        self.position = 0

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is not a whole GGUF file: {what}; download or copy it again"
        )

    def _check(self, length: int) -> None:
        if length > self.size - self.position:
            raise self.damaged(
                f"its header goes on for {length} bytes after {self.position}, the file has "
                f"{self.size}"
            )

    def take(self, length: int) -> bytes:
        self._check(length)
        raw = self.file.read(length)
        if len(raw) < length:
            raise self.damaged(f"it was cut at byte {self.position + len(raw)} while we read it")
        self.position += length
        return raw

    def skip(self, length: int) -> None:
        self._check(length)
        self.position = self.file.seek(length, os.SEEK_CUR)

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, least: int) -> int:
        """Read how many things of at least ``least`` bytes follow."""
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
            raise self.damaged("its header holds text that is not UTF-8") from None

    def value(self, kind: int) -> Any:
        """Read a value; of an array, only its length is kept."""
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
            for _ in range(count):
                self.skip(self.number("Q"))
        else:
            raise self.damaged(f"its header holds an array of type {kind}")
        return count
