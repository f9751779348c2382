"""The two passes of an optimizer step over the layers, as they are and as CUDA graphs.

    down    layer by layer, all parts: what backward needs is kept
    up      last layer first: rebuild what is missing, run the layer's own small autograd graph,
            hand the gradient to the layer before

Between them is the loss, whose shapes differ from step to step. The passes themselves have few
shapes (train/parts.py). Launched from Python, a pass of a 7B model is some thousand launches and
the card waits for the host below a few thousand tokens; so the second time a shape comes, its
passes are captured, and from then on each is one launch. What is captured is what was run: there
is no other code for it.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from halfbyte.model.layer import Notes
from halfbyte.train.shelf import Shelf

# Graphs of so many shapes are held; each takes some ten megabytes.
MOST_GRAPHS = 16


class Keeping(NamedTuple):
    """What is kept of each layer between the passes.

    Attributes:
        saved_layers: So many layers, counted from the last, keep what their backward needs; the
            others keep their input and what is thin, and are run again.
        offloaded_layers: So many, counted from the first, keep it in host memory.
        notes: Whether these keep notes beside it, so that less is run again.
    """

    saved_layers: int
    offloaded_layers: int = 0
    notes: bool = False


class Run(Protocol):
    """Calls a layer on a part."""

    def __call__(
        self,
        layer: int,
        x: Tensor,
        given: tuple[Tensor, ...],
        *,
        read: bool,
        notes: Notes | None = None,
    ) -> Tensor:
        """Return the layer's output [B, T, hidden]; ``read``: whether anybody reads its values."""


class Thin(Protocol):
    """What an open layer makes of its input that is not worth making twice; narrow tensors."""

    def note(self) -> None:
        """Note it from now on."""

    def take(self) -> Mapping[Any, Tensor]:
        """Return what was noted since; note no more."""

    def give(self, taken: Mapping[Any, Tensor]) -> None:
        """Have the layer's next run, on the same input, use what was taken."""


class Passage(NamedTuple):
    """A part on its way.

    Attributes:
        x: What goes into layer 0, [B, T, hidden].
        given: Tensors that layers are called with besides.
        run: Calls a layer.
    """

    x: Tensor
    given: tuple[Tensor, ...]
    run: Run


@dataclass
class _Kept:
    """What a layer left for one part.

    Attributes:
        x: Its input, unless that is on the shelf.
        y: Its output, if it is saved.
        thin: What is not made again, if it is not.
        notes: What it noted, whose tensors are where x is.
    """

    x: Tensor | None = None
    y: Tensor | None = None
    thin: Mapping[Any, Tensor] = field(default_factory=dict)
    notes: Notes | None = None

    def away(self) -> list[Tensor]:
        """Return what waits elsewhere, and let go of it."""
        assert self.x is not None
        tensors, self.x = [self.x.detach()], None
        if self.notes is not None:
            tensors += self.notes.tensors
            self.notes.tensors = []
        return tensors

    def back(self, tensors: list[Tensor], *, wanted: bool) -> None:
        """Have back what waited; ``wanted``: whether the input wants a gradient."""
        x, *rest = tensors
        self.x = x.requires_grad_(wanted)
        if self.notes is not None:
            self.notes.tensors = rest


