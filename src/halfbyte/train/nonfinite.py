"""What a run does about a step whose loss or gradient is NaN or infinite.

Nothing is updated by such a step. It is diagnosed (train/diagnosis.py) and written to
``nonfinite-<step>.json``, with its rows and their tokens; then, by ``on_nonfinite``, the run

    stop      saves the state before the step, and ends: resuming the run repeats the step
    skip      goes on with the next step
    rewind    restores the newest checkpoint, and goes on with the next step: not only this step is
              left out, but what was learned since, which may have led here

More than `MOST_IN_A_ROW` such steps in a row, or `LARGEST_SHARE` of all, end the run as ``stop``.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from halfbyte.atomic import new_file
from halfbyte.config.data_sources import Data, name_of
from halfbyte.config.schema import TrainConfig
from halfbyte.engine.autograd import AutogradEngine
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.errors import CheckpointError, NonFiniteLossError
from halfbyte.train import metadata
from halfbyte.train.diagnosis import FailedStep, Origin, find_origin, in_words
from halfbyte.train.saving import Checkpoints

if TYPE_CHECKING:
    from halfbyte.report import RunReport

MOST_IN_A_ROW = 10
LARGEST_SHARE, LEAST_STEPS = 0.1, 100  # the share is looked at after so many steps

_SHOWN_ROWS = 8


class NonFiniteSteps:
    """Deals with the non-finite steps of a run; a `Trainer` calls it with each.

    Args:
        config: The options of the run.
        engine: Makes its steps.
        parameters: The trained parameters, by name.
        checkpoints: Its checkpoints.
        save: Saves the state after so many steps.
        lines: Returns the lines of a step's rows in the data, by micro-batch.
        report: Where to log.
        writes: Whether this process of the run writes files. All look at the whole step, and find
            the same.

    Attributes:
        skipped: Number of steps that were left out.
    """

    def __init__(
        self,
        config: TrainConfig,
        engine: LayerEngine | AutogradEngine,
        parameters: Mapping[str, nn.Parameter],
        *,
        checkpoints: Checkpoints,
        save: Callable[[int], None],
        lines: Callable[[int], Sequence[Sequence[str]]],
        report: "RunReport",
        writes: bool = True,
    ) -> None:
        self._writes = writes
        self._config, self._engine, self._parameters = config, engine, parameters
        self._checkpoints, self._save, self._lines = checkpoints, save, lines
        self._report = report
        self.skipped = self._in_a_row = 0
        self._last = -1

    def __call__(self, failed: FailedStep) -> None:
        """Diagnose a step, and leave it out or end the run.

        Raises:
            NonFiniteLossError: The run ends.
        """
        before = self.state()
        self._count(failed.step)
        origin = find_origin(self._engine, self._parameters, failed)
        action, why = self._config.on_nonfinite, self._too_many(failed.step)
        path = self._config.output / f"nonfinite-{failed.step + 1}.json"
        text = f"{failed.message}. {self._in_words(failed.step, origin)}. All of it is in {path}"
        if action == "stop" or why:
            text += why + self._how_to_repeat(failed)
            self._report.record("warning", self._record(failed, text))  # the error says it again
            self._write(path, failed, origin)
            self.load(before)
            if not failed.updated and self._checkpoints.saved != failed.step:
                self._save(failed.step)
            raise NonFiniteLossError(text)
        if action == "skip":
            text += ". The step is left out"
        else:
            text += f". Back to the state after step {self._checkpoints.rewind()}; it is left out"
        self._report.warning(**self._record(failed, text))
        self._write(path, failed, origin)

    def _record(self, failed: FailedStep, text: str) -> dict[str, Any]:
        return {"step": failed.step + 1, "kind": "nonfinite", "text": text}

    # --- how many ---------------------------------------------------------------------------------

    def _count(self, step: int) -> None:
        self._in_a_row = self._in_a_row + 1 if step == self._last + 1 else 1
        self.skipped, self._last = self.skipped + 1, step

    def _too_many(self, step: int) -> str:
        """Return why the run ends although it leaves out such steps, or ""."""
        if self._in_a_row > MOST_IN_A_ROW:
            return f". These are {self._in_a_row} steps in a row, so the run ends"
        if step + 1 >= LEAST_STEPS and self.skipped > LARGEST_SHARE * (step + 1):
            return f". These are {self.skipped} of {step + 1} steps, so the run ends"
        return ""

    def state(self) -> dict[str, int]:
        """Return the counts for a checkpoint."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row, "last": self._last}

    def load(self, state: Any) -> None:
        """Restore what `state` returned.

        Raises:
            CheckpointError: If it is something else.
        """
        match state:
            case {"skipped": int(skipped), "in_a_row": int(in_a_row), "last": int(last)}:
                self.skipped, self._in_a_row, self._last = skipped, in_a_row, last
            case _:
                raise CheckpointError(f"expected counts of skipped steps, got {state!r}")

    # --- what is said and written -----------------------------------------------------------------

    def _how_to_repeat(self, failed: FailedStep) -> str:
        if failed.updated:
            return ". The newest checkpoint is the last good state"
        return (
            f". The state before the step is saved: `{self._checkpoints.resume_command}` repeats "
            "it, and with --on-nonfinite skip goes on without it"
        )

    def _rows(self, step: int, origin: Origin) -> list[str]:
        """Return the lines of the rows in question: of the whole step, or of some of its rows."""
        by_micro_batch = self._lines(step)
        if origin.micro_batch is None:
            return [line for lines in by_micro_batch for line in lines]
        return [by_micro_batch[origin.micro_batch][row] for row in origin.rows]

    def _in_words(self, step: int, origin: Origin) -> str:
        where = rows_in_words(self._rows(step, origin), self._config.data)
        if not origin.name:
            return f"No tensor was found that is not finite: {origin.why}. The rows are {where}"
        tensors = [f"{name} {in_words(one)}" for name, one in origin.tensors.items()]
        details = f" ({'; '.join(tensors[:2])})" if tensors else ""
        return f"The first tensor that is not finite is {origin.name}{details}, in {where}"

    def _write(self, path: Path, failed: FailedStep, origin: Origin) -> None:
        """Write what is needed to look at a step without its run."""
        if not self._writes:
            return
        config, step = self._config, failed.step
        rows = [
            {"line": line, "micro_batch": number, "tokens": ids[:length], "labels": labels[:length]}
            for number, (batch, lines) in enumerate(
                zip(failed.batches, self._lines(step), strict=True)
            )
            for line, ids, labels, length in zip(
                lines,
                batch.input_ids.tolist(),
                batch.labels.tolist(),
                batch.lengths or [batch.input_ids.shape[1]] * len(lines),
                strict=True,
            )
        ]
        found = {
            "step": step + 1,
            "loss": _plain(failed.loss),
            "grad_norm": _plain(failed.grad_norm),
            "first": origin.name or None,
            "why": origin.why or None,
            "where": {"micro_batch": origin.micro_batch, "lines": self._rows(step, origin)},
            "tensors": {name: dict(one) for name, one in origin.tensors.items()},
            "on_nonfinite": config.on_nonfinite,
            "again": self._checkpoints.resume_command,
            "model": config.model,
            "data": name_of(config.data),
            "seed": config.seed,
            "engine": self._engine.name,
            "compute_dtype": str(self._engine.model.halfbyte_recipe.compute_dtype)[6:],
            "versions": metadata.versions(),
            "machine": metadata.machine(self._engine.model.device.type),
            "rows": rows,
        }
        with new_file(path) as file:
            file.write((json.dumps(found, allow_nan=False) + "\n").encode())


def rows_in_words(lines: Sequence[str], data: Data) -> str:
    """Return rows as a phrase: ``lines 3, 17 of train.jsonl``, each once."""
    lines = list(dict.fromkeys(lines))
    more = f" and {len(lines) - _SHOWN_ROWS} more" if len(lines) > _SHOWN_ROWS else ""
    return f"line{'s'[: len(lines) != 1]} {', '.join(lines[:_SHOWN_ROWS])}{more} of {name_of(data)}"


def _plain(value: float) -> float | str:
    """Return a number as JSON has it, or as text."""
    return value if math.isfinite(value) else str(value)
