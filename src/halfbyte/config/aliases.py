"""The option names of axolotl, LLaMA-Factory and TRL, translated to ours.

The translation is logged; an unknown name is an error, and the nearest name is suggested. A value
that means something else there is converted, or refused: it is never taken as it is.
Nothing here imports torch.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from pydantic import BaseModel

from halfbyte.foreign_text import quote, shorten


def _word(value: Any) -> str:
    """A plain value in lower case; an empty string for a list, a mapping or a huge number."""
    plain = isinstance(value, str | float | None) or (isinstance(value, int) and abs(value) < 2**63)
    return str(value).lower() if plain else ""


# axolotl's keys of a source, and ours; None: the format, which is found from the keys of the rows.
_SOURCE_KEYS = {"type": None, "ds_type": None, "name": "config", "field_messages": "columns"}
_SOURCE_KEYS |= {name: name for name in ("path", "weight", "config", "split", "columns")}


def _source(value: Any) -> Any:
    """One of axolotl's data sets as a source of ours.

    Raises:
        ValueError: It has a key without an equivalent.
    """
    if not isinstance(value, dict):
        return value
    if other := sorted(str(key) for key in value if key not in _SOURCE_KEYS):
        expected = ", ".join(f"`{name}`" for name in ("path", "split", "name", "weight", "columns"))
        raise ValueError(f"expected {expected}; {shorten(other[0])} is not supported")
    found = {
        ours: {"messages": given} if key == "field_messages" else given
        for key, given in value.items()
        if (ours := _SOURCE_KEYS[key]) is not None and given is not None
    }
    return found["path"] if found.keys() == {"path"} else found


class Alias(NamedTuple):
    """Another project's name for one of our fields, and how its values are translated."""

    field: str
    meanings: Mapping[str, str | None] = {}
    """Values, in lower case, and their translations; other values are unchanged."""
    yields: frozenset[str] = frozenset()
    """Values, in lower case, that only exclude a choice: any other name for the field overrides."""
    only: str | None = None
    """If not None, values without a translation are refused, and the message ends with this."""

    def read(self, value: Any) -> Any:
        """The value in our terms.

        Raises:
            ValueError: It has no equivalent; the message says what is expected.
        """
        if self.field in ("data", "eval_data") and isinstance(value, list):
            found = [_source(one) for one in value]
            return found[0] if len(found) == 1 and isinstance(found[0], str) else found
        if self.only is not None and _word(value) not in self.meanings:
            raise ValueError(f"expected {' or '.join(self.meanings)}")
        return self.meanings.get(_word(value), value)

    @property
    def is_flag(self) -> bool:
        """Whether the name can be used without a value on the command line."""
        return "true" in self.meanings

    def gives_way(self, value: Any) -> bool:
        """Whether the value only excludes a choice."""
        return _word(value) in self.yields


class Refusal(NamedTuple):
    """Another project's option that has no equivalent."""

    harmless: str
    """The value, in lower case, that asks for nothing else than what is done."""
    reason: str
    also: tuple[str, ...] = ()
    """Further values of that kind."""

    def allows(self, value: Any) -> bool:
        """Whether a value asks for nothing else than what is done."""
        return _word(value) in (self.harmless, "none", *self.also)


_ALL = {"all": "all-linear"}
_SWITCH = {"true": "true", "false": "false"}
_AFTER_WARMUP = {"constant_with_warmup": "constant"}  # ours has a warm-up with any decay
_INPUTS_TOO = {"true": "all", "false": "assistant"}
# Files often have both names, one of them false or empty, which YAML reads as None.
_NOT_THIS = frozenset(("false", "none"))
_NO_SHARE = {"0": None, "0.0": None}
_ADAMW = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_32bit"), "adamw"),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_torch_8bit", "adamw8bit"), "adamw_8bit"),
    **dict.fromkeys(
        ("paged_adamw", "paged_adamw32bit", "pagedadamw", "pagedadamw32bit"), "paged_adamw_32bit"
    ),
    **dict.fromkeys(("paged_adamw8bit", "pagedadamw8bit"), "paged_adamw_8bit"),
}