class Passes:
    """Runs both passes.

    Args:
        trained: For each layer, what is trained in it.
        first_trained: The first that trains anything, or lies above what does.
        entry_trained: Whether what goes into layer 0 wants a gradient.
        opened: Makes a layer's weights ready, unless they are (``again``); a context, which gives
            the layer's `Thin`.

    Attributes:
        between: Called before each layer, in both passes, and by the engine before the loss; not
            before layers where graphs are played again.
    """

    def __init__(
        self,
        trained: Sequence[Sequence[nn.Parameter]],
        first_trained: int,
        entry_trained: bool,
        opened: Callable[..., AbstractContextManager[Thin]],
    ) -> None:
        self.layers, self._trained = len(trained), [list(those) for those in trained]
        self.first_trained, self.entry_trained = first_trained, entry_trained
        self._opened = opened
        self.between: Callable[[], None] = lambda: None
        self._kept: list[list[_Kept]] = []
        self._shelf: Shelf | None = None

    def down(self, passages: Sequence[Passage], keeping: Keeping) -> list[Tensor]:
        """Return the last layer's output for each part, detached."""
        hidden = [passage.x for passage in passages]
        first_saved = max(self.layers - keeping.saved_layers, self.first_trained)
        offloaded = min(keeping.offloaded_layers, first_saved)
        noted = offloaded if keeping.notes else 0
        self._kept = []
        for index in range(self.layers):
            row: list[_Kept] = []
            wanted = self.entry_trained or index > self.first_trained
            saved = index >= first_saved
            self.between()
            with self._opened(index) as thin:
                for i, passage in enumerate(passages):
                    x = hidden[i].detach().requires_grad_(wanted)
                    if not saved:
                        thin.note()
                    notes = Notes() if self.first_trained <= index < noted else None
                    with torch.set_grad_enabled(saved):
                        y = passage.run(index, x, passage.given, read=True, notes=notes)
                    row.append(_Kept(x, y if saved else None, thin.take(), notes))
                    hidden[i] = y.detach()
            if index < self.first_trained:
                continue
            if index < offloaded:
                self._shelf = self._shelf or Shelf()
                self._shelf.put(index, [kept.away() for kept in row])
            elif self._shelf is not None:
                self._shelf.settle()
            self._kept.append(row)
        if self._shelf is not None:
            self._shelf.settle()
        return hidden

    def up(
        self,
        passages: Sequence[Passage],
        grads: list[Tensor],
        finished: Callable[[int], None] | None = None,
    ) -> None:
        """Turn gradients of `down`'s outputs into those of its inputs, in place of them.

        The layers' own go to ``.grad`` of what is trained; ``finished`` is called with a layer's
        number when they are final.
        """
        self._fetch(self.layers - 1)
        for index in reversed(range(self.first_trained, self.layers)):
            row = self._kept.pop()
            away = row[0].x is None
            if away and self._shelf is not None:
                wanted = self.entry_trained or index > self.first_trained
                back = self._shelf.take(index)
                for kept in row:
                    kept.back(back.pop(0), wanted=wanted)
            self._fetch(index - 1)
            self.between()
            # The last layer of the pass down is the first of the pass up.
            with self._opened(index, again=index == self.layers - 1) as thin:
                for i, passage in enumerate(passages):
                    held = row[i]
                    output, x = held.y, held.x
                    assert x is not None
                    if output is None:
                        thin.give(held.thin)
                        with torch.enable_grad():
                            output = passage.run(
                                index, x, passage.given, read=False, notes=held.notes
                            )
                    leaves = [x] * x.requires_grad + self._trained[index]
                    # In this thread: one more would have a cuBLAS workspace of its own.
                    with torch.autograd.set_multithreading_enabled(False):
                        found = list(
                            torch.autograd.grad(output, leaves, grads[i], allow_unused=True)
                        )
                    del output
                    if x.requires_grad:
                        grads[i] = found.pop(0)
                    _add_up(self._trained[index], found)
                    row[i] = _Kept()
            if finished is not None:
                finished(index)

    def forget(self) -> None:
        """Let go of what a pass down has kept; for when no pass up will follow."""
        self._kept = []
        self._shelf = None

    def _fetch(self, index: int) -> None:
        if self._shelf is not None and index >= self.first_trained:
            self._shelf.fetch(index)


def _add_up(parameters: Sequence[nn.Parameter], found: Sequence[Tensor | None]) -> None:
    """Add gradients to ``.grad``: those of a layer together, where autograd would go one by one."""
    olds, news = [], []
    for parameter, new in zip(parameters, found, strict=True):
        if new is None:
            continue
        if parameter.grad is None:
            parameter.grad = new.contiguous()
        else:
            olds.append(parameter.grad)
            news.append(new)
    if olds:
        torch._foreach_add_(olds, news)


