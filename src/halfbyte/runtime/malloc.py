"""Tunes glibc's heap for tensors on a CPU: keep freed memory, avoid fragmentation, return it.

A training step frees and allocates the same activations again and again. By default glibc returns
blocks over 128 kB to the system at once, and every page of the next block faults again. If it keeps
them, the heap fragments: torch requests blocks aligned to 64 bytes (``posix_memalign``), for which
glibc searches for 96 bytes more than the block has. So a gap between two kept tensors is never
filled by a tensor of its size, and the temporaries of all layers are stored side by side. Of
SmolLM2's heap in float32, 476 MiB were such gaps, next to 1255 MiB in use. malloc.cpp first
requests the exact size (``malloc``) and uses the block if it is aligned by chance, which between
tensors it always is: 16 MiB (2026-11-24_cpu_memory.json).
"""

import ctypes
import logging
from functools import cache
from pathlib import Path

import torch

from halfbyte.runtime.native import Unavailable, shared_object

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's

_log = logging.getLogger("halfbyte")


def keep_freed_memory() -> bool:
    """Keep freed memory for later tensors of the same size, process-wide.

    Returns:
        Whether the C library supports it (glibc does).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    _fill_holes()
    return bool(mallopt(_MMAP_THRESHOLD, 1 << 30) and mallopt(_TRIM_THRESHOLD, 256 << 20))


@cache
def _fill_holes() -> None:
    torch_in = Path(torch.__file__).parent
    flags = [
        *("-O2", "-std=c++20", "-shared", "-fPIC"),
        *(f"-I{torch_in / 'include'}", f"-L{torch_in / 'lib'}", "-Wl,--no-as-needed", "-lc10"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f'-DTORCH="{torch.__version__}"',  # for another torch, another build
    ]
    try:
        built = shared_object(Path(__file__).with_name("malloc.cpp"), flags)
        ctypes.CDLL(str(built)).halfbyte_use_malloc()
    except (Unavailable, OSError, RuntimeError) as error:  # the last: no home directory
        _log.warning("a step on this CPU takes up to a fifth more memory, because %s", error)


def give_back() -> None:
    """Return free heap memory to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
