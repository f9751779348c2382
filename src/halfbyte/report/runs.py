"""A run as read from its journal, for drawing and comparing runs.

A journal may come from anywhere, so nothing in it is trusted: a number is a number or None, text is
converted to a string, and fields that are missing or of another type are dropped. Text is raw here
and escaped when it is written into a page.
"""

import math
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from halfbyte.errors import ConfigError
from halfbyte.report.journal import read_journal

Point = tuple[float, float]

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
    curves: dict[str, list[Point]] = field(default_factory=lambda: {name: [] for name in _CURVES})
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
        return int(max((step for curve in self.curves.values() for step, _ in curve), default=0))

    def last(self, curve: str) -> float | None:
        """The last value of a curve."""
        points = self.held_out if curve == "held_out" else self.curves[curve]
        return points[-1][1] if points else None

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
        curve = [value for _, value in self.curves["peak_memory_bytes"]]
        return max([*curve, *([] if measured is None else [measured])], default=None)


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
    run = Run(name=file.resolve().parent.name, path=file.parent)
    speeds: list[tuple[float, float]] = []
    answers: dict[str, dict[str, Any]] = {}
    for line in lines:
        _take(run, line, speeds, answers)
    run.samples = list(answers.values())
    for activity in (_WHOLE_STEP, *_STEP_PARTS.values(), _REST_OF_STEP):
        if activity in run.seconds and speeds:  # of the steps reported, which may be one in many
            run.seconds[activity] *= max(1.0, run.steps / len(speeds))
    del speeds[: min(5, len(speeds) // 4)]
    seconds = sum(taken for _, taken in speeds)
    run.tokens_per_second = sum(tokens for tokens, _ in speeds) / seconds if seconds > 0 else None
    if run.finished:
        run.state = "finished"
    elif not run.state:
        heard = str(lines[-1].get("time", ""))[:19].replace("T", " ") if lines else ""
        run.state = f"not finished: in progress, or killed; last update {heard} UTC"
    return run


def _take(
    run: Run, line: dict[str, Any], speeds: list[tuple[float, float]], answers: dict[str, Any]
) -> None:
    event, step = line.get("event"), number(line.get("step"))
    if step is not None and not 0 <= step < _MOST_STEPS:
        return
    if event == "begin":
        run.begin, run.finish, run.state = line, {}, ""
    elif event == "loaded":
        run.loaded = line
        _spend(run, "loading the model", line.get("seconds"))
    elif event == "memory":
        run.memory = line
    elif event == "finish":
        run.finish = line
    elif event == "stopped":
        run.state = f"stopped: {line.get('reason')}"
    elif event == "note":
        run.notes.append(str(line.get("text")))
    elif event == "warning":
        if (text := str(line.get("text"))) not in run.warnings:  # a resumed run says it again
            run.warnings.append(text)
    elif event == "step" and step is not None:
        for name, curve in run.curves.items():
            if (value := number(line.get(name))) is not None:
                curve.append((step, value))
        taken, tokens = number(line.get("seconds")), number(line.get("tokens"))
        if taken and tokens:
            speeds.append((tokens, taken))
        rest = taken or 0.0
        for name, activity in _STEP_PARTS.items():
            part = min(rest, number(line.get(f"{name}_seconds")) or 0.0)
            _spend(run, activity, part)
            rest -= part
        _spend(run, _REST_OF_STEP if "backward_seconds" in line else _WHOLE_STEP, rest)
    elif event == "evaluation" and step is not None:
        if (loss := number(line.get("loss"))) is not None:
            run.held_out.append((step, loss))
        _spend(run, "held-out evaluation", line.get("seconds"))
    elif event == "samples" and step is not None:
        _spend(run, "sample answers", line.get("seconds"))
        found = line.get("samples")
        for sample in map(mapping, found if isinstance(found, list) else []):
            prompt = str(sample.get("prompt"))
            one = answers.setdefault(
                prompt, {"prompt": prompt, "expected": str(sample.get("expected")), "answers": {}}
            )
            one["answers"][int(step)] = str(sample.get("got"))


def _spend(run: Run, activity: str, seconds: Any) -> None:
    if (taken := number(seconds)) is not None and taken > 0:
        run.seconds[activity] = run.seconds.get(activity, 0.0) + taken


def started(run: Run) -> str:
    """Start time, as ``2026-11-24 12:30 UTC``; empty if the journal has none."""
    try:
        return datetime.fromisoformat(str(run.begin.get("time"))).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return ""
