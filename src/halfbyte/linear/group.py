"""The products of frozen linears: decode the weight, multiply, free the decoded weight.

For a frozen weight W [out, in], an optional bias b and an optional trained low-rank update
(A [r, in], B [out, r], scaling s; LoRA, Hu et al. 2021, eq. 3), over x [..., in]:

    forward     y  = x Wᵀ + b + s · (x̃ Aᵀ) Bᵀ                x̃ = dropout(x), or x itself
    backward    dx = dy W + s · dropout'((dy B) A)
                dA = s · (dy B)ᵀ x̃          dB = s · dyᵀ (x̃ Aᵀ)          no dW: W is frozen

A single ``autograd.Function`` does this, for three reasons that separate operations cannot offer. W
is decoded from 4 bits in forward and again in backward, and not kept in between. x is saved once
for base and adapter. And linears that are called with the same x (q, k, v; gate, up) are one
product: x is read once, and dx is not written for each and summed. ``LinearGroup`` is such a set; a
single linear is a set of one.

There are three implementations. A few rows without gradients (generation) are multiplied with the
packed weight on GPUs that support it. Training on a GPU uses fused_lora.py, which combines linears
and adapters of one input. Everything else is decoding and torch's products.

Backward needs the inputs of a product, not its output. So when a layer is recomputed for backward,
its last product can be skipped (`FrozenLinear.unread`). And x Aᵀ, which requires reading all of x,
is so narrow that it is kept from the first forward when all other activations are recomputed
(`OpenLayer`).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from halfbyte.linear.decoded_weight import DENSE, DecodedWeight, WeightLayout
from halfbyte.linear.fp8 import FP8
from halfbyte.linear.fp8_lora import Fp8LoraLinear
from halfbyte.linear.fused_lora import FusedLoraLinear, LowRank
from halfbyte.quant.format import gpu_kernels
from halfbyte.quant.weight import QuantizedWeight
from halfbyte.runtime.matmul import product

# Products of base and adapter together on a GPU, by layout.
_FUSED: dict[WeightLayout, type[FusedLoraLinear]] = {DENSE: FusedLoraLinear, FP8: Fp8LoraLinear}
# Maximum number of linears with one input in triton_lora.py.
_MOST_TOGETHER = 3


class _Member(Protocol):
    """The interface of a linear as used by products; see `frozen.FrozenLinear`."""

    in_features: int
    out_features: int
    bias: Tensor | None
    adapter: Any
    group: "LinearGroup"
    layout: WeightLayout

    @property
    def device(self) -> torch.device: ...
    @property
    def quantized(self) -> QuantizedWeight | None: ...
    def opened(self, dtype: torch.dtype) -> DecodedWeight | None: ...
    def decode(self, dtype: torch.dtype) -> Tensor: ...


class _GroupProduct(torch.autograd.Function):
    """The products at the top of this file, for linears that share x.

    Returns y [rows, out] of each, which may be changed in place (OLMo's clipping): they are no
    views, except of the fused product of several.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        group: "LinearGroup",
        updates: tuple[LowRank | None, ...],
        gradients: bool,
        read: bool,
        *_factors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        rows, members = x.reshape(-1, x.shape[-1]), group.members
        trained = any(update is not None for update in updates)
        fused = group.fused(rows, updates)
        ctx.shape = x.shape
        if fused is not None and not gradients and _packed_is_faster(rows, members):
            fused = None
        p: list[Tensor | None]
        if fused is not None:
            x_a = fused.into_a(rows)
            p = [x_a]
            if read:
                y = fused.forward(rows, x_a)
                ys = [y] if len(members) == 1 else list(torch.split(y, group.outputs, 1))
        elif read:
            ys, p = _plain_forward(rows, group, updates, gradients)
        else:
            p = [_into_a(rows, update) for update in updates]
        if not read:
            ys = [x.new_zeros(1, 1).expand(len(rows), out) for out in group.outputs]
        for y, member in zip(ys, members, strict=True):
            if read and member.bias is not None:
                y.add_(member.bias.to(x.dtype))
        ctx.group, ctx.fused, ctx.pairs = group, fused, len(p)
        ctx.scalings = [update and update.scaling for update in updates]
        ctx.set_materialize_grads(False)
        factors = [tensor for u in updates for tensor in (u and u.a, u and u.b, u and u.keep)]
        ctx.save_for_backward(rows if trained else None, *p, *factors)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, *saved = ctx.saved_tensors
        p, factors = saved[: ctx.pairs], saved[ctx.pairs :]
        updates = [
            None if scaling is None else LowRank(a, b, scaling, keep)
            for scaling, a, b, keep in zip(
                ctx.scalings, factors[0::3], factors[1::3], factors[2::3], strict=True
            )
        ]
        if all(dy is None for dy in grad_outputs):
            return (None,) * len(ctx.needs_input_grad)
        backward = _plain_backward if ctx.fused is None else _fused_backward
        dx, gradients = backward(ctx, rows, p, updates, grad_outputs)
        if dx is not None:
            dx = dx.reshape(ctx.shape)
        return dx, None, None, None, None, *gradients


def _into_a(rows: Tensor, update: LowRank | None) -> Tensor | None:
    """Return x̃ Aᵀ [rows, r]."""
    if update is None:
        return None
    dropped = rows if update.keep is None else rows * update.keep.reshape(rows.shape)
    return product(dropped, update.a.to(rows.dtype))


def _plain_forward(
    rows: Tensor,
    group: "LinearGroup",
    updates: Sequence[LowRank | None],
    gradients: bool,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return y and x̃ Aᵀ of each linear; the update is added to the base's product."""
    if not gradients and _packed_is_faster(rows, group.members):
        ys = _packed_products(rows, group.members)
    else:
        ys = [weight.layout.product(rows, weight) for weight in group.weights(rows.dtype)]
    p: list[Tensor | None] = []
    for y, update in zip(ys, updates, strict=True):
        x_a = _into_a(rows, update)
        if update is not None:
            assert x_a is not None
            y.addmm_(x_a, update.b.to(rows.dtype).t(), alpha=update.scaling)
        p.append(x_a)
    return ys, p


def _packed_is_faster(rows: Tensor, members: Sequence[_Member]) -> bool:
    """Return whether x Wᵀ is faster without decoding W for all of the linears."""
    if not rows.is_cuda or gpu_kernels() is None:
        return False
    if any(member.opened(rows.dtype) is not None for member in members):
        return False
    from halfbyte.linear import triton_gemv

    packed = [member.quantized for member in members]
    return all(q is not None and triton_gemv.can_multiply(rows, q) for q in packed)


def _packed_products(rows: Tensor, members: Sequence[_Member]) -> list[Tensor]:
    """Return x Wᵀ of each linear without decoding W."""
    from halfbyte.linear import triton_gemv

    packed = [member.quantized for member in members]
    return [triton_gemv.small_product(rows, q) for q in packed if q is not None]


def _plain_backward(
    ctx: Any,
    rows: Tensor,
    p: Sequence[Tensor | None],
    updates: Sequence[LowRank | None],
    dys: Sequence[Tensor | None],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return dx, and dA and dB of each linear."""
    needs = ctx.needs_input_grad
    dx: Tensor | None = None
    gradients: list[Tensor | None] = []
    given = next(dy for dy in dys if dy is not None)
    weights = ctx.group.weights(given.dtype) if needs[0] else [None] * len(dys)
    for i, (dy, update, weight) in enumerate(zip(dys, updates, weights, strict=True)):
        needs_a, needs_b = needs[5 + 2 * i : 7 + 2 * i]
        d_a = d_b = None
        if dy is not None and weight is not None:
            dx = weight.layout.input_gradient(dy, weight, dx)
        if dy is not None and update is not None:
            a, b, scaling, keep = update
            keep = None if keep is None else keep.reshape(rows.shape)
            if needs[0] or needs_a:
                dy_b = product(dy, b.to(dy.dtype).t())
                if needs_a:
                    dropped = rows if keep is None else rows * keep
                    d_a = product(dy_b.t(), dropped.t()).to(a.dtype).mul_(scaling)
                if dx is not None and keep is None:
                    dx.addmm_(dy_b, a.to(dy.dtype), alpha=scaling)
                elif dx is not None and keep is not None:
                    dx.addcmul_(torch.mm(dy_b, a.to(dy.dtype)), keep, value=scaling)
            x_a = p[i]
            if needs_b and x_a is not None:
                d_b = torch.mm(dy.t(), x_a).to(b.dtype).mul_(scaling)
        gradients += [d_a, d_b]
    return dx, gradients


def _fused_backward(
    ctx: Any,
    rows: Tensor,
    p: Sequence[Tensor],
    updates: Sequence[LowRank | None],
    dys: Sequence[Tensor | None],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """`_plain_backward` with fused_lora.py."""
    whole = []
    for dy, out in zip(dys, ctx.fused.outputs, strict=True):
        if dy is None:  # this output was not used
            dy = rows.new_zeros(rows.shape[0], out)
        whole.append(dy if dy.stride(1) == 1 else dy.contiguous())
    return ctx.fused.backward(whole, rows, p[0], dx=ctx.needs_input_grad[0])  # type: ignore[no-any-return]


class _Waiting(NamedTuple):
    """Outputs that have been computed but not yet requested, and their inputs."""

    x: Tensor
    version: int
    gradients: bool
    outputs: dict[_Member, Tensor]

    def fits(self, linear: _Member, x: Tensor) -> bool:
        """Return whether they contain the current output of ``linear`` for x."""
        made = (self.version, self.gradients) == (x._version, torch.is_grad_enabled())
        return self.x is x and made and linear in self.outputs


class LinearGroup:
    """Linears called in sequence with the same x, which are computed as one product.

    The call of the first computes the outputs of all, and the calls of the others return theirs.
    Whether x is the same is checked on every call. A group whose members were called with different
    inputs is dissolved: its linears are computed separately from then on.

    Args:
        members: The linears, in the order of their calls.

    Attributes:
        outputs: Rows of each weight.
        open_layer: The open decoder layer that contains the members, or None.
    """

    def __init__(self, members: Sequence[_Member]) -> None:
        self.members = tuple(members)
        self.outputs = [member.out_features for member in members]
        self.open_layer: OpenLayer | None = None
        self._waiting: _Waiting | None = None
        self._proven = False
        for member in members:
            member.group = self

    def output(self, linear: _Member, x: Tensor, *, read: bool = True) -> Tensor:
        """Return y [..., out] of one member for x [..., in]; see `FrozenLinear.unread`."""
        if not read and len(self.members) == 1:
            return self._products(x, read=False)[0]
        waiting, self._waiting = self._waiting, None
        if waiting is not None and waiting.fits(linear, x):
            y = waiting.outputs.pop(linear)
            if waiting.outputs:
                self._waiting = waiting
            else:
                self._proven = True
            return y
        if waiting is not None and not self._proven:
            for member in self.members:
                LinearGroup([member]).open_layer = self.open_layer
            return linear.group.output(linear, x)
        ys = dict(zip(self.members, self._products(x), strict=True))
        y = ys.pop(linear)
        if ys:
            self._waiting = _Waiting(x, x._version, torch.is_grad_enabled(), ys)
        return y

    def forget(self) -> None:
        """Free outputs that were not requested, e.g. after an interrupted forward."""
        self._waiting = None

    def _products(self, x: Tensor, *, read: bool = True) -> tuple[Tensor, ...]:
        updates = tuple(
            None if member.adapter is None else member.adapter.update(x) for member in self.members
        )
        gradients = torch.is_grad_enabled()  # always False inside forward
        ys = _GroupProduct.apply(x, self, updates, gradients, read, *factors_of(updates))  # type: ignore[no-untyped-call]
        return tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in ys)

    def weights(self, dtype: torch.dtype) -> list[DecodedWeight]:
        """Return W [out, in] of each for ``dtype``, cached or decoded together."""
        opened = [weight for member in self.members if (weight := member.opened(dtype))]
        if len(opened) == len(self.members):
            return opened
        return list(decode_together(self.members, dtype).values())

    def fused(self, x: Tensor, updates: Sequence[LowRank | None]) -> FusedLoraLinear | None:
        """Return the fused products for x [..., in], or None if they do not support x."""
        given = [update for update in updates if update is not None]
        if not given or any(update.keep is not None for update in given):
            return None
        if len(self.members) > _MOST_TOGETHER or not _for_kernels(x):
            return None
        layout = self.members[0].layout
        if layout not in _FUSED or any(member.layout is not layout for member in self.members):
            return None
        return _FUSED[layout](self, updates, x.dtype)

    def fused_alone(self, x: Tensor, members: Sequence[_Member]) -> FusedLoraLinear | None:
        """Return `fused` for callers that fuse more than the calls of ``members`` with x.

        Also None if these are not the members of the group, or if the output is more than the
        products: with a bias, dropout or DoRA's norms.
        """
        if self.members != tuple(members):
            return None
        updates: list[LowRank | None] = []
        for member in members:
            adapter = member.adapter
            if member.bias is not None or (adapter and (adapter.rescales or adapter.drops)):
                return None
            updates.append(None if adapter is None else LowRank(*adapter.factors))
        return self.fused(x, updates)

    def cast_adapters(self, dtype: torch.dtype) -> Any:
        """Return the adapters as `triton_lora.CastAdapters`, cast once while a layer is open."""
        if self.open_layer is not None and self in self.open_layer.groups:
            return self.open_layer.cast_adapters(self, dtype)
        return _cast_adapters_of([self], dtype)[self]

    @property
    def has_lora_activation(self) -> bool:
        """Whether x Aᵀ of the next call was restored from a forward with the same input."""
        return self.open_layer is not None and self in self.open_layer.restored

    def into_a(self, rows: Tensor, cast_adapters: Any) -> Tensor:
        """Return x Aᵀ [rows, members · rank], restored or computed.

        Args:
            rows: x [rows, in].
            cast_adapters: The adapters, as `cast_adapters` returns them.
        """
        layer = self.open_layer
        p = None if layer is None else layer.restored.pop(self, None)
        if p is None:
            p = torch.mm(rows, cast_adapters.a.t())
        if layer is not None and self in layer.recorded:
            layer.recorded[self].append(p)
        return p

    def _pairs(self) -> list[tuple[Tensor, Tensor, float] | None]:
        """Return A, B and s of each member, or None."""
        return [
            None if member.adapter is None else member.adapter.factors for member in self.members
        ]


class OpenLayer:
    """State shared by the products of a decoder layer while a `DecodedWeightCache` holds it open.

    The groups of its linears refer to it from `open` to `close`. It holds everything that is valid
    only in between: decoded weights, adapters cast for the products, and x Aᵀ, passed from one
    forward of the layer to another with the same input. To pass x Aᵀ, the caller takes what one
    forward of a part recorded, holds it, and restores it right before the other forward. Only
    `FusedLoraLinear` records; otherwise the result is empty.

    Args:
        weights: W [out, in] of each linear, decoded.
        dtype: dtype of the products.

    Attributes:
        weights: As given.
        dtype: As given.
        groups: The groups of the linears at the time of opening. If one is dissolved, its
            successors use the weights and nothing else.
        restored: x Aᵀ [rows, members · rank] for the next call of a group.
        recorded: x Aᵀ computed by groups since `record`; empty if not recording.
    """

    def __init__(self, weights: Mapping[Any, DecodedWeight], dtype: torch.dtype) -> None:
        self.weights, self.dtype = weights, dtype
        self.groups: list[LinearGroup] = list(dict.fromkeys(m.group for m in weights))
        self.restored: dict[LinearGroup, Tensor] = {}
        self.recorded: dict[LinearGroup, list[Tensor]] = {}
        self._cast_adapters: dict[LinearGroup, Any] = {}

    def open(self) -> None:
        """Attach it to the groups of its linears."""
        for linear in self.weights:
            linear.group.open_layer = self

    def close(self) -> None:
        """Detach it from all groups and free its tensors."""
        for group in (*self.groups, *(linear.group for linear in self.weights)):
            group.open_layer = None
        self.weights, self.restored, self.recorded, self._cast_adapters = {}, {}, {}, {}

    def cast_adapters(self, group: LinearGroup, dtype: torch.dtype) -> Any:
        """Return the adapters of a group; those of all groups are cast once for all micro-batches.

        They are kept only while the layer is open: an optimizer may change adapters undetected
        (torch's fused AdamW does not increment the version counter), and products with stale ones
        would be silently wrong.
        """
        if group not in self._cast_adapters:
            self._cast_adapters = _cast_adapters_of(self.groups, dtype)
        return self._cast_adapters[group]

    def record(self) -> None:
        """Start to record x Aᵀ of the groups."""
        self.recorded = {group: [] for group in self.groups}

    def pop(self) -> dict[LinearGroup, Tensor]:
        """Return x Aᵀ [rows, members · rank] by group, as recorded since `record`, and stop.

        Keyed by group, because one may be dissolved before the layer is recomputed. Groups called
        with several inputs are left out, since their calls cannot be told apart.
        """
        recorded, self.recorded = self.recorded, {}
        return {group: made[0] for group, made in recorded.items() if len(made) == 1}

    def restore(self, taken: Mapping[LinearGroup, Tensor]) -> None:
        """Have the next call of each group reuse x Aᵀ of an earlier call with the same input."""
        self.restored = {group: taken[group] for group in self.groups if group in taken}


def _cast_adapters_of(groups: Sequence[LinearGroup], dtype: torch.dtype) -> dict[LinearGroup, Any]:
    """Return the adapters of each group that has any, as `triton_lora.CastAdapters`."""
    from halfbyte.linear.triton_lora import Factors, cast_adapters_of  # it imports triton

    pairs = {group: group._pairs() for group in groups}
    pairs = {group: own for group, own in pairs.items() if any(own)}
    factors = [Factors(own, g.outputs, g.members[0].in_features) for g, own in pairs.items()]
    return dict(zip(pairs, cast_adapters_of(factors, dtype), strict=True))


def factors_of(updates: Sequence[LowRank | None]) -> list[Tensor | None]:
    """Return A and B of each in turn, which autograd must see as inputs of a product."""
    return [tensor for u in updates for tensor in ((u.a, u.b) if u else (None, None))]


def _for_kernels(x: Tensor) -> bool:
    """Return whether the device and dtype of x are supported by the GPU kernels."""
    sixteen = x.dtype in (torch.bfloat16, torch.float16)
    return x.is_cuda and sixteen and gpu_kernels() is not None


def decode_together(
    linears: Sequence[_Member],
    dtype: torch.dtype,
    outs: Mapping[Any, Any] | None = None,
    *,
    forward_only: bool = False,
) -> dict[Any, DecodedWeight]:
    """Return W [out, in] of each for products in ``dtype``, decoded together per layout.

    Args:
        linears: Linears on one device.
        dtype: dtype of the products.
        outs: Destination of each packed weight; see `WeightLayout.decode`.
        forward_only: Likewise.
    """
    weights: dict[Any, Any] = dict.fromkeys(linears)  # in their order
    packed: dict[WeightLayout, dict[_Member, QuantizedWeight]] = {}
    for linear in linears:
        if (q := linear.quantized) is None:
            # A plain weight in the dtype of the products is used in place.
            weights[linear] = linear.layout.from_dense(linear.decode(dtype))
        else:
            packed.setdefault(linear.layout, {})[linear] = q
    for layout, held in packed.items():
        places = None if outs is None else [outs[linear] for linear in held]
        decoded = layout.decode(list(held.values()), dtype, places, forward_only=forward_only)
        weights.update(zip(held, decoded, strict=True))
    return weights
