"""The screens: what a pipe gets, what a terminal shows, and what it costs."""

import io
import logging
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from halfbyte.report import RunReport, open_report
from halfbyte.report.journal import read_journal
from halfbyte.report.live import (
    LiveScreen,
    Pace,
    PlainScreen,
    duration,
    open_screen,
    size,
    sparkline,
)


def record(step: int, loss: float = 0.5) -> dict[str, Any]:
    return {
        "step": step,
        "loss": loss,
        "grad_norm": 1.0,
        "learning_rate": 1e-4,
        "tokens": 1024,
        "tokens_per_second": 1612.4,
        "peak_memory_bytes": 1_120_000_000,
        "seconds": 0.1,
    }


def a_run(report: RunReport) -> None:
    with report:
        with report.task("loading the model", 2) as progress:
            progress(1, 2)
            progress(2, 2)
        report.note("`r: 4` read as `lora_r: 4`")
        report.begin(total_steps=10, start_step=0, metadata={"model": "m", "adapters": "7 linears"})
        for step in range(1, 11):
            report.step(record(step, 1 / step))
        report.evaluation({"step": 10, "loss": 0.1, "perplexity": 1.1, "exact_match": 0.975})
        report.saved("out/checkpoint-10")
        report.finish({"steps": 10, "seconds": 70.2, "final_loss": 0.1})


def terminal(width: int = 80) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=True, width=width, height=25, color_system=None
    )


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_pipe_gets_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(open_report(tmp_path))
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert re.fullmatch(r"loading the model: 0\.\d s", lines[0])
    assert lines[1:3] == ["`r: 4` read as `lora_r: 4`", "training: steps 1 to 10"]
    assert re.fullmatch(
        r"step  3/10  loss 0\.3333  rate 1\.00e-04  1,612 tokens/s  memory 1\.12 GB  0 s left",
        lines[5],
    )
    assert lines[-4:] == [
        "step 10, evaluation: loss 0.1000, perplexity 1.10, exact match 97.5 %",
        "saved out/checkpoint-10",
        f"saved {tmp_path / 'report.html'}",
        "10 steps in 1:10, loss 0.1000",
    ]
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", err)


def test_the_journal_holds_the_same_run(tmp_path: Path) -> None:
    a_run(open_report(tmp_path, quiet=True))
    records = read_journal(tmp_path / "journal.jsonl")
    assert [one["event"] for one in records] == [
        "note",
        "begin",
        *["step"] * 10,
        "evaluation",
        "saved",
        "finish",
    ]
    assert records[1]["total_steps"] == 10
    assert records[1]["model"] == "m"
    assert records[4] == record(3, 1 / 3) | {"event": "step", "time": records[4]["time"]}


def test_a_resumed_run_continues_its_journal(tmp_path: Path) -> None:
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        with open_report(tmp_path, quiet=True) as report:
            report.note(f"from {start}")
            report.begin(total_steps=4, start_step=start, metadata={})
            for step in steps:
                report.step(record(step))
    records = read_journal(tmp_path / "journal.jsonl")
    assert [one["step"] for one in records if one["event"] == "step"] == [1, 2, 3, 4]
    assert [one["text"] for one in records if one["event"] == "note"] == ["from 0", "from 2"]


def test_a_run_that_never_begins_leaves_no_file(tmp_path: Path) -> None:
    with open_report(tmp_path / "out", quiet=True) as report:
        report.note("the data is empty")
    assert list(tmp_path.iterdir()) == []


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    a_run(open_report(quiet=True))
    assert capsys.readouterr() == ("", "")


def test_our_own_warnings_become_notes(capsys: pytest.CaptureFixture[str]) -> None:
    with open_report():
        logging.getLogger("halfbyte.quant").warning("no %s here", "compiler")
    assert capsys.readouterr().err == "no compiler here\n"
    assert logging.getLogger("halfbyte").handlers == []


def test_a_long_task_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with PlainScreen(stream).task("evaluating", 4) as progress:
        for done, seconds in ((1, 20.0), (2, 21.0), (3, 50.0)):
            now[0] = seconds
            progress(done, 4)
    assert stream.getvalue() == "evaluating: 25 %\nevaluating: 75 %\nevaluating: 50.0 s\n"


def test_a_failed_task_is_not_said_to_be_done() -> None:
    stream, console = io.StringIO(), terminal()
    for screen in (PlainScreen(stream), LiveScreen(console)):
        with pytest.raises(KeyError), screen.task("loading", 3):
            raise KeyError
    assert stream.getvalue() == ""
    assert "loading:" not in shown(console)


def drawn(screen: LiveScreen, width: int) -> list[str]:
    """The lines of the display as it would be drawn now."""
    console = terminal(width)
    console.print(screen)
    return shown(console).splitlines()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_display_fits_the_terminal(width: int) -> None:
    screen = LiveScreen(terminal(width))
    screen.begin(total_steps=120, start_step=0, metadata={"model": "m"})
    for step in range(1, 35):
        screen.step(record(step, 3 / step))
    bar, numbers = drawn(screen, width)
    screen.close()
    assert bar.startswith("training ━")
    assert "34/120" in bar
    assert " left" in bar
    assert numbers.startswith("loss 0.")
    assert "rate 1.00e-04" in numbers
    assert "10,240 tokens/s" in numbers  # 1024 tokens in 0.1 s, whatever the last step made
    assert all(len(line) <= min(width, 100) for line in (bar, numbers))
    if width >= 80:  # narrower ones lose the sparkline first, and then the memory
        assert "█" in numbers
        assert numbers.rstrip().endswith("10,240 tokens/s   memory 1.12 GB")


