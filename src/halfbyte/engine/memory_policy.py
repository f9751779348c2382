"""Available memory, and the activation policy that fits into it.

Keeping a layer's activations for backward costs memory; recomputing them costs time (a third of the
matrix products of a step). The choice is made layer by layer, from measured bytes
(``engine.memory_profile``; on a CPU, one layer is run once on the largest micro-batch, counting
what autograd saves), added up by ``plan.policy.peak``. On a GPU the inputs of recomputed layers can
be offloaded to host memory. If all layers keep their activations on the GPU and memory is left,
layers also keep their decoded weights across steps. That saves less time per byte: for a 7B model
on an H100 a gigabyte of it saves 0.9 ms a step, one of activations 4 (gpu_step_final.json: 2 % of
535 ms for 12.5 GB; gpu_step_notes.json and gpu_step_forms.json: 541 and 430 ms with 6 and 33.8 GB).
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from halfbyte.engine.autograd import AutogradEngine
from halfbyte.engine.buckets import PartShape, UnpaddedParts
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.memory_profile import (
    checkpointed_share,
    layers_streamed_unnoticed,
    measured_cost,
    saved_bytes,
)
from halfbyte.engine.packing import Batch, PackedBatch, part_of_shape
from halfbyte.errors import ConfigError
from halfbyte.layers.cross_entropy import CHUNK_BYTES
from halfbyte.linear.experts import (
    DECODED_BYTES,
    LARGE_DECODED_BYTES,
    LEAST_DECODED_BYTES,
    expert_linears,
)
from halfbyte.linear.layer_stream import stream_of
from halfbyte.linear.modules_to_save import trained_whole
from halfbyte.plan.ledger import (
    FRAGMENTATION,
    OVERHEAD,
    TOUCHED_LATER,
    product_bytes,
    products_kept,
)
from halfbyte.plan.policy import EVERY, ActivationPolicy, StepCost, peak
from halfbyte.quant import QuantizedWeight
from halfbyte.runtime import device as devices
from halfbyte.runtime.malloc import give_back

# Without a budget, this share of the memory that is free when training starts may be used.
FREE_SHARE = 0.8

# Budgets must not be exceeded, and predictions on a GPU were up to 2 % low (gpu_step_offload.json).
MARGIN = 1.03

# Share of the host's free memory for page-locked inputs of recomputed layers: with 128 GiB, those
# of 256k tokens of an 8B model, 66.6 GB.
HOST_SHARE = 0.6


# Shapes of a run's steps: (B, T) of each micro-batch.
Shapes = Sequence[Sequence[tuple[int, int]]]


@dataclass(frozen=True)
class MemoryPlan:
    """The policy of a run, and the memory it is predicted to take.

    Attributes:
        policy: The activation policy.
        layers: Number of layers; 0 under plain autograd, which recomputes all it can.
        saved_bytes: Bytes that a saved layer keeps for a part or the micro-batches of a step.
        budget: Bytes the process (on a GPU: the device) may use.
        predicted_bytes: Estimated peak of allocated memory.
        reserved_bytes: Estimated peak of reserved memory.
        host_bytes: Bytes offloaded to page-locked host memory.
        room: On a CPU, the maximum taken between two layers.
        used: Bytes in use before the first step.
        state_off_device: Bytes of optimizer state not counted, because they can be paged out.
        cost: The costs it was computed from.
        parts_together: Packed parts that go through each layer together; see
            `LayerEngine.parts_together`.
    """

    policy: ActivationPolicy
    layers: int
    saved_bytes: int
    budget: int
    predicted_bytes: int
    reserved_bytes: int = 0
    host_bytes: int = 0
    room: int = 0
    used: int = 0
    state_off_device: int = 0
    cost: StepCost | None = None
    parts_together: int = 1

    def summary(self) -> str:
        """Return a summary for the user."""
        if not self.layers:
            return "plain autograd: layers are recomputed in backward where transformers allows it"
        policy, recomputed = self.policy, self.layers - self.policy.saved
        how = f"{policy.saved} of {self.layers} layers keep their activations"
        if recomputed:
            how += f", {recomputed} are recomputed in backward"
        if policy.offloaded:
            how += f", {policy.offloaded} of them from host memory"
            if policy.attention_checkpoints == policy.offloaded:
                how += " and without attention"
            elif policy.attention_checkpoints:
                how += f", {policy.attention_checkpoints} without attention"
        if policy.every > 1:
            how += f", from the input of every {policy.every}th layer"
        if policy.decoded:
            how += f", {policy.decoded} keep their decoded weights"
        if policy.streamed:
            how += f"; the weights of {policy.streamed} wait elsewhere until they are needed"
        elif self.cost is not None and self.cost.weights:
            how += "; there is room for the weights of all, which stay"
        if self.parts_together > 1:
            how += f", for {self.parts_together} parts of a step at a time"
        return (
            f"{how} ({self.saved_bytes / 1e6:.0f} MB a layer); about "
            f"{max(self.predicted_bytes, self.reserved_bytes) / 1e9:.2f} GB of "
            f"{self.budget / 1e9:.2f} GB"
        )


def used_memory(device: str) -> int:
    """Return the bytes in use now: resident memory of the process, or allocated on the GPU."""
    if device == "cuda":
        return int(torch.cuda.memory_allocated())
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_memory(device: str) -> int:
    """Return the peak of the bytes in use."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    # Not getrusage's ru_maxrss, which a process inherits from the one that started it.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status does not say VmHWM; halfbyte needs Linux")


