"""Where the state is stored: on the device, or in page-locked host memory and streamed.

Streaming is by buckets of at most 16 MiB, through two buffers on the device: while one bucket is
updated and sent back, the next is fetched, so both directions of the bus are busy. This uses its
own streams, and the current stream waits at the end of a step: a layer's state is fetched, updated
and sent back during the backward of the layers below it. That wait is measured with events.

    off       all of it on the device, always
    explicit  all of it on the host, always; several processes can share it (sharded_state.py)
    auto      on the device; moved to the host before a step known to be short of memory, and back
              before that step's update, when activations are freed
    managed   the same with memory that the driver can move, too (managed.py)
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from halfbyte.optim.buckets import Bucket, StateChunk, groups_of
from halfbyte.optim.sharded_state import SharedState

Update = Callable[[Bucket, Tensor, int], None]
"""Updates the chunks of a bucket; its state is in the tensor, which starts at byte `int` of all."""


class Paging(NamedTuple):
    """Statistics of paging since the last report.

    Attributes:
        optimizer_device_bytes: State, and buffers for it, on the device.
        optimizer_host_bytes: State on the host.
        paged_bytes: Bytes moved in both directions.
        paging_ms: Milliseconds that the device waited for transfers, and for updates that had to
            wait for them.
    """

    optimizer_device_bytes: int
    optimizer_host_bytes: int
    paged_bytes: int
    paging_ms: float


class Store(Protocol):
    """Storage of the state."""

    def units(self) -> Sequence[Bucket]:
        """Return the buckets that are updated one by one."""
        ...

    def visit(self, groups: Sequence[Bucket], update: Update, *, last: bool) -> None:
        """Call ``update`` for some of `units`, in their order.

        Updates may still run on another stream when this returns, unless they are the ``last`` of
        a step, when the current stream waits for all.
        """
        ...

    def parts(self) -> Iterator[tuple[Bucket, Tensor, int]]:
        """Return all state for the host to read or write: bucket, its memory, its first byte."""
        ...

    def prefetch(self) -> None:
        """Start to fetch the state that is updated first."""
        ...

    def page_out(self) -> None:
        """Move the state to the host, if possible."""
        ...

    def page_in(self) -> None:
        """Move the state back to the device."""
        ...

    def report(self) -> Paging:
        """Return statistics since the last call, without additional synchronisation."""
        ...


class Waits:
    """Time the current stream spends waiting, between events on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Bounded, as it may never be read.
        self._pairs: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=1024)

    def __enter__(self) -> None:
        if (stream := current_stream(self._device)) is not None:
            self._pairs.append((_event(timed=True), _event(timed=True)))
            self._pairs[-1][0].record(stream)

    def __exit__(self, *exception: object) -> None:
        if (stream := current_stream(self._device)) is not None:
            self._pairs[-1][1].record(stream)

    def milliseconds(self) -> float:
        """Return the sum since the last call."""
        if self._pairs:
            self._pairs[-1][1].synchronize()
        total = sum((float(start.elapsed_time(end)) for start, end in self._pairs), 0.0)
        self._pairs.clear()
        return total


def current_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return a device's current stream; a CPU has none."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