def test_the_display_shows_bars_of_tasks_while_they_last() -> None:
    screen = LiveScreen(terminal())
    with screen.task("evaluating", 4) as progress:
        progress(1, 4)
        [bar] = drawn(screen, 80)
        assert bar.startswith("evaluating ━")
        assert bar.rstrip().endswith("25%")
    assert re.search(r"\revaluating: 0\.\d s\n$", shown(screen._console))


def test_a_terminal_keeps_what_was_announced() -> None:
    console = terminal()
    screen = LiveScreen(console)
    a_run(RunReport(screen, None))
    text = shown(console)
    for line in (
        "`r: 4` read as `lora_r: 4`",
        "step 10, evaluation: loss 0.1000, perplexity 1.10, exact match 97.5 %",
        "saved out/checkpoint-10",
        "10 steps in 1:10, loss 0.1000  █▄▃▂▂▂▁▁▁▁",
    ):
        assert line in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h")  # each hidden cursor comes back


def test_what_goes_wrong_and_a_stop_stay_on_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    stream = io.StringIO()
    screen = LiveScreen(Console(file=stream, force_terminal=True, width=80))
    screen.warning("the loss jumped")
    screen.stopping("step 3 is saved first")
    shown = stream.getvalue()
    assert "warning: the loss jumped" in shown
    assert "step 3 is saved first" in shown
    assert shown.endswith("\x1b[?25h")  # the cursor
    plain = PlainScreen()
    plain.warning("the loss jumped")
    plain.stopping("step 3 is saved first")
    assert capsys.readouterr().err == "warning: the loss jumped\nstep 3 is saved first\n"


def test_notes_are_not_taken_for_markup() -> None:
    console = terminal()
    LiveScreen(console).note("target_modules [bold]q_proj[/bold] :smile:")
    assert shown(console) == "target_modules [bold]q_proj[/bold] :smile:\n"


def test_a_step_costs_the_loop_next_to_nothing() -> None:
    screen = LiveScreen(terminal())
    screen.begin(total_steps=20_000, start_step=0, metadata={})
    began = time.perf_counter()
    for step in range(1, 20_001):
        screen.step(record(step))
    each = (time.perf_counter() - began) / 20_000
    screen.close()
    assert each < 200e-6  # about 3 µs


def test_the_screen_suits_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    assert type(open_screen()) is PlainScreen
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert type(open_screen()) is LiveScreen
    monkeypatch.setenv("TERM", "dumb")
    assert type(open_screen()) is PlainScreen


def test_the_smoothed_loss_begins_at_the_loss() -> None:
    pace = Pace(10, 0)
    pace.update(record(1, 3.0))
    assert pace.loss == pytest.approx(3.0)
    pace.update(record(2, 1.0))
    assert pace.loss == pytest.approx((0.9 * 0.1 * 3.0 + 0.1 * 1.0) / 0.19)


def test_a_step_that_was_left_out_is_not_part_of_the_smoothed_loss() -> None:
    pace = Pace(10, 0)
    pace.update({"step": 1, "loss": math.nan})
    assert math.isnan(pace.loss)
    for step, loss in ((2, 2.0), (3, math.inf), (4, 2.0)):
        pace.update({"step": step, "loss": loss})
    assert pace.loss == pytest.approx(2.0)
    assert pace.losses == [2.0, 2.0]
    assert pace.step == 4


def test_time_left_is_at_the_pace_of_this_session(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    pace = Pace(110, 100)
    assert pace.time_left == ""
    now += 20.0
    pace.update(record(102))
    assert pace.time_left == "1:20 left"
    now += 5.0
    assert pace.time_left == "1:15 left"


@pytest.mark.parametrize("steps", [1, 255, 256, 1000, 5000])
def test_the_history_of_losses_stays_small_and_true(steps: int) -> None:
    pace = Pace(steps, 0)
    for step in range(1, steps + 1):
        pace.update(record(step, float(step)))
    assert len(pace.losses) < 256
    shares = [b - a for a, b in zip(pace.losses[:-1], pace.losses[1:], strict=True)]
    assert len(set(shares)) <= 1


@given(
    st.lists(st.floats(-1e9, 1e9) | st.just(math.nan) | st.just(math.inf), max_size=200),
    st.integers(-1, 40),
)
def test_a_sparkline_is_never_wider_than_asked(values: list[float], width: int) -> None:
    bars = sparkline(values, width)
    assert len(bars) <= max(width, 0)
    assert set(bars) <= set("▁▂▃▄▅▆▇█")


def test_a_sparkline() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([7, 7, 0, 0], 2) == "█▁"
    assert sparkline([1, 1, 1], 8) == "▁▁▁"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (60, "1:00"), (245.4, "4:05"), (3723, "1:02:03")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (999_600, "1 MB"), (1.12e9, "1.12 GB"), (3e12, "3000.00 GB")],
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text
