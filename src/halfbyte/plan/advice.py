"""LoRA or QLoRA: the ways to train a model on a GPU, their costs, and which one to use.

Each way gets the policy that keeps the most activations within the GPU's memory; it does not fit if
even recomputing every layer does not. The advice prefers what changes the model least: a 16-bit
base model, then 4 bits, then what needs other memory (offloaded inputs, weights divided among GPUs,
in host memory or on the disk, and if that is not enough the optimizer's state), then what costs
quality (a packed head).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, get_args

from halfbyte.plan.holding import Holding, nbytes_of
from halfbyte.plan.ledger import (
    MOMENTS,
    Ledger,
    OptimizerMode,
    Run,
    fitted,
    largest,
    ledger,
    policies_of,
    policy_of,
)
from halfbyte.plan.model_shape import ModelShape
from halfbyte.plan.policy import ActivationPolicy
from halfbyte.plan.roofline import GpuSpec, Seconds, step_seconds

# GPU memory not available to tensors: the CUDA context, and what torch's allocator reserves beyond
# what it allocates (0.2 GB after loading a 7B model: 2026-11-24_gpu_load.json).
CONTEXT = 0.6e9
RESERVED_SHARE = 0.02

# The optimizer with the same results whose state can wait in host memory.
_PAGED: dict[str, OptimizerMode] = {
    "adamw": "paged_adamw_32bit",
    "adamw_8bit": "paged_adamw_8bit",
}

# Times of steps that differ by less count as equal: predictions are not more accurate.
_SAME_TIME = 0.03
_LONGEST = 2**22  # tokens
MOST = 2**16  # examples


@dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        name: Its name.
        option: The options of ``halfbyte train`` that ask for it.
        run: The run, with the policy that fits; every layer recomputed if none does.
        fits: Whether it fits.
        ledger: Its memory.
        least: The memory needed with every layer recomputed.
        seconds: The time of a step by part.
        longest: Tokens of the longest single sequence that fits; None if not even one does.
        most: The largest micro-batch of the given length that fits.
        parameters: Size of the largest model of these proportions that fits, with every layer
            recomputed and the given batch.
    """

    name: str
    option: str
    run: Run
    fits: bool
    ledger: Ledger
    least: int
    seconds: Seconds
    longest: int | None
    most: int | None
    parameters: float


class Choice(NamedTuple):
    """A value of an option, and its memory.

    Attributes:
        option: The option.
        value: Its value.
        nbytes: Bytes kept for backward, or of the optimizer state, on the device.
        on_host: The same in host memory.
        peak: The peak of training.
    """

    option: str
    value: str
    nbytes: int
    on_host: int
    peak: int


def choices(shape: ModelShape, run: Run) -> list[Choice]:
    """Return the memory of each activation option and each optimizer; all else is ``run``."""
    policies = {"save": ActivationPolicy(shape.layers), "recompute": ActivationPolicy()}
    if run.device == "cuda":
        policies["offload"] = policy_of(shape, run, 0, offload=True)
    found = []
    for value, policy in policies.items():
        entries = ledger(shape, replace(run, policy=policy))
        found.append(Choice("activations", value, entries.kept, entries.waiting, entries.peak))
    for optimizer in get_args(OptimizerMode):
        entries = ledger(shape, replace(run, optimizer=optimizer))
        state = {line.group: line.nbytes for line in entries.lines if line.name.startswith(MOMENTS)}
        here, away = state.get("trained", 0), state.get("host", 0)
        found.append(Choice("optim", optimizer, here, away, entries.peak))
    return found


def usable(memory: float, device: str) -> float:
    """Return the bytes of ``memory`` available to tensors."""
    return memory * (1 - RESERVED_SHARE) - CONTEXT if device == "cuda" else memory