class _Slot:
    """A buffer on the device that groups pass through."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.holds = -1  # index of the fetched group that has not been updated
        cuda = device.type == "cuda"
        self.came, self.updated, self.left = (_event() if cuda else None for _ in range(3))


class Streamed:
    """State on the device or on the host.

    Args:
        pieces: Its layout.
        device: The device of the update. On a CPU, "host" and "device" are the same memory, and
            copies are not overlapped.
        away: Whether it starts on the host.
        shared: Shares it with other processes, so that it stays on the host.
    """

    def __init__(
        self,
        pieces: Sequence[StateChunk],
        device: torch.device,
        *,
        away: bool = False,
        shared: SharedState | None = None,
    ) -> None:
        """Allocate zeros."""
        self._device, self._shared = device, shared
        self._whole = Bucket(tuple(pieces))
        self._groups = groups_of(pieces, 1 if shared is None else shared.size)
        self._own = range(len(self._groups)) if shared is None else shared.own(self._groups)
        self._numbers = {group.offset: number for number, group in enumerate(self._groups)}
        self._memory: Tensor | None = None
        self._host: list[Tensor] = []
        self._slots: list[_Slot] = []
        self._moved = 0
        self._waits = Waits(device)
        cuda = device.type == "cuda"
        self._inward, self._outward = (_stream(device) if cuda else None for _ in range(2))
        if away and (cuda or shared is None):
            self._go()
        elif shared is not None:  # on a CPU it is updated in place
            self._memory = shared.allocate(self._whole.nbytes)
        else:
            self._memory = torch.zeros(self._whole.nbytes, dtype=torch.uint8, device=device)

    @property
    def away(self) -> bool:
        """Whether the state is on the host."""
        return self._memory is None

    def units(self) -> Sequence[Bucket]:
        """Return one bucket while on the device, else groups in the order of backward."""
        if not self.away and self._shared is None:
            return [self._whole]
        return self._groups[self._own.start : self._own.stop][::-1]

    def visit(self, groups: Sequence[Bucket], update: Update, *, last: bool) -> None:
        """Update groups, streaming those that are on the host."""
        if self._shared is not None:
            assert last, "state of several processes is updated at the end of a step"
            self._shared.begin_update()
        if self._memory is not None:
            for group in groups:
                update(group, self._memory, 0)
            return
        current = current_stream(self._device)
        if groups:
            _meet(self._outward, current)  # gradients are complete
        for group in groups:
            number = self._numbers[group.offset]
            slot = self._fetch(number)
            if number > self._own.start:
                # The other buffer is for the next group, updated now or when its layer is done.
                self._fetch(number - 1)
            with torch.cuda.stream(self._outward):
                _wait(self._outward, slot.came)
                update(group, slot.buffer, group.offset)
                _record(slot.updated, self._outward)
                self._host[number].copy_(slot.buffer[: group.nbytes], non_blocking=True)
                _record(slot.left, self._outward)
            slot.holds = -1
            self._moved += group.nbytes
        if last:
            with self._waits:
                for slot in self._slots:
                    # Others read shared state once they know that this process is past this point.
                    _wait(current, slot.updated if self._shared is None else slot.left)

    def prefetch(self) -> None:
        """Start to fetch the state that is updated first, while the device does other work."""
        if self.away:
            for number in self._own[-2:]:
                self._fetch(number)

    def _fetch(self, number: int) -> _Slot:
        """Start to copy a group to the device, unless it is there already."""
        if not self._slots:
            self._slots = self._buffers()
        slot, host = self._slots[number % len(self._slots)], self._host[number]
        if slot.holds != number:
            with torch.cuda.stream(self._inward):
                _wait(self._inward, slot.left)
                slot.buffer[: host.numel()].copy_(host, non_blocking=True)
                _record(slot.came, self._inward)
            slot.holds = number
            self._moved += host.numel()
        return slot

    def parts(self) -> Iterator[tuple[Bucket, Tensor, int]]:
        """Return all state, on the device or the host."""
        if self._memory is not None:
            yield self._whole, self._memory, 0
            return
        for stream in (self._inward, self._outward):
            if stream is not None:
                stream.synchronize()
        for slot in self._slots:
            slot.holds = -1  # the caller may write
        for group, memory in zip(self._groups, self._host, strict=True):
            yield group, memory, group.offset

    def page_out(self) -> None:
        """Copy all state to the host and free its memory on the device."""
        if self._memory is None:
            return
        with self._waits:
            memory, self._memory = self._memory, None
            self._go()
            for group, host in zip(self._groups, self._host, strict=True):
                host.copy_(memory[group.offset :][: group.nbytes], non_blocking=True)
        _meet(self._inward, current_stream(self._device))
        self._moved += self._whole.nbytes

    def page_in(self) -> None:
        """Copy all state back to the device; it stays on the host if memory is short."""
        if self._memory is not None:
            return
        try:
            memory = torch.empty(self._whole.nbytes, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError:
            return
        with self._waits:
            _meet(current_stream(self._device), self._inward)
            _meet(current_stream(self._device), self._outward)
            for group, host in zip(self._groups, self._host, strict=True):
                memory[group.offset :][: group.nbytes].copy_(host, non_blocking=True)
        self._memory, self._slots = memory, []
        self._moved += self._whole.nbytes

    def report(self) -> Paging:
        """Return bytes and milliseconds since the last call."""
        here = sum(slot.buffer.nbytes for slot in self._slots)
        here += 0 if self._memory is None else self._memory.nbytes
        moved, self._moved = self._moved, 0
        there = sum(group.nbytes for group in self.units()) if self.away else 0
        return Paging(here, there, moved, self._waits.milliseconds())

    def _go(self) -> None:
        """Allocate memory on the host."""
        locked = self._device.type == "cuda"
        if self._shared is not None:
            whole = self._shared.allocate(self._whole.nbytes)
            self._host = [whole[group.offset :][: group.nbytes] for group in self._groups]
        elif not self._host:
            self._host = [
                torch.zeros(group.nbytes, dtype=torch.uint8, pin_memory=locked)
                for group in self._groups
            ]

    def _buffers(self) -> list[_Slot]:
        largest = max(self._groups[number].nbytes for number in self._own)
        slots = [_Slot(largest, self._device) for _ in range(min(2, len(self._own)))]
        for stream in (self._inward, self._outward):
            if stream is not None:
                for slot in slots:
                    slot.buffer.record_stream(stream)
        # The current stream may have used their memory until now.
        _meet(self._inward, current_stream(self._device))
        return slots


def _event(*, timed: bool = False) -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _wait(stream: torch.cuda.Stream | None, event: torch.cuda.Event | None) -> None:
    if stream is not None and event is not None:
        stream.wait_event(event)


def _record(event: torch.cuda.Event | None, stream: torch.cuda.Stream | None) -> None:
    if event is not None:
        event.record(stream)


def _meet(one: torch.cuda.Stream | None, other: torch.cuda.Stream | None) -> None:
    """Let one stream wait for all work queued on the other."""
    if one is not None and other is not None:
        one.wait_stream(other)