ALIASES: dict[str, Alias] = {
    "base_model": Alias("model"),
    "model_name_or_path": Alias("model"),
    "model_revision": Alias("revision"),
    "dataset": Alias("data"),
    "dataset_name": Alias("data"),
    "datasets": Alias("data"),
    "columns": Alias("column"),
    "output_dir": Alias("output"),
    "adapter": Alias(
        "quant",
        {"qlora": "nf4", "lora": "none"},
        only="; it is axolotl's name for `quant`, and a run is continued by --resume alone",
    ),
    "load_in_4bit": Alias("quant", {"true": "nf4", "false": "none"}, only=""),
    "quantization_bit": Alias("quant", {"4": "nf4"}, only=""),
    "quantization_type": Alias("quant", {"nf4": "nf4", "fp4": "fp4"}, only=""),
    "bnb_4bit_quant_type": Alias("quant", {"nf4": "nf4", "fp4": "fp4"}, only=""),
    "bnb_4bit_use_double_quant": Alias("double_quant", _SWITCH, only=""),
    "double_quantization": Alias("double_quant", _SWITCH, only=""),
    "bnb_4bit_compute_dtype": Alias("compute_dtype"),
    "bf16": Alias("compute_dtype", {"true": "bfloat16", "false": "float32"}, _NOT_THIS),
    "fp16": Alias("compute_dtype", {"true": "float16", "false": "float32"}, _NOT_THIS),
    "r": Alias("lora_r"),
    "lora_rank": Alias("lora_r"),
    "peft_use_dora": Alias("use_dora"),
    "peft_use_rslora": Alias("use_rslora"),
    "lora_target": Alias("target_modules", _ALL),
    "lora_target_modules": Alias("target_modules", _ALL),
    "lora_target_linear": Alias("target_modules", {"true": "all-linear"}, _NOT_THIS, only=""),
    "lora_modules_to_save": Alias("modules_to_save"),
    "additional_target": Alias("modules_to_save"),
    "cutoff_len": Alias("max_length"),
    "sequence_len": Alias("max_length"),
    "max_seq_length": Alias("max_length"),
    "assistant_only_loss": Alias("train_on", {"true": "assistant", "false": "all"}, only=""),
    "train_on_inputs": Alias("train_on", _INPUTS_TOO, only=""),
    "train_on_prompt": Alias("train_on", _INPUTS_TOO, only=""),
    "micro_batch_size": Alias("batch_size"),
    "per_device_train_batch_size": Alias("batch_size"),
    "sample_packing": Alias("packing", _SWITCH),
    "neat_packing": Alias("packing", _SWITCH),
    "num_epochs": Alias("epochs"),
    "num_train_epochs": Alias("epochs"),
    "max_steps": Alias("max_steps", {"-1": None}),
    "lr": Alias("learning_rate"),
    "lr_scheduler": Alias("lr_scheduler_type", _AFTER_WARMUP),
    "lr_scheduler_type": Alias("lr_scheduler_type", _AFTER_WARMUP),
    "cosine_min_lr_ratio": Alias("min_lr_rate"),
    "min_lr_ratio": Alias("min_lr_rate"),
    "min_lr": Alias("min_learning_rate"),
    "lr_end": Alias("min_learning_rate"),
    "num_decay_steps": Alias("lr_decay_steps"),
    "embedding_lr": Alias("embedding_learning_rate"),
    "noisy_embedding_alpha": Alias("neftune_noise_alpha"),
    "moe_aux_loss_coef": Alias("router_aux_loss_coef"),
    "optimizer": Alias("optim", _ADAMW),
    "optim": Alias("optim", _ADAMW),
    "gradient_checkpointing": Alias(
        "activations", {"true": "recompute", "false": "save", "offload": "offload"}, only=""
    ),
    "chat_template": Alias("chat_template", {"tokenizer_default": None}),
    "chat_template_path": Alias("chat_template"),
    "template": Alias("chat_template"),
    "eval_dataset": Alias("eval_data"),
    "test_datasets": Alias("eval_data"),
    # There it is a switch, and hub_model_id the name.
    "push_to_hub": Alias("push_to_hub", {"false": None}, frozenset(("true",))),
    "hub_model_id": Alias("push_to_hub"),
    "hub_private_repo": Alias("hub_private", _SWITCH, only=""),
    "val_set_size": Alias("eval_split", _NO_SHARE),
    "val_size": Alias("eval_split", _NO_SHARE),
    "test_size": Alias("eval_split", _NO_SHARE),
    "load_best_model_at_end": Alias("load_best", _SWITCH, only=""),
    "metric_for_best_model": Alias("metric_for_best", {"eval_loss": "loss"}),
    "greater_is_better": Alias("metric_mode", {"true": "max", "false": "min"}, only=""),
    "early_stopping_steps": Alias("early_stopping_patience"),  # LLaMA-Factory counts evaluations
    "resume_from_checkpoint": Alias(
        "resume", _SWITCH, only="; a run goes on from the newest checkpoint in its `output`"
    ),
}

_WEIGHTS = "sources are mixed by weights, which are part of `data`: a.jsonl:0.7 and b.jsonl:0.3"
_IN_DATA = "it is part of `data`: owner/name:split, or owner/name:config:split"
SCHEDULER_KWARGS = "lr_scheduler_kwargs"
_OF_SCHEDULERS = {
    **{name: name for name in ("min_lr", "min_lr_rate", "min_lr_ratio", "lr_end")},
    "num_decay_steps": "num_decay_steps",
    **{name: f"lr_{name}" for name in ("num_cycles", "power", "timescale", "decay_type")},
}
"""What ``lr_scheduler_kwargs`` of transformers may contain, and the options these are."""
_IN_STEPS = "this is given in steps: use `{0}`, or leave it out for ten times per run"

