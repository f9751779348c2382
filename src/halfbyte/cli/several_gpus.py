"""``halfbyte train --gpus N``: starts a process for each GPU of this machine by torch's launcher.

It is what ``torchrun --nproc-per-node N -m halfbyte train`` does, without its log and its list of
errors: the processes say themselves what is wrong, once, and exit with the codes of a single one.
They run in sessions of their own, so Ctrl-C reaches only the launcher, which passes it on.
"""

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from halfbyte.config.schema import TrainConfig
from halfbyte.errors import ConfigError
from halfbyte.runtime.distributed import rank_of_process

_TO_END = 120  # seconds to finish a step and save, before processes are killed


def starts_processes(config: TrainConfig) -> bool:
    """Whether a run asks for several processes, and this one is none of them."""
    return (config.gpus or 1) > 1 and rank_of_process()[1] == 1


def start_processes(config: TrainConfig, argv: Sequence[str]) -> int:
    """Make a run in several processes.

    Args:
        config: The options of the run.
        argv: The command line of ``halfbyte`` that each of them gets.

    Returns:
        The exit code.

    Raises:
        ConfigError: There are fewer GPUs.
    """
    count = config.gpus or 1
    _require_gpus(config.device, count)
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    threads = max(1, (os.cpu_count() or 1) // count)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # each would take all of them
    with tempfile.TemporaryDirectory(prefix="halfbyte-") as logs:
        options: dict[str, Any] = {"shutdown_timeout": _TO_END}
        if "shutdown_timeout" not in signature(LaunchConfig).parameters:
            del options["shutdown_timeout"]  # torch 2.11 waits 30 seconds
        launch = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            **options,
        )
        try:
            elastic_launch(launch, sys.executable)("-m", "halfbyte", *argv)
        except SignalException as error:
            return 128 + int(error.sigval)
        except ChildFailedError as error:
            return _code(error.failures, config.output)
    return 0


def _require_gpus(device: str, count: int) -> None:
    import torch

    found = torch.cuda.device_count()
    if device == "cpu" or count <= found:
        return
    raise ConfigError(
        f"`gpus` {count}: torch finds {found} on this machine. Ask for at most as many, or use "
        "--device cpu for as many processes without one"
    )


def _code(failures: Mapping[int, Any], output: Path) -> int:
    """Return the exit code of the first process, else that of another one that failed."""
    codes = {rank: failure.exitcode for rank, failure in sorted(failures.items())}
    if (first := codes.get(0, 0)) < 0:
        name = signal.Signals(-first).name
        print(
            f"halfbyte train: rank 0 was killed by {name}; what the others saw of it is in "
            f"{output / 'logs'}",
            file=sys.stderr,
        )
    return next((code for code in codes.values() if code > 0), 1)
