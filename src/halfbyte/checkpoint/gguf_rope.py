"""Rotary embeddings as keys and tensors of a GGUF file, both ways.

llama.cpp has a table of divisors for the frequencies of Llama 3 (``rope_freqs.weight``), two for
LongRoPE, and keys for linear scaling and YaRN. The table of Llama 3 is computed from four numbers,
which are found again from it: a frequency f in the middle of its ramp is divided by d, with
1 / d = (1 - s) / factor + s and s linear in f, so two such frequencies determine the line.
"""

import logging
import math
from typing import Any

import torch
from gguf import GGUFWriter
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from halfbyte.checkpoint.gguf_file import F32, STRING, U32, GGUFFile
from halfbyte.errors import CheckpointError
from halfbyte.foreign_text import quote

logger = logging.getLogger("halfbyte")

FREQUENCIES = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
_YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
_KNOWN = {
    # Positions of text are the same in each section of Qwen's, and change nothing.
    "default": {"partial_rotary_factor", "mrope_section", "mrope_interleaved"},
    "linear": {"partial_rotary_factor", "factor"},
    "yarn": {
        *("partial_rotary_factor", "factor", "original_max_position_embeddings", "truncate"),
        *_YARN.values(),
    },
    "llama3": {
        *("partial_rotary_factor", "factor", "original_max_position_embeddings"),
        *("low_freq_factor", "high_freq_factor"),
    },
    "longrope": {
        *("partial_rotary_factor", "factor", "original_max_position_embeddings"),
        *("long_factor", "short_factor"),
    },
}


