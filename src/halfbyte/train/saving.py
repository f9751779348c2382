"""Saves the state of a run: when, what, and in the background during the next steps of a GPU.

The tensors of a checkpoint are copied to the host between two steps. Writing them, computing
digests and flushing to disk takes a second for a 7B model's run (LAB.md); no step waits for it.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

from halfbyte.checkpoint.base_model import LoadedBase
from halfbyte.checkpoint.identity import identity_of
from halfbyte.checkpoint.peft import write_card
from halfbyte.checkpoint.run_state import latest_run, load_run, run_at, save_run, step_of
from halfbyte.config.command_line import invocation
from halfbyte.config.schema import TrainConfig
from halfbyte.errors import CheckpointError, HalfbyteError
from halfbyte.layers.conv1d import conv1d_weights
from halfbyte.layers.multimodal import removed_modules
from halfbyte.linear.lora import LoRAConfig, adapter_state, load_adapter_state
from halfbyte.runtime.distributed import ProcessGroup
from halfbyte.train.loading import recipe_metadata
from halfbyte.train.trainer import Trainer

SAVES_PER_RUN = 10  # if save_steps is not given

logger = logging.getLogger("halfbyte")


class Checkpoints:
    """The checkpoints of a run.

    Args:
        config: The options of the run.
        base: Its base model, with the adapters attached.
        lora: Their configuration.
        trainer: Has the optimizer's state.
        writer: Writes them.
        identity: What must be equal to resume from them (train/resume.py).
        total: Steps of the run.
        by_program: Whether the run needs something that only a program has, such as its data.
        processes: The processes of the run, of which the first writes.
        now: The time in seconds, for ``save_minutes``.

    Attributes:
        saved: The step of the newest one, which may still be being written; None if there is none.
    """

    def __init__(
        self,
        config: TrainConfig,
        base: LoadedBase,
        lora: LoRAConfig,
        trainer: Trainer,
        writer: "CheckpointWriter",
        identity: Mapping[str, Any],
        total: int,
        *,
        by_program: bool = False,
        processes: ProcessGroup | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._base, self._lora = config, base, lora
        self._trainer, self._writer, self._identity = trainer, writer, dict(identity)
        self._total, self._by_program = total, by_program
        self._processes = processes or ProcessGroup()
        self._writes = self._processes.is_first
        self.saved: int | None = None
        self._every = config.save_steps or max(1, math.ceil(total / SAVES_PER_RUN))
        self._now, self._newest = now, now()

    def due(self, step: int) -> bool:
        """Return whether one is written after ``step``.

        Every ``save_steps``, after the last step, and once the newest is ``save_minutes`` old.
        """
        minutes, age = self._config.save_minutes, self._now() - self._newest
        old = minutes is not None and age >= 60.0 * minutes
        return old or step % self._every == 0 or step == self._total

    def save(self, step: int, progress: Mapping[str, Any], *, best: int | None = None) -> None:
        """Write a checkpoint of the state after ``step``; on a GPU in the background.

        Args:
            step: Optimizer steps made.
            progress: More state of the run, as JSON values.
            best: Step of the checkpoint that is kept whatever its age, if there is one.
        """
        self.saved, self._newest = step, self._now()
        if not self._writes:
            return
        trainer, state = self._trainer, adapter_state(self._base.model)
        write = partial(
            save_run,
            self._config.output,
            step,
            adapter={name: tensor.to("cpu") for name, tensor in state.items()},
            optimizer=trainer.optimizer_state(),
            progress=self._identity | trainer.progress() | dict(progress),
            keep=self._config.save_total_limit,
            best=best,
            card=partial(write_card, names=trainer.parameters, config=self._lora, **self.card),
        )
        self._writer.write(write)

    def take_over(self) -> None:
        """After another process has failed, have one of those that are left write.

        Which may be this one, and `saved` is the newest that is complete: the process that wrote
        may have died of it.
        """
        if self._processes.size > 1:
            self._writes = self._processes.claim("checkpoint")
            newest = latest_run(self._config.output)
            self.saved = None if newest is None else step_of(newest)

    def rewind(self) -> int:
        """Restore adapters and optimizer from the newest checkpoint; return its step.

        Raises:
            CheckpointError: There is none.
            OutputError: It could not be written.
        """
        with self._processes.first():
            self._writer.wait()
        newest = latest_run(self._config.output)
        if newest is None:
            raise CheckpointError(f"{self._config.output} has no checkpoint to go back to")
        state = load_run(newest)
        load_adapter_state(self._base.model, state.adapter)
        self._trainer.load_progress(state.progress)
        self._trainer.load_optimizer_state(state.optimizer)
        return state.step

    def restore_adapters(self, step: int) -> None:
        """Restore the adapters, and nothing else, from the checkpoint after ``step``.

        Raises:
            CheckpointError: It is missing or damaged.
            OutputError: It could not be written.
        """
        with self._processes.first():
            self._writer.wait()
        path = run_at(self._config.output, step)
        try:
            adapter = load_run(path).adapter
        except CheckpointError as error:
            raise CheckpointError(
                f"`load_best`: the best evaluation was after step {step}: {error}. The adapter of "
                f"the last step is in the newest checkpoint in {path.parent}"
            ) from error
        load_adapter_state(self._base.model, adapter)

    @cached_property
    def card(self) -> dict[str, Any]:
        """What an adapter's files say of the base model; takes 0.2 s, so computed on demand."""
        recipe = recipe_metadata(self._base.model.halfbyte_recipe)
        known = ("init_adapter", "chat_template", "rope_scaling")
        more = {name: self._identity[name] for name in known if name in self._identity}
        # An adapter that began with the error of quantisation still holds it.
        begun = more.get("init_adapter", {}).get("init_lora_weights")
        recipe |= {"init_lora_weights": begun or self._config.init_lora_weights}
        return {
            "base": identity_of(self._base),
            "recipe": recipe,
            "removed": removed_modules(self._base.model),
            "fan_in_fan_out": bool(conv1d_weights(self._base.model)),
            "more": more,
        }

    @property
    def resume_command(self) -> str:
        """The command that goes on from the newest checkpoint; for a program, its call."""
        if self._by_program:
            return "fine_tune with the same arguments, and resume=True in the configuration"
        return invocation("train", str(self._config.output / "config.yaml"), "--resume")


class CheckpointWriter:
    """Writes checkpoints one after the other. A context manager, which waits for all on exit.

    Args:
        saved: Called with the path of each written checkpoint, in the thread that calls a method.
        background: Whether to write in a thread; otherwise `write` returns when it is done.
    """

    def __init__(self, saved: Callable[[Path], None], *, background: bool) -> None:
        self._saved, self._background = saved, background
        self._thread = ThreadPoolExecutor(1, "write-checkpoint")
        self._writing: Future[Path] | None = None

    def write(self, checkpoint: Callable[[], Path]) -> None:
        """Call ``checkpoint``, which writes one and returns its path; in the thread, if any.

        Raises:
            OutputError: If the previous one, or without a thread this one, could not be written.
        """
        self.wait()
        self._writing = self._thread.submit(checkpoint)
        if not self._background:
            self.wait()

    def look(self) -> None:
        """Report a checkpoint that has been written since; raises like `wait`, without waiting."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the checkpoint being written.

        Raises:
            OutputError: If it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            self._saved(writing.result())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except HalfbyteError as failed:
            if kind is None:
                raise
            logger.warning("the last checkpoint was not written: %s", failed)
        finally:
            self._thread.shutdown()
