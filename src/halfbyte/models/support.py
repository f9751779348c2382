"""Whether a model can be trained, and on which linears: decided before a weight is read.

All of it follows from the architecture, a model of transformers on the meta device, so ``plan`` and
``train`` ask the same questions and refuse the same models (`require_trainable`).

A linear is replaced by a frozen one unless transformers' own code reads its ``weight``: the scan of
Mamba does, and would find none where the weight is packed, and no adapter where there is one. These
stay as they are. Of the others, some get no adapter, because PEFT would not load it.
"""

import inspect
import re

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import (
    _MODEL_TO_CONVERSION_PATTERN,
    get_checkpoint_conversion_mapping,
)

from halfbyte.errors import CheckpointError
from halfbyte.linear.lora import LoRAConfig, choose_targets
from halfbyte.models.buffers import compute_buffers

# Subclasses of nn.Linear that compute the same.
_SAME_AS_LINEAR = {"FalconLinear"}

# PEFT refuses adapters of these, whose weights its kernels read (tuners_utils.py).
_MAMBA_TYPES = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_MAMBA_NAMES = {"out_proj", "conv1d"}

# In families whose experts transformers 5 fuses, PEFT takes these names for the experts', wherever
# they are (transformers_weight_conversion.py): by the family that transformers' table refers to.
_EXPERT_NAMES = {
    "mixtral": {"gate", "w1", "w2", "w3"},
    "qwen2_moe": {"gate", "gate_proj", "up_proj", "down_proj"},
}

# What is not trained, by the class of the model, and why.
_REFUSED = {
    "CpmAntForCausalLM": "its logits depend on later tokens, which it should predict",
    "RwkvForCausalLM": "transformers divides its weights in place when it is called",
    "XLNetLMHeadModel": "its logits depend on later tokens, which it should predict",
}


def linears_to_freeze(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the linears that can be replaced by frozen ones, the output head included, by path."""
    found: dict[str, nn.Linear] = {}
    read: dict[type[nn.Module], set[str]] = {}
    for path, module in model.named_modules():
        for leaf, child in module.named_children():
            kind = type(child)
            if not (kind is nn.Linear or kind.__name__ in _SAME_AS_LINEAR):
                continue
            assert isinstance(child, nn.Linear)
            if (owner := type(module)) not in read:
                read[owner] = _weights_read(owner)
            is_head = child is model.get_output_embeddings()
            if is_head or leaf not in read[owner]:
                found[f"{path}.{leaf}" if path else leaf] = child
    return found


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
    names: set[str] = set()
    if kind in _MAMBA_TYPES:
        names = _MAMBA_NAMES
    elif get_checkpoint_conversion_mapping(kind) is not None:
        names = _EXPERT_NAMES.get(_MODEL_TO_CONVERSION_PATTERN.get(kind, kind), set())
        if kind == "qwen2_moe":  # PEFT looks up what the type refers to; this one only to itself
            names = set()
    reason = f"PEFT loads no adapter of it in models of type {kind}"
    head = model.get_output_embeddings()
    linears = [path for path, linear in linears_to_freeze(model).items() if linear is not head]
    refused = {path: reason for path in linears if path.rpartition(".")[2] in names}
    # Layers of cross-attention to an image (Mllama), which are skipped where there is none.
    skipped = getattr(model.config.get_text_config(), "cross_attention_layers", None) or ()
    for layer in skipped:
        inside = (path for path in linears if f".layers.{layer}." in path)
        refused |= dict.fromkeys(inside, "text does not pass through this layer")
    return refused


def require_trainable(model: PreTrainedModel, config: LoRAConfig) -> None:
    """Check that adapters of a model can be trained.

    Args:
        model: The model of transformers, on the meta device.
        config: The adapters.

    Raises:
        CheckpointError: If they cannot; the message says why.
        ConfigError: If the targets are no linear layers of the model, or cannot get an adapter.
    """
    name = type(model).__name__
    if name in _REFUSED:
        raise CheckpointError(f"{name} cannot be trained: {_REFUSED[name]}")
    # A field of that name is in other configurations too, of models that do not read it (GPT-NeoX).
    if any(getattr(module, "is_decoder", True) is False for module in model.modules()):
        raise CheckpointError(
            f"{name} cannot be trained: with is_decoder false in its config.json it sees the "
            "tokens it should predict"
        )
    head = model.get_output_embeddings()
    linears = [path for path, one in linears_to_freeze(model).items() if one is not head]
    refused = why_no_adapter(model)
    if len(refused) == len(linears) and not config.modules_to_save:
        raise CheckpointError(
            f"{name} has no linear layer (torch.nn.Linear) that could get an adapter; a model made "
            "of others, such as GPT-2's Conv1D, cannot be trained"
        )
    choose_targets(linears, refused, config.target_modules)
    stored = model.state_dict().keys()
    computed = [path for path, _ in model.named_buffers() if path not in stored]
    compute_buffers(model, "cpu", stored=stored)
    for path in computed:  # only to see that they can be
        owner, _, leaf = path.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = model.get_buffer(path).to("meta")
