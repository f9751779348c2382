"""Memory on a plan: how much there is, and how many layers may keep their activations.

Keeping what a layer's backward needs costs memory; running the layer again costs time (a third of
the matrix products of a step). The choice is made layer by layer, from measured bytes: one layer
is run once on the largest micro-batch and what autograd keeps is counted. On a GPU the largest
step is measured part by part (train/footprint.py), and what layers are run again from may wait in
host memory. Where all layers keep their activations there and memory is left, layers keep their
decoded weights as well, from step to step. A byte of these buys less: of a 7B model on an H100 a
gigabyte saves 0.9 ms a step, one of activations 4 (gpu_step_final.json: 2 % of 535 ms for 12.5 GB;
gpu_step_notes.json and gpu_step_forms.json: 541 and 430 ms with 6 and 33.8 GB).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from halfbyte.errors import ConfigError
from halfbyte.lora import trained_whole
from halfbyte.model.loss import CHUNK_BYTES
from halfbyte.nf4 import QuantizedWeight
from halfbyte.plan.activations import NEAR_LAYERS, Dial
from halfbyte.plan.ledger import HOLES, TOUCHED_LATER, product_bytes, products_kept
from halfbyte.train.engine import Batch, LayerEngine, PlainEngine
from halfbyte.train.footprint import Footprint, footprint
from halfbyte.train.heap import give_back

# Without a budget, this part of the memory that is free when training starts may be used.
FREE_SHARE = 0.8

# A budget is never exceeded, and predictions on a GPU were up to 2 % low (gpu_step_offload.json).
MARGIN = 1.03

# So much of the host's free memory may hold what layers are run again from, page-locked.
HOST_SHARE = 0.5


@dataclass(frozen=True)
class ActivationPlan:
    """How many layers keep their activations.

    Attributes:
        saved_layers: Layers, counted from the last, that keep what backward needs.
        layers: All layers.
        saved_bytes: What one layer keeps over a whole step when it saves.
        budget: Bytes the process (on a GPU: the device) may use.
        predicted_bytes: Estimated peak under this plan.
        offloaded_layers: Layers, counted from the first, whose input waits in host memory.
        notes: Whether these leave notes there, too.
        host_bytes: What all that takes.
        decoded_layers: Layers, counted from the last, whose decoded weights stay.
        room: On a CPU, the most that is taken between two layers.
    """

    saved_layers: int
    layers: int
    saved_bytes: int
    budget: int
    predicted_bytes: int
    offloaded_layers: int = 0
    notes: bool = False
    host_bytes: int = 0
    decoded_layers: int = 0
    room: int = 0

    @property
    def dial(self) -> Dial:
        """What it chose, as `halfbyte plan` does."""
        return Dial(self.saved_layers, self.offloaded_layers, self.notes, self.decoded_layers)

    def line(self) -> str:
        """Return what a person is told."""
        if not self.layers:
            return "what is kept for backward is up to transformers' checkpointing"
        again = self.layers - self.saved_layers
        how = f"{self.saved_layers} of {self.layers} layers keep their activations"
        if again:
            how += f", {again} are run again in backward"
        if self.offloaded_layers:
            how += f", {self.offloaded_layers} of them from host memory"
            how += " and without attention" * self.notes
        if self.decoded_layers:
            how += f", {self.decoded_layers} their decoded weights"
        return (
            f"{how} ({self.saved_bytes / 1e6:.0f} MB a layer); "
            f"about {self.predicted_bytes / 1e9:.2f} GB of {self.budget / 1e9:.2f} GB"
        )


def used_memory(device: str) -> int:
    """Return the bytes in use now: resident memory of the process, or allocated on the GPU."""
    if device == "cuda":
        return int(torch.cuda.memory_allocated())
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_memory(device: str) -> int:
    """Return the highest number of bytes that were in use at once."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    # Not getrusage's ru_maxrss, which a process inherits from the one that started it.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status does not say VmHWM; halfbyte needs Linux")


