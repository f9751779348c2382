"""Mixtures of experts: the experts of a layer, with packed weights, as transformers calls them.

transformers' expert classes are called with the tokens, the experts that the router chose for each,
and their weights. How they compute is looked up by name in its table of implementations; ours is
one of them. The rows of tokens are sorted by expert, so that each linear is one grouped product
(linear/experts.py), and the results of a token are added in float32, in a fixed order:

    h = x Wᵀ + b         of the expert's gate and up, for each pair of token and chosen expert
    y = gate(h) Wᵀ + b   gate: the class's own activation
    output = Σ y · weight of the router, over the experts of a token

A few classes of older design do the same in their own way, and get a forward of their own here.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from halfbyte.layers.gated_experts import gated_experts
from halfbyte.linear.experts import ExpertLinear
from halfbyte.quant import MXFP4Weight, PackedWeight

NAME = "halfbyte"
"""The name of our implementation in transformers' table."""


class Routing(NamedTuple):
    """Pairs of a token and an expert chosen for it, sorted by expert.

    Attributes:
        order: int64 [pairs]: the pair at each place; pair t · k + i is choice i of token t.
        place: int64 [pairs]: the place of each pair; the inverse of ``order``.
        offsets: int32 [experts + 1]: the first place of each expert, and the one after the last.
    """

    order: Tensor
    place: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, index: Tensor, num_experts: int) -> "Routing":
        """Return the routing of ``index`` [tokens, k]; numbers that are no expert's come last."""
        experts = index.reshape(-1)
        ordered, order = torch.sort(experts, stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        bounds = torch.arange(num_experts + 1, device=index.device, dtype=ordered.dtype)
        return cls(order, place, torch.searchsorted(ordered, bounds, out_int32=True))


class _Permuted(torch.autograd.Function):
    """Rows in another order; backward is the inverse order, deterministic and without atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.inverse), None, None


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Return the sum of the experts' outputs, [tokens, hidden]; a method of transformers' classes.

    Args:
        self: A module whose linears are ``ExpertLinear``s.
        hidden_states: [tokens, hidden].
        top_k_index: Experts of each token, [tokens, k].
        top_k_weights: Their weights, [tokens, k].
    """
    fused = gated_experts(self, hidden_states, top_k_index, top_k_weights)
    if fused is not None:
        return fused
    up = self.gate_up_proj if self.has_gate else self.up_proj
    routing = Routing.of(top_k_index, up.num_experts)
    x = _rows_by_expert(hidden_states, routing)
    expert = None
    if self.has_bias:
        expert = top_k_index.reshape(-1)[routing.order]
    h = _plus(
        up(x, routing.offsets),
        self,
        "gate_up_proj_bias" if self.has_gate else "up_proj_bias",
        expert,
    )
    h = self._apply_gate(h) if self.has_gate else self.act_fn(h)
    y = _plus(self.down_proj(h, routing.offsets), self, "down_proj_bias", expert)
    if getattr(self, "has_post_expert_norm", False):
        y = self.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1, 1)[routing.order]
    return _sum_by_token(y, routing, top_k_index.shape[1]).to(hidden_states.dtype)


def _plus(y: Tensor, module: Any, bias: str, expert: Tensor | None) -> Tensor:
    """Add the bias of each row's expert."""
    return y if expert is None else y + getattr(module, bias)[expert]


def _rows_by_expert(x: Tensor, routing: Routing) -> Tensor:
    """Return the rows [tokens, n] once for each of their experts, sorted by expert."""
    times = len(routing.order) // max(1, len(x))
    rows = x[:, None].expand(-1, times, -1).reshape(len(routing.order), -1)
    return _Permuted.apply(rows, routing.order, routing.place)  # type: ignore[no-any-return, no-untyped-call]