class _Captured(NamedTuple):
    """Both passes of one shape, and the tensors through which they are given and give."""

    given: list[tuple[Tensor, ...]]
    held: tuple[Passage, ...]
    hidden: list[Tensor]
    by_parameter: list[Tensor]
    down: torch.cuda.CUDAGraph
    up: torch.cuda.CUDAGraph


class CapturedPasses:
    """Runs the passes of shapes that have come before as CUDA graphs.

    All graphs share one pool of memory: one step's graphs have ended when the next step's begin.

    Args:
        passes: What is captured. Nothing in it may depend on what the host knows at the time.
        parameters: What is trained. Gradients are added to the very tensors that ``.grad`` are
            when a shape is captured; if they have been replaced since, it is captured anew.

    Attributes:
        full: Whether a shape was refused, because there are as many graphs as are held.
    """

    def __init__(self, passes: Passes, parameters: Sequence[nn.Parameter]) -> None:
        self._passes, self._parameters = passes, list(parameters)
        self._seen: set[Hashable] = set()
        self._captured: dict[Hashable, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self.full = False

    def wanted(self, key: Hashable) -> bool:
        """Return whether passes of this shape should be graphs: they have been run once."""
        if key not in self._seen:
            self._seen.add(key)
            return False
        held = self._captured.get(key)
        if held is not None:
            pairs = zip(self._parameters, held.by_parameter, strict=True)
            if all(parameter.grad is grad for parameter, grad in pairs):
                return True
            del self._captured[key]
        self.full = len(self._captured) >= MOST_GRAPHS
        return not self.full

    def forget(self) -> None:
        """Let go of all graphs; shapes have still been seen."""
        self._captured = {}

    def capture(self, key: Hashable, passages: Sequence[Passage], keeping: Keeping) -> None:
        """Capture the passes of a shape, unless they are.

        Raises:
            RuntimeError: If they cannot be captured; nothing has been computed then.
        """
        if key not in self._captured:
            self._captured[key] = self._capture(passages, keeping)

    def down(self, key: Hashable, passages: Sequence[Passage]) -> list[Tensor]:
        """As `Passes.down`, after `capture`; the next step of this shape writes over the result."""
        captured = self._captured[key]
        for held, old, new in zip(captured.held, captured.given, passages, strict=True):
            held.x.copy_(new.x)
            for place, before, value in zip(held.given, old, new.given, strict=True):
                if value is not before:
                    place.copy_(value)
        captured.down.replay()
        return captured.hidden

    def up(self, key: Hashable, grads: Sequence[Tensor]) -> None:
        """As `Passes.up`, after `down` of the same shape."""
        captured = self._captured[key]
        # Nobody reads the last layer's output any more: its gradient takes its place.
        for place, grad in zip(captured.hidden, grads, strict=True):
            place.copy_(grad)
        captured.up.replay()

    def _capture(self, passages: Sequence[Passage], keeping: Keeping) -> _Captured:
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        # What plain steps left in the allocator's cache is of no use to a graph's own pool, nor are
        # the workspaces cuBLAS has in their stream.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        # What enters is made anew for each step, so this step's can be what graphs read.
        held = tuple(
            Passage(p.x.detach(), tuple(t.clone() for t in p.given), p.run) for p in passages
        )
        down, up = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(down, pool=self._pool, capture_error_mode="thread_local"):
                hidden = self._passes.down(held, keeping)
            with torch.cuda.graph(up, pool=self._pool, capture_error_mode="thread_local"):
                self._passes.up(held, list(hidden))
        except RuntimeError:
            self._passes.forget()
            # torch's random numbers go on only after a capture that ends well.
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                torch.zeros(1, device="cuda").add_(1)
            raise
        by_parameter = [p.grad for p in self._parameters if p.grad is not None]
        given = [passage.given for passage in passages]
        return _Captured(given, held, hidden, by_parameter, down, up)
