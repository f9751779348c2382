"""The configuration of a run: one flat, frozen model with all names, defaults and help.

The same names are used in the YAML file, on the command line (``--learning-rate`` or
``--learning_rate``) and in Python. A value goes through three stages:

1. *aliases* (``aliases.py``): option names of axolotl, LLaMA-Factory and TRL are translated, and
   the translation is logged; an unknown name is an error, and the nearest name is suggested;
2. *merging*: options on the command line override those of the file;
3. *validation*: pydantic checks every value and the rules between them.

All errors of all stages are reported together, in one ``ConfigError``. Nothing here imports torch,
so errors in the configuration are reported immediately.
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
from halfbyte.foreign_text import quote, shorten
from halfbyte.input_files import read_file

_MAX_YAML = 100_000  # bytes; PyYAML reads them in a second, and all options take 3,000

# Python writes bytes of a path that are not UTF-8 as U+DC80 to U+DCFF.
_NOT_IN_PATHS = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")

# Values far above what adapters train with, also those of tiny models, and what is usual.
_HARDLY_MEANT = {
    "learning_rate": (0.05, "adapters usually train at 1e-5 to 1e-3"),
    "lora_r": (1024, "adapters usually have a rank of 4 to 256"),
    "epochs": (100, "adapters usually train for 1 to 5"),
}

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(value: Any) -> Any:
    """Read a size such as ``16GB`` (10^9), ``16GiB`` (2^30) or a plain number of bytes.

    Anything but a string or a number is returned unchanged, for pydantic to validate.

    Raises:
        ValueError: It is not a size, or a number without a unit that cannot be meant as bytes.
    """
    if not isinstance(value, str | int | float):
        return value
    number = str(value).strip()
    if re.fullmatch(r"\d{1,4}(\.\d+)?", number) and float(number):
        raise ValueError(f"{number} has no unit; write {number}GB or {number}GiB")
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"([\d.]+(?:e\d+)?)\s*([kmgt]?i?)b?", value.strip().lower())
    scale = (_UNITS | _BINARY_UNITS).get(match[2]) if match else None
    if match is None or scale is None or match[1].count(".") > 1:
        raise ValueError("expected a size such as 16GB or 12.5GiB")
    return int(min(float(match[1]) * scale, 2.0**63))


def parse_pairs(value: Any) -> Any:
    """Read ``name=value,name=value``; anything but a string is returned unchanged.

    Raises:
        ValueError: the string is not a list of pairs.
    """
    if not isinstance(value, str):
        return value
    pairs = [pair.rpartition("=") for pair in value.split(",") if pair.strip()]
    if not all(name.strip() and number.strip() for name, _, number in pairs):
        raise ValueError("expected NAME=VALUE,NAME=VALUE")
    return {name.strip(): number.strip() for name, _, number in pairs}


def parse_names(value: Any) -> Any:
    """Read ``name,name``; anything but a string is returned unchanged."""
    if not isinstance(value, str):
        return value
    return [name.strip() for name in value.split(",") if name.strip()]


def parse_trackers(value: Any) -> Any:
    """Read ``name,name`` as ``parse_names`` does, without transformers' ``none``."""
    names = parse_names(value)
    return [name for name in names if name != "none"] if isinstance(names, list) else names


def _known_block_size(value: int) -> int:
    if not 32 <= value <= 4096 or value & (value - 1):
        raise ValueError("expected a power of 2 from 32 to 4096")
    return value


Positive = Annotated[float, Field(gt=0)]
BlockSize = Annotated[int, AfterValidator(_known_block_size)]


class Options(BaseModel):
    """Base class of all options: frozen, no unknown names, no NaN or infinity."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )
    sections: ClassVar[dict[str, str]] = {}
    """Headings of ``--help``, keyed by the field that each precedes."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads `yes` and `on` as true, which pydantic would convert to the number 1.
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and field.annotation is not bool:
            raise ValueError("expected a value")
        if isinstance(value, str) and _NOT_IN_PATHS.search(value):
            raise ValueError("expected text without null characters and halves of surrogate pairs")
        return value


