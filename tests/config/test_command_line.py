"""Words on the command line become options; `--help` shows them all."""

from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import Field

from halfbyte.cli import COMMANDS, module_of
from halfbyte.cli.train import COMMAND as TRAIN
from halfbyte.config.command_line import Command, invocation, results
from halfbyte.config.options import Options
from halfbyte.config.schema import TrainConfig
from halfbyte.errors import ConfigError


class Sample(Options):
    """A few kinds of options."""

    model: str = Field(description="what to read")
    out: Path = Field(description="where to write")
    double_quant: bool = Field(True, description="quantise the scales once more")
    overwrite: bool = Field(False, description="replace what is there")
    rank: int | None = Field(None, ge=1, description="rank")

    sections: ClassVar[dict[str, str]] = {"model": "files", "double_quant": "more"}


SAMPLE = Command(
    "sample",
    Sample,
    about="Try things.",
    example="halfbyte sample M OUT",
    positional=("model", "out"),
)


@pytest.mark.parametrize(
    ("line", "given_here"),
    [
        ("--lora-r 8", {"lora_r": "8"}),
        ("--lora_r 8", {"lora_r": "8"}),
        ("--lora-r=8", {"lora_r": "8"}),
        ("--no-double-quant", {"double_quant": False}),
        ("--no_double_quant", {"double_quant": False}),
        ("--double-quant", {"double_quant": True}),
        ("--double-quant false", {"double_quant": "false"}),
        ("--resume", {"resume": True}),
        ("--load_in_4bit", {"load_in_4bit": True}),
        ("--bf16 True", {"bf16": "True"}),
        ("--per_device_train_batch_size 4", {"per_device_train_batch_size": "4"}),
        ("--max-steps -1", {"max_steps": "-1"}),
        ("--data=--odd name", {"data": "--odd name"}),
        ("--seed 1 --seed 2", {"seed": "2"}),
        ("--report-to wandb --report-to trackio", {"report_to": ["wandb", "trackio"]}),
        ("--rank-pattern=v=1 --rank-pattern=q=2", {"rank_pattern": ["v=1", "q=2"]}),
        ("--lerning-rate 1e-4", {"lerning_rate": "1e-4"}),
    ],
)
def test_options_are_read_in_every_spelling(line: str, given_here: dict[str, Any]) -> None:
    found = TRAIN.words([line] if line.startswith("--data=") else line.split())
    assert found.given == given_here
    assert found.problems == []


def test_a_file_is_found_wherever_it_stands() -> None:
    for line in ("run.yaml --resume --seed 1", "--resume run.yaml --seed 1", "--seed 1 run.yaml"):
        assert TRAIN.words(line.split()).positional == {"config": "run.yaml"}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("--lora-r", "`lora_r` needs a value"),
        ("--lora-r --seed 1", "`lora_r` needs a value"),
        ("one.yaml two.yaml", "unexpected argument `two.yaml`"),
        ("one.yaml -q", "unexpected argument `-q`"),
    ],
)
def test_words_that_are_no_options(line: str, problem: str) -> None:
    assert TRAIN.words(line.split()).problems == [problem]


def test_json_is_for_verbs_that_have_it() -> None:
    assert SAMPLE.words(["--json"]).json
    silent = Command("s", Sample, about="", example="", has_json=False)
    assert silent.words(["--json"]).given == {"json": True}


def test_positional_fields_are_options_too() -> None:
    by_place = SAMPLE.read(["m", "o", "--rank", "3"])
    by_name = SAMPLE.read(["--out", "o", "--model", "m", "--rank=3"])
    assert by_place == by_name
    assert by_place.options == Sample(model="m", out=Path("o"), rank=3)


def test_foreign_names_work_for_every_verb() -> None:
    options, notes, _ = SAMPLE.read(["--base_model", "m", "--out", "o"])
    assert options.model == "m"
    assert notes == ["`base_model: m` read as `model: m`"]


def test_everything_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        SAMPLE.read(
            ["m", "--rank", "0", "--overwrit", "--rank2", "--double-quant=perhaps", "--out"]
        )
    assert str(caught.value).splitlines() == [
        "6 errors",
        "  `out` needs a value",
        "  unknown option `overwrit`; did you mean `overwrite`?",
        "  unknown option `rank2`; did you mean `rank`?",
        "  `out` is missing: where to write",
        "  `double_quant`: expected true or false, got 'perhaps'",
        "  `rank`: expected at least 1, got '0'",
    ]


def test_help_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert SAMPLE.help().splitlines() == [
        "usage: halfbyte sample MODEL OUT [options]",
        "",
        "Try things.",
        "",
        "  halfbyte sample M OUT",
        "",
        "files",
        "  MODEL                   what to read (required)",
        "  OUT                     where to write (required)",
        "",
        "more",
        "  --no-double-quant       do not quantise the scales once",
        "                          more",
        "  --overwrite             replace what is there",
        "  --rank N                rank",
        "",
        "general",
        "  --json                  print only the result, as one JSON",
        "                          object",
        "  -h, --help              print this help",
    ]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_verb_has_help_that_fits(
    command: str, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit) as left:
        import_module(module_of(command)).main(["--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    known = import_module(module_of(command)).COMMAND
    assert set(known.in_help) <= set(known.options.model_fields)
    assert out.startswith(f"usage: halfbyte {command} ")
    assert max(map(len, out.splitlines())) <= min(width, 100)
    for name in known.in_help or known.options.model_fields:
        assert name.replace("_", "-") in out or name.upper() in out


def test_each_option_of_train_stands_under_a_heading() -> None:
    assert next(iter(TrainConfig.model_fields)) in TrainConfig.sections
    assert set(TrainConfig.sections) <= set(TrainConfig.model_fields)


def test_json_is_all_there_is_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    with results(as_json=True) as result:
        print("a library says hello")
        result |= {"loss": float("nan"), "path": Path("a"), "text": "ü"}
    out, err = capsys.readouterr()
    assert out == '{"loss": null, "path": "a", "text": "ü"}\n'
    assert err == "a library says hello\n"


def test_without_json_what_is_printed_stays(capsys: pytest.CaptureFixture[str]) -> None:
    with results(as_json=False) as result:
        print("for a person")
        result["loss"] = 1
    assert capsys.readouterr() == ("for a person\n", "")


def test_a_command_is_given_as_it_can_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/halfbyte")
    assert invocation("chat", "--model", "my model") == "halfbyte chat --model 'my model'"
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    assert invocation("chat") == "python -m halfbyte chat"
