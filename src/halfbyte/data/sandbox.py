"""A sandbox for chat templates, with limits of time, of memory and of output.

A chat template is a program by whoever published the model. It is compiled as transformers compiles
it, with the same filters, functions and tags, in jinja2's sandbox, which keeps it away from files
and from Python. That sandbox lets it run for ever and fill the memory; this one does not.

Its work is counted in steps, not in seconds: whether a row can be rendered must not depend on what
else the machine does. There are two rules.

1. Whenever a list of statements is entered (a loop's body at each iteration, a branch, a macro), it
   costs as many steps as it has syntax nodes.
2. What reads or makes a value (a filter, a call, an operator, an output) costs 10 steps, and one
   more for 8 characters of its operands. A container has as many characters as all it contains,
   an object that it contains twice being counted twice. If the result can be larger than the
   operands (``'a' * 99``, ``replace``, ``center``, formats), its size is computed beforehand.

So no value is larger than ``MOST_CHARACTERS``, and nothing runs for longer than ``MOST_STEPS``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, lru_cache, wraps
from threading import Lock
from typing import Any, NoReturn

from jinja2 import Environment, TemplateError, TemplateSyntaxError, nodes
from jinja2.compiler import CodeGenerator, Frame, operators, optimizeconst
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_STEPS = 10_000_000
"""Steps of one rendering: some seconds. A message costs a few hundred in the longest templates."""

MOST_CHARACTERS = 10_000_000
"""Characters of any value, and of the rendered text: more than the longest context of a model."""

MOST_SOURCE = 100_000
"""Characters of a template. The longest in use have 30,000."""

_STEPS_OF_OPERATION = 10  # which takes as long
_CHARACTERS_PER_STEP = 8
_OBJECT = 16  # characters that count for each object in a container
_MOST_BITS = 10_000  # of an integer: arithmetic on longer ones is slow
_MOST_INDENT = 16  # of `tojson`, whose output grows with depth times indent
_LONGEST_REASON = 200


class TemplateFailed(Exception):
    """A template cannot be compiled, fails, or exceeds a limit; the message names its line."""


class LimitExceeded(Exception):
    """The cause of a `TemplateFailed`, if the template does or makes too much."""


class SymbolicText:
    """Stands for texts of up to a length, in a rendering that is recorded (`template_traces`)."""

    characters: int


@lru_cache(maxsize=16)
def compiled(source: str) -> ChatTemplate:
    """Return the template of this source text, compiled once.

    Raises:
        TemplateFailed: It is too long, or not valid.
    """
    return ChatTemplate(source)


class ChatTemplate:
    """A compiled template.

    Raises:
        TemplateFailed: It is too long, or not valid.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MOST_SOURCE:
            raise TemplateFailed(f"it has more than {MOST_SOURCE:,} characters")
        self._environment = Sandbox(transformers_environment())
        # An environment counts the steps of, and marks the replies in, one rendering at a time.
        self._lock = Lock()
        try:
            self._template = self._environment.from_string(source)
        except Exception as error:  # a syntax error, or nesting too deep for Python's compiler
            _fail(error)

    def render(self, variables: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """Return the text, and the spans of it that are inside ``{% generation %}``.

        Args:
            variables: What the template may use: plain JSON data.

        Raises:
            TemplateFailed: The template fails or exceeds a limit.
        """
        pieces: list[str] = []
        marked: list[tuple[int, int]] = []
        environment: Any = self._environment
        with self._lock, environment.activate_tracker(pieces, marked):
            environment.start()
            try:
                for piece in self._template.generate(variables):
                    pieces.append(piece)  # which the marking of replies reads in between
            except Exception as error:  # of whatever type, it is the template that raises it
                _fail(error)
        text = "".join(pieces)
        if len(text) > MOST_CHARACTERS:
            raise TemplateFailed(f"it writes more than {MOST_CHARACTERS:,} characters")
        return text, marked


def _fail(error: Exception) -> NoReturn:
    """Raise the error as `TemplateFailed`, with the line of the template where it occurred."""
    line, trace = None, error.__traceback__
    while trace is not None:  # jinja2 writes traces as if a template were a Python file
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    if isinstance(error, TemplateSyntaxError):
        line = error.lineno
    reason = " ".join(str(error).split())
    if len(reason) > _LONGEST_REASON:
        reason = reason[:_LONGEST_REASON] + "…"
    # `raise_exception` and our limits say what is wrong; other errors need the name of their type.
    if type(error) not in (TemplateError, LimitExceeded):
        reason = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    raise TemplateFailed(reason + (f", line {line}" if line is not None else "")) from error


@cache
def transformers_environment() -> Environment:
    """Return the environment in which transformers renders chat templates."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment: Environment = _compile_jinja_template("").environment
    return environment


class LimitedCompiler(CodeGenerator):
    """Compiles templates to Python code that counts its steps."""

    def blockvisit(self, block: Iterable[nodes.Node], frame: Frame) -> None:
        """Write statements, and that they cost steps."""
        statements = list(block)
        self.writeline(f"environment.spend({1 + _steps(statements)})")
        super().blockvisit(statements, frame)

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        """Write a loop."""
        if node.test is not None:  # `for … if test` evaluates it outside the loop's body
            spend = nodes.EnvironmentAttribute("spend")
            count = nodes.Call(spend, [nodes.Const(_steps([node.test]))], [], None, None)
            node.test = nodes.And(count, node.test).set_lineno(node.lineno)
        super().visit_For(node, frame)

    @optimizeconst
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """Write ``a ~ b``."""
        self._call("concatenated", node.nodes, frame)

    @optimizeconst
    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        """Write a comparison."""
        operands = [node.expr, *(operand.expr for operand in node.ops)]
        constant = [_is_constant(operand, frame) for operand in operands]
        # Comparing with a constant takes no time, looking for it in something does.
        searches = any(operand.op in ("in", "notin") for operand in node.ops)
        counted = searches or constant.count(False) > 1
        self.write("(")
        for at, operand in enumerate(operands):
            self.write(f" {operators[node.ops[at - 1].op]} " if at else "")
            if counted and not constant[at]:
                self._call("counted", [operand], frame)
            else:
                self.visit(operand, frame)
        self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        """Write a tuple."""
        if node.ctx != "load":
            super().visit_Tuple(node, frame)
            return
        self.write("environment.counted(")  # a key: hashing reads all of it
        super().visit_Tuple(node, frame)
        self.write(")")

    @optimizeconst
    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        """Write ``a[b]``."""
        if isinstance(node.arg, nodes.Slice):
            self._call("sliced", [node.node], frame)
            self.write("[")
            self.visit(node.arg, frame)
            self.write("]")
        else:
            super().visit_Getitem(node, frame)

    def _call(self, method: str, arguments: Iterable[nodes.Node], frame: Frame) -> None:
        self.write(f"environment.{method}(")
        for argument in arguments:
            self.visit(argument, frame)
            self.write(", ")
        self.write(")")


def _steps(statements: Iterable[nodes.Node]) -> int:
    """The syntax nodes that are executed when these are, without those of statements in them."""
    steps, left = 0, list(statements)
    while left:
        node = left.pop()
        text = getattr(node, "data", "") or getattr(node, "value", "")
        steps += 1 + (len(text) // _CHARACTERS_PER_STEP if isinstance(text, str) else 0)
        left += node.iter_child_nodes(exclude=("body", "else_"))
    return steps


def _is_constant(node: nodes.Expr, frame: Frame) -> bool:
    try:
        node.as_const(frame.eval_ctx)
    except nodes.Impossible:
        return False
    return True


# Those that take the same time whatever their operand is.
_FAST_FILTERS = re.compile("attr|count|d|default|first|items|last|length")
_FAST_TESTS = re.compile(
    "boolean|callable|defined|divisibleby|even|false|filter|float|integer|iterable|mapping|none|"
    "number|odd|sameas|sequence|string|test|true|undefined"
)
# Filters that read the items of a container, but not what these contain.
_SHALLOW = re.compile("batch|list|map|random|reject(attr)?|reverse|select(attr)?|slice")


class Sandbox(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, made to count its steps."""

    code_generator_class = LimitedCompiler
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, theirs: Environment) -> None:
        super().__init__(
            trim_blocks=theirs.trim_blocks,
            lstrip_blocks=theirs.lstrip_blocks,
            extensions=[type(extension) for extension in theirs.extensions.values()],
            finalize=self.counted,
        )
        self.globals |= theirs.globals | {"namespace": _namespace(theirs)}
        del self.globals["lipsum"]  # random text, any amount of it
        self.filters = self._limited(theirs.filters, _FAST_FILTERS)
        self.tests = self._limited(theirs.tests, _FAST_TESTS)
        self.start()

    def start(self) -> None:
        """Allow another ``MOST_STEPS``."""
        self._left = MOST_STEPS

    def spend(self, steps: int) -> bool:
        """Count steps; always true."""
        self._left -= steps
        if self._left < 0:
            raise LimitExceeded(f"it takes more than {MOST_STEPS:,} steps")
        return True

    def spend_characters(self, characters: int) -> None:
        """Count an operation on or to so many characters."""
        self._left -= _STEPS_OF_OPERATION + characters // _CHARACTERS_PER_STEP
        if characters > MOST_CHARACTERS:
            raise LimitExceeded(f"it makes a value of more than {MOST_CHARACTERS:,} characters")
        if self._left < 0:
            self.spend(0)

    # Called by compiled templates

    def counted(self, value: Any) -> Any:
        """Count a value that is read, or written, as a whole."""
        self.spend_characters(len(value) if type(value) is str else _size(value))
        return value

    def sliced(self, value: Any) -> Any:
        """Count a value that is sliced."""
        self.spend_characters(_length(value))
        return value

    def concatenated(self, *values: Any) -> str:
        """Return ``a ~ b``."""
        self.spend_characters(sum(map(_size, values)))
        return "".join(map(str, values))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Return ``left operator right``."""
        if operator == "+" and type(left) is str and type(right) is str:  # most of all
            self.spend_characters(len(left) + len(right))
            return left + right
        if operator == "+":
            self.spend_characters(_length(left) + _length(right))
        elif operator == "%" and isinstance(left, str):
            self.spend_characters(_formatted(left, "%", right))
        elif operator == "*":
            times = [value for value in (left, right) if isinstance(value, int)]
            size = max(_length(left), _length(right))
            self.spend_characters(size * max([1, *times]) if size else 1)
        if operator in ("*", "**"):
            _check_bits(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __function: Any, *args: Any, **kwargs: Any) -> Any:
        """Return ``function(*args, **kwargs)``; the names are free of the template's keywords."""
        values = [value for key, value in kwargs.items() if not key.startswith("_")]
        if not isinstance(__function, Macro):
            args = tuple(map(__self._listed, args))
            __self.spend_characters(_cost_of_call(__function, args, values))
        elif __function.catch_varargs or __function.catch_kwargs:
            __self.spend_characters(sum(map(_size, [*args, *values])))
        return super().call(__context, __function, *args, **kwargs)

    # Filters and tests

    def _limited(self, functions: Mapping[str, Any], fast: re.Pattern[str]) -> dict[str, Any]:
        """The filters or tests, made to count their steps unless they are fast."""
        return {
            name: function if fast.fullmatch(name) else self._counting(name, function)
            for name, function in functions.items()
        }

    def _counting(self, name: str, function: Any) -> Any:
        # Some are passed the context, the environment or such first.
        first = int(hasattr(function, "jinja_pass_arg"))

        size = _length if _SHALLOW.fullmatch(name) else _size
        growth = _GROWTH.get(name)

        @wraps(function)
        def limited(*args: Any, **kwargs: Any) -> Any:
            subject, *others = map(self._listed, args[first:])
            cost = size(subject)
            if others or kwargs:
                cost += sum(map(_amount, [*others, *kwargs.values()]))
            if growth is not None:
                cost += growth(subject, *others, **kwargs)
            self.spend_characters(cost)
            result = function(*args[:first], subject, *others, **kwargs)
            # A lazy result is made now, and counted, but stays an iterator: always true, no length.
            return iter(self._listed(result)) if isinstance(result, Iterator) else result

        return limited

    def _listed(self, value: Any) -> Any:
        """The items of an iterator as a list; anything else as it is."""
        if not isinstance(value, Iterator):
            return value
        items = []
        for item in value:
            self.spend(1)
            items.append(item)
        return items


