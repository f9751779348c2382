"""Renders conversations with a tokenizer's chat template, to the text that transformers would.

transformers prepares the messages and the special tokens (`apply_chat_template`), the template
itself runs in our sandbox. A conversation is prepared once, and its prefixes are then rendered as
training, and as inference, would see them. For conversations like earlier ones, the template need
not be run (`template_traces`).

The arguments of tool calls are JSON objects for most templates, which write them as JSON, and JSON
text for some; data has either. They are passed as the template needs them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from halfbyte.data.dataset_report import RowRejected
from halfbyte.data.formats import Message
from halfbyte.data.sandbox import LimitExceeded, TemplateFailed, compiled
from halfbyte.data.template_traces import Rendering, TemplateTraces
from halfbyte.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tools = list[Any] | None

# Instead of rendering a conversation, writes what a template would get of it.
_PREPARED = "{{ [messages, tools] | tojson }}"

# Renderings that may exceed a limit of the sandbox, at some seconds each, before all is given up.
_MOST_EXCEEDED = 20


class Renderer:
    """Renders conversations with the chat template of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._templates: dict[str, _Template] = {}  # by their text: with tools it can be another

    def chat(self, messages: list[Message], tools: Tools = None) -> Chat:
        """Return the conversation, prepared for its template.

        Raises:
            RowRejected: It is not one that transformers accepts, or arguments are not JSON.
            DataError: The template is not valid.
        """
        try:
            source = self._tokenizer.get_chat_template(None, tools)
            ready, ready_tools = self._prepared(messages, tools)
        except (TypeError, ValueError) as error:
            raise RowRejected(f"the chat template rejects it ({error})") from error
        if source not in self._templates:
            self._templates[source] = _Template(source, self._special_tokens)
        return Chat(self._templates[source], ready, ready_tools)

    def _prepared(self, messages: list[Message], tools: Tools) -> tuple[list[Message], Tools]:
        """The messages and tools as transformers gives them to a template."""
        if messages and tools is None and all(map(_is_prepared, messages)):
            return [dict(message) for message in messages], None
        prepared = self._tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=_PREPARED, tokenize=False
        )
        ready, ready_tools = json.loads(str(prepared))
        return ready, ready_tools

    def conversation(self, messages: list[Message], tools: Tools = None) -> tuple[Chat, bool]:
        """Return the conversation, with the arguments of tool calls as its template needs them.

        Also whether arguments were converted. Errors as in ``chat``.
        """
        chat = self.chat(messages, tools)
        if not any(message.get("tool_calls") for message in messages):
            return chat, False
        return chat, any([_convert(call, self._arguments) for call in calls_of(chat.messages)])

    @property
    def exceeded(self) -> int:
        """How many renderings exceeded a limit of the sandbox."""
        return sum(template.exceeded for template in self._templates.values())

    @cached_property
    def _special_tokens(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in self._tokenizer.special_tokens_map.items()
            if isinstance(value, str | list)
        }

    @cached_property
    def _arguments(self) -> _Arguments:
        """What the template needs: JSON's objects, JSON text, or either."""
        written = {kind: self._written_arguments(kind) for kind in ("objects", "text")}
        # An object without a template's care is written as Python would, a text is encoded again.
        objects = "zqvalue" in written["objects"] and "'zqkey'" not in written["objects"]
        text = "zqvalue" in written["text"] and '\\"zqkey\\"' not in written["text"]
        return "either" if objects == text else "objects" if objects else "text"

    def _written_arguments(self, kind: str) -> str:
        arguments: Any = {"zqkey": "zqvalue"}
        call = tool_call("probe", arguments if kind == "objects" else json.dumps(arguments))
        user, reply = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}
        try:
            return self.chat([user, {**reply, "tool_calls": [call]}], [tool("probe")]).text()
        except RowRejected:
            return ""


# Keys that transformers makes equal, or leaves as they are, depending on its version.
_REASONING = frozenset(("reasoning_content", "reasoning", "thinking"))
_SCALARS = frozenset((str, int, float, bool))


def _is_prepared(message: Message) -> bool:
    """Whether transformers would give a message to the template as it is."""
    return _SCALARS.issuperset(map(type, message.values())) and _REASONING.isdisjoint(message)


_Arguments = Literal["objects", "text", "either"]


