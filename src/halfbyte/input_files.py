"""Opening the files that a user names: regular files only.

Opening a named pipe waits until somebody writes to it, and a device such as ``/dev/zero`` never
ends. So whatever opens a path that was given to us, or lies in a directory that was, does it here.
Errors are ``OSError``, like those of ``open``, with a text that says what was expected; each reader
turns them into its own kind of error, with the path.
"""

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _require_regular(mode: int, path: str | Path) -> None:
    kind = _KINDS.get(stat.S_IFMT(mode))
    if kind is None:
        return
    hint = "; write what it gives to a file first" if kind == "a pipe" else ""
    code = errno.EISDIR if kind == "a directory" else errno.EINVAL
    raise OSError(code, f"expected a file, found {kind}{hint}", str(path))


def open_file(path: str | Path) -> BufferedReader:
    """Open a regular file for reading; links are followed.

    Raises:
        OSError: It does not exist, may not be read, or is a directory, a pipe, a socket or a
            device.
    """

    def opener(name: str, flags: int) -> int:
        # Looked at before it is opened, since opening a device may have an effect, and again after,
        # since another file may have come in its place. Without waiting for a writer of a pipe.
        _require_regular(os.stat(name).st_mode, path)
        descriptor = os.open(name, flags | os.O_NONBLOCK)
        try:
            _require_regular(os.fstat(descriptor).st_mode, path)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    return open(path, "rb", opener=opener)


def read_file(path: str | Path, most: int | None = None) -> bytes:
    """Return the bytes of a regular file.

    Args:
        path: The file.
        most: Largest size in bytes, for files that are always small.

    Raises:
        OSError: As `open_file`, or it is larger than ``most``.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            found = f"{size / 1e6:,.1f} MB; is it another file?"
            raise OSError(
                errno.EFBIG, f"expected at most {most / 1e6:g} MB, found {found}", str(path)
            )
        return file.read()
