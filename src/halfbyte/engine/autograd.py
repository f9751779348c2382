"""Optimizer steps under plain autograd over the whole model.

For models that `LayerEngine` does not support. Layers are recomputed in backward where transformers
says that they can be, and each micro-batch decodes all weights. If the model can be restricted to
documents (engine/packing_check.py), those of a micro-batch are packed into a row; not of several,
since the activations and logits of a row exist together.

transformers' own gradient checkpointing depends on a layer being in training mode, in which its
dropout is active and generation has no KV cache. The base model is always in eval mode here, so
the layers are checkpointed by ourselves.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from halfbyte.engine.buckets import UnpaddedParts
from halfbyte.engine.neftune import EmbeddingNoise
from halfbyte.engine.objective import CROSS_ENTROPY, Objective
from halfbyte.engine.packing import Batch, PackedBatch, lengths_of, parts_of, with_first_row
from halfbyte.engine.router_loss import RouterLoss
from halfbyte.layers.packed_row import packed_row
from halfbyte.linear.lora import DropoutClock, dropout_clock
from halfbyte.plan.policy import ActivationPolicy


class AutogradEngine:
    """Runs optimizer steps like `LayerEngine`, one micro-batch at a time.

    Attributes:
        objective: The objective that steps minimise; each micro-batch is a part.
        noise: Added to the embeddings in steps, if asked for.
        router_loss: The routers' auxiliary loss, if it is part of what steps minimise.
        unpadded: How the documents of a micro-batch are packed, if they can be.
        messages: Messages for the user; cleared by the code that logs them.
    """

    name = "plain autograd"
    captures = False
    messages: list[str]
    clock: DropoutClock | None
    noise: EmbeddingNoise | None = None

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.messages = model, []
        self.objective: Objective = CROSS_ENTROPY
        self.unpadded: UnpaddedParts | None = None
        self.router_loss: RouterLoss | None = None
        self.clock = dropout_clock(model)
        if model.supports_gradient_checkpointing:
            for module in model.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    _recompute_in_backward(module)

    def keep_decoded(self, layers: int) -> None:
        """Do nothing: every product decodes its weight."""

    def step(self, batches: Sequence[Batch], normaliser: float, policy: ActivationPolicy) -> Tensor:
        """Add the gradients of one optimizer step; see ``LayerEngine.step``."""
        total = torch.zeros((), dtype=torch.float32, device=self.model.device)
        if (router := self.router_loss) is not None:
            factor = self.objective.count_terms(batches) / normaliser
            router.begin_step(sum(lengths_of(batches)), factor)
        for i, part, first in self._parts(batches, self.objective):
            if self.clock is not None:
                self.clock.micro_batch = i
            if self.noise is not None:
                self.noise.spans = part.spans
            with self._within(part):  # backward recomputes layers
                taking = nullcontext(()) if router is None else router.taking()
                with torch.enable_grad(), taking as router_logits:
                    loss = self._loss(part, first, self.objective) / normaliser
                    if router is not None:
                        router.begin([part])
                        router.count(0, router_logits)
                        term = router.term(0, router_logits)
                        loss = loss + (router.loss() if term is None else term)
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    @torch.no_grad()
    def loss(self, batches: Sequence[Batch], objective: Objective = CROSS_ENTROPY) -> Tensor:
        """Return the loss of ``batches``, summed; see ``LayerEngine.loss``."""
        losses = []
        for _, part, first in self._parts(batches, objective):
            with self._within(part):
                losses.append(self._loss(part, first, objective))
        return torch.stack(losses).sum()

    def _parts(
        self, batches: Sequence[Batch], objective: Objective
    ) -> Iterator[tuple[int, PackedBatch, int]]:
        """Yield (index of the micro-batch, part, index of the micro-batch's first row)."""
        pack = self.unpadded is not None and objective.separable
        for i, (batch, first) in enumerate(with_first_row(batches)):
            rows = batch.documents or range(first, first + len(batch.input_ids))
            parts = parts_of(
                [batch._replace(documents=rows, number=None)],
                self.model.device,
                pack=pack,
                buckets=self.unpadded,
                segments=objective.needs_segments,
            )
            for part in parts:
                yield i if batch.number is None else batch.number, part, first

    def _within(self, part: PackedBatch) -> Any:
        lengths = part.lengths
        return packed_row(lengths) if lengths else nullcontext()

    def _loss(self, part: PackedBatch, first: int, objective: Objective) -> Tensor:
        """Return the loss of a part of a micro-batch whose first row has index ``first``."""
        positions = {} if part.documents is None else {"position_ids": part.positions}
        logits = self.model(input_ids=part.ids, use_cache=False, **positions).logits
        rows = logits.flatten(0, 1).index_select(0, part.rows).float()
        segments = None if part.segments is None else part.segments + first
        return objective.loss_of_logits(rows, part.targets, segments)


def _recompute_in_backward(layer: nn.Module) -> None:
    """Have a layer keep only its inputs for backward, wherever gradients are enabled."""
    forward = type(layer).forward.__get__(layer)  # a second engine does not wrap the first one's

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    layer.forward = checkpointed