def free_memory(device: str) -> int:
    """Return the bytes still available; on a GPU including torch's cache."""
    if device == "cuda":
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(torch.cuda.mem_get_info()[0] + cached)
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def memory_limit(device: str, budget: int | None) -> Iterator[None]:
    """Limit torch to ``budget`` bytes of a GPU inside the context, including its cache.

    Exceeding it is out of memory, even if the GPU has more: before the first step a smaller part is
    tried, during a step the fallbacks of ``StepMemory.fall_back``.
    """
    if device != "cuda" or budget is None:
        yield
        return
    total = devices.spec_of(torch.device(device)).memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def plan_memory(
    engine: LayerEngine | AutogradEngine,
    shapes: Shapes,
    activations: str,
    memory_budget: int | None,
    device: str,
    *,
    state_bytes: int | None = None,
    documents: Sequence[Sequence[int]] = (),
) -> MemoryPlan:
    """Choose the policy of a run.

    Args:
        engine: The engine that will run the steps, with ``buckets`` chosen and gradients allocated,
            but not the optimizer state.
        shapes: For each optimizer step of the run, the (B, T) of its micro-batches, or of its parts
            if documents are packed on a CPU.
        activations: ``save``, ``recompute``, ``offload``, or ``auto`` for what fits.
        memory_budget: Total bytes, or None for most of the free memory.
        device: ``cpu`` or ``cuda``.
        state_bytes: Size of the optimizer state on the device; by default AdamW's two moments in
            float32.
        documents: For each step, the tokens of its documents, if they are packed on a CPU.

    Raises:
        ConfigError: If the budget is too small for the requested activations, with ``auto`` even if
            every layer is recomputed; the message says the minimum.
    """
    if device == "cpu":
        give_back()  # free memory left over from loading
    used = used_memory(device)
    budget = memory_budget or int(used + FREE_SHARE * free_memory(device))
    if isinstance(engine, AutogradEngine):
        return MemoryPlan(ActivationPolicy(), 0, 0, budget, used, used=used)
    if state_bytes is None:
        state_bytes = 2 * sum(p.nbytes for p in engine.model.parameters() if p.requires_grad)
    stream = stream_of(engine.model)
    used -= 0 if stream is None else stream.nbytes  # `peak` counts it
    if device == "cuda":
        used -= engine.weights.nbytes  # likewise
        size = _decoded_bytes(activations, budget - used)
        for linear in expert_linears(engine.model).values():
            linear.decoded_bytes = size
        cost = measured_cost(engine, _largest(engine, shapes, device))
        beside = state_bytes + int(OVERHEAD["cuda"]) * engine.captures
    else:
        cost = _cost_on_cpu(engine, shapes)
        # A gradient is a temporary before it is added: the largest of those trained in full, twice.
        whole = [p.nbytes for m in engine.model.modules() for p in trained_whole(m).values()]
        beside = state_bytes + 2 * max(whole, default=0)
        beside += int(TOUCHED_LATER) + product_bytes(shapes, engine.dtype.itemsize, documents)
    unnoticed, stays = 0, stream is None or stream.source.may_stay
    if stream is not None:
        largest = max(layer.nbytes for layer in stream.layers)
        cost = replace(cost, weights=largest, slots=stream.slots)
        if device == "cuda":
            unnoticed = layers_streamed_unnoticed(engine, _largest(engine, shapes, device))
    planner = _Planner(
        cost,
        used,
        beside,
        budget,
        engine.captures,
        device,
        unnoticed if stays else cost.layers,
        stays,
        checkpointed_share(engine) if device == "cuda" else 0.0,
    )
    asked = memory_budget is not None
    plan = planner.plan(activations, asked=asked)
    if 0 < unnoticed < plan.policy.streamed and engine.packs:
        wanted = min(engine.most_parts, -(-plan.policy.streamed // unnoticed))
        return planner.plan_of_parts(activations, wanted, unnoticed) or plan
    return plan


def _decoded_bytes(activations: str, room: int) -> int:
    """Return the bytes of experts to decode at a time: little where memory is to be saved."""
    if activations == "offload":
        return LEAST_DECODED_BYTES
    large = activations in ("auto", "save") and room > 32 * LARGE_DECODED_BYTES
    return LARGE_DECODED_BYTES if large else DECODED_BYTES


def _largest(engine: LayerEngine, shapes: Shapes, device: str) -> list[PackedBatch]:
    """Return the largest part, or the largest micro-batches of a step."""
    if engine.packs and engine.buckets is not None:
        shape = engine.buckets.largest
        return [part_of_shape(shape, device, supervised=shape.numel)]
    step = max(shapes, key=lambda step: sum(b * t for b, t in step))
    zeros = [torch.zeros(size, dtype=torch.int64) for size in step]
    return engine.make_parts([Batch(ids, ids) for ids in zeros])


def _cost_on_cpu(engine: LayerEngine, shapes: Shapes) -> StepCost:
    widest = max((shape for step in shapes for shape in step), key=lambda s: s[0] * s[1])
    tokens_per_step = max(sum(b * t for b, t in step) for step in shapes)
    tokens = widest[0] * widest[1]
    # A packed row has as few documents as it can.
    window = None if engine.unpadded is None else engine.unpadded.window
    longest = min(tokens, engine.max_seqlen, window or tokens)
    packed = engine.packs and widest[0] == 1 and 0 < longest < tokens
    shape = PartShape(
        *widest, -(-tokens // longest) if packed else 0, longest if packed else widest[1]
    )
    (layer_input,) = engine.embed([part_of_shape(shape, "cpu")])
    saved, kept = saved_bytes(engine, layer_input)
    share = FRAGMENTATION["cpu"] * tokens_per_step / tokens
    stream = int(kept * share)
    # The loss: two copies of a chunk of logits, their input, its gradient.
    head = engine.head_weight
    vocabulary, packed = head.shape[0], isinstance(head, QuantizedWeight)
    rows = min(tokens, max(16, CHUNK_BYTES["cpu"] // (4 * vocabulary)))
    copies = 2 * 4 + (2 if engine.dtype.itemsize == 2 and not packed else 0)  # plan/ledger.py
    chunks = copies * rows * vocabulary + packed * CHUNK_BYTES["cpu"]
    return StepCost(
        layers=len(engine.layers),
        input=stream,
        part_input=kept,
        lora=0,
        saved=int(saved * share),
        attention=0,
        attention_part=0,
        forward=0,
        forward_saved=0,
        # One layer of the widest micro-batch, and its gradients.
        backward=max(0, 2 * saved - stream),
        saved_part=0,
        loss=chunks + 3 * kept,
        layer_args=0,
        decoded=0,  # in use already
    )


@dataclass(frozen=True)
class _Planner:
    """Chooses a policy: as many layers are saved as fit, others are offloaded if that helps.

    Decoded weights are kept only if all activations are, and only within the budget; users cannot
    request it. If weights are streamed, as many layers are made resident as are needed for
    ``hidden`` to cover the rest, if they fit; then activations are saved, and what is left goes to
    resident layers again, if ``stays``. ``checkpoint_share``: see `plan.activation_cost`.
    """

    cost: StepCost
    used: int
    beside: int
    budget: int
    graphs: bool
    device: str
    hidden: int = 0
    stays: bool = True
    checkpoint_share: float = 1.0

    def of(self, policy: ActivationPolicy) -> MemoryPlan:
        step = peak(self.cost, policy, graphs=self.graphs)
        base = self.used + self.beside
        return MemoryPlan(
            policy,
            self.cost.layers,
            self.cost.saved,
            self.budget,
            base + step.allocated,
            base + step.reserved,
            self.cost.host_bytes(policy),
            # On a CPU, between two layers: one is saved, or runs backward.
            room=self.cost.saved + step.allocated - self.cost.kept(policy),
            used=self.used,
            cost=self.cost,
        )

    def fits(self, plan: MemoryPlan) -> bool:
        margin = MARGIN if self.device == "cuda" else 1.0
        return plan.reserved_bytes <= self.budget / margin and self.host_has_room(plan)

    def host_has_room(self, plan: MemoryPlan) -> bool:
        return plan.host_bytes <= HOST_SHARE * free_memory("cpu")

    def plan(self, activations: str, *, asked: bool) -> MemoryPlan:
        # The fewest layers that need to be streamed, and can be.
        layers, streamed = self.cost.layers, 0
        if self.cost.weights:
            of_least = (min(self.choices(activations, n), key=_needed) for n in range(layers + 1))
            streamed = next((p.policy.streamed for p in of_least if self.fits(p)), layers)
            streamed = max(streamed, self.hidden)
        plans = self.choices(activations, streamed)
        fitting = list(filter(self.fits, plans))
        if fitting:
            best = max(fitting, key=_preference)
            best = self.with_resident(best) if self.stays else best
            whole = best.policy.saved == layers and not best.policy.streamed
            return self.with_decoded(best) if whole else best
        least = min(plans, key=_needed)
        if not asked:
            return least
        policy, margin = least.policy, MARGIN if self.device == "cuda" else 1.0
        how = "recomputed in backward" + " from host memory" * (policy.offloaded > 0)
        if policy.saved:
            how = "keeping its activations"
        raise ConfigError(
            f"memory_budget {self.budget / 1e9:.2f} GB is too small: with every layer {how} this "
            f"run needs about {margin * least.reserved_bytes / 1e9:.2f} GB. Raise it, or lower "
            "batch_size, gradient_accumulation_steps or max_length"
            + ", or leave activations at auto"
            * (activations != "auto")
        )

    def plan_of_parts(self, activations: str, count: int, unnoticed: int) -> MemoryPlan | None:
        """Return the plan for so many parts at a time, or fewer; None if two do not fit.

        Layers are copied once for all of them, so more of the copies are hidden. CUDA graphs are
        for one part.

        Args:
            activations: As for `plan`.
            count: The most parts.
            unnoticed: The layers that are copied in the time of one part.
        """
        for parts in range(count, 1, -1):
            hidden = min(self.cost.layers, parts * unnoticed) if self.stays else self.hidden
            cost = self.cost.of_parts(parts)
            try:
                plan = replace(self, cost=cost, graphs=False, hidden=hidden).plan(
                    activations, asked=True
                )
            except ConfigError:
                continue
            return replace(plan, parts_together=parts)
        return None

    def choices(self, activations: str, streamed: int) -> list[MemoryPlan]:
        """Return the candidate plans with so many streamed layers, without decoded weights."""

        def of(policy: ActivationPolicy) -> MemoryPlan:
            return self.of(replace(policy, streamed=streamed))

        layers, attention = self.cost.layers, self.checkpoint_share if self.cost.attention else 0.0
        saved = {"save": [layers], "auto": range(layers + 1), "recompute": [0], "offload": []}
        plans = [of(ActivationPolicy(count)) for count in saved[activations]]
        if self.device != "cuda" or activations in ("save", "recompute"):
            return plans or [of(ActivationPolicy())]
        for count in range(layers) if activations == "auto" else [0]:
            plans += [
                of(ActivationPolicy.offloading(layers, count, checkpoint_share=share))
                for share in {0.0, attention}
            ]
        # Where the host has no room for all inputs.
        return plans + [of(ActivationPolicy.offloading(layers, every=n)) for n in EVERY]

    def with_resident(self, plan: MemoryPlan) -> MemoryPlan:
        """Return the plan with as many layers resident as fit."""
        fewer = (
            self.of(replace(plan.policy, streamed=count)) for count in range(plan.policy.streamed)
        )
        return next(filter(self.fits, fewer), plan)

    def with_decoded(self, plan_of_all: MemoryPlan) -> MemoryPlan:
        """Return the plan with as many decoded layers as fit in addition to all activations."""
        layers = self.cost.layers
        counts = range(layers, 0, -1) if self.cost.decoded and self.device == "cuda" else ()
        more = (self.of(ActivationPolicy(layers, decoded=count)) for count in counts)
        return next(filter(self.fits, more), plan_of_all)


def _needed(plan: MemoryPlan) -> int:
    return plan.reserved_bytes


def _preference(plan: MemoryPlan) -> tuple[int, int, int, int]:
    policy = plan.policy
    return -policy.every, policy.saved, -policy.offloaded, policy.attention_checkpoints


class HeapTrimmer:
    """On a CPU, trims the heap before a layer that might exceed the predicted memory.

    The prediction includes some fragmentation, but over a run of many lengths it increases. Memory
    is limited to the budget, and to slightly above the prediction. Trimmed pages are faulted in
    again, which matters only far below the prediction: a step of SmolLM2 limited to nine tenths of
    the memory it would have taken took a fifth longer.
    """

    def __init__(self, plan: MemoryPlan) -> None:
        self._ceiling = min(plan.budget, int(MARGIN * plan.predicted_bytes)) - plan.room

    def __call__(self) -> None:
        """Check memory use, and trim if necessary."""
        if used_memory("cpu") > self._ceiling:
            give_back()


def keep_few_products(
    steps: Sequence[Sequence[tuple[int, int]]], documents: Sequence[Sequence[int]] = ()
) -> None:
    """Limit oneDNN's cache of compiled products, before its first use, unless the user has.

    It caches one per shape, up to 1024, and on a CPU a run with examples of many lengths fills it:
    8 steps of 8 lengths took 2.65 GB, and 2.37 with 256 entries, in the same time
    (2026-11-24_cpu_onednn_cache.json). With too few entries, a step recompiles its products.
    torch has a cache of the same size, which saves no time if oneDNN has the product: 600 kB per
    product with both, 310 with one (2026-11-24_cpu_memory.json).

    Args:
        steps: (B, T) of every micro-batch, step by step, as for `plan_memory`.
        documents: The tokens of each document, step by step, which may be packed.
    """
    parts = [
        [(shape.rows, shape.tokens) for shape in UnpaddedParts().shapes(step)] for step in documents
    ]
    kept = max(products_kept(steps), products_kept(parts, documents))
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(kept))
    os.environ.setdefault("LRU_CACHE_CAPACITY", "1")
