"""Layer inputs in host memory, while the layers above them are at work.

A layer that is run again in backward needs its input, 8 kB a token and layer in a 7B model. Copied
to page-locked memory by the card's copy engines, beside the products, it takes no time that
anybody waits for, and two layers' inputs are on the card at a time instead of all.
"""

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor


class _Copy(NamedTuple):
    """A copy under way: what it reads or writes on the card, and when it is done."""

    tensors: list[Tensor]
    done: torch.cuda.Event


class Shelf:
    """Puts the inputs of layers away, and brings them back in time.

    Everything is ordered by events between two streams, so it can be captured in a CUDA graph. Host
    memory is allocated when a shape first comes, and kept; that cannot be captured.

    Attributes:
        nbytes: Bytes of page-locked memory that are held.
    """

    def __init__(self) -> None:
        self._side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._host: dict[tuple[int, int], Tensor] = {}
        self._places: dict[int, list[Tensor]] = {}
        self._leaving: deque[_Copy] = deque()
        self._coming: dict[int, _Copy] = {}
        self._outgrown: list[Tensor] = []
        self.nbytes = 0

    def put(self, layer: int, inputs: list[Tensor]) -> None:
        """Copy a layer's inputs to the host; they may be forgotten at once."""
        while len(self._leaving) > 1:
            self._wait(self._leaving.popleft())
        places = [self._place(layer, i, x) for i, x in enumerate(inputs)]
        self._places[layer] = places
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            for place, x in zip(places, inputs, strict=True):
                place.copy_(x, non_blocking=True)
        self._leaving.append(_Copy(list(inputs), self._side.record_event()))

    def close(self) -> None:
        """Wait, on the card, until all that was put away is."""
        while self._leaving:
            self._wait(self._leaving.popleft())

    def fetch(self, layer: int) -> None:
        """Begin to bring a layer's inputs back, if they were put away."""
        places = self._places.pop(layer, None)
        if places is None:
            return
        inputs = [torch.empty(place.shape, dtype=place.dtype, device="cuda") for place in places]
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            for place, x in zip(places, inputs, strict=True):
                x.copy_(place, non_blocking=True)
        self._coming[layer] = _Copy(inputs, self._side.record_event())

    def take(self, layer: int) -> list[Tensor]:
        """Return the inputs that were fetched."""
        coming = self._coming.pop(layer)
        self._wait(coming)
        return coming.tensors

    def _wait(self, copy: _Copy) -> None:
        torch.cuda.current_stream().wait_event(copy.done)

    def _place(self, layer: int, part: int, x: Tensor) -> Tensor:
        held = self._host.get((layer, part))
        if held is None or held.numel() < x.numel() or held.dtype != x.dtype:
            if held is not None:
                self._outgrown.append(held)  # a captured graph may still copy there
            held = torch.empty(x.numel(), dtype=x.dtype, pin_memory=True)
            self._host[layer, part] = held
            self.nbytes += held.nbytes
        return held[: x.numel()].view(x.shape)
