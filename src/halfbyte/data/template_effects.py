"""What a chat template adds to a conversation, and what it drops.

Both are found by rendering conversations whose texts are words that no template contains. Whether
something is dropped depends on what kind of messages there are, in which order, not on their texts,
so rows of the same kind are tried once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

from halfbyte.data.dataset_report import RowRejected
from halfbyte.data.formats import Message
from halfbyte.data.rendering import Chat, Renderer, Tools, calls_of
from halfbyte.data.turns import Controls, shared

_REASONING = ("reasoning_content", "reasoning", "thinking")  # which transformers makes equal
_LONGEST_SHOWN = 200

CONTENT, REASONING, TOOL_CALLS, TOOLS = "content", "reasoning", "tool calls", "tools"

Lost = tuple[int, str]
"""The index of a message, -1 for the tools, and what of it is dropped."""


class Losses:
    """Finds what a template drops from conversations."""

    def __init__(self) -> None:
        self._known: dict[object, tuple[Lost, ...]] = {}
        self._latest: tuple[Chat | None, tuple[Lost, ...]] = (None, ())

    def of(self, chat: Chat) -> tuple[Lost, ...]:
        """Return what the template drops from the conversation, message by message."""
        if self._latest[0] is not chat:
            kind = (bool(chat.tools), *map(_kind, chat.messages))
            if kind not in self._known:
                self._known[kind] = tuple(_find(chat))
            self._latest = chat, self._known[kind]
        return self._latest[1]


def losses_of_text(messages: list[Message], tools: Tools) -> Iterator[Lost]:
    """Yield what is lost without a template, if only the contents of messages are kept."""
    if tools:
        yield -1, TOOLS
    for index, message in enumerate(messages):
        if calls_of([message]):
            yield index, TOOL_CALLS
        if _reasoning(message):
            yield index, REASONING


def _kind(message: Message) -> object:
    if len(message) == 2:  # the role and the content, most of all
        return message["role"], bool(_text(message)), False
    calls = [bool(call.get("arguments")) for call in calls_of([message])]
    return message["role"], bool(_text(message)), bool(_reasoning(message)), *calls


def _text(message: Message) -> str:
    content = message.get("content")
    return content.strip() if isinstance(content, str) else ""


def _reasoning(message: Message) -> list[str]:
    return [key for key in _REASONING if isinstance(message.get(key), str) and message[key].strip()]


def _find(chat: Chat) -> Iterator[Lost]:
    words: dict[str, Lost] = {}

    def word(index: int, what: str) -> str:
        new = f"zq{len(words)}qz"
        words[new] = index, what
        return new

    messages = [dict(message) for message in chat.messages]
    for index, message in enumerate(messages):
        if _text(message):
            message["content"] = word(index, CONTENT)
        if keys := _reasoning(message):
            message |= dict.fromkeys(keys, word(index, REASONING))
        if calls_of([message]):
            message["tool_calls"] = [_renamed(call, index, word) for call in message["tool_calls"]]
    tools = [_renamed(tool, -1, word) for tool in chat.tools] if chat.tools else chat.tools
    try:
        text = chat.like(messages, tools).text()
    except RowRejected:
        return  # a template that checks the texts: nothing can be said
    yield from dict.fromkeys(lost for new, lost in words.items() if new not in text)


def _renamed(call: Any, index: int, word: Callable[[int, str], str]) -> Any:
    """A tool call, or the description of a tool, with other words in it."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    what = TOOL_CALLS if index >= 0 else TOOLS
    new = {**function, "name": word(index, what)}
    arguments = function.get("arguments")
    if isinstance(arguments, dict):
        new["arguments"] = {key: word(index, what) for key in arguments}
    elif isinstance(arguments, str) and arguments.strip():
        new["arguments"] = f'{{"zq": "{word(index, what)}"}}'
    return {**call, "function": new} if "function" in call else new


def added_text(renderer: Renderer, controls: Controls) -> str:
    """Return the text that the template writes before a conversation, without control tokens.

    Usually a system prompt: a default one if the conversation has none, or the date. Empty if there
    is none, or the template rejects a plain conversation. Cut to a length that can be shown.
    """
    user, reply = {"role": "user", "content": "zqfirst"}, {"role": "assistant", "content": "zqnext"}
    try:
        text = renderer.chat([user, reply, {"role": "user", "content": "zqlast"}]).text()
    except RowRejected:
        return ""
    before, found, rest = text.partition("zqfirst")
    between = _pieces(rest.partition("zqnext")[2].partition("zqlast")[0], controls)
    pieces = _pieces(before, controls) if found else []
    # What also comes before the second question is the header of a turn.
    while pieces and between and pieces[-1] == between[-1]:
        del pieces[-1], between[-1]
    if pieces and between and not controls.match(pieces[-1] or between[-1]):
        pieces[-1] = pieces[-1][: -shared(pieces[-1][::-1], between[-1][::-1]) or None]
    words = (piece.strip().removeprefix("system") for piece in pieces if not controls.match(piece))
    shown = " ".join(" ".join(words).split())
    return shown if len(shown) <= _LONGEST_SHOWN else shown[:_LONGEST_SHOWN] + "…"


def _pieces(text: str, controls: Controls) -> list[str]:
    """The control tokens of a text, and what is between them."""
    ends = [0, *(end for match in controls.finditer(text) for end in match.span()), len(text)]
    return [text[start:end] for start, end in pairwise(ends) if start < end]
