"""Other trainers' configurations: every key that their published examples have is accounted for."""

import json
from pathlib import Path

import pytest
import yaml

from halfbyte.config.importing import axolotl, import_config, llama_factory, unsloth
from halfbyte.config.importing.rules import Imported
from halfbyte.config.importing.writing import missing_options, to_yaml
from halfbyte.config.reading import load_config
from halfbyte.config.schema import TrainConfig
from halfbyte.data.specs import Slice, Spec
from halfbyte.errors import ConfigError

# Every key, with one of its values, of the LoRA and QLoRA examples for text that axolotl has
# (2026-07-24) and LLaMA-Factory (2026-08-19), and all arguments of Unsloth's notebooks (08-18).
PUBLISHED = json.loads(Path(__file__).with_name("published_settings.json").read_text())
UNKNOWN = "not known here"

AXOLOTL = """
base_model: org/model
load_in_4bit: true
adapter: qlora
datasets:
  - path: org/chats
    type: chat_template
    split: train[:20%]
    field_messages: conversations
    message_property_mappings: {role: from, content: value}
val_set_size: 0.05
output_dir: ./out
sequence_len: 4096
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
warmup_ratio: 0.1
evals_per_epoch: 4
special_tokens:
wandb_project:
"""

LLAMA_FACTORY = """
model_name_or_path: org/model
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: mine,named_nowhere
dataset_dir: sets
cutoff_len: 2048
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
bf16: true
report_to: none
overwrite_output_dir: true
"""

UNSLOTH = """
from unsloth import FastLanguageModel
max_seq_length = 2048
dtype = None
rank = 8
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="org/model", max_seq_length=max_seq_length, dtype=dtype, load_in_4bit=True
)
model = FastLanguageModel.get_peft_model(
    model, r=rank, lora_alpha=rank * 2, lora_dropout=0, bias="none", random_state=3407,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    use_gradient_checkpointing="unsloth", loftq_config=None,
)
from datasets import load_dataset
dataset = load_dataset("org/chats", split="train[:3000]")
trainer = SFTTrainer(
    model=model, tokenizer=tokenizer, train_dataset=dataset,
    args=SFTConfig(
        per_device_train_batch_size=2, gradient_accumulation_steps=4, warmup_steps=5, max_steps=60,
        learning_rate=2e-4, optim="adamw_8bit", weight_decay=0.001, lr_scheduler_type="linear",
        seed=3407, output_dir="outputs", report_to="none", logging_steps=compute_it(),
        fp16=not torch.cuda.is_bf16_supported(),
    ),
)
"""


def written(directory: Path, name: str, text: str) -> Path:
    path = directory / name
    path.write_text(text)
    return path


def loaded(imported: Imported, directory: Path) -> TrainConfig:
    """The options that ``halfbyte train`` reads from the file that is written."""
    path = written(directory, "ours.yaml", to_yaml(imported, "theirs"))
    required = {name: "x" for name in missing_options(imported)}
    config, _ = load_config(path, required)
    return config


def test_an_axolotl_file(tmp_path):
    found = import_config(written(tmp_path, "qlora.yml", AXOLOTL))
    assert found.values == {
        "model": "org/model",
        "quant": "nf4",
        "data": "org/chats[:20%]",
        "eval_split": 0.05,
        "output": "./out",
        "max_length": 4096,
        "packing": True,
        "lora_r": 32,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "target_modules": "all-linear",
        "gradient_accumulation_steps": 4,
        "batch_size": 2,
        "epochs": 1,
        "optim": "adamw_8bit",
        "lr_scheduler_type": "cosine",
        "learning_rate": 0.0002,
        "compute_dtype": "auto",
        "warmup_ratio": 0.1,
        "seed": 42,
    }
    assert [setting for setting, _ in found.missing] == ["evals_per_epoch: 4"]
    config = loaded(found, tmp_path)
    assert (config.lora_r, config.batch_size, config.optim) == (32, 2, "adamw_8bit")


