"""Tokenises texts, and finds the tokens of their spans.

A span is given in characters. Which tokens it has is defined by the offsets that the tokenizer
gives: a token belongs to a span if it overlaps with it. But offsets cost a fast tokenizer some time
and Python much more, so they are computed from the tokens where that is exact: byte-level BPE
writes every byte of a text, in order, as a part of one token, so tokens have the lengths of their
names (`_ByteLengths`). A text gets offsets if

- its tokens do not have as many bytes as the text: an added token took white space beside it;
- its normalizer would change it;
- a span does not begin and end between two tokens;
- the last token of a span is white space, which offsets may leave out.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers

from halfbyte.data.token_cache import TokenCache, steps_of, token_cache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Spans = Sequence[tuple[int, int]]
"""Where in a text the supervised characters start and stop."""

_BATCH = 512  # texts that are tokenised together,
_BATCH_CHARACTERS = 4_000_000  # unless they are longer than this
_FEW = 20_000  # tokens, for which it would take longer to look up the lengths of all there are
_SPACE = "Ġ"  # a space in the names of byte-level tokens
_PLAIN: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
_WITH_OFFSETS = _PLAIN | {"return_offsets_mapping": True, "return_attention_mask": False}


class Tokens(NamedTuple):
    """The tokens of a text.

    Attributes:
        ids: int32 [n].
        mask: bool [n], true for tokens of the spans; for all tokens if the text has no spans.
        merged: Whether a token overlaps with the beginning of a span, but begins before it.
    """

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    merged: bool = False


class TextTokenizer:
    """Tokenises texts with a tokenizer of transformers, without adding special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def tokenize(self, texts: Sequence[tuple[str, Spans | None]]) -> Iterator[Tokens]:
        """Yield the tokens of each text, which has these spans.

        A fast tokenizer tokenises a batch of texts on all cores.
        """
        for start, stop in pairwise(_batches([len(text) for text, _ in texts])):
            batch = texts[start:stop]
            yield from self._tokenize([text for text, _ in batch], [spans for _, spans in batch])

    def _tokenize(self, texts: list[str], spans: list[Spans | None]) -> list[Tokens]:
        backend = self._backend
        if backend is None:
            return [self._by_call(*one) for one in zip(texts, spans, strict=True)]
        if backend.truncation is not None or backend.padding is not None:
            self._reset()
        ids, starts = self._cache.tokenize(texts) if self._cache else _by_batch(backend, texts)
        mask = np.ones(len(ids), dtype=np.bool_)
        wanted = [at for at, one in enumerate(spans) if one is not None]
        found: set[int] = set()
        if len(ids) > _FEW and self._lengths is not None:
            found = self._lengths.mask(texts, spans, wanted, ids, starts, mask)
        left = [at for at in wanted if at not in found]
        tokens = [Tokens(ids[a:b], mask[a:b]) for a, b in pairwise(starts.tolist())]
        if left:
            encodings = backend.encode_batch([texts[at] for at in left], add_special_tokens=False)
            for at, encoding in zip(left, encodings, strict=True):
                tokens[at] = _masked(tokens[at].ids, encoding.offsets, spans[at] or ())
        return tokens

    def _by_call(self, text: str, spans: Spans | None) -> Tokens:
        """The same through transformers, for tokenizers of other kinds."""
        if spans is None:
            ids = np.array(self._tokenizer(text, **_PLAIN).input_ids, dtype=np.int32)
            return Tokens(ids, np.ones(len(ids), dtype=np.bool_))
        found = self._tokenizer(text, **_WITH_OFFSETS)
        return _masked(np.array(found.input_ids, dtype=np.int32), found.offset_mapping, spans)

    @cached_property
    def _backend(self) -> Tokenizer | None:
        """The tokenizer as transformers calls it, if that is all that transformers does."""
        from transformers import PreTrainedTokenizerFast

        kind = type(self._tokenizer)
        if not self._tokenizer.is_fast or any(
            getattr(kind, name) is not getattr(PreTrainedTokenizerFast, name)
            for name in ("__call__", "_encode_plus")
        ):
            return None
        self._reset()
        backend: Tokenizer = self._tokenizer.backend_tokenizer
        return backend

    def _reset(self) -> None:
        """Have transformers set what it sets before it tokenises: no truncation, no padding."""
        self._tokenizer("a", **_PLAIN)

    @cached_property
    def _cache(self) -> TokenCache | None:
        return None if self._backend is None else token_cache(self._backend)

    @cached_property
    def _lengths(self) -> _ByteLengths | None:
        backend = self._backend
        return _ByteLengths(backend) if backend is not None and _is_byte_level(backend) else None


def _batches(lengths: Sequence[int]) -> list[int]:
    """Where batches of texts with these lengths begin, and the number of texts."""
    starts, texts, characters = [0], 0, 0
    for at, length in enumerate(lengths):
        if texts and (texts == _BATCH or characters + length > _BATCH_CHARACTERS):
            starts.append(at)
            texts = characters = 0
        texts, characters = texts + 1, characters + length
    return [*starts, len(lengths)] if lengths else [0]


