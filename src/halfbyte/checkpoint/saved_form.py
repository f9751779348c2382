"""The form in which transformers' ``save_pretrained`` stores a model: its conversions, reversed.

transformers' models hold the experts of a layer as one tensor, and some parameters under names or
in shapes that are younger than their checkpoints. When it saves a model, it reverses what it does
when it loads one (conversion.py), so files keep the form in which the model was published, which is
what other programs read. ``SavedForm`` does the same, for tensors that come one at a time.
"""

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
)

from halfbyte.checkpoint.conversion import MISFITS, FewerExperts, settle_keys
from halfbyte.checkpoint.safetensors_file import Row
from halfbyte.checkpoint.source import ExpertSlice
from halfbyte.errors import CheckpointError

logger = logging.getLogger("halfbyte")


def _renamed(name: str, renamings: Iterable[WeightRenaming]) -> str:
    """Return a name after all renamings; transformers 5.17 has no function for it."""
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def _converted(name: str, converters: Iterable[WeightConverter]) -> tuple[str, str | None]:
    """Return the name that the first fitting converter collects, and the pattern that fitted."""
    for converter in converters:
        target, pattern = converter.rename_source_key(name)
        if pattern is not None:
            return target, pattern
    return name, None


@dataclass(eq=False)
class _Group:
    """Parameters that become keys of the files together.

    Attributes:
        converter: The reversed operation; None for a parameter that is only renamed.
        target: The name by which transformers' table collects the parameters.
        inputs: (name, the pattern it matched).
        keys: What they become, on the meta device.
        of_expert: For each expert, the keys that its slice becomes.
        stacked: Whether an expert's slice becomes a row of each key. If neither, all experts are
            converted together.
    """

    converter: WeightConverter | None
    target: str
    inputs: list[tuple[str, str]] = field(default_factory=list)
    keys: dict[str, Tensor] = field(default_factory=dict)
    of_expert: list[list[str]] = field(default_factory=list)
    stacked: bool = False


