"""The page of a data check: strict HTML, in which no data is markup and nothing is loaded."""

import dataclasses
import re
from pathlib import Path

import pytest

from halfbyte.data.checks import DataCheck, Finding
from halfbyte.data.token_view import Piece, ShownExample
from halfbyte.errors import OutputError
from halfbyte.report.check_page import check_page, write_check_page
from tests.report.test_check_text import LENGTHS, PIECES
from tests.report.test_page import EVIL, Checked

FOUND = (
    Finding("HB504", "error", 2, 8, lines=("1", EVIL), detail=EVIL, source=EVIL),
    Finding("HB710", "info"),
)
CHECK = DataCheck(FOUND, LENGTHS, 40, 40)


def test_findings_lengths_and_tokens_are_on_the_page() -> None:
    read = Checked(check_page("a.jsonl", CHECK, [ShownExample("7", 7, PIECES)], 1))
    assert read.count("h1") == 1
    assert read.count("h2") == 3
    for text in (
        "errors1",
        "error HB504 held-out rows",
        "2 of 8 rows (25 %)",
        "4,000",
        "128 – 191",
    ):
        assert text in read.text
    assert "max_length 256cuts off nothing" in read.text
    assert "Line 7: 7 tokens, 3 supervised" in read.text
    assert "supervised: 日<|im_end|> (end)" in read.text
    assert "1 5 6 [7 8] [2] 9" in read.text
    assert read.count("mark") == 2  # one of them in the legend


def test_a_region_can_be_scrolled_with_the_keyboard_and_has_a_name() -> None:
    read = Checked(check_page("a", CHECK, [ShownExample("7", 7, PIECES)], 1))
    (tokens,) = [
        attrs for tag, attrs in read.tags if tag == "div" and attrs.get("class") == "tokens"
    ]
    assert (tokens["tabindex"], tokens["role"]) == ("0", "region")
    assert tokens["aria-label"] == "Line 7: 7 tokens, 3 supervised"


def test_nothing_of_the_data_becomes_markup_and_nothing_is_loaded() -> None:
    pieces = [Piece(EVIL, (1,), supervised=True), Piece("</mark>", (2,), supervised=False)]
    html = check_page(EVIL, CHECK, [ShownExample(EVIL, 2, pieces)], 1)
    read = Checked(html)
    assert (read.count("script"), read.count("img")) == (1, 0)
    assert "alert(1)" in read.text
    assert not re.search(r"(?:src|href)=", re.sub(r"&[^;]+;", "", html.replace(escaped(), "")))
    assert "default-src 'none'" in html


def escaped() -> str:
    from html import escape

    return escape(EVIL)


def test_an_empty_check_has_a_page_too() -> None:
    read = Checked(check_page("a", DataCheck(()), [], 1))
    assert "Nothing was found." in read.text
    assert read.count("h2") == 1


def test_only_a_page_of_ours_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "check.html"
    for check in (CHECK, dataclasses.replace(CHECK, findings=())):
        write_check_page(page, "a", check, [], 1)
    assert "Nothing was found." in page.read_text()
    page.write_text("mine")
    with pytest.raises(OutputError, match="not replaced"):
        write_check_page(page, "a", CHECK, [], 1)
    assert page.read_text() == "mine"
