"""Follows runs as they are made: reads only what is new in their journals, and knows who is alive.

A run writes its journal from its first step on, and holds the lock of its directory
(`checkpoint.output_lock`) as long as its process lives, however that ends. So a journal without an
end is a run that is running if the lock is held, and one that has died if it is not.
"""

import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

from halfbyte.checkpoint.output_lock import is_locked, lock_files
from halfbyte.errors import ConfigError
from halfbyte.input_files import open_file
from halfbyte.report.journal import parse_line
from halfbyte.report.runs import Run, RunReader

JOURNAL = "journal.jsonl"

_CHUNK = 2**22  # bytes read at a time
_COMPARED = 4096  # bytes before the place where reading goes on
_FRESH = 60.0  # seconds in which a journal without a lock may still be written by another machine
_DEEPEST = 3  # folders below a directory of runs
_MOST_RUNS = 64


class FollowedJournal:
    """A journal of which each look reads what was appended since the last one.

    A resumed run truncates its journal, and another run may replace it. Then the bytes before the
    place where reading would go on are others, and it is read from its beginning.
    """

    def __init__(self, path: Path) -> None:
        """Follow ``path``, which need not exist yet."""
        self.path = path
        self._forget()

    def _forget(self) -> None:
        self.reader = RunReader(self.path)
        self._file: tuple[int, int] | None = None  # device and inode
        self._known: tuple[int, int] | None = None  # size and time of change at the last look
        self._at = 0
        self._before = b""

    @property
    def exists(self) -> bool:
        """Whether there was a journal at the last look."""
        return self._file is not None

    @property
    def changed(self) -> int:
        """When the file was changed, in nanoseconds since 1970; 0 without a file."""
        return 0 if self._known is None else self._known[1]

    def look(self) -> bool:
        """Read what is new; return whether anything is.

        Raises:
            OSError: There is something under the journal's name that cannot be read.
        """
        try:
            found = os.stat(self.path)
            if self._known == (found.st_size, found.st_mtime_ns) and self._is(found):
                return False
            with open_file(self.path) as file:
                return self._read(file)
        except (FileNotFoundError, NotADirectoryError):
            existed = self.exists
            self._forget()
            return existed

    def _is(self, found: os.stat_result) -> bool:
        return self._file == (found.st_dev, found.st_ino)

    def _read(self, file: IO[bytes]) -> bool:
        found = os.fstat(file.fileno())
        changed = not self._is(found)
        file.seek(self._at - len(self._before))
        if changed or file.read(len(self._before)) != self._before:
            changed = True
            self._forget()
            file.seek(0)
        self._file = found.st_dev, found.st_ino
        self._known = found.st_size, found.st_mtime_ns
        held = b""
        while chunk := file.read(_CHUNK):
            held += chunk
            end = held.rfind(b"\n") + 1
            if not end:
                continue  # a line that is longer, or not yet whole
            lines = held[:end].splitlines(keepends=True)
            self.reader.read(record for record in map(parse_line, lines) if record is not None)
            self._before, self._at, held = lines[-1][-_COMPARED:], self._at + end, held[end:]
            changed = True
        return changed


