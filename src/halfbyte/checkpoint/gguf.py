"""GGUF files as base models, one tensor at a time.

Architectures of the table ``gguf_architectures`` are read by it, the others as transformers does
(``gguf_transformers``). Blocks are decoded one tensor at a time, on the device of the model.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING

from halfbyte.checkpoint.gguf_architectures import Layout
from halfbyte.checkpoint.gguf_blocks import decode
from halfbyte.checkpoint.gguf_config import read_known_config, row_of
from halfbyte.checkpoint.gguf_file import TORCH_DTYPES, U32, GGUFFile, Stored, held_as
from halfbyte.checkpoint.gguf_forms import Form
from halfbyte.checkpoint.gguf_mxfp4 import from_blocks
from halfbyte.checkpoint.gguf_rope import FREQUENCIES, LONG, SHORT
from halfbyte.checkpoint.gguf_transformers import TransformersArrangement, read_foreign_config
from halfbyte.checkpoint.gguf_vocabulary import byte_level
from halfbyte.checkpoint.source import (
    BaseSource,
    ExpertSlice,
    Parameter,
    foreign_reader,
    skeleton_of,
)
from halfbyte.errors import CheckpointError
from halfbyte.layers.experts import expert_parameters
from halfbyte.quant import MXFP4Weight, PackedWeight

# Individually scaled rotary frequencies. They become options of the configuration, except for
# architectures that only transformers reads.
_ROPE_TABLES = {FREQUENCIES, LONG, SHORT}

logger = logging.getLogger("halfbyte")


def read_config(file: GGUFFile) -> PretrainedConfig:
    """Return the configuration of a file, from its keys and the names of its tensors.

    Raises:
        CheckpointError: If the architecture is not known, or a key is missing or of another type.
    """
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{file.path} is not a language model: it has no token_embd.weight")
    row, vocabulary = row_of(file), embedding.shape[0]
    if row is not None:
        return read_known_config(file, row, vocabulary)
    return read_foreign_config(file, vocabulary)


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


class Arrangement(Protocol):
    """The mapping from tensors of a GGUF file to parameters of a transformers model."""

    def parts(self) -> dict[str, list[Stored]]:
        """Return the tensors of each parameter, by its name; in the order of the file."""

    def value(self, target: str, tensors: list[Stored], device: torch.device | str) -> Tensor:
        """Return a parameter from its tensors."""

    def misfits(self, expected: Mapping[str, Tensor]) -> list[str]:
        """Return which tensors do not fit the model's parameters."""


