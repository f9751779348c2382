"""The gated activations of experts, as numbers that a kernel can compute with."""

from typing import NamedTuple

import torch
from torch import Tensor


class Glu(NamedTuple):
    """A gated activation: (up + offset) · gate · σ(slope · gate), of gate and up clamped.

    SwiGLU is the default; gpt-oss's is ``Glu(True, 7.0, 1.702, 1.0)``.

    Attributes:
        interleaved: Whether gate and up are the even and odd columns of a product, not its halves.
        limit: Maximum of gate, and of the magnitude of up; None for none.
        slope: Factor of gate in the sigmoid.
        offset: Added to up.
    """

    interleaved: bool = False
    limit: float | None = None
    slope: float = 1.0
    offset: float = 0.0

    def __call__(self, h: Tensor) -> Tensor:
        """Returns the activation [..., n] of a product [..., 2 n]; it specifies the kernels."""
        gate, up = (h[..., ::2], h[..., 1::2]) if self.interleaved else h.chunk(2, -1)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.slope * gate) * (up + self.offset)
