"""LLaMA-Factory's YAML: the keys of its published LoRA and QLoRA examples, and what they become."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halfbyte.config.importing.data import Source, set_sources, source
from halfbyte.config.importing.rules import (
    TRANSFORMERS_DEFAULTS,
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
    warm_up,
)
from halfbyte.errors import ConfigError
from halfbyte.input_files import read_file

_WORKERS = unneeded("all cores encode the data")
_SEVERAL_GPUS = missing(
    "leave it out: `gpus` trains on several GPUs, and `halfbyte plan` says what fits on each",
    (False, None, 1),
)
_KT = missing("KTransformers' kernels are not used; `--activations offload` saves GPU memory")
_MEDIA = unneeded("only text is trained")


def _template(value: Any) -> str | None:
    if value in ("default", "empty"):
        return None
    raise NoCounterpartError(
        "the model's own chat template is used; `chat_template` names another, or a file, and "
        "`halfbyte check` shows the text"
    )


def _quantization(value: Any) -> str:
    if value == 4:
        return "nf4"
    raise NoCounterpartError("`quant` is nf4 or fp4 (4 bits), or none (16 bits)")


def _method(value: Any) -> None:
    if str(value) not in ("bnb", "bitsandbytes"):
        raise NoCounterpartError("the base is quantised to bitsandbytes' NF4 format (`quant`)")


RULES: dict[str, Rule] = {
    # the model
    "trust_remote_code": missing(
        "code that comes with a model is never run; use a model of a family that transformers has"
    ),
    "adapter_name_or_path": to("init_adapter"),
    "quantization_bit": Rule("quant", _quantization),
    "quantization_method": Rule(read=_method, why="this format is used"),
    "quantization_device_map": unneeded("the device is chosen by `device`"),
    "flash_attn": unneeded("attention is exact, packed and memory-efficient on every device"),
    "use_fast_tokenizer": unneeded("fast tokenizers are used"),
    "resize_vocab": missing("no token is added; `modules_to_save` trains embedding and head"),
    "rope_scaling": missing(
        "`rope_scaling` takes a method with its factor, such as yarn:4"
    ),
    "enable_liger_kernel": unneeded("kernels are chosen by device"),
    "use_unsloth": unneeded("kernels are chosen by device"),
    "use_v1_kernels": unneeded("kernels are chosen by device"),
    "upcast_layernorm": unneeded("norms are computed in float32"),
    "low_cpu_mem_usage": unneeded("one tensor is in memory at a time"),
    # the method
    "do_train": unneeded("`halfbyte train` trains"),
    "do_eval": unneeded("held-out data is evaluated if there is any"),
    "do_predict": missing("`halfbyte eval` answers the prompts of a data file"),
    "predict_with_generate": missing("`halfbyte eval` answers the prompts of a data file"),
    "create_new_adapter": unneeded("`init_adapter` goes on with an adapter in a new directory"),
    "lora_target": Rule("target_modules", lambda v: "all-linear" if v == "all" else v),
    "pissa_init": missing("`init_lora_weights: qera` begins with the error of quantisation"),
    "pissa_iter": missing("belongs to PiSSA: leave it out"),
    "pissa_convert": missing("belongs to PiSSA: leave it out"),
    "loraplus_lr_embedding": missing("`modules_to_save` trains embeddings at the usual rate"),
    "freeze_vision_tower": _MEDIA,
    "freeze_multi_modal_projector": _MEDIA,
    "freeze_language_model": missing("the text decoder is what is trained"),
    "image_max_pixels": _MEDIA,
    "video_max_pixels": _MEDIA,
    "video_fps": _MEDIA,
    "video_maxlen": _MEDIA,
    # the data
    "template": Rule("chat_template", _template),
    "overwrite_cache": unneeded("the cache of encoded data is keyed by its content"),
    "preprocessing_num_workers": _WORKERS,
    "dataloader_num_workers": _WORKERS,
    "preprocessing_batch_size": _WORKERS,
    "tokenized_path": unneeded("encoded data is cached by its content"),
    "streaming": to("streaming"),
    "mask_history": missing("every reply is supervised; write `train: false` into those turns"),
    "val_size": Rule("eval_split", lambda v: v or None),
    "packing": to("packing"),
    "neat_packing": to("packing"),
    "use_packed_sequences": to("packing"),
    "default_system": missing("write it into the rows, as `system`"),
    "enable_thinking": missing("the chat template of the model decides; `halfbyte check` shows it"),
    "buffer_size": unneeded("belongs to streaming, which has a buffer of its own"),
    "tokenized_cache": unneeded("encoded data is cached by its content"),
    # steps
    "disable_gradient_checkpointing": unneeded("`activations: auto` recomputes what does not fit"),
    "per_device_eval_batch_size": unneeded("evaluation has a batch size of its own"),
    "eval_strategy": unneeded("`eval_steps` decides"),
    "save_strategy": unneeded("`save_steps` decides"),
    "logging_strategy": unneeded("`logging_steps` decides"),
    "pure_bf16": unneeded("adapters are float32, products in `compute_dtype`"),
    "bf16": Rule("compute_dtype", lambda v: "bfloat16" if v else None),
    "fp16": Rule("compute_dtype", lambda v: "float16" if v else None),
    # the run
    "plot_loss": unneeded("report.html shows the losses"),
    "overwrite_output_dir": missing("a run is never overwritten: remove the directory, or name "
                                    "another (`output`)"),
    "save_only_model": missing("checkpoints can always be resumed", (False, None)),
    "report_to": Rule("report_to", lambda v: None if v in ("none", ["none"]) else v),
    "run_name": missing("set the tracker's own environment variable, such as WANDB_NAME"),
    "include_num_input_tokens_seen": unneeded("every step's tokens are in the journal"),
    "use_kt": _KT,
    "kt_config": _KT,
    "kt_cpu_activation": _KT,
    "kt_weight_path": _KT,
    "kt_non_expert_weight_path": _KT,
    **dict.fromkeys(
        ("deepspeed", "fsdp", "fsdp_config", "ddp_timeout", "ray_run_name", "ray_storage_path",
         "ray_num_workers", "resources_per_worker", "placement_strategy", "ray_init_kwargs",
         "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
         "expert_model_parallel_size", "sequence_parallel", "use_distributed_optimizer",
         "overlap_param_gather", "overlap_grad_reduce"),
        _SEVERAL_GPUS,
    ),
    "mixed_precision": unneeded("adapters are float32, products in `compute_dtype`"),
    "export_hf_on_finish": unneeded("the adapter is in PEFT's format"),
}  # fmt: skip
RULES["ddp_timeout"] = unneeded("waiting for the first process's data has no limit here")

_STAGES = {"sft": None, "pt": "all"}


def convert(given: Mapping[str, Any], directory: Path) -> Imported:
    """Convert a configuration.

    Args:
        given: The options.
        directory: Where relative paths of data begin.

    Raises:
        ConfigError: It is not for LoRA or QLoRA, or not for supervised fine-tuning.
    """
    kind, stage = given.get("finetuning_type", "lora"), given.get("stage", "sft")
    if kind != "lora":
        raise ConfigError(
            f"`finetuning_type: {kind}`: only LoRA and QLoRA are trained. Set `finetuning_type: "
            "lora` to train this model with adapters"
        )
    if stage not in _STAGES:
        raise ConfigError(f"`stage: {stage}`: only supervised fine-tuning is done (sft, pt)")
    found = Imported("LLaMA-Factory")
    rest = {k: v for k, v in given.items() if k not in ("finetuning_type", "stage")}
    found.unneeded.append((f"finetuning_type: {kind}", "adapters are what is trained"))
    found.unneeded.append((f"stage: {stage}", "supervised fine-tuning is what is done"))
    if stage == "pt":
        found.set("train_on", "all", "stage: pt")
    where = rest.pop("dataset_dir", "data")
    if where != "data":
        found.unneeded.append((f"dataset_dir: {shown(where)}", "the data sets are named below"))
    known = _registered(where, directory)
    for name, option in (("dataset", "data"), ("eval_dataset", "eval_data")):
        if name in rest:
            _datasets(rest.pop(name), name, option, known, where, found)
    quantised = "quantization_bit" in rest
    apply(rest, RULES, found)
    if not quantised:
        found.set("quant", "none", "no quantization_bit")
    rank = found.values.get("lora_r", 8)
    alpha = 2 * rank if isinstance(rank, int) else None
    set_defaults(
        found, TRANSFORMERS_DEFAULTS | {"lora_r": 8, "lora_alpha": alpha, "max_length": 2048}
    )
    warm_up(found)
    return settled(found)


def _registered(where: Any, directory: Path) -> dict[str, Any]:
    """The data sets of ``dataset_info.json``, if the file is there."""
    for base in (directory, directory.parent, Path()):
        path = base / str(where) / "dataset_info.json"
        if path.is_file():
            try:
                found = json.loads(read_file(path))
            except (OSError, ValueError) as error:
                raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
            if isinstance(found, dict):
                return {
                    name: entry | {"where": str(path.parent)}
                    for name, entry in found.items()
                    if isinstance(entry, dict)
                }
    return {}


def _datasets(
    listed: Any, name: str, option: str, known: Mapping[str, Any], where: Any, into: Imported
) -> None:
    names = listed.split(",") if isinstance(listed, str) else listed
    sources = []
    for one in (str(one).strip() for one in names):
        entry = known.get(one)
        if entry is None:
            into.missing.append(
                (f"{name}: {one}", f"a name in {where}/dataset_info.json: write the path or the "
                 f"hub id it stands for into `{option}`")
            )  # fmt: skip
            continue
        if found := _source(entry, f"{name}: {one}", into):
            sources.append(found)
    set_sources(sources, option, f"{name}: {shown(listed)}", into)


_COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "messages": "conversations",
    "system": "system",
    "tools": "tools",
}


def _source(entry: Mapping[str, Any], origin: str, into: Imported) -> Source | None:
    if entry.get("ranking"):
        into.missing.append((origin, "preference data: only supervised fine-tuning is done"))
        return None
    columns = entry.get("columns") or {}
    renamed = {
        _COLUMNS[theirs]: str(column) for theirs, column in columns.items() if theirs in _COLUMNS
    }
    for other in sorted(set(columns) - set(_COLUMNS)):
        into.missing.append((f"{origin} columns.{other}", "only text is trained"))
    tags = entry.get("tags") or {}
    pair = (tags.get("role_tag", "from"), tags.get("content_tag", "value"))
    if entry.get("formatting") == "sharegpt" and pair not in (
        ("from", "value"),
        ("role", "content"),
    ):
        into.missing.append(
            (f"{origin} tags", "rename the keys of messages to `role` and `content`")
        )
    if count := entry.get("num_samples"):
        todo = f"all rows are used: write `#{count}` behind the name in `data` for its first ones"
        into.missing.append((f"{origin} num_samples: {count}", todo))
    if file := entry.get("file_name"):
        return source(str(Path(entry["where"]) / str(file)), columns=renamed)
    hub = entry.get("hf_hub_url")
    if hub:
        name, split = entry.get("subset"), entry.get("split")
        return source(str(hub), name=name, split=split, columns=renamed)
    into.missing.append((origin, "neither a file nor a data set of the hub"))
    return None
