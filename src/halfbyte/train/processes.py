"""The processes of a run: how they are joined, what they must have in common, and who is slow.

What differs in one process would give an adapter that no single process could have trained, without
any error: so options, code, versions, base model and data are compared before anything is trained.
"""

import json
from collections import deque
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from statistics import fmean, median_low
from typing import Any

import torch

from halfbyte.checkpoint.run_state import RunState
from halfbyte.config.schema import TrainConfig
from halfbyte.errors import ConfigError
from halfbyte.runtime.distributed import ProcessGroup, claim_gpu, rank_of_process
from halfbyte.runtime.precision import configure_allocators
from halfbyte.train import metadata

SLOW, STEPS_TO_TELL = 1.2, 20


class SlowRank:
    """Finds a process that is slower than the others for many steps."""

    def __init__(self) -> None:
        self._steps: deque[Sequence[float]] = deque(maxlen=STEPS_TO_TELL)
        self._told = False

    def see(self, seconds: Sequence[float]) -> str | None:
        """Add the seconds of each process in a step; return a warning, once."""
        if seconds:
            self._steps.append(seconds)
        if self._told or len(self._steps) < STEPS_TO_TELL:
            return None
        means = [fmean(each) for each in zip(*self._steps, strict=True)]
        usual, slowest = median_low(means), max(means)
        if slowest <= SLOW * usual:
            return None
        self._told = True
        return (
            f"rank {means.index(slowest)} is slow: {slowest:.3g} s a step, the others {usual:.3g} "
            f"s, in the last {STEPS_TO_TELL} steps; all wait for it. Look at what else runs there, "
            "and at the clock and temperature of its GPU"
        )


def processes_of(config: TrainConfig) -> ProcessGroup:
    """Return the processes of a run, which torchrun or ``--gpus`` has started.

    Raises:
        ConfigError: Several are asked for and have not been started, a GPU is missing, or they
            cannot read the data.
    """
    size = rank_of_process()[1]
    if size == 1:
        if (config.gpus or 1) > 1:
            raise ConfigError(
                f"`gpus` {config.gpus} needs as many processes: use `halfbyte train --gpus`, or "
                "start this program with torchrun --nproc-per-node"
            )
        return ProcessGroup()
    if any(f"{one}:"[:2] in ("-:", "-[", "-#") for one in config.data):
        raise ConfigError(
            "`data` - is standard input, which only one process can read: write it to a file for "
            "several"
        )
    device = config.device
    if device != "cpu":
        configure_allocators()  # read when torch initialises CUDA, which joining does
        claim_gpu()  # before CUDA is asked for its devices
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return ProcessGroup.from_environment(device, timeout=config.ddp_timeout)


def require_same_start(processes: ProcessGroup, config: TrainConfig) -> None:
    """Check that all processes have the same code and options.

    Raises:
        UserError: One has not; it names which, and what.
    """
    options = config.model_dump(mode="json", exclude={"gpus"})
    values = {f"option {name}": json.dumps(value) for name, value in options.items()}
    processes.require_same({"code": code_digest(), **metadata.versions()} | values)


def require_same_run(
    processes: ProcessGroup, identity: Mapping[str, Any], resumed: RunState | None
) -> None:
    """Check that all processes have the same base model, data, and checkpoint to resume from.

    Raises:
        UserError: One has not; it names which, and what.
    """
    names = {"base": "base model", "data": "data", "held_out": "held-out data"}
    values = {names[name]: str(identity[name]) for name in names if name in identity}
    step = None if resumed is None else resumed.step
    processes.require_same(values | {"step to resume from": str(step)})


def code_digest() -> str:
    """Return a digest of halfbyte's own files."""
    digest, root = blake2b(digest_size=8), Path(__file__).parents[1]
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.cpp")]):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
