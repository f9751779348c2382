"""The forward and backward pass over the layers.

    forward     layer by layer: keep tensors for backward according to an `ActivationPolicy`
    backward    last layer first: recompute what is missing, run the layer's own small autograd
                graph, pass the gradient to the previous layer

If only the input of every n-th layer is kept, backward of the last of n layers computes the inputs
of these n again, which are then on the device together.

The loss is computed in between, and its shapes differ from step to step. The passes themselves have
few shapes (engine/buckets.py) and can be captured as CUDA graphs (engine/cuda_graphs.py).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from halfbyte.engine.offload import ActivationOffloader
from halfbyte.engine.router_loss import RouterLoss
from halfbyte.engine.weights import WeightProvider, acquired
from halfbyte.layers.decoder_layer import AttentionCheckpoint
from halfbyte.plan.policy import ActivationPolicy


class Run(Protocol):
    """Calls a layer on a part."""

    def __call__(
        self,
        layer: int,
        x: Tensor,
        layer_args: tuple[Tensor, ...],
        *,
        read: bool,
        checkpoint: AttentionCheckpoint | None = None,
    ) -> Tensor:
        """Return the layer's output [B, T, hidden]; ``read``: whether its values are read."""


class LayerInput(NamedTuple):
    """A part, as passed to the layers.

    Attributes:
        x: The input of layer 0, [B, T, hidden].
        layer_args: Further tensor arguments of layers.
        run: Calls a layer.
    """

    x: Tensor
    layer_args: tuple[Tensor, ...]
    run: Run


@dataclass
class _Kept:
    """Tensors that a layer keeps for backward, for one part.

    Attributes:
        x: Its input, unless that is offloaded.
        y: The autograd edge of its output, if the layer is saved. Not the output itself, as the
            last layer's would be kept unnecessarily.
        lora_activations: x Aᵀ of its adapters, which is not recomputed.
        checkpoint: Its attention checkpoint, whose tensors are offloaded together with x.
        router_logits: What its routers returned, if it is saved and their loss is minimised.
    """

    x: Tensor | None = None
    y: GradientEdge | None = None
    lora_activations: Mapping[Any, Tensor] = field(default_factory=dict)
    checkpoint: AttentionCheckpoint | None = None
    router_logits: Sequence[Tensor] = ()

    def pop_tensors(self) -> list[Tensor]:
        """Return the tensors to offload, and drop them here."""
        assert self.x is not None
        tensors, self.x = [self.x.detach()], None
        if self.checkpoint is not None:
            tensors += self.checkpoint.tensors
            self.checkpoint.tensors = []
        return tensors

    def set_tensors(self, tensors: list[Tensor], *, requires_grad: bool) -> None:
        """Restore the tensors of `pop_tensors`; ``requires_grad`` is that of the input."""
        x, *rest = tensors
        self.x = x.requires_grad_(requires_grad)
        if self.checkpoint is not None:
            self.checkpoint.tensors = rest


