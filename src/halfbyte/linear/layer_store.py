"""Where the frozen weights of layers wait: in host memory, or in a file on a disk.

While a model is loaded, a store takes the weight of one module after another (`hold`, or `places`
and `loaded` for experts, which come one by one). Afterwards it is the source of a `LayerStream`.

From a file, layers are read ahead by threads into a ring of page-locked buffers, in the order in
which steps need them: forward, then backward from the layers that are still on the device. They are
read past the page cache, which would only compete for memory with what is in use.
"""

import logging
import os
import tempfile
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.errors import OutputError
from halfbyte.linear.experts import ExpertLinear
from halfbyte.linear.layer_stream import SLOTS, FrozenModule, LayerWeights
from halfbyte.runtime.host_memory import host_memory

# Layers in host memory while they come from a disk. The plan knows it, too (plan/ledger.py).
RING = 4

logger = logging.getLogger("halfbyte")

_PIECE = 2**24  # bytes read by a thread at a time
_PAGE = 4096  # reads past the page cache are of whole pages
_READERS = 8


class HostLayers:
    """The frozen weights of layers in host memory, page-locked if they go to a GPU.

    Memory of a layer is allocated with its first weight.

    Args:
        layers: Layout of each layer.
        device: The device that they are copied to.

    Attributes:
        layers: As given.
    """

    can_be_captured = True
    slots = SLOTS
    may_stay = True

    def __init__(self, layers: Sequence[LayerWeights], device: torch.device | str) -> None:
        self.layers = list(layers)
        self._locked = torch.device(device).type == "cuda"
        self._memory: dict[int, Tensor] = {}
        self._layer_of = {m: i for i, layer in enumerate(layers) for m in layer.modules}

    def __contains__(self, module: nn.Module) -> bool:
        """Return whether a module's weight waits here."""
        return module in self._layer_of

    def places(self, module: FrozenModule) -> dict[str, Tensor]:
        """Return the tensors that a module's weight is to be copied to."""
        layer = self._layer_of[module]
        held = self._memory.get(layer)
        if held is None:
            held = self._memory[layer] = self._new_memory(self.layers[layer].nbytes)
        return self.layers[layer].views(module, held)

    def _new_memory(self, nbytes: int) -> Tensor:
        return host_memory(nbytes, page_locked=self._locked)

    def hold(self, module: FrozenModule, tensors: dict[str, Tensor]) -> None:
        """Copy the tensors of a module's weight here.

        Raises:
            ValueError: They are not those of the layout.
        """
        places = self.places(module)
        for name, place in places.items():
            if tensors[name].shape != place.shape:
                raise ValueError(
                    f"{name} of shape {tuple(place.shape)} is expected, got "
                    f"{tuple(tensors[name].shape)}"
                )
            place.copy_(tensors[name])
        module.set_frozen_tensors(places)
        self.loaded(module)

    def loaded(self, module: FrozenModule) -> None:
        """Take note that a module's weight has been copied to its places, or one expert's."""

    def finish(self) -> None:
        """Take note that all weights are here."""

    def copy_to(self, layer: int, out: Tensor) -> None:
        """See `LayerSource`."""
        out.copy_(self._memory[layer], non_blocking=True)


class LayersElsewhere(HostLayers):
    """Layers that are put together in memory, and moved once all of a layer has been loaded."""

    def __init__(self, layers: Sequence[LayerWeights], device: torch.device | str) -> None:
        super().__init__(layers, device)
        self._missing = [sum(map(_count, layer.modules)) for layer in layers]

    def _new_memory(self, nbytes: int) -> Tensor:
        return host_memory(nbytes, page_locked=False)

    def loaded(self, module: FrozenModule) -> None:
        """See `HostLayers.loaded`; a layer is moved once it is complete."""
        layer = self._layer_of[module]
        self._missing[layer] -= 1
        if not self._missing[layer]:
            self._move(layer, self._memory.pop(layer))

    def finish(self) -> None:
        """See `HostLayers.finish`."""
        for layer in list(self._memory):
            self._move(layer, self._memory.pop(layer))

    def _move(self, layer: int, memory: Tensor) -> None:
        """Copy the bytes of a complete layer to where they wait."""
        raise NotImplementedError


