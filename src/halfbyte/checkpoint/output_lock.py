"""One process at a time writes an output directory.

Two runs that wrote checkpoints and a journal into one directory would destroy each other's. So
whatever writes one holds a lock (``flock``) on ``.NAME.lock`` beside it, or on ``.lock`` in it if
nothing may be created beside it. The file says who has it, for the message to the second; the lock
itself is the kernel's and ends with the process, however that ends, so none is ever stale.

On NFS such locks hold between hosts (Linux emulates them by the server's). A file system without
any gives no protection, which `atomic.lock` logs.
"""

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from halfbyte.atomic import lock, output_errors
from halfbyte.errors import OutputError
from halfbyte.foreign_text import printable, shorten

_MOST_BYTES = 4000
_TRIES, _SECONDS_BETWEEN = 5, 0.02  # `is_locked` has the lock for microseconds
_MAY_NOT_CREATE = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextlib.contextmanager
def output_lock(directory: str | Path) -> Iterator[None]:
    """Hold the lock of an output directory, which need not exist.

    Args:
        directory: The directory, under any of its names.

    Raises:
        OutputError: Another process writes it, it is a file, or nothing can be created there.
    """
    directory = Path(directory)
    with output_errors(directory):
        place = Path(os.path.realpath(directory))  # Path.resolve raises for a loop of links
        if place.exists() and not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        place.parent.mkdir(parents=True, exist_ok=True)
        path = _beside(place)
        try:
            descriptor = _acquire(path, directory)
        except OSError as error:
            if error.errno not in _MAY_NOT_CREATE or not place.is_dir():
                raise
            descriptor = _acquire(path := place / ".lock", directory)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # an empty file may stay
            path.unlink()  # while it is locked, so that it is not another's
        os.close(descriptor)


def _beside(place: Path) -> Path:
    return place.with_name(f".{place.name}.lock") if place.name else place / ".lock"


def _acquire(path: Path, directory: Path) -> int:
    """Return the descriptor of the locked file ``path``."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            if not _lock_soon(descriptor):
                raise OutputError(
                    f"{directory} is being written by {_owner(descriptor)}; wait until that has "
                    "ended, or give another directory"
                )
            if path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps(_ourselves()).encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last owner has removed it since it was opened


def _lock_soon(descriptor: int) -> bool:
    """Lock an open file, also if another process is just looking whether it is locked."""
    for _ in range(_TRIES):
        if lock(descriptor):
            return True
        time.sleep(_SECONDS_BETWEEN)
    return False


def lock_files(directory: str | Path) -> list[Path]:
    """The files that may hold the lock of a directory: beside it, and in it."""
    place = Path(os.path.realpath(directory))
    return list(dict.fromkeys((_beside(place), place / ".lock")))


def is_locked(directory: str | Path) -> bool | None:
    """Whether a process writes an output directory: it, or its parent, need not exist.

    Nothing is written, so a directory of another user can be looked at.

    Returns:
        True or False; None if that cannot be known: the lock may not be read, or the file system
        has no locks.
    """
    for path in lock_files(directory):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return None
        finally:
            os.close(descriptor)
    return False


def _ourselves() -> dict[str, object]:
    return {
        "pid": os.getpid(),
        "host": os.uname().nodename,
        "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
    }


def _owner(descriptor: int) -> str:
    """Describe the process that has the lock, as far as it has said so."""
    try:
        owner = json.loads(os.pread(descriptor, _MOST_BYTES, 0))
        parts = [shorten(str(owner[name])) for name in ("pid", "host", "since")]
    except (ValueError, LookupError, RecursionError, TypeError):
        return "another process"
    pid, host, since = (printable(part, lines=False) for part in parts)
    return f"process {pid} on {host}, since {since}"
