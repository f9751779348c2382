"""The learning rate of each step."""

import math
from dataclasses import dataclass

from halfbyte.config.schema import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the step (0-based), as transformers' schedules define it.

    Attributes:
        peak: Highest learning rate.
        kind: ``cosine`` and ``linear`` decay to 0 at ``total_steps``; ``constant`` does not.
        warmup_steps: Steps in which it increases linearly from 0.
        total_steps: Optimizer steps of the run.
    """

    peak: float
    kind: str
    warmup_steps: int
    total_steps: int

    @classmethod
    def of(cls, config: TrainConfig, total_steps: int) -> "Schedule":
        """Return the schedule given by ``config``."""
        warmup = config.warmup_steps
        if warmup is None:
            warmup = math.ceil(config.warmup_ratio * total_steps)
        return cls(config.learning_rate, config.lr_scheduler_type, warmup, total_steps)

    def at(self, step: int) -> float:
        """Return the learning rate of the update that ends step ``step``."""
        if step < self.warmup_steps:
            return self.peak * step / max(1, self.warmup_steps)
        if self.kind == "constant":
            return self.peak
        part = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        if self.kind == "linear":
            return self.peak * max(0.0, 1.0 - part)
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, part)))
