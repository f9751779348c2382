"""Notices losses that a healthy run does not have, as they happen.

    gradient    it is exactly zero, three steps in a row
    constant    20 losses are equal within a millionth, at a learning rate that should change them
    spike       a loss is 6 standard deviations above the 50 before it, 1.5 times their largest, and
                above their mean by a quarter of the losses at the start
    flat        after 200, 400, 800, … steps the loss has fallen by less than 1 %, and this is
                known to three standard errors

The losses of single steps are noisy, and about log-normal: they vary with the examples. So spikes
are judged on logarithms, a fall in the loss by its standard error, and runs too noisy to tell are
left alone. An alarm that is usually false is worse than none.
"""

import math
import sys
from array import array
from collections.abc import Iterable, Mapping
from statistics import fmean, stdev, variance
from typing import Any, NamedTuple

_ZERO_GRADIENTS = 3
_CONSTANT, _EQUAL = 20, 1e-6
_START = 20
_WINDOW, _LEAST = 50, 20
_DEVIATIONS, _RATIO, _RISE = 6.0, 1.5, 0.25
_MEMORY = 500  # for so many steps, a further spike must be _RATIO times one that was told
_FIRST_LOOK, _LEAST_FALL, _ERRORS = 200, 0.01, 3.0
_TINY = 1e-12


class Finding(NamedTuple):
    """Something to tell the user.

    Attributes:
        kind: ``gradient``, ``constant``, ``spike`` or ``flat``.
        text: What was seen, and what to look at; without the step.
    """

    kind: str
    text: str


class LossWatch:
    """Watches the losses of a run.

    Args:
        learning_rate: The peak learning rate; below a tenth of it, losses may well be constant.
    """

    def __init__(self, learning_rate: float) -> None:
        self._peak = learning_rate
        self._losses = array("d")
        self._zeros = self._warm = 0  # steps in a row: of zero gradients, at a high learning rate
        self._next_look = _FIRST_LOOK
        self._lasting: dict[str, int] = {}  # kind: the number of losses when it was last true
        self._spikes: list[tuple[int, float]] = []  # those told: number of losses before, loss

    def see(self, loss: float, grad_norm: float, learning_rate: float) -> Finding | None:
        """Return what is odd about the next step, if anything; told once while it lasts.

        Args:
            loss: Mean token loss, finite.
            grad_norm: Norm of all gradients.
            learning_rate: Of this step.
        """
        self._zeros = self._zeros + 1 if grad_norm == 0 else 0
        self._warm = self._warm + 1 if learning_rate >= 0.1 * self._peak else 0
        spike = self._spike(loss)
        self._losses.append(loss)
        for found in (self._gradient(), self._constant(), spike, self._flat()):
            if found is not None and self._is_news(found.kind):
                return found
        return None

    def replay(self, records: Iterable[Mapping[str, Any]]) -> None:
        """See the steps in a journal's records, for a resumed run to go on from there."""
        for record in records:
            match record:
                case {
                    "event": "step",
                    "loss": float(loss),
                    "grad_norm": float(norm),
                    "learning_rate": float(rate),
                } if "skipped" not in record:
                    self.see(loss, norm, rate)

    def _is_news(self, kind: str) -> bool:
        """Return whether ``kind`` was not true of the step before."""
        now, before = len(self._losses), self._lasting.get(kind)
        self._lasting[kind] = now
        return before is None or now - before > 1

    def _gradient(self) -> Finding | None:
        if self._zeros < _ZERO_GRADIENTS:
            return None
        return Finding(
            "gradient",
            f"the gradient has been exactly zero for {_ZERO_GRADIENTS} steps, so nothing is "
            "learned: look at target_modules, at the supervised tokens, and at compute_dtype "
            "float32",
        )

    def _constant(self) -> Finding | None:
        last = self._losses[-_CONSTANT:]
        if self._warm < _CONSTANT or self._zeros >= _ZERO_GRADIENTS:
            return None
        low, high = min(last), max(last)
        if high - low > _EQUAL * abs(high):
            return None
        return Finding(
            "constant",
            f"the loss has been {high:.6g} for {_CONSTANT} steps, without any change: look at "
            "learning_rate, at target_modules, and whether the rows differ",
        )

    def _spike(self, loss: float) -> Finding | None:
        window = self._losses[-_WINDOW:]
        told = [one for at, one in self._spikes if len(self._losses) - at < _MEMORY]
        if len(window) < _LEAST or loss <= _RATIO * max(*window, *told):
            return None
        logs = [math.log(max(one, _TINY)) for one in window]
        usual, start = math.exp(fmean(logs)), fmean(self._losses[:_START])
        far = math.log(loss / usual) > _DEVIATIONS * stdev(logs)
        if not far or loss - usual <= _RISE * start:
            return None
        self._spikes.append((len(self._losses), loss))
        return Finding(
            "spike",
            f"the loss jumped to {loss:.4g}, from about {usual:.4g}: look at the rows of "
            "this step; if it stays high, lower learning_rate",
        )

    def _flat(self) -> Finding | None:
        steps = len(self._losses)
        if steps < self._next_look:
            return None
        self._next_look *= 2
        # The longer the run, the longer its start may be, and the better its mean is known.
        start, recent = self._losses[: max(_START, steps // 20)], self._losses[steps // 2 :]
        before, now = fmean(start), fmean(recent)
        error = math.sqrt(variance(start) / len(start) + variance(recent) / len(recent))
        if before - now + _ERRORS * error >= _LEAST_FALL * before:
            return None
        self._next_look = sys.maxsize
        return Finding(
            "flat",
            f"after {steps} steps the loss is {now:.4g}, and was {before:.4g} at the start: look "
            "at learning_rate, at the supervised tokens, and at some answers of the model",
        )