def _by_batch(
    tokenizer: Tokenizer, texts: list[str]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The tokens of all texts, and where those of each begin."""
    ids, starts = array("i"), [0]
    for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
        ids.fromlist(encoding.ids)
        starts.append(len(ids))
    return np.frombuffer(ids, dtype=np.int32), np.array(starts)


def _masked(ids: NDArray[np.int32], offsets: Sequence[tuple[int, int]], spans: Spans) -> Tokens:
    """The definition: tokens of a span are those that overlap with it."""
    where = np.array(offsets, dtype=np.int64).reshape(len(ids), 2)
    mask, merged = np.zeros(len(ids), dtype=np.bool_), False
    for start, stop in spans:
        inside = (where[:, 0] < stop) & (where[:, 1] > start)
        merged |= bool(inside.any() and where[inside.argmax(), 0] < start)
        mask |= inside
    return Tokens(ids, mask, merged)


class _ByteLengths:
    """The lengths of the tokens of a byte-level tokenizer, in bytes of text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        names = tokenizer.get_vocab()
        added = tokenizer.get_added_tokens_decoder()
        size = max([*names.values(), *added], default=-1) + 1
        self._bytes = np.zeros(size, dtype=np.int64)
        self._is_space = np.zeros(size, dtype=np.bool_)
        for name, at in names.items():
            self._bytes[at] = len(name)
            self._is_space[at] = not name.strip(_SPACE)
        for at, token in added.items():
            self._bytes[at] = len(token.content.encode())
            self._is_space[at] = not token.content.replace(_SPACE, " ").strip()
        self._normalizer = tokenizer.normalizer

    def mask(
        self,
        texts: Sequence[str],
        spans: Sequence[Spans | None],
        wanted: Sequence[int],
        ids: NDArray[np.int32],
        starts: NDArray[np.int64],
        mask: NDArray[np.bool_],
    ) -> set[int]:
        """Set the mask of the tokens of texts, where that is exact.

        Args:
            texts: The texts.
            spans: The spans of each.
            wanted: The texts that have spans.
            ids: int32 [n], the tokens of all texts.
            starts: int64 [texts + 1], where the tokens of each text begin.
            mask: bool [n].

        Returns:
            The texts for which it was.
        """
        ends = np.concatenate([[0], np.cumsum(self._bytes[ids])])
        of_text: list[int] = []  # for each span its text, and its first and last byte in that
        first: list[int] = []
        last: list[int] = []
        exact: list[int] = []
        for at in wanted:
            text = texts[at]
            size = _bytes(text)
            covered = int(ends[starts[at + 1]] - ends[starts[at]]) == size
            if covered and self._is_normal(text, size):
                exact.append(at)
                for start, stop in spans[at] or ():
                    of_text.append(at)
                    ascii_only = size == len(text)
                    first.append(start if ascii_only else _bytes(text[:start]))
                    last.append(stop if ascii_only else _bytes(text[:stop]))
        texts_of_spans = np.array(of_text, dtype=np.int64)
        base = ends[starts[texts_of_spans]]
        begin, end = base + np.array(first, dtype=np.int64), base + np.array(last, dtype=np.int64)
        from_token, to_token = np.searchsorted(ends, begin), np.searchsorted(ends, end)
        inexact = (ends[from_token] != begin) | (ends[to_token] != end)
        if len(ids):
            inexact |= self._is_space[ids[to_token - 1]] & (to_token > from_token)
        found = set(exact) - set(texts_of_spans[inexact].tolist())
        for at in found:
            mask[starts[at] : starts[at + 1]] = False
        spans_of_tokens = zip(of_text, from_token.tolist(), to_token.tolist(), strict=True)
        for at, start, stop in spans_of_tokens:
            if at in found:
                mask[start:stop] = True
        return found

    def _is_normal(self, text: str, size: int) -> bool:
        """Whether the normalizer, NFC or none, would leave the text as it is."""
        if self._normalizer is None or size == len(text):
            return True
        return bool(self._normalizer.normalize_str(text) == text)


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether every byte of a normalised text is a part of one token, and of its name."""
    model = tokenizer.model
    if not isinstance(model, models.BPE) or model.dropout or model.byte_fallback:
        return False
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    if any(step["type"] != "NFC" for step in steps_of(tokenizer.normalizer, "normalizers")):
        return False
    steps = steps_of(tokenizer.pre_tokenizer, "pretokenizers")
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return False
    if not all(_keeps_text(step) for step in steps[:-1]):  # so there is no other ByteLevel
        return False
    if model.unk_token is None:
        return True  # bytes without a token are left out, which is noticed
    vocabulary = tokenizer.get_vocab()
    return all(byte in vocabulary for byte in pre_tokenizers.ByteLevel.alphabet())


def _keeps_text(step: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer only divides."""
    divides = step["type"] in ("Split", "Punctuation") and step["behavior"] != "Removed"
    return bool(divides or step["type"] == "Digits")
