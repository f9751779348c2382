"""The journal: whole lines, each step once, and always JSON."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.errors import OutputError
from halfbyte.report.journal import Journal, read_journal


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_journal(path) if record["event"] == "step"]


def with_steps(path: Path, last: int) -> Path:
    with Journal(path) as journal:
        journal.write("begin", {"start_step": 0})
        for step in range(1, last + 1):
            journal.write("step", {"step": step, "loss": 1 / step})
    return path


def test_a_line_is_one_object_with_event_and_time(tmp_path: Path) -> None:
    with Journal(tmp_path / "run" / "journal.jsonl") as journal:
        journal.write("note", {"text": "naïve\n“line” \u2028 two", "path": Path("a/b")})
    [line] = (tmp_path / "run" / "journal.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    record = json.loads(line)
    assert record["event"] == "note"
    assert record["time"].endswith("+00:00")
    assert record["text"] == "naïve\n“line” \u2028 two"
    assert record["path"] == "a/b"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stays_json(tmp_path: Path, value: float) -> None:
    with Journal(tmp_path / "j") as journal:
        journal.write("step", {"step": 1, "loss": value, "grad_norm": 2.0})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads((tmp_path / "j").read_text(), parse_constant=refuse)
    assert record["loss"] is None
    assert record["non_finite"] == {"loss": str(value)}
    assert record["grad_norm"] == 2.0


def test_it_can_be_printed_and_holds_any_text(tmp_path: Path) -> None:
    text = "\x1b[31m \x9b \u202e \udcff é"
    with Journal(tmp_path / "j") as journal:
        journal.write("note", {"text": text})
    printed = (tmp_path / "j").read_text(encoding="utf-8")
    assert not set(printed) & set("\x1b\x9b\u202e")
    assert read_journal(tmp_path / "j")[0]["text"] == text


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_another_file_that_is_linked_to_is_not_written(tmp_path: Path, link: Any) -> None:
    other = with_steps(tmp_path / "other", 3)
    before = other.read_bytes()
    link(other, tmp_path / "j")
    with Journal(tmp_path / "j") as journal:
        journal.truncate_after(2)
        journal.write("step", {"step": 3, "loss": 0.5})
    assert other.read_bytes() == before
    assert steps(tmp_path / "j") == [1, 2, 3]


def test_a_pipe_is_no_journal(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "j")
    with pytest.raises(OutputError, match="expected a file, found a pipe"):
        Journal(tmp_path / "j")
    with pytest.raises(OSError, match="expected a file, found a pipe"):
        read_journal(tmp_path / "j")


@given(st.integers(0, 300))
def test_a_torn_line_is_left_out_and_then_cut_off(tmp_path_factory, torn: int) -> None:
    path = with_steps(tmp_path_factory.mktemp("torn") / "j", 3)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - torn])
    left = steps(path)
    assert left == [1, 2, 3][: len(left)]
    with Journal(path) as journal:
        journal.write("step", {"step": len(left) + 1})
    assert steps(path) == [*left, len(left) + 1]
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    path = with_steps(tmp_path / "j", 7)
    with Journal(path) as journal:
        journal.truncate_after(5)
        journal.write("begin", {"start_step": 5})
        journal.write("step", {"step": 6})
    assert steps(path) == [1, 2, 3, 4, 5, 6]


def test_what_lies_after_the_checkpoint_goes_whatever_it_is(tmp_path: Path) -> None:
    path = with_steps(tmp_path / "j", 2)
    with Journal(path) as journal:
        journal.write("saved", {"path": "checkpoint-2"})
        journal.write("evaluation", {"step": 3})
        journal.write("note", {"text": "said after step 3"})
        journal.truncate_after(2)
    assert [record["event"] for record in read_journal(path)] == ["begin", "step", "step", "saved"]


def test_a_run_from_the_start_has_no_past(tmp_path: Path) -> None:
    path = with_steps(tmp_path / "j", 4)
    with Journal(path) as journal:
        journal.truncate_after(0)
    assert path.read_bytes() == b""


def test_a_killed_process_loses_nothing_that_was_written(tmp_path: Path) -> None:
    path = tmp_path / "j"
    program = (
        "import sys, time\n"
        "from halfbyte.report.journal import Journal\n"
        "journal = Journal(sys.argv[1])\n"
        "for step in range(1, 101): journal.write('step', {'step': step})\n"
        "print('written', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    assert steps(path) == list(range(1, 101))


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write the journal .*file/journal.jsonl"):
        Journal(tmp_path / "file" / "journal.jsonl")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, journal._file)
    os.close(full)
    with journal, pytest.raises(OutputError, match="No space left on device"):
        journal.write("note", {"text": "x"})


def test_writing_is_fast_enough_for_every_step(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        began = time.perf_counter()
        for step in range(1000):
            journal.write("step", {"step": step, "loss": 0.5, "learning_rate": 1e-4})
        assert time.perf_counter() - began < 1.0  # about 0.02 s
