"""One optimizer step: micro-batches to gradients, clip, update. No input or output.

The loss of a step is the sum of its token losses divided by the supervised tokens of the *whole*
step, so how its examples are split into micro-batches (1x8, 2x4, 8x1) changes nothing but rounding.

    g ← Σ over micro-batches of d(Σ token losses / N)      N: supervised tokens of the step
    g ← g · min(1, max_grad_norm / ‖g‖)                     norm over all adapters together
    AdamW (Loshchilov and Hutter 2019), learning rate from the schedule; for B and magnitudes
    times ``loraplus_lr_ratio`` (LoRA+, Hayou et al. 2024)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from halfbyte.errors import ConfigError, NonFiniteLossError
from halfbyte.optim import AdamW
from halfbyte.optim.paging import Paging
from halfbyte.train.config import TrainConfig
from halfbyte.train.engine import Batch, LayerEngine, PlainEngine
from halfbyte.train.memory import ActivationPlan


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the step (0-based), as transformers' schedules define it.

    Attributes:
        peak: Highest learning rate.
        kind: ``cosine`` or ``linear`` fall to 0 at ``total_steps``; ``constant`` stays.
        warmup_steps: Steps in which it rises linearly from 0.
        total_steps: Optimizer steps of the run.
    """

    peak: float
    kind: str
    warmup_steps: int
    total_steps: int

    @classmethod
    def of(cls, config: TrainConfig, total_steps: int) -> "Schedule":
        """Return the schedule ``config`` asks for."""
        warmup = config.warmup_steps
        if warmup is None:
            warmup = math.ceil(config.warmup_ratio * total_steps)
        return cls(config.learning_rate, config.lr_scheduler_type, warmup, total_steps)

    def at(self, step: int) -> float:
        """Return the learning rate of the update that ends step ``step``."""
        if step < self.warmup_steps:
            return self.peak * step / max(1, self.warmup_steps)
        if self.kind == "constant":
            return self.peak
        part = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        if self.kind == "linear":
            return self.peak * max(0.0, 1.0 - part)
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, part)))


