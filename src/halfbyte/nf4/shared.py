"""The products of frozen linears: decode the weight, multiply, forget the decoded weight.

For a frozen weight W [out, in], an optional bias b and an optional trained low-rank update
(A [r, in], B [out, r], scaling s; LoRA, Hu et al. 2021, eq. 3), over x [..., in]:

    forward     y  = x Wᵀ + b + s · (x̃ Aᵀ) Bᵀ                x̃ = dropout(x), or x itself
    backward    dx = dy W + s · dropout'((dy B) A)
                dA = s · (dy B)ᵀ x̃          dB = s · dyᵀ (x̃ Aᵀ)          no dW: W is frozen

One ``autograd.Function`` does all of it, because three things follow that a chain of plain
operations cannot have. W is decoded from 4 bits in forward and again in backward, and is not kept
in between. x is kept once for the base and the adapter together. And linears that are called with
the same x (q, k, v; gate, up) are one product: x is read once, and dx is not written for each and
added up. ``SharedInput`` is such a set; a linear alone is a set of one.

There are three ways to the same numbers. A few rows without gradients (generation) are multiplied
with the packed weight on a GPU that can. Training on a GPU goes through gpu_products.py, which
takes linears and adapters of one input together. All else is decoding and torch's products.

Backward wants nothing of a product but what went into it. So the last product of a layer that is
run again for its backward alone need not be made (`FrozenLinear.unread`). And x Aᵀ, for which all
of x is read, is so narrow that it is kept from the first run where all else is forgotten
(`ThinProducts`).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from halfbyte.matmul import product
from halfbyte.nf4.format import dequantize_all, gpu_kernels

if TYPE_CHECKING:
    from halfbyte.nf4.linear import FrozenLinear

# Linears of one input that gpu_adapters.py can take together.
_MOST_TOGETHER = 3


class LowRank(NamedTuple):
    """A trained update s·B·A of a frozen weight, as one product sees it.

    Attributes:
        a: [r, in], any floating dtype; cast to the dtype of x for the product.
        b: [out, r], likewise.
        scaling: s.
        keep: None, or the dropout mask over x, already divided by 1 - p: dtype of x, shape of x.
    """

    a: Tensor
    b: Tensor
    scaling: float
    keep: Tensor | None = None


class _SharedProduct(torch.autograd.Function):
    """The products at the top of this file, for linears that share x; returns y of each."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shared: "SharedInput",
        members: tuple["FrozenLinear", ...],
        updates: tuple[LowRank | None, ...],
        gradients: bool,
        read: bool,
        *_factors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        trained = any(update is not None for update in updates)
        fused = shared.fused(rows, members, updates)
        if fused is not None and not gradients and _packed_is_faster(rows, members):
            fused = None
        p: list[Tensor | None]
        if fused is not None:
            # Kept for backward: what the products there must be made with is what was used here.
            ctx.shadow = shadow = shared.shadow(x.dtype)
            p = [shared.into_a(rows, shadow)]
            outputs = [member.out_features for member in members]
            if read:
                weights = shared.weights(members, x.dtype)
                ys = list(fused.forward(rows, weights, p[0], shadow, outputs).split(outputs, 1))
        elif read:
            ys, p = _plain_forward(rows, shared, members, updates, gradients)
        else:
            p = [_into_a(rows, update) for update in updates]
        if not read:
            ys = [x.new_zeros(1, 1).expand(len(rows), m.out_features) for m in members]
        for y, member in zip(ys, members, strict=True):
            if read and member.bias is not None:
                y.add_(member.bias.to(x.dtype))
        ctx.shared, ctx.members, ctx.fused, ctx.pairs = shared, members, fused, len(p)
        ctx.scalings = [update and update.scaling for update in updates]
        ctx.set_materialize_grads(False)
        factors = [tensor for u in updates for tensor in (u and u.a, u and u.b, u and u.keep)]
        ctx.save_for_backward(rows if trained else None, *p, *factors)
        return tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in ys)

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
        given = next((dy for dy in grad_outputs if dy is not None), None)
        if given is None:
            return (None,) * len(ctx.needs_input_grad)
        dys = [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in grad_outputs]
        backward = _plain_backward if ctx.fused is None else _fused_backward
        dx, gradients = backward(ctx, rows, p, updates, dys)
        if dx is not None:
            dx = dx.reshape(*given.shape[:-1], dx.shape[-1])
        return dx, None, None, None, None, None, *gradients


