"""A model in a directory, as written by ``save_pretrained``: plain, or packed by bitsandbytes.

Names of older or other layouts are translated by transformers' own tables, and what it stores in
another form (experts one by one) is converted as it does (conversion.py).
"""

import contextlib
import copy
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from halfbyte.checkpoint.bitsandbytes_keys import decode_keys, packed_weights
from halfbyte.checkpoint.content_parts import taking_text
from halfbyte.checkpoint.conversion import Conversion, empty_like, settle_keys
from halfbyte.checkpoint.reading import read_into, read_json
from halfbyte.checkpoint.safetensors_file import INDEX_NAME, Entry, SafetensorsFile
from halfbyte.checkpoint.source import BaseSource, Parameter, foreign_reader, skeleton_of
from halfbyte.checkpoint.staging import Request, read_to_device
from halfbyte.errors import CheckpointError
from halfbyte.foreign_text import quote
from halfbyte.layers.conv1d import conv1d_weights
from halfbyte.layers.multimodal import remove_encoders
from halfbyte.models.build import BaseRecipe
from halfbyte.quant import QuantizedWeight
from halfbyte.version import VERSION_KEY, __version__

# Buffers of older transformers, which are computed today: in files, but not part of the model.
_OBSOLETE = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")

# Of a processor, which prepares images and sound; its tokenizer is written anew.
_PROCESSOR = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)

# Maximum token id: libraries allocate a table up to the largest id, however few tokens there are;
# the largest vocabularies have 2**18.
_MAX_TOKENS = 2**24

logger = logging.getLogger("halfbyte")


