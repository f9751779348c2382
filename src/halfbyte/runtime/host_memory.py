"""Page-locked host memory of exactly the requested size, which processes can share.

torch's allocator of page-locked memory rounds sizes up to powers of two: the packed layers of a 70B
model, 440 MB each, would take 512 MB. Memory that was mapped by the program can be page-locked
later, whatever its size. All threads touch it first, since locking it would fault it in page by
page in one thread.
"""

import contextlib
import mmap
import os
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
    mapped = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _in_large_pages(mapped)
    if page_locked:
        torch.frombuffer(mapped, dtype=torch.uint8).zero_()  # by all threads
    return mapped_memory(mapped, page_locked=page_locked)


def mapped_memory(mapped: mmap.mmap, *, page_locked: bool) -> Tensor:
    """Return mapped memory as uint8 [bytes]; see `host_memory`.

    Args:
        mapped: Writable; it may be shared with other processes.
        page_locked: As for `host_memory`.

    Raises:
        RuntimeError: As `host_memory`.
    """
    _in_large_pages(mapped)
    memory = torch.frombuffer(mapped, dtype=torch.uint8)  # refers to the mapping
    if page_locked:
        address, nbytes = memory.data_ptr(), len(mapped)
        failed = int(_cudart().cudaHostRegister(address, nbytes, 0))
        if failed:
            raise RuntimeError(
                f"{nbytes / 1e9:.2f} GB of host memory could not be page-locked: "
                f"CUDA error {failed}"
            )
        weakref.finalize(mapped, _unlock, address)
    return memory


def _in_large_pages(mapped: mmap.mmap) -> None:
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # the kernel has none for this memory
            mapped.madvise(mmap.MADV_HUGEPAGE)  # a 512th of the pages to lock


def shared_memory(nbytes: int, *, page_locked: bool) -> tuple[Tensor, list[int]]:
    """Return host memory that other processes of this machine can map, zeros.

    Args:
        nbytes: As for `host_memory`.
        page_locked: Likewise.

    Returns:
        The memory, uint8 [nbytes], and a JSON value by which others find it (`opened_memory`) as
        long as it lives here.

    Raises:
        RuntimeError: As `host_memory`.
    """
    file = os.memfd_create("halfbyte")
    os.ftruncate(file, nbytes)
    mapped = mmap.mmap(file, nbytes)
    weakref.finalize(mapped, os.close, file)
    return mapped_memory(mapped, page_locked=page_locked), [os.getpid(), file]


def opened_memory(handle: list[int], nbytes: int, *, page_locked: bool) -> Tensor:
    """Return the memory that another process has shared with `shared_memory`, uint8 [nbytes].

    Raises:
        OSError: It is not there, or belongs to another user.
        RuntimeError: As `host_memory`.
    """
    process, number = handle
    file = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR)
    try:
        return mapped_memory(mmap.mmap(file, nbytes), page_locked=page_locked)
    finally:
        os.close(file)


def _unlock(address: int) -> None:
    # Copies that are under way, or in a CUDA graph that is being replayed, would go to memory that
    # is not mapped any more. In a capture nothing runs, and waiting would end it.
    if not torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize()
    _cudart().cudaHostUnregister(address)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
