"""What other programs that serve adapters do not take, known before they are started.

vLLM: read from ``vllm/lora/peft_helper.py``, ``lora_model.py`` and ``vllm/config/lora.py`` of 0.33,
which the adapters of ``tests/checkpoint/test_serving.py`` were given to once (LAB.md). Adapters of
experts were not: vLLM reads their shapes wrongly as of August 2026 (vllm-project/vllm#52198, open).
llama.cpp: what `gguf_export.write_gguf_lora` cannot express.
"""

from collections.abc import Iterable, Mapping
from typing import Any

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's ``--max-lora-rank``; 16 is its default."""
_VLLM_WHOLE = {"classifier", "score"}
# Linear layers whose names do not end as others' do, and that PEFT adapts as parameters.
_LINEARS = {"w1", "w2", "w3"}


def experts_and_routers(parameters: Iterable[str]) -> list[str]:
    """The ``target_parameters`` that are of experts or routers, not of linear layers."""

    def is_linear(name: str) -> bool:
        module, _, leaf = name.rpartition(".")
        owner = module.rpartition(".")[2]
        return leaf == "weight" and (owner.endswith("_proj") or owner in _LINEARS)

    return [name for name in parameters if not is_linear(name)]


def largest_rank(fields: Mapping[str, Any]) -> int:
    """The largest rank of an adapter, as vLLM takes it from ``adapter_config.json``."""
    pattern = fields.get("rank_pattern") or {}
    return max([int(fields["r"]), *map(int, pattern.values())])


def vllm_rank(fields: Mapping[str, Any]) -> int | None:
    """The smallest ``--max-lora-rank`` that an adapter fits into, or None."""
    rank = largest_rank(fields)
    return next((limit for limit in VLLM_RANKS if rank <= limit), None)


def _scaled(rope_scaling: str | None) -> list[str]:
    return [] if rope_scaling is None else [f"rotary embeddings scaled by {rope_scaling}"]


def vllm_refuses(fields: Mapping[str, Any], rope_scaling: str | None = None) -> list[str]:
    """Why vLLM does not load an adapter, or computes something else; empty if it does.

    Args:
        fields: The content of ``adapter_config.json``.
        rope_scaling: How its base model's rotary embeddings were scaled in training.
    """
    reasons = _scaled(rope_scaling)
    if whole := sorted({*(fields.get("modules_to_save") or [])} - _VLLM_WHOLE):
        reasons.append(f"modules trained in full ({', '.join(whole)})")
    if fields.get("use_dora"):
        reasons.append("DoRA")
    if fields.get("lora_bias") or fields.get("bias", "none") != "none":
        reasons.append("biases")
    if others := experts_and_routers(fields.get("target_parameters") or []):
        reasons.append(f"adapters of experts or routers ({', '.join(others)})")
    if vllm_rank(fields) is None:
        reasons.append(f"rank {largest_rank(fields)}, more than {VLLM_RANKS[-1]}")
    return reasons


def llama_cpp_refuses(fields: Mapping[str, Any], rope_scaling: str | None = None) -> list[str]:
    """Why an adapter cannot be given to llama.cpp by itself; empty if it can."""
    reasons = _scaled(rope_scaling)
    if whole := fields.get("modules_to_save"):
        reasons.append(f"modules trained in full ({', '.join(whole)})")
    if fields.get("use_dora"):
        reasons.append("DoRA")
    if others := experts_and_routers(fields.get("target_parameters") or []):
        reasons.append(f"adapters of experts or routers ({', '.join(others)})")
    return reasons
