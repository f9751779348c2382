"""Checkpoints that are written in a thread are written in order, and a failure is not lost."""

import logging
import threading
from pathlib import Path

import pytest

from halfbyte.errors import OutputError
from halfbyte.train.saving import CheckpointWriter


@pytest.fixture
def written():
    return []


def fails():
    raise OutputError("no space left on the device")


def test_steps_go_on_while_a_checkpoint_is_written(written):
    gate, threads = threading.Event(), []

    def write():
        assert gate.wait(20)
        threads.append(threading.current_thread())
        return Path("first")

    with CheckpointWriter(written.append, background=True) as writer:
        writer.write(write)
        writer.look()
        assert written == []
        gate.set()
        writer.write(lambda: Path("second"))  # waits for the first
        assert written == [Path("first")]
    assert written == [Path("first"), Path("second")]
    assert threads != [threading.main_thread()]


def test_without_a_thread_it_is_there_when_write_returns(written):
    with CheckpointWriter(written.append, background=False) as writer:
        writer.write(lambda: Path("first"))
        assert written == [Path("first")]
        with pytest.raises(OutputError, match="no space"):
            writer.write(fails)


@pytest.mark.parametrize("ask", ["look", "wait", "write"])
def test_a_failure_is_raised_by_whatever_is_called_next(written, ask):
    with CheckpointWriter(written.append, background=True) as writer:
        writer.write(fails)
        while not writer._writing.done():
            pass
        with pytest.raises(OutputError, match="no space"):
            writer.write(lambda: Path("next")) if ask == "write" else getattr(writer, ask)()
    assert written == []


def test_the_end_raises_the_failure_of_the_last_one(written):
    writer = CheckpointWriter(written.append, background=True)
    writer.write(fails)
    with pytest.raises(OutputError, match="no space"), writer:
        pass


def test_another_error_comes_first_and_the_failure_is_said(written, caplog):
    writer = CheckpointWriter(written.append, background=True)

    def run():
        with writer:
            writer.write(fails)
            raise KeyError

    with caplog.at_level(logging.WARNING), pytest.raises(KeyError):
        run()
    assert "not written: no space" in caplog.text
