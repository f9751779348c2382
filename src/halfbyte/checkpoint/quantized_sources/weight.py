"""One weight of a checkpoint that another library quantised: its keys, and what they decode to.

A format finds its weights from headers alone. What it needs of config.json is read through
`Options`, which refuses what is not understood by name, and what it needs of the files through
`Headers`, which refuses what does not fit.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from halfbyte.checkpoint.safetensors_file import Entry
from halfbyte.errors import CheckpointError
from halfbyte.foreign_text import quote

Read = Callable[[str], Tensor]
"""Returns the tensor of a key of the files, on the device on which it is decoded."""

T = TypeVar("T")

FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A quantised weight in the files.

    Attributes:
        key: The key that it has in a model of 16 bits, such as ``….weight``.
        members: The keys that hold it.
        shape: Its decoded shape.
        dtype: Its decoded dtype.
        decode: Returns it. Raises CheckpointError if a value in the files is impossible.
    """

    key: str
    members: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    decode: Callable[[Read], Tensor]


class Found(NamedTuple):
    """What a format has found.

    Attributes:
        weights: The quantised weights.
        description: How they are quantised, such as ``GPTQ (4 bits, groups of 128)``.
        ignored: Keys that no weight needs: scales of activations and of the KV cache.
    """

    weights: list[StoredWeight]
    description: str
    ignored: list[str]


_NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})


class Options:
    """The ``quantization_config`` of a model, read option by option.

    Args:
        directory: The model's directory, for messages.
        fields: The JSON object.
    """

    def __init__(self, directory: Path, fields: Mapping[str, Any]) -> None:
        self._directory, self._fields = directory, fields
        self._read = {"quant_method"}

    def wrong(self, name: str, value: Any, supported: str) -> CheckpointError:
        """Return the error for an option with a value that is not understood."""
        return CheckpointError(
            f"{self._directory}: quantization_config has {quote(name)}: {quote(value)}; supported "
            f"is {supported}. Use the model that it was made from"
        )

    def get(self, name: str, default: Any = None) -> Any:
        """Return an option as it is; ``null`` counts as not given."""
        self._read.add(name)
        value = self._fields.get(name)
        return default if value is None else value

    def choice(self, name: str, allowed: Iterable[T], default: T) -> T:
        """Return an option that must have one of the values ``allowed``."""
        value, known = self.get(name, default), tuple(allowed)
        for each in known:
            if type(value) is type(each) and value == each:
                return each
        raise self.wrong(name, value, " or ".join(map(str, known)))

    def group_size(self, default: int) -> int:
        """Return ``group_size``: a positive number, or -1 for whole rows."""
        value = self.get("group_size", default)
        if type(value) is not int or (value != -1 and not 0 < value <= 2**24):
            raise self.wrong("group_size", value, "a positive number, or -1")
        return value

    def ignore(self, *names: str) -> None:
        """Accept options that say how a model was made, or is to be run, not what it is."""
        self._read.update(names)

    def finish(self) -> None:
        """Refuse the options that nothing has read, unless they are off or empty."""
        for name, value in self._fields.items():
            if name not in self._read and value not in _NOTHING:
                raise self.wrong(name, value, "a model without this option")


class Headers:
    """The entries of a model's files, by key.

    Args:
        directory: The model's directory, for messages.
        entries: What the headers of the files say of each key.
        read: Reads a key; only of a few numbers, where a format has shapes as values.
    """

    def __init__(self, directory: Path, entries: Mapping[str, Entry], read: Read) -> None:
        self._directory, self._entries, self._read = directory, entries, read

    def with_suffix(self, suffix: str) -> list[str]:
        """Return the prefixes of the keys that end in ``suffix``."""
        return [key.removesuffix(suffix) for key in self._entries if key.endswith(suffix)]

    def ending_in(self, ends: tuple[str, ...]) -> list[str]:
        """Return the keys with one of these ends."""
        return [key for key in self._entries if key.endswith(ends)]

    def of_dtype(self, dtype: torch.dtype) -> list[str]:
        """Return the keys of tensors of ``dtype``."""
        return [key for key, entry in self._entries.items() if entry.dtype == dtype]

    def wrong(self, key: str, what: str) -> CheckpointError:
        """Return the error for a key that does not fit."""
        return CheckpointError(
            f"{self._directory}: {key} {what}; the files are damaged, or quantised in another way "
            "than config.json says"
        )

    def get(self, key: str) -> Entry | None:
        """Return the entry of a key, or None."""
        return self._entries.get(key)

    def expect(
        self,
        key: str,
        dtypes: torch.dtype | tuple[torch.dtype, ...],
        shape: tuple[int, ...] | None = None,
    ) -> Entry:
        """Return the entry of a key.

        Raises:
            CheckpointError: If there is none, or it has another dtype or shape.
        """
        entry = self._entries.get(key)
        if entry is None:
            raise self.wrong(key, "is missing")
        dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes,)
        if entry.dtype not in dtypes:
            raise self.wrong(key, f"is {entry.dtype}, expected {' or '.join(map(str, dtypes))}")
        if shape is not None and entry.shape != shape:
            raise self.wrong(key, f"has shape {list(entry.shape)}, expected {list(shape)}")
        return entry

    def matrix(self, key: str, dtype: torch.dtype) -> tuple[int, int]:
        """Return the shape of a key that holds a matrix of ``dtype``, not an empty one."""
        shape = self.expect(key, dtype).shape
        if len(shape) != 2 or 0 in shape:
            raise self.wrong(key, f"has shape {list(shape)}, expected is a matrix")
        return shape[0], shape[1]

    def numbers(self, key: str) -> list[int]:
        """Return the whole numbers of a key: one, or those of a short vector."""
        entry = self.expect(key, (torch.int32, torch.int64))
        if len(entry.shape) > 1 or math.prod(entry.shape) not in (1, 2):
            raise self.wrong(key, f"has shape {list(entry.shape)}, expected are one or two numbers")
        return [int(number) for number in self._read(key).reshape(-1).tolist()]

    def grid(
        self, key: str, scale: str, shape: tuple[int, ...], block: tuple[int, int] | None
    ) -> tuple[int, int]:
        """Return how many rows and columns of a weight share one scale.

        The last block of rows and of columns may be smaller.

        Args:
            key: The weight.
            scale: The key of its scales.
            shape: The weight's shape, decoded.
            block: Rows and columns of a block, if they are blocks.
        """
        entry = self._entries[scale]
        given = scale_shape(entry.shape, len(shape))
        if len(shape) < 2 or len(given) != len(shape):
            raise self.wrong(scale, f"has shape {list(entry.shape)} for one of {list(shape)}")
        leading = all(n in (1, m) for n, m in zip(given[:-2], shape[:-2], strict=True))
        sizes = []
        for extent, count, own in zip(shape[-2:], given[-2:], block or (1, 1), strict=True):
            sizes.append(extent if count == 1 else own if count == -(-extent // own) else 0)
        if not leading or 0 in sizes:
            raise self.wrong(
                scale,
                f"has shape {list(entry.shape)} for {key} of {list(shape)}"
                + (f" in blocks of {block[0]} x {block[1]}" if block else ""),
            )
        return sizes[0], sizes[1]


def scale_shape(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Return the shape of scales with the rank of their weight.

    One scale is one for all, a vector is one for each row of a matrix, or for each expert.
    """
    if math.prod(shape) == 1:
        return (1,) * rank
    if len(shape) == 1:
        return (*shape, *(1,) * (rank - 1))
    return shape
