"""Offloading of the inputs of recomputed layers to host memory.

A layer that is recomputed in backward needs its input, 8 kB per token and layer in a 7B model. With
its attention checkpoint (layers/decoder_layer.py), twice as much, recomputation is faster. Copies
to page-locked memory by the GPU's copy engines overlap with the products and cost no time, and the
GPU holds the tensors of two layers instead of all: those of a layer are copied out while the next
one runs. Where the bus is slower than a layer, some layers have no checkpoint, and copies may take
longer than a layer, as long as they keep up over several: those of two are under way at a time.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.runtime.host_memory import host_memory

# Smaller tensors are left to torch's allocator, which reuses their memory and rounds its size up to
# a power of two: 4.3 GB for 2.2, the input of a layer for 270k tokens of an 8B model.
_LEAST_BYTES = 64 << 20


class _Copy(NamedTuple):
    """A copy in progress: the GPU tensors it reads or writes, by part, and its end event."""

    parts: list[list[Tensor]]
    done: torch.cuda.Event


class ActivationOffloader:
    """Copies tensors of layers to host memory and back.

    All work is ordered by events between two streams, so it can be captured in a CUDA graph. Host
    memory is allocated for the first part of a shape and kept; that cannot be captured.

    Attributes:
        side_stream: The stream of the copies.
        nbytes: Bytes of page-locked memory allocated.
    """

    def __init__(self) -> None:
        self.side_stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        # Also by dtype: the tensors of a checkpoint differ between shapes.
        self._host: dict[tuple[int, int, int, torch.dtype], Tensor] = {}
        self._places: dict[int, list[list[Tensor]]] = {}
        self._leaving: deque[_Copy] = deque()
        self._coming: dict[int, _Copy] = {}
        self._outgrown: list[Tensor] = []
        self.nbytes = 0

    def offload(self, layer: int, parts: Sequence[list[Tensor]], *, beside: int = 0) -> None:
        """Copy a layer's tensors of each part to the host; the caller may drop them immediately.

        ``beside`` is the number of earlier offloads that need not have finished.
        """
        self.wait(beside)
        places = [
            [self._place((layer, i, j, x.dtype), x) for j, x in enumerate(part)]
            for i, part in enumerate(parts)
        ]
        self._places[layer] = places
        self.side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side_stream):
            for place, x in _pairs(places, parts):
                place.copy_(x, non_blocking=True)
        self._leaving.append(_Copy(list(parts), self.side_stream.record_event()))

    def wait(self, beside: int = 0) -> None:
        """Make the GPU stream wait for all but the last offloads; their GPU memory is free then."""
        while len(self._leaving) > beside:
            self._wait_for(self._leaving.popleft())

    def prefetch(self, layer: int) -> None:
        """Start to copy a layer's tensors back, if any were offloaded."""
        places = self._places.pop(layer, None)
        if places is None:
            return
        parts = [
            [torch.empty(place.shape, dtype=place.dtype, device="cuda") for place in part]
            for part in places
        ]
        self.side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side_stream):
            for place, x in _pairs(places, parts):
                x.copy_(place, non_blocking=True)
        self._coming[layer] = _Copy(parts, self.side_stream.record_event())

    def get(self, layer: int) -> list[list[Tensor]]:
        """Return the tensors that were copied back."""
        coming = self._coming.pop(layer)
        self._wait_for(coming)
        return coming.parts

    def _wait_for(self, copy: _Copy) -> None:
        torch.cuda.current_stream().wait_event(copy.done)

    def _place(self, key: tuple[int, int, int, torch.dtype], x: Tensor) -> Tensor:
        held = self._host.get(key)
        if held is None or held.numel() < x.numel():
            if held is not None:
                self._outgrown.append(held)  # a captured graph may still copy there
            held = _page_locked(x.numel(), x.dtype)
            self._host[key] = held
            self.nbytes += held.nbytes
        return held[: x.numel()].view(x.shape)


def _page_locked(numel: int, dtype: torch.dtype) -> Tensor:
    """Return page-locked memory, [numel], not initialised."""
    nbytes = numel * dtype.itemsize
    if nbytes < _LEAST_BYTES:
        return torch.empty(numel, dtype=dtype, pin_memory=True)
    return host_memory(nbytes, page_locked=True).view(dtype)


def _pairs(
    places: Sequence[Sequence[Tensor]], parts: Sequence[Sequence[Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """Return each tensor with its host tensor."""
    rows = zip(places, parts, strict=True)
    return [pair for place, part in rows for pair in zip(place, part, strict=True)]
