"""Where the state lives."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from halfbyte.optim.layout import Group, Piece

Update = Callable[[Group, Tensor, int], None]


class Resident:
    """All state in memory of the device."""

    def __init__(self, pieces: Sequence[Piece], device: torch.device) -> None:
        """Allocate it, zero."""
        self.pieces = pieces
        self.group = Group(tuple(pieces))
        self.memory = torch.zeros(self.group.nbytes, dtype=torch.uint8, device=device)

    def visit(self, update: Update) -> None:
        """Call ``update`` once, with everything."""
        update(self.group, self.memory, 0)
