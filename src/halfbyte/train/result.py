"""What a run hands back."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    Attributes:
        adapter_dir: Directory of the adapter.
        steps: Optimizer steps of the run, including those before a resume.
        final_loss: Loss of the last step; NaN if this call made none.
        peak_memory_bytes: Peak of the process (on a GPU: of allocations in training).
        seconds: Time spent in steps, by this call.
        tokens_per_second: Tokens, without padding, divided by that time.
        skipped_steps: Steps left out, because their loss or a gradient was not finite; without
            those that only overflowed in float16.
        adapter_step: The step after which the adapter was as it is written: the last one, or with
            ``load_best`` the best.
        ended: Why the run ended before its last step, if it did.
        hub_url: Where the adapter was uploaded to, if it was.
    """

    adapter_dir: Path
    steps: int
    final_loss: float
    peak_memory_bytes: int
    seconds: float
    tokens_per_second: float
    skipped_steps: int = 0
    adapter_step: int = 0
    ended: str | None = None
    hub_url: str | None = None

    def record(self) -> dict[str, Any]:
        """Return what the journal says of it."""
        return {
            "steps": self.steps,
            "seconds": self.seconds,
            "final_loss": None if math.isnan(self.final_loss) else self.final_loss,
            "tokens_per_second": self.tokens_per_second,
            "skipped_steps": self.skipped_steps,
            "adapter_step": self.adapter_step,
            "ended": self.ended,
        }
