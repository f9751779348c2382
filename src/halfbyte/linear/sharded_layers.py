"""The frozen weights of layers, each divided among the processes of a machine.

Process r of N has the r-th part of each layer's bytes, on its GPU or in host memory, and maps the
parts of the others: GPU memory through CUDA's inter-process handles, host memory through file
descriptors. To bring a layer to its GPU, a process copies the N parts. The bytes that cross a wire
are packed ones, 4 bits a weight.

Copies are one-sided: a process reads what others hold, and they do nothing for it. So unlike with
collective operations, processes may differ in what they do and when: in the number of their
micro-batches, in repeating a step that ran out of memory, in CUDA graphs. The parts are read only,
and complete before the first copy (`connect`).

Parts on GPUs need peer access between them (NVLink, or PCIe where the driver allows it).
"""

import base64
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from halfbyte.errors import ConfigError
from halfbyte.linear.layer_store import LayersElsewhere
from halfbyte.linear.layer_stream import LayerWeights
from halfbyte.runtime.host_memory import opened_memory, shared_memory

_ALIGNED = 256


class Group(Protocol):
    """The processes of a run, as far as they are needed here; see runtime/distributed.py."""

    def gather_object(self, value: Any) -> list[Any]:
        """Return the JSON values of all processes, by rank."""


class ShardedLayers(LayersElsewhere):
    """The frozen weights of layers, of which this process holds a part of each.

    Args:
        layers: Layout of each layer.
        device: The device that layers are copied to.
        rank: Number of this process on this machine.
        size: Processes on this machine.
        place: Where the parts are.
    """

    can_be_captured = True

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        device: torch.device | str,
        *,
        rank: int,
        size: int,
        place: Literal["gpu", "host"],
    ) -> None:
        super().__init__(layers, device)
        self._rank, self._size, self._device = rank, size, torch.device(device)
        parts = (-(-layer.nbytes // size) for layer in layers)
        self._part = [-(-part // _ALIGNED) * _ALIGNED for part in parts]
        self._starts = [0, *accumulate(self._part)]
        # Between GPUs, and within host memory, copies of layers would gain nothing, and take the
        # memory that dividing was to save.
        self.may_stay = place == "host" and self._locked
        self._handle: list[Any] | None = None  # of host memory
        total = max(1, self._starts[-1])
        if place == "gpu":
            self.slots = 1  # a layer comes in a fraction of the time that one takes
            self._own = torch.empty(total, dtype=torch.uint8, device=self._device)
        else:
            self._own, self._handle = shared_memory(total, page_locked=self._locked)
        self._parts: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes of this process's parts."""
        return self._own.nbytes

    def _new_memory(self, nbytes: int) -> Tensor:
        # On a GPU, weights are packed there: a layer is put together where it was packed.
        if self._own.is_cuda:
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        return super()._new_memory(nbytes)

    def _move(self, layer: int, memory: Tensor) -> None:
        start, part = self._rank * self._part[layer], self._part[layer]
        bytes_here = memory[start : start + part]
        place = self._starts[layer]
        self._own[place : place + len(bytes_here)].copy_(bytes_here)

    def connect(self, group: Group, *, machine: int = 0) -> None:
        """Map the parts of the other processes of this machine, when all have loaded theirs.

        Args:
            group: The processes.
            machine: The number of this machine, if there are several; each holds all parts.

        Raises:
            ConfigError: The parts of another process cannot be read, or are not what it holds.
        """
        if self._own.is_cuda:
            torch.cuda.synchronize()
        mine = {
            "machine": machine,
            "rank": self._rank,
            "handle": self._handle or _gpu_handle(self._own),
            "sum": _checksum(self._own),
        }
        found = [one for one in group.gather_object(mine) if one["machine"] == machine]
        parts: dict[int, Tensor] = {}
        failed = ""
        for one in found:
            try:
                parts[one["rank"]] = part = (
                    self._own
                    if one["rank"] == self._rank
                    else _opened(
                        one["handle"],
                        len(self._own),
                        on_gpu=self._own.is_cuda,
                        page_locked=self._locked,
                    )
                )
                if _checksum(part) != one["sum"]:
                    failed = f"what is read of rank {one['rank']} is not what it holds"
            except (RuntimeError, OSError) as error:
                failed = f"the weights of rank {one['rank']} cannot be read: {error}"
        reasons = [reason for reason in group.gather_object(failed) if reason]
        if reasons:
            raise ConfigError(
                f"shard: {reasons[0]}. GPUs without peer access can share the weights in host "
                "memory: --weights host"
            )
        self._parts = [parts[rank] for rank in range(self._size)]

    def copy_to(self, layer: int, out: Tensor) -> None:
        """See `layer_stream.LayerSource`; needs `connect`."""
        place, part = self._starts[layer], self._part[layer]
        for step in range(self._size):
            rank = (self._rank + step) % self._size  # not all from the same process at once
            into = out[rank * part : (rank + 1) * part]
            into.copy_(self._parts[rank][place : place + len(into)], non_blocking=True)


def _gpu_handle(own: Tensor) -> list[Any]:
    """Return how another process finds this memory of a GPU, a JSON value."""
    shared = own.untyped_storage()._share_cuda_()  # type: ignore[no-untyped-call]
    return [
        {"bytes": base64.b64encode(one).decode()} if isinstance(one, bytes) else one
        for one in shared
    ]


def _opened(handle: list[Any], nbytes: int, *, on_gpu: bool, page_locked: bool) -> Tensor:
    """Return the memory that another process described, uint8 [nbytes]."""
    if not on_gpu:
        return opened_memory(handle, nbytes, page_locked=page_locked)
    shared = [base64.b64decode(one["bytes"]) if isinstance(one, dict) else one for one in handle]
    shared[0] = torch.cuda.current_device()  # where it is opened, in this process's numbering
    storage = torch.UntypedStorage._new_shared_cuda(*shared)
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)[:nbytes]


def _checksum(memory: Tensor) -> int:
    words = memory[: len(memory) // 8 * 8].view(torch.int64)
    return int(words.sum()) + int(memory[len(words) * 8 :].sum())
