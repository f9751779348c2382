"""The KV cache, and attention of one new token per sequence over it.

The cache has a fixed number of slots, one per sequence, with a fixed capacity in tokens. Its
tensors keep their addresses, so that a decoding step can be a CUDA graph. The only state of a
sequence is its position: that of the new token and the last key it attends to. Later entries of a
slot are from an earlier sequence and are not read.

On a GPU each operation is a few Triton kernels (triton_kv_cache.py); the functions named
``plain_*`` are the specification, and run elsewhere.
"""

from typing import Any

import torch
from torch import Tensor

from halfbyte.layers.elementwise import plain_rotary
from halfbyte.quant.format import gpu_kernels


def _kernels(tensor: Tensor) -> Any:
    """The Triton kernels, or None if the plain versions run."""
    if not tensor.is_cuda or gpu_kernels() is None:
        return None
    from halfbyte.layers import triton_kv_cache

    return triton_kv_cache


class KVCache:
    """Keys and values of all layers.

    Args:
        layers: Number of layers.
        slots: Number of concurrent sequences.
        heads: Heads of keys and values.
        capacity: Tokens per slot.
        width: Width of a head.
        dtype: dtype of keys and values.
        device: Device of keys and values.

    Attributes:
        keys: [layers, slots, heads, capacity, width].
        values: Likewise.
    """

    def __init__(
        self,
        layers: int,
        slots: int,
        heads: int,
        capacity: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        # Zeros, because masked values are still multiplied by zero, and memory may contain NaN.
        shape = (layers, slots, heads, capacity, width)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)

    @property
    def capacity(self) -> int:
        """Capacity of each slot in tokens."""
        return self.keys.shape[3]

    def clear(self) -> None:
        """Fill it with zeros."""
        self.keys.zero_()
        self.values.zero_()

    def grow(self, capacity: int) -> None:
        """Reallocate with ``capacity`` tokens per slot, at least as many as before."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros((*old.shape[:3], capacity, old.shape[4]))
            new[:, :, :, : old.shape[3]] = old
            setattr(self, name, new)
            del old, new  # freed before the second is allocated

    def store(self, layer: int, k: Tensor, v: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Store rotated keys, and values, of prompt tokens.

        Args:
            layer: Index of the layer.
            k: [T, heads, width].
            v: Likewise.
            slots: int64 [T], the slot of each token.
            positions: int64 [T], the position of each token in its slot.
        """
        self.keys[layer][slots, :, positions] = k
        self.values[layer][slots, :, positions] = v


def plain_turn_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    turn: tuple[Tensor, Tensor],
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """See `turn_and_store`."""
    cos, sin = (table[positions][:, None] for table in turn)
    rows = torch.arange(len(q), device=q.device)
    keys[rows, :, positions] = plain_rotary(k[:, None], cos, sin)[:, 0].to(k.dtype)
    values[rows, :, positions] = v
    return plain_rotary(q[:, None], cos, sin)[:, 0].to(q.dtype)


def plain_attend_cached(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float, window: int | None
) -> Tensor:
    """See `attend_cached`."""
    (slots, heads, width), groups = q.shape, keys.shape[1]
    longest = int(positions.max()) + 1
    k, v = keys[:, :, :longest], values[:, :, :longest]
    at = torch.arange(longest, device=q.device)
    seen = at <= positions[:, None]
    if window is not None:
        seen &= at > positions[:, None] - window
    scores = (q.view(slots, groups, -1, width) @ k.transpose(2, 3)).float() * scale
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    return (torch.softmax(scores, -1).to(v.dtype) @ v).reshape(slots, heads * width)


def turn_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    turn: tuple[Tensor, Tensor],
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Rotate q and k of the new tokens by their positions, and store k and v.

    Args:
        q: [slots, query heads, width], one new token per slot; rows may be strided. Overwritten on
            a GPU.
        k: [slots, heads, width], likewise, but not modified.
        v: Likewise.
        turn: Tables of cosines and sines, [any, width]; both halves of a row are equal.
        positions: int64 [slots], the position of each new token.
        keys: [slots, heads, capacity, width], of one layer; written to at ``positions``.
        values: Likewise.

    Returns:
        Rotated q, in its shape.
    """
    kernels = _kernels(q)
    done = (kernels.turn_and_store if kernels else plain_turn_and_store)(
        q, k, v, turn, positions, keys, values
    )
    result: Tensor = done
    return result


def attend_cached(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float, window: int | None
) -> Tensor:
    """Return softmax(scale · q kᵀ) v over the keys up to each new token's own.

    Args:
        q: [slots, query heads, width], rotated; heads are contiguous, rows may be strided.
        keys: [slots, heads, capacity, width], heads a divisor of the query heads.
        values: Likewise.
        positions: int64 [slots], the last key attended to.
        scale: Factor of the scores.
        window: Maximum number of keys attended to, counted from the last; None for all.

    Returns:
        [slots, query heads · width].
    """
    kernels = _kernels(q)
    done = (kernels.attend_cached if kernels else plain_attend_cached)(
        q, keys, values, positions, scale, window
    )
    result: Tensor = done
    return result
