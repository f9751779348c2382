"""What a program gives to a run beside its options: its callbacks, its data and its metrics."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from halfbyte.config.aliases import nearest
from halfbyte.config.schema import TrainConfig
from halfbyte.errors import ConfigError
from halfbyte.foreign_text import quote
from halfbyte.runtime.isolation import isolated
from halfbyte.train.callbacks import Callbacks, EvaluationInfo, SaveInfo, StepInfo
from halfbyte.train.early_stopping import require_metric
from halfbyte.train.metrics import Metric, require_metrics

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

    @property
    def changes_result(self) -> bool:
        """Whether the run cannot be resumed from the command line, without the program."""
        return self.train_data is not None or self.eval_data is not None or bool(self.metrics)

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


class WeightsChanged(ConfigError):
    """A function of the program has changed weights, so the state of the run is not saved."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} has changed weights of the model. The newest checkpoint is the last good state"
        )


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
            WeightsChanged: The function has changed a weight; nothing is saved then.
        """
        before = _versions(self._model)
        try:
            with isolated(self._model):
                returned = function(*given, **named)
        except Exception as error:
            if _versions(self._model) != before:
                raise WeightsChanged(what) from error
            self._failed(error, what)
            raise
        if _versions(self._model) != before:
            raise WeightsChanged(what)
        return returned

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


def _versions(model: nn.Module) -> list[int]:
    """Return how often each parameter of a model has been written to."""
    return [parameter._version for parameter in model.parameters()]