class Rope:
    """The rotary embedding of a configuration, as a GGUF file expresses it.

    Attributes:
        parameters: transformers' parameters; those of full attention, if layers differ.
        dimensions: How many numbers of a head are rotated.

    Args:
        config: The configuration of the text model.
        head_dim: Numbers of a head.
        types: The scaled kinds that llama.cpp implements for the architecture.

    Raises:
        CheckpointError: If it cannot be expressed.
    """

    def __init__(self, config: PretrainedConfig, head_dim: int, types: tuple[str, ...]) -> None:
        self._config = config
        parameters: dict[str, Any] = dict(config.rope_parameters)
        self._local = parameters.get("sliding_attention")
        self.parameters = dict(parameters.get("full_attention", parameters))
        self.dimensions = int(head_dim * self.parameters.get("partial_rotary_factor", 1.0))
        self.kind: str = self.parameters.get("rope_type", "default")
        local = (self._local or {}).get("rope_type", "default")
        for kind in (self.kind, local):
            if kind not in ("default", *types):
                raise unsaid(f"rotary frequencies scaled by {quote(kind)} in {config.model_type}")
        if local != "default":
            raise unsaid(f"rotary frequencies of sliding attention scaled by {quote(local)}")
        given = {key for key, value in self.parameters.items() if value is not None}
        if more := given - _KNOWN[self.kind] - {"rope_type", "rope_theta"}:
            raise unsaid(f"the options {', '.join(sorted(more))} of rotary frequencies")

    @property
    def theta(self) -> float:
        """The base of the frequencies."""
        return float(self.parameters["rope_theta"])

    def add_keys(self, writer: GGUFWriter) -> None:
        """Add the keys to a file being written."""
        name, given = writer.arch, self.parameters
        if self.kind == "yarn" and self.parameters.get("truncate") is False:
            logger.warning(
                "llama.cpp rounds the range of frequencies that YaRN scales to whole ones, which "
                "this model does not (`truncate`): answers differ slightly"
            )
        writer.add_rope_dimension_count(self.dimensions)
        writer.add_rope_freq_base(self.theta)
        if self._local is not None:
            writer.add_float32(f"{name}.rope.freq_base_swa", float(self._local["rope_theta"]))
        if self.kind in ("linear", "yarn"):
            writer.add_string(f"{name}.rope.scaling.type", self.kind)
            writer.add_rope_scaling_factor(float(given["factor"]))
        if self.kind in ("yarn", "longrope"):
            writer.add_rope_scaling_orig_ctx_len(self._original())
        if self.kind == "yarn":
            for key, option in _YARN.items():
                if given.get(option) is not None:
                    writer.add_float32(f"{name}.rope.scaling.{key}", float(given[option]))
        if self.kind == "longrope":
            _, factor = ROPE_INIT_FUNCTIONS["longrope"](self._config, torch.device("cpu"))
            writer.add_rope_scaling_attn_factors(float(factor))

    def _original(self) -> int:
        found = self.parameters.get("original_max_position_embeddings")
        found = found or getattr(self._config, "original_max_position_embeddings", None)
        return int(found or self._config.max_position_embeddings)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tables of divisors, float32 [dimensions / 2], by their names in the file."""
        if self.kind == "llama3":
            scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](self._config, torch.device("cpu"))
            return {FREQUENCIES: _plain(self.theta, self.dimensions) / scaled.float()}
        if self.kind == "longrope":
            tables = {LONG: "long_factor", SHORT: "short_factor"}
            return {name: torch.tensor(self.parameters[key]) for name, key in tables.items()}
        return {}


def _plain(theta: float, dimensions: int) -> Tensor:
    return theta ** -(torch.arange(0, dimensions, 2, dtype=torch.float32) / dimensions)


def read_rope(file: GGUFFile, head_dim: int, context: int) -> dict[str, Any]:
    """Return transformers' parameters of a file's rotary embedding, without the base if not given.

    Args:
        file: The file.
        head_dim: Numbers of a head.
        context: Its context length.

    Raises:
        CheckpointError: If a key has the wrong type.
    """
    found: dict[str, Any] = {"rope_type": "default"}
    theta = file.architecture_key("rope.freq_base", F32)
    if theta is not None:
        found["rope_theta"] = theta
    dimensions = file.architecture_key("rope.dimension_count", U32) or head_dim
    if dimensions != head_dim:
        found["partial_rotary_factor"] = dimensions / head_dim
    kind = file.architecture_key("rope.scaling.type", STRING)
    original = file.architecture_key("rope.scaling.original_context_length", U32) or context
    if kind in ("linear", "yarn"):
        factor = file.architecture_key("rope.scaling.factor", F32) or 1.0
        found |= {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            found["original_max_position_embeddings"] = original
            for key, option in _YARN.items():
                value = file.architecture_key(f"rope.scaling.{key}", F32)
                found |= {option: value} if value is not None else {}
    elif FREQUENCIES in file.tensors:
        table = torch.from_numpy(file.read(file.tensors[FREQUENCIES])).float()
        found |= _llama3(table, float(theta or 10000.0), dimensions, file)
    elif LONG in file.tensors and SHORT in file.tensors:
        found |= {"rope_type": "longrope", "original_max_position_embeddings": original}
        for name, option in ((LONG, "long_factor"), (SHORT, "short_factor")):
            found[option] = file.read(file.tensors[name]).tolist()
    return found


# Divisors are float32 and go through an exponential: as near as that leaves them.
_TOLERANCE = 1e-4
_ORIGINAL = 8192  # only its ratios to the two factors are in the table


def _llama3(table: Tensor, theta: float, dimensions: int, file: GGUFFile) -> dict[str, Any]:
    """Return the parameters that give a table of divisors, float32 [dimensions / 2].

    Raises:
        CheckpointError: If the formula of Llama 3 gives no such table.
    """
    trouble = CheckpointError(
        f"{file.path}: its table of rotary frequencies ({FREQUENCIES}) is not one that the formula "
        "of Llama 3 gives; use the model's safetensors files"
    )
    if table.shape != (dimensions // 2,) or not bool((table.isfinite() & (table > 0)).all()):
        raise trouble
    if bool((table - 1).abs().max() < _TOLERANCE):
        return {}
    factor = float(table.max())
    turns = _plain(theta, dimensions).double() / (2 * math.pi)
    smooth = ((1 / table.double()) - 1 / factor) / (1 - 1 / factor)
    ramp = (smooth > _TOLERANCE) & (smooth < 1 - _TOLERANCE)
    if ramp.sum() >= 2:
        (high_turns, *_, low_turns), (high, *_, low) = turns[ramp], smooth[ramp]
        slope = float((high - low) / (high_turns - low_turns))
        start = float(low_turns - low / slope)
    else:
        # At most one frequency is on the ramp: any line that leaves the others beside it does.
        plain = min(turns[smooth >= 1 - _TOLERANCE].tolist(), default=2 * float(turns[0]))
        divided = max(turns[smooth <= _TOLERANCE].tolist(), default=0.0)
        middle, part = plain, 1.0
        for middle, part in zip(turns[ramp].tolist(), smooth[ramp].tolist(), strict=True):
            divided = max(divided, middle - part * (plain - middle) / (1 - part))
        slope = part / (middle - divided)
        start = divided
    low_factor = start * _ORIGINAL
    found = {
        "rope_type": "llama3",
        "factor": factor,
        "original_max_position_embeddings": _ORIGINAL,
        "low_freq_factor": low_factor,
        "high_freq_factor": low_factor + _ORIGINAL / slope,
    }
    again = _divisors(turns, found)
    if not bool(((again / table - 1).abs() < _TOLERANCE).all()):
        raise trouble
    return found


def _divisors(turns: Tensor, given: dict[str, Any]) -> Tensor:
    """Return the divisors of Llama 3, from the turns per token of each frequency."""
    low, high = float(given["low_freq_factor"]), float(given["high_freq_factor"])
    original = int(given["original_max_position_embeddings"])
    smooth = ((original * turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / float(given["factor"]) + smooth)


def unsaid(what: str) -> CheckpointError:
    """Return the error for something that a GGUF file cannot express."""
    return CheckpointError(
        f"a GGUF file, as halfbyte writes it, cannot express {what}; `halfbyte merge` writes "
        "safetensors, which can"
    )
