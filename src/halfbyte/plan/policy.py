"""The activation policy of each layer, and the peak memory that follows from it.

Every layer is treated in one of three ways between forward and backward:

    saved        keeps all activations its backward needs
    recomputed   keeps its input, and is recomputed in backward
    offloaded    recomputed, with its input in host memory until backward needs it

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

from dataclasses import dataclass
from typing import NamedTuple

# Of the recomputed layers, so many before the first saved one stay on the device: backward asks for
# them first. Of the others', so many inputs are there at a time, sent or fetched.
NEAR_LAYERS = 1
UNDER_WAY = 1


@dataclass(frozen=True)
class ActivationPolicy:
    """What is done with a layer's activations, for all layers of a model.

    Attributes:
        saved: Layers, counted from the last, that keep what backward needs.
        offloaded: Layers, counted from the first, whose input waits in host memory.
        attention_checkpoint: Whether these keep attention's output and the stream after it there,
            too, so that neither is computed again.
        decoded: Layers, counted from the last, whose 4-bit weights stay decoded between steps.
    """

    saved: int = 0
    offloaded: int = 0
    attention_checkpoint: bool = False
    decoded: int = 0

    @classmethod
    def offloading(
        cls, layers: int, saved: int = 0, *, attention_checkpoint: bool = False
    ) -> "ActivationPolicy":
        """Return the policy with ``saved`` layers, others offloaded but for those near them."""
        away = max(0, layers - saved - NEAR_LAYERS)
        return cls(saved, away, attention_checkpoint and away > 0)

    def summary(self, layers: int) -> str:
        """Return it in a few words, for tables."""
        if self.saved == layers:
            return "all saved" + f", {self.decoded} decoded" * (self.decoded > 0)
        if self.offloaded:
            return f"{self.saved} saved, offload" if self.saved else "offload"
        return f"{self.saved} of {layers} saved" if self.saved else "all recomputed"


@dataclass(frozen=True)
class StepCost:
    """Bytes of what goes through the layers together, and of the loss.

    That is one part of a step where examples are packed into parts, and all micro-batches of a step
    where they are not. Each of these is of one layer.

    Attributes:
        layers: Layers of the model.
        input: A layer's input, of all parts together.
        part_input: The same of the largest part.
        lora: What a recomputed layer keeps beside it on the device: x Aᵀ of its linears.
        saved: What a saved layer keeps, its input included.
        attention: What ``attention_checkpoint`` adds to an offloaded input.
        attention_part: The same of the largest part.
        forward: What the forward of a recomputed layer has beside its input and output when it has
            most, of a part.
        forward_saved: What that of a saved layer has beside what it keeps, of a part.
        backward: What the backward of a recomputed layer has when it has most, of a part: its
            activations and its gradients, without its input, output and ``lora``.
        saved_part: What of ``backward`` a saved layer has kept.
        loss: What a part's loss has beside its input when it has most.
        layer_args: What layers are called with besides their input: rotary tables, sequence starts.
        decoded: A layer's decoded weights; 0 where none are packed.
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

    def buffers(self, policy: ActivationPolicy) -> int:
        """Return what decoded weights take: one shared buffer, unless all layers have their own."""
        return (policy.decoded + (policy.decoded < self.layers)) * self.decoded

    def waiting(self, policy: ActivationPolicy) -> int:
        """Return what recomputed layers keep on the device between forward and backward."""
        recomputed = self.layers - policy.saved
        near = recomputed - policy.offloaded + min(policy.offloaded, UNDER_WAY)
        return near * self.input + recomputed * self.lora

    def kept(self, policy: ActivationPolicy) -> int:
        """Return what all layers keep on the device between forward and backward."""
        return self.waiting(policy) + policy.saved * self.saved

    def host_bytes(self, policy: ActivationPolicy) -> int:
        """Return what waits in page-locked host memory."""
        return policy.offloaded * (self.input + self.attention * policy.attention_checkpoint)


class Peak(NamedTuple):
    """The most bytes of a step, beside what is resident.

    Attributes:
        allocated: In tensors at once, as ``torch.cuda.max_memory_allocated`` counts.
        reserved: That there must be room for. More where CUDA graphs keep the memory of the layers
            while the loss is computed.
    """

    allocated: int
    reserved: int


def peak(cost: StepCost, policy: ActivationPolicy, *, graphs: bool) -> Peak:
    """Return the peak of a step under a policy.

    Args:
        cost: What a step has.
        policy: What is kept.
        graphs: Whether the passes over the layers are CUDA graphs.
    """
    stream, waiting, kept = cost.input, cost.waiting(policy), cost.kept(policy)
    recomputed = cost.layers - policy.saved
    checkpoint = cost.attention * policy.attention_checkpoint
    # What enters layer 0 is there as long as the pass, whether layer 0 keeps it or the host does.
    entry = stream if policy.offloaded else 0
    # Graphs have a place for the last output, beside it.
    own = stream if graphs else 0
    leaving = min(policy.offloaded, UNDER_WAY)  # has left before the first saved layer
    if policy.saved:
        passes = [kept - leaving * stream + entry + own + cost.forward_saved + stream]
    else:
        passes = [kept + entry + own + cost.forward + stream + leaving * checkpoint]
    if policy.saved:
        passes.append(kept + entry + stream + cost.backward - cost.saved_part)
    if recomputed:
        # The last output's place is no gradient's any more, once one has come through a layer.
        last = stream if graphs and (policy.saved or policy.offloaded) else 0
        beside = policy.attention_checkpoint * (
            (1 + UNDER_WAY) * cost.attention - cost.attention_part
        )
        passes.append(waiting + entry + last + stream + cost.backward + beside)
    # Each part's last output, and the gradients of those before the one under way.
    loss = 2 * stream - cost.part_input + cost.loss
    buffers = cost.buffers(policy)
    if not graphs:
        both = buffers + max(*passes, kept + loss)
        return Peak(both, both)
    captured = max(passes) + cost.layer_args
    # The loss, while graphs hold no tensor but their first input and their last output.
    alone = cost.input + cost.layer_args + loss
    return Peak(buffers + max(captured, alone), buffers + captured + cost.loss)
