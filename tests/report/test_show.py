"""Results on standard output, as text that a pipe can take."""

import pytest

from halfbyte.report import show


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_an_answer_stands_below_its_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    show.answer("What is [this]?", {"before": "I cannot say " * 8, "after": ' {"a": [1]}\n'})
    out = capsys.readouterr().out
    assert [line.rstrip() for line in out.splitlines()] == [
        "",
        "› What is [this]?",
        "  before  I cannot say I cannot say I cannot say I cannot say I cannot say I",
        "          cannot say I cannot say I cannot say",
        '  after   {"a": [1]}',
    ]


def test_an_empty_answer_is_said_to_be_empty(capsys: pytest.CaptureFixture[str]) -> None:
    show.answer("x", {"before": " \n"})
    assert "(nothing)" in capsys.readouterr().out


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    show.table({"loss": 0.5, "exact match": "97.5 %"})
    show.columns(["", "before", "after"], [["exact", "0.0 %", "97.5 %"]])
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "  loss         0.5",
        "  exact match  97.5 %",
        "           before     after",
        "  exact     0.0 %    97.5 %",
    ]


def test_a_command_stays_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    show.command("halfbyte chat --model " + "x" * 100)
    assert capsys.readouterr().out == "  halfbyte chat --model " + "x" * 100 + "\n"


def test_prose_is_broken_and_a_heading_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    show.heading("Before")
    show.paragraph("word " * 40)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("Before ──")
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in "".join(lines)
