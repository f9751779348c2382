"""The screen of a run: a live display on a terminal, plain lines in a file or a pipe.

On a terminal two lines below all messages are redrawn at most four times a second by a separate
thread, so that a step costs the loop no more than storing its numbers::

    training ━━━━━━━━━━━━━━━━━━╸━━━━━━━━━━━━━━━━━━━━━━━━━━━━━   34/120   1:02 left
    loss 0.4123 █▇▅▄▃▂▂▁▁   rate 8.10e-04   612 tokens/s   memory 1.12 GB

In a file or a pipe the same numbers are one line per report, without control characters.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from halfbyte.foreign_text import as_message, printable, shorten

_WIDEST = 100
_REFRESHES_PER_SECOND = 4
_SMOOTHING = 0.9
_HISTORY = 256
_SECONDS_BETWEEN_PLAIN_LINES = 15.0


# --- numbers for the user -----------------------------------------------------------------------


def duration(seconds: float) -> str:
    """``3.2 s``, ``4:05`` or ``1:02:03``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: float) -> str:
    """Bytes in decimal units: ``812 kB``, ``1.12 GB``."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def sparkline(values: list[float], width: int) -> str:
    """``values`` as a row of at most ``width`` bars, each the mean of several."""
    finite = [value for value in values if value == value and abs(value) != float("inf")]
    if not finite or width < 1:
        return ""
    bars = min(width, len(finite))
    edges = [len(finite) * bar // bars for bar in range(bars + 1)]
    means = [fmean(finite[a:b]) for a, b in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * ((mean - low) / span)) if span else 0] for mean in means)


def figures(record: dict[str, Any]) -> list[str]:
    """The numbers of a step, of an evaluation or of the end, formatted."""
    say: dict[str, Callable[[Any], str]] = {
        "loss": lambda loss: f"loss {loss:.4f}",
        "final_loss": lambda loss: f"loss {loss:.4f}",
        "perplexity": lambda perplexity: f"perplexity {perplexity:.2f}",
        "exact_match": lambda share: f"exact match {100 * share:.1f} %",
        "cases": lambda cases: f"{cases} cases",
        "learning_rate": lambda rate: f"rate {rate:.2e}",
        "tokens_per_second": lambda speed: f"{speed:,.0f} tokens/s",
        "peak_memory_bytes": lambda count: f"memory {size(count)}",
        "optimizer_device_bytes": lambda count: f"state {size(count)} on the GPU",
        "optimizer_host_bytes": lambda count: f"{size(count)} on the host",
        "paged_bytes": lambda count: f"moved {size(count)}",
        "paging_ms": lambda waited: f"waited {waited:.1f} ms",
    }
    return [words(record[key]) for key, words in say.items() if record.get(key) is not None]


class Pace:
    """Progress of a run: smoothed loss and remaining time."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        """Start with the number of steps."""
        self.total = total_steps
        self.step = start_step
        self.start = start_step
        self.record: dict[str, Any] = {}
        self.losses: list[float] = []
        """At most ``_HISTORY`` means of as many steps each, however long the run is."""
        self._share: list[float] = []
        self._steps_a_share = 1
        self._updates = self._tokens = 0
        self._seconds = 0.0
        self._smoothed = 0.0
        self._began = self._last = time.monotonic()

    def update(self, record: dict[str, Any]) -> None:
        """Add a step."""
        self.step = record["step"]
        self.record = record
        self._tokens += record.get("tokens", 0)
        self._seconds += record.get("seconds", 0.0)
        self._last = time.monotonic()
        if not math.isfinite(record["loss"]):  # of a step that was left out
            return
        self._updates += 1
        self._smoothed = _SMOOTHING * self._smoothed + (1 - _SMOOTHING) * record["loss"]
        self._share.append(record["loss"])
        if len(self._share) == self._steps_a_share:
            self.losses.append(fmean(self._share))
            self._share = []
        if len(self.losses) == _HISTORY:
            self.losses = [fmean(self.losses[i : i + 2]) for i in range(0, _HISTORY, 2)]
            self._steps_a_share *= 2

    @property
    def loss(self) -> float:
        """The exponential mean of the losses, with bias correction."""
        return self._smoothed / (1 - _SMOOTHING**self._updates) if self._updates else math.nan

    @property
    def tokens_per_second(self) -> float | None:
        """Over all steps of this session; None if the records have no times."""
        return self._tokens / self._seconds if self._seconds else None

    @property
    def seconds_left(self) -> float | None:
        """At the mean speed so far; None before the first step."""
        if self.step == self.start:
            return None
        each = (self._last - self._began) / (self.step - self.start)
        return max(0.0, each * (self.total - self.step) - (time.monotonic() - self._last))

    @property
    def time_left(self) -> str:
        """The same in words."""
        left = self.seconds_left
        if left is None:
            return ""
        return f"{left:.0f} s left" if left < 60 else f"{duration(left)} left"


# --- screens ------------------------------------------------------------------------------------


class Screen:
    """A screen that shows nothing; the others show what they override."""

    def note(self, text: str) -> None:
        """Show an announcement."""

    def task(
        self, description: str, total: int | None
    ) -> AbstractContextManager[Callable[[int, int], None]]:
        """Show the progress of a task."""
        return nullcontext(lambda done, total: None)

    def begin(self, *, total_steps: int, start_step: int, metadata: dict[str, Any]) -> None:
        """Show that training begins."""

    def step(self, record: dict[str, Any]) -> None:
        """Show a step."""

    def evaluation(self, record: dict[str, Any]) -> None:
        """Show an evaluation."""

    def warning(self, text: str) -> None:
        """Show that something is wrong."""
        self.note(f"warning: {text}")

    def stopping(self, text: str) -> None:
        """Show that the run has been asked to stop."""
        self.note(text)

    def saved(self, path: str | Path) -> None:
        """Show that something is on disk."""

    def finish(self, record: dict[str, Any]) -> None:
        """Show how it ended."""

    def ended(self, error: BaseException) -> None:
        """Show the error that ends a run; by default the command does."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class PlainScreen(Screen):
    """Lines of text, for a file, a pipe or a simple terminal."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Write to ``stream``, standard error if None."""
        self._stream = stream
        self._pace = Pace(0, 0)

    def note(self, text: str) -> None:
        """One line."""
        self._line(text)

    @contextmanager
    def task(self, description: str, total: int | None) -> Iterator[Callable[[int, int], None]]:
        """A line now and then during the task, and one at its end."""
        began = shown = time.monotonic()

        def progress(done: int, total: int) -> None:
            nonlocal shown
            if time.monotonic() - shown >= _SECONDS_BETWEEN_PLAIN_LINES:
                shown = time.monotonic()
                self._line(f"{description}: {100 * done // max(total, 1)} %")

        yield progress
        self._line(f"{description}: {duration(time.monotonic() - began)}")

    def begin(self, *, total_steps: int, start_step: int, metadata: dict[str, Any]) -> None:
        """One line."""
        self._pace = Pace(total_steps, start_step)
        self._line(f"training: steps {start_step + 1} to {total_steps}")

    def step(self, record: dict[str, Any]) -> None:
        """One line with the loss of this step, not smoothed."""
        self._pace.update(record)
        count = f"step {record['step']:>{len(str(self._pace.total))}}/{self._pace.total}"
        self._line("  ".join([count, *figures(record), self._pace.time_left]))

    def evaluation(self, record: dict[str, Any]) -> None:
        """One line."""
        self._line(evaluation_line(record))

    def saved(self, path: str | Path) -> None:
        """One line."""
        self._line(f"saved {path}")

    def finish(self, record: dict[str, Any]) -> None:
        """One line."""
        self._line(finish_line(record))

    def _line(self, text: str) -> None:
        print(as_message(text.rstrip()), file=self._stream or sys.stderr, flush=True)


