"""The configuration of a run: one flat, frozen model with all names, defaults and help.

The same names are used in the YAML file, on the command line (``--learning-rate`` or
``--learning_rate``) and in Python; `halfbyte.config.reading` brings the three together.
Nothing here imports torch, so errors in the configuration are reported immediately.
"""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PositiveInt,
    field_validator,
    model_validator,
)

from halfbyte.config.data_sources import Columns, DataSources
from halfbyte.config.options import (
    BlockSize,
    Options,
    Positive,
    Repository,
    known_share,
    parse_bytes,
    parse_names,
    parse_pairs,
    parse_trackers,
)
from halfbyte.errors import ConfigError

OF_THE_ADAPTER = (
    "lora_r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "target_parameters",
    "modules_to_save",
)
"""Options that say what an adapter is; with ``init_adapter`` they are those of that adapter."""
CHAT_TEMPLATE = (
    "format of conversations: chatml, llama3, llama2, mistral, gemma, phi3, phi4, zephyr, alpaca, "
    "vicuna, a .jinja file, or one of the tokenizer's named templates (default: the tokenizer's)"
)


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


_LOWEST = ("min_learning_rate", "min_lr_rate")
_DECAY_TO_LOWEST = ("cosine", "cosine_with_min_lr", "polynomial", "warmup_stable_decay")
_SCHEDULES_WITH: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_LOWEST, _DECAY_TO_LOWEST),
    "lr_num_cycles": ("cosine", "cosine_with_min_lr", "cosine_with_restarts"),
    "lr_power": ("polynomial",),
    "lr_timescale": ("inverse_sqrt",),
    "lr_decay_steps": ("warmup_stable_decay",),
    "lr_decay_type": ("warmup_stable_decay",),
}
"""The schedules that an option is for."""


