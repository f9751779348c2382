"""What a process of a run knows of the others: whether they live, how far they are, why one failed.

All of it is in the TCPStore that torchrun provides. A thread of every process says twice a second
that it lives, and how many sums it has come to, and looks at the others. A peer has failed if

    it says so         an exception has ended it
    it has gone        its process is not among those of this host, or gives no sign of life
    it hangs           it has not come to a sum in which others have waited for the time-out

The first failure that is written to the store is the one that all know of from then on.
"""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halfbyte.errors import ProcessFailed

_BEAT = 0.5  # seconds between two signs of life
_SILENT = 30.0  # without a sign of life, a process that cannot be looked at has gone
_TO_BE_NOTICED = 5.0  # seconds that the reason for a broken connection may take to be known
_TO_LEAVE = 20.0  # torchrun kills what has not ended 30 s after the first process has


@dataclass(frozen=True)
class Failure:
    """Why a run of several processes ends.

    Attributes:
        rank: The process that failed.
        reason: What happened to it, as the end of a sentence that begins with its name.
        exit_code: What all processes exit with.
        lost: Whether it cannot save anything: it has gone, or hangs.
    """

    rank: int
    reason: str
    exit_code: int = 1
    lost: bool = False

    def error(self) -> ProcessFailed:
        """Return the error that the other processes raise."""
        return ProcessFailed(f"rank {self.rank} {self.reason}", self.rank, self.exit_code)


