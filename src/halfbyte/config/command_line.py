"""Parses the command line into validated options, and prints ``--help``.

A command's options are a class of ``halfbyte.config.schema``, which alone defines names, types,
defaults and help. Here arguments are only assigned to options: each value stays text until pydantic
validates it together with the values from a YAML file, so that one message lists all errors and it
is known whether an option was given. A parser that converts as it goes and stops at the first error
cannot do that.
"""

import math
import os
import shlex
import shutil
import sys
import textwrap
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import (
    Annotated,
    Any,
    Generic,
    Literal,
    NamedTuple,
    NoReturn,
    TextIO,
    Union,
    get_args,
    get_origin,
)

from pydantic.fields import FieldInfo

from halfbyte.config.aliases import aliases_of, translate
from halfbyte.config.reading import OptionsT, check
from halfbyte.foreign_text import shorten, to_json

_TRUTH_WORDS = {"true", "false", "yes", "no", "on", "off", "1", "0"}


class ParsedArgs(NamedTuple):
    """The arguments of a command line, assigned to options but not yet validated."""

    given: dict[str, Any]
    positional: dict[str, str]
    json: bool
    problems: list[str]


class Request(NamedTuple, Generic[OptionsT]):
    """Validated options, messages about them, and whether to print JSON."""

    options: OptionsT
    notes: list[str]
    json: bool


@dataclass(frozen=True)
class Command(Generic[OptionsT]):
    """One ``halfbyte COMMAND``: its options and help."""

    name: str
    options: type[OptionsT]
    about: str
    example: str
    positional: tuple[str, ...] = ()
    """Fields that are positional arguments; only ``config`` is not a field."""
    many: str = ""
    """The last of them, if it takes any number of arguments."""
    has_json: bool = True
    in_help: tuple[str, ...] = ()
    """The fields that ``--help`` lists; empty for all."""

    def words(self, argv: list[str]) -> ParsedArgs:
        """Assign arguments to options; with ``--help``, print the help and exit."""
        if "--help" in argv or "-h" in argv:
            _leave_with(self.help())
        aliases = aliases_of(self.options)
        flags = {name for name, field in self.options.model_fields.items() if is_flag(field)}
        flags |= {name for name, alias in aliases.items() if alias.is_flag}
        found = ParsedArgs({}, {}, json=False, problems=[])
        free, words = deque(self.positional), deque(argv)
        while words:
            word = words.popleft()
            name, equals, value = word.removeprefix("--").partition("=")
            name = name.replace("-", "_")
            if word.startswith("-") and word != "-" and not word.startswith("--"):
                short = name.removeprefix("_")
                known = short in self.options.model_fields or short in aliases
                hint = f"; did you mean `-{word}`?" if known else ""
                found.problems.append(f"unexpected argument `{shorten(word)}`{hint}")
                if known and short not in flags and words and not equals:
                    words.popleft()  # its value
            elif not word.startswith("--"):
                if free and free[0] == self.many:
                    found.given.setdefault(self.many, []).append(word)
                elif free:
                    found.positional[free.popleft()] = word
                else:
                    found.problems.append(f"unexpected argument `{shorten(word)}`")
            elif name == "json" and self.has_json and not equals:
                found = found._replace(json=True)
            elif equals:
                self._give(found.given, name, value)
            elif name.startswith("no_") and name[3:] in flags:
                found.given[name[3:]] = False
            elif name in flags:
                follows = words and words[0].lower() in _TRUTH_WORDS
                found.given[name] = words.popleft() if follows else True
            elif words and not words[0].startswith("--"):
                self._give(found.given, name, words.popleft())
            elif name in self.options.model_fields or name in aliases:
                found.problems.append(f"`{name}` needs a value")
            else:
                found.given[name] = True
        return found

    def _give(self, given: dict[str, Any], name: str, value: str) -> None:
        """Assign a value; an option that takes several collects them, of others the last counts."""
        alias = aliases_of(self.options).get(name)
        field = self.options.model_fields.get(name if alias is None else alias.field)
        if name in given and field is not None and _takes_several(field):
            before = given[name]
            given[name] = [*(before if isinstance(before, list) else [before]), value]
        else:
            given[name] = value

    def read(self, argv: list[str]) -> Request[OptionsT]:
        """Check the options on a command line.

        Raises:
            ConfigError: All errors, in one message.
        """
        words = self.words(argv)
        ours = translate(words.positional | words.given, self.options)
        options = check(self.options, ours.values, problems=[*words.problems, *ours.problems])
        return Request(options, ours.notes, words.json)

    def help(self) -> str:
        """Usage, description, an example, and every option under its heading."""
        width = min(shutil.get_terminal_size().columns, 100)
        fields = {
            name: field
            for name, field in self.options.model_fields.items()
            if not self.in_help or name in self.in_help
        }
        usage = [
            f"[{name.upper()}.yaml]" if name not in fields else name.upper()
            for name in self.positional
        ]
        usage += ["…"] * bool(self.many)
        usage += [
            f"--{name} {_kind(field)}"
            for name, field in fields.items()
            if field.is_required() and name not in self.positional
        ]
        lines = [
            *textwrap.wrap(
                f"usage: halfbyte {self.name} {' '.join(usage)} [options]",
                width,
                subsequent_indent=" " * (len("usage: halfbyte ") + len(self.name) + 1),
                break_on_hyphens=False,
            ),
            "",
            *textwrap.wrap(self.about, width),
            "",
            f"  {self.example}",
        ]
        for name, field in fields.items():
            if name in self.options.sections:
                lines += ["", self.options.sections[name]]
            form = name.upper() if name in self.positional else _option(name, field)
            lines += _row(form, _effect(field), width)
        lines += ["", "general"]
        if self.has_json:
            lines += _row("--json", "print only the result, as one JSON object", width)
        lines += _row("-h, --help", "print this help", width)
        return "\n".join(lines)


