"""Converts a 4-bit weight to and from bitsandbytes' tensors in a checkpoint.

A linear's ``X.weight`` becomes five or six tensors: the codes under its own name, and the data
needed to decode them under names with that prefix (README.md in this directory has the table).
Bytes are unchanged in both directions.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from halfbyte.checkpoint.safetensors_file import Planned
from halfbyte.errors import CheckpointError
from halfbyte.foreign_text import quote
from halfbyte.quant import BLOCK_SIZES, SCALE_BLOCK, QuantizedWeight, empty_like_quantized
from halfbyte.quant.blockwise import DYNAMIC_SIGNED, FP4_LEVELS, NF4_LEVELS
from halfbyte.quant.weight import FLOAT_TYPES

STATE = ".quant_state.bitsandbytes__"
_STATE_ROOM = 512  # bytes; the JSON of two dimensions with the longest numbers takes 230
# What comes of reading numbers, names and lists where others are.
NOT_A_STATE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
LEVELS = {"nf4": NF4_LEVELS, "fp4": FP4_LEVELS}
SUFFIXES = {
    "codes": "",
    "scales": ".absmax",
    "scale_codes": ".absmax",
    "scale_scales": ".nested_absmax",
}


def packed_weights(names: Mapping[str, object]) -> dict[str, list[str]]:
    """Return, for each packed weight among ``names``, all keys that belong to it, its own first."""
    packed = {
        name.partition(STATE)[0]: [name.partition(STATE)[0]] for name in names if STATE in name
    }
    for name in names:
        # The longest suffix, the state's, has two dots; no other key does.
        owner = name.partition(STATE)[0] if STATE in name else name.rpartition(".")[0]
        if owner in packed and name != owner:
            packed[owner].append(name)
    return packed


def decode_keys(name: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    """Return the weight that a checkpoint holds under ``name``.

    Args:
        name: ``X.weight``.
        tensors: Its tensors, by their full keys.

    Raises:
        CheckpointError: If a tensor is missing, of the wrong size, or a table is another.
    """
    state = read_state(name, tensors)
    try:
        expected, offset = _expected(state)
    except NOT_A_STATE as error:
        raise unreadable(name, error) from error
    check_tables(name, expected, tensors)
    parts: dict[str, Any] = {}
    for field, like in expected.tensors().items():
        if field == "scale_offset":
            parts[field] = torch.tensor(offset, dtype=torch.float32)
        else:
            parts[field] = _taken(name, SUFFIXES[field], like, tensors)
            if like.is_floating_point() and not parts[field].isfinite().all():
                raise wrong(name, f"{name + SUFFIXES[field]} contains NaN or infinity")
    return replace(expected, **parts)


def wrong(name: str, what: str) -> CheckpointError:
    """Return the error that a packed weight is not what it should be."""
    return CheckpointError(f"{name} is not a 4-bit weight as bitsandbytes writes it: {what}")


def unreadable(name: str, error: Exception) -> CheckpointError:
    """Return the error that a quant_state says something else than expected."""
    return wrong(name, f"its quant_state cannot be read ({quote(error)})")


def read_state(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the quant_state of a weight, unchecked but for being a JSON object.

    Raises:
        CheckpointError: If there is none.
    """
    states = [tensor for key, tensor in tensors.items() if STATE in key]
    if len(states) != 1 or states[0].numel() > 2 * _STATE_ROOM:
        raise wrong(name, f"it has {len(states)} quant_state tensors; expected is a short one")
    try:
        state = json.loads(bytes(states[0].tolist()))
        if not isinstance(state, dict):
            raise TypeError(f"it is a {type(state).__name__}")
    except NOT_A_STATE as error:
        raise unreadable(name, error) from error
    return state


def check_tables(name: str, like: QuantizedWeight, tensors: Mapping[str, Tensor]) -> None:
    """Check that the levels which a checkpoint holds are those of the format.

    Raises:
        CheckpointError: If they are others, or missing.
    """
    tables = {".quant_map": LEVELS[like.quant_type]}
    if like.double_quant:
        tables[".nested_quant_map"] = DYNAMIC_SIGNED
    for suffix, table in tables.items():
        # bitsandbytes has built its tables in ways that differ in the last bit.
        if not torch.allclose(_taken(name, suffix, table, tensors), table, rtol=0, atol=1e-7):
            raise wrong(name, f"{name + suffix} holds other levels than those of the format")


