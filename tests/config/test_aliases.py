"""A word of another trainer means here what it means there, or is refused."""

from pathlib import Path
from typing import Any

import pytest

from halfbyte.cli.plan import COMMAND as PLAN
from halfbyte.cli.quantize import COMMAND as QUANTIZE
from halfbyte.cli.train import COMMAND as TRAIN
from halfbyte.config.aliases import ALIASES, REFUSED
from halfbyte.config.command_line import Command
from halfbyte.config.data_sources import DataSource
from halfbyte.config.reading import load_config
from halfbyte.config.schema import TrainConfig
from halfbyte.errors import ConfigError

REQUIRED = {"model": "m", "data": "d", "output": "o"}
SEED = {"seed": "1"}


def complaint(**options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, REQUIRED | options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "field", "read"),
    [
        ("max_steps", -1, "max_steps", None),  # transformers: not set
        ("max_steps", "-1", "max_steps", None),
        ("lr_scheduler_type", "constant_with_warmup", "lr_scheduler_type", "constant"),
        ("lr", "1e-3", "learning_rate", 1e-3),
        ("double_quantization", "False", "double_quant", False),
        ("quantization_type", "fp4", "quant", "fp4"),
        ("train_on_prompt", True, "train_on", "all"),
        ("sample_packing", True, "packing", True),
        ("neat_packing", "true", "packing", True),
        ("model_revision", "v2", "revision", "v2"),
        ("gradient_checkpointing", "offload", "activations", "offload"),
        ("val_set_size", 0.05, "eval_split", 0.05),
        ("val_set_size", 0, "eval_split", None),
        ("val_size", "40", "eval_split", 40),
        ("load_best_model_at_end", True, "load_best", True),
        ("greater_is_better", False, "metric_mode", "min"),
        ("metric_for_best_model", "eval_loss", "metric_for_best", "loss"),
        ("early_stopping_steps", 3, "early_stopping_patience", 3),
    ],
)
def test_a_value_is_converted_and_that_is_said(
    name: str, value: Any, field: str, read: Any
) -> None:
    options = {key: given for key, given in REQUIRED.items() if key != field}
    config, notes = load_config(None, options | {name: value})
    assert getattr(config, field) == read
    assert len(notes) == 1
    assert f"read as `{field}: {'1e-3' if name == 'lr' else read}`".lower() in notes[0].lower()


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ([{"path": "rows.jsonl", "type": "alpaca"}], ("rows.jsonl",)),
        ([{"path": "a"}, {"path": "b", "ds_type": "json"}], ("a", "b")),
        (
            [{"path": "o/n", "name": "en", "split": "train[:9]", "field_messages": "turns"}, "b"],
            (
                DataSource(
                    path="o/n", config="en", split="train[:9]", columns={"messages": "turns"}
                ),
                "b",
            ),
        ),
        ("rows.jsonl", ("rows.jsonl",)),
    ],
)
def test_data_sets_of_axolotl_are_sources(value: Any, read: Any) -> None:
    config, notes = load_config(None, {"model": "m", "output": "o", "datasets": value})
    assert config.data == read
    assert len(notes) == 1
    assert "read as `data: " in notes[0]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("adapter", "out", "expected qlora or lora, got 'out'; it is axolotl's name for `quant`"),
        ("adapter", None, "`adapter`: expected qlora or lora, got None"),  # there: full fine-tuning
        ("load_in_4bit", "maybe", "`load_in_4bit`: expected true or false, got 'maybe'"),
        ("load_in_8bit", True, "8-bit base weights are not supported"),
        ("quantization_bit", 8, "`quantization_bit`: expected 4, got 8"),
        ("bnb_4bit_quant_type", "int4", "`bnb_4bit_quant_type`: expected nf4 or fp4, got 'int4'"),
        ("lora_target_linear", False, "`lora_target_linear`: expected true, got False"),
        ("train_on_inputs", "some", "`train_on_inputs`: expected true or false, got 'some'"),
        ("gradient_checkpointing", "unsloth", "expected true or false or offload, got 'unsloth'"),
        ("resume_from_checkpoint", "out/checkpoint-5", "goes on from the newest checkpoint"),
        ("finetuning_type", "full", "`finetuning_type`: only LoRA and QLoRA are trained"),
        ("eval_strategy", "epoch", "this is given in steps: use `eval_steps`, or leave it out"),
        ("evals_per_epoch", 4, "this is given in steps: use `eval_steps`"),
        ("val_set_size", 1, "`eval_split`: expected a share between 0 and 1, or a number of rows"),
        ("stage", "dpo", "`stage`: only supervised fine-tuning is done"),
        ("trust_remote_code", True, "code that comes with a model is never run"),
        ("datasets", [{"path": "a", "roles_to_train": ["gpt"]}], "roles_to_train is not supported"),
        ("datasets", [{"split": "train"}], "a name, or a mapping with `path`, got"),
        ("mix_strategy", "interleave_under", "sources are mixed by weights"),
        ("interleave_probs", "0.7,0.3", "a.jsonl:0.7 and b.jsonl:0.3"),
        ("dataset_train_split", "train[:9]", "owner/name:split"),
        ("save_steps", 0.1, "expected a whole number of steps, not a share of the run, got 0.1"),
        ("warmup_steps", "0.03", "expected a whole number of steps, not a share of the run"),
        ("learning_rat", 1, "unknown option `learning_rat`; did you mean `learning_rate`?"),
    ],
)
def test_a_value_that_means_something_else_is_refused(name: str, value: Any, message: str) -> None:
    options = {key: given for key, given in REQUIRED.items() if name != "datasets" or key != "data"}
    with pytest.raises(ConfigError) as caught:
        load_config(None, options | {name: value})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"trust_remote_code": False},
        {"load_in_8bit": "false", "adapter": "lora"},
        {"stage": "sft", "finetuning_type": "lora"},
        {"eval_strategy": "steps", "evaluation_strategy": False},
        {"lora_target_linear": False, "target_modules": "q_proj"},
        dict.fromkeys([*REFUSED, "resume_from_checkpoint", "eval_dataset", "lora_modules_to_save"]),
    ],
)
def test_what_asks_for_nothing_else_passes(options: dict[str, Any]) -> None:
    config, _ = load_config(None, REQUIRED | options)
    assert config.quant == ("none" if "adapter" in options else "nf4")


