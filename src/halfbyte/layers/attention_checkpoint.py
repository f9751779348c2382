"""Attention checkpointing: computed once, differentiated with recomputed inputs.

A layer recomputed for backward recomputes q, k and v, which are large. The output of attention is
as large as one of them but costs more time than any, so it can be offloaded to host memory
(engine/offload.py) instead of being recomputed. To be independent of torch's choice of kernel and
of what that saves for backward, the autograd graph of the first forward is kept without its
tensors, and backward substitutes:

    q, k, v    recomputed, bit-identical to the first
    output     the offloaded tensor
    the rest   likewise (flash attention's logsumexp, 4 bytes per query and head)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from halfbyte.layers.attention import Documents, attend

# Tensors of at most this many elements (generator states) stay in the graph.
_SMALL = 64


@dataclass
class _Saved:
    """Placeholder for a saved tensor: the tensor it is a view of, and its geometry."""

    source: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass
class _Box:
    """Passes tensors to the graph and gradients from it."""

    sources: list[Tensor] = field(default_factory=list)
    given: Tensor | None = None
    found: dict[int, Tensor] = field(default_factory=dict)


class _Enter(torch.autograd.Function):
    """Input of the graph; does not hold the tensor."""

    @staticmethod
    def forward(ctx: Any, _proxy: Tensor, x: Tensor, box: _Box, index: int) -> Tensor:
        ctx.box, ctx.index = box, index
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        ctx.box.found[ctx.index] = grads[0]
        return None, None, None, None


class _Leave(torch.autograd.Function):
    """Output of the graph; does not hold the tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, box: _Box) -> Tensor:
        ctx.box = box
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, None]:
        return ctx.box.given, None


class CheckpointedAttention:
    """See the top of this file.

    Args:
        q: As for `attend`, like the others.
        k: Likewise.
        v: Likewise.
        documents: Likewise.
        scale: Likewise.
        attention: What computes it, with the arguments of `attend`, which it is by default.

    Attributes:
        tensors: The output [B, T, H · D] and the other tensors backward needs; `again` also accepts
            copies of them.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Documents | None,
        scale: float,
        attention: Callable[..., Tensor] | None = None,
    ) -> None:
        inputs, box = [x.detach() for x in (q, k, v)], _Box()
        places = {_place(x): i for i, x in enumerate(inputs)}
        kept: list[tuple[Tensor, _Saved]] = []

        def pack(x: Tensor) -> Tensor | _Saved:
            if x.numel() <= _SMALL:
                return x.detach()
            saved = _Saved(places.get(_place(x), -1), x.size(), x.stride(), 0)
            if saved.source < 0:
                kept.append((x.detach(), saved))
            return saved

        def unpack(saved: Tensor | _Saved) -> Tensor:
            if isinstance(saved, Tensor):
                return saved
            source = box.sources[saved.source]
            start = int(source.storage_offset()) + saved.offset
            return source.as_strided(saved.size, saved.stride, start)

        proxy = torch.empty(0, requires_grad=True)
        with torch.enable_grad():
            entered = [_Enter.apply(proxy, x, box, i) for i, x in enumerate(inputs)]  # type: ignore[no-untyped-call]
            with saved_tensors_hooks(pack, unpack):
                out = (attention or attend)(entered[0], entered[1], entered[2], documents, scale)
            self._end = _Leave.apply(out, box)  # type: ignore[no-untyped-call]
        self._box, self._strides = box, [x.stride() for x in inputs]
        self.tensors = [out.detach()]
        for x, saved in kept:
            if _storage(x) == _storage(out):
                saved.source = 3
                saved.offset = int(x.storage_offset()) - int(out.storage_offset())
            else:
                saved.source = 3 + len(self.tensors)
                # Copies of it are contiguous (engine/offload.py), so it must be as well.
                x = x.contiguous()
                saved.stride = x.stride()
                self.tensors.append(x)
        kept.clear()

    def again(self, q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Return the output, differentiable in q, k and v; can be called once.

        Args:
            q: The values passed to the constructor.
            k: Likewise.
            v: Likewise.
            tensors: The attribute of that name, or copies of its tensors.
        """
        return _Again.apply(q, k, v, self, *tensors)  # type: ignore[no-any-return, no-untyped-call]

    def gradients(self, sources: Sequence[Tensor], dy: Tensor) -> list[Tensor]:
        """Return dq, dk and dv, given q, k, v and `tensors`, and the gradient of the output."""
        strides = [x.stride() for x in sources[:3]]
        if strides != self._strides:
            raise RuntimeError(f"the strides of q, k, v have changed: {strides}, {self._strides}")
        box = self._box
        box.sources, box.given = list(sources), dy
        with torch.autograd.set_multithreading_enabled(False):
            torch.autograd.backward(self._end)
        found = [box.found.pop(i) for i in range(3)]
        box.sources, box.given = [], None
        return found


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, attended: CheckpointedAttention, *tensors: Tensor
    ) -> Tensor:
        ctx.attended = attended
        ctx.save_for_backward(q, k, v, *tensors)
        return tensors[0].view_as(tensors[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sources = ctx.saved_tensors
        found = ctx.attended.gradients(sources, grads[0])
        return (*found, None, *[None] * (len(sources) - 3))


def _storage(x: Tensor) -> int:
    # 0 for an empty storage. That is never compared, as tensors without elements stay in the graph.
    return x.untyped_storage().data_ptr()


def _place(x: Tensor) -> tuple[int, int]:
    return _storage(x), int(x.storage_offset())
