"""Optimizer steps under plain autograd over the whole model.

For the models `LayerEngine` cannot take apart. Layers are checkpointed by transformers where it
can, and each micro-batch decodes the weights anew.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from halfbyte.engine.packing import Batch
from halfbyte.linear.lora import DropoutClock, dropout_clock
from halfbyte.plan.policy import ActivationPolicy


class AutogradEngine:
    """Runs optimizer steps as `LayerEngine` does, one micro-batch at a time."""

    name = "plain autograd"
    captures = False
    messages: list[str]
    clock: DropoutClock | None

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.messages = model, []
        self.clock = dropout_clock(model)
        if model.supports_gradient_checkpointing:
            # Renamed in transformers 5.23; the older name warns there.
            newer = getattr(model, "activation_checkpointing_enable", None)
            (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
            for module in model.modules():
                # Checkpointing asks the layer whether it trains; what is inside it (dropout of the
                # base model) stays in eval mode.
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = True

    def keep_decoded(self, layers: int) -> None:
        """Do nothing: here every product decodes its weight."""

    def step(self, batches: Sequence[Batch], normaliser: float, policy: ActivationPolicy) -> Tensor:
        """Add the gradients of one optimizer step; see ``LayerEngine.step``."""
        total = torch.zeros((), dtype=torch.float32, device=self.model.device)
        for i, batch in enumerate(batches):
            if self.clock is not None:
                self.clock.micro_batch = i
            with torch.enable_grad():
                loss = self._loss(batch) / normaliser
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    @torch.no_grad()
    def loss(self, batches: Sequence[Batch]) -> Tensor:
        """Return the summed token loss of ``batches``; no gradients."""
        return torch.stack([self._loss(batch) for batch in batches]).sum()

    def _loss(self, batch: Batch) -> Tensor:
        ids, labels = (tensor.to(self.model.device) for tensor in batch[:2])
        logits = self.model(input_ids=ids, use_cache=False).logits
        supervised = labels != -100
        return nn.functional.cross_entropy(
            logits[supervised].float(), labels[supervised], reduction="sum"
        )