class Peers:
    """The processes of a run, as this one sees them.

    Args:
        rank: The number of this process.
        size: The number of processes.
        store: A ``torch.distributed`` store of theirs.
        timeout: Seconds to wait for a process that should be at a sum.

    Attributes:
        failure: What has ended the run; None while all is well.
        at: What this process does, such as ``step 3``, for messages of the others.
        sums: How many sums this process has come to.
        on_hang: Called with the reason if the others say that this process hangs; in a thread.
    """

    def __init__(self, rank: int, size: int, store: Any, timeout: float) -> None:
        self.failure: Failure | None = None
        self.at, self.sums = "the start", 0
        self.on_hang: Callable[[str], None] = lambda text: None
        self._rank, self._size, self._store, self._timeout = rank, size, store, timeout
        self._keys = [f"alive/{one}" for one in range(size)]
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._known: dict[int, dict[str, Any]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch-processes", daemon=True)

    def start(self, meet: Any) -> None:
        """Say that this process lives; once all have, begin to watch them.

        Args:
            meet: Waits until some keys are in the store.
        """
        self._tell()
        meet(self._keys)
        self._look()
        self._thread.start()

    def declare(self, failure: Failure) -> Failure:
        """Say why the run ends; return what was said first, by whichever process."""
        if self.failure is None:
            said = json.dumps(asdict(failure))
            with contextlib.suppress(RuntimeError):  # without the store, each is on its own
                said = self._store.compare_set("failure", "", said).decode()
            self.failure = self.failure or Failure(**json.loads(said))
        return self.failure

    def blame_for(self, error: Exception) -> Failure:
        """Return the failure behind a connection that broke: soon known, or else only that."""
        until = time.monotonic() + _TO_BE_NOTICED
        while self.failure is None and time.monotonic() < until:
            time.sleep(_BEAT / 10)
        said = str(error).partition("\n")[0]
        return self.declare(Failure(self._rank, f"lost the connection to the others: {said}"))

    def late(self, *, on_time: bool) -> Failure:
        """Return the failure of the process that has not come to a sum within the time-out.

        Args:
            on_time: Whether this process has: its GPU has computed what is summed.
        """
        seconds = f"{self._timeout:g} s (--ddp-timeout)"
        if not on_time:
            text = f"hangs: its GPU has not finished {self.at} in {seconds}"
            return Failure(self._rank, text, lost=True)
        others = {rank: one for rank, one in self._known.items() if rank != self._rank}
        behind = {rank: one for rank, one in others.items() if one["sums"] < self.sums}
        if not behind:
            text = f"has waited {seconds} for a sum that all have begun: their connection hangs"
            return Failure(self._rank, text)
        rank = min(behind, key=lambda one: (behind[one]["sums"], one))
        text = f"hangs: the others have waited for it for {seconds} in {self.at}"
        return Failure(rank, f"{text}, and it was in {behind[rank]['at']}", lost=True)

    def claim(self, what: str) -> bool:
        """Return whether this process is the one to do ``what``, of those that ask.

        Usually it is the lowest rank that lives, since the others ask a moment later. If another
        process has failed but lives, what it does is over then.
        """
        failure = self.failure
        lost = failure.rank if failure is not None and failure.lost else None
        before = sum(rank != lost for rank in range(self._rank))
        time.sleep(_BEAT * min(before, 4))
        try:
            claimed = self._store.compare_set(f"claim/{what}", "", str(self._rank)).decode()
            if claimed != str(self._rank):
                return False
            if failure is not None and not failure.lost and failure.rank != self._rank:
                self._wait_for(lambda rank: rank == failure.rank)
        except RuntimeError:  # the store has gone, with its process or its host
            return before == 0
        return True

    # --- the thread that watches ------------------------------------------------------------------

    def _tell(self, *, left: bool = False) -> None:
        """Say that this process lives, and how far it is."""
        said = {"pid": os.getpid(), "host": _this_host(), "sums": self.sums, "at": self.at}
        said |= {"left": left, "now": time.monotonic()}  # no two are the same
        self._store.set(f"alive/{self._rank}", json.dumps(said))

    def _watch(self) -> None:
        while not self._stop.wait(_BEAT):
            try:
                self._tell()
                self._look()
                if self.failure is not None and self.failure.lost:
                    self._end_if_hung(self.failure)
            except RuntimeError as error:
                if not self._stop.is_set():
                    said = str(error).partition("\n")[0]
                    self.declare(Failure(0, f"or its launcher does not answer: {said}", lost=True))
                return

    def _end_if_hung(self, failure: Failure) -> None:
        """End this process if it is the one that hangs, once the others have saved and left.

        torchrun would end it, too; started otherwise it would stay, with its GPU's memory.
        """
        if failure.rank == self._rank:
            self.on_hang(str(failure.error()))
            self._wait_for(lambda rank: rank != self._rank)
            if not self._stop.is_set():
                os._exit(failure.exit_code)

    def _look(self) -> None:
        """Look at the others once."""
        if self.failure is None and self._store.check(["failure"]):
            self.failure = Failure(**json.loads(self._store.get("failure")))
        now = time.monotonic()
        for rank, said in enumerate(self._store.multi_get(self._keys)):
            if self._seen.get(rank, (b"", 0.0))[0] != said:
                self._seen[rank], self._known[rank] = (said, now), json.loads(said)
            peer = self._known[rank]
            if self.failure is not None or rank == self._rank or peer["left"]:
                continue
            if peer["host"] == _this_host() and not _lives(peer["pid"]):
                if not json.loads(self._store.get(self._keys[rank]))["left"]:  # meanwhile
                    self.declare(Failure(rank, f"died (process {peer['pid']})", lost=True))
            elif now - self._seen[rank][1] > _SILENT:
                text = f"gives no sign of life (process {peer['pid']} on {peer['host']})"
                self.declare(Failure(rank, text, lost=True))

    # --- the end ----------------------------------------------------------------------------------

    def look(self) -> None:
        """Look at the others now; without the store nothing can be known."""
        with contextlib.suppress(RuntimeError):
            self._look()

    def leave(self, *, failed: bool) -> None:
        """Say that this process ends, and stay until the others do.

        After a failure all stay a while, since torchrun sends the others a signal once the first
        has ended: each can save, and say why, before. Otherwise only the first process stays, as it
        may have the store.
        """
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(RuntimeError):  # without the store there is nobody to wait for
            self._tell(left=True)
            lost = self.failure.rank if self.failure is not None and self.failure.lost else None
            if failed or self._rank == 0:
                self._wait_for(lambda rank: rank not in (self._rank, lost))
                self._kill(lost)
        if failed and self._rank:
            time.sleep(2 * _BEAT)  # the first process is the one with the terminal

    def _kill(self, rank: int | None) -> None:
        """End a process of this host that hangs and does not end itself, if there is one."""
        if rank is not None and rank != self._rank:
            peer = json.loads(self._store.get(self._keys[rank]))
            if peer["host"] != _this_host():
                return
            until = time.monotonic() + 4 * _BEAT  # in which it can say why, if its thread runs
            while time.monotonic() < until and _lives(peer["pid"]):
                time.sleep(_BEAT / 25)
            if _lives(peer["pid"]):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(peer["pid"], signal.SIGKILL)

    def _wait_for(self, which: Callable[[int], bool]) -> None:
        """Wait until the processes that ``which`` is true of have left or gone, for some time."""
        until = time.monotonic() + _TO_LEAVE
        while time.monotonic() < until:
            said = [json.loads(one) for one in self._store.multi_get(self._keys)]
            here = (not one["left"] and _may_live(one) and which(r) for r, one in enumerate(said))
            if not any(here):
                return
            time.sleep(_BEAT / 25)


def _this_host() -> str:
    """Return what processes have in common that can look at each other: host, boot, namespace."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{os.uname().nodename} {boot[:8]} {os.readlink('/proc/self/ns/pid')}"
    return os.uname().nodename


def _lives(pid: int) -> bool:
    """Whether a process of this host runs; one that nobody has waited for does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return not Path("/proc/self/stat").exists()  # no /proc: its signs of life decide
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def _may_live(peer: Mapping[str, Any]) -> bool:
    return bool(peer["host"] != _this_host() or _lives(peer["pid"]))
