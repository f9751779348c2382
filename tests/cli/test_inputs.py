"""Every path a user gives may be a pipe, a device, a directory or a file: one message, at once."""

import json
import os
import shutil
from pathlib import Path

import pytest

from halfbyte import cli
from halfbyte.foreign_text import LONGEST_MESSAGE
from tests.tiny import write_tiny_model

ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}

# Every option that takes a path of an input or an output; BAD is what is given.
LINES = [
    "train BAD",
    "train --model MODEL --data BAD --output out",
    "train --model MODEL --data DATA --eval-data BAD --output out",
    "train --model BAD --data DATA --output out",
    "train --model MODEL --data DATA --output BAD",
    "eval --model MODEL --data BAD",
    "eval --model BAD --data DATA",
    "eval --model MODEL --adapter BAD --data DATA",
    "generate --model BAD --prompt x",
    "generate --model MODEL --adapter BAD --prompt x",
    "chat --model BAD",
    "plan --model BAD --card t4",
    "report BAD",
    "report RUN --output BAD",
    "quantize BAD out",
    "quantize MODEL BAD",
    "quantize MODEL BAD --overwrite",
    "merge BAD ADAPTER out",
    "merge MODEL BAD out",
    "merge MODEL ADAPTER BAD --overwrite",
    "merge MODEL ADAPTER out --data BAD",
    "export BAD out",
    "export MODEL BAD out",
    "export MODEL BAD --overwrite",
    "compare --model MODEL --data DATA --output BAD",
    "demo --model BAD --output out",
    "demo --model MODEL --output BAD",
]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data, an adapter and a journal, and what cannot be any of them."""
    root = tmp_path_factory.mktemp("inputs")
    write_tiny_model(root / "MODEL")
    (root / "DATA").write_text(json.dumps(ROW) + "\n")
    (root / "RUN").mkdir()
    (root / "RUN" / "journal.jsonl").write_text('{"event": "begin"}\n')
    data, out = str(root / "DATA"), str(root / "ADAPTER")
    words = ["--model", str(root / "MODEL"), "--data", data, "--output", out, "--lora-r", "2"]
    assert cli.main(["train", *words, "--samples", "0"]) == 0
    os.mkfifo(root / "pipe")
    (root / "text").write_text("hello\n")
    return root


def complaint(ground: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    message = err[err.index(f"halfbyte {words[0]}: ") :]
    assert len(message) <= LONGEST_MESSAGE + 30
    assert out == ""
    assert not (ground / "out").exists()
    return message


@pytest.mark.parametrize("bad", ["pipe", "/dev/zero", "text"])
@pytest.mark.parametrize("line", LINES)
def test_a_path_of_the_wrong_kind(
    ground: Path, line: str, bad: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {"BAD": bad, "out": "out"} | {
        name: name for name in ("MODEL", "DATA", "RUN", "ADAPTER")
    }
    words = [str(ground / paths[word]) if word in paths else word for word in line.split()]
    assert str(ground / bad) in complaint(ground, words, capsys)
    assert (ground / "text").read_text() == "hello\n"


@pytest.mark.parametrize("bad", ["x" * 300, "loop", "a/" * 3000])
@pytest.mark.parametrize("line", [*LINES[:5], LINES[7], *LINES[11:14], LINES[15], LINES[-2]])
def test_a_path_that_cannot_be(
    ground: Path, line: str, bad: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (ground / "loop").is_symlink():
        (ground / "loop").symlink_to("loop")
    words = [str(ground / word) if word.isupper() else word for word in line.split()]
    words = [str(ground / bad) if word.endswith("/BAD") else word for word in words]
    assert str(ground / bad)[: len(str(ground)) + 3] in complaint(ground, words, capsys)
    assert (ground / "loop").is_symlink()


@pytest.mark.parametrize("line", [*LINES[:4], *LINES[5:13]])
def test_a_directory_without_what_is_expected(
    ground: Path, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (ground / "empty").mkdir(exist_ok=True)
    words = [str(ground / word) if word.isupper() else word for word in line.split()]
    words = [str(ground / "empty") if word.endswith("/BAD") else word for word in words]
    assert str(ground / "empty") in complaint(ground, words, capsys)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("command", ["plan", "generate"])
def test_a_pipe_in_a_models_directory(
    ground: Path, command: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(ground / "MODEL", tmp_path / "model")
    (model / name).unlink()
    os.mkfifo(model / name)
    more = ["--prompt", "x"] if command == "generate" else ["--card", "t4"]
    message = complaint(ground, [command, "--model", str(model), *more], capsys)
    assert f"{name} is a pipe" in message


def test_a_pipe_beside_a_configuration_alone(
    ground: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "config.json")
    assert "config.json is a pipe" in complaint(
        ground, ["plan", "--model", str(tmp_path), "--card", "t4"], capsys
    )


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pipe_in_an_adapter(
    ground: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = shutil.copytree(ground / "ADAPTER", tmp_path / "adapter")
    (adapter / name).unlink()
    os.mkfifo(adapter / name)
    words = ["generate", "--model", str(ground / "MODEL"), "--adapter", str(adapter)]
    message = complaint(ground, [*words, "--prompt", "x"], capsys)
    assert f"{name}: expected a file, found a pipe" in message


@pytest.mark.parametrize("key", ["messages", "x" * 10**7])
def test_a_very_long_line_is_not_echoed(
    ground: Path, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({key: "y" * 10**7}) + "\n")
    data = str(tmp_path / "long.jsonl")
    complaint(ground, ["eval", "--model", str(ground / "MODEL"), "--data", data], capsys)


@pytest.mark.parametrize(
    ("file", "field"),
    [("config.json", "auto_map"), ("tokenizer_config.json", "auto_map")],
)
def test_a_model_with_code_of_its_own_says_why_it_is_not_run(
    ground: Path, file: str, field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(ground / "MODEL", tmp_path / "model")
    fields = json.loads((model / file).read_text())
    own = {"model_type": "own", "tokenizer_class": "Own"}
    fields |= own | {field: {"AutoConfig": "own.Config", "AutoTokenizer": ["own.Tokenizer", None]}}
    (model / file).write_text(json.dumps(fields))
    message = complaint(ground, ["generate", "--model", str(model), "--prompt", "x"], capsys)
    assert "halfbyte never runs code that comes with a model" in message
    assert "trust_remote_code" not in message


def test_a_prompt_without_an_end(capsys: pytest.CaptureFixture[str], ground: Path) -> None:
    with open("/dev/zero", encoding="latin-1") as zeros, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", zeros)
        message = complaint(ground, ["generate", "--model", str(ground / "MODEL")], capsys)
    assert "longer than 10,000,000 characters" in message
