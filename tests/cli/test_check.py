"""``halfbyte check`` as it is typed: what it prints, how it exits, and that it reads no weight."""

import fnmatch
import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte import cli
from halfbyte.checkpoint import base_model
from halfbyte.checkpoint.gguf_file import GGUFFile
from halfbyte.cli.check import CheckOptions
from halfbyte.config.schema import TrainConfig
from halfbyte.data.check_codes import CODES
from tests.checkpoint.gguf_models import write_gguf
from tests.data.test_checks import GOOD, chat, reply, user
from tests.tiny import tiny_tokenizer, write_tiny_model

DOCS = Path(__file__).parents[2] / "docs" / "check.md"
BAD = chat(user("a"), user("b"), reply("c"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and a configuration, and weights that nobody can read."""
    directory = write_tiny_model(tmp_path_factory.mktemp("model"))
    (directory / "model.safetensors").write_bytes(b"no weights")
    return directory


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def run(*words: object) -> int:
    return cli.main(["check", *map(str, words)])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "data.jsonl", GOOD)


def test_good_data_is_fine_and_shown(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(data, "--model", model) == 0
    out, err = capsys.readouterr()
    assert "12 of 12 rows usable, read as messages" in " ".join(out.split())
    assert "HB710" in out
    assert "[[" in out
    assert "12 rows checked: 0 errors, 0 warnings, 1 note" in out
    assert "found" not in err


def test_errors_are_exit_code_1_and_named(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (data, "--model", model, "--eval-data", data)
    assert run(*words) == 1
    assert capsys.readouterr().err.endswith(
        "halfbyte check: HB504 found; docs/check.md explains each code, and --ignore leaves codes "
        "out\n"
    )
    assert run(*words, "--ignore", "hb504,HB710") == 0
    assert "HB504" not in capsys.readouterr().out


def test_warnings_are_errors_if_asked(model: Path, data: Path) -> None:
    write(data, [*GOOD, BAD])
    assert run(data, "--model", model) == 0
    assert run(data, "--model", model, "--strict") == 1


def test_wrong_use_is_exit_code_2(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (
        (data,),
        ("--model", model),
        (tmp_path / "none.jsonl", "--model", model),
        (data, "--model", tmp_path / "none"),
        (data, "--model", model, "--ignore", "HB999"),
        (data, "--model", model, "--max-length", "x"),
        ("a.yaml", "b.yaml", "--model", model),
    ):
        assert run(*words) == 2
    write(data, [{"question": "a"}])
    assert run(data, "--model", model) == 2
    page = tmp_path / "page.html"
    page.write_text("mine")
    write(data, GOOD)
    assert run(data, "--model", model, "--html", page) == 2
    assert page.read_text() == "mine"
    assert capsys.readouterr().out == ""


def test_data_without_a_usable_row_is_an_error_of_the_data(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(data, [chat(user("a")), chat()])
    assert run(data, "--model", model, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert [one["code"] for one in found["findings"][:2]] == ["HB101", "HB201"]
    assert found["lengths"] is None


def test_json_has_everything(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(data, [*GOOD, BAD])
    page = tmp_path / "page.html"
    assert run(data, "--model", model, "--json", "--show", 3, "--html", page) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["looked_at"], found["errors"]) == (13, 13, 0)
    (twice,) = [one for one in found["findings"] if one["code"] == "HB401"]
    assert (twice["lines"], twice["severity"], twice["count"]) == (["13"], "warning", 1)
    assert found["lengths"]["examples"] == 13
    assert [one["line"] for one in found["examples"]] == ["1", "7", "13"]
    tokens = found["examples"][2]["tokens"]
    text = "".join(one["text"] for one in tokens)
    assert text.startswith("<|im_start|>user\na<|im_end|>\n")
    learned = [one["text"] for one in tokens if one["supervised"]]
    assert learned == ["c", "<|im_end|>"]
    assert page.read_text().count("<h3>") == 3


def test_a_page_has_ten_examples_and_the_terminal_one(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert run(data, "--model", model, "--html", page) == 0
    assert capsys.readouterr().out.count("Line ") == 1
    assert page.read_text().count("<h3>") == 10
    assert run(data, "--model", model, "--show", 0) == 0
    assert "Line " not in capsys.readouterr().out


def test_the_configuration_of_a_run_can_be_checked(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = chat(user("Hi"), reply("yes " * 900))
    write(data, [*GOOD, long])
    config = tmp_path / "run.yaml"
    config.write_text(
        f"base_model: {model}\ndata: {data}\nsequence_len: 512\nlora_r: 8\noutput: {tmp_path}\n"
    )
    assert run(config, "--json") == 0
    codes = {one["code"] for one in json.loads(capsys.readouterr().out)["findings"]}
    assert "HB301" in codes
    assert run(config, "--json", "--max-length", 4096) == 0
    codes = {one["code"] for one in json.loads(capsys.readouterr().out)["findings"]}
    assert "HB301" not in codes
    config.write_text("lora_rr: 8\n")
    assert run(config) == 2
    assert "lora_rr" in capsys.readouterr().err


def test_a_tokenizer_is_enough(data: Path, tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert run(data, "--model", tmp_path / "tokenizer") == 0


def test_no_weight_is_read(data: Path, tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "model")
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").symlink_to(tmp_path / "gone")
    assert run(data, "--model", directory) == 0
    file = write_gguf(tmp_path / "model.gguf")
    start = GGUFFile(file).data_start
    with open(file, "r+b") as opened:
        opened.seek(start)
        opened.write(b"\xff" * (file.stat().st_size - start))  # NaN, if anything read it
    assert run(data, "--model", file) == 0


def test_no_weight_is_downloaded(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[list[str]] = []

    def download(
        name: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        wanted.append(allow_patterns)
        return str(model)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(base_model, "snapshot_download", download)
    assert run(data, "--model", "owner/name") == 0
    (patterns,) = wanted
    assert "tokenizer.json" in fnmatch.filter(["tokenizer.json"], patterns[0])
    files = ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"]
    assert not [file for file in files for one in patterns if fnmatch.fnmatch(file, one)]


def test_options_that_train_has_too_have_its_defaults() -> None:
    for name, field in TrainConfig.model_fields.items():
        if name != "output":
            assert CheckOptions.model_fields[name].default == field.default


def test_every_code_is_documented() -> None:
    text = " ".join(DOCS.read_text(encoding="utf-8").split())
    for code, known in CODES.items():
        severity = known.severity
        if known.error_from is not None:
            severity += f", error from {known.error_from:.0%}"
        assert f"| {code} | {severity} | {known.title} |" in text, code
        assert known.remedy in text, code


def test_another_chat_template_is_checked(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_tiny_model(tmp_path / "model")
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}")
    assert run(data, "--model", model, "--chat-template", template) == 1
    out, err = capsys.readouterr()
    assert "chat template: " in err
    assert "HB202" in out  # its turns have no end
    assert "[[<│assistant│>" in out


def test_of_a_stream_the_first_rows_are_checked(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("halfbyte.train.growing_data.SAMPLE_ROWS", len(GOOD))
    with open(write(tmp_path / "piped.jsonl", [*GOOD, BAD]), encoding="utf-8") as piped:
        monkeypatch.setattr("sys.stdin", piped)
        assert run("-", "--model", model, "--streaming", "--max-steps", 5) == 0
    out, err = capsys.readouterr()
    assert "standard input is a stream: its first 12 rows are read, no others" in err
    assert "12 of 12 rows usable" in " ".join(out.split())
    assert "12 rows checked: 0 errors, 0 warnings" in out  # not the row after these
    (tmp_path / "empty.jsonl").write_text("")
    empty = tmp_path / "empty.jsonl"
    assert run(empty, "--model", model, "--streaming", "--max-steps", 5) == 2
    assert "is empty: expected rows" in capsys.readouterr().err