def _into_a(rows: Tensor, update: LowRank | None) -> Tensor | None:
    """Return x̃ Aᵀ [rows, r]."""
    if update is None:
        return None
    dropped = rows if update.keep is None else rows * update.keep.reshape(rows.shape)
    return product(dropped, update.a.to(rows.dtype))


def _plain_forward(
    rows: Tensor,
    shared: "SharedInput",
    members: Sequence["FrozenLinear"],
    updates: Sequence[LowRank | None],
    gradients: bool,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return y and x̃ Aᵀ of each linear, the base's product first and the update added to it."""
    if not gradients and _packed_is_faster(rows, members):
        ys = _packed_products(rows, members)
    else:
        ys = [product(rows, weight) for weight in shared.weights(members, rows.dtype)]
    p: list[Tensor | None] = []
    for y, update in zip(ys, updates, strict=True):
        x_a = _into_a(rows, update)
        if update is not None:
            assert x_a is not None
            y.addmm_(x_a, update.b.to(rows.dtype).t(), alpha=update.scaling)
        p.append(x_a)
    return ys, p


def _packed_is_faster(rows: Tensor, members: Sequence["FrozenLinear"]) -> bool:
    """Return whether x Wᵀ is faster without decoding W, for all of the linears."""
    if not rows.is_cuda or gpu_kernels() is None:
        return False
    if any(member.opened(rows.dtype) is not None for member in members):
        return False
    from halfbyte.nf4 import gpu_rows  # it imports triton

    packed = [member.quantized for member in members]
    return all(q is not None and gpu_rows.can_multiply(rows, q) for q in packed)


def _packed_products(rows: Tensor, members: Sequence["FrozenLinear"]) -> list[Tensor]:
    """Return x Wᵀ of each linear without decoding W."""
    from halfbyte.nf4 import gpu_rows  # it imports triton

    packed = [member.quantized for member in members]
    return [gpu_rows.small_product(rows, q) for q in packed if q is not None]


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
    weights = ctx.shared.weights(ctx.members, given.dtype) if needs[0] else dys
    for i, (dy, update, weight) in enumerate(zip(dys, updates, weights, strict=True)):
        needs_a, needs_b = needs[6 + 2 * i : 8 + 2 * i]
        d_a = d_b = None
        if dy is not None and needs[0]:
            if dx is None:
                dx = product(dy, weight.t())
            elif dx.is_cuda:
                dx.addmm_(dy, weight)
            else:
                dx.add_(product(dy, weight.t()))
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
    """As `_plain_backward`, by gpu_products.py."""
    from halfbyte.nf4.gpu_adapters import adapter_pass  # it imports triton

    shared, members, fused = ctx.shared, ctx.members, ctx.fused
    shadow = ctx.shadow
    rank = shadow.rank
    g = rows.new_empty(rows.shape[0], rank * len(members))
    whole = []
    for dy, member in zip(dys, members, strict=True):
        if dy is None:  # this output was not used
            dy = rows.new_zeros(rows.shape[0], member.out_features)
        whole.append(dy if dy.stride(1) == 1 else dy.contiguous())
    scalings = [scaling or 0.0 for scaling in ctx.scalings]
    d_b = adapter_pass(whole, p[0], shadow.b, scalings, g)
    d_bs = torch.split(d_b, [member.out_features for member in members])
    gradients: list[Tensor | None] = []
    d_a = torch.mm(g.t(), rows, out_dtype=torch.float32)
    for i, update in enumerate(updates):
        if update is None:
            gradients += [None, None]
            continue
        r = update.a.shape[0]
        gradients.append(d_a[i * rank : i * rank + r].to(update.a.dtype))
        gradients.append(d_bs[i][:, :r].to(update.b.dtype))
    dx = None
    if ctx.needs_input_grad[0]:
        dx = fused.backward(whole, shared.weights(members, rows.dtype), g, shadow)
    return dx, gradients


class _Waiting(NamedTuple):
    """Outputs that have been computed and not yet been asked for, and what they were made from."""

    x: Tensor
    version: int
    gradients: bool
    outputs: dict["FrozenLinear", Tensor]

    def fits(self, linear: "FrozenLinear", x: Tensor) -> bool:
        """Return whether they hold what ``linear`` would compute of x now."""
        made = (self.version, self.gradients) == (x._version, torch.is_grad_enabled())
        return self.x is x and made and linear in self.outputs


class SharedInput:
    """Linears that are called with the same x, one after the other: then they are one product.

    Called with x, the first computes the output of all, and the others find theirs ready. That
    they are called so is looked at each time, never taken for granted. A set whose first x was
    not the x of all is dissolved: its linears work alone from then on.

    Args:
        members: The linears, in the order of their calls.

    Attributes:
        remembered: x Aᵀ [rows, members · rank] that the next call takes instead of making it, or
            None; see `ThinProducts`.
    """

    def __init__(self, members: Sequence["FrozenLinear"]) -> None:
        self.members = tuple(members)
        self.remembered: Tensor | None = None
        self._noted: list[Tensor] | None = None
        self._waiting: _Waiting | None = None
        self._proven = False
        self._shadow: Any = None
        self.beside: tuple[SharedInput, ...] = ()
        for member in members:
            member.shared = self

    def output(self, linear: "FrozenLinear", x: Tensor, *, read: bool = True) -> Tensor:
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
                SharedInput([member])
            return linear.shared.output(linear, x)
        ys = dict(zip(self.members, self._products(x), strict=True))
        y = ys.pop(linear)
        if ys:
            self._waiting = _Waiting(x, x._version, torch.is_grad_enabled(), ys)
        return y

    def _products(self, x: Tensor, *, read: bool = True) -> tuple[Tensor, ...]:
        updates = tuple(
            None if member.adapter is None else member.adapter.update(x)  # type: ignore[operator]
            for member in self.members
        )
        factors = [tensor for u in updates for tensor in ((u.a, u.b) if u else (None, None))]
        gradients = torch.is_grad_enabled()  # inside forward it always says no
        return _SharedProduct.apply(x, self, self.members, updates, gradients, read, *factors)  # type: ignore[no-any-return, no-untyped-call]

    def weights(self, members: Sequence["FrozenLinear"], dtype: torch.dtype) -> list[Tensor]:
        """Return W [out, in] of each, in ``dtype``: the opened ones, or decoded anew, together."""
        opened = [member.opened(dtype) for member in members]
        if all(weight is not None for weight in opened):
            return opened  # type: ignore[return-value]
        return _decode_together(members, dtype)

    def fused(
        self,
        rows: Tensor,
        members: Sequence["FrozenLinear"],
        updates: Sequence[LowRank | None],
    ) -> Any:
        """Return gpu_products, if it can make these products, else None."""
        given = [update for update in updates if update is not None]
        if not rows.is_cuda or not given or any(update.keep is not None for update in given):
            return None
        wide = rows.dtype not in (torch.bfloat16, torch.float16)
        if wide or len(members) > _MOST_TOGETHER or gpu_kernels() is None:
            return None
        from halfbyte.nf4 import gpu_products  # it imports triton

        return gpu_products

    def shadow(self, dtype: torch.dtype) -> Any:
        """Return the adapters as `gpu_adapters.Shadow`.

        While a `WeightScratch` holds a decoder layer open it is made once, for all micro-batches
        and with those of the layer's other sets. It is never kept longer: an optimizer may write to
        adapters without their telling (torch's fused AdamW counts no version), and products with
        old ones would be wrong in silence.
        """
        from halfbyte.nf4.gpu_adapters import Factors, shadows_of  # it imports triton

        if self._shadow is not None:
            return self._shadow
        sets = [shared for shared in self.beside or (self,) if any(shared._pairs())]
        factors = [
            Factors(s._pairs(), [m.out_features for m in s.members], s.members[0].in_features)
            for s in sets
        ]
        shadows = dict(zip(sets, shadows_of(factors, dtype), strict=True))
        if self.beside:
            for shared, shadow in shadows.items():
                shared._shadow = shadow
        return shadows[self]

    def into_a(self, rows: Tensor, shadow: Any) -> Tensor:
        """Return x Aᵀ [rows, members · rank]: what is remembered for this call, or made now.

        Args:
            rows: x [rows, in].
            shadow: The adapters, as `shadow` returns them.
        """
        p, self.remembered = self.remembered, None
        if p is None:
            p = torch.mm(rows, shadow.a.t())
        if self._noted is not None:
            self._noted.append(p)
        return p

    def _pairs(self) -> list[tuple[Tensor, Tensor, float] | None]:
        """Return A, B and s of each member, or None."""
        return [
            None if member.adapter is None else member.adapter.factors  # type: ignore[misc]
            for member in self.members
        ]

    def open(self, beside: Sequence["SharedInput"]) -> None:
        """Take note of the sets that are open from now on, this one among them."""
        self.beside = tuple(beside)

    def close(self) -> None:
        """Forget what was made while the linears were open."""
        self._shadow, self.beside = None, ()
        self.remembered = self._noted = None


class ThinProducts:
    """x Aᵀ of a decoder layer's sets, from one run of the layer to another with the same input.

    Only where products are gpu_products.py's; elsewhere there is nothing to note. Whoever runs the
    layers takes what was noted in one run of one part, holds it, and gives it back right before
    the other. When the layer is closed both end, whatever has happened.

    Args:
        sets: Those that are open.
    """

    def __init__(self, sets: Iterable[SharedInput]) -> None:
        self._sets = tuple(sets)

    def note(self) -> None:
        """Note what the sets make from now on."""
        for shared in self._sets:
            shared._noted = []

    def take(self) -> dict[SharedInput, Tensor]:
        """Return x Aᵀ [rows, members · rank] of the sets that made one since `note`; note no more.

        By set, because a set may be dissolved before the layer is run again. One that was called
        with several inputs is left out: which call is which would be a guess.
        """
        taken = {}
        for shared in self._sets:
            noted, shared._noted = shared._noted, None
            if noted is not None and len(noted) == 1:
                taken[shared] = noted[0]
        return taken

    def give(self, taken: Mapping[SharedInput, Tensor]) -> None:
        """Have the next call of each set take what was taken from one with the same input."""
        for shared in self._sets:
            shared.remembered = taken.get(shared)


def _decode_together(linears: Sequence["FrozenLinear"], dtype: torch.dtype) -> list[Tensor]:
    """Return W [out, in] of each in ``dtype``, the packed ones decoded together."""
    packed = {linear: q for linear in linears if (q := linear.quantized) is not None}
    if len(packed) < 2 or linears[0].device.type != "cuda":
        return [linear.decode(dtype) for linear in linears]
    sizes = [q.numel for q in packed.values()]
    # Each below the last, so that their product with one x can be one.
    whole = torch.empty(sum(sizes), dtype=dtype, device=linears[0].device)
    pieces = torch.split(whole, sizes)
    outs = [piece.view(q.shape) for piece, q in zip(pieces, packed.values(), strict=True)]
    dequantize_all(list(packed.values()), dtype, outs=outs)
    decoded = dict(zip(packed, outs, strict=True))
    return [decoded[m] if m in decoded else m.decode(dtype) for m in linears]
