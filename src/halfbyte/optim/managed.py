"""State in CUDA managed memory: fixed addresses, pages moved between device and host by the driver.

The runtime loaded by torch is called through ctypes, so nothing has to be compiled, and the memory
is viewed as an ordinary CUDA tensor. Pages are moved explicitly: to the host before a step short of
memory, and back before the update. In between, advice to the driver keeps them on the host, so that
a page accessed early is read over the bus and not moved back.

Managed memory can exceed the memory of a GPU, and then every access may wait for the eviction of
another page, which can hang the GPU for all its users. So no more than the free memory is
allocated. Managed memory is rejected if host and device cannot access it concurrently: if
``concurrentManagedAccess`` is 0 (Windows, WSL, some virtual GPUs), it can be neither prefetched nor
evicted.
"""

import ctypes
import re
import weakref
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import ConfigError
from halfbyte.optim.buckets import Bucket, StateChunk
from halfbyte.optim.paging import Paging, Update, Waits

# Of the runtime's enumerations (CUDA Runtime API, driver_types.h).
_MANAGED_MEMORY, _CONCURRENT_MANAGED_ACCESS = 83, 89
_ATTACH_GLOBAL = 1
_SET_PREFERRED_LOCATION, _SET_ACCESSED_BY = 3, 5
_LAST_PREFETCH_LOCATION = 4
_ON_DEVICE, _ON_HOST = 1, 2
HOST = -1


class _Location(ctypes.Structure):
    """The runtime's cudaMemLocation, from CUDA 13 on."""

    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class Runtime:
    """The few functions of the CUDA runtime that torch does not offer.

    Raises:
        OSError: If torch has loaded no such library.
    """

    def __init__(self) -> None:
        found = re.search(r"/\S*libcudart\S*\.so\S*", Path("/proc/self/maps").read_text())
        self._library = ctypes.CDLL(found[0] if found else "libcudart.so")
        version = ctypes.c_int()
        self._call("cudaRuntimeGetVersion", ctypes.byref(version))
        self.version = version.value

    def _call(self, name: str, *arguments: Any) -> None:
        error = getattr(self._library, name)(*arguments)
        if error:
            text = self._library.cudaGetErrorString
            text.restype = ctypes.c_char_p
            self._library.cudaGetLastError()  # clears it; else torch's next launch would report it
            raise RuntimeError(f"{name}: {text(error).decode()}")

    def attribute(self, which: int, device: int) -> int:
        """Return an attribute of a device."""
        value = ctypes.c_int()
        self._call("cudaDeviceGetAttribute", ctypes.byref(value), which, device)
        return value.value

    def allocate(self, nbytes: int) -> int:
        """Return the address of managed memory."""
        pointer = ctypes.c_void_p()
        size = ctypes.c_size_t(nbytes)
        self._call("cudaMallocManaged", ctypes.byref(pointer), size, ctypes.c_uint(_ATTACH_GLOBAL))
        assert pointer.value is not None
        return pointer.value

    def free(self, address: int) -> None:
        """Free managed memory; no effect once the context is destroyed, at process exit."""
        self._library.cudaFree(ctypes.c_void_p(address))

    def advise(self, address: int, nbytes: int, advice: int, place: int) -> None:
        """Advise the driver on location or access of pages; ``place`` is a device or `HOST`."""
        self._call("cudaMemAdvise", *self._range(address, nbytes), advice, self._place(place))

    def prefetch(self, address: int, nbytes: int, place: int, stream: int) -> None:
        """Move pages to a device or to `HOST`, in the order of a stream."""
        flags = [ctypes.c_uint(0)] if self.version >= 13000 else []
        where = [self._place(place), *flags, ctypes.c_void_p(stream)]
        self._call("cudaMemPrefetchAsync", *self._range(address, nbytes), *where)

    def last_prefetch(self, address: int, nbytes: int) -> int:
        """Return the last prefetch target of all pages: a device, `HOST`, or -2 if they differ."""
        value = ctypes.c_int()
        self._call(
            "cudaMemRangeGetAttribute",
            ctypes.byref(value),
            ctypes.c_size_t(4),
            _LAST_PREFETCH_LOCATION,
            *self._range(address, nbytes),
        )
        return value.value

    def _range(self, address: int, nbytes: int) -> tuple[ctypes.c_void_p, ctypes.c_size_t]:
        return ctypes.c_void_p(address), ctypes.c_size_t(nbytes)

    def _place(self, place: int) -> Any:
        if self.version < 13000:
            return ctypes.c_int(place)
        return _Location(_ON_HOST, 0) if place == HOST else _Location(_ON_DEVICE, place)


