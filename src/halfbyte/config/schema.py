"""The configuration of a run: one flat, frozen model, the only home of names, defaults and help.

The same names serve the YAML file, the command line (``--learning-rate`` or
``--learning_rate``) and Python. A value goes through three stages:

1. *aliases* (``aliases.py``): a name that axolotl, LLaMA-Factory or TRL use for the same thing is
   translated and a note says so; a name nobody knows is a problem, and the nearest is suggested;
2. *layers*: what the command line gives lies on top of what the file gives;
3. *checking*: pydantic checks every value and the rules between them.

All problems of all stages are reported together, in one ``ConfigError``. Nothing here imports
torch, so a mistake in the configuration is answered at once.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from halfbyte.config.aliases import nearest, translate
from halfbyte.errors import ConfigError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(value: Any) -> Any:
    """Read a size such as ``16GB`` (10^9), ``16GiB`` (2^30) or a plain number of bytes.

    Anything but a string is handed on for pydantic to judge.

    Raises:
        ValueError: the string is no size.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"([\d.]+(?:e\d+)?)\s*([kmgt]?i?)b?", value.strip().lower())
    scale = (_UNITS | _BINARY_UNITS).get(match[2]) if match else None
    if match is None or scale is None or match[1].count(".") > 1:
        raise ValueError("expected a size such as 16GB or 12.5GiB")
    return int(float(match[1]) * scale)


def parse_pairs(value: Any) -> Any:
    """Read ``name=value,name=value``; anything but a string is handed on for pydantic to judge.

    Raises:
        ValueError: the string is no list of pairs.
    """
    if not isinstance(value, str):
        return value
    pairs = [pair.rpartition("=") for pair in value.split(",") if pair.strip()]
    if not all(name.strip() and number.strip() for name, _, number in pairs):
        raise ValueError("expected NAME=VALUE,NAME=VALUE")
    return {name.strip(): number.strip() for name, _, number in pairs}


def parse_names(value: Any) -> Any:
    """Read ``name,name``; anything but a string is handed on for pydantic to judge."""
    if not isinstance(value, str):
        return value
    return [name.strip() for name in value.split(",") if name.strip()]


def parse_trackers(value: Any) -> Any:
    """Read ``name,name`` as ``parse_names`` does; ``none``, as transformers has it, is no name."""
    names = parse_names(value)
    return [name for name in names if name != "none"] if isinstance(names, list) else names


def _known_block_size(value: int) -> int:
    if not 32 <= value <= 4096 or value & (value - 1):
        raise ValueError("expected a power of 2 from 32 to 4096")
    return value


Positive = Annotated[float, Field(gt=0)]
BlockSize = Annotated[int, AfterValidator(_known_block_size)]


class Options(BaseModel):
    """What every set of options has in common: frozen, no unknown names, no NaN or infinity."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )
    sections: ClassVar[dict[str, str]] = {}
    """For ``--help``: headings, each under the name of the field it stands before."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads `yes` and `on` as true, and pydantic would take true for the number 1.
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and field.annotation is not bool:
            raise ValueError("expected a value")
        return value