class StepResult(NamedTuple):
    """What a step measured.

    Attributes:
        loss: Mean token loss.
        grad_norm: Norm of all gradients before clipping.
        learning_rate: That of A.
        paging: What paging the optimizer's state did; None where it is off.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    paging: Paging | None = None


def plan_beside_state(
    plan: Callable[[int], ActivationPlan], optimizer: AdamW
) -> tuple[ActivationPlan, int]:
    """Plan with the optimizer's state on the device; where that cannot be, without what can leave.

    Args:
        plan: Plans, given the bytes of state on the device.
        optimizer: Knows them.

    Returns:
        The plan, and the bytes of state that it does not count.

    Raises:
        ConfigError: If the budget is too small in both cases.
    """
    usual, tight = optimizer.device_bytes(), optimizer.device_bytes(tight=True)
    try:
        return plan(usual), 0
    except ConfigError:
        if tight == usual:
            raise
    return plan(tight), usual - tight


class Tightness:
    """Knows which steps are short of memory, so that the optimizer's state has to leave.

    Args:
        plan: What is kept for backward, and the peak predicted for the largest step.
        used: Bytes in use before the first step.
        shapes: For each step, the (B, T) of its micro-batches.
        beside: Bytes of state that the plan does not count.
    """

    def __init__(
        self,
        plan: ActivationPlan,
        used: int,
        shapes: Sequence[Sequence[tuple[int, int]]],
        beside: int = 0,
    ) -> None:
        self._room = plan.budget - used - beside
        self._largest = plan.predicted_bytes - used
        self._tokens = max(sum(b * t for b, t in step) for step in shapes)

    def __call__(self, batches: Sequence[Batch]) -> bool:
        """Return whether a step needs more than there is: what it takes grows with its tokens."""
        tokens = sum(batch.input_ids.numel() for batch in batches)
        return self._largest * tokens > self._room * self._tokens


def _side_by_side(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Give each parameter a gradient of zeros, all in one tensor, and return that.

    Gradients are added into memory that is there from the start, so that the first step of a
    resumed run adds as every other step does. Together, their norm is one reduction, and setting
    them to zero is one launch instead of hundreds. Each begins at a multiple of 256 bytes.
    """
    sizes = [-(-parameter.numel() // 64) * 64 for parameter in parameters]
    together = torch.zeros(sum(sizes), dtype=torch.float32, device=parameters[0].device)
    for parameter, part in zip(parameters, torch.split(together, sizes), strict=True):
        parameter.grad = part[: parameter.numel()].view_as(parameter)
    return together


class Stepper:
    """Holds the optimizer and makes steps with it.

    Args:
        engine: Computes gradients.
        parameters: What is trained, by name; float32.
        config: Learning rate, betas, clipping.
        schedule: The learning rate per step.
    """

    def __init__(
        self,
        engine: LayerEngine | PlainEngine,
        parameters: Mapping[str, nn.Parameter],
        config: TrainConfig,
        schedule: Schedule,
    ) -> None:
        self.engine, self.parameters, self.schedule = engine, dict(parameters), schedule
        self.max_grad_norm = config.max_grad_norm
        self._gradients = _side_by_side(list(self.parameters.values()))
        groups: dict[float, list[str]] = {}
        for name in self.parameters:
            of_b = name.endswith(("lora_B.weight", "lora_magnitude_vector"))
            groups.setdefault(config.loraplus_lr_ratio if of_b else 1.0, []).append(name)
        self._names = [name for members in groups.values() for name in members]
        self.optimizer = AdamW(
            [
                {"params": [self.parameters[name] for name in members], "ratio": ratio}
                for ratio, members in groups.items()
            ],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            state_bits=8 if config.optim.endswith("8bit") else 32,
            paging=config.paging if config.optim.startswith("paged_") else "off",
        )
        # Without clipping, a layer's update need not wait for the others' gradients, and its state
        # goes to the card and back beside their backward.
        self._early = self.optimizer.paging == "explicit" and not self.max_grad_norm
        if self._early and isinstance(engine, LayerEngine):
            engine.finished = self._update_layer
            if engine.captures:
                engine.notes.append(
                    "no CUDA graphs: with explicit paging and no clipping, the host queues each "
                    "layer's update as its gradients are final"
                )

    def _update_layer(self, layer: int, loss: Tensor) -> None:
        assert isinstance(self.engine, LayerEngine)
        scale = torch.ones_like(loss) + 0.0 * loss
        self.optimizer.step_parameters(self.engine.trained[layer], grad_scale=scale)

    def run(
        self,
        step: int,
        batches: Sequence[Batch],
        *,
        saved_layers: int,
        offloaded_layers: int = 0,
        notes: bool = False,
        tight: bool = False,
    ) -> StepResult:
        """Make step ``step`` (0-based).

        Args:
            step: Its number.
            batches: Its micro-batches.
            saved_layers: As for the engine.
            offloaded_layers: Likewise.
            notes: Likewise.
            tight: Whether memory is short, so that paged state leaves the device until the update.

        Raises:
            NonFiniteLossError: If the loss or the gradient is NaN or infinite; no parameter has
                been changed then, unless layers are updated while backward is under way (explicit
                paging without clipping).
        """
        if tight:
            self.optimizer.page_out()
        else:
            self.optimizer.prefetch()
        rate = self.schedule.at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        supervised = sum(int((batch.labels != -100).sum()) for batch in batches)
        if self.engine.clock is not None:
            self.engine.clock.step, self.engine.clock.running = step, True
        try:
            loss = self.engine.step(
                batches,
                float(supervised),
                saved_layers=saved_layers,
                offloaded_layers=offloaded_layers,
                notes=notes,
            )
        finally:
            if self.engine.clock is not None:
                self.engine.clock.running = False
        # Norm, clipping and update are queued behind backward, and only then does the host look: an
        # update whose scale is not finite changes nothing.
        norm = torch.linalg.vector_norm(self._gradients)
        scale = torch.ones_like(norm)
        if self.max_grad_norm:
            scale = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        self.optimizer.step(grad_scale=scale + 0.0 * (loss + norm))
        seen = torch.stack([loss, norm]).tolist()
        result = StepResult(seen[0], seen[1], rate, self.optimizer.report())
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            changed = "Some layers were updated" if self._early else "Nothing was updated"
            raise NonFiniteLossError(
                f"step {step + 1}: loss {result.loss}, gradient norm {result.grad_norm}. "
                f"{changed}. Try a lower learning_rate, or compute_dtype float32"
            )
        self.clear_gradients()
        return result

    def clear_gradients(self) -> None:
        """Set the gradients to zero where they are: the next step adds into the same memory."""
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
            CheckpointError: If a parameter's moments are not in ``state``, or are of another width.
        """
        parts = {name: number for number, name in enumerate(self._names)}
        found: dict[int, dict[str, Tensor]] = {number: {} for number in parts.values()}
        for key, value in state.items():
            name, _, field = key.rpartition(".")
            found[parts[name]][field] = value
        groups = [{"params": group["params"]} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict({"state": found, "param_groups": groups})