def test_a_llama_factory_file_with_its_list_of_data_sets(tmp_path):
    (tmp_path / "sets").mkdir()
    entry = {"file_name": "mine.json", "num_samples": 9, "columns": {"prompt": "question"}}
    info = {"mine": entry}
    written(tmp_path / "sets", "dataset_info.json", json.dumps(info))
    found = import_config(written(tmp_path, "sft.yaml", LLAMA_FACTORY))
    # Without quantization_bit it trains plain LoRA; alpha is twice the rank.
    assert found.values["quant"] == "none"
    assert found.values["lr_scheduler_type"] == "linear"
    assert found.values["warmup_steps"] == 0
    mine = {"path": str(tmp_path / "sets" / "mine.json"), "columns": {"instruction": "question"}}
    assert found.values["data"] == mine
    settings = [setting for setting, _ in found.missing]
    assert settings == [
        "dataset: mine num_samples: 9",
        "dataset: named_nowhere",
        "overwrite_output_dir: true",
    ]
    config = loaded(found, tmp_path)
    assert (config.lora_r, config.lora_alpha, config.compute_dtype) == (8, 16, "bfloat16")


def notebook_of(code: str) -> str:
    cells = [
        {"cell_type": "markdown", "source": ["# A notebook"]},
        {"cell_type": "code", "source": ["%%capture\n", "!pip install unsloth"]},
        {"cell_type": "code", "source": ["!nvidia-smi\n", "x = 1"]},
        {"cell_type": "code", "source": code.splitlines(keepends=True)},
    ]
    return json.dumps({"cells": cells, "nbformat": 4})


@pytest.mark.parametrize("suffix", [".py", ".ipynb"])
def test_an_unsloth_script(tmp_path, suffix):
    text = notebook_of(UNSLOTH) if suffix == ".ipynb" else UNSLOTH
    found = import_config(written(tmp_path, f"tune{suffix}", text))
    assert found.values == {
        "model": "org/model",
        "max_length": 2048,
        "quant": "nf4",
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0,
        "target_modules": "all-linear",
        "data": "org/chats[:3000]",
        "batch_size": 2,
        "gradient_accumulation_steps": 4,
        "warmup_steps": 5,
        "max_steps": 60,
        "learning_rate": 2e-4,
        "optim": "adamw_8bit",
        "weight_decay": 0.001,
        "lr_scheduler_type": "linear",
        "seed": 3407,
        "output": "outputs",
        "train_on": "all",  # no train_on_responses_only
        "epochs": 3.0,
    }
    assert found.missing == [("logging_steps: compute_it()", "decided by code: set it by hand")]
    assert loaded(found, tmp_path).max_steps == 60


def test_replies_alone_if_the_script_says_so(tmp_path):
    code = UNSLOTH + "\ntrainer = train_on_responses_only(trainer, instruction_part='a')\n"
    found = import_config(written(tmp_path, "tune.py", code))
    assert found.values["train_on"] == "assistant"


def test_a_cell_that_is_not_python_is_listed(tmp_path):
    book = json.loads(notebook_of(UNSLOTH))
    book["cells"].append({"cell_type": "code", "source": ["if x\n"]})
    found = import_config(written(tmp_path, "tune.ipynb", json.dumps(book)))
    assert any(setting.startswith("cell 4, line 1") for setting, _ in found.missing)


# --- what train would refuse ----------------------------------------------------------------------

NEEDS_MAX_STEPS = "`streaming` needs `max_steps`: such data has no epochs"
NEEDS_HELD_OUT = "needs data to evaluate on: give `eval_data`, or `eval_split` to hold out rows of"


