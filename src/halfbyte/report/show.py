"""Prints results for the user on standard output, in colour on a terminal."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from halfbyte.foreign_text import printable

_WIDEST = 100


def as_text(value: object, style: str = "") -> Text:
    """Return a value as text that neither the terminal nor rich's markup interprets."""
    return Text(printable(str(value)), style=style)


def open_console() -> Console:
    """Return standard output as it is now: it may have been redirected since the last call."""
    console = Console(highlight=False)
    if console.width > _WIDEST:
        console.width = _WIDEST
    return console


def heading(text: str) -> None:
    """Print a heading."""
    console = open_console()
    console.print()
    console.print(Rule(as_text(text, "bold"), align="left", style="dim"))


def paragraph(text: str) -> None:
    """Print a paragraph, wrapped at the terminal's width."""
    open_console().print(as_text(text))


def command(text: str) -> None:
    """Print a command on one line, so that it can be copied."""
    open_console().print(as_text(f"  {text}", "cyan"), soft_wrap=True)


def answer(prompt: str, texts: Mapping[str, str]) -> None:
    """A prompt and the answers to it.

    Args:
        prompt: The prompt.
        texts: Who or when, and the answer.
    """
    console = open_console()
    question = Table.grid(padding=(0, 1))
    question.add_row(Text("›", style="cyan"), as_text(prompt, "bold"))
    console.print()
    console.print(question)
    widest = max(map(len, texts), default=0)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", width=widest)
    grid.add_column(overflow="fold")
    for name, text in texts.items():
        mark = as_text(name, {"✓": "green", "✗": "red"}.get(name, ""))
        grid.add_row(mark, as_text(text.strip() or "(nothing)"))
    console.print(Padding(grid, (0, 0, 0, 2), expand=False))


def outcome(passed: bool, text: str) -> None:
    """Print the outcome of a test."""
    grid = Table.grid(padding=(0, 1))
    mark = Text("✓", style="green") if passed else Text("✗", style="red")
    grid.add_row(mark, as_text(text))
    open_console().print(Padding(grid, (0, 0, 0, 2), expand=False))


def table(rows: Mapping[str, Any]) -> None:
    """Print names and values in two columns."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows.items():
        grid.add_row(as_text(name), as_text(value))
    open_console().print(Padding(grid, (0, 0, 0, 2), expand=False))


def columns(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table with a header, numbers aligned to the right."""
    shown = Table(box=None, padding=(0, 2), header_style="dim")
    for number, head in enumerate(heads):
        # Names stay on one line, and where it is narrow, values break.
        shown.add_column(as_text(head), justify="right" if number else "left", no_wrap=not number)
    for row in rows:
        shown.add_row(*map(as_text, row))
    open_console().print(shown)