class BaseOptions(Options):
    """Which base model, and how its weights are held."""

    model: str = Field(
        min_length=1,
        description="base model: a directory of safetensors, a .gguf file, or a hub id",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    quant: Literal["nf4", "fp4", "none"] = Field(
        "nf4", description="4-bit type of the frozen weights; none keeps 16 or 32 bits (plain LoRA)"
    )
    double_quant: bool = Field(True, description="quantise the scales once more")
    block_size: BlockSize = Field(
        64, description="weights that share a scale: a power of 2, 32 to 4096"
    )
    quantize_head: bool = Field(
        False, description="pack the output head too; if tied to the embedding, both"
    )
    quantize_embeddings: bool = Field(
        False, description="pack the embedding too; transformers cannot load it so"
    )
    quant_search: bool = Field(
        False, description="search for scales that lose less, in the same format; reads it twice"
    )

    @model_validator(mode="after")
    def _packing_needs_a_type(self) -> Self:
        if self.quant == "none" and (self.quantize_head or self.quantize_embeddings):
            raise ValueError("`quantize_head` and `quantize_embeddings` need `quant` nf4 or fp4")
        if self.quant == "none" and self.quant_search:
            raise ValueError("`quant_search` needs `quant` nf4 or fp4")
        return self


class ModelOptions(BaseOptions):
    """A base model that computes."""

    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="type in which matrices are multiplied; auto asks the hardware; float16 is for "
        "a GPU, and scales the loss",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to compute")
    cache_quantized: bool = Field(
        False, description="keep the packed base in ~/.cache, and start from that the next time"
    )


class TrainConfig(ModelOptions):
    """Everything that decides what a training run does."""

    sections: ClassVar[dict[str, str]] = {
        "model": "the base model",
        "data": "the data",
        "lora_r": "the adapters",
        "batch_size": "steps",
        "learning_rate": "the optimizer",
        "activations": "memory",
        "output": "the run",
    }

    data: str = Field(
        min_length=1,
        description="training data: a .jsonl or .json file, a directory of them, or a hub id",
    )
    max_length: int = Field(1024, ge=2, description="tokens of an example; longer ones are cut")
    train_on: Literal["assistant", "all"] = Field(
        "assistant", description="tokens that count for the loss: the assistant's, or all"
    )
    eval_data: str | None = Field(None, min_length=1, description="data to evaluate on")

    lora_r: PositiveInt = Field(16, description="rank of the adapters")
    lora_alpha: float = Field(16.0, gt=0, description="adapters are scaled by alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the adapters")
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(r) instead")
    use_dora: bool = Field(False, description="train the lengths of the weights' rows too (DoRA)")
    init_lora_weights: Literal["kaiming", "qera"] = Field(
        "kaiming",
        description="adapters begin with nothing, or with the most of what packing lost (QERA), "
        "for which the base is read twice",
    )
    target_modules: str | tuple[str, ...] = Field(
        "all-linear",
        description="linears that get an adapter: all-linear, names (q_proj,v_proj), or a regular "
        "expression",
    )
    rank_pattern: Annotated[dict[str, PositiveInt], BeforeValidator(parse_pairs)] = Field(
        {}, description="another lora_r for some layers, such as v_proj=32,layers.0.mlp.up_proj=4"
    )
    alpha_pattern: Annotated[dict[str, Positive], BeforeValidator(parse_pairs)] = Field(
        {}, description="another lora_alpha, likewise; the names may be regular expressions"
    )

    modules_to_save: Annotated[tuple[str, ...], BeforeValidator(parse_names)] = Field(
        (), description="modules trained whole, such as embed_tokens,lm_head,norm"
    )

    batch_size: PositiveInt = Field(1, description="examples that go through the model together")
    gradient_accumulation_steps: PositiveInt = Field(8, description="batches in an optimizer step")
    epochs: float = Field(1.0, gt=0, description="passes over the data")
    max_steps: PositiveInt | None = Field(
        None, description="optimizer steps to make, whatever epochs says"
    )

    learning_rate: float = Field(2e-4, gt=0, description="highest learning rate of the schedule")
    loraplus_lr_ratio: float = Field(
        1.0, gt=0, description="LoRA+: learning rate of B over that of A"
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="how the learning rate falls after the warm-up"
    )
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="part of the steps that warms up")
    warmup_steps: int | None = Field(
        None, ge=0, description="steps that warm up, whatever warmup_ratio says"
    )
    optim: Literal["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = Field(
        "adamw",
        description="optimizer: moments of 32 or 8 bits; those of paged_ leave a GPU that is short "
        "of memory",
    )
    paging: Literal["auto", "explicit", "managed"] = Field(
        "auto",
        description="how paged_ does it: ahead of a step that is short, by copies (auto) or as "
        "managed memory; or explicit, always on the host",
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay of AdamW")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of AdamW's first moment")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="decay of AdamW's second moment")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    max_grad_norm: float = Field(1.0, ge=0, description="clip the gradient's norm here; 0 does not")

    activations: Literal["auto", "save", "recompute", "offload"] = Field(
        "auto",
        description="keep activations for backward, or compute them again (offload: from inputs "
        "that wait in host memory); on a GPU, auto and save keep decoded weights in what is left",
    )
    memory_budget: Annotated[PositiveInt | None, BeforeValidator(parse_bytes)] = Field(
        None, description="memory that may be used, such as 16GB (10^9) or 16GiB (2^30)"
    )
    cuda_graphs: bool = Field(
        True, description="record the passes of a step on a GPU, and play them again"
    )

    deterministic: bool = Field(
        False, description="add up in a fixed order on a GPU, too: the same bits each time, slower"
    )

    output: Path = Field(description="directory for the adapter, checkpoints and journal")
    eval_steps: PositiveInt | None = Field(
        None, description="evaluate every N steps (default: only at the end)"
    )
    save_steps: PositiveInt | None = Field(
        None, description="save a checkpoint every N steps (default: ten times a run)"
    )
    save_total_limit: PositiveInt = Field(2, description="checkpoints to keep")
    resume: bool = Field(False, description="go on from the newest checkpoint in output")
    logging_steps: PositiveInt = Field(1, description="report every N steps")
    samples: int = Field(
        3, ge=0, description="prompts answered before and after training, for report.html"
    )
    report_to: Annotated[
        tuple[Literal["tensorboard", "wandb", "trackio"], ...], BeforeValidator(parse_trackers)
    ] = Field((), description="trackers to send numbers to: tensorboard, wandb, trackio")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the adapters and the data's order")

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names_between_commas(cls, value: Any) -> Any:
        if isinstance(value, str) and re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)+", value.strip()):
            return parse_names(value)
        return value

    @property
    def state_bits(self) -> Literal[8, 32]:
        """Bits of a moment of the optimizer's state."""
        return 8 if self.optim.endswith("8bit") else 32

    @model_validator(mode="after")
    def _rules_between_fields(self) -> Self:
        if self.eval_steps is not None and self.eval_data is None:
            raise ValueError("`eval_steps` needs `eval_data`: the data to evaluate on")
        if self.init_lora_weights == "qera" and self.quant == "none":
            raise ValueError(
                "`init_lora_weights` qera needs `quant` nf4 or fp4: a plain base has lost nothing"
            )
        if self.init_lora_weights == "qera" and self.use_dora:
            raise ValueError("`init_lora_weights` qera and `use_dora` do not go together")
        if self.paging != "auto" and not self.optim.startswith("paged_"):
            raise ValueError("`paging` needs `optim` paged_adamw_32bit or paged_adamw_8bit")
        return self


