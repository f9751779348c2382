"""The parameters of a base model, independent of the files they come from.

Opening a source reads headers only and checks everything: that the files contain every parameter of
the model once, under transformers' names, and nothing else. A mismatch is an error before the first
weight is read.
"""

import contextlib
import dataclasses
import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import (
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from halfbyte.checkpoint.mxfp4_keys import dense
from halfbyte.checkpoint.quantized_sources.cost import packing_error
from halfbyte.checkpoint.reading import read_into
from halfbyte.errors import CheckpointError
from halfbyte.layers.experts import expert_parameters
from halfbyte.layers.multimodal import build_whole, unknown_class, why_unsupported
from halfbyte.layers.targets import linears_to_freeze
from halfbyte.models.build import BaseRecipe
from halfbyte.models.rope_scaling import scale_rope
from halfbyte.quant import PackedWeight

DECODED_FROM = "halfbyte_decoded_from"
"""The field of ``config.json`` that says what a merged model's weights were decoded from."""

_SAMPLES, _SAMPLE_BYTES = 64, 4096

logger = logging.getLogger("halfbyte")


class Parameter(NamedTuple):
    """One parameter that a source will yield.

    Attributes:
        name: Its name in transformers.
        shape: Its shape in the model.
        dtype: Its dtype; for a packed weight, the one it was packed from.
        nbytes: Its bytes in the files.
        packed: Whether it is a ``QuantizedWeight`` or an ``MXFP4Weight``, or experts that are.
        mxfp4: Whether it is the latter: experts [experts, out, in], ``shape`` being transformers'.
        decoded: Whether the files hold it quantised in another way, and it is decoded when read.
        transposed: Whether files hold it transposed while it is not packed (`layers.conv1d`).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    packed: bool
    mxfp4: bool = False
    decoded: bool = False
    transposed: bool = False

    @property
    def shape_in_files(self) -> tuple[int, ...]:
        """Its shape in files while it is not packed."""
        return self.shape[::-1] if self.transposed else self.shape

    def turned(self, value: Tensor) -> Tensor:
        """Return a plain value in the form of files from the model's, or the other way around."""
        return value.t().contiguous() if self.transposed else value


class ExpertSlice(NamedTuple):
    """One expert's part of a parameter that holds a linear of every expert.

    Attributes:
        expert: Its index.
        value: Its matrix [rows, columns].
    """

    expert: int
    value: Tensor | PackedWeight


class BaseSource(ABC):
    """The parameters of a base model, independent of the file format.

    Attributes:
        name: The name given by the user.
        config: Its configuration, without any ``quantization_config``.
        skeleton: The model of transformers on the meta device: names and shapes, no memory.
        parameters: The parameters that ``tensors`` yields, in order.
        encoders: Those of a model of more than text that are not loaded. Only ``tensor`` reads
            them, to write them as they are.
        dtype: The dtype of a 16-bit copy of its matrices.
        chat_template: Used instead of the tokenizer's own, if set.
        rope_scaling: How rotary embeddings are scaled, other than in the files; see `scale_rope`.
        decoded_from: How the files are quantised, if weights are decoded when they are read.
        mxfp4_config: The ``quantization_config`` of files that have experts in MXFP4.
    """

    name: str
    config: PretrainedConfig
    skeleton: PreTrainedModel
    parameters: tuple[Parameter, ...]
    encoders: tuple[Parameter, ...] = ()
    dtype: torch.dtype
    chat_template: str | None = None
    rope_scaling: str | None = None
    decoded_from: str | None = None
    mxfp4_config: dict[str, Any] | None = None

    def scale_rope(self, wanted: str | None) -> None:
        """Scale rotary embeddings as `rope_scaling.scale_rope` does; None leaves them.

        Raises:
            ConfigError: See there.
        """
        if wanted is not None:
            scale_rope(self.config, wanted)
            self.rope_scaling = wanted

    @property
    def total_bytes(self) -> int:
        """Bytes of ``parameters`` in the files."""
        return sum(parameter.nbytes for parameter in self.parameters)

    @property
    def file_bytes(self) -> int:
        """Bytes of all tensors in the files."""
        return self.total_bytes + sum(parameter.nbytes for parameter in self.encoders)

    @property
    def left_out(self) -> str | None:
        """A sentence on what is not loaded, or None."""
        if not self.encoders:
            return None
        nbytes = self.file_bytes - self.total_bytes
        return (
            f"only the text decoder of {type(self.skeleton).__name__} is loaded; its encoders of "
            f"other inputs ({nbytes / 1e6:.1f} MB) are not, and do not change"
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over sizes, headers and 64 samples of 4 KiB of each file.

        Cheap, the same for a copy, and different for any other training run, which changes all
        weights; it may miss a few bytes changed by hand.
        """
        digest = hashlib.sha256()
        for path, size, data_start in self._files():
            digest.update(size.to_bytes(8, "little"))
            length = min(_SAMPLE_BYTES, size - data_start)
            last = size - data_start - length
            starts = [data_start + last * i // (_SAMPLES - 1) for i in range(_SAMPLES)]
            for start, count in [(0, data_start), *((start, length) for start in starts)]:
                buffer = bytearray(count)
                read_into(path, start, memoryview(buffer))
                digest.update(buffer)
        return digest.hexdigest()

    @abstractmethod
    def _files(self) -> Iterable[tuple[Path, int, int]]:
        """Yield (path, size, end of the header) of each file of weights."""

    @cached_property
    def experts(self) -> dict[str, int]:
        """The parameters that hold a linear of every expert, and the number of experts."""
        return {name: len(p) for name, (p, _) in expert_parameters(self.skeleton).items()}

    @abstractmethod
    def tensors(
        self, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[str, Tensor | PackedWeight | ExpertSlice]]:
        """Yield (name, value) as in ``parameters``, one at a time.

        Of ``experts``, an ``ExpertSlice`` is yielded for each expert, in order, instead of a value
        for all: together they are the largest tensors of a mixture. In MXFP4 they are one value.

        Nothing is kept: what the caller drops is freed. (``zip`` and ``enumerate`` hold their last
        item until they have the next.)

        Args:
            device: Target device. Tensors that are faster to read to it than to move are yielded on
                it, the others on the CPU.

        Raises:
            CheckpointError: If a file ends early, or a packed weight is damaged.
        """

    def bytes_read(self, name: str, value: Tensor | PackedWeight | ExpertSlice) -> int:
        """Return the bytes in the files of a value that ``tensors`` yielded; for progress."""
        nbytes = self._bytes[name]
        if not isinstance(value, ExpertSlice):
            return nbytes
        count = self.experts[name]  # in all it is nbytes, which tables may make an odd number
        return nbytes * (value.expert + 1) // count - nbytes * value.expert // count

    @cached_property
    def _bytes(self) -> dict[str, int]:
        return {p.name: p.nbytes for p in (*self.parameters, *self.encoders)}

    @abstractmethod
    def tensor(self, name: str) -> Tensor | PackedWeight:
        """Return one value of ``parameters`` or ``encoders``, on the CPU, out of order.

        Experts are one tensor, decoded if they are packed, or one value in MXFP4.

        Raises:
            CheckpointError: If a file ends early, or a packed weight is damaged.
        """

    def matrices(self, name: str) -> Iterator[Tensor | PackedWeight]:
        """Yield the matrix of each expert of one of ``experts``; those in MXFP4 are decoded.

        Raises:
            CheckpointError: If a file ends early, or a packed weight is damaged.
        """
        yield from dense(self.tensor(name))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer, with ``chat_template`` if that is set.

        Raises:
            CheckpointError: If there is none, or it cannot be read.
        """
        found = self._tokenizer()
        if self.chat_template is not None:
            found.chat_template = self.chat_template
        return found

    @abstractmethod
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer of the files; see ``tokenizer``."""

    def generation_config(self) -> GenerationConfig | None:
        """Return the defaults for generation that came with the model, if any."""
        return None

    def processor_files(self) -> list[Path]:
        """Return the files that describe how images and sound are prepared for the encoders."""
        return []

    def fitted(self, recipe: BaseRecipe) -> BaseRecipe:
        """Return ``recipe`` adapted to this model; changes are logged.

        Experts in MXFP4 stay so, unless nothing is to be packed.
        """
        if not any(parameter.mxfp4 for parameter in self.parameters):
            return recipe
        kept = recipe.quant != "none"
        what = "they are used as they are" if kept else "they are decoded"
        logger.warning("the experts of %s are in MXFP4; %s", self.name, what)
        return dataclasses.replace(recipe, experts="mxfp4") if kept else recipe


# What configurations call the number of layers.
_LAYERS = ("num_hidden_layers", "depth")

# Exceptions of transformers for invalid files, which it reads without checking.
_FOREIGN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


@contextlib.contextmanager
def foreign_reader(trouble: str) -> Iterator[None]:
    """Convert exceptions of a library that reads the user's files into errors about the files.

    Raises:
        CheckpointError: ``trouble``, and the message of the library.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        # The tokenizers library raises plain Exception.
        if not isinstance(error, _FOREIGN) and type(error) is not Exception:
            raise
        if "trust_remote_code" in str(error):  # transformers' advice, which cannot be followed here
            raise CheckpointError(
                f"{trouble}: it needs Python code of its own (`auto_map`), and halfbyte never runs "
                "code that comes with a model. Use a model of a family that transformers itself has"
            ) from error
        raise CheckpointError(f"{trouble}: {error}") from error


def warn_of_packing_again(source: BaseSource, recipe: BaseRecipe) -> None:
    """Warn if weights that were decoded from another quantisation are to be packed, or held so.

    Where they were decoded from 4 bits and then changed by an adapter, its update is mostly less
    than half the distance between two levels: packing rounds it away, and with it the effect of
    training.
    """
    if source.decoded_from is not None and not recipe.quant_search:
        logger.warning("%s", _cost_of_decoding(source, source.decoded_from, recipe))
    was = getattr(source.config, DECODED_FROM, None)
    packed = any(parameter.packed for parameter in source.parameters)
    # A search first loads the model without searching, which warns.
    if was is None or packed or recipe.quant == "none" or recipe.quant_search:
        return
    logger.warning(
        "%s is an adapter merged into weights decoded from %s. Packing it in %s again rounds most "
        "of what was trained away: use it with --quant none, or pack the base that the adapter was "
        "trained on",
        source.name,
        was,
        recipe.quant,
    )


def _cost_of_decoding(source: BaseSource, method: str, recipe: BaseRecipe) -> str:
    """Return a sentence on a model whose files are quantised in another way than ours."""
    quantised = f"{source.name} is quantised: {method}"
    if recipe.quant == "none":
        return (
            f"{quantised}. It is decoded and held in 16 or 32 bits: the weights of its files, up "
            "to rounding"
        )
    head, frozen = source.skeleton.get_output_embeddings(), linears_to_freeze(source.skeleton)
    linears = {f"{path}.weight" for path, linear in frozen.items() if linear is not head}
    names = [p.name for p in source.parameters if p.decoded and p.name in linears]
    measured = ""
    if names:
        error = packing_error(names, source.tensor, recipe)
        measured = (
            f", with a relative error of {100 * error:.1f} %, measured on a few of its weights"
        )
    return (
        f"{quantised}. It is decoded and packed in {recipe.quant}{measured}. The base of an "
        "adapter trained on it is then not exactly the model in its files; --quant none trains on "
        "their weights, decoded"
    )


def skeleton_of(config: PretrainedConfig, name: str, tensors: int) -> PreTrainedModel:
    """Return the whole model of ``config`` on the meta device, encoders included.

    Args:
        config: Its configuration.
        name: Its name in error messages.
        tensors: Number of tensors in the files; models with more layers are rejected early.

    Raises:
        CheckpointError: If it is not supported, or transformers cannot build it.
    """
    if reason := why_unsupported(config):
        raise CheckpointError(f"{name} cannot be used: {reason}")
    with foreign_reader(f"{name} is not a causal language model that transformers can build"):
        parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
        counts = [getattr(part, name, 0) for part in parts for name in _LAYERS]
        layers = max(count for count in counts if isinstance(count, int))
        if layers > tensors:
            raise CheckpointError(f"{name} should have {layers} layers, and has {tensors} tensors")
        model = build_whole(config)
    if unknown := unknown_class(config):
        logger.warning(
            "%s: its config.json names the class %s, which this transformers does not have; it is "
            "read as %s",
            name,
            unknown,
            type(model).__name__,
        )
    return model
