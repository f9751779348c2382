"""Compiles C++ files on first use, and caches the result.

A build is one compiler call of a second or two. The library is stored in the user's cache directory
under a hash of everything it depends on, so a new version or another compiler builds again and
nothing is ever stale. It is written to a temporary name and renamed, so processes may build at the
same time.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from halfbyte.errors import HalfbyteError


class Unavailable(HalfbyteError):
    """A library could not be built, with the reason; callers use their fallback."""


def shared_object(source: Path, flags: Sequence[str]) -> Path:
    """Returns the shared library of a C++ file, compiling it if it is not in the cache.

    Args:
        source: The file.
        flags: Compiler flags.

    Raises:
        Unavailable: If there is no compiler, or compilation fails.
    """
    compiler = _compiler()
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=False)
    # The CPU's architecture, not its model: a build works for every CPU of an architecture.
    parts = (*compiler, version.stdout, *flags, platform.machine(), source.read_bytes())
    digest = hashlib.sha256(repr(parts).encode())
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    name = f"{source.parent.name}-{source.stem}-{digest.hexdigest()[:20]}.so"
    built = directory / "halfbyte" / name
    if not built.exists():
        built.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _build([*compiler, *flags, str(source)], built)
    return built


def _compiler() -> list[str]:
    """Returns the command that compiles C++: $CXX if set, else the first of the usual names."""
    named = os.environ.get("CXX")
    if named:
        command = shlex.split(named)
        if shutil.which(command[0]):
            return command
        raise Unavailable(f"$CXX names a compiler that does not exist, {named!r}: correct it")
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise Unavailable(
        "there is no C++ compiler (c++, g++ or clang++): install one, or name one in $CXX"
    )


def _build(command: list[str], library: Path) -> None:
    """Compiles to `library` atomically."""
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as directory:
        built = Path(directory, library.name)
        result = subprocess.run(
            [*command, "-o", str(built)],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if result.returncode != 0:
            lines = result.stderr.splitlines()
            first = next((line for line in lines if "error" in line), *lines[-1:])
            raise Unavailable(f"{command[0]} could not build {command[-1]}: {first}")
        built.replace(library)
