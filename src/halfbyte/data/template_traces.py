"""Renders conversations like earlier ones without running the chat template again.

What a template writes depends on the texts of a conversation in few ways: it copies them, it may
strip or split them, and it asks them few questions. So it is run with objects in place of the texts
that record all this, and the record is a program: questions with their answers, computed texts, and
what to join. For a conversation of the same kind (equal in everything but its texts) whose texts
give the same answers, the program gives what the template would write.

A record is exact, or there is none. The objects are not strings: whatever is not recorded fails,
and then the template is run as always. So it is if a text is long, or there are tool calls, whose
arguments are part of the kind. Limits (`sandbox`) are kept, since each text was counted as if it
had `LONGEST` characters, and what a template costs only grows with them. And a record is used only
after it gave the template's own text for the conversation that it was made from.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, NoReturn

from jinja2 import Template, nodes
from jinja2.compiler import Frame
from jinja2.runtime import Context

from halfbyte.data.messages import Message
from halfbyte.data.sandbox import (
    MOST_CHARACTERS,
    LimitedCompiler,
    Sandbox,
    SymbolicText,
    transformers_environment,
)

LONGEST = 20_000
"""Characters of a text; a conversation with a longer one is rendered by the template."""

_TEXTS = ("content", "reasoning_content", "thinking", "reasoning")  # the texts of a message
_SCALARS = (str, int, float, bool)
_MOST_TRACES = 8  # of one kind, for different answers
_MOST_FAILURES = 2  # of one kind: then no more is recorded
_MOST_PIECES = 16  # of a text that is split
_FREE = 200  # records that are made whether or not they are used
_MOST_KINDS = 10_000


Rendering = tuple[str, list[tuple[int, int]]]
"""A text, and its spans inside ``{% generation %}``."""


class NotTraceable(BaseException):
    """The template does something with a text that is not recorded.

    Not an `Exception`: nothing in between may handle it.
    """


class Kind:
    """Conversations that are equal in everything but their texts, as the beginning of others.

    Attributes:
        parts: Their messages without the texts.
        texts: The number of their texts.
        longer: The kinds with another message.
        traces: Their records, without and with the beginning of a reply at the end.
        failures: How often no record could be made.
    """

    def __init__(self, parts: tuple[object, ...] = (), texts: int = 0) -> None:
        self.texts = texts
        self.parts = parts
        self.longer: dict[object, Kind] = {}
        self.traces: dict[bool, list[_Trace]] = {False: [], True: []}
        self.failures = 0


class Conversation(NamedTuple):
    """The kinds of the beginnings of a conversation, by their number of messages, and its texts."""

    kinds: list[Kind]
    texts: list[str]


class TemplateTraces:
    """The records of renderings of one template."""

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        """Begin without records.

        Args:
            source: The text of the template.
            variables: What the template may use beside the messages.
        """
        self._source, self._variables = source, variables
        self._root = Kind()
        self._kinds = self._made = self._used = 0

    def conversation(self, messages: Sequence[Message]) -> Conversation | None:
        """Return the kind and the texts of a conversation; None if it is not to be recorded."""
        kinds: list[Kind] = [self._root]
        texts: list[str] = []
        for message in messages:
            if len(message) == 2 and type(message.get("content")) is str and "role" in message:
                part: object = message["role"]
                found = [message["content"]]
                if type(part) is not str or next(iter(message)) != "role":
                    return None
            else:
                found = []
                items: list[object] = []
                for key, value in message.items():
                    if type(value) is str and key in _TEXTS:
                        found.append(value)
                        items.append(key)
                    elif type(value) in _SCALARS:
                        items.append((key, type(value), value))
                    else:
                        return None
                part = tuple(items)
            if any(len(text) > LONGEST for text in found):
                return None
            if (kind := self._followed(kinds[-1], part, len(found))) is None:
                return None
            kinds.append(kind)
            texts += found
        return Conversation(kinds, texts)

    def render(
        self, conversation: Conversation, stop: int, prompt: bool, run: Callable[[], Rendering]
    ) -> Rendering:
        """Return what the template writes.

        Args:
            conversation: A conversation.
            stop: The number of its messages that are rendered.
            prompt: Whether to end with what begins a reply.
            run: Runs the template; its errors are passed on.
        """
        kind = conversation.kinds[stop]
        texts, traces = conversation.texts[: kind.texts], kind.traces[prompt]
        for trace in traces:
            if (text := trace.replay(texts)) is not None:
                self._used += 1
                return text, []
        found = run()
        wanted = len(traces) < _MOST_TRACES and kind.failures < _MOST_FAILURES
        if wanted and self._made < _FREE + self._used:
            self._made += 1
            made = self._record(kind, texts, prompt)
            if made is not None and (made.replay(texts), []) == found:
                traces.append(made)
            else:
                kind.failures += 1
        return found

    def _followed(self, kind: Kind, part: object, texts: int) -> Kind | None:
        """The kind with another message; None if there are too many kinds."""
        if part not in kind.longer:
            if self._kinds == _MOST_KINDS:
                return None
            self._kinds += 1
            kind.longer[part] = Kind((*kind.parts, part), kind.texts + texts)
        return kind.longer[part]

    def _record(self, kind: Kind, texts: Sequence[str], prompt: bool) -> _Trace | None:
        recorder = _Recorder(texts)
        symbols = iter(recorder.texts)
        messages = [_message(part, symbols) for part in kind.parts]
        variables = {**self._variables, "messages": messages, "add_generation_prompt": prompt}
        try:
            return recorder.trace(self._template.run(variables, recorder))
        except (NotTraceable, Exception):
            return None  # whatever it is, the template itself has said what there is to say

    @cached_property
    def _template(self) -> _TracedTemplate:
        return _TracedTemplate(self._source)


def _message(part: object, symbols: Any) -> Message:
    if isinstance(part, str):
        return {"role": part, "content": next(symbols)}
    assert isinstance(part, tuple)
    return dict(
        (item, next(symbols)) if isinstance(item, str) else (item[0], item[2]) for item in part
    )


# Records


class _Constant(NamedTuple):
    """A value that is the same for every conversation."""

    value: Any


_Operand = int | _Constant
"""The number of a text, given or computed, or a constant."""


class _Step(NamedTuple):
    """Calls ``function`` with values: to compute a text, or to ask for an answer.

    Attributes:
        function: The function.
        operands: What it is called with.
        number: The number of the text that it computes, or None.
        answer: What it must return, if it computes none.
    """

    function: Callable[..., Any]
    operands: tuple[Any, ...]
    number: int | None
    answer: Any = None


class _Trace:
    """A record: the values before any step, the steps, and which values to join."""

    def __init__(self, values: list[Any], steps: list[_Step], output: list[int]) -> None:
        self._values, self._steps, self._output = values, steps, output

    def replay(self, texts: Sequence[str]) -> str | None:
        """Return the rendering of a conversation with these texts; None if answers are others."""
        values = [*texts, *self._values]
        for function, operands, number, answer in self._steps:
            found = function(*[values[at] for at in operands])
            if number is not None:
                values[number] = found
            elif found != answer:
                return None
        return "".join([values[at] for at in self._output])


class _Recorder:
    """Records what is done with the texts of a conversation."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._values = list(texts)
        self._given = len(texts)
        self._known: dict[Any, Any] = {}
        self._steps: list[_Step] = []
        self.texts = [Symbol(self, (at,), LONGEST) for at in range(len(texts))]

    def ask(self, function: Callable[..., Any], *operands: Any) -> Any:
        """Return the answer of a function to operands, of which some are symbols."""
        return self._step(function, operands, computes=False)

    def compute(self, function: Callable[..., str], *operands: Any) -> Symbol:
        """Return a text that is computed, and is not longer than the operands' are together."""
        sizes = [one.characters for one in operands if isinstance(one, Symbol)]
        return Symbol(self, (self._step(function, operands, computes=True),), sum(sizes))

    def join(self, values: Sequence[Any]) -> Symbol:
        """Return texts one after the other, of which some are symbols."""
        parts: list[str | int] = []
        size = 0
        for value in values:
            if isinstance(value, Symbol):
                parts += value.parts
                size += value.characters
            elif type(value) is str:
                parts.append(value)
                size += len(value)
            else:  # markup, which joins otherwise
                raise NotTraceable
        if size > MOST_CHARACTERS:
            raise NotTraceable
        return Symbol(self, tuple(parts), size)

    def trace(self, output: Symbol) -> _Trace:
        """Return the record, of which ``output`` is the result."""
        constants: list[Any] = []
        first = len(self._values)

        def place(one: _Operand) -> int:
            if isinstance(one, int):
                return one
            constants.append(one.value)
            return first + len(constants) - 1

        steps = [step._replace(operands=tuple(map(place, step.operands))) for step in self._steps]
        written: list[int] = []
        literal = ""
        for part in (*output.parts, -1):
            if isinstance(part, str):
                literal += part
                continue
            if literal:
                written.append(place(_Constant(literal)))
                literal = ""
            written.append(part)
        return _Trace([None] * (first - self._given) + constants, steps, written[:-1])

    def _step(self, function: Callable[..., Any], operands: Sequence[Any], computes: bool) -> Any:
        places = tuple(map(self._operand, operands))
        values = [self._values[one] if isinstance(one, int) else one.value for one in places]
        # The type as well, since 1, 1.0 and True are equal.
        key = function, places, tuple(map(type, values))
        if key not in self._known:
            found = function(*values)
            if computes:
                self._steps.append(_Step(function, places, len(self._values)))
                self._known[key] = len(self._values)
                self._values.append(found)
            else:
                self._steps.append(_Step(function, places, None, found))
                self._known[key] = found
        return self._known[key]

    def _operand(self, value: Any) -> _Operand:
        if not isinstance(value, Symbol):
            return _Constant(value)
        if len(value.parts) == 1 and isinstance(value.parts[0], int):
            return value.parts[0]
        parts = [one if isinstance(one, int) else _Constant(one) for one in value.parts]
        texts = [self._values[one] if isinstance(one, int) else one.value for one in parts]
        key = "join", tuple(parts)
        if key not in self._known:
            self._steps.append(_Step(_joined, tuple(parts), len(self._values)))
            self._known[key] = len(self._values)
            self._values.append("".join(texts))
        number: int = self._known[key]
        return number


