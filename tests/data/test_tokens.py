"""Ids are the tokenizer's, and masks those of its offsets, however they are computed."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from halfbyte.data import tokens as module
from halfbyte.data.tokens import TextTokenizer
from tests.tiny import tiny_tokenizer

PIECES = [" ", "  ", "\n", "\n\n", "a", "The ", "quick", "é", "e\u0301", "日本", "🙂", "<|im_end|>"]
PIECES += ["<|im_start|>", "assistant\n", "<r>", "\x00"]


@cache
def made(kind):
    tokenizer = tiny_tokenizer(adds_bos=True, adds_eos=True)
    if kind == "nfc":
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    if kind == "lowercase":
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    if kind == "rstrip":
        tokenizer.add_tokens([AddedToken("<r>", rstrip=True, normalized=False)])
    if kind == "incomplete":  # not every byte has a token, as in SmolLM2's
        vocabulary = {name: at for at, name in enumerate(["<|im_end|>", *"aTheĠquick"])}
        model = Tokenizer(models.BPE(vocabulary, []))
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|im_end|>")
    if kind == "metaspace":
        names = ["<unk>", "<|im_end|>", "▁", "▁The", *"aquickTheé"]
        model = Tokenizer(
            models.BPE({name: at for at, name in enumerate(names)}, [], unk_token="<unk>")
        )
        model.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|im_end|>")
    return tokenizer


@cache
def text_tokenizer(kind):
    return TextTokenizer(made(kind))


@st.composite
def texts_with_spans(draw):
    text = "".join(draw(st.lists(st.sampled_from(PIECES), max_size=10)))
    if draw(st.integers(0, 5)) == 0:
        return text, None
    places = st.integers(0, len(text))
    spans = draw(st.lists(st.tuples(places, places).map(sorted).map(tuple), max_size=3))
    return text, spans


@pytest.fixture(autouse=True)
def no_text_is_too_short(monkeypatch):
    monkeypatch.setattr(module, "_FEW", 0)


KINDS = ["plain", "nfc", "lowercase", "rstrip", "incomplete", "metaspace"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(texts=st.lists(texts_with_spans(), min_size=1, max_size=5))
def test_masks_are_those_of_offsets(kind, texts):
    for (text, spans), found in zip(texts, text_tokenizer(kind).tokenize(texts), strict=True):
        wanted = made(kind)(text, add_special_tokens=False, return_offsets_mapping=True)
        assert found.ids.tolist() == wanted.input_ids
        mask, merged = [], False
        for start, stop in wanted.offset_mapping:
            mask.append(spans is None or any(start < b and stop > a for a, b in spans))
        for a, b in spans or ():
            inside = [start for start, stop in wanted.offset_mapping if start < b and stop > a]
            merged |= inside != [] and inside[0] < a
        assert found.mask.tolist() == mask
        assert found.merged == merged


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_are_asked_for_only_where_they_are_needed(kind, monkeypatch):
    asked = []
    monkeypatch.setattr(
        module, "_masked", lambda *a: asked.append(a) or module.Tokens(a[0], a[0] > 0)
    )
    whole = "<|im_start|>user\nThe a<|im_end|>"
    list(TextTokenizer(made(kind)).tokenize([(whole, [(0, len(whole))])]))
    assert bool(asked) == (kind in ("lowercase", "metaspace", "incomplete"))


def test_texts_are_divided_into_batches():
    assert module._batches([]) == [0]
    assert module._batches([1] * 513) == [0, 512, 513]
    assert module._batches([5_000_000, 1, 3_999_999, 1, 5_000_000]) == [0, 1, 3, 4, 5]
    many = [("The a " * 5, [(0, 3)])] * 600
    assert len({tuple(one.ids) for one in text_tokenizer("plain").tokenize(many)}) == 1


def test_truncation_and_padding_that_somebody_set_are_undone():
    tokenizer = tiny_tokenizer()
    texts = TextTokenizer(tokenizer)
    (before,) = texts.tokenize([("The quick brown fox", None)])
    tokenizer(["The quick", "brown"], truncation=True, max_length=2, padding="max_length")
    (after,) = texts.tokenize([("The quick brown fox", None)])
    assert np.array_equal(before.ids, after.ids)


def test_a_tokenizer_with_its_own_way_is_called():
    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, text, *args, **kwargs):
            return super()._encode_plus(text.replace("a", "b"), *args, **kwargs)

    own = Own(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    (found,) = TextTokenizer(own).tokenize([("a a", [(0, 1)])])
    assert own.decode(found.ids) == "b b"
    assert found.mask.tolist() == [True, False]