def free_memory(device: str) -> int:
    """Return the bytes that could still be taken."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def plan_activations(
    engine: LayerEngine | PlainEngine,
    shapes: Sequence[Sequence[tuple[int, int]]],
    activations: str,
    memory_budget: int | None,
    device: str,
    *,
    largest: Sequence[Batch] = (),
    state_bytes: int | None = None,
) -> ActivationPlan:
    """Choose how many layers keep their activations.

    Args:
        engine: What will run the steps, gradients and optimizer state not yet touched.
        shapes: For each optimizer step of the run, the (B, T) of its micro-batches.
        activations: ``save``, ``recompute``, ``offload``, or ``auto`` for what fits.
        memory_budget: Bytes in all, or None for most of what is free.
        device: ``cpu`` or ``cuda``.
        largest: The micro-batches of the largest step, for a GPU.
        state_bytes: What the optimizer's state will take on the device; AdamW's two moments in
            float32, if not given.

    Raises:
        ConfigError: If the budget is too small even when every layer is run again; says the least
            that would do.
    """
    if device == "cpu":
        give_back()  # what loading has left
    used = used_memory(device)
    budget = memory_budget or int(used + FREE_SHARE * free_memory(device))
    if isinstance(engine, PlainEngine):
        return ActivationPlan(0, 0, 0, budget, used)
    if state_bytes is None:
        state_bytes = 2 * sum(p.nbytes for p in engine.model.parameters() if p.requires_grad)
    if device == "cuda" and largest:
        measured = footprint(engine, largest)
        # Measuring left the buffers of the decoded weights behind.
        return _turned(measured, activations, memory_budget, budget, state_bytes)
    layers = len(engine.layers)
    widest = max((shape for step in shapes for shape in step), key=lambda s: s[0] * s[1])
    tokens_per_step = max(sum(b * t for b, t in step) for step in shapes)
    tokens = widest[0] * widest[1]
    ids = torch.zeros(widest, dtype=torch.int64, device=device)
    saved, kept = engine.saved_bytes(Batch(ids, torch.full_like(ids, -100)))
    share = HOLES[device] * tokens_per_step / tokens
    step_saved, step_kept = int(saved * share), int(kept * share)
    # A gradient is new before it is added: the widest of those trained whole, in two copies.
    whole = [p.nbytes for m in engine.model.modules() for p in trained_whole(m).values()]
    # Beside what is kept, one layer of the widest micro-batch alive in backward, and its gradients;
    # or the loss: two copies of a chunk of logits, what goes into them, its gradient.
    head = engine.head_weight
    vocabulary, packed = head.shape[0], isinstance(head, QuantizedWeight)
    rows = min(tokens, max(16, CHUNK_BYTES[device] // (4 * vocabulary)))
    copies = 2 * 4 + (2 if engine.dtype.itemsize == 2 and not packed else 0)  # plan/ledger.py
    chunks = copies * rows * vocabulary + packed * CHUNK_BYTES[device]
    loss = chunks + 2 * (tokens_per_step + tokens) * kept // tokens
    workspace = max(2 * saved, loss) + 2 * max(whole, default=0)
    if device == "cpu":
        used += int(TOUCHED_LATER) + product_bytes(shapes, engine.dtype.itemsize)
    # Adapters' moments (the gradients are there already) and every layer's input.
    floor = used + state_bytes + layers * step_kept + workspace
    extra = max(1, step_saved - step_kept)
    fitting = max(0, min(layers, (budget - floor) // extra))
    if activations == "auto" and floor > budget and memory_budget is not None:
        raise ConfigError(
            f"memory_budget {budget / 1e9:.2f} GB is too small: with every layer run again in "
            f"backward this run needs about {floor / 1e9:.2f} GB. Raise it, or lower batch_size, "
            "gradient_accumulation_steps or max_length"
        )
    chosen = {"save": layers, "recompute": 0, "offload": 0}.get(activations, fitting)
    peak, room = floor + chosen * extra, step_saved + workspace
    return ActivationPlan(chosen, layers, step_saved, budget, peak, room=room)


def _turned(
    measured: Footprint, activations: str, memory_budget: int | None, budget: int, state_bytes: int
) -> ActivationPlan:
    """Turn the dial on a GPU: as many layers keep as fit, others from the host where that helps.

    Decoded weights stay where all activations do, and only within the budget: they are never asked
    for.
    """
    layers, roomy = measured.layers, HOST_SHARE * free_memory("cpu")

    def plan(saved: int, away: bool, noted: bool, decoded: int = 0) -> ActivationPlan:
        offloaded = max(0, layers - saved - NEAR_LAYERS) if away else 0
        noted = noted and offloaded > 0
        peak = measured.peak(saved, offloaded, notes=noted, decoded_layers=decoded) + state_bytes
        host = offloaded * (measured.kept + measured.noted * noted)
        return ActivationPlan(
            saved, layers, measured.saved, budget, peak, offloaded, noted, host, decoded
        )

    def fits(plan: ActivationPlan) -> bool:
        return plan.predicted_bytes <= budget / MARGIN and plan.host_bytes <= roomy

    def keeping(plan_of_all: ActivationPlan) -> ActivationPlan:
        """Return the plan with as many decoded layers as fit beside all activations."""
        counts = range(layers, 0, -1) if measured.decoded else ()
        more = (plan(layers, False, False, count) for count in counts)
        return next(filter(fits, more), plan_of_all)

    ways = [(False, False), (True, False), (True, True)][: 3 if measured.noted else 2]
    if activations == "save":
        return keeping(plan(layers, False, False))
    if activations == "recompute":
        return plan(0, False, False)
    if activations == "offload":
        noted = plan(0, *ways[-1])
        return noted if noted.host_bytes <= roomy else plan(0, True, False)
    all_plans = [plan(saved, *way) for way in ways for saved in range(layers + 1)]
    fitting = list(filter(fits, all_plans))
    if not fitting:
        least = min(all_plans, key=lambda p: p.predicted_bytes)
        if memory_budget is None:
            return least
        raise ConfigError(
            f"memory_budget {budget / 1e9:.2f} GB is too small: with every layer run again from "
            f"host memory this run needs {MARGIN * least.predicted_bytes / 1e9:.2f} GB. Raise it, "
            "or lower batch_size, gradient_accumulation_steps or max_length"
        )
    best = max(fitting, key=lambda p: (p.saved_layers, -p.offloaded_layers, p.notes))
    return keeping(best) if best.saved_layers == layers else best


class Ceiling:
    """Gives the heap's holes back before a layer that might pass what was promised; on a CPU.

    What is predicted counts some holes, and a run of many lengths makes more of them the longer it
    lasts. It is held to the prediction and a little, and to the budget. Pages that were given back
    are faulted in anew, which shows only far below: a step of SmolLM2 that was held to nine tenths
    of what it would have taken took a fifth longer.
    """

    def __init__(self, plan: ActivationPlan) -> None:
        self._ceiling = min(plan.budget, int(MARGIN * plan.predicted_bytes)) - plan.room

    def __call__(self) -> None:
        """Look, and give back if need be."""
        if used_memory("cpu") > self._ceiling:
            give_back()


def keep_few_products(steps: Sequence[Sequence[tuple[int, int]]]) -> None:
    """Tell oneDNN how many compiled products to keep; before its first, and unless a user has.

    It keeps one for each shape it has met, 1024 of them, and on a CPU a run of examples of many
    lengths fills that: 8 steps of 8 lengths took 2.65 GB so, 2.37 with 256, in the same time
    (2026-11-24_cpu_onednn_cache.json). With too few, a step compiles its own again and again.
    torch keeps as many once more for itself, which saves no time where oneDNN has them: 600 kB a
    product with both, 310 with one (2026-11-24_cpu_memory.json).

    Args:
        steps: (B, T) of every micro-batch, step by step, as for `plan_activations`.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(products_kept(steps)))
    os.environ.setdefault("LRU_CACHE_CAPACITY", "1")
