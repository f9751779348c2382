"""The ledger: every byte of a run, by name. Arithmetic on shapes; needs no torch and no weights.

The base model's bytes are those of holding.py. Adapters, gradients and moments are float32,
whatever its dtype.

    peak of training = base + adapters + gradients + optimizer + the peak of a step (policy.py)
    peak of loading  = tensors loaded so far, and the current tensor before and after packing
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from halfbyte.errors import ConfigError
from halfbyte.linear.sequence_tiles import TILE_TOKENS, is_long, launches_unnoticed
from halfbyte.plan.activation_cost import (
    CHECKPOINT_WIDTH,
    H100,
    LayerActivations,
    checkpoint_share,
)
from halfbyte.plan.holding import Holding, in_fp8
from halfbyte.plan.model_shape import ModelShape, Weight
from halfbyte.plan.policy import EVERY, SLOTS, ActivationPolicy, Peak, StepCost, peak
from halfbyte.plan.stored_base import Line, Storage, Stored, stored
from halfbyte.runtime.device import DeviceSpec

# Tokens of a part of packed documents; more do not make products faster (engine/buckets.py).
PART_TOKENS = 8192
# The same on a CPU, where all parts of a step go through a layer before the next: a part's backward
# takes memory, and of its products only the efficiency is gained.
CPU_PART_TOKENS = 2048
# If memory is short parts are halved, but not below this size: too few rows for a product.
SMALLEST_PART = 512

OptimizerMode = Literal["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"]

# Layers in page-locked host memory while weights are read from the disk: checkpoint/disk_layers.py.
DISK_RING = 4

MOMENTS = "AdamW's moments"  # how the line of the optimizer's state begins
GRADIENTS = "their gradients"  # and that of the adapters' gradients

STATE_BLOCK = 256  # elements of 8-bit optimizer state that share a scale
SMALLEST_8BIT = 4096  # tensors of fewer elements keep 32-bit state
STATE_CHUNK = 1 << 22  # elements of a parameter whose state is contiguous
_ALIGNMENT = 256  # of each tensor of the state
# Bytes of logits, and of the decoded part of a packed head, at a time: layers/cross_entropy.py.
LOGITS = {"cpu": 32 << 20, "cuda": 128 << 20}
# On a CPU the whole process counts: Python, torch and transformers. On a GPU cuBLAS has a workspace
# of 32 MiB in the stream of eager steps, or in that of graphs if they are captured.
OVERHEAD = {"cpu": 0.525e9, "cuda": 33.6e6}
# The part of it not yet touched when the base model is loaded: code of products, their stacks.
TOUCHED_LATER = 25e6
# Heap bytes per byte of kept activations: with malloc.cpp glibc's heap fragments little, 1 % if all
# micro-batches have one shape, up to 8 after 25 steps of many (2026-11-24_cpu_memory.json).
FRAGMENTATION = {"cpu": 1.04, "cuda": 1.0}
# oneDNN caches the newest compiled products; bytes of each, by the bytes of an element.
PRODUCT = {2: 0.31e6, 4: 0.62e6}
# Number of products with weights and adapters per shape of a micro-batch and, in bfloat16, per
# block of 64 queries in attention. Counted in oneDNN's log, for SmolLM2.
PRODUCTS_A_SHAPE, PRODUCTS_A_BLOCK, QUERY_BLOCK = 17, 5, 64


def smaller_part(tokens: int) -> int:
    """Return the part size to try where parts of so many tokens need too much memory.

    The next of 8192, 6144, 4096, 3072 …: multiples of the rows that products are efficient at
    (``engine.buckets.wave_tokens``).
    """
    power = 1 << ((tokens - 1).bit_length() - 1)  # the largest power of two below
    return 3 * power // 2 if 3 * power // 2 < tokens else power


@dataclass(frozen=True)
class Run:
    """A run, as far as memory and time depend on it.

    Attributes:
        holding: How the base model is stored.
        rank: The rank of the adapters.
        targets: Last parts of the names of linears with an adapter; empty for all.
        parameters: Its ``target_parameters``.
        batch: Examples per micro-batch.
        length: Tokens per example.
        micro_batches: Micro-batches per optimizer step.
        optimizer: The optimizer.
        fused: Whether layers are run by ``layers.decoder_layer``, if it supports them.
        device: ``cuda`` or ``cpu``.
        policy: What is kept for backward.
        checkpoint_width: `GpuSpec.checkpoint_width`.
        gpu: The GPU, if it is one.
        graphs: Whether CUDA graphs are enabled, on a GPU.
        embedding_on_host: Whether an embedding that is neither packed nor tied is kept in host
            memory, on a GPU; so is such a head, if weights of layers wait.
        trained: Elements of every trained tensor, if known; otherwise all adapters have one rank,
            and nothing else is trained.
        step_tokens: Tokens of an optimizer step, if micro-batches differ.
        part_size: Approximate size of packed parts, in tokens.
        largest_part: Size of the largest part in tokens, if known; see `packs`.
        shapes: The (B, T) of micro-batches, step by step; by default a single one. Of packed parts,
            if documents are packed. For a CPU.
        documents: The tokens of documents, step by step, if they are packed on a CPU.
        packs_on_cpu: Whether they are packed there, if `largest_part` is not known.
        process: Bytes of the process without the run, if known. For a CPU.
        waits: Where the frozen weights of layers wait until they are needed: in host memory, on the
            disk, or divided among GPUs; None: nowhere, all are on the device.
        shards: The number of GPUs that they are divided among.
        fp8: Whether products with packed linears are in 8 bits.
    """

    holding: Holding = field(default_factory=Holding)
    rank: int = 16
    targets: tuple[str, ...] = ()
    batch: int = 1
    length: int = 1024
    micro_batches: int = 1
    optimizer: OptimizerMode = "adamw"
    fused: bool = True
    device: str = "cuda"
    policy: ActivationPolicy = field(default_factory=ActivationPolicy)
    checkpoint_width: int = CHECKPOINT_WIDTH
    gpu: DeviceSpec = H100
    graphs: bool = True
    embedding_on_host: bool = False
    trained: tuple[int, ...] | None = None
    step_tokens: int | None = None
    part_size: int = PART_TOKENS
    largest_part: int | None = None
    shapes: tuple[tuple[tuple[int, int], ...], ...] = ()
    documents: tuple[tuple[int, ...], ...] = ()
    packs_on_cpu: bool = True
    process: int | None = None
    parameters: tuple[str, ...] = ()
    waits: Literal["host", "disk", "gpus"] | None = None
    shards: int = 1
    fp8: bool = False

    @property
    def packs(self) -> bool:
        """Whether the examples of a step are packed into parts that run one after the other."""
        on_gpu = self.device == "cuda" and self.gpu.has_flash_attention
        return self.fused and on_gpu and self.holding.itemsize == 2

    @property
    def parts(self) -> int:
        """The number of equal parts of a step, or of micro-batches if it is not packed."""
        if self.device == "cpu" and self.packs_on_cpu:
            return -(-self.batch * self.micro_batches // max(1, CPU_PART_TOKENS // self.length))
        if not self.packs:
            return self.micro_batches
        return min(self.batch * self.micro_batches, -(-self.tokens // self.part_size))

    @property
    def part_tokens(self) -> int:
        """Tokens that go through a layer together: of a micro-batch, or of a part."""
        if self.largest_part is not None:
            return self.largest_part
        if self.device == "cpu" and self.packs_on_cpu:
            rows = max(1, CPU_PART_TOKENS // self.length)
            return min(rows, self.batch * self.micro_batches) * self.length
        if not self.packs:
            return self.batch * self.length
        return -(-self.batch * self.micro_batches // self.parts) * self.length

    @property
    def multiplies_fp8(self) -> bool:
        """Whether there are products in 8 bits: only weights that are packed have any."""
        return self.fp8 and self.holding.quant != "none"

    def with_smaller_parts(self) -> "Run | None":
        """Return the run with smaller parts, or None if there are none, as ``Trainer.fit`` does."""
        if not self.packs or self.part_tokens <= 1.25 * max(self.length, SMALLEST_PART):
            return None
        smaller = replace(self, part_size=smaller_part(self.part_tokens))
        while smaller.part_tokens >= self.part_tokens:  # rows are not divided
            smaller = replace(smaller, part_size=smaller_part(smaller.part_size))
        return smaller

    @property
    def tokens_under_way(self) -> int:
        """Tokens whose activations are kept at once: of a part, or of the whole step."""
        return self.part_tokens if self.packs else self.tokens

    @property
    def tokens(self) -> int:
        """Tokens of an optimizer step."""
        return self.step_tokens or self.batch * self.length * self.micro_batches

    def adapted(self, shape: ModelShape) -> list[Weight]:
        """Return the linears with an adapter.

        Raises:
            ConfigError: If a target matches no linear.
        """
        linears = shape.linears()
        chosen = {
            target: [w for w in linears if w.name.endswith(f".{target}.weight")]
            for target in self.targets
        }
        if unknown := [target for target, found in chosen.items() if not found]:
            kinds = sorted({weight.name.split(".")[-2] for weight in linears})
            raise ConfigError(
                f"target_modules names what this model does not have: {', '.join(unknown)}; it "
                f"has: {', '.join(kinds)}"
            )
        if not self.targets:
            return [weight for weight in linears if weight.adapts]
        return [weight for weight in linears if any(weight in f for f in chosen.values())]

    def layer(self, shape: ModelShape) -> LayerActivations:
        """Return the activations of one layer."""
        adapted, layers = self.adapted(shape), max(1, shape.layers)
        fused = self.fused and shape.fusable
        on_gpu = self.device == "cuda"
        # Copies of adapters are padded to a power of two.
        filled = max(16, 1 << (self.rank - 1).bit_length())
        copied = filled * sum(sum(weight.shape) for weight in adapted) // layers
        multiplied = filled if on_gpu and self.holding.itemsize == 2 else self.rank
        ranks = multiplied * len(adapted) // layers
        return LayerActivations(
            shape,
            self.holding.itemsize,
            multiplied,
            ranks,
            copied,
            fused,
            on_gpu,
            self.gpu,
            packed=self.holding.quant != "none",
            fp8=self.multiplies_fp8,
            offloaded=self.policy.offloaded > 0 == self.policy.saved,
        )

    def step_cost(self, shape: ModelShape) -> StepCost:
        """Return the bytes of a step under any policy."""
        layer, tokens, part = self.layer(shape), self.tokens_under_way, self.part_tokens
        holes = FRAGMENTATION[self.device]
        backward = layer.backward(part)
        return StepCost(
            layers=shape.layers,
            input=int(holes * tokens * layer.input),
            part_input=part * layer.input,
            lora=0 if layer.is_tiled(part) else tokens * layer.lora,
            saved=int(holes * tokens * layer.saved) + layer.copies,
            attention=tokens * layer.attention_checkpoint,
            attention_part=part * layer.attention_checkpoint,
            forward=layer.forward(part),
            forward_saved=layer.forward_saved(part),
            backward=backward,
            saved_part=backward - layer.gradients(part),
            loss=_loss(shape, self),
            layer_args=2 * part * self.holding.itemsize * shape.query // max(1, shape.heads),
            decoded=_decoded(shape, self),
            weights=_stored(shape, self).layer_weights if self.waits else 0,
            slots=1 if self.waits == "gpus" and shape.mixture is None else SLOTS,
            tiled=layer.is_tiled(part),
        )


@dataclass(frozen=True)
class Ledger:
    """The memory of a run.

    Attributes:
        lines: Resident throughout training, by name.
        cost: The bytes of a step.
        policy: What is kept for backward.
        graphs: Whether passes over the layers are CUDA graphs.
        overhead: Bytes outside tensors.
        load_peak: Peak bytes while the base model is loaded.
    """

    lines: tuple[Line, ...]
    cost: StepCost
    policy: ActivationPolicy
    graphs: bool
    overhead: int
    load_peak: int

    def total(self, group: str) -> int:
        """Return the bytes of a group of lines."""
        return sum(line.nbytes for line in self.lines if line.group == group)

    @property
    def base(self) -> int:
        """The frozen model."""
        return self.total("base")

    @property
    def waiting(self) -> int:
        """Bytes of offloaded activations in host memory."""
        return self.cost.host_bytes(self.policy)

    @property
    def on_host(self) -> int:
        """Bytes in page-locked host memory."""
        return self.total("host") + self.waiting + DISK_RING * self.cost.weights * self.on_disk

    @property
    def on_disk(self) -> bool:
        """Whether weights of layers wait on the disk."""
        return any(line.group == "disk" for line in self.lines)

    @property
    def resident(self) -> int:
        """Bytes allocated between steps."""
        return self.base + self.total("trained") + self.overhead

    @property
    def decoded_cache(self) -> int:
        """Bytes of decoded weights: of layers that keep theirs, and a shared buffer."""
        return self.cost.buffers(self.policy)

    @property
    def weights_here(self) -> int:
        """Bytes on the device of frozen weights of layers that can wait elsewhere."""
        return self.cost.stored(self.policy)

    @property
    def kept(self) -> int:
        """Bytes that all layers keep on the device for backward."""
        return self.cost.kept(self.policy)

    @property
    def step(self) -> Peak:
        """The peak of a step, in addition to resident bytes."""
        return peak(self.cost, self.policy, graphs=self.graphs)

    @property
    def peak(self) -> int:
        """The peak of the run, in training or while loading."""
        return max(self.resident + self.step.allocated, self.load_peak + self.overhead)

    @property
    def needed(self) -> int:
        """The memory needed; more than the peak if graphs keep their memory."""
        return max(self.peak, self.resident + self.step.reserved)

    def all_lines(self) -> list[Line]:
        """Return the resident lines, and those of a step."""
        around = self.decoded_cache + self.weights_here + self.kept
        step = {
            "decoded weights": self.decoded_cache,
            "weights of layers": self.weights_here,
            "kept for backward": self.kept,
            "a layer's backward": self.step.allocated - around,
            "the loss (not at the same time)": self.cost.loss,
        }
        if not self.weights_here:
            del step["weights of layers"]
        return [*self.lines, *(Line("step", name, nbytes) for name, nbytes in step.items())]


def _stored(shape: ModelShape, run: Run) -> Stored:
    storage = Storage(run.holding, run.device, run.waits, run.shards, run.embedding_on_host)
    return stored(shape, storage)


def _state(numels: list[int], optimizer: OptimizerMode) -> int:
    """Return the bytes of AdamW's state of tensors of ``numels`` elements: optim/buckets.py."""

    def of_piece(count: int, *, coded: bool) -> int:
        moment = -(-count * (1 if coded else 4) // _ALIGNMENT)
        scales = -(-4 * -(-count // STATE_BLOCK) // _ALIGNMENT) if coded else 0
        return 2 * _ALIGNMENT * (moment + scales)

    total = 0
    for numel in numels:
        coded = optimizer.endswith("8bit") and numel >= SMALLEST_8BIT
        whole, rest = divmod(numel, STATE_CHUNK)
        total += whole * of_piece(STATE_CHUNK, coded=coded) + of_piece(rest, coded=coded)
    return total


def _trained(shape: ModelShape, run: Run) -> list[Line]:
    sides = [side for weight in run.adapted(shape) for side in weight.shape]
    adapters = [run.rank * side for side in (*sides, *shape.adapted_sides(run.parameters))]
    numels = adapters if run.trained is None else list(run.trained)
    count = sum(numels)
    name = f"{MOMENTS}, {'8' if run.optimizer.endswith('8bit') else '32'} bits"
    # Paged state is on the host whenever memory is short, which is when it matters.
    pages = run.optimizer.startswith("paged") and run.device == "cuda"
    state, shares = _state(numels, run.optimizer), run.waits is not None and run.shards > 1
    if shares:  # once in host memory for all processes (optim/sharded_state.py)
        pages, name, state = (
            run.device == "cuda",
            f"{name}, a part of {run.shards}",
            -(-state // run.shards),
        )
    return [
        Line("trained", f"adapters, {count / 1e6:.1f} M in float32", 4 * count),
        Line("trained", f"{GRADIENTS}, float32", 4 * count),
        Line("host" if pages else "trained", name, state),
    ]


def _decoded(shape: ModelShape, run: Run) -> int:
    """Return the bytes of the decoded weights of the largest layer."""
    if run.holding.quant == "none":
        return 0
    sizes: dict[int | None, int] = {}
    for weight in shape.linears():
        if weight.layer is not None and weight.packs:
            size = weight.numel * run.holding.itemsize
            if run.fp8 and in_fp8(weight):  # as it is and transposed, and the scales of rows
                size = 2 * weight.numel + 4 * weight.shape[0]
            sizes[weight.layer] = sizes.get(weight.layer, 0) + size
    return max(sizes.values(), default=0)


def _loss(shape: ModelShape, run: Run) -> int:
    """Return the bytes of a part's loss, without its input, with every position supervised."""
    e = run.holding.itemsize
    head = next((w for w in shape.weights if w.role == "head"), None)
    packed = head is not None and run.holding.packs(head, tied=shape.tied)
    packed = packed or (shape.tied and run.holding.quantize_head)
    # One kernel takes logits in the dtype of the product, and writes their gradient in their place.
    # Else they are float32, and at the highest there is a copy: what logsumexp sums. All in bytes.
    tiled = run.device == "cuda" and e == 2 and not packed
    size, copies = (e, e) if tiled else (4, 8)
    if run.device == "cpu" and e == 2 and not packed:
        copies += e  # logits as the product gave them: a hole by now, too small for another copy
    rows = min(run.part_tokens, max(16, LOGITS[run.device] // (size * shape.vocabulary)))
    chunk = copies * rows * shape.vocabulary + (LOGITS[run.device] if packed else 0)
    # A head that is in host memory is copied for the loss.
    copied = run.waits and run.embedding_on_host and run.device == "cuda" and not shape.tied
    if copied and head is not None and not packed:
        chunk += head.numel * e
    # The supervised rows, their norm and the gradient of it: of a tile, beside the whole gradient.
    if is_long(1, run.part_tokens):
        return chunk + (run.part_tokens + 4 * TILE_TOKENS) * e * shape.hidden
    return chunk + 3 * run.part_tokens * e * shape.hidden


def products_kept(
    shapes: Sequence[Sequence[tuple[int, int]]], documents: Sequence[Sequence[int]] = ()
) -> int:
    """Return how many compiled products oneDNN is to keep, 256 at least.

    32 a shape of a step; and where documents are packed, 10 a length of them, for attention.
    """
    of_shapes = max((32 * len(set(step)) for step in shapes), default=32)
    of_documents = max((10 * len(set(lengths)) for lengths in documents), default=0)
    return min(max(256, of_shapes + of_documents), 1024)


def product_bytes(
    shapes: Sequence[Sequence[tuple[int, int]]],
    itemsize: int,
    documents: Sequence[Sequence[int]] = (),
) -> int:
    """Return what oneDNN's compiled products take on a CPU, for steps of these shapes."""
    attended = {2: PRODUCTS_A_BLOCK, 4: 0}[itemsize]
    seen = {shape for step in shapes for shape in step}
    count = PRODUCTS_A_SHAPE * len(seen)
    if documents:  # full blocks are shared; the last of a document has its own shape
        lengths = {n for step in documents for n in step}
        count += attended * (-(-max(lengths) // QUERY_BLOCK) + len(lengths))
    else:
        count += sum(attended * -(-length // QUERY_BLOCK) for _, length in seen)
    return int(PRODUCT[itemsize] * min(count, products_kept(shapes, documents)))


def _overhead(shape: ModelShape, run: Run) -> int:
    if run.device != "cpu":
        return int(OVERHEAD[run.device])
    process = OVERHEAD["cpu"] if run.process is None else run.process + TOUCHED_LATER
    if run.waits == "disk":
        process += DISK_RING * _stored(shape, run).layer_weights
    shapes = run.shapes or (((run.batch, run.length),),)
    return int(process) + product_bytes(shapes, run.holding.itemsize, run.documents)


def ledger(shape: ModelShape, run: Run) -> Ledger:
    """Return what ``run`` of a model of this shape will hold."""
    run = replace(run, fused=run.fused and shape.fusable)
    return Ledger(
        lines=(*_stored(shape, run).lines, *_trained(shape, run)),
        cost=run.step_cost(shape),
        policy=run.policy,
        graphs=run.graphs
        and run.packs
        and not launches_unnoticed(1, run.part_tokens, shape.hidden),
        overhead=_overhead(shape, run),
        load_peak=_stored(shape, run).load_peak,
    )


def policy_of(shape: ModelShape, run: Run, saved: int, *, offload: bool) -> ActivationPolicy:
    """Return the policy with which ``saved`` layers are saved, and others' inputs may be offloaded.

    As many as the bus has time for take their attention along.
    """
    if not offload:
        return ActivationPolicy(saved)
    share = 0.0
    if shape.fusable:
        fp8 = run.multiplies_fp8 and shape.mixture is None  # experts stay in 16 bits
        share = checkpoint_share(shape.hidden, run.length, run.checkpoint_width, fp8=fp8)
    return ActivationPolicy.offloading(shape.layers, saved, checkpoint_share=share)


def policies_of(
    shape: ModelShape, run: Run, saved: int, *, offload: bool
) -> list[ActivationPolicy]:
    """Return `policy_of`, and then those that take less host memory, and longer."""
    policies = [policy_of(shape, run, saved, offload=offload)]
    if offload and policies[0].attention_checkpoints:
        policies.append(ActivationPolicy.offloading(shape.layers, saved))
    if offload and not saved:
        policies += [ActivationPolicy.offloading(shape.layers, every=n) for n in EVERY]
    return policies


def fitted(
    shape: ModelShape,
    run: Run,
    budget: float,
    *,
    offload: bool = False,
    host: float = float("inf"),
) -> Run | None:
    """Return ``run`` with the policy that saves most and needs at most ``budget``, or None.

    On a GPU decoded weights stay where all layers keep their activations and there is room left.
    Where not even recomputing all layers fits, packed parts are made smaller. If weights can wait
    elsewhere, those of all layers do while activations are chosen; then as many as fit do not.

    Args:
        shape: The model.
        run: Its own policy is not looked at.
        budget: Bytes.
        offload: Whether inputs of recomputed layers wait on the host.
        host: Bytes of host memory that may be taken. If they are too few, attention is recomputed,
            and then only the inputs of every n-th layer wait there.
    """

    def saving(saved: int, streamed: int = shape.layers if run.waits else 0) -> Run:
        policies = policies_of(shape, run, saved, offload=offload)
        runs = (replace(run, policy=replace(p, streamed=streamed)) for p in policies)
        first = next(runs)
        if ledger(shape, first).on_host <= host:
            return first
        return next((each for each in runs if ledger(shape, each).on_host <= host), first)

    def decoding(layers: int) -> Run:
        return replace(run, policy=ActivationPolicy(shape.layers, decoded=layers))

    def needed(run: Run) -> int:
        return ledger(shape, run).needed

    run = replace(run, fused=run.fused and shape.fusable)
    best = largest(lambda saved: needed(saving(saved)) <= budget, 0, shape.layers)
    if best is None and (smaller := run.with_smaller_parts()) is not None:
        return fitted(shape, smaller, budget, offload=offload, host=host)
    if best is not None and run.waits and run.waits != "gpus":
        layers, few = shape.layers, best
        resident = largest(lambda n: needed(saving(few, layers - n)) <= budget, 0, layers)
        return saving(few, layers - (resident or 0))
    if best == shape.layers and run.device == "cuda" and run.holding.quant != "none":
        kept = largest(lambda n: needed(decoding(n)) <= budget, 1, shape.layers)
        return decoding(kept or 0)
    return None if best is None else saving(best)


def largest(fits: Callable[[int], bool], low: int, high: int) -> int | None:
    """Return the largest number that fits, or None; what is smaller than one that does must too."""
    if not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
