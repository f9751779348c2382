"""Safetensors files, read one tensor at a time and written as a stream.

A file is ``N (u64, little-endian) | N bytes of JSON | tensor bytes``; the JSON maps each name to
its dtype, shape and offsets, and every byte belongs to exactly one tensor.

The ``safetensors`` package maps the file into memory. We do not, for two reasons. Pages of a
mapped file count as resident memory of the process: loading a model would show twice its size.
And a file that shrinks while mapped kills the process, where a short read is an error that can be
reported. So ``SafetensorsFile`` reads the header, checks every value in it against the size of the
file before anything is allocated, and then reads directly into the tensor's own memory.

``write_model`` plans all sizes first, so the offset of each tensor is known before the first one is
computed, and none is kept after it is written.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from halfbyte.checkpoint.reading import read_into
from halfbyte.errors import CheckpointError
from halfbyte.foreign_text import quote
from halfbyte.input_files import open_file

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

INDEX_NAME = "model.safetensors.index.json"
SHARD_BYTES = 2_000_000_000

_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors package
_MAX_EXTENT = 2**50  # a shape whose dimensions (zeros as ones) multiply to more is no weight


class Entry(NamedTuple):
    """One tensor of a file: its dtype, shape and bytes in the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def row(self, index: int) -> "Entry":
        """Return what the tensor holds at one index of its first dimension, which is contiguous."""
        nbytes = self.nbytes // self.shape[0]
        return self._replace(shape=self.shape[1:], start=self.start + index * nbytes, nbytes=nbytes)


