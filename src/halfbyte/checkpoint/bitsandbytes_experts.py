"""Converts the packed weights of experts to and from their tensors in a checkpoint.

bitsandbytes has no format for experts that are packed one by one: it packs a 3-D parameter as one
weight, whose scales share one offset. So the format is our own: the tensors that each expert's
matrix would have as the weight of a linear (bitsandbytes_keys.py), stacked. The offset of the
scales, a number in a linear's JSON, is a tensor here. README.md in this directory has the table.

Without double quantisation, and if blocks do not cross experts, the bytes are those of bitsandbytes
for the 3-D parameter: ``bitsandbytes.nn.parametrize.replace_parameter_4bit_prequantized`` takes
them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from halfbyte.checkpoint.bitsandbytes_keys import (
    LEVELS,
    NOT_A_STATE,
    STATE,
    SUFFIXES,
    check_tables,
    described,
    encode_state,
    read_state,
    state_of,
    unreadable,
    wrong,
)
from halfbyte.checkpoint.safetensors_file import Entry, Planned, Row
from halfbyte.quant import QuantizedWeight
from halfbyte.quant.blockwise import DYNAMIC_SIGNED

_SUFFIXES = SUFFIXES | {"scale_offset": ".nested_offset"}


class PackedExperts:
    """The packed experts that a checkpoint holds under one name.

    Args:
        name: The name of the parameter.
        count: The number of experts.
        entries: Its tensors in the files, by their full keys.
        read: Returns a tensor of the files, or one row of it.

    Attributes:
        like: A description of an expert's weight, its tensors on the meta device.

    Raises:
        CheckpointError: If a tensor is missing, of the wrong size or damaged.
    """

    def __init__(
        self,
        name: str,
        count: int,
        entries: Mapping[str, Entry],
        read: Callable[[str, int | None], Tensor],
    ) -> None:
        self._name, self._read = name, read
        common = {key: read(key, None) for key in entries if STATE in key or _is_table(key)}
        state = read_state(name, common)
        try:
            first, *shape = state["shape"]
            self.like = described(state, tuple(shape), nested="nested_blocksize" in state)
        except NOT_A_STATE as error:
            raise unreadable(name, error) from error
        if type(first) is not int or first != count:
            raise wrong(name, f"its quant_state is of {first} experts; expected are {count}")
        check_tables(name, self.like, common)
        for field, like in self.like.tensors().items():
            key = name + _SUFFIXES[field]
            expected = (like.dtype, (count, *like.shape))
            if key not in entries:
                raise wrong(name, f"{key} is missing")
            if (came := (entries[key].dtype, entries[key].shape)) != expected:
                raise wrong(
                    name,
                    f"{key} is {came[0]} {list(came[1])}, expected is {expected[0]} "
                    f"{list(expected[1])}",
                )

    def weight(self, expert: int) -> QuantizedWeight:
        """Return the weight of an expert.

        Raises:
            CheckpointError: If a file ends early, or a scale is NaN or infinite.
        """
        parts: dict[str, Any] = {}
        for field in self.like.tensors():
            key = self._name + _SUFFIXES[field]
            parts[field] = tensor = self._read(key, expert)
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise wrong(self._name, f"row {expert} of {key} contains NaN or infinity")
        return replace(self.like, **parts)


def _is_table(key: str) -> bool:
    return key.endswith((".quant_map", ".nested_quant_map"))


def plan_experts(name: str, like: QuantizedWeight, count: int) -> list[Planned]:
    """Return what `encode_expert` and `encode_common` make of ``count`` experts' weights."""
    own = [
        Planned(name + _SUFFIXES[field], tensor.dtype, (count, *tensor.shape))
        for field, tensor in like.tensors().items()
    ]
    common = encode_common(name, like, count).items()
    return [*own, *(Planned(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in common)]


def encode_common(name: str, like: QuantizedWeight, count: int) -> dict[str, Tensor]:
    """Return the tensors that the experts share: the tables, and the state."""
    common = {f"{name}.quant_map": LEVELS[like.quant_type]}
    if like.double_quant:
        common[f"{name}.nested_quant_map"] = DYNAMIC_SIGNED
    state = state_of(like, (count, *like.shape))
    return {**common, name + STATE + like.quant_type: encode_state(state)}


def encode_expert(name: str, expert: int, q: QuantizedWeight) -> Iterator[tuple[str, Row]]:
    """Yield the rows that an expert's weight is stored as, and their keys."""
    for field, tensor in q.tensors().items():
        yield name + _SUFFIXES[field], Row(expert, tensor)
