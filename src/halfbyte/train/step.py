"""One optimizer step: micro-batches to gradients, clip, update. No input or output.

The loss of a step is the sum of its token losses divided by the supervised tokens of the *whole*
step, so how its examples are split into micro-batches (1x8, 2x4, 8x1) changes nothing but rounding.

    g ← Σ over micro-batches of d(Σ token losses / N)      N: supervised tokens of the step
    g ← g · min(1, max_grad_norm / ‖g‖)                     norm over all adapters together
    AdamW (Loshchilov and Hutter 2019), learning rate from the schedule; for B and magnitudes
    times ``loraplus_lr_ratio`` (LoRA+, Hayou et al. 2024)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from halfbyte.errors import NonFiniteLossError
from halfbyte.train.config import TrainConfig
from halfbyte.train.engine import Batch, LayerEngine, PlainEngine


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
    """What a step measured: mean token loss, gradient norm before clipping, learning rate of A."""

    loss: float
    grad_norm: float
    learning_rate: float


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
        # Gradients are added into memory that is there from the start, so that the first step of a
        # resumed run adds as every other step does.
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            of_b = name.endswith(("lora_B.weight", "lora_magnitude_vector"))
            ratio = config.loraplus_lr_ratio if of_b else 1.0
            groups.setdefault(ratio, []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": members, "ratio": ratio} for ratio, members in groups.items()],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=True,  # one pass over each parameter instead of ten; on CPU as on GPU
        )

    def run(self, step: int, batches: Sequence[Batch], *, saved_layers: int) -> StepResult:
        """Make step ``step`` (0-based).

        Raises:
            NonFiniteLossError: If the loss or the gradient is NaN or infinite; no parameter has
                been changed then.
        """
        supervised = sum(int((batch.labels != -100).sum()) for batch in batches)
        if self.engine.clock is not None:
            self.engine.clock.step, self.engine.clock.running = step, True
        try:
            loss = self.engine.step(batches, float(supervised), saved_layers=saved_layers)
        finally:
            if self.engine.clock is not None:
                self.engine.clock.running = False
        parameters = list(self.parameters.values())
        limit = self.max_grad_norm or math.inf
        norm = nn.utils.clip_grad_norm_(parameters, limit, foreach=True)
        result = StepResult(float(loss), float(norm), self.schedule.at(step))
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            raise NonFiniteLossError(
                f"step {step + 1}: loss {result.loss}, gradient norm {result.grad_norm}. Nothing "
                "was updated. Try a lower learning_rate, or compute_dtype float32"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = result.learning_rate * group["ratio"]
        self.optimizer.step()
        # torch's fused AdamW writes without counting it, and what is derived from A and B (DoRA's
        # norms, their copies on a GPU) is derived anew when the count has changed.
        torch.autograd.graph.increment_version(parameters)
        # Kept, not freed: the next step adds into the same memory.
        self.optimizer.zero_grad(set_to_none=False)
        return result

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return AdamW's moments and step count as flat tensors by ``<parameter>.<field>``."""
        return {
            f"{name}.{field}": value
            for name, parameter in self.parameters.items()
            for field, value in self.optimizer.state.get(parameter, {}).items()
        }

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what ``optimizer_state`` returned, bit for bit.

        Raises:
            KeyError: If a parameter's moments are not in ``state``.
        """
        for name, parameter in self.parameters.items():
            self.optimizer.state[parameter] = {
                "step": state[f"{name}.step"].clone(),
                "exp_avg": state[f"{name}.exp_avg"].to(parameter.device, copy=True),
                "exp_avg_sq": state[f"{name}.exp_avg_sq"].to(parameter.device, copy=True),
            }
