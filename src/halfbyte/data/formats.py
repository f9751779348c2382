"""The five row formats, all converted to messages.

    messages            {"messages": [{"role": …, "content": …}, …]}
    conversations       {"conversations": [{"from": "human" | "gpt" | …, "value": …}, …]}
    prompt/completion   {"prompt": text or messages, "completion": text or messages}
    instruction/output  {"instruction": text, "input": text, "output": text}
    text                {"text": text}

``conversations`` is ShareGPT's format, ``instruction/output`` is Alpaca's; its ``input`` is
optional. The format of a source is the one whose keys most of its rows have, the first of these in
a tie; a row without these keys is rejected and counted. The first two formats accept both pairs of
key names. ``instruction`` and ``input`` become one user turn, separated by a blank line. A
``system`` key next to the conversation is its system message; ``tools`` are passed to the chat
template. An assistant message with ``"weight": 0`` (OpenAI's format) is not supervised.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from halfbyte.data.dataset_report import RowRejected
from halfbyte.errors import DataError
from halfbyte.foreign_text import quote

Message = dict[str, Any]
"""``role``, ``content``, and other keys that the chat template may use, such as tool calls."""

_ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
_ROLES |= {"human": "user", "gpt": "assistant", "function": "tool", "observation": "tool"}


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
    """

    line: str
    messages: list[Message]
    given: int = 0
    tools: list[Any] | None = None
    text: str | None = None

    def learns(self, index: int) -> bool:
        """Whether the message is a supervised reply."""
        message = self.messages[index]
        return (
            index >= self.given and message["role"] == "assistant" and message.get("weight", 1) != 0
        )

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


def detect_format(values: Iterable[object]) -> str:
    """The name of the format whose keys most rows have.

    Raises:
        DataError: No row has the keys of any format.
    """
    votes: Counter[str] = Counter()
    seen: Mapping[Any, Any] = {}
    for value in values:
        if isinstance(value, Mapping):
            seen = seen or value
            votes.update([name for name in _FORMATS if _has_keys(value, name)][:1])
    if not votes:
        keys = ", ".join(map(quote, list(seen)[:12])) or "none"
        known = "; ".join(" and ".join(keys) for keys, _ in _FORMATS.values())
        raise DataError(
            f"no row is in a known format. The first has the keys: {keys}. "
            f"Expected one of: {known}."
        )
    return max(_FORMATS, key=lambda name: votes[name])


def to_conversation(value: object, line: str, name: str) -> Conversation:
    """Converts a row of the format ``name``.

    Raises:
        RowRejected: It is not in that format, or has nothing to supervise.
    """
    if not isinstance(value, Mapping):
        raise RowRejected("not a JSON object")
    if not _has_keys(value, name):
        missing = [key for key in _FORMATS[name][0] if value.get(key) is None]
        raise RowRejected(f"no {' and no '.join(repr(key) for key in missing)}")
    return _FORMATS[name][1](value, line)


def _has_keys(value: Mapping[Any, Any], name: str) -> bool:
    return all(value.get(key) is not None for key in _FORMATS[name][0])


def _from_messages(row: Mapping[str, Any], line: str) -> Conversation:
    return _conversation(row, line, _messages(row["messages"], "messages"))


def _from_conversations(row: Mapping[str, Any], line: str) -> Conversation:
    return _conversation(row, line, _messages(row["conversations"], "conversations"))


def _from_completion(row: Mapping[str, Any], line: str) -> Conversation:
    prompt = _turns(row["prompt"], "prompt", "user")
    completion = _turns(row["completion"], "completion", "assistant")
    return _conversation(row, line, prompt + completion, given=len(prompt))


def _from_instruction(row: Mapping[str, Any], line: str) -> Conversation:
    parts = [row["instruction"], row.get("input") or ""]
    question = "\n\n".join(part for part in (_text(part) for part in parts) if part.strip())
    user: Message = {"role": "user", "content": question}
    reply: Message = {"role": "assistant", "content": _text(row["output"])}
    return _conversation(row, line, [user, reply])


def _from_text(row: Mapping[str, Any], line: str) -> Conversation:
    text = _text(row["text"])
    if not text.strip():
        raise RowRejected("empty text")
    return Conversation(line, [], text=text)


_Parser = Callable[[Mapping[str, Any], str], Conversation]
_FORMATS: dict[str, tuple[tuple[str, ...], _Parser]] = {
    "messages": (("messages",), _from_messages),
    "conversations": (("conversations",), _from_conversations),
    "prompt/completion": (("prompt", "completion"), _from_completion),
    "instruction/output": (("instruction", "output"), _from_instruction),
    "text": (("text",), _from_text),
}


def _conversation(
    row: Mapping[str, Any], line: str, messages: list[Message], given: int = 0
) -> Conversation:
    system = row.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": _text(system)}, *messages]
        given += bool(given)
    for message in messages:
        content_needed = message["role"] in ("user", "assistant") and not message.get("tool_calls")
        if content_needed and not message["content"].strip():
            raise RowRejected(f"empty content in a message of the {message['role']}")
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise RowRejected("'tools' is not a list")
    conversation = Conversation(line, messages, given, tools)
    if not any(conversation.learns(index) for index in range(len(messages))):
        raise RowRejected("no assistant turn to learn")
    return conversation


def _turns(value: object, key: str, role: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": role, "content": _text(value)}]
    return _messages(value, key)


def _messages(value: object, key: str) -> list[Message]:
    if not isinstance(value, list):
        raise RowRejected(f"{key!r} is not a list of messages")
    if not value:
        raise RowRejected(f"{key!r} is empty")
    return [_message(item) for item in value]


def _message(item: object) -> Message:
    if not isinstance(item, Mapping):
        raise RowRejected("a message is not a JSON object")
    written = item.get("role", item.get("from"))
    if not isinstance(written, str):
        raise RowRejected("a message without a role")
    role = _ROLES.get(written)
    if role is None:
        raise RowRejected(f"unknown role {written[:40]!r}, not one of {', '.join(_ROLES)}")
    content = item.get("content", item.get("value"))
    if content is None and item.get("tool_calls"):
        content = ""
    known = ("role", "from", "content", "value")
    rest = {key: value for key, value in item.items() if key not in known}
    return {"role": role, "content": _text(content), **rest}


def _text(value: object) -> str:
    """A string, or the joined parts of a list of text parts."""
    if isinstance(value, list) and value:
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in value]
        if all(isinstance(part, str) for part in parts):
            value = "".join(str(part) for part in parts)
    if value is None:
        raise RowRejected("a message without content")
    if not isinstance(value, str):
        raise RowRejected("content that is not text")
    return value
