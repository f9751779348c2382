"""The training loop: micro-batches to gradients, clipping, update, and fallbacks on out of memory.

All optimizer steps of halfbyte, including benchmarks and the self-test, run here; no input or
output. The loss of a step is the sum of its token losses divided by the supervised tokens of the
*whole* step, so splitting its examples into micro-batches (1x8, 2x4, 8x1) changes only rounding.

    g ← Σ over micro-batches of d(Σ token losses / N)      N: supervised tokens of the step
    g ← g · min(1, max_grad_norm / ‖g‖)                     norm over all adapters together
    AdamW (Loshchilov and Hutter 2019), learning rate from the schedule; for some parameters other
    rates, or no weight decay (train/parameter_groups.py)

In float16 the loss is scaled, and steps whose gradients overflow are skipped (train/loss_scale.py).
A step that runs out of memory is repeated with further fallbacks (train/step_memory.py); gradients
precede any update.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from halfbyte.config.schema import TrainConfig
from halfbyte.engine.autograd import AutogradEngine
from halfbyte.engine.choose import minimise_router_loss
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.memory_policy import (
    MemoryPlan,
    Shapes,
)
from halfbyte.engine.neftune import EmbeddingNoise, training_step
from halfbyte.engine.packing import Batch
from halfbyte.errors import CheckpointError
from halfbyte.foreign_text import quote
from halfbyte.optim import AdamW
from halfbyte.optim.paging import Paging
from halfbyte.runtime.distributed import PendingSum, ProcessGroup
from halfbyte.train.data_parallel import DataParallel
from halfbyte.train.diagnosis import FailedStep, diverged, raise_nonfinite
from halfbyte.train.loss_scale import LossScale, too_large
from halfbyte.train.parameter_groups import parameter_groups
from halfbyte.train.schedule import Schedule
from halfbyte.train.step_memory import StepMemory, only_said

# Parts are not made smaller than this, since products of fewer rows are inefficient.
SMALLEST_PART = 512

Progress = Callable[[int, int], None]


class StepResult(NamedTuple):
    """The result of a step.

    Attributes:
        loss: Mean token loss.
        grad_norm: Norm of all gradients before clipping.
        learning_rate: Learning rate of A.
        paging: Statistics of paging the optimizer state; None if it is off.
        seconds: From its first operation to the last, including repeated attempts.
        data_seconds: Time to prepare its micro-batches, during which a GPU is busy.
        skipped: Whether the update was skipped, because the loss or a gradient was not finite.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    paging: Paging | None = None
    seconds: float = 0.0
    data_seconds: float = 0.0
    skipped: bool = False


class _Queued(NamedTuple):
    """A step that has been queued on the device; with several processes, up to its update.

    Attributes:
        seen: float32 [2] on the device: loss and gradient norm; not yet known with ``pending``.
        rate: The learning rate.
        began: Start time.
        batches: Its micro-batches.
        pending: The sum over processes that the update waits for.
        unscale: What gradients and loss are multiplied by.
    """

    seen: Tensor
    rate: float
    began: float
    batches: Sequence[Batch]
    pending: PendingSum | None
    unscale: float


