"""Where the weights of a layer come from when it is run.

The engine asks a `WeightProvider` for one layer after the other, and says beforehand which will be
next. Today all weights are on the device, packed, and are decoded when they are asked for
(`ResidentWeights`). Weights that wait in host memory, on disk or on other GPUs would be brought by
another provider, with no change in the engine.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch

from halfbyte.linear.decoded_cache import DecodedWeightCache
from halfbyte.linear.frozen import FrozenLinear
from halfbyte.linear.group import OpenLayer


class WeightProvider(Protocol):
    """Makes the weights of layers ready, one layer at a time."""

    def prefetch(self, layer: int) -> None:
        """Begin to make a layer ready that will be acquired next, without waiting for it."""

    def acquire(self, layer: int, *, again: bool = False) -> OpenLayer:
        """Make a layer's linears ready to multiply, until `release`.

        Args:
            layer: Its number.
            again: Whether it is the one that was released last, with the same weights.

        Returns:
            What carries the products of its adapters' A from one run of the layer to another.
        """

    def release(self, layer: int) -> None:
        """Let go of a layer that was acquired."""

    def keep(self, layers: int) -> None:
        """Have the last ``layers`` layers stay ready from now on, where that costs memory."""

    def forget(self) -> None:
        """Take nothing to be ready: what was acquired in a dry run was not."""

    @property
    def nbytes(self) -> int:
        """Bytes of decoded weights that are held."""


class ResidentWeights:
    """Packed weights on the device, decoded a layer at a time.

    Args:
        linears: The linears of each layer.
        dtype: What to decode to.
    """

    def __init__(self, linears: Sequence[Sequence[FrozenLinear]], dtype: torch.dtype) -> None:
        self._linears, self._dtype = linears, dtype
        self._cache = DecodedWeightCache()
        self._acquired: dict[int, AbstractContextManager[OpenLayer]] = {}

    def prefetch(self, layer: int) -> None:
        """Do nothing: the weights are there."""

    def acquire(self, layer: int, *, again: bool = False) -> OpenLayer:
        """Decode a layer's weights; see `WeightProvider`."""
        context = self._cache.opened(self._linears[layer], self._dtype, again=again)
        lora_activations = context.__enter__()
        self._acquired[layer] = context
        return lora_activations

    def release(self, layer: int) -> None:
        """Leave the decoded weights to be written over."""
        self._acquired.pop(layer).__exit__(None, None, None)

    def keep(self, layers: int) -> None:
        """Keep the decoded weights of the last ``layers`` layers."""
        self._cache.keep(self._linears[len(self._linears) - layers :], self._dtype)

    def forget(self) -> None:
        """Take nothing to be decoded."""
        self._cache.forget()

    @property
    def nbytes(self) -> int:
        """Bytes of decoded weights that are held."""
        return self._cache.nbytes

    @property
    def decodes(self) -> int:
        """How many weights have been decoded so far."""
        return self._cache.decodes


@contextmanager
def acquired(weights: WeightProvider, layer: int, *, again: bool = False) -> Iterator[OpenLayer]:
    """Acquire a layer's weights for as long as the context lasts."""
    lora_activations = weights.acquire(layer, again=again)
    try:
        yield lora_activations
    finally:
        weights.release(layer)
