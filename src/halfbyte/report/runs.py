"""A run as read from its journal, for drawing and comparing runs.

A journal may come from anywhere, so nothing in it is trusted: a number is a number or None, text is
converted to a string, and fields that are missing or of another type are dropped. Text is raw here
and escaped when it is written into a page.
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from halfbyte.errors import ConfigError
from halfbyte.report.curve import Curve, Point
from halfbyte.report.journal import read_journal

_STEP_PARTS = {
    "data": "preparing batches",
    "forward": "forward",
    "loss": "loss",
    "backward": "backward",
    "update": "optimizer",
}
# The rest of a step: all of it if an engine reports no parts.
_WHOLE_STEP, _REST_OF_STEP = "forward and backward", "rest of a step"

_MOST_STEPS = 1e12
_BUILDING = 5  # first steps, which build what later ones reuse
_RECENT = 50  # lines of steps from which the pace is taken

# Fields of a step's line that become curves.
_CURVES = (
    *("loss", "grad_norm", "learning_rate", "tokens_per_second", "peak_memory_bytes"),
    *("paged_bytes", "paging_ms"),
)


def number(value: Any) -> float | None:
    """``value`` if it is a finite number that can be drawn; else None."""
    plain = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if plain and math.isfinite(value) else None


def mapping(value: Any) -> dict[str, Any]:
    """``value`` if it is a mapping; else an empty one."""
    return value if isinstance(value, dict) else {}


def texts(value: Any) -> list[str]:
    """The items of a list as strings; empty for anything else."""
    return [str(one) for one in value] if isinstance(value, list) else []


@dataclass
class Run:
    """A run as read from its journal.

    Attributes:
        name: Name of the run on a page.
        path: Its directory.
        begin: The metadata of the last ``begin`` line.
        loaded: The last ``loaded`` line.
        memory: The last ``memory`` line, which compares the ledger with measurements.
        finish: The ``finish`` line, or nothing while there is none.
        state: ``finished``, or in words why not.
        phase: The same in a word: ``finished``, ``stopped``, or ``open`` if neither is in the
            journal. Who follows the run as it is made (`report.following`) knows more:
            ``waiting``, ``loading``, ``running``, ``died``.
        heard: Time of the last line (ISO 8601); empty if there is none.
        pace: Seconds a step by the clock, evaluations and checkpoints included, over the last
            lines; None before the second step.
        curves: For each field of a step's line, (step, value).
        held_out: (step, loss) of every evaluation.
        seconds: Where the time of the whole run went, by activity.
        tokens_per_second: Without the first few steps, which build what later ones reuse.
        samples: For each prompt ``prompt``, ``expected``, and ``answers`` by step.
        notes: Everything that was announced.
        warnings: What went wrong in its steps.
    """

    name: str
    path: Path
    begin: dict[str, Any] = field(default_factory=dict)
    loaded: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    finish: dict[str, Any] = field(default_factory=dict)
    state: str = ""
    phase: str = "open"
    heard: str = ""
    pace: float | None = None
    curves: dict[str, Curve] = field(default_factory=lambda: {name: Curve() for name in _CURVES})
    held_out: list[Point] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    tokens_per_second: float | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether the run has finished."""
        return bool(self.finish)

    @property
    def steps(self) -> int:
        """The last step that was reported."""
        return int(max(curve.furthest for curve in self.curves.values()))

    def last(self, curve: str) -> float | None:
        """The last value of a curve."""
        if curve == "held_out":
            return self.held_out[-1][1] if self.held_out else None
        return self.curves[curve].last

    @property
    def step_seconds(self) -> dict[str, float]:
        """The mean time of each part of a step."""
        parts = (_WHOLE_STEP, *_STEP_PARTS.values(), _REST_OF_STEP)
        return {name: self.seconds[name] / self.steps for name in parts if name in self.seconds}

    @property
    def predicted(self) -> list[tuple[str, float]]:
        """The parts of the predicted peak, in bytes, those of a step as one."""
        total = number(self.memory.get("predicted_bytes"))
        ledger = self.memory.get("ledger")
        parts: dict[str, float] = {}
        for entry in map(mapping, ledger if isinstance(ledger, list) else []):
            nbytes, group = number(entry.get("nbytes")), entry.get("group")
            name = "base" if group == "base" else str(entry.get("name")).partition(",")[0]
            if nbytes is not None and nbytes > 0 and group not in ("step", "host"):
                parts[name] = parts.get(name, 0.0) + nbytes
        if total is not None and total > sum(parts.values()):
            parts["activations, workspace, program"] = total - sum(parts.values())
        return list(parts.items())

    @property
    def peak_bytes(self) -> float | None:
        """Peak memory."""
        measured = number(self.finish.get("peak_memory_bytes"))
        highest = self.curves["peak_memory_bytes"].highest
        return max((one for one in (measured, highest) if one is not None), default=None)

    @property
    def seconds_left(self) -> float | None:
        """Time until the last step, as of the last line, at the pace of the last lines."""
        total = number(self.begin.get("total_steps"))
        if total is None or self.pace is None or total < self.steps:
            return None
        return self.pace * (total - self.steps)


