"""The frozen linear layer: decode the weight, multiply, forget the decoded weight.

For a frozen weight W [out, in], an optional bias b and an optional trained low-rank update
(A [r, in], B [out, r], scaling s; LoRA, Hu et al. 2021, eq. 3), over x [..., in]:

    forward     y  = x Wᵀ + b + s · (x̃ Aᵀ) Bᵀ                x̃ = dropout(x), or x itself
    backward    dx = dy W + s · dropout'((dy B) A)
                dA = s · (dy B)ᵀ x̃          dB = s · dyᵀ (x̃ Aᵀ)          no dW: W is frozen

One ``autograd.Function`` does all of it, because three things follow that a chain of plain
operations cannot have. W is decoded from 4 bits in forward and again in backward, and is not kept
in between. x is kept once for the base and the adapter together. The adapter's products are added
into the base's output and into dx in place (``addmm``), not in tensors of their own.

Whether this is QLoRA or LoRA is a property of the weight: ``FrozenLinear`` holds either packed
4-bit tensors or a plain 16/32-bit weight, and ``dense`` gives W in the dtype of the product.

Who decodes, and how often, is up to the caller. Called alone, a layer decodes W for each product.
Inside ``WeightScratch.opened`` the weights of a whole decoder layer are decoded once, into buffers
that every decoder layer shares, and all micro-batches multiply with them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from halfbyte.matmul import product
from halfbyte.nf4.format import QuantizedWeight, QuantType, dequantize, empty_like_quantized

# The tensors of a QuantizedWeight, which a FrozenLinear holds as buffers under the same names.
_PACKED = ("codes", "scales", "scale_codes", "scale_scales", "scale_offset")


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


class _Layout(NamedTuple):
    """What a packed weight is, besides its tensors."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    quant_type: QuantType
    block_size: int


