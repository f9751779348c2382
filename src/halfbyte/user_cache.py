"""Directories of derived data in the user's cache, made once and kept as long as there is room.

A directory is named by a digest of everything its content depends on. It is written under another
name and renamed when it is complete, so two processes may make the same one, and it is never
changed. If all of a kind take more than a limit, the least recently used are removed, except those
in use: a process that uses one holds a lock on it until it ends. Where the cache cannot be written,
a temporary directory takes its place, which is removed when the process ends.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from halfbyte.atomic import (
    new_directory,
    output_errors,
    remove_directory,
    remove_partial,
    require_writable,
)
from halfbyte.errors import OutputError

logger = logging.getLogger("halfbyte")

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
        _temporary.append(
            tempfile.TemporaryDirectory(prefix="halfbyte-", ignore_cleanup_errors=True)
        )
    return Path(_temporary[-1].name)


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
    if _hold(path):
        if is_whole(path):
            return CachedDirectory(path)
        logger.warning("%s is damaged, and made again", path)
        _release(path)
        with contextlib.suppress(OutputError):  # the next attempt to write there has the reason
            remove_directory(path)
    try:
        require_writable(home)
    except OutputError as error:
        temporary = temporary_directory()
        with output_errors(temporary):
            make(temporary)
        return CachedDirectory(temporary, f"{error}; {temporary} is used for this run only")
    held = False
    while not held:  # another process may remove it before it is held
        try:
            with new_directory(path) as fresh:
                make(fresh)
        except OutputError:
            held = _hold(path)  # another process was faster
            if not held:
                raise
        else:
            held = _hold(path)
    trim(kind, limit)
    return CachedDirectory(path)


def _hold(path: Path) -> bool:
    """Keep a directory from being removed, and mark it as used; return False if there is none."""
    if path in _locks:
        return path.exists()
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        with contextlib.suppress(OSError):  # no locks on this file system, or a read-only one
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        with contextlib.suppress(OSError):
            os.utime(path)
        # Removal renames it first; it may have happened between opening and locking.
        held = os.stat(path).st_ino == os.fstat(descriptor).st_ino
    except OSError:
        held = False
    if held:
        _locks[path] = descriptor
    else:
        os.close(descriptor)
    return held


def _release(path: Path) -> None:
    os.close(_locks.pop(path))


def trim(kind: str, limit: int) -> bool:
    """Remove what was used least recently, until the rest is within the limit, or in use.

    Args:
        kind: The directory of the cache.
        limit: Bytes that its directories may take.

    Returns:
        Whether they are within the limit, and some space is left on the disk.
    """
    home = cache_home() / kind
    remove_partial(home, "*")
    found = []
    for path in home.iterdir():
        with contextlib.suppress(OSError):  # removed by another process since
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            found.append((path.stat().st_mtime, size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total > limit and path not in _locks and _remove(path):
            total -= size
    if total > limit:
        logger.warning("%s takes %.1f GB, all of it in use", home, total / 1e9)
    return total <= limit and shutil.disk_usage(home).free > _LEFT_FREE


def _remove(path: Path) -> bool:
    """Remove a directory of the cache, unless a process uses it, or that cannot be known."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove_directory(path)
    except (OSError, OutputError):
        return False
    finally:
        os.close(descriptor)
    return True
