"""The passes over parts of known shapes, captured as CUDA graphs.

Launched from Python, a pass of a 7B model is some thousand launches, and below ten thousand tokens
the GPU waits for the host; a captured pass is one launch. The captured code is the same that runs
without graphs (engine/forward_backward.py).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from halfbyte.engine.buckets import PartShape
from halfbyte.engine.forward_backward import LayerInput, Passes
from halfbyte.plan.policy import ActivationPolicy


class _Captured(NamedTuple):
    """Both passes over a part of one shape, and their static input and output."""

    input: LayerInput
    output: Tensor
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


class CapturedPasses:
    """Runs the passes over parts of known shapes as CUDA graphs.

    All graphs share one memory pool and the same static tensors, since a part is complete when the
    next starts. So they take the memory of the largest, which must be captured first.

    Args:
        passes: The passes to capture. They must not depend on host state that changes.
        parameters: The trained parameters. Gradients are added to the tensors that ``.grad`` holds
            at capture; if these have been replaced, no graph is used.
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
        """Bytes of the static tensors, which the first `to_static` allocates."""
        return sum(tensor.nbytes for tensor in self._static.values())

    def forget(self) -> None:
        """Free all graphs and their memory."""
        self._captured, self._static = {}, {}
        self._pool = torch.cuda.graph_pool_handle()

    def to_static(self, layer_input: LayerInput) -> LayerInput:
        """Return the input with its tensors copied to the static tensors."""
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
            shape: Shape of the part; at most as many tokens as any before.
            static: The part, from `to_static`.
            policy: The activation policy.

        Raises:
            RuntimeError: If they cannot be captured; nothing has been computed then.
        """
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._gradients = [parameter.grad for parameter in self._parameters]
        # The graphs' own pool can use neither memory that eager steps left in the allocator's cache
        # nor the cuBLAS workspaces of their stream.
        torch._C._cuda_clearCublasWorkspaces()
        output = self._static_view("y", static.x)
        self._passes.weights.forget()  # so that what the graphs need is loaded in them
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        try:
            with self._into(forward):
                (hidden,) = self._passes.forward([static], policy)
                output.copy_(hidden)
                del hidden
            # The last output is not read again: its gradient overwrites it.
            with self._into(backward):
                self._passes.backward([static], [output])
        except RuntimeError:
            self._passes.forget()
            self._passes.weights.forget()
            # torch's random number generator is usable again only after a successful capture.
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                torch.zeros(1, device="cuda").add_(1)
            raise
        self._passes.weights.forget()
        self._captured[shape] = _Captured(static, output, forward, backward)

    @contextmanager
    def _into(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """Capture into a graph.

        If memory runs out, the side streams must be joined before the capture is ended: otherwise
        that fails, too, hides the first error and never frees the memory of the graph.
        """
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            try:
                yield
            except RuntimeError:
                for side in self._passes.side_streams:
                    with torch.cuda.stream(side):
                        captured = torch.cuda.is_current_stream_capturing()
                    if captured:
                        torch.cuda.current_stream().wait_stream(side)
                raise

    def has(self, shape: PartShape) -> bool:
        """Return whether there is a graph for parts of this shape."""
        if shape not in self._captured:
            return False
        pairs = zip(self._parameters, self._gradients, strict=True)
        return all(parameter.grad is grad for parameter, grad in pairs)

    def forward(self, shape: PartShape, layer_input: LayerInput) -> Tensor:
        """`Passes.forward`; the result is overwritten by the next part."""
        captured = self._captured[shape]
        _copy(layer_input, captured.input)
        captured.forward.replay()
        self._passes.weights.forget()
        return captured.output

    def backward(self, shape: PartShape, grad: Tensor) -> None:
        """`Passes.backward`, after `forward` of the same part."""
        captured = self._captured[shape]
        captured.output.copy_(grad)
        captured.backward.replay()
        self._passes.weights.forget()

    def _static_view(self, name: str, like: Tensor) -> Tensor:
        """Return a view of a static tensor, allocated with the size of the first request."""
        static = self._static.get(name)
        if static is None:
            static = self._static[name] = torch.zeros_like(like.detach()).flatten()
        return static[: like.numel()].view(like.shape)


def _copy(source: LayerInput, target: LayerInput) -> None:
    for to, tensor in zip(
        (target.x, *target.layer_args), (source.x, *source.layer_args), strict=True
    ):
        to.copy_(tensor.detach())
