"""Rotary embeddings whose frequencies depend on the length of the sequence.

Those of ``dynamic`` and ``longrope`` scaling do: transformers takes the longest position of a call,
so the table of a document packed with a longer one is not what it would be alone.
"""

from typing import Any

from torch import nn


def rotary_limit(decoder: nn.Module) -> int | None:
    """Return the longest document whose rotary tables do not depend on others in its row."""
    found: list[int] = []
    module: Any
    for module in decoder.modules():
        kinds = getattr(module, "rope_type", None)
        for name, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
            if not isinstance(kind, str) or not ("dynamic" in kind or kind == "longrope"):
                continue
            config = module.config
            parameters = config.rope_parameters if name is None else config.rope_parameters[name]
            original = parameters.get("original_max_position_embeddings")
            found.append(int(original or config.max_position_embeddings))
    return min(found, default=None)
