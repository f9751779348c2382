"""A data check on a terminal, in colour and without."""

import pytest

from halfbyte.data.checks import DataCheck, Finding
from halfbyte.data.example_checks import Lengths
from halfbyte.data.token_view import Piece, ShownExample
from halfbyte.report.check_text import (
    coarser,
    print_check,
    print_example,
    print_lengths,
    print_verdict,
    suggestion,
)

LENGTHS = Lengths(
    max_length=128,
    examples=40,
    tokens=4000,
    supervised=1000,
    percentiles={5: 9, 25: 20, 50: 60, 75: 80, 90: 100, 95: 130, 99: 190, 100: 200},
    bins=((64, 96, 30), (96, 128, 0), (128, 192, 10)),
    choices=((96, 0.25, 0.5), (128, 0.25, 0.1), (192, 0.02, 0.004), (256, 0, 0), (384, 0, 0)),
    padding=0.125,
    packed=0.96,
)
PIECES = [
    Piece("<|im_start|>", (1,), supervised=False, special=True),
    Piece("user\n", (5,), supervised=False),
    Piece("\x1b[31m|", (6,), supervised=False),
    Piece("日", (7, 8), supervised=True),
    Piece("<|im_end|>", (2,), supervised=True, special=True),
    Piece("\n", (9,), supervised=False),
]


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_a_finding_has_its_code_its_numbers_and_its_remedy(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = Finding("HB501", "warning", 3, 40, lines=("4", "\x1b[2J", "9"), source="a.jsonl")
    harmless = Finding("HB710", "info", detail="'</s>'")
    print_check(DataCheck((found, harmless), LENGTHS, 40, 40))
    print_verdict(DataCheck((found, harmless), LENGTHS, 40, 40))
    lines = printed(capsys)
    assert lines[2:5] == [
        "  warning  HB501  duplicate rows: 3 of 40 rows (7.5 %), lines 4, \\x1b[2J, 9",
        "                  → remove them: a row that occurs n times weighs n times as",
        "                  much, and is memorised",
    ]
    assert lines[5] == "  info     HB710  the padding token is the end-of-turn token; '</s>'"
    assert lines[-1] == "40 rows checked: 0 errors, 1 warning, 1 note"


def test_one_row_is_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    print_verdict(DataCheck((), LENGTHS, 1, 1))
    assert printed(capsys)[-1] == "1 row checked: 0 errors, 0 warnings, 0 notes"


def test_the_source_is_said_if_there_are_several(capsys: pytest.CaptureFixture[str]) -> None:
    found = [Finding("HB404", "info", 1, 2, source=name) for name in ("a", "b")]
    print_check(DataCheck(tuple(found)))
    assert "b: conversations that do not end with a reply" in capsys.readouterr().out


def test_lengths_are_a_histogram_and_what_follows_from_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_lengths(LENGTHS, batch_size=4)
    lines = printed(capsys)
    assert lines[2:5] == [
        "    64 – 95  30  ████████████████████████████████",
        "   96 – 127   0",
        "  128 – 191  10  ██████████▋  beyond max_length",
    ]
    facts = "\n".join(lines[6:])
    assert "an epoch        4,000 tokens in 40 examples, 1,000 supervised (25 %)" in facts
    assert "12 % of the tokens if 4 examples are padded to the longest" in facts
    assert "rows of max_length 128 would be 96 % full" in facts
    assert "max_length 128  cuts off 25 % of the examples, 10 % of the supervised" in facts
    assert "max_length 256  cuts off nothing" in facts
    assert "max_length 384" not in facts
    assert "suggestion      max_length 192 cuts off 0.40 % of the supervised tokens" in facts


def test_a_suggestion_is_made_only_if_it_is_of_use() -> None:
    fits = {**LENGTHS.__dict__, "choices": ((128, 0.0, 0.0),)}
    assert suggestion(Lengths(**fits | {"max_length": 128})) is None
    assert suggestion(Lengths(**fits | {"max_length": 200})) is None
    assert suggestion(Lengths(**fits | {"max_length": 4096})) is None  # the longest has 200
    longer = {**LENGTHS.__dict__, "positions": 150}
    assert suggestion(Lengths(**longer)) is None  # 192 would be enough
    assert suggestion(Lengths(**longer | {"positions": 192})) is not None
    percentiles = {**LENGTHS.percentiles, 100: 4096}
    rare = Lengths(
        **fits | {"max_length": 4096, "percentiles": percentiles, "choices": ((128, 0.01, 0.001),)}
    )
    assert suggestion(rare) == "max_length 128 cuts off 0.10 % of the supervised tokens"


def test_bins_are_joined_until_they_fit() -> None:
    bins = [(at, at + 1, at) for at in range(9)]
    found = coarser(bins, 4)
    assert (len(found), found[0], found[-1]) == (3, (0, 4, 6), (8, 9, 8))
    assert coarser(bins, 9) == bins


def test_tokens_are_legible_without_colour(capsys: pytest.CaptureFixture[str]) -> None:
    print_example(ShownExample("7", 7, PIECES))
    lines = printed(capsys)
    assert lines[1].startswith("Line 7: 7 tokens, 3 supervised ───")
    assert lines[2:] == ["  <|im_start|>│user⏎", "  │\\x1b[31m|[[日│<|im_end|>]]⏎"]


def test_a_line_break_that_is_supervised_is_inside_the_brackets(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pieces = [Piece("a", (1,), supervised=True), Piece("\n", (2,), supervised=True)]
    print_example(ShownExample("1", 2, pieces))
    assert printed(capsys)[2] == "  [[a│⏎]]"


@pytest.mark.parametrize(("variable", "coloured"), [("FORCE_COLOR", True), ("NO_COLOR", False)])
def test_colour_is_used_where_it_is_wanted(
    variable: str,
    coloured: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv(variable, "1")
    print_example(ShownExample("7", 7, PIECES))
    out = capsys.readouterr().out
    assert ("\x1b[32m" in out or "\x1b[1;32m" in out) is coloured
    assert "[[" in out
