"""Converts conversations to token ids and masks of the supervised tokens.

The ids are those of transformers' ``apply_chat_template``: the template's text (`rendering`) is
tokenised without adding special tokens, so BOS is present exactly if the template writes it. The
supervised tokens of an assistant turn are **what the model must generate, given the prompt rendered
at inference**: everything after the rendered prompt, up to and including the token that ends the
turn (`turns`). The line break that many templates put after that token is not supervised.

If a template marks the assistant's text with ``{% generation %}``, and all replies are supervised,
its mask is used, but made to end with the token that ends the turn if that is near.

A row is rejected if none of its replies can be supervised, or if the template drops the tool calls
of one that should be. Whatever else a template drops, adds or changes is said in a note.

Characters are mapped to tokens by the tokenizer's offsets. A token that merges the end of the
prompt with the start of the reply counts as reply, which is noted too.

With a tokenizer without a chat template, conversations become plain text: one line per message,
each reply ending with EOS, starting with BOS if the tokenizer adds it. A row of plain text is
supervised as a whole, including EOS.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.dataset_report import RowRejected, counted
from halfbyte.data.formats import Conversation, Message
from halfbyte.data.rendering import Chat, Renderer, Tools
from halfbyte.data.template_effects import (
    CONTENT,
    TOOL_CALLS,
    Losses,
    Lost,
    added_text,
    losses_of_text,
)
from halfbyte.data.turns import Controls, TurnEnds, find_ends, find_turn
from halfbyte.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["assistant", "all"]


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
        self._renderer = Renderer(tokenizer)
        self._losses = Losses()
        self._said: defaultdict[str, dict[str, None]] = defaultdict(
            dict
        )  # in order, without repeats
        # By the identity of a row
        self._ahead: dict[int, tuple[_Rendered, Any]] = {}
        self._rejected: dict[int, RowRejected] = {}

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
            self._rejected.clear()

    def _tokenize_ahead(self, rows: Sequence[Conversation]) -> None:
        if self._train_on == "all" or not self._tokenizer.is_fast:
            return
        rendered: dict[int, _Rendered] = {}
        for row in rows:
            if row.text is None:
                try:
                    rendered[id(row)] = self._render(row)
                except RowRejected as rejection:
                    self._rejected[id(row)] = rejection
        if rendered:
            found = self._tokenizer([one.text for one in rendered.values()], **_WITH_OFFSETS)
            for i, (key, one) in enumerate(rendered.items()):
                self._ahead[key] = one, {name: found[name][i] for name in _OFFSET_NAMES}

    def prompt(self, messages: list[Message], tools: Tools = None) -> list[int]:
        """The token ids of the prompt for ``messages``.

        Raises:
            DataError: The chat template is not valid, or rejects the messages.
        """
        if self._plain:
            return self._ids("".join(map(self._line, messages)))
        try:
            chat, _ = self._renderer.conversation(messages, tools)
            return self._ids(chat.text(len(messages), prompt=True))
        except RowRejected as error:
            raise DataError(f"The messages cannot be rendered as a prompt: {error}.") from error

    def encode(self, row: Conversation) -> Example:
        """Encodes a row, without truncation.

        Raises:
            RowRejected: The chat template rejects it, or nothing of it can be supervised.
            DataError: The chat template is not valid, or the tokenizer cannot be used for it.
        """
        if id(row) in self._rejected:
            raise self._rejected[id(row)]
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
            f"{note}: {counted(list(lines))}" if lines else note
            for note, lines in self._said.items()
        ]
        if self._plain:
            notes.insert(0, "the tokenizer has no chat template: plain text, one line per message")
        return tuple(notes)

    # Rendering

    def _render(self, row: Conversation) -> _Rendered:
        if self._plain:
            self._check_losses(row, losses_of_text(row.messages, row.tools))
            return _Rendered(None, "".join(map(self._line, row.messages)))
        chat, converted = self._renderer.conversation(row.messages, row.tools)
        rendered = _Rendered(chat, chat.text())
        self._check_losses(row, self._losses.of(chat))
        if converted:
            self._say(
                "arguments of tool calls are given to the chat template as it needs them", row
            )
        if self._added and not any(message["role"] == "system" for message in row.messages):
            self._say(
                f"the chat template adds to rows without a system prompt: {self._added!r}", row
            )
        if "strftime_now" in chat.source:
            self._said["the chat template writes today's date: tokens differ from day to day"] = {}
        return rendered

    def _line(self, message: Message) -> str:
        end = self._tokenizer.eos_token if message["role"] == "assistant" else None
        return str(message["content"]) + (end or "\n")

    def _check_losses(self, row: Conversation, losses: Iterable[Lost]) -> None:
        """Note what is dropped of a row.

        Raises:
            RowRejected: It is tool calls that should be learned.
        """
        for index, what in losses:
            if index < 0:
                self._say(f"the chat template drops the {what}", row)
            elif what == TOOL_CALLS and row.learns(index):
                raise RowRejected("the chat template drops the tool calls of a reply")
            else:
                role = row.messages[index]["role"]
                self._say(f"the chat template drops the {what} of a message of the {role}", row)

    @cached_property
    def _added(self) -> str:
        return added_text(self._renderer, self._controls)

    # Tokens

    @cached_property
    def _leading(self) -> list[int]:
        """The tokens that the tokenizer adds before a text: BOS, or none."""
        whole = self._tokenizer("a").input_ids
        bare = self._tokenizer("a", add_special_tokens=False).input_ids
        starts = range(len(whole) - len(bare) + 1)
        return next((whole[:i] for i in starts if whole[i : i + len(bare)] == bare), [])

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return [*self._leading, *ids] if self._plain else ids

    def _text_ids(self, text: str) -> list[int]:
        ids = list(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        if ids[: len(self._leading)] != self._leading:
            ids = [*self._leading, *ids]
        end = self._tokenizer.eos_token_id
        if end is None:
            self._said["the tokenizer has no EOS: a model will not learn where a text ends"] = {}
        elif ids[-1:] != [end]:
            ids.append(end)
        return ids

    def _conversation(self, row: Conversation) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        rendered, encoding = self._ahead.get(id(row)) or (self._render(row), None)
        text = rendered.text
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
        mask = np.zeros(len(ids), dtype=np.bool_)
        for start, stop in self._spans(row, rendered):
            turn = (offsets[:, 0] < stop) & (offsets[:, 1] > start)
            if turn.any() and offsets[turn.argmax(), 0] < start:
                self._say("a token merges the prompt's end with the reply's start", row)
            mask |= turn
        if self._plain:
            ids = np.concatenate([np.array(self._leading, dtype=np.int32), ids])
            mask = np.concatenate([np.zeros(len(self._leading), dtype=np.bool_), mask])
        self._check_bos(ids)
        return ids, mask

    def _check_bos(self, ids: NDArray[np.int32]) -> None:
        bos = self._leading[:1]
        if bos and ids[:1].tolist() != bos:
            note = "the chat template writes no BOS though the tokenizer would; none is added"
            self._said[note] = {}
        elif bos and ids[:2].tolist() == bos * 2:
            self._said["the chat template itself writes BOS twice; left as it is"] = {}

    # The assistant's turns

    @cached_property
    def _controls(self) -> Controls:
        """Matches control tokens, the longer of two first."""
        added = [token.content for token in self._tokenizer.added_tokens_decoder.values()]
        texts = {text for text in added + self._tokenizer.all_special_tokens if text.strip()}
        return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")

    @cached_property
    def ends(self) -> TurnEnds:
        """How the replies of the chat template end."""
        if self._plain:
            eos = self._tokenizer.eos_token
            return TurnEnds(tokens=(str(eos),) if eos else ())
        return find_ends(self._renderer, self._controls)

    def _spans(self, row: Conversation, rendered: _Rendered) -> list[tuple[int, int]]:
        """The supervised characters of a row.

        Raises:
            RowRejected: There are none.
        """
        replies = [index for index in range(len(row.messages)) if row.learns(index)]
        if not replies:
            raise RowRejected("no assistant turn to learn")
        if rendered.chat is None:
            return self._lines(row, replies)
        marked = rendered.chat.whole[1]
        if marked and len(replies) == sum(m["role"] == "assistant" for m in row.messages):
            return [self._with_end(span, rendered.text) for span in marked]
        losses = self._losses.of(rendered.chat)
        spans, reasons = [], []
        for index in replies:
            try:
                turn = find_turn(rendered.chat, index, self.ends, self._controls)
            except RowRejected as rejection:
                reasons.append(str(rejection))
                continue
            for note in turn.notes:
                self._say(note, row)
            spans.append((turn.start, turn.stop))
            written = rendered.text[turn.start : turn.stop]
            if (index, CONTENT) not in losses and not _contains(
                written, row.messages[index]["content"]
            ):
                self._say("the chat template changes the text of a reply", row)
        if not spans:
            raise RowRejected(f"no reply can be supervised: {reasons[0]}")
        for reason in reasons:
            self._say(f"a reply is not supervised: {reason}", row)
        return spans

    def _lines(self, row: Conversation, replies: list[int]) -> list[tuple[int, int]]:
        """The replies in plain text."""
        ends = np.cumsum([len(self._line(message)) for message in row.messages]).tolist()
        return [(ends[index - 1] if index else 0, ends[index]) for index in replies]

    def _with_end(self, span: tuple[int, int], text: str) -> tuple[int, int]:
        """A span that the template marks, up to and with the token that ends the turn."""
        start, stop = span
        end, ended = self.ends.locate(text[:stop], self._controls)
        if start < end < ended:
            return start, ended
        following = self._controls.match(text, stop)
        is_end = following is not None and following[0] in self.ends.tokens
        return (start, following.end()) if following and is_end else span

    def _say(self, note: str, row: Conversation) -> None:
        self._said[note][row.line] = None


@dataclass(frozen=True)
class _Rendered:
    """A row as text; ``chat`` is None without a chat template."""

    chat: Chat | None
    text: str


def _contains(text: str, content: object) -> bool:
    """Whether the text has the content of a message, up to whitespace."""
    words = str(content or "").strip()
    return words in text or "".join(words.split()) in "".join(text.split())


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Tools = None
) -> list[int]:
    """The token ids of a prompt, as rendered before the reply in training.

    Raises:
        DataError: The chat template rejects the messages.
    """
    return Encoder(tokenizer).prompt(messages, tools)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a reply, at which generation must stop; none if nothing ends it.

    They are not always the tokenizer's EOS: many chat templates end turns with another token, and
    some end a turn that calls a tool with yet another.

    Raises:
        DataError: The chat template is not valid.
    """
    tokens = Encoder(tokenizer).ends.tokens
    return tuple(int(tokenizer.convert_tokens_to_ids(token)) for token in tokens)
