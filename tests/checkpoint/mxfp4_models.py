"""A tiny gpt-oss in the form in which the real ones are published."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.checkpoint.mxfp4_keys import encode_mxfp4
from halfbyte.quant import quantize_mxfp4
from tests.checkpoint.families import tiny_model
from tests.tiny import tiny_tokenizer

SKIPPED = [
    "model.layers.*.self_attn",
    "model.layers.*.mlp.router",
    "model.embed_tokens",
    "lm_head",
]


def tiny_gpt_oss(**changes: Any) -> PreTrainedModel:
    """Two layers of four experts, of which a token has two; the second layer sees all tokens."""
    return tiny_model(
        "gpt_oss",
        **{
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "sliding_window": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            **changes,
        },
    )


def write_gpt_oss(directory: Path, *, plain: tuple[str, ...] = (), **changes: Any) -> Path:
    """Write it: experts in MXFP4, everything else in bfloat16.

    Args:
        directory: Where to.
        plain: Parameters of experts that stay in bfloat16.
        changes: Of its configuration.
    """
    tiny_gpt_oss(**changes).to(torch.bfloat16).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    path = directory / "model.safetensors"
    tensors: dict[str, Tensor] = {}
    for name, value in load_file(path).items():
        if value.dim() == 3 and name not in plain:
            tensors |= encode_mxfp4(name, quantize_mxfp4(value.mT.contiguous()))
        else:
            tensors[name] = value
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    skipped = [*SKIPPED, *(name.rpartition(".")[0] for name in plain)]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    (directory / "config.json").write_text(json.dumps(config))
    return directory
