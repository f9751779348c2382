"""Adapters on disk, as PEFT writes and reads them.

An adapter is a directory: ``adapter_config.json`` (what to attach to what), ``adapter_model
.safetensors`` (``base_model.model.<module path>.lora_A.weight`` [r, in] and ``.lora_B.weight``
[out, r]) and, from us, ``halfbyte.json``: which base it was trained on, bit for bit, and how that
base was held. PEFT ignores the third file; without it (PEFT's own adapters) nothing is known of
the base but its name.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from halfbyte.checkpoint.atomic import new_file, output_errors, require_writable
from halfbyte.checkpoint.reading import read_json
from halfbyte.checkpoint.safetensors_file import SafetensorsFile, write_safetensors
from halfbyte.errors import CheckpointError, ConfigError
from halfbyte.lora import ALL_LINEAR, LoRAConfig, at_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "halfbyte.json"

PREFIX = "base_model.model."
_TENSOR = re.compile(r"(?P<module>.+)\.lora_([AB]\.weight|magnitude_vector)")

# What PEFT can express and a plain pair of matrices with one scale cannot: (key, harmless values).
_BEYOND_US: dict[str, tuple[Any, ...]] = {
    "lora_bias": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    # PiSSA, OLoRA, CorDA and LoftQ change the base weights too, which the adapter does not hold.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


class LoadedAdapter(NamedTuple):
    """An adapter that was read from disk.

    Attributes:
        config: What to attach; its targets are the paths of the modules that have tensors.
        state: ``<module path>.lora_A.weight`` and ``.lora_B.weight``, float32.
        base_name: The base model as the one who trained it named it; "" if unknown.
        info: What ``halfbyte.json`` says; empty for an adapter that halfbyte did not write.
    """

    config: LoRAConfig
    state: dict[str, Tensor]
    base_name: str
    info: dict[str, Any]


def save_adapter(
    directory: str | Path,
    state: Mapping[str, Tensor],
    config: LoRAConfig,
    *,
    base_name: str,
    base_fingerprint: str,
    recipe: Mapping[str, Any],
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> Path:
    """Write an adapter that PEFT and halfbyte load. Each file is replaced in one step.

    Args:
        directory: Where to; created if need be, other files in it are left alone.
        state: What ``lora.adapter_state`` returns.
        config: What it was attached with.
        base_name: The base model, as given by the user.
        base_fingerprint: ``BaseSource.fingerprint`` of it.
        recipe: How the base was held in training (JSON values), for whoever loads the adapter.
        tokenizer: Saved beside it if given, with its chat template.

    Returns:
        The directory.

    Raises:
        OutputError: If the directory cannot be written.
    """
    directory = require_writable(directory, sum(tensor.nbytes for tensor in state.values()))
    with new_file(directory / WEIGHTS_NAME) as file:
        write_safetensors(file, {PREFIX + name: tensor for name, tensor in state.items()})
    write_card(
        directory,
        state,
        config,
        base_name=base_name,
        base_fingerprint=base_fingerprint,
        recipe=recipe,
    )
    if tokenizer is not None:
        with output_errors(directory):
            tokenizer.save_pretrained(directory)
    return directory


def write_card(
    directory: Path,
    names: Iterable[str],
    config: LoRAConfig,
    *,
    base_name: str,
    base_fingerprint: str,
    recipe: Mapping[str, Any],
) -> None:
    """Write what describes an adapter, its tensors' names being ``names``; see ``save_adapter``.

    Raises:
        OutputError: If the directory cannot be written.
    """
    modules = sorted({_module_of(name) for name in names})
    card = {
        "format": 1,
        "base": {"name": base_name, "fingerprint": base_fingerprint},
        "recipe": dict(recipe),
    }
    peft_config = _peft_config(config, modules, base_name)
    for name, fields in ((CARD_NAME, card), (CONFIG_NAME, peft_config)):
        with new_file(directory / name) as file:
            file.write(json.dumps(fields, indent=2).encode() + b"\n")


def _module_of(name: str) -> str:
    match = _TENSOR.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} is not the name of an adapter's tensor")
    return match["module"]


def _peft_config(config: LoRAConfig, modules: list[str], base_name: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": config.r,
        "lora_alpha": _number(config.alpha),
        "lora_dropout": config.dropout,
        "use_rslora": config.use_rslora,
        "target_modules": _peft_targets(config.target_modules, modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": {key: _number(alpha) for key, alpha in config.alpha_pattern.items()},
        "use_dora": config.use_dora,
        "layers_to_transform": None,
        "layers_pattern": None,
        "revision": None,
    }


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _peft_targets(targets: str | tuple[str, ...], modules: list[str]) -> str | list[str]:
    """Return the targets in PEFT's terms, which must mean exactly ``modules``.

    PEFT's own ``all-linear`` is a question asked of the model it loads, and it may answer
    differently than ours did, so the names are written out. A name matches the end of a path in
    PEFT only if it stands in a list, a lone string is always an expression.
    """
    if targets == ALL_LINEAR:
        return sorted({module.rpartition(".")[2] for module in modules})
    if not isinstance(targets, str):
        return list(targets)
    if all(re.fullmatch(targets, module) for module in modules):
        return targets
    return modules


def load_adapter(directory: str | Path, *, base_fingerprint: str | None = None) -> LoadedAdapter:
    """Read an adapter that halfbyte or PEFT wrote.

    Args:
        directory: The adapter's directory.
        base_fingerprint: The fingerprint of the base it is to be used with; None to not compare.

    Raises:
        CheckpointError: If a file is missing or damaged, if the adapter is more than plain LoRA,
            or if it was trained on another base.
    """
    directory = Path(directory)
    fields = read_json(directory / CONFIG_NAME, "an adapter's directory holds one")
    _check_plain(directory, fields)
    info: dict[str, Any] = {}
    if (directory / CARD_NAME).exists():
        info = read_json(directory / CARD_NAME, "halfbyte writes one")
    base = info.get("base")
    base = base if isinstance(base, dict) else {}
    trained_on = base.get("fingerprint")
    base_name = str(base.get("name") or fields.get("base_model_name_or_path") or "")
    if base_fingerprint is not None and trained_on not in (None, base_fingerprint):
        raise CheckpointError(
            f"the adapter {directory} was trained on another base model: on {base_name!r} "
            f"(fingerprint {str(trained_on)[:12]}), this one is {base_fingerprint[:12]}. "
            "Give the model it was trained on, in the same file format"
        )
    if not (directory / WEIGHTS_NAME).exists():
        raise CheckpointError(
            f"{directory} has no {WEIGHTS_NAME}; an adapter in PyTorch's pickle format (.bin) is "
            "not read, save it with PEFT's safe_serialization=True"
        )
    config, state = _read_state(SafetensorsFile(directory / WEIGHTS_NAME), fields)
    return LoadedAdapter(config, state, base_name, info)


def _check_plain(directory: Path, fields: dict[str, Any]) -> None:
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{directory} is a PEFT adapter of type {kind!r}; only LORA is supported"
        )
    beyond = [
        f"{key}={fields[key]!r}"
        for key, harmless in _BEYOND_US.items()
        if key in fields and fields[key] not in harmless
    ]
    if beyond:
        raise CheckpointError(
            f"the adapter {directory} is more than plain LoRA: {', '.join(beyond)}; "
            "merge it into its base with PEFT, and use the merged model"
        )


def _read_state(
    file: SafetensorsFile, fields: dict[str, Any]
) -> tuple[LoRAConfig, dict[str, Tensor]]:
    foreign = [
        name
        for name in file.entries
        if not name.startswith(PREFIX) or not _TENSOR.fullmatch(name.removeprefix(PREFIX))
    ]
    if foreign or not file.entries:
        raise CheckpointError(
            f"{file.path} should hold {PREFIX}….lora_A.weight and ….lora_B.weight, it holds "
            f"{', '.join(foreign[:4]) or 'nothing'}"
        )
    modules = list(dict.fromkeys(_module_of(name.removeprefix(PREFIX)) for name in file.entries))
    config = _config_of(file.path.parent / CONFIG_NAME, fields, modules)
    state: dict[str, Tensor] = {}
    for module in modules:
        rank = config.at(module).r
        expected: dict[str, tuple[int | None, ...]] = {
            f"{module}.lora_A.weight": (rank, None),
            f"{module}.lora_B.weight": (None, rank),
        }
        if config.use_dora:
            expected[f"{module}.lora_magnitude_vector"] = (None,)
        for name, shape in expected.items():
            entry = file.entries.get(PREFIX + name)
            if (
                entry is None
                or len(entry.shape) != len(shape)
                or any(
                    want not in (None, got) for want, got in zip(shape, entry.shape, strict=True)
                )
            ):
                came = "is missing" if entry is None else f"has the shape {list(entry.shape)}"
                want = [f"rank {rank}" if size else "any" for size in shape]
                raise CheckpointError(
                    f"{file.path}: {name} {came}; expected is [{', '.join(want)}]"
                )
            state[name] = file.read(entry.name).to(torch.float32)
    if surplus := [name for name in file.entries if name.removeprefix(PREFIX) not in state]:
        raise CheckpointError(
            f"{file.path} holds {surplus[0]}, but its {CONFIG_NAME} does not say use_dora"
        )
    return config, state


_Rank = Annotated[int, Field(strict=True, ge=1)]
_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class _Numbers(BaseModel):
    """The fields of ``adapter_config.json`` that are arithmetic."""

    r: _Rank
    lora_alpha: _Number
    lora_dropout: Annotated[_Number, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, _Number] | None = None


def _config_of(path: Path, fields: dict[str, Any], modules: list[str]) -> LoRAConfig:
    """Return the configuration of an adapter of ``modules``, patterns for others left out.

    Raises:
        CheckpointError: If a number is none, or a pattern no regular expression.
    """
    try:
        numbers = _Numbers.model_validate(fields)
        config = LoRAConfig(
            r=numbers.r,
            alpha=numbers.lora_alpha,
            dropout=numbers.lora_dropout,
            use_rslora=numbers.use_rslora,
            use_dora=numbers.use_dora,
            target_modules=tuple(modules),
            rank_pattern=numbers.rank_pattern or {},
            alpha_pattern=numbers.alpha_pattern or {},
        )
    except ValidationError as error:
        names = dict.fromkeys(str(e["loc"][0]) for e in error.errors())
        wrong = [f"{name}={fields.get(name)!r}" for name in names]
        raise CheckpointError(
            f"{path}: {', '.join(wrong)} are not the numbers of an adapter"
        ) from None
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    used = {
        key
        for key in (*config.rank_pattern, *config.alpha_pattern)
        if any(at_end(key, module) for module in modules)
    }
    return replace(
        config,
        rank_pattern={k: v for k, v in config.rank_pattern.items() if k in used},
        alpha_pattern={k: v for k, v in config.alpha_pattern.items() if k in used},
    )
