"""The bytes that a step moves between GPUs, and between a GPU and the host.

Counted for one GPU, as it receives them:

    gradients       summed over N processes: 2 (N - 1) / N of them go through each link of a ring
    parameters      with ``shard``, likewise, after each process has updated its part
    layers          packed, in both directions of a part. The first of backward are still there from
                    forward. Of a layer divided among GPUs, 1 / N is the GPU's own
    head            if it waits on the host, for each part's loss
    inputs          offloaded ones of layers go to the host in forward and come back in backward
    state           of the optimizer, if processes share it, comes, is updated and goes back

Optimizer state that is paged moves only before steps that are short of memory, and is not counted.
"""

from typing import NamedTuple

from halfbyte.plan.ledger import GRADIENTS, MOMENTS, Run, ledger
from halfbyte.plan.model_shape import ModelShape


class Traffic(NamedTuple):
    """Bytes of a step.

    Attributes:
        between_gpus: From other GPUs to this one.
        to_gpu: From the host or the disk to this GPU.
        to_host: From this GPU to the host.
    """

    between_gpus: int
    to_gpu: int
    to_host: int


def traffic(shape: ModelShape, run: Run, gpus: int = 1) -> Traffic:
    """Predict the bytes that one GPU receives and sends in a step.

    Args:
        shape: The model.
        run: The step of one GPU.
        gpus: The number of GPUs, of one machine.
    """
    entries = ledger(shape, run)
    cost, policy = entries.cost, run.policy
    passes = -(-run.tokens // max(1, run.tokens_under_way))

    def on_host(names: tuple[str, ...]) -> int:
        here = (line for line in entries.lines if line.group == "host")
        return sum(line.nbytes for line in here if line.name.startswith(names))

    trained = sum(line.nbytes for line in entries.lines if line.name.startswith(GRADIENTS))
    others = (gpus - 1) / gpus
    between = 2 * others * trained
    layers = passes * max(0, 2 * policy.streamed - cost.slots) * cost.weights
    here = away = passes * cost.host_bytes(policy)
    heads = tuple(weight.name for weight in shape.weights if weight.role == "head")
    here += passes * on_host(heads)
    if run.waits == "gpus":
        between += others * layers
    elif run.waits is not None:
        here += layers
    if run.waits is not None and gpus > 1:  # state is shared then: optim/sharded_state.py
        state = on_host((MOMENTS,))
        here, away = here + state, away + state
        between += 2 * others * trained
    return Traffic(int(between), here, away)