class SavedForm:
    """How the parameters of a model are saved.

    Args:
        model: The whole model, on the meta device.
        parameters: What will be saved, by name, on the meta device.
        experts: The parameters that hold a linear of every expert, and the number of experts.

    Attributes:
        keys: The tensors of the files, by key, on the meta device.
    """

    def __init__(
        self, model: PreTrainedModel, parameters: Mapping[str, Tensor], experts: Mapping[str, int]
    ) -> None:
        self._model, self._experts = model, experts
        # As `revert_weight_conversion`: without names of the past, and prefixes nobody took off.
        transforms = get_model_conversion_mapping(model, add_legacy=False)
        reversed_ = [
            t.reverse_transform() for t in reversed(transforms) if not isinstance(t, PrefixChange)
        ]
        if fault := self._set_groups(reversed_, parameters):
            logger.warning(
                "%s: saved under the names of today's transformers, since those of its checkpoints "
                "would not be read as the same model: %s",
                type(model).__name__,
                fault,
            )
            self._set_groups([], parameters)
        self.keys = {key: tensor for group in self._groups for key, tensor in group.keys.items()}

    def _set_groups(self, reversed_: list[Any], parameters: Mapping[str, Tensor]) -> str | None:
        """Set which parameters become keys together; return what is wrong with that, if anything.

        Args:
            reversed_: transformers' operations, reversed; none if names are to stay.
            parameters: As given.
        """
        self._renamings = [t for t in reversed_ if isinstance(t, WeightRenaming)]
        converters = [t for t in reversed_ if isinstance(t, WeightConverter)]
        of_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        groups: dict[str, _Group] = {}
        for name in sorted(parameters, key=dot_natural_key):
            target, pattern = _converted(name, converters)
            converter = of_pattern[pattern] if pattern is not None else None
            group = groups.setdefault(target, _Group(converter, target))
            group.inputs.append((name, pattern or name))
        order = {name: number for number, name in enumerate(parameters)}
        self._groups = sorted(
            groups.values(), key=lambda group: min(order[n] for n, _ in group.inputs)
        )
        try:
            for group in self._groups:
                self._infer(group, parameters)
        except MISFITS as error:
            return str(error)
        return self._fault(parameters)

    def _infer(self, group: _Group, parameters: Mapping[str, Tensor]) -> None:
        group.keys = self._convert(group, [parameters[name] for name, _ in group.inputs])
        first = group.inputs[0][0]
        if len(group.inputs) > 1 or (count := self._experts.get(first, 0)) < 2:
            return
        try:
            alone = self._convert(group, [parameters[first][:1]], alone=True)
        except MISFITS:
            return
        names = list(group.keys)
        if names == list(alone):  # experts stay stacked
            group.stacked = all(
                tuple(group.keys[key].shape) == (count, *value.shape[1:])
                for key, value in alone.items()
            )
            return
        if len(names) != count * len(alone):
            return
        # The keys of all experts for the first pattern, then for the next one.
        of_expert = [names[expert::count] for expert in range(count)]
        if of_expert[0] == list(alone) and all(
            group.keys[key].shape == value.shape
            for keys in of_expert
            for key, value in zip(keys, alone.values(), strict=True)
        ):
            group.of_expert = of_expert

    def _convert(
        self, group: _Group, tensors: Iterable[Tensor], *, alone: bool = False
    ) -> dict[str, Tensor]:
        """Return the keys of a group; if ``alone``, of a model that has this one expert."""
        if group.converter is None:
            (tensor,) = tensors
            return {_renamed(group.target, self._renamings): tensor}
        converter = copy.deepcopy(group.converter)
        for (name, pattern), tensor in zip(group.inputs, tensors, strict=True):
            converter.add_tensor(group.target, name, pattern, tensor)
        model: Any = FewerExperts(self._model, self._experts, 1) if alone else self._model
        made: dict[str, Any] = converter.convert(group.target, model=model, config=model.config)
        return {
            _renamed(name, self._renamings): value[0] if isinstance(value, list) else value
            for name, value in made.items()
        }

    def _fault(self, parameters: Mapping[str, Tensor]) -> str | None:
        """Return what is wrong with the keys, read as `DirectorySource` does; None if nothing."""
        keys = [key for group in self._groups for key in group.keys]
        of_key = {key: tensor for group in self._groups for key, tensor in group.keys.items()}
        if len(of_key) < len(keys):
            return "two parameters become one key"
        found = settle_keys(self._model, self._model.state_dict(), keys)
        if found.unknown or found.duplicates:
            return f"{[*found.unknown, *found.duplicates][0]} is no parameter"
        shapes = {name: of_key[key].shape for name, key in found.keys.items()}
        for conversion in found.conversions:
            try:
                conversion.infer(self._model, of_key.__getitem__)
            except CheckpointError as error:
                return str(error)
            shapes |= {name: value.shape for name, value in conversion.outputs.items()}
        for name, tensor in parameters.items():
            if shapes.get(name) != tensor.shape:
                return f"{name} would be {shapes.get(name)} instead of {tensor.shape}"
        return None

    def convert(self, tensors: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """Yield the tensors of the files or their rows, by key, when all is there that they need.

        Args:
            tensors: The parameters by name; experts as slices. Nothing is kept that is not needed
                for a later one. Others, as packed ones, are passed on.
        """
        group_of = {name: group for group in self._groups for name, _ in group.inputs}
        slices: dict[str, list[Tensor]] = {}
        waiting: dict[str, Tensor] = {}
        for name, value in tensors:
            if name not in group_of:
                yield name, value
                continue
            group = group_of[name]
            if isinstance(value, ExpertSlice):
                matrix, expert = value.value, value.expert
                assert isinstance(matrix, Tensor)
                del value
                if group.of_expert or group.stacked:
                    made = self._convert(group, [matrix[None]], alone=True)
                    del matrix
                    if group.stacked:
                        yield from ((key, Row(expert, one[0])) for key, one in made.items())
                    else:
                        yield from zip(group.of_expert[expert], made.values(), strict=True)
                    del made
                    continue
                slices.setdefault(name, []).append(matrix)
                del matrix
                if len(slices[name]) < self._experts[name]:
                    continue
                waiting[name] = torch.stack(slices.pop(name))
            else:
                waiting[name] = value
                del value
            if all(other in waiting for other, _ in group.inputs):
                yield from self._convert(
                    group, [waiting.pop(other) for other, _ in group.inputs]
                ).items()
