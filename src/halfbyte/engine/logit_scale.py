"""The constant that some families multiply their logits by.

transformers applies it in the model's own forward, after the head (Cohere, Granite, Falcon-H1) or
before it (MiniCPM3), so a loss that is computed from the final norm's output must apply it itself.
The name in the configuration says whether it multiplies or divides, except for HyperCLOVA X, which
multiplies by what Granite divides by. A family that is not as this says is found by the probe of
engine/choose.py, which compares the loss with the model's own.
"""

from transformers import PretrainedConfig

_FACTORS = (
    "logit_scale",  # Cohere
    "lm_head_multiplier",  # Falcon-H1
    "output_multiplier",  # Muse
)
_DIVISORS = (
    "logits_scaling",  # Granite, MiniCPM3
    "logits_mup_width_multiplier",  # Inkling
)


def logit_scale(config: PretrainedConfig) -> float:
    """Return the factor of the logits of a causal language model; 1 for most families.

    Args:
        config: Its text configuration.
    """
    scale = 1.0
    for name in (*_FACTORS, *_DIVISORS):
        value = getattr(config, name, None)
        if not isinstance(value, int | float) or not value:
            continue
        multiplies = name in _FACTORS or config.model_type == "hyperclovax"
        scale *= value if multiplies else 1 / value
    return scale
