"""The log of a process of a run that does not write: ``logs/rank-<n>.log`` in the output directory.

The first process has the terminal and the journal. The others write what they would say there, but
steps, into a file each: so what one of them alone knows, such as why it failed, is not lost. Until
a run begins, lines are kept in memory: bad input leaves no file behind.
"""

import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from halfbyte.errors import HalfbyteError, ProcessFailed, UserError
from halfbyte.foreign_text import as_message, printable, shorten
from halfbyte.report.live import Screen

_LONGEST_TRACEBACK = 20_000  # characters


def log_of_rank(output_dir: Path, rank: int) -> Path:
    """Return the path of a process's log."""
    return output_dir / "logs" / f"rank-{rank}.log"


class RankLog(Screen):
    """Writes notes, warnings and the reason for the end.

    Args:
        path: The file; a resumed run appends to it.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._began = path, False
        self._lines: list[str] = []

    def note(self, text: str) -> None:
        """One line, with the time."""
        self._lines.append(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {as_message(text)}\n")
        if self._began:
            self._write()

    def begin(self, *, total_steps: int, start_step: int, metadata: dict[str, Any]) -> None:
        """From now on there is a file."""
        self._began = True
        self.note(f"training: steps {start_step + 1} to {total_steps}")

    def ended(self, error: BaseException) -> None:
        """The reason for the end, with its traceback if it is a bug."""
        self.note(f"ended: {type(error).__name__}: {error}")
        if not isinstance(error, HalfbyteError | KeyboardInterrupt):
            said = "".join(traceback.format_exception(error))
            self._lines.append(printable(shorten(said, _LONGEST_TRACEBACK)))
        bad_input = error.exit_code == 2 if isinstance(error, ProcessFailed) else False
        if self._began or not (bad_input or isinstance(error, UserError)):
            self._write()

    def _write(self) -> None:
        lines, self._lines = self._lines, []
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a", encoding="utf-8") as file:
                file.writelines(lines)
        except OSError as error:  # the disk is full, perhaps: the run itself can go on
            print(f"cannot write {self._path}: {error.strerror}", *lines, sep="\n", file=sys.stderr)
