"""Every reader survives damaged files, and the fuzzer finds what it is there to find."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from halfbyte.errors import DataError
from tests.fuzz import campaign, mutation
from tests.fuzz.__main__ import main
from tests.fuzz.campaign import input_of, run
from tests.fuzz.examine import examine, prepare
from tests.fuzz.targets import TARGETS, Target

CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("name", sorted(path.name for path in CORPUS.iterdir()))
def test_what_once_failed_does_not_fail_again(name: str, tmp_path: Path) -> None:
    prepare(TARGETS[name], tmp_path)
    for path in sorted((CORPUS / name).iterdir()):
        assert examine(TARGETS[name], tmp_path, path.read_bytes()) is None, path.name


@pytest.mark.parametrize("name", TARGETS)
def test_a_few_damaged_inputs_do_not_fail(name: str) -> None:
    """`make fuzz` tries as many as it has time for, from another seed each time."""
    inputs = int(30 * TARGETS[name].share)
    outcome = run(name, TARGETS[name], seed=0, inputs=inputs, processes=1)
    assert outcome.found == {}
    assert outcome.inputs == inputs


# --- the fuzzer itself ----------------------------------------------------------------------------


def raise_error(case: Path) -> None:
    raise KeyError("x")


def talk(case: Path) -> None:
    error = DataError("x")
    error.args = ("x" * 5000,)  # the constructor shortens it
    raise error


def loop(case: Path) -> None:
    while True:
        pass


def wait(case: Path) -> None:
    time.sleep(60)


def allocate(case: Path) -> None:
    bytearray(1 << 33)


def die(case: Path) -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


def leave(case: Path) -> None:
    (case.parent / "elsewhere").touch()


def overwrite(case: Path) -> None:
    (case / "file").write_bytes(b"")


def behave(case: Path) -> None:
    (case / "out" / "result").touch()
    raise DataError("no")


def of(read: Callable[[Path], None]) -> Target:
    """A target that reads so whenever the file begins with x, and is content otherwise."""

    def prepared(case: Path) -> list[bytes]:
        return [b"a valid file", b"x, and more"]

    def reading(case: Path) -> None:
        if (case / "file").read_bytes().startswith(b"x"):
            read(case)

    return Target("file", prepared, reading, (mutation.change_bytes,))


@pytest.mark.parametrize(
    ("read", "kind"),
    [
        (raise_error, "KeyError: outside halfbyte"),
        (talk, "a message of more than 2000 characters"),
        (loop, "no end after 0.2 s of processor time"),
        (wait, "no end after 1 s"),
        (allocate, "MemoryError"),
        (die, "the process died of SIGUSR1"),
        (leave, "files outside the output"),
        (overwrite, "files outside the output"),
    ],
)
def test_each_kind_of_failure_is_found(
    monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], None], kind: str
) -> None:
    monkeypatch.setattr(campaign, "PROCESSOR_SECONDS", 0.2)
    if read is wait:
        monkeypatch.setattr(campaign, "WALL_SECONDS", 1.0)
    outcome = run("it", of(read), seed=0, inputs=4, processes=1)
    assert outcome.inputs == 4
    [found] = outcome.found.values()
    assert found.failure.kind.startswith(kind)
    assert found.index == 1
    assert found.data.startswith(b"x")


def test_errors_of_ours_and_files_in_the_output_are_no_failures() -> None:
    outcome = run("it", of(behave), seed=0, inputs=40, processes=2)
    assert (outcome.inputs, outcome.found) == (40, {})


def test_failing_inputs_are_made_small() -> None:
    [found] = run("it", of(raise_error), seed=0, inputs=2, processes=1).found.values()
    assert found.data == b"x"


def test_a_failure_is_written_and_can_be_repeated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(TARGETS, "it", of(raise_error))
    assert main(["--target", "it", "--inputs", "2", "--processes", "1"]) == 1
    said = capsys.readouterr().out
    command = next(line for line in said.splitlines() if "python -m tests.fuzz" in line)
    assert "1 x KeyError: outside halfbyte, first in input 1" in said
    assert said.endswith(" s\n")
    assert "2 inputs, 1 failures" in said
    words = command.split()[3:]
    assert main(words) == 1
    assert "KeyError: 'x'" in capsys.readouterr().out
    Path(words[-1]).write_bytes(b"a valid file")
    assert main(words) == 0
    assert main(["--target", "safetensors", "--inputs", "3", "--processes", "1"]) == 0


@pytest.mark.parametrize("name", ["adapter-config", "safetensors", "yaml", "data-lines"])
def test_inputs_are_a_function_of_the_seed_and_differ(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    seeds = prepare(target, tmp_path)

    def inputs(seed: int) -> list[bytes]:
        first = len(seeds)
        return [input_of(target, seeds, name, seed, first + index) for index in range(40)]

    assert inputs(1) == inputs(1)
    assert len({*inputs(1), *inputs(2)}) > 70
    assert len({*inputs(1)} - {*seeds}) > 30