class DirectorySource(BaseSource):
    """A directory of ``config.json``, safetensors files and a tokenizer.

    Raises:
        CheckpointError: If a file is missing or damaged, or the files are not the model.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self.name, self._directory = name, directory
        require_files(directory)
        self.config = read_config(directory)
        self._shards, self._homes = _open_shards(directory)
        self.skeleton = skeleton_of(self.config, name, len(self._homes))
        self._expected = self.skeleton.state_dict()
        self._packed = packed_weights(self._homes)
        members = {key for owner, keys in self._packed.items() for key in keys if key != owner}
        self._stored = self._settle([key for key in self._homes if key not in members])
        self._found = {name: self._parameter(name) for name in self._stored}
        remove_encoders(self.skeleton)
        loaded = self.skeleton.state_dict().keys()
        self.parameters = tuple(p for name, p in self._found.items() if name in loaded)
        self.encoders = tuple(p for name, p in self._found.items() if name not in loaded)
        sizes: Counter[torch.dtype] = Counter()
        for parameter in self.parameters:
            if len(parameter.shape) > 1 and parameter.dtype.is_floating_point:
                sizes[parameter.dtype] += parameter.nbytes
        self.dtype = sizes.most_common(1)[0][0] if sizes else torch.bfloat16

    def _entry(self, key: str) -> Entry:
        return self._homes[key].entries[key]

    def _parameter(self, name: str) -> Parameter:
        stored, expected = self._stored[name], self._expected[name]
        shape, packed = tuple(expected.shape), stored in self._packed
        if isinstance(stored, Conversion):
            where, came = stored.keys[0][0], stored.outputs[name]
            home, came_shape, dtype = self._homes[where].path, tuple(came.shape), came.dtype
            nbytes = came.nbytes
        else:
            where, entry = stored, self._entry(stored)
            home, came_shape, dtype = self._homes[where].path, entry.shape, entry.dtype
            nbytes = sum(self._entry(member).nbytes for member in self._packed.get(where, [where]))
        found = Parameter(name, shape, dtype, nbytes, packed, name in conv1d_weights(self.skeleton))
        if not packed and came_shape != found.shape_in_files:
            raise CheckpointError(
                f"{home}: {where} has shape {list(came_shape)}, the configuration "
                f"requires {list(found.shape_in_files)}; is config.json of another model?"
            )
        if not packed and dtype.is_floating_point != expected.is_floating_point():
            raise CheckpointError(
                f"{home}: {where} is {dtype}, expected are "
                f"{'floating' if expected.is_floating_point() else 'whole'} numbers; is it "
                "quantised in a way that config.json does not mention?"
            )
        return found

    def _settle(self, keys: list[str]) -> dict[str, str | Conversion]:
        """Return, for each parameter of the model, its key in the files, or how it is made.

        Raises:
            CheckpointError: If a parameter is missing or duplicate, or a key is no parameter.
        """
        model, expected = self.skeleton, self._expected
        found = settle_keys(model, expected, keys)
        obsolete = [*_OBSOLETE, *(model._keys_to_ignore_on_load_unexpected or ())]
        faults = [f"{key}: the same parameter as {other}" for key, other in found.duplicates]
        faults += [
            f"{key}: unknown to {type(model).__name__}"
            for key in found.unknown
            if not any(re.search(pattern, key) for pattern in obsolete)
        ]
        tied = self._settle_ties(found.keys)
        settled: dict[str, str | Conversion] = {**found.keys}
        for conversion in found.conversions:
            for name in self._infer(conversion):
                if name in settled or name not in expected:
                    faults.append(f"{conversion.keys[0][0]}: becomes {name}, which is no parameter")
                settled[name] = conversion
        optional = model._keys_to_ignore_on_load_missing or ()
        faults += [
            f"{name}: missing"
            for name in expected
            if name not in settled
            and name not in tied
            and not any(re.search(pattern, name) for pattern in optional)
        ]
        if faults:
            more = f"\n  … and {len(faults) - 8} more" if len(faults) > 8 else ""
            raise CheckpointError(
                f"the weights in {self._directory} are not those of its config.json "
                f"({type(model).__name__}):\n  " + "\n  ".join(faults[:8]) + more
            )
        return settled

    def _infer(self, conversion: Conversion) -> Iterable[str]:
        """Return the names of the parameters that a conversion makes."""
        for key, _ in conversion.keys:
            if key in self._packed:
                raise CheckpointError(
                    f"{self._homes[key].path}: {key} is packed in 4 bits, and {conversion.target} "
                    "is made of it in 16 bits alone; use the model it was made from"
                )
        entries = {key: self._entry(key) for key, _ in conversion.keys}
        conversion.infer(
            self.skeleton, lambda key: empty_like(entries[key].shape, entries[key].dtype)
        )
        return conversion.outputs

    def _settle_ties(self, settled: dict[str, str]) -> set[str]:
        """Drop parameters tied to another one from ``settled``; return all tied names."""
        tied: dict[str, str] = self.skeleton.all_tied_weights_keys
        for target, source in tied.items():
            if target in settled and source not in settled:
                settled[source] = settled.pop(target)
            elif target in settled and self._equal(settled[target], settled[source]):
                del settled[target]
            elif target in settled:
                logger.warning(
                    "%s: config.json ties %s to %s, but the files hold two different tensors; "
                    "both are loaded",
                    self.name,
                    target,
                    source,
                )
        return set(tied)

    def _equal(self, one: str, other: str) -> bool:
        a, b = self._entry(one), self._entry(other)
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        for start in range(0, a.nbytes, 2**20):
            count = min(2**20, a.nbytes - start)
            pieces = [bytearray(count), bytearray(count)]
            for key, entry, piece in ((one, a, pieces[0]), (other, b, pieces[1])):
                read_into(self._homes[key].path, entry.start + start, memoryview(piece))
            if pieces[0] != pieces[1]:
                return False
        return True

    def _files(self) -> Iterable[tuple[Path, int, int]]:
        return [(shard.path, shard.size, shard.data_start) for shard in self._shards]

    def _read(self, key: str) -> Tensor | QuantizedWeight:
        if key in self._packed:
            members = {member: self._homes[member].read(member) for member in self._packed[key]}
            return decode_keys(key, members)
        return self._homes[key].read(key)

    def _request(self, key: str) -> Request:
        entry = self._entry(key)
        return Request(self._homes[key].path, entry.start, entry.nbytes, entry.dtype, entry.shape)

    def tensors(  # noqa: D102
        self, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
        device = torch.device(device)
        stored_of = {parameter.name: self._stored[parameter.name] for parameter in self.parameters}
        staged: list[str] = []
        if device.type != "cpu":
            # A packed weight is a quarter of the bytes, and its JSON and tables are needed here.
            plain = (key for key in stored_of.values() if isinstance(key, str))
            staged = [key for key in plain if key not in self._packed]
        ahead = set(staged)
        made: dict[str, Tensor] = {}
        with contextlib.closing(read_to_device(list(map(self._request, staged)), device)) as stream:
            for name, stored in stored_of.items():
                if isinstance(stored, str):
                    yield (
                        name,
                        self._in_model(
                            name, next(stream) if stored in ahead else self._read(stored)
                        ),
                    )
                    continue
                if name not in made:
                    made = self._convert(stored)
                yield name, made.pop(name)

    def tensor(self, name: str) -> Tensor | QuantizedWeight:  # noqa: D102
        stored = self._stored[name]
        if isinstance(stored, str):
            return self._in_model(name, self._read(stored))
        return self._convert(stored)[name]

    def _in_model(self, name: str, value: Tensor | QuantizedWeight) -> Tensor | QuantizedWeight:
        parameter = self._found[name]
        return parameter.turned(value) if isinstance(value, Tensor) else value

    def _convert(self, conversion: Conversion) -> dict[str, Tensor]:
        return conversion.apply(self.skeleton, lambda key: self._homes[key].read(key))

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return read_tokenizer(self._directory, self.name)

    def generation_config(self) -> GenerationConfig | None:  # noqa: D102
        if not (self._directory / "generation_config.json").exists():
            return None
        with foreign_reader(f"{self._directory}: generation_config.json cannot be read"):
            return GenerationConfig.from_pretrained(self._directory)

    def processor_files(self) -> list[Path]:  # noqa: D102
        return [path for name in _PROCESSOR if (path := self._directory / name).is_file()]

    def fitted(self, recipe: BaseRecipe) -> BaseRecipe:
        """Return ``recipe`` with the packing of the files, if packed; changes are logged."""
        packed = [parameter.name for parameter in self.parameters if parameter.packed]
        if not packed:
            return recipe
        first = self.tensor(packed[0])
        owners = [self.skeleton.get_submodule(name.removesuffix(".weight")) for name in packed]
        embedding, head = (
            self.skeleton.get_input_embeddings(),
            self.skeleton.get_output_embeddings(),
        )
        assert isinstance(first, QuantizedWeight)
        if recipe.quant == "none":
            logger.warning(
                "%s is packed in 4 bits (%s); it is decoded", self.name, first.quant_type
            )
            return recipe
        files = replace(
            recipe,
            quant=first.quant_type,
            block_size=first.block_size,
            double_quant=first.double_quant,
        )
        if files != recipe:
            logger.warning(
                "%s is already packed and is used as it is: %s, blocks of %d, double "
                "quantisation %s",
                self.name,
                first.quant_type,
                first.block_size,
                "on" if first.double_quant else "off",
            )
        return replace(
            files,
            quantize_head=recipe.quantize_head or any(o is head for o in owners),
            quantize_embeddings=recipe.quantize_embeddings or any(o is embedding for o in owners),
        )


def require_files(directory: Path) -> None:
    """Check that no entry is a pipe or a device, before transformers opens any: it would wait.

    Raises:
        CheckpointError: An entry is, or the directory cannot be read.
    """
    try:
        entries = list(directory.iterdir())
    except OSError as error:
        raise CheckpointError(f"cannot read {directory}: {error.strerror}") from error
    for entry in entries:
        if entry.exists() and not entry.is_file() and not entry.is_dir():
            raise CheckpointError(f"{entry} is a pipe, a socket or a device; expected a file")


def read_tokenizer(directory: Path, name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a directory, with a template that takes text.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    with foreign_reader(f"{directory} has no tokenizer that transformers can read"):
        found = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        if (last := max(found.get_vocab().values(), default=0)) >= _MAX_TOKENS:
            raise CheckpointError(f"{directory}: its tokenizer has a token number {last}")
        found("a")  # some damage shows in use alone
        for kind in ("bos", "eos", "unk", "pad"):
            getattr(found, f"{kind}_token_id")
    _take_template(found, directory, name)
    return found


def _take_template(tokenizer: PreTrainedTokenizerBase, directory: Path, name: str) -> None:
    """Give a tokenizer the processor's template if it has none, and have it take text."""
    path = directory / "chat_template.json"
    if tokenizer.chat_template is None and path.is_file():
        template = read_json(path, "a processor's template").get("chat_template")
        tokenizer.chat_template = template if isinstance(template, str) else None
    given = tokenizer.chat_template
    if isinstance(given, str) and (able := taking_text(given)) != given:
        tokenizer.chat_template = able
        logger.warning(
            "%s: its chat template loops over the parts of a message and would drop text; it "
            "is extended to take text as one part, and is saved so",
            name,
        )