class Chat:
    """A conversation that is ready to be rendered, whole or up to a message.

    Attributes:
        messages: The messages as the template gets them.
        tools: The descriptions of tools, or None.
        source: The text of the template.
    """

    def __init__(self, template: _Template, messages: list[Message], tools: Tools) -> None:
        self.messages = messages
        self.tools = tools
        self.source = template.source
        self._template = template
        self._kind = template.traces.conversation(messages) if tools is None else None
        self._rendered: dict[tuple[int, bool], Rendering] = {}  # shared by the chats of prefixes

    def text(self, stop: int | None = None, *, prompt: bool = False) -> str:
        """Return the text of the messages before ``stop``, or of all.

        With ``prompt`` it ends with what the template writes before the assistant's next reply.

        Raises:
            RowRejected: The template rejects the messages.
        """
        return self._render(len(self.messages) if stop is None else stop, prompt)[0]

    @property
    def marked(self) -> list[tuple[int, int]]:
        """The spans of the text of all messages that are inside ``{% generation %}``."""
        return self._render(len(self.messages), False)[1]

    def up_to(self, stop: int) -> Chat:
        """Return the messages before ``stop`` as a conversation."""
        chat = Chat(self._template, self.messages[:stop], self.tools)
        chat._rendered = self._rendered
        return chat

    def like(self, messages: list[Message], tools: Tools) -> Chat:
        """Return another conversation with the same template."""
        return Chat(self._template, messages, tools)

    def _render(self, stop: int, prompt: bool) -> Rendering:
        if (stop, prompt) not in self._rendered:

            def run() -> Rendering:
                return self._template.render(self.messages[:stop], self.tools, prompt=prompt)

            traces, kind = self._template.traces, self._kind
            found = traces.render(kind, stop, prompt, run) if kind is not None else run()
            self._rendered[stop, prompt] = found
        return self._rendered[stop, prompt]


class _Template:
    """A template with the special tokens of its tokenizer."""

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:
        self.source = source
        self.exceeded = 0
        self._variables = {"tools": None, "documents": None, **special_tokens}
        self.traces = TemplateTraces(source, self._variables)
        try:
            self._template = compiled(source)
        except TemplateFailed as error:
            raise DataError(f"The tokenizer's chat template is not valid: {error}.") from error

    def render(self, messages: list[Message], tools: Tools, *, prompt: bool) -> Rendering:
        if not messages:
            raise RowRejected("the chat template has no messages to render")
        variables = self._variables | {"messages": messages, "add_generation_prompt": prompt}
        if tools is not None:
            variables["tools"] = tools
        try:
            text, spans = self._template.render(variables)
            text.encode()
        except TemplateFailed as error:
            self.exceeded += isinstance(error.__cause__, LimitExceeded)
            check_exceeded(self.exceeded, f": {error}")
            raise RowRejected(f"the chat template rejects it ({error})") from error
        except UnicodeEncodeError as error:
            # A template can write what no row may have: half a surrogate pair, from an escape.
            raise RowRejected("the chat template writes text that is not valid Unicode") from error
        return text, spans


def check_exceeded(renderings: int, reason: str = "") -> None:
    """Check how many renderings exceeded a limit of the sandbox.

    Raises:
        DataError: They are so many that the template cannot be used.
    """
    if renderings > _MOST_EXCEEDED:
        raise DataError(
            f"The tokenizer's chat template exceeds its limits, for {_MOST_EXCEEDED:,} renderings "
            f"and more{reason}."
        )


# Tool calls


def calls_of(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """The functions called by messages, each with ``name`` and ``arguments``."""
    found = []
    for message in messages:
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function", call) if isinstance(call, dict) else None
            if isinstance(function, dict):
                found.append(function)
    return found


def tool_call(name: str, arguments: Any) -> dict[str, Any]:
    """Return a tool call in OpenAI's format."""
    function = {"name": name, "arguments": arguments}
    # Mistral's templates want an identifier of nine letters and digits.
    return {"id": "call00000", "type": "function", "function": function}


def tool(name: str) -> dict[str, Any]:
    """Return the description of a tool without parameters."""
    parameters = {"type": "object", "properties": {}, "required": []}
    function = {"name": name, "description": "Does it.", "parameters": parameters}
    return {"type": "function", "function": function}


def _convert(function: dict[str, Any], kind: _Arguments) -> bool:
    """Convert the arguments of a call in place; returns whether they were not so before."""
    arguments = function.get("arguments")
    if kind == "objects" and isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            function["arguments"] = None
        if not isinstance(function["arguments"], dict):
            raise RowRejected("the arguments of a tool call are not a JSON object")
        return True
    if kind == "text" and isinstance(arguments, dict):
        function["arguments"] = json.dumps(arguments, ensure_ascii=False)
        return True
    return False
