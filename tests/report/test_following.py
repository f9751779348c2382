"""Runs are followed as they are made, truncated, replaced, killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.checkpoint.output_lock import output_lock
from halfbyte.errors import ConfigError
from halfbyte.report import following
from halfbyte.report.following import FollowedJournal, FollowedRun, FollowedRuns, require_journal
from halfbyte.report.journal import Journal
from halfbyte.report.runs import read_run
from tests.report.test_page import journal_lines

NOON = "2026-11-24T12:00:00+00:00"


def add(file: Path, *lines: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as journal:
        journal.write("".join(json.dumps({"time": NOON} | line) + "\n" for line in lines))


def step(number: int, loss: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"event": "step", "step": number, "loss": loss} | more


def age(file: Path, seconds: float = 1000) -> None:
    """Make a file look as if it had not been written for a while."""
    then = time.time() - seconds
    os.utime(file, (then, then))


# --- reading -------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.lists(st.integers(0, 4000), max_size=12), st.integers(1, 5000))
def test_a_journal_read_in_pieces_is_the_journal(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], chunk: int
) -> None:
    """Wherever the writer, or the size of what is read at a time, cuts lines."""
    directory = tmp_path_factory.mktemp("run")
    text = "".join(json.dumps(line) + "\n" for line in journal_lines()).encode()
    followed = FollowedJournal(directory / "journal.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(following, "_CHUNK", chunk)
        for end in [*sorted(cuts), len(text)]:
            (directory / "journal.jsonl").write_bytes(text[:end])
            followed.look()
    whole, ours = read_run(directory), followed.reader.run()
    assert {name: list(curve) for name, curve in ours.curves.items()} == {
        name: list(curve) for name, curve in whole.curves.items()
    }
    for field in ("begin", "finish", "seconds", "samples", "notes", "held_out", "state"):
        assert getattr(ours, field) == getattr(whole, field)
    assert not followed.look()


def test_only_what_is_new_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "journal.jsonl"
    add(file, *(step(i) for i in range(1000)))
    followed = FollowedJournal(file)
    assert followed.look()
    parsed: list[bytes] = []
    parse = following.parse_line
    monkeypatch.setattr(following, "parse_line", lambda line: parsed.append(line) or parse(line))
    assert not followed.look()
    add(file, step(1000))
    assert followed.look()
    assert len(parsed) == 1
    assert followed.reader.run().steps == 1000


def test_a_resumed_run_has_no_step_twice(tmp_path: Path) -> None:
    """Truncated, and grown beyond where it was before the next look."""
    file = tmp_path / "journal.jsonl"
    add(file, {"event": "begin", "total_steps": 40}, *(step(i, 5.0) for i in range(1, 11)))
    followed = FollowedJournal(file)
    followed.look()
    with Journal(file) as journal:
        journal.truncate_after(4)
        for number in range(5, 21):
            journal.write("step", {"step": number, "loss": 2.0})
    assert followed.look()
    steps = [(x, y) for x, y in followed.reader.run().curves["loss"]]
    assert steps == [(i, 5.0) for i in range(1, 5)] + [(i, 2.0) for i in range(5, 21)]


def test_a_journal_that_is_replaced_or_removed_is_forgotten(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    add(file, step(1), step(2))
    followed = FollowedJournal(file)
    followed.look()
    add(tmp_path / "other", step(7))
    (tmp_path / "other").rename(file)
    assert followed.look()
    assert list(followed.reader.run().curves["loss"]) == [(7, 1.0)]
    file.unlink()
    assert followed.look()
    assert not followed.exists
    assert followed.reader.run().steps == 0
    assert not followed.look()


def test_a_line_that_is_not_whole_waits(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    add(file, step(1))
    begun, text = file.read_text(), json.dumps(step(2)) + "\n"
    file.write_text(begun + text[:10])
    followed = FollowedJournal(file)
    followed.look()
    assert followed.reader.run().steps == 1
    file.write_text(begun + text)
    followed.look()
    assert followed.reader.run().steps == 2


# --- who lives -----------------------------------------------------------------------------------


def test_the_states_of_a_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    file = out / "journal.jsonl"
    followed = FollowedRun(out)

    def phase() -> str:
        followed.look()
        return followed.run.phase

    assert phase() == "waiting"
    assert "there is no" in followed.run.state
    with output_lock(out):
        assert phase() == "loading"
        add(file, {"event": "begin", "total_steps": 8}, step(1), step(2))
        assert phase() == "running"
        age(file, 1)
        age(tmp_path / ".out.lock", 2000)
        assert phase() == "running"  # a step may take long
        add(file, {"event": "stopped", "reason": "interrupted"})
        assert phase() == "loading"  # it has stopped, and is begun again
    assert phase() == "stopped"
    assert followed.run.state == "stopped: interrupted"
    file.unlink()
    add(file, {"event": "begin", "total_steps": 8}, step(1), step(2))
    assert phase() == "running"  # a copy that another machine writes
    assert "no process of this machine" in followed.run.state
    age(file)
    (out / "config.yaml").write_text("")
    assert phase() == "died"
    assert "died after step 2: its process has ended" in followed.run.state
    assert f"To go on: halfbyte train {out}/config.yaml --resume" in followed.run.state
    with output_lock(out):
        assert phase() == "loading"
        assert followed.run.state == "starting again; it had died after step 2"
        add(file, step(3))
        assert phase() == "running"
    add(file, {"event": "finish", "steps": 3})
    assert phase() == "finished"


WRITER = """
import sys, time
from halfbyte.checkpoint.output_lock import output_lock
from halfbyte.report.journal import Journal
with output_lock(sys.argv[1]), Journal(sys.argv[1] + "/journal.jsonl") as journal:
    journal.write("begin", {"total_steps": 9})
    journal.write("step", {"step": 1, "loss": 2.5})
    print("written", flush=True)
    time.sleep(60)
