"""Reads tensors of files onto a device at the speed of the bus: read ahead by threads, in chunks.

One thread reads the page cache at a few GB/s, and a copy from ordinary memory goes through a small
buffer of the driver and blocks. So files are read in chunks, by several threads, into a *ring* of
page-locked buffers, from which the device copies asynchronously:

    reader threads     wait until the buffer's last copy is done | read the next chunk into it
    caller             take the oldest chunk | start its copy | return its buffer to the readers

The readers stay a ring ahead even while the caller processes a tensor, and only a reader that needs
a buffer waits for a copy. Host memory is the ring (which torch keeps page-locked for later use) and
device memory the tensor being filled: a tensor is allocated when it is requested, and no reference
to it remains here once it is returned.

A buffer is returned to the readers, in order, when its copy has been started. So a reader waits for
the device only, never for the caller or another reader: there can be no deadlock.

All of this also works on a CPU, with ordinary buffers, but gains nothing over reading into a
tensor's own memory, which is what ``SafetensorsFile.read`` does.
"""

import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.checkpoint.reading import read_into
from halfbyte.checkpoint.safetensors_file import memory

PIECE_BYTES = 2**24
RING = 16  # buffers; 256 MiB in all
_MAX_READERS = 8


class Request(NamedTuple):
    """One tensor to read: its bytes in a file, dtype and shape."""

    path: Path
    start: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class _Piece(NamedTuple):
    """A chunk of a file, at most the size of a buffer."""

    path: Path
    start: int
    nbytes: int


def read_to_device(
    requests: Sequence[Request],
    device: torch.device,
    *,
    piece_bytes: int = PIECE_BYTES,
    ring: int = RING,
) -> Generator[Tensor, None, None]:
    """Yield the tensor of each request on ``device``, in order.

    Copies are queued on the stream that is current when a tensor is requested: what the caller
    queues there next comes after them, and need not wait. Nothing is kept: what the caller drops
    is freed. Threads are started with the first tensor and end when the generator ends, is closed
    or raises.

    Args:
        requests: The tensors to read; they may be empty.
        device: Device of the tensors.
        piece_bytes: Maximum size of a chunk.
        ring: Maximum number of chunks in host memory.

    Raises:
        CheckpointError: If a file cannot be read or ends early; earlier tensors are complete.
    """
    largest = max((request.nbytes for request in requests), default=0)
    stage = _Stage(requests, device, max(1, min(piece_bytes, largest)))
    try:
        stage.start(ring)
        for request in requests:
            yield stage.tensor(request)
    finally:
        stage.close()


class _Stage:
    """The ring and its readers."""

    def __init__(self, requests: Sequence[Request], device: torch.device, piece_bytes: int) -> None:
        self._device, self._piece_bytes = device, piece_bytes
        # Only CUDA guarantees that copies from page-locked memory are ordered by a stream.
        self._locked = device.type == "cuda"
        self._readers = ThreadPoolExecutor(
            min(_MAX_READERS, len(os.sched_getaffinity(0))), thread_name_prefix="halfbyte-reader"
        )
        self._pieces = self._cut(requests)
        self._ahead: deque[Future[Tensor]] = deque()  # the oldest piece first

    def start(self, ring: int) -> None:
        """Start reading, into at most ``ring`` buffers."""
        for _ in range(ring):
            self._read_ahead(None, None)

    def _cut(self, requests: Sequence[Request]) -> Iterator[_Piece]:
        for request in requests:
            for done in range(0, request.nbytes, self._piece_bytes):
                count = min(self._piece_bytes, request.nbytes - done)
                yield _Piece(request.path, request.start + done, count)

    def _read_ahead(self, buffer: Tensor | None, copied: torch.cuda.Event | None) -> None:
        """Queue reading the next piece, if any, into ``buffer`` after the event ``copied``."""
        piece = next(self._pieces, None)
        if piece is not None:
            self._ahead.append(self._readers.submit(self._fill, piece, buffer, copied))

    def _fill(
        self, piece: _Piece, buffer: Tensor | None, copied: torch.cuda.Event | None
    ) -> Tensor:
        """Read a piece into ``buffer`` or a new one, and return that; runs in a reader.

        The slow operations (waiting, locking pages, reading) release the GIL.
        """
        if copied is not None:
            copied.synchronize()
        if buffer is None:
            buffer = _new_buffer(self._piece_bytes, self._locked)
        read_into(piece.path, piece.start, memory(buffer)[: piece.nbytes])
        return buffer

    def tensor(self, request: Request) -> Tensor:
        """Return the tensor of the next request, its copy queued."""
        tensor = torch.empty(request.shape, dtype=request.dtype, device=self._device)
        flat = tensor.view(-1).view(torch.uint8)
        for start in range(0, request.nbytes, self._piece_bytes):
            buffer = self._ahead.popleft().result()
            part = flat[start : start + self._piece_bytes]
            part.copy_(buffer[: len(part)], non_blocking=self._locked)
            copied = None
            if self._locked:
                # Without blocking, wait spins, and eight readers may be waiting.
                copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                copied.record(torch.cuda.current_stream(self._device))
            self._read_ahead(buffer, copied)
        return tensor

    def close(self) -> None:
        """Stop the readers; remaining chunks are not read."""
        self._readers.shutdown(cancel_futures=True)


def _new_buffer(size: int, locked: bool) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=locked)
