"""Which linears of a transformers model are frozen, and which of them can get an adapter.

A linear is replaced by a frozen one unless transformers' own code reads its ``weight``: the scan of
Mamba does, and would find none where the weight is packed, and no adapter where there is one. These
stay as they are. Of the others, some get no adapter, because PEFT would not load it, and of some
PEFT loads it only as the adapter of a parameter (linear/parameter_lora.py).
"""

import inspect
import re
from functools import cache

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import (
    _MODEL_TO_CONVERSION_PATTERN,
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
)
from transformers.core_model_loading import WeightRenaming, rename_source_key

# Subclasses of nn.Linear that compute the same.
_SAME_AS_LINEAR = {"FalconLinear"}

# PEFT refuses adapters of these, whose weights its kernels read (tuners_utils.py).
_MAMBA_TYPES = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_MAMBA_NAMES = {"out_proj", "conv1d"}

# In families whose experts transformers 5 fuses, PEFT takes these names for the experts', wherever
# they are (transformers_weight_conversion.py): by the family that transformers' table refers to.
# It does not if they are among target_parameters.
_EXPERT_NAMES = {
    "mixtral": {"gate", "w1", "w2", "w3"},
    "qwen2_moe": {"gate", "gate_proj", "up_proj", "down_proj"},
}


def linears_to_freeze(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the linears that can be replaced by frozen ones, the output head included, by path."""
    found: dict[str, nn.Linear] = {}
    for path, module in model.named_modules():
        for leaf, child in module.named_children():
            kind = type(child)
            if not (kind is nn.Linear or kind.__name__ in _SAME_AS_LINEAR):
                continue
            assert isinstance(child, nn.Linear)
            is_head = child is model.get_output_embeddings()
            if is_head or leaf not in _weights_read(type(module)):  # type: ignore[arg-type]
                found[f"{path}.{leaf}" if path else leaf] = child
    return found


@cache  # reading the source of a class takes milliseconds, and a model is looked at several times
def _weights_read(kind: type[nn.Module]) -> set[str]:
    """Return the names of the children whose ``weight`` a class of transformers reads itself."""
    names: set[str] = set()
    for base in kind.__mro__:
        if base.__module__.startswith("transformers.models."):
            names.update(re.findall(r"\.(\w+)\.weight\b", inspect.getsource(base)))
    return names


def why_no_adapter(model: PreTrainedModel) -> dict[str, str]:
    """Return the linears that must not get an adapter, and why, by path."""
    kind = getattr(model.config, "model_type", "")
    names = _MAMBA_NAMES if kind in _MAMBA_TYPES else set()
    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]

    def is_renamed(path: str) -> bool:
        """Whether PEFT takes the key of an adapter for one of an older checkpoint."""
        key = f"{path}.lora_A.weight"
        return bool(rename_source_key(key, renamings, [])[0] != key)

    head, frozen = model.get_output_embeddings(), linears_to_freeze(model)
    linears = [path for path, linear in frozen.items() if linear is not head]
    taken = [path for path in linears if path.rpartition(".")[2] in names or is_renamed(path)]
    refused = dict.fromkeys(taken, f"PEFT loads no adapter of it in models of type {kind}")
    # Layers of cross-attention to an image (Mllama), which are skipped where there is none.
    for layer in getattr(model.config.get_text_config(), "cross_attention_layers", None) or ():
        inside = (path for path in linears if f".layers.{layer}." in path)
        refused |= dict.fromkeys(inside, "text does not pass through this layer")
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path not in frozen:
            refused[path] = "transformers' own code uses its weight"
    return refused


def parameters_in_peft(model: PreTrainedModel) -> set[str]:
    """Return the linears of which PEFT loads only the adapter of a parameter, by path.

    They are shared experts, and dense layers beside layers of experts.
    """
    kind = getattr(model.config, "model_type", "")
    if get_checkpoint_conversion_mapping(kind) is None:
        return set()
    family = "mixtral" if kind == "mixtral" else _MODEL_TO_CONVERSION_PATTERN.get(kind, "")
    names = _EXPERT_NAMES.get(family, set())
    return {path for path in linears_to_freeze(model) if path.rpartition(".")[2] in names}
