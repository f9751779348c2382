"""Converts conversations to token ids and masks of the supervised tokens.

The ids are those of transformers' ``apply_chat_template``: the template's text (`rendering`) is
tokenised without adding special tokens, so BOS is present exactly if the template writes it. The
supervised tokens of an assistant turn are **what the model must generate, given the prompt rendered
at inference**: everything after the rendered prompt, up to and including the token that ends the
turn (`turns`). The line break that many templates put after that token is not supervised.

Usually a row becomes one example. If the template renders earlier replies otherwise than at
inference, it becomes several: the text of the whole conversation, and texts that end with an
earlier reply, so that each reply is supervised in exactly one of them.

If a template marks the assistant's text with ``{% generation %}``, and all replies are supervised,
its mask is used, but made to end with the token that ends the turn if that is near.

A row is rejected if none of its replies can be supervised, or if the template drops the tool calls
of one that should be. Whatever else a template drops, adds or changes is said in a note.

Characters are mapped to tokens as by the tokenizer's offsets (`tokens`). A token that merges the
end of the prompt with the start of the reply counts as reply, which is noted too.

With a tokenizer without a chat template, conversations become plain text: one line per message,
each reply ending with EOS, starting with BOS if the tokenizer adds it. A row of plain text is
supervised as a whole, including EOS.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.dataset_report import Notes, RowRejected, described_notes
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
from halfbyte.data.tokens import Spans, TextTokenizer, Tokens
from halfbyte.data.turns import Controls, Part, TurnEnds, find_ends, find_parts
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


class Encoded(NamedTuple):
    """An example and the conversation that it is: a row, or a row up to one of its replies."""

    row: Conversation
    example: Example


@dataclass(frozen=True)
class Text:
    """A text that becomes an example, and its supervised characters; None: all tokens are."""

    row: Conversation
    text: str
    spans: Spans | None = None


_AT_ONCE = 512  # rows that are rendered before their texts are tokenised


class Encoder:
    """Encodes rows with one tokenizer, and collects messages about it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn = "assistant") -> None:
        self._tokenizer = tokenizer
        self._plain = tokenizer.chat_template is None
        self._train_on = train_on
        self._renderer = Renderer(tokenizer)
        self._tokens = TextTokenizer(tokenizer)
        self._losses = Losses()
        self._said = Notes()
        self._exceeded = 0

    def encode(self, row: Conversation) -> list[Encoded]:
        """Encode a row, without truncation, as one example or several, the shortest first.

        Raises:
            RowRejected: The chat template rejects it, or nothing of it can be supervised.
            DataError: The chat template is not valid, or the tokenizer cannot be used for it.
        """
        (found,) = self.encode_all([row])
        if isinstance(found, RowRejected):
            raise found
        return found

    def encode_all(self, rows: Sequence[Conversation]) -> Iterator[list[Encoded] | RowRejected]:
        """Yield each row encoded, or why it is rejected.

        Texts are tokenised in batches, which a fast tokenizer does on all processors.

        Raises:
            DataError: As ``encode``.
        """
        for start in range(0, len(rows), _AT_ONCE):
            found = [self._texts_or_rejection(row) for row in rows[start : start + _AT_ONCE]]
            accepted = [texts for texts in found if not isinstance(texts, RowRejected)]
            tokens = self._tokens.tokenize(
                [(one.text, one.spans) for texts in accepted for one in texts]
            )
            for texts in found:
                if isinstance(texts, RowRejected):
                    yield texts
                else:
                    yield [Encoded(one.row, self._example(one, next(tokens))) for one in texts]

    def _texts_or_rejection(self, row: Conversation) -> list[Text] | RowRejected:
        try:
            return self.texts(row)
        except RowRejected as rejection:
            return rejection

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

    def notes(self) -> tuple[str, ...]:
        """Messages for the user about how the rows were encoded."""
        said = self._said
        return described([*said.texts.items(), *said.tokens.items()], self._tokenizer)

    def take_notes(self) -> Notes:
        """The notes about the rows since the last call, with their lines."""
        said, self._said = self._said, Notes()
        return said

    def take_exceeded(self) -> int:
        """How many renderings exceeded a limit of the sandbox since the last call."""
        before, self._exceeded = self._exceeded, self._renderer.exceeded
        return self._exceeded - before

    # Rendering

    def texts(self, row: Conversation) -> list[Text]:
        """The texts that become examples, the shortest first.

        Raises:
            RowRejected: There are none.
        """
        if row.text is not None:
            return [Text(row, row.text)]
        replies = [index for index in range(len(row.messages)) if row.learns(index)]
        if self._train_on == "assistant":
            self._check_offsets()
            if not replies:
                raise RowRejected("no assistant turn to learn")
        if self._plain:
            return [self._plain_text(row, replies)]
        chat, converted = self._renderer.conversation(row.messages, row.tools)
        whole = self._whole_text(row, chat, replies)
        wanted = [] if whole else replies
        parts, reasons = find_parts(chat, wanted, self.ends, self._controls)
        self._check_losses(row, self._losses_in(chat, parts))
        self._note_additions(row, chat, converted)
        if whole:
            return [whole]
        if not parts:
            raise RowRejected(f"no reply can be supervised: {reasons[0]}")
        for reason in reasons:
            self._say(f"a reply is not supervised: {reason}", row)
        return [self._supervised_text(row, part) for part in parts]

    def _whole_text(self, row: Conversation, chat: Chat, replies: list[int]) -> Text | None:
        """The text of all messages, if replies need not be looked for in it."""
        text = chat.text()
        if self._train_on == "all":
            return Text(row, text)
        assistants = sum(message["role"] == "assistant" for message in row.messages)
        if chat.marked and len(replies) == assistants:
            return Text(row, text, [self._with_end(span, text) for span in chat.marked])
        return None

    def _plain_text(self, row: Conversation, replies: list[int]) -> Text:
        self._check_losses(row, losses_of_text(row.messages, row.tools))
        lines = [self._line(message) for message in row.messages]
        if self._train_on == "all":
            return Text(row, "".join(lines))
        ends = [0, *np.cumsum([len(line) for line in lines]).tolist()]
        return Text(row, "".join(lines), [(ends[index], ends[index + 1]) for index in replies])

    def _supervised_text(self, row: Conversation, part: Part) -> Text:
        text, losses = part.chat.text(), self._losses.of(part.chat)
        for index, turn in part.turns.items():
            for note in turn.notes:
                self._say(note, row)
            written, content = text[turn.start : turn.stop], row.messages[index]["content"]
            if (index, CONTENT) not in losses and not _contains(written, content):
                self._say("the chat template changes the text of a reply", row)
        spans = [(turn.start, turn.stop) for turn in part.turns.values()]
        return Text(row.up_to(len(part.chat.messages)), text, spans)

    def _losses_in(self, chat: Chat, parts: Sequence[Part]) -> Iterator[Lost]:
        """What is dropped of each reply where it is supervised, and of the rest in the whole."""
        supervised = {index for part in parts for index in part.turns}
        yield from (lost for lost in self._losses.of(chat) if lost[0] not in supervised)
        for part in parts:
            yield from (lost for lost in self._losses.of(part.chat) if lost[0] in part.turns)

    def _note_additions(self, row: Conversation, chat: Chat, converted: bool) -> None:
        if converted:
            self._say(
                "arguments of tool calls are given to the chat template as it needs them", row
            )
        if self._added and not any(message["role"] == "system" for message in row.messages):
            self._say(
                f"the chat template adds to rows without a system prompt: {self._added!r}", row
            )
        if "strftime_now" in chat.source:
            note = "the chat template writes today's date: tokens differ from day to day"
            self._said.texts[note] = {}

    def _line(self, message: Message) -> str:
        end = self._tokenizer.eos_token if message["role"] == "assistant" else None
        return str(message["content"]) + (end or "\n")

    def _check_losses(self, row: Conversation, losses: Iterable[Lost]) -> None:
        """Note what is dropped of a row.

        Raises:
            RowRejected: It is tool calls that should be learned.
        """
        writer = "plain text" if self._plain else "the chat template"
        for index, what in losses:
            if index < 0:
                self._say(f"{writer} drops the {what}", row)
            elif what == TOOL_CALLS and row.learns(index):
                raise RowRejected(f"{writer} drops the tool calls of a reply")
            else:
                role = row.messages[index]["role"]
                self._say(f"{writer} drops the {what} of a message of the {role}", row)

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

    def _with_bos_and_eos(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        before = [] if ids[: len(self._leading)].tolist() == self._leading else self._leading
        end = self._tokenizer.eos_token_id
        if end is None:
            note = "the tokenizer has no EOS: a model will not learn where a text ends"
            self._said.tokens[note] = {}
        after = [] if end is None or [*before, *ids[-1:].tolist()][-1:] == [end] else [end]
        if not before and not after:
            return ids
        return np.concatenate([np.array(part, dtype=np.int32) for part in (before, ids, after)])

    def _check_offsets(self) -> None:
        if not self._tokenizer.is_fast:
            raise DataError(
                f"{type(self._tokenizer).__name__} does not map tokens to characters, so the "
                "assistant's tokens cannot be found: use a fast tokenizer (tokenizer.json), or "
                "train on all tokens (train_on: all)."
            )

    def _example(self, one: Text, found: Tokens) -> Example:
        ids, mask = found.ids, found.mask
        if found.merged:
            note = "a token merges the prompt's end with the reply's start"
            self._said.tokens.setdefault(note, {})[one.row.line] = None
        if one.row.text is not None:
            ids = self._with_bos_and_eos(ids)
            mask = np.ones(len(ids), dtype=np.bool_)
        else:
            if self._plain and self._leading:
                ids = np.concatenate([np.array(self._leading, dtype=np.int32), ids])
                mask = np.concatenate([np.full(len(self._leading), one.spans is None), mask])
            self._check_bos(ids)
        mask[:1] = False
        return Example(ids, mask, int(mask.argmax()) if mask.any() else len(mask))

    def _check_bos(self, ids: NDArray[np.int32]) -> None:
        bos = self._leading[:1]
        if bos and ids[:1].tolist() != bos:
            note = "the chat template writes no BOS though the tokenizer would; none is added"
            self._said.tokens[note] = {}
        elif bos and ids[:2].tolist() == bos * 2:
            self._said.tokens["the chat template itself writes BOS twice; left as it is"] = {}

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
        self._said.texts.setdefault(note, {})[row.line] = None


def described(
    notes: Iterable[tuple[str, Iterable[str]]], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, ...]:
    """Messages for the user about how rows were encoded with a tokenizer."""
    if tokenizer.chat_template is not None:
        return tuple(described_notes(notes))
    return (
        "the tokenizer has no chat template: plain text, one line per message",
        *described_notes(notes),
    )


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