class DiskLayers(LayersElsewhere):
    """The frozen weights of layers in a file, which is deleted with this object.

    Args:
        layers: Layout of each layer.
        device: The device that they are copied to.
        directory: Directory of the file.

    Raises:
        OutputError: The file cannot be created, or the disk has too little room.
    """

    can_be_captured = False

    def __init__(
        self, layers: Sequence[LayerWeights], device: torch.device | str, directory: Path
    ) -> None:
        super().__init__(layers, device)
        sizes = [_whole_pages(layer.nbytes) for layer in layers]
        self._starts = [0, *accumulate(sizes)]
        try:
            self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115
            weakref.finalize(self, self._file.close)
            os.posix_fallocate(self._file.fileno(), 0, max(1, self._starts[-1]))
        except OSError as error:
            raise OutputError(
                f"the weights that wait on the disk need {self._starts[-1] / 1e9:.1f} GB in "
                f"{directory}: {error}"
            ) from error
        self._source = _opened_directly(self._file.fileno())
        if self._source is not None:
            weakref.finalize(self, os.close, self._source)
        self._readers = ThreadPoolExecutor(_READERS, "halfbyte-layers")
        self._buffers: list[_Buffer] = []
        self._schedule: list[int] = []
        self._next = 0

    def finish(self) -> None:
        """See `HostLayers.finish`; the ring is allocated."""
        super().finish()
        largest = _whole_pages(max(layer.nbytes for layer in self.layers))
        count = min(RING, len(self.layers))
        self._buffers = [
            _Buffer(host_memory(largest, page_locked=self._locked)) for _ in range(count)
        ]
        # Copies in the order of steps: the first layers of a direction are there from the last.
        forward = list(range(len(self.layers)))
        self._schedule = forward[SLOTS:] + forward[::-1][SLOTS:] or forward

    def copy_to(self, layer: int, out: Tensor) -> None:
        """See `LayerSource`; waits until the layer has been read."""
        if self._schedule[self._next] != layer and layer in self._schedule:
            later = self._schedule[self._next :] + self._schedule[: self._next]
            self._next = (self._next + later.index(layer)) % len(self._schedule)
        buffer = self._read(layer, ())
        out.copy_(buffer.bytes(len(out)), non_blocking=True)
        buffer.copied(on_gpu=out.is_cuda)
        self._next = (self._next + 1) % len(self._schedule)
        coming = [
            self._schedule[(self._next + i) % len(self._schedule)]
            for i in range(len(self._buffers) - 1)
        ]
        for one in coming:
            self._read(one, coming, wait=False)

    def _read(self, layer: int, keep: Sequence[int], *, wait: bool = True) -> "_Buffer":
        """Return the buffer that a layer is read into; ``keep``: layers not to overwrite."""
        buffer = next((b for b in self._buffers if b.layer == layer), None)
        if buffer is None:
            buffer = next(b for b in self._buffers if b.layer is None or b.layer not in keep)
            buffer.wait()
            self._buffers.remove(buffer)
            self._buffers.append(buffer)  # the oldest is overwritten first
            start, nbytes = self._starts[layer], _whole_pages(self.layers[layer].nbytes)
            pieces = [(i, min(_PIECE, nbytes - i)) for i in range(0, nbytes, _PIECE)]
            buffer.layer = layer
            buffer.pieces = [
                self._readers.submit(self._read_piece, buffer, at, size, start + at)
                for at, size in pieces
            ]
        if wait:
            buffer.wait()
        return buffer

    def _read_piece(self, buffer: "_Buffer", at: int, size: int, start: int) -> None:
        buffer.wait_for_copy()
        into = _view(buffer.memory[at : at + size])
        file = self._file.fileno() if self._source is None else self._source
        while len(into):
            count = os.preadv(file, [into], start)
            if not count:
                raise OSError(f"the file of weights ends at byte {start}")
            into, start = into[count:], start + count

    def _move(self, layer: int, memory: Tensor) -> None:
        view, start = _view(memory), self._starts[layer]
        file, nbytes = self._file.fileno(), len(view)
        while len(view):
            count = os.pwrite(file, view, start)
            view, start = view[count:], start + count
        # Out of the page cache, which would take the memory that the model does not fit into.
        os.fdatasync(file)
        os.posix_fadvise(file, self._starts[layer], nbytes, os.POSIX_FADV_DONTNEED)


class _Buffer:
    """Host memory for a layer that is read ahead.

    Attributes:
        memory: uint8.
        layer: The layer that is in it or being read, or None.
        pieces: The reads that fill it.
    """

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.layer: int | None = None
        self.pieces: list[Future[None]] = []
        self._copy: Any = None

    def bytes(self, count: int) -> Tensor:
        return self.memory[:count]

    def wait(self) -> None:
        """Wait until it is filled.

        Raises:
            OSError: A read has failed.
        """
        for piece in self.pieces:
            piece.result()
        self.pieces = []

    def copied(self, *, on_gpu: bool) -> None:
        """Note that a copy from it has been queued on the current stream."""
        self._copy = torch.cuda.current_stream().record_event() if on_gpu else None
        self.layer = None  # free as soon as the copy ends

    def wait_for_copy(self) -> None:
        """Wait until it may be overwritten."""
        if self._copy is not None:
            self._copy.synchronize()


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // _PAGE) * _PAGE


def _opened_directly(file: int) -> int | None:
    """Return a descriptor that reads past the page cache, or None if the file system has none."""
    try:
        return os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        logger.info("layers are read through the page cache: %s", error)
        return None


def _view(memory: Tensor) -> memoryview:
    array: Any = memory.numpy()
    return memoryview(array)


def _count(module: FrozenModule) -> int:
    return module.num_experts if isinstance(module, ExpertLinear) else 1