def read_run(directory: str | Path) -> Run:
    """Read the journal in a run's directory.

    Args:
        directory: A run's directory, or a journal itself.

    Raises:
        ConfigError: There is no journal.
    """
    path = Path(directory)
    file = path / "journal.jsonl" if path.is_dir() else path
    try:
        lines = read_journal(file)
    except OSError as error:
        raise ConfigError(
            f"{directory} contains no journal of a run: expected {file} ({error.strerror})"
        ) from error
    if not lines and file.stat().st_size:
        raise ConfigError(f"{file} is not the journal of a run: no line of it is a JSON object")
    return RunReader(file).read(lines).run()


class RunReader:
    """Reads a run line by line, so that a journal can be read as it is written.

    Args:
        file: The journal.
    """

    def __init__(self, file: Path) -> None:
        self._run = Run(name=file.resolve().parent.name, path=file.parent)
        self._answers: dict[str, dict[str, Any]] = {}
        self._warned: set[str] = set()
        self._first: list[tuple[float, float]] = []  # tokens and seconds of the first steps
        self._tokens = self._seconds = 0.0  # of the others
        self._reported = 0
        self._recent: deque[tuple[str, float]] = deque(maxlen=_RECENT)  # times and steps

    def read(self, lines: Iterable[dict[str, Any]]) -> "RunReader":
        """Add lines of the journal."""
        for line in lines:
            self._take(line)
        return self

    def run(self) -> Run:
        """The run as far as it was read. It shares the curves of this object."""
        run = replace(self._run, samples=list(self._answers.values()))
        run.seconds = dict(run.seconds)
        for activity in (_WHOLE_STEP, *_STEP_PARTS.values(), _REST_OF_STEP):
            if activity in run.seconds and self._reported:  # which may be one step in many
                run.seconds[activity] *= max(1.0, run.steps / self._reported)
        counted = self._first[min(_BUILDING, self._reported // 4) :]
        tokens = self._tokens + sum(tokens for tokens, _ in counted)
        seconds = self._seconds + sum(taken for _, taken in counted)
        run.tokens_per_second = tokens / seconds if seconds > 0 else None
        run.pace = self._pace()
        if run.finished:
            run.state, run.phase = "finished", "finished"
        elif not run.state:
            heard = run.heard[:19].replace("T", " ")
            run.state = f"not finished: in progress, or killed; last update {heard} UTC"
        return run

    def _pace(self) -> float | None:
        if len(self._recent) < 2:
            return None
        (began, first), (ended, last) = self._recent[0], self._recent[-1]
        try:
            taken = datetime.fromisoformat(ended) - datetime.fromisoformat(began)
        except (ValueError, TypeError):  # not times, or one of them without a zone
            return None
        return taken.total_seconds() / (last - first) if last > first else None

    def _take(self, line: dict[str, Any]) -> None:
        run = self._run
        event, step = line.get("event"), number(line.get("step"))
        if step is not None and not 0 <= step < _MOST_STEPS:
            return
        if "time" in line:
            run.heard = str(line["time"])
        if event == "begin":
            run.begin, run.finish, run.state, run.phase = line, {}, "", "open"
            self._recent.clear()
        elif event == "loaded":
            run.loaded = line
            self._spend("loading the model", line.get("seconds"))
        elif event == "memory":
            run.memory = line
        elif event == "finish":
            run.finish = line
        elif event == "stopped":
            run.state, run.phase = f"stopped: {line.get('reason')}", "stopped"
        elif event == "note":
            run.notes.append(str(line.get("text")))
        elif event == "warning":
            text = str(line.get("text"))
            if text not in self._warned:  # a resumed run says what it said before
                self._warned.add(text)
                run.warnings.append(text)
        elif event == "step" and step is not None:
            self._take_step(line, step)
        elif event == "evaluation" and step is not None:
            if (loss := number(line.get("loss"))) is not None:
                run.held_out.append((step, loss))
            self._spend("held-out evaluation", line.get("seconds"))
        elif event == "samples" and step is not None:
            self._spend("sample answers", line.get("seconds"))
            found = line.get("samples")
            for sample in map(mapping, found if isinstance(found, list) else []):
                prompt, expected = str(sample.get("prompt")), str(sample.get("expected"))
                new: dict[str, Any] = {"prompt": prompt, "expected": expected, "answers": {}}
                one = self._answers.setdefault(prompt, new)
                one["answers"][int(step)] = str(sample.get("got"))

    def _take_step(self, line: dict[str, Any], step: float) -> None:
        self._recent.append((self._run.heard, step))
        for name, curve in self._run.curves.items():
            if (value := number(line.get(name))) is not None:
                curve.append(step, value)
        taken, tokens = number(line.get("seconds")), number(line.get("tokens"))
        if taken and tokens:
            self._reported += 1
            if len(self._first) < _BUILDING:
                self._first.append((tokens, taken))
            else:
                self._tokens += tokens
                self._seconds += taken
        rest = taken or 0.0
        for name, activity in _STEP_PARTS.items():
            part = min(rest, number(line.get(f"{name}_seconds")) or 0.0)
            self._spend(activity, part)
            rest -= part
        self._spend(_REST_OF_STEP if "backward_seconds" in line else _WHOLE_STEP, rest)

    def _spend(self, activity: str, seconds: Any) -> None:
        if (taken := number(seconds)) is not None and taken > 0:
            spent = self._run.seconds
            spent[activity] = spent.get(activity, 0.0) + taken


def started(run: Run) -> str:
    """Start time, as ``2026-11-24 12:30 UTC``; empty if the journal has none."""
    try:
        return datetime.fromisoformat(str(run.begin.get("time"))).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return ""
