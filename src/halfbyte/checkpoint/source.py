"""The parameters of a base model, independent of the files they come from.

Opening a source reads headers only and checks everything: that the files contain every parameter of
the model once, under transformers' names, and nothing else. A mismatch is an error before the first
weight is read.
"""

import contextlib
import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import (
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from halfbyte.checkpoint.reading import read_into
from halfbyte.errors import CheckpointError
from halfbyte.layers.multimodal import build_whole, unknown_class, why_unsupported
from halfbyte.models.build import BaseRecipe
from halfbyte.quant import QuantizedWeight

DECODED_FROM = "halfbyte_decoded_from"
"""The field of ``config.json`` with the former 4-bit type of a merged model's weights."""

_SAMPLES, _SAMPLE_BYTES = 64, 4096

logger = logging.getLogger("halfbyte")


class Parameter(NamedTuple):
    """One parameter that a source will yield.

    Attributes:
        name: Its name in transformers.
        shape: Its shape in the model.
        dtype: Its dtype; for a packed weight, the one it was packed from.
        nbytes: Its bytes in the files.
        packed: Whether it is a ``QuantizedWeight``.
        transposed: Whether files hold it transposed while it is not packed (`layers.conv1d`).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    packed: bool
    transposed: bool = False

    @property
    def shape_in_files(self) -> tuple[int, ...]:
        """Its shape in files while it is not packed."""
        return self.shape[::-1] if self.transposed else self.shape

    def turned(self, value: Tensor) -> Tensor:
        """Return a plain value in the form of files from the model's, or the other way around."""
        return value.t().contiguous() if self.transposed else value


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
    """

    name: str
    config: PretrainedConfig
    skeleton: PreTrainedModel
    parameters: tuple[Parameter, ...]
    encoders: tuple[Parameter, ...] = ()
    dtype: torch.dtype
    chat_template: str | None = None

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

    @abstractmethod
    def tensors(
        self, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
        """Yield (name, value) as in ``parameters``, one at a time.

        Nothing is kept: what the caller drops is freed. (``zip`` and ``enumerate`` hold their last
        item until they have the next.)

        Args:
            device: Target device. Tensors that are faster to read to it than to move are yielded on
                it, the others on the CPU.

        Raises:
            CheckpointError: If a file ends early, or a packed weight is damaged.
        """

    @abstractmethod
    def tensor(self, name: str) -> Tensor | QuantizedWeight:
        """Return one value of ``parameters`` or ``encoders``, on the CPU, out of order.

        Raises:
            CheckpointError: If a file ends early, or a packed weight is damaged.
        """

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
        """Return ``recipe`` adapted to this model."""
        return recipe


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
    """Warn if weights that were decoded from 4 bits and then changed are to be packed.

    The update of an adapter is mostly less than half the distance between two levels: packing
    rounds it away, and with it the effect of training.
    """
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
