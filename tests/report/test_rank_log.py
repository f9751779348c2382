"""A process that does not write a run's directory keeps a log of its own in it."""

import pytest

from halfbyte.errors import DataError, NonFiniteLossError, ProcessFailed
from halfbyte.report import open_report


@pytest.fixture
def second(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")


def fail(output, error, *, begun):
    def run():
        with open_report(output) as report:
            report.note("a note")
            if begun:
                report.begin(total_steps=3, start_step=0, metadata={})
                report.step({"step": 1, "loss": 1.0})
            report.warning(1, "spike", "a warning")
            raise error

    with pytest.raises(type(error)):
        run()


def test_it_has_what_is_said_and_the_reason_for_the_end(tmp_path, second, capsys):
    fail(tmp_path, NonFiniteLossError("the loss is NaN"), begun=True)
    lines = (tmp_path / "logs" / "rank-1.log").read_text().splitlines()
    assert [line.partition(" ")[2].partition(" ")[2] for line in lines] == [
        "a note",
        "training: steps 1 to 3",
        "warning: a warning",
        "ended: NonFiniteLossError: the loss is NaN",
    ]
    assert not (tmp_path / "journal.jsonl").exists()
    assert capsys.readouterr() == ("", "")


def test_a_bug_has_its_traceback(tmp_path, second):
    fail(tmp_path, ZeroDivisionError("a bug"), begun=False)
    text = (tmp_path / "logs" / "rank-1.log").read_text()
    assert "ended: ZeroDivisionError: a bug" in text
    assert "Traceback (most recent call last)" in text


@pytest.mark.parametrize("error", [DataError("bad"), ProcessFailed("rank 0 failed: bad", 0, 2)])
def test_bad_input_leaves_no_file(tmp_path, second, error):
    fail(tmp_path / "run", error, begun=False)
    assert not (tmp_path / "run").exists()


def test_a_program_without_a_directory_has_no_log(tmp_path, second, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fail(None, DataError("bad"), begun=True)
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_does_not_end_the_run(tmp_path, second, capsys):
    (tmp_path / "logs").write_text("not a directory")
    fail(tmp_path, NonFiniteLossError("the loss is NaN"), begun=True)
    assert "cannot write" in capsys.readouterr().err
