"""One input: a reader accepts it or raises an error of ours, and touches no other file."""

import contextlib
import io
import os
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import halfbyte
from halfbyte.errors import HalfbyteError
from tests.fuzz.targets import Target

LONGEST_MESSAGE = 2000

_SOURCE = str(Path(halfbyte.__file__).parent)


@dataclass(frozen=True)
class Failure:
    """What went wrong: the same for the same fault, and the details."""

    kind: str
    details: str = ""


def prepare(target: Target, root: Path) -> list[bytes]:
    """Make the directory of a target's cases, and return its valid inputs.

    Args:
        target: What is fuzzed.
        root: An empty directory. The files of the target are in ``case``; what it writes goes to
            ``case/out``.
    """
    (root / "case" / "out").mkdir(parents=True)
    return target.prepare(root / "case")


def examine(target: Target, root: Path, data: bytes) -> Failure | None:
    """Return how a target fails on ``data``, or None."""
    case = root / "case"
    (case / target.file).write_bytes(data)
    before = _listing(root)
    failure = None
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            target.read(case)
    except HalfbyteError as error:
        if len(str(error)) > LONGEST_MESSAGE:
            kind = f"a message of more than {LONGEST_MESSAGE} characters: {_place(error)}"
            failure = Failure(kind, str(error)[:500])
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        details = "".join(traceback.format_exception(error))
        failure = Failure(f"{type(error).__name__}: {_place(error)}", details[-4000:])
    after = _listing(root)
    if failure is None and before != after:
        changed = sorted(path for path, _ in before.items() ^ after.items())
        failure = Failure("files outside the output", ", ".join(changed[:10]))
    return failure


def _listing(root: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of every file that a reader must leave alone."""
    found = {}
    for directory, _, names in os.walk(root):
        if not Path(directory).is_relative_to(root / "case" / "out"):
            for name in names:
                at = os.lstat(os.path.join(directory, name))
                found[os.path.relpath(os.path.join(directory, name), root)] = (
                    at.st_size,
                    at.st_mtime_ns,
                )
    return found


def _place(error: BaseException) -> str:
    """Return the innermost line of halfbyte in a traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(_SOURCE)]
    if not ours:
        return "outside halfbyte"
    return f"{os.path.relpath(ours[-1].filename, _SOURCE)}:{ours[-1].lineno}"
