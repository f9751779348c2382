"""Parameters that files store in another form than transformers' models: its own conversions.

transformers 5 keeps the experts of a layer in one tensor, while most checkpoints hold them one by
one; others split what the files hold together. ``settle_keys`` finds, from names alone, which keys
of the files are which parameter. A `Conversion` is one operation of transformers' table on some
keys. It is first run on the meta device, so names and shapes of its parameters are known before
anything is read.

Experts are converted one at a time where that gives the same: where each pattern matches a key for
every expert, or one tensor of all, and the operations do not mix experts (`find_experts`). Of other
conversions, memory holds all inputs and outputs.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from halfbyte.errors import CheckpointError


@dataclass(eq=False)
class Conversion:
    """Some keys of the files, and the parameters that transformers computes from them.

    Attributes:
        converter: The operation; not changed.
        target: The name by which transformers' table collects the keys.
        keys: (key, the pattern it matched), in the order in which they are stacked.
        outputs: The parameters, by name, on the meta device; empty before `infer`.
        inputs: For each expert, what its slices of the outputs are computed from; empty if they are
            computed for all experts together.
    """

    converter: WeightConverter
    target: str
    keys: list[tuple[str, str]] = field(default_factory=list)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    inputs: list[list["ExpertInput"]] = field(default_factory=list)

    def infer(self, model: PreTrainedModel, empty: Callable[[str], Tensor]) -> None:
        """Set ``outputs``.

        Args:
            model: The model, on the meta device.
            empty: Returns a key's tensor on the meta device.

        Raises:
            CheckpointError: If the keys' shapes do not fit together.
        """
        try:
            self.outputs = self.apply(model, empty)
        except MISFITS as error:
            raise CheckpointError(
                f"transformers cannot make {self.target} of {self.keys[0][0]} and the like: {error}"
            ) from error

    def apply(self, model: PreTrainedModel, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Return the parameters by name, from the tensors that ``read`` returns."""
        return self._convert(model, ((key, pattern, read(key)) for key, pattern in self.keys))

    def apply_to_expert(
        self, model: PreTrainedModel, expert: int, tensors: Iterable[Tensor]
    ) -> dict[str, Tensor]:
        """Return an expert's matrix of each parameter, by its name.

        Args:
            model: The model.
            expert: One of ``inputs``.
            tensors: The tensor of each of its inputs; not kept.
        """
        given = zip(self.inputs[expert], tensors, strict=True)
        alone = FewerExperts(model, self.outputs, 1)
        made = self._convert(alone, ((i.key, i.pattern, i.alone(tensor)) for i, tensor in given))
        return {name: value[0] for name, value in made.items()}

    def _convert(
        self, model: "PreTrainedModel | FewerExperts", given: Iterable[tuple[str, str, Tensor]]
    ) -> dict[str, Tensor]:
        converter = copy.deepcopy(self.converter)
        for key, pattern, tensor in given:
            converter.add_tensor(self.target, key, pattern, tensor)
            del tensor
        made: dict[str, Any] = converter.convert(self.target, model=model, config=model.config)
        return {
            name: value[0] if isinstance(value, list) else value for name, value in made.items()
        }

    def inputs_by_expert(self, count: int) -> list[list["ExpertInput"]]:
        """Return the inputs of each expert; empty if they cannot be told from the keys."""
        of_pattern: dict[str, list[str]] = {}
        for key, pattern in self.keys:
            of_pattern.setdefault(pattern, []).append(key)
        if any(len(keys) not in (1, count) for keys in of_pattern.values()):
            return []
        return [
            [
                ExpertInput(keys[expert], pattern, None)
                if len(keys) == count > 1
                else ExpertInput(keys[0], pattern, expert)
                for pattern, keys in of_pattern.items()
            ]
            for expert in range(count)
        ]


class ExpertInput(NamedTuple):
    """What a conversion needs for one expert.

    Attributes:
        key: A key of the files.
        pattern: The pattern it matched.
        row: The index in the first dimension, if the key holds all experts; else None.
    """

    key: str
    pattern: str
    row: int | None

    def alone(self, tensor: Tensor) -> Tensor:
        """Return what was read, in the form of a model with this expert alone."""
        return tensor if self.row is None else tensor[None]


