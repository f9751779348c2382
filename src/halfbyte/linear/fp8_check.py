"""Before a run in FP8: whether a GPU's kernels give the numbers of the specification.

A compiler's fault shows here and nowhere else: a wrong transposed copy leaves the loss of a step as
it should be, and makes its gradients noise (LAB.md has such a kernel, right in the interpreter). So
small weights, activations and products are compared once, in milliseconds.
"""

import torch
from torch import Tensor

from halfbyte.errors import ConfigError
from halfbyte.quant import e4m3
from halfbyte.quant.format import quantize
from halfbyte.runtime import device as devices

_ROWS, _INPUTS, _OUTPUTS, _RANK = 131, 192, (256, 48), 16


def check_kernels(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
    """Compare decoded weights exactly, and rounded rows and products within their rounding.

    Args:
        device: A GPU with FP8 units.
        dtype: dtype of activations.

    Raises:
        ConfigError: Something differs; it is named.
    """
    from halfbyte.quant import triton_e4m3

    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    outputs = sum(_OUTPUTS)
    data = torch.empty(outputs, _INPUTS, dtype=e4m3.DTYPE, device=device)
    across = torch.empty(_INPUTS, outputs, dtype=e4m3.DTYPE, device=device)
    scale = torch.empty(outputs, dtype=torch.float32, device=device)
    start = 0
    for out in _OUTPUTS:
        q = quantize(drawn(out, _INPUTS), quant_type="nf4", block_size=64, double_quant=True)
        place = slice(start, start + out)
        triton_e4m3.decode(q, data[place], across[:, place], scale[place])
        wanted, wanted_scale = e4m3.decode(q)
        _require(torch.equal(scale[place], wanted_scale), "the scales of weights")
        _require(torch.equal(data[place].float(), wanted.float()), "decoded weights")
        _require(torch.equal(across[:, place].float(), wanted.float().t()), "transposed weights")
        start += out
    x, dys = drawn(_ROWS, _INPUTS).to(dtype), [drawn(_ROWS, out).to(dtype) for out in _OUTPUTS]
    x_hat, x_scale = triton_e4m3.quantize_rows([x])
    d_hat, d_scale = triton_e4m3.quantize_rows(dys, scale)
    wide, d_wide = x_hat.double() * x_scale, d_hat.double() * d_scale
    _require(_near(wide, x, 2**-4), "rounded activations")
    _require(_near(d_wide, torch.cat(dys, 1) * scale, 2**-4), "rounded gradients")
    if not devices.spec_of(device).is_hopper:
        return  # the products are torch's
    from halfbyte.linear import triton_fp8

    p, b = drawn(_ROWS, 2 * _RANK).to(dtype), drawn(outputs, _RANK).to(dtype)
    a = drawn(2 * _RANK, _INPUTS).to(dtype)
    low = [
        left.double() @ right.double().t()
        for left, right in zip(
            torch.split(p, _RANK, 1), torch.split(b, list(_OUTPUTS)), strict=True
        )
    ]
    y = triton_fp8.product(x_hat, x_scale, data, scale, p, b, _RANK, _OUTPUTS)
    exact = wide @ (data.double() * scale[:, None]).t() + torch.cat(low, 1)
    _require(_near(y, exact, 2**-6), "products of forward")
    dx = triton_fp8.product(d_hat, d_scale, across, None, p, a, 2 * _RANK, None)
    _require(_near(dx, d_wide @ data.double() + p.double() @ a.double(), 2**-6), "gradients")


def _near(got: Tensor, wanted: Tensor, bound: float) -> bool:
    """Return whether the error is within ``bound`` of the whole; false for NaN."""
    return bool((got.double() - wanted.double()).norm() <= bound * wanted.double().norm())


def _require(right: bool, what: str) -> None:
    if not right:
        raise ConfigError(
            f"compute fp8: {what} differ from the specification on this GPU, with this version of "
            "Triton; please report it, and leave out compute"
        )
