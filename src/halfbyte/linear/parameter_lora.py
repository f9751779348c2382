"""Adapters of parameters that no linear layer holds: PEFT's ``target_parameters``.

PEFT's ``ParamWrapper`` adds s·B·A to a parameter while the module that reads it is called. For one
matrix [out, in] that is LoRA as usual, so a router can be adapted, and a linear layer whose name
PEFT would take for another (layers/targets.py). For the matrices of all experts, see
expert_lora.py. It has no dropout, which would act on the input, and no DoRA.

Where several parameters of one module are targeted, PEFT wraps the module once for each, in the
order of the parameters. So the tensors of the last one are named after the module, and those of the
one before after its ``base_layer``.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


def kaiming_uniform(shape: torch.Size, seed: int) -> Tensor:
    """Return an initial A [rank, in], float32: Kaiming uniform with a = √5, as PEFT's.

    It is sampled on the CPU, so that a seed gives the same adapter on every device.
    """
    bound = 1.0 / math.sqrt(shape[1])
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


class ParameterLoRA(nn.Module):
    """The adapter of a matrix W [out, in]; as a parametrization, W + s·B·A takes its place.

    Args:
        in_features: Columns of A.
        out_features: Rows of B.
        r: The rank.
        scaling: The factor s.
        device: Device of A and B.
        experts: The number of matrices, for subclasses.

    Attributes:
        lora_A: [experts·r, in], float32.
        lora_B: [out, r·experts], float32.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r: int,
        scaling: float,
        device: torch.device,
        experts: int = 1,
    ) -> None:
        super().__init__()
        self.r, self.scaling, self.experts = r, scaling, experts
        self.lora_A = nn.Parameter(torch.empty(experts * r, in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r * experts, device=device))

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Initialise ``lora_A``, and set ``lora_B`` to 0."""
        self.lora_A.copy_(kaiming_uniform(self.lora_A.shape, seed))
        self.lora_B.zero_()

    def forward(self, weight: Tensor) -> Tensor:
        """Return W + s·B·A in the dtype of W."""
        return weight + (self.scaling * (self.lora_B @ self.lora_A)).to(weight.dtype)


def adapt_parameter(module: nn.Module, leaf: str, adapter: ParameterLoRA) -> None:
    """Have a module read its parameter ``leaf`` with the adapter's update."""
    parametrize.register_parametrization(module, leaf, adapter)


def adapter_of_parameter(module: nn.Module, leaf: str) -> ParameterLoRA | None:
    """Return the adapter of a module's parameter, if it has one."""
    lists: Any = getattr(module, "parametrizations", {})
    adapter = lists[leaf][0] if leaf in lists else None
    return adapter if isinstance(adapter, ParameterLoRA) else None


def detach_parameters(model: nn.Module) -> None:
    """Undo `adapt_parameter` for all modules of a model."""
    for module in list(model.modules()):
        for leaf in list(getattr(module, "parametrizations", {})):
            if adapter_of_parameter(module, leaf) is not None:
                parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)


def is_plain_matrix(module: nn.Module) -> bool:
    """Whether a module of transformers' own has a matrix ``weight`` that it multiplies with.

    These are the routers. Linear layers and embeddings are torch's, and have adapters or are
    trained in full.
    """
    weight = module._parameters.get("weight")
    own = type(module).__module__.startswith("transformers.models.")
    if not own or isinstance(module, nn.Linear | nn.Embedding):
        return False
    return weight is not None and weight.dim() == 2


def names_in_peft(parameters: Iterable[str]) -> dict[str, str]:
    """Return the module under which PEFT names the adapter of each parameter.

    Args:
        parameters: The paths of all adapted parameters, those of a module in its order.
    """
    of_module: dict[str, list[str]] = {}
    for path in parameters:
        of_module.setdefault(path.rpartition(".")[0], []).append(path)
    return {
        path: module + ".base_layer" * (len(paths) - 1 - place)
        for module, paths in of_module.items()
        for place, path in enumerate(paths)
    }
