"""The evaluations of a run: when they are made, on which rows, and what follows from them.

During training a fixed part of the held-out rows is evaluated, and at the end all of them. In all,
evaluations during training process at most `TOKEN_SHARE` of the tokens that are trained on; a
forward pass costs at most half of a step (with recomputed layers a third), so they take at most
half of that share of the time. The schedule is a function of the data and the options only, never
of timings: which adapter is the best must not depend on how busy a machine is.
"""

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
import torch

from halfbyte.config.schema import TrainConfig
from halfbyte.data import Dataset
from halfbyte.data.split import select
from halfbyte.engine.autograd import AutogradEngine
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.errors import CheckpointError, OutOfMemoryError
from halfbyte.foreign_text import quote
from halfbyte.runtime.device import is_out_of_memory
from halfbyte.runtime.distributed import ProcessGroup
from halfbyte.train.early_stopping import BestEvaluation, value_of
from halfbyte.train.evaluate import Progress, evaluate_loss
from halfbyte.train.run_data import RunData

if TYPE_CHECKING:
    from halfbyte.report import RunReport

EVALUATIONS_PER_RUN = 10  # if eval_steps is not given, at most
TOKEN_SHARE = 0.1
LEAST_ROWS = 32  # of fewer, the mean says little

_WHICH_ROWS = 0x5EED  # beside the seed of the run, which orders the data


class Schedule(NamedTuple):
    """When a run evaluates, and how much.

    Attributes:
        every: Steps between evaluations; None: only at the end.
        rows: Held-out rows that are evaluated during training.
        share: The tokens that this processes, of those that are trained on.
    """

    every: int | None
    rows: int
    share: float = 0.0


def schedule(
    config: TrainConfig, *, steps: int, trained_tokens: float, rows: int, tokens: int
) -> Schedule:
    """Choose when to evaluate and on how many rows, as far as the options do not say it.

    Args:
        config: The options.
        steps: Steps of the run.
        trained_tokens: Tokens that they process.
        rows: Held-out rows.
        tokens: Their tokens.
    """
    affordable = TOKEN_SHARE * trained_tokens / tokens * rows  # rows, in all evaluations
    least = min(rows, LEAST_ROWS)
    every = config.eval_steps
    if every is None:
        each = min(rows, config.eval_max_samples or least)
        times = min(EVALUATIONS_PER_RUN, steps, int(affordable / each))
        if config.depends_on_evaluations:
            times = min(EVALUATIONS_PER_RUN, steps)
        every = math.ceil(steps / times) if times > 1 else None
    times = math.ceil(steps / every) if every else 1
    if times == 1:  # at the end, which is on all rows
        return Schedule(every, rows, TOKEN_SHARE * rows / affordable)
    chosen = min(rows, config.eval_max_samples or max(least, int(affordable / times)))
    return Schedule(every, chosen, TOKEN_SHARE * times * chosen / affordable)


