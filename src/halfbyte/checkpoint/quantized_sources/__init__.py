"""Base models that are quantised in another way than ours: decoded while they are read.

A module of this package knows one method (``quant_method`` in ``quantization_config``): which keys
of the files are one weight, the shape and dtype it decodes to, from headers (and from a few numbers
where a format has shapes as values), and how it is decoded. `open_quantized` puts each such weight
under the key that a model of 16 bits has for it, so the rest of the I/O layer sees an ordinary
model. Weights are decoded one at a time, on the device on which they are wanted, and then packed
anew, or held in 16 bits.

The base of an adapter is then what was decoded, or decoded and packed anew: not exactly what is
served from the files (`cost`).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from halfbyte.checkpoint import mxfp4_keys
from halfbyte.checkpoint.quantized_sources import awq, compressed_tensors, fp8, gptq, hqq, int8
from halfbyte.checkpoint.quantized_sources.weight import (
    FLOAT_TYPES,
    Found,
    Headers,
    Options,
    StoredWeight,
)
from halfbyte.checkpoint.reading import read_into
from halfbyte.checkpoint.safetensors_file import Entry, SafetensorsFile, memory
from halfbyte.checkpoint.staging import Request
from halfbyte.errors import CheckpointError
from halfbyte.foreign_text import quote

__all__ = ["Decoded", "DecodedFile", "open_quantized", "require_supported"]

_METHODS: dict[str, Callable[[Options, Headers, torch.dtype], Found]] = {
    "gptq": gptq.find,
    "awq": awq.find,
    "fp8": fp8.find,
    "fbgemm_fp8": fp8.find,
    "compressed-tensors": compressed_tensors.find,
    "hqq": hqq.find,
    "bitsandbytes": int8.find,
}


def _is_kept(packing: Mapping[str, Any]) -> bool:
    """Return whether the weights are held as they are: packed by bitsandbytes, or in MXFP4."""
    return bool(packing.get("load_in_4bit")) or packing.get("quant_method") == mxfp4_keys.METHOD


class DecodedFile:
    """One quantised weight, read like a key of a `SafetensorsFile`.

    Attributes:
        path: The file of its first tensor, for messages.
        entries: Its decoded dtype and shape by its key, and its bytes in the files.
        requests: The tensors that ``decode`` needs, in order.
    """

    def __init__(self, weight: StoredWeight, files: Mapping[str, SafetensorsFile]) -> None:
        self._weight = weight
        found = [(files[key].path, files[key].entries[key]) for key in weight.members]
        self.path = found[0][0]
        nbytes = sum(entry.nbytes for _, entry in found)
        self.entries = {weight.key: Entry(weight.key, weight.dtype, weight.shape, 0, nbytes)}
        self.requests = [Request(path, e.start, e.nbytes, e.dtype, e.shape) for path, e in found]

    def decode(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the weight, decoded where its tensors are.

        Raises:
            CheckpointError: If a value in them is impossible.
        """
        given = dict(zip(self._weight.members, tensors, strict=True))
        return self._weight.decode(given.__getitem__)

    def read(self, name: str, row: int | None = None) -> Tensor:
        """Return the weight, or one index of its first dimension; all of it is decoded for that.

        Raises:
            CheckpointError: If a file ends early, or holds an impossible value.
        """
        tensors = []
        for request in self.requests:
            tensor = torch.empty(request.shape, dtype=request.dtype)
            read_into(request.path, request.start, memory(tensor))
            tensors.append(tensor)
        value = self.decode(tensors)
        return value if row is None else value[row]


class Decoded(NamedTuple):
    """A model's files as those of a model of 16 bits.

    Attributes:
        files: The file of each key.
        description: How the model is quantised; None if no weight is decoded.
    """

    files: dict[str, SafetensorsFile | DecodedFile]
    description: str | None


def require_supported(directory: Path, packing: Any) -> None:
    """Check that a ``quantization_config`` names a method that can be read.

    Raises:
        CheckpointError: If it does not.
    """
    method = packing.get("quant_method", "bitsandbytes") if isinstance(packing, dict) else packing
    known = (*_METHODS, mxfp4_keys.METHOD)
    if not isinstance(packing, dict) or not isinstance(method, str) or method not in known:
        raise CheckpointError(
            f"{directory} is quantised by {quote(method)}; supported are {', '.join(known)}. Use "
            "the model it was made from"
        )


def open_quantized(
    directory: Path,
    packing: Mapping[str, Any] | None,
    files: Mapping[str, SafetensorsFile],
    dtype: Any,
) -> Decoded:
    """Return the files of a model with its quantised weights as decoded ones.

    Args:
        directory: Its directory, for messages.
        packing: Its ``quantization_config``, if it has one.
        files: The file of each key.
        dtype: The dtype in its configuration. Weights whose scales are not of 16 bits are decoded
            to it, or to bfloat16 if it is no float dtype.

    Raises:
        CheckpointError: If an option is not supported, a tensor is missing or does not fit, or no
            weight is quantised.
    """
    if packing is None or _is_kept(packing):
        return Decoded(dict(files), None)
    entries = {key: file.entries[key] for key, file in files.items()}
    headers = Headers(directory, entries, lambda key: files[key].read(key))
    method = _METHODS[packing.get("quant_method", "bitsandbytes")]
    found = method(
        Options(directory, packing), headers, dtype if dtype in FLOAT_TYPES else torch.bfloat16
    )
    if not found.weights:
        raise CheckpointError(
            f"{directory}: config.json says that it is quantised by {found.description}, and no "
            "tensor in its files is; use the config.json that came with them"
        )
    decoded: dict[str, SafetensorsFile | DecodedFile] = dict(files)
    for weight in found.weights:
        for key in weight.members:
            decoded.pop(key, None)
    for key in found.ignored:
        decoded.pop(key, None)
    for weight in found.weights:
        if weight.key in decoded:
            raise headers.wrong(weight.key, f"is there beside {weight.members[0]}")
        decoded[weight.key] = DecodedFile(weight, files)
    description = found.description
    if found.ignored:
        description += ", its scales of activations not used"
    return Decoded(decoded, description)
