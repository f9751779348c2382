"""The specification: AdamW over a flat slice of a parameter, in plain PyTorch.

    m ← β1·m + (1 - β1)·g          v ← β2·v + (1 - β2)·g²
    p ← p·(1 - lr·λ) - lr / (1 - β1ᵗ) · m / (√v / √(1 - β2ᵗ) + ε)

(Kingma and Ba 2015; decoupled decay λ of Loshchilov and Hutter 2019.) Every sum and product is
rounded to float32 separately, in this order, and the corrections are computed in float64.
triton_adamw.py does the same, with the same bits wherever exact roots and quotients are affordable.

8-bit state (Dettmers et al. 2022, arXiv 2110.02861): m and v are stored in blocks of 256 as the
nearest level of a dynamic table, times the block's largest magnitude; m with the signed table, v
with the unsigned one. They are decoded, updated in float32, used, and encoded again. The tables are
bitsandbytes' (dynamic.py), and a tensor of fewer than 4096 elements keeps 32 bits, as there. There
is one difference: a v above zero never becomes zero. The largest of its block may be 10⁷ times
larger, and m / (0 + ε) is a step of thousands of learning rates if the next gradient happens to be
small.

A bfloat16 parameter loses updates below half its last digit. Either a float32 *master* copy is part
of the state, or the result is rounded up or down at random such that its mean is preserved
(*stochastic* rounding), from a hash of seed, step and index.
"""

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.optim.dynamic import bounds, levels
from halfbyte.quant.blockwise import SMALLEST_SCALE, block_maxima

BLOCK = 256
SMALLEST_8BIT = 4096

# Elements per pass of the plain rule, so that its temporaries stay in the cache.
_PASS = 1 << 16


class Scalars(NamedTuple):
    """The scalars of a parameter's update; float32, in this order on a GPU.

    Attributes:
        decay: 1 - lr·λ.
        size: lr / (1 - β1ᵗ).
        inverse_root: 1 / √(1 - β2ᵗ).
        beta1: β1.
        rest1: 1 - β1.
        beta2: β2.
        rest2: 1 - β2.
        eps: ε.
        step: t, from 1.
    """

    decay: float
    size: float
    inverse_root: float
    beta1: float
    rest1: float
    beta2: float
    rest2: float
    eps: float
    step: float


def scalars_of(steps: Tensor, lr: Tensor, constants: Tensor) -> Tensor:
    """Compute every parameter's `Scalars`.

    Args:
        steps: float32 ``[n]``, updates done including this one.
        lr: float32 ``[n]``, learning rates.
        constants: float64 ``[n, 4]``: β1, β2, ε, λ.

    Returns:
        float32 ``[n, len(Scalars)]``.
    """
    beta1, beta2, eps, weight_decay = constants.unbind(1)
    step, rate = steps.double(), lr.double()
    # exp(t·log β) instead of a power, which Triton does not have.
    size = rate / (1 - (step * beta1.log()).exp())
    root = (1 - (step * beta2.log()).exp()).sqrt()
    columns = [1 - rate * weight_decay, size, 1 / root]
    columns += [beta1, 1 - beta1, beta2, 1 - beta2, eps, step]
    return torch.stack(columns, 1).float()


# The index of a cell (`cells`) is the leading digits of its values, minus those of 2⁻²³; the last
# cell is that of 1.
FIRST_CELL = (127 - 23) << 7
LAST_CELL = (127 << 7) - FIRST_CELL


@cache
def cells(signed: bool, device: torch.device) -> Tensor:
    """Return the start of the search for the nearest level, by the leading digits of a value.

    A cell contains the magnitudes that share exponent and seven binary digits, the first also those
    below 2⁻²³. No cell has more than one bound between levels, so one comparison remains, which is
    thirty times faster on a CPU than a search of the whole table.

    Returns:
        int32 ``[2945]``: the level (from zero on) below every bound in the cell.
    """
    numbers = torch.arange(LAST_CELL + 1, dtype=torch.int32, device="cpu")
    lows = ((numbers + FIRST_CELL) << 16).view(torch.float32)
    lows[0] = 0.0
    upwards = bounds(signed, torch.device("cpu"))[127 if signed else 0 :]
    # The last level has no upper bound: a search for it starts at the previous one.
    return torch.bucketize(lows, upwards[:-1], out_int32=True).to(device)


