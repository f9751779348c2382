"""Buffers that no checkpoint holds: rotary frequencies, masks, position ids.

transformers computes them in ``_init_weights``, which initialises parameters as well and does not
say what it has set. So each buffer is filled with two different values in turn and computed after
each: it is computed if both results are the same.
"""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte.errors import CheckpointError
from halfbyte.linear.frozen import FrozenLinear

# Bytes. Sizes of buffers come from the configuration alone; real ones take megabytes.
_LARGEST_BUFFER = 2**30


def compute_buffers(model: PreTrainedModel, device: str, *, stored: Collection[str] = ()) -> None:
    """Fill the buffers that are on the meta device, as transformers computes them.

    Args:
        model: A model; its parameters are not changed.
        device: Where the buffers will be.
        stored: Names of buffers that will come from a checkpoint, and are left alone.

    Raises:
        CheckpointError: If transformers does not say how to compute one, or it is too large.
    """
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # otherwise transformers would initialise it again
    places = [place for place in _empty_buffers(model) if place[0] not in stored]
    for path, held in places:
        if held.nbytes > _LARGEST_BUFFER:
            raise CheckpointError(
                f"its config.json requires a buffer {path} of {held.nbytes / 1e9:.0f} "
                "GB, and cannot be right"
            )
    first = _fill(model, places, device, value=0)
    second = _fill(model, places, device, value=1)
    for path, _ in places:
        if not torch.equal(first[path], second[path]):
            raise CheckpointError(
                f"the buffer {path} is in no checkpoint and transformers does not say "
                f"how to compute it: {type(model).__name__} is not supported"
            )


def _empty_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the path of every buffer on the meta device but those of a packed weight."""
    for path, module in model.named_modules():
        if not isinstance(module, FrozenLinear):
            for name, held in module.named_buffers(recurse=False):
                if held.is_meta:
                    yield f"{path}.{name}" if path else name, held


def _fill(
    model: PreTrainedModel, places: list[tuple[str, Tensor]], device: str, *, value: int
) -> dict[str, Tensor]:
    """Fill buffers with ``value``, have transformers compute them, and return them by path."""
    owners = {path.rpartition(".")[0] for path, _ in places}
    for path, held in places:
        owner, _, name = path.rpartition(".")
        model.get_submodule(owner)._buffers[name] = torch.full_like(held, value, device=device)
    # Most are set by their module, some by a module around it.
    around = {""} | {owner[:end] for owner in owners for end in _ends(owner)}
    part: PreTrainedModel = model
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            part = module  # a model within a model initialises its modules itself
        if path in owners or (path in around and isinstance(module, PreTrainedModel)):
            part._init_weights(module)
    return {path: model.get_buffer(path) for path, _ in places}


def _ends(path: str) -> list[int]:
    return [at for at, character in enumerate(path) if character == "."]
