"""Tokens of pieces, one after the other, are the tokens that the library gives of the text."""

import json
import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Metaspace, Sequence, Split

from halfbyte.data import token_cache as module
from halfbyte.data.token_cache import token_cache

# As tokenizer.json files of the families have them, not as our module writes them.
LLAMA3 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}"
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
QWEN3_5 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?[\\p{L}\\p{M}]+|\\p{N}"
    "| ?[^\\s\\p{L}\\p{M}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
GPT_OSS = (
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+"
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+"
    "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\\p{N}{1,3}"
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
TEKKEN = (
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+"
    "|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*"
    "|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
DEEPSEEK = (
    "\\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?"
    "[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
)


def splits(*patterns):
    steps = [Split(Regex(pattern), "isolated") for pattern in patterns]
    return Sequence([*steps, ByteLevel(add_prefix_space=False, use_regex=False)])


GPT2 = ByteLevel(add_prefix_space=False, use_regex=True)
PRE_TOKENIZERS = {
    "gpt2": GPT2,
    "smollm": Sequence([Digits(individual_digits=True), GPT2]),
    "llama3": splits(LLAMA3),
    "qwen2": splits(LLAMA3.replace("{1,3}", "")),
    "qwen3_5": splits(QWEN3_5),
    "gpt_oss": splits(GPT_OSS),
    "tekken": splits(TEKKEN),
    "deepseek": splits(*DEEPSEEK),
    "deepseek, unescaped": splits(*(one.replace("\\r\\n", "\r\n") for one in DEEPSEEK)),
}
SPACES = [" ", "  ", "\n", "\n\n", "\t", "\r\n", "\x1c", "\x85", "\xa0", "\u2003", "\u3000", "\x0b"]
WORDS = [
    *(
        "a",
        "Zq",
        "a.b",
        "f(x)[1]",
        "_",
        "-",
        "'",
        '"',
        "`",
        "x's.y",
        "don't",
        "'S",
        "word",
        "WORD",
        "9",
        "2024",
        ".",
        "...",
        "/",
        "!?",
        "é",
        "e\u0301",
    ),
    *(
        "\u0301",
        "日本",
        "ひら",
        "\x00",
        "\u200d",
        "🙂",
        "_",
        "x=1",
        "<|",
        "<|e|>",
        "<|ex|>",
        "|>",
        "ſ",
    ),
]
TEXTS = st.lists(st.sampled_from(SPACES + WORDS) | st.characters(codec="utf-8"), max_size=12)


def tokenizer_of(name, *, normalizer=None, added=("<|e|>", "<|ex|>")):
    """A tokenizer that merges what it can, so that other pieces would have other tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[name]
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    draw = random.Random(0)
    corpus = ["".join(draw.choices(SPACES + WORDS, k=30)) for _ in range(300)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=ByteLevel.alphabet(), show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens([AddedToken(one, normalized=False, special=True) for one in added])
    return tokenizer


TOKENIZERS = {name: tokenizer_of(name) for name in PRE_TOKENIZERS}
TOKENIZERS["nfc"] = tokenizer_of("qwen2", normalizer=normalizers.NFC())
CACHES = {name: token_cache(one) for name, one in TOKENIZERS.items()}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60)
@given(texts=st.lists(TEXTS.map("".join), min_size=1, max_size=3))
@example(["word.\n word", "a \n\n.\n", "9\n9 9  9\ta", " \x1c a\x1c", "日本 \u0301", ""])
def test_tokens_are_the_librarys(name, texts):
    wanted = [one.ids for one in TOKENIZERS[name].encode_batch(texts, add_special_tokens=False)]
    for _ in range(2):  # the second time, all pieces are known
        ids, starts = CACHES[name].tokenize(texts)
        assert ids.dtype == np.int32
        assert ids.flags.writeable
        found = [ids[a:b].tolist() for a, b in pairwise(starts)]
        assert found == wanted


def test_pieces_are_used_again_and_their_number_is_bounded(monkeypatch):
    calls = []

    class Counting:
        def encode_batch_fast(self, texts, **how):
            calls.append(texts)
            return TOKENIZERS["gpt2"].encode_batch_fast(texts, **how)

    cache = token_cache(TOKENIZERS["gpt2"])
    cache._tokenizer = Counting()
    cache.tokenize(["one two one<|e|> two"])
    cache.tokenize(["one two<|ex|> two", "one"])
    assert calls == [["one<|e|> two<|e|> one"]]
    monkeypatch.setattr(module, "_MOST", 100)
    for start in range(0, 1000, 50):
        text = " ".join(map(str, range(start, start + 50)))
        (ids, _) = cache.tokenize([text])
        assert ids.tolist() == TOKENIZERS["gpt2"].encode(text, add_special_tokens=False).ids
        assert len(cache._known) <= 100
    cache.tokenize(["x" * 49])
    assert "x" * 49 not in cache._known


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        Metaspace(),
        ByteLevel(add_prefix_space=True),
        ByteLevel(add_prefix_space=False, use_regex=False),
        splits("\\p{N}{1,3}"),
        splits("[a-z ]+|\\s+(?!\\S)|\\s+"),
        Sequence([Split(Regex(LLAMA3), "removed"), GPT2]),
        Sequence([Split(Regex(LLAMA3), "isolated", invert=True), GPT2]),
        None,
    ],
)
def test_texts_are_not_divided_for_other_pre_tokenizers(pre_tokenizer):
    tokenizer = tokenizer_of("gpt2")
    assert token_cache(tokenizer) is not None
    if pre_tokenizer is None:
        state = json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}
        tokenizer = Tokenizer.from_str(json.dumps(state))
    else:
        tokenizer.pre_tokenizer = pre_tokenizer
    assert token_cache(tokenizer) is None


@pytest.mark.parametrize(
    "added",
    [
        AddedToken("<r>", rstrip=True),
        AddedToken("<l>", lstrip=True),
        AddedToken("w", single_word=True),
        AddedToken("two words", normalized=False),
        AddedToken("<n>", normalized=True),
    ],
)
def test_texts_are_not_divided_if_added_tokens_look_around(added):
    tokenizer = tokenizer_of("gpt2")
    tokenizer.add_tokens([added])
    assert token_cache(tokenizer) is None


def test_texts_are_not_divided_by_other_normalizers_or_without_a_separator():
    assert token_cache(tokenizer_of("gpt2", normalizer=normalizers.Lowercase())) is None
    assert token_cache(tokenizer_of("gpt2", normalizer=normalizers.Prepend("x"))) is None
    assert token_cache(tokenizer_of("gpt2", added=())) is None
    assert token_cache(tokenizer_of("gpt2", added=("ab", "bc", "ca"))) is None
    dropout = tokenizer_of("gpt2")
    dropout.model.dropout = 0.1
    assert token_cache(dropout) is None
    special = tokenizer_of("gpt2")
    special.encode_special_tokens = True
    assert token_cache(special) is None
