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

from halfbyte.linear.frozen import FrozenLinear
from halfbyte.linear.group import LinearGroup, OpenLayer
from halfbyte.quant import QuantizedWeight
from halfbyte.quant.format import dequantize_all

# Elements of which a multiple lies before each set: what TMA and wide stores ask for.
_ALIGNED = 128


@dataclass
class _Place:
    """Memory for the decoded weights of a decoder layer.

    Attributes:
        buffer: The memory, as large as the largest layer that was here.
        holds: Where the packed weights are whose decoded ones are in it, their versions, and where
            in it these are.
    """

    buffer: Tensor | None = None
    holds: list[tuple[int, int, int]] = field(default_factory=list)

    def room(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the memory, made anew if it is too small or of another kind."""
        held = self.buffer
        if held is None or held.numel() < numel or (held.dtype, held.device) != (dtype, device):
            self.buffer = None  # before there are two
            self.buffer = held = torch.empty(numel, dtype=dtype, device=device)
            self.holds = []
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
    ) -> dict[FrozenLinear, Tensor]:
        """Return W of each linear, decoded now or still in its place."""
        groups: dict[LinearGroup, list[FrozenLinear]] = {}
        for linear in linears:
            groups.setdefault(linear.group, []).append(linear)
        held = {m: q for members in groups.values() for m in members if (q := m.quantized)}
        weights, outs, start = {}, [], 0
        device = linears[0].device if linears else torch.device("cpu")
        whole = place.room(sum(_padded(q) for q in held.values()), dtype, device)
        for members in groups.values():
            for linear in members:
                if (q := held.get(linear)) is None:
                    # A plain weight in the dtype of the product is used where it lies.
                    weights[linear] = linear.decode(dtype)
                    continue
                # Below the last of its group, so that their product with one x can be one.
                outs.append(whole[start : start + q.numel].view(q.shape))
                weights[linear] = outs[-1]
                start += q.numel
            start += -start % _ALIGNED
        holds = [
            (q.codes.data_ptr(), q.codes._version, out.data_ptr())
            for q, out in zip(held.values(), outs, strict=True)
        ]
        still = again or place is not self._shared
        if held and not (still and holds == place.holds):
            place.holds = []
            dequantize_all(list(held.values()), dtype, outs=outs)
            self.decodes += len(held)
            place.holds = holds
        return weights


def _padded(q: QuantizedWeight) -> int:
    return q.numel + _ALIGNED
