"""Cross-entropy over an output head, without the logits of the whole sequence.

For hidden states h [S, H] of the supervised positions only, a head W [V, H] and targets [S], the
loss is a sum, not a mean: the caller divides by the supervised tokens of the whole optimizer step,
so that 1x8, 2x4 and 8x1 sequences give the same gradient.

    z = h Wᵀ;  loss = Σ logsumexp(z) − z[target];  dL/dz = softmax(z) − onehot;  dL/dh = dL/dz W

The gradient is computed in forward, one chunk of rows at a time, and overwrites the logits: at most
``CHUNK_BYTES`` of logits exist at any time. Softmax and sum are float32 whatever the dtype of the
products; on a GPU one kernel does everything between the two products, in their dtype
(layers/triton_elementwise.py). If the head is trained, dL/dW = dL/dzᵀ h is accumulated over the
chunks in float32.

`head_logps` returns log p = z[target] − logsumexp(z) of each position, for losses other than their
sum. In dL/dh, the derivative with respect to a position's log p scales its row, so the rows are
also computed in forward, and scaled in backward. dL/dW mixes positions: if the head is trained,
logits are recomputed in backward.

A packed head is also decoded in pieces of ``CHUNK_BYTES``, once for the logits of a chunk of rows
and once for their gradient.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from halfbyte.layers.vocabulary import pieces
from halfbyte.quant import QuantizedWeight
from halfbyte.quant.format import gpu_kernels
from halfbyte.runtime.matmul import product

# 32 MB of float32 logits: 170 rows of a 49k vocabulary, 65 rows of a 128k one. On a GPU the
# product needs more rows to be efficient: 128 MB of logits there, 2000 rows of a 32k vocabulary in
# bfloat16, 500 of a 128k one.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 128 << 20}


def _chunk_bytes(device: torch.device) -> int:
    return CHUNK_BYTES.get(device.type, 32 << 20)


def _chunk_rows(vocabulary: int, device: torch.device, itemsize: int = 4) -> int:
    return max(16, _chunk_bytes(device) // (itemsize * vocabulary))


def _logits(hidden: Tensor, head: Tensor | QuantizedWeight) -> Tensor:
    """Return h Wᵀ, float32 [S, V]."""
    if isinstance(head, Tensor):
        return product(hidden, head).float()
    logits = hidden.new_empty(len(hidden), head.shape[0], dtype=torch.float32)
    for start, piece in pieces(head, hidden.dtype, _chunk_bytes(hidden.device)):
        logits[:, start : start + len(piece)] = product(hidden, piece)
    return logits


def _gradient(d_logits: Tensor, head: Tensor | QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Return dL/dh [S, H] for dL/dz float32 [S, V]."""
    if isinstance(head, Tensor):
        return product(d_logits.to(dtype), head.t())
    total = d_logits.new_zeros(len(d_logits), head.shape[1])
    for start, piece in pieces(head, dtype, _chunk_bytes(d_logits.device)):
        total += product(d_logits[:, start : start + len(piece)].to(dtype), piece.t())
    return total


def _kernels(hidden: Tensor, head: Tensor | QuantizedWeight) -> Any:
    """The Triton kernels, or None where the plain version runs."""
    plain = not hidden.is_cuda or hidden.dtype == torch.float32 or not isinstance(head, Tensor)
    if plain or gpu_kernels() is None:
        return None
    from halfbyte.layers import triton_elementwise

    return triton_elementwise


def _fused_chunk(
    hidden: Tensor,
    head: Tensor | QuantizedWeight,
    targets: Tensor,
    softcap: float,
    grad: Tensor | None,
    _weight_grad: Tensor | None,
    _factors: Tensor | None,
) -> Tensor:
    """`_chunk` with one kernel between the products."""
    from halfbyte.layers.triton_elementwise import (
        cross_entropy_forward_backward,  # it imports triton
    )

    assert isinstance(head, Tensor)
    logits = torch.mm(hidden, head.t())
    losses = cross_entropy_forward_backward(logits, targets, softcap, with_grad=grad is not None)
    if grad is not None:
        torch.mm(logits, head, out=grad)
    return losses


def _chunk(
    hidden: Tensor,
    head: Tensor | QuantizedWeight,
    targets: Tensor,
    softcap: float,
    grad: Tensor | None,
    weight_grad: Tensor | None,
    factors: Tensor | None,
) -> Tensor:
    """Return the loss of each row of a chunk.

    The gradient of their sum, weighted by ``factors`` if given, is written to ``grad`` and added to
    ``weight_grad``.
    """
    logits, wanted = _logits(hidden, head), targets[:, None]
    if softcap:
        logits.div_(softcap).tanh_().mul_(softcap)
    normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
    losses = (normaliser - logits.gather(1, wanted))[:, 0]
    if grad is not None or weight_grad is not None:
        slope = 1.0 - (logits / softcap).square_() if softcap else None
        logits.sub_(normaliser).exp_()
        logits.scatter_add_(1, wanted, logits.new_full((1, 1), -1.0).expand_as(wanted))
        if slope is not None:
            logits.mul_(slope)
        if factors is not None:
            logits.mul_(factors[:, None])
        if grad is not None:
            grad.copy_(_gradient(logits, head, hidden.dtype))
        if weight_grad is not None:
            weight_grad += product(logits.to(hidden.dtype).t(), hidden.t())
    return losses


