"""The auxiliary loss of routers, which keeps the tokens of a mixture balanced over its experts.

It is that of transformers' ``load_balancing_loss_func`` (Fedus et al. 2021, equations 4 to 6, over
the tokens of all layers together). With F_e, the average number of times that a token is routed to
expert e, and P_e, the average probability that routers give it,

    loss = coefficient · experts · Σ_e F_e · P_e

F is a count and has no gradient. So once it is known, after forward, the loss is a sum over layers:
each adds coefficient · experts · Σ_e F_e · (its part of P_e), whose gradient is computed with the
layer's own. A step of several parts has the average of theirs, weighted by tokens.

Routers are recognised as transformers does to return their logits, and these are taken by hooks.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte.engine.packing import PackedBatch
from halfbyte.errors import ConfigError

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


class RouterLoss:
    """The auxiliary loss of a model's routers in a step.

    Args:
        model: A model of ``models.build``.
        coefficient: Factor of the loss; transformers' configurations call theirs
            ``router_aux_loss_coef``.

    Raises:
        ConfigError: If transformers' model has no such loss.
    """

    def __init__(self, model: PreTrainedModel, coefficient: float) -> None:
        kind, config = type(model), model.config.get_text_config()
        of_module = vars(sys.modules[kind.__module__])
        recorder: Any = (getattr(kind, "_can_record_outputs", None) or {}).get("router_logits")
        experts = next((n for name in _EXPERTS if (n := getattr(config, name, None))), None)
        per_token = getattr(config, "num_experts_per_tok", None)
        if "load_balancing_loss_func" not in of_module or None in (recorder, experts, per_token):
            raise ConfigError(
                f"router_aux_loss_coef: {kind.__name__} has no auxiliary loss of its routers in "
                "transformers; leave it out"
            )
        assert experts is not None
        assert per_token is not None
        self.coefficient, self._experts, self._per_token = coefficient, experts, per_token
        router = getattr(recorder, "target_class", recorder)
        self._output: int = getattr(recorder, "index", 0)
        name: str | None = getattr(recorder, "layer_name", None)
        self._routers = 0
        for path, module in model.named_modules():
            if isinstance(module, router) and (name is None or f".{name}" in f".{path}"):
                module.register_forward_hook(self._take)
                self._routers += 1
        self._logits: list[Tensor] | None = None
        self._tokens, self._factor = 1, 1.0
        self._masks: list[Tensor] = []
        self._routed: list[Tensor] = []
        self._probable: list[Tensor] = []

    def _take(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if self._logits is not None:
            self._logits.append(output[self._output] if isinstance(output, tuple) else output)

    def begin_step(self, tokens: int, factor: float) -> None:
        """Begin a step of so many tokens, the gradients of whose mean loss times ``factor`` add."""
        self._tokens, self._factor = tokens, factor

    def begin(self, parts: Sequence[PackedBatch]) -> None:
        """Begin parts that pass through the layers together."""
        self._masks = []
        for part in parts:
            mask = torch.zeros(part.ids.numel())
            for span in part.spans:
                mask[span.start : span.start + span.tokens] = 1.0
            self._masks.append(mask.to(part.ids.device))
        self._routed = [mask.new_zeros(self._experts) for mask in self._masks]
        self._probable = [mask.new_zeros(self._experts) for mask in self._masks]

    @contextmanager
    def taking(self) -> Iterator[list[Tensor]]:
        """Take the logits [tokens, experts] of the routers that are called within the context."""
        before, self._logits = self._logits, []
        try:
            yield self._logits
        finally:
            self._logits = before

    @torch.no_grad()
    def count(self, part: int, logits: Sequence[Tensor]) -> None:
        """Count where the tokens of a part were routed by some routers."""
        mask = self._masks[part]
        for each in logits:
            probable = self._probabilities(each)
            chosen = probable.topk(self._per_token, dim=-1).indices
            weights = mask.repeat_interleave(self._per_token)
            self._routed[part].index_add_(0, chosen.reshape(-1), weights)
            self._probable[part] += mask @ probable

    def term(self, part: int, logits: Sequence[Tensor]) -> Tensor | None:
        """Return what these routers add to the loss of a part, if that has a gradient."""
        trained = [each for each in logits if each.requires_grad]
        if not trained:
            return None
        mask = self._masks[part]
        sums = torch.stack([mask @ self._probabilities(each) for each in trained]).sum(0)
        return self._of(part, sums)

    def loss(self) -> Tensor:
        """Return the loss of all parts, a float32 scalar, once they are counted."""
        each = [self._of(part, sums) for part, sums in enumerate(self._probable)]
        return torch.stack(each).sum()

    def _probabilities(self, logits: Tensor) -> Tensor:
        probable: Tensor = torch.softmax(logits.reshape(-1, self._experts), -1).float()
        return probable

    def _of(self, part: int, probable: Tensor) -> Tensor:
        """Return the loss of a part from sums of probabilities [experts]."""
        tokens = self._masks[part].sum()
        rows = (tokens * self._routers).clamp(min=1)
        share = self._factor * self.coefficient * tokens / self._tokens
        product = torch.dot(self._routed[part] / rows, probable / rows)
        loss: Tensor = share * self._experts * product
        return loss
