"""The GPU memory of a step, measured on one layer before the first step.

All layers keep the same amount of memory, and their backwards have the same peak. So one layer is
run forward and backward on the largest part, and so is the loss, while the allocator records its
peak. ``plan.policy.peak`` adds up the memory of all layers under a policy.

A long part may fit only if it is recomputed by tiles (layers/tiled_layer.py). What a layer would
save of it is measured on a shorter part, and grows with the tokens.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from halfbyte.engine.buckets import PartShape
from halfbyte.engine.forward_backward import LayerInput
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.packing import PackedBatch, part_of_shape
from halfbyte.engine.weights import acquired
from halfbyte.layers.decoder_layer import AttentionCheckpoint
from halfbyte.linear.experts import expert_linears
from halfbyte.linear.fp8 import FP8
from halfbyte.linear.layer_stream import stream_of
from halfbyte.linear.sequence_tiles import is_long
from halfbyte.plan.activation_cost import CHECKPOINT_WIDTH, checkpoint_share
from halfbyte.plan.policy import StepCost
from halfbyte.plan.roofline import gpu_of_driver
from halfbyte.runtime import device as devices

# Tokens of the part that stands for a long one.
SHORTER = 8192


def measured_cost(engine: LayerEngine, parts: Sequence[PackedBatch]) -> StepCost:
    """Measure a packed part, or the micro-batches of a step, which run through layers together.

    Gradients of trained parameters must be allocated; their values do not change.
    """
    # The loss adds to those of a head or norm that is trained in full.
    gradients = [(p, p.grad) for p in engine.model.parameters() if p.requires_grad]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        return _measured(engine, parts)
    finally:
        for parameter, grad in gradients:
            parameter.grad = grad
        torch.cuda.reset_peak_memory_stats()


def _measured(engine: LayerEngine, parts: Sequence[PackedBatch]) -> StepCost:
    layer_inputs = engine.embed(parts)
    index = len(engine.layers) - 1
    trained = [p for p in engine.layers[index].parameters() if p.requires_grad]
    largest = max(range(len(parts)), key=lambda i: parts[i].ids.numel())
    layer_input, part = layer_inputs[largest], parts[largest]
    dy = torch.zeros_like(layer_input.x)

    def backward() -> None:
        _backward(layer_input, index, trained, dy, read=False)

    def forward(checkpoint: AttentionCheckpoint | None = None) -> Tensor:
        with torch.no_grad():
            return layer_input.run(
                index, layer_input.x, layer_input.layer_args, read=True, checkpoint=checkpoint
            )

    def loss_and_grad() -> object:
        return engine.loss_and_grad(layer_input.x.detach(), part, 1.0)

    tiled = is_long(*layer_input.x.shape[:2])
    short = _shorter(engine) if tiled else layer_input
    with acquired(engine.weights, index) as lora_cache:
        # The first call compiles kernels and allocates buffers.
        _backward(short, index, trained, torch.zeros_like(short.x), read=False)
        engine.loss_and_grad(short.x.detach(), part if short is layer_input else _first(part), 1.0)
        lora_cache.record()
        in_forward = _peak(forward)
        lora = sum(p.nbytes for p in lora_cache.pop().values())
        of_saved = _saved_layer(short, index, trained, whole=tiled)
        in_backward = _peak(backward)
        loss = _peak(loss_and_grad)
        checkpoint = AttentionCheckpoint()
        if checkpointed_share(engine) > 0:
            forward(checkpoint)
        attention = sum(x.nbytes for x in checkpoint.tensors)
    own = layer_input.x.nbytes
    if tiled:
        share, kept = own / short.x.nbytes, saved_bytes(engine, short)[0]
        above = kept - short.x.nbytes
        saved = [kept * p.x.nbytes // short.x.nbytes for p in layer_inputs]
        beside = int(share * (of_saved[0] - above))
        saved_part = in_backward - int(share * max(0, of_saved[1] - above))
    else:
        saved = [saved_bytes(engine, p)[0] for p in layer_inputs]
        saved_part = min(saved[largest] - own, in_backward - lora)
        beside = of_saved[0] - (saved[largest] - own)
    # Fused products of base and adapter keep cast copies of the adapters, invisible to hooks.
    fused = layer_input.x.itemsize == 2 and engine.fused
    copies = layer_input.x.itemsize * sum(p.numel() for p in trained) if lora or fused else 0
    stream = sum(p.x.nbytes for p in layer_inputs)
    layer_args = {t.data_ptr(): t.nbytes for p in layer_inputs for t in p.layer_args}
    return StepCost(
        layers=len(engine.layers),
        input=stream,
        part_input=own,
        # The same number of bytes per token in every part.
        lora=lora * stream // own,
        saved=sum(saved) + copies,
        attention=attention * stream // own,
        attention_part=attention,
        forward=max(0, in_forward - own),  # its output is the residual stream
        forward_saved=max(0, beside),
        backward=in_backward - lora,
        saved_part=saved_part,
        loss=loss,
        layer_args=sum(layer_args.values()),
        decoded=engine.decoded_bytes,
        tiled=engine.tiles(own // layer_input.x.shape[-1] // layer_input.x.itemsize),
    )


def _backward(
    layer_input: LayerInput,
    index: int,
    trained: Sequence[Tensor],
    dy: Tensor,
    *,
    read: bool,
) -> None:
    """Run a layer forward and backward; ``dy`` is overwritten."""
    x = layer_input.x.detach().requires_grad_()
    with torch.enable_grad():
        y = layer_input.run(index, x, layer_input.layer_args, read=read)
    torch.autograd.grad(y, [x, *trained], dy, allow_unused=True)


def _saved_layer(
    layer_input: LayerInput, index: int, trained: Sequence[Tensor], *, whole: bool
) -> tuple[int, int]:
    """Return peaks of a saved layer, without its output: of forward and, if ``whole``, of both."""
    own = layer_input.x.nbytes

    def forward() -> Tensor:
        with torch.enable_grad():
            return layer_input.run(
                index, layer_input.x.detach().requires_grad_(), layer_input.layer_args, read=True
            )

    in_forward = _peak(forward) - own
    if not whole:
        return in_forward, 0
    dy = torch.zeros_like(layer_input.x)
    return in_forward, _peak(lambda: _backward(layer_input, index, trained, dy, read=True)) - own


def _shorter(engine: LayerEngine) -> LayerInput:
    """Return a part that is not long."""
    shape = PartShape(1, SHORTER, 0, SHORTER)
    return engine.embed([part_of_shape(shape, engine.model.device)])[0]


def _first(part: PackedBatch) -> PackedBatch:
    """Return a part with as few supervised positions as `SHORTER` has tokens."""
    return replace(part, rows=part.rows[:1] * 0, targets=part.targets[:1])


def layers_streamed_unnoticed(engine: LayerEngine, parts: Sequence[PackedBatch]) -> int:
    """Return how many layers can be copied to a GPU in the time that forward of all layers takes.

    Backward takes longer, so it is enough to look at forward. Both are timed on the last layer.

    Args:
        engine: The engine, whose model has a `LayerStream`.
        parts: What goes through a layer before the next is needed.
    """
    stream, index = stream_of(engine.model), len(engine.layers) - 1
    assert stream is not None
    layer_inputs = engine.embed(parts)

    def forward() -> None:
        for layer_input in layer_inputs:
            layer_input.run(index, layer_input.x, layer_input.layer_args, read=True)

    def copy() -> None:
        stream.forget()
        stream.acquire(index)

    with torch.no_grad(), acquired(engine.weights, index):
        computing = _fastest(forward)
    copying = _fastest(copy)
    engine.weights.forget()
    return int(len(engine.layers) * min(1.0, computing / copying))


def _fastest(run: Callable[[], object]) -> float:
    """Return the seconds of the fastest of three calls."""
    times = []
    for _ in range(3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


def saved_bytes(engine: LayerEngine, layer_input: LayerInput) -> tuple[int, int]:
    """Return the bytes one layer keeps for a part: (when saved, when recomputed)."""
    seen: dict[int, int] = {}
    there = [*engine.layers[-1].parameters(), *layer_input.layer_args]
    weights = {tensor.untyped_storage().data_ptr() for tensor in there}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        # Detached, since a saved output would keep its own graph alive forever.
        return tensor.detach()

    index = len(engine.layers) - 1
    hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
    with acquired(engine.weights, index), torch.enable_grad(), hooks:
        x = layer_input.x.detach().requires_grad_()
        y = layer_input.run(index, x, layer_input.layer_args, read=True)
    return sum(seen.values()), y.nbytes


def checkpointed_share(engine: LayerEngine) -> float:
    """Return `checkpoint_share` of an engine's layers, on a GPU."""
    if engine.dtype.itemsize != 2:
        return 0.0  # in float32 torch's attention may keep all its weights: too much to offload
    known = gpu_of_driver(devices.spec_of(engine.model.device).name)
    narrowest = CHECKPOINT_WIDTH if known is None else known.checkpoint_width
    width = int(engine.model.config.get_text_config().hidden_size)
    fp8 = all(linear.layout is FP8 for linear in engine.linears[-1])
    fp8 &= not expert_linears(engine.model)  # which stay in 16 bits
    return checkpoint_share(width, engine.max_seqlen, narrowest, fp8=fp8)


def _peak(run: Callable[[], object]) -> int:
    """Return the peak memory of ``run`` above what was allocated before it."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return int(torch.cuda.max_memory_allocated()) - int(before)
