"""Parameters that files store in another form than transformers' models: its own conversions.

transformers 5 keeps the experts of a layer in one tensor, while most checkpoints hold them one by
one; others split what the files hold together. ``settle_keys`` finds, from names alone, which keys
of the files are which parameter. A `Conversion` is one operation of transformers' table on some
keys. It is first run on the meta device, so names and shapes of its parameters are known before
anything is read; memory holds its inputs and outputs when it is computed, usually the experts of
one layer.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

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
    """

    converter: WeightConverter
    target: str
    keys: list[tuple[str, str]] = field(default_factory=list)
    outputs: dict[str, Tensor] = field(default_factory=dict)

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
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"transformers cannot make {self.target} of {self.keys[0][0]} and the like: {error}"
            ) from error

    def apply(self, model: PreTrainedModel, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Return the parameters by name, from the tensors that ``read`` returns."""
        converter = copy.deepcopy(self.converter)
        for key, pattern in self.keys:
            converter.add_tensor(self.target, key, pattern, read(key))
        made: dict[str, Any] = converter.convert(self.target, model=model, config=model.config)
        return {
            name: value[0] if isinstance(value, list) else value for name, value in made.items()
        }


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
