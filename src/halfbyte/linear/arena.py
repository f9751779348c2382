"""One allocation on a GPU for all packed weights of a model.

torch's allocator requests memory from the driver in segments: 20 MB for tensors below 10 MB, a
segment each for larger ones. With the thousand tensors of a packed 7B model, 0.15 GB of these
segments stays unusable. One allocation avoids that: training at 2x512 tokens reserves 4.85 GB
instead of 4.99.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from halfbyte.quant.weight import QuantizedWeight

# Alignment of each tensor in bytes: at least the allocator's, and sufficient for all kernels.
_ALIGNED = 256


class Arena:
    """Contiguous memory for packed weights.

    Args:
        weights: The weights to reserve memory for; their tensors may be on the meta device.
        device: Device of the memory.
    """

    def __init__(self, weights: Iterable[QuantizedWeight], device: torch.device | str) -> None:
        sizes = [_padded(tensor) for q in weights for tensor in q.tensors().values()]
        self._memory = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        self._used = 0

    def hold(self, weight: QuantizedWeight) -> QuantizedWeight:
        """Return ``weight`` with its tensors copied into the arena.

        If the remaining memory is too small, it is returned unchanged.
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
