"""Linears of one input in inference, with stacked weights and adapters.

A decoding step has few rows, so its products cost memory traffic and launches. Linears that are
called with the same x are one product with a matrix whose rows are

    W of the first, W of the second, …                      y = x Wᵀ of each, concatenated
    A of the first, A of the second, … (if several share)   p = x Aᵀ, in the same launch

and the adapters' update, p (s B)ᵀ, is another. A and s·B are rounded once to the dtype of the
products; base and update are never merged into one matrix, so no update is rounded away.

For one row, weights large enough to be bound by memory are read packed instead of stacked;
`decoding.py` decides.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte.linear.frozen import FrozenLinear
from halfbyte.quant import QuantizedWeight
from halfbyte.quant.format import dequantize_all, gpu_kernels
from halfbyte.runtime.matmul import product

# Rank to which adapters are padded: the smallest tile of the kernels.
_LEAST_RANK = 16


class Projections:
    """Linears of one input, prepared for products; they must not change afterwards.

    Args:
        linears: The linears, with their adapters.
        dtype: dtype of activations and products.

    Attributes:
        packed: The packed weights, or none if any linear is plain.
        elements: Number of elements of the stack that `stacked` writes.
    """

    def __init__(self, linears: Sequence[FrozenLinear], dtype: torch.dtype) -> None:
        self._linears, self._dtype = list(linears), dtype
        self._outputs = [linear.out_features for linear in linears]
        self._inputs = linears[0].in_features
        held = [linear.quantized for linear in linears]
        self.packed: list[QuantizedWeight] = [q for q in held if q is not None]
        if len(self.packed) < len(held):
            self.packed = []
        self._bias = _stacked_bias(linears, dtype)
        self._a, self._b = _stacked_adapters(linears, dtype)
        adapters: list[Any] = [linear.adapter for linear in linears]
        self._rescales = any(adapter is not None and adapter.rescales for adapter in adapters)
        self._tail = 0 if self._a is None or len(linears) == 1 else len(self._a)
        self.elements = (sum(self._outputs) + self._tail) * self._inputs

    def _places(self, memory: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the stack [rows, in] as a view of flat memory, and the view of each W in it."""
        stack = memory[: self.elements].view(-1, self._inputs)
        width = sum(self._outputs)
        if self._tail and self._a is not None:
            stack[width:] = self._a
        return stack, list(torch.split(stack[:width], self._outputs))

    def _copy_plain(self, outs: Sequence[Tensor]) -> None:
        for linear, out in zip(self._linears, outs, strict=True):
            out.copy_(linear.decode(self._dtype))

    def __call__(self, x: Tensor, stack: Tensor | None = None) -> list[Tensor]:
        """Return y [rows, out] of each linear, with bias and adapter; rows may be strided.

        Args:
            x: [rows, in].
            stack: The stack written by `stacked`; without it the linears' own weights are used.
        """
        width, p = sum(self._outputs), None
        if stack is not None:
            whole = product(x, stack)
            y = whole[:, :width]
            if self._tail:
                p = whole[:, width:]
        elif self.packed:
            y = _packed_products(x, self.packed)
        else:
            weights = [linear.decode(self._dtype) for linear in self._linears]
            ys = [product(x, weight) for weight in weights]
            y = ys[0] if len(ys) == 1 else torch.cat(ys, 1)
        if self._bias is not None:
            y += self._bias
        if self._a is not None and self._b is not None:
            self._add(y, product(x, self._a) if p is None else p, self._b)
        ys = list(torch.split(y, self._outputs, 1))
        return self._rescaled(ys) if self._rescales else ys

    def _add(self, y: Tensor, p: Tensor, b: Tensor) -> None:
        """Add the product of each linear's part of p with its s·B, in place."""
        if y.is_cuda and y.dtype in (torch.bfloat16, torch.float16) and gpu_kernels() is not None:
            from halfbyte.linear.triton_lora import add_low_rank  # it imports triton

            add_low_rank(y, p, b, self._outputs)
            return
        ys, bs = torch.split(y, self._outputs, 1), torch.split(b, self._outputs)
        for linear, own, left, right in zip(
            self._linears, ys, p.chunk(len(ys), 1), bs, strict=True
        ):
            if linear.adapter is not None:
                own.addmm_(left, right.t())

    def _rescaled(self, ys: Sequence[Tensor]) -> list[Tensor]:
        done = []
        for linear, y in zip(self._linears, ys, strict=True):
            adapter: Any = linear.adapter
            done.append(y if adapter is None else adapter.rescale(y))
        return done


def stacked(
    sets: Sequence[Projections], sizes: Sequence[int], memory: Tensor
) -> list[Tensor | None]:
    """Write the stacks of sets, [rows, in] each; packed weights are decoded in one launch.

    Args:
        sets: The sets of one layer.
        sizes: Elements of each stack, or 0 for none.
        memory: Flat memory for all stacks.
    """
    stacks: list[Tensor | None] = []
    packed: list[QuantizedWeight] = []
    outs: list[Tensor] = []
    for one, piece in zip(sets, torch.split(memory, list(sizes)), strict=True):
        if not len(piece):
            stacks.append(None)
            continue
        stack, places = one._places(piece)
        stacks.append(stack)
        if one.packed:
            packed += one.packed
            outs += places
        else:
            one._copy_plain(places)
    if packed:
        dequantize_all(packed, memory.dtype, outs=outs)
    return stacks


def _packed_products(x: Tensor, packed: Sequence[QuantizedWeight]) -> Tensor:
    from halfbyte.linear.triton_gemv import small_products  # it imports triton

    return small_products(x, packed)


def _stacked_bias(linears: Sequence[FrozenLinear], dtype: torch.dtype) -> Tensor | None:
    """Return the concatenated biases, [sum of out], or None if no linear has one."""
    if all(linear.bias is None for linear in linears):
        return None
    parts = [
        torch.zeros(linear.out_features, dtype=dtype, device=linear.device)
        if linear.bias is None
        else linear.bias.detach().to(dtype)
        for linear in linears
    ]
    return torch.cat(parts)


def _stacked_adapters(
    linears: Sequence[FrozenLinear], dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Return all A, [members · rank, in], and all s·B, [sum of out, rank], padded with zeros."""
    adapters: list[Any] = [linear.adapter for linear in linears]
    ranks = [len(adapter.factors[0]) for adapter in adapters if adapter is not None]
    if not ranks:
        return None, None
    rank, device = 1 << (max(_LEAST_RANK, *ranks) - 1).bit_length(), linears[0].device
    outputs = [linear.out_features for linear in linears]
    a = torch.zeros(len(linears) * rank, linears[0].in_features, dtype=dtype, device=device)
    b = torch.zeros(sum(outputs), rank, dtype=dtype, device=device)
    for adapter, left, right in zip(
        adapters, a.chunk(len(outputs)), torch.split(b, outputs), strict=True
    ):
        if adapter is not None:
            own_a, own_b, scaling = adapter.factors
            left[: len(own_a)] = own_a.detach()
            right[:, : len(own_a)] = own_b.detach() * scaling
    return a, b
