"""Adapters that begin with what packing lost, instead of with nothing (QERA).

A fresh adapter adds nothing: the model that training starts from is the packed one. But an adapter
of rank r can as well begin as the best matrix of that rank for what packing took away,

    C = argmin ‖(W − Ŵ − C) S‖, S = diag(√mean(x²))       W as it was, Ŵ as it decodes, x the inputs

where inputs that are large on a page of text count for more (models/calibration.py), since they
carry the error into the output. With U Σ Vᵀ the r largest singular triples of (W − Ŵ) S, that is
B A = U Σ · Vᵀ S⁻¹ (Zhang et al. 2024, "QERA", arXiv 2410.06040, its approximation that takes inputs
to be uncorrelated). Training goes on from there, and the packed bytes stay what they are.

Such an adapter belongs to its packed base even more than others do: on the weights before packing,
it would add an error that is not there.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from halfbyte.checkpoint.base_model import BaseSource, LoadedBase
from halfbyte.errors import ConfigError
from halfbyte.linear.lora import adapters, frozen_linears
from halfbyte.models.calibration import input_moments
from halfbyte.quant.scale_search import normalised

# Columns beyond the rank, and turns, of the search for the leading singular triples.
_MORE, _TURNS = 8, 2


def require_plain(source: BaseSource) -> None:
    """Refuse a base whose weights before packing are not at hand.

    Raises:
        ConfigError: If it is packed.
    """
    if any(parameter.packed for parameter in source.parameters):
        raise ConfigError(
            f"init_lora_weights qera needs the weights as they were before packing, and "
            f"{source.name} is packed in 4 bits already; give the plain model, or leave it out"
        )


@torch.no_grad()
def begin_with_error(
    base: LoadedBase, source: BaseSource, *, progress: Callable[[int, int], None] | None = None
) -> float:
    """Let every adapter on a packed linear begin with what packing lost; reads the files once more.

    Beside the model, memory holds one weight in float32, and as it is read.

    Args:
        base: Loaded from ``source``, with fresh adapters attached.
        source: Plain weights.
        progress: Called with (bytes read, bytes in all) after each tensor.

    Returns:
        The part of the weighted squared error that is taken back, of all these linears; 0 to 1.
    """
    moments = input_moments(base.model, base.tokenizer)
    given = adapters(base.model)
    linears = frozen_linears(base.model)
    wanted = {f"{path}.weight": path for path in given if linears[path].quantized is not None}
    sizes = {parameter.name: parameter.nbytes for parameter in source.parameters}
    lost = back = 0.0
    done = 0
    for name, value in source.tensors(str(base.model.device)):
        if (path := wanted.get(name)) is not None:
            assert isinstance(value, Tensor)
            error = linears[path].decode(torch.float32).neg_().add_(value.to(base.model.device))
            # All alike for a linear that the text did not reach.
            size = moments.get(name, error.new_ones(error.shape[1]))
            weight = normalised(size, error).sqrt()
            u, s, v = leading(error.mul_(weight), given[path].config.r)
            lost += float(error.square().sum())
            back += float(s.square().sum())
            # Shared out evenly: a direction that counts for more is larger in both factors.
            root = s.sqrt()
            given[path].begin(root[:, None] * v.t() / weight, u * root)
            del error
        del value
        done += sizes[name]
        if progress is not None:
            progress(done, source.total_bytes)
    return back / lost if lost else 0.0


def leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return about the largest singular triples of a matrix (Halko et al. 2011, algorithm 4.4).

    Args:
        matrix: [out, in], float32.
        rank: How many, at most.

    Returns:
        U [out, k], the singular values [k] and V [in, k], k = min(rank, out, in). The same for the
        same matrix.
    """
    k = min(rank, *matrix.shape)
    width = min(k + _MORE, *matrix.shape)
    # Drawn on the CPU, so that it is the same on every device.
    drawn = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(0))
    basis = matrix @ drawn.to(matrix)
    for _ in range(_TURNS):
        basis = matrix.t() @ torch.linalg.qr(basis).Q
        basis = matrix @ torch.linalg.qr(basis).Q
    basis = torch.linalg.qr(basis).Q
    u, s, vh = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    return basis @ u[:, :k], s[:k], vh[:k].t()
