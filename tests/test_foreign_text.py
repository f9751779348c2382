"""What comes from elsewhere is shown, and not obeyed, and a quotation is short."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.errors import DataError
from halfbyte.foreign_text import (
    LONGEST_MESSAGE,
    LONGEST_QUOTE,
    as_message,
    printable,
    quote,
    shorten,
    to_json,
)

CONTROLS = [
    *map(chr, (*range(0x20), *range(0x7F, 0xA0))),  # C0, DEL, C1
    *"\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069",  # bidirectional
    *"\u2028\u2029",
    "\udcff",  # not a pair in this order
    "\ud800",
]


@pytest.mark.parametrize("control", CONTROLS, ids=ascii)
def test_every_control_is_shown_as_an_escape(control: str) -> None:
    shown = f"\\x{ord(control):02x}" if ord(control) < 256 else f"\\u{ord(control):04x}"
    assert printable(f"a{control}b", lines=False) == f"a{shown}b"
    kept = control if control in "\n\t" else shown
    assert printable(f"a{control}b") == f"a{kept}b"


def test_what_is_no_control_stays() -> None:
    text = "naïve Ω 漢字 עברית नमस्ते 👩\u200d💻 [bold] \\x1b"
    assert printable(text) == text


@given(st.text(st.characters(exclude_categories=()) | st.sampled_from(CONTROLS)))
def test_what_is_printable_can_be_encoded_and_stays_so(text: str) -> None:
    once = printable(text)
    once.encode()
    assert not set(once) & (set(CONTROLS) - set("\n\t"))
    assert printable(once) == once


def test_a_sequence_that_sets_the_title_is_text() -> None:
    assert printable("\x1b]0;owned\x07\x9b31m") == r"\x1b]0;owned\x07\x9b31m"


@given(st.text(min_size=0, max_size=300), st.integers(60, 200))
def test_a_long_text_loses_its_middle(text: str, most: int) -> None:
    short = shorten(text, most)
    assert len(short) <= most
    assert (short == text) == (len(text) <= most)
    assert short[:10] == text[:10]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a'b\n\u202e", '"a\'b\\n\\u202e"'),
        (None, "None"),
        (0.5, "0.5"),
        (Path("a b"), "'a b'"),
        ({"a": [1]}, "{'a': [1]}"),
        (1 << 20_000, "a number of 20,001 bits"),
    ],
    ids=["text", "none", "number", "path", "mapping", "huge"],
)
def test_a_quotation_is_python(value: object, shown: str) -> None:
    assert quote(value) == shown


def test_a_quotation_of_anything_is_short_and_takes_no_time() -> None:
    bomb: object = "x"
    for _ in range(100):
        bomb = [bomb] * 10
    began = time.monotonic()
    for value in (bomb, "x" * 10**8, list(range(10**6)), {str(i): bomb for i in range(10**5)}):
        assert len(quote(value)) <= LONGEST_QUOTE
    assert time.monotonic() - began < 5


def test_messages_are_short_whatever_they_quote() -> None:
    error = DataError("line 1: " + "y" * 10**6 + " is not a row")
    assert len(str(error)) <= LONGEST_MESSAGE
    assert str(error).startswith("line 1: ")
    assert str(error).endswith("is not a row")
    assert len(as_message("y" * 10**6)) <= LONGEST_MESSAGE


@given(st.dictionaries(st.text(), st.text(st.characters(exclude_categories=())) | st.floats(0, 1)))
def test_json_is_printable_and_reads_back_equal(value: dict[str, object]) -> None:
    for ascii_only in (False, True):
        text = to_json(value, ascii_only=ascii_only)
        assert printable(text, lines=False) == text
        read = json.loads(text.encode("ascii" if ascii_only else "utf-8"))
        assert read == json.loads(json.dumps(value))  # both join halves of a surrogate pair