@pytest.mark.parametrize(
    ("settings", "taken", "listed", "todo"),
    [
        ({"streaming": True}, {}, "streaming: true", NEEDS_MAX_STEPS),
        ({"streaming": True, "max_steps": 9}, {"streaming": True, "max_steps": 9}, "", ""),
        ({"eval_steps": 5, "val_set_size": 0.1}, {"eval_steps": 5, "eval_split": 0.1}, "", ""),
        ({"early_stopping_patience": 3}, {}, "early_stopping_patience: 3", NEEDS_HELD_OUT),
        ({"val_set_size": 1}, {}, "val_set_size: 1", "`eval_split`: expected a share between"),
        ({"eval_steps": 0.1, "val_set_size": 9}, {"eval_split": 9}, "eval_steps: 0.1", "expected"),
        (
            {"lr_scheduler": "linear", "cosine_min_lr_ratio": 0.1},
            {"lr_scheduler_type": "linear"},
            "cosine_min_lr_ratio: 0.1",
            "`min_lr_rate` needs `lr_scheduler_type` cosine",
        ),
        (
            {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}},
            {"lr_scheduler_type": "cosine_with_min_lr", "min_learning_rate": 1e-6},
            "",
            "",
        ),
        (
            {"lr_scheduler": "cosine", "lr_scheduler_kwargs": {"min_lr": 1e-6, "odd": 2}},
            {"min_learning_rate": 1e-6},
            "lr_scheduler_kwargs: {'min_lr': 1e-06, 'odd': 2}",
            "`lr_scheduler_kwargs`: expected min_lr, ",
        ),
        (
            {"load_best_model_at_end": True, "val_set_size": 0.1},
            {"load_best": True, "eval_split": 0.1},
            "",
            "",
        ),
        (
            {"overrides_of_model_config": {"rope_scaling": {"type": "linear", "factor": 4.0}}},
            {"rope_scaling": '{"factor": 4.0, "type": "linear"}'},
            "",
            "",
        ),
        (
            {"model_config": {"output_router_logits": True}},
            {"rope_scaling": None},
            "model_config: {'output_router_logits': True}",
            "`router_aux_loss_coef`",
        ),
    ],
)
def test_what_train_would_refuse_is_listed_and_the_rest_is_taken(
    settings, taken, listed, todo, tmp_path
):
    start = {"base_model": "m", "adapter": "lora", "datasets": [{"path": "a.jsonl"}]}
    found = import_config(written(tmp_path, "a.yaml", yaml.safe_dump(start | settings)))
    config = loaded(found, tmp_path)
    config.require_held_out()
    assert {name: getattr(config, name) for name in taken} == taken
    assert [(one, todo in why) for one, why in found.missing] == (
        [(listed, True)] if listed else []
    )


def test_an_adapter_that_a_run_starts_from_keeps_its_rank(tmp_path):
    text = LLAMA_FACTORY + "adapter_name_or_path: one\n"
    found = import_config(written(tmp_path, "a.yaml", text))
    assert found.values["init_adapter"] == "one"
    assert not {"lora_r", "lora_alpha", "target_modules"} & found.values.keys()
    assert ("lora_rank: 8", "the adapter that the run starts from decides") in found.unneeded
    assert loaded(found, tmp_path).init_adapter == Path("one")


def test_what_train_refuses_by_name_is_listed_with_its_reason(tmp_path):
    text = LLAMA_FACTORY + "mix_strategy: interleave_under\ninterleave_probs: 0.7,0.3\n"
    found = import_config(written(tmp_path, "a.yaml", text))
    reasons = [why for setting, why in found.missing if setting.startswith(("mix", "interleave"))]
    assert len(reasons) == 2
    assert all(why.startswith("sources are mixed by weights") for why in reasons)


# --- chat templates -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("chatml", "chatml"), ("llama3", "llama3"), ("tokenizer_default", None), ("phi_35", None)],
)
def test_a_chat_template_of_axolotl(theirs, ours, tmp_path):
    text = f"{AXOLOTL}chat_template: {theirs}\n"
    found = import_config(written(tmp_path, "a.yaml", text))
    assert loaded(found, tmp_path).chat_template == ours
    listed = [setting for setting, _ in found.missing + found.unneeded]
    assert (f"chat_template: {theirs}" in listed) is (ours is None)