class FollowedRun:
    """A run's directory that is looked at again and again.

    Args:
        path: The directory, which need not exist yet, or its journal.
    """

    def __init__(self, path: Path) -> None:
        is_journal = os.path.isfile(path)
        self.directory = path.parent if is_journal else path
        self._journal = FollowedJournal(path if is_journal else path / JOURNAL)
        self._version = 0
        self._seen: tuple[object, ...] = ()
        self.run = Run(name=self._name, path=self.directory)

    @property
    def _name(self) -> str:
        return Path(os.path.realpath(self.directory)).name or str(self.directory)

    def look(self) -> bool:
        """Look at the journal and the lock; return whether ``run`` has changed."""
        # The lock first: whoever gives it up has written the end of the journal before.
        locked = is_locked(self.directory)
        problem = ""
        try:
            self._version += self._journal.look()
        except OSError as error:
            problem = f"the journal cannot be read: {error.strerror}"
        if locked is False:
            locked = is_locked(self.directory)  # another run may have begun meanwhile
        fresh = time.time() - self._journal.changed / 1e9 < _FRESH
        again = bool(locked) and self._locked_since_last_line
        seen = self._version, locked, again, fresh, problem
        if seen == self._seen:
            return False
        self._seen = seen
        self.run = self._journal.reader.run()
        self.run.name = self._name
        if problem:
            self.run.phase, self.run.state = "unknown", problem
        else:
            self.run.phase, self.run.state = self._state(self.run, locked, again=again, fresh=fresh)
        return True

    def _state(self, run: Run, locked: bool | None, *, again: bool, fresh: bool) -> tuple[str, str]:
        """The phase of a run, and the same in words.

        Args:
            run: The run.
            locked: Whether a process writes its directory, if that is known.
            again: Whether that process has not written to the journal yet.
            fresh: Whether the journal has changed lately.
        """
        if run.finished:
            return "finished", "finished"
        if not self._journal.exists:
            if locked:
                return "loading", "loading: its first step has not begun"
            place = "" if os.path.isdir(self.directory) else f": there is no {self.directory} yet"
            return "waiting", f"waiting for the run to begin{place}"
        if run.phase == "stopped":
            if locked:
                return "loading", f"starting again, after it was {run.state}"
            return "stopped", run.state
        heard = f"last line {run.heard[:19].replace('T', ' ')} UTC"
        if again:
            return "loading", f"starting again; it had died {_after(run)}"
        if locked or (fresh and locked is None):
            return "running", f"running; {heard}"
        if locked is None:
            return "unknown", f"running, or killed: its lock cannot be read; {heard}"
        if fresh and not self._left_a_lock:
            return "running", f"running, written by no process of this machine; {heard}"
        return "died", f"died {_after(run)}: its process has ended; {heard}{self._again}"

    @property
    def _locked_since_last_line(self) -> bool:
        """Whether the process with the lock, which writes its file first, has added no line."""
        for path in lock_files(self.directory):
            try:
                return os.stat(path).st_mtime_ns > self._journal.changed
            except OSError:  # there is none of this name
                continue
        return False

    @property
    def _left_a_lock(self) -> bool:
        """Whether a process of this machine was killed with the lock: its file is still there."""
        return any(map(os.path.exists, lock_files(self.directory)))

    @property
    def _again(self) -> str:
        config = self.directory / "config.yaml"
        if not os.path.isfile(config):
            return ""
        return f". To go on: halfbyte train {shlex.quote(str(config))} --resume"


def _after(run: Run) -> str:
    return f"after step {run.steps:,}" if run.steps else "before its first step was reported"


def find_runs(path: Path) -> list[Path]:
    """The runs in a directory: itself, or those below it; itself if there are none yet."""
    if not os.path.isdir(path) or os.path.exists(path / JOURNAL) or is_locked(path):
        return [path]
    return sorted(_below(path, _DEEPEST))[:_MOST_RUNS] or [path]


def _below(directory: Path, depth: int) -> list[Path]:
    found = []
    try:
        with os.scandir(directory) as entries:
            folders = [Path(one.path) for one in entries if one.is_dir(follow_symlinks=False)]
    except OSError:  # not ours to read, or just removed: there is no run of ours in it
        return []
    for folder in folders:
        if os.path.exists(folder / JOURNAL):
            found.append(folder)
        elif depth > 1 and not folder.name.startswith((".", "checkpoint-")):
            found += _below(folder, depth - 1)
    return found


def require_journal(path: Path) -> None:
    """Check that a path, if it is a file, is the journal of a run.

    Raises:
        ConfigError: It is another file, or cannot be read.
    """
    if path.is_dir() or not path.exists():
        return
    try:
        with open_file(path) as file:
            first = file.readline(_CHUNK)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    if first.endswith(b"\n") and parse_line(first) is None:
        raise ConfigError(
            f"{path} is not the journal of a run: expected a JSON object on its first line. Give "
            "the directory of a run, its journal.jsonl, or a directory of runs"
        )


class FollowedRuns:
    """Directories of runs; runs that begin later are found, too."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._followed: dict[Path, FollowedRun] = {}

    def look(self) -> bool:
        """Look at all runs; return whether any has changed."""
        found = list(dict.fromkeys(run for path in self._paths for run in find_runs(path)))
        changed = list(self._followed) != found
        self._followed = {run: self._followed.get(run) or FollowedRun(run) for run in found}
        for followed in self._followed.values():
            changed |= followed.look()
        return changed

    @property
    def runs(self) -> list[Run]:
        """The runs as of the last look; copies, which a page may name apart."""
        return [replace(followed.run) for followed in self._followed.values()]
