"""The learning rate of each step.

The names and formulas are those of transformers' schedules (transformers/optimization.py), with
which the tests compare every step. There is one difference: ``constant`` has a warm-up, too.
"""

import math
from dataclasses import dataclass

from halfbyte.config.schema import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the step (0-based).

    Attributes:
        peak: Highest learning rate.
        kind: ``lr_scheduler_type``.
        warmup_steps: Steps in which it increases linearly, from 0 or (``warmup_stable_decay``)
            from the lowest.
        total_steps: Optimizer steps of the run.
        lowest: Lowest learning rate relative to the peak, where the kind has one.
        num_cycles: Waves of ``cosine`` (0.5: down only), or restarts.
        power: Power of ``polynomial``.
        timescale: Of ``inverse_sqrt``: steps after the start of the decay until it is at 1/√2.
        decay_steps: Of ``warmup_stable_decay``: the last steps, in which it decays.
        decay_type: Of the same: ``cosine``, ``linear`` or ``1-sqrt``.
    """

    peak: float
    kind: str
    warmup_steps: int
    total_steps: int
    lowest: float = 0.0
    num_cycles: float = 0.5
    power: float = 1.0
    timescale: int = 10_000
    decay_steps: int = 0
    decay_type: str = "cosine"

    @classmethod
    def of(cls, config: TrainConfig, total_steps: int) -> "Schedule":
        """Return the schedule given by ``config``."""
        warmup, peak = config.warmup_steps, config.learning_rate
        if warmup is None:
            warmup = math.ceil(config.warmup_ratio * total_steps)
        lowest = config.min_learning_rate
        if lowest is None and config.lr_scheduler_type == "polynomial":
            lowest = min(1e-7, peak)
        rate = config.min_lr_rate if config.min_lr_rate is not None else (lowest or 0.0) / peak
        restarts = config.lr_scheduler_type == "cosine_with_restarts"
        return cls(
            peak,
            config.lr_scheduler_type,
            warmup,
            total_steps,
            lowest=rate,
            num_cycles=config.lr_num_cycles or (1.0 if restarts else 0.5),
            power=config.lr_power,
            timescale=config.lr_timescale or warmup or 10_000,
            decay_steps=config.lr_decay_steps or max(1, math.ceil(total_steps / 10)),
            decay_type=config.lr_decay_type,
        )

    def at(self, step: int) -> float:
        """Return the learning rate of the update that ends step ``step``."""
        if step >= self.warmup_steps:
            return self.peak * self._decayed(step)
        if self.kind == "warmup_stable_decay":
            return self.peak * self._above_lowest(step / self.warmup_steps)
        return self.peak * step / self.warmup_steps

    def _above_lowest(self, factor: float) -> float:
        return max(0.0, factor * (1.0 - self.lowest) + self.lowest)

    def _decayed(self, step: int) -> float:
        """Return the learning rate after the warm-up, relative to the peak."""
        part = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        match self.kind:
            case "constant":
                return 1.0
            case "linear":
                return max(0.0, 1.0 - part)
            case "polynomial":
                return self._above_lowest(math.pow(max(0.0, 1.0 - part), self.power))
            case "inverse_sqrt":
                return 1.0 / math.sqrt(1.0 + (step - self.warmup_steps) / self.timescale)
            case "cosine_with_restarts":
                wave = math.pi * (self.num_cycles * part % 1.0)
                return 0.0 if part >= 1.0 else 0.5 * (1.0 + math.cos(wave))
            case "warmup_stable_decay":
                decayed = step - (self.total_steps - self.decay_steps)
                return 1.0 if decayed < 0 else self._above_lowest(self._last_part(decayed))
            case _:  # cosine
                wave = math.pi * self.num_cycles * 2.0 * min(1.0, part)
                return self._above_lowest(0.5 * (1.0 + math.cos(wave)))

    def _last_part(self, steps: int) -> float:
        """Return the decay of ``warmup_stable_decay`` after ``steps`` of it, from 1 to 0."""
        part = min(1.0, steps / max(1, self.decay_steps))
        if self.decay_type == "linear":
            return 1.0 - part
        if self.decay_type == "1-sqrt":
            return 1.0 - math.sqrt(part)
        return 0.5 * (1.0 + math.cos(math.pi * part))