class BaseOptions(Options):
    """The base model, and how its weights are stored."""

    model: str = Field(
        min_length=1,
        description="base model: a directory of safetensors, a .gguf file, or a hub id",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    quant: Literal["nf4", "fp4", "none"] = Field(
        "nf4", description="4-bit type of the frozen weights; none keeps 16 or 32 bits (plain LoRA)"
    )
    double_quant: bool = Field(True, description="quantise the scales (double quantisation)")
    block_size: BlockSize = Field(
        64, description="weights that share a scale: a power of 2, 32 to 4096"
    )
    quantize_head: bool = Field(
        False, description="quantise the output head too; if it is tied to the embedding, both"
    )
    quantize_embeddings: bool = Field(
        False, description="quantise the embedding too; transformers cannot load such a model"
    )
    quant_search: bool = Field(
        False,
        description="search for scales with a smaller error, in the same format; the model is read "
        "twice",
    )

    @model_validator(mode="after")
    def _packing_needs_a_type(self) -> Self:
        if self.quant == "none" and (self.quantize_head or self.quantize_embeddings):
            raise ValueError("`quantize_head` and `quantize_embeddings` need `quant` nf4 or fp4")
        if self.quant == "none" and self.quant_search:
            raise ValueError("`quant_search` needs `quant` nf4 or fp4")
        return self


class ModelOptions(BaseOptions):
    """A base model to run: dtype, device and cache."""

    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="dtype of matrix products; auto chooses by hardware; float16 is for GPUs only, "
        "with loss scaling",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to compute")
    cache_quantized: bool = Field(
        False, description="cache the quantised base model in ~/.cache and load it from there"
    )


class TrainConfig(ModelOptions):
    """All options of a training run."""

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
    max_length: int = Field(
        1024, ge=2, description="longest example, in tokens; longer ones are truncated"
    )
    train_on: Literal["assistant", "all"] = Field(
        "assistant", description="supervised tokens: the assistant's, or all"
    )
    eval_data: str | None = Field(None, min_length=1, description="data to evaluate on")

    lora_r: PositiveInt = Field(16, description="rank of the adapters")
    lora_alpha: float = Field(16.0, gt=0, description="adapters are scaled by alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapters' input")
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(r) instead (rsLoRA)")
    use_dora: bool = Field(False, description="also train the norms of the weights' rows (DoRA)")
    init_lora_weights: Literal["kaiming", "qera"] = Field(
        "kaiming",
        description="initial adapters: zero (B is 0), or an approximation of the quantisation "
        "error (QERA), for which the base model is read twice",
    )
    target_modules: str | tuple[str, ...] = Field(
        "all-linear",
        description="linear layers with an adapter: all-linear, names (q_proj,v_proj), or a "
        "regular expression",
    )
    rank_pattern: Annotated[dict[str, PositiveInt], BeforeValidator(parse_pairs)] = Field(
        {}, description="per-layer lora_r, such as v_proj=32,layers.0.mlp.up_proj=4"
    )
    alpha_pattern: Annotated[dict[str, Positive], BeforeValidator(parse_pairs)] = Field(
        {}, description="per-layer lora_alpha; in both, names may be regular expressions"
    )

    modules_to_save: Annotated[tuple[str, ...], BeforeValidator(parse_names)] = Field(
        (), description="modules to train in full, such as embed_tokens,lm_head,norm"
    )

    batch_size: PositiveInt = Field(1, description="examples per micro-batch")
    gradient_accumulation_steps: PositiveInt = Field(
        8, description="micro-batches per optimizer step"
    )
    epochs: float = Field(1.0, gt=0, le=10**6, description="passes over the data")
    max_steps: PositiveInt | None = Field(
        None, description="number of optimizer steps; overrides epochs"
    )

    learning_rate: float = Field(2e-4, gt=0, description="peak learning rate")
    loraplus_lr_ratio: float = Field(
        1.0, gt=0, description="LoRA+: learning rate of B relative to that of A"
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="decay of the learning rate after the warm-up"
    )
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="fraction of steps for the warm-up")
    warmup_steps: int | None = Field(
        None, ge=0, description="steps for the warm-up; overrides warmup_ratio"
    )
    optim: Literal["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = Field(
        "adamw",
        description="optimizer: AdamW with 32- or 8-bit state; paged_ moves it to host memory when "
        "the GPU is short of memory",
    )
    paging: Literal["auto", "explicit", "managed"] = Field(
        "auto",
        description="how paged_ state is stored: on the GPU, copied to the host before steps short "
        "of memory (auto); the same with CUDA managed memory; or always on the host (explicit)",
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay of AdamW")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of AdamW's first moment")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="decay of AdamW's second moment")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    max_grad_norm: float = Field(
        1.0, ge=0, description="clip the norm of all gradients to this; 0: no clipping"
    )
    on_nonfinite: Literal["stop", "skip", "rewind"] = Field(
        "stop",
        description="if a step's loss or gradient is NaN or infinite: stop, with the state before "
        "it saved; skip the step; or rewind to the newest checkpoint and go on after the step",
    )

    activations: Literal["auto", "save", "recompute", "offload"] = Field(
        "auto",
        description="save activations for backward, or recompute them (offload: from layer inputs "
        "in host memory); on a GPU, auto and save also keep decoded weights if memory is left",
    )
    memory_budget: Annotated[PositiveInt | None, BeforeValidator(parse_bytes)] = Field(
        None, lt=2**63, description="memory limit, such as 16GB (10^9) or 16GiB (2^30)"
    )
    cuda_graphs: bool = Field(
        True, description="capture forward and backward as CUDA graphs on a GPU"
    )

    deterministic: bool = Field(False, description="bit-identical results on a GPU, at lower speed")

    output: Path = Field(description="directory for the adapter, checkpoints and journal")
    eval_steps: PositiveInt | None = Field(
        None, description="evaluate every N steps (default: only at the end)"
    )
    save_steps: PositiveInt | None = Field(
        None, description="save a checkpoint every N steps (default: ten times per run)"
    )
    save_total_limit: PositiveInt = Field(2, description="number of checkpoints to keep")
    resume: bool = Field(False, description="continue from the newest checkpoint in output")
    logging_steps: PositiveInt = Field(1, description="log every N steps")
    samples: int = Field(
        3, ge=0, description="prompts to answer before and after training, for report.html"
    )
    report_to: Annotated[
        tuple[Literal["tensorboard", "wandb", "trackio"], ...], BeforeValidator(parse_trackers)
    ] = Field((), description="trackers to log to: tensorboard, wandb, trackio")
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
                "`init_lora_weights` qera needs `quant` nf4 or fp4: without quantisation there is "
                "no error to approximate"
            )
        if self.init_lora_weights == "qera" and self.use_dora:
            raise ValueError("`init_lora_weights` qera cannot be combined with `use_dora`")
        if self.paging != "auto" and not self.optim.startswith("paged_"):
            raise ValueError("`paging` needs `optim` paged_adamw_32bit or paged_adamw_8bit")
        if self.paging == "explicit" and not self.max_grad_norm and self.on_nonfinite == "skip":
            raise ValueError(
                "`on_nonfinite` skip needs `max_grad_norm` with `paging` explicit: without "
                "clipping, layers are updated before the gradients of others are known; use rewind"
            )
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
    """One pydantic error as a sentence: which option, what was expected, what was given."""
    kind, context = error["type"], error.get("ctx", {})
    if not error["loc"]:  # a rule between options: its message names them
        return str(context["error"])
    name = str(error["loc"][0])
    if kind == "missing":
        return f"`{name}` is missing: {options.model_fields[name].description}"
    if kind == "extra_forbidden":
        return f"unknown option `{shorten(name)}`{nearest(name, options.model_fields)}"
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
        if thing and name.endswith("_steps"):
            expected += " of steps, not a share of the run"
    return f"`{name}`: {expected}, got {quote(error['input'])}"


