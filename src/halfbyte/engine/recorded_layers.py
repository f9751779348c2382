"""Layers run by transformers' own code: the arguments its decoder calls them with, and the calls.

The decoder is run with its layers stubbed, which records the keyword arguments of each (masks,
positions, rotary tables); then the layers are called with these, one by one.
"""

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.engine.packing import PackedBatch
from halfbyte.layers.decoder_layer import AttentionCheckpoint
from halfbyte.layers.gated_experts import ends_with_experts, outputs_unread
from halfbyte.layers.packed_row import packed_row
from halfbyte.linear.lora import DropoutClock


class EngineError(Exception):
    """The model's layers cannot be called one by one; the message says why."""


class _Stop(Exception):
    """Raised by the last stub, to skip everything after the layers."""


def record(
    decoder: Any,
    layers: Sequence[Any],
    part: PackedBatch,
    lengths: Sequence[int],
    tuple_output: int,
    entry_trained: bool,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Return the input of layer 0 [B, T, H] and the keyword arguments of each layer.

    Args:
        decoder: transformers' decoder.
        layers: Its layers.
        part: The tokens.
        lengths: The tokens of each document in the only row; none if every row is a document.
        tuple_output: The number of values of the tuple that layers return, or 0 for a tensor.
        entry_trained: Whether the input of layer 0 requires a gradient.

    Raises:
        EngineError: If the decoder calls its layers in another way.
    """
    arguments: list[dict[str, Any]] = []
    entry: list[Tensor] = []

    def stub(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args:
            raise EngineError("its decoder passes arguments by position")
        entry.append(hidden_states)
        arguments.append(kwargs)
        if len(arguments) == len(layers):
            raise _Stop
        if not tuple_output:
            return hidden_states
        return (hidden_states, *[None] * (tuple_output - 1))

    for layer in layers:
        layer.forward = stub
    positions = {"position_ids": part.positions} if lengths else {}
    row = packed_row(lengths) if lengths else nullcontext()
    try:
        with suppress(_Stop), torch.set_grad_enabled(entry_trained), row:
            decoder(input_ids=part.ids, use_cache=False, **positions)
    finally:
        for layer in layers:
            del layer.forward
    if len(arguments) != len(layers):
        raise EngineError(f"its decoder called {len(arguments)} of {len(layers)} layers")
    layer_args = [value for call in arguments for value in call.values()]
    layer_args += [part for value in layer_args if isinstance(value, tuple) for part in value]
    if any(isinstance(value, Tensor) and value.requires_grad for value in layer_args):
        raise EngineError("what is trained before its layers goes into them by other ways, too")
    return entry[0], arguments


def recorded_run(
    layers: Sequence[nn.Module],
    clock: DropoutClock | None,
    micro_batch: int,
    calls: Sequence[dict[str, Any]],
    lengths: Sequence[int],
) -> Any:
    """Return what calls a layer with its recorded arguments: a `forward_backward.Run`."""

    def run(
        layer: int,
        x: Tensor,
        _layer_args: tuple[Tensor, ...],
        *,
        read: bool,
        checkpoint: AttentionCheckpoint | None = None,
    ) -> Tensor:
        if clock is not None:
            clock.micro_batch = micro_batch
        unread = not read and ends_with_experts(layers[layer])
        with (
            packed_row(lengths) if lengths else nullcontext(),
            outputs_unread() if unread else nullcontext(),
        ):
            output = layers[layer](x, **calls[layer])
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    return run
