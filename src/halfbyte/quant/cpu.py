"""The C++ kernels of cpu.cpp, compiled on first use (runtime/native.py) for the processor.

Without a compiler, `kernels` logs this once, and plain PyTorch is used.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from math import ceil, prod
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from halfbyte.quant import blockwise
from halfbyte.quant.mxfp4 import DOUBLED_LEVELS, MXFP4Weight
from halfbyte.quant.weight import FLOAT_TYPES, QuantizedWeight, QuantType, code_order, levels_of
from halfbyte.runtime.native import Unavailable, shared_object

Variant = Literal["scalar", "avx2", "avx512"]  # in the order of cpu.cpp's enum

_SOURCE = Path(__file__).with_name("cpu.cpp")
# No -march=native: functions of cpu.cpp declare their instruction sets. No contraction: a fused
# multiplication and addition rounds once, and the format rounds twice.
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-ffp-contract=off")

# Elements that justify another thread: some 50 microseconds of work on a current core, compared
# with 5 to wake a spinning thread and 50 for a sleeping one.
_DECODE_SHARE = 2**19
_ENCODE_SHARE = 2**16

# From this size on malloc maps new pages for every allocation. Faulting them in by 4 KB takes
# 10 ms for 64 MB, several times as long as decoding; by 2 MB, about as long as decoding.
_LARGE_RESULT = 2**25
_LARGE_PAGE = 2**21

_log = logging.getLogger("halfbyte")


class Kernels:
    """The compiled functions, as methods on tensors.

    Attributes:
        variants: The variants this CPU can run, the fastest last.
        threading: Description of the thread pool, for the user.
    """

    def __init__(self, library: Path) -> None:
        loaded = ctypes.CDLL(str(library))
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._decode = loaded.halfbyte_dequantize
        self._decode.argtypes = [*[pointer] * 7, size, size, pointer, *[number] * 3, pointer]
        self._decode.restype = None
        self._decode_mxfp4 = loaded.halfbyte_dequantize_mxfp4
        self._decode_mxfp4.argtypes = [*[pointer] * 3, size, pointer, *[number] * 3, pointer]
        self._decode_mxfp4.restype = None
        self._encode = loaded.halfbyte_quantize
        self._encode.argtypes = [
            pointer,
            number,
            size,
            size,
            *[pointer] * 4,
            *[number] * 2,
            pointer,
        ]
        self._encode.restype = None
        self._use_large_pages = loaded.halfbyte_use_large_pages
        self._use_large_pages.argtypes = [pointer, size]
        self._use_large_pages.restype = None
        self.variants: tuple[Variant, ...] = get_args(Variant)[: loaded.halfbyte_best_variant() + 1]
        # Looked up through torch's extension module, a symbol comes from the OpenMP runtime that
        # torch uses, whatever its file name and whatever others are loaded.
        fork = getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None)
        self._fork = ctypes.cast(fork, pointer) if fork else None
        self.threading = "torch's OpenMP threads" if fork else "threads of their own"

    def decode(
        self,
        q: QuantizedWeight,
        out: Tensor,
        *,
        variant: Variant | None = None,
        threads: int | None = None,
    ) -> None:
        """Decodes `q` into `out`: on the CPU, contiguous, float32, bfloat16 or float16.

        Args:
            q: The weight, on the CPU.
            out: The output, ``q.numel`` elements.
            variant: One of `variants`; the fastest by default.
            threads: Threads to use, at most; as many as torch by default.
        """
        tensors = [
            tensor if tensor is None else tensor.contiguous()
            for tensor in (q.codes, q.scales, q.scale_codes, q.scale_scales, q.scale_offset)
        ]
        self._decode(
            *(_address(tensor) for tensor in tensors),
            _address(blockwise.DYNAMIC_SIGNED),
            _address(levels_of(q.quant_type)),
            q.numel,
            q.block_size,
            _address(out),
            FLOAT_TYPES.index(out.dtype),
            self._number(variant),
            _threads(threads, q.numel // _DECODE_SHARE),
            self._fork,
        )

    def decode_mxfp4(
        self,
        q: MXFP4Weight,
        out: Tensor,
        *,
        variant: Variant | None = None,
        threads: int | None = None,
    ) -> None:
        """Decodes `q` into `out`; as `decode` does, except for the format."""
        codes, scales = q.codes.contiguous(), q.scales.contiguous()
        self._decode_mxfp4(
            _address(codes),
            _address(scales),
            _address(DOUBLED_LEVELS),
            q.numel,
            _address(out),
            FLOAT_TYPES.index(out.dtype),
            self._number(variant),
            _threads(threads, q.numel // _DECODE_SHARE),
            self._fork,
        )

    def encode(
        self,
        flat: Tensor,
        quant_type: QuantType,
        block_size: int,
        *,
        variant: Variant | None = None,
        threads: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the codes and scales of flat, contiguous values on the CPU.

        A block with NaN or infinity in it gets a scale that is NaN or infinite.

        Args:
            flat: float32, bfloat16 or float16.
            quant_type: As for `halfbyte.quant.quantize`.
            block_size: As for `halfbyte.quant.quantize`.
            variant: One of `variants`; the fastest by default.
            threads: Threads to use, at most; as many as torch by default.
        """
        numel = flat.numel()
        codes = torch.empty(ceil(numel / 2), dtype=torch.uint8, device="cpu")
        scales = torch.empty(ceil(numel / block_size), dtype=torch.float32, device="cpu")
        order = code_order(quant_type)
        bounds = blockwise.midpoints(levels_of(quant_type)[order])
        packed_order = (order[:, None] * 16 + order).to(torch.uint8)
        self._encode(
            _address(flat),
            FLOAT_TYPES.index(flat.dtype),
            numel,
            block_size,
            _address(bounds),
            _address(packed_order),
            _address(codes),
            _address(scales),
            self._number(variant),
            _threads(threads, numel // _ENCODE_SHARE),
            self._fork,
        )
        return codes, scales

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns an uninitialised tensor; a large one is quick to write for the first time."""
        size = prod(shape) * dtype.itemsize
        if size < _LARGE_RESULT:
            return torch.empty(shape, dtype=dtype, device="cpu")
        # Aligned to a large page; otherwise the first and last 2 MB would be small pages.
        storage = torch.empty(size + _LARGE_PAGE, dtype=torch.uint8, device="cpu")
        start = -storage.data_ptr() % _LARGE_PAGE
        self._use_large_pages(storage.data_ptr() + start, storage.nbytes - start)
        # Not a slice: a view created without gradients cannot be written to with them enabled.
        flat = torch.empty(0, dtype=dtype, device="cpu")
        offset = start // dtype.itemsize
        flat.set_(storage.untyped_storage(), offset, (prod(shape),), (1,))
        return flat.resize_(shape)

    def _number(self, variant: Variant | None) -> int:
        if variant is None:
            return len(self.variants) - 1
        if variant not in self.variants:
            raise ValueError(f"this CPU runs {', '.join(self.variants)}, not {variant!r}")
        return self.variants.index(variant)


def kernels() -> Kernels | None:
    """Returns the kernels, built if necessary, or None after logging the reason once."""
    found = _find()
    return found if isinstance(found, Kernels) else None


def describe() -> str:
    """Returns one line that says which implementation runs on the CPU, and why."""
    found = _find()
    if isinstance(found, Kernels):
        return f"C++ kernels ({found.variants[-1]}, {found.threading})"
    return f"plain PyTorch, because {found}"


@cache
def _find() -> Kernels | str:
    """The kernels, or the reason why there are none, which is logged."""
    try:
        return Kernels(shared_object(_SOURCE, _FLAGS))
    except (Unavailable, OSError, RuntimeError) as error:  # the last: no home directory
        reason = str(error)
    _log.warning(
        "4-bit weights are decoded by plain PyTorch, about ten times slower than by the C++"
        " kernels, because %s",
        reason,
    )
    return reason


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _threads(asked: int | None, worth: int) -> int:
    return max(1, min(asked or torch.get_num_threads(), worth))