def ways(
    shape: ModelShape,
    run: Run,
    card: GpuSpec,
    memory: float,
    *,
    host_memory: float | None = None,
    gpus: int = 1,
) -> list[Way]:
    """Return the ways to train, side by side.

    Args:
        shape: The model.
        run: The batch of one GPU, the adapters and the optimizer; the format of 4-bit weights.
        card: The device.
        memory: Its memory in bytes.
        host_memory: Bytes of host memory that may be taken; None: as much as is needed.
        gpus: The number of GPUs, of one machine.
    """
    budget, host = usable(memory, card.device), (host_memory or float("inf")) / gpus
    qlora = replace(run, shards=gpus)
    plain = replace(run, holding=Holding("none", itemsize=run.holding.itemsize))
    quant = f"--quant {run.holding.quant}"
    given = [
        (f"{8 * run.holding.itemsize}-bit LoRA", "--quant none", plain, False),
        ("QLoRA", quant, qlora, False),
    ]
    if card.device == "cuda":
        given.append(("QLoRA + offload", f"{quant} --activations offload", qlora, True))
        if gpus > 1 and card.has_peer_access:
            sharded = replace(qlora, waits="gpus")
            given.append(("QLoRA + shard", f"{quant} --shard", sharded, True))
        on_host, on_disk = replace(qlora, waits="host"), replace(qlora, waits="disk")
        shard = " --shard" * (gpus > 1)
        given.append(("QLoRA + host", f"{quant} --weights host{shard}", on_host, True))
        if ledger(shape, on_host).on_host > host:
            given.append(("QLoRA + disk", f"{quant} --weights disk", on_disk, True))
    if shape.vocabulary_packs:
        packed = replace(
            qlora.holding,
            quantize_head=True,
            quantize_embeddings=shape.tied or qlora.holding.quantize_embeddings,
        )
        head, option = replace(qlora, holding=packed), f"{quant} --quantize-head"
        given.append(("QLoRA + 4-bit head", option, head, False))
        if card.device == "cuda":
            both = replace(head, waits="host")
            if ledger(shape, both).on_host > host:
                both = replace(head, waits="disk")
            option += f" --weights {both.waits}" + " --shard" * (gpus > 1 and both.waits == "host")
            given.append((f"QLoRA + {both.waits} + 4-bit head", option, both, True))
    found = []
    for name, option, one, offload in given:
        way = _way(name, option, shape, one, card, budget, host, offload=offload)
        found.append(way)
        paged = _PAGED.get(one.optimizer) if gpus == 1 else None  # several share it there anyway
        if not way.fits and one.waits is not None and paged is not None:
            name, option = f"{name} + paging", f"{option} --optim {paged}"
            one = replace(one, optimizer=paged)
            way = _way(name, option, shape, one, card, budget, host, offload=offload)
            found += [way] * way.fits
    return found


def _way(
    name: str,
    option: str,
    shape: ModelShape,
    run: Run,
    card: GpuSpec,
    budget: float,
    host: float,
    *,
    offload: bool,
) -> Way:
    run = replace(run, fused=run.fused and shape.fusable)
    policy = policy_of(shape, run, 0, offload=offload)
    if run.waits is not None:
        policy = replace(policy, streamed=shape.layers)
    best = fitted(shape, run, budget, offload=offload, host=host)
    chosen = best or replace(smallest_parts(run), policy=policy)
    least = replace(chosen, policy=policy)

    def fits(batch: int, length: int) -> bool:
        one = smallest_parts(replace(run, batch=batch, length=length, micro_batches=1))
        for each in policies_of(shape, run, 0, offload=offload):
            entries = ledger(shape, replace(one, policy=replace(each, streamed=policy.streamed)))
            if entries.needed <= budget and entries.on_host <= host:
                return True
        return False

    entries = ledger(shape, chosen)
    return Way(
        name=name,
        option=option,
        run=chosen,
        fits=best is not None and entries.on_host <= host,
        ledger=entries,
        least=ledger(shape, least).needed,
        seconds=step_seconds(shape, chosen, card),
        longest=largest(lambda length: fits(1, length), 1, _LONGEST),
        most=largest(lambda batch: fits(batch, run.length), 1, MOST),
        parameters=_largest_model(shape, least, budget),
    )


