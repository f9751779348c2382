"""One call of linears that share an input, computed by the kernels for training on a GPU.

The object is created in forward and kept for backward, which must use the same operands. The steps
are separate methods because callers differ: group.py calls them in sequence, layers/mlp.py and
layers/qkv.py with other work in between.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from halfbyte.linear.decoded_weight import DecodedWeight


class LowRank(NamedTuple):
    """A trained update s·B·A of a frozen weight, as used by one product.

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


class _Group(Protocol):
    """Linears that share an input and decode their weights; see `group.LinearGroup`."""

    outputs: list[int]

    def weights(self, dtype: torch.dtype) -> list[DecodedWeight]: ...
    def cast_adapters(self, dtype: torch.dtype) -> Any: ...
    def into_a(self, rows: Tensor, cast_adapters: Any) -> Tensor: ...


class FusedLoraLinear:
    """Products of base and adapter together.

    Args:
        group: The linears: a `group.LinearGroup` with one layout, here ``DENSE``.
        updates: Their adapters, without dropout; at least one.
        dtype: dtype of x: bfloat16 or float16.

    Attributes:
        updates: As given.
        outputs: Rows of each weight.
    """

    def __init__(
        self, group: _Group, updates: Sequence[LowRank | None], dtype: torch.dtype
    ) -> None:
        self._group, self.updates, self._dtype = group, updates, dtype
        self.outputs = group.outputs

    @cached_property
    def cast_adapters(self) -> Any:
        """The adapters as `triton_lora.CastAdapters`."""
        return self._group.cast_adapters(self._dtype)

    @property
    def scalings(self) -> list[float]:
        """Scaling of each adapter; 0 for a linear without one."""
        return [update.scaling if update else 0.0 for update in self.updates]

    def weights(self) -> list[Tensor]:
        """Return W [out, in] of each linear, in the form the kernels expect."""
        return [weight.data for weight in self._group.weights(self._dtype)]

    def into_a(self, x: Tensor) -> Tensor:
        """Return x Aᵀ [rows, members · rank] for x [rows, in]; see `LinearGroup.into_a`."""
        return self._group.into_a(x, self.cast_adapters)

    def forward(self, x: Tensor, p: Tensor, turn: Any = None) -> Tensor:
        """Return the outputs side by side, [rows, sum of out]; see `triton_matmul.forward`."""
        from halfbyte.linear import triton_matmul

        return triton_matmul.forward(x, self.weights(), p, self.cast_adapters, self.outputs, turn)

    def turns(self, x: Tensor, turn: Any) -> bool:
        """Return whether `forward` of x can apply a `triton_matmul.Turn`."""
        from halfbyte.linear import triton_matmul

        return turn.fits and triton_matmul.fits(x, self.outputs)

    def gated_forward(
        self, x: Tensor, p: Tensor, *, keep: bool
    ) -> tuple[Tensor, Tensor | None] | None:
        """Return silu(gate) · up of two linears; see `triton_swiglu.gated_forward`.

        None if that is not one kernel for this x.
        """
        from halfbyte.linear import triton_matmul, triton_swiglu

        if not triton_matmul.fits(x, self.outputs):
            return None
        return triton_swiglu.gated_forward(x, self.weights(), p, self.cast_adapters, keep=keep)

    def through_b(self, dys: Sequence[Tensor], p: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the products of the adapters with dy, which is read once.

        Args:
            dys: [rows, out] of each linear, contiguous rows.
            p: The result of `into_a`.

        Returns:
            dy (s B) of all, [rows, members · rank], and dB of each, float32 [out, rank].
        """
        from halfbyte.linear.triton_lora import adapter_pass  # it imports triton

        g = torch.empty_like(p)
        return g, torch.split(
            adapter_pass(dys, p, self.cast_adapters.b, self.scalings, g), self.outputs
        )

    def input_gradient(self, dys: Sequence[Tensor], g: Tensor) -> Tensor:
        """Return dx [rows, in]; ``g`` is the first result of `through_b`."""
        from halfbyte.linear import triton_matmul

        return triton_matmul.backward(dys, self.weights(), g, self.cast_adapters)

    def factor_gradients(self, x: Tensor, g: Tensor, d_bs: Sequence[Tensor]) -> list[Tensor | None]:
        """Return dA and dB of each linear in turn, from x [rows, in] and `through_b`."""
        d_as = torch.mm(g.t(), x, out_dtype=torch.float32).chunk(len(self.updates))
        return self.trained(d_as, d_bs)

    def trained(self, d_as: Sequence[Tensor], d_bs: Sequence[Tensor]) -> list[Tensor | None]:
        """Return dA [r, in] and dB [out, r] of each linear in turn, in the dtype of the parameter.

        Args:
            d_as: For each linear float32 [rank, in], with the padded rank.
            d_bs: Likewise, [out, rank].
        """
        gradients: list[Tensor | None] = []
        for d_a, d_b, update in zip(d_as, d_bs, self.updates, strict=True):
            if update is None:
                gradients += [None, None]
                continue
            r = len(update.a)
            gradients += [d_a[:r].to(update.a.dtype), d_b[:, :r].to(update.b.dtype)]
        return gradients

    def backward(
        self, dys: Sequence[Tensor], x: Tensor, p: Tensor, *, dx: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Return dx [rows, in], or None if not needed, and dA and dB of each linear in turn."""
        g, d_bs = self.through_b(dys, p)
        gradients = self.factor_gradients(x, g, d_bs)
        return self.input_gradient(dys, g) if dx else None, gradients