def read_config(directory: Path) -> PretrainedConfig:
    """Return the configuration, its ``quantization_config`` checked and taken off.

    Raises:
        CheckpointError: There is none, or it is not that of a model that can be loaded.
    """
    if not (directory / "config.json").exists():
        if (directory / "adapter_config.json").exists():
            raise CheckpointError(
                f"{directory} is an adapter, not a model; give it as the adapter, and the model "
                "it was trained on as the model"
            )
        raise CheckpointError(f"{directory} is not a model: it has no config.json")
    with foreign_reader(f"{directory}: transformers cannot read config.json"):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    packing = getattr(config, "quantization_config", None)
    if packing is not None:
        if not isinstance(packing, dict) or not packing.get("load_in_4bit"):
            method = packing.get("quant_method") if isinstance(packing, dict) else packing
            raise CheckpointError(
                f"{directory} is quantised by {quote(method)}; of quantised models only "
                "bitsandbytes' 4-bit ones are supported. Use the model it was made from"
            )
        del config.quantization_config
    return config


def write_description(
    directory: Path,
    config: PretrainedConfig,
    *,
    model_class: str,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig | None,
    processor: Iterable[Path] = (),
    packing: dict[str, Any] | None = None,
) -> None:
    """Write everything in a model's directory except the weights.

    Args:
        directory: It must exist.
        config: Its configuration; not changed.
        model_class: Name of its class in transformers.
        dtype: dtype of its weights (if packed: after decoding).
        tokenizer: Its tokenizer.
        generation_config: Its defaults for generation.
        processor: Files to copy, see ``BaseSource.processor_files``.
        packing: ``quantization_config``, if its weights are packed.

    Raises:
        OSError: If the directory cannot be written.
    """
    described = copy.deepcopy(config)
    described.architectures = [model_class]
    setattr(described, VERSION_KEY, __version__)
    described.dtype = dtype
    if packing is not None:
        described.quantization_config = packing
    described.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    for path in processor:
        (directory / path.name).write_bytes(path.read_bytes())
    if generation_config is not None:
        generation_config.to_json_file(directory / "generation_config.json")


