"""How a parameter is stored in a GGUF file: as which tensors, and both ways between their values.

llama.cpp rearranges some parameters when a model is converted: the rows of queries and keys, the
weights of norms, experts that transformers keeps in one tensor. A ``Form`` is one such
rearrangement and its inverse, so the reader and the writer cannot disagree.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Form(NamedTuple):
    """The tensors of one parameter.

    Attributes:
        names: Their names, in llama.cpp's terms.
        split: From the parameter to the tensors, in the order of ``names``.
        join: Its inverse.
        moves_rows: Whether both only move whole rows (the last dimension of a matrix), so that they
            may be applied to rows of blocks, or to B of an adapter.
    """

    names: tuple[str, ...]
    split: Callable[[Tensor], tuple[Tensor, ...]]
    join: Callable[[Sequence[Tensor]], Tensor]
    moves_rows: bool

    def under(self, prefix: str) -> "Form":
        """Return the same form with ``prefix`` before each name."""
        return self._replace(names=tuple(prefix + name for name in self.names))

    def shapes(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        """Return the shapes of the tensors of a parameter of this shape."""
        parts = self.split(torch.empty(tuple(shape), device="meta"))
        return [tuple(part.shape) for part in parts]


def plain(name: str) -> Form:
    """The parameter as it is."""
    return Form((name,), lambda value: (value,), lambda parts: parts[0], True)


def rotary_pairs(name: str, heads: int) -> Form:
    """Rows [heads · size, …] of queries or keys: the two of each rotary pair side by side."""

    def split(value: Tensor) -> tuple[Tensor]:
        halves = value.reshape(heads, 2, len(value) // heads // 2, *value.shape[1:])
        return (halves.transpose(1, 2).reshape(value.shape),)

    def join(parts: Sequence[Tensor]) -> Tensor:
        value = parts[0]
        pairs = value.reshape(heads, len(value) // heads // 2, 2, *value.shape[1:])
        return pairs.transpose(1, 2).reshape(value.shape)

    return Form((name,), split, join, True)


def plus_one(name: str) -> Form:
    """The weight of a norm that transformers applies as 1 + weight."""
    return Form((name,), lambda value: (value + 1,), lambda parts: parts[0] - 1, False)


def halves(first: str, second: str) -> Form:
    """Two matrices below each other: […, 2 · rows, columns], such as gate and up."""
    return Form(
        (first, second),
        lambda value: tuple(value.chunk(2, -2)),
        lambda parts: torch.cat(tuple(parts), -2),
        True,
    )


def transposed(name: str) -> Form:
    """Matrices that transformers stores as [experts, in, out]."""
    return Form(
        (name,),
        lambda value: (value.mT.contiguous(),),
        lambda parts: parts[0].mT.contiguous(),
        False,
    )


def alternating(first: str, second: str) -> Form:
    """Two matrices whose columns alternate, transposed: [experts, in, 2 · out] of gpt-oss."""
    return Form(
        (first, second),
        lambda value: (value.mT[:, ::2].contiguous(), value.mT[:, 1::2].contiguous()),
        lambda parts: torch.stack(tuple(parts), 2).flatten(1, 2).mT.contiguous(),
        False,
    )


def alternating_biases(first: str, second: str) -> Form:
    """Two biases whose numbers alternate: [experts, 2 · out] of gpt-oss."""
    return Form(
        (first, second),
        lambda value: (value[:, ::2].contiguous(), value[:, 1::2].contiguous()),
        lambda parts: torch.stack(tuple(parts), -1).flatten(-2),
        False,
    )


def single_row(name: str) -> Form:
    """A matrix of one row [1, columns], stored as a vector."""
    return Form((name,), lambda value: (value[0],), lambda parts: parts[0][None], False)


def rows_in_order(*tensors: tuple[str, Tensor]) -> Form:
    """A matrix or vector whose rows are distributed: (name, which rows), in their new order."""
    orders = [rows for _, rows in tensors]
    back = torch.cat(orders).argsort()

    def split(value: Tensor) -> tuple[Tensor, ...]:
        return tuple(value[rows.to(value.device)] for rows in orders)

    return Form(
        tuple(name for name, _ in tensors),
        split,
        lambda parts: torch.cat(tuple(parts))[back.to(parts[0].device)],
        True,
    )


def columns_in_order(name: str, order: Tensor) -> Form:
    """A matrix [rows, columns] whose columns are in another order."""
    back = order.argsort()
    return Form(
        (name,),
        lambda value: (value[:, order.to(value.device)],),
        lambda parts: parts[0][:, back.to(parts[0].device)],
        False,
    )


def convolution(name: str, order: Tensor) -> Form:
    """A depthwise convolution [channels, 1, width], stored as [channels, width]."""
    back = order.argsort()
    return Form(
        (name,),
        lambda value: (value[order.to(value.device), 0],),
        lambda parts: parts[0][back.to(parts[0].device)][:, None],
        False,
    )


def decay(name: str, order: Tensor) -> Form:
    """The logarithm of a decay for each head, stored as its negative exponential."""
    back = order.argsort()
    return Form(
        (name,),
        lambda value: (-value[order.to(value.device)].exp(),),
        lambda parts: (-parts[0]).log()[back.to(parts[0].device)],
        False,
    )
