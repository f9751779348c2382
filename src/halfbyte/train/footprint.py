"""What a step will take of a GPU's memory, measured on one layer before the first step.

A layer is a layer: what one keeps, and what its backward has alive at the worst moment, the others
do too. So one layer is run forward and backward on the largest part of the largest step, and so is
the loss, while the allocator watches its peak; all else is addition:

    down    what all layers keep between the passes, and the stream between two of them; a layer
            that is run again its inputs and, wherever these wait, x Aᵀ of its linears
    loss    beside that: a part's loss at its worst, and the gradient of every part's stream
    up      the same gradients, and the last layer's backward at its worst

Graphs are given their inputs, and give their outputs, in tensors of their own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halfbyte.model.layer import Notes
from halfbyte.plan.activations import NOTED_WIDTH, UNDER_WAY
from halfbyte.plan.ledger import OVERHEAD
from halfbyte.plan.speed import card_of_driver
from halfbyte.train.engine import Batch, LayerEngine


@dataclass(frozen=True)
class Footprint:
    """What was measured; bytes.

    Attributes:
        layers: Layers of the model.
        used: In use when no step is under way, the decoded layer's buffers included.
        kept: What a layer keeps of a whole step when it is run again: its inputs.
        thin: What it keeps beside them, on the card in any case.
        noted: What its notes are; nothing, where they are not worth their way.
        noted_part: What of them are the largest part's.
        saved: What it keeps when it is not.
        down: What a layer's forward has alive beside its inputs, at the worst moment.
        loss: What a part's loss has alive beside what goes in.
        up: What the backward of a layer that is run again has alive, beside its inputs.
        saved_part: What of ``up`` are activations that a saved layer has kept.
        own: Tensors of the graphs' own.
        decoded: A layer's decoded weights; there is room for one layer's in ``used``.
    """

    layers: int
    used: int
    kept: int
    thin: int
    noted: int
    noted_part: int
    saved: int
    down: int
    loss: int
    up: int
    saved_part: int
    own: int
    decoded: int

    def peak(
        self,
        saved_layers: int,
        offloaded_layers: int,
        *,
        notes: bool = False,
        decoded_layers: int = 0,
    ) -> int:
        """Return the predicted peak, the optimizer's state not counted."""
        buffers = decoded_layers + (decoded_layers < self.layers)
        again = self.layers - saved_layers
        here = again - offloaded_layers + min(offloaded_layers, UNDER_WAY)
        waiting = here * self.kept + again * self.thin
        # Of the layer below, and of this one's other parts: this part's are in `up`.
        beside = notes * ((1 + UNDER_WAY) * self.noted - self.noted_part)
        between = saved_layers * self.saved + waiting
        moments = [
            between + self.down + self.kept + notes * UNDER_WAY * self.noted,
            between + 2 * self.kept + self.loss,
        ]
        if saved_layers:
            moments.append(between + self.kept + self.up - self.saved_part)
        if again:
            moments.append(waiting + beside + self.kept + self.up)
        return self.used + (buffers - 1) * self.decoded + self.own + max(moments)


def footprint(engine: LayerEngine, batches: Sequence[Batch]) -> Footprint:
    """Measure what a step of ``batches`` would take.

    Gradients of what is trained must be there already; they are left as they were.
    """
    # The loss adds to those of a head or a norm that is trained whole.
    held = [(p, p.grad) for p in engine.model.parameters() if p.requires_grad]
    for parameter, _ in held:
        parameter.grad = None
    try:
        measured = _measured(engine, batches)
    finally:
        for parameter, grad in held:
            parameter.grad = grad
    used = int(torch.cuda.memory_allocated())
    torch.cuda.reset_peak_memory_stats()
    return replace(measured, used=used)


def _measured(engine: LayerEngine, batches: Sequence[Batch]) -> Footprint:
    parts, passages = engine.enter(batches)
    index = len(engine.layers) - 1
    trained = [p for p in engine.layers[index].parameters() if p.requires_grad]
    largest = max(range(len(parts)), key=lambda i: parts[i].ids.numel())
    passage, part = passages[largest], parts[largest]
    dy = torch.zeros_like(passage.x)

    def backward() -> None:
        x = passage.x.detach().requires_grad_()
        with torch.enable_grad():
            y = passage.run(index, x, passage.given, read=False)
        torch.autograd.grad(y, [x, *trained], dy, allow_unused=True)

    def forward(notes: Notes | None = None) -> Tensor:
        with torch.no_grad():
            return passage.run(index, passage.x, passage.given, read=True, notes=notes)

    def tail() -> object:
        return engine.tail(passage.x.detach(), part, 1.0)

    with engine.opened(index) as opened:
        backward()  # the first time, kernels are compiled and buffers made
        tail()
        opened.note()
        down = _peak(forward)
        thin = sum(p.nbytes for p in opened.take().values())
        up, loss = _peak(backward), _peak(tail)
        notes = Notes()
        # In 32 bits torch's attention may keep all its weights: too much to send away.
        x = passage.x
        if x.is_cuda and x.itemsize == 2 and x.shape[-1] >= _noted_width():
            forward(notes)
        noted = sum(x.nbytes for x in notes.tensors)
    saved = [engine.saved_bytes_of(p)[0] for p in passages]
    # Where base and adapters are multiplied together, copies of these are kept, by no hook seen.
    copies = passage.x.itemsize * sum(p.numel() for p in trained) if thin else 0
    kept = sum(p.x.nbytes for p in passages)
    given = {t.data_ptr(): t.nbytes for p in passages for t in p.given}
    return Footprint(
        layers=len(engine.layers),
        used=0,
        kept=kept,
        # As many bytes a token in every part.
        thin=thin * kept // passage.x.nbytes,
        noted=noted * kept // passage.x.nbytes,
        noted_part=noted,
        saved=sum(saved) + copies,
        down=down,
        loss=loss,
        up=up,
        saved_part=saved[largest] - passage.x.nbytes,
        # A graph's passes are handed the stream in one tensor, and hand it over in another.
        own=2 * kept + sum(given.values()) + int(OVERHEAD["cuda"]) if engine.captures else 0,
        decoded=engine.decoded_bytes,
    )


def _noted_width() -> int:
    card = card_of_driver(torch.cuda.get_device_name())
    return NOTED_WIDTH if card is None else card.noted_width


def _peak(run: Callable[[], object]) -> int:
    """Return how far above what was allocated before ``run`` went."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return int(torch.cuda.max_memory_allocated()) - int(before)