class FewerExperts:
    """A model of fewer experts, as far as transformers' operations look at it."""

    def __init__(self, model: PreTrainedModel, experts: Collection[str], count: int) -> None:
        self._model, self._experts, self._count = model, experts, count

    def get_parameter(self, name: str) -> Tensor:
        """Return a parameter; of experts, the first ones."""
        whole: Tensor = self._model.get_parameter(name)
        return whole[: self._count] if name in self._experts else whole

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def find_experts(
    model: PreTrainedModel,
    conversions: Iterable[Conversion],
    experts: Mapping[str, int],
    empty: Callable[[str], Tensor],
) -> None:
    """Set ``inputs`` of the conversions that can be computed one expert at a time.

    The slices of each are compared with those of the whole: their shapes, on the meta device; and
    once for each of transformers' operations, the values for two experts of random bytes.

    Args:
        model: The model, on the meta device.
        conversions: Conversions whose ``outputs`` are known.
        experts: The parameters that hold a linear of every expert, and the number of experts.
        empty: Returns a key's tensor on the meta device.
    """
    separable: dict[int, bool] = {}
    for conversion in conversions:
        counts = {experts.get(name, 0) for name in conversion.outputs}
        if len(counts) != 1 or not (count := counts.pop()):
            continue
        inputs = conversion.inputs_by_expert(count)
        rows = [i for i in inputs[0] if i.row is not None] if inputs else []
        if not inputs or any(tuple(empty(i.key).shape[:1]) != (count,) for i in rows):
            continue
        conversion.inputs = inputs
        kind = id(conversion.converter)
        if kind not in separable:
            separable[kind] = _separable(model, conversion, empty)
        if not (separable[kind] and _has_the_shapes(model, conversion, empty)):
            conversion.inputs = []


# What transformers' operations raise for tensors that do not fit.
MISFITS = (RuntimeError, ValueError, IndexError, KeyError, TypeError)


def _has_the_shapes(
    model: PreTrainedModel, conversion: Conversion, empty: Callable[[str], Tensor]
) -> bool:
    inputs = [empty(i.key) if i.row is None else empty(i.key)[0] for i in conversion.inputs[0]]
    try:
        made = conversion.apply_to_expert(model, 0, inputs)
    except MISFITS:
        return False
    return {name: (value.dtype, value.shape) for name, value in made.items()} == {
        name: (value.dtype, value.shape[1:]) for name, value in conversion.outputs.items()
    }


def _separable(
    model: PreTrainedModel, conversion: Conversion, empty: Callable[[str], Tensor]
) -> bool:
    """Return whether the first and the last expert alone become what they become together."""
    drawn = torch.Generator().manual_seed(0)
    first, last = conversion.inputs[0], conversion.inputs[-1]
    values: list[tuple[Tensor, Tensor]] = []
    together: list[tuple[str, str, Tensor]] = []
    for one, other in zip(first, last, strict=True):
        shape = empty(one.key).shape[0 if one.row is None else 1 :]
        a, b = (torch.randint(256, shape, dtype=torch.uint8, generator=drawn) for _ in range(2))
        values.append((a, b))
        if one.row is None:
            together += [(one.key, one.pattern, a), (other.key, other.pattern, b)]
        else:
            together.append((one.key, one.pattern, torch.stack([a, b])))
    try:
        both = conversion._convert(FewerExperts(model, conversion.outputs, 2), together)
        for place, expert in enumerate((0, len(conversion.inputs) - 1)):
            alone = conversion.apply_to_expert(model, expert, [pair[place] for pair in values])
            if alone.keys() != both.keys() or any(
                not torch.equal(both[name][place], value) for name, value in alone.items()
            ):
                return False
    except MISFITS:
        return False
    return True


@dataclass(frozen=True)
class Settled:
    """Which keys of the files are which parameters.

    Attributes:
        keys: The key of each parameter that is stored as it is.
        conversions: The others, each of which makes one parameter or several.
        unknown: Keys that are no parameter.
        duplicates: (key, the key that is the same parameter).
    """

    keys: dict[str, str]
    conversions: list[Conversion]
    unknown: list[str]
    duplicates: list[tuple[str, str]]


def settle_keys(
    model: PreTrainedModel, expected: Mapping[str, Tensor], keys: Iterable[str]
) -> Settled:
    """Return the parameter of each key, as transformers' ``from_pretrained`` decides.

    Args:
        model: The model on the meta device.
        expected: Its parameters and buffers, by name.
        keys: The keys of the files.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    of_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    found = Settled({}, [], [], [])
    by_target: dict[str, Conversion] = {}
    keys = sorted(keys, key=dot_natural_key) if converters else list(keys)
    for key, name, pattern in _renamed(model, expected, keys, renamings, converters):
        if name not in expected:
            found.unknown.append(key)
        elif pattern is not None:
            if name not in by_target:
                by_target[name] = Conversion(of_pattern[pattern], name)
                found.conversions.append(by_target[name])
            by_target[name].keys.append((key, pattern))
        elif name in found.keys:
            found.duplicates.append((key, found.keys[name]))
        else:
            found.keys[name] = key
    return found


def _renamed(
    model: PreTrainedModel,
    expected: Mapping[str, Tensor],
    keys: Iterable[str],
    renamings: list[WeightRenaming],
    converters: list[WeightConverter],
) -> Iterator[tuple[str, str, str | None]]:
    """Yield each key, its name in the model, and the pattern of a converter that it matches."""
    prefix = model.base_model_prefix
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:
            name, pattern = key, None  # a name of today, which a renaming of old ones touches
        yield key, name, pattern


def empty_like(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")
