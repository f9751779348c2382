"""Where the weights of one decoder layer are decoded to, once for all that multiply with them.

Called alone, a linear decodes its weight for each product. Inside ``DecodedWeightCache.opened`` the
weights of a whole decoder layer are decoded once, into a buffer that every decoder layer shares,
and all micro-batches multiply with them. Where memory is left, decoder layers may have a buffer of
their own and stay decoded from step to step (``DecodedWeightCache.keep``): their products then cost
what those of 16-bit weights cost.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from halfbyte.linear.decoded_weight import DecodedWeight, WeightLayout
from halfbyte.linear.frozen import FrozenLinear
from halfbyte.linear.group import LinearGroup, OpenLayer, decode_together

# Bytes of which a multiple lies before each group: what TMA and wide stores ask for.
_ALIGNED = 256


@dataclass
class _Place:
    """Memory for the decoded weights of a decoder layer.

    Attributes:
        buffer: The memory, uint8, as large as the largest layer that was here.
        weights: The decoded weights in it.
        holds: Of each where the packed weight is, its version, its layout, the dtype of the
            products, and where in the memory it is.
    """

    buffer: Tensor | None = None
    weights: list[DecodedWeight] = field(default_factory=list)
    holds: list[tuple[int, int, WeightLayout, torch.dtype, int]] = field(default_factory=list)

    def room(self, nbytes: int, device: torch.device) -> Tensor:
        """Return the memory, made anew if it is too small or elsewhere."""
        held = self.buffer
        if held is None or held.numel() < nbytes or held.device != device:
            self.buffer = held = None  # before there are two
            self.weights, self.holds = [], []
            self.buffer = held = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return held


class DecodedWeightCache:
    """A buffer into which one decoder layer after another is decoded.

    A larger layer makes it grow. So the decoded weights alive at any time are those of one layer
    (and of those that are kept), and on a CPU the pages are touched once per run instead of once a
    product (a fresh 64 MB buffer costs about 12 ms of page faults, the decoding into it about 4).
    On a GPU all weights of a layer are one launch.

    Attributes:
        decodes: How many weights have been decoded so far.
    """

    def __init__(self) -> None:
        self._shared = _Place()
        self._own: dict[FrozenLinear, _Place] = {}
        self.decodes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        places = [self._shared, *self._own.values()]
        return sum(place.buffer.nbytes for place in places if place.buffer is not None)

    def keep(self, layers: Sequence[Sequence[FrozenLinear]], dtype: torch.dtype) -> None:
        """Decode these decoder layers now, and keep them so; no others any more.

        It is done now, and not when they are opened, because a layer may be opened while a CUDA
        graph is captured, where nothing is computed. The shared buffer is let go of, and comes back
        with the first layer that is not kept.

        Args:
            layers: The linears of each.
            dtype: What to decode to.
        """
        wanted = {linears[0]: linears for linears in layers if linears}
        self._shared = _Place()
        self._own = {first: place for first, place in self._own.items() if first in wanted}
        for first, linears in wanted.items():
            self._own.setdefault(first, _Place())
            with self.opened(linears, dtype):
                pass

    def forget(self) -> None:
        """Take the shared buffer to hold nothing: in a dry run nothing is decoded into it."""
        self._shared.holds = []

    @contextmanager
    def opened(
        self, linears: Sequence[FrozenLinear], dtype: torch.dtype, *, again: bool = False
    ) -> Iterator[OpenLayer]:
        """Decode ``linears`` once; inside, their ``dense(dtype)`` costs nothing.

        Yields what their products share.

        Args:
            linears: Of one device.
            dtype: What to decode to.
            again: Whether they need not be decoded if they were the last that were. Those that are
                kept never need be, unless their packed weights have changed.
        """
        place = self._own.get(linears[0], self._shared) if linears else self._shared
        layer = OpenLayer(self._decoded(linears, dtype, place, again), dtype)
        try:
            layer.open()
            yield layer
        finally:
            layer.close()

    def _decoded(
        self, linears: Sequence[FrozenLinear], dtype: torch.dtype, place: _Place, again: bool
    ) -> dict[FrozenLinear, DecodedWeight]:
        """Return W of each linear, decoded now or still in its place."""
        groups: dict[LinearGroup, list[FrozenLinear]] = {}
        for linear in linears:
            groups.setdefault(linear.group, []).append(linear)
        packed = {m: q for members in groups.values() for m in members if (q := m.quantized)}
        kinds = {m: m.layout.data_dtype(dtype) for m in packed}
        nbytes = sum(q.numel * kinds[m].itemsize + _ALIGNED for m, q in packed.items())
        whole = place.room(nbytes, linears[0].device if linears else torch.device("cpu"))
        outs, start = {}, 0
        for members in groups.values():
            for linear in members:
                if (q := packed.get(linear)) is None:
                    continue
                kind = kinds[linear]
                start += -start % kind.itemsize
                stop = start + q.numel * kind.itemsize
                # Below the last of its group, so that their product with one x can be one.
                outs[linear] = whole[start:stop].view(kind).view(q.shape)
                start = stop
            start += -start % _ALIGNED
        holds = [
            (q.codes.data_ptr(), q.codes._version, linear.layout, dtype, outs[linear].data_ptr())
            for linear, q in packed.items()
        ]
        still = again or place is not self._shared
        if packed and not (still and holds == place.holds):
            place.holds, place.weights = [], []
            place.weights = list(decode_together(list(packed), dtype, outs).values())
            self.decodes += len(packed)
            place.holds = holds
        weights = decode_together([linear for linear in linears if linear not in packed], dtype)
        if packed:
            weights |= zip(packed, place.weights, strict=True)
        return {linear: weights[linear] for linear in linears}