class Passes:
    """Runs both passes.

    Args:
        trained: The trained parameters of each layer.
        first_trained: The first layer that backward has to reach.
        entry_trained: Whether the input of layer 0 requires a gradient.
        weights: Provides the weights of layers.

    Attributes:
        weights: As given; can be replaced between steps.
        router_loss: The routers' auxiliary loss, if it is part of what steps minimise.
        before_layer: Called before each layer, in both passes, and by the engine before the loss;
            not when CUDA graphs are replayed.
    """

    def __init__(
        self,
        trained: Sequence[Sequence[nn.Parameter]],
        first_trained: int,
        entry_trained: bool,
        weights: WeightProvider,
    ) -> None:
        self.layers, self._trained = len(trained), [list(those) for those in trained]
        self.first_trained, self.entry_trained = first_trained, entry_trained
        self.weights = weights
        self.router_loss: RouterLoss | None = None
        self.before_layer: Callable[[], None] = lambda: None
        self._kept: list[list[_Kept]] = []
        self._every, self._sparse = 1, 0
        self._offloader: ActivationOffloader | None = None

    def forward(self, layer_inputs: Sequence[LayerInput], policy: ActivationPolicy) -> list[Tensor]:
        """Return the last layer's output for each part, detached."""
        hidden = [layer_input.x for layer_input in layer_inputs]
        first_saved = max(self.layers - policy.saved, self.first_trained)
        offloaded = min(policy.offloaded, first_saved)
        self._every, self._sparse = policy.every, offloaded or first_saved
        self._kept = []
        for index in range(self.layers):
            row: list[_Kept] = []
            requires_grad = self.entry_trained or index > self.first_trained
            saved, dropped = index >= first_saved, index != self._base(index)
            self.before_layer()
            # Backward begins with the layer that forward ends with, as it is.
            forward_only = index + 1 < self.layers
            with acquired(self.weights, index, forward_only=forward_only) as lora_cache:
                if index + 1 < self.layers:
                    self.weights.prefetch(index + 1)
                for i, layer_input in enumerate(layer_inputs):
                    x = hidden[i].detach().requires_grad_(requires_grad)
                    if not saved and policy.every == 1:
                        lora_cache.record()
                    checkpoint = None
                    if self.first_trained <= index < offloaded and policy.checkpoints(index):
                        checkpoint = AttentionCheckpoint()
                    with torch.set_grad_enabled(saved), self._routers() as logits:
                        y = layer_input.run(
                            index, x, layer_input.layer_args, read=True, checkpoint=checkpoint
                        )
                    edge = get_gradient_edge(y) if saved else None
                    row.append(_Kept(None if dropped else x, edge, lora_cache.pop(), checkpoint))
                    if self.router_loss is not None:
                        self.router_loss.count(i, logits)
                        row[-1].router_logits = logits if saved else ()
                    hidden[i] = y.detach()
            if index < self.first_trained:
                continue
            if index < offloaded and not dropped:
                self._offloader = self._offloader or ActivationOffloader()
                self._offloader.offload(
                    index, [kept.pop_tensors() for kept in row], beside=policy.leaving - 1
                )
            elif self._offloader is not None:
                self._offloader.wait()
            self._kept.append(row)
        if self._offloader is not None:
            self._offloader.wait()
        return hidden

    def backward(
        self,
        layer_inputs: Sequence[LayerInput],
        grads: list[Tensor],
        on_layer_backward: Callable[[int], None] | None = None,
    ) -> None:
        """Compute gradients of `forward`'s inputs from those of its outputs, in place.

        Gradients of trained parameters are added to ``.grad``; ``on_layer_backward`` is called with
        the index of a layer once its gradients are final.
        """
        self._prefetch(self.layers - 1)
        for index in reversed(range(self.first_trained, self.layers)):
            row = self._kept.pop()
            if row[0].x is None:
                self._restore(index, row, layer_inputs)
            self._prefetch(self._base(index - 1))
            self.before_layer()
            # The last layer of forward is the first of backward.
            again = index == self.layers - 1
            with acquired(self.weights, index, again=again) as lora_cache:
                if index > self.first_trained:
                    self.weights.prefetch(index - 1)
                for i, layer_input in enumerate(layer_inputs):
                    kept = row[i]
                    output: Tensor | GradientEdge | None = kept.y
                    x, logits = kept.x, kept.router_logits
                    assert x is not None
                    if output is None:
                        lora_cache.restore(kept.lora_activations)
                        with torch.enable_grad(), self._routers() as logits:
                            output = layer_input.run(
                                index,
                                x,
                                layer_input.layer_args,
                                read=False,
                                checkpoint=kept.checkpoint,
                            )
                    leaves = [x] * x.requires_grad + self._trained[index]
                    # In this thread, as another would have its own cuBLAS workspace.
                    outputs: Any = [output]
                    dys = [grads[i]]
                    if self.router_loss is not None:
                        with torch.enable_grad():
                            term = self.router_loss.term(i, logits)
                        if term is not None:
                            outputs, dys = [output, term], [grads[i], torch.ones_like(term)]
                    with torch.autograd.set_multithreading_enabled(False):
                        found = torch.autograd.grad(outputs, leaves, dys, allow_unused=True)
                    del output, outputs, dys, logits
                    gradients = dict(zip(leaves, found, strict=True))
                    del found
                    if x.requires_grad:
                        grads[i] = gradients.pop(x)
                    _accumulate(gradients)
                    row[i] = _Kept()
            if on_layer_backward is not None:
                on_layer_backward(index)

    def _routers(self) -> AbstractContextManager[Sequence[Tensor]]:
        return nullcontext(()) if self.router_loss is None else self.router_loss.taking()

    def _base(self, index: int) -> int:
        """Return the layer whose input a layer's is computed from: itself, if its own is kept."""
        if index >= self._sparse or index < self.first_trained:
            return index
        return index - (index - self.first_trained) % self._every

    def _restore(
        self, index: int, row: Sequence[_Kept], layer_inputs: Sequence[LayerInput]
    ) -> None:
        """Restore the inputs of a layer, and of those between it and the one whose are kept."""
        base = self._base(index)
        rows = [*self._kept[base - self.first_trained : index - self.first_trained], row]
        if rows[0][0].x is None:
            assert self._offloader is not None
            requires_grad = self.entry_trained or base > self.first_trained
            for kept, tensors in zip(rows[0], self._offloader.get(base), strict=True):
                kept.set_tensors(tensors, requires_grad=requires_grad)
        for layer in range(base, index):
            self.before_layer()
            with acquired(self.weights, layer, forward_only=True), torch.no_grad():
                for i, layer_input in enumerate(layer_inputs):
                    x = rows[layer - base][i].x
                    assert x is not None
                    y = layer_input.run(layer, x, layer_input.layer_args, read=True)
                    rows[layer - base + 1][i].x = y.requires_grad_()

    def warm_up(self, layer_input: LayerInput, policy: ActivationPolicy, *, whole: bool) -> None:
        """Run both passes on a part, with zero gradients.

        After it, every kernel is compiled, the addresses of all weights are on the device and, if
        layers are offloaded, host memory is allocated, as capture requires.

        Args:
            layer_input: The part.
            policy: The activation policy.
            whole: Whether to run all layers. After that, two layers suffice for another shape: the
                first, whose input may not require a gradient, and another, recomputed and, if the
                policy saves any, saved.
        """
        if whole or self.first_trained or self.layers <= 2:
            self._run(layer_input, policy)
            return
        few = Passes(self._trained[:2], 0, self.entry_trained, self.weights)
        for saved in {0, min(2, policy.saved)}:  # saving more might not fit into memory
            few._run(layer_input, ActivationPolicy(saved))

    def _run(self, layer_input: LayerInput, policy: ActivationPolicy) -> None:
        (y,) = self.forward([layer_input], policy)
        grad = torch.zeros_like(y)
        del y
        self.backward([layer_input], [grad])

    @property
    def side_streams(self) -> list[torch.cuda.Stream]:
        """The streams on which the passes copy beside the current one."""
        offloader = [] if self._offloader is None else [self._offloader.side_stream]
        return [*self.weights.side_streams, *offloader]

    def forget(self) -> None:
        """Free what `forward` has kept, if no `backward` follows."""
        self._kept = []
        self._offloader = None

    def _prefetch(self, index: int) -> None:
        if self._offloader is not None and index >= self.first_trained:
            self._offloader.prefetch(index)


def _accumulate(gradients: Mapping[Tensor, Tensor | None]) -> None:
    """Add gradients to ``.grad``, all of a layer in one operation instead of one by one."""
    olds, news = [], []
    for parameter, new in gradients.items():
        if new is None:
            continue
        if parameter.grad is None:
            parameter.grad = new.contiguous()
        else:
            olds.append(parameter.grad)
            news.append(new)
    if olds:
        torch._foreach_add_(olds, news)
