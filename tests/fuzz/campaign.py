"""Many inputs: in forked processes, each input with limits of time and of memory.

Input number i of a target is a function of the seed and i, so a failure is found again. A process
that hangs or dies is replaced by one that goes on after the input that did it.
"""

import contextlib
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.fuzz.examine import Failure, examine, prepare
from tests.fuzz.mutation import damaged
from tests.fuzz.targets import Target

PROCESSOR_SECONDS = 2.0  # for one input, of the process that reads it
WALL_SECONDS = 30.0  # likewise, on a busy machine; a reader that waits uses no processor time
EXTRA_MEMORY = 1 << 30  # bytes of data that a process may have more than when it starts

_NOW = struct.Struct("<qqd")  # inputs done, the current one, and since when


@dataclass
class Found:
    """A failure, with the first input that had it, made small, and how many had it."""

    failure: Failure
    data: bytes
    index: int
    count: int = 1


@dataclass
class Outcome:
    """What came of a target: the inputs that were tried, and each failure by its kind."""

    inputs: int = 0
    found: dict[str, Found] = field(default_factory=dict)


def input_of(target: Target, seeds: list[bytes], name: str, seed: int, index: int) -> bytes:
    """Return an input; the first are the valid ones."""
    if index < len(seeds):
        return seeds[index]
    return damaged(random.Random(f"{seed}/{name}/{index}"), seeds, target.mutations)


def run(
    name: str,
    target: Target,
    *,
    seed: int,
    seconds: float = 1e9,
    inputs: int = sys.maxsize,
    processes: int = 2,
) -> Outcome:
    """Try a target with many inputs, for a time or a number of them, whichever ends first."""
    deadline, outcome = time.monotonic() + seconds, Outcome()
    with _scratch() as root:
        seeds = prepare(target, root / "0")
        # Imports, caches and compiled code are made once, before the processes are forked.
        examine(target, root / "0", seeds[0])

        def of(index: int) -> bytes:
            return input_of(target, seeds, name, seed, index)

        workers = [
            _Worker(target, root, number, range(number, inputs, processes), of, deadline)
            for number in range(processes)
        ]
        while workers:
            time.sleep(0.02)
            workers = [worker for worker in workers if not worker.ended()]
        for path in sorted(root.glob("*.failures")):
            _collect(path, outcome, of)
        outcome.inputs = sum(int(path.read_text()) for path in root.glob("*.done"))
        for found in outcome.found.values():
            found.data = _smaller(target, root, found.data, found.failure)
    return outcome


def _collect(path: Path, outcome: Outcome, of: Callable[[int], bytes]) -> None:
    for line in path.read_text().splitlines():
        index, fields = json.loads(line)
        failure = Failure(**fields)
        if failure.kind in outcome.found:
            outcome.found[failure.kind].count += 1
        else:
            outcome.found[failure.kind] = Found(failure, of(index), index)


class _Worker:
    """A process that tries a range of inputs, watched from this one."""

    def __init__(
        self,
        target: Target,
        root: Path,
        number: int,
        indices: range,
        of: Callable[[int], bytes],
        deadline: float,
    ) -> None:
        self.target, self.root, self.number, self.of = target, root, number, of
        self.indices, self.deadline = indices, deadline
        self.failures = root / f"{number}.failures"
        self.done = 0
        self.memory = mmap.mmap(-1, _NOW.size)
        self.start()

    def start(self) -> None:
        self.memory[:] = _NOW.pack(0, -1, time.monotonic())
        home = self.root / str(self.number)
        if not home.exists():
            shutil.copytree(self.root / "0", home)
        self.process = _fork(lambda: self._work(home))

    def _work(self, home: Path) -> None:
        _limit(home)
        for done, index in enumerate(self.indices):
            if time.monotonic() > self.deadline:
                break
            data = self.of(index)
            self.memory[:] = _NOW.pack(done, index, time.monotonic())
            signal.setitimer(signal.ITIMER_PROF, PROCESSOR_SECONDS)
            failure = examine(self.target, home, data)
            signal.setitimer(signal.ITIMER_PROF, 0)
            if failure is not None:
                self._record(index, failure)
            self.memory[:] = _NOW.pack(done + 1, -1, time.monotonic())

    def _record(self, index: int, failure: Failure) -> None:
        with self.failures.open("a") as file:
            file.write(json.dumps([index, asdict(failure)]) + "\n")

    def ended(self) -> bool:
        """Return whether it is done; if it died or hangs, start another one after that input."""
        pid, status = os.waitpid(self.process, os.WNOHANG)
        done, index, since = _NOW.unpack(self.memory[:])
        if pid == 0:
            if index >= 0 and time.monotonic() - since > WALL_SECONDS:
                os.kill(self.process, signal.SIGKILL)
            return False
        self.done += done
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            (self.root / f"{self.number}.done").write_text(str(self.done))
            return True
        if index < 0:
            raise RuntimeError(f"a process of the fuzzer itself ended with status {status}")
        self.done += 1
        self._record(index, Failure(_death(status)))
        self.indices = self.indices[self.indices.index(index) + 1 :]
        self.start()
        return False


def _death(status: int) -> str:
    if not os.WIFSIGNALED(status):
        return f"the process ended with code {os.WEXITSTATUS(status)}"
    name = signal.Signals(os.WTERMSIG(status)).name
    hangs = {
        "SIGPROF": f"no end after {PROCESSOR_SECONDS:g} s of processor time",
        "SIGKILL": f"no end after {WALL_SECONDS:g} s, or no memory",
    }
    return hangs.get(name, f"the process died of {name}")


def _fork(work: Callable[[], None]) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside other threads
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def _limit(home: Path) -> None:
    """Give this process a home and temporary files that are watched, no output, little memory."""
    here = str(home)
    os.environ |= {"HOME": here, "HF_HOME": here, "HF_HUB_OFFLINE": "1", "TMPDIR": here}
    tempfile.tempdir = None
    os.chdir(home)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    with open("/proc/self/status") as lines:
        kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("VmData"))
    limit = 1024 * kilobytes + EXTRA_MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """Make a directory in memory where there is one: every input is a file."""
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    root = Path(tempfile.mkdtemp(prefix="halfbyte-fuzz-", dir=shared))
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _smaller(target: Target, root: Path, data: bytes, failure: Failure, trials: int = 400) -> bytes:
    """Return a part of ``data`` that fails in the same way, after at most so many trials.

    A part may hang, which ends the search: the smallest one until then is returned.
    """
    if "process" in failure.kind or "no end" in failure.kind:
        return data  # every trial would cost a process
    result = root / "smaller"
    result.write_bytes(data)

    def work() -> None:
        _limit(root / "0")
        best, left, size = data, trials, max(1, len(data) // 2)
        while size and left:
            at = 0
            while at < len(best) and left:
                left -= 1
                shorter = best[:at] + best[at + size :]
                signal.setitimer(signal.ITIMER_PROF, PROCESSOR_SECONDS)
                found = examine(target, root / "0", shorter)
                if found is not None and found.kind == failure.kind:
                    best = shorter
                    result.write_bytes(best)
                else:
                    at += size
            size //= 2

    os.waitpid(_fork(work), 0)
    return result.read_bytes()
