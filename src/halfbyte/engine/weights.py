"""Providers of the layers' weights.

The engine acquires one layer after the other from a `WeightProvider`, and announces the next for
prefetching. Weights are packed on the device and decoded on demand (`ResidentWeights`), or wait
elsewhere, packed, and are copied to the device first (`StreamedWeights`).
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch

from halfbyte.linear.decoded_cache import DecodedWeightCache
from halfbyte.linear.frozen import FrozenLinear
from halfbyte.linear.group import OpenLayer
from halfbyte.linear.layer_stream import LayerStream, stream_of


class WeightProvider(Protocol):
    """Provides the weights of one layer at a time."""

    def prefetch(self, layer: int) -> None:
        """Start to load the layer that will be acquired next, without waiting."""

    def acquire(self, layer: int, *, again: bool = False, forward_only: bool = False) -> OpenLayer:
        """Make a layer's weights available until `release`.

        Args:
            layer: Index of the layer.
            again: Whether it is the layer that was released last, with unchanged weights.
            forward_only: Whether no gradient is computed before `release`.

        Returns:
            The state shared by its products, including x Aᵀ to reuse in recomputation.
        """

    def release(self, layer: int) -> None:
        """Release an acquired layer."""

    def keep(self, layers: int) -> None:
        """Keep the last ``layers`` layers available, at the cost of memory."""

    def forget(self) -> None:
        """Mark all layers as not loaded, after a dry run, or around passes in CUDA graphs."""

    @property
    def nbytes(self) -> int:
        """Bytes of decoded weights that are held."""

    @property
    def side_streams(self) -> list[torch.cuda.Stream]:
        """The streams on which weights are copied beside the current one."""


class ResidentWeights:
    """Packed weights on the device, decoded a layer at a time.

    Args:
        linears: The linears of each layer.
        dtype: dtype of the decoded weights.
    """

    def __init__(self, linears: Sequence[Sequence[FrozenLinear]], dtype: torch.dtype) -> None:
        self._linears, self._dtype = linears, dtype
        self._cache = DecodedWeightCache()
        self._acquired: dict[int, AbstractContextManager[OpenLayer]] = {}

    def prefetch(self, layer: int) -> None:
        """Do nothing: the weights are resident."""

    def acquire(self, layer: int, *, again: bool = False, forward_only: bool = False) -> OpenLayer:
        """Decode a layer's weights; see `WeightProvider`."""
        context = self._cache.opened(
            self._linears[layer], self._dtype, again=again, forward_only=forward_only
        )
        lora_activations = context.__enter__()
        self._acquired[layer] = context
        return lora_activations

    def release(self, layer: int) -> None:
        """Allow the decoded weights to be overwritten."""
        self._acquired.pop(layer).__exit__(None, None, None)

    def keep(self, layers: int) -> None:
        """Keep the decoded weights of the last ``layers`` layers."""
        self._cache.keep(self._linears[len(self._linears) - layers :], self._dtype)

    def forget(self) -> None:
        """Mark all weights as not decoded."""
        self._cache.forget()

    @property
    def nbytes(self) -> int:
        """Bytes of decoded weights that are held."""
        return self._cache.nbytes

    @property
    def side_streams(self) -> list[torch.cuda.Stream]:
        """None: nothing is copied."""
        return []

    @property
    def decodes(self) -> int:
        """Number of weights decoded so far."""
        return self._cache.decodes


class StreamedWeights(ResidentWeights):
    """Packed weights that are copied to the device a layer at a time, and then decoded.

    Args:
        linears: The linears of each layer.
        dtype: dtype of the decoded weights.
        stream: Copies the layers.
    """

    def __init__(
        self, linears: Sequence[Sequence[FrozenLinear]], dtype: torch.dtype, stream: LayerStream
    ) -> None:
        super().__init__(linears, dtype)
        self.stream = stream

    def prefetch(self, layer: int) -> None:
        """Start to copy a layer to the device."""
        self.stream.prefetch(layer)

    def acquire(self, layer: int, *, again: bool = False, forward_only: bool = False) -> OpenLayer:
        """Wait for a layer's copy and decode it; see `WeightProvider`."""
        self.stream.acquire(layer)
        opened = super().acquire(layer, again=again, forward_only=forward_only)
        if self.stream.slots == 1:  # its packed bytes are not read again
            self.stream.release(layer)
        return opened

    def release(self, layer: int) -> None:
        """Allow the layer and its decoded weights to be overwritten."""
        super().release(layer)
        if self.stream.slots > 1:
            self.stream.release(layer)

    @property
    def side_streams(self) -> list[torch.cuda.Stream]:
        """The stream of the copies, on a GPU."""
        return [] if self.stream.side_stream is None else [self.stream.side_stream]

    def forget(self) -> None:
        """Mark all weights as neither copied nor decoded."""
        super().forget()
        self.stream.forget()


def provider_of(
    model: Any, linears: Sequence[Sequence[FrozenLinear]], dtype: torch.dtype
) -> WeightProvider:
    """Return the provider of the layers of ``model``; other arguments as of the providers."""
    stream = stream_of(model)
    if stream is None:
        return ResidentWeights(linears, dtype)
    return StreamedWeights(linears, dtype, stream)


@contextmanager
def acquired(
    weights: WeightProvider, layer: int, *, again: bool = False, forward_only: bool = False
) -> Iterator[OpenLayer]:
    """Acquire a layer's weights for the duration of the context."""
    lora_activations = weights.acquire(layer, again=again, forward_only=forward_only)
    try:
        yield lora_activations
    finally:
        weights.release(layer)
