"""One message of a conversation, from the ways in which data sets write it.

A message becomes ``{"role": …, "content": text, …}`` as chat templates expect it; its other keys
are kept, except those that are null.

- Role and content are ``role`` and ``content``, or ShareGPT's ``from`` and ``value``; ``human``,
  ``gpt``, ``function`` and ``observation`` are ``user``, ``assistant``, ``tool`` and ``tool``.
- Content is text, or a list of text parts, which are joined.
- OpenAI's former ``function_call``, and a turn with the role ``function_call`` whose content is the
  call as JSON (LLaMA-Factory), become ``tool_calls``; ``functions``, and tools in a JSON string,
  become a list of tools.
- ``"weight": 0`` (OpenAI) and ``"train": false`` or ``"training": false`` (axolotl) mean that a
  message is not supervised.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from halfbyte.data.dataset_report import RowRejected
from halfbyte.foreign_text import quote

Message = dict[str, Any]
"""``role``, ``content``, and other keys that the chat template may use, such as tool calls."""

_ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
_ROLES |= {"human": "user", "gpt": "assistant", "function": "tool", "observation": "tool"}
_CALL = "function_call"  # a role in ShareGPT's format, a key in OpenAI's
_CONVERTED = ("role", "from", "content", "value", _CALL, "tool_calls", "train", "training")
_MEDIA = ("image", "video", "audio")
_MEDIA_KEYS = tuple(name + s for name in _MEDIA for s in ("", "s"))


def messages_of(value: object, key: str) -> list[Message]:
    """Convert a list of messages, which a row has under ``key``.

    Raises:
        RowRejected: It is not a list, is empty, or a message cannot be used.
    """
    if not isinstance(value, list):
        raise RowRejected(f"{key!r} is not a list of messages")
    if not value:
        raise RowRejected(f"{key!r} is empty")
    return [_message(item) for item in value]


def text_of(value: object) -> str:
    """Return a string, or the joined parts of a list of text parts.

    Raises:
        RowRejected: It is something else.
    """
    if isinstance(value, list) and value:
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in value]
        if all(isinstance(part, str) for part in parts):
            return "".join(map(str, parts))
        kinds = [str(part.get("type")) for part in value if isinstance(part, Mapping)]
        if found := [name for name in _MEDIA if any(name in kind for kind in kinds)]:
            raise RowRejected(f"content with {found[0]}; only text is trained")
    if value is None:
        raise RowRejected("a message without content")
    if not isinstance(value, str):
        raise RowRejected("content that is not text")
    return value


def tools_of(row: Mapping[str, Any]) -> list[Any] | None:
    """Return the tools that a row offers, in OpenAI's form, or None.

    Raises:
        RowRejected: They are not a list, or are text that is not JSON.
    """
    tools, wrap = row.get("tools"), False
    if tools is None:
        tools, wrap = row.get("functions"), True
    if isinstance(tools, str):
        tools, wrap = _json(tools, "tools") if tools.strip() else None, True
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise RowRejected("'tools' is not a list")
    bare = [wrap and isinstance(tool, Mapping) and "function" not in tool for tool in tools]
    pairs = zip(tools, bare, strict=True)
    return [{"type": "function", "function": tool} if one else tool for tool, one in pairs] or None


def reject_media(item: Mapping[Any, Any]) -> None:
    """Reject a row or a message with images, video or audio beside its text.

    Raises:
        RowRejected: It has some.
    """
    if found := next((key for key in _MEDIA_KEYS if item.get(key)), None):
        raise RowRejected(f"it has {found!r}; only text is trained")


def is_supervised(message: Message) -> bool:
    """Return whether a message is a reply without the mark that it is not supervised."""
    return message["role"] == "assistant" and bool(message.get("weight", 1))


def _message(item: object) -> Message:
    if not isinstance(item, Mapping):
        raise RowRejected("a message is not a JSON object")
    reject_media(item)
    written = _first(item, "role", "from")
    if not isinstance(written, str):
        raise RowRejected("a message without a role")
    role = "assistant" if written == _CALL else _ROLES.get(written)
    if role is None:
        raise RowRejected(f"unknown role {quote(written)}, not one of {', '.join(_ROLES)}")
    content, calls = _first(item, "content", "value"), _calls(item)
    if written == _CALL:
        content, calls = "", _calls({_CALL: _json(text_of(content), _CALL)})
    elif content is None and calls:
        content = ""
    message: Message = {"role": role, "content": text_of(content)}
    if calls:
        message["tool_calls"] = calls
    if item.get("train") is False or item.get("training") is False:
        message["weight"] = 0
    message |= {k: v for k, v in item.items() if k not in _CONVERTED and v is not None}
    if message.get("weight", 1) not in (0, 1):
        raise RowRejected("a message's weight is neither 0 nor 1")
    return message


def _first(item: Mapping[Any, Any], *keys: str) -> Any:
    """Return the value of the first key that is there; tables write null for one that is not."""
    return next((item[key] for key in keys if item.get(key) is not None), None)


def _calls(item: Mapping[str, Any]) -> list[Any]:
    """Return the tool calls of a message in OpenAI's form; empty if there are none."""
    calls = item.get("tool_calls") or []
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise RowRejected("'tool_calls' is not a list of JSON objects")
    if calls or not item.get(_CALL):
        return calls
    former = item[_CALL] if isinstance(item[_CALL], list) else [item[_CALL]]
    if not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in former):
        raise RowRejected(f"{_CALL!r} is not a JSON object with a name and arguments")
    return [{"type": "function", "function": dict(call)} for call in former]


def _json(text: str, key: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowRejected(f"{key!r} is text that is not JSON") from None