@pytest.mark.parametrize(
    ("theirs", "ours"), [("chatml", "chatml"), ("llama-3", "llama3"), ("llama-3.1", None)]
)
def test_a_chat_template_of_unsloth(theirs, ours, tmp_path):
    code = f'{UNSLOTH}\ntokenizer = get_chat_template(tokenizer, chat_template="{theirs}")\n'
    found = import_config(written(tmp_path, "tune.py", code))
    assert loaded(found, tmp_path).chat_template == ours
    listed = [setting for setting, _ in found.missing]
    assert (f"get_chat_template: '{theirs}'" in listed) is (ours is None)


# --- data sets ----------------------------------------------------------------------------------

Slices = list[tuple[str, str | None, str | None, Slice, tuple[tuple[str, str], ...]]]
FIRST_FIFTH = Slice(None, "20%")


def read_by_train(found: Imported, directory: Path) -> Slices:
    """What ``halfbyte train`` reads from the sources of the file that is written."""
    specs = [Spec.parse(one) for one in loaded(found, directory).data]
    return [(spec.path, spec.config, spec.split, spec.rows, spec.columns) for spec in specs]


@pytest.mark.parametrize(
    ("entries", "read"),
    [
        ("[{path: a/b}]", [("a/b", None, None, Slice(), ())]),
        ("[{path: a/b, split: train}]", [("a/b", None, None, Slice(), ())]),
        ("[{path: a/b, split: test}]", [("a/b", None, "test", Slice(), ())]),
        ("[{path: a/b, split: 'train[:20%]'}]", [("a/b", None, None, FIRST_FIFTH, ())]),
        ("[{path: a/b, split: 'test-2[5:]'}]", [("a/b", None, "test-2", Slice("5", None), ())]),
        ("[{path: a/b, name: en}]", [("a/b", "en", "train", Slice(), ())]),
        (
            "[{path: a/b, name: en, split: 'test[:20%]'}]",
            [("a/b", "en", "test", FIRST_FIFTH, ())],
        ),
        ("[{path: a/b, split: train+test}]", [("a/b", None, "train+test", Slice(), ())]),
        (
            "[{path: a/b, name: en, split: 'train[:20%]+test[:20%]'}]",
            [("a/b", "en", "train[:20%]+test[:20%]", Slice(), ())],
        ),
        (
            "[{path: json, data_files: [x.json, y.json], split: 'train[:20%]'}]",
            [("x.json", None, None, FIRST_FIFTH, ()), ("y.json", None, None, FIRST_FIFTH, ())],
        ),
        (
            "[{path: a/b, field_messages: turns}, {path: c/d, type: {field_output: answer}}]",
            [
                ("a/b", None, None, Slice(), (("messages", "turns"),)),
                ("c/d", None, None, Slice(), (("output", "answer"),)),
            ],
        ),
    ],
)
def test_data_sets_of_axolotl_are_those_that_train_reads(entries, read, tmp_path):
    text = AXOLOTL.replace("val_set_size: 0.05\n", "") + f"datasets: {entries}\n"
    settings = yaml.safe_load(text)
    found = import_config(written(tmp_path, "a.yaml", yaml.safe_dump(settings)))
    assert read_by_train(found, tmp_path) == read


@pytest.mark.parametrize(
    ("arguments", "read"),
    [
        ("'a/b', 'en', split='test'", [("a/b", "en", "test", Slice(), ())]),
        ("'json', data_files='x.json', split='train[:20%]'", [("x.json", FIRST_FIFTH)]),
        ("'json', data_files=['x.json', 'y.json']", [("x.json", Slice()), ("y.json", Slice())]),
        (
            "'json', data_files={'train': 'x.json', 'test': ['y.json']}, split='test[:20%]'",
            [("y.json", FIRST_FIFTH)],
        ),
        ("'json', data_files={'train': 'x.json', 'test': 'y.json'}", [("x.json", Slice())]),
    ],
)
def test_data_sets_of_a_script_are_those_that_train_reads(arguments, read, tmp_path):
    code = UNSLOTH.replace('"org/chats", split="train[:3000]"', arguments)
    assert code != UNSLOTH
    found = import_config(written(tmp_path, "tune.py", code))
    whole = [one if len(one) == 5 else (one[0], None, None, one[1], ()) for one in read]
    assert read_by_train(found, tmp_path) == whole