def _namespace(theirs: Environment) -> type:
    class SafeNamespace(theirs.globals["namespace"]):  # type: ignore[misc, name-defined]
        def __repr__(self) -> str:
            # Namespaces can contain each other; what they contain is not counted.
            return "<Namespace>"

    return SafeNamespace


# What operations cost, in characters


def _length(value: Any) -> int:
    """Characters of a text, or items of a container."""
    if isinstance(value, SymbolicText):
        return value.characters
    return len(value) if isinstance(value, str | bytes | list | tuple | dict | range) else 0


def _size(value: Any) -> int:
    """Characters of a value with all it contains, if they are at most ``MOST_CHARACTERS``."""
    size, left = 0, [value]
    while left and size <= MOST_CHARACTERS:
        one = left.pop()
        size += _OBJECT
        kind = type(one)
        if kind is str:
            size += len(one)
        elif kind is dict:
            left += one
            left += one.values()
        elif kind is list or isinstance(one, tuple):
            left += one
        elif isinstance(one, int):
            size += one.bit_length() // 3
        elif isinstance(one, str | bytes | range):
            size += len(one)
        elif isinstance(one, SymbolicText):
            size += one.characters
    return size


def _amount(value: Any) -> int:
    """The size of an argument, which if it is an integer may be a width or a count."""
    return abs(value) if isinstance(value, int) else _size(value)


