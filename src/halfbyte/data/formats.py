"""The five row formats, all converted to messages.

    messages            {"messages": [{"role": …, "content": …}, …]}
    conversations       {"conversations": [{"from": "human" | "gpt" | …, "value": …}, …]}
    prompt/completion   {"prompt": text or messages, "completion": text or messages}
    instruction/output  {"instruction": text, "input": text, "output": text, "history": pairs}
    text                {"text": text}

``conversations`` is ShareGPT's format, ``instruction/output`` is Alpaca's; its ``input`` is
optional, and so is LLaMA-Factory's ``history``, a list of ``[question, answer]`` pairs. These are
the earlier turns; as in LLaMA-Factory, their answers are supervised like the last one.
``instruction`` and ``input`` become one user turn, separated by a blank line.

Each row is read in its own format, so a file may mix them. A row with the keys of several formats
(often ``text`` is a rendered copy of ``messages``) is read in the one that most rows are in; a row
with the keys of none is rejected and counted. ``system`` next to the conversation is its system
message; ``tools`` (or OpenAI's ``functions``) are passed to the chat template. Keys that nothing
reads are reported, once. Preference data, and rows with images, audio or video, are rejected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

from halfbyte.data.dataset_report import RowRejected
from halfbyte.data.messages import (
    Message,
    is_supervised,
    messages_of,
    reject_media,
    text_of,
    tools_of,
)
from halfbyte.errors import DataError
from halfbyte.foreign_text import quote

__all__ = [
    "Conversation",
    "Message",
    "format_of",
    "preferred_formats",
    "to_conversation",
    "to_row",
]


@dataclass(frozen=True)
class Conversation:
    """A row, independent of its format.

    Attributes:
        line: Its line in the source.
        messages: The conversation; empty for a row of plain text.
        given: Number of messages at the start that are never supervised: those of ``prompt``,
            which may contain assistant turns.
        tools: Descriptions of tools for the chat template.
        text: The text of a row of plain text, which is supervised as a whole.
        unused: Keys of the row that nothing read.
    """

    line: str
    messages: list[Message]
    given: int = 0
    tools: list[Any] | None = None
    text: str | None = None
    unused: tuple[str, ...] = ()

    def learns(self, index: int) -> bool:
        """Whether the message is a supervised reply."""
        return index >= self.given and is_supervised(self.messages[index])

    def up_to(self, stop: int) -> Conversation:
        """The messages before ``stop`` as a conversation; itself if these are all."""
        whole = stop == len(self.messages)
        return self if whole else replace(self, messages=self.messages[:stop])

    @property
    def prompt(self) -> list[Message]:
        """The messages before the last reply."""
        return self.messages[: self._last_reply]

    @property
    def expected(self) -> str:
        """The last reply, which the model should give."""
        return str(self.messages[self._last_reply].get("content") or "")

    @property
    def _last_reply(self) -> int:
        roles = [message["role"] for message in self.messages]
        return len(roles) - 1 - roles[::-1].index("assistant")


_NO_MORE = object()


def preferred_formats(values: Iterable[object], *, most: int | None = None) -> tuple[str, ...]:
    """Return the formats of the rows, the most frequent first; a tie is broken by their order.

    A row with the keys of several counts for the first of these. Rows of data that is not for
    supervised fine-tuning do not count; if all are such rows, the result is empty.

    Args:
        values: The rows.
        most: Of data with more rows than this, the first so many are read, and formats that none
            of them has come last in the result: a later row may be in one.

    Raises:
        DataError: No row has the keys of any format.
    """
    values = iter(values)
    first = list(islice(values, most))
    if most is not None and next(values, _NO_MORE) is not _NO_MORE:
        with suppress(DataError):  # later rows may be in a known format
            voted = preferred_formats(first)
            return (*voted, *(name for name in _FORMATS if name not in voted))
        return tuple(_FORMATS)
    votes: Counter[str] = Counter()
    unknown: Mapping[Any, Any] | None = None
    refused = 0
    for value in first:
        if not isinstance(value, Mapping):
            unknown = unknown or {}
        elif _refusal(value) is not None:
            refused += 1
        elif (found := format_of(value, tuple(_FORMATS))) is None:
            unknown = unknown or value
        else:
            votes[found] += 1
    if unknown is not None and not votes and not refused:
        keys = ", ".join(map(quote, list(unknown)[:12])) or "none"
        known = "; ".join(" and ".join(known.keys) for known in _FORMATS.values())
        raise DataError(
            f"no row is in a known format. The first has the keys: {keys}. "
            f"Expected one of: {known}."
        )
    return tuple(sorted(votes, key=lambda name: (-votes[name], [*_FORMATS].index(name))))


def format_of(value: object, preferred: Sequence[str]) -> str | None:
    """Return the first of the ``preferred`` formats whose keys a row has, or None."""
    if not isinstance(value, Mapping):
        return None
    return next((name for name in preferred if _has_keys(value, name)), None)


def to_conversation(value: object, line: str, preferred: Sequence[str]) -> Conversation:
    """Convert a row, in the first of the ``preferred`` formats whose keys it has.

    Raises:
        RowRejected: It has the keys of none of them, or nothing to supervise.
    """
    if not isinstance(value, Mapping):
        raise RowRejected("not a JSON object")
    if (reason := _refusal(value)) is not None:
        raise RowRejected(reason)
    reject_media(value)
    if (name := format_of(value, preferred)) is None:
        expected = _FORMATS[preferred[0]].keys if preferred else ()
        missing = [repr(key) for key in expected if value.get(key) is None]
        raise RowRejected(f"no {' and no '.join(missing)}" if missing else "in no known format")
    found = _FORMATS[name].parse(value, line)
    return replace(found, unused=_unused(value, name, found))


def to_row(conversation: Conversation) -> dict[str, Any]:
    """Convert back to a row, which `to_conversation` reads as the same conversation."""
    if conversation.text is not None:
        return {"text": conversation.text}
    tools = {"tools": conversation.tools} if conversation.tools else {}
    messages, given = conversation.messages, conversation.given
    if given:
        return {"prompt": messages[:given], "completion": messages[given:]} | tools
    return {"messages": messages} | tools


def _refusal(row: Mapping[Any, Any]) -> str | None:
    """Return why a row is not data for supervised fine-tuning of text, or None if it may be."""
    if row.get("chosen") is not None and row.get("rejected") is not None:
        return "preference data ('chosen' and 'rejected'), which is not for supervised fine-tuning"
    for key in ("label", "kto_tag"):
        if isinstance(row.get(key), bool) and not _has_keys(row, "text"):
            return f"preference data ({key!r}), which is not for supervised fine-tuning"
    if (weight := row.get("weight")) is not None and weight != 1:
        return f"the row's weight is {'0' if weight == 0 else 'neither 0 nor 1'}"
    return None


def _has_keys(row: Mapping[Any, Any], name: str) -> bool:
    return all(row.get(key) is not None for key in _FORMATS[name].keys)


def _unused(row: Mapping[Any, Any], name: str, found: Conversation) -> tuple[str, ...]:
    """Return the keys of a row that hold something which ``found`` does not have."""
    used = {*_FORMATS[name].keys, *_FORMATS[name].optional, "weight"}
    if found.messages:
        used |= {"functions" if row.get("tools") is None else "tools"}
        used |= {"system"} if found.messages[0]["content"] == row.get("system") else set()
    nothing: tuple[Any, ...] = (None, "", [], {})
    return tuple(str(key) for key, value in row.items() if key not in used and value not in nothing)


def _from_messages(row: Mapping[str, Any], line: str) -> Conversation:
    return _conversation(row, line, messages_of(row["messages"], "messages"))


def _from_conversations(row: Mapping[str, Any], line: str) -> Conversation:
    return _conversation(row, line, messages_of(row["conversations"], "conversations"))


def _from_completion(row: Mapping[str, Any], line: str) -> Conversation:
    prompt = _turns(row["prompt"], "prompt", "user")
    completion = _turns(row["completion"], "completion", "assistant")
    return _conversation(row, line, prompt + completion, given=len(prompt))


def _from_instruction(row: Mapping[str, Any], line: str) -> Conversation:
    parts = [row["instruction"], row.get("input") or ""]
    question = "\n\n".join(part for part in map(text_of, parts) if part.strip())
    messages: list[Message] = []
    for asked, answer in (*_history(row.get("history")), (question, text_of(row["output"]))):
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answer})
    return _conversation(row, line, messages)


def _history(value: object) -> list[list[str]]:
    pairs = value or []
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in pairs
    ):
        raise RowRejected("'history' is not a list of [question, answer] pairs")
    return pairs


def _from_text(row: Mapping[str, Any], line: str) -> Conversation:
    text = text_of(row["text"])
    if not text.strip():
        raise RowRejected("empty text")
    return Conversation(line, [], text=text)


class Format(NamedTuple):
    """A row format: the keys of a row, the function that converts it, and optional keys."""

    keys: tuple[str, ...]
    parse: Callable[[Mapping[str, Any], str], Conversation]
    optional: tuple[str, ...] = ()


_FORMATS = {
    "messages": Format(("messages",), _from_messages),
    "conversations": Format(("conversations",), _from_conversations),
    "prompt/completion": Format(("prompt", "completion"), _from_completion),
    "instruction/output": Format(
        ("instruction", "output"), _from_instruction, optional=("input", "history")
    ),
    "text": Format(("text",), _from_text),
}


def _conversation(
    row: Mapping[str, Any], line: str, messages: list[Message], given: int = 0
) -> Conversation:
    system = row.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
        given += bool(given)
    for message in messages:
        content_needed = message["role"] in ("user", "assistant") and not message.get("tool_calls")
        if content_needed and not message["content"].strip():
            raise RowRejected(f"empty content in a message of the {message['role']}")
    conversation = Conversation(line, messages, given, tools_of(row))
    if not any(conversation.learns(index) for index in range(len(messages))):
        raise RowRejected("no assistant turn to learn")
    return conversation


def _turns(value: object, key: str, role: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return messages_of(value, key)
