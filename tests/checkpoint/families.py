"""Random models of several families, all of one small size."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def tiny_model(family: str, **changes: Any) -> PreTrainedModel:
    """A random float32 model in which no two tensors are alike, norms and biases included."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | changes))
        for parameter in model.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
    return model.eval()


def skeleton(family: str, **changes: Any) -> PreTrainedModel:
    """The same architecture on the meta device."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **SIZES | changes)
        )
    return model
