"""One optimizer state for several processes of a machine, in host memory that all of them map.

Each process updates a part of it: adjacent buckets, about 1/N of the bytes. They pass through its
device as with explicit paging (paging.py). Then it has new values of its part of the parameters
only, and the caller exchanges them (train/data_parallel.py).

That is ZeRO's first stage (Rajbhandari et al. 2020, section 5.1), except that the parts are not in
N private memories. Since all can read all of it, any process saves it whole, even when another has
died, and resuming with another number of processes is nothing special.

A process writes its part only after the gradients have been summed, and the next sum needs all
processes. So while one waits for a sum, the state is that of the last whole step, unless another
process has seen the end of that sum already: which is why they count their updates in the same
memory.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from halfbyte.optim.buckets import Bucket


class SharedState:
    """One process's view of the state.

    Args:
        rank: Number of this process on this machine.
        size: Processes on this machine.
        allocate: Returns host memory of a number of bytes, zeros, uint8, the same for all of them;
            each calls it once.
    """

    def __init__(self, rank: int, size: int, allocate: Callable[[int], Tensor]) -> None:
        self.rank, self.size, self._allocate = rank, size, allocate
        self._updates = torch.zeros(size, dtype=torch.int64, device="cpu")

    def allocate(self, nbytes: int) -> Tensor:
        """Return memory for the state, uint8 [nbytes]."""
        start = -(-nbytes // 8) * 8
        memory = self._allocate(start + 8 * self.size)
        self._updates = memory[start:].view(torch.int64)
        return memory[:nbytes]

    def own(self, buckets: Sequence[Bucket]) -> range:
        """Return the numbers of the buckets that this process updates; maybe none."""
        total = sum(bucket.nbytes for bucket in buckets)
        owner, place = [], 0
        for bucket in buckets:
            middle = place + bucket.nbytes // 2
            owner.append(min(self.size - 1, self.size * middle // total))
            place += bucket.nbytes
        mine = [number for number, one in enumerate(owner) if one == self.rank]
        return range(mine[0], mine[-1] + 1) if mine else range(0)

    def begin_update(self) -> None:
        """Count an update of this process, before it changes the state."""
        self._updates[self.rank] += 1

    @property
    def is_whole(self) -> bool:
        """Whether all processes have begun as many updates as this one."""
        return bool((self._updates == self._updates[self.rank]).all())