class RunEvaluation:
    """Evaluates a run.

    Args:
        config: The options of the run.
        data: Its data, of which some is held out.
        engine: Computes losses.
        report: Where evaluations are logged.
        stopped: Asked during an evaluation; if true, it is broken off.
        end_stopped: Ends the run then; it evaluates first when it is resumed.
        end: Has training end after the step, for the reason given.
        save: Writes a checkpoint of the state after a step.
        measure: Returns the program's metrics on some rows, and calls its second argument between
            answers; None without any.
        tell: Called with the record of each evaluation, after it has been logged.
        processes: The processes of the run: rows are dealt out to all, and the first measures.

    Attributes:
        evaluated: The step after which the run was evaluated last.
        best: The best of its evaluations.
        rows: What is evaluated during training.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: RunData,
        engine: LayerEngine | AutogradEngine,
        report: "RunReport",
        *,
        stopped: Callable[[], bool],
        end_stopped: Callable[[], NoReturn],
        end: Callable[[str], None],
        save: Callable[[int], None],
        measure: Callable[[Dataset, Progress], dict[str, float]] | None = None,
        tell: Callable[[dict[str, Any]], None] = lambda _: None,
        processes: ProcessGroup | None = None,
    ) -> None:
        self._processes = processes or ProcessGroup()
        assert data.held_out is not None
        self._config, self._engine, self._report = config, engine, report
        self._stopped, self._end_stopped, self._end = stopped, end_stopped, end
        self._save, self._measure, self._tell = save, measure, tell
        self._total, self._held_out = data.plan.total, data.held_out
        self.evaluated, self.best = 0, BestEvaluation(config)
        self.rows, whole = self._held_out, self._held_out.report
        self.every, rows, share = schedule(
            config,
            steps=self._total,
            trained_tokens=data.dataset.report.tokens * self._total / data.plan.per_epoch,
            rows=len(self._held_out.last_of_row),
            tokens=whole.tokens,
        )
        if rows < len(self._held_out.last_of_row):
            generator = np.random.Generator(np.random.PCG64([config.seed, _WHICH_ROWS]))
            order = generator.permutation(len(self._held_out.last_of_row))
            self.rows = select(self._held_out, np.sort(order[:rows]))
        report.note(self._in_words(share))

    def _in_words(self, share: float) -> str:
        rows, part = len(self._held_out.last_of_row), len(self.rows.last_of_row)
        if self.every is None or self.every >= self._total:
            return f"evaluation at the end, on {rows:,} held-out rows"
        steps = f"evaluation every {self.every} steps"
        cost = f"{share:.0%} of the tokens that are trained on"
        if self.rows is self._held_out:
            return f"{steps} and at the end, on {rows:,} held-out rows: {cost}"
        same = f"on {part:,} of {rows:,} held-out rows, always the same"
        return f"{steps} {same}: {cost}; at the end on all"

    def after(self, step: int) -> None:
        """Evaluate after ``step`` if it is due and has not been made.

        What is the best so far is saved, and training ends if it no longer gets better.

        Raises:
            RunStopped: A stop was requested.
            OutOfMemoryError: It does not fit into memory, and the result of the run needs it.
            ConfigError: There is no metric of the name in ``metric_for_best``.
        """
        due = self.every is not None and 0 < step < self._total and step % self.every == 0
        if not due or self.evaluated == step:
            return
        best = self._make(step)
        if self.best.exhausted:
            self._end(f"no better evaluation since {self.best.in_words()}")
        if best and self._config.load_best:
            self._save(step)

    def _make(self, step: int) -> bool:
        """Evaluate; return whether this was the best so far."""
        try:
            record = self._of(self.rows, step)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if self._config.depends_on_evaluations:
                raise OutOfMemoryError(
                    f"the evaluation after step {step} does not fit into the memory that is left. "
                    "Lower max_length or batch_size, or set memory_budget, of which the rest is "
                    "left to it"
                ) from error
            self._report.note(f"no evaluation after step {step}: there is not enough memory for it")
            self.evaluated = step
            return False
        value = value_of(record, self.best.metric)
        better = self.best.see(step, value)
        self.evaluated = step
        self._log(record | ({"best": True} if better else {}))
        return better

    def conclude(self, step: int, restore: Callable[[int], None]) -> int:
        """Evaluate the adapter that is written on all held-out rows.

        Args:
            step: Steps of the run.
            restore: Restores the adapter after a step, if that was the best.

        Returns:
            The step after which the adapter was as it is now.

        Raises:
            RunStopped, OutOfMemoryError, ConfigError: As `after`.
            CheckpointError: The best adapter cannot be restored.
        """
        if self.evaluated != step:
            self._make(step)
        chosen = step
        if self._config.load_best and self.best.step is None:
            self._report.note("the adapter is that of the last step: no evaluation was finite")
        elif self._config.load_best and self.best.step is not None:
            chosen = self.best.step
            if chosen != step:
                restore(chosen)
            self._report.note(f"the adapter is the best of the run: {self.best.in_words()}")
            self._report.record("best", {"metric": self.best.metric} | self.best.state())
        if chosen != step or self.rows is not self._held_out:
            self._log(self._of(self._held_out, step) | {"adapter_of_step": chosen})
        return chosen

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON values."""
        return {"evaluated": self.evaluated, "best": self.best.state()}

    def load(self, state: dict[str, Any], step: int) -> None:
        """Restore what `state` returned, from a checkpoint after ``step``.

        One of an older version knows neither of the last evaluation nor of the best.

        Raises:
            CheckpointError: If it is something else.
        """
        evaluated = state.get("evaluated", step)
        if type(evaluated) is not int:
            raise CheckpointError(f"expected the step of an evaluation, got {quote(evaluated)}")
        self.evaluated = evaluated
        self.best.load(state.get("best", self.best.state()))

    def _of(self, data: Dataset, step: int) -> dict[str, Any]:
        """Return the journal's record of an evaluation."""
        began, size = time.perf_counter(), max(4, self._config.batch_size)
        loss, tokens = evaluate_loss(
            self._engine,
            data.examples,
            batch_size=size,
            progress=self._look_for_stop,
            processes=self._processes,
        )
        metrics = {} if self._measure is None else {"metrics": self._measured(data)}
        return {
            "step": step,
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "supervised_tokens": tokens,
            **metrics,
            "rows": len(data.last_of_row),
            "of_rows": len(self._held_out.last_of_row),
            "seconds": time.perf_counter() - began,
        }

    def _measured(self, data: Dataset) -> Any:
        """Return the program's metrics, as the first process measures them; others wait for it."""
        measure, ran_out = self._measure, "the first process is out of memory"
        assert measure is not None

        def measured() -> dict[str, float] | None:
            try:
                return measure(data, self._look_for_stop)
            except RuntimeError as error:
                if self._processes.size == 1 or not is_out_of_memory(error):
                    raise
                return None

        if (found := self._processes.from_first(measured)) is None:
            raise torch.OutOfMemoryError(ran_out)
        return found

    def _log(self, record: dict[str, Any]) -> None:
        self._report.evaluation(record)
        self._tell(record)

    def _look_for_stop(self, done: int, total: int) -> None:
        if self._stopped():
            self._end_stopped()
