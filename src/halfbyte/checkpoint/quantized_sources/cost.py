"""What it costs to pack weights in 4 bits that were decoded from another quantisation.

The error of the first quantisation cannot be known, since what it was made from is not there. The
one that packing adds can: it is measured on a few weights, spread over the model.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from halfbyte.models.build import BaseRecipe, pack
from halfbyte.quant import PackedWeight, dequantize

_SAMPLES = 3
_ROWS = 256


def packing_error(
    names: Sequence[str],
    tensor: Callable[[str], Tensor | PackedWeight],
    recipe: BaseRecipe,
) -> float:
    """Return the relative error that packing adds: ‖packed - W‖ / ‖W‖ over all sampled weights.

    Three weights are read at most, and the first rows of each are packed.

    Args:
        names: Weights that are packed, not empty, in the order of the model.
        tensor: Returns a weight, unpacked.
        recipe: How it is packed; no search.

    Raises:
        CheckpointError: If a file ends early.
        WeightError: If a weight contains NaN or infinity.
    """
    step = max(1, (len(names) - 1) // max(1, _SAMPLES - 1))
    error = size = 0.0
    for name in list(names)[::step][:_SAMPLES]:
        weight = tensor(name)
        assert isinstance(weight, Tensor)
        part = weight.flatten(0, -2)[:_ROWS].to(recipe.device, torch.float32)
        del weight
        packed = dequantize(pack(part, recipe, name)).float()
        error += float((packed - part).square().sum(dtype=torch.float64))
        size += float(part.square().sum(dtype=torch.float64))
    return float((error / size) ** 0.5) if size else 0.0