class SafetensorsFile:
    """A safetensors file whose header has been read and checked.

    Attributes:
        path: The file.
        entries: Its tensors by name, in the order of their bytes.
        metadata: The free-form strings of the header.

    Raises:
        CheckpointError: If the file cannot be read, or a claim of its header does not hold.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_file(path) as file:
                self.size = os.fstat(file.fileno()).st_size
                self.header = self._read_header(file)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        self.metadata, self.entries = self._parse(self.header)

    @property
    def data_start(self) -> int:
        """Offset of the first tensor byte."""
        return 8 + len(self.header)

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is not a whole safetensors file: {what}; download or copy it again"
        )

    def _read_header(self, file: BinaryIO) -> bytes:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(self.size - 8, _MAX_HEADER):
            raise self._damaged(
                f"its header should take {length} bytes, the file has {self.size}"
                if len(prefix) == 8
                else f"it has {self.size} bytes"
            )
        header = file.read(length)
        if len(header) < length:
            raise self._damaged(f"its header ends after {len(header)} of {length} bytes")
        return header

    def _parse(self, header: bytes) -> tuple[dict[str, str], dict[str, Entry]]:
        try:
            fields = json.loads(header.decode(), object_pairs_hook=_without_repeats)
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"its header is not JSON ({error})") from None
        if not isinstance(fields, dict):
            raise self._damaged("its header is not a JSON object")
        metadata = fields.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise self._damaged("its __metadata__ is not a JSON object")
        data_start = self.data_start
        entries = [self._entry(name, field, data_start) for name, field in fields.items()]
        entries.sort(key=lambda entry: (entry.start, entry.nbytes))
        end = data_start
        for entry in entries:
            if entry.start != end:
                raise self._damaged(
                    f"{entry.name} should start at byte {end}, its header says {entry.start}"
                )
            end += entry.nbytes
        if end != self.size:
            raise self._damaged(f"its tensors end at byte {end}, the file at {self.size}")
        return metadata, {entry.name: entry for entry in entries}

    def _entry(self, name: str, field: Any, data_start: int) -> Entry:
        match field:
            case {"dtype": str(kind), "shape": list(shape), "data_offsets": [begin, end]}:
                numbers = [*shape, begin, end]
            case _:
                raise self._damaged(
                    f"the header's entry of {quote(name)} lacks dtype, shape or offsets"
                )
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise self._damaged(f"the header's entry of {quote(name)} has an invalid size")
        if kind not in DTYPES:
            raise CheckpointError(
                f"{self.path} holds {name} as {kind}; supported are {', '.join(DTYPES)}. "
                "Use a copy of the model in 16 or 32 bits"
            )
        dtype = DTYPES[kind]
        if len(shape) > 8 or math.prod(max(n, 1) for n in shape) > _MAX_EXTENT:
            raise self._damaged(f"{name} has the shape {shape[:8]}, which no weight has")
        nbytes = math.prod(shape) * dtype.itemsize
        if end - begin != nbytes or data_start + end > self.size:
            raise self._damaged(
                f"{name} is {kind} of shape {shape}, so {nbytes} bytes, and its offsets are "
                f"{begin} to {end} in a file of {self.size} bytes"
            )
        return Entry(name, dtype, tuple(shape), data_start + begin, nbytes)

    def read(self, name: str, row: int | None = None) -> Tensor:
        """Return one tensor, or one index of its first dimension, in newly allocated memory.

        Raises:
            CheckpointError: If the file ends early (truncated since it was opened).
        """
        entry = self.entries[name] if row is None else self.entries[name].row(row)
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        read_into(self.path, entry.start, memory(tensor))
        return tensor


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a name occurs twice")
    return fields


def memory(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, shared, as a flat writable view."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


class Planned(NamedTuple):
    """A tensor to be written. If ``flexible``, it is 1-D and may be shorter than ``shape``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    flexible: bool = False

    @property
    def nbytes(self) -> int:
        """Maximum bytes it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Row(NamedTuple):
    """What a tensor holds at one index of its first dimension; the whole is written row by row."""

    number: int
    tensor: Tensor


def write_safetensors(
    file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write ``tensors`` as a safetensors file.

    Raises:
        OSError: If the file cannot be written.
    """
    plan = [Planned(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    writer = _Writer(file, plan, metadata)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()


def write_model(
    directory: Path,
    plan: Sequence[Planned],
    tensors: Iterable[tuple[str, Tensor | Row]],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model's tensors as transformers names its files: one, or shards and an index.

    Args:
        directory: The directory; it must exist.
        plan: The tensors, in their order in the files.
        tensors: Name and tensor, each as planned, or its rows, in any order; one is held at a time.
        shard_bytes: Maximum tensor bytes per file (a single larger tensor gets its own).

    Raises:
        OSError: If the directory cannot be written.
        ValueError: If a tensor is not the one planned.
    """
    shards: list[list[Planned]] = [[]]
    for planned in plan:
        if shards[-1] and sum(p.nbytes for p in shards[-1]) + planned.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(planned)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    home = {planned.name: number for number, shard in enumerate(shards) for planned in shard}
    writers: dict[int, _Writer] = {}
    with contextlib.ExitStack() as files:

        def writer_of(number: int) -> _Writer:
            if number not in writers:
                file = files.enter_context(open(directory / names[number], "wb"))
                writers[number] = _Writer(file, shards[number], {"format": "pt"})
            return writers[number]

        for name, value in tensors:
            if name not in home:
                raise ValueError(f"{name} came, planned was no tensor of that name")
            writer_of(home[name]).write(name, value)
            del value  # freed before the next one is computed
        total = sum(writer_of(number).close() for number in range(len(shards)))
    weight_map = {planned.name: names[home[planned.name]] for planned in plan}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


class _Writer:
    """A file being written: offsets of tensors are known from the start, the header is last.

    Readers view tensor bytes in place, so a float32 must start at a multiple of 4. Nothing
    may be left empty between tensors, hence the order: wider dtypes first, flexible tensors last.
    Space is reserved for the longest header the plan allows, and padded with spaces.
    """

    def __init__(
        self, file: BinaryIO, plan: Sequence[Planned], metadata: Mapping[str, str] | None = None
    ) -> None:
        self._file, self._metadata = file, metadata
        self._plan = {planned.name: planned for planned in plan}
        self._written: dict[str, dict[str, Any]] = {}
        self._starts: dict[str, int] = {}
        self._rows: dict[str, set[int]] = {}  # of tensors that are written in rows: what is missing
        self._end = 0  # end of the tensors with fixed offsets; flexible ones are appended here
        bound = 0
        for planned in sorted(plan, key=lambda p: (p.flexible, -p.dtype.itemsize)):
            self._written[planned.name] = _field(planned.dtype, planned.shape, bound)
            bound += planned.nbytes
            if not planned.flexible:
                self._starts[planned.name], self._end = self._end, bound
        self._room = -(-len(self._header()) // 8) * 8

    def _header(self) -> bytes:
        fields = {"__metadata__": dict(self._metadata)} if self._metadata else {}
        return json.dumps({**fields, **self._written}, separators=(",", ":")).encode()

    def write(self, name: str, value: Tensor | Row) -> None:
        if isinstance(value, Row):
            self._write_row(name, *value)
            return
        planned = self._plan.pop(name, None)
        length = value.numel() if planned is not None and planned.flexible else None
        shape = tuple(value.shape)
        if (
            planned is None
            or value.dtype != planned.dtype
            or (shape != planned.shape and (length is None or length > planned.shape[0]))
        ):
            raise ValueError(f"{name} {value.dtype} {shape} came, planned was {planned}")
        start = self._starts.get(name, self._end)
        self._written[name] = _field(value.dtype, shape, start)
        self._end = max(self._end, start + value.nbytes)
        self._put(start, value)

    def _write_row(self, name: str, index: int, tensor: Tensor) -> None:
        planned = self._plan.get(name)
        shape = tuple(tensor.shape)
        if planned is not None and not planned.flexible:
            missing = self._rows.setdefault(name, set(range(planned.shape[0])))
            if (tensor.dtype, shape) == (planned.dtype, planned.shape[1:]) and index in missing:
                self._put(self._starts[name] + index * tensor.nbytes, tensor)
                missing.remove(index)
                if not missing:
                    del self._plan[name]
                return
        raise ValueError(f"row {index} of {name} {tensor.dtype} {shape} came, planned is {planned}")

    def _put(self, start: int, tensor: Tensor) -> None:
        self._file.seek(8 + self._room + start)
        self._file.write(memory(tensor.cpu().contiguous()))

    def close(self) -> int:
        """Write the header and return the number of tensor bytes."""
        if self._plan:
            raise ValueError(f"planned, but never came: {', '.join(self._plan)}")
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little"))
        self._file.write(self._header().ljust(self._room))
        return self._end


def _field(dtype: torch.dtype, shape: tuple[int, ...], start: int) -> dict[str, Any]:
    end = start + math.prod(shape) * dtype.itemsize
    return {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