def _taken(name: str, suffix: str, like: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    tensor = tensors.get(name + suffix)
    if tensor is None:
        raise wrong(name, f"{name + suffix} is missing")
    flat = tensor.reshape(-1)
    if not suffix:  # bnb_4bit_quant_storage may be another dtype; the bytes are the same
        flat = flat.view(torch.uint8)
    if flat.dtype != like.dtype or flat.numel() != like.numel():
        raise wrong(
            name,
            f"{name + suffix} is {flat.dtype} {list(flat.shape)}, expected is {like.dtype} "
            f"{list(like.shape)}",
        )
    return flat


def _expected(state: dict[str, Any]) -> tuple[QuantizedWeight, float]:
    """Return the weight a quant_state describes, on the meta device, and its offset."""
    nested = "nested_offset" in state
    like = described(state, tuple(state["shape"]), nested=nested)
    offset = float(state["nested_offset"]) if nested else 0.0
    if not abs(offset) <= torch.finfo(torch.float32).max:  # NaN is not, either
        raise ValueError(f"nested_offset {offset}")
    return like, offset


def described(state: dict[str, Any], shape: tuple[Any, ...], *, nested: bool) -> QuantizedWeight:
    """Return the weight of a shape that a quant_state describes, on the meta device.

    Raises:
        Exception: One of ``NOT_A_STATE``, if a field is missing or invalid.
    """
    dtype = getattr(torch, state["dtype"])
    if not all(type(size) is int and size >= 0 for size in shape) or prod(shape) >= 2**48:
        raise ValueError(f"shape {shape}")
    if dtype not in FLOAT_TYPES:
        raise ValueError(f"dtype {dtype}")
    if type(state["blocksize"]) is not int:
        raise ValueError(f"blocksize {state['blocksize']}")
    if state["quant_type"] not in LEVELS or state["blocksize"] not in BLOCK_SIZES:
        raise ValueError(f"quant_type {state['quant_type']}, blocksize {state['blocksize']}")
    if nested and state["nested_blocksize"] != SCALE_BLOCK:
        raise ValueError(f"nested_blocksize {state['nested_blocksize']}")
    return empty_like_quantized(
        shape,
        dtype,
        quant_type=state["quant_type"],
        block_size=state["blocksize"],
        double_quant=nested,
    )


def encode_keys(name: str, q: QuantizedWeight) -> dict[str, Tensor]:
    """Return the tensors a checkpoint holds for ``q`` under ``name``, in bitsandbytes' order."""
    state = state_of(q, q.shape)
    if q.scale_offset is not None:
        state["nested_offset"] = q.scale_offset.item()
    return {**_tensor_keys(name, q), name + STATE + q.quant_type: encode_state(state)}


def state_of(q: QuantizedWeight, shape: tuple[int, ...]) -> dict[str, Any]:
    """Return the quant_state of a weight of ``shape``, packed as ``q``, without the offset."""
    state: dict[str, Any] = {
        "quant_type": q.quant_type,
        "blocksize": q.block_size,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    if q.double_quant:
        state["nested_blocksize"] = SCALE_BLOCK
        state["nested_dtype"] = "float32"
    return state


def encode_state(state: dict[str, Any]) -> Tensor:
    """Return a quant_state as a checkpoint holds it, uint8 [length]."""
    return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)


def plan_keys(name: str, q: QuantizedWeight) -> list[Planned]:
    """Return what ``encode_keys`` will make of a weight like ``q``, whose tensors may be empty."""
    plan = [Planned(k, t.dtype, tuple(t.shape)) for k, t in _tensor_keys(name, q).items()]
    state = Planned(name + STATE + q.quant_type, torch.uint8, (_STATE_ROOM,), flexible=True)
    return [*plan, state]


def _tensor_keys(name: str, q: QuantizedWeight) -> dict[str, Tensor]:
    """Return all tensors but the state, whose JSON has the offset of the scales as a number."""
    keys = {name: q.codes.reshape(-1, 1)}
    if q.scales is not None:
        return {**keys, f"{name}.absmax": q.scales, f"{name}.quant_map": LEVELS[q.quant_type]}
    assert q.scale_codes is not None
    assert q.scale_scales is not None
    return {
        **keys,
        f"{name}.absmax": q.scale_codes,
        f"{name}.quant_map": LEVELS[q.quant_type],
        f"{name}.nested_absmax": q.scale_scales,
        f"{name}.nested_quant_map": DYNAMIC_SIGNED,
    }
