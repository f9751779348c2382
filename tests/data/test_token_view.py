"""The texts of tokens are together the text, whatever the tokenizer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from halfbyte.data import Encoder, Example
from halfbyte.data.formats import Conversation
from halfbyte.data.token_view import Piece, pieces_of, runs, shortened, show_example
from tests.data.chats import CONVERSATIONS, FAMILIES, only, tokenizer_of
from tests.tiny import tiny_tokenizer

TINY = tiny_tokenizer()


def example_of(tokenizer: PreTrainedTokenizerFast, text: str) -> Example:
    ids = np.array(tokenizer(text, add_special_tokens=False).input_ids, np.int32)
    return Example(ids, np.arange(len(ids)) >= len(ids) // 2, 0)


@settings(max_examples=40)
@given(st.text(min_size=1))
def test_pieces_are_all_tokens_and_the_whole_text(text: str) -> None:
    example = example_of(TINY, text)
    pieces = pieces_of(TINY, example)
    assert [id for piece in pieces for id in piece.ids] == example.tokens.tolist()
    flags = [piece.supervised for piece in pieces for _ in piece.ids]
    assert flags == example.labels_mask.tolist()
    alike = Example(example.tokens, np.ones(len(example.tokens), np.bool_), 0)
    assert "".join(piece.text for piece in pieces_of(TINY, alike)) == TINY.decode(alike.tokens)


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"deepseek_r1"}))
def test_special_tokens_are_marked_in_every_family(name: str) -> None:
    tokenizer = tokenizer_of(name)
    row = Conversation("1", CONVERSATIONS["plain"])
    pieces = pieces_of(tokenizer, only(Encoder(tokenizer).encode(row)))
    special = {piece.text for piece in pieces if piece.special}
    assert special
    assert special <= {*FAMILIES[name].special, *tokenizer.all_special_tokens}
    written = "".join(piece.text for piece in pieces if piece.supervised)
    assert "Yes." in written


def test_spaces_of_a_tokenizer_that_writes_them_between_tokens() -> None:
    vocabulary = {"<unk>": 0, "▁Hello": 1, "▁world": 2, "!": 3}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    example = Example(np.array([1, 2, 3], np.int32), np.array([False, True, True]), 1)
    assert [piece.text for piece in pieces_of(tokenizer, example)] == ["Hello", " world", "!"]


def test_the_middle_of_long_runs_is_left_out_and_counted() -> None:
    pieces = [Piece("a", (at,), supervised=at >= 900) for at in range(1000)]
    found = shortened(pieces, 100)
    assert sum(len(piece.ids) + piece.left_out for piece in found) == 1000
    assert len(found) < 130
    assert [(flag, len(run)) for flag, run in runs(found)] == [(False, 91), (True, 25)]
    assert shortened(pieces[:90], 100) == pieces[:90]


def test_an_example_is_shown_as_it_is_trained() -> None:
    example = Example(np.array([40, 41, 42, 43], np.int32), np.arange(4) > 1, 2)
    assert show_example(TINY, example, "7", 9).title == "Line 7: 4 tokens, 2 supervised"
    assert show_example(TINY, example, "7", 3).title == "Line 7: 3 of 4 tokens, 1 supervised"
