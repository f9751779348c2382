"""Initialises adapters with the quantisation error, instead of zero (QERA).

With the usual initialisation training starts from the quantised model. Instead, an adapter of rank
r can start as the best rank-r approximation of the quantisation error,

    C = argmin ‖(W − Ŵ − C) S‖, S = diag(√mean(x²))       W original, Ŵ decoded, x the inputs

where inputs that are large on a page of text have more weight (models/calibration.py), since they
carry the error into the output. With U Σ Vᵀ the r largest singular triples of (W − Ŵ) S, this is
B A = U Σ · Vᵀ S⁻¹ (Zhang et al. 2024, "QERA", arXiv 2410.06040, in the approximation that inputs
are uncorrelated). The packed bytes do not change.

Such an adapter is tied to its packed base even more than others are: added to the original weights,
it would correct an error that is not there.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from halfbyte.checkpoint.base_model import BaseSource, LoadedBase
from halfbyte.errors import ConfigError
from halfbyte.linear.lora import adapters, frozen_linears
from halfbyte.models.calibration import input_moments
from halfbyte.quant.scale_search import normalised

# Oversampling and power iterations in the search for the leading singular triples.
_MORE, _TURNS = 8, 2


def require_plain(source: BaseSource) -> None:
    """Refuse a base model whose original weights are not available.

    Raises:
        ConfigError: If it is packed.
    """
    if any(parameter.packed for parameter in source.parameters):
        raise ConfigError(
            f"init_lora_weights qera needs the weights before quantisation, but {source.name} is "
            "already in 4 bits; use the original model, or omit the option"
        )


@torch.no_grad()
def begin_with_error(
    base: LoadedBase, source: BaseSource, *, progress: Callable[[int, int], None] | None = None
) -> float:
    """Initialise adapters on packed linears with the quantisation error; reads the files again.

    In addition to the model, memory holds one weight in float32, and as it is read.

    Args:
        base: Loaded from ``source``, with new adapters attached.
        source: The original weights.
        progress: Called with (bytes read, total bytes) after each tensor.

    Returns:
        The fraction of the weighted squared error that the adapters correct, 0 to 1.
    """
    moments = input_moments(base.model, base.tokenizer)
    given = adapters(base.model)
    linears = frozen_linears(base.model)
    wanted = {f"{path}.weight": path for path in given if linears[path].quantized is not None}
    lost = back = 0.0
    done = 0
    for name, value in source.tensors(str(base.model.device)):
        if (path := wanted.get(name)) is not None:
            assert isinstance(value, Tensor)
            error = linears[path].decode(torch.float32).neg_().add_(value.to(base.model.device))
            # Equal weights for a linear that the text did not reach.
            size = moments.get(name, error.new_ones(error.shape[1]))
            weight = normalised(size, error).sqrt()
            u, s, v = leading(error.mul_(weight), given[path].config.r)
            lost += float(error.square().sum())
            back += float(s.square().sum())
            # Each factor gets the square root of the singular values.
            root = s.sqrt()
            given[path].begin(root[:, None] * v.t() / weight, u * root)
            del error
        done += source.bytes_read(name, value)
        del value
        if progress is not None:
            progress(done, source.total_bytes)
    return back / lost if lost else 0.0


def leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Approximate the largest singular triples of a matrix (Halko et al. 2011, algorithm 4.4).

    Args:
        matrix: [out, in], float32.
        rank: Number of triples, at most.

    Returns:
        U [out, k], the singular values [k] and V [in, k], k = min(rank, out, in). Deterministic.
    """
    k = min(rank, *matrix.shape)
    width = min(k + _MORE, *matrix.shape)
    # Drawn on the CPU, for the same values on every device.
    drawn = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(0))
    basis = matrix @ drawn.to(matrix)
    for _ in range(_TURNS):
        basis = matrix.t() @ torch.linalg.qr(basis).Q
        basis = matrix @ torch.linalg.qr(basis).Q
    basis = torch.linalg.qr(basis).Q
    u, s, vh = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    return basis @ u[:, :k], s[:k], vh[:k].t()
