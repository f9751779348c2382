"""The ``Conv1D`` of GPT-2 and OpenAI-GPT: a linear layer whose weight is [in, out].

transformers kept the layout of the first checkpoints. The layer computes x W + b, so it is built as
an ``nn.Linear``, and nothing but the files differs: a plain weight is [in, out] there (PEFT's
``fan_in_fan_out``), and a packed one [out, in] like any other, since bitsandbytes packs it
transposed.
"""

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def replace_conv1d(model: PreTrainedModel) -> None:
    """Replace every ``Conv1D`` by an ``nn.Linear`` of its shape, on the meta device."""
    found = [path for path, module in model.named_modules() if isinstance(module, Conv1D)]
    for path in found:
        layer = model.get_submodule(path)
        inputs, outputs = layer.weight.shape
        linear = nn.Linear(inputs, outputs, device="meta", dtype=layer.weight.dtype)
        model.set_submodule(path, linear)
    model.halfbyte_conv1d = frozenset(f"{path}.weight" for path in found)


def conv1d_weights(model: nn.Module) -> frozenset[str]:
    """Return the names of the weights that files store as [in, out]."""
    names: frozenset[str] = getattr(model, "halfbyte_conv1d", frozenset())
    return names
