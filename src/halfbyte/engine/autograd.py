"""Optimizer steps under plain autograd over the whole model.

For models that `LayerEngine` does not support. Layers are checkpointed by transformers if it can,
and each micro-batch decodes all weights.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from halfbyte.engine.objective import CROSS_ENTROPY, Objective
from halfbyte.engine.packing import Batch, with_first_row
from halfbyte.linear.lora import DropoutClock, dropout_clock
from halfbyte.plan.policy import ActivationPolicy


class AutogradEngine:
    """Runs optimizer steps like `LayerEngine`, one micro-batch at a time.

    Attributes:
        objective: The objective that steps minimise; each micro-batch is a part.
        messages: Messages for the user; cleared by the code that logs them.
    """

    name = "plain autograd"
    captures = False
    messages: list[str]
    clock: DropoutClock | None

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.messages = model, []
        self.objective: Objective = CROSS_ENTROPY
        self.clock = dropout_clock(model)
        if model.supports_gradient_checkpointing:
            # Renamed in transformers 5.23, where the old name warns.
            newer = getattr(model, "activation_checkpointing_enable", None)
            (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
            for module in model.modules():
                # Checkpointing requires the layer to be in training mode; its submodules (dropout
                # of the base model) stay in eval mode.
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = True

    def keep_decoded(self, layers: int) -> None:
        """Do nothing: every product decodes its weight."""

    def step(self, batches: Sequence[Batch], normaliser: float, policy: ActivationPolicy) -> Tensor:
        """Add the gradients of one optimizer step; see ``LayerEngine.step``."""
        total = torch.zeros((), dtype=torch.float32, device=self.model.device)
        for i, (batch, first) in enumerate(with_first_row(batches)):
            if self.clock is not None:
                self.clock.micro_batch = i
            with torch.enable_grad():
                loss = self._loss(batch, first, self.objective) / normaliser
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    @torch.no_grad()
    def loss(self, batches: Sequence[Batch], objective: Objective = CROSS_ENTROPY) -> Tensor:
        """Return the loss of ``batches``, summed; see ``LayerEngine.loss``."""
        losses = [self._loss(batch, first, objective) for batch, first in with_first_row(batches)]
        return torch.stack(losses).sum()

    def _loss(self, batch: Batch, first: int, objective: Objective) -> Tensor:
        """Return the loss of a micro-batch whose first row has index ``first`` in the step."""
        ids, labels = (tensor.to(self.model.device) for tensor in batch[:2])
        logits = self.model(input_ids=ids, use_cache=False).logits
        supervised = labels != -100
        segments = supervised.nonzero()[:, 0] + first if objective.needs_segments else None
        return objective.loss_of_logits(logits[supervised].float(), labels[supervised], segments)