def check(
    options: type[OptionsT], values: Mapping[str, Any], *, problems: Iterable[str] = ()
) -> OptionsT:
    """Build ``options`` from plain values, strings allowed for any type.

    Args:
        options: The class to build.
        values: Values by field name.
        problems: Errors found before; reported together with those found here.

    Raises:
        ConfigError: All errors, in one message.
    """
    found = list(problems)
    result = None
    try:
        result = options(**values)
    except ValidationError as error:
        # A union reports one error per member: one sentence per option is enough.
        sentences = {
            str(one["loc"][0]) if one["loc"] else one["msg"]: _in_words(one, options)
            for one in reversed(error.errors(include_url=False))
        }
        found += reversed(sentences.values())
    if result is None or found:
        several = f"{len(found)} errors\n  " if len(found) > 1 else ""
        raise ConfigError(several + "\n  ".join(found))
    return result


# --- files --------------------------------------------------------------------------------------


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe subset, in which a duplicate key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"`{shorten(key.value)}` is given twice", node.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the mapping in a YAML file; dashes in its keys become underscores.

    Raises:
        ConfigError: No such file, not text, not YAML, or not a mapping.
    """
    try:
        content = yaml.load(read_file(path, _MAX_YAML).decode("utf-8"), _UniqueKeys)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise ConfigError(f"cannot read the configuration file {path}: {reason}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: its lists or mappings are nested too deeply") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # What PyYAML's constructors raise for a date that does not exist, or `!!int x`.
        raise ConfigError(
            f"{path}: a value that YAML cannot read: {shorten(str(error))}"
        ) from error
    except yaml.YAMLError as error:
        problem = shorten(getattr(error, "problem", None) or "not valid YAML")
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
    """Read a YAML file, apply ``overrides``, and check the result.

    Args:
        yaml_path: A configuration file, or None.
        overrides: Options by name, ours or a known alias; values may be strings.
        problems: Errors found before; reported together with those found here.

    Returns:
        The configuration, and messages about it for the user.

    Raises:
        ConfigError: All errors, in one message.
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
            notes.append(f"`{loser}` is ignored, since `{winner}` is given")
    for name, (limit, usual) in _HARDLY_MEANT.items():
        if (value := getattr(config, name)) > limit:
            notes.append(f"`{name}` {value:g} is very high; {usual}")
    return config, notes


WRITTEN_YAML = "# The options of a run, written by halfbyte.\n"
"""The first line of a file that halfbyte has written, so that it may replace it."""


def to_yaml(config: TrainConfig) -> str:
    """The whole configuration, including defaults, as YAML that ``load_config`` reads."""
    options = config.model_dump(mode="json")
    return WRITTEN_YAML + yaml.safe_dump(options, sort_keys=False, allow_unicode=True)
