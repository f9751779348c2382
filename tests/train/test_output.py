"""A run writes its own directory, and nothing of anybody else's."""

import json
import os
from pathlib import Path

import pytest

from halfbyte.config.reading import WRITTEN_YAML
from halfbyte.config.schema import TrainConfig
from halfbyte.errors import OutputError
from halfbyte.train.output import claim_output, remove_run

JOURNAL = '{"event": "note", "text": "a run"}\n'


def config(output: Path, **options: object) -> TrainConfig:
    given = {"model": "org/model", "data": "org/data", "output": output} | options
    return TrainConfig.model_validate({name: str(value) for name, value in given.items()})


def claim(output: Path, **options: object) -> None:
    with claim_output(config(output, **options)):
        pass


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        "journal.jsonl",
        "report.html",
        "adapter_config.json",
        "adapter_model.safetensors",
        "halfbyte.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "vocab.txt",
        "checkpoint-500",
    ],
)
def test_a_file_that_would_be_replaced_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match=f"{name} was not written by a run, so it is not"):
        claim(tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_other_files_may_be_there(tmp_path: Path) -> None:
    for name in ("train.jsonl", "README.md", "run.yaml", "notes.txt", "model.gguf"):
        (tmp_path / name).write_text("mine")
    claim(tmp_path, data=tmp_path / "train.jsonl", model=tmp_path / "model.gguf")
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("sign", ["journal", "checkpoint", "configuration"])
def test_the_directory_of_a_run_is_its_own(tmp_path: Path, sign: str) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1")
    (tmp_path / "checkpoint-5").mkdir()
    if sign == "configuration":  # interrupted before the journal's first line
        (tmp_path / "config.yaml").write_text(WRITTEN_YAML + "seed: 1")
        (tmp_path / "journal.jsonl").write_text("")
    elif sign == "journal":
        (tmp_path / "journal.jsonl").write_text(JOURNAL)
    else:
        (tmp_path / "checkpoint-5" / "run_state.json").write_text("{}")
    claim(tmp_path)


@pytest.mark.parametrize("line", ["", "[]", '{"unit": "sshd"}', "event", "[" * 10**5, '"event"'])
def test_another_journal_is_not_of_a_run(tmp_path: Path, line: str) -> None:
    (tmp_path / "journal.jsonl").write_text(line)
    with pytest.raises(OutputError, match=r"journal\.jsonl was not written by a run"):
        claim(tmp_path)
    remove_run(tmp_path)
    assert (tmp_path / "journal.jsonl").read_text() == line


def test_a_pipe_is_not_a_journal(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "journal.jsonl")
    with pytest.raises(OutputError, match=r"journal\.jsonl was not written by a run"):
        claim(tmp_path)


@pytest.mark.parametrize("option", ["model", "data", "eval_data"])
def test_what_is_read_is_not_written(tmp_path: Path, option: str) -> None:
    (tmp_path / "read").mkdir()
    (tmp_path / "link").symlink_to("read")
    (tmp_path / "read" / "x.jsonl").write_text("{}")
    for output in ("read", "link", "read/../link"):
        with pytest.raises(OutputError, match=rf"is read \(`{option}`\), so nothing is written"):
            claim(tmp_path / output, **{option: tmp_path / "read"})
    claim(tmp_path / "read" / "inside", **{option: tmp_path / "read"})
    claim(tmp_path / "read", **{option: tmp_path / "read" / "x.jsonl"})


def test_a_file_that_is_read_is_not_replaced_even_in_a_run(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text(JOURNAL)
    with pytest.raises(OutputError, match=r"is read \(`data`\)"):
        claim(tmp_path, data=tmp_path / "journal.jsonl")


def test_a_run_is_removed_and_what_is_beside_it_stays(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text(JOURNAL)
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "run_state.json").write_text(json.dumps({}))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoint-6").symlink_to("elsewhere")
    (tmp_path / "notes.txt").write_text("mine")
    remove_run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "notes.txt"]
    remove_run(tmp_path / "nowhere")
