"""Several processes of a run, as torchrun starts them, for tests on a CPU.

They are forked, so that none imports torch again: with one thread and no GPU that is safe, and
`forks` skips what needs it elsewhere (tests/gpu/test_data_parallel.py starts programs). The
store has a process of its own, as that of torchrun, so it outlives each of them.
"""

import faulthandler
import json
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.distributed import TCPStore

from halfbyte.errors import HalfbyteError

forks = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")


class Ended(NamedTuple):
    """How a process has ended: the value it returned, or the type and the text of its error."""

    value: Any = None
    kind: str = ""
    text: str = ""
    signal: int = 0


def in_processes(count, function, *, seconds=60.0):
    """Call ``function(rank)`` in so many processes, and return how each has ended.

    What it returns must be JSON. A process that has not ended in time is killed, and that is how it
    has ended.
    """
    store, port = _store()
    try:
        with tempfile.TemporaryDirectory() as directory:
            pids = [
                _forked(rank, count, port, function, directory, seconds) for rank in range(count)
            ]
            until = time.monotonic() + seconds
            ended = [_waited(pid, until) for pid in pids]
            return [_told(Path(directory, str(rank)), one) for rank, one in enumerate(ended)]
    finally:
        os.kill(store, signal.SIGKILL)
        os.waitpid(store, 0)


def _store():
    """Start a process that has the store, as torchrun does; return its id and the port."""
    reading, writing = os.pipe()
    pid = _fork()
    if not pid:
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        os.write(writing, str(store.port).encode())
        os.close(writing)
        while True:
            signal.pause()
    os.close(writing)
    with os.fdopen(reading) as told:
        return pid, int(told.read())


def _fork():
    with warnings.catch_warnings():
        # Python 3.12 warns of threads, which other tests may have left; they hold no lock here.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _told(path, status):
    """How a process has ended, by the file that it wrote."""
    if os.WIFSIGNALED(status) or not path.exists():
        return Ended(signal=os.WTERMSIG(status))
    return Ended(*json.loads(path.read_text()))


def values(ended):
    """The values that processes returned, none of which may have failed."""
    assert [one for one in ended if one.kind or one.signal] == []
    return [one.value for one in ended]


def _forked(rank, count, port, function, directory, seconds):
    if pid := _fork():
        return pid
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    faulthandler.dump_traceback_later(max(1.0, seconds - 5.0))  # where a process hangs
    try:
        said = Ended(function(rank))
    except BaseException as error:  # told to the parent, whose test decides
        if not isinstance(error, HalfbyteError):
            traceback.print_exc()
        said = Ended(None, type(error).__name__, str(error))
    Path(directory, str(rank)).write_text(json.dumps(said))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _waited(pid, until):
    """Wait for a process, and return its status."""
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]
