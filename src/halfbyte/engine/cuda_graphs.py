"""The passes over parts of known shapes, captured as CUDA graphs.

Launched from Python, a pass of a 7B model is some thousand launches, and the GPU waits for the host
below ten thousand tokens; captured ahead, it is one. What is captured is what is run without graphs
(engine/forward_backward.py): there is no other code for it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from halfbyte.engine.buckets import PartShape
from halfbyte.engine.forward_backward import LayerInput, Passes
from halfbyte.plan.policy import ActivationPolicy


class _Captured(NamedTuple):
    """Both passes over a part of one shape, their input and their output, which are static."""

    input: LayerInput
    output: Tensor
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


class CapturedPasses:
    """Runs the passes over parts of known shapes as CUDA graphs.

    All graphs share one pool of memory, and read from and write to the same few tensors: one part
    is done when the next begins. So they take what the largest takes. It has to be captured first.

    Args:
        passes: What is captured. Nothing in it may depend on what the host knows at the time.
        parameters: What is trained. Gradients are added to the very tensors that ``.grad`` are
            when a shape is captured; if they have been replaced since, no graph is used.
    """

    def __init__(self, passes: Passes, parameters: Sequence[nn.Parameter]) -> None:
        self._passes, self._parameters = passes, list(parameters)
        self._captured: dict[PartShape, _Captured] = {}
        self._static: dict[str, Tensor] = {}
        self._gradients: list[Tensor | None] = []
        self._pool = torch.cuda.graph_pool_handle()

    def __len__(self) -> int:
        return len(self._captured)

    @property
    def nbytes(self) -> int:
        """Bytes of the static tensors; there are none before the first `to_static`."""
        return sum(tensor.nbytes for tensor in self._static.values())

    def forget(self) -> None:
        """Let go of all graphs, and of their memory."""
        self._captured, self._static = {}, {}
        self._pool = torch.cuda.graph_pool_handle()

    def to_static(self, layer_input: LayerInput) -> LayerInput:
        """Return the input with its tensors copied to where graphs read them."""
        layer_args = tuple(
            self._static_view(f"layer argument {i}", t)
            for i, t in enumerate(layer_input.layer_args)
        )
        static = LayerInput(self._static_view("x", layer_input.x), layer_args, layer_input.run)
        _copy(layer_input, static)
        return static

    def capture(self, shape: PartShape, static: LayerInput, policy: ActivationPolicy) -> None:
        """Capture the passes over a part.

        Args:
            shape: Of the part; of no more tokens than any before.
            static: The part, by `to_static`.
            policy: What is kept.

        Raises:
            RuntimeError: If they cannot be captured; nothing has been computed then.
        """
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._gradients = [parameter.grad for parameter in self._parameters]
        # What eager steps left in the allocator's cache is of no use to the graphs' own pool, nor
        # are the workspaces cuBLAS has in their stream.
        torch._C._cuda_clearCublasWorkspaces()
        output = self._static_view("y", static.x)
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(forward, pool=self._pool, capture_error_mode="thread_local"):
                (hidden,) = self._passes.forward([static], policy)
                output.copy_(hidden)
                del hidden
            # Nobody reads the last output any more: its gradient takes its place.
            with torch.cuda.graph(backward, pool=self._pool, capture_error_mode="thread_local"):
                self._passes.backward([static], [output])
        except RuntimeError:
            self._passes.forget()
            # torch's random numbers go on only after a capture that ends well.
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                torch.zeros(1, device="cuda").add_(1)
            raise
        self._captured[shape] = _Captured(static, output, forward, backward)

    def has(self, shape: PartShape) -> bool:
        """Return whether there is a graph for parts of this shape."""
        if shape not in self._captured:
            return False
        pairs = zip(self._parameters, self._gradients, strict=True)
        return all(parameter.grad is grad for parameter, grad in pairs)

    def forward(self, shape: PartShape, layer_input: LayerInput) -> Tensor:
        """As `Passes.forward`; the next part writes over the result."""
        captured = self._captured[shape]
        _copy(layer_input, captured.input)
        captured.forward.replay()
        return captured.output

    def backward(self, shape: PartShape, grad: Tensor) -> None:
        """As `Passes.backward`, after `forward` of the same part."""
        captured = self._captured[shape]
        captured.output.copy_(grad)
        captured.backward.replay()

    def _static_view(self, name: str, like: Tensor) -> Tensor:
        """Return a view of a static tensor, which is made as large as the first that asks."""
        static = self._static.get(name)
        if static is None:
            static = self._static[name] = torch.zeros_like(like.detach()).flatten()
        return static[: like.numel()].view(like.shape)


def _copy(source: LayerInput, target: LayerInput) -> None:
    for to, tensor in zip(
        (target.x, *target.layer_args), (source.x, *source.layer_args), strict=True
    ):
        to.copy_(tensor.detach())
