"""Checkpoints that are written in a thread are written in order, and a failure is not lost."""

import logging
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from halfbyte.config.schema import TrainConfig
from halfbyte.errors import OutputError
from halfbyte.train.saving import Checkpoints, CheckpointWriter


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


class Clock:
    seconds = 1000.0

    def __call__(self):
        return self.seconds


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, {3, 6, 9, 12, 15, 18, 21, 24, 27, 30}),
        ({"save_steps": 11}, {11, 22, 30}),
        # Of steps of 40 s: 5 minutes are over at the 8th step after a checkpoint.
        ({"save_steps": 11, "save_minutes": 5}, {8, 11, 19, 22, 30}),
        ({"save_steps": 1000, "save_minutes": 0.5}, set(range(1, 31))),
    ],
)
def test_a_checkpoint_is_due_by_steps_and_by_minutes(options, steps):
    clock, saved = Clock(), set()
    config = TrainConfig(model="-", data="-", output="-", **options)
    base = SimpleNamespace(model=torch.nn.Module())
    trainer = SimpleNamespace(optimizer_state=dict, progress=dict, parameters=())
    writer = SimpleNamespace(write=lambda write: None)
    made = Checkpoints(config, base, None, trainer, writer, {}, 30, now=clock)
    made.card = {}
    for step in range(1, 31):
        clock.seconds += 40.0
        if made.due(step):
            made.save(step, {})
            saved.add(step)
    assert saved == steps
