"""The layout of all optimizer state in one contiguous range of bytes.

Paging moves bytes, regardless of parameters. So all state is one range of bytes, split into
*chunks* (a parameter's elements, or 4 M of them if it has more), each contiguous: first moments,
second moments, their scales, master copy. Adjacent chunks form a *bucket*, which is moved and
updated together. Gradients are one tensor, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfbyte.optim.reference import BLOCK, SMALLEST_8BIT

PIECE_ELEMENTS = 1 << 22
GROUP_BYTES = 16 << 20  # a power of two: torch rounds page-locked memory up to one
_ALIGNMENT = 256

STATE_BYTES = {torch.float32: 4, torch.uint8: 1}


@dataclass(frozen=True)
class StateChunk:
    """Elements of one parameter, and the location of their state.

    Attributes:
        index: Index of the parameter.
        start: Index of the first element.
        count: Number of elements.
        offset: Offset of the state in bytes.
        coded: Whether moments are 8 bits wide.
        master: Whether there is a float32 copy of the parameter.
    """

    index: int
    start: int
    count: int
    offset: int
    coded: bool
    master: bool

    def fields(self) -> dict[str, tuple[torch.dtype, int]]:
        """Return dtype and number of elements of every tensor of the state, in order."""
        kind = torch.uint8 if self.coded else torch.float32
        names = {"exp_avg": (kind, self.count), "exp_avg_sq": (kind, self.count)}
        if self.coded:
            blocks = -(-self.count // BLOCK)
            names |= {n + "_scales": (torch.float32, blocks) for n in ("exp_avg", "exp_avg_sq")}
        if self.master:
            names["master"] = torch.float32, self.count
        return names

    @property
    def nbytes(self) -> int:
        """Bytes, including padding."""
        return sum(_aligned(STATE_BYTES[kind] * count) for kind, count in self.fields().values())

    def views(self, memory: Tensor, base: int = 0) -> dict[str, Tensor]:
        """Return the state's tensors.

        Args:
            memory: uint8, the range of bytes from ``base`` on.
            base: Offset of ``memory`` in bytes.
        """
        found, place = {}, self.offset - base
        for name, (kind, count) in self.fields().items():
            nbytes = STATE_BYTES[kind] * count
            found[name] = memory[place : place + nbytes].view(kind)
            place += _aligned(nbytes)
        return found


@dataclass(frozen=True)
class Bucket:
    """Adjacent pieces, moved and updated together."""

    pieces: tuple[StateChunk, ...]

    @property
    def offset(self) -> int:
        """Offset of its state in bytes."""
        return self.pieces[0].offset

    @property
    def nbytes(self) -> int:
        """Bytes of its state."""
        return self.pieces[-1].offset + self.pieces[-1].nbytes - self.offset


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def pieces_of(parameters: Sequence[Tensor], *, bits: int, master: bool) -> list[StateChunk]:
    """Lay out the state of ``parameters``.

    Args:
        parameters: The parameters; those of fewer than 4096 elements keep 32 bits.
        bits: 8 or 32.
        master: Whether 16-bit parameters get a float32 copy.
    """
    pieces, offset = [], 0
    for index, parameter in enumerate(parameters):
        coded = bits == 8 and parameter.numel() >= SMALLEST_8BIT
        copied = master and parameter.dtype != torch.float32
        for start in range(0, parameter.numel(), PIECE_ELEMENTS):
            count = min(PIECE_ELEMENTS, parameter.numel() - start)
            pieces.append(StateChunk(index, start, count, offset, coded, copied))
            offset += pieces[-1].nbytes
    return pieces


def groups_of(pieces: Sequence[StateChunk], parts: int = 1) -> list[Bucket]:
    """Split pieces into groups of 16 MiB or an eighth of all, whichever is less; at least a piece.

    While the state is on the host, two groups are on the device at a time.

    Args:
        pieces: Adjacent pieces.
        parts: The processes that each update a part; the eighth is of such a part.
    """
    limit = min(GROUP_BYTES, sum(piece.nbytes for piece in pieces) // (8 * parts))
    groups: list[list[StateChunk]] = []
    size = 0
    for piece in pieces:
        if not groups or size + piece.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.nbytes
    return [Bucket(tuple(members)) for members in groups]


def gradients_in_one(parameters: Sequence[nn.Parameter], more: int = 0) -> Tensor:
    """Allocate the gradients of all parameters, zeros, in one tensor, and return it.

    ``more`` elements follow them.

    With existing gradients, the first step of a resumed run accumulates like every other. In one
    tensor, their norm is one reduction and zeroing is one launch. Each is aligned to 256 bytes.
    """
    sizes = [-(-parameter.numel() // 64) * 64 for parameter in parameters]
    together = torch.zeros(sum(sizes) + more, dtype=torch.float32, device=parameters[0].device)
    for parameter, part in zip(parameters, torch.split(together, [*sizes, more]), strict=False):
        parameter.grad = part[: parameter.numel()].view_as(parameter)
    return together