def longest_context(found: Sequence[Way]) -> Way | None:
    """Return the way that takes the longest sequence; of equal ones the first."""
    return max((w for w in found if w.longest), key=lambda way: way.longest or 0, default=None)


def smallest_parts(run: Run) -> Run:
    """Return the run with the smallest parts that a run falls back to."""
    smaller = run.with_smaller_parts()
    return run if smaller is None else smallest_parts(smaller)


def _largest_model(shape: ModelShape, run: Run, budget: float) -> float:
    """Return the parameters of the largest model of these proportions that fits.

    Its widths and its depth are scaled by s. So linear layers grow by s³, everything per layer and
    width (adapters, inputs, one layer's weights) by s², and rows of the vocabulary by s.
    """
    entries = ledger(shape, run)
    vocabulary = [weight for weight in shape.weights if weight.role in ("head", "embedding")]
    numel = shape.parameters - sum(weight.numel for weight in vocabulary)
    here = vocabulary
    if run.embedding_on_host and run.device == "cuda" and not shape.tied:
        roles = () if run.waits is not None else ("head",)
        here = [weight for weight in vocabulary if weight.role in roles]
    rows = sum(nbytes_of(weight, shape, run.holding) for weight in here)
    squares = entries.total("trained") + entries.decoded_cache + entries.kept
    squares += entries.weights_here  # of the layers in flight
    beside = rows + entries.needed - entries.resident - entries.decoded_cache - entries.kept
    beside -= entries.weights_here

    def fits(percent: int) -> bool:
        s = percent / 100
        cubes = entries.base - rows
        return cubes * s**3 + squares * s**2 + beside * s + entries.overhead <= budget

    s = (largest(fits, 1, 10_000) or 0) / 100
    return numel * s**3 + (shape.parameters - numel) * s


def advice(found: Sequence[Way], memory: float) -> str:
    """Return a recommendation and its reason, in a sentence or two."""
    named = {way.name: way for way in found}
    plain, qlora = found[0], named["QLoRA"]
    if plain.fits and qlora.fits:
        ratio = plain.seconds.total / qlora.seconds.total - 1
        peaks = f"{plain.ledger.needed / 1e9:.1f} of {memory / 1e9:.3g} GB"
        if ratio <= _SAME_TIME:
            slower = -ratio / (1 + ratio)
            why = (
                f"QLoRA would take {100 * slower:.0f} % longer"
                if slower > _SAME_TIME
                else "QLoRA would be no faster"
            )
            return (
                f"Take {plain.name} (--quant none): it fits, with {peaks}, its base is exact, and "
                f"{why}. QLoRA would do with {qlora.least / 1e9:.1f} GB, every layer recomputed."
            )
        return (
            f"Take QLoRA (--quant {qlora.run.holding.quant}): {plain.name} fits too, with {peaks}, "
            f"but has to run more layers again in backward, and its step takes {100 * ratio:.0f} % "
            "longer."
        )
    need = f"{plain.name} would need {plain.ledger.needed / 1e9:.1f} GB of {memory / 1e9:.3g}"
    if qlora.fits:
        return (
            f"Take QLoRA (--quant {qlora.run.holding.quant}): {need}; QLoRA needs "
            f"{qlora.ledger.needed / 1e9:.1f} GB."
        )
    for way in found[2:]:
        if way.fits:
            host = way.run.shards * way.ledger.on_host
            return (
                f"Take {way.name} ({way.option}): {need}, QLoRA alone "
                f"{qlora.ledger.needed / 1e9:.1f} GB; this one needs "
                f"{way.ledger.needed / 1e9:.1f} GB"
                + f", and {host / 1e9:.1f} GB of host memory" * (host > 1e9)
                + "."
            )
    best = min(found, key=lambda way: way.ledger.needed)
    instead = (
        f"A sequence of {best.longest:,} tokens would fit; lower batch_size, "
        "gradient_accumulation_steps or max_length."
        if best.longest
        else "Take a smaller model or a larger card."
    )
    return (
        f"Nothing fits: {need}, and the smallest way, {best.name}, "
        f"{best.ledger.needed / 1e9:.1f} GB. {instead}"
    )
