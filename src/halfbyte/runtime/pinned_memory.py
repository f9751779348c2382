"""Page-locked host memory in large pieces, allocated quickly.

torch allocates page-locked memory by ``cudaHostAlloc``, which faults in and locks page by page in
one thread: gigabytes of it take seconds. Here the pages are huge where the kernel has any, are
faulted in by all threads, and are locked afterwards, which then has little to do. It is returned to
the system when the tensor is gone; torch's own is cached.
"""

import mmap
import weakref
from typing import Any

import torch
from torch import Tensor

# Smaller pieces are left to torch, which reuses them.
LEAST_BYTES = 64 << 20


def pinned(numel: int, dtype: torch.dtype) -> Tensor:
    """Return page-locked memory, [numel], not initialised.

    Raises:
        OSError: If the system has no such range of addresses.
        RuntimeError: If there is too little memory, or the driver refuses to lock it.
    """
    nbytes = numel * dtype.itemsize
    if nbytes < LEAST_BYTES:
        return torch.empty(numel, dtype=dtype, pin_memory=True)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    whole.zero_()  # by all threads
    driver: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address = whole.data_ptr()
    if int(driver.cudaHostRegister(address, nbytes, 0)):
        return torch.empty(numel, dtype=dtype, pin_memory=True)  # torch's way, and its error
    # The pages must be unlocked before they are unmapped, so this refers to them, too.
    weakref.finalize(whole.untyped_storage(), _unlock, driver, address, memory).atexit = False
    return whole.view(dtype)


def _unlock(driver: Any, address: int, _memory: mmap.mmap) -> None:
    driver.cudaHostUnregister(address)
