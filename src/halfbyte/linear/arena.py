"""One tensor on a GPU for all packed weights of a model.

torch's allocator takes memory from the driver in pieces: 20 MB for what is smaller than 10, a piece
of its own for what is larger, and what is left of a piece is used by what happens to fit. The
thousand tensors of a packed 7B model so leave 0.15 GB that nothing fits in. In one tensor they
leave none: training at 2x512 tokens holds 4.85 GB reserved instead of 4.99.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from halfbyte.quant.weight import QuantizedWeight

# Where a tensor may begin: what the allocator aligns to, at least, and all that kernels ask for.
_ALIGNED = 256


class Arena:
    """Memory for packed weights, side by side.

    Args:
        weights: What there must be room for; their tensors may be on the meta device.
        device: Where it is.
    """

    def __init__(self, weights: Iterable[QuantizedWeight], device: torch.device | str) -> None:
        sizes = [_padded(tensor) for q in weights for tensor in q.tensors().values()]
        self._memory = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        self._used = 0

    def hold(self, weight: QuantizedWeight) -> QuantizedWeight:
        """Return ``weight``, its tensors copied to the next free place.

        Where there is no room, because more comes than was said, it is returned as it is.
        """
        tensors = weight.tensors()
        if self._used + sum(map(_padded, tensors.values())) > len(self._memory):
            return weight
        held: dict[str, Any] = {}
        for name, tensor in tensors.items():
            place = self._memory[self._used : self._used + tensor.nbytes].view(tensor.dtype)
            held[name] = place.view(tensor.shape).copy_(tensor)
            self._used += _padded(tensor)
        return replace(weight, **held)


def _padded(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNED) * _ALIGNED
