"""Directories of derived data in the user's cache, made once and kept as long as there is room.

A directory is named by a digest of everything its content depends on. It is written under another
name and renamed when it is complete, so two processes may make the same one, and it is never
changed. If all of a kind take more than a limit, the least recently used are removed, except those
in use: a process that uses one holds a lock on it until it ends. Where the cache cannot be written,
a temporary directory takes its place, which is removed when the process ends.
"""

import atexit
import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from halfbyte.atomic import output_errors, require_writable
from halfbyte.errors import OutputError

logger = logging.getLogger("halfbyte")

_LOCK, _UNFINISHED = ".lock", ".unfinished-"
_LEFT_FREE = 2 * 10**9  # bytes

# What this process uses: a lock on each directory of the cache, and the temporary ones.
_locks: dict[Path, int] = {}
_temporary: list[tempfile.TemporaryDirectory[str]] = []


class CachedDirectory(NamedTuple):
    """A directory of the cache, and a message for the user, such as that it is a temporary one."""

    path: Path
    note: str | None = None


def cache_home() -> Path:
    """Return halfbyte's part of the user's cache, under ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "halfbyte"


def temporary_directory() -> Path:
    """Return a new directory that is removed when the process ends.

    Raises:
        OutputError: There is no place for one.
    """
    with output_errors(Path(tempfile.gettempdir())):
        found = tempfile.TemporaryDirectory(prefix="halfbyte-", ignore_cleanup_errors=True)
    atexit.register(found.cleanup)
    _temporary.append(found)
    return Path(found.name)


def cached_directory(
    kind: str,
    key: str,
    make: Callable[[Path], None],
    *,
    limit: int,
    is_whole: Callable[[Path], bool] = lambda path: True,
) -> CachedDirectory:
    """Return the directory ``key`` of the cache, which stays there until the process ends.

    Args:
        kind: The directory of the cache in which it lies.
        key: Its name: a digest of all that its content depends on.
        make: Fills an empty directory, if there is none. Its errors, except ``OSError``, are
            raised as they are.
        limit: Bytes that all directories of this kind may take; those in use count, but stay.
        is_whole: Whether a directory has what was written; otherwise it is made again.

    Raises:
        OutputError: No space is left while it is made.
    """
    home = cache_home() / kind
    path = home / key
    try:
        require_writable(home)
    except OutputError as error:
        if _hold(path) and is_whole(path):
            return CachedDirectory(path)
        temporary = temporary_directory()
        with output_errors(temporary):
            make(temporary)
        return CachedDirectory(temporary, f"{error}; {temporary} is used for this run only")
    with output_errors(path):
        with _changing(home):
            found = _hold(path)
        if found and is_whole(path):
            return CachedDirectory(path)
        with _changing(home):
            if found:
                logger.warning("%s is damaged, and made again", path)
                _release(path)
                shutil.rmtree(path, ignore_errors=True)
            fresh = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=home))
            descriptor = os.open(fresh, os.O_RDONLY)
            _lock(descriptor, fcntl.LOCK_EX)
        try:
            make(fresh)
            _flush(fresh)
            with _changing(home):
                if not _hold(path):  # otherwise another process was faster
                    os.rename(fresh, path)
                    _lock(descriptor, fcntl.LOCK_SH)
                    _locks[path] = descriptor
        finally:
            if _locks.get(path) != descriptor:
                os.close(descriptor)
                shutil.rmtree(fresh, ignore_errors=True)
        trim(kind, limit)
    return CachedDirectory(path)


def trim(kind: str, limit: int) -> bool:
    """Remove what killed processes left, and what was used least recently, up to the limit.

    Args:
        kind: The directory of the cache.
        limit: Bytes that its directories may take; those in use count, but stay.

    Returns:
        Whether they are within the limit, and some space is left on the disk.
    """
    home, found = cache_home() / kind, []
    with _changing(home):
        for path in home.iterdir():
            if path.name.startswith(_UNFINISHED):
                _remove(path)
            elif path.is_dir():
                size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                found.append((path.stat().st_mtime, size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total > limit and path not in _locks and _remove(path):
                total -= size
    if total > limit:
        logger.warning("%s takes %.1f GB, all of it in use", home, total / 1e9)
    return total <= limit and shutil.disk_usage(home).free > _LEFT_FREE


@contextlib.contextmanager
def _changing(home: Path) -> Iterator[None]:
    """Let no other process find, name or remove directories of this kind meanwhile: a moment."""
    with open(home / _LOCK, "ab") as file:
        _lock(file.fileno(), fcntl.LOCK_EX)
        yield


def _lock(descriptor: int, operation: int) -> None:
    with contextlib.suppress(OSError):  # this file system has no locks
        fcntl.flock(descriptor, operation)


def _hold(path: Path) -> bool:
    """Keep a directory from being removed, and mark it as used; return False if there is none."""
    if path in _locks:
        return path.exists()
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    _lock(descriptor, fcntl.LOCK_SH)
    with contextlib.suppress(OSError):  # of somebody else
        os.utime(path)
    _locks[path] = descriptor
    return True


def _release(path: Path) -> None:
    os.close(_locks.pop(path))


def _flush(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _remove(path: Path) -> bool:
    """Remove a directory of the cache, unless a process uses it, or that cannot be known."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
