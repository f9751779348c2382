"""A run's state comes back to the bit, and a kill or a full disk never costs the last good one."""

import errno
import json
import logging
import os
import random
import signal
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbyte.checkpoint import run_state
from halfbyte.checkpoint.run_state import latest_run, load_run, save_run
from halfbyte.errors import CheckpointError, OutputError

ADAPTER = {
    "model.layers.0.q.lora_A.weight": torch.tensor([[1.0, -0.0, 3e-45, torch.inf]]),
    "model.layers.0.q.lora_B.weight": torch.linspace(-1, 1, 4).reshape(4, 1),
}
OPTIMIZER = {
    "exp_avg/model.layers.0.q.lora_A.weight": torch.tensor([torch.nan, 2.0]).bfloat16(),
    "step": torch.tensor(7),
    "codes": torch.arange(255, dtype=torch.uint8).reshape(5, 51),
}
PROGRESS = {"epoch": 1, "loss": 0.1 + 0.2, "history": [1e-300, -0.0], "name": "é\n", "none": None}


def save(directory: Path, step: int, **changes: Any) -> Path:
    held: dict[str, Any] = {"adapter": ADAPTER, "optimizer": OPTIMIZER, "progress": PROGRESS}
    return save_run(directory, step, **(held | changes))


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape)
        bits = [t.reshape(-1).view(torch.uint8) for t in (tensor, other[name])]
        assert bits[0].equal(bits[1])


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_run_comes_back_to_the_bit(tmp_path: Path) -> None:
    path = save(tmp_path, 12)
    assert path == tmp_path / "checkpoint-12" == latest_run(tmp_path)
    state = load_run(path)
    assert_same_bits(state.adapter, ADAPTER)
    assert_same_bits(state.optimizer, OPTIMIZER)
    assert state.progress == PROGRESS
    assert state.step == 12


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_any_progress_comes_back(tmp_path: Path, progress: dict[str, Any]) -> None:
    path = save(tmp_path, 1, adapter={}, optimizer={}, progress=progress)
    assert load_run(path).progress == progress


def test_older_checkpoints_go_after_the_new_one_is_whole(tmp_path: Path) -> None:
    for step in (5, 10, 100, 15):
        save(tmp_path, step, keep=2)
    # 100 is not of this run's past: it is left to whoever made it.
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-100", "checkpoint-15"]
    save(tmp_path, 20, keep=1)
    assert names(tmp_path) == ["checkpoint-100", "checkpoint-20"]


def test_the_best_is_kept_besides_the_newest(tmp_path: Path) -> None:
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2)):
        save(tmp_path, step, keep=1, best=best)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    save(tmp_path, 5, keep=2, best=2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    save(tmp_path, 6, keep=2, best=6)
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-6"]


def test_the_newest_is_the_one_of_the_highest_step(tmp_path: Path) -> None:
    assert latest_run(tmp_path) is None
    assert latest_run(tmp_path / "nowhere") is None
    for step in (9, 10, 99, 100):
        save(tmp_path, step, keep=9)
    (tmp_path / "checkpoint-final").mkdir()
    assert latest_run(tmp_path) == tmp_path / "checkpoint-100"


def test_a_step_that_is_saved_twice_is_saved_anew(tmp_path: Path) -> None:
    save(tmp_path, 3)
    path = save(tmp_path, 3, progress={"second": True})
    assert load_run(path).progress == {"second": True}
    assert names(tmp_path) == ["checkpoint-3"]


def test_files_of_the_card_are_part_of_the_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path, 1, card=lambda directory: (directory / "card").write_text("of"))
    assert (path / "card").read_text() == "of"
    assert latest_run(tmp_path) == path


