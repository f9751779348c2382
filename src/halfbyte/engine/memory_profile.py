"""What a step will take of a GPU's memory, measured on one layer before the first step.

A layer is a layer: what one keeps, and what its backward has alive at the worst moment, the others
do too. So one layer is run forward and backward on the largest part, and so is the loss, while the
allocator watches its peak. ``plan.policy.peak`` adds up what all layers take under a policy.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.packing import Part
from halfbyte.layers.decoder_layer import Notes
from halfbyte.plan.activation_cost import CHECKPOINT_WIDTH
from halfbyte.plan.policy import StepCost
from halfbyte.plan.roofline import card_of_driver


def measured_cost(engine: LayerEngine, parts: Sequence[Part]) -> StepCost:
    """Measure what goes through the layers together: a packed part, or the micro-batches of a step.

    Gradients of what is trained must be there already; they are left as they were.
    """
    # The loss adds to those of a head or a norm that is trained whole.
    held = [(p, p.grad) for p in engine.model.parameters() if p.requires_grad]
    for parameter, _ in held:
        parameter.grad = None
    try:
        return _measured(engine, parts)
    finally:
        for parameter, grad in held:
            parameter.grad = grad
        torch.cuda.reset_peak_memory_stats()


def _measured(engine: LayerEngine, parts: Sequence[Part]) -> StepCost:
    passages = engine.embed(parts)
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

    def saved_forward() -> Tensor:
        with torch.enable_grad():
            return passage.run(index, passage.x.detach().requires_grad_(), passage.given, read=True)

    def tail() -> object:
        return engine.tail(passage.x.detach(), part, 1.0)

    with engine.opened(index) as opened:
        backward()  # the first time, kernels are compiled and buffers made
        tail()
        opened.note()
        below = _peak(forward)
        lora = sum(p.nbytes for p in opened.take().values())
        below_saved, above, loss = _peak(saved_forward), _peak(backward), _peak(tail)
        notes = Notes()
        # In 32 bits torch's attention may keep all its weights: too much to send away.
        x = passage.x
        if x.is_cuda and x.itemsize == 2 and x.shape[-1] >= _checkpoint_width():
            forward(notes)
        attention = sum(x.nbytes for x in notes.tensors)
    saved = [engine.saved_bytes_of(p)[0] for p in passages]
    # Where base and adapters are multiplied together, copies of these are kept, by no hook seen.
    copies = passage.x.itemsize * sum(p.numel() for p in trained) if lora else 0
    stream, own = sum(p.x.nbytes for p in passages), passage.x.nbytes
    saved_part = saved[largest] - own
    given = {t.data_ptr(): t.nbytes for p in passages for t in p.given}
    return StepCost(
        layers=len(engine.layers),
        input=stream,
        part_input=own,
        # As many bytes a token in every part.
        lora=lora * stream // own,
        saved=sum(saved) + copies,
        attention=attention * stream // own,
        attention_part=attention,
        forward=max(0, below - own),  # its output is the stream
        forward_saved=max(0, below_saved - own - saved_part),
        backward=above - lora,
        saved_part=min(saved_part, above - lora),
        loss=loss,
        given=sum(given.values()),
        decoded=engine.decoded_bytes,
    )


def _checkpoint_width() -> int:
    card = card_of_driver(torch.cuda.get_device_name())
    return CHECKPOINT_WIDTH if card is None else card.checkpoint_width


def _peak(run: Callable[[], object]) -> int:
    """Return how far above what was allocated before ``run`` went."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return int(torch.cuda.max_memory_allocated()) - int(before)
