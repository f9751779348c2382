"""Which devices compute in FP8, and which linears of a model do."""

from collections.abc import Iterable
from typing import Any

import torch

from halfbyte.errors import ConfigError
from halfbyte.linear.decoded_weight import DENSE
from halfbyte.linear.fp8 import FP8
from halfbyte.linear.frozen import FrozenLinear
from halfbyte.runtime import device as devices

# Tensor cores' products of 8-bit numbers need sizes that are multiples of it.
_MULTIPLE = 16


def require_fp8(device: torch.device | str, dtype: torch.dtype) -> str:
    """Check that products in FP8 are possible, and return what is to be said of them, or "".

    Args:
        device: Where to compute.
        dtype: dtype of activations.

    Raises:
        ConfigError: If the GPU has no FP8 units, or the dtype is float16.
    """
    if torch.device(device).type != "cuda":
        if dtype == torch.float16:
            raise ConfigError("compute fp8 needs bfloat16 or float32 activations on a CPU")
        return "compute fp8 is emulated on a CPU, in plain PyTorch: slower than without"
    spec = devices.spec_of(torch.device(device))
    if not spec.has_fp8:
        major, minor = spec.capability
        raise ConfigError(
            f"compute fp8 is not for {spec.name}, compute capability {major}.{minor}: FP8 units "
            "come with 8.9 (Ada) and 9.0 (Hopper); use compute auto"
        )
    if dtype != torch.bfloat16:
        raise ConfigError(
            f"compute fp8 needs activations in bfloat16 on a GPU, not in {str(dtype)[6:]}: leave "
            "compute_dtype at auto"
        )
    return ""


def supports(linear: Any) -> bool:
    """Return whether a `FrozenLinear` can compute in FP8: it is packed, in multiples of 16."""
    sizes = (linear.in_features, linear.out_features)
    held = linear.frozen_tensors()
    return "codes" in held and all(size % _MULTIPLE == 0 for size in sizes)


def use_fp8(linears: Iterable[FrozenLinear]) -> str:
    """Have linears compute in FP8 where that is possible for all that share their input.

    Returns:
        What is to be said about it, in one line.
    """
    computed = left = 0
    for linear in linears:
        whole = all(supports(member) for member in linear.group.members)
        linear.layout = FP8 if whole else DENSE
        computed, left = computed + whole, left + (not whole)
    message = f"products of {computed} linears in FP8"
    if left:
        message += f"; {left} stay in 16 bits (not packed, or sizes that are no multiples of 16)"
    return message