def _chunks(
    hidden: Tensor,
    head: Tensor | QuantizedWeight,
    targets: Tensor,
    softcap: float,
    grad: Tensor | None,
    weight_grad: Tensor | None,
    factors: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield the result of `_chunk` for each chunk of rows."""
    fused = _kernels(hidden, head) if weight_grad is None and factors is None else None
    step = _fused_chunk if fused is not None else _chunk
    size = hidden.element_size() if fused is not None else 4
    rows = _chunk_rows(head.shape[0], hidden.device, size)
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        yield step(
            hidden[part],
            head,
            targets[part],
            softcap,
            None if grad is None else grad[part],
            weight_grad,
            None if factors is None else factors[part],
        )


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor | QuantizedWeight,
        targets: Tensor,
        softcap: float,
        trained: Tensor | None,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        need_grad, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
        grad = torch.empty_like(hidden) if need_grad else None
        weight_grad = torch.zeros_like(trained) if trained is not None and need_weight else None
        for losses in _chunks(hidden, head, targets, softcap, grad, weight_grad):
            total += losses.sum()
        ctx.save_for_backward(grad, weight_grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        by_hidden, by_weight = (
            None if grad is None else _times(grad, grad_outputs[0]) for grad in ctx.saved_tensors
        )
        return by_hidden, None, None, None, by_weight


class _HeadLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor | QuantizedWeight,
        targets: Tensor,
        softcap: float,
        trained: Tensor | None,
    ) -> Tensor:
        need_grad, ctx.need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
        grad = torch.empty_like(hidden) if need_grad and not ctx.need_weight else None
        none = hidden.new_empty(0, dtype=torch.float32)
        losses = torch.cat([none, *_chunks(hidden, head, targets, softcap, grad, None)])
        # Either the rows of the gradient, or the inputs to recompute them from.
        ctx.save_for_backward(*((hidden, targets) if ctx.need_weight else (grad,)))
        ctx.head, ctx.softcap = head, softcap
        return losses.neg_()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        factors = -grad_outputs[0]  # the rows are gradients of −log p
        if not ctx.need_weight:
            return _times(ctx.saved_tensors[0], factors), None, None, None, None
        hidden, targets = ctx.saved_tensors
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_grad = hidden.new_zeros(ctx.head.shape, dtype=torch.float32)
        for _ in _chunks(hidden, ctx.head, targets, ctx.softcap, grad, weight_grad, factors):
            pass
        return grad, None, None, None, weight_grad


def _times(grad: Tensor, factor: Tensor) -> Tensor:
    """Return grad · factor in the dtype of ``grad``; a float32 scalar, or one factor per row.

    In float16 a factor such as 1 / tokens would be subnormal, with few bits left: there the product
    is computed in float32 and rounded once, as for factors of rows. torch converts a scalar to the
    dtype of ``grad`` first, but not a vector.
    """
    if grad.dtype != torch.float16 and not factor.dim():
        return grad * factor.to(grad.dtype)
    return torch.mul(grad, factor.view(-1, 1), out=torch.empty_like(grad))


def head_loss(
    hidden: Tensor,
    head: Tensor | QuantizedWeight,
    targets: Tensor,
    *,
    softcap: float = 0.0,
    trained: Tensor | None = None,
) -> Tensor:
    """Return the sum of the token losses, a float32 scalar.

    Args:
        hidden: [S, H], the final hidden states of the supervised positions.
        head: [V, H], weight of the output head; dtype of ``hidden``, or packed. Gets no gradient.
        targets: int64 [S], the token each position should predict.
        softcap: Gemma's cap c on the logits, z ← c·tanh(z / c); 0 for none.
        trained: float32 [V, H], the weight ``head`` is cast from if trained; it gets the gradient.
    """
    return _apply(_HeadLoss, hidden, head, targets, softcap, trained)


def head_logps(
    hidden: Tensor,
    head: Tensor | QuantizedWeight,
    targets: Tensor,
    *,
    softcap: float = 0.0,
    trained: Tensor | None = None,
) -> Tensor:
    """Return the log-probability of each target, float32 [S].

    Arguments and memory are those of `head_loss`. If the head is trained, logits are recomputed in
    backward, which takes one more product.
    """
    return _apply(_HeadLogps, hidden, head, targets, softcap, trained)


def _apply(
    function: type[torch.autograd.Function],
    hidden: Tensor,
    head: Tensor | QuantizedWeight,
    targets: Tensor,
    softcap: float,
    trained: Tensor | None,
) -> Tensor:
    if not torch.is_grad_enabled():  # not visible inside a Function
        hidden, trained = hidden.detach(), None
    result: Tensor = function.apply(hidden, head, targets, softcap, trained)  # type: ignore[no-untyped-call]
    return result
