r"""Tokenises texts in pieces, each distinct piece once.

A tokenizer spends most of its time on dividing a text into words and on merging the characters of
each, again and again for the same words. Where a text can be divided so that its tokens are those
of the pieces, a dictionary from pieces to tokens gives the same for a fraction. That is so

- before and after an added token, which is matched before anything else;
- before a space that follows something else than white space, and before white space or a sign,
  except an apostrophe, that follows a letter or a digit of ASCII.

The second holds for the pre-tokenizers in `_PATTERNS`: in none of them can a match go on beyond
such a place, since they have white space at the beginning of a match or in a run of it only, no
signs after letters or digits but the apostrophe of a contraction, and none looks ahead but at the
end of a run of white space.

Pieces that are not known are tokenised by the library: many at once, separated by an added token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer

_MOST = 200_000  # pieces that are kept, some 50 MB
_LONGEST = 48  # characters of a piece that is kept; longer ones hardly come again
_TOGETHER = 32  # pieces between which separators are put, to be tokenised as one text

_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s+(?!\S)|\s+"
_RUNS = rf"|\s*[\r\n]+|{_SPACES}"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_NEITHER = r"[^\r\n\p{L}\p{N}]?"


def _cased(ending: str, digits: str) -> str:
    words = f"{_NEITHER}[{_UPPER}]*[{_LOWER}]+{ending}|{_NEITHER}[{_UPPER}]+[{_LOWER}]*{ending}"
    return rf"{words}|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_RUNS}"


_PATTERNS = frozenset(
    (
        # GPT-2
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        # Llama 3, Qwen 2 and 3, GLM 4
        *(
            rf"{_ENDINGS}|{_NEITHER}\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_RUNS}"
            for digits in ("{1,3}", "")
        ),
        # Qwen 3.5
        rf"{_ENDINGS}|{_NEITHER}[\p{{L}}\p{{M}}]+|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{_RUNS}",
        # gpt-oss, Mistral
        _cased(f"{_ENDINGS}?", "{1,3}"),
        _cased("", ""),
        # DeepSeek 3, in three steps
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
        r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*{_RUNS}",
    )
)

# White space, and what follows it up to a sign behind a letter or a digit; also the white space
# after that, if it begins neither with a space nor behind a letter or a digit. Python's \s has four
# characters more than the tokenizer's; no piece begins with one, unless behind a letter or a digit.
_WORD, _SIGN = "A-Za-z0-9", r"!-&(-/:-@\[-`{-~"
_NO_WORD = rf"[^\s{_WORD}]"
_BODY = rf"(?=\S){_NO_WORD}*[{_WORD}]*(?:[^\s{_WORD}{_SIGN}]{_NO_WORD}*[{_WORD}]*)*"
_GO_ON = rf"(?<![{_WORD}])[^\S ]\s*"
_PIECE = re.compile(rf"\s*{_BODY}(?:{_GO_ON}{_BODY})*(?:{_GO_ON}\Z)?|\s+")


class TokenCache:
    """The tokens of pieces of text."""

    def __init__(self, tokenizer: Tokenizer, added: Mapping[str, int], separator: str) -> None:
        """Begin without pieces; see `token_cache`."""
        self._tokenizer = tokenizer
        self._separator, self._separator_id = separator, added[separator]
        self._added = {text: np.int32(at).tobytes() for text, at in added.items()}
        self._known = dict(self._added)
        longest_first = sorted(added, key=len, reverse=True)
        self._divide = re.compile(f"({'|'.join(map(re.escape, longest_first))})").split

    def tokenize(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the tokens of all texts, int32 [n], and where those of each begin, [texts + 1]."""
        pieces: list[str] = []
        counts = [0]
        for text in texts:
            for at, part in enumerate(self._divide(text)):
                if at % 2:
                    pieces.append(part)  # an added token
                elif part:
                    pieces += _PIECE.findall(part)
            counts.append(len(pieces))
        found = list(map(self._known.get, pieces))
        if None in found:
            places = [at for at, one in enumerate(found) if one is None]
            new = self._tokenized([pieces[at] for at in places])
            for at in places:
                found[at] = new[pieces[at]]
        tokens = cast(list[bytes], found)
        ids = np.frombuffer(bytearray().join(tokens), dtype=np.int32)
        ends = np.cumsum([0, *map(len, tokens)]) // ids.itemsize
        return ids, ends[counts]

    def _tokenized(self, pieces: Sequence[str]) -> dict[str, bytes]:
        """The tokens of pieces that are not known, as bytes of int32."""
        new = list(dict.fromkeys(pieces))
        groups = [new[start : start + _TOGETHER] for start in range(0, len(new), _TOGETHER)]
        texts = [self._separator.join(group) for group in groups]
        tokens: dict[str, bytes] = {}
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for group, encoding in zip(groups, encodings, strict=True):
            ids = np.array(encoding.ids, dtype=np.int32)
            ends = [*np.flatnonzero(ids == self._separator_id).tolist(), len(ids)]
            starts = [0, *(end + 1 for end in ends[:-1])]
            for piece, start, end in zip(group, starts, ends, strict=True):
                tokens[piece] = ids[start:end].tobytes()
        kept = {piece: found for piece, found in tokens.items() if len(piece) <= _LONGEST}
        if len(self._known) + len(kept) > _MOST:
            self._known = dict(self._added)
        self._known |= kept
        return tokens


