"""Frozen weights of decoder layers that wait elsewhere and are on the device only when needed.

A layer's frozen weights, packed or plain, are one range of bytes (`LayerWeights`), so moving a
layer is one copy. The modules of a layer always refer to the same memory on the device, one of a
few *slots*; layers that share a slot overwrite each other. So nothing else in the program, CUDA
graphs included, needs to know where weights come from:

    prefetch    queue the copy of a layer into its slot on a side stream, once the slot is free
    acquire     make the current stream wait for that copy
    release     the slot may be overwritten by what is queued from now on

Forward and backward announce the next layer while one is computed, so with two slots one layer is
copied while the other is used. Other code need not announce anything: a module that is about to
read its weight calls ``ensure_loaded``, which copies the layer if its slot holds another.

Where the bytes come from is up to a `LayerSource` (layer_store.py).
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from halfbyte.linear.experts import ExpertLinear
from halfbyte.linear.frozen import FrozenLinear

# Layers on the device at a time: one is computed with while the next is copied. A fast source needs
# only one, if a layer is decoded as a whole: the next is copied once it is. The plan knows it, too
# (plan/policy.py).
SLOTS = 2

# Alignment of each tensor in bytes; as in arena.py.
_ALIGNED = 256

FrozenModule = FrozenLinear | ExpertLinear


class _Place(NamedTuple):
    """Where a tensor lies in the bytes of its layer."""

    start: int
    nbytes: int
    dtype: torch.dtype
    shape: torch.Size


class LayerWeights:
    """The layout of a layer's frozen weights in one range of bytes.

    Args:
        layer: The decoder layer, as built: its frozen weights may be on the meta device.

    Attributes:
        modules: The linears and experts, in the layer's order.
        nbytes: Size of the range.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.modules: list[FrozenModule] = [
            module for module in layer.modules() if isinstance(module, FrozenLinear | ExpertLinear)
        ]
        self._places: dict[FrozenModule, dict[str, _Place]] = {}
        self.nbytes = 0
        for module in self.modules:
            places = self._places[module] = {}
            for name, tensor in module.frozen_tensors().items():
                places[name] = _Place(self.nbytes, tensor.nbytes, tensor.dtype, tensor.shape)
                self.nbytes += -(-tensor.nbytes // _ALIGNED) * _ALIGNED

    def views(self, module: FrozenModule, memory: Tensor) -> dict[str, Tensor]:
        """Return the tensors of one module's weight as views of ``memory``, uint8 [nbytes]."""
        return {
            name: memory[p.start : p.start + p.nbytes].view(p.dtype).view(p.shape)
            for name, p in self._places[module].items()
        }

    def bind(self, memory: Tensor, ensure_loaded: Callable[[], None] | None) -> None:
        """Make all modules refer to ``memory``, uint8 [nbytes], whatever is in it.

        Args:
            memory: The memory.
            ensure_loaded: What modules call before they read it, if that is needed.
        """
        for module in self.modules:
            module.set_frozen_tensors(self.views(module, memory))
            module.ensure_loaded = ensure_loaded


class LayerSource(Protocol):
    """Where the bytes of layers are while they are not on the device.

    Attributes:
        can_be_captured: Whether copies can be part of a CUDA graph: nothing is done by the host.
        slots: Layers on the device at a time, if each is decoded as a whole.
        may_stay: Whether layers stay on the device where there is room for them.
    """

    can_be_captured: bool
    slots: int
    may_stay: bool

    def copy_to(self, layer: int, out: Tensor) -> None:
        """Queue the copy of a layer to ``out``, uint8 on the device, on the current stream."""


class _Slot:
    """Memory on the device for one layer at a time.

    Attributes:
        memory: uint8, as large as the largest layer that uses it.
        layer: The layer whose bytes it holds or is about to, or None.
        copied: Recorded at the end of that copy; None once the current stream has waited for it.
        free: Recorded when the layer was released; None if it may still be read by anything that
            the current stream has queued.
    """

    def __init__(self, nbytes: int, device: torch.device, side: torch.cuda.Stream | None) -> None:
        self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        if side is not None:  # freed, it is not used again before the last copy has ended
            self.memory.record_stream(side)
        self.layer: int | None = None
        self.copied: torch.cuda.Event | None = None
        self.free: torch.cuda.Event | None = None


class LayerStream:
    """Brings the frozen weights of layers to the device, one after the other.

    Binding makes the modules of every streamed layer refer to its slot.

    Args:
        layers: Layout of each layer of the model.
        source: Where their bytes are.
        device: The device.

    Attributes:
        layers: As given.
        source: As given.
        slots: Layers on the device at a time. With one, a layer may be overwritten as soon as it
            has been decoded.
        streamed: The layers that are streamed, ascending; the others are resident.
        side_stream: The stream of the copies; None on a CPU.
        copied_bytes: Bytes copied to the device so far; what CUDA graphs copy is not counted.
    """

    def __init__(
        self, layers: Sequence[LayerWeights], source: LayerSource, device: torch.device | str
    ) -> None:
        self.layers, self.source, self._device = list(layers), source, torch.device(device)
        modules = [module for layer in self.layers for module in layer.modules]
        decoded = all(isinstance(m, FrozenLinear) and m.quantized is not None for m in modules)
        self.slots = source.slots if decoded else SLOTS
        on_gpu = self._device.type == "cuda"
        self.side_stream = torch.cuda.Stream(self._device) if on_gpu else None  # type: ignore[no-untyped-call]
        self.copied_bytes = 0
        self.streamed: list[int] = []
        self._slots: dict[int, _Slot] = {}
        self._resident: dict[int, Tensor] = {}
        self.stream_all_but(())

    @property
    def nbytes(self) -> int:
        """Bytes on the device: slots and resident layers."""
        slots = {id(slot): slot.memory.nbytes for slot in self._slots.values()}
        return sum(slots.values()) + sum(memory.nbytes for memory in self._resident.values())

    def stream_all_but(self, resident: Iterable[int]) -> None:
        """Keep some layers on the device, and stream the others.

        CUDA graphs that were captured before must not be replayed afterwards.
        """
        wanted = set(resident)
        if self.side_stream is not None:  # a copy may be under way, of a step that was not finished
            torch.cuda.current_stream().wait_stream(self.side_stream)
        old = list({id(slot): slot for slot in self._slots.values()}.values())
        self._slots = {}
        self._resident = {i: held for i, held in self._resident.items() if i in wanted}
        for index in sorted(wanted - set(self._resident)):
            memory = torch.empty(self.layers[index].nbytes, dtype=torch.uint8, device=self._device)
            self.source.copy_to(index, memory)
            self._resident[index] = memory
            self.layers[index].bind(memory, None)
        self.streamed = [i for i in range(len(self.layers)) if i not in wanted]
        count = min(self.slots, len(self.streamed))
        for number in range(count):
            turn = self.streamed[number::count]
            nbytes = max(self.layers[i].nbytes for i in turn)
            slot = next((slot for slot in old if slot.memory.nbytes >= nbytes), None)
            if slot is None:
                slot = _Slot(nbytes, self._device, self.side_stream)
            else:  # allocated anew, it would exist twice until all modules refer to the new one
                old.remove(slot)
            self._slots |= dict.fromkeys(turn, slot)
        self.forget()
        for index in self.streamed:
            layer = self.layers[index]
            layer.bind(self._slots[index].memory[: layer.nbytes], _Ensure(self, index))

    def prefetch(self, layer: int) -> None:
        """Start to copy a layer to the device, without waiting."""
        slot = self._slots.get(layer)
        if slot is None or slot.layer == layer:
            return
        slot.layer = layer
        nbytes = self.layers[layer].nbytes
        self.copied_bytes += nbytes
        if self.side_stream is None:
            self.source.copy_to(layer, slot.memory[:nbytes])
            return
        if slot.free is None:
            self.side_stream.wait_stream(torch.cuda.current_stream())
        else:
            self.side_stream.wait_event(slot.free)
        with torch.cuda.stream(self.side_stream):
            self.source.copy_to(layer, slot.memory[:nbytes])
            slot.copied = self.side_stream.record_event()

    def acquire(self, layer: int) -> None:
        """Have the current stream wait until a layer is on the device."""
        slot = self._slots.get(layer)
        if slot is None:
            return
        self.prefetch(layer)
        if slot.copied is not None:
            torch.cuda.current_stream().wait_event(slot.copied)
        slot.copied = slot.free = None

    def release(self, layer: int) -> None:
        """Allow a layer to be overwritten, after what the current stream has queued so far."""
        slot = self._slots.get(layer)
        if slot is not None and self.side_stream is not None:
            slot.free = torch.cuda.current_stream().record_event()

    def forget(self) -> None:
        """Treat all slots as empty, since copies were captured or replayed unseen."""
        for slot in self._slots.values():
            slot.layer = slot.copied = slot.free = None


class _Ensure:
    """Has a layer on the device before one of its modules reads its weight."""

    def __init__(self, stream: LayerStream, layer: int) -> None:
        # Weakly, since the stream knows the modules: a cycle would delay freeing their memory.
        self._stream, self._layer = weakref.ref(stream), layer

    def __call__(self) -> None:
        stream = self._stream()
        assert stream is not None, "the model that owns the stream has been freed"
        stream.acquire(self._layer)


def spread(layers: int, count: int) -> list[int]:
    """Return ``count`` of ``layers`` indices, evenly spaced.

    Resident layers are spread, since while one of them is computed the next streamed layer is
    copied.
    """
    return [(2 * i + 1) * layers // (2 * count) for i in range(count)] if count else []


def stream_of(model: Any) -> LayerStream | None:
    """Return the stream of a model's layers, or None if all of its weights are resident."""
    stream: LayerStream | None = getattr(model, "halfbyte_stream", None)
    return stream