class _FrozenProduct(torch.autograd.Function):
    """The products at the top of this file; ``source.dense`` is asked for W in each direction."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        scaling: float,
        keep: Tensor | None,
        source: "FrozenLinear",
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weight = source.dense(x.dtype)
        y = product(rows, weight)
        if source.bias is not None:
            y.add_(source.bias.to(x.dtype))
        x_a = None
        if a is not None and b is not None:
            dropped = rows if keep is None else rows * keep.reshape(rows.shape)
            x_a = product(dropped, a.to(x.dtype))
            y.addmm_(x_a, b.to(x.dtype).t(), alpha=scaling)
        ctx.source, ctx.scaling = source, scaling
        ctx.save_for_backward(rows if a is not None else None, x_a, a, b, keep)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        rows, x_a, a, b, keep = ctx.saved_tensors
        d_rows = dy.reshape(-1, dy.shape[-1])
        needs_x, needs_a, needs_b = ctx.needs_input_grad[:3]
        dx = d_a = d_b = None
        if needs_x:
            dx = product(d_rows, ctx.source.dense(dy.dtype).t())
        if a is not None:
            if keep is not None:
                keep = keep.reshape(rows.shape)
            if needs_x or needs_a:
                dy_b = product(d_rows, b.to(dy.dtype).t())
                if needs_a:
                    dropped = rows if keep is None else rows * keep
                    d_a = product(dy_b.t(), dropped.t()).to(a.dtype).mul_(ctx.scaling)
                if dx is not None and keep is None:
                    dx.addmm_(dy_b, a.to(dy.dtype), alpha=ctx.scaling)
                elif dx is not None:
                    dx.addcmul_(torch.mm(dy_b, a.to(dy.dtype)), keep, value=ctx.scaling)
            if needs_b:
                d_b = torch.mm(d_rows.t(), x_a).to(b.dtype).mul_(ctx.scaling)
        if dx is not None:
            dx = dx.reshape(*dy.shape[:-1], dx.shape[-1])
        return dx, d_a, d_b, None, None, None


class FrozenLinear(nn.Module):
    """A linear layer whose weight is not trained: packed 4-bit, or plain 16/32-bit.

    A 4-bit weight is held as plain buffers (``codes``, ``scales`` …; no tensor or parameter
    subclass, no second copy of the state) and seen through ``quantized``. A plain one is held as
    the parameter ``weight``, without gradient. ``adapter`` is a slot: None, or what ``lora.attach``
    put there.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        bias: Whether there is a bias [out_features].
        quantized: A description of the packed weight (its tensors may be on the meta device), or
            None for a plain weight.
        dtype: dtype of the bias and of a plain weight.
        device: Device of the bias and of a plain weight.
    """

    bias: Tensor | None
    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        quantized: QuantizedWeight | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.adapter: nn.Module | None = None
        self._dense: Tensor | None = None
        self._layout: _Layout | None = None

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(
                torch.empty(*shape, dtype=dtype, device=device), requires_grad=False
            )

        self.register_parameter("bias", empty(out_features) if bias else None)
        self.register_parameter("weight", None)
        if quantized is None:
            self.weight = empty(out_features, in_features)
        else:
            self.set_quantized(quantized)

    @classmethod
    def like(
        cls,
        linear: nn.Linear,
        *,
        quant: QuantType | None,
        block_size: int,
        double_quant: bool,
        dtype: torch.dtype,
    ) -> "FrozenLinear":
        """Return an empty layer of the shape of ``linear``, on the meta device."""
        quantized = None
        if quant is not None:
            quantized = empty_like_quantized(
                (linear.out_features, linear.in_features),
                dtype,
                quant_type=quant,
                block_size=block_size,
                double_quant=double_quant,
            )
        return cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            quantized=quantized,
            dtype=dtype,
        )

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        held = self._buffers["codes"] if self.weight is None else self.weight
        assert held is not None
        return held.device

    @property
    def quantized(self) -> QuantizedWeight | None:
        """The packed weight as a view of the buffers, or None if the weight is plain."""
        if self._layout is None:
            return None
        tensors: dict[str, Any] = {name: self._buffers[name] for name in _PACKED}
        return QuantizedWeight(**tensors, **self._layout._asdict())

    def set_quantized(self, quantized: QuantizedWeight) -> None:
        """Hold ``quantized`` from now on; its tensors become this module's buffers.

        Raises:
            ValueError: If its shape is not [out_features, in_features].
        """
        expected = (self.out_features, self.in_features)
        if tuple(quantized.shape) != expected:
            raise ValueError(
                f"a packed weight of shape {expected} is expected here, got {quantized.shape}"
            )
        self.weight = None
        for name in _PACKED:
            self.register_buffer(name, getattr(quantized, name))
        self._layout = _Layout(
            quantized.shape, quantized.dtype, quantized.quant_type, quantized.block_size
        )

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return W [out, in] in ``dtype``: the opened copy if there is one, else decoded anew."""
        if self._dense is not None and self._dense.dtype == dtype:
            return self._dense
        return self.decode(dtype)

    def decode(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Return W [out, in] in ``dtype``, written into ``out`` if the weight is packed."""
        quantized = self.quantized
        if quantized is not None:
            return dequantize(quantized, dtype, out=out).view(quantized.shape)
        assert self.weight is not None
        return self.weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., out] for x [..., in], in the dtype of x."""
        if self.adapter is None:
            return _FrozenProduct.apply(x, None, None, 0.0, None, self)  # type: ignore[no-any-return, no-untyped-call]
        a, b, scaling, keep = self.adapter.update(x)  # type: ignore[operator]
        return _FrozenProduct.apply(x, a, b, scaling, keep, self)  # type: ignore[no-any-return, no-untyped-call]

    def _apply(self, fn: Any, recurse: bool = True) -> "FrozenLinear":
        # `module.to(bfloat16)` and `.half()` cast every floating tensor they find, and scales in
        # bfloat16 are another weight. Seen as integers, the packed tensors move but are not cast.
        buffers = self._buffers
        floats = {name: held for name in _PACKED if (held := buffers.get(name)) is not None}
        floats = {name: held for name, held in floats.items() if held.is_floating_point()}
        buffers.update({name: held.view(torch.int32) for name, held in floats.items()})
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in floats:
            moved = buffers[name]
            assert moved is not None
            buffers[name] = moved.view(torch.float32)
        return self

    def extra_repr(self) -> str:
        """Return the sizes and the kind of the weight, for ``print(model)``."""
        kind = "plain" if self._layout is None else self._layout.quant_type
        return (
            f"in={self.in_features}, out={self.out_features}, bias={self.bias is not None}, {kind}"
        )


class WeightScratch:
    """Buffers into which one decoder layer after another is decoded.

    Slot i serves the i-th linear of every layer, since the layers of a decoder have equal shapes;
    a larger weight makes the slot grow. So the decoded weights alive at any time are those of one
    layer, and on a CPU the pages are touched once per run instead of once per product (a fresh
    64 MB buffer costs about 12 ms of page faults, the decoding into it about 4).

    Attributes:
        decodes: How many weights have been decoded so far.
    """

    def __init__(self) -> None:
        self._slots: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
        self.decodes = 0

    @contextmanager
    def opened(self, linears: Sequence[FrozenLinear], dtype: torch.dtype) -> Iterator[None]:
        """Decode ``linears`` once; inside, their ``dense(dtype)`` costs nothing."""
        try:
            for slot, linear in enumerate(linears):
                quantized = linear.quantized
                if quantized is None:
                    # A plain weight in the dtype of the product is used where it lies.
                    linear._dense = linear.decode(dtype)
                    continue
                buffer = self._buffer(slot, quantized.numel, dtype, quantized.codes.device)
                linear._dense = linear.decode(dtype, out=buffer)
                self.decodes += 1
            yield
        finally:
            for linear in linears:
                linear._dense = None

    def _buffer(self, slot: int, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        key = (slot, dtype, device)
        held = self._slots.get(key)
        if held is None or held.numel() < numel:
            self._slots.pop(key, None)
            held = self._slots[key] = torch.empty(numel, dtype=dtype, device=device)
        return held[:numel]
