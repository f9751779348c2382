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
the steps that were made are saved. Nothing here imports torch; train/program.py calls them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

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