REFUSED: dict[str, Refusal] = {
    "trust_remote_code": Refusal(
        "false",
        "code that comes with a model is never run; leave it out, and use a model of a family that "
        "transformers itself has",
    ),
    "load_in_8bit": Refusal(
        "false", "8-bit base weights are not supported; use `quant` nf4 (4 bits) or none (16 or 32)"
    ),
    "embedding_lr_scale": Refusal(
        "1.0", "give the rate itself as `embedding_learning_rate`, learning_rate times the scale"
    ),
    "finetuning_type": Refusal("lora", "only LoRA and QLoRA are trained"),
    # Weights do not depend on evaluations, so not to evaluate is no other run.
    "eval_strategy": Refusal("steps", _IN_STEPS.format("eval_steps"), ("no", "false")),
    "evaluation_strategy": Refusal("steps", _IN_STEPS.format("eval_steps"), ("no", "false")),
    "evals_per_epoch": Refusal("none", _IN_STEPS.format("eval_steps")),
    "saves_per_epoch": Refusal("none", _IN_STEPS.format("save_steps")),
    "stage": Refusal("sft", "only supervised fine-tuning is done"),
    "mix_strategy": Refusal("concat", _WEIGHTS),
    "interleave_probs": Refusal("none", _WEIGHTS),
    "dataset_config": Refusal("none", _IN_DATA),
    "dataset_train_split": Refusal("train", _IN_DATA),
    "dataset_test_split": Refusal("test", "name what to evaluate on in `eval_data`"),
}


class Translation(NamedTuple):
    """Options under our names, messages for the user, and errors."""

    values: dict[str, Any]
    notes: list[str]
    problems: list[str]


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean `learning_rate`?``, or an empty string if no known name is similar."""
    near = difflib.get_close_matches(shorten(name), list(known), n=1, cutoff=0.7)
    return f"; did you mean `{near[0]}`?" if near else ""


def aliases_of(options: type[BaseModel]) -> dict[str, Alias]:
    """The aliases that apply to these options."""
    fields = options.model_fields
    return {
        name: alias
        for name, alias in ALIASES.items()
        if alias.field in fields and (name not in fields or name == alias.field)
    }


def without_scheduler_kwargs(
    given: Mapping[str, Any], options: type[BaseModel]
) -> tuple[dict[str, Any], list[str]]:
    """Replace ``lr_scheduler_kwargs``, a mapping or JSON text, by what it contains; and errors."""
    rest, problems = dict(given), list[str]()
    if SCHEDULER_KWARGS not in given or "lr_scheduler_type" not in options.model_fields:
        return rest, problems
    kwargs = rest.pop(SCHEDULER_KWARGS) or {}
    if isinstance(kwargs, str):
        with suppress(ValueError, RecursionError):
            kwargs = json.loads(kwargs)
    if not isinstance(kwargs, dict):
        return rest, [f"`{SCHEDULER_KWARGS}`: expected a mapping, got {quote(kwargs)}"]
    for name, value in kwargs.items():
        if name not in _OF_SCHEDULERS:
            known = ", ".join(_OF_SCHEDULERS)
            problems.append(f"`{SCHEDULER_KWARGS}`: expected {known}, got {quote(name)}")
        elif rest.setdefault(_OF_SCHEDULERS[name], value) != value:
            problems.append(f"`{name}` is given twice, once in `{SCHEDULER_KWARGS}`; remove one")
    return rest, problems


def translate(given: Mapping[str, Any], options: type[BaseModel]) -> Translation:
    """Translate aliases into our names; collect unknown names and refused values as errors."""
    aliases = aliases_of(options)
    values: dict[str, Any] = {}
    given_as: dict[str, str] = {}
    notes = list[str]()
    given, problems = without_scheduler_kwargs(given, options)
    sure = {
        aliases[name].field if name in aliases else name
        for name, value in given.items()
        if name not in aliases or not aliases[name].gives_way(value)
    }
    for name, value in given.items():
        pair = f"`{shorten(name)}: {_shown(value)}`"
        if name in aliases:
            alias = aliases[name]
            if value is None and name != "adapter":  # without a value, that is full fine-tuning
                continue
            if alias.gives_way(value) and alias.field in sure:
                notes.append(f"{pair} is ignored: `{alias.field}` is set by another name")
                continue
            try:
                field, read = alias.field, alias.read(value)
            except ValueError as error:
                problems.append(f"`{name}`: {error}, got {quote(value)}{alias.only or ''}")
                continue
        elif name in options.model_fields:
            field, read = name, value
        elif name in REFUSED:
            if not REFUSED[name].allows(value):
                problems.append(f"`{name}`: {REFUSED[name].reason}")
            continue
        else:
            known = [*options.model_fields, *aliases]
            problems.append(f"unknown option `{shorten(name)}`{nearest(name, known)}")
            continue
        if field in values and values[field] != read:
            problems.append(
                f"`{field}` is given twice, as `{given_as[field]}` ({_shown(values[field])}) and "
                f"as `{name}` ({_shown(read)}); remove one"
            )
        if (field, read) != (name, value):
            notes.append(f"{pair} read as `{field}: {_shown(read)}`")
        values[field], given_as[field] = read, name
    return Translation(values, notes, problems)


def _shown(value: Any) -> str:
    return shorten(value) if isinstance(value, str) else quote(value)
