"""Which evaluation of a run was the best, and whether training no longer gets better.

The rule is that of transformers' ``EarlyStoppingCallback``: an evaluation counts as better if it is
better than the best one before it by more than a threshold, and training ends after so many in a
row that are not. The best is the best, by however little; the first of equals.
"""

import math
from collections.abc import Mapping
from typing import Any

from halfbyte.config.schema import TrainConfig
from halfbyte.errors import CheckpointError, ConfigError
from halfbyte.foreign_text import quote

MEASURED = ("loss", "perplexity")
"""What every evaluation measures; less is better."""


class BestEvaluation:
    """The best of a run's evaluations.

    Args:
        config: The options: the metric, patience and threshold.

    Attributes:
        metric: Name of the metric that is compared.
        step: The step after which it was best; None before the first one.
        value: Its value there.
        without: Number of evaluations in a row that were not better.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.metric, self._patience = config.metric_for_best, config.early_stopping_patience
        smaller = self.metric in MEASURED or self.metric.endswith("loss")
        self._sign = 1.0
        if config.metric_mode == "min" or (config.metric_mode == "auto" and smaller):
            self._sign = -1.0
        self._threshold = config.early_stopping_threshold
        self.step: int | None = None
        self.value = math.nan
        self.without = 0

    def see(self, step: int, value: float) -> bool:
        """Return whether the evaluation after ``step`` is the best so far.

        A value that is not finite never is.
        """
        gain = math.inf if self.step is None else self._sign * (value - self.value)
        better = math.isfinite(value) and gain > 0
        self.without = 0 if better and gain > self._threshold else self.without + 1
        if better:
            self.step, self.value = step, value
        return better

    @property
    def exhausted(self) -> bool:
        """Whether training should end."""
        return self._patience is not None and self.without >= self._patience

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON values."""
        value = None if self.step is None else self.value
        return {"step": self.step, "value": value, "without": self.without}

    def load(self, state: Any) -> None:
        """Restore what `state` returned.

        Raises:
            CheckpointError: If it is something else.
        """
        match state:
            case {"step": None, "value": None, "without": int(without)}:
                self.step, self.value, self.without = None, math.nan, without
            case {"step": int(step), "value": int(value) | float(value), "without": int(without)}:
                self.step, self.value, self.without = step, float(value), without
            case _:
                raise CheckpointError(f"expected the best evaluation of a run, got {quote(state)}")

    def in_words(self) -> str:
        """``loss 1.2345 after step 40``."""
        return f"{self.metric} {self.value:.4f} after step {self.step}"


def value_of(record: Mapping[str, Any], metric: str) -> float:
    """Return a metric of an evaluation's record.

    Raises:
        ConfigError: There is none of that name.
    """
    own = record.get("metrics", {})
    if metric not in MEASURED and metric not in own:
        raise ConfigError(
            f"`metric_for_best`: no metric is named {quote(metric)}; there are "
            f"{', '.join(map(quote, (*MEASURED, *own)))}"
            + ("" if own else ", and those that a program gives to fine_tune")
        )
    return float(record[metric] if metric in MEASURED else own[metric])


def require_metric(config: TrainConfig, *, own: bool) -> None:
    """Check the name of the metric before a run; the user's own are known when they are called.

    Raises:
        ConfigError: There is none of that name, and the user gives none.
    """
    if not own:
        value_of(dict.fromkeys(MEASURED, 0.0), config.metric_for_best)
