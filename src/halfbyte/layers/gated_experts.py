"""The experts of a layer with a gated activation, as one operation on a GPU.

    forward     inner = glu(x[token] W_gate_upᵀ + b)      y = Σ w · (inner W_downᵀ + b) over slots
    backward    h is recomputed from x; d_inner₀ = dy[token] W_down
                dh, d_w from h, d_inner₀ and w            dx = Σ dh W_gate_up over slots

Neither sorted copies of x and dy nor what is inside the experts is kept: only x, the routing and
its weights. inner, d_inner₀ and h have the rows of all experts, or where few experts are decoded at
a time, of these only. The kernels are those of linear/triton_experts.py; nothing waits for the GPU,
so it can be captured in a CUDA graph. Separate operations (experts.py) are the specification, and
run everywhere else.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, product
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from halfbyte.linear.experts import ExpertLinear, expert_kernels
from halfbyte.linear.glu import Glu

# Some layers of these look up a token's experts in a table of the files.
_ROUTED_BY_TABLE = {"DeepseekV4Experts"}


class _Experts(NamedTuple):
    """What a module of transformers consists of.

    Attributes:
        up: Gate and up.
        down: Down.
        up_bias: [E, 2 I], or None.
        down_bias: [E, H], or None.
        glu: The activation.
        distinct: Whether a token's experts differ from each other.
    """

    up: ExpertLinear
    down: ExpertLinear
    up_bias: Tensor | None
    down_bias: Tensor | None
    glu: Glu
    distinct: bool = True


# Classes of layers, run by their own forward, that only add what their experts return to the
# output: no gradient depends on its values (tests/layers/test_gated_experts.py).
_LAST_IN = {
    *("GptOssDecoderLayer", "OlmoeDecoderLayer", "DeepseekV3DecoderLayer", "Glm4MoeDecoderLayer"),
}

_activations: WeakKeyDictionary[nn.Module, Glu | None] = WeakKeyDictionary()
_read = True


@contextmanager
def outputs_unread() -> Iterator[None]:
    """Within it, outputs of experts are placeholders of 0 with the same backward.

    For the recomputation of a layer of which the experts are the last operation.
    """
    global _read
    before, _read = _read, False
    try:
        yield
    finally:
        _read = before


def ends_with_experts(layer: nn.Module) -> bool:
    """Return whether `outputs_unread` may be used for the recomputation of a layer."""
    return type(layer).__name__ in _LAST_IN


def gated_experts(module: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor | None:
    """Return the sum of the experts' outputs, [tokens, hidden], or None if it is not supported.

    Args:
        module: A module of transformers whose linears are ``ExpertLinear``s.
        x: [tokens, hidden].
        index: Experts of each token, [tokens, k].
        weights: Their weights, [tokens, k].
    """
    if expert_kernels(x) is None or (experts := _experts_of(module)) is None:
        return None
    return _GatedExperts.apply(x, index, weights, experts, _read)  # type: ignore[no-any-return, no-untyped-call]


def _experts_of(module: Any) -> _Experts | None:
    """Return the parts of a module, or None if its computation is not that of this file."""
    if not module.has_gate or getattr(module, "has_post_expert_norm", False):
        return None
    up, down, glu = module.gate_up_proj, module.down_proj, glu_of(module)
    # In columns, gate and up would have to be interleaved to be in one tile.
    if glu is None or up.adapter or down.adapter or (up.transposed and not glu.interleaved):
        return None
    biases = [module.gate_up_proj_bias, module.down_proj_bias] if module.has_bias else []
    if any(bias.requires_grad for bias in biases):
        return None
    up_bias, down_bias = biases or (None, None)
    distinct = type(module).__name__ not in _ROUTED_BY_TABLE
    return _Experts(up, down, up_bias, down_bias, glu, distinct)


def glu_of(module: Any) -> Glu | None:
    """Return the activation that a module's ``_apply_gate`` computes, or None if it is another.

    It is called with numbers, once for each module, and the result compared with that of candidates
    that have the module's constants.
    """
    if module not in _activations:
        _activations[module] = _recognised(module)
    return _activations[module]


def _recognised(module: Any) -> Glu | None:
    act = getattr(module, "act_fn", None)
    if isinstance(act, nn.Module) and any(True for _ in chain(act.parameters(), act.buffers())):
        return None  # it depends on more than h
    limits, slopes = _numbers(module, "limit", "swiglu_limit"), _numbers(module, "alpha")
    farthest = 2 * max(10.0, *limits, 0.0)  # beyond every limit
    numbers = torch.linspace(-farthest, farthest, 82, dtype=torch.float64, device="cpu")
    h = torch.stack([numbers, numbers.roll(29)])
    result = module._apply_gate(h)
    constants = product((False, True), (None, *limits), (1.0, *slopes), (0.0, 1.0))
    for glu in (Glu(*one) for one in constants):
        if torch.allclose(glu(h), result, rtol=1e-9, atol=0.0):
            return glu
    return None


def _numbers(module: Any, *names: str) -> list[float]:
    found = (getattr(module, name, None) for name in names)
    return [float(value) for value in found if isinstance(value, int | float)]


def _blocks(
    experts: _Experts, index: Tensor, dtype: torch.dtype
) -> tuple[list[tuple[int, int]], int]:
    """Return ranges of experts, each processed from x to the slots, and the most rows of one.

    The most probable experts of a token are distinct, so n experts have at most n rows for each
    token. If at least as many are decoded at a time as a token chooses, ranges would save no rows,
    and all experts are one; likewise if a token may have an expert twice.
    """
    up, down = experts.up, experts.down
    tokens, per_token = index.shape
    count = min(up.at_a_time(dtype), down.at_a_time(dtype))
    if count >= per_token or not experts.distinct:
        count = up.num_experts
    starts = range(0, up.num_experts, count)
    blocks = [(start, min(start + count, up.num_experts)) for start in starts]
    return blocks, tokens * min(count, per_token)


class _GatedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, weights: Tensor, experts: _Experts, read: bool
    ) -> Tensor:
        kernels, (up, down, up_bias, down_bias, glu, _) = expert_kernels(x), experts
        x, index, weights = x.contiguous(), index.contiguous(), weights.contiguous()
        routing = kernels.routing_of(index, up.num_experts)
        ctx.experts, ctx.sizes = experts, routing[4:]
        ctx.save_for_backward(x, index, weights, *routing[:4])
        if not read:
            return x.new_zeros(1, 1).expand(len(x), down.out_features)
        blocks, rows = _blocks(experts, index, x.dtype)
        inner = x.new_empty(rows, down.in_features)
        slots = x.new_empty(index.numel(), down.out_features)
        flags = {"transposed": not up.transposed, "gather": True, "bias": up_bias, "glu": glu}
        others = {"transposed": not down.transposed, "scatter": True, "bias": down_bias}
        for start, stop in blocks:
            for first, weight in up.decoded(x.dtype, start, stop):
                kernels.grouped_product(x, weight, routing, first, inner, base=start, **flags)
                del weight  # its memory is freed before that for the next linear is allocated
            for first, weight in down.decoded(x.dtype, start, stop):
                kernels.grouped_product(
                    inner, weight, routing, first, slots, base=start, row_scale=weights, **others
                )
                del weight
        return kernels.sum_over_k(slots, index, up.num_experts)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, index, weights, *tensors = ctx.saved_tensors
        kernels, (up, down, up_bias, down_bias, glu, _) = expert_kernels(x), ctx.experts
        routing, dy, slots = kernels.Routing(*tensors, *ctx.sizes), grads[0].contiguous(), None
        blocks, rows = _blocks(ctx.experts, index, x.dtype)
        d_inner, h = (x.new_empty(rows, n) for n in (down.in_features, up.out_features))
        d_weights = torch.zeros(index.shape, dtype=torch.float32, device=x.device)
        if ctx.needs_input_grad[0]:
            slots = x.new_empty(index.numel(), up.in_features)
        others = {"transposed": down.transposed, "gather": True}
        flags = {"transposed": not up.transposed, "gather": True, "bias": up_bias}
        to_slots = {"transposed": up.transposed, "scatter": True}
        for start, stop in blocks:
            for first, weight in down.decoded(x.dtype, start, stop):
                kernels.grouped_product(dy, weight, routing, first, d_inner, base=start, **others)
                del weight
            for first, weight in up.decoded(x.dtype, start, stop):
                kernels.grouped_product(x, weight, routing, first, h, base=start, **flags)
                args = (h, d_inner, d_weights, weights, routing, first, len(weight), glu)
                kernels.gated_backward(*args, base=start)
                if slots is not None:
                    kernels.grouped_product(
                        h, weight, routing, first, slots, base=start, **to_slots
                    )
                del weight
        dx = None if slots is None else kernels.sum_over_k(slots, index, up.num_experts)
        if down_bias is not None:
            known = index.clamp(0, up.num_experts - 1)
            of_bias = torch.mm(dy, down_bias.t().to(dy.dtype)).gather(1, known)
            d_weights += of_bias.where((index >= 0) & (index < up.num_experts), 0)
        return dx, None, d_weights.to(weights.dtype), None, None
