"""Several processes of a run, as torchrun starts them, for tests on a CPU.

They are forked, so that none imports torch again: with one thread and no GPU that is safe. The
store is the parent's, as it is torchrun's, so it outlives each of them.
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

from torch.distributed import TCPStore

from halfbyte.errors import HalfbyteError


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
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as directory:
        pids = [_forked(rank, count, store.port, function, directory, seconds) for rank in range(count)]
        until = time.monotonic() + seconds
        ended = [_waited(pid, until) for pid in pids]
        found = []
        for rank, status in enumerate(ended):
            path = Path(directory, str(rank))
            if os.WIFSIGNALED(status) or not path.exists():
                found.append(Ended(signal=os.WTERMSIG(status)))
            else:
                found.append(Ended(*json.loads(path.read_text())))
        return found


def values(ended):
    """The values that processes returned, none of which may have failed."""
    assert [one for one in ended if one.kind or one.signal] == []
    return [one.value for one in ended]


def _forked(rank, count, port, function, directory, seconds):
    with warnings.catch_warnings():
        # Python warns since the store has threads, which take no lock that a child needs.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
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