class TrainConfig(ModelOptions):
    """All options of a training run."""

    sections: ClassVar[dict[str, str]] = {
        "model": "the base model",
        "data": "the data",
        "init_adapter": "the adapters",
        "batch_size": "steps",
        "learning_rate": "the optimizer",
        "activations": "memory",
        "gpus": "several GPUs",
        "output": "the run",
    }

    data: DataSources = Field(
        min_length=1,
        description="training data: files (JSONL, JSON, CSV, Parquet, Arrow), a directory, a "
        "pattern, a hub id (owner/name:split), or - for standard input; may be given several "
        "times, with weights and rows, as in a.jsonl:0.7 or b.parquet[:500]",
    )
    column: Columns = Field(
        {}, description="columns under other names, such as messages=conversation"
    )
    max_samples: PositiveInt | None = Field(
        None, description="use the first N rows of each source only"
    )
    shuffle_seed: int | None = Field(
        None, ge=0, lt=2**63, description="seed of the data's order (default: seed)"
    )
    max_length: int = Field(
        1024, ge=2, description="longest example, in tokens; longer ones are truncated"
    )
    train_on: Literal["assistant", "all"] = Field(
        "assistant", description="supervised tokens: the assistant's, or all"
    )
    chat_template: str | None = Field(None, min_length=1, description=CHAT_TEMPLATE)
    rope_scaling: str | None = Field(
        None,
        min_length=1,
        description="scale rotary embeddings for longer contexts: yarn:4, linear:2, dynamic:2, "
        "llama3:8, or JSON as in config.json (default: as the model has it)",
    )
    eval_data: DataSources | None = Field(
        None, min_length=1, description="data to evaluate on; sources as for data"
    )
    eval_split: Annotated[float | None, AfterValidator(known_share)] = Field(
        None,
        description="instead of eval_data: rows of data to hold out, a share such as 0.02 or their "
        "number; rows with the same text stay together",
    )
    cache_data: bool = Field(
        True, description="keep large data, converted and encoded, in ~/.cache for later starts"
    )
    streaming: bool = Field(
        False,
        description="train on data without end, such as standard input, as it comes; needs "
        "max_steps",
    )

    init_adapter: Path | None = Field(
        None,
        description="start from the weights of this adapter, ours or PEFT's; its rank, scaling, "
        "variants and targets, and the quantisation it was trained with, are taken over",
    )
    allow_mismatch: bool = Field(
        False,
        description="use init_adapter with a base model, tokenizer or template not its own",
    )
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
    target_parameters: Annotated[tuple[str, ...], BeforeValidator(parse_names)] = Field(
        (),
        description="parameters with an adapter too: experts, or names as in PEFT, such as "
        "mlp.experts.down_proj or mlp.gate.weight (a router); lora_r is that of each expert",
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
    packing: bool = Field(
        False,
        description="count packs instead of examples in batch_size: several examples that "
        "together have at most max_length tokens",
    )
    epochs: float = Field(1.0, gt=0, le=10**6, description="passes over the data")
    max_steps: PositiveInt | None = Field(
        None, description="number of optimizer steps; overrides epochs"
    )
    compute: Literal["auto", "fp8"] = Field(
        "auto",
        description="products with frozen weights: in compute_dtype (auto), or in 8-bit floating "
        "point (fp8, experimental), faster on GPUs from Ada and Hopper on; see docs/fp8.md",
    )

    learning_rate: float = Field(2e-4, gt=0, description="peak learning rate")
    loraplus_lr_ratio: float = Field(
        1.0, gt=0, description="LoRA+: learning rate of B relative to that of A"
    )
    embedding_learning_rate: float | None = Field(
        None,
        gt=0,
        description="peak learning rate of embedding and head in modules_to_save (default: "
        "learning_rate)",
    )
    lr_scheduler_type: Literal[
        "cosine",
        "linear",
        "constant",
        "cosine_with_min_lr",
        "cosine_with_restarts",
        "polynomial",
        "inverse_sqrt",
        "warmup_stable_decay",
    ] = Field("cosine", description="decay of the learning rate after the warm-up")
    min_learning_rate: float | None = Field(
        None,
        ge=0,
        description="learning rate at the end of cosine, polynomial and warmup_stable_decay "
        "(default: 0; polynomial: 1e-7)",
    )
    min_lr_rate: float | None = Field(
        None, ge=0, le=1, description="min_learning_rate relative to learning_rate"
    )
    lr_num_cycles: float | None = Field(
        None,
        gt=0,
        description="waves of cosine (default: 0.5) or cosine_with_restarts (default: 1)",
    )
    lr_power: float = Field(1.0, gt=0, description="power of polynomial; 1: linear")
    lr_timescale: PositiveInt | None = Field(
        None,
        description="steps after which inverse_sqrt is at 1 / sqrt(2), counted from its start "
        "(default: those of the warm-up)",
    )
    lr_decay_steps: PositiveInt | None = Field(
        None,
        description="last steps of warmup_stable_decay, in which it decays (default: a tenth of "
        "the run)",
    )
    lr_decay_type: Literal["cosine", "linear", "1-sqrt"] = Field(
        "cosine", description="decay of warmup_stable_decay"
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
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="decoupled weight decay of AdamW, of matrices; norms, biases and DoRA's "
        "magnitudes have none",
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of AdamW's first moment")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="decay of AdamW's second moment")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    max_grad_norm: float = Field(
        1.0, ge=0, description="clip the norm of all gradients to this; 0: no clipping"
    )
    neftune_noise_alpha: float | None = Field(
        None,
        ge=0,
        description="NEFTune: noise on the embeddings in training, uniform up to alpha / sqrt(L d) "
        "for L tokens of width d; 5 to 15",
    )
    router_aux_loss_coef: float = Field(
        0.0,
        ge=0,
        description="mixtures of experts: add the auxiliary loss of their routers, as the model of "
        "transformers computes it, times this; 0: no such loss",
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
    weights: Literal["auto", "gpu", "host", "disk"] = Field(
        "auto",
        description="where the frozen weights of layers are while they are not needed: on the GPU, "
        "in host memory, or on the disk, in ~/.cache; as many as fit stay on the GPU; auto takes "
        "the first that has room",
    )
    memory_budget: Annotated[PositiveInt | None, BeforeValidator(parse_bytes)] = Field(
        None, lt=2**63, description="memory limit, such as 16GB (10^9) or 16GiB (2^30)"
    )
    cuda_graphs: bool = Field(
        True, description="capture forward and backward as CUDA graphs on a GPU"
    )

    deterministic: bool = Field(False, description="bit-identical results on a GPU, at lower speed")

    gpus: PositiveInt | None = Field(
        None,
        le=1024,
        description="GPUs of this machine to train on, with a process for each; with device cpu, "
        "processes. A step has the same examples in all, batch_size * "
        "gradient_accumulation_steps, and they are dealt out. torchrun sets the number itself",
    )
    shard: bool = Field(
        False,
        description="divide the frozen weights of layers among the processes of a machine, instead "
        "of a copy for each: on the GPUs or, with weights host, in host memory",
    )
    ddp_timeout: float = Field(
        600.0,
        gt=0,
        description="with several processes: seconds to wait for one that hangs, before the others "
        "save and end",
    )

    output: Path = Field(description="directory for the adapter, checkpoints and journal")
    eval_steps: PositiveInt | None = Field(
        None,
        description="evaluate every N steps (default: up to ten times per run, as long as that "
        "processes at most a tenth as many tokens as training)",
    )
    eval_max_samples: PositiveInt | None = Field(
        None,
        description="held-out rows to evaluate on during training, always the same; at the end all "
        "(default: as many as the same limit allows)",
    )
    load_best: bool = Field(
        False,
        description="write the adapter of the best evaluation, not of the last step; its "
        "checkpoint is kept",
    )
    metric_for_best: str = Field(
        "loss",
        min_length=1,
        description="what the best evaluation is best in: loss, or a metric given in Python",
    )
    metric_mode: Literal["auto", "min", "max"] = Field(
        "auto", description="best is the smallest or the largest; auto: min for losses, else max"
    )
    early_stopping_patience: PositiveInt | None = Field(
        None, description="stop after N evaluations in a row that are not better than the best"
    )
    early_stopping_threshold: float = Field(
        0.0, ge=0, description="how much better an evaluation must be to count for that"
    )
    save_steps: PositiveInt | None = Field(
        None, description="save a checkpoint every N steps (default: ten times per run)"
    )
    save_minutes: float | None = Field(
        None, gt=0, description="also save one when the newest is N minutes old"
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
    push_to_hub: Repository | None = Field(
        None,
        description="upload the adapter to owner/name on the Hugging Face hub at the end, with a "
        "model card; whether that may be done is checked first",
    )
    hub_private: bool = Field(
        True, description="create the repository of push_to_hub private, if there is none"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the adapters and the data's order")

    @model_validator(mode="after")
    def _shards_are_in_memory(self) -> Self:
        if self.shard and self.weights == "disk":
            raise ValueError("`shard` divides weights in memory; each process reads a disk itself")
        return self

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names_between_commas(cls, value: Any) -> Any:
        if isinstance(value, str) and re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)+", value.strip()):
            return parse_names(value)
        return value

    def require_held_out(self, *, given: bool = False) -> None:
        """Check that there is data to evaluate on, if an option needs some.

        Args:
            given: Whether there is some beside the options, as in Python.

        Raises:
            ConfigError: There is none; the option is named.
        """
        names = ("eval_steps", "eval_max_samples", "load_best", "early_stopping_patience")
        needs = next((name for name in names if getattr(self, name)), None)
        if needs and not (given or self.eval_data is not None or self.eval_split is not None):
            raise ConfigError(
                f"`{needs}` needs data to evaluate on: give `eval_data`, or `eval_split` to hold "
                "out rows of `data`"
            )

    @property
    def depends_on_evaluations(self) -> bool:
        """Whether the adapter that is written depends on evaluations."""
        return self.load_best or self.early_stopping_patience is not None

    @property
    def data_seed(self) -> int:
        """The seed of the data's order."""
        return self.seed if self.shuffle_seed is None else self.shuffle_seed

    @property
    def state_bits(self) -> Literal[8, 32]:
        """Bits of a moment of the optimizer's state."""
        return 8 if self.optim.endswith("8bit") else 32

    @model_validator(mode="after")
    def _rules_of_the_schedule(self) -> Self:
        kind = self.lr_scheduler_type
        for name, kinds in _SCHEDULES_WITH.items():
            # Not `model_fields_set`: the config.yaml of a run has every option.
            if getattr(self, name) != type(self).model_fields[name].default and kind not in kinds:
                known = " or ".join(filter(None, [", ".join(kinds[:-1]), kinds[-1]]))
                raise ValueError(f"`{name}` needs `lr_scheduler_type` {known}")
        lowest = [name for name in _LOWEST if getattr(self, name) is not None]
        if len(lowest) == 2:
            raise ValueError("`min_learning_rate` and `min_lr_rate` exclude each other; remove one")
        if kind == "cosine_with_min_lr" and not lowest:
            raise ValueError(
                "`lr_scheduler_type` cosine_with_min_lr needs `min_learning_rate` or `min_lr_rate`"
            )
        if (self.min_learning_rate or 0.0) > self.learning_rate:
            raise ValueError("`min_learning_rate` must not be above `learning_rate`")
        return self

    @model_validator(mode="after")
    def _rules_between_fields(self) -> Self:
        if self.streaming and self.max_steps is None:
            raise ValueError("`streaming` needs `max_steps`: such data has no epochs")
        if self.streaming and self.eval_split is not None:
            raise ValueError("`eval_split` cannot be combined with `streaming`; give `eval_data`")
        sources = (f"{one}:" for one in (*self.data, *(self.eval_data or ())))
        if self.streaming and sum(one[:2] in ("-:", "-[", "-#") for one in sources) > 1:
            raise ValueError("`streaming` reads standard input as it comes: name `-` only once")
        if self.compute == "fp8" and self.quant == "none":
            raise ValueError("`compute` fp8 needs `quant` nf4 or fp4: it is for packed weights")
        if self.compute == "fp8" and self.compute_dtype == "float16":
            raise ValueError("`compute` fp8 needs activations in bfloat16: `compute_dtype` auto")
        if self.eval_data is not None and self.eval_split is not None:
            raise ValueError("`eval_split` cannot be combined with `eval_data`; remove one")
        if self.metric_for_best != "loss" and not self.depends_on_evaluations:
            raise ValueError("`metric_for_best` needs `load_best` or `early_stopping_patience`")
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            raise ValueError("`early_stopping_threshold` needs `early_stopping_patience`")
        if self.init_lora_weights == "qera" and self.quant == "none":
            raise ValueError(
                "`init_lora_weights` qera needs `quant` nf4 or fp4: without quantisation there is "
                "no error to approximate"
            )
        if self.init_lora_weights == "qera" and self.init_adapter is not None:
            raise ValueError(
                "`init_lora_weights` qera cannot be combined with `init_adapter`: each is where "
                "the adapters start; remove one"
            )
        if self.target_parameters and (self.lora_dropout or self.use_dora):
            raise ValueError(
                "`target_parameters` cannot be combined with `lora_dropout` and `use_dora`, as in "
                "PEFT: its adapters are added to parameters, not to outputs"
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
