"""Longer contexts by scaled rotary embeddings, as transformers computes them.

A model attends to positions it has been trained for. For longer ones the frequencies of its rotary
embedding are scaled, by a method that is part of its configuration (``rope_parameters``; in older
files ``rope_scaling``), and training on long examples accustoms it to them:

    linear      all frequencies divided by the factor (Chen et al. 2023)
    dynamic     a larger base, from the length of the sequence ("NTK-aware")
    yarn        low frequencies divided, high ones kept, scores scaled (Peng et al. 2023)
    llama3      low frequencies divided, high ones kept (Llama 3.1)
    longrope    a factor for each frequency (Ding et al. 2024), in JSON only

A method and its factor are written ``yarn:4``; everything else as the JSON of the configuration.
"""

import json
from typing import Any

from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from halfbyte.errors import ConfigError
from halfbyte.foreign_text import quote

METHODS = ("linear", "dynamic", "yarn", "llama3")
# Llama 3.1's, of which `llama3` has no defaults.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def scale_rope(config: PretrainedConfig, wanted: str) -> None:
    """Have a configuration scale its rotary embeddings.

    The number of positions becomes that of the original model times the factor.

    Args:
        config: The configuration of a model, which is changed.
        wanted: ``method:factor``, or a JSON object with ``rope_type`` and its parameters.

    Raises:
        ConfigError: If it is neither, its parameters are not those of its method, or the model has
            no rotary embedding or different ones in its layers.
    """
    given = parameters_of(wanted)
    text: Any = config.get_text_config()
    own = getattr(text, "rope_parameters", None)
    if not isinstance(own, dict) or "rope_theta" not in own:
        why = "different rotary embeddings in its layers" if own else "no rotary embedding"
        raise ConfigError(f"rope_scaling: the model has {why}")
    positions = int(own.get("original_max_position_embeddings") or text.max_position_embeddings)
    kept = {name: own[name] for name in ("rope_theta", "partial_rotary_factor") if name in own}
    original = given.setdefault("original_max_position_embeddings", positions)
    if given["rope_type"] in ("linear", "dynamic"):
        del given["original_max_position_embeddings"]  # not a parameter of these
        if given["rope_type"] == "dynamic":  # positions from which the base grows
            text.max_position_embeddings = original
    text.rope_parameters = kept | given
    try:
        text.validate_rope()
        ROPE_INIT_FUNCTIONS[given["rope_type"]](text, "cpu", seq_len=2 * original)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"rope_scaling {quote(wanted)}: {error}") from error
    if given["rope_type"] != "dynamic":
        factor = float(given.get("factor") or 1.0)
        text.max_position_embeddings = max(positions, int(factor * original))


def parameters_of(wanted: str) -> dict[str, Any]:
    """Return the parameters that an option means; see `scale_rope`."""
    method, _, factor = wanted.partition(":")
    if method in METHODS:
        try:
            number = float(factor)
        except ValueError:
            number = 0.0
        if number < 1:
            raise ConfigError(f"rope_scaling: expected a factor of 1 or more, as in {method}:4")
        return {"rope_type": method, "factor": number} | (_LLAMA3 if method == "llama3" else {})
    try:
        given = json.loads(wanted)
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise ConfigError(
            f"rope_scaling: expected {', '.join(f'{m}:4' for m in METHODS)} or a JSON object, got "
            f"{quote(wanted)}"
        )
    given.setdefault("rope_type", given.pop("type", None))  # the name in older files
    if given["rope_type"] not in ROPE_INIT_FUNCTIONS:
        known = ", ".join(sorted(ROPE_INIT_FUNCTIONS))
        raise ConfigError(f"rope_scaling: rope_type is one of {known}")
    return given
