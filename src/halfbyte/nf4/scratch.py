"""Where the weights of one decoder layer are decoded to, once for all that multiply with them.

Called alone, a linear decodes its weight for each product. Inside ``WeightScratch.opened`` the
weights of a whole decoder layer are decoded once, into a buffer that every decoder layer shares,
and all micro-batches multiply with them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from halfbyte.nf4 import QuantizedWeight
from halfbyte.nf4.format import dequantize_all
from halfbyte.nf4.linear import FrozenLinear
from halfbyte.nf4.shared import SharedInput, ThinProducts

# Elements of which a multiple lies before each set: what the copy engine and wide stores ask for.
_ALIGNED = 128


class WeightScratch:
    """A buffer into which one decoder layer after another is decoded.

    A larger layer makes it grow. So the decoded weights alive at any time are those of one layer,
    and on a CPU the pages are touched once per run instead of once per product (a fresh 64 MB
    buffer costs about 12 ms of page faults, the decoding into it about 4). On a GPU all weights of
    a layer are one launch.

    Attributes:
        decodes: How many weights have been decoded so far.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._holds: list[tuple[int, int]] = []
        self.decodes = 0

    @contextmanager
    def opened(
        self, linears: Sequence[FrozenLinear], dtype: torch.dtype, *, again: bool = False
    ) -> Iterator[ThinProducts]:
        """Decode ``linears`` once; inside, their ``dense(dtype)`` costs nothing.

        Yields what carries the thin products of their adapters from one run to another.

        Args:
            linears: Of one device.
            dtype: What to decode to.
            again: Whether they need not be decoded if they were the last that were.
        """
        sets: dict[SharedInput, list[FrozenLinear]] = {}
        for linear in linears:
            sets.setdefault(linear.shared, []).append(linear)
        held = {m: q for members in sets.values() for m in members if (q := m.quantized)}
        try:
            outs, start = [], 0
            whole = self._buffer(sum(_padded(q) for q in held.values()), dtype, linears)
            for members in sets.values():
                for linear in members:
                    if (q := held.get(linear)) is None:
                        # A plain weight in the dtype of the product is used where it lies.
                        linear._dense = linear.decode(dtype)
                        continue
                    # Below the last of its set, so that their product with one x can be one.
                    outs.append(whole[start : start + q.numel].view(q.shape))
                    linear._dense = outs[-1]
                    start += q.numel
                start += -start % _ALIGNED
            for shared in sets:
                shared.open(list(sets))
            holds = [(q.codes.data_ptr(), q.codes._version) for q in held.values()]
            if held and not (again and holds == self._holds):
                self._holds = []
                dequantize_all(list(held.values()), dtype, outs=outs)
                self.decodes += len(held)
                self._holds = holds
            yield ThinProducts(sets)
        finally:
            for linear in linears:
                linear._dense = None
            for shared in sets:
                shared.close()

    def _buffer(self, numel: int, dtype: torch.dtype, linears: Sequence[FrozenLinear]) -> Tensor:
        key = (dtype, linears[0].device if linears else torch.device("cpu"))
        held = self._buffers.get(key)
        if held is None or held.numel() < numel:
            self._buffers.pop(key, None)
            held = self._buffers[key] = torch.empty(numel, dtype=dtype, device=key[1])
            self._holds = []
        return held


def _padded(q: QuantizedWeight) -> int:
    return q.numel + _ALIGNED
