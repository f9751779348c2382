"""A model's directory as ``save_pretrained`` writes it: plain, in bitsandbytes' 4 bits, or MXFP4.

Names of older or other layouts are translated by transformers' own tables, and what it stores in
another form (experts one by one) is converted as it does (conversion.py).
"""

import copy
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
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

from halfbyte.checkpoint.bitsandbytes_experts import PackedExperts
from halfbyte.checkpoint.bitsandbytes_keys import decode_keys, packed_weights
from halfbyte.checkpoint.content_parts import taking_text
from halfbyte.checkpoint.conversion import Conversion, empty_like, find_experts, settle_keys
from halfbyte.checkpoint.mxfp4_keys import METHOD, decode_mxfp4, mxfp4_weights, stored_shapes
from halfbyte.checkpoint.quantized_sources import (
    DecodedFile,
    open_quantized,
    require_supported,
)
from halfbyte.checkpoint.reading import read_into, read_json
from halfbyte.checkpoint.safetensors_file import Entry
from halfbyte.checkpoint.shards import open_shards
from halfbyte.checkpoint.source import (
    BaseSource,
    ExpertSlice,
    Parameter,
    foreign_reader,
    skeleton_of,
)
from halfbyte.checkpoint.staging import Request
from halfbyte.checkpoint.steps import Step, Value, one_expert, values
from halfbyte.errors import CheckpointError
from halfbyte.layers.conv1d import conv1d_weights
from halfbyte.layers.experts import expert_parameters
from halfbyte.layers.multimodal import remove_encoders
from halfbyte.models.build import BaseRecipe
from halfbyte.quant import PackedWeight, QuantizedWeight, dequantize
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
        self.config, packing = _read_config(directory)
        self._shards, files = open_shards(directory)
        self._homes, self.decoded_from = open_quantized(
            directory, packing, files, self.config.dtype
        )
        self.skeleton = skeleton_of(self.config, name, len(self._homes))
        self._expected = self.skeleton.state_dict()
        self._packed = packed_weights(self._homes)
        self._mxfp4 = mxfp4_weights(self._homes)
        if self._mxfp4:
            self.mxfp4_config = _mxfp4_config(directory)
        owned = (self._packed | self._mxfp4).items()
        members = {key for owner, keys in owned for key in keys if key != owner}
        keys = [*self._homes, *self._mxfp4]
        self._stored = self._settle([key for key in keys if key not in members])
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
        if stored in self._mxfp4:
            return self._mxfp4_parameter(name)
        shape, packed = tuple(expected.shape), stored in self._packed
        decoded = self._is_decoded(stored)
        if isinstance(stored, Conversion):
            where, came = stored.keys[0][0], stored.outputs[name]
            home, came_shape, dtype = self._homes[where].path, tuple(came.shape), came.dtype
            nbytes = came.nbytes
        else:
            where, entry = stored, self._entry(stored)
            home, came_shape, dtype = self._homes[where].path, entry.shape, entry.dtype
            nbytes = sum(self._entry(member).nbytes for member in self._packed.get(where, [where]))
        turned = name in conv1d_weights(self.skeleton)
        found = Parameter(name, shape, dtype, nbytes, packed, False, decoded, turned)
        if not packed and came_shape != found.shape_in_files:
            raise CheckpointError(
                f"{home}: {where} has shape {list(came_shape)}, the configuration "
                f"requires {list(found.shape_in_files)}; is config.json of another model?"
            )
        if decoded and turned:
            raise CheckpointError(
                f"{home}: {where} is quantised, and of a layer whose weights are transposed; that "
                "is not supported. Use the model it was made from"
            )
        kinds_differ = dtype.is_floating_point != expected.is_floating_point()
        if not packed and (kinds_differ or (dtype.is_floating_point and dtype.itemsize == 1)):
            raise CheckpointError(
                f"{home}: {where} is {dtype}, expected are "
                f"{'floating' if expected.is_floating_point() else 'whole'} numbers; is it "
                "quantised in a way that config.json does not mention?"
            )
        return found

    def _is_decoded(self, stored: str | Conversion) -> bool:
        """Return whether a key, or one that a conversion needs, is decoded when it is read."""
        keys = [stored] if isinstance(stored, str) else [key for key, _ in stored.keys]
        return any(isinstance(self._homes.get(key), DecodedFile) for key in keys)

    def _mxfp4_parameter(self, name: str) -> Parameter:
        keys = self._mxfp4[str(self._stored[name])]
        parameter, transposed = expert_parameters(self.skeleton).get(name, (None, False))
        if parameter is None or not transposed:
            raise CheckpointError(
                f"{self.name}: {name} is in MXFP4, which is supported for the experts of gpt-oss"
            )
        shape = tuple(parameter.shape)
        missing = [key for key in keys if key not in self._homes]
        if missing:
            raise CheckpointError(f"{self._directory}: {missing[0]} is missing")
        entries = [self._entry(key) for key in keys]
        try:
            expected = stored_shapes(shape)
        except ValueError as error:
            raise CheckpointError(f"{self.name}: {name} cannot be in MXFP4: {error}") from None
        for key, entry, expected_shape in zip(keys, entries, expected, strict=True):
            if (entry.dtype, entry.shape) != (torch.uint8, expected_shape):
                raise CheckpointError(
                    f"{self._homes[key].path}: {key} is {entry.dtype} {list(entry.shape)}, the "
                    f"configuration requires torch.uint8 {list(expected_shape)}"
                )
        nbytes = sum(entry.nbytes for entry in entries)
        return Parameter(name, shape, torch.bfloat16, nbytes, packed=True, mxfp4=True)

    def _settle(self, keys: list[str]) -> dict[str, str | Conversion]:
        """Return, for each parameter of the model, its key in the files, or how it is made.

        Raises:
            CheckpointError: If a parameter is missing or duplicate, or a key is no parameter.
        """
        model, expected = self.skeleton, self._expected
        # Packed experts have today's names, and are in no form that transformers converts.
        packed = {key: key for key in keys if key in self._packed and key in self.experts}
        found = settle_keys(model, expected, [key for key in keys if key not in packed])
        obsolete = [*_OBSOLETE, *(model._keys_to_ignore_on_load_unexpected or ())]
        faults = [f"{key}: the same parameter as {other}" for key, other in found.duplicates]
        faults += [
            f"{key}: unknown to {type(model).__name__}"
            for key in found.unknown
            if not any(re.search(pattern, key) for pattern in obsolete)
        ]
        tied = self._settle_ties(found.keys)
        settled: dict[str, str | Conversion] = {**found.keys, **packed}
        for conversion in found.conversions:
            for name in self._infer(conversion):
                if name in settled or name not in expected:
                    faults.append(f"{conversion.keys[0][0]}: becomes {name}, which is no parameter")
                settled[name] = conversion
        find_experts(model, found.conversions, self.experts, self._empty)
        for conversion in found.conversions:
            # Of quantised experts that are stacked in the files, one alone is not decoded.
            inputs = conversion.inputs[0] if conversion.inputs else []
            if any(i.row is not None and self._is_decoded(i.key) for i in inputs):
                conversion.inputs = []
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
        conversion.infer(self.skeleton, self._empty)
        return conversion.outputs

    def _empty(self, key: str) -> Tensor:
        entry = self._entry(key)
        return empty_like(entry.shape, entry.dtype)

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
        if self._is_decoded(one) or self._is_decoded(other):
            return False
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

    def _read(self, key: str) -> Tensor | PackedWeight:
        if key in self._mxfp4:
            blocks, scales = (self._homes[member].read(member) for member in self._mxfp4[key])
            return decode_mxfp4(key, blocks, scales)
        if key in self._packed:
            members = {member: self._homes[member].read(member) for member in self._packed[key]}
            return decode_keys(key, members)
        return self._homes[key].read(key)

    def _read_row(self, key: str, row: int | None) -> Tensor:
        return self._homes[key].read(key, row)

    def _packed_experts(self, name: str) -> PackedExperts:
        entries = {key: self._entry(key) for key in self._packed[name]}
        return PackedExperts(name, self.experts[name], entries, self._read_row)

    def _requests(self, key: str, row: int | None = None) -> list[Request]:
        """Return what is read for a key, or for one index of its first dimension."""
        home = self._homes[key]
        return home.requests if isinstance(home, DecodedFile) else [self._request(key, row)]

    def _made_of(self, key: str, tensors: list[Tensor]) -> Tensor:
        """Return the value of a key from what was read for it."""
        home = self._homes[key]
        return home.decode(tensors) if isinstance(home, DecodedFile) else tensors[0]

    def _request(self, key: str, row: int | None = None) -> Request:
        entry = self._entry(key) if row is None else self._entry(key).row(row)
        return Request(self._homes[key].path, entry.start, entry.nbytes, entry.dtype, entry.shape)

    def tensors(  # noqa: D102
        self, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[str, Value]]:
        return values(list(self._steps()), torch.device(device))

    def _steps(self) -> Iterator[Step]:
        """Yield how the parameters are read, in order."""
        converted: set[str] = set()
        for name in (parameter.name for parameter in self.parameters):
            stored = self._stored[name]
            if isinstance(stored, Conversion):
                if stored.target not in converted:
                    yield from self._conversion_steps(stored)
                    converted.add(stored.target)
            elif stored in self._mxfp4:
                requests = [self._request(member) for member in self._mxfp4[stored]]
                yield Step(requests, partial(_mxfp4, name, stored))
            elif stored in self._packed and name in self.experts:
                experts = self._packed_experts(name)
                for index in range(self.experts[name]):
                    yield Step((), partial(_packed_slice, name, experts, index))
            elif stored in self._packed:
                # A packed weight is a quarter of the bytes, and its JSON and tables are needed on
                # the CPU.
                yield Step((), partial(self._packed_weight, name, stored))
            elif name in self.experts and not self._is_decoded(stored):
                for index in range(self.experts[name]):
                    yield Step([self._request(stored, index)], partial(one_expert, name, index))
            else:
                yield Step(self._requests(stored), partial(self._whole, name, stored))

    def _conversion_steps(self, conversion: Conversion) -> Iterator[Step]:
        if not conversion.inputs:
            yield Step((), partial(self._made, conversion))
        for index, inputs in enumerate(conversion.inputs):
            requests = [request for i in inputs for request in self._requests(i.key, i.row)]
            yield Step(requests, partial(self._made_for_expert, conversion, index))

    def _packed_weight(self, name: str, key: str, _: list[Tensor]) -> list[tuple[str, Value]]:
        return [(name, self._read(key))]

    def _made(self, conversion: Conversion, _: list[Tensor]) -> list[tuple[str, Value]]:
        loaded = {parameter.name for parameter in self.parameters}
        made: list[tuple[str, Value]] = []
        for name, value in self._convert(conversion).items():
            if name in loaded and name in self.experts:
                made += ((name, ExpertSlice(index, one)) for index, one in enumerate(value))
            elif name in loaded:
                made.append((name, value))
        return made

    def _made_for_expert(
        self, conversion: Conversion, index: int, tensors: list[Tensor]
    ) -> list[tuple[str, Value]]:
        tensors.reverse()
        inputs = (
            self._made_of(i.key, [tensors.pop() for _ in self._requests(i.key, i.row)])
            for i in conversion.inputs[index]
        )
        made = conversion.apply_to_expert(self.skeleton, index, inputs)
        return [(name, ExpertSlice(index, value)) for name, value in made.items()]

    def _whole(self, name: str, key: str, tensors: list[Tensor]) -> list[tuple[str, Value]]:
        value = self._made_of(key, tensors)
        if name in self.experts:
            return [(name, ExpertSlice(index, one)) for index, one in enumerate(value)]
        return [(name, self._found[name].turned(value))]

    def tensor(self, name: str) -> Tensor | PackedWeight:  # noqa: D102
        stored = self._stored[name]
        if isinstance(stored, Conversion):
            return self._convert(stored)[name]
        if stored in self._packed and name in self.experts:
            packed = self._packed_experts(name)
            return torch.stack([dequantize(packed.weight(e)) for e in range(self.experts[name])])
        value = self._read(stored)
        return self._found[name].turned(value) if isinstance(value, Tensor) else value

    def matrices(self, name: str) -> Iterator[Tensor | PackedWeight]:  # noqa: D102
        stored, experts = self._stored[name], range(self.experts[name])
        if isinstance(stored, Conversion):
            if not stored.inputs:
                yield from super().matrices(name)
            for expert, inputs in enumerate(stored.inputs):
                read = [self._read_row(i.key, i.row) for i in inputs]
                yield stored.apply_to_expert(self.skeleton, expert, read)[name]
        elif stored in self._mxfp4:
            yield from super().matrices(name)
        elif stored in self._packed:
            yield from map(self._packed_experts(name).weight, experts)
        elif self._is_decoded(stored):
            yield from self._homes[stored].read(stored)
        else:
            yield from (self._read_row(stored, expert) for expert in experts)

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
        if self._mxfp4:
            return super().fitted(recipe)
        name = packed[0]
        first = next(self.matrices(name)) if name in self.experts else self.tensor(name)
        owners = [
            self.skeleton.get_submodule(name.removesuffix(".weight"))
            for name in packed
            if name not in self.experts
        ]
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


def _mxfp4(name: str, key: str, tensors: list[Tensor]) -> list[tuple[str, Value]]:
    blocks, scales = tensors
    return [(name, decode_mxfp4(key, blocks, scales))]


def _packed_slice(
    name: str, experts: PackedExperts, index: int, _: list[Tensor]
) -> list[tuple[str, Value]]:
    return [(name, ExpertSlice(index, experts.weight(index)))]


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
    """Return the configuration without ``quantization_config``, which is checked.

    Raises:
        CheckpointError: There is none, or it is not that of a model that can be loaded.
    """
    return _read_config(directory)[0]


def _read_config(directory: Path) -> tuple[PretrainedConfig, dict[str, Any] | None]:
    """Return the configuration, and its ``quantization_config``, which is taken off."""
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
        require_supported(directory, packing)
        del config.quantization_config
    return config, packing


def _mxfp4_config(directory: Path) -> dict[str, Any]:
    """Return the ``quantization_config`` of a model that has weights in MXFP4."""
    config = read_json(directory / "config.json", "it describes the model")
    found = config.get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") != METHOD:
        raise CheckpointError(
            f"{directory} has weights in blocks with scales, and its config.json does not say that "
            "they are in MXFP4; is it of another model?"
        )
    return found


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