def _open_shards(directory: Path) -> tuple[list[SafetensorsFile], dict[str, SafetensorsFile]]:
    """Return the files of weights, and the file of each key."""
    weight_map: dict[str, str] = {}
    if (directory / INDEX_NAME).exists():
        index = read_json(directory / INDEX_NAME, "it names the shards").get("weight_map")
        if not isinstance(index, dict) or not all(
            isinstance(name, str) and name.isprintable() and Path(name).name == name
            for name in index.values()
        ):
            raise CheckpointError(f"{directory / INDEX_NAME} has no weight_map of file names")
        weight_map = index
        paths = [directory / name for name in sorted(set(weight_map.values()))]
    elif (directory / "model.safetensors").exists():
        paths = [directory / "model.safetensors"]
    else:
        paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        pickles = sorted(path.name for path in directory.glob("*.bin"))
        raise CheckpointError(
            f"{directory} has no safetensors files"
            + (
                f", only pickles ({', '.join(pickles[:3])}), which can run code and are not read; "
                "convert them with transformers: save_pretrained(…)"
                if pickles
                else ""
            )
        )
    shards = [SafetensorsFile(path) for path in paths]
    homes: dict[str, SafetensorsFile] = {}
    for shard in shards:
        for key in shard.entries:
            if key in homes:
                raise CheckpointError(f"{key} is in {homes[key].path} and in {shard.path}")
            homes[key] = shard
    for key, name in weight_map.items():
        if key not in homes or homes[key].path.name != name:
            raise CheckpointError(
                f"{directory / name} lacks {key}, which {INDEX_NAME} says it has; "
                "download or copy the directory again"
            )
    return shards, homes
