"""Finds the assistant's turns in a rendered conversation.

A reply is supervised if the model would have to write it at inference, exactly as it stands in the
training text. At inference the model sees the messages before the reply, rendered as a prompt; what
it has to add is whatever makes that the rendering of these messages and the reply, up to the token
that ends the turn. The training text must start with both. The rendering of all messages does not
if the template renders earlier turns otherwise than the last: drops their thinking, moves the tools
to the last question, or ends them with another token. Such a reply is supervised in another text,
the rendering of the messages up to it (`find_parts`).

Which token ends a turn is found once for a template, by rendering probes (`find_ends`). It is not
simply the last special token: many templates write others after it, or before it, such as those
around a tool call. Some do not end a turn at all (GLM's), so that the model stops by writing the
token that begins the next.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from halfbyte.data.dataset_report import RowRejected
from halfbyte.data.formats import Message
from halfbyte.data.rendering import Chat, Renderer, tool, tool_call
from halfbyte.foreign_text import quote

Controls = re.Pattern[str]
"""Matches the special and added tokens of a tokenizer in a text."""

# Why a reply is not supervised
NO_PROMPT = "there is no message before it"
OTHER_PROMPT = "with it, the chat template renders what is before it otherwise than at inference"

# What to do about it
_GIVE_THINKING = "give its thinking as 'reasoning_content', or train on all tokens (train_on: all)"
_TRAIN_ON_ALL = "train on all tokens (train_on: all), or change the model's chat template"

# What is wrong with one that is supervised
NO_END = "no token ends the reply: the model will not learn to stop"


class Rewritten(RowRejected):
    """A text renders a reply otherwise than the text of the messages up to the reply does."""


@dataclass(frozen=True)
class TurnEnds:
    """How the replies of a chat template end.

    Attributes:
        closings: What can end the last reply of a text: the token that ends the turn and all that
            follows it. The longest first; none if the template does not end turns.
        tokens: The tokens that end a turn.
    """

    closings: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()

    def locate(self, text: str, controls: Controls) -> tuple[int, int]:
        """Return where, in a text that ends with a reply, the token that ends it starts and stops.

        Both are the length of the text if there is none.
        """
        for closing in self.closings:
            if text.endswith(closing) and (token := controls.match(closing)):
                start = len(text) - len(closing)
                return start, start + token.end()
        found = [match for match in controls.finditer(text) if match[0] in self.tokens]
        if self.closings and found and not text[found[-1].end() :].strip():
            return found[-1].span()
        return len(text), len(text)


@dataclass(frozen=True)
class Turn:
    """The supervised characters of a reply, and what the user should know about it."""

    start: int
    stop: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """A conversation up to one of its messages, and the replies supervised in its text.

    Attributes:
        chat: The messages up to there.
        turns: Where replies are, by their index; at least one.
    """

    chat: Chat
    turns: Mapping[int, Turn]


def find_parts(
    chat: Chat, replies: Sequence[int], ends: TurnEnds, controls: Controls
) -> tuple[list[Part], list[str]]:
    """Return in which texts the replies with these indices are supervised, and why others are not.

    Each is supervised in one text: that of the whole conversation if possible, which comes last. Of
    those that are not, the last is supervised in the text that ends with it, and so are all others
    that can be; and so on.
    """
    parts: list[Part] = []
    reasons: list[str] = []
    while replies:
        turns: dict[int, Turn] = {}
        rewritten: list[int] = []
        for index in replies:
            try:
                turns[index] = find_turn(chat, index, ends, controls)
            except Rewritten:
                rewritten.append(index)
            except RowRejected as rejection:
                reasons.append(str(rejection))
        if turns:
            parts.insert(0, Part(chat, turns))
        if rewritten:  # but not in the text that ends with it, so fewer are left
            chat = chat.up_to(rewritten[-1] + 1)
        replies = rewritten
    return parts, reasons


def find_turn(chat: Chat, index: int, ends: TurnEnds, controls: Controls) -> Turn:
    """Return the characters of the reply with this index that are supervised.

    Raises:
        Rewritten: It cannot be supervised in this text, but in that of the messages up to it.
        RowRejected: It cannot be supervised; the message is why, and what the user can do.
    """
    if not index:
        raise RowRejected(NO_PROMPT)
    text = chat.text()
    prompt, reply = chat.text(index, prompt=True), chat.text(index + 1)
    if not reply.startswith(prompt):
        bare = chat.text(index)
        if not (prompt.startswith(bare) and reply.startswith(bare)):
            raise RowRejected(f"{OTHER_PROMPT}; {_TRAIN_ON_ALL}")
        thinks = _begins_with_thinking(chat, index, prompt)
        raise RowRejected(
            f"the prompt at inference ends in {quote(prompt[len(bare) :])}, with which the chat "
            f"template does not begin the reply; {_GIVE_THINKING if thinks else _TRAIN_ON_ALL}"
        )
    end, stop = ends.locate(reply, controls)
    if not text.startswith(reply[:stop]):
        raise Rewritten("the chat template renders it otherwise than at inference")
    if end < stop:
        return Turn(len(prompt), stop)
    following = controls.match(text, end)
    if following and following[0] in ends.tokens:
        return Turn(len(prompt), following.end())
    return Turn(len(prompt), end, (NO_END,))


def _begins_with_thinking(chat: Chat, index: int, prompt: str) -> bool:
    """Whether the template would begin the reply as the prompt ends, had it some thinking."""
    reply = {**chat.messages[index], **dict.fromkeys(("reasoning_content", "thinking"), _SECOND)}
    try:
        text = chat.like([*chat.messages[:index], reply], chat.tools).text()
    except RowRejected:
        return False
    return text.startswith(prompt)


def shared(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the common prefix."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


# Probes

_FIRST, _SECOND, _THIRD = "zqfirst", "zqsecond", "zqthird"
_USER: Message = {"role": "user", "content": _FIRST}
_REPLY: Message = {"role": "assistant", "content": _SECOND}
_RESULT: Message = {"role": "tool", "tool_call_id": "call00000", "content": _THIRD}


def find_ends(renderer: Renderer, controls: Controls) -> TurnEnds:
    """Find how replies end: those with text, and those that call a tool."""
    closings: dict[str, None] = {}
    tokens: dict[str, None] = {}
    last = _tail(renderer, [_USER, _REPLY], controls)
    between = _tail(renderer, [_USER, _REPLY, {"role": "user", "content": _THIRD}], controls)
    if last is None:
        return TurnEnds()
    if last.matches:
        # The tokens that follow a reply wherever it is, such as Command's <|END_RESPONSE|>, end
        # with the one that ends the turn. If there are none, as in gpt-oss, it is the last reply's.
        end = last.matches[max(shared(last.tokens, between.tokens if between else []), 1) - 1]
        closings[last.text[end.start() :]] = tokens[end[0]] = None
    elif between and between.matches:
        tokens[between.tokens[0]] = None
    token, closing = _end_of_call(renderer, controls, tuple(closings))
    if token:
        tokens[token] = None
    if closing:
        closings[closing] = None
    return TurnEnds(tuple(sorted(closings, key=len, reverse=True)), tuple(tokens))


@dataclass(frozen=True)
class _Tail:
    """What is rendered after ``_SECOND``, and the control tokens in it."""

    text: str
    matches: list[re.Match[str]]

    @property
    def tokens(self) -> list[str]:
        return [match[0] for match in self.matches]


def _tail(renderer: Renderer, messages: list[Message], controls: Controls) -> _Tail | None:
    """What the template writes after ``_SECOND``; None if it rejects the messages or drops it."""
    for tools in (None, [tool("zqname")]):  # some templates cannot do without
        try:
            text = renderer.conversation(messages, tools)[0].text()
        except RowRejected:
            continue
        _, found, tail = text.rpartition(_SECOND)
        return _Tail(tail, list(controls.finditer(tail))) if found else None
    return None


def _end_of_call(
    renderer: Renderer, controls: Controls, closings: tuple[str, ...]
) -> tuple[str, str]:
    """The token that ends the turn of a tool call, and the closing, where they are others."""
    calls = [tool_call("zqname", {"zqkey": value}) for value in (_SECOND, _THIRD)]
    one, two = ({**_REPLY, "content": "", "tool_calls": calls[:n]} for n in (1, 2))
    last = _tail(renderer, [_USER, one], controls)
    if last is None or last.text.endswith(closings or "\0"):
        return "", ""
    if not closings:  # nor will this turn be ended by a token of its own
        between = _tail(renderer, [_USER, one, _RESULT], controls)
        following = between.tokens[len(last.tokens) :] if between else []
        return (following[0] if following else ""), ""
    if not last.matches or last.text[last.matches[-1].end() :].strip():
        return "", ""
    end = last.matches[-1]
    parallel = _tail(renderer, [_USER, two], controls)
    if parallel and parallel.tokens.count(end[0]) > 1:
        return "", ""  # it ends a call, not the turn
    return end[0], last.text[end.start() :]