DAMAGE = {
    "cut": lambda path: os.truncate(path / "optimizer.safetensors", 100),
    "one bit": lambda path: flip(path / "adapter_model.safetensors", -1),
    "no file": lambda path: (path / "adapter_model.safetensors").unlink(),
    "no state": lambda path: (path / "run_state.json").unlink(),
    "cut state": lambda path: os.truncate(path / "run_state.json", 50),
    "other state": lambda path: (path / "run_state.json").write_text('{"format": 2}'),
    "no object": lambda path: (path / "run_state.json").write_text("[]"),
    "negative step": lambda path: change(path, step=-5),
    "another step": lambda path: change(path, step=3),
    "no step": lambda path: change(path, step=True),
    "half a step": lambda path: change(path, step=2.5),
    "no progress": lambda path: change(path, progress=[]),
    "long": lambda path: change(path, files={"optimizer.safetensors": "x" * 10**6}),
    "a pipe": lambda path: to_pipe(path / "optimizer.safetensors"),
    "state as a pipe": lambda path: to_pipe(path / "run_state.json"),
}


def change(path: Path, **fields: Any) -> None:
    state = json.loads((path / "run_state.json").read_text())
    (path / "run_state.json").write_text(json.dumps(state | fields))


def to_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints_are_passed_over_and_named(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    DAMAGE[damage](path)
    with caplog.at_level(logging.WARNING, logger="halfbyte"):
        assert latest_run(tmp_path) == tmp_path / "checkpoint-1"
    assert "checkpoint-2" in caplog.text
    with pytest.raises(CheckpointError, match="checkpoint-2") as caught:
        load_run(path)
    assert len(str(caught.value)) < 500


def test_a_full_disk_costs_nothing_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def full(file: Any, tensors: Any) -> None:
        file.write(b"some of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_state, "write_safetensors", full)
    with pytest.raises(OutputError, match="checkpoint-2: no space left on the device"):
        save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["checkpoint-1"]
    assert latest_run(tmp_path) == tmp_path / "checkpoint-1"


def test_an_unwritable_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="is a file, not a directory"):
        save(tmp_path / "file", 1)


def save_until_killed(directory: Path, to: int) -> NoReturn:
    """Save one checkpoint after the other, and write the number of each to a pipe."""
    try:
        os.write(to, b"0\n")
        for step in range(1, 10_000):
            tensors = {name: torch.full((200, 100), float(step)) for name in "ab"}
            best = step - step % 4 or None  # up to three steps old, and two are kept
            progress = {"step": step, "best": best}
            held = {"adapter": tensors, "optimizer": tensors, "progress": progress}
            save(directory, step, **held, keep=2, best=best)
            os.write(to, f"{step}\n".encode())
    finally:
        os._exit(1)  # this is a copy of the process that runs the tests


def test_a_kill_at_any_moment_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    chance = random.Random(0)
    for _ in range(6):
        out, into = os.pipe()
        child = os.fork()
        if not child:
            save_until_killed(tmp_path, into)
        os.close(into)
        with open(out) as pipe:
            assert pipe.readline() == "0\n"
            # Somewhere in the first few saves, which take some milliseconds each.
            time.sleep(chance.uniform(0.0, 0.06))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            reported = [int(line) for line in pipe.read().splitlines()]
        finished = reported[-1] if reported else 0
        latest = latest_run(tmp_path)
        if latest is None:
            assert not finished
            continue
        state = load_run(latest)
        assert state.step >= finished
        assert state.progress["step"] == state.step
        if (best := state.progress["best"]) is not None:
            assert load_run(tmp_path / f"checkpoint-{best}").step == best
        expected = torch.full((200, 100), float(state.step))
        assert all(tensor.equal(expected) for tensor in state.adapter.values())
        assert all(tensor.equal(expected) for tensor in state.optimizer.values())
        # What the killed one left half done stands in nobody's way, and is cleared away.
        save(tmp_path, 20_000, keep=1)
        assert names(tmp_path) == ["checkpoint-20000"]  # and no best one is kept any longer
        assert json.loads((tmp_path / "checkpoint-20000/run_state.json").read_text())["step"]
        for path in (tmp_path / "checkpoint-20000").iterdir():
            path.unlink()
        (tmp_path / "checkpoint-20000").rmdir()