def _cost_of_call(function: Any, args: Iterable[Any], keywords: Iterable[Any]) -> int:
    # The sandbox wraps `format` and `format_map`.
    method = getattr(function, "__wrapped__", function)
    subject, arguments = getattr(method, "__self__", None), [*args, *keywords]
    if isinstance(subject, str | bytes | int):
        growth = _GROWTH.get(method.__name__)
        grown = growth(subject, *arguments) if growth is not None else 0
        return _size(subject) + sum(map(_amount, arguments)) + grown
    return (_size(subject) if isinstance(subject, list) else _length(subject)) + _size(arguments)


def _check_bits(operator: str, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        bits = bits * abs(right) if operator == "**" else bits + right.bit_length()
        if bits > _MOST_BITS:
            raise LimitExceeded(f"it makes an integer of more than {_MOST_BITS:,} bits")


# By how much a result can be larger than the operands. Methods and filters of a name have the same
# arguments, or those here serve for both.


def _formatted(text: str, field: str, arguments: Any) -> int:
    if re.search(r"%[^a-z%]*\*" if field == "%" else r"\{[^{}]*\{", text):
        raise LimitExceeded("it passes the width of a format as an argument")
    widths = (int(digits[:9]) for digits in re.findall(r"\d+", text))
    return text.count(field) * (_size(arguments) + max(widths, default=0))


def _format(text: str, *args: Any, **keywords: Any) -> int:
    arguments = [*args, *keywords.values()]
    return max(_formatted(text, field, arguments) for field in "%{")


def _replace(text: Any, old: Any, new: Any, count: Any = None) -> int:
    return int(text.count(old) * _length(new)) if isinstance(text, str | bytes) else 0


def _expandtabs(text: Any, tabsize: int = 8) -> int:
    return int(text.count("\t" if isinstance(text, str) else b"\t") * tabsize)


def _indent(s: Any, width: Any = 4, first: Any = False, blank: Any = False) -> int:
    return (1 + str(s).count("\n")) * (width if isinstance(width, int) else _length(width))


def _join(value: Any, d: Any = "", attribute: Any = None) -> int:
    return _length(value) * _length(d)


def _tojson(value: Any, ensure_ascii: Any = False, indent: Any = None, **_: Any) -> int:
    width = indent if isinstance(indent, int) else _length(indent)
    if width > _MOST_INDENT:
        raise LimitExceeded(f"it indents JSON by more than {_MOST_INDENT}")
    return _size(value) * width if width else 0


def _translate(text: Any, table: Any) -> int:
    return _length(text) * _size(table)


def _wordwrap(
    s: Any, width: Any = 79, break_long_words: Any = True, wrapstring: Any = None, **_: Any
) -> int:
    return _length(s) * _length(wrapstring)


_GROWTH: dict[str, Callable[..., int]] = {
    "expandtabs": _expandtabs,
    "format": _format,
    "format_map": _format,
    "indent": _indent,
    "join": _join,
    "replace": _replace,
    "tojson": _tojson,
    "translate": _translate,
    "wordwrap": _wordwrap,
}