# --- checking -----------------------------------------------------------------------------------

OptionsT = TypeVar("OptionsT", bound=Options)

_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
    "tuple": "a list",
}


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _in_words(error: Mapping[str, Any], options: type[Options]) -> str:
    """One pydantic error as a sentence: which option, what was expected, what came."""
    kind, context = error["type"], error.get("ctx", {})
    if not error["loc"]:  # a rule between options: its message names them
        return str(context["error"])
    name = str(error["loc"][0])
    if kind == "missing":
        return f"`{name}` is missing: {options.model_fields[name].description}"
    if kind == "extra_forbidden":
        return f"unknown option `{name}`{nearest(name, options.model_fields)}"
    bounds = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
    bound = next(
        (f"{words} {_number(context[key])}" for key, words in bounds.items() if key in context), ""
    )
    if bound:
        expected = f"expected {bound}"
    elif kind == "literal_error":
        expected = f"expected {context['expected']}"
    elif kind == "value_error":
        expected = str(context["error"])
    elif kind == "finite_number":
        expected = "expected a finite number"
    elif kind == "string_too_short":
        expected = "expected some text"
    else:
        thing = _EXPECTED.get(kind.split("_")[0])
        expected = f"expected {thing}" if thing else error["msg"]
    return f"`{name}`: {expected}, got {error['input']!r}"


def check(
    options: type[OptionsT], values: Mapping[str, Any], *, problems: Iterable[str] = ()
) -> OptionsT:
    """Build ``options`` from plain values, strings allowed for any type.

    Args:
        options: The class to build.
        values: Values by field name.
        problems: What is known to be wrong already; reported with what is found here.

    Raises:
        ConfigError: All problems, in one message.
    """
    found = list(problems)
    result = None
    try:
        result = options(**values)
    except ValidationError as error:
        # A union reports once for each of its members: one sentence for each option is enough.
        sentences = {
            str(one["loc"][0]) if one["loc"] else one["msg"]: _in_words(one, options)
            for one in reversed(error.errors(include_url=False))
        }
        found += reversed(sentences.values())
    if result is None or found:
        several = f"{len(found)} things are wrong\n  " if len(found) > 1 else ""
        raise ConfigError(several + "\n  ".join(found))
    return result


# --- files --------------------------------------------------------------------------------------


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe subset, where a key that is there twice is an error instead of a loss."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(
                None, None, f"`{min(twice)}` is there twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, dashes in its keys read as underscores.

    Raises:
        ConfigError: No such file, not text, not YAML, or not a mapping of names to values.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeys)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise ConfigError(f"cannot read the configuration file {path}: {reason}") from error
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "not valid YAML"
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: {problem}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: expected lines such as `learning_rate: 2e-4`, got a {type(content).__name__}"
        )
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def load_config(
    yaml_path: str | Path | None,
    overrides: Mapping[str, Any],
    *,
    problems: Iterable[str] = (),
) -> tuple[TrainConfig, list[str]]:
    """Read a YAML file, lay ``overrides`` on top, and check the result.

    Args:
        yaml_path: A configuration file, or None.
        overrides: Options by name, ours or a known alias; values may be strings.
        problems: What is known to be wrong already; reported with what is found here.

    Returns:
        The configuration, and messages about it for the user.

    Raises:
        ConfigError: All problems, in one message.
    """
    in_file = translate(read_yaml(yaml_path) if yaml_path is not None else {}, TrainConfig)
    on_top = translate(overrides, TrainConfig)
    config = check(
        TrainConfig,
        {**in_file.values, **on_top.values},
        problems=[*problems, *in_file.problems, *on_top.problems],
    )
    notes = in_file.notes + on_top.notes
    for winner, loser in (("max_steps", "epochs"), ("warmup_steps", "warmup_ratio")):
        if getattr(config, winner) is not None and loser in config.model_fields_set:
            notes.append(f"`{winner}` is given, so `{loser}` is not used")
    return config, notes


def to_yaml(config: TrainConfig) -> str:
    """The whole configuration, defaults included, as a file that ``load_config`` reads."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
