"""The activation policy of each layer, and the peak memory that follows from it.

Every layer is treated in one of three ways between forward and backward:

    saved        keeps all activations its backward needs
    recomputed   keeps its input, and is recomputed in backward
    offloaded    recomputed, with its input in host memory until backward needs it

Apart from that, the frozen weights of a layer are on the device, or *streamed*: they wait elsewhere
and are copied to one of a few slots when needed (linear/layer_stream.py).

`ActivationPolicy` says which layers are which. `StepCost` has the bytes of a step under each,
calculated from shapes (``plan.ledger``) or measured on the device (``engine.memory_profile``), and
`peak` adds them up. Nothing else does, so the forecast of ``halfbyte plan``, the choice made by a
run and its fallbacks on out of memory agree.

The candidates for the peak, with s the bytes of the residual stream (a layer's input):

    forward    what layers keep, and the temporary tensors of the last layer
    loss       the last output, and the peak of the loss
    backward   of the last saved layer: what layers keep, s for the gradient, the layer's gradients;
               of the last recomputed one: the same without what saved layers kept, with its own
               activations instead

CUDA graphs read their input from a tensor of their own and write their output to another, whose
memory is reused for the output's gradient. They keep their memory between steps, so the loss needs
additional memory; in eager steps it does not.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

# Number of recomputed layers before the first saved one that are not offloaded, since backward
# needs them first; and number of offloaded inputs on the device at a time, sent or fetched; but see
# `ActivationPolicy.leaving`.
NEAR_LAYERS = 1
UNDER_WAY = 1
# Of every how many layers the input is kept, where the host has no room for those of all: each is
# computed again once, whatever the number.
EVERY = (2, 3, 4, 6, 8)
# Streamed layers that are on the device at a time, usually; see linear/layer_stream.py.
SLOTS = 2


@dataclass(frozen=True)
class ActivationPolicy:
    """How the activations of each layer of a model are treated.

    Attributes:
        saved: Number of layers, counted from the last, that keep all their activations.
        offloaded: Number of layers, counted from the first, whose input is in host memory.
        attention_checkpoints: Number of these, evenly spread, that also store attention's output
            and the residual stream after it on the host, so that neither is recomputed.
        decoded: Number of layers, counted from the last, whose 4-bit weights stay decoded.
        streamed: Number of layers whose frozen weights are copied to the device when needed.
        every: Only the input of every n-th layer is kept: of the offloaded layers, if there are
            any, otherwise of the recomputed ones. The others are computed again from it, so forward
            runs once more in backward. Not with ``attention_checkpoints``.
    """

    saved: int = 0
    offloaded: int = 0
    attention_checkpoints: int = 0
    decoded: int = 0
    streamed: int = 0
    every: int = 1

    @classmethod
    def offloading(
        cls, layers: int, saved: int = 0, *, checkpoint_share: float = 0.0, every: int = 1
    ) -> "ActivationPolicy":
        """Return the policy with ``saved`` layers and the others offloaded, except the nearest.

        ``checkpoint_share`` is that of the offloaded ones which store an attention checkpoint.
        """
        away = max(0, layers - saved - NEAR_LAYERS)
        return cls(saved, away, int(checkpoint_share * away), every=every)

    def checkpoints(self, layer: int) -> bool:
        """Return whether a layer stores an attention checkpoint."""
        some, of = self.attention_checkpoints, self.offloaded
        return layer < of and (layer + 1) * some // of > layer * some // of

    @property
    def leaving(self) -> int:
        """Number of layers that are on their way to the host at a time.

        Where checkpoints are too much for the bus, it needs those without one to catch up.
        """
        some = 0 < self.attention_checkpoints < self.offloaded
        return min(self.offloaded, UNDER_WAY + some)

    def summary(self, layers: int) -> str:
        """Return a short description, for tables."""
        streamed = f", {self.streamed} streamed" * (self.streamed > 0)
        if self.saved == layers:
            return "all saved" + f", {self.decoded} decoded" * (self.decoded > 0) + streamed
        streamed += f", every {self.every}th input" * (self.every > 1)
        if self.offloaded:
            return (f"{self.saved} saved, offload" if self.saved else "offload") + streamed
        return (f"{self.saved} of {layers} saved" if self.saved else "all recomputed") + streamed


@dataclass(frozen=True)
class StepCost:
    """Bytes of one layer, for the tokens that go through the layers together, and of the loss.

    These tokens are one part of a step if examples are packed into parts, otherwise all
    micro-batches of a step.

    Attributes:
        layers: Number of layers of the model.
        input: A layer's input, of all parts together.
        part_input: The same of the largest part.
        lora: What a recomputed layer keeps with it on the device: x Aᵀ of its linears.
        saved: What a saved layer keeps, including its input.
        attention: An attention checkpoint.
        attention_part: The same of the largest part.
        forward: Peak of a recomputed layer's forward, for a part, without its input and output.
        forward_saved: Peak of a saved layer's forward, for a part, without what it keeps.
        backward: Peak of a recomputed layer's backward, for a part: its activations and gradients,
            without its input, output and ``lora``.
        saved_part: How much less a saved layer's backward has at its peak beside what it kept:
            usually what that is of ``backward``. Negative if recomputed layers are computed by
            tiles (layers/tiled_layer.py), which saved ones are not.
        loss: Peak of a part's loss, without its input.
        layer_args: Arguments of layers other than the input: rotary tables, sequence starts.
        decoded: A layer's decoded weights; 0 if none are packed.
        weights: A layer's frozen weights as they are stored, if layers can be streamed; 0 if they
            cannot, and the weights count as resident.
        slots: Streamed layers that are on the device at a time.
        tiled: Whether recomputed layers are computed by tiles (layers/tiled_layer.py). Their
            backward writes the gradient of a layer's input over that of its output, and what
            entered layer 0 is freed before backward.
    """

    layers: int
    input: int
    part_input: int
    lora: int
    saved: int
    attention: int
    attention_part: int
    forward: int
    forward_saved: int
    backward: int
    saved_part: int
    loss: int
    layer_args: int
    decoded: int
    weights: int = 0
    slots: int = SLOTS
    tiled: bool = False

    def of_parts(self, count: int) -> "StepCost":
        """Return the costs if so many parts, instead of one, go through the layers together."""
        together = ("input", "lora", "saved", "attention")
        return replace(self, **{name: count * getattr(self, name) for name in together})

    def buffers(self, policy: ActivationPolicy) -> int:
        """Return the bytes of decoded weights: of layers that keep theirs, and a shared buffer."""
        return (policy.decoded + (policy.decoded < self.layers)) * self.decoded

    def stored(self, policy: ActivationPolicy) -> int:
        """Return the bytes of frozen weights on the device, if layers can be streamed."""
        return (self.layers - policy.streamed + min(self.slots, policy.streamed)) * self.weights

    def waiting(self, policy: ActivationPolicy) -> int:
        """Return the bytes recomputed layers keep on the device between forward and backward."""
        recomputed, n = self.layers - policy.saved, policy.every
        sparse = policy.offloaded or recomputed
        # Backward has the inputs of n layers at a time, of the last ones fewer if n does not divide
        # their number. When it comes to the offloaded ones, the others are gone.
        if policy.offloaded:
            inputs = max(recomputed - sparse + UNDER_WAY, min(n, sparse))
        else:
            kept = -(-sparse // n)
            of_last = (sparse - 1) % n if sparse else 0
            inputs = max(kept + of_last, kept - 1 + (n - 1) * (kept > 1))
        return inputs * self.input + (recomputed if n == 1 else 0) * self.lora

    def kept(self, policy: ActivationPolicy) -> int:
        """Return the bytes all layers keep on the device between forward and backward."""
        return self.waiting(policy) + policy.saved * self.saved

    def host_bytes(self, policy: ActivationPolicy) -> int:
        """Return the bytes in page-locked host memory."""
        away = -(-policy.offloaded // policy.every)
        return away * self.input + policy.attention_checkpoints * self.attention


class Peak(NamedTuple):
    """The peak bytes of a step, in addition to what is resident.

    Attributes:
        allocated: In tensors, as counted by ``torch.cuda.max_memory_allocated``.
        reserved: The memory needed. More than allocated if CUDA graphs keep the memory of the
            layers while the loss is computed.
    """

    allocated: int
    reserved: int


def peak(cost: StepCost, policy: ActivationPolicy, *, graphs: bool) -> Peak:
    """Return the peak of a step under a policy.

    Args:
        cost: The bytes of a step.
        policy: The activation policy.
        graphs: Whether the passes over the layers are CUDA graphs.
    """
    stream, waiting, kept = cost.input, cost.waiting(policy), cost.kept(policy)
    recomputed = cost.layers - policy.saved
    checkpointed = policy.attention_checkpoints > 0
    # Layer 0's input exists during the whole pass, whether or not it is kept; that of a long part
    # only during forward, without graphs.
    entry = stream if policy.offloaded else 0
    entry_later = 0 if cost.tiled and not graphs else entry
    # Graphs have a separate tensor for the last output.
    own = stream if graphs else 0
    # `waiting` counts one input that leaves. All have left before the first saved layer.
    one = min(policy.offloaded, UNDER_WAY)
    leaving = policy.leaving * checkpointed * cost.attention + (policy.leaving - one) * stream
    passes = []
    if policy.saved:
        passes = [kept - one * stream + entry + own + cost.forward_saved + stream]
    if not policy.saved or policy.leaving > one:
        passes.append(waiting + entry + own + cost.forward + stream + leaving)
    if policy.saved:
        passes.append(kept + entry_later + stream + cost.backward - cost.saved_part)
    if recomputed:
        # After the first layer's backward the tensor of the last output no longer has a gradient.
        last = stream if graphs and (policy.saved or policy.offloaded) else 0
        if cost.tiled and not policy.saved:
            last = 0
        beside = checkpointed * ((1 + UNDER_WAY) * cost.attention - cost.attention_part)
        passes.append(waiting + entry_later + last + stream + cost.backward + beside)
    # Each part's last output, and the gradients of the parts before the current one.
    loss = 2 * stream - cost.part_input + cost.loss
    buffers = cost.buffers(policy) + cost.stored(policy)
    if not graphs:
        both = buffers + max(*passes, kept + loss) + cost.layer_args * cost.tiled
        return Peak(both, both)
    captured = max(passes) + cost.layer_args
    # During the loss, graphs have no live tensors but their first input and last output.
    alone = cost.input + cost.layer_args + loss
    return Peak(buffers + max(captured, alone), buffers + captured + cost.loss)
