"""GGUF files of architectures that only transformers reads, converted as there, tensor by tensor.

The translation of keys to a configuration, of tensor names, and of llama.cpp's rearrangements is
transformers' (``modeling_gguf_pytorch_utils``), used unchanged. Only the order of work is ours:
transformers would decode the whole file into memory, after reading the header three times, 3 s
each. So the configuration is read from a copy of the header without its long arrays, and tensors
are rearranged one by one.
"""

import math
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import (
    GGUF_SUPPORTED_ARCHITECTURES,
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from halfbyte.checkpoint.gguf_architectures import ARCHITECTURES
from halfbyte.checkpoint.gguf_file import ARRAY, U32, GGUFFile, Stored
from halfbyte.checkpoint.reading import read_into
from halfbyte.checkpoint.source import foreign_reader
from halfbyte.errors import CheckpointError
from halfbyte.foreign_text import quote


def read_foreign_config(file: GGUFFile, rows: int) -> PretrainedConfig:
    """Return the configuration that transformers derives from the keys.

    Args:
        file: The file.
        rows: Rows of its embedding.

    Raises:
        CheckpointError: If transformers does not know the architecture, or a key is missing.
    """
    trouble = (
        f"{file.path}: transformers cannot make a configuration of architecture "
        f"{quote(file.architecture)} from its keys"
    )
    with tempfile.TemporaryDirectory() as directory, foreign_reader(trouble):
        Path(directory, "keys.gguf").write_bytes(_without_arrays(file, rows))
        config = AutoConfig.from_pretrained(directory, gguf_file="keys.gguf", vocab_size=rows)
    known = dict.fromkeys(
        [*(row.name for row in ARCHITECTURES), *map(str, GGUF_SUPPORTED_ARCHITECTURES)]
    )
    if not {file.architecture, config.model_type.removesuffix("_text")} & set(known):
        raise CheckpointError(
            f"{file.path}: GGUF files of architecture {quote(file.architecture)} are not "
            f"supported; supported are {', '.join(known)}. Use the model's safetensors files"
        )
    config.name_or_path = str(file.path)
    return config


def _without_arrays(file: GGUFFile, vocabulary: int) -> bytes:
    """Return a GGUF file with the same keys and empty tensors, without the vocabulary's arrays."""
    replaced = {f"{file.architecture}.vocab_size", "general.alignment"}
    kept = [
        key
        for name, key in file.keys.items()
        if name not in replaced and not (key.kind == ARRAY and name.startswith("tokenizer."))
    ]
    parts = [struct.pack("<4sIQQ", b"GGUF", 3, len(file.tensors), len(kept) + 1)]
    for key in kept:
        raw = bytearray(key.end - key.start)
        read_into(file.path, key.start, memoryview(raw))
        parts.append(bytes(raw))
    parts.append(_text(f"{file.architecture}.vocab_size") + struct.pack("<II", U32, vocabulary))
    for name in file.tensors:
        parts.append(_text(name) + struct.pack("<IQIQ", 1, 0, GGMLQuantizationType.F32, 0))
    return b"".join(parts) + bytes(64)  # at least the padding before the data, of which none is


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


class TransformersArrangement:
    """The mapping from tensors of a GGUF file to parameters, by transformers' code.

    Args:
        file: The file.
        skeleton: A model of its configuration; it may be on the meta device.

    Raises:
        CheckpointError: If transformers has no names for the architecture.
    """

    def __init__(self, file: GGUFFile, skeleton: PreTrainedModel) -> None:
        self._file = file
        processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)
        self._processor = processor(config=skeleton.config.to_dict())
        base = skeleton.base_model_prefix
        inner = _Names(skeleton.config, getattr(skeleton, base).state_dict(), [])
        outer = _Names(skeleton.config, skeleton.state_dict(), [(base, inner)])
        try:
            self._names: dict[str, str] = get_gguf_hf_weights_map(
                outer, self._processor, model_type=file.architecture
            )
        except NotImplementedError as error:
            raise CheckpointError(f"{file.path}: {error}") from error

    def parts(self) -> dict[str, list[Stored]]:
        """Return the tensors of each parameter, by its name; in the order of the file."""
        found: dict[str, list[Stored]] = {}
        for name, tensor in self._file.tensors.items():
            target = self._names.get(name) or self._names.get(name.removesuffix(".weight"))
            if target is not None:
                found.setdefault(target, []).append(tensor)
        return found

    def misfits(self, expected: Mapping[str, Tensor]) -> list[str]:
        """Return which parameters have another number of elements than their tensors."""
        return [
            f"{key} has {sum(math.prod(t.shape) for t in tensors)} elements, not {count}"
            for key, tensors in self.parts().items()
            if (count := expected[key].numel()) != sum(math.prod(t.shape) for t in tensors)
        ]

    def value(self, target: str, tensors: list[Stored], device: torch.device | str) -> Tensor:
        """Return a parameter from its tensors, on the CPU: numpy rearranges them.

        Raises:
            CheckpointError: If the file ends early.
        """
        # Experts' matrices are combined by the processor itself, in `finished`.
        finished: dict[str, Tensor] = {}
        for tensor in tensors:
            result = self._processor.process(
                weights=self._file.read(tensor),
                name=tensor.name,
                tensor_key_mapping=self._names,
                parsed_parameters={"tensors": finished},
            )
            if result.name is not None:
                finished[target] = torch.from_numpy(np.ascontiguousarray(result.weights))
        value = finished[target]
        return value.view(torch.bfloat16) if value.dtype == torch.uint16 else value


class _Names(NamedTuple):
    """The part of a model that transformers needs to map its names.

    With the whole model, it lists the names of every module down to the last norm and rebuilds its
    tables each time: 7 s for 30 layers. All results come from the first two levels.
    """

    config: PretrainedConfig
    names: dict[str, Tensor]
    children: list[tuple[str, "_Names"]]

    def state_dict(self) -> dict[str, Tensor]:
        return self.names

    def named_children(self) -> list[tuple[str, "_Names"]]:
        return self.children