@cache
def runtime() -> Runtime:
    """Return the runtime; cached."""
    return Runtime()


def why_not(device: torch.device) -> str | None:
    """Return the reason why managed paging is impossible on a device, or None."""
    if device.type != "cuda":
        return f"{device} is not a CUDA device"
    try:
        library = runtime()
    except OSError as error:
        return f"the CUDA runtime library was not found ({error})"
    index = _index(device)
    if not library.attribute(_MANAGED_MEMORY, index):
        return "the device has no managed memory"
    if not library.attribute(_CONCURRENT_MANAGED_ACCESS, index):
        return (
            "concurrentManagedAccess is 0, as under Windows, WSL and some virtual GPUs: the driver "
            "does not move managed memory there while it is in use"
        )
    return None


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


class _Interface:
    """Array interface for torch to create a CUDA tensor; frees the memory with the tensor."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
        }
        weakref.finalize(self, runtime().free, address)


class Managed:
    """All state in managed memory.

    Args:
        pieces: Its layout.
        device: A CUDA device.

    Raises:
        ConfigError: If the device does not support it, or has too little free memory.
    """

    def __init__(self, pieces: Sequence[StateChunk], device: torch.device) -> None:
        """Allocate zeros on the device."""
        self._whole = Bucket(tuple(pieces))
        self._device, self._index = device, _index(device)
        nbytes = self._whole.nbytes
        if (reason := why_not(device)) is not None:
            raise ConfigError(f'paging "managed" is not possible: {reason}. Use paging "explicit"')
        free = torch.cuda.mem_get_info(device)[0]
        if nbytes > free:
            raise ConfigError(
                f"the optimizer's state takes {nbytes / 1e9:.2f} GB of managed memory, and the "
                f'device has {free / 1e9:.2f} GB free. Use paging "explicit"'
            )
        self.address = runtime().allocate(nbytes)
        self.memory: Tensor = torch.as_tensor(_Interface(self.address, nbytes), device=device)
        self._waits = Waits(device)
        self._moved = 0
        self.away = False
        runtime().advise(self.address, nbytes, _SET_ACCESSED_BY, self._index)
        self._send(self._index)
        self.memory.zero_()
        self._moved = 0

    def units(self) -> Sequence[Bucket]:
        """Return one bucket with all state."""
        return [self._whole]

    def visit(self, groups: Sequence[Bucket], update: Update, *, last: bool) -> None:
        """Update all state."""
        for group in groups:
            update(group, self.memory, 0)

    def prefetch(self) -> None:
        """Do nothing: paged-out state stays on the host until the update."""

    def parts(self) -> Iterator[tuple[Bucket, Tensor, int]]:
        """Return all state."""
        yield self._whole, self.memory, 0

    def page_out(self) -> None:
        """Move the pages to the host, and advise the driver to keep them there."""
        if not self.away:
            with self._waits:
                self._send(HOST)
            self.away = True

    def page_in(self) -> None:
        """Fetch the pages; if memory is short, the update reads them over the bus."""
        if not self.away:
            return
        if torch.cuda.mem_get_info(self._device)[0] < self._whole.nbytes:
            torch.cuda.empty_cache()
        if torch.cuda.mem_get_info(self._device)[0] >= self._whole.nbytes:
            with self._waits:
                self._send(self._index)
            self.away = False

    def last_prefetch(self) -> int:
        """Return the last prefetch target of all pages according to the driver."""
        return runtime().last_prefetch(self.address, self._whole.nbytes)

    def report(self) -> Paging:
        """Return bytes and milliseconds since the last call."""
        nbytes = self._whole.nbytes
        moved, self._moved = self._moved, 0
        here, there = (0, nbytes) if self.away else (nbytes, 0)
        return Paging(here, there, moved, self._waits.milliseconds())

    def _send(self, place: int) -> None:
        nbytes, stream = self._whole.nbytes, torch.cuda.current_stream(self._device)
        runtime().advise(self.address, nbytes, _SET_PREFERRED_LOCATION, place)
        runtime().prefetch(self.address, nbytes, place, stream.cuda_stream)
        self._moved += nbytes
