"""Converts conversations to token ids and masks of the supervised tokens.

The ids are those of transformers' ``apply_chat_template``: the template is rendered by transformers
and its text tokenised without adding special tokens, so BOS is present exactly if the template
writes it. The supervised tokens of an assistant turn are **what the model must generate, given the
prompt rendered at inference**: everything after the rendered prompt, up to and including the token
that ends the turn. The line break that many templates put after that token is not supervised.

Finding these tokens:

1. If a template marks the assistant's text with ``{% generation %}``, its mask is used; if the mask
   ends just before the end-of-turn token, that token is added.
2. Otherwise, for each assistant turn, the messages before it are rendered as a prompt, and again
   with the turn. If the full text starts with both renderings, the turn is the text between their
   ends. If it does not, because the template rewrites earlier turns (for example, drops their
   thinking), the turn is the message's own text, if it is found where it must be. A turn that
   cannot be located reliably is not supervised, and this is logged.

Characters are mapped to tokens by the tokenizer's offsets. A token that merges the end of the
prompt with the start of the reply counts as reply, which is logged too.

With a tokenizer without a chat template, conversations become plain text: one line per message,
each reply ending with EOS, starting with BOS if the tokenizer adds it. A row of plain text is
supervised as a whole, including EOS.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from halfbyte.data.dataset_report import RowRejected, counted
from halfbyte.data.formats import Conversation, Message
from halfbyte.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["assistant", "all"]
Tools = list[Any] | None


@dataclass(frozen=True, eq=False)
class Example:
    """A tokenised row.

    Attributes:
        tokens: int32 [n], the token ids.
        labels_mask: bool [n], true for supervised tokens. Never true for the first token, which
            nothing predicts.
        prompt_length: Tokens before the first supervised one.
    """

    tokens: NDArray[np.int32]
    labels_mask: NDArray[np.bool_]
    prompt_length: int


# Rows that are tokenised together.
_AT_ONCE = 512
_OFFSET_NAMES = ("input_ids", "offset_mapping")
_WITH_OFFSETS: dict[str, Any] = {
    "add_special_tokens": False,
    "return_offsets_mapping": True,
    "return_attention_mask": False,
    "verbose": False,
}


class Encoder:
    """Encodes rows with one tokenizer, and collects messages about it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn = "assistant") -> None:
        self._tokenizer = tokenizer
        self._plain = tokenizer.chat_template is None
        self._train_on = train_on
        self._said: defaultdict[str, list[str]] = defaultdict(list)
        self._ahead: dict[int, tuple[str, Any]] = {}  # by the identity of a row

    def encode_all(self, rows: Sequence[Conversation]) -> Iterator[Example | RowRejected]:
        """Yield each row encoded, or why it is rejected.

        Texts are tokenised in batches, which a fast tokenizer does on all processors.
        """
        for start in range(0, len(rows), _AT_ONCE):
            some = rows[start : start + _AT_ONCE]
            self._tokenize_ahead(some)
            for row in some:
                try:
                    yield self.encode(row)
                except RowRejected as rejection:
                    yield rejection
            self._ahead.clear()

    def _tokenize_ahead(self, rows: Sequence[Conversation]) -> None:
        if self._train_on == "all" or not self._tokenizer.is_fast:
            return
        texts: dict[int, str] = {}
        for row in rows:
            if row.text is None:
                with suppress(RowRejected):  # raised again by `encode`
                    texts[id(row)] = self._render(row.messages, row.tools, prompt=False)
        if texts:
            found = self._tokenizer(list(texts.values()), **_WITH_OFFSETS)
            for i, (key, text) in enumerate(texts.items()):
                self._ahead[key] = text, {name: found[name][i] for name in _OFFSET_NAMES}

    def prompt(self, messages: list[Message], tools: Tools = None) -> list[int]:
        """The token ids of the prompt for ``messages``.

        Raises:
            DataError: The chat template rejects the messages.
        """
        try:
            return self._ids(self._render(messages, tools, prompt=True))
        except RowRejected as error:
            raise DataError(f"The messages cannot be rendered as a prompt: {error}.") from error

    def encode(self, row: Conversation) -> Example:
        """Encodes a row, without truncation.

        Raises:
            RowRejected: The chat template rejects it, or nothing of it can be supervised.
        """
        if row.text is not None:
            tokens = np.array(self._text_ids(row.text), dtype=np.int32)
            mask = np.ones(len(tokens), dtype=np.bool_)
        else:
            tokens, mask = self._conversation(row)
        mask[:1] = False
        return Example(tokens, mask, int(mask.argmax()) if mask.any() else len(mask))

    def notes(self) -> tuple[str, ...]:
        """Messages for the user about how the rows were encoded."""
        notes = [
            f"{note}: {counted(lines)}" if lines else note for note, lines in self._said.items()
        ]
        if self._plain:
            notes.insert(0, "the tokenizer has no chat template: plain text, one line per message")
        return tuple(notes)

    # Rendering

    def _render(self, messages: list[Message], tools: Tools, *, prompt: bool) -> str:
        if self._plain:
            return "".join(self._line(message) for message in messages)
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt
            )
        # A template is a program: besides rejecting messages deliberately, it raises Python's own
        # errors for a message without the keys it expects.
        except (TemplateError, TypeError, ValueError) as error:
            raise RowRejected(f"the chat template rejects it ({error})") from error
        return text

    def _line(self, message: Message) -> str:
        end = self._tokenizer.eos_token if message["role"] == "assistant" else None
        return str(message["content"]) + (end or "\n")

    # Tokens

    @cached_property
    def _leading(self) -> list[int]:
        """The tokens that the tokenizer adds before a text: BOS, or none."""
        whole = self._tokenizer("a").input_ids
        bare = self._tokenizer("a", add_special_tokens=False).input_ids
        starts = range(len(whole) - len(bare) + 1)
        return next((whole[:i] for i in starts if whole[i : i + len(bare)] == bare), [])

    @cached_property
    def control_tokens(self) -> NDArray[np.int32]:
        """Special and added tokens, including every token that ends a turn."""
        added = self._tokenizer.added_tokens_decoder
        ids = {index for index, token in added.items() if token.content.strip()}
        return np.array(sorted(ids | set(self._tokenizer.all_special_ids)), dtype=np.int32)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return [*self._leading, *ids] if self._plain else ids

    def _text_ids(self, text: str) -> list[int]:
        ids = list(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        if ids[: len(self._leading)] != self._leading:
            ids = [*self._leading, *ids]
        end = self._tokenizer.eos_token_id
        if end is None:
            self._said["the tokenizer has no EOS: a model will not learn where a text ends"] = []
        elif ids[-1:] != [end]:
            ids.append(end)
        return ids

    def _conversation(self, row: Conversation) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        text, encoding = self._ahead.get(id(row)) or (
            self._render(row.messages, row.tools, prompt=False),
            None,
        )
        if self._train_on == "all":
            ids = np.array(self._ids(text), dtype=np.int32)
            self._check_bos(ids)
            return ids, np.ones(len(ids), dtype=np.bool_)
        if not self._tokenizer.is_fast:
            raise DataError(
                f"{type(self._tokenizer).__name__} does not map tokens to characters, so the "
                "assistant's tokens cannot be found: use a fast tokenizer (tokenizer.json), or "
                "train on all tokens (train_on: all)."
            )
        encoding = encoding or self._tokenizer(text, **_WITH_OFFSETS)
        ids = np.array(encoding["input_ids"], dtype=np.int32)
        offsets = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(len(ids), 2)
        mask = self._marked(row, ids)
        if mask is None:
            mask = np.zeros(len(ids), dtype=np.bool_)
            for start, end in self._spans(row, text):
                mask |= self._turn(ids, offsets, start, end, row)
        if not mask.any():
            raise RowRejected("no assistant turn could be located in the rendered template")
        if self._plain:
            ids = np.concatenate([np.array(self._leading, dtype=np.int32), ids])
            mask = np.concatenate([np.zeros(len(self._leading), dtype=np.bool_), mask])
        self._check_bos(ids)
        return ids, mask

    def _check_bos(self, ids: NDArray[np.int32]) -> None:
        bos = self._leading[:1]
        if bos and ids[:1].tolist() != bos:
            note = "the chat template writes no BOS though the tokenizer would; none is added"
            self._said[note] = []
        elif bos and ids[:2].tolist() == bos * 2:
            self._said["the chat template itself writes BOS twice; left as it is"] = []

    # Finding the assistant's turns

    def _marked(self, row: Conversation, ids: NDArray[np.int32]) -> NDArray[np.bool_] | None:
        """The mask from a template with ``{% generation %}``; None if it has no such mark."""
        replies = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
        if self._plain or not all(row.learns(index) for index in replies):
            return None
        template = self._tokenizer.get_chat_template(None, row.tools)
        if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
            return None
        encoding = self._tokenizer.apply_chat_template(
            row.messages,
            tools=row.tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
        mask = np.array(encoding["assistant_masks"], dtype=np.bool_)
        control = np.isin(ids, self.control_tokens)
        after = np.flatnonzero(mask[:-1] & ~mask[1:]) + 1
        mask[after[control[after] & ~control[after - 1]]] = True
        return mask if mask.any() else None

    def _spans(self, row: Conversation, text: str) -> list[tuple[int, int]]:
        """The spans of the assistant's turns in ``text`` that can be located reliably."""
        spans = []
        for index in filter(row.learns, range(len(row.messages))):
            span = self._span(row, index, text)
            if span is None:
                self._say("a reply that cannot be located in the rendered text is ignored", row)
            else:
                spans.append(span)
        return spans

    def _span(self, row: Conversation, index: int, text: str) -> tuple[int, int] | None:
        earlier, words = row.messages[:index], str(row.messages[index]["content"]).strip()
        try:
            before = self._render(earlier, row.tools, prompt=True)
            until = text
            if index + 1 < len(row.messages):
                until = self._render(row.messages[: index + 1], row.tools, prompt=False)
            if text.startswith(before):
                start = len(before)
            else:
                bare = self._render(earlier, row.tools, prompt=False)
                at = text.find(words, len(bare))
                if not text.startswith(bare) or not words or at < 0:
                    return None
                self._say("the prompt rendered at inference ends differently than in training", row)
                start = min(_shared(before, text), at)
        except RowRejected:
            return None
        if text.startswith(until) and len(until) > start:
            return start, len(until)
        at = text.rfind(words, start, max(_shared(until, text), start))
        if at < 0 and text[start:].lstrip().startswith(words):
            at = text.index(words, start)
        return (start, at + len(words)) if words and at >= 0 else None

    def _turn(
        self,
        ids: NDArray[np.int32],
        offsets: NDArray[np.int64],
        start: int,
        end: int,
        row: Conversation,
    ) -> NDArray[np.bool_]:
        """The mask of one turn: its tokens, up to and including the one that ends it."""
        mask = (offsets[:, 0] < end) & (offsets[:, 1] > start)
        within = np.flatnonzero(mask)
        if not within.size:
            return mask
        first, last = int(within[0]), int(within[-1])
        if offsets[first, 0] < start:
            self._say("a token merges the prompt's end with the reply's start", row)
        closing = within[np.isin(ids[within], self.control_tokens)]
        if closing.size and closing[-1] > first:
            mask[closing[-1] + 1 :] = False
        elif last + 1 < len(ids) and ids[last + 1] in self.control_tokens:
            mask[last + 1] = True
        else:
            self._say("no token ends the reply: the model will not learn to stop", row)
        return mask

    def _say(self, note: str, row: Conversation) -> None:
        if row.line not in self._said[note]:
            self._said[note].append(row.line)


def _shared(one: str, other: str) -> int:
    """Length of the common prefix."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Tools = None
) -> list[int]:
    """The token ids of a prompt, as rendered before the reply in training.

    Raises:
        DataError: The chat template rejects the messages.
    """
    return Encoder(tokenizer).prompt(messages, tools)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends a reply, at which generation must stop; None if there is none.

    It is not always the tokenizer's EOS: many chat templates end turns with another token.

    Raises:
        DataError: The tokenizer is not a fast one.
    """
    probe: list[Message] = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello"},
    ]
    encoder = Encoder(tokenizer)
    try:
        example = encoder.encode(Conversation("1", probe))
    except RowRejected:
        return None
    last = int(example.tokens[np.flatnonzero(example.labels_mask)[-1]])
    return last if last in encoder.control_tokens else None
