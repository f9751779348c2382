"""Hashes of rows, and damaged text, against what Python says of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.data.formats import Conversation
from halfbyte.data.row_checks import RowScan, damage, first_match, normalised, repeated
from halfbyte.data.tokenizer_checks import SpecialTokens
from tests.data.chats import FAMILIES, reply, tokenizer_of, user
from tests.tiny import tiny_tokenizer

SPECIAL = SpecialTokens(tiny_tokenizer())

UNDAMAGED = [
    "L’été, à Málaga: «CAFÉ» coûte 3 €…",
    "Ärger über Öl, ß und §",
    "Ångström São João Ão ÂNGELA",
    "Привет, мир! Это текст.",
    "日本語のテキスト 한국어 ไทย हिन्दी العربية עברית",
    "naïve façade – “quoted” ‘text’ • 👩‍👩‍👧 🍮",
    "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α ∧ ¬β",
]


@pytest.mark.parametrize("text", UNDAMAGED)
def test_text_in_many_scripts_is_not_damaged(text: str) -> None:
    assert damage(text) == ""


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
@pytest.mark.parametrize("text", ["é", "Ü", "ñ", "’", "“", "…", "🍮", "Ж", "ش"])
def test_utf8_that_was_read_in_another_encoding_is_found(text: str, encoding: str) -> None:
    try:
        wrong = text.encode("utf-8").decode(encoding)
    except UnicodeDecodeError:  # Windows-1252 has no character for five bytes
        return
    said = damage(f"before {wrong} after")
    assert f"perhaps {text!r}" in said
    assert damage("\ufffd").startswith("'\ufffd'")


@given(st.text())
def test_any_text_can_be_looked_at(text: str) -> None:
    assert isinstance(damage(text), str)
    assert normalised(normalised(text)) == normalised(normalised(normalised(text)))


def test_case_white_space_and_compatible_characters_are_no_difference() -> None:
    assert normalised("  Ｈｅｌｌｏ\n WORLD ﬁn ") == normalised("hello world fin")
    assert normalised("a b") != normalised("ab")


def rows(*chats: list[dict[str, object]]) -> list[Conversation]:
    return [Conversation(str(at), chat) for at, chat in enumerate(chats, 1)]


def test_rows_are_equal_if_all_their_messages_are() -> None:
    scan = RowScan(
        rows(
            [user("Hi"), reply("Yes")],
            [user("hi "), reply("YES")],
            [user("HiYes"), reply("")],
            [reply("Hi"), user("Yes")],
            [user("Hi"), reply("No")],
            [user("Hi"), reply("Yes", {"function": {"name": "f"}})],
        ),
        np.arange(6),
        SPECIAL,
    )
    assert repeated(scan.hashes).tolist() == [[1, 0]]
    assert scan.prompts[[0, 1, 4, 5]].tolist() == [scan.prompts[0]] * 4
    assert scan.prompts[3] == 0
    text = RowScan([Conversation("1", [], text="Hi")], np.arange(1), SPECIAL)
    assert text.prompts.tolist() == [0]


@pytest.mark.parametrize("indices", [[], [3], [0, 2, 5], [1, 2, 3, 5], [0, 1, 2, 3, 4, 5]])
def test_a_scan_is_of_the_rows_with_these_indices(indices: list[int]) -> None:
    found = rows(*([user(str(at)), user("b"), reply("c")] for at in range(6)))
    scan = RowScan(found, np.array(indices, np.int64), SPECIAL)
    assert scan.found["HB401"].first == indices[:5]
    alone = [RowScan([found[at]], np.arange(1), SPECIAL).hashes[0] for at in indices]
    assert scan.hashes.tolist() == alone


hashes = st.lists(st.integers(0, 9)).map(lambda found: np.array(found, np.uint64))


@given(hashes)
def test_what_occurred_before_is_found_with_its_first_occurrence(found: np.ndarray) -> None:
    values = found.tolist()
    expected = [[at, values.index(v)] for at, v in enumerate(values) if v in values[:at]]
    assert repeated(found).tolist() == expected


@given(hashes, hashes)
def test_matches_are_the_first_equal_ones(found: np.ndarray, among: np.ndarray) -> None:
    others = among.tolist()
    expected = [others.index(v) if v in others else -1 for v in found.tolist()]
    assert first_match(found, among).tolist() == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_special_tokens_are_those_that_the_tokenizer_makes_of_text(name: str) -> None:
    tokenizer = tokenizer_of(name)
    special = SpecialTokens(tokenizer)
    for token in tokenizer.all_special_tokens:
        assert special.find(f"a < b [x] {token} c") == token
        ids = tokenizer(f"a {token} c", add_special_tokens=False).input_ids
        assert tokenizer.convert_tokens_to_ids(token) in ids
    assert special.find("a < b, [x] <think> <|no|> </") == ""
