"""Callbacks of a program: functions that a run calls between steps, with what has happened.

    losses = []
    callbacks = halfbyte.Callbacks(on_step=lambda info: losses.append(info.loss))
    halfbyte.fine_tune(config, report, callbacks=[callbacks])

They get numbers and paths, never the model or anything that the run goes on with, and whatever they
change of global state is undone (runtime/isolation.py): a run with callbacks writes the same bytes
as one without. What one returns is None, or asks the run to end:

    "stop"      as a `StopRequest`: the steps are saved, and the run can be resumed
    "finish"    training is over: the adapter is written as if this were the last step

Anything else is an error, since it is hardly meant. An exception in a callback ends the run, once
the steps that were made are saved.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import nn

from halfbyte.config.aliases import nearest
from halfbyte.config.schema import TrainConfig
from halfbyte.errors import ConfigError
from halfbyte.foreign_text import quote
from halfbyte.runtime.isolation import isolated
from halfbyte.train.early_stopping import require_metric
from halfbyte.train.metrics import Metric, require_metrics

Answer = Literal["stop", "finish"] | None


@dataclass(frozen=True)
class StepInfo:
    """An optimizer step that was made.

    Attributes:
        step: Its number (1-based).
        total_steps: Steps of the run.
        epoch: Passes over the data so far.
        loss: Mean token loss; not finite if the step was skipped for that.
        grad_norm: Norm of all gradients before clipping.
        learning_rate: Of the update.
        tokens: Tokens of the step, without padding.
        supervised_tokens: Those that count for the loss.
        seconds: Time the step took.
        skipped: Whether nothing was updated, because the loss or a gradient was not finite.
    """

    step: int
    total_steps: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    supervised_tokens: int
    seconds: float
    skipped: bool


@dataclass(frozen=True)
class EvaluationInfo:
    """An evaluation on held-out data.

    Attributes:
        step: The step after which it was made.
        loss: Mean token loss.
        perplexity: exp(loss).
        supervised_tokens: Tokens that count for the loss.
        rows: Rows that were evaluated.
        of_rows: All held-out rows.
        metrics: The values of the program's own metrics.
        best: Whether it is the best so far.
        adapter_of_step: For the last evaluation of a run, on all rows, if it is of another adapter
            or other rows than the one before: the step of the adapter that is written.
        seconds: Time it took.
    """

    step: int
    loss: float
    perplexity: float
    supervised_tokens: int
    rows: int
    of_rows: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    best: bool = False
    adapter_of_step: int | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class SaveInfo:
    """A checkpoint or the adapter that is on disk.

    Attributes:
        step: Steps made until then.
        path: Its directory.
        final: Whether it is the adapter at the end of the run, not a checkpoint.
    """

    step: int
    path: Path
    final: bool


@dataclass(frozen=True)
class Callbacks:
    """Functions that a run calls; any other object with methods of these names will do, too.

    Attributes:
        on_step: Called after each step.
        on_evaluate: Called after each evaluation.
        on_save: Called when a checkpoint or the adapter is on disk; on a GPU some steps after its
            own, since it is written in the background.
    """

    on_step: Callable[[StepInfo], Answer] | None = None
    on_evaluate: Callable[[EvaluationInfo], Answer] | None = None
    on_save: Callable[[SaveInfo], Answer] | None = None


_NAMES = tuple(one.name for one in dataclasses.fields(Callbacks))


def require_callbacks(callbacks: Sequence[object]) -> None:
    """Check that callbacks have methods that are called, and no others that look like it.

    Raises:
        ConfigError: One has none, or one that is misspelt.
    """
    if not isinstance(callbacks, Sequence):
        raise ConfigError(
            f"callbacks: expected a list of objects, got {quote(type(callbacks).__name__)}: "
            "write callbacks=[…]"
        )
    for one in callbacks:
        name = type(one).__name__
        for unknown in (word for word in dir(one) if word.startswith("on_")):
            if unknown not in _NAMES:
                raise ConfigError(
                    f"callbacks: {name}.{unknown} is never called{nearest(unknown, _NAMES)}"
                )
        if not any(callable(getattr(one, known, None)) for known in _NAMES):
            raise ConfigError(f"callbacks: {name} has none of {', '.join(_NAMES)}")


class Program(NamedTuple):
    """What a program gives to a run beside its options.

    Attributes:
        callbacks: Objects with the methods of `Callbacks`.
        train_data: Rows to train on, instead of those that ``data`` names.
        eval_data: Rows to evaluate on, instead of those that ``eval_data`` names.
        metrics: Functions of the model's answers to held-out rows (train/metrics.py).
    """

    callbacks: Sequence[object] = ()
    train_data: Iterable[object] | None = None
    eval_data: Iterable[object] | None = None
    metrics: Sequence[Metric] = ()

    def check(self, config: TrainConfig) -> None:
        """Check all of it, with the options it belongs to, before anything is read.

        Raises:
            ConfigError: Something of it, or an option that needs some of it, cannot be used.
        """
        require_callbacks(self.callbacks)
        require_metrics(self.metrics)
        config.require_held_out(given=self.eval_data is not None)
        require_metric(config, own=bool(self.metrics))
        held_out = (self.eval_data, config.eval_data, config.eval_split)
        if self.metrics and held_out == (None, None, None):
            raise ConfigError("metrics: expected held-out data to measure them on, got none")
        if self.eval_data is not None and config.eval_split is not None:
            raise ConfigError("`eval_split` cannot be combined with eval_data; remove one")


class RunCallbacks:
    """Calls the callbacks of a run.

    Args:
        callbacks: The program's.
        model: Its modes are restored after each call.
        save: Saves the steps that were made, after an exception.
        stop: Asks the run to stop.
        finish: Has training end here; called with the reason.
    """

    def __init__(
        self,
        callbacks: Sequence[object],
        model: nn.Module,
        *,
        save: Callable[[], None],
        stop: Callable[[], None],
        finish: Callable[[str], None],
    ) -> None:
        self._callbacks, self._model = list(callbacks), model
        self._save, self._stop, self._finish = save, stop, finish

    def __bool__(self) -> bool:
        return bool(self._callbacks)

    def step(self, record: Mapping[str, Any], total_steps: int) -> None:
        """Call `on_step` with the journal's record of a step."""
        if self._callbacks:
            info = {"total_steps": total_steps, "skipped": False} | dict(record)
            self._call("on_step", _of(StepInfo, info))

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Call `on_evaluate` with the journal's record of an evaluation."""
        if self._callbacks:
            self._call("on_evaluate", _of(EvaluationInfo, record))

    def saved(self, step: int, path: Path, *, final: bool) -> None:
        """Call `on_save`."""
        self._call("on_save", SaveInfo(step, path, final))

    def guard(self, what: str, function: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Call a function of the program; return what it returns.

        Args:
            what: What it is, for the user.
            function: The function.
            given: Its arguments.
            named: Its arguments by name.

        Raises:
            Exception: That of the function, once the steps that were made are saved.
        """
        try:
            with isolated(self._model):
                return function(*given, **named)
        except Exception as error:
            self._failed(error, what)
            raise

    def _call(self, name: str, info: object) -> None:
        for one in self._callbacks:
            function = getattr(one, name, None)
            if function is None:
                continue
            answer = self.guard(f"the callback {name}", function, info)
            if answer is None:
                continue
            if not isinstance(answer, str) or answer not in ("stop", "finish"):
                error = ConfigError(
                    f"the callback {name} returned {quote(answer)}: expected None, 'stop' or "
                    "'finish'"
                )
                self._failed(error, f"the callback {name}")
                raise error
            if answer == "stop":
                self._stop()
            else:
                self._finish(f"a callback ({name}) asked for it")

    def _failed(self, error: Exception, what: str) -> None:
        self._save()
        error.add_note(f"This was raised by {what}. The steps made before are saved.")


def _of(kind: type[Any], record: Mapping[str, Any]) -> Any:
    """Return the fields of a record that ``kind`` has, copied."""
    names = [one.name for one in dataclasses.fields(kind) if one.name in record]
    found = {name: record[name] for name in names}
    return kind(**{k: dict(v) if isinstance(v, Mapping) else v for k, v in found.items()})