class TableArrangement:
    """The mapping by ``gguf_architectures``.

    Args:
        file: The file.
        skeleton: A model of its configuration; it may be on the meta device.

    Raises:
        CheckpointError: If the keys contradict each other.
    """

    def __init__(self, file: GGUFFile, skeleton: PreTrainedModel) -> None:
        self._file = file
        layout, tied = Layout(skeleton.config), skeleton.all_tied_weights_keys
        names = [name for name in skeleton.state_dict() if name not in tied]
        with foreign_reader(f"{file.path}: the sizes in its keys do not fit together"):
            self._forms: dict[str, Form] = {name: layout.form(name) for name in names}

    def parts(self) -> dict[str, list[Stored]]:  # noqa: D102
        owner = {part: name for name, form in self._forms.items() for part in form.names}
        found: dict[str, list[Stored]] = {}
        for name in self._file.tensors:
            target = owner.get(name)
            if target is not None and target not in found:
                parts = self._forms[target].names
                if all(part in self._file.tensors for part in parts):
                    found[target] = [self._file.tensors[part] for part in parts]
        return found

    def value(self, target: str, tensors: list[Stored], device: torch.device | str) -> Tensor:
        """Return a parameter from its tensors.

        Blocks are decoded to float32. Matrices of 16-bit types keep their type.

        Args:
            target: The parameter.
            tensors: Its tensors.
            device: Device to decode the blocks of matrices on; other values are on the CPU.

        Raises:
            CheckpointError: If the file ends early.
        """
        form = self._forms[target]
        kind = tensors[0].kind
        as_blocks = form.moves_rows and all(
            tensor.kind == kind and _has_rows_of_blocks(tensor) for tensor in tensors
        )
        if not as_blocks:
            return form.join([self._file.tensor(tensor) for tensor in tensors]).contiguous()
        # As blocks, a matrix is a quarter as large to move, and can be decoded on a GPU.
        raw = form.join([torch.from_numpy(self._file.raw(tensor)) for tensor in tensors])
        block, nbytes = GGML_QUANT_SIZES[kind]
        shape = (*raw.shape[:-1], raw.shape[-1] // nbytes * block)
        return decode(raw.contiguous().to(device).view(-1), kind).view(shape)

    def packed_experts(
        self, target: str, tensors: list[Stored], device: torch.device | str
    ) -> MXFP4Weight:
        """Return the experts [experts, out, in] of gpt-oss whose ``tensors`` are in MXFP4.

        Raises:
            CheckpointError: If the file ends early, or a scale makes weights infinite or NaN.
        """
        raw = [torch.from_numpy(self._file.raw(tensor)) for tensor in tensors]
        # Rows of blocks for rows of numbers, which transformers has as columns.
        blocks = self._forms[target].join(raw).mT
        return from_blocks(blocks.to(device), f"{self._file.path}: {tensors[0].name}")

    def misfits(self, expected: Mapping[str, Tensor]) -> list[str]:
        """Return which tensors have another shape than the model's parameters need.

        Args:
            expected: The model's parameters, on any device.
        """
        found = []
        for target, form in self._forms.items():
            stored = [self._file.tensors.get(name) for name in form.names]
            with foreign_reader(f"{self._file.path}: {target} has a shape that cannot be stored"):
                wanted = form.shapes(expected[target].shape)
            found += [
                f"{tensor.name} has the shape {list(tensor.shape)}, not {list(shape)}"
                for tensor, shape in zip(stored, wanted, strict=True)
                if tensor is not None and tensor.shape != shape
            ]
        return found


def _has_rows_of_blocks(tensor: Stored) -> bool:
    return len(tensor.shape) >= 2 and GGML_QUANT_SIZES[tensor.kind][0] > 1


def _require_decodable(file: GGUFFile) -> None:
    for kind in {tensor.kind for tensor in file.tensors.values()}:
        try:
            decode(torch.zeros(GGML_QUANT_SIZES[kind][1], dtype=torch.uint8), kind)
        except NotImplementedError:
            raise CheckpointError(
                f"{file.path} holds tensors of type {kind.name}, which the gguf package does "
                "not decode; use a file of another type, such as Q4_K_M or Q8_0"
            ) from None


def _require_places(
    file: GGUFFile, model: str, used: Iterable[Sequence[Stored]], known: bool
) -> None:
    """Check that every tensor of a file is used, and log it if it scales the rotary frequencies.

    Raises:
        CheckpointError: If the model has no place for a tensor.
    """
    names = {tensor.name for tensors in used for tensor in tensors}
    homeless = [name for name in file.tensors if name not in names]
    if not known:
        for name in _ROPE_TABLES & set(homeless):
            logger.warning(
                "%s scales its rotary frequencies (%s), which is not applied: long texts will "
                "come out worse than with the model's safetensors files",
                file.path,
                name,
            )
    homeless = [name for name in homeless if name not in _ROPE_TABLES]
    if homeless:
        raise CheckpointError(
            f"{file.path} holds tensors {model} has no place for: "
            f"{', '.join(homeless[:6])} ({len(homeless)} in all)"
        )


class GGUFSource(BaseSource):
    """A GGUF file as the source of a base model.

    Attributes:
        path: The file.
        file: Its header.

    Raises:
        CheckpointError: If the file is damaged, is of an architecture or a block type that
            transformers or the gguf package cannot read, or is not the whole model.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.name, self.file = name, GGUFFile(path)
        self.config = read_config(self.file)
        self.path = path
        self.skeleton = skeleton_of(self.config, name, len(self.file.tensors))
        known = row_of(self.file) is not None
        kind = TableArrangement if known else TransformersArrangement
        self._arrangement: Arrangement = kind(self.file, self.skeleton)
        self._parts = self._arrangement.parts()
        model = type(self.skeleton).__name__
        _require_places(self.file, model, self._parts.values(), known)
        _require_decodable(self.file)
        tied = self.skeleton.all_tied_weights_keys
        expected = self.skeleton.state_dict()
        parts = self._parts
        faults = [f"{key} is missing" for key in expected if key not in {*parts, *tied}]
        faults += self._arrangement.misfits(expected)
        if faults:
            raise CheckpointError(
                f"{path} is not the {type(self.skeleton).__name__} of its keys: "
                f"{'; '.join(faults[:4])} ({len(faults)} in all)"
            )
        mxfp4 = self._mxfp4 = {
            name
            for name, (_, transposed) in expert_parameters(self.skeleton).items()
            if transposed and known and {t.kind for t in parts[name]} == {Kind.MXFP4}
        }
        self.parameters = tuple(
            Parameter(
                key,
                tuple(expected[key].shape),
                torch.bfloat16 if key in mxfp4 else TORCH_DTYPES[held_as(tensors[0])],
                sum(tensor.nbytes for tensor in tensors),
                packed=key in mxfp4,
                mxfp4=key in mxfp4,
            )
            for key, tensors in parts.items()
        )
        kinds = {held_as(t) for t in self.file.tensors.values() if len(t.shape) > 1}
        self.dtype = torch.float16 if kinds == {np.float16} else torch.bfloat16

    def _files(self) -> Iterable[tuple[Path, int, int]]:
        return [(self.file.path, self.file.size, self.file.data_start)]

    def tensors(  # noqa: D102
        self, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[str, Tensor | PackedWeight | ExpertSlice]]:
        for name in self._parts:
            value = self._value(name, device)
            if name not in self.experts or not isinstance(value, Tensor):
                yield name, value
                continue
            for index, matrix in enumerate(value):
                yield name, ExpertSlice(index, matrix)

    def tensor(self, name: str) -> Tensor | PackedWeight:  # noqa: D102
        return self._value(name, "cpu")

    def _value(self, name: str, device: torch.device | str) -> Tensor | PackedWeight:
        if name in self._mxfp4 and isinstance(self._arrangement, TableArrangement):
            return self._arrangement.packed_experts(name, self._parts[name], device)
        return self._arrangement.value(name, self._parts[name], device)

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return read_tokenizer(self.file)