_HELP_COLUMN = 26


def _row(form: str, text: str, width: int) -> list[str]:
    """An option and its description, in one row, or in two if the option is long."""
    indent = " " * _HELP_COLUMN
    below = textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)
    if len(form) + 4 > _HELP_COLUMN:
        return [f"  {form}", *below]
    return [f"  {form:<{_HELP_COLUMN - 2}}{below[0].lstrip()}", *below[1:]]


def is_flag(field: FieldInfo) -> bool:
    """Whether an option is given without a value."""
    return field.annotation is bool


def _type(field: FieldInfo) -> Any:
    """The type of a value; of `int | None`, the first."""
    kind: Any = field.annotation
    if get_origin(kind) in (Union, UnionType):
        kind = get_args(kind)[0]
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _takes_several(field: FieldInfo) -> bool:
    return get_origin(_type(field)) in (tuple, dict)


def choices_of(field: FieldInfo) -> tuple[str, ...]:
    """The values of an option that has a few only, otherwise none."""
    kind = _type(field)
    if get_origin(kind) is tuple:  # several of them
        kind = get_args(kind)[0]
    return get_args(kind) if get_origin(kind) is Literal else ()


_LONGEST_CHOICES = 60  # characters; longer ones are listed in the description


def _kind(field: FieldInfo) -> str:
    """Placeholder of a value: its choices, or its type."""
    if get_origin(kind := _type(field)) is Literal:
        choices = "|".join(get_args(kind))
        return choices if len(choices) <= _LONGEST_CHOICES else "NAME"
    return {int: "N", float: "X", Path: "DIR"}.get(kind, "TEXT")


def _option(name: str, field: FieldInfo) -> str:
    dashed = name.replace("_", "-")
    if is_flag(field):
        return f"--no-{dashed}" if field.default else f"--{dashed}"
    return f"--{dashed} {_kind(field)}"


def _effect(field: FieldInfo) -> str:
    """The help of an option, with its default."""
    text = field.description or ""
    if _kind(field) == "NAME":
        text += f": {', '.join(choices_of(field))}"
    if field.is_required():
        return f"{text} (required)"
    if is_flag(field):
        return f"do not {text}" if field.default else text
    if field.default in (None, (), {}):
        return text
    shown = f"{field.default:g}" if isinstance(field.default, float) else field.default
    if isinstance(shown, tuple):
        shown = ",".join(map(str, shown))
    return f"{text} [{shown}]"


def _leave_with(text: str) -> NoReturn:
    print(text, flush=True)  # flushed here, where a closed pipe is still handled
    raise SystemExit(0)


@contextmanager
def results(*, as_json: bool) -> Iterator[dict[str, Any]]:
    """Collect a command's results; if ``as_json``, print them as one JSON object at the end.

    Everything else that is printed meanwhile, by us or by a library, then goes to standard error.
    """
    result: dict[str, Any] = {}
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        yield result
    if as_json:
        plain = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in result.items()
        }
        print(to_json(plain, ascii_only=not _writes_unicode(sys.stdout)))


def _writes_unicode(stream: TextIO) -> bool:
    return (stream.encoding or "utf-8").lower().startswith("utf")


def invocation(*words: str) -> str:
    """A command line that calls this program from the user's shell."""
    program = "halfbyte"
    if shutil.which(program) is None:
        beside = Path(sys.executable).with_name(program)
        program = os.path.relpath(beside) if beside.exists() else "python -m halfbyte"
    return f"{program} {shlex.join(words)}"
