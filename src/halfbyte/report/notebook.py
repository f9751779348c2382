"""The screen of a notebook: messages, and the progress below them, in one output of the cell.

A kernel can replace an output that it has displayed, in Jupyter, Visual Studio Code and Colab
alike; no widgets are needed, and a saved notebook shows what was there last. The output is replaced
at most twice a second.
"""

import importlib
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

from halfbyte.foreign_text import as_message
from halfbyte.report.live import (
    Pace,
    Screen,
    duration,
    evaluation_line,
    figures,
    finish_line,
    sparkline,
)

_SECONDS_BETWEEN = 0.5
_MOST_LINES = 100
_BAR, _CURVE = 30, 24


class NotebookScreen(Screen):
    """An output of the current cell that is replaced as the run goes on."""

    def __init__(self, display: Callable[..., Any] | None = None) -> None:
        """Display by ``display``, IPython's if None; nothing is before the first message."""
        self._display = display or importlib.import_module("IPython.display").display
        # tqdm says this in every notebook without widgets as soon as a library imports it.
        warnings.filterwarnings("ignore", message="IProgress not found")
        self._handle: Any = None
        self._lines: list[str] = []
        self._tasks: dict[object, str] = {}
        self._pace: Pace | None = None
        self._drawn = 0.0
        self._lock = threading.Lock()  # a run that is asked to stop says so in another thread

    def note(self, text: str) -> None:
        """One line above the progress."""
        self._lines += as_message(text).splitlines()
        self._draw()

    @contextmanager
    def task(self, description: str, total: int | None) -> Iterator[Callable[[int, int], None]]:
        """A line with the share that is done, and at the end with the time it took."""
        began, key = time.monotonic(), object()
        description = as_message(description)

        def progress(done: int, total: int) -> None:
            self._tasks[key] = f"{description}: {100 * done // max(total, 1)} %"
            self._draw(now=False)

        self._tasks[key] = f"{description} …"
        self._draw()
        try:
            yield progress
        finally:
            del self._tasks[key]
        self.note(f"{description}: {duration(time.monotonic() - began)}")

    def begin(self, *, total_steps: int, start_step: int, metadata: dict[str, Any]) -> None:
        """The bar appears."""
        self._pace = Pace(total_steps, start_step)
        self._draw()

    def step(self, record: dict[str, Any]) -> None:
        """The bar and the numbers change."""
        if self._pace is not None:
            self._pace.update(record)
            self._draw(now=record["step"] == self._pace.total)

    def evaluation(self, record: dict[str, Any]) -> None:
        """One line."""
        self.note(evaluation_line(record))

    def saved(self, path: str | Path) -> None:
        """One line."""
        self.note(f"saved {path}")

    def finish(self, record: dict[str, Any]) -> None:
        """The bar becomes a line with its last numbers."""
        losses = self._pace.losses if self._pace is not None else []
        self._pace = None
        self.note(f"{finish_line(record)}  {sparkline(losses, _CURVE)}")

    def close(self) -> None:
        """Show the last state."""
        if self._handle is not None:
            self._draw()

    def _progress(self) -> list[str]:
        lines = list(self._tasks.values())
        if self._pace is None:
            return lines
        pace = self._pace
        done = _BAR * pace.step // max(pace.total, 1)
        bar = "█" * done + "░" * (_BAR - done)
        lines.append(f"training {bar} {pace.step}/{pace.total}   {pace.time_left}".rstrip())
        if not pace.record:
            return [*lines, "the first step takes longest"]
        _, *numbers = figures(pace.record | {"tokens_per_second": pace.tokens_per_second})
        curve = sparkline(pace.losses, _CURVE)
        return [*lines, "   ".join([f"loss {pace.loss:.4f} {curve}".rstrip(), *numbers])]

    def _draw(self, *, now: bool = True) -> None:
        if not now and time.monotonic() - self._drawn < _SECONDS_BETWEEN:
            return
        with self._lock:
            self._drawn = time.monotonic()
            shown = self._lines[-_MOST_LINES:]
            if before := len(self._lines) - len(shown):
                shown = [f"… {before} lines before these are in journal.jsonl", *shown]
            text = "\n".join([*shown, *self._progress()])
            output = {
                "text/plain": text,
                "text/html": f'<pre style="line-height:1.4;margin:0">{escape(text)}</pre>',
            }
            if self._handle is None:
                self._handle = self._display(output, raw=True, display_id=True)
            else:
                self._handle.update(output, raw=True)