class LiveScreen(Screen):
    """The live display of a terminal."""

    def __init__(self, console: Console) -> None:
        """Draw on ``console``; nothing is drawn before a task or training begins."""
        self._console = console
        self._pace: Pace | None = None
        self._live: Live | None = None
        bar = BarColumn(bar_width=None)
        self._training = Progress(
            TextColumn("training"),
            bar,
            TextColumn("{task.completed:.0f}/{task.total:.0f}", style="bold"),
            TextColumn("{task.fields[left]}", style="cyan"),
            console=console,
            expand=True,
        )
        self._tasks = Progress(
            TextColumn("{task.description}", markup=False),
            bar,
            TaskProgressColumn(),
            console=console,
            expand=True,
        )

    def note(self, text: str) -> None:
        """One line above the display."""
        self._print(Text(text, style="dim"))

    @contextmanager
    def task(self, description: str, total: int | None) -> Iterator[Callable[[int, int], None]]:
        """A bar during the task, a line at its end."""
        began = time.monotonic()
        task = self._tasks.add_task(_on_one_line(description), total=total)
        self._show()
        try:
            yield lambda done, total: self._tasks.update(task, completed=done, total=total)
        finally:
            self._tasks.remove_task(task)
            self._hide_if_idle()
        self._print(Text(f"{description}: {duration(time.monotonic() - began)}", style="dim"))

    def begin(self, *, total_steps: int, start_step: int, metadata: dict[str, Any]) -> None:
        """The bar appears."""
        self._pace = Pace(total_steps, start_step)
        self._training.add_task("", total=total_steps, completed=start_step, left="")
        self._show()

    def step(self, record: dict[str, Any]) -> None:
        """Store the numbers; the display's own thread draws them."""
        if self._pace is not None:
            self._pace.update(record)

    def evaluation(self, record: dict[str, Any]) -> None:
        """One line above the display."""
        self._print(Text(evaluation_line(record), style="green"))

    def saved(self, path: str | Path) -> None:
        """One line above the display."""
        self._print(Text(f"saved {path}", style="dim"))

    def warning(self, text: str) -> None:
        """One line above the display that stands out."""
        self._print(Text(f"warning: {text}", style="yellow"))

    def stopping(self, text: str) -> None:
        """One line, and the cursor, since a second signal leaves the terminal as it is."""
        self._print(Text(text, style="bold"))
        self._console.show_cursor(True)

    def finish(self, record: dict[str, Any]) -> None:
        """Remove the display and print a line with its last numbers."""
        losses = self._pace.losses if self._pace else []
        self._pace = None
        self._hide_if_idle()
        self._print(
            Text.assemble((finish_line(record), "bold"), ("  " + sparkline(losses, 16), "cyan"))
        )

    def close(self) -> None:
        """Stop drawing and show the cursor again."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __rich__(self) -> RenderableType:
        """The current display below the messages."""
        parts: list[RenderableType] = []
        if self._tasks.task_ids:
            parts.append(self._tasks)
        if self._pace is not None:
            for task in self._training.task_ids:
                self._training.update(task, completed=self._pace.step, left=self._pace.time_left)
            parts += [self._training, self._numbers(self._pace)]
        return Constrain(Group(*parts), _WIDEST)

    def _numbers(self, pace: Pace) -> Text:
        if not pace.record:
            return Text("the first step takes longest", style="dim")
        speed = pace.tokens_per_second or pace.record.get("tokens_per_second")
        _, *others = figures(pace.record | {"tokens_per_second": speed})
        rest = "".join(f"   {figure}" for figure in others)
        room = min(self._console.width, _WIDEST) - len(rest) - len("loss 0.0000 ")
        return Text.assemble(
            (f"loss {pace.loss:.4f} ", "bold"),
            (sparkline(pace.losses, min(room, 24)), "cyan"),
            rest,
            no_wrap=True,
            overflow="ellipsis",
        )

    def _print(self, line: Text) -> None:
        shown = Text(as_message(line.plain), style=line.style, spans=line.spans)
        self._console.print(Constrain(shown, _WIDEST))

    def _show(self) -> None:
        if self._live is None:
            self._live = Live(
                self,
                console=self._console,
                refresh_per_second=_REFRESHES_PER_SECOND,
                transient=True,
                # Output to a file must not be captured and drawn above the bars.
                redirect_stdout=sys.stdout.isatty(),
            )
            self._live.start()

    def _hide_if_idle(self) -> None:
        # The display is closed between tasks, so that code that writes to standard output there
        # has the terminal to itself.
        if self._pace is None and not self._tasks.task_ids:
            self.close()


def _on_one_line(text: str) -> str:
    return printable(shorten(text), lines=False)


def evaluation_line(record: dict[str, Any]) -> str:
    """An evaluation in one line."""
    after = f"step {record['step']}, " if "step" in record else ""
    rows, of, chosen = map(record.get, ("rows", "of_rows", "adapter_of_step"))
    where = ""
    if chosen is not None:
        where = f" of the adapter of step {chosen} on all {of:,} rows"
    elif rows != of:
        where = f" on {rows:,} of {of:,} rows"
    own = [f"{name} {value:.4g}" for name, value in record.get("metrics", {}).items()]
    best = ["the best so far"] if record.get("best") else []
    return f"{after}evaluation{where}: " + ", ".join([*figures(record), *own, *best])


def finish_line(record: dict[str, Any]) -> str:
    """The end of training in one line."""
    steps = f"{record['steps']} steps" if "steps" in record else "finished"
    took = f" in {duration(record['seconds'])}" if "seconds" in record else ""
    return ", ".join([steps + took, *figures(record)])


def open_screen(*, quiet: bool = False) -> Screen:
    """The screen for standard error; one that shows nothing if ``quiet``."""
    if quiet:
        return Screen()
    console = Console(stderr=True, highlight=False)
    drawable = console.encoding.lower().startswith("utf")  # bars and curves need Unicode
    if console.is_terminal and not console.is_dumb_terminal and drawable:
        return LiveScreen(console)
    return PlainScreen()