def test_splits_that_a_script_joins_from_files_are_listed(tmp_path):
    joined = "'json', data_files={'a': 'x.json', 'b': 'y.json'}, split='a+b'"
    code = UNSLOTH.replace('"org/chats", split="train[:3000]"', joined)
    found = import_config(written(tmp_path, "tune.py", code))
    assert "data" not in found.values
    assert any(todo == "write the paths of these splits into `data`" for _, todo in found.missing)


# --- what is published --------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", ["axolotl", "llama_factory"])
def test_every_published_key_is_mapped_or_named(trainer, tmp_path):
    settings = PUBLISHED[trainer]
    found = import_config(written(tmp_path, "theirs.yaml", yaml.safe_dump(settings)))
    unknown = [setting for setting, todo in found.missing if todo.startswith(UNKNOWN)]
    assert not unknown
    said = [*found.origins.values(), *(setting for setting, _ in found.missing + found.unneeded)]
    silent = [key for key in settings if not any(part.startswith(key) for part in said)]
    assert not silent


def test_every_published_argument_of_unsloth_is_mapped_or_named(tmp_path):
    calls = [
        f"{function}({'x, ' * (function == 'get_peft_model')}"
        + ", ".join(f"{name}={value}" for name, value in arguments.items())
        + ")"
        for function, arguments in PUBLISHED["unsloth"].items()
        if function != "load_dataset"
    ]
    found = import_config(written(tmp_path, "theirs.py", "\n".join(calls)))
    assert not [setting for setting, todo in found.missing if todo.startswith(UNKNOWN)]


def test_every_rule_is_of_an_option():
    tables = [axolotl.RULES, llama_factory.RULES, unsloth.FROM_PRETRAINED, *unsloth.CALLS.values()]
    options = {rule.option for table in tables for rule in table.values()}
    assert options - {None} <= TrainConfig.model_fields.keys()


@pytest.mark.parametrize("trainer", ["axolotl", "llama_factory"])
@pytest.mark.parametrize("key", ["made_up", "eval_every_full_moon"])
def test_an_unknown_key_is_listed(trainer, key, tmp_path):
    start = AXOLOTL if trainer == "axolotl" else LLAMA_FACTORY
    found = import_config(written(tmp_path, "theirs.yaml", f"{start}{key}: 3\n"))
    assert (f"{key}: 3", "not known here; see whether your results depend on it") in found.missing


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.yaml", "base_model: x\ndatasets: []\n", "`adapter: None` is not LoRA or QLoRA"),
        ("a.yaml", "base_model: x\nadapter: lora\nrl: dpo\n", "`rl: dpo`"),
        ("a.yaml", "model_name_or_path: x\nstage: dpo\n", "`stage: dpo`"),
        ("a.yaml", "model_name_or_path: x\nfinetuning_type: full\n", "`finetuning_type: full`"),
        ("a.yaml", "model: x\n", "neither axolotl's"),
        ("a.toml", "", "expected a YAML file"),
        ("a.py", "x = 1\n", "makes no run"),
        ("a.py", "x = = 1\n", "is not Python"),
        ("a.py", "SFTTrainer()\nDPOTrainer(x)\n", "uses DPOTrainer"),
        ("a.ipynb", "{", "not a notebook"),
        ("a.ipynb", "[1, 2]", "not a notebook"),
    ],
)
def test_what_cannot_be_converted_is_said(name, text, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        import_config(written(tmp_path, name, text))


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        import_config(tmp_path / "none.py")


def test_two_names_for_one_option_are_listed(tmp_path):
    text = AXOLOTL + "adam_eps: 1.0e-5\nadam_epsilon: 1.0e-8\n"
    found = import_config(written(tmp_path, "a.yaml", text))
    assert found.values["adam_epsilon"] == 1e-5
    assert any("keep one of the two" in todo for _, todo in found.missing)