def _joined(*texts: str) -> str:
    return "".join(texts)


def _count_pieces(text: str, separator: str | None, most: int) -> int:
    return len(text.split(separator, most))


def _piece(text: str, separator: str | None, most: int, at: int) -> str:
    return text.split(separator, most)[at]


class Symbol(SymbolicText):
    """A text of the conversation, or what is made of it, while a rendering is recorded.

    Attributes:
        parts: What it is, one after the other: text that the template wrote, or the number of a
            text of the record.
        characters: The most that it can have.
    """

    def __init__(self, recorder: _Recorder, parts: tuple[str | int, ...], characters: int) -> None:
        self.recorder, self.parts, self.characters = recorder, parts, characters

    # What templates do with texts, as methods of `str`

    def strip(self, characters: str | None = None) -> Symbol:
        """Return it without characters at both ends."""
        return self.recorder.compute(str.strip, self, _plain(characters))

    def lstrip(self, characters: str | None = None) -> Symbol:
        """Return it without characters at its beginning."""
        return self.recorder.compute(str.lstrip, self, _plain(characters))

    def rstrip(self, characters: str | None = None) -> Symbol:
        """Return it without characters at its end."""
        return self.recorder.compute(str.rstrip, self, _plain(characters))

    def split(self, separator: str | None = None, most: int = -1) -> list[Symbol]:
        """Return its parts between separators."""
        how = _plain(separator), _plain(most)
        count = self.recorder.ask(_count_pieces, self, *how)
        if count > _MOST_PIECES:
            raise NotTraceable
        return [self.recorder.compute(_piece, self, *how, at) for at in range(count)]

    def startswith(self, prefix: str | tuple[str, ...]) -> bool:
        """Return whether it begins so."""
        return bool(self.recorder.ask(str.startswith, self, _plain(prefix)))

    def endswith(self, suffix: str | tuple[str, ...]) -> bool:
        """Return whether it ends so."""
        return bool(self.recorder.ask(str.endswith, self, _plain(suffix)))

    def __contains__(self, part: object) -> bool:
        if not isinstance(part, str | Symbol):
            raise NotTraceable
        return bool(self.recorder.ask(operator.contains, self, part))

    def __getitem__(self, key: object) -> Symbol:
        if not isinstance(key, slice):
            raise NotTraceable
        bounds = [_plain(bound) for bound in (key.start, key.stop, key.step)]
        return self.recorder.compute(_sliced, self, *bounds)

    def __bool__(self) -> bool:
        return bool(self.recorder.ask(bool, self))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, str | Symbol):
            return False
        return bool(self.recorder.ask(operator.eq, self, other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> NoReturn:
        raise NotTraceable

    def __getattr__(self, name: str) -> NoReturn:
        raise NotTraceable

    def _fail(self, *_: object) -> NoReturn:
        raise NotTraceable

    __len__ = __iter__ = __str__ = __repr__ = __format__ = _fail
    __lt__ = __le__ = __gt__ = __ge__ = _fail


_METHODS = ("strip", "lstrip", "rstrip", "split", "startswith", "endswith")


def _sliced(text: str, start: int | None, stop: int | None, step: int | None) -> str:
    return text[start:stop:step]


def _plain(value: Any) -> Any:
    """A value that can be a constant of a record."""
    every = value if isinstance(value, tuple) else (value,)
    if any(one is not None and type(one) not in (str, int) for one in every):
        raise NotTraceable
    return value


# The template, run with symbols


class _TracedTemplate:
    """A template whose output may contain symbols."""

    def __init__(self, source: str) -> None:
        self._environment = _TracingSandbox(transformers_environment())
        self._template: Template = self._environment.from_string(source)

    def run(self, variables: Mapping[str, Any], recorder: _Recorder) -> Symbol:
        """Return what the template writes."""
        pieces: list[Any] = []
        marked: list[tuple[int, int]] = []
        environment: Any = self._environment
        environment.recorder = recorder
        with environment.activate_tracker(pieces, marked):
            environment.start()
            pieces += self._template.generate(variables)
        if marked:
            raise NotTraceable
        return recorder.join(pieces)


class _TracingCompiler(LimitedCompiler):
    """Compiles outputs so that symbols are not made text."""

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            raise NotTraceable
        self.write("environment.written(")

    def _output_child_post(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        self.write(")")


class _TracingSandbox(Sandbox):
    """The sandbox, for symbols."""

    code_generator_class = _TracingCompiler
    recorder: _Recorder

    def __init__(self, theirs: Any) -> None:
        super().__init__(theirs)
        self.filters = {name: _traced(name, one) for name, one in self.filters.items()}
        del self.filters["random"]
        self.tests = {name: _traced_test(name, one) for name, one in self.tests.items()}
        self._now: Any = self.globals.get("strftime_now")

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return ``obj.attribute``."""
        if isinstance(obj, Symbol) and attribute not in _METHODS:
            raise NotTraceable
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Return ``obj[argument]``."""
        if isinstance(obj, Symbol):
            raise NotTraceable
        return super().getitem(obj, argument)

    def written(self, value: Any) -> Any:
        """Return what is written of a value."""
        value = self.counted(value)
        return value if isinstance(value, Symbol) else str(value)

    def concat(self, pieces: Any) -> Any:
        """Join what a macro has written."""
        pieces = list(pieces)
        if any(isinstance(piece, Symbol) for piece in pieces):
            return self.recorder.join(pieces)
        return "".join(pieces)

    def concatenated(self, *values: Any) -> Any:
        """Return ``a ~ b``."""
        if not any(isinstance(value, Symbol) for value in values):
            return super().concatenated(*values)
        for value in values:
            self.counted(value)
        return self.concat(value if isinstance(value, Symbol) else str(value) for value in values)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Return ``left operator right``."""
        if not isinstance(left, Symbol) and not isinstance(right, Symbol):
            return super().call_binop(context, operator, left, right)
        if operator != "+" or not all(type(one) in (str, Symbol) for one in (left, right)):
            raise NotTraceable
        for value in (left, right):
            self.counted(value)
        return self.concat([left, right])

    def call(__self, __context: Context, __function: Any, *args: Any, **kwargs: Any) -> Any:
        """Return ``function(*args, **kwargs)``."""
        if __self._now is not None and __function is __self._now:  # another answer, another record
            if kwargs:
                raise NotTraceable
            return __self.recorder.ask(__self._now, *map(_plain, args))
        return super().call(__context, __function, *args, **kwargs)


def _traced(name: str, function: Any) -> Any:
    """A filter that refuses symbols, unless it is known what it does with them."""
    if name in ("default", "d"):
        return function  # it returns the symbol, and at most asks whether it is empty

    def traced(*args: Any, **kwargs: Any) -> Any:
        symbols = [isinstance(one, Symbol) for one in (*args, *kwargs.values())]
        if not any(symbols):
            return function(*args, **kwargs)
        if name != "trim" or symbols != [True] + [False] * (len(symbols) - 1) or kwargs:
            raise NotTraceable
        return args[0].strip(*args[1:])

    return _like(function, traced)


# Tests whose answer for a symbol is that for text, or is recorded.
_TRUE_OF_TEXT = ("string", "iterable", "sequence")
_SAFE_TESTS = (
    *("defined", "undefined", "none", "mapping", "number", "integer", "float", "boolean"),
    *("true", "false", "callable", "==", "eq", "equalto", "!=", "ne", "in"),
)


def _traced_test(name: str, test: Any) -> Any:
    """A test that is true for text, or refuses symbols, unless it is known what it does."""
    if name in _SAFE_TESTS:
        return test

    def traced(*args: Any) -> Any:
        if not any(isinstance(one, Symbol) for one in args):
            return test(*args)
        if name not in _TRUE_OF_TEXT:
            raise NotTraceable
        return True

    return _like(test, traced)


def _like(function: Any, other: Any) -> Any:
    """Give another function what jinja2 passes the first one in front of its arguments."""
    if hasattr(function, "jinja_pass_arg"):
        other.jinja_pass_arg = function.jinja_pass_arg
    return other
