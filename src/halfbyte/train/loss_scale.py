"""Loss scaling: gradients in float16 are multiplied so that its range holds them.

Float16 has eight times the precision of bfloat16 and ends at 65504; below 6e-5 it loses its digits
one by one, below 6e-8 there is nothing. What comes of one token's loss fits in between: of
SmolLM2-135M its gradients lie, on text of ours, between 1e-5 (a hundredth of the stream's) and 45
(the largest of all). Divided by the tokens of a step, as their mean is, they would not. So backward
begins with

    factor · dL     L: the sum of a step's token losses; factor: a power of two, 2⁵ at first

and what is summed up in float32, for each adapter, is divided by ``factor · tokens``. That a power
of two multiplies changes no digit, as long as nothing overflows (Micikevicius et al. 2018).

Where something does, it is infinite or no number, and so is the norm of all gradients, which a step
looks at in any case. That update is left out and counted, and the factor halved; after
``GROWTH_STEPS`` updates in a row it is doubled. Only backward can be helped so: a loss that is not
finite is one of activations beyond 65504, and no factor is in those.

The factor decides what underflows, so a checkpoint holds it (`LossScale.state`): a run that goes on
rounds as it did before.
"""

from collections.abc import Mapping
from typing import Any

import torch

from halfbyte.errors import CheckpointError, NonFiniteLossError

# The largest gradient of a token, 45, is 1440 then: 45 times that is still held.
FIRST = 2.0**5
# Of the largest, the gradient of the loss is a float16 itself. With the least a token counts as
# little as in the mean of 16384: what overflows then is no matter of scale.
LARGEST, LEAST = 2.0**15, 2.0**-14
GROWTH_STEPS = 1000


class LossScale:
    """By what the gradient of a step's summed loss is multiplied.

    Attributes:
        factor: A power of two.
        clean: Updates since it was last changed.
        skipped: Updates left out, in all.
    """

    def __init__(self, factor: float = FIRST) -> None:
        self.factor = factor
        self.clean = self.skipped = 0

    @classmethod
    def wanted(cls, dtype: torch.dtype) -> "LossScale | None":
        """Return one for activations of ``dtype``, or None where they need none."""
        return cls() if dtype == torch.float16 else None

    def unscale(self, tokens: float) -> float:
        """Return what makes of the gradients of a step those of its mean loss.

        Args:
            tokens: Supervised tokens of the step; none at all count as one.
        """
        return 1.0 / (self.factor * max(1.0, tokens))

    def updated(self) -> None:
        """Take note of an update."""
        self.clean += 1
        if self.clean >= GROWTH_STEPS:
            self.factor, self.clean = min(LARGEST, 2.0 * self.factor), 0

    def overflowed(self, step: int) -> str:
        """Take note of gradients that were not finite; return the message for a person.

        Args:
            step: Of the run, counted from 0.

        Raises:
            NonFiniteLossError: If they overflow with the least factor, too.
        """
        self.skipped += 1
        self.clean = 0
        if self.factor <= LEAST:
            raise NonFiniteLossError(
                f"step {step + 1}: gradients are not finite in float16, though the loss was scaled "
                f"by as little as {self.factor:g}. Nothing was updated. Try a lower learning_rate, "
                "or compute_dtype float32"
            )
        self.factor /= 2.0
        return (
            f"step {step + 1}: gradients overflow in float16, so there is no update; the loss is "
            f"scaled by {self.factor:g} from here on ({self.skipped} updates left out so far)"
        )

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold: JSON values."""
        return {"factor": self.factor, "clean": self.clean, "skipped": self.skipped}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned.

        Raises:
            CheckpointError: If it is not that.
        """
        match state:
            case {"factor": float(factor), "clean": int(clean), "skipped": int(skipped)}:
                pass
            case _:
                raise CheckpointError(
                    f"a loss scale is a factor, clean and skipped updates; this is {dict(state)!r}"
                )
        if not LEAST <= factor <= LARGEST:
            raise CheckpointError(
                f"a loss is scaled by {LEAST:g} to {LARGEST:g}, not by {factor!r}"
            )
        self.factor, self.clean, self.skipped = factor, clean, skipped


def too_large(step: int) -> str:
    """Return the message about a loss that is not finite, with activations in float16."""
    return (
        f"step {step + 1}: the loss is not finite: activations of this model are beyond the 65504 "
        "that float16 holds, or training diverged. Nothing was updated. Use compute_dtype float32 "
        "(bfloat16 on a GPU from Ampere on), or a lower learning_rate"
    )