def encode(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Quantise values to 8 bits in blocks of 256, as blockwise.nearest does except for a tiny v.

    Args:
        values: float32 ``[n]``, finite; not negative unless ``signed``.
        signed: Whether to use the signed table.

    Returns:
        Codes, uint8 ``[n]``, and scales, float32 ``[ceil(n / 256)]``.
    """
    count, device = values.numel(), values.device
    blocks = torch.nn.functional.pad(values, (0, -count % BLOCK)).view(-1, BLOCK)
    scales = block_maxima(blocks)
    x = (blocks * (1 / scales.clamp(min=SMALLEST_SCALE))[:, None]).view(-1)[:count]
    bits = x.view(torch.int32)
    cell = ((bits & 0x7FFFFFFF) >> 16).sub_(FIRST_CELL).clamp_(0, LAST_CELL)
    below = cells(signed, device).index_select(0, cell)
    if signed:
        # Zero is 127, and the next lower level of a negative value has the larger magnitude.
        below = (below ^ (bits >> 31)).add_(127).clamp_(min=0)
    codes = below + (x > bounds(signed, device).index_select(0, below))
    if not signed:
        codes = torch.maximum(codes, values > 0)
    return codes.to(torch.uint8), scales


def decode(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """Decode the result of `encode`: level times scale, float32 ``[n]``."""
    found = levels(signed, codes.device).index_select(0, codes.int())
    return found * scales.repeat_interleave(BLOCK)[: codes.numel()]


def _hash(x: Tensor) -> Tensor:
    """Mix 32 bits (held in int64) so that each depends on all: Wellons' lowbias32."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def round_stochastically(values: Tensor, *, seed: int, step: int, start: int) -> Tensor:
    """Round float32 ``[n]`` to bfloat16, up with the probability given by the discarded bits.

    Args:
        values: float32 ``[n]``, finite.
        seed: Seed of the parameter.
        step: Number of updates done.
        start: Index of the first value within the parameter.
    """
    place = torch.arange(start, start + values.numel(), device=values.device)
    key = _hash(torch.tensor(step * 0x9E3779B9 + seed, device=values.device))
    noise = _hash(key + place) & 0xFFFF
    bits = values.view(torch.int32) + noise.int()
    return (bits & -0x10000).view(torch.float32).bfloat16()


def update(
    parameter: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    scalars: Scalars,
    scale: float,
    *,
    seed: int,
    start: int,
) -> None:
    """Apply the rule in place.

    Args:
        parameter: ``[n]``: float32, bfloat16 or float16.
        grad: ``[n]``, with the parameter's dtype.
        state: ``exp_avg`` and ``exp_avg_sq``, float32 ``[n]``, or uint8 ``[n]`` with
            ``exp_avg_scales`` and ``exp_avg_sq_scales``, float32 ``[ceil(n / 256)]``; with
            ``master``, float32 ``[n]``, if there is a master copy.
        scalars: The scalars of this step.
        scale: Factor of the gradient.
        seed: For stochastic rounding of a bfloat16 parameter without master copy.
        start: Index of the first element within the parameter; a multiple of 256.
    """
    for first in range(0, parameter.numel(), _PASS):
        part = slice(first, first + _PASS)
        blocks = slice(first // BLOCK, (first + _PASS) // BLOCK)
        here = {k: v[blocks if k.endswith("scales") else part] for k, v in state.items()}
        _update(parameter[part], grad[part], here, scalars, scale, seed, start + first)


def _update(
    parameter: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    scalars: Scalars,
    scale: float,
    seed: int,
    start: int,
) -> None:
    g = grad.float() * scale
    m, v = state["exp_avg"], state["exp_avg_sq"]
    coded = m.dtype == torch.uint8
    if coded:
        m = decode(m, state["exp_avg_scales"], signed=True)
        v = decode(v, state["exp_avg_sq_scales"], signed=False)
    p = state.get("master", parameter).float()
    m.mul_(scalars.beta1).add_(g * scalars.rest1)
    v.mul_(scalars.beta2).add_(g.mul_(g).mul_(scalars.rest2))
    # In float64, since torch's float32 root on a CPU is occasionally off in the last digit.
    root = v.double().sqrt().float()
    step = m / root.mul_(scalars.inverse_root).add_(scalars.eps)
    p.mul_(scalars.decay).sub_(step.mul_(scalars.size))
    if coded:
        for name, value in (("exp_avg", m), ("exp_avg_sq", v)):
            codes, scales = encode(value, signed=name == "exp_avg")
            state[name].copy_(codes)
            state[name + "_scales"].copy_(scales)
    if "master" in state:
        state["master"].copy_(p)
        parameter.copy_(p)
    elif parameter.dtype == torch.bfloat16:
        parameter.copy_(round_stochastically(p, seed=seed, step=int(scalars.step), start=start))
    elif parameter.dtype != torch.float32:
        raise TypeError(f"a {parameter.dtype} parameter needs a float32 master copy")
