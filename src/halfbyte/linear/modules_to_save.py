"""Modules that are trained in full, besides adapters: PEFT's ``modules_to_save``.

A float32 copy replaces the base model's parameter and is cast at use. The original is kept for
``restore``, and parameters tied to it stay tied to it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from halfbyte.errors import ConfigError
from halfbyte.linear.experts import ExpertLinear
from halfbyte.linear.frozen import FrozenLinear


class _Cast(nn.Module):
    """Casts a parameter that is trained in full to the dtype its module expects."""

    def __init__(self, base: nn.Parameter) -> None:
        super().__init__()
        self.base = (base,)  # in a tuple, so that it is not registered as a parameter

    def forward(self, trained: Tensor) -> Tensor:
        return trained.to(self.base[0].dtype)


def trained_whole(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the float32 copies trained in place of the module's parameters, by name."""
    lists: Any = getattr(module, "parametrizations", {})
    return {leaf: one.original for leaf, one in lists.items() if isinstance(one[0], _Cast)}


def train_whole(module: nn.Module) -> None:
    """Train the parameters of a module in full, in float32."""
    for leaf, base in list(module.named_parameters(recurse=False)):
        copy = base.detach().to(torch.float32, copy=True)
        setattr(module, leaf, nn.Parameter(copy))
        # torch requires unsafe=True for a parametrization that changes the dtype.
        parametrize.register_parametrization(module, leaf, _Cast(base), unsafe=True)


def restore(model: nn.Module) -> None:
    """Undo `train_whole` for all modules of a model."""
    for module in list(model.modules()):
        for leaf in trained_whole(module):
            (cast,) = module.parametrizations[leaf]  # type: ignore[index]
            parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)
            setattr(module, leaf, cast.base[0])


def modules_to_save(model: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    """Return the modules that ``names`` mean: all whose path ends with one (PEFT's rule).

    Args:
        model: A model without adapters.
        names: ``LoRAConfig.modules_to_save``.

    Raises:
        ConfigError: If a name means none, or a module that cannot be trained in full.
    """
    modules = dict(model.named_modules())
    able = {
        path
        for path, module in modules.items()
        if not isinstance(module, FrozenLinear | ExpertLinear)
        and any(True for _ in module.parameters(recurse=False))
        and not any(True for _ in module.children())
        and not _stored_buffers(module)
    }
    chosen = {path: module for path, module in modules.items() if path.endswith(names)}
    # PEFT would make copies of these as well, which the adapter does not hold.
    unloaded = [path for path in getattr(model, "halfbyte_removed", ()) if path.endswith(names)]
    if unloaded:
        raise ConfigError(
            f"modules_to_save: {', '.join(names)} also matches {unloaded[0]}, and encoders are not "
            f"trained; write more of the path, as in {next(iter(chosen), 'model.norm')}"
        )
    for path, module in chosen.items():
        if path not in able:
            why = "it is made of other modules, or has no parameters"
            if type(module) is FrozenLinear:
                why = "its weight is frozen; give it an adapter (target_modules)"
            elif _stored_buffers(module):
                why = "PEFT expects its buffers in the adapter; give it one (target_parameters)"
            elif isinstance(module, ExpertLinear):
                why = "its weights are frozen; give them adapters (target_parameters)"
            elif isinstance(module, FrozenLinear):
                why = "it is packed in 4 bits; leave out quantize_head and quantize_embeddings"
            raise ConfigError(f"modules_to_save: {path} cannot be trained in full, {why}")
    if unknown := [name for name in names if not any(path.endswith(name) for path in chosen)]:
        kinds = ", ".join(sorted({path.rpartition(".")[2] for path in able}))
        raise ConfigError(
            f"modules_to_save names what this model does not have: {', '.join(unknown)}; it has: "
            f"{kinds}"
        )
    return list(chosen.values())


def _stored_buffers(module: nn.Module) -> set[str]:
    """Return the buffers of a module of transformers that are in checkpoints."""
    if isinstance(module, FrozenLinear | ExpertLinear):
        return set()
    return module._buffers.keys() - module._non_persistent_buffers_set
