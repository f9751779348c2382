"""Page-locked host memory of exactly the requested size.

torch's allocator of page-locked memory rounds sizes up to powers of two: the packed layers of a 70B
model, 440 MB each, would take 512 MB. Memory that was mapped by the program can be page-locked
later, whatever its size.
"""

import mmap
import weakref
from typing import Any

import torch
from torch import Tensor


def host_memory(nbytes: int, *, page_locked: bool) -> Tensor:
    """Return uninitialised host memory, uint8 [nbytes].

    It is unlocked and unmapped when the last tensor that views it is freed.

    Args:
        nbytes: Size in bytes, at least 1.
        page_locked: Whether a GPU will copy from it or to it; needs CUDA.

    Raises:
        RuntimeError: The system does not have so much memory to lock.
    """
    mapped = mmap.mmap(-1, nbytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapped.madvise(mmap.MADV_HUGEPAGE)  # a 512th of the pages to lock
    memory = torch.frombuffer(mapped, dtype=torch.uint8)  # refers to the mapping
    if page_locked:
        address = memory.data_ptr()
        failed = int(_cudart().cudaHostRegister(address, nbytes, 0))
        if failed:
            raise RuntimeError(
                f"{nbytes / 1e9:.2f} GB of host memory could not be page-locked: "
                f"CUDA error {failed}"
            )
        weakref.finalize(mapped, _unlock, address)
    return memory


def _unlock(address: int) -> None:
    _cudart().cudaHostUnregister(address)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
