"""Loss scaling: keeps float16 gradients within range.

Float16 has eight times the precision of bfloat16, but its largest value is 65504; below 6e-5 it
gradually loses precision, and below 6e-8 everything is zero. The gradients of a single token's loss
fit: for SmolLM2-135M, on a text, they are between 1e-5 (first percentile of the residual stream)
and 45 (the largest). Divided by the tokens of a step, as those of the mean, they would not. So
backward starts with

    factor · dL     L: sum of a step's token losses; factor: a power of two, initially 2⁵

and each adapter's gradients, accumulated in float32, are divided by ``factor · tokens``. Scaling by
a power of two is exact, as long as nothing overflows (Micikevicius et al. 2018).

An overflow makes a gradient, and so the norm of all gradients, which every step reads anyway,
infinite or NaN. That update is skipped and counted, and the factor is halved; after
``GROWTH_STEPS`` updates in a row it is doubled. This only helps backward: a loss that is not finite
means activations beyond 65504, which are not scaled.

The factor decides what underflows, so checkpoints store it (`LossScale.state`): a resumed run
rounds as before.
"""

from collections.abc import Mapping
from typing import Any

import torch

from halfbyte.errors import CheckpointError, NonFiniteLossError
from halfbyte.foreign_text import quote

# The largest gradient of a token, 45, becomes 1440, a factor of 45 below the limit.
FIRST = 2.0**5
# At most, the gradient of the loss itself is still a float16. At least, a token's weight is that in
# a mean over 16384: if gradients overflow then, scaling is not the problem.
LARGEST, LEAST = 2.0**15, 2.0**-14
GROWTH_STEPS = 1000


class LossScale:
    """The factor by which the gradient of a step's summed loss is multiplied.

    Attributes:
        factor: A power of two.
        clean: Updates since it last changed.
        skipped: Number of skipped updates.
    """

    def __init__(self, factor: float = FIRST) -> None:
        self.factor = factor
        self.clean = self.skipped = 0

    @classmethod
    def wanted(cls, dtype: torch.dtype) -> "LossScale | None":
        """Return a loss scale if activations of ``dtype`` need one, or None."""
        return cls() if dtype == torch.float16 else None

    def unscale(self, tokens: float) -> float:
        """Return the factor that turns a step's gradients into those of its mean loss.

        Args:
            tokens: Supervised tokens of the step; zero counts as one.
        """
        return 1.0 / (self.factor * max(1.0, tokens))

    def updated(self) -> None:
        """Record an update."""
        self.clean += 1
        if self.clean >= GROWTH_STEPS:
            self.factor, self.clean = min(LARGEST, 2.0 * self.factor), 0

    def overflowed(self, step: int) -> str:
        """Record gradients that were not finite; return a message for the user.

        Args:
            step: The step (0-based).

        Raises:
            NonFiniteLossError: If they overflow even with the smallest factor.
        """
        self.skipped += 1
        self.clean = 0
        if self.factor <= LEAST:
            raise NonFiniteLossError(
                f"step {step + 1}: gradients are not finite in float16, even with the smallest "
                f"loss scale, {self.factor:g}. Nothing was updated. Try a lower learning_rate, "
                "or compute_dtype float32"
            )
        self.factor /= 2.0
        return (
            f"step {step + 1}: gradients overflow in float16, the update is skipped; the loss "
            f"scale is {self.factor:g} from now on ({self.skipped} updates skipped so far)"
        )

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON values."""
        return {"factor": self.factor, "clean": self.clean, "skipped": self.skipped}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned.

        Raises:
            CheckpointError: If ``state`` is invalid.
        """
        match state:
            case {"factor": float(factor), "clean": int(clean), "skipped": int(skipped)} if (
                clean >= 0 and skipped >= 0
            ):
                pass
            case _:
                raise CheckpointError(
                    f"expected a loss scale (factor, clean and skipped updates), got {quote(state)}"
                )
        if not LEAST <= factor <= LARGEST:
            raise CheckpointError(
                f"expected a loss scale from {LEAST:g} to {LARGEST:g}, got {factor!r}"
            )
        self.factor, self.clean, self.skipped = factor, clean, skipped


def too_large(step: int) -> str:
    """Return the message for a loss that is not finite, with activations in float16."""
    return (
        f"step {step + 1}: the loss is not finite: activations of this model exceed 65504, the "
        "largest float16, or training diverged. Nothing was updated. Use compute_dtype float32 "
        "(bfloat16 on a GPU from Ampere on), or a lower learning_rate"
    )