class Trainer:
    """Makes optimizer steps.

    `fit` chooses the shapes of parts and the activation policy from the data, `capture` captures
    CUDA graphs; without them steps recompute all they can, eagerly.

    Args:
        engine: Computes gradients.
        parameters: The trained parameters, by name; float32.
        config: Learning rate, betas, clipping, optimizer, memory.
        schedule: The learning rate per step.
        processes: Those of the run; steps are given whole, and each computes its share.

    Attributes:
        parallel: The share of this process.
        memory: What steps keep in memory.
        updating: Whether an update is in progress, so that parameters are partly updated; see
            `is_whole`.
        on_nonfinite: Called with a step whose loss or gradient is not finite, while its gradients
            are there; it raises an error, the default, or the step is left out.
    """

    def __init__(
        self,
        engine: LayerEngine | AutogradEngine,
        parameters: Mapping[str, nn.Parameter],
        config: TrainConfig,
        schedule: Schedule,
        processes: ProcessGroup | None = None,
    ) -> None:
        self.engine, self.parameters, self.schedule = engine, dict(parameters), schedule
        self.config, self.max_grad_norm = config, config.max_grad_norm
        self._captured = self.updating = False
        self.on_nonfinite: Callable[[FailedStep], None] = raise_nonfinite
        self._device = engine.model.device.type
        trained = list(self.parameters.values())
        self.parallel = DataParallel(processes or ProcessGroup(), engine, trained, config)
        self._gradients = self.parallel.gradients
        self.loss_scale = LossScale.wanted(engine.model.halfbyte_recipe.compute_dtype)
        if config.neftune_noise_alpha:
            engine.noise = EmbeddingNoise(engine.model, config.neftune_noise_alpha, config.seed)
        if config.router_aux_loss_coef:
            minimise_router_loss(engine, config.router_aux_loss_coef)
        shared = self.parallel.shared_state()
        groups = parameter_groups(engine.model, self.parameters, config)
        self._names = [name for group in groups for name in group.names]
        self.optimizer = AdamW(
            [
                {
                    "params": [self.parameters[name] for name in group.names],
                    "ratio": group.ratio,
                    "weight_decay": group.weight_decay,
                }
                for group in groups
            ],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            state_bits=config.state_bits,
            paging=config.paging if config.optim.startswith("paged_") else "off",
            shared=shared,
        )
        self.memory = StepMemory(engine, self.optimizer, config, self.clear_gradients)
        self._exchanges = shared is not None
        if self._exchanges:
            self.optimizer.allocate()  # all processes together
        # Without clipping, a layer's update need not wait for the gradients of the others, and
        # transfers of its state overlap with their backward.
        self._early = (
            self.optimizer.paging == "explicit"
            and not self.max_grad_norm
            and self.loss_scale is None
            and self.parallel.processes.size == 1  # otherwise they are final after the sum
        )
        if self._early and isinstance(engine, LayerEngine):
            if engine.captures:
                engine.messages.append(
                    "no CUDA graphs: with explicit paging and no clipping, the host queues each "
                    "layer's update as its gradients are final"
                )
            engine.on_layer_backward = self._update_layer

    def _update_layer(self, layer: int, loss: Tensor) -> None:
        assert isinstance(self.engine, LayerEngine)
        self.updating = True
        scale = torch.ones_like(loss) + 0.0 * loss
        self.optimizer.step_parameters(self.engine.trained[layer], grad_scale=scale)

    # --- before the first step ------------------------------------------------------------------

    def fit(self, shapes: Shapes, lengths: Sequence[Sequence[int]]) -> MemoryPlan:
        """Choose the shapes of parts and the activation policy from a run's steps.

        Args:
            shapes: For each optimizer step, the (B, T) of its micro-batches.
            lengths: For each, the tokens of its examples.

        Raises:
            ConfigError, OutOfMemoryError: As `StepMemory.fit`.
        """
        return self.memory.fit(*self.parallel.shares(shapes, lengths))

    def capture(self, progress: Progress | None = None) -> None:
        """Allocate the optimizer's state, and capture CUDA graphs of all shapes that `fit` chose.

        Raises:
            OutOfMemoryError: If it does not fit into memory, after all fallbacks.
        """
        self._captured = True
        while True:
            try:
                self.optimizer.allocate()
                if isinstance(self.engine, LayerEngine):
                    self.engine.capture(self.memory.policy, progress)
            except RuntimeError as error:
                failed = only_said(error)
            else:
                return
            self.memory.fall_back(0, failed, updating=False)

    def release(self) -> None:
        """Free CUDA graphs and decoded weights, after the last step."""
        self.memory.use(replace(self.memory.policy, decoded=0))

    def free_buffer(self) -> None:
        """Free the buffer that layers are decoded into; only without CUDA graphs, which read it."""
        if isinstance(self.engine, LayerEngine):
            self.engine.weights.keep(self.memory.policy.decoded)

    # --- steps ----------------------------------------------------------------------------------

    def train(
        self,
        steps: Iterable[int],
        batches: Callable[[int], Sequence[Batch]],
        done: Callable[[int, StepResult], None],
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """Make several steps.

        Args:
            steps: Their numbers (0-based).
            batches: Returns the micro-batches of a step. On a GPU it is called for the next step
                while the current one runs.
            done: Called after each step.
            stopped: Asked before each step; if true, no more are made.

        Raises:
            NonFiniteLossError, OutOfMemoryError: As `step`.
        """
        numbers = list(steps)
        waited, given = _timed(batches, numbers[0]) if numbers else (0.0, ())
        for place, number in enumerate(numbers):
            if stopped():
                return
            queued, own, last = self._queue(number, given), waited, place + 1 == len(numbers)
            if not last and self._device == "cuda":  # while the device runs this step
                waited, given = _timed(batches, numbers[place + 1])
            done(number, self._finished(number, queued)._replace(data_seconds=own))
            if not last and self._device != "cuda":
                waited, given = _timed(batches, numbers[place + 1])

    def step(self, step: int, batches: Sequence[Batch]) -> StepResult:
        """Make step ``step`` (0-based).

        Raises:
            NonFiniteLossError: If the loss or gradient is NaN or infinite. No parameter is changed,
                unless layers are updated during backward (explicit paging without clipping) and
                the loss is finite.
            OutOfMemoryError: If it does not fit after all fallbacks. Nothing was updated.
        """
        return self._finished(step, self._queue(step, batches))

    def _queue(self, step: int, batches: Sequence[Batch]) -> _Queued:
        began = time.perf_counter()
        while True:
            try:
                return self._attempt(step, batches, began)
            except RuntimeError as error:
                failed = only_said(error)
            self.memory.fall_back(step, failed, updating=self.updating)
            if self._captured:
                self.capture()

    def _attempt(self, step: int, batches: Sequence[Batch], began: float) -> _Queued:
        share = self.parallel.share(step, batches)
        if self.memory.is_short(share):
            self.optimizer.page_out()
        else:
            self.optimizer.allocate()  # now, since an update in progress cannot be repeated
            self.optimizer.prefetch()
        rate = self.schedule.at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        terms = max(1.0, self.engine.objective.count_terms(batches))
        # In float16 the loss is a sum, scaled; its gradients are divided in float32.
        scale = self.loss_scale
        normaliser = terms if scale is None else 1.0 / scale.factor
        unscale = 1.0 if scale is None else scale.unscale(terms)
        with training_step(self.engine.clock, self.engine.noise, step), self.parallel.timed(step):
            loss = self._gradients.new_zeros(())
            if share:
                loss = self.engine.step(share, normaliser, self.memory.policy)
        pending = self.parallel.begin_sum(loss)
        seen = loss if pending is not None else self._update(loss, unscale)
        return _Queued(seen, rate, began, batches, pending, unscale)

    def _update(self, loss: Tensor, unscale: float) -> Tensor:
        """Queue the update; return the loss and the gradients' norm, float32 [2]."""
        # Queued behind backward, without host reads: a non-finite scale makes the update a no-op.
        loss, norm = loss * unscale, torch.linalg.vector_norm(self._gradients) * unscale
        clip = torch.ones_like(norm)
        if self.max_grad_norm:
            clip = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        scale_of_all, seen = clip * unscale + 0.0 * (loss + norm), torch.stack([loss, norm])
        self.updating = True
        self.optimizer.step(grad_scale=scale_of_all)
        self.updating = self._exchanges  # then parameters are still to be exchanged
        return seen

    def _finished(self, step: int, queued: _Queued) -> StepResult:
        seen = queued.seen
        if queued.pending is not None:
            queued.pending.wait()
            seen = self._update(self.parallel.summed_loss(), queued.unscale)
        loss, norm = seen.tolist()
        self.parallel.read()
        paging, scale = self.optimizer.report(), self.loss_scale
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if self._exchanges and not skipped:  # nothing was updated otherwise
            self.parallel.exchange(self.optimizer.updated_parts())
        self.updating = False
        if skipped and scale is not None and math.isfinite(loss):
            self.engine.messages.append(scale.overflowed(step))
        elif skipped:
            updated = self._early and math.isfinite(loss)
            said = too_large(step) if scale is not None else diverged(step, loss, norm, updated)
            self.on_nonfinite(FailedStep(step, loss, norm, queued.batches, updated, said))
        elif scale is not None:
            scale.updated()
        self.clear_gradients()
        seconds = time.perf_counter() - queued.began
        return StepResult(loss, norm, queued.rate, paging, seconds, skipped=skipped)

    # --- state ----------------------------------------------------------------------------------

    @property
    def is_whole(self) -> bool:
        """Whether parameters and optimizer state are those after a step, and can be saved."""
        return not self.updating and self.optimizer.is_whole

    def progress(self) -> dict[str, Any]:
        """Return the state for a checkpoint other than tensors, as JSON values."""
        return {} if self.loss_scale is None else {"loss_scale": self.loss_scale.state()}

    def load_progress(self, state: Mapping[str, Any]) -> None:
        """Restore what `progress` returned.

        Raises:
            CheckpointError: If it is invalid.
        """
        if self.loss_scale is not None and "loss_scale" in state:
            self.loss_scale.load(state["loss_scale"])

    def clear_gradients(self) -> None:
        """Set the gradients to zero in place."""
        self._gradients.zero_()

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return AdamW's moments and step counts by ``<parameter>.<field>``, on the CPU."""
        return {
            f"{self._names[number]}.{field}": value
            for number, fields in self.optimizer.state_dict()["state"].items()
            for field, value in fields.items()
        }

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what ``optimizer_state`` returned, bit for bit.

        Raises:
            CheckpointError: If a parameter's moments are missing, or have another precision.
        """
        parts = {name: number for number, name in enumerate(self._names)}
        found: dict[int, dict[str, Tensor]] = {number: {} for number in parts.values()}
        for key, value in state.items():
            name, _, field = key.rpartition(".")
            if name not in parts:
                raise CheckpointError(f"the optimizer's state has {quote(key)}, of no parameter")
            found[parts[name]][field] = value
        groups = [{"params": group["params"]} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict({"state": found, "param_groups": groups})
        if self._exchanges:
            self.parallel.processes.barrier()  # nobody changes what another still restores


def _timed(batches: Callable[[int], Sequence[Batch]], step: int) -> tuple[float, Sequence[Batch]]:
    began = time.perf_counter()
    made = batches(step)
    return time.perf_counter() - began, made