def token_cache(tokenizer: Tokenizer) -> TokenCache | None:
    """Return a cache for a tokenizer, or None if texts cannot be divided for it."""
    steps = steps_of(tokenizer.pre_tokenizer, "pretokenizers")
    normalizers = [step["type"] for step in steps_of(tokenizer.normalizer, "normalizers")]
    added = tokenizer.get_added_tokens_decoder()
    normalized = {token.normalized for token in added.values()}
    if (
        not all(map(_divides_words, steps))
        or not any(_is_of_words(step) for step in steps)
        or normalizers not in ([], ["NFC"])  # which joins nothing to white space
        or (normalizers and True in normalized)
        or len(normalized) > 1  # those that are, and are not, are looked for one after the other
        or any(map(_looks_around, added.values()))
        or getattr(tokenizer.model, "dropout", None)
        or tokenizer.encode_special_tokens
    ):
        return None
    names = [token.content for token in added.values()]
    separator = next((name for name in names if _is_separator(name, names)), None)
    if separator is None:
        return None
    return TokenCache(tokenizer, {token.content: at for at, token in added.items()}, separator)


def _divides_words(step: dict[str, Any]) -> bool:
    """Whether no match of a pre-tokenizer goes on beyond the places where texts are divided."""
    if step["type"] == "ByteLevel":
        return not step["add_prefix_space"]
    if step["type"] == "Split":
        # Some files have the characters instead of their escapes.
        pattern = str(step["pattern"].get("Regex")).replace("\r", r"\r").replace("\n", r"\n")
        known = pattern in _PATTERNS
        return known and step["behavior"] == "Isolated" and not step["invert"]
    return bool(step["type"] == "Digits")


def _is_of_words(step: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer divides at every such place."""
    if step["type"] == "ByteLevel":
        return bool(step["use_regex"])
    return step["type"] == "Split" and _SPACES in step["pattern"]["Regex"]


def _looks_around(token: AddedToken) -> bool:
    """Whether it depends on its neighbours if an added token is matched, or has white space."""
    return (
        token.lstrip
        or token.rstrip
        or token.single_word
        or [token.content] != token.content.split()
    )


def _is_separator(name: str, names: Sequence[str]) -> bool:
    """Whether no other added token can be matched across its beginning or its end."""
    others = [other for other in names if other != name]
    across = any(name.startswith(other[at:]) for other in others for at in range(1, len(other)))
    return not across and not any(other.startswith(name) for other in others)


def steps_of(component: Any, key: str) -> list[dict[str, Any]]:
    """What a normalizer or a pre-tokenizer of a tokenizer does, step by step.

    Args:
        component: The normalizer or pre-tokenizer, or None.
        key: Under which the JSON of a sequence of them has its steps.
    """
    if component is None:
        return []
    left, steps = [json.loads(component.__getstate__())], []
    while left:
        step = left.pop(0)
        if step["type"] == "Sequence":
            left = step[key] + left
        else:
            steps.append(step)
    return steps
