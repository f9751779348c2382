"""Opens a base model: a directory, a GGUF file, or a model of the hub.

``open_base`` reads headers and checks that the files are those of the model. ``load_base`` passes
one tensor after another to ``models.build``, which packs it immediately, so only one tensor exists
in addition to the model.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.checkpoint import directory, gguf
from halfbyte.checkpoint.directory import DirectorySource
from halfbyte.checkpoint.gguf import GGUFSource
from halfbyte.checkpoint.gguf_file import GGUFFile
from halfbyte.checkpoint.mxfp4_keys import dense
from halfbyte.checkpoint.source import BaseSource, ExpertSlice, warn_of_packing_again
from halfbyte.errors import CheckpointError
from halfbyte.layers.experts import expert_parameters
from halfbyte.linear.layer_store import HostLayers
from halfbyte.linear.layer_stream import LayerWeights
from halfbyte.models.build import (
    BaseRecipe,
    MemoryReport,
    build,
    finalize,
    frozen_linears,
    load_expert,
    load_tensor,
    place_quantized,
    stream_layers,
)
from halfbyte.models.calibration import input_moments
from halfbyte.quant import MXFP4Weight

__all__ = [
    "BaseSource",
    "LoadedBase",
    "Vocabulary",
    "importances",
    "is_hub_id",
    "load_base",
    "open_base",
    "open_vocabulary",
]

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# Below the model's directory are the same weights in another form, as large (gpt-oss: original/).
_NOT_FILES = ["*/*.safetensors"]

logger = logging.getLogger("halfbyte")


# Maps a source, a recipe and a progress callback to a packed copy.
PackedCopy = Callable[[BaseSource, BaseRecipe, Callable[[int, int], None] | None], BaseSource]

# Maps the layout of layers and the device to where their weights wait.
LayerStore = Callable[[list[LayerWeights], str], HostLayers]


class LoadedBase(NamedTuple):
    """A base model in memory.

    Attributes:
        model: The model, packed according to the recipe.
        tokenizer: Its tokenizer.
        memory_report: The memory of the model.
        fingerprint: ``BaseSource.fingerprint`` of its files.
        name: The name given by the user.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    memory_report: MemoryReport
    fingerprint: str
    name: str


def open_base(source: str | Path, *, revision: str | None = None) -> BaseSource:
    """Open a base model; only headers are read (and files downloaded, if it is on the hub).

    Args:
        source: A directory with ``config.json`` and safetensors files (plain, or packed in 4 bits
            by bitsandbytes), a GGUF file or a directory with one, or the id of a model on the
            Hugging Face hub.
        revision: Branch, tag or commit, for a model of the hub.

    Raises:
        CheckpointError: If there is no such model, a file is damaged, or the files are not the
            model their configuration describes.
    """
    path = _locate(source, revision, _HUB_FILES)
    return GGUFSource(path, str(source)) if path.is_file() else DirectorySource(path, str(source))


class Vocabulary(NamedTuple):
    """What turns text into tokens, without a model.

    Attributes:
        tokenizer: The tokenizer, with its chat template.
        positions: Positions that the model was made for, if its configuration says so.
    """

    tokenizer: PreTrainedTokenizerBase
    positions: int | None


def open_vocabulary(source: str | Path, *, revision: str | None = None) -> Vocabulary:
    """Open only the tokenizer and the configuration of a model: no file of weights is needed.

    Args:
        source: As in ``open_base``; a directory may have a tokenizer alone. Of a hub model, files
            of weights are not downloaded.
        revision: Branch, tag or commit, for a model of the hub.

    Raises:
        CheckpointError: If there is no such model, or a file that is read is damaged.
    """
    weights = "*.safetensors"
    path = _locate(source, revision, [name for name in _HUB_FILES if name != weights])
    config: PretrainedConfig | None = None
    if path.is_file():
        file = GGUFFile(path)
        tokenizer, config = gguf.read_tokenizer(file), gguf.read_config(file)
    else:
        directory.require_files(path)
        tokenizer = directory.read_tokenizer(path, str(source))
        if (path / "config.json").exists():
            config = directory.read_config(path)
    text = config.get_text_config() if config is not None else None
    positions = getattr(text, "max_position_embeddings", None)
    return Vocabulary(tokenizer, positions if isinstance(positions, int) else None)


def _locate(source: str | Path, revision: str | None, patterns: list[str]) -> Path:
    """Return the GGUF file or the directory of a model, downloaded if it is on the hub."""
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix == ".safetensors":
            raise CheckpointError(f"{path} is a file of weights; give its directory, {path.parent}")
        return path
    if path.exists() and not path.is_dir():
        raise CheckpointError(
            f"{path} is neither a directory nor a file, but a pipe, a socket or a device: expected "
            "a model's directory, or a GGUF file"
        )
    if not path.is_dir():
        path = _download(str(source), revision, patterns)
    if (path / "config.json").exists() or not (files := sorted(path.glob("*.gguf"))):
        return path
    if len(files) > 1:
        raise CheckpointError(f"{path} has {len(files)} GGUF files; give one, such as {files[0]}")
    return files[0]


