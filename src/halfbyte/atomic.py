"""Atomic writes: files and directories that exist completely or not at all.

Data is written to a hidden sibling (``.NAME.partial-PID``), flushed to disk, and renamed in one
step. A process killed at any moment leaves the old content or the new, and at worst a hidden
sibling, which the next writer of that name removes. An error on the way (no space, no permission)
removes the sibling at once and becomes an ``OutputError``.

A sibling is locked (``flock``) while it is written, so that a process that writes the same name at
the same time does not take it for one that was left behind. The last to finish determines the
content. Where the file system has no such locks, only one process may write a name at a time.
"""

import contextlib
import ctypes
import errno
import fcntl
import glob
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from halfbyte.errors import OutputError

logger = logging.getLogger("halfbyte")

_REASONS = {
    errno.ENOSPC: "no space left on the device; free some, or choose another directory",
    errno.EDQUOT: "the disk quota is used up; free some space, or choose another directory",
    errno.EFBIG: "the file would be larger than this file system or its limits allow",
    errno.EACCES: "permission denied; choose a directory you may write to",
    errno.EPERM: "permission denied; choose a directory you may write to",
    errno.EROFS: "the file system is read-only; choose another directory",
    errno.ENOTDIR: "a part of this path is a file, not a directory; choose another directory",
    errno.ENOTEMPTY: "it exists since a moment ago; remove it, or choose another directory",
    errno.EEXIST: "a part of this path is a file, not a directory; choose another directory",
}


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` raised inside into an ``OutputError`` that says what to do.

    Raises:
        OutputError: If the block raised ``OSError`` while it wrote ``path``.
    """
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
        raise OutputError(f"cannot write {path}: {reason}") from error


def require_writable(directory: str | Path, bytes_needed: int = 0) -> Path:
    """Check, before any work is done, that ``directory`` can be written.

    It is created if it does not exist.

    Args:
        directory: Where files will be written.
        bytes_needed: How many bytes they will take.

    Returns:
        The directory.

    Raises:
        OutputError: If it cannot be created or written, or has not that much free space.
    """
    directory = Path(directory)
    with output_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"\0")
        free = shutil.disk_usage(directory).free
    if free < bytes_needed:
        raise OutputError(
            f"cannot write {directory}: {bytes_needed / 1e9:.2f} GB are needed and "
            f"{free / 1e9:.2f} GB are free; free some space, or choose another directory"
        )
    return directory


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that is renamed to ``path``, replacing an existing one, when the block ends.

    Raises:
        OutputError: If it cannot be written; ``path`` is then what it was before.
    """
    path = Path(os.path.abspath(path))
    with output_errors(path):
        partial = _fresh_sibling(path)
        try:
            with open(partial, "xb") as file:
                lock(file.fileno())
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _flush_directory(path.parent)


@contextlib.contextmanager
def new_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Create a directory that is renamed to ``path`` when the block ends.

    Args:
        path: Its name; parents are created.
        replace: Whether a directory of that name may be there; it goes when the new one is whole.

    Raises:
        OutputError: If ``path`` exists, is not an empty directory and must not be replaced, or has
            changed since the beginning, or cannot be written; then nothing is left behind.
    """
    path = Path(os.path.abspath(path))
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
        if taken and not replace:
            raise OutputError(
                f"cannot write {path}: it exists already; remove it, or choose another directory"
            )
        before = _entries(path) if taken else None
        partial = _fresh_sibling(path)
        held = None
        try:
            partial.mkdir()
            held = os.open(partial, os.O_RDONLY)
            lock(held)
            yield partial
            for directory, _, files in os.walk(partial):
                for name in files:
                    _flush(Path(directory, name))
                _flush_directory(Path(directory))
            if before is None:
                os.replace(partial, path)
            elif _entries(path) == before:
                _exchange(partial, path)
            else:
                raise OutputError(
                    f"{path} has changed in the meantime, so it is not replaced; choose another "
                    "directory"
                )
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            if held is not None:
                os.close(held)
        _flush_directory(path.parent)
        remove_partial(path.parent, glob.escape(path.name))


def remove_directory(path: Path) -> None:
    """Remove a directory so that it is never seen half removed under its name.

    Raises:
        OutputError: If it cannot be removed.
    """
    with output_errors(path):
        doomed = _fresh_sibling(path)
        os.replace(path, doomed)
        shutil.rmtree(doomed)


def remove_partial(parent: Path, pattern: str) -> None:
    """Remove what killed processes left in ``parent`` for names that match the glob ``pattern``."""
    for path in parent.glob(f".{pattern}.partial-*"):
        with contextlib.suppress(OSError):  # another process was faster, or nobody may
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                if lock(descriptor):
                    _remove(path)
            finally:
                os.close(descriptor)


def lock(descriptor: int) -> bool:
    """Lock an open file or directory until it is closed; return False if another process has it.

    True where the file system has no locks, which is logged.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning(
            "the file system of the output has no locks (%s): nothing keeps another process from "
            "writing there at the same time",
            error.strerror,
        )
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _entries(directory: Path) -> tuple[int, list[str]]:
    """Return what identifies a directory, and the names in it."""
    return os.stat(directory).st_ino, sorted(os.listdir(directory))


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>


def _exchange(new: Path, old: Path) -> None:
    """Put ``new`` in the place of ``old``, and remove that.

    In one step if kernel and file system can exchange names (Linux has renameat2); otherwise there
    is a moment in which neither has the name.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    names = os.fsencode(new), os.fsencode(old)
    if rename is not None and not rename(
        _AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE
    ):
        _remove(new)
        return
    os.replace(old, aside := new.with_name(new.name + "-old"))
    os.replace(new, old)
    _remove(aside)


def _fresh_sibling(path: Path) -> Path:
    remove_partial(path.parent, glob.escape(path.name))
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_directory(path: Path) -> None:
    try:
        _flush(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # no such notion on this file system
            raise
