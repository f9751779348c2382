"""The data of a run is checked: errors are warnings there, and everything is recorded."""

import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte.config.schema import TrainConfig
from halfbyte.errors import DataError
from halfbyte.report import open_report
from halfbyte.report.journal import read_journal
from halfbyte.report.runs import read_run
from halfbyte.train import run_data
from halfbyte.train.run import train
from halfbyte.train.run_data import RunData
from tests.data.test_checks import GOOD, chat, reply, user
from tests.tiny import tiny_llama, tiny_tokenizer, write_tiny_model

DAMAGED = [chat(user(f"{at}"), user("Ã©"), reply(f"a{at} \ufffd<|im_end|>")) for at in range(3)]


class Heard:
    """Stands where the report of a run is."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[tuple[int, str, str]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warning(self, *said: Any) -> None:
        self.warnings.append(said)

    def task(self, *_: Any) -> Any:
        return open_report(quiet=True).task("")


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(map(json.dumps, [*GOOD, *DAMAGED, {"messages": []}])))
    held = tmp_path / "held.jsonl"
    held.write_text("\n".join(map(json.dumps, GOOD[:2])))
    return TrainConfig(
        model=str(tmp_path / "model"),
        data=str(data),
        eval_data=str(held),
        output=tmp_path / "out",
        max_steps=1,
        samples=0,
        device="cpu",
    )


def read(config: TrainConfig) -> tuple[RunData, Heard]:
    heard, tokenizer = Heard(), tiny_tokenizer()
    return RunData(config, tokenizer, tiny_llama(tokenizer).config, heard), heard  # type: ignore[arg-type]


def test_errors_are_warnings_and_what_reading_said_is_not_said_again(config: TrainConfig) -> None:
    data, heard = read(config)
    (error,) = heard.warnings
    assert error[:2] == (0, "data")
    assert data.held_out is not None
    source = data.held_out.report.source
    assert error[2].startswith(f"HB504: {source}: held-out rows that are also training rows: 2")
    said = [note for note in heard.notes if note.startswith("HB")]
    assert [note[:5] for note in said] == ["HB401", "HB603", "HB604"]
    found = {one.code for one in data.check.findings}
    assert {"HB101", "HB401", "HB504", "HB603", "HB604", "HB710"} <= found


def test_held_out_data_that_is_missing_is_said_before_the_data_is_read(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_data, "open_source", lambda *_, **__: pytest.fail("data was read"))
    with pytest.raises(DataError, match=r"no data file .*hold\.jsonl. Did you mean .*held\.jsonl"):
        read(config.model_copy(update={"eval_data": (str(config.output.parent / "hold.jsonl"),)}))


def test_a_sample_is_said_to_be_one(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_data, "TRAIN_ROWS", 4)
    monkeypatch.setattr(run_data, "_MOST_SAID", 1)
    data, heard = read(config)
    assert data.check.looked_at == 4
    assert "4 of 15 rows were checked; `halfbyte check` checks all" in heard.notes
    assert any(note.endswith("more findings are in report.html") for note in heard.notes)


def test_good_data_is_nothing_to_speak_of(config: TrainConfig, tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps(chat(user("Which?"), reply("That."))))
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, GOOD)))
    _, heard = read(config)
    assert heard.warnings == []
    assert not [note for note in heard.notes if "HB" in note]


def test_a_run_records_what_was_found_and_says_it_once(config: TrainConfig) -> None:
    write_tiny_model(Path(config.model))
    for resume in (False, True):
        with open_report(config.output, quiet=True) as report:
            train(config.model_copy(update={"resume": resume}), report)
    begins = [one for one in read_journal(config.output / "journal.jsonl") if "data_check" in one]
    codes = {one["code"] for one in begins[-1]["data_check"]["findings"]}
    assert {"HB504", "HB603"} <= codes
    warnings = read_run(config.output).warnings
    assert [text[:5] for text in warnings] == ["HB504"]
    page = (config.output / "report.html").read_text()
    assert "<code>HB603</code>" in page
