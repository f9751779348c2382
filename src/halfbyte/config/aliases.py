"""The option names of axolotl, LLaMA-Factory and TRL, translated to ours.

The translation is logged; an unknown name is an error, and the nearest name is suggested.
Nothing here imports torch.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel


class Alias(NamedTuple):
    """Another project's name for one of our fields, and how its values are translated."""

    field: str
    meanings: Mapping[str, str] = {}
    """Values, in lower case, and their translations; other values are unchanged."""
    yields: frozenset[str] = frozenset()
    """Values, in lower case, that only exclude a choice: any other name for the field overrides."""

    def read(self, value: Any) -> Any:
        """The value in our terms."""
        match value:
            case [{"path": str(path)}]:  # axolotl's list of data sets, with one entry
                return path
        return self.meanings.get(str(value).lower(), value)

    @property
    def is_flag(self) -> bool:
        """Whether the name can be used without a value on the command line."""
        return "true" in self.meanings

    def gives_way(self, value: Any) -> bool:
        """Whether the value only excludes a choice."""
        return str(value).lower() in self.yields


_ALL = {"all": "all-linear"}
# Files often have both names, one of them false or empty, which YAML reads as None.
_NOT_THIS = frozenset(("false", "none"))
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
    "dataset": Alias("data"),
    "dataset_name": Alias("data"),
    "datasets": Alias("data"),
    "output_dir": Alias("output"),
    "adapter": Alias("quant", {"qlora": "nf4", "lora": "none"}),
    "load_in_4bit": Alias("quant", {"true": "nf4", "false": "none"}),
    "quantization_bit": Alias("quant", {"4": "nf4"}),
    "bnb_4bit_quant_type": Alias("quant"),
    "bnb_4bit_use_double_quant": Alias("double_quant", {"true": "true", "false": "false"}),
    "bnb_4bit_compute_dtype": Alias("compute_dtype"),
    "bf16": Alias("compute_dtype", {"true": "bfloat16", "false": "float32"}, _NOT_THIS),
    "fp16": Alias("compute_dtype", {"true": "float16", "false": "float32"}, _NOT_THIS),
    "r": Alias("lora_r"),
    "lora_rank": Alias("lora_r"),
    "peft_use_dora": Alias("use_dora"),
    "peft_use_rslora": Alias("use_rslora"),
    "lora_target": Alias("target_modules", _ALL),
    "lora_target_modules": Alias("target_modules", _ALL),
    "lora_target_linear": Alias("target_modules", {"true": "all-linear"}),
    "lora_modules_to_save": Alias("modules_to_save"),
    "additional_target": Alias("modules_to_save"),
    "cutoff_len": Alias("max_length"),
    "sequence_len": Alias("max_length"),
    "max_seq_length": Alias("max_length"),
    "assistant_only_loss": Alias("train_on", {"true": "assistant", "false": "all"}),
    "train_on_inputs": Alias("train_on", {"true": "all", "false": "assistant"}),
    "micro_batch_size": Alias("batch_size"),
    "per_device_train_batch_size": Alias("batch_size"),
    "num_epochs": Alias("epochs"),
    "num_train_epochs": Alias("epochs"),
    "lr_scheduler": Alias("lr_scheduler_type"),
    "optimizer": Alias("optim", _ADAMW),
    "optim": Alias("optim", _ADAMW),
    "gradient_checkpointing": Alias("activations", {"true": "recompute", "false": "save"}),
    "eval_dataset": Alias("eval_data"),
    "resume_from_checkpoint": Alias("resume", {"true": "true", "false": "false"}),
}


class Translation(NamedTuple):
    """Options under our names, messages for the user, and errors."""

    values: dict[str, Any]
    notes: list[str]
    problems: list[str]


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean `learning_rate`?``, or an empty string if no known name is similar."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f"; did you mean `{near[0]}`?" if near else ""


def aliases_of(options: type[BaseModel]) -> dict[str, Alias]:
    """The aliases that apply to these options."""
    fields = options.model_fields
    return {
        name: alias
        for name, alias in ALIASES.items()
        if alias.field in fields and (name not in fields or name == alias.field)
    }


def translate(given: Mapping[str, Any], options: type[BaseModel]) -> Translation:
    """Translate aliases into our names; collect unknown names as errors."""
    aliases = aliases_of(options)
    values: dict[str, Any] = {}
    given_as: dict[str, str] = {}
    notes, problems = [], []
    sure = {
        aliases[name].field if name in aliases else name
        for name, value in given.items()
        if name not in aliases or not aliases[name].gives_way(value)
    }
    for name, value in given.items():
        if name in aliases and aliases[name].gives_way(value):
            if value is None:
                continue
            if (field := aliases[name].field) in sure:
                notes.append(f"`{name}: {value}` is ignored: `{field}` is set by another name")
                continue
        if name in aliases:
            field, read = aliases[name].field, aliases[name].read(value)
        elif name in options.model_fields:
            field, read = name, value
        else:
            known = [*options.model_fields, *aliases]
            problems.append(f"unknown option `{name}`{nearest(name, known)}")
            continue
        if field in values and values[field] != read:
            problems.append(
                f"`{field}` is given twice, as `{given_as[field]}` ({values[field]}) and as "
                f"`{name}` ({read}); remove one"
            )
        if (field, read) != (name, value):
            notes.append(f"`{name}: {value}` read as `{field}: {read}`")
        values[field], given_as[field] = read, name
    return Translation(values, notes, problems)