def is_hub_id(name: str) -> bool:
    """Return whether ``name`` can be a model of the hub: ``model`` or ``owner/model``."""
    return bool(_HUB_ID.fullmatch(name)) and not name.endswith(".gguf")


def _download(name: str, revision: str | None, patterns: list[str]) -> Path:
    if not is_hub_id(name):
        raise CheckpointError(f"{name} does not exist: there is no such directory or GGUF file")
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=patterns, ignore_patterns=_NOT_FILES
            )
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} is no local directory or file, and not available on the Hugging Face hub: "
            f"{error}"
        ) from error


def load_base(
    source: str | Path | BaseSource,
    recipe: BaseRecipe,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Callable[[int, int], None] | None = None,
    packed_copy: PackedCopy | None = None,
    store: LayerStore | None = None,
) -> LoadedBase:
    """Load a base model, packing each tensor as it is read.

    In addition to the model, memory holds one tensor of the files (GGUF blocks decoded to float32;
    of the experts of a layer, one expert's), and temporaries of packing it. On a GPU this is GPU
    memory; host memory holds the ring of ``staging`` for files of plain tensors, and one tensor of
    others.

    Args:
        source: An argument or the result of ``open_base``.
        recipe: How to store it. Files that are already packed stay unchanged, which is logged.
        tokenizer: The source's tokenizer, if it has been read before.
        progress: Called with (bytes read, total bytes) after each tensor.
        packed_copy: Returns a source of packed weights to read instead of the source, such as
            ``checkpoint.cache.cached``.
        store: Where the frozen weights of layers wait, if not on the device; see
            `models.build.stream_layers`.

    Raises:
        CheckpointError: See ``open_base``; also if there is no tokenizer.
        ConfigError: With ``store``, if the layers of the model cannot be told apart.
        WeightError: If a weight contains NaN or infinity.
    """
    if not isinstance(source, BaseSource):
        source = open_base(source)
    tokenizer = tokenizer or source.tokenizer()
    recipe = source.fitted(recipe)
    warn_of_packing_again(source, recipe)
    model = build(source.config, recipe, plain=_left_plain(source, recipe))
    if store is not None:
        stream_layers(model, store)
    files = source
    if packed_copy is not None:
        files = packed_copy(source, model.halfbyte_recipe, progress)
    linears = {f"{path}.weight" for path in frozen_linears(model)}
    importance = importances(files, model.halfbyte_recipe)
    done, total = 0, files.total_bytes
    for name, value in files.tensors(recipe.device):
        done += files.bytes_read(name, value)
        if isinstance(value, ExpertSlice):
            load_expert(model, name, *value)
        elif isinstance(value, Tensor):
            load_tensor(model, name, value, importance.get(name))
        elif recipe.quant != "none" and (name in linears or isinstance(value, MXFP4Weight)):
            place_quantized(model, name, value)
        else:
            load_tensor(model, name, dense(value))
        del value  # freed before the next one is read
        if progress is not None:
            progress(done, total)
    defaults = source.generation_config()
    if defaults is not None:
        model.generation_config = defaults
    return LoadedBase(model, tokenizer, finalize(model), source.fingerprint, source.name)


def importances(source: BaseSource, recipe: BaseRecipe) -> dict[str, Tensor]:
    """Return the importance of errors in the columns of each linear, by its weight's name.

    The model is loaded once, packed without a search, to read the calibration text, and dropped.
    Empty if ``recipe`` does not search, or there is nothing to pack.

    Raises:
        CheckpointError: See ``open_base``.
        WeightError: If a weight contains NaN or infinity.
    """
    nothing = recipe.quant == "none" or any(parameter.packed for parameter in source.parameters)
    if nothing or not recipe.quant_search:
        return {}
    # In float32, so that the bytes do not depend on the compute dtype of a run.
    plain = replace(
        recipe,
        quant_search=False,
        quantize_head=False,
        quantize_embeddings=False,
        compute_dtype=torch.float32,
    )
    base = load_base(source, plain)
    return input_moments(base.model, base.tokenizer)


def _left_plain(source: BaseSource, recipe: BaseRecipe) -> list[str]:
    """Return the paths of linears that a packed model stores in 16 or 32 bits; they stay so.

    So do experts of a model that has others in MXFP4.
    """
    packed = any(parameter.packed for parameter in source.parameters)
    if not packed or recipe.quant == "none":
        return []
    linears = {
        f"{path}.weight": path
        for path, module in source.skeleton.named_modules()
        if isinstance(module, nn.Linear) and module is not source.skeleton.get_output_embeddings()
    }
    if recipe.experts is not None:
        linears |= {name: name for name in expert_parameters(source.skeleton)}
    plain = [linears[p.name] for p in source.parameters if p.name in linears and not p.packed]
    if plain:
        logger.warning(
            "%s is packed, except for %d of its linear layers, which stay in 16 or 32 bits: %s",
            source.name,
            len(plain),
            ", ".join(plain[:4]),
        )
    return plain