def _sum_by_token(y: Tensor, routing: Routing, k: int) -> Tensor:
    """Return the sum of the ``k`` rows of each token, float32 or wider."""
    rows: Tensor = _Permuted.apply(y, routing.place, routing.order)  # type: ignore[no-untyped-call]
    wide = torch.promote_types(y.dtype, torch.float32)
    return rows.view(-1, k, y.shape[1]).sum(1, dtype=wide)


def _llama4_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """Llama 4: each expert is called with all tokens, most of which the router has set to 0."""
    tokens = len(hidden_states) // self.num_experts
    steps = torch.arange(self.num_experts + 1, device=hidden_states.device, dtype=torch.int32)
    offsets = steps * tokens
    gate, up = self.gate_up_proj(hidden_states, offsets).chunk(2, -1)
    result: Tensor = self.down_proj(up * self.act_fn(gate), offsets)
    return result


def _jetmoe_forward(self: Any, inputs: Tensor, expert_size: Any) -> Tensor:
    """JetMoE: a linear of its own, called with rows sorted by expert and their counts."""
    counts = torch.as_tensor(expert_size, device=inputs.device)
    offsets = nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    result: Tensor = self.weight(inputs, offsets)
    return result


# Classes outside of transformers' table: their linears, whether they are transposed, their forward.
_OTHERS: dict[str, tuple[tuple[str, ...], bool, Callable[..., Tensor]]] = {
    "Llama4TextExperts": (("gate_up_proj", "down_proj"), True, _llama4_forward),
    "JetMoeParallelExperts": (("weight",), False, _jetmoe_forward),
}
_LINEARS = ("gate_up_proj", "up_proj", "down_proj")


def expert_parameters(model: nn.Module) -> dict[str, tuple[nn.Parameter, bool]]:
    """Return the parameters that hold a linear of every expert, by path, and if it is transposed.

    They are [experts, out, in], or [experts, in, out] if transposed.
    """
    found: dict[str, tuple[nn.Parameter, bool]] = {}
    for path, module in model.named_modules():
        for name in _LINEARS if hasattr(module, "is_transposed") else ():
            parameter = module._parameters.get(name)
            if parameter is not None and parameter.dim() == 3:
                found[f"{path}.{name}"] = parameter, bool(module.is_transposed)
        names, transposed, _ = _OTHERS.get(type(module).__name__, ((), False, None))
        for name in names:
            parameter = module._parameters[name]
            assert parameter is not None
            found[f"{path}.{name}"] = parameter, transposed
    return found


def freeze_experts(
    model: PreTrainedModel,
    like: Callable[[str, tuple[int, int], bool], PackedWeight | None],
    dtype: torch.dtype,
) -> None:
    """Replace the experts' parameters of a model on the meta device by ``ExpertLinear``s.

    Args:
        model: The model of transformers; it computes its experts with `experts_forward` afterwards.
        like: Returns a description of the packed weight of an expert, or None if weights are plain,
            given the parameter's path, an expert's (rows, columns) in it, and whether it is
            transposed. A weight in MXFP4 is [out, in] in either case: its blocks are along inputs.
        dtype: dtype of plain weights.
    """
    for path, (parameter, transposed) in expert_parameters(model).items():
        owner, _, name = path.rpartition(".")
        module: Any = model.get_submodule(owner)
        count, rows, columns = parameter.shape
        # PEFT reads this attribute of transformers' class, and Llama 4's has none.
        swaps_factors = transposed and not getattr(module, "is_transposed", False)
        packed = like(path, (rows, columns), transposed)
        if isinstance(packed, MXFP4Weight):
            (rows, columns), transposed = packed.shape, False
        del module._parameters[name]
        linear = ExpertLinear(
            (count, rows, columns), transposed=transposed, like=packed, dtype=dtype
        )
        linear.swaps_factors = swaps_factors
        module.add_module(name, linear)
        if (other := _OTHERS.get(type(module).__name__)) is not None:
            module.forward = MethodType(other[2], module)
        else:
            module.config._experts_implementation = NAME


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