"""


def test_a_killed_run_has_died_at_once(tmp_path: Path) -> None:
    followed = FollowedRun(tmp_path / "out")
    words = [sys.executable, "-c", WRITER, str(tmp_path / "out")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        followed.look()
        assert followed.run.phase == "running"
        process.send_signal(signal.SIGKILL)
    assert followed.look()
    assert followed.run.phase == "died"
    assert "died after step 1" in followed.run.state


def test_where_locks_cannot_be_read_it_is_not_said_to_have_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "is_locked", lambda _: None)
    add(tmp_path / "journal.jsonl", {"event": "begin"}, step(1))
    followed = FollowedRun(tmp_path)
    followed.look()
    assert followed.run.phase == "running"
    age(tmp_path / "journal.jsonl")
    followed.look()
    assert followed.run.phase == "unknown"
    assert "running, or killed" in followed.run.state


def test_a_journal_that_cannot_be_read_is_said_and_read_when_it_can(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").mkdir()
    followed = FollowedRun(tmp_path)
    followed.look()
    assert "cannot be read: expected a file, found a directory" in followed.run.state
    (tmp_path / "journal.jsonl").rmdir()
    add(tmp_path / "journal.jsonl", {"event": "finish"})
    followed.look()
    assert followed.run.phase == "finished"


def test_the_time_left_is_by_the_clock_of_the_last_steps(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    add(file, {"event": "begin", "total_steps": 100})
    times = [f"2026-11-24T12:00:{2 * i:02}+00:00" for i in range(1, 11)]
    add(file, *(step(i, time=times[i - 1]) for i in range(1, 11)))
    assert read_run(tmp_path).seconds_left == pytest.approx(180)
    add(file, step(11, time="noon"))
    assert read_run(tmp_path).seconds_left is None


# --- several -------------------------------------------------------------------------------------


def test_a_directory_of_runs_and_those_that_begin_later(tmp_path: Path) -> None:
    for name in ("cmp/qlora/seed-0", "cmp/lora/seed-0"):
        add(tmp_path / name / "journal.jsonl", {"event": "finish"})
    (tmp_path / "cmp" / "data").mkdir()
    (tmp_path / "cmp" / "loop").symlink_to(tmp_path / "cmp")
    runs = FollowedRuns([tmp_path / "cmp"])
    assert runs.look()
    assert [run.path.relative_to(tmp_path).as_posix() for run in runs.runs] == [
        "cmp/lora/seed-0",
        "cmp/qlora/seed-0",
    ]
    assert not runs.look()
    add(tmp_path / "cmp" / "new" / "journal.jsonl", {"event": "begin"})
    assert runs.look()
    assert [run.name for run in runs.runs] == ["seed-0", "new", "seed-0"]


def test_what_is_no_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello\n")
    with pytest.raises(ConfigError, match="is not the journal of a run"):
        require_journal(tmp_path / "notes.txt")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="expected a file, found a pipe"):
        require_journal(tmp_path / "pipe")
    require_journal(tmp_path / "nothing")
    require_journal(tmp_path)
