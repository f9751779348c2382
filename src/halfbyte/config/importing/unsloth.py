"""Scripts and notebooks that use Unsloth or TRL: the arguments of the calls that make a run.

A script is not run: its syntax tree is read. Values must be literals, arithmetic on them, or names
that are assigned such values once. What a script decides by other code is listed.
"""

from __future__ import annotations

import ast
import json
import operator
from collections.abc import Callable, Iterator, Sequence
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
    to,
    unneeded,
    warm_up,
)
from halfbyte.errors import ConfigError
from halfbyte.input_files import read_file

_KERNELS = unneeded("kernels are chosen by device")
_QAT = missing("no quantisation-aware training: QLoRA trains on the quantised base")
_GENERATION = unneeded("belongs to generation")


class _Unreadable:
    """A value that only running the script would tell."""

    def __init__(self, node: ast.AST) -> None:
        self.text = ast.unparse(node)

    def __repr__(self) -> str:
        return self.text


def _only(expected: Any, todo: str) -> Callable[[Any], None]:
    def read(value: Any) -> None:
        if value != expected:
            raise NoCounterpartError(todo)

    return read


def _targets(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _dtype(value: Any) -> str | None:
    name = repr(value).rpartition(".")[2]
    if name in ("bfloat16", "float16", "float32"):
        return name
    raise NoCounterpartError("`compute_dtype` is auto, bfloat16, float16 or float32")


FROM_PRETRAINED: dict[str, Rule] = {
    "model_name": to("model"),
    "max_seq_length": to("max_length"),
    "dtype": Rule("compute_dtype", _dtype),
    "load_in_4bit": Rule("quant", lambda v: "nf4" if v else "none"),
    "load_in_8bit": missing("no 8-bit base: `quant` nf4 (4 bits) or none (16)"),
    "load_in_16bit": Rule("quant", lambda v: "none" if v else None),
    "load_in_fp8": missing("no FP8 base: `quant` nf4 (4 bits) or none (16)"),
    "full_finetuning": missing("only LoRA and QLoRA are trained"),
    "trust_remote_code": missing("code that comes with a model is never run"),
    "token": unneeded("the token of `hf auth login` is used"),
    "device_map": unneeded("the device is chosen by `device`"),
    "attn_implementation": unneeded("attention is exact, packed and memory-efficient"),
    "unsloth_force_compile": _KERNELS,
    "unsloth_tiled_mlp": _KERNELS,
    "fast_inference": _GENERATION,
    "gpu_memory_utilization": _GENERATION,
    "max_lora_rank": _GENERATION,
    "float8_kv_cache": _GENERATION,
    "auto_model": unneeded("the architecture is in the model's config.json"),
    "offload_embedding": unneeded("an untied embedding is on the host on a GPU"),
    "use_gradient_checkpointing": unneeded("`activations: auto` recomputes what does not fit"),
    "qat_scheme": _QAT,
    "whisper_language": missing("only text is trained"),
    "whisper_task": missing("only text is trained"),
    "num_labels": missing("only causal language models are trained"),
    "id2label": missing("only causal language models are trained"),
    "label2id": missing("only causal language models are trained"),
    "return_logits": unneeded("logits are never stored as a whole"),
    "revision": to("revision"),
    "use_exact_model_name": unneeded("the model that is named is used"),
    "rope_scaling": missing("`rope_scaling` takes a method with its factor, such as yarn:4"),
}

_GET_PEFT_MODEL: dict[str, Rule] = {
    "r": to("lora_r"),
    "target_modules": Rule("target_modules", _targets),
    "target_parameters": Rule("target_parameters", _targets),
    "bias": Rule(read=_only("none", "biases are not trained"), why="biases are not trained"),
    "use_gradient_checkpointing": unneeded("`activations: auto` recomputes what does not fit"),
    "random_state": to("seed"),
    "loftq_config": missing("`init_lora_weights: qera` begins with the error of quantisation"),
    "init_lora_weights": missing("`init_lora_weights` is kaiming or qera"),
    "max_seq_length": to("max_length"),
    "task_type": Rule(read=_only("CAUSAL_LM", "only causal models"), why="it is a causal model"),
    "qat_scheme": _QAT,
    "layers_to_transform": missing("`target_modules` takes a regular expression of layers"),
    "use_dora": to("use_dora"),
    "finetune_vision_layers": missing("only text decoders are trained"),
    "finetune_audio_layers": missing("only text decoders are trained"),
    "finetune_language_layers": unneeded("the text decoder is what is trained"),
    "finetune_attention_modules": unneeded("`target_modules` says what has an adapter"),
    "finetune_mlp_modules": unneeded("`target_modules` says what has an adapter"),
    "modules_to_save": to("modules_to_save"),
}

_PREPARED = unneeded("data is read, encoded and packed without further settings")
_ARGUMENTS: dict[str, Rule] = {
    "random_state": to("seed"),
    "dataset_text_field": unneeded("the format of a row is found from its keys"),
    "dataset_num_proc": _PREPARED,
    "dataset_kwargs": _PREPARED,
    "remove_unused_columns": _PREPARED,
    "skip_prepare_dataset": _PREPARED,
    "dataloader_num_workers": _PREPARED,
    "dataloader_pin_memory": _PREPARED,
    "padding_free": unneeded("there is no padding"),
    "packing": to("packing"),
    "max_length": to("max_length"),
    "max_seq_length": to("max_length"),
    "gradient_checkpointing": unneeded("`activations: auto` recomputes what does not fit"),
    "gradient_checkpointing_kwargs": unneeded("recomputation is exact in any case"),
    "report_to": Rule("report_to", lambda v: None if v in ("none", ["none"]) else v),
    "run_name": missing("set the tracker's own environment variable, such as WANDB_NAME"),
    "fp16": Rule("compute_dtype", lambda v: "float16" if v else None),
    "bf16": Rule("compute_dtype", lambda v: "bfloat16" if v else None),
    "fp16_full_eval": unneeded("evaluation computes as training does"),
    "bf16_full_eval": unneeded("evaluation computes as training does"),
    "per_device_eval_batch_size": unneeded("evaluation has a batch size of its own"),
    "eval_accumulation_steps": unneeded("evaluation stores no logits"),
    "eval_strategy": unneeded("`eval_steps` decides"),
    "evaluation_strategy": unneeded("`eval_steps` decides"),
    "save_strategy": unneeded("`save_steps` decides"),
    "logging_strategy": unneeded("`logging_steps` decides"),
    "loss_type": Rule(read=_only("nll", "the loss is cross entropy"), why="it is cross entropy"),
    "completion_only_loss": Rule("train_on", lambda v: "assistant" if v else "all"),
    "ddp_find_unused_parameters": unneeded("gradients are summed once per step, in one buffer"),
    "disable_tqdm": unneeded("progress is shown on a terminal"),
    "warmup_steps": Rule("warmup_steps", lambda v: v),
    "push_to_hub": missing("`push_to_hub: owner/name`"),
    "hub_model_id": to("push_to_hub"),
    "hub_token": unneeded("the token of `hf auth login` is used"),
    "embedding_learning_rate": to("embedding_learning_rate"),
    "neftune_noise_alpha": to("neftune_noise_alpha"),
    "eos_token": unneeded("the end of a turn is found from the chat template"),
    "pad_token": unneeded("padding needs no token"),
    "optim_args": missing("options of AdamW are `adam_beta1`, `adam_beta2`, `adam_epsilon`"),
}
_TRAINER: dict[str, Rule] = _ARGUMENTS | {
    "model": Rule("model", lambda v: v if isinstance(v, str) else None),
    "tokenizer": unneeded("is the model's own"),
    "processing_class": unneeded("is the model's own"),
    "args": unneeded("is read by itself"),
    "peft_config": unneeded("is read by itself"),
    "data_collator": unneeded("batches are made without a collator"),
    "formatting_func": missing("write its rows into a file: {\"messages\": […]} on each line"),
    "callbacks": missing("`fine_tune` in Python takes callbacks; see docs"),
    "compute_metrics": missing("`fine_tune` in Python takes metrics; see docs"),
    "preprocess_logits_for_metrics": unneeded("logits are never stored as a whole"),
}  # fmt: skip
_ALL_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

# The calls that make a run, by the last part of their name.
CALLS: dict[str, dict[str, Rule]] = {
    "get_peft_model": _GET_PEFT_MODEL,
    "LoraConfig": _GET_PEFT_MODEL,
    "SFTConfig": _ARGUMENTS,
    "TrainingArguments": _ARGUMENTS,
    "UnslothTrainingArguments": _ARGUMENTS,
    "SFTTrainer": _TRAINER,
    "UnslothTrainer": _TRAINER,
}
_UNSLOTH = {"max_length": 2048, "quant": "nf4", "seed": 3407}
_PEFT = {
    "lora_r": 8,
    "lora_alpha": 8,
    "learning_rate": 2e-5,
    "quant": "none",
}  # and TRL's SFTConfig
_MODELS = ("FastLanguageModel", "FastModel", "FastVisionModel", "AutoModelForCausalLM")
_OTHER_TRAINERS = ("DPOTrainer", "ORPOTrainer", "KTOTrainer", "GRPOTrainer", "CPOTrainer")
_MOST = 8_000_000  # bytes of a script or notebook


def read(path: Path) -> Imported:
    """Convert a script or a notebook.

    Raises:
        ConfigError: It is not Python, or trains nothing that halfbyte trains.
    """
    try:
        text = read_file(path, _MOST).decode("utf-8")
        is_notebook = path.suffix.lower() == ".ipynb"
        script = _Script(_cells(text) if is_notebook else [text])
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (LookupError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{path} is not Python, or not a notebook: {error}") from error
    names = [name for name, _ in script.calls()]
    if other := next((name for name in names if name in _OTHER_TRAINERS), None):
        raise ConfigError(f"{path} uses {other}: only supervised fine-tuning is done")
    if not any(name in CALLS for name in names):
        if script.unreadable and not is_notebook:
            raise ConfigError(f"{path} is not Python: {script.unreadable[0]}")
        raise ConfigError(
            f"{path} makes no run of Unsloth or TRL: expected calls of SFTTrainer and SFTConfig"
        )
    found = Imported("Unsloth")
    _convert(script, found)
    return found


def _cells(notebook: str) -> list[str]:
    cells = json.loads(notebook)["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def _without_commands(code: str) -> str:
    """Code without a notebook's commands, which are not Python."""
    if code.lstrip().startswith("%%"):
        return ""
    lines = []
    for line in code.splitlines():
        command = line.lstrip().startswith(("!", "%", "?"))
        indent = line[: len(line) - len(line.lstrip())]
        lines.append(f"{indent}pass" if command else line)
    return "\n".join(lines)


_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
}


class _Script:
    """The calls of a script, and the values of its names."""

    def __init__(self, cells: Sequence[str]) -> None:
        """Parse the cells of a notebook, or a script as one; ``unreadable``: why some were not."""
        self.unreadable: list[str] = []
        self._nodes: list[ast.AST] = []
        for number, cell in enumerate(cells, 1):
            try:
                self._nodes += _in_order(ast.parse(_without_commands(cell)))
            except SyntaxError as error:
                self.unreadable.append(f"cell {number}, line {error.lineno}: {error.msg}")
        self._names: dict[str, ast.expr | None] = {}
        for node in self._nodes:
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                target = node.targets[0]
                if isinstance(target, ast.Name):  # assigned twice, it is not known
                    again = target.id in self._names
                    self._names[target.id] = None if again else node.value

    def calls(self) -> Iterator[tuple[str, ast.Call]]:
        """Each call with the last part of the function's name, in order."""
        for node in self._nodes:
            if isinstance(node, ast.Call):
                yield ast.unparse(node.func).rpartition(".")[2], node

    def value(self, node: ast.expr, depth: int = 0) -> Any:
        """The value of an expression, or `_Unreadable`."""
        if isinstance(node, ast.Name) and depth < 8:
            known = self._names.get(node.id)
            return _Unreadable(node) if known is None else self.value(known, depth + 1)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS and depth < 8:
            left, right = self.value(node.left, depth + 1), self.value(node.right, depth + 1)
            if isinstance(left, int | float) and isinstance(right, int | float) and right:
                return _OPERATORS[type(node.op)](left, right)
            return _Unreadable(node)
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return _Unreadable(node)


def _in_order(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a tree in the order of the text."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        yield from _in_order(child)


def _convert(script: _Script, found: Imported) -> None:
    found.missing += [(why, "not Python; see what it does") for why in script.unreadable]
    sources: list[Source] = []
    on_replies = False
    for name, call in script.calls():
        function = ast.unparse(call.func)
        given = {word.arg: script.value(word.value) for word in call.keywords if word.arg}
        if name == "from_pretrained" and any(model in function for model in _MODELS):
            if "model" in found.values:
                continue  # loaded once more, to generate
            if call.args and "model_name" not in given:
                given = {"model_name": script.value(call.args[0]), **given}
            _apply(given, FROM_PRETRAINED, found)
        elif name in CALLS:
            _apply(given, CALLS[name], found, skip=("train_dataset", "eval_dataset"))
            evaluated = given.get("eval_dataset")
            if evaluated is not None:
                todo = "write its rows into a file and name that, or use `eval_split`"
                found.missing.append((f"eval_dataset: {evaluated!r}", todo))
        elif name == "load_dataset" and call.args:
            sources += _sources(script, call, given, found)
        elif name == "train_on_responses_only":
            on_replies = True
        elif name == "get_chat_template" and "chat_template" in given:
            template = given["chat_template"]
            origin = f"get_chat_template: {template!r}"
            todo = "the model's own chat template is used; `chat_template` names another, or a file"
            if template in ("chatml", "llama-3", "llama3"):  # the same text as ours
                found.set("chat_template", template.replace("-", ""), origin)
            else:
                found.missing.append((origin, todo))
    set_sources(sources, "data", "load_dataset", found)
    if on_replies:
        found.set("train_on", "assistant", "train_on_responses_only")
    elif "train_on" not in found.values:
        found.set("train_on", "all", "no train_on_responses_only")
    by_unsloth = any(name == "get_peft_model" for name, _ in script.calls())
    set_defaults(found, TRANSFORMERS_DEFAULTS | (_UNSLOTH if by_unsloth else _PEFT))
    warm_up(found)
    targets = found.values.get("target_modules")
    if isinstance(targets, tuple) and set(targets) == _ALL_LINEAR:
        found.values["target_modules"] = "all-linear"
    settled(found)


def _apply(
    given: dict[str, Any], rules: dict[str, Rule], found: Imported, skip: tuple[str, ...] = ()
) -> None:
    """Convert readable values; list the others."""
    readable = {}
    for name, value in given.items():
        if name in skip:
            continue
        rule = rules.get(name)
        if name == "model" and isinstance(value, _Unreadable):
            continue  # loaded by another call
        if name in ("bf16", "fp16") and isinstance(value, _Unreadable):
            found.unneeded.append((f"{name}: {value!r}", "`compute_dtype: auto` asks the device"))
            continue
        settled = rule is not None and rule.option is None and rule.why != "asks for nothing"
        if isinstance(value, _Unreadable) and name != "dtype" and not settled:
            found.missing.append((f"{name}: {value!r}", "decided by code: set it by hand"))
        else:
            readable[name] = value
    apply(readable, rules, found)


def _sources(
    script: _Script, call: ast.Call, given: dict[str, Any], found: Imported
) -> list[Source]:
    origin = ast.unparse(call)
    values = [script.value(one) for one in call.args]
    path, name = values[0], given.get("name", values[1] if len(values) > 1 else None)
    split, files = given.get("split"), given.get("data_files")
    if given.get("streaming") is True:
        found.set("streaming", True, origin)
    readable = [one for one in (path, name, split, files) if not isinstance(one, _Unreadable)]
    if len(readable) < 4 or not isinstance(path, str):
        found.missing.append((origin, "decided by code: write the path or hub id into `data`"))
        return []
    if path in ("json", "csv", "parquet", "text") and files:
        return _files(files, split, origin, found)
    return [source(path, name=name, split=split)]


def _files(files: Any, split: str | None, origin: str, found: Imported) -> list[Source]:
    """``data_files``: a file, several, or those of each split, of which ``split`` chooses one."""
    chosen, bracket, rows = (split or "train").partition("[")
    listed = files.get(chosen) if isinstance(files, dict) else files
    if "+" in f"{split}" or not listed:
        found.missing.append((origin, "write the paths of these splits into `data`"))
        return []
    several = [listed] if isinstance(listed, str) else listed
    return [source(str(one), split=f"train{bracket}{rows}") for one in several]
