"""axolotl's YAML: every key of its published LoRA and QLoRA examples, and what it becomes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from halfbyte.config.importing.data import Source, set_sources, source
from halfbyte.config.importing.rules import (
    Imported,
    NoCounterpartError,
    Rule,
    apply,
    missing,
    set_defaults,
    settled,
    shown,
    to,
    unneeded,
)
from halfbyte.errors import ConfigError

_KERNELS = unneeded("kernels are chosen by device; `halfbyte doctor` shows which")
_ATTENTION = unneeded("attention is exact, packed and memory-efficient on every device")
_SEVERAL_GPUS = missing(
    "leave it out: `gpus` trains on several GPUs, and `halfbyte plan` says what fits on each"
)
_TRACKER = missing("set the tracker's own environment variable, such as WANDB_PROJECT")
_EXPERTS = missing("experts are stored and multiplied in one way for all families; leave it out")
_MEDIA = missing("only text is trained")
_OTHER_BITS = missing("give the 16-bit model instead; halfbyte quantises it to NF4 itself")


def _optimizer(value: Any) -> str:
    name = str(value).lower()
    same = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw")
    if name in same:
        return "adamw"
    if name in ("adamw_bnb_8bit", "adamw_8bit", "adamw_torch_8bit", "ao_adamw_8bit"):
        return "adamw_8bit"
    if name in ("paged_adamw_32bit", "paged_adamw_8bit"):
        return name
    if name == "paged_adamw":
        return "paged_adamw_32bit"
    if "4bit" in name:
        raise NoCounterpartError("no 4-bit state: `optim: adamw_8bit` has the smallest")
    raise NoCounterpartError("only AdamW: `optim` adamw, adamw_8bit, or paged_adamw_8bit")


def _split(value: Any) -> Any:
    return value or None


def _warmup(value: Any) -> Any:
    if isinstance(value, float) and 0 < value < 1:
        raise NoCounterpartError(f"less than a step: write `warmup_ratio: {value}`")
    return value


def _special_tokens(value: Any) -> None:
    others = sorted(set(value) - {"pad_token"}) if isinstance(value, Mapping) else ["tokens"]
    if others:
        raise NoCounterpartError(
            f"{', '.join(others)}: the tokenizer's own are used. Where they differ, change them in "
            "the model's tokenizer_config.json; the end of a turn is found from the chat template"
        )


def _chat_template(value: Any) -> str | None:
    if value in ("tokenizer_default", "jinja"):
        return None
    if value in ("chatml", "llama3"):  # the same text as ours of these names
        return str(value)
    raise NoCounterpartError(
        "the model's own chat template is used; `chat_template` names another, or a file"
    )


def _plugins(value: Any) -> None:
    known = ("CutCrossEntropy", "Liger", "Kernels", "ScatterMoE")
    listed = value if isinstance(value, list) else [value]
    others = [str(one) for one in listed if not any(part in str(one) for part in known)]
    if others:
        raise NoCounterpartError(f"{', '.join(others)}: there are no plugins; leave them out")


def _model_config(value: Any) -> str | None:
    """Return the scaling of rotary embeddings, the only change of a configuration that we make."""
    given = dict(value) if isinstance(value, Mapping) else {"": value}
    scaling = given.pop("rope_scaling", None)
    if any(one is not None for one in given.values()):
        raise NoCounterpartError(
            "change the model's config.json instead; only rope_scaling is an option (and "
            "`router_aux_loss_coef` trains routers for balance)"
        )
    return None if scaling is None else json.dumps(scaling)


_BF16 = {"auto": "auto", "true": "bfloat16", "full": "bfloat16", "false": None}

RULES: dict[str, Rule] = {
    # the model
    "revision_of_model": to("revision"),
    "base_model_config": unneeded("the model's own config.json is read"),
    "model_type": unneeded("the architecture is in the model's config.json"),
    "tokenizer_type": unneeded("the tokenizer is the model's own"),
    "tokenizer_use_fast": unneeded("fast tokenizers are used"),
    "tokenizer_legacy": unneeded("the tokenizer's own configuration decides"),
    "tokenizer_use_mistral_common": missing(
        "transformers' tokenizer is used; `halfbyte check` shows how it encodes your rows"
    ),
    "trust_remote_code": missing(
        "code that comes with a model is never run; use a model of a family that transformers has"
    ),
    "hf_use_auth_token": unneeded("the token of `hf auth login` is used"),
    "low_cpu_mem_usage": unneeded("one tensor is in memory at a time"),
    "experimental_skip_move_to_device": unneeded("one tensor is in memory at a time"),
    "is_llama_derived_model": unneeded("the architecture is in the model's config.json"),
    "is_falcon_derived_model": unneeded("the architecture is in the model's config.json"),
    "is_mistral_derived_model": unneeded("the architecture is in the model's config.json"),
    "is_qwen_derived_model": unneeded("the architecture is in the model's config.json"),
    "model_config": to("rope_scaling", _model_config),
    "overrides_of_model_config": to("rope_scaling", _model_config),
    "resize_token_embeddings_to_32x": unneeded("no token is added, so no embedding is resized"),
    "load_in_8bit": missing("no 8-bit base: `quant` nf4 (4 bits) or none (16)"),
    "gptq": _OTHER_BITS,
    "gptq_groupsize": _OTHER_BITS,
    "gptq_model_v1": _OTHER_BITS,
    "gptq_disable_exllama": _OTHER_BITS,
    "model_quantization_config": _OTHER_BITS,
    "model_quantization_config_kwargs": _OTHER_BITS,
    "bnb_config_kwargs": Rule("double_quant", lambda v: v.get("bnb_4bit_use_double_quant")),
    "quantize_moe_experts": unneeded("experts are packed as linear layers are"),
    "lora_target_parameters": to("target_parameters"),
    "experts_implementation": _KERNELS,
    "use_scattermoe": _KERNELS,
    "use_sonicmoe": _KERNELS,
    "expert_parallel_size": _SEVERAL_GPUS,
    "expert_parallel_num_nvl_bytes": _SEVERAL_GPUS,
    "expert_parallel_token_capacity": _SEVERAL_GPUS,
    "llama4_linearized_experts": _EXPERTS,
    "dsv4_fp4_grouped_mode": _EXPERTS,
    "nvfp4_merge_aware": _EXPERTS,
    # the data
    "dataset_prepared_path": unneeded("encoded data is cached by its content"),
    "push_dataset_to_hub": missing("data is not uploaded"),
    "dataset_exact_deduplication": missing("`halfbyte check` lists duplicates; remove them"),
    "shuffle_merged_datasets": unneeded("data is shuffled, by `seed`"),
    "val_set_size": to("eval_split", _split),
    "max_packed_sequence_len": missing("`packing` fills rows up to `max_length`"),
    "sample_packing": to("packing"),
    "sample_packing_sequentially": missing("packing chooses the best fit"),
    "eval_sample_packing": unneeded("evaluation needs no padding"),
    "pad_to_sequence_len": unneeded("nothing is padded to a fixed length"),
    "group_by_length": unneeded("the examples of a step are sorted by length"),
    "curriculum_sampling": missing("data is shuffled, by `seed`"),
    "special_tokens": Rule(read=_special_tokens, why="padding needs no token"),
    "eot_tokens": unneeded("the end of a turn is found from the chat template"),
    "tokens": missing("add tokens to the model and its tokenizer first, then train them with "
                      "`modules_to_save: embed_tokens,lm_head`"),
    "chat_template": Rule("chat_template", _chat_template),
    "default_system_message": missing("write it into the rows, as `system`"),
    # the adapters
    "lora_model_dir": to("init_adapter"),
    "lora_fan_in_fan_out": unneeded("the layout of a weight is the architecture's"),
    "peft": missing("LoftQ: `init_lora_weights: qera` also begins with the quantisation error"),
    "peft_init_lora_weights": missing("`init_lora_weights` is kaiming or qera"),
    "unfrozen_parameters": missing("`modules_to_save` trains whole modules, such as lm_head"),
    "relora": missing("not done: leave it out"),
    "relora_prune_ratio": missing("belongs to ReLoRA: leave it out"),
    "relora_cpu_offload": missing("belongs to ReLoRA: leave it out"),
    "jagged_restart_steps": missing("`lr_scheduler_type` has restarts"),
    "jagged_restart_warmup_steps": missing("`lr_scheduler_type` has restarts"),
    "jagged_restart_anneal_steps": missing("`lr_scheduler_type` has restarts"),
    # steps and the optimizer
    "batch_size": missing("axolotl's total: `batch_size` x `gradient_accumulation_steps` here"),
    "eval_batch_size": unneeded("evaluation has a batch size of its own"),
    "optimizer": Rule("optim", _optimizer),
    "adam_eps": to("adam_epsilon"),
    "warmup_steps": Rule("warmup_steps", _warmup),
    "lr_quadratic_warmup": missing("the warm-up is linear"),
    "gradient_checkpointing": unneeded("`activations: auto` recomputes what does not fit"),
    "gradient_checkpointing_kwargs": unneeded("recomputation is exact in any case"),
    "activation_offloading": Rule("activations", lambda v: "offload" if v else None),
    "loss_watchdog_threshold": missing(
        "odd losses are reported; `on_nonfinite` decides what follows a loss that is not finite"
    ),
    "loss_watchdog_patience": missing("odd losses are reported at once"),
    "strict": unneeded("every option is checked"),
    # evaluation and checkpoints
    "evals_per_epoch": missing("`eval_steps` counts steps", (False, None, 0)),
    "saves_per_epoch": missing("`save_steps` counts steps; without it, a run saves ten times"),
    "eval_table_size": missing("`halfbyte eval` answers held-out prompts"),
    "eval_max_new_tokens": missing("`halfbyte eval --max-new-tokens`"),
    "eval_causal_lm_metrics": unneeded("loss, perplexity and exact match are measured"),
    "do_causal_lm_eval": unneeded("loss, perplexity and exact match are measured"),
    "auto_resume_from_checkpoints": missing("`halfbyte train … --resume`"),
    # precision and speed
    "bf16": to("compute_dtype", _BF16),
    "bfloat16": Rule("compute_dtype", lambda v: "bfloat16" if v else None),
    "fp16": Rule("compute_dtype", lambda v: "float16" if v else None),
    "float16": Rule("compute_dtype", lambda v: "float16" if v else None),
    "tf32": unneeded("products are in `compute_dtype`"),
    "torch_compile": _KERNELS,
    "torch_compile_mode": _KERNELS,
    "processor_type": _MEDIA,
    "skip_prepare_dataset": unneeded("data is read, encoded and packed without further settings"),
    "remove_unused_columns": unneeded("keys of rows that nothing reads are reported"),
    "freeze_mm_modules": unneeded("only the text decoder is loaded and trained"),
    "torchdistx_path": unneeded("models are built without memory"),
    "use_kernels": _KERNELS,
    "use_dsv4_kernels": _KERNELS,
    "use_glm_dsa_kernels": _KERNELS,
    "cut_cross_entropy": unneeded("logits are never stored as a whole"),
    "flash_attn_cross_entropy": unneeded("logits are never stored as a whole"),
    "plugins": Rule(read=_plugins, why="their kernels have counterparts of our own"),
    **dict.fromkeys(
        ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "liger_rope", "liger_rms_norm",
         "liger_rms_norm_gated", "liger_layer_norm", "liger_glu_activation",
         "liger_fused_linear_cross_entropy", "flash_attn_rms_norm", "flash_attn_fuse_mlp",
         "flash_attn_fuse_qkv", "unsloth_lora_mlp", "unsloth_lora_qkv", "unsloth_lora_o"),
        _KERNELS,
    ),
    **dict.fromkeys(
        ("attn_implementation", "flash_attention", "flex_attention", "xformers_attention",
         "sdp_attention", "s2_attention", "flash_optimum", "flex_attn_compile_kwargs",
         "gemma4_hybrid_attn_impl", "fused_attn_kernel"),
        _ATTENTION,
    ),
    **dict.fromkeys(
        ("deepspeed", "fsdp", "fsdp_config", "fsdp_version", "fsdp_final_state_dict_type",
         "ddp_find_unused_parameters", "dp_shard_size", "context_parallel_size",
         "context_parapllel_size", "sequence_parallel_degree", "tensor_parallel_size",
         "use_ray", "ray_num_workers", "ray_run_name", "resources_per_worker"),
        _SEVERAL_GPUS,
    ),
    # the run
    "local_rank": unneeded("torchrun tells each process its own"),
    "debug": unneeded("`halfbyte check --show` prints rows token by token"),
    "test_value": unneeded("belongs to axolotl's own tests"),
    "use_tensorboard": Rule("report_to", lambda v: ("tensorboard",) if v else None),
    "use_wandb": Rule("report_to", lambda v: ("wandb",) if v else None),
    **dict.fromkeys(
        ("wandb_project", "wandb_entity", "wandb_name", "wandb_watch", "wandb_log_model",
         "wandb_run_id", "trackio_project_name", "trackio_run_name", "trackio_space_id",
         "mlflow_tracking_uri", "mlflow_experiment_name", "comet_project_name"),
        _TRACKER,
    ),
    **dict.fromkeys(
        ("use_swanlab", "swanlab_project", "swanlab_experiment_name", "swanlab_description",
         "swanlab_mode", "swanlab_log_completions", "use_otel_metrics", "otel_metrics_host",
         "otel_metrics_port", "use_mlflow", "use_comet"),
        missing("trackers are tensorboard, wandb and trackio (`report_to`)"),
    ),
}  # fmt: skip

# Where axolotl 0.13 has other defaults than we; its warm-up, 3 % of the steps, is the same.
_DEFAULTS = {"gradient_accumulation_steps": 1, "max_length": 512, "seed": 42}

_ROWS = "convert the rows, or leave it out"
_OF_ENTRIES = {
    "roles_to_train": "the assistant's replies are supervised (`train_on`)",
    "train_on_eos": "the token that ends a reply is supervised",
    "shards": "write a part of the data as PATH[:500]",
    "drop_system_message": "remove the system messages from the rows",
    "field_thinking": "a message's other keys are passed to the chat template as they are named",
    "template_thinking_key": "a message's other keys are passed to the chat template as named",
    "chat_template": "one chat template is used for all data (`chat_template`)",
}

# Formats of a data set that are found here from the keys of a row.
_BY_KEYS = ("chat_template", "sharegpt", "completion", "input_output")


def convert(given: Mapping[str, Any]) -> Imported:
    """Convert a configuration.

    Raises:
        ConfigError: It is not for LoRA or QLoRA, or not for supervised fine-tuning.
    """
    if given.get("adapter") not in ("lora", "qlora"):
        raise ConfigError(
            f"`adapter: {given.get('adapter')}` is not LoRA or QLoRA: halfbyte trains these only. "
            "Set `adapter: qlora` to train this model with adapters"
        )
    if given.get("rl"):
        raise ConfigError(f"`rl: {given['rl']}`: only supervised fine-tuning is done")
    found = Imported("axolotl")
    rest = dict(given)
    for name in ("datasets", "test_datasets"):
        if name in rest:
            option = "data" if name == "datasets" else "eval_data"
            _datasets(rest.pop(name), name, option, found)
    if rest.get("wandb_project"):
        found.set("report_to", ("wandb",), f"wandb_project: {rest['wandb_project']}")
    if rest.get("lora_target_linear") and (names := rest.pop("lora_target_modules", None)):
        origin = f"lora_target_modules: {shown(names)}"
        found.unneeded.append((origin, "lora_target_linear has all of them"))
    apply(rest, RULES, found)
    set_defaults(found, _DEFAULTS)
    return settled(found)


def _datasets(listed: Any, name: str, option: str, into: Imported) -> None:
    entries = listed if isinstance(listed, list) else [listed]
    sources: list[Source] = []
    for number, entry in enumerate(entries):
        origin = f"{name}[{number}]"
        if not isinstance(entry, Mapping) or not entry.get("path"):
            into.missing.append((origin, "has no path"))
            continue
        sources += _sources(entry, origin, into)
    set_sources(sources, option, name, into)


def _sources(entry: Mapping[str, Any], origin: str, into: Imported) -> list[Source]:
    """An entry of ``datasets``: one source, or one for each of its files."""
    left = dict(entry)
    path, split, name = left.pop("path"), left.pop("split", None), left.pop("name", None)
    kind = left.pop("type", None)
    left.pop("ds_type", None)
    files = left.pop("data_files", None) or str(path)
    columns = {}
    if isinstance(kind, Mapping):
        for key in ("instruction", "input", "output", "system"):
            if column := kind.get(f"field_{key}"):
                columns[key] = str(column)
        if kind.get("format") or kind.get("no_input_format"):
            into.missing.append((f"{origin} type.format", "rows are rendered by the chat template"))
    elif kind and str(kind).partition(".")[0].partition(":")[0] not in _BY_KEYS:
        style = str(kind).partition(":")[0]
        note = "rows become turns of the chat template, not text with headings"
        todo = "; `chat_template: alpaca` writes the headings" if style == "alpaca" else ""
        into.missing.append((f"{origin} type: {kind}", note + todo))
    if column := left.pop("field_messages", None):
        named = str(column)
        columns["conversations" if named == "conversations" else "messages"] = named
    if column := left.pop("field", None):
        columns["text"] = str(column)
    _roles(left, origin, into)
    for key, value in left.items():
        into.missing.append((f"{origin} {key}: {shown(value)}", _OF_ENTRIES.get(key, _ROWS)))
    return [
        source(str(file), name=name, split=split, columns=columns)
        for file in ([files] if isinstance(files, str) else files)
    ]


def _roles(entry: dict[str, Any], origin: str, into: Imported) -> None:
    """Take the names of the keys and roles of a message; those that are usual are known here."""
    mapped = entry.pop("message_property_mappings", None) or {}
    role = entry.pop("message_field_role", None) or mapped.get("role", "role")
    content = entry.pop("message_field_content", None) or mapped.get("content", "content")
    if (role, content) not in (("role", "content"), ("from", "value")):
        into.missing.append(
            (f"{origin} messages of {role!r} and {content!r}",
             "rename them to `role` and `content`, or `from` and `value`")
        )  # fmt: skip
    entry.pop("roles", None)  # names of roles are found in formats.py's list
