"""GGUF files as base models, converted as in transformers, one tensor at a time.

The translation of keys to a configuration and a tokenizer, of tensor names, and of llama.cpp's
rearrangements is transformers' (``modeling_gguf_pytorch_utils``), used unchanged. Only the order of
work is ours: transformers would decode the whole file into memory, after reading the header three
times, 3 s each. So the configuration is read from a copy of the header without its long arrays, the
tokenizer comes from its fast reader, and tensors are rearranged one by one.
"""

import logging
import math
import re
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor
from transformers import (
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.modeling_gguf_pytorch_utils import (
    GGUF_SUPPORTED_ARCHITECTURES,
    GGUF_TO_TRANSFORMERS_MAPPING,
    TENSOR_PROCESSORS,
    LlamaTensorProcessor,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from halfbyte.checkpoint.gguf_blocks import decode
from halfbyte.checkpoint.gguf_file import (
    ARRAY,
    TORCH_DTYPES,
    U32,
    GGUFFile,
    Stored,
    held_as,
)
from halfbyte.checkpoint.gguf_vocabulary import byte_level
from halfbyte.checkpoint.reading import read_into
from halfbyte.checkpoint.source import BaseSource, Parameter, foreign_reader, skeleton_of
from halfbyte.errors import CheckpointError
from halfbyte.foreign_text import quote
from halfbyte.quant import PackedWeight

# Individually scaled rotary frequencies (Llama 3.1), which transformers' GGUF reader omits.
_ROPE_TABLE = re.compile(r"rope_(freqs|factors_long|factors_short)\.weight")

logger = logging.getLogger("halfbyte")


def read_config(file: GGUFFile) -> PretrainedConfig:
    """Return the configuration that transformers derives from the keys.

    Raises:
        CheckpointError: If transformers does not know the architecture, or a key is missing.
    """
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{file.path} is not a language model: it has no token_embd.weight")
    rows = embedding.shape[0]
    trouble = (
        f"{file.path}: transformers cannot make a configuration of architecture "
        f"{quote(file.architecture)} from its keys"
    )
    with tempfile.TemporaryDirectory() as directory, foreign_reader(trouble):
        Path(directory, "keys.gguf").write_bytes(_without_arrays(file, rows))
        config = AutoConfig.from_pretrained(directory, gguf_file="keys.gguf", vocab_size=rows)
    known = GGUF_SUPPORTED_ARCHITECTURES
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


_ROLES = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}


def read_tokenizer(file: GGUFFile) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a file.

    Byte-level BPE with known rules is built by our own code, in 0.35 s of one core: transformers
    reads the vocabulary element by element (0.9 s for 49 thousand tokens; 5.17, 4 s) and splits
    text in the same way for all files, whatever rules a file names. Others are built by
    transformers. Special tokens are those the file specifies by id: transformers 5.17 uses others
    for some files (BOS for EOS in SmolLM2's), and a model trained with the wrong end never stops.

    Raises:
        CheckpointError: If the file has none, or one transformers cannot read.
    """
    if "tokenizer.ggml.tokens" not in file.keys:
        raise CheckpointError(f"{file.path} contains no tokenizer")
    with foreign_reader(f"{file.path}: transformers cannot read its tokenizer"):
        backend = byte_level(file)
        if backend is not None:
            named = _special_tokens(file, backend.id_to_token)
            return PreTrainedTokenizerFast(
                tokenizer_object=backend, **named, **_tokenizer_keys(file)
            )
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            file.path.parent, gguf_file=file.path.name
        )
    for role, token in _special_tokens(file, tokenizer.backend_tokenizer.id_to_token).items():
        setattr(tokenizer, role, token)
    kind, cut = (file.keys.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind is not None and kind.value == "gpt2" and cut is not None:
        logger.warning(
            "%s has a pre-tokenizer that halfbyte does not know (%r), so that of transformers is "
            "used: some texts give other tokens than in llama.cpp",
            file.path,
            cut.value,
        )
    return tokenizer


def _special_tokens(file: GGUFFile, spelled: Callable[[int], str | None]) -> dict[str, str]:
    """Return the special tokens that a file specifies by id, by their roles in transformers."""
    named = {role: file.keys.get(f"tokenizer.ggml.{key}_token_id") for role, key in _ROLES.items()}
    found = {
        role: spelled(key.value)
        for role, key in named.items()
        if key is not None and key.kind == U32
    }
    return {role: token for role, token in found.items() if token is not None}


def _tokenizer_keys(file: GGUFFile) -> dict[str, Any]:
    """Return a file's tokenizer options other than the vocabulary, by transformers' names."""
    names = GGUF_TO_TRANSFORMERS_MAPPING["tokenizer_config"]["tokenizer"]
    keys = {name: file.keys.get(f"tokenizer.{key}") for key, name in names.items()}
    return {name: key.value for name, key in keys.items() if key is not None}


class Arrangement:
    """The mapping from tensors of a GGUF file to parameters of a transformers model.

    Attributes:
        parts: The tensors of each parameter, by its name; in the order of the file.

    Args:
        file: The file.
        skeleton: A model of its configuration; it may be on the meta device.

    Raises:
        CheckpointError: If there are tensors that the model does not have, or of a type that the
            gguf package does not decode.
    """

    def __init__(self, file: GGUFFile, skeleton: PreTrainedModel) -> None:
        self._file = file
        processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)
        self._processor = processor(config=skeleton.config.to_dict())
        # These rearrange the rows of a matrix, but not within rows.
        self._moves_rows = processor in (TensorProcessor, LlamaTensorProcessor)
        base = skeleton.base_model_prefix
        inner = _Names(skeleton.config, getattr(skeleton, base).state_dict(), [])
        outer = _Names(skeleton.config, skeleton.state_dict(), [(base, inner)])
        try:
            self._names: dict[str, str] = get_gguf_hf_weights_map(
                outer, self._processor, model_type=file.architecture
            )
        except NotImplementedError as error:
            raise CheckpointError(f"{file.path}: {error}") from error
        self.parts: dict[str, list[Stored]] = {}
        homeless = []
        for name, tensor in file.tensors.items():
            target = self._names.get(name) or self._names.get(name.removesuffix(".weight"))
            if target is not None:
                self.parts.setdefault(target, []).append(tensor)
            elif _ROPE_TABLE.fullmatch(name):
                logger.warning(
                    "%s scales its rotary frequencies (%s), which is not applied: long texts will "
                    "come out worse than with the model's safetensors files",
                    file.path,
                    name,
                )
            else:
                homeless.append(name)
        if homeless:
            raise CheckpointError(
                f"{file.path} holds tensors {type(skeleton).__name__} has no place for: "
                f"{', '.join(homeless[:6])} ({len(homeless)} in all)"
            )
        for kind in {tensor.kind for tensor in file.tensors.values()}:
            try:
                decode(torch.zeros(GGML_QUANT_SIZES[kind][1], dtype=torch.uint8), kind)
            except NotImplementedError:
                raise CheckpointError(
                    f"{file.path} holds tensors of type {kind.name}, which the gguf package does "
                    "not decode; use a file of another type, such as Q4_K_M or Q8_0"
                ) from None

    def tensors(
        self, targets: Iterable[str] | None = None, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield (parameter's name, value), one at a time, in the order of ``parts``.

        Block types are decoded to float32. Matrices of 16-bit types keep their type.

        Args:
            targets: Only these parameters, in this order.
            device: Device to decode the blocks of matrices on; other values are on the CPU.

        Raises:
            CheckpointError: If the file ends early.
        """
        for target in self.parts if targets is None else targets:
            tensors = self.parts[target]
            # Experts' matrices are combined by the processor itself, in `finished`.
            finished: dict[str, Tensor] = {}
            for tensor in tensors:
                # As blocks, a matrix is a quarter as large to move, and can be decoded on a GPU.
                as_blocks = self._moves_rows and _has_rows_of_blocks(tensor)
                result = self._processor.process(
                    weights=self._file.raw(tensor) if as_blocks else self._file.read(tensor),
                    name=tensor.name,
                    tensor_key_mapping=self._names,
                    parsed_parameters={"tensors": finished},
                )
                if result.name is not None:
                    value = torch.from_numpy(np.ascontiguousarray(result.weights))
                    if as_blocks:
                        flat = decode(value.to(device).view(-1), tensor.kind)
                        value = flat.view(tensor.shape)
                    finished[target] = value
                    del value
                del result
            for name in list(finished):
                value = finished.pop(name)
                yield name, value.view(torch.bfloat16) if value.dtype == torch.uint16 else value
                del value


def _has_rows_of_blocks(tensor: Stored) -> bool:
    return len(tensor.shape) == 2 and GGML_QUANT_SIZES[tensor.kind][0] > 1


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


class GGUFSource(BaseSource):
    """A GGUF file as the source of a base model.

    Attributes:
        path: The file.
        file: Its header.
        scales_frequencies: Whether it has a table of scaled rotary frequencies, which is not used.

    Raises:
        CheckpointError: If the file is damaged, is of an architecture or a block type that
            transformers or the gguf package cannot read, or is not the whole model.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.name, self.file = name, GGUFFile(path)
        self.config = read_config(self.file)
        self.path = path
        self.scales_frequencies = any(map(_ROPE_TABLE.fullmatch, self.file.tensors))
        self.skeleton = skeleton_of(self.config, name, len(self.file.tensors))
        self._arrangement = Arrangement(self.file, self.skeleton)
        tied = self.skeleton.all_tied_weights_keys
        expected = self.skeleton.state_dict()
        parts = self._arrangement.parts
        faults = [f"{key} is missing" for key in expected if key not in {*parts, *tied}]
        faults += [
            f"{key} has {sum(math.prod(t.shape) for t in tensors)} elements, not {count}"
            for key, tensors in parts.items()
            if (count := expected[key].numel()) != sum(math.prod(t.shape) for t in tensors)
        ]
        if faults:
            raise CheckpointError(
                f"{path} is not the {type(self.skeleton).__name__} of its keys: "
                f"{'; '.join(faults[:4])} ({len(faults)} in all)"
            )
        self.parameters = tuple(
            Parameter(
                key,
                tuple(expected[key].shape),
                TORCH_DTYPES[held_as(tensors[0])],
                sum(tensor.nbytes for tensor in tensors),
                packed=False,
            )
            for key, tensors in parts.items()
        )
        kinds = {held_as(t) for t in self.file.tensors.values() if len(t.shape) > 1}
        self.dtype = torch.float16 if kinds == {np.float16} else torch.bfloat16

    def _files(self) -> Iterable[tuple[Path, int, int]]:
        return [(self.file.path, self.file.size, self.file.data_start)]

    def tensors(  # noqa: D102
        self, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[str, Tensor | PackedWeight]]:
        return self._arrangement.tensors(device=device)

    def tensor(self, name: str) -> Tensor | PackedWeight:  # noqa: D102
        return dict(self._arrangement.tensors([name]))[name]

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return read_tokenizer(self.file)
