"""``adapter_config.json``: what PEFT says of an adapter, as a `LoRAConfig` and back.

``target_modules`` are modules; ``target_parameters`` are parameters by the ends of their paths:
experts, routers, and linears that PEFT would take for experts (layers/targets.py). The tensors of a
parameter's adapter are named after its module (``linear.parameter_lora.names_in_peft``).
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from halfbyte.errors import CheckpointError, ConfigError
from halfbyte.foreign_text import quote
from halfbyte.linear.lora import LoRAConfig
from halfbyte.linear.lora_targets import ALL_LINEAR, at_end, ends_with

# What PEFT can express and a plain pair of matrices with one scale cannot: (key, harmless values).
_BEYOND_US: dict[str, tuple[Any, ...]] = {
    "lora_bias": (False, None),
    "bias": ("none", None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (None, False),
    "ensure_weight_tying": (None, False),  # the head follows the embedding in training
    # PiSSA, OLoRA, CorDA and LoftQ change the base weights too, which the adapter does not hold.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def parameters_at(
    module: str, modules: str | Iterable[str], parameters: Iterable[str]
) -> list[str]:
    """Return the parameters that an adapter's tensors under a module's name can be of.

    Args:
        module: The name in the adapter's file; with ``.base_layer`` for each wrapper around it.
        modules: The ``target_modules``; if ``module`` is one of them, the answer is none.
        parameters: The ``target_parameters``. Just the name of a parameter is one of any module.
    """
    if isinstance(modules, str):
        if re.fullmatch(modules, module):
            return []
    elif any(ends_with(module, name) for name in modules):
        return []
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    leaves = dict.fromkeys(name.rpartition(".")[2] for name in parameters)
    paths = (f"{module}.{leaf}" for leaf in leaves)
    return [path for path in paths if any(ends_with(path, name) for name in parameters)]


def peft_fields(
    config: LoRAConfig,
    modules: Iterable[str],
    removed: Collection[str],
    base_name: str,
    *,
    fan_in_fan_out: bool,
) -> dict[str, Any]:
    """Return the content of ``adapter_config.json``.

    Args:
        config: The configuration, in PEFT's terms (`linear.lora.in_peft_terms`).
        modules: The names of what has an adapter, as in the adapter's file.
        removed: Paths of modules that the base model did not have in training.
        base_name: The name of the base model.
        fan_in_fan_out: Whether the linears are Conv1D in other programs, as PEFT says of them.
    """
    targets, parameters = config.target_modules, config.target_parameters
    named = () if targets == ALL_LINEAR else targets
    modules = {module for module in modules if not parameters_at(module, named, parameters)}
    found = _peft_targets(targets, sorted(modules), removed)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": config.r,
        "lora_alpha": _number(config.alpha),
        "lora_dropout": config.dropout,
        "use_rslora": config.use_rslora,
        "target_modules": found,
        "target_parameters": list(parameters) or None,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": list(config.modules_to_save) or None,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": {key: _number(alpha) for key, alpha in config.alpha_pattern.items()},
        "use_dora": config.use_dora,
        "layers_to_transform": None,
        "layers_pattern": None,
        "revision": None,
    }


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _peft_targets(
    targets: str | tuple[str, ...], modules: list[str], removed: Collection[str]
) -> list[str]:
    """Return the targets in PEFT's terms, which must mean exactly ``modules``.

    PEFT resolves its own ``all-linear`` with the model it loads, and possibly differently from
    ours, so the names are written out. An expression is written as the paths it matches, since PEFT
    reduces it to the last parts of their names in families whose experts transformers stores
    together (transformers_weight_conversion.py); so are names that also match ``removed`` modules.
    """
    if targets == ALL_LINEAR:
        targets = tuple(sorted({module.rpartition(".")[2] for module in modules}))
    if isinstance(targets, str):
        return modules
    ends = tuple(f".{name}" for name in targets)
    return modules if any(f".{path}".endswith(ends) for path in removed) else list(targets)


def check_plain(directory: Path, fields: dict[str, Any]) -> None:
    """Check that an adapter is one that we can express.

    Raises:
        CheckpointError: If it is of another type, or has an option beyond ours.
    """
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{directory} is a PEFT adapter of type {quote(kind)}; only LORA is supported"
        )
    beyond = [
        f"{key}={quote(fields[key])}"
        for key, harmless in _BEYOND_US.items()
        if key in fields and fields[key] not in harmless
    ]
    if beyond:
        raise CheckpointError(
            f"the adapter {directory} is more than LoRA: {', '.join(beyond)}; "
            "merge it into its base with PEFT, and use the merged model"
        )


_Rank = Annotated[int, Field(strict=True, ge=1)]
_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class _Numbers(BaseModel):
    """The numeric fields of ``adapter_config.json``."""

    r: _Rank
    lora_alpha: _Number
    lora_dropout: Annotated[_Number, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool | None = None
    use_dora: bool | None = None
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, _Number] | None = None


def names_in(path: Path, fields: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return a field of ``adapter_config.json`` that is a list of names, or null.

    Raises:
        CheckpointError: If it is something else.
    """
    names = fields.get(name) or []
    if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
        raise CheckpointError(f"{path}: {name} should be a list of names")
    return tuple(names)


def config_of(path: Path, fields: dict[str, Any], modules: Sequence[str]) -> LoRAConfig:
    """Return the configuration of an adapter of ``modules``, without patterns for other modules.

    Args:
        path: The ``adapter_config.json``, for messages.
        fields: Its content.
        modules: The names of what has an adapter, as in the adapter's file.

    Raises:
        CheckpointError: If a number, a name or a pattern is invalid.
    """
    wanted = names_in(path, fields, "target_parameters")
    named: str | tuple[str, ...] = ()
    if wanted:
        text = fields.get("target_modules")
        named = text if isinstance(text, str) else names_in(path, fields, "target_modules")
    try:
        at = {module: parameters_at(module, named, wanted) for module in modules}
    except re.error as error:
        raise CheckpointError(f"{path}: target_modules is no expression: {error}") from None
    of_parameters = [parameter for paths in at.values() for parameter in paths]
    modules = [module for module, paths in at.items() if not paths]
    try:
        numbers = _Numbers.model_validate(fields)
        config = LoRAConfig(
            r=numbers.r,
            alpha=numbers.lora_alpha,
            dropout=numbers.lora_dropout,
            use_rslora=bool(numbers.use_rslora),
            use_dora=bool(numbers.use_dora),
            target_modules=tuple(modules),
            rank_pattern=numbers.rank_pattern or {},
            alpha_pattern=numbers.alpha_pattern or {},
            target_parameters=tuple(
                name for name in wanted if any(ends_with(path, name) for path in of_parameters)
            ),
        )
    except ValidationError as error:
        names = dict.fromkeys(str(e["loc"][0]) for e in error.errors())
        wrong = [f"{name}={quote(fields.get(name))}" for name in names]
        raise CheckpointError(
            f"{path}: {', '.join(wrong)} are not the numbers of an adapter"
        ) from None
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    used = {
        key
        for key in (*config.rank_pattern, *config.alpha_pattern)
        if any(at_end(key, name) for name in (*modules, *of_parameters))
    }
    return replace(
        config,
        rank_pattern={k: v for k, v in config.rank_pattern.items() if k in used},
        alpha_pattern={k: v for k, v in config.alpha_pattern.items() if k in used},
    )
