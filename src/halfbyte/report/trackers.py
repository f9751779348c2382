"""Experiment trackers: TensorBoard, Weights & Biases and trackio, behind three methods.

The journal is the record of a run; a tracker gets the same numbers under the names used by
transformers' Trainer (``train/loss``, ``eval/loss``). Each library is optional and imported only
if a run uses it, before anything is loaded.
"""

import importlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from halfbyte.errors import ConfigError

Values = Mapping[str, float]


class Tracker(Protocol):
    """The interface of a tracker."""

    def begin(self, name: str, start_step: int, metadata: Mapping[str, Any]) -> None:
        """Training begins after ``start_step``; ``metadata`` are plain values that describe it."""

    def log(self, step: int, values: Values) -> None:
        """Log numbers by name, after ``step``."""

    def close(self) -> None:
        """No more will come; called whatever happened, also when nothing began."""


class TensorBoard:
    """Event files in ``tensorboard/`` of the run's directory."""

    def __init__(self, module: ModuleType, directory: Path) -> None:
        """``module`` is ``torch.utils.tensorboard``."""
        self._module, self._directory = module, directory
        self._writer: Any = None

    def begin(self, name: str, start_step: int, metadata: Mapping[str, Any]) -> None:
        """Write the metadata as text; TensorBoard hides steps that a resumed run repeats."""
        self._writer = self._module.SummaryWriter(
            str(self._directory / "tensorboard"), purge_step=start_step + 1
        )
        text = "\n".join(f"    {key}: {value}" for key, value in metadata.items())
        self._writer.add_text("run", f"{name}\n\n{text}", start_step)

    def log(self, step: int, values: Values) -> None:
        """Write one point of each curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the file."""
        if self._writer is not None:
            self._writer.close()


class WandbLike:
    """A run of wandb, or of trackio, which has wandb's interface.

    Project, entity and server are taken from the library's own settings (``WANDB_PROJECT`` …).
    """

    def __init__(self, module: ModuleType, directory: Path) -> None:
        """``module`` is ``wandb`` or ``trackio``."""
        self._module, self._directory = module, directory
        self._begun = False

    def begin(self, name: str, start_step: int, metadata: Mapping[str, Any]) -> None:
        """Start a run of that name.

        Raises:
            ConfigError: The library fails, as wandb does if no user is logged in.
        """
        library = self._module.__name__
        project = os.environ.get(f"{library.upper()}_PROJECT", "halfbyte")
        where = {"dir": str(self._directory)} if library == "wandb" else {}
        refusal: type[Exception] = getattr(self._module, "Error", ConfigError)
        try:
            self._module.init(project=project, name=name, config=dict(metadata), **where)
        except refusal as error:
            raise ConfigError(f"report_to: {library} does not begin: {error}") from error
        self._begun = True

    def log(self, step: int, values: Values) -> None:
        """Send the numbers of a step."""
        self._module.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        if self._begun:
            self._module.finish()


TRACKERS: dict[str, tuple[str, str, Callable[[ModuleType, Path], Tracker]]] = {
    "tensorboard": ("torch.utils.tensorboard", "tensorboard", TensorBoard),
    "wandb": ("wandb", "wandb", WandbLike),
    "trackio": ("trackio", "trackio", WandbLike),
}
"""By option name: the module, the package to install, and the class that reports to it."""


def open_trackers(names: Sequence[str], directory: Path) -> list[Tracker]:
    """Import the libraries of the given trackers.

    Args:
        names: Keys of ``TRACKERS``.
        directory: The run's; a tracker that writes files does so below it.

    Raises:
        ConfigError: A library is not installed; says how to install all that are missing.
    """
    found: list[Tracker] = []
    missing: dict[str, str] = {}
    for name in dict.fromkeys(names):
        module, package, make = TRACKERS[name]
        try:
            found.append(make(importlib.import_module(module), directory))
        except ImportError as error:
            missing[package] = f"{name} cannot be imported ({error})"
    if missing:
        raise ConfigError(
            f"report_to: {', '.join(missing.values())}. Install with `pip install "
            f"{' '.join(missing)}`, or leave it out"
        )
    return found


def tracked(event: str, record: Mapping[str, Any]) -> Values:
    """The finite numbers of a ``step`` or an ``evaluation``, under the names trackers show."""
    group = "train" if event == "step" else "eval"
    return {
        f"{group}/{name}": float(value)
        for name, value in {**record, **record.get("metrics", {})}.items()
        if isinstance(value, int | float) and math.isfinite(value) and name != "step"
    }
