"""The state of a run, written so that a kill at any moment loses at most the steps since.

``checkpoint-<step>/`` contains ``adapter_model.safetensors`` (with PEFT's names, so it can be used
as an adapter), ``optimizer.safetensors`` and ``run_state.json``, which has the progress and the
size and SHA-256 of the other files. The directory is written under a hidden name, flushed, and
renamed; older ones are removed only after that. So the newest directory that agrees with its own
``run_state.json`` is always a complete checkpoint.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from halfbyte.atomic import (
    new_directory,
    remove_directory,
    remove_partial,
    require_writable,
)
from halfbyte.checkpoint.peft import PREFIX, WEIGHTS_NAME
from halfbyte.checkpoint.reading import read_json
from halfbyte.checkpoint.safetensors_file import SafetensorsFile, write_safetensors
from halfbyte.errors import CheckpointError
from halfbyte.foreign_text import quote
from halfbyte.input_files import open_file

__all__ = [
    "RunState",
    "latest_run",
    "load_run",
    "require_writable",
    "run_at",
    "save_run",
    "step_of",
]

OPTIMIZER_NAME = "optimizer.safetensors"
STATE_NAME = "run_state.json"

_DIRECTORY = re.compile(r"checkpoint-([0-9]{1,18})")

logger = logging.getLogger("halfbyte")


class RunState(NamedTuple):
    """The state that a run resumes from.

    Attributes:
        adapter: The adapter's tensors, bit-identical to those saved.
        optimizer: The optimizer's tensors, likewise.
        progress: Other state of the run (JSON values).
        step: Number of optimizer steps done.
    """

    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    progress: dict[str, Any]
    step: int


def save_run(
    output_dir: str | Path,
    step: int,
    *,
    adapter: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    progress: Mapping[str, Any],
    keep: int = 2,
    best: int | None = None,
    card: Callable[[Path], object] | None = None,
) -> Path:
    """Write ``checkpoint-<step>/``, then remove all but the newest ``keep`` and the best.

    Args:
        output_dir: The run's directory.
        step: Optimizer steps done.
        adapter: ``lora.adapter_state``.
        optimizer: The optimizer's tensors by name.
        progress: JSON values.
        keep: Number of checkpoints to keep, including this one; at least 1.
        best: Step of one that is kept besides, which ``progress`` may name.
        card: Called with the directory before it is renamed, to add files that describe the
            adapter.

    Returns:
        The checkpoint's directory.

    Raises:
        OutputError: If it cannot be written; existing checkpoints are kept.
    """
    output_dir = Path(output_dir)
    remove_partial(output_dir, "checkpoint-*")
    path = run_at(output_dir, step)
    with new_directory(path, replace=True) as directory:
        files = {
            WEIGHTS_NAME: {PREFIX + name: tensor for name, tensor in adapter.items()},
            OPTIMIZER_NAME: optimizer,
        }
        for name, tensors in files.items():
            with open(directory / name, "wb") as file:
                write_safetensors(file, tensors)
        if card is not None:
            card(directory)
        state = {
            "format": 1,
            "step": step,
            "progress": dict(progress),
            "files": {name: _digest(directory / name) for name in files},
        }
        (directory / STATE_NAME).write_text(json.dumps(state, indent=2) + "\n")
    past = [known for known in _checkpoints(output_dir) if step_of(known) <= step]
    for old in past[max(keep, 1) :]:
        if step_of(old) != best:
            remove_directory(old)
    return path


def run_at(output_dir: str | Path, step: int) -> Path:
    """Return the place of the checkpoint after ``step``."""
    return Path(output_dir) / f"checkpoint-{step}"


def latest_run(output_dir: str | Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None if it has none.

    Damaged ones are skipped, with a warning that says what is wrong with each.
    """
    for path in _checkpoints(Path(output_dir)):
        try:
            _read_state(path)
        except CheckpointError as error:
            logger.warning("skipping a damaged checkpoint: %s", error)
        else:
            return path
    return None


def load_run(path: str | Path) -> RunState:
    """Read a checkpoint written by ``save_run``.

    Raises:
        CheckpointError: If it is missing or damaged; the message names the file.
    """
    path = Path(path)
    state = _read_state(path)
    adapter = _read_tensors(path / WEIGHTS_NAME)
    return RunState(
        adapter={name.removeprefix(PREFIX): tensor for name, tensor in adapter.items()},
        optimizer=_read_tensors(path / OPTIMIZER_NAME),
        progress=state["progress"],
        step=state["step"],
    )


def _checkpoints(output_dir: Path) -> list[Path]:
    """Return the directories with names of checkpoints, newest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if _DIRECTORY.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Return the step of a checkpoint's directory."""
    return int(path.name.rpartition("-")[2])


def _read_state(path: Path) -> dict[str, Any]:
    """Return ``run_state.json``, after comparing the other files with it."""
    state = read_json(path / STATE_NAME, "a checkpoint of a run holds one")
    match state:
        case {"format": 1, "step": step, "progress": dict(), "files": dict(files)}:
            pass
        case _:
            raise CheckpointError(f"{path / STATE_NAME} is not a run's state of format 1")
    named = _DIRECTORY.fullmatch(path.name)
    if type(step) is not int or step < 0 or (named and step != int(named[1])):
        expected = named[1] if named else "a whole number from 0"
        raise CheckpointError(f"{path / STATE_NAME}: step: expected {expected}, got {quote(step)}")
    for name in (WEIGHTS_NAME, OPTIMIZER_NAME):
        try:
            found = _digest(path / name)
        except OSError as error:
            raise CheckpointError(f"cannot read {path / name}: {error.strerror}") from error
        if files.get(name) != found:
            raise CheckpointError(
                f"{path / name} is not the file that was saved ({found['bytes']} bytes, "
                f"{STATE_NAME} says {quote(files.get(name))})"
            )
    return state


def _read_tensors(path: Path) -> dict[str, Tensor]:
    file = SafetensorsFile(path)
    return {name: file.read(name) for name in file.entries}


def _digest(path: Path) -> dict[str, Any]:
    with open_file(path) as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}
