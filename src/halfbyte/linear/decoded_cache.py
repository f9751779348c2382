"""A cache of decoded weights: each decoder layer is decoded once for all its products.

Outside of it, a linear decodes its weight for each product. Inside ``DecodedWeightCache.opened``
the weights of a whole decoder layer are decoded once, into a buffer shared by all decoder layers,
and all micro-batches use them. If memory allows, decoder layers get buffers of their own and stay
decoded across steps (``DecodedWeightCache.keep``): their products then cost the same as with
16-bit weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from halfbyte.linear.decoded_weight import DecodedWeight, WeightLayout
from halfbyte.linear.frozen import FrozenLinear
from halfbyte.linear.group import LinearGroup, OpenLayer, decode_together
from halfbyte.quant.weight import QuantizedWeight

# Alignment of each group in bytes: required by TMA and wide stores.
_ALIGNED = 256


@dataclass
class _Place:
    """Memory for the decoded weights of a decoder layer.

    Attributes:
        buffer: The memory, uint8, as large as the largest layer decoded into it so far.
        weights: The decoded weights in it.
        holds: For each: address and version of the packed weight, its layout, the dtype of the
            products, and the address of the memory it is in.
        forward_only: Whether gradients cannot be computed with them.
    """

    buffer: Tensor | None = None
    weights: list[DecodedWeight] = field(default_factory=list)
    holds: list[tuple[int, int, WeightLayout, torch.dtype, int]] = field(default_factory=list)
    forward_only: bool = False

    def room(self, nbytes: int, device: torch.device) -> Tensor:
        """Return the memory, reallocated if it is too small or on another device."""
        held = self.buffer
        if held is None or held.numel() < nbytes or held.device != device:
            self.buffer = held = None  # freed first, so that two never exist at once
            self.weights, self.holds = [], []
            self.buffer = held = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return held


class DecodedWeightCache:
    """A buffer into which one decoder layer after another is decoded.

    It grows to the size of the largest layer. At any time only the weights of one layer (and of the
    kept ones) are decoded, and on a CPU the pages are faulted in once per run instead of once per
    product (a fresh 64 MB buffer costs about 12 ms of page faults, decoding into it about 4).
    On a GPU all weights of a layer are decoded in one launch.

    Attributes:
        decodes: Number of weights decoded so far.
    """

    def __init__(self) -> None:
        self._shared = _Place()
        self._own: dict[FrozenLinear, _Place] = {}
        self.decodes = 0

    @property
    def nbytes(self) -> int:
        """Size of all buffers in bytes."""
        places = [self._shared, *self._own.values()]
        return sum(place.buffer.nbytes for place in places if place.buffer is not None)

    def keep(self, layers: Sequence[Sequence[FrozenLinear]], dtype: torch.dtype) -> None:
        """Decode these decoder layers and keep them decoded, instead of any kept before.

        They are decoded immediately, not when they are opened, because that may happen during CUDA
        graph capture, where nothing is computed. The shared buffer is freed, and allocated again
        for the first layer that is not kept.

        Args:
            layers: The linears of each layer.
            dtype: dtype of the products.
        """
        wanted = {linears[0]: linears for linears in layers if linears}
        self._shared = _Place()
        self._own = {first: place for first, place in self._own.items() if first in wanted}
        for first, linears in wanted.items():
            self._own.setdefault(first, _Place())
            with self.opened(linears, dtype):
                pass

    def forget(self) -> None:
        """Mark the shared buffer as empty: a dry run decodes nothing into it."""
        self._shared.holds = []

    @contextmanager
    def opened(
        self,
        linears: Sequence[FrozenLinear],
        dtype: torch.dtype,
        *,
        again: bool = False,
        forward_only: bool = False,
    ) -> Iterator[OpenLayer]:
        """Decode ``linears`` once; inside the context, their ``dense(dtype)`` is free.

        Yields the state shared by their products.

        Args:
            linears: Linears on one device.
            dtype: dtype of the products.
            again: Whether to reuse the buffer if it already holds these linears. Kept ones are
                always reused, unless their packed weights have changed.
            forward_only: Whether no gradient is computed in the context.
        """
        place = self._own.get(linears[0], self._shared) if linears else self._shared
        forward_only = forward_only and place is self._shared
        layer = OpenLayer(self._decoded(linears, dtype, place, again, forward_only), dtype)
        try:
            layer.open()
            yield layer
        finally:
            layer.close()

    def _decoded(
        self,
        linears: Sequence[FrozenLinear],
        dtype: torch.dtype,
        place: _Place,
        again: bool,
        forward_only: bool,
    ) -> dict[FrozenLinear, DecodedWeight]:
        """Return W of each linear, newly decoded or reused from the buffer."""
        groups: dict[LinearGroup, list[FrozenLinear]] = {}
        for linear in linears:
            groups.setdefault(linear.group, []).append(linear)
        packed = {m: q for members in groups.values() for m in members if (q := m.quantized)}
        sets = [held for members in groups.values() for held in _by_layout(members, packed)]
        sizes = [held[0].layout.nbytes([packed[m].shape for m in held], dtype) for held in sets]
        nbytes = sum(size + -size % _ALIGNED for size in sizes)
        whole = place.room(nbytes, linears[0].device if linears else torch.device("cpu"))
        outs: dict[FrozenLinear, Any] = {}
        holds, start = [], 0
        for held, size in zip(sets, sizes, strict=True):
            memory, layout = whole[start : start + size], held[0].layout
            shapes = [packed[m].shape for m in held]
            outs |= zip(held, layout.places(memory, shapes, dtype), strict=True)
            for linear in held:
                codes = packed[linear].codes
                holds.append((codes.data_ptr(), codes._version, layout, dtype, memory.data_ptr()))
            start += size + -size % _ALIGNED
        still = (again or place is not self._shared) and place.forward_only <= forward_only
        if packed and not (still and holds == place.holds):
            place.holds, place.weights = [], []
            decoded = decode_together(list(packed), dtype, outs, forward_only=forward_only)
            place.weights = [decoded[linear] for linear in packed]
            self.decodes += len(packed)
            place.holds, place.forward_only = holds, forward_only
        weights = decode_together([linear for linear in linears if linear not in packed], dtype)
        if packed:
            weights |= zip(packed, place.weights, strict=True)
        return {linear: weights[linear] for linear in linears}


def _by_layout(
    members: Sequence[FrozenLinear], packed: Mapping[FrozenLinear, QuantizedWeight]
) -> list[list[FrozenLinear]]:
    """Return those of a group that are packed, by layout."""
    found: dict[WeightLayout, list[FrozenLinear]] = {}
    for linear in members:
        if linear in packed:
            found.setdefault(linear.layout, []).append(linear)
    return list(found.values())