def test_no_meaning_is_one_that_the_field_refuses() -> None:
    for name, alias in ALIASES.items():
        for value, read in alias.meanings.items():
            if value.startswith("paged"):
                continue
            options = {key: given for key, given in REQUIRED.items() if key != alias.field}
            config, _ = load_config(None, options | {name: value})
            if read not in ("true", "false"):
                assert getattr(config, alias.field) == read


@pytest.mark.parametrize(
    ("command", "line", "message"),
    [
        (TRAIN, "--adapter out --model m --data d --output o", "it is axolotl's name for `quant`"),
        (PLAN, "m --adapter out", "it is axolotl's name for `quant`"),
        (QUANTIZE, "m o --adapter out", "it is axolotl's name for `quant`"),
        (QUANTIZE, "m o --trust-remote-code", "code that comes with a model is never run"),
    ],
)
def test_no_command_takes_an_adapter_for_a_type(
    command: Command[Any], line: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        command.read(line.split())
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("line", "problems", "given"),
    [
        ("-lr 1e-4", ["unexpected argument `-lr`; did you mean `--lr`?"], {}),
        ("-lr=1e-4 --seed 1", ["unexpected argument `-lr=1e-4`; did you mean `--lr=1e-4`?"], SEED),
        ("-resume", ["unexpected argument `-resume`; did you mean `--resume`?"], {}),
        ("--lr", ["`lr` needs a value"], {}),
        ("--lr 1e-4", [], {"lr": "1e-4"}),
        ("-q", ["unexpected argument `-q`"], {}),
    ],
)
def test_one_dash_is_not_taken_for_a_file(
    line: str, problems: list[str], given: dict[str, Any]
) -> None:
    words = TRAIN.words(line.split())
    assert (words.problems, words.given, words.positional) == (problems, given, {})


HOSTILE = {
    "an unknown tag": "x: !!timestamp q",
    "a date that is none": "x: 2024-99-99",
    "an empty number": "seed: !!int ''",
    "depth": "target_modules: " + "[" * 600,
    "a huge number": "seed: 0x" + "f" * 20_000,
    "a huge word": "bf16: -0x" + "f" * 20_000,
    "long text": "seed: " + "x" * 90_000,
    "a null character": 'revision: "a\\0b"',
    "half a pair": 'revision: "\\ud800"',
    "a size": "memory_budget: " + "9" * 4_000,
    "forever": "epochs: 1e300",
    "a whole disk": "# " + "x" * 200_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_is_one_short_message(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "run.yaml", REQUIRED)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize("name", ["target_modules", "memory_budget", "bf16", "datasets", "adapter"])
def test_aliases_that_unfold_to_billions_are_not_unfolded(tmp_path: Path, name: str) -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 20)]
    (tmp_path / "run.yaml").write_text("\n".join([*levels, f"{name}: *a19"]))
    with pytest.raises(ConfigError, match=f"`{name}`|`compute_dtype`|`data`"):
        load_config(tmp_path / "run.yaml", {"model": "m", "output": "o"})


def test_every_refusal_is_of_a_name_that_is_no_option() -> None:
    assert not set(REFUSED) & (set(ALIASES) | set(TrainConfig.model_fields))


def test_where_to_upload_is_a_switch_and_a_name_there() -> None:
    named = {"hub_model_id": "alice/orders"}
    config, _ = load_config(None, REQUIRED | named | {"push_to_hub": True})
    assert (config.push_to_hub, config.hub_private) == ("alice/orders", True)
    config, _ = load_config(None, REQUIRED | {"push_to_hub": "alice/x", "hub_private_repo": False})
    assert (config.push_to_hub, config.hub_private) == ("alice/x", False)
    assert load_config(None, REQUIRED | {"push_to_hub": False})[0].push_to_hub is None
    # Neither uploaded against a "no", nor to a place that was not named.
    assert "given twice" in complaint(**named, push_to_hub=False)
    assert "`push_to_hub`" in complaint(push_to_hub=True)
